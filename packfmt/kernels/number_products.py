"""Products of activations with weights that are numbers of any kind, in float32 and in one fixed order.

Lane l of 64 sums columns l, l + 64, l + 128 ... from +0 on: s = s + (w * x), product and sum rounding apart. Then
lanes fold, s[l] + s[l + 32] first, then + 16, + 8, + 4, + 2, + 1. So the bits do not depend on the batch, on threads,
or on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, models, overload, register_model, typeof_impl

from packfmt.errors import LayoutError
from packfmt.kernels import pages, simd, simd_code, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    as_ints,
    bfloat_to_float,
    half_to_float,
    mulf,
    or_,
    same_byte,
    same_float,
    same_int,
    select_less,
    zero_floats,
)

F32 = np.float32
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

LANES = 64  # of a sum
VECTOR = 64  # bytes of sixteen of them
MANY = {4: 8, 2: 4, 1: 4}  # rows of activations; by bytes of a weight
TALL = 4  # rows of a panel
PANELS = 4  # that activations meet one after the other
DEEP = 16  # times 64 columns, of which sums are taken before the next rows' turn
STRIP = 1 << 17  # weights decoded at a time, which stay in a core's cache
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}  # of a weight
LEAST_BYTES = 1 << 19  # of weights, times the batch: worth a thread
TOP_BITS = np.uint32(0x80808080)  # of four bytes
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
# Columns of 64 in the order of lanes: one after the other, or even and odd ones of each half.
IN_ORDER = np.arange(LANES, dtype=np.int32)
EVEN_AND_ODD = np.ascontiguousarray(IN_ORDER.reshape(2, 16, 2).swapaxes(1, 2)).reshape(-1)


class Kind(NamedTuple):
    """What the loops are compiled for.

    dtype : of the weights, in NumPy's or ml_dtypes' words
    scaled : columns that share a scale are a multiple of these, 64 or 32; 0: there are no scales
    many : whether there are so many rows of activations that numbers are kept for them
    """

    dtype: str
    scaled: int
    many: bool


# ---------------------------------------------------------------- a value without content that stands for a kind


class Marker:
    """Stands in the closure of a loop, where it is part of the key under which compiled code is kept."""

    def __init__(self, kind: Kind, version: str = simd.VERSION) -> None:
        self.kind, self.version = kind, version

    def __reduce__(self) -> tuple[Any, ...]:
        return Marker, (self.kind, self.version)


class MarkerType(types.Type):
    """Its name is part of the key, too, for the functions that take one."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        super().__init__(name=f"Marker({tuple(kind)}, {simd.VERSION})")


register_model(MarkerType)(models.OpaqueModel)


@typeof_impl.register(Marker)
def _typeof(value: Marker, _context: Any) -> MarkerType:
    return MarkerType(value.kind)


@lower_constant(MarkerType)
def _constant(context: Any, _builder: Any, _kind: MarkerType, _value: Marker) -> Any:
    return context.get_dummy_value()


# ---------------------------------------------------------------- doors


