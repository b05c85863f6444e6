"""Run-time tilings: the layout that a packed tensor is moved into for products, described as all layouts are.

Sixteen rows lie interleaved, four bytes of each, so that a vector of 64 bytes holds a dword of every row and a
processor's lanes are rows. Codes, scales and zero points are components of their own, which keeps vectors of codes
aligned. Which columns a dword holds is whatever the storage layout had in its bytes: activations are brought into
that order instead, once a product. So most weights only have their dwords moved, and a tiling's codes, grid and
scales are those of the layout that it came from.

A tiling is recognised by its structure, never by its name: what a file brings is as good as what is made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, lcm, prod
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import minifloat
from packfmt.errors import LayoutError
from packfmt.layout import (
    BIT, REST, TOP, WORD, Axis, Codes, Component, Digit, Grid, Layout, Part, Values, dtype_of, grid, itemsize, rows,
)  # fmt: skip
from packfmt.meaning import AFFINE, BLOCK, Meaning, Shape, meaning

LANES: Final = 16  # rows of a tile
CHUNK: Final = 32  # columns that a vector of one-bit codes holds
QUADS: Final = 32  # that five dwords hold
SUFFIX: Final = "_tile16"
WIDTHS: Final = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (8,), 8: (8,)}  # of a code's bits
SCALES: Final = {"<f4": "f32", "<f2": "f16", "bfloat16": "bf16", "float8_e4m3fn": "e4m3", "float8_e8m0fnu": "e8m0"}
NAMED: Final = {"float8_e4m3fn": "e4m3", "float8_e8m0fnu": "e8m0", "ufloat7_e4m3": "ue4m3"}  # of bytes
TRIT: Final = {"zero": 1}  # parameter of grids whose codes 0, 1, 2 are -1, 0, 1
MOST_TABLE: Final = 127  # that a step and its bias may be together, in one byte


class How(NamedTuple):
    """What a kernel is compiled for (`kernels.tile_products.Tiling`, which has the same fields)."""

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
    """A tiling of one layout for one shape.

    order : (stored columns with padding,) int32: the column, as the storage layout numbers them, that each stored
        one holds; -1 where there is none
    table : (128,) uint8, what the kernel looks codes up in
    bias : what the looked-up numbers have in excess of steps
    exponent, nan : of scales that are powers of two: the byte that is one, and whether 255 is no number
    moved : the storage layout's codes are the tile's but for the order of dwords
    """

    layout: Layout
    how: How
    order: npt.NDArray[np.int32]
    table: npt.NDArray[np.uint8]
    bias: int
    exponent: int
    nan: bool
    unit: float
    moved: bool


class Run(NamedTuple):
    """A row's codes in the bytes of one run of columns: which digits count dwords, their bytes, and fields."""

    dwords: tuple[Digit, ...]
    bytes: tuple[Digit, ...]
    fields: tuple[Digit, ...]

    def columns(self) -> npt.NDArray[np.int32]:
        """The column of each activation that a kernel reads: dword by dword, field by field, byte by byte."""
        dwords, bytes_, fields = (_places(digits) for digits in self)
        return (dwords[:, None, None] + fields[:, None] + bytes_).reshape(-1)


def _places(digits: tuple[Digit, ...]) -> npt.NDArray[np.int32]:
    out = np.zeros(1, np.int32)
    for d in digits:
        turn = np.arange(d.size, dtype=np.int32)
        out = (out[:, None] + d.stride * (d.size - 1 - turn if d.reverse else turn)).reshape(-1).astype(np.int32)
    return out


