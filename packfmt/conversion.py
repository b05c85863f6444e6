"""Carry out a plan: read a tensor, encode it, write it, one at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from packfmt import checkpoint, codecs, exporters, verify
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, PackedTensor, dense_dtype, dense_values
from packfmt.errors import ContainerError, LayoutError, MachineError, PlanError
from packfmt.exporters import beside
from packfmt.layout import DENSE
from packfmt.plan import DENSE_AGAIN, MAX_SHARD, RESCALE, RESTORED, Plan, Recipe, Step, from_json, make_plan

Progress = Callable[[str], None]  # called with the tensor's name when a step is done
NO_FOLDERS = (".onnx", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".npz", ".json", ".ggml", ".msgpack", ".zip")
MOST_LINES = 8  # of refused tensors
FUSED_NAMES = (
    ("q_proj", "k_proj", "v_proj", "query", "key", "value", "attn_q", "attn_k", "attn_v"),
    ("gate_proj", "up_proj", "w1", "w3", "ffn_gate", "ffn_up"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
FUSED = re.compile(rf"(^|.*\.)({'|'.join(name for names in FUSED_NAMES for name in names)})(\.weight)$")
SWAPPED = (
    "experts are (experts, outputs, inputs), as gpt-oss packs them; transformers' dense model has the last two swapped"
)
SPARE = 1 << 20  # bytes of disk wanted beside the tensors, for headers


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    plan: Plan
    path: Path
    source_bytes: int
    bytes: int  # of all files written
    seconds: float
    remarks: tuple[str, ...] = ()  # what encoders did that a user should know, each with its tensor


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "",
    *,
    overrides: Mapping[str, str] | None = None,
    fallback: str = "",
    encoder: str = "",
    container: str = "",
    max_shard: int = MAX_SHARD,
    check: bool = False,
    force: bool = False,
    lossless: bool = False,
    importance: Mapping[str, Array] | None = None,
    read_as: Mapping[str, str] | None = None,
    base: str | Path = "",
) -> Report:
    """Convert a model: the whole job of `packfmt convert`, in one call.

    Parameters
    ----------
    source : a folder, a .safetensors or a .gguf
    target : a new folder, or a file whose suffix names its container
    to : the layout of the weights
    overrides : regular expression -> layout or "keep"; later ones win
    fallback : layout of the weights whose columns do not fill the blocks of `to`
    encoder : a name of the layout's encoders; the default is its first
    container : what the target is for, where its suffix does not say: a name of `exporters.NAMES`
    max_shard : bytes of tensors a file of a safetensors folder
    check : read everything back and check the laws before the target gets its name
    force : replace a target that exists
    lossless : look at the weights first, and refuse whatever would change a number
    importance : for weights by name, what an error in each column costs: (cols,), not negative
    read_as : GGUF type -> layout, where a file does not say which layout it holds
    base : a dense model to tell such layouts by

    Raises
    ------
    PlanError
        If the plan is refused; nothing was written.
    ContainerError, LayoutError, MachineError
        If the source cannot be read, a weight cannot be encoded, or the disk is full.
    """
    recipe = Recipe(to, tuple((overrides or {}).items()), fallback, encoder, max_shard, lossless)
    target = Path(target)
    with checkpoint.open(source, read_as=read_as, base=base) as model:
        plan = plan_for(model, target, recipe, container)
        return run(plan, model, target, check=check, force=force, importance=importance)


def plan_for(model: Checkpoint, target: Path, recipe: Recipe, container: str = "") -> Plan:
    """The plan of a conversion of an open model (`plan.make_plan`)."""
    quantised = beside.quantised(model.extras.config) or {}
    method = quantised.get("quant_method", "packfmt") if isinstance(quantised, dict) else quantised
    if not isinstance(method, str) or method not in ("packfmt", *exporters.METHODS):
        raise PlanError(f"{model.path}: quantised already, as {method!r}, which packfmt does not read yet "
                        f"(it reads {', '.join(exporters.METHODS)}); convert the model it was made from")  # fmt: skip
    holder = target_container(target, container)
    plan = make_plan(str(model.path), model.index, recipe, holder, codecs.get)
    if why_not := holder.extras_refusal(model.extras):
        raise PlanError(f"{model.path}: {why_not}")
    if recipe.lossless:
        _survey(plan, model)
    return plan


def _survey(plan: Plan, model: Checkpoint) -> None:
    """Carry out every step that must lose nothing, and throw the result away.

    Raises
    ------
    PlanError
        With a line for each tensor that would lose something.
    """
    lines = []
    peak = _shared_peaks(plan, model)
    for step in plan.steps:
        if step.lossless or step.action == "repack":
            try:
                apply(step, model[step.name], peak=peak(step))
            except LayoutError as error:
                lines.append(f"{step.name}: {error}")
    if lines:
        more = [f"and {len(lines) - MOST_LINES} tensors more"] if len(lines) > MOST_LINES else []
        raise PlanError("\n".join(["--lossless: refused", *lines[:MOST_LINES], *more]))


def saved_plan(path: Path, model: Checkpoint, target: Path, container: str = "") -> Plan:
    """The plan in a file that `packfmt plan --json` wrote, checked against the model."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: not a saved plan: {error}") from error
    if not container and isinstance(data, dict) and data.get("container") in exporters.FOLDERS:
        container = data["container"]
    try:
        return from_json(data, model.index, target_container(target, container), codecs.get)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def target_container(target: Path, name: str = "") -> exporters.Container:
    """The container that a destination is written in: by name, by suffix, or a safetensors folder."""
    by_suffix = next((n for n, suffix in exporters.SUFFIXES.items() if target.suffix.lower() == suffix), "")
    if by_suffix and target.suffix != exporters.SUFFIXES[by_suffix]:
        raise PlanError(f"{target}: write {exporters.SUFFIXES[by_suffix]}, in small letters")
    if name and by_suffix not in ("", name):
        raise PlanError(f"{target}: its name says {by_suffix}, --export {name}; choose one")
    if not name and target.suffix.lower() in NO_FOLDERS:
        raise PlanError(f"{target}: a folder, a .safetensors or a .gguf is written, no {target.suffix}")
    return exporters.get(name or by_suffix or "safetensors")


