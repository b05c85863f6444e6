"""Layouts: what is derived from a description, what is refused, and the description as JSON."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from typing import Any

import numpy as np
import pytest
import slow_placement as slow
from foreign_layouts import FOREIGN, one
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_layouts import layouts, tasks

from packfmt.errors import LayoutError
from packfmt.layout import (
    BIT,
    COLS,
    DENSE,
    DTYPES,
    REST,
    ROWS,
    TOP,
    WORD,
    Axis,
    Codes,
    Component,
    Digit,
    Layout,
    Stream,
    Values,
    blocks,
    cols,
    dense,
    dtype_of,
    grid,
    rows,
)

SCALE = Values("scale", "<f2")
CODES = Codes("codes", 4, (cols(1, 16),), (cols(16, 2),))
RAW = grid("raw")
Q4_0 = blocks("q4_0", 32, SCALE, CODES, grid=grid("affine", zero=8))
NAMED = {f.layout.name: f.layout for f in FOREIGN}


# ---------------------------------------------------------------- derived


def test_sizes_follow_from_the_description() -> None:
    fitted = Q4_0.fit(6, 64)
    (blocks,) = fitted.components
    assert (blocks.name, blocks.dtype, blocks.shape, blocks.cell_bytes) == ("blocks", "u1", (6, 2 * 18), 18)
    assert [(m.part, m.start) for m in blocks.members] == [("scale", 0), ("codes", 16)]
    assert {n: (p.dtype, p.shape, p.share) for n, p in fitted.parts.items()} == {
        "scale": ("<f2", (6, 2), (1, 32)),
        "codes": ("u1", (6, 64), (1, 1)),
    }
    assert (Q4_0.block, Q4_0.bits_per_weight, Q4_0.nbytes(6, 64)) == ({"rows": 1, "cols": 32}, 4.5, 6 * 36)
    assert Q4_0.shapes(6, 64) == {"blocks": (6, 36)}


def test_what_digits_leave_out_is_shared() -> None:
    scales = one("scales", (rows(4), cols(64)), Values("scale", "<f4"), Values("row_scale", "<f2"))
    assert scales.fit(8, 128).parts["scale"].shape == (2, 2)
    whole = Layout("whole", (Component("s", (), (Values("global_scale", "<f4"),)), *Q4_0.components), RAW)
    part = whole.fit(8, 128).parts["global_scale"]
    assert (part.shape, part.share) == ((1, 1), (8, 128))
    assert whole.shapes(8, 128)["s"] == (1,)


def test_padding_is_stored_but_no_part_of_the_weight() -> None:
    legacy = NAMED["compressed_tensors_legacy_3"]
    fitted = legacy.fit(2, 256)
    assert (fitted.extents["cols"], fitted.parts["codes"].shape, fitted.components[0].shape) == (260, (2, 256), (2, 26))


def test_quads_are_an_axis_of_their_own() -> None:
    quads = Axis("quads", "cols", per=4)
    sign = Codes("sign", 1, (Digit("quads", 8, 8),), (Digit("quads", 1, 8),))
    layout = Layout("quads", (Component("b", (rows(), Digit("quads", 64)), (sign,)),), RAW, (ROWS, quads))
    assert layout.block == {"rows": 1, "cols": 256}
    assert layout.fit(3, 512).parts["sign"].shape == (3, 128)
    with pytest.raises(LayoutError, match="quads: 258 columns, needs a multiple of 256"):
        layout.fit(3, 258)


def test_an_open_digit_takes_what_the_top_digit_leaves() -> None:
    hqq = NAMED["hqq_4bit_u8"]
    for n in (2, 4, 6):
        (placed,) = hqq.fit(n, 8).components
        assert placed.over[0] == Digit("rows", 1, n // 2)
        assert placed.members[0].fields == (Digit("rows", n // 2, 2, True),)


def test_bits_between_members_are_counted_as_spare() -> None:
    assert [c.spare_bits for c in NAMED["spqr"].fit(16, 16).components] == [2]
    assert [c.spare_bits for c in NAMED["compressed_tensors_legacy_3"].fit(1, 10).components] == [2]
    assert [c.spare_bits for c in Q4_0.fit(1, 32).components] == [0]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_has_a_dense_layout(name: str) -> None:
    (layout,) = [d for d in DENSE.values() if d.components[0].cell[0].dtype == name]  # type: ignore[union-attr]
    assert layout.bits_per_weight == 8 * dtype_of(name).itemsize
    assert layout.block == {"rows": 1, "cols": 1}


def test_a_ragged_component_has_a_cell_for_what_is_left_at_the_edge() -> None:
    scale = Component("scale", (rows(128), cols(128)), (Values("scale", "<f4"),), ragged=True)
    layout = Layout("tiles", (Component("codes", (rows(), cols()), (Values("codes", "u1"),)), scale), RAW)
    assert layout.block == {"rows": 1, "cols": 1}
    assert layout.shapes(300, 129) == {"codes": (300, 129), "scale": (3, 2)}
    assert layout.fit(300, 129).parts["scale"].share == (128, 128)
    whole = replace(layout, components=(layout.components[0], replace(scale, ragged=False)))
    assert whole.block == {"rows": 128, "cols": 128} and whole.id != layout.id
    assert whole.shapes(384, 256)["scale"] == layout.shapes(384, 256)["scale"] == (3, 2)


def test_positions_can_follow_those_of_the_weight() -> None:
    stored = Axis("stored", "cols", plus=64)
    codes = Codes("codes", 4, (), (Digit("stored", 1, 2),))
    layout = Layout("twice", (Component("codes", (rows(), Digit("stored", 2)), (codes,)),), RAW, (ROWS, stored))
    assert layout.shapes(3, 128) == {"codes": (3, 96)} and layout.fit(3, 128).parts["codes"].shape == (3, 192)
    assert Layout.from_json(layout.to_json()) == layout
    with pytest.raises(LayoutError, match="twice: 63 more along 'stored', needs a multiple of 2"):
        replace(layout, axes=(ROWS, replace(stored, plus=63))).fit(3, 128)


def test_rotated_columns_come_in_whole_groups() -> None:
    rotated = replace(Q4_0, hadamard=256)
    assert rotated.block == {"rows": 1, "cols": 256} and rotated.id != Q4_0.id
    assert Layout.from_json(rotated.to_json()) == rotated
    with pytest.raises(LayoutError, match="hadamard is 96, needs a power of two"):
        replace(Q4_0, hadamard=96).fit(1, 96)


# ---------------------------------------------------------------- refused


def both(*cell: Codes | Values) -> Layout:
    return blocks("bad", 32, *cell, grid=RAW)


def codes(units: tuple[Digit, ...], fields: tuple[Digit, ...], **rest: Any) -> Codes:
    return Codes("codes", 4, units, fields, **rest)


REFUSED = {
    "a digit dropped below": (both(codes((cols(1, 16),), ())), "bad.blocks.codes: along 'cols' .* stride 32 .* 16"),
    "a digit dropped above": (one("bad", (rows(),), CODES), "along 'cols' the digits span 32, the tensor 128"),
    "a digit doubled": (both(codes((cols(1, 16), cols(1, 16)), (cols(16, 2),))), "columns, needs a multiple of 512"),
    "a digit doubled by another": (both(codes((cols(1, 16), cols(1, 2)), (cols(16, 2),))), "'cols' .* stride 1 .* 2"),
    "a stride too small": (
        both(codes((cols(1, 16),), (cols(8, 2),))),
        "along 'cols' a digit of stride 8 follows .* 16",
    ),
    "a stride too large": (
        both(codes((cols(1, 16),), (cols(32, 2),))),
        "along 'cols' a digit of stride 32 follows .* 16",
    ),
    "a size too small": (both(codes((cols(1, 8),), (cols(16, 2),))), "along 'cols' a digit of stride 16 follows .* 8"),
    "an unknown axis": (
        both(codes((Digit("depth", 1, 16),), (cols(16, 2),))),
        "no axis 'depth' here; there are rows, cols",
    ),
    "words inside a cell": (both(codes((Digit(WORD),), (cols(1, 32),))), "no axis 'word' here"),
    "neither stride nor size": (
        both(codes((cols(TOP, REST),), ())),
        "along 'cols' a digit with neither stride nor size",
    ),
    "a negative stride": (both(codes((cols(-1, 16),), (cols(16, 2),))), "along 'cols': a stride is -1, needs 0 to"),
    "a negative size": (both(codes((cols(1, -16),), (cols(16, 2),))), "along 'cols': a size is -16, needs 0 to"),
    "a fractional size": (both(codes((cols(1, 16.0),), (cols(16, 2),))), "along 'cols': a size is 16.0, needs"),  # type: ignore[arg-type]
    "a huge size": (both(codes((cols(1, 1 << 50),), ())), "along 'cols': a size is .* needs 0 to"),
    "huge sizes": (both(codes((cols(1, 1 << 40),), (cols(1 << 40, 1 << 40),))), "more than 2\\*\\*48 along 'cols'"),
    "planes without size": (both(codes((Digit(BIT),), (cols(1, 32),))), "along 'bit' a digit without stride or size"),
    "planes with a gap": (both(codes((Digit(BIT, 2, 2),), (cols(1, 32),))), "along 'bit' the digits start at 2, not 1"),
    "planes that overlap": (
        both(codes((Digit(BIT, 1, 2), Digit(BIT, 1, 2)), (cols(1, 32),))),
        "along 'bit' a digit of stride 1 follows a span of 2",
    ),
    "planes of values": (
        both(Values("v", "u1", (Digit(BIT, 1, 2), cols(1, 32)))),
        "v: along 'bit' only codes can be cut",
    ),
    "too many bits": (
        both(Codes("codes", 40, (Digit(BIT, 1, 2),), (cols(1, 32),))),
        "codes: bits 0 to 80, .* at most 64",
    ),
    "no bits": (both(Codes("codes", 0, (), (cols(1, 32),))), "codes: bits is 0, needs 1 to 64"),
    "members that overlap": (both(CODES, replace(CODES, low=3)), r"bad.codes: bits 3 to 7 follow bit 4 of the code"),
    "members with a gap": (both(CODES, replace(CODES, low=5)), r"bad.codes: bits 5 to 9 follow bit 4 of the code"),
    "no lowest bits": (both(replace(CODES, low=4)), r"bad.codes: bits 4 to 8 follow bit 0 of the code"),
    "members of other elements": (
        both(CODES, Codes("codes", 1, (), (cols(2, 16),), low=4)),
        r"bad.codes: one member is \(1, 64\), another \(1, 128\)",
    ),
    "codes and values in one": (both(CODES, Values("codes", "u1", (cols(1, 32),))), "bad.codes: .* follow bit 4"),
    "levels that do not fit": (both(replace(CODES, levels=17)), "bad.codes: 17 levels in 4 bits"),
    "a claimed bit": (
        both(Codes("a", 4, (), (cols(1, 32),), "<u8", at=0), Codes("b", 1, (), (), "<u8", at=127)),
        "bad.blocks.b: bit 127 of the cell is claimed by bad.blocks.a, too",
    ),
    "a claimed bit of many units": (
        both(CODES, Codes("b", 1, (), (), at=121)),
        "bad.blocks.b: bit 121 of the cell is claimed by bad.blocks.codes, too",
    ),
    "units at a bit": (both(codes((cols(1, 32),), (), at=3)), "a member at a bit of the cell has one unit, not 32"),
    "two word digits": (
        one("bad", (rows(), Digit(WORD), cols(32), Digit(WORD)), codes((), (cols(1, 32),), word="<u4")),
        "along 'word' the digits span",
    ),
    "a wrong number of words": (
        one("bad", (rows(), Digit(WORD, 1, 3), cols(32)), codes((), (cols(1, 32),), word="<u4")),
        "along 'word' the digits span 3, the unit 4",
    ),
    "split words beside others": (
        one("bad", (rows(), Digit(WORD), cols(32)), SCALE, codes((), (cols(1, 32),))),
        "bad.weight.scale: a unit split into words must be alone in its cell",
    ),
    "reversed words": (
        one("bad", (rows(), cols(32), Digit(WORD, 1, REST, True)), codes((), (cols(1, 32),))),
        "along 'word' a digit that is no plain count of the words",
    ),
    "cells that differ": (
        one("bad", (rows(), cols(8)), Codes("a", 4, (), (cols(1, 8),)), Codes("b", 4, (cols(16),), (cols(1, 8),))),
        "bad.weight.b: its cells run over rows:1x1 cols:8x2, those of the component over rows:1x1 cols:8x16",
    ),
    "an empty cell": (one("bad", (rows(), cols())), "bad.weight: an empty cell"),
    "an unknown word": (both(replace(CODES, word=">u4")), "codes: words of '>u4', needs one of u1, <u2, <u4, <u8"),
    "an unknown dtype": (both(Values("v", ">f4")), "no dtype is called '>f4'; there are u1, i1"),
    "dims": (one("bad", (rows(), cols()), Values("v", "u1"), dims=(1, 2)), r"bad.weight: dims \(1, 2\) of 2 digits"),
    "two components of a name": (
        Layout("bad", (*dense("a", "u1").components, *dense("b", "<f4").components), RAW),
        "bad.values: two components share a name",
    ),
    "a part that is a stream": (
        Layout("bad", (*dense("a", "u1").components, Stream("s", "u1"), Component("c", (), (Values("s", "u1"),))), RAW),
        "bad.c.s: a stream has this name, too",
    ),
    "two axes of a name": (replace(Q4_0, name="bad", axes=(ROWS, ROWS, COLS)), "axis 'rows': its name is taken"),
    "an axis called word": (replace(Q4_0, name="bad", axes=(ROWS, COLS, Axis(WORD, size=2))), "axis 'word': its name"),
    "an axis of nothing": (
        replace(Q4_0, name="bad", axes=(ROWS, COLS, Axis("planes"))),
        "'planes': size is 0, needs 1",
    ),
    "an axis of no side": (
        replace(Q4_0, name="bad", axes=(ROWS, Axis("cols", "depth"))),
        "'cols': of 'depth', needs rows",
    ),
    "no padding": (replace(Q4_0, name="bad", axes=(ROWS, Axis("cols", "cols", pad=0))), "'cols': pad is 0, needs 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_layout_is_refused_by_name(case: str) -> None:
    layout, says = REFUSED[case]
    with pytest.raises(LayoutError, match=says):
        layout.fit(1, 128)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 33), "q4_0: 33 columns, needs a multiple of 32"),
        ((-1, 32), "q4_0: the number of rows is -1, needs 0 to"),
        ((1, 1 << 49), "q4_0: the number of columns is .*, needs 0 to"),
        ((1 << 48, 1 << 48), "q4_0.blocks: its size in bytes is .*, needs 0 to"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(shape: tuple[int, int], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        Q4_0.fit(*shape)


@st.composite
def damaged(draw: st.DrawFn, layout: Layout) -> tuple[Layout, set[str]]:
    """The layout with one digit changed, and the axes of that digit before and after."""
    c = draw(st.integers(0, len(layout.components) - 1))
    component: Any = layout.components[c]
    places = [("over", None)] * bool(component.over)
    for i, m in enumerate(component.cell):
        places += [(name, i) for name in ("units", "fields", "digits") if getattr(m, name, ())]
    assume(places)
    name, i = draw(st.sampled_from(places))
    owner = component if i is None else component.cell[i]
    digits = list(getattr(owner, name))
    at = draw(st.integers(0, len(digits) - 1))
    d = digits[at]
    assume(d.axis != WORD)
    other = "rows" if d.axis == "cols" else "cols"
    digits[at : at + 1] = draw(
        st.sampled_from(
            [
                [],
                [d, d],
                [d, replace(d, reverse=not d.reverse)],
                [replace(d, axis="depth")],
                [replace(d, axis=other)],
                *([replace(d, stride=n)] for n in (d.stride - 1, d.stride + 1, 2 * d.stride, 1 << 40)),
                *([replace(d, size=n)] for n in (d.size - 1, d.size + 1, 2 * d.size, 1 << 40)),
            ]
        )
    )
    owner = replace(owner, **{name: tuple(digits)})
    cell = component.cell if i is None else (*component.cell[:i], owner, *component.cell[i + 1 :])
    component = owner if i is None else replace(component, cell=cell)
    parts = (*layout.components[:c], component, *layout.components[c + 1 :])
    return replace(layout, components=parts), {d.axis, *(e.axis for e in digits[at : at + 1])}


@given(data=st.data())
@settings(max_examples=400)
def test_a_damaged_digit_is_refused_with_its_axis_unless_it_makes_another_layout(data: st.DataObject) -> None:
    task = data.draw(tasks())
    layout, axes = data.draw(damaged(data.draw(layouts(task))))
    try:
        fitted = layout.fit(*task.shape)
    except LayoutError as error:
        names = [repr(axis) for axis in axes] + [
            {"cols": "columns, needs"}.get(axis, f"{axis}, needs") for axis in axes
        ]
        about_members = (
            "one member is",
            "claimed by",
            "a code has",
            "only codes can be cut",
            "follow bit",
            "its cells",
        )
        assert any(text in str(error) for text in (*names, *about_members))
        assert not _tiles(layout, task.shape)
    else:
        assert sum(c.nbytes for c in fitted.components) < 1 << 20
        assert slow.is_bijection(layout, task.shape)


def _tiles(layout: Layout, shape: tuple[int, int]) -> bool:
    """Whether the slow twin finds every bit in one place. Digits of size one have no place to be wrong about."""
    digits = list(chain.from_iterable(digits for _, _, digits in layout.members()))
    for d in digits:
        if d.axis == BIT and not (d.stride and d.size):
            return False
        if (
            d.axis not in ("rows", "cols", BIT, WORD)
            or d.size == 1
            or d.stride == d.size == 0
            or min(d.stride, d.size) < 0
        ):
            return False
    return max(max(d.stride, d.size) for d in digits) < 1000 and slow.is_bijection(layout, shape)


# ---------------------------------------------------------------- JSON


CANONICAL = (
    '{"axes":[{"name":"rows","of":"rows"},{"name":"cols","of":"cols"}],"components":[{"cell":['
    '{"digits":[],"dtype":"<f2","values":"scale"},'
    '{"bits":4,"codes":"codes","fields":[["cols",16,2]],"units":[["cols",1,16]],"word":"u1"}],'
    '"name":"blocks","over":[["rows",1,0],["cols",32,0]]}],"grid":{"name":"affine","zero":8},"name":"q4_0"}'
)


def test_the_canonical_form_never_changes() -> None:
    assert Q4_0.canonical == CANONICAL
    assert Q4_0.id == hashlib.sha256(CANONICAL.encode()).hexdigest()


def test_prose_may_be_mended_without_a_new_id() -> None:
    mended = replace(Q4_0, purpose="four bits", sources=("ggml",), also=(("gguf", "Q4_0"),))
    assert (mended, mended.id) == (Q4_0, Q4_0.id)
    assert replace(Q4_0, name="q4").id != Q4_0.id


def survives(layout: Layout) -> None:
    again = Layout.from_json(json.loads(layout.canonical))
    assert (again, again.canonical, again.id) == (layout, layout.canonical, layout.id)


@pytest.mark.parametrize("layout", [*NAMED.values(), *DENSE.values()], ids=lambda layout: layout.name)
def test_a_known_layout_survives_json(layout: Layout) -> None:
    survives(layout)


@given(data=st.data())
def test_a_random_layout_survives_json(data: st.DataObject) -> None:
    layout = data.draw(layouts(data.draw(tasks())))
    number = st.integers(-(1 << 64), 1 << 64) | st.floats(allow_nan=False, allow_infinity=False)
    params = data.draw(st.dictionaries(st.sampled_from("abc"), number | st.tuples(number, number)))
    survives(replace(layout, grid=grid("raw", **params), components=(*layout.components, Stream("vals", "<f4"))))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 32, 63, 64, 1 << 20, 1 << 40, 1 << 48, -1])
    | st.floats()
    | st.text()
    | st.sampled_from(["rows", "cols", "word", "bit", "u1", "<f2", "reverse"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


def paths(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a description."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [here, *chain.from_iterable(paths(data[key], (*here, key)) for key in keys)]


@st.composite
def broken_descriptions(draw: st.DrawFn) -> Any:
    """A good description in which up to three values are missing or replaced by anything."""
    data = json.loads(draw(st.sampled_from([*NAMED.values(), Q4_0, DENSE["f32"]])).canonical)
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(paths(data)))
        value = draw(JSON)
        if not way:
            return value
        holder = data
        for key in way[:-1]:
            holder = holder[key]
        if draw(st.booleans()):
            holder[way[-1]] = value
        else:
            del holder[way[-1]]
    return data


@given(data=broken_descriptions() | JSON)
@settings(max_examples=600, deadline=timedelta(seconds=2))
def test_anything_is_a_layout_or_a_layout_error(data: Any) -> None:
    tracemalloc.start()
    try:
        layout = Layout.from_json(data)
        assert Layout.from_json(layout.to_json()) == layout
        assert layout.fit(64, 256).nbytes == sum(c.nbytes for c in layout.fit(64, 256).components)
        assert layout.bits_per_weight >= 0
    except LayoutError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 << 20


def description(**change: Any) -> dict[str, Any]:
    return json.loads(Q4_0.canonical) | change


def component(**change: Any) -> dict[str, Any]:
    return description(components=[json.loads(Q4_0.canonical)["components"][0] | change])


def nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "description of '\\?': a layout is None, needs name, axes, components, grid"),
        (description(extra=1), "description of 'q4_0': a layout has 'extra', which means nothing here"),
        ({"name": "x"}, "description of 'x': a layout lacks"),
        (description(name="a\nb"), "the name is 'a\\\\nb', needs a short printable text"),
        (description(name="x" * 5000), "the name is 'x{40}', needs a short"),
        (description(name=nested(5000)), "the name is a list, needs a short"),
        (description(axes=[{"name": "rows", "of": "depth"}]), "of is 'depth', needs one of rows, cols"),
        (description(axes=[{"name": "rows", "size": 1 << 50}]), "size is .* needs 1 to 281474976710656"),
        (description(components=[{}] * 33), "components: not a list of at most 32"),
        (description(grid={}), "the grid is None, needs a short printable text"),
        (description(grid={"name": "x", "zero": float("nan")}), "a grid parameter is nan"),
        (description(grid={"name": "x", "zero": {}}), "a grid parameter is a dict"),
        (description(grid={"name": "x", "zero": nested(5000)}), "a grid parameter is a list"),
        (description(grid={"name": "x", "zero": 10**5000}), "a grid parameter is a int"),
        (component(over=[["cols", 1, 0]] * 17), "digits: not a list of at most 16"),
        (component(over=[["cols", 1, 1 << 60]]), "a size is 1152921504606846976, needs 0 to"),
        (component(over=[["cols", 1, 32.0]]), "a size is 32.0, needs 0 to"),
        (component(over=[["cols", 1, True]]), "a size is True, needs 0 to"),
        (component(over=[["cols", 1, 32, "down"]]), r"a digit is a list, needs \[axis, stride, size\]"),
        (component(cell=[{"values": "v", "dtype": "O", "digits": []}]), "a dtype is 'O', needs one of u1"),
        (component(cell=[{"values": "v", "dtype": [], "digits": []}]), "a dtype is a list, needs one of u1"),
        (
            component(cell=[{"codes": "c", "bits": 65, "word": "u1", "units": [], "fields": []}]),
            "bits is 65, needs 1 to",
        ),
        (component(cell=[{"codes": "c"}]), "a member lacks"),
        (component(ragged=False), "ragged is False, needs true or nothing"),
        (component(ragged=1), "ragged is 1, needs true or nothing"),
        (description(hadamard=0), "hadamard is 0, needs 2 to 1024"),
        (description(hadamard=2048), "hadamard is 2048, needs 2 to 1024"),
        (description(axes=[{"name": "rows", "of": "rows", "plus": 0}]), "plus is 0, needs 1 to"),
        (description(axes=[{"name": "rows", "of": "rows", "plus": 1 << 40}]), "plus is .* needs 1 to"),
    ],
)
def test_a_bad_description_is_refused_by_name(data: Any, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        Layout.from_json(data)


@settings(deadline=timedelta(seconds=2))
@given(size=st.sampled_from([1 << 20, 1 << 40, 1 << 44]), over=st.booleans())
def test_a_huge_cell_costs_nothing_to_prove(size: int, over: bool) -> None:
    inner = codes((cols(2, size // 2),), (cols(1, 2),)) if over else codes((), (cols(1, size),))
    spread = Codes("b", 1, (), (cols(1, size),), at=size * 8)
    layout = one("huge", (rows(),), inner, spread)
    tracemalloc.start()
    assert layout.fit(2, size).parts["b"].shape == (2, size)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_digit_may_be_huge_but_not_the_arithmetic() -> None:
    assert np.iinfo(np.int64).max > 8 * (1 << 56) * 2
