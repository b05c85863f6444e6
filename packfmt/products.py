"""Products of packed weights with activations: which way a layout goes, and the kernel that goes it.

The bits are those of the canonical product (spec/products.md) whatever machine, threads or batch. A layout of whole
steps is moved into a tiling (`tilings`) once; what no tiling holds has its steps multiplied by plain loops. All other
numbers are decoded and multiplied as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

from packfmt import fused, placement, tilings
from packfmt.errors import LayoutError
from packfmt.layout import Layout
from packfmt.meaning import (
    BLOCK,
    Meaning,
    Shape,
    meaning,
    replaced,
    sources,
    weight_scales,
    weight_steps,
)  # fmt: skip
from packfmt.placement import Array, Arrays
from packfmt.retiling import retile
from packfmt.tilings import LANES, Tile

F32 = np.float32
Floats = npt.NDArray[np.float32]
Multiply = Callable[[Floats, Floats], None]  # (batch, cols) -> (batch, rows)
FP8: Final = ("float8_e4m3fn", "float8_e5m2")


# ---------------------------------------------------------------- products


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A weight that is ready to be multiplied.

    layout, components : what it is held in: a tiling, or what it came in
    way : writes the product of (batch, cols) float32 to (batch, rows) float32
    beside : columns that stand beside the codes, and their numbers
    """

    layout: Layout
    components: Arrays
    shape: Shape
    way: Multiply
    beside: tuple[npt.NDArray[np.int64], Floats] | None

    def __call__(self, x: Floats) -> Floats:
        """(batch, cols) float32 -> (batch, rows) float32."""
        out = np.zeros((len(x), self.shape[0]), F32)
        if not x.size or not out.size:
            return out
        if self.layout.hadamard:
            from packfmt.kernels import hadamard

            x = x.copy()
            hadamard.transform(x, self.layout.hadamard)
        if self.beside is None:
            self.way(x, out)
            return out
        columns, values = self.beside
        apart, x = x[:, columns], x.copy()
        x[:, columns] = 0
        self.way(x, out)
        with np.errstate(all="ignore"):
            for j in range(len(columns)):
                out += apart[:, j, None] * values[:, j]
        return out


def product(layout: Layout, shape: Shape, components: Arrays) -> Product:
    """Make a weight ready.

    Raises
    ------
    LayoutError
        If a component is not what the layout says, or its grid does not fit its parts.
    """
    if (of := meaning(layout, shape)) is None or not shape[0] or not shape[1]:
        return Product(layout, components, shape, _numbers(layout, shape, components), None)
    tiled = retile(layout, shape, components)
    if tiled is None:
        parts = placement.unpack(layout, shape, components)
        return Product(layout, components, shape, _plain(layout, shape, parts, of), replaced(layout, shape, parts))
    layout, components = tiled
    tile = tilings.tile(layout, shape)
    assert tile is not None
    beside = _beside(layout, shape, components)
    return Product(layout, components, shape, _tiled(tile, shape, components, beside), replaced(layout, shape, beside))


def multiply(ready: Product, x: Array, rows: tuple[int, ...], threads: int | None = None) -> Floats:
    """Activations of any leading shape times a weight of (*rows, cols): (..., *rows) float32.

    Raises
    ------
    LayoutError
        If x is no float array of so many columns.
    PackfmtError
        If `threads` is not a whole number of 1 to 256.
    """
    from packfmt.kernels import threads as pool

    name, cols = ready.layout.name, ready.shape[1]
    if not isinstance(x, np.ndarray) or not x.dtype.name.startswith(("float", "bfloat")):
        found = f"{x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise LayoutError(f"{name}: activations of {found}, needs an array of a float dtype")
    if not x.ndim or x.shape[-1] != cols:
        raise LayoutError(f"{name}: activations of shape {x.shape}, needs (..., {cols})")
    with np.errstate(over="ignore"):
        flat = np.ascontiguousarray(x, F32).reshape(prod(x.shape[:-1]), cols)
    with pool.limit(threads):
        return ready(flat).reshape(*x.shape[:-1], *rows)


def _beside(layout: Layout, shape: Shape, components: Arrays) -> dict[str, Array]:
    """The parts of a tiling that are neither codes nor scales."""
    return placement.unpack(layout, shape, components, frozenset({"codes", "scale", "zero"}))


def _tiled(tile: Tile, shape: Shape, components: Arrays, beside: Arrays) -> Multiply:
    from packfmt.kernels import activations, tile_products

    how, groups = tile.how, -(-shape[0] // LANES)
    empty = np.zeros(0, np.uint8)
    whole = np.zeros(0, F32)
    if how.whole:
        number = beside["global_scale"].reshape(-1).astype(F32)
        whole = np.resize(np.repeat(number, shape[0] // len(number)), LANES * groups)
    flat = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in components.items()}
    codes, high, scale, zero = (flat.get(name, empty) for name in (*tilings.CODES, "scale", "zero"))
    tiles = tile_products.Tiles(
        tile_products.Tiling(*how), codes, high, scale, zero, whole,
        tile.table, tile.bias, tile.exponent, tile.nan, tile.unit, groups, len(tile.order),
    )  # fmt: skip
    source, columns = sources(tile.layout, shape, beside), tile.order
    if source is not None:
        columns = np.where(columns >= 0, source[columns], -1).astype(np.int32)
    order = activations.arrange(shape[1], how.block, columns)

    def multiply(x: Floats, out: Floats) -> None:
        found = tile_products.Activations(*activations.quantise(x, order, tile.unit))
        room = out if out.shape[1] == LANES * groups else np.empty((len(out), LANES * groups), F32)
        tile_products.multiply(tiles, found, room)
        if room is not out:
            out[:] = room[:, : out.shape[1]]

    return multiply


def _plain(layout: Layout, shape: Shape, parts: Arrays, of: Meaning) -> Multiply:
    """Steps by plain loops: for what no tile holds."""
    from packfmt.kernels import activations, plain_products

    steps, scale = weight_steps(layout, parts), weight_scales(layout, shape, parts, of)
    group = of.group or of.cols
    ends = np.array(
        [e for g in range(0, of.cols, group) for e in (*range(g + BLOCK, g + group, BLOCK), g + group)], np.int32
    )
    which = (ends - 1) // np.int32(group)
    source = sources(layout, shape, parts)
    order = activations.arrange(shape[1], ends, None if source is None else source.astype(np.int32))

    def multiply(x: Floats, out: Floats) -> None:
        q, _, factors = activations.quantise(x, order, of.unit)
        plain_products.multiply(steps, scale, ends, which, q, factors, out)

    return multiply


def _numbers(layout: Layout, shape: Shape, components: Arrays) -> Multiply:
    """Decoded numbers times float32 activations."""
    from packfmt.kernels import number_products

    return lambda x, out: number_products.multiply(fused.decode(layout, shape, components), x, out)
