"""Tilings as formats: the same numbers as the format's, in places that its description says, for every shape."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import slow_products as slow
from hypothesis import given
from hypothesis import strategies as st
from pages import page
from random_layouts import Task, Wanted, layouts
from test_products import NAMES, activations, assert_same, layout_of, random_components, random_weight, shapes

import packfmt
from packfmt import codecs, grids, placement, retiling, tilings, verify
from packfmt.cli import run
from packfmt.codec import Codec, PackedTensor, exact_if
from packfmt.errors import LayoutError, PlanError
from packfmt.exporters import Extras
from packfmt.exporters import safetensors as container
from packfmt.kernels import simd
from packfmt.layout import Axis, Codes, Component, Digit, Grid, Layout, Values, cols, dtype_of, grid, rows
from packfmt.plan import Plan, Step
from tests.models import folder, normal, tensors
from tests.outputs import save

F32 = np.float32
Floats = npt.NDArray[np.float32]
Shape = tuple[int, int]

WITHOUT = {
    *("f32", "f16", "bf16", "if4", "if4_h16", "ptq161", "nvfp4_rows", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp8_e4m3_h64"),
    *("e4m3_tensor", "e5m0_g8", "ct_int4_g4", *codecs.FAMILIES["fp8"]),
    *("spqr", *codecs.FAMILIES["squeezellm"]),
}
OF_QUADS = {n for n in NAMES if layout_of(n).grid.name in ("quads", "quads_in_fives")}
TILED = [n + "_tile16" for n in NAMES if n not in WITHOUT]
LOOKED_UP = [n + suffix for n in NAMES if n in OF_QUADS for suffix in ("_words32", "_nibbles32")]
every = pytest.mark.parametrize("name", [*TILED, *LOOKED_UP])
FORMS = {suffix: form for form, suffix in tilings.SUFFIXES.items()}
RESPELLED = ("base3", "pairs", "tl2", "plane_digits", "plane_base3")  # grids whose codes become steps


def of(name: str) -> str:
    """The format that a tiling is of."""
    return tilings.base(name)


def form_of(name: str) -> str:
    return FORMS[name[len(of(name)) :]]


def tiled(packed: PackedTensor, name: str) -> PackedTensor:
    stored = retiling.tiled(packed.layout, packed.matrix, packed.components, form_of(name))
    return PackedTensor(codecs.get(name).layout, packed.shape, stored)


def in_order(packed: PackedTensor) -> PackedTensor:
    """With zeros where nothing lies."""
    return PackedTensor(
        packed.layout, packed.shape, placement.pack(packed.layout, packed.matrix, packed.unpack()), packed.dtype
    )


def bits(weight: Floats, signed_zeros: bool = True) -> bytes:
    """With one NaN for all, and perhaps one zero."""
    found = np.where(np.isnan(weight), F32(np.nan), weight)
    return (found if signed_zeros else found + F32(0)).tobytes()


def raw(packed: PackedTensor) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in packed.components.items()}


# ---------------------------------------------------------------- every format


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_what_has_no_tiling_says_so(name: str) -> None:
    for shape in shapes(layout_of(name)):
        assert tilings.tile(layout_of(name), shape) is None
    with pytest.raises(PlanError, match=rf"^{name}_tile16: {name} has no tiling, for .*; use {name} itself$") as error:
        codecs.get(name + "_tile16")
    assert "\n" not in str(error.value)


@every
def test_the_tiling_is_the_same_for_every_shape(name: str) -> None:
    layout, wanted = layout_of(of(name)), codecs.get(name).layout
    assert wanted.name == name
    high, wide = shapes(layout)[0]
    for shape in (*shapes(layout), *((h, w * 7) for h, w in shapes(layout)), (high * 40, wide * (4096 // wide))):
        found = tilings.tile(layout, shape, form_of(name))
        assert found is not None and found.layout == wanted and found.layout.id == wanted.id, shape


@every
def test_any_bytes_become_tiles_of_the_same_numbers(name: str) -> None:
    """Which `placement` packs to the same bytes, and which the product's own reading finds the same steps in."""
    layout = layout_of(of(name))
    for seed, shape in enumerate(shapes(layout)):
        packed = in_order(random_weight(layout, shape, seed, "bytes"))
        found = tiled(packed, name)
        assert raw(in_order(found)) == raw(found), shape
        with np.errstate(all="ignore"):
            wanted = grids.decode(layout, shape, packed.components)
            for numbers in (found.decode(), grids.decode(found.layout, shape, found.components)):
                signed = layout.grid.name not in RESPELLED
                assert bits(numbers, signed) == bits(wanted, signed), shape
            mine, theirs = (slow.read(which.layout, shape, which.unpack()) for which in (found, packed))
        assert (mine.steps * mine.unit == theirs.steps * theirs.unit).all()
        cols_ = mine.steps.shape[2]
        assert list(slow.blocks(cols_, mine.group)) == list(slow.blocks(cols_, theirs.group))
        assert bits(mine.scale) == bits(theirs.scale), shape


