"""GGUF's header: key-values and tensor entries, read and built.

Versions 2 and 3, little-endian; they differ in nothing that stands here. Rules for readers: ggml
docs/gguf.md and src/gguf.cpp (llama.cpp 067d44f6), which also refuses what is refused here, save that
it lets bytes after the last tensor pass.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from packfmt.errors import TRUNCATED, ContainerError, PlanError
from packfmt.exporters import KeyValue

MAGIC, VERSION, VERSIONS = b"GGUF", 3, (2, 3)
MOST_DIMS = 4
ALIGNMENT, MOST_ALIGNED = 32, 1 << 16
ALIGNMENT_KEY = "general.alignment"
LONGEST = 1 << 27  # bytes of header; 300,000 tokens with their merges take about 1 << 24
DEEPEST = 4  # arrays inside arrays; ggml itself refuses the second
FIRST_READ = 1 << 20

# A value's type is its place in this list.
KINDS = (
    *("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32"),
    *("BOOL", "STRING", "ARRAY", "UINT64", "INT64", "FLOAT64"),
)
CODES = {
    **{"UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i"},
    **{"UINT64": "Q", "INT64": "q", "FLOAT32": "f", "FLOAT64": "d", "BOOL": "B"},
}
LEAST_PAIR = 8 + 4 + 1  # bytes: length of the key, type, the shortest value
LEAST_ENTRY = 8 + 4 + 4 + 8  # length of the name, count of dimensions, type, offset


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in the file: `offset` counts from the data's first byte."""

    name: str
    shape: tuple[int, ...]  # rows first; the file has the reverse
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors' bytes."""

    keyvalues: dict[str, KeyValue]
    entries: tuple[Entry, ...]
    alignment: int
    data: int  # offset of the first tensor byte in the file


