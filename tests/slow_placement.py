"""The placement algebra bit by bit, from its definition: slow, and without packfmt's own proofs, tables or loops.

A member's digits are counters. The position along an axis is the sum of stride x value, and one element stands for
as many positions as the member's smallest stride on that axis. Bit b of the field numbered p, the last field digit
running fastest, is bit p * bits + b of its unit; units follow each other in whole words; bit 0 comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from packfmt.layout import BIT, REST, TOP, WORD, Codes, Component, Digit, Layout, Values, dtype_of

Extents = dict[str, int]


class Bit(NamedTuple):
    place: tuple[str, int]  # component, and number of the bit in its bytes
    part: str
    index: tuple[int, ...]  # of the element, in the order of the axes
    number: int  # of the bit in the element


def extents(layout: Layout, shape: tuple[int, int], padded: bool) -> Extents:
    sides = {"rows": shape[0], "cols": shape[1]}
    out = {a.name: sides[a.of] // a.per + a.plus if a.of else a.size for a in layout.axes}
    return {a.name: (out[a.name] + a.pad - 1) // a.pad * a.pad for a in layout.axes} if padded else out


def grown(c: Component, extent: Extents) -> Extents:
    """Extents as if the last cell of a ragged component were whole."""
    if not c.ragged:
        return extent
    out = dict(extent)
    for axis in extent:
        inner = [d for m in c.cell for d in ((*m.units, *m.fields) if isinstance(m, Codes) else m.digits)]
        mine = [d for d in (*c.over, *inner) if d.axis == axis]
        if mine:
            step = min(d.stride for d in mine) * prod(d.size or 1 for d in mine)
            out[axis] = (extent[axis] + step - 1) // step * step
    return out


def closed(digits: tuple[Digit, ...], extent: Extents) -> list[Digit]:
    """The digits with open strides and sizes filled in."""
    out = [
        Digit(d.axis, extent[d.axis] // d.size, d.size, d.reverse) if d.stride == TOP and d.axis != WORD else d
        for d in digits
    ]
    for i, d in enumerate(out):
        if d.size == REST and d.axis != WORD:
            mine = [(e.stride, digits[j].stride == TOP) for j, e in enumerate(out) if e.axis == d.axis]
            above = [stride for stride, top in mine if top or stride > d.stride]
            out[i] = Digit(d.axis, d.stride, min(above, default=extent[d.axis]) // d.stride, d.reverse)
    return out


def number(values: tuple[int, ...], sizes: list[int]) -> int:
    """A mixed-radix number, last digit fastest."""
    out = 0
    for value, size in zip(values, sizes, strict=True):
        out = out * size + value
    return out


@dataclass
class Placed:
    """A member with closed digits and its place in the cell."""

    name: str
    bits: int
    low: int
    word: int  # bits
    over: list[Digit]
    units: list[Digit]
    fields: list[Digit]
    start: int = 0

    @classmethod
    def of(cls, c: Component, m: Codes | Values, extent: Extents) -> Placed:
        units, fields = (m.units, m.fields) if isinstance(m, Codes) else (m.digits, ())
        digits = closed((*c.over, *units, *fields), extent)
        first, second = len(c.over), len(c.over) + len(units)
        word = 8 * dtype_of(m.word if isinstance(m, Codes) else m.dtype).itemsize
        bits, low = (m.bits, m.low) if isinstance(m, Codes) else (word, 0)
        return cls(m.name, bits, low, word, digits[:first], digits[first:second], digits[second:])

    @property
    def used(self) -> int:
        return self.bits * prod(d.size for d in self.fields)

    @property
    def unit(self) -> int:
        return -(-self.used // self.word) * self.word

    def share(self, axis: str) -> int:
        """How many positions share an element; 0: all of the axis."""
        return min((d.stride for d in (*self.over, *self.units, *self.fields) if d.axis == axis), default=0)


def members(c: Component, extent: Extents) -> tuple[list[Placed], int]:
    """The members of a component and the bits of its cell."""
    out, end = [], 0
    extent = grown(c, extent)
    for m in c.cell:
        placed = Placed.of(c, m, extent)
        if isinstance(m, Codes) and m.at is not None:
            placed.start = m.at
            end = max(end, -(-(m.at + placed.used) // placed.word) * placed.word)
        else:
            placed.start = end
            end += placed.unit * prod(d.size for d in placed.units)
        out.append(placed)
    return out, end


def every_bit(layout: Layout, shape: tuple[int, int], padding: bool = False) -> Iterator[Bit]:
    """Where every bit of every member lies, and what it is a bit of; with `padding` also those of added positions."""
    extent, real = (extents(layout, shape, padded) for padded in (True, False))
    for c in layout.components:
        if isinstance(c, Component):
            placed, cell = members(c, extent)
            for m in placed:
                for place, position, plane in _fields(m, cell):
                    if padding or all(position.get(a, 0) < n for a, n in real.items()):
                        index = tuple(position.get(a, 0) // max(1, m.share(a)) for a in extent)
                        for b in range(m.bits):
                            yield Bit((c.name, place(b)), m.name, index, m.low + plane * m.bits + b)


def _fields(m: Placed, cell: int):  # type: ignore[no-untyped-def]
    """For every field: the place of its bit b, its position along the axes, and its plane."""
    over = [d for d in m.over if d.axis != WORD]
    sizes = [[d.size for d in digits] for digits in (over, m.units, m.fields)]
    split = next((i for i, d in enumerate(m.over) if d.axis == WORD), None)
    for o, u, f in product(*(product(*map(range, s)) for s in sizes)):
        position: Extents = {}
        for value, d in zip((*o, *u, *f), (*over, *m.units, *m.fields), strict=True):
            steps = d.size - 1 - value if d.reverse else value
            position[d.axis] = position.get(d.axis, 0) + d.stride * steps

        def place(b: int, o=o, u=u, f=f) -> int:  # type: ignore[no-untyped-def]
            bit = number(f, sizes[2]) * m.bits + b
            if split is None:
                return number(o, sizes[0]) * cell + m.start + number(u, sizes[1]) * m.unit + bit
            words = [*sizes[0][:split], m.unit // m.word, *sizes[0][split:]]
            return number((*o[:split], bit // m.word, *o[split:]), words) * m.word + bit % m.word

        yield place, position, position.get(BIT, 0)


def nbytes(layout: Layout, shape: tuple[int, int]) -> dict[str, int]:
    extent, out = extents(layout, shape, padded=True), {}
    for c in layout.components:
        if isinstance(c, Component):
            placed, cell = members(c, extent)
            out[c.name] = cell // 8 * prod(d.size for d in placed[0].over if d.axis != WORD)
    return out


def pack(layout: Layout, shape: tuple[int, int], parts: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Parts -> the bytes of every component."""
    out = {name: bytearray(size) for name, size in nbytes(layout, shape).items()}
    for bit in every_bit(layout, shape):
        name, at = bit.place
        element = parts[bit.part][bit.index].tobytes()
        out[name][at // 8] |= (element[bit.number // 8] >> bit.number % 8 & 1) << at % 8
    return {name: bytes(raw) for name, raw in out.items()}


def is_bijection(layout: Layout, shape: tuple[int, int]) -> bool:
    """Whether no two bits share a place, every bit of every element has one, and members agree on their elements."""
    extent = extents(layout, shape, padded=True)
    bits = list(every_bit(layout, shape, padding=True))
    if len({b.place for b in bits}) < len(bits) or len({b[1:] for b in bits}) < len(bits):
        return False
    shares: dict[str, set[tuple[int, ...]]] = {}
    for c in layout.components:
        if isinstance(c, Component):
            for m in members(c, extent)[0]:
                shares.setdefault(m.name, set()).add(tuple(m.share(a) for a in extent))
    for part, found in shares.items():
        mine = [b for b in bits if b.part == part]
        elements = [n // s if s else 1 for n, s in zip(extent.values(), min(found), strict=True)]
        highest = max((b.number for b in mine), default=-1)
        inside = all(i < n for b in mine for i, n in zip(b.index, elements, strict=True))
        whole = all(s == 0 or n % s == 0 for n, s in zip(extent.values(), min(found), strict=True))
        if len(found) > 1 or not whole or not inside or len(mine) != prod(elements) * (highest + 1):
            return False
    return True
