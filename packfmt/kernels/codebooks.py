"""Choose a codebook for each row of a weight, so that the squared error is least: k-means on a line.

A door takes (rows, cols) float32, finite, and what an error costs at each place. A row depends on nothing but
its own weights and costs, and every sum has one order, so threads and vectors cannot change a bit.

The clusters of the best codebook are runs of the sorted row. So a row is sorted once, equal weights become one point
of their summed cost, and the cost and moment of every run are differences of two sums. Sums begin at the point in the
middle and go outward, and moments are of the distance to it: outliers, which are at the ends, spoil no other's sums.
With the cost s and the moment m of each run, the error is what it is without clusters less the sum of m * m / s.

All is computed in float64, each operation rounding on its own. Entries are rounded to float32 at the end.

Source: Wang and Song, Ckmeans.1d.dp (R Journal 3/2, 2011); Gronlund et al., arXiv 1701.07204, section 2 (monotone
choices); SqueezeLLM, arXiv 2306.07629, section 4.1 (weights of the errors)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels import simd
from packfmt.kernels.cache import njit
from packfmt.kernels.scaled import importance_of, share_rows
from packfmt.kernels.simd import (
    add,
    load_floats16,
    low_bytes,
    same_float,
    same_int,
    select_below,
    store,
    zero_ints,
)

F32, U64 = np.float32, np.uint64
MOST_LEVELS = 256
BINS = 128  # of the first search, but at least so many for each level:
BINS_EACH = 8
BY_POINT = 0.25  # of the bins are shared out by points, so that there are enough for all levels
LANES = 8  # places of each bound that are tried at once
ROUNDS = 64  # of the searches that end when nothing moves, which is after a few
WORD, NEGATIVE, SIGN, LOW = U64(32), U64(31), U64(0x80000000), U64(0xFFFFFFFF)
MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
DIGITS, BITS, DIGIT = 4, U64(8), U64(255)  # of a sort by radix
HALF = 0.5


def best(
    weight: np.ndarray, levels: int, importance: np.ndarray | None = None, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A codebook of each row that has nearly the least squared error, in a fraction of the time of `exact`.

    The row's points are cut into at most max(128, 8 * levels) bins. A quarter of a bin's share is for its points, the
    rest for the sum of (gap**3 * cost)**(1/4) over its gaps. The best runs of bins are found as in `exact`. Then all
    bounds between runs move together, each to one of eight places: -4, -3 ... 3 steps from where it is, as long as the
    error falls; then steps are half as long, down to one point. Entries and what is nearest follow in turn to the end.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    levels : 2 to 256
    importance : (1 or rows, cols) float32, 0 or more: what a squared error costs; 1 everywhere if there is none
    mask : (1 or rows, cols) bool, False where a weight does not count, as where importance is 0

    Returns
    -------
    tables (rows, levels) float32, ascending: the means of their weights, rounded to float32. A row with no more
    different weights than levels has those, and repeats the last; one where nothing counts has zeros
    codes (rows, cols) uint8: the nearest entries, as `assign` has them

    Raises
    ------
    LayoutError
        If levels, or the shape of importance or mask, are not as stated.
    """
    return _tables(weight, levels, importance, mask, False)


