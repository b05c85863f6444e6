"""A codebook for each row: cb<bits>, as cb4. Codes name entries, and entries lie where the row's weights do.

    cb<bits>            2 to 8 bits, entries in float16
    ..._f32, ..._bf16   entries of this dtype

    w[r, c] = codebook[r, code[r, c]]

Codes lie one after the other, lowest bit first, eight of them in as many bytes as a code has bits.

Bytes, rounding and worked example: spec/formats/codebook.md
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Final

import numpy as np

from packfmt.codec import Codec
from packfmt.errors import PlanError
from packfmt.kernels import codebooks, quantize
from packfmt.layout import COLS, ROWS, Axis, Codes, Component, Digit, Layout, Values, cols, dtype_of, grid, rows

NAME: Final = re.compile(r"cb([2-8])(_f32|_bf16)?")
DTYPES: Final = {None: "<f2", "_f32": "<f4", "_bf16": "bfloat16"}
CHOOSE: Final = {"best": codebooks.best, "exact": codebooks.exact}


def codec(name: str) -> Codec:
    """The codec of a name such as cb4.

    Raises
    ------
    PlanError
        If there is no such format.
    """
    found = NAME.fullmatch(name)
    if not found:
        raise PlanError(f"no format is called {name!r}; they are called cb2 to cb8, and cb2_f32 or cb2_bf16")
    bits, dtype = int(found[1]), DTYPES[found[2]]
    layout = Layout(
        name,
        (
            Component("codes", (rows(), cols(8)), (Codes("codes", bits, (), (cols(1, 8),)),)),
            Component(
                "codebook", (rows(), Digit("level")), (Values("codebook", dtype),), (1, 1), doc="a row's entries"
            ),
        ),
        grid("codebook"),
        (ROWS, COLS, Axis("level", size=1 << bits)),
        purpose=f"{bits}-bit codes, a codebook of {dtype_of(dtype).name} for each row",
        sources=("SqueezeLLM, arXiv 2306.07629, section 4.1",),
    )
    encoders = {rule: partial(encode, rule=rule, layout=layout) for rule in CHOOSE}
    return Codec(layout, encoders, tuple(CHOOSE))


def encode(
    weight: np.ndarray, *, rule: str, layout: Layout, importance: np.ndarray | None = None, **_: Any
) -> dict[str, np.ndarray]:
    """Entries of least squared error, rounded to their dtype, and for each weight the nearest; of two the lower."""
    shape = layout.fit(*weight.shape).parts["codebook"]
    tables, _codes = CHOOSE[rule](weight, shape.shape[2], importance)
    stored = quantize.cast(tables, layout.name, dtype_of(shape.dtype), "cb4_bf16 or cb4_f32")["values"]
    codes = codebooks.assign(weight, stored.astype(np.float32))
    return {"codes": codes[..., None], "codebook": stored.reshape(shape.shape)}
