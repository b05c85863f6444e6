"""Pack, unpack and repack any layout: its description in, three small tables out, one loop over them.

`unpack` moves a layout's codes into plain row-major parts, `pack` the other way, `repack` straight
from one layout into another. All three are the same move between two sides; a part is itself a
side, the plain one. Nothing of the size of the tensor is made beside input and output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise, product
from math import gcd, lcm, prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.layout import BIT, WORD, Fitted, Layout, Member, Part, Placed, dtype_of, itemsize

if TYPE_CHECKING:
    from packfmt.kernels.move import Pieces, Run, Steps

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Ints = npt.NDArray[np.int64]

MOST_KEPT: Final = 8  # moves kept for the next tensor of a shape
MOST_PIECES: Final = 1 << 12  # in all of them
MOST_BITS: Final = 1 << 16  # in one table of pieces
NEAR: Final = 1 << 14  # bytes that a run may span: half of a first-level cache
WORTH: Final = 16  # repetitions that make a run worth starting
ENOUGH: Final = 1 << 10  # pieces that make a step of the outer counter worth taking


def unpack(
    layout: Layout, shape: tuple[int, int], components: Arrays, without: frozenset[str] = frozenset()
) -> dict[str, Array]:
    """Components -> one array a part, in the order of the layout's axes.

    shape : (rows, cols) of the weight. Codes come as the smallest unsigned integers that hold them,
    values in their own dtype; `layout.fit(*shape).parts` has names and dtypes. Streams pass as they are.
    without : parts that are not wanted

    Raises
    ------
    LayoutError
        If a component is missing, or has another dtype or shape than the layout gives it.
    """
    fitted = layout.fit(*shape)
    parts = {s.name: _component(layout, components, s.name) for s in layout.streams}
    for part in fitted.parts.values():
        if part.name not in parts and part.name not in without:
            parts[part.name] = np.zeros(part.shape, dtype_of(part.dtype))
    for placed in fitted.components:
        raw = _bytes(_checked_component(layout, placed, components))
        for m in placed.members:
            if m.part in without:
                continue
            part = fitted.parts[m.part]
            _move(raw, member_side(fitted, placed, m), _bytes(parts[part.name]), part_side(part), part.shape)
    return parts


def pack(layout: Layout, shape: tuple[int, int], parts: Arrays) -> dict[str, Array]:
    """Parts -> components: the exact inverse of `unpack`. Bits that no member holds are zero.

    Raises
    ------
    LayoutError
        If a part is missing, has another shape or kind of number, or holds a code too large.
    """
    fitted = layout.fit(*shape)
    for part in fitted.parts.values():
        _check_part(layout, part, parts)
    components: dict[str, Array] = {s.name: parts[s.name] for s in layout.streams}
    for placed in fitted.components:
        out = np.zeros(placed.shape, dtype_of(placed.dtype))
        for m in placed.members:
            part = fitted.parts[m.part]
            _move(_bytes(parts[part.name]), part_side(part), _bytes(out), member_side(fitted, placed, m), part.shape)
        components[placed.name] = out
    return components


def repack(
    source: Layout, target: Layout, shape: tuple[int, int], components: Arrays, given: Arrays | None = None
) -> dict[str, Array]:
    """Components of one layout -> components of another with the same parts, bit for bit.

    given : parts of the target that are taken from here, whatever the source has; what only the source has is
        left out then

    Raises
    ------
    LayoutError
        If the layouts' parts differ (`difference`), or a component or a given part is not what its layout says.
    """
    given = given or {}
    before, after = source.fit(*shape), target.fit(*shape)
    without = frozenset(given) | (before.parts.keys() - after.parts.keys() if given else frozenset())
    if reason := difference(source, target, shape, without):
        raise LayoutError(f"{source.name} to {target.name}: {reason}")
    for name in given:
        _check_part(target, after.parts[name], given)
    out = {s.name: _component(source, components, s.name) for s in target.streams}
    for there in after.components:
        out[there.name] = np.zeros(there.shape, dtype_of(there.dtype))
        for n in there.members:
            part = after.parts[n.part]
            side, whole = member_side(after, there, n), _bytes(out[there.name])
            if n.part in given:
                _move(_bytes(given[n.part]), part_side(part), whole, side, part.shape)
                continue
            for here in before.components:
                raw = _bytes(_checked_component(source, here, components))
                for m in here.members:
                    if m.part == n.part:
                        _move(raw, member_side(before, here, m), whole, side, part.shape)
    return out


def difference(source: Layout, target: Layout, shape: tuple[int, int], without: frozenset[str] = frozenset()) -> str:
    """Why the parts of one layout, but for those in `without`, are not those of another; empty if they are."""
    a, b = source.fit(*shape), target.fit(*shape)
    if a.parts.keys() - without != b.parts.keys() - without:
        return f"one has {', '.join(a.parts)}, the other {', '.join(b.parts)}"
    axes = [[(x.of, x.per, x.size, x.plus) for x in layout.axes] for layout in (source, target)]
    if axes[0] != axes[1]:
        return f"the axes of one are {axes[0]}, of the other {axes[1]}"
    for name in a.parts.keys() - without:
        part, other = a.parts[name], b.parts[name]
        # along an axis with one element, what it is shared by is the whole axis, padding or not
        shares = [[s for s, n in zip(p.share, p.shape, strict=False) if n > 1] for p in (part, other)]
        if part.shape != other.shape or shares[0] != shares[1]:
            return f"{name} is {part.shape} in one, {other.shape} in the other"
        if (part.dtype, part.bits) != (other.dtype, other.bits):
            return f"{name} is {part.dtype} of {part.bits} bits in one, {other.dtype} of {other.bits} in the other"
    return ""


# ---------------------------------------------------------------- arrays


def _bytes(array: Array) -> Array:
    """The bytes of an array; not copied if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _component(layout: Layout, components: Arrays, name: str) -> Array:
    if name not in components:
        raise LayoutError(f"{layout.name}: no component {name!r}; there are {', '.join(components)}")
    return components[name]


