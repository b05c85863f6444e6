"""mote_<experts>: the ternary weights of a stack of experts, one float32 scale for each of them.

    w[j] = scale[expert] * (code[j] - 1)

A tensor of (experts, rows, cols) flattens into rows, so the rows of one expert are neighbours, and any matrix
whose rows are a multiple of the experts is such a stack.

128 columns are 32 bytes: one load of 256 bits, of which four shifts are four runs of 32 neighbouring columns, as
in half a tq2_0 block. But no scale stands between them, and experts of 384, 896 or 1408 columns fit.

Bytes, rounding and worked example: spec/formats/mote.md
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from packfmt.codec import Codec
from packfmt.kernels import ternary
from packfmt.layout import TOP, Codes, Component, Layout, Values, cols, grid, rows

ZERO = 1
BLOCK = 128
CODES = Component(
    "codes",
    (rows(), cols(BLOCK)),
    (
        Codes(
            "codes",
            2,
            (cols(1, 32),),
            (cols(32, 4),),
            levels=3,
            doc="byte j of 32 holds codes j + 0, 32, 64, 96, lowest bits first",
        ),
    ),
)


def _layout(name: str, experts: int) -> Layout:
    return Layout(
        name,
        (CODES, Component("scale", (rows(TOP, experts),), (Values("scale", "<f4", doc="one an expert"),))),
        grid("affine", zero=ZERO),
        purpose=f"ternary weights of a stack of {experts} experts, a float32 scale for each",
        sources=("MoTE, arXiv 2506.14435, section 3",),
    )


def best(weight: np.ndarray, experts: int) -> dict[str, np.ndarray]:
    """The scale and steps of the least squared error of every expert (`ternary.ternary`)."""
    each = weight.reshape(experts, -1)
    if not each.size:
        return _parts(weight, np.zeros((experts, 1), np.float32), np.zeros(weight.shape, np.uint8))
    parts = ternary.ternary(each, each.shape[1], "row", "<f4")
    return _parts(weight, parts["scale"], parts["codes"])


def absmean(weight: np.ndarray, experts: int) -> dict[str, np.ndarray]:
    """MoTE's rule, which is BitNet b1.58's, for every expert: the scale is its mean magnitude (`ternary.absmean`)."""
    found = [ternary.absmean(one) for one in weight.reshape(experts, len(weight) // experts, weight.shape[1])]
    return _parts(weight, *(np.concatenate([parts[name] for parts in found]) for name in ("scale", "codes")))


def _parts(weight: np.ndarray, scale: np.ndarray, codes: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": codes.reshape(weight.shape), "scale": scale}


@cache
def codec(name: str) -> Codec:
    """The format of as many experts as its name says."""
    experts = int(name.removeprefix("mote_"))
    encoders = {"best": partial(best, experts=experts), "absmean": partial(absmean, experts=experts)}
    return Codec(_layout(name, experts), encoders)
