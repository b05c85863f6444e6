"""Numbers of single weights that stand beside a dense weight: read from their parts, checked, written.

A layout with `sparse` is a dense layout and, in components of their own, numbers of some weights. `coding` says how
these are stored:

    csr           `outlier_rows` (rows + 1): where each row's begin; `outlier_columns` and `outliers`, row by row
    csr_merged    `outlier_rows`; `outliers`: a float16 above the column, in 32 bits
    tiles_merged  as csr_merged, 16 rows taking turns: `outlier_rows` (rows / 16 + 1), and words of zeros fill them up
    ell           `outlier_columns` and `outliers` (rows, n): as many in every row
    gaps          `outlier_counts` (rows): how many a row has; `outlier_gaps`: bytes of columns between them, of which
                  255 is so many columns and no outlier; `outliers`

and `combine` whether a number is added to the dense one or replaces it. Columns of a row ascend.

Sources: SqueezeLLM, arXiv 2306.07629, and squeezellm/quant.py (csr); SpQR, arXiv 2306.03078, and inference_lib
(csr_merged, tiles_merged: its CSR and PTCSR)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError
from packfmt.layout import Component, Layout, Stream, Values, dtype_of
from packfmt.placement import Array, Arrays, unpack

F32 = np.float32
Floats = npt.NDArray[np.float32]
Shape = tuple[int, int]

PARTS: Final = {
    "csr": ("outlier_rows", "outlier_columns", "outliers"),
    "csr_merged": ("outlier_rows", "outliers"),
    "tiles_merged": ("outlier_rows", "outliers"),
    "ell": ("outlier_columns", "outliers"),
    "gaps": ("outlier_counts", "outlier_gaps", "outliers"),
}
EVERY: Final = frozenset(name for names in PARTS.values() for name in names)
TILE: Final = 16  # rows that take turns in `tiles_merged`
MINUS_ZERO: Final = np.uint32(1 << 31)  # a merged word: -0 in column 0
MOST: Final = 1 << 32  # outliers of a weight


class Outliers(NamedTuple):
    """The outliers of a weight, row by row, columns ascending.

    ends : (rows + 1,) int64: those of row r are number ends[r] to ends[r + 1] of all
    columns : (n,) unsigned
    values : (n,) float16, bfloat16 or float32, as stored
    """

    ends: npt.NDArray[np.int64]
    columns: Array
    values: Array


# ---------------------------------------------------------------- layouts


@lru_cache(maxsize=256)
def without(layout: Layout) -> Layout:
    """The layout of the dense part alone, under the same name.

    Raises
    ------
    LayoutError
        If a component holds outliers and something else.
    """
    kept = []
    for component in layout.components:
        mine = {m.name for m in component.cell} if isinstance(component, Component) else {component.name}
        if not mine & EVERY:
            kept.append(component)
        elif not mine <= EVERY:
            raise LayoutError(f"{layout.name}.{component.name}: holds outliers and {', '.join(sorted(mine - EVERY))}")
    dense = replace(layout, components=tuple(kept), sparse=None)
    met = {d.axis for _, _, digits in dense.members() for d in digits}
    first, *others = layout.axes
    return replace(dense, axes=(first, *(a for a in others if a.name in met)))


def dense(layout: Layout) -> Layout:
    """The layout, or that of its dense part if it has outliers."""
    return without(layout) if layout.sparse else layout


@lru_cache(maxsize=256)
def onto(other: Layout, layout: Layout) -> Layout:
    """Another dense layout, with the outliers of a layout that has them."""
    added = tuple(c for c in layout.components if c not in without(layout).components)
    met = {d.axis for c in added if isinstance(c, Component) for m in c.cell for d in (*c.over, *_inside(m))}
    axes = tuple(a for a in layout.axes if a.name in met and a.name not in {b.name for b in other.axes})
    return replace(other, components=(*other.components, *added), axes=(*other.axes, *axes), sparse=layout.sparse)


def _inside(member: Any) -> tuple[Any, ...]:
    return (*member.units, *member.fields) if hasattr(member, "fields") else member.digits


@lru_cache(maxsize=256)
def alone(layout: Layout) -> Layout:
    """The layout of the outliers alone, with all axes."""
    return replace(layout, components=tuple(c for c in layout.components if c.name in names(layout)))


def names(layout: Layout) -> frozenset[str]:
    """The components that hold outliers."""
    dense = {c.name for c in without(layout).components}
    return frozenset(c.name for c in layout.components if c.name not in dense)


def why_not(source: Layout, target: Layout) -> str:
    """Why outliers of one layout could never be those of another; empty if they could."""
    if source.sparse and not target.sparse:
        return f"{target.name} has no outliers"
    if source.sparse and target.sparse and source.sparse.combine != target.sparse.combine:
        verbs = {"add": "are added to the dense numbers", "replace": "replace them"}
        return f"outliers of {source.name} {verbs[source.sparse.combine]}, those of {target.name} do not"
    if not source.sparse and target.sparse and target.sparse.coding == "ell":
        return f"{source.name} has no outliers, {target.name} has some in every row"
    return ""


def condition(source: Layout, target: Layout) -> str:
    """What must be true of the outliers for an exact conversion, in words; empty if nothing, or there are none."""
    if not source.sparse or not target.sparse:
        return ""
    needs = []
    if target.sparse.coding == "ell" and _own(source) != _own(target):
        needs.append(f"every row has {target.axes[-1].size} outliers")
    if (dtype := _values(target)) not in ("<f4", _values(source)):
        needs.append(f"every outlier is a {dtype_of(dtype).name}")
    return " and ".join(needs)


def _own(layout: Layout) -> tuple[Component | Stream, ...]:
    return alone(layout).components


def _values(layout: Layout) -> str:
    """The dtype of a layout's outliers."""
    if layout.sparse and layout.sparse.coding.endswith("merged"):
        return "<f2"
    found = [s.dtype for s in layout.streams if s.name == "outliers"]
    found += [m.dtype for _, m, _ in layout.members() if m.name == "outliers" and isinstance(m, Values)]
    return found[0] if found else "<f4"


