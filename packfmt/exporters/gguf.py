"""GGUF at tensor level: any tensor whose layout is a ggml type, under its own name, in one file.

What GGUF has no place for stands in keys of our own, which other readers pass over:

    packfmt.version   UINT32, of these keys
    packfmt.tensors   JSON: for each tensor its logical shape and dtype, layout, ggml type and the SHA-256 of its bytes
    packfmt.layouts   JSON: description of each packed layout, by its id
    packfmt.config    JSON: the model's config.json

A model that was no GGUF gets `general.architecture` "packfmt-...", which llama.cpp refuses by name: nothing
here maps tensor names or hyperparameters to those of an architecture that it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np

from packfmt.codec import Array, PackedTensor, matrix
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import Extras, KeyValue, Layouts
from packfmt.exporters import gguf_header as header
from packfmt.exporters.gguf_header import MOST_DIMS, Entry, aligned, alignment_of
from packfmt.exporters.gguf_types import GgmlType, among, ggml_types, rooms, sized
from packfmt.exporters.whole import Check, whole_file
from packfmt.layout import DENSE, DTYPES, Layout, dtype_of
from packfmt.plan import Plan, Step, TensorInfo

NAME = "gguf"
VERSION = 1  # of packfmt's own keys
OURS = "packfmt."
DENSE_OF = {name.upper(): DENSE[name] for name in ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64")}
LONGEST_NAME = 63  # bytes; GGML_MAX_NAME 64 counts the final zero (ggml.h, llama.cpp 067d44f6)
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
HADAMARD, ROTATED = "prism.hadamard", ("PQ2_0", "PTQ1_0", "Q2_0")  # keys of PrismML's files, and types they may hold
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, same file


def type_of(layout: Layout) -> str:
    """The ggml type that stores a layout; empty if none does."""
    dense = (kind for kind, known in DENSE_OF.items() if known == layout)
    return dict(layout.also).get(NAME, "") or next(dense, "")


@cache
def _misfit(layout: Layout, kind: str, shape: tuple[int, ...]) -> str:
    """Why such a tensor cannot be of this ggml type; empty if its components fill the type's bytes.

    The first component is the type's blocks; others, such as a scale, stand in its tail.
    """
    known = ggml_types().get(kind)
    if known is None:
        return f"{layout.name}: GGUF knows no type {kind!r}"
    if layout.streams:
        return f"{layout.name}: has a stream, whose length no ggml type tells"
    blocks, *rest = (c.nbytes for c in layout.fit(*matrix(shape)).components)
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


def plan_refusal(steps: tuple[Step, ...]) -> str:
    """Why these tensors cannot stand together; empty, for each has a name of its own."""
    return ""


def extras_refusal(extras: Extras) -> str:
    """Why it cannot do with what the model has beside its tensors; empty, for it needs nothing."""
    return ""


# ---------------------------------------------------------------- writing


def write(path: Path, plan: Plan, tensors: Iterable[PackedTensor], extras: Extras, check: Check | None = None) -> None:
    """Write one file, holding one tensor in memory at a time.

    A GGUF's own key-values are carried over as they are, less `general.file_type` if a layout changed.
    `extras.files` have no place in a GGUF.

    Raises
    ------
    PlanError
        If the container cannot hold a step, or a tensor is not the one its step announced.
    """
    _check_steps(plan.steps)
    stream = iter(tensors)
    sums: dict[str, str] = {}
    head, alignment = _header(plan, extras, sums)
    with whole_file(path, check) as file:
        file.write(head)
        for step in plan.steps:
            sums[step.name] = _append(file, step, next(stream, None), alignment)
        if next(stream, None) is not None:
            raise PlanError(f"more tensors than the {len(plan.steps)} planned")
        file.seek(0)
        file.write(_header(plan, extras, sums)[0])  # as long as before: a digest takes the room kept for it


def _check_steps(steps: tuple[Step, ...]) -> None:
    seen = set()
    for step in steps:
        if why_not := refusal(step.layout, step.shape) or name_refusal(step.name):
            raise PlanError(f"{step.name}: {why_not}")
        if step.name in seen:
            raise PlanError(f"{step.name}: planned twice")
        seen.add(step.name)


def _append(file: BinaryIO, step: Step, tensor: PackedTensor | None, alignment: int) -> str:
    """Write a tensor and zeros up to the next one's place; returns its SHA-256."""
    if tensor is None or (tensor.layout, tensor.shape) != (step.layout, step.shape):
        got = "nothing" if tensor is None else f"{tensor.layout.name} {tensor.shape}"
        raise PlanError(f"{step.name}: got {got}, planned {step.layout.name} {step.shape}")
    digest, at, whole = sha256(), 0, _stored(step)
    places = _places(step.layout, type_of(step.layout), step.shape)
    pieces = [(places[name], np.ascontiguousarray(array)) for name, array in tensor.components.items()]
    for place, piece in (*sorted(pieces, key=lambda p: p[0]), (whole, np.zeros(0, np.uint8))):
        for raw in (bytes(place - at), piece.reshape(-1).view(np.uint8).data):
            digest.update(raw)
            at += file.write(raw)
    file.write(bytes(aligned(whole, alignment) - whole))
    return digest.hexdigest()


