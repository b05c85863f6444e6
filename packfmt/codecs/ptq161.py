"""ptq161: 13 of 64 columns in 4 bits, the others as signs with a scale a row and a factor a column: 1.61 bits a weight.

    w[j] = (code[j] - salient_zero) * salient_scale        where mask[j] is 1
    w[j] = (mean + scale or mean - scale) * factor[j]      elsewhere

The columns in 4 bits, those with the largest activations, lie anywhere. Taken from the left they fill thirteen
places of every 64, and the others the 51 left: so all sizes are known, and 8 rows of 64 columns are 103 bytes.

Bytes, rounding and worked example: spec/formats/ptq161.md
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from packfmt.codec import Codec
from packfmt.errors import LayoutError
from packfmt.layout import COLS, Axis, Codes, Component, Digit, Layout, Values, cols, grid, rows

BLOCK, FEW = 64, 13
MANY = BLOCK - FEW
HIGHEST = 15  # code of 4 bits
ROUNDS = 4  # of choosing signs and fitting rows, then columns
STRIP = 64  # rows at a time

F32, F64 = np.float32, np.float64
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

few, many = partial(Digit, "few"), partial(Digit, "many")
CODES = "13 places, each 4 bytes of 8 rows, the first of two rows in the low half"
SIGNS = "51 places, each a byte of 8 rows, lowest bit first; 1 is plus"
TILE = (
    Codes("codes", 4, (few(1, FEW), rows(2, 4)), (rows(1, 2),), doc=CODES),
    Codes("signs", 1, (many(1, MANY),), (rows(1, 8),), doc=SIGNS),
)

LAYOUT = Layout(
    "ptq161",
    (
        Component("mask", (cols(8),), (Codes("mask", 1, (), (cols(1, 8),), doc="1: the column is in 4 bits"),)),
        Component("tiles", (rows(8), cols(BLOCK)), TILE),
        Component("factor", (cols(BLOCK), many(1, MANY)), (Values("factor", "<f2"),), (2,), doc="of columns of signs"),
        Component("scale", (rows(),), (Values("scale", "<f2"),), doc="half the distance of a row's two levels"),
        Component("mean", (rows(),), (Values("mean", "<f2"),), doc="what lies between them"),
        Component("salient_scale", (rows(),), (Values("salient_scale", "<f2"),), doc="step of a row's codes"),
        Component("salient_zero", (rows(),), (Values("salient_zero", "u1"),), doc="code that is zero"),
    ),
    grid("ptq161"),
    (Axis("rows", "rows", pad=8), COLS, Axis("few", size=FEW), Axis("many", size=MANY)),
    purpose="a fifth of the columns in 4 bits, the others as signs with row scales and column factors",
    sources=("PTQ1.61, arXiv 2502.13179", "PTQ1.61 4561118, quantize/blockptq.py, models/int_llama_layer.py"),
)


def activations(weight: Floats, importance: Floats | None = None) -> dict[str, np.ndarray]:
    """The most important 13 of 64 columns in 4 bits, the others as signs.

    importance : (1 or rows, cols), the columns' activation scales; its sum over rows counts. Without it the columns'
        own squares do. Of equals the left column is taken.

    The paper takes the columns from the place int(0.2 * cols) of the sorted importance up, which is as many or up
    to cols / 320 fewer, but for ties. It learns row and column factors by gradient descent on a block's output, where
    here they are fitted to the weights (`_fit`).

    Raises
    ------
    LayoutError
        If a scale or factor overflows float16.

    Source: PTQ1.61 4561118, quantize/blockptq.py line 197; models/int_llama_layer.py
    """
    n_rows, n_cols = weight.shape
    if importance is None:
        costs = sum((np.square(weight[some], dtype=F64).sum(0) for some in _strips(n_rows)), np.zeros(n_cols))
    else:
        costs = importance.sum(0, dtype=F64)
    mask = np.zeros(n_cols, bool)
    mask[np.argsort(-costs, kind="stable")[: n_cols // BLOCK * FEW]] = True
    chunks = n_cols // BLOCK
    codes, salient = _quantize(weight[:, mask])
    signs, fitted = _fit(weight[:, ~mask])
    halves = {"factor": fitted.pop("factor").reshape(1, chunks, 1, MANY)}
    halves |= {name: number.reshape(n_rows, 1, 1, 1) for name, number in fitted.items()}
    return halves | {
        "mask": mask.astype(np.uint8).reshape(1, n_cols, 1, 1),
        "codes": codes.reshape(n_rows, chunks, FEW, 1),
        "signs": signs.reshape(n_rows, chunks, 1, MANY),
        "salient_scale": salient[0].reshape(n_rows, 1, 1, 1),
        "salient_zero": salient[1].reshape(n_rows, 1, 1, 1),
    }


def _quantize(weight: Floats) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Codes of 4 bits, and every row's scale and zero: its range, made to hold zero, in 15 steps.

    The scale is float32(range) / 15, rounded to float16; with that scale the zero is round(-low / scale), a code
    round(w / scale) + zero, both cut to 0 .. 15, ties to even. Where the scale is 0, so are they.
    """
    low = weight.min(1, initial=0)[:, None]
    high = weight.max(1, initial=0)[:, None]
    with np.errstate(all="ignore"):
        scale = _half((high - low) / F32(HIGHEST))
        step = scale.astype(F32)
        zero = np.where(step > 0, np.rint(-low / step), F32(0)).clip(0, HIGHEST)
        codes = np.where(step > 0, np.rint(weight / step) + zero, zero).clip(0, HIGHEST)
    return codes.astype(np.uint8), (scale, zero.astype(np.uint8))


