"""f16: every weight as float16, row by row.

Rounding and worked example: spec/formats/f16.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import quantize
from packfmt.layout import DENSE, dtype_of

LAYOUT = DENSE["f16"]
DTYPE = dtype_of("<f2")

CODEC = Codec(
    LAYOUT,
    {"cast": partial(quantize.cast, name="f16", dtype=DTYPE, wider="bf16")},
    fast={"cast": partial(quantize.narrowed, dtype=DTYPE)},
)
