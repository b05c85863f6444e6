"""The canonical product once more, in NumPy, from spec/products.md and a layout's description; no kernel, no tiling.

Two ways. Where a layout's numbers are whole steps times a scale, activations become whole numbers of eight bits, block
by block, and steps are multiplied with those. All others are decoded and multiplied as float32, in 64 lanes.

Steps are read here anew, from the pages of the formats, and not by what the package reads them with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import grids, minifloat
from packfmt.codec import PackedTensor
from packfmt.layout import Layout

F32, F64 = np.float32, np.float64
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Parts = dict[str, npt.NDArray[Any]]

WHOLE, NUMBERS = "whole steps", "numbers"
BLOCK = 256  # columns, at most
MOST_STEP = 1024
LEAST_SHARE = 4  # columns, unless a scale spans the row
HIGHEST = 127  # of an activation's code
LANES = 64
APART = ("columns", "column_values")
SHIFTS = ("shift8", "shift4")  # each doubles a step as many times as it says


def product(packed: PackedTensor, x: Floats) -> Floats:
    """x (batch, cols) float32 times the transposed weight: (batch, rows) float32."""
    layout, parts = packed.layout, packed.unpack()
    with np.errstate(all="ignore"):
        if layout.hadamard:
            x = rotated(x, layout.hadamard)
        rest, aside = x.copy(), x[:, :0]
        if "columns" in parts:
            columns = parts["columns"].reshape(-1).astype(np.int64)
            aside, rest[:, columns] = x[:, columns], 0
        rest = in_stored_order(layout, parts, rest)
        if way(layout, packed.matrix) == WHOLE:
            y = of_steps(read(layout, packed.matrix, parts), rest)
        else:
            y = of_numbers(stored_numbers(packed, parts), rest)
        if "columns" in parts:
            values = parts["column_values"].reshape(y.shape[1], len(columns)).astype(F32)
            for j in last_named(columns):
                y = y + values[None, :, j] * aside[:, j, None]
    return y


def last_named(columns: Ints) -> list[int]:
    """Places of columns kept apart, in order, but for those whose column is named again."""
    return [j for j, column in enumerate(columns) if column not in columns[j + 1 :]]


# ---------------------------------------------------------------- activations


def rotated(x: Floats, size: int) -> Floats:
    """Every `size` columns times the Hadamard matrix, as spec/formats/rotated.md says."""
    out = x.copy().reshape(len(x), x.shape[1] // size, size)
    stride = 1
    while stride < size:
        for i in (i for i in range(size) if i // stride % 2 == 0):
            a, b = out[..., i].copy(), out[..., i + stride].copy()
            out[..., i], out[..., i + stride] = a + b, a - b
        stride *= 2
    return (out * F32(1 / np.sqrt(size))).reshape(x.shape)


def in_stored_order(layout: Layout, parts: Parts, x: Floats) -> Floats:
    """The activation of every stored column; 0 for the second of two that are stored twice."""
    if "perm" in parts:
        x = x[:, parts["perm"].reshape(-1).astype(np.int64)]
    if layout.grid.name != "augmented":
        return x
    stored = parts["codes"].shape[1]
    residual, group = layout.grid["residual"], layout.grid["group"]
    out, place = np.zeros((len(x), stored), F32), 0
    for column in range(x.shape[1]):
        out[:, place] = x[:, column]
        place += 1
        if column >= x.shape[1] - residual and (column - x.shape[1] + residual) % group == group - 1:
            place += group  # over the copies
    return out


# ---------------------------------------------------------------- the way of whole steps


class Steps(NamedTuple):
    """What whole steps a weight has.

    steps : (rows, planes, stored columns)
    scale : (rows, planes, stored columns) float32, w of each
    unit : what a step counts
    group : columns that share a scale
    """

    steps: Ints
    scale: Floats
    unit: float
    group: int


def blocks(cols: int, group: int) -> Iterator[tuple[int, int]]:
    """Columns that share a scale, cut after every 256 from the first of them."""
    for first in range(0, cols, group):
        end = min(cols, first + group)
        for start in range(first, end, BLOCK):
            yield start, min(end, start + BLOCK)


def of_steps(of: Steps, x: Floats) -> Floats:
    """Whole steps times activations of eight bits."""
    y = np.zeros((len(x), len(of.steps)), F32)
    for start, stop in blocks(x.shape[1], of.group):
        mine = x[:, start:stop]
        most = np.abs(mine).max(1)
        a = most / F32(HIGHEST)
        q = np.rint(mine / a[:, None]).clip(-HIGHEST, HIGHEST)
        q[(a == 0) | ~np.isfinite(most)] = 0
        a[~np.isfinite(most)] = np.nan
        assert q.dtype == a.dtype == F32
        for plane in range(of.steps.shape[1]):
            dot = q.astype(F64) @ of.steps[:, plane, start:stop].astype(F64).T  # whole numbers below 2**26
            y = y + dot.astype(F32) * (of.scale[None, :, plane, start] * (a * F32(of.unit))[:, None])
    return y


# ---------------------------------------------------------------- the way of numbers


def of_numbers(weight: Floats, x: Floats) -> Floats:
    """Products as they come, in 64 lanes, which are added up at the end."""
    lanes = np.zeros((len(x), len(weight), LANES), F32)
    for start in range(0, x.shape[1], LANES):
        w, mine = weight[None, :, start : start + LANES], x[:, None, start : start + LANES]
        lanes[:, :, : w.shape[2]] += w * mine
    half = LANES // 2
    while half:
        lanes[:, :, :half] += lanes[:, :, half : 2 * half]
        half //= 2
    return lanes[:, :, 0]


def stored_numbers(packed: PackedTensor, parts: Parts) -> Floats:
    """The weights as they are stored: neither turned back nor put in order."""
    layout = packed.layout
    if layout.grid.name == "augmented":
        params = {k: v for k, v in layout.grid.params if k not in ("residual", "group")}
        return grids.scaled({k: v[..., 0] for k, v in parts.items()}, **params)
    kept = tuple(c for c in layout.components if not {m.name for m in getattr(c, "cell", ())} & set(APART))
    named = {d.axis for c, _, digits in replace(layout, components=kept).members() for d in (*c.over, *digits)}
    axes = tuple(a for a in layout.axes if a.of or a.name in named)
    bare = replace(layout, components=kept, axes=axes, hadamard=0)
    weight = PackedTensor(bare, packed.matrix, {c.name: packed.components[c.name] for c in kept}).decode()
    if "perm" in parts:
        weight = weight[:, parts["perm"].reshape(-1).astype(np.int64)]
    return weight


# ---------------------------------------------------------------- which way


def way(layout: Layout, shape: tuple[int, int]) -> str:
    """The way that a layout's description says."""
    read = {"codes", "scale", "perm", "columns", "column_values"} | {"affine_zero": {"zero"}}.get(
        layout.grid.name, set()
    )
    read |= set(SHIFTS) if layout.grid.name == "hif4" else set()
    read |= {"global_scale"} if dict(layout.grid.params).get("global_scale") else set()
    if layout.fit(*shape).parts.keys() - read:  # other parts than its grid reads
        return NUMBERS
    every = every_step(layout, shape)
    if every is None or np.abs(every).max(initial=0) > MOST_STEP:
        return NUMBERS
    at = column_axis(layout)
    digits = [d for _, m, of in layout.members() if m.name == "scale" for d in of]
    by_row = all(d.axis != layout.axes[at].name for d in digits)
    return WHOLE if by_row or group_of(layout, shape) >= LEAST_SHARE else NUMBERS


