"""Choose codes and scales for formats whose weights are a small number times a scale.

    mx               MXFP6, MXFP8, MXINT8: 32 weights share a power of two
    nvint4, if4      16 weights share a float8_e4m3fn scale, the tensor one float32
    fp4_ue5m3        16 weights share an unsigned E5M3 scale

A door takes (rows, cols) float32, finite, and returns the parts of its layout. All arithmetic is float32, each
operation rounding on its own, unless said otherwise. A block depends on nothing but its own weights and the
tensor's largest magnitude, and every sum has one order, so threads and vectors cannot change a bit.

The same for every element format (`Element`): a weight w with scale s is y = abs(w / s) / unit units; its code is
the nearest, ties to the even code, at most that of the largest number; no code of NaN or infinity is written.
Formats of sign and magnitude keep the sign of a weight that becomes zero, as the casts of ml_dtypes and torch do.
A block of zeros has scale byte 0.

"best" tries several scales and keeps the one with the least squared error, weighted by `importance` if given.
The error of a scale is the sum of importance * (y - nearest)**2 in the order of the columns, times the square of
the scale relative to the starting one. In it, y is in units of the largest power of two up to the format's largest
number. The first of equals wins; where sums overflow float32, the starting scale stays.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels import simd, threads
from packfmt.kernels.cache import njit
from packfmt.kernels.quantize import AHEAD, VERSION
from packfmt.kernels.simd import (
    add,
    addf,
    and_,
    as_floats,
    divf,
    ints_of,
    larger,
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
    xor,
    zero_floats,
    zero_ints,
)

LEAST_WEIGHTS = 1 << 15  # worth a thread
LANES = 16  # blocks side by side, so that each sums its own weights in order
F32, I32 = np.float32, np.int32
ZERO, ONE = F32(0), F32(1)
INFINITY = F32(np.inf)
BIT = I32(1)
WHOLE = F32(2.0**23)  # x + WHOLE is a whole number for 0 <= x < WHOLE, in the low bits of the sum
WHOLE_BITS = I32(0x4B000000)
EXPONENT = I32(23)  # bits below a float32's exponent
EXPONENT_BITS = I32(0x7F800000)
SIGN = I32(31)
MAGNITUDE = I32(0x7FFFFFFF)  # a float32 without its sign
SEVEN_BITS = I32(127)
BYTE, MARK = I32(255), I32(256)  # of a block's code: its scale, and whether it has the second element

FLOOR, CEIL, NEAREST = 0, 1, 2  # how a block's peak gives its starting scale


class Element(NamedTuple):
    """A number format: 0, unit, 2 * unit ... to 2**(mantissa + 1) * unit, then floats of so many bits of mantissa.

    Codes are found in units. Errors are computed in tops, the largest power of two up to the largest number.
    """

    shift: np.int32  # bits of a float32's mantissa that are rounded off
    offset: np.int32  # of the codes against the remaining bits of a float32
    dense: np.float32  # below so many units all numbers are whole units
    top: np.int32  # the code of the largest number
    largest: np.float32
    per_unit: np.float32
    per_top: np.float32
    most: np.float32  # the largest number in tops
    least: np.int32  # the bits of 2**mantissa units in tops: from there down numbers are as far apart
    mask: np.int32  # bits of a code
    sign: np.int32  # where the sign bit is; two's complement: -1


def _element(mantissa: int, unit: float, top: int, bits: int, twos: bool = False) -> Element:
    shift, offset = 23 - mantissa, (126 + mantissa) << mantissa
    units = float(top)
    if top >= 2 << mantissa:
        units = float(np.array((top + offset) << shift, np.int32).view(np.float32))
    power = int(np.frexp(units)[1]) - 1
    return Element(
        shift=I32(shift),
        offset=I32(offset),
        dense=F32(2 << mantissa),
        top=I32(top),
        largest=F32(units * unit),
        per_unit=F32(1 / unit),
        per_top=np.ldexp(F32(1 / unit), -power),
        most=F32(units * 2.0**-power),
        least=I32((127 + mantissa - power) << 23),
        mask=I32((1 << bits) - 1),
        sign=I32(-1 if twos else bits - 1),
    )


def _whole(unit: float, top: int, bits: int) -> Element:
    """Whole numbers of units to `top` either way, in two's complement."""
    return _element(21, unit, top, bits, twos=True)


