"""Decode in one pass, for the many layouts that are simple enough.

`grids.decode` makes an array of every part and computes on those. Here a kernel reads a row's codes
and writes its numbers, by the same formula and to the same bits. Which kernel, and the tables that tell
it where the codes lie, follow from the layout's structure, never from its name: so it also serves
layouts that a file brings with it. What does not fit goes the general way.

Fits: codes lie in cells of one component, row by row and block by block, as fields within a byte or one after the
other, as bytes, base-3 bytes or quads; scales are whole numbers in such cells, of any float dtype, or codes of a
number format, and may be shared by rows; one number may scale the whole tensor. Planes are read as columns of a cell.
Codes and scales that lie in another way are unpacked first, and then lie row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from packfmt import grids, minifloat, outliers
from packfmt.errors import LayoutError
from packfmt.layout import REST, TOP, Codes, Component, Digit, Layout, Member, Values, dtype_of, grid
from packfmt.placement import Array, Arrays, unpack

if TYPE_CHECKING:
    from packfmt.kernels.blocks import Places

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Ranged = Callable[[int, int], Array]  # first row, end -> what belongs to these rows
Decoder = Callable[[tuple[int, int], Arrays, Array, bool], bool]  # shape, components, out, through
Scales = Callable[[int, int], Floats]  # first row, end -> (rows or 1, groups)

LEAST_WEIGHTS: Final = 1 << 19  # worth a thread: a tenth of a millisecond
STRIP: Final = 1 << 18  # weights computed at a time, in the cache
WIDENED: Final = ("<f4", "<f2", "bfloat16")  # what a kernel widens to float32
LEAST_THROUGH: Final = 1 << 23  # bytes of weights that would not stay in the cache, and are written past it
MOST_CODES: Final = 1 << 12  # of a cell
FEW_CODES: Final = 256  # cells of fewer are read several at a time
PARAMETERS: Final = {
    "affine": {"zero"},
    "quotient": {"zero"},
    "plane_digits": {"count", "ratio"},
    "levels": {"values"},
    "table": {"values", "exponent"},
    "scaled": {"element", "scale", "global_scale"},
    "either": {"element", "other", "global_scale"},
    "hif4": {"element", "scale"},
    "quads": {"stride", "values"},
    "quads_in_fives": {"stride", "values"},
    "base3": {"block", "runs", "first"},
}
PARTS: Final = {"codes", "scale", "global_scale", "perm"}
DOUBLED: Final = ("shift8", "shift4")
GLOBAL: Final = {"times": np.multiply, "divides": np.divide}  # what a scale of the whole tensor does to others


def decode(layout: Layout, shape: tuple[int, int], components: Arrays, out: Array | None = None) -> Array:
    """Components -> (rows, cols) float32, as `grids.decode` gives it, bit for bit.

    out : C-contiguous (rows, cols) to write to, instead of a new array: float32, or bfloat16, to which the numbers
        are then rounded, half to even

    Raises
    ------
    LayoutError
        If a component is not what the layout says, its grid does not fit its parts, or `out` is
        another array than this.
    """
    narrow = out is not None and out.dtype.name == "bfloat16"
    if out is not None and (out.shape != shape or not (narrow or out.dtype == F32) or not out.flags.carray):
        raise LayoutError(f"out is {out.dtype} {out.shape}, needs a writable C-contiguous float32 or bfloat16 {shape}")
    if layout.sparse:
        return _with_outliers(layout, shape, components, out)
    through = out is not None and out.nbytes >= LEAST_THROUGH
    if run := decoder(layout):
        target = np.empty(shape, F32) if out is None else out
        if run(shape, components, target.view(np.uint16) if narrow else target, through):
            return target
    weights = grids.decode(layout, shape, components)
    if out is None:
        return weights
    _convert(weights, out.view(np.uint16) if narrow else out, through)
    return out


def _with_outliers(layout: Layout, shape: tuple[int, int], components: Arrays, out: Array | None) -> Array:
    kept = outliers.names(layout)
    dense = {name: array for name, array in components.items() if name not in kept}
    wide = out if out is not None and out.dtype == F32 else None
    weights = decode(outliers.without(layout), shape, dense, wide)
    outliers.combine(layout, shape, components, weights)
    if out is None or wide is not None:
        return weights
    _convert(weights, out.view(np.uint16), False)
    return out


def _convert(numbers: Array, out: Array, through: bool) -> None:
    """Plain numbers to float32, or to the bits of bfloat16, on all threads."""
    from packfmt.kernels import threads

    source, target = numbers.reshape(-1), out.reshape(-1)

    def work(start: int, stop: int) -> None:
        each = slice(start * LEAST_WEIGHTS, stop * LEAST_WEIGHTS)
        _blocks().convert(source[each], target[each], through)

    if out.size:
        threads.spread(work, -(-out.size // LEAST_WEIGHTS))


@lru_cache(maxsize=256)
def decoder(layout: Layout) -> Decoder | None:
    """What writes the numbers of a tensor of this layout; None if no kernel fits.

    run(shape, components, out, through) -> whether it did: not if the tensor is empty, a component is not what
    the layout says, or it cannot tell which bits a NaN has. `out` is C-contiguous (rows, cols) float32, or uint16, the
    bits of bfloat16; `through` writes it past the cache, which pays where it is large, and its pages have been
    touched before.
    """
    if layout.axes[0].of != "rows":  # which `grids.decode` refuses
        return None
    if layout.grid.name == "plain":
        return _dense(layout)
    try:
        flat, planes = _flat(layout)
        source, formula = _source(flat, layout, planes), _formula(flat, planes)
        scales = _scales(flat, layout, planes)
    except (Unfit, LayoutError, KeyError, TypeError, ValueError, OverflowError, IndexError):
        return None
    # hashing a layout takes longer than decoding a small tensor, so this is remembered here
    described = lru_cache(maxsize=64)(partial(_described, layout))
    permuted = any(m.name == "perm" for _, m, _ in layout.members())

    def run(shape: tuple[int, int], components: Arrays, out: Array, through: bool = False) -> bool:
        from packfmt.kernels import threads

        rows, cols = shape
        wanted = described(shape)
        if not rows or not cols or any(_shape_dtype(components.get(name)) != w for name, w in wanted.items()):
            return False
        stored, scaling = source(shape, components), scales(shape, components)
        order = _inverse(_unpacked(layout, shape, components, "perm")) if permuted else None
        if not stored or not scaling or not formula.fits(cols, scaling.groups) or (permuted and order is None):
            return False
        (records, places), which = stored, scaling.which
        unclear: list[int] = []
        step = max(1, STRIP // cols)
        itself = formula.finishes(cols, scaling.groups) and not layout.hadamard and not permuted
        kept = not itself and (through or out.dtype != F32 or permuted)
        options = {"through": through} if itself else {}

        def strip(start: int, stop: int, target: Array) -> None:
            more = options if which is None else {**options, "which": which(start, stop)}
            if formula.write(records[start:stop], places, scaling.numbers(start, stop), target, **more) is False:
                unclear.append(start)
            if layout.hadamard:
                _hadamard(target, layout.hadamard)

        work = partial(_by_strips, strip, out, 4 * step if itself else step, kept, through, order)
        threads.spread(work, rows, -(-LEAST_WEIGHTS // cols))
        return not unclear

    return run


def _by_strips(
    strip: Callable[[int, int, Array], None],
    out: Array,
    step: int,
    kept: bool,
    through: bool,
    order: Ints | None,
    start: int,
    stop: int,
) -> None:
    """Compute rows a strip at a time, which if `kept` stays in the cache until it is done."""
    rooms = np.empty((2 if order is not None else 1, min(step, stop - start), out.shape[1]), F32) if kept else out[:0]
    for first in range(start, stop, step):
        end = min(stop, first + step)
        if not kept:
            strip(first, end, out[first:end])
            continue
        mine = rooms[0, : end - first]
        strip(first, end, mine)
        if order is not None:
            _blocks().take(mine, order, rooms[1, : end - first])
            mine = rooms[1, : end - first]
        _blocks().convert(mine.reshape(-1), out[first:end].reshape(-1), through)


def _dense(layout: Layout) -> Decoder | None:
    """`decoder` for plain numbers."""
    if layout.hadamard or layout.grid.params or len(layout.components) != 1 or layout.streams:
        return None
    (dtype,) = {m.dtype for _, m, _ in layout.members() if isinstance(m, Values)} or {""}
    if dtype not in WIDENED or layout.axes[0].of != "rows" or layout.axes[0].per != 1:
        return None

    def run(shape: tuple[int, int], components: Arrays, out: Array, through: bool = False) -> bool:
        if not out.size or any(_shape_dtype(components.get(n)) != w for n, w in _described(layout, shape).items()):
            return False
        (only,) = layout.fit(*shape).components
        plain = np.ascontiguousarray(components[only.name])
        in_order = [(d.axis, d.stride) for d in only.over] == [(a.name, 1) for a in layout.axes]
        numbers = plain if in_order else np.ascontiguousarray(unpack(layout, shape, components)["values"])
        _convert(numbers.view(np.uint16) if dtype == "bfloat16" else numbers, out, through)
        return True

    return run


def _described(layout: Layout, shape: tuple[int, int]) -> dict[str, Any]:
    """Shape and dtype of every component."""
    return {c.name: (c.shape, dtype_of(c.dtype)) for c in layout.fit(*shape).components}


def _shape_dtype(array: npt.NDArray[Any] | None) -> Any:
    return None if array is None else (array.shape, array.dtype)


# ---------------------------------------------------------------- structure


class Unfit(Exception):
    """No kernel fits this layout."""


def _unpacked(layout: Layout, shape: tuple[int, int], components: Arrays, part: str) -> Array:
    names = frozenset(m.name for _, m, _ in layout.members())
    return unpack(layout, shape, components, names - {part})[part]


def _inverse(perm: Array) -> Ints | None:
    """Where each column is stored; None if the permutation is none."""
    stored = perm.reshape(-1).astype(np.int64)
    order = np.argsort(stored, kind="stable")
    return order if np.array_equal(stored[order], np.arange(stored.size)) else None


def _flat(layout: Layout) -> tuple[Layout, int]:
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
    _check(type(ratio) is int)
    if layout.grid.name == "plane_digits":
        planes = params["count"]
        _check(type(planes) is int and planes == 2 and plane.size == planes)
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


def _stretch(flat: Layout, planes: int) -> int:
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


def _check(good: object) -> None:
    if not good:
        raise Unfit


def _cells(layout: Layout, part: str) -> Cells:
    """The cells of a part; only what is the same for every shape passes. There are codes, scales, and one of all.

    Raises
    ------
    Unfit
        If the part lies in any other way.
    """
    _check(not layout.streams)
    _check(
        [a.of for a in layout.axes[:2]] == ["rows", "cols"] and all(a.per == 1 or a.of == "cols" for a in layout.axes)
    )
    _check(all(a.pad == 1 and not a.plus for a in layout.axes))
    (home,) = {c.name: c for c, m, _ in layout.members() if m.name == part}.values()
    fitted = layout.fit(layout.block["rows"], layout.block["cols"])
    placed = next(c for c in fitted.components if c.name == home.name)
    members = tuple(m for m in placed.members if m.part == part)
    _check(all(d.size != REST and d.stride != TOP for m in home.cell for d in _inside(m)))
    rows, name = layout.axes[0].name, layout.axes[1].name
    over = {d.axis: d for d in home.over}
    _check(list(over) in ([], [rows], [rows, name]) and len(over) == len(home.over))
    _check(all(d.size == REST and not d.reverse for d in home.over))
    tall = over[rows].stride if rows in over else 0
    step = over[name].stride if name in over else 0
    _check(step or (name not in over and all(d.size == 1 for m in members for d in (*m.units, *m.fields))))
    share = fitted.parts[part].share
    _check(share[0] == tall or not over)
    axis, count, each = name, max(1, step // max(1, share[1])), share[1]
    if len(layout.axes) == 3 and fitted.parts[part].shape[2] > 1:  # bytes of a block
        _check(step and share[1] == step and not layout.axes[2].of)
        axis, count, each = layout.axes[2].name, layout.axes[2].size, share[2]
    _check(count <= MOST_CODES)
    columns = step * layout.axes[1].per
    return Cells(home.name, tall, columns, placed.cell_bytes, count, each, axis, members)


def _inside(member: Codes | Values) -> tuple[Digit, ...]:
    return (*member.units, *member.fields) if isinstance(member, Codes) else member.digits


def _addresses(cells: Cells, m: Member) -> Ints:
    """The lowest bit of every element in a cell."""
    index = np.arange(cells.count) * cells.share
    out = np.full(cells.count, m.start, np.int64)
    sizes = [d.size for d in m.units], [d.size for d in m.fields]
    steps = [8 * m.word * m.words * prod(sizes[0][i + 1 :]) for i in range(len(m.units))]
    steps += [m.bits * prod(sizes[1][i + 1 :]) for i in range(len(m.fields))]
    for digit, step in zip((*m.units, *m.fields), steps, strict=True):
        if digit.size > 1:
            _check(digit.axis == cells.axis)
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
    from packfmt.kernels.blocks import Places

    runs: list[tuple[int, ...]] = []
    streams: list[tuple[int, ...]] = []
    digits: list[tuple[int, ...]] = []
    powers = [1, 3, 9, 27, 81]
    count = cells.count * together
    for m in sorted(cells.members, key=lambda m: m.low):
        at = _addresses(cells, m)
        at = (at + 8 * cells.nbytes * np.arange(together)[:, None]).reshape(-1)
        _check(m.low + m.bits <= 8)
        if layout.grid.name == "base3":
            _check(m.bits == 8 and (np.diff(at) == 8).all())
            byte, code = int(at[0]) // 8, 0
            for n, each in layout.grid["runs"]:
                digits.append((byte, n, each, code))
                byte, code = byte + n, code + n * each
            count = code
            powers = powers if layout.grid["first"] == "high" else powers[::-1]
        elif not runs and _one_after_the_other(at, m.bits):  # for the kernel reads streams before runs
            streams.append((int(at[0]) // 8, count, m.bits, 0, m.low))
        else:
            _check((at % 8 + m.bits <= 8).all())
            runs += [(*run, m.low) for run in _runs(at, m.bits)]
            _check(len(runs) <= max(16, count // 2))
    return Places(
        cells.nbytes * together,
        count,
        np.array(runs, np.int64).reshape(-1, 7),
        np.array(streams, np.int64).reshape(-1, 5),
        np.array(digits, np.int64).reshape(-1, 4),
        np.array(powers, np.uint8),
    )


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


def _source(
    flat: Layout, layout: Layout, planes: int
) -> Callable[[tuple[int, int], Arrays], tuple[Bytes, Places] | None]:
    """What finds the bytes that hold codes, (rows, bytes), and where codes lie in them."""
    try:
        cells = _cells(flat, "codes")
        _check(cells.cols and cells.rows == cells.share == 1 and flat.grid.name != "quads_in_fives")
        _places(flat, cells, 1)
    except Unfit:
        _check(flat is layout or flat.grid == layout.grid)
        return partial(_unpacked_source, layout)
    places_of = lru_cache(maxsize=64)(lambda count: _places(flat, cells, _together(count, cells)))
    stretch = _stretch(flat, planes)

    def find(shape: tuple[int, int], components: Arrays) -> tuple[Bytes, Places] | None:
        if shape[1] * stretch % cells.cols:
            return None  # the last cell is cut off at the edge
        records = _rows(components[cells.component], shape[0])
        return records, places_of(records.shape[1] // cells.nbytes)

    return find


def _unpacked_source(layout: Layout, shape: tuple[int, int], components: Arrays) -> tuple[Bytes, Places] | None:
    """Codes that lie in no order to speak of, once they are unpacked."""
    from packfmt.kernels.blocks import FIVES, Places

    codes = _unpacked(layout, shape, components, "codes")
    records = _rows(codes, shape[0])
    runs, streams, size, count = [(0, records.shape[1], 0, 255, 0, 1, 0)], [], records.shape[1], records.shape[1]
    if layout.grid.name == "quads_in_fives":
        if codes.dtype != np.uint16 or codes.ndim != 3 or codes.shape[2] != 5:
            return None
        runs = [(2 * i + 1, 1, 7, 1, 15, 1, i) for i in range(5)]  # of the last code a bit each
        streams, size, count = [(0, 16, FIVES, 0, 0)], 10, 16
    elif codes.itemsize != 1 or records.shape[1] * (4 if layout.grid.name == "quads" else 1) != shape[1]:
        return None
    return records, Places(
        size,
        count,
        np.array(runs, np.int64).reshape(-1, 7),
        np.array(streams, np.int64).reshape(-1, 5),
        np.zeros((0, 4), np.int64),
        np.zeros(0, np.uint8),
    )


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scales of one tensor, for rows of it."""

    numbers: Ranged  # (rows or 1, groups) float32
    groups: int
    which: Ranged | None = None  # (rows or 1, groups) uint8, which table counts


