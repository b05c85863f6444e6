"""Weights to the bytes of ternary blocks, in one pass.

The parts are skipped: a block is chosen and packed while it is in the cache, to the bytes that the quantizers
of `ternary` and the generic packer give.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from packfmt.kernels import quantize, ternary, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.quantize import _inverse
from packfmt.kernels.ternary import AT_ONCE, SUMS, _add, _choose, _lanes, _total

F32 = np.float32
MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
HALF = F32(0.5)
INFINITE = 0x7F800000  # magnitudes from here up are no numbers
GATHER = np.uint64(0x0102040810204080)  # times eight bytes of 0 or 1: their bits, in order, in the top byte


def tq1_0(weight: np.ndarray) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the records that packing `ternary.tq1_0` gives.

    None if a weight is not finite, or a scale overflows float16: the slower way says where, and how many.
    """
    return _records(weight, 256, 54, 52, _tq1_0)


def tq2_0(weight: np.ndarray) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the records that packing `quantize.tq2_0` gives; None as in `tq1_0`."""
    return _records(weight, 256, 66, 64, _tq2_0)


def sherry(weight: np.ndarray, stride: int, block: int) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the records that packing `ternary.sherry` gives; None as in `tq1_0`.

    A record has a nibble and then a bit for each of block / 4 quads, then the float16 scale: 42 bytes
    for a block of 256, 22 for 128. block : 256 or 128. stride : 1 or 16.
    """
    planes = block // 8 + block // 32

    def loop(weight, bits, out, scale, scale_bits):
        codes = np.empty(block // 4, np.uint8)
        return _sherry(bits, stride, out, scale, codes, codes.view(np.uint64), ternary.scratch())

    return _records(weight, block, planes + 2, planes, loop)


def _records(
    weight: np.ndarray, block: int, size: int, scale_at: int, loop: Callable[..., int]
) -> dict[str, np.ndarray] | None:
    """Run a loop over all rows: records of `size` bytes, with a float16 scale at byte `scale_at`."""
    rows, cols = weight.shape
    out = np.empty((rows, cols // block * size), np.uint8)
    scale = np.empty((rows, cols // block), F32)
    bits, scale_bits = weight.view(np.uint32), scale.view(np.uint32)
    tops = [0]

    def work(start: int, stop: int) -> None:
        mine = slice(start, stop)
        with np.errstate(all="ignore"):
            tops.append(int(loop(weight[mine], bits[mine], out[mine], scale[mine], scale_bits[mine])))

    threads.spread(work, rows, -(-quantize.LEAST_WEIGHTS // max(1, cols)))
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if max(tops) >= INFINITE or np.isinf(rounded).any():
        return None
    half = np.dtype({"names": ["scale"], "formats": ["<f2"], "offsets": [scale_at], "itemsize": size})
    if out.size:
        out.view(half)["scale"] = rounded
    return {"blocks": out}


@njit(cache=True, nogil=True)
def _top(bits, start):
    """The largest magnitude of 256, as bits: finite floats sort as their bits do, all others lie above."""
    top = np.uint32(0)
    for j in range(start, start + 256):
        top = max(top, np.uint32(bits[j] & MAGNITUDE))
    return top


@njit(cache=True, nogil=True)
def _digit(weight, per_step):
    """The nearest of -1, 0, 1, ties away from zero, plus one; |weight * per_step| is below 1.5."""
    steps = weight * per_step
    return np.uint8(np.uint8(1) + np.uint8(steps >= HALF) - np.uint8(steps <= -HALF))


@njit(cache=True, nogil=True)
def _tq2_0(weight, bits, out, scale, scale_bits):
    worst = np.uint32(0)
    for row in range(weight.shape[0]):
        x, stored = weight[row], out[row]
        for block in range(scale.shape[1]):
            scale_bits[row, block] = _top(bits[row], 256 * block)
            worst = max(worst, scale_bits[row, block])
            per_step = _inverse(scale[row, block])
            for half in range(2):
                column, byte = 256 * block + 128 * half, 66 * block + 32 * half
                for m in range(32):
                    a, b = _digit(x[column + m], per_step), _digit(x[column + 32 + m], per_step)
                    c, d = _digit(x[column + 64 + m], per_step), _digit(x[column + 96 + m], per_step)
                    stored[byte + m] = np.uint8(a | b << np.uint8(2) | c << np.uint8(4) | d << np.uint8(6))
    return worst


@njit(cache=True, nogil=True)
def _five(x, column, step, digits, per_step):
    """A base-3 byte of up to five columns, `step` apart: ceil(256 * value / 243)."""
    value = np.uint32(81) * _digit(x[column], per_step) + np.uint32(27) * _digit(x[column + step], per_step)
    value += np.uint32(9) * _digit(x[column + 2 * step], per_step)
    value += np.uint32(3) * _digit(x[column + 3 * step], per_step)
    if digits == 5:
        value += np.uint32(_digit(x[column + 4 * step], per_step))
    return np.uint8((np.uint32(value) * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@njit(cache=True, nogil=True)
def _tq1_0(weight, bits, out, scale, scale_bits):
    worst = np.uint32(0)
    for row in range(weight.shape[0]):
        x, stored = weight[row], out[row]
        for block in range(scale.shape[1]):
            scale_bits[row, block] = _top(bits[row], 256 * block)
            worst = max(worst, scale_bits[row, block])
            per_step = _inverse(scale[row, block])
            column, byte = 256 * block, 54 * block
            for m in range(32):
                stored[byte + m] = _five(x, column + m, 32, 5, per_step)
            for m in range(16):
                stored[byte + 32 + m] = _five(x, column + 160 + m, 16, 5, per_step)
            for m in range(4):
                stored[byte + 48 + m] = _five(x, column + 240 + m, 4, 4, per_step)
    return worst


@njit(cache=True, nogil=True)
def _sherry(bits, stride, out, scale, codes, eights, room):
    worst = np.uint32(0)
    count = codes.size
    size = count // 2 + count // 8 + 2
    for row in range(bits.shape[0]):
        stored = out[row]
        for number in range(scale.shape[1]):
            for i in range(SUMS):
                room.sums[i] = 0.0
            for first in range(0, count, AT_ONCE):
                _lanes(bits[row], count * number + first, AT_ONCE, stride, room.lanes)
                worst = max(worst, _choose(room.lanes, room.kept, codes[first : first + AT_ONCE]))
                _add(room.sizes, room.sums)
            scale[row, number] = F32(_total(room.sums) / (3 * count))
            byte = size * number
            for m in range(count // 2):
                stored[byte + m] = np.uint8(codes[2 * m] & np.uint8(15) | codes[2 * m + 1] << np.uint8(4))
            byte += count // 2
            for m in range(count // 8):
                signs = eights[m] >> np.uint64(4) & np.uint64(0x0101010101010101)
                stored[byte + m] = np.uint8(signs * GATHER >> np.uint64(56))
    return worst
