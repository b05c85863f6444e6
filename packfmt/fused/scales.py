"""The scales of a layout: where they lie, or what they are for any rows.

They are of any float dtype, or codes of a number format, and may be shared by rows; one number may scale the whole
tensor. Scales that lie in no cells are unpacked first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import minifloat
from packfmt.fused.where import Bytes, Cells, Unfit, addresses, bytes_of, cells_of, check, stretch_of, unpacked
from packfmt.kernels.places import ALL, NBYTES, Scales
from packfmt.layout import Layout, Values, dtype_of
from packfmt.placement import Array, Arrays

if TYPE_CHECKING:
    from packfmt.kernels.cells import Loop

F32 = np.float32
Floats = npt.NDArray[np.float32]
Ranged = Callable[[int, int], Array]  # first row, end -> what belongs to these rows

DOUBLED: Final = ("shift8", "shift4")
GLOBAL: Final = {"times": np.multiply, "divides": np.divide}  # what a scale of the whole tensor does to others
NOTHING: Final = np.ones(1, F32)  # a table that nobody looks at
AS_FLOATS: Final = Scales("<f4", 4, 1, 0, 1, NOTHING)


class Scaling(NamedTuple):
    """The scales of one tensor, for rows of it."""

    numbers: Ranged  # (rows or 1, groups) float32
    groups: int
    which: Ranged | None = None  # (rows or 1, groups) uint8, which table counts
    stored: Bytes | None = None  # where a loop that is written out can read them, and how they lie there
    lies: Scales = AS_FLOATS

    def loop_on(self, loop: Loop, records: Bytes, start: int, out: Array) -> bool:
        """Decode rows from `start` on by a loop that is written out."""
        if self.stored is not None:
            return loop(records, self.stored, self.lies, out, start)
        numbers = self.numbers(start, start + len(records))
        lies = AS_FLOATS if len(numbers) > 1 else AS_FLOATS._replace(share=ALL)
        return loop(records, numbers.reshape(len(numbers), -1).view(np.uint8), lies, out)


def scales_of(flat: Layout, layout: Layout, planes: int) -> Callable[[tuple[int, int], Arrays], Scaling | None]:
    """What gives the scales of a tensor.

    Raises
    ------
    Unfit
        If they are no scales of one number a group.
    """
    whole, dtype = _whole(flat), dtype_of(flat.fit(flat.block["rows"], flat.block["cols"]).parts["scale"].dtype)
    size = dtype.itemsize
    raw, table, name = np.dtype(f"<u{size}"), _table(flat, dtype), flat.grid.name
    combine = GLOBAL.get(dict(layout.grid.params).get("global_scale", ""))
    ratio = dict(layout.grid.params).get("ratio", 0)
    tied = np.array([ratio**n for n in range(planes - 1, -1, -1)], F32)
    kind = "table" if table is not None else dtype.str if dtype.kind == "f" else dtype.name
    read_there = kind in NBYTES and name not in ("either", "hif4") and (kind == "table" or not combine) and not ratio
    cells: Cells | None = None
    offset, stretch = 0, stretch_of(flat, planes)
    try:
        cells = cells_of(flat, "scale")
        (m,) = cells.members
        at = addresses(cells, m)
        check(m.bits == 8 * size and m.low == 0 and at[0] % 8 == 0 and (np.diff(at) == m.bits).all())
        offset = int(at[0]) // 8
    except Unfit:
        check(planes == 1)
        cells = None
    check(name != "either" or (dtype.name.startswith("float8") and table is not None))
    check(planes == 1 or (cells and cells.count == (1 if ratio else planes)))  # in the order of the codes

    @lru_cache(maxsize=64)
    def tables(factor: float) -> Floats | None:
        """The numbers of scales of one byte with that of the tensor."""
        with np.errstate(all="ignore"):
            return combine(table, F32(factor)) if combine and table is not None else table

    def find(shape: tuple[int, int], components: Arrays) -> Scaling | None:
        rows, cols = shape
        factor = F32(1)
        if whole:
            factor = components[whole].reshape(-1).astype(F32)[0]
        if factor != factor:
            return None  # which NaN survives is the processor's choice
        if cells:
            share, each, count = cells.rows, cells.nbytes, cells.count
            if cells.cols and cols * stretch % cells.cols:
                return None  # the last scale is cut off at the edge
            stored = bytes_of(components[cells.component], -(-rows // share) if share else 1)
        else:
            part = layout.fit(*shape).parts["scale"]
            share, each, count = part.share[0] if part.shape[0] > 1 else 0, size, 1
            if (
                prod(part.shape[2:]) != 1
                or cols % part.shape[1]
                or (part.shape[1] > 1 and part.share[1] * part.shape[1] != cols)
            ):
                return None
            stored = bytes_of(unpacked(layout, shape, components, "scale"), part.shape[0])
        if stored is None:
            return None
        values = table if combine is None else tables(float(factor))

        def few(mine: Bytes) -> Array:
            """As they are stored."""
            strides = (mine.shape[1], each, size)
            found = np.ndarray((len(mine), mine.shape[1] // each, count), raw, mine, offset, strides)
            return np.ascontiguousarray(found).reshape(len(mine), -1)

        def scales(mine: Bytes) -> Floats:
            from packfmt.kernels import blocks

            with np.errstate(all="ignore"):
                if values is not None:
                    return blocks.look_up(mine, each, offset, count, values)
                found = _widened(few(mine), dtype)
                found = combine(found, factor) if combine else found
                return (found[..., None] * tied).reshape(len(mine), -1) if ratio else found

        def ranged(function: Callable[[Bytes], Array]) -> Ranged:
            def by_row(start: int, stop: int) -> Array:
                if not share:
                    return function(stored)
                first = start // share
                found = function(stored[first : -(-stop // share)])
                return found if share == 1 else found[np.arange(start, stop) // share - first]

            return by_row

        groups = stored.shape[1] // each * count * (planes if ratio else 1)
        if name == "either":
            return Scaling(ranged(scales), groups, ranged(lambda mine: few(mine) >> 7))
        if name == "hif4":
            return _doubled(layout, shape, components, ranged(scales), groups)
        there = NOTHING if values is None else values
        if not read_there:
            return Scaling(ranged(scales), groups)
        return Scaling(ranged(scales), groups, None, stored, Scales(kind, each, count, offset, share or ALL, there))

    return find


def _whole(layout: Layout) -> str:
    """The component that holds one scale for the whole tensor; empty if there is none."""
    homes = [(c, m) for c, m, _ in layout.members() if m.name == "global_scale"]
    how = dict(layout.grid.params).get("global_scale", "")
    check(how in GLOBAL if homes else how == "")
    if not homes:
        return ""
    ((home, member),) = homes
    check(not home.over and len(home.cell) == 1 and isinstance(member, Values) and not member.digits)
    return home.name


def _widened(stored: Array, dtype: np.dtype[Any]) -> Floats:
    """Whole numbers of the dtype's size, the bits of its numbers, as float32."""
    if dtype.name not in ("float16", "bfloat16"):
        return stored.view(dtype).astype(F32)
    from packfmt.kernels import floats

    out = np.empty(stored.shape, F32)
    numbers = stored.view(dtype) if dtype.name == "float16" else stored
    floats.convert(numbers.reshape(-1), out.reshape(-1))
    return out


