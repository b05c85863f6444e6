"""Decoding written out for one layout: from a cell's bytes to its numbers without a stop in memory.

Where the codes of a cell lie and what they stand for is known when the loop is compiled, so that it neither asks nor
counts within a cell: sixteen codes are gathered by one shuffle from the bytes that hold them, shifted by constants,
become numbers, meet their scale and are written. `blocks` does the same by tables, for what has no such loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, Final, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from packfmt.kernels import simd
from packfmt.kernels.blocks import COMPUTED, LOOKED_UP, WHOLE, Numbers
from packfmt.kernels.cache import njit
from packfmt.kernels.floats import VERSION, as_bfloat, store
from packfmt.kernels.places import NBYTES, Places, Scales
from packfmt.kernels.simd_code import AVX512_HERE, AVX_HERE, F32, I8, I16, I32, I64, all_lanes, call, constant, order
from packfmt.kernels.tile_code import Kernel, Typed, Writer, entry, known, part
from packfmt.kernels.vectors import ONE_EXPONENT, _wait_for_stores

LANES: Final = 16  # codes that become numbers together
WINDOW: Final = 64  # bytes from which they are gathered: a register
MOST: Final = 512  # codes of a cell that is written out
SIGN, INFINITE = 1 << 31, 0x7F800000  # of a float32
EXACT: Final = 1 << 23  # whole numbers up to twice this are float32
F4 = np.float32


class Way(NamedTuple):
    """What numbers and scales make.

    name : "times"; "divides", by the scale; "planes": the codes of a group lie one plane after the other, and a weight
        is the sum of their products; "digits": a code stands for a number of each table, and a weight is the sum of
        their products; "quads": a code stands for four weights, `stride` columns apart, of a table each
    planes : how many scales a group has
    """

    name: str = "times"
    planes: int = 1
    stride: int = 1


class Form(NamedTuple):
    """What a loop depends on. What a cell has is known to it; how many cells there are is not.

    size, codes : bytes of a cell, and its codes: a multiple of LANES
    runs, streams, digits, powers : as in `Places`
    scale : what a scale is: a key of NBYTES
    scales : of those of a cell, the bytes from the first on, those of a group side by side; cells may share one group's
    way : `Way`
    kind, values : how codes become numbers. For WHOLE, what is taken off, whether codes are signed, and the unit's
        bits; for LOOKED_UP, how many there are, and of how many tables; for COMPUTED, what `Arithmetic` says, floats by
        their bits, and then magnitudes that it does not know, each with the bits of its number
    narrow, through : bfloat16, past the cache
    """

    size: int
    codes: int
    runs: tuple[tuple[int, ...], ...]
    streams: tuple[tuple[int, ...], ...]
    digits: tuple[tuple[int, ...], ...]
    powers: tuple[int, ...]
    scale: str
    scales: tuple[int, ...]
    way: Way
    kind: int
    values: tuple[int, ...]
    narrow: bool
    through: bool
    version: str = VERSION

    def groups(self) -> int:
        """Groups of a cell; 1 if cells share one."""
        return len(self.scales) // self.way.planes

    def columns(self) -> int:
        """Weights of a cell."""
        if self.way.name == "planes":
            return self.codes // self.way.planes
        return self.codes * 4 if self.way.name == "quads" else self.codes


def loop(
    places: Places, group: int, spacing: tuple[str, int, int], way: Way, numbers: Numbers, narrow: bool, through: bool
) -> Loop | None:
    """What decodes tensors of a layout; None if no loop can be written.

    group : codes that share a scale, or the scales of their planes
    spacing : `kind`, `each` and `together` of `Scales`
    """
    form = None if simd.INTERPRETED else form_of(places, group, spacing, way, numbers, narrow, through)
    return Loop(form, numbers) if form else None


def form_of(
    places: Places, group: int, spacing: tuple[str, int, int], way: Way, numbers: Numbers, narrow: bool, through: bool
) -> Form | None:
    """The form of `loop`."""
    scale, each, count = spacing
    found = _numbers(numbers, way, narrow)
    if found is None or (group % places.codes and places.codes % group):
        return None
    if way.name == "planes" and group > places.codes:
        return None  # the planes of a weight lie in several cells
    scales = max(1, places.codes // group) * way.planes
    if scales % count and each != count * NBYTES[scale]:
        return None  # scales of a cell are not evenly apart
    runs, streams, digits = (tuple(map(tuple, t.tolist())) for t in (places.runs, places.streams, places.digits))
    powers = tuple(places.powers.tolist())
    offsets = tuple(i // count * each + i % count * NBYTES[scale] for i in range(scales))
    kind, values = found
    cell = places.size, places.codes, runs, streams, digits, powers
    form = Form(*cell, scale, offsets, way, kind, values, narrow, through)
    return form if _can_be_written(form) else None


def _numbers(numbers: Numbers, way: Way, narrow: bool) -> tuple[int, tuple[int, ...]] | None:
    """`Form.kind` and `Form.values`."""
    few, first = numbers.kind == LOOKED_UP, numbers.values[0]
    tables = len(numbers.values)
    if tables > 1 or way.name == "divides":
        return (LOOKED_UP, (len(first), tables)) if few else None
    if not (few and narrow and AVX_HERE) or way.name == "planes":  # a table can be rounded before it is looked at
        for signed in (False, True):
            if (zero := _zero(first, numbers.unit, signed)) is not None:
                return WHOLE, (zero, int(signed), int(numbers.unit.view(np.uint32)))
    if few:
        return LOOKED_UP, (len(first), 1)
    if numbers.kind != COMPUTED:
        return None
    how, bits = numbers.how, first.view(np.uint32)
    half = int(how.magnitude) + 1
    special = range(int(how.top), half)
    if any(bits[m + half] != bits[m] | SIGN for m in special):
        return None
    unit, zero_ = how.unit.view(np.uint32), how.zero.view(np.uint32)
    known_ = map(int, (how.shift, how.magnitude, how.sign, how.base, unit, zero_))
    return COMPUTED, (*known_, *(int(x) for m in special for x in (m, bits[m])))


def _zero(values: np.ndarray, unit: np.float32, signed: bool) -> int | None:
    """The whole number z for which values are float32(code - z) * unit; None if there is none."""
    codes = np.arange(len(values))
    if signed:
        codes = codes.astype(np.uint8).view(np.int8).astype(np.int64)
    with np.errstate(all="ignore"):
        zero = np.rint(codes[0] - values[0] / unit)
        if not abs(zero) < EXACT or ((codes - zero).astype(F4) * unit).tobytes() != values.tobytes():
            return None
    return int(zero)


class Piece(NamedTuple):
    """Bits of a code: bits `low` and above are those of a byte from `shift` on, under the mask; or a base-3 digit."""

    byte: int
    shift: int
    mask: int
    low: int = 0
    power: int = 0

    @property
    def last(self) -> int:
        """The last byte."""
        return self.byte + (self.mask << self.shift > 255)


def _pieces(form: Form) -> list[list[Piece]]:
    """What each code of a cell is made of."""
    found: list[list[Piece]] = [[] for _ in range(form.codes)]
    for byte, count, bits, code, low in form.streams:
        for i in range(count):
            at, shift = divmod(bits * i, 8)
            found[code + i].append(Piece(byte + at, shift, (1 << bits) - 1, low))
    for byte, count, shift, mask, code, step, low in form.runs:
        for i in range(count):
            found[code + step * i].append(Piece(byte + i, shift, mask & 255 >> shift, low))
    for byte, count, each, code in form.digits:
        for d in range(each):
            for i in range(count):
                found[code + d * count + i].append(Piece(byte + i, 0, 255, 0, form.powers[d]))
    return found


def _can_be_written(form: Form) -> bool:
    unit = LANES * (form.way.planes if form.way.name == "planes" else 1)
    if form.way.stride > 1:
        unit = form.way.stride  # a chunk of quads
    if form.codes > MOST or form.codes % (unit * form.groups()) or unit % LANES:
        return False
    cell = _pieces(form)
    for first in range(0, form.codes, LANES):
        sixteen = cell[first : first + LANES]
        if not sixteen[0] or len({len(code) for code in sixteen}) > 1:
            return False
        for alike in zip(*sixteen, strict=True):
            window = max(p.last for p in alike) - min(p.byte for p in alike) + 1
            if window > WINDOW or len({(p.mask, p.low) for p in alike}) > 1:
                return False
    return True


# ---------------------------------------------------------------- codes


class _Reader:
    """Reads a cell's bytes, each window once and all before the first number is written."""

    def __init__(self, write: Writer, data: Any, at: Any) -> None:
        self.builder, self.data, self.at = write.builder, data, at
        self.windows: dict[tuple[int, int], Any] = {}

    def codes(self, some: list[list[Piece]]) -> Any:
        """A vector of codes, a byte each."""
        total = None
        for alike in zip(*some, strict=True):
            found = self._fields(alike)
            total = self.builder.or_(total, found) if total else found
        return total

    def _fields(self, alike: Sequence[Piece]) -> Any:
        build, first, last = self.builder, min(p.byte for p in alike), max(p.last for p in alike)
        mask, low, shifts = alike[0].mask, alike[0].low, [p.shift for p in alike]
        bytes_, words = (ir.VectorType(kind, len(alike)) for kind in (I8, I16))
        window = self._window(first, last - first + 1)
        found = self._gather(window, [p.byte - first for p in alike])
        if alike[0].power:  # what lies above 256 when that is tripled
            rest = build.mul(build.zext(found, words), ir.Constant(words, [p.power for p in alike]))
            tripled = build.mul(build.and_(rest, constant(words, 255)), constant(words, 3))
            return build.trunc(build.lshr(tripled, constant(words, 8)), bytes_)
        if len(set(shifts)) > 1 or any(p.last > p.byte for p in alike):
            both = build.zext(found, words)
            if any(p.last > p.byte for p in alike):
                beside = self._gather(window, [p.last - first for p in alike])
                both = build.or_(both, build.shl(build.zext(beside, words), constant(words, 8)))
            found = build.trunc(build.lshr(both, ir.Constant(words, shifts)), bytes_)
        elif shifts[0]:
            found = build.lshr(found, constant(bytes_, shifts[0]))
        if mask < 255:
            found = build.and_(found, constant(bytes_, mask))
        return build.shl(found, constant(bytes_, low)) if low else found

    def _window(self, byte: int, count: int) -> Any:
        if (byte, count) not in self.windows:
            build = self.builder
            place = build.gep(self.data, [build.add(self.at, I64(byte))])
            kind = ir.VectorType(I8, count)
            self.windows[byte, count] = build.load(build.bitcast(place, kind.as_pointer()), align=1)
        return self.windows[byte, count]

    def _gather(self, window: Any, which: list[int]) -> Any:
        if which == list(range(window.type.count)):
            return window
        return self.builder.shuffle_vector(window, window, order(which))


