"""Random valid layouts for hypothesis: the same parts, arranged in every way that the algebra has words for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from hypothesis import strategies as st

from packfmt.layout import (
    BIT,
    DTYPES,
    REST,
    TOP,
    WORD,
    WORDS,
    Axis,
    Codes,
    Component,
    Digit,
    Layout,
    Values,
    grid,
    itemsize,
)

SIDES = ("rows", "cols")


@dataclass(frozen=True)
class Wanted:
    """A part: a dtype, or the bits of its codes, and how many rows and columns share an element (0: all)."""

    name: str
    dtype: str
    bits: int
    share: tuple[int, int]


@dataclass(frozen=True)
class Task:
    shape: tuple[int, int]
    parts: tuple[Wanted, ...]


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """A small shape and one to three parts. Extents have divisors, but need no block to be filled."""
    groups = (draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 2, 4, 5])))
    shape = (groups[0] * draw(st.integers(1, 4)), groups[1] * draw(st.integers(1, 12)))
    parts = [Wanted("codes", "", draw(st.integers(1, 12)), (1, 1))]
    for name in draw(st.sampled_from([(), ("scale",), ("zero",), ("scale", "zero")])):
        share = tuple(draw(st.sampled_from([1, g, 0])) for g in groups)
        if draw(st.booleans()):
            parts.append(Wanted(name, "", draw(st.integers(1, 12)), share))
        else:
            dtype = draw(st.sampled_from(DTYPES))
            parts.append(Wanted(name, dtype, 8 * itemsize(dtype), share))
    return Task(shape, tuple(parts))


@dataclass(frozen=True)
class Piece:
    """What one member holds: bits `low` to `low + bits * planes` of a part."""

    part: Wanted
    low: int
    bits: int
    planes: int


@st.composite
def layouts(draw: st.DrawFn, task: Task, may_pad: bool = True) -> Layout:
    """A layout of the task's parts in which every bit has one place."""
    axes, padded = [], []
    for side, name in enumerate(SIDES):
        least = max(1, *(p.share[side] for p in task.parts))
        pad = draw(st.sampled_from([1, 1, least * draw(st.integers(1, 6))])) if may_pad else 1
        axes.append(Axis(name, name, pad=pad))
        padded.append(-(-task.shape[side] // pad) * pad)
    pieces = [piece for part in task.parts for piece in draw(_cuts(part))]
    rooms = draw(st.lists(st.integers(0, 2), min_size=len(pieces), max_size=len(pieces)))
    components = []
    for room in sorted(set(rooms)):
        mine = [piece for piece, where in zip(pieces, rooms, strict=True) if where == room]
        components.append(draw(_component(f"c{room}", draw(st.permutations(mine)), tuple(padded))))
    return Layout("random", tuple(components), grid("raw"), tuple(axes))


@st.composite
def _cuts(draw: st.DrawFn, part: Wanted) -> list[Piece]:
    if part.dtype:
        return [Piece(part, 0, part.bits, 1)]
    ends = sorted(draw(st.sets(st.integers(1, part.bits), max_size=2)) | {0, part.bits})
    out = []
    for low, high in pairwise(ends):
        planes = draw(st.sampled_from([n for n in range(1, high - low + 1) if (high - low) % n == 0]))
        out.append(Piece(part, low, (high - low) // planes, planes))
    return out


@st.composite
def _factors(draw: st.DrawFn, axis: str, stride: int, count: int) -> list[Digit]:
    """Digits that run over `count` steps of `stride`."""
    out = []
    while count > 1:
        size = draw(st.sampled_from([n for n in range(2, count + 1) if count % n == 0]))
        out.append(Digit(axis, stride, size, draw(st.booleans())))
        stride, count = stride * size, count // size
    return out


@st.composite
def _component(draw: st.DrawFn, name: str, pieces: list[Piece], padded: tuple[int, int]) -> Component:
    kinds = ["plain"]
    if len(pieces) == 1 and not pieces[0].part.dtype:
        kinds.append("split")
    if all(not p.part.dtype for p in pieces):
        kinds.append("at")
    kind = draw(st.sampled_from(kinds))
    # the cells run over digits above what any member shares; the rest is each member's own
    coarse = [max(p.part.share[side] or padded[side] for p in pieces) for side in range(2)]
    over, common = [], []
    for side, axis in enumerate(SIDES):
        if all(p.part.share[side] for p in pieces):
            for d in draw(_factors(axis, coarse[side], padded[side] // coarse[side])):
                if draw(st.booleans()):
                    over.append(draw(_opened(d, padded[side])))
                else:
                    common.append(d)
    if len(pieces) == 1 and pieces[0].planes > 1 and draw(st.booleans()):
        over.append(Digit(BIT, 1, pieces[0].planes))
        pieces = [Piece(pieces[0].part, pieces[0].low, pieces[0].bits, 1)]
    over = draw(st.permutations(over))
    cell, at = [], 0
    for p in pieces:
        inner = list(common)
        for side, axis in enumerate(SIDES):
            if share := p.part.share[side]:
                inner += draw(_factors(axis, share, coarse[side] // share))
        inner += draw(_factors(BIT, 1, p.planes)) if p.planes > 1 else []
        inner = draw(st.permutations(inner))
        if p.part.dtype:
            cell.append(Values(p.part.name, p.part.dtype, tuple(inner)))
            continue
        cut = 0 if kind != "plain" else draw(st.integers(0, len(inner)))
        word = draw(st.sampled_from(WORDS))
        at += draw(st.integers(0, 5))
        here = at if kind == "at" else None
        cell.append(Codes(p.part.name, p.bits, tuple(inner[:cut]), tuple(inner[cut:]), word, p.low, here))
        at += p.bits * prod(d.size for d in inner[cut:])
    if kind == "split":
        over.insert(draw(st.integers(0, len(over))), Digit(WORD))
    return Component(name, tuple(over), tuple(cell))


def _opened(d: Digit, extent: int) -> st.SearchStrategy[Digit]:
    """The digit, perhaps with an open size or stride."""
    if d.stride * d.size != extent:
        return st.just(d)
    return st.sampled_from([d, Digit(d.axis, d.stride, REST, d.reverse), Digit(d.axis, TOP, d.size, d.reverse)])
