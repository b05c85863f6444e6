"""Bytes of any blocks to weights, in one pass.

A row of records becomes codes, then numbers, or straight numbers where the codes' order is simple. Of codes with few
bits all numbers are computed once a group, and looked up. Where the codes lie, the loops know from tables, not from a
format's name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from packfmt.kernels import pages, simd, simd_code
from packfmt.kernels.simd import (
    add,
    and_,
    ints_of,
    load_bytes16,
    load_floats16,
    look_up_words,
    mulf,
    or_,
    same_float,
    same_int,
    select_less,
    shift_right,
    widen,
)
from packfmt.kernels.vectors import (
    F32,
    INTERPRETED,
    ONE_EXPONENT,
    THROUGH,
    Arithmetic,
    _eight_bytes,
    _floats_plainly,
    _four_digits,
    _sixteen_bytes,
    _sixteen_digits,
    _sixteen_fields,
    _sixteen_floats,
    _sixteen_floats_through,
    _spread_1,
    _spread_2,
    _spread_3,
    _spread_4,
    _spread_5,
    _spread_6,
    _spread_7,
    _store_past_the_cache,
    _Vectors,
    _wait_for_stores,
)

MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
INFINITE = np.uint32(0x7F800000)  # above which magnitudes are no numbers
QUIET = np.uint32(1 << 22)  # which keeps a NaN one where its lower half goes
HALF_BELOW = np.uint32(0x7FFF)  # just less than half of what bfloat16 rounds to
MOST_ZERO = F32(1 << 16)  # to which 128 is added exactly
FEW = 64  # codes of a run
TABLE = 16  # numbers that one look-up finds
LONG = 256  # codes of a cell, whose runs are faster without a table


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


def affine(
    records: np.ndarray,
    places: Places,
    scale: np.ndarray,
    out: np.ndarray,
    zero: float,
    dtype: str,
    through: bool = False,
) -> None:
    """w = (code - zero) * scale, in float32, each operation rounding on its own. On one thread.

    records : (rows, bytes) uint8
    scale : (rows or 1, groups) float32
    out : (rows, cols) float32, written; or uint16, the bits of bfloat16, where `fits_table`
    dtype : of the codes, "u1" or "i1"
    through : whether to write past the cache, where `fits_table` and `fits_through`
    """
    with np.errstate(all="ignore"):
        group = out.shape[1] // scale.shape[1]
        straight = dtype == "u1" and _straight(places, group)
        long = straight and places.codes >= LONG and out.dtype == F32 and not through
        if dtype == "u1" and not long and fits_table(places, group):
            _by_table(records, places, np.arange(TABLE, dtype=F32) - F32(zero), scale, out, through)
        elif straight:
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
        if fits_table(places, out.shape[1] // scale.shape[1]) and not np.isnan(values).any():
            _by_table(records, places, np.resize(values, TABLE), scale, out, through)
            return True
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
    lanes = np.ascontiguousarray(values.T)
    with np.errstate(all="ignore"):
        if not INTERPRETED and (stride == 1 or stride % 16 == 0) and out.shape[1] // scale.shape[1] % 64 == 0:
            tables = np.zeros((4, 2 * TABLE), F32)
            tables[:, : len(values)] = lanes[:, : 2 * TABLE]
            if _most(places.runs, places.streams) < 2 * TABLE:
                return _looking_up_quads(stride == 1, simd.VERSION)(records, places, codes, tables, stride, scale, out)
        if stride == 1:
            _quads(records, places, codes, values, scale, out)
        else:
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


def round_to_bfloat(source: np.ndarray, target: np.ndarray, through: bool = False) -> None:
    """Float32 to the nearest bfloat16, half to even; NaN stays NaN. On one thread.

    source : C-contiguous float32
    target : C-contiguous uint16 of the same shape, the bits of bfloat16, written
    through : whether past the cache, without reading there first
    """
    if INTERPRETED:
        bits = source.view(np.uint32)
        rounded = bits + HALF_BELOW + (bits >> np.uint32(16) & np.uint32(1))
        nearest = np.where(bits & MAGNITUDE > INFINITE, bits | QUIET, rounded)
        target[...] = nearest >> np.uint32(16)
    else:
        (_round_through if through else _round)(source.reshape(-1), target.reshape(-1))


def fits_table(places: Places, group: int) -> bool:
    """Whether `affine` and `levels` look numbers up, and can write bfloat16 themselves, too.

    So it is if codes have four bits at most, and columns that share a scale are a multiple of 32.
    """
    return not simd.INTERPRETED and group % 32 == 0 and bool(_most(places.runs, places.streams) < TABLE)


@njit(cache=True, nogil=True)
def _most(runs, streams):
    """The largest code that there can be."""
    most = 2  # a digit
    for r in range(runs.shape[0]):
        most = max(most, runs[r, 3] << runs[r, 6])
    for s in range(streams.shape[0]):
        most = max(most, (1 << streams[s, 2] + streams[s, 4]) - 1)
    return most


def _by_table(records, places, values, scale, out, through):
    """w = values[code] * scale, for sixteen values; out as in `levels`."""
    codes, row = np.empty(out.shape[1], np.uint8), pages.empty(out[:1].nbytes)
    rooms = codes, row.view(out.dtype), row, out.view(np.uint8)
    _looking_up(out.dtype == np.uint16, through, simd.VERSION)(records, places, values, scale, out, *rooms)


@cache
def _looking_up(narrow: bool, through: bool, version: str) -> Any:
    """The loop of `_by_table`. version : part of the key under which compiled code is kept"""

    @njit(cache=True, nogil=True)
    def _look_up_few(records, places, values, scale, out, codes, numbers, as_bytes, target):
        """All sixteen numbers are multiplied, and rounded, once a group. Past the cache a row goes when it is done."""
        group, sixteen, _ = out.shape[1] // scale.shape[1], load_floats16(values, 0), version
        for row in range(records.shape[0]):
            _read(records[row], places, codes)
            factors, weights, first = scale[row % scale.shape[0]], numbers if through else out[row], 0
            for g in range(factors.size):
                table = ints_of(mulf(sixteen, same_float(factors[g])))
                if narrow:
                    table = _to_bfloat(table)
                for j in range(first, first + group, 16):
                    _write(weights, j, look_up_words(table, table, widen(load_bytes16(codes, j))))
                first += group
            if through:
                _copy_past_the_cache(target[row], as_bytes)
        if through:
            _wait_for_stores()

    return _look_up_few


@cache
def _looking_up_quads(side_by_side: bool, version: str) -> Any:
    """The loop of `quads` for 32 codes. version : part of the key under which compiled code is kept"""

    @njit(cache=True, nogil=True)
    def _look_up_quads(records, places, codes, tables, stride, scale, out):
        """Sixteen quads at a time. tables : (4 lanes, 32 codes); a group's are multiplied once."""
        quads_of_group, _ = out.shape[1] // scale.shape[1] // 4, version
        for row in range(records.shape[0]):
            _read(records[row], places, codes)
            factors, weights, first = scale[row % scale.shape[0]], out[row], 0
            for g in range(factors.size):
                factor = same_float(factors[g])
                a, b = _times_table(tables, 0, factor), _times_table(tables, 128, factor)
                c, d = _times_table(tables, 256, factor), _times_table(tables, 384, factor)
                for quad in range(first, first + quads_of_group, 16):
                    code = widen(load_bytes16(codes, quad))
                    w, x = look_up_words(a[0], a[1], code), look_up_words(b[0], b[1], code)
                    y, z = look_up_words(c[0], c[1], code), look_up_words(d[0], d[1], code)
                    if side_by_side:
                        _write_side_by_side(weights, 4 * quad, w, x, y, z)
                    else:
                        at = 4 * quad - 3 * (quad % stride)
                        _write(weights, at, w)
                        _write(weights, at + stride, x)
                        _write(weights, at + 2 * stride, y)
                        _write(weights, at + 3 * stride, z)
                first += quads_of_group

    return _look_up_quads


