"""Conversion: a plan for a model, and the plan carried out.

admission   may it begin: destination, disk, memory
steps       one step, on a tensor or some of its rows
work        the steps of a plan, by threads, a slice of rows at a time
record      what is converted, in a file, so that it can be told from another conversion
journal     what is done of it, so that a conversion that was stopped can go on
tasks       a conversion cut into parts, for tasks and for an executor's workers
running     all of a plan: alone, as one of several tasks, by workers; and what tasks made, merged
mark        a note on an output that it is whole, and whose it is
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from packfmt import checkpoint, codecs, exporters
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, dense_dtype
from packfmt.conversion.admission import memory_for
from packfmt.conversion.journal import Task
from packfmt.conversion.running import Checking, Report, merge, run, survey
from packfmt.conversion.work import Progress
from packfmt.errors import PlanError
from packfmt.exporters import beside
from packfmt.layout import DENSE
from packfmt.plan import DENSE_AGAIN, MAX_SHARD, RESTORED, Plan, Recipe, from_json, make_plan

__all__ = [
    "Checking",
    "Progress",
    "Report",
    "Task",
    "convert",
    "decode_plan",
    "merge",
    "plan_for",
    "run",
    "saved_plan",
    "target_container",
]

NO_FOLDERS = (".onnx", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".npz", ".json", ".ggml", ".msgpack", ".zip")


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
    memory: int = 0,
    resume: bool = False,
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
    memory, resume : as `run` has them

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
        plan = plan_for(model, target, recipe, container, survey_now=False)
        return run(
            plan, model, target, check=check, force=force, survey_first=lossless, importance=importance, memory=memory,
            resume=resume,
        )  # fmt: skip


def plan_for(
    model: Checkpoint, target: Path, recipe: Recipe, container: str = "", memory: int = 0, survey_now: bool = True
) -> Plan:
    """The plan of a conversion of an open model (`plan.make_plan`).

    memory : as `run` has it, for a lossless one
    survey_now : look at the weights of a lossless one; else `run` does, when it has looked at the target
    """
    quantised = beside.quantised(model.extras.config) or {}
    method = quantised.get("quant_method", "packfmt") if isinstance(quantised, dict) else quantised
    if not isinstance(method, str) or method not in ("packfmt", *exporters.METHODS):
        raise PlanError(f"{model.path}: quantised already, as {method!r}, which packfmt does not read yet "
                        f"(it reads {', '.join(exporters.METHODS)}); convert the model it was made from")  # fmt: skip
    holder = target_container(target, container)
    plan = make_plan(str(model.path), model.index, recipe, holder, codecs.get)
    if why_not := holder.extras_refusal(model.extras):
        raise PlanError(f"{model.path}: {why_not}")
    if recipe.lossless and survey_now:
        survey(plan, model, memory_for(plan, memory))
    return plan


def saved_plan(path: Path, model: Checkpoint, target: Path, container: str = "") -> Plan:
    """The plan in a file that `packfmt plan --json` wrote, checked against the model."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        how = "packfmt plan SRC --to LAYOUT --json writes one"
        raise PlanError(f"{path}: not a saved plan: {error}; {how}") from error
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
