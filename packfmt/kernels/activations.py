"""Activations as int8, a scale for each block: what a product with whole steps takes.

Per block, a = (largest magnitude) / 127 in float32, and q = x / a, rounded half to even, within -127 to 127. A block
of zeros, or one so small that a is 0, has q = 0; where a number is infinite or none, a is NaN and q = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from packfmt.errors import LayoutError
from packfmt.kernels import simd, threads
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    divf,
    ints_of,
    load_bytes64,
    load_floats16,
    look_up_64,
    same_float,
    same_int,
    store,
    sub,
    zero_ints,
)

F32 = np.float32
I32 = np.int32
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.int8]

TOP = F32(127)
MOST = np.int32(127)
MAGNITUDE = np.int32(0x7FFFFFFF)  # a float32 without its sign; as whole numbers, these are in the same order
INFINITE = np.int32(0x7F800000)  # infinity's magnitude; those above it are no numbers
NOT_A_NUMBER = F32(np.nan)
# Added to a small number, leaves it rounded half to even in the sum's lowest bits.
ROUNDER = F32(3 << 22)
ROUNDER_BITS = np.int32(ROUNDER.view(np.int32))
LEAST_NUMBERS = 1 << 16  # worth a thread
ROOM = 64  # zeros after a row, for vectors that reach over its end

SAME, QUADS, WINDOWS, ANY = range(4)


class Order(NamedTuple):
    """Where stored columns come from, in the form in which bytes are moved.

    stored, cols : columns stored, and columns of x
    ends : (blocks,) int32, where each block of stored columns ends
    way : SAME; QUADS: four neighbours at a time; WINDOWS: 64 stored columns come from 64 neighbours;
        ANY: numbers are brought in order before they are rounded
    places : int32. QUADS: the first column of each four; WINDOWS: the first of each 64 neighbours; ANY: all columns
    within : uint8. WINDOWS: which of the 64 neighbours each stored column is
    """

    stored: int
    cols: int
    ends: Ints
    way: int
    places: Ints
    within: npt.NDArray[np.uint8]


def arrange(cols: int, block: int | Ints, columns: Ints | None = None) -> Order:
    """How to bring activations in stored order; made once for many products.

    Parameters
    ----------
    cols : columns of x
    block : stored columns of a block, of which the last may have fewer; or where each block ends, ascending
    columns : (stored,) the column of x that each stored column takes, or -1 for 0; default: the same

    Raises
    ------
    LayoutError
        If blocks are empty or end elsewhere than the stored columns, or a column is not one of x.
    """
    stored = cols if columns is None else len(columns)
    if isinstance(block, int):
        if block < 1:
            raise LayoutError(f"blocks of {block} activations, needs 1 or more")
        ends = np.minimum(np.arange(block, stored + block, block, dtype=I32), I32(stored))
    else:
        ends = np.ascontiguousarray(block, I32)
        if (np.diff(ends, prepend=I32(0)) <= 0).any() or (int(ends[-1]) if len(ends) else 0) != stored:
            raise LayoutError(f"blocks of activations end at {ends.tolist()[:8]}, needs ascending up to {stored}")
    none = np.empty(0, I32), np.empty(0, np.uint8)
    if columns is None:
        return Order(stored, cols, ends, SAME, *none)
    columns = np.ascontiguousarray(columns, I32)
    if stored and not -1 <= int(columns.min()) <= int(columns.max()) < cols:
        raise LayoutError(f"columns {columns.min()} to {columns.max()}, needs -1 to {cols - 1}")
    order = partial(Order, stored, cols, ends)
    if not _stays_in_blocks(columns, cols, ends):
        return order(ANY, columns, none[1])
    absent = columns < 0
    if (absent | (columns == np.arange(stored))).all() and (np.flatnonzero(absent) >= cols).all():
        return order(SAME, *none)
    if (quads := _quads(columns, cols)) is not None:
        return order(QUADS, quads, none[1])
    if (found := _windows(columns, cols)) is not None:
        return order(WINDOWS, *found)
    return order(ANY, columns, none[1])


def _stays_in_blocks(columns: Ints, cols: int, ends: Ints) -> bool:
    """Whether each column of x is there once, in the block that it would be in anyway."""
    at = np.flatnonzero(columns >= 0)
    once = len(at) == cols and len(np.unique(columns[at])) == cols
    return once and np.array_equal(np.searchsorted(ends, at, "right"), np.searchsorted(ends, columns[at], "right"))


def _quads(columns: Ints, cols: int) -> Ints | None:
    """The first column of each four stored ones, if these are neighbours; the columns from `cols` on are zero."""
    if len(columns) % 4:
        return None
    fours = columns.reshape(-1, 4)
    there = fours >= 0
    first = np.where(there, fours - np.arange(4), -4).max(1, initial=-4)
    first = np.where(there.any(1), first, cols).astype(I32)
    wanted = first[:, None] + np.arange(4)
    good = (first >= 0).all() and np.where(there, wanted == fours, wanted >= cols).all()
    return first if good else None


def _windows(columns: Ints, cols: int) -> tuple[Ints, npt.NDArray[np.uint8]] | None:
    """The first of 64 neighbours, and which each stored column is; None if they lie further apart."""
    padded = np.pad(columns, (0, -len(columns) % 64), constant_values=-1).reshape(-1, 64)
    there = padded >= 0
    first = np.where(there, padded, cols).min(1, initial=cols).astype(I32)
    within = np.where(there, padded - first[:, None], 63)
    beyond = there | (np.arange(64) >= len(columns) - 64 * np.arange(len(padded))[:, None])
    if (within > 63).any() or not (beyond | (first + 63 >= cols)[:, None]).all():
        return None
    return first, within.astype(np.uint8).reshape(-1)


def quantise(x: Floats, order: Order, unit: float | np.float32 = 1.0) -> tuple[Bytes, Ints, Floats]:
    """Activations as int8 in stored order, on all threads where there are many.

    Parameters
    ----------
    x : (batch, cols) float32, C-contiguous
    order : from `arrange`
    unit : what a whole step of the weights counts, a power of two

    Returns
    -------
    q : (batch, stored) int8
    sums : (batch, blocks) int32, of q
    scale : (batch, blocks) float32, a * unit, rounded

    Raises
    ------
    LayoutError
        If x is another array.
    """
    if x.ndim != 2 or x.shape[1] != order.cols or x.dtype != F32 or not x.flags.c_contiguous:
        raise LayoutError(f"activations {x.dtype} {x.shape}, needs C-contiguous float32 (batch, {order.cols})")
    batch, unit = len(x), F32(unit)
    q = np.empty((batch, order.stored), np.int8)
    sums = np.empty((batch, len(order.ends)), I32)
    scale = np.empty((batch, len(order.ends)), F32)
    work = partial(_some if not simd.INTERPRETED else _some_plainly, x, order, unit, q, sums, scale)
    if x.size < 2 * LEAST_NUMBERS:
        work(0, batch)
    else:
        threads.spread(work, batch, -(-LEAST_NUMBERS // order.cols))
    return q, sums, scale


def _some(x, order, unit, q, sums, scale, start, stop):
    """Rows start to stop of x."""
    mine, way, room = x[start:stop], order.way, _NOWHERE
    if way == ANY:
        mine, way = np.empty((stop - start, order.stored), F32), SAME
        _gather(x, start, order.places, mine)
    elif way != SAME:
        room = np.empty(max(order.cols, order.stored) + 2 * ROOM, np.int8)
    _quantise(mine, order.ends, unit, way, order.places, order.within, room, q, sums, scale, start)


def _some_plainly(x, order, unit, q, sums, scale, start, stop):
    """`_some` in NumPy, to the same bits."""
    columns = np.arange(order.stored, dtype=I32)
    if order.way in (QUADS, ANY):
        columns = order.places if order.way == ANY else (order.places[:, None] + columns[:4]).reshape(-1)
    elif order.way == WINDOWS:
        columns = np.repeat(order.places, 64)[: order.stored] + order.within[: order.stored]
    moved = np.zeros((stop - start, order.stored), F32)
    there = (columns >= 0) & (columns < order.cols)
    moved[:, there] = x[start:stop, columns[there]]
    first = 0
    for b, end in enumerate(order.ends):
        mine = moved[:, first:end]
        with np.errstate(all="ignore"):
            largest = np.abs(mine).max(1, keepdims=True)  # NaN, if there is one
            a = np.where(np.isfinite(largest), largest / TOP, NOT_A_NUMBER)
            steps = np.rint(mine / a).clip(-TOP, TOP)
            q[start:stop, first:end] = np.where(a > 0, steps, F32(0))
            scale[start:stop, b] = (a * unit)[:, 0]
        sums[start:stop, b] = q[start:stop, first:end].sum(1, dtype=I32)
        first = end


def _of_lanes(name: str) -> Callable[..., np.int32]:
    """One number of all lanes of an Ints16, by an operation that has no order: the largest, the sum."""

    def reduce(typing, v):
        def code(context, builder, signature, args):
            lanes = ir.VectorType(ir.IntType(32), 16)
            kind = ir.FunctionType(ir.IntType(32), [lanes])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

        return types.int32(simd.Ints16), code

    return intrinsic(reduce)


def _of_two(name: str) -> Callable[..., object]:
    """Lane by lane of two Ints16."""

    def choose(typing, v, w):
        def code(context, builder, signature, args):
            lanes = ir.VectorType(ir.IntType(32), 16)
            kind = ir.FunctionType(lanes, [lanes, lanes])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

        return simd.Ints16(simd.Ints16, simd.Ints16), code

    return intrinsic(choose)


_largest_lane = _of_lanes("llvm.vector.reduce.smax.v16i32")
_sum_of_lanes = _of_lanes("llvm.vector.reduce.add.v16i32")
_larger = _of_two("llvm.smax.v16i32")
_smaller = _of_two("llvm.smin.v16i32")


@intrinsic
def _low_bytes(typing, v):
    """The lowest byte of each lane: Ints16 -> Bytes16."""

    def code(context, builder, signature, args):
        return builder.trunc(args[0], ir.VectorType(ir.IntType(8), 16))

    return simd.Bytes16(simd.Ints16), code


@intrinsic
def _bits(typing, number):
    """A float32 as int32."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), code


