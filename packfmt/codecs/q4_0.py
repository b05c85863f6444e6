"""q4_0: 32 weights share one float16 scale; codes are 4 bits around 8.

    w[j] = scale * (code[j] - 8)

Bytes, rounding and worked example: spec/formats/q4_0.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import quantize
from packfmt.layout import Codes, Values, blocks, cols, grid

BLOCK = 32
ZERO = 8

LAYOUT = blocks(
    "q4_0",
    BLOCK,
    Values("scale", "<f2", doc="`d`"),
    Codes("codes", 4, (cols(1, 16),), (cols(16, 2),), doc="`qs`: byte j holds code j low, code j + 16 high"),
    grid=grid("affine", zero=ZERO),
    purpose="4-bit integers around 8, a float16 scale for 32",
    sources=("ggml d99724f2, src/ggml-common.h block_q4_0", "gguf 0.19.0, gguf/quants.py Q4_0"),
    also=(("gguf", "Q4_0"),),
)

CODEC = Codec(LAYOUT, {"ggml": quantize.q4_0}, fast={"ggml": partial(quantize.records, name="q4_0")})
