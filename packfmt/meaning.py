"""What a layout's numbers are to a product: whole steps, which an integer dot sums, or numbers of any kind.

The canonical product (spec/products.md) has two ways. A layout's description decides which one it goes, and
nothing else: neither the kernels that there are, nor the machine, nor the numbers of a tensor.
"""

from __future__ import annotations

from operator import index
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import minifloat
from packfmt.errors import LayoutError
from packfmt.grids import first_copies, places, scale_numbers
from packfmt.layout import Layout, Part
from packfmt.placement import Array, Arrays
from packfmt.respelling import MOST_BITS, WRONG
from packfmt.spellings import F32, SPELLINGS, _runs_table, number_steps, scales, unit

Shape = tuple[int, int]
Floats = npt.NDArray[np.float32]

MOST_STEP: Final = 1024  # of which 256 products with int8 fit int32 by far
LEAST_GROUP: Final = 4  # columns that share a scale
BLOCK: Final = 256  # columns of a dot at most
BESIDE: Final = frozenset({"perm", "columns", "column_values"})  # parts that change which activations a code meets
PLAIN: Final = frozenset({"affine", "quotient", "levels", "table", "scaled", "augmented", "affine_zero", "planes"})
SEVERAL: Final = frozenset({"quads", "quads_in_fives", "base3", "plane_base3", "pairs", "tl2"})  # weights a code
AFFINE: Final = frozenset({"affine", "quotient", "affine_zero", "planes"})
WHOLE: Final = frozenset({"codes", "zero"})  # parts that are whole numbers where a step is made of them
SCALES: Final = frozenset({"scale", "global_scale"})
SHIFTS: Final = ("shift8", "shift4")


class Meaning(NamedTuple):
    """How the numbers of a layout are whole steps times scales, for one shape.

    steps : of every code, code 0 first; empty where a code stands for several weights (`SPELLINGS` reads them)
    unit : float, a power of two: a number is step * unit * scale
    planes : of which a weight is the sum
    group : columns that share a scale; 0: all of a row
    cols : columns as they are stored, copies included
    """

    steps: tuple[int, ...]
    unit: float
    planes: int
    group: int
    cols: int


def meaning(layout: Layout, shape: Shape) -> Meaning | None:
    """The steps of a layout; None if its numbers are of any other kind, or no grid can take its description."""
    try:
        return _meaning(layout, shape)
    except (*WRONG, LayoutError):  # a description from a file may say anything; decoding says what is wrong
        return None


def _meaning(layout: Layout, shape: Shape) -> Meaning | None:
    grid, parts = layout.grid, layout.fit(*shape).parts
    params = dict(grid.params)
    needs = {"codes", "scale"}
    needs |= {"global_scale"} if params.get("global_scale") else set()
    needs |= {"affine_zero": {"zero"}, "hif4": set(SHIFTS)}.get(grid.name, set())
    if not needs <= parts.keys() <= needs | BESIDE or layout.streams or parts["codes"].bits > MOST_BITS:
        return None
    codes, across = parts["codes"], _across(layout)
    if layout.axes[0].of != "rows" or codes.share[0] > 1 or (codes.share[across] > 1 and grid.name not in SEVERAL):
        return None
    group = _group(layout, shape)
    if group and group < LEAST_GROUP:
        return None
    low, high = _ends(codes)  # those that no encoder writes, too
    planes, each = 1, 1.0
    if grid.name in ("scaled", "augmented", "hif4"):
        doubled = sum(_ends(parts[name])[1] for name in SHIFTS) if grid.name == "hif4" else 0
        if (low and codes.bits > 8) or doubled > MOST_STEP.bit_length():
            return None
        each = unit(minifloat.numbers(params["element"]))
        low, steps = 0, tuple((number_steps(params["element"]) << doubled).tolist())
    elif any("f" in parts[name].dtype for name in WHOLE & parts.keys()):
        return None
    elif grid.name == "affine_zero":
        least, most = _ends(parts["zero"])
        steps = (low - most, high - least)
    else:
        spelling = SPELLINGS.get(grid.name)
        if spelling is None:
            return None
        ratio = params.pop("ratio", 0)
        if "runs" in params:
            _runs_table(**params, nbytes=codes.shape[-1])  # which refuses what reading would
            if codes.share[across] != params["block"]:
                return None
        known = spelling.steps(low, high - low + 1, **params)
        if grid.name in ("levels", "table"):
            numbers = np.array(known, F32)
            each = unit(numbers)
            known = tuple((numbers / F32(each)).tolist()) if each else (0.5,)
        if any(s != int(s) for s in (*known, ratio)) or ratio < 0:
            return None
        if grid.name == "table":
            np.int32(index(params["exponent"]))  # else decoding cannot take it either
        steps = tuple(int(s) for s in known)
        planes = params.get("count", codes.shape[1]) if spelling.plane_axis else 1
    if not steps or not each or max(map(abs, steps)) > MOST_STEP:
        return None
    plus = max((a.plus for a in layout.axes if a.of == "cols" and a.per == 1), default=0)
    single = grid.name in PLAIN and grid.name != "affine_zero"
    if low and single and grid.name in AFFINE:  # codes in two's complement: the order of their bytes
        steps = steps[-low:] + steps[:-low]
    return Meaning(steps if single else (), each, planes, group, shape[1] + plus)


def _across(layout: Layout) -> int:
    """Which axis columns run along."""
    return [a.of for a in layout.axes].index("cols")


