"""Which kernel a layout's grid has, and the numbers that its codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from packfmt import minifloat
from packfmt.fused.scales import DOUBLED, Floats
from packfmt.fused.where import Bytes, check
from packfmt.kernels.places import Places
from packfmt.layout import Layout, dtype_of
from packfmt.placement import Array

if TYPE_CHECKING:
    from packfmt.kernels.blocks import Numbers

F32 = np.float32
PARAMETERS: Final = {
    "affine": {"zero"},
    "quotient": {"zero"},
    "plane_digits": {"count", "ratio"},
    "levels": {"values"},
    "table": {"values", "exponent"},
    "scaled": {"element", "scale", "global_scale"},
    "either": {"element", "other", "global_scale"},
    "hif4": {"element", "scale"},
    "quads": {"stride", "values"},
    "quads_in_fives": {"stride", "values"},
    "base3": {"block", "runs", "first"},
}
PARTS: Final = {"codes", "scale", "global_scale", "perm"}


@dataclass(frozen=True, slots=True)
class Formula:
    """The kernel of a layout's grid."""

    write: Callable[..., Any]  # records, places, scale, float32 out -> False if it cannot tell
    planes: int
    unit: int = 1  # what columns that share a scale must be a multiple of
    numbers: Numbers | None = None  # what codes stand for, if a loop may be written out
    way: tuple[str, int, int] = ("times", 1, 1)  # `cells.Way`
    codes: Callable[[int], int] = lambda group: group  # how many stand for so many columns

    def fits(self, cols: int, groups: int) -> bool:
        groups //= self.planes
        return groups > 0 and cols % groups == 0 and cols // groups % self.unit == 0


def formula_of(layout: Layout, planes: int) -> Formula:
    """How codes become numbers.

    Raises
    ------
    Unfit
        If there is no kernel, or the parameters are not what the grid takes.
    """
    name, params = layout.grid.name, dict(layout.grid.params)
    extra = set(DOUBLED) if name == "hif4" else set()
    found = {m.name for _, m, _ in layout.members()}
    check(not layout.streams and {"codes", "scale"} | extra <= found <= PARTS | extra)
    part = layout.fit(layout.block["rows"], layout.block["cols"]).parts["codes"]
    check(name in PARAMETERS and set(params) == PARAMETERS[name])
    inner = 1 if name in ("base3", "quads_in_fives") else 0
    check(len(layout.axes) == 2 + inner and layout.axes[1].per == (4 if name == "quads" else 1))
    if name in ("quads", "quads_in_fives"):
        return _quads(part.dtype, part.bits, params["stride"], np.array(params["values"]), name)
    check(part.bits <= 8)
    from packfmt.kernels import blocks

    way = "times"
    if name in ("affine", "quotient", "base3"):
        zero = F32(params.get("zero", 1))
        check(part.dtype in ("u1", "i1"))
        codes = np.arange(1 << part.bits, dtype=np.uint8).view(part.dtype)
        values, way = codes.astype(F32) - zero, "divides" if name == "quotient" else "times"
        if name == "base3":
            check(part.dtype == "u1")
            runs = params["runs"]
            check(all(type(n) is int and type(d) is int and n > 0 and 1 <= d <= 5 for n, d in runs))
            check(sum(n * d for n, d in runs) == params["block"] == part.share[1])
            check(sum(n for n, _ in runs) == part.shape[2] and params["first"] in ("high", "low"))
            values = np.arange(-1, 2).astype(F32)
    elif name == "plane_digits":
        check(part.dtype == "u1" and part.bits <= 4)
        codes = np.arange(1 << part.bits)
        values = np.stack([codes // 3 ** (planes - 1 - p) % 3 - 1 for p in range(planes)]).astype(F32)
        way = "digits"
    elif name == "either":
        check(part.dtype == "u1")
        values = np.stack([minifloat.numbers(params[which])[: 1 << part.bits] for which in ("element", "other")])
        way = "which"
    elif name in ("scaled", "hif4"):
        check(dtype_of(part.dtype).itemsize == 1)
        values = minifloat.numbers(params["element"])
    else:
        check(part.dtype == "u1")  # a negative code is no place in a table
        found_values = np.array(params["values"])
        check(found_values.dtype.kind in "if")
        values = np.array(params["values"], F32)
    check(values.ndim == (2 if way in ("digits", "which") else 1))
    check(values.shape[-1] >= 1 << part.bits or name == "base3")
    numbers = blocks.numbers_of(values[..., : 1 << part.bits])
    check(way in ("times", "which") or numbers.kind == blocks.LOOKED_UP)

    def write(records: Bytes, places: Places, scale: Floats, out: Array, **options: Any) -> bool:
        return bool(blocks.decode(records, places, scale, out, numbers, way, planes, **options))

    if way == "which":
        return Formula(write, planes)
    if way == "times" and planes > 1:
        return Formula(write, planes, 1, numbers, ("planes", planes, 1), lambda group: planes * group)
    return Formula(write, planes, 1, numbers, (way, planes, 1))


def _quads(dtype: str, bits: int, stride: Any, values: Array, name: str) -> Formula:
    """The formula of codes that stand for four weights."""
    check(type(stride) is int and stride > 0 and values.dtype.kind == "i" and values.shape[1:] == (4,))
    check(len(values) <= 81 and values.min() >= -1 and values.max() <= 1)
    fives = name == "quads_in_fives"
    check((dtype == "<u2" and len(values) >= 32) if fives else (dtype == "u1" and len(values) >= 1 << bits))
    from packfmt.kernels import blocks

    steps = values[: 32 if fives else 1 << bits].astype(F32)

    def write(records: Bytes, places: Places, scale: Floats, out: Array, **options: Any) -> None:
        blocks.quads(records, places, scale, out, steps, stride, **options)

    lanes = np.zeros((4, 32), F32)
    if len(steps) > 32:
        return Formula(write, 1, 4 * stride)
    lanes[:, : len(steps)] = steps.T
    return Formula(write, 1, 4 * stride, blocks.looked_up(lanes), ("quads", 1, stride), lambda group: group // 4)
