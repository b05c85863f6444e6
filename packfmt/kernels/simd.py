"""Vectors of 512 bits inside compiled functions, on any machine.

The shapes are always the same, and LLVM splits them where registers are smaller: what a lane means, and every bit of
a result, is the same everywhere. Lanes do not meet but where a docstring says so, each float operation rounds on its
own, to nearest and half to even, and nothing is fused.

    Bytes64, Bytes16, Shorts16, Ints16, Floats16      the types
    load_*, store*, broadcast4, same_*, zero_*        from and to memory, and one number in all lanes
    and_ or_ xor add sub mul, addf subf mulf divf     lane by lane
    shift_*, funnel, as_*, widen*, *_to_float         bits, widths and number formats
    larger, smaller, largest_lane, sum_of_lanes       of int32
    select_less, select_below, equal_lanes            comparisons
    dot4, dot4_wide, look_up_*                        what the products are made of
    copy4, turn, clear, prefetch, claim               memory

All of these are for compiled functions. Arrays are contiguous, of any dtype, and `at` counts bytes from their first.
Nothing is checked and addresses need not be aligned: the door before the loop sees to it that there are so many bytes.

`LEVEL` says which instructions of one machine are used beside LLVM's own; PACKFMT_SIMD asks for less than there is.
Numba does not see an edit of what a kernel imports, nor PACKFMT_SIMD: a kernel keeps `VERSION` in its closure, or in
the name of an argument's type, where it is part of the key under which compiled code is kept. The operations
themselves do not belong in a closure: to Numba they are others in each process.

Source: LLVM Language Reference; of `simd_numbers` and `simd_tables`, whose operations are passed on, see there
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from packfmt.kernels import simd_code, simd_numbers, simd_tables
from packfmt.kernels.simd_code import (
    FEATURES,
    I8,
    I16,
    I32,
    I64,
    INTERPRETED,
    LEVEL,
    LEVELS,
    Bytes16,
    Bytes64,
    Floats16,
    Ints16,
    Shorts16,
    Vector,
    all_lanes,
    call,
    constant,
    lane_by_lane,
    make_intrinsic,
    operation,
    order,
)
from packfmt.kernels.simd_numbers import (
    bfloat_to_float,
    e4m3_to_float,
    e8m0_to_float,
    ggml_e4m3_to_float,
    half_to_float,
)
from packfmt.kernels.simd_tables import dot4, dot4_wide, look_up_16, look_up_64, look_up_words

# passed on, beside what stands here
__all__ = [
    "FEATURES",
    "INTERPRETED",
    "LEVEL",
    "LEVELS",
    "Bytes16",
    "Bytes64",
    "Floats16",
    "Ints16",
    "Shorts16",
    "Vector",
    "bfloat_to_float",
    "dot4",
    "dot4_wide",
    "e4m3_to_float",
    "e8m0_to_float",
    "ggml_e4m3_to_float",
    "half_to_float",
    "look_up_16",
    "look_up_64",
    "look_up_words",
]

FILES: Final = (__file__, simd_code.__file__, simd_numbers.__file__, simd_tables.__file__)
_CODE = b"".join(Path(file).read_bytes() for file in FILES)
VERSION: Final = f"{LEVEL}-{sha256(_CODE).hexdigest()[:12]}"

# ---- memory


def _place(context: Any, builder: Any, kind: types.Array, array: Any, at: Any, what: ir.Type) -> Any:
    """Where `what` lies, so many bytes after an array's first."""
    data = context.make_array(kind)(context, builder, array).data
    first = builder.bitcast(data, I8.as_pointer())
    return builder.bitcast(builder.gep(first, [at]), what.as_pointer())


def _loads(name: str, gives: Vector, what: ir.Type, then: Callable[..., Any] | None = None) -> Any:
    def typed(_context, array, at):
        if not isinstance(array, types.Array):
            raise TypingError(f"simd.{name}: got {array}, needs an array")

        def code(context, builder, signature, args):
            found = builder.load(_place(context, builder, signature.args[0], *args, what))
            found.align = 1
            return then(builder, found) if then else found

        return gives(array, types.intp), code

    return make_intrinsic(typed, name, f"(array, at) -> {gives}", ("array", "at"))


