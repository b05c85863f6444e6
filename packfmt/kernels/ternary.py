"""Choose the steps -1, 0, 1 and their scales: the quantizers of the ternary formats.

A door takes (rows, cols) float32, finite and filling whole groups, and returns the parts of its
layout. Means are float64: sixteen sums, of every sixteenth quad or weight each, added in order; a
mean of equal magnitudes is therefore that magnitude. It rounds to float32, then to the scale's dtype.
A group depends on nothing but its own weights, so the number of threads cannot change a bit.

One scale may serve a group, a row or the whole tensor (`share`); the part always has one a group.

The rules of tq1_0, q1_0 and q2_0 are ggml's, byte for byte (d99724f2, src/ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable
from math import fsum
from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels import quantize, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.quantize import _inverse, _peak, _round_away

F32, F64 = np.float32, np.float64
ZERO, HALF, ONE = F32(0), F32(0.5), F32(1)
MAGNITUDE, MINUS_ZERO = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)  # a float32 without its sign; -0.0
AT_ONCE = 32  # quads in the inner loops
SUMS = 16
ROUNDS = 8  # of choosing zeros and scale in turn, with importance
LEAST_MEAN = F32(1e-5)  # of absmean


def sherry(
    weight: np.ndarray,
    stride: int,
    group: int,
    share: str = "group",
    importance: np.ndarray | None = None,
    dtype: str = "<f2",
    scale_rule: str = "mean",
) -> dict[str, np.ndarray]:
    """Three of four weights become a step of -1 or 1, the smallest of every quad zero: 3:4 sparse ternary.

    The first of equally small weights is the zero. The scale is the mean magnitude of those kept,
    which for these zeros is the least squared error; "amax", the reference encoder's rule, takes the
    peak of all instead. Kept zeros count as positive. Without importance no other choice of zeros has
    a smaller error, for a larger magnitude always gains more from being kept.

    With importance both are chosen in turn, to least sum of importance * error**2: the scale is the
    weighted mean, a quad's zero the lane that gains least from being kept. They start from the zeros
    above, and end when nothing changes or gets better, or after 8 rounds. Where all that is kept has
    importance zero, it is left out.

    Parameters
    ----------
    weight : (rows, cols) float32
    stride : columns between the lanes of a quad: 1, or 16, where 16 quads make 64 columns
    group : columns that share a scale, a multiple of 4 * stride
    share : "group", "row" or "tensor"
    importance : (rows or 1, cols) float32, finite and not negative, or None
    dtype : of the scale, "<f2" or "<f4"
    scale_rule : "mean" or "amax"; with importance "mean"

    Returns
    -------
    codes (rows, cols / 4) uint8 below 32; scale (rows, cols / group)

    Raises
    ------
    LayoutError
        If a scale overflows its dtype, or group, share or importance do not fit.

    Source: Huang et al., Sherry, arXiv 2601.07892, equation 5; AngelSlim 67394ce,
    special_quantizer.py SherryNMQuant; llama.cpp pull request 22836, quantize_row_stq1_0_ref ("amax")
    """
    if scale_rule not in ("mean", "amax") or (importance is not None and scale_rule != "mean"):
        raise LayoutError(f"sherry: scale rule {scale_rule!r}, needs 'mean', or without importance 'amax'")
    units = _units("sherry", weight, group, 4 * stride, share)
    codes = np.empty((len(units), units.shape[1] // 4), np.uint8)
    scale = np.empty(len(units), F32)
    bits = units.view(np.uint32)
    weighing = None if importance is None else _importance(importance, weight, units, share)

    def work(start: int, stop: int) -> None:
        mine = slice(start, stop)
        if weighing is None:
            peaks = np.empty(stop - start, np.uint32)
            _sherry(bits[mine], stride, codes[mine], scale[mine], peaks, scratch())
            if scale_rule == "amax":
                scale[mine] = peaks.view(F32)
        else:
            zeros = np.empty((2, codes.shape[1]), np.uint8)
            _weighted(units[mine], bits[mine], weighing, start, stride, codes[mine], scale[mine], zeros)

    _share(work, units)
    rows, cols = weight.shape
    return {"codes": codes.reshape(rows, cols // 4), "scale": _spread("sherry", weight, group, units, scale, dtype)}


def misfits(weight: np.ndarray, stride: int, group: int) -> int:
    """Quads that have not exactly one zero, in groups that are ternary: whose magnitudes but zero are all equal.

    0 for a model trained for this layout; many for one whose quads run the other way. Groups that are
    not ternary, such as those of a model before training, do not count, nor do those that are all zero.
    """
    units = _units("sherry", weight, group, 4 * stride, "group")
    counts = np.empty(len(units), np.int64)

    def work(start: int, stop: int) -> None:
        _misfits(units[start:stop], stride, counts[start:stop])

    _share(work, units)
    return int(counts.sum())


def ternary(
    weight: np.ndarray, group: int, share: str = "group", dtype: str = "<f2", name: str = "ternary"
) -> dict[str, np.ndarray]:
    """The steps and the scale of the least squared error, in every group, row or tensor.

    Of the k largest magnitudes kept, their mean is the scale, and the error falls by sum**2 / k; the k
    with the largest fall wins, the smallest of equals. The sums run down from the largest, in float64.
    Then, for the rounded scale, every weight beyond half of it becomes a step. Weights that are ternary
    already, with a magnitude that `dtype` has, stay exactly what they are.

    Parameters
    ----------
    weight : (rows, cols) float32
    group : columns that share a scale
    share : "group", "row" or "tensor"
    dtype : of the scale, "<f2" or "<f4"
    name : of the format, for errors

    Returns
    -------
    codes (rows, cols) uint8 below 3, for -1, 0, 1; scale (rows, cols / group)

    Raises
    ------
    LayoutError
        If a scale overflows its dtype, or group or share do not fit.
    """
    units = _units(name, weight, group, 1, share)
    scale = np.empty(len(units), F32)
    codes = np.empty(units.shape, np.uint8)
    bits = units.view(np.uint32)
    strip = max(1, quantize.LEAST_WEIGHTS // max(1, units.shape[1]))

    def choose(start: int, stop: int) -> None:
        for at in range(start, stop, strip):
            mine = slice(at, min(at + strip, stop))
            magnitude = bits[mine] & MAGNITUDE  # finite floats sort as their bits do
            magnitude.sort(1)
            _least_error(magnitude.view(F32), scale[mine])

    _share(choose, units)
    part = _spread(name, weight, group, units, scale, dtype)
    half = part.reshape(-1)[:: max(1, units.shape[1] // group)].astype(F32) * HALF

    def take(start: int, stop: int) -> None:
        _beyond(units[start:stop], half[start:stop], codes[start:stop])

    _share(take, units)
    return {"codes": codes.reshape(weight.shape), "scale": part}


def one_scale(weight: np.ndarray, name: str = "ternary") -> dict[str, np.ndarray]:
    """`ternary` with one float32 scale for the whole tensor: codes (rows, cols) uint8 below 3; scale (1, 1)."""
    if not weight.size:
        return {"codes": np.zeros(weight.shape, np.uint8), "scale": np.zeros((1, 1), F32)}
    parts = ternary(weight, weight.shape[1], "tensor", "<f4", name)
    return {"codes": parts["codes"], "scale": parts["scale"][:1]}


def absmean(weight: np.ndarray) -> dict[str, np.ndarray]:
    """BitNet b1.58: the mean magnitude of the tensor is the scale; steps are the nearest, ties to zero.

    The mean, in float32, is 1e-5 at least; a weight times 1 / mean rounds half to even and is cut to
    -1 .. 1, all in float32. The scale is the mean itself, what a step is worth.

    Returns codes (rows, cols) uint8 below 3; scale (1, 1) float32.

    Source: Ma et al., arXiv 2402.17764, section 2; transformers, integrations/bitnet.py WeightQuant
    """
    sums = np.empty(len(weight), F64)
    codes = np.empty(weight.shape, np.uint8)

    def add(start: int, stop: int) -> None:
        _sum_magnitudes(weight[start:stop], sums[start:stop], np.empty(SUMS))

    _share(add, weight)
    mean = max(LEAST_MEAN, F32(fsum(sums) / max(1, weight.size)))
    half = np.full(len(weight), HALF)
    per_step = ONE / mean

    def take(start: int, stop: int) -> None:
        _beyond(weight[start:stop] * per_step, half[start:stop], codes[start:stop])

    _share(take, weight)
    return {"codes": codes, "scale": np.full((1, 1), mean, F32)}


def q1_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """128 weights share their mean magnitude as a float16 scale; code 1 is plus, also for -0.0, code 0 minus.

    The sum of the mean is float32, weight by weight in their order, as in ggml's reference.

    Returns codes (rows, cols) uint8 below 2, scale (rows, cols / 128) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.

    Source: ggml d99724f2, src/ggml-quants.c quantize_row_q1_0_ref
    """
    codes, scale = quantize._blocks(_q1_0, weight, 128, np.uint8)
    return {"codes": codes, "scale": quantize._half("q1_0", scale)}


def q2_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """64 weights share their peak as a float16 scale; codes 0, 1, 2 are -1, 0, 1, ties away from zero.

    Code 3, two steps, is never reached, for no weight exceeds its peak.

    Returns codes (rows, cols) uint8 below 3, scale (rows, cols / 64) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.

    Source: ggml d99724f2, src/ggml-quants.c quantize_row_q2_0_ref
    """
    codes, scale = quantize._blocks(_q2_0, weight, 64, np.uint8)
    return {"codes": codes, "scale": quantize._half("q2_0", scale)}


def tq1_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The choice of tq2_0, to be spelled as base-3 bytes: 256 weights share their peak as a float16 scale.

    Returns codes (rows, cols) uint8 below 3, scale (rows, cols / 256) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.

    Source: ggml d99724f2, src/ggml-quants.c quantize_row_tq1_0_ref; gguf 0.19.0, gguf/quants.py TQ1_0
    """
    codes, scale = quantize._blocks(quantize._tq2_0, weight, 256, np.uint8)
    return {"codes": codes, "scale": quantize._half("tq1_0", scale)}