def every_step(layout: Layout, shape: tuple[int, int]) -> Floats | None:
    """What steps there can be; None if the numbers are none."""
    params, part = dict(layout.grid.params), layout.fit(*shape).parts
    codes = part.get("codes")
    signed = codes is not None and codes.dtype.startswith(("i", "<i"))
    if codes is None or ("f" in codes.dtype and layout.grid.name not in ("scaled", "augmented")):
        return None
    lowest = -(1 << codes.bits - 1) if signed else 0
    ends = np.array([lowest, lowest + (1 << min(codes.bits, 40)) - 1], F64)
    name = layout.grid.name
    several = ("quads", "quads_in_fives", "base3", "plane_base3", "pairs", "tl2")  # weights a code
    if codes.share[0] > 1 or (codes.share[column_axis(layout)] > 1 and name not in several):
        return None
    if not float(params.get("ratio", 0)).is_integer() or params.get("ratio", 0) < 0:
        return None
    if name in ("affine", "quotient", "planes"):
        return ends - params["zero"] if float(params["zero"]).is_integer() else None
    if name == "affine_zero":
        zero = part["zero"]
        if "f" in zero.dtype:
            return None
        least = -(1 << zero.bits - 1) if zero.dtype.startswith(("i", "<i")) else 0
        return np.array([ends[0] - least - (1 << zero.bits) + 1, ends[1] - least])
    if name in ("levels", "table"):
        values = np.array(params["values"], F32)
        return values / unit_of(values) if unit_of(values) else None
    if name in ("scaled", "augmented", "hif4"):
        values = minifloat.numbers(params["element"]).astype(F64)
        doubled = sum((1 << part[shift].bits) - 1 for shift in SHIFTS) if name == "hif4" else 0
        return values / unit_of(values) * 2.0 ** min(doubled, 1000) if unit_of(values) else None
    trits = ("quads", "quads_in_fives", "base3", "plane_digits", "plane_base3", "pairs", "tl2")
    return np.array([-1, 1], F64) if name in trits else None


