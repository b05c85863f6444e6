"""Bring rows of packed weights into tiles of 16 or 32 rows, as fast as memory is read and written.

In a tile the rows are lanes: four bytes (or two, or one) of every row, then the next four of every row; a group of
rows is one stretch of memory, and rows that fill up the last one are zeros. What a tile holds of a row are bits that
the row has, somewhere, or what a table makes of up to eight of them. So eight bytes of eight rows are a vector, a word
of each, and a short program makes the tile's words from the row's, the same for all rows and all runs of columns:

    program      which bits go where -> a Program
    rearrange    runs it over the rows of several arrays at once

A move of the program turns a word, and takes some of its bits. There are machines that turn it for each byte of the
result by another number, so that one move brings many codes to where they belong; elsewhere all bytes turn alike.

The loop reads the program as it goes. That costs less than the memory does, for what it reads once it does for 32
rows; and one compiled function serves every layout. It gets addresses, so that rows may lie anywhere; the door keeps
the arrays alive and sees to it that nothing beyond them is read. Tiles are stored past the cache: they are read when
all is done, and not read before they are overwritten.

Source: Intel 64 and IA-32 Software Developer's Manual, volume 2 (VPMULTISHIFTQB)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from packfmt.errors import LayoutError
from packfmt.kernels import pages, simd, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.simd import INTERPRETED, VERSION, Bytes64
from packfmt.kernels.simd_code import I8, I32, I64, VPERMB, all_lanes, call, constant, operation, order
from packfmt.kernels.tile_code import entry
from packfmt.kernels.vectors import _wait_for_stores

LANES = 16  # rows of a tile
VECTOR = 64  # bytes
WORD = 8  # bytes of a row that go together
AHEAD = 256  # bytes of each row that are asked for early: up to 1.1 times as fast as without, and as 1024
LEAST = 1 << 17  # bytes that are worth a thread


class Program(NamedTuple):
    """How a run of a row becomes a run of the tile: words are read, their bits gathered in others, and some written.

    In the room, a word of eight bytes is four vectors that hold it of 32 rows. Loads fill it from the first on; what
    the last ones hold is written.

    loads : (n, 3) int64: which source, the byte of a run from which words are read, and how many: 8 or 1
    steps : (n, 5) int64: first word of the room that is made, first move and the one after the last; then of how many
        words each byte is looked up for what moves have found, each in four tables, and the first of those. None: the
        word is what moves have found
    moves : (n, 3) int64: a word of the room, for each byte of the result how far the word's bits are turned right, and
        which of the result are taken. Without `EACH_BYTE` the turn of the first byte is that of all, 8 more in each
    tables : (n, 64) uint8: for bytes below 64, below 128 and so on
    """

    loads: np.ndarray
    steps: np.ndarray
    moves: np.ndarray
    tables: np.ndarray


class Source(NamedTuple):
    """Bytes in which a run of each row begins `rows` bytes, and the next one `record` bytes further on.

    data : (bytes,) uint8
    rows : (rows,) int64
    """

    data: np.ndarray
    rows: np.ndarray
    record: int


KINDS = [(16, 4, False), (16, 2, False), (16, 1, False), (32, 4, False), (32, 2, False), (32, 1, False), (32, 1, True)]
OF_32 = 3  # the first of these with 32 rows
PAIR = 2 * LANES  # rows that go together
FOUR = PAIR * WORD  # bytes of a word in the room
PIECE = 64  # bytes of a row that are read at once
EMPTY = np.zeros(0, np.int64)
EACH_BYTE = VPERMB  # VPMULTISHIFTQB came with VPERMB


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
    """Bring bits of rows into tiles, so many runs of each row. The last words of the room are the targets', in order.

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
        max((byte + WORD * words for which, byte, words in program.loads.tolist() if which == k), default=0)
        for k in range(len(sources))
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
        if rows % lanes:  # a table has something for the zeros of rows that there are not
            target.out[-1].reshape(-1, lanes, target.unit)[:, np.array(_rows(lanes, target.woven)) >= rows % lanes] = 0