# ---------------------------------------------------------------- numbers


Numbering = Callable[[Any], Any]  # a vector of codes -> what they are


def _in_table(write: Writer, form: Form, halves: list[Any]) -> Numbering:
    """What looks up in a table of 32 numbers, given as halves; floats, or the bits of bfloat16."""
    build, ints = write.builder, ir.VectorType(I32, LANES)
    low, high = halves if form.values[0] > LANES else halves[:1] * 2
    narrow = low.type.element == I16
    if _lanes(form) == 32:
        words = build.shuffle_vector(low, high, order(range(32)))

        def wide(codes: Any) -> Any:
            return call(build, "llvm.x86.avx512.permvar.hi.512", words.type, words, build.zext(codes, words.type))

        return wide
    both = [Typed(simd.Ints16, build.zext(half, ints) if narrow else build.bitcast(half, ints)) for half in (low, high)]

    def look_up(codes: Any) -> Any:
        found = write.look_up_words(*both, Typed(simd.Ints16, build.zext(codes, ints))).value
        return build.trunc(found, low.type) if narrow else build.bitcast(found, low.type)

    return look_up


def _looked_up(write: Writer, form: Form, tables: list[list[Any]]) -> Numbering:
    return _in_table(write, form, tables[0])


def _products(write: Writer, form: Form, tables: list[list[Any]], factors: list[Any]) -> list[list[Any]]:
    """Tables of what is written: all numbers are multiplied, and rounded, before one is looked up."""
    build = write.builder
    if form.way.name == "divides":
        tables = [[build.fdiv(half, factors[0]) for half in table] for table in tables]
    elif form.way.name == "digits":
        total = [build.fmul(half, factors[0]) for half in tables[0]]
        for table, factor in zip(tables[1:], factors[1:], strict=True):
            total = [build.fadd(sum_, build.fmul(half, factor)) for sum_, half in zip(total, table, strict=True)]
        tables = [total]
    else:
        tables = [[build.fmul(half, factors[0]) for half in table] for table in tables]
    return [[_finished(write, form, half) for half in table] for table in tables]


