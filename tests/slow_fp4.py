"""The FP4 encoders once more, in plain NumPy and ml_dtypes: number by number, from the rules and not from the kernels.

Every function takes blocks, (blocks, weights) float32 or (bands, rows of a band, ...), and gives scale bytes and codes.
float64 holds every product and quotient here that decides a code, but for those which a rule rounds to float32.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = np.float32
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
LARGEST = np.finfo(F32).max


def e2m1(steps: Array) -> Array:
    """Codes of the nearest, ties to even; -0 and what rounds to it are code 8."""
    codes: Array = np.clip(steps, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes


def e4m3(numbers: Array) -> Array:
    codes: Array = np.minimum(numbers, F32(448)).astype(F32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes


def no_negative_zero(codes: Array) -> Array:
    return np.where(codes == 8, 0, codes).astype(np.uint8)


def below_zero(codes: Array, steps: Array) -> Array:
    """Code 8 for what is below zero, 0 for -0."""
    return np.where((codes == 8) & (steps == 0), 0, codes).astype(np.uint8)


def toward_zero(steps: Array) -> Array:
    """The nearest, of two the smaller; every zero is 8."""
    nearest = np.abs(np.abs(steps)[..., None] - E2M1[:8]).argmin(-1)
    return np.where(steps > 0, nearest, nearest + 8).astype(np.uint8)


def exponent(peak: float) -> int:
    """floor(log2 peak); -127 for what float32 has no normal number for."""
    return max(-127, int(np.frexp(peak)[1]) - 1) if peak else -127


def ordered_sum(terms: Array) -> Array:
    """float32 sums along the last axis: fours as (0 + 1) + (2 + 3), added in turn."""
    fours = terms.reshape(*terms.shape[:-1], -1, 4)
    pairs = fours[..., 0::2] + fours[..., 1::2]
    total = np.zeros(terms.shape[:-1], F32)
    for i in range(fours.shape[-2]):
        total = total + (pairs[..., i, 0] + pairs[..., i, 1])
    return total


def squared_error(size: Array, per_step: Array, counts: Array) -> Array:
    """float32: the sum of squared misses in steps, each times what it counts."""
    with np.errstate(over="ignore", invalid="ignore"):
        steps = size * per_step[..., None]
        miss = steps - np.minimum(steps, 6).astype(ml_dtypes.float4_e2m1fn).astype(F32)
        return ordered_sum(miss * miss * counts)


# ---------------------------------------------------------------- MXFP4, blocks (blocks, 32)


def mx_codes(rule: str, block: Array, scale: int) -> Array:
    steps = (block.astype(np.float64) * 2.0 ** (127 - scale)).astype(F32)  # exact, or far below any bound
    if rule == "torchao" and scale == 0:
        steps = (block.astype(np.float64) * 2.0**126).astype(F32)
    if rule == "modelopt":
        return toward_zero(steps)
    codes = e2m1(steps)
    if rule == "best":
        return no_negative_zero(codes)
    return below_zero(codes, steps) if rule == "compressed-tensors" else codes


def mx_scale(rule: str, block: Array, counts: Array) -> int:
    peak = float(np.abs(block).max())
    power = exponent(peak)
    if rule == "modelopt":
        with np.errstate(divide="ignore"):
            found = np.ceil(F32(np.log2(np.float64(F32(peak) / F32(6)))))
        return int(np.clip(found + 127, 0, 252))
    if rule == "compressed-tensors" and power > -127 and peak >= 1.75 * 2.0**power:
        power += 1
    scale = min(max(power - 2 + 127, 0), 252)
    if rule == "best" and scale < 252:
        low, high = (squared_error(np.abs(block), np.array(F32(2.0 ** (127 - s))), counts) for s in (scale, scale + 1))
        scale += int(4 * high < low)
    return scale


def mxfp4(weight: Array, rule: str, importance: Array | None = None) -> dict[str, Array]:
    counts = np.broadcast_to(F32(1) if importance is None else normalized(importance), weight.shape)
    blocks, counted = weight.reshape(-1, 32), counts.reshape(-1, 32)
    scale = [mx_scale(rule, b, c) for b, c in zip(blocks, counted, strict=True)]
    codes = [mx_codes(rule, b, s) for b, s in zip(blocks, scale, strict=True)]
    return {
        "codes": np.reshape(codes, weight.shape).astype(np.uint8),
        "scale": np.reshape(scale, (len(weight), -1)).astype(np.uint8),
    }


def normalized(importance: Array) -> Array:
    """Times the power of two that takes the largest below 1."""
    return (importance.astype(np.float64) * 2.0 ** -int(np.frexp(importance.max())[1])).astype(F32)


# ---------------------------------------------------------------- NVFP4, blocks (blocks, 16 * rows)


def power_of_two(peak: float) -> float:
    powers = [2.0**k for k in range(-126, 127)]
    return next((p for p in powers if 2688 * p >= peak), powers[-1]) if peak else 1.0


def nv_global(rule: str, peak: float) -> np.float32:
    """As the rule keeps it: compressed-tensors' divides."""
    largest = F32(min(peak, LARGEST * (1 - 2.0**-20)))
    with np.errstate(divide="ignore", over="ignore"):
        if rule in ("best", "tiles"):
            return F32(power_of_two(peak))
        if rule == "compressed-tensors":
            found = F32(2688) * (F32(1) / largest)
        else:
            found = largest / F32(1536 if rule == "four_over_six" else 2688)
        unusable = np.isinf(F32(1) / found) and rule != "modelopt"
    return F32(1) if rule == "ggml" or not found or unusable or np.isinf(found) else found


