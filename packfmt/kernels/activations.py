"""Activations as int8, a scale for each block: what a product with whole steps takes.

Per block, a = (largest magnitude) / 127 in float32, and q = x / a, rounded half to even, within -127 to 127. A block
of zeros, or one so small that a is 0, has q = 0; where a number is infinite or none, a is NaN and q = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from packfmt.errors import LayoutError
from packfmt.kernels import simd, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    clear,
    copy4,
    divf,
    float_of,
    ints_of,
    larger,
    largest_lane,
    load_bytes64,
    load_some_floats16,
    look_up_64,
    low_bytes,
    same_float,
    same_int,
    smaller,
    store_some,
    sub,
    sum_of_lanes,
    zero_ints,
)
from packfmt.kernels.tile_code import VERSION, Table, address_of, array_at, call_at, entry, number_at

F32 = np.float32
I32 = np.int32
FLOAT32: Final = np.dtype(F32)
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.int8]

TOP = F32(127)
MOST = np.int32(127)
ALL_BITS, NO_BITS = np.int32(-1), np.int32(0)
MAGNITUDE = np.int32(0x7FFFFFFF)  # a float32 without its sign; as whole numbers, these are in the same order
INFINITE = np.int32(0x7F800000)  # infinity's magnitude; those above it are no numbers
NOT_A_NUMBER = F32(np.nan)
# Added to a small number, leaves it rounded half to even in the sum's lowest bits.
ROUNDER = F32(3 << 22)
ROUNDER_BITS = np.int32(ROUNDER.view(np.int32))
LEAST_NUMBERS = 1 << 16  # worth a thread
ROOM = 64  # zeros after a row, for vectors that reach over its end

SAME, QUADS, WINDOWS, ANY = range(4)
# places in the tables of an order, of a room, of what one thread works in, and of a source
ENDS, PLACES, WITHIN, STORED, COLS, WAY = range(6)
STEPS, SUMS, SCALE, SCRATCH = range(4)
MIXED, LINE, MOVED = range(3)
ORDER, UNIT, QUANTISE = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class Order:
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
    table: Table = field(init=False)

    def __post_init__(self) -> None:
        table = Table(self.ends, self.places, self.within, self.stored, self.cols, self.way)
        object.__setattr__(self, "table", table)


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
    once = len(at) == cols and bool((np.bincount(columns[at], minlength=cols) == 1).all())
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
    check(x, order)
    batch = len(x)
    q = np.empty((batch, order.stored), np.int8)
    sums = np.empty((batch, len(order.ends)), I32)
    scale = np.empty((batch, len(order.ends)), F32)
    if simd.INTERPRETED:
        _by_rows(partial(_some_plainly, x, order, F32(unit), q, sums, scale), x)
    else:
        fill(x, order, float(unit), 1, Table(q, sums, scale))
    return q, sums, scale


def check(x: Floats, order: Order) -> None:
    """Refuse activations that are not (batch, cols) float32 and C-contiguous.

    Raises
    ------
    LayoutError
        If they are not.
    """
    if x.ndim != 2 or x.shape[1] != order.cols or x.dtype != FLOAT32 or not x.flags.c_contiguous:
        raise LayoutError(f"activations {x.dtype} {x.shape}, needs C-contiguous float32 (batch, {order.cols})")


def fill(x: Floats, order: Order, unit: float, width: int, out: Table) -> None:
    """Activations as int8, like `quantise`, written to the arrays of a table; x is not looked at.

    width : rows that lie side by side, four columns of each in turn, and one sum and scale of each. More than 1 only
        where stored columns are a multiple of 4. What belongs to rows after the last is left as it is
    out : STEPS (parts, stored / 4, width, 4) int8, SUMS (parts, blocks, width) int32, SCALE likewise float32, for as
        many parts as the rows need
    """
    quantise_rows = entry(_quantise, *TAKES)

    def some(start: int, stop: int) -> None:
        scratch = _scratch(order)
        quantise_rows(order.table.address, unit, x, start, stop, width, out.address, scratch.address)

    _by_rows(some, x)


def _by_rows(work: Callable[[int, int], None], x: Floats) -> None:
    """Call work(start, stop) for rows of x, on all threads where there are many."""
    if x.size < 2 * LEAST_NUMBERS:
        work(0, len(x))
    else:
        threads.spread(work, len(x), -(-LEAST_NUMBERS // x.shape[1]))


def source(order: Order, unit: float) -> Table:
    """What a kernel needs to fill its room itself, by `_fill_room`."""
    return Table(order.table, np.array([unit], F32), address_of(_quantise, *TAKES))


def _scratch(order: Order) -> Table:
    """What one thread works in: a row's bytes in the order of x, in stored order; and numbers in stored order."""
    bytes_of_row = max(order.cols, order.stored) + 2 * ROOM
    mixed = np.empty(bytes_of_row if order.way in (QUADS, WINDOWS) else 0, np.int8)
    return Table(mixed, np.empty(order.stored, np.int8), np.empty(order.stored if order.way == ANY else 0, F32))


