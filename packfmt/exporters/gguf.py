"""GGUF at tensor level: any tensor whose layout is a ggml type, under its own name, in one file.

What GGUF has no place for stands in keys of our own, which other readers pass over:

    packfmt.version   UINT32, of these keys
    packfmt.tensors   JSON: for each tensor its logical shape and dtype, layout, ggml type and the SHA-256 of its bytes,
                      followed by those of the tensor that holds its scale, where there is one
    packfmt.layouts   JSON: description of each packed layout, by its id
    packfmt.config    JSON: the model's config.json

A model that was no GGUF gets `general.architecture` "packfmt-...", which llama.cpp refuses by name: nothing
here maps tensor names or hyperparameters to those of an architecture that it runs.

Which tensors of the file a packed tensor is: `gguf_tensors`. Reading: `gguf_source`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from packfmt.codec import Array, PackedTensor, matrix
from packfmt.errors import PlanError
from packfmt.exporters import Extras, KeyValue, Layouts, output
from packfmt.exporters import gguf_header as header
from packfmt.exporters.beside import without_quantised
from packfmt.exporters.folder import DIVIDES, MULTIPLIES
from packfmt.exporters.gguf_header import MOST_DIMS, Entry, aligned, alignment_of
from packfmt.exporters.gguf_source import NOTHING, OURS, VERSION, GgufSource
from packfmt.exporters.gguf_tensors import NAME, SCALE_BYTES, experts, misfit, others_of, places_in, type_of
from packfmt.exporters.gguf_types import WEIGHT, ggml_types
from packfmt.exporters.output import Lengths, Output, Piece, Place, Sums
from packfmt.layout import DENSE, Layout
from packfmt.plan import Plan, Step

__all__ = ["NAME", "extras_refusal", "lay", "leaves", "name_refusal", "open", "plan_refusal", "refusal", "remarks"]

LONGEST_NAME = 63  # bytes; GGML_MAX_NAME 64 counts the final zero (ggml.h, llama.cpp 067d44f6)
LOOKED_UP = re.compile(r"(token_embd|per_layer_token_embd|position_embd|token_types)\.weight")
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, same file


def refusal(layout: Layout, shape: tuple[int, ...]) -> str:
    """Why GGUF cannot hold such a tensor; empty if it can."""
    if len(shape) > MOST_DIMS:
        return f"{len(shape)} dimensions, GGUF holds {MOST_DIMS} or fewer"
    if kind := type_of(layout):
        return misfit(layout, kind, shape)
    for known in ggml_types().values():
        if layout.name in known.choices[1:]:
            others = " or ".join(dict.fromkeys((known.choices[0], *known.instead.split(" or "))))
            return (
                f"{known.name} has the bytes of {layout.name}, but readers would take them for {known.choices[0]}, "
                f"as {known.why}; {others} may hold its weights"
            )
    return f"GGUF has no type for {layout.name}; packfmt formats says which layouts it holds"


def name_refusal(name: str) -> str:
    """Why no tensor can bear this name in a GGUF; empty if one can."""
    if not name or "\0" in name or not name.isprintable():
        return f"the name {name!r}, GGUF needs one that can be printed"
    length = len(name.encode())
    return f"a name of {length} bytes, GGUF holds {LONGEST_NAME} or fewer" if length > LONGEST_NAME else ""


def leaves(name: str, shape: tuple[int, ...]) -> str:
    """Why such a weight stays dense unless a rule says otherwise; empty, for every weight may be packed."""
    return ""


def plan_refusal(steps: tuple[Step, ...]) -> str:
    """Why these tensors cannot stand together; empty if they can."""
    steps = tuple(_multiplying(steps))
    for name, count in Counter(s.name for s in steps).items():
        if count > 1:
            return f"{name}: stands there with {DIVIDES.suffix}, too, which would become it; keep one of them out"
    owner = {s.name: "it" for s in steps}
    asking = [(s, known) for s in steps if (known := ggml_types().get(type_of(s.layout))) and known.beside]
    # those with a scale first: then the others' are known to be missing
    for step, known in sorted(asking, key=lambda pair: not others_of(pair[0].layout, pair[1], pair[0].name)):
        scale = known.name_beside(step.name)
        if scale in owner:
            return f"{scale}: readers would take {owner[scale]} for the scale of {step.name}; keep one of them out"
        if others_of(step.layout, known, step.name):
            if LOOKED_UP.fullmatch(step.name) and step.before != step.layout:
                other = f"--map '{re.escape(step.name)}={known.alone}'"
                return f"{step.name}: llama.cpp refuses a scale beside a table that it looks tokens up in; say {other}"
            if why_not := name_refusal(scale):
                return f"{step.name}: its scale needs {why_not}"
            owner[scale] = f"that of {step.name}"
    return ""


def remarks(steps: tuple[Step, ...]) -> list[str]:
    """What a user should know of such a file; nothing."""
    return []


def extras_refusal(extras: Extras) -> str:
    """Why it cannot do with what the model has beside its tensors; empty, for it needs nothing."""
    return ""


def open(path: Path, layouts: Layouts, read_as: Mapping[str, str] = NOTHING) -> GgufSource:
    """Open a file and check its header; no tensor is read.

    `read_as` says what a file cannot: type name -> layout, where one type has several orders of bytes
    (STQ1_0=sherry), or id -> type or layout, where several types have the id and size (42=PQ2_0).

    Raises
    ------
    ContainerError
        For the first thing that is not what it should be.
    PlanError
        If `read_as` names no layout, or a type that no tensor has.
    """
    return GgufSource(path, layouts, read_as)


# ---------------------------------------------------------------- writing


def lay(path: Path, plan: Plan, extras: Extras) -> Output:
    """One file, of which every byte that is no component's is zero.

    A GGUF's own key-values are carried over as they are, less `general.file_type` if a layout changed.
    `extras.files` have no place in a GGUF. compressed-tensors' `X.input_global_scale` becomes `X.input_scale`
    beside NVFP4 weights.

    Raises
    ------
    PlanError
        If the container cannot hold a step.
    """
    _check_steps(plan.steps)
    asked = plan.steps
    plan = replace(plan, steps=tuple(_multiplying(asked)))
    called = {before.name: step.name for step, before in zip(plan.steps, asked, strict=True)}
    tensors = [_stored(step) for step in plan.steps]
    head, alignment = _header(plan, extras, tensors, {})
    entries, at = [], len(head)
    for step, before, found in zip(plan.steps, asked, tensors, strict=True):
        pieces: list[Piece] = []
        summed: list[Place] = []
        for stored in found:
            pieces += _pieces(step, stored, at, inverse=step.name != before.name)
            summed.append(Place("", at, stored.nbytes))
            at += aligned(stored.nbytes, alignment)
        entries.append(output.Entry(tuple(pieces), {}, {"": tuple(summed)}))

    def heads(sums: Sums, _: Lengths) -> dict[str, bytes]:
        digests = {called[name]: of_step[""] for name, of_step in sums.items()}
        return {"": _header(plan, extras, tensors, digests)[0]}  # a digest takes the room kept for it

    return Output({"": at}, tuple(entries), heads)


def _multiplying(steps: tuple[Step, ...]) -> Iterator[Step]:
    """The same, with scales of inputs that divide (compressed-tensors') called as those that multiply (llama.cpp's)."""
    beside = [s.name.removesuffix(WEIGHT) for s in steps if (t := ggml_types().get(type_of(s.layout))) and t.beside]
    inverse = {module + DIVIDES.suffix: module + MULTIPLIES.suffix for module in beside}
    for step in steps:
        one = step.layout == DENSE["f32"] and prod(step.shape) == 1
        yield replace(step, name=inverse[step.name]) if one and step.name in inverse else step


def _check_steps(steps: tuple[Step, ...]) -> None:
    seen = set()
    for step in steps:
        if why_not := refusal(step.layout, step.shape) or name_refusal(step.name):
            raise PlanError(f"{step.name}: {why_not}")
        if step.name in seen:
            raise PlanError(f"{step.name}: planned twice")
        seen.add(step.name)
    if why_not := plan_refusal(steps):
        raise PlanError(why_not)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: all of a step, or one component of it, so many `times` over.

    `places` are where components begin in its bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int  # before padding to the alignment
    places: Mapping[str, int]
    times: int = 1


def _pieces(step: Step, stored: Stored, begin: int, inverse: bool) -> Iterator[Piece]:
    """What of a step stands in a tensor of the file that begins there: components, repeated or as 1 / their numbers."""
    nbytes = {c.name: c.nbytes for c in step.layout.fit(*matrix(step.shape)).components}
    for component, at in stored.places.items():
        make = partial(_made, component, stored.times, inverse) if inverse or stored.times > 1 else None
        yield Piece(component, Place("", begin + at, stored.times * nbytes[component]), make)


def _made(component: str, times: int, inverse: bool, tensor: PackedTensor) -> Array:
    numbers = np.tile(tensor.components[component], times)
    with np.errstate(divide="ignore"):
        return np.float32(1) / numbers if inverse else numbers


def _stored(step: Step) -> tuple[Stored, ...]:
    """The tensors of the file that hold a step: one, and one more if its scale is a tensor of its own."""
    kind = type_of(step.layout)
    known, shape = ggml_types()[kind], step.shape or (1,)  # not every reader takes a tensor without dimensions
    main = Stored(step.name, kind, shape, known.sizes(step.shape)[0], places_in(step.layout, known, step.shape))
    others = others_of(step.layout, known, step.name)
    nbytes = {c.name: c.nbytes for c in step.layout.fit(*matrix(step.shape)).components}
    n = experts(step.shape)
    full = n * SCALE_BYTES
    return (
        main,
        *(Stored(name, "F32", (n,), full, {c: 0}, full // nbytes[c]) for c, name in others.items()),
    )


def _header(
    plan: Plan, extras: Extras, tensors: list[tuple[Stored, ...]], sums: Mapping[str, str]
) -> tuple[bytes, int]:
    """All bytes before the tensors, with zeros for digests not yet known, and the alignment."""
    keyvalues = _foreign_keys(plan, extras) | _own_keys(plan, extras, sums)
    try:
        alignment = alignment_of(keyvalues)
    except ValueError as error:
        raise PlanError(str(error)) from error
    entries, offset = [], 0
    for stored in (stored for found in tensors for stored in found):
        entries.append(Entry(stored.name, stored.shape, ggml_types()[stored.kind].ids[0], offset))
        offset += aligned(stored.nbytes, alignment)
    return header.build(keyvalues, entries, alignment), alignment


def _foreign_keys(plan: Plan, extras: Extras) -> dict[str, KeyValue]:
    out = {key: value for key, value in extras.keyvalues.items() if not key.startswith(OURS)}
    if not out:
        model = (extras.config or {}).get("model_type") or "model"
        out["general.architecture"] = KeyValue("STRING", f"packfmt-{model}")
        if name := Path(plan.source).name:
            out["general.name"] = KeyValue("STRING", name)
    elif any(s.before != s.layout for s in plan.steps):
        out.pop("general.file_type", None)  # says which type most tensors have; readers find out themselves
    if any(s.layout.name not in DENSE for s in plan.steps):
        out.setdefault("general.quantization_version", KeyValue("UINT32", QUANTIZATION_VERSION))
    return out


def _own_keys(plan: Plan, extras: Extras, sums: Mapping[str, str]) -> dict[str, KeyValue]:
    ids = {layout: layout.id for layout in dict.fromkeys(s.layout for s in plan.steps)}
    tensors = {
        s.name: {
            "layout": s.layout.name,
            "id": ids[s.layout],
            "type": type_of(s.layout),
            "shape": list(s.shape),
            "dtype": s.dtype,
            "encoder": s.encoder,
            "sha256": sums.get(s.name, "0" * 64),
        }
        for s in plan.steps
    }
    layouts = {key: layout.to_json() for layout, key in ids.items() if layout.name not in DENSE}
    texts = {"tensors": tensors, "layouts": layouts}
    if extras.config is not None:
        texts["config"] = without_quantised(extras.config)
    out = {OURS + "version": KeyValue("UINT32", VERSION)}
    for key, data in texts.items():
        out[OURS + key] = KeyValue("STRING", json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    return out
