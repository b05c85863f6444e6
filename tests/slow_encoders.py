"""The encoders once more, block by block in plain Python, from the rules on the spec pages and not from the kernels."""

from __future__ import annotations

import struct
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal, getcontext
from fractions import Fraction

import numpy as np
import numpy.typing as npt

F32 = np.float32
Floats = npt.NDArray[np.float32]


def half_bytes(number: Floats) -> bytes:
    """float16 by Python's struct: from float64, half to even."""
    return struct.pack("<e", float(number))


def round_away(number: Floats) -> int:
    return int(Decimal(float(number)).quantize(Decimal(1), ROUND_HALF_UP))


def inverse(step: Floats) -> Floats:
    """1 / step rounded to float32 from the exact quotient; 0 where that is infinite."""
    if not step:
        return F32(0)
    with np.errstate(over="ignore"):
        found = F32(float(1 / Fraction(float(step))))
    return found if np.isfinite(found) else F32(0)


def first_peak(block: Floats) -> Floats:
    peak = block[0]
    for w in block[1:]:
        if abs(w) > abs(peak):
            peak = w
    return peak


def q8_0_twin(block: Floats) -> bytes:
    step = abs(first_peak(block)) / F32(127)
    codes = [round_away(w * inverse(step)) for w in block]
    return half_bytes(step) + bytes(code % 256 for code in codes)


def q4_0_twin(block: Floats) -> bytes:
    step = first_peak(block) / F32(-8)
    codes = [min(15, int(w * inverse(step) + F32(8.5))) for w in block]
    return half_bytes(step) + bytes(codes[j] + 16 * codes[j + 16] for j in range(16))


def tq2_0_twin(block: Floats) -> bytes:
    step = abs(first_peak(block))
    codes = [1 + round_away(w * inverse(step)) for w in block]
    out = [0] * 64
    for j, code in enumerate(codes):
        half, place, field = j // 128, j % 32, j % 128 // 32
        out[32 * half + place] += code * 4**field
    return bytes(out) + half_bytes(step)


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def log2_float32(number: Fraction) -> float:
    """log2 to 40 digits, rounded to float32."""
    getcontext().prec = 40
    exact = (Decimal(number.numerator) / Decimal(number.denominator)).ln() / Decimal(2).ln()
    return float(F32(float(exact)))


def mxfp4_twin(block: Floats) -> bytes:
    """Nearest in exact arithmetic, the first of equals, among the values that float32 has."""
    peak = Fraction(float(abs(first_peak(block))))
    scale = max(0, int(log2_float32(peak) // 1) + 125) if peak else 0
    step = Fraction(2) ** (scale - 128)
    reachable = [code for code in range(16) if abs(E2M1[code] * step) < Fraction(2) ** 128]
    codes = [min(reachable, key=lambda code: abs(E2M1[code] * step - Fraction(float(w)))) for w in block]
    return bytes([scale, *(codes[j] + 16 * codes[j + 16] for j in range(16))])


TWINS: dict[str, Callable[[Floats], bytes]] = {
    "q8_0": q8_0_twin,
    "q4_0": q4_0_twin,
    "mxfp4": mxfp4_twin,
    "tq2_0": tq2_0_twin,
}