@njit(cache=True, nogil=True)
def _times_table(tables, at, factor):
    """The bits of 32 numbers times a factor, from byte `at` on."""
    return ints_of(mulf(load_floats16(tables, at), factor)), ints_of(mulf(load_floats16(tables, at + 64), factor))


@intrinsic
def _write_side_by_side(typing, out, at, a, b, c, d):
    """Lanes 0 of four vectors, lanes 1 ..., to the float32 from `at` on."""

    def code(context, builder, signature, args):
        v = _Vectors(64, context, builder)
        halves = [builder.shuffle_vector(x, y, simd_code.order(range(32))) for x, y in (args[2:4], args[4:6])]
        order = simd_code.order([lane + 16 * which for lane in range(16) for which in range(4)])
        found = builder.bitcast(builder.shuffle_vector(*halves, order), v.of(32))
        builder.store(found, v.place(out, args[0], args[1], 32)).align = 4
        return context.get_dummy_value()

    return types.void(out, types.int64, a, b, c, d), code


@njit(cache=True, nogil=True)
def _copy_past_the_cache(target, source):
    """Bytes: whole lines of 64 without reading what they overwrite, and what is before and behind."""
    before = min(-target.ctypes.data % 64, target.size)
    end = target.size - (target.size - before) % 64
    for i in range(before):
        target[i] = source[i]
    for i in range(before, end, 64):
        _line_past_the_cache(target, source, i)
    for i in range(end, target.size):
        target[i] = source[i]


@intrinsic
def _line_past_the_cache(typing, target, source, at):
    def code(context, builder, signature, args):
        v = _Vectors(64, context, builder)
        found = builder.load(v.place(source, args[1], args[2], 8))
        found.align = 1
        done = builder.store(found, v.place(target, args[0], args[2], 8))
        done.align = 64
        done.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(target, source, types.int64), code


