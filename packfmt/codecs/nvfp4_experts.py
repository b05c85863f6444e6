"""nvfp4_x<experts>: NVFP4 of a stack of experts in ggml's blocks, whose scale of a tensor is one for each expert.

    w[j] = number(code[j]) * (scale * global_scale[expert])

A tensor of (experts, rows, cols) flattens into rows, so the rows of one expert are neighbours. GGUF files keep the
experts' scales in a tensor of its own, as they do the one of `nvfp4`.

Bytes, rounding and worked example: spec/formats/nvfp4_experts.md
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from packfmt.codec import Codec
from packfmt.codecs.nvfp4 import BLOCKS, GGUF
from packfmt.kernels import fp4
from packfmt.layout import TOP, Component, Values, rows

RULES = ("best", "four_over_six", "modelopt")


@cache
def codec(name: str) -> Codec:
    """The format of as many experts as its name says."""
    experts = int(name.removeprefix("nvfp4_x"))
    scale = Component("scale", (rows(TOP, experts),), (Values("global_scale", "<f4"),), doc="one an expert, multiplies")
    layout = replace(
        GGUF,
        name=name,
        components=(BLOCKS, scale),
        purpose=f"4-bit floats, a float8 scale for 16: ggml's blocks and a scale for each of {experts} experts",
    )
    encoders = {rule: partial(_encode, rule=rule, experts=experts) for rule in RULES}
    return Codec(layout, encoders, ("best", "four_over_six"))


def _encode(weight: np.ndarray, rule: str, experts: int, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every expert on its own, as `nvfp4`."""
    total = len(weight)
    costs = None if importance is None else np.broadcast_to(importance, weight.shape)
    found: list[dict[str, Any]] = []
    for expert in range(experts):
        mine = slice(expert * total // experts, (expert + 1) * total // experts)
        found.append(fp4.nvfp4(weight[mine], rule, importance=None if costs is None else costs[mine]))
    parts = {name: np.concatenate([one[name] for one in found]) for name in ("codes", "scale")}
    whole = np.concatenate([one["global_scale"] for one in found]).reshape(experts, 1)
    return parts | {"global_scale": whole}
