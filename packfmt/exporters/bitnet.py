"""Hugging Face's BitNet: a folder that transformers loads, with ternary weights packed four rows to a byte.

    X.weight         U8 (rows / 4, cols)
    X.weight_scale   BF16 [1]
    config.json      quantization_config: quant_method "bitnet", and how weights and scales are meant

Everything that is not packed is stored under its own name. transformers turns every linear layer into one of
BitNet's, save those that `modules_to_not_convert` names, so all that stay dense are named there.

Reading is the safetensors container's: it knows such a folder by its config.json.

Source: transformers 5.23.0, integrations/bitnet.py, quantizers/quantizer_bitnet.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from packfmt.codec import PackedTensor, dense_dtype, matrix
from packfmt.errors import PlanError
from packfmt.exporters import Extras, safetensors, safetensors_header
from packfmt.exporters.safetensors import SCALE, SINGLE, open
from packfmt.exporters.safetensors_header import NAME_OF, Entry
from packfmt.exporters.whole import Check, whole_file, whole_folder
from packfmt.layout import Layout, itemsize
from packfmt.plan import Plan, Step

__all__ = ["NAME", "extras_refusal", "name_refusal", "open", "plan_refusal", "refusal", "write"]

NAME = "bitnet"
WEIGHT = ".weight"
HEAD = "lm_head"  # transformers leaves the output layer dense unless a list is given, which ours is
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_positions|wte|wpe|\w*embeddings?|embed)\.weight$")
CARRIED = ("use_rms_norm", "rms_norm_eps")  # of a source that is a BitNet model itself


def linear_class(layout: Layout) -> str:
    """The class of transformers' that computes with a layout; empty if none does."""
    return dict(layout.also).get(NAME, "")


def refusal(layout: Layout, shape: tuple[int, ...]) -> str:
    """Why such a folder cannot hold such a tensor; empty if it can."""
    if dense_dtype(layout):
        return ""
    if not linear_class(layout):
        return f"Hugging Face's BitNet holds bitnet, bitnet_divide and dense tensors, not {layout.name}"
    if len(shape) != 2:
        return f"{len(shape)} dimensions, a linear layer of BitNet's has 2"
    return (
        f"{shape[0]} rows, transformers needs a multiple of 4; leave it with --map REGEX=keep" if shape[0] % 4 else ""
    )


def name_refusal(name: str) -> str:
    """Why no tensor can bear this name; empty if one can."""
    return safetensors.name_refusal(name)


def plan_refusal(steps: tuple[Step, ...]) -> str:
    """Why transformers would not load these tensors together; empty if it would."""
    owner: dict[str, str] = {}
    for step in steps:
        for name in _stored(step).values():
            if name in owner:
                return f"{step.name} and {owner[name]}: both would be stored as {name!r}; keep one of them"
            owner[name] = step.name
    packed = {s.name: linear_class(s.layout) for s in steps if not dense_dtype(s.layout)}
    if len(classes := sorted(set(packed.values()))) > 1:
        return "bitnet and bitnet_divide in one model, which has one linear_class for all; choose one with --map"
    if not classes:
        return "nothing would be bitnet or bitnet_divide"
    stay = _stay_dense(steps)
    for name in packed:
        if not name.endswith(WEIGHT):
            return f"{name}: is called neither .weight nor part of a linear layer; say --map '{re.escape(name)}=keep'"
        if EMBEDDING.search(name):
            return f"{name}: an embedding, which transformers keeps dense; say --map '{re.escape(name)}=keep'"
        module = name.removesuffix(WEIGHT)
        if skipped := next((s for s in stay if _skips(s, module)), ""):
            return f"{name}: transformers would skip it with {skipped}, which stays dense"
    return ""


def extras_refusal(extras: Extras) -> str:
    """Why it cannot do with what the model has beside its tensors; empty if it can."""
    return "" if extras.config is not None else "has no config.json, without which transformers cannot load the weights"


