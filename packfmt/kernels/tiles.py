"""Choose codes and scales for formats whose scale is a float for a tensor, a row, a group of columns or a tile.

    fp8, minifloat   floats of eight bits, or of any kind
    packed_int       whole numbers, with or without a zero point

Rounding, ties, signs, and what "best" compares are those of `scaled`.
"""

from __future__ import annotations

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels.cache import njit
from packfmt.kernels.scaled import (
    BIT,
    E4M3,
    F32,
    I32,
    LANES,
    ONE,
    ZERO,
    _encode,
    _rounded,
    _row_peaks,
    element,
    importance_of,
    known,
    share_rows,
)

BFLOAT16, LAST_KEPT, BELOW_HALF = I32(-0x10000), I32(16), I32(0x7FFF)
LARGEST = F32(np.finfo(F32).max)
EPSILON = {"<f4": F32(2.0**-23), "bfloat16": F32(2.0**-7), "<f2": F32(2.0**-10)}  # of torch.finfo
LEAST = {"<f4": F32(2.0**-149), "bfloat16": F32(2.0**-133), "<f2": F32(2.0**-24)}  # above 0
FACTORS = (np.arange(3, 37, dtype=F32) / F32(24)).astype(F32)
WHOLE_FACTORS = FACTORS[5:28]


def fp8(weight: np.ndarray, share: tuple[int, int], dtype: str = "<f4", rule: str = "amax") -> dict[str, np.ndarray]:
    """float8_e4m3fn; tiles of rows and columns share a scale, also those that edges cut off.

    The scale is the tile's peak / 448, a float32 quotient rounded once more to `dtype`; for float8_e8m0fnu the smallest
    power of two of 2**-127 to 2**119 from there on. It is 2**-23 (bfloat16: 2**-7) where it would be 0, as in
    compressed-tensors; for float8_e8m0fnu 2**-127. Where 448 times the scale is no float32, the number before it is
    taken.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    share : rows and columns of a tile; 0: all
    dtype : of the scale: "<f4", "bfloat16" or "float8_e8m0fnu"
    rule : "amax", codes of w / scale; "compressed-tensors" rounds that to bfloat16 first where the scale is one, as
        torch does with weights of bfloat16

    Returns
    -------
    codes (rows, cols) uint8, scale (tiles down, tiles across) float32, the bytes of float8_e8m0fnu as uint8

    Raises
    ------
    LayoutError
        If there is no such rule or dtype.

    Source: compressed-tensors 0.20.0, quantization/utils/helpers.py (`calculate_qparams`); DeepSeek-V3,
    inference/kernel.py (`act_quant_kernel`)
    """
    known(rule, "fp8", ("amax", "compressed-tensors"))
    known(dtype, "fp8", ("<f4", "bfloat16", "float8_e8m0fnu"), "scale dtype")
    rows_share, cols_share = _tile(weight, share)
    peaks = _tile_peaks(weight, rows_share, cols_share)
    if dtype == "float8_e8m0fnu":
        fraction, exponent = np.frexp(peaks.astype(np.float64) / 448)
        code = np.where(peaks > 0, np.clip(exponent - (fraction == 0.5), -127, 119) + 127, 0).astype(np.uint8)
        scale = np.ldexp(ONE, code.astype(np.int32) - 127)
        return {"codes": _encode(weight, scale, E4M3, rows_share, cols_share), "scale": code}
    scale = np.minimum(_rounded_to(peaks / F32(448), dtype), _limit(np.full(1, 448, F32), dtype))
    scale[scale == 0] = EPSILON[dtype]
    if rule == "amax" or dtype == "<f4":
        return {"codes": _encode(weight, scale, E4M3, rows_share, cols_share), "scale": scale}
    wide = np.repeat(scale, rows_share, axis=0)[: weight.shape[0]]
    wide = np.repeat(wide, cols_share, axis=1)[:, : weight.shape[1]]
    quotient = _rounded_to(weight / wide, dtype)
    return {"codes": _encode(quotient, np.ones((1, 1), F32), E4M3, *map(max, weight.shape, (1, 1))), "scale": scale}