def unit_of(numbers: npt.NDArray[Any]) -> float:
    """The largest power of two of which all numbers are multiples; 0 if there is none."""
    some = numbers[numbers != 0].astype(F64)
    if not np.isfinite(numbers).all():
        return 0
    return 2.0 ** min((int(lowest_bit(abs(float(n)))) for n in some), default=0)


def lowest_bit(number: float) -> int:
    """The exponent of the lowest bit that is set."""
    over, under = number.as_integer_ratio()
    return (over & -over).bit_length() - under.bit_length()


# ---------------------------------------------------------------- reading steps


def column_axis(layout: Layout) -> int:
    """Which axis columns run along, as codes are counted."""
    return next(i for i, a in enumerate(layout.axes) if a.of == "cols")


def group_of(layout: Layout, shape: tuple[int, int]) -> int:
    """How many stored columns share a scale."""
    at = column_axis(layout)
    return max(1, layout.fit(*shape).parts["scale"].share[at] * layout.axes[at].per)


def spread(layout: Layout, shape: tuple[int, int], name: str, array: npt.NDArray[Any], cols: int) -> npt.NDArray[Any]:
    """A part (of rows, planes, groups) once for every weight that shares it."""
    share, at = layout.fit(*shape).parts[name].share, column_axis(layout)
    rows = np.arange(shape[0]) // (share[0] * layout.axes[0].per)
    columns = np.arange(cols) // (share[at] * layout.axes[at].per)
    return array[rows][:, :, columns]


def with_planes(array: npt.NDArray[Any], planes: bool) -> npt.NDArray[Any]:
    """(rows, planes, groups) of a part, whose further axes have one place."""
    kept = 3 if planes else 2
    assert all(n == 1 for n in array.shape[kept:])
    flat = array.reshape(array.shape[:kept])
    return flat if planes else flat[:, None]