def _ends(part: Part) -> tuple[int, int]:
    """The least and the greatest whole number of a part's dtype and bits."""
    low = -(1 << part.bits - 1) if part.dtype.startswith(("i", "<i")) else 0
    return low, low + (1 << part.bits) - 1


def _group(layout: Layout, shape: Shape) -> int:
    """Columns that share a scale; 0 if all of a row do, in a weight of any width."""
    (axis, share), *_ = [
        (a, s)
        for a, s in zip(layout.axes, layout.fit(*shape).parts["scale"].share, strict=True)
        if a.of == "cols" and a.per * a.extent({"cols": shape[1]}) >= shape[1]
    ]
    met = {d.axis for _, m, digits in layout.members() if m.name == "scale" for d in digits}
    return share * axis.per if axis.name in met else 0


# ---------------------------------------------------------------- numbers of a tensor


def weight_scales(layout: Layout, shape: Shape, parts: Arrays, of: Meaning) -> Floats:
    """What multiplies the steps of each row, plane and group: (rows, planes, groups) float32."""
    grid, params = layout.grid, dict(layout.grid.params)
    stored = {name: by_row(layout, shape, name, parts[name]) for name in SCALES & parts.keys()}
    with np.errstate(all="ignore"):
        if grid.name == "table":
            found = np.ldexp(F32(1), stored["scale"].astype(np.int32) - params["exponent"])
            return found.reshape(len(found), 1, -1)  # type: ignore[no-any-return]
        if grid.name in ("scaled", "augmented", "hif4"):
            flat = {name: part.reshape(part.shape[:2]) for name, part in stored.items()}
            return scale_numbers(flat, params["scale"], params.get("global_scale", ""))[:, None]
        if grid.name == "affine_zero":
            return stored["scale"].astype(F32)[:, None]
        found = scales(stored["scale"], of.planes, SPELLINGS[grid.name], params.get("ratio", 0))
        return F32(1) / found if grid.name == "quotient" else found


def by_row(layout: Layout, shape: Shape, name: str, part: Array) -> Array:
    """A part with an element for every row, however rows share them."""
    share = layout.fit(*shape).parts[name].share[0] * layout.axes[0].per
    return part[np.arange(shape[0]) // share] if len(part) < shape[0] else part


def by_weight(layout: Layout, shape: Shape, name: str, part: Array, cols: int) -> Array:
    """A part with an element for every row and column."""
    across = _across(layout)
    share = layout.fit(*shape).parts[name].share[across] * layout.axes[across].per
    return by_row(layout, shape, name, part)[:, np.arange(cols) // share]


def weight_steps(layout: Layout, shape: Shape, parts: Arrays) -> npt.NDArray[np.int16]:
    """(rows, planes, stored columns) int16."""
    grid, params = layout.grid, dict(layout.grid.params)
    codes = parts["codes"]
    if grid.name == "hif4":
        found = number_steps(params["element"])[codes]
        for name in SHIFTS:
            found = found << by_weight(layout, shape, name, parts[name].astype(np.int64), codes.shape[1])
        return found.astype(np.int16)[:, None]
    if grid.name == "affine_zero":
        zero = by_weight(layout, shape, "zero", parts["zero"].astype(np.int16), codes.shape[1])
        return (codes.astype(np.int16) - zero)[:, None]
    if grid.name == "augmented":
        flat = codes.reshape(codes.shape[:2])
        return number_steps(params["element"]).astype(np.int16)[flat][:, None]
    params.pop("ratio", 0)
    trimmed = codes.reshape(codes.shape[:2]) if grid.name in PLAIN - {"planes"} else codes
    if grid.name in ("levels", "table"):
        numbers = np.array(params["values"], F32)
        return (numbers / F32(unit(numbers))).astype(np.int16)[trimmed][:, None]
    return SPELLINGS[grid.name].read(trimmed, **params).astype(np.int16)


def sources(layout: Layout, shape: Shape, parts: Arrays) -> npt.NDArray[np.int64] | None:
    """Which activation each stored column meets, -1 for none; None if each meets its own.

    Raises
    ------
    LayoutError
        If a permutation does not name each column once.
    """
    found: npt.NDArray[np.int64] | None = None
    if "perm" in parts:
        found = parts["perm"].reshape(-1).astype(np.int64)
        if not np.array_equal(np.sort(found), np.arange(shape[1])):
            raise LayoutError(f"{layout.name}: perm does not name each of {shape[1]} columns once")
    if layout.grid.name == "augmented":
        stored = shape[1] + max(a.plus for a in layout.axes)
        kept = first_copies(stored, layout.grid["residual"], layout.grid["group"])
        spread = np.full(stored, -1, np.int64)
        spread[kept] = np.arange(shape[1]) if found is None else found
        found = spread
    return found


def replaced(layout: Layout, shape: Shape, parts: Arrays) -> tuple[npt.NDArray[np.int64], Floats] | None:
    """Columns that stand beside the codes, and their numbers (rows, n) float32; None if there are none.

    Of a column that is named twice the last counts, as in decoding.
    """
    if "columns" not in parts:
        return None
    columns = places(parts["columns"], shape[1])
    last = {int(c): i for i, c in enumerate(columns)}
    keep = sorted(last.values())
    values = parts["column_values"].reshape(shape[0], columns.size)[:, keep].astype(F32)
    return columns[keep], np.ascontiguousarray(values)
