"""Activations as int8: the bits of a slow twin, for every order in which columns are stored."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from packfmt.errors import LayoutError
from packfmt.kernels import activations, simd, threads
from packfmt.kernels.activations import ANY, QUADS, SAME, WINDOWS, arrange, quantise
from packfmt.kernels.tile_code import Table
from tests.models import normal

pytestmark = pytest.mark.kernels

F32 = np.float32
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Three = tuple[npt.NDArray[np.int8], npt.NDArray[np.int32], Floats]

SMALLEST = F32(2.0**-149)


def twin(x: Floats, columns: Ints, ends: list[int], unit: float) -> Three:
    """One block after the other, one number after the other."""
    q = np.zeros((len(x), len(columns)), np.int8)
    sums = np.zeros((len(x), len(ends)), np.int32)
    scale = np.zeros((len(x), len(ends)), F32)
    for row, numbers in enumerate(x):
        stored = [numbers[c] if c >= 0 else F32(0) for c in columns]
        for b, (start, end) in enumerate(pairwise([0, *ends])):
            block = stored[start:end]
            with np.errstate(all="ignore"):
                good = all(np.isfinite(v) for v in block)
                a = max(abs(v) for v in block) / F32(127) if good else F32(np.nan)
                if good and a > 0:
                    q[row, start:end] = [min(max(int(np.rint(v / a)), -127), 127) for v in block]
                scale[row, b] = a * F32(unit)
            sums[row, b] = sum(int(v) for v in q[row, start:end])
    return q, sums, scale


def assert_same(found: Three, wanted: Three) -> None:
    pairs: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = list(zip(found, wanted, strict=True))
    for name, (a, b) in zip(("q", "sums", "scale"), pairs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if a.dtype == F32:
            assert np.array_equal(np.isnan(a), np.isnan(b)), name
            a, b = np.nan_to_num(a, nan=0), np.nan_to_num(b, nan=0)
        assert a.tobytes() == b.tobytes(), name


def blocks_of(size: int, stored: int) -> list[int]:
    return [min(end, stored) for end in range(size, stored + size, size)]


def numbers(batch: int, cols: int, seed: int = 0) -> Floats:
    """Of many sizes, with zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((batch, cols)) * np.exp2(rng.integers(-9, 9, (batch, cols)))).astype(F32)
    x[rng.random(x.shape) < 0.1] = 0
    x[rng.random(x.shape) < 0.1] = -0.0
    return x


def apart(count: int, step: int) -> Ints:
    """Columns 0, step, 2 step ..., then 1, step + 1 ..., within every 4 * step."""
    return np.arange(count).reshape(-1, 4, step).transpose(0, 2, 1).reshape(-1)


def quarters(count: int) -> Ints:
    """Four neighbours of each quarter of every 128 columns in turn."""
    return np.arange(count).reshape(-1, 4, 8, 4).transpose(0, 2, 1, 3).reshape(-1)


def with_none(columns: Ints, count: int) -> Ints:
    """So many more, that are no column."""
    return np.where(columns < len(columns) - count, columns, -1)


def turned(count: int) -> Ints:
    return np.random.default_rng(count).permutation(count)


