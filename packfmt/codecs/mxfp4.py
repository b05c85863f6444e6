"""mxfp4: 32 weights share one power of two; codes are 4-bit floats (float4_e2m1fn), stored in ggml's order.

    w[j] = VALUES[code[j]] * 2**(scale - 128)

VALUES are twice the numbers of float4_e2m1fn, so that all are whole; the exponent makes up for it.

Bytes, rounding and worked example: spec/formats/mxfp4.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import fp4, quantize
from packfmt.layout import Codes, Values, blocks, cols, grid

BLOCK = 32
VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

LAYOUT = blocks(
    "mxfp4",
    BLOCK,
    Values("scale", "u1", doc="`e`: exponent, 128 is one"),
    Codes("codes", 4, (cols(1, 16),), (cols(16, 2),), doc="`qs`: byte j holds code j low, code j + 16 high"),
    grid=grid("table", values=VALUES, exponent=128),
    purpose="4-bit floats, a power of two for 32 (OCP microscaling)",
    sources=(
        "OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3",
        "ggml d99724f2, src/ggml-common.h block_mxfp4",
        "gguf 0.19.0, gguf/quants.py MXFP4",
    ),
    also=(("gguf", "MXFP4"),),
)

CODEC = Codec(
    LAYOUT,
    {"best": fp4.mxfp4, "ggml": quantize.mxfp4},
    ("best",),
    fast={"best": fp4.mxfp4_records, "ggml": partial(quantize.records, name="mxfp4")},
)
