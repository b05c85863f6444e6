"""Any dense format and, beside it, outliers: the few weights that it would spoil, or that would spoil it.

    <format>_csr          rows of any number of outliers: pointers of 32 bits, columns of 16, float16 values
    <format>_ell<n>       n outliers in every row: sizes are known before, and rows can be converted in slices
    <format>_gaps         as csr, bytes of columns between outliers: the smallest, and the slowest to read
    ..._32                columns of 32 bits, for weights of more than 65,536
    ..._f32, ..._bf16     values of this dtype
    ..._replace           values that replace the dense ones; else they are added, and may be finer than the weights

The dense format's bytes hold the weight with zeros where outliers are. An encoder's name may carry a budget:
"magnitude:0.45%" of all weights, or "magnitude:0.2bits" a weight, places included.

Bytes, rounding and worked example: spec/formats/dense_sparse.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from packfmt import codecs, outliers, placement
from packfmt.codec import Codec, Encoder, PackedTensor
from packfmt.errors import PlanError
from packfmt.layout import Axis, Component, Digit, Layout, Sparse, Stream, Values, dtype_of, itemsize

NAME: Final = re.compile(r"(.+)_(?:csr|ell([1-9]\d{0,4})|(?P<gaps>gaps))(_32)?(_f32|_bf16)?(_replace)?")
DTYPES: Final = {None: "<f2", "_f32": "<f4", "_bf16": "bfloat16"}
BUDGET: Final = re.compile(r"(\w+)(?::(\d+(?:\.\d+)?)(%|bits))?")
USUAL: Final = (0.45, "%")  # SqueezeLLM's: 0.4 of large weights, 0.05 of sensitive ones
FREE: Final = ("codebook", "spqr")  # grids that may have no number near zero, so that zeros are not for nothing
RULES: Final = ("magnitude", "sensitivity")
SOURCES: Final = ("SqueezeLLM, arXiv 2306.07629, section 4.2", "SpQR, arXiv 2306.03078, section 4")

F32 = np.float32
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def codec(name: str) -> Codec:
    """The codec of a name such as mxfp4_csr.

    Raises
    ------
    PlanError
        If there is no such dense format, or it has outliers already or rotated columns.
    """
    found = NAME.fullmatch(name)
    if not found:
        raise PlanError(f"no format is called {name!r}; they are called <format>_csr, _ell<n> or _gaps")
    of, count, _, wide, dtype, replaces = found.groups()
    try:
        base = codecs.get(of)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from None
    if base.layout.sparse or base.layout.hadamard:
        what = "outliers already" if base.layout.sparse else "rotated columns, in which there are no outliers"
        raise PlanError(f"{name}: {of} has {what}; take it as it is")
    coding = "ell" if count else "gaps" if found["gaps"] else "csr"
    if coding == "gaps" and wide:
        raise PlanError(f"{name}: gaps reach any column; it is called {name.replace('_32', '', 1)}")
    values, columns = DTYPES[dtype], "<u4" if wide else "<u2"
    parts, axes = _components(coding, int(count or 0), columns, values)
    many = f"{count} outliers a row" if count else f"outliers as {coding}"
    layout = replace(
        base.layout,
        name=name,
        components=(*base.layout.components, *parts),
        axes=(*base.layout.axes, *axes),
        purpose=f"{base.layout.purpose}; {many} in {dtype_of(values).name}",
        sources=(*base.layout.sources, *SOURCES),
        also=(),
        sparse=Sparse(coding, "replace" if replaces else "add"),
    )
    rules = Rules(base, layout, choice=not count)
    together = {} if count else dict.fromkeys(RULES, 0)
    return Codec(
        layout, rules, rules, shared=rules if base.shared else (), least_cols=int(count or 0), together=together
    )


def _components(coding: str, count: int, columns: str, values: str) -> tuple[list[Component | Stream], list[Axis]]:
    every = Axis("every_row", "rows")  # of its own, for that of the dense part may be padded
    if coding == "ell":
        over = Digit(every.name), Digit("outlier")
        where = Component("outlier_columns", over, (Values("outlier_columns", columns),), (1, 1), "ascending in a row")
        return [where, Component("outliers", over, (Values("outliers", values),), (1, 1))], [
            every,
            Axis("outlier", size=count),
        ]
    if coding == "gaps":
        of_row = (Values("outlier_counts", "<u2"),)
        counts = Component("outlier_counts", (Digit(every.name),), of_row, doc="outliers of a row")
        gaps = Stream("outlier_gaps", "u1", doc="columns left out before an outlier; 255: so many, and no outlier")
        return [counts, gaps, Stream("outliers", values)], [every]
    begins = Component(
        "outlier_rows",
        (Digit("row_ends"),),
        (Values("outlier_rows", "<u4"),),
        doc="where each row's begin, and the end",
    )
    places = Stream("outlier_columns", columns, doc="ascending in a row")
    return [begins, places, Stream("outliers", values)], [Axis("row_ends", "rows", plus=1)]


class Rules(Mapping[str, Encoder]):
    """Encoders by name, or by name and budget: "magnitude", "magnitude:1%", "sensitivity:0.2bits".

    choice : whether there is one of how many outliers
    """

    def __init__(self, base: Codec, layout: Layout, choice: bool) -> None:
        self._base, self._layout, self._choice = base, layout, choice

    def __getitem__(self, name: str) -> Encoder:
        found = BUDGET.fullmatch(name) if isinstance(name, str) else None
        if not found or found[1] not in RULES or (found[2] and not self._choice):
            raise KeyError(name)
        amount, kind = (float(found[2]), found[3]) if found[2] else USUAL
        if kind == "%" and amount > 100:
            raise KeyError(name)
        return Apart(self._base, self._layout, found[1], amount, kind)

    def __iter__(self) -> Iterator[str]:
        return iter(RULES)

    def __len__(self) -> int:
        return len(RULES)


@dataclass(frozen=True, slots=True)
class Apart:
    """An encoder: choose the outliers, encode the rest with zeros in their places, and keep what that leaves of them.

    rule : "magnitude": the largest by |w|, times the root of the importance; or "sensitivity": where the dense
        format alone would leave the largest error, (w - decoded)**2 times the importance. Of equals the first in the
        order of rows and columns is taken
    amount, kind : how many, in "%" of all weights or as "bits" a weight; `ell` has its own number
    """

    base: Codec
    layout: Layout
    rule: str
    amount: float
    kind: str

    def __call__(self, weight: Floats, importance: Floats | None = None, **more: Any) -> dict[str, np.ndarray]:
        chosen = self._choose(weight, importance, **more)
        dense = self._encoded(np.where(chosen, F32(0), weight), importance, chosen, **more)
        row, column = np.nonzero(chosen)
        values = weight[row, column]
        if self.layout.sparse == Sparse(self._coding, "add"):
            values = values - dense.decode()[row, column]
        ends = np.searchsorted(row, np.arange(len(weight) + 1))
        found = outliers.Outliers(ends, column.astype(np.uint32), values)
        parts = outliers.write(self.layout, weight.shape, found)
        beside = placement.pack(outliers.alone(self.layout), weight.shape, parts)
        return placement.unpack(self.layout, weight.shape, {**dense.components, **beside})

    @property
    def _coding(self) -> str:
        assert self.layout.sparse
        return self.layout.sparse.coding

    def _choose(self, weight: Floats, importance: Floats | None, **more: Any) -> Mask:
        if self.rule == "magnitude":
            costs = np.abs(weight)
        else:
            costs = np.abs(weight - self._encoded(weight, importance, None, **more).decode())
        if importance is not None:
            costs *= np.sqrt(importance)
        if self._coding != "ell":
            return _largest(costs.reshape(-1), self._count(weight.shape)).reshape(weight.shape)
        each = self.layout.axes[-1].size
        return np.array([_largest(row, each) for row in costs]).reshape(weight.shape)

    def _count(self, shape: tuple[int, int]) -> int:
        size = shape[0] * shape[1]
        if self.kind == "%":
            return round(self.amount / 100 * size)
        beside = 8 * (self.layout.nbytes(*shape) - self.base.layout.nbytes(*shape))  # rows' pointers or counts
        each = sum(8 * itemsize(s.dtype) for s in self.layout.streams)
        return min(size, max(0, int((self.amount * size - beside) / each)))

    def _encoded(self, weight: Floats, importance: Floats | None, chosen: Mask | None, **more: Any) -> PackedTensor:
        """The dense part; what is `chosen` does not count to an encoder that would mind a zero there."""
        if importance is None and self.base.layout.grid.name in FREE and chosen is not None:
            importance = np.ones((1, 1), F32)
        if importance is not None and chosen is not None:
            importance = np.where(chosen, F32(0), importance)
        weighs = importance is not None and next(iter(self.base.encoders)) in self.base.weighted
        return self.base.encode(weight, importance=importance if weighs else None, **more)


def _largest(costs: Floats, count: int) -> Mask:
    """The `count` largest of a row of numbers; of equals the first."""
    if count >= costs.size or not count:
        return np.full(costs.size, bool(count))
    least = np.partition(costs, costs.size - count)[costs.size - count]
    chosen: Mask = costs > least
    equal = np.flatnonzero(costs == least)[: count - int(chosen.sum())]
    chosen[equal] = True
    return chosen