# ---------------------------------------------------------------- read


def read(layout: Layout, shape: Shape, components: Arrays) -> Outliers:
    """The outliers of a packed weight, all places checked; none of a layout without.

    Raises
    ------
    LayoutError
        If a part is missing, of another kind or length; or a place is not in the matrix, or named twice, or not
        ascending, or a number is not finite: the row is named, and the column.
    """
    if not layout.sparse:
        return Outliers(np.zeros(shape[0] + 1, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.float16))
    coding = layout.sparse.coding
    parts = unpack(alone(layout), shape, components)
    for name in PARTS[coding]:
        if name not in parts:
            raise LayoutError(f"{layout.name}: has outliers as {coding}, and no {name!r}")
        if name != "outliers" and parts[name].dtype.kind != "u":
            parts[name] = _unsigned(layout, name, parts[name])
    found = {"csr": _csr, "csr_merged": _merged, "tiles_merged": _tiles, "ell": _ell, "gaps": _gaps}[coding](
        layout.name, shape, parts
    )
    if found.values.dtype.name not in ("float16", "bfloat16", "float32"):
        raise LayoutError(f"{layout.name}: outliers are {found.values.dtype}, needs float16, bfloat16 or float32")
    _check_places(layout.name, shape, found)
    if not np.isfinite(found.values).all():
        at = int(np.argmin(np.isfinite(found.values)))
        raise LayoutError(f"{layout.name}: the outlier in {_where(found, at)} is {found.values[at]!s}, needs a number")
    return found