def _four_everywhere(build: ir.IRBuilder, four: Any) -> Any:
    return build.bitcast(all_lanes(build, four, 16), Bytes64.llvm)


load_bytes64 = _loads("load_bytes64", Bytes64, Bytes64.llvm)
load_bytes16 = _loads("load_bytes16", Bytes16, Bytes16.llvm)
load_shorts16 = _loads("load_shorts16", Shorts16, Shorts16.llvm)
load_ints16 = _loads("load_ints16", Ints16, Ints16.llvm)
load_floats16 = _loads("load_floats16", Floats16, Floats16.llvm)
broadcast4 = _loads("broadcast4", Bytes64, I32, _four_everywhere)  # four bytes, sixteen times


@intrinsic
def store(_context, array, at, vector):
    """Write a vector to an array."""
    if not isinstance(vector, Vector):
        raise TypingError(f"simd.store: got {vector}, needs a vector")

    def code(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], args[1], args[2].type)
        builder.store(args[2], place).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


def _are_all(build: ir.IRBuilder, count: Any, lanes: int) -> Any:
    """Whether so many are a whole vector; most often they are, and vectors without a mask are for every machine."""
    return build.icmp_signed(">=", count, ir.Constant(I64, lanes))


def _first(build: ir.IRBuilder, count: Any, lanes: int) -> Any:
    """A mask of the first `count` lanes."""
    places = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    return build.icmp_signed("<", places, all_lanes(build, build.trunc(count, I32), lanes))


@intrinsic
def load_some_floats16(_context, array, at, count):
    """The first `count` of sixteen float32, or all; zeros stand for the others, which are not read."""
    if not isinstance(array, types.Array):
        raise TypingError(f"simd.load_some_floats16: got {array}, needs an array")

    def code(context, builder, signature, args):
        kind, count = Floats16.llvm, args[2]
        place = _place(context, builder, signature.args[0], *args[:2], kind)
        either, zeros = cgutils.alloca_once(builder, kind), constant(kind, 0.0)
        with builder.if_else(_are_all(builder, count, 16)) as (all_, some):
            with all_:
                builder.store(builder.load(place, align=1), either)
            with some:
                mask = _first(builder, count, 16)
                found = call(builder, "llvm.masked.load.v16f32.p0", kind, place, I32(1), mask, zeros)
                builder.store(found, either)
        return builder.load(either)

    return Floats16(array, types.intp, types.intp), code


@intrinsic
def store_some(_context, array, at, vector, count):
    """Write the first `count` bytes of a vector of bytes to an array, or all."""
    if vector not in (Bytes16, Bytes64):
        raise TypingError(f"simd.store_some: got {vector}, needs a vector of bytes")

    def code(context, builder, signature, args):
        value, count, lanes = args[2], args[3], vector.llvm.count
        place = _place(context, builder, signature.args[0], *args[:2], value.type)
        with builder.if_else(_are_all(builder, count, lanes)) as (all_, some):
            with all_:
                builder.store(value, place).align = 1
            with some:
                mask, name = _first(builder, count, lanes), f"llvm.masked.store.v{lanes}i8.p0"
                call(builder, name, ir.VoidType(), value, place, I32(1), mask)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp), code


@intrinsic
def copy4(_context, target, to, source, at):
    """Four bytes from byte `at` of an array to byte `to` of another."""

    def code(context, builder, signature, args):
        written = _place(context, builder, signature.args[0], *args[:2], I32)
        found = builder.load(_place(context, builder, signature.args[2], *args[2:], I32), align=1)
        builder.store(found, written, align=1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), code


# the first halves of two vectors, lane by lane in turn; and the second halves
WOVEN = tuple(order([lane + 16 * which for lane in lanes for which in (0, 1)]) for lanes in (range(8), range(8, 16)))


