"""Vectors inside compiled functions: on every level of instructions, each operation gives NumPy's bits.

The level is chosen once in a process, so each is tested in a child: this file as a program, which prints a line for
every check. Where NUMBA_CPU_NAME names a smaller processor, LLVM itself splits the vectors.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from packfmt import minifloat
from packfmt.kernels import simd

ROOT = Path(__file__).parents[1]
F32 = np.float32
Array = npt.NDArray[np.generic]

# ---- the kernels: many operations in each, for compiling takes longer than running


@njit
def _dots(start, u, s, out, wide):
    for i in range(start.size // 16):
        acc = simd.load_ints16(start, 64 * i)
        unsigned, signed = simd.load_bytes64(u, 64 * i), simd.load_bytes64(s, 64 * i)
        simd.store(out, 64 * i, simd.dot4(acc, unsigned, signed))
        simd.store(wide, 64 * i, simd.dot4_wide(acc, simd.xor(unsigned, simd.same_byte(np.uint8(128))), signed))


@njit
def _look_ups(table, words, index, out16, out64, out_words):
    for i in range(index.size // 64):
        at = simd.load_bytes64(index, 64 * i)
        simd.store(out16, 64 * i, simd.look_up_16(simd.load_bytes64(table, 0), at))
        simd.store(out64, 64 * i, simd.look_up_64(simd.load_bytes64(table, 64), at))
        t0, t1 = simd.load_ints16(words, 0), simd.load_ints16(words, 64)
        simd.store(out_words, 64 * i, simd.look_up_words(t0, t1, simd.as_ints(at)))


@njit
def _halves(halves, out, bfloats, wide):
    for i in range(halves.size // 16):
        some = simd.load_shorts16(halves, 32 * i)
        simd.store(out, 64 * i, simd.half_to_float(some))
        simd.store(bfloats, 64 * i, simd.bfloat_to_float(some))
        simd.store(wide, 64 * i, simd.widen_shorts(some))


@njit
def _bytes(codes, exponents, wide, e4m3, ggml, e8m0):
    for i in range(codes.size // 16):
        some = simd.load_bytes16(codes, 16 * i)
        simd.store(wide, 64 * i, simd.widen(some))
        simd.store(e4m3, 64 * i, simd.e4m3_to_float(some))
        simd.store(ggml, 64 * i, simd.ggml_e4m3_to_float(some))
        for j in range(exponents.size):
            at = 64 * (i + j * (codes.size // 16))
            simd.store(e8m0[0], at, simd.e8m0_to_float(some, exponents[j], True))
            simd.store(e8m0[1], at, simd.e8m0_to_float(some, exponents[j], False))
        simd.store(e8m0[2], 64 * i, simd.e8m0_to_float(some, 127, False))


@njit
def _floats(a, b, c, out):
    for i in range(a.size // 16):
        x, y, z = simd.load_floats16(a, 64 * i), simd.load_floats16(b, 64 * i), simd.load_floats16(c, 64 * i)
        simd.store(out[0], 64 * i, simd.addf(x, y))
        simd.store(out[1], 64 * i, simd.subf(x, y))
        simd.store(out[2], 64 * i, simd.mulf(x, y))
        simd.store(out[3], 64 * i, simd.divf(x, y))
        simd.store(out[4], 64 * i, simd.addf(simd.mulf(x, y), z))
        simd.store(out[5], 64 * i, simd.to_float(simd.ints_of(x)))
        simd.store(out[6], 64 * i, simd.select_less(simd.ints_of(x), simd.ints_of(y), x, y))
        simd.store(out[7], 64 * i, simd.as_floats(simd.ints_of(x)))


@njit
def _ints(a, b, shorts, bytes64, bytes16):
    """Sums, differences, products and bits of lanes of each width."""
    for i in range(a.size // 64):
        x, y = simd.load_bytes64(a, 64 * i), simd.load_bytes64(b, 64 * i)
        for j, some in enumerate((simd.and_(x, y), simd.or_(x, y), simd.xor(x, y), simd.add(x, y), simd.sub(x, y))):
            simd.store(bytes64[j], 64 * i, some)
        simd.store(bytes64[5], 64 * i, simd.mul(x, y))
        v, w = simd.as_ints(x), simd.as_ints(y)
        simd.store(bytes64[6], 64 * i, simd.as_bytes(simd.add(v, w)))
        simd.store(bytes64[7], 64 * i, simd.sub(v, w))
        simd.store(bytes64[8], 64 * i, simd.mul(v, w))
        simd.store(bytes64[9], 64 * i, simd.select_less(v, w, v, w))
    for i in range(a.size // 32):
        p, q = simd.load_shorts16(a, 32 * i), simd.load_shorts16(b, 32 * i)
        simd.store(shorts[0], 32 * i, simd.add(p, q))
        simd.store(shorts[1], 32 * i, simd.sub(p, q))
        simd.store(shorts[2], 32 * i, simd.mul(p, q))
    for i in range(a.size // 16):
        simd.store(bytes16, 16 * i, simd.add(simd.load_bytes16(a, 16 * i), simd.load_bytes16(b, 16 * i)))


@njit
def _shifts(a, b, k, out):
    """By a number that is not known before, and by a constant."""
    for i in range(a.size // 16):
        x, y = simd.load_ints16(a, 64 * i), simd.load_ints16(b, 64 * i)
        simd.store(out[0], 64 * i, simd.shift_fields(simd.as_bytes(x), k & 15))
        simd.store(out[1], 64 * i, simd.shift_right(x, k))
        simd.store(out[2], 64 * i, simd.shift_right_signed(x, k))
        simd.store(out[3], 64 * i, simd.shift_left(x, k))
        simd.store(out[4], 64 * i, simd.shift_left_each(x, simd.and_(y, simd.same_int(31))))
        simd.store(out[5], 64 * i, simd.funnel(x, y, k))
        simd.store(out[6], 64 * i, simd.funnel(x, y, 5))
        simd.store(out[7], 64 * i, simd.shift_fields(simd.as_bytes(x), np.int64(6)))


@njit
def _sum(some, number):
    """A vector goes to a function and comes back."""
    return simd.add(some, simd.same_int(number))


@njit
def _memory(array, at, out, number):
    """Odd places, arrays of another dtype, vectors in a tuple and over a loop."""
    pair = (simd.zero_ints(), simd.zero_floats())
    simd.store(out, 0, simd.broadcast4(array, at))
    simd.store(out, 65, simd.load_bytes64(array, at))
    simd.store(out, 130, simd.same_byte(np.int8(-number)))
    simd.store(out, 194, simd.same_int(number))
    simd.store(out, 258, simd.same_float(F32(number)))
    simd.store(out, 322, pair[0])
    simd.store(out, 386, pair[1])
    total = pair[0]
    for i in range(number):
        simd.prefetch(array, 1 << 40)  # far outside
        total = _sum(total, i)
    simd.store(out, 450, total)


@njit
def _some(array, count, floats, few, many, zeros):
    """The first `count` lanes, at odd places."""
    simd.store(floats, 1, simd.load_some_floats16(array, 3, count))
    simd.store_some(few, 1, simd.load_bytes16(array, 3), count)
    simd.store_some(many, 1, simd.load_bytes64(array, 3), count)
    simd.clear(zeros, 1, count)


@njit
def _orders(a, b, out, numbers, shorts, low, floats):
    """The larger and the smaller, comparisons, and what is left of numbers that become narrower."""
    for i in range(a.size // 16):
        x, y = simd.load_ints16(a, 64 * i), simd.load_ints16(b, 64 * i)
        simd.store(out[0], 64 * i, simd.larger(x, y))
        simd.store(out[1], 64 * i, simd.smaller(x, y))
        simd.store(out[2], 64 * i, simd.select_below(simd.as_floats(x), simd.as_floats(y), x, y))
        simd.store(out[3], 64 * i, simd.to_int(simd.to_float(simd.shift_right_signed(x, 8))))
        numbers[0, i] = simd.largest_lane(x)
        numbers[1, i] = simd.sum_of_lanes(x)
        numbers[2, i] = simd.equal_lanes(simd.and_(x, simd.same_int(1)), simd.and_(y, simd.same_int(1)))
        simd.store(shorts, 32 * i, simd.low_shorts(x))
        simd.store(low, 16 * i, simd.low_bytes(x))
        floats[i] = simd.float_of(a[16 * i])


@njit
def _places(array, out, four):
    """Sixteen rows of dwords become columns; four bytes at odd places."""
    simd.turn(array, 3, 100, out, 1)
    for i in range(16):
        simd.copy4(four, 1 + 4 * i, array, 3 + 100 * i)


KERNELS = (
    _dots,
    _look_ups,
    _halves,
    _bytes,
    _floats,
    _ints,
    _shifts,
    _memory,
    _orders,
    _places,
)  # of which the code is looked at

# ---- the checks: each yields what was found and what is right


def random(seed: int, size: int, dtype: npt.DTypeLike) -> Array:
    return np.frombuffer(np.random.default_rng(seed).bytes(size * np.dtype(dtype).itemsize), dtype).copy()


Pairs = Iterator[tuple[Array, Array]]


def dots() -> Pairs:
    """All pairs of bytes at each of the four places, and sums that wrap."""
    u, s = (a.ravel().astype(np.uint8) for a in np.meshgrid(np.arange(256), np.arange(256)))
    u, s = (np.concatenate([a, a, a, random(seed, 4096, np.uint8)]) for a, seed in ((u, 1), (s, 2)))
    u[: 1 << 16] = np.roll(u[: 1 << 16], 1)
    s[: 1 << 16] = np.roll(s[: 1 << 16], 1)
    s[1 << 16 : 2 << 16] = np.sort(s[1 << 16 : 2 << 16])  # four that are alike: the largest sums there are
    start = random(3, u.size // 4, np.int32)
    out, wide = np.empty_like(start), np.empty_like(start)
    _dots(start, u & 127, s.view(np.int8), out, wide)
    signed = s.view(np.int8).astype(np.int32).reshape(-1, 4)
    for found, mask, flip in ((out, 127, 0), (wide, 127, 128)):
        yield found, start + (((u & mask) ^ flip).astype(np.int32).reshape(-1, 4) * signed).sum(1, dtype=np.int32)


def look_ups() -> Pairs:
    table, words = random(4, 128, np.uint8), random(5, 32, np.int32)
    table[:64] = np.tile(table[:16], 4)
    index = np.concatenate([np.roll(np.arange(256), i) for i in range(64)] + [random(6, 4096, np.uint8)])
    index = index.astype(np.uint8)
    out16, out64, out_words = np.empty_like(index), np.empty_like(index), np.empty_like(index)
    _look_ups(table, words, index, out16, out64, out_words)
    yield out16, table[index & 15]
    yield out64, table[64:][index & 63]
    yield out_words.view(np.int32), words[index.view(np.int32) & 31]


def plainly(kernel: Callable[..., None], *args: Array) -> None:
    kernel(*args)


def halves(run: Callable[..., None] = plainly) -> Pairs:
    codes = np.arange(1 << 16).astype(np.uint16)
    out, bfloats, wide = np.empty(codes.size, F32), np.empty(codes.size, F32), np.empty(codes.size, np.int32)
    run(_halves, codes, out, bfloats, wide)
    yield out, codes.view(np.float16).astype(F32)
    yield bfloats.view(np.uint32), codes.astype(np.uint32) << 16
    yield wide, codes.astype(np.int32)


def bytes_(run: Callable[..., None] = plainly) -> Pairs:
    codes = np.arange(256).astype(np.uint8)
    exponents = np.array([127, 128, 0, 1, 126, 150, 254, 276, 277, 300, 600, -200, -(1 << 30), 1 << 30], np.int32)
    wide, e4m3, ggml = np.empty(256, np.int32), np.empty(256, F32), np.empty(256, F32)
    e8m0 = np.empty((3, exponents.size, 256), F32)
    run(_bytes, codes, exponents, wide, e4m3, ggml, e8m0)
    yield wide, codes.astype(np.int32)
    yield e4m3, codes.view(ml_dtypes.float8_e4m3fn).astype(F32)
    yield ggml, minifloat.numbers("ufloat7_e4m3")
    powers = codes.astype(np.int64) - exponents[:, None].astype(np.int64)
    with np.errstate(over="ignore"):
        numbers = np.ldexp(1.0, np.clip(powers, -1000, 1000)).astype(F32)
    yield e8m0[1], numbers
    yield e8m0[2, 0], numbers[0]
    numbers[:, 255] = np.nan
    yield e8m0[0], numbers


def floats() -> Pairs:
    """Any bits, near neighbours whose sums round, and products that a fused sum would round otherwise."""
    a, b, c = (np.concatenate([random(s, 4096, F32), random(s, 4096, np.int32).astype(F32)]) for s in (7, 8, 9))
    edges = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, 1e-38, 3.4e38, 2**-126, 2**24, 0.1, 1 / 3], F32)
    x, y = (v.ravel() for v in np.meshgrid(edges, edges))
    a, b, c = (np.concatenate([v, e])[: (v.size + e.size) // 16 * 16] for v, e in ((a, x), (b, y), (c, x)))
    c[4096:8192] = -a[4096:8192] * b[4096:8192] * F32(1 + 2**-20)
    out = np.empty((8, a.size), F32)
    _floats(a, b, c, out)
    with np.errstate(all="ignore"):
        fused = (a.astype(float) * b + c).astype(F32)
        twice = a * b + c
        yield from zip(out[:4], (a + b, a - b, a * b, a / b), strict=True)
    assert (fused != twice)[4096:8192].sum() > 1000, "these numbers cannot tell a fused product from another"
    yield out[4], twice
    whole = a.view(np.int32)
    yield out[5], whole.astype(F32)
    yield out[6].view(np.int32), np.minimum(whole, b.view(np.int32))
    yield out[7].view(np.int32), whole


def ints() -> Pairs:
    a, b = random(10, 4096, np.uint8), random(11, 4096, np.uint8)
    a[:64], b[:64] = 0x80, 0xFF
    shorts, bytes64, bytes16 = np.empty((3, 2048), np.uint16), np.empty((10, 4096), np.uint8), np.empty_like(a)
    _ints(a, b, shorts, bytes64, bytes16)
    yield from zip(bytes64[:6], (a & b, a | b, a ^ b, a + b, a - b, a * b), strict=True)
    yield bytes16, a + b
    for kind, found in ((np.uint16, shorts), (np.int32, bytes64[6:9].view(np.int32))):
        x, y = a.view(kind), b.view(kind)
        yield from zip(found, (x + y, x - y, x * y), strict=True)
    yield bytes64[9].view(np.int32), np.minimum(a.view(np.int32), b.view(np.int32))


def shifts() -> Pairs:
    a, b = random(12, 256, np.uint32), random(13, 256, np.uint32)
    out = np.empty((8, 256), np.uint32)
    both = a.astype(np.uint64) << np.uint64(32) | b
    for k in range(32):
        _shifts(a, b, k, out)
        yield out[0].view(np.uint16), a.view(np.uint16) >> np.uint16(k & 15)
        yield out[1], a >> np.uint32(k)
        yield out[2].view(np.int32), a.view(np.int32) >> np.int32(k)
        yield out[3], a << np.uint32(k)
        yield out[5], (both >> np.uint64(k)).astype(np.uint32)
    yield out[4], a << (b & 31)
    yield out[6], (both >> np.uint64(5)).astype(np.uint32)
    yield out[7].view(np.uint16), a.view(np.uint16) >> np.uint16(6)


def memory() -> Pairs:
    array, out = random(14, 16, np.float64), np.zeros(600, np.uint8)
    _memory(array, 3, out, 100)
    bytes_ = array.view(np.uint8)
    yield out[:64], np.tile(bytes_[3:7], 16)
    yield out[65:129], bytes_[3:67]
    yield out[130:194].view(np.int8), np.full(64, -100, np.int8)
    yield out[194:258].view(np.int32), np.full(16, 100, np.int32)
    yield out[258:322].view(F32), np.full(16, 100, F32)
    yield out[322:450], np.zeros(128, np.uint8)
    yield out[450:514].view(np.int32), np.full(16, 4950, np.int32)
    yield out[[64, 129, *range(514, 600)]], np.zeros(88, np.uint8)


def some() -> Pairs:
    """Fewer lanes than a vector has, all, and more; what lies outside stays as it is."""
    array = random(15, 128, np.uint8)
    for count in (*range(18), 31, 32, 33, 63, 64, 65):
        floats, few, many, zeros = (np.full(size, 99, np.uint8) for size in (66, 18, 66, 99))
        _some(array, count, floats, few, many, zeros)
        wanted = np.zeros(64, np.uint8)
        wanted[: 4 * count] = array[3:67][: 4 * count]
        yield floats, np.concatenate([[99], wanted, [99]]).astype(np.uint8)
        for found in (few, many):
            inside = np.arange(len(found) - 2) < count
            yield found[1:-1], np.where(inside, array[3:][: inside.size], 99).astype(np.uint8)
            yield found[[0, -1]], np.full(2, 99, np.uint8)
        yield zeros, np.where((np.arange(99) >= 1) & (np.arange(99) <= count), 0, 99).astype(np.uint8)


def orders() -> Pairs:
    a, b = random(16, 4096, np.int32), random(17, 4096, np.int32)
    a[:64:3] = b[:64:3]  # and some that are the same
    out, numbers = np.empty((4, 4096), np.int32), np.empty((3, 256), np.int64)
    shorts, low, floats = np.empty(4096, np.uint16), np.empty(4096, np.uint8), np.empty(256, F32)
    _orders(a, b, out, numbers, shorts, low, floats)
    with np.errstate(invalid="ignore"):
        below = a.view(F32) < b.view(F32)
    yield from zip(out, (np.maximum(a, b), np.minimum(a, b), np.where(below, a, b), a >> 8), strict=True)
    lanes = a.reshape(-1, 16)
    yield numbers[0], lanes.max(1).astype(np.int64)
    yield numbers[1], lanes.sum(1, dtype=np.int32).astype(np.int64)
    yield numbers[2], ((a & 1) == (b & 1)).reshape(-1, 16) @ (1 << np.arange(16))
    yield shorts, a.view(np.uint16)[::2]
    yield low, a.view(np.uint8)[::4]
    yield floats, a[::16].view(F32)


def places() -> Pairs:
    array, out, four = random(18, 1700, np.uint8), np.full(1026, 99, np.uint8), np.full(66, 99, np.uint8)
    _places(array, out, four)
    rows = np.stack([array[3 + 100 * i :][:64] for i in range(16)])
    yield out[1:-1], rows.reshape(16, 16, 4).swapaxes(0, 1).reshape(-1)
    yield four[1:-1], rows[:, :4].reshape(-1)
    yield np.concatenate([out[[0, -1]], four[[0, -1]]]), np.full(4, 99, np.uint8)


# ---- where another library has told the processor to take subnormal float32 for 0

EXACT, FLUSHING = np.uint32(0x1F80), np.uint32(0x9FC0)  # MXCSR, as a process begins, and with bits 15 and 6


@intrinsic
def set_mxcsr(_context, control):
    """LDMXCSR."""

    def code(context, builder, _signature, args):
        place = cgutils.alloca_once_value(builder, args[0])
        kind = ir.FunctionType(ir.VoidType(), [place.type])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.ldmxcsr"), [place])
        return context.get_dummy_value()

    return types.void(types.uint32), code


@njit
def _set(control):
    set_mxcsr(control)


@njit
def _product(a, b):
    return a * b


def flushing(kernel: Callable[..., None], *args: Array) -> None:
    least = F32(2**-126)
    assert _product(least, F32(0.5)) != 0
    _set(FLUSHING)
    flushed = _product(least, F32(0.5))
    kernel(*args)
    _set(EXACT)
    assert flushed == 0, "nothing is flushed"


CHECKS: dict[str, Callable[[], Pairs]] = {
    f.__name__.strip("_"): f
    for f in (dots, look_ups, halves, bytes_, floats, ints, shifts, memory, some, orders, places)
}
if platform.machine().lower() in ("x86_64", "amd64"):
    CHECKS |= {"halves_flushing": partial(halves, flushing), "bytes_flushing": partial(bytes_, flushing)}


def compare(name: str, pairs: Pairs) -> str:
    """The line that a child prints for a check. NaN is NaN, whatever its bits."""
    count = 0
    for i, (found, right) in enumerate(pairs):
        if found.shape != right.shape or found.dtype != right.dtype:
            return f"{name}: result {i} is {found.dtype} {found.shape}, needs {right.dtype} {right.shape}"
        if found.dtype == F32:
            found, right = (np.where(np.isnan(v), F32(np.nan), v).view(np.uint32) for v in (found, right))
        if wrong := np.flatnonzero(found != right).tolist():
            where = wrong[0]
            got, needs = found.ravel()[where], right.ravel()[where]
            return f"{name}: result {i} has {len(wrong)} wrong lanes, the first is {where}: {got}, needs {needs}"
        count += 1
    return f"{name}: {count} equal"


# ---- what the child looks at besides


def instructions(kernel: Callable[..., None]) -> list[str]:
    """A compiled function's own code, without what Numba puts around it for Python."""
    (signature,) = kernel.signatures  # type: ignore[attr-defined]
    name = kernel.overloads[signature].fndesc.mangled_name  # type: ignore[attr-defined]
    lines = kernel.inspect_asm(signature).splitlines()  # type: ignore[attr-defined]
    start = next(i for i, line in enumerate(lines) if re.match(rf"_?{re.escape(name)}:", line))
    stop = next(i for i, line in enumerate(lines) if i > start and "func_end" in line)
    return [line for line in lines[start:stop] if re.match(r"\s+[a-z{]", line)]


