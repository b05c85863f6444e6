"""tq2_0: 256 weights share one float16 scale; codes are 2 bits for -1, 0 and 1.

    w[j] = scale * (code[j] - 1)

Bytes, rounding and worked example: spec/formats/tq2_0.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import quantize, ternary
from packfmt.kernels import ternary_blocks as fast
from packfmt.layout import Codes, Values, blocks, cols, grid

BLOCK = 256
ZERO = 1

LAYOUT = blocks(
    "tq2_0",
    BLOCK,
    Codes(
        "codes",
        2,
        (cols(128, 2), cols(1, 32)),
        (cols(32, 4),),
        levels=3,
        doc="`qs`: byte j of half h holds codes 128 h + j + 0, 32, 64, 96, lowest bits first",
    ),
    Values("scale", "<f2", doc="`d`"),
    grid=grid("affine", zero=ZERO),
    purpose="ternary weights, a float16 scale for 256",
    sources=("ggml d99724f2, src/ggml-common.h block_tq2_0", "gguf 0.19.0, gguf/quants.py TQ2_0"),
    also=(("gguf", "TQ2_0"),),
)

CODEC = Codec(
    LAYOUT,
    {"best": partial(ternary.ternary, group=BLOCK, name="tq2_0"), "ggml": quantize.tq2_0},
    fast={"ggml": fast.tq2_0},
)
