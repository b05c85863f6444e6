"""Vectors of 512 bits inside compiled functions, on any machine.

The shapes are always the same, and LLVM splits them where registers are smaller: what a lane means, and every bit of
a result, is the same everywhere. Lanes do not meet but where a docstring says so, each float operation rounds on its
own, to nearest and half to even, and nothing is fused.

    Bytes64, Bytes16, Shorts16, Ints16, Floats16      the types
    load_*, store*, broadcast4, same_*, zero_*        from and to memory, and one number in all lanes
    and_ or_ xor add sub mul, addf subf mulf divf     lane by lane
    shift_*, funnel, as_*, widen*, *_to_float         bits, widths and number formats
    dot4, dot4_wide, look_up_*, select_less           what the products are made of
    clear, prefetch, claim                            memory

All of these are for compiled functions. Arrays are contiguous, of any dtype, and `at` counts bytes from their first.
Nothing is checked and addresses need not be aligned: the door before the loop sees to it that there are so many bytes.

`LEVEL` says which instructions of one machine are used beside LLVM's own; PACKFMT_SIMD asks for less than there is.
Numba does not see an edit of what a kernel imports, nor PACKFMT_SIMD: a kernel keeps `VERSION` in its closure, or in
the name of an argument's type, where it is part of the key under which compiled code is kept. The operations
themselves do not belong in a closure: to Numba they are others in each process.

Source: LLVM Language Reference; Intel 64 and IA-32 Software Developer's Manual, volume 2 (PMADDUBSW, PMADDWD,
VPDPBUSD, PSHUFB, VPERMB, VPERMD, VPERMI2D); Arm Architecture Reference Manual (TBL, SDOT, USDOT)
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

from packfmt.kernels import simd_code
from packfmt.kernels.simd_code import (
    AVX512_HERE,
    AVX_HERE,
    BITS,
    F16,
    FEATURES,
    I8,
    I16,
    I32,
    I64,
    INTERPRETED,
    LEVEL,
    LEVELS,
    NEON,
    SDOT,
    USDOT,
    VPDPBUSD,
    VPERMB,
    Bytes16,
    Bytes64,
    Floats16,
    Ints16,
    Shorts16,
    Vector,
    all_lanes,
    call,
    constant,
    cut,
    joined,
    lane_by_lane,
    make_intrinsic,
    on_registers,
    operation,
    order,
)

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
]

_CODE = b"".join(Path(file).read_bytes() for file in (__file__, simd_code.__file__))
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


def _from_small(build: ir.IRBuilder, magnitude: Any, mantissa: int, bias: int) -> Any:
    """Float32's bits of a magnitude without sign, which has so many bits of mantissa; infinity is not among them.

    Shifted to where float32 has its exponent, it is the number but for the bias. A subnormal counts in the same steps
    as the exponent above: it is read as of that one, and what is too much is taken off, so that no float32 that is met
    is subnormal, and nothing depends on whether those are flushed.
    """
    whole = magnitude.type
    bits = build.shl(magnitude, constant(whole, 23 - mantissa))
    normal = build.add(bits, constant(whole, 127 - bias << 23))
    one_more = build.bitcast(build.add(normal, constant(whole, 1 << 23)), Floats16.llvm)
    few = build.bitcast(build.fsub(one_more, constant(Floats16.llvm, 2.0 ** (1 - bias))), whole)
    return build.select(build.icmp_unsigned("<", bits, constant(whole, 1 << 23)), few, normal)


@operation(Floats16, Shorts16)
def half_to_float(build, v):
    """float16 -> float32, exact; a NaN stays one."""
    if AVX_HERE:
        return build.fpext(build.bitcast(v, ir.VectorType(F16, 16)), Floats16.llvm)
    whole = Ints16.llvm
    code = build.zext(v, whole)
    magnitude = build.and_(code, constant(whole, 0x7FFF))
    beyond = build.or_(build.shl(magnitude, constant(whole, 13)), constant(whole, 0x7F800000))  # infinity or NaN
    is_beyond = build.icmp_unsigned(">=", magnitude, constant(whole, 0x7C00))
    size = build.select(is_beyond, beyond, _from_small(build, magnitude, 10, 15))
    sign = build.shl(build.and_(code, constant(whole, 0x8000)), constant(whole, 16))
    return build.bitcast(build.or_(size, sign), Floats16.llvm)


@operation(Floats16, Shorts16)
def bfloat_to_float(build, v):
    """bfloat16 -> float32, exact, NaN to the bit."""
    return build.bitcast(build.shl(build.zext(v, Ints16.llvm), constant(Ints16.llvm, 16)), Floats16.llvm)


def _e4m3(build: ir.IRBuilder, v: Any, signed: bool) -> Any:
    """Float8 of four and three bits -> float32; the code of NaN as if it were a number.

    At the same places in a float16, the bits are the number but for the bias, subnormals too.
    """
    if AVX_HERE:
        words = ir.VectorType(I16, 16)
        wide = build.shl(build.sext(v, words), constant(words, 7))
        half = build.and_(wide, constant(words, 0x3F80 - 0x8000 * signed))
        number = build.fpext(build.bitcast(half, ir.VectorType(F16, 16)), Floats16.llvm)
        return build.fmul(number, constant(Floats16.llvm, 2.0 ** (15 - 7)))
    whole = Ints16.llvm
    code = build.zext(v, whole)
    bits = _from_small(build, build.and_(code, constant(whole, 0x7F)), 3, 7)
    sign = build.shl(build.and_(code, constant(whole, 0x80 * signed)), constant(whole, 24))
    return build.bitcast(build.or_(bits, sign), Floats16.llvm)


@operation(Floats16, Bytes16)
def e4m3_to_float(build, v):
    """float8_e4m3fn -> float32, exact; 0x7f and 0xff are NaN."""
    last = constant(v.type, 0x7F)
    is_nan = build.icmp_unsigned("==", build.and_(v, last), last)
    return build.select(is_nan, constant(Floats16.llvm, float("nan")), _e4m3(build, v, True))


@operation(Floats16, Bytes16)
def ggml_e4m3_to_float(build, v):
    """ufloat7_e4m3 -> float32, exact: bit 7 is ignored, but for 127, which is 0, where 255 is 480."""
    is_zero = build.icmp_unsigned("==", v, constant(v.type, 0x7F))
    return build.select(is_zero, constant(Floats16.llvm, 0.0), _e4m3(build, v, False))


@operation(Floats16, Bytes16, types.int32, types.boolean)
def e8m0_to_float(build, v, exponent, nan):
    """2 ** (byte - exponent), exact, subnormals too; below 2**-149 it is 0, above float32 infinite.

    exponent : int32 of -2**30 to 2**30
    nan : whether byte 255 is NaN
    """
    whole = Ints16.llvm
    byte = build.zext(v, whole)
    field = build.add(byte, all_lanes(build, build.sub(I32(127), exponent), 16))  # of float32
    over = build.icmp_signed(">", field, constant(whole, 255))
    normal = build.shl(build.select(over, constant(whole, 255), field), constant(whole, 23))
    below = build.sub(constant(whole, 0), field)  # 0 is 2**-127, which is half the smallest normal
    is_nothing = build.icmp_signed(">", below, constant(whole, 31))
    few = build.lshr(constant(whole, 1 << 22), build.select(is_nothing, constant(whole, 31), below))
    bits = build.select(build.icmp_signed(">", field, constant(whole, 0)), normal, few)
    is_last = build.icmp_unsigned("==", byte, constant(whole, 255))
    is_nan = build.and_(is_last, all_lanes(build, nan, 16))
    return build.bitcast(build.select(is_nan, constant(whole, 0x7FC00000), bits), Floats16.llvm)


# ---- dot products of four bytes


def _even_and_odd(build: ir.IRBuilder, u: Any, s: Any) -> list[tuple[Any, Any]]:
    """Unsigned and signed bytes as 16-bit numbers: those at even places, and those at odd ones."""
    words = ir.VectorType(I16, 32)
    u, s, eight = build.bitcast(u, words), build.bitcast(s, words), constant(words, 8)
    even = build.and_(u, constant(words, 255)), build.ashr(build.shl(s, eight), eight)
    return [even, (build.lshr(u, eight), build.ashr(s, eight))]


def _sums_of_four(build: ir.IRBuilder, u: Any, s: Any) -> Any:
    """On any machine: products of 8 bits fit int16 (255 * -128 = -32640), and two of those are an int32's halves."""
    total, sixteen = constant(Ints16.llvm, 0), constant(Ints16.llvm, 16)
    for a, b in _even_and_odd(build, u, s):
        two = build.bitcast(build.mul(a, b), Ints16.llvm)
        low, high = build.ashr(build.shl(two, sixteen), sixteen), build.ashr(two, sixteen)
        total = build.add(total, build.add(low, high))
    return total