def main() -> None:
    print("level:", simd.LEVEL)
    print("version:", simd.VERSION)
    for name, check in CHECKS.items():
        print(compare(name, check()), flush=True)
    code = [line for kernel in KERNELS for line in instructions(kernel)]
    used = {
        f"{found[1]}.{found[2]}" for line in code if (found := re.match(r"\s+(?:{vex}\s+)?(\w+)\s.*%([xyz])mm", line))
    }
    print("calls:", " ".join(line.strip() for line in code if re.match(r"\s+(callq?|blr?)\s", line)))
    print("instructions:", " ".join(sorted(used)))


# ---- the tests


class Machine(NamedTuple):
    """How a child is made to run as another machine, and what must be true of it.

    level : that its environment asks for, or comes to
    needs : features of this processor
    uses : mnemonics with the size of their registers, x, y or z; of a|b either
    name : NUMBA_CPU_NAME, if any
    """

    level: str
    needs: frozenset[str]
    uses: str
    name: str = ""


def has(feature: str, yes: str, no: str) -> str:
    return yes if feature in simd.FEATURES else no


SHUFFLE = has("avx512vbmi", "vpermb.z", "vpshufb.z")
DOT = has("avxvnni", "vpdpbusd.y", "vpmaddubsw.y")
MACHINES = {
    "avx512vnni": Machine("avx512vnni", simd.LEVELS["avx512vnni"], f"vpdpbusd.z {SHUFFLE} vpermi2d.z|vpermt2d.z"),
    "avx512": Machine("avx512", simd.LEVELS["avx512"], "vpmaddubsw.z vpmaddwd.z vpshufb.z vpermi2d.z|vpermt2d.z"),
    "avx2": Machine("avx2", simd.LEVELS["avx2"], f"{DOT} vpermd.y|vpermps.y"),
    "neon": Machine("neon", simd.LEVELS["neon"], ""),
    "portable": Machine("portable", frozenset(), ""),
    "haswell": Machine("avx2", simd.LEVELS["avx2"], "vpmaddubsw.y vpmaddwd.y vpshufb.y vcvtph2ps.y", "haswell"),
    "nehalem": Machine("portable", frozenset({"sse4.2"}), "pmovzxbd.x", "nehalem"),
    "x86-64": Machine("portable", frozenset({"sse2"}), "pmullw.x", "x86-64"),
}


