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
SIGN = np.uint32(0x80000000)
MOST_ZERO = F32(1 << 16)  # to which 128 is added exactly
FEW = 64  # codes of a run
THROUGH = 16  # bytes of which an array's address is a multiple, to be written past the cache; those of NumPy are
ONE_EXPONENT = np.uint32(1 << 23)  # what doubles a float32, as a whole number
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
        return self.store_product(
            kind, out, at, self.builder.fsub(self.builder.uitofp(codes, self.of(32)), self.all(zero)), factor
        )

    def store_product(self, kind: types.Array, out: Any, at: Any, steps: Any, factor: Any, through: int = 0) -> Any:
        """`through` is 0, or a number of bytes of which the place is a multiple: past the cache."""
        done = self.builder.store(self.builder.fmul(steps, self.all(factor)), self.place(kind, out, at, 32))
        done.align = through or 4
        if through:  # does not read what it overwrites
            done.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
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


def _bytes_plainly(lanes: int) -> Callable[..., None]:
    """codes[at + i] = record[byte + i] >> shift & mask, for so many i."""

    def write(codes, at, record, byte, shift, mask):
        codes[at : at + lanes] = record[byte : byte + lanes] >> shift & mask

    return write


def _bytes(lanes: int) -> Callable[..., None]:
    """`_bytes_plainly`, compiled."""

    def write(typing, codes, at, record, byte, shift, mask):
        def code(context, builder, signature, args):
            v = _Vectors(lanes, context, builder)
            fields = builder.lshr(v.load(signature.args[2], *args[2:4]), v.all(args[4]))  # there is no shift of bytes
            place = v.place(signature.args[0], *args[:2], 8)
            builder.store(builder.trunc(builder.and_(fields, v.all(args[5])), place.type.pointee), place).align = 1
            return context.get_dummy_value()

        return types.void(codes, types.int64, record, types.int64, types.uint16, types.uint16), code

    return intrinsic(write)


def _spread_plainly(bits: int) -> Callable[..., None]:
    """Sixteen codes from as many fields of `bits` bits, one after the other from byte `byte` on."""

    def write(codes, at, record, byte):
        fields = np.unpackbits(record[byte : byte + 2 * bits], bitorder="little").reshape(16, bits)
        codes[at : at + 16] = np.packbits(fields, axis=1, bitorder="little")[:, 0]

    return write


def _spread(bits: int) -> Callable[..., None]:
    """`_spread_plainly`, compiled: each field is cut out of the two bytes that it begins in."""

    def write(typing, codes, at, record, byte):
        def code(context, builder, signature, args):
            v, stored = _Vectors(16, context, builder), _Vectors(2 * bits, context, builder)
            found = builder.load(stored.place(signature.args[2], *args[2:4], 8))
            found.align = 1
            first = [bits * i // 8 for i in range(16)]
            both = [min(byte, 2 * bits - 1) for one in first for byte in (one, one + 1)]
            pairs = builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(ir.IntType(32), 32), both))
            shifts = ir.Constant(v.of(16), [bits * i % 8 for i in range(16)])
            fields = builder.and_(builder.lshr(builder.bitcast(pairs, v.of(16)), shifts), v.constant((1 << bits) - 1))
            place = v.place(signature.args[0], *args[:2], 8)
            builder.store(builder.trunc(fields, place.type.pointee), place).align = 1
            return context.get_dummy_value()

        return types.void(codes, types.int64, record, types.int64), code

    return intrinsic(write)


def _floats_plainly(lanes: int) -> Callable[..., None]:
    """out[at + i] = number(codes[from_ + i]) * factor, by `Arithmetic`, for so many i."""

    def write(out, at, codes, from_, how, factor):
        code = codes[from_ : from_ + lanes].astype(np.uint32)
        bits = (code & how.magnitude) << how.shift
        few = (bits + how.base + ONE_EXPONENT).view(F32) - how.unit
        size = np.where(bits < ONE_EXPONENT, few, (bits + how.base).view(F32)).view(np.uint32)
        out[at : at + lanes] = ((size | code << how.sign & SIGN).view(F32) + how.zero) * factor

    return write


