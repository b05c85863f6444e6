"""Planes of trits once more, a group at a time in plain Python, from the rules and not from the kernel.

Sums over weights are float64, added from the largest magnitude down; nearest levels are found weight by weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import numpy.typing as npt

Code = tuple[int, ...]
Scales = list[float]
Floats = npt.NDArray[np.float32]

# starts of two planes, in units of the single plane's scale
STARTS = ((1.0, 1.0), (1.7, 1.7), (1.2, 0.18), (0.6, 0.54), (1.2, 1.2), (2.0, 1.7), (1.4, 0.21), (1.4, 1.33))
TRYOUT = 4
RESIDUALS = (2.0, 3.0, 4.0, 5.0)  # start of one more plane, in units of the root mean square error
STEPS = (0.6, 0.75, 0.9, 1.0, 1.1)  # starts of the tied step, in units of peak over outermost level
LARGEST = 65504.0


class Refused(Exception):
    """A scale overflows float16."""


def half(number: float) -> float:
    """The nearest float16, half to even, as if it had no largest."""
    if number < 2.0**15:
        return float(np.float16(number))
    shift = math.frexp(number)[1] - 11
    return math.ldexp(round(math.ldexp(number, -shift)), shift)


def candidates(planes: int) -> list[Code]:
    """Zero, then fewer nonzero trits, then finer planes; of a code and its negation the one whose first trit is 1."""
    codes = [c for c in product((-1, 0, 1), repeat=planes) if next((t for t in c if t), 1) == 1]
    return sorted(codes, key=lambda c: (sum(t != 0 for t in c), tuple(t != 0 for t in c), c))


def level_of(code: Code, scales: Sequence[float], decoded: bool) -> float:
    """The sum in plane order: float64, or float32 as decoding has it."""
    dtype: type = np.float32 if decoded else np.float64
    total = dtype(code[0]) * dtype(scales[0])
    for trit, scale in zip(code[1:], scales[1:], strict=True):
        total = total + dtype(trit) * dtype(scale)
    return float(total)


def levels(scales: Sequence[float], decoded: bool = False) -> list[tuple[float, int, Code]]:
    """(level >= 0, rank, code) of all levels, ascending, each with the first code that gives it."""
    found: dict[float, tuple[float, int, Code]] = {}
    for rank, code in enumerate(candidates(len(scales))):
        level = level_of(code, scales, decoded)
        if level < 0:
            level, code = -level, tuple(-t for t in code)
        found.setdefault(level, (level, rank, code))
    return [found[level] for level in sorted(found)]


class Group:
    """The magnitudes of a group, descending."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = [float(w) for w in weights]
        self.big = sorted((abs(w) for w in self.weights), reverse=True)
        self.sums, self.energy = [0.0], 0.0
        for m in self.big:
            self.sums.append(self.sums[-1] + m)
            self.energy += m * m

    def runs(self, table: list[tuple[float, int, Code]]) -> list[tuple[float, Code, int, float]]:
        """(level, code, how many weights are nearest to it, their sum), ascending, without level 0."""
        counts = [0] * len(table)
        for m in self.big:
            at = 0
            while at + 1 < len(table):
                (x, rank, _), (y, above, _) = table[at], table[at + 1]
                middle = 0.5 * (x + y)
                if m < middle or (m == middle and rank < above):
                    break
                at += 1
            counts[at] += 1
        found, end = [], len(self.big) - counts[0]
        for (level, _, code), count in list(zip(table, counts, strict=True))[1:]:
            found.append((level, code, count, self.sums[end] - self.sums[end - count]))
            end -= count
        return found

    def gain(self, scales: Sequence[float]) -> float:
        """Energy less squared error, as decoded."""
        gain = 0.0
        for level, _, count, total in self.runs(levels(scales, decoded=True)):
            gain += level * (2.0 * total - count * level)
        return gain

    def normal(self, scales: Sequence[float]) -> tuple[list[list[float]], list[float]]:
        planes = range(len(scales))
        gram, right = [[0.0] * len(scales) for _ in planes], [0.0] * len(scales)
        for _, code, count, total in self.runs(levels(scales)):
            for p in planes:
                right[p] += code[p] * total
                for q in planes:
                    gram[p][q] += code[p] * code[q] * count
        return gram, right

    def trits(self, scales: Sequence[float]) -> list[Code]:
        """The nearest codes in exact arithmetic, weight by weight, to the scales as decoded."""
        table = [(Fraction(level), rank, code) for level, rank, code in levels(scales, decoded=True)]
        found = []
        for w in self.weights:
            m = Fraction(abs(w))
            code = min(table, key=lambda entry: (abs(entry[0] - m), entry[1]))[2]
            found.append(tuple(-t for t in code) if w < 0 else code)
        return found