def _sums_of_two(build: ir.IRBuilder, a: Any, b: Any) -> Any:
    """PMADDWD: products of int16, added two by two as int32."""
    name = "llvm.x86.avx512.pmaddw.d.512" if AVX512_HERE else "llvm.x86.avx2.pmadd.wd"
    return on_registers(build, name, I32, a, b)


def _dot4(build: ir.IRBuilder, acc: Any, u: Any, s: Any, most: int) -> Any:
    """acc + the sums of four products, where u is `most` or below."""
    if VPDPBUSD:  # does not saturate
        ints = (build.bitcast(v, Ints16.llvm) for v in (u, s))
        return on_registers(build, f"llvm.x86.avx512.vpdpbusd.{BITS}", I32, acc, *ints)
    if SDOT and most < 128:
        return on_registers(build, "llvm.aarch64.neon.sdot.v4i32.v16i8", I32, acc, u, s)
    if USDOT:
        return on_registers(build, "llvm.aarch64.neon.usdot.v4i32.v16i8", I32, acc, u, s)
    if not AVX_HERE:
        return build.add(acc, _sums_of_four(build, u, s))
    if most < 128:  # two products fit int16, where PMADDUBSW would saturate
        name = "llvm.x86.avx512.pmaddubs.w.512" if AVX512_HERE else "llvm.x86.avx2.pmadd.ub.sw"
        pairs = on_registers(build, name, I16, u, s)
        return build.add(acc, _sums_of_two(build, pairs, constant(pairs.type, 1)))
    even, odd = (_sums_of_two(build, a, b) for a, b in _even_and_odd(build, u, s))
    return build.add(acc, build.add(even, odd))