def least_error(blocks: Array, counts: Array, per_global: np.float32, tries: Array) -> Array:
    """(blocks,) of the scale codes (n, blocks) the first with the least error; the first where none is a number."""
    size = np.abs(blocks) * per_global
    number = E4M3[tries].astype(F32)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = squared_error(size, F32(1) / number, counts) * (number * number)
    errors = np.where(np.isnan(errors), np.inf, errors)
    return np.take_along_axis(tries, errors.argmin(0)[None], 0)[0]


def nv_scales(rule: str, blocks: Array, shared: np.float32, counts: Array) -> Array:
    peak = np.abs(blocks).max(1)
    most = max(c for c in range(127) if 6 * E4M3[c] * float(shared) <= LARGEST)
    if rule in ("best", "tiles"):
        rounded = e4m3(peak / shared / F32(6)).astype(int)
        tries = np.clip(rounded + np.array([0, -2, -1, 1, 2, 3, 4, 5, 6])[:, None], 1, most)
        return np.where(peak == 0, 0, least_error(blocks, counts, 1 / shared, tries))
    if rule == "four_over_six":
        tries = np.clip(np.stack([e4m3(peak / shared / F32(m)) for m in (6, 4)]), 1, most)
        return np.where(peak == 0, 0, least_error(blocks, counts, 1 / shared, tries))
    if rule == "compressed-tensors":
        found = e4m3(shared * (peak / F32(6)))
        return np.where(found == 0, 0x20, found)
    if rule == "modelopt":
        scaled = peak / (F32(6) * shared)
        return e4m3(np.maximum(np.where(scaled == 0, F32(1), scaled), F32(2.0**-9)))
    if rule == "torchao":
        return e4m3(np.maximum(peak / F32(6) / shared, F32(2.0**-6)))
    return np.array([ggml_e4m3(p / F32(6)) for p in peak])


def ggml_e4m3(number: np.float32) -> int:
    """Half up to three bits of fraction, but from 248 on 448, and no subnormal above 7."""
    if number >= 248:
        return 126
    if number < 2.0**-6:
        return min(7, int(F32(number * F32(512)) + F32(0.5)))
    power = exponent(float(number))
    eighths = int(float(number) / 2.0 ** (power - 3) + 0.5)  # 8 to 16; 16 is the next power
    return 8 * (power + 7) + eighths - 8


def nv_codes(rule: str, blocks: Array, scale: Array, shared: np.float32) -> Array:
    number = E4M3[scale].astype(F32)[:, None]
    with np.errstate(all="ignore"):
        if rule == "ggml":
            half = F32(0.5) * number
            order = [*range(8), *range(9, 16)]  # code 8 is a second zero and never the first
            errors = np.abs((2 * E2M1[order]).astype(F32) * half[..., None] - blocks[..., None])
            return np.array(order, np.uint8)[errors.argmin(-1)]
        if rule == "torchao":
            return e2m1(blocks * np.minimum(F32(1) / shared / number, LARGEST))
        step = number / shared if rule == "compressed-tensors" else number * shared
        steps = np.where(step == 0, np.copysign(F32(0), blocks), blocks / step)
    codes = e2m1(steps)
    return below_zero(codes, steps) if rule in ("compressed-tensors", "modelopt") else no_negative_zero(codes)


def nvfp4(
    weight: Array, rule: str, plain: bool = False, importance: Array | None = None, peak: float | None = None
) -> dict[str, Array]:
    """The global scale as the rule keeps it. Rows of tiles are filled up with zeros, which cost nothing."""
    rows = 16 if rule == "tiles" else 1
    counts = np.broadcast_to(F32(1) if importance is None else normalized(importance), weight.shape)
    blocks, counted = (as_tiles(a, rows) for a in (weight, counts))
    found = float(np.abs(weight).max()) if peak is None else peak
    shared = F32(1) if plain else nv_global(rule, found)
    scale = nv_scales(rule, blocks, shared, counted)
    codes = nv_codes(rule, blocks, scale, shared)
    bands = -(-len(weight) // rows)
    back = codes.reshape(bands, -1, rows, 16).transpose(0, 2, 1, 3).reshape(bands * rows, -1)
    return {
        "codes": back[: len(weight)].astype(np.uint8),
        "scale": np.repeat(scale.reshape(bands, -1), rows, 0)[: len(weight)].astype(np.uint8),
        "global_scale": np.array([shared], F32),
    }


def as_tiles(weight: Array, rows: int) -> Array:
    """(bands, rows, blocks, 16) as (bands * blocks, rows * 16)."""
    whole = np.zeros((-(-len(weight) // rows) * rows, weight.shape[1]), F32)
    whole[: len(weight)] = weight
    return whole.reshape(-1, rows, weight.shape[1] // 16, 16).transpose(0, 2, 1, 3).reshape(-1, rows * 16)


# ---------------------------------------------------------------- what was packed, as numbers


def decode_mx(parts: dict[str, Array]) -> Array:
    step = parts["scale"].view(ml_dtypes.float8_e8m0fnu).astype(F32)
    return E2M1[parts["codes"]].astype(F32) * np.repeat(step, 32, 1)


def decode_nv(parts: dict[str, Array], divides: bool = False) -> Array:
    number, shared = E4M3[parts["scale"]].astype(F32), parts["global_scale"][0]
    step = number / shared if divides else number * shared
    return E2M1[parts["codes"]].astype(F32) * np.repeat(step, 16, 1)
