"""GGUF at tensor level: any tensor whose layout is a ggml type, under its own name, in one file.

What GGUF has no place for stands in keys of our own, which other readers pass over:

    packfmt.version   UINT32, of these keys
    packfmt.tensors   JSON: for each tensor its logical shape and dtype, layout, ggml type and the SHA-256 of its bytes,
                      followed by those of the tensor that holds its scale, where there is one
    packfmt.layouts   JSON: description of each packed layout, by its id
    packfmt.config    JSON: the model's config.json

A model that was no GGUF gets `general.architecture` "packfmt-...", which llama.cpp refuses by name: nothing
here maps tensor names or hyperparameters to those of an architecture that it runs.

A packed tensor is one tensor of the file, or two: the scale of a whole NVFP4 tensor `X.weight` is the F32
tensor `X.scale` (`GgmlType.beside`), as llama.cpp looks for it: one number, or one for each expert of a stack.
If these are all the same, the layout is that of one number. `X.input_scale` is no part of a weight.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from packfmt import slices
from packfmt.codec import Array, PackedTensor, matrix
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import Extras, KeyValue, Layouts, output
from packfmt.exporters import gguf_header as header
from packfmt.exporters.beside import without_quantised
from packfmt.exporters.folder import DIVIDES, MULTIPLIES
from packfmt.exporters.gguf_header import MOST_DIMS, Entry, aligned, alignment_of
from packfmt.exporters.gguf_types import WEIGHT, GgmlType, among, ggml_types, rooms, sized
from packfmt.exporters.output import CHUNK, Lengths, Output, Piece, Place, Sums
from packfmt.exporters.positional import read_at
from packfmt.layout import DENSE, DTYPES, Layout, dtype_of
from packfmt.plan import Plan, Step, TensorInfo

NAME = "gguf"
VERSION = 1  # of packfmt's own keys
OURS = "packfmt."
DENSE_OF = {name.upper(): DENSE[name] for name in ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64")}
LONGEST_NAME = 63  # bytes; GGML_MAX_NAME 64 counts the final zero (ggml.h, llama.cpp 067d44f6)
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
HADAMARD, ROTATED = "prism.hadamard", ("PQ2_0", "PTQ1_0", "Q2_0")  # keys of PrismML's files, and types they may hold
SCALE_BYTES = 4  # of a scale in a tensor of its own, one F32
DIFFERENT = "a scale of its own for each expert"
MOST_EXPERTS = 1 << 16  # whose scales are looked at before a tensor is read
LOOKED_UP = re.compile(r"(token_embd|per_layer_token_embd|position_embd|token_types)\.weight")
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, same file


def type_of(layout: Layout) -> str:
    """The ggml type that stores a layout; empty if none does."""
    dense = (kind for kind, known in DENSE_OF.items() if known == layout)
    by_name = (kind for kind, known in ggml_types().items() if layout.name in (known.alone, known.scaled))
    return dict(layout.also).get(NAME, "") or next(dense, "") or next(by_name, "")


@cache
def _misfit(layout: Layout, kind: str, shape: tuple[int, ...]) -> str:
    """Why such a tensor cannot be of this ggml type; empty if its components fill the type's bytes.

    The first component is the type's blocks; others, such as a scale, stand in its tail or in a tensor beside it.
    """
    known = ggml_types().get(kind)
    if known is None:
        return f"{layout.name}: GGUF knows no type {kind!r}"
    if layout.streams:
        return f"{layout.name}: has a stream, whose length no ggml type tells"
    blocks, *rest = (c.nbytes for c in layout.fit(*matrix(shape)).components)
    if known.beside and rest:
        scale, count = layout.fit(*matrix(shape)).components[1], rest[0] // SCALE_BYTES
        if len(rest) > 1 or scale.dtype != "<f4":
            return f"{layout.name}: beside its blocks {kind} has nothing but F32 scales, in a tensor of its own"
        if count not in (1, _experts(shape)):
            say = known.each.format(shape[0]) if len(shape) == 3 else known.scaled
            return f"{layout.name}: has {count} scales, but {list(shape)} is no stack of {count} experts; say {say}"
        rest = []
    needs = known.blocks(shape)
    if needs is None:
        return f"{layout.name}: {list(shape)}, {kind} needs a multiple of {known.block} columns"
    if blocks != needs:
        return f"{layout.name}: {prod(shape)} weights take {blocks} bytes, {kind} {needs}"
    if sum(rest) > (max(known.tails) if prod(shape) else 0):
        return f"{layout.name}: {sum(rest)} bytes beside its {layout.components[0].name}, for which {kind} has no room"
    return ""


def refusal(layout: Layout, shape: tuple[int, ...]) -> str:
    """Why GGUF cannot hold such a tensor; empty if it can."""
    if len(shape) > MOST_DIMS:
        return f"{len(shape)} dimensions, GGUF holds {MOST_DIMS} or fewer"
    if kind := type_of(layout):
        return _misfit(layout, kind, shape)
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
    for step, known in sorted(asking, key=lambda pair: not _beside(pair[0].layout, pair[1], pair[0].name)):
        scale = known.name_beside(step.name)
        if scale in owner:
            return f"{scale}: readers would take {owner[scale]} for the scale of {step.name}; keep one of them out"
        if _beside(step.layout, known, step.name):
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
    main = Stored(step.name, kind, shape, known.sizes(step.shape)[0], _places(step.layout, known, step.shape))
    others = _beside(step.layout, known, step.name)
    nbytes = {c.name: c.nbytes for c in step.layout.fit(*matrix(step.shape)).components}
    n = _experts(step.shape)
    full = n * SCALE_BYTES
    return (
        main,
        *(Stored(name, "F32", (n,), full, {c: 0}, full // nbytes[c]) for c, name in others.items()),
    )


def _experts(shape: tuple[int, ...]) -> int:
    """How many scales llama.cpp wants of a tensor: one for each expert of a stack."""
    return max(1, shape[0]) if len(shape) == 3 else 1


def _places(layout: Layout, known: GgmlType | None, shape: tuple[int, ...]) -> dict[str, int]:
    """Where components begin in a tensor's bytes: the first is its blocks, others stand in the tail if it has one."""
    first, *rest = layout.fit(*matrix(shape)).components
    places, at = {first.name: 0}, aligned(first.nbytes, known.tail_alignment if known else 1)
    for c in rest if not known or not known.beside else ():
        places[c.name] = at
        at += c.nbytes
    return places


