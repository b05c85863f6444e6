"""From codes to numbers. A grid is shared by every layout that computes the same way.

A grid is a function of a layout's parameters and the parts' rows; it returns float32. Parts are
named alike everywhere: `codes` (rows, cols), `scale`, `zero`, `codebook` ... A part with fewer
elements than `codes` along an axis is shared: one scale for every cols / scale columns.

Most numbers are a step, a small whole number, times a scale. Grids differ in how codes spell the steps
(`Spelling`): a code a weight, one for four of them, several in a byte of base 3, planes that add up.
What spells steps can be read as steps and written as other codes, so two layouts with the same parts
move as bits (`placement.repack`), and two that spell differently convert through their steps and
scales (`respelling`), without rounding either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import lcm
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.layout import Codes, Grid, Layout
from packfmt.placement import Array, Arrays, unpack

F32 = np.float32
Floats = npt.NDArray[np.float32]
Steps = npt.NDArray[Any]  # (rows, planes, cols) whole numbers
STRIP = 1 << 18  # weights computed at a time; keeps temporaries in the cache
TRITS = (-1, 0, 1)


# ---------------------------------------------------------------- formulas


def plain(parts: Arrays) -> Floats:
    """w = value, converted to float32 (round half to even; float64 may overflow to infinity)."""
    with np.errstate(over="ignore"):
        return parts["values"].astype(F32)


def affine(parts: Arrays, *, zero: int) -> Floats:
    """w = scale * (code - zero): the scale converted to float32, one float32 product."""
    steps = parts["codes"].astype(F32) - F32(zero)
    return _times(steps, parts["scale"].astype(F32))


def quotient(parts: Arrays, *, zero: int) -> Floats:
    """w = (code - zero) / scale: the scale converted to float32, one float32 division."""
    steps = parts["codes"].astype(F32) - F32(zero)
    return _each(np.divide, steps, parts["scale"].astype(F32))


def levels(parts: Arrays, *, values: tuple[float, ...]) -> Floats:
    """w = values[code] * scale: the scale converted to float32, one float32 product."""
    return _times(np.array(values, F32)[parts["codes"]], parts["scale"].astype(F32))


def table(parts: Arrays, *, values: tuple[float, ...], exponent: int) -> Floats:
    """w = values[code] * 2**(scale - exponent): one float32 product, which rounds only below 2**-126.

    `scale` is a whole number of 0 to 255. A product beyond float32 becomes infinite.
    """
    steps = np.array(values, F32)[parts["codes"]]
    with np.errstate(over="ignore", invalid="ignore"):
        return _times(steps, np.ldexp(F32(1), parts["scale"].astype(np.int32) - exponent))


def quads(parts: Arrays, *, stride: int, values: tuple[tuple[int, ...], ...]) -> Floats:
    """w = values[code][lane] * scale: a code stands for four weights, `stride` columns apart.

    `codes` (rows, cols / 4). Lane p of quad g is column g % stride + p * stride of the chunk g // stride
    of 4 * stride columns. The scale converted to float32, one float32 product.
    """
    return _sum(parts, QUADS, {"stride": stride, "values": values})


def quads_in_fives(parts: Arrays, *, stride: int, values: tuple[tuple[int, ...], ...]) -> Floats:
    """`quads`, whose codes of 5 bits lie in words of 16, sixteen codes in five (`kernels.spell.read_fives`).

    `codes` (rows, cols / 64, 5).
    """
    return _sum(parts, FIVES, {"stride": stride, "values": values})


def base3(parts: Arrays, *, block: int, runs: tuple[tuple[int, int], ...], first: str) -> Floats:
    """w = (digit - 1) * scale: bytes hold several digits of base 3 (`kernels.spell.read_base3`).

    `codes` (rows, cols / block, bytes). The scale converted to float32, one float32 product.
    """
    return _sum(parts, BASE3, {"block": block, "runs": runs, "first": first})


def planes(parts: Arrays, *, zero: int, ratio: int) -> Floats:
    """w = sum over planes of (code - zero) * scale, planes in order.

    `codes` (rows, planes, cols), `scale` (rows, planes, cols / group). Each product and each sum rounds to
    float32 on its own. With a `ratio` that is not 0 the planes share a scale, and plane p of n counts
    scale * ratio**(n - 1 - p), a float32 product.
    """
    return _sum(parts, PLANES, {"zero": zero}, ratio)


def plane_digits(parts: Arrays, *, count: int, ratio: int) -> Floats:
    """`planes`, where one code holds a digit of base 3 of each of `count` planes, the first plane's the highest.

    `codes` (rows, 1, cols); a digit less 1 is the step.
    """
    return _sum(parts, PLANE_DIGITS, {"count": count}, ratio)


def plane_base3(parts: Arrays, *, block: int, runs: tuple[tuple[int, int], ...], first: str, ratio: int) -> Floats:
    """`planes`, each in bytes of base 3. `codes` (rows, planes, cols / block, bytes)."""
    return _sum(parts, PLANE_BASE3, {"block": block, "runs": runs, "first": first}, ratio)


def pairs(parts: Arrays) -> Floats:
    """w = (digit - 1) * scale: a code is 3 * digit + digit of two neighbours, digits of base 3.

    `codes` (rows, cols / 2); from 9 on they are two zeros. The scale converted to float32, one float32 product.
    """
    return _sum(parts, PAIRS, {})


def tl2(parts: Arrays, *, rows: int, cols: int, bm: int, bk: int) -> Floats:
    """w = step * scale: triples and pairs of steps in the tiles of bitnet.cpp (`kernels.tl2.read`).

    `codes` (n, m, bytes) of n * m matrices of (rows, cols), side by side and one below another, `scale` (n, m).
    The scale converted to float32, one float32 product.
    """
    return _sum(parts, TL2, {"rows": rows, "cols": cols, "bm": bm, "bk": bk})


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
    out = np.empty((len(codes), few.size), F32)
    with np.errstate(all="ignore"):
        out[:, few] = (codes.astype(F32) - row["salient_zero"]) * row["salient_scale"]
        two = np.where(signs == 1, row["mean"] + row["scale"], row["mean"] - row["scale"])
        out[:, ~few] = two * parts["factor"].astype(F32).reshape(1, -1)
    return out


GRIDS: dict[str, Callable[..., Floats]] = {
    "plain": plain,
    "affine": affine,
    "quotient": quotient,
    "levels": levels,
    "table": table,
    "quads": quads,
    "quads_in_fives": quads_in_fives,
    "base3": base3,
    "planes": planes,
    "plane_digits": plane_digits,
    "plane_base3": plane_base3,
    "pairs": pairs,
    "tl2": tl2,
    "ptq161": ptq161,
}


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


def _sum(parts: Arrays, spelling: Spelling, params: Mapping[str, Any], ratio: int = 0) -> Floats:
    steps = spelling.read(parts["codes"], **params)
    scale = scales(parts["scale"], steps.shape[1], spelling, ratio)
    out = _times(steps[:, 0].astype(F32), scale[:, 0])
    for plane in range(1, steps.shape[1]):
        with np.errstate(all="ignore"):
            out += _times(steps[:, plane].astype(F32), scale[:, plane])
    return out


def scales(scale: Array, count: int, spelling: Spelling, ratio: int = 0) -> Floats:
    """The part `scale` as (rows, planes, groups) float32: one a plane, or one for all if codes have no planes."""
    shape = scale.shape[:3] if spelling.plane_axis else (scale.shape[0], 1, scale.shape[1])
    out = scale.astype(F32).reshape(shape)
    if not ratio:
        return out
    weights = F32(ratio) ** np.arange(count - 1, -1, -1).astype(F32)
    with np.errstate(over="ignore"):
        tied: Floats = out * weights[None, :, None]
    return tied


# ---------------------------------------------------------------- spellings


class Spelling(NamedTuple):
    """How codes spell steps.

    read : codes, and the grid's parameters -> (rows, planes, cols) whole numbers
    write : the inverse; returns codes, and a bool for each of them that no code spells, or None if all are spelled
    steps : lowest code, number of codes, and the grid's parameters -> what a step can be
    plane_axis : whether codes and scales have an axis of planes after that of rows
    """

    read: Callable[..., Steps]
    write: Callable[..., tuple[Array, Array | None]]
    steps: Callable[..., tuple[float, ...]]
    plane_axis: bool = False


def _read_affine(codes: Array, *, zero: int) -> Steps:
    return (codes.astype(np.int16) - np.int16(zero)).reshape(codes.shape[0], -1, codes.shape[-1])


def _write_affine(steps: Steps, *, zero: int) -> tuple[Array, None]:
    return steps[:, 0] + np.int16(zero), None


def _write_planes(steps: Steps, *, zero: int) -> tuple[Array, None]:
    return steps + np.int16(zero), None


def _read_levels(codes: Array, *, values: tuple[int, ...]) -> Steps:
    return np.array(values, np.int16)[codes][:, None]


def _write_levels(steps: Steps, *, values: tuple[int, ...]) -> tuple[Array, None]:
    low = min(values)
    codes = np.zeros(max(values) - low + 1, np.uint8)
    codes[np.array(values) - low] = np.arange(len(values))
    return codes[steps - low], None


def _quads_table(codes: Array | None, stride: int, values: tuple[tuple[int, ...], ...], count: int) -> Array:
    found = np.array(values)
    if found.dtype.kind != "i" or found.shape[1:] != (4,) or not 1 <= len(found) <= 81 or np.abs(found).max() > 1:
        raise LayoutError("values: needs up to 81 quads of -1, 0 and 1")
    if type(stride) is not int or not 1 <= stride <= count or count % stride:
        raise LayoutError(f"stride {stride!r}, needs to divide {count} quads")
    if codes is not None and codes.size and int(codes.max()) >= len(found):
        raise LayoutError(f"code {int(codes.max())}, needs below {len(found)}")
    return found.astype(np.int8)


def _read_quads(codes: Array, *, stride: int, values: tuple[tuple[int, ...], ...]) -> Steps:
    from packfmt.kernels import spell

    flat = np.ascontiguousarray(codes.reshape(codes.shape[:2]), np.uint8)
    if not flat.size:
        return np.zeros((flat.shape[0], 1, 4 * flat.shape[1]), np.int8)
    return spell.read_quads(flat, _quads_table(flat, stride, values, flat.shape[1]), stride)[:, None]


def _write_quads(steps: Steps, *, stride: int, values: tuple[tuple[int, ...], ...]) -> tuple[Array, Array | None]:
    from packfmt.kernels import spell

    flat = np.ascontiguousarray(steps[:, 0], np.int8)
    if not flat.size:
        return np.zeros((flat.shape[0], flat.shape[1] // 4), np.uint8), None
    return spell.write_quads(flat, _quads_table(None, stride, values, flat.shape[1] // 4), stride)


def contiguous_quads(cols: int, stride: int) -> Array:
    """(cols,) uint32: perm[j] is the column stored as column j, so that quads `stride` apart are neighbours."""
    chunk = np.arange(4 * stride, dtype=np.uint32)
    place = chunk // stride + 4 * (chunk % stride)
    return (np.arange(0, cols, 4 * stride, dtype=np.uint32)[:, None] + place).reshape(-1)


def _read_fives(codes: Array, **params: Any) -> Steps:
    from packfmt.kernels import spell

    if codes.dtype != np.uint16 or codes.shape[-1] != 5:
        raise LayoutError(f"codes are {codes.dtype} {codes.shape}, needs five words of 16 bits for 16 quads")
    return _read_quads(spell.read_fives(np.ascontiguousarray(codes)), **params)


def _write_fives(steps: Steps, **params: Any) -> tuple[Array, Array | None]:
    from packfmt.kernels import spell

    codes, bad = _write_quads(steps, **params)
    return spell.write_fives(codes), bad


def _runs_table(block: int, runs: tuple[tuple[int, int], ...], first: str, nbytes: int) -> tuple[Array, bool]:
    found = np.array(runs)
    if found.dtype.kind != "i" or found.shape[1:] != (2,) or found.min() < 1 or found[:, 1].max() > 5:
        raise LayoutError("runs: needs pairs of a count and 1 to 5 digits")
    if int(found[:, 0].sum()) != nbytes or type(block) is not int or int(found.prod(1).sum()) != block:
        raise LayoutError(f"runs of {found.prod(1).sum()} digits in {found[:, 0].sum()} bytes, needs {block} in {nbytes}")
    if first not in ("high", "low"):
        raise LayoutError(f"first {first!r}, needs high or low")
    return found.astype(np.int64), first == "high"


def _read_base3(codes: Array, *, block: int, runs: tuple[tuple[int, int], ...], first: str) -> Steps:
    from packfmt.kernels import spell

    if codes.dtype != np.uint8 or codes.ndim < 3:
        raise LayoutError(f"codes are {codes.dtype} {codes.shape}, needs bytes of blocks")
    found, high_first = _runs_table(block, runs, first, codes.shape[-1])
    return spell.read_base3(np.ascontiguousarray(codes), block, found, high_first)[:, None]


def _write_base3(steps: Steps, *, block: int, runs: tuple[tuple[int, int], ...], first: str) -> tuple[Array, None]:
    from packfmt.kernels import spell

    found, high_first = _runs_table(block, runs, first, sum(count for count, _ in runs))
    return spell.write_base3(np.ascontiguousarray(steps[:, 0], np.int8), block, found, high_first), None


def _read_plane_digits(codes: Array, *, count: int) -> Steps:
    if type(count) is not int or not 1 <= count <= 5:
        raise LayoutError(f"count {count!r}, needs 1 to 5")
    flat = codes.reshape(codes.shape[0], codes.shape[-1]).astype(np.int16)
    return np.stack([flat // 3 ** (count - 1 - p) % 3 - 1 for p in range(count)], 1)


def _write_plane_digits(steps: Steps, *, count: int) -> tuple[Array, None]:
    weights = np.array([3 ** (count - 1 - p) for p in range(count)], np.int16)
    return ((steps + 1) * weights[None, :, None]).sum(1, dtype=np.int16)[:, None], None


def _read_plane_base3(codes: Array, **params: Any) -> Steps:
    rows, count = codes.shape[:2]
    return _read_base3(codes.reshape(rows * count, *codes.shape[2:]), **params).reshape(rows, count, -1)


def _write_plane_base3(steps: Steps, **params: Any) -> tuple[Array, None]:
    rows, count, cols = steps.shape
    codes, _ = _write_base3(steps.reshape(rows * count, 1, cols), **params)
    return codes.reshape(rows, count, *codes.shape[1:]), None


def _read_pairs(codes: Array) -> Steps:
    from packfmt.kernels.tl2 import PAIRS as steps

    if codes.size and int(codes.max()) >= len(steps):
        raise LayoutError(f"code {int(codes.max())}, needs below {len(steps)}")
    return steps[codes.reshape(codes.shape[:2])].reshape(len(codes), 1, -1)


def _write_pairs(steps: Steps) -> tuple[Array, None]:
    return 3 * steps[:, 0, ::2] + steps[:, 0, 1::2] + 4, None


def _read_tl2(codes: Array, *, rows: int, cols: int, bm: int, bk: int) -> Steps:
    from packfmt.kernels import tl2

    nbytes = sum(tl2.areas(rows, cols, bm, bk)[1:])
    if codes.ndim != 3 or codes.shape[2] != nbytes:
        raise LayoutError(f"codes are {codes.shape}, needs {nbytes} bytes for a matrix of {(rows, cols)}")
    down, along, _ = codes.shape
    out = np.empty((down, rows, along, cols), np.int8)
    for i, j in np.ndindex(down, along):
        out[i, :, j] = tl2.read(codes[i, j], rows, cols, bm, bk)
    return out.reshape(down * rows, 1, along * cols)


def _write_tl2(steps: Steps, *, rows: int, cols: int, bm: int, bk: int) -> tuple[Array, None]:
    from packfmt.kernels import tl2

    nbytes = sum(tl2.areas(rows, cols, bm, bk)[1:])
    cut = steps.reshape(steps.shape[0] // rows, rows, steps.shape[2] // cols, cols)
    out = np.empty((len(cut), cut.shape[2], nbytes), np.uint8)
    for i, j in np.ndindex(out.shape[:2]):
        out[i, j] = tl2.write(cut[i, :, j], bm, bk)
    return out, None


def _whole_steps(low: int, count: int, /, *, zero: int) -> tuple[float, ...]:
    return tuple(range(low - zero, low + count - zero))


def _level_steps(low: int, count: int, /, *, values: tuple[float, ...]) -> tuple[float, ...]:
    return values


def _trits(low: int, count: int, /, **params: Any) -> tuple[float, ...]:
    return TRITS


AFFINE = Spelling(_read_affine, _write_affine, _whole_steps)
LEVELS = Spelling(_read_levels, _write_levels, _level_steps)
QUADS = Spelling(_read_quads, _write_quads, _trits)
FIVES = Spelling(_read_fives, _write_fives, _trits)
BASE3 = Spelling(_read_base3, _write_base3, _trits)
PAIRS = Spelling(_read_pairs, _write_pairs, _trits)
TL2 = Spelling(_read_tl2, _write_tl2, _trits)
PLANES = Spelling(_read_affine, _write_planes, _whole_steps, True)
PLANE_DIGITS = Spelling(_read_plane_digits, _write_plane_digits, _trits, True)
PLANE_BASE3 = Spelling(_read_plane_base3, _write_plane_base3, _trits, True)
SPELLINGS = {
    "affine": AFFINE,
    "quotient": AFFINE,
    "levels": LEVELS,
    "quads": QUADS,
    "quads_in_fives": FIVES,
    "base3": BASE3,
    "planes": PLANES,
    "plane_digits": PLANE_DIGITS,
    "plane_base3": PLANE_BASE3,
    "pairs": PAIRS,
    "tl2": TL2,
}


# ---------------------------------------------------------------- whole tensors


def dequantize(grid: Grid, parts: Arrays) -> Floats:
    """Parts -> (rows, cols) float32, by the grid's formula.

    With a part `perm`, column j as stored is the weight's column perm[j].

    Raises
    ------
    LayoutError
        If no grid has this name, or not these parameters or parts.
    """
    if grid.name not in GRIDS:
        raise LayoutError(f"no grid is called {grid.name!r}; there are {', '.join(GRIDS)}")
    try:
        weights = GRIDS[grid.name](parts, **dict(grid.params))
        return _unpermuted(weights, parts["perm"]) if "perm" in parts else weights
    except (KeyError, TypeError, IndexError, ValueError, OverflowError, AttributeError) as error:
        raise LayoutError(f"grid {grid.name!r} cannot take these parts and parameters: {error}") from error


def _unpermuted(weights: Floats, perm: Array) -> Floats:
    """The weight whose column perm[j] is stored as column j."""
    out = np.zeros_like(weights)
    out[:, perm.reshape(-1)] = weights
    return out


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
    # a strip is a whole number of the rows that share an element of any part, unless all rows share it
    shared = lcm(*(max(1, rows // max(1, p.shape[0])) for p in parts.values() if p.shape[0] != 1))
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
    if layout.grid.name in ("base3", "plane_base3", "tl2") and (bad := _unused_bytes(layout.grid, parts["codes"])):
        out.append(f"{bad} of {parts['codes'].size} bytes of codes are none of those that digits of base 3 give")
    if layout.grid.name == "ptq161" and (got := int(parts["mask"].sum())) != (need := _salient(parts)):
        out.append(f"mask names {got} of {parts['mask'].size} columns, needs {need}")
    if "perm" in parts and not np.array_equal(np.sort(parts["perm"], None), np.arange(parts["perm"].size)):
        out.append(f"perm does not name each of {parts['perm'].size} columns once")
    if layout.grid.name == "table" and "scale" in parts and (bad := int((parts["scale"] == 255).sum())):
        out.append(f"{bad} of {parts['scale'].size} numbers of scale are 255, which E8M0 reserves for NaN")
    return out


def _salient(parts: Arrays) -> int:
    """How many columns of a `ptq161` are in four bits."""
    return int(np.prod(parts["codes"].shape[1:]))


def _unused_bytes(grid: Grid, codes: Array) -> int:
    """How many bytes change when their digits are written again."""
    spelling, params = SPELLINGS[grid.name], {k: v for k, v in grid.params if k != "ratio"}
    again, _ = spelling.write(spelling.read(codes, **params), **params)
    return int((again != codes).sum())