@every
def test_codes_and_scales_stay_what_they_are_where_the_grid_does(name: str) -> None:
    layout, target = layout_of(of(name)), codecs.get(name).layout
    packed = random_weight(layout, shapes(layout)[-2], 3, "bytes")
    before, after = packed.unpack(), tiled(packed, name).unpack()
    assert before.keys() - {"shift8", "shift4"} == after.keys()
    kept = {"perm", "columns", "column_values"}
    kept |= {"codes"} if layout.grid == target.grid else set()
    for part in kept & before.keys():
        assert before[part].tobytes() == after[part].tobytes(), part


@pytest.mark.parametrize("name", [n for n in (*TILED, *LOOKED_UP) if not n.startswith("tl")])
def test_many_runs_of_columns_and_a_rest(name: str) -> None:
    """And rows that share bytes with those of a quarter further on, such as BitNet's."""
    layout = layout_of(of(name))
    for shape in ((256, 2304), (70, 1024)):
        shape = tuple(-(-n // layout.block[a]) * layout.block[a] for n, a in zip(shape, ("rows", "cols"), strict=True))
        packed = in_order(random_weight(layout, (shape[0], shape[1]), 0, "bytes"))
        found = tiled(packed, name)
        assert raw(in_order(found)) == raw(found), shape
        with np.errstate(all="ignore"):
            assert bits(found.decode(), False) == bits(packed.decode(), False), shape


def test_bits_that_go_backwards_or_in_bytes_of_several_parts() -> None:
    """Columns from the last to the first; and a row's scales behind all of its codes."""
    backwards = Component("codes", (rows(), cols(2, reverse=True)), (Codes("codes", 4, (), (cols(1, 2, True),)),))
    behind = Component(
        "row", (rows(),), (Codes("codes", 4, (cols(2),), (cols(1, 2),)), Values("scale", "<f2", (cols(64),)))
    )
    scale = Component("scale", (rows(reverse=True), cols(64)), (Values("scale", "<f2"),))
    for components in ((backwards, scale), (behind,)):
        layout = Layout("seen_by_nobody", components, grid("affine", zero=8))
        for shape in ((40, 1024), (3, 192)):
            packed = in_order(PackedTensor(layout, shape, random_components(layout, shape, np.random.default_rng(0))))
            found = tilings.tile(layout, shape)
            assert found is not None
            tiles = PackedTensor(found.layout, shape, retiling.tiled(layout, shape, packed.components))
            assert raw(in_order(tiles)) == raw(tiles), shape
            assert bits(tiles.decode()) == bits(packed.decode()), shape


@every
def test_a_tiling_is_its_own(name: str) -> None:
    layout = codecs.get(name).layout
    for shape in shapes(layout_of(of(name))):
        found = tilings.tile(layout, shape, form_of(name))
        assert found is not None and tilings.same(layout, found.layout) and found.layout.name == name


@every
def test_repacking_there_and_back(name: str) -> None:
    shape = shapes(layout_of(of(name)))[-1]
    packed = codecs.get(of(name)).encode(normal(*shape))
    layout = codecs.get(name).layout
    there = packed.repack(layout)
    assert packed.refuses(layout) == "" and raw(there) == raw(tiled(packed, name))
    assert there.refuses(packed.layout) == ""
    assert raw(there.repack(packed.layout)) == raw(packed)


@pytest.mark.parametrize("name", ["hif4", "hif4_h16"])
def test_any_bytes_of_hif4_come_back(name: str) -> None:
    """Every scale, and every doubling of any weights."""
    layout = layout_of(name)
    packed = in_order(random_weight(layout, (33, 64 * 17), 6, "bytes"))
    assert len(np.unique(packed.unpack()["scale"])) > 200
    there = tiled(packed, name + "_tile16")
    assert raw(there.repack(layout)) == raw(packed)
    says = "all weights that share a doubling there have it, and every scale is a ufloat8_e6m2"
    assert exact_if(there.layout, layout, there.shape) == says
    for shape in ((0, 64), (5, 0)):
        empty = codecs.get(name).encode(np.zeros(shape, F32))
        assert raw(tiled(empty, name + "_tile16").repack(layout)) == raw(empty)


HIF4_REFUSED = {
    "shift8": ("codes", (3, 70), 1 << 4, r"column 70 of row 3 is not doubled as its neighbours are \(shift8\)$"),
    "shift4": ("codes", (3, 70), 1 << 5, r"column 70 of row 3 is not doubled as its neighbours are \(shift4\)$"),
    "scale": ("scale", (2, 1), 1, r"scale \[2, 1\] is .*, which is no ufloat8_e6m2$"),
}


@pytest.mark.parametrize("name", HIF4_REFUSED)
def test_what_hif4_has_not_got_does_not_come_back(name: str) -> None:
    part, at, flipped, says = HIF4_REFUSED[name]
    there = tiled(random_weight(layout_of("hif4"), (5, 128), 7, "ordinary"), "hif4_tile16")
    parts = there.unpack()
    parts[part].view(np.uint8 if part == "codes" else np.uint16)[at] ^= flipped
    other = PackedTensor(there.layout, there.shape, placement.pack(there.layout, there.shape, parts))
    with pytest.raises(LayoutError, match="^hif4_tile16 to hif4: " + says):
        other.repack(layout_of("hif4"))


@pytest.mark.parametrize("name", [n for n in LOOKED_UP if "perm" not in n])
def test_tilings_of_one_format_become_each_other(name: str) -> None:
    layout = layout_of(of(name))
    packed = random_weight(layout, shapes(layout)[-2], 4, "bytes")
    decoded, looked_up = tiled(packed, of(name) + "_tile16"), tiled(packed, name)
    assert raw(decoded.repack(looked_up.layout)) == raw(looked_up)
    assert raw(looked_up.repack(decoded.layout)) == raw(decoded)


@pytest.mark.parametrize("name", [*TILED, *LOOKED_UP])
def test_encoders_are_those_of_the_format(name: str) -> None:
    mine, theirs = codecs.get(name), codecs.get(of(name))
    shape = shapes(theirs.layout)[-2]
    assert list(mine.encoders) == list(theirs.encoders) and mine.weighted == theirs.weighted
    for rule in mine.encoders:
        weight, importance = normal(*shape), np.linspace(0, 3, shape[1], dtype=F32)
        assert raw(mine.encode(weight, rule)) == raw(theirs.encode(weight, rule).repack(mine.layout))
        if rule in mine.weighted:
            found = mine.encode(weight, rule, importance=importance)
            assert raw(found) == raw(theirs.encode(weight, rule, importance=importance).repack(mine.layout))
        if rule in mine.shared:
            assert raw(mine.encode(weight, rule, peak=1.5)) == raw(
                theirs.encode(weight, rule, peak=1.5).repack(mine.layout)
            )


@pytest.mark.parametrize("name", [n for n in TILED if codecs.get(n).fast])
def test_a_fast_encoder_gives_the_bytes_of_the_slow_one(name: str) -> None:
    codec = codecs.get(name)
    slow_one = Codec(codec.layout, codec.encoders)
    for rule in codec.fast:
        assert raw(codec.encode(normal(19, 512), rule)) == raw(slow_one.encode(normal(19, 512), rule))
        with pytest.raises(LayoutError, match="1 weights are not finite"):
            codec.encode(np.where(np.eye(19, 512) * np.arange(512) == 7, np.nan, normal(19, 512)), rule)


@pytest.mark.parametrize("name", ["mxfp4_tile16", "sherry_tile16", "sherry_words32", "ct_int4_row_asym_tile16"])
@pytest.mark.parametrize("shape", [(0, 512), (16, 0), (0, 0)])
def test_no_rows_and_no_columns(name: str, shape: Shape) -> None:
    packed = codecs.get(name).encode(np.zeros(shape, F32))
    assert packed.decode().shape == shape
    for held in (packed, packfmt.prepare(packed)):
        assert held.matmul(np.ones((2, shape[1]), F32)).tobytes() == np.zeros((2, shape[0]), F32).tobytes()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x_tile16", r"^x_tile16: no format is called 'x'"),
        ("tq2_tile16", r"^tq2_tile16: no format is called 'tq2'; did you mean tq2_0 "),
        ("mxfp4_tile16_tile16", r"^mxfp4_tile16_tile16: mxfp4_tile16 is a tiling already; take it as it is$"),
        ("sherry_tile16_words32", r"sherry_tile16 is a tiling already"),
        ("mxfp4_words32", r"mxfp4 has no such tiling, which is for codes of four weights; use mxfp4 itself$"),
        ("bf16_words32", r"bf16 has no tiling, for products take it as numbers"),
        ("ct_int4_g4_tile16", r"ct_int4_g4 has no tiling, for no tile holds its codes or groups"),
        ("mxfp4_tile32", r"no format is called 'mxfp4_tile32'; did you mean mxfp4_tile16\?"),
        ("mxfp4_tile", r"did you mean mxfp4_tile16\?"),
        ("_tile16", r"no format is called '_tile16'; did you mean <format>_tile16, _words32 or _nibbles32\?"),
    ],
)
def test_names_that_no_tiling_has(name: str, says: str) -> None:
    with pytest.raises(PlanError, match=says) as error:
        codecs.get(name)
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")