@njit(cache=True, nogil=True)
def _to_bfloat(bits):
    """The bits of sixteen float32 -> of the nearest bfloat16, as `round_to_bfloat` has them, in the lower half."""
    magnitude, quiet = same_int(np.int32(MAGNITUDE)), same_int(np.int32(QUIET))
    odd = and_(shift_right(bits, np.int32(16)), same_int(np.int32(1)))
    rounded = add(add(bits, same_int(np.int32(HALF_BELOW))), odd)
    is_none = select_less(same_int(np.int32(INFINITE)), and_(bits, magnitude), or_(bits, quiet), rounded)
    return shift_right(is_none, np.int32(16))


@intrinsic
def _write(typing, out, at, found):
    """Sixteen numbers by their bits, to the items of an array from `at` on; of uint16 the lower halves."""

    def code(context, builder, signature, args):
        v, bits = _Vectors(16, context, builder), out.dtype.bitwidth
        whole = ir.VectorType(ir.IntType(bits), 16)
        few = args[2] if bits == 32 else builder.trunc(args[2], whole)
        place = builder.bitcast(v.place(out, args[0], args[1], bits), whole.as_pointer())
        builder.store(few, place).align = bits // 8
        return context.get_dummy_value()

    return types.void(out, types.int64, found), code


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
    """Fields of `bits` bits, one after the other, sixteen at a time; lower bits, where there are any, stay."""
    wide, up = count // 16 * 16, np.uint16(low)
    if bits == 4:
        for i in range(0, wide, 16):
            _spread_4(codes, at + i, record, byte + i // 2, up)
    elif bits == 6:
        for i in range(0, wide, 16):
            _spread_6(codes, at + i, record, byte + i // 4 * 3, up)
    else:
        for i in range(0, wide, 16):
            if bits == 1:
                _spread_1(codes, at + i, record, byte + i // 8, up)
            elif bits == 2:
                _spread_2(codes, at + i, record, byte + i // 4, up)
            elif bits == 3:
                _spread_3(codes, at + i, record, byte + i // 8 * 3, up)
            elif bits == 5:
                _spread_5(codes, at + i, record, byte + i // 8 * 5, up)
            else:
                _spread_7(codes, at + i, record, byte + i // 8 * 7, up)
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


def _bfloats(through: int) -> Callable[..., None]:
    """target[at + i] = source[at + i] as bfloat16, for 32 numbers. through : as in `vectors.store_product`"""

    def write(typing, target, source, at):
        def code(context, builder, signature, args):
            v = _Vectors(32, context, builder)
            whole = ir.VectorType(ir.IntType(32), 32)

            def same(number: int) -> Any:
                return ir.Constant(whole, [int(number)] * 32)

            numbers = builder.load(v.place(signature.args[1], args[1], args[2], 32))
            numbers.align = 4
            bits, sixteen = builder.bitcast(numbers, whole), same(16)
            odd = builder.and_(builder.lshr(bits, sixteen), same(1))
            rounded = builder.add(bits, builder.add(odd, same(HALF_BELOW)))
            is_none = builder.icmp_unsigned(">", builder.and_(bits, same(MAGNITUDE)), same(INFINITE))
            nearest = builder.select(is_none, builder.or_(bits, same(QUIET)), rounded)
            few = builder.trunc(builder.lshr(nearest, sixteen), v.of(16))
            done = builder.store(few, v.place(signature.args[0], args[0], args[2], 16))
            done.align = through or 2
            if through:  # does not read what it overwrites
                done.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            return context.get_dummy_value()

        return types.void(target, source, types.int64), code

    return intrinsic(write)


_thirty_two_bfloats, _thirty_two_bfloats_through = _bfloats(0), _bfloats(64)


@intrinsic
def _bits(typing, number):
    """A float32 as uint32."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), code


@njit(cache=True, nogil=True)
def _bfloat(number):
    """`round_to_bfloat` for one number."""
    bits = _bits(number)
    if bits & MAGNITUDE > INFINITE:
        return np.uint16((bits | QUIET) >> np.uint32(16))
    return np.uint16((bits + HALF_BELOW + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@njit(cache=True, nogil=True)
def _round(source, target):
    end = target.size // 32 * 32
    for i in range(0, end, 32):
        _thirty_two_bfloats(target, source, i)
    for i in range(end, target.size):
        target[i] = _bfloat(source[i])


@njit(cache=True, nogil=True)
def _round_through(source, target):
    before = min(-(target.ctypes.data // 2) % 32, target.size)  # numbers up to a multiple of 64 bytes
    end = target.size - (target.size - before) % 32
    for i in range(before):
        target[i] = _bfloat(source[i])
    for i in range(before, end, 32):
        _thirty_two_bfloats_through(target, source, i)
    for i in range(end, target.size):
        target[i] = _bfloat(source[i])
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
