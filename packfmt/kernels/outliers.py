"""Outliers of a weight, row by row: places checked, numbers combined with the dense ones, and multiplied.

A row's outliers have ascending columns. Of a product they come last, one after the other: y = y + (value * x[column]),
product and sum rounded to float32 on their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.kernels import threads
from packfmt.kernels.cache import njit

F32 = np.float32
Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

FAR = np.uint8(255)  # a gap that is no outlier
LEAST = 1 << 15  # outliers that are worth a thread
AT_ONCE = 1024  # outliers whose products are made before any is added: they stay in the nearest cache
FLOATS = {"float16": 16, "bfloat16": 1, "float32": 0}  # how `_widen` knows them


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
    ends : (rows + 1,) int64; columns : (n,) uint16 or uint32, as `first_wrong` finds them right
    values : (n,) float16, bfloat16 or float32

    Raises
    ------
    LayoutError
        If an array is another than this.
    """

    def __init__(self, ends: Ints, columns: Array, values: Array) -> None:
        _check(ends, columns, values)
        self._kind = FLOATS[values.dtype.name]
        self._ends, self._columns = ends, np.ascontiguousarray(columns)
        self._values = np.ascontiguousarray(values).view(np.uint16 if values.dtype.itemsize == 2 else np.uint32)

    def __call__(self, x: Floats, out: Floats) -> None:
        rows = len(self._ends) - 1

        def some(start: int, stop: int) -> None:
            bits, products = np.empty(AT_ONCE, np.uint32), np.empty(AT_ONCE, F32)
            _multiply(
                self._ends[start : stop + 1], self._columns, self._values, self._kind,
                x, out[:, start:stop], bits, bits.view(F32), products,
            )  # fmt: skip

        threads.spread(some, rows, -(-LEAST * rows // max(1, len(self._columns) * len(x))))


def _check(ends: Ints, columns: Array, values: Array) -> None:
    good = ends.dtype == np.int64 and columns.dtype in (np.uint16, np.uint32) and values.dtype.name in FLOATS
    if not good or not len(columns) == len(values) == ends[-1]:
        found = f"{ends.dtype} up to {ends[-1]}, {columns.dtype} {columns.shape}, {values.dtype} {values.shape}"
        raise LayoutError(f"outliers: {found}, needs int64, uint16 or uint32, and floats of as many")


@njit(cache=True, nogil=True)
def _widen(values, kind, bits, floats):
    """So many values as float32: `bits` and `floats` are the same memory."""
    if kind == 16:
        for i in range(values.size):
            half = np.uint32(values[i])
            bits[i] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
        for i in range(values.size):
            floats[i] = floats[i] * F32(2.0**112)
    else:
        for i in range(values.size):
            bits[i] = np.uint32(values[i]) << np.uint32(16 * kind)


@njit(cache=True, nogil=True)
def _multiply(ends, columns, values, kind, x, out, bits, numbers, products):
    """Rows of outliers, some at a time: their numbers, their products, and then the sums of rows."""
    first, last, begin = ends[0], ends[ends.size - 1], 0
    while first < last:
        count = min(np.int64(AT_ONCE), last - first)
        mine, row = columns[first : first + count], begin
        _widen(values[first : first + count], kind, bits, numbers)
        for n in range(x.shape[0]):
            for i in range(count):
                products[i] = numbers[i] * x[n, np.uint64(mine[i])]
            row, done = begin, np.int64(0)
            while done < count:
                end = min(ends[row + 1] - first, count)
                y = out[n, row]
                for i in range(np.uint64(done), np.uint64(end)):
                    y = y + products[i]
                out[n, row] = y
                done = end
                if end == ends[row + 1] - first:
                    row += 1
        first += count
        begin = row
