"""Rows of packed tensors: where they lie in each component, so that a tensor of any size can pass in slices.

A component can be cut if the slowest of its digits along the rows is one of those that cells run over, and counts as
many steps as there are rows for it: rows a to b are then one run of bytes, or one for each count of the digits before.
A component without a digit along the rows is all rows'. Slices are packed tensors of fewer rows, in the same layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple

import numpy as np

from packfmt.codec import Array, matrix
from packfmt.errors import LayoutError
from packfmt.layout import REST, TOP, Component, Digit, Layout, Placed, dtype_of

Shape = tuple[int, int]


class Cut(NamedTuple):
    """How a component is cut: `before` runs, each of `steps` pieces of `nbytes`, a piece for so many `rows`."""

    before: int
    steps: int
    nbytes: int
    rows: int


class Span(NamedTuple):
    """Bytes of a component."""

    begin: int
    nbytes: int


@lru_cache(maxsize=1024)
def unit(layout: Layout, shape: Shape) -> int:
    """The rows of which slices must be multiples, but for the last; 0 if the tensor cannot be cut.

    shape : (rows, cols) of the whole tensor
    """
    found = cuts(layout, shape)
    if found is None or layout.streams:
        return 0
    steps = [cut.rows for cut in found.values() if cut]
    padded = [a.pad * a.per for a in layout.axes if a.of == "rows"]  # slices before the last have no padding
    return lcm(*steps, *padded, layout.block["rows"]) if steps else 0


@lru_cache(maxsize=1024)
def cuts(layout: Layout, shape: Shape) -> dict[str, Cut | None] | None:
    """How each component is cut, None where all rows share it; None instead of all if one cannot be cut."""
    described = [c for c in layout.components if isinstance(c, Component)]
    of_rows = {a.name: a for a in layout.axes if a.of == "rows"}
    if any(a.plus for a in of_rows.values()):
        return None
    out: dict[str, Cut | None] = {}
    for told, placed in zip(described, layout.fit(*shape).components, strict=True):
        mine = [d for d in _digits(placed) if d.axis in of_rows]
        if not mine:
            out[placed.name] = None
            continue
        asked = [d for c, _, digits in layout.members() if c is told for d in digits if d.axis in of_rows]
        if any(d.stride == TOP for d in asked):
            return None
        top = max(mine, key=lambda d: (d.stride, d.size != 1))
        at = next((i for i, d in enumerate(placed.over) if d == top), -1)
        if at < 0 or told.over[at].size != REST or top.reverse:
            return None
        before = prod(d.size for d in placed.over[:at])
        nbytes = placed.nbytes // max(1, before * top.size)
        out[placed.name] = Cut(before, top.size, nbytes, top.stride * of_rows[top.axis].per)
    return out


def _digits(placed: Placed) -> list[Digit]:
    return [*placed.over, *(d for m in placed.members for d in (*m.units, *m.fields))]


def shared(layout: Layout) -> frozenset[str]:
    """The parts that all rows have in common: the scale of a whole tensor, a permutation of its columns ..."""
    of_rows = {a.name for a in layout.axes if a.of == "rows"}
    return frozenset(m.name for _, m, digits in layout.members() if not any(d.axis in of_rows for d in digits))


def spans(layout: Layout, shape: Shape, start: int, stop: int) -> dict[str, list[Span]]:
    """Where rows start to stop lie, in the bytes of each component; of one that all rows share, all of it.

    start, stop : multiples of `unit`; `stop` may be the last row's
    """
    found = cuts(layout, shape)
    assert found is not None
    whole = {c.name: c.nbytes for c in layout.fit(*shape).components}
    out = {}
    for name, cut in found.items():
        if cut is None:
            out[name] = [Span(0, whole[name])]
            continue
        first, last = start // cut.rows, cut.steps if stop == shape[0] else stop // cut.rows  # with the padding
        run = [Span((i * cut.steps + first) * cut.nbytes, (last - first) * cut.nbytes) for i in range(cut.before)]
        out[name] = [Span(0, whole[name])] if last - first == cut.steps else run
    return out


def gather(
    layout: Layout,
    shape: tuple[int, ...],
    rows: tuple[int, int],
    fill: Callable[[str, list[tuple[int, Array]]], None],
    name: str,
) -> dict[str, Array]:
    """The components of rows of a tensor.

    fill : writes a component's bytes from these places on into these arrays

    Raises
    ------
    LayoutError
        If the rows are none of it, or it cannot be cut there.
    """
    whole, (start, stop) = matrix(shape), rows
    each = unit(layout, whole)
    if not 0 <= start < stop <= whole[0] or not each or start % each or (stop % each and stop != whole[0]):
        need = f"multiples of {each}" if each else "all at once"
        raise LayoutError(f"{name}: rows {start} to {stop} of {whole[0]} in {layout.name}, needs {need}")
    found, places = {}, spans(layout, whole, start, stop)
    for c in layout.fit(stop - start, whole[1]).components:
        raw, at, pieces = np.empty(c.nbytes, np.uint8), 0, []
        for begin, nbytes in places[c.name]:
            pieces.append((begin, raw[at : at + nbytes]))
            at += nbytes
        fill(c.name, pieces)
        found[c.name] = raw.view(dtype_of(c.dtype)).reshape(c.shape)
    return found
