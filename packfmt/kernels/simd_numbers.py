"""Operations of `simd` on number formats: what is narrower becomes float32, exactly.

Source: LLVM Language Reference (fpext); Intel 64 and IA-32 Software Developer's Manual, volume 2 (VCVTPH2PS)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from packfmt.kernels.simd_code import (
    AVX_HERE,
    F16,
    I16,
    I32,
    Bytes16,
    Floats16,
    Ints16,
    Shorts16,
    all_lanes,
    constant,
    operation,
)


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