def _whole(write: Writer, form: Form, tables: list[list[Any]]) -> Numbering:
    build, (zero, signed, unit) = write.builder, form.values
    ints, real = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
    unit_ = _float(unit)
    few = not signed and 0 < zero <= 128 and _largest(form) - zero < 128  # then bytes hold the difference

    def whole(codes: Any) -> Any:
        if few:
            steps = build.sext(build.sub(codes, constant(codes.type, zero)), ints)
        else:
            wide = build.sext(codes, ints) if signed else build.zext(codes, ints)
            steps = build.sub(wide, constant(ints, zero)) if zero else wide
        number = build.sitofp(steps, real)
        return number if unit_ == 1 else build.fmul(number, constant(real, unit_))

    return whole


def _computed(write: Writer, form: Form, tables: list[list[Any]]) -> Numbering:
    """By `Arithmetic`; the magnitudes that it does not know are compared with."""
    build, (shift, magnitude, sign, base, unit, zero, *special) = write.builder, form.values
    ints, real = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
    unit_, zero_ = _float(unit), _float(zero)

    def compute(codes: Any) -> Any:
        code = build.zext(codes, ints)
        size = build.and_(code, constant(ints, magnitude))
        bits = build.shl(size, constant(ints, shift))
        normal = build.add(bits, constant(ints, base))
        one_more = build.bitcast(build.add(normal, constant(ints, int(ONE_EXPONENT))), real)
        few = build.bitcast(build.fsub(one_more, constant(real, unit_)), ints)
        found = build.select(build.icmp_unsigned("<", bits, constant(ints, int(ONE_EXPONENT))), few, normal)
        for which, number in zip(special[::2], special[1::2], strict=True):
            found = build.select(build.icmp_unsigned("==", size, constant(ints, which)), constant(ints, number), found)
        signs = build.and_(build.shl(code, constant(ints, sign)), constant(ints, SIGN))
        return build.fadd(build.bitcast(build.or_(found, signs), real), constant(real, zero_))

    return compute