def _fit(weight: Floats) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Signs, and the two levels of every row and the factor of every column, to least squared error.

    They start from the paper's: levels mean +- mean |w - mean|, and factors of 1. A round takes the nearer level for
    every weight, the upper of equals, then the best levels for signs and factors, then the best factors. After the
    last round all is rounded to float16, and signs are chosen again. All this is float64 but the last choice, which is
    float32; sums over rows are added `STRIP` rows at a time.
    """
    n_rows, n_cols = weight.shape
    upper, lower = np.zeros((n_rows, 1)), np.zeros((n_rows, 1))
    factor = np.ones(n_cols)
    for some in _strips(n_rows):
        exact = weight[some].astype(F64)
        mean = exact.sum(1, keepdims=True) / max(1, n_cols)
        scale = np.abs(exact - mean).sum(1, keepdims=True) / max(1, n_cols)
        upper[some], lower[some] = mean + scale, mean - scale
    for _ in range(ROUNDS):
        dot, squares = np.zeros(n_cols), np.zeros(n_cols)
        for some in _strips(n_rows):
            exact = weight[some].astype(F64)
            plus = _nearer(exact, upper[some], lower[some], factor)
            for level, side in ((upper, plus), (lower, ~plus)):
                used = np.where(side, factor, 0)
                _divide((exact * used).sum(1, keepdims=True), (used * used).sum(1, keepdims=True), level[some])
            level = np.where(plus, upper[some], lower[some])
            dot += (exact * level).sum(0)
            squares += (level * level).sum(0)
        _divide(dot, squares, factor)
    fitted = {"scale": _half((upper - lower) / 2), "mean": _half((upper + lower) / 2), "factor": _half(factor)}
    centre, half, by = (fitted[name].astype(F32) for name in ("mean", "scale", "factor"))
    signs = np.empty(weight.shape, np.uint8)
    for some in _strips(n_rows):
        signs[some] = _nearer(weight[some], centre[some] + half[some], centre[some] - half[some], by)
    return signs, fitted


def _strips(n_rows: int) -> list[slice]:
    return [slice(at, at + STRIP) for at in range(0, n_rows, STRIP)]


def _nearer(weight: np.ndarray, upper: np.ndarray, lower: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Where upper * factor is as near as lower * factor, or nearer."""
    near: np.ndarray = np.abs(weight - upper * factor) <= np.abs(weight - lower * factor)
    return near


def _divide(dot: Doubles, squares: Doubles, out: Doubles) -> None:
    """The number that times some others comes nearest to the weights; stays what it is where those are all zero."""
    np.divide(dot, squares, out=out, where=squares > 0)


def _half(number: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = number.astype(np.float16)
    if lost := int(np.count_nonzero(~np.isfinite(half))):
        raise LayoutError(f"ptq161: {lost} of {half.size} scales and factors overflow float16; use bf16 or mxfp4")
    return half


CODEC = Codec(LAYOUT, {"activations": activations}, ("activations",))
