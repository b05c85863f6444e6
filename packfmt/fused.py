"""Decode in one pass, for the many layouts that are simple enough.

`grids.decode` makes an array of every part and computes on those. Here a kernel reads a row's codes
and writes its numbers, by the same formula and to the same bits. Which kernel, and the tables that tell
it where the codes lie, follow from the layout's structure, never from its name: so it also serves
layouts that a file brings with it. What does not fit goes the general way.

Fits: codes lie in cells of one component, row by row and block by block, as fields within a byte or one after the
other, as bytes, base-3 bytes or quads; scales are whole numbers in such cells, of any float dtype, or codes of a
number format, and may be shared by rows; one number may scale the whole tensor.
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

from packfmt import grids, minifloat
from packfmt.errors import LayoutError
from packfmt.layout import REST, TOP, Codes, Digit, Layout, Member, Values, dtype_of
from packfmt.placement import Array, Arrays

if TYPE_CHECKING:
    from packfmt.kernels.blocks import Places

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Decoder = Callable[[tuple[int, int], Arrays, Array, bool], bool]  # shape, components, out, through
Formula = Callable[..., Any]  # records, places, scale, out -> False if it cannot tell
Scales = Callable[[int, int], Floats]  # first row, end -> (rows or 1, groups)

LEAST_WEIGHTS: Final = 1 << 19  # worth a thread: a tenth of a millisecond
STRIP: Final = 1 << 18  # weights computed at a time, in the cache
LEAST_THROUGH: Final = 1 << 23  # bytes of weights that would not stay in the cache, and are written past it
MOST_CODES: Final = 1 << 12  # of a cell
FEW_CODES: Final = 256  # cells of fewer are read several at a time
PARAMETERS: Final = {
    "affine": {"zero"},
    "levels": {"values"},
    "table": {"values", "exponent"},
    "scaled": {"element", "scale", "global_scale"},
    "quads": {"stride", "values"},
    "base3": {"block", "runs", "first"},
}
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
    through = out is not None and out.nbytes >= LEAST_THROUGH
    if run := decoder(layout):
        target = np.empty(shape, F32) if out is None else out
        if run(shape, components, target.view(np.uint16) if narrow else target, through):
            return target
    weights = grids.decode(layout, shape, components)
    if out is None:
        return weights
    if narrow:
        _round(weights, out.view(np.uint16), through)
    else:
        out[:] = weights
    return out


def _round(weights: Floats, out: Array, through: bool) -> None:
    """Float32 to the bits of bfloat16, on all threads."""
    from packfmt.kernels import threads

    def work(start: int, stop: int) -> None:
        _blocks().round_to_bfloat(weights[start:stop], out[start:stop], through)

    if out.size:
        threads.spread(work, len(out), -(-LEAST_WEIGHTS // out.shape[1]))


@lru_cache(maxsize=256)
def decoder(layout: Layout) -> Decoder | None:
    """What writes the numbers of a tensor of this layout; None if no kernel fits.

    run(shape, components, out, through) -> whether it did: not if the tensor is empty, a component is not what
    the layout says, or it cannot tell which bits a NaN has. `out` is C-contiguous (rows, cols) float32, or uint16, the
    bits of bfloat16; `through` writes it past the cache, which pays where it is large, and its pages have been
    touched before.
    """
    try:
        codes, scale, whole = _cells(layout, "codes"), _cells(layout, "scale"), _whole(layout)
        _check(codes.cols and codes.rows == codes.share == 1)
        formula, direct = _formula(layout, scale.cols // scale.count or codes.cols)
        numbers = _numbers(layout, scale)
        _places(layout, codes, 1)
    except (Unfit, KeyError, TypeError, ValueError, OverflowError):
        return None
    # hashing a layout takes longer than decoding a small tensor, so this is remembered here
    places_of = lru_cache(maxsize=64)(lambda cells: _places(layout, codes, _together(cells, codes)))
    described = lru_cache(maxsize=64)(partial(_described, layout))

    def run(shape: tuple[int, int], components: Arrays, out: Array, through: bool = False) -> bool:
        from packfmt.kernels import threads

        rows, cols = shape
        wanted = described(shape)
        if not rows or not cols or any(_shape_dtype(components.get(name)) != w for name, w in wanted.items()):
            return False
        factor = F32(1)
        if whole:
            (factor,) = components[whole].reshape(-1).astype(F32)
        # the last cell or scale is cut off at the edge; or which NaN survives is the processor's choice
        if cols % codes.cols or (scale.cols and cols % scale.cols) or np.isnan(factor):
            return False
        records = _rows(components[codes.component], rows)
        places = places_of(records.shape[1] // codes.nbytes)
        scales = numbers(components[scale.component], rows, factor)
        unclear: list[int] = []
        options, step, group = {}, max(1, STRIP // cols), scale.cols // scale.count or cols
        if through and out.dtype == F32 and direct and not layout.hadamard and _blocks().fits_through(out, group):
            options, through, step = {"through": True}, False, 4 * step

        def strip(start: int, stop: int, target: Floats) -> None:
            if formula(records[start:stop], places, scales(start, stop), target, **options) is False:
                unclear.append(start)
            if layout.hadamard:
                _hadamard(target, layout.hadamard)

        threads.spread(partial(_by_strips, strip, out, step, through), rows, -(-LEAST_WEIGHTS // cols))
        return not unclear

    return run


def _by_strips(
    strip: Callable[[int, int, Floats], None], out: Array, step: int, through: bool, start: int, stop: int
) -> None:
    """Compute rows a strip at a time, which stays in the cache until it is done."""
    narrow = out.dtype != F32
    room = np.empty((min(step, stop - start), out.shape[1]), F32) if through or narrow else out[:0]
    for first in range(start, stop, step):
        end = min(stop, first + step)
        mine = room[: end - first] if len(room) else out[first:end]
        strip(first, end, mine)
        if narrow:
            _blocks().round_to_bfloat(mine, out[first:end], through)
        elif through:
            _blocks().write_through(mine, out[first:end])


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
    found = {m.name for _, m, _ in layout.members()} - {"global_scale"}
    _check(not layout.streams and found == {"codes", "scale"})
    _check(
        [a.of for a in layout.axes[:2]] == ["rows", "cols"] and all(a.per == 1 or a.of == "cols" for a in layout.axes)
    )
    _check(all(a.pad == 1 and not a.plus for a in layout.axes) and layout.block["rows"] == 1)
    (home,) = {c.name: c for c, m, _ in layout.members() if m.name == part}.values()
    fitted = layout.fit(1, layout.block["cols"])
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


# ---------------------------------------------------------------- numbers


def _rows(array: npt.NDArray[Any], rows: int) -> Bytes:
    """The bytes of a component, a row each."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(rows, -1)


