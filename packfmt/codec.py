"""What a packed tensor and a codec are. All checks of input stand here, once.

A codec is a layout and the encoders that write it. Everything else (pack, unpack, decode, sizes)
follows from the layout, so a tensor decodes without its codec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from packfmt import grids, placement
from packfmt.errors import LayoutError
from packfmt.layout import DENSE, Layout, dtype_of

Array = npt.NDArray[Any]
Parts = Mapping[str, Array]
Encoder = Callable[[npt.NDArray[np.float32]], Parts]  # (rows, cols) float32 -> the layout's parts


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) of a tensor: all leading axes flatten into rows."""
    return prod(shape[:-1]), shape[-1] if shape else 1


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """A weight in packed form: its logical shape and dtype, and one array per component.

    Raises
    ------
    LayoutError
        If a component is missing, unknown, or of another dtype or shape than the layout gives it.
    """

    layout: Layout
    shape: tuple[int, ...]
    components: Mapping[str, Array]
    dtype: str = "float32"  # what the weight was before, and becomes again in a dense checkpoint

    def __post_init__(self) -> None:
        expected = {c.name: (c.shape, dtype_of(c.dtype)) for c in self.layout.fit(*self.matrix).components}
        for stream in self.layout.streams:
            got = self.components.get(stream.name)
            expected[stream.name] = ((-1,) if got is None else got.shape[:1], dtype_of(stream.dtype))
        for wrong in expected.keys() ^ self.components.keys():
            state = "missing" if wrong in expected else "unknown"
            raise LayoutError(f"{self.layout.name}: component {wrong!r} is {state}; it has {', '.join(expected)}")
        for name, (shape, dtype) in expected.items():
            array = self.components[name]
            if array.dtype != dtype or array.shape != shape:
                raise LayoutError(
                    f"{self.layout.name}: component {name!r} is {array.dtype} {array.shape}, "
                    f"needs {dtype} {shape} for a weight of shape {self.shape}"
                )

    @property
    def matrix(self) -> tuple[int, int]:
        return matrix(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all components."""
        return sum(c.nbytes for c in self.components.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, prod(self.shape))

    def unpack(self) -> dict[str, Array]:
        """The layout's parts: codes, scale ... (`placement.unpack`)."""
        return placement.unpack(self.layout, self.matrix, self.components)

    def decode(self) -> npt.NDArray[np.float32]:
        """The weight as float32, in its logical shape, by the formula of the layout's grid."""
        return grids.decode(self.layout, self.matrix, self.components).reshape(self.shape)

    def repack(self, layout: Layout) -> PackedTensor:
        """The same codes and scales in another layout; no number changes.

        Raises
        ------
        LayoutError
            If the layouts differ in grid, or in a part's name, shape or width.
        """
        if reason := self.refuses(layout):
            raise LayoutError(f"{self.layout.name} to {layout.name}: {reason}")
        moved = placement.repack(self.layout, layout, self.matrix, self.components)
        return PackedTensor(layout, self.shape, moved, self.dtype)

    def refuses(self, layout: Layout) -> str:
        """Why `repack` to this layout would change a number; empty if it is exact."""
        return why_inexact(self.layout, layout, self.shape)


def why_inexact(source: Layout, target: Layout, shape: tuple[int, ...]) -> str:
    """Why repacking a tensor of this shape would change a number; empty if it is exact."""
    if source.grid != target.grid:
        mine, theirs = (f"{grid.name} {dict(grid.params)}" for grid in (source.grid, target.grid))
        return f"the grid is {mine}, there {theirs}"
    return placement.difference(source, target, matrix(shape))


@dataclass(frozen=True, slots=True)
class Codec:
    """A format in action: its layout, and encoders by name, the default first.

    An encoder takes (rows, cols) float32, all finite, of a shape that fits, and returns the parts
    in the dtypes of `layout.fit`. It is the only function that may lose information.
    """

    layout: Layout
    encoders: Mapping[str, Encoder]

    def encode(self, weight: Array, encoder: str = "") -> PackedTensor:
        """Pack a weight of shape (..., cols) and any float dtype of NumPy or ml_dtypes.

        float64 is rounded to float32 first; the narrower dtypes convert exactly.

        Raises
        ------
        LayoutError
            If the dtype is not a float, the columns do not fill the blocks, a value is not
            finite, or no encoder has this name.
        """
        name = self.layout.name
        if encoder and encoder not in self.encoders:
            raise LayoutError(f"{name}: no encoder is called {encoder!r}; there are {', '.join(self.encoders)}")
        if not is_float(weight.dtype.name):
            raise LayoutError(f"{name}: a weight of {weight.dtype}, needs a float dtype")
        quantize = self.encoders[encoder or next(iter(self.encoders))]
        shape = matrix(weight.shape)
        self.layout.fit(*shape)  # refuse before the slow part
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(weight, np.float32).reshape(shape)
        _check_finite(name, weight, flat, may_be_infinite=self.layout.grid.name == "plain")
        parts = quantize(flat)
        components = placement.pack(self.layout, shape, parts)
        return PackedTensor(self.layout, weight.shape, components, weight.dtype.name)


def _check_finite(name: str, weight: Array, flat: Array, *, may_be_infinite: bool) -> None:
    """Refuse what no code stands for, and finite float64 that float32 does not reach."""
    good = np.isfinite(flat)
    if good.all():
        return
    if may_be_infinite:
        good |= ~np.isfinite(weight).reshape(flat.shape)
    if bad := int((~good).sum()):
        at = [int(i) for i in np.unravel_index(int(np.argmin(good)), weight.shape)]
        what = "beyond float32" if np.isfinite(weight[tuple(at)]) else "not finite"
        raise LayoutError(f"{name}: {bad} weights are {what}, the first at {at}")


def is_float(dtype: str) -> bool:
    """Whether a dtype's name is that of one of NumPy's or ml_dtypes' floats."""
    return dtype.startswith(("bfloat", "float"))


def dense_dtype(layout: Layout) -> str:
    """The name of a dense layout's dtype, as ml_dtypes or NumPy has it; empty if the layout packs."""
    if DENSE.get(layout.name) != layout:
        return ""
    return dtype_of(layout.components[0].cell[0].dtype).name  # type: ignore[union-attr]


def dense_values(tensor: PackedTensor) -> Array:
    """The numbers of a tensor in a dense layout, in its logical shape, not copied."""
    return tensor.components["values"].reshape(tensor.shape)
