"""Plain numbers from one type to another: to float32, and on to bfloat16, half to even; and how they are written.

What is written past the cache is not read there first. That pays where there is much, and nobody reads it soon.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from packfmt.errors import LayoutError
from packfmt.kernels import simd, vectors
from packfmt.kernels.cache import njit
from packfmt.kernels.places import LINE
from packfmt.kernels.simd import (
    and_,
    as_floats,
    bfloat_to_float,
    half_to_float,
    ints_of,
    load_floats16,
    load_shorts16,
    or_,
    same_int,
    select_less,
    shift_left,
    widen_shorts,
)
from packfmt.kernels.simd_code import I16, I32, constant, cut
from packfmt.kernels.vectors import F32, INTERPRETED, _wait_for_stores

MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
INFINITE = np.uint32(0x7F800000)  # above which magnitudes are no numbers
QUIET = np.uint32(1 << 22)  # which keeps a NaN one where its lower half goes
HALF_BELOW = np.uint32(0x7FFF)  # just less than half of what bfloat16 rounds to

# for kernels that parts of this come into, as `simd.VERSION`
_CODE = b"".join(Path(file).read_bytes() for file in (__file__, vectors.__file__))
VERSION: Final = f"{simd.VERSION}-{sha256(_CODE).hexdigest()[:12]}"


def convert(source: np.ndarray, target: np.ndarray, through: bool = False) -> None:
    """Plain numbers to float32, and on to bfloat16, half to even; NaN stays NaN. On one thread.

    source : (n,) float32, float16, or uint16, the bits of bfloat16
    target : (n,) float32, or uint16, the bits of bfloat16, written
    through : whether past the cache, without reading there first

    Raises
    ------
    LayoutError
        If they are not as long.
    """
    if len(source) != len(target):
        raise LayoutError(f"{len(source)} numbers to convert, needs {len(target)}")
    end = 0
    if not INTERPRETED:
        end = len(source) // 16 * 16
        through = through and target.ctypes.data % LINE == 0
        _converting(source.dtype.str, through, VERSION)(source[:end].view(np.uint8), target[:end])
    last = source[end:]
    wide = (last.astype(np.uint32) << np.uint32(16)).view(F32) if last.dtype == np.uint16 else last.astype(F32)
    target[end:] = wide if target.dtype == F32 else _rounded(wide)


def _rounded(numbers: np.ndarray) -> np.ndarray:
    """Float32 -> the bits of the nearest bfloat16."""
    bits = numbers.view(np.uint32)
    rounded = bits + HALF_BELOW + (bits >> np.uint32(16) & np.uint32(1))
    return (np.where(bits & MAGNITUDE > INFINITE, bits | QUIET, rounded) >> np.uint32(16)).astype(np.uint16)


@njit(cache=True, nogil=True, inline="always")
def _half(stored):
    """float16 -> float32; a NaN keeps its bits, as NumPy has it, where processors make it a quiet one."""
    code = widen_shorts(stored)
    magnitude, sign = and_(code, same_int(np.int32(0x7FFF))), and_(code, same_int(np.int32(0x8000)))
    none = or_(shift_left(magnitude, np.int32(13)), same_int(np.int32(INFINITE)))
    none = or_(none, shift_left(sign, np.int32(16)))
    return as_floats(select_less(same_int(np.int32(0x7C00)), magnitude, none, ints_of(half_to_float(stored))))


@cache
def _converting(kind: str, through: bool, version: str) -> Any:
    """The loop of `convert`. version : part of the key under which compiled code is kept"""
    size, half = np.dtype(kind).itemsize, kind == "<f2"

    @njit(cache=True, nogil=True)
    def _convert(source, target):
        _ = version
        for j in range(0, target.size, 16):
            if size == 4:
                found = load_floats16(source, 4 * j)
            elif half:
                found = _half(load_shorts16(source, 2 * j))
            else:
                found = bfloat_to_float(load_shorts16(source, 2 * j))
            write(target, j, found, through)
        if through:
            _wait_for_stores()

    return _convert


# ---------------------------------------------------------------- written out


def as_bfloat(builder: ir.IRBuilder, numbers: Any) -> Any:
    """A vector of float32 -> the bits of the nearest bfloat16, as `_rounded` has them."""
    bits = builder.bitcast(numbers, ir.VectorType(I32, numbers.type.count))
    odd = builder.and_(builder.lshr(bits, constant(bits.type, 16)), constant(bits.type, 1))
    rounded = builder.add(builder.add(bits, constant(bits.type, int(HALF_BELOW))), odd)
    quiet = builder.or_(bits, constant(bits.type, int(QUIET)))
    found = builder.select(builder.fcmp_unordered("uno", numbers, numbers), quiet, rounded)
    return builder.trunc(builder.lshr(found, constant(bits.type, 16)), ir.VectorType(I16, numbers.type.count))


def store(builder: ir.IRBuilder, found: Any, place: Any, through: bool) -> None:
    """Write a vector to a place, a pointer to whatever; past the cache, it must be a multiple of LINE.

    In pieces of LINE bytes, as NumPy's arrays lie at multiples of that: whole vectors would lie in two cache lines.
    """
    lane = found.type.element
    lanes = LINE // (4 if isinstance(lane, ir.FloatType) else lane.width // 8)
    first = builder.bitcast(place, lane.as_pointer())
    for i, piece in enumerate(cut(builder, found, lanes)):
        there = builder.bitcast(builder.gep(first, [I32(i * lanes)]), piece.type.as_pointer())
        done = builder.store(piece, there)
        done.align = LINE if through else 1
        if through:
            done.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def _store(context: Any, builder: Any, out: Any, array: Any, at: Any, found: Any, through: Any) -> None:
    """Float32 to the items of an array from `at` on, which are float32 or bfloat16."""
    few = found if out.dtype.bitwidth == 32 else as_bfloat(builder, found)
    place = builder.gep(context.make_array(out)(context, builder, array).data, [at])
    with builder.if_else(through) as (past, plain):
        with past:
            store(builder, few, place, True)
        with plain:
            store(builder, few, place, False)


@intrinsic
def write(typing, out, at, found, through):
    """Write sixteen float32, by `_store`."""

    def code(context, builder, signature, args):
        _store(context, builder, out, *args)
        return context.get_dummy_value()

    return types.void(out, types.int64, found, types.boolean), code