def single(group: Group) -> tuple[float, float]:
    """The scale and gain of the best single plane."""
    best = (0.0, 0.0)
    for k in range(1, len(group.big) + 1):
        s = half(group.sums[k] / k)
        gain = s * (2.0 * group.sums[k] - k * s)
        if gain > best[1]:
            best = (s, gain)
    return best


def cramer(gram: list[list[float]], right: list[float]) -> Scales | None:
    (p, r), (_, q), (u, v) = gram[0], gram[1], right
    det = p * q - r * r
    return [(u * q - v * r) / det, (v * p - u * r) / det] if det else None


def eliminate(gram: list[list[float]], right: list[float]) -> Scales | None:
    """Gauss, without pivoting, on the lower half."""
    n = len(right)
    a, x = [row[:] for row in gram], right[:]
    for p in range(n):
        if not a[p][p] > 1e-9:
            return None
        for q in range(p + 1, n):
            ratio = a[q][p] / a[p][p]
            for r in range(p + 1, q + 1):
                a[q][r] = a[q][r] - ratio * a[r][p]
            x[q] = x[q] - ratio * x[p]
    for p in reversed(range(n)):
        for q in range(p + 1, n):
            x[p] = x[p] - a[q][p] * x[q]
        x[p] = x[p] / a[p][p]
    return x


Solver = Callable[[list[list[float]], list[float]], Scales | None]


def refine(group: Group, scales: Scales, rounds: int, solve: Solver) -> tuple[Scales, float]:
    """Scales, falling, and what the last least squares gained, after `rounds` rounds or when nothing moves."""
    scales, gain = sorted(scales, reverse=True), 0.0
    for _ in range(rounds):
        gram, right = group.normal(scales)
        found = solve(gram, right)
        if found is None:
            break
        gain = sum(a * b for a, b in zip(found, right, strict=True))
        moved = sorted(map(abs, found), reverse=True)
        if moved == scales:
            break
        scales = moved
    return scales, gain


def paper(group: Group, rounds: int) -> Scales:
    """Algorithm 1 of the paper; scales >= 0, not rounded."""
    count = sum(m > 0 for m in group.big)
    gram = [[float(count)] * 2 for _ in range(2)]
    right = [group.sums[count]] * 2
    scales = [1.0, 1.0]
    for turn in range(rounds):
        ridge = 1e-8
        while True:
            (a, r), (_, b) = gram
            p, q = a + ridge, b + ridge
            det = p * q - r * r
            if p * p + q * q + 2.0 * (r * r) <= 1e6 * det or ridge >= 1.0:
                break
            ridge = min(10.0 * ridge, 1.0)
        old = scales
        scales = [abs((right[0] * q - right[1] * r) / det), abs((right[1] * p - right[0] * r) / det)]
        x, y = scales[0] - old[0], scales[1] - old[1]
        if turn + 1 == rounds or math.sqrt(x * x + y * y) < 1e-4:
            break
        gram, right = group.normal(scales)
    return scales


class Best:
    """The best scales so far; a challenger is rounded first."""

    def __init__(self, group: Group, scales: Scales, gain: float) -> None:
        self.group, self.scales = group, scales
        self.gain = gain + 2.0**-36 * group.energy

    def challenge(self, scales: Scales) -> None:
        rounded = [half(s) for s in scales]
        if max(rounded) <= LARGEST:
            self.take(rounded)

    def take(self, scales: Scales) -> None:
        if (gain := self.group.gain(scales)) > self.gain:
            self.scales, self.gain = scales, gain


