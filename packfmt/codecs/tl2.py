"""tl2_<rows>_<cols>_<bm>_<bk>: triples of ternary weights, as bitnet.cpp's x86 table kernels read them.

    w = scale * step

Three neighbours are a magnitude of 4 bits and a sign, 5/3 bits a weight; columns left over go in pairs. How many
those are, and where everything lies, depends on the shape and on a tile's rows `bm` and columns `bk`, and no file
says those. So a layout is for one shape, and a file of type TL2 is only read by whom these numbers are told. A
larger weight, of a multiple of the rows or columns, is several such matrices, each with its scale.

Bytes, rounding and worked example: spec/formats/tl2.md
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np

from packfmt.codec import Codec
from packfmt.errors import LayoutError, PlanError
from packfmt.kernels import ternary, tl2
from packfmt.layout import COLS, Axis, Component, Digit, Layout, Values, cols, grid

matrices = partial(Digit, "matrices")

SOURCES = (
    "bitnet.cpp 16da220, utils/convert-hf-to-gguf-bitnet.py preprocess_weights_tl2",
    "bitnet.cpp 16da220, utils/codegen_tl2.py",
)


def _layout(name: str, m: int, k: int, bm: int, bk: int) -> Layout:
    nbytes = sum(tl2.areas(m, k, bm, bk)[1:])
    doc = "magnitudes of triples, their signs, pairs, zeros"
    return Layout(
        name,
        (
            Component("codes", (matrices(), cols(k), Digit("byte", 1, nbytes)), (Values("codes", "u1", doc=doc),)),
            Component("scale", (matrices(), cols(k)), (Values("scale", "<f4", doc="one a matrix"),)),
        ),
        grid("tl2", rows=m, cols=k, bm=bm, bk=bk),
        (Axis("matrices", "rows", m), COLS, Axis("byte", size=nbytes)),
        purpose=f"triples of ternary weights of a {m} x {k} matrix in tiles of {bm} rows and {bk} columns",
        sources=SOURCES,
    )


def best(weight: np.ndarray, m: int, k: int, bm: int, bk: int) -> dict[str, np.ndarray]:
    """The scale and steps of the least squared error (`ternary.ternary`) of every matrix."""
    down, along = weight.shape[0] // m, weight.shape[1] // k
    each = np.ascontiguousarray(weight.reshape(down, m, along, k).swapaxes(1, 2)).reshape(down * along, m * k)
    parts = ternary.ternary(each, m * k, "row", "<f4")
    steps = parts["codes"].astype(np.int8).reshape(down * along, m, k) - np.int8(1)
    codes = np.empty((len(each), sum(tl2.areas(m, k, bm, bk)[1:])), np.uint8)
    for i, one in enumerate(steps):
        codes[i] = tl2.write(one, bm, bk)
    return {"codes": codes.reshape(down, along, codes.shape[1]), "scale": parts["scale"].reshape(down, along, 1)}


@cache
def codec(name: str) -> Codec:
    """The format of the four numbers in its name.

    Raises
    ------
    PlanError
        If bitnet.cpp has no kernel of these numbers.
    """
    numbers = tuple(map(int, name.split("_")[1:]))
    try:
        layout = _layout(name, *numbers)
    except LayoutError as error:
        raise PlanError(f"{name}: {str(error).removeprefix('tl2: ')}") from None
    m, k, bm, bk = numbers
    return Codec(layout, {"best": partial(best, m=m, k=k, bm=bm, bk=bk)})
