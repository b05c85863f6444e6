"""Decode in one pass, for the many layouts that are simple enough.

`grids.decode` makes an array of every part and computes on those. Here a kernel reads a row's codes
and writes its numbers, by the same formula and to the same bits. Which kernel, and the tables that tell
it where the codes lie, follow from the layout's structure, never from its name: so it also serves
layouts that a file brings with it. What does not fit goes the general way.

A large tensor is worth a loop that is written out for its layout (`kernels.cells`), if one can be; other tensors are
decoded by loops that read tables (`kernels.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from packfmt import grids, outliers
from packfmt.errors import LayoutError
from packfmt.fused.formulas import Formula, formula_of
from packfmt.fused.scales import Scaling, scales_of
from packfmt.fused.where import Ints, Source, Unfit, flattened, source_of, unpacked
from packfmt.kernels import threads
from packfmt.kernels.places import LINE, Scales
from packfmt.layout import Layout, Values, dtype_of
from packfmt.placement import Array, Arrays, unpack

if TYPE_CHECKING:
    from packfmt.kernels.cells import Loop

F32, BYTE = np.dtype(np.float32), np.dtype(np.uint8)
Decoder = Callable[[tuple[int, int], Arrays, Array, bool], bool]  # shape, components, out, through

LEAST_WEIGHTS: Final = 1 << 19  # worth a thread: a tenth of a millisecond
LEAST_WRITTEN: Final = 1 << 16  # worth a loop of their own layout, which it takes half a second to compile, once
STRIP: Final = 1 << 18  # weights computed at a time, in the cache
WIDENED: Final = ("<f4", "<f2", "bfloat16")  # what a kernel widens to float32
MOST_SHAPES: Final = 64  # of one layout, that are known by heart
LEAST_THROUGH: Final = 1 << 23  # bytes of weights that would not stay in the cache, and are written past it


def decode(
    layout: Layout, shape: tuple[int, int], components: Arrays, out: Array | None = None, fresh: bool = False
) -> Array:
    """Components -> (rows, cols) float32, as `grids.decode` gives it, bit for bit.

    out : C-contiguous (rows, cols) to write to, instead of a new array: float32, or bfloat16, to which the numbers
        are then rounded, half to even
    fresh : whether nobody has touched the pages of `out`: the system then clears them in the cache, and to write
        them past it takes longer

    Raises
    ------
    LayoutError
        If a component is not what the layout says, its grid does not fit its parts, or `out` is
        another array than this.
    """
    if out is None and layout.sparse:
        return _with_outliers(layout, shape, components, np.empty(shape, F32))
    if out is None:
        target = np.empty(shape, F32)
        run = decoder(layout)
        return target if run and run(shape, components, target, False) else grids.decode(layout, shape, components)
    narrow = out.dtype != F32
    if out.shape != shape or not out.flags.carray or (narrow and out.dtype.name != "bfloat16"):
        raise LayoutError(f"out is {out.dtype} {out.shape}, needs a writable C-contiguous float32 or bfloat16 {shape}")
    if layout.sparse:
        return _with_outliers(layout, shape, components, out)
    through, target = out.nbytes >= LEAST_THROUGH and not fresh, out.view(np.uint16) if narrow else out
    run = decoder(layout)
    if not run or not run(shape, components, target, through):
        _convert(grids.decode(layout, shape, components), target, through)
    return out


def _with_outliers(layout: Layout, shape: tuple[int, int], components: Arrays, out: Array) -> Array:
    apart = outliers.names(layout)
    dense = {name: array for name, array in components.items() if name not in apart}
    weights = decode(outliers.without(layout), shape, dense, out if out.dtype == F32 else None)
    outliers.combine(layout, shape, components, weights)
    if out.dtype != F32:
        _convert(weights, out.view(np.uint16), False)
    return out


def _convert(numbers: Array, out: Array, through: bool) -> None:
    """Plain numbers to float32, or to the bits of bfloat16, on all threads."""
    from packfmt.kernels import floats

    source, target = numbers.reshape(-1), out.reshape(-1)

    def work(start: int, stop: int) -> None:
        each = slice(start * LEAST_WEIGHTS, stop * LEAST_WEIGHTS)
        floats.convert(source[each], target[each], through)

    if out.size:
        threads.spread(work, -(-out.size // LEAST_WEIGHTS))


@lru_cache(maxsize=256)
def decoder(layout: Layout) -> Decoder | None:
    """What writes the numbers of a tensor of this layout; None if no kernel fits.

    run(shape, components, out, through) -> whether it did: not if the tensor is empty, a component is not what
    the layout says, or it cannot tell which bits a NaN has. `out` is C-contiguous (rows, cols) float32, or uint16, the
    bits of bfloat16; `through` writes it past the cache, which pays where it is large, and its pages have been
    touched before.
    """
    if layout.axes[0].of != "rows":  # which `grids.decode` refuses
        return None
    if layout.grid.name == "plain":
        return _dense(layout)
    try:
        flat, planes = flattened(layout)
        formula = formula_of(flat, planes)
        source, scales = source_of(flat, layout, planes), scales_of(flat, layout, planes)
    except (Unfit, LayoutError, KeyError, TypeError, ValueError, OverflowError, IndexError):
        return None
    # hashing a layout takes longer than decoding a small tensor, so this is remembered here
    described = lru_cache(maxsize=64)(partial(_described, layout))
    written = lru_cache(maxsize=64)(partial(_written, source, formula))
    straight: dict[Any, Straight] = {}
    permuted = any(m.name == "perm" for _, m, _ in layout.members())
    direct = not layout.hadamard and not permuted

    def run(shape: tuple[int, int], components: Arrays, out: Array, through: bool = False) -> bool:
        rows, cols = shape
        past = through and direct and out.ctypes.data % LINE == 0 and cols * out.itemsize % LINE == 0
        which = shape, out.itemsize, past
        if (quickly := straight.get(which)) and (done := quickly.run(components, out)) is not None:
            return done
        if not rows or not cols or not _is_as(described(shape), components):
            return False
        records, scaling = source.records(shape, components), scales(shape, components)
        order = _inverse(unpacked(layout, shape, components, "perm")) if permuted else None
        if records is None or not scaling or not formula.fits(cols, scaling.groups) or (permuted and order is None):
            return False
        loop, unclear = None, list[int]()
        if rows * cols >= LEAST_WRITTEN:
            narrow = direct and out.dtype != F32
            group = cols * formula.planes // scaling.groups
            loop = written(records.shape[1], group, scaling.lies[:3], narrow, past)
        if loop and direct and (found := _straight(loop, components, records, scaling)):
            if len(straight) >= MOST_SHAPES:
                straight.clear()
            straight[which] = found
            return bool(found.run(components, out))

        def strip(start: int, stop: int, target: Array) -> None:
            mine = records[start:stop]
            if loop:
                clear = scaling.loop_on(loop, mine, start, target)
            else:
                tables = {} if scaling.which is None else {"which": scaling.which(start, stop)}
                numbers = scaling.numbers(start, stop)
                clear = formula.write(mine, source.places(mine.shape[1]), numbers, target, **tables)
            if clear is False:
                unclear.append(start)
            if layout.hadamard:
                _hadamard(target, layout.hadamard)

        kept = not (loop and direct) and (through or out.dtype != F32 or permuted)
        step = rows if loop and direct and scaling.stored is not None else max(1, STRIP // cols)
        work = partial(_by_strips, strip, out, step, kept, through, order)
        threads.spread(work, rows, -(-LEAST_WEIGHTS // cols))
        return not unclear

    return run


class Straight(NamedTuple):
    """A loop that reads the components as they are, for tensors of one shape.

    Few steps lead to it: after every large tensor nothing of Python is in the cache, and each step waits for memory.
    """

    loop: Loop
    codes: str
    scale: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    lies: Scales

    def run(self, components: Arrays, out: Array) -> bool | None:
        """Whether it is clear what NaNs there are; None if a component is not what it was."""
        records, stored = components.get(self.codes), components.get(self.scale)
        for array, shape in zip((records, stored), self.shapes, strict=True):
            if array is None or array.shape != shape or array.dtype != BYTE or not array.flags.c_contiguous:
                return None
        assert records is not None and stored is not None
        rows, cols = out.shape
        if rows * cols < 2 * LEAST_WEIGHTS:
            return self.loop(records, stored, self.lies, out)
        unclear: list[int] = []

        def work(start: int, stop: int) -> None:
            if not self.loop(records[start:stop], stored, self.lies, out[start:stop], start):
                unclear.append(start)

        threads.spread(work, rows, -(-LEAST_WEIGHTS // cols))
        return not unclear


def _straight(loop: Loop, components: Arrays, records: Array, scaling: Scaling) -> Straight | None:
    """None if components are not read as they are, or there are more than those that are read."""
    stored, found = scaling.stored, {id(array): name for name, array in components.items()}
    if stored is None or id(records) not in found or id(stored) not in found:
        return None
    codes, scale = found[id(records)], found[id(stored)]
    if {codes, scale} < components.keys():
        return None
    return Straight(loop, codes, scale, (records.shape, stored.shape), scaling.lies)


def _written(
    source: Source, formula: Formula, nbytes: int, group: int, spacing: tuple[str, int, int], narrow: bool, past: bool
) -> Loop | None:
    """The loop that is written out for a layout; None if there is none. nbytes : of a row's codes"""
    from packfmt.kernels import cells

    count = formula.codes(group)
    if not formula.numbers or not (places := source.cell(nbytes, count)):
        return None
    return cells.loop(places, count, spacing, cells.Way(*formula.way), formula.numbers, narrow, past)


