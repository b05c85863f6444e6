"""Weights to the bytes of ternary blocks, and bytes of any blocks to weights, in one pass each.

Encoding skips the parts: a block is chosen and packed while it is in the cache, to the bytes that
the quantizers of `ternary` and the generic packer give. Decoding turns a row of records into codes,
then codes into numbers, or straight into numbers where the codes' order is simple; it knows where the
codes lie from tables, not from a format's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic

from packfmt.kernels import quantize, ternary, threads
from packfmt.kernels.quantize import _inverse
from packfmt.kernels.ternary import AT_ONCE, SUMS, _add, _choose, _lanes, _total

F32 = np.float32
HALF = F32(0.5)
MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
INFINITE = 0x7F800000  # magnitudes from here up are no numbers
GATHER = np.uint64(0x0102040810204080)  # times eight bytes of 0 or 1: their bits, in order, in the top byte

# ---------------------------------------------------------------- encoding


def tq1_0(weight: np.ndarray) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the records that packing `ternary.tq1_0` gives.

    None if a weight is not finite, or a scale overflows float16: the slower way says where, and how many.
    """
    return _records(weight, 256, 54, 52, _tq1_0)


def tq2_0(weight: np.ndarray) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the records that packing `quantize.tq2_0` gives; None as in `tq1_0`."""
    return _records(weight, 256, 66, 64, _tq2_0)


def sherry(weight: np.ndarray, stride: int, block: int) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the records that packing `ternary.sherry` gives; None as in `tq1_0`.

    A record has a nibble and then a bit for each of block / 4 quads, then the float16 scale: 42 bytes
    for a block of 256, 22 for 128. block : 256 or 128. stride : 1 or 16.
    """
    planes = block // 8 + block // 32

    def loop(weight, bits, out, scale, scale_bits):
        codes = np.empty(block // 4, np.uint8)
        return _sherry(bits, stride, out, scale, codes, codes.view(np.uint64), ternary.scratch())

    return _records(weight, block, planes + 2, planes, loop)


def _records(
    weight: np.ndarray, block: int, size: int, scale_at: int, loop: Callable[..., int]
) -> dict[str, np.ndarray] | None:
    """Run a loop over all rows: records of `size` bytes, with a float16 scale at byte `scale_at`."""
    rows, cols = weight.shape
    out = np.empty((rows, cols // block * size), np.uint8)
    scale = np.empty((rows, cols // block), F32)
    bits, scale_bits = weight.view(np.uint32), scale.view(np.uint32)
    tops = [0]

    def work(start: int, stop: int) -> None:
        mine = slice(start, stop)
        with np.errstate(all="ignore"):
            tops.append(int(loop(weight[mine], bits[mine], out[mine], scale[mine], scale_bits[mine])))

    threads.spread(work, rows, -(-quantize.LEAST_WEIGHTS // max(1, cols)))
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if max(tops) >= INFINITE or np.isinf(rounded).any():
        return None
    half = np.dtype({"names": ["scale"], "formats": ["<f2"], "offsets": [scale_at], "itemsize": size})
    if out.size:
        out.view(half)["scale"] = rounded
    return {"blocks": out}


@njit(cache=True, nogil=True)
def _top(bits, start):
    """The largest magnitude of 256, as bits: finite floats sort as their bits do, all others lie above."""
    top = np.uint32(0)
    for j in range(start, start + 256):
        top = max(top, np.uint32(bits[j] & MAGNITUDE))
    return top


@njit(cache=True, nogil=True)
def _digit(weight, per_step):
    """The nearest of -1, 0, 1, ties away from zero, plus one; |weight * per_step| is below 1.5."""
    steps = weight * per_step
    return np.uint8(np.uint8(1) + np.uint8(steps >= HALF) - np.uint8(steps <= -HALF))


@njit(cache=True, nogil=True)
def _tq2_0(weight, bits, out, scale, scale_bits):
    worst = np.uint32(0)
    for row in range(weight.shape[0]):
        x, stored = weight[row], out[row]
        for block in range(scale.shape[1]):
            scale_bits[row, block] = _top(bits[row], 256 * block)
            worst = max(worst, scale_bits[row, block])
            per_step = _inverse(scale[row, block])
            for half in range(2):
                column, byte = 256 * block + 128 * half, 66 * block + 32 * half
                for m in range(32):
                    a, b = _digit(x[column + m], per_step), _digit(x[column + 32 + m], per_step)
                    c, d = _digit(x[column + 64 + m], per_step), _digit(x[column + 96 + m], per_step)
                    stored[byte + m] = np.uint8(a | b << np.uint8(2) | c << np.uint8(4) | d << np.uint8(6))
    return worst


@njit(cache=True, nogil=True)
def _five(x, column, step, digits, per_step):
    """A base-3 byte of up to five columns, `step` apart: ceil(256 * value / 243)."""
    value = np.uint32(81) * _digit(x[column], per_step) + np.uint32(27) * _digit(x[column + step], per_step)
    value += np.uint32(9) * _digit(x[column + 2 * step], per_step)
    value += np.uint32(3) * _digit(x[column + 3 * step], per_step)
    if digits == 5:
        value += np.uint32(_digit(x[column + 4 * step], per_step))
    return np.uint8((np.uint32(value) * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@njit(cache=True, nogil=True)
def _tq1_0(weight, bits, out, scale, scale_bits):
    worst = np.uint32(0)
    for row in range(weight.shape[0]):
        x, stored = weight[row], out[row]
        for block in range(scale.shape[1]):
            scale_bits[row, block] = _top(bits[row], 256 * block)
            worst = max(worst, scale_bits[row, block])
            per_step = _inverse(scale[row, block])
            column, byte = 256 * block, 54 * block
            for m in range(32):
                stored[byte + m] = _five(x, column + m, 32, 5, per_step)
            for m in range(16):
                stored[byte + 32 + m] = _five(x, column + 160 + m, 16, 5, per_step)
            for m in range(4):
                stored[byte + 48 + m] = _five(x, column + 240 + m, 4, 4, per_step)
    return worst


@njit(cache=True, nogil=True)
def _sherry(bits, stride, out, scale, codes, eights, room):
    worst = np.uint32(0)
    count = codes.size
    size = count // 2 + count // 8 + 2
    for row in range(bits.shape[0]):
        stored = out[row]
        for number in range(scale.shape[1]):
            for i in range(SUMS):
                room.sums[i] = 0.0
            for first in range(0, count, AT_ONCE):
                _lanes(bits[row], count * number + first, AT_ONCE, stride, room.lanes)
                worst = max(worst, _choose(room.lanes, room.kept, codes[first : first + AT_ONCE]))
                _add(room.sizes, room.sums)
            scale[row, number] = F32(_total(room.sums) / (3 * count))
            byte = size * number
            for m in range(count // 2):
                stored[byte + m] = np.uint8(codes[2 * m] & np.uint8(15) | codes[2 * m + 1] << np.uint8(4))
            byte += count // 2
            for m in range(count // 8):
                signs = eights[m] >> np.uint64(4) & np.uint64(0x0101010101010101)
                stored[byte + m] = np.uint8(signs * GATHER >> np.uint64(56))
    return worst


# ---------------------------------------------------------------- vectors

# Several numbers at once, in LLVM's vectors, which it has for any machine: a plain loop over so few spends
# most of its time on what precedes its vectors. Lanes do not meet, and each operation rounds on its own.


def _fields_plainly(lanes: int) -> Callable[..., None]:
    """out[at + i] = ((record[byte + i] >> shift & mask) - zero) * factor, for so many i."""

    def write(out, at, record, byte, shift, mask, zero, factor):
        codes = record[byte : byte + lanes] >> shift & mask
        out[at : at + lanes] = (codes.astype(F32) - zero) * factor

    return write


def _digits_plainly(lanes: int) -> Callable[..., None]:
    """out[at + i] = ((record[byte + i] * power % 256 * 3 >> 8) - zero) * factor, for so many i."""

    def write(out, at, record, byte, power, zero, factor):
        rest = (record[byte : byte + lanes] * power).astype(np.uint16)
        out[at : at + lanes] = ((rest * np.uint16(3) >> np.uint16(8)).astype(F32) - zero) * factor

    return write


class _Vectors(NamedTuple):
    """Vectors of so many lanes in the code of one compiled function."""

    lanes: int
    context: Any
    builder: Any

    def of(self, bits: int) -> ir.VectorType:
        return ir.VectorType(ir.FloatType() if bits == 32 else ir.IntType(bits), self.lanes)

    def all(self, number: Any) -> Any:
        """One number in all lanes."""
        none = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(none, number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, none, zeros)

    def constant(self, number: int) -> Any:
        return ir.Constant(self.of(16), [number] * self.lanes)

    def place(self, kind: types.Array, array: Any, index: Any, bits: int) -> Any:
        """Where the vector begins in an array."""
        data = self.context.make_array(kind)(self.context, self.builder, array).data
        return self.builder.bitcast(self.builder.gep(data, [index]), self.of(bits).as_pointer())

    def load(self, kind: types.Array, record: Any, byte: Any) -> Any:
        """Bytes, as numbers of 16 bits."""
        found = self.builder.load(self.place(kind, record, byte, 8))
        found.align = 1
        return self.builder.zext(found, self.of(16))

    def store(self, kind: types.Array, out: Any, at: Any, codes: Any, zero: Any, factor: Any) -> Any:
        """(codes - zero) * factor, in float32."""
        steps = self.builder.fsub(self.builder.uitofp(codes, self.of(32)), self.all(zero))
        done = self.builder.store(self.builder.fmul(steps, self.all(factor)), self.place(kind, out, at, 32))
        done.align = 4
        return self.context.get_dummy_value()


def _fields(lanes: int) -> Callable[..., None]:
    """`_fields_plainly`, compiled."""

    def write(typing, out, at, record, byte, shift, mask, zero, factor):
        def code(context, builder, signature, args):
            v = _Vectors(lanes, context, builder)
            x = builder.lshr(v.load(signature.args[2], *args[2:4]), v.all(args[4]))
            return v.store(signature.args[0], *args[:2], builder.and_(x, v.all(args[5])), *args[6:])

        u2, f4 = types.uint16, types.float32
        return types.void(out, types.int64, record, types.int64, u2, u2, f4, f4), code

    return intrinsic(write)


def _digits(lanes: int) -> Callable[..., None]:
    """`_digits_plainly`, compiled."""

    def write(typing, out, at, record, byte, power, zero, factor):
        def code(context, builder, signature, args):
            v = _Vectors(lanes, context, builder)
            power = v.all(builder.zext(args[4], ir.IntType(16)))
            rest = builder.and_(builder.mul(v.load(signature.args[2], *args[2:4]), power), v.constant(255))
            x = builder.lshr(builder.mul(rest, v.constant(3)), v.constant(8))
            return v.store(signature.args[0], *args[:2], x, *args[5:])

        f4 = types.float32
        return types.void(out, types.int64, record, types.int64, types.uint8, f4, f4), code

    return intrinsic(write)


INTERPRETED = bool(config.DISABLE_JIT)  # type: ignore[attr-defined]
_sixteen_fields = _fields_plainly(16) if INTERPRETED else _fields(16)
_sixteen_digits = _digits_plainly(16) if INTERPRETED else _digits(16)
_four_digits = _digits_plainly(4) if INTERPRETED else _digits(4)


# ---------------------------------------------------------------- decoding


class Places(NamedTuple):
    """Where the codes of one cell lie. A cell is `size` bytes, and `codes` codes in their order.

    Eights are read before runs, each in order; what has `low` 0 replaces the code, the rest is added to it.

    runs : (n, 7) int64: byte, count, shift, mask, code, step, low. Byte `byte + i` holds, from bit
        `shift` up, bits `low` and above of code `code + step * i`.
    eights : (n, 5) int64: byte, count, bits, code, low. From `byte` on, fields of `bits` bits hold bits
        `low` and above of 8 * count codes, one after the other; 1, 2 or 4 bits.
    digits : (n, 4) int64: byte, count, digits, code. Base-3 bytes; digit i of byte `byte + m` is the
        code `code + m + count * i`.
    powers : (5,) uint8: what brings digit i of a byte to its top
    """

    size: int
    codes: int
    runs: np.ndarray
    eights: np.ndarray
    digits: np.ndarray
    powers: np.ndarray


def affine(records: np.ndarray, places: Places, scale: np.ndarray, out: np.ndarray, zero: float, dtype: str) -> None:
    """w = (code - zero) * scale, in float32, each operation rounding on its own. On one thread.

    records : (rows, bytes) uint8
    scale : (rows or 1, groups) float32
    out : (rows, cols) float32, written
    dtype : of the codes, "u1" or "i1"
    """
    with np.errstate(all="ignore"):
        if dtype == "u1" and _straight(places, out.shape[1] // scale.shape[1]):
            _affine_straight(records, places, F32(zero), scale, out)
        else:
            codes, eights = _room(out.shape[1])
            _affine(records, places, codes, eights, codes.view(dtype), F32(zero), scale, out)


def levels(records: np.ndarray, places: Places, scale: np.ndarray, out: np.ndarray, values: np.ndarray) -> None:
    """w = values[code] * scale: one float32 product. values (codes,) float32, others as in `affine`."""
    with np.errstate(all="ignore"):
        _levels(records, places, *_room(out.shape[1]), values, scale, out)


def quads(
    records: np.ndarray, places: Places, scale: np.ndarray, out: np.ndarray, values: np.ndarray, stride: int
) -> None:
    """w = values[code][lane] * scale: one float32 product. values (codes, 4) float32, others as in `affine`.

    Lane p of quad g is column g % stride + p * stride of the chunk g // stride of 4 * stride columns; a
    group holds whole chunks.
    """
    codes, eights = _room(out.shape[1] // 4)
    with np.errstate(all="ignore"):
        if stride == 1:
            _quads(records, places, codes, eights, values, scale, out)
        else:
            lanes = np.ascontiguousarray(values.T)
            _strided_quads(records, places, codes, eights, lanes, stride, scale, out)


def _straight(places: Places, group: int) -> bool:
    """Whether numbers can be written without keeping codes: runs lie side by side, and cells within a group."""
    plain = not len(places.eights) and (places.runs[:, 5] == 1).all() and not places.runs[:, 6].any()
    return bool(plain) and group % places.codes == 0


def _room(codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for the codes of a row, and the same room by eights."""
    room = np.empty(-(-codes // 8), np.uint64)
    return room.view(np.uint8), room


@njit(cache=True, nogil=True)
def _read(record, places, codes, eights):
    """The codes of one row. Indices are unsigned, for loops over those that could be negative do not become vectors."""
    runs, wide, digits = places.runs, places.eights, places.digits
    cells, size, step_by = record.size // places.size, np.uint64(places.size), np.uint64(places.codes)
    for e in range(wide.shape[0]):
        byte, count, bits, at, low = wide[e, 0], wide[e, 1], wide[e, 2], wide[e, 3], wide[e, 4]
        source, target = np.uint64(byte), np.uint64(at // 8)
        for _ in range(cells):
            _read_eights(record, source, count, bits, eights, target, np.uint64(low))
            source += size
            target += np.uint64(places.codes // 8)
    for r in range(runs.shape[0]):
        source, count, target = np.uint64(runs[r, 0]), runs[r, 1], np.uint64(runs[r, 4])
        step, low = runs[r, 5], runs[r, 6]
        factor, mask = np.uint16(256 >> runs[r, 2]), np.uint8(runs[r, 3])
        if step == 1 and low == 0:
            for _ in range(cells):
                _read_run(record, source, count, factor, mask, codes, target)
                source += size
                target += step_by
        else:
            for _ in range(cells):
                _read_apart(record, source, count, factor, mask, codes, target, np.uint64(step), low)
                source += size
                target += step_by
    for d in range(digits.shape[0]):
        count = digits[d, 1]
        for i in range(digits[d, 2]):
            source, target = np.uint64(digits[d, 0]), np.uint64(digits[d, 3] + count * i)
            for _ in range(cells):
                _read_digit(record, source, count, places.powers[i], codes, target)
                source += size
                target += step_by


@njit(cache=True, nogil=True)
def _read_run(record, byte, count, factor, mask, codes, at):
    """factor : 2**(8 - shift), for a product and a shift that is always the same make vectors"""
    for m in range(np.uint64(count)):
        codes[at + m] = np.uint8(np.uint8(np.uint16(record[byte + m]) * factor >> np.uint16(8)) & mask)


@njit(cache=True, nogil=True, inline="always")
def _read_apart(record, byte, count, factor, mask, codes, at, step, low):
    """A run whose codes lie `step` apart, or whose lower bits are there already."""
    for m in range(np.uint64(count)):
        field = np.uint8((np.uint8(np.uint16(record[byte + m]) * factor >> np.uint16(8)) & mask) << low)
        codes[at] = field if low == 0 else codes[at] | field
        at += step


@njit(cache=True, nogil=True)
def _read_digit(record, byte, count, power, codes, at):
    """The digit that this power brings to the top of a byte: what lies above 256 when that is tripled."""
    for m in range(np.uint64(count)):
        rest = np.uint8(record[byte + m] * power)
        codes[at + m] = np.uint8(np.uint16(rest) * np.uint16(3) >> np.uint16(8))


@njit(cache=True, nogil=True, inline="always")
def _read_eights(record, byte, count, bits, eights, at, low):
    """Spread eight fields to eight bytes: halves move apart by four fields' distance, then by two, then by one."""
    one = np.uint64(8 - bits)
    two, four = np.uint64(2) * one, np.uint64(4) * one
    ones = ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)) * np.uint64(0x0101010101010101)
    pairs = ((np.uint64(1) << np.uint64(2 * bits)) - np.uint64(1)) * np.uint64(0x0001000100010001)
    fours = ((np.uint64(1) << np.uint64(4 * bits)) - np.uint64(1)) * np.uint64(0x0000000100000001)
    for i in range(np.uint64(count)):
        x = np.uint64(0)
        for b in range(np.uint64(bits)):
            x |= np.uint64(record[byte]) << np.uint64(8) * b
            byte += np.uint64(1)
        x = (x | x << four) & fours
        x = (x | x << two) & pairs
        x = (x | x << one) & ones
        eights[at + i] = x if low == np.uint64(0) else eights[at + i] | x << low


@njit(cache=True, nogil=True)
def _affine_straight(records, places, zero, scale, out):
    """`_affine` where `_straight`: runs in vectors of sixteen, then of four, then one by one."""
    runs, digits = places.runs, places.digits
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        record, weights = records[row], out[row]
        for cell in range(record.size // places.size):
            start, first = cell * places.size, cell * places.codes
            factor = scale[row % scale.shape[0], first // group]
            for r in range(runs.shape[0]):
                byte, count, at = start + runs[r, 0], runs[r, 1], first + runs[r, 4]
                shift, mask = np.uint16(runs[r, 2]), np.uint16(runs[r, 3])
                wide = count // 16 * 16
                for m in range(0, wide, 16):
                    _sixteen_fields(weights, at + m, record, byte + m, shift, mask, zero, factor)
                for m in range(wide, count):
                    weights[at + m] = (F32(np.uint16(record[byte + m]) >> shift & mask) - zero) * factor
            for d in range(digits.shape[0]):
                byte, count, at = start + digits[d, 0], digits[d, 1], first + digits[d, 3]
                wide, four = count // 16 * 16, count // 4 * 4
                for i in range(digits[d, 2]):
                    power = places.powers[i]
                    for m in range(0, wide, 16):
                        _sixteen_digits(weights, at + m, record, byte + m, power, zero, factor)
                    for m in range(wide, four, 4):
                        _four_digits(weights, at + m, record, byte + m, power, zero, factor)
                    for m in range(four, count):
                        rest = np.uint8(record[byte + m] * power)
                        weights[at + m] = (F32(np.uint16(rest) * np.uint16(3) >> np.uint16(8)) - zero) * factor
                    at += count


@njit(cache=True, nogil=True)
def _affine(records, places, codes, eights, numbers, zero, scale, out):
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        _read(records[row], places, codes, eights)
        for g in range(scale.shape[1]):
            factor = scale[row % scale.shape[0], g]
            mine, weights = numbers[g * group : (g + 1) * group], out[row, g * group : (g + 1) * group]
            for j in range(weights.size):
                weights[j] = (F32(mine[j]) - zero) * factor


@njit(cache=True, nogil=True)
def _levels(records, places, codes, eights, values, scale, out):
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        _read(records[row], places, codes, eights)
        for g in range(scale.shape[1]):
            factor = scale[row % scale.shape[0], g]
            mine, weights = codes[g * group : (g + 1) * group], out[row, g * group : (g + 1) * group]
            for j in range(weights.size):
                weights[j] = values[mine[j]] * factor


@njit(cache=True, nogil=True)
def _quads(records, places, codes, eights, values, scale, out):
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        _read(records[row], places, codes, eights)
        for g in range(scale.shape[1]):
            factor = scale[row % scale.shape[0], g]
            mine, weights = codes[g * group // 4 : (g + 1) * group // 4], out[row, g * group : (g + 1) * group]
            for quad in range(mine.size):
                code = mine[quad]
                for lane in range(4):
                    weights[4 * quad + lane] = values[code, lane] * factor


@njit(cache=True, nogil=True)
def _strided_quads(records, places, codes, eights, lanes, stride, scale, out):
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        _read(records[row], places, codes, eights)
        for g in range(scale.shape[1]):
            factor = scale[row % scale.shape[0], g]
            for chunk in range(g * group // (4 * stride), (g + 1) * group // (4 * stride)):
                mine = codes[chunk * stride : (chunk + 1) * stride]
                for lane in range(4):
                    column = (4 * chunk + lane) * stride
                    weights = out[row, column : column + stride]
                    for i in range(mine.size):
                        weights[i] = lanes[lane, mine[i]] * factor
