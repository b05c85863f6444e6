"""Pack, unpack and repack any layout: its description in, three small tables out, one loop over them.

`unpack` moves a layout's fields into plain row-major parts, `pack` the other way, `repack`
straight from one layout into another. All three are the same move between two placements;
a part is itself a placement, the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.layout import BIT, WORD, Digit, Fitted, Layout, Member, Part, Placed, dtype_of, itemsize

if TYPE_CHECKING:
    from packfmt.kernels.move import Pieces, Steps

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

TABLE = 1024  # units in a table: small enough to stay in the first-level cache


def unpack(layout: Layout, shape: tuple[int, int], components: Arrays) -> dict[str, Array]:
    """Components -> one array a part, in the order of the layout's axes.

    shape : (rows, cols) of the weight. Codes come as the smallest unsigned integers that hold them,
    values in their own dtype; `layout.fit(*shape).parts` has shapes and dtypes. Streams pass as they are.
    """
    fitted = layout.fit(*shape)
    parts: dict[str, Array] = {s.name: components[s.name] for s in layout.streams}
    for part in fitted.parts.values():
        if part.name not in parts:
            parts[part.name] = np.zeros(part.shape, dtype_of(part.dtype))
    for placed in fitted.components:
        raw = _bytes(components[placed.name])
        for m in placed.members:
            part = fitted.parts[m.part]
            _move(raw, _stored(fitted, placed, m), _bytes(parts[m.part]), _plain(fitted, part, m))
    return {name: _crop(layout, fitted, shape, name, array) for name, array in parts.items()}


def pack(layout: Layout, shape: tuple[int, int], parts: Arrays) -> dict[str, Array]:
    """Parts -> components: the exact inverse of `unpack`. Bits that no member holds are zero.

    Raises
    ------
    LayoutError
        If a part is missing, has another shape or kind of number, or holds a code too large.
    """
    fitted = layout.fit(*shape)
    full = {name: _checked(layout, fitted, shape, part, parts) for name, part in fitted.parts.items()}
    components: dict[str, Array] = {s.name: full[s.name] for s in layout.streams}
    for placed in fitted.components:
        out = np.zeros(placed.shape, dtype_of(placed.dtype))
        for m in placed.members:
            part = fitted.parts[m.part]
            _move(_bytes(full[m.part]), _plain(fitted, part, m), _bytes(out), _stored(fitted, placed, m))
        components[placed.name] = out
    return components


def repack(source: Layout, target: Layout, shape: tuple[int, int], components: Arrays) -> dict[str, Array]:
    """Components of one layout -> components of another with the same parts, bit for bit.

    Fields go straight from bytes to bytes where the digits of both layouts have a common
    refinement (all powers of two do) and members match one to one; else through the parts.

    Raises
    ------
    LayoutError
        If the parts differ in name, shape or width.
    """
    if reason := difference(source, target, shape):
        raise LayoutError(f"{source.name} to {target.name}: {reason}")
    a, b = source.fit(*shape), target.fit(*shape)
    out: dict[str, Array] = {s.name: components[s.name] for s in target.streams}
    moves = []
    for placed in b.components:
        out[placed.name] = np.zeros(placed.shape, dtype_of(placed.dtype))
        for m in placed.members:
            found = [(c, n) for c in a.components for n in c.members if (n.part, n.low) == (m.part, m.low)]
            if len(found) != 1 or _code_bits(found[0][0], found[0][1]) != _code_bits(placed, m):
                return pack(target, shape, unpack(source, shape, components))
            (c, n) = found[0]
            here, there = _stored(a, c, n), _stored(b, placed, m)
            if here.fields * here.bits != there.fields * there.bits or here.bits != there.bits or _refine(here, there) is None:
                return pack(target, shape, unpack(source, shape, components))
            moves.append((c.name, here, placed.name, there))
    for before, here, after, there in moves:
        _move(_bytes(components[before]), here, _bytes(out[after]), there)
    return out


def difference(source: Layout, target: Layout, shape: tuple[int, int]) -> str:
    """Why the parts of one layout are not those of another; empty if they are."""
    a, b = source.fit(*shape), target.fit(*shape)
    if a.parts.keys() != b.parts.keys():
        return f"one has {', '.join(a.parts)}, the other {', '.join(b.parts)}"
    for name, part in a.parts.items():
        other = b.parts[name]
        mine, theirs = _cropped(source, a, shape, name), _cropped(target, b, shape, name)
        if mine != theirs:
            return f"{name} is {mine} in one, {theirs} in the other"
        if (part.dtype, part.bits) != (other.dtype, other.bits):
            return f"{name} is {part.dtype} of {part.bits} bits in one, {other.dtype} of {other.bits} in the other"
    return ""


# ---------------------------------------------------------------- placements


@dataclass(frozen=True, slots=True)
class Leg:
    """A stretch of one axis on which the place of a field grows evenly."""

    axis: str
    stride: int
    size: int
    byte: int  # what one step adds to the byte
    field: int  # or to the field's number within its unit


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a move: where field zero lies, how its place grows, and which bits a field has."""

    byte: int
    field: int
    legs: tuple[Leg, ...]
    fields: int  # of a unit
    bits: int
    start: int  # bit of field 0, from the unit's first byte
    words: tuple[int, ...]  # byte distance of each word of a unit, and the last repeated
    word: int

    def pieces(self) -> Pieces:
        from packfmt.kernels.move import Pieces

        first, rows = [0], []
        for p in range(self.fields):
            bit, left = self.start + p * self.bits, self.bits
            while left:
                at = bit >> 3
                take = min(8 - (bit & 7), left)
                rows.append((self.words[at // self.word] + at % self.word, bit & 7, take))
                bit, left = bit + take, left - take
            first.append(len(rows))
        table = np.array(rows, np.int64).reshape(-1, 3).T.copy()
        return Pieces(np.array(first, np.int64), *table)


def _stored(fitted: Fitted, placed: Placed, m: Member) -> Side:
    """A member in its component's bytes."""
    sizes = [d.size for d in placed.over]
    split = next((i for i, d in enumerate(placed.over) if d.axis == WORD), None)
    if split is None:
        steps = [placed.cell_bytes * prod(sizes[i + 1 :]) for i in range(len(sizes))]
        words = tuple(m.word * i for i in range(m.words + 1))
    else:
        # beyond the split a step moves by one word; before it, by all words of everything beyond
        steps = [m.word * prod(sizes[i + 1 :]) for i in range(len(sizes))]
        words = tuple(steps[split] * i for i in range(m.words + 1))
    inside = m.start // 8 if m.start % 8 == 0 else 0
    unit = m.word * m.words
    placed_digits = [(d, step, 0) for d, step in zip(placed.over, steps, strict=True) if d.axis != WORD]
    placed_digits += [(d, unit * prod(e.size for e in m.units[i + 1 :]), 0) for i, d in enumerate(m.units)]
    placed_digits += [(d, 0, prod(e.size for e in m.fields[i + 1 :])) for i, d in enumerate(m.fields)]
    byte, number, legs = inside, 0, []
    for d, by, fd in placed_digits:
        if d.reverse:
            byte, number, by, fd = byte + by * (d.size - 1), number + fd * (d.size - 1), -by, -fd
        legs.append(Leg(d.axis, d.stride, d.size, by, fd))
    start = 0 if m.start % 8 == 0 else m.start
    span = -(-(start + m.bits * prod(d.size for d in m.fields)) // (8 * m.word))
    words = words if len(words) > span else tuple(m.word * i for i in range(span + 1))
    return Side(byte, number, tuple(legs), prod(d.size for d in m.fields), m.bits, start, words, m.word)


def _plain(fitted: Fitted, part: Part, m: Member) -> Side:
    """The part itself: row-major whole numbers, of which the member holds some bits."""
    size = itemsize(part.dtype)
    legs = []
    for i, (axis, extent) in enumerate(fitted.extents.items()):
        legs.append(Leg(axis, part.share[i], part.shape[i], size * prod(part.shape[i + 1 :]), 0))
    planes = prod(d.size for d in m.fields + m.units if d.axis == BIT)
    planes *= prod(d.size for c in fitted.components if m in c.members for d in c.over if d.axis == BIT)
    if planes > 1:
        legs.append(Leg(BIT, 1, planes, 0, 1))
    return Side(0, 0, tuple(legs), planes, m.bits, m.low, tuple(range(size + 1)), 1)


def _code_bits(placed: Placed, m: Member) -> int:
    return m.bits * prod(d.size for d in (*m.fields, *m.units, *placed.over) if d.axis == BIT)


def _refine(source: Side, target: Side) -> list[tuple[Leg, Leg]] | None:
    """Cut the legs of both sides at each other's ends; None if the ends do not nest."""
    out = []
    axes = dict.fromkeys(leg.axis for leg in (*source.legs, *target.legs))
    for axis in axes:
        ends = sorted({end for side in (source, target) for g in side.legs if g.axis == axis
                       for end in (g.stride, g.stride * g.size)})
        for low, high in zip(ends, ends[1:], strict=False):
            if low == 0 or high % low:
                return None
            pair = [_cut(side, axis, low, high // low) for side in (source, target)]
            if any(leg is None for leg in pair):
                return None
            out.append((pair[0], pair[1]))
    return out  # type: ignore[return-value]


def _cut(side: Side, axis: str, stride: int, size: int) -> Leg | None:
    for g in side.legs:
        if g.axis == axis and g.stride <= stride and stride * size <= g.stride * g.size:
            if stride % g.stride:
                return None
            times = stride // g.stride
            return Leg(axis, stride, size, g.byte * times, g.field * times)
    return None


def _move(raw: Array, source: Side, out: Array, target: Side) -> None:
    from packfmt.kernels import move

    pairs = _refine(source, target)
    if pairs is None:
        raise LayoutError("two placements whose digits do not nest")
    pairs.sort(key=lambda p: (p[1].field != 0, -abs(p[1].byte), -abs(p[1].field)))
    inner = [p for p in pairs if p[1].field]
    units = [p for p in pairs if not p[1].field]
    at = len(units)
    while at and prod(p[1].size for p in units[at - 1 :]) <= TABLE:
        at -= 1
    outer = _steps(units[:at])
    table = _table(units[at:], source, target)
    move.move(raw, out, outer, table, _table(inner, None, None), source.pieces(), target.pieces())


def _steps(pairs: list[tuple[Leg, Leg]]) -> Steps:
    from packfmt.kernels.move import Steps

    rows = [(t.size, s.byte, s.field, t.byte, t.field) for s, t in pairs]
    return Steps(*np.array(rows, np.int64).reshape(-1, 5).T.copy())


def _table(pairs: list[tuple[Leg, Leg]], source: Side | None, target: Side | None) -> Steps:
    """Every setting of these digits, slowest first; the sides' own origins are added where given."""
    from packfmt.kernels.move import Steps

    origin = [(side.byte, side.field) if side else (0, 0) for side in (source, target)]
    table = np.array([[*origin[0], *origin[1]]], np.int64)
    for s, t in pairs:
        step = np.array([s.byte, s.field, t.byte, t.field], np.int64)
        table = (table[:, None] + np.arange(t.size)[:, None] * step).reshape(-1, 4)
    return Steps(np.ones(len(table), np.int64), *table.T.copy())


# ---------------------------------------------------------------- arrays


def _bytes(array: Array) -> Array:
    """The bytes of a contiguous array, not copied."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _cropped(layout: Layout, fitted: Fitted, shape: tuple[int, int], name: str) -> tuple[int, ...]:
    """A part's shape without the positions that padding added."""
    part = fitted.parts[name]
    if part.shape == (-1,):
        return part.shape
    real = replace(layout, axes=tuple(replace(a, pad=1) for a in layout.axes))
    extents = [dict(rows=shape[0], cols=shape[1])[a.of] // a.per if a.of else a.size for a in real.axes]
    return tuple(-(-n // s) for n, s in zip(extents, part.share, strict=True))


def _crop(layout: Layout, fitted: Fitted, shape: tuple[int, int], name: str, array: Array) -> Array:
    want = _cropped(layout, fitted, shape, name)
    return array if want in (array.shape, (-1,)) else array[tuple(slice(n) for n in want)]


def _checked(layout: Layout, fitted: Fitted, shape: tuple[int, int], part: Part, parts: Arrays) -> Array:
    if part.name not in parts:
        raise LayoutError(f"{layout.name}: no part {part.name!r}; there are {', '.join(parts)}")
    got, dtype = parts[part.name], dtype_of(part.dtype)
    want = _cropped(layout, fitted, shape, part.name)
    fits = got.ndim == 1 if want == (-1,) else got.shape == want
    if got.dtype != dtype or not fits:
        raise LayoutError(f"{layout.name}: part {part.name!r} is {got.dtype} {got.shape}, needs {dtype} {want}")
    if part.bits < 8 * itemsize(part.dtype) and got.size and int(got.max()) >> part.bits:
        raise LayoutError(f"{layout.name}: part {part.name!r} has code {int(got.max())}, needs below {1 << part.bits}")
    if want != (-1,) and want != part.shape:
        got = np.pad(got, [(0, n - m) for n, m in zip(part.shape, want, strict=True)])
    return got
