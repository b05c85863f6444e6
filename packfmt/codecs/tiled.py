"""Run-time tilings as formats of their own: <format>_tile16, as mxfp4_tile16 or sherry_tile16.

The same codes and scales as the format has, for 16 rows side by side: what `packfmt.prepare` brings a weight into. A
file of these is multiplied as it lies in memory.

Numbers and worked example: spec/formats/tiled.md
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import lcm
from typing import Any

import numpy as np

from packfmt import codecs, placement, retiling, tilings
from packfmt.codec import Codec
from packfmt.errors import PlanError
from packfmt.layout import Layout
from packfmt.meaning import BLOCK


def codec(name: str) -> Codec:
    """The codec of a name such as mxfp4_tile16.

    Raises
    ------
    PlanError
        If the format has no tiling.
    """
    base = codecs.get(name.removesuffix(tilings.SUFFIX))
    block = base.layout.block
    found = tilings.tile(base.layout, (block["rows"], lcm(block["cols"], BLOCK)))
    if found is None:
        raise PlanError(f"{base.layout.name} has no tiling: its products take decoded numbers")
    layout = replace(found.layout, sources=base.layout.sources)
    encoders = {rule: partial(_tiled, base=base, rule=rule, layout=layout) for rule in base.encoders}
    return Codec(layout, encoders, base.weighted, {}, base.remark, base.shared, base.least_cols)


def _tiled(weight: np.ndarray, *, base: Codec, rule: str, layout: Layout, **more: Any) -> dict[str, np.ndarray]:
    """The parts of the tiling, from those of the format."""
    components = placement.pack(base.layout, weight.shape, base.encoders[rule](weight, **more))
    return placement.unpack(layout, weight.shape, retiling.tiled(base.layout, weight.shape, components))
