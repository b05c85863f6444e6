"""Fit planes of trits: w = t1 * a1 + t2 * a2 + ..., where each t is -1, 0 or 1 and a group shares the scales.

A door takes (rows, cols) float32, finite, and returns trits and float16 scales. What a group becomes
depends on nothing but its own weights: neither on threads nor on the machine's vectors.

The rules, all of them about magnitudes, for the trits of -w are those of w, negated:

- `big` are the magnitudes of a group, descending, and sums[k] is the sum of the k largest, added in that
  order. The weights that take a level are a run of `big`; so a round of fitting needs a few binary
  searches and no pass over the weights.
- Levels are sums of trit times scale, planes in order. A weight takes the nearest: two neighbours x < y part
  at 0.5 * (x + y). In the middle, and among codes that give the same level, the first in `_codes` wins: zero,
  then fewer nonzero trits, then finer (later) planes.
- The normal equations of the scales are summed over the levels, ascending.
- Numbers are float64 unless said otherwise, and every operation rounds on its own.

Source: PTQTP (arXiv 2509.16989), algorithm 1 and equations 3 to 10; constants and the order of the
candidates as in fucina, src/ptqtp.zig (0f9ac4d), the only code that is public.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels import threads
from packfmt.kernels.cache import njit

LEAST_WEIGHTS = 1 << 14  # worth a thread
LANES = 16  # groups that are sorted side by side
MOST_PLANES = 4
MAGNITUDE = np.int32(0x7FFFFFFF)  # a float32 without its sign
TRIT = np.int32(3)  # two bits
NONE, ONE = np.uint64(0), np.uint64(1)  # an index without a sign needs no care for negative ones

MOST = 65504.0  # the largest float16
LEAST_NORMAL = 2.0**-14  # of float16; below it float16 has the multiples of 2**-24
TO_FINE = 1.5 * 2.0**28  # x + TO_FINE - TO_FINE is a multiple of 2**-24
SPLIT = 2.0**42 + 1.0  # leaves the first 11 bits of a float64
BELOW = 2.0**-53  # x - BELOW * x is the float64 before x

RIDGE, MOST_RIDGE, MOST_CONDITION = 1e-8, 1.0, 1e6  # of the paper
CLOSE = 1e-4  # the paper stops when its scales move less
LEAST_PIVOT = 1e-9  # far below the pivots of a regular matrix of small whole numbers

GAIN = 2.0**-36  # one more plane must gain this part of the group's energy, far more than rounding feigns
# Where fits of two planes begin, in units of the best single plane's scale: each reaches minima that the
# others miss. On normal, heavy-tailed and real weights the squared error ends within 0.3 % of the best of 240 starts'.
PAIRS = np.array([(1.0, 1.0), (1.7, 1.7), (1.2, 0.18), (0.6, 0.54), (1.2, 1.2), (2.0, 1.7), (1.4, 0.21), (1.4, 1.33)])
TRIALS = len(PAIRS) + 1  # and where the paper ends
TRYOUT = 4  # rounds, after which only the best goes on
# where one more plane begins beside those found, in units of the root mean square error that they leave
MORE = np.array([2.0, 3.0, 4.0, 5.0])
# where the step of tied planes begins, in units of the step that puts the outermost level on the peak
STEPS = np.array([0.6, 0.75, 0.9, 1.0, 1.1])


def fit(
    weight: np.ndarray, group: int = 128, planes: int = 2, tied: bool = False, rounds: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """The best trits and scales that a few starts find, each refined by nearest levels and least squares in turn.

    Every group, as decoded: one plane is the best there is (of all trits and float16 scales); one more plane
    never makes the squared error larger; two planes are never worse than `fit_paper`; a weight's error is
    never larger than with any of the planes alone. Scales are >= 0 and fall from plane to plane. A plane
    that gains nothing has scale 0 and trits 0, so groups that are ternary already come back exactly.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    group : columns that share scales; a divisor of cols
    planes : 1 to 4
    tied : one scale a group, plane p of n counts scale * 3**(n - 1 - p): all levels are equally far apart
    rounds : of refinement at most, 1 or more

    Returns
    -------
    trits (rows, planes, cols) int8, scale (rows, planes, cols / group) float16; tied: (rows, 1, cols / group)

    Raises
    ------
    LayoutError
        If a group's best single plane overflows float16, or cols, group or planes are not as stated.
    """
    return _share(weight, group, planes, tied, False, rounds)


def fit_paper(weight: np.ndarray, group: int = 128, rounds: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """The two planes of PTQTP, algorithm 1.

    Both planes begin as the signs of the weights. In turn: scales by least squares with a ridge of 1e-8,
    ten times larger, up to 1, as long as the condition (Frobenius) is above 1e6; the nearest of the nine
    levels. After `rounds` rounds, or when the scales move less than 1e-4, scales become nonnegative (a plane
    is negated with its scale) and float16, and the nearest levels are found once more.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    group : columns that share scales; a divisor of cols
    rounds : 1 or more

    Returns
    -------
    trits (rows, 2, cols) int8, scale (rows, 2, cols / group) float16

    Raises
    ------
    LayoutError
        If a scale overflows float16, or cols and group are not as stated.
    """
    return _share(weight, group, 2, False, True, rounds)


def _share(weight, group, planes, tied, paper, rounds):
    """Fit all groups, on as many threads as they are worth."""
    rows, cols = weight.shape
    if not 1 <= planes <= MOST_PLANES:
        raise LayoutError(f"trit planes: {planes} planes, needs 1 to {MOST_PLANES}")
    if group < 1 or cols % group:
        raise LayoutError(f"trit planes: {cols} columns, needs a multiple of the group, {group}")
    groups = cols // group
    trits = np.empty((rows, planes, groups, group), np.int8)
    scale = np.empty((rows, 1 if tied else planes, groups), np.float32)
    bits = np.ascontiguousarray(weight, np.float32).view(np.int32).reshape(rows * groups, group)

    def work(start: int, stop: int) -> None:
        here = bits[start * groups : stop * groups]
        _fit(here, trits[start:stop], scale[start:stop], CODES, tied, paper, rounds, _desk(group))

    threads.spread(work, rows, -(-LEAST_WEIGHTS // max(1, cols)))
    if lost := int(np.count_nonzero(np.isinf(scale))):
        raise LayoutError(f"trit planes: {lost} of {scale.size} scales overflow float16; use bf16 or mxfp4")
    return trits.reshape(rows, planes, cols), scale.astype(np.float16)


def _codes(planes):
    """(codes, planes) int64: zero, then the trits of all other levels, each or its negation, as ties are decided."""
    zero = (0,) * planes
    half = [code for code in product((-1, 0, 1), repeat=planes) if code > zero]
    half.sort(key=lambda code: (sum(map(abs, code)), [abs(trit) for trit in code], code))
    return np.array([zero, *half], np.int64)


CODES = tuple(map(_codes, range(MOST_PLANES + 1)))


class Desk(NamedTuple):
    """What a thread works with: LANES groups side by side, and of one of them what its fit needs."""

    keys: np.ndarray  # (group * LANES,) int32: magnitudes as bits, which sort as their floats do
    floats: np.ndarray  # the same as float32
    table: np.ndarray  # (group + 1, LANES): row k has the sums of the k largest
    energy: np.ndarray  # (LANES,): sums of squares
    single: np.ndarray  # (LANES,): the best single plane's scale
    gained: np.ndarray  # (LANES,): energy less squared error with it
    big: np.ndarray  # (2**depth,): magnitudes, descending, then zeros
    depth: np.uint64
    sums: np.ndarray  # (group + 1,)
    scale: np.ndarray  # (MOST_PLANES,): the best so far
    trial: np.ndarray  # (MOST_PLANES,)
    coarse: np.ndarray  # (TRIALS,): scales of two planes, several fits at a time
    fine: np.ndarray
    gains: np.ndarray  # energy less squared error of each
    level: np.ndarray  # (codes,): levels, ascending from 0
    code: np.ndarray  # (codes,) int64: the row of `_codes` that gives the level, negative if negated
    above: np.ndarray  # (codes,) int64: weights beyond each level
    gram: np.ndarray  # (MOST_PLANES, MOST_PLANES): the normal equations, lower half
    right: np.ndarray  # (MOST_PLANES,): and their right side, later their solution
    packed: np.ndarray  # (group,) int32: trits plus 1, two bits each


def _desk(group):
    keys = np.zeros(group * LANES, np.int32)
    depth = (group - 1).bit_length()
    levels = len(CODES[MOST_PLANES])
    return Desk(
        keys=keys,
        floats=keys.view(np.float32),
        table=np.zeros((group + 1, LANES)),
        energy=np.zeros(LANES),
        single=np.zeros(LANES),
        gained=np.zeros(LANES),
        big=np.zeros(1 << depth),
        depth=np.uint64(depth),
        sums=np.zeros(group + 1),
        scale=np.zeros(MOST_PLANES),
        trial=np.zeros(MOST_PLANES),
        coarse=np.zeros(TRIALS),
        fine=np.zeros(TRIALS),
        gains=np.zeros(TRIALS),
        level=np.zeros(levels),
        code=np.zeros(levels, np.int64),
        above=np.zeros(levels, np.int64),
        gram=np.zeros((MOST_PLANES, MOST_PLANES)),
        right=np.zeros(MOST_PLANES),
        packed=np.zeros(group, np.int32),
    )


@njit(cache=True, nogil=True)
def _fit(bits, trits, scale, codes, tied, paper, rounds, desk):
    """bits (rows * groups, group) int32, trits (rows, planes, groups, group), scale (rows, planes or 1, groups)."""
    best, trial = desk.scale, desk.trial
    planes, groups, size = trits.shape[1], trits.shape[2], trits.shape[3]
    for first in range(0, bits.shape[0], LANES):
        _load(bits, first, desk)
        if not paper:
            _single(desk)
        for lane in range(min(LANES, bits.shape[0] - first)):
            row, place = (first + lane) // groups, (first + lane) % groups
            best[:] = 0.0
            _take(lane, size, desk)
            if paper:
                _paper(rounds, desk)
                _half_trial(2, desk)
                best[0], best[1] = trial[0], trial[1]
            else:
                best[0] = desk.single[lane]
                if best[0] > MOST:
                    best[:] = np.inf
                elif best[0] > 0.0:  # without a single plane no level is small enough
                    for count in range(2, planes + 1):
                        if tied:
                            _tied(codes[count], lane, rounds, desk)
                        elif count == 2:
                            _two(codes[count], lane, rounds, desk)
                        else:
                            _more(codes[count], lane, rounds, desk)
            for p in range(scale.shape[1]):
                x = best[planes - 1] if tied else best[p]
                scale[row, p, place] = x if x <= MOST else np.inf
            if best[planes - 1] <= MOST:
                _write(bits[first + lane], codes[planes], lane, desk, trits[row, :, place])


# ---------------------------------------------------------------- groups side by side


@njit(cache=True, nogil=True)
def _load(bits, first, desk):
    """Sort the magnitudes of LANES groups, descending, and add them up; groups beyond the last are zeros."""
    keys, floats, table, energy = desk.keys, desk.floats, desk.table, desk.energy
    size = bits.shape[1]
    for lane in range(LANES):
        if first + lane < bits.shape[0]:
            for i in range(size):
                keys[i * LANES + lane] = bits[first + lane, i] & MAGNITUDE
        else:
            for i in range(size):
                keys[i * LANES + lane] = np.int32(0)
    _sort(keys, size)
    energy[:] = 0.0
    for i in range(size):
        before, after, x = table[i], table[i + 1], floats[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            after[lane] = before[lane] + np.float64(x[lane])
            energy[lane] += np.float64(x[lane]) * np.float64(x[lane])


@njit(cache=True, nogil=True)
def _sort(keys, size):
    """Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M), largest first."""
    top = 1
    while 2 * top < size:
        top *= 2
    p = top
    while p > 0:
        q, r, apart = top, 0, p
        while apart > 0:
            i = r
            while i < size - apart:
                run = min(p, size - apart - i)  # neighbours, each compared with the one `apart` further on
                upper = keys[i * LANES : (i + run) * LANES]
                lower = keys[(i + apart) * LANES : (i + apart + run) * LANES]
                for j in range(run * LANES):
                    x, y = upper[j], lower[j]
                    upper[j] = max(x, y)
                    lower[j] = min(x, y)
                i += 2 * p
            apart = q - p
            q //= 2
            r = p
        p //= 2


@njit(cache=True, nogil=True)
def _half(x):
    """x >= 0 rounded to float16, half to even, but 65536 or more where that is infinite.

    Veltkamp's splitting rounds to nearest; that its ties go to even here, the tests show for all of them.
    """
    fine = (x + TO_FINE) - TO_FINE
    large = x * SPLIT
    return fine if fine < LEAST_NORMAL else large - (large - x)


@njit(cache=True, nogil=True)
def _single(desk):
    """The best float16 scale of a single plane of every group.

    With the k largest weights at +-s the squared error is the energy less s * (2 * sums[k] - k * s). The best s
    for a k is the float16 nearest to their mean; the first k of equals.
    """
    table, single, gained = desk.table, desk.single, desk.gained
    single[:] = 0.0
    gained[:] = 0.0
    for k in range(1, table.shape[0]):
        count, total = np.float64(k), table[k]
        for lane in range(LANES):
            s = _half(total[lane] / count)
            gain = s * (2.0 * total[lane] - count * s)
            better = gain > gained[lane]
            single[lane] = s if better else single[lane]
            gained[lane] = gain if better else gained[lane]


@njit(cache=True, nogil=True)
def _take(lane, size, desk):
    """Lay out the magnitudes and sums of one group."""
    big, sums, table, floats = desk.big, desk.sums, desk.table, desk.floats
    for i in range(size):
        big[i] = np.float64(floats[i * LANES + lane])
        sums[i + 1] = table[i + 1, lane]


# ---------------------------------------------------------------- any number of planes


@njit(cache=True, nogil=True, inline="always")
def _count(big, depth, x):
    """How many magnitudes are above x >= 0."""
    at, shift = NONE, depth
    while shift > NONE:
        shift -= ONE
        # a product with the step would become a branch, which no machine can predict
        at += np.uint64(big[at + (ONE << shift) - ONE] > x) << shift
    return np.int64(at + np.uint64(big[at] > x))


@njit(cache=True, nogil=True)
def _levels(scale, codes, decoded, desk):
    """All levels >= 0, ascending, each with the first code that gives it; returns how many.

    `decoded`: every sum rounded to float32, as decoding does.
    """
    level, code = desk.level, desk.code
    level[0], code[0] = 0.0, 0
    count = 1
    for c in range(1, codes.shape[0]):
        x = codes[c, 0] * scale[0]
        for p in range(1, codes.shape[1]):
            x += codes[c, p] * scale[p]
            if decoded:
                x = np.float64(np.float32(x))
        size = abs(x)
        at = count
        while level[at - 1] > size:
            at -= 1
        if level[at - 1] < size:
            for i in range(count, at, -1):
                level[i], code[i] = level[i - 1], code[i - 1]
            level[at] = size
            code[at] = c if x > 0.0 else -c
            count += 1
    return count


@njit(cache=True, nogil=True)
def _nearest(count, desk):
    """above[j]: how many magnitudes are nearer to a level beyond j than to j."""
    big, depth, level, code, above = desk.big, desk.depth, desk.level, desk.code, desk.above
    for j in range(count - 1):
        middle = 0.5 * (level[j] + level[j + 1])
        if abs(code[j + 1]) < abs(code[j]):
            middle -= BELOW * middle  # weights in the middle go up
        above[j] = _count(big, depth, middle)
    above[count - 1] = 0


@njit(cache=True, nogil=True)
def _gain(scale, codes, desk):
    """The group's energy less its squared error with these float16 scales, as decoded."""
    level, above, sums = desk.level, desk.above, desk.sums
    count = _levels(scale, codes, True, desk)
    _nearest(count, desk)
    gain = 0.0
    for j in range(1, count):
        total = sums[above[j - 1]] - sums[above[j]]
        gain += level[j] * (2.0 * total - (above[j - 1] - above[j]) * level[j])
    return gain


