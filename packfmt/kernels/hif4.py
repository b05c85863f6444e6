"""HiF4: 64 weights share a scale; eights of them, and fours in these, are doubled or not.

A weight is a sign and 0 to 7 quarters, times 2 if its eight is doubled, times 2 if its four is, times the scale:
unsigned E6M2, (1 + m / 4) * 2**(e - 48). A door takes (rows, cols) float32, finite, and returns the parts of the
layout. Arithmetic is float32, each operation rounding on its own; a group depends on nothing but its own weights.
A group of zeros has scale byte 0.

Source: Huawei AMCT, quantization/dtypes/hifp_impl.py (`hif4_encode`, `hif4_pack`)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.kernels import scaled
from packfmt.kernels.cache import njit

F32, I32 = np.float32, np.int32
GROUP, EIGHTS, FOURS = 64, 8, 16
LANES = 16  # groups side by side, so that each sums its own weights in order
MOST_CODE = I32(254)  # 255 is NaN
ZERO, ONE, TWO, FOUR, SEVEN = F32(0), F32(1), F32(2), F32(4), F32(7)
HALF, QUARTER = F32(0.5), F32(0.25)
INFINITY = F32(np.inf)
SEVENTH = F32(0.142578125)  # 1 / 7 as bfloat16
WHOLE = F32(2.0**23)  # x + WHOLE - WHOLE rounds 0 <= x < WHOLE half to even
LEAST_SCALE, MOST_SCALE = F32(2.0**-48), F32(49152)
FIRST, LAST = -4, 3  # scale codes that "best" tries, relative to AMCT's
SCALES = np.ldexp((ONE + np.arange(256, dtype=F32) % 4 / 4).astype(F32), np.arange(256) // 4 - 48)

# of float32's bits
BFLOAT16, LAST_KEPT, BELOW_HALF = I32(-0x10000), I32(16), I32(0x7FFF)
EXPONENT, TWO_BITS, QUARTER_EXPONENT = I32(23), I32(21), I32(125)
SIGN, BIT, THREE_BITS = I32(31), I32(1), I32(3)
E6M2_HALF, E6M2_OFFSET = I32((1 << 20) - 1), I32((127 - 48) << 2)


def hif4(weight: np.ndarray, rule: str = "best", importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Codes, scales and doublings.

    - "amct": the scale is peak / 7, rounded to bfloat16 and then to E6M2, half to even. With r = 1 / scale as
      bfloat16 an eight is doubled if its peak times r is 4 or more, a four if what remains is 2 or more; the code
      is the remaining weight times r as bfloat16, times 4, ties away from zero. Weights of -0 have no sign.
    - "best": scale codes from 4 below that to 3 above; for each, the doublings with the least squared error, weighted
      by `importance` if given; the code nearest to w / scale, ties to even. Errors are in quarters of the scale; a
      four's are summed in the order of columns, the fours of an eight, then the eights, and the sum is multiplied by
      the square of the scale relative to four of AMCT's. Among equals fewer doublings and smaller scales win.

    Parameters
    ----------
    weight : (rows, cols) float32, finite; cols a multiple of 64
    rule : "best" or "amct"
    importance : (1 or rows, cols) float32, 0 or more; only "best" looks at it

    Returns
    -------
    codes (rows, cols) uint8: sign << 3 | quarters; scale (rows, cols / 64) uint8; shift8 (rows, cols / 8) and
    shift4 (rows, cols / 4) uint8, 1 where doubled

    Raises
    ------
    LayoutError
        If there is no such rule, or cols are not as stated.
    """
    rows, cols = weight.shape
    scaled.known(rule, "hif4", ("best", "amct"))
    if cols % GROUP:
        raise LayoutError(f"hif4: {cols} columns, needs a multiple of {GROUP}")
    each = cols // GROUP
    groups = np.ascontiguousarray(weight, F32).reshape(-1, GROUP)
    weighs = scaled.importance_of(weight, importance).reshape(-1, GROUP)
    codes, scale = np.empty(groups.shape, np.uint8), np.empty(len(groups), np.uint8)
    shift8, shift4 = np.empty((len(groups), EIGHTS), np.uint8), np.empty((len(groups), FOURS), np.uint8)

    def work(start: int, stop: int) -> None:
        if rule == "amct":
            _amct(groups, start * each, stop * each, codes, scale, shift8, shift4)
        else:
            desk = _desk()
            _best(groups, weighs, start * each, stop * each, SCALES, desk, codes, scale, shift8, shift4)

    scaled.share_rows(work, weight)
    return {
        "codes": codes.reshape(rows, cols),
        "scale": scale.reshape(rows, each),
        "shift8": shift8.reshape(rows, cols // 8),
        "shift4": shift4.reshape(rows, cols // 4),
    }


class Desk(NamedTuple):
    """What a thread works with: LANES groups side by side."""

    weight: np.ndarray  # (64, LANES): magnitudes
    weighs: np.ndarray  # (64, LANES)
    base: np.ndarray  # (LANES,) int32: AMCT's scale codes
    scale: np.ndarray  # (LANES,): the candidates
    none: np.ndarray  # (2, LANES): errors of the two fours of an eight, not doubled
    single: np.ndarray  # (2, LANES): doubled once
    double: np.ndarray  # (2, LANES): doubled twice
    total: np.ndarray  # (LANES,): errors of the candidates
    best: np.ndarray  # (LANES,): the least so far
    code: np.ndarray  # (LANES,) int32: and its scale
    twice8: np.ndarray  # (8, LANES) uint8
    twice4: np.ndarray  # (16, LANES) uint8


def _desk() -> Desk:
    rows = {"weight": GROUP, "weighs": GROUP, "none": 2, "single": 2, "double": 2, "twice8": EIGHTS, "twice4": FOURS}
    dtypes = {"base": I32, "code": I32, "twice8": np.uint8, "twice4": np.uint8}

    def zeros(name: str) -> np.ndarray:
        return np.zeros((rows[name], LANES) if name in rows else (LANES,), dtypes.get(name, F32))

    return Desk(**{name: zeros(name) for name in Desk._fields})


# ---------------------------------------------------------------- AMCT


@njit(cache=True, nogil=True, inline="always")
def _bfloat16(x):
    """x >= 0 rounded half to even to bfloat16."""
    bits = F32(x).view(np.int32)
    return I32((bits + BELOW_HALF + ((bits >> LAST_KEPT) & BIT)) & BFLOAT16).view(np.float32)


@njit(cache=True, nogil=True)
def _scale_code(peak):
    """AMCT's code of the scale."""
    sevenths = min(max(_bfloat16(F32(peak * SEVENTH)), LEAST_SCALE), MOST_SCALE)
    bits = F32(sevenths).view(np.int32)
    return ((bits + E6M2_HALF + ((bits >> TWO_BITS) & BIT)) >> TWO_BITS) - E6M2_OFFSET


@njit(cache=True, nogil=True)
def _peak(block):
    top = ZERO
    for j in range(block.shape[0]):
        top = max(top, abs(block[j]))
    return top


@njit(cache=True, nogil=True)
def _amct(groups, first, last, codes, scale, shift8, shift4):
    """Groups first to last."""
    for i in range(first, last):
        code = _scale_code(_peak(groups[i]))
        scale[i] = np.uint8(code)
        value = I32((code + E6M2_OFFSET) << TWO_BITS).view(np.float32)
        inverse = _bfloat16(np.divide(ONE, value))
        for eight in range(EIGHTS):
            doubled = F32(_peak(groups[i, 8 * eight : 8 * eight + 8]) * inverse) >= FOUR
            shift8[i, eight] = np.uint8(doubled)
            for four in range(2 * eight, 2 * eight + 2):
                block = groups[i, 4 * four : 4 * four + 4]
                once = HALF if doubled else ONE
                again = F32(F32(_peak(block) * inverse) * once) >= TWO
                shift4[i, four] = np.uint8(again)
                halves = F32(once * HALF) if again else once
                for j in range(4):
                    remains = _bfloat16(F32(F32(abs(block[j]) * inverse) * halves))
                    quarters = min(np.floor(F32(F32(remains * FOUR) + HALF)), SEVEN)
                    negative = np.uint8(8) if block[j] < ZERO else np.uint8(0)
                    codes[i, 4 * four + j] = np.uint8(quarters) | negative


# ---------------------------------------------------------------- the best


@njit(cache=True, nogil=True)
def _best(groups, weighs, first, last, scales, desk, codes, scale, shift8, shift4):
    """Groups first to last; of scales (256,) those near AMCT's are tried."""
    code = desk.code
    for start in range(first, last, LANES):
        _load(groups, weighs, start, last, desk)
        for step in range(FIRST, LAST + 1):
            _try(I32(step), scales, desk)
        _decide(scales, desk)
        for lane in range(min(LANES, last - start)):
            i = start + lane
            if _peak(groups[i]) == ZERO:
                code[lane] = I32(0)
            scale[i] = np.uint8(code[lane])
            shift8[i], shift4[i] = desk.twice8[:, lane], desk.twice4[:, lane]
            _write(groups[i], scales[code[lane]], shift8[i], shift4[i], codes[i])


@njit(cache=True, nogil=True)
def _load(groups, weighs, start, last, desk):
    """Lay LANES groups side by side; beyond the last, the last again."""
    weight, importance = desk.weight, desk.weighs
    for lane in range(LANES):
        i = min(start + lane, last - 1)
        k = i % weighs.shape[0]
        for j in range(GROUP):
            weight[j, lane] = abs(groups[i, j])
            importance[j, lane] = weighs[k, j]
        desk.base[lane] = _scale_code(_peak(groups[i]))
        desk.code[lane] = desk.base[lane]
        desk.best[lane] = INFINITY


@njit(cache=True, nogil=True, inline="always")
def _off(y, once):
    """y >= 0 quarters less the nearest that can be written; `once` is 1, 1/2 or 1/4, of 0, 1 or 2 doublings."""
    nearest = F32(F32(min(F32(y * once), SEVEN) + WHOLE) - WHOLE)
    return F32(y - np.divide(nearest, once))


@njit(cache=True, nogil=True)
def _fours(four, desk):
    """The squared errors of a four in every lane, doubled not, once and twice."""
    weight, importance, scale = desk.weight, desk.weighs, desk.scale
    none, single, double = desk.none[four % 2], desk.single[four % 2], desk.double[four % 2]
    none[:], single[:], double[:] = ZERO, ZERO, ZERO
    for j in range(4 * four, 4 * four + 4):
        for lane in range(LANES):
            # np.divide, for / asks whether the divisor is zero, which no vector can
            y = np.divide(weight[j, lane], scale[lane])
            here, one, two = _off(y, ONE), _off(y, HALF), _off(y, QUARTER)
            none[lane] += F32(importance[j, lane] * F32(here * here))
            single[lane] += F32(importance[j, lane] * F32(one * one))
            double[lane] += F32(importance[j, lane] * F32(two * two))


@njit(cache=True, nogil=True)
def _try(step, scales, desk):
    """Try the scale codes `step` above AMCT's."""
    none, single, double, total = desk.none, desk.single, desk.double, desk.total
    scale, base, best, code = desk.scale, desk.base, desk.best, desk.code
    for lane in range(LANES):
        scale[lane] = scales[min(max(base[lane] + step, I32(0)), MOST_CODE)] * QUARTER
        total[lane] = ZERO
    for eight in range(EIGHTS):
        _fours(2 * eight, desk)
        _fours(2 * eight + 1, desk)
        for lane in range(LANES):
            plain = F32(min(none[0, lane], single[0, lane]) + min(none[1, lane], single[1, lane]))
            doubled = F32(min(single[0, lane], double[0, lane]) + min(single[1, lane], double[1, lane]))
            total[lane] += min(plain, doubled)
    for lane in range(LANES):
        unit = F32(np.divide(scale[lane], scales[base[lane]]))
        error = F32(total[lane] * F32(unit * unit))
        if error < best[lane]:
            best[lane] = error
            code[lane] = min(max(base[lane] + step, I32(0)), MOST_CODE)


@njit(cache=True, nogil=True)
def _decide(scales, desk):
    """The best doublings of the eights and fours in every lane, with the scale that was best."""
    none, single, double, twice8, twice4 = desk.none, desk.single, desk.double, desk.twice8, desk.twice4
    for lane in range(LANES):
        desk.scale[lane] = scales[desk.code[lane]] * QUARTER
    for eight in range(EIGHTS):
        _fours(2 * eight, desk)
        _fours(2 * eight + 1, desk)
        for lane in range(LANES):
            plain = F32(min(none[0, lane], single[0, lane]) + min(none[1, lane], single[1, lane]))
            doubled = F32(min(single[0, lane], double[0, lane]) + min(single[1, lane], double[1, lane]))
            twice8[eight, lane] = np.uint8(doubled < plain)
            for half in range(2):
                again = double[half, lane] < single[half, lane]
                if not doubled < plain:
                    again = single[half, lane] < none[half, lane]
                twice4[2 * eight + half, lane] = np.uint8(again)


@njit(cache=True, nogil=True)
def _write(group, scale, shift8, shift4, codes):
    """The codes of a group with this scale and these doublings."""
    for four in range(FOURS):
        doublings = I32(shift8[four // 2]) + I32(shift4[four])
        unit = F32(scale * I32((doublings + QUARTER_EXPONENT) << EXPONENT).view(np.float32))
        for j in range(4 * four, 4 * four + 4):
            y = F32(np.divide(abs(group[j]), unit))
            quarters = F32(F32(min(y, SEVEN) + WHOLE) - WHOLE)
            negative = (F32(group[j]).view(np.int32) >> SIGN) & BIT
            codes[j] = np.uint8(I32(quarters) | (negative << THREE_BITS))
