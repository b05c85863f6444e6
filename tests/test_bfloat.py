"""Decoding straight to bfloat16: what decoding to float32 and rounding gives, to the byte."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import packfmt
from packfmt import codecs, fused
from packfmt.kernels import floats
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
        floats.convert(numbers, out, through)
        assert_rounded(out.view(BF16), numbers)


@pytest.mark.parametrize("through", [False, True])
def test_any_part_of_an_array_can_be_rounded(through: bool) -> None:
    """Wherever it begins, and however long it is; what is beside it stays."""
    numbers = normal(200)
    for start in (0, 1, 5, 31):
        for size in (0, 1, 31, 32, 33, 64, 97):
            room = np.full(200, 77, np.uint16)
            floats.convert(numbers[:size], room[start : start + size], through)
            assert_rounded(room[start : start + size].view(BF16), numbers[:size])
            assert (room[:start] == 77).all() and (room[start + size :] == 77).all()


@pytest.mark.parametrize("name", ["q8_0", "bf16", "ptq161"])
def test_a_fresh_array_gets_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_THROUGH", 0)
    packed = packfmt.pack(normal(2, COLS), name)
    found = [np.full((2, COLS), 7, BF16) for _ in range(2)]
    for fresh, out in enumerate(found):
        fused.decode(packed.layout, (2, COLS), packed.components, out, bool(fresh))
    assert found[0].tobytes() == found[1].tobytes()
    assert_rounded(found[0], packed.decode())