@njit(cache=True, nogil=True)
def _normal(count, codes, desk):
    """The normal equations of the scales, given the codes."""
    code, above, sums, gram, right = desk.code, desk.above, desk.sums, desk.gram, desk.right
    planes = codes.shape[1]
    right[:] = 0.0
    gram[:, :] = 0.0
    for j in range(1, count):
        weights = above[j - 1] - above[j]
        total = sums[above[j - 1]] - sums[above[j]]
        c, sign = abs(code[j]), 1 if code[j] > 0 else -1
        for p in range(planes):
            right[p] += sign * codes[c, p] * total
            for q in range(p + 1):
                gram[p, q] += codes[c, p] * codes[c, q] * weights


@njit(cache=True, nogil=True)
def _solve(planes, desk):
    """Eliminate without pivoting; returns whether there is one solution."""
    gram, right = desk.gram, desk.right
    for p in range(planes):
        if not gram[p, p] > LEAST_PIVOT:
            return False
        for q in range(p + 1, planes):
            ratio = gram[q, p] / gram[p, p]
            for r in range(p + 1, q + 1):
                gram[q, r] -= ratio * gram[r, p]
            right[q] -= ratio * right[p]
    for p in range(planes - 1, -1, -1):
        for q in range(p + 1, planes):
            right[p] -= gram[q, p] * right[q]
        right[p] /= gram[p, p]
    return True


