"""Every decision, before the first weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from packfmt.layout import Layout


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor's way: what is read, what becomes of it, what it is called after."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # logical dtype: what the weight was before packing
    before: Layout
    layout: Layout
    action: str  # keep, repack, cast, quantise
    reason: str  # the rule that chose the layout
    encoder: str = ""
    file: str = ""  # of a container of several files


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do. Printable, comparable, and made without reading weights."""

    source: str
    container: str
    steps: tuple[Step, ...]