# ---------------------------------------------------------------- ready at once


@every
def test_preparing_a_tiling_copies_nothing(name: str) -> None:
    layout = layout_of(of(name))
    packed = random_weight(layout, shapes(layout)[-2], 5, "ordinary")
    there = tiled(packed, name)
    ready = packfmt.prepare(there)
    assert ready.packed is there and ready.layout.name == name
    assert all(np.shares_memory(ready.packed.components[n], array) for n, array in there.components.items())
    x = activations(3, packed.shape[1], 2)
    for found in (ready.matmul(x), there.matmul(x)):
        assert_same(found, slow.product(packed, x))


@pytest.mark.parametrize("name", ["mxfp4_tile16", "tq2_0_tile16", "nvfp4_tile16", "sherry_words32"])
def test_a_converted_model_is_multiplied_as_it_lies_in_its_file(name: str, tmp_path: Path) -> None:
    model, seen = folder(tmp_path / "model"), 0
    for to in (of(name), name):
        packfmt.convert(model, tmp_path / f"{to}.safetensors", to=to)
    with (
        packfmt.open(tmp_path / f"{of(name)}.safetensors") as plain,
        packfmt.open(tmp_path / f"{name}.safetensors") as tiles,
    ):
        for key in tensors():
            if plain[key].layout.name != of(name):
                assert plain[key].layout == tiles[key].layout
                continue
            here = tiles.map(key)
            assert not any(array.flags.writeable for array in here.components.values())
            assert here.layout == codecs.get(name).layout and raw(here) == raw(tiles[key])
            ready, x = packfmt.prepare(here), activations(5, here.shape[-1], 1)
            assert ready.packed is here
            assert_same(ready.matmul(x), packfmt.prepare(plain[key]).matmul(x))
            assert_same(tiles[key].matmul(x), plain[key].matmul(x))
            seen += 1
    assert seen == 3