@njit(cache=True, nogil=True)
def _refine(codes, rounds, desk):
    """Nearest levels and least squares in turn until the trial's scales, >= 0 and falling, stand still."""
    trial, right = desk.trial, desk.right
    planes = codes.shape[1]
    for _ in range(rounds):
        count = _levels(trial, codes, False, desk)
        _nearest(count, desk)
        _normal(count, codes, desk)
        if not _solve(planes, desk):
            break
        for p in range(planes):
            x, at = abs(right[p]), p
            while at > 0 and right[at - 1] < x:
                right[at] = right[at - 1]
                at -= 1
            right[at] = x
        moved = False
        for p in range(planes):
            moved = moved or trial[p] != right[p]
            trial[p] = right[p]
        if not moved:
            break


@njit(cache=True, nogil=True)
def _half_trial(planes, desk):
    """Round the trial's scales to float16; returns whether all are finite."""
    trial = desk.trial
    finite = True
    for p in range(planes):
        trial[p] = _half(trial[p])
        finite = finite and trial[p] <= MOST
    return finite


@njit(cache=True, nogil=True)
def _keep_better(codes, best, desk):
    """Take the trial, rounded, if it gains more than `best`; returns the better gain."""
    scale, trial = desk.scale, desk.trial
    planes = codes.shape[1]
    if not _half_trial(planes, desk):
        return best
    gain = _gain(trial, codes, desk)
    if not gain > best:
        return best
    for p in range(planes):
        scale[p] = trial[p]
    return gain