def exact(
    weight: np.ndarray, levels: int, importance: np.ndarray | None = None, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The codebook of each row that has the least squared error, by dynamic programming over all points.

    The best cut of the first j points into l runs follows from those into l - 1, by the best beginning of the last
    run, which never falls as j rises. Of beginnings whose errors are equal as computed, the first is taken.

    Takes, returns and raises what `best` does. Time grows with levels * cols * log(cols), memory with levels * cols.
    """
    return _tables(weight, levels, importance, mask, True)


def assign(weight: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The code of the entry nearest to each weight, exactly; of two the lower, and of equal entries the first.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    tables : (rows, levels) float32, finite, in any order; levels is 1 to 256

    Returns
    -------
    (rows, cols) uint8

    Raises
    ------
    LayoutError
        If the tables are not as many as the rows, or levels is not as stated.
    """
    rows, levels = tables.shape
    if rows != weight.shape[0] or not 1 <= levels <= MOST_LEVELS:
        raise LayoutError(f"codebooks: tables are {tables.shape}, needs ({weight.shape[0]}, 1 to {MOST_LEVELS})")
    weight = np.ascontiguousarray(weight, F32)
    order = None
    if levels > 1 and not (tables[:, 1:] > tables[:, :-1]).all():
        order = np.argsort(tables, axis=1, kind="stable")
        tables = np.take_along_axis(tables, order, axis=1)
        # equal entries are neighbours now, and stand for the first of them
        same = np.concatenate([np.zeros((rows, 1), bool), tables[:, 1:] == tables[:, :-1]], axis=1)
        first = np.maximum.accumulate(np.where(same, 0, np.arange(levels)), axis=1)
        order = np.take_along_axis(order, first, axis=1).astype(np.uint8)
    tables = np.ascontiguousarray(tables, F32)
    codes = np.empty(weight.shape, np.uint8)
    loop = _nearest if simd.INTERPRETED or weight.shape[1] < 16 else _nearest_vectors

    def work(start: int, stop: int) -> None:
        middles = np.empty(levels - 1, F32)
        loop(weight[start:stop], tables[start:stop], middles, codes[start:stop])
        if order is not None:
            _rename(order[start:stop], codes[start:stop])

    share_rows(work, weight)
    return codes


def mask_of(weight: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """(1 or rows, cols) bool, contiguous: where a weight counts."""
    rows, cols = weight.shape
    if mask is None:
        return np.ones((1, cols), bool)
    if mask.shape not in ((1, cols), (rows, cols)):
        raise LayoutError(f"the mask is {mask.shape}, needs (1, {cols}) or {weight.shape}")
    return np.ascontiguousarray(mask, bool)


class Desk(NamedTuple):
    """What a thread works with: a row's points, and the searches' tables."""

    records: np.ndarray  # (cols,) uint64: a weight's sortable bits above its cost's
    others: np.ndarray  # (cols,) uint64
    digits: np.ndarray  # (4, 256) int64
    value: np.ndarray  # (cols,): the points, ascending
    cost: np.ndarray  # (cols,)
    costs: np.ndarray  # (cols + 1,): of the points before each place, less those before the middle
    moments: np.ndarray  # (cols + 1,)
    edges: np.ndarray  # (places,) int64: the first points of bins
    edge_costs: np.ndarray  # (places,)
    edge_moments: np.ndarray  # (places,)
    total: np.ndarray  # (2, places): the best sums of m * m / s, with one run more in turn
    choice: np.ndarray  # (levels, places) int32: where their last runs begin
    bounds: np.ndarray  # (levels + 1,) int64: where the runs begin and end
    tried: np.ndarray  # (levels, LANES) int64: places of each bound
    tried_costs: np.ndarray  # (levels, LANES)
    tried_moments: np.ndarray  # (levels, LANES)
    sums: np.ndarray  # (2, LANES): as total, of the places that are tried
    picks: np.ndarray  # (levels, LANES) int64: the bound before


def _desk(cols: int, levels: int, full: bool) -> Desk:
    places = cols + 1 if full else min(cols, _bins(levels)) + 1
    lanes = (levels, LANES)
    return Desk(
        records=np.empty(cols, U64),
        others=np.empty(cols, U64),
        digits=np.empty((DIGITS, 256), np.int64),
        value=np.empty(cols),
        cost=np.empty(cols),
        costs=np.empty(cols + 1),
        moments=np.empty(cols + 1),
        edges=np.empty(places, np.int64),
        edge_costs=np.empty(places),
        edge_moments=np.empty(places),
        total=np.empty((2, places)),
        choice=np.empty((levels, places), np.int32),
        bounds=np.empty(levels + 1, np.int64),
        tried=np.empty(lanes, np.int64),
        tried_costs=np.empty(lanes),
        tried_moments=np.empty(lanes),
        sums=np.empty((2, LANES)),
        picks=np.empty(lanes, np.int64),
    )


def _bins(levels: int) -> int:
    return max(BINS, BINS_EACH * levels)


def _tables(weight, levels, importance, mask, full):
    """Tables and codes of all rows, on as many threads as they are worth."""
    if not 2 <= levels <= MOST_LEVELS:
        raise LayoutError(f"codebooks: {levels} levels, needs 2 to {MOST_LEVELS}")
    rows, cols = weight.shape
    weight = np.ascontiguousarray(weight, F32)
    costs, counts = importance_of(weight, importance), mask_of(weight, mask)
    tables = np.empty((rows, levels), F32)

    def work(start: int, stop: int) -> None:
        desk = _desk(cols, levels, full)
        _fit(weight.view(np.uint32), costs.view(np.uint32), counts, start, stop, full, desk, tables)

    share_rows(work, weight)
    return tables, assign(weight, tables)


@njit(cache=True, nogil=True)
def _fit(bits, costs, counts, start, stop, full, desk, tables):
    """Rows start to stop: the points, their best runs, the entries."""
    levels = tables.shape[1]
    for row in range(start, stop):
        entries = tables[row]
        used = _sort(bits[row], costs[row % costs.shape[0]], counts[row % counts.shape[0]], desk)
        points = _merge(used, desk)
        if points <= levels:
            for i in range(levels):
                entries[i] = F32(desk.value[min(i, points - 1)]) if points else F32(0)
            continue
        _sum(points, desk)
        if full or points < desk.edges.shape[0]:
            _cut(desk.costs, desk.moments, points, levels, desk)
        else:
            count = _bin(points, desk)
            _cut(desk.edge_costs, desk.edge_moments, count, levels, desk)
            for i in range(levels + 1):
                desk.bounds[i] = desk.edges[desk.bounds[i]]
            _move(points, levels, desk)
        _settle(points, desk, entries)


# ---------------------------------------------------------------- points


@njit(cache=True, nogil=True)
def _sort(bits, costs, counts, desk):
    """Records of the weights that count, ascending, those of equal weights in the row's order; how many."""
    records, others, digits = desk.records, desk.others, desk.digits
    digits[:] = 0
    used = 0
    for j in range(bits.shape[0]):
        if counts[j] and costs[j] & MAGNITUDE:  # -0 costs nothing either
            # bits that are ascending as unsigned numbers; -0 is 0
            here = U64(bits[j])
            if here == SIGN:
                here = U64(0)
            here ^= LOW if here >> NEGATIVE else SIGN
            records[used] = here << WORD | U64(costs[j])
            used += 1
            for k in range(DIGITS):
                digits[k, here & DIGIT] += 1
                here >>= BITS
    for k in range(DIGITS):
        at = 0
        for i in range(digits.shape[1]):
            count = digits[k, i]
            digits[k, i] = at
            at += count
    for k in range(0, DIGITS, 2):
        shift = WORD + BITS * U64(k)
        _scatter(records, others, used, digits[k], shift)
        _scatter(others, records, used, digits[k + 1], shift + BITS)
    return used


@njit(cache=True, nogil=True)
def _scatter(source, target, used, places, shift):
    """Records in the order of one digit; `places` has where the next one of each goes."""
    for i in range(used):
        digit = source[i] >> shift & DIGIT
        at = places[digit]
        target[at] = source[i]
        places[digit] = at + 1


@njit(cache=True, nogil=True)
def _merge(used, desk):
    """Values and costs of the sorted records, equal values as one; how many there are."""
    records, value, cost = desk.records, desk.value, desk.cost
    points, before, total = -1, U64(0), 0.0
    for i in range(used):
        key = records[i] >> WORD
        here = np.float64(np.uint32(records[i] & LOW).view(F32))
        if i == 0 or key != before:
            points += 1
            total = 0.0
        total += here
        before = key
        value[points] = np.float64(np.uint32(key ^ (SIGN if key >> NEGATIVE else LOW)).view(F32))
        cost[points] = total
    return points + 1


@njit(cache=True, nogil=True)
def _sum(points, desk):
    """Sums of costs and moments, from the middle outward."""
    value, cost, costs, moments = desk.value, desk.cost, desk.costs, desk.moments
    middle = points // 2
    center = value[middle]
    costs[middle] = moments[middle] = 0.0
    for i in range(points - middle):  # both ways at once, for each sum waits for the one before
        up, down = middle + i, max(middle - 1 - i, 0)
        costs[up + 1] = costs[up] + cost[up]
        moments[up + 1] = moments[up] + cost[up] * (value[up] - center)
        costs[down] = costs[down + 1] - cost[down]
        moments[down] = moments[down + 1] - cost[down] * (value[down] - center)


# ---------------------------------------------------------------- runs


@njit(cache=True, nogil=True, inline="always")
def _gain(cost, moment):
    """What a run lowers the error by; 0 where its cost is lost among the others'."""
    return np.divide(moment * moment, cost) if cost > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _bin(points, desk):
    """Edges of bins, and the sums there; returns how many bins."""
    value, cost, share, edges = desk.value, desk.cost, desk.others.view(np.float64), desk.edges
    whole = 0.0
    for i in range(1, points):
        gap = value[i] - value[i - 1]
        share[i] = np.sqrt(gap * np.sqrt(gap * (cost[i] + cost[i - 1])))
        whole += share[i]
    most = edges.shape[0] - 1
    by_gap = np.divide((1.0 - BY_POINT) * np.float64(most), whole)
    by_point = np.divide(BY_POINT * np.float64(most), np.float64(points))
    edges[0] = 0
    at, count, passed = 0.0, 1, np.int64(0)
    for i in range(1, points):
        at += share[i] * by_gap + by_point
        if np.int64(at) > passed and count < most:
            passed = np.int64(at)
            edges[count] = i
            count += 1
    edges[count] = points
    for i in range(count + 1):
        desk.edge_costs[i], desk.edge_moments[i] = desk.costs[edges[i]], desk.moments[edges[i]]
    return count


@njit(cache=True, nogil=True)
def _cut(costs, moments, count, levels, desk):
    """The best cut of `count` pieces, with sums at their ends, into `levels` runs: the bounds."""
    choice, bounds = desk.choice, desk.bounds
    after = desk.total[0]
    for j in range(1, count + 1):
        after[j] = _gain(costs[j] - costs[0], moments[j] - moments[0])
    for run in range(1, levels):
        before, after, begins = desk.total[(run + 1) % 2], desk.total[run % 2], choice[run]
        # every second of those that are left, between the beginnings of their neighbours
        first = run + 1 if run < levels - 1 else count
        many = count + 1 - first
        step = 1
        while step <= many:
            step *= 2
        while step > 1:
            step //= 2
            for r in range(step - 1, many, 2 * step):
                j = first + r
                least = begins[j - step] if r >= step else run
                most = min(begins[j + step], j - 1) if r + step < many else j - 1
                top, pick = -1.0, least
                for i in range(least, most + 1):
                    found = before[i] + _gain(costs[j] - costs[i], moments[j] - moments[i])
                    if found > top:
                        top, pick = found, i
                after[j], begins[j] = top, pick
    bounds[0], bounds[levels] = 0, count
    for run in range(levels - 1, 0, -1):
        bounds[run] = choice[run, bounds[run + 1]]


@njit(cache=True, nogil=True)
def _move(points, levels, desk):
    """Better bounds near those that there are."""
    step = 1
    while step * LANES * (desk.edges.shape[0] - 1) < 2 * points:
        step *= 2
    while step > 0:
        top = -1.0
        for _ in range(ROUNDS):
            found = _try(points, levels, step, desk)
            if found <= top:
                break
            top = found
        step //= 2


@njit(cache=True, nogil=True)
def _try(points, levels, step, desk):
    """All bounds to the best of some places at once; the sum of m * m / s."""
    bounds, tried, picks = desk.bounds, desk.tried, desk.picks
    for run in range(1, levels):
        for lane in range(LANES):
            place = min(max(bounds[run] + step * (lane - LANES // 2), run), points - levels + run)
            tried[run, lane] = place
            desk.tried_costs[run, lane], desk.tried_moments[run, lane] = desk.costs[place], desk.moments[place]
    before = desk.sums[0]
    for lane in range(LANES):
        before[lane] = _gain(desk.tried_costs[1, lane] - desk.costs[0], desk.tried_moments[1, lane] - desk.moments[0])
    for run in range(2, levels):
        before, after, pick = desk.sums[run % 2], desk.sums[(run + 1) % 2], picks[run]
        places, costs, moments = tried[run], desk.tried_costs[run], desk.tried_moments[run]
        after[:] = -np.inf  # no way leads here, as far as is known
        pick[:] = 0
        for begin in range(LANES):
            place, cost, moment = (
                tried[run - 1, begin],
                desk.tried_costs[run - 1, begin],
                desk.tried_moments[run - 1, begin],
            )
            so_far = before[begin]
            for lane in range(LANES):
                found = so_far + _gain(costs[lane] - cost, moments[lane] - moment)
                better = (place < places[lane]) & (found > after[lane])
                after[lane] = found if better else after[lane]
                pick[lane] = begin if better else pick[lane]
    last, top, lane = desk.sums[levels % 2], -1.0, 0
    for begin in range(LANES):
        cost, moment = desk.tried_costs[levels - 1, begin], desk.tried_moments[levels - 1, begin]
        found = last[begin] + _gain(desk.costs[points] - cost, desk.moments[points] - moment)
        if found > top:
            top, lane = found, begin
    for run in range(levels - 1, 0, -1):
        bounds[run] = tried[run, lane]
        lane = picks[run, lane]
    return top


# ---------------------------------------------------------------- entries


@njit(cache=True, nogil=True)
def _settle(points, desk, entries):
    """Entries are the means of their runs, as float32, and runs what is nearest, in turn until nothing moves."""
    bounds, value, cost = desk.bounds, desk.value, desk.cost
    for _ in range(ROUNDS):
        for i in range(entries.shape[0]):
            if bounds[i] < bounds[i + 1]:
                first = value[bounds[i]]
                weighs, moment = 0.0, 0.0
                for j in range(bounds[i], bounds[i + 1]):
                    weighs += cost[j]
                    moment += cost[j] * (value[j] - first)
                entries[i] = F32(first + np.divide(moment, weighs)) + F32(0)  # never -0
        moved = False
        for i in range(1, entries.shape[0]):
            middle = np.float64(_middle(entries[i - 1], entries[i]))
            at = bounds[i]
            while at < points and value[at] <= middle:
                at += 1
            while at > 0 and value[at - 1] > middle:
                at -= 1
            moved |= at != bounds[i]
            bounds[i] = at
        if not moved:
            break


@njit(cache=True, nogil=True)
def _middle(a, b):
    """The largest float32 that is not nearer to b than to a, of a <= b."""
    x, y = np.float64(a), np.float64(b)
    both = x + y
    # what the sum lost; Knuth, The Art of Computer Programming 2, 4.2.2, theorem B
    back = both - x
    lost = (x - (both - back)) + (y - back)
    rounded = F32(HALF * both)
    over = np.float64(rounded) - HALF * both
    if over > 0.0 or (over == 0.0 and lost < 0.0):
        return np.nextafter(rounded, F32(-np.inf))
    return rounded


@njit(cache=True, nogil=True)
def _middles(table, middles):
    """Where neighbours of an ascending table part."""
    for i in range(middles.shape[0]):
        middles[i] = _middle(table[i], table[i + 1])


@njit(cache=True, nogil=True)
def _nearest(weight, tables, middles, codes):
    """Codes of all rows: how many middles are below."""
    for row in range(weight.shape[0]):
        _middles(tables[row], middles)
        codes[row] = 0
        for i in range(middles.shape[0]):
            for j in range(weight.shape[1]):
                codes[row, j] += np.uint8(weight[row, j] > middles[i])


def _loop(version: str) -> Callable[..., None]:
    """The loop over vectors; the version is part of the key under which compiled code is kept."""

    @njit(cache=True, nogil=True)
    def _vectors(weight, tables, middles, codes):
        """`_nearest` for rows of sixteen weights or more; the last sixteen of a row begin among those before."""
        version  # noqa: B018
        cols = weight.shape[1]
        for row in range(weight.shape[0]):
            _middles(tables[row], middles)
            for first in range(0, cols, 16):
                at = row * cols + min(first, cols - 16)
                here, code = load_floats16(weight, 4 * at), zero_ints()
                for i in range(middles.shape[0]):
                    code = select_below(same_float(middles[i]), here, add(code, same_int(1)), code)
                store(codes, at, low_bytes(code))

    return _vectors


@njit(cache=True, nogil=True)
def _rename(order, codes):
    """Codes of sorted entries as those of the entries."""
    for row in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            codes[row, j] = order[row, codes[row, j]]


_nearest_vectors = _loop(simd.VERSION)
