"""Choose FP4 codes and block scales: MXFP4 (32 weights, a power of two) and NVFP4 (16 weights, E4M3, one global scale).

A door takes (rows, cols) float32, finite and filling whole blocks, and returns the parts of its layout. All arithmetic
is float32, each operation rounding on its own, and sums have a fixed order (`_errors`), so neither the number of
threads nor the width of vectors can change a bit. The plain loops say what is done; those over vectors do the same.

`best` looks for the least squared error. The other rules are other people's encoders, byte for byte: which scale a
block gets (the NumPy functions below), which way ties go, and which weights become code 8, the negative zero.

At the ends they differ from upstream, for no code may decode to an infinity: MXFP4's scale bytes stop at 252
(6 * 2**125, so for peaks above 1.5 * 2**127), a global scale is that of a peak of (1 - 2**-20) * 2**128 at most, and
where upstream's global scale is zero, or infinite, or has an infinite reciprocal that it uses, it is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.kernels import simd, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.quantize import (
    AHEAD,
    NO_NUMBER,
    VERSION,
    Places,
    _e2m1,
    _put_codes,
)
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    as_floats,
    divf,
    e4m3_to_float,
    ints_of,
    larger,
    largest_lane,
    load_bytes16,
    load_floats16,
    load_ints16,
    low_bytes,
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
    turn,
    widen,
    zero_floats,
    zero_ints,
)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

F32 = np.float32
RUN = 16  # weights that every loop takes together; MXFP4's block is two runs
LANES = 32  # blocks side by side, so that a vector holds one weight of each
CHUNK = 1 << 17  # weights that stay in a core's cache from one step to the next
LEAST_WEIGHTS = 1 << 16  # weights worth a thread

ZERO, HALF, ONE, FOUR, SIX = F32(0), F32(0.5), F32(1), F32(4), F32(6)
EXPONENT_BITS, EXPONENT_22 = np.uint32(0x7F800000), np.uint32(22 << 23)
BITS_OF_2_22 = np.uint32(127 + 22 << 23)
MAGNITUDE = np.uint32(0x7FFFFFFF)  # a float32 without its sign
INFINITE = F32(np.inf)
LARGEST = F32(np.finfo(F32).max)
LEAST, LEAST_INVERTED = F32(2.0**-149), F32(2.0**-128 + 2.0**-149)  # above 0; with a finite reciprocal
MOST_PEAK = F32(LARGEST * F32(1 - 2.0**-20))  # a global scale from a larger peak could round to an infinity

MIDDLES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], F32)  # between float4_e2m1fn's magnitudes
EVEN = MIDDLES.copy()  # a weight above bound i has a code above i
EVEN[1::2] = np.nextafter(MIDDLES[1::2], ZERO)  # these ties go up, to the even code
E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], F32)

MX_MOST = 252  # 6 * 2**(253 - 127) is no float32
E4M3_MOST = 126  # 448
E4M3 = np.array([(8 * (c > 7) + c % 8) * 2.0 ** (max(c // 8, 1) - 10) for c in range(E4M3_MOST + 1)], F32)
PER_E4M3 = np.concatenate([[ZERO], ONE / E4M3[1:]])  # no errors are compared with a scale of 0
# scale codes tried, from the rounded one; of equals the first
WINDOW = np.array([0, -2, -1, 1, 2, 3, 4, 5, 6])
ALONE = WINDOW[:1]

ONES = np.ones(LANES, F32)
NONE = np.uint32(0xFFFFFFFF)
SIGN_AT, THREE = np.uint32(31), np.uint8(3)


class Rounding(NamedTuple):
    """How weights become codes."""

    bounds: Floats  # EVEN: ties to even; MIDDLES: ties toward zero
    negative: np.float32  # scaled weights below this have the sign bit
    keep_sign: np.uint8 = np.uint8(0)  # 1: so have all with a sign, -0 too
    times: bool = False  # scaled by the product with a reciprocal, not by a division


NO_NEGATIVE_ZERO = Rounding(EVEN, F32(-0.25))  # what rounds to zero loses its sign: all layouts hold the same number
BELOW_ZERO = Rounding(EVEN, ZERO)  # -tiny is code 8, -0 is code 0
SIGNED = Rounding(EVEN, ZERO, np.uint8(1))  # -tiny and -0 are code 8
SIGNED_TIMES = Rounding(EVEN, ZERO, np.uint8(1), True)
NOT_POSITIVE = Rounding(MIDDLES, LEAST)  # every zero is code 8


# ---------------------------------------------------------------- MXFP4


def mxfp4(weight: Floats, rule: str = "best", importance: Floats | None = None) -> dict[str, np.ndarray]:
    """32 weights share a power of two.

    - `best`: of the exponents that put the peak at 4 to 8 and at 2 to 4, the one of less squared error, of equals
      the first; ties to even; never code 8. Gaussian and heavy-tailed weights had no block for which a third is better
    - `ocp`: the peak at 4 to 8 (MX v1.0, section 6.3), ties to even, every sign kept
    - `torchao`: so too, but scale byte 0 divides by 2**-126 (0.18.0, mx_tensor.py `to_mx`, FLOOR)
    - `compressed-tensors`: the peak at 3.5 to 7; ties to even, -0 is code 0 (0.20.0, mxfp_utils.py)
    - `modelopt`: the peak at 3 to 6, ties toward zero, every zero is code 8 (0.47.0, mxfp4_tensor.py)

    Parameters
    ----------
    weight : (rows, cols) float32, cols a multiple of 32
    rule : one of those above
    importance : (cols,) or (rows, cols), not negative: what a squared error counts; for `best` only

    Returns
    -------
    codes (rows, cols) uint8 below 16; scale (rows, cols / 32) uint8, float8_e8m0fnu's exponent, at most 252;
    a block of zeros has scale 0

    Raises
    ------
    LayoutError
        If the rule is unknown or takes no importance.
    """
    if rule not in MX_RULES:
        raise LayoutError(f"mxfp4: no rule is called {rule!r}; there are {', '.join(MX_RULES)}")
    exponents, rounding = MX_RULES[rule]
    weigh = _importance("mxfp4", rule, weight, importance)
    rows, cols = weight.shape
    codes = np.empty((rows, cols), np.uint8)
    scale = np.empty((rows, cols // 32), np.uint8)
    if rule == "best" and not simd.INTERPRETED:
        _best(weight, weigh, Places(codes.reshape(-1), 0, 32, scale.reshape(-1), 0, 1, False))
        return {"codes": codes, "scale": scale}

    def work(start: int, stop: int) -> None:
        part, found = weight[start:stop], scale[start:stop]
        runs = _peaks(part, 1)
        found[:] = exponents(np.maximum(runs[:, ::2], runs[:, 1::2]))
        if rule == "best":
            counts, factor = _rows(weigh, start, stop, 32), np.ldexp(ONE, 127 - found.astype(np.int32))
            _lesser_error(_blocks(part, 32), counts, factor, *_room(weigh, 2)[:2], found)
        step = np.ldexp(ONE, np.maximum(found, rule == "torchao").astype(np.int32) - 127)
        _encode(part, np.repeat(step, 2, axis=1), 1, rounding, codes[start:stop])

    _share(work, weight, 1)
    return {"codes": codes, "scale": scale}


def mxfp4_records(weight: Floats) -> dict[str, np.ndarray] | None:
    """(rows, cols) float32 -> the blocks of ggml that packing the parts of rule `best` gives; None if not finite."""
    if simd.INTERPRETED:
        return None
    rows, cols = weight.shape
    out = np.empty((rows, cols // 32 * 17), np.uint8)
    flat = out.reshape(-1)
    return {"blocks": out} if _best(weight, None, Places(flat, 1, 17, flat, 0, 17, True)) < NO_NUMBER else None


def _best(weight: Floats, weigh: Floats | None, places: Places) -> int:
    """The rule `best` for all blocks; the bits of the largest magnitude."""
    flat, tops = np.ascontiguousarray(weight).reshape(-1), [0]
    counts = None if weigh is None else np.ascontiguousarray(weigh).reshape(-1)

    def work(start: int, stop: int) -> None:
        tops.append(int(_best_mx(flat, counts, start, stop, _desk(2 * RUN), places)))

    threads.spread(work, len(flat) // 32, LEAST_WEIGHTS // 32)
    return max(tops)


def _floor(peak: Floats) -> Bytes:
    """The peak's own exponent puts it at 4 to 8; a subnormal counts as the next below 2**-126."""
    return (np.maximum(peak.view(np.uint32) >> 23, 2) - 2).astype(np.uint8)


