"""A few columns kept in bfloat16 beside a 4-bit weight: <base>_out<n>, as mxfp4_out8.

The base's bytes hold the weight with zeros in these columns, so no large weight spoils its neighbours' scale.

Bytes and worked example: spec/formats/outlier_channels.md
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from packfmt import codecs
from packfmt.codec import Codec, Encoder
from packfmt.errors import LayoutError
from packfmt.kernels import quantize
from packfmt.layout import Axis, Component, Digit, Values, dtype_of, rows

SOURCE = "MicroScopiQ, arXiv 2411.05282 (outliers apart from microscaled weights)"


def codec(name: str) -> Codec:
    """The codec of a name such as mxfp4_out8."""
    of, _, number = name.rpartition("_out")
    base, count = codecs.get(of), int(number)
    each = Digit("outlier")
    layout = replace(
        base.layout,
        name=name,
        components=(
            *base.layout.components,
            Component("outlier_columns", (each,), (Values("columns", "<u4"),), doc="ascending"),
            Component("outlier_values", (rows(), each), (Values("column_values", "bfloat16"),)),
        ),
        axes=(*base.layout.axes, Axis("outlier", size=count)),
        purpose=f"{base.layout.purpose}; {count} columns in bfloat16",
        sources=(*base.layout.sources, SOURCE),
        also=(),
    )
    encoders = {rule: partial(_apart, encoder=e, count=count, name=name) for rule, e in base.encoders.items()}
    return Codec(layout, encoders, base.weighted, shared=base.shared, least_cols=count, together=base.together)


def _apart(
    weight: np.ndarray,
    encoder: Encoder,
    count: int,
    name: str,
    importance: np.ndarray | None = None,
    peak: np.float32 | None = None,
) -> dict[str, np.ndarray]:
    """The columns of the largest (weighted) sum of squares, and the parts of what remains.

    peak : the largest magnitude of all weights that share the tensor's scale, those in such columns too
    """
    if weight.shape[1] < count:
        raise LayoutError(f"{name}: {weight.shape[1]} columns, needs {count} or more")
    squares = np.square(weight, dtype=np.float64) * (1 if importance is None else importance)
    chosen = np.sort(np.argsort(-squares.sum(0), kind="stable")[:count]).astype(np.uint32)
    values = quantize.cast(np.ascontiguousarray(weight[:, chosen]), name, dtype_of("bfloat16"), "fewer columns")
    rest = weight.copy()
    rest[:, chosen] = 0
    extra = {k: v for k, v in (("importance", importance), ("peak", peak)) if v is not None}
    parts = {part: array[..., None] for part, array in encoder(rest, **extra).items()}
    return parts | {"columns": chosen[None, None], "column_values": values["values"][:, None]}
