"""The header of a safetensors file: its length, JSON, and where each tensor's bytes lie.

Written from the format's own page (safetensors 0.8.0, README "Format"): 8 bytes of little-endian length,
that many bytes of JSON, then the tensors' bytes without gaps. Everything else is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from packfmt.errors import TRUNCATED, ContainerError

LONGEST = 100_000_000  # bytes of JSON, as the format's own library has it

# name in the file -> our dtype, or the bits of an element for which there is no layout
DTYPES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in the file: `begin` and `end` count from the first byte after the header."""

    dtype: str  # as the file names it
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors' bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data: int  # offset of the first tensor byte in the file


def read(path: Path, file: BinaryIO) -> Header:
    """Read and check a header; reads no tensor.

    Raises
    ------
    ContainerError
        If a length, name, dtype, shape or offset is not what the format allows.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if start == b"version ":
        raise ContainerError(f"{path}: a Git LFS pointer, not the file it stands for; run git lfs pull", "PF100")
    if len(start) < 8:
        raise ContainerError(f"{path}: {size} bytes, a safetensors file has at least 8", "PF100")
    length = int.from_bytes(start, "little")
    if length > LONGEST:
        what = f"begins with {start!r}, is it a safetensors file?"
        raise ContainerError(f"{path}: a header of {length} bytes, needs {LONGEST} or fewer; {what}", "PF102")
    if 8 + length > size:
        raise ContainerError(f"{path}: {size} bytes, its header alone needs {8 + length}; {TRUNCATED}", "PF101")
    raw = _parse(path, file.read(length))
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ContainerError(f"{path}: __metadata__ is not a record of texts", "PF102")
    for name in raw:
        if not name or not name.isprintable():  # or it could move a terminal's cursor
            raise ContainerError(f"{path}: a tensor called {name!r}, needs a name that can be printed", "PF102")
    entries = {name: _entry(f"{path}: {name}", value) for name, value in raw.items()}
    _check_tiling(path, entries, size - 8 - length)
    return Header(entries, metadata, 8 + length)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [k for k, _ in pairs]
            twice = next(k for k in record if names.count(k) > 1)
            raise ContainerError(f"{path}: the header has {twice!r} twice", "PF104")
        return record

    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=once)
        json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate hides behind an escape
    except UnicodeError as error:
        raise ContainerError(f"{path}: the header is not UTF-8: {error}", "PF103") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ContainerError):
            raise
        raise ContainerError(f"{path}: the header is not JSON: {error}", "PF102") from error
    if not isinstance(data, dict):
        raise ContainerError(f"{path}: the header is not a record of tensors", "PF102")
    return data


def _entry(where: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ContainerError(f"{where}: needs dtype, shape and data_offsets", "PF102")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in BITS):
        raise ContainerError(f"{where}: dtype {dtype!r}, needs one of {', '.join((*DTYPES, *BITS))}", "PF105")
    if not _naturals(shape) or len(shape) > 64:
        raise ContainerError(f"{where}: shape {shape!r}, needs a list of whole numbers", "PF106")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ContainerError(f"{where}: offsets {offsets!r}, needs two ascending whole numbers", "PF107")
    bits = prod(shape) * element_bits(dtype)
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ContainerError(f"{where}: {offsets[1] - offsets[0]} bytes, {dtype} {shape} needs {bits / 8:g}", "PF106")
    return Entry(dtype, tuple(shape), *offsets)


def element_bits(dtype: str) -> int:
    """Bits of one element of a dtype, as the file names it."""
    from packfmt.layout import itemsize

    return BITS.get(dtype) or 8 * itemsize(DTYPES[dtype])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_tiling(path: Path, entries: dict[str, Entry], size: int) -> None:
    at, before = 0, "the header"
    for name, e in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if e.begin != at:
            what = f"{at - e.begin} bytes into {before}" if e.begin < at else f"{e.begin - at} bytes after {before}"
            raise ContainerError(f"{path}: {name} begins {what}; tensors must follow each other", "PF107")
        at, before = e.end, name
    if at > size:
        raise ContainerError(f"{path}: {size} bytes of tensors, the header needs {at}; {TRUNCATED}", "PF101")
    if at < size:
        raise ContainerError(f"{path}: {size - at} bytes after the last tensor belong to nothing", "PF108")


def name_refusal(name: str) -> str:
    """Why no tensor can bear this name; empty if one can."""
    if name == "__metadata__":
        return f"the name {name!r}, which the format keeps for itself"
    return "" if name and name.isprintable() else f"the name {name!r}, needs one that can be printed"


def lay(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[dict[str, Entry], int]:
    """Entries of (name, dtype as the file names it, shape) in file order, and where the last ends.

    Wide elements come first, so that every tensor starts at a multiple of its element's size.
    """
    entries, at = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda item: -element_bits(item[1])):
        end = at + prod(shape) * element_bits(dtype) // 8
        entries[name] = Entry(dtype, shape, at, end)
        at = end
    return entries, at


def text(entries: dict[str, Entry], metadata: dict[str, str]) -> bytes:
    """The header's JSON, compact, without the length before it or the spaces after it."""
    body: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, e in entries.items():
        body[name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
