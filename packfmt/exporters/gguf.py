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
from functools import cache, partial
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from packfmt.codec import Array, PackedTensor, matrix
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import Extras, KeyValue, Layouts
from packfmt.exporters import gguf_header as header
from packfmt.exporters.gguf_header import MOST_DIMS, Entry, aligned, alignment_of
from packfmt.exporters.whole import Check, whole_file
from packfmt.layout import DENSE, DTYPES, Layout, Stream, dtype_of
from packfmt.plan import Plan, Step, TensorInfo

NAME = "gguf"
VERSION = 1  # of packfmt's own keys
OURS = "packfmt."
DENSE_OF = {name.upper(): DENSE[name] for name in ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64")}
LONGEST_NAME = 63  # bytes; GGML_MAX_NAME 64 counts the final zero (ggml.h, llama.cpp 067d44f6)
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, same file


class GgmlType(NamedTuple):
    """A tensor type: its number in a file, and how many bytes store a block of how many weights."""

    number: int
    block: int
    nbytes: int


@cache
def ggml_types() -> dict[str, GgmlType]:
    """Every type that the installed gguf knows, by name."""
    from gguf.constants import GGML_QUANT_SIZES  # not above: it imports all of gguf

    return {kind.name: GgmlType(int(kind), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def type_of(layout: Layout) -> str:
    """The ggml type that stores a layout; empty if none does."""
    dense = (kind for kind, known in DENSE_OF.items() if known == layout)
    return dict(layout.also).get(NAME, "") or next(dense, "")


@cache
def _misfit(layout: Layout, kind: str) -> str:
    """Why a layout cannot be this ggml type; empty if a block has as many bytes in both."""
    if kind not in ggml_types():
        return f"{layout.name}: the installed gguf knows no type {kind!r}"
    _, block, nbytes = ggml_types()[kind]
    if len(layout.components) != 1 or isinstance(layout.components[0], Stream):
        return f"{layout.name}: has {len(layout.components)} components, a ggml type is one record a block"
    try:
        ours = layout.nbytes(1, block)
    except LayoutError as error:
        return f"{layout.name}: no block of {block} weights, as {kind} has: {error}"
    return "" if ours == nbytes else f"{layout.name}: {block} weights take {ours} bytes, {kind} {nbytes}"


def refusal(layout: Layout, shape: tuple[int, ...]) -> str:
    """Why GGUF cannot hold such a tensor; empty if it can."""
    if len(shape) > MOST_DIMS:
        return f"{len(shape)} dimensions, GGUF holds {MOST_DIMS} or fewer"
    if kind := type_of(layout):
        return _misfit(layout, kind)
    return f"GGUF has no type for {layout.name}; its types are {', '.join(ggml_types())}"


def name_refusal(name: str) -> str:
    """Why no tensor can bear this name in a GGUF; empty if one can."""
    if not name or "\0" in name or not name.isprintable():
        return f"the name {name!r}, GGUF needs one that can be printed"
    length = len(name.encode())
    return f"a name of {length} bytes, GGUF holds {LONGEST_NAME} or fewer" if length > LONGEST_NAME else ""


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
    data = np.ascontiguousarray(tensor.components[step.layout.components[0].name]).reshape(-1).view(np.uint8)
    file.write(data.data)
    file.write(bytes(aligned(len(data), alignment) - len(data)))
    return sha256(data.data).hexdigest()


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
        entries.append(Entry(s.name, s.shape or (1,), ggml_types()[type_of(s.layout)].number, offset))
        offset += aligned(s.layout.nbytes(*matrix(s.shape)), alignment)
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
    """An open GGUF file."""

    def __init__(self, path: Path, layouts: Layouts) -> None:
        self.path = path
        self._file = path.open("rb")
        self._lock = Lock()  # a place in the file belongs to one reader at a time
        try:
            size = os.fstat(self._file.fileno()).st_size
            self._head = header.read(path, self._file, size)
            kinds = [self._kind(e) for e in self._head.entries]
            nbytes = [self._nbytes(e, kind) for e, kind in zip(self._head.entries, kinds, strict=True)]
            header.check_places(path, size, self._head, nbytes)
            self._records, described = self._own()
            self._layout_of = cache(partial(layouts, NAME))
            self.index = {
                e.name: self._info(e, kind, n, described)
                for e, kind, n in zip(self._head.entries, kinds, nbytes, strict=True)
            }
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
            raise self._fail(f"{name}: is {info.kind}, which no layout of packfmt describes", "PF105")
        raw = self._bytes(info)
        record = self._records.get(name)
        if record and sha256(raw.data).hexdigest() != record["sha256"]:
            raise self._fail(f"{name}: its bytes are not those that were written", "PF109")
        (component,) = info.layout.fit(*matrix(info.shape)).components
        array = raw.view(dtype_of(component.dtype)).reshape(component.shape)
        return PackedTensor(info.layout, info.shape, {component.name: array}, info.dtype)

    def _fail(self, what: str, rule: str) -> ContainerError:
        return ContainerError(f"{self.path}: {what}", rule)

    def _bytes(self, info: TensorInfo) -> Array:
        raw = np.empty(info.nbytes, np.uint8)
        with self._lock:
            self._file.seek(self._places[info.name])
            got = self._file.readinto(raw.data)
        if got != info.nbytes:
            raise self._fail(f"{info.name}: {got} of {info.nbytes} bytes; the file shrank while it was read", "PF101")
        return raw

    def _kind(self, e: Entry) -> str:
        for name, known in ggml_types().items():
            if known.number == e.type:
                return name
        raise self._fail(f"{e.name}: ggml type {e.type}, which the installed gguf does not know", "PF105")

    def _nbytes(self, e: Entry, kind: str) -> int:
        _, block, nbytes = ggml_types()[kind]
        if matrix(e.shape)[1] % block:
            raise self._fail(f"{e.name}: {matrix(e.shape)[1]} columns, {kind} needs a multiple of {block}", "PF106")
        return prod(e.shape) // block * nbytes

    def _info(self, e: Entry, kind: str, nbytes: int, described: dict[str, Layout]) -> TensorInfo:
        record = self._records.get(e.name)
        layout = DENSE_OF.get(kind) or self._layout_of(kind)
        shape = e.shape
        if record:
            self._check_record(e, kind, record)
            shape = tuple(record["shape"])
            if layout is None or layout.id != record["id"]:
                if record["id"] not in described:
                    raise self._fail(f"{e.name}: no description of layout {record['layout']!r} in the file", "PF111")
                layout = replace(described[record["id"]], also=((NAME, kind),))
        if layout and (reason := _misfit(layout, kind)):
            raise self._fail(f"{e.name}: {reason}", "PF105")
        try:
            if layout and layout.nbytes(*matrix(shape)) != nbytes:
                raise self._fail(f"{e.name}: {nbytes} bytes, a {layout.name} of {list(shape)} has others", "PF106")
        except LayoutError as error:
            raise self._fail(f"{e.name}: {error}", "PF106") from error
        own = dtype_of(layout.components[0].cell[0].dtype).name if layout and kind in DENSE_OF else "float32"  # type: ignore[union-attr]
        return TensorInfo(e.name, shape, record["dtype"] if record else own, layout, kind, self.path, nbytes)

    def _check_record(self, e: Entry, kind: str, record: dict[str, Any]) -> None:
        """What packfmt wrote of a tensor must be what the header says of it."""
        if record["type"] != kind:
            raise self._fail(
                f"{e.name}: is {kind}, packfmt.tensors says {record['type']}; "
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


def open(path: Path, layouts: Layouts) -> GgufSource:
    """Open a file and check its header; no tensor is read.

    Raises
    ------
    ContainerError
        For the first thing that is not what it should be.
    """
    return GgufSource(path, layouts)