def _float(bits: int) -> float:
    return float(np.uint32(bits).view(F4))


NUMBERINGS: Final = {LOOKED_UP: _looked_up, WHOLE: _whole, COMPUTED: _computed}


def _finished(write: Writer, form: Form, numbers: Any) -> Any:
    """What is written for a vector of float32."""
    return as_bfloat(write.builder, numbers) if form.narrow else numbers


def _largest(form: Form) -> int:
    """The largest code."""
    return max(2 if code[0].power else sum(p.mask << p.low for p in code) for code in _pieces(form))


def _lanes(form: Form) -> int:
    """Codes of a vector: 32 where one instruction looks them up."""
    few = form.narrow and form.kind == LOOKED_UP and form.way.name not in ("planes", "quads")
    return 32 if few and form.codes // form.groups() % 32 == 0 and AVX512_HERE else LANES


# ---------------------------------------------------------------- the loop


def _data(write: Writer, array: Typed) -> Any:
    return write.context.make_array(array.kind)(write.context, write.builder, array.value).data


@part(lambda form: types.UniTuple(types.float32, len(form.scales)))
def _factors(write, form, stored, at, table):
    """The scales of a cell, or the one of several."""
    build, found = write.builder, []
    for beyond in form.scales:
        here = build.gep(_data(write, stored), [write.plus(at, beyond).value])
        if form.scale == "table":
            number = build.load(build.gep(_data(write, table), [build.zext(build.load(here), I64)]))
        elif form.scale == "<f4":
            number = build.load(build.bitcast(here, F32.as_pointer()), align=1)
        else:
            bits = build.load(build.bitcast(here, I16.as_pointer()), align=1)
            shorts = Typed(simd.Shorts16, all_lanes(build, bits, LANES))
            wide = write.half_to_float(shorts) if form.scale == "<f2" else write.bfloat_to_float(shorts)
            number = build.extract_element(wide.value, I32(0))
        found.append(Typed(types.float32, number))
    return found