def _beside(layout: Layout, known: GgmlType | None, name: str) -> dict[str, str]:
    """Component -> the tensor of its own that holds it; empty if all are in the tensor `name`."""
    rest = layout.components[1:] if known and known.beside else ()
    return {c.name: known.name_beside(name) for c in rest if known}


def _alike(scales: Array) -> bool:
    """Whether all scales in these bytes are the same."""
    each = scales.reshape(-1, SCALE_BYTES)
    return bool((each == each[:1]).all())


def _as_many(scales: Array, nbytes: int) -> Array | None:
    """Bytes of so many scales, of those that a file has: these, or the one that they all are; None if they differ."""
    if scales.size == nbytes:
        return scales
    return np.tile(scales[:SCALE_BYTES], nbytes // SCALE_BYTES) if _alike(scales) else None


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


# ---------------------------------------------------------------- reading


class GgufSource:
    """An open GGUF file. `read_as` says what the file does not: see `open`."""

    def __init__(self, path: Path, layouts: Layouts, read_as: Mapping[str, str] = NOTHING) -> None:
        self.path = path
        self._file = path.open("rb")
        self._layouts = cache(layouts)
        self._read_as = dict(read_as)
        self._unused = set(read_as)
        try:
            size = os.fstat(self._file.fileno()).st_size
            self._size = size
            self._head = header.read(path, self._file, size)
            self._records, described = self._own()
            self._rooms = rooms(size, self._head)
            self._types = self._tell_apart()
            self._entries = {e.name: e for e in self._head.entries}
            self._places = {e.name: self._head.data + e.offset for e in self._head.entries}
            infos = [self._info(e, described) for e in self._head.entries]
            header.check_places(path, size, self._head, [i.nbytes for i in infos])
            self._sizes = {i.name: i.nbytes for i in infos}
            self._beside = self._scales_beside(infos)
            taken = {name for names in self._beside.values() for name in names.values()}
            self.index = {i.name: self._whole(i) for i in infos if i.name not in taken}
            self.undecided = {
                t.name: t.choices
                for t in self._types.values()
                if t and t.why and any(i.kind == t.name and i.layout is None for i in infos)
            }
            self._check_used()
            self.extras = self._extras()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def map(self, name: str) -> PackedTensor:
        """As `read`: records are read, never mapped."""
        return self.read(name)

    def check(self, name: str) -> None:
        """Compare the tensor's bytes with its checksum, a piece at a time."""
        if (record := self._records.get(name)) is None:
            return
        digest = sha256()
        for where in (name, *self._beside.get(name, {}).values()):
            for begin in range(0, self._sizes[where], CHUNK):
                digest.update(self._bytes(where, min(CHUNK, self._sizes[where] - begin), begin).data)
        if digest.hexdigest() != record["sha256"]:
            raise self._fail(f"{name}: its bytes are not those that were written", "PF109")

    def files(self) -> list[Path]:
        """The file."""
        return [self.path]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> PackedTensor:
        """The tensor called `name`, whose checksum is checked where the file has one; or rows of it, unchecked.

        Raises
        ------
        ContainerError
            If no layout describes its type, or its bytes are not those that were written.
        """
        info = self.index[name]
        if info.layout is None:
            why = info.why or "which no layout of packfmt describes"
            raise self._fail(f"{name}: is {info.kind}, {why}", "PF105")
        if rows is not None:
            return self._rows(info, info.layout, rows)
        others = self._beside.get(name, {})
        raw = {where: self._bytes(where, self._sizes[where]) for where in (name, *others.values())}
        record = self._records.get(name)
        if record:
            digest = sha256()
            for piece in raw.values():
                digest.update(piece.data)
            if digest.hexdigest() != record["sha256"]:
                raise self._fail(f"{name}: its bytes are not those that were written", "PF109")
        components = {}
        places = _places(info.layout, ggml_types().get(info.kind), info.shape)
        for c in info.layout.fit(*matrix(info.shape)).components:
            where = others.get(c.name, "")
            stored = _as_many(raw[where], c.nbytes) if where else raw[name][places[c.name] :][: c.nbytes]
            if stored is None:
                raise self._many_scales(info, where)
            components[c.name] = stored.view(dtype_of(c.dtype)).reshape(c.shape)
        return PackedTensor(info.layout, info.shape, components, info.dtype)

    def _rows(self, info: TensorInfo, layout: Layout, rows: tuple[int, int]) -> PackedTensor:
        others = self._beside.get(info.name, {})
        places = _places(layout, ggml_types().get(info.kind), info.shape)

        def fill(component: str, pieces: list[tuple[int, Array]]) -> None:
            if where := others.get(component):
                ((_, piece),) = pieces  # a scale that all rows share
                scales = _as_many(self._bytes(where, self._sizes[where]), len(piece))
                if scales is None:
                    raise self._many_scales(info, where)
                piece[:] = scales
                return
            for begin, piece in pieces:
                self._read_into(info.name, places[component] + begin, piece)

        found = slices.gather(layout, info.shape, rows, fill, info.name)
        return PackedTensor(layout, (rows[1] - rows[0], info.shape[-1]), found, info.dtype)

    def _many_scales(self, info: TensorInfo, where: str) -> ContainerError:
        what = f"{where} beside it has {DIFFERENT}, {info.layout.name if info.layout else info.kind} has one for all"
        return self._fail(f"{info.name}: is {info.kind}, and {what}", "PF105")

    def _fail(self, what: str, rule: str) -> ContainerError:
        return ContainerError(f"{self.path}: {what}", rule)

    def _bytes(self, name: str, count: int, begin: int = 0) -> Array:
        raw = np.empty(count, np.uint8)
        self._read_into(name, begin, raw)
        return raw

    def _read_into(self, name: str, begin: int, piece: Array) -> None:
        """Fill an array of bytes from a place in a tensor on."""
        if (got := read_at(self._file.fileno(), self._places[name] + begin, piece)) != len(piece):
            raise self._fail(f"{name}: {got} of {len(piece)} bytes; the file shrank while it was read", "PF101")

    def _scales_beside(self, infos: list[TensorInfo]) -> dict[str, dict[str, str]]:
        """Tensors whose scale is a tensor of its own -> component -> that tensor.

        Types say so (`GgmlType.beside`); or they have a tail, and a tensor has none: bitnet.cpp's converter
        puts its scale into `<name>_scale`.

        Raises
        ------
        ContainerError
            If such a tensor, of one F32 number or one for each expert, is not there.
        """
        known = {i.name: (i.kind, prod(i.shape)) for i in infos}
        out = {}
        for i in infos:
            if i.layout is None:
                continue
            others = _beside(i.layout, ggml_types().get(i.kind), i.name)
            if not others and i.layout.nbytes(*matrix(i.shape)) > i.nbytes:
                others = {c.name: i.name + "_scale" for c in i.layout.components[1:]}
                if [c.nbytes for c in i.layout.fit(*matrix(i.shape)).components[1:]] != [SCALE_BYTES]:
                    raise self._fail(f"{i.name}: is {i.kind} without what stands behind its blocks", "PF110")
            for other in others.values():
                if known.get(other) not in (("F32", 1), ("F32", _experts(i.shape))):
                    raise self._fail(f"{i.name}: is {i.kind} without a scale, and no F32 {other} beside it", "PF110")
            if others:
                out[i.name] = others
        return out

    def _whole(self, info: TensorInfo) -> TensorInfo:
        """The same, with the bytes of all tensors that hold it."""
        others = self._beside.get(info.name, {}).values()
        return replace(info, nbytes=info.nbytes + sum(self._sizes[name] for name in others)) if others else info

    def _tell_apart(self) -> dict[int, GgmlType | None]:
        """What each id means in this file, None if nobody knows it.

        One writer made the file, so that an id means the same type in all of it; all its tensors must fit.
        """
        out: dict[int, GgmlType | None] = {}
        for number in dict.fromkeys(e.type for e in self._head.entries):
            mine = [e for e in self._head.entries if e.type == number]
            said = {self._records[e.name]["type"] for e in mine if e.name in self._records}
            chosen = self._asked(str(number))
            known = among(number)
            if chosen in ggml_types():
                known = {chosen: ggml_types()[chosen]}
            elif said & known.keys():  # packfmt wrote it
                known = {kind: known[kind] for kind in said & known.keys()}
            elif chosen and not self._fitting(known, mine):
                known = {}  # a layout of bytes that no known type has
            out[number] = self._only(number, known, mine)
        return out

    def _fitting(self, known: dict[str, GgmlType], entries: list[Entry]) -> dict[str, GgmlType]:
        """The types whose bytes fit the rooms of all these tensors."""
        rooms, alignment = self._rooms, self._head.alignment
        return {
            kind: t
            for kind, t in known.items()
            if all(t.fits(e.shape, rooms[e.name], alignment) is not None for e in entries)
        }

    def _only(self, number: int, known: dict[str, GgmlType], entries: list[Entry]) -> GgmlType | None:
        """The one type of several whose bytes fit the rooms of all tensors that have its id."""
        left = known
        for e in entries if len(known) > 1 else ():
            room = self._rooms[e.name]
            fit = {k: t for k, t in left.items() if t.fits(e.shape, room, self._head.alignment) is not None}
            if not fit:
                also = f", and other tensors can only be {' or '.join(left)}" if len(left) < len(known) else ""
                raise self._fail(
                    f"{e.name}: {list(e.shape)} of ggml type {number} in {room} bytes, "
                    f"which is none of {sized(known, e.shape)}{also}", "PF106",
                )  # fmt: skip
            left = fit
        if len(left) > 1:
            e = entries[0]
            which = " or ".join(f"--read-as {number}={kind}" for kind in left)
            raise self._fail(
                f"{e.name}: {list(e.shape)} of ggml type {number} in {self._rooms[e.name]} bytes, "
                f"which may be {sized(left, e.shape)} bytes; say {which}", "PF105",
            )  # fmt: skip
        return next(iter(left.values()), None)

    def _asked(self, key: str) -> str:
        """What `read_as` has for a type's name or id; empty if nothing."""
        self._unused.discard(key)
        return self._read_as.get(key, "")

    def _check_used(self) -> None:
        if self._unused:
            key = min(self._unused)
            kinds = dict.fromkeys(t.name if t else str(number) for number, t in self._types.items())
            raise PlanError(
                f"--read-as {key}={self._read_as[key]}: no tensor of {self.path} is {key} and without "
                f"a description of its own; its types are {', '.join(kinds)}"
            )

    def _asked_layout(self, kind: str, number: int) -> Layout | None:
        """The layout that the user named for a type, by its name or id."""
        by_id = self._asked(str(number))
        name = self._asked(kind) or ("" if by_id in ggml_types() else by_id)
        if not name:
            return None
        found = self._layouts("packfmt", name)
        if found is None:
            raise PlanError(f"--read-as {kind}={name}: no layout is called {name!r}")
        return found

    def _nbytes(self, e: Entry, known: GgmlType) -> int:
        sizes = known.sizes(e.shape)
        if not sizes:
            have = matrix(e.shape)[1]
            raise self._fail(f"{e.name}: {have} columns, {known.name} needs a multiple of {known.block}", "PF106")
        fit = known.fits(e.shape, self._rooms[e.name], self._head.alignment)
        return sizes[0] if fit is None else fit  # `check_places` says what is wrong

    def _info(self, e: Entry, described: dict[str, Layout]) -> TensorInfo:
        known, record = self._types[e.type], self._records.get(e.name)
        if record:
            return self._recorded(e, known, record, described)
        kind = known.name if known else f"type {e.type}"
        layout = DENSE_OF.get(kind) or self._asked_layout(kind, e.type)
        if known is None:
            return self._unknown(e, kind, layout)
        nbytes = self._nbytes(e, known)
        why = ""
        if known.beside:
            layout, why = self._told_by_scale(e, known, layout)
        elif layout is None and known.why:
            why = known.must_choose()
        elif layout is None:
            layout = self._layouts(NAME, kind)
        if kind in ROTATED and any(key.startswith(HADAMARD) for key in self._head.keyvalues):
            why = f"and {HADAMARD} in the file says that its columns are rotated, which packfmt does not undo"
        if why:
            return TensorInfo(e.name, e.shape, "float32", None, kind, self.path, nbytes, why)
        own = dtype_of(layout.components[0].cell[0].dtype).name if layout and kind in DENSE_OF else "float32"  # type: ignore[union-attr]
        return self._checked(TensorInfo(e.name, e.shape, own, layout, kind, self.path, nbytes))

    def _told_by_scale(self, e: Entry, known: GgmlType, asked: Layout | None) -> tuple[Layout | None, str]:
        """The layout of a tensor whose scale may be a tensor of its own; or None, and why.

        A layout that the user `asked` for is it, if it can have these scales.
        """
        found = self._entries.get(known.name_beside(e.name))
        if found is None or (asked and not _beside(asked, known, e.name)):
            return asked or self._layouts("packfmt", known.alone), ""
        where, count, number = f"and {found.name} beside it", prod(found.shape), ggml_types()["F32"].ids[0]
        if found.type != number or count not in (1, _experts(e.shape)):
            need = " or ".join(map(str, dict.fromkeys((1, _experts(e.shape)))))
            return None, f"{where} is {list(found.shape)} of ggml type {found.type}, needs {need} F32"
        if count > MOST_EXPERTS:
            return None, f"{where} has {count} scales, of which at most {MOST_EXPERTS} are read"
        inside = self._places[found.name] + count * SCALE_BYTES <= self._size  # if not, `check_places` says so
        if not inside or _alike(self._bytes(found.name, count * SCALE_BYTES)):
            return asked or self._layouts("packfmt", known.scaled), ""
        if asked and asked.name == known.scaled:
            return None, f"{where} has {DIFFERENT}, {asked.name} has one for all"
        layout = asked or (self._layouts("packfmt", known.each.format(count)) if prod(e.shape) else None)
        return layout, "" if layout else f"{where} has {DIFFERENT}, which no layout has for {count}"

    def _unknown(self, e: Entry, kind: str, layout: Layout | None) -> TensorInfo:
        """A tensor whose type nobody knows: it is shown, with the bytes that it has room for."""
        room = self._rooms[e.name]
        if prod(e.shape) and room <= 0:
            raise self._fail(f"{e.name}: {prod(e.shape)} weights of {kind} in no bytes", "PF107")
        try:
            nbytes = layout.nbytes(*matrix(e.shape)) if layout else max(0, room)
        except LayoutError as error:
            raise self._fail(f"{e.name}: {error}", "PF106") from error
        return TensorInfo(e.name, e.shape, "float32", layout, kind, self.path, nbytes)

    def _recorded(
        self, e: Entry, known: GgmlType | None, record: dict[str, Any], described: dict[str, Layout]
    ) -> TensorInfo:
        """A tensor that packfmt wrote, and what it wrote of it."""
        self._check_record(e, known.name if known else "", record)
        assert known is not None  # or the record would contradict it
        layout = DENSE_OF.get(known.name)
        if layout is None or layout.id != record["id"]:
            if record["id"] not in described:
                raise self._fail(f"{e.name}: no description of layout {record['layout']!r} in the file", "PF111")
            layout = self._installed(described[record["id"]], known.name)
        nbytes, shape = self._nbytes(e, known), tuple(record["shape"])
        return self._checked(TensorInfo(e.name, shape, record["dtype"], layout, known.name, self.path, nbytes))

    def _installed(self, described: Layout, kind: str) -> Layout:
        """The installed layout of a description, which also knows what other containers call it."""
        installed = self._layouts("packfmt", described.name)
        return installed if installed == described else replace(described, also=((NAME, kind),))

    def _checked(self, info: TensorInfo) -> TensorInfo:
        """The same, if its layout has the bytes that its type has."""
        try:
            if info.layout and (reason := _misfit(info.layout, info.kind, info.shape)):
                raise self._fail(f"{info.name}: {reason}", "PF106")
        except LayoutError as error:
            raise self._fail(f"{info.name}: {error}", "PF106") from error
        return info

    def _check_record(self, e: Entry, kind: str, record: dict[str, Any]) -> None:
        """What packfmt wrote of a tensor must be what the header says of it."""
        if not kind or record["type"] != kind:
            raise self._fail(
                f"{e.name}: is {kind or f'ggml type {e.type}'}, packfmt.tensors says {record['type']}; "
                "another tool changed the tensor and left packfmt's keys: remove them", "PF105",
            )  # fmt: skip
        shape = record["shape"]
        fits = len(shape) <= MOST_DIMS and all(type(n) is int and n >= 0 for n in shape)
        if not fits or matrix(tuple(shape)) != matrix(e.shape):
            raise self._fail(f"{e.name}: is {list(e.shape)}, packfmt.tensors says {shape}", "PF106")

    def _own(self) -> tuple[dict[str, dict[str, Any]], dict[str, Layout]]:
        """packfmt's record of each tensor, and the layouts that the file describes, by id."""
        version = self._head.keyvalues.get(OURS + "version")
        if version is None:
            return {}, {}
        if version != KeyValue("UINT32", VERSION):
            raise self._fail(f"packfmt.version is {version.value!r}, this packfmt reads {VERSION}", "PF112")
        records = self._json("tensors")
        names = {e.name for e in self._head.entries}
        need = {"layout": str, "id": str, "type": str, "shape": list, "dtype": str, "sha256": str}
        dtypes = {dtype_of(d).name for d in DTYPES}
        for name, record in records.items():
            if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in need.items()):
                raise self._fail(f"packfmt.tensors: {name!r} needs {', '.join(need)}", "PF112")
            if record["dtype"] not in dtypes:
                raise self._fail(f"packfmt.tensors: {name!r} was {record['dtype']!r}, which is no dtype", "PF112")
            if name not in names:
                raise self._fail(f"packfmt.tensors names {name!r}, which is not in the file", "PF110")
        described = {}
        for key, description in self._json("layouts").items():
            try:
                described[key] = Layout.from_json(description)
            except LayoutError as error:
                raise self._fail(f"packfmt.layouts: {error}", "PF111") from error
            if described[key].id != key:
                raise self._fail(
                    f"packfmt.layouts: the description of {described[key].name!r} has SHA-256 "
                    f"{described[key].id[:16]}, it is filed as {key[:16]!r}", "PF111",
                )  # fmt: skip
        return records, described

    def _json(self, key: str) -> dict[str, Any]:
        found = self._head.keyvalues.get(OURS + key)
        try:
            data = json.loads(found.value) if found is not None and found.kind == "STRING" else None
            json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate hides behind an escape
        except (ValueError, RecursionError) as error:
            raise self._fail(f"packfmt.{key}: not JSON: {error}", "PF112") from error
        if not isinstance(data, dict):
            raise self._fail(f"packfmt.{key}: needs a record in JSON", "PF112")
        return data

    def _extras(self) -> Extras:
        config = self._json("config") if OURS + "config" in self._head.keyvalues else None
        foreign = {key: value for key, value in self._head.keyvalues.items() if not key.startswith(OURS)}
        return Extras(config, {}, foreign)


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
