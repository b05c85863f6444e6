"""Bring rows of packed weights into tiles of 16 or 32 rows, as fast as memory is read and written.

In a tile the rows are lanes: four bytes (or two, or one) of every row, then the next four of every row; a group of
rows is one stretch of memory, and rows that fill up the last one are zeros. What a tile holds of a row are bits that
the row has, somewhere, or what a small table or base 3 makes of some. So a dword of 16 rows is a vector, and a short
program of shifts makes the tile's dwords from the row's, the same for all rows and all runs of columns:

    program      which bits go where -> a Program
    rearrange    runs it over the rows of several arrays at once

The loop reads the program as it goes. That costs less than the memory does, for what it reads once it does for 32
rows; and one compiled function serves every layout. It gets addresses, so that rows may lie anywhere; the door keeps
the arrays alive and sees to it that nothing beyond them is read. Tiles are stored past the cache: they are read when
all is done, and not read before they are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from packfmt.errors import LayoutError
from packfmt.kernels import pages, simd, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.simd import VERSION
from packfmt.kernels.simd_code import I8, I32, I64, call, order
from packfmt.kernels.vectors import INTERPRETED, _wait_for_stores

LANES = 16  # rows of a tile
VECTOR = 64  # bytes: a dword of each row
AHEAD = 256  # bytes of each row that are asked for early: up to 1.1 times as fast as without, and as 1024
LEAST = 1 << 17  # bytes that are worth a thread


class Program(NamedTuple):
    """How a run of a row becomes a run of the tile: dwords are read, their bits gathered in others, and some written.

    In the room, a dword is a vector that holds it of 16 rows. Loads fill it from the first on, 16 at a time; what the
    last ones hold is written.

    loads : (n, 2) int64: which source, and the byte of a run from which 64 bytes are read
    steps : (n, 4) int64: kind, dword of the room that is made, and first and last but one of its moves
        PLAIN: the bits that its moves find
        LOOK_UP: of each byte of those the byte of `table`, for what is below 64
        DIGITS: their bytes' digits of base 3, the highest first: five dwords of codes 0 to 2
    moves : (n, 3) int64: a dword of the room, how far its bits are turned right, and which are taken then
    table : (64,) uint8
    """

    loads: np.ndarray
    steps: np.ndarray
    moves: np.ndarray
    table: np.ndarray


class Source(NamedTuple):
    """Bytes in which a run of each row begins `rows` bytes, and the next one `record` bytes further on.

    data : (bytes,) uint8
    rows : (rows,) int64
    """

    data: np.ndarray
    rows: np.ndarray
    record: int


PLAIN, LOOK_UP, DIGITS = range(3)
KINDS = [(16, 4, False), (16, 2, False), (16, 1, False), (32, 4, False), (32, 2, False), (32, 1, False), (32, 1, True)]
PAIR = 2 * LANES  # rows that go together
PIECE = 64  # bytes of a row that are read at once


class Target(NamedTuple):
    """Where runs go, one after the other: (groups, bytes) uint8.

    lanes : rows of a group, 16 or 32
    unit : bytes of a row that lie together, 1, 2 or 4, then come those of the next row
    woven : whether the rows are 0, 16, 1, 17 ...; of 32, in units of 1
    """

    out: np.ndarray
    lanes: int
    unit: int
    woven: bool = False


def rearrange(program: Program, sources: Sequence[Source], times: int, targets: Sequence[Target]) -> None:
    """Bring bits of rows into tiles, so many runs of each row. The last dwords of the room are the targets', in order.

    Raises
    ------
    LayoutError
        If a target has not as many rows as the sources, several runs that are no whole vectors, or no such lanes; or
        a source begins before its first byte, or goes backwards.
    """
    rows, lanes = len(sources[0].rows), targets[0].lanes
    for target in targets:
        if (target.lanes, target.unit, target.woven) not in KINDS or target.lanes != lanes:
            raise LayoutError(
                f"{target.lanes} rows in units of {target.unit}, needs one of {', '.join(map(str, KINDS))}"
            )
        if len(target.out) != -(-rows // lanes) or target.out.shape[1] % (times * VECTOR if times > 1 else 1):
            shape = target.out.shape
            raise LayoutError(
                f"out is {shape}, needs groups of {lanes} of {rows} rows, and {times} runs of whole vectors"
            )
    for source in sources:
        if min(int(source.rows.min(initial=0)), source.record) < 0 or len(source.rows) != rows:
            where = (
                f"{len(source.rows)} rows from byte {source.rows.min(initial=0)} on, runs every {source.record} bytes"
            )
            raise LayoutError(f"a source has {where}, needs {rows} rows, and no negative numbers")
    if not rows or not times:
        return
    run = _rearrange_plainly if INTERPRETED else _rearrange_in_vectors
    aligned = [target._replace(out=_aligned(target.out)) for target in targets]
    reach = [
        max((PIECE + int(byte) for which, byte in program.loads if which == k), default=0) for k in range(len(sources))
    ]
    direct, each = _direct_pairs(sources, times, reach), PAIR * sum(times * source.record for source in sources)

    def some(start: int, stop: int, alone: Sequence[Source] | None = None) -> None:
        if start == stop:
            return
        groups, places = slice(PAIR // lanes * start, PAIR // lanes * stop), slice(PAIR * start, PAIR * stop)
        from_ = alone or [source._replace(rows=source.rows[places]) for source in sources]
        run(program, from_, times, [target._replace(out=target.out[groups]) for target in aligned])

    threads.spread(some, direct, -(-LEAST // max(1, each)))
    for pair in range(direct, -(-rows // PAIR)):
        alone = [_apart(s, PAIR * pair, (times - 1) * s.record + more) for s, more in zip(sources, reach, strict=True)]
        some(pair, pair + 1, alone)
    for target, other in zip(targets, aligned, strict=True):
        if target.out is not other.out:
            target.out[...] = other.out[:, : target.out.shape[1]]


class Wanted(NamedTuple):
    """Elements that a program makes of bits.

    source : (n,) int64: which of the sources has bit i of what an element is made of
    bits : (elements, n) int64: where in a run of a row these bits are
    to : (elements, m) int64: where the element's go, as bits of the last dwords of the room
    kind : PLAIN, and then m is n; or LOOK_UP, of up to 6 bits; or DIGITS, of 8
    table : (64,) uint8, which has 0 for 0
    low : (elements,) int64: of DIGITS which of the five, else which bit of a byte of the table is the element's first
    """

    source: np.ndarray
    bits: np.ndarray
    to: np.ndarray
    kind: int
    table: np.ndarray
    low: np.ndarray


def program(wanted: Sequence[Wanted], dwords: int) -> Program:
    """What makes so many dwords, in which bits that nobody wants are 0. One at most is not PLAIN."""
    keys = [np.unique(w.bits, axis=0, return_inverse=True) if w.kind else (w.bits, w.low) for w in wanted]
    loads, places = _loads([(np.broadcast_to(w.source, k.shape), k) for w, (k, _) in zip(wanted, keys, strict=True)])
    steps, moves, first = list[list[int]](), list[tuple[int, ...]](), PIECE // 4 * len(loads)
    table = np.zeros(64, np.uint8)
    for i, w in enumerate(wanted):
        if not w.kind:
            continue
        # elements are looked up side by side in dwords of their own
        table, key, made = w.table, np.arange(len(places[i])), keys[i][1].reshape(-1)
        count, each = -(-len(key) // 4), 5 if w.kind == DIGITS else 1
        into = 8 * key[:, None] + np.arange(places[i].shape[1])
        _gather(steps, moves, into, places[i], first, count, each, w.kind)
        digit, bit = (w.low, 0) if w.kind == DIGITS else (0, w.low)
        start = 32 * (first + each * (made // 4) + digit) + 8 * (made % 4) + bit
        places[i] = start[:, None] + np.arange(w.to.shape[1])
        first += each * count
    to, found = (np.concatenate([array.reshape(-1) for array in arrays]) for arrays in ([w.to for w in wanted], places))
    _gather(steps, moves, to, found, first, dwords, 1, PLAIN)
    numbers = [np.array(rows, np.int64).reshape(-1, n) for rows, n in ((loads, 2), (steps, 4), (moves, 3))]
    return Program(numbers[0], numbers[1], numbers[2], table)


def _loads(needs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """The pieces that hold bits (source, bit), and where in the room those are then."""
    source, bits = (np.concatenate([need[i].reshape(-1) for need in needs]) for i in (0, 1))
    low = np.array([bits[source == k].min(initial=np.iinfo(np.int64).max) // 8 for k in range(source.max() + 1)])
    piece = (bits // 8 - low[source]) // PIECE
    far = int(piece.max()) + 1
    pieces, which = np.unique(piece + far * source, return_inverse=True)
    loads = [(int(p // far), int(low[p // far] + PIECE * (p % far))) for p in pieces]
    places = 8 * PIECE * which.reshape(-1) + bits - 8 * (low[source] + PIECE * piece)
    cuts = np.cumsum([need[1].size for need in needs])[:-1]
    return loads, [place.reshape(need[1].shape) for place, need in zip(np.split(places, cuts), needs, strict=True)]


def _gather(
    steps: list[list[int]],
    moves: list[tuple[int, ...]],
    to: np.ndarray,
    found: np.ndarray,
    first: int,
    count: int,
    each: int,
    kind: int,
) -> None:
    """Add steps that make `count` times `each` dwords from `first` on: their bits `to` are bits `found` of the room."""
    to, found = to.reshape(-1), found.reshape(-1)
    key = np.stack([to // 32, found // 32, (found - to) % 32])
    order = np.lexsort(key[::-1])
    key, bit = key[:, order], np.int64(1) << to[order] % 32
    starts = np.flatnonzero(np.append(True, (np.diff(key) != 0).any(0)))  # bits that move together
    ends = np.searchsorted(key[0, starts], np.arange(count + 1)) + len(moves)
    masks = np.bitwise_or.reduceat(bit, starts)
    moves += zip(key[1, starts].tolist(), key[2, starts].tolist(), masks.tolist(), strict=True)
    steps += [[kind, first + each * i, int(ends[i]), int(ends[i + 1])] for i in range(count)]


def _direct_pairs(sources: Sequence[Source], times: int, reach: Sequence[int]) -> int:
    """Pairs of 16 rows, from the first on, that are whole, and of which all that the program loads can be read."""
    rows = len(sources[0].rows) // PAIR * PAIR
    good = np.ones(rows // PAIR, bool)
    for source, more in zip(sources, reach, strict=True):
        last = source.rows[:rows].reshape(-1, PAIR).max(axis=1, initial=0) + (times - 1) * source.record + more
        good &= last <= len(source.data)
    return len(good) if good.all() else int(np.argmin(good))


def _apart(source: Source, first: int, size: int) -> Source:
    """A copy of 32 rows, with zeros behind what there is and for rows that there are not."""
    room = np.zeros((PAIR, size), np.uint8)
    for row, begins in zip(room, source.rows[first : first + PAIR].tolist(), strict=False):
        there = source.data[begins : begins + size]
        row[: len(there)] = there
    return Source(room.reshape(-1), np.arange(PAIR) * size, source.record)


def _rearrange_in_vectors(program: Program, sources: Sequence[Source], times: int, targets: Sequence[Target]) -> None:
    groups = len(targets[0].out)
    room = pages.empty(2 * VECTOR * (int(program.steps[-1, 1]) + 1))
    places = np.stack([source.rows + _address(source.data) for source in sources])
    records = np.array([source.record for source in sources])
    outs = np.array([
        (_address(out), out.strides[0], out.shape[1] // times // VECTOR, KINDS.index((lanes, unit, woven)))
        for out, lanes, unit, woven in targets
    ])  # fmt: skip
    for address, step, *_ in outs.tolist():
        _touch(0, groups, address, step)
    _rearranging(VERSION)(groups, times, places, records, *program, room, outs)


def _rearrange_plainly(program: Program, sources: Sequence[Source], times: int, targets: Sequence[Target]) -> None:
    groups, lanes = len(targets[0].out), targets[0].lanes
    rows = groups * lanes
    counts = [-(-target.out.shape[1] // times // (4 * lanes)) for target in targets]
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None, None]
    for t in range(times):
        room = np.zeros((int(program.steps[-1, 1]) + 1, rows), "<u4")
        for i, (which, byte) in enumerate(program.loads):
            begins = sources[which].rows[:rows, None] + byte + t * sources[which].record
            room[PIECE // 4 * i : PIECE // 4 * (i + 1)] = sources[which].data[begins + np.arange(PIECE)].view("<u4").T
        for kind, to, first, last in program.steps:
            found = np.zeros(rows, "<u4")
            for dword, turn, mask in program.moves[first:last]:
                twice = room[dword] * np.uint64((1 << 32) + 1)
                found |= (twice >> np.uint64(turn)).astype("<u4") & np.uint32(mask)
            in_bytes = found.view(np.uint8).reshape(rows, 4)
            if kind == DIGITS:
                digits = (in_bytes * powers).astype(np.uint16) * 3 >> 8
                room[to : to + 5] = digits.astype(np.uint8).view("<u4")[..., 0]
            else:
                room[to] = program.table[in_bytes & 63].view("<u4")[:, 0] if kind == LOOK_UP else found
        first = len(room) - sum(counts)
        for target, count in zip(targets, counts, strict=True):
            dwords = np.ascontiguousarray(room[first : first + count].T).view(np.uint8)
            units = dwords.reshape(groups, lanes, -1, target.unit)
            if target.woven:
                units = units.reshape(groups, 2, LANES, -1, 1).swapaxes(1, 2).reshape(groups, lanes, -1, 1)
            size = target.out.shape[1] // times
            target.out[:, t * size : (t + 1) * size] = units.swapaxes(1, 2).reshape(groups, -1)[:, :size]
            first += count


# ---- what the doors share


def _aligned(out: np.ndarray) -> np.ndarray:
    """The same array, or a wider one for the time being: stores past the cache need whole lines."""
    if out.shape[1] % VECTOR or _address(out) % VECTOR or (len(out) > 1 and out.strides[0] % VECTOR):
        wide = -(-out.shape[1] // VECTOR) * VECTOR
        return pages.empty(len(out) * wide).reshape(len(out), wide)
    return out


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


# ---- operations on addresses, with what LLVM has on any machine

Write = Callable[[ir.IRBuilder, Any, Any, Any, Any], None]


def _operation(write: Write) -> Any:
    """An operation of compiled functions on four numbers of 64 bits."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        write(builder, *given)
        return context.get_dummy_value()

    def typed(typing: Any, to: Any, a: Any, b: Any, count: Any) -> Any:
        return types.void(*[types.int64] * 4), code

    return intrinsic(typed)