@njit(cache=True, nogil=True)
def _more(codes, lane, rounds, desk):
    """One plane more than the best so far: several starts of its scale, then all scales together."""
    scale, trial = desk.scale, desk.trial
    planes = codes.shape[1]
    before = _gain(scale, codes, desk)
    best = before + GAIN * desk.energy[lane]
    left = np.sqrt(max(0.0, desk.energy[lane] - before) / (desk.sums.shape[0] - 1))
    first, second, third = scale[0], scale[1], scale[2]
    for i in range(MORE.shape[0]):
        trial[0], trial[1], trial[2] = first, second, third
        trial[planes - 1] = MORE[i] * left
        # a start, too, falls from plane to plane
        for p in range(planes - 1, 0, -1):
            if trial[p] > trial[p - 1]:
                trial[p], trial[p - 1] = trial[p - 1], trial[p]
        _refine(codes, rounds, desk)
        best = _keep_better(codes, best, desk)


@njit(cache=True, nogil=True)
def _tied(codes, lane, rounds, desk):
    """One tied plane more: the step of the planes so far, or one refined by least squares from several starts.

    While it is refined, level j is j * step, and a weight takes j if it is above (j - 0.5) * step.
    """
    scale, trial, sums, big, depth = desk.scale, desk.trial, desk.sums, desk.big, desk.depth
    planes = codes.shape[1]
    _tie(scale[planes - 2], planes, scale)
    best = _gain(scale, codes, desk) + GAIN * desk.energy[lane]
    outermost = codes.shape[0] - 1
    for i in range(STEPS.shape[0]):
        step = STEPS[i] * (desk.big[0] / outermost)
        for _ in range(rounds):
            squares = products = 0.0
            beyond = _count(big, depth, 0.5 * step)
            for j in range(1, outermost + 1):
                here = beyond
                beyond = _count(big, depth, (j + 0.5) * step) if j < outermost else 0
                squares += np.float64(j * j * (here - beyond))
                products += j * (sums[here] - sums[beyond])
            if squares == 0.0 or products / squares == step:
                break
            step = products / squares
        step = _half(step)
        if step <= MOST:
            _tie(step, planes, trial)
            gain = _gain(trial, codes, desk)
            if gain > best:
                best = gain
                _tie(step, planes, scale)


