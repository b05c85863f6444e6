"""What products of numbers are made of: weights at an address become float32, and their lanes one sum.

64 columns are four vectors of float32. Functions get addresses: one that takes an array counts its references, which
takes as long as it has work.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import intrinsic, models, overload, register_model, typeof_impl

from packfmt.kernels import simd, simd_code
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
    select_less,
    zero_floats,
)

F32 = np.float32

LANES = 64  # of a sum
VECTOR = 64  # bytes of sixteen of them
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}  # of a weight
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
TOP_BITS = np.uint32(0x80808080)  # of four bytes

# Numba sees an edit of the file that a loop stands in, and of no other that parts of it come from.
VERSION: Final = f"{simd.VERSION}-{sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"


class Kind(NamedTuple):
    """What loops are compiled for.

    dtype : of the weights, in NumPy's or ml_dtypes' words
    scaled : columns that share a scale are a multiple of these, 64 or 32; 0: there are no scales
    rows : of activations that weights meet at once: 1 or 2; 4: all, for which numbers are kept
    """

    dtype: str
    scaled: int
    rows: int

    @property
    def many(self) -> bool:
        return self.rows > 2


# ---------------------------------------------------------------- a value without content that stands for a kind


class Marker:
    """Stands in the closure of a loop, where it is part of the key under which compiled code is kept."""

    def __init__(self, kind: Kind, version: str = VERSION) -> None:
        self.kind, self.version = kind, version

    def __reduce__(self) -> tuple[Any, ...]:
        return Marker, (self.kind, self.version)


class MarkerType(types.Type):
    """Its name is part of the key, too, for the functions that take one."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        super().__init__(name=f"Marker({tuple(kind)}, {VERSION})")


register_model(MarkerType)(models.OpaqueModel)


@typeof_impl.register(Marker)
def _typeof(value: Marker, _context: Any) -> MarkerType:
    return MarkerType(value.kind)


@lower_constant(MarkerType)
def _constant(context: Any, _builder: Any, _kind: MarkerType, _value: Marker) -> Any:
    return context.get_dummy_value()


def mixed(kind: Kind) -> bool:
    """Whether the even and the odd columns of each 32 follow each other in the lanes."""
    return kind.dtype in (E4M3, E5M2)


# ---------------------------------------------------------------- memory


def _loads(what: simd.Vector) -> Any:
    """What reads a vector at an address."""

    def load(typing, address):
        def code(context, builder, signature, args):
            found = builder.load(builder.inttoptr(args[0], what.llvm.as_pointer()))
            found.align = 1
            return found

        return what(types.int64), code

    return intrinsic(load)


bytes_at, shorts_at, ints_at, floats_at = (_loads(v) for v in (simd.Bytes64, simd.Shorts16, simd.Ints16, simd.Floats16))


@intrinsic
def put(typing, address, vector):
    """Write a vector."""

    def code(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, vector), code


@intrinsic
def float_at(typing, address):
    """A float32."""

    def code(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], simd_code.F32.as_pointer()))

    return types.float32(types.int64), code


@intrinsic
def byte_at(typing, address):
    """A uint8."""

    def code(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], simd_code.I8.as_pointer()))

    return types.uint8(types.int64), code