def _checked_component(layout: Layout, placed: Placed, components: Arrays) -> Array:
    got, dtype = _component(layout, components, placed.name), dtype_of(placed.dtype)
    if got.dtype != dtype or got.shape != placed.shape:
        raise LayoutError(
            f"{layout.name}: component {placed.name!r} is {got.dtype} {got.shape}, needs {dtype} {placed.shape}"
        )
    return got


def _check_part(layout: Layout, part: Part, parts: Arrays) -> None:
    if part.name not in parts:
        raise LayoutError(f"{layout.name}: no part {part.name!r}; there are {', '.join(parts)}")
    got, dtype = parts[part.name], dtype_of(part.dtype)
    fits = got.ndim == 1 if part.shape == (-1,) else got.shape == part.shape
    if got.dtype != dtype or not fits:
        raise LayoutError(f"{layout.name}: part {part.name!r} is {got.dtype} {got.shape}, needs {dtype} {part.shape}")
    if part.bits < 8 * itemsize(part.dtype) and got.size and int(got.max()) >> part.bits:
        raise LayoutError(f"{layout.name}: part {part.name!r} has code {int(got.max())}, needs below {1 << part.bits}")


# ---------------------------------------------------------------- sides


@dataclass(frozen=True, slots=True)
class Leg:
    """A digit with the place that a step of it adds: whole bytes, and bits within a unit."""

    axis: int  # of the layout, or CODE_BITS
    stride: int  # in elements of the part
    size: int
    byte: int
    bit: int