def _unsigned(layout: Layout, name: str, part: Array) -> Array:
    """Whole numbers that other tools keep in signed types."""
    if part.dtype.kind != "i":
        raise LayoutError(f"{layout.name}: {name} are {part.dtype}, needs whole numbers")
    if part.size and (least := int(part.min())) < 0:
        raise LayoutError(f"{layout.name}: {name} has {least}, needs 0 or more")
    return part.view(part.dtype.str.replace("i", "u"))


def _csr(name: str, shape: Shape, parts: Mapping[str, Array]) -> Outliers:
    columns, values = (parts[part].reshape(-1) for part in ("outlier_columns", "outliers"))
    if len(columns) != len(values):
        raise LayoutError(f"{name}: {len(columns)} outlier_columns for {len(values)} outliers")
    return Outliers(_pointers(name, shape[0], parts["outlier_rows"].reshape(-1), len(values)), columns, values)


def _pointers(name: str, rows: int, stored: Array, count: int, what: str = "row") -> npt.NDArray[np.int64]:
    """Where rows begin, proved to go from 0 to the number of outliers and never back."""
    if len(stored) != rows + 1:
        raise LayoutError(f"{name}: {len(stored)} outlier_rows, needs {rows + 1}")
    ends = stored.astype(np.int64)
    if ends[0] or (ends[1:] < ends[:-1]).any():
        at = 0 if ends[0] else int(np.argmax(ends[1:] < ends[:-1])) + 1
        need = "0" if not at else f"{ends[at - 1]} or more"
        raise LayoutError(f"{name}: outliers of {what} {at} begin at number {ends[at]}, needs {need}")
    if ends[-1] != count:
        raise LayoutError(f"{name}: outlier_rows ends with {ends[-1]}, needs the number of outliers, {count}")
    return ends


def _merged(name: str, shape: Shape, parts: Mapping[str, Array]) -> Outliers:
    words = _words(name, parts["outliers"])
    ends = _pointers(name, shape[0], parts["outlier_rows"].reshape(-1), len(words))
    return Outliers(ends, *_split(words))


def _tiles(name: str, shape: Shape, parts: Mapping[str, Array]) -> Outliers:
    words, tiles = _words(name, parts["outliers"]), -(-shape[0] // TILE)
    begins = _pointers(name, tiles, parts["outlier_rows"].reshape(-1), len(words), "tile")
    if (begins % TILE).any():
        at = int(np.argmax(begins % TILE != 0))
        raise LayoutError(f"{name}: outliers of tile {at} begin at number {begins[at]}, needs a multiple of {TILE}")
    # number of word: which of its row, times 16, plus the row in the tile
    tile = np.repeat(np.arange(tiles), np.diff(begins))
    row = TILE * tile + np.arange(len(words)) % TILE
    order = np.argsort(row, kind="stable")
    row, words = row[order], words[order]
    used = words != 0
    if (wrong := row[used] >= shape[0]).any():
        raise LayoutError(f"{name}: an outlier of row {row[used][wrong][0]} of {shape[0]}")
    behind = used[1:] & ~used[:-1] & (row[1:] == row[:-1])
    if behind.any():
        raise LayoutError(f"{name}: row {row[1:][behind][0]} has an outlier behind a word of zeros")
    ends = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(row[used], minlength=shape[0])[: shape[0]], out=ends[1:])
    return Outliers(ends, *_split(words[used]))


def _words(name: str, words: Array) -> Array:
    if words.dtype != "<u4" and words.dtype != "<i4":
        raise LayoutError(f"{name}: outliers are {words.dtype}, needs words of 32 bits")
    return np.ascontiguousarray(words.reshape(-1)).view("<u4")


def _split(words: Array) -> tuple[Array, Array]:
    halves = np.ascontiguousarray(words).view("<u2").reshape(-1, 2)
    return np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1]).view("<f2")