class Room:
    """Where so many rows of activations stand as int8 while they are multiplied.

    table : as `fill` writes it, and what one thread needs to do so
    """

    __slots__ = ("table",)

    def __init__(self, order: Order, rows: int) -> None:
        numbers, scratch = rows * len(order.ends), _scratch(order)
        steps, sums, scale = np.zeros(rows * order.stored, np.int8), np.zeros(numbers, I32), np.zeros(numbers, F32)
        self.table = Table(steps, sums, scale, scratch)


def _some_plainly(
    x: Floats, order: Order, unit: np.float32, q: Bytes, sums: Ints, scale: Floats, start: int, stop: int
) -> None:
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


@intrinsic
def _flat(typing, array):
    """A C-contiguous array's numbers, in one row."""
    gives = types.Array(array.dtype, 1, "C")

    def code(context, builder, signature, args):
        from numba.np.arrayobj import populate_array  # takes 15 ms, and only to compile

        data = context.make_array(array)(context, builder, args[0])
        row = context.make_array(gives)(context, builder)
        populate_array(row, data.data, [data.nitems], [data.itemsize], data.itemsize, None)
        return row._getvalue()

    return gives(array), code


def _kernel(version: str) -> Callable[..., None]:
    """The loop over rows; in its closure the version is part of the key under which compiled code is kept."""

    @njit(cache=True, nogil=True)
    def _quantise(order, unit, x, start, stop, width, table, scratch):
        """Rows start to stop of x. order, table, scratch : addresses, of `Order.table`, as of `fill`, and `_scratch`

        Below 2**22, a number is rounded by what its sum with ROUNDER leaves in the lowest bits. x / a is 191 at
        most, where a is the smallest number above 0; where a is 0 or NaN it may be anything, and is not kept.
        """
        version  # noqa: B018
        ends, places = array_at(order, ENDS, I32), array_at(order, PLACES, I32)
        within, stored, way = array_at(order, WITHIN, np.uint8), number_at(order, STORED), number_at(order, WAY)
        q, sums, scale = array_at(table, STEPS, np.int8), array_at(table, SUMS, I32), array_at(table, SCALE, F32)
        mixed, line = array_at(scratch, MIXED, np.int8), array_at(scratch, LINE, np.int8)
        moved, mixes = array_at(scratch, MOVED, F32), SAME < way < ANY
        magnitude, rounder, bits = same_int(MAGNITUDE), same_float(ROUNDER), same_int(ROUNDER_BITS)
        top, bottom = same_int(MOST), same_int(-MOST)
        for row in range(start, stop):
            part, which = row // width, row % width
            numbers, begin, cols = _flat(x), row * x.shape[1], x.shape[1]
            if way == ANY:
                for j in range(moved.size):
                    column = places[j]
                    moved[j] = x[row, column] if column >= 0 else F32(0)
                numbers, begin, cols = moved, 0, stored
            # in stored order, a row's bytes; and before that
            steps, first = (q, row * stored) if width == 1 else (line, 0)
            out, base = (mixed, 0) if mixes else (steps, first)
            at, place = 0, part * ends.size * width + which
            for b in range(ends.size):
                end = ends[b] if ends[b] < cols else cols
                found = zero_ints()
                for j in range(at, end, 16):
                    few = load_some_floats16(numbers, 4 * (begin + j), end - j)
                    found = larger(found, and_(ints_of(few), magnitude))
                largest = largest_lane(found)
                a = float_of(largest) / TOP if largest < INFINITE else NOT_A_NUMBER
                each, total, kept = same_float(a), zero_ints(), same_int(ALL_BITS if a > 0 else NO_BITS)
                for j in range(at, end, 16):
                    few = load_some_floats16(numbers, 4 * (begin + j), end - j)
                    rounded = sub(ints_of(addf(divf(few, each), rounder)), bits)
                    rounded = and_(larger(smaller(rounded, top), bottom), kept)
                    total = add(total, rounded)
                    store_some(out, base + j, low_bytes(rounded), end - j)
                scale[place], sums[place] = a * unit, sum_of_lanes(total)
                place += width
                at = end
            clear(out, base + at, (out.size if mixes else stored) - at)
            if way == QUADS:
                for j in range(places.size):
                    copy4(steps, first + 4 * j, mixed, np.int64(places[j]))
            elif way == WINDOWS:
                for j in range(0, stored, 64):
                    neighbours = load_bytes64(mixed, places[j // 64])
                    store_some(steps, first + j, look_up_64(neighbours, load_bytes64(within, j)), stored - j)
            if width > 1:
                for j in range(stored // 4):
                    copy4(q, 4 * ((part * (stored // 4) + j) * width + which), line, 4 * j)

    return _quantise


_quantise = _kernel(VERSION)
TAKES: Final = (types.int64, types.float32, types.Array(types.float32, 2, "C"), *[types.int64] * 5)


@njit(cache=True, nogil=True)
def _fill_room(source_at, x, start, width, room):
    """`fill` for rows `start` and on, in one thread. source_at, room : addresses, of `source` and `Room.table`"""
    order, unit = number_at(source_at, ORDER), array_at(source_at, UNIT, F32)[0]
    scratch, stop = number_at(room, SCRATCH), np.int64(x.shape[0])
    call_at(number_at(source_at, QUANTISE), (order, unit, x, np.int64(start), stop, np.int64(width), room, scratch))
