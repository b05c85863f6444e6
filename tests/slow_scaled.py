"""The encoders of kernels/scaled.py and kernels/hif4.py once more, in plain NumPy, from what their docstrings say.

Numbers are looked up in tables, and the nearest is found by trying all; sums are taken column by column in float32.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

F32, F64 = np.float32, np.float64
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Parts = dict[str, Any]

MOST = np.finfo(F32).max
E4M3: Floats = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
E5M3: Floats = np.array(
    [m * 2.0**-17 for m in range(8)] + [(8 + i % 8) * 2.0 ** (i // 8 - 17) for i in range(247)], F32
)
E2M1: Floats = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(F32)
E8M0: Floats = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(F32)
E6M2: Floats = np.array([(1 + i % 4 / 4) * 2.0 ** (i // 4 - 48) for i in range(255)], F32)


def magnitudes(numbers: Floats) -> Floats:
    """The numbers of codes 0, 1, 2 ... as long as they rise."""
    count = 1
    while count < len(numbers) and numbers[count - 1] < numbers[count] < np.inf:
        count += 1
    return numbers[:count]


def power_of(numbers: Floats) -> Floats:
    """The largest power of two up to the largest number."""
    return F32(2.0 ** np.floor(np.log2(magnitudes(numbers)[-1].astype(F64))))


def nearest(y: Floats, table: Floats) -> npt.NDArray[np.int64]:
    """Where in an ascending table the number nearest to y >= 0 is; of two the even place."""
    exact, sorted_numbers = np.minimum(y, table[-1]).astype(F64), table.astype(F64)
    above = np.minimum(np.searchsorted(sorted_numbers, exact), len(table) - 1)
    below = np.maximum(above - 1, 0)
    up, down = sorted_numbers[above] - exact, exact - sorted_numbers[below]
    return np.where(up < down, above, np.where(down < up, below, np.where(above % 2 == 0, above, below)))


def with_sign(code: npt.NDArray[Any], weight: Floats, numbers: Floats) -> Bytes:
    """Codes of magnitudes and the weights' signs, as the table of all numbers has them."""
    negative = np.signbit(weight)
    if numbers[-1] == -numbers[1]:
        return np.where(negative, -code % len(numbers), code).astype(np.uint8)
    return np.where(negative, code + len(numbers) // 2, code).astype(np.uint8)


def codes_of(weight: Floats, scale: Floats, numbers: Floats, per_unit: float = 1) -> Bytes:
    """Codes of w / scale, times `per_unit`; all magnitudes are 0 where the scale is 0."""
    with np.errstate(all="ignore"):
        y = np.abs(weight / scale) * F32(per_unit)
    return with_sign(nearest(np.where(scale > 0, y, F32(0)), magnitudes(numbers)), weight, numbers)


def error(weight: Floats, scale: Floats, weighs: Floats, numbers: Floats, per_unit: float) -> Floats:
    """(blocks,): sum of importance * (y - nearest)**2 in powers of two, in float32, column by column."""
    table = magnitudes(numbers)
    unit = power_of(numbers)
    total = np.zeros(len(weight), F32)
    with np.errstate(all="ignore"):
        for j in range(weight.shape[1]):
            y = np.abs(weight[:, j]) / scale * F32(per_unit)
            off = y / unit - table[nearest(y, table)] / unit
            total = total + weighs[:, j] * (off * off)
    return total


def sweep(
    weight: Floats, weighs: Floats, scales: Floats, base: npt.NDArray[np.int64], window: tuple[int, int, int, int],
    kinds: list[tuple[Floats, float]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:  # fmt: skip
    """Which scale code and which of the elements are best, (blocks,) each."""
    first, last, least, most = window
    base = base.clip(least, most)
    best, code, kind = np.full(len(base), np.inf, F32), base, np.zeros(len(base), np.int64)
    if first == last and len(kinds) == 1:
        return base, kind
    for which, (numbers, per_unit) in enumerate(kinds):
        for step in range(first, last + 1):
            tried = (base + step).clip(least, most)
            unit = scales[tried] / scales[base] / F32(per_unit / power_of(numbers))
            with np.errstate(over="ignore"):
                total = error(weight, scales[tried], weighs, numbers, per_unit) * (unit * unit)
            better = total < best
            best, code = np.where(better, total, best), np.where(better, tried, code)
            kind = np.where(better, which, kind)
    return code, kind


def blocks_of(weight: Floats, importance: Floats | None, size: int) -> tuple[Floats, Floats]:
    weighs = np.ones_like(weight) if importance is None else np.broadcast_to(importance, weight.shape)
    return weight.reshape(-1, size), weighs.reshape(-1, size)


def mx(weight: Floats, numbers: Floats, rule: str = "best", importance: Floats | None = None) -> Parts:
    blocks, weighs = blocks_of(weight, importance, 32)
    peak = np.abs(blocks).max(axis=1)
    largest = magnitudes(numbers)[-1]
    emax = int(np.floor(np.log2(largest)))
    fraction, exponent = np.frexp(peak)
    exponent = exponent - 1
    if rule == "modelopt":
        with np.errstate(divide="ignore"):
            # the exponents of zeros are never used
            base = np.ceil(np.log2((peak / largest).astype(F64)).astype(F32)).clip(-300, 300).astype(np.int64)
    else:
        up = {"compressed-tensors": 1.9375 if len(numbers) == 64 else 1.75}.get(rule, 2)
        base = exponent + (2 * fraction >= up) - emax
    beside = 1 if rule == "best" else 0
    code, _ = sweep(blocks, weighs, E8M0, base + 127, (-beside, beside, 0, 254 - emax), [(numbers, 1)])
    code = np.where(peak > 0, code, 0)
    codes = codes_of(blocks, E8M0[code][:, None], numbers)
    return {"codes": codes.reshape(weight.shape), "scale": code.astype(np.uint8).reshape(len(weight), -1)}


def sixteen(
    weight: Floats, importance: Floats | None, whole: Floats, table: Floats, kinds: list[tuple[Floats, float]],
    largest: int, around: tuple[int, int],
) -> Parts:  # fmt: skip
    """Blocks of 16 with scales table[code] * whole."""
    blocks, weighs = blocks_of(weight, importance, 16)
    peak = np.abs(blocks).max(axis=1)
    with np.errstate(over="ignore"):
        scales = table * whole
        most = int(np.flatnonzero(np.isfinite(scales * F32(largest)))[-1])
    base = nearest(peak / F32(largest) / whole, table)
    code, kind = sweep(blocks, weighs, scales, base, (*around, 1, most), kinds)
    code, kind = np.where(peak > 0, code, 0), np.where(peak > 0, kind, 0)
    found = [codes_of(blocks, scales[code][:, None], *one) for one in kinds]
    codes = np.where(kind[:, None] > 0, found[-1], found[0])
    return {
        "codes": codes.reshape(weight.shape),
        "scale": (code + 128 * kind).astype(np.uint8).reshape(len(weight), -1),
        "global_scale": np.array([whole], F32),
    }


def whole_of(weight: Floats, peak: float | None, largest: int, two: bool) -> Floats:
    top = np.abs(weight).max(initial=0) if peak is None else F32(peak)
    if not top:
        return F32(1)
    if not two:
        return max(top / F32(largest * 448), F32(2.0**-117))
    exponent = -117
    while float(top) > largest * 448 * 2.0**exponent:
        exponent += 1
    return F32(2.0**exponent)


def int_numbers(bits: int) -> Floats:
    return np.array([*range(1 << bits - 1), *range(-(1 << bits - 1), 0)], F32)


FP4: Floats = np.concatenate([E2M1, -E2M1])


def nvint4(weight: Floats, rule: str = "best", peak: float | None = None, importance: Floats | None = None) -> Parts:
    whole = whole_of(weight, peak, 7, rule == "best")
    around = (-2, 6) if rule == "best" else (0, 0)
    return sixteen(weight, importance, whole, E4M3, [(int_numbers(4), 1)], 7, around)


def if4(weight: Floats, rule: str = "best", peak: float | None = None, importance: Floats | None = None) -> Parts:
    whole = whole_of(weight, peak, 6, rule == "best")
    around = (-2, 6) if rule == "best" else (0, 0)
    return sixteen(weight, importance, whole, E4M3, [(FP4, 1), (int_numbers(4), 7 / 6)], 6, around)


def fp4_ue5m3(weight: Floats, rule: str = "best", importance: Floats | None = None) -> Parts:
    around = (-2, 6) if rule == "best" else (0, 0)
    parts = sixteen(weight, importance, F32(1), E5M3, [(FP4, 1)], 6, around)
    del parts["global_scale"]
    return parts


# ---------------------------------------------------------------- HiF4


def bfloat16(x: npt.ArrayLike) -> Floats:
    return np.asarray(x, F32).astype(ml_dtypes.bfloat16).astype(F32)


def hif4_scale(peak: Floats) -> npt.NDArray[np.int64]:
    """AMCT's scale code: the E6M2 number nearest to peak / 7 as bfloat16; even codes have even mantissas."""
    return nearest(bfloat16(peak * bfloat16(1 / 7)).clip(F32(2.0**-48), F32(49152)), E6M2)


def hif4_amct(weight: Floats) -> Parts:
    groups = weight.reshape(-1, 8, 2, 4)
    size = np.abs(groups)
    code = hif4_scale(size.max(axis=(1, 2, 3)))
    inverse = bfloat16(1 / E6M2[code])[:, None, None, None]
    twice8 = size.max(axis=(2, 3), keepdims=True) * inverse >= 4
    remains = np.ldexp(F32(1), -twice8.astype(int))
    twice4 = size.max(axis=3, keepdims=True) * inverse * remains >= 2
    remains = remains * np.ldexp(F32(1), -twice4.astype(int))
    quarters = np.minimum(np.floor(bfloat16(size * inverse * remains) * 4 + F32(0.5)), 7)
    codes = quarters.astype(np.uint8) | (np.uint8(8) * (groups < 0))
    rows = len(weight)
    return {
        "codes": codes.astype(np.uint8).reshape(weight.shape),
        "scale": code.astype(np.uint8).reshape(rows, -1),
        "shift8": twice8.astype(np.uint8).reshape(rows, -1),
        "shift4": twice4.astype(np.uint8).reshape(rows, -1),
    }


def hif4_best(weight: Floats, importance: Floats | None = None) -> Parts:
    groups, weighs = blocks_of(weight, importance, 64)
    base = hif4_scale(np.abs(groups).max(axis=1))
    found = [
        hif4_group(*group) if group[0].any() else (0, [0] * 8, [0] * 16)
        for group in zip(groups, weighs, base.tolist(), strict=True)
    ]
    scale, shift8, shift4 = (np.array(list(part), np.uint8) for part in zip(*found, strict=True))
    doublings = np.repeat(shift8, 8, axis=1) + np.repeat(shift4, 4, axis=1)
    quarter = E6M2[scale][:, None] / 4 * np.ldexp(F32(1), doublings.astype(int))
    codes = nearest(np.abs(groups) / quarter, np.arange(8, dtype=F32)) | np.where(np.signbit(groups), 8, 0)
    rows = len(weight)
    return {
        "codes": codes.astype(np.uint8).reshape(weight.shape),
        "scale": scale.reshape(rows, -1),
        "shift8": shift8.reshape(rows, -1),
        "shift4": shift4.reshape(rows, -1),
    }


def hif4_group(group: Floats, weighs: Floats, base: int) -> tuple[int, list[int], list[int]]:
    """Scale code and doublings of one group."""
    best, found = F32(np.inf), (base, *doublings_of(group, weighs, base)[1:])
    for code in range(base - 4, base + 4):
        code = min(max(code, 0), 254)
        total, shift8, shift4 = doublings_of(group, weighs, code)
        unit = E6M2[code] / 4 / E6M2[base]
        with np.errstate(over="ignore"):
            relative = total * (unit * unit)
        if relative < best:
            best, found = relative, (code, shift8, shift4)
    return found


def doublings_of(group: Floats, weighs: Floats, code: int) -> tuple[Floats, list[int], list[int]]:
    """The least error of a group with this scale, and the doublings that give it."""
    total, shift8, shift4 = F32(0), [], []
    for eight in range(8):
        found = []
        for twice8 in (0, 1):
            fours = [
                min((four_error(group, weighs, E6M2[code], first, twice8 + twice4), twice4) for twice4 in (0, 1))
                for first in (8 * eight, 8 * eight + 4)
            ]
            found.append((F32(fours[0][0] + fours[1][0]), twice8, [four[1] for four in fours]))
        least = min(found)
        total = F32(total + least[0])
        shift8.append(least[1])
        shift4 += least[2]
    return total, shift8, shift4


def four_error(group: Floats, weighs: Floats, scale: Floats, first: int, doublings: int) -> Floats:
    total = F32(0)
    for j in range(first, first + 4):
        y = np.abs(group[j]) / (scale / 4)
        off = y - F32(min(np.rint(y * F32(2.0**-doublings)), 7) * 2**doublings)
        with np.errstate(invalid="ignore"):  # 0 times infinity
            total = total + weighs[j] * (off * off)
    return F32(total)


# ---------------------------------------------------------------- scales of tiles


def spread(scale: npt.NDArray[Any], shape: tuple[int, ...], share: tuple[int, int]) -> npt.NDArray[Any]:
    """The scale of every weight."""
    tall = np.repeat(scale, share[0] or shape[0], axis=0)[: shape[0]]
    return np.repeat(tall, share[1] or shape[1], axis=1)[:, : shape[1]]


def tiles(weight: Floats, share: tuple[int, int]) -> list[list[Floats]]:
    rows, cols = (share[i] or weight.shape[i] for i in range(2))
    return [
        [weight[i : i + rows, j : j + cols] for j in range(0, weight.shape[1], cols)]
        for i in range(0, weight.shape[0], rows)
    ]


def narrow(x: npt.ArrayLike, dtype: str) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(x, F32).astype(getattr(ml_dtypes, dtype, dtype)).astype(F32)


def fp8(weight: Floats, share: tuple[int, int], dtype: str = "<f4", rule: str = "amax") -> Parts:
    numbers = np.concatenate([E4M3, [np.nan], -E4M3, [np.nan]]).astype(F32)
    peaks = np.array([[np.abs(tile).max() for tile in row] for row in tiles(weight, share)], F32)
    if dtype == "float8_e8m0fnu":
        code = [
            [next(i for i in range(247) if i == 246 or 448 * 2.0 ** (i - 127) >= peak) for peak in row]
            for row in peaks.tolist()
        ]
        scale: Any = np.array(code, np.uint8)
        wide = spread(E8M0[scale], weight.shape, share)
    else:
        scale = narrow(peaks / 448, dtype)
        over = scale.astype(F64) * 448 > MOST
        step = 1 if dtype == "<f4" else 1 << 16
        scale = np.where(over, (scale.view(np.int32) - np.int32(step)).view(F32), scale)
        scale[scale == 0] = 2.0**-7 if dtype == "bfloat16" else 2.0**-23
        wide = spread(scale, weight.shape, share)
    if rule == "compressed-tensors" and dtype == "bfloat16":
        return {"codes": codes_of(narrow(weight / wide, dtype), np.ones_like(wide), numbers), "scale": scale}
    return {"codes": codes_of(weight, wide, numbers), "scale": scale}


def sixteen_sums(terms: Floats) -> float:
    """Column j in float32 sum j % 16, the sums in order in float64."""
    sums = np.zeros(16, F32)
    for row in np.append(terms, np.zeros(-len(terms) % 16, F32)).reshape(-1, 16):
        sums = sums + row
    return sum(sums.tolist())


def minifloat(
    weight: Floats, numbers: Floats, share: tuple[int, int], rule: str = "best", importance: Floats | None = None
) -> Parts:
    table = magnitudes(numbers)
    weighs = np.ones_like(weight) if importance is None else np.broadcast_to(importance, weight.shape)
    scale = np.array([[np.abs(tile).max() / table[-1] for tile in row] for row in tiles(weight, share)], F32)
    limit = F32(MOST / F64(table[-1]))
    while float(limit) * float(table[-1]) > MOST:
        limit = np.nextafter(limit, F32(0))
    scale = np.minimum(scale, limit)
    scale[scale == 0] = 2.0**-23
    if rule == "best":
        for i, row in enumerate(zip(tiles(weight, share), tiles(weighs, share), strict=True)):
            for j, (tile, importance_here) in enumerate(zip(*row, strict=True)):
                scale[i, j] = best_scale(tile, importance_here, table, scale[i, j], limit)
    return {"codes": codes_of(weight, spread(scale, weight.shape, share), numbers), "scale": scale}


def best_scale(tile: Floats, weighs: Floats, table: Floats, base: Floats, limit: Floats) -> Floats:
    found = []
    for k in range(3, 37):
        with np.errstate(over="ignore"):
            scale = max(min(F32(base * F32(k / 24)), limit), F32(2.0**-149))
        y = np.abs(tile) / scale
        off = (y - table[nearest(y, table)]) / power_of(table)
        unit = float(scale / base)
        total = 0.0
        for terms in weighs * (off * off):
            total += sixteen_sums(terms) * (unit * unit)
        found.append((total, k, scale))
    return min(found)[2]


def packed_int(
    weight: Floats, bits: int, group: int, symmetric: bool = True, dtype: str = "bfloat16", rule: str = "best",
    importance: Floats | None = None,
) -> Parts:  # fmt: skip
    rows, cols = weight.shape
    weighs = np.ones_like(weight) if importance is None else np.broadcast_to(importance, weight.shape)
    size = group or cols
    out: Parts = {"codes": np.zeros(weight.shape, np.uint8), "scale": np.zeros((rows, cols // size), F32)}
    if not symmetric:
        out["zero"] = np.zeros((rows, cols // size), np.uint8)
    for row, part in np.ndindex(rows, cols // size):
        at = slice(part * size, part * size + size)
        scale, zero, codes = packed_group(weight[row, at], weighs[row, at], bits, symmetric, dtype, rule)
        out["codes"][row, at], out["scale"][row, part] = codes, scale
        if not symmetric:
            out["zero"][row, part] = zero
    return out


def packed_group(
    group: Floats, weighs: Floats, bits: int, symmetric: bool, dtype: str, rule: str
) -> tuple[Floats, int, npt.NDArray[np.int64]]:
    """Scale, zero point and codes of one group, both with 2**(bits - 1) added."""
    kept = dtype if rule == "compressed-tensors" else "<f4"
    least, most, steps = -(1 << bits - 1), (1 << bits - 1) - 1, F32((1 << bits) - 1)
    low, high = min(group.min(), F32(0)), max(group.max(), F32(0))
    zero = F32(0)
    with np.errstate(all="ignore"):
        if symmetric:
            scale = narrow(max(-low, high) / (steps / F32(2)), kept)
        else:
            width = narrow(high - low, kept)
            scale = narrow(width / steps if np.isfinite(width) else high / steps - low / steps, kept)
            if scale > 0:
                zero = np.rint(narrow(F32(least) - narrow(low / scale, kept), kept).clip(least, most))
    away = max(most - float(zero), float(zero) - least)
    scale = min(narrow(scale, dtype), most_scale(away, dtype))
    if scale == 0:
        scale = F32({"<f4": 2.0**-23, "bfloat16": 2.0**-7, "<f2": 2.0**-10}[dtype])
    if rule == "best":
        scale = best_whole(group, weighs, scale, zero, (least, most), away, dtype)
    moved = narrow(narrow(group / scale, kept) + zero, kept)
    return scale, int(zero) - least, np.rint(moved.clip(least, most)).astype(np.int64) - least


def most_scale(away: float, dtype: str) -> Floats:
    """The largest scale with which so many steps are a float32."""
    if dtype == "<f2":
        return F32(np.inf)
    step = 1 if dtype == "<f4" else 1 << 16
    bits = (F32(MOST / away).view(np.int32) // step + 1) * step
    while float(np.int32(bits).view(F32)) * away > MOST:
        bits -= step
    return np.int32(bits).view(F32)


def best_whole(
    group: Floats, weighs: Floats, base: Floats, zero: Floats, ends: tuple[int, int], away: float, dtype: str
) -> Floats:
    found = []
    for k in range(8, 31):
        with np.errstate(over="ignore"):
            scale = min(narrow(base * F32(k / 24), dtype), most_scale(away, dtype))
        if scale == 0:
            scale = F32({"<f4": 2.0**-149, "bfloat16": 2.0**-133, "<f2": 2.0**-24}[dtype])
        moved = group / scale + zero
        off = moved - np.rint(moved.clip(*ends))
        unit = float(scale / base)
        found.append((sixteen_sums(weighs * (off * off)) * (unit * unit), k, scale))
    return min(found)[2]
