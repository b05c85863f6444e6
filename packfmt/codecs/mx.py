"""OCP microscaling in bytes that safetensors checkpoints have: 32 weights of a row share a power of two.

    w[j] = number(code[j]) * 2**(scale - 127)

The codes are floats of 4, 6 or 8 bits, or whole numbers with six bits of fraction. Scales are float8_e8m0fnu,
stored as uint8; 255 is NaN, and with it the whole block.

Bytes, rounding and worked examples: spec/formats/mx.md
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from packfmt import minifloat
from packfmt.codec import Codec
from packfmt.kernels import fp4, scaled
from packfmt.layout import Codes, Component, Layout, Values, cols, grid, rows

BLOCK = 32
OCP = "OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3"
CT = "compressed-tensors 0.20.0, compressors"
PACKED_DOC = "byte j holds column 2 j low, column 2 j + 1 high"


def _layout(name: str, codes: Component, element: str, purpose: str, sources: tuple[str, ...], **rest: Any) -> Layout:
    where = (rows(), cols(BLOCK))
    if rest.pop("e8m0", False):
        scale = Component("scale", where, (Values("scale", "float8_e8m0fnu"),))
        numbers = grid("scaled", element=element, scale="", global_scale="")
    else:
        scale = Component("weight_scale", where, (Values("scale", "u1", doc="exponent, 127 is one"),))
        numbers = grid("scaled", element=element, scale="float8_e8m0fnu", global_scale="")
    return Layout(name, (codes, scale), numbers, purpose=purpose, sources=(OCP, *sources), **rest)


def pairs(name: str) -> Component:
    """4-bit codes of neighbouring columns in a byte, the first in its low half."""
    return Component(name, (rows(), cols(2)), (Codes("codes", 4, (), (cols(1, 2),), doc=PACKED_DOC),))


def _sixes() -> Component:
    doc = "four codes in three bytes, one after the other, lowest bit first"
    return Component("weight_packed", (rows(), cols(4)), (Codes("codes", 6, (), (cols(1, 4),), doc=doc),))


def _bytes(dtype: str) -> Component:
    return Component("weight", (rows(), cols()), (Values("codes", dtype),))


PAIRS = _layout(
    "mxfp4_pairs", pairs("weight_packed"), "float4_e2m1fn", "4-bit floats in pairs, a power of two for 32",
    (f"{CT}/mxfp4", "gpt-oss 7b58334, torch/weights.py", "NVIDIA ModelOpt 0.47.0, qtensor/mxfp4_tensor.py"),
    also=(
        ("compressed_tensors", "mxfp4-pack-quantized"),
        ("modelopt", "MXFP4"),
        ("gpt_oss", "mxfp4"),
        ("quark", "fp4"),
    ),
)  # fmt: skip
E8M0 = _layout(
    "mxfp4_e8m0", pairs("weight"), "float4_e2m1fn", "4-bit floats in pairs, a float8_e8m0fnu for 32",
    ("NVIDIA ModelOpt a2fbac7, examples/deepseek/deepseek_v4",), e8m0=True, also=(("deepseek", "mxfp4"),),
)  # fmt: skip
E2M3 = _layout(
    "mxfp6_e2m3", _sixes(), "float6_e2m3fn", "6-bit floats, three bits of mantissa, a power of two for 32",
    (f"{CT}/mxfp6",), also=(("compressed_tensors", "mxfp6-pack-quantized"),),
)  # fmt: skip
E3M2 = _layout("mxfp6_e3m2", _sixes(), "float6_e3m2fn", "6-bit floats, two bits of mantissa, a power of two for 32", ())
E4M3 = _layout(
    "mxfp8_e4m3", _bytes("float8_e4m3fn"), "float8_e4m3fn",
    "8-bit floats, three bits of mantissa, a power of two for 32",
    (f"{CT}/mxfp8", "NVIDIA ModelOpt 0.47.0, qtensor/mxfp8_tensor.py"),
    also=(("compressed_tensors", "mxfp8-quantized"), ("modelopt", "MXFP8")),
)  # fmt: skip
E5M2 = _layout(
    "mxfp8_e5m2", _bytes("float8_e5m2"), "float8_e5m2", "8-bit floats, two bits of mantissa, a power of two for 32", ()
)
INT8 = _layout("mxint8", _bytes("i1"), "int8_f6", "8-bit integers of 64ths, a power of two for 32", ())

# ---------------------------------------------------------------- encoders

Parts = dict[str, np.ndarray]


def _as(parts: Parts, **dtypes: str) -> Parts:
    """Parts whose bytes are numbers of other dtypes."""
    import ml_dtypes

    return parts | {part: parts[part].view(getattr(ml_dtypes, name, name)) for part, name in dtypes.items()}


def _four(weight: np.ndarray, rule: str, dtypes: dict[str, str], **choice: Any) -> Parts:
    return _as(fp4.mxfp4(weight, rule, **choice), **dtypes)


def _wide(weight: np.ndarray, element: str, rule: str, dtype: str, **choice: Any) -> Parts:
    parts = scaled.mx(weight, minifloat.numbers(element), rule, **choice)
    return _as(parts, codes=dtype) if dtype else parts


def _codec(layout: Layout, rules: tuple[str, ...], dtype: str = "") -> Codec:
    element = layout.grid["element"]
    return Codec(layout, {r: partial(_wide, element=element, rule=r, dtype=dtype) for r in rules}, ("best",))


def _four_codec(layout: Layout, **dtypes: str) -> Codec:
    rules = ("best", "ocp", "compressed-tensors", "modelopt", "torchao")
    return Codec(layout, {r: partial(_four, rule=r, dtypes=dtypes) for r in rules}, ("best",))


CODECS = {
    "mxfp4_pairs": _four_codec(PAIRS),
    "mxfp4_e8m0": _four_codec(E8M0, scale="float8_e8m0fnu"),
    "mxfp6_e2m3": _codec(E2M3, ("best", "ocp", "compressed-tensors")),
    "mxfp6_e3m2": _codec(E3M2, ("best", "ocp")),
    "mxfp8_e4m3": _codec(E4M3, ("best", "ocp", "compressed-tensors", "modelopt"), "float8_e4m3fn"),
    "mxfp8_e5m2": _codec(E5M2, ("best", "ocp"), "float8_e5m2"),
    "mxint8": _codec(INT8, ("best", "ocp"), "int8"),
}