@cache
def reported(machine: str) -> dict[str, str]:
    """What a child that runs as such a machine prints."""
    level, needs, _, name = MACHINES[machine]
    if simd.INTERPRETED:
        pytest.skip("NUMBA_DISABLE_JIT is set, so nothing is compiled")
    if missing := needs - simd.FEATURES:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""} if name else {"PACKFMT_SIMD": level}
    run = child([__file__], settings)
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


def child(program: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PACKFMT_SIMD"}
    environment |= {"PYTHONPATH": str(ROOT), **settings}
    return subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_operation_gives_numpys_bits(machine: str) -> None:
    report = reported(machine)
    assert report["level"] == MACHINES[machine].level
    assert {name: report[name].split()[1:] for name in CHECKS} == {name: ["equal"] for name in CHECKS}, report
    assert all(int(report[name].split()[0]) for name in CHECKS)


@pytest.mark.parametrize("machine", MACHINES)
def test_compiled_code_has_the_instructions_and_calls_nothing(machine: str) -> None:
    report = reported(machine)
    assert report["calls"] == ""
    found = set(report["instructions"].split())
    for one in MACHINES[machine].uses.split():
        assert found & set(one.split("|")), f"no {one} in {sorted(found)}"


@pytest.mark.kernels
def test_the_best_level_is_chosen() -> None:
    """And works in this process, with bounds checks too."""
    best = next(level for level, needs in simd.LEVELS.items() if needs <= simd.FEATURES)
    assert (os.environ.get("PACKFMT_SIMD") or best) == simd.LEVEL
    assert simd.VERSION.startswith(f"{simd.LEVEL}-")
    if simd.INTERPRETED:
        pytest.skip("NUMBA_DISABLE_JIT is set, so nothing is compiled")
    assert compare("memory", memory()) == "memory: 8 equal"


def test_a_version_is_of_the_code_and_the_level() -> None:
    versions = {machine: reported(machine)["version"] for machine in ("portable", "x86-64")}
    assert versions["portable"] == versions["x86-64"]
    assert versions["portable"].split("-")[1] == simd.VERSION.split("-")[1]


IMPORT = "from packfmt.kernels import simd; print(simd.INTERPRETED, simd.LEVEL)"


def test_without_a_compiler_the_module_can_be_imported() -> None:
    run = child(["-c", IMPORT], {"NUMBA_DISABLE_JIT": "1", "PACKFMT_SIMD": "portable"})
    assert (run.stdout, run.returncode) == ("True portable\n", 0), run.stderr


@pytest.mark.parametrize("asked", ["mmx", "AVX2", "avx512vnni"])
def test_a_level_that_is_not_there_is_refused(asked: str) -> None:
    none = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    run = child(["-c", IMPORT], {**none, "PACKFMT_SIMD": asked})
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        f"packfmt.errors.PackfmtError: PACKFMT_SIMD is {asked!r}, and this machine has portable; "
        "name one of them or unset it"
    )


