"""Bring rows of packed codes into tiles of 16 rows, as fast as memory is read and written.

In a tile the rows are lanes: vector d holds dword d (four bytes) of 16 rows, row r in bytes 4 r to 4 r + 3, and a group
of 16 rows is one stretch of memory. Rows that fill up the last group are zeros.

    retile            bytes of rows, of any record around them: codes, scales, zero points in one pass
    pack_planes       one code a byte -> fields of 1, 2, 4 or 8 bits, or of two such widths
    pack_quads        one code a byte -> a dense stream of 5 bits for each row

Bytes are moved, never computed with. The loops get addresses, so that one compiled function serves arrays of any
strides, also those that cannot be written; the doors keep the arrays alive and see to it that nothing beyond them is
read. Vectors of 64 bytes are stored past the cache: they are read when all is done, and not read before they are
overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from packfmt.errors import LayoutError
from packfmt.kernels import pages, threads
from packfmt.kernels.vectors import INTERPRETED, _wait_for_stores

LANES = 16  # rows of a tile
VECTOR = 64  # bytes: a dword of each row
AHEAD = 256  # bytes of each row that are asked for early: up to 1.1 times as fast as without, and as 1024
STRIP = 1 << 20  # bytes of rows that stay in the cache between two moves out of them
LEAST = 1 << 17  # bytes that are worth a thread
QUADS = 32  # codes of 5 bits that fill five dwords
WIDTHS = ((1,), (2,), (4,), (8,), (2, 1), (4, 1), (4, 2))


class Move(NamedTuple):
    """Where bytes of each row lie, and where they go: out[g, i, u, r] = unit u of run i of row 16 g + r.

    out : (groups * times * size * 16,) uint8, or (groups, times * size * 16) whose rows may lie apart
    first : the byte of a row where its first run begins
    size : bytes of a run, a multiple of `unit`
    record : bytes from one run to the next
    times : runs of a row
    unit : 4 for codes, 1, 2 or 4 for values of as many bytes
    """

    out: np.ndarray
    first: int
    size: int
    record: int
    times: int
    unit: int = 4


def retile(source: np.ndarray, *moves: Move) -> None:
    """Interleave 16 rows, unit by unit, as each of the moves says; the source is read from memory once.

    Parameters
    ----------
    source : (rows, row bytes) uint8; rows may lie apart
    *moves : what goes where, one after the other

    Raises
    ------
    LayoutError
        If a move leaves the rows, or its `out` has another size.
    """
    if source.dtype != np.uint8 or source.ndim != 2:
        raise LayoutError(f"rows to tile are {source.dtype} {source.shape}, needs uint8 (rows, row bytes)")
    rows, groups = len(source), -(-len(source) // LANES)
    moves = tuple(_whole(_checked(move, source.shape), groups) for move in moves if move.size * move.times)
    if INTERPRETED:
        for move in moves:
            _retile_plainly(source, move)
        return
    if source.strides[1] != 1 or source.strides[0] < 0:
        source = np.ascontiguousarray(source)
    targets = [_aligned(move.out) if move.unit == 4 else move.out for move in moves]
    direct = _direct_groups(source, moves)
    strip = max(1, STRIP // max(1, LANES * source.shape[1]))

    def work(start: int, stop: int) -> None:
        for out in targets:
            _touch(start, stop, _address(out), out.strides[0])
        for first in range(start, stop, strip):
            for move, out in zip(moves, targets, strict=True):
                _retile(source, move, out, first, min(first + strip, stop))

    threads.spread(work, direct, -(-LEAST // max(1, LANES * source.shape[1])))
    if direct < groups:
        rest = np.zeros((LANES * (groups - direct), source.shape[1] + LANES), np.uint8)
        rest[: rows - LANES * direct, : source.shape[1]] = source[LANES * direct :]
        for move, out in zip(moves, targets, strict=True):
            _retile(rest, move, out[direct:], 0, groups - direct)
    _settle([move.out for move in moves], targets)


def pack_planes(codes: np.ndarray, low: np.ndarray, high: np.ndarray, widths: tuple[int, ...]) -> None:
    """Make the strings of codes that tiles of 16 rows consist of: low[g, b, p, v, r], high likewise, are dwords.

    Of width w, byte j of vector v holds in bits [f w, f w + w) the code of column 4 (v (8 / w) + f) + j of the block:
    its low bits in `low`, those above, where there is a second width, in `high`.

    Parameters
    ----------
    codes : (rows, blocks, planes, columns) uint8, each below 2**sum(widths); only the columns of a block must touch
    low, high : flat uint8, or (groups, bytes) whose rows may lie apart; `high` is empty without a second width
    widths : (1,) (2,) (4,) (8,) (2, 1) (4, 1) or (4, 2)

    Raises
    ------
    LayoutError
        If there are no such widths, the columns are no whole vectors, or sizes do not fit.
    """
    if widths not in WIDTHS:
        raise LayoutError(f"codes have widths {widths}, needs one of {', '.join(map(str, WIDTHS))}")
    rows, blocks, planes, columns = _codes(codes, 4, "(rows, blocks, planes, columns)")
    if columns % (32 // min(widths)):
        raise LayoutError(f"blocks have {columns} columns, needs a multiple of {32 // min(widths)} for widths {widths}")
    groups = -(-rows // LANES)
    strings = tuple(
        _rows_of(out, groups, blocks * planes * columns * width * 2, name)
        for out, width, name in zip((low, high), (*widths, 0), ("low", "high"), strict=False)
    )
    if not codes.size:
        return
    if INTERPRETED:
        return _pack_planes_plainly(codes, strings, widths)
    if codes.strides[3] != 1:
        codes = np.ascontiguousarray(codes)
    chunk = 32 // min(widths) if columns % 16 else max(16, 32 // min(widths))
    kernel = _planes_kernel(widths[0], sum(widths[1:]), chunk)
    targets = [_aligned(out) for out in strings]

    def run(part: np.ndarray, start: int, stop: int, to: int) -> None:
        sizes = _Blocks(blocks, planes, columns, *part.strides[:3])
        where = [number for out in targets for number in (_address(out[to:]), out.strides[0])]
        _touch(start, stop, *where[:2])
        kernel(start, stop, _address(part), sizes, *where)

    _by_groups(codes, run)
    _settle(strings, targets)


def pack_quads(codes: np.ndarray, out: np.ndarray) -> None:
    """Make a stream of 5 bits a code for each row, little-endian, and interleave the dwords of 16 rows.

    Parameters
    ----------
    codes : (rows, quads) uint8, each below 32; quads a multiple of 32
    out : (groups * quads * 10,) uint8, or (groups, quads * 10) whose rows may lie apart

    Raises
    ------
    LayoutError
        If the quads are no multiple of 32, or `out` has another size.
    """
    rows, quads = _codes(codes, 2, "(rows, quads)")
    if quads % QUADS:
        raise LayoutError(f"rows have {quads} quads, needs a multiple of {QUADS}")
    string = _rows_of(out, -(-rows // LANES), quads * 10, "out")
    if not codes.size:
        return
    if INTERPRETED:
        return _pack_quads_plainly(codes, string)
    if codes.strides[1] != 1:
        codes = np.ascontiguousarray(codes)
    target = _aligned(string)

    def run(part: np.ndarray, start: int, stop: int, to: int) -> None:
        _touch(start, stop, _address(target[to:]), target.strides[0])
        _pack_quads(start, stop, _address(part), part.strides[0], quads, _address(target[to:]), target.strides[0])

    _by_groups(codes, run)
    _settle([string], [target])


# ---- what the doors share


def _checked(move: Move, shape: tuple[int, ...]) -> Move:
    stop = move.first + (move.times - 1) * move.record + move.size
    if move.unit not in (1, 2, 4) or move.size % move.unit:
        raise LayoutError(f"runs have {move.size} bytes in units of {move.unit}, needs whole units of 1, 2 or 4")
    if min(move.first, move.size, move.record, move.times) < 0 or (shape[0] and stop > shape[1]):
        where = f"{move.times} runs of {move.size} bytes, one every {move.record} from byte {move.first} on"
        raise LayoutError(f"{where}, end at byte {stop}, rows have {shape[1]}")
    return move


def _whole(move: Move, groups: int) -> Move:
    """With `out` as (groups, bytes), and runs that touch as one."""
    move = move._replace(out=_rows_of(move.out, groups, move.times * move.size * LANES, "out"))
    if move.record == move.size:
        move = move._replace(size=move.size * move.times, record=move.size * move.times, times=1)
    return move


def _rows_of(out: np.ndarray, groups: int, size: int, name: str) -> np.ndarray:
    """(groups, size), a view."""
    if not out.flags.writeable:
        raise LayoutError(f"{name} cannot be written to, needs memory of one's own")
    if out.dtype == np.uint8 and (out.shape == (groups, size) or out.shape == (groups * size,)):
        rows = out.reshape(groups, size)
        if rows.strides[-1:] == (1,) or not rows.size:
            return rows
    raise LayoutError(f"{name} is {out.dtype} {out.shape}, needs uint8 ({groups}, {size}), or as many bytes in a row")


def _codes(codes: np.ndarray, axes: int, names: str) -> tuple[int, ...]:
    if codes.dtype != np.uint8 or codes.ndim != axes:
        raise LayoutError(f"codes are {codes.dtype} {codes.shape}, needs uint8 {names}")
    return codes.shape


def _aligned(out: np.ndarray) -> np.ndarray:
    """The same array, or another for the time being: stores past the cache need whole lines."""
    if _address(out) % VECTOR or (len(out) > 1 and out.strides[0] % VECTOR):
        return pages.empty(out.size).reshape(out.shape)
    return out


def _settle(outs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
    """Bring what was written elsewhere to its place."""
    for out, target in zip(outs, targets, strict=True):
        if out is not target:
            out[...] = target


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _direct_groups(source: np.ndarray, moves: tuple[Move, ...]) -> int:
    """Groups of 16 rows of which 16 bytes can be read wherever a run goes on; the others are copied first."""
    rows, row_bytes = source.shape
    stride, groups = source.strides[0], rows // LANES
    reach = max((move.first + (move.times - 1) * move.record + -(-move.size // 16) * 16 for move in moves), default=0)
    while groups and (LANES * groups - 1) * stride + reach > (rows - 1) * stride + row_bytes:
        groups -= 1
    return groups


def _by_groups(codes: np.ndarray, run: Callable[[np.ndarray, int, int, int], None]) -> None:
    """Call run(rows, start, stop, the group where it writes): whole groups in threads, the last rows filled up."""
    direct, left = divmod(len(codes), LANES)
    bytes_each = max(1, codes[:LANES].size)
    threads.spread(lambda start, stop: run(codes, start, stop, 0), direct, -(-LEAST // bytes_each))
    if left:
        rest = np.zeros((LANES, *codes.shape[1:]), np.uint8)
        rest[:left] = codes[LANES * direct :]
        run(rest, 0, 1, direct)


def _retile(source: np.ndarray, move: Move, out: np.ndarray, start: int, stop: int) -> None:
    if start >= stop:
        return
    runs = _Runs(move.first, move.size, move.record, move.times)
    if move.unit == 4:
        _interleave(start, stop, _address(source), source.strides[0], _address(out), out.strides[0], runs)
    else:
        _values(start, stop, _address(source), source.strides[0], _address(out), out.strides[0], runs, move.unit)


def _retile_plainly(source: np.ndarray, move: Move) -> None:
    groups = len(move.out)
    places = move.first + move.record * np.arange(move.times)[:, None] + np.arange(move.size)
    rows = np.zeros((groups * LANES, *places.shape), np.uint8)
    rows[: len(source)] = source[:, places]
    units = rows.reshape(groups, LANES, -1, move.unit).transpose(0, 2, 1, 3)
    move.out[...] = units.reshape(groups, -1)


def _pack_planes_plainly(codes: np.ndarray, strings: tuple[np.ndarray, ...], widths: tuple[int, ...]) -> None:
    rows, blocks, planes, columns = codes.shape
    below = 0
    for out, width in zip(strings, widths, strict=False):  # without a second width the second string is empty
        padded = np.zeros((len(out) * LANES, blocks * planes, columns), np.uint8)
        padded[:rows] = codes.reshape(rows, -1, columns) >> below & ((1 << width) - 1)
        fields = padded.reshape(len(out), LANES, blocks * planes, -1, 8 // width, 4)
        shifts = np.arange(8 // width, dtype=np.uint8)[:, None] * np.uint8(width)
        vectors = np.bitwise_or.reduce(fields << shifts, axis=4)
        out[...] = vectors.transpose(0, 2, 3, 1, 4).reshape(len(out), -1)
        below += width


def _pack_quads_plainly(codes: np.ndarray, out: np.ndarray) -> None:
    bits = np.zeros((len(out) * LANES, codes.shape[1], 5), np.uint8)
    bits[: len(codes)] = codes[..., None] >> np.arange(5, dtype=np.uint8) & 1
    stream = np.packbits(bits.reshape(len(bits), -1), axis=1, bitorder="little")
    out[...] = stream.reshape(len(out), LANES, -1, 4).transpose(0, 2, 1, 3).reshape(len(out), -1)


# ---- vectors of LLVM: all of it is there on any machine

BYTE, SHORT, DWORD, INDEX = (ir.IntType(bits) for bits in (8, 16, 32, 64))
DWORDS = ir.VectorType(DWORD, LANES)


class _Code:
    """The code of one compiled function, to which operations are added."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def pick(self, a: Any, b: Any, places: list[int]) -> Any:
        """Elements of two vectors, those of the second counted on from those of the first."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(DWORD, len(places)), places))

    def load_rows(self, at: Any, stride: Any, dwords: int) -> list[Any]:
        """So many dwords of each of 16 rows; bytes further on are asked for early."""
        name, byte = "llvm.prefetch.p0", BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, DWORD, DWORD, DWORD])
        ask = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        rows = []
        for r in range(LANES):
            place = self.builder.add(at, self.builder.mul(stride, INDEX(r)))
            early = self.builder.inttoptr(self.builder.add(place, INDEX(AHEAD)), byte)
            self.builder.call(ask, [early, DWORD(0), DWORD(3), DWORD(1)])  # to read, into all caches, data
            kind = ir.VectorType(DWORD, dwords)
            found = self.builder.load(self.builder.inttoptr(place, kind.as_pointer()))
            found.align = 1
            rows.append(found)
        return rows

    def turn(self, rows: list[Any]) -> list[Any]:
        """16 rows of 16 dwords, or up to 4 -> for each dword a vector of 16 rows."""
        dwords = rows[0].type.count
        if dwords == LANES:
            # quarters[k][c]: lane l has dword 4 l + c of rows 4 k to 4 k + 3
            quarters = [self.turn_lanes(rows[4 * k : 4 * k + 4]) for k in range(4)]
            turned: list[Any] = [None] * LANES
            for c in range(4):
                a, b, d, e = (quarter[c] for quarter in quarters)
                for odd in (0, 1):
                    both = [4 * lane + i for lane in (odd, odd + 2, odd + 4, odd + 6) for i in range(4)]
                    upper, lower = self.pick(a, b, both), self.pick(d, e, both)
                    for half in (0, 1):
                        lanes = [4 * lane + i for lane in (half, half + 2, half + 4, half + 6) for i in range(4)]
                        turned[4 * (odd + 2 * half) + c] = self.pick(upper, lower, lanes)
            return turned
        filled = [min(i, dwords - 1) for i in range(4)]
        pairs = [
            [self.pick(rows[i + 8 * h], rows[i + 8 * h + 4], [*filled, *(dwords + j for j in filled)]) for h in (0, 1)]
            for i in range(4)
        ]
        return self.turn_lanes([self.pick(a, b, list(range(LANES))) for a, b in pairs])[:dwords]

    def turn_lanes(self, rows: list[Any]) -> list[Any]:
        """In each four dwords of four vectors: rows become columns."""
        low, high = ([4 * lane + i + place for lane in range(4) for i in first for place in (0, 16)]
                     for first in ((0, 1), (2, 3)))  # fmt: skip
        a, b, c, d = (self.pick(rows[i], rows[i + 1], half) for i in (0, 2) for half in (low, high))
        first, second = ([4 * lane + i + place for lane in range(4) for place in (0, 16) for i in pair]
                         for pair in ((0, 1), (2, 3)))  # fmt: skip
        return [self.pick(a, c, first), self.pick(a, c, second), self.pick(b, d, first), self.pick(b, d, second)]

    def store(self, to: Any, place: int, vector: Any, past: bool = True) -> None:
        address = self.builder.add(to, INDEX(VECTOR * place))
        stored = self.builder.store(vector, self.builder.inttoptr(address, vector.type.as_pointer()))
        stored.align = VECTOR if past else 1
        if past:
            stored.set_metadata("nontemporal", self.builder.module.add_metadata([DWORD(1)]))

    def same(self, number: int) -> Any:
        return ir.Constant(DWORDS, [number] * LANES)

    def either(self, vectors: list[Any]) -> Any:
        """The bits of all of them."""
        found = vectors[0]
        for other in vectors[1:]:
            found = self.builder.or_(found, other)
        return found

    def left(self, vector: Any, bits: int) -> Any:
        return self.builder.shl(vector, self.same(bits)) if bits else vector

    def right(self, vector: Any, bits: int) -> Any:
        return self.builder.lshr(vector, self.same(bits)) if bits else vector


def _operation(write: Callable[..., None]) -> Any:
    """An operation of compiled functions on four numbers of 64 bits: where to, where from, rows' stride, one more."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        write(_Code(context, builder), *given)
        return context.get_dummy_value()

    def typed(typing: Any, to: Any, at: Any, stride: Any, other: Any) -> Any:
        return types.void(*[types.int64] * 4), code

    return intrinsic(typed)


