"""Products of activations with weights that are numbers of any kind, in float32 and in one fixed order.

Lane l of 64 sums columns l, l + 64, l + 128 ... from +0 on: s = s + (w * x), product and sum rounding apart. Then
lanes fold, s[l] + s[l + 32] first, then + 16, + 8, + 4, + 2, + 1. So the bits do not depend on the batch, on threads,
or on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.kernels import number_loops, pages, simd, threads
from packfmt.kernels.number_code import BYTES, E4M3, E5M2, LANES, VECTOR, Kind, mixed
from packfmt.kernels.number_loops import DEEP, PANELS, TALL

F32 = np.float32
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

STRIP = 1 << 18  # weights decoded at a time, which stay in a core's cache
MANY = {4: 8, 2: 4, 1: 4}  # rows of activations; by bytes of a weight
LEAST_BYTES = 1 << 19  # of weights, times the batch: worth a thread
# Columns of 64 in the order of lanes: one after the other, or even and odd ones of each half.
IN_ORDER = np.arange(LANES, dtype=np.int32)
EVEN_AND_ODD = np.ascontiguousarray(IN_ORDER.reshape(2, 16, 2).swapaxes(1, 2)).reshape(-1)

# ---------------------------------------------------------------- doors


def multiply(
    weights: Array, x: Floats, out: Floats, scale: Floats | None = None, share: tuple[int, int] = (1, 0)
) -> None:
    """The product of every row of weights with every row of x, on all threads.

    Parameters
    ----------
    weights : (rows, cols) float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, C-contiguous
    x : (batch, cols) float32, C-contiguous
    out : (batch, rows) float32, written
    scale : float32, C-contiguous, of bytes; a weight is number * scale, rounded to float32. Default: there are none
    share : rows and columns that share a scale, columns a multiple of 32; 0: all

    Raises
    ------
    LayoutError
        If an array is another than this.
    """
    rows, cols = weights.shape
    name = weights.dtype.name
    if name not in BYTES or not weights.flags.c_contiguous:
        raise LayoutError(f"weights {name} {weights.shape}, needs C-contiguous {', '.join(BYTES)}")
    _check(x, out, rows, cols)
    tall, wide = share[0] or max(1, rows), share[1] or max(1, cols)
    if scale is None:
        scale, scaled = NO_SCALE, 0
    else:
        shape = -(-rows // tall), -(-cols // wide)
        if scale.shape != shape or scale.dtype != F32 or not scale.flags.c_contiguous:
            raise LayoutError(f"scales {scale.dtype} {scale.shape}, needs C-contiguous float32 {shape}")
        if name not in (E4M3, E5M2):
            raise LayoutError(f"weights {name} have no scales, only {E4M3}, {E5M2} do")
        if shape[1] > 1 and wide % 32:
            raise LayoutError(f"{wide} columns share a scale, needs a multiple of 32")
        scaled = LANES if shape[1] <= 1 or wide % LANES == 0 else 32
        wide = wide if shape[1] > 1 else -(-wide // LANES) * LANES  # chunks do not go beyond
    if not out.size or not cols:
        out[...] = 0
        return
    if simd.INTERPRETED:
        return _plainly(weights, x, out, scale if scaled else None, tall, wide)
    kind = _kind(name, scaled, len(x))
    codes = weights.reshape(-1).view(np.uint8)
    factors = scale, tall, wide
    x = _in_lanes(kind, x)

    def work(start: int, stop: int) -> None:
        _some(kind, codes, cols, x, out, factors, start, stop, 0)

    threads.spread(work, rows, -(-LEAST_BYTES // max(1, codes.nbytes // rows * len(out))))


def multiply_strips(read: Callable[[int, int, Floats], None], x: Floats, out: Floats, least: int = 1) -> None:
    """`multiply` with weights that are decoded as they are needed, a strip of rows at a time, on all threads.

    Parameters
    ----------
    read : first row, end, (rows, cols) float32, C-contiguous, to which it writes these rows; called by several threads
        at once, for other rows
    x : (batch, cols) float32, C-contiguous
    out : (batch, rows) float32, written
    least : rows to read at a time must be a multiple of this, but for the last ones

    Raises
    ------
    LayoutError
        If an array is another than this.
    """
    rows, cols = out.shape[1], x.shape[1]
    _check(x, out, rows, cols)
    if not out.size or not cols:
        out[...] = 0
        return
    step = min(rows, least * max(1, STRIP // max(1, cols * least)))
    if step == rows:  # threads have their parts in reading it, and in the product
        weights = np.empty((rows, cols), F32)
        read(0, rows, weights)
        return multiply(weights, x, out)
    kind, factors = _kind("float32", 0, len(x)), (NO_SCALE, 1, cols)
    arranged = x if simd.INTERPRETED else _in_lanes(kind, x)

    def work(start: int, stop: int) -> None:
        room = np.empty((step, cols), F32)
        for strip in range(start, stop):
            first, end = strip * step, min(rows, (strip + 1) * step)
            weights = room[: end - first]
            read(first, end, weights)
            if simd.INTERPRETED:
                some = np.empty((len(x), end - first), F32)
                _plainly(weights, x, some, None, 1, 1)
                out[:, first:end] = some
            else:
                codes = weights.reshape(-1).view(np.uint8)
                _some(kind, codes, cols, arranged, out, factors, 0, end - first, first)

    threads.spread(work, -(-rows // step))


NO_SCALE = np.empty((0, 0), F32)


def _check(x: Floats, out: Floats, rows: int, cols: int) -> None:
    for what, array, shape in (("activations", x, (len(x), cols)), ("out", out, (len(x), rows))):
        if array.shape != shape or array.dtype != F32 or not array.flags.c_contiguous:
            raise LayoutError(f"{what} {array.dtype} {array.shape}, needs C-contiguous float32 {shape}")


def _kind(name: str, scaled: int, batch: int) -> Kind:
    return Kind(name, scaled, min(batch, 2) if batch < MANY[BYTES[name]] else 4)


def _in_lanes(kind: Kind, x: Floats) -> Floats:
    """Activations in the order in which the loops read them, filled up with zeros.

    (batch, columns), or for many (4, pairs, columns / 64, 2, 16): 16 lanes of two rows, then their next.
    """
    batch, cols = x.shape
    rows, chunks = batch + batch % 2 if kind.many else batch, -(-cols // LANES)
    if (rows, chunks * LANES) != x.shape:
        x = np.pad(x, ((0, rows - batch), (0, chunks * LANES - cols)))
    parts = x.reshape(rows, chunks, 2, 16, 2).swapaxes(3, 4) if mixed(kind) else x
    if not kind.many:
        return np.ascontiguousarray(parts).reshape(x.shape)
    apart = 4, rows // 2, chunks + 1, 2, 16  # no power of two, or lines would drive each other from the cache
    out = pages.empty(4 * prod(apart)).view(F32).reshape(apart)
    out[:, :, :chunks] = parts.reshape(rows // 2, 2, chunks, 4, 16).transpose(3, 0, 2, 1, 4)
    return out


def _some(kind, codes, cols, x, out, factors, start, stop, shift):
    """Rows start to stop of the weights, which are those from start + shift on of the product."""
    rest = EVEN_AND_ODD if mixed(kind) else IN_ORDER, np.zeros(4 * LANES * 4, np.uint8)
    if not kind.many:
        number_loops.few(kind)(codes, cols, x, out, *factors, *rest, start, stop, shift)
        return
    pairs, chunks = x.shape[1], x.shape[2]
    panels = min(PANELS, -(-(stop - start) // TALL))
    numbers = pages.empty(panels * 4 * (min(DEEP, chunks) + 1) * TALL * VECTOR)
    rooms = numbers, pages.empty(panels * pairs * 32 * VECTOR), np.empty(16, F32)
    number_loops.many(kind)(codes, cols, x, out, *factors, *rest, *rooms, start, stop, shift)


def _plainly(weights, x, out, scale, tall, wide):
    """`multiply` in NumPy, to the same bits."""
    rows, cols = weights.shape
    numbers = weights.astype(F32)
    with np.errstate(all="ignore"):
        if scale is not None:
            numbers *= np.repeat(np.repeat(scale, tall, 0)[:rows], wide, 1)[:, :cols]
        for b, activations in enumerate(x):
            products = numbers * activations
            sums = np.zeros((rows, LANES), F32)
            for at in range(0, cols, LANES):
                few = products[:, at : at + LANES]
                sums[:, : few.shape[1]] += few
            half = LANES // 2
            while half:
                sums = sums[:, :half] + sums[:, half:]
                half //= 2
            out[b] = sums[:, 0]
