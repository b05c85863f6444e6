"""Choose a uniform grid for each group of a row, so that the squared error is least: ranges may leave weights out.

The door takes (rows, cols) float32, finite, and what an error costs at each place. A group depends on nothing but its
own weights and costs, and every sum has one order, so threads and vectors cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels import simd
from packfmt.kernels.cache import njit
from packfmt.kernels.codebooks import mask_of
from packfmt.kernels.scaled import LANES, importance_of, known, share_rows
from packfmt.kernels.simd import (
    addf,
    as_floats,
    ints_of,
    load_floats16,
    mulf,
    same_float,
    select_below,
    store,
    subf,
    zero_floats,
)
from packfmt.kernels.tiles import LARGEST, LEAST, _total
from packfmt.kernels.trit_planes import MOST, _half

F32 = np.float32
ZERO = F32(0)
INFINITE = F32(np.inf)
WHOLE = F32(2.0**23)  # x + WHOLE - WHOLE is the whole number nearest to 0 <= x < WHOLE, of two the even one
LEAST_HALF, LEAST_SINGLE = LEAST["<f2"], LEAST["<f4"]
WIDEST = 1.125  # of the range is tried after the range itself
FINER = (0, 0, 5, 5, 5, 6, 6, 7, 7)  # by bits: then what is narrower by 2**-5 of it ...
WORSE, NARROWEST = 2.0, 2.0**-12  # times the least error, and of the range: the search ends
SPLITS = 5  # ways to share out between the ends what the grid leaves out of the range
ROUNDS = 32  # of the refinement, which ends when nothing is gained


def clip(
    weight: np.ndarray,
    bits: int,
    group: int,
    importance: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    dtype: str = "<f2",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, zero and codes of groups of columns, w = (code - zero) * scale, of the least squared error that is found.

    The range of a group goes from min to max, both drawn to 0, in 2**bits - 1 steps. Tried are grids of the range, of
    9/8 of it, of 31/32 of that (5 and 6 bits: 63/64; 7 and 8 bits: 127/128) and so on, until the error is more than
    twice the least, the scale is the smallest of its dtype, or 2**-12 of the range is left. Each has five zeros: that
    which keeps the low end, that which keeps the high end, and three evenly between.

    The best of all, the first of equals, is refined: to its codes belong the scales that fit them best with the same
    zero, one less and one more; the best of these takes its place if its error is less, until none is.

    Codes are w / scale + zero, clipped. Both operations are float32 and round on their own, as does the code: half to
    even. Errors are computed from weights in steps of the range, in float32, in sixteen sums by column; the rest is
    float64.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    bits : 2 to 8
    group : columns that share a scale, a divisor of cols; 0: all
    importance : (1 or rows, cols) float32, 0 or more: what a squared error costs; 1 everywhere if there is none
    mask : (1 or rows, cols) bool, False where a weight does not count, as where importance is 0
    dtype : of the scale: "<f2" or "<f4"

    Returns
    -------
    scale (rows, groups) float32, all of them numbers of `dtype`, zero (rows, groups) uint8, codes (rows, cols) uint8,
    both below 2**bits. All are 0 for a group of zeros, or where nothing counts

    Raises
    ------
    LayoutError
        If all scales of a group overflow float16, or if bits, group, dtype, or the shape of importance or mask are not
        as stated.
    """
    known(dtype, "clip", ("<f2", "<f4"), "scale dtype")
    if not 2 <= bits <= 8:
        raise LayoutError(f"clip: {bits} bits, needs 2 to 8")
    rows, cols = weight.shape
    columns = group or max(1, cols)
    if columns < 1 or cols % columns:
        raise LayoutError(f"clip: {cols} columns, needs a multiple of the group, {group}")
    weight = np.ascontiguousarray(weight, F32)
    costs, counts = importance_of(weight, importance), mask_of(weight, mask)
    scale = np.empty((rows, cols // columns), F32)
    zero = np.empty(scale.shape, np.uint8)
    codes = np.empty(weight.shape, np.uint8)

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # where scales are infinite
            _clip(weight, costs, counts, start, stop, bits, dtype == "<f2", _desk(columns), scale, zero, codes)

    share_rows(work, weight)
    if lost := int(np.isinf(scale).sum()):
        raise LayoutError(f"clip: {lost} of {scale.size} scales overflow float16; use f32")
    return scale, zero, codes


class Desk(NamedTuple):
    """What a thread works with: a group, filled up with zeros to whole vectors, and sums."""

    steps: np.ndarray  # (size,) float32: weights in steps of the range, 0 where they do not count
    weighs: np.ndarray  # (size,) float32: costs in units of the largest, 0 where weights do not count
    sums: np.ndarray  # (LANES,) float32


def _desk(columns: int) -> Desk:
    size = -(-columns // LANES) * LANES
    return Desk(steps=np.zeros(size, F32), weighs=np.zeros(size, F32), sums=np.zeros(LANES, F32))


def _loop(version: str) -> Callable[..., None]:
    """The loop over groups; the version is part of the key under which compiled code is kept."""

    @njit(cache=True, nogil=True)
    def _groups(weight, costs, counts, start, stop, bits, half, desk, scale, zero, codes):
        """Rows start to stop."""
        version  # noqa: B018
        columns = codes.shape[1] // max(1, scale.shape[1])
        most = (1 << bits) - 1
        for row in range(start, stop):
            cost, count = costs[row % costs.shape[0]], counts[row % counts.shape[0]]
            for part in range(scale.shape[1]):
                first, last = part * columns, part * columns + columns
                unit = _load(weight[row, first:last], cost[first:last], count[first:last], most, desk)
                one, moved_by = ZERO, 0
                if unit[1] > 0.0:
                    one, moved_by = _search(unit[0], unit[1], bits, most, half, desk)
                scale[row, part], zero[row, part] = one, np.uint8(moved_by)
                _encode(weight[row, first:last], one, F32(moved_by), F32(most), codes[row, first:last])

    return _groups


@njit(cache=True, nogil=True)
def _load(block, costs, counts, most, desk):
    """A group to the desk; where its range begins in steps, at most 0, and a step, 0 if the range is empty."""
    steps, weighs = desk.steps, desk.weighs
    top, low, high = ZERO, ZERO, ZERO
    for j in range(block.shape[0]):
        weighs[j] = costs[j] if counts[j] else ZERO
        top = max(top, weighs[j])
        if weighs[j] > ZERO:
            low, high = min(low, block[j]), max(high, block[j])
    unit = (np.float64(high) - np.float64(low)) / np.float64(most)
    if unit > 0.0:
        for j in range(block.shape[0]):
            steps[j] = F32(np.divide(np.float64(block[j]), unit)) if weighs[j] > ZERO else ZERO
            weighs[j] = np.divide(weighs[j], top)
        return np.divide(np.float64(low), unit), unit
    return 0.0, 0.0


@njit(cache=True, nogil=True)
def _search(low, unit, bits, most, half, desk):
    """Scale and zero of a group; infinite if all overflow."""
    one, moved_by, least = INFINITE, 0, np.inf
    factor, following, narrower = 1.0, WIDEST, 1.0 - 0.5 ** FINER[bits]
    here_least = 0.0
    while factor > NARROWEST and not here_least > WORSE * least:
        # where the low end is the first code, and where the high end is the last
        keeps_low = -low / factor
        keeps_high = np.float64(most) - (np.float64(most) + low) / factor
        before, here_least = -1, np.inf
        for split in range(SPLITS):
            share = np.float64(split) / np.float64(SPLITS - 1)
            here = np.int64(np.rint(min(max(keeps_low + (keeps_high - keeps_low) * share, 0.0), np.float64(most))))
            if here != before:
                tried = _rounded(unit * factor, here, most, half)
                error = _error(tried, here, most, unit, desk)
                here_least = min(here_least, error)
                if error < least:
                    one, moved_by, least = tried, here, error
            before = here
        if unit * factor < (LEAST_HALF if half else LEAST_SINGLE):
            break
        factor, following = following, following * narrower
    for _ in range(ROUNDS):
        now, before_one = moved_by, one
        for here in range(max(now - 1, 0), min(now + 1, most) + 1):
            step = _fitting(before_one, now, here, most, unit, desk)
            if step > 0.0:
                tried = _rounded(step, here, most, half)
                error = _error(tried, here, most, unit, desk)
                if error < least:
                    one, moved_by, least = tried, here, error
        if one == before_one and moved_by == now:
            break
    return one, moved_by


@njit(cache=True, nogil=True)
def _rounded(step, zero, most, half):
    """A scale of the dtype; infinite where float16 has none, and never so large that a weight is no float32."""
    if half:
        one = F32(_half(step))
        return max(one, LEAST_HALF) if one <= F32(MOST) else INFINITE
    away = np.float64(max(zero, most - zero))
    one = F32(step)
    if np.float64(one) * away > LARGEST:
        one = F32(np.divide(np.float64(LARGEST), away))
        if np.float64(one) * away > LARGEST:
            one = np.nextafter(one, ZERO)
    return max(one, LEAST_SINGLE)


@njit(cache=True, nogil=True)
def _error(one, zero, most, unit, desk):
    """The squared error of the group in the desk, in squared steps of its range; infinite where the scale is."""
    ratio = np.divide(np.float64(one), unit)
    if ratio == np.inf:
        return ratio
    _add_errors(desk.steps, desk.weighs, F32(np.divide(1.0, ratio)), F32(zero), F32(most), desk.sums)
    return _total(desk.sums) * (ratio * ratio)


@njit(cache=True, nogil=True)
def _add_plainly(steps, weighs, per_step, zero, most, sums):
    """sums[lane]: of columns lane, lane + 16 ... the cost of the squared distance to the nearest code."""
    sums[:] = ZERO
    for first in range(0, steps.shape[0], LANES):
        for lane in range(LANES):
            moved = F32(F32(steps[first + lane] * per_step) + zero)
            off = F32(moved - np.rint(min(max(moved, ZERO), most)))
            sums[lane] += F32(weighs[first + lane] * F32(off * off))


@njit(cache=True, nogil=True)
def _clipped(x, most):
    """Between 0 and most, in lanes."""
    low, high = same_float(ZERO), same_float(most)
    x = as_floats(select_below(x, low, ints_of(low), ints_of(x)))
    return as_floats(select_below(high, x, ints_of(high), ints_of(x)))


@njit(cache=True, nogil=True)
def _add_vectors(steps, weighs, per_step, zero, most, sums):
    """`_add_plainly`, sixteen columns at a time."""
    total, scale, shift, whole = zero_floats(), same_float(per_step), same_float(zero), same_float(WHOLE)
    for first in range(0, steps.shape[0], LANES):
        moved = addf(mulf(load_floats16(steps, 4 * first), scale), shift)
        off = subf(moved, subf(addf(_clipped(moved, most), whole), whole))
        total = addf(total, mulf(load_floats16(weighs, 4 * first), mulf(off, off)))
    store(sums, 0, total)


@njit(cache=True, nogil=True)
def _fitting(one, zero, other, most, unit, desk):
    """The scale that fits the codes of one grid best with another zero; 0 if there is none."""
    per_step = F32(np.divide(unit, np.float64(one)))
    across, along = 0.0, 0.0
    for j in range(desk.steps.shape[0]):
        moved = F32(F32(desk.steps[j] * per_step) + F32(zero))
        away = np.float64(np.rint(min(max(moved, ZERO), F32(most)))) - np.float64(other)
        weighs = np.float64(desk.weighs[j])
        across += weighs * (away * np.float64(desk.steps[j]))
        along += weighs * (away * away)
    return unit * np.divide(across, along) if along > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _encode(block, one, zero, most, codes):
    """The nearest codes, or zeros where there is no scale."""
    codes[:] = 0
    if one > ZERO:
        for j in range(block.shape[0]):
            code = np.rint(min(max(F32(np.divide(block[j], one) + zero), ZERO), most))
            codes[j] = np.uint8(np.int32(code))


_add_errors = _add_plainly if simd.INTERPRETED else _add_vectors
_clip = _loop(simd.VERSION)
