"""Products with numbers, and with whole steps by plain loops: the bits of slow twins."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from packfmt.errors import LayoutError
from packfmt.kernels import number_products, plain_products, simd, threads
from packfmt.kernels.number_products import MANY, multiply, multiply_strips
from tests.models import normal

pytestmark = pytest.mark.kernels

F32 = np.float32
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]

WIDE = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
BYTES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
DTYPES = {**WIDE, **BYTES}
SHAPES = [(1, 1), (2, 63), (3, 64), (5, 65), (4, 100), (9, 320), (6, 448)]
SHARES = [(1, 0), (0, 0), (2, 128), (1, 32), (3, 96), (4, 64), (1, 160)]
every = pytest.mark.parametrize("dtype", DTYPES)


def twin(weights: Array, x: Floats, scale: Floats | None = None, share: tuple[int, int] = (1, 0)) -> Floats:
    """One product after the other."""
    rows, cols = weights.shape
    tall, wide = share[0] or rows, share[1] or cols
    out = np.empty((len(x), rows), F32)
    numbers = weights.astype(F32)
    with np.errstate(all="ignore"):
        for row in range(rows):
            mine = numbers[row]
            if scale is not None:
                mine = np.array([w * scale[row // tall, i // wide] for i, w in enumerate(mine)], F32)
            for b in range(len(x)):
                lanes = np.zeros(64, F32)
                for column in range(cols):
                    lanes[column % 64] += mine[column] * x[b, column]
                for half in (32, 16, 8, 4, 2, 1):
                    lanes = np.array([lanes[i] + lanes[i + half] for i in range(half)], F32)
                out[b, row] = lanes[0]
    return out


def assert_same(found: Floats, wanted: Floats) -> None:
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.nan_to_num(found, nan=0).tobytes() == np.nan_to_num(wanted, nan=0).tobytes()


def product(weights: Array, x: Floats, scale: Floats | None = None, share: tuple[int, int] = (1, 0)) -> Floats:
    out = np.full((len(x), len(weights)), 77, F32)
    multiply(weights, x, out, scale, share)
    return out


def scales(shape: tuple[int, int], share: tuple[int, int], seed: int = 0) -> Floats:
    rows, cols = shape
    of = -(-rows // (share[0] or rows)), -(-cols // (share[1] or cols))
    return np.abs(normal(*of, seed=seed)) + F32(0.01)


@every
def test_the_bits_are_those_of_the_twin(dtype: str) -> None:
    for rows, cols in SHAPES:
        weights = normal(rows, cols).astype(DTYPES[dtype])
        for batch in (1, 2, 3):
            x = normal(batch, cols, seed=1)
            assert_same(product(weights, x), twin(weights, x))


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("share", SHARES)
def test_scales_multiply_numbers_first(dtype: str, share: tuple[int, int]) -> None:
    for rows, cols in SHAPES:
        weights = normal(rows, cols).astype(DTYPES[dtype])
        scale = scales((rows, cols), share)
        for batch in (1, 2):
            x = normal(batch, cols, seed=1)
            assert_same(product(weights, x, scale, share), twin(weights, x, scale, share))


@every
def test_every_code_of_a_weight(dtype: str) -> None:
    """One number a row: the product with 1 is the number, and with the smallest number rounds as float32 does."""
    size = np.dtype(DTYPES[dtype]).itemsize
    if size < 4:
        codes = np.arange(1 << 8 * size, dtype=f"u{size}")
    else:
        codes = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    for cols, place in ((1, 0), (70, 66), (64, 0)):
        weights = np.zeros((len(codes), cols), codes.dtype)
        weights[:, place] = codes
        for factor in (1.0, -1.0, 2.0**-120, 2.0**100, np.inf):
            x = np.zeros((1, cols), F32)
            x[0, place] = factor
            with np.errstate(all="ignore"):
                numbers = codes.view(DTYPES[dtype]).astype(F32) * F32(factor)
            for batch in (1, MANY[size]):
                found = product(weights.view(DTYPES[dtype]), np.repeat(x, batch, 0))
                assert_same(found, np.repeat((numbers + F32(0))[None], batch, 0))


@every
@pytest.mark.parametrize("batch", [8, 9, 11, 14])
def test_many_activations_get_the_same_bits(dtype: str, batch: int) -> None:
    """Pairs of activations and panels of weights that are not full, and more columns than are summed at a time."""
    for rows, cols in ((1, 64), (5, 100), (19, 65), (34, 1100)):
        weights, x = normal(rows, cols).astype(DTYPES[dtype]), normal(batch, cols, seed=1)
        scale = scales((rows, cols), (2, 32)) if dtype in BYTES else None
        found = product(weights, x, scale, (2, 32))
        assert_same(found, np.concatenate([product(weights, x[i : i + 1], scale, (2, 32)) for i in range(batch)]))
        few = slice(0, None, 7)
        assert_same(found[:2, few], twin(weights, x[:2], scale, (2, 32))[:, few])


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("share", SHARES)
def test_scales_of_many_activations(dtype: str, share: tuple[int, int]) -> None:
    for rows, cols in ((3, 65), (6, 1344)):
        weights, x = normal(rows, cols).astype(DTYPES[dtype]), normal(5, cols, seed=1)
        scale = scales((rows, cols), share)
        assert_same(product(weights, x, scale, share), twin(weights, x, scale, share))


def test_infinite_scales_of_columns_that_are_not_there() -> None:
    weights, scale = np.ones((5, 1100), ml_dtypes.float8_e4m3fn), np.ones((5, 35), F32)
    scale[:, 34] = np.inf
    assert (product(weights, np.ones((8, 1100), F32), scale, (1, 32)) == np.inf).all()


@pytest.mark.parametrize("batch", [1, 5, 9])
@pytest.mark.parametrize("least", [1, 8, 37])
def test_strips_give_the_bits_of_the_whole(batch: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_products, "STRIP", 1000)
    weights, x = normal(37, 130), normal(batch, 130, seed=1)
    wanted = product(weights, x)
    for count in ("1", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        asked: list[tuple[int, int]] = []

        def read(start: int, stop: int, out: Floats, asked: list[tuple[int, int]] = asked) -> None:
            asked.append((start, stop))
            out[...] = weights[start:stop]

        out = np.full((batch, 37), 77, F32)
        multiply_strips(read, x, out, least)
        assert_same(out, wanted)
        assert sorted(asked)[0][0] == 0 and sorted(asked)[-1][1] == 37
        assert (len(asked) > 4 or least == 37) and all(a % least == 0 for a, _ in asked)


def test_strips_for_other_activations_are_refused() -> None:
    def read(start: int, stop: int, out: Floats) -> None:
        raise AssertionError("nothing is read")

    with pytest.raises(LayoutError, match=r"out float32 \(3, 8\), needs C-contiguous float32 \(2, 8\)"):
        multiply_strips(read, np.zeros((2, 64), F32), np.zeros((3, 8), F32))
    out = np.full((2, 8), 77, F32)
    multiply_strips(read, np.zeros((2, 0), F32), out)
    assert not out.any()
    multiply_strips(read, np.zeros((0, 64), F32), np.zeros((0, 8), F32))


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-126, 3.0, 2.0**120, 2.0**127, np.inf, np.nan])
def test_scales_of_all_sizes(dtype: str, scale: float) -> None:
    """Each number times its scale is rounded, or infinite, before it meets an activation."""
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32).view(DTYPES[dtype])
    for share in ((1, 0), (1, 32)):
        for x in (np.ones((1, 32), F32), normal(2, 32) * F32(2.0**-100)):
            every_scale = np.full((8, 1), scale, F32)
            assert_same(product(codes, x, every_scale, share), twin(codes, x, every_scale, share))


@every
def test_infinite_numbers_and_none(dtype: str) -> None:
    weights = normal(7, 130).astype(DTYPES[dtype])
    for bad, batch in itertools.product((np.inf, -np.inf, np.nan), (3, 8)):
        x = normal(batch, 130, seed=1)
        x[1, 3], x[2, 129] = bad, bad
        found = product(weights, x)
        assert_same(found, twin(weights, x))
        assert np.isfinite(np.delete(found, (1, 2), 0)).all() and not np.isfinite(found[1:3]).any()


def test_columns_that_are_not_there_add_nothing() -> None:
    """Not even where a scale is infinite, of which the product with 0 is no number."""
    weights = np.ones((5, 70), ml_dtypes.float8_e4m3fn)
    for share in ((1, 0), (1, 32)):
        scale = np.full((5, -(-70 // (share[1] or 70))), np.inf, F32)
        assert (product(weights, np.ones((1, 70), F32), scale, share) == np.inf).all()


def test_what_lies_behind_a_row_is_not_read() -> None:
    """A row's last columns are followed by the next row's first."""
    weights = np.zeros((6, 65), F32)
    weights[:, 0] = np.nan
    weights[2] = 1
    assert product(weights, np.ones((1, 65), F32))[0, 2] == 65
    for batch in (2, 8):
        none = np.isnan(product(weights, np.ones((batch, 65), F32)))
        assert none.tolist() == [[True, True, False, True, True, True]] * batch


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_rows_of_activations_do_not_meet(batch: int) -> None:
    weights, x = normal(6, 200).astype(ml_dtypes.bfloat16), normal(batch, 200, seed=1)
    together = product(weights, x)
    for b in range(batch):
        assert_same(together[b], product(weights, x[b : b + 1])[0])


@every
def test_threads_do_not_show(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = normal(11, 96).astype(DTYPES[dtype]), normal(2, 96, seed=1)
    monkeypatch.setattr(number_products, "LEAST_BYTES", 1)
    ranges: list[int] = []
    spread = threads.spread
    monkeypatch.setattr(threads, "spread", lambda *args: ranges.append(args[1]) or spread(*args))
    found = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        found.append(product(weights, x).tobytes())
    assert found[0] == found[1] == found[2]
    assert ranges == [11, 11, 11] or simd.INTERPRETED  # then one thread is as fast as many


@every
def test_the_plain_way_gives_the_same_bits(dtype: str) -> None:
    if simd.INTERPRETED:
        pytest.skip("nothing is compiled, so the plain way is what the other tests run")
    weights, x = normal(6, 130).astype(DTYPES[dtype]), normal(2, 130, seed=1)
    scale = scales((6, 130), (2, 32)) if dtype in BYTES else None
    found = np.empty((2, 6), F32)
    number_products._plainly(weights, x, found, scale, 2, 32)
    assert_same(found, product(weights, x, scale, (2, 32)))


def test_nothing_is_the_product_of_nothing() -> None:
    for batch in (2, 8):
        assert product(np.empty((3, 0), F32), np.empty((batch, 0), F32)).tolist() == [[0, 0, 0]] * batch
    assert product(np.empty((0, 64), F32), np.empty((2, 64), F32)).shape == (2, 0)
    assert product(np.empty((3, 64), F32), np.empty((0, 64), F32)).shape == (0, 3)


def test_what_is_refused_says_why() -> None:
    weights, x, out = np.zeros((4, 128), F32), np.zeros((1, 128), F32), np.zeros((1, 4), F32)
    codes = weights.astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(LayoutError, match=r"weights float64 \(4, 128\), needs C-contiguous float32, bfloat16"):
        multiply(weights.astype(np.float64), x, out)
    with pytest.raises(LayoutError, match="needs C-contiguous float32"):
        multiply(weights[:, ::2], x[:, :64].copy(), out)
    with pytest.raises(LayoutError, match=r"activations float32 \(1, 64\), needs C-contiguous float32 \(1, 128\)"):
        multiply(weights, x[:, :64].copy(), out)
    with pytest.raises(LayoutError, match=r"out float32 \(1, 3\), needs C-contiguous float32 \(1, 4\)"):
        multiply(weights, x, out[:, :3].copy())
    with pytest.raises(LayoutError, match=r"scales float32 \(4, 3\), needs C-contiguous float32 \(4, 4\)"):
        multiply(codes, x, out, np.zeros((4, 3), F32), (1, 32))
    with pytest.raises(LayoutError, match="16 columns share a scale, needs a multiple of 32"):
        multiply(codes, x, out, np.zeros((4, 8), F32), (1, 16))
    with pytest.raises(LayoutError, match="float32 have no scales, only float8_e4m3fn, float8_e5m2 do"):
        multiply(weights, x, out, np.zeros((4, 1), F32))


# ---------------------------------------------------------------- whole steps, by plain loops

Steps = tuple[npt.NDArray[np.int16], Floats, npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int8], Floats]


def plain_twin(steps, scale, ends, groups, q, a) -> Floats:
    out = np.zeros((len(q), len(steps)), F32)
    with np.errstate(all="ignore"):
        for n in range(len(q)):
            for row in range(len(steps)):
                total, first = F32(0), 0
                for block, end in enumerate(ends):
                    for plane in range(steps.shape[1]):
                        dot = sum(
                            int(s) * int(v) for s, v in zip(steps[row, plane, first:end], q[n, first:end], strict=True)
                        )
                        total = total + F32(dot) * (scale[row, plane, groups[block]] * a[n, block])
                    first = end
                out[n, row] = total
    return out


def steps_of(rows: int, planes: int, ends: list[int], groups: list[int], batch: int, most: int = 1024) -> Steps:
    rng = np.random.default_rng(rows)
    steps = rng.integers(-most, most + 1, (rows, planes, ends[-1])).astype(np.int16)
    scale = normal(rows * planes, max(groups) + 1).reshape(rows, planes, -1)
    q = rng.integers(-127, 128, (batch, ends[-1])).astype(np.int8)
    return steps, scale, np.array(ends, np.int32), np.array(groups, np.int32), q, normal(batch, len(ends), seed=2)


@pytest.mark.parametrize(
    "ends, groups",
    [([32, 64, 96], [0, 1, 2]), ([256, 512, 700], [0, 0, 0]), ([256, 300, 556, 600], [0, 0, 1, 1]), ([4], [0])],
)
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_plain_loops_give_the_bits_of_the_twin(ends: list[int], groups: list[int], planes: int) -> None:
    for rows, batch in ((1, 1), (5, 3)):
        case = steps_of(rows, planes, ends, groups, batch)
        out = np.full((batch, rows), 77, F32)
        plain_products.multiply(*case, out)
        assert_same(out, plain_twin(*case))


def test_plain_loops_take_the_largest_sums_and_numbers_that_are_none() -> None:
    steps = np.full((3, 1, 512), 1024, np.int16)
    q = np.full((2, 512), -127, np.int8)
    scale = np.array([1, np.inf, np.nan], F32).reshape(3, 1, 1)
    a = np.array([[1, 1], [np.nan, 1]], F32)
    case = steps, scale, np.array([256, 512], np.int32), np.zeros(2, np.int32), q, a
    out = np.empty((2, 3), F32)
    plain_products.multiply(*case, out)
    assert_same(out, plain_twin(*case))
    assert out[0, 0] == -127 * 1024 * 512


def test_plain_loops_do_not_show_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = steps_of(9, 2, [64, 128], [0, 1], 3)
    monkeypatch.setattr(plain_products, "LEAST_STEPS", 1)
    found = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        out = np.empty((3, 9), F32)
        plain_products.multiply(*case, out)
        found.append(out.tobytes())
    assert found[0] == found[1] == found[2]


def test_plain_loops_say_what_they_refuse() -> None:
    case = list(steps_of(4, 1, [64, 128], [0, 1], 1))
    out = np.empty((1, 4), F32)
    for i, wrong, words in (
        (0, case[0].astype(np.int32), r"steps: int32 \(4, 1, 128\), needs int16"),
        (4, case[4][:, 1:], r"activations: int8 \(1, 127\), needs int8 \(1, 128\)"),
        (5, case[5][:, 1:], r"activations' scales: float32 \(1, 1\), needs float32 \(1, 2\)"),
        (2, np.array([64, 127], np.int32), r"blocks end at \[64, 127\], needs ascending up to 128"),
        (3, np.array([0, 2], np.int32), r"blocks have scales 0 to 2 of 2"),
    ):
        with pytest.raises(LayoutError, match=words):
            plain_products.multiply(*case[:i], wrong, *case[i + 1 :], out)
