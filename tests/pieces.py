"""Rows of packed tensors in memory: taken out of one, and put together again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from packfmt import slices
from packfmt.codec import Array, PackedTensor
from packfmt.layout import Layout, dtype_of


def raw(array: Array) -> Array:
    """An array's bytes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def some(tensor: PackedTensor, start: int, stop: int) -> PackedTensor:
    """Rows of a tensor as a matrix."""
    stored = {name: raw(array) for name, array in tensor.components.items()}

    def fill(component: str, pieces: list[tuple[int, Array]]) -> None:
        for begin, piece in pieces:
            piece[:] = stored[component][begin : begin + len(piece)]

    found = slices.gather(tensor.layout, tensor.shape, (start, stop), fill, "weight")
    return PackedTensor(tensor.layout, (stop - start, tensor.shape[-1]), found, tensor.dtype)


def joined(layout: Layout, shape: tuple[int, int], parts: Iterable[tuple[int, PackedTensor]]) -> PackedTensor:
    """Rows, each with the number of the first, put where they lie in the whole; what none of them writes is 255."""
    whole = {c.name: np.full(c.nbytes, 255, np.uint8) for c in layout.fit(*shape).components}
    dtype = ""
    for start, part in parts:
        dtype = part.dtype
        for name, runs in slices.spans(layout, shape, start, start + part.matrix[0]).items():
            stored, at = raw(part.components[name]), 0
            for begin, nbytes in runs:
                whole[name][begin : begin + nbytes] = stored[at : at + nbytes]
                at += nbytes
            assert at == len(stored), name
    fitted = layout.fit(*shape).components
    return PackedTensor(
        layout, shape, {c.name: whole[c.name].view(dtype_of(c.dtype)).reshape(c.shape) for c in fitted}, dtype
    )


def same(a: PackedTensor, b: PackedTensor) -> bool:
    """Same layout, shape, dtype and bytes."""
    stored = [{n: raw(c).tobytes() for n, c in t.components.items()} for t in (a, b)]
    return (a.layout, a.shape, a.dtype, stored[0]) == (b.layout, b.shape, b.dtype, stored[1])
