"""What holds for every format on the shelf, whatever it is."""

from __future__ import annotations

import numpy as np
import pytest

from packfmt import codecs, fused, grids, placement
from packfmt.codec import Codec, matrix
from packfmt.layout import DENSE, dtype_of
from packfmt.placement import Arrays
from tests.models import normal, same

NAMES = (
    *codecs.names(),
    *("mote_4", "tl1_256_128_64", "e2m1_g32", "e3m2b5_row", "e4m3_tensor", "ct_int4_g128", "ct_int3_g32_asym"),
    *("ct_int5_legacy_row_asym_f16", "ct_int8_row_f32", "nvfp4_ct_h64", "mxfp4_out4", "arcquant_64", "nvfp4_x4"),
)
every = pytest.mark.parametrize("name", NAMES)
ENCODERS = [(name, encoder) for name in NAMES for encoder in codecs.get(name).encoders]
SHAPE = (256, 512)  # fills the blocks of all


def codec(name: str) -> Codec:
    return codecs.get(name)


def any_bytes(name: str, seed: int) -> Arrays:
    """Components of any bytes; a permutation stays one, and bits that belong to nothing stay zero."""
    layout, rng = codec(name).layout, np.random.default_rng(seed)
    out = {}
    for placed in layout.fit(*SHAPE).components:
        raw = rng.integers(0, 256, placed.nbytes, np.uint8)
        out[placed.name] = raw.view(dtype_of(placed.dtype)).reshape(placed.shape)
    if "mask" in out:  # of as many columns as there are codes for
        out["mask"] = codec(name).encode(normal(*SHAPE)).components["mask"]
    for component in ("perm", "reorder_index", "outlier_columns"):
        if component in out:
            out[component] = rng.permutation(SHAPE[1])[: out[component].size].astype(out[component].dtype)
    if any(c.spare_bits for c in layout.fit(*SHAPE).components):
        return placement.pack(layout, SHAPE, placement.unpack(layout, SHAPE, out))
    return out


def has_streams(name: str) -> bool:
    return bool(codec(name).layout.streams)


@every
def test_a_format_is_called_as_its_layout(name: str) -> None:
    assert codec(name).layout.name == name and codec(name).encoders
    assert codec(name).layout.purpose and (codec(name).layout.sources or name in DENSE)


@pytest.mark.parametrize("name", [n for n in NAMES if not has_streams(n)])
def test_any_bytes_survive_unpack_and_pack(name: str) -> None:
    layout = codec(name).layout
    for seed in range(3):
        stored = any_bytes(name, seed)
        again = placement.pack(layout, SHAPE, placement.unpack(layout, SHAPE, stored))
        assert all(again[k].tobytes() == v.tobytes() for k, v in stored.items())


@pytest.mark.parametrize("name", [n for n in NAMES if not has_streams(n)])
def test_decoding_in_one_pass_is_decoding_by_parts(name: str) -> None:
    layout = codec(name).layout
    for seed in range(3):
        stored = any_bytes(name, seed)
        with np.errstate(all="ignore"):
            assert fused.decode(layout, SHAPE, stored).tobytes() == grids.decode(layout, SHAPE, stored).tobytes()


@pytest.mark.parametrize(("name", "encoder"), ENCODERS)
def test_an_encoder_gives_what_its_layout_says_and_finite_numbers(name: str, encoder: str) -> None:
    packed = codec(name).encode(normal(*SHAPE), encoder)
    assert np.isfinite(packed.decode()).all()
    assert grids.findings(packed.layout, packed.unpack()) == []


@pytest.mark.parametrize(("name", "encoder"), [(n, e) for n, e in ENCODERS if e in codec(n).fast])
def test_a_fast_encoder_gives_the_bytes_of_the_slow_one(name: str, encoder: str) -> None:
    for weight in (normal(*SHAPE), normal(*SHAPE).round(2), np.zeros(SHAPE, np.float32)):
        parts = codec(name).encoders[encoder](weight)
        slow = placement.pack(codec(name).layout, SHAPE, parts)
        found = codec(name).fast[encoder](weight)
        assert found is not None and all(same(found[k], v) for k, v in slow.items())


@pytest.mark.parametrize(("name", "encoder"), ENCODERS)
def test_the_number_of_threads_changes_no_byte(name: str, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for count in ("1", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        packed = codec(name).encode(normal(*SHAPE), encoder)
        found.add(b"".join(c.tobytes() for c in packed.components.values()) + packed.decode().tobytes())
    assert len(found) == 1


@pytest.mark.parametrize(("name", "encoder"), ENCODERS)
def test_no_rows_and_no_columns_are_encoded(name: str, encoder: str) -> None:
    for shape in ((0, 512), (256, 0), (0, 0)):
        if name in ("mote_4", "nvfp4_x4") and not shape[0]:
            continue  # no experts are not four
        if name in ("mxfp4_out4", "arcquant_64") and not shape[1]:
            continue  # nor are no columns the four kept apart, or the 64 stored twice
        packed = codec(name).encode(np.zeros(shape, np.float32), encoder)
        assert packed.decode().shape == shape


@every
def test_experts_are_rows(name: str) -> None:
    weight = normal(4, 64, 512)
    packed = codec(name).encode(weight)
    assert packed.shape == weight.shape and packed.matrix == matrix(weight.shape) == SHAPE
    if name != "mote_4":
        assert same(packed.decode().reshape(SHAPE), codec(name).encode(weight.reshape(SHAPE)).decode())