@intrinsic
def turn(_context, source, at, step, target, to):
    """Sixteen times sixteen dwords, from bytes at, at + step ... of an array to byte `to` of another, transposed."""

    def code(context, builder, signature, args):
        rows, byte, kind = [], args[1], Ints16.llvm
        for _ in range(16):
            place = _place(context, builder, signature.args[0], args[0], byte, kind)
            rows.append(builder.load(place, align=1))
            byte = builder.add(byte, args[2])
        for _ in range(4):  # four perfect shuffles of 16 rows' lanes are a transposition
            pairs = [(rows[i], rows[i + 8]) for i in range(8)]
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in WOVEN]
        for i, row in enumerate(rows):
            place = _place(context, builder, signature.args[3], args[3], builder.add(args[4], I64(64 * i)), kind)
            builder.store(row, place, align=1)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, target, types.int64), code


@intrinsic
def clear(_context, array, at, count):
    """Write so many bytes of 0."""

    def code(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], *args[:2], I8)
        cgutils.memset(builder, place, args[2], 0)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), code


@intrinsic
def prefetch(_context, array, at):
    """Ask for the cache line of a byte, to be read soon; it may lie outside the array."""

    def code(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], *args, I8)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), place, I32(0), I32(3), I32(1))  # a read, near, of data
        return context.get_dummy_value()

    return types.void(array, types.intp), code


@intrinsic
def claim(_context, counter, count):
    """Add `count` to the int64 counter[0] in one piece, whatever other threads do, and give what it was before."""
    if not (isinstance(counter, types.Array) and counter.dtype == types.int64):
        raise TypingError(f"simd.claim: the counter is {counter}, needs an array of int64")

    def code(context, builder, signature, args):
        place = _place(context, builder, signature.args[0], args[0], ir.Constant(I64, 0), I64)
        return builder.atomic_rmw("add", place, args[1], "monotonic")

    return types.int64(counter, types.int64), code


# ---- one number in all lanes


@operation(Bytes64, types.uint8)
def same_byte(build, number):
    """A uint8 or int8, 64 times."""
    return all_lanes(build, number, 64)


@operation(Ints16, types.int32)
def same_int(build, number):
    """An int32, sixteen times."""
    return all_lanes(build, number, 16)


@operation(Floats16, types.float32)
def same_float(build, number):
    """A float32, sixteen times."""
    return all_lanes(build, number, 16)


@operation(Ints16)
def zero_ints(build):
    """Sixteen zeros."""
    return constant(Ints16.llvm, 0)


@operation(Floats16)
def zero_floats(build):
    """Sixteen times +0."""
    return constant(Floats16.llvm, 0.0)


# ---- lane by lane

WHOLE = (Bytes64, Bytes16, Shorts16, Ints16)

and_ = lane_by_lane("and_", "and_", WHOLE)
or_ = lane_by_lane("or_", "or_", WHOLE)
xor = lane_by_lane("xor", "xor", WHOLE)
add = lane_by_lane("add", "add", WHOLE)  # sums, differences and products wrap
sub = lane_by_lane("sub", "sub", WHOLE)
mul = lane_by_lane("mul", "mul", WHOLE)
addf = lane_by_lane("addf", "fadd", (Floats16,))  # no flags: never contracted to a fused multiply-add
subf = lane_by_lane("subf", "fsub", (Floats16,))
mulf = lane_by_lane("mulf", "fmul", (Floats16,))
divf = lane_by_lane("divf", "fdiv", (Floats16,))


@intrinsic
def select_less(_context, a, b, x, y):
    """Of each lane x where a < b, as int32, and y elsewhere; x and y are both Ints16 or both Floats16."""
    if (a, b) != (Ints16, Ints16) or x != y or x not in (Ints16, Floats16):
        raise TypingError(f"simd.select_less: got {a}, {b}, {x}, {y}, needs two Ints16 and two Ints16 or Floats16")

    def code(_context, builder, _signature, args):
        return builder.select(builder.icmp_signed("<", args[0], args[1]), args[2], args[3])

    return x(a, b, x, y), code


@operation(Ints16, Ints16, Ints16)
def larger(build, a, b):
    """The larger int32 of each lane."""
    return call(build, "llvm.smax.v16i32", Ints16.llvm, a, b)


@operation(Ints16, Ints16, Ints16)
def smaller(build, a, b):
    """The smaller int32 of each lane."""
    return call(build, "llvm.smin.v16i32", Ints16.llvm, a, b)