def multiply(
    weights: Array, x: Floats, out: Floats, scale: Floats | None = None, share: tuple[int, int] = (1, 0)
) -> None:
    """The product of every row of weights with every row of x, on all threads.

    Parameters
    ----------
    weights : (rows, cols) float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, C-contiguous
    x : (batch, cols) float32, C-contiguous
    out : (batch, rows) float32, written
    scale : float32, C-contiguous, of bytes; a weight is number * scale, rounded to float32. Default: there are none
    share : rows and columns that share a scale, columns a multiple of 32; 0: all

    Raises
    ------
    LayoutError
        If an array is another than this.
    """
    rows, cols = weights.shape
    name = weights.dtype.name
    if name not in BYTES or not weights.flags.c_contiguous:
        raise LayoutError(f"weights {name} {weights.shape}, needs C-contiguous {', '.join(BYTES)}")
    _check(x, out, rows, cols)
    tall, wide = share[0] or max(1, rows), share[1] or max(1, cols)
    if scale is None:
        scale, scaled = NO_SCALE, 0
    else:
        shape = -(-rows // tall), -(-cols // wide)
        if scale.shape != shape or scale.dtype != F32 or not scale.flags.c_contiguous:
            raise LayoutError(f"scales {scale.dtype} {scale.shape}, needs C-contiguous float32 {shape}")
        if name not in (E4M3, E5M2):
            raise LayoutError(f"weights {name} have no scales, only {E4M3}, {E5M2} do")
        if shape[1] > 1 and wide % 32:
            raise LayoutError(f"{wide} columns share a scale, needs a multiple of 32")
        scaled = LANES if shape[1] <= 1 or wide % LANES == 0 else 32
    wide = wide if scaled else max(1, cols)
    if not out.size or not cols:
        out[...] = 0
        return
    if simd.INTERPRETED:
        return _plainly(weights, x, out, scale if scaled else None, tall, wide)
    kind = Kind(name, scaled, len(x) >= MANY[BYTES[name]])
    codes = weights.reshape(-1).view(np.uint8)
    factors = scale, tall, wide
    x = _in_lanes(kind, x)

    def work(start: int, stop: int) -> None:
        _some(kind, codes, cols, x, out, factors, start, stop, 0)

    threads.spread(work, rows, -(-LEAST_BYTES // max(1, codes.nbytes // rows * len(out))))


def multiply_strips(read: Callable[[int, int], Floats], x: Floats, out: Floats, least: int = 1) -> None:
    """`multiply` with weights that are decoded as they are needed, a strip of rows at a time, on all threads.

    Parameters
    ----------
    read : first row, end -> (rows, cols) float32, C-contiguous; called by several threads at once, for other rows
    x : (batch, cols) float32, C-contiguous
    out : (batch, rows) float32, written
    least : rows to read at a time must be a multiple of this, but for the last ones

    Raises
    ------
    LayoutError
        If an array is another than this.
    """
    rows, cols = out.shape[1], x.shape[1]
    _check(x, out, rows, cols)
    if not out.size or not cols:
        out[...] = 0
        return
    kind, factors = Kind("float32", 0, len(x) >= MANY[4]), (NO_SCALE, 1, max(1, cols))
    arranged = x if simd.INTERPRETED else _in_lanes(kind, x)
    step = least * max(1, STRIP // max(1, cols * least))

    def work(start: int, stop: int) -> None:
        for strip in range(start, stop):
            first, end = strip * step, min(rows, (strip + 1) * step)
            weights = read(first, end)
            if weights.shape != (end - first, cols) or weights.dtype != F32 or not weights.flags.c_contiguous:
                needs = end - first, cols
                raise LayoutError(f"weights {weights.dtype} {weights.shape}, needs C-contiguous float32 {needs}")
            if simd.INTERPRETED:
                some = np.empty((len(x), end - first), F32)
                _plainly(weights, x, some, None, 1, 1)
                out[:, first:end] = some
            else:
                codes = weights.reshape(-1).view(np.uint8)
                _some(kind, codes, cols, arranged, out, factors, 0, end - first, first)

    threads.spread(work, -(-rows // step))


NO_SCALE = np.empty((0, 0), F32)


def _check(x: Floats, out: Floats, rows: int, cols: int) -> None:
    for what, array, shape in (("activations", x, (len(x), cols)), ("out", out, (len(x), rows))):
        if array.shape != shape or array.dtype != F32 or not array.flags.c_contiguous:
            raise LayoutError(f"{what} {array.dtype} {array.shape}, needs C-contiguous float32 {shape}")


def _mixed(kind: Kind) -> bool:
    """Whether lanes are in the order of `EVEN_AND_ODD`."""
    return kind.dtype in (E4M3, E5M2)


def _in_lanes(kind: Kind, x: Floats) -> Floats:
    """Activations in the order in which the loops read them, filled up with zeros.

    (batch, columns), or for many (4, pairs, columns / 64, 2, 16): 16 lanes of two rows, then their next.
    """
    batch, cols = x.shape
    rows, chunks = batch + batch % 2 if kind.many else batch, -(-cols // LANES)
    if (rows, chunks * LANES) != x.shape:
        x = np.pad(x, ((0, rows - batch), (0, chunks * LANES - cols)))
    parts = x.reshape(rows, chunks, 2, 16, 2).swapaxes(3, 4) if _mixed(kind) else x
    if not kind.many:
        out = pages.empty(x.nbytes).view(F32).reshape(x.shape)
        out.reshape(parts.shape)[...] = parts
        return out
    apart = 4, rows // 2, chunks + 1, 2, 16  # no power of two, or lines would drive each other from the cache
    out = pages.empty(4 * prod(apart)).view(F32).reshape(apart)
    out[:, :, :chunks] = parts.reshape(rows // 2, 2, chunks, 4, 16).transpose(3, 0, 2, 1, 4)
    return out


def _some(kind, codes, cols, x, out, factors, start, stop, shift):
    """Rows start to stop of the weights, which are those from start + shift on of the product."""
    scale, tall, wide = factors
    places = EVEN_AND_ODD if _mixed(kind) else IN_ORDER
    room = np.zeros(4 * LANES * 4, np.uint8)
    weights = codes.ctypes.data, cols
    how = scale.ctypes.data, max(1, scale.shape[1]), tall, wide, places.ctypes.data, room.ctypes.data
    if kind.many:
        pairs, chunks = x.shape[1], x.shape[2]
        panels = min(PANELS, -(-(stop - start) // TALL))
        numbers = pages.empty(panels * 4 * (min(DEEP, chunks) + 1) * TALL * VECTOR)
        sums = pages.empty(panels * pairs * 32 * VECTOR)
        rooms = numbers.ctypes.data, sums.ctypes.data, np.empty(16, F32)
        _many(kind)(*weights, x.ctypes.data, pairs, out, *how, *rooms, start, stop, shift)
    else:
        _few(kind)(*weights, x.ctypes.data, out, *how, start, stop, shift)


def _plainly(weights, x, out, scale, tall, wide):
    """`multiply` in NumPy, to the same bits."""
    rows, cols = weights.shape
    numbers = weights.astype(F32)
    with np.errstate(all="ignore"):
        if scale is not None:
            numbers *= np.repeat(np.repeat(scale, tall, 0)[:rows], wide, 1)[:, :cols]
        for b, activations in enumerate(x):
            products = numbers * activations
            sums = np.zeros((rows, LANES), F32)
            for at in range(0, cols, LANES):
                few = products[:, at : at + LANES]
                sums[:, : few.shape[1]] += few
            half = LANES // 2
            while half:
                sums = sums[:, :half] + sums[:, half:]
                half //= 2
            out[b] = sums[:, 0]


# ---------------------------------------------------------------- memory
# The loops get addresses: a function that takes an array counts its references, which takes as long as it has work.


def _loads(what: simd.Vector) -> Any:
    """What reads a vector at an address."""

    def load(typing, address):
        def code(context, builder, signature, args):
            found = builder.load(builder.inttoptr(args[0], what.llvm.as_pointer()))
            found.align = 1
            return found

        return what(types.int64), code

    return intrinsic(load)


_bytes, _shorts, _ints, _floats = (_loads(v) for v in (simd.Bytes64, simd.Shorts16, simd.Ints16, simd.Floats16))


@intrinsic
def _put(typing, address, vector):
    """Write a vector."""

    def code(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, vector), code


@intrinsic
def _number(typing, address):
    """A float32."""

    def code(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], simd_code.F32.as_pointer()))

    return types.float32(types.int64), code


@intrinsic
def _byte(typing, address):
    def code(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], simd_code.I8.as_pointer()))

    return types.uint8(types.int64), code


@intrinsic
def _copy(typing, to, source, nbytes):
    def code(context, builder, signature, args):
        places = (builder.inttoptr(address, simd_code.I8.as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(builder, *places, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def _ask_for(typing, address, marker):
    """Prefetch 64 weights."""
    size = BYTES[marker.kind.dtype]

    def code(context, builder, signature, args):
        for line in range(0, LANES * size, VECTOR):
            place = builder.inttoptr(builder.add(args[0], simd_code.I64(line)), simd_code.I8.as_pointer())
            how = (simd_code.I32(n) for n in (0, 3, 1))  # a read, near, of data
            simd_code.call(builder, "llvm.prefetch.p0", ir.VoidType(), place, *how)
        return context.get_dummy_value()

    return types.void(types.int64, marker), code


# ---------------------------------------------------------------- pieces of the loops


@intrinsic
def _folded(typing, v):
    """Sixteen lanes to one number: s[l] + s[l + 8], then + 4, + 2, + 1."""

    def code(context, builder, signature, args):
        (sums,) = args
        for half in (8, 4, 2, 1):
            order = [ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(a, a + half))) for a in (0, half)]
            low, high = (builder.shuffle_vector(sums, sums, part) for part in order)
            sums = builder.fadd(low, high)
        return builder.extract_element(sums, ir.Constant(ir.IntType(32), 0))

    return types.float32(simd.Floats16), code


@intrinsic
def _eight_sums(typing, at, marker):
    """The sums of four rows of weights and two of activations: lane 4 * b + r has row r of the weights and b of x.

    at : where (4 quarters, 4 rows, 2, 16) lanes begin; lanes fold as in `_sum`
    """
    lanes = simd.Floats16.llvm

    def folded(builder, found):
        for half in (8, 4, 2):  # two vectors become one, which has half as many lanes of each sum
            starts = range(0, 32, 2 * half)
            low, high = (simd_code.order([s + a + i for s in starts for i in range(half)]) for a in (0, half))
            found = [
                builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high))
                for a, b in zip(found[::2], found[1::2], strict=True)
            ]
        low, high = (simd_code.order([*range(a, 16, 2)] * 2) for a in (0, 1))
        return builder.fadd(*(builder.shuffle_vector(found[0], found[0], part) for part in (low, high)))

    def code(context, builder, signature, args):
        def quarter(q, r, b):
            byte = simd_code.I64(((q * TALL + r) * 2 + b) * VECTOR)
            found = builder.load(builder.inttoptr(builder.add(args[0], byte), lanes.as_pointer()))
            found.align = 4
            return found

        each = [(r, b) for b in range(2) for r in range(TALL)]
        first, second = ([builder.fadd(quarter(q, *i), quarter(q + 2, *i)) for i in each] for q in (0, 1))
        if _mixed(marker.kind):
            return builder.fadd(folded(builder, first), folded(builder, second))
        return folded(builder, [builder.fadd(a, b) for a, b in zip(first, second, strict=True)])

    return simd.Floats16(types.int64, marker), code


@intrinsic
def _any_bits(typing, v):
    """The bits that any lane has."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [args[0].type])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.or.v16i32"), args)

    return types.uint32(simd.Ints16), code


@intrinsic
def _halves(typing, v, kind):
    """64 codes of 8 bits as float16, in the order of the lanes of `_in_lanes`: UniTuple(Shorts16, 4).

    float8_e5m2 is the upper half of float16. float8_e4m3fn has its exponent's bits one place lower, and is 256 times
    what float16 makes of them; its NaN looks like 480.
    """
    e4m3 = kind.kind.dtype == E4M3

    def code(context, builder, signature, args):
        words = ir.VectorType(ir.IntType(16), 32)

        def same(number: int) -> Any:
            return ir.Constant(words, [number] * 32)

        odd = builder.bitcast(args[0], words)
        even = builder.shl(odd, same(8))
        if e4m3:
            even, odd = (builder.and_(builder.ashr(each, same(1)), same(0xBF80)) for each in (even, odd))
        else:
            odd = builder.and_(odd, same(0xFF00))
        parts = [[ir.Constant(ir.IntType(32), lane) for lane in range(a, a + 16)] for a in (0, 16)]
        cut = [ir.Constant(ir.VectorType(ir.IntType(32), 16), part) for part in parts]
        out = [builder.shuffle_vector(each, each, part) for part in cut for each in (even, odd)]
        return context.make_tuple(builder, signature.return_type, out)

    return types.UniTuple(simd.Shorts16, 4)(simd.Bytes64, kind), code


def _numbers(marker, at):
    """64 weights as float32, in four vectors."""


@overload(_numbers)
def _numbers_of(marker, at):
    name, eight = marker.kind.dtype, F32(256)

    def e5m2(marker, at):
        a, b, c, d = _halves(_bytes(at), marker)
        return half_to_float(a), half_to_float(b), half_to_float(c), half_to_float(d)

    def e4m3(marker, at):
        a, b, c, d = _halves(_bytes(at), marker)
        more = same_float(eight)
        return (
            mulf(half_to_float(a), more),
            mulf(half_to_float(b), more),
            mulf(half_to_float(c), more),
            mulf(half_to_float(d), more),
        )

    def four(marker, at):
        step = size_of_sixteen
        return (
            _sixteen(marker, at),
            _sixteen(marker, at + step),
            _sixteen(marker, at + 2 * step),
            _sixteen(marker, at + 3 * step),
        )

    size_of_sixteen = 16 * BYTES[name]
    return {E4M3: e4m3, E5M2: e5m2}.get(name, four)


def _sixteen(marker, at):
    """Sixteen weights as float32."""


@overload(_sixteen)
def _sixteen_of(marker, at):
    return {
        "float32": lambda marker, at: _floats(at),
        "bfloat16": lambda marker, at: bfloat_to_float(_shorts(at)),
        "float16": lambda marker, at: half_to_float(_shorts(at)),
    }[marker.kind.dtype]


def _factor(marker, scale, group):
    """The scale of 64 columns or more. scale : where a row's begin"""


@overload(_factor)
def _factor_of(marker, scale, group):
    if marker.kind.scaled == LANES:
        return lambda marker, scale, group: same_float(_number(scale + 4 * group))
    return lambda marker, scale, group: zero_floats()


def _weights(marker, at, factor, scale, groups, column, wide):
    """64 weights from a column on, times their scales."""


@overload(_weights)
def _weights_of(marker, at, factor, scale, groups, column, wide):
    if not marker.kind.scaled:
        return lambda marker, at, factor, scale, groups, column, wide: _numbers(marker, at)
    if marker.kind.scaled == LANES:

        def times_one(marker, at, factor, scale, groups, column, wide):
            a, b, c, d = _numbers(marker, at)
            return mulf(a, factor), mulf(b, factor), mulf(c, factor), mulf(d, factor)

        return times_one

    def times_two(marker, at, factor, scale, groups, column, wide):
        second = min((column + 32) // wide, groups - 1)  # beyond which the last 64 columns may reach
        low, high = same_float(_number(scale + 4 * (column // wide))), same_float(_number(scale + 4 * second))
        a, b, c, d = _numbers(marker, at)
        return mulf(a, low), mulf(b, low), mulf(c, high), mulf(d, high)

    return times_two


def _sum(marker, sums):
    """All lanes: l and l + 32 first."""


@overload(_sum)
def _sum_of(marker, sums):
    if _mixed(marker.kind):

        def even_and_odd(marker, sums):
            return _folded(addf(sums[0], sums[2])) + _folded(addf(sums[1], sums[3]))

        return even_and_odd

    def one_after_the_other(marker, sums):
        return _folded(addf(addf(sums[0], sums[2]), addf(sums[1], sums[3])))

    return one_after_the_other


def _none_among(marker, at, cols):
    """Whether a weight of a row is NaN, and no vector shows it."""


@overload(_none_among)
def _none_among_of(marker, at, cols):
    if marker.kind.dtype != E4M3:
        return lambda marker, at, cols: False

    def look(marker, at, cols):
        magnitude, one, found = same_byte(np.uint8(0x7F)), same_byte(np.uint8(1)), same_byte(np.uint8(0))
        for i in range(at, at + cols // LANES * LANES, LANES):  # what 1 more brings to the top bit is 0x7f
            found = or_(found, add(and_(_bytes(i), magnitude), one))
        top = _any_bits(as_ints(found)) & TOP_BITS
        for i in range(at + cols // LANES * LANES, at + cols):
            top |= np.uint32(_byte(i) & np.uint8(0x7F) == np.uint8(0x7F))
        return top != 0

    return look


@njit(cache=True, nogil=True)
def _nothing():
    return zero_floats(), zero_floats(), zero_floats(), zero_floats()


@njit(cache=True, nogil=True)
def _apart(at, step):
    """Four vectors, so many bytes from one to the next."""
    return _floats(at), _floats(at + step), _floats(at + 2 * step), _floats(at + 3 * step)


@njit(cache=True, nogil=True)
def _put_apart(at, step, four):
    _put(at, four[0])
    _put(at + step, four[1])
    _put(at + 2 * step, four[2])
    _put(at + 3 * step, four[3])


@njit(cache=True, nogil=True)
def _add(sums, w, x):
    """Four vectors of sums, and four products."""
    return (
        addf(sums[0], mulf(w[0], x[0])),
        addf(sums[1], mulf(w[1], x[1])),
        addf(sums[2], mulf(w[2], x[2])),
        addf(sums[3], mulf(w[3], x[3])),
    )


@njit(cache=True, nogil=True)
def _below(places, end, more, sums):
    """The lanes of the first `end` columns of the one, and others of the other."""
    return (
        select_less(_ints(places), end, more[0], sums[0]),
        select_less(_ints(places + VECTOR), end, more[1], sums[1]),
        select_less(_ints(places + 2 * VECTOR), end, more[2], sums[2]),
        select_less(_ints(places + 3 * VECTOR), end, more[3], sums[3]),
    )


# ---------------------------------------------------------------- few rows of activations


def _few_of(kind: Kind) -> Any:
    """The loop for few rows of activations, which meet weights as they come."""
    marker, size = Marker(kind), BYTES[kind.dtype]

    @njit(cache=True, nogil=True)
    def _multiply_few(codes, cols, x, out, scale, groups, tall, wide, places, room, start, stop, shift):
        """Four rows at a time, with one of activations after the other; the last row may be there twice.

        x : (batch, whole chunks of 64 columns). The last weights of a row, fewer than 64, are copied to `room`.
        """
        few = cols % LANES
        whole, there, step = cols - few, same_int(np.int32(few)), LANES * size
        for r0 in range(start, stop, 4):
            r1, r2, r3 = min(r0 + 1, stop - 1), min(r0 + 2, stop - 1), min(r0 + 3, stop - 1)
            s0, s1 = scale + r0 // tall * groups * 4, scale + r1 // tall * groups * 4
            s2, s3 = scale + r2 // tall * groups * 4, scale + r3 // tall * groups * 4
            for m in range(out.shape[0]):
                to = x + m * ((cols + LANES - 1) // LANES) * LANES * 4
                i0, i1 = codes + r0 * cols * size, codes + r1 * cols * size
                i2, i3 = codes + r2 * cols * size, codes + r3 * cols * size
                a, b, c, d = _nothing(), _nothing(), _nothing(), _nothing()
                f0, f1, f2, f3 = zero_floats(), zero_floats(), zero_floats(), zero_floats()
                group, end = 0, 0
                for column in range(0, cols, LANES):
                    if column == end:
                        f0, f1 = _factor(marker, s0, group), _factor(marker, s1, group)
                        f2, f3 = _factor(marker, s2, group), _factor(marker, s3, group)
                        group, end = group + 1, end + wide
                    if column == whole:
                        _copy(room, i0, few * size)
                        _copy(room + step, i1, few * size)
                        _copy(room + 2 * step, i2, few * size)
                        _copy(room + 3 * step, i3, few * size)
                        i0, i1, i2, i3 = room, room + step, room + 2 * step, room + 3 * step
                    here = _apart(to + 4 * column, VECTOR)
                    e = _add(a, _weights(marker, i0, f0, s0, groups, column, wide), here)
                    f = _add(b, _weights(marker, i1, f1, s1, groups, column, wide), here)
                    g = _add(c, _weights(marker, i2, f2, s2, groups, column, wide), here)
                    h = _add(d, _weights(marker, i3, f3, s3, groups, column, wide), here)
                    if column == whole:
                        e, f = _below(places, there, e, a), _below(places, there, f, b)
                        g, h = _below(places, there, g, c), _below(places, there, h, d)
                    a, b, c, d = e, f, g, h
                    if size == 1:  # of the next four rows
                        _ask_for(i0 + 4 * cols, marker)
                        _ask_for(i1 + 4 * cols, marker)
                        _ask_for(i2 + 4 * cols, marker)
                        _ask_for(i3 + 4 * cols, marker)
                    i0, i1, i2, i3 = i0 + step, i1 + step, i2 + step, i3 + step
                out[m, r0 + shift], out[m, r1 + shift] = _sum(marker, a), _sum(marker, b)
                out[m, r2 + shift], out[m, r3 + shift] = _sum(marker, c), _sum(marker, d)
            for row in range(r0, r3 + 1):
                if _none_among(marker, codes + row * cols, cols):
                    out[:, row + shift] = np.nan

    return _multiply_few


_few = cache(_few_of)

# ---------------------------------------------------------------- many rows of activations


@njit(cache=True, nogil=True)
def _two_apart(at, then):
    """Two vectors at each of two places."""
    return _floats(at), _floats(at + VECTOR), _floats(then), _floats(then + VECTOR)


@njit(cache=True, nogil=True)
def _put_two_apart(at, then, four):
    _put(at, four[0])
    _put(at + VECTOR, four[1])
    _put(then, four[2])
    _put(then + VECTOR, four[3])


@njit(cache=True, nogil=True)
def _first_four(marker, size, at, columns, factors, rest, numbers, x, sums, far):
    """One row of weights with the first four of activations. Numbers are written to their panel for the others.

    at : where weights begin, from the first column on, of `size` bytes each
    columns : the first, the last, and how many there are at all
    factors : where the row's scales begin, how many there are, and columns that share one
    rest : what the last columns take: their places, and room to copy weights to
    numbers : where the row begins in its panel, and bytes from quarter to quarter
    x : where two pairs begin, and bytes from quarter to quarter
    sums : likewise, and whether they begin at 0
    far : bytes from a row's weights to those to ask for
    """
    first, last, cols = columns
    scale, groups, wide = factors
    to, quarter = numbers
    i, j, apart = x
    low, high, eight, begins = sums
    column, group = first, first // wide
    end, factor = group * wide, zero_floats()
    a, b, c, d = _nothing(), _nothing(), _nothing(), _nothing()
    if not begins:
        a, b, c, d = _apart(low, eight), _apart(low + VECTOR, eight), _apart(high, eight), _apart(high + VECTOR, eight)
    while column < last:
        if column >= end:
            factor = _factor(marker, scale, group)
            group, end = group + 1, end + wide
        _ask_for(at + far, marker)
        if column + LANES > cols:  # others are zeros, which add nothing, even where a scale is infinite
            _copy(rest[1], at, (cols - column) * size)
            w = _weights(marker, rest[1], factor, scale, groups, column, wide)
            w = _below(rest[0], same_int(np.int32(cols - column)), w, _nothing())
        else:
            w = _weights(marker, at, factor, scale, groups, column, wide)
        _put_apart(to, quarter, w)
        a, b = _add(a, w, _apart(i, apart)), _add(b, w, _apart(i + VECTOR, apart))
        c, d = _add(c, w, _apart(j, apart)), _add(d, w, _apart(j + VECTOR, apart))
        column, at, to, i, j = column + LANES, at + LANES * size, to + TALL * VECTOR, i + 2 * VECTOR, j + 2 * VECTOR
    _put_apart(low, eight, a)
    _put_apart(low + VECTOR, eight, b)
    _put_apart(high, eight, c)
    _put_apart(high + VECTOR, eight, d)


@njit(cache=True, nogil=True)
def _four(w, x, then, deep, low, high, begins):
    """Four rows of weights with four of activations: sixteen lanes of each, `deep` times.

    w : where a quarter of the rows begins; x, then : two pairs of activations; low, high : their sums
    begins : whether sums begin at 0
    """
    a, b, c, d = _nothing(), _nothing(), _nothing(), _nothing()
    if not begins:
        a, b = _two_apart(low, high), _two_apart(low + 2 * VECTOR, high + 2 * VECTOR)
        c, d = _two_apart(low + 4 * VECTOR, high + 4 * VECTOR), _two_apart(low + 6 * VECTOR, high + 6 * VECTOR)
    for _ in range(deep):
        four = _two_apart(x, then)
        a, b = _add(a, _same(w), four), _add(b, _same(w + VECTOR), four)
        c, d = _add(c, _same(w + 2 * VECTOR), four), _add(d, _same(w + 3 * VECTOR), four)
        x, then, w = x + 2 * VECTOR, then + 2 * VECTOR, w + TALL * VECTOR
    _put_two_apart(low, high, a)
    _put_two_apart(low + 2 * VECTOR, high + 2 * VECTOR, b)
    _put_two_apart(low + 4 * VECTOR, high + 4 * VECTOR, c)
    _put_two_apart(low + 6 * VECTOR, high + 6 * VECTOR, d)


@njit(cache=True, nogil=True)
def _same(at):
    """One vector, four times."""
    found = _floats(at)
    return found, found, found, found


@njit(cache=True, nogil=True)
def _twice(at):
    """Two vectors, each of them twice."""
    first, second = _floats(at), _floats(at + VECTOR)
    return first, first, second, second


@njit(cache=True, nogil=True)
def _two(w, x, deep, low, begins):
    """`_four` with one pair of activations."""
    a, b = _nothing(), _nothing()
    if not begins:
        a, b = _apart(low, VECTOR), _apart(low + 4 * VECTOR, VECTOR)
    for _ in range(deep):
        pair = _two_apart(x, x)
        a = _add(a, _twice(w), pair)
        b = _add(b, _twice(w + 2 * VECTOR), pair)
        x, w = x + 2 * VECTOR, w + TALL * VECTOR
    _put_apart(low, VECTOR, a)
    _put_apart(low + 4 * VECTOR, VECTOR, b)


def _many_of(kind: Kind) -> Any:
    """The loop for many rows of activations: numbers are laid out first, and serve all of them."""
    marker, size = Marker(kind), BYTES[kind.dtype]

    @njit(cache=True, nogil=True)
    def _multiply_many(
        codes, cols, x, pairs, out, scale, groups, tall, wide, places, room, numbers, sums, eight, start, stop, shift
    ):
        """Sixteen rows at a time, in panels of four; the last row may be there several times.

        numbers : (panels, 4 quarters of the lanes, chunks of 64 columns, 4 rows, 16 lanes)
        x : (4 quarters, pairs, chunks, 2, 16)
        sums : (panels, pairs, 4 quarters, 4 rows, 2, 16)

        Of quarters and pairs, chunks are one more than there are, lest lines drive each other from the cache. A quarter
        of a panel and one of four activations stay in the nearest cache while they meet.
        """
        chunks = (cols + LANES - 1) // LANES
        apart = (chunks + 1) * 2 * VECTOR
        for r0 in range(start, stop, PANELS * TALL):
            panels = min(PANELS, (stop - r0 + TALL - 1) // TALL)
            for first in range(0, chunks, DEEP):
                deep = min(DEEP, chunks - first)
                quarter = (deep + 1) * TALL * VECTOR
                here = x + first * 2 * VECTOR
                for r in range(panels * TALL):
                    row = min(r0 + r, stop - 1)
                    low = sums + (r // TALL * pairs * 32 + r % TALL * 2) * VECTOR
                    _first_four(
                        marker,
                        size,
                        codes + (row * cols + first * LANES) * size,
                        (first * LANES, (first + deep) * LANES, cols),
                        (scale + row // tall * groups * 4, groups, wide),
                        (places, room),
                        (numbers + r // TALL * 4 * quarter + r % TALL * VECTOR, quarter),
                        (here, here + apart, pairs * apart),
                        (low, low + 32 * VECTOR, 8 * VECTOR, first == 0),
                        PANELS * TALL * cols * size,
                    )
                for q in range(4):
                    for pair in range(2, pairs, 2):
                        i = here + (q * pairs + pair) * apart
                        for panel in range(panels):
                            w = numbers + (panel * 4 + q) * quarter
                            low = sums + ((panel * pairs + pair) * 4 + q) * 8 * VECTOR
                            if pair + 1 < pairs:
                                _four(w, i, i + apart, deep, low, low + 32 * VECTOR, first == 0)
                            else:
                                _two(w, i, deep, low, first == 0)
            for pair in range(pairs):
                for panel in range(panels):
                    _put(eight.ctypes.data, _eight_sums(sums + (panel * pairs + pair) * 32 * VECTOR, marker))
                    for r in range(TALL):
                        row = min(r0 + panel * TALL + r, stop - 1) + shift
                        if 2 * pair < out.shape[0]:
                            out[2 * pair, row] = eight[r]
                        if 2 * pair + 1 < out.shape[0]:
                            out[2 * pair + 1, row] = eight[TALL + r]
            for row in range(r0, min(r0 + PANELS * TALL, stop)):
                if _none_among(marker, codes + row * cols, cols):
                    out[:, row + shift] = np.nan

    return _multiply_many


_many = cache(_many_of)
