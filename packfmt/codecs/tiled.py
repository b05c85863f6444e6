"""Run-time tilings as formats of their own: <format>_tile16, as mxfp4_tile16; and of Sherry's <format>_words32, too.

The same codes and scales as the format has, for 16 rows side by side: what `packfmt.prepare` brings a weight into. A
file of these is multiplied as it lies in memory.

Numbers and worked example: spec/formats/tiled.md
"""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from math import lcm
from typing import Any

import numpy as np

from packfmt import codecs, placement, retiling, slices, tilings
from packfmt.codec import Codec
from packfmt.errors import PlanError
from packfmt.layout import Layout
from packfmt.meaning import BLOCK, meaning

# by form of tiling: how it holds the codes, if it holds them for look-ups
CODES = {"": "", "words": ", codes in words of 16 bits", "nibbles": ", four bits of codes apart from the fifth"}


def codec(name: str) -> Codec:
    """The codec of a name such as mxfp4_tile16.

    Raises
    ------
    PlanError
        If there is no such format, it has no such tiling, or is one.
    """
    form, suffix = next((form, suffix) for form, suffix in tilings.SUFFIXES.items() if name.endswith(suffix))
    of = name.removesuffix(suffix)
    if of.endswith(tuple(tilings.SUFFIXES.values())):
        raise PlanError(f"{name}: {of} is a tiling already; take it as it is")
    try:
        base = codecs.get(of)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from None
    block = base.layout.block
    shape = block["rows"], lcm(block["cols"], BLOCK)
    found = tilings.tile(base.layout, shape, form)
    if found is None:
        raise PlanError(f"{name}: {_why_not(base.layout, shape, form)}; use {of} itself")
    purpose = found.layout.purpose + CODES[form]
    layout = replace(found.layout, purpose=purpose, sources=base.layout.sources)
    encoders = {rule: partial(_tiled, base=base, rule=rule, layout=layout, form=form) for rule in base.encoders}
    fast = {rule: partial(_at_once, base=base, rule=rule, form=form) for rule in base.fast}
    common = slices.shared(base.layout)  # of all rows, though here each tile has its own
    known = {rule for rule in base.shared if common == {"global_scale"}}
    whole = dict.fromkeys(base.encoders.keys() - known, 0) if common else {}
    together = {**base.together, **whole}
    return Codec(layout, encoders, base.weighted, fast, base.remark, base.shared, base.least_cols, together)


def meant(name: str) -> str:
    """What a misspelt name of a tiling means: a tiling, or its format if that has none; empty if no format is in it."""
    parts = re.fullmatch(r"(.+?)_?((?:tile|word|nibble)s?\d*)", name)
    if not parts or not codecs.known(parts[1]):
        return ""
    forms = [suffix.lstrip("_") for suffix in tilings.SUFFIXES.values()]
    near = get_close_matches(parts[2], forms, 1, 0) + forms[:1]
    return next((there for form in near if _is_one(there := f"{parts[1]}_{form}")), parts[1])


def _is_one(name: str) -> bool:
    try:
        codecs.get(name)
    except PlanError:
        return False
    return True


def _why_not(layout: Layout, shape: tuple[int, int], form: str) -> str:
    """Why a layout has no tiling of this form, in words."""
    if meaning(layout, shape) is None:
        return f"{layout.name} has no tiling, for products take it as numbers, not as whole steps"
    if form:
        return f"{layout.name} has no such tiling, which is for codes of four weights"
    return f"{layout.name} has no tiling, for no tile holds its codes or groups"


def _at_once(weight: np.ndarray, *, base: Codec, rule: str, form: str) -> dict[str, np.ndarray] | None:
    """The components of the tiling, from those of the format."""
    components = base.fast[rule](weight)
    return None if components is None else retiling.tiled(base.layout, weight.shape, components, form)


def _tiled(
    weight: np.ndarray, *, base: Codec, rule: str, layout: Layout, form: str, **more: Any
) -> dict[str, np.ndarray]:
    """The parts of the tiling, from those of the format."""
    packed = base.encode(weight, rule, **more)
    return placement.unpack(layout, weight.shape, retiling.tiled(base.layout, weight.shape, packed.components, form))
