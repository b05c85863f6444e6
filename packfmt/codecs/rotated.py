"""Weights that are rotated before they are rounded: <base>_h<size>, as nvfp4_h16 or mxfp4_pairs_h128.

What the base's bytes hold is the weight times the normalised Hadamard matrix, for every `size` neighbouring
columns. It spreads single large weights over their neighbours. Decoding rotates back.

Numbers and worked example: spec/formats/rotated.md
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from packfmt import codecs
from packfmt.codec import Codec, Encoder
from packfmt.errors import LayoutError
from packfmt.kernels import hadamard

SOURCE = "FP-Quant d2e3092 (MR-GPTQ), block Hadamard rotation of weights and activations"
ABOVE = 1 + 2.0**-16  # of bounds: log2(size) sums and a product, each rounded to 2**-24


def codec(name: str) -> Codec:
    """The codec of a name such as nvfp4_h16."""
    of, _, number = name.rpartition("_h")
    base, size = codecs.get(of), int(number)
    layout = replace(
        base.layout,
        name=name,
        hadamard=size,
        purpose=f"{base.layout.purpose}; {size} columns rotated",
        sources=(*base.layout.sources, SOURCE),
        also=(),
    )
    encoders = {
        rule: partial(_rotated, encoder=encoder, size=size, name=name) for rule, encoder in base.encoders.items()
    }
    # a scale for the tensor is that of the rotated weight, all of which is looked at
    together = {**base.together, **dict.fromkeys(base.shared, 0)}
    return Codec(layout, encoders, shared=base.shared, together=together)


def _rotated(
    weight: np.ndarray, encoder: Encoder, size: int, name: str, peak: np.float32 | None = None
) -> dict[str, np.ndarray]:
    """The parts of the rotated weight.

    peak : the largest magnitude of all weights that share the tensor's scale, before they are rotated. Rotated ones
        are at most sqrt(size) times as large, and a little, as sums round
    """
    turned = weight.copy()
    with np.errstate(all="ignore"):
        hadamard.transform(turned, size)
    if not np.isfinite(turned).all():
        raise LayoutError(f"{name}: rotated weights are beyond float32; the largest is {np.abs(weight).max():.6g}")
    if peak is None:
        return dict(encoder(turned))
    most = np.float64(peak) * np.sqrt(size) * ABOVE
    return dict(encoder(turned, peak=np.float32(min(most, np.finfo(np.float32).max))))
