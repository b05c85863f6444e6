"""Codebooks and clipped grids once more, a row or a group at a time in plain Python, from what the doors say.

Bounds are searched among all that there are, and the nearest is found with fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Sums = tuple[list[float], list[float]]
Point = tuple[float, float]  # value and cost


def spread(weight: Floats, importance: Floats | None, mask: npt.NDArray[np.bool_] | None) -> Floats:
    """(rows, cols): what an error costs at each place."""
    costs = np.ones_like(weight) if importance is None else np.broadcast_to(importance, weight.shape)
    return costs if mask is None else np.where(mask, costs, F32(0))


# ---------------------------------------------------------------- codebooks


def nearest(x: float, table: Sequence[Any]) -> int:
    """The code of the nearest entry; of two the lower, and of equal entries the first."""
    return min(range(len(table)), key=lambda i: (abs(Fraction(float(table[i])) - Fraction(x)), float(table[i]), i))


def assign(weight: Floats, tables: Floats) -> Bytes:
    return np.array(
        [[nearest(float(x), table) for x in row] for row, table in zip(weight, tables, strict=True)], np.uint8
    )


def points_of(row: Floats, costs: Floats) -> list[Point]:
    found: dict[float, float] = {}
    for x, cost in zip(map(float, row), map(float, costs), strict=True):
        if cost:
            found[x] = found.get(x, 0.0) + cost  # 0.0 and -0.0 are one key
    return [(x + 0.0, found[x]) for x in sorted(found)]


def sums_of(points: list[Point]) -> Sums:
    """Costs and moments before each place, from the middle."""
    middle = len(points) // 2
    center = points[middle][0]
    costs, moments = [0.0] * (len(points) + 1), [0.0] * (len(points) + 1)
    for i in range(middle, len(points)):
        x, cost = points[i]
        costs[i + 1], moments[i + 1] = costs[i] + cost, moments[i] + cost * (x - center)
    for i in reversed(range(middle)):
        x, cost = points[i]
        costs[i], moments[i] = costs[i + 1] - cost, moments[i + 1] - cost * (x - center)
    return costs, moments


def gain(sums: Sums, first: int, last: int) -> float:
    cost, moment = sums[0][last] - sums[0][first], sums[1][last] - sums[1][first]
    return moment * moment / cost if cost > 0 else 0.0


def cut(sums: Sums, edges: Sequence[int], levels: int) -> list[int]:
    """The bounds, among the edges, of the best runs: all beginnings are tried, and the first of the best is taken."""
    count = len(edges) - 1
    so_far = [-math.inf] + [gain(sums, 0, edges[j]) for j in range(1, count + 1)]
    begins = []
    for run in range(1, levels):
        tried = [[so_far[i] + gain(sums, edges[i], edges[j]) for i in range(run, j)] for j in range(count + 1)]
        begins.append([run + t.index(max(t)) if t else 0 for t in tried])
        so_far = [max(t, default=-math.inf) for t in tried]
    bounds = [count]
    for row in reversed(begins):
        bounds.append(row[bounds[-1]])
    return [edges[i] for i in [0, *reversed(bounds)]]


def bin_edges(points: list[Point], most: int) -> list[int]:
    shares = []
    for (low, a), (high, b) in pairwise(points):
        gap = high - low
        shares.append(math.sqrt(gap * math.sqrt(gap * (b + a))))
    whole = 0.0
    for share in shares:
        whole += share
    by_gap, by_point = 0.75 * most / whole, 0.25 * most / len(points)
    edges, at, passed = [0], 0.0, 0
    for i, share in enumerate(shares, start=1):
        at += share * by_gap + by_point
        if int(at) > passed and len(edges) < most:
            passed = int(at)
            edges.append(i)
    return [*edges, len(points)]


def moved(sums: Sums, bounds: list[int], step: int) -> tuple[float, list[int]]:
    """The best of all bounds of which each is up to 4 steps lower or up to 3 higher, and what they gain."""
    levels, count = len(bounds) - 1, len(sums[0]) - 1
    places = [
        [min(max(bound + step * k, run), count - levels + run) for k in range(-4, 4)]
        for run, bound in enumerate(bounds[1:-1], start=1)
    ]
    so_far = [(gain(sums, 0, place), [0, place]) for place in places[0]]
    for some in [*places[1:], [count]]:
        so_far = [first_best(sums, so_far, place) for place in some]
    return so_far[0]


def first_best(sums: Sums, so_far: list[tuple[float, list[int]]], place: int) -> tuple[float, list[int]]:
    """The first of the best ways to come to a place; -inf if there is none."""
    best: tuple[float, list[int]] = (-math.inf, [*so_far[0][1], place])
    for total, bounds in so_far:
        found = total + gain(sums, bounds[-1], place)
        if bounds[-1] < place and found > best[0]:
            best = found, [*bounds, place]
    return best


def settled(points: list[Point], bounds: list[int]) -> Floats:
    """Means and what is nearest to them, in turn."""
    entries = np.zeros(len(bounds) - 1, F32)
    for _ in range(64):
        for i, (first, last) in enumerate(pairwise(bounds)):
            weighs = moment = 0.0
            for x, cost in points[first:last]:
                weighs += cost
                moment += cost * (x - points[first][0])
            if weighs:
                entries[i] = F32(points[first][0] + moment / weighs) + F32(0)
        codes = [nearest(x, entries) for x, _ in points]
        now = [sum(code < i for code in codes) for i in range(len(bounds))]
        if now == bounds:
            break
        bounds = now
    return entries


def table_of(points: list[Point], levels: int, exact: bool) -> Floats:
    if len(points) <= levels:
        values = [x for x, _ in points] or [0.0]
        return np.array((values + [values[-1]] * levels)[:levels], F32)
    sums, bins = sums_of(points), max(128, 8 * levels)
    if exact or len(points) <= bins:
        return settled(points, cut(sums, range(len(points) + 1), levels))
    bounds = cut(sums, bin_edges(points, bins), levels)
    step = 1
    while step * 8 * bins < 2 * len(points):
        step *= 2
    while step:
        top = -1.0
        for _ in range(64):
            total, places = moved(sums, bounds, step)
            bounds = places
            if total <= top:
                break
            top = total
        step //= 2
    return settled(points, bounds)


def tables(
    weight: Floats,
    levels: int,
    importance: Floats | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    exact: bool = True,
) -> Floats:
    costs = spread(weight, importance, mask)
    return np.array([table_of(points_of(*row), levels, exact) for row in zip(weight, costs, strict=True)], F32)


# ---------------------------------------------------------------- clipped grids


def clip_group(x: Floats, costs: Floats, bits: int, dtype: str) -> tuple[Any, int]:
    """Scale and zero of one group."""
    counted, most = costs > 0, 2**bits - 1
    low, high = (float(end) for end in (min(0, *x[counted], 0), max(0, *x[counted], 0)))
    unit = (high - low) / most
    if not unit:
        return F32(0), 0
    steps = np.where(counted, (x.astype(np.float64) / unit).astype(F32), F32(0))
    weighs = costs / costs.max()

    def codes(one: Any, zero: int) -> tuple[Floats, Floats]:
        per_step = F32(1 / (float(one) / unit))
        place = steps * per_step + F32(zero)
        return place, np.rint(place.clip(0, most))

    def error(one: Any, zero: int) -> float:
        if np.isinf(one):
            return math.inf
        place, code = codes(one, zero)
        lanes = np.zeros(16, F32)
        cost = weighs * ((place - code) * (place - code))
        for first in range(0, len(cost), 16):
            part = cost[first : first + 16]
            lanes[: len(part)] += part
        total, ratio = 0.0, float(one) / unit
        for lane in lanes:
            total += float(lane)
        return total * (ratio * ratio)

    def rounded(step: float, zero: int) -> Any:
        if dtype == "<f2":
            return max(F32(np.float64(step).astype(np.float16)), F32(2.0**-24))
        one = F32(step)
        while float(one) * max(zero, most - zero) > float(np.finfo(F32).max):
            one = np.nextafter(one, F32(0))
        return max(one, F32(2.0**-149))

    def keep(best: tuple[float, Any, int], step: float, zero: int) -> tuple[float, Any, int]:
        one = rounded(step, zero)
        found = error(one, zero)
        trials.append(found)
        return (found, one, zero) if found < best[0] else best

    best: tuple[float, Any, int] = (math.inf, F32(np.inf), 0)
    factors, narrower = [1.0, 1.125], 1 - 2.0 ** -[0, 0, 5, 5, 5, 6, 6, 7, 7][bits]
    while factors[-1] > 2.0**-12:
        factors.append(factors[-1] * narrower)
    for factor in factors[:-1]:
        keeps_low, keeps_high = -(low / unit) / factor, most - (most + low / unit) / factor
        trials: list[float] = []
        for split in range(5):
            zero = int(np.rint(np.clip(keeps_low + (keeps_high - keeps_low) * (split / 4), 0, most)))
            best = keep(best, unit * factor, zero)
        if min(trials) > 2 * best[0] or unit * factor < (2.0**-24 if dtype == "<f2" else 2.0**-149):
            break
    for _ in range(32):
        _, one, zero = before = best
        _, code = codes(one, zero)
        for other in range(max(zero - 1, 0), min(zero + 1, most) + 1):
            across = along = 0.0
            for w, y, c in zip(weighs, steps, code, strict=True):
                away = float(c) - other
                across += float(w) * (away * float(y))
                along += float(w) * (away * away)
            if along > 0 and across > 0:
                best = keep(best, unit * (across / along), other)
        if best[1:] == before[1:]:
            break
    return best[1:]


def clip(
    weight: Floats, bits: int, group: int, importance: Floats | None, mask: Any, dtype: str
) -> tuple[Floats, Bytes, Bytes]:
    costs = spread(weight, importance, mask)
    cut_up: Callable[[Floats], Floats] = lambda x: x.reshape(-1, group)  # noqa: E731
    found = [clip_group(x, c, bits, dtype) for x, c in zip(cut_up(weight), cut_up(costs), strict=True)]
    scale = np.array([one for one, _ in found], F32)[:, None]
    zero = np.array([zero for _, zero in found], np.uint8)[:, None]
    with np.errstate(all="ignore"):
        codes = np.rint((cut_up(weight) / scale + zero.astype(F32)).clip(0, 2**bits - 1))
    codes = np.where(scale > 0, codes, 0).astype(np.uint8)
    shape = len(weight), -1
    return scale.reshape(shape), zero.reshape(shape), codes.reshape(weight.shape)
