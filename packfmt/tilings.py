"""Run-time tilings: the layout that a packed tensor is moved into for products, described as all layouts are.

Sixteen rows lie interleaved, four bytes of each, so that a vector of 64 bytes holds a dword of every row and a
processor's lanes are rows. Codes, scales and zero points are components of their own, which keeps vectors of codes
aligned. Which columns a dword holds is whatever the storage layout had in its bytes: activations are brought into
that order instead, once a product. So most weights only have their dwords moved, and a tiling's codes, grid and
scales are those of the layout that it came from.

A tiling is recognised by its structure, never by its name: what a file brings is as good as what is made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, lcm, prod
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import minifloat
from packfmt.errors import LayoutError
from packfmt.layout import (
    BIT,
    ROWS,
    TOP,
    WORD,
    Axis,
    Codes,
    Component,
    Digit,
    Grid,
    Layout,
    Values,
    dtype_of,
    grid,
    rows,
)  # fmt: skip
from packfmt.meaning import BESIDE, BLOCK, SHIFTS, Meaning, Shape, meaning

LANES: Final = 16  # rows of a tile
LOOKED_UP: Final = 32  # rows of a tile whose codes a kernel looks up instead of decoding them
CHUNK: Final = 32  # columns that a vector of one-bit codes holds
QUADS: Final = 32  # that five dwords hold
SUFFIXES: Final = {"": "_tile16", "words": "_words32", "nibbles": "_nibbles32"}  # of each form of tiling
WIDTHS: Final = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (8,), 8: (8,)}  # of a code's bits
CODES: Final = ("codes", "codes_high")  # components of the low and high bits of a code
SCALES: Final = {"<f4": "f32", "<f2": "f16", "bfloat16": "bf16", "float8_e4m3fn": "e4m3", "float8_e8m0fnu": "e8m0"}
NAMED: Final = {"float8_e4m3fn": "e4m3", "float8_e8m0fnu": "e8m0", "ufloat7_e4m3": "ue4m3"}  # of bytes
SHARED: Final = frozenset({"scale", "global_scale", "zero"})  # parts of which a block of a row has one number
MOST_TABLE: Final = 127  # that a step and its bias may be together, in one byte
TRITS: Final = (-1, 0, 1, 2)

Ints = npt.NDArray[np.int32]
Table = npt.NDArray[np.uint8]


class How(NamedTuple):
    """What a kernel is compiled for: the fields of `kernels.tile_products.Tiling`."""

    widths: tuple[int, ...]
    codes: str
    block: int
    planes: int
    zero: bool
    scale: str
    per_row: bool
    whole: str
    reciprocal: bool


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """The tiling of a layout, for one shape.

    order : (stored columns with padding,) int32: the column, as the storage layout numbers them, that each
        activation a kernel reads belongs to; -1 where there is none
    table : (128,) uint8, what the kernel looks codes up in
    bias : what the looked-up numbers have in excess of steps
    exponent, nan : of scales that are powers of two: the byte that is one, and whether 255 is no number
    run : steps along the codes' columns after which their order repeats
    added : what is added to a step to make a code, where the tile spells steps anew; else None
    form : of what is looked up; else empty
    """

    layout: Layout
    how: How
    order: Ints
    table: Table
    bias: int
    exponent: int
    nan: bool
    unit: float
    run: int
    added: int | None
    form: str

    @property
    def lanes(self) -> int:
        """Rows side by side."""
        return LOOKED_UP if self.form else LANES


def base(name: str) -> str:
    """The name of the layout that a tiling is called after."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES.values() if name.endswith(suffix)), name)


def same(layout: Layout, tiled: Layout) -> bool:
    """Whether a layout is a tiling already, whatever it is called."""
    return (layout.components, layout.grid, layout.axes) == (tiled.components, tiled.grid, tiled.axes)


