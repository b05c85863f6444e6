"""tq1_0: 256 weights share one float16 scale; five of -1, 0 and 1 lie in a byte, as a number of base 3.

    w[j] = scale * (digit[j] - 1)

Bytes, rounding and worked example: spec/formats/tq1_0.md
"""

from __future__ import annotations

import numpy as np

from packfmt.codec import Codec
from packfmt.kernels import spell, ternary
from packfmt.kernels import ternary_blocks as fast
from packfmt.layout import COLS, ROWS, Axis, Digit, Values, blocks, grid

BLOCK = 256
RUNS = ((32, 5), (16, 5), (4, 4))  # bytes, and digits in each
BYTES = sum(count for count, _ in RUNS)

LAYOUT = blocks(
    "tq1_0",
    BLOCK,
    Values("codes", "u1", (Digit("byte", 1, BYTES),), doc="`qs` and `qh`: 48 bytes of five digits, 4 of four"),
    Values("scale", "<f2", doc="`d`"),
    grid=grid("base3", block=BLOCK, runs=RUNS, first="high"),
    axes=(ROWS, COLS, Axis("byte", size=BYTES)),
    purpose="ternary weights in base 3, a float16 scale for 256",
    sources=("ggml d99724f2, src/ggml-common.h block_tq1_0", "gguf 0.19.0, gguf/quants.py TQ1_0"),
    also=(("gguf", "TQ1_0"),),
)


def best(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Least squared error (`ternary.ternary`)."""
    return _spelled(ternary.ternary(weight, BLOCK, name="tq1_0"))


def ggml(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The peak is the scale, as in ggml (`ternary.tq1_0`)."""
    return _spelled(ternary.tq1_0(weight))


def _spelled(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    steps = parts["codes"].view(np.int8) - np.int8(1)
    return {"codes": spell.write_base3(steps, BLOCK, np.array(RUNS), True), "scale": parts["scale"][:, :, None]}


CODEC = Codec(LAYOUT, {"best": best, "ggml": ggml}, fast={"ggml": fast.tq1_0})
