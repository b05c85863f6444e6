"""Where codes and scales of a layout lie, if it is simple enough for a kernel to find them.

Fits: codes lie in cells of one component, row by row and block by block, as fields within a byte or one after the
other, as bytes, base-3 bytes or quads; scales are whole numbers in such cells. Planes are read as columns of a cell.
Codes that lie in another way are unpacked first, and then lie row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from packfmt.kernels.places import FIVES, Places
from packfmt.layout import REST, TOP, Codes, Component, Digit, Layout, Member, Values, grid
from packfmt.placement import Array, Arrays, unpack

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Rows = Sequence[tuple[int, ...]]

MOST_CODES: Final = 1 << 12  # of a cell
FEW_CODES: Final = 256  # cells of fewer are read several at a time
VECTOR: Final = 16  # codes that become numbers together, where a loop is written out
AT_ONCE: Final = 64  # codes of which cells are made there, if they have fewer


class Unfit(Exception):
    """No kernel fits this layout."""


def check(good: object) -> None:
    """Raise `Unfit` unless this is true."""
    if not good:
        raise Unfit


def unpacked(layout: Layout, shape: tuple[int, int], components: Arrays, part: str) -> Array:
    """One part of a tensor, from its components."""
    names = frozenset(m.name for _, m, _ in layout.members())
    return unpack(layout, shape, components, names - {part})[part]


def flattened(layout: Layout) -> tuple[Layout, int]:
    """The layout without its permutation, and planes as columns: those of a cell lie one after the other.

    Returns also how many planes there are.
    """
    left = tuple(c for c in layout.components if not any(m.name == "perm" for m in getattr(c, "cell", ())))
    if len(left) < len(layout.components):
        used = {d.axis for c in left if isinstance(c, Component) for m in c.cell for d in (*c.over, *_inner(m))}
        layout = replace(layout, components=left, axes=tuple(a for a in layout.axes if a.name in used))
    if layout.grid.name not in ("planes", "plane_base3", "plane_digits"):
        return layout, 1
    rows, plane, cols, *byte = layout.axes
    (home,) = layout.components
    if not isinstance(home, Component) or plane.of or len(byte) != (layout.grid.name == "plane_base3"):
        raise Unfit
    ((_, block),) = [(d.axis, d.stride) for d in home.over if d.axis == cols.name]
    params = dict(layout.grid.params)
    ratio = params.pop("ratio")
    check(type(ratio) is int)
    if layout.grid.name == "plane_digits":
        planes = params["count"]
        check(type(planes) is int and planes == 2 and plane.size == planes)
        wide, step, numbers = block, block // planes, layout.grid
    else:
        planes, wide, step = plane.size, block * plane.size, block
        if byte:
            params = {**params, "block": wide, "runs": params["runs"] * planes}
            numbers = grid("base3", **params)
        else:
            numbers = grid("affine", **params)

    def moved(d: Digit, codes: bool) -> Digit:
        if d.axis != plane.name:
            return d
        if byte and codes:
            return replace(d, axis=byte[0].name, stride=d.stride * byte[0].size)
        return replace(d, axis=cols.name, stride=d.stride * step)

    def placed(m: Codes | Values) -> Codes | Values:
        codes = m.name == "codes"
        if isinstance(m, Values):
            return replace(m, digits=tuple(moved(d, codes) for d in m.digits))
        return replace(
            m, units=tuple(moved(d, codes) for d in m.units), fields=tuple(moved(d, codes) for d in m.fields)
        )

    over = tuple(replace(d, stride=wide) if d.axis == cols.name else d for d in home.over)
    axes = (rows, cols, *(replace(b, size=b.size * planes) for b in byte))
    home = replace(home, over=over, cell=tuple(placed(m) for m in home.cell))
    return replace(layout, components=(home,), axes=axes, grid=numbers), planes


def stretch_of(flat: Layout, planes: int) -> int:
    """How many columns of a flat layout stand for one."""
    return 1 if flat.grid.name == "plane_digits" else planes


def _inner(m: Codes | Values) -> tuple[Digit, ...]:
    return m.digits if isinstance(m, Values) else (*m.units, *m.fields)


@dataclass(frozen=True, slots=True)
class Cells:
    """Where a part lies: in equal cells of one component, row by row, and block by block within a row."""

    component: str
    rows: int  # that share a row of cells; 0: all
    cols: int  # columns of a cell; 0: all
    nbytes: int
    count: int  # elements of the part in a cell
    share: int  # positions along the axis that share an element
    axis: str  # along which the elements lie
    members: tuple[Member, ...]


def cells_of(layout: Layout, part: str) -> Cells:
    """The cells of a part; only what is the same for every shape passes. There are codes, scales, and one of all.

    Raises
    ------
    Unfit
        If the part lies in any other way.
    """
    check(not layout.streams)
    check(
        [a.of for a in layout.axes[:2]] == ["rows", "cols"] and all(a.per == 1 or a.of == "cols" for a in layout.axes)
    )
    check(all(a.pad == 1 and not a.plus for a in layout.axes))
    (home,) = {c.name: c for c, m, _ in layout.members() if m.name == part}.values()
    fitted = layout.fit(layout.block["rows"], layout.block["cols"])
    placed = next(c for c in fitted.components if c.name == home.name)
    members = tuple(m for m in placed.members if m.part == part)
    check(all(d.size != REST and d.stride != TOP for m in home.cell for d in _inside(m)))
    rows, name = layout.axes[0].name, layout.axes[1].name
    over = {d.axis: d for d in home.over}
    check(list(over) in ([], [rows], [rows, name]) and len(over) == len(home.over))
    check(all(d.size == REST and not d.reverse for d in home.over))
    tall = over[rows].stride if rows in over else 0
    step = over[name].stride if name in over else 0
    check(step or (name not in over and all(d.size == 1 for m in members for d in (*m.units, *m.fields))))
    share = fitted.parts[part].share
    check(share[0] == tall or not over)
    axis, count, each = name, max(1, step // max(1, share[1])), share[1]
    if len(layout.axes) == 3 and fitted.parts[part].shape[2] > 1:  # bytes of a block
        check(step and share[1] == step and not layout.axes[2].of)
        axis, count, each = layout.axes[2].name, layout.axes[2].size, share[2]
    check(count <= MOST_CODES)
    columns = step * layout.axes[1].per
    return Cells(home.name, tall, columns, placed.cell_bytes, count, each, axis, members)


def _inside(member: Codes | Values) -> tuple[Digit, ...]:
    return (*member.units, *member.fields) if isinstance(member, Codes) else member.digits


def addresses(cells: Cells, m: Member) -> Ints:
    """The lowest bit of every element in a cell."""
    index = np.arange(cells.count) * cells.share
    out = np.full(cells.count, m.start, np.int64)
    sizes = [d.size for d in m.units], [d.size for d in m.fields]
    steps = [8 * m.word * m.words * prod(sizes[0][i + 1 :]) for i in range(len(m.units))]
    steps += [m.bits * prod(sizes[1][i + 1 :]) for i in range(len(m.fields))]
    for digit, step in zip((*m.units, *m.fields), steps, strict=True):
        if digit.size > 1:
            check(digit.axis == cells.axis)
            turn = index // digit.stride % digit.size
            out += step * (digit.size - 1 - turn if digit.reverse else turn)
    return out


def _together(count: int, cells: Cells) -> int:
    """How many of a row's cells to read as one: a divisor, so that runs are long where cells hold nothing but codes."""
    if 8 * cells.nbytes > cells.count * sum(m.bits for m in cells.members):
        return 1
    return max(n for n in range(1, max(1, FEW_CODES // cells.count) + 1) if count % n == 0)


# ---------------------------------------------------------------- codes


def _places(layout: Layout, cells: Cells, together: int) -> Places:
    """The kernel's tables for so many neighbouring cells.

    Raises
    ------
    Unfit
        If codes are wider than a byte, or cross bytes but are not one after the other, or lie in no order to speak of.
    """
    runs: list[tuple[int, ...]] = []
    streams: list[tuple[int, ...]] = []
    digits: list[tuple[int, ...]] = []
    powers = [1, 3, 9, 27, 81]
    count = cells.count * together
    for m in sorted(cells.members, key=lambda m: m.low):
        at = addresses(cells, m)
        at = (at + 8 * cells.nbytes * np.arange(together)[:, None]).reshape(-1)
        check(m.low + m.bits <= 8)
        if layout.grid.name == "base3":
            check(m.bits == 8 and (np.diff(at) == 8).all())
            byte, code = int(at[0]) // 8, 0
            for n, each in layout.grid["runs"]:
                digits.append((byte, n, each, code))
                byte, code = byte + n, code + n * each
            count = code
            powers = powers if layout.grid["first"] == "high" else powers[::-1]
        elif not runs and _one_after_the_other(at, m.bits):  # for the kernel reads streams before runs
            streams.append((int(at[0]) // 8, count, m.bits, 0, m.low))
        else:
            check((at % 8 + m.bits <= 8).all())
            runs += [(*run, m.low) for run in _runs(at, m.bits)]
            check(len(runs) <= max(16, count // 2))
    return _tables(cells.nbytes * together, count, runs, streams, digits, powers)


def _tables(
    size: int,
    codes: int,
    runs: Rows = (),
    streams: Rows = (),
    digits: Rows = (),
    powers: Sequence[int] = (),
) -> Places:
    """`Places` of plain numbers."""
    tables = [np.array(t, np.int64).reshape(-1, n) for t, n in ((runs, 7), (streams, 5), (digits, 4))]
    return Places(size, codes, tables[0], tables[1], tables[2], np.array(powers, np.uint8))


def _one_after_the_other(at: Ints, bits: int) -> bool:
    """Whether fields follow each other from a byte's first bit on."""
    return bits < 8 and at[0] % 8 == 0 and bool((np.diff(at) == bits).all())


def _runs(at: Ints, bits: int) -> list[tuple[int, int, int, int, int, int]]:
    """Bits where codes begin -> (byte, count, shift, mask, code, step): as few even runs as one pass finds."""
    out = []
    byte, shift = at // 8, at % 8
    for s in np.unique(shift).tolist():
        mine = np.flatnonzero(shift == s)
        mine = mine[np.argsort(byte[mine], kind="stable")]
        start = 0
        while start < len(mine):
            here = mine[start:]
            step = int(here[1] - here[0]) if len(here) > 1 else 1
            even = (np.diff(byte[here]) == 1) & (np.diff(here) == step)
            n = 1 + (len(even) if even.all() else int(np.argmin(even)))
            out.append((int(byte[here[0]]), n, s, (1 << bits) - 1, int(here[0]), step if n > 1 else 1))
            start += n
    return out


@dataclass(frozen=True, slots=True)
class Source:
    """What finds the bytes that hold codes, and where codes lie in them."""

    records: Callable[[tuple[int, int], Arrays], Bytes | None]  # shape, components -> (rows, bytes)
    places: Callable[[int], Places]  # bytes of a row -> of as many cells as are best read together by a table
    cell: Callable[[int, int], Places | None]  # bytes of a row, columns of a group -> of a cell to be written out


def source_of(flat: Layout, layout: Layout, planes: int) -> Source:
    """What finds the codes of a layout, which is given flattened and as it is.

    Raises
    ------
    Unfit
        If they can neither be read where they lie nor be unpacked first.
    """
    try:
        cells = cells_of(flat, "codes")
        check(cells.cols and cells.rows == cells.share == 1 and flat.grid.name != "quads_in_fives")
        one = _places(flat, cells, 1)
    except Unfit:
        check(flat is layout or flat.grid == layout.grid)
        return _unpacked_source(layout)
    stretch = stretch_of(flat, planes)

    def records(shape: tuple[int, int], components: Arrays) -> Bytes | None:
        if shape[1] * stretch % cells.cols:
            return None  # the last cell is cut off at the edge
        return bytes_of(components[cells.component], shape[0])

    def places(nbytes: int) -> Places:
        return _places(flat, cells, _together(nbytes // cells.nbytes, cells))

    def cell(nbytes: int, group: int) -> Places | None:
        alone = len(one.digits) or one.codes >= AT_ONCE
        wanted = [n for n in range(1, 2 if alone else AT_ONCE // one.codes + 1) if nbytes // cells.nbytes % n == 0]
        found = [n for n in wanted if _goes_into(n * one.codes, group)]
        for n in reversed(found):
            with suppress(Unfit):  # codes of a cell are in some order, those of several need not be
                return _places(flat, cells, n)
        return None

    return Source(records, lru_cache(maxsize=64)(places), cell)


def _goes_into(codes: int, group: int) -> bool:
    """Whether a cell of so many codes is a whole number of vectors, and of groups, or a group of cells."""
    return codes % VECTOR == 0 and group % VECTOR == 0 and (codes % group == 0 or group % codes == 0)


def _unpacked_source(layout: Layout) -> Source:
    """Codes that lie in no order to speak of, once they are unpacked."""
    fives, each = layout.grid.name == "quads_in_fives", 4 if layout.grid.name == "quads" else 1

    def records(shape: tuple[int, int], components: Arrays) -> Bytes | None:
        codes = unpacked(layout, shape, components, "codes")
        found = bytes_of(codes, shape[0])
        if fives or found is None:
            return found if codes.dtype == np.uint16 and codes.ndim == 3 and codes.shape[2] == 5 else None
        return found if codes.itemsize == 1 and found.shape[1] * each == shape[1] else None

    def places(nbytes: int) -> Places:
        if fives:  # of the last code a bit each
            return _tables(10, 16, [(2 * i + 1, 1, 7, 1, 15, 1, i) for i in range(5)], [(0, 16, FIVES, 0, 0)])
        return _tables(nbytes, nbytes, [(0, nbytes, 0, 255, 0, 1, 0)])

    def cell(nbytes: int, group: int) -> Places | None:
        found = [n for n in range(VECTOR, AT_ONCE + 1, VECTOR) if nbytes % n == 0 and _goes_into(n, group)]
        return places(max(found)) if found and not fives else None

    return Source(records, lru_cache(maxsize=64)(places), cell)


def bytes_of(array: npt.NDArray[Any], rows: int) -> Bytes | None:
    """The bytes of a component, a row each; None if rows have not as many."""
    if array.nbytes % max(1, rows):
        return None
    if array.ndim == 2 and len(array) == rows and array.dtype == np.uint8 and array.flags.c_contiguous:
        return array
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(rows, -1)
