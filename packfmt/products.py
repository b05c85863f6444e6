"""Products of packed weights with activations: which way a layout goes, and the kernel that goes it.

The bits are those of the canonical product (spec/products.md) whatever machine, threads or batch. A layout of whole
steps is moved into a tiling (`tilings`) once; what no tiling holds has its steps multiplied by plain loops. All other
numbers are decoded and multiplied as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from packfmt import fused, outliers, placement, tilings
from packfmt.errors import LayoutError, PackfmtError
from packfmt.grids import scale_numbers
from packfmt.layout import Codes, Component, Digit, Layout, Values
from packfmt.meaning import BESIDE, BLOCK, Meaning, Shape, meaning, replaced, sources, weight_scales, weight_steps
from packfmt.placement import Array, Arrays
from packfmt.respelling import WRONG
from packfmt.retiling import retile
from packfmt.tilings import LANES, Tile

if TYPE_CHECKING:
    from packfmt.kernels.activations import Order

F32 = np.float32
Floats = npt.NDArray[np.float32]
Multiply = Callable[[Floats, Floats], None]  # (batch, cols) -> (batch, rows)
FLOAT32: Final = np.dtype(F32)
NONE: Final = np.zeros(0, F32)
NO_BYTES: Final = np.zeros(0, np.uint8)


# ---------------------------------------------------------------- products


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A weight that is ready to be multiplied.

    layout, components : what it is held in: a tiling, or what it came in
    way : writes the product of (batch, cols) float32 to (batch, rows) float32, both C-contiguous
    tiled : whether it is held in a tiling
    """

    layout: Layout
    components: Arrays
    shape: Shape
    way: Multiply
    tiled: bool = False

    def __call__(self, x: Floats) -> Floats:
        """(batch, cols) float32, C-contiguous -> (batch, rows) float32."""
        out = np.empty((len(x), self.shape[0]), F32)
        if out.size and x.size:
            self.way(x, out)
        else:
            out[:] = 0
        return out


def product(layout: Layout, shape: Shape, components: Arrays, batch: int = 1) -> Product:
    """Make a weight ready.

    batch : rows of activations that most products will have; others are multiplied as well, to the same bits

    Raises
    ------
    LayoutError
        If a component is not what the layout says, or its grid does not fit its parts.
    """
    try:
        return _product(layout, shape, components, batch)
    except PackfmtError:
        raise
    except WRONG as error:  # a description from a file may say anything
        raise LayoutError(f"{layout.name}: grid {layout.grid.name!r} cannot take its parts: {error}") from error


def _product(layout: Layout, shape: Shape, components: Arrays, batch: int) -> Product:
    if layout.sparse:
        return _with_outliers(layout, shape, components, batch)
    if (of := meaning(layout, shape)) is None or not shape[0] or not shape[1]:
        return _numbers(layout, shape, components)
    tiled = retile(layout, shape, components, batch)
    if tiled is None:
        parts = placement.unpack(layout, shape, components)
        return _whole(layout, components, shape, _plain(layout, shape, parts, of), parts)
    layout, components, tile = tiled
    beside = _beside(layout, shape, components)
    return replace(_whole(layout, components, shape, _in_tiles(tile, shape, components, beside), beside), tiled=True)


def _whole(layout: Layout, components: Arrays, shape: Shape, way: Multiply, parts: Arrays) -> Product:
    """The product by way of codes, and what the layout has before and beside them.

    parts : those that are neither codes nor scales, at least
    """
    if beside := replaced(layout, shape, parts):
        way = _with_columns(way, *beside)
    if layout.hadamard:
        way = _after_hadamard(way, layout.hadamard)
    return Product(layout, components, shape, way)


def _with_outliers(layout: Layout, shape: Shape, components: Arrays, batch: int) -> Product:
    """The product of the dense part, to which the outliers of each row are added, one after the other."""
    from packfmt.kernels import outliers as kernel

    apart = outliers.names(layout)
    dense = {name: array for name, array in components.items() if name not in apart}
    ready, found = _product(outliers.without(layout), shape, dense, batch), outliers.read(layout, shape, components)
    if layout.sparse and layout.sparse.combine == "replace":
        found = outliers.added(layout, shape, found, fused.decode(outliers.without(layout), shape, dense))
    more = kernel.Product(*found)

    def multiply(x: Floats, out: Floats) -> None:
        ready.way(x, out)
        more(x, out)

    held = {**ready.components, **{name: components[name] for name in apart}}
    return replace(
        ready, layout=outliers.onto(ready.layout, layout) if ready.tiled else layout, components=held, way=multiply
    )