def aligned(n: int, alignment: int) -> int:
    """The first multiple of `alignment` from `n` on."""
    return -(-n // alignment) * alignment


def alignment_of(keyvalues: Mapping[str, KeyValue]) -> int:
    """What tensors' offsets are multiples of; ValueError if the key says nothing sensible."""
    found = keyvalues.get(ALIGNMENT_KEY, KeyValue("UINT32", ALIGNMENT))
    n = found.value
    if found.kind != "UINT32" or type(n) is not int or n.bit_count() != 1 or not 0 < n <= MOST_ALIGNED:
        raise ValueError(f"{ALIGNMENT_KEY} is {found.kind} {n!r}, needs UINT32, a power of two to {MOST_ALIGNED}")
    return n


# ---------------------------------------------------------------- reading


def read(path: Path, file: BinaryIO, size: int) -> Header:
    """Read and check the header of a file of `size` bytes; reads no tensor.

    Raises
    ------
    ContainerError
        If a count, length, type, name or text is not what the format allows.
    """
    return _Reader(path, file, size).header()


class _Reader:
    """Walks over the header's bytes, which are read from the file as they are needed."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.raw = bytearray()
        self.at = 0

    def fail(self, what: str, rule: str) -> ContainerError:
        return ContainerError(f"{self.path}: {what}", rule)

    def need(self, count: int, what: str) -> None:
        """Have the next `count` bytes in `raw`."""
        if self.at + count > len(self.raw):
            self._load(self.at + count, what)

    def _load(self, end: int, what: str) -> None:
        if end > LONGEST:
            raise self.fail(f"{what}: a header of {end} bytes, needs {LONGEST} or fewer", "PF102")
        if end <= self.size:
            more = min(max(end, 2 * len(self.raw), FIRST_READ), self.size, LONGEST)
            self.raw += self.file.read(more - len(self.raw))
        if end > len(self.raw):
            raise self.fail(f"{what}: ends at byte {end}, the file has {self.size}; {TRUNCATED}", "PF101")

    def numbers(self, code: str, count: int, what: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        self.need(layout.size, what)
        found = layout.unpack_from(self.raw, self.at)
        self.at += layout.size
        return found

    def number(self, code: str, what: str) -> int:
        return int(self.numbers(code, 1, what)[0])

    def texts(self, count: int, what: str) -> list[str]:
        self.need(8 * count, what)
        length_at = struct.Struct("<Q").unpack_from
        out: list[str] = []
        raw, at = self.raw, self.at  # locals, and no calls of our own: this loop reads vocabularies
        try:
            for _ in range(count):
                self.at = at
                if at + 8 > len(raw):
                    self.need(8, what)
                end = at + 8 + length_at(raw, at)[0]
                if end > len(raw):
                    self.need(end - at, what)
                out.append(raw[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as error:
            where = f"{what}: text {len(out)}" if count > 1 else what
            raise self.fail(f"{where} is not UTF-8: {error.reason} at its byte {error.start}", "PF103") from error
        self.at = at
        return out

    def header(self) -> Header:
        self._start()
        n_entries, n_pairs = self.numbers("Q", 2, "the counts of tensors and key-values")
        keyvalues = self._keyvalues(n_pairs)
        try:
            alignment = alignment_of(keyvalues)
        except ValueError as error:
            raise self.fail(str(error), "PF102") from error
        self.need(n_entries * LEAST_ENTRY, f"{n_entries} tensors")
        entries: dict[str, Entry] = {}
        for i in range(n_entries):
            e = self._entry(i)
            if e.name in entries:
                raise self.fail(f"two tensors are called {e.name!r}", "PF104")
            entries[e.name] = e
        return Header(keyvalues, tuple(entries.values()), alignment, aligned(self.at, alignment))

    def _start(self) -> None:
        magic = self.file.read(4)
        self.raw += magic
        if magic == b"vers":
            raise self.fail("a Git LFS pointer, not the file it stands for; run git lfs pull", "PF100")
        if magic != MAGIC[: len(magic)] or not magic:
            found = f"begins with {magic!r}" if self.size else "is empty"
            raise self.fail(f"{found}, a GGUF begins with {MAGIC!r}; is it another file, or cut off?", "PF100")
        self.at = 4
        version = self.number("I", "the version")
        if version and not version & 0xFFFF:
            raise self.fail("a big-endian GGUF, needs little-endian; convert it where it was made", "PF100")
        if version not in VERSIONS:
            raise self.fail(f"GGUF version {version}, needs {' or '.join(map(str, VERSIONS))}", "PF100")

    def _keyvalues(self, count: int) -> dict[str, KeyValue]:
        self.need(count * LEAST_PAIR, f"{count} key-values")
        out: dict[str, KeyValue] = {}
        for i in range(count):
            (key,) = self.texts(1, f"key {i}")
            if not key:
                raise self.fail(f"key {i} is empty", "PF102")
            if key in out:
                raise self.fail(f"the key {key!r} stands twice", "PF104")
            out[key] = self._value(self._kind(key), f"key {key!r}", 0)
        return out

    def _kind(self, what: str) -> str:
        number = self.number("I", what)
        if number >= len(KINDS):
            raise self.fail(f"{what}: value type {number}, needs 0 to {len(KINDS) - 1}", "PF102")
        return KINDS[number]

    def _value(self, kind: str, what: str, depth: int) -> KeyValue:
        if kind != "ARRAY":
            return KeyValue(kind, self._items(kind, 1, what)[0])
        if depth == DEEPEST:
            raise self.fail(f"{what}: arrays inside arrays, more than {DEEPEST} deep", "PF102")
        item, count = self._kind(what), self.number("Q", what)
        if item != "ARRAY":
            return KeyValue(f"ARRAY:{item}", self._items(item, count, what))
        self.need(12 * count, what)
        inner = [self._value(item, what, depth + 1) for _ in range(count)]
        kinds = sorted({i.kind for i in inner}) or [item]
        if len(kinds) > 1:
            raise self.fail(f"{what}: an array of unlike arrays, {' and '.join(kinds)}", "PF102")
        return KeyValue(f"ARRAY:{kinds[0]}", [i.value for i in inner])

    def _items(self, kind: str, count: int, what: str) -> list[Any]:
        if kind == "STRING":
            return self.texts(count, what)
        if count > LONGEST:  # before it becomes part of a struct format
            raise self.fail(f"{what}: an array of {count} items, needs {LONGEST} or fewer", "PF102")
        found = self.numbers(CODES[kind], count, what)
        if kind != "BOOL":
            return list(found)
        if max(found, default=0) > 1:
            raise self.fail(f"{what}: a BOOL of {max(found)}, needs 0 or 1", "PF102")
        return [bool(v) for v in found]

    def _entry(self, i: int) -> Entry:
        (name,) = self.texts(1, f"the name of tensor {i}")
        if not name or any(c < " " or "\x7f" <= c < "\xa0" for c in name):  # it will stand on somebody's terminal
            raise self.fail(f"tensor {i} is called {name!r}, needs a name that can be printed", "PF102")
        n_dims = self.number("I", name)
        if n_dims > MOST_DIMS:
            raise self.fail(f"{name}: {n_dims} dimensions, needs {MOST_DIMS} or fewer", "PF106")
        dims = self.numbers("Q", n_dims, name)
        if max(dims, default=0) >> 63 or prod(dims) >> 63:
            raise self.fail(f"{name}: {' x '.join(map(str, dims))} weights, needs fewer than 2**63", "PF106")
        return Entry(name, dims[::-1], self.number("I", name), self.number("Q", name))


def check_places(path: Path, size: int, header: Header, nbytes: list[int]) -> None:
    """Tensors of `nbytes` each must follow one another, aligned, and fill a file of `size` bytes.

    Raises
    ------
    ContainerError
    """
    end, before = 0, "the header"
    for e, count in sorted(zip(header.entries, nbytes, strict=True), key=lambda pair: (pair[0].offset, pair[1])):
        where = f"{path}: {e.name}"
        if e.offset % header.alignment:
            raise ContainerError(f"{where}: at offset {e.offset}, needs a multiple of {header.alignment}", "PF107")
        if e.offset < end:
            raise ContainerError(f"{where}: begins {end - e.offset} bytes before {before} ends", "PF107")
        if e.offset > aligned(end, header.alignment):
            beyond = header.data + e.offset + count - size
            how = f"begins {e.offset - end} bytes after {before}"
            how = f"ends {beyond} bytes beyond the file" if beyond > 0 else how
            raise ContainerError(f"{where}: {how}; tensors must follow each other", "PF107")
        end, before = e.offset + count, e.name
    if not header.entries:
        left = size - header.data  # the padding after the last key need not be there
    else:
        if header.data + end > size:
            raise ContainerError(f"{path}: {size} bytes, its tensors need {header.data + end}; {TRUNCATED}", "PF101")
        left = size - header.data - aligned(end, header.alignment)
    if left > 0:
        raise ContainerError(f"{path}: {left} bytes after the last tensor belong to nothing", "PF108")


# ---------------------------------------------------------------- building


def build(keyvalues: Mapping[str, KeyValue], entries: list[Entry], alignment: int) -> bytes:
    """Everything before the first tensor byte.

    Raises
    ------
    PlanError
        If a key's value is not of its type.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(keyvalues))]
    for key, keyvalue in keyvalues.items():
        kind, *items = keyvalue.kind.split(":")
        if not key:
            raise PlanError("a key-value without a key, GGUF readers refuse it")
        try:
            parts += [_text(key), struct.pack("<I", KINDS.index(kind)), _pack(kind, items, keyvalue.value)]
        except (struct.error, OverflowError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"key {key!r}: its value is no {keyvalue.kind}: {error}") from error
    for e in entries:
        n = len(e.shape)
        parts += [_text(e.name), struct.pack(f"<I{n}QIQ", n, *e.shape[::-1], e.type, e.offset)]
    raw = b"".join(parts)
    if len(raw) > LONGEST:
        raise PlanError(f"key-values and tensor entries take {len(raw)} bytes, a header holds {LONGEST}")
    return raw.ljust(aligned(len(raw), alignment), b"\0")


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pack(kind: str, items: list[str], value: Any) -> bytes:
    if kind == "ARRAY":
        item, *inner = items
        return struct.pack("<IQ", KINDS.index(item), len(value)) + _pack_items(item, inner, value)
    return _pack_items(kind, items, [value])


def _pack_items(kind: str, inner: list[str], values: list[Any]) -> bytes:
    if kind == "ARRAY":
        return b"".join(_pack(kind, inner, v) for v in values)
    if kind == "STRING":
        return b"".join(map(_text, values))
    if kind == "BOOL" and not all(type(v) is bool for v in values):
        raise ValueError("needs true or false")
    return struct.pack(f"<{len(values)}{CODES[kind]}", *values)