@njit
def _mixed(a):
    return simd.add(simd.load_bytes64(a, 0), simd.load_ints16(a, 0))


@njit
def _swapped(a):
    return simd.dot4(simd.load_bytes64(a, 0), simd.zero_ints(), simd.load_bytes64(a, 0))


@njit
def _no_vector(a):
    simd.store(a, 0, a[0])


@njit
def _counter(a):
    simd.claim(a, 1)


@njit
def _no_array(a):
    return simd.load_ints16(a[0], 0)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (_mixed, "simd.add: got Bytes64 and Ints16, needs two of Bytes64, Bytes16, Shorts16, Ints16"),
        (_swapped, "simd.dot4: acc is Bytes64, needs Ints16"),
        (_no_vector, "simd.store: got uint8, needs a vector"),
        (_no_array, "simd.load_ints16: got uint8, needs an array"),
        (_counter, "simd.claim: the counter is array(uint8, 1d, C), needs an array of int64"),
    ],
)
def test_wrong_types_are_refused_when_a_kernel_is_compiled(kernel: Callable[..., None], says: str) -> None:
    if simd.INTERPRETED:
        pytest.skip("NUMBA_DISABLE_JIT is set, so nothing is compiled")
    with pytest.raises(TypingError) as error:
        kernel(np.zeros(64, np.uint8))
    assert says in str(error.value)