def two(group: Group, rounds: int) -> Scales:
    s, gain = single(group)
    best = Best(group, [s, 0.0], gain)
    end = paper(group, rounds)
    best.challenge(sorted(end, reverse=True))
    trials = [
        refine(group, start, min(rounds, TRYOUT), cramer) for start in [*([s * x, s * y] for x, y in STARTS), end]
    ]
    top = max(trials, key=lambda trial: trial[1])
    best.challenge(refine(group, top[0], rounds, cramer)[0])
    return best.scales


def more(group: Group, before: Scales, rounds: int) -> Scales:
    scales = [*before, 0.0]
    gain = group.gain(scales)
    best = Best(group, scales, gain)
    left = math.sqrt(max(0.0, group.energy - gain) / len(group.big))
    for factor in RESIDUALS:
        best.challenge(refine(group, [*before, factor * left], rounds, eliminate)[0])
    return best.scales


def tie(step: float, planes: int) -> Scales:
    return [step * 3 ** (planes - 1 - p) for p in range(planes)]


def tied(group: Group, before: float, planes: int, rounds: int) -> float:
    scales = tie(before, planes)
    best = Best(group, scales, group.gain(scales))
    outermost = (3**planes - 1) // 2
    for factor in STEPS:
        step = factor * (group.big[0] / outermost)
        for _ in range(rounds):
            codes = [sum(m > (j + 0.5) * step for j in range(outermost)) for m in group.big]
            products = squares = 0.0
            for j in range(1, outermost + 1):
                first, count = sum(c > j for c in codes), codes.count(j)
                squares += j * j * count
                products += j * (group.sums[first + count] - group.sums[first])
            if not squares or products / squares == step:
                break
            step = products / squares
        if half(step) <= LARGEST:
            best.take(tie(half(step), planes))
    return best.scales[-1]


def fit_group(weights: Sequence[float], planes: int, tied_: bool, rounds: int) -> tuple[list[Code], Scales]:
    """Trits of every weight, and scales (one if tied)."""
    group = Group(weights)
    s, _ = single(group)
    if s > LARGEST:
        raise Refused
    scales = [s]
    for count in range(2, planes + 1):
        if not s:
            scales = [0.0] * count
        elif tied_:
            scales = tie(tied(group, scales[-1], count, rounds), count)
        else:
            scales = two(group, rounds) if count == 2 else more(group, scales, rounds)
    return group.trits(scales), scales[-1:] if tied_ else scales


def paper_group(weights: Sequence[float], rounds: int) -> tuple[list[Code], Scales]:
    group = Group(weights)
    scales = [half(s) for s in paper(group, rounds)]
    if max(scales) > LARGEST:
        raise Refused
    return group.trits(scales), scales


def by_groups(
    weight: Floats, group: int, planes: int, one: Callable[[Sequence[float]], tuple[list[Code], Scales]]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """trits (rows, planes, cols), scale (rows, planes or 1, cols / group)."""
    rows, cols = weight.shape
    trits = np.zeros((rows, planes, cols), np.int8)
    scales = [[[0.0] * 0] * (cols // group) for _ in range(rows)]
    for row in range(rows):
        for g in range(cols // group):
            at = slice(g * group, (g + 1) * group)
            codes, scales[row][g] = one(weight[row, at].tolist())
            trits[row, :, at] = np.array(codes).T
    return trits, np.ascontiguousarray(np.array(scales, np.float16).transpose(0, 2, 1))


def fit(
    weight: Floats, group: int = 128, planes: int = 2, tied: bool = False, rounds: int = 50
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    return by_groups(weight, group, planes, lambda w: fit_group(w, planes, tied, rounds))


def fit_paper(
    weight: Floats, group: int = 128, rounds: int = 50
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    return by_groups(weight, group, 2, lambda w: paper_group(w, rounds))