def _doubled(layout: Layout, shape: tuple[int, int], components: Arrays, scales: Ranged, groups: int) -> Scaling | None:
    """Scales of every four columns, by the bits that double them."""
    eights, fours = (unpacked(layout, shape, components, part) for part in DOUBLED)
    rows, cols = shape
    if eights.shape != (rows, cols // 8) or fours.shape != (rows, cols // 4) or cols % (8 * groups):
        return None

    def by_row(start: int, stop: int) -> Array:
        from packfmt.kernels import blocks

        mine = np.broadcast_to(scales(start, stop), (stop - start, groups))
        return blocks.doubled(mine, eights[start:stop], fours[start:stop])

    return Scaling(by_row, cols // 4)


def _table(layout: Layout, dtype: np.dtype[Any]) -> Floats | None:
    """The numbers of scales of one byte; None if they have more."""
    if layout.grid.name == "table":
        check(dtype == np.uint8)
        with np.errstate(over="ignore"):
            return np.ldexp(F32(1), np.arange(256, dtype=np.int32) - layout.grid["exponent"])  # type: ignore[no-any-return]
    if layout.grid.name in ("scaled", "hif4") and layout.grid["scale"]:
        found = minifloat.numbers(layout.grid["scale"])
        check(dtype == np.uint8 and len(found) == 256)
        return found
    codes = np.arange(256, dtype=np.uint8) & np.uint8(127 if layout.grid.name == "either" else 255)
    return codes.view(dtype).astype(F32) if dtype.itemsize == 1 else None
