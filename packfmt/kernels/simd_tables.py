"""Operations of `simd` that products are made of, each by the instruction that a machine has for it: dots and look-ups.

Source: Intel 64 and IA-32 Software Developer's Manual, volume 2 (PMADDUBSW, PMADDWD, VPDPBUSD, PSHUFB, VPERMB, VPERMD,
VPERMI2D); Arm Architecture Reference Manual (TBL, SDOT, USDOT)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from packfmt.kernels.simd_code import (
    AVX512_HERE,
    AVX_HERE,
    BITS,
    I8,
    I16,
    I32,
    I64,
    NEON,
    SDOT,
    USDOT,
    VPDPBUSD,
    VPERMB,
    Bytes64,
    Ints16,
    call,
    constant,
    cut,
    joined,
    on_registers,
    operation,
    order,
)

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