def _stay_dense(steps: tuple[Step, ...]) -> list[str]:
    """The modules whose matrices stay dense, as modules_to_not_convert names them."""
    dense = [s for s in steps if dense_dtype(s.layout) and len(s.shape) == 2 and s.name.endswith(WEIGHT)]
    modules = [s.name.removesuffix(WEIGHT) for s in dense]
    packed = {s.name for s in steps if not dense_dtype(s.layout)}
    head = [] if HEAD + WEIGHT in packed or HEAD in modules else [HEAD]  # tied to the embedding, so in no file
    return modules + head


def _skips(pattern: str, module: str) -> bool:
    """Whether transformers takes a name in its list for this module (quantizers_utils.should_convert_module)."""
    try:
        matches = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
    except re.error:  # a name that is no expression, which transformers could not take either
        matches = None
    return bool(matches) or module.endswith(pattern)


# ---------------------------------------------------------------- writing


def write(path: Path, plan: Plan, tensors: Iterable[PackedTensor], extras: Extras, check: Check | None = None) -> None:
    """Write a folder with one safetensors file, holding one tensor in memory at a time.

    Raises
    ------
    PlanError
        If the container cannot hold the steps, or a tensor is not the one its step announced.
    """
    _check_steps(path, plan.steps)
    if why_not := extras_refusal(extras):
        raise PlanError(f"{plan.source}: {why_not}")
    places = _places(plan.steps)
    text = safetensors_header.text(places, {"format": "pt"})
    room = -(-len(text) // 8) * 8
    stream = iter(tensors)
    with whole_folder(path, check) as folder:
        with whole_file(folder / SINGLE) as file:
            file.write(room.to_bytes(8, "little") + text.ljust(room))
            for step in plan.steps:
                tensor = next(stream, None)
                if tensor is None or (tensor.layout, tensor.shape) != (step.layout, step.shape):
                    got = "nothing" if tensor is None else f"{tensor.layout.name} {tensor.shape}"
                    raise PlanError(f"{step.name}: got {got}, planned {step.layout.name} {step.shape}")
                for component, name in _stored(step).items():
                    file.seek(8 + room + places[name].begin)
                    array = np.ascontiguousarray(tensor.components[component])
                    file.write(array.reshape(-1).view(np.uint8).data)
            if next(stream, None) is not None:
                raise PlanError(f"more tensors than the {len(plan.steps)} planned")
        safetensors.write_extras(folder, extras, _says(plan.steps, extras))


def _check_steps(path: Path, steps: tuple[Step, ...]) -> None:
    if path.suffix in (".safetensors", ".gguf"):
        raise PlanError(f"{path}: Hugging Face's BitNet is a folder, whose config.json says how weights are meant")
    for step in steps:
        if why_not := refusal(step.layout, step.shape) or name_refusal(step.name):
            raise PlanError(f"{step.name}: {why_not}")
    if why_not := plan_refusal(steps):
        raise PlanError(why_not)


def _stored(step: Step) -> dict[str, str]:
    """Component -> its tensor's name in the file."""
    if dense_dtype(step.layout):
        return {"values": step.name}
    return {"weight": step.name, "weight_scale": step.name + SCALE}


def _places(steps: tuple[Step, ...]) -> dict[str, Entry]:
    """Entries in file order: wide elements first, so that every tensor starts at a multiple of its element's size."""
    found = []
    for step in steps:
        for c in step.layout.fit(*matrix(step.shape)).components:
            shape = step.shape if dense_dtype(step.layout) else c.shape
            found.append((_stored(step)[c.name], c.dtype, shape))
    entries, at = {}, 0
    for name, dtype, shape in sorted(found, key=lambda item: -itemsize(item[1])):
        end = at + prod(shape) * itemsize(dtype)
        entries[name] = Entry(NAME_OF[dtype], shape, at, end)
        at = end
    return entries


def _says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    (linear,) = {linear_class(s.layout) for s in steps if not dense_dtype(s.layout)}
    before = (extras.config or {}).get("quantization_config")
    carried: Mapping[str, Any] = before if isinstance(before, dict) and before.get("quant_method") == NAME else {}
    return {
        "quant_method": NAME,
        "linear_class": linear,
        "quantization_mode": "offline",
        **{key: carried[key] for key in CARRIED if key in carried},
        "modules_to_not_convert": _stay_dense(steps),
    }
