"""Decoding in one pass: the numbers of the general way, bit for bit, for every layout that a kernel fits."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import slow_ternary as slow
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import layouts, tasks

from packfmt import codecs, fused, grids
from packfmt.errors import LayoutError
from packfmt.layout import (
    COLS,
    ROWS,
    TOP,
    Axis,
    Codes,
    Component,
    Digit,
    Layout,
    Values,
    blocks,
    cols,
    dtype_of,
    grid,
    rows,
)

F32 = np.float32
Components = dict[str, npt.NDArray[np.generic]]

FITS = (
    *("q8_0", "q4_0", "mxfp4", "tq1_0", "tq2_0", "q1_0", "q2_0", "i2_s", "i2_s_arm"),
    *("sherry", "sherry_s16", "sherry_g128", "sherry_row"),
)
UNFIT = ("f32", "bf16", "bitnet", "sherry_t32", "sherry_s16_perm", "ptqtp2")

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

# layouts that no codec has, each with a way of lying that a kernel must find out
TOYS = {
    "nibbles side by side, a byte a cell": apart(NIBBLES, PER_16),
    "nibbles from right to left": apart(NIBBLES_FROM_THE_RIGHT, PER_16),
    "nibbles in words of 32 bits": apart(NIBBLES_OF_A_WORD, PER_16),
    "nibbles in words of 16 bits, columns apart": apart(FOURS_OF_A_WORD, PER_16, LEVELS_16),
    "bits in order": apart(BITS, PER_ROW),
    "two bits in order, highest first": apart(FOURS_HIGH_FIRST, PER_TENSOR),
    "whole signed numbers": apart(WHOLE_I1, PER_ROW, grid("affine", zero=-7)),
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
}

ODD = {
    "codes across bytes": apart(codes_of(Codes("codes", 3, (), (cols(1, 8),))), PER_16),
    "codes of nine bits": apart(codes_of(Codes("codes", 9, (), (cols(1, 8),), "<u4")), PER_16),
    "rows in a tile": apart(codes_of(Codes("codes", 4, (rows(1, 2),), (cols(1, 8),)), over=(rows(2), cols(8))), PER_16),
    "columns before rows": apart(codes_of(Codes("codes", 4, (), (cols(1, 8),)), over=(cols(8), rows())), PER_16),
    "halves of the row": apart(codes_of(Codes("codes", 4, (), (cols(TOP, 2),)), over=(rows(), cols(1))), PER_16),
    "scales by columns": apart(WHOLE_U1, Component("scale", (cols(16), rows()), (HALF,))),
    "a row of a fixed length": apart(codes_of(Values("codes", "u1", (cols(1, 48),)), over=(rows(),)), PER_TENSOR),
    "scales of a fixed number": apart(WHOLE_U1, Component("scale", (), (Values("scale", "<f4", (cols(16, 3),)),))),
    "padded columns": apart(WHOLE_U1, PER_TENSOR, axes=(ROWS, Axis("cols", "cols", pad=5))),
    "a negative code for a level": apart(WHOLE_I1, PER_16, grid("levels", values=tuple(range(256)))),
    "quotients": apart(WHOLE_U1, PER_TENSOR, grid("quotient", zero=1)),
}


def random_components(layout: Layout, shape: tuple[int, int], seed: int) -> Components:
    """Any bytes at all: also scales that are infinite or no number."""
    rng = np.random.default_rng(seed)
    out = {}
    for c in layout.fit(*shape).components:
        raw = rng.integers(0, 256, max(1, prod(c.shape)) * dtype_of(c.dtype).itemsize, np.uint8)
        out[c.name] = raw.view(dtype_of(c.dtype))[: prod(c.shape)].reshape(c.shape)
    return out


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
    block = layout.block["cols"]
    return [(1, block), (3, block), (2, 2 * block), (5, 7 * block), (1, 33 * block)]


# ---------------------------------------------------------------- which layouts, and the same bits


@pytest.mark.kernels
@pytest.mark.parametrize("name", FITS)
def test_any_bytes_decode_to_the_bits_of_the_general_way(name: str) -> None:
    layout = codecs.get(name).layout
    assert fused.decoder(layout) is not None
    for seed, shape in enumerate(shapes(layout)):
        assert_same(layout, shape, random_components(layout, shape, seed))


@pytest.mark.parametrize("name", UNFIT)
def test_what_no_kernel_fits_goes_the_general_way(name: str) -> None:
    layout = codecs.get(name).layout
    assert fused.decoder(layout) is None
    shape = (2 * layout.block["rows"], layout.block["cols"])
    components = dict(random_components(layout, shape, 1))
    if "perm" in components:
        components["perm"] = np.arange(shape[1], dtype="<u4").reshape(components["perm"].shape)
    if "scale" in components:
        components["scale"] = np.ones_like(components["scale"])
    assert_same(layout, shape, components)


@pytest.mark.kernels
@pytest.mark.parametrize("name", FITS)
def test_a_layout_that_a_file_brings_is_found_to_fit_by_its_structure(name: str) -> None:
    layout = Layout.from_json(codecs.get(name).layout.to_json() | {"name": "brought"})
    assert fused.decoder(layout) is not None
    assert_same(layout, (2, layout.block["cols"]), random_components(layout, (2, layout.block["cols"]), 2))


@pytest.mark.kernels
@pytest.mark.parametrize("what", TOYS)
def test_every_way_of_lying_that_a_kernel_fits_gives_the_same_bits(what: str) -> None:
    layout = TOYS[what]
    assert fused.decoder(layout) is not None
    for seed, shape in enumerate([*shapes(layout), (4, 96 * layout.block["cols"])]):
        assert_same(layout, shape, random_components(layout, shape, seed))


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


# ---------------------------------------------------------------- the door


@pytest.mark.kernels
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_WEIGHTS", 1)
    for layout in [codecs.get(name).layout for name in FITS]:
        shape = (7, layout.block["cols"])
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
