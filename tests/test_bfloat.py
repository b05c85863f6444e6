"""Decoding straight to bfloat16: what decoding to float32 and rounding gives, to the byte."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import packfmt
from packfmt import codecs, fused
from packfmt.kernels import blocks
from packfmt.kernels.vectors import INTERPRETED
from packfmt.layout import dtype_of
from tests.models import normal

pytestmark = pytest.mark.kernels

BF16 = ml_dtypes.bfloat16
F32 = np.float32
COLS = 1024  # which fit all formats
NAMES = list(packfmt.formats())


def noise(name: str, rows: int) -> dict[str, npt.NDArray[np.generic]]:
    """Components of a layout, any bytes at all."""
    rng = np.random.default_rng(0)
    components = codecs.get(name).layout.fit(rows, COLS).components
    arrays = {c.name: rng.bytes(int(np.prod(c.shape)) * dtype_of(c.dtype).itemsize) for c in components}
    found = {c.name: np.frombuffer(arrays[c.name], dtype_of(c.dtype)).reshape(c.shape) for c in components}
    if "perm" in found:
        found["perm"] = rng.permutation(COLS).astype("<u4").reshape(found["perm"].shape)
    return found


def assert_rounded(found: npt.NDArray[np.generic], numbers: npt.NDArray[np.float32]) -> None:
    """To the byte, but for the bits of a NaN."""
    with np.errstate(all="ignore"):
        wanted = numbers.astype(BF16)
    none = np.isnan(numbers)
    assert np.isnan(found.astype(F32)[none]).all()
    assert np.where(none, 0, found.view(np.uint16)).tobytes() == np.where(none, 0, wanted.view(np.uint16)).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_every_format_decodes_to_bfloat16(name: str) -> None:
    layout = codecs.get(name).layout
    shape = max(2, layout.block["rows"]), COLS
    many = shape[0] > 16  # which encoders take long for, where nothing is compiled
    components = noise(name, shape[0]) if many else packfmt.pack(normal(*shape), name).components
    out = np.full(shape, 7, BF16)
    assert fused.decode(layout, shape, components, out) is out
    assert_rounded(out, fused.decode(layout, shape, components))


@pytest.mark.parametrize("name", [n for n in NAMES if fused.decoder(codecs.get(n).layout)])
def test_any_bytes_decode_to_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are infinite or no number among them; past the cache, too."""
    layout = codecs.get(name).layout
    shape = 4 * layout.block["rows"], COLS
    for least in (fused.LEAST_THROUGH, 0):
        monkeypatch.setattr(fused, "LEAST_THROUGH", least)
        components = noise(name, shape[0])
        out = np.full(shape, 7, BF16)
        fused.decode(layout, shape, components, out)
        assert_rounded(out, fused.decode(layout, shape, components))


@pytest.mark.parametrize("through", [False, True])
def test_every_upper_half_rounds_to_nearest_even(through: bool) -> None:
    """All 65,536 of them, before the lower halves around which rounding turns."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        numbers = (upper | np.uint32(lower)).view(F32)
        out = np.zeros(1 << 16, np.uint16)
        blocks.convert(numbers, out, through)
        assert_rounded(out.view(BF16), numbers)


@pytest.mark.parametrize("through", [False, True])
def test_any_part_of_an_array_can_be_rounded(through: bool) -> None:
    """Wherever it begins, and however long it is; what is beside it stays."""
    numbers = normal(200)
    for start in (0, 1, 5, 31):
        for size in (0, 1, 31, 32, 33, 64, 97):
            room = np.full(200, 77, np.uint16)
            blocks.convert(numbers[:size], room[start : start + size], through)
            assert_rounded(room[start : start + size].view(BF16), numbers[:size])
            assert (room[:start] == 77).all() and (room[start + size :] == 77).all()


def test_one_number_rounds_as_many_do() -> None:
    if INTERPRETED:
        pytest.skip("nothing is compiled, so there is one way only")
    numbers = np.random.default_rng(0).integers(0, 1 << 32, 3200, dtype=np.uint32).view(F32)
    out = np.zeros(3200, np.uint16)
    blocks.convert(numbers, out)
    one = [blocks._bfloat(number) for number in numbers]
    assert one == out.tolist()


FOUR_BITS = blocks.Places(
    16, 32, np.empty((0, 7), np.int64), np.array([[0, 32, 4, 0, 0]]), np.empty((0, 4), np.int64), np.ones(5, np.uint8)
)


def by_hand(records: npt.NDArray[np.uint8], scale: npt.NDArray[np.float32], values: npt.NDArray[np.float32]):
    codes = np.stack([records & 15, records >> 4], -1).reshape(len(records), -1)
    with np.errstate(all="ignore"):
        return values[codes] * np.repeat(np.resize(scale, (len(codes), scale.shape[1])), 32, axis=1)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled, so nothing is looked up")
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("rows_of_scales", [1, 5])
def test_looked_up_numbers_are_rounded_once(through: bool, rows_of_scales: int) -> None:
    """Scales of all sizes, infinite and none among them; the kernel writes float32 or bfloat16, at any address."""
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (5, 8 * 16), np.uint8)
    scale = rng.integers(0, 1 << 32, (rows_of_scales, 8), np.uint32).view(F32)
    scale[0, :5] = np.inf, np.nan, 2.0**-149, 2.0**127, 0
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
    numbers, whole = blocks.numbers_of(values), blocks.numbers_of(np.arange(16, dtype=F32) - F32(8))
    assert blocks.finishes(numbers, "times", 1, 256, 32)
    wanted, steps = by_hand(records, scale, values), by_hand(records, scale, np.arange(16, dtype=F32) - F32(8))
    for start in (0, 8, 24):
        wide, few = np.full(5 * 256 + start, 7, F32), np.full(5 * 256 + start, 7, np.uint16)
        for out in (wide[start:].reshape(5, 256), few[start:].reshape(5, 256)):
            as_found = (lambda out=out: out) if out.dtype == F32 else (lambda out=out: out.view(BF16))
            assert blocks.decode(records, FOUR_BITS, scale, out, numbers, through=through)
            assert_same(as_found(), wanted)
            assert blocks.decode(records, FOUR_BITS, scale, out, whole, through=through)
            assert_same(as_found(), steps)
        assert (wide[:start] == 7).all() and (few[:start] == 7).all()


def assert_same(found: npt.NDArray[np.generic], numbers: npt.NDArray[np.float32]) -> None:
    if found.dtype == F32:
        none = np.isnan(numbers)
        assert np.isnan(found[none]).all() and found[~none].tobytes() == numbers[~none].tobytes()
    else:
        assert_rounded(found, numbers)