def _rows(array: npt.NDArray[Any], rows: int) -> Bytes:
    """The bytes of a component, a row each."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(rows, -1)


def _whole(layout: Layout) -> str:
    """The component that holds one scale for the whole tensor; empty if there is none."""
    homes = [(c, m) for c, m, _ in layout.members() if m.name == "global_scale"]
    how = dict(layout.grid.params).get("global_scale", "")
    _check(how in GLOBAL if homes else how == "")
    if not homes:
        return ""
    ((home, member),) = homes
    _check(not home.over and len(home.cell) == 1 and isinstance(member, Values) and not member.digits)
    return home.name


def _scales(flat: Layout, layout: Layout, planes: int) -> Callable[[tuple[int, int], Arrays], Scaling | None]:
    """What gives the scales of a tensor."""
    whole, dtype = _whole(flat), dtype_of(flat.fit(flat.block["rows"], flat.block["cols"]).parts["scale"].dtype)
    size = dtype.itemsize
    raw, table, name = np.dtype(f"<u{size}"), _table(flat, dtype), flat.grid.name
    combine = GLOBAL.get(dict(layout.grid.params).get("global_scale", ""))
    ratio = dict(layout.grid.params).get("ratio", 0)
    tied = np.array([ratio**n for n in range(planes - 1, -1, -1)], F32)
    cells: Cells | None = None
    offset, stretch = 0, _stretch(flat, planes)
    try:
        cells = _cells(flat, "scale")
        (m,) = cells.members
        at = _addresses(cells, m)
        _check(m.bits == 8 * size and m.low == 0 and at[0] % 8 == 0 and (np.diff(at) == m.bits).all())
        offset = int(at[0]) // 8
    except Unfit:
        _check(planes == 1)
        cells = None
    _check(name != "either" or (dtype.name.startswith("float8") and table is not None))
    _check(planes == 1 or (cells and cells.count == (1 if ratio else planes)))  # in the order of the codes

    def find(shape: tuple[int, int], components: Arrays) -> Scaling | None:
        rows, cols = shape
        factor = F32(1)
        if whole:
            (factor,) = components[whole].reshape(-1).astype(F32)
        if np.isnan(factor):
            return None  # which NaN survives is the processor's choice
        if cells:
            share, each, count = cells.rows, cells.nbytes, cells.count
            if cells.cols and cols * stretch % cells.cols:
                return None  # the last scale is cut off at the edge
            stored = _rows(components[cells.component], -(-rows // share) if share else 1)
        else:
            part = layout.fit(*shape).parts["scale"]
            share, each, count = part.share[0] if part.shape[0] > 1 else 0, size, 1
            if (
                prod(part.shape[2:]) != 1
                or cols % part.shape[1]
                or (part.shape[1] > 1 and part.share[1] * part.shape[1] != cols)
            ):
                return None
            stored = _rows(_unpacked(layout, shape, components, "scale"), part.shape[0])
        values = table
        if combine and values is not None:
            with np.errstate(all="ignore"):
                values = combine(values, factor)

        def few(mine: Bytes) -> Array:
            """As they are stored."""
            strides = (mine.shape[1], each, size)
            found = np.ndarray((len(mine), mine.shape[1] // each, count), raw, mine, offset, strides)
            return np.ascontiguousarray(found).reshape(len(mine), -1)

        def scales(mine: Bytes) -> Floats:
            with np.errstate(all="ignore"):
                if values is not None:
                    return _blocks().look_up(mine, each, offset, count, values)  # type: ignore[no-any-return]
                found = _widened(few(mine), dtype)
                found = combine(found, factor) if combine else found
                return (found[..., None] * tied).reshape(len(mine), -1) if ratio else found

        def ranged(function: Callable[[Bytes], Array]) -> Ranged:
            def by_row(start: int, stop: int) -> Array:
                if not share:
                    return function(stored)
                first = start // share
                found = function(stored[first : -(-stop // share)])
                return found if share == 1 else found[np.arange(start, stop) // share - first]

            return by_row

        groups = stored.shape[1] // each * count * (planes if ratio else 1)
        if name == "either":
            return Scaling(ranged(scales), groups, ranged(lambda mine: few(mine) >> 7))
        if name == "hif4":
            return _doubled(layout, shape, components, ranged(scales), groups)
        return Scaling(ranged(scales), groups)

    return find


def _widened(stored: Array, dtype: np.dtype[Any]) -> Floats:
    """Whole numbers of the dtype's size, the bits of its numbers, as float32."""
    if dtype.name not in ("float16", "bfloat16"):
        return stored.view(dtype).astype(F32)
    out = np.empty(stored.shape, F32)
    numbers = stored.view(dtype) if dtype.name == "float16" else stored
    _blocks().convert(numbers.reshape(-1), out.reshape(-1))
    return out