def _ell(name: str, shape: Shape, parts: Mapping[str, Array]) -> Outliers:
    columns, values = (parts[part].reshape(-1) for part in ("outlier_columns", "outliers"))
    if len(columns) != len(values) or len(values) % max(1, shape[0]):
        raise LayoutError(f"{name}: {len(columns)} outlier_columns and {len(values)} outliers, needs as many in a row")
    each = len(values) // max(1, shape[0])
    return Outliers(np.arange(shape[0] + 1, dtype=np.int64) * each, columns, values)


def _gaps(name: str, shape: Shape, parts: Mapping[str, Array]) -> Outliers:
    from packfmt.kernels import outliers

    counts, gaps, values = (parts[part].reshape(-1) for part in PARTS["gaps"])
    ends = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    if ends[-1] != len(values):
        raise LayoutError(f"{name}: outlier_counts makes {ends[-1]}, needs the number of outliers, {len(values)}")
    columns = np.empty(len(values), np.uint32)
    used, row = outliers.columns_of(gaps, ends, columns)
    if used != len(gaps):
        where = f"end in row {row}" if used > len(gaps) else f"{len(gaps) - used} are left behind the last row"
        raise LayoutError(f"{name}: {len(gaps)} outlier_gaps {where}")
    return Outliers(ends, columns, values)


def _check_places(name: str, shape: Shape, found: Outliers) -> None:
    """Refuse columns beyond the matrix, and those that do not ascend."""
    from packfmt.kernels import outliers

    at = outliers.first_wrong(found.ends, found.columns, shape[1])
    if at < 0:
        return
    row, column = _row_of(found, at), int(found.columns[at])
    if column >= shape[1]:
        raise LayoutError(f"{name}: an outlier in row {row}, column {column}, of {shape[1]} columns")
    before = int(found.columns[at - 1])
    how = "twice" if before == column else f"behind column {before}"
    raise LayoutError(f"{name}: an outlier in row {row}, column {column} stands {how}, needs columns that ascend")


def _row_of(found: Outliers, at: int) -> int:
    return int(np.searchsorted(found.ends, at, side="right")) - 1


def _where(found: Outliers, at: int) -> str:
    return f"row {_row_of(found, at)}, column {found.columns[at]}"


# ---------------------------------------------------------------- written


def write(layout: Layout, shape: Shape, found: Outliers, exactly: bool = False) -> dict[str, Array]:
    """The parts of the layout that hold these outliers, of which values become the layout's dtype.

    exactly : refuse values that it rounds

    Raises
    ------
    LayoutError
        If the layout cannot hold them: a column, or how many a row has, or a number that is infinite there, or
        rounded if `exactly`.
    """
    assert layout.sparse
    fitted, coding = layout.fit(*shape).parts, layout.sparse.coding
    merged = coding.endswith("merged")
    values = _rounded(layout.name, found, dtype_of("<f2" if merged else fitted["outliers"].dtype), exactly)
    if merged:
        words = _joined(layout.name, found.columns, values)
        if coding == "csr_merged":
            return {"outlier_rows": _shaped(layout, shape, "outlier_rows", found.ends), "outliers": words}
        words = np.where(words == 0, MINUS_ZERO, words)  # for a word of zeros is no outlier
        ends, words = _in_tiles(shape, found, words)
        return {"outlier_rows": _shaped(layout, shape, "outlier_rows", ends), "outliers": words}
    if coding == "gaps":
        from packfmt.kernels import outliers

        counts = np.diff(found.ends)
        return {
            "outlier_counts": _shaped(layout, shape, "outlier_counts", counts),
            "outlier_gaps": outliers.gaps_of(found.ends, found.columns.astype(np.uint32)),
            "outliers": values,
        }
    if coding == "csr":
        ends = _shaped(layout, shape, "outlier_rows", found.ends)
        return {"outlier_rows": ends, "outlier_columns": _columns(layout, fitted, found), "outliers": values}
    wanted = fitted["outliers"].shape
    if (wrong := np.flatnonzero(np.diff(found.ends) * max(1, shape[0]) != np.prod(wanted))).size:
        got = int(np.diff(found.ends)[wrong[0]])
        raise LayoutError(f"{layout.name}: row {wrong[0]} has {got} outliers, needs {wanted[-1]}")
    return {
        "outlier_columns": _columns(layout, fitted, found).reshape(wanted),
        "outliers": values.reshape(wanted),
    }