def _whole(layout: Layout) -> str:
    """The component that holds one scale for the whole tensor; empty if there is none."""
    homes = [(c, m) for c, m, _ in layout.members() if m.name == "global_scale"]
    how = layout.grid["global_scale"] if layout.grid.name == "scaled" else ""
    _check(how in GLOBAL if homes else how == "")
    if not homes:
        return ""
    ((home, member),) = homes
    _check(not home.over and len(home.cell) == 1 and isinstance(member, Values) and not member.digits)
    return home.name


def _numbers(layout: Layout, cells: Cells) -> Callable[[npt.NDArray[Any], int, F32], Scales]:
    """What gives the scales of a component, and of the whole tensor: (array, rows, whole) -> the scales of rows."""
    (m,) = cells.members
    dtype = dtype_of(layout.fit(1, layout.block["cols"]).parts["scale"].dtype)
    size, at = dtype.itemsize, _addresses(cells, m)
    _check(m.bits == 8 * size and m.low == 0 and at[0] % 8 == 0 and (np.diff(at) == m.bits).all())
    raw, offset = np.dtype(f"<u{size}"), int(at[0]) // 8
    table = _table(layout, dtype)
    combine = GLOBAL.get(dict(layout.grid.params).get("global_scale", ""))

    def numbers(array: npt.NDArray[Any], rows: int, whole: F32) -> Scales:
        stored = _rows(array, -(-rows // cells.rows) if cells.rows else 1)
        shape, strides = (stored.shape[1] // cells.nbytes, cells.count), (cells.nbytes, size)
        values = table
        if combine and values is not None:
            with np.errstate(all="ignore"):
                values = combine(values, whole)

        def few(mine: Bytes) -> Floats:
            if values is not None:
                return _blocks().look_up(mine, cells.nbytes, offset, cells.count, values)  # type: ignore[no-any-return]
            found = np.ndarray((len(mine), *shape), raw, mine, offset, (mine.shape[1], *strides))
            flat = np.ascontiguousarray(found).reshape(len(mine), -1)
            with np.errstate(all="ignore"):
                scales = flat.view(dtype).astype(F32)
                return combine(scales, whole) if combine else scales

        def by_row(start: int, stop: int) -> Floats:
            if not cells.rows:
                return few(stored)
            first = start // cells.rows
            found = few(stored[first : -(-stop // cells.rows)])
            return found if cells.rows == 1 else found[np.arange(start, stop) // cells.rows - first]

        return by_row

    return numbers


def _table(layout: Layout, dtype: np.dtype[Any]) -> Floats | None:
    """The numbers of scales of one byte; None if they have more."""
    if layout.grid.name == "table":
        _check(dtype == np.uint8)
        with np.errstate(over="ignore"):
            return np.ldexp(F32(1), np.arange(256, dtype=np.int32) - layout.grid["exponent"])  # type: ignore[no-any-return]
    if layout.grid.name == "scaled" and layout.grid["scale"]:
        found = minifloat.numbers(layout.grid["scale"])
        _check(dtype == np.uint8 and len(found) == 256)
        return found
    return np.arange(256, dtype=np.uint8).view(dtype).astype(F32) if dtype.itemsize == 1 else None


def _formula(layout: Layout, group: int) -> tuple[Formula, bool]:
    """The kernel of the layout's grid, and whether it has a way past the cache of its own.

    group : what the columns that share a scale are a multiple of

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
        _check(part.dtype in ("u1", "i1"))
        if name == "base3":
            _check(part.dtype == "u1")
            runs = params["runs"]
            _check(all(type(n) is int and type(d) is int and n > 0 and 1 <= d <= 5 for n, d in runs))
            _check(sum(n * d for n, d in runs) == params["block"] == part.share[1])
            _check(sum(n for n, _ in runs) == part.shape[2] and params["first"] in ("high", "low"))
        return lambda *args: _blocks().affine(*args, zero, part.dtype), False
    if name == "scaled":
        _check(dtype_of(part.dtype).itemsize == 1)
        values = minifloat.numbers(params["element"])
    else:
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
        return lambda *args: _blocks().quads(*args, values.astype(F32), stride), False
    _check(values.ndim == 1)
    numbers = np.array(values if name == "scaled" else params["values"], F32)[: 1 << part.bits]  # as the grid does
    how, unit = _blocks().arithmetic(numbers), _blocks().unit_of(numbers)
    _check(how is not None or not np.isnan(numbers).any())
    return lambda *args, **options: _blocks().levels(*args, numbers, how, unit, **options), how is not None


def _hadamard(weights: Floats, size: int) -> None:
    from packfmt.kernels import hadamard

    hadamard.transform(weights, size)


def _blocks() -> ModuleType:
    from packfmt.kernels import blocks

    return blocks