def run(
    plan: Plan,
    model: Checkpoint,
    target: Path,
    *,
    check: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    importance: Mapping[str, Array] | None = None,
) -> Report:
    """Carry out a plan. `target` appears under its name only when whole, and checked if `check`.

    importance : for weights by name, what an error in each column costs (`Codec.encode`).

    Raises
    ------
    PlanError
        If the target exists (without `force`), or is the source.
    MachineError
        If the disk has too little room or may not be written.
    """
    begin = time.perf_counter()
    importance = importance or {}
    remarks = list(_costs(plan, importance))
    may_write(plan, model, target, force)
    extras = model.extras
    container = exporters.get(plan.container)
    remarks += container.remarks(plan.steps)
    checker = (lambda path: verify.check_output(path, container.NAME)) if check else None
    try:
        container.write(target, plan, _results(plan, model, progress, importance, remarks), extras, checker)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"{target}: the disk is full; nothing was left under this name") from error
        raise MachineError(f"{target}: {error.strerror or error}") from error
    if _swapped(plan, model):
        remarks.append(SWAPPED)
    written = [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in written)
    source = sum(i.nbytes for i in model.index.values())
    return Report(plan, target, source, size, time.perf_counter() - begin, tuple(remarks))


def _swapped(plan: Plan, model: Checkpoint) -> bool:
    """Whether experts of gpt-oss become dense: transformers has them the other way round then."""
    says = beside.quantised(model.extras.config)
    gpt_oss = isinstance(says, dict) and says.get("quant_method") == "mxfp4"
    return gpt_oss and any(s.action == "decode" and len(s.shape) == 3 for s in plan.steps)