def _doubled(layout: Layout, shape: tuple[int, int], components: Arrays, scales: Ranged, groups: int) -> Scaling | None:
    """Scales of every four columns, by the bits that double them."""
    eights, fours = (_unpacked(layout, shape, components, part) for part in DOUBLED)
    rows, cols = shape
    if eights.shape != (rows, cols // 8) or fours.shape != (rows, cols // 4) or cols % (8 * groups):
        return None

    def by_row(start: int, stop: int) -> Array:
        mine = np.broadcast_to(scales(start, stop), (stop - start, groups))
        return _blocks().doubled(mine, eights[start:stop], fours[start:stop])  # type: ignore[no-any-return]

    return Scaling(by_row, cols // 4)


def _table(layout: Layout, dtype: np.dtype[Any]) -> Floats | None:
    """The numbers of scales of one byte; None if they have more."""
    if layout.grid.name == "table":
        _check(dtype == np.uint8)
        with np.errstate(over="ignore"):
            return np.ldexp(F32(1), np.arange(256, dtype=np.int32) - layout.grid["exponent"])  # type: ignore[no-any-return]
    if layout.grid.name in ("scaled", "hif4") and layout.grid["scale"]:
        found = minifloat.numbers(layout.grid["scale"])
        _check(dtype == np.uint8 and len(found) == 256)
        return found
    codes = np.arange(256, dtype=np.uint8) & np.uint8(127 if layout.grid.name == "either" else 255)
    return codes.view(dtype).astype(F32) if dtype.itemsize == 1 else None


@dataclass(frozen=True, slots=True)
class Formula:
    """The kernel of a layout's grid."""

    write: Callable[..., Any]  # records, places, scale, out -> False if it cannot tell
    finishes: Callable[[int, int], bool]  # cols, groups -> whether it writes bfloat16, or past the cache
    planes: int
    unit: int = 1  # what columns that share a scale must be a multiple of

    def fits(self, cols: int, groups: int) -> bool:
        groups //= self.planes
        return groups > 0 and cols % groups == 0 and cols // groups % self.unit == 0


def _formula(layout: Layout, planes: int) -> Formula:
    """How codes become numbers.

    Raises
    ------
    Unfit
        If there is no kernel, or the parameters are not what the grid takes.
    """
    name, params = layout.grid.name, dict(layout.grid.params)
    extra = set(DOUBLED) if name == "hif4" else set()
    found = {m.name for _, m, _ in layout.members()}
    _check(not layout.streams and {"codes", "scale"} | extra <= found <= PARTS | extra)
    part = layout.fit(layout.block["rows"], layout.block["cols"]).parts["codes"]
    _check(name in PARAMETERS and set(params) == PARAMETERS[name])
    inner = 1 if name in ("base3", "quads_in_fives") else 0
    _check(len(layout.axes) == 2 + inner and layout.axes[1].per == (4 if name == "quads" else 1))
    if name in ("quads", "quads_in_fives"):
        return _quads(part.dtype, part.bits, params["stride"], np.array(params["values"]), name)
    _check(part.bits <= 8)
    blocks, way = _blocks(), "times"
    if name in ("affine", "quotient", "base3"):
        zero = F32(params.get("zero", 1))
        _check(part.dtype in ("u1", "i1"))
        codes = np.arange(1 << part.bits, dtype=np.uint8).view(part.dtype)
        values, way = codes.astype(F32) - zero, "divides" if name == "quotient" else "times"
        if name == "base3":
            _check(part.dtype == "u1")
            runs = params["runs"]
            _check(all(type(n) is int and type(d) is int and n > 0 and 1 <= d <= 5 for n, d in runs))
            _check(sum(n * d for n, d in runs) == params["block"] == part.share[1])
            _check(sum(n for n, _ in runs) == part.shape[2] and params["first"] in ("high", "low"))
            values = np.arange(-1, 2).astype(F32)
    elif name == "plane_digits":
        _check(part.dtype == "u1" and part.bits <= 4)
        codes = np.arange(1 << part.bits)
        values = np.stack([codes // 3 ** (planes - 1 - p) % 3 - 1 for p in range(planes)]).astype(F32)
        way = "digits"
    elif name == "either":
        _check(part.dtype == "u1")
        values = np.stack([minifloat.numbers(params[which])[: 1 << part.bits] for which in ("element", "other")])
        way = "which"
    elif name in ("scaled", "hif4"):
        _check(dtype_of(part.dtype).itemsize == 1)
        values = minifloat.numbers(params["element"])
    else:
        _check(part.dtype == "u1")  # a negative code is no place in a table
        found_values = np.array(params["values"])
        _check(found_values.dtype.kind in "if")
        values = np.array(params["values"], F32)
    _check(values.ndim == (2 if way in ("digits", "which") else 1))
    _check(values.shape[-1] >= 1 << part.bits or name == "base3")
    numbers = blocks.numbers_of(values[..., : 1 << part.bits])
    _check(way in ("times", "which") or numbers.kind == blocks.LOOKED_UP)

    def finishes(cols: int, groups: int) -> bool:
        return bool(blocks.finishes(numbers, way, planes, cols, cols * planes // groups))

    def write(records: Bytes, places: Places, scale: Floats, out: Array, **options: Any) -> bool:
        return bool(blocks.decode(records, places, scale, out, numbers, way, planes, **options))

    return Formula(write, finishes, planes)


def _quads(dtype: str, bits: int, stride: Any, values: Array, name: str) -> Formula:
    """The formula of codes that stand for four weights."""
    _check(type(stride) is int and stride > 0 and values.dtype.kind == "i" and values.shape[1:] == (4,))
    _check(len(values) <= 81 and values.min() >= -1 and values.max() <= 1)
    fives = name == "quads_in_fives"
    _check((dtype == "<u2" and len(values) >= 32) if fives else (dtype == "u1" and len(values) >= 1 << bits))
    blocks, steps = _blocks(), values[: 32 if fives else 1 << bits].astype(F32)

    def finishes(cols: int, groups: int) -> bool:
        return bool(blocks.finishes_quads(len(steps), stride, cols // groups))

    def write(records: Bytes, places: Places, scale: Floats, out: Array, **options: Any) -> None:
        blocks.quads(records, places, scale, out, steps, stride, **options)

    return Formula(write, finishes, 1, 4 * stride)


def _hadamard(weights: Floats, size: int) -> None:
    from packfmt.kernels import hadamard

    hadamard.transform(weights, size)


def _blocks() -> ModuleType:
    from packfmt.kernels import blocks

    return blocks
