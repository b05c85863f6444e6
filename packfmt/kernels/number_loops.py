"""The loops of products of numbers: for few rows of activations, which meet weights as they come, and for many.

Both sum in the order that `number_products` states.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from packfmt.kernels import simd, simd_code
from packfmt.kernels.cache import njit
from packfmt.kernels.number_code import (
    BYTES,
    LANES,
    VECTOR,
    Kind,
    Marker,
    _add,
    _apart,
    _below,
    _nothing,
    _put_apart,
    ask_for,
    copy_bytes,
    factor_of,
    floats_at,
    mixed,
    none_among,
    put,
    sum_of,
    weights_at,
)
from packfmt.kernels.simd import same_int, zero_floats

TALL = 4  # rows of a panel
PANELS = 4  # that activations meet one after the other
DEEP = 16  # times 64 columns, of which sums are taken before the next rows' turn
AHEAD = 1024  # bytes of a row to ask for while few activations meet it

# ---------------------------------------------------------------- few rows of activations


def _few_of(kind: Kind) -> Any:
    """The loop for one row of activations after the other, or for two at a time."""
    marker, size, two = Marker(kind), BYTES[kind.dtype], kind.rows == 2
    in_runs = kind.scaled == LANES  # that have one scale; others are looked up with the weights

    @njit(cache=True, nogil=True)
    def _go_on(sums, codes, x, scales, first, last, cols, groups, wide):
        """Four sums, and the products of columns first to last, which are whole chunks of 64.

        codes, scales : where four rows of weights begin, and their scales; x : where two of activations do
        """
        a, b, c, d = sums
        i0, i1, i2, i3 = codes
        s0, s1, s2, s3 = scales
        run = wide if in_runs else max(1, last)
        far = 4 * cols if size == 1 and not two else AHEAD  # the former are the next rows
        for group in range(first // run, (last + run - 1) // run):
            f0, f1 = factor_of(marker, s0, group), factor_of(marker, s1, group)
            f2, f3 = factor_of(marker, s2, group), factor_of(marker, s3, group)
            for column in range(max(first, group * run), min(last, group * run + run), LANES):
                place, here = column * size, _apart(x[0] + 4 * column, VECTOR)
                w, v = weights_at(marker, i0 + place, f0, s0, groups, column, wide), here
                a = _add(a, w, v)
                if two:
                    v = _apart(x[1] + 4 * column, VECTOR)
                else:
                    w = weights_at(marker, i1 + place, f1, s1, groups, column, wide)
                b = _add(b, w, v)
                w = weights_at(marker, i2 + place, f2, s2, groups, column, wide)
                c = _add(c, w, here)
                if not two:
                    w = weights_at(marker, i3 + place, f3, s3, groups, column, wide)
                d = _add(d, w, v)
                place += far
                ask_for(i0 + place, marker)
                ask_for(i2 + place, marker)
                if not two:
                    ask_for(i1 + place, marker)
                    ask_for(i3 + place, marker)
        return a, b, c, d

    @njit(cache=True, nogil=True)
    def _multiply_few(weights, cols, activations, out, factors, tall, wide, lanes, spare, start, stop, shift):
        """Four sums at a time: four rows with one of activations, or two rows with two. The last may be there twice.

        activations : (batch, whole chunks of 64 columns)
        spare : where the last weights of a row are copied to, fewer than 64
        """
        codes, x, scale, groups = weights.ctypes.data, activations.ctypes.data, factors.ctypes.data, factors.shape[1]
        places, room = lanes.ctypes.data, spare.ctypes.data
        left, batch = cols % LANES, out.shape[0]
        whole, there, nothing = cols - left, same_int(np.int32(left)), _nothing()
        x_bytes, row_bytes, step = (whole + (LANES if left else 0)) * 4, cols * size, LANES * size
        for r0 in range(start, stop, 2 if two else 4):
            r1 = r0 if two else min(r0 + 1, stop - 1)
            r2 = min(r0 + 1, stop - 1) if two else min(r0 + 2, stop - 1)
            r3 = r2 if two else min(r0 + 3, stop - 1)
            rows = codes + r0 * row_bytes, codes + r1 * row_bytes, codes + r2 * row_bytes, codes + r3 * row_bytes
            s0, s1 = scale + r0 // tall * groups * 4, scale + r1 // tall * groups * 4
            s2, s3 = scale + r2 // tall * groups * 4, scale + r3 // tall * groups * 4
            if left:
                for k in range(4):
                    copy_bytes(room + k * step, rows[k] + whole * size, left * size)
            rest = room - whole * size
            for m in range(0, batch, 2 if two else 1):
                n = min(m + 1, batch - 1) if two else m
                both, scales, sums = (
                    (x + m * x_bytes, x + n * x_bytes),
                    (s0, s1, s2, s3),
                    (nothing, nothing, nothing, nothing),
                )
                sums = _go_on(sums, rows, both, scales, 0, whole, cols, groups, wide)
                if left:
                    last = rest, rest + step, rest + 2 * step, rest + 3 * step
                    a, b, c, d = _go_on(sums, last, both, scales, whole, whole + LANES, cols, groups, wide)
                    a, b = _below(places, there, a, sums[0]), _below(places, there, b, sums[1])
                    sums = a, b, _below(places, there, c, sums[2]), _below(places, there, d, sums[3])
                out[m, r0 + shift], out[n, r1 + shift] = sum_of(marker, sums[0]), sum_of(marker, sums[1])
                out[m, r2 + shift], out[n, r3 + shift] = sum_of(marker, sums[2]), sum_of(marker, sums[3])
            for row in range(r0, r3 + 1):
                if none_among(marker, codes + row * cols, cols):
                    out[:, row + shift] = np.nan

    return _multiply_few


few = cache(_few_of)


# ---------------------------------------------------------------- many rows of activations


@intrinsic
def _eight_sums(typing, at, marker):
    """The sums of four rows of weights and two of activations: lane 4 * b + r has row r of the weights and b of x.

    at : where (4 quarters, 4 rows, 2, 16) lanes begin; lanes fold as in `sum_of`
    """
    lanes = simd.Floats16.llvm

    def folded(builder, found):
        for half in (8, 4, 2):  # two vectors become one, which has half as many lanes of each sum
            starts = range(0, 32, 2 * half)
            low, high = (simd_code.order([s + a + i for s in starts for i in range(half)]) for a in (0, half))
            found = [
                builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high))
                for a, b in zip(found[::2], found[1::2], strict=True)
            ]
        low, high = (simd_code.order([*range(a, 16, 2)] * 2) for a in (0, 1))
        return builder.fadd(*(builder.shuffle_vector(found[0], found[0], part) for part in (low, high)))

    def code(context, builder, signature, args):
        def quarter(q, r, b):
            byte = simd_code.I64(((q * TALL + r) * 2 + b) * VECTOR)
            found = builder.load(builder.inttoptr(builder.add(args[0], byte), lanes.as_pointer()))
            found.align = 4
            return found

        each = [(r, b) for b in range(2) for r in range(TALL)]
        first, second = ([builder.fadd(quarter(q, *i), quarter(q + 2, *i)) for i in each] for q in (0, 1))
        if mixed(marker.kind):
            return builder.fadd(folded(builder, first), folded(builder, second))
        return folded(builder, [builder.fadd(a, b) for a, b in zip(first, second, strict=True)])

    return simd.Floats16(types.int64, marker), code


@njit(cache=True, nogil=True)
def _two_apart(at, then):
    """Two vectors at each of two places."""
    return floats_at(at), floats_at(at + VECTOR), floats_at(then), floats_at(then + VECTOR)


@njit(cache=True, nogil=True)
def _put_two_apart(at, then, four):
    put(at, four[0])
    put(at + VECTOR, four[1])
    put(then, four[2])
    put(then + VECTOR, four[3])


@njit(cache=True, nogil=True)
def _first_four(marker, size, at, columns, factors, rest, numbers, x, sums, far):
    """One row of weights with the first four of activations. Numbers are written to their panel for the others.

    at : where weights begin, from the first column on, of `size` bytes each
    columns : the first, the last, and how many there are at all
    factors : where the row's scales begin, how many there are, and columns that share one
    rest : what the last columns take: their places, and room to copy weights to
    numbers : where the row begins in its panel, and bytes from quarter to quarter
    x : where two pairs begin, and bytes from quarter to quarter
    sums : likewise, and whether they begin at 0
    far : bytes from a row's weights to those to ask for
    """
    first, last, cols = columns
    scale, groups, wide = factors
    to, quarter = numbers
    i, j, apart = x
    low, high, eight, begins = sums
    column, group = first, first // wide
    end, factor = group * wide, zero_floats()
    a, b, c, d = _nothing(), _nothing(), _nothing(), _nothing()
    if not begins:
        a, b, c, d = _apart(low, eight), _apart(low + VECTOR, eight), _apart(high, eight), _apart(high + VECTOR, eight)
    while column < last:
        if column >= end:
            factor = factor_of(marker, scale, group)
            group, end = group + 1, end + wide
        ask_for(at + far, marker)
        if column + LANES > cols:  # others are zeros, which add nothing, even where a scale is infinite
            copy_bytes(rest[1], at, (cols - column) * size)
            w = weights_at(marker, rest[1], factor, scale, groups, column, wide)
            w = _below(rest[0], same_int(np.int32(cols - column)), w, _nothing())
        else:
            w = weights_at(marker, at, factor, scale, groups, column, wide)
        _put_apart(to, quarter, w)
        a, b = _add(a, w, _apart(i, apart)), _add(b, w, _apart(i + VECTOR, apart))
        c, d = _add(c, w, _apart(j, apart)), _add(d, w, _apart(j + VECTOR, apart))
        column, at, to, i, j = column + LANES, at + LANES * size, to + TALL * VECTOR, i + 2 * VECTOR, j + 2 * VECTOR
    _put_apart(low, eight, a)
    _put_apart(low + VECTOR, eight, b)
    _put_apart(high, eight, c)
    _put_apart(high + VECTOR, eight, d)


@njit(cache=True, nogil=True)
def _four(w, x, then, deep, low, high, begins):
    """Four rows of weights with four of activations: sixteen lanes of each, `deep` times.

    w : where a quarter of the rows begins; x, then : two pairs of activations; low, high : their sums
    begins : whether sums begin at 0
    """
    a, b, c, d = _nothing(), _nothing(), _nothing(), _nothing()
    if not begins:
        a, b = _two_apart(low, high), _two_apart(low + 2 * VECTOR, high + 2 * VECTOR)
        c, d = _two_apart(low + 4 * VECTOR, high + 4 * VECTOR), _two_apart(low + 6 * VECTOR, high + 6 * VECTOR)
    for _ in range(deep):
        four = _two_apart(x, then)
        a, b = _add(a, _same(w), four), _add(b, _same(w + VECTOR), four)
        c, d = _add(c, _same(w + 2 * VECTOR), four), _add(d, _same(w + 3 * VECTOR), four)
        x, then, w = x + 2 * VECTOR, then + 2 * VECTOR, w + TALL * VECTOR
    _put_two_apart(low, high, a)
    _put_two_apart(low + 2 * VECTOR, high + 2 * VECTOR, b)
    _put_two_apart(low + 4 * VECTOR, high + 4 * VECTOR, c)
    _put_two_apart(low + 6 * VECTOR, high + 6 * VECTOR, d)


@njit(cache=True, nogil=True)
def _same(at):
    """One vector, four times."""
    found = floats_at(at)
    return found, found, found, found


@njit(cache=True, nogil=True)
def _twice(at):
    """Two vectors, each of them twice."""
    first, second = floats_at(at), floats_at(at + VECTOR)
    return first, first, second, second


@njit(cache=True, nogil=True)
def _two(w, x, deep, low, begins):
    """`_four` with one pair of activations."""
    a, b = _nothing(), _nothing()
    if not begins:
        a, b = _apart(low, VECTOR), _apart(low + 4 * VECTOR, VECTOR)
    for _ in range(deep):
        pair = _two_apart(x, x)
        a = _add(a, _twice(w), pair)
        b = _add(b, _twice(w + 2 * VECTOR), pair)
        x, w = x + 2 * VECTOR, w + TALL * VECTOR
    _put_apart(low, VECTOR, a)
    _put_apart(low + 4 * VECTOR, VECTOR, b)


def _many_of(kind: Kind) -> Any:
    """The loop for many rows of activations: numbers are laid out first, and serve all of them."""
    marker, size = Marker(kind), BYTES[kind.dtype]

    @njit(cache=True, nogil=True)
    def _multiply_many(
        weights, cols, activations, out, factors, tall, wide, lanes, spare, kept, summed, eight, start, stop, shift
    ):
        """Sixteen rows at a time, in panels of four; the last row may be there several times.

        activations : (4 quarters of the lanes, pairs, chunks of 64 columns, 2, 16)
        kept : (panels, 4 quarters, chunks, 4 rows, 16), numbers
        summed : (panels, pairs, 4 quarters, 4 rows, 2, 16)

        Of quarters and pairs, chunks are one more than there are, lest lines drive each other from the cache. A quarter
        of a panel and one of four activations stay in the nearest cache while they meet.
        """
        codes, x, scale, groups = weights.ctypes.data, activations.ctypes.data, factors.ctypes.data, factors.shape[1]
        places, room, numbers, sums = lanes.ctypes.data, spare.ctypes.data, kept.ctypes.data, summed.ctypes.data
        chunks, pairs = (cols + LANES - 1) // LANES, activations.shape[1]
        apart = (chunks + 1) * 2 * VECTOR
        for r0 in range(start, stop, PANELS * TALL):
            panels = min(PANELS, (stop - r0 + TALL - 1) // TALL)
            for first in range(0, chunks, DEEP):
                deep = min(DEEP, chunks - first)
                quarter = (deep + 1) * TALL * VECTOR
                here = x + first * 2 * VECTOR
                for r in range(panels * TALL):
                    row = min(r0 + r, stop - 1)
                    low = sums + (r // TALL * pairs * 32 + r % TALL * 2) * VECTOR
                    _first_four(
                        marker,
                        size,
                        codes + (row * cols + first * LANES) * size,
                        (first * LANES, (first + deep) * LANES, cols),
                        (scale + row // tall * groups * 4, groups, wide),
                        (places, room),
                        (numbers + r // TALL * 4 * quarter + r % TALL * VECTOR, quarter),
                        (here, here + apart, pairs * apart),
                        (low, low + 32 * VECTOR, 8 * VECTOR, first == 0),
                        PANELS * TALL * cols * size,
                    )
                for q in range(4):
                    for pair in range(2, pairs, 2):
                        i = here + (q * pairs + pair) * apart
                        for panel in range(panels):
                            w = numbers + (panel * 4 + q) * quarter
                            low = sums + ((panel * pairs + pair) * 4 + q) * 8 * VECTOR
                            if pair + 1 < pairs:
                                _four(w, i, i + apart, deep, low, low + 32 * VECTOR, first == 0)
                            else:
                                _two(w, i, deep, low, first == 0)
            for pair in range(pairs):
                for panel in range(panels):
                    put(eight.ctypes.data, _eight_sums(sums + (panel * pairs + pair) * 32 * VECTOR, marker))
                    for r in range(TALL):
                        row = min(r0 + panel * TALL + r, stop - 1) + shift
                        if 2 * pair < out.shape[0]:
                            out[2 * pair, row] = eight[r]
                        if 2 * pair + 1 < out.shape[0]:
                            out[2 * pair + 1, row] = eight[TALL + r]
            for row in range(r0, min(r0 + PANELS * TALL, stop)):
                if none_among(marker, codes + row * cols, cols):
                    out[:, row + shift] = np.nan

    return _multiply_many


many = cache(_many_of)