def _load(build: ir.IRBuilder, at: Any, kind: ir.Type) -> Any:
    found = build.load(build.inttoptr(at, kind.as_pointer()))
    found.align = 1
    return found


def _store(build: ir.IRBuilder, to: Any, vector: Any) -> Any:
    stored = build.store(vector, build.inttoptr(to, vector.type.as_pointer()))
    stored.align = VECTOR
    return stored


def _pick(build: ir.IRBuilder, a: Any, b: Any, places: Sequence[int]) -> Any:
    """Elements of two vectors, those of the second counted on from those of the first."""
    return build.shuffle_vector(a, b, order(places))


def _turn_fours(build: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """In each four dwords of four vectors: rows become columns."""
    low, high = (
        [4 * lane + i + row for lane in range(4) for i in pair for row in (0, 16)] for pair in ((0, 1), (2, 3))
    )
    a, b, c, d = (_pick(build, rows[i], rows[i + 1], half) for i in (0, 2) for half in (low, high))
    first, second = (
        [4 * lane + row + i for lane in range(4) for row in (0, 16) for i in pair] for pair in ((0, 1), (2, 3))
    )
    return [_pick(build, *both, places) for both in ((a, c), (b, d)) for places in (first, second)]


def _turn_code(build: ir.IRBuilder, to: Any, at: Any, places: Any, _: Any) -> None:
    """16 dwords of 16 rows, which begin at places[r] + at -> for each dword a vector of the rows."""
    begins = build.inttoptr(places, I64.as_pointer())
    rows = []
    for r in range(LANES):
        place = build.add(at, build.load(build.gep(begins, [I64(r)])))
        early = build.inttoptr(build.add(place, I64(AHEAD)), I8.as_pointer())
        call(build, "llvm.prefetch.p0", ir.VoidType(), early, I32(0), I32(3), I32(1))  # to read, near, data
        rows.append(_load(build, place, ir.VectorType(I32, LANES)))
    # fours[k][c]: in lanes 4 l to 4 l + 3 dword 4 l + c of rows 4 k to 4 k + 3
    fours = [_turn_fours(build, rows[4 * k : 4 * k + 4]) for k in range(4)]
    for c in range(4):
        a, b, d, e = (four[c] for four in fours)
        for odd in (0, 1):
            both = [4 * four + i for four in (odd, odd + 2, odd + 4, odd + 6) for i in range(4)]
            upper, lower = _pick(build, a, b, both), _pick(build, d, e, both)
            for half in (0, 1):
                places = [4 * four + i for four in (half, half + 2, half + 4, half + 6) for i in range(4)]
                dword = 4 * (odd + 2 * half) + c
                _store(build, build.add(to, I64(VECTOR * dword)), _pick(build, upper, lower, places))


def _orders(lanes: int, unit: int, woven: bool) -> list[list[int]]:
    """Of a dword of 16 rows, and one of 16 more, the bytes in their order in memory."""
    rows = [r // 2 + r % 2 * LANES for r in range(PAIR)] if woven else range(lanes)
    places = [4 * row + u + i for u in range(0, 4, unit) for row in rows for i in range(unit)]
    return [places[at : at + VECTOR] for at in range(0, len(places), VECTOR)]


def _write_code(kind: tuple[int, int, bool]) -> Write:
    """A dword of 16 rows, and one of 16 more where they lie together -> so many vectors past the cache, one or two."""

    def write(build: ir.IRBuilder, to: Any, first: Any, second: Any, count: Any) -> None:
        a, b = (_load(build, at, ir.VectorType(I8, VECTOR)) for at in (first, second))
        for v, places in enumerate(_orders(*kind)):
            with build.if_then(build.icmp_signed(">", count, I64(v))):
                stored = _store(build, build.add(to, I64(VECTOR * v)), _pick(build, a, b, places))
                stored.set_metadata("nontemporal", build.module.add_metadata([I32(1)]))

    return write


def _clear_code(build: ir.IRBuilder, to: Any, *_: Any) -> None:
    build.store(I8(0), build.inttoptr(to, I8.as_pointer()))


_turn = _operation(_turn_code)


_dwords, _shorts, _bytes, _dwords_of_32, _shorts_of_32, _bytes_of_32, _woven = (
    _operation(_write_code(lanes)) for lanes in KINDS
)


_clear_byte = _operation(_clear_code)


# ---- loops


@njit(cache=True, nogil=True)
def _touch(start, stop, out, step):
    """Have the system bring the memory of groups start to stop before anything is stored past the cache.

    It clears new pages in the cache, from where they must be written back; waiting for that at every page took half
    as long again.
    """
    for group in range(start, stop):
        _clear_byte(out + group * step, 0, 0, 0)


@njit(cache=True, nogil=True)
def _digits(room, to, codes, low, three):
    """Base 3: a byte's digit is what is above 256 when it is tripled, and what is below has the next ones."""
    even, odd = simd.and_(codes, low), simd.and_(simd.shift_right(codes, np.int32(8)), low)
    for i in range(5):
        even, odd = simd.add(simd.add(even, even), even), simd.add(simd.add(odd, odd), odd)
        above = simd.and_(simd.shift_right(even, np.int32(8)), three)
        beside = simd.and_(odd, simd.shift_left(three, np.int32(8)))
        simd.store(room, to + VECTOR * i, simd.or_(above, beside))
        even, odd = simd.and_(even, low), simd.and_(odd, low)


@njit(cache=True, nogil=True)
def _write(pair, groups, t, at, size, outs):
    """What a run has made, the last dwords of the room."""
    dword = at + size
    for o in range(outs.shape[0]):
        dword -= VECTOR * _dwords_of(outs[o, 2], outs[o, 3])
    for o in range(outs.shape[0]):
        step, vectors, how = outs[o, 1], outs[o, 2], outs[o, 3]
        run = outs[o, 0] + t * VECTOR * vectors
        if how < 3:
            for half in range(min(2, groups - 2 * pair)):
                to, a = run + (2 * pair + half) * step, dword + half * size
                for v in range(0, VECTOR * vectors, VECTOR):
                    if how == 0:
                        _dwords(to + v, a + v, a + v, 1)
                    elif how == 1:
                        _shorts(to + v, a + v, a + v, 1)
                    else:
                        _bytes(to + v, a + v, a + v, 1)
        else:
            to, a = run + pair * step, dword
            for v in range(0, vectors, 2):
                if how == 3:
                    _dwords_of_32(to, a, a + size, vectors - v)
                elif how == 4:
                    _shorts_of_32(to, a, a + size, vectors - v)
                elif how == 5:
                    _bytes_of_32(to, a, a + size, vectors - v)
                else:
                    _woven(to, a, a + size, vectors - v)
                to, a = to + 2 * VECTOR, a + VECTOR
        dword += VECTOR * _dwords_of(vectors, how)


@njit(cache=True, nogil=True)
def _dwords_of(vectors, how):
    """How many of the room a run's vectors are made of."""
    return vectors if how < 3 else (vectors + 1) // 2


@cache
def _rearranging(version):
    """The loop, compiled for a version of the vectors' operations."""

    @njit(cache=True, nogil=True)
    def _rearrange(groups, times, places, records, loads, steps, moves, table, room, outs):
        """Both halves of a pair at once: what the program says is read once for 32 rows."""
        _ = version  # part of the key of compiled code
        size = room.size // 2
        at = room.ctypes.data
        begins = places.ctypes.data
        numbers = simd.load_bytes64(table, 0)
        low, three = simd.same_int(0x00FF00FF), simd.same_int(0x00030003)
        for pair in range(places.shape[1] // PAIR):
            for t in range(times):
                for i in range(loads.shape[0]):
                    first = loads[i, 1] + t * records[loads[i, 0]]
                    rows = begins + 8 * (places.shape[1] * loads[i, 0] + PAIR * pair)
                    for half in range(2):
                        _turn(at + PIECE * LANES * i + half * size, first, rows + 8 * LANES * half, 0)
                for s in range(steps.shape[0]):
                    a, b = simd.zero_ints(), simd.zero_ints()
                    for m in range(np.uint64(steps[s, 2]), np.uint64(steps[s, 3])):
                        turn, mask = np.int32(moves[m, 1]), simd.same_int(np.int32(moves[m, 2]))
                        x = simd.load_ints16(room, VECTOR * moves[m, 0])
                        y = simd.load_ints16(room, VECTOR * moves[m, 0] + size)
                        a = simd.or_(a, simd.and_(simd.funnel(x, x, turn), mask))
                        b = simd.or_(b, simd.and_(simd.funnel(y, y, turn), mask))
                    to = VECTOR * steps[s, 1]
                    if steps[s, 0] == DIGITS:
                        _digits(room, to, a, low, three)
                        _digits(room, to + size, b, low, three)
                        continue
                    if steps[s, 0] == LOOK_UP:
                        a = simd.as_ints(simd.look_up_64(numbers, simd.as_bytes(a)))
                        b = simd.as_ints(simd.look_up_64(numbers, simd.as_bytes(b)))
                    simd.store(room, to, a)
                    simd.store(room, to + size, b)
                _write(pair, groups, t, at, size, outs)
        _wait_for_stores()

    return _rearrange