@operation(Ints16, Ints16, Bytes64, Bytes64)
def dot4(build, acc, u, s):
    """acc[i] + u[4i] * s[4i] + ... + u[4i + 3] * s[4i + 3]; u is 0 to 127, s int8. The sum wraps."""
    return _dot4(build, acc, u, s, 127)


@operation(Ints16, Ints16, Bytes64, Bytes64)
def dot4_wide(build, acc, u, s):
    """As `dot4`, where u is 0 to 255."""
    return _dot4(build, acc, u, s, 255)


# ---- tables


def _in_memory(build: ir.IRBuilder, table: Any, index: Any) -> Any:
    """table[index[i]] for every lane, by a loop over the stack: for machines without an instruction for it."""
    lane = index.type.element
    out = cgutils.alloca_once(build, index.type)
    places = [cgutils.alloca_once_value(build, table), cgutils.alloca_once_value(build, index), out]
    numbers, which, found = (build.bitcast(place, lane.as_pointer()) for place in places)
    with cgutils.for_range(build, I64(index.type.count)) as loop:
        at = build.zext(build.load(build.gep(which, [loop.index])), I64)
        build.store(build.load(build.gep(numbers, [at])), build.gep(found, [loop.index]))
    return build.load(out)


def _in_sixteens(build: ir.IRBuilder, table: Any, index: Any) -> Any:
    """Of each 16 bytes the one that the index's low 4 bits name. Where its bit 7 is set, PSHUFB gives 0."""
    if NEON:
        return on_registers(build, "llvm.aarch64.neon.tbl1.v16i8", I8, table, index)
    name = "llvm.x86.avx512.pshuf.b.512" if AVX512_HERE else "llvm.x86.avx2.pshuf.b"
    return on_registers(build, name, I8, table, index)