@lru_cache(maxsize=256)
def tile(layout: Layout, shape: Shape, form: str = "") -> Tile | None:
    """The tiling of a layout; None if it has no whole steps, or none that a tile of this form can hold.

    form : "", or what holds quads for kernels that look them up (`kernels.lookup_products`): "words", "nibbles"
    """
    of = meaning(layout, shape)
    if of is None or (of.group > BLOCK and of.group % BLOCK) or (of.group and of.cols % of.group):
        return None
    if not _scales_fit(layout, shape):
        return None
    held = _quads(layout, shape, of, form) or (None if form else _codes(layout, shape, of))
    if held is None:
        return None
    scale = _scale(layout, shape, held.grid)
    others = _others(layout, shape, of, held, scale)
    if others is None:
        return None
    name = base(layout.name) + SUFFIXES[form]
    made = Layout(
        name, (*held.components(), *others), scale.grid, held.padded(bool(of.group)),
        f"{base(layout.name)} for products: {held.lanes} rows side by side", hadamard=layout.hadamard,
    )  # fmt: skip
    try:
        stored = made.fit(*shape).extents[held.axis]
    except LayoutError:  # a description from a file may fit its shape, and none with padding
        return None
    order = (np.arange(0, stored, held.steps, dtype=np.int32)[:, None] * held.per + held.columns).reshape(-1)
    order[order >= of.cols] = -1
    order.flags.writeable = False
    params = dict(layout.grid.params)
    how = How(
        held.widths, held.kind, _block(of), of.planes, layout.grid.name == "affine_zero", scale.kind, not of.group,
        str(params.get("global_scale", "")), layout.grid.name == "quotient",
    )  # fmt: skip
    exponent, nan = (params["exponent"], False) if layout.grid.name == "table" else (127, True)
    found = held.table, held.bias, exponent, nan, of.unit, held.steps, held.added, form
    return Tile(made, how, order, *found)


def _block(of: Meaning) -> int:
    """Columns of a dot."""
    return of.group if 0 < of.group < BLOCK else BLOCK


# ---------------------------------------------------------------- codes


class Run(NamedTuple):
    """A row's codes in the bytes of one run of columns: which digits count dwords, their bytes, and fields."""

    dwords: tuple[Digit, ...]
    bytes: tuple[Digit, ...]
    fields: tuple[Digit, ...]

    def columns(self) -> Ints:
        """The column of each activation that a kernel reads: dword by dword, field by field, byte by byte."""
        dwords, bytes_, fields = (_places(digits) for digits in self)
        return (dwords[:, None, None] + fields[:, None] + bytes_).reshape(-1)


def _places(digits: tuple[Digit, ...]) -> Ints:
    out = np.zeros(1, np.int32)
    for d in digits:
        turn = np.arange(d.size, dtype=np.int32)
        out = (out[:, None] + np.int32(d.stride) * (d.size - 1 - turn if d.reverse else turn)).reshape(-1)
    return out.astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """How a tile holds codes.

    lanes : rows side by side
    runs : one for each of `widths`; none of quads
    steps : along `axis` after which the order of columns repeats, `per` columns each
    columns : their columns in the order in which a kernel reads activations
    dtype : of the codes, "u1" or "i1"
    """

    widths: tuple[int, ...]
    kind: str
    axis: str
    axes: tuple[Axis, ...]
    grid: Grid
    runs: tuple[Run, ...]
    steps: int
    columns: Ints
    table: Table
    bias: int
    bits: int
    per: int = 1
    dtype: str = "u1"
    levels: int = 0
    added: int | None = None
    lanes: int = LANES

    def padded(self, whole: bool) -> tuple[Axis, ...]:
        """The axes with rows filled up, and columns, too, unless whole groups of them fill runs anyway."""
        pads = {a.name: self.lanes for a in self.axes if a.of == "rows"}
        pads[self.axis] = 1 if whole else self.steps
        return tuple(replace(a, pad=pads.get(a.name, a.pad)) for a in self.axes)

    def components(self) -> Iterator[Component]:
        if self.runs:
            yield from self._fields()
        elif self.kind == "nibbles":
            pieces = (rows(LOOKED_UP), Digit(self.axis, 8))
            spread = (rows(1, LANES), rows(LANES, 2))  # lanes of 16 bits have a row in each byte
            low = Codes("codes", 4, (Digit(self.axis, 2, 4), *spread), (Digit(self.axis, 1, 2),))
            yield Component(CODES[0], pieces, (low,))
            yield Component(CODES[1], pieces, (Codes("codes", 1, spread, (Digit(self.axis, 1, 8),), low=4),))
        else:
            quads, word = (16, "<u2") if self.kind == "words" else (QUADS, "<u4")
            over = (rows(self.lanes), Digit(self.axis, quads), Digit(WORD), rows(1, self.lanes))
            yield Component(CODES[0], over, (Codes("codes", 5, (), (Digit(self.axis, 1, quads),), word),))

    def _fields(self) -> Iterator[Component]:
        lanes = rows(1, self.lanes)
        low = 0
        for name, width, run in zip(CODES, self.widths, self.runs, strict=False):
            over = (rows(LANES), Digit(self.axis, self.steps), *_planes(self.axes), *run.dwords, lanes)
            if self.dtype == "i1":
                yield Component(name, over, (Values("codes", "i1", run.bytes),))
            else:
                bits = min(width, self.bits - low)
                member = Codes("codes", bits, run.bytes, run.fields, low=low, levels=self.levels)
                yield Component(name, over, (member,))
            low += width