CASES = {
    "as they are": (np.arange(512), 256, SAME),
    "as they are, a last block of one": (np.arange(257), 256, SAME),
    "as they are, few": (np.arange(3), 256, SAME),
    "blocks of 16": (np.arange(160), 16, SAME),
    "blocks that are no whole vectors": (np.arange(100), 24, SAME),
    "blocks of 4": (np.arange(52), 4, SAME),
    "zeros at the end": (with_none(np.arange(320), 60), 32, SAME),
    "a block of nothing but zeros": (with_none(np.arange(96), 40), 32, SAME),
    "quarters of 128": (quarters(512), 256, QUADS),
    "quarters of 128, the last column is none": (with_none(quarters(256), 1), 128, QUADS),
    "quarters of 128, six are none": (with_none(quarters(256), 6), 256, QUADS),
    "every second": (apart(320, 2), 32, WINDOWS),
    "every second, half a window at the end": (apart(96, 2), 32, WINDOWS),
    "every fourth": (apart(256, 4), 64, WINDOWS),
    "every eighth": (apart(512, 8), 256, WINDOWS),
    "every second, five are none": (with_none(apart(128, 2), 5), 32, WINDOWS),
    "any": (turned(300), 256, ANY),
    "any, in one block": (turned(200), 200, ANY),
    "neighbours from other blocks": (quarters(512), 32, ANY),
    "a column twice": (np.arange(64) // 2 * 2, 32, ANY),
    "a column left out": (np.arange(1, 65), 32, ANY),
    "none in the middle": (np.where(np.arange(64) == 9, -1, np.arange(64)), 64, ANY),
    "none": (np.full(8, -1), 4, ANY),
}
every = pytest.mark.parametrize("name", CASES)


def columns_of_x(columns: Ints) -> int:
    return int(columns.max(initial=0)) + 1


@every
@pytest.mark.parametrize("batch", [1, 3])
def test_the_bits_are_those_of_the_twin(name: str, batch: int) -> None:
    columns, block, way = CASES[name]
    x = numbers(batch, columns_of_x(columns))
    order = arrange(x.shape[1], block, columns.astype(np.int32))
    assert order.way == way
    ends = blocks_of(block, len(columns))
    assert_same(quantise(x, order, 0.25), twin(x, columns, ends, 0.25))


@every
def test_infinite_numbers_and_none_reach_their_block_only(name: str) -> None:
    columns, block, _ = CASES[name]
    cols = columns_of_x(columns)
    order, ends = arrange(cols, block, columns.astype(np.int32)), blocks_of(block, len(columns))
    for bad in (np.inf, -np.inf, np.nan, -np.nan, F32(np.array(0x7F800001, np.uint32).view(F32))):
        x = numbers(3, cols, 1)
        x[1, cols // 2], x[2, cols - 1] = bad, bad
        found = quantise(x, order, 1)
        assert_same(found, twin(x, columns, ends, 1))
        if (columns == cols - 1).any():
            assert np.isnan(found[2]).sum() == ((columns >= 0) & (columns == cols // 2)).any() + 1


@every
def test_zeros_and_the_smallest_numbers(name: str) -> None:
    """A block whose a is 0 has no steps; one whose a is the smallest number has x / a beyond 127."""
    columns, block, _ = CASES[name]
    cols = columns_of_x(columns)
    order, ends = arrange(cols, block, columns.astype(np.int32)), blocks_of(block, len(columns))
    rng = np.random.default_rng(cols)
    for largest in (0, 1, 63, 64, 126, 127, 128, 190, 191, 255, 1000):
        x = rng.integers(-largest, largest + 1, (2, cols)).astype(F32) * SMALLEST
        x[:, cols // 2] = -F32(largest) * SMALLEST
        assert_same(quantise(x, order, 2.0**-3), twin(x, columns, ends, 2.0**-3))


def test_beyond_127_is_127() -> None:
    """190 smallest numbers have a = one of them."""
    x = np.array([[190, -190, 127, 3]], F32) * SMALLEST
    q, sums, scale = quantise(x, arrange(4, 4), 1)
    assert q.tolist() == [[127, -127, 127, 3]] and sums.tolist() == [[130]] and scale[0, 0] == SMALLEST


def test_the_largest_number_is_127_for_every_mantissa() -> None:
    """Whatever a is rounded to."""
    largest = (np.arange(1 << 23, 2 << 23, 509, dtype=np.uint32) - (1 << 23) + 0x3F800000).view(F32)
    x = np.zeros((len(largest), 16), F32)
    x[:, 3], x[:, 7] = largest, -largest
    q, _, _ = quantise(x, arrange(16, 16), 1)
    assert (q[:, 3] == 127).all() and (q[:, 7] == -127).all()


def test_halves_go_to_the_even_step() -> None:
    x = np.array([127, *(i + 0.5 for i in range(-126, 126))], F32)[None]
    q, _, scale = quantise(x, arrange(x.size, 256), 1)
    assert scale[0, 0] == 1
    assert q[0, 1:].tolist() == [int(np.rint(i + 0.5)) for i in range(-126, 126)]


def test_blocks_may_differ() -> None:
    ends, columns = [48, 64, 65, 200], np.arange(200)
    x = numbers(2, 200)
    order = arrange(200, np.array(ends, np.int32))
    assert_same(quantise(x, order, 1), twin(x, columns, ends, 1))
    columns = np.concatenate([apart(48, 2), np.arange(48, 200)])
    order = arrange(200, np.array(ends, np.int32), columns.astype(np.int32))
    assert_same(quantise(x, order, 1), twin(x, columns, ends, 1))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-140, 2.0**100])
def test_numbers_of_all_sizes(scale: float) -> None:
    x = normal(4, 512) * F32(scale)
    assert_same(quantise(x, arrange(512, 256), 2.0**-4), twin(x, np.arange(512), [256, 512], 2.0**-4))


def test_a_shape_without_numbers() -> None:
    assert [a.shape for a in quantise(np.empty((0, 64), F32), arrange(64, 32))] == [(0, 64), (0, 2), (0, 2)]
    assert [a.shape for a in quantise(np.empty((2, 0), F32), arrange(0, 32))] == [(2, 0), (2, 0), (2, 0)]


@pytest.mark.parametrize("name", ["as they are", "quarters of 128", "every second", "any"])
def test_threads_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, block, _ = CASES[name]
    x = numbers(7, len(columns))
    order = arrange(len(columns), block, columns.astype(np.int32))
    monkeypatch.setattr(activations, "LEAST_NUMBERS", 1)
    ranges: list[int] = []
    spread = threads.spread

    def counted(work: Callable[[int, int], None], total: int, least: int) -> None:
        ranges.append(total)
        spread(work, total, least)

    monkeypatch.setattr(threads, "spread", counted)
    found = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        found.append(b"".join(a.tobytes() for a in quantise(x, order, 1)))
    assert found[0] == found[1] == found[2] and ranges == [7, 7, 7]


def test_the_plain_way_gives_the_same_bits() -> None:
    """What serves where nothing is compiled."""
    if simd.INTERPRETED:
        pytest.skip("nothing is compiled, so the plain way is what the other tests run")
    for columns, block, _ in CASES.values():
        x = numbers(2, columns_of_x(columns))
        order = arrange(x.shape[1], block, columns.astype(np.int32))
        wanted = quantise(x, order, 0.5)
        found = np.empty_like(wanted[0]), np.empty_like(wanted[1]), np.empty_like(wanted[2])
        activations._some_plainly(x, order, F32(0.5), *found, 0, 2)
        assert_same(found, wanted)


@pytest.mark.skipif(simd.INTERPRETED, reason="only kernels have rows side by side")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case[0]) % 4 == 0])
def test_rows_may_lie_side_by_side(name: str) -> None:
    """Four columns of each row of a part in turn, and one sum and scale of each; what is missing is left out."""
    columns, block, _ = CASES[name]
    x, width, parts = numbers(7, columns_of_x(columns)), 4, 2
    order = arrange(x.shape[1], block, columns.astype(np.int32))
    apart = quantise(x, order, 0.5)
    shapes: list[tuple[int, ...]] = [(parts, -1, width, 4), (parts, -1, width, 1), (parts, -1, width, 1)]
    beside = [np.full((parts * width, a.shape[1]), 99, a.dtype) for a in apart]
    activations.fill(x, order, 0.5, width, Table(*beside))
    wanted = [a.tobytes() for a in apart]
    for one, found, shape in zip(wanted, beside, shapes, strict=True):
        rows = found.reshape(shape).swapaxes(1, 2).reshape(parts * width, -1)
        assert rows[:7].tobytes() == one
        assert (rows[7:] == 99).all()


def test_what_is_refused_says_why() -> None:
    with pytest.raises(LayoutError, match=r"blocks of 0 activations, needs 1 or more"):
        arrange(64, 0)
    with pytest.raises(LayoutError, match=r"end at \[32, 16, 64\], needs ascending up to 64"):
        arrange(64, np.array([32, 16, 64], np.int32))
    with pytest.raises(LayoutError, match=r"end at \[32\], needs ascending up to 64"):
        arrange(64, np.array([32], np.int32))
    with pytest.raises(LayoutError, match=r"columns 0 to 64, needs -1 to 63"):
        arrange(64, 32, np.arange(65, dtype=np.int32))
    order = arrange(64, 32)
    wrong: list[npt.NDArray[Any]] = [np.zeros((1, 63), F32), np.zeros((64,), F32), np.zeros((1, 64))]
    for x in (*wrong, np.zeros((64, 2), F32).T):
        with pytest.raises(LayoutError, match=r"needs C-contiguous float32 \(batch, 64\)"):
            quantise(x, order)
