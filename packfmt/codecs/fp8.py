"""8-bit floats (float8_e4m3fn) with a scale for the tensor, for each row, or for tiles of 128 x 128.

    w[r, c] = number(code[r, c]) * scale

    fp8_tensor, fp8_row, fp8_block           float32 scales
    fp8_tensor_bf16, ...                     bfloat16 scales, as compressed-tensors keeps a bfloat16 model's
    fp8_block_e8m0                           powers of two, as DeepSeek V4 has them

Tiles at the edge of the weight may be smaller.

Bytes, rounding and worked examples: spec/formats/fp8.md
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from packfmt.codec import Codec
from packfmt.kernels import tiles
from packfmt.layout import Component, Digit, Layout, Values, cols, dtype_of, grid, rows

TILE = 128
CT = "compressed-tensors 0.20.0, compressors: float-quantized"
OVER: dict[str, tuple[Digit, ...]] = {"tensor": (), "row": (rows(),), "block": (rows(TILE), cols(TILE))}
FOR = {"tensor": "for the tensor", "row": "for each row", "block": "for tiles of 128 x 128"}
SHARE = {"tensor": (0, 0), "row": (1, 0), "block": (TILE, TILE)}  # rows and columns of a scale; 0: all
SOURCES = {
    "tensor": (CT, "NVIDIA ModelOpt 0.47.0, export/unified_export_hf.py: FP8"),
    "row": (CT,),
    "block": ("DeepSeek-V3, inference/fp8_cast_bf16.py", CT),
}
DTYPES = {"": "<f4", "_bf16": "bfloat16", "_e8m0": "float8_e8m0fnu"}
WORDS = {"": "a float32 scale", "_bf16": "a bfloat16 scale", "_e8m0": "a power of two"}
SCALE_NAMES = {"fp8_block": "weight_scale_inv", "fp8_block_e8m0": "scale"}
ALSO = {
    "fp8_tensor": (("compressed_tensors", "float-quantized"), ("modelopt", "FP8")),
    "fp8_row": (("compressed_tensors", "float-quantized channel"),),
    "fp8_block": (("deepseek", "fp8"), ("compressed_tensors", "float-quantized block")),
    "fp8_block_e8m0": (("deepseek", "fp8 e8m0"),),
    "fp8_tensor_bf16": (("compressed_tensors", "float-quantized bf16"),),
    "fp8_row_bf16": (("compressed_tensors", "float-quantized channel bf16"),),
    "fp8_block_bf16": (("compressed_tensors", "float-quantized block bf16"),),
}


def _layout(kind: str, suffix: str) -> Layout:
    name = f"fp8_{kind}{suffix}"
    scale = Component(
        SCALE_NAMES.get(name, "weight_scale"), OVER[kind], (Values("scale", DTYPES[suffix]),), ragged=kind == "block",
        doc="multiplies",
    )  # fmt: skip
    return Layout(
        name,
        (Component("weight", (rows(), cols()), (Values("codes", "float8_e4m3fn"),)), scale),
        grid("scaled", element="float8_e4m3fn", scale="", global_scale=""),
        purpose=f"8-bit floats, {WORDS[suffix]} {FOR[kind]}",
        sources=SOURCES[kind],
        also=ALSO.get(name, ()),
    )


def _encode(weight: np.ndarray, share: tuple[int, int], suffix: str, rule: str) -> dict[str, np.ndarray]:
    parts = tiles.fp8(weight, share, DTYPES[suffix], rule)
    scale, dtype = parts["scale"], dtype_of(DTYPES[suffix])
    numbers = scale.view(dtype) if scale.dtype == np.uint8 else scale.astype(dtype)
    return {"codes": parts["codes"].view(ml_dtypes.float8_e4m3fn), "scale": numbers}


def _codec(kind: str, suffix: str) -> Codec:
    rules = ("amax", "compressed-tensors") if suffix == "_bf16" else ("amax",)
    encode: Any = partial(_encode, share=SHARE[kind], suffix=suffix)
    return Codec(_layout(kind, suffix), {rule: partial(encode, rule=rule) for rule in rules})


KINDS = (*((kind, suffix) for kind in OVER for suffix in ("", "_bf16")), ("block", "_e8m0"))
CODECS = {codec.layout.name: codec for codec in (_codec(*kind) for kind in KINDS)}
