"""Outliers of a weight, row by row: places checked, numbers combined with the dense ones, and multiplied.

A row's outliers have ascending columns. Of a product they come last, one after the other: y = y + (value * x[column]),
product and sum rounded to float32 on their own.

Lanes are rows, as in tiles: sixteen rows with about as many outliers go together, their first outliers, their second
ones and so on.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from packfmt.errors import LayoutError
from packfmt.kernels import pages, simd, simd_code, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.tile_code import Table, array_at, entry

F32 = np.float32
Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

FAR = np.uint8(255)  # a gap that is no outlier
LANES = 16
LEAST = 1 << 19  # products of outliers, 0.15 ms, that are worth a thread: helpers of the dense part would stop looking
AHEAD = 2048  # bytes of columns and of values that are asked for early
HALF, BRAIN, SINGLE = range(3)
FLOATS = {"float16": HALF, "bfloat16": BRAIN, "float32": SINGLE}


def first_wrong(ends: Ints, columns: Array, cols: int) -> int:
    """The first outlier whose column is beyond the matrix, or not behind the one before in its row; -1: none is.

    ends : (rows + 1,) int64, from 0 to the number of outliers, ascending
    columns : (n,) unsigned
    """
    if not len(columns):
        return -1
    wide = columns.astype(np.int64)
    wrong = wide >= cols
    wrong[1:] |= wide[1:] <= wide[:-1]
    firsts = ends[:-1][np.diff(ends) > 0]  # which follow another row's
    wrong[firsts] = wide[firsts] >= cols
    return int(np.argmax(wrong)) if wrong.any() else -1


def columns_of(gaps: npt.NDArray[np.uint8], ends: Ints, columns: npt.NDArray[np.uint32]) -> tuple[int, int]:
    """Write the columns that gaps mean; returns how many gaps were used, one more than there are if they end too early.

    The other number is the row in which they end then. Columns wrap around 2**32, which no row of fewer gaps can.
    """
    used, row = _columns_of(gaps, ends, columns)
    return int(used), int(row)


@njit(cache=True, nogil=True)
def _columns_of(gaps, ends, columns):
    at = np.uint64(0)
    for row in range(ends.size - 1):
        column = np.uint32(0)
        for i in range(np.uint64(ends[row]), np.uint64(ends[row + 1])):
            while at < gaps.size and gaps[at] == FAR:
                column = np.uint32(column + np.uint32(FAR))
                at += np.uint64(1)
            if at >= gaps.size:
                return np.int64(gaps.size + 1), np.int64(row)
            column = np.uint32(column + np.uint32(gaps[at]))
            columns[i] = column
            column = np.uint32(column + np.uint32(1))
            at += np.uint64(1)
    return np.int64(at), np.int64(ends.size - 1)


def gaps_of(ends: Ints, columns: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """The gaps of ascending columns: columns that are left out before each, and 255 for every so many."""
    wide = columns.astype(np.int64)
    before = np.empty_like(wide)
    before[1:] = wide[:-1]
    before[ends[:-1][np.diff(ends) > 0]] = -1
    gap = wide - before - 1
    out = np.full(int((gap // 255 + 1).sum()), FAR)
    out[np.cumsum(gap // 255 + 1) - 1] = gap % 255
    return out


def combine(ends: Ints, columns: Array, values: Array, weights: Floats, replace: bool) -> None:
    """Add each outlier to its weight, rounded to float32, or put it there.

    weights : (rows, cols) float32, C-contiguous, written; ends and columns as `first_wrong` finds them right
    """
    _check(ends, columns, values)
    if weights.dtype != F32 or weights.shape[0] != len(ends) - 1 or not weights.flags.carray:
        raise LayoutError(f"weights are {weights.dtype} {weights.shape}, needs float32 of {len(ends) - 1} rows")
    row = np.repeat(np.arange(len(weights)), np.diff(ends))
    numbers = values.astype(F32)
    if replace:
        weights[row, columns] = numbers
    else:
        with np.errstate(all="ignore"):
            weights[row, columns] += numbers


class Product:
    """Outliers that are added to products of the dense weight: (x (batch, cols), out (batch, rows)) -> out.

    Parameters
    ----------
    ends : (rows + 1,) int64
    columns : (n,) uint16 or uint32, as `first_wrong` finds them right
    values : (n,) float16, bfloat16 or float32

    Raises
    ------
    LayoutError
        If an array is another than this.
    """

    def __init__(self, ends: Ints, columns: Array, values: Array) -> None:
        _check(ends, columns, values)
        self._stored = ends, columns, values
        self._slices = 0
        if not simd.INTERPRETED and len(columns):
            sliced = _sliced(ends, columns, values)
            self._slices, self._table = len(sliced[2]), Table(*sliced)
            self._run = _rows_in_lanes(simd.VERSION, FLOATS[values.dtype.name], columns.dtype.itemsize)

    def __call__(self, x: Floats, out: Floats) -> None:
        if simd.INTERPRETED:
            return _multiply_plainly(*self._stored, x, out)
        if len(self._stored[1]) * len(x) < 2 * LEAST:
            return self._some(x, out, 0, self._slices)
        threads.spread(partial(self._some, x, out), self._slices, -(-LEAST * self._slices // self._stored[1].size))

    def _some(self, x: Floats, out: Floats, start: int, stop: int) -> None:
        """Slices start to stop."""
        if self._slices:
            self._run(self._table.address, x, out, np.empty(LANES, F32), start, stop)


def _check(ends: Ints, columns: Array, values: Array) -> None:
    good = ends.dtype == np.int64 and columns.dtype in (np.uint16, np.uint32) and values.dtype.name in FLOATS
    if not good or not len(columns) == len(values) == ends[-1]:
        found = f"{ends.dtype} up to {ends[-1]}, {columns.dtype} {columns.shape}, {values.dtype} {values.shape}"
        raise LayoutError(f"outliers: {found}, needs int64, uint16 or uint32, and floats of as many")


def _sliced(ends: Ints, columns: Array, values: Array) -> tuple[Array, Array, Ints, Array, Array]:
    """Sixteen rows side by side, those with most outliers first: little is left empty then.

    rows : (slices * 16,) int32, of the weight; those of lanes without a row are the last one's
    counts : (slices * 16,) int32, outliers in each lane
    begins : (slices,) int64, the slice's first place
    columns, values : of all places, 16 lanes each; empty ones have column 0

    Source: Kreutzer et al., arXiv 1307.6209 (SELL-C-sigma)
    """
    many = np.diff(ends)
    order = np.argsort(-many, kind="stable")
    order = order[: int(np.count_nonzero(many))]
    slices = -(-len(order) // LANES)
    rows = np.full(slices * LANES, order[-1] if len(order) else 0, np.int32)
    rows[: len(order)] = order
    counts = np.zeros(slices * LANES, np.int32)
    counts[: len(order)] = many[order]
    deep = counts.reshape(slices, LANES).max(1, initial=0)
    begins = np.concatenate([[0], np.cumsum(deep, dtype=np.int64)])
    lane = np.empty(len(many), np.int64)
    lane[order] = np.arange(len(order))
    row = np.repeat(np.arange(len(many)), many)
    place = LANES * (begins[lane[row] // LANES] + np.arange(len(columns)) - ends[row]) + lane[row] % LANES
    size = int(begins[-1]) * LANES
    at = pages.empty(size * columns.dtype.itemsize).view(columns.dtype)
    at[:] = 0
    at[place] = columns
    stored = pages.empty(size * values.dtype.itemsize).view(values.dtype)
    stored[:] = 0
    stored[place] = values
    bits = stored.view(np.uint16 if values.dtype.itemsize == 2 else F32)
    return rows, counts, begins[:-1], at, bits


def _gather_code(build: ir.IRBuilder, data: Any, index: Any) -> Any:
    """Sixteen numbers of an array of float32."""
    if simd_code.AVX512_HERE:
        kind = simd.Floats16.llvm
        every = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)
        none = ir.Constant(kind, [0.0] * LANES)
        pointer = build.bitcast(data, simd_code.I8.as_pointer())
        name = "llvm.x86.avx512.mask.gather.dps.512"
        return simd_code.call(build, name, kind, none, pointer, index, every, simd_code.I32(4))
    found = ir.Constant(simd.Floats16.llvm, ir.Undefined)
    for lane in range(LANES):
        at = build.zext(build.extract_element(index, simd_code.I32(lane)), simd_code.I64)
        found = build.insert_element(found, build.load(build.gep(data, [at])), simd_code.I32(lane))
    return found


def _gather_typed(_context, array, index):
    def code(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _gather_code(builder, data, args[1])

    return simd.Floats16(array, simd.Ints16), code


_gather = simd_code.make_intrinsic(_gather_typed, "_gather", "float32 at these places.", ("array", "index"))


@cache
def _rows_in_lanes(version, kind, wide):
    """The loop over slices; what it is made for is part of the key of compiled code."""
    at_columns, at_values = np.uint16 if wide == 2 else np.uint32, F32 if kind == SINGLE else np.uint16

    @njit(cache=True, nogil=True)
    def _add(table, x, out, room, start, stop):
        _ = version
        rows, counts = array_at(table, 0, np.int32), array_at(table, 1, np.int32)
        begins, columns, values = (
            array_at(table, 2, np.int64),
            array_at(table, 3, at_columns),
            array_at(table, 4, at_values),
        )
        for n in range(x.shape[0]):
            mine = x[n]
            for s in range(start, stop):
                first = LANES * s
                for lane in range(LANES):
                    room[lane] = out[n, rows[first + lane]]
                total, many = simd.load_floats16(room, 0), simd.load_ints16(counts, 4 * first)
                at = LANES * begins[s]
                for k in range(counts[first]):
                    simd.prefetch(columns, columns.itemsize * at + AHEAD)
                    simd.prefetch(values, values.itemsize * at + AHEAD)
                    if wide == 2:
                        places = simd.widen_shorts(simd.load_shorts16(columns, 2 * at))
                    else:
                        places = simd.load_ints16(columns, 4 * at)
                    if kind == HALF:
                        numbers = simd.half_to_float(simd.load_shorts16(values, 2 * at))
                    elif kind == BRAIN:
                        numbers = simd.bfloat_to_float(simd.load_shorts16(values, 2 * at))
                    else:
                        numbers = simd.load_floats16(values, 4 * at)
                    more = simd.addf(total, simd.mulf(numbers, _gather(mine, places)))
                    total = simd.select_less(simd.same_int(np.int32(k)), many, more, total)
                    at += LANES
                simd.store(room, 0, total)
                for lane in range(LANES):
                    if counts[first + lane]:
                        out[n, rows[first + lane]] = room[lane]

    matrix, line = types.Array(types.float32, 2, "C"), types.Array(types.float32, 1, "C")
    return entry(_add, types.int64, matrix, matrix, line, types.int64, types.int64)


def _multiply_plainly(ends: Ints, columns: Array, values: Array, x: Floats, out: Floats) -> None:
    """Where nothing is compiled: the first outliers of all rows, then their second ones ..."""
    many = np.diff(ends)
    with np.errstate(all="ignore"):
        for k in range(int(many.max(initial=0))):
            rows = np.flatnonzero(many > k)
            at = ends[rows] + k
            out[:, rows] += values[at].astype(F32) * x[:, columns[at]]
