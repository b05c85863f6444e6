"""Bring a packed tensor into its run-time tiling: the same numbers, nothing rounded.

Most layouts have in their rows the bytes that the tiling has in its lanes; these are moved as memory is read. Other
codes are read, one a byte, and written as the tiling's. The result is what `placement.pack` makes of the tiling's
description, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Final

import numpy as np

from packfmt import fused, minifloat, placement, tilings
from packfmt.errors import LayoutError
from packfmt.layout import BIT, WORD, Component, Layout, Member, Placed, dtype_of
from packfmt.meaning import Meaning, Shape, meaning, weight_steps
from packfmt.placement import Array, Arrays
from packfmt.spellings import F32, SPELLINGS, scales
from packfmt.tilings import CODES, LANES, Tile

Dense = dict[str, Array]

STRIP: Final = 1 << 17  # codes that are read at a time
MANY: Final = 8  # rows of activations
READ: Final = ("affine", "affine_zero", "quotient", "levels", "table", "scaled", "quads", "base3")  # one code a byte
NONE: Final = np.zeros(0, np.uint8)


def retile(layout: Layout, shape: Shape, components: Arrays, batch: int = 1) -> tuple[Layout, Arrays, Tile] | None:
    """The same numbers in a tiling of the layout; None if it has none, or there is no kernel for it.

    batch : rows of activations that most products will have

    Raises
    ------
    LayoutError
        If a component is not what the layout says, or its grid does not fit its parts.
    """
    if not all(shape):
        return None
    for form in tilings.SUFFIXES:  # what a file has is left as it is
        there = tilings.tile(layout, shape, form)
        if there and tilings.same(layout, there.layout):
            return (layout, components, there) if _has_kernel(there) else None
    for form in _forms(batch):
        found = tilings.tile(layout, shape, form)
        if found and _has_kernel(found):
            return found.layout, tiled(layout, shape, components, form), found
    return None


def _has_kernel(tile: Tile) -> bool:
    from packfmt.kernels import lookup_products, tile_products

    if tile.form:
        how = lookup_products.Tiling(tile.form, tile.how.block, tile.how.scale, tile.how.per_row)
        return lookup_products.fits(how, tile.table)
    return tile_products.fits(tile_products.Tiling(*tile.how))


def _forms(batch: int) -> tuple[str, ...]:
    """The forms to try for so many rows of activations, the best first.

    Where an instruction looks up words, decoding a quad once for many rows is faster than a look-up for each.
    """
    from packfmt.kernels import lookup_products

    decoded = batch >= MANY and lookup_products.BEST == "words"
    return ("",) if decoded else (lookup_products.BEST, "")


def becomes(layout: Layout, target: Layout, shape: Shape) -> str | None:
    """The form in which the target is the layout's tiling; None if it is not."""
    forms = [form for form, suffix in tilings.SUFFIXES.items() if target.name == tilings.base(layout.name) + suffix]
    for form in forms if target.name != layout.name else ():
        if (found := tilings.tile(layout, shape, form)) is not None and found.layout == target:
            return form
    return None


def tiled(layout: Layout, shape: Shape, components: Arrays, form: str = "") -> Dense:
    """Components of a layout that has a tiling of this form -> those of the tiling.

    Raises
    ------
    LayoutError
        If a component is not what the layout says, its grid does not fit its parts, or it has no tiling.
    """
    from packfmt.kernels import pages, retile

    of, tile = meaning(layout, shape), tilings.tile(layout, shape, form)
    if of is None or tile is None:
        raise LayoutError(f"{layout.name} has no tiling")
    fitted = tile.layout.fit(*shape)
    out: Dense = {c.name: pages.empty(c.nbytes).view(dtype_of(c.dtype)).reshape(c.shape) for c in fitted.components}
    moves = list(_moves(layout, shape, tile)) if all(shape) and not form else []
    moved = frozenset(part for _, part, *_ in moves)
    read = None if "codes" in moved else _reader(layout, shape, components, tile)
    parts = placement.unpack(layout, shape, components, moved | {"codes"} if read else moved)  # checks all components
    if all(shape):
        _move(moves, layout, shape, components, out)
        if read:
            _write_strips(read, shape[0], tile, out)
        elif "codes" not in moved:
            codes = _codes(layout, shape, tile, parts)
            _write_codes(codes, tile, [_bytes(out[name]) for name in CODES if name in out])
        values = {} if "scale" in moved else {"scale": _scales(layout, shape, parts, of, tile)}
        if "zero" in parts:
            values["zero"] = _spread(parts["zero"], fitted.parts["zero"].shape)
        for name, array in values.items():
            rows = np.ascontiguousarray(array).reshape(shape[0], -1)
            size = rows.itemsize
            if form:
                _bytes(out[name])[:] = _bytes(_side_by_side(rows, tilings.LOOKED_UP).transpose(0, 2, 1).copy())
            else:
                retile.retile(rows.view(np.uint8), retile.Move(_bytes(out[name]), 0, size, size, rows.shape[1], size))
    return out | _others(shape, parts, tile)