def minifloat(
    weight: np.ndarray,
    numbers: np.ndarray,
    share: tuple[int, int],
    rule: str = "best",
    importance: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Any element format; tiles of rows and columns share a float32 scale.

    "amax": the scale is peak / largest. "best": the best of that times 3/24, 4/24 ... 36/24, each product rounded to
    float32. The errors of a tile's row are summed in 16 sums, column j in sum j % 16; these are added in order,
    then the rows in order, in float64. A scale is 2**-23 where it would be 0.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    numbers : (2**bits,) float32, the number of every code
    share : rows and columns of a tile; 0: all
    rule : "best" or "amax"
    importance : (1 or rows, cols) float32, 0 or more; only "best" looks at it

    Returns
    -------
    codes (rows, cols) uint8, scale (tiles down, tiles across) float32

    Raises
    ------
    LayoutError
        If there is no such rule, or numbers are not as stated.
    """
    known(rule, "minifloat", ("best", "amax"))
    kind = element(numbers)
    rows_share, cols_share = _tile(weight, share)
    largest = kind.largest
    limit = _limit(np.full(1, largest, F32), "<f4")
    with np.errstate(over="ignore"):
        scale = np.minimum(_tile_peaks(weight, rows_share, cols_share) / largest, limit)
    scale[scale == 0] = EPSILON["<f4"]
    if rule == "best":
        with np.errstate(over="ignore"):
            tried = np.maximum(np.minimum(scale[..., None] * FACTORS, limit), LEAST["<f4"])
        errors = _errors(weight, importance_of(weight, importance), tried, scale, rows_share, cols_share, kind)
        best = errors.argmin(axis=2)[..., None]
        scale = np.take_along_axis(tried, best, axis=2)[..., 0]
    return {"codes": _encode(weight, scale, kind, rows_share, cols_share), "scale": scale}


def packed_int(
    weight: np.ndarray,
    bits: int,
    group: int,
    symmetric: bool = True,
    dtype: str = "bfloat16",
    rule: str = "best",
    importance: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Whole numbers of `bits` bits, from -2**(bits - 1); a row or a group of columns shares a scale.

    The range of a group goes from min to max, both drawn to 0. Scales are, rounded to `dtype`,

    - symmetric: max(-min, max) / (2**bits - 1) * 2
    - else: (max - min) / (2**bits - 1); the zero point is -2**(bits - 1) - min / scale, between the least and the
      greatest code, rounded half to even

    and the code is w / scale + zero point, likewise. "compressed-tensors" rounds every result to `dtype`, so
    weights of that dtype become the package's bytes. "best" computes in float32, and takes the best of the scale
    times 8/24, 9/24 ... 30/24, with the zero point of the first. Sums are those of `minifloat`. A scale is
    2**-23 (bfloat16: 2**-7, float16: 2**-10) where it would be 0, with zero point 0.

    Parameters
    ----------
    weight : (rows, cols) float32, finite
    bits : 2 to 8
    group : columns that share a scale, a divisor of cols; 0: all
    symmetric : without a zero point
    dtype : of the scale: "bfloat16", "<f2" or "<f4"
    rule : "best" or "compressed-tensors"
    importance : (1 or rows, cols) float32, 0 or more; only "best" looks at it

    Returns
    -------
    codes (rows, cols) uint8, 2**(bits - 1) added; scale (rows, groups) float32, all of them numbers of `dtype`;
    unless symmetric zero (rows, groups) uint8, 2**(bits - 1) added

    Raises
    ------
    LayoutError
        If there is no such rule or dtype, a scale overflows float16, or bits or group are not as stated.

    Source: compressed-tensors 0.20.0, quantization/utils/helpers.py (`calculate_qparams`), lifecycle/forward_helpers.py
    """
    known(rule, "packed_int", ("best", "compressed-tensors"))
    known(dtype, "packed_int", ("bfloat16", "<f2", "<f4"), "scale dtype")
    if not 2 <= bits <= 8:
        raise LayoutError(f"packed_int: {bits} bits, needs 2 to 8")
    cols = weight.shape[1]
    columns = group or max(1, cols)
    if cols % columns:
        raise LayoutError(f"packed_int: {cols} columns, needs a multiple of the group, {group}")
    least, most = F32(-(1 << bits - 1)), F32((1 << bits - 1) - 1)
    parity = rule == "compressed-tensors"
    scale, zero = _range_scale(*_ranges(weight, columns), least, most, symmetric, dtype if parity else "<f4")
    away = np.maximum(most - zero, zero - least)
    scale = np.minimum(_rounded_to(scale, dtype), _limit(away, dtype))
    if lost := int(np.isinf(scale).sum()):
        raise LayoutError(f"packed_int: {lost} of {scale.size} scales overflow float16; use bf16 or f32")
    scale[scale == 0] = EPSILON[dtype]
    if rule == "best":
        tried = np.minimum(_rounded_to(scale[..., None] * WHOLE_FACTORS, dtype), _limit(away, dtype)[..., None])
        tried = np.maximum(tried, LEAST[dtype])
        weighs = importance_of(weight, importance)

        def choose(start: int, stop: int) -> None:
            _choose(weight, weighs, start, stop, tried, scale, zero, least, most, np.zeros(LANES, F32))

        share_rows(choose, weight)
    codes = np.empty(weight.shape, np.uint8)
    if parity and dtype == "<f2":
        wide, moved = np.repeat(scale, columns, axis=1), np.repeat(zero, columns, axis=1)
        moved = _rounded_to(_rounded_to(weight / wide, dtype) + moved, dtype)
        codes[...] = np.rint(moved.clip(least, most)) - least
    else:

        def work(start: int, stop: int) -> None:
            narrow = parity and dtype == "bfloat16"
            _whole_codes(weight, start, stop, scale, zero, least, most, narrow, codes)

        share_rows(work, weight)
    parts = {"codes": codes, "scale": scale}
    return parts if symmetric else parts | {"zero": (zero - least).astype(np.uint8)}


def _range_scale(low, high, least, most, symmetric, kept):
    """Scale and zero point, (rows, groups) float32, of the range of each group; every result rounded to `kept`."""
    steps = most - least
    if symmetric:
        return _rounded_to(np.maximum(-low, high) / (steps / F32(2)), kept), np.zeros_like(low)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        spread = _rounded_to(high - low, kept)
        scale = np.where(np.isfinite(spread), spread / steps, high / steps - low / steps)
        scale = _rounded_to(scale, kept)
        zero = _rounded_to(least - _rounded_to(low / scale, kept), kept)
    return scale, np.where(scale > 0, np.rint(zero.clip(least, most)), ZERO)


def _tile(weight: np.ndarray, share: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale; 0: all."""
    rows, cols = weight.shape
    return share[0] or max(1, rows), share[1] or max(1, cols)


def _tile_peaks(weight: np.ndarray, rows_share: int, cols_share: int) -> np.ndarray:
    """(ceil(rows / rows_share), ceil(cols / cols_share)) float32: the largest magnitudes of tiles."""
    peaks = _row_peaks(weight, cols_share)
    if not peaks.size:
        return np.zeros((-(-weight.shape[0] // rows_share), peaks.shape[1]), F32)
    return np.maximum.reduceat(peaks, np.arange(0, len(peaks), rows_share), axis=0)


def _rounded_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded half to even to a narrower float; beyond its largest they become infinite."""
    if dtype == "<f4":
        return x
    if dtype == "<f2":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(F32)
    bits = np.ascontiguousarray(x, F32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(F32)


def _limit(most: np.ndarray, dtype: str) -> np.ndarray:
    """The largest scales of a dtype with which `most` is a float32; infinite for float16, which overflows before."""
    if dtype == "<f2":
        return np.full_like(most, np.inf)
    place = np.uint32(1 if dtype == "<f4" else 1 << 16)
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(LARGEST / most, F32).view(np.uint32)
        # the quotient, rounded, may be one too large; a narrower number is cut off first
        bits -= bits % place
        bits -= np.where(np.isinf(bits.view(F32) * most), place, np.uint32(0))
    return bits.view(F32)


def _errors(weight, importance, tried, base, rows_share, cols_share, kind):
    """(tiles down, tiles across, scales) float64: squared errors in units of the `base` scale."""
    across = tried.shape[1]
    errors = np.zeros((weight.shape[0], across, tried.shape[2]))

    def work(start: int, stop: int) -> None:
        _float_errors(
            weight, importance, start, stop, tried, base, rows_share, cols_share, kind, np.zeros(LANES, F32), errors
        )

    share_rows(work, weight)
    if rows_share == 1 or not len(errors):
        return errors.reshape(tried.shape)
    tiles = (errors[row : row + rows_share] for row in range(0, len(errors), rows_share))
    return np.stack([np.cumsum(rows, axis=0)[-1] for rows in tiles])  # in order, which sum() is not


@njit(cache=True, nogil=True)
def _float_errors(weight, importance, start, stop, tried, base, rows_share, cols_share, kind, sums, errors):
    """Rows start to stop; errors (rows, tiles across, scales)."""
    for row in range(start, stop):
        tile = row // rows_share
        weighs = importance[row % importance.shape[0]]
        for part in range(tried.shape[1]):
            first, last = part * cols_share, min(part * cols_share + cols_share, weight.shape[1])
            for k in range(tried.shape[2]):
                scale = tried[tile, part, k]
                unit = np.float64(np.divide(scale, base[tile, part]))
                total = _float_error(weight[row, first:last], weighs[first:last], scale, kind, sums)
                errors[row, part, k] = total * (unit * unit)


@njit(cache=True, nogil=True)
def _float_error(block, weighs, scale, kind, sums):
    """The squared error of neighbouring weights, in tops times their scale."""
    whole = block.shape[0] // LANES * LANES
    sums[:] = ZERO
    for first in range(0, whole, LANES):
        here, importance = block[first : first + LANES], weighs[first : first + LANES]
        for lane in range(LANES):
            y = F32(np.divide(abs(here[lane]), scale) * kind.per_top)
            off = F32(y - _rounded(y, kind))
            sums[lane] += F32(importance[lane] * F32(off * off))
    for j in range(whole, block.shape[0]):
        y = F32(np.divide(abs(block[j]), scale) * kind.per_top)
        off = F32(y - _rounded(y, kind))
        sums[j - whole] += F32(weighs[j] * F32(off * off))
    return _total(sums)


@njit(cache=True, nogil=True)
def _total(sums):
    """Sums of lanes added in order."""
    total = 0.0
    for lane in range(LANES):
        total += np.float64(sums[lane])
    return total


@njit(cache=True, nogil=True)
def _choose(weight, importance, start, stop, tried, scale, zero, least, most, sums):
    """Rows start to stop: the best of the scales that are tried takes the place of `scale`."""
    columns = weight.shape[1] // max(1, scale.shape[1])
    for row in range(start, stop):
        weighs = importance[row % importance.shape[0]]
        for part in range(scale.shape[1]):
            first, last = part * columns, part * columns + columns
            block, here = weight[row, first:last], weighs[first:last]
            base, best, least_error = scale[row, part], scale[row, part], np.inf
            for k in range(tried.shape[2]):
                one = tried[row, part, k]
                unit = np.float64(np.divide(one, base))
                total = _integer_error(block, here, one, zero[row, part], least, most, sums) * (unit * unit)
                if total < least_error:
                    best, least_error = one, total
            scale[row, part] = best


@njit(cache=True, nogil=True, inline="always")
def _bfloat16(x):
    """Rounded half to even."""
    bits = F32(x).view(np.int32)
    return I32((bits + BELOW_HALF + ((bits >> LAST_KEPT) & BIT)) & BFLOAT16).view(np.float32)


@njit(cache=True, nogil=True)
def _whole_codes(weight, start, stop, scale, zero, least, most, narrow, codes):
    """Rows start to stop; `narrow`: quotient and sum are rounded to bfloat16."""
    columns = weight.shape[1] // max(1, scale.shape[1])
    for row in range(start, stop):
        for part in range(scale.shape[1]):
            one, moved_by = scale[row, part], zero[row, part]
            block, out = weight[row, part * columns :][:columns], codes[row, part * columns :][:columns]
            if narrow:
                for j in range(columns):
                    moved = _bfloat16(F32(_bfloat16(np.divide(block[j], one)) + moved_by))
                    out[j] = np.uint8(I32(np.rint(min(max(moved, least), most)) - least))
            else:
                for j in range(columns):
                    moved = F32(np.divide(block[j], one) + moved_by)
                    out[j] = np.uint8(I32(np.rint(min(max(moved, least), most)) - least))


@njit(cache=True, nogil=True)
def _integer_error(block, weighs, scale, zero, least, most, sums):
    """The squared error of neighbouring weights, in units of their scale."""
    whole = block.shape[0] // LANES * LANES
    sums[:] = ZERO
    for first in range(0, whole, LANES):
        here, importance = block[first : first + LANES], weighs[first : first + LANES]
        for lane in range(LANES):
            moved = F32(np.divide(here[lane], scale) + zero)
            off = F32(moved - np.rint(min(max(moved, least), most)))
            sums[lane] += F32(importance[lane] * F32(off * off))
    for j in range(whole, block.shape[0]):
        moved = F32(np.divide(block[j], scale) + zero)
        off = F32(moved - np.rint(min(max(moved, least), most)))
        sums[j - whole] += F32(weighs[j] * F32(off * off))
    return _total(sums)


def _ranges(weight: np.ndarray, share: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest of 0 and every `share` columns: (rows, cols / share) float32 each."""
    low = np.zeros((weight.shape[0], weight.shape[1] // share), F32)
    high = np.zeros_like(low)

    def work(start: int, stop: int) -> None:
        _ends(weight, start, stop, low, high)

    share_rows(work, weight)
    return low, high


@njit(cache=True, nogil=True)
def _ends(weight, start, stop, low, high):
    """Rows start to stop."""
    columns = weight.shape[1] // max(1, low.shape[1])
    for row in range(start, stop):
        for part in range(low.shape[1]):
            block = weight[row, part * columns :][:columns]
            least, most = ZERO, ZERO
            for j in range(columns):
                least, most = min(least, block[j]), max(most, block[j])
            low[row, part], high[row, part] = least, most
