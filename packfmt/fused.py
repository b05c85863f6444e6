"""Decode in one pass, for the many layouts that are simple enough.

`grids.decode` makes an array of every part and computes on those. Here a kernel reads a row's codes
and writes its numbers, by the same formula and to the same bits. Which kernel, and the tables that tell
it where the codes lie, follow from the layout's structure, never from its name: so it also serves
layouts that a file brings with it. What does not fit goes the general way.

Fits: codes lie in cells of one component, row by row and block by block, as fields within a byte, base-3
bytes or quads; scales are whole numbers in such cells, of any float dtype, or E8M0 exponents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from packfmt import grids
from packfmt.errors import LayoutError
from packfmt.layout import REST, TOP, Codes, Digit, Layout, Member, Values, dtype_of
from packfmt.placement import Arrays

if TYPE_CHECKING:
    from packfmt.kernels.blocks import Places

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Decoder = Callable[[tuple[int, int], Arrays, Floats], bool]
Formula = Callable[[Bytes, "Places", Floats, Floats], None]  # records, places, scale, out

LEAST_WEIGHTS: Final = 1 << 19  # worth a thread: a tenth of a millisecond
MOST_CODES: Final = 1 << 12  # of a cell
FEW_CODES: Final = 256  # cells of fewer are read several at a time
PARAMETERS: Final = {
    "affine": {"zero"},
    "levels": {"values"},
    "table": {"values", "exponent"},
    "quads": {"stride", "values"},
    "base3": {"block", "runs", "first"},
}
EIGHTS: Final = (1, 2, 4)  # bits of fields that the kernel spreads eight at a time


def decode(layout: Layout, shape: tuple[int, int], components: Arrays, out: Floats | None = None) -> Floats:
    """Components -> (rows, cols) float32, as `grids.decode` gives it, bit for bit.

    out : C-contiguous (rows, cols) float32 to write to, instead of a new array

    Raises
    ------
    LayoutError
        If a component is not what the layout says, its grid does not fit its parts, or `out` is
        another array than this.
    """
    if out is not None and (out.shape != shape or out.dtype != F32 or not out.flags.carray):
        raise LayoutError(f"out is {out.dtype} {out.shape}, needs a writable C-contiguous float32 {shape}")
    if run := decoder(layout):
        target = np.empty(shape, F32) if out is None else out
        if run(shape, components, target):
            return target
    weights = grids.decode(layout, shape, components)
    if out is None:
        return weights
    out[:] = weights
    return out


@lru_cache(maxsize=256)
def decoder(layout: Layout) -> Decoder | None:
    """What writes the numbers of a tensor of this layout; None if no kernel fits.

    run(shape, components, out) -> whether it did: not if the tensor is empty, or a component is not what
    the layout says. `out` is C-contiguous (rows, cols) float32.
    """
    try:
        codes, scale = _cells(layout, "codes"), _cells(layout, "scale")
        _check(codes.cols and codes.share == 1)
        formula = _formula(layout, scale.cols // scale.count or codes.cols)
        numbers = _numbers(layout, scale)
        _places(layout, codes, 1)
    except (Unfit, KeyError, TypeError, ValueError, OverflowError):
        return None
    # hashing a layout takes longer than decoding a small tensor, so this is remembered here
    places_of = lru_cache(maxsize=64)(partial(_places, layout, codes))
    described = lru_cache(maxsize=64)(partial(_described, layout))

    def run(shape: tuple[int, int], components: Arrays, out: Floats) -> bool:
        from packfmt.kernels import threads

        rows, cols = shape
        wanted = described(shape)
        if not rows or not cols or any(_shape_dtype(components.get(name)) != w for name, w in wanted.items()):
            return False
        records = _rows(components[codes.component], rows)
        places = places_of(_together(records.shape[1] // codes.nbytes, codes))
        scales = numbers(components[scale.component], rows)

        def work(start: int, stop: int) -> None:
            formula(records[start:stop], places, scales(start, stop), out[start:stop])

        threads.spread(work, rows, -(-LEAST_WEIGHTS // cols))
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


@dataclass(frozen=True, slots=True)
class Cells:
    """Where a part lies: in equal cells of one component, row by row, and block by block within a row."""

    component: str
    per_row: bool  # else one row of cells serves all
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
    """The cells of a part; only what is the same for every shape passes.

    Raises
    ------
    Unfit
        If the part lies in any other way.
    """
    _check(not layout.streams and {m.name for _, m, _ in layout.members()} == {"codes", "scale"})
    _check(layout.axes[0].of == "rows" and all(a.per == 1 or a.of == "cols" for a in layout.axes))
    _check(all(a.pad == 1 for a in layout.axes) and layout.block["rows"] == 1)
    (home,) = {c.name: c for c, m, _ in layout.members() if m.name == part}.values()
    fitted = layout.fit(1, layout.block["cols"])
    placed = next(c for c in fitted.components if c.name == home.name)
    members = tuple(m for m in placed.members if m.part == part)
    _check(all(d.size != REST and d.stride != TOP for m in home.cell for d in _inside(m)))
    rows, name = layout.axes[0].name, layout.axes[1].name
    over = {d.axis: d for d in home.over}
    _check(list(over) in ([], [rows], [rows, name]) and len(over) == len(home.over))
    _check(all(d.size == REST and not d.reverse for d in home.over))
    _check(rows not in over or over[rows].stride == 1)
    step = over[name].stride if name in over else 0
    _check(step or (name not in over and all(d.size == 1 for m in members for d in (*m.units, *m.fields))))
    share = fitted.parts[part].share
    _check(share[0] == 1 or not over)
    axis, count, each = name, max(1, step // max(1, share[1])), share[1]
    if len(layout.axes) == 3 and fitted.parts[part].shape[2] > 1:  # bytes of a block
        _check(step and share[1] == step and not layout.axes[2].of)
        axis, count, each = layout.axes[2].name, layout.axes[2].size, share[2]
    _check(count <= MOST_CODES)
    columns = step * layout.axes[1].per
    return Cells(home.name, bool(over), columns, placed.cell_bytes, count, each, axis, members)


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
        If codes are wider than a byte, or cross bytes, or lie in no order to speak of.
    """
    from packfmt.kernels.blocks import Places

    runs: list[tuple[int, ...]] = []
    eights: list[tuple[int, ...]] = []
    digits: list[tuple[int, ...]] = []
    powers = [1, 3, 9, 27, 81]
    count = cells.count * together
    for m in sorted(cells.members, key=lambda m: m.low):
        at = _addresses(cells, m)
        at = (at + 8 * cells.nbytes * np.arange(together)[:, None]).reshape(-1)
        _check(m.low + m.bits <= 8 and (at % 8 + m.bits <= 8).all())
        if layout.grid.name == "base3":
            _check(m.bits == 8 and (np.diff(at) == 8).all())
            byte, code = int(at[0]) // 8, 0
            for n, each in layout.grid["runs"]:
                digits.append((byte, n, each, code))
                byte, code = byte + n, code + n * each
            count = code
            powers = powers if layout.grid["first"] == "high" else powers[::-1]
        elif not runs and _side_by_side(at, m.bits):  # for the kernel reads eights before runs
            eights.append((int(at[0]) // 8, count // 8, m.bits, 0, m.low))
        else:
            runs += [(*run, m.low) for run in _runs(at, m.bits)]
            _check(len(runs) <= max(16, count // 2))
    return Places(
        cells.nbytes * together,
        count,
        np.array(runs, np.int64).reshape(-1, 7),
        np.array(eights, np.int64).reshape(-1, 5),
        np.array(digits, np.int64).reshape(-1, 4),
        np.array(powers, np.uint8),
    )


def _side_by_side(at: Ints, bits: int) -> bool:
    """Whether whole eights of fields follow each other from a byte's first bit on."""
    return bits in EIGHTS and len(at) % 8 == 0 and at[0] % 8 == 0 and bool((np.diff(at) == bits).all())


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


# ---------------------------------------------------------------- numbers


def _rows(array: npt.NDArray[Any], rows: int) -> Bytes:
    """The bytes of a component, a row each."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(rows, -1)


def _numbers(layout: Layout, cells: Cells) -> Callable[[npt.NDArray[Any], int], Callable[[int, int], Floats]]:
    """What gives the scales of a component: (array, rows) -> (first row, end) -> (rows or 1, groups) float32."""
    (m,) = cells.members
    dtype = dtype_of(layout.fit(1, layout.block["cols"]).parts["scale"].dtype)
    size, at = dtype.itemsize, _addresses(cells, m)
    _check(m.bits == 8 * size and m.low == 0 and at[0] % 8 == 0 and (np.diff(at) == m.bits).all())
    raw, offset = np.dtype(f"<u{size}"), int(at[0]) // 8
    powers: Floats | None = None
    if layout.grid.name == "table":
        _check(dtype == np.uint8)
        with np.errstate(over="ignore"):
            powers = np.ldexp(F32(1), np.arange(256, dtype=np.int32) - layout.grid["exponent"])

    def numbers(array: npt.NDArray[Any], rows: int) -> Callable[[int, int], Floats]:
        stored = _rows(array, rows if cells.per_row else 1)
        count = stored.shape[1] // cells.nbytes
        shape, strides = (len(stored), count, cells.count), (stored.shape[1], cells.nbytes, size)
        found = np.ndarray(shape, raw, stored, offset, strides)

        def by_row(start: int, stop: int) -> Floats:
            mine = np.ascontiguousarray(found[start:stop] if cells.per_row else found)
            flat = mine.reshape(len(mine), -1)
            with np.errstate(over="ignore"):
                return flat.view(dtype).astype(F32) if powers is None else powers[flat]

        return by_row

    return numbers


def _formula(layout: Layout, group: int) -> Formula:
    """The kernel of the layout's grid. group : what the columns that share a scale are a multiple of

    Raises
    ------
    Unfit
        If there is none, or the parameters are not what the grid takes.
    """
    name, params = layout.grid.name, dict(layout.grid.params)
    part = layout.fit(1, layout.block["cols"]).parts["codes"]
    _check(name in PARAMETERS and set(params) == PARAMETERS[name] and part.bits <= 8)
    _check(len(layout.axes) == 2 + (name == "base3") and layout.axes[1].per == (4 if name == "quads" else 1))
    if name in ("affine", "base3"):
        zero = float(F32(params.get("zero", 1)))
        if name == "base3":
            _check(part.dtype == "u1")
            runs = params["runs"]
            _check(all(type(n) is int and type(d) is int and n > 0 and 1 <= d <= 5 for n, d in runs))
            _check(sum(n * d for n, d in runs) == params["block"] == part.share[1])
            _check(sum(n for n, _ in runs) == part.shape[2] and params["first"] in ("high", "low"))
        return lambda *args: _blocks().affine(*args, zero, part.dtype)
    _check(part.dtype == "u1")  # a negative code is no place in a table
    values = np.array(params["values"])
    _check(values.dtype.kind in "if" and len(values) >= 1 << part.bits)
    if name == "quads":
        stride = params["stride"]
        _check(
            values.dtype.kind == "i"
            and values.shape[1:] == (4,)
            and len(values) <= 81
            and values.min() >= -1
            and values.max() <= 1
        )
        _check(type(stride) is int and stride > 0 and group % (4 * stride) == 0)
        return lambda *args: _blocks().quads(*args, values.astype(F32), stride)
    _check(values.ndim == 1)
    numbers = np.array(params["values"], F32)  # as the grid does
    return lambda *args: _blocks().levels(*args, numbers)


def _blocks() -> ModuleType:
    from packfmt.kernels import blocks

    return blocks
