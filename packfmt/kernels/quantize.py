"""Choose codes and scales for a weight: the only step that may lose information.

A door takes (rows, cols) float32, finite and filling whole blocks, and returns the parts of its
layout; `records` returns the packed bytes at once. All arithmetic is float32, each operation rounding
on its own. A block depends on nothing but its own weights, so the number of threads cannot change a bit.

The rules are those of gguf 0.19.0, gguf/quants.py, byte for byte; the pages in spec/formats say
what they are, and what happens where gguf leaves it undefined.

The plain loops say what is done; those over vectors do the same, sixteen weights at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from math import ldexp, log2
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels import simd, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    as_floats,
    equal_lanes,
    ints_of,
    larger,
    largest_lane,
    load_floats16,
    load_ints16,
    low_bytes,
    low_shorts,
    mulf,
    or_,
    prefetch,
    same_float,
    same_int,
    select_below,
    select_less,
    shift_left,
    shift_right,
    store,
    sub,
    subf,
    to_float,
    to_int,
    turn,
    zero_ints,
)

# passed on to the other encoders, beside what stands here
__all__ = ["larger", "largest_lane", "low_bytes", "select_below", "turn"]

LEAST_WEIGHTS = 1 << 16  # weights worth a thread
F32 = np.float32
ZERO, HALF, ONE, TWO = F32(0), F32(0.5), F32(1), F32(2)
MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
NO_INVERSE = F32(2.0**-128)  # 1 / step overflows float32 from here down
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], F32)  # twice the magnitudes of float4_e2m1fn

VERSION: Final = f"{simd.VERSION}-{sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
SIZE, NO_NUMBER = np.int32(0x7FFFFFFF), 0x7F800000  # a float32's magnitude; those from here on are no numbers


def q8_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """32 weights share a float16 scale, peak / 127; codes are the nearest steps, ties away from zero.

    Returns codes (rows, cols) int8, scale (rows, cols / 32) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.
    """
    codes, scale = _parts("q8_0", weight)
    return {"codes": codes.view(np.int8), "scale": _finite("q8_0", scale)}


def q4_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """32 weights share a float16 scale that puts the first peak, whatever its sign, on code 0 = -8 steps.

    Returns codes (rows, cols) uint8 below 16, scale (rows, cols / 32) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.
    """
    codes, scale = _parts("q4_0", weight)
    return {"codes": codes, "scale": _finite("q4_0", scale)}


def mxfp4(weight: np.ndarray) -> dict[str, np.ndarray]:
    """32 weights share a power of two that puts the peak at 4 to 8; codes are the nearest, ties toward zero.

    Returns codes (rows, cols) uint8 below 16, scale (rows, cols / 32) uint8: float8_e8m0fnu's exponent.
    """
    codes, scale = _parts("mxfp4", weight)
    return {"codes": codes, "scale": scale}


def tq2_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """256 weights share their peak as a float16 scale; codes 0, 1, 2 are -1, 0, 1, ties away from zero.

    Returns codes (rows, cols) uint8 below 3, scale (rows, cols / 256) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.
    """
    codes, scale = _blocks(_tq2_0, weight, 256, np.uint8)
    return {"codes": codes, "scale": _half("tq2_0", scale)}


def records(weight: np.ndarray, name: str) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the blocks that packing the parts of q8_0, q4_0 or mxfp4 gives.

    None if a weight is not finite, or a scale overflows float16: the slower way says where, and how many.
    """
    form = FORMS[name]
    if simd.INTERPRETED:
        return None
    rows, cols = weight.shape
    out = np.empty((rows, cols // BLOCK * form.nbytes), np.uint8)
    flat = out.reshape(-1)
    top = _run(form, weight, Places(flat, form.scale_bytes, form.nbytes, flat, 0, form.nbytes, form.nibbles))
    return {"blocks": out} if top < form.most else None


def cast(weight: np.ndarray, name: str, dtype: np.dtype, wider: str) -> dict[str, np.ndarray]:
    """Every weight in another float dtype, round half to even. Infinities and NaN stay what they are.

    Raises
    ------
    LayoutError
        If a finite weight becomes infinite; `wider` is the format to use instead.
    """
    if found := narrowed(weight, dtype):
        return found
    values = np.empty(weight.shape, dtype)

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore"):
            values[start:stop] = weight[start:stop]

    _share(work, weight)
    infinite = np.isinf(values)
    if infinite.any() and (lost := int(np.isfinite(weight[infinite]).sum())):
        raise LayoutError(f"{name}: {lost} of {weight.size} weights overflow {dtype.name}; use {wider}")
    return {"values": values}


def narrowed(weight: np.ndarray, dtype: np.dtype) -> dict[str, np.ndarray] | None:
    """`cast` to float16 or bfloat16; None if any weight is infinite or NaN, or becomes so, or for another dtype."""
    if simd.INTERPRETED or dtype.name not in NARROW or weight.size < 16:
        return None
    loop, most = NARROW[dtype.name]
    values = np.empty(weight.shape, dtype)
    source, target = np.ascontiguousarray(weight).reshape(-1), values.view(np.uint16).reshape(-1)
    tops: list[int] = []

    def work(start: int, stop: int) -> None:
        # the last vector ends where the weights do, and may begin among those before
        tops.append(int(loop(source, start, stop, len(source) - 16, target)))

    threads.spread(work, -(-len(source) // 16), LEAST_WEIGHTS // 16)
    return {"values": values} if max(tops) < most else None


# ---------------------------------------------------------------- what the doors share

BLOCK = 32


class Places(NamedTuple):
    """Where a loop puts codes and scales: in arrays of bytes, from one place on, so many bytes for each block."""

    codes: np.ndarray
    codes_at: int
    codes_step: int
    scale: np.ndarray
    scale_at: int
    scale_step: int
    nibbles: bool  # code j + 16 above code j in a byte


class Form(NamedTuple):
    """A format with blocks of 32: its loops, and the bytes of its records, which begin with the scale."""

    plain: Callable[..., None]
    dtype: type  # of the plain loop's codes
    vectors: Callable[..., np.int32]
    most: int  # bits of magnitudes that are too large for a scale, or no numbers
    scale_bytes: int
    nibbles: bool

    @property
    def nbytes(self) -> int:
        return self.scale_bytes + (BLOCK // 2 if self.nibbles else BLOCK)


def _parts(name: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, cols) uint8 codes, (rows, cols / 32) scales: float16, or uint8 if they have one byte."""
    form = FORMS[name]
    kind = np.dtype("<f2" if form.scale_bytes == 2 else np.uint8)
    if simd.INTERPRETED:
        codes, steps = _blocks(form.plain, weight, BLOCK, form.dtype)
        with np.errstate(over="ignore"):
            return codes.view(np.uint8), steps.astype(kind)
    rows, cols = weight.shape
    codes, scale = np.empty((rows, cols), np.uint8), np.empty((rows, cols // BLOCK), kind)
    flat = codes.reshape(-1), scale.view(np.uint8).reshape(-1)
    _run(form, weight, Places(flat[0], 0, BLOCK, flat[1], 0, form.scale_bytes, False))
    return codes, scale


def _run(form: Form, weight: np.ndarray, places: Places) -> int:
    """Call the loop over vectors for all blocks; the bits of the largest magnitude."""
    flat = np.ascontiguousarray(weight).reshape(-1)
    tops = [0]

    def work(start: int, stop: int) -> None:
        tops.append(int(form.vectors(flat, start, stop, places)))

    threads.spread(work, len(flat) // BLOCK, LEAST_WEIGHTS // BLOCK)
    return max(tops)


def _blocks(loop: Callable[..., None], weight: np.ndarray, block: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Run a plain loop over all rows: (rows, cols) codes of `dtype`, (rows, cols / block) float32 scales."""
    rows, cols = weight.shape
    codes: np.ndarray = np.empty((rows, cols), dtype)
    scale = np.empty((rows, cols // block), F32)
    bits = weight.view(np.uint32)

    def work(start: int, stop: int) -> None:
        loop(weight[start:stop], bits[start:stop], codes[start:stop], scale[start:stop])

    _share(work, weight)
    return codes, scale


def _share(work: Callable[[int, int], None], weight: np.ndarray) -> None:
    """Call work(first row, end) for all rows, on as many threads as they are worth."""
    rows, cols = weight.shape
    threads.spread(work, rows, -(-LEAST_WEIGHTS // max(1, cols)))


def _half(name: str, scale: np.ndarray) -> np.ndarray:
    """Scales as float16, round half to even."""
    with np.errstate(over="ignore"):
        return _finite(name, scale.astype(np.float16))


def _finite(name: str, half: np.ndarray) -> np.ndarray:
    """Scales that are float16 already, if none overflowed."""
    if lost := int(np.count_nonzero(np.isinf(half))):
        raise LayoutError(f"{name}: {lost} of {half.size} scales overflow float16; use bf16 or mxfp4")
    return half


@njit(cache=True, nogil=True)
def _peak(bits, start, stop):
    """Where the first weight of the largest magnitude is; finite floats sort as their bits do."""
    top = np.uint32(0)
    for j in range(start, stop):
        top = max(top, np.uint32(bits[j] & MAGNITUDE))
    for j in range(start, stop):
        if np.uint32(bits[j] & MAGNITUDE) == top:
            return j
    return start


@njit(cache=True, nogil=True)
def _inverse(step):
    """1 / step, or 0 where that is no float32: all codes of such a block then stand for zero."""
    if abs(step) <= NO_INVERSE:
        return ZERO
    return ONE / step


@njit(cache=True, nogil=True)
def _round_away(x):
    """The nearest whole number, ties away from zero; trunc(x + 0.5) would take 0.49999997 to 1."""
    whole = np.trunc(x)
    return whole + np.trunc(TWO * (x - whole))


# ---------------------------------------------------------------- plainly: a loop a format


@njit(cache=True, nogil=True)
def _q8_0(weight, bits, codes, scale):
    for row in range(weight.shape[0]):
        for block in range(scale.shape[1]):
            start, stop = 32 * block, 32 * block + 32
            step = abs(weight[row, _peak(bits[row], start, stop)]) / F32(127)
            scale[row, block] = step
            per_step = _inverse(step)
            for j in range(start, stop):
                codes[row, j] = np.int8(_round_away(weight[row, j] * per_step))


@njit(cache=True, nogil=True)
def _q4_0(weight, bits, codes, scale):
    for row in range(weight.shape[0]):
        for block in range(scale.shape[1]):
            start, stop = 32 * block, 32 * block + 32
            step = weight[row, _peak(bits[row], start, stop)] / F32(-8)
            scale[row, block] = step
            per_step = _inverse(step)
            for j in range(start, stop):
                # the product rounds before the sum; 8 is the zero, 0.5 rounds
                code = np.int32(weight[row, j] * per_step + F32(8.5))
                codes[row, j] = np.uint8(min(code, np.int32(15)))


@njit(cache=True, nogil=True)
def _tq2_0(weight, bits, codes, scale):
    for row in range(weight.shape[0]):
        for block in range(scale.shape[1]):
            start, stop = 256 * block, 256 * block + 256
            step = abs(weight[row, _peak(bits[row], start, stop)])
            scale[row, block] = step
            per_step = _inverse(step)
            for j in range(start, stop):
                codes[row, j] = np.uint8(_round_away(weight[row, j] * per_step) + ONE)


@njit(cache=True, nogil=True)
def _mxfp4(weight, bits, codes, scale):
    for row in range(weight.shape[0]):
        for block in range(scale.shape[1]):
            start, stop = 32 * block, 32 * block + 32
            peak = abs(weight[row, _peak(bits[row], start, stop)])
            exponent = F32(0)
            if peak > ZERO:
                # rounded to float32 log2 is the next whole number for peaks just below a power of two;
                # float64 first, for libraries differ in the last bit of their float32 logarithms
                exponent = max(exponent, np.floor(F32(log2(np.float64(peak)))) + F32(125))
            scale[row, block] = exponent
            step = F32(ldexp(1.0, int(exponent) - 128))
            for j in range(start, stop):
                size = abs(weight[row, j])
                code = np.uint8(0)
                for i in range(7):
                    # halfway to the next magnitude; infinite, so never passed, where that is beyond float32
                    code += np.uint8(size > HALF * (E2M1[i] * step) + HALF * (E2M1[i + 1] * step))
                if weight[row, j] < ZERO and code:
                    code |= np.uint8(8)  # code 8, a second zero, is never written
                codes[row, j] = code


# ---------------------------------------------------------------- in vectors: a loop a format


def _carries() -> np.ndarray:
    """(256,) int32: what to add to a float32's bits, by exponent, for floor(log2) of `_mxfp4` to be in the exponent.

    The logarithms of less than 64 numbers below each power of two are rounded up to a whole number.
    """
    field, below = np.arange(1, 255)[:, None], np.arange(1, 64)
    numbers = ((field + 1 << 23) - below).astype(np.uint32).view(F32)
    carry = np.zeros(256, np.int32)
    carry[1:255] = (np.log2(numbers.astype(np.float64)).astype(F32) >= field - 126).sum(1)
    return carry


def _bounds() -> np.ndarray:
    """(256, 7) int32: bits of what a magnitude must exceed for the next code, by scale, as `_mxfp4` has it."""
    step = np.ldexp(ONE, np.arange(256) - 128)[:, None]
    with np.errstate(over="ignore"):
        return (HALF * (E2M1[:-1] * step) + HALF * (E2M1[1:] * step)).view(np.int32)


AHEAD = 4096  # bytes
CARRIES, BOUNDS = _carries(), _bounds()


@njit(cache=True, nogil=True)
def _ask_ahead(weight, block):
    """Ask for the two cache lines of a block some time before its turn, for the loops wait for memory otherwise."""
    prefetch(weight, 128 * block + AHEAD)
    prefetch(weight, 128 * block + AHEAD + 64)


@njit(cache=True, nogil=True)
def _put_half(number, out, at):
    """A float32 as the two bytes of float16, round half to even; infinite from 65520 on, and for what is no number."""
    bits = np.int32(F32(number).view(np.int32))
    size = np.int32(bits & SIZE)
    if size < np.int32(113 << 23):  # 1/2 has steps of 2**-24, as subnormal float16 have
        code = np.int32(F32(np.int32(size).view(F32) + HALF).view(np.int32) - np.int32(126 << 23))
    else:
        code = min((size - np.int32((112 << 23) - 0xFFF) + (size >> np.int32(13) & np.int32(1))) >> 13, 0x7C00)
    code |= bits >> 16 & 0x8000
    out[at] = np.uint8(code)
    out[at + 1] = np.uint8(code >> 8)


@njit(cache=True, nogil=True)
def _halves(bits):
    """Sixteen float32 below 65520 as float16, round half to even."""
    size = and_(bits, same_int(SIZE))
    odd = and_(shift_right(size, 13), same_int(1))
    normal = shift_right(add(add(size, same_int(0xFFF - (112 << 23))), odd), 13)
    few = sub(ints_of(addf(as_floats(size), same_float(HALF))), same_int(126 << 23))
    size = select_less(size, same_int(113 << 23), few, normal)
    return or_(size, and_(shift_right(bits, 16), same_int(0x8000)))


@njit(cache=True, nogil=True)
def _bfloats(bits):
    """Sixteen float32 as bfloat16, round half to even; not for NaN."""
    odd = and_(shift_right(bits, 16), same_int(1))
    return shift_right(add(add(bits, same_int(0x7FFF)), odd), 16)


@njit(cache=True, nogil=True)
def _nearest_away(x):
    """`_round_away` in lanes."""
    whole = to_int(x)
    rest = subf(x, to_float(whole))
    return add(whole, to_int(addf(rest, rest)))


@njit(cache=True, nogil=True)
def _put_codes(low, high, places, block):
    """32 codes, in as many bytes or by two."""
    at = places.codes_at + block * places.codes_step
    if places.nibbles:
        store(places.codes, at, low_bytes(or_(low, shift_left(high, 4))))
    else:
        store(places.codes, at, low_bytes(low))
        store(places.codes, at + 16, low_bytes(high))


@njit(cache=True, nogil=True)
def _e2m1(bits, bounds):
    """The bounds below a magnitude, and the sign, but for zero."""
    size, code = and_(bits, same_int(SIZE)), zero_ints()
    for i in range(7):
        code = select_less(same_int(bounds[i]), size, add(code, same_int(1)), code)
    return select_less(zero_ints(), code, or_(code, and_(shift_right(bits, 28), same_int(8))), code)


def _loops(version: str) -> tuple[Any, ...]:
    """Loops that return the bits of the largest magnitude; the version is part of the key of compiled code."""

    @njit(cache=True, nogil=True)
    def _q8_0_vectors(weight, first, last, places):
        version  # noqa: B018
        worst = np.int32(0)
        for block in range(first, last):
            a, b = load_floats16(weight, 128 * block), load_floats16(weight, 128 * block + 64)
            _ask_ahead(weight, block)
            x, y = and_(ints_of(a), same_int(SIZE)), and_(ints_of(b), same_int(SIZE))
            top = largest_lane(larger(x, y))
            worst = max(worst, top)
            step = np.int32(top).view(F32) / F32(127)
            _put_half(step, places.scale, places.scale_at + block * places.scale_step)
            per_step = same_float(_inverse(step))
            _put_codes(_nearest_away(mulf(a, per_step)), _nearest_away(mulf(b, per_step)), places, block)
        return worst

    @njit(cache=True, nogil=True)
    def _q4_0_vectors(weight, first, last, places):
        version  # noqa: B018
        worst = np.int32(0)
        for block in range(first, last):
            a, b = load_floats16(weight, 128 * block), load_floats16(weight, 128 * block + 64)
            _ask_ahead(weight, block)
            x, y = and_(ints_of(a), same_int(SIZE)), and_(ints_of(b), same_int(SIZE))
            top = largest_lane(larger(x, y))
            worst = max(worst, top)
            # which weights are the positive peak, and which the negative one: the lowest bit is the first
            plus = equal_lanes(ints_of(a), same_int(top)) | equal_lanes(ints_of(b), same_int(top)) << 16
            either = equal_lanes(x, same_int(top)) | equal_lanes(y, same_int(top)) << 16
            size = np.int32(top).view(F32)
            step = (size if plus & either & -either else -size) / F32(-8)
            _put_half(step, places.scale, places.scale_at + block * places.scale_step)
            per_step, shift = same_float(_inverse(step)), same_float(F32(8.5))
            low, high = to_int(addf(mulf(a, per_step), shift)), to_int(addf(mulf(b, per_step), shift))
            most = same_int(15)
            low, high = select_less(low, most, low, most), select_less(high, most, high, most)
            _put_codes(low, high, places, block)
        return worst

    @njit(cache=True, nogil=True)
    def _mxfp4_vectors(weight, first, last, places):
        version  # noqa: B018
        worst = np.int32(0)
        for block in range(first, last):
            a, b = load_ints16(weight, 128 * block), load_ints16(weight, 128 * block + 64)
            _ask_ahead(weight, block)
            top = largest_lane(larger(and_(a, same_int(SIZE)), and_(b, same_int(SIZE))))
            worst = max(worst, top)
            exponent = max(np.int32((top + CARRIES[top >> 23]) >> 23) - 2, 0)
            places.scale[places.scale_at + block * places.scale_step] = exponent
            _put_codes(_e2m1(a, BOUNDS[exponent]), _e2m1(b, BOUNDS[exponent]), places, block)
        return worst

    @njit(cache=True, nogil=True)
    def _to_halves(weight, first, last, end, out):
        version  # noqa: B018
        worst = zero_ints()
        for vector in range(first, last):
            at = min(16 * vector, end)
            bits = load_ints16(weight, 4 * at)
            prefetch(weight, 4 * at + AHEAD)
            worst = larger(worst, and_(bits, same_int(SIZE)))
            store(out, 2 * at, low_shorts(_halves(bits)))
        return largest_lane(worst)

    @njit(cache=True, nogil=True)
    def _to_bfloats(weight, first, last, end, out):
        version  # noqa: B018
        worst = zero_ints()
        for vector in range(first, last):
            at = min(16 * vector, end)
            bits = load_ints16(weight, 4 * at)
            prefetch(weight, 4 * at + AHEAD)
            worst = larger(worst, and_(bits, same_int(SIZE)))
            store(out, 2 * at, low_shorts(_bfloats(bits)))
        return largest_lane(worst)

    return _q8_0_vectors, _q4_0_vectors, _mxfp4_vectors, _to_halves, _to_bfloats


_q8_0_vectors, _q4_0_vectors, _mxfp4_vectors, _to_halves, _to_bfloats = _loops(VERSION)


def _first_too_large(divisor: float) -> int:
    """The bits of the first magnitude whose quotient float16 does not reach."""
    return int(F32(65520 * divisor).view(np.int32))


FORMS: dict[str, Form] = {
    "q8_0": Form(_q8_0, np.int8, _q8_0_vectors, _first_too_large(127), 2, False),
    "q4_0": Form(_q4_0, np.uint8, _q4_0_vectors, _first_too_large(8), 2, True),
    "mxfp4": Form(_mxfp4, np.uint8, _mxfp4_vectors, NO_NUMBER, 1, True),
}
NARROW: dict[str, tuple[Callable[..., np.int32], int]] = {
    "float16": (_to_halves, _first_too_large(1)),
    "bfloat16": (_to_bfloats, 0x7F7F8000),
}