def _planes(axes: tuple[Axis, ...]) -> tuple[Digit, ...]:
    """The digit that counts planes, if there are any."""
    return tuple(Digit(a.name) for a in axes if not a.of and a.name == axes[1].name)


def _quads(layout: Layout, shape: Shape, of: Meaning, form: str) -> Held | None:
    """Codes of four weights: a stream of five bits each, or apart for a look-up."""
    run = {"": QUADS, "words": 16, "nibbles": 8}[form]
    bits = {"quads": 5, "quads_in_fives": 16}.get(layout.grid.name, 0)
    if layout.fit(*shape).parts["codes"].bits > bits or _block(of) % (4 * run):
        return None
    stride, values = layout.grid["stride"], np.array(layout.grid["values"])
    if type(stride) is not int or stride < 1 or values.shape != (32, 4) or np.abs(values).max() > 1:
        return None
    run = max(run, stride)
    if run % stride or _block(of) % (4 * run):
        return None
    chunk = np.arange(4 * stride, dtype=np.int32).reshape(4, stride).T.reshape(-1)
    columns = (np.arange(0, 4 * run, 4 * stride, dtype=np.int32)[:, None] + chunk).reshape(-1)
    first, *rest = layout.axes
    quads = Axis("quads", "cols", 4)
    others = tuple(a for a in rest if a.name != quads.name and _met(layout, a.name))
    return Held(
        (5,), form or "quads", quads.name, (first, quads, *others),
        grid("quads", stride=stride, values=layout.grid["values"]), (), run, columns,
        (values + 1).astype(np.uint8).reshape(-1), 1, 5, per=4, lanes=LOOKED_UP if form else LANES,
    )  # fmt: skip


def _met(layout: Layout, axis: str) -> bool:
    """Whether a part that stands beside the codes has this axis."""
    return any(d.axis == axis for _, m, digits in layout.members() if m.name in BESIDE for d in digits)