@part(lambda form: types.boolean)
def _clear(write, form, factors):
    """Whether it is clear which NaN a weight is: codes and scales, or two scales, are not both none."""
    build, good = write.builder, ir.Constant(ir.IntType(1), 1)
    no_numbers = form.kind == COMPUTED and any(bits & ~SIGN > INFINITE for bits in form.values[7::2])
    if no_numbers or form.way.planes > 1:
        for factor in write.unpack(factors):
            good = build.and_(good, build.fcmp_ordered("ord", factor.value, factor.value))
    return Typed(types.boolean, good)


@part(lambda form: types.UniTuple(simd.Floats16, 2 * _tables_of(form)))
def _tables(write, form, numbers):
    """The halves of all tables."""
    return [write.load_floats16(numbers, write.index(64 * half)) for half in range(2 * _tables_of(form))]


def _tables_of(form: Form) -> int:
    return form.values[1] if form.kind == LOOKED_UP else 1


@part(lambda form: types.void)
def _cell(write, form, records, at, factors, tables, out, column):
    """Decode one cell."""
    build, lanes, cell = write.builder, _lanes(form), _pieces(form)
    reader = _Reader(write, _data(write, records), at.value)
    codes = [reader.codes(cell[first : first + lanes]) for first in range(0, form.codes, lanes)]
    every = [all_lanes(build, factor.value, LANES) for factor in write.unpack(factors)]
    halves = [table.value for table in write.unpack(tables)]
    pairs = [halves[i : i + 2] for i in range(0, len(halves), 2)]
    each, target = len(codes) // form.groups(), _data(write, out)

    def put(found: Any, beyond: int) -> None:
        store(build, found, build.gep(target, [write.plus(column, beyond).value]), form.through)

    for group in range(form.groups()):
        mine, first = codes[group * each : (group + 1) * each], form.columns() // form.groups() * group
        scales = every[group * form.way.planes : (group + 1) * form.way.planes]
        for beyond, found in _weights(write, form, mine, scales, pairs):
            put(found, first + beyond)


def _weights(
    write: Writer, form: Form, codes: list[Any], factors: list[Any], tables: list[list[Any]]
) -> Iterator[tuple[int, Any]]:
    """What is written for the codes of a group: column, vector."""
    build, lanes, name = write.builder, _lanes(form), form.way.name
    if name == "quads":
        finders = [_in_table(write, form, table) for table in _products(write, form, tables, factors)]
        for j, code in enumerate(codes):
            yield from _four(build, [find(code) for find in finders], LANES * j, form.way.stride)
    elif name == "planes":
        numbers_of, count = NUMBERINGS[form.kind](write, form, tables), len(codes) // len(factors)
        for j in range(count):
            products = [build.fmul(numbers_of(c), f) for c, f in zip(codes[j::count], factors, strict=True)]
            yield lanes * j, _finished(write, form, reduce(build.fadd, products))
    elif form.kind == LOOKED_UP:
        (table,) = _products(write, form, tables, factors)
        find = _in_table(write, form, table)
        for j, code in enumerate(codes):
            yield lanes * j, find(code)
    else:
        numbers_of = NUMBERINGS[form.kind](write, form, tables)
        for j, code in enumerate(codes):
            yield lanes * j, _finished(write, form, build.fmul(numbers_of(code), factors[0]))