def _after_hadamard(way: Multiply, block: int) -> Multiply:
    from packfmt.kernels import hadamard

    def multiply(x: Floats, out: Floats) -> None:
        x = x.copy()
        hadamard.transform(x, block)
        way(x, out)

    return multiply


def _with_columns(way: Multiply, columns: npt.NDArray[np.int64], values: Floats) -> Multiply:
    """Columns that stand beside the codes, (rows, columns) float32, are added one after the other."""

    def multiply(x: Floats, out: Floats) -> None:
        apart, x = x[:, columns], x.copy()
        x[:, columns] = 0
        way(x, out)
        with np.errstate(all="ignore"):
            for j in range(len(columns)):
                out += apart[:, j, None] * values[:, j]

    return multiply


def disagree(layout: Layout, shape: Shape, components: Arrays) -> int:
    """How many rows of a weight its tiling multiplies to other bits than plain loops over its steps do.

    Both take the same random activations. 0 for layouts without a tiling, whose numbers are decoded.
    """
    if layout.sparse:  # whose outliers go one way only
        apart = outliers.names(layout)
        components = {name: array for name, array in components.items() if name not in apart}
        layout = outliers.without(layout)
    ready = product(layout, shape, components)
    of = meaning(layout, shape)
    if of is None or not ready.tiled:  # decoded, or plain itself
        return 0
    parts = placement.unpack(layout, shape, components)
    plain = _whole(layout, components, shape, _plain(layout, shape, parts, of), parts)
    x = np.random.default_rng(0).standard_normal((1, shape[1]), F32)
    a, b = ready(x), plain(x)
    return int(((a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b))).sum())


def multiply(ready: Product, x: Array, rows: tuple[int, ...], threads: int | None = None) -> Floats:
    """Activations of any leading shape times a weight of (*rows, cols): (..., *rows) float32.

    Raises
    ------
    LayoutError
        If x is no float array of so many columns.
    PackfmtError
        If `threads` is not a whole number of 1 to 256.
    """
    flat = rows_of(x, ready.layout, ready.shape[1])
    if threads is None:
        out = ready(flat)
    else:
        from packfmt.kernels.threads import limit

        with limit(threads):
            out = ready(flat)
    if len(rows) == 1 and x is flat:
        return out
    return out.reshape((*x.shape[:-1], *rows))


def rows_of(x: Array, layout: Layout, cols: int) -> Floats:
    """Activations as (batch, cols) float32, C-contiguous.

    After megabytes of weights all that is looked at comes from memory, so usual ones are passed on at once.

    Raises
    ------
    LayoutError
        If x is no float array of so many columns; it names the layout.
    """
    if type(x) is not np.ndarray or x.dtype is not FLOAT32 or not x.ndim or x.shape[-1] != cols:
        name = tilings.base(layout.name)
        if not isinstance(x, np.ndarray | np.generic) or not x.dtype.name.startswith(("float", "bfloat")):
            found = f"{x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
            raise LayoutError(f"{name}: activations of {found}, needs a NumPy array of a float dtype")
        if not x.ndim or x.shape[-1] != cols:
            raise LayoutError(f"{name}: activations of shape {x.shape}, needs (..., {cols})")
        with np.errstate(over="ignore"):
            x = x.astype(F32, subok=False, copy=False)
    if x.ndim == 2 and x.flags.c_contiguous:
        return x
    return np.ascontiguousarray(x).reshape(prod(x.shape[:-1]), cols)


def _beside(layout: Layout, shape: Shape, components: Arrays) -> dict[str, Array]:
    """The parts of a tiling that are neither codes nor scales."""
    return placement.unpack(layout, shape, components, frozenset({"codes", "scale", "zero"}))


