"""Folders of compressed-tensors: what is stored in them, as the real package and as packfmt write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from packfmt import conversion
from packfmt.codec import Array
from packfmt.exporters import safetensors_header
from tests.models import BF16, normal

F32 = np.float32
E4M3 = ml_dtypes.float8_e4m3fn
UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"
KEEP = {"embed_tokens|lm_head": "keep"}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NUMBERS = np.array([*E2M1, *(-float(n) for n in E2M1)], F32)

# The package's bytes for x[i] = (i - 31.5) / 8, i = 0 .. 63, one row: compressed-tensors 0.20.0 on torch 2.13.0
NVFP4 = "ffffffeeeeeeeeddffefeedecdbcab8910324354656676775566666666777777"
NVFP4_SCALES, NVFP4_GLOBAL = "7e76767e", F32(448 * 6) / F32(31.5 / 8)
MXFP4 = "eeeeddddddddccccccbbbbaaaa99998800111122223333444444555555556666"
MXFP4_SCALES = "7f7f"

FORMATS = {  # layout -> format, what a layer is stored as: suffix -> dtype, shape of (64, 256)
    "nvfp4_ct": (
        "nvfp4-pack-quantized",
        {"_packed": ("U8", [64, 128]), "_scale": ("F8_E4M3", [64, 16]), "_global_scale": ("F32", [1])},
    ),
    "mxfp4_pairs": ("mxfp4-pack-quantized", {"_packed": ("U8", [64, 128]), "_scale": ("U8", [64, 8])}),
    "mxfp6_e2m3": ("mxfp6-pack-quantized", {"_packed": ("U8", [64, 192]), "_scale": ("U8", [64, 8])}),
    "mxfp8_e4m3": ("mxfp8-quantized", {"": ("F8_E4M3", [64, 256]), "_scale": ("U8", [64, 8])}),
    "fp8_tensor": ("float-quantized", {"": ("F8_E4M3", [64, 256]), "_scale": ("F32", [1])}),
    "fp8_row": ("float-quantized", {"": ("F8_E4M3", [64, 256]), "_scale": ("F32", [64, 1])}),
    "fp8_row_bf16": ("float-quantized", {"": ("F8_E4M3", [64, 256]), "_scale": ("BF16", [64, 1])}),
    "fp8_block": ("float-quantized", {"": ("F8_E4M3", [64, 256]), "_scale": ("F32", [1, 2])}),
    "ct_int4_g128": (
        "pack-quantized", {"_packed": ("I32", [64, 32]), "_scale": ("BF16", [64, 2]), "_shape": ("I64", [2])},
    ),
    "ct_int3_row_f32": (
        "pack-quantized", {"_packed": ("I32", [64, 24]), "_scale": ("F32", [64, 1]), "_shape": ("I64", [2])},
    ),
    "ct_int3_legacy_g64": (
        "pack-quantized", {"_packed": ("I32", [64, 26]), "_scale": ("BF16", [64, 4]), "_shape": ("I64", [2])},
    ),
    "ct_int4_g64_asym_f16": (
        "pack-quantized",
        {
            "_packed": ("I32", [64, 32]), "_scale": ("F16", [64, 4]), "_zero_point": ("I32", [8, 4]),
            "_shape": ("I64", [2]),
        },
    ),
}  # fmt: skip
WEIGHTS = {  # the `weights` of a group, as the package writes them
    "nvfp4_ct": {
        "num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "strategy": "tensor_group",
        "dynamic": False, "scale_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4_pairs": {
        "num_bits": 4, "type": "float", "symmetric": True, "group_size": 32, "strategy": "group", "dynamic": False,
        "scale_dtype": "torch.uint8",
    },
    "fp8_block": {
        "num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": "block",
        "block_structure": [128, 128], "dynamic": False,
    },
    "ct_int4_g128": {
        "num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group", "dynamic": False,
    },
}  # fmt: skip

layouts = pytest.mark.parametrize("name", FORMATS)


def dense(path: Path, **more: Array) -> Path:
    """A model of two linear layers, an embedding, an output layer and a norm, by the safetensors library."""
    path.mkdir()
    tensors = {
        "model.embed_tokens.weight": normal(96, 256, seed=1, dtype=BF16),
        f"{UP}.weight": normal(64, 256, seed=2, dtype=BF16),
        f"{DOWN}.weight": normal(256, 256, seed=3, dtype=BF16),
        f"{HEAD}.weight": normal(96, 256, seed=4, dtype=BF16),
        "model.norm.weight": normal(256, seed=5, dtype=BF16),
    }
    save_file(tensors | more, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    (path / "tokenizer.json").write_text("{}")
    return path


def to_folder(source: Path, target: Path, name: str, **rules: str) -> Path:
    conversion.convert(source, target, name, overrides={**KEEP, **rules}, container="compressed-tensors", check=True)
    return target


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def entries(path: Path) -> dict[str, tuple[str, list[int]]]:
    with path.open("rb") as file:
        return {n: (e.dtype, list(e.shape)) for n, e in safetensors_header.read(path, file).entries.items()}


def stored(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, of all files of a folder."""
    out = {}
    for name in sorted(path.glob("*.safetensors")):
        with name.open("rb") as file:
            header = safetensors_header.read(name, file)
            for tensor, e in header.entries.items():
                file.seek(header.data + e.begin)
                out[tensor] = file.read(e.end - e.begin)
    return out


def written(path: Path, tensors: Mapping[str, Array], weights: Any, of: str, **config: Any) -> Path:
    """A folder as the package writes it, by the safetensors library."""
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": of}
    says = {"quant_method": "compressed-tensors", "format": of, "config_groups": {"group_0": group}, **config}
    (path / "config.json").write_text(json.dumps({"quantization_config": says}))
    return path


def packed_bytes(text: str) -> Array:
    return np.frombuffer(bytes.fromhex(text), np.uint8)[None]


def golden_nvfp4() -> dict[str, Array]:
    return {
        "a.weight_packed": packed_bytes(NVFP4),
        "a.weight_scale": packed_bytes(NVFP4_SCALES).view(E4M3),
        "a.weight_global_scale": np.array([NVFP4_GLOBAL], F32),
    }
