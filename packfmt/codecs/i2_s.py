"""i2_s: codes are 2 bits for -1, 0 and 1, four quarters of a unit in each byte; one scale for the whole tensor.

    w[j] = scale * (code[j] - 1)

bitnet.cpp has two orders of codes under one name, and nothing in a file tells them apart: units of 128
columns where it was built for x86 (i2_s), units of 64 for ARM (i2_s_arm). In both the first quarter of a
unit lies in the highest bits.

Bytes, rounding and worked example: spec/formats/i2_s.md
"""

from __future__ import annotations

import numpy as np

from packfmt.codec import Codec
from packfmt.kernels import ternary
from packfmt.layout import Codes, Component, Layout, Values, cols, grid, rows

ZERO = 1
NEAR_ZERO = np.float32(1e-6)  # below the double 1e-6, so that "<" in double is "<=" in float32
SOURCE = "bitnet.cpp 16da220, src/ggml-bitnet-mad.cpp quantize_i2_s"


def _layout(name: str, unit: int, machine: str, also: tuple[tuple[str, str], ...] = ()) -> Layout:
    quarter = unit // 4
    doc = f"byte j of {quarter} holds codes j + 0, {quarter}, {2 * quarter}, {3 * quarter}, highest bits first"
    cell = (Codes("codes", 2, (cols(1, quarter),), (cols(quarter, 4, True),), levels=3, doc=doc),)
    return Layout(
        name,
        (
            Component("codes", (rows(), cols(unit)), cell),
            Component("scale", (), (Values("scale", "<f4"),), doc="one number; in GGUF behind the codes"),
        ),
        grid("affine", zero=ZERO),
        purpose=f"ternary weights, one float32 scale a tensor, as bitnet.cpp orders them on {machine}",
        sources=(SOURCE, "bitnet.cpp 16da220, utils/convert-hf-to-gguf-bitnet.py quantize_to_i2_s"),
        also=also,
    )


def ggml(weight: np.ndarray) -> dict[str, np.ndarray]:
    """bitnet.cpp's rule, meant for weights that are ternary already: the scale is the peak, a step the sign.

    Below 1e-6 in double precision a weight is zero.
    """
    scale = np.abs(weight).max(initial=np.float32(0))
    codes = (weight > NEAR_ZERO).astype(np.uint8) + (weight >= -NEAR_ZERO)
    return {"codes": codes, "scale": np.full((1, 1), scale, np.float32)}


ENCODERS = {"best": ternary.one_scale, "ggml": ggml}

CODECS = {
    layout.name: Codec(layout, ENCODERS)
    for layout in (_layout("i2_s", 128, "x86", also=(("gguf", "I2_S"),)), _layout("i2_s_arm", 64, "ARM"))
}
