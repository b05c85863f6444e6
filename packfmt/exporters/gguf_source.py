"""A GGUF that is read: what packfmt wrote into it, and what types mean in files of others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from packfmt import slices
from packfmt.codec import Array, PackedTensor, matrix
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import Extras, KeyValue, Layouts
from packfmt.exporters import gguf_header as header
from packfmt.exporters.gguf_header import MOST_DIMS, Entry
from packfmt.exporters.gguf_tensors import (
    DENSE_OF,
    NAME,
    SCALE_BYTES,
    alike,
    as_many,
    experts,
    misfit,
    others_of,
    places_in,
)
from packfmt.exporters.gguf_types import GgmlType, among, ggml_types, rooms, sized
from packfmt.exporters.handles import Handles
from packfmt.exporters.output import CHUNK
from packfmt.exporters.positional import read_at
from packfmt.layout import DTYPES, Layout, dtype_of
from packfmt.plan import TensorInfo

VERSION = 1  # of packfmt's own keys
OURS = "packfmt."
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
HADAMARD, ROTATED = "prism.hadamard", ("PQ2_0", "PTQ1_0", "Q2_0")  # keys of PrismML's files, and types they may hold
DIFFERENT = "a scale of its own for each expert"
MOST_EXPERTS = 1 << 16  # whose scales are looked at before a tensor is read


class GgufSource:
    """An open GGUF file. `read_as` says what the file does not: see `open`."""

    def __init__(self, path: Path, layouts: Layouts, read_as: Mapping[str, str] = NOTHING) -> None:
        self.path = path
        self._handles = Handles()
        self._layouts = cache(layouts)
        self._read_as = dict(read_as)
        self._unused = set(read_as)
        try:
            with self._handles.of(path) as handle, os.fdopen(handle, "rb", closefd=False) as file:
                self._size = size = os.fstat(handle).st_size
                self._head = header.read(path, file, size)
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
        self._handles.close()

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
            raise self._fail(f"{name}: its bytes are not those that were written; fetch or make it again", "PF109")

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
                raise self._fail(f"{name}: its bytes are not those that were written; fetch or make it again", "PF109")
        components = {}
        places = places_in(info.layout, ggml_types().get(info.kind), info.shape)
        for c in info.layout.fit(*matrix(info.shape)).components:
            where = others.get(c.name, "")
            stored = as_many(raw[where], c.nbytes) if where else raw[name][places[c.name] :][: c.nbytes]
            if stored is None:
                raise self._many_scales(info, where)
            components[c.name] = stored.view(dtype_of(c.dtype)).reshape(c.shape)
        return PackedTensor(info.layout, info.shape, components, info.dtype)

    def _rows(self, info: TensorInfo, layout: Layout, rows: tuple[int, int]) -> PackedTensor:
        others = self._beside.get(info.name, {})
        places = places_in(layout, ggml_types().get(info.kind), info.shape)

        def fill(component: str, pieces: list[tuple[int, Array]]) -> None:
            if where := others.get(component):
                ((_, piece),) = pieces  # a scale that all rows share
                scales = as_many(self._bytes(where, self._sizes[where]), len(piece))
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
        with self._handles.of(self.path) as handle:
            got = read_at(handle, self._places[name] + begin, piece)
        if got != len(piece):
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
            others = others_of(i.layout, ggml_types().get(i.kind), i.name)
            if not others and i.layout.nbytes(*matrix(i.shape)) > i.nbytes:
                others = {c.name: i.name + "_scale" for c in i.layout.components[1:]}
                if [c.nbytes for c in i.layout.fit(*matrix(i.shape)).components[1:]] != [SCALE_BYTES]:
                    raise self._fail(f"{i.name}: is {i.kind} without what stands behind its blocks", "PF110")
            for other in others.values():
                if known.get(other) not in (("F32", 1), ("F32", experts(i.shape))):
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
        if found is None or (asked and not others_of(asked, known, e.name)):
            return asked or self._layouts("packfmt", known.alone), ""
        where, count, number = f"and {found.name} beside it", prod(found.shape), ggml_types()["F32"].ids[0]
        if found.type != number or count not in (1, experts(e.shape)):
            need = " or ".join(map(str, dict.fromkeys((1, experts(e.shape)))))
            return None, f"{where} is {list(found.shape)} of ggml type {found.type}, needs {need} F32"
        if count > MOST_EXPERTS:
            return None, f"{where} has {count} scales, of which at most {MOST_EXPERTS} are read"
        inside = self._places[found.name] + count * SCALE_BYTES <= self._size  # if not, `check_places` says so
        if not inside or alike(self._bytes(found.name, count * SCALE_BYTES)):
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
            if info.layout and (reason := misfit(info.layout, info.kind, info.shape)):
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