def _costs(plan: Plan, importance: Mapping[str, Array]) -> Iterator[str]:
    """What becomes of importance that no encoder weighs, in words.

    Raises
    ------
    PlanError
        If it names what the plan does not, is not what a weight needs, or no step weighs any.
    """
    steps = {s.name: s for s in plan.steps}
    weighing = set()
    for name, costs in importance.items():
        if name not in steps:
            raise PlanError(f"importance: {name} is no weight of {plan.source}")
        step = steps[name]
        if costs.shape not in (step.shape, step.shape[-1:]) or not np.isfinite(costs).all() or (costs < 0).any():
            need = f"needs {step.shape[-1]} finite numbers of 0 or more"
            raise PlanError(f"importance: {name} is {list(costs.shape)}, {need}")
        if step.encoder and step.encoder in codecs.get(step.layout.name).weighted:
            weighing.add(name)
        else:
            by = f"encoder {step.encoder!r} of {step.layout.name}" if step.encoder else step.action
            yield f"{name}: importance not used, for {by} does not weigh it"
    if importance and not weighing:
        able = "the FP4 family's best, sherry's encoders and ptq161's do"
        raise PlanError(f"importance: nothing here weighs it; {able}")


def _results(
    plan: Plan, model: Checkpoint, progress: Progress | None, importance: Mapping[str, Array], remarks: list[str]
) -> Iterator[PackedTensor]:
    peak = _shared_peaks(plan, model)
    for step in plan.steps:
        try:
            tensor = model[step.name]
            result = apply(step, tensor, importance.get(step.name), peak(step))
        except LayoutError as error:
            hint = "; --encoder NAME would round it" if step.action in ("repack", RESCALE) else ""
            raise LayoutError(f"{step.name}: {error}{hint}") from error
        if text := _remark(step, tensor, result):
            remarks.append(f"{step.name}: {text}")
        yield result
        del result
        if progress:
            progress(step.name)


def _shared_peaks(plan: Plan, model: Checkpoint) -> Callable[[Step], float | None]:
    """What gives the largest magnitude of the layers that run as one, for a step whose encoder wants to know.

    Engines multiply by queries, keys and values at once, and by gates beside what they open; such layers must
    share the scale of the whole tensor (vLLM 0.11, nvfp4 linear methods; NVIDIA ModelOpt, unified_export_hf.py).
    """
    together: dict[tuple[str, str], list[Step]] = {}
    group_of: dict[str, tuple[str, str]] = {}
    for step in plan.steps:
        alone = FUSED.sub(lambda found: found[1] + "*" + found[3], step.name)
        if alone != step.name and step.encoder and step.encoder in codecs.get(step.layout.name).shared:
            kind = next(i for i, names in enumerate(FUSED_NAMES) if FUSED.search(step.name)[2] in names)  # type: ignore[index]
            group_of[step.name] = (f"{alone} {kind}", step.layout.id)
            together.setdefault(group_of[step.name], []).append(step)
    found: dict[tuple[str, str], float] = {}

    def peak(step: Step) -> float | None:
        group = group_of.get(step.name)
        if group is None or len(together[group]) == 1:
            return None
        if group not in found:
            peaks = [float(np.abs(_weight(model[s.name]).astype(np.float32)).max(initial=0)) for s in together[group]]
            found[group] = max([p for p in peaks if np.isfinite(p)], default=0)  # what is not finite is refused later
        return found[group]

    return peak


def apply(step: Step, tensor: PackedTensor, importance: Array | None = None, peak: float | None = None) -> PackedTensor:
    """One step on one tensor. `peak`: as `Codec.encode` has it."""
    if tensor.layout != step.before or tensor.shape != step.shape:
        raise ContainerError(f"{step.name}: is {tensor.layout.name} {tensor.shape}, planned from {step.before.name}")
    if step.action == "keep":
        return tensor
    if step.action in ("repack", RESCALE):
        return tensor.repack(step.layout, rounded_reciprocal=step.action == RESCALE and not step.lossless)
    if step.action == "decode" and step.layout.name == "bf16":
        values = tensor.decode("bfloat16").reshape(tensor.matrix)
        return PackedTensor(step.layout, tensor.shape, {"values": values}, step.dtype)
    weight = _weight(tensor)
    if step.layout.name == "f64":
        values = weight.astype(np.float64).reshape(DENSE["f64"].shapes(*tensor.matrix)["values"])
        return PackedTensor(step.layout, tensor.shape, {"values": values}, step.dtype)
    codec = codecs.get(step.layout.name)
    if step.encoder not in codec.weighted:
        importance = None
    packed = codec.encode(weight, step.encoder, importance=importance, peak=peak, lossless=step.lossless)
    return replace(packed, dtype=step.dtype)


