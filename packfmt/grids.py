"""From codes to numbers. A grid is shared by every layout that computes the same way.

A grid is a function of a layout's parameters and the parts' rows; it returns float32. Parts are
named alike everywhere: `codes` (rows, cols), `scale`, `zero`, `codebook` ... A part with fewer
elements than `codes` along an axis is shared: one scale for every cols / scale columns.

Two layouts with the same grid, the same parts and the same grouping convert into each other
without rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.layout import Codes, Grid, Layout
from packfmt.placement import Array, Arrays, unpack

F32 = np.float32
Floats = npt.NDArray[np.float32]
STRIP = 1 << 18  # weights computed at a time; keeps temporaries in the cache


def plain(parts: Arrays) -> Floats:
    """w = value, converted to float32 (round half to even; float64 may overflow to infinity)."""
    with np.errstate(over="ignore"):
        return parts["values"].astype(F32)


def affine(parts: Arrays, *, zero: int) -> Floats:
    """w = scale * (code - zero): the scale converted to float32, one float32 product."""
    steps = parts["codes"].astype(F32) - F32(zero)
    return _times(steps, parts["scale"].astype(F32))


def table(parts: Arrays, *, values: tuple[float, ...], exponent: int) -> Floats:
    """w = values[code] * 2**(scale - exponent): one float32 product, which rounds only below 2**-126.

    `scale` is a whole number of 0 to 255. A product beyond float32 becomes infinite.
    """
    steps = np.array(values, F32)[parts["codes"]]
    with np.errstate(over="ignore", invalid="ignore"):
        return _times(steps, np.ldexp(F32(1), parts["scale"].astype(np.int32) - exponent))


def _times(steps: Floats, scale: Floats) -> Floats:
    """Multiply each element by the scale that it shares."""
    rows, cols = scale.shape
    split = steps.reshape(rows, steps.shape[0] // max(rows, 1), cols, steps.shape[1] // max(cols, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        split *= scale[:, None, :, None]
    return split.reshape(steps.shape)


GRIDS: dict[str, Callable[..., Floats]] = {"plain": plain, "affine": affine, "table": table}


def dequantize(grid: Grid, parts: Arrays) -> Floats:
    """Parts -> (rows, cols) float32, by the grid's formula.

    Raises
    ------
    LayoutError
        If no grid has this name, or not these parameters or parts.
    """
    if grid.name not in GRIDS:
        raise LayoutError(f"no grid is called {grid.name!r}; there are {', '.join(GRIDS)}")
    try:
        return GRIDS[grid.name](parts, **dict(grid.params))
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise LayoutError(f"grid {grid.name!r} cannot take these parts and parameters: {error}") from error


def decode(layout: Layout, shape: tuple[int, int], components: Arrays) -> Floats:
    """Components -> (rows, cols) float32, a strip of rows at a time on all threads.

    Raises
    ------
    LayoutError
        If a component is not what the layout says, or its grid does not fit its parts.
    """
    from packfmt.kernels import threads

    rows, cols = shape
    found = unpack(layout, shape, components)
    streams = {s.name: found.pop(s.name) for s in layout.streams}
    parts = {name: _evenly(layout, shape, name, array) for name, array in found.items()}
    out = np.empty(shape, F32)
    # a strip is a whole number of the rows that share an element of any part
    shared = lcm(*(max(1, rows // max(1, p.shape[0])) for p in parts.values()))
    step = shared * max(1, STRIP // max(1, cols * shared))
    if layout.axes[0].of != "rows" or layout.axes[0].per != 1:
        step = max(1, rows)

    def work(start: int, stop: int) -> None:
        for strip in range(start, stop):
            a, b = strip * step, min(rows, (strip + 1) * step)
            mine = {k: v[a * len(v) // rows : b * len(v) // rows] for k, v in parts.items()}
            weights = dequantize(layout.grid, mine | streams)
            if weights.shape != (b - a, cols):
                raise LayoutError(f"{layout.name}: its grid gives {weights.shape}, a strip is {(b - a, cols)}")
            out[a:b] = weights

    if rows and cols:
        threads.spread(work, -(-rows // step))
    return out


def _evenly(layout: Layout, shape: tuple[int, int], name: str, array: Array) -> Array:
    """A part whose last element along an axis has fewer sharers than the others, with one element a position there."""
    sides = {"rows": shape[0], "cols": shape[1]}
    for i, (axis, share) in enumerate(zip(layout.axes, layout.fit(*shape).parts[name].share, strict=True)):
        extent = sides[axis.of] // axis.per if axis.of else axis.size
        if array.shape[i] > 1 and extent % share:
            array = np.repeat(array, share, i)[(slice(None),) * i + (slice(extent),)]
    return array


def findings(layout: Layout, parts: Arrays) -> list[str]:
    """What no encoder writes, in words: scales that are no number, codes that are never used."""
    out = []
    levels = {m.name: m.levels for _, m, _ in layout.members() if isinstance(m, Codes)}
    for name, array in parts.items():
        if (most := levels.get(name)) and (bad := int((array >= most).sum())):
            out.append(f"{bad} of {array.size} {name} are {most} or above, which no encoder writes")
        if array.dtype.kind in "fV" and name != "values" and (bad := int((~np.isfinite(array)).sum())):
            out.append(f"{bad} of {array.size} numbers of {name} are not finite")
    if layout.grid.name == "table" and "scale" in parts and (bad := int((parts["scale"] == 255).sum())):
        out.append(f"{bad} of {parts['scale'].size} numbers of scale are 255, which E8M0 reserves for NaN")
    return out