def _columns(layout: Layout, fitted: Mapping[str, Any], found: Outliers) -> Array:
    dtype = dtype_of(fitted["outlier_columns"].dtype)
    if found.columns.size and int(found.columns.max()) > (most := np.iinfo(dtype).max):
        raise LayoutError(f"{layout.name}: outliers in column {found.columns.max()}, its numbers end at {most}")
    return found.columns.astype(dtype)


def _shaped(layout: Layout, shape: Shape, name: str, numbers: npt.NDArray[np.int64]) -> Array:
    """Whole numbers as a part of the layout."""
    part = layout.fit(*shape).parts[name]
    most = np.iinfo(dtype_of(part.dtype)).max
    if numbers.size and int(numbers.max()) > most:
        raise LayoutError(f"{layout.name}: {name} has {numbers.max()}, its numbers end at {most}")
    return numbers.astype(dtype_of(part.dtype)).reshape(part.shape)


def _rounded(name: str, found: Outliers, dtype: np.dtype[Any], exactly: bool) -> Array:
    with np.errstate(over="ignore"):
        values = found.values.astype(dtype)
    if values.size and not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        raise LayoutError(
            f"{name}: the outlier in {_where(found, at)}, {F32(found.values[at])!s}, is beyond {dtype.name}"
        )
    if exactly and (lost := np.flatnonzero(values.astype(F32) != found.values.astype(F32))).size:
        where = f"{_where(found, int(lost[0]))}, {F32(found.values[lost[0]])!s}"
        raise LayoutError(f"{name}: {lost.size} outliers are rounded to {dtype.name}, the first in {where}")
    return values


def _joined(name: str, columns: Array, values: Array) -> Array:
    if columns.size and int(columns.max()) >= 1 << 15:  # SpQR reads columns with a sign
        raise LayoutError(f"{name}: outliers in column {columns.max()}, its numbers end at 32767")
    words = np.empty((len(values), 2), "<u2")
    words[:, 0], words[:, 1] = columns, values.view("<u2")
    return words.reshape(-1).view("<u4")


def _in_tiles(shape: Shape, found: Outliers, words: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Rows of 16 taking turns, filled up with words of zeros."""
    counts = np.zeros(-(-shape[0] // TILE) * TILE, np.int64)
    counts[: shape[0]] = np.diff(found.ends)
    deep = counts.reshape(-1, TILE).max(1, initial=0)
    begins = np.concatenate([[0], np.cumsum(TILE * deep)])
    out = np.zeros(begins[-1], "<u4")
    row = np.repeat(np.arange(shape[0]), np.diff(found.ends))
    number = np.arange(len(words)) - found.ends[row]
    out[begins[row // TILE] + TILE * number + row % TILE] = words
    return begins, out


# ---------------------------------------------------------------- combined


def combine(layout: Layout, shape: Shape, components: Arrays, weights: Floats) -> None:
    """Add the outliers to decoded weights (rows, cols), or put them in their places.

    Raises
    ------
    LayoutError
        If the outliers are not what the layout says (`read`).
    """
    from packfmt.kernels import outliers

    assert layout.sparse
    outliers.combine(*read(layout, shape, components), weights, layout.sparse.combine == "replace")


def added(layout: Layout, shape: Shape, found: Outliers, dense: Floats) -> Outliers:
    """The same weight's outliers as numbers that are added, (rows, cols) float32 being what they are added to."""
    assert layout.sparse
    if layout.sparse.combine == "add":
        return found
    row = np.repeat(np.arange(shape[0]), np.diff(found.ends))
    with np.errstate(all="ignore"):
        return found._replace(values=found.values.astype(F32) - dense[row, found.columns])
