"""tl1_<bm>_<bk>_<bmm>: pairs of ternary weights in the tiles that bitnet.cpp's ARM table kernels read.

    w[2 t], w[2 t + 1] = scale * (code[t] // 3 - 1), scale * (code[t] % 3 - 1)

The kernels are generated for a shape and three numbers, the tile's rows `bm` and columns `bk` and the rows `bmm`
of one vector step, and no file says which. So a file of type TL1 is only read by whom these numbers are told.

Bytes, rounding and worked example: spec/formats/tl1.md
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from packfmt.codec import Codec
from packfmt.errors import PlanError
from packfmt.kernels import ternary
from packfmt.layout import ROWS, Axis, Codes, Component, Digit, Layout, Values, grid, rows

PAIRS = Axis("pairs", "cols", 2)
pairs = partial(Digit, "pairs")
SOURCES = (
    "bitnet.cpp 16da220, utils/convert-hf-to-gguf-bitnet.py preprocess_weights_tl1",
    "bitnet.cpp 16da220, utils/codegen_tl1.py",
)


def _layout(name: str, bm: int, bk: int, bmm: int) -> Layout:
    step = 256 // bmm  # columns of one vector step
    over = (rows(bm), pairs(bk // 2), rows(bmm, bm // bmm), pairs(step // 2, bk // step), rows(16, bmm // 16))
    doc = "3 a + b of two neighbours' digits; of two pairs the first in the high half"
    codes = Codes("codes", 4, (), (pairs(1, 2, True),), levels=9, doc=doc)
    return Layout(
        name,
        (
            Component("codes", (*over, pairs(2, step // 4), rows(1, 16)), (codes,)),
            Component("scale", (), (Values("scale", "<f4"),), doc="one number"),
        ),
        grid("pairs"),
        (ROWS, PAIRS),
        purpose=f"pairs of ternary weights in tiles of {bm} rows and {bk} columns, one float32 scale a tensor",
        sources=SOURCES,
    )


def best(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The scale and steps of the least squared error, one scale for all (`ternary.one_scale`)."""
    parts = ternary.one_scale(weight)
    return {"codes": 3 * parts["codes"][:, ::2] + parts["codes"][:, 1::2], "scale": parts["scale"]}


@cache
def codec(name: str) -> Codec:
    """The format of the three numbers in its name.

    Raises
    ------
    PlanError
        If bitnet.cpp has no kernel of these numbers.
    """
    bm, bk, bmm = map(int, name.split("_")[1:])
    if bmm not in (32, 64):
        raise PlanError(f"{name}: {bmm} rows in a vector step, needs 32 or 64")
    for what, number, multiple in (("rows", bm, bmm), ("columns", bk, 256 // bmm)):
        if number % multiple:
            raise PlanError(f"{name}: {number} {what} in a tile, needs a multiple of {multiple}")
    return Codec(_layout(name, bm, bk, bmm), {"best": best})
