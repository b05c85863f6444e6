"""What a packed tensor and a codec are. All checks of input stand here, once.

A codec is a layout and the encoders that write it. Everything else (pack, unpack, decode, sizes)
follows from the layout, so a tensor decodes without its codec.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import fused, outliers, placement, products, respelling, retiling
from packfmt.errors import LayoutError
from packfmt.layout import DENSE, Layout, dtype_of

Array = npt.NDArray[Any]
Parts = Mapping[str, Array]
Encoder = Callable[..., Parts]  # (rows, cols) float32 -> the layout's parts


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) of a tensor: all leading axes flatten into rows."""
    return prod(shape[:-1]), shape[-1] if shape else 1


@dataclass(frozen=True, slots=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        return f"PackedTensor({self.layout.name}, {self.shape}, {self.nbytes} bytes, was {self.dtype})"

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

    def decode(self, dtype: str = "float32", out: Array | None = None) -> Array:
        """The weight in its logical shape, by the formula of the layout's grid.

        dtype : "float32", or "bfloat16", to which the float32 numbers are rounded, half to even
        out : C-contiguous array of the weight's shape to write to instead of a new one; its dtype counts

        Raises
        ------
        LayoutError
            If `out` is another array, or there is no such dtype here.
        """
        if dtype not in ("float32", "bfloat16"):
            raise LayoutError(f"{self.layout.name}: decoding to {dtype!r}, needs float32 or bfloat16")
        if out is not None and (out.shape != self.shape or not out.flags.carray):
            raise LayoutError(f"{self.layout.name}: out is {out.shape}, needs a writable C-contiguous {self.shape}")
        made = out is None and dtype == "bfloat16"
        if made:
            out = np.empty(self.shape, dtype_of(dtype))
        shape = self.matrix
        target = None if out is None else out.reshape(shape)
        return fused.decode(self.layout, shape, self.components, target, fresh=made).reshape(self.shape)

    def matmul(self, x: Array, threads: int | None = None) -> npt.NDArray[np.float32]:
        """The product of the weight with activations, by the canonical sums (spec/products.md).

        The bits do not depend on machine, threads or batch. The weight is made ready each time, which takes several
        times as long as the product: `packfmt.prepare` does it once, for many products. Where steps are whole
        numbers, an activation that is infinite or NaN makes its row of the result NaN.

        Parameters
        ----------
        x : (cols,) or (..., cols), any float dtype of NumPy or ml_dtypes; float64 is rounded to float32
        threads : how many at most; default: PACKFMT_THREADS, or the processors that there are

        Returns
        -------
        (..., *rows) float32, where the weight's shape is (*rows, cols)

        Raises
        ------
        LayoutError
            If x has other columns or no floats, or a component is not what the layout says.
        PackfmtError
            If `threads` is not a whole number of 1 to 256.
        """
        flat = products.rows_of(x, self.layout, self.matrix[1])  # refused before the weight is made ready
        ready = products.product(self.layout, self.matrix, self.components, len(flat))
        return products.multiply(ready, flat, self.shape[:-1], threads).reshape((*x.shape[:-1], *self.shape[:-1]))

    def repack(self, layout: Layout, rounded_reciprocal: bool = False) -> PackedTensor:
        """The same numbers in another layout: bits move, or codes are spelled anew; nothing is rounded.

        rounded_reciprocal : let the scale of the whole tensor be rounded, where one layout multiplies by it and
            the other divides; numbers then differ in their last bits (`respelling.respell`)

        Raises
        ------
        LayoutError
            If the layouts can hold no number in common, or one of this tensor's does not fit.
        """
        if not isinstance(layout, Layout):
            raise LayoutError(f"repacking to {layout!r}, needs a layout, such as packfmt.pack(weight, name).layout")
        if self.layout.sparse or layout.sparse:
            moved = self._with_outliers(layout, rounded_reciprocal)
        elif (form := retiling.becomes(self.layout, layout, self.matrix)) is not None:
            moved = retiling.tiled(self.layout, self.matrix, self.components, form)
        elif moves_as_bits(self.layout, layout, self.shape):
            moved = placement.repack(self.layout, layout, self.matrix, self.components)
        elif retiling.comes_from(self.layout, layout, self.matrix):
            moved = retiling.untiled(self.layout, layout, self.matrix, self.components)
        else:
            moved = respelling.respell(self.layout, layout, self.matrix, self.components, rounded_reciprocal)
        return PackedTensor(layout, self.shape, moved, self.dtype)

    def _with_outliers(self, layout: Layout, rounded_reciprocal: bool) -> dict[str, Array]:
        """Components of another layout that has outliers: the dense ones repacked, the outliers stored anew."""
        if reason := outliers.why_not(self.layout, layout):
            raise LayoutError(f"{self.layout.name} to {layout.name}: {reason}")
        apart = outliers.names(self.layout) if self.layout.sparse else frozenset()
        mine = {name: array for name, array in self.components.items() if name not in apart}
        dense = PackedTensor(outliers.dense(self.layout), self.shape, mine, self.dtype)
        moved = dense.repack(outliers.dense(layout), rounded_reciprocal).components
        found = outliers.read(self.layout, self.matrix, self.components)
        parts = outliers.write(layout, self.matrix, found, exactly=True)
        return {**moved, **placement.pack(outliers.alone(layout), self.matrix, parts)}

    def refuses(self, layout: Layout) -> str:
        """Why `repack` to this layout could never be exact; empty if it is, or if the numbers decide."""
        return why_inexact(self.layout, layout, self.shape)


def moves_as_bits(source: Layout, target: Layout, shape: tuple[int, ...]) -> bool:
    """Whether two layouts have the same grid and parts, so that only places differ."""
    same = source.grid == target.grid and source.hadamard == target.hadamard
    return same and not placement.difference(source, target, matrix(shape))


def why_inexact(source: Layout, target: Layout, shape: tuple[int, ...]) -> str:
    """Why repacking must change a number; empty if it is exact, or if the numbers decide (`exact_if`)."""
    if source.sparse or target.sparse:
        reason = outliers.why_not(source, target)
        return reason or why_inexact(outliers.dense(source), outliers.dense(target), shape)
    if only_places(source, target, shape) or retiling.comes_from(source, target, matrix(shape)):
        return ""
    return respelling.why_not(source, target, matrix(shape))


def exact_if(source: Layout, target: Layout, shape: tuple[int, ...]) -> str:
    """What must be true of the numbers for an exact repacking, in words; empty if nothing."""
    if source.sparse or target.sparse:
        needs = outliers.condition(source, target), exact_if(outliers.dense(source), outliers.dense(target), shape)
        return " and ".join(filter(None, needs))
    if only_places(source, target, shape):
        return ""
    if retiling.comes_from(source, target, matrix(shape)):
        return retiling.condition(target)
    return respelling.condition(source, target, matrix(shape))


def only_places(source: Layout, target: Layout, shape: tuple[int, ...]) -> bool:
    """Whether all numbers of one layout are numbers of the other, whatever they are."""
    if source.sparse or target.sparse:
        apart = outliers.why_not(source, target) or outliers.condition(source, target)
        return not apart and only_places(outliers.dense(source), outliers.dense(target), shape)
    return retiling.becomes(source, target, matrix(shape)) is not None or moves_as_bits(source, target, shape)


def respelled_bytes(source: Layout, target: Layout, shape: tuple[int, ...]) -> int:
    """Bytes that spelling a tensor anew holds beside its components."""
    if source.sparse or target.sparse:
        source, target = outliers.dense(source), outliers.dense(target)
        held = prod(shape)  # of outliers, should an eighth of the weights be some
        return held + (0 if only_places(source, target, shape) else respelled_bytes(source, target, shape))
    if retiling.comes_from(source, target, matrix(shape)):
        return retiling.HELD * prod(shape)
    return respelling.held(source, target, matrix(shape))


@lru_cache(maxsize=1024)
def encoding_bytes(layout: Layout, shape: tuple[int, ...], lossless: bool = False) -> int:
    """Bytes that encoding a tensor holds at most beside its source and result: float32, codes, what lies between."""
    if dense_dtype(layout):
        return 5 * prod(shape)
    if layout.sparse:  # the weight without outliers, what they are chosen by, and the dense result
        return encoding_bytes(outliers.dense(layout), shape, lossless) + 13 * prod(shape)
    seen = respelling.view(layout, matrix(shape))
    planes = seen.planes if isinstance(seen, respelling.View) else 1
    blocks = len(layout.components) == 1 and layout.grid.name not in ("pairs", "tl2")
    each = (5 if blocks else 10) + (2 * planes if planes > 1 else 0) + (7 if lossless else 0)
    copied = layout.hadamard or any(m.name in ("perm", "columns") for _, m, _ in layout.members())
    tried = layout.grid.name == "scaled" and "<f4" in {m.dtype for _, m, _ in layout.members() if m.name == "scale"}  # type: ignore[union-attr]
    return (each + (4 if copied or tried else 0)) * prod(shape)


def same_numbers(source: Layout, target: Layout, shape: tuple[int, ...]) -> bool:
    """Whether codes of both mean the same numbers times scales, or all are ternary: then nothing need be rounded."""
    if source.sparse or target.sparse:
        return not outliers.why_not(source, target) and same_numbers(
            outliers.dense(source), outliers.dense(target), shape
        )
    return retiling.comes_from(source, target, matrix(shape)) or respelling.alike(source, target, matrix(shape))


def only_inverts(source: Layout, target: Layout, shape: tuple[int, ...]) -> bool:
    """Whether all that may be rounded is the scale of the whole tensor, which multiplies here and divides there."""
    source, target = outliers.dense(source), outliers.dense(target)
    return respelling.inverts(source, target, matrix(shape))


class Remark(NamedTuple):
    """Something that a user should know of a weight.

    count : how often, in a weight of (rows, cols) float32; the sum over slices of rows is that of the whole
    say : it in words, of so many, and of how many weights there are
    """

    count: Callable[[npt.NDArray[np.float32]], int]
    say: Callable[[int, int], str]

    def __call__(self, weight: npt.NDArray[np.float32]) -> str:
        found = self.count(weight)
        return self.say(found, weight.size) if found else ""


@dataclass(frozen=True, slots=True)
class Codec:
    """A format in action: its layout, and encoders by name, the default first.

    An encoder takes (rows, cols) float32, all finite, of a shape that fits, and returns the parts
    in the dtypes of `layout.fit`. It is the only function that may lose information.

    weighted : encoders that also take `importance`, (1 or rows, cols) float32, finite and not negative
    fast : for some encoders, what gives the components at once: the same bytes as packing the parts; or
        None for a weight that is not finite or cannot be encoded, which the slower way explains
    remark : what encoders do to a weight that a user should know
    shared : encoders that also take `peak`, for several tensors can have one scale in common
    least_cols : columns that a weight must have at least
    together : encoders that look at so many rows together (0: at all), though no part of the layout says so
    """

    layout: Layout
    encoders: Mapping[str, Encoder]
    weighted: Collection[str] = ()
    fast: Mapping[str, Callable[[npt.NDArray[np.float32]], dict[str, Array] | None]] = field(default_factory=dict)
    remark: Remark | None = None
    shared: Collection[str] = ()
    least_cols: int = 0
    together: Mapping[str, int] = field(default_factory=dict)

    def encode(
        self,
        weight: Array,
        encoder: str = "",
        *,
        importance: Array | None = None,
        peak: float | None = None,
        lossless: bool = False,
    ) -> PackedTensor:
        """Pack a weight of shape (..., cols) and any float dtype of NumPy or ml_dtypes.

        float64 is rounded to float32 first; the narrower dtypes convert exactly.

        Parameters
        ----------
        weight : (..., cols)
        encoder : a name of `encoders`; default: the first
        importance : what an error of each weight costs, not negative: (cols,) or the weight's shape
        peak : the largest magnitude of all tensors that shall have the same scale for a whole tensor; left
            alone by encoders that choose no such scale
        lossless : refuse a weight that decodes to other numbers

        Raises
        ------
        LayoutError
            If the dtype is not a float, the columns do not fill the blocks, a value is not finite, no
            encoder has this name or it does not weigh importance, or `lossless` and a number changes.
        """
        name = self.layout.name
        if not isinstance(weight, np.ndarray):
            raise LayoutError(f"{name}: a weight of {type(weight).__name__}, needs a NumPy array")
        if encoder and encoder not in self.encoders:
            raise LayoutError(f"{name}: no encoder is called {encoder!r}; there are {', '.join(self.encoders)}")
        if not is_float(weight.dtype.name):
            raise LayoutError(f"{name}: a weight of {weight.dtype}, needs a float dtype")
        chosen = encoder or next(iter(self.encoders))
        shape = matrix(weight.shape)
        self.layout.fit(*shape)  # refuse before the slow part
        with np.errstate(over="ignore"):
            flat = np.ascontiguousarray(weight, np.float32).reshape(shape)
        components = self.fast[chosen](flat) if chosen in self.fast and importance is None else None
        if components is None:
            self._check_finite(weight, flat)
            extra: dict[str, Any] = {}
            if importance is not None:
                extra["importance"] = self._costs(chosen, shape, importance)
            if peak is not None and chosen in self.shared:
                extra["peak"] = np.float32(peak)
            parts = self.encoders[chosen](flat, **extra)
            components = placement.pack(self.layout, shape, parts if flat.size else self._of_nothing(shape, parts))
        packed = PackedTensor(self.layout, weight.shape, components, weight.dtype.name)
        if lossless and (reason := self.loss(weight, packed)):
            raise LayoutError(f"{name}: {reason}")
        return packed

    def _of_nothing(self, shape: tuple[int, int], parts: Parts) -> Parts:
        """Parts of a weight without numbers: what one row or column would share is there all the same."""
        wanted = {
            name: part.shape
            for name, part in self.layout.fit(*shape).parts.items()
            if name in parts and name not in {s.name for s in self.layout.streams}
        }
        return {
            name: array if array.shape == wanted.get(name, array.shape) else np.ones(wanted[name], array.dtype)
            for name, array in parts.items()
        }

    def loss(self, weight: Array, packed: PackedTensor) -> str:
        """How many numbers a packed weight changed, in words; empty if none.

        Neither the sign of a zero nor the bits of a NaN are a change.
        """
        found, wanted = packed.decode().reshape(-1), weight.reshape(-1)
        if wanted.dtype.itemsize < 4:
            wanted = wanted.astype(np.float32)  # exact, and NumPy compares no narrow floats with it
        changed = (found != wanted) & ~(np.isnan(found) & np.isnan(wanted))
        if not (count := int(np.count_nonzero(changed))):
            return ""
        at = [int(i) for i in np.unravel_index(int(np.argmax(changed)), packed.shape)]
        flat = np.ascontiguousarray(weight, np.float32).reshape(packed.matrix)
        more = f"; {text}" if self.remark and (text := self.remark(flat)) else ""
        return f"{count} of {changed.size} weights change, the first at {at}{more}"

    def _costs(self, encoder: str, shape: tuple[int, int], importance: Array) -> npt.NDArray[np.float32]:
        """Importance as (1 or rows, cols) float32."""
        name = self.layout.name
        if encoder not in self.weighted:
            able = f"; {', '.join(self.weighted)} does" if self.weighted else ""
            raise LayoutError(f"{name}: encoder {encoder!r} does not weigh importance{able}")
        costs = np.ascontiguousarray(importance, np.float32)
        rows = 1 if costs.size == shape[1] else shape[0]
        if costs.size != rows * shape[1] or not (costs >= 0).all() or not np.isfinite(costs).all():
            raise LayoutError(f"{name}: importance {importance.shape}, needs {shape[1]} finite numbers of 0 or more")
        return costs.reshape(rows, shape[1])

    def _check_finite(self, weight: Array, flat: Array) -> None:
        """Refuse what no code stands for, and finite float64 that float32 does not reach."""
        with np.errstate(invalid="ignore"):
            if np.isfinite([flat.min(initial=0), flat.max(initial=0)]).all():  # both keep a NaN, and are fast
                return
        good = np.isfinite(flat)
        if self.layout.grid.name == "plain":  # infinities and NaN stay what they are
            good |= ~np.isfinite(weight).reshape(flat.shape)
        if bad := int((~good).sum()):
            at = [int(i) for i in np.unravel_index(int(np.argmin(good)), weight.shape)]
            what = "beyond float32" if np.isfinite(weight[tuple(at)]) else "not finite"
            raise LayoutError(f"{self.layout.name}: {bad} weights are {what}, the first at {at}")


def is_float(dtype: str) -> bool:
    """Whether a dtype's name is that of one of NumPy's or ml_dtypes' floats."""
    return dtype.startswith(("bfloat", "float"))


@lru_cache(maxsize=1024)
def dense_dtype(layout: Layout) -> str:
    """The name of a dense layout's dtype, as ml_dtypes or NumPy has it; empty if the layout packs."""
    if DENSE.get(layout.name) != layout:
        return ""
    return dtype_of(layout.components[0].cell[0].dtype).name  # type: ignore[union-attr]


def dense_values(tensor: PackedTensor) -> Array:
    """The numbers of a tensor in a dense layout, in its logical shape, not copied."""
    return tensor.components["values"].reshape(tensor.shape)
