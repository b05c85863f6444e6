"""Four bits a weight in other number formats than float4_e2m1fn, or with other scales.

    nvint4      NVFP4's bytes (nvfp4_modelopt), whose codes are whole numbers of -7 to 7
    fp4_ue5m3   float4_e2m1fn, a scale of five bits of exponent for 16, and no scale for the whole tensor
    if4         NVFP4's bytes; the sign of a scale says whether its 16 codes are floats, or whole numbers times 6/7
    hif4        HiF4: 64 weights share a scale, eight of them a bit that doubles, four another

Bytes, rounding and worked examples: spec/formats/fp4.md
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from packfmt.codec import Codec
from packfmt.codecs.nvfp4 import SCALES, SECOND, above, parts_of
from packfmt.kernels import hif4, scaled
from packfmt.layout import Codes, Component, Layout, Values, cols, grid, rows

PAIRS = "byte j holds column 2 j low, column 2 j + 1 high"


def _pairs(name: str) -> Component:
    return Component(name, (rows(), cols(2)), (Codes("codes", 4, (), (cols(1, 2),), doc=PAIRS),))


NVINT4 = Layout(
    "nvint4",
    (_pairs("weight"), SCALES, SECOND),
    grid("scaled", element="int4", scale="", global_scale="times"),
    purpose="4-bit integers, a float8 scale for 16 and one for the tensor",
    sources=("INT v.s. FP, arXiv 2510.25602, section 3", "NVIDIA ModelOpt 0.47.0, qtensor/nvfp4_tensor.py (the bytes)"),
)
UE5M3 = Layout(
    "fp4_ue5m3",
    (
        _pairs("weight_packed"),
        Component("weight_scale", (rows(), cols(16)), (Values("scale", "u1", doc="ufloat8_e5m3"),)),
    ),
    grid("scaled", element="float4_e2m1fn", scale="ufloat8_e5m3", global_scale=""),
    purpose="4-bit floats, a scale of five exponent bits for 16",
    sources=("AMD, alto kernels: UE5M3 block scales of up to 114688",),
)
IF4 = Layout(
    "if4",
    (_pairs("weight"), SCALES, SECOND),
    grid("either", element="float4_e2m1fn", other="int4_6/7", global_scale="times"),
    purpose="4-bit floats or integers, as the sign of a float8 scale for 16 says",
    sources=("fouroversix dadfad6, src/fouroversix/quantize/reference.py",),
)
HIF4 = Layout(
    "hif4",
    (
        _pairs("value"),
        Component(
            "scale",
            (rows(), cols(64)),
            (
                Values("scale", "u1", doc="ufloat8_e6m2"),
                Codes("shift8", 1, (), (cols(8, 8, True),), doc="one bit for eight weights, the first highest"),
                Codes("shift4", 1, (cols(32, 2),), (cols(4, 8, True),), doc="one bit for four, the first highest"),
            ),
            dims=(1, 1, 1),
        ),
    ),
    grid("hif4", element="sm4_f2", scale="ufloat8_e6m2"),
    purpose="4-bit sign and magnitude, a scale for 64 that bits double for 8 and 4",
    sources=(
        "Huawei AMCT, amct_pytorch/quantization/dtypes/hifp_impl.py hif4_pack",
        "HiFloat4, global-computing-consortium",
    ),
)


# ---------------------------------------------------------------- encoders


def _shared(weight: np.ndarray, function: Any, rule: str, **choice: Any) -> dict[str, np.ndarray]:
    return parts_of(function(weight, rule, **choice))


def _codec(layout: Layout, function: Any, *rules: str) -> Codec:
    return Codec(layout, {r: partial(_shared, function=function, rule=r) for r in rules}, ("best",), shared=rules)


CODECS = {
    "nvint4": _codec(NVINT4, scaled.nvint4, "best", "rtn"),
    "fp4_ue5m3": Codec(
        UE5M3,
        {r: partial(scaled.fp4_ue5m3, rule=r) for r in ("best", "rtn")},
        ("best",),
        remark=above(6 * 114688),
    ),
    "if4": _codec(IF4, scaled.if4, "best", "fouroversix"),
    "hif4": Codec(
        HIF4,
        {r: partial(hif4.hif4, rule=r) for r in ("best", "amct")},
        ("best",),
        remark=above(7 * 49152),
    ),
}
