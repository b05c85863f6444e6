"""f32: every weight as float32, row by row.

Rounding and worked example: spec/formats/f32.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import quantize
from packfmt.layout import DENSE, dtype_of

LAYOUT = DENSE["f32"]

CODEC = Codec(LAYOUT, {"cast": partial(quantize.cast, name="f32", dtype=dtype_of("<f4"), wider="f64")})
