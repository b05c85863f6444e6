"""Bring a packed tensor into its run-time tiling: the same numbers, nothing rounded.

Every digit of a description belongs to one axis, so where a bit lies is the sum of what its row and its column say.
What a run of columns needs is the same in all rows and, some bytes on, in all runs; `kernels.retile` has programs for
that. Parts whose bits do not tell are computed first, and go the same way. The result is what `placement.pack` makes of
the tiling's description, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache
from itertools import accumulate, combinations, pairwise
from math import lcm, prod
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import minifloat, placement, tilings
from packfmt.errors import LayoutError
from packfmt.layout import Component, Fitted, Layout, dtype_of
from packfmt.meaning import SHIFTS, Shape, by_weight, weight_steps
from packfmt.placement import CODE_BITS, Array, Arrays
from packfmt.spellings import F32, SPELLINGS, scales
from packfmt.tilings import CODES, Tile

if TYPE_CHECKING:
    from packfmt.kernels.retile import Program

Dense = dict[str, Array]
Ints = npt.NDArray[np.int64]

MANY: Final = 8  # rows of activations
PARTS: Final = ("codes", "scale", "zero")  # that lie in tiles
PAIR: Final = 32  # rows that a program reads at a time
VECTOR: Final = 512  # bits
ENOUGH: Final = 1 << 10  # bits that make a run worth starting
MOST_RUN: Final = 1 << 11  # columns
MOST_BITS: Final = 1 << 18  # that are left over
MOST_CUTS: Final = 16  # between rows that begin at the same bit of a byte
NO_LOW: Final = np.zeros(1, np.int64)
BYTES: Final = np.arange(256)
HELD: Final = 6  # bytes that the way back to HiF4 holds for a weight, beside the components
EIGHT_ONE: Final = np.array([8, 1])  # of (bytes, bits), to bits


class Untiled(LayoutError):
    """A description, such as a file may bring, for whose tiles there is no program."""


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
            with suppress(Untiled):
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


def comes_from(layout: Layout, target: Layout, shape: Shape) -> bool:
    """Whether the layout is the tiling of a HiF4, and the target is this one: its way back is here (`untiled`)."""
    return target.grid.name == "hif4" and becomes(target, layout, shape) is not None


def condition(target: Layout) -> str:
    """What must be true of a tiling's numbers for the way back to HiF4, in words."""
    return f"all weights that share a doubling there have it, and every scale is a {target.grid['scale']}"


def untiled(layout: Layout, target: Layout, shape: Shape, components: Arrays) -> Dense:
    """Components of HiF4's tiling -> HiF4's, where a bit doubles several weights.

    Raises
    ------
    LayoutError
        If only some of the weights are doubled that share a bit, HiF4 has not got a scale, or a component is not
        what the layout says.
    """
    parts, here = placement.unpack(layout, shape, components), target.fit(*shape).parts
    codes, bits, where = parts["codes"], here["codes"].bits, f"{layout.name} to {target.name}"
    found = {"codes": codes & np.uint8((1 << bits) - 1)}
    for i, shift in enumerate(SHIFTS):
        doubled, groups = codes >> np.uint8(bits + i) & np.uint8(1), np.arange(here[shift].shape[1])
        of = by_weight(target, (1, shape[1]), shift, groups[None], codes.shape[1])[0]
        found[shift] = doubled[:, np.searchsorted(of, groups)]
        if (apart := found[shift][:, of] != doubled).any():
            row, column = np.argwhere(apart)[0].tolist()
            raise LayoutError(f"{where}: column {column} of row {row} is not doubled as its neighbours are ({shift})")
    numbers = _as_floats(target.grid["scale"], layout.fit(*shape).parts["scale"].dtype)
    known, scale = (array.view(f"<u{numbers.itemsize}") for array in (numbers, parts["scale"]))
    order = np.argsort(known)
    found["scale"] = order[np.searchsorted(known[order], scale).clip(max=len(known) - 1)].astype(np.uint8)
    if (lost := known[found["scale"]] != scale).any():
        at = np.argwhere(lost)[0].tolist()
        raise LayoutError(f"{where}: scale {at} is {parts['scale'][tuple(at)]}, which is no {target.grid['scale']}")
    return placement.pack(target, shape, {name: part.reshape(here[name].shape) for name, part in found.items()})


