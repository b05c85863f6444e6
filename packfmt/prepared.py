"""Weights made ready for many products."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from packfmt import products
from packfmt.codec import Array, PackedTensor
from packfmt.errors import LayoutError
from packfmt.layout import Layout


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Prepared:
    """A weight as its products read it: mostly in its layout's run-time tiling, which holds the same numbers.

    packed : a packed tensor like any other. What is in a tiling can be saved, and used from a memory-mapped file
        as it lies there: preparing it again costs nothing
    """

    packed: PackedTensor
    _product: products.Product = field(repr=False)

    def __repr__(self) -> str:
        return f"Prepared({self.layout.name}, {self.packed.shape}, {self.nbytes} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        return prepare, (self.packed,)  # which costs nothing if it is in a tiling

    @property
    def layout(self) -> Layout:
        return self.packed.layout

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's logical shape."""
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return self.packed.nbytes

    def matmul(self, x: Array, threads: int | None = None) -> npt.NDArray[np.float32]:
        """`PackedTensor.matmul`, the same bits."""
        return products.multiply(self._product, x, self.packed.shape[:-1], threads)


def prepare(packed: PackedTensor | Prepared, batch: int = 1) -> Prepared:
    """Make a weight ready for many products. Nothing is rounded; the packed tensor may be dropped afterwards.

    batch : rows of activations that most products will have. Sherry is tiled another way for many; all tilings
        take any number, and give the same bits

    Raises
    ------
    LayoutError
        If a component is not what the layout says, its grid does not fit its parts, or `packed` or `batch` is
        something else.
    """
    if isinstance(packed, Prepared):
        packed = packed.packed
    if not isinstance(packed, PackedTensor):
        raise LayoutError(f"preparing {type(packed).__name__}, needs a packed tensor, such as packfmt.pack gives")
    if isinstance(batch, bool | np.bool_) or not hasattr(batch, "__index__") or index(batch) < 1:
        raise LayoutError(f"batch is {batch!r}, needs a whole number of 1 or more")
    ready = products.product(packed.layout, packed.matrix, packed.components, index(batch))
    held = (
        packed
        if ready.layout is packed.layout
        else PackedTensor(ready.layout, packed.shape, ready.components, packed.dtype)
    )
    return Prepared(held, ready)
