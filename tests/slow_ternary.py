"""The ternary formats once more, weight by weight in plain Python, from their descriptions and not from the kernels."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

F32 = np.float32
Floats = npt.NDArray[np.float32]


def half(number: float) -> bytes:
    """float16 by Python's struct: half to even. OverflowError if it becomes infinite."""
    return struct.pack("<e", float(number))


def from_half(two: bytes) -> float:
    return float(struct.unpack("<e", two)[0])


# ---------------------------------------------------------------- Sherry


# The 32 quads as STQ1_0's codebook has them: two bits a lane, lane p at bits 2 p, 0, 1, 2 for -1, 0, 1;
# llama.cpp pull request 22836, ggml-common.h stq1_0 codebook, the sixteen of sign 0 and then those of sign 1
CODEBOOK = bytes.fromhex("a9892909a68626069a921a126a624a42012181a1042484a41018909840486068")
QUADS = [tuple((entry >> 2 * lane & 3) - 1 for lane in range(4)) for entry in CODEBOOK]


def quad_columns(quad: int, stride: int) -> list[int]:
    """Where the four lanes of a quad lie: next to each other, or 16 apart in a chunk of 64."""
    if stride == 1:
        return [4 * quad + lane for lane in range(4)]
    return [quad // 16 * 64 + quad % 16 + 16 * lane for lane in range(4)]


def sherry_steps(block: bytes, weights: int, stride: int) -> tuple[list[int], bytes]:
    """A block's steps, and its scale as stored."""
    quads = weights // 4
    steps = [0] * weights
    for quad in range(quads):
        low = block[quad // 2] >> 4 * (quad % 2) & 15
        high = block[quads // 2 + quad // 8] >> quad % 8 & 1
        for column, step in zip(quad_columns(quad, stride), QUADS[16 * high + low], strict=True):
            steps[column] = step
    return steps, block[-2:]


def zero_lane(four: Sequence[float]) -> int:
    """The first of the smallest magnitudes."""
    return min(range(4), key=lambda lane: (abs(four[lane]), lane))


def sherry_choice(weights: Sequence[float], stride: int) -> tuple[list[int], float]:
    """Codes, and the mean of the magnitudes kept, summed as the kernel says: sixteen sums, in order."""
    codes, sums = [], [0.0] * 16
    quads = len(weights) // 4
    for quad in range(quads):
        four = [float(weights[c]) for c in quad_columns(quad, stride)]
        zero = zero_lane(four)
        steps = tuple(0 if lane == zero else -1 if w < 0 else 1 for lane, w in enumerate(four))
        codes.append(QUADS.index(steps))
        a, b, c, d = (abs(w) for w in four)
        sums[quad % 16] += (max(a, b) + max(c, d)) + max(min(a, b), min(c, d))
    total = sums[0]
    for more in sums[1:]:
        total += more
    return codes, float(F32(total / (3 * quads)))


def sherry_block(weights: Sequence[float], stride: int) -> bytes:
    """Encode a block: nibbles, signs, scale."""
    codes, mean = sherry_choice(weights, stride)
    nibbles, signs = bytearray(len(codes) // 2), bytearray(len(codes) // 8)
    for quad, code in enumerate(codes):
        nibbles[quad // 2] += (code & 15) * 16 ** (quad % 2)
        signs[quad // 8] += (code >> 4) * 2 ** (quad % 8)
    return bytes(nibbles) + bytes(signs) + half(mean)


def sherry_error(weights: Sequence[float], codes: Sequence[int], stride: int, cost: Sequence[float]) -> Fraction:
    """The least sum of cost * error**2 over all scales, exactly, for codes that have the signs of what they keep.

    It is sum(cost w**2) - sum(cost |w|)**2 / sum(cost), the latter two over what is kept.
    """
    whole = sum(Fraction(float(c)) * Fraction(float(w)) ** 2 for c, w in zip(cost, weights, strict=True))
    total, weight = Fraction(0), Fraction(0)
    for quad, code in enumerate(codes):
        for column, step in zip(quad_columns(quad, stride), QUADS[code], strict=True):
            if step:
                total += Fraction(float(cost[column])) * abs(Fraction(float(weights[column])))
                weight += Fraction(float(cost[column]))
    return whole - total * total / weight if weight else whole


# ---------------------------------------------------------------- base 3 and two bits


def base3_columns(byte: int) -> list[int]:
    """The columns of a tq1_0 block whose digits a byte holds, most significant first."""
    if byte < 32:
        return [byte + 32 * n for n in range(5)]
    if byte < 48:
        return [160 + byte - 32 + 16 * n for n in range(5)]
    return [240 + byte - 48 + 4 * n for n in range(4)]


def base3_byte(digits: Sequence[int]) -> int:
    """ceil(256 * value / 243) of five digits; absent ones are 0."""
    value = 0
    for place in range(5):
        value = 3 * value + (digits[place] if place < len(digits) else 0)
    return -(-256 * value // 243)


def base3_digit(byte: int, place: int) -> int:
    """Digit `place` of a byte: what the fraction byte / 256 has there."""
    return byte * 3**place % 256 * 3 // 256


def tq1_0_steps(block: bytes) -> tuple[list[int], bytes]:
    steps = [0] * 256
    for byte in range(52):
        for place, column in enumerate(base3_columns(byte)):
            steps[column] = base3_digit(block[byte], place) - 1
    return steps, block[52:]


def tq2_0_steps(block: bytes) -> tuple[list[int], bytes]:
    columns = [(c // 128 * 32 + c % 32, c % 128 // 32) for c in range(256)]
    return [(block[byte] >> 2 * field & 3) - 1 for byte, field in columns], block[64:]


def tq1_0_block(steps: Sequence[int], scale: bytes) -> bytes:
    return bytes(base3_byte([steps[c] + 1 for c in base3_columns(byte)]) for byte in range(52)) + scale


# ---------------------------------------------------------------- least error


def least_ternary_error(weights: Sequence[float]) -> Fraction:
    """The least squared error of all ternary vectors and scales, exactly: some k of the largest are kept."""
    sizes = sorted((abs(Fraction(float(w))) for w in weights), reverse=True)
    whole = sum(s * s for s in sizes)
    return min(whole - sum(sizes[:k]) ** 2 / k for k in range(1, len(sizes) + 1))


def ternary_error(weights: Sequence[float], steps: Sequence[int]) -> Fraction:
    """The least squared error of these steps over all scales, exactly."""
    w, t = [Fraction(float(x)) for x in weights], [Fraction(int(s)) for s in steps]
    dot, length = sum(a * b for a, b in zip(w, t, strict=True)), sum(b * b for b in t)
    return sum(a * a for a in w) - (dot * dot / length if length else 0)