@lru_cache(maxsize=256)
def tile(layout: Layout, shape: Shape) -> Tile | None:
    """The tiling of a layout; None if it has no whole steps, or none that a tile can hold."""
    of = meaning(layout, shape)
    if of is None or (codes := _codes(layout, shape, of)) is None:
        return None
    how, axis, block = codes.how, codes.axis, codes.how.block
    run, moved = codes.run, codes.moved
    source = layout.fit(*shape).parts
    step = 1 if how.codes != "quads" else 4
    outer = Digit(axis, codes.period // step, REST)
    plane = tuple(Digit(a.name) for a in codes.axes if not a.of and a.size == of.planes and codes.grid.name == "planes")
    lanes = rows(1, LANES)
    over = (rows(LANES), outer, *plane)
    if how.codes == "quads":
        cell: Codes | Values = Codes("codes", 5, (), (Digit(axis, 1, QUADS),), "<u4")
        coded = [Component("codes", (rows(LANES), Digit(axis, QUADS, REST), Digit(WORD), lanes), (cell,))]
    elif len(how.widths) == 2:
        coded = []
        low = 0
        for name, width in zip(("codes", "codes_high"), how.widths, strict=True):
            piece = _natural(axis, width, codes.period)
            member = Codes("codes", width, piece.bytes, piece.fields, low=low, levels=codes.levels)
            coded.append(Component(name, (*over, *piece.dwords, lanes), (member,)))
            low += width
    else:
        cell = (
            Values("codes", codes.dtype, run.bytes)
            if codes.dtype in ("i1",)
            else Codes("codes", codes.bits, run.bytes, run.fields, levels=codes.levels)
        )
        coded = [Component("codes", (*over, *run.dwords, lanes), (cell,))]
    scale_over = (rows(LANES), *plane) if how.per_row else (rows(LANES), Digit(axis, block // step, REST), *plane)
    others = [Component("scale", scale_over, (Values("scale", codes.scale, (lanes,)),))]
    if how.zero:
        zero_over = (rows(LANES),) if how.per_row else (rows(LANES), Digit(axis, block, REST))
        others.append(Component("zero", zero_over, (Codes("zero", source["zero"].bits, (lanes,)),)))
    if how.whole:
        many = source["global_scale"].shape[0] > 1
        others.append(Component("global_scale", (rows(),) if many else (), (Values("global_scale", source["global_scale"].dtype),)))
    beside = {m.name for _, m, _ in layout.members()} & {"perm", "columns", "column_values"}
    for component in layout.components:
        mine = {m.name for m in component.cell} if isinstance(component, Component) else set()
        if mine & beside:
            if not mine <= beside:
                return None
            others.append(replace(component, doc=""))
    name = layout.name if layout.name.endswith(SUFFIX) else layout.name + SUFFIX
    axes = []
    for a in codes.axes:
        if a.of == "rows":
            a = replace(a, pad=LANES)
        elif a.name == axis and how.per_row:
            a = replace(a, pad=codes.period // step)
        axes.append(a)
    made = Layout(name, (*coded, *others), codes.grid, tuple(axes), f"{layout.name} for products: 16 rows side by side", hadamard=layout.hadamard)
    try:
        fitted = made.fit(*shape)
    except LayoutError:
        return None
    stored = fitted.extents[axis] * step
    if how.codes == "quads":
        order = np.arange(stored, dtype=np.int32) if codes.stride == 1 else _apart(stored, codes.stride)
    else:
        order = (np.arange(0, stored, codes.period, dtype=np.int32)[:, None] + run.columns()).reshape(-1)
    order[order >= of.cols] = -1
    order.flags.writeable = False
    return Tile(made, how, order, codes.table, codes.bias, codes.exponent, codes.nan, of.unit, moved)


def _apart(stored: int, stride: int) -> npt.NDArray[np.int32]:
    """Columns of the lanes of quads whose weights lie `stride` apart."""
    chunk = np.arange(4 * stride, dtype=np.int32).reshape(4, stride).T.reshape(-1)
    return (np.arange(0, stored, 4 * stride, dtype=np.int32)[:, None] + chunk).reshape(-1)


# ---------------------------------------------------------------- what codes become


class _Coded(NamedTuple):
    how: How
    axis: str  # of the codes' columns
    period: int  # columns after which the order of dwords repeats
    run: Run
    moved: bool
    bits: int
    dtype: str
    levels: int
    scale: str  # dtype of the tile's scales
    grid: Grid
    axes: tuple[Axis, ...]
    table: npt.NDArray[np.uint8]
    bias: int
    exponent: int
    nan: bool
    stride: int  # of quads


def _codes(layout: Layout, shape: Shape, of: Meaning) -> _Coded | None:
    """How a tile holds the codes; None if it cannot."""
    part = layout.fit(*shape).parts["codes"]
    per_row = of.group == 0
    block = BLOCK if per_row or of.group % BLOCK == 0 else of.group
    if block > BLOCK:
        return None
    name, axes = layout.grid.name, layout.axes
    params = dict(layout.grid.params)
    axis = next(a for a in axes if a.of == "cols")
    bits, dtype, levels, stride = part.bits, part.dtype, part.levels, 1
    spelled = replace(layout.grid)
    steps = of.steps
    if name in ("quads", "quads_in_fives"):
        stride = params["stride"]
        values = np.array(params["values"])
        whole = per_row or block % (4 * QUADS) == 0
        if values.shape == (32, 4) and whole and (4 * QUADS) % (4 * stride) == 0:
            table = (values + 1).astype(np.uint8).reshape(-1)
            scale, spelled, how = _scales(layout, shape, of, grid("quads", stride=stride, values=params["values"]))
            kernel = How((5,), "quads", block, 1, False, how, per_row, "", False)
            rest = tuple(a for a in axes if a.of == "rows" or (a.of == "cols" and a.per == 1 and _used(layout, a.name)))
            quads = Axis("quads", "cols", 4)
            run = Run((), (), ())
            return _Coded(kernel, "quads", 4 * QUADS, run, False, 5, "u1", 0, scale, spelled, (rest[0], quads, *rest[1:]), table, 1, 0, False, stride)
        steps, bits, dtype = (-1, 0, 1, 2), 2, "u1"
    if name == "hif4":
        steps, bits, dtype = tuple(np.arange(256).astype(np.uint8).view(np.int8).tolist()), 8, "i1"
        spelled = grid("scaled", element="int8_f2", scale=layout.grid["scale"], global_scale="")
    elif name == "affine_zero":
        steps = tuple(range(1 << bits))
    elif not of.steps or name in ("quads", "quads_in_fives"):
        steps, bits, dtype, levels = (-1, 0, 1, 2), 2, "u1", 3
        spelled = grid("planes", zero=1, ratio=0) if of.planes > 1 or _has_planes(layout) else grid("affine", zero=1)
    if bits not in WIDTHS or len(steps) != 1 << bits or dtype not in ("u1", "i1"):
        return None
    looked_up = _look_up(steps, bits, dtype)
    if looked_up is None:
        return None
    kind, table, bias = looked_up
    widths = WIDTHS[bits]
    chunk = CHUNK // min(widths)
    if block % chunk:
        return None
    verbatim = spelled == layout.grid or name in ("hif4", "affine_zero")
    own = tuple(a for a in axes if _used(layout, a.name) or a.of == "rows") if verbatim else _plain_axes(axes, spelled.name)
    axis = next(a for a in own if a.of == "cols")
    period = BLOCK if of.planes > 1 and per_row else block if not per_row else chunk
    found = _as_stored(layout, shape, axis.name, period if not per_row else 0, part) if verbatim and name != "hif4" and len(widths) == 1 else None
    moved = found is not None
    if found:
        run, period = found
    else:
        run = _natural(axis.name, widths[0], period)
    if name == "planes":
        spelled = grid("planes", zero=params["zero"], ratio=0)
    scale, spelled, how = _scales(layout, shape, of, spelled)
    exponent, nan = (params["exponent"], False) if name == "table" else (127, True)
    kernel = How(widths, kind, block, of.planes, name == "affine_zero", how, per_row, str(params.get("global_scale", "")), name == "quotient")
    return _Coded(kernel, axis.name, period, run, moved, bits, dtype, levels, scale, spelled, own, table, bias, exponent, nan, stride)


def _used(layout: Layout, axis: str) -> bool:
    return True


def _has_planes(layout: Layout) -> bool:
    return layout.grid.name.startswith("plane")


def _plain_axes(axes: tuple[Axis, ...], grid_name: str) -> tuple[Axis, ...]:
    """Rows, planes if there are any, columns."""
    out = [next(a for a in axes if a.of == "rows")]
    if grid_name == "planes":
        out.append(next(a for a in axes if not a.of))
    return (*out, Axis("cols", "cols"))


def _look_up(steps: tuple[int, ...], bits: int, dtype: str) -> tuple[str, npt.NDArray[np.uint8], int] | None:
    """How a kernel finds the step of a code: (kind, table, bias)."""
    table = np.zeros(128, np.uint8)
    first = steps[0]
    if dtype == "u1" and steps == tuple(range(first, first + len(steps))):
        return "direct", table, -first
    if bits == 8:
        turned = steps[128:] + steps[:128]
        if turned == tuple(range(turned[0], turned[0] + 256)):
            return "signed", table, -turned[0]
        return None
    if bits > 6:
        return None
    low = min(steps)
    found = np.array(steps) - low
    found = np.tile(found, 64 // len(found))
    table[:64], table[64:] = found & 255, found >> 8
    return ("table" if found.max() <= MOST_TABLE else "wide"), table, -low


def _scales(layout: Layout, shape: Shape, of: Meaning, spelled: Grid) -> tuple[str, Grid, str]:
    """The dtype of the tile's scales, its grid, and what a kernel calls them."""
    part = layout.fit(*shape).parts["scale"]
    params = dict(spelled.params)
    if layout.grid.name == "table":
        return "u1", spelled, "e8m0"
    if dict(layout.grid.params).get("ratio"):  # each plane gets a scale of its own, which has more digits
        return "<f4", spelled, "f32"
    if "scale" in params:
        if params["scale"] in NAMED:
            return "u1", spelled, NAMED[params["scale"]]
        if params["scale"]:
            numbers = minifloat.numbers(params["scale"])
            short = numbers.astype(dtype_of("bfloat16")).astype(np.float32)
            dtype = "bfloat16" if np.array_equal(short, numbers, equal_nan=True) else "<f4"
            return dtype, Grid(spelled.name, tuple(sorted((params | {"scale": ""}).items()))), SCALES[dtype]
    dtype = part.dtype if part.dtype in SCALES else "<f4"
    return dtype, spelled, SCALES[dtype]


# ---------------------------------------------------------------- the order of a row's bytes


def _natural(axis: str, width: int, period: int) -> Run:
    """Columns in their order: four neighbours in the bytes of a dword, the next four in the next field."""
    fields = 8 // width
    count = period // (4 * fields)
    inner = (Digit(axis, 4 * fields, count),) if count > 1 else ()
    return Run(inner, (Digit(axis, 1, 4),), (Digit(axis, 4, fields),) if fields > 1 else ())


def _as_stored(layout: Layout, shape: Shape, axis: str, period: int, part: Part) -> tuple[Run, int] | None:
    """The bytes of a row as the layout has them, if its codes are fields within bytes that follow each other; and
    after how many columns the order repeats."""
    homes = [(c, m) for c, m, _ in layout.members() if m.name == "codes"]
    if len(homes) != 1 or part.bits not in (1, 2, 4, 8):
        return None
    component, member = homes[0]
    wanted = period or lcm(_repeats(layout, axis, component, member), CHUNK // part.bits)
    if not period and BLOCK % wanted:
        return None
    try:
        placed = next(c for c in layout.fit(layout.block["rows"], lcm(layout.block["cols"], wanted)).components if c.name == component.name)
    except LayoutError:
        return None
    m = next(m for m in placed.members if m.part == "codes")
    if isinstance(member, Codes) and (member.low or member.at is not None):
        return None
    if component.ragged and wanted % (8 * m.word * m.words // m.bits):
        return None
    per_byte = 8 // m.bits
    fields, units = _cut(m.fields, per_byte)
    if prod(d.size for d in fields) != per_byte or prod(d.size for d in units) != m.word * m.words:
        return None
    outside = [*placed.over, *m.units, *units]
    if any(d.axis in (WORD, BIT) for d in (*outside, *fields)) or any(d.axis != axis for d in (*units, *fields)):
        return None
    inner: list[Digit] = []
    for d in outside:
        if d.axis != axis:
            if d.axis == "rows" and d.stride not in (1, LANES) :
                return None
            continue
        if d.stride >= wanted:
            if inner:
                return None
            continue
        if d.stride * d.size > wanted:
            if d.reverse or wanted % d.stride or inner:
                return None
            d = replace(d, size=wanted // d.stride)
        if d.size > 1:
            inner.append(d)
    dwords, bytes_ = _cut(tuple(inner), 4, last=True)
    if prod(d.size for d in bytes_) != 4:
        return None
    return Run(dwords, bytes_, tuple(d for d in fields if d.size > 1)), wanted


def _repeats(layout: Layout, axis: str, component: Component, member: Codes | Values) -> int:
    """Columns after which the order of the codes repeats."""
    inside = (*member.units, *member.fields) if isinstance(member, Codes) else member.digits
    mine = [d for d in (*component.over, *inside) if d.axis == axis]
    return prod(d.size or 1 for d in mine) * min((d.stride for d in mine if d.stride), default=1)


def _cut(digits: tuple[Digit, ...], count: int, last: bool = False) -> tuple[tuple[Digit, ...], tuple[Digit, ...]]:
    """The digits that count the first `count` from the fastest, and the rest: (fastest, rest), or (rest, fastest)."""
    fast: list[Digit] = []
    rest = list(digits)
    need = count
    while need > 1 and rest:
        d = rest.pop()
        size = gcd(need, d.size) if d.size > need else d.size
        if d.size > size:
            if d.size % size or d.reverse:
                return ((), ()) if not last else ((), ())
            rest.append(replace(d, stride=d.stride * size, size=d.size // size))
            d = replace(d, size=size)
        if size <= 1 and d.size > 1:
            break
        fast.insert(0, d)
        need //= max(1, size)
    return (tuple(rest), tuple(fast)) if last else (tuple(fast), tuple(rest))