def _places(layout: Layout, kind: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Where a tensor's components begin in its bytes: the first is its blocks, others stand in the tail."""
    first, *rest = layout.fit(*matrix(shape)).components
    known = ggml_types().get(kind)
    places, at = {first.name: 0}, aligned(first.nbytes, known.tail_alignment if known else 1)
    for c in rest:
        places[c.name] = at
        at += c.nbytes
    return places


def _stored(step: Step) -> int:
    """The bytes that a step's tensor takes in the file, before padding to the alignment."""
    return ggml_types()[type_of(step.layout)].sizes(step.shape)[0]


def _header(plan: Plan, extras: Extras, sums: Mapping[str, str]) -> tuple[bytes, int]:
    """All bytes before the tensors, with zeros for digests not yet known, and the alignment."""
    keyvalues = _foreign_keys(plan, extras) | _own_keys(plan, extras, sums)
    try:
        alignment = alignment_of(keyvalues)
    except ValueError as error:
        raise PlanError(str(error)) from error
    entries, offset = [], 0
    for s in plan.steps:
        # a scalar becomes one weight: not every reader takes a tensor without dimensions
        entries.append(Entry(s.name, s.shape or (1,), ggml_types()[type_of(s.layout)].ids[0], offset))
        offset += aligned(_stored(s), alignment)
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
    tensors = {
        s.name: {
            "layout": s.layout.name,
            "id": s.layout.id,
            "type": type_of(s.layout),
            "shape": list(s.shape),
            "dtype": s.dtype,
            "encoder": s.encoder,
            "sha256": sums.get(s.name, "0" * 64),
        }
        for s in plan.steps
    }
    layouts = {s.layout.id: s.layout.to_json() for s in plan.steps if s.layout.name not in DENSE}
    texts = {"tensors": tensors, "layouts": layouts}
    if extras.config is not None:
        texts["config"] = {k: v for k, v in extras.config.items() if k != "quantization_config"}
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
        self._lock = Lock()  # a place in the file belongs to one reader at a time
        self._layouts = cache(layouts)
        self._read_as = dict(read_as)
        self._unused = set(read_as)
        try:
            size = os.fstat(self._file.fileno()).st_size
            self._head = header.read(path, self._file, size)
            self._records, described = self._own()
            self._rooms = rooms(size, self._head)
            self._types = self._tell_apart()
            infos = [self._info(e, described) for e in self._head.entries]
            header.check_places(path, size, self._head, [i.nbytes for i in infos])
            self._beside = self._scales_beside(infos)
            self.index = {i.name: i for i in infos if i.name not in self._beside.values()}
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
        self._places = {e.name: self._head.data + e.offset for e in self._head.entries}

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> PackedTensor:
        """The tensor called `name`; its checksum is checked where the file has one.

        Raises
        ------
        ContainerError
            If no layout describes its type, or its bytes are not those that were written.
        """
        info = self.index[name]
        if info.layout is None:
            why = info.why or "which no layout of packfmt describes"
            raise self._fail(f"{name}: is {info.kind}, {why}", "PF105")
        raw = self._bytes(name, info.nbytes)
        record = self._records.get(name)
        if record and sha256(raw.data).hexdigest() != record["sha256"]:
            raise self._fail(f"{name}: its bytes are not those that were written", "PF109")
        components = {}
        places = _places(info.layout, info.kind, info.shape)
        for i, c in enumerate(info.layout.fit(*matrix(info.shape)).components):
            at, data = places[c.name], raw
            if i and name in self._beside:
                at, data = 0, self._bytes(self._beside[name], c.nbytes)
            components[c.name] = data[at : at + c.nbytes].view(dtype_of(c.dtype)).reshape(c.shape)
        return PackedTensor(info.layout, info.shape, components, info.dtype)

    def _fail(self, what: str, rule: str) -> ContainerError:
        return ContainerError(f"{self.path}: {what}", rule)

    def _bytes(self, name: str, count: int) -> Array:
        raw = np.empty(count, np.uint8)
        with self._lock:
            self._file.seek(self._places[name])
            got = self._file.readinto(raw.data)
        if got != count:
            raise self._fail(f"{name}: {got} of {count} bytes; the file shrank while it was read", "PF101")
        return raw

    def _scales_beside(self, infos: list[TensorInfo]) -> dict[str, str]:
        """Tensors of types with a tail that have none: bitnet.cpp's converter puts their scale into `<name>_scale`.

        Raises
        ------
        ContainerError
            If such a tensor, one F32 number, is not there.
        """
        known = {i.name: (i.kind, prod(i.shape)) for i in infos}
        out = {}
        for i in infos:
            if i.layout is None or i.layout.nbytes(*matrix(i.shape)) <= i.nbytes:
                continue
            out[i.name] = i.name + "_scale"
            rest = [c.nbytes for c in i.layout.fit(*matrix(i.shape)).components[1:]]
            if rest != [4] or known.get(out[i.name]) != ("F32", 1):
                raise self._fail(f"{i.name}: is {i.kind} without a scale, and no F32 {out[i.name]} beside it", "PF110")
        return out

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
        if layout is None and not known.why:
            layout = self._layouts(NAME, kind)
        why = known.must_choose() if layout is None and known.why else ""
        if kind in ROTATED and any(key.startswith(HADAMARD) for key in self._head.keyvalues):
            why = f"and {HADAMARD} in the file says that its columns are rotated, which packfmt does not undo"
        if why:
            return TensorInfo(e.name, e.shape, "float32", None, kind, self.path, nbytes, why)
        own = dtype_of(layout.components[0].cell[0].dtype).name if layout and kind in DENSE_OF else "float32"  # type: ignore[union-attr]
        return self._checked(TensorInfo(e.name, e.shape, own, layout, kind, self.path, nbytes))

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