def _four(build: Any, found: list[Any], quad: int, stride: int) -> Iterator[tuple[int, Any]]:
    """The four weights of sixteen quads, from that number on: column, vector."""
    if stride == 1:
        halves = [build.shuffle_vector(x, y, order(range(32))) for x, y in (found[:2], found[2:])]
        side_by_side = order([lane + LANES * which for lane in range(LANES) for which in range(4)])
        yield 4 * quad, build.shuffle_vector(*halves, side_by_side)
    else:
        for lane, vector in enumerate(found):
            yield 4 * quad - 3 * (quad % stride) + lane * stride, vector


_size, _columns = known(lambda form: form.size), known(lambda form: form.columns())
_scales, _planes = known(lambda form: len(form.scales)), known(lambda form: form.way.planes)
_through = known(lambda form: int(form.through))


@njit(cache=True, nogil=True)
def _decode(kernel, records, scales, table, numbers, lies, first, out):
    """As `Loop.__call__`. lies : each, together, offset and share of `Scales`"""
    each, count, offset, share = lies
    tables, clear, together = _tables(kernel, numbers), True, _scales(kernel)
    cols, columns = out.shape[1], _columns(kernel)
    cells = max(1, cols // (scales.shape[1] // each * count // _planes(kernel)) // columns)  # that share scales
    step = together // count * each if together >= count else each // count
    for row in range(out.shape[0]):
        at, column, end = row * records.shape[1], row * cols, row * cols + cols
        scale_at = (first + row) // share * scales.shape[1] + offset
        while column < end:
            factors = _factors(kernel, scales, scale_at, table)
            clear = clear and _clear(kernel, factors)
            for _ in range(cells):
                _cell(kernel, records, at, factors, tables, out, column)
                at += _size(kernel)
                column += columns
            scale_at += step
    if _through(kernel):
        _wait_for_stores()
    return clear


class Loop:
    """The loop of one form, for numbers that it was made for."""

    def __init__(self, form: Form, numbers: Numbers) -> None:
        self.form, self._kernel = form, Kernel(form)
        rows = types.Array(types.uint8, 2, "C")
        real, out = types.Array(types.float32, 1, "C"), types.uint16 if form.narrow else types.float32
        kinds = rows, rows, real, real, types.UniTuple(types.int64, 4), types.int64, types.Array(out, 2, "C")
        self._decode: Callable[..., Any] = entry(_decode, self._kernel._numba_type_, *kinds)
        self._numbers = np.stack([np.resize(table, 2 * LANES) for table in numbers.values]).astype(F4).reshape(-1)

    def __call__(
        self, records: np.ndarray, stored: np.ndarray, scales: Scales, out: np.ndarray, first: int = 0
    ) -> bool:
        """Decode rows, on one thread.

        Parameters
        ----------
        records : (rows, bytes) uint8, C-contiguous
        stored, scales : (rows of scales, bytes) uint8, C-contiguous, and where scales lie there
        out : (rows, cols) float32, or uint16, the bits of bfloat16; C-contiguous, written
        first : the row of those that share scales with which `records` begin

        Returns
        -------
        clear : False if codes that are no number may meet a scale that is none, or scales of planes are none: which of
            two NaNs a product or a sum is, is the processor's choice
        """
        _, *lies, table = scales
        return bool(self._decode(self._kernel, records, stored, table, self._numbers, tuple(lies), first, out))