CODE_BITS: Final = -1  # the axis along which the bits of one code lie


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a move: where element zero lies, and how the place grows along every axis.

    A place is a byte and a bit from there on. Bits count on from word to word of a unit, and the
    words of a unit may lie `gap` bytes apart.
    """

    byte: int
    bit: int
    legs: tuple[Leg, ...]
    low: int  # which bits of the code lie here: low to high
    high: int
    word: int  # bytes
    gap: int

    def strides(self, axis: int) -> set[int]:
        return {leg.stride for leg in self.legs if leg.axis == axis and leg.size > 1}

    def steps(self, axis: int, index: Ints) -> Ints:
        """(n,) positions along an axis -> (n, 2): the bytes and bits that they add."""
        out = np.zeros((len(index), 2), np.int64)
        for leg in self.legs:
            if leg.axis == axis:
                out += (index // leg.stride % leg.size)[:, None] * np.array([leg.byte, leg.bit])
        return out

    def address(self, place: Ints) -> Ints:
        """(n, 2) bytes and bits -> (n,): bit n & 7 of byte n >> 3."""
        word, bit = np.divmod(place[:, 1], 8 * self.word)
        number: Ints = 8 * (place[:, 0] + self.gap * word) + bit
        return number


def member_side(fitted: Fitted, placed: Placed, m: Member) -> Side:
    """A member in its component's bytes."""
    sizes = [d.size for d in placed.over]
    split = next((i for i, d in enumerate(placed.over) if d.axis == WORD), None)
    # where the words of a unit lie apart, a step of the digits beyond is one word
    cell = placed.cell_bytes if split is None else m.word
    over = [cell * prod(sizes[i + 1 :]) for i in range(len(sizes))]
    gap = m.word if split is None else over[split]
    digits = [(d, step, 0) for d, step in zip(placed.over, over, strict=True) if d.axis != WORD]
    digits += [(d, m.word * m.words * prod(e.size for e in m.units[i + 1 :]), 0) for i, d in enumerate(m.units)]
    digits += [(d, 0, m.bits * prod(e.size for e in m.fields[i + 1 :])) for i, d in enumerate(m.fields)]
    byte, bit = divmod(m.start, 8)
    whole = bit == 0 and gap == m.word  # then eight bits of a unit are a byte, wherever they are
    axes, share = list(fitted.extents), fitted.parts[m.part].share
    legs = [Leg(CODE_BITS, 1, m.bits, 0, 1)]
    for d, by, bi in digits:
        if d.reverse:
            byte, bit, by, bi = byte + by * (d.size - 1), bit + bi * (d.size - 1), -by, -bi
        if d.axis == BIT:
            legs.append(Leg(CODE_BITS, d.stride * m.bits, d.size, by, bi))
            continue
        i = axes.index(d.axis)
        leg = Leg(i, d.stride // share[i], d.size, by, bi)
        last = d in m.fields[:1] and d.stride * d.size == fitted.extents[d.axis] and not d.reverse
        legs += _bytewise(leg, last) if whole else [leg]
    code_bits = m.bits * prod(g.size for g in legs[1:] if g.axis == CODE_BITS)
    return Side(byte, bit, tuple(legs), m.low, m.low + code_bits, m.word, gap)


def part_side(part: Part) -> Side:
    """The part itself: row-major whole numbers."""
    size = itemsize(part.dtype)
    legs = [Leg(i, 1, n, size * prod(part.shape[i + 1 :]), 0) for i, n in enumerate(part.shape)]
    return Side(0, 0, (Leg(CODE_BITS, 1, part.bits, 0, 1), *legs), 0, part.bits, size, size)


def _bytewise(leg: Leg, last: bool) -> list[Leg]:
    """The leg cut where its steps are whole bytes, into one leg of bits and one of bytes.

    Its size must divide, or it must be the last: it counts up, and nothing follows it in unit or axis.
    """
    period = 8 // gcd(8, leg.bit)
    if leg.size % period and not last:
        return [leg]
    step = leg.byte + leg.bit * period // 8
    return [
        Leg(leg.axis, leg.stride, period, leg.byte, leg.bit),
        Leg(leg.axis, leg.stride * period, -(-leg.size // period), step, 0),
    ]


# ---------------------------------------------------------------- moves


@dataclass(frozen=True, slots=True)
class Even:
    """A digit that moves by whole bytes on both sides."""

    size: int
    source: int
    target: int

    @property
    def reach(self) -> int:
        return max(abs(self.source), abs(self.target))


Move = tuple["Steps", "Pieces", "Run"]  # what the loop takes besides the bytes


def _move(raw: Array, source: Side, out: Array, target: Side, counts: tuple[int, ...]) -> None:
    """Copy what both sides hold of the elements of one part, `counts` of them along the axes."""
    from packfmt.kernels import move

    for steps, pieces, run in _few_moves(source, target, counts) or _moves(source, target, counts):
        move.move(raw, out, steps, pieces, run)


@lru_cache(maxsize=64)
def _few_moves(source: Side, target: Side, counts: tuple[int, ...]) -> tuple[Move, ...]:
    """The moves, kept for the next tensor of this shape, for models repeat shapes; none if they are not small."""
    few = tuple(islice(_moves(source, target, counts), MOST_KEPT + 1))
    small = len(few) <= MOST_KEPT and sum(len(pieces.mask) for _, pieces, _ in few) <= MOST_PIECES
    return few if small else ()


def _moves(source: Side, target: Side, counts: tuple[int, ...]) -> Iterator[Move]:
    """Cut the elements into boxes in which all digits run evenly, and each box into moves."""
    bits = np.arange(max(source.low, target.low), min(source.high, target.high))
    if not len(bits):
        return
    origin = np.array([[source.byte, source.bit, target.byte, target.bit]])
    boxes = [_boxes(source.strides(axis) | target.strides(axis), n) for axis, n in enumerate(counts)]
    for box in product(*boxes):
        tables = [origin]  # of places, to be combined each with each
        even = []
        for axis, (positions, digits) in enumerate(box):
            tables.append(_steps(source, target, axis, positions))
            for stride, size in digits:
                step = _steps(source, target, axis, np.array([stride]))
                if step[0, 1] or step[0, 3]:
                    tables.append(step * np.arange(size)[:, None])
                else:
                    even.append(Even(size, int(step[0, 0]), int(step[0, 2])))
        # neighbouring bits last, so that they move as one piece
        tables.sort(key=lambda table: -abs(table[-1] - table[0])[[1, 3]].max())
        tables.append(_steps(source, target, CODE_BITS, bits))
        yield from _sweep(source, target, tables, even)


def _steps(source: Side, target: Side, axis: int, index: Ints) -> Ints:
    """(n,) positions -> (n, 4): bytes and bits that they add to the place in source and target."""
    low = (source.low, target.low) if axis == CODE_BITS else (0, 0)
    return np.hstack([side.steps(axis, index - start) for side, start in zip((source, target), low, strict=True)])


def _boxes(strides: Iterable[int], count: int) -> list[tuple[Ints, list[tuple[int, int]]]]:
    """Cut the positions [0, count) of an axis into boxes in which the digits of both sides run evenly.

    A box has digits (stride, size), each stride a multiple of the one before, and the positions below the
    first stride, one by one. It is one position, unless digits do not nest, such as ten beside 32 columns.
    A count that fills no whole number of steps leaves a rest, which is a box of its own.
    """
    chain = [1]
    for stride in sorted(s for s in strides if s < count):
        if stride % chain[-1]:
            chain = [lcm(stride, chain[-1])]
        elif stride > chain[-1]:
            chain.append(stride)
    out, start = [], 0
    for i, stride in reversed(list(enumerate(chain))):
        if size := (count - start) // stride:
            below = [(low, high // low) for low, high in pairwise(chain[: i + 1])]
            out.append((np.arange(start, start + chain[0]), [*below, (stride, size)]))
        start += size * stride
    if start < count:
        out.append((np.arange(start, count), []))
    return out


def _sweep(source: Side, target: Side, tables: list[Ints], even: list[Even]) -> Iterator[Move]:
    """Decide what becomes table, run and outer counter of the loop."""
    from packfmt.kernels import move

    backward = [e for e in even if e.target < 0]  # is walked from its far end
    even = _merged([Even(e.size, -e.source, -e.target) if e.target < 0 else e for e in even])
    run = max((e for e in even if e.source > 0), key=lambda e: (min(e.size, WORTH), -e.target), default=Even(1, 0, 0))
    rest = sorted((e for e in even if e is not run), key=lambda e: -e.reach)
    for table in _combined(tables):
        table[:, [0, 2]] += sum(np.array([e.source, e.target]) * (e.size - 1) for e in backward)
        pieces = _pieces(source.address(table[:, :2]), target.address(table[:, 2:]))
        here, pieces = _widened(run, pieces)
        block = max(WORTH, NEAR // max(1, here.reach))
        outer = list(rest)
        while outer and (room := ENOUGH // (len(pieces.mask) * min(block, here.size))) > 1:
            near = outer.pop()
            size = gcd(near.size, 1 << room.bit_length() - 1)
            pieces = _repeated(pieces, Even(size, near.source, near.target))
            if size < near.size:
                outer.append(Even(near.size // size, near.source * size, near.target * size))
                break
        steps = np.array([(e.size, e.source, e.target) for e in outer], np.int64).reshape(-1, 3)
        yield move.Steps(*steps.T.copy()), pieces, move.Run(here.size, here.source, here.target, block)


def _merged(even: list[Even]) -> list[Even]:
    """Digits that continue each other made one, slowest first."""
    out: list[Even] = []
    for e in sorted(even, key=lambda e: (-e.target, -abs(e.source))):
        if e.size == 1:
            continue
        if out and (out[-1].source, out[-1].target) == (e.source * e.size, e.target * e.size):
            e = Even(out.pop().size * e.size, e.source, e.target)
        out.append(e)
    return out


def _combined(tables: list[Ints]) -> Iterator[Ints]:
    """Sums of one row of each table, the last running fastest; in several tables if they are many."""
    if prod(len(t) for t in tables) > MOST_BITS:
        i = max(range(len(tables)), key=lambda i: len(tables[i]))
        for half in np.array_split(tables[i], 2):
            yield from _combined([*tables[:i], half, *tables[i + 1 :]])
        return
    out = tables[0]
    for table in tables[1:]:
        out = (out[:, None] + table).reshape(-1, 4)
    yield out


def _pieces(source: Ints, target: Ints) -> Pieces:
    """Bit numbers on both sides -> pieces: bits that follow each other within one byte of both."""
    from packfmt.kernels.move import Pieces

    starts = np.ones(len(source), bool)
    starts[1:] = (np.diff(source) != 1) | (np.diff(target) != 1) | (source[1:] % 8 == 0) | (target[1:] % 8 == 0)
    first = np.flatnonzero(starts)
    bits = np.diff(first, append=len(source))
    a, b = source[first], target[first]
    mask, factor = ((1 << bits) - 1) << a % 8, 1 << (8 + b % 8 - a % 8)
    return Pieces(a // 8, b // 8, mask.astype(np.uint64), factor.astype(np.uint64))


def _repeated(pieces: Pieces, digit: Even) -> Pieces:
    from packfmt.kernels.move import Pieces

    steps = np.arange(digit.size)[:, None]
    source, target = (steps * digit.source + pieces.source).ravel(), (steps * digit.target + pieces.target).ravel()
    return Pieces(source, target, np.tile(pieces.mask, digit.size), np.tile(pieces.factor, digit.size))


def _widened(run: Even, pieces: Pieces) -> tuple[Even, Pieces]:
    """A run over whole numbers as a run over their bytes, where they lie side by side."""
    size = len(pieces.mask)
    side_by_side = (np.diff(pieces.source) == 1).all() and (np.diff(pieces.target) == 1).all()
    if side_by_side and (pieces.mask == 255).all() and (run.source, run.target) in ((size, size), (0, 0)):
        return Even(run.size * size, 1, 1), type(pieces)(*(field[:1] for field in pieces))
    return run, pieces
