"""Decoding in one pass: the numbers of the general way, bit for bit, for every layout that a kernel fits."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod
from typing import Any

import gguf
import ml_dtypes  # noqa: F401  names bfloat16 for np.dtype
import numpy as np
import numpy.typing as npt
import pytest
import slow_ternary as slow
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import layouts, tasks

from packfmt import codecs, fused, grids, minifloat
from packfmt.errors import LayoutError
from packfmt.kernels import blocks as kernel
from packfmt.kernels import floats
from packfmt.kernels.places import Places
from packfmt.kernels.vectors import INTERPRETED
from packfmt.layout import (
    COLS,
    ROWS,
    TOP,
    Axis,
    Codes,
    Component,
    Digit,
    Grid,
    Layout,
    Values,
    blocks,
    cols,
    dtype_of,
    grid,
    rows,
)
from packfmt.placement import pack

F32 = np.float32
Components = dict[str, npt.NDArray[np.generic]]

FITS = (
    *("q8_0", "q4_0", "mxfp4", "tq1_0", "tq2_0", "q1_0", "q2_0", "i2_s", "i2_s_arm"),
    *("sherry", "sherry_s16", "sherry_g128", "sherry_row"),
    *("mxfp4_pairs", "mxfp4_e8m0", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8"),
    *("nvfp4", "nvfp4_plain", "nvfp4_modelopt", "nvfp4_ct", "nvint4", "fp4_ue5m3", "nvfp4_ct_h64"),
    *("fp8_tensor", "fp8_row", "fp8_block", "fp8_row_bf16", "fp8_block_e8m0", "e3m1_g32", "e4m2_row", "e2m0_tensor"),
)
FITS += ("f32", "f16", "bf16", "if4", "hif4", "sherry_s16_perm")  # plain, of two tables, doubled, in another order
FITS += ("bitnet", "bitnet_divide", "sherry_t32", "sherry_t32_s16", "nvfp4_rows", "nvfp4_swizzled")  # unpacked first
FITS += ("ptqtp1", "ptqtp2", "ptqtp3_b3", "ptqtp2_b3_tied", "ptqtp2_n4", "ptqtp2_n4_tied", "ptqtp4_tied")  # planes
UNFIT = ("ptq161",)

QUADS = Axis("quads", "cols", 4)
quads = partial(Digit, "quads")
TRITS, LEVELS = grid("affine", zero=1), grid("levels", values=(0.0, 0.5, -1.0, 3.25))
HALF, F4 = Values("scale", "<f2"), Values("scale", "<f4")
FIVE_LOW = grid("base3", block=13, runs=((1, 5), (2, 4)), first="low")


def apart(codes: Component, scale: Component, numbers: object = TRITS, **rest: object) -> Layout:
    """Codes and scales in two components."""
    return Layout("toy", (codes, scale), numbers, **rest)  # type: ignore[arg-type]


def codes_of(*cell: Codes | Values, over: tuple[Digit, ...] = (rows(), cols(8))) -> Component:
    return Component("codes", over, cell)


def apart_with_whole(codes: Component, scale: Component, numbers: Grid) -> Layout:
    return Layout("toy", (codes, scale, Component("whole", (), (Values("global_scale", "<f4"),))), numbers)


PER_TENSOR = Component("scale", (), (F4,))
PER_ROW = Component("scale", (rows(),), (Values("scale", "bfloat16"),))
PER_16 = Component("scale", (rows(), cols(16)), (HALF,))

WHOLE_U1 = codes_of(Values("codes", "u1"), over=(rows(), cols()))
WHOLE_I1 = codes_of(Values("codes", "i1"), over=(rows(), cols()))
NIBBLES = codes_of(Codes("codes", 4, (), (cols(1, 2),)), over=(rows(), cols(2)))
NIBBLES_FROM_THE_RIGHT = codes_of(Codes("codes", 4, (cols(1, 4, True),), (cols(4, 2),)))
NIBBLES_OF_A_WORD = codes_of(Codes("codes", 4, (), (cols(1, 8),), "<u4"))
BITS = codes_of(Codes("codes", 1, (), (cols(1, 8),)))
FOURS = codes_of(Codes("codes", 2, (cols(1, 2),), (cols(2, 4),)))
FOURS_OF_A_WORD = codes_of(Codes("codes", 4, (cols(1, 2),), (cols(2, 4),), "<u2"))
FOURS_HIGH_FIRST = codes_of(Codes("codes", 2, (cols(4, 2),), (cols(1, 4, True),)))
FOUR_LOW, ONE_HIGH = Codes("codes", 2, (cols(1, 4),), (cols(4, 4),)), Codes("codes", 1, (), (cols(1, 16),), low=2)
THREES = Codes("codes", 3, (cols(2, 4),), (cols(1, 2),))
FOUR_SCALES = Values("scale", "bfloat16", (cols(8, 4),))
PER_24 = Component("scale", (rows(), cols(24)), (HALF,))
EXPONENTS = Component("scale", (rows(), cols(16)), (Values("scale", "u1"),))
SIXTEEN = grid("table", values=tuple(range(-8, 8)), exponent=200)
LEVELS_16 = grid("levels", values=tuple(x / 4 for x in range(16)))

E2M1, E4M3 = "float4_e2m1fn", "float8_e4m3fn"
WHOLE_E5M2 = codes_of(Values("codes", "float8_e5m2"), over=(rows(), cols()))
PER_24_E4M3 = Component("scale", (rows(), cols(24)), (Values("scale", E4M3),))
RAGGED = Component("scale", (rows(3), cols(16)), (Values("scale", "<f4"),), ragged=True)


def stream(bits: int, count: int) -> Component:
    """So many codes, one after the other; a cell begins with a byte."""
    return codes_of(Codes("codes", bits, (), (cols(1, count),)), over=(rows(), cols(count)))


def scaled(element: str, scale: str = "", global_scale: str = "") -> Grid:
    return grid("scaled", element=element, scale=scale, global_scale=global_scale)


def planes(count: int, wide: int, *scale: Digit) -> Layout:
    """Planes of trits in cells of so many columns."""
    each = Digit("plane", 1, count)
    codes = Codes("codes", 2, (each, cols(1, wide // 4)), (cols(wide // 4, 4),))
    cell = (codes, Values("scale", "<f2", (each, *scale)))
    numbers = grid("planes", zero=1, ratio=0)
    return Layout(
        "toy", (Component("blocks", (rows(), cols(wide)), cell),), numbers, (ROWS, Axis("plane", size=count), COLS)
    )


# layouts that no codec has, each with a way of lying that a kernel must find out
TOYS = {
    "nibbles side by side, a byte a cell": apart(NIBBLES, PER_16),
    "nibbles from right to left": apart(NIBBLES_FROM_THE_RIGHT, PER_16),
    "nibbles in words of 32 bits": apart(NIBBLES_OF_A_WORD, PER_16),
    "nibbles in words of 16 bits, columns apart": apart(FOURS_OF_A_WORD, PER_16, LEVELS_16),
    "bits in order": apart(BITS, PER_ROW),
    "two bits in order, highest first": apart(FOURS_HIGH_FIRST, PER_TENSOR),
    "whole signed numbers": apart(WHOLE_I1, PER_ROW, grid("affine", zero=-7)),
    "whole signed numbers around a large one": apart(WHOLE_I1, PER_24, grid("affine", zero=70001)),
    "whole signed numbers around a fraction": apart(WHOLE_I1, PER_24, grid("affine", zero=1 / 3)),
    "whole unsigned numbers": apart(WHOLE_U1, PER_16, grid("affine", zero=128)),
    "levels": apart(FOURS, PER_16, LEVELS),
    "low and high bits apart": blocks("toy", 16, HALF, FOUR_LOW, ONE_HIGH, grid=TRITS),
    "three bits and two to spare, before a double": blocks("toy", 8, THREES, Values("scale", "<f8"), grid=TRITS),
    "scales of four groups in a record": blocks(
        "toy", 32, FOUR_SCALES, Codes("codes", 2, (cols(1, 8),), (cols(8, 4),)), grid=TRITS
    ),
    "more columns a scale than a record": apart(FOURS, PER_24),
    "exponents": apart(NIBBLES, EXPONENTS, SIXTEEN),
    "base 3, least digit first": Layout(
        "toy",
        (Component("blocks", (rows(), cols(13)), (F4, Values("codes", "u1", (Digit("byte", 1, 3),)))),),
        FIVE_LOW,
        (ROWS, COLS, Axis("byte", size=3)),
    ),
    "twenty bytes of nibbles": blocks("toy", 40, HALF, Codes("codes", 4, (cols(1, 20),), (cols(20, 2),)), grid=TRITS),
    "twenty-one bytes of three digits": Layout(
        "toy",
        (Component("blocks", (rows(), cols(63)), (Values("codes", "u1", (Digit("byte", 1, 21),)), HALF)),),
        grid("base3", block=63, runs=((21, 3),), first="high"),
        (ROWS, COLS, Axis("byte", size=21)),
    ),
    "quads two columns apart": Layout(
        "toy",
        (Component("blocks", (rows(), quads(4)), (Codes("codes", 4, (quads(2, 2),), (quads(1, 2),)), HALF)),),
        grid("quads", stride=2, values=tuple(product((-1, 1), repeat=4))),
        (ROWS, QUADS),
    ),
    "three bits across bytes": apart(stream(3, 8), PER_16),
    "five bits, of which a cell has few": apart(stream(5, 8), PER_24, scaled("float5_e2m2b1")),
    "six bits, and some to spare in each cell": apart(stream(6, 6), PER_ROW, scaled("float6_e2m3fn")),
    "seven bits, a long cell": apart(stream(7, 48), PER_16, scaled("float7_e4m2b11")),
    "seven bits, and a high one apart": blocks(
        "toy",
        16,
        Codes("codes", 7, (), (cols(1, 16),)),
        Codes("codes", 1, (), (cols(1, 16),), low=7),
        HALF,
        grid=scaled("int8_f6"),
    ),
    "high bits one after the other, before low ones": blocks(
        "toy", 32, HALF, Codes("codes", 1, (), (cols(1, 32),), low=2), Codes("codes", 2, (), (cols(1, 32),)), grid=TRITS
    ),
    "whole floats, with infinite ones": apart(WHOLE_E5M2, PER_24, scaled("float8_e5m2")),
    "whole numbers of a fraction": apart(WHOLE_I1, PER_ROW, scaled("int8_f6")),
    "bytes that scale, and a number that divides": apart_with_whole(NIBBLES, PER_24_E4M3, scaled(E2M1, "", "divides")),
    "bytes that scale, and a number that multiplies": apart_with_whole(
        NIBBLES, PER_24_E4M3, scaled("int4", "", "times")
    ),
    "numbers that scale, and one that divides": apart_with_whole(NIBBLES, PER_16, scaled("sm4_f2", "", "divides")),
    "exponents that are NaN at the top": apart(NIBBLES, EXPONENTS, scaled("int4_6/7", "float8_e8m0fnu")),
    "scales that rows share, too": apart(WHOLE_E5M2, RAGGED, scaled("float8_e5m2")),
    "three planes": planes(3, 16),
    "planes of a few columns": planes(2, 8),
    "rotated": apart(NIBBLES, PER_16, scaled(E2M1), hadamard=8),
}

UNPACKED = {  # codes or scales in no order to speak of
    "codes across bytes, from the right": apart(codes_of(Codes("codes", 3, (), (cols(1, 8, True),))), PER_16),
    "rows in a tile": apart(codes_of(Codes("codes", 4, (rows(1, 2),), (cols(1, 8),)), over=(rows(2), cols(8))), PER_16),
    "columns before rows": apart(codes_of(Codes("codes", 4, (), (cols(1, 8),)), over=(cols(8), rows())), PER_16),
    "halves of the row": apart(codes_of(Codes("codes", 4, (), (cols(TOP, 2),)), over=(rows(), cols(1))), PER_16),
    "scales by columns": apart(WHOLE_U1, Component("scale", (cols(16), rows()), (HALF,))),
    "a row of a fixed length": apart(codes_of(Values("codes", "u1", (cols(1, 48),)), over=(rows(),)), PER_TENSOR),
    "scales of a fixed number": apart(WHOLE_U1, Component("scale", (), (Values("scale", "<f4", (cols(16, 3),)),))),
    "padded columns": apart(WHOLE_U1, PER_TENSOR, axes=(ROWS, Axis("cols", "cols", pad=5))),
}

ODD = {
    "a global scale that no rule counts": apart_with_whole(NIBBLES, PER_16, scaled(E2M1)),
    "codes of nine bits": apart(codes_of(Codes("codes", 9, (), (cols(1, 8),), "<u4")), PER_16),
    "a negative code for a level": apart(WHOLE_I1, PER_16, grid("levels", values=tuple(range(256)))),
    "planes whose scales change within a cell": planes(2, 16, cols(8, 2)),
    "quotients of whole bytes": apart(WHOLE_U1, PER_TENSOR, grid("quotient", zero=1)),
}


def random_components(layout: Layout, shape: tuple[int, int], seed: int) -> Components:
    """Any bytes at all: also scales that are infinite or no number. A permutation is one."""
    rng = np.random.default_rng(seed)
    out = {}
    for c in layout.fit(*shape).components:
        raw = rng.integers(0, 256, max(1, prod(c.shape)) * dtype_of(c.dtype).itemsize, np.uint8)
        out[c.name] = raw.view(dtype_of(c.dtype))[: prod(c.shape)].reshape(c.shape)
    if "perm" in out:
        out["perm"] = rng.permutation(shape[1]).astype("<u4").reshape(out["perm"].shape)
    return out


def finite_components(layout: Layout, shape: tuple[int, int], seed: int) -> Components:
    """Any codes, with scales that are numbers."""
    rng = np.random.default_rng(seed)
    parts: Components = {}
    for name, part in layout.fit(*shape).parts.items():
        dtype = dtype_of(part.dtype)
        if name == "perm":
            parts[name] = rng.permutation(shape[1]).astype(dtype).reshape(part.shape)
        elif dtype.kind == "f" or dtype.name == "bfloat16":
            parts[name] = rng.standard_normal(part.shape).astype(dtype)
        else:
            most = min(1 << part.bits, 120 if name == "scale" else 1 << 16)
            parts[name] = rng.integers(0, most, part.shape).astype(f"<u{dtype.itemsize}").view(dtype)
    return pack(layout, shape, parts)


def assert_same(layout: Layout, shape: tuple[int, int], components: Components) -> None:
    wanted = grids.decode(layout, shape, components)
    got = fused.decode(layout, shape, components)
    assert got.dtype == F32 and got.shape == shape
    differs = np.flatnonzero(got.view(np.uint32) != wanted.view(np.uint32))
    assert not len(differs), (
        f"{layout.name}: weight {differs[0]}: {got.flat[differs[0]]}, not {wanted.flat[differs[0]]}"
    )
    out = np.full(shape, 7, F32)
    assert fused.decode(layout, shape, components, out) is out
    assert out.tobytes() == wanted.tobytes()


def shapes(layout: Layout) -> list[tuple[int, int]]:
    high, wide = layout.block["rows"], layout.block["cols"]
    return [(high * m, wide * n) for m, n in ((1, 1), (3, 1), (2, 2), (5, 7), (1, 33)) if high == 1 or m * n < 35]


# ---------------------------------------------------------------- which layouts, and the same bits


@pytest.mark.kernels
@pytest.mark.parametrize("name", FITS)
def test_any_bytes_decode_to_the_bits_of_the_general_way(name: str) -> None:
    layout = codecs.get(name).layout
    assert fused.decoder(layout) is not None
    for seed, shape in enumerate(shapes(layout)):
        assert_same(layout, shape, random_components(layout, shape, seed))


@pytest.mark.kernels
@pytest.mark.parametrize("name", FITS)
def test_the_kernel_itself_writes_what_the_general_way_does(name: str) -> None:
    """It leaves nothing to the general way where scales are numbers, past the cache or not."""
    layout = codecs.get(name).layout
    decode = fused.decoder(layout)
    assert decode is not None
    for seed, shape in enumerate(shapes(layout)):
        shape = shape[0], shape[1] * (128 if layout.block["cols"] == 1 else 1)
        components = finite_components(layout, shape, seed)
        wanted = grids.decode(layout, shape, components)
        for through in (False, True):
            out = np.full(shape, 7, F32)
            assert decode(shape, components, out, through) and out.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", UNFIT)
def test_what_no_kernel_fits_goes_the_general_way(name: str) -> None:
    layout = codecs.get(name).layout
    assert fused.decoder(layout) is None
    shape = (2 * layout.block["rows"], layout.block["cols"])
    components = dict(random_components(layout, shape, 1))
    if "mask" in components:  # 13 of 64 columns
        mask = np.arange(shape[1]) % 64 < 13
        components["mask"] = np.packbits(mask, bitorder="little").reshape(components["mask"].shape)
    assert_same(layout, shape, components)


@pytest.mark.kernels
@pytest.mark.parametrize("name", FITS)
def test_a_layout_that_a_file_brings_is_found_to_fit_by_its_structure(name: str) -> None:
    layout = Layout.from_json(codecs.get(name).layout.to_json() | {"name": "brought"})
    assert fused.decoder(layout) is not None
    shape = 2 * layout.block["rows"], layout.block["cols"]
    assert_same(layout, shape, random_components(layout, shape, 2))


@pytest.mark.kernels
@pytest.mark.parametrize("what", TOYS)
def test_every_way_of_lying_that_a_kernel_fits_gives_the_same_bits(what: str) -> None:
    layout = TOYS[what]
    assert fused.decoder(layout) is not None
    for seed, shape in enumerate([*shapes(layout), (4, 96 * layout.block["cols"])]):
        assert_same(layout, shape, random_components(layout, shape, seed))


@pytest.mark.kernels
@pytest.mark.parametrize("what", UNPACKED)
def test_what_lies_in_no_order_is_unpacked_first(what: str) -> None:
    layout = UNPACKED[what]
    decode, shape = fused.decoder(layout), (4, 48)
    components = random_components(layout, shape, 3)
    assert decode is not None and decode(shape, components, np.empty(shape, F32), False)
    assert_same(layout, shape, components)


@pytest.mark.kernels
@pytest.mark.parametrize("what", ODD)
def test_what_lies_in_another_way_is_left_to_the_general_one(what: str) -> None:
    layout = ODD[what]
    assert fused.decoder(layout) is None
    cols_ = 48 // layout.block["cols"] * layout.block["cols"]
    assert_same(layout, (4, cols_), random_components(layout, (4, cols_), 3))


@pytest.mark.kernels
@given(data=st.data())
def test_random_layouts_decode_to_the_same_bits(data: st.DataObject) -> None:
    task = data.draw(tasks())
    layout = replace(data.draw(layouts(task)), grid=grid("affine", zero=data.draw(st.integers(-3, 9))))
    components = random_components(layout, task.shape, data.draw(st.integers(0, 99)))
    try:
        wanted = grids.decode(layout, task.shape, components)
    except LayoutError as error:
        with pytest.raises(LayoutError, match=re.escape(str(error))):
            fused.decode(layout, task.shape, components)
        return
    assert fused.decode(layout, task.shape, components).tobytes() == wanted.tobytes()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "numbers",
    [
        grid("levels", values=(1.0, 2.0, 3.0)),  # code 3 has none
        grid("levels", values=((1, 2), (3, 4), (5, 6), (7, 8))),
        grid("levels", values=("a", "b", "c", "d")),
        grid("affine", zero="one"),
        grid("affine"),
        grid("affine", zero=1, one=2),
        grid("quads", stride=1, values=tuple(slow.QUADS)),
        FIVE_LOW,
        grid("table", values=(0, 1, 2), exponent=1),
        grid("nothing"),
        scaled(E2M1, "", "times"),
        scaled(E2M1, "float8_e8m0fnu"),
        scaled("float4_e9m9"),
        scaled("float8_e8m0fnu", "", "over"),
    ],
)
def test_grids_that_cannot_take_the_parts_are_refused_as_ever(numbers: object) -> None:
    layout = apart(codes_of(Codes("codes", 2, (cols(1, 2),), (cols(2, 4),))), PER_TENSOR, numbers)
    components = {"codes": np.full((2, 4), 255, np.uint8), "scale": np.ones(1, "<f4")}
    components = {k: v.reshape(layout.shapes(2, 16)[k]) for k, v in components.items()}
    with pytest.raises(LayoutError) as wanted:
        grids.decode(layout, (2, 16), components)
    with pytest.raises(LayoutError, match=re.escape(str(wanted.value))):
        fused.decode(layout, (2, 16), components)


# ---------------------------------------------------------------- small domains, whole


def halves() -> npt.NDArray[np.uint8]:
    return np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)


def decode_blocks(name: str, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    layout = codecs.get(name).layout
    return fused.decode(layout, (len(stored), layout.block["cols"]), {"blocks": stored})


@pytest.mark.parametrize("name", ("tq1_0", "tq2_0"))
def test_every_float16_scale_decodes_as_gguf_s(name: str) -> None:
    """Also the infinite ones, and those that are no number, with their payload."""
    size, kind = codecs.get(name).layout.nbytes(1, 256) - 2, gguf.GGMLQuantizationType[name.upper()]
    codes = np.resize(np.uint8([0b00100100, 0b00011000, 0, 1, 127, 128, 255]), (1, size))
    for scale in np.split(halves(), 8):
        stored = np.hstack([codes.repeat(len(scale), 0), scale])
        with np.errstate(all="ignore"):
            wanted = gguf.quants.dequantize(stored, kind)
        assert decode_blocks(name, stored).tobytes() == wanted.tobytes()


@pytest.mark.kernels
@pytest.mark.parametrize("name", ("tq1_0", "tq2_0", "sherry", "sherry_s16"))
def test_every_byte_at_every_place_decodes_as_the_slow_twin_s(name: str) -> None:
    size = codecs.get(name).layout.nbytes(1, 256)
    stored = (np.arange(256)[:, None] + 37 * np.arange(size)).astype(np.uint8)  # each value in each place
    stored[:, -2:] = [0, 0x38]  # one half
    got = decode_blocks(name, stored)
    twin = {
        "tq1_0": slow.tq1_0_steps,
        "tq2_0": slow.tq2_0_steps,
        "sherry": partial(slow.sherry_steps, weights=256, stride=1),
        "sherry_s16": partial(slow.sherry_steps, weights=256, stride=16),
    }[name]
    for block, weights in zip(stored, got, strict=True):
        steps, scale = twin(block.tobytes())
        assert (2 * weights).tolist() == steps and slow.from_half(scale) == 0.5


@pytest.mark.kernels
def test_every_group_of_five_digits_decodes_from_its_base_3_byte() -> None:
    groups = list(product((0, 1, 2), repeat=5))
    stored = np.zeros((243, 54), np.uint8)
    stored[:, 0] = [slow.base3_byte(group) for group in groups]
    stored[:, -2:] = [0, 0x3C]  # one
    got = decode_blocks("tq1_0", stored)[:, :160:32]
    assert (got + 1).tolist() == [list(group) for group in groups]


# ---------------------------------------------------------------- number formats, whole

SCALED = {  # a layout, the number formats of its codes and scales, and the columns that share a scale
    "mxfp4_pairs": (E2M1, "float8_e8m0fnu", 32),
    "mxfp6_e2m3": ("float6_e2m3fn", "float8_e8m0fnu", 32),
    "mxfp6_e3m2": ("float6_e3m2fn", "float8_e8m0fnu", 32),
    "mxfp8_e4m3": (E4M3, "float8_e8m0fnu", 32),
    "mxfp8_e5m2": ("float8_e5m2", "float8_e8m0fnu", 32),
    "mxint8": ("int8_f6", "float8_e8m0fnu", 32),
    "nvfp4_plain": (E2M1, "ufloat7_e4m3", 16),
    "nvfp4_modelopt": (E2M1, E4M3, 16),
    "nvint4": ("int4", E4M3, 16),
    "fp4_ue5m3": (E2M1, "ufloat8_e5m3", 16),
}


@pytest.mark.parametrize("name", SCALED)
def test_every_code_with_every_scale_is_the_product_of_their_numbers(name: str) -> None:
    """Each scale a row, so that those that are no number keep to themselves."""
    layout, (element, scale, group) = codecs.get(name).layout, SCALED[name]
    count = len(minifloat.numbers(element))
    parts = {
        "codes": np.resize(np.arange(count, dtype=np.uint8), (256, max(count, 64))),
        "scale": np.arange(256, dtype=np.uint8)[:, None].repeat(max(count, 64) // group, 1),
    }
    with np.errstate(all="ignore"):
        wanted = minifloat.numbers(element)[parts["codes"]] * minifloat.numbers(scale)[:, None]
    fitted = layout.fit(*wanted.shape).parts
    parts["global_scale"] = np.ones(fitted["global_scale"].shape, F32) if "global_scale" in fitted else F32([])
    stored = pack(layout, wanted.shape, {k: parts[k].view(dtype_of(p.dtype)) for k, p in fitted.items()})
    assert fused.decoder(layout) is not None
    got = fused.decode(layout, wanted.shape, stored)
    same = got.view(np.uint32) == wanted.view(np.uint32)
    assert (same | np.isnan(got) & np.isnan(wanted)).all()
    assert got.tobytes() == grids.decode(layout, wanted.shape, stored).tobytes()


COMPUTED = (
    *(E2M1, "float6_e2m3fn", "float6_e3m2fn", E4M3, "float8_e5m2", "sm4_f2"),
    *("float4_e1m2b1", "float5_e3m1b3", "float6_e5m0b15", "float7_e4m2b11", "float8_e3m4b3"),
)
MXFP4_VALUES = codecs.get("mxfp4").layout.grid["values"]  # twice E2M1, and the -0 is a 0


@pytest.mark.kernels
@pytest.mark.parametrize("numbers", [*map(minifloat.numbers, COMPUTED), np.array(MXFP4_VALUES, F32)])
def test_arithmetic_gives_the_numbers_of_a_table(numbers: npt.NDArray[np.float32]) -> None:
    how = kernel.arithmetic(numbers)
    assert how is not None
    finite = np.flatnonzero(np.isfinite(numbers)).astype(np.uint8)
    assert ((finite & how.magnitude) < how.top).all()
    codes = np.resize(finite, (1, 2 * len(numbers)))
    places = Places(
        1, 1, np.array([[0, 1, 0, 255, 0, 1, 0]]), *(np.zeros((0, n), np.int64) for n in (5, 4)), np.uint8([])
    )
    got = np.empty(codes.shape, F32)
    values = numbers if INTERPRETED else np.full(len(numbers), np.nan, F32)  # compiled, it reads no table
    known = kernel.Numbers(kernel.COMPUTED, values[None], how, np.int32(0), F32(0), F32(1))
    assert kernel.decode(codes, places, np.ones((1, 1), F32), got, known)
    assert got.tobytes() == numbers[codes].tobytes()


@pytest.mark.parametrize("name", ["int4", "int8_f6", "int4_6/7", "ufloat8_e5m3", "float8_e8m0fnu"])
def test_other_numbers_have_no_such_arithmetic(name: str) -> None:
    assert kernel.arithmetic(minifloat.numbers(name)) is None


def test_numbers_are_looked_up_if_they_are_few_and_computed_else() -> None:
    names = ("int4", "float5_e2m2b1", "int8_f6", E4M3, "ufloat8_e5m3")
    found = [kernel.numbers_of(minifloat.numbers(name)) for name in names]
    assert [n.kind for n in found] == [kernel.LOOKED_UP, kernel.LOOKED_UP, kernel.WHOLE, kernel.COMPUTED, kernel.PLAIN]
    assert (found[2].unit, found[2].half) == (1 / 64, 128)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_half_widens_as_numpy_does_it(dtype: str) -> None:
    """All numbers of 16 bits, and as many of 32."""
    stored = np.arange(1 << 16, dtype=np.uint16)
    source = (stored.astype(np.uint32) * 65521).view(F32) if dtype == "float32" else stored.view(np.dtype(dtype))
    as_given = stored if dtype == "bfloat16" else source
    for through in (False, True):
        for first in (0, 3):
            out = np.full(1 << 16, 7, F32)
            floats.convert(as_given[first:], out[first:], through)
            assert out[first:].tobytes() == source[first:].astype(F32).tobytes()


@pytest.mark.kernels
def test_scales_of_all_sizes_meet_whole_numbers_of_a_fraction() -> None:
    layout = apart(WHOLE_I1, Component("scale", (rows(),), (F4,)), scaled("int8_f6"))
    scale = np.array([2.0**-126 * 1.2345678, 1.5, 2.0**-140, np.inf, 0.0, -(2.0**-121)], F32)
    for some in (scale, scale[1:2], scale[:1].repeat(2), scale[3:5]):
        codes = np.arange(256, dtype=np.uint8).view(np.int8)[None].repeat(len(some), 0)
        assert_same(layout, codes.shape, {"codes": codes, "scale": some})


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "fp8_row", "fp8_block"])
def test_codes_that_are_no_number_meet_scales_that_are_none(name: str) -> None:
    """Which of two NaNs a product is, the processor chooses: those few tensors go the general way."""
    layout = codecs.get(name).layout
    components = random_components(layout, (4, 128), 6)
    weight, scale = (components[c.name].view(np.uint8).reshape(-1) for c in layout.components)
    weight[:] = np.arange(512) % 256
    for stored in (0, 0x7F, 255):
        scale[:] = stored
        assert_same(layout, (4, 128), components)


# ---------------------------------------------------------------- the door


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name",
    [
        *("mxfp4", "nvfp4_ct", "mxfp8_e5m2", "fp8_tensor", "e2m0_tensor", "tq2_0", "nvfp4_ct_h64", "q8_0"),
        *("bf16", "f16", "hif4", "ptqtp3", "sherry_s16", "sherry_s16_perm"),
    ],
)
def test_what_is_written_past_the_cache_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_THROUGH", 0)
    monkeypatch.setattr(fused, "STRIP", 512)
    layout = codecs.get(name).layout
    shape = (5, 768)
    components = random_components(layout, shape, 7)
    wanted = grids.decode(layout, shape, components)
    room = np.empty(wanted.size + 32, F32)
    for start in (0, 1, 4, 15, 16):  # NumPy's arrays lie at multiples of 16 bytes
        room[:] = 7
        out = room[start : start + wanted.size].reshape(shape)
        assert fused.decode(layout, shape, components, out) is out
        assert out.tobytes() == wanted.tobytes()
        assert (room[:start] == 7).all() and (room[start + wanted.size :] == 7).all()


@pytest.mark.kernels
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_WEIGHTS", 1)
    for layout in [codecs.get(name).layout for name in FITS]:
        shape = (7 * layout.block["rows"], layout.block["cols"])
        components = random_components(layout, shape, 4)
        for count in ("1", "2", "3"):
            monkeypatch.setenv("PACKFMT_THREADS", count)
            assert_same(layout, shape, components)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ("tq2_0", "sherry_row", "f32"))
def test_empty_weights_decode(name: str) -> None:
    layout = codecs.get(name).layout
    for shape in ((0, layout.block["cols"]), (3, 0), (0, 0)):
        components = {c.name: np.zeros(c.shape, dtype_of(c.dtype)) for c in layout.fit(*shape).components}
        assert fused.decode(layout, shape, components).shape == shape


@pytest.mark.kernels
def test_components_may_lie_anywhere_in_memory() -> None:
    layout = codecs.get("sherry_g128").layout
    stored = random_components(layout, (6, 256), 5)["blocks"]
    wanted = grids.decode(layout, (6, 256), {"blocks": stored})
    apart_ = np.zeros((12, 45), np.uint8)[::2, 1:]
    apart_[:] = stored
    behind = np.frombuffer(b"x" + stored.tobytes(), np.uint8)[1:].reshape(stored.shape)  # read-only, at an odd address
    for components in (apart_, behind, np.asfortranarray(stored)):
        assert fused.decode(layout, (6, 256), {"blocks": components}).tobytes() == wanted.tobytes()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "components",
    [
        {},
        {"blocks": np.zeros((2, 65), np.uint8)},
        {"blocks": np.zeros((2, 66), np.int8)},
        {"blocks": np.zeros(132, np.uint8)},
        {"qs": np.zeros((2, 66), np.uint8)},
    ],
)
def test_components_that_are_not_as_described_are_refused(components: Components) -> None:
    with pytest.raises(LayoutError, match="component"):
        fused.decode(codecs.get("tq2_0").layout, (2, 256), components)


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 255), F32),
        np.zeros((2, 256), np.float64),
        np.zeros((256, 2), F32).T,
        np.zeros((2, 512), F32)[:, ::2],
        np.frombuffer(bytes(2048), F32).reshape(2, 256),
    ],
)
def test_an_out_that_cannot_take_the_weights_is_refused(out: npt.NDArray[np.generic]) -> None:
    with pytest.raises(LayoutError, match="needs a writable C-contiguous float32"):
        fused.decode(codecs.get("tq2_0").layout, (2, 256), {"blocks": np.zeros((2, 66), np.uint8)}, out)


@pytest.mark.parametrize("over", [(cols(),), (rows(),), ()])
def test_numbers_that_weights_share_are_decoded_as_the_general_way_does(over: tuple[Any, ...]) -> None:
    """A description may say so; there is a number for each row or column then, and not for each weight."""
    for dtype in ("<f2", "bfloat16", "<f4"):
        layout = Layout("shared", (Component("values", over, (Values("values", dtype),)),), grid("plain"))
        (placed,) = layout.fit(6, 32).components
        stored = {"values": np.arange(prod(placed.shape)).astype(dtype_of(dtype)).reshape(placed.shape)}
        found = []
        for way in (fused.decode, grids.decode):
            try:
                found.append(way(layout, (6, 32), stored).tobytes())
            except LayoutError as error:
                found.append(str(error))
        assert found[0] == found[1]


def test_as_many_numbers_are_converted_as_there_is_room_for() -> None:
    with pytest.raises(LayoutError, match="64 numbers to convert, needs 32"):
        floats.convert(np.ones(64, np.float16), np.empty(32, np.float32))
