"""bf16: every weight as bfloat16, row by row.

Rounding and worked example: spec/formats/bf16.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import quantize
from packfmt.layout import DENSE, dtype_of

LAYOUT = DENSE["bf16"]
DTYPE = dtype_of("bfloat16")

CODEC = Codec(
    LAYOUT,
    {"cast": partial(quantize.cast, name="bf16", dtype=DTYPE, wider="f32")},
    fast={"cast": partial(quantize.narrowed, dtype=DTYPE)},
)