def _by_strips(
    strip: Callable[[int, int, Array], None],
    out: Array,
    step: int,
    kept: bool,
    through: bool,
    order: Ints | None,
    start: int,
    stop: int,
) -> None:
    """Compute rows a strip at a time, which if `kept` stays in the cache until it is done."""
    if not kept and step >= stop - start:
        return strip(start, stop, out[start:stop])
    from packfmt.kernels import blocks, floats

    rooms = np.empty((2 if order is not None else 1, min(step, stop - start), out.shape[1]), F32) if kept else out[:0]
    for first in range(start, stop, step):
        end = min(stop, first + step)
        if not kept:
            strip(first, end, out[first:end])
            continue
        mine = rooms[0, : end - first]
        strip(first, end, mine)
        if order is not None:
            blocks.take(mine, order, rooms[1, : end - first])
            mine = rooms[1, : end - first]
        floats.convert(mine.reshape(-1), out[first:end].reshape(-1), through)


def _dense(layout: Layout) -> Decoder | None:
    """`decoder` for plain numbers."""
    if layout.hadamard or layout.grid.params or len(layout.components) != 1 or layout.streams:
        return None
    (dtype,) = {m.dtype for _, m, _ in layout.members() if isinstance(m, Values)} or {""}
    if dtype not in WIDENED or layout.axes[0].of != "rows" or layout.axes[0].per != 1:
        return None

    def run(shape: tuple[int, int], components: Arrays, out: Array, through: bool = False) -> bool:
        if not out.size or not _is_as(_described(layout, shape), components):
            return False
        (only,) = layout.fit(*shape).components
        if layout.fit(*shape).parts.keys() != {"values"} or prod(only.shape) != out.size:
            return False  # a description from a file may say anything
        plain = np.ascontiguousarray(components[only.name])
        in_order = [(d.axis, d.stride) for d in only.over] == [(a.name, 1) for a in layout.axes]
        numbers = plain if in_order else np.ascontiguousarray(unpack(layout, shape, components)["values"])
        _convert(numbers.view(np.uint16) if dtype == "bfloat16" else numbers, out, through)
        return True

    return run


def _described(layout: Layout, shape: tuple[int, int]) -> dict[str, Any]:
    """Shape and dtype of every component."""
    return {c.name: (c.shape, dtype_of(c.dtype)) for c in layout.fit(*shape).components}


def _inverse(perm: Array) -> Ints | None:
    """Where each column is stored; None if the permutation is none."""
    stored = perm.reshape(-1).astype(np.int64)
    order = np.argsort(stored, kind="stable")
    return order if np.array_equal(stored[order], np.arange(stored.size)) else None


def _hadamard(weights: Array, size: int) -> None:
    from packfmt.kernels import hadamard

    hadamard.transform(weights, size)


def _is_as(described: dict[str, Any], components: Arrays) -> bool:
    """Whether components have the shapes and dtypes that a layout describes."""
    for name, wanted in described.items():
        found = components.get(name)
        if found is None or (found.shape, found.dtype) != wanted:
            return False
    return True