E2M1 = _element(1, 0.5, 7, 4)
E4M3 = _element(3, 2.0**-9, 0x7E, 8)
E5M3 = _element(3, 2.0**-17, 0xFE, 9)  # without a sign
INT4 = _whole(1, 7, 4)
INT4_OF_SIX = _whole(6 / 7, 7, 4)


def element(numbers: np.ndarray) -> Element:
    """What the loops need to know of a number format.

    Parameters
    ----------
    numbers : (2**bits,) float32, the number of every code. The first codes ascend from 0, as far as they are finite;
        the other half are their negatives, in sign and magnitude or two's complement

    Raises
    ------
    LayoutError
        If these are neither whole multiples of a unit nor the numbers of a minifloat, whose unit is a power of two.
    """
    size = len(numbers)
    with np.errstate(invalid="ignore"):
        rises = np.flatnonzero(~(np.diff(numbers.astype(np.float64)) > 0) | ~np.isfinite(numbers[1:]))
    top = int(rises[0]) if rises.size else size - 1
    units = numbers[: top + 1].astype(np.float64) / float(numbers[1])
    odd = np.flatnonzero(units != np.arange(top + 1))
    twos = bool(numbers[-1] == -numbers[1]) and top == size // 2 - 1
    mantissa = max(0, int(odd[0] - 1).bit_length() - 2) if odd.size else 21
    bits = size.bit_length() - 1
    if numbers[0] == 0 and (126 + mantissa << mantissa) + top < 255 << mantissa:
        found = _element(mantissa, float(numbers[1]), top, bits if top < size // 2 else bits + 1, twos)
        if np.array_equal(_numbers(found), numbers[: top + 1]):
            return found
    raise LayoutError(f"the numbers of {size} codes are those of no minifloat; codes 0 to {top} were compared")


def _numbers(kind: Element) -> np.ndarray:
    """(top + 1,) float32: the numbers of the codes from 0."""
    code = np.arange(kind.top + 1, dtype=np.int32)
    large = (np.maximum(code, I32(kind.dense)) + kind.offset) << kind.shift
    units = np.where(code < kind.dense, code.astype(F32), large.view(F32))
    return units * (ONE / kind.per_unit)


def nearest(weight: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(rows, cols) uint8: the code of the number nearest to each weight, as the module says.

    Raises
    ------
    LayoutError
        If `numbers` is none that `element` knows.
    """
    scale = np.ones((1, 1), F32)
    return _encode(weight, scale, element(numbers), *weight.shape)


# ---------------------------------------------------------------- blocks with a scale of one byte


def mx(
    weight: np.ndarray, numbers: np.ndarray, rule: str = "best", importance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """32 weights share a power of two: the MX formats of any element.

    With f = floor(log2(peak)) - emax, where emax is floor(log2(largest number)), the exponent is

    - "best": f - 1, f or f + 1. Without importance no other has a smaller error.
    - "ocp": f (section 6.3; ggml, torchao's FLOOR), so the peak may lie above the largest number
    - "compressed-tensors": f + 1 from 1.75 * 2**floor(log2(peak)) on, with elements of six bits from 1.9375, else f
    - "modelopt": ceil(log2(peak / largest)), the quotient and its logarithm rounded to float32

    but at least -127, and at most 127 - emax, so that no number overflows float32.

    Parameters
    ----------
    weight : (rows, cols) float32, finite; cols a multiple of 32
    numbers : (2**bits,) float32, the number of every code
    rule : one of the above
    importance : (1 or rows, cols) float32, 0 or more; only "best" looks at it

    Returns
    -------
    codes (rows, cols) uint8, scale (rows, cols / 32) uint8: float8_e8m0fnu's bytes, never 255

    Raises
    ------
    LayoutError
        If there is no such rule, or cols or numbers are not as stated.

    Source: OCP Microscaling Formats (MX) 1.0; compressed-tensors 0.20.0, quantization/utils/mxfp_utils.py;
    nvidia-modelopt 0.47.0, quantization/qtensor/mxfp8_tensor.py
    """
    kind = element(numbers)
    largest = kind.largest
    emax = int(np.frexp(largest)[1]) - 1
    known(rule, "mx", ("best", "ocp", "compressed-tensors", "modelopt"))
    carry = 0
    if rule == "compressed-tensors":
        carry = 1 << 19 if kind.mask == 63 else 1 << 21
    how = CEIL if rule == "modelopt" else FLOOR
    scales = np.ldexp(ONE, np.minimum(np.arange(256), 254) - 127)
    start = Start(I32(how), I32(emax), I32(carry), F32(largest), ONE, E4M3)
    beside = I32(1 if rule == "best" else 0)
    window = Window(-beside, beside, I32(0), I32(254 - emax))
    codes, scale = _blocks(weight, 32, (kind, kind), scales, start, window, importance)
    return {"codes": codes, "scale": scale}


def nvint4(
    weight: np.ndarray,
    rule: str = "best",
    peak: float | None = None,
    importance: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Whole numbers of -7 to 7; 16 weights share a float8_e4m3fn scale, the tensor a float32 that multiplies.

    - "best": the global scale is a power of two, the smallest that keeps peak / 7 at 448 or below; of the scale codes
      from 2 below the one nearest to the block's peak / 7 to 6 above, the best
    - "rtn": the global scale is peak / (7 * 448); the scale nearest to the block's peak / 7 / global

    Parameters
    ----------
    weight : (rows, cols) float32, finite; cols a multiple of 16
    rule : one of the above
    peak : the largest magnitude of all tensors that share the global scale; None: of this one
    importance : (1 or rows, cols) float32, 0 or more; only "best" looks at it

    Returns
    -------
    codes (rows, cols) uint8, two's complement in 4 bits; scale (rows, cols / 16) uint8, float8_e4m3fn's bytes;
    global_scale (1,) float32

    Raises
    ------
    LayoutError
        If there is no such rule, or cols are not as stated.

    Source: fouroversix 00e70335, quantize/pytorch/reference.py
    """
    whole = _global(weight, peak, INT4, known(rule, "nvint4", ("best", "rtn")) == "best")
    return _sixteen(weight, (INT4, INT4), E4M3, whole, AROUND if rule == "best" else (0, 0), importance)


def if4(
    weight: np.ndarray,
    rule: str = "best",
    peak: float | None = None,
    importance: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """16 weights are float4_e2m1fn or whole numbers of 6/7, whichever has the smaller error, times float8_e4m3fn.

    - "best": the global scale is a power of two, as for `nvint4` with 6 for 7; the scale codes as there, for both
      elements
    - "fouroversix": the global scale is peak / (6 * 448), the scale the nearest to the block's peak / 6 / global

    E2M1 wins among equals, smaller scales among equals of an element.

    Parameters
    ----------
    weight : (rows, cols) float32, finite; cols a multiple of 16
    rule : one of the above
    peak : the largest magnitude of all tensors that share the global scale; None: of this one
    importance : (1 or rows, cols) float32, 0 or more

    Returns
    -------
    codes (rows, cols) uint8 of 4 bits; scale (rows, cols / 16) uint8, float8_e4m3fn's bytes, bit 7 set where codes
    are two's complement; global_scale (1,) float32, which multiplies

    Raises
    ------
    LayoutError
        If there is no such rule, or cols are not as stated.

    Source: fouroversix 00e70335, quantize/pytorch/reference.py (`select_intfloat`)
    """
    whole = _global(weight, peak, E2M1, known(rule, "if4", ("best", "fouroversix")) == "best")
    return _sixteen(weight, (E2M1, INT4_OF_SIX), E4M3, whole, AROUND if rule == "best" else (0, 0), importance)


def fp4_ue5m3(weight: np.ndarray, rule: str = "best", importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """float4_e2m1fn; 16 weights share a scale of five bits of exponent and three of mantissa, without a sign.

    "rtn": the scale nearest to peak / 6; "best": of the codes from 2 below to 6 above it, the best.

    Parameters
    ----------
    weight : (rows, cols) float32, finite; cols a multiple of 16
    rule : one of the above
    importance : (1 or rows, cols) float32, 0 or more; only "best" looks at it

    Returns
    -------
    codes (rows, cols) uint8 of 4 bits, scale (rows, cols / 16) uint8

    Raises
    ------
    LayoutError
        If there is no such rule, or cols are not as stated.
    """
    around = AROUND if known(rule, "fp4_ue5m3", ("best", "rtn")) == "best" else (0, 0)
    parts = _sixteen(weight, (E2M1, E2M1), E5M3, ONE, around, importance)
    del parts["global_scale"]
    return parts


# scale codes about the nearest; on Gaussian and heavy-tailed weights all others gain below 0.01 % more
AROUND = (-2, 6)
LEAST_GLOBAL = -117  # the smallest block scale times 2**-117 is a normal float32


class Start(NamedTuple):
    """How a block's peak gives the code of its starting scale."""

    how: np.int32
    emax: np.int32
    carry: np.int32  # added to the peak's bits before its exponent is taken
    largest: np.float32
    whole: np.float32  # the global scale
    scale: Element


class Window(NamedTuple):
    """Scale codes to try, relative to the starting one and absolutely."""

    first: np.int32
    last: np.int32
    least: np.int32
    most: np.int32


def _global(weight: np.ndarray, peak: float | None, kind: Element, two: bool) -> np.float32:
    """The scale of a tensor: peak / (largest * 448), or the power of two from there on; 1 for zeros."""
    top = _peak(weight) if peak is None else F32(peak)
    exact = float(top) / (float(kind.largest) * 448)
    if not top > 0:
        return ONE
    if not two:
        return max(F32(top / F32(kind.largest * F32(448))), F32(2.0**LEAST_GLOBAL))
    fraction, exponent = np.frexp(exact)
    return np.ldexp(ONE, max(LEAST_GLOBAL, int(exponent) - (fraction == 0.5)))


def _sixteen(weight, kinds, scale_kind, whole, around, importance):
    """Blocks of 16 with scales of `scale_kind` times `whole`."""
    largest = kinds[0].largest
    scales = np.zeros(256, F32)
    with np.errstate(over="ignore"):
        scales[: scale_kind.top + 1] = _numbers(scale_kind) * whole
        most = np.flatnonzero(np.isfinite(scales[: scale_kind.top + 1] * largest))[-1]
    start = Start(I32(NEAREST), I32(0), I32(0), F32(largest), F32(whole), scale_kind)
    window = Window(I32(around[0]), I32(around[1]), I32(1), I32(most))
    codes, scale = _blocks(weight, 16, kinds, scales, start, window, importance)
    return {"codes": codes, "scale": scale, "global_scale": np.array([whole], F32)}


def _blocks(weight, size, kinds, scales, start, window, importance):
    """Share all blocks among threads: codes (rows, cols) and scale codes (rows, cols / size), uint8."""
    rows, cols = weight.shape
    if cols % size:
        raise LayoutError(f"{cols} columns, needs a multiple of {size}")
    weighs = None if importance is None else importance_of(weight, importance).reshape(-1, size)
    blocks = np.ascontiguousarray(weight, F32).reshape(-1, size)
    codes, scale = np.empty(blocks.size, np.uint8), np.empty(len(blocks), np.uint8)
    each = cols // size
    powers = bool((np.frexp([*scales, *(kind.per_top for kind in kinds)])[0] == 0.5).all())

    def work(first: int, last: int) -> None:
        desk = _desk(size)
        _sweep(blocks, weighs, first * each, last * each, kinds, scales, start, window, powers, desk, codes, scale)

    share_rows(work, weight)
    return codes.reshape(rows, cols), scale.reshape(rows, each)


def importance_of(weight, importance):
    """(1 or rows, cols) float32, contiguous."""
    rows, cols = weight.shape
    if importance is None:
        return np.ones((1, cols), F32)
    if importance.shape not in ((1, cols), (rows, cols)):
        raise LayoutError(f"importance is {importance.shape}, needs (1, {cols}) or {weight.shape}")
    return np.ascontiguousarray(importance, F32)


def known(rule: str, name: str, rules: tuple[str, ...], what: str = "rule") -> str:
    """The rule, if it is one of `rules`."""
    if rule not in rules:
        raise LayoutError(f"{name}: no {what} is called {rule!r}; there are {', '.join(rules)}")
    return rule


def share_rows(work: Callable[[int, int], None], weight: np.ndarray) -> None:
    """Call work(first row, end) for all rows, on as many threads as they are worth."""
    rows, cols = weight.shape
    threads.spread(work, rows, -(-LEAST_WEIGHTS // max(1, cols)))


def _peak(weight: np.ndarray) -> np.float32:
    return F32(_row_peaks(weight, max(1, weight.shape[1])).max(initial=0))


class Desk(NamedTuple):
    """What a thread works with: LANES blocks side by side."""

    weight: np.ndarray  # (size, LANES): magnitudes
    weighs: np.ndarray  # (size, LANES): their importance
    peak: np.ndarray  # (LANES,)
    base: np.ndarray  # (LANES,) int32: codes of the starting scales
    scale: np.ndarray  # (LANES,): of the candidate
    error: np.ndarray  # (LANES,)
    best: np.ndarray  # (LANES,): the least error so far
    code: np.ndarray  # (LANES,) int32: and its scale; 256 more for the second element


def _desk(size: int) -> Desk:
    lanes = [np.zeros(LANES, dtype) for dtype in (F32, I32, F32, F32, F32, I32)]
    return Desk(np.zeros((size, LANES), F32), np.zeros((size, LANES), F32), *lanes)


@njit(cache=True, nogil=True, inline="always")
def _code(y, kind):
    """The code nearest to y >= 0 units, ties to the even code, at most the largest number's."""
    bits = F32(y).view(np.int32)
    odd = ((bits >> kind.shift) - kind.offset) & BIT
    large = ((bits + ((BIT << (kind.shift - BIT)) - BIT) + odd) >> kind.shift) - kind.offset
    small = F32(y + WHOLE).view(np.int32) - WHOLE_BITS
    return min(small if y < kind.dense else large, kind.top)


@njit(cache=True, nogil=True, inline="always")
def _rounded(y, kind):
    """The number nearest to y >= 0 tops, in tops; of two, either.

    y + step - step is a multiple of a float32's last place in step, which has y's exponent and so many bits more.
    """
    inside = min(F32(y), kind.most)
    exponent = max(F32(inside).view(np.int32) & EXPONENT_BITS, kind.least)
    step = I32(exponent + (kind.shift << EXPONENT)).view(np.float32)
    return F32(F32(inside + step) - step)


@njit(cache=True, nogil=True, inline="always")
def _signed(code, w, kind):
    """The byte of a magnitude's code and the sign of w."""
    negative = (F32(w).view(np.int32) >> SIGN) & BIT
    if kind.sign < 0:
        return np.uint8((code ^ -negative) + negative & kind.mask)
    return np.uint8(code | (negative << kind.sign))


@njit(cache=True, nogil=True)
def _load_plainly(blocks, weighs, block, last, desk):
    """Lay LANES blocks side by side; beyond the last, the last again."""
    weight, importance, peak = desk.weight, desk.weighs, desk.peak
    for lane in range(LANES):
        i = min(block + lane, last - 1)
        for j in range(blocks.shape[1]):
            weight[j, lane] = abs(blocks[i, j])
            importance[j, lane] = ONE if weighs is None else weighs[i % weighs.shape[0], j]
    peak[:] = ZERO
    for j in range(blocks.shape[1]):
        for lane in range(LANES):
            peak[lane] = max(peak[lane], weight[j, lane])


@njit(cache=True, nogil=True)
def _start(peak, start):
    """The code of the starting scale of a block with this peak."""
    if start.how == NEAREST:
        share = F32(F32(peak / start.largest) / start.whole)
        return _code(F32(share * start.scale.per_unit), start.scale)
    if start.how == FLOOR:
        return ((F32(peak).view(np.int32) + start.carry) >> EXPONENT) - start.emax
    share = F32(peak / start.largest)
    return I32(np.ceil(F32(log2(np.float64(share))))) + SEVEN_BITS if share > ZERO else I32(0)


@njit(cache=True, nogil=True)
def _try_plainly(kind, scales, window, mark, desk, weighted, powers):
    """Try all scales of the window with this element; `mark` is added to the code of the best."""
    weight, importance, base, scale = desk.weight, desk.weighs, desk.base, desk.scale
    error, best, code = desk.error, desk.best, desk.code
    for step in range(window.first, window.last + 1):
        for lane in range(LANES):
            scale[lane] = scales[min(max(base[lane] + I32(step), window.least), window.most)]
            error[lane] = ZERO
        for j in range(weight.shape[0]):
            for lane in range(LANES):
                # np.divide, for / asks whether the divisor is zero, which no vector can
                y = F32(np.divide(weight[j, lane], scale[lane]) * kind.per_top)
                off = F32(y - _rounded(y, kind))
                error[lane] += F32(importance[j, lane] * F32(off * off))
        for lane in range(LANES):
            unit = F32(np.divide(scale[lane], scales[base[lane]]) / kind.per_top)
            total = F32(error[lane] * F32(unit * unit))
            if total < best[lane]:
                best[lane] = total
                code[lane] = min(max(base[lane] + I32(step), window.least), window.most) + mark


@njit(cache=True, nogil=True)
def _write_plainly(weight, first, last, scale, kind, codes):
    """The codes of weights first to last, which have one scale; of scale 0 only signs. weight, codes : flat"""
    for j in range(first, last):
        y = ZERO if scale == ZERO else F32(abs(np.divide(weight[j], scale)) * kind.per_unit)
        codes[j] = _signed(_code(y, kind), weight[j], kind)


@njit(cache=True, nogil=True)
def _write_blocks_plainly(weight, block, count, size, kind, mark, powers, desk, codes):
    """The codes of the desk's blocks whose code has this mark: `count` blocks from number `block` on."""
    for lane in range(count):
        if desk.code[lane] & MARK == mark:
            first = (block + lane) * size
            _write_plainly(weight, first, first + size, desk.scale[lane], kind, codes)


def _row_peaks(weight: np.ndarray, share: int) -> np.ndarray:
    """(rows, ceil(cols / share)) float32: the largest magnitudes of runs of `share` columns."""
    rows, cols = weight.shape
    peaks = np.zeros((rows, -(-cols // share)), F32)
    bits = np.ascontiguousarray(weight, F32).view(np.int32)

    def work(start: int, stop: int) -> None:
        _peaks(bits[start:stop], share, peaks[start:stop])

    share_rows(work, weight)
    return peaks


def _encode(weight: np.ndarray, scale: np.ndarray, kind: Element, rows_share: int, cols_share: int) -> np.ndarray:
    """(rows, cols) uint8: codes with scale (ceil(rows / rows_share), ceil(cols / cols_share)) float32."""
    flat, codes = np.ascontiguousarray(weight, F32).reshape(-1), np.empty(weight.size, np.uint8)

    def work(start: int, stop: int) -> None:
        _codes(flat, weight.shape[1], start, stop, scale, rows_share, cols_share, kind, codes)

    share_rows(work, weight)
    return codes.reshape(weight.shape)


@njit(cache=True, nogil=True)
def _peaks(bits, share, peaks):
    """Finite floats without their sign sort as their bits do."""
    for row in range(bits.shape[0]):
        for part in range(peaks.shape[1]):
            top = I32(0)
            for j in range(part * share, min(part * share + share, bits.shape[1])):
                top = max(top, I32(bits[row, j] & MAGNITUDE))
            peaks[row, part] = I32(top).view(np.float32)


# ---------------------------------------------------------------- the same in vectors


@njit(cache=True, nogil=True)
def _codes_of(y, kind):
    """`_code` in lanes."""
    bits = ints_of(y)
    shift, offset = kind.shift, same_int(kind.offset)
    odd = and_(sub(shift_right(bits, shift), offset), same_int(1))
    large = sub(shift_right(add(add(bits, same_int((BIT << (shift - BIT)) - BIT)), odd), shift), offset)
    small = sub(ints_of(addf(y, same_float(WHOLE))), same_int(WHOLE_BITS))
    code, top = select_below(y, same_float(kind.dense), small, large), same_int(kind.top)
    return select_less(code, top, code, top)


@njit(cache=True, nogil=True)
def _misses(y, kind):
    """y - `_rounded` in lanes, squared."""
    bits, most = ints_of(y), same_int(F32(kind.most).view(np.int32))
    inside = select_less(bits, most, bits, most)
    exponent = larger(and_(inside, same_int(EXPONENT_BITS)), same_int(kind.least))
    step = as_floats(add(exponent, same_int(kind.shift << EXPONENT)))
    off = subf(y, subf(addf(as_floats(inside), step), step))
    return mulf(off, off)


@njit(cache=True, nogil=True)
def _bytes_of(w, quotient, kind):
    """`_signed` codes of sixteen weights whose quotients with their scale are given."""
    size = as_floats(and_(ints_of(quotient), same_int(MAGNITUDE)))
    code, negative = _codes_of(mulf(size, same_float(kind.per_unit)), kind), shift_right(ints_of(w), SIGN)
    if kind.sign < 0:
        return low_bytes(and_(add(xor(code, sub(zero_ints(), negative)), negative), same_int(kind.mask)))
    return low_bytes(or_(code, shift_left(negative, kind.sign)))


@njit(cache=True, nogil=True)
def _write_vectors(weight, first, last, scale, kind, codes):
    """`_write_plainly`; division by infinity leaves nothing but signs, too."""
    each = same_float(INFINITY if scale == ZERO else scale)
    end = first + (last - first) // LANES * LANES
    for j in range(first, end, LANES):
        w = load_floats16(weight, 4 * j)
        store(codes, j, _bytes_of(w, divf(w, each), kind))
    if end < last:
        _write_plainly(weight, end, last, scale, kind, codes)


@njit(cache=True, nogil=True)
def _write_blocks_vectors(weight, block, count, size, kind, mark, powers, desk, codes):
    """`_write_blocks_plainly`."""
    for lane in range(count):
        if desk.code[lane] & MARK == mark:
            scale = INFINITY if desk.scale[lane] == ZERO else desk.scale[lane]
            each, inverse = same_float(scale), same_float(ONE / scale)
            first = (block + lane) * size
            for j in range(first, first + size, LANES):
                w = load_floats16(weight, 4 * j)
                store(codes, j, _bytes_of(w, mulf(w, inverse) if powers else divf(w, each), kind))


@njit(cache=True, nogil=True)
def _lay(numbers, first, tile):
    """Sixteen rows side by side, from row `first` on: column j becomes row j of the tile."""
    size = numbers.shape[1]
    for j in range(0, size, LANES):
        for lane in range(LANES):
            prefetch(numbers, 4 * (first * size + LANES * lane + LANES * j) + AHEAD)
        turn(numbers, 4 * (first * size + j), 4 * size, tile, 4 * LANES * j)


@njit(cache=True, nogil=True)
def _load_vectors(blocks, weighs, block, last, desk):
    """`_load_plainly`."""
    if block + LANES > last:
        return _load_plainly(blocks, weighs, block, last, desk)
    size, top = blocks.shape[1], zero_ints()
    _lay(blocks, block, desk.weight)
    for j in range(size):
        magnitude = and_(load_ints16(desk.weight, 4 * LANES * j), same_int(MAGNITUDE))
        store(desk.weight, 4 * LANES * j, magnitude)
        top = larger(top, magnitude)
    store(desk.peak, 0, top)
    if weighs is not None:
        first = block % weighs.shape[0]
        if first + LANES <= weighs.shape[0]:
            _lay(weighs, first, desk.weighs)
        else:
            for lane in range(LANES):
                for j in range(size):
                    desk.weighs[j, lane] = weighs[(first + lane) % weighs.shape[0], j]


@njit(cache=True, nogil=True)
def _try_vectors(kind, scales, window, mark, desk, weighted, powers):
    """`_try_plainly`. powers : all scales and tops are powers of two, so that one product does"""
    base, scale, code = desk.base, desk.scale, desk.code
    per_top = same_float(kind.per_top)
    for lane in range(LANES):
        scale[lane] = scales[base[lane]]
    start = load_floats16(scale, 0)
    for step in range(window.first, window.last + 1):
        for lane in range(LANES):
            scale[lane] = scales[min(max(base[lane] + I32(step), window.least), window.most)]
        each, error = load_floats16(scale, 0), zero_floats()
        inverse = mulf(divf(same_float(ONE), each), per_top)
        for j in range(desk.weight.shape[0]):
            w = load_floats16(desk.weight, 4 * LANES * j)
            found = _misses(mulf(w, inverse) if powers else mulf(divf(w, each), per_top), kind)
            if weighted:
                found = mulf(load_floats16(desk.weighs, 4 * LANES * j), found)
            error = addf(error, found)
        unit = divf(divf(each, start), per_top)
        total, best = mulf(error, mulf(unit, unit)), load_floats16(desk.best, 0)
        place = add(load_ints16(base, 0), same_int(step))
        least, most = same_int(window.least), same_int(window.most)
        place = larger(place, least)
        place = add(select_less(place, most, place, most), same_int(mark))
        store(code, 0, select_below(total, best, place, load_ints16(code, 0)))
        store(desk.best, 0, select_below(total, best, ints_of(total), ints_of(best)))


_load, _try, _write, _write_blocks = (
    (_load_plainly, _try_plainly, _write_plainly, _write_blocks_plainly)
    if simd.INTERPRETED
    else (_load_vectors, _try_vectors, _write_vectors, _write_blocks_vectors)
)


def _loops(version: str) -> tuple[Callable[..., None], ...]:
    """The loops; the version is part of the key under which compiled code is kept."""

    @njit(cache=True, nogil=True)
    def _sweep(blocks, weighs, first, last, kinds, scales, start, window, powers, desk, codes, scale):
        """Blocks first to last: blocks (n, size), weighs (m, size), codes (n * size,), scale (n,)."""
        version  # noqa: B018
        base, code, size, weight = desk.base, desk.code, blocks.shape[1], blocks.reshape(-1)
        two = kinds[0].per_unit != kinds[1].per_unit
        for block in range(first, last, LANES):
            _load(blocks, weighs, block, last, desk)
            for lane in range(LANES):
                base[lane] = min(max(_start(desk.peak[lane], start), window.least), window.most)
                code[lane] = base[lane]
            if window.first < window.last or two:
                desk.best[:] = INFINITY
                _try(kinds[0], scales, window, I32(0), desk, weighs is not None, powers)
                if two:
                    _try(kinds[1], scales, window, MARK, desk, weighs is not None, powers)
            count = min(LANES, last - block)
            for lane in range(count):
                if desk.peak[lane] == ZERO:
                    code[lane] = I32(0)
                desk.scale[lane] = scales[code[lane] & BYTE]
                scale[block + lane] = np.uint8((code[lane] & BYTE) + (code[lane] & MARK) // I32(2))
            _write_blocks(weight, block, count, size, kinds[0], I32(0), powers, desk, codes)
            if two:
                _write_blocks(weight, block, count, size, kinds[1], MARK, powers, desk, codes)

    @njit(cache=True, nogil=True)
    def _codes(weight, cols, start, stop, scale, rows_share, cols_share, kind, codes):
        """Rows start to stop. weight, codes : flat"""
        version  # noqa: B018
        for row in range(start, stop):
            for part in range(scale.shape[1]):
                first, last = part * cols_share, min(part * cols_share + cols_share, cols)
                _write(weight, row * cols + first, row * cols + last, scale[row // rows_share, part], kind, codes)

    return _sweep, _codes


_sweep, _codes = _loops(VERSION)