@njit(cache=True, nogil=True)
def _tie(step, planes, scale):
    times = 1.0
    for p in range(planes - 1, -1, -1):
        scale[p] = times * step
        times *= 3.0


# ---------------------------------------------------------------- two planes


@njit(cache=True, nogil=True, inline="always")
def _normal_two(a, b, coarse_first, big, depth, sums):
    """`_levels`, `_nearest` and `_normal` for two planes with scales a >= b >= 0, written out and without branches.

    `coarse_first`: a is the first plane's. Returns the squares of a's plane and b's, their product, and their
    products with the weights.
    """
    d = a - b
    lower = b <= d  # the levels are 0, b, a - b, a, a + b; otherwise 0, a - b, b, a, a + b
    low, high = min(b, d), max(b, d)
    second, third = 0.5 * (low + high), 0.5 * (high + a)
    # in the middle b and a win against a - b, and the finer plane against the coarse one
    second -= BELOW * second * np.float64(not lower)
    third -= BELOW * third * np.float64(b < d or not coarse_first)
    n1, n2, n3, n4 = _four(big, depth, 0.5 * low, second, third, 0.5 * (a + (a + b)))
    if a == b:  # a - b is zero, and a is b
        n1, n3 = n2, n4
    elif b == d:  # a - b is b
        n2 = n3
    alone_from, alone_to = (n1, n2) if lower else (n2, n3)
    mixed_from, mixed_to = (n2, n3) if lower else (n1, n2)
    s_alone, s_mixed = sums[alone_from] - sums[alone_to], sums[mixed_from] - sums[mixed_to]
    s_a, s_both = sums[n3] - sums[n4], sums[n4]
    alone, mixed = np.float64(alone_from - alone_to), np.float64(mixed_from - mixed_to)
    above, both = np.float64(n3), np.float64(n4)
    u, v = (s_mixed + s_a) + s_both, (s_alone - s_mixed) + s_both
    return mixed + above, (alone + mixed) + both, both - mixed, u, v