def _weight(tensor: PackedTensor) -> Array:
    return dense_values(tensor) if dense_dtype(tensor.layout) else tensor.decode()


def _remark(step: Step, tensor: PackedTensor, result: PackedTensor) -> str:
    """What the encoder of a step did, or what it found, that a user should know."""
    if step.action == "decode":
        values = dense_values(result)
        ends = np.array([values.min(initial=0), values.max(initial=0)], np.float64)  # both keep a NaN
        return "" if np.isfinite(ends).all() else "some weights are not finite; packfmt validate says where"
    if step.action not in ("quantise", "requantise"):
        return ""
    remark = codecs.get(step.layout.name).remark
    return remark(np.ascontiguousarray(_weight(tensor), np.float32).reshape(tensor.matrix)) if remark else ""


def decode_plan(model: Checkpoint, target: Path, dtype: str = "") -> Plan:
    """The plan of a dense checkpoint: every packed tensor in its own dtype again, or in `dtype` (f32, f16, bf16).

    Raises
    ------
    PlanError
        If nothing is packed, or the container cannot hold a dtype.
    """
    plan = plan_for(model, target, Recipe(DENSE_AGAIN))
    if dtype:
        if dtype not in RESTORED:
            raise PlanError(f"cannot decode to {dtype!r}; there are {', '.join(RESTORED)}")
        dense = DENSE[dtype]
        steps = tuple(
            replace(s, layout=dense, dtype=dense_dtype(dense)) if s.action == "decode" else s for s in plan.steps
        )
        plan = replace(plan, steps=steps)
    if not any(s.action == "decode" for s in plan.steps):
        raise PlanError(f"{model.path}: nothing is packed")
    return plan


def may_write(plan: Plan, model: Checkpoint, target: Path, force: bool) -> None:
    """Refuse a target that exists, is or holds the source, lies nowhere, or has no room.

    Raises
    ------
    PlanError, MachineError
    """
    files = {i.file.resolve() for i in model.index.values()} | {model.path.resolve()}
    here = target.resolve()
    if any(f == here or here in f.parents for f in files) or _same_file(target, model.path):
        raise PlanError(f"{target}: is the source or holds it; choose another destination")
    if model.path.is_dir() and model.path.resolve() in here.parents:
        raise PlanError(f"{target}: lies in the source, which would carry it along; choose another destination")
    if target.exists() and not force:
        raise PlanError(f"{target}: exists; choose another destination or say --force to replace it")
    one_file = target.suffix in exporters.SUFFIXES.values() or plan.container == "gguf"
    if target.exists() and target.is_dir() == one_file:
        there, wanted = ("a folder", "a file") if one_file else ("a file", "a folder")
        raise PlanError(f"{target}: is {there}, and {wanted} is to be written; choose another destination")
    if target.is_dir() and not _replaceable(target):
        raise PlanError(
            f"{target}: a folder that is not known to be packfmt's, or that another ecosystem's reader loads: it may "
            "be the only copy of a model, so --force does not replace it; remove it first, or choose another place"
        )
    folder = target.absolute().parent
    if not folder.is_dir():
        raise PlanError(f"{folder}: no such folder; make it first")
    if not os.access(folder, os.W_OK):
        raise MachineError(f"{folder}: may not be written")
    need = plan.nbytes + sum(f.stat().st_size for f in model.extras.files.values()) + SPARE
    free = shutil.disk_usage(folder).free
    if need > free:
        raise MachineError(f"{folder}: {free:,} bytes free, this conversion needs {need:,}")


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and os.path.samefile(a, b)


def _replaceable(folder: Path) -> bool:
    """Whether --force may delete a folder: it is empty, or its config.json or weights are packfmt's."""
    if not any(folder.iterdir()):
        return True
    try:
        with checkpoint.open(folder) as old:
            # a folder that is quantised in a way of Hugging Face's may be the only copy of a model
            return any(i.layout and not dense_dtype(i.layout) and i.kind == i.layout.name for i in old.index.values())
    except ContainerError:
        return False
