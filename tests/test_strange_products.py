"""Products of descriptions that a file may bring and no format here has: the twin's bits, or refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import slow_products as slow
from test_products import activations, assert_same, random_components

import packfmt
from packfmt import codecs, fused, minifloat, placement, products, retiling, tilings
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError
from packfmt.kernels import number_products, simd
from packfmt.layout import COLS, ROWS, Axis, Codes, Component, Digit, Layout, Values, cols, grid, rows

pytestmark = pytest.mark.kernels

F32 = np.float32
Parts = dict[str, Any]


def codes(bits: int, count: int = 8) -> Component:
    return Component("codes", (rows(), cols(count)), (Codes("codes", bits, (), (cols(1, count),)),))


def values(name: str, dtype: str, *over: Digit, ragged: bool = False) -> Component:
    return Component(name, over, (Values(name, dtype),), ragged=ragged)


def fields(name: str, bits: int, *over: Digit, ragged: bool = False) -> Component:
    return Component(name, over, (Codes(name, bits),), ragged=ragged)


def scale(dtype: str = "<f2", group: int = 32) -> Component:
    return values("scale", dtype, rows(), cols(group))


def strange(*components: Component, numbers: Any, **more: Any) -> Layout:
    return Layout("strange", components, numbers, **more)


def shift(name: str, group: int, bits: int = 1) -> Component:
    return Component(name, (rows(), cols(64)), (Codes(name, bits, (), (cols(group, 64 // group),)),))


def hif4(element: str = "sm4_f2", eights: tuple[int, int] = (8, 1), fours: tuple[int, int] = (4, 1)) -> Layout:
    """hif4 of other elements, and of other groups and bits of shifts."""
    shifts = shift("shift8", *eights), shift("shift4", *fours)
    numbers = grid("hif4", element=element, scale="ufloat8_e6m2")
    return strange(codes(minifloat.bits(element)), scale("u1", 64), *shifts, numbers=numbers)


def scaled(*components: Component, element: str = "float4_e2m1fn", named: str = "", whole: str = "") -> Layout:
    return strange(*components, numbers=grid("scaled", element=element, scale=named, global_scale=whole))


def numbers_each() -> Layout:
    """arcquant_128 with a scale for every column instead of 16."""
    layout = codecs.get("arcquant_128").layout
    weight, scales, *more = layout.components
    assert isinstance(scales, Component)
    over = (scales.over[0], replace(scales.over[1], stride=1))
    return replace(layout, name="strange", components=(weight, replace(scales, over=over), *more))


def in_blocks_of(block: int) -> Layout:
    """ptqtp2_b3, whose blocks have 128 columns, said to have others."""
    layout = codecs.get("ptqtp2_b3").layout
    return replace(layout, name="strange", grid=grid("plane_base3", **{**dict(layout.grid.params), "block": block}))


AFFINE, AFFINE_ZERO = grid("affine", zero=8), grid("affine_zero")
BYTES = values("codes", "u1", rows(), cols())
FLOATS = values("codes", "float8_e4m3fn", rows(), cols())
PLANES = (ROWS, Axis("plane", size=3), COLS)
BY_PLANE = Component("codes", (rows(), Digit("plane"), cols(4)), (Codes("codes", 2, (), (cols(1, 4),)),))
PERM = values("perm", "<u4", cols())
OUTLIERS = Axis("outlier", size=3)
APART = values("columns", "<u4", Digit("outlier")), values("column_values", "<f4", rows(), Digit("outlier"))
AXES = (ROWS, COLS, OUTLIERS)


def a_scale(number: float) -> Callable[[Parts], None]:
    return lambda parts: parts["scale"].__setitem__(Ellipsis, number)


def wholes(parts: Parts) -> None:
    parts["scale"][...] = 1.5
    parts["global_scale"][...] = np.arange(1, 1 + parts["global_scale"].size).reshape(parts["global_scale"].shape)


def beside(parts: Parts) -> None:
    """Columns kept apart, and a permutation, where there are any; plain numbers elsewhere."""
    rng = np.random.default_rng(2)
    if "perm" in parts:
        parts["perm"].reshape(-1)[:] = rng.permutation(parts["perm"].size)
    if "columns" in parts:
        parts["columns"].reshape(-1)[:] = [3, 9, 60]
        parts["column_values"][...] = rng.normal(size=parts["column_values"].shape)
    if parts["codes"].dtype.kind != "u":
        parts["codes"][...] = rng.normal(size=parts["codes"].shape)
    parts["scale"][...] = 0.5


def own(parts: Parts) -> None:
    parts["scale"][...] = np.random.default_rng(1).normal(size=parts["scale"].shape)


# name: layout, shape, what its parts have instead of random bytes
STRANGE: dict[str, tuple[Layout, tuple[int, int], Callable[[Parts], None] | None]] = {
    "codes plane by plane, two groups a row": (
        strange(
            BY_PLANE, values("scale", "<f4", rows(), Digit("plane"), cols(32)), numbers=grid("planes", zero=1, ratio=0),
            axes=PLANES,
        ), (5, 64), own,
    ),
    "planes that are tied": (
        strange(BY_PLANE, scale("<f4"), numbers=grid("planes", zero=1, ratio=3), axes=PLANES), (5, 64), own
    ),
    "planes tied by a large number": (
        strange(
            BY_PLANE, scale("<f4"), numbers=grid("planes", zero=1, ratio=16777217),
            axes=(ROWS, Axis("plane", size=5), COLS),
        ), (5, 64), own,
    ),
    "planes tied by a fraction": (
        strange(
            BY_PLANE, scale("<f4"), numbers=grid("planes", zero=1, ratio=0.5), axes=PLANES
        ), (5, 64), own,
    ),
    "records of 48 rows, of which three are there": (
        strange(
            Component("codes", (rows(1, 48), cols(4)), (Codes("codes", 8, (), (cols(1, 4),)),), ragged=True),
            values("scale", "<f4", rows()), numbers=AFFINE,
        ), (3, 64), a_scale(0.5),
    ),
    "words that reach beyond the row": (
        strange(
            Component("codes", (rows(), cols(8)), (Codes("codes", 8, (), (cols(1, 8),), "<u8"),), ragged=True),
            values("scale", "<f2", rows()), numbers=AFFINE,
        ), (5, 9), None,
    ),
    "scales of seven bits in a byte": (
        scaled(codes(4), fields("scale", 7, rows(), cols(32)), named="float8_e4m3fn"), (5, 64), None
    ),
    "bytes of a float8 read as another": (
        scaled(values("codes", "float8_e5m2", rows(), cols()), scale("<f4"), element="ufloat8_e5m3"),
        (5, 64), a_scale(1.5),
    ),
    "floats less a zero": (strange(FLOATS, scale(), numbers=AFFINE), (5, 64), None),
    "floats in a quotient": (strange(FLOATS, scale(), numbers=grid("quotient", zero=8)), (5, 64), None),
    "zero points with a sign": (
        strange(codes(8), scale(), values("zero", "i1", rows(), cols(32)), numbers=AFFINE_ZERO), (5, 64), None
    ),
    "codes with a sign, and zero points": (
        strange(
            values("codes", "i1", rows(), cols()), scale(), values("zero", "i1", rows(), cols(32)), numbers=AFFINE_ZERO
        ), (5, 64), None,
    ),
    "zero points that are floats": (
        strange(codes(8), scale(), values("zero", "float8_e4m3fn", rows(), cols(32)), numbers=AFFINE_ZERO),
        (5, 64), None,
    ),
    "zero points of a row": (strange(codes(4), scale(), fields("zero", 4, rows()), numbers=AFFINE_ZERO), (5, 64), None),
    "zero points wider than codes": (
        strange(codes(4), scale(), fields("zero", 8, rows(), cols(32)), numbers=AFFINE_ZERO), (5, 64), None
    ),
    "zero points for 64 columns of 96": (
        strange(codes(4), scale(), fields("zero", 4, rows(), cols(64), ragged=True), numbers=AFFINE_ZERO), (5, 96), None
    ),
    "scales and zero points for three rows of five": (
        strange(
            codes(4), values("scale", "<f2", rows(3), cols(32), ragged=True),
            fields("zero", 4, rows(3), cols(32), ragged=True), numbers=AFFINE_ZERO,
        ), (5, 96), None,
    ),
    "exponents beyond a byte": (
        strange(codes(4), scale("<u2"), numbers=grid("table", values=tuple(range(16)), exponent=300)),
        (5, 64), a_scale(290),
    ),
    "exponents with a sign": (
        strange(codes(4), scale("i1"), numbers=grid("table", values=tuple(range(16)), exponent=0)), (5, 64), None
    ),
    "a code of a scale with a sign": (scaled(codes(4), scale("i1"), named="float8_e4m3fn"), (5, 64), None),
    "hif4 in units of a sixteenth": (hif4("float6_e3m2fn"), (5, 128), a_scale(190)),
    "hif4 in halves": (hif4("float4_e2m1fn"), (5, 128), a_scale(190)),
    "hif4 of eight bits": (hif4("int8_f2"), (5, 128), a_scale(190)),
    "hif4 doubled by sixteens": (hif4(eights=(16, 1)), (5, 128), a_scale(190)),
    "hif4 doubled up to seven times": (hif4(eights=(8, 3)), (5, 128), a_scale(190)),
    "hif4 doubled up to 63 times": (hif4(eights=(8, 6), fours=(4, 6)), (5, 128), a_scale(190)),
    "levels that are all zero": (
        strange(codes(2), scale(), numbers=grid("levels", values=(0, 0, 0, 0))), (5, 64), None
    ),
    "a table of zeros": (
        strange(codes(2), scale("u1"), numbers=grid("table", values=(0, 0, 0, 0), exponent=127)), (5, 64), a_scale(127)
    ),
    "a zero of 8.0": (strange(codes(4), scale(), numbers=grid("affine", zero=8.0)), (5, 64), None),
    "experts of three rows, the last of two": (
        scaled(
            codes(4), values("scale", "float8_e4m3fn", rows(), cols(16)),
            values("global_scale", "<f4", rows(3), ragged=True), whole="times",
        ), (8, 64), wholes,
    ),
    "a permutation, and columns kept apart": (
        strange(codes(4), scale(), PERM, *APART, numbers=AFFINE, axes=AXES), (5, 64), beside
    ),
    "floats permuted, and columns kept apart": (
        Layout(
            "strange", (FLOATS, scale("<f4"), PERM, *APART),
            grid("scaled", element="float8_e4m3fn", scale="", global_scale=""), AXES,
        ), (5, 64), beside,
    ),
    "floats in records with the permutation": (
        scaled(
            Component("codes", (cols(),), (Values("perm", "<u4"), Values("codes", "float8_e4m3fn", (rows(1, 5),)))),
            values("scale", "<f4", rows()), element="float8_e4m3fn",
        ), (5, 64), beside,
    ),
    "codes in records with the permutation": (
        strange(
            Component("codes", (cols(),), (Values("perm", "<u4"), Values("codes", "u1", (rows(1, 5),)))),
            values("scale", "<f4", rows()), numbers=AFFINE,
        ), (5, 64), beside,
    ),
    "columns stored twice, each with a scale of its own": (numbers_each(), (6, 512), None),
    "no rows, and columns kept apart": (
        strange(codes(4), scale(), *APART, numbers=AFFINE, axes=AXES), (0, 64), beside
    ),
}  # fmt: skip


def packed_of(layout: Layout, shape: tuple[int, int], change: Callable[[Parts], None] | None = None) -> PackedTensor:
    packed = PackedTensor(layout, shape, random_components(layout, shape, np.random.default_rng(0)))
    if change is None:
        return packed
    parts = packed.unpack()
    change(parts)
    return PackedTensor(layout, shape, placement.pack(layout, shape, parts))


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_description_says_is_what_is_multiplied(name: str) -> None:
    layout, shape, change = STRANGE[name]
    layout = Layout.from_json(layout.to_json())
    packed = packed_of(layout, shape, change)
    x = activations(3, shape[1], 0, "normal")
    wanted = slow.product(packed, x)
    ready = packfmt.prepare(packed)
    for product in (packed.matmul(x), ready.matmul(x)):
        assert_same(product, wanted)
    assert np.array_equal(ready.packed.decode(), packed.decode(), equal_nan=True)
    if tilings.tile(layout, shape) is not None:
        tiled = retiling.tiled(layout, shape, packed.components)
        tile = tilings.tile(layout, shape)
        assert tile is not None
        there = PackedTensor(tile.layout, shape, tiled)
        assert np.array_equal(there.decode(), packed.decode(), equal_nan=True)
        again = placement.pack(tile.layout, shape, there.unpack())
        assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in tiled.items()}


@pytest.mark.parametrize(
    "name", [n for n, (layout, shape, _) in STRANGE.items() if slow.way(layout, shape) == slow.NUMBERS]
)
def test_rows_are_decoded_a_strip_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, shape, change = STRANGE[name]
    packed, x = packed_of(layout, shape, change), activations(3, shape[1], 0, "normal")
    wanted = packed.matmul(x)
    monkeypatch.setattr(number_products, "STRIP", 1)
    assert_same(packed.matmul(x), wanted)


@pytest.mark.parametrize("name, rows", [("if4", 5), ("if4_h16", 5), ("nvfp4_rows", 48), ("ptq161", 43), ("e5m0_g8", 5)])
def test_what_no_kernel_reads_is_never_whole_in_memory(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packfmt.pack(np.random.default_rng(0).normal(size=(rows, 256)).astype(F32), name)
    x = activations(3, 256, 0, "normal")
    wanted = packed.matmul(x)
    decode, asked = fused.decode, []

    def some(layout: Layout, shape: tuple[int, int], *rest: Any) -> Any:
        asked.append(shape[0])
        return decode(layout, shape, *rest)

    monkeypatch.setattr(number_products, "STRIP", 1)
    monkeypatch.setattr(fused, "decode", some)
    assert packed.matmul(x).tobytes() == wanted.tobytes()
    assert sum(asked) == rows and max(asked) <= 16


@pytest.mark.parametrize("name", [name for name in STRANGE if "kept apart" in name or "permutation" in name])
def test_decoding_and_products_agree_on_where_columns_are(name: str) -> None:
    """Of decoding, which the twin relies on."""
    layout, shape, change = STRANGE[name]
    packed = packed_of(layout, shape, change)
    units = 127 * np.eye(shape[1], dtype=F32)  # of a block with one activation: its code is 127
    assert_same(packed.matmul(units) / F32(127) + F32(0), packed.decode().T + F32(0))


QUADS = np.array(np.meshgrid(*[[-1, 0, 1]] * 4)).reshape(4, -1).T[:32]


def of_quads(stride: Any, patterns: Any = QUADS) -> Layout:
    member = Codes("codes", 5, (), (Digit("quads", 1, 8),))
    return Layout(
        "strange",
        (
            Component("codes", (rows(), Digit("quads", 8)), (member,)),
            values("scale", "<f2", rows(), Digit("quads", 32)),
        ),
        grid("quads", stride=stride, values=tuple(tuple(int(v) for v in row) for row in patterns)),
        (ROWS, Axis("quads", "cols", 4)),
    )


TWO_BYTES = Component("codes", (rows(), cols(8)), (Values("codes", "u1", (Digit("byte", size=2),)),))
SIX_BITS = Component("codes", (rows(), Digit("quads", 8)), (Codes("codes", 6, (), (Digit("quads", 1, 8),)),))

REFUSED: dict[str, tuple[Layout, tuple[int, int], Callable[[Parts], None] | None, str]] = {
    "quads of codes that no pattern has": (
        replace(of_quads(1), components=(SIX_BITS, of_quads(1).components[1])), (5, 256), None, "needs below 32",
    ),
    "quads 0 columns apart": (of_quads(0), (5, 256), None, "stride 0, needs to divide 64 quads"),
    "quads -1 columns apart": (of_quads(-1), (5, 256), None, "stride -1, needs to divide 64 quads"),
    "quads half a column apart": (of_quads(0.5), (5, 256), None, "stride 0.5, needs to divide 64 quads"),
    "quads of large steps": (of_quads(1, [(2, -3, 1, 0)] * 32), (5, 256), None, "needs up to 81 quads of -1, 0 and 1"),
    "blocks of other columns than their bytes have digits": (
        in_blocks_of(256), (32, 256), None, "runs of 128 digits in 26 bytes, needs 256 in 26"
    ),
    "blocks of other columns than lie in a cell": (
        strange(
            TWO_BYTES, values("scale", "<f2", rows()), axes=(ROWS, COLS, Axis("byte", size=2)),
            numbers=grid("base3", block=10, runs=((2, 5),), first="high"),
        ), (5, 64), None, "its grid gives|cannot take",
    ),
    "an exponent that is no whole number": (
        strange(codes(4), scale("u1"), numbers=grid("table", values=tuple(range(16)), exponent=127.0)),
        (5, 64), None, "grid 'table' cannot take these",
    ),
    "an exponent beyond all others": (
        strange(codes(4), scale("u1"), numbers=grid("table", values=tuple(range(16)), exponent=1 << 40)),
        (5, 64), None, "out of bounds for int32",
    ),
    "no axis of columns": (
        Layout("strange", (values("codes", "u1", rows()), values("scale", "<f2", rows())), AFFINE, (ROWS,)),
        (5, 64), None, r"cannot take|index",
    ),
    "columns before rows": (
        strange(BYTES, values("scale", "<f2", rows()), numbers=AFFINE, axes=(COLS, ROWS)), (8, 8), None,
        "its first axis is 'cols', needs one of rows",
    ),
    "dense, columns before rows": (
        strange(values("values", "<f4", rows(), cols()), numbers=grid("plain"), axes=(COLS, ROWS)), (8, 8), None,
        "its first axis is 'cols', needs one of rows",
    ),
    "a column that is not there": (
        strange(codes(4), scale(), values("columns", "<i4", Digit("outlier")), APART[1], numbers=AFFINE, axes=AXES),
        (5, 64), lambda parts: parts["columns"].reshape(-1).__setitem__(slice(None), [3, 4, -1]),
        "columns names column -1 of 64",
    ),
    "columns that are floats": (
        strange(codes(4), scale(), values("columns", "<f4", Digit("outlier")), APART[1], numbers=AFFINE, axes=AXES),
        (5, 64), beside, "columns are float32, needs whole numbers",
    ),
    "more numbers than columns kept apart": (
        strange(
            codes(4), scale(), values("columns", "<u4", Digit("outlier")),
            values("column_values", "<f4", rows(), Digit("more")), numbers=AFFINE,
            axes=(ROWS, COLS, Axis("outlier", size=2), Axis("more", size=3)),
        ),
        (5, 64), lambda parts: parts["columns"].reshape(-1).__setitem__(slice(None), [3, 4]), "cannot take",
    ),
    "columns kept apart between rows and columns": (
        strange(codes(4), scale(), *APART, numbers=AFFINE, axes=(ROWS, OUTLIERS, COLS)), (5, 64), beside, "cannot take"
    ),
    "scales of a tensor for columns": (
        scaled(codes(4), scale("<f2", 16), values("global_scale", "<f4", cols(32)), whole="times"),
        (8, 64), wholes, "cannot take|global_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_decoding_refuses_is_not_multiplied_either(name: str) -> None:
    layout, shape, change, says = REFUSED[name]
    packed = packed_of(layout, shape, change)
    for way in (packed.decode, lambda: packed.matmul(np.ones(shape[1], F32)), lambda: packfmt.prepare(packed)):
        with pytest.raises(LayoutError, match=says):
            way()
            if way is not packed.decode:
                packfmt.prepare(packed).matmul(np.ones(shape[1], F32))


@pytest.mark.parametrize("name", ["mxfp4_tile16", "anything"])
def test_a_tiling_is_compared_with_plain_loops_whatever_it_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if simd.INTERPRETED:
        pytest.skip("kernels of tilings are not interpreted")
    packed = packfmt.pack(np.random.default_rng(0).normal(size=(16, 64)).astype(F32), "mxfp4_tile16")
    layout = replace(packed.layout, name=name)
    assert products.disagree(layout, (16, 64), packed.components) == 0
    monkeypatch.setattr(products, "_plain", lambda *_: lambda x, out: out.fill(7))
    assert products.disagree(layout, (16, 64), packed.components) == 16


def test_experts_come_back_unless_their_rows_have_several_scales() -> None:
    layout = codecs.get("nvfp4_x3").layout
    tile = codecs.get("nvfp4_x3_tile16").layout
    packed = codecs.get("nvfp4_x3").encode(np.random.default_rng(0).normal(size=(12, 64)).astype(F32))
    there = packed.repack(tile)
    assert there.refuses(layout) == ""
    assert {n: a.tobytes() for n, a in there.repack(layout).components.items()} == {
        n: a.tobytes() for n, a in packed.components.items()
    }
    there.components["global_scale"].reshape(-1)[5] *= 2
    with pytest.raises(LayoutError, match=r"^nvfp4_x3_tile16 to nvfp4_x3: 4 rows and 64 columns have several global"):
        there.repack(layout)
    one = codecs.get("nvfp4").layout
    assert codecs.get("nvfp4").encode(np.ones((12, 64), F32)).repack(layout).repack(one).layout == one


# ---------------------------------------------------------------- careless use


@pytest.mark.parametrize("name", ["f32", "bf16", "fp8_row", "q4_0"])
def test_components_may_lie_in_any_order_of_memory(name: str) -> None:
    weight = np.random.default_rng(0).normal(size=(37, 512)).astype(F32)
    packed, x = packfmt.pack(weight, name), activations(3, 512, 0, "normal")
    wanted = packed.matmul(x)
    turned = {n: np.asfortranarray(array) for n, array in packed.components.items()}
    spaced = {n: np.repeat(array, 2, 0)[::2] for n, array in packed.components.items()}
    for components in (turned, spaced):
        assert_same(PackedTensor(packed.layout, packed.shape, components).matmul(x), wanted)


@pytest.mark.parametrize("name", ["q4_0", "bf16", "mxfp4_out3"])
def test_what_is_ready_can_be_pickled(name: str) -> None:
    ready = packfmt.prepare(packfmt.pack(np.random.default_rng(0).normal(size=(37, 512)).astype(F32), name))
    x = activations(3, 512, 0, "normal")
    again = pickle.loads(pickle.dumps(ready))
    assert again.layout == ready.layout
    assert_same(again.matmul(x), ready.matmul(x))


def test_a_batch_is_any_whole_number() -> None:
    packed = packfmt.pack(np.ones((16, 32), F32), "q4_0")
    assert packfmt.prepare(packed, np.int64(8)).layout.name == packfmt.prepare(packed, 8).layout.name
    for wrong in (0, True, 1.0, "8", None):
        with pytest.raises(LayoutError, match=r"^batch is .*, needs a whole number of 1 or more$"):
            packfmt.prepare(packed, wrong)  # type: ignore[arg-type]


def test_activations_of_uneven_rows_are_refused_in_our_words() -> None:
    packed = packfmt.pack(np.ones((16, 32), F32), "q4_0")
    for way in (packed.matmul, packfmt.prepare(packed).matmul):
        with pytest.raises(LayoutError, match="q4_0: activations of list, needs a NumPy array of a float dtype"):
            way([[1.0], [1.0, 2.0]])  # type: ignore[arg-type]


def test_a_part_that_no_grid_reads_makes_a_product_one_of_numbers() -> None:
    """spec/products.md, "Which way": decoding leaves such a part aside."""
    data = codecs.get("q4_0").layout.to_json()
    data["components"].append(
        {"name": "more", "over": [["cols", 1, 0]], "cell": [{"values": "zero", "dtype": "<u4", "digits": []}]}
    )
    layout, plain = (
        Layout.from_json(data),
        codecs.get("q4_0").encode(np.linspace(-1, 1, 512, dtype=np.float32).reshape(4, 128)),
    )
    packed = PackedTensor(layout, (4, 128), {**plain.components, "more": np.arange(128, dtype="<u4")})
    x = np.linspace(-3, 2, 256, dtype=np.float32).reshape(2, 128)
    assert slow.way(layout, (4, 128)) == slow.NUMBERS and slow.way(plain.layout, (4, 128)) == slow.WHOLE
    assert packed.matmul(x).tobytes() == slow.product(packed, x).tobytes() != plain.matmul(x).tobytes()