@intrinsic
def copy_bytes(typing, to, source, nbytes):
    """Copy so many bytes."""

    def code(context, builder, signature, args):
        places = (builder.inttoptr(address, simd_code.I8.as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(builder, *places, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def ask_for(typing, address, marker):
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
def folded(typing, v):
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
def any_bits(typing, v):
    """The bits that any lane has."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [args[0].type])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.or.v16i32"), args)

    return types.uint32(simd.Ints16), code


@intrinsic
def halves(typing, v, kind):
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


def numbers_at(marker, at):
    """64 weights as float32, in four vectors."""


@overload(numbers_at)
def _numbers_at(marker, at):
    name, eight = marker.kind.dtype, F32(256)

    def e5m2(marker, at):
        a, b, c, d = halves(bytes_at(at), marker)
        return half_to_float(a), half_to_float(b), half_to_float(c), half_to_float(d)

    def e4m3(marker, at):
        a, b, c, d = halves(bytes_at(at), marker)
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
            sixteen_at(marker, at),
            sixteen_at(marker, at + step),
            sixteen_at(marker, at + 2 * step),
            sixteen_at(marker, at + 3 * step),
        )

    size_of_sixteen = 16 * BYTES[name]
    return {E4M3: e4m3, E5M2: e5m2}.get(name, four)


def sixteen_at(marker, at):
    """Sixteen weights as float32."""


@overload(sixteen_at)
def _sixteen_at(marker, at):
    return {
        "float32": lambda marker, at: floats_at(at),
        "bfloat16": lambda marker, at: bfloat_to_float(shorts_at(at)),
        "float16": lambda marker, at: half_to_float(shorts_at(at)),
    }[marker.kind.dtype]


def factor_of(marker, scale, group):
    """The scale of 64 columns or more. scale : where a row's begin"""


@overload(factor_of)
def _factor(marker, scale, group):
    if marker.kind.scaled == LANES:
        return lambda marker, scale, group: same_float(float_at(scale + 4 * group))
    return lambda marker, scale, group: zero_floats()


def weights_at(marker, at, factor, scale, groups, column, wide):
    """64 weights from a column on, times their scales."""


@overload(weights_at)
def _weights(marker, at, factor, scale, groups, column, wide):
    if not marker.kind.scaled:
        return lambda marker, at, factor, scale, groups, column, wide: numbers_at(marker, at)
    if marker.kind.scaled == LANES:

        def times_one(marker, at, factor, scale, groups, column, wide):
            a, b, c, d = numbers_at(marker, at)
            return mulf(a, factor), mulf(b, factor), mulf(c, factor), mulf(d, factor)

        return times_one

    def times_two(marker, at, factor, scale, groups, column, wide):
        second = min((column + 32) // wide, groups - 1)  # beyond which the last 64 columns may reach
        low, high = same_float(float_at(scale + 4 * (column // wide))), same_float(float_at(scale + 4 * second))
        a, b, c, d = numbers_at(marker, at)
        return mulf(a, low), mulf(b, low), mulf(c, high), mulf(d, high)

    return times_two


def sum_of(marker, sums):
    """All lanes: l and l + 32 first."""


@overload(sum_of)
def _sum(marker, sums):
    if mixed(marker.kind):

        def even_and_odd(marker, sums):
            return folded(addf(sums[0], sums[2])) + folded(addf(sums[1], sums[3]))

        return even_and_odd

    def one_after_the_other(marker, sums):
        return folded(addf(addf(sums[0], sums[2]), addf(sums[1], sums[3])))

    return one_after_the_other


def none_among(marker, at, cols):
    """Whether a weight of a row is NaN, and no vector shows it."""


@overload(none_among)
def _none_among(marker, at, cols):
    if marker.kind.dtype != E4M3:
        return lambda marker, at, cols: False

    def look(marker, at, cols):
        magnitude, one, found = same_byte(np.uint8(0x7F)), same_byte(np.uint8(1)), same_byte(np.uint8(0))
        for i in range(at, at + cols // LANES * LANES, LANES):  # what 1 more brings to the top bit is 0x7f
            found = or_(found, add(and_(bytes_at(i), magnitude), one))
        top = any_bits(as_ints(found)) & TOP_BITS
        for i in range(at + cols // LANES * LANES, at + cols):
            top |= np.uint32(byte_at(i) & np.uint8(0x7F) == np.uint8(0x7F))
        return top != 0

    return look


@njit(cache=True, nogil=True)
def _nothing():
    return zero_floats(), zero_floats(), zero_floats(), zero_floats()


@njit(cache=True, nogil=True)
def _apart(at, step):
    """Four vectors, so many bytes from one to the next."""
    return floats_at(at), floats_at(at + step), floats_at(at + 2 * step), floats_at(at + 3 * step)


@njit(cache=True, nogil=True)
def _put_apart(at, step, four):
    put(at, four[0])
    put(at + step, four[1])
    put(at + 2 * step, four[2])
    put(at + 3 * step, four[3])


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
        select_less(ints_at(places), end, more[0], sums[0]),
        select_less(ints_at(places + VECTOR), end, more[1], sums[1]),
        select_less(ints_at(places + 2 * VECTOR), end, more[2], sums[2]),
        select_less(ints_at(places + 3 * VECTOR), end, more[3], sums[3]),
    )
