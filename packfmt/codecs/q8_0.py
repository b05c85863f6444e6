"""q8_0: 32 weights share one float16 scale; codes are signed bytes.

    w[j] = scale * code[j]

Bytes, rounding and worked example: spec/formats/q8_0.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import quantize
from packfmt.layout import Values, blocks, cols, grid

BLOCK = 32

LAYOUT = blocks(
    "q8_0",
    BLOCK,
    Values("scale", "<f2", doc="`d`"),
    Values("codes", "i1", (cols(1, BLOCK),), doc="`qs`: byte j holds code j"),
    grid=grid("affine", zero=0),
    purpose="8-bit integers, a float16 scale for 32",
    sources=("ggml d99724f2, src/ggml-common.h block_q8_0", "gguf 0.19.0, gguf/quants.py Q8_0"),
    also=(("gguf", "Q8_0"),),
)

CODEC = Codec(LAYOUT, {"ggml": quantize.q8_0}, fast={"ggml": partial(quantize.records, name="q8_0")})