def _codes(layout: Layout, shape: Shape, of: Meaning) -> Held | None:
    """One code a weight: as the layout has it, or steps spelled so."""
    parts = layout.fit(*shape).parts
    part = parts["codes"]
    name, steps, bits, dtype, levels = layout.grid.name, of.steps, part.bits, part.dtype, part.levels
    axes, spelled, added = layout.axes, layout.grid, None
    if name == "hif4":  # two more bits of a code, each of which doubles its number
        numbers = minifloat.numbers(layout.grid["element"])
        if len(numbers) != 1 << bits or any(parts[shift].bits > 1 for shift in SHIFTS):
            return None
        every = np.concatenate([numbers, 2 * numbers, 2 * numbers, 4 * numbers])
        spelled, bits, levels = grid("levels", values=tuple(every.tolist())), bits + len(SHIFTS), 0
        steps = tuple((every / np.float32(of.unit)).astype(int).tolist())
    elif name == "affine_zero":
        zero = parts["zero"]
        if zero.dtype != "u1" or dtype != "u1" or zero.share != parts["scale"].share:
            return None
        steps = tuple(range(1 << bits))
    elif not steps:
        steps, bits, dtype, levels = TRITS, 2, "u1", 3
        planes = axes[1:2] if name.startswith("plane") else ()
        beside = tuple(a for a in axes[1:] if a.of and a.name != "cols" and _met(layout, a.name))
        axes = (ROWS, *planes, Axis("cols", "cols"), *beside)
        spelled, added = grid("planes", zero=1, ratio=0) if planes else grid("affine", zero=1), 1
    elif name == "planes":
        spelled = grid("planes", zero=layout.grid["zero"], ratio=0)
    if bits not in WIDTHS or len(steps) != 1 << bits or dtype not in ("u1", "i1"):
        return None
    if (found := _looked_up(steps, bits)) is None:
        return None
    widths = WIDTHS[bits]
    chunk = CHUNK // min(widths)
    if _block(of) % chunk:
        return None
    axis = next(a.name for a in axes if a.of == "cols")
    # A run of a row that has one scale is as short as can be, for the last is padded; one of planes is a block.
    short = not of.group and of.planes == 1
    period = chunk if short else _block(of)
    stored = _as_stored(layout, axis, 0 if short else period) if added is None and len(widths) == 1 else None
    if stored:
        period = stored[1]
        runs: tuple[Run, ...] = (stored[0],)
    else:
        runs = tuple(_in_order(axis, width, period) for width in widths)
    kind, table, bias = found
    return Held(
        widths, kind, axis, axes, spelled, runs, period, runs[0].columns(), table, bias, bits,
        dtype=dtype, levels=levels, added=added,
    )  # fmt: skip


def _looked_up(steps: tuple[int, ...], bits: int) -> tuple[str, Table, int] | None:
    """How a kernel finds the step of a code: (kind, table, bias); None if it cannot."""
    table = np.zeros(128, np.uint8)
    if steps == tuple(range(steps[0], steps[0] + len(steps))):
        return "direct", table, -steps[0]
    if bits == 8:
        turned = steps[128:] + steps[:128]
        signed = turned == tuple(range(turned[0], turned[0] + 256))
        return ("signed", table, -turned[0]) if signed else None
    if bits > 6:
        return None
    low = min(steps)
    found = np.resize(np.array(steps) - low, 64)
    table[:64], table[64:] = found & 255, found >> 8
    return ("table" if found.max() <= MOST_TABLE else "wide"), table, -low


def _in_order(axis: str, width: int, period: int) -> Run:
    """Four neighbours in the bytes of a dword, the next four in the next field."""
    fields = 8 // width
    count = period // (4 * fields)
    dwords = (Digit(axis, 4 * fields, count),) if count > 1 else ()
    return Run(dwords, (Digit(axis, 1, 4),), (Digit(axis, 4, fields),) if fields > 1 else ())


