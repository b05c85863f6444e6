"""Small models in Hugging Face's form, written by the safetensors library, and tensors to put into them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from packfmt.codec import Array
from packfmt.layout import Codes, Component, Layout, Values, cols, grid, rows

BF16 = ml_dtypes.bfloat16

PAIRS = Layout(  # the numbers of q4_0 in other places: neighbours share a byte, scales stand apart
    "q4_0_pairs",
    (
        Component("packed", (rows(), cols(2)), (Codes("codes", 4, (), (cols(1, 2),)),)),
        Component("scales", (rows(), cols(32)), (Values("scale", "<f2"),)),
    ),
    grid("affine", zero=8),
)


def normal(*shape: int, seed: int = 0, dtype: object = np.float32) -> Array:
    """Weights as trained models have them: normal, and by default rounded to bfloat16 first."""
    weights = np.random.default_rng(seed).normal(0, 0.02, shape).astype(BF16)
    return weights.astype(dtype)


def tensors(dtype: object = np.float32, cols: int = 256) -> dict[str, Array]:
    """A linear layer, an embedding, a norm, a bias, positions, a router and a stack of experts."""
    return {
        "embed.weight": normal(96, cols, seed=1, dtype=dtype),
        "layers.0.mlp.up_proj.weight": normal(64, cols, seed=2, dtype=dtype),
        "layers.0.mlp.up_proj.bias": normal(64, seed=3, dtype=dtype),
        "layers.0.norm.weight": normal(cols, seed=4, dtype=dtype),
        "layers.0.mlp.gate.weight": normal(32, cols, seed=5, dtype=dtype),
        "layers.0.mlp.experts.down_proj": normal(4, 32, cols, seed=6, dtype=dtype),
        "layers.0.conv.weight": normal(8, 8, 3, seed=7, dtype=dtype),
        "positions": np.arange(7, dtype=np.int64),
    }


def folder(path: Path, model: Mapping[str, Array] | None = None, shards: int = 1) -> Path:
    """A folder with config.json, a tokenizer file, and the tensors in one or several files."""
    model = tensors() if model is None else model
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "toy", "hidden_size": 256}))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"a pickle, which is not carried over")
    names = list(model)
    if shards == 1:
        save_file(dict(model), path / "model.safetensors")
        return path
    weight_map = {}
    for i in range(shards):
        mine = names[i::shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: model[n] for n in mine}, path / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def same(a: Array, b: Array) -> bool:
    """Same dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
