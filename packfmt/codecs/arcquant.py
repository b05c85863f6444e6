"""arcquant_<S>: NVFP4 whose last S channels are stored twice, for activations that need two codes each.

Columns are sorted so that those with the largest activations come last. Of these last S every group of 16 is
followed by a copy of itself: a product with activations puts their rounded numbers into the first place and what
rounding left of them into the second. The weight itself is the first copies, in their old order.

Bytes and worked example: spec/formats/arcquant.md
"""

from __future__ import annotations

from functools import partial

import numpy as np

from packfmt.codec import Codec
from packfmt.codecs.nvfp4 import ELEMENT, parts_of
from packfmt.errors import LayoutError, PlanError
from packfmt.grids import first_copies
from packfmt.kernels import fp4
from packfmt.layout import COLS, ROWS, Axis, Codes, Component, Digit, Layout, Values, cols, grid, rows

GROUP = 16
SOURCE = "ARCQuant 347a6c8, kernels/src/reorder.cu, model/qLinearLayer.py"
stored = partial(Digit, "stored")


def codec(name: str) -> Codec:
    """The codec of a name such as arcquant_64.

    Raises
    ------
    PlanError
        If the number is none of whole groups.
    """
    residual = int(name.removeprefix("arcquant_"))
    if residual % 64:
        raise PlanError(f"{name}: {residual} channels twice, needs a multiple of 64")
    doc = "byte j holds stored column 2 j low, 2 j + 1 high"
    layout = Layout(
        name,
        (
            Component("weight", (rows(), stored(2)), (Codes("codes", 4, (), (stored(1, 2),), doc=doc),)),
            Component("weight_scale", (rows(), stored(GROUP)), (Values("scale", "float8_e4m3fn"),)),
            Component("weight_scale_2", (), (Values("global_scale", "<f4"),), doc="one number, which multiplies"),
            Component(
                "reorder_index", (cols(),), (Values("perm", "<u4"),), doc="the column of the weight, outliers last"
            ),
        ),
        grid("augmented", element=ELEMENT, scale="", global_scale="times", residual=residual, group=GROUP),
        (ROWS, Axis("stored", "cols", plus=residual), COLS),
        purpose=f"NVFP4, {residual} channels stored twice",
        sources=(SOURCE,),
    )
    rules = ("best", "modelopt")
    encoders = {r: partial(_encode, rule=r, residual=residual, name=name) for r in rules}
    return Codec(layout, encoders, ("best",), least_cols=residual)


def _encode(
    weight: np.ndarray, rule: str, residual: int, name: str, importance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Columns in ascending order of importance, or else of their largest weight; ties as they stand."""
    total = weight.shape[1]
    if total < residual or total % GROUP:
        raise LayoutError(f"{name}: {total} columns, needs {residual} or more and a multiple of {GROUP}")
    measure = np.abs(weight).max(0, initial=0) if importance is None else importance.sum(0, dtype=np.float64)
    perm = np.argsort(measure, kind="stable").astype(np.uint32)
    costs = None if importance is None else np.ascontiguousarray(importance[:, perm])
    found = parts_of(fp4.nvfp4(np.ascontiguousarray(weight[:, perm]), rule, importance=costs))
    place = np.full(total + residual, -1)
    place[first_copies(total + residual, residual, GROUP)] = np.arange(total)
    place[place < 0] = place[np.flatnonzero(place < 0) - GROUP]
    return {
        "codes": found["codes"][:, place][..., None],
        "scale": found["scale"][:, place[::GROUP] // GROUP][..., None],
        "global_scale": found["global_scale"][..., None],
        "perm": perm[None, None],
    }