@operation(types.int32, Ints16)
def largest_lane(build, v):
    """The largest of sixteen int32."""
    return call(build, "llvm.vector.reduce.smax.v16i32", I32, v)


@operation(types.int32, Ints16)
def sum_of_lanes(build, v):
    """The sum of sixteen int32, which wraps."""
    return call(build, "llvm.vector.reduce.add.v16i32", I32, v)


@operation(Ints16, Floats16, Floats16, Ints16, Ints16)
def select_below(build, a, b, x, y):
    """Of each lane x where a < b, as float32, and y elsewhere, also where one is NaN."""
    return build.select(build.fcmp_ordered("<", a, b), x, y)


@operation(types.int64, Ints16, Ints16)
def equal_lanes(build, a, b):
    """Bit i: whether lane i of both is the same."""
    return build.zext(build.bitcast(build.icmp_signed("==", a, b), I16), I64)


# ---- shifts: by a number that all lanes share, which is best a constant


@operation(Bytes64, Bytes64, types.int32)
def shift_fields(build, v, k):
    """Each two bytes as a 16-bit word, shifted right by k, below 16: a byte's upper bits come from its neighbour."""
    words = ir.VectorType(I16, 32)
    shifted = build.lshr(build.bitcast(v, words), all_lanes(build, build.trunc(k, I16), 32))
    return build.bitcast(shifted, Bytes64.llvm)


@operation(Ints16, Ints16, types.int32)
def shift_right(build, v, k):
    """Shift right by k, below 32; zeros come in."""
    return build.lshr(v, all_lanes(build, k, 16))


@operation(Ints16, Ints16, types.int32)
def shift_right_signed(build, v, k):
    """Shift right by k, below 32; copies of the sign come in."""
    return build.ashr(v, all_lanes(build, k, 16))


@operation(Ints16, Ints16, types.int32)
def shift_left(build, v, k):
    """Shift left by k, below 32."""
    return build.shl(v, all_lanes(build, k, 16))


@operation(Ints16, Ints16, Ints16)
def shift_left_each(build, v, by):
    """Shift each lane left by its own number, below 32."""
    return build.shl(v, by)


@operation(Ints16, Ints16, Ints16, types.int32)
def funnel(build, high, low, k):
    """The low half of (high : low) >> k, k below 32."""
    return call(build, "llvm.fshr.v16i32", Ints16.llvm, high, low, all_lanes(build, k, 16))


# ---- the same bits, or the same numbers, as another type


def _as(name: str, takes: Vector, gives: Vector) -> Any:
    def cast(build, v):
        return build.bitcast(v, gives.llvm)

    cast.__name__, cast.__doc__ = name, f"The same bits as {gives}."
    return operation(gives, takes)(cast)


as_ints = _as("as_ints", Bytes64, Ints16)
as_bytes = _as("as_bytes", Ints16, Bytes64)
as_floats = _as("as_floats", Ints16, Floats16)
ints_of = _as("ints_of", Floats16, Ints16)


@operation(Floats16, Ints16)
def to_float(build, v):
    """int32 -> float32, to nearest, half to even."""
    return build.sitofp(v, Floats16.llvm)


@operation(Ints16, Bytes16)
def widen(build, v):
    """uint8 -> int32."""
    return build.zext(v, Ints16.llvm)


@operation(Ints16, Shorts16)
def widen_shorts(build, v):
    """uint16 -> int32."""
    return build.zext(v, Ints16.llvm)


@operation(Ints16, Floats16)
def to_int(build, v):
    """float32 -> int32, toward zero; anything for what is no int32."""
    return build.fptosi(v, Ints16.llvm)


@operation(Bytes16, Ints16)
def low_bytes(build, v):
    """The lowest byte of each lane."""
    return build.trunc(v, Bytes16.llvm)


@operation(Shorts16, Ints16)
def low_shorts(build, v):
    """The lower half of each lane."""
    return build.trunc(v, Shorts16.llvm)


@operation(types.float32, types.int32)
def float_of(build, bits):
    """The float32 of these bits."""
    return build.bitcast(bits, Floats16.llvm.element)