def _in_tiles(tile: Tile, shape: Shape, components: Arrays, beside: Arrays) -> Multiply:
    """The kernel of a tile; rows that only fill up the last tile are dropped."""
    from packfmt.kernels import activations

    source, columns = sources(tile.layout, shape, beside), tile.order
    if source is not None:
        columns = np.where(columns >= 0, source[columns], -1).astype(np.int32)
    order = activations.arrange(shape[1], tile.how.block, columns)
    flat = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in components.items()}
    given = tile, shape, order, flat
    kernel = _looked_up(*given) if tile.form else _decoded_in_lanes(*given, beside)
    rows = -(-shape[0] // tile.lanes) * tile.lanes
    if rows == shape[0]:
        return kernel

    def multiply(x: Floats, out: Floats) -> None:
        room = np.empty((len(out), rows), F32)
        kernel(x, room)
        out[:] = room[:, : shape[0]]

    return multiply


def _decoded_in_lanes(tile: Tile, shape: Shape, order: Order, flat: Arrays, beside: Arrays) -> Multiply:
    """The kernel of most tilings, or the machine's matrix unit for many activations."""
    from packfmt.kernels import activations, amx, amx_products, tile_products

    groups, whole = -(-shape[0] // LANES), NONE
    if tile.how.whole:
        number = beside["global_scale"].reshape(-1).astype(F32)
        whole = np.resize(np.repeat(number, shape[0] // len(number)), LANES * groups)
    codes, high, scale, zero = (flat.get(name, NO_BYTES) for name in (*tilings.CODES, "scale", "zero"))
    how = tile_products.Tiling(*tile.how)
    tiles = tile_products.Tiles(
        how, codes, high, scale, zero, whole,
        tile.table, tile.bias, tile.exponent, tile.nan, tile.unit, groups, len(tile.order),
    )  # fmt: skip
    in_vectors = tile_products.Product(tiles, order)
    if not amx_products.fits(how):
        return in_vectors

    def multiply(x: Floats, out: Floats) -> None:
        if len(out) > 1 and amx_products.pays(how, len(out)) and amx.available():
            whole_numbers = tile_products.Activations(*activations.quantise(x, order, tile.unit))
            amx_products.multiply(tiles, whole_numbers, out)
        else:
            in_vectors(x, out)

    return multiply


def _looked_up(tile: Tile, shape: Shape, order: Order, flat: Arrays) -> Multiply:
    """The kernel of quads whose sums are looked up."""
    from packfmt.kernels import lookup_products

    how = lookup_products.Tiling(tile.form, tile.how.block, tile.how.scale, tile.how.per_row)
    codes, high, scale = (flat.get(name, NO_BYTES) for name in (*tilings.CODES, "scale"))
    groups = -(-shape[0] // tilings.LOOKED_UP)
    tiles = lookup_products.Tiles(how, codes, high, scale, tile.table, groups, len(tile.order))
    return lookup_products.Product(tiles, order, tile.unit)


def _plain(layout: Layout, shape: Shape, parts: Arrays, of: Meaning) -> Multiply:
    """Steps by plain loops: for what no tile holds."""
    from packfmt.kernels import activations, plain_products

    steps, scale = weight_steps(layout, shape, parts), weight_scales(layout, shape, parts, of)
    group = of.group or of.cols
    ends = np.array(
        [
            min(e, of.cols)
            for g in range(0, of.cols, group)
            for e in (*range(g + BLOCK, min(of.cols, g + group), BLOCK), g + group)
        ],
        np.int32,
    )
    which = (ends - 1) // np.int32(group)
    source = sources(layout, shape, parts)
    order = activations.arrange(shape[1], ends, None if source is None else source.astype(np.int32))

    def multiply(x: Floats, out: Floats) -> None:
        q, _, factors = activations.quantise(x, order, of.unit)
        plain_products.multiply(steps, scale, ends, which, q, factors, out)

    return multiply


def _numbers(layout: Layout, shape: Shape, components: Arrays) -> Product:
    """Decoded numbers times float32 activations."""
    beside = {c.name for c in layout.components if isinstance(c, Component) and {m.name for m in c.cell} <= BESIDE}
    parts = placement.unpack(layout, shape, components, frozenset(layout.fit(*shape).parts.keys() - BESIDE))
    stored = layout
    if beside or layout.hadamard:
        rest = tuple(c for c in layout.components if c.name not in beside)
        met = {d.axis for c in rest if isinstance(c, Component) for m in c.cell for d in (*c.over, *_inside(m))}
        axes = tuple(a for a in layout.axes if a.of == "rows" or a.name in met)
        stored = replace(layout, components=rest, axes=axes, hadamard=0)
    source = sources(layout, shape, parts)
    way = _as_they_are(stored, shape, components) or _decoded(stored, shape, components, source)

    def multiply(x: Floats, out: Floats) -> None:
        way(x if source is None else np.ascontiguousarray(np.where(source >= 0, x[:, source], F32(0))), out)

    return _whole(layout, components, shape, multiply, parts)


def _inside(m: Codes | Values) -> tuple[Digit, ...]:
    return (*m.units, *m.fields) if isinstance(m, Codes) else m.digits


def _as_they_are(layout: Layout, shape: Shape, components: Arrays) -> Multiply | None:
    """Numbers that a kernel reads where they lie: floats in row-major order, perhaps with scales."""
    from packfmt.kernels import number_products
    from packfmt.kernels.number_code import BYTES

    if layout.axes[0].of != "rows":  # which decoding refuses
        return None
    fitted, rows_cols = layout.fit(*shape), ("rows", "cols")
    name = "values" if layout.grid.name == "plain" else "codes"
    for c in fitted.components:
        lone = len(c.members) == 1 and c.members[0].part == name and components[c.name].dtype.name in BYTES
        in_order = (
            lone and tuple(d.axis for d in c.over) == rows_cols and all(d.stride == 1 and not d.reverse for d in c.over)
        )
        if in_order and not c.members[0].units and components[c.name].size == prod(shape):
            weights = np.ascontiguousarray(components[c.name]).reshape(shape)
            break
    else:
        return None
    if name == "values":
        return lambda x, out: number_products.multiply(weights, x, out)
    parts = placement.unpack(layout, shape, components, frozenset({"codes"}))
    if layout.grid.name != "scaled" or layout.grid["element"] != weights.dtype.name:
        return None
    if parts.get("global_scale", NONE).size > 1:
        return None
    scale = scale_numbers(parts, layout.grid["scale"], layout.grid["global_scale"])
    tall, wide = fitted.parts["scale"].share
    tall, wide = (0 if n == 1 else s for n, s in zip(scale.shape, (tall, wide), strict=True))
    if wide % 32:
        return None
    return lambda x, out: number_products.multiply(weights, x, out, scale, (tall, wide))


def _decoded(layout: Layout, shape: Shape, components: Arrays, source: npt.NDArray[np.int64] | None) -> Multiply:
    """A strip of rows is decoded when its turn comes; all at once where they cannot be told apart."""
    from packfmt.kernels import number_products

    rows, cols = shape
    fitted = layout.fit(rows, cols)
    permuted = "perm" in fitted.parts  # as it is where it lies in a component with others
    others = source if source is not None and (permuted or len(source) > cols) else None  # copies are left out
    steps = _steps_of_rows(layout, shape)
    if not steps or any(components[c.name].shape != c.shape for c in fitted.components):  # decoding says what is wrong
        steps = dict.fromkeys(components, 0)

    def read(start: int, stop: int, out: Floats) -> None:
        mine = {name: components[name] for name in steps}
        for name in filter(steps.get, steps):
            end = stop // steps[name] if stop < rows else None  # then with the padding
            mine[name] = mine[name][start // steps[name] : end]
        if others is None:
            fused.decode(layout, (stop - start, cols), mine, out)
            return
        weights, there = fused.decode(layout, (stop - start, cols), mine), others >= 0
        out[:, ~there] = 0
        out[:, there] = weights[:, others[there]] if permuted else weights

    least = _least_rows(layout, steps) if any(steps.values()) else rows
    return lambda x, out: number_products.multiply_strips(read, x, out, least)


def _steps_of_rows(layout: Layout, shape: Shape) -> dict[str, int] | None:
    """How many rows each step along a component's first axis holds, 0 where the component is all rows'.

    None if a run of rows is not a tensor of fewer rows, whose components are runs of these.
    """
    first, *more = layout.axes
    if layout.streams or first.of != "rows" or first.per != 1 or first.plus or any(a.of == "rows" for a in more):
        return None
    whole = layout.fit(*shape).components
    out = {c.name: c.over[0].stride if c.over and c.over[0].axis == first.name else 0 for c in whole}
    try:
        few = layout.fit(_least_rows(layout, out), shape[1]).components
    except LayoutError:
        return None
    for c, d in zip(whole, few, strict=True):
        if not out[c.name]:
            alike = c == d
        else:
            (top, *c_over), (low, *d_over) = c.over, d.over
            alike = replace(top, size=0) == replace(low, size=0) and not top.reverse and c.shape[0] == top.size
            alike = alike and (c_over, c.shape[1:], c.members) == (d_over, d.shape[1:], d.members)
        if not alike:
            return None
    return out


def _least_rows(layout: Layout, steps: dict[str, int]) -> int:
    """Of which all strips hold a multiple, but for the last."""
    return lcm(layout.block["rows"], layout.axes[0].pad, *filter(None, steps.values()))
