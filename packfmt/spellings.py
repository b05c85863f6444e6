"""How codes spell steps, the small whole numbers that scales multiply, and how steps are written as codes.

A code a weight, one for four of them, several in a byte of base 3, a plane after another: what two layouts
spell differently can still be the same numbers. A spelling reads a part `codes` into steps and writes steps
as codes, exactly, both ways; `grids` computes numbers from steps, `respelling` moves them to another layout.

Parameters may come from anybody's file: they are checked before a kernel sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import minifloat
from packfmt.errors import LayoutError
from packfmt.placement import Array

F32 = np.float32
Floats = npt.NDArray[np.float32]
Steps = npt.NDArray[Any]  # (rows, planes, cols) whole numbers
TRITS = (-1, 0, 1)
MOST_STEP = 1 << 14


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


def scales(scale: Array, count: int, spelling: Spelling, ratio: int = 0) -> Floats:
    """The part `scale` as (rows, planes, groups) float32: one a plane, or one for all if codes have no planes."""
    shape = scale.shape[:3] if spelling.plane_axis else (scale.shape[0], 1, scale.shape[1])
    with np.errstate(over="ignore"):
        out = scale.astype(F32).reshape(shape)
    if not ratio:
        return out
    weights = np.array([ratio**n for n in range(count - 1, -1, -1)], F32)
    with np.errstate(over="ignore", invalid="ignore"):
        tied: Floats = out * weights[None, :, None]
    return tied


def _read_affine(codes: Array, *, zero: int) -> Steps:
    wide: Any = np.int16 if codes.dtype.itemsize == 1 else np.int32
    steps: Steps = codes.astype(wide) - wide(zero)
    return steps.reshape(codes.shape[0], -1, codes.shape[-1])


def _write_affine(steps: Steps, *, zero: int) -> tuple[Array, None]:
    return steps[:, 0] + np.int16(zero), None


def _write_planes(steps: Steps, *, zero: int) -> tuple[Array, None]:
    return steps + np.int16(zero), None


def _read_levels(codes: Array, *, values: tuple[int, ...]) -> Steps:
    return np.array(values, np.int16)[codes][:, None]


def _write_levels(steps: Steps, *, values: tuple[int, ...]) -> tuple[Array, None]:
    low = min(values)
    codes = np.zeros(max(values) - low + 1, np.uint8)
    codes[np.array(values[::-1]) - low] = np.arange(len(values))[::-1]  # of two codes for a step the lower stays
    return codes[steps - low], None


def _quads_table(codes: Array | None, stride: int, values: tuple[tuple[int, ...], ...], count: int) -> Array:
    found = np.array(values)
    right = found.dtype.kind == "i" and found.shape[1:] == (4,) and 1 <= len(found) <= 81
    if not right or found.min() < -1 or found.max() > 1:
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

    if codes.dtype != np.uint16 or codes.ndim != 3 or codes.shape[2] != 5:
        raise LayoutError(f"codes are {codes.dtype} {codes.shape}, needs five words of 16 bits for 16 quads")
    return _read_quads(spell.read_fives(np.ascontiguousarray(codes)), **params)


def _write_fives(steps: Steps, **params: Any) -> tuple[Array, Array | None]:
    from packfmt.kernels import spell

    codes, bad = _write_quads(steps, **params)
    return spell.write_fives(codes), bad


def _runs_table(block: int, runs: tuple[tuple[int, int], ...], first: str, nbytes: int) -> tuple[Array, bool]:
    # in whole numbers of Python, which do not wrap: a kernel relies on this
    if not all(type(n) is int and type(d) is int and n > 0 and 1 <= d <= 5 for n, d in runs):
        raise LayoutError("runs: needs pairs of a count and 1 to 5 digits")
    digits, taken = sum(n * d for n, d in runs), sum(n for n, _ in runs)
    if type(block) is not int or (digits, taken) != (block, nbytes) or not block:
        raise LayoutError(f"runs of {digits} digits in {taken} bytes, needs {block} in {nbytes}")
    if first not in ("high", "low"):
        raise LayoutError(f"first {first!r}, needs high or low")
    return np.array(runs, np.int64), first == "high"


def _read_base3(codes: Array, *, block: int, runs: tuple[tuple[int, int], ...], first: str) -> Steps:
    from packfmt.kernels import spell

    if codes.dtype != np.uint8 or codes.ndim != 3:
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
    flat = codes.reshape(codes.shape[0], codes.shape[-1])
    every = np.arange(256)
    return np.stack([(every // 3 ** (count - 1 - p) % 3 - 1).astype(np.int8)[flat] for p in range(count)], 1)


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
    from packfmt.kernels import tl2

    if codes.size and int(codes.max()) >= len(tl2.PAIRS):
        raise LayoutError(f"code {int(codes.max())}, needs below {len(tl2.PAIRS)}")
    return tl2.PAIRS[codes.reshape(codes.shape[:2])].reshape(len(codes), 1, -1)


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


def unit(numbers: Floats) -> float:
    """The power of two of which all numbers are multiples, as few as can be; 0 if they are no numbers."""
    if not np.isfinite(numbers).all():
        return 0
    if not numbers.any():
        return 1
    mantissa, exponent = np.frexp(np.abs(numbers[numbers != 0]).astype(np.float64))
    whole = (mantissa * 2**24).astype(np.int64)
    return float(np.ldexp(1.0, int((exponent - 24 + np.log2(whole & -whole).astype(np.int64)).min(initial=127))))


def number_steps(element: str) -> npt.NDArray[np.int64]:
    """The step that each code of a number format is: its number in units of `unit`.

    Raises
    ------
    LayoutError
        If they are too many to be steps, or some are no numbers.
    """
    numbers = minifloat.numbers(element)
    if not has_steps(numbers):
        raise LayoutError(f"the numbers of {element} are no steps")
    return np.rint(numbers.astype(np.float64) / unit(numbers)).astype(np.int64)


def has_steps(numbers: Floats) -> bool:
    """Whether all numbers are finite, and few enough units."""
    each = unit(numbers)
    return bool(each and np.abs(numbers).max() / each <= MOST_STEP)


def _as_codes(codes: Array) -> Array:
    return codes if codes.dtype.kind == "u" else codes.view(np.uint8)


def _read_scaled(codes: Array, *, element: str, **_: Any) -> Steps:
    return number_steps(element).astype(np.int16)[_as_codes(codes)][:, None]


def _write_scaled(steps: Steps, *, element: str, **_: Any) -> tuple[Array, None]:
    return _write_levels(steps, values=tuple(number_steps(element).tolist()))


def _read_table(codes: Array, *, values: tuple[int, ...], **_: Any) -> Steps:
    return _read_levels(codes, values=values)


def _write_table(steps: Steps, *, values: tuple[int, ...], **_: Any) -> tuple[Array, None]:
    return _write_levels(steps, values=values)


def _whole_steps(low: int, count: int, /, *, zero: int) -> tuple[float, ...]:
    return tuple(code - zero for code in range(low, low + count))


def _level_steps(low: int, count: int, /, *, values: tuple[float, ...]) -> tuple[float, ...]:
    return values


def _scaled_steps(low: int, count: int, /, *, element: str, **_: Any) -> tuple[float, ...]:
    return tuple(number_steps(element).tolist())


def _table_steps(low: int, count: int, /, *, values: tuple[float, ...], **_: Any) -> tuple[float, ...]:
    return values


def _trits(low: int, count: int, /, **params: Any) -> tuple[float, ...]:
    return TRITS


AFFINE = Spelling(_read_affine, _write_affine, _whole_steps)
LEVELS = Spelling(_read_levels, _write_levels, _level_steps)
SCALED = Spelling(_read_scaled, _write_scaled, _scaled_steps)
TABLE = Spelling(_read_table, _write_table, _table_steps)
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
    "scaled": SCALED,
    "table": TABLE,
    "quads": QUADS,
    "quads_in_fives": FIVES,
    "base3": BASE3,
    "planes": PLANES,
    "plane_digits": PLANE_DIGITS,
    "plane_base3": PLANE_BASE3,
    "pairs": PAIRS,
    "tl2": TL2,
}
