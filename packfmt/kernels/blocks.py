"""Bytes of any blocks to weights, in one pass.

A row of records becomes codes, and codes become numbers, sixteen at a time: looked up, if they have few bits, or
computed. Where the codes lie, the loops know from tables, not from a format's name.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from packfmt.kernels.cache import njit
from packfmt.kernels.floats import VERSION
from packfmt.kernels.places import FIVES, Places
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    as_floats,
    divf,
    ints_of,
    load_bytes16,
    load_floats16,
    look_up_words,
    mulf,
    or_,
    same_float,
    same_int,
    select_less,
    shift_left,
    store,
    subf,
    to_float,
    widen,
    xor,
)
from packfmt.kernels.vectors import (
    F32,
    INTERPRETED,
    ONE_EXPONENT,
    Arithmetic,
    _eight_bytes,
    _floats_plainly,
    _sixteen_bytes,
    _spread_1,
    _spread_2,
    _spread_3,
    _spread_4,
    _spread_5,
    _spread_6,
    _spread_7,
    _spread_fives,
)

MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
NEGATIVE = np.int32(-(1 << 31))  # the sign of a float32
FEW = 64  # codes of a run
TABLE = 16  # numbers that one register holds

LOOKED_UP, WHOLE, COMPUTED, PLAIN = range(4)  # how codes become numbers


MOST_SPECIAL = 8  # codes of a sign that are infinite or no number


class Numbers(NamedTuple):
    """What codes are before scales multiply them.

    kind : LOOKED_UP, for 32 codes at most; WHOLE, (float32(code ^ half) - middle) * unit; COMPUTED, by `how`; PLAIN,
        which is looked up one by one
    values : (tables, codes) float32. Kinds but LOOKED_UP have one table
    """

    kind: int
    values: np.ndarray
    how: Arithmetic
    half: np.int32
    middle: np.float32
    unit: np.float32


def looked_up(tables: np.ndarray) -> Numbers:
    """Numbers that are looked up. tables (tables, codes) float32"""
    none, zero = np.uint32(0), F32(0)
    how = Arithmetic(none, none, none, none, zero, zero, np.uint8(255))
    return Numbers(LOOKED_UP, tables, how, np.int32(0), zero, F32(1))


def numbers_of(values: np.ndarray) -> Numbers:
    """How to get at these numbers fastest, bit for bit. values (codes,) or (tables, codes) float32, for all codes"""
    tables = np.ascontiguousarray(np.atleast_2d(values), F32)
    first, zero = tables[0], F32(0)
    none = looked_up(tables).how
    if len(first) <= 2 * TABLE and not np.isnan(tables).any():
        return looked_up(tables)
    for half in (0, len(first) // 2):
        codes = (np.arange(len(first)) ^ half).astype(F32)
        unit = np.abs(first[1 ^ half] - first[half])
        with np.errstate(all="ignore"):
            middle = -first[half] / unit
            found = (codes - middle) * unit
        if found.tobytes() == first.tobytes():
            return Numbers(WHOLE, tables, none, np.int32(half), F32(middle), F32(unit))
    found_how = arithmetic(first)
    return Numbers(COMPUTED if found_how else PLAIN, tables, found_how or none, np.int32(0), zero, F32(1))


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


def decode(
    records: np.ndarray,
    places: Places,
    scale: np.ndarray,
    out: np.ndarray,
    numbers: Numbers,
    way: str = "times",
    planes: int = 1,
    which: np.ndarray | None = None,
) -> bool:
    """w = number(code) * scale, in float32, each operation rounding on its own. On one thread.

    Parameters
    ----------
    records : (rows, bytes) uint8
    places : where codes lie in a record
    scale : (rows or 1, groups * planes) float32, the planes of a group one after the other
    out : (rows, cols) float32, written
    numbers : what codes stand for
    way : "times"; "divides", by the scale; "digits": every code stands for a number of each table, and w is the sum
        of their products; "which": of the tables, the one that `which` says
    planes : codes of a group lie one plane after the other, and w is the sum of their products, planes in order
    which : (rows or 1, groups) uint8, the table of each group

    Returns
    -------
    well_defined : False if neither a code nor its scale is a number, for which of the two survives is the processor's
        choice
    """
    cols, each = out.shape[1], 1 if way == "digits" else planes
    group = cols * planes // scale.shape[1]
    which = np.zeros((1, 1), np.uint8) if which is None else which
    if planes > 1 and np.isnan(scale).any():
        return False
    codes, once = np.empty(cols * each, np.uint8), _once_a_group(numbers, way, planes, group)
    if INTERPRETED or numbers.kind == PLAIN or not (once or (way == "times" and (planes == 1 or group % 16 == 0))):
        return bool(_plainly(records, places, codes, numbers.values, which, way, planes, scale, out))
    if once:
        values = np.zeros((len(numbers.values), TABLE), F32)
        values[:, : numbers.values.shape[1]] = numbers.values[:, :TABLE]
        _looking_up(way, VERSION)(records, places, values, which, planes, scale, out, codes)
    else:
        table = np.resize(numbers.values[0], 2 * TABLE) if numbers.kind == LOOKED_UP else numbers.values[0]
        wide = np.empty(cols if group % 16 else 0, F32)
        loop = _computing(numbers.kind, planes, VERSION)
        return bool(loop(records, places, numbers._replace(values=table), scale, out, codes, wide))
    return True


def _once_a_group(numbers: Numbers, way: str, planes: int, group: int) -> bool:
    """Whether all numbers are multiplied once a group, and looked up then."""
    few = numbers.kind == LOOKED_UP and numbers.values.shape[1] <= TABLE
    return few and group % 16 == 0 and (way != "times" or planes == 1)


def quads(
    records: np.ndarray,
    places: Places,
    scale: np.ndarray,
    out: np.ndarray,
    values: np.ndarray,
    stride: int,
) -> None:
    """w = values[code][lane] * scale: one float32 product. values (codes, 4) float32, others as in `decode`.

    Lane p of quad g is column g % stride + p * stride of the chunk g // stride of 4 * stride columns; a
    group holds whole chunks.
    """
    codes = np.empty(out.shape[1] // 4, np.uint8)
    lanes = np.ascontiguousarray(values.T)
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


def take(source: np.ndarray, order: np.ndarray, target: np.ndarray) -> None:
    """Column j of the target is the source's column order[j]. On one thread.

    source, target : (rows, cols) float32, apart
    order : (cols,) int64, each below cols
    """
    _take(source, order, target)


def doubled(scale: np.ndarray, eights: np.ndarray, fours: np.ndarray) -> np.ndarray:
    """A scale for every four columns: that of their group, times 2 where their eight is doubled, and where they are.

    scale : (rows, groups) float32; eights (rows, cols / 8) and fours (rows, cols / 4) uint8, 0 or 1
    """
    out = np.empty(fours.shape, F32)
    with np.errstate(all="ignore"):
        _doubled(scale, eights, fours, out)
    return out


@njit(cache=True, nogil=True)
def _look_up(stored, size, offset, count, values, out):
    for row in range(stored.shape[0]):
        found, numbers = stored[row], out[row]
        for i in range(count):
            for cell in range(numbers.size // count):
                numbers[cell * count + i] = values[found[cell * size + offset + i]]


@njit(cache=True, nogil=True)
def _take(source, order, target):
    for row in range(source.shape[0]):
        mine, out = source[row], target[row]
        for j in range(order.size):
            out[j] = mine[order[j]]


@njit(cache=True, nogil=True)
def _doubled(scale, eights, fours, out):
    for row in range(out.shape[0]):
        each = out.shape[1] // scale.shape[1]
        for g in range(scale.shape[1]):
            factor, mine = scale[row, g], out[row, g * each : (g + 1) * each]
            eight, four = eights[row, g * each // 2 : (g + 1) * each // 2], fours[row, g * each : (g + 1) * each]
            for i in range(eight.size):
                once = factor * F32(1 << eight[i])
                mine[2 * i] = once * F32(1 << four[2 * i])
                mine[2 * i + 1] = once * F32(1 << four[2 * i + 1])


@cache
def _looking_up(way: str, version: str) -> Any:
    """The loop of `decode` for sixteen values. version : part of the key under which compiled code is kept"""
    divides, digits, chosen = way == "divides", way == "digits", way == "which"

    @njit(cache=True, nogil=True)
    def _look_up_few(records, places, values, which, planes, scale, out, codes):
        """All sixteen numbers are multiplied, and rounded, once a group."""
        group, first_table, _ = out.shape[1] * planes // scale.shape[1], load_floats16(values, 0), version
        for row in range(records.shape[0]):
            _read(records[row], places, codes)
            factors, weights, first = scale[row % scale.shape[0]], out[row], 0
            tables = which[row % which.shape[0]]
            for g in range(0, factors.size, planes):
                factor, table = same_float(factors[g]), first_table
                if chosen:
                    table = load_floats16(values, 64 * np.int64(tables[g]))
                product = divf(table, factor) if divides else mulf(table, factor)
                if digits:
                    for p in range(1, planes):
                        product = addf(product, mulf(load_floats16(values, 64 * p), same_float(factors[g + p])))
                bits = ints_of(product)
                for j in range(first, first + group, 16):
                    store(weights, 4 * j, look_up_words(bits, bits, widen(load_bytes16(codes, j))))
                first += group

    return _look_up_few


@cache
def _computing(kind: int, planes: int, version: str) -> Any:
    """The loop of `decode` for other values. version : part of the key under which compiled code is kept"""

    @njit(cache=True, nogil=True)
    def _compute(records, places, numbers, scale, out, codes, wide):
        """Sixteen at a time; rows with codes that are infinite or no number go one by one.

        wide : (cols,), to which scales are spread if a group is no whole number of vectors

        Returns whether all scales of such rows are numbers.
        """
        cols, group, good = out.shape[1], out.shape[1] * planes // scale.shape[1], True
        whole, how, values, _ = cols // 16 * 16, numbers.how, numbers.values, version
        for row in range(records.shape[0]):
            _read(records[row], places, codes)
            factors, weights = scale[row % scale.shape[0]], out[row]
            rest = whole
            if kind == COMPUTED and how.top <= how.magnitude and _reaches(codes, np.uint8(how.magnitude), how.top):
                rest = 0
                for g in range(factors.size):
                    good = good and factors[g] == factors[g]
            elif wide.size:
                _spread_factors(factors, group, wide)
                for j in range(0, whole, 16):
                    store(weights, 4 * j, mulf(_number(kind, numbers, codes, j), load_floats16(wide, 4 * j)))
            else:
                first, code = 0, 0
                for g in range(0, factors.size, planes):
                    for j in range(0, group, 16):
                        total = mulf(_number(kind, numbers, codes, code + j), same_float(factors[g]))
                        for p in range(1, planes):
                            number = _number(kind, numbers, codes, code + p * group + j)
                            total = addf(total, mulf(number, same_float(factors[g + p])))
                        store(weights, 4 * (first + j), total)
                    first += group
                    code += planes * group
            for j in range(rest, cols):
                weights[j] = values[codes[j]] * factors[j // group]
        return good

    return _compute


@njit(cache=True, nogil=True, inline="always")
def _number(kind, numbers, codes, at):
    """The numbers of sixteen codes. Inlined, for what looks up depends on the machine, and callers know that."""
    code = widen(load_bytes16(codes, at))
    if kind == LOOKED_UP:
        low, high = ints_of(load_floats16(numbers.values, 0)), ints_of(load_floats16(numbers.values, 64))
        found = as_floats(look_up_words(low, high, code))
    elif kind == WHOLE:
        step = subf(to_float(xor(code, same_int(numbers.half))), same_float(numbers.middle))
        found = mulf(step, same_float(numbers.unit))
    else:
        how = numbers.how
        bits = shift_left(and_(code, same_int(np.int32(how.magnitude))), np.int32(how.shift))
        normal, one = add(bits, same_int(np.int32(how.base))), same_int(np.int32(ONE_EXPONENT))
        few = subf(as_floats(add(normal, one)), same_float(how.unit))
        size = select_less(bits, one, ints_of(few), normal)
        signed = or_(size, and_(shift_left(code, np.int32(how.sign)), same_int(NEGATIVE)))
        found = addf(as_floats(signed), same_float(how.zero))
    return found


@njit(cache=True, nogil=True)
def _spread_factors(factors, group, wide):
    """Each scale once for every column that shares it."""
    if group == 1:
        wide[:] = factors
    elif group == 4:
        for g in range(factors.size):
            for j in range(4):
                wide[4 * g + j] = factors[g]
    else:
        for g in range(factors.size):
            wide[g * group : (g + 1) * group] = factors[g]


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
    if bits == FIVES:
        for i in range(0, wide, 16):
            _spread_fives(codes, at + i, record, byte + i // 16 * 10, up)
    elif bits == 4:
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
    for i in range(wide, 0 if bits == FIVES else count):
        first, shift = byte + i * bits // 8, i * bits % 8
        both = np.uint16(record[first])
        if shift + bits > 8:
            both |= np.uint16(record[first + 1]) << np.uint16(8)
        field = np.uint8((both >> np.uint16(shift) & mask) << np.uint16(low))
        codes[at + i] = field if low == 0 else codes[at + i] | field


def _plainly(records, places, codes, values, which, way, planes, scale, out):
    """`decode`, one by one. Returns whether it is well defined."""
    digits = way == "digits"
    with np.errstate(all="ignore"):
        return _one_by_one(records, places, codes, values, which, way == "divides", digits, planes, scale, out)


@njit(cache=True, nogil=True)
def _one_by_one(records, places, codes, values, which, divides, digits, planes, scale, out):
    group, good = out.shape[1] * planes // scale.shape[1], True
    for row in range(records.shape[0]):
        _read(records[row], places, codes)
        factors, tables = scale[row % scale.shape[0]], which[row % which.shape[0]]
        for g in range(factors.size // planes):
            table = values[tables[g % tables.size]]
            for j in range(group):
                column = g * group + j
                at = column if digits else g * planes * group + j
                number, factor = table[codes[at]], factors[g * planes]
                total = np.divide(number, factor) if divides else F32(number * factor)
                good = good and (number == number or factor == factor)
                for p in range(1, planes):
                    number = values[p, codes[at]] if digits else table[codes[at + p * group]]
                    total = F32(total + F32(number * factors[g * planes + p]))
                out[row, column] = total
    return good


@njit(cache=True, nogil=True)
def _reaches(codes, magnitude, top):
    """Whether a code's magnitude is `top` or above."""
    highest = np.uint8(0)
    for i in range(codes.size):
        highest = max(highest, np.uint8(codes[i] & magnitude))
    return highest >= top


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
