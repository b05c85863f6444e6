"""q1_0: 128 weights share one float16 scale; a code is one bit, the sign.

    w[j] = scale if code[j] else -scale

Bytes, rounding and worked example: spec/formats/q1_0.md
"""

from __future__ import annotations

from packfmt.codec import Codec
from packfmt.kernels import ternary
from packfmt.layout import Codes, Values, blocks, cols, grid

BLOCK = 128
VALUES = (-1, 1)
BYTES = "`qs`: byte j holds codes 8 j to 8 j + 7, lowest bit first"

LAYOUT = blocks(
    "q1_0",
    BLOCK,
    Values("scale", "<f2", doc="`d`"),
    Codes("codes", 1, (cols(8, BLOCK // 8),), (cols(1, 8),), doc=BYTES),
    grid=grid("levels", values=VALUES),
    purpose="signs alone, a float16 scale for 128",
    sources=("ggml d99724f2, src/ggml-common.h block_q1_0", "ggml d99724f2, src/ggml-quants.c quantize_row_q1_0_ref"),
    also=(("gguf", "Q1_0"),),
)

CODEC = Codec(LAYOUT, {"ggml": ternary.q1_0})