@njit(cache=True, nogil=True, inline="always")
def _four(big, depth, w, x, y, z):
    """`_count` of four numbers at once."""
    a = b = c = d = NONE
    shift = depth
    while shift > NONE:
        shift -= ONE
        last = (ONE << shift) - ONE
        a += np.uint64(big[a + last] > w) << shift
        b += np.uint64(big[b + last] > x) << shift
        c += np.uint64(big[c + last] > y) << shift
        d += np.uint64(big[d + last] > z) << shift
    return (
        a + np.uint64(big[a] > w),
        b + np.uint64(big[b] > x),
        c + np.uint64(big[c] > y),
        d + np.uint64(big[d] > z),
    )


@njit(cache=True, nogil=True)
def _paper(rounds, desk):
    """The paper's two planes; their scales, >= 0 and not yet rounded, become the trial."""
    big, depth, sums, trial = desk.big, desk.depth, desk.sums, desk.trial
    count = _count(big, depth, 0.0)
    aa = bb = ab = np.float64(count)  # both planes are the signs of the weights
    u = v = sums[count]
    x = y = 1.0
    for i in range(rounds):
        ridge = RIDGE
        p, q = aa + ridge, bb + ridge
        det = p * q - ab * ab
        # ||A|| * ||A^-1|| = ||A||^2 / det
        while (p * p + q * q) + 2.0 * (ab * ab) > MOST_CONDITION * det and ridge < MOST_RIDGE:
            ridge = min(ridge * 10.0, MOST_RIDGE)
            p, q = aa + ridge, bb + ridge
            det = p * q - ab * ab
        # a plane with a negative scale is negated
        old_x, old_y = x, y
        x, y = abs((u * q - v * ab) / det), abs((v * p - u * ab) / det)
        if i + 1 == rounds or np.sqrt((x - old_x) * (x - old_x) + (y - old_y) * (y - old_y)) < CLOSE:
            break
        if x >= y:
            aa, bb, ab, u, v = _normal_two(x, y, True, big, depth, sums)
        else:
            bb, aa, ab, v, u = _normal_two(y, x, False, big, depth, sums)
    trial[0], trial[1] = x, y