def _floats(lanes: int, through: int = 0) -> Callable[..., None]:
    """`_floats_plainly`, compiled. through : as in `store_product`"""

    def write(typing, out, at, codes, from_, how, factor):
        def code(context, builder, signature, args):
            v = _Vectors(lanes, context, builder)
            shift, magnitude, sign, base, unit, zero = (
                v.all(builder.extract_value(args[4], i)) for i in range(len(Arithmetic._fields) - 1)
            )
            whole = ir.VectorType(ir.IntType(32), lanes)

            def same(number: int) -> Any:
                return ir.Constant(whole, [number] * lanes)

            found = builder.zext(v.load(signature.args[2], *args[2:4]), whole)
            bits = builder.shl(builder.and_(found, magnitude), shift)
            normal = builder.add(bits, base)
            few = builder.fsub(builder.bitcast(builder.add(normal, same(1 << 23)), v.of(32)), unit)
            is_few = builder.icmp_unsigned("<", bits, same(1 << 23))
            size = builder.bitcast(builder.select(is_few, few, builder.bitcast(normal, v.of(32))), whole)
            signed = builder.or_(size, builder.and_(builder.shl(found, sign), same(1 << 31)))
            number = builder.fadd(builder.bitcast(signed, v.of(32)), zero)
            return v.store_product(signature.args[0], *args[:2], number, args[5], through)

        return types.void(out, types.int64, codes, types.int64, how, types.float32), code

    return intrinsic(write)


def _past_the_cache_plainly(lanes: int) -> Callable[..., None]:
    """target[at + i] = source[at + i], for so many i; target[at] lies at a multiple of the vector's size."""

    def write(target, source, at):
        target[at : at + lanes] = source[at : at + lanes]

    return write


def _past_the_cache(lanes: int) -> Callable[..., None]:
    """`_past_the_cache_plainly`, compiled to stores that do not read what they overwrite."""

    def write(typing, target, source, at):
        def code(context, builder, signature, args):
            v = _Vectors(lanes, context, builder)
            found = builder.load(v.place(signature.args[1], args[1], args[2], 32))
            found.align = 4
            one = ir.Constant(ir.FloatType(), 1)
            return v.store_product(signature.args[0], args[0], args[2], found, one, 4 * lanes)

        return types.void(target, source, types.int64), code

    return intrinsic(write)


def _fence_plainly() -> None:
    pass


