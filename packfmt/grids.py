"""From codes to numbers. A grid is shared by every layout that computes the same way.

A grid is a function of a layout's parameters and the parts' rows; it returns float32. Parts are
named alike everywhere: `codes` (rows, cols), `scale`, `zero`, `codebook` ... A part with fewer
elements than `codes` along an axis is shared: one scale for every cols / scale columns.

Most numbers are a step, a small whole number, times a scale. Grids differ in how codes spell the steps
(`spellings`). Two layouts with the same grid and parts move as bits (`placement.repack`); two that spell
differently convert through their steps and scales (`respelling`), without rounding either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from packfmt import minifloat, outliers
from packfmt.errors import LayoutError
from packfmt.layout import Codes, Grid, Layout
from packfmt.placement import Array, Arrays, unpack
from packfmt.spellings import SPELLINGS, scales

F32 = np.float32
Floats = npt.NDArray[np.float32]
ANY_NUMBER = ("values", "outliers")  # parts that may hold NaN, or are looked at elsewhere
COLUMNS = ("columns", "column_values")  # parts that stand beside those of any grid
STRIP = 1 << 18  # weights computed at a time; keeps temporaries in the cache
SPQR_TILE = 16  # rows and columns that have numbers in common
TOGETHER = {"spqr": SPQR_TILE}  # rows that a grid computes together


# ---------------------------------------------------------------- formulas


def plain(parts: Arrays) -> Floats:
    """w = value, converted to float32 (round half to even; float64 may overflow to infinity)."""
    with np.errstate(over="ignore"):
        return parts["values"].astype(F32)


def affine(parts: Arrays, *, zero: int) -> Floats:
    """w = scale * (code - zero): the scale converted to float32, one float32 product."""
    steps = parts["codes"].astype(F32) - F32(zero)
    return _times(steps, _float32(parts["scale"]))


def quotient(parts: Arrays, *, zero: int) -> Floats:
    """w = (code - zero) / scale: the scale converted to float32, one float32 division."""
    steps = parts["codes"].astype(F32) - F32(zero)
    return _each(np.divide, steps, _float32(parts["scale"]))


def levels(parts: Arrays, *, values: tuple[float, ...]) -> Floats:
    """w = values[code] * scale: the scale converted to float32, one float32 product."""
    return _times(np.array(values, F32)[parts["codes"]], _float32(parts["scale"]))


def table(parts: Arrays, *, values: tuple[float, ...], exponent: int) -> Floats:
    """w = values[code] * 2**(scale - exponent): one float32 product, which rounds only below 2**-126.

    `scale` is a whole number of 0 to 255. A product beyond float32 becomes infinite.
    """
    steps = np.array(values, F32)[parts["codes"]]
    with np.errstate(over="ignore", invalid="ignore"):
        return _times(steps, np.ldexp(F32(1), parts["scale"].astype(np.int32) - exponent))


def scaled(parts: Arrays, *, element: str, scale: str, global_scale: str) -> Floats:
    """w = number(code) * s, where s is the scale's number, times or divided by the scale of the whole tensor.

    `element` names the codes' number format (`minifloat`), `scale` that of scales which are bytes; it is empty
    where scales are floats of their own. `global_scale` is "times", "divides" or empty. Both operations round
    to float32. `codes` are codes, or floats or whole numbers of eight bits whose bytes are the codes.
    """
    return _times(minifloat.numbers(element)[_bytes(parts["codes"])], scale_numbers(parts, scale, global_scale))


def either(parts: Arrays, *, element: str, other: str, global_scale: str) -> Floats:
    """`scaled`, where the sign of each float8 scale says which of two number formats its codes have.

    A scale without a sign means `element`, one with a sign `other`; its magnitude counts.
    """
    stored = parts["scale"].view(np.uint8)
    size = {**parts, "scale": (stored & np.uint8(127)).view(parts["scale"].dtype)}
    both = np.stack([minifloat.numbers(element), minifloat.numbers(other)])
    which = _spread((stored >> 7).astype(np.intp), parts["codes"].shape)
    return _times(both[which, parts["codes"]], scale_numbers(size, "", global_scale))


def hif4(parts: Arrays, *, element: str, scale: str) -> Floats:
    """w = number(code) * (scale * 2**(shift8 + shift4)): bits that double eight and four neighbours.

    `shift8` and `shift4` are 0 or 1. The doubled scale is exact, the product rounds to float32.
    """
    codes = parts["codes"]
    shift = _spread(parts["shift8"], codes.shape) + _spread(parts["shift4"], codes.shape)
    numbers = minifloat.numbers(element)[codes]
    with np.errstate(all="ignore"):
        weights: Floats = numbers * np.ldexp(_spread(minifloat.numbers(scale)[parts["scale"]], codes.shape), shift)
    return weights


def affine_zero(parts: Arrays) -> Floats:
    """w = (code - zero) * scale: a difference of whole numbers, the scale converted to float32, one float32 product.

    `zero` is a code that each group of weights has of its own.
    """
    steps = parts["codes"].astype(F32)
    return _times(_each(np.subtract, steps, parts["zero"].astype(F32)), _float32(parts["scale"]))


def codebook(parts: Arrays) -> Floats:
    """w = codebook[row, code], converted to float32: entries that each row has of its own.

    `codes` (rows, cols, 1), `codebook` (rows, 1, entries).
    """
    codes, tables = parts["codes"][..., 0], _float32(parts["codebook"][:, 0])
    each = np.repeat(tables, len(codes) // max(1, len(tables)), 0)
    return np.take_along_axis(each, codes.astype(np.intp), 1)


def augmented(parts: Arrays, *, residual: int, group: int, **params: str) -> Floats:
    """`scaled`, less the `residual` columns that are stored twice: of the last, every group is followed by its copy.

    `codes` (rows, cols + residual), perhaps with a third axis of one.
    """
    flat = {name: parts[name].reshape(parts[name].shape[:2]) for name in ("codes", "scale")}
    weights = scaled({**parts, **flat}, **params)
    return np.ascontiguousarray(weights[:, first_copies(weights.shape[1], residual, group)])


def first_copies(stored: int, residual: int, group: int) -> Array:
    """Which of so many stored columns are no copies, (stored - residual,)."""
    if not (type(group) is type(residual) is int and 0 < group <= residual and residual % group == 0):
        raise LayoutError(f"{residual!r} columns twice in groups of {group!r}, needs whole groups")
    index = np.arange(stored)
    twice = index - (stored - 2 * residual)
    kept: Array = index[(twice < 0) | (twice // group % 2 == 0)]
    return kept


def quads(parts: Arrays, *, stride: int, values: tuple[tuple[int, ...], ...]) -> Floats:
    """w = values[code][lane] * scale: a code stands for four weights, `stride` columns apart.

    `codes` (rows, cols / 4). Lane p of quad g is column g % stride + p * stride of the chunk g // stride
    of 4 * stride columns. The scale converted to float32, one float32 product.
    """
    return _sum(parts, "quads", {"stride": stride, "values": values})


def quads_in_fives(parts: Arrays, *, stride: int, values: tuple[tuple[int, ...], ...]) -> Floats:
    """`quads`, whose codes of 5 bits lie in words of 16, sixteen codes in five (`kernels.spell.read_fives`).

    `codes` (rows, cols / 64, 5).
    """
    return _sum(parts, "quads_in_fives", {"stride": stride, "values": values})


def base3(parts: Arrays, *, block: int, runs: tuple[tuple[int, int], ...], first: str) -> Floats:
    """w = (digit - 1) * scale: bytes hold several digits of base 3 (`kernels.spell.read_base3`).

    `codes` (rows, cols / block, bytes). The scale converted to float32, one float32 product.
    """
    return _sum(parts, "base3", {"block": block, "runs": runs, "first": first})


def planes(parts: Arrays, *, zero: int, ratio: int) -> Floats:
    """w = sum over planes of (code - zero) * scale, planes in order.

    `codes` (rows, planes, cols), `scale` (rows, planes, cols / group). Each product and each sum rounds to
    float32 on its own. With a `ratio` that is not 0 the planes share a scale, and plane p of n counts
    scale * ratio**(n - 1 - p), a float32 product.
    """
    return _sum(parts, "planes", {"zero": zero}, ratio)


def plane_digits(parts: Arrays, *, count: int, ratio: int) -> Floats:
    """`planes`, where one code holds a digit of base 3 of each of `count` planes, the first plane's the highest.

    `codes` (rows, 1, cols); a digit less 1 is the step.
    """
    return _sum(parts, "plane_digits", {"count": count}, ratio)


def plane_base3(parts: Arrays, *, block: int, runs: tuple[tuple[int, int], ...], first: str, ratio: int) -> Floats:
    """`planes`, each in bytes of base 3. `codes` (rows, planes, cols / block, bytes)."""
    return _sum(parts, "plane_base3", {"block": block, "runs": runs, "first": first}, ratio)


def pairs(parts: Arrays) -> Floats:
    """w = (digit - 1) * scale: a code is 3 * digit + digit of two neighbours, digits of base 3.

    `codes` (rows, cols / 2); from 9 on they are two zeros. The scale converted to float32, one float32 product.
    """
    return _sum(parts, "pairs", {})


def tl2(parts: Arrays, *, rows: int, cols: int, bm: int, bk: int) -> Floats:
    """w = step * scale: triples and pairs of steps in the tiles of bitnet.cpp (`kernels.tl2.read`).

    `codes` (n, m, bytes) of n * m matrices of (rows, cols), side by side and one below another, `scale` (n, m).
    The scale converted to float32, one float32 product.
    """
    return _sum(parts, "tl2", {"rows": rows, "cols": cols, "bm": bm, "bk": bk})


def ptq161(parts: Arrays) -> Floats:
    """Columns of the mask w = (code - salient_zero) * salient_scale; others w = (mean +- scale) * factor.

    `mask` (cols,) 0 or 1. The columns that it names, from the left, take the places of `codes` (rows, cols / 64, 13),
    the others those of `signs` (rows, cols / 64, 51) and `factor` (cols / 64, 51); sign 1 is plus. The rest is one
    number a row. Differences, sums and products round to float32 one by one.
    """
    few = parts["mask"].reshape(-1) == 1
    row = {name: parts[name].astype(F32).reshape(-1, 1) for name in ("salient_zero", "salient_scale", "scale", "mean")}
    codes, signs = (parts[name].reshape(row["scale"].size, -1) for name in ("codes", "signs"))
    if codes.shape[1] != (count := int(few.sum())):
        raise LayoutError(f"mask names {count} of {few.size} columns, needs {codes.shape[1]}")
    stored = np.empty((len(codes), few.size), F32)
    salient, others = stored[:, :count], stored[:, count:]
    with np.errstate(all="ignore"):
        np.subtract(codes.astype(F32), row["salient_zero"], out=salient)
        salient *= row["salient_scale"]
        np.subtract((signs == 1) * F32(2), F32(1), out=others)  # without a branch that nobody can foresee
        others *= row["scale"]
        others += row["mean"]
        others *= _float32(parts["factor"]).reshape(1, -1)
    return stored.take(np.where(few, np.cumsum(few), count + np.cumsum(~few)) - 1, 1)


def spqr(parts: Arrays) -> Floats:
    """w = s * (code - z), where s = ss * (scale - zs) and z = sz * (zero - zz), all codes of three bits.

    Every operation rounds to float16. ss, sz, zs and zz are float16, of 16 rows and as many columns as share a `scale`:
    the eight bytes of `second_order` (rows, groups) in rows 0, 2, 4 ... of the 16.
    """
    scale, zero, stored = parts["scale"], parts["zero"], parts["second_order"]
    tiles, groups = len(stored) // SPQR_TILE, stored.shape[1]
    halves = np.ascontiguousarray(stored.reshape(tiles, 8, 2, groups)[:, :, 0].transpose(0, 2, 1)).view("<f2")
    ss, sz, zs, zz = (halves[:, None, :, i] for i in range(4))
    with np.errstate(all="ignore"):
        s, z = (
            spqr_scales(codes.reshape(tiles, SPQR_TILE, groups), by, less)[..., None]
            for codes, by, less in ((scale, ss, zs), (zero, sz, zz))
        )
        numbers = ((np.arange(8, dtype=np.float16) - z) * s).astype(F32)
    codes = parts["codes"]
    each = codes.reshape(tiles, SPQR_TILE, groups, -1).astype(np.intp)
    return np.take_along_axis(numbers, each, 3).reshape(codes.shape)


def spqr_scales(codes: Array, by: npt.NDArray[np.float16], less: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """by * (code - less), of which both operations round to float16."""
    found: npt.NDArray[np.float16] = by * (codes.astype(np.float16) - less)
    return found


GRIDS: dict[str, Callable[..., Floats]] = {
    "plain": plain,
    "affine": affine,
    "quotient": quotient,
    "levels": levels,
    "table": table,
    "scaled": scaled,
    "either": either,
    "hif4": hif4,
    "affine_zero": affine_zero,
    "codebook": codebook,
    "augmented": augmented,
    "quads": quads,
    "quads_in_fives": quads_in_fives,
    "base3": base3,
    "planes": planes,
    "plane_digits": plane_digits,
    "plane_base3": plane_base3,
    "pairs": pairs,
    "tl2": tl2,
    "ptq161": ptq161,
    "spqr": spqr,
}


def scale_numbers(parts: Arrays, scale: str, global_scale: str) -> Floats:
    """The part `scale` as float32 numbers, that of the whole tensor or of each expert included (`scaled`)."""
    found = minifloat.numbers(scale)[parts["scale"]] if scale else _float32(parts["scale"])
    if not global_scale:
        return found
    function = {"times": np.multiply, "divides": np.divide}[global_scale]
    return _each(function, np.array(found), _float32(parts["global_scale"]).reshape(len(parts["global_scale"]), 1))


def _bytes(codes: Array) -> Array:
    """Codes as they are; numbers of eight bits as their bytes."""
    return codes if codes.dtype.kind == "u" else codes.view(np.uint8)


def _spread(shared: Array, shape: tuple[int, ...]) -> Array:
    """What several weights share, once for each."""
    return np.repeat(np.repeat(shared, shape[0] // max(1, shared.shape[0]), 0), shape[1] // max(1, shared.shape[1]), 1)


def _float32(scale: Array) -> Floats:
    """Rounded half to even; float64 may overflow to infinity."""
    with np.errstate(over="ignore"):
        return scale.astype(F32)


def _times(steps: Floats, scale: Floats) -> Floats:
    """Multiply each element by the scale that it shares."""
    return _each(np.multiply, steps, scale)


def _each(function: np.ufunc, steps: Floats, scale: Floats) -> Floats:
    """Combine each element with the scale that it shares, in place."""
    rows, cols = scale.shape
    split = steps.reshape(rows, steps.shape[0] // max(rows, 1), cols, steps.shape[1] // max(cols, 1))
    with np.errstate(all="ignore"):
        function(split, scale[:, None, :, None], out=split)
    return split.reshape(steps.shape)


def _sum(parts: Arrays, grid: str, params: Mapping[str, Any], ratio: int = 0) -> Floats:
    """Steps times scales, summed over planes."""
    spelling = SPELLINGS[grid]
    steps = spelling.read(parts["codes"], **params)
    scale = scales(parts["scale"], steps.shape[1], spelling, ratio)
    out = _times(steps[:, 0].astype(F32), scale[:, 0])
    for plane in range(1, steps.shape[1]):
        with np.errstate(all="ignore"):
            out += _times(steps[:, plane].astype(F32), scale[:, plane])
    return out


# ---------------------------------------------------------------- whole tensors


def dequantize(grid: Grid, parts: Arrays) -> Floats:
    """Parts -> (rows, cols) float32, by the grid's formula.

    With a part `perm`, column j as stored is the weight's column perm[j]. With parts `columns` (1, 1, n) and
    `column_values` (rows, 1, n), these columns of the weight, in their places, are these values.

    Raises
    ------
    LayoutError
        If no grid has this name, or not these parameters or parts.
    """
    if grid.name not in GRIDS:
        raise LayoutError(f"no grid is called {grid.name!r}; there are {', '.join(GRIDS)}")
    try:
        apart = [parts[name] for name in COLUMNS if name in parts]
        if apart:
            parts = {name: part[..., 0] for name, part in parts.items() if name not in COLUMNS}
        weights = GRIDS[grid.name](parts, **dict(grid.params))
        if "perm" in parts:
            weights = _unpermuted(weights, parts["perm"])
        return _replaced(weights, *apart) if apart else weights
    except (KeyError, TypeError, IndexError, ValueError, OverflowError, AttributeError) as error:
        raise LayoutError(f"grid {grid.name!r} cannot take these parts and parameters: {error}") from error


def _unpermuted(weights: Floats, perm: Array) -> Floats:
    """The weight whose column perm[j] is stored as column j."""
    order = perm.reshape(-1)
    if not np.array_equal(np.sort(order), np.arange(weights.shape[1])):
        raise LayoutError(f"perm does not name each of {weights.shape[1]} columns once")
    out = np.empty_like(weights)
    out[:, order] = weights
    return out


def _replaced(weights: Floats, columns: Array, values: Array) -> Floats:
    """The weight with some columns kept apart."""
    order = places(columns, weights.shape[1])
    weights[:, order] = _float32(values.reshape(len(weights), order.size))
    return weights


def places(columns: Array, cols: int) -> npt.NDArray[np.int64]:
    """The part `columns` as (n,) int64, each below `cols`."""
    if columns.dtype.kind not in "iu":
        raise LayoutError(f"columns are {columns.dtype}, needs whole numbers")
    order = columns.reshape(-1).astype(np.int64)
    if (wrong := order[(order < 0) | (order >= cols)]).size:
        raise LayoutError(f"columns names column {wrong[0]} of {cols}")
    return order


def decode(layout: Layout, shape: tuple[int, int], components: Arrays) -> Floats:
    """Components -> (rows, cols) float32, a strip of rows at a time on all threads.

    Raises
    ------
    LayoutError
        If a component is not what the layout says, or its grid does not fit its parts.
    """
    from packfmt.kernels import threads

    if layout.sparse:
        kept = outliers.names(layout)
        weights = decode(outliers.without(layout), shape, {k: v for k, v in components.items() if k not in kept})
        outliers.combine(layout, shape, components, weights)
        return weights
    rows, cols = shape
    if layout.axes[0].of != "rows":
        raise LayoutError(f"{layout.name}: its first axis is {layout.axes[0].name!r}, needs one of rows")
    found = unpack(layout, shape, components)
    streams = {s.name: found.pop(s.name) for s in layout.streams}
    parts = {name: _evenly(layout, shape, name, array) for name, array in found.items()}
    out = np.empty(shape, F32)
    # a strip is a whole number of the rows that share an element of any part, unless all rows share it
    shared = lcm(*(max(1, rows // max(1, p.shape[0])) for p in parts.values() if p.shape[0] != 1))
    shared = lcm(shared, TOGETHER.get(layout.grid.name, 1))
    step = shared * max(1, STRIP // max(1, cols * shared))
    if layout.axes[0].of != "rows" or layout.axes[0].per != 1:
        step = max(1, rows)

    def work(start: int, stop: int) -> None:
        for strip in range(start, stop):
            a, b = strip * step, min(rows, (strip + 1) * step)
            mine = {k: v if len(v) == 1 else v[a * len(v) // rows : b * len(v) // rows] for k, v in parts.items()}
            weights = dequantize(layout.grid, mine | streams)
            if weights.shape != (b - a, cols):
                raise LayoutError(f"{layout.name}: its grid gives {weights.shape}, a strip is {(b - a, cols)}")
            out[a:b] = weights

    if rows and cols:
        threads.spread(work, -(-rows // step))
    if layout.hadamard:
        from packfmt.kernels import hadamard

        hadamard.transform(out, layout.hadamard)
    return out


def _evenly(layout: Layout, shape: tuple[int, int], name: str, array: Array) -> Array:
    """A part whose last element along an axis has fewer sharers than the others, with one element a position there."""
    sides = {"rows": shape[0], "cols": shape[1]}
    for i, (axis, share) in enumerate(zip(layout.axes, layout.fit(*shape).parts[name].share, strict=True)):
        extent = axis.extent(sides)
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
        if (
            array.dtype.kind in "fV"
            and name not in ("values", "outliers")
            and (bad := int((~np.isfinite(array)).sum()))
        ):
            out.append(f"{bad} of {array.size} numbers of {name} are not finite")
    if layout.grid.name in ("base3", "plane_base3", "tl2") and (bad := _unused_bytes(layout.grid, parts["codes"])):
        out.append(f"{bad} of {parts['codes'].size} bytes of codes are none of those that digits of base 3 give")
    if "columns" in parts and len(np.unique(parts["columns"])) < parts["columns"].size:
        out.append("columns names a column twice")
    if layout.grid.name in ("scaled", "hif4", "augmented") and (format_ := layout.grid["scale"]):
        nan = np.isnan(minifloat.numbers(format_)[parts["scale"]])
        if bad := int(nan.sum()):
            out.append(f"{bad} of {nan.size} numbers of scale are {int(parts['scale'][nan][0])}, which means NaN")
    if layout.grid.name == "augmented" and (bad := _other_copies(layout.grid, parts)):
        out.append(f"{bad} columns that are stored twice differ from their copies")
    if layout.grid.name == "ptq161" and (got := int(parts["mask"].sum())) != (need := _salient(parts)):
        out.append(f"mask names {got} of {parts['mask'].size} columns, needs {need}")
    if layout.grid.name == "spqr" and (bad := _unlike_bytes(parts)):
        out.append(f"{bad} bytes of second_order differ between the two rows that have them")
    if "perm" in parts and not np.array_equal(np.sort(parts["perm"], None), np.arange(parts["perm"].size)):
        out.append(f"perm does not name each of {parts['perm'].size} columns once")
    if layout.grid.name == "table" and "scale" in parts and (bad := int((parts["scale"] == 255).sum())):
        out.append(f"{bad} of {parts['scale'].size} numbers of scale are 255, which E8M0 reserves for NaN")
    return out


def _other_copies(grid: Grid, parts: Arrays) -> int:
    """How many of the columns stored twice have other codes or scales in the second place."""
    codes, residual, group = parts["codes"][..., 0], grid["residual"], grid["group"]
    scale = _spread(parts["scale"][..., 0].view(np.uint8), codes.shape)
    keep = first_copies(codes.shape[1], residual, group)[-residual:]
    return int(((codes[:, keep] != codes[:, keep + group]) | (scale[:, keep] != scale[:, keep + group])).any(0).sum())


def _salient(parts: Arrays) -> int:
    """How many columns of a `ptq161` are in four bits."""
    return int(np.prod(parts["codes"].shape[1:]))


def _unlike_bytes(parts: Arrays) -> int:
    """How many bytes of a `spqr` that are stored twice are not the same in both rows."""
    stored = parts.get("second_order")
    if stored is None or len(stored) % 2:  # which decoding refuses
        return 0
    return int((stored[::2] != stored[1::2]).sum())


def _unused_bytes(grid: Grid, codes: Array) -> int:
    """How many bytes change when their digits are written again."""
    spelling, params = SPELLINGS[grid.name], {k: v for k, v in grid.params if k != "ratio"}
    again, _ = spelling.write(spelling.read(codes, **params), **params)
    return int((again != codes).sum())