def _in_64(build: ir.IRBuilder, table: Any, index: Any) -> Any:
    """TBL of four registers: table[index], and 0 where the index is 64 or above."""
    quarters = cut(build, table, 16)
    name = "llvm.aarch64.neon.tbl4.v16i8"
    return joined(build, [call(build, name, part.type, *quarters, part) for part in cut(build, index, 16)])


@operation(Bytes64, Bytes64, Bytes64)
def look_up_16(build, table, index):
    """table[index & 15]; the table is 16 bytes, four times."""
    if VPERMB:  # looks at six bits, and the upper two of them only name a copy
        return call(build, "llvm.x86.avx512.permvar.qi.512", Bytes64.llvm, table, index)
    index = build.and_(index, constant(Bytes64.llvm, 15))
    return (_in_sixteens if AVX_HERE or NEON else _in_memory)(build, table, index)


@operation(Bytes64, Bytes64, Bytes64)
def look_up_64(build, table, index):
    """table[index & 63]."""
    kind = Bytes64.llvm
    if VPERMB:
        return call(build, "llvm.x86.avx512.permvar.qi.512", kind, table, index)
    index = build.and_(index, constant(kind, 63))
    if not AVX_HERE:
        return (_in_64 if NEON else _in_memory)(build, table, index)
    # A quarter at a time: bit 7 of (index ^ 16q) + 112 is clear only where the index is in quarter q, and the low
    # 4 bits are the index's. Elsewhere PSHUFB gives 0.
    total = constant(kind, 0)
    for quarter in range(4):
        part = build.shuffle_vector(table, table, order([*range(16 * quarter, 16 * quarter + 16)] * 4))
        at = build.add(build.xor(index, constant(kind, 16 * quarter)), constant(kind, 112))
        total = build.or_(total, _in_sixteens(build, part, at))
    return total


@operation(Ints16, Ints16, Ints16, Ints16)
def look_up_words(build, t0, t1, index):
    """(t0 : t1)[index & 31], a table of 32 words."""
    kind = Ints16.llvm
    if AVX512_HERE:
        return call(build, "llvm.x86.avx512.vpermi2var.d.512", kind, t0, index, t1)
    if AVX_HERE:
        return joined(build, [_in_32_words(build, t0, t1, part) for part in cut(build, index, 8)])
    index = build.and_(index, constant(kind, 31))
    if not NEON:
        return _in_memory(build, joined(build, [t0, t1]), index)
    # Bytes of words: 4 * index + 0, 1, 2, 3. In the second half of the table they count from 64.
    places = build.add(build.mul(index, constant(kind, 0x04040404)), constant(kind, 0x03020100))
    low = build.bitcast(places, Bytes64.llvm)
    high = build.sub(low, constant(Bytes64.llvm, 64))
    halves = [_in_64(build, build.bitcast(t, Bytes64.llvm), at) for t, at in ((t0, low), (t1, high))]
    return build.bitcast(build.or_(*halves), kind)


def _in_32_words(build: ir.IRBuilder, t0: Any, t1: Any, index: Any) -> Any:
    """VPERMD looks at three bits of eight indexes; the other two choose among four tables."""
    eights = [*cut(build, t0, 8), *cut(build, t1, 8)]
    a, b, c, d = (call(build, "llvm.x86.avx2.permd", index.type, eight, index) for eight in eights)
    zero = constant(index.type, 0)
    bit3, bit4 = (build.icmp_signed("<", build.shl(index, constant(index.type, up)), zero) for up in (28, 27))
    return build.select(bit4, build.select(bit3, d, c), build.select(bit3, b, a))