@intrinsic
def _number(typing, bits):
    """An int32 as float32."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def _ratio(typing, x, y):
    """x / y, which may be infinite or no number."""

    def code(context, builder, signature, args):
        return builder.fdiv(*args)

    return types.float32(types.float32, types.float32), code


@intrinsic
def _copy4(typing, target, at, source, place):
    """Four bytes from byte `place` of an array to byte `at` of another."""

    def code(context, builder, signature, args):
        four = ir.IntType(32).as_pointer()
        to, of = (
            builder.bitcast(builder.gep(context.make_array(kind)(context, builder, array).data, [index]), four)
            for kind, array, index in ((signature.args[i], args[i], args[i + 1]) for i in (0, 2))
        )
        builder.store(builder.load(of, align=1), to, align=1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), code


@njit(cache=True, nogil=True)
def _gather(x, start, columns, out):
    for i in range(out.shape[0]):
        numbers, moved = x[start + i], out[i]
        for j in range(moved.size):
            column = columns[j]
            moved[j] = numbers[column] if column >= 0 else F32(0)


@njit(cache=True, nogil=True)
def _last_few(x, at, end, largest):
    """The bits of the largest magnitude of x[at:end], if above those given."""
    for i in range(at, end):
        largest = max(largest, np.int32(_bits(x[i]) & MAGNITUDE))
    return largest


@njit(cache=True, nogil=True)
def _last_steps(x, at, end, a, out, to):
    """x / a for x[at:end], rounded, to byte `to` of out and on; returns their sum."""
    total = np.int32(0)
    for i in range(at, end):
        rounded = np.int32(_bits(_ratio(x[i], a) + ROUNDER) - ROUNDER_BITS)
        q = max(min(rounded, MOST), -MOST)
        total += q
        out[to + i - at] = q
    return np.int32(total)


def _kernel(version: str) -> Callable[..., None]:
    """The loop over rows; in its closure the version is part of the key under which compiled code is kept."""

    @njit(cache=True, nogil=True)
    def _quantise(x, ends, unit, way, places, within, room, q, sums, scale, start):
        """Row i of x is row start + i of the result. room : bytes of a row, before they are brought in order

        Below 2**22, a number is rounded by what its sum with ROUNDER leaves in the lowest bits. x / a is 191 at
        most, where a is the smallest number above 0.
        """
        version  # noqa: B018
        cols, stored = x.shape[1], q.shape[1]
        numbers, steps = x.reshape(-1), q.reshape(-1)
        magnitude, rounder, bits = same_int(MAGNITUDE), same_float(ROUNDER), same_int(ROUNDER_BITS)
        top, bottom = same_int(MOST), same_int(-MOST)
        for i in range(x.shape[0]):
            row, begin = start + i, i * cols
            out, base = (steps, row * stored) if way == SAME else (room, 0)
            to = base - begin
            at = begin
            for b in range(ends.size):
                end = begin + min(np.int64(ends[b]), cols)
                wide = at + (end - at) // 16 * 16
                found = zero_ints()
                for j in range(at, wide, 16):
                    found = _larger(found, and_(ints_of(load_floats16(numbers, 4 * j)), magnitude))
                largest = _largest_lane(found)
                if wide < end:
                    largest = _last_few(numbers, wide, end, largest)
                a = _ratio(_number(largest), TOP) if largest < INFINITE else NOT_A_NUMBER
                scale[row, b] = a * unit
                sums[row, b] = 0
                if a > 0:
                    each, total = same_float(a), zero_ints()
                    for j in range(at, wide, 16):
                        rounded = sub(ints_of(addf(divf(load_floats16(numbers, 4 * j), each), rounder)), bits)
                        few = _larger(_smaller(rounded, top), bottom)
                        total = add(total, few)
                        store(out, to + j, _low_bytes(few))
                    sums[row, b] = _sum_of_lanes(total)
                    if wide < end:
                        sums[row, b] += _last_steps(numbers, wide, end, a, out, to + wide)
                else:
                    out[to + at : to + end] = 0
                at = max(at, end)
            out[to + at : base + stored if way == SAME else out.size] = 0
            if way == QUADS:
                for j in range(places.size):
                    _copy4(steps, row * stored + 4 * j, room, np.int64(places[j]))
            elif way == WINDOWS:
                for j in range(stored // 64):
                    neighbours = load_bytes64(room, places[j])
                    store(steps, row * stored + 64 * j, look_up_64(neighbours, load_bytes64(within, 64 * j)))
                for j in range(stored // 64 * 64, stored):
                    steps[row * stored + j] = room[places[j // 64] + within[j]]

    return _quantise


_quantise = _kernel(simd.VERSION)

_NOWHERE = np.empty(0, np.int8)