@pytest.mark.parametrize("name", ["mxfp4", "sherry", "hif4"])
def test_what_is_packed_becomes_tiles_and_comes_back(name: str, tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    packfmt.convert(model, tmp_path / "packed", to=name)
    there = packfmt.convert(tmp_path / "packed", tmp_path / "tiles", to=name + "_tile16")
    packfmt.convert(tmp_path / "tiles", tmp_path / "again", to=name)
    steps = [s for s in there.plan.steps if s.layout.name == name + "_tile16"]
    assert steps and all(s.action == "repack" and s.exact and "refused" not in s.reason for s in steps)
    with packfmt.open(tmp_path / "packed") as before, packfmt.open(tmp_path / "again") as after:
        assert {k: raw(before[k]) for k in before} == {k: raw(after[k]) for k in after}


# ---------------------------------------------------------------- commands


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = run([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out + out.err


@pytest.mark.parametrize("name", ["mxfp4_tile16", "ct_int3_g32_asym_tile16", "sherry_nibbles32"])
def test_every_command_takes_a_file_of_tiles(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, there = folder(tmp_path / "model"), tmp_path / "out.safetensors"
    assert said(capsys, "convert", model, there, "--to", name, "--verify")[0] == 0
    assert said(capsys, "validate", there)[0] == 0
    assert said(capsys, "verify", there)[0] == 0
    assert said(capsys, "verify", there, "--against", model)[0] == 0
    code, text = said(capsys, "inspect", there)
    assert code == 0 and name in text
    assert said(capsys, "decode", there, tmp_path / "dense")[0] == 0
    code, text = said(capsys, "convert", model, tmp_path / "no", "--to", "bf16_tile16")
    assert code == 2 and "bf16 has no tiling" in text


def test_a_file_of_the_tiles_of_a_layout_that_nobody_knows_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name looks as if numbers of ours had made it."""
    layout = replace(layout_of("q4_0"), name="nobody_knows_this")
    held = packfmt.prepare(PackedTensor(layout, (5, 64), codecs.get("q4_0").encode(normal(5, 64)).components)).packed
    assert held.layout.name == "nobody_knows_this" + "_tile16" * (not simd.INTERPRETED)
    step = Step("w", held.shape, held.dtype, held.layout, held.layout, "keep", "")
    save(container, tmp_path / "m.safetensors", Plan("", "safetensors", (step,)), iter([held]), Extras())
    assert verify.validate(tmp_path / "m.safetensors") == []
    assert said(capsys, "validate", tmp_path / "m.safetensors")[0] == 0
    assert said(capsys, "verify", tmp_path / "m.safetensors")[0] == 0


# ---------------------------------------------------------------- descriptions that nobody has seen

DTYPES = ("<f2", "<f4", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "<f8", "i1", "<u2", "?")  # of scales
KINDS = ("affine", "quotient", "affine_zero", "planes", "levels", "table", "scaled")
ELEMENTS = {"float4_e2m1fn": 4, "int4": 4, "float6_e2m3fn": 6, "int8_f6": 8, "float8_e5m2": 8, "float8_e4m3fn": 8}
NAMED = ("float8_e4m3fn", "float8_e8m0fnu", "ufloat8_e6m2", "ufloat7_e4m3")


@st.composite
def grids_of(draw: st.DrawFn, group: int) -> tuple[Grid, list[Wanted]]:
    """A grid of whole steps, or of floats, and its parts; (1 or all rows, group) share a scale."""
    kind, width, dtype = draw(st.sampled_from(KINDS)), draw(st.integers(1, 8)), draw(st.sampled_from(DTYPES))
    shared, more = (draw(st.sampled_from([1, 1, 1, 0])), group), list[Wanted]()
    if kind == "affine_zero":
        numbers = grid("affine_zero")
        more = [Wanted("zero", "", draw(st.integers(1, width)), draw(st.sampled_from([shared, shared, (1, 0)])))]
    elif kind in ("levels", "table"):
        width = min(width, 6)
        values = tuple(draw(st.lists(st.integers(-127, 127), min_size=2**width, max_size=2**width)))
        numbers = grid("levels", values=values)
        if kind == "table":
            dtype, numbers = "u1", grid("table", values=values, exponent=draw(st.integers(0, 255)))
    elif kind == "scaled":
        element, named = draw(st.sampled_from(sorted(ELEMENTS))), draw(st.sampled_from(["", *NAMED]))
        width, dtype, whole = (
            ELEMENTS[element],
            "u1" if named else dtype,
            draw(st.sampled_from(["", "times", "divides"])),
        )
        more = [Wanted("global_scale", "<f4", 32, (draw(st.sampled_from([0, 0, 1])), 0))] if whole else []
        numbers = grid("scaled", element=element, scale=named, global_scale=whole)
    else:
        numbers = grid(kind, zero=draw(st.integers(-3, 200)), **({"ratio": 0} if kind == "planes" else {}))
    scale = Wanted("scale", dtype, 8 * dtype_of(dtype).itemsize, shared)
    return numbers, [Wanted("codes", "", width, (1, 1)), scale, *more]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Layout, Shape]:
    """Codes of 1 to 8 bits with their scales, arranged in any way; perhaps in planes, or permuted."""
    group = draw(st.sampled_from([4, 8, 16, 32, 64, 128, 256, 512, 0]))
    wide = group or draw(st.sampled_from([1, 5, 31, 32, 100, 256, 300]))
    shape = draw(st.integers(1, 40)), wide * draw(st.integers(1, 2))
    numbers, parts = draw(grids_of(group))
    if numbers.name != "planes" and draw(st.integers(0, 4)) == 0:
        parts.append(Wanted("perm", "<u4", 32, (0, 1)))
    layout = replace(draw(layouts(Task(shape, tuple(parts)))), name="seen_by_nobody", grid=numbers)
    return (in_planes(draw, layout) if numbers.name == "planes" else layout), shape


def in_planes(draw: st.DrawFn, layout: Layout) -> Layout:
    """The same components several times, in cells that follow one another in any way."""
    components = []
    for component in layout.components:
        assert isinstance(component, Component)
        at = draw(st.integers(0, len(component.over)))
        over = (*component.over[:at], Digit("plane"), *component.over[at:])
        components.append(replace(component, over=over))
    row_axis, column_axis = layout.axes
    planes = Axis("plane", size=draw(st.integers(1, 3)))
    return replace(layout, components=tuple(components), axes=(row_axis, planes, column_axis))


@pytest.mark.kernels
@given(drawn=weights(), seed=st.integers(0, 99))
def test_any_description_is_tiled_to_the_same_numbers(drawn: tuple[Layout, Shape], seed: int) -> None:
    layout, shape = drawn
    rng = np.random.default_rng(seed)
    packed = PackedTensor(layout, shape, random_components(layout, shape, rng))
    if "perm" in (parts := packed.unpack()):
        parts["perm"] = rng.permutation(shape[1]).astype("<u4").reshape(parts["perm"].shape)
        packed = PackedTensor(layout, shape, placement.pack(layout, shape, parts))
    x = activations(2, shape[1], seed)
    wanted = slow.product(packed, x)
    for product in (packed.matmul(x), packfmt.prepare(packed).matmul(x)):
        assert_same(product, wanted)
    found = tilings.tile(layout, shape)
    if found is None:
        return
    tiles = PackedTensor(found.layout, shape, retiling.tiled(layout, shape, packed.components))
    assert raw(in_order(tiles)) == raw(tiles)
    with np.errstate(all="ignore"):
        assert bits(grids.decode(found.layout, shape, tiles.components)) == bits(packed.decode())
    assert Layout.from_json(json.loads(json.dumps(found.layout.to_json()))) == found.layout
    own = tilings.tile(found.layout, shape)
    assert own is not None and tilings.same(found.layout, own.layout)


def test_steps_that_no_byte_holds_are_looked_up_in_two() -> None:
    """`levels` of more than a byte between them, as no format has."""
    codes = Component("codes", (rows(), cols(2)), (Codes("codes", 4, (), (cols(1, 2),)),))
    scale = Component("scale", (rows(), cols(32)), (Values("scale", "<f2"),))
    layout = Layout("wide", (codes, scale), grid("levels", values=tuple(range(-1000, 1001, 130))))
    packed = PackedTensor(layout, (17, 64), random_components(layout, (17, 64), np.random.default_rng(1)))
    found = tilings.tile(layout, (17, 64))
    assert found is not None and found.how.codes == "wide"
    there = PackedTensor(found.layout, (17, 64), retiling.tiled(layout, (17, 64), packed.components))
    assert bits(there.decode()) == bits(packed.decode())


# ---------------------------------------------------------------- the page

PAGE = page("tiled")


def rows_of(heading: str) -> list[list[str]]:
    """Cells of the table that begins with this row."""
    table = PAGE.split(heading + "\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]


COLUMNS = rows_of("| format | columns of a run | column |")


@pytest.mark.parametrize(("formats", "run_", "column"), [r for r in COLUMNS if not r[0].startswith("in order")])
def test_the_page_says_where_columns_lie(formats: str, run_: str, column: str) -> None:
    for name in re.findall(r"`(\w+)`", formats):
        layout = layout_of(name)
        found = tilings.tile(layout, (layout.block["rows"], 4096))
        assert found is not None
        assert_columns(found.order, found.how.widths[0], int(run_), column)


@pytest.mark.parametrize(("formats", "run_", "column"), [r for r in COLUMNS if r[0].startswith("in order")])
def test_the_page_says_what_in_order_is(formats: str, run_: str, column: str) -> None:
    width = int(re.findall(r"in order, (\d) bit", formats)[0])
    for which, name in re.findall(r"(?:the (low|high) bits of )?`(\w+)`", formats):
        found = tilings.tile(layout_of(name), (32, 4096))
        assert found is not None and found.how.widths[which == "high"] == width
        assert_columns(found.order, width, int(run_), column)
        member = next(m for c, m, _ in found.layout.members() if c.name == tilings.CODES[which == "high"])
        assert isinstance(member, Codes)
        assert member.units == (cols(1, 4),) and member.fields == (cols(4, 8 // width),)


def assert_columns(order: npt.NDArray[np.int32], width: int, run_: int, column: str) -> None:
    fields, dwords = 8 // width, run_ * width // 32
    code = re.sub(r"(\d) ([djf(])", r"\1 * \2", column)
    wanted = [
        start + eval(code, {"d": d, "f": f, "j": j})
        for start in range(0, len(order), run_)
        for d in range(dwords)
        for f in range(fields)
        for j in range(4)
    ]
    assert order.tolist() == wanted


def test_the_page_names_what_has_no_tiling() -> None:
    text = PAGE.split("Others have no tiling")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", text)
    assert len(named) >= 5 and set(named) <= WITHOUT


def test_the_page_tells_which_grids_become_others() -> None:
    told = {}
    for theirs, mine in rows_of("| the format's grid | in the tiling |"):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", theirs), re.findall(r"`(\w+)`", mine)[0])
    for name in TILED:
        theirs, mine = layout_of(of(name)).grid, codecs.get(name).layout.grid
        assert mine.name == told.get(theirs.name, theirs.name), name