def _even(peak: Floats) -> Bytes:
    """So too, after rounding up what is 1.75 of a power of two or more."""
    exponent = (peak.view(np.uint32) + np.uint32(1 << 21)) >> 23
    return np.minimum(np.maximum(exponent, 2) - 2, MX_MOST).astype(np.uint8)


def _ceiling(peak: Floats) -> Bytes:
    """The peak at most at 6; float64 first, for libraries differ in the last bit of their float32 logarithms."""
    with np.errstate(divide="ignore"):
        exponent = np.ceil(np.log2((peak / SIX).astype(np.float64)).astype(F32))
    return (np.clip(exponent, -127, MX_MOST - 127) + 127).astype(np.uint8)


MX_RULES: dict[str, tuple[Callable[[Floats], Bytes], Rounding]] = {
    "best": (_floor, NO_NEGATIVE_ZERO),
    "ocp": (_floor, SIGNED),
    "torchao": (_floor, SIGNED),
    "compressed-tensors": (_even, BELOW_ZERO),
    "modelopt": (_ceiling, NOT_POSITIVE),
}


# ---------------------------------------------------------------- NVFP4


def nvfp4(
    weight: Floats,
    rule: str = "best",
    divides: bool = False,
    plain: bool = False,
    block_rows: int = 1,
    importance: Floats | None = None,
    peak: float | None = None,
) -> dict[str, np.ndarray]:
    """16 weights share an E4M3 scale, all of them a float32 one.

    - `best`: of the scale codes from 2 below to 6 above the rounded peak / 6 (1 to 126) the one of least squared
      error, of equals the rounded one, else the smallest; ties to even; never code 8. The global scale is
      the smallest power of two that keeps the scales at 448 or below
    - `tiles`: the same with one scale for 16 x 16 weights, repeated in each of the 16 rows
    - `four_over_six`: a peak of 6 or, if that has the less squared error, of 4; peak / 1536; never code 8
      (the rule of fouroversix dadfad6, quantize/pytorch/reference.py, whose sums have another order)
    - `compressed-tensors`: 2688 / peak divides; a scale of 0 becomes 0.125 (0.20.0, helpers.py)
    - `modelopt`: peak / 2688; scales of 2**-9 and above, a block of zeros has 1 (0.47.0, nvfp4_tensor.py)
    - `torchao`: peak / 2688; scales of 2**-6 and above, products with reciprocals, every sign kept (0.18.0)
    - `ggml`: quantize_row_nvfp4_ref, which has no global scale, rounds scales half up and never to 256 ... 416,
      and takes the first of the nearest codes (d99724f2, ggml-quants.c)

    Parameters
    ----------
    weight : (rows, cols) float32, cols a multiple of 16
    rule : one of those above
    divides : the global scale is for division, not for multiplication
    plain : there is no global scale, it is 1
    block_rows : rows that share a scale, for `best`
    importance : (cols,) or (rows, cols), not negative: what a squared error counts; for rules that compare errors
    peak : the largest magnitude of all weights that share the global scale, if these are not all

    Returns
    -------
    codes (rows, cols) uint8 below 16; scale (rows, cols / 16) uint8, float8_e4m3fn's bytes, at most 126;
    global_scale (1,) float32

    Raises
    ------
    LayoutError
        If the rule is unknown, takes no importance or no rows, or `peak` is below a weight's magnitude.
    """
    if rule not in NV_RULES:
        raise LayoutError(f"nvfp4: no rule is called {rule!r}; there are {', '.join(NV_RULES)}")
    chosen = NV_RULES[rule]
    block_rows = 16 if rule == "tiles" else block_rows
    if (block_rows != 1 and chosen.window is None) or block_rows < 1:
        raise LayoutError(f"nvfp4: {block_rows} rows share a scale, which only the rule best can choose, 1 or more")
    weigh = _importance("nvfp4", rule, weight, importance)
    peaks = _peaks(weight, block_rows)
    found = peaks.max(initial=ZERO)
    if peak is not None and not found <= peak <= LARGEST:
        raise LayoutError(f"nvfp4: the peak is given as {peak}, needs a finite number of {found} or more")
    found = F32(1) if plain else min(found if peak is None else F32(peak), MOST_PEAK)
    shared = ONE if plain else chosen.shared(found)  # as the rule has it
    rows, cols = weight.shape
    codes = np.empty((rows, cols), np.uint8)
    scale = np.empty((-(-rows // block_rows), cols // RUN), np.uint8)

    def work(start: int, stop: int) -> None:
        inside = slice(start * block_rows, min(stop * block_rows, rows))
        counts = _rows(weigh, inside.start, inside.stop, RUN)
        part = weight[inside], counts, peaks[start:stop], shared, block_rows, codes[inside]
        scale[start:stop] = chosen.choose(*part)

    _share(work, weight, block_rows)
    if chosen.divides != divides:
        with np.errstate(over="ignore"):
            shared = min(ONE / shared, LARGEST)
    return {
        "codes": codes,
        "scale": scale if block_rows == 1 else np.repeat(scale, block_rows, axis=0)[:rows],
        "global_scale": np.array([shared], F32),
    }


class Rule(NamedTuple):
    """An NVFP4 encoder: its global scale, its block scales and its rounding."""

    shared: Callable[[np.float32], np.float32]  # global scale of a peak, finite and not 0
    divides: bool
    peaks: tuple[float, ...]  # how many steps the peak of a block is, each to be tried
    scales: Callable[[Floats, np.float32, float], Bytes]  # scale codes of peaks
    rounding: Rounding | None  # None: the first of the nearest codes, as ggml finds it
    window: np.ndarray | None = None  # codes to try beside those; the least error decides

    def choose(
        self, weight: Floats, weigh: Floats | None, peaks: Floats, shared: np.float32, block_rows: int, codes: Bytes
    ) -> Bytes:
        """The codes of some rows, into `codes`, and their scales, one a block of rows."""
        scale = self.scales(peaks, shared, self.peaks[0])
        if self.window is not None:
            most = int(np.count_nonzero(6.0 * E4M3.astype(np.float64) * float(shared) <= float(LARGEST))) - 1
            least = np.full(peaks.shape, INFINITE, F32)
            for steps in self.peaks:
                rounded = scale.copy() if steps == self.peaks[0] else self.scales(peaks, shared, steps)
                _pick(weight, weigh, ONE / shared, block_rows, rounded, self.window, most, least, scale)
            scale[peaks == 0] = 0
        if self.rounding:
            step = self.steps(shared, self.rounding.times)[scale]
            _encode(weight, step, block_rows, self.rounding, codes)
        else:
            _first_nearest(_blocks(weight, RUN), E4M3[scale] * HALF, E2M1_TWICE, _blocks(codes, RUN))
        return scale

    def steps(self, shared: np.float32, times: bool) -> Floats:
        """What a code of 1 stands for, by scale (its reciprocal, for products); where it is 0, every code must be."""
        number = E4M3
        with np.errstate(divide="ignore", over="ignore"):
            if times:
                return np.minimum((ONE / shared) / number, LARGEST)
            step = number / shared if self.divides else number * shared
        return np.where(step == 0, INFINITE, step)


def _power(peak: np.float32) -> np.float32:
    """The smallest power of two that is peak / 2688 or more, of those whose reciprocal is a normal number, too."""
    part, exponent = np.frexp(np.float64(peak) / 2688)
    return F32(2.0 ** np.clip(exponent - (part == 0.5), -126, 126)) if peak else ONE


def _quotient(numbers: int, least: np.float32 = LEAST_INVERTED) -> Callable[[np.float32], np.float32]:
    """peak / numbers, or 1 where that is below `least`."""

    def shared(peak: np.float32) -> np.float32:
        found = peak / F32(numbers)
        return found if found >= least else ONE

    return shared


def _inverse_quotient(peak: np.float32) -> np.float32:
    """2688 times 1 / peak, for that is how torch divides a number by a tensor; 1 where it is infinite."""
    with np.errstate(over="ignore", divide="ignore"):
        found = F32(2688) * (ONE / peak)
    return found if found <= LARGEST else ONE


def _e4m3(numbers: Floats) -> Bytes:
    """The codes of non-negative numbers, round half to even; above 448 it is 448."""
    numbers = np.minimum(numbers, E4M3[E4M3_MOST])
    bits = numbers.view(np.uint32)
    normal = (bits + (0x7FFFF + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3)
    return np.where(numbers < E4M3[8], np.rint(numbers * F32(512)), normal).astype(np.uint8)


def _e4m3_of_ggml(numbers: Floats) -> Bytes:
    """The codes of ggml_fp32_to_ue4m3: half up, 448 from 248 on, subnormals below 2**-6 only."""
    numbers = np.minimum(numbers, E4M3[E4M3_MOST])
    bits = numbers.view(np.uint32)
    normal = (bits + (1 << 19) >> 20) - ((127 - 7) << 3)
    small = np.minimum((numbers * F32(512) + HALF).astype(np.int32), 7)
    return np.where(numbers < E4M3[8], small, np.where(normal >= 15 << 3, E4M3_MOST, normal)).astype(np.uint8)


def _nearest_scale(peaks: Floats, shared: np.float32, steps: float) -> Bytes:
    return _e4m3(peaks / shared / F32(steps))


def _never_zero(peaks: Floats, shared: np.float32, steps: float) -> Bytes:
    found = _e4m3(shared * (peaks / F32(steps)))
    found[found == 0] = 0x20  # 0.125
    return found


def _from_least(peaks: Floats, shared: np.float32, steps: float) -> Bytes:
    found = peaks / (F32(steps) * shared)
    found[found == 0] = 1
    return _e4m3(np.maximum(found, E4M3[1]))


def _from_normal(peaks: Floats, shared: np.float32, steps: float) -> Bytes:
    return _e4m3(np.maximum(peaks / F32(steps) / shared, E4M3[8]))


def _ggml_scale(peaks: Floats, _: np.float32, steps: float) -> Bytes:
    return _e4m3_of_ggml(peaks / F32(steps))


NV_RULES = {
    "best": Rule(_power, False, (6,), _nearest_scale, NO_NEGATIVE_ZERO, WINDOW),
    "tiles": Rule(_power, False, (6,), _nearest_scale, NO_NEGATIVE_ZERO, WINDOW),
    "four_over_six": Rule(_quotient(6 * 256), False, (6, 4), _nearest_scale, NO_NEGATIVE_ZERO, ALONE),
    "compressed-tensors": Rule(_inverse_quotient, True, (6,), _never_zero, BELOW_ZERO),
    "modelopt": Rule(_quotient(6 * 448, LEAST), False, (6,), _from_least, BELOW_ZERO),
    "torchao": Rule(_quotient(6 * 448), False, (6,), _from_normal, SIGNED_TIMES),
    "ggml": Rule(lambda _: ONE, False, (6,), _ggml_scale, None),
}


# ---------------------------------------------------------------- what the doors share


def _importance(name: str, rule: str, weight: Floats, importance: Floats | None) -> Floats | None:
    """What the errors count, (rows, cols) float32 of at most 1, so that no sum of errors overflows."""
    if importance is None:
        return None
    if rule not in ("best", "tiles", "four_over_six"):
        raise LayoutError(f"{name}: the rule {rule} compares no errors, so it takes no importance")
    counts = np.asarray(importance, F32)
    if (
        counts.shape not in (weight.shape, (1, weight.shape[1]), weight.shape[-1:])
        or not (np.isfinite(counts) & (counts >= 0)).all()
    ):
        raise LayoutError(
            f"{name}: importance of shape {counts.shape}, needs finite numbers of 0 or more, "
            f"{weight.shape[-1:]} or {weight.shape}"
        )
    exponent = np.frexp(counts.max(initial=ZERO))[1]
    return np.broadcast_to(np.ldexp(counts, -exponent), weight.shape)


def _rows(values: Floats | None, start: int, stop: int, block: int) -> Floats | None:
    return None if values is None else _blocks(values[start:stop], block)


def _blocks(values: np.ndarray, block: int) -> np.ndarray:
    """(rows, cols) as (rows, blocks, weights of a block): no index of a loop can then seem to be negative."""
    return values.reshape(len(values), values.shape[1] // block, block)


def _room(weigh: Floats | None, runs: int) -> tuple[tuple[Any, ...], tuple[Floats, ...], tuple[np.ndarray, ...]]:
    """Room for blocks of some runs side by side and for what their errors count, and for six numbers a block."""
    tile, counts = (np.zeros((runs * RUN, LANES), F32) for _ in range(2))
    numbers, choices = tuple(np.zeros((4, LANES), F32)), tuple(np.zeros((2, LANES), np.uint32))
    return (tile, None if weigh is None else counts), numbers, choices


def _peaks(weight: Floats, block_rows: int) -> Floats:
    """The largest magnitude of each block of 16 columns: (ceil(rows / block_rows), cols / 16)."""
    rows, cols = weight.shape
    peaks = np.zeros((-(-rows // block_rows), cols // RUN), np.uint32)
    bits = weight.view(np.uint32)

    def work(start: int, stop: int) -> None:
        _run_peaks(bits[start * block_rows : stop * block_rows], block_rows, peaks[start:stop])

    _share(work, weight, block_rows)
    return peaks.view(F32)


def _pick(
    weight: Floats,
    weigh: Floats | None,
    factor: np.float32,
    block_rows: int,
    rounded: Bytes,
    window: np.ndarray,
    most: int,
    least: Floats,
    scale: Bytes,
) -> None:
    """Of the scale codes rounded + window, 1 to most, the first with the least error, if that is below `least`."""
    if simd.INTERPRETED:
        tries = np.clip(np.arange(E4M3_MOST + 1) + window[:, None], 1, most).astype(np.uint8)
        of_codes, runs, room = (tries, E4M3[tries], PER_E4M3[tries]), _blocks(weight, RUN), _room(weigh, block_rows)
        return _least_error(runs, weigh, factor, block_rows, rounded, of_codes, *room, least, scale)
    flat, (rows, cols) = np.ascontiguousarray(weight).reshape(-1), weight.shape
    counts = None if weigh is None else np.ascontiguousarray(weigh).reshape(-1)
    if block_rows == 1:  # blocks of all rows may then lie side by side
        rows, cols = 1, flat.size
        rounded, least, scale = rounded.reshape(1, -1), least.reshape(1, -1), scale.reshape(1, -1)
    desk = _desk(RUN * block_rows)
    _least_error_vectors(flat, counts, rows, cols, factor, block_rows, rounded, window, most, desk, least, scale)


def _encode(weight: Floats, step: Floats, block_rows: int, rounding: Rounding, codes: Bytes) -> None:
    """Codes of weights whose runs of 16, `block_rows` rows of them, have these steps."""
    if not simd.INTERPRETED:
        flat, bounds = np.ascontiguousarray(weight).reshape(-1), rounding.bounds.view(np.int32)
        return _codes_vectors(flat, len(weight), step, block_rows, bounds, *rounding[1:], codes.reshape(-1))
    runs = _blocks(weight, RUN)
    _codes(runs, runs.view(np.uint32), step, block_rows, *rounding, _blocks(codes, RUN))


def _share(work: Callable[[int, int], None], weight: Floats, block_rows: int) -> None:
    """Call work(first, end) for all rows of blocks, a cache's worth at a time, on as many threads as they are worth."""
    rows, cols = weight.shape
    weights = block_rows * max(1, cols)
    some = -(-CHUNK // weights)

    def each(start: int, stop: int) -> None:
        for first in range(start, stop, some):
            work(first, min(first + some, stop))

    threads.spread(each, -(-rows // block_rows), -(-LEAST_WEIGHTS // weights))


# ---------------------------------------------------------------- plain loops


@njit(cache=True, nogil=True)
def _run_peaks(bits, block_rows, peaks):
    """The largest magnitudes as bits, for finite floats sort as their bits do."""
    for row in range(bits.shape[0]):
        for run in range(peaks.shape[1]):
            top = peaks[row // block_rows, run]
            for j in range(RUN):
                top = max(top, np.uint32(bits[row, RUN * run + j] & MAGNITUDE))
            peaks[row // block_rows, run] = top


@njit(cache=True, nogil=True)
def _codes(weight, bits, step, block_rows, bounds, negative, keep_sign, times, codes):
    """The sign bit and the number of bounds below a scaled weight."""
    b0, b1, b2, b3, b4, b5, b6 = bounds[0], bounds[1], bounds[2], bounds[3], bounds[4], bounds[5], bounds[6]
    for row in range(weight.shape[0]):
        for run in range(step.shape[1]):
            one = step[row // block_rows, run]
            for j in range(RUN):
                x = weight[row, run, j] * one if times else weight[row, run, j] / one
                size = abs(x)
                code = np.uint8(size > b0) + np.uint8(size > b1) + np.uint8(size > b2) + np.uint8(size > b3)
                code += np.uint8(size > b4) + np.uint8(size > b5) + np.uint8(size > b6)
                sign = np.uint8(x < negative) | np.uint8(bits[row, run, j] >> SIGN_AT) & keep_sign
                codes[row, run, j] = np.uint8(code | sign << THREE)


@njit(cache=True, nogil=True)
def _first_nearest(weight, step, values, codes):
    """The first of the nearest values, by rounded differences: those of a weight far above all are equal."""
    for row in range(weight.shape[0]):
        for run in range(weight.shape[1]):
            one = step[row, run]
            for j in range(RUN):
                x = weight[row, run, j]
                code, least = np.uint32(0), abs(x)
                for i in range(1, 16):
                    error = abs(values[i] * one - x)
                    code = np.uint32(i) if error < least else code
                    least = error if error < least else least
                codes[row, run, j] = np.uint8(code)


@njit(cache=True, nogil=True)
def _nearest(size):
    """The nearest magnitude of float4_e2m1fn to one of at most 6, ties to even.

    float32 has steps of 1/2 from 2**22 on, of 1 from 2**23, of 2 from 2**24: adding and subtracting the one whose
    exponent is 22 above that of the size rounds to one bit of mantissa.
    """
    steps = np.uint32(max(np.uint32(F32(size).view(np.uint32) & EXPONENT_BITS) + EXPONENT_22, BITS_OF_2_22)).view(F32)
    return F32(F32(size + steps) - steps)


@njit(cache=True, nogil=True)
def _squared(size, per_step):
    """The squared error of a weight's nearest code, in squared steps."""
    steps = size * per_step
    miss = steps - _nearest(min(steps, SIX))
    return miss * miss


@njit(cache=True, nogil=True)
def _load(weight, first_row, end_row, first, lanes, factor, tile):
    """Put blocks side by side: block first + b's magnitudes become lane b of the tile, times factor[b]."""
    block = weight.shape[2]
    for row in range(first_row, end_row):
        for lane in range(lanes):
            for j in range(block):
                tile[block * (row - first_row) + j, lane] = abs(weight[row, first + lane, j]) * factor[lane]


@njit(cache=True, nogil=True)
def _errors(tile, counts, weights, per_step, error):
    """Each lane's sum of squared errors, in squared steps: by fours, (0 + 1) + (2 + 3), added in turn."""
    error[:] = ZERO
    for j in range(0, weights, 4):
        for lane in range(LANES):
            per = per_step[lane]
            e0, e1 = _squared(tile[j, lane], per), _squared(tile[j + 1, lane], per)
            e2, e3 = _squared(tile[j + 2, lane], per), _squared(tile[j + 3, lane], per)
            if counts is not None:
                e0, e1 = e0 * counts[j, lane], e1 * counts[j + 1, lane]
                e2, e3 = e2 * counts[j + 2, lane], e3 * counts[j + 3, lane]
            error[lane] += (e0 + e1) + (e2 + e3)


@njit(cache=True, nogil=True)
def _lesser_error(weight, weigh, factor, room, lanes, scale):
    """Raise the scales with which a step twice as large has the less squared error."""
    (tile, counts), (per_step, low, high, _) = room, lanes
    for row in range(weight.shape[0]):
        for first in range(0, scale.shape[1], LANES):
            here = min(LANES, scale.shape[1] - first)
            _load(weight, row, row + 1, first, here, factor[row, first : first + here], tile)
            if weigh is not None:
                _load(weigh, row, row + 1, first, here, ONES, counts)
            per_step[:] = ONE
            _errors(tile, counts, 2 * RUN, per_step, low)
            per_step[:] = HALF
            _errors(tile, counts, 2 * RUN, per_step, high)
            for lane in range(here):
                if FOUR * high[lane] < low[lane] and scale[row, first + lane] < MX_MOST:
                    scale[row, first + lane] += np.uint8(1)


@njit(cache=True, nogil=True)
def _least_error(weight, weigh, factor, block_rows, rounded, of_codes, room, lanes, choices, least, scale):
    """Of the scales tries[:, rounded] the first with the least squared error, if that is below `least`."""
    (tries, number, reciprocal), (tile, counts), (squared, per_step, error, lowest) = of_codes, room, lanes
    middle, picked = choices
    for band in range(scale.shape[0]):
        first_row = band * block_rows
        end_row = min(first_row + block_rows, weight.shape[0])
        for first in range(0, scale.shape[1], LANES):
            here = min(LANES, scale.shape[1] - first)
            per_step[:] = factor
            _load(weight, first_row, end_row, first, here, per_step, tile)
            if weigh is not None:
                _load(weigh, first_row, end_row, first, here, ONES, counts)
            for lane in range(here):
                middle[lane] = rounded[band, first + lane]
                lowest[lane] = least[band, first + lane]
            picked[:] = NONE
            for k in range(tries.shape[0]):
                for lane in range(LANES):
                    per_step[lane] = reciprocal[k, middle[lane]]
                    squared[lane] = number[k, middle[lane]] * number[k, middle[lane]]
                _errors(tile, counts, RUN * (end_row - first_row), per_step, error)
                for lane in range(LANES):
                    found = error[lane] * squared[lane]
                    less = found < lowest[lane]  # selects, for nobody could foretell a branch
                    picked[lane] = np.uint32(k) if less else picked[lane]
                    lowest[lane] = found if less else lowest[lane]
            for lane in range(here):
                if picked[lane] != NONE:
                    least[band, first + lane] = lowest[lane]
                    scale[band, first + lane] = tries[picked[lane], middle[lane]]


# ---------------------------------------------------------------- loops over vectors: a lane a block

WIDE = 16
SIZE = np.int32(MAGNITUDE)
EVEN_BITS = EVEN.view(np.int32)
SIX_BITS = np.int32(SIX.view(np.int32))


class Desk(NamedTuple):
    """What a thread works with: blocks side by side, one in each lane."""

    tile: np.ndarray  # (weights of a block, 16) float32
    counts: np.ndarray  # the same: what their errors count
    scale: np.ndarray  # (16,) int32
    rounded: np.ndarray  # (16,) uint8
    least: np.ndarray  # (16,) float32


def _desk(weights: int) -> Desk:
    tile, counts = (np.zeros((weights, WIDE), F32) for _ in range(2))
    return Desk(tile, counts, np.zeros(WIDE, np.int32), np.zeros(WIDE, np.uint8), np.zeros(WIDE, F32))


@njit(cache=True, nogil=True)
def _lay(flat, at, step, lanes, tile, first):
    """Runs of 16 numbers that begin at `at`, at + step ... become lanes of the tile's rows `first` and on."""
    if lanes == WIDE:
        for lane in range(WIDE):
            prefetch(flat, 4 * (at + lane * step) + AHEAD)
        turn(flat, 4 * at, 4 * step, tile, 4 * WIDE * first)
    else:
        for lane in range(lanes):
            for j in range(RUN):
                tile[first + j, lane] = flat[at + lane * step + j]


@njit(cache=True, nogil=True)
def _misses(size, per_step):
    """`_squared` in lanes."""
    steps = mulf(size, per_step)
    six = same_int(SIX_BITS)
    inside = select_less(ints_of(steps), six, ints_of(steps), six)
    exponent = add(and_(inside, same_int(np.int32(EXPONENT_BITS))), same_int(np.int32(EXPONENT_22)))
    whole = as_floats(larger(exponent, same_int(np.int32(BITS_OF_2_22))))
    miss = subf(steps, subf(addf(as_floats(inside), whole), whole))
    return mulf(miss, miss)


@njit(cache=True, nogil=True)
def _error(desk, weigh, weights, per_step):
    """`_errors` in lanes."""
    total, tile = zero_floats(), desk.tile
    for j in range(0, weights, 4):
        at = 4 * WIDE * j
        e0 = _misses(load_floats16(tile, at), per_step)
        e1 = _misses(load_floats16(tile, at + 64), per_step)
        e2 = _misses(load_floats16(tile, at + 128), per_step)
        e3 = _misses(load_floats16(tile, at + 192), per_step)
        if weigh is not None:
            e0 = mulf(e0, load_floats16(desk.counts, at))
            e1 = mulf(e1, load_floats16(desk.counts, at + 64))
            e2 = mulf(e2, load_floats16(desk.counts, at + 128))
            e3 = mulf(e3, load_floats16(desk.counts, at + 192))
        total = addf(total, addf(addf(e0, e1), addf(e2, e3)))
    return total


@njit(cache=True, nogil=True)
def _scaled_sizes(tile, weights, factor):
    """Numbers become their magnitudes, times a factor in each lane."""
    for j in range(weights):
        size = as_floats(and_(load_ints16(tile, 64 * j), same_int(SIZE)))
        store(tile, 64 * j, mulf(size, factor))


def _loops(version: str) -> tuple[Callable[..., Any], ...]:
    """Loops over vectors; the version is part of the key under which compiled code is kept."""

    @njit(cache=True, nogil=True)
    def _best_mx(weight, weigh, first, last, desk, places):
        """Blocks `first` to `last` of 32 weights by the rule `best`; returns the bits of the largest magnitude."""
        version  # noqa: B018
        worst, tile = zero_ints(), desk.tile
        for group in range(first, last, WIDE):
            here = min(WIDE, last - group)
            _lay(weight, 32 * group, 32, here, tile, 0)
            _lay(weight, 32 * group + RUN, 32, here, tile, RUN)
            if weigh is not None:
                _lay(weigh, 32 * group, 32, here, desk.counts, 0)
                _lay(weigh, 32 * group + RUN, 32, here, desk.counts, RUN)
            top = zero_ints()
            for j in range(32):
                top = larger(top, and_(load_ints16(tile, 64 * j), same_int(SIZE)))
            worst = larger(worst, top)
            scale = sub(larger(shift_right(top, 23), same_int(2)), same_int(2))
            _scaled_sizes(tile, 32, as_floats(shift_left(sub(same_int(254), scale), 23)))
            low = _error(desk, weigh, 32, same_float(ONE))
            high = mulf(_error(desk, weigh, 32, same_float(HALF)), same_float(FOUR))
            raised = add(scale, same_int(1))
            most = same_int(MX_MOST)
            store(desk.scale, 0, select_below(high, low, select_less(raised, most, raised, most), scale))
            for lane in range(here):
                block, found = group + lane, desk.scale[lane]
                # the step is a power of two, so the product with its reciprocal is the quotient
                per_step = same_float(np.int32((254 - found) << 23).view(F32))
                a = ints_of(mulf(load_floats16(weight, 128 * block), per_step))
                b = ints_of(mulf(load_floats16(weight, 128 * block + 64), per_step))
                _put_codes(_e2m1(a, EVEN_BITS), _e2m1(b, EVEN_BITS), places, block)
                places.scale[places.scale_at + block * places.scale_step] = found
        return largest_lane(worst)

    @njit(cache=True, nogil=True)
    def _least_error_vectors(weight, weigh, rows, cols, factor, block_rows, rounded, window, most, desk, least, scale):
        """`_least_error`; weight, weigh : flat. window, most : scale codes to try are rounded + window, 1 to most"""
        version  # noqa: B018
        for band in range(scale.shape[0]):
            first_row = band * block_rows
            weights = RUN * (min(first_row + block_rows, rows) - first_row)
            for first in range(0, scale.shape[1], WIDE):
                here = min(WIDE, scale.shape[1] - first)
                for row in range(weights // RUN):
                    at = (first_row + row) * cols + RUN * first
                    _lay(weight, at, RUN, here, desk.tile, RUN * row)
                    if weigh is not None:
                        _lay(weigh, at, RUN, here, desk.counts, RUN * row)
                _scaled_sizes(desk.tile, weights, same_float(factor))
                for lane in range(here):
                    desk.rounded[lane] = rounded[band, first + lane]
                    desk.least[lane] = least[band, first + lane]
                    desk.scale[lane] = scale[band, first + lane]
                middle, picked = widen(load_bytes16(desk.rounded, 0)), load_ints16(desk.scale, 0)
                lowest = load_floats16(desk.least, 0)
                for k in range(window.size):
                    code = larger(add(middle, same_int(window[k])), same_int(1))
                    code = select_less(code, same_int(most), code, same_int(most))
                    number = e4m3_to_float(low_bytes(code))
                    error = _error(desk, weigh, weights, divf(same_float(ONE), number))
                    found = mulf(error, mulf(number, number))
                    picked = select_below(found, lowest, code, picked)
                    lowest = as_floats(select_below(found, lowest, ints_of(found), ints_of(lowest)))
                store(desk.scale, 0, picked)
                store(desk.least, 0, lowest)
                for lane in range(here):
                    least[band, first + lane] = desk.least[lane]
                    scale[band, first + lane] = desk.scale[lane]

    @njit(cache=True, nogil=True)
    def _codes_vectors(weight, rows, step, block_rows, bounds, negative, keep_sign, times, codes):
        """`_codes`; weight, codes : flat."""
        version  # noqa: B018
        b0, b1, b2, b3 = same_int(bounds[0]), same_int(bounds[1]), same_int(bounds[2]), same_int(bounds[3])
        b4, b5, b6, one = same_int(bounds[4]), same_int(bounds[5]), same_int(bounds[6]), same_int(1)
        below, kept, eight, zero = same_float(negative), same_int(8 * keep_sign), same_int(8), zero_ints()
        for row in range(rows):
            for run in range(step.shape[1]):
                at = RUN * (row * step.shape[1] + run)
                w, each = load_floats16(weight, 4 * at), same_float(step[row // block_rows, run])
                x = mulf(w, each) if times else divf(w, each)
                size = and_(ints_of(x), same_int(SIZE))
                code = select_less(b0, size, one, zero)
                code = select_less(b1, size, add(code, one), code)
                code = select_less(b2, size, add(code, one), code)
                code = select_less(b3, size, add(code, one), code)
                code = select_less(b4, size, add(code, one), code)
                code = select_less(b5, size, add(code, one), code)
                code = select_less(b6, size, add(code, one), code)
                sign = or_(select_below(x, below, eight, zero), and_(shift_right(ints_of(w), 28), kept))
                store(codes, at, low_bytes(or_(code, sign)))

    return _best_mx, _least_error_vectors, _codes_vectors


_best_mx, _least_error_vectors, _codes_vectors = _loops(VERSION)
