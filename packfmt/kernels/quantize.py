"""Choose codes and scales for a weight: the only step that may lose information.

A door takes (rows, cols) float32, finite and filling whole blocks, and returns the parts of its
layout. All arithmetic is float32, each operation rounding on its own. A block depends on nothing
but its own weights, so the number of threads cannot change a bit.

The rules are those of gguf 0.19.0, gguf/quants.py, byte for byte; the pages in spec/formats say
what they are, and what happens where gguf leaves it undefined.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ldexp, log2

import numpy as np
from numba import njit

from packfmt.errors import LayoutError
from packfmt.kernels import threads

LEAST_WEIGHTS = 1 << 16  # weights worth a thread
F32 = np.float32
ZERO, HALF, ONE, TWO = F32(0), F32(0.5), F32(1), F32(2)
MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
NO_INVERSE = F32(2.0**-128)  # 1 / step overflows float32 from here down
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], F32)  # twice the magnitudes of float4_e2m1fn


def q8_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """32 weights share a float16 scale, peak / 127; codes are the nearest steps, ties away from zero.

    Returns codes (rows, cols) int8, scale (rows, cols / 32) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.
    """
    codes, scale = _blocks(_q8_0, weight, 32, np.int8)
    return {"codes": codes, "scale": _half("q8_0", scale)}


def q4_0(weight: np.ndarray) -> dict[str, np.ndarray]:
    """32 weights share a float16 scale that puts the first peak, whatever its sign, on code 0 = -8 steps.

    Returns codes (rows, cols) uint8 below 16, scale (rows, cols / 32) float16.

    Raises
    ------
    LayoutError
        If a scale overflows float16.
    """
    codes, scale = _blocks(_q4_0, weight, 32, np.uint8)
    return {"codes": codes, "scale": _half("q4_0", scale)}


def mxfp4(weight: np.ndarray) -> dict[str, np.ndarray]:
    """32 weights share a power of two that puts the peak at 4 to 8; codes are the nearest, ties toward zero.

    Returns codes (rows, cols) uint8 below 16, scale (rows, cols / 32) uint8: float8_e8m0fnu's exponent.
    """
    codes, scale = _blocks(_mxfp4, weight, 32, np.uint8)
    return {"codes": codes, "scale": scale.astype(np.uint8)}


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


def cast(weight: np.ndarray, name: str, dtype: np.dtype, wider: str) -> dict[str, np.ndarray]:
    """Every weight in another float dtype, round half to even. Infinities and NaN stay what they are.

    Raises
    ------
    LayoutError
        If a finite weight becomes infinite; `wider` is the format to use instead.
    """
    values = np.empty(weight.shape, dtype)

    def work(start: int, stop: int) -> None:
        with np.errstate(over="ignore"):
            values[start:stop] = weight[start:stop]

    _share(work, weight)
    infinite = np.isinf(values)
    if infinite.any() and (lost := int(np.isfinite(weight[infinite]).sum())):
        raise LayoutError(f"{name}: {lost} of {weight.size} weights overflow {dtype.name}; use {wider}")
    return {"values": values}


# ---------------------------------------------------------------- what the doors share


def _blocks(loop: Callable[..., None], weight: np.ndarray, block: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Run a loop over all rows: (rows, cols) codes of `dtype`, (rows, cols / block) float32 scales."""
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
        half = scale.astype(np.float16)
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


# ---------------------------------------------------------------- a loop a format


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