def _others(shape: Shape, parts: Arrays, tile: Tile) -> Dense:
    """Components of neither codes nor what counts for a block of them."""
    rest = tuple(c for c in tile.layout.components if c.name not in (*CODES, "scale", "zero"))
    if not rest:
        return {}
    fitted = tile.layout.fit(*shape).parts
    names = {m.name for c in rest if isinstance(c, Component) for m in c.cell}
    others = {name: _spread(parts[name], fitted[name].shape) for name in names}
    return placement.pack(replace(tile.layout, components=rest), shape, others)


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


# ---------------------------------------------------------------- bytes that move


def _moves(layout: Layout, shape: Shape, tile: Tile) -> Iterator[tuple[str, str, int, int, int, int, int]]:
    """What lies in the layout's rows as in the tile's lanes: (component, part, and the numbers of a `retile.Move`)."""
    target = {c.name: c for c in tile.layout.fit(*shape).components}
    groups = -(-shape[0] // LANES)
    for c in layout.fit(*shape).components:
        for m in c.members:
            if m.part not in ("codes", "scale") or (m.part == "codes" and not tile.moved):
                continue
            if m.part == "scale" and not _same_scales(layout, shape, tile):
                continue
            cells = prod(d.size for d in c.over[1:])
            each = m.word * m.words
            size = each * prod(d.size for d in m.units)
            fits = cells * size * LANES * groups == target[m.part].nbytes
            record, unit = c.cell_bytes, 4 if m.part == "codes" else each
            if record == size:  # cells touch
                size, record, cells = size * cells, size * cells, 1
            if fits and size % unit == 0 and _row_by_row(c, m, tile):
                yield c.name, m.part, m.start // 8, size, record, cells, unit


def _same_scales(layout: Layout, shape: Shape, tile: Tile) -> bool:
    """Whether scales keep their bytes."""
    here, there = (which.fit(*shape).parts["scale"] for which in (layout, tile.layout))
    names = [dict(which.grid.params).get("scale") for which in (layout, tile.layout)]
    return here.dtype == there.dtype and names[0] == names[1] and not dict(layout.grid.params).get("ratio")


def _row_by_row(c: Placed, m: Member, tile: Tile) -> bool:
    """Whether a row is one stretch of bytes, in which columns count slowest, then planes, then what makes a run."""
    if not c.over or (c.over[0].axis, c.over[0].stride, c.over[0].reverse) != ("rows", 1, False):
        return False
    rest = [d for d in (*c.over[1:], *m.units) if d.size > 1]
    if any(d.axis == "rows" for d in (*rest, *m.fields)) or any(d.axis in (WORD, BIT) for d in rest):
        return False
    planes = {a.name for a in tile.layout.axes if not a.of}
    run = tile.run if m.part == "codes" else 0
    kinds = [1 if d.axis in planes else 0 if d.stride >= run else 2 for d in rest]
    outer = [d for d, kind in zip(rest, kinds, strict=True) if kind == 0]
    falling = all(a.stride > b.stride for a, b in pairwise(outer)) and not any(d.reverse for d in outer)
    return kinds == sorted(kinds) and falling


def _move(
    moves: list[tuple[str, str, int, int, int, int, int]], layout: Layout, shape: Shape, components: Arrays, out: Dense
) -> None:
    from packfmt.kernels import retile

    stored = layout.fit(*shape).extents["rows"]  # with padding
    for name in {component for component, *_ in moves}:
        source = np.ascontiguousarray(components[name]).view(np.uint8).reshape(stored, -1)[: shape[0]]
        mine = (move[1:] for move in moves if move[0] == name)
        retile.retile(source, *(retile.Move(_bytes(out[part]), *numbers) for part, *numbers in mine))


# ---------------------------------------------------------------- codes that are written anew


def _reader(layout: Layout, shape: Shape, components: Arrays, tile: Tile) -> fused.Reader | None:
    """What reads a code for each weight or quad, as the tile's grid has them; None if no kernel does."""
    if layout.grid.name not in READ or tile.added not in (None, 1):
        return None
    if layout.grid.name == "quads" and tile.added is not None:  # a step for each weight, where the reader has quads
        return None
    reader = fused.reader(layout)
    return reader(shape, components) if reader else None


def _codes(layout: Layout, shape: Shape, tile: Tile, parts: Arrays) -> Array:
    """A code for each weight, or quad, as the tile's grid has them."""
    part = tile.layout.fit(*shape).parts["codes"]
    found = parts["codes"]
    if tile.added is not None:
        found = weight_steps(layout, parts) + np.int16(tile.added)
    elif layout.grid.name == "quads_in_fives":
        from packfmt.kernels import spell

        found = spell.read_fives(np.ascontiguousarray(found))
    return found.astype(dtype_of(part.dtype)).reshape(part.shape)


def _write_strips(read: fused.Reader, rows: int, tile: Tile, out: Dense) -> None:
    """Read codes and write them, a strip of rows at a time, which stays in the cache."""
    from packfmt.kernels import threads

    lanes = tile.lanes
    groups = -(-rows // lanes)
    strings = [_bytes(out[name]).reshape(groups, -1) for name in CODES if name in out]
    step = max(1, STRIP // (lanes * len(tile.order)))

    def work(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            end = min(stop, first + step)
            codes = read(lanes * first, min(rows, lanes * end))
            _write_codes(codes, tile, [string[first:end].reshape(-1) for string in strings])

    threads.spread(work, groups, step)


def _write_codes(codes: Array, tile: Tile, strings: list[Array]) -> None:
    """The tile's strings of codes from one code a byte."""
    from packfmt.kernels import retile

    rows, per = len(codes), 4 if tile.how.widths == (5,) else 1
    flat = codes.view(np.uint8).reshape(rows, tile.how.planes, -1)
    if missing := len(tile.order) // per - flat.shape[2]:
        flat = np.pad(flat, ((0, 0), (0, 0), (0, missing)))
    if tile.form == "words":
        return _write_words(flat[:, 0], strings[0])
    if tile.form:
        return _write_nibbles(flat[:, 0], *strings)
    if tile.how.codes == "quads":
        return retile.pack_quads(flat[:, 0], strings[0])
    runs = flat.reshape(rows, tile.how.planes, -1, tile.run).transpose(0, 2, 1, 3)
    order = tile.order[: tile.run]
    if not np.array_equal(order, np.arange(tile.run)):  # the bytes of other rows of this layout were moved
        runs = runs[..., order]
    retile.pack_planes(runs, strings[0], strings[1] if len(strings) > 1 else NONE, tile.how.widths)


def _side_by_side(rows: Array, lanes: int) -> Array:
    """(rows, n) -> (groups, lanes, n), zeros where rows have ended."""
    padded = np.pad(rows.view(f"u{rows.itemsize}"), ((0, -len(rows) % lanes), (0, 0)))
    return padded.reshape(-1, lanes, rows.shape[1])


def _write_words(codes: Array, string: Array) -> None:
    """Streams of five bits, a word of 32 rows at a time: the dwords of 16 rows, cut in two."""
    from packfmt.kernels import retile

    lanes, quads = tilings.LOOKED_UP, tilings.QUADS
    padded = np.pad(codes, ((0, -len(codes) % lanes), (0, -codes.shape[1] % quads)))
    dwords = np.empty(padded.size // quads * 20, np.uint8)
    retile.pack_quads(padded, dwords)
    cut = dwords.view("<u2").reshape(len(padded) // lanes, 2, -1, LANES, 2).transpose(0, 2, 4, 1, 3)
    groups = cut.reshape(len(cut), -1, lanes)
    string.view("<u2").reshape(len(cut), -1, lanes)[:] = groups[:, : codes.shape[1] // 16 * 5]


def _write_nibbles(codes: Array, low: Array, high: Array) -> None:
    """Four bits of two quads a byte, and fifth bits of eight; row r and row 16 + r side by side."""
    halves = _side_by_side(codes, tilings.LOOKED_UP).reshape(-1, 2, LANES, codes.shape[1])
    pairs = (halves[..., ::2] & 15) | halves[..., 1::2] << 4
    low.reshape(len(halves), -1, LANES, 2)[:] = pairs.transpose(0, 3, 2, 1)
    signs = np.packbits(halves >> 4, axis=-1, bitorder="little")
    high.reshape(len(halves), -1, LANES, 2)[:] = signs.transpose(0, 3, 2, 1)


# ---------------------------------------------------------------- scales


def _scales(layout: Layout, shape: Shape, parts: Arrays, of: Meaning, tile: Tile) -> Array:
    """Scales as they are stored, or the same numbers in the tile's dtype; one for each row, block and plane."""
    wanted = tile.layout.fit(*shape).parts["scale"]
    params, stored, dtype = dict(layout.grid.params), parts["scale"], dtype_of(wanted.dtype)
    named = params.get("scale", "")
    with np.errstate(over="ignore"):
        if params.get("ratio"):
            stored = scales(stored, of.planes, SPELLINGS[layout.grid.name], params["ratio"])
        elif named and dict(tile.layout.grid.params).get("scale") != named:
            stored = minifloat.numbers(named)[stored].astype(dtype)
        elif stored.dtype != dtype:
            stored = stored.astype(F32).astype(dtype)
    planes = [of.planes] if tile.layout.grid.name == "planes" else []
    found = _spread(stored.reshape(stored.shape[0], *planes, -1), (shape[0], *planes, wanted.shape[1 + len(planes)]))
    return np.moveaxis(found, 1, 2) if planes else found  # in the order of the component: blocks, then planes


def _spread(part: Array, shape: tuple[int, ...]) -> Array:
    """A part with one element wherever several positions of the tile share it."""
    for i, n in enumerate(shape):
        if n != part.shape[i]:
            part = np.repeat(part, n // part.shape[i], i)
    return part
