"""bitnet: ternary weights as Hugging Face packs them: four rows in a byte, one bfloat16 scale for the tensor.

    bitnet          w[j] = (code[j] - 1) * scale     AutoBitLinear multiplies
    bitnet_divide   w[j] = (code[j] - 1) / scale     BitLinear divides

Byte (r, c) holds rows r, r + R, r + 2 R and r + 3 R, lowest bits first, where R is a quarter of the
rows, rounded up; rows that are not there hold 0. The model's config.json says which of the two it means.

Bytes, rounding and worked example: spec/formats/bitnet.md
"""

from __future__ import annotations

import numpy as np

from packfmt.codec import Codec
from packfmt.errors import LayoutError
from packfmt.kernels import ternary
from packfmt.layout import COLS, TOP, Axis, Codes, Component, Layout, Values, cols, dtype_of, grid, rows

F32 = np.float32
BF16 = dtype_of("bfloat16")
ZERO = 1
CODES = Codes("codes", 2, (), (rows(TOP, 4),), levels=3, doc="byte (r, c): rows r + 0, R, 2 R, 3 R, lowest bits first")
COMPONENTS = (
    Component("weight", (rows(1), cols()), (CODES,)),
    Component("weight_scale", (), (Values("scale", "bfloat16"),), doc="one number"),
)


def _layout(name: str, function: str, linear_class: str, doc: str) -> Layout:
    return Layout(
        name,
        COMPONENTS,
        grid(function, zero=ZERO),
        (Axis("rows", "rows", pad=4), COLS),
        purpose=f"ternary weights, one bfloat16 scale a tensor, which {doc}",
        sources=("transformers 5.23.0, integrations/bitnet.py pack_weights, BitLinear, AutoBitLinear",),
        also=(("bitnet", linear_class),),
    )


def best(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The scale of the least squared error, rounded to bfloat16; steps are the nearest, ties to zero."""
    return _steps(weight, _bf16("bitnet", _least_error(weight)))


def best_divide(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The same for a scale that divides; 1 if all weights are zero."""
    return _steps(weight, _inverse(_least_error(weight)), divide=True)


def absmean(weight: np.ndarray) -> dict[str, np.ndarray]:
    """BitNet b1.58's rule (`ternary.absmean`); only then is the scale rounded to bfloat16."""
    parts = ternary.absmean(weight)
    return {"codes": parts["codes"], "scale": _bf16("bitnet", parts["scale"])}


def absmean_divide(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The same for a scale that divides: 1 over the mean magnitude, in float32, then bfloat16."""
    parts = ternary.absmean(weight)
    return {"codes": parts["codes"], "scale": _inverse(parts["scale"])}


def _least_error(weight: np.ndarray) -> np.ndarray:
    return ternary.one_scale(weight)["scale"]


def _steps(weight: np.ndarray, scale: np.ndarray, divide: bool = False) -> dict[str, np.ndarray]:
    number = F32(scale[0, 0])
    half = F32(0.5) / number if divide else F32(0.5) * number
    codes = (weight > half).astype(np.uint8) + (weight >= -half)
    return {"codes": codes, "scale": scale}


def _inverse(step: np.ndarray) -> np.ndarray:
    """The scale that divides. A step so large that its inverse divides to infinity is refused."""
    with np.errstate(divide="ignore", over="ignore"):
        scale = _bf16("bitnet_divide", np.where(step > 0, F32(1) / step, F32(1)))
        if not np.isfinite(F32(1) / scale.astype(F32)).all():
            raise LayoutError(f"bitnet_divide: a step of {step[0, 0]:g}, whose inverse bfloat16 has not; use bf16")
    return scale


def _bf16(name: str, scale: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = scale.astype(BF16)
    if not np.isfinite(rounded).all():
        raise LayoutError(f"{name}: the scale {scale[0, 0]:g} overflows bfloat16; use i2_s or tq2_0")
    return rounded


CODECS = {
    "bitnet": Codec(_layout("bitnet", "affine", "autobitlinear", "multiplies"), {"best": best, "absmean": absmean}),
    "bitnet_divide": Codec(
        _layout("bitnet_divide", "quotient", "bitlinear", "divides"), {"best": best_divide, "absmean": absmean_divide}
    ),
}
