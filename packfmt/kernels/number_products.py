"""Products of activations with weights that are numbers of any kind, in float32 and in one fixed order.

Lane l of 64 sums columns l, l + 64, l + 128 ... from +0 on: s = s + (w * x), product and sum rounding apart. Then
lanes fold, s[l] + s[l + 32] first, then + 16, + 8, + 4, + 2, + 1. So the bits do not depend on the batch, on threads,
or on the machine.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, models, overload, register_model, typeof_impl

from packfmt.errors import LayoutError
from packfmt.kernels import simd, threads
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    as_ints,
    bfloat_to_float,
    half_to_float,
    load_bytes64,
    load_floats16,
    load_ints16,
    load_shorts16,
    mulf,
    or_,
    prefetch,
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
    both : whether two rows of activations are multiplied at once
    """

    dtype: str
    scaled: int
    both: bool


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
    for what, array, shape in (("activations", x, (len(x), cols)), ("out", out, (len(x), rows))):
        if array.shape != shape or array.dtype != F32 or not array.flags.c_contiguous:
            raise LayoutError(f"{what} {array.dtype} {array.shape}, needs C-contiguous float32 {shape}")
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
    if not out.size:
        return
    if simd.INTERPRETED:
        return _plainly(weights, x, out, scale if scaled else None, tall, wide)
    kind = Kind(name, scaled, len(x) > 1)
    if cols % LANES:
        x = np.pad(x, ((0, 0), (0, -cols % LANES)))
    if _mixed(kind):
        x = np.ascontiguousarray(x.reshape(len(x), -1, 16, 2).swapaxes(2, 3)).reshape(len(x), -1)
    codes = weights.reshape(-1).view(np.uint8)
    places = EVEN_AND_ODD if _mixed(kind) else IN_ORDER
    work = partial(_some, _kernel(kind), codes, cols, x, out, scale, tall, wide, places)
    threads.spread(work, rows, -(-LEAST_BYTES // max(1, codes.nbytes // rows * len(x))))


NO_SCALE = np.empty((0, 0), F32)


def _mixed(kind: Kind) -> bool:
    """Whether lanes are in the order of `EVEN_AND_ODD`."""
    return kind.dtype in (E4M3, E5M2)


def _some(kernel, codes, cols, x, out, scale, tall, wide, places, start, stop):
    """Rows start to stop of the weights."""
    room = np.zeros(4 * LANES * 4, np.uint8)
    kernel(codes, cols, x, out, scale, tall, wide, places, room, start, stop)


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


def _numbers(marker, codes, i):
    """Weights i to i + 63 as float32, in four vectors."""


@overload(_numbers)
def _numbers_of(marker, codes, i):
    name, eight = marker.kind.dtype, F32(256)
    if name in ("float8_e4m3fn", "float8_e5m2"):

        def numbers(marker, codes, i):
            a, b, c, d = _halves(load_bytes64(codes, i), marker)
            return half_to_float(a), half_to_float(b), half_to_float(c), half_to_float(d)

        def larger_numbers(marker, codes, i):
            a, b, c, d = _halves(load_bytes64(codes, i), marker)
            more = same_float(eight)
            return (
                mulf(half_to_float(a), more),
                mulf(half_to_float(b), more),
                mulf(half_to_float(c), more),
                mulf(half_to_float(d), more),
            )

        return larger_numbers if name == E4M3 else numbers

    def four(marker, codes, i):
        return (
            _sixteen(marker, codes, i),
            _sixteen(marker, codes, i + 16),
            _sixteen(marker, codes, i + 32),
            _sixteen(marker, codes, i + 48),
        )

    return four


def _sixteen(marker, codes, i):
    """Weights i to i + 15 as float32."""


@overload(_sixteen)
def _sixteen_of(marker, codes, i):
    return {
        "float32": lambda marker, codes, i: load_floats16(codes, 4 * i),
        "bfloat16": lambda marker, codes, i: bfloat_to_float(load_shorts16(codes, 2 * i)),
        "float16": lambda marker, codes, i: half_to_float(load_shorts16(codes, 2 * i)),
    }[marker.kind.dtype]


def _times(marker, numbers, factor, scale, row, column, wide):
    """64 numbers from a column on, times their scales."""


@overload(_times)
def _times_of(marker, numbers, factor, scale, row, column, wide):
    if not marker.kind.scaled:
        return lambda marker, numbers, factor, scale, row, column, wide: numbers
    if marker.kind.scaled == LANES:

        def times_one(marker, numbers, factor, scale, row, column, wide):
            a, b, c, d = numbers
            return mulf(a, factor), mulf(b, factor), mulf(c, factor), mulf(d, factor)

        return times_one

    def times(marker, numbers, factor, scale, row, column, wide):
        last = scale.shape[1] - 1  # beyond which the last 64 columns may reach
        low = same_float(scale[row, column // wide])
        high = same_float(scale[row, min((column + 32) // wide, last)])
        a, b, c, d = numbers
        return mulf(a, low), mulf(b, low), mulf(c, high), mulf(d, high)

    return times


def _factor(marker, scale, row, group):
    """The scale of 64 columns or more."""


@overload(_factor)
def _factor_of(marker, scale, row, group):
    if marker.kind.scaled == LANES:
        return lambda marker, scale, row, group: same_float(scale[row, group])
    return lambda marker, scale, row, group: zero_floats()


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


def _none_among(marker, codes, first, cols):
    """Whether a weight of a row is NaN, and no vector shows it."""


@overload(_none_among)
def _none_among_of(marker, codes, first, cols):
    if marker.kind.dtype != E4M3:
        return lambda marker, codes, first, cols: False

    def look(marker, codes, first, cols):
        magnitude, one, found = same_byte(np.uint8(0x7F)), same_byte(np.uint8(1)), same_byte(np.uint8(0))
        whole = first + cols // LANES * LANES
        for i in range(first, whole, LANES):  # what 1 more brings to the top bit is 0x7f
            found = or_(found, add(and_(load_bytes64(codes, i), magnitude), one))
        top = _any_bits(as_ints(found)) & TOP_BITS
        for i in range(whole, first + cols):
            top |= np.uint32(np.uint8(codes[i] & np.uint8(0x7F)) == np.uint8(0x7F))
        return top != 0

    return look


@njit(cache=True, nogil=True)
def _nothing():
    return zero_floats(), zero_floats(), zero_floats(), zero_floats()


@njit(cache=True, nogil=True)
def _more(marker, sums, codes, i, factor, scale, row, column, wide, x, at):
    """Sums of 64 lanes, and the products of 64 columns from `column` on. row : of scales; at : bytes"""
    w = _times(marker, _numbers(marker, codes, i), factor, scale, row, column, wide)
    return (
        addf(sums[0], mulf(w[0], load_floats16(x, at))),
        addf(sums[1], mulf(w[1], load_floats16(x, at + 64))),
        addf(sums[2], mulf(w[2], load_floats16(x, at + 128))),
        addf(sums[3], mulf(w[3], load_floats16(x, at + 192))),
    )


@njit(cache=True, nogil=True)
def _below(places, end, more, sums):
    """The lanes of the first `end` columns of the one, and others of the other."""
    return (
        select_less(load_ints16(places, 0), end, more[0], sums[0]),
        select_less(load_ints16(places, 64), end, more[1], sums[1]),
        select_less(load_ints16(places, 128), end, more[2], sums[2]),
        select_less(load_ints16(places, 192), end, more[3], sums[3]),
    )


def _kernel_of(kind: Kind) -> Any:
    """The loop for one kind of weights."""
    marker, both, size = Marker(kind), kind.both, BYTES[kind.dtype]

    @njit(cache=True, nogil=True)
    def _multiply(codes, cols, x, out, scale, tall, wide, places, room, start, stop):
        """Four sums at a time: four rows with one of activations, or two rows with two; the last may be there twice.

        LLVM sees that two sums have weights or activations in common, and reads those once. The last columns, of
        which there are fewer than 64, are copied to `room`, and multiplied there.
        """
        few, padded, numbers = cols % LANES, x.shape[1], x.reshape(-1)
        for r0 in range(start, stop, 2 if both else 4):
            r1 = r0 if both else min(r0 + 1, stop - 1)
            r2 = min(r0 + 1, stop - 1) if both else min(r0 + 2, stop - 1)
            r3 = r2 if both else min(r0 + 3, stop - 1)
            s0, s1, s2, s3 = r0 // tall, r1 // tall, r2 // tall, r3 // tall
            for m in range(0, x.shape[0], 2 if both else 1):
                n = min(m + 1, x.shape[0] - 1) if both else m
                at, to = 4 * m * padded, 4 * n * padded
                a, b, c, d = _nothing(), _nothing(), _nothing(), _nothing()
                e, f, g, h = a, b, c, d
                f0, f1, f2, f3 = zero_floats(), zero_floats(), zero_floats(), zero_floats()
                group, end, column = 0, 0, 0
                for part in range(2 if few else 1):
                    source, last = codes, cols - few
                    i0, i1, i2, i3 = r0 * cols, r1 * cols, r2 * cols, r3 * cols
                    if part:
                        for k in range(few * size):
                            at_k = (cols - few) * size + k
                            room[k] = codes[i0 * size + at_k]
                            room[LANES * size + k] = codes[i1 * size + at_k]
                            room[2 * LANES * size + k] = codes[i2 * size + at_k]
                            room[3 * LANES * size + k] = codes[i3 * size + at_k]
                        i0, i1, i2, i3 = -column, LANES - column, 2 * LANES - column, 3 * LANES - column
                        e, f, g, h, source, last = a, b, c, d, room, cols
                    while column < last:
                        if column == end:
                            f0, f1 = _factor(marker, scale, s0, group), _factor(marker, scale, s1, group)
                            f2, f3 = _factor(marker, scale, s2, group), _factor(marker, scale, s3, group)
                            group, end = group + 1, end + wide
                        a = _more(marker, a, source, i0 + column, f0, scale, s0, column, wide, numbers, at + 4 * column)
                        b = _more(marker, b, source, i1 + column, f1, scale, s1, column, wide, numbers, to + 4 * column)
                        c = _more(marker, c, source, i2 + column, f2, scale, s2, column, wide, numbers, at + 4 * column)
                        d = _more(marker, d, source, i3 + column, f3, scale, s3, column, wide, numbers, to + 4 * column)
                        if not both and size == 1:  # a line of each of the next four rows
                            prefetch(codes, i0 + column + 4 * cols)
                            prefetch(codes, i1 + column + 4 * cols)
                            prefetch(codes, i2 + column + 4 * cols)
                            prefetch(codes, i3 + column + 4 * cols)
                        column += LANES
                if few:
                    there = same_int(np.int32(few))
                    a, b = _below(places, there, a, e), _below(places, there, b, f)
                    c, d = _below(places, there, c, g), _below(places, there, d, h)
                out[m, r0], out[n, r1] = _sum(marker, a), _sum(marker, b)
                out[m, r2], out[n, r3] = _sum(marker, c), _sum(marker, d)
            for row in range(r0, r3 + 1):
                if _none_among(marker, codes, row * cols, cols):
                    out[:, row] = np.nan

    return _multiply


_kernel = cache(_kernel_of)