def _turn_all_code(c: _Code, to: Any, at: Any, stride: Any, _: Any) -> None:
    for d, vector in enumerate(c.turn(c.load_rows(at, stride, LANES))):
        c.store(to, d, vector)


def _turn_some_code(c: _Code, to: Any, at: Any, stride: Any, count: Any) -> None:
    for d, vector in enumerate(c.turn(c.load_rows(at, stride, 4))):
        with c.builder.if_then(c.builder.icmp_signed(">", count, INDEX(d))):
            c.store(to, d, vector)


def _turn_units_code(size: int) -> Callable[..., None]:
    def write(c: _Code, to: Any, at: Any, stride: Any, count: Any) -> None:
        units, unit = VECTOR // size, ir.IntType(8 * size)
        order = [u for first in range(4 // size) for u in range(first, units, 4 // size)]
        for d, vector in enumerate(c.turn(c.load_rows(at, stride, 4))):
            small = c.builder.bitcast(vector, ir.VectorType(unit, units))
            with c.builder.if_then(c.builder.icmp_signed(">", count, INDEX(d))):
                c.store(to, d, c.pick(small, small, order), past=False)

    return write


def _copy_code(size: int) -> Callable[..., None]:
    def write(c: _Code, to: Any, at: Any, stride: Any, _: Any) -> None:
        unit = ir.IntType(8 * size)
        vector = ir.Constant(ir.VectorType(unit, LANES), ir.Undefined)
        for r in range(LANES):
            place = c.builder.add(at, c.builder.mul(stride, INDEX(r)))
            found = c.builder.load(c.builder.inttoptr(place, unit.as_pointer()))
            found.align = 1
            vector = c.builder.insert_element(vector, found, DWORD(r))
        c.store(to, 0, vector, past=False)

    return write


def _quads_code(c: _Code, to: Any, at: Any, stride: Any, _: Any) -> None:
    twenties = []
    for half in (0, 16):
        for codes in c.turn(c.load_rows(c.builder.add(at, INDEX(half)), stride, 4)):
            # codes in bytes -> bits 0 to 19
            near = [c.builder.and_(c.right(codes, 3 * j), c.same(31 << 5 * j)) for j in range(4)]
            twenties.append(c.either(near))
    for word in range(5):
        begins = [20 * i - 32 * word for i in range(8)]
        parts = [
            c.left(bits, begin) if begin >= 0 else c.right(bits, -begin)
            for bits, begin in zip(twenties, begins, strict=True)
            if -20 < begin < 32
        ]
        c.store(to, word, c.either(parts))


@intrinsic(prefer_literal=True)
def _pack_fields(typing, low_to, high_to, at, stride, low, high, chunk):
    """`chunk` codes of 16 rows -> vectors of fields of `low` bits, and of the `high` bits above, if any."""

    def code(context, builder, signature, given):
        c, steps = _Code(context, builder), []
        for first in range(0, chunk.literal_value, 16):
            part = c.builder.add(given[2], INDEX(first))
            steps += c.turn(c.load_rows(part, given[3], min(4, chunk.literal_value // 4)))
        below = 0
        for to, width in ((given[0], low.literal_value), (given[1], high.literal_value)):
            fields = 8 // width if width else len(steps) + 1
            mask = c.same(0x01010101 * ((1 << width) - 1))
            for v in range(len(steps) // fields):
                cut = [c.builder.and_(c.right(step, below), mask) for step in steps[v * fields : (v + 1) * fields]]
                c.store(to, v, c.either([c.left(step, width * f) for f, step in enumerate(cut)]))
            below += width
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, low, high, chunk), code


def _clear_code(c: _Code, to: Any, at: Any, stride: Any, _: Any) -> None:
    c.builder.store(BYTE(0), c.builder.inttoptr(to, BYTE.as_pointer()))


_turn_all = _operation(_turn_all_code)  # 16 dwords of 16 rows


_turn_some = _operation(_turn_some_code)  # 1 to 4 dwords of 16 rows; it reads 4


_turn_shorts = _operation(_turn_units_code(2))  # the same, then in units of 2 bytes


_turn_bytes = _operation(_turn_units_code(1))


_copy_shorts = _operation(_copy_code(2))  # two bytes of 16 rows


_copy_bytes = _operation(_copy_code(1))


_turn_quads = _operation(_quads_code)  # 32 codes of 16 rows


_clear_byte = _operation(_clear_code)


# ---- loops


class _Runs(NamedTuple):
    """As in `Move`."""

    first: int
    size: int
    record: int
    times: int


class _Blocks(NamedTuple):
    """How many blocks, planes and columns there are, and bytes from row to row, block to block, plane to plane."""

    blocks: int
    planes: int
    columns: int
    row: int
    block: int
    plane: int


@njit(cache=True, nogil=True)
def _touch(start, stop, out, step):
    """Have the system bring the memory of groups start to stop before anything is stored past the cache.

    It clears new pages in the cache, from where they must be written back; waiting for that at every page took half
    as long again.
    """
    for group in range(start, stop):
        _clear_byte(out + group * step, 0, 0, 0)


@njit(cache=True, nogil=True)
def _interleave(start, stop, source, stride, out, step, runs):
    """Groups start to stop, dword by dword."""
    for group in range(start, stop):
        to = out + group * step
        for i in range(runs.times):
            at = source + group * LANES * stride + runs.first + i * runs.record
            for _ in range(runs.size // 64):
                _turn_all(to, at, stride, 0)
                at, to = at + 64, to + 1024
            for _ in range(runs.size % 64 // 16):
                _turn_some(to, at, stride, 4)
                at, to = at + 16, to + 256
            left = runs.size % 16 // 4
            if left:
                _turn_some(to, at, stride, left)
                to += 64 * left
    _wait_for_stores()


@njit(cache=True, nogil=True)
def _values(start, stop, source, stride, out, step, runs, unit):
    """Groups start to stop, in units of 1 or 2 bytes."""
    for group in range(start, stop):
        to = out + group * step
        for i in range(runs.times):
            at = source + group * LANES * stride + runs.first + i * runs.record
            left = runs.size // 4
            while left:
                dwords = min(left, 4)
                if unit == 2:
                    _turn_shorts(to, at, stride, dwords)
                else:
                    _turn_bytes(to, at, stride, dwords)
                at, to, left = at + 4 * dwords, to + 64 * dwords, left - dwords
            for _ in range(runs.size % 4 // unit):
                if unit == 2:
                    _copy_shorts(to, at, stride, 0)
                else:
                    _copy_bytes(to, at, stride, 0)
                at, to = at + unit, to + LANES * unit


@cache
def _planes_kernel(low, high, chunk):
    """The loop for codes of these widths, so many columns at a time."""

    @njit(cache=True, nogil=True)
    def _pack_planes(start, stop, source, of, low_out, low_step, high_out, high_step):
        for group in range(start, stop):
            low_to, high_to = low_out + group * low_step, high_out + group * high_step
            for i in range(of.blocks * of.planes):
                at = source + group * LANES * of.row + i // of.planes * of.block + i % of.planes * of.plane
                for _ in range(of.columns // chunk):
                    _pack_fields(low_to, high_to, at, of.row, low, high, chunk)
                    at += chunk
                    low_to, high_to = low_to + chunk * low * 2, high_to + chunk * high * 2
        _wait_for_stores()

    return _pack_planes


@njit(cache=True, nogil=True)
def _pack_quads(start, stop, source, stride, quads, out, step):
    for group in range(start, stop):
        to = out + group * step
        for i in range(quads // QUADS):
            _turn_quads(to, source + group * LANES * stride + i * QUADS, stride, 0)
            to += 320
    _wait_for_stores()