class Wanted(NamedTuple):
    """Elements that a program makes of bits.

    source : (n,) int64: which of the sources has bit i of what an element is made of
    bits : (elements, n) int64: where in a run of a row these bits are
    to : (elements, m) int64: where the element's go, as bits of the last words of the room
    table : (256,) of unsigned numbers: an element is of what it has for a number of up to 8 bits; None: m is n
    low : (elements,) int64: which bit of a number of the table is the element's first
    """

    source: np.ndarray
    bits: np.ndarray
    to: np.ndarray
    table: np.ndarray | None = None
    low: np.ndarray | None = None


def program(wanted: Sequence[Wanted], words: int) -> Program:
    """What makes so many words, in which bits that nobody wants are 0."""
    # what is looked up is so once, for all elements that are made of it
    found = [(w.bits, EMPTY) if w.table is None else np.unique(w.bits, axis=0, return_inverse=True) for w in wanted]
    needs = [(np.broadcast_to(w.source, bits.shape), bits) for w, (bits, _) in zip(wanted, found, strict=True)]
    loads, places, first = _loads(needs)
    steps, moves = list[list[int]](), [np.zeros((0, 3), np.int64)]
    tables = [np.zeros((0, 64), np.uint8)]
    for i, w in enumerate(wanted):
        if w.table is None or w.low is None:
            continue
        bit, key = w.low[:, None] + np.arange(w.to.shape[1]), found[i][1].reshape(-1, 1)
        count, each = -(-len(places[i]) // WORD), int(bit.max()) // 8 + 1  # words side by side, and bytes of a number
        to = 8 * np.arange(len(places[i]))[:, None] + np.arange(places[i].shape[1])
        looked_up = each, sum(map(len, tables))
        _gather(steps, moves, to, places[i], [(first + each * word, *looked_up) for word in range(count)])
        numbers = w.table[:, None] >> np.arange(0, 8 * each, 8, dtype=w.table.dtype)
        tables.append((numbers & 255).astype(np.uint8).T.reshape(-1, 64))
        places[i] = 64 * (first + each * (key // WORD) + bit // 8) + 8 * (key % WORD) + bit % 8
        first += each * count
    to, bits = (np.concatenate([array.reshape(-1) for array in arrays]) for arrays in ([w.to for w in wanted], places))
    _gather(steps, moves, to, bits, [(first + word, 0, 0) for word in range(words)])
    return Program(np.array(loads), np.array(steps), np.concatenate(moves), np.concatenate(tables))


def _loads(
    needs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[list[tuple[int, int, int]], list[np.ndarray], int]:
    """The words that hold bits (source, bit), eight or one at a time; where in the room the bits are, and its words."""
    source, bits = (np.concatenate([need[i].reshape(-1) for need in needs]) for i in (0, 1))
    far = int(bits.max()) // 8 + PIECE
    bytes_, byte = np.unique(source * far + bits // 8, return_inverse=True)
    loads, places, words, at = list[tuple[int, int, int]](), np.zeros(len(bytes_), np.int64), 0, 0
    while at < len(bytes_):
        one, eight = np.searchsorted(bytes_, bytes_[at] + np.array([WORD, PIECE]))
        end, count = (one, 1) if one == eight else (eight, 8)
        which, last = divmod(int(bytes_[end - 1]), far)
        first = min(int(bytes_[at]) % far, max(0, last + 1 - WORD * count))  # so nothing behind the last byte is read
        loads.append((which, first, count))
        places[at:end] = WORD * words + bytes_[at:end] - (which * far + first)
        at, words = int(end), words + count
    found = 8 * places[byte.reshape(-1)] + bits % 8
    cuts = np.cumsum([need[1].size for need in needs])[:-1]
    return loads, [part.reshape(need[1].shape) for part, need in zip(np.split(found, cuts), needs, strict=True)], words


def _gather(
    steps: list[list[int]],
    moves: list[np.ndarray],
    to: np.ndarray,
    found: np.ndarray,
    made: Sequence[tuple[int, int, int]],
) -> None:
    """Add steps, and what they move: bits `to` of the words that they make are bits `found` of the room.

    made : of each step the word, how many are looked up for it, and in which tables
    """
    to, found = to.reshape(-1), found.reshape(-1)
    byte, here, far = to // 8, found // 64, int(found.max(initial=0)) // 64 + 1
    # which bytes of the result have bits of which word, turned by how much
    turn = (found - (to % 8 if EACH_BYTE else to)) % 64
    pieces, piece = np.unique((byte * far + here) * 64 + turn, return_inverse=True)
    both, turns = pieces // 64, pieces % 64
    # one move has one turn for each byte, or for all
    which = np.arange(len(both)) - np.searchsorted(both, both) if EACH_BYTE else turns
    first, move = np.unique((both // far // 8 * far + both % far) * 64 + which, return_inverse=True)
    out = np.zeros((len(first), 3, 8), np.uint8)
    out[:, 0] = (first // 64 % far).astype("<i8")[:, None].view(np.uint8)
    out[move, 1, both // far % 8] = turns
    if not EACH_BYTE:
        out[:, 1] = (first % 64)[:, None] + np.arange(0, 64, 8)
    np.bitwise_or.at(out[:, 2], (move[piece], byte % 8), (1 << to % 8).astype(np.uint8))
    ends = np.searchsorted(first // 64 // far, np.arange(len(made) + 1)) + sum(map(len, moves))
    moves.append(out.view("<i8")[..., 0])
    steps += [[word, int(ends[i]), int(ends[i + 1]), *looked_up] for i, (word, *looked_up) in enumerate(made)]


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
    room = pages.empty(FOUR * (int(program.steps[-1, 0]) + 1))
    places = np.stack([source.rows + _address(source.data) for source in sources])
    records = np.array([source.record for source in sources])
    outs = np.array([
        (_address(out), out.strides[0], size // VECTOR, -(-size // (lanes * WORD)), KINDS.index((lanes, unit, woven)))
        for out, lanes, unit, woven in targets if (size := out.shape[1] // times)
    ])  # fmt: skip
    _compiled(VERSION)(groups, times, places, records, *program, room, outs)


@cache
def _compiled(version: str) -> Callable[..., None]:
    """The loop, for arrays of the dtypes that a program has."""
    number, line, lines = types.int64, types.int64[::1], types.int64[:, ::1]
    bytes_, tables = types.uint8[::1], types.uint8[:, ::1]
    return entry(_rearranging(version), number, number, lines, line, lines, lines, lines, tables, bytes_, lines)


def _rearrange_plainly(program: Program, sources: Sequence[Source], times: int, targets: Sequence[Target]) -> None:
    groups, lanes = len(targets[0].out), targets[0].lanes
    rows = groups * lanes
    counts = [-(-target.out.shape[1] // times // (WORD * lanes)) for target in targets]
    for t in range(times):
        room = np.zeros((int(program.steps[-1, 0]) + 1, rows), "<u8")
        at = 0
        for which, byte, words in program.loads.tolist():
            begins = sources[which].rows[:rows, None] + byte + t * sources[which].record
            room[at : at + words] = sources[which].data[begins + np.arange(WORD * words)].view("<u8").T
            at += words
        for to, first, last, count, table in program.steps.tolist():
            found = np.zeros((rows, WORD), np.uint8)
            for move in program.moves[first:last]:
                turns, masks = move[1:, None].astype("<i8").view(np.uint8)
                word = room[move[0], :, None]
                found |= (word >> turns.astype("<u8") | word << (-turns % 64).astype("<u8")).astype(np.uint8) & masks
            tables = program.tables[table : table + 4 * count].reshape(-1, 256)
            made = tables.take(found, axis=1) if count else found[None]
            room[to : to + len(made)] = made.view("<u8")[..., 0]
        first = len(room) - sum(counts)
        for target, count in zip(targets, counts, strict=True):
            words = np.ascontiguousarray(room[first : first + count].T).view(np.uint8)
            units = words.reshape(groups, lanes, -1, target.unit)[:, _rows(lanes, target.woven)]
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


def _rows(lanes: int, woven: bool) -> list[int]:
    """The rows of a group in their order in memory."""
    return [r // 2 + r % 2 * LANES for r in range(PAIR)] if woven else [*range(lanes)]


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


def _turn_eight(build: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """Of eight vectors of eight words: rows become columns, in squares of two, of four, and all."""
    for step in (1, 2, 4):
        upper = [8 + j - step if j & step else j for j in range(8)]
        lower = [8 + j if j & step else j + step for j in range(8)]
        rows = [_pick(build, rows[i & ~step], rows[i | step], lower if i & step else upper) for i in range(8)]
    return rows


def _of_rows(write: Write) -> Write:
    """The same for eight rows, four times."""

    def four(build: ir.IRBuilder, to: Any, at: Any, places: Any, _: Any) -> None:
        with cgutils.for_range(build, I64(4)) as loop:
            part = build.mul(loop.index, I64(VECTOR))
            write(build, build.add(to, part), at, build.add(places, part), _)

    return four


def _turn_code(build: ir.IRBuilder, to: Any, at: Any, places: Any, _: Any) -> None:
    """Eight words of eight rows, which begin at places[r] + at -> for each word a vector of the rows."""
    rows = []
    for place in _begins(build, at, places):
        early = build.inttoptr(build.add(place, I64(AHEAD)), I8.as_pointer())
        call(build, "llvm.prefetch.p0", ir.VoidType(), early, I32(0), I32(3), I32(1))  # to read, near, data
        rows.append(_load(build, place, ir.VectorType(I64, 8)))
    for i, column in enumerate(_turn_eight(build, rows)):
        _store(build, build.add(to, I64(FOUR * i)), column)


def _take_code(build: ir.IRBuilder, to: Any, at: Any, places: Any, _: Any) -> None:
    """The same of a single word."""
    words = ir.Constant(ir.VectorType(I64, 8), ir.Undefined)
    for r, place in enumerate(_begins(build, at, places)):
        words = build.insert_element(words, _load(build, place, I64), I32(r))
    _store(build, to, words)


def _begins(build: ir.IRBuilder, at: Any, places: Any) -> Iterator[Any]:
    """places[r] + at, of eight rows."""
    first = build.inttoptr(places, I64.as_pointer())
    for r in range(8):
        yield build.add(at, build.load(build.gep(first, [I64(r)])))


def _orders(lanes: int, unit: int, woven: bool) -> list[list[int]]:
    """Of four bytes of 16 rows, and those of 16 more, the order in memory."""
    places = [4 * row + u + i for u in range(0, 4, unit) for row in _rows(lanes, woven) for i in range(unit)]
    return [places[at : at + VECTOR] for at in range(0, len(places), VECTOR)]


def _write_code(build: ir.IRBuilder, how: Any, to: Any, at: Any, count: Any) -> None:
    """A word of 16 rows or 32 -> past the cache, in the order of a kind, two vectors or four, or the first of them."""
    for kind, (lanes, unit, woven) in enumerate(KINDS):
        with build.if_then(build.icmp_signed("==", how, I64(kind))):
            places = (build.add(at, I64(v)) for v in range(0, WORD * lanes, VECTOR))
            eights = [_load(build, place, ir.VectorType(I8, VECTOR)) for place in places]
            vectors = []
            for half in (0, 4):
                fours = [8 * row + half + i for row in range(LANES) for i in range(4)]
                parts = [_pick(build, eights[i], eights[i + 1], fours) for i in range(0, len(eights), 2)]
                vectors += [_pick(build, parts[0], parts[-1], one) for one in _orders(lanes, unit, woven)]
            for v, vector in enumerate(vectors):
                with build.if_then(build.icmp_signed(">", count, I64(v))):
                    stored = _store(build, build.add(to, I64(VECTOR * v)), vector)
                    stored.set_metadata("nontemporal", build.module.add_metadata([I32(1)]))


def _clear_code(build: ir.IRBuilder, to: Any, *_: Any) -> None:
    build.store(I8(0), build.inttoptr(to, I8.as_pointer()))


_turn = _operation(_of_rows(_turn_code))
_take = _operation(_of_rows(_take_code))


_write_word = _operation(_write_code)
_clear_byte = _operation(_clear_code)


# ---- operations on vectors


@operation(Bytes64, Bytes64, *[types.int64] * 3)
def _with(build, found, at, turns, mask):
    """What is found, and what the mask takes of words, each byte of which begins where its byte of `turns` says."""
    words, v = ir.VectorType(I64, 8), _load(build, at, Bytes64.llvm)
    if EACH_BYTE:
        each = build.bitcast(all_lanes(build, turns, 8), Bytes64.llvm)
        turned = build.bitcast(call(build, "llvm.x86.avx512.pmultishift.qb.512", Bytes64.llvm, each, v), words)
    else:
        v, turn = build.bitcast(v, words), all_lanes(build, build.and_(turns, I64(63)), 8)
        turned = call(build, "llvm.fshr.v8i64", words, v, v, turn)
    taken = build.bitcast(build.and_(turned, all_lanes(build, mask, 8)), Bytes64.llvm)
    return build.or_(found, taken)


@operation(Bytes64, types.int64, Bytes64)
def _look_up_256(build, tables, codes):
    """What four tables of 64 have for bytes; they lie one after the other."""
    quarters = [_load(build, build.add(tables, I64(at)), codes.type) for at in range(0, 4 * VECTOR, VECTOR)]
    halves = [_look_up_128(build, *quarters[i : i + 2], codes) for i in (0, 2)]
    return build.select(build.icmp_signed("<", codes, constant(codes.type, 0)), halves[1], halves[0])


def _look_up_128(build: ir.IRBuilder, low: Any, high: Any, codes: Any) -> Any:
    if VPERMB:
        return call(build, "llvm.x86.avx512.vpermi2var.qi.512", codes.type, low, codes, high)
    _, look_up = simd.look_up_64.__wrapped__(None, Bytes64, Bytes64)
    found = [look_up(None, build, None, (table, codes)) for table in (low, high)]
    upper = build.and_(codes, constant(codes.type, 64))
    return build.select(build.icmp_unsigned("==", upper, constant(codes.type, 0)), *found)


@intrinsic
def _keep(typing, at, a, b, c, d):
    """Four vectors, one after the other."""

    def code(context, builder, signature, args):
        for i, vector in enumerate(args[1:]):
            _store(builder, builder.add(args[0], I64(VECTOR * i)), vector)
        return context.get_dummy_value()

    return types.void(types.int64, *[Bytes64] * 4), code


# ---- the loop


@cache
def _rearranging(version):
    """It is compiled for a version of the vectors' operations."""

    @njit(cache=True, nogil=True)
    def _rearrange(groups, times, places, records, loads, steps, moves, tables, room, outs):
        """Four vectors at once: what the program says is read once for 32 rows."""
        _ = version  # part of the key of compiled code
        # The system clears new pages in the cache, from where they must be written back. Waiting for that at every page
        # took half as long again as having it bring all of them before anything is stored past the cache.
        for o in range(outs.shape[0]):
            for group in range(groups):
                _clear_byte(outs[o, 0] + group * outs[o, 1], 0, 0, 0)
        words_at = room.ctypes.data
        made = words_at + room.size
        for o in range(outs.shape[0]):
            made -= FOUR * outs[o, 3]
        for pair in range(places.shape[1] // PAIR):
            for t in range(times):
                to = words_at
                for i in range(loads.shape[0]):
                    first = loads[i, 1] + t * records[loads[i, 0]]
                    rows = places.ctypes.data + 8 * (places.shape[1] * loads[i, 0] + PAIR * pair)
                    if loads[i, 2] == 1:
                        _take(to, first, rows, 0)
                    else:
                        _turn(to, first, rows, 0)
                    to += FOUR * loads[i, 2]
                for s in range(steps.shape[0]):
                    a = b = c = d = simd.same_byte(np.uint8(0))
                    for m in range(np.uint64(steps[s, 1]), np.uint64(steps[s, 2])):
                        at, turn, mask = words_at + FOUR * moves[m, 0], moves[m, 1], moves[m, 2]
                        a, b = _with(a, at, turn, mask), _with(b, at + 64, turn, mask)
                        c, d = _with(c, at + 128, turn, mask), _with(d, at + 192, turn, mask)
                    at, count = words_at + FOUR * steps[s, 0], steps[s, 3]
                    if not count:
                        _keep(at, a, b, c, d)
                    for word in range(count):
                        table = tables.ctypes.data + VECTOR * (steps[s, 4] + 4 * word)
                        e, f = _look_up_256(table, a), _look_up_256(table, b)
                        g, h = _look_up_256(table, c), _look_up_256(table, d)
                        _keep(at + FOUR * word, e, f, g, h)
                word = made
                for o in range(outs.shape[0]):
                    first, step, vectors, words, how = outs[o, 0], outs[o, 1], outs[o, 2], outs[o, 3], outs[o, 4]
                    together = 2 if how < OF_32 else 1  # groups of 32 rows
                    size = FOUR // together
                    for group in range(together * pair, min(together * pair + together, groups)):
                        to, from_ = first + group * step + t * VECTOR * vectors, word + group % together * size
                        for i in range(words):
                            _write_word(how, to + size * i, from_ + FOUR * i, vectors - size // VECTOR * i)
                    word += FOUR * words
        _wait_for_stores()

    return _rearrange
