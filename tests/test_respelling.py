"""The same numbers in codes that spell them otherwise: between all ternary layouts, or refused with the reason."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, grids, respelling
from packfmt.codec import PackedTensor, exact_if, moves_as_bits, why_inexact
from packfmt.errors import LayoutError
from packfmt.layout import Axis, Codes, Component, Layout, Values, cols, dtype_of, grid, rows
from packfmt.placement import pack
from tests.models import normal, same

F32 = np.float32
Floats = npt.NDArray[np.float32]
SIDE, APART = 1, 16  # how many columns apart the weights of a quad lie

SHERRY = ("sherry", "sherry_g128", "sherry_row", "sherry_t32", "sherry_s16_perm")  # quads side by side
STRIDED = ("sherry_s16", "sherry_t32_s16")
FREE = ("tq1_0", "tq2_0", "q2_0", "i2_s", "i2_s_arm", "bitnet", "bitnet_divide", "ptqtp1", "ptqtp1_b3")
PLANES = ("ptqtp2", "ptqtp2_b3", "ptqtp2_n4", "ptqtp3", "ptqtp4_b3")
TIED = ("ptqtp2_tied", "ptqtp2_b3_tied", "ptqtp2_n4_tied")


def ternary(shape: tuple[int, int], stride: int = 0, scale: float = 0.25, seed: int = 0) -> Floats:
    """Weights of -1, 0, 1 times a scale; with a stride, every quad has exactly one zero."""
    rng = np.random.default_rng(seed)
    if not stride:
        return (rng.integers(-1, 2, shape) * scale).astype(F32)
    signs = rng.integers(0, 2, shape) * 2.0 - 1
    chunks = signs.reshape(shape[0], -1, 4, stride)
    zero = rng.integers(0, 4, (shape[0], chunks.shape[1], 1, stride))
    np.put_along_axis(chunks, zero, 0, 2)
    return (signs * scale).astype(F32)


def packed(name: str, weight: Floats, encoder: str = "") -> PackedTensor:
    return codecs.get(name).encode(weight, encoder, lossless=True)


def held(name: str, weight: Floats) -> PackedTensor:
    """The weight, which is -1, 0, 1 times one scale, as the layout holds it: by way of a tensor that surely does."""
    scale = np.abs(weight).max()
    parts = {"codes": (weight / scale + 1).astype(np.uint8), "scale": np.array([[scale]], F32)}
    layout = codecs.get("i2_s").layout
    return PackedTensor(layout, weight.shape, pack(layout, weight.shape, parts)).repack(codecs.get(name).layout)


# ---------------------------------------------------------------- between all of them


@pytest.mark.parametrize(("source", "target"), [*permutations((*SHERRY, *FREE), 2)])
def test_quads_side_by_side_pass_between_all_layouts_and_back(source: str, target: str) -> None:
    here = held(source, ternary((36, 512), SIDE))
    assert why_inexact(here.layout, codecs.get(target).layout, here.shape) == ""
    there = here.repack(codecs.get(target).layout)
    assert same(there.decode() + F32(0), ternary((36, 512), SIDE) + F32(0))
    back = there.repack(here.layout)
    assert all(same(back.components[k], v) for k, v in here.components.items())


@pytest.mark.parametrize(("source", "target"), [*permutations((*STRIDED, *FREE), 2)])
def test_quads_apart_pass_between_all_layouts_and_back(source: str, target: str) -> None:
    here = held(source, ternary((36, 512), APART))
    there = here.repack(codecs.get(target).layout)
    assert same(there.decode() + F32(0), ternary((36, 512), APART) + F32(0))
    back = there.repack(here.layout)
    assert all(same(back.components[k], v) for k, v in here.components.items())


@pytest.mark.parametrize(("source", "target"), [*permutations(PLANES[:3], 2)])
def test_the_same_planes_pass_between_their_three_forms_byte_for_byte(source: str, target: str) -> None:
    here = codecs.get(source).encode(normal(6, 256))
    there = here.repack(codecs.get(target).layout)
    assert exact_if(here.layout, there.layout, here.shape) == ""
    assert same(there.decode(), here.decode())
    assert all(same(there.repack(here.layout).components[k], v) for k, v in here.components.items())


@pytest.mark.parametrize(("source", "target"), [*permutations(TIED, 2)])
def test_tied_planes_pass_between_their_three_forms_byte_for_byte(source: str, target: str) -> None:
    here = codecs.get(source).encode(normal(6, 256))
    there = here.repack(codecs.get(target).layout)
    assert same(there.decode(), here.decode())
    assert all(same(there.repack(here.layout).components[k], v) for k, v in here.components.items())


@pytest.mark.parametrize(("few", "more"), [("ptqtp1", "ptqtp2"), ("ptqtp2_b3", "ptqtp4_b3"), ("ptqtp2_n4", "ptqtp3")])
def test_planes_may_be_added_and_not_dropped(few: str, more: str) -> None:
    here = codecs.get(few).encode(normal(6, 256))
    there = here.repack(codecs.get(more).layout)
    assert same(there.decode() + F32(0), here.decode() + F32(0))
    assert f"{more} has {more[5]} planes, {few} {few[5]}" == there.refuses(here.layout)


def test_tied_planes_become_free_ones_and_come_back() -> None:
    layout = codecs.get("ptqtp2_tied").layout
    parts = codecs.get("ptqtp2_tied").encode(normal(6, 256)).unpack()
    parts["scale"].view(np.uint16)[:] &= 0xFFFC  # so that three times it is a float16, too
    here = PackedTensor(layout, (6, 256), pack(layout, (6, 256), parts))
    assert exact_if(layout, codecs.get("ptqtp2").layout, here.shape) == "every scale is a float16"
    there = here.repack(codecs.get("ptqtp2").layout)
    assert same(there.decode(), here.decode())
    assert same(there.repack(here.layout).components["blocks"], here.components["blocks"])
    assert "each plane's scale is 3 times the next one's" in exact_if(there.layout, here.layout, here.shape)


def test_free_planes_do_not_become_tied_ones() -> None:
    here = codecs.get("ptqtp2").encode(normal(6, 256))
    with pytest.raises(LayoutError, match=r"the planes' scales \[\d, \d\] are .*, .*, not each 3 times the next$"):
        here.repack(codecs.get("ptqtp2_tied").layout)


@pytest.mark.kernels
@given(seed=st.integers(0, 2**32 - 1), shape=st.tuples(st.integers(1, 40), st.integers(1, 3)))
def test_any_bytes_of_sherry_become_tq2_0_and_the_same_bytes_again(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0], shape[1] * 42), np.uint8)
    blocks.reshape(*shape, 42)[..., 41] &= 0x3B  # finite scales, not negative
    layout = codecs.get("sherry").layout
    here = PackedTensor(layout, (shape[0], 256 * shape[1]), {"blocks": blocks})
    for name in ("tq2_0", "tq1_0", "sherry_t32", "sherry_g128"):
        there = here.repack(codecs.get(name).layout)
        assert same(there.decode() + F32(0), here.decode() + F32(0))
        assert same(there.repack(layout).components["blocks"], blocks)


# ---------------------------------------------------------------- what does not fit


def refused(name: str, target: str, weight: Floats, encoder: str = "") -> str:
    source = codecs.get(name).encode(weight, encoder)
    with pytest.raises(LayoutError) as caught:
        source.repack(codecs.get(target).layout)
    return str(caught.value)


def test_a_quad_without_its_one_zero_is_named() -> None:
    weight = ternary((4, 512), SIDE)
    weight[2, 260:264] = 0.25
    weight[3, 0:4] = [0, 0, 0.25, 0]
    assert refused("tq2_0", "sherry", weight) == (
        "tq2_0 to sherry: 2 of 512 quads have not exactly one zero, the first at [2, 65]"
    )


def test_quads_side_by_side_are_not_quads_apart() -> None:
    said = refused("sherry", "sherry_s16", ternary((64, 512), SIDE))
    count = int(said.split(": ")[1].split()[0])
    assert said.startswith("sherry to sherry_s16: ") and said.endswith(
        "quads have not exactly one zero, the first at [0, 5]"
    )
    assert 0.55 < count / (64 * 128) < 0.61, "of random zeros 27/64 leave one in a quad"


@pytest.mark.parametrize("target", ["i2_s", "bitnet", "sherry_row"])
def test_the_scale_that_differs_is_named(target: str) -> None:
    weight = ternary((4, 512), SIDE)
    weight[1, 256:] *= 2
    source = codecs.get("tq2_0").encode(weight)
    with pytest.raises(LayoutError, match=r"scale \[1, 1\] is 0\.5, that of weights before it 0\.25, and "):
        source.repack(codecs.get(target).layout)


@pytest.mark.parametrize(("target", "dtype"), [("tq2_0", "float16"), ("bitnet", "bfloat16"), ("sherry", "float16")])
def test_a_scale_that_the_target_s_dtype_has_not_is_named(target: str, dtype: str) -> None:
    said = refused("sherry_row", target, ternary((4, 512), SIDE, scale=1 / 3))
    assert said.endswith(f"scale [0, 0] is 0.333333343, which is no {dtype}")


@pytest.mark.parametrize(("source", "target"), [("bitnet", "bitnet_divide"), ("bitnet_divide", "bitnet")])
def test_a_scale_that_divides_multiplies_only_as_a_power_of_two(source: str, target: str) -> None:
    said = refused(source, target, ternary((8, 512), scale=0.75))
    assert "no power of two, and one divides by it where the other multiplies" in said
    assert "every scale is a power of two" in exact_if(codecs.get(source).layout, codecs.get(target).layout, (8, 512))


def test_a_code_that_no_encoder_writes_is_refused() -> None:
    here = codecs.get("tq2_0").encode(ternary((2, 256)))
    blocks = here.components["blocks"].copy()
    blocks[1, 3] |= 3
    bad = PackedTensor(here.layout, here.shape, {"blocks": blocks})
    with pytest.raises(LayoutError, match="1 of 512 weights are 2 times their scale, for which there is no code"):
        bad.repack(codecs.get("tq1_0").layout)


def test_columns_that_are_all_zero_need_no_scale() -> None:
    weight = ternary((4, 512), SIDE)
    weight[1, 256:] = 0
    here = codecs.get("tq2_0").encode(weight)
    for name in ("i2_s", "sherry", "ptqtp1", "tq1_0"):
        there = here.repack(codecs.get(name).layout)
        assert same(there.decode() + F32(0), weight + F32(0))
    assert not here.repack(codecs.get("sherry").layout).unpack()["scale"][1, 1]


def test_a_scale_over_zeros_stays_where_the_groups_are_the_same() -> None:
    parts = {"codes": np.ones((2, 256), np.uint8), "scale": np.array([[3.5], [0]], np.float16)}
    layout = codecs.get("tq2_0").layout
    here = PackedTensor(layout, (2, 256), pack(layout, (2, 256), parts))
    there = here.repack(codecs.get("tq1_0").layout)
    assert there.unpack()["scale"].reshape(-1).tolist() == [3.5, 0]
    assert same(there.repack(layout).components["blocks"], here.components["blocks"])


def test_layouts_without_steps_say_so() -> None:
    f32, tq2_0 = codecs.get("f32").layout, codecs.get("tq2_0").layout
    assert respelling.why_not(f32, tq2_0, (2, 256)) == "the numbers of f32 are no steps times scales, but 'plain'"
    other = Layout("odd", (Component("codes", (rows(), cols()), (Codes("codes", 8),)),
                           Component("scale", (), (Values("scale", "u1"),))), grid("affine", zero=1))  # fmt: skip
    assert respelling.why_not(tq2_0, other, (2, 256)) == "the scales of odd are uint8"


def test_parts_that_no_spelling_knows_are_not_lost() -> None:
    more = Layout("more", (Component("codes", (rows(), cols()), (Codes("codes", 8),)),
                           Component("scale", (), (Values("scale", "<f4"),)),
                           Component("zero", (), (Values("zero", "<f4"),))), grid("affine", zero=1))  # fmt: skip
    assert respelling.why_not(more, codecs.get("i2_s").layout, (2, 256)) == "more has other parts: codes, scale, zero"


def test_no_rows_and_no_columns_are_respelled() -> None:
    for shape in ((0, 256), (3, 0)):
        here = codecs.get("tq2_0").encode(np.zeros(shape, F32))
        assert here.repack(codecs.get("sherry").layout).decode().shape == shape


# ---------------------------------------------------------------- grids


def test_a_permutation_says_where_each_stored_column_belongs() -> None:
    """A layout of its own, with columns stored in any order, decodes to the weight in its own."""
    layout = Layout(
        "shuffled",
        (
            Component("codes", (rows(), cols()), (Codes("codes", 8),)),
            Component("scale", (rows(), cols(4)), (Values("scale", "<f4"),)),
            Component("perm", (cols(),), (Values("perm", "<u2"),)),
        ),
        grid("affine", zero=0),
    )
    rng = np.random.default_rng(4)
    weight, perm = rng.integers(0, 200, (5, 12)).astype(F32), rng.permutation(12).astype(np.uint16)
    parts = {"codes": weight[:, perm].astype(np.uint8), "scale": np.ones((5, 3), F32), "perm": perm[None]}
    components = pack(layout, (5, 12), parts)
    assert same(grids.decode(layout, (5, 12), components), weight)
    assert grids.findings(layout, parts) == []
    parts["perm"] = np.full((1, 12), 3, np.uint16)
    assert grids.findings(layout, parts) == ["perm does not name each of 12 columns once"]
    parts["perm"] = np.full((1, 12), 99, np.uint16)
    with pytest.raises(LayoutError, match="grid 'affine' cannot take these parts"):
        grids.dequantize(layout.grid, parts)


def test_perm_of_sherry_makes_quads_apart_of_quads_side_by_side() -> None:
    weight = ternary((8, 512), SIDE)
    here = packed("sherry_s16_perm", weight)
    perm = here.components["perm"]
    assert sorted(perm.tolist()) == list(range(512)) and perm[:3].tolist() == [0, 4, 8] and perm[16] == 1
    apart = PackedTensor(codecs.get("sherry_s16").layout, weight.shape, {"blocks": here.components["blocks"]})
    assert same(apart.decode(), weight[:, perm])
    assert same(
        packed("sherry_s16", np.ascontiguousarray(weight[:, perm])).components["blocks"], here.components["blocks"]
    )
    assert same(packed("sherry", weight).repack(here.layout).components["blocks"], here.components["blocks"])


def test_base3_bytes_that_digits_do_not_give_are_found() -> None:
    codes = np.resize(np.arange(256, dtype=np.uint8), (5, 1, 52))
    codes[..., 48:] = 0
    layout = codecs.get("tq1_0").layout
    parts = {"codes": codes, "scale": np.ones((5, 1, 1), np.float16)}
    given_ = {(256 * q + 242) // 243 for q in range(243)}
    wrong = sum(int(b) not in given_ for b in codes.reshape(-1))
    assert 256 - len(given_) == 13 and wrong > 0
    assert grids.findings(layout, parts) == [
        f"{wrong} of 260 bytes of codes are none of those that digits of base 3 give"
    ]


SPELLED = [
    grid("quads", stride=1, values=((0, 1, 1, 1), (1, 0, -1, 1))),
    grid("quads", stride=2, values=((0, 1, 1, 1), (1, 0, -1, 1))),
    grid("base3", block=8, runs=((1, 5), (1, 3)), first="low"),
]


@pytest.mark.parametrize(
    "bad",
    [
        grid("quads", stride=0, values=((0, 1, 1, 1),)),
        grid("quads", stride=3, values=((0, 1, 1, 1),)),
        grid("quads", stride=1, values=((0, 1, 1, 2),)),
        grid("quads", stride=1, values=((0, 1, 1),)),
        grid("quads", stride=1, values=()),
        grid("quads", stride=1.0, values=((0, 1, 1, 1),)),
        grid("quads", stride=1, values="0111"),
        grid("base3", block=8, runs=((1, 5), (1, 3)), first="middle"),
        grid("base3", block=9, runs=((1, 5), (1, 3)), first="high"),
        grid("base3", block=8, runs=((1, 8),), first="high"),
        grid("base3", block=8, runs=((1, -5), (1, 13)), first="high"),
        grid("base3", block=8, runs=5, first="high"),
        grid("base3", block=0, runs=(), first="high"),
        grid("plane_digits", count=9, ratio=0),
        grid("plane_base3", block=8, runs=((2, 4),), first="high", ratio="a"),
        grid("planes", zero="a", ratio=0),
    ],
)
def test_parameters_that_would_lead_a_kernel_astray_are_refused(bad: grids.Grid) -> None:
    wide = {"base3": (2, 1, 2), "plane_base3": (2, 1, 1, 2), "plane_digits": (2, 1, 8), "planes": (2, 1, 8)}
    codes = np.zeros(wide.get(bad.name, (2, 2)), np.uint8)
    for more in (codes, codes + np.uint8(200)):
        scale = np.ones((2, 1, 1) if bad.name.startswith("plane") else (2, 1), np.float16)
        with pytest.raises(LayoutError, match=f"grid '{bad.name}' cannot take these parts and parameters"):
            grids.dequantize(bad, {"codes": more, "scale": scale})


def test_a_code_beyond_the_quads_is_refused() -> None:
    with pytest.raises(LayoutError, match="code 7, needs below 2"):
        grids.dequantize(SPELLED[0], {"codes": np.full((1, 2), 7, np.uint8), "scale": np.ones((1, 1), F32)})


def test_moving_bits_and_spelling_agree() -> None:
    """Two layouts of the same parts: the mover and the spelling give the same bytes."""
    here = codecs.get("i2_s").encode(ternary((8, 512)))
    target = codecs.get("i2_s_arm").layout
    assert moves_as_bits(here.layout, target, here.shape)
    spelled = respelling.respell(here.layout, target, here.matrix, here.components)
    assert all(same(spelled[k], v) for k, v in here.repack(target).components.items())


def test_rows_that_share_a_scale_are_kept_apart_from_columns_that_do() -> None:
    tiles = Layout(
        "tiles",
        (
            Component("codes", (rows(), cols()), (Codes("codes", 8, levels=3),)),
            Component("scale", (rows(4), cols(64)), (Values("scale", "<f4"),)),
        ),
        grid("affine", zero=1),
        (Axis("rows", "rows"), Axis("cols", "cols")),
    )
    scale = np.exp2(np.arange(8, dtype=F32)).reshape(2, 4)
    parts = {"codes": np.random.default_rng(5).integers(0, 3, (8, 256)).astype(np.uint8), "scale": scale}
    here = PackedTensor(tiles, (8, 256), pack(tiles, (8, 256), parts))
    there = here.repack(codecs.get("q2_0").layout)
    assert same(there.decode() + F32(0), here.decode() + F32(0))
    assert same(there.repack(tiles).components["scale"], here.components["scale"])
    with pytest.raises(
        LayoutError, match=r"scale \[0, 1\] is 2, that of weights before it 1, and 256 columns share one there"
    ):
        here.repack(codecs.get("tq2_0").layout)
    assert dtype_of("<f4") == F32


# ---------------------------------------------------------------- scales that are no ordinary numbers


def of(name: str, codes: npt.NDArray[np.uint8], scale: object) -> PackedTensor:
    """A tensor of one row a code row, with these scales."""
    layout = codecs.get(name).layout
    part = layout.fit(*codes.shape).parts["scale"]
    parts = {"codes": codes, "scale": np.array(scale, dtype_of(part.dtype)).reshape(part.shape)}
    return PackedTensor(layout, codes.shape, pack(layout, codes.shape, parts))


@pytest.mark.parametrize("target", ["tq2_0", "i2_s", "ptqtp1", "sherry_row"])
def test_steps_of_a_scale_that_is_zero_stay_zeros(target: str) -> None:
    codes = (ternary((4, 256), SIDE, 1) + 1).astype(np.uint8)
    here = of("q2_0", codes, [[0.5, 0, 0.5, 0.5]] * 4)  # the second group has steps, and decodes to zeros
    weight = here.decode()
    assert not weight[:, 64:128].any()
    try:
        assert same(here.repack(codecs.get(target).layout).decode() + F32(0), weight + F32(0))
    except LayoutError as error:
        assert target == "sherry_row" and "64 of 256 quads have not exactly one zero" in str(error)


def test_zeros_that_have_no_code_are_refused() -> None:
    codes = np.array([[0, 1] * 128], np.uint8)
    zeros = of("q1_0", codes, [[0.5, 0]])
    signs = (
        Component("codes", (rows(), cols()), (Codes("codes", 1),)),
        Component("scale", (rows(),), (Values("scale", "<f2"),)),
    )
    with pytest.raises(LayoutError, match="128 of 256 weights are 0 times their scale, for which there is no code"):
        zeros.repack(Layout("signs", signs, grid("levels", values=(-1, 1))))


def test_a_scale_that_no_weight_needs_does_not_become_infinite() -> None:
    here = of("i2_s", np.ones((4, 256), np.uint8), 1e6)
    there = here.repack(codecs.get("tq2_0").layout)
    assert not there.decode().any() and not there.unpack()["scale"].any()


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_no_numbers_stay_what_they_are(scale: float) -> None:
    for codes in (np.ones((2, 256), np.uint8), np.full((2, 256), 2, np.uint8)):
        here = of("tq2_0", codes, [[scale], [1]])
        there = here.repack(codecs.get("tq1_0").layout)
        with np.errstate(invalid="ignore"):
            assert same(there.decode(), here.decode())
        assert same(there.repack(here.layout).components["blocks"], here.components["blocks"])
    with pytest.raises(LayoutError, match=r"tq2_0 to i2_s: scale \[1, 0\] is 1, that of weights before it"):
        of("tq2_0", np.ones((2, 256), np.uint8) + np.uint8(1), [[scale], [1]]).repack(codecs.get("i2_s").layout)


@pytest.mark.parametrize("perm", [np.zeros(512, np.uint32), np.full(512, 10**9, np.uint32)])
def test_a_permutation_that_is_none_is_refused(perm: npt.NDArray[np.uint32]) -> None:
    here = packed("sherry_s16_perm", ternary((4, 512), SIDE))
    bad = PackedTensor(here.layout, here.shape, dict(here.components) | {"perm": perm})
    with pytest.raises(LayoutError, match="perm does not name each of 512 columns once"):
        bad.repack(codecs.get("tq2_0").layout)
    with pytest.raises(LayoutError, match="perm does not name each of 512 columns once"):
        bad.decode()


def test_codes_of_sixteen_bits_do_not_wrap() -> None:
    def wide(name: str, dtype: str, zero: int) -> Layout:
        codes = Component("codes", (rows(), cols()), (Values("codes", dtype),))
        return Layout(
            name, (codes, Component("scale", (rows(),), (Values("scale", "<f4"),))), grid("affine", zero=zero)
        )

    codes = np.array([[1, 30000, 65535, 0]], np.uint16)
    here = PackedTensor(wide("a", "<u2", 32768), (1, 4), {"codes": codes, "scale": np.ones(1, F32)})
    there = here.repack(wide("b", "<i2", 0))
    assert there.components["codes"].tolist() == [[-32767, -2768, 32767, -32768]]
    assert same(there.decode(), here.decode())
    with pytest.raises(LayoutError, match="1 of 4 weights are 65534 times their scale, for which there is no code"):
        PackedTensor(wide("c", "<u2", 1), (1, 4), here.components).repack(wide("b", "<i2", 0))


TO_TIED = [("ptqtp2_tied", "ptqtp3_tied"), ("ptqtp1", "ptqtp2_n4_tied"), ("ptqtp3_tied", "ptqtp4_b3_tied")]


@pytest.mark.parametrize(("few", "more"), TO_TIED)
def test_planes_are_added_in_front_of_tied_ones(few: str, more: str) -> None:
    here = codecs.get(few).encode(normal(6, 256))
    there = here.repack(codecs.get(more).layout)
    assert same(there.decode() + F32(0), here.decode() + F32(0))


def test_an_axis_of_planes_may_be_called_otherwise() -> None:
    text = codecs.get("ptqtp2").layout.canonical.replace('"plane"', '"p"').replace('"ptqtp2"', '"other"')
    layout = Layout.from_json(json.loads(text))
    here = codecs.get("ptqtp2").encode(normal(6, 256))
    there = PackedTensor(layout, here.shape, here.components).repack(codecs.get("ptqtp2_b3").layout)
    assert same(there.decode(), here.decode())
    assert respelling.why_not(layout, codecs.get("ptqtp1").layout, (6, 256)) == "other has 2 planes, ptqtp1 1"


def test_runs_so_long_that_their_sum_wraps_are_refused() -> None:
    k = 9
    runs = ((2**63 - 1, 1), (2**63 - 1, 1), (k + 2, 1))
    with pytest.raises(LayoutError, match="runs of"):
        grids.dequantize(
            grid("base3", block=k, runs=runs, first="high"),
            {"codes": np.zeros((1, 1, k), np.uint8), "scale": np.ones((1, 1, 1), np.float16)},
        )