def _as_stored(layout: Layout, axis: str, period: int) -> tuple[Run, int] | None:
    """The bytes of a row as the layout has them, and the columns after which their order repeats.

    period : columns of a run; 0: as few as can be

    Codes must be fields within bytes, and the bytes of a run follow each other.
    """
    homes = [(c, m) for c, m, _ in layout.members() if m.name == "codes"]
    if len(homes) > 1:
        return None
    ((home, member),) = homes
    inside = (*member.units, *member.fields) if isinstance(member, Codes) else member.digits
    mine = [d for d in (*home.over, *inside) if d.axis == axis]
    repeats = prod(d.size or 1 for d in mine) * min((d.stride for d in mine if d.stride), default=1)
    if any(d.stride == TOP for d in mine):
        return None
    bits = member.bits if isinstance(member, Codes) else 8
    period = period or lcm(repeats, CHUNK // bits if 8 % bits == 0 else 1)
    try:
        fitted = layout.fit(layout.block["rows"], lcm(layout.block["cols"], period))
    except LayoutError:  # a description may be for one width alone
        return None
    placed = next(c for c in fitted.components if c.name == home.name)
    (m,) = (m for m in placed.members if m.part == "codes")
    if 8 % m.bits or BLOCK % period or (home.ragged and period % repeats):
        return None
    fields, units = _fastest(m.fields, 8 // m.bits)
    over = [*placed.over, *m.units, *units]
    if m.start % 8 or any(d.axis != axis for d in (*units, *fields)) or any(d.axis in (WORD, BIT) for d in over):
        return None
    if prod(d.size for d in fields) * m.bits != 8 or any(d.axis == "rows" and d.stride not in (1, LANES) for d in over):
        return None
    run: list[Digit] = []
    for d in over:
        if d.axis != axis or d.stride >= period:
            if d.axis == axis and run:
                return None
            continue
        if d.stride * d.size > period:
            if d.reverse or period % d.stride or run:
                return None
            d = replace(d, size=period // d.stride)
        run += [d] if d.size > 1 else []
    bytes_, dwords = _fastest(tuple(run), 4)
    return (Run(dwords, bytes_, fields), period) if prod(d.size for d in bytes_) == 4 else None


def _fastest(digits: tuple[Digit, ...], count: int) -> tuple[tuple[Digit, ...], tuple[Digit, ...]]:
    """The digits that count the first `count` steps, and those that count these; the first are fewer if they cannot."""
    fast: list[Digit] = []
    rest = list(digits)
    while count > 1 and rest:
        d = rest.pop()
        size = gcd(count, d.size)
        if d.size > size:
            if d.reverse or size == 1:
                return (), digits
            rest.append(replace(d, stride=d.stride * size, size=d.size // size))
        if size > 1:
            fast.insert(0, replace(d, size=size))
        count //= size
    return tuple(fast), tuple(rest)


# ---------------------------------------------------------------- scales, and what else there is


class Scale(NamedTuple):
    """What a tile's scales are: their dtype, the grid that reads them, and what a kernel calls them."""

    dtype: str
    grid: Grid
    kind: str


def _scales_fit(layout: Layout, shape: Shape) -> bool:
    """Whether equally many rows share each scale, and those that are codes are bytes."""
    parts = layout.fit(*shape).parts
    equal = all(shape[0] % (parts[name].shape[0] or 1) == 0 for name in SHARED & parts.keys())
    coded = layout.grid.name == "table" or dict(layout.grid.params).get("scale")
    return equal and (not coded or parts["scale"].dtype == "u1")


def _scale(layout: Layout, shape: Shape, spelled: Grid) -> Scale:
    """Scales as they are where a kernel reads them, else in the narrowest float that has them all."""
    stored, named = layout.fit(*shape).parts["scale"].dtype, dict(layout.grid.params).get("scale", "")
    if layout.grid.name == "table":
        return Scale("u1", spelled, "e8m0")
    if dict(layout.grid.params).get("ratio"):  # each plane gets its own, which has more digits
        return Scale("<f4", spelled, "f32")
    if named in NAMED and spelled == layout.grid:
        return Scale("u1", spelled, NAMED[named])
    if named:
        numbers = minifloat.numbers(named)
        short = numbers.astype(dtype_of("bfloat16")).astype(np.float32)
        dtype = "bfloat16" if np.array_equal(short, numbers, equal_nan=True) else "<f4"
        params = tuple((key, "" if key == "scale" else value) for key, value in spelled.params)
        return Scale(dtype, Grid(spelled.name, params), SCALES[dtype])
    dtype = stored if stored in SCALES else "<f4"
    return Scale(dtype, spelled, SCALES[dtype])


def _others(layout: Layout, shape: Shape, of: Meaning, held: Held, scale: Scale) -> list[Component] | None:
    """The components of all parts but codes; None if some lie in components of other parts."""
    parts, lanes = layout.fit(*shape).parts, (rows(1, held.lanes),)
    along = (Digit(held.axis, _block(of) // held.per),) if of.group else ()
    over = (rows(held.lanes), *along)
    out = [Component("scale", (*over, *_planes(held.axes)), (Values("scale", scale.dtype, lanes),))]
    if "zero" in parts:
        out.append(Component("zero", over, (Codes("zero", parts["zero"].bits, lanes),)))
    if "global_scale" in parts:
        experts = (rows(),) if parts["global_scale"].shape[0] > 1 else ()
        out.append(Component("global_scale", experts, (Values("global_scale", parts["global_scale"].dtype),)))
    for component in layout.components:
        mine = {m.name for m in component.cell} if isinstance(component, Component) else set()
        if mine & BESIDE:
            if not mine <= BESIDE or not isinstance(component, Component):
                return None
            out.append(replace(component, doc=""))
    return out
