"""Layers that engines run as one have one scale, in layouts that rotate weights or keep columns apart, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from packfmt import checkpoint, codecs, conversion
from tests.models import normal

ALIKE = [
    "nvfp4", "nvfp4_h16", "nvfp4_h32", "nvfp4_ct_h64", "nvfp4_modelopt_out4", "nvfp4_out32", "nvint4_h128", "if4_h16"
]  # fmt: skip


def layers() -> dict[str, np.ndarray]:
    """Queries, keys and values of other spreads, and an outlier in some of their columns."""
    kinds = {"q_proj": 1, "k_proj": 3, "v_proj": 0.2}
    model = {f"l.{kind}.weight": np.float32(n) * normal(64, 256, seed=i) for i, (kind, n) in enumerate(kinds.items())}
    model["l.q_proj.weight"][:, 17] *= 30
    return model


@pytest.mark.parametrize("name", ALIKE)
def test_layers_that_run_as_one_have_one_scale(tmp_path: Path, name: str) -> None:
    model = layers()
    save_file(model, tmp_path / "in.safetensors")
    conversion.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", name)
    with checkpoint.open(tmp_path / "out.safetensors") as packed:
        scales = {float(packed[weight].unpack()["global_scale"].item()) for weight in model}
        off = {weight: float(np.square(packed[weight].decode() - model[weight]).sum()) for weight in model}
    assert len(scales) == 1
    for weight, numbers in model.items():  # and none pays for it
        alone = codecs.get(name).encode(numbers).decode()
        assert off[weight] < 1.05 * float(np.square(alone - numbers).sum())


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("largest", [1e-30, 1.0, 1e36])
def test_every_peak_of_a_weight_and_above_will_do(name: str, largest: float) -> None:
    """Rotation makes a block of equal weights one weight, sqrt(size) times as large."""
    weight = np.zeros((2, 512), np.float32)
    weight[0, :256] = largest
    peak = float(np.abs(weight).max())
    codec = codecs.get(name)
    for above in (1, 1.5, 20):
        packed = codec.encode(weight, peak=min(above * peak, 3.4e38))
        assert np.isfinite(packed.decode()).all()