def read(layout: Layout, shape: tuple[int, int], parts: Parts) -> Steps:
    """Steps, scales and unit of a tensor."""
    name, params = layout.grid.name, dict(layout.grid.params)
    planes = name in ("planes", "plane_digits", "plane_base3")
    steps, unit = READERS[name](parts["codes"], **params)
    cols = steps.shape[2]
    if name == "affine_zero":
        steps = steps - spread(layout, shape, "zero", with_planes(parts["zero"], False).astype(np.int64), cols)
    if name == "hif4":
        for shift in SHIFTS:
            each = with_planes(parts[shift], False).astype(np.int64)
            steps = steps << spread(layout, shape, shift, each, cols)
    scale = scale_numbers(layout, with_planes(parts["scale"], planes))
    if params.get("global_scale"):
        whole = parts["global_scale"].astype(F32)
        whole = whole.reshape(-1)[np.arange(len(scale)) * whole.size // max(1, len(scale))][:, None, None]
        scale = scale * whole if params["global_scale"] == "times" else scale / whole
    if name == "quotient":
        scale = F32(1) / scale
    count = steps.shape[1]
    if params.get("ratio"):
        scale = np.concatenate([scale * F32(params["ratio"] ** (count - 1 - p)) for p in range(count)], 1)
    assert scale.dtype == F32
    found = spread(layout, shape, "scale", scale, cols)
    return Steps(steps, np.broadcast_to(found, steps.shape), unit, group_of(layout, shape))


def scale_numbers(layout: Layout, stored: npt.NDArray[Any]) -> Floats:
    """Scales as float32."""
    params = dict(layout.grid.params)
    if layout.grid.name == "table":
        return np.ldexp(F32(1), stored.astype(np.int32) - params["exponent"])
    if params.get("scale"):
        return minifloat.numbers(params["scale"])[stored]
    return stored.astype(F32)


def _affine(codes: npt.NDArray[Any], zero: int = 0, **_: Any) -> tuple[Ints, float]:
    return codes.reshape(codes.shape[:2])[:, None].astype(np.int64) - int(zero), 1.0


def _planes(codes: npt.NDArray[Any], zero: int, **_: Any) -> tuple[Ints, float]:
    return codes.reshape(codes.shape[:3]).astype(np.int64) - int(zero), 1.0


def _levels(codes: npt.NDArray[Any], values: tuple[float, ...], **_: Any) -> tuple[Ints, float]:
    numbers = np.array(values, F32)
    unit = unit_of(numbers)
    return (numbers / unit).astype(np.int64)[codes.reshape(codes.shape[:2])][:, None], unit


def _scaled(codes: npt.NDArray[Any], element: str, **_: Any) -> tuple[Ints, float]:
    return _levels(codes if codes.dtype.kind == "u" else codes.view(np.uint8), tuple(minifloat.numbers(element)))


def _quads(codes: npt.NDArray[Any], stride: int, values: Any, **_: Any) -> tuple[Ints, float]:
    four = np.array(values, np.int64)[codes.reshape(codes.shape[:2])]
    out = np.empty((len(codes), 1, 4 * four.shape[1]), np.int64)
    quad = np.arange(four.shape[1])
    for lane in range(4):
        out[:, 0, 4 * stride * (quad // stride) + quad % stride + stride * lane] = four[:, :, lane]
    return out, 1.0


def _fives(words: npt.NDArray[Any], **params: Any) -> tuple[Ints, float]:
    words = words.astype(np.int64)
    codes = np.zeros((*words.shape[:2], 16), np.int64)
    for word in range(5):
        for i in range(3):
            codes[:, :, 3 * word + i] = words[:, :, word] >> 5 * i & 31
        codes[:, :, 15] |= (words[:, :, word] >> 15 & 1) << word
    return _quads(codes.reshape(len(codes), -1), **params)


def _base3(codes: npt.NDArray[Any], block: int, runs: Any, first: str, **_: Any) -> tuple[Ints, float]:
    out = np.empty((*codes.shape[:2], block), np.int64)
    byte = column = 0
    for count, digits in runs:
        for digit in range(digits):
            worth = digit if first == "high" else 4 - digit
            some = codes[:, :, byte : byte + count].astype(np.int64)
            out[:, :, column + count * digit : column + count * (digit + 1)] = 3 * (some * 3**worth % 256) // 256 - 1
        byte, column = byte + count, column + count * digits
    return out.reshape(len(out), 1, -1), 1.0


def _plane_base3(codes: npt.NDArray[Any], **params: Any) -> tuple[Ints, float]:
    each = [_base3(codes[:, plane], **params)[0] for plane in range(codes.shape[1])]
    return np.concatenate(each, 1), 1.0


def _plane_digits(codes: npt.NDArray[Any], count: int, **_: Any) -> tuple[Ints, float]:
    flat = codes.reshape(len(codes), codes.shape[-1]).astype(np.int64)
    return np.stack([flat // 3 ** (count - 1 - plane) % 3 - 1 for plane in range(count)], 1), 1.0


def _pairs(codes: npt.NDArray[Any]) -> tuple[Ints, float]:
    flat = codes.reshape(codes.shape[:2]).astype(np.int64)
    two = np.stack([flat // 3 - 1, flat % 3 - 1], 2) * (flat < 9)[:, :, None]
    return two.reshape(len(flat), 1, -1), 1.0


def _tl2(codes: npt.NDArray[Any], rows: int, cols: int, bm: int, bk: int) -> tuple[Ints, float]:
    down = [np.concatenate([_tl2_matrix(m, rows, cols, bm, bk) for m in side], 1) for side in codes]
    return np.concatenate(down)[:, None], 1.0


def _tl2_matrix(data: npt.NDArray[Any], rows: int, cols: int, bm: int, bk: int) -> Ints:
    """One matrix by the closed forms of spec/formats/tl2.md."""
    tripled = cols - cols % bk
    data = data.astype(np.int64)
    r = np.arange(rows)[:, None]
    place = np.array([0, 16, 8, 24])[r % 32 // 8] + r % 8

    def nibbles(area: Ints, t: Ints, block: int, across: int) -> Ints:
        tile = (r // bm * across + t // block) * (bm // 32) + r % bm // 32
        byte = (tile * (block // 2) + t % block // 2) * 32 + place
        return np.where(t % 2 == 0, area[byte] >> 4, area[byte] & 15)

    signs_at, pairs_at = rows * tripled // 6, rows * tripled // 6 + rows * tripled // 24
    t, block = np.arange(tripled // 3)[None], bk // 3
    size = nibbles(data, t, block, tripled // bk)
    tile = (r // bm * (tripled // bk) + t // block) * (bm // 32) + r % bm // 32
    word = (tile * (block // 8) + t % block // 8) * 16 + r % 16
    both = data[signs_at + 2 * word] | data[signs_at + 2 * word + 1] << 8
    negative = both >> (15 - 2 * (t % 8) - r % 32 // 16) & 1
    size = np.where(size > 13, 0, size)
    # size is 9 a + 3 b + c, with each of them -1, 0 or 1
    c = (size + 1) % 3 - 1
    b = ((size - c) // 3 + 1) % 3 - 1
    a = (size - c - 3 * b) // 9
    triples = np.stack([a, b, c], 2).reshape(rows, -1) * np.repeat(1 - 2 * negative, 3, 1)
    if tripled == cols:
        return triples
    code = nibbles(data[pairs_at:], np.arange((cols - tripled) // 2)[None], 16, (cols - tripled) // 32)
    pairs = np.stack([code // 3 - 1, code % 3 - 1], 2) * (code < 9)[:, :, None]
    return np.concatenate([triples, pairs.reshape(rows, -1)], 1)


READERS: dict[str, Callable[..., tuple[Ints, float]]] = {
    "affine": _affine,
    "quotient": _affine,
    "affine_zero": _affine,
    "levels": _levels,
    "table": _levels,
    "scaled": _scaled,
    "augmented": _scaled,
    "hif4": _scaled,
    "quads": _quads,
    "quads_in_fives": _fives,
    "base3": _base3,
    "planes": _planes,
    "plane_digits": _plane_digits,
    "plane_base3": _plane_base3,
    "pairs": _pairs,
    "tl2": _tl2,
}