def tiled(layout: Layout, shape: Shape, components: Arrays, form: str = "") -> Dense:
    """Components of a layout that has a tiling of this form -> those of the tiling.

    Raises
    ------
    LayoutError
        If a component is not what the layout says, its grid does not fit its parts, or it has no tiling.
    """
    from packfmt.kernels import pages

    tile = tilings.tile(layout, shape, form)
    if tile is None:
        raise LayoutError(f"{layout.name} has no tiling")
    fitted = tile.layout.fit(*shape)
    sizes = [-(-c.nbytes // pages.LINE) * pages.LINE for c in fitted.components]
    room = pages.empty(sum(sizes))  # one stretch: so small components, too, lie on large pages
    out: Dense = {
        c.name: room[begin : begin + c.nbytes].view(dtype_of(c.dtype)).reshape(c.shape)
        for c, begin in zip(fitted.components, accumulate(sizes, initial=0), strict=False)
    }
    plan = _planned(layout, shape, form) if all(shape) else None
    parts = placement.unpack(layout, shape, components, plan.found if plan else frozenset())  # checks all components
    if plan:
        computed = {
            f"its {part}": compute(layout, shape, parts, tile)
            for part, compute in (("codes", _codes), ("scale", _scales), ("zero", _zeros))
            if part in fitted.parts and part not in plan.found
        }
        _write(plan, {**components, **computed}, shape, tile, out)
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


# ---------------------------------------------------------------- plans


class Pass(NamedTuple):
    """A program for runs of columns of some rows, and of others that have bits in the same bytes.

    rows : first of each of these, of which there are `each`
    arrays : what is read: name, the byte from which those of each row of the first count on, bytes from a run to the
        next
    strings : (component of the tiling, byte of a group where the first run goes, bytes of a run), for each of `rows`
    """

    program: Program
    rows: tuple[int, ...]
    each: int
    arrays: tuple[tuple[str, Ints, int], ...]
    times: int
    strings: tuple[tuple[str, int, int], ...]


class Plan(NamedTuple):
    """All that bringing a weight into its tiling takes.

    found : parts that are read where they are stored; others come from arrays called "its <part>", which hold a row of
        elements as the tiling's grid has them
    """

    found: frozenset[str]
    passes: tuple[Pass, ...]


@lru_cache(maxsize=64)
def _planned(layout: Layout, shape: Shape, form: str) -> Plan:
    tile = tilings.tile(layout, shape, form)
    assert tile
    here, there = layout.fit(*shape), tile.layout.fit(*shape)
    wanted = [part for part in PARTS if part in there.parts]
    origins = {part: origin for part in wanted if (origin := _origin(part, here, there, tile))}
    stored = {part: field for part, origin in origins.items() if (field := _field(part, there, tile, origin))}
    computed = cache(lambda part: _field(part, there, tile, _computed(part, there)))
    # all that is stored, or else less and less: what is first counts most
    for found in ([part for part in stored if part not in without] for without in _fewer(list(stored))):
        fields = [stored[part] if part in found else computed(part) for part in wanted]
        if plan := _passes(fields, shape, there, tile):
            return Plan(frozenset(found) | frozenset(SHIFTS if "codes" in found else ()), plan)
    raise Untiled(f"{layout.name}: no program brings a weight of {shape} into tiles")


def _fewer(parts: list[str]) -> Iterator[tuple[str, ...]]:
    """What to leave out of them: nothing, the last, the one before, both ... all."""
    for count in range(len(parts) + 1):
        yield from combinations(parts[::-1], count)


def _write(plan: Plan, arrays: Arrays, shape: Shape, tile: Tile, out: Dense) -> None:
    from packfmt.kernels import retile

    lanes, units = tile.lanes, _units(tile.layout.fit(*shape), tile)
    names = {name for one in plan.passes for name, *_ in one.arrays}
    flat = {name: np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name in names}
    groups = {name: out[name].reshape(-1).view(np.uint8).reshape(-(-shape[0] // lanes), -1) for name in units}
    for one in plan.passes:
        sources = [retile.Source(flat[name], begins, record) for name, begins, record in one.arrays]
        targets = [
            retile.Target(mine[:, at : at + one.times * size], lanes, *units[name])
            for first in one.rows
            for name, at, size in one.strings
            for mine in [groups[name][first // lanes : -(-(first + one.each) // lanes)]]
        ]
        retile.rearrange(one.program, sources, one.times, targets)


def _units(there: Fitted, tile: Tile) -> dict[str, tuple[int, bool]]:
    """How rows lie side by side in the tiling's components: `unit` and `woven` of `kernels.retile.Target`."""
    codes = {"": (4, False), "words": (2, False), "nibbles": (1, True)}[tile.form]
    return {
        c.name: codes if c.name in CODES else (c.cell_bytes // tile.lanes, False)
        for c in there.components
        if {m.part for m in c.members} & {*PARTS}
    }


# ---------------------------------------------------------------- where bits lie


class Found(NamedTuple):
    """Where a part lies: bit i of an element of a row is at rows[array][row] + bits[element, i] of array which[i]."""

    which: tuple[str, ...]
    rows: dict[str, Ints]
    bits: Ints


class Origin(NamedTuple):
    """Where the bits are of which elements are made, and how: `table` and `low` of `kernels.retile.Wanted`."""

    found: Found
    table: Array | None = None
    low: Ints = NO_LOW


class Field(NamedTuple):
    """Where the elements of a part come from and where they go, by planes and by positions along a row.

    bits : (planes, positions, bits of the origin)
    to : (planes, positions, bits of an element), in the bytes of a group
    string : the tiling's component that has bit i of an element
    low : (planes, positions)
    cols : columns of a position; 0: one position serves all
    """

    origin: Origin
    bits: Ints
    to: Ints
    string: tuple[str, ...]
    low: Ints
    cols: int


def _stored(fitted: Fitted, part: str) -> Found | None:
    """The bits of a part in the components; None if rows and bits do not just add up."""
    sides = [
        (c.name, placement.member_side(fitted, c, m)) for c in fitted.components for m in c.members if m.part == part
    ]
    return _added_up(fitted, part, sides)


def _computed(part: str, there: Fitted) -> Origin:
    """The bits of a part of the tiling in an array of its elements."""
    found = _added_up(there, part, [(f"its {part}", placement.part_side(there.parts[part]))])
    assert found
    return Origin(found)


def _added_up(fitted: Fitted, part: str, sides: list[tuple[str, placement.Side]]) -> Found | None:
    shape, n = fitted.parts[part].shape, fitted.parts[part].bits
    bits, which, rows = np.zeros((prod(shape[1:]), n), np.int64), [""] * n, dict[str, Ints]()
    for name, side in sides:
        here = range(side.low, min(side.high, n))
        at = np.array([side.byte, side.bit])
        for axis, count in enumerate(shape[1:], 1):
            at = at[..., None, :] + side.steps(axis, np.arange(count))
        at, code, row = (
            at.reshape(-1, 1, 2),
            side.steps(CODE_BITS, np.arange(len(here))),
            side.steps(0, np.arange(shape[0])),
        )
        if side.gap == side.word:
            bits[:, here] = at @ EIGHT_ONE + code @ EIGHT_ONE
        elif row[:, 1].any():  # bits go on in a word that lies elsewhere
            return None
        else:
            bits[:, here] = side.address((at + code).reshape(-1, 2)).reshape(len(at), -1)
        which[here.start : here.stop] = [name] * len(here)
        begins = row @ EIGHT_ONE
        bits[:, here] += begins.min()
        begins -= begins.min()
        if not np.array_equal(rows.setdefault(name, begins), begins):
            return None
    return Found(tuple(which), rows, bits)


def _origin(part: str, here: Fitted, there: Fitted, tile: Tile) -> Origin | None:
    """What the elements of the tiling's part are made of in the layout's components; None if bits do not tell."""
    found = _stored(here, part) if part in here.parts else None
    if found is None or part == "zero":
        return found and Origin(found)
    if part == "scale":
        return _origin_of_scales(found, here, there)
    name, params, like, planes = (
        here.layout.grid.name,
        dict(here.layout.grid.params),
        here.parts["codes"],
        tile.how.planes,
    )
    if name == "quads_in_fives":
        good = like.bits == 16 and like.shape[-1] == 5
        return Origin(found._replace(which=found.which[:5], bits=_fives(found.bits))) if good else None
    if name == "hif4":
        whole = _side_by_side([found, *(_stored(here, shift) for shift in SHIFTS)])
        return whole and Origin(whole)
    if tile.added is None:
        return Origin(found)
    if name in ("base3", "plane_base3") and all(type(d) is int and 1 <= d <= 5 for _, d in params["runs"]):
        places, digits = _base3(params["runs"], params["first"] == "high")
        if params["first"] in ("high", "low") and like.bits == 8 and max(places) < like.shape[-1]:
            bits = found.bits.reshape(-1, like.shape[-1], 8)[:, places].reshape(-1, 8)
            table = sum(BYTES * 3**i % 256 * 3 // 256 << 2 * i for i in range(5)).astype(np.uint16)
            return Origin(found._replace(bits=bits), table, 2 * np.resize(digits, len(bits)))
    if name == "plane_digits" and like.bits <= 6 and planes <= 4:
        table = sum(BYTES // 3 ** (planes - 1 - p) % 3 << 2 * p for p in range(planes)).astype(np.uint8)
        low = np.repeat(2 * np.arange(planes), len(found.bits))
        return Origin(found._replace(bits=np.tile(found.bits, (planes, 1))), table, low)
    return None


def _origin_of_scales(found: Found, here: Fitted, there: Fitted) -> Origin | None:
    """Scales that keep their bytes, or bytes that are looked up."""
    a, b = (dict(fitted.layout.grid.params) for fitted in (here, there))
    mine, theirs = here.parts["scale"], there.parts["scale"]
    if a.get("ratio"):
        return None
    if (mine.dtype, a.get("scale")) == (theirs.dtype, b.get("scale")):
        return Origin(found)
    if not a.get("scale") or mine.bits != 8:
        return None
    numbers = _as_floats(a["scale"], theirs.dtype)
    return Origin(found, numbers.view(f"<u{numbers.itemsize}"), np.zeros(len(found.bits), np.int64))


def _fives(bits: Ints) -> Ints:
    """Words of 16 bits, five for 16 codes -> the bits of codes (`kernels.spell.read_fives`)."""
    words = bits.reshape(-1, 5, 16)
    near = words[:, :, :15].reshape(len(words), 15, 5)
    return np.concatenate([near, words[:, None, :, 15]], 1).reshape(-1, 5)


def _base3(runs: tuple[tuple[int, int], ...], high_first: bool) -> tuple[list[int], list[int]]:
    """Of each column of a block its byte, and which of that byte's digits it is (`kernels.spell.read_base3`)."""
    places, digits, byte = list[int](), list[int](), 0
    for count, each in runs:
        for i in range(each):
            places += range(byte, byte + count)
            digits += [i if high_first else 4 - i] * count
        byte += count
    return places, digits


def _side_by_side(parts: list[Found | None]) -> Found | None:
    """The bits of several parts as those of one, of which each has an element for so many of the first's."""
    which, rows, bits = tuple[str, ...](), dict[str, Ints](), list[Ints]()
    for found in parts:
        if found is None or any(not np.array_equal(rows.get(name, row), row) for name, row in found.rows.items()):
            return None
        which, rows = which + found.which, rows | found.rows
        bits.append(np.repeat(found.bits, len(bits[0]) // len(found.bits) if bits else 1, 0))
    return Found(which, rows, np.hstack(bits))


def _field(part: str, there: Fitted, tile: Tile, origin: Origin) -> Field | None:
    """None if the origin has not an element for each of the tiling's."""
    to, like, cols = _stored(there, part), there.parts[part], _columns(there, tile)
    planes = 1 if part == "zero" else tile.how.planes
    n, rest = divmod(prod(like.shape[1:]), planes)
    right = len(origin.found.bits) == n * planes and all(
        len(row) == like.shape[0] for row in origin.found.rows.values()
    )
    same_bits = origin.table is not None or origin.found.bits.shape[1] == like.bits
    if to is None or not right or rest or cols % n or not same_bits:
        return None
    bits, low = origin.found.bits.reshape(planes, n, -1), np.broadcast_to(origin.low, (planes * n,)).reshape(planes, n)
    return Field(origin, bits, to.bits.reshape(planes, n, -1), to.which, low, cols // n if n > 1 else 0)


def _columns(there: Fitted, tile: Tile) -> int:
    """Stored columns, without padding."""
    return prod(there.parts["codes"].shape[1:]) // tile.how.planes * _per(tile)


def _per(tile: Tile) -> int:
    """Columns of a code."""
    return 4 if tile.how.widths == (5,) else 1


# ---------------------------------------------------------------- programs of them


def _passes(fields: list[Field | None], shape: Shape, there: Fitted, tile: Tile) -> tuple[Pass, ...] | None:
    """The passes; None if rows have too many ways to begin, or columns do not repeat.

    Rows are cut where they begin at another bit of a byte, and columns into runs and a rest.
    """
    rows: dict[str, Ints] = {}
    for field in fields:
        if field is None or any(not np.array_equal(rows.get(n, r), r) for n, r in field.origin.found.rows.items()):
            return None
        rows |= field.origin.found.rows
    good = [field for field in fields if field]
    cols = _columns(there, tile)
    run, records, steps = _run(good, tile.run * _per(tile), cols)
    times = cols // run if run else 0
    left = sum(field.to[:, times * run // field.cols :].size for field in good if field.cols)
    groups, units = -(-shape[0] // tile.lanes), _units(there, tile)
    sizes = {c.name: c.nbytes // groups for c in there.components}
    passes = list[Pass]()
    for start, stop, count in ((0, run, times), (times * run, cols, 1)):
        some = [cut for field in good if (field.cols or count == 1) and (cut := _cut(field, start, stop)).to.size]
        if not some or not count:
            continue
        strings = []
        for field in some:
            for name in dict.fromkeys(field.string):
                at = times * steps[name] if start and field.cols else 0
                strings.append((name, at, steps[name] if count > 1 else sizes[name] - at))
        mine = {name: row for field in some for name, row in field.origin.found.rows.items()}
        together = _together(mine, shape[0])
        if left > MOST_BITS or together is None:
            return None
        for size, firsts in together:
            shifts = [{name: int(row[first]) % 8 for name, row in mine.items()} for first in firsts]
            program = _program(some, shifts, strings, units, tile.lanes)
            arrays = tuple(
                (name, row[firsts[0] : firsts[0] + size] // 8, records.get(name, 0) if count > 1 else 0)
                for name, row in mine.items()
            )
            passes.append(Pass(program, tuple(firsts), size, arrays, count, tuple(strings)))
    return tuple(passes)


def _together(rows: dict[str, Ints], count: int) -> list[tuple[int, list[int]]] | None:
    """Rows cut where they begin at another bit of a byte: (how many, firsts of those that begin at the same bytes).

    None if there are too many cuts, or some between rows that a program reads at a time.
    """
    begins = np.stack([*rows.values()])
    cuts = [0, *(np.flatnonzero((np.diff(begins % 8) != 0).any(0)) + 1).tolist(), count]
    if len(cuts) > MOST_CUTS or any(cut % PAIR for cut in cuts[:-1]):
        return None
    found: dict[tuple[int, bytes], list[int]] = {}
    for first, end in pairwise(cuts):
        found.setdefault((end - first, (begins[:, first:end] // 8).tobytes()), []).append(first)
    return [(size, firsts) for (size, _), firsts in found.items()]


def _run(fields: list[Field], least: int, cols: int) -> tuple[int, dict[str, int], dict[str, int]]:
    """Columns after which all goes on by whole bytes, and whole vectors; 0 if there are none, or too many.

    With the bytes from a run to the next of each array, in a row, and of each component of the tiling, in a group.
    """
    some = [field for field in fields if field.cols]
    least = lcm(least, *(field.cols for field in some))
    for run in range(least, min(MOST_RUN, cols // 2) + 1, least):
        records = _goes_on([(f.bits, f.origin.found.which, run // f.cols) for f in some], 8)
        sizes = records is not None and _goes_on([(f.to, f.string, run // f.cols) for f in some], VECTOR)
        if not records or not sizes:
            continue
        each = sum(f.to[:, : run // f.cols].size for f in some)
        more = 1
        while more * each < ENOUGH and cols % (2 * more * run) == 0 and cols > 2 * more * run:
            more *= 2
        farther = [{name: more * step for name, step in steps.items()} for steps in (records, sizes)]
        return run * more, farther[0], farther[1]
    return 0, {}, {}


def _goes_on(fields: list[tuple[Ints, tuple[str, ...], int]], multiple: int) -> dict[str, int] | None:
    """The bytes from each bit to the one so many positions on, in each component; None if these are not the same."""
    found: dict[str, int] = {}
    for places, names, step in fields:
        near = places[:, step : step + 1] - places[:, :1]
        for name in dict.fromkeys(names):
            mine = near[..., _is(names, name)]
            first = int(mine.flat[0])
            if (
                (mine != first).any()
                or first < 0
                or first % multiple
                or found.setdefault(name, first // 8) != first // 8
            ):
                return None
        if (places[:, step:] - places[:, :-step] != near).any():
            return None
    return found


def _is(names: tuple[str, ...], name: str) -> npt.NDArray[np.bool_]:
    return np.array([n == name for n in names])


def _cut(field: Field, start: int, stop: int) -> Field:
    """Some columns of it, or all of what serves all of them."""
    mine = slice(start // field.cols, stop // field.cols) if field.cols else slice(None)
    return field._replace(bits=field.bits[:, mine], to=field.to[:, mine], low=field.low[:, mine])


def _program(
    fields: list[Field],
    shifts: list[dict[str, int]],
    strings: list[tuple[str, int, int]],
    units: dict[str, tuple[int, bool]],
    lanes: int,
) -> Program:
    """What makes a run, in rows that begin so many bits after a byte; and then in others of the same bytes."""
    from packfmt.kernels import retile

    words = [-(-size // (retile.WORD * lanes)) for *_, size in strings]
    places = {name: (at, units[name][0], sum(words[:i])) for i, (name, at, _) in enumerate(strings)}
    arrays, wanted = list(shifts[0]), []
    for i, shift in enumerate(shifts):
        for field in fields:
            which = field.origin.found.which
            at, unit, word = np.array([places[name] for name in field.string]).T
            to, chunk = field.to.reshape(-1, len(field.string)) - 8 * at, 8 * unit * lanes
            wanted.append(
                retile.Wanted(
                    np.array([arrays.index(name) for name in which]),
                    field.bits.reshape(-1, len(which)) + np.array([shift[name] for name in which]),
                    64 * (word + i * sum(words)) + to // chunk * 8 * unit + to % chunk,  # as bits of one row
                    field.origin.table,
                    field.low.reshape(-1),
                )
            )
    return retile.program(wanted, len(shifts) * sum(words))


# ---------------------------------------------------------------- parts that are computed first


def _codes(layout: Layout, shape: Shape, parts: Arrays, tile: Tile) -> Array:
    """A code for each weight, or quad, as the tile's grid has them."""
    part = tile.layout.fit(*shape).parts["codes"]
    found = parts["codes"]
    if tile.added is not None:
        found = weight_steps(layout, shape, parts) + np.int16(tile.added)
    elif layout.grid.name == "hif4":
        for i, shift in enumerate(SHIFTS):
            doubled = by_weight(layout, shape, shift, parts[shift], found.shape[1])
            found = found | doubled << np.uint8(layout.fit(*shape).parts["codes"].bits + i)
    elif layout.grid.name == "quads_in_fives":
        from packfmt.kernels import spell

        found = spell.read_fives(np.ascontiguousarray(found))
    return found.astype(dtype_of(part.dtype)).reshape(part.shape)


def _zeros(layout: Layout, shape: Shape, parts: Arrays, tile: Tile) -> Array:
    return _spread(parts["zero"], tile.layout.fit(*shape).parts["zero"].shape)


def _scales(layout: Layout, shape: Shape, parts: Arrays, tile: Tile) -> Array:
    """Scales as they are stored, or the same numbers in the tile's dtype; one for each row, block and plane."""
    wanted = tile.layout.fit(*shape).parts["scale"]
    params, stored, dtype = dict(layout.grid.params), parts["scale"], dtype_of(wanted.dtype)
    named = params.get("scale", "")
    with np.errstate(over="ignore"):
        if params.get("ratio"):
            stored = scales(stored, tile.how.planes, SPELLINGS[layout.grid.name], params["ratio"])
        elif named and dict(tile.layout.grid.params).get("scale") != named:
            stored = _as_floats(named, wanted.dtype)[stored]
        elif stored.dtype != dtype:
            stored = stored.astype(F32).astype(dtype)
    planes = [tile.how.planes] if tile.layout.grid.name == "planes" else []
    return _spread(stored.reshape(stored.shape[0], *planes, -1), (shape[0], *planes, wanted.shape[1 + len(planes)]))


def _as_floats(named: str, dtype: str) -> Array:
    """What each code of a named format is in a float that has all of its numbers."""
    with np.errstate(over="ignore"):
        return minifloat.numbers(named).astype(dtype_of(dtype))


def _spread(part: Array, shape: tuple[int, ...]) -> Array:
    """A part with one element wherever several positions of the tile share it."""
    for i, n in enumerate(shape):
        if n != part.shape[i]:
            part = np.repeat(part, n // part.shape[i], i)
    return part