@intrinsic
def _fence(typing):
    """What was stored past the cache is seen by other threads before anything that follows."""

    def code(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


INTERPRETED = bool(config.DISABLE_JIT)  # type: ignore[attr-defined]
_sixteen_fields = _fields_plainly(16) if INTERPRETED else _fields(16)
_sixteen_digits = _digits_plainly(16) if INTERPRETED else _digits(16)
_four_digits = _digits_plainly(4) if INTERPRETED else _digits(4)
_sixteen_bytes = _bytes_plainly(16) if INTERPRETED else _bytes(16)
_eight_bytes = _bytes_plainly(8) if INTERPRETED else _bytes(8)
_sixteen_floats = _floats_plainly(16) if INTERPRETED else _floats(16)
_sixteen_floats_through = _floats_plainly(16) if INTERPRETED else _floats(16, THROUGH)
_spread_1, _spread_2, _spread_3, _spread_4, _spread_5, _spread_6, _spread_7 = (
    _spread_plainly(width) if INTERPRETED else _spread(width) for width in range(1, 8)
)
_store_past_the_cache = _past_the_cache_plainly(16) if INTERPRETED else _past_the_cache(16)
_wait_for_stores = _fence_plainly if INTERPRETED else _fence


# ---------------------------------------------------------------- decoding


class Places(NamedTuple):
    """Where the codes of one cell lie. A cell is `size` bytes, and `codes` codes in their order.

    Streams are read before runs, each in order; what has `low` 0 replaces the code, the rest is added to it.

    runs : (n, 7) int64: byte, count, shift, mask, code, step, low. Byte `byte + i` holds, from bit
        `shift` up, bits `low` and above of code `code + step * i`.
    streams : (n, 5) int64: byte, count, bits, code, low. From the first bit of `byte` on, fields of `bits` bits
        hold bits `low` and above of `count` codes, one after the other; 1 to 7 bits.
    digits : (n, 4) int64: byte, count, digits, code. Base-3 bytes; digit i of byte `byte + m` is the
        code `code + m + count * i`.
    powers : (5,) uint8: what brings digit i of a byte to its top
    """

    size: int
    codes: int
    runs: np.ndarray
    streams: np.ndarray
    digits: np.ndarray
    powers: np.ndarray


class Arithmetic(NamedTuple):
    """How codes of a sign, an exponent and a mantissa become numbers without a table.

    The magnitude's bits, shifted to where float32 has its exponent, are a number but for a factor, which is a
    whole number added to the exponent. A subnormal counts in steps of the same size as the exponent above has: it is
    read as if of that one, and `unit` is taken off.

    shift, magnitude, base, sign : uint32. bits = (code & magnitude) << shift, to which base is added; the sign is
        bit 31 of code << sign
    unit : float32, the smallest normal
    zero : float32, which is added: -0 changes nothing, 0 makes -0 a 0
    top : uint8. Codes of this magnitude and above are infinite or no number, and stand in a table
    """

    shift: np.uint32
    magnitude: np.uint32
    sign: np.uint32
    base: np.uint32
    unit: np.float32
    zero: np.float32
    top: np.uint8


MOST_SPECIAL = 8  # codes of a sign that are infinite or no number


def arithmetic(values: np.ndarray) -> Arithmetic | None:
    """What computes these numbers, bit for bit; None if nothing does. values (codes,) float32, for all codes."""
    bits = len(values).bit_length() - 1
    if len(values) != 1 << bits or not 3 <= bits <= 8:
        return None
    codes, wanted = np.arange(len(values), dtype=np.uint8), values.view(np.uint32)
    magnitude = np.uint32((1 << bits - 1) - 1)
    zero = -F32(0) if wanted[1 << bits - 1] else F32(0)
    for mantissa in range(bits):
        with np.errstate(all="ignore"):
            unit = values[1] * F32(1 << mantissa)
            base = unit.view(np.uint32) - ONE_EXPONENT
            if not ONE_EXPONENT <= base < MAGNITUDE or base % ONE_EXPONENT:  # no power of two
                return None
            shift, sign = np.uint32(23 - mantissa), np.uint32(32 - bits)
            how = Arithmetic(shift, magnitude, sign, base, unit, zero, np.uint8(255))
            found = np.empty(len(values), F32)
            _floats_plainly(len(values))(found, 0, codes, 0, how, F32(1))
        differs = (found.view(np.uint32) != wanted).reshape(2, -1).any(0)
        top = int(np.argmax(differs)) if differs.any() else 255
        if top == 255 or len(differs) - top <= MOST_SPECIAL <= bits:
            return how._replace(top=np.uint8(top))
    return None


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
            codes = np.empty(out.shape[1], np.uint8)
            half = np.uint8(128 if dtype == "i1" else 0)
            _affine(records, places, codes, codes.view(dtype), half, F32(zero), scale, out)


def levels(
    records: np.ndarray,
    places: Places,
    scale: np.ndarray,
    out: np.ndarray,
    values: np.ndarray,
    how: Arithmetic | None,
    unit: np.float32,
    through: bool = False,
) -> bool:
    """w = values[code] * scale: one float32 product. values (codes,) float32, others as in `affine`.

    how : what computes the values, as `arithmetic` says
    unit : what codes in two's complement count, as `unit_of` says; else 0
    through : whether to write past the cache, if `fits_through`

    Returns whether that is well defined: not if neither a code nor its scale is a number, for which of the two
    survives is the processor's choice.
    """
    codes = np.empty(out.shape[1], np.uint8)
    with np.errstate(all="ignore"):
        if unit:
            folded = scale * unit
            if np.array_equal(folded / unit, scale, equal_nan=True):  # a product with it rounds as that with values
                half = np.uint8(len(values) // 2)
                _affine(records, places, codes, codes.view(np.int8), half, F32(0), folded, out)
                return True
        if how is not None:
            return bool(_computed(records, places, codes, how, values, scale, out, through))
        _levels(records, places, codes, values, scale, out)
        return True


def unit_of(values: np.ndarray) -> np.float32:
    """The power of two that codes in two's complement count; 0 if these are other numbers."""
    half, unit = len(values) // 2, values[1]
    steps = (np.arange(len(values)) ^ half) - half
    two = len(values) == 2 * half and np.frexp(unit)[0] == 0.5
    return unit if two and (steps.astype(F32) * unit).tobytes() == values.tobytes() else F32(0)


def fits_through(out: np.ndarray, group: int) -> bool:
    """Whether `levels` can write past the cache: it does so in whole vectors. group : columns that share a scale"""
    return group % 16 == 0 and out.ctypes.data % THROUGH == 0


def quads(
    records: np.ndarray, places: Places, scale: np.ndarray, out: np.ndarray, values: np.ndarray, stride: int
) -> None:
    """w = values[code][lane] * scale: one float32 product. values (codes, 4) float32, others as in `affine`.

    Lane p of quad g is column g % stride + p * stride of the chunk g // stride of 4 * stride columns; a
    group holds whole chunks.
    """
    codes = np.empty(out.shape[1] // 4, np.uint8)
    with np.errstate(all="ignore"):
        if stride == 1:
            _quads(records, places, codes, values, scale, out)
        else:
            lanes = np.ascontiguousarray(values.T)
            _strided_quads(records, places, codes, lanes, stride, scale, out)


def look_up(stored: np.ndarray, size: int, offset: int, count: int, values: np.ndarray) -> np.ndarray:
    """The numbers of bytes: `count` from byte `offset` on of each cell of `size` bytes. On one thread.

    stored : (rows, cells * size) uint8
    values : (256,) float32

    Returns (rows, cells * count) float32.
    """
    out = np.empty((len(stored), stored.shape[1] // size * count), F32)
    _look_up(stored, size, offset, count, values, out)
    return out


def write_through(source: np.ndarray, target: np.ndarray) -> None:
    """Copy C-contiguous float32 to memory without reading there first, or keeping it in the cache. On one thread."""
    _write_through(source.reshape(-1), target.reshape(-1))


def _straight(places: Places, group: int) -> bool:
    """Whether numbers can be written without keeping codes: runs lie side by side, and cells within a group."""
    plain = not len(places.streams) and (places.runs[:, 5] == 1).all() and not places.runs[:, 6].any()
    return bool(plain) and group % places.codes == 0


@njit(cache=True, nogil=True)
def _read(record, places, codes):
    """The codes of one row. Indices are unsigned, for loops over those that could be negative do not become vectors."""
    runs, streams, digits = places.runs, places.streams, places.digits
    cells, size, step_by = record.size // places.size, np.uint64(places.size), np.uint64(places.codes)
    for s in range(streams.shape[0]):
        byte, count, bits = streams[s, 0], streams[s, 1], streams[s, 2]
        at, low = streams[s, 3], streams[s, 4]
        for _ in range(cells):
            _read_stream(record, byte, count, bits, codes, at, low)
            byte += places.size
            at += places.codes
    for r in range(runs.shape[0]):
        source, count, target = np.uint64(runs[r, 0]), runs[r, 1], np.uint64(runs[r, 4])
        step, low = runs[r, 5], runs[r, 6]
        factor, mask = np.uint16(256 >> runs[r, 2]), np.uint8(runs[r, 3])
        if step == 1 and low == 0:
            shift, wanted = np.uint16(runs[r, 2]), np.uint16(mask)
            byte, at = runs[r, 0], runs[r, 4]
            _read_side_by_side(record, places.size, byte, count, shift, wanted, codes, places.codes, at)
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


@njit(cache=True, nogil=True, inline="always")
def _read_side_by_side(record, size, source, count, shift, mask, codes, each, target):
    """A run in vectors. A cell that has few is read with its like: one vector of all cells, then the next."""
    cells, wide = record.size // size, count // 16 * 16
    if count < FEW:
        for m in range(0, wide, 16):
            byte, at = source + m, target + m
            for _ in range(cells):
                _sixteen_bytes(codes, at, record, byte, shift, mask)
                byte += size
                at += each
        if count - wide >= 8:
            byte, at = source + wide, target + wide
            for _ in range(cells):
                _eight_bytes(codes, at, record, byte, shift, mask)
                byte += size
                at += each
            wide += 8
    for cell in range(cells if wide < count or count >= FEW else 0):
        byte, at = source + cell * size, target + cell * each
        if count >= FEW:
            for m in range(0, wide, 16):
                _sixteen_bytes(codes, at + m, record, byte + m, shift, mask)
        for m in range(wide, count):
            codes[at + m] = np.uint16(record[byte + m]) >> shift & mask


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
def _read_stream(record, byte, count, bits, codes, at, low):
    """Fields of `bits` bits, one after the other: sixteen at a time, or one by one where lower bits are there."""
    wide = count // 16 * 16 if low == 0 else 0
    if bits == 4:
        for i in range(0, wide, 16):
            _spread_4(codes, at + i, record, byte + i // 2)
    elif bits == 6:
        for i in range(0, wide, 16):
            _spread_6(codes, at + i, record, byte + i // 4 * 3)
    else:
        for i in range(0, wide, 16):
            if bits == 1:
                _spread_1(codes, at + i, record, byte + i // 8)
            elif bits == 2:
                _spread_2(codes, at + i, record, byte + i // 4)
            elif bits == 3:
                _spread_3(codes, at + i, record, byte + i // 8 * 3)
            elif bits == 5:
                _spread_5(codes, at + i, record, byte + i // 8 * 5)
            else:
                _spread_7(codes, at + i, record, byte + i // 8 * 7)
    mask = np.uint16((1 << bits) - 1)
    for i in range(wide, count):
        first, shift = byte + i * bits // 8, i * bits % 8
        both = np.uint16(record[first])
        if shift + bits > 8:
            both |= np.uint16(record[first + 1]) << np.uint16(8)
        field = np.uint8((both >> np.uint16(shift) & mask) << np.uint16(low))
        codes[at + i] = field if low == 0 else codes[at + i] | field


@njit(cache=True, nogil=True)
def _look_up(stored, size, offset, count, values, out):
    for row in range(stored.shape[0]):
        found, numbers = stored[row], out[row]
        for i in range(count):
            for cell in range(numbers.size // count):
                numbers[cell * count + i] = values[found[cell * size + offset + i]]


@njit(cache=True, nogil=True)
def _write_through(source, target):
    before = min(-(target.ctypes.data // 4) % 16, target.size)  # numbers up to a multiple of 64 bytes
    end = target.size - (target.size - before) % 16
    for i in range(before):
        target[i] = source[i]
    for i in range(before, end, 16):
        _store_past_the_cache(target, source, i)
    for i in range(end, target.size):
        target[i] = source[i]
    _wait_for_stores()


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
def _affine(records, places, codes, numbers, half, zero, scale, out):
    """half : 0, or the sign of codes in two's complement. It is added to them and to zero, for vectors are unsigned."""
    group = out.shape[1] // scale.shape[1]
    shift, mask, middle = np.uint16(0), np.uint16(255), zero + F32(half)
    exact = half == 0 or (np.floor(zero) == zero and abs(zero) < MOST_ZERO)
    wide = group // 16 * 16 if exact else 0
    for row in range(records.shape[0]):
        _read(records[row], places, codes)
        weights, factors = out[row], scale[row % scale.shape[0]]
        if exact and half != 0:
            for j in range(codes.size):
                codes[j] ^= half
        for m in range(0, wide, 16):
            at = m
            for g in range(factors.size):
                _sixteen_fields(weights, at, codes, at, shift, mask, middle, factors[g])
                at += group
        for g in range(factors.size if wide < group else 0):
            for j in range(g * group + wide, (g + 1) * group):
                step = F32(codes[j]) - middle if exact else F32(numbers[j]) - zero
                weights[j] = step * factors[g]


@njit(cache=True, nogil=True)
def _levels(records, places, codes, values, scale, out):
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        _read(records[row], places, codes)
        weights, factors = out[row], scale[row % scale.shape[0]]
        for g in range(factors.size):
            factor = factors[g]
            for j in range(np.uint64(g * group), np.uint64((g + 1) * group)):
                weights[j] = values[codes[j]] * factor


@njit(cache=True, nogil=True)
def _reaches(codes, magnitude, top):
    """Whether a code's magnitude is `top` or above."""
    highest = np.uint8(0)
    for i in range(codes.size):
        highest = max(highest, np.uint8(codes[i] & magnitude))
    return highest >= top


@njit(cache=True, nogil=True)
def _computed(records, places, codes, how, values, scale, out, through):
    """`_levels`, a vector at a time; rows with codes that are infinite or no number go by the table.

    Returns whether all scales of such rows are numbers.
    """
    group, good = out.shape[1] // scale.shape[1], True
    for row in range(records.shape[0]):
        _read(records[row], places, codes)
        weights, factors = out[row], scale[row % scale.shape[0]]
        special = how.top <= how.magnitude and _reaches(codes, np.uint8(how.magnitude), how.top)
        wide = 0 if special else group // 16 * 16
        if through:  # in order, so that lines are complete at once
            for g in range(factors.size):
                for j in range(g * group, g * group + wide, 16):
                    _sixteen_floats_through(weights, j, codes, j, how, factors[g])
        else:
            for m in range(0, wide, 16):
                at = m
                for g in range(factors.size):
                    _sixteen_floats(weights, at, codes, at, how, factors[g])
                    at += group
        for g in range(factors.size if wide < group else 0):
            factor, first = factors[g], g * group
            for j in range(first + wide, first + group):
                weights[j] = values[codes[j]] * factor
            if special and factor != factor:
                good = False
    if through:
        _wait_for_stores()
    return good


@njit(cache=True, nogil=True)
def _quads(records, places, codes, values, scale, out):
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        _read(records[row], places, codes)
        for g in range(scale.shape[1]):
            factor = scale[row % scale.shape[0], g]
            mine, weights = codes[g * group // 4 : (g + 1) * group // 4], out[row, g * group : (g + 1) * group]
            for quad in range(mine.size):
                code = mine[quad]
                for lane in range(4):
                    weights[4 * quad + lane] = values[code, lane] * factor


@njit(cache=True, nogil=True)
def _strided_quads(records, places, codes, lanes, stride, scale, out):
    group = out.shape[1] // scale.shape[1]
    for row in range(records.shape[0]):
        _read(records[row], places, codes)
        for g in range(scale.shape[1]):
            factor = scale[row % scale.shape[0], g]
            for chunk in range(g * group // (4 * stride), (g + 1) * group // (4 * stride)):
                mine = codes[chunk * stride : (chunk + 1) * stride]
                for lane in range(4):
                    column = (4 * chunk + lane) * stride
                    weights = out[row, column : column + stride]
                    for i in range(mine.size):
                        weights[i] = lanes[lane, mine[i]] * factor