# ---------------------------------------------------------------- what the doors share


def _units(name: str, weight: np.ndarray, group: int, whole: int, share: str) -> np.ndarray:
    """The weights that share a scale, a unit a row."""
    rows, cols = weight.shape
    if share not in ("group", "row", "tensor"):
        raise LayoutError(f"{name}: a scale is shared by {share!r}, needs 'group', 'row' or 'tensor'")
    if group < 1 or group % whole or cols % group:
        raise LayoutError(f"{name}: groups of {group} in {cols} columns, needs a divisor that {whole} divides")
    return weight.reshape(-1, max(1, {"group": group, "row": cols, "tensor": rows * cols}[share]))


def _share(work: Callable[[int, int], None], units: np.ndarray) -> None:
    """Call work(first, end) for all units, on as many threads as they are worth."""
    threads.spread(work, len(units), -(-quantize.LEAST_WEIGHTS // max(1, units.shape[1])))


def _spread(name: str, weight: np.ndarray, group: int, units: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """One scale a unit -> one a group, (rows, cols / group), rounded half to even."""
    if dtype == "<f2":
        scale = quantize._half(name, scale)
    elif lost := int(np.count_nonzero(np.isinf(scale))):
        raise LayoutError(f"{name}: {lost} of {scale.size} scales overflow float32; use f32")
    rows, cols = weight.shape
    return np.repeat(scale, units.shape[1] // group).reshape(rows, cols // group)


def _importance(importance: np.ndarray, weight: np.ndarray, units: np.ndarray, share: str) -> np.ndarray:
    """Importance as units, which repeat where one row serves all."""
    rows, cols = weight.shape
    if importance.ndim != 2 or importance.shape[0] not in (1, rows) or importance.shape[1] != cols:
        raise LayoutError(f"importance is {importance.shape}, needs (1, {cols}) or ({rows}, {cols})")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise LayoutError("importance is not finite or negative somewhere, needs numbers from 0 up")
    if share == "tensor":
        importance = np.broadcast_to(importance, weight.shape)
    return np.ascontiguousarray(importance, F32).reshape(-1, units.shape[1])


# ---------------------------------------------------------------- Sherry


class Scratch(NamedTuple):
    """Where a loop over AT_ONCE quads keeps what belongs to one of them."""

    lanes: np.ndarray  # (4, AT_ONCE) uint32: bits of their weights
    kept: np.ndarray  # (3, AT_ONCE) uint32: bits of the magnitudes that they keep
    sizes: np.ndarray  # the same, as float32
    codes: np.ndarray  # (AT_ONCE,) uint8
    sums: np.ndarray  # (16,) float64


def scratch() -> Scratch:
    """What one thread's Sherry loops need."""
    kept = np.empty((3, AT_ONCE), np.uint32)
    codes = np.empty(AT_ONCE, np.uint8)
    return Scratch(np.empty((4, AT_ONCE), np.uint32), kept, kept.view(F32), codes, np.empty(SUMS))


@njit(cache=True, nogil=True)
def _lanes(bits, first, count, stride, lanes):
    """The four lanes of `count` quads from quad `first` on, for loops over quads; zeros beyond."""
    if count < AT_ONCE:
        for p in range(4):
            for g in range(AT_ONCE):
                lanes[p, g] = np.uint32(0)
    if stride == 1:
        for g in range(count):
            at = 4 * (first + g)
            lanes[0, g] = bits[at]
            lanes[1, g] = bits[at + 1]
            lanes[2, g] = bits[at + 2]
            lanes[3, g] = bits[at + 3]
        return
    for part in range(0, count, 16):
        at = 4 * (first + part)
        for p in range(4):
            for g in range(16):
                lanes[p, part + g] = bits[at + 16 * p + g]


@njit(cache=True, nogil=True)
def _code(a, b, c, d, zero):
    """The code of a quad from its lanes' bits and the lane that is zero.

    Bit 4 is the sign of the first lane kept, bits 3 and 2 the zero; bits 0 and 1 say whether the
    second and third lane kept have the other sign.
    """
    plus_a, plus_b, plus_c, plus_d = a <= MINUS_ZERO, b <= MINUS_ZERO, c <= MINUS_ZERO, d <= MINUS_ZERO
    one = plus_b if zero == np.uint32(0) else plus_a
    two = plus_c if zero <= np.uint32(1) else plus_b
    three = plus_c if zero == np.uint32(3) else plus_d
    code = np.uint32(0) if one else np.uint32(16)
    code = np.uint32(code | np.uint32(zero << np.uint32(2)))
    code = np.uint32(code | (np.uint32(0) if two == one else np.uint32(1)))
    return np.uint32(code | (np.uint32(0) if three == one else np.uint32(2)))


@njit(cache=True, nogil=True)
def _choose(lanes, kept, codes):
    """Codes of AT_ONCE quads, the magnitudes they keep, and the largest of these."""
    top = np.uint32(0)
    for g in range(AT_ONCE):
        a, b, c, d = lanes[0, g], lanes[1, g], lanes[2, g], lanes[3, g]
        size_a, size_b = np.uint32(a & MAGNITUDE), np.uint32(b & MAGNITUDE)
        size_c, size_d = np.uint32(c & MAGNITUDE), np.uint32(d & MAGNITUDE)
        front, back = min(size_a, size_b), min(size_c, size_d)
        in_front = np.uint32(1) if size_b < size_a else np.uint32(0)
        in_back = np.uint32(3) if size_d < size_c else np.uint32(2)
        zero = in_back if back < front else in_front
        codes[g] = np.uint8(_code(a, b, c, d, zero))
        largest, other = max(size_a, size_b), max(size_c, size_d)
        kept[0, g], kept[1, g], kept[2, g] = largest, other, max(front, back)
        top = max(top, max(largest, other))
    return top


@njit(cache=True, nogil=True)
def _add(sizes, sums):
    """Add what quads keep to sixteen sums: (larger of the first pair + larger of the second) + third."""
    for part in range(0, AT_ONCE, SUMS):
        for i in range(SUMS):
            g = part + i
            sums[i] += (F64(sizes[0, g]) + F64(sizes[1, g])) + F64(sizes[2, g])


@njit(cache=True, nogil=True)
def _total(sums):
    """The sixteen sums, added in order."""
    total = sums[0]
    for i in range(1, SUMS):
        total += sums[i]
    return total


@njit(cache=True, nogil=True)
def _sherry(bits, stride, codes, mean, peaks, room):
    quads = codes.shape[1]
    for unit in range(codes.shape[0]):
        top = np.uint32(0)
        for i in range(SUMS):
            room.sums[i] = 0.0
        for first in range(0, quads, AT_ONCE):
            count = min(AT_ONCE, quads - first)
            _lanes(bits[unit], first, count, stride, room.lanes)
            top = max(top, _choose(room.lanes, room.kept, room.codes))
            _add(room.sizes, room.sums)
            for g in range(count):
                codes[unit, first + g] = room.codes[g]
        mean[unit] = F32(_total(room.sums) / (3 * quads))
        peaks[unit] = top


@njit(cache=True, nogil=True)
def _column(quad, lane, stride):
    return quad // stride * (4 * stride) + quad % stride + lane * stride


@njit(cache=True, nogil=True)
def _weighted(units, bits, importance, number, stride, codes, scale, zeros):
    """Alternate between scale and zeros; `number` is the first unit's, zeros (2, quads) uint8 scratch."""
    quads = codes.shape[1]
    for unit in range(codes.shape[0]):
        x, w = units[unit], importance[(number + unit) % importance.shape[0]]
        now, best = 0, -1.0
        for quad in range(quads):
            zeros[0, quad] = _first_smallest(x, quad, stride)
        mean = 0.0
        for turn in range(ROUNDS + 1):
            total, whole, count = 0.0, 0.0, 0.0
            for quad in range(quads):
                for lane in range(4):
                    if lane != zeros[now, quad]:
                        j = _column(quad, lane, stride)
                        total += F64(w[j]) * F64(abs(x[j]))
                        whole += F64(w[j])
                        count += F64(abs(x[j]))
            if whole == 0.0:
                if best < 0.0:
                    mean, best = count / (3 * quads), 0.0
                else:
                    now = 1 - now
                break
            gain = total * (total / whole)  # by how much the error is below that of all zeros
            if gain <= best:
                now = 1 - now
                break
            mean, best = total / whole, gain
            if turn == ROUNDS:
                break
            changed = False
            for quad in range(quads):
                zero = _least_gain(x, w, quad, stride, mean)
                zeros[1 - now, quad] = zero
                changed |= zero != zeros[now, quad]
            if not changed:
                break
            now = 1 - now
        scale[unit] = F32(mean)
        for quad in range(quads):
            j = _column(quad, 0, stride)
            zero = np.uint32(zeros[now, quad])
            row = bits[unit]
            codes[unit, quad] = np.uint8(_code(row[j], row[j + stride], row[j + 2 * stride], row[j + 3 * stride], zero))


@njit(cache=True, nogil=True)
def _first_smallest(x, quad, stride):
    found = 0
    for lane in range(1, 4):
        if abs(x[_column(quad, lane, stride)]) < abs(x[_column(quad, found, stride)]):
            found = lane
    return found


@njit(cache=True, nogil=True)
def _least_gain(x, w, quad, stride, mean):
    """The lane that gains least from being kept: x**2 - (|x| - mean)**2 = mean * (2 |x| - mean), times w."""
    found, least = 0, 0.0
    for lane in range(4):
        j = _column(quad, lane, stride)
        gain = F64(w[j]) * (2.0 * F64(abs(x[j])) - mean)
        if lane == 0 or gain < least:
            found, least = lane, gain
    return found


@njit(cache=True, nogil=True)
def _misfits(units, stride, counts):
    for unit in range(units.shape[0]):
        x = units[unit]
        counts[unit] = 0
        size = ZERO
        for j in range(x.size):
            if x[j] != ZERO and abs(x[j]) != size:
                if size != ZERO:
                    size = ZERO  # a second magnitude: not ternary
                    break
                size = abs(x[j])
        if size == ZERO:
            continue
        for quad in range(x.size // 4):
            zeros = 0
            for lane in range(4):
                zeros += x[_column(quad, lane, stride)] == ZERO
            counts[unit] += zeros != 1


# ---------------------------------------------------------------- other loops


@njit(cache=True, nogil=True)
def _least_error(ascending, scale):
    """The mean of the k largest magnitudes whose sum**2 / k is largest; rows of `ascending` are sorted."""
    cols = ascending.shape[1]
    for unit in range(ascending.shape[0]):
        total, best, mean = 0.0, 0.0, 0.0
        for k in range(1, cols + 1):
            size = ascending[unit, cols - k]
            if size == ZERO:
                break
            total += F64(size)
            if k == cols or ascending[unit, cols - k - 1] != size:  # equal magnitudes are kept together
                fall = total * (total / k)
                if fall > best:
                    best, mean = fall, total / k
        scale[unit] = F32(mean)


@njit(cache=True, nogil=True)
def _beyond(weight, half, codes):
    """Codes 0, 1, 2: below -half, between, above half; what is as large as half is between."""
    for row in range(weight.shape[0]):
        edge = half[row]
        for j in range(weight.shape[1]):
            w = weight[row, j]
            codes[row, j] = np.uint8(1) + np.uint8(w > edge) - np.uint8(w < -edge)


@njit(cache=True, nogil=True)
def _sum_magnitudes(weight, found, sums):
    cols = weight.shape[1]
    for row in range(weight.shape[0]):
        for i in range(SUMS):
            sums[i] = 0.0
        whole = cols // SUMS * SUMS
        for j in range(0, whole, SUMS):
            for i in range(SUMS):
                sums[i] += F64(abs(weight[row, j + i]))
        for i in range(cols - whole):
            sums[i] += F64(abs(weight[row, whole + i]))
        found[row] = _total(sums)


@njit(cache=True, nogil=True)
def _q1_0(weight, bits, codes, scale):
    for row in range(weight.shape[0]):
        for block in range(scale.shape[1]):
            total = ZERO
            for j in range(128 * block, 128 * block + 128):
                total += abs(weight[row, j])
                codes[row, j] = np.uint8(weight[row, j] >= ZERO)
            scale[row, block] = total / F32(128)


@njit(cache=True, nogil=True)
def _q2_0(weight, bits, codes, scale):
    for row in range(weight.shape[0]):
        for block in range(scale.shape[1]):
            start, stop = 64 * block, 64 * block + 64
            step = abs(weight[row, _peak(bits[row], start, stop)])
            scale[row, block] = step
            per_step = _inverse(step)
            for j in range(start, stop):
                codes[row, j] = np.uint8(_round_away(weight[row, j] * per_step) + ONE)