@njit(nogil=True)
def _take(counter, taken):
    """Count how often each number is handed out."""
    while True:
        first = simd.claim(counter, 3)
        if first >= taken.size:
            break
        for i in range(first, min(first + 3, taken.size)):
            taken[i] += 1


@pytest.mark.kernels
def test_every_piece_of_work_is_claimed_once() -> None:
    if simd.INTERPRETED:
        pytest.skip("NUMBA_DISABLE_JIT is set, so nothing is compiled")
    counter, taken = np.zeros(1, np.int64), np.zeros(1_000_000, np.uint8)
    _take(np.array([taken.size]), taken)  # compiles
    threads = [threading.Thread(target=_take, args=(counter, taken)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (taken == 1).all()
    assert counter[0] == (taken.size + 2) // 3 * 3 + 4 * 3


# ---- ARM: there is code for it, which is compiled here but cannot be run

ARM = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+neon,+dotprod,+i8mm"}
USES_ARM = {
    "dot4": ((simd.Ints16, simd.Bytes64, simd.Bytes64), "sdot"),
    "dot4_wide": ((simd.Ints16, simd.Bytes64, simd.Bytes64), "usdot"),
    "look_up_16": ((simd.Bytes64, simd.Bytes64), "tbl"),
    "look_up_64": ((simd.Bytes64, simd.Bytes64), "tbl"),
    "look_up_words": ((simd.Ints16, simd.Ints16, simd.Ints16), "tbl"),
    "half_to_float": ((simd.Shorts16,), "ushll"),
    "funnel": ((simd.Ints16, simd.Ints16, types.int32), "ushl"),
}


def arm_module() -> str:
    """One function for each operation: f(out, *operands), all by address."""
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    for name, (takes, _) in USES_ARM.items():
        signature, code = getattr(simd, name).__wrapped__(None, *takes)
        kinds = [kind.llvm if isinstance(kind, simd.Vector) else ir.IntType(32) for kind in takes]
        gives = signature.return_type.llvm
        kind = ir.FunctionType(ir.VoidType(), [k.as_pointer() for k in (gives, *kinds)])
        function = ir.Function(module, kind, name)
        builder = ir.IRBuilder(function.append_basic_block())
        out, *operands = function.args
        builder.store(code(None, builder, signature, [builder.load(operand) for operand in operands]), out)
        builder.ret_void()
    return str(module)


def arm_machine() -> binding.TargetMachine:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    return target.create_target_machine(features=ARM["NUMBA_CPU_FEATURES"], opt=2)


def print_arm_code() -> None:
    print(arm_machine().emit_assembly(binding.parse_assembly(arm_module())))


def test_code_for_arm_has_the_instructions_and_calls_nothing() -> None:
    try:
        arm_machine()
    except RuntimeError as error:
        pytest.skip(f"this llvmlite cannot compile for ARM: {error}")
    run = child([__file__, "arm"], ARM)
    assert run.returncode == 0, run.stderr
    for name, (_, instruction) in USES_ARM.items():
        body = run.stdout.split(f"\n{name}:")[1].split(".Lfunc_end")[0]
        used = set(re.findall(r"^\t([a-z]\w*)", body, re.MULTILINE))
        assert instruction in used, f"{name} uses {sorted(used)}"
        assert not used & {"bl", "blr"}


if __name__ == "__main__":
    print_arm_code() if sys.argv[1:] == ["arm"] else main()