@njit(cache=True, nogil=True)
def _refine_two(first, last, rounds, desk):
    """`_refine` for the fits `first` to `last`, in turn, so that the machine can work on several at a time."""
    big, depth, sums, coarse, fine, gains = desk.big, desk.depth, desk.sums, desk.coarse, desk.fine, desk.gains
    for _ in range(rounds):
        moved = 0
        for i in range(first, last):
            a, b = max(coarse[i], fine[i]), min(coarse[i], fine[i])
            aa, bb, ab, u, v = _normal_two(a, b, True, big, depth, sums)
            det = aa * bb - ab * ab
            if det != 0.0:
                a, b = (u * bb - v * ab) / det, (v * aa - u * ab) / det
                gains[i] = a * u + b * v
                a, b = abs(a), abs(b)
                moved += np.int64(a != coarse[i]) | np.int64(b != fine[i])
                coarse[i], fine[i] = a, b
        if moved == 0:
            break


@njit(cache=True, nogil=True)
def _two(codes, lane, rounds, desk):
    """Two planes: as the paper has them, and the best of several starts after a few rounds, refined to the end."""
    coarse, fine, gains, trial = desk.coarse, desk.fine, desk.gains, desk.trial
    best = desk.gained[lane] + GAIN * desk.energy[lane]
    unit = desk.single[lane]
    for i in range(TRIALS - 1):
        coarse[i], fine[i] = unit * PAIRS[i, 0], unit * PAIRS[i, 1]
    _paper(rounds, desk)
    coarse[TRIALS - 1], fine[TRIALS - 1] = trial[0], trial[1]
    trial[0], trial[1] = max(trial[0], trial[1]), min(trial[0], trial[1])
    best = _keep_better(codes, best, desk)
    gains[:] = 0.0
    _refine_two(0, TRIALS, min(rounds, TRYOUT), desk)
    top = 0
    for i in range(1, TRIALS):
        if gains[i] > gains[top]:
            top = i
    _refine_two(top, top + 1, rounds, desk)
    trial[0], trial[1] = max(coarse[top], fine[top]), min(coarse[top], fine[top])
    _keep_better(codes, best, desk)


# ---------------------------------------------------------------- trits


@njit(cache=True, nogil=True)
def _write(bits, codes, lane, desk, trits):
    """The nearest trits of a group, (planes, group) int8, to its scales as decoded."""
    keys, above, code, packed = desk.keys, desk.above, desk.code, desk.packed
    planes = codes.shape[1]
    count = _levels(desk.scale, codes, True, desk)
    _nearest(count, desk)
    here = np.int32(0)
    for p in range(planes):
        here |= np.int32(1) << np.int32(2 * p)
    packed[:] = here
    for j in range(count - 1):
        if above[j] == 0:
            break
        sign = 1 if code[j + 1] > 0 else -1
        beyond = np.int32(0)
        for p in range(planes):
            beyond |= np.int32(sign * codes[abs(code[j + 1]), p] + 1) << np.int32(2 * p)
        _raise(bits, keys[(above[j] - 1) * LANES + lane], np.int32(beyond - here), packed)
        here = beyond
    for p in range(planes):
        _signed(bits, packed, np.int32(2 * p), trits[p])


@njit(cache=True, nogil=True)
def _raise(bits, least, more, packed):
    """Add `more` where the magnitude is `least` or larger."""
    for i in range(bits.shape[0]):
        packed[i] += more if (bits[i] & MAGNITUDE) >= least else np.int32(0)


@njit(cache=True, nogil=True)
def _signed(bits, packed, place, trits):
    """The trits at bit `place`, with the signs of the weights."""
    for i in range(bits.shape[0]):
        trit = ((packed[i] >> place) & TRIT) - np.int32(1)
        trits[i] = np.int8(-trit if bits[i] < 0 else trit)
