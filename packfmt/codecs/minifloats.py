"""Floats of 3 to 8 bits with any number of exponent bits and any bias, and a float32 scale.

    e<E>m<M>_tensor, e<E>m<M>_row, e<E>m<M>_g<n>        a scale for the tensor, each row, or n columns of a row
    e<E>m<M>b<bias>_...                                 where the bias is not 2**(E - 1) - 1

    w[r, c] = number(code[r, c]) * scale

Every code is a number: there are no infinities and no NaN. Codes lie one after the other, lowest bit first.

Bytes, rounding and worked example: spec/formats/minifloats.md
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np

from packfmt import minifloat
from packfmt.codec import Codec
from packfmt.errors import PlanError
from packfmt.kernels import tiles
from packfmt.layout import Codes, Component, Layout, Values, cols, grid, rows

NAME = re.compile(r"e(\d)m(\d)(?:b(\d+))?_(?:(tensor)|(row)|g(\d+))")
SHARED = {"tensor": "for the tensor", "row": "for each row"}


def codec(name: str) -> Codec:
    """The codec of a name such as e2m1_g32.

    Raises
    ------
    PlanError
        If the numbers in the name make no format, or have a shorter name.
    """
    found = NAME.fullmatch(name)
    if not found:
        raise PlanError(f"no format is called {name!r}; they are called e<E>m<M>_tensor, _row or _g<n>")
    exponent, mantissa = int(found[1]), int(found[2])
    bits, usual = 1 + exponent + mantissa, 2 ** (exponent - 1) - 1
    bias = int(found[3]) if found[3] else usual
    if not 3 <= bits <= 8 or bias > minifloat.MOST_BIAS:
        raise PlanError(
            f"{name}: {bits} bits and a bias of {bias}, needs 3 to 8 bits and at most {minifloat.MOST_BIAS}"
        )
    if found[3] and bias == usual:
        raise PlanError(f"{name}: is called {name.replace(f'b{found[3]}', '')}, as its bias is the usual one")
    if found[6] and int(found[6]) % 8:
        raise PlanError(f"{name}: groups of {found[6]}, needs a multiple of 8 columns")
    element, kind = f"float{bits}_e{exponent}m{mantissa}b{bias}", found[4] or found[5] or "group"
    group = int(found[6] or 0)
    over = {"tensor": (), "row": (rows(),), "group": (rows(), cols(group))}[kind]
    layout = Layout(
        name,
        (
            Component("weight_packed", (rows(), cols(8)), (Codes("codes", bits, (), (cols(1, 8),)),)),
            Component("weight_scale", over, (Values("scale", "<f4"),), doc="multiplies"),
        ),
        grid("scaled", element=element, scale="", global_scale=""),
        purpose=f"{bits}-bit floats, {exponent} bits of exponent, a float32 scale {SHARED.get(kind, f'for {group}')}",
        sources=("LLM-FP4, arXiv 2310.16836 (exponent bias as a parameter)",),
    )
    share = {"tensor": (0, 0), "row": (1, 0), "group": (1, group)}[kind]
    choice: dict[str, Any] = {"numbers": minifloat.numbers(element), "share": share}
    return Codec(layout, {rule: partial(_encode, rule=rule, **choice) for rule in ("best", "amax")}, ("best",))


def _encode(weight: np.ndarray, **choice: Any) -> dict[str, np.ndarray]:
    return tiles.minifloat(weight, **choice)
