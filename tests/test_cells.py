"""Loops that are written out for a layout: the numbers of the general way, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from test_fused import FITS, TOYS, Components, finite_components, random_components, shapes

from packfmt import codecs, fused, grids
from packfmt.errors import LayoutError
from packfmt.kernels import blocks, cells, floats
from packfmt.kernels.places import ALL, Places, Scales
from packfmt.kernels.vectors import INTERPRETED
from packfmt.layout import Layout

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(INTERPRETED, reason="nothing is compiled, so no loop is written")]

F32, BF16 = np.float32, ml_dtypes.bfloat16
# plain, of two tables, doubled, of five bits; scales of which each column has its own
WITHOUT = {"f32", "f16", "bf16", "if4", "hif4", "sherry_t32", "sherry_t32_s16", "nvfp4_rows"}
WRITTEN = tuple(sorted({*FITS} - WITHOUT))
NARROW = ("q8_0", "mxfp4", "nvfp4_ct", "mxfp8_e4m3", "sherry", "sherry_s16", "ptqtp2", "ptqtp2_n4", "tq1_0")
WRITTEN_TOYS = (
    *("nibbles side by side, a byte a cell", "nibbles in words of 16 bits, columns apart", "low and high bits apart"),
    *("exponents", "three bits across bytes", "seven bits, a long cell", "seven bits, and a high one apart"),
    *("three planes", "rotated", "high bits one after the other, before low ones", "two bits in order, highest first"),
    *("whole signed numbers", "whole unsigned numbers", "numbers that scale, and one that divides"),
)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[cells.Form]]:
    """Loops are written for tensors of any size; here are the forms of those that ran."""
    forms: list[cells.Form] = []
    call = cells.Loop.__call__

    def noted(loop: cells.Loop, *args: object) -> bool:
        forms.append(loop.form)
        return call(loop, *args)

    monkeypatch.setattr(cells.Loop, "__call__", noted)
    monkeypatch.setattr(fused, "LEAST_WRITTEN", 0)
    fused.decoder.cache_clear()  # which remembers loops
    yield forms
    fused.decoder.cache_clear()


def wide_shapes(layout: Layout) -> list[tuple[int, int]]:
    """Several cells a row."""
    block = layout.block["cols"]
    times = 128 if block == 1 else 32 if block < 32 else 4
    return [(rows, times * cols) for rows, cols in shapes(layout)[:3]]


def layout_of(name: str) -> Layout:
    return TOYS[name] if name in TOYS else codecs.get(name).layout


def assert_loop_decodes(layout: Layout, shape: tuple[int, int], components: Components, dtype: type = F32) -> None:
    """At places of NumPy's arrays and between; what is beside stays."""
    wanted = grids.decode(layout, shape, components)
    bits = wanted.view(np.uint32) if dtype is F32 else floats._rounded(wanted)
    for start in (0, 1, 8):
        room = np.full(wanted.size + 24, 7, dtype)
        out = room[start : start + wanted.size].reshape(shape)
        assert fused.decode(layout, shape, components, out) is out
        differs = np.flatnonzero(out.view(bits.dtype) != bits)
        assert not len(differs), f"weight {differs[0]}: {out.flat[differs[0]]}, not {wanted.flat[differs[0]]}"
        assert (room[:start] == 7).all() and (room[start + wanted.size :] == 7).all()


@pytest.mark.parametrize("name", [*WRITTEN, *WRITTEN_TOYS])
def test_a_loop_of_its_own_gives_the_bits_of_the_general_way(name: str, made: list[cells.Form]) -> None:
    layout = layout_of(name)
    for seed, shape in enumerate(wide_shapes(layout)):
        made.clear()
        assert_loop_decodes(layout, shape, finite_components(layout, shape, seed))
        assert made
        assert_loop_decodes(layout, shape, random_components(layout, shape, seed))


@pytest.mark.parametrize("name", NARROW)
def test_it_rounds_to_bfloat16_and_writes_past_the_cache(
    name: str, made: list[cells.Form], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(name)
    shape = wide_shapes(layout)[1]
    for least in (fused.LEAST_THROUGH, 0):
        monkeypatch.setattr(fused, "LEAST_THROUGH", least)
        for dtype in (F32, BF16):
            made.clear()
            assert_loop_decodes(layout, shape, random_components(layout, shape, 5), dtype)
            assert {(form.narrow, form.through) for form in made} >= {(dtype is BF16, not least)}


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "fp8_row", "fp8_block"])
def test_codes_and_scales_that_are_both_no_number_go_the_general_way(name: str, made: list[cells.Form]) -> None:
    layout = codecs.get(name).layout
    components = random_components(layout, (4, 128), 6)
    weight, scale = (components[c.name].view(np.uint8).reshape(-1) for c in layout.components)
    weight[:] = np.arange(512) % 256
    for stored in (0, 0x7F, 255):
        scale[:] = stored
        assert_loop_decodes(layout, (4, 128), components)
    assert made


def test_rows_are_shared_among_threads(made: list[cells.Form], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST_WEIGHTS", 1)
    for name in ("q8_0", "fp8_block", "nvfp4_ct_h64", "ptqtp2_n4_tied"):
        layout = codecs.get(name).layout
        shape = 7 * layout.block["rows"], max(128, layout.block["cols"])
        for count in ("1", "2", "3"):
            monkeypatch.setenv("PACKFMT_THREADS", count)
            made.clear()
            assert_loop_decodes(layout, shape, finite_components(layout, shape, 4))
            assert len(made) >= min(int(count), 2)


def test_components_are_looked_at_each_time(made: list[cells.Form]) -> None:
    """A loop that once read the components of a tensor knows no other tensor by that."""
    layout, shape = codecs.get("q8_0").layout, (4, 128)
    for seed in range(2):
        components = random_components(layout, shape, seed)
        stored = components["blocks"]
        assert_loop_decodes(layout, shape, components)
        apart = np.zeros((8, stored.shape[1] + 1), np.uint8)[::2, 1:]
        apart[:] = stored
        behind = np.frombuffer(b"x" + stored.tobytes(), np.uint8)[1:].reshape(stored.shape)
        for found in (apart, behind, np.asfortranarray(stored)):
            assert_loop_decodes(layout, shape, {"blocks": found})
    assert made
    for wrong in ({}, {"blocks": stored[:3]}, {"blocks": stored.view(np.int8)}, {"qs": stored}):
        with pytest.raises(LayoutError, match="component"):
            fused.decode(layout, shape, wrong, np.empty(shape, F32))


FOUR_BITS = Places(
    16, 32, np.empty((0, 7), np.int64), np.array([[0, 32, 4, 0, 0]]), np.empty((0, 4), np.int64), np.ones(5, np.uint8)
)
ARRAY = Scales("<f4", 4, 1, 0, 1, np.ones(1, F32))


@pytest.mark.parametrize("share", [1, 3, ALL])
@pytest.mark.parametrize("whole", [False, True])
def test_every_code_meets_scales_of_all_sizes(whole: bool, share: int) -> None:
    """Infinite ones and none among them, shared by rows."""
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (5, 8 * 16), np.uint8)
    scale = rng.integers(0, 1 << 32, (-(-5 // min(share, 5)), 8), np.uint32).view(F32)
    scale[0, :5] = np.inf, np.nan, 2.0**-149, 2.0**127, 0
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
    values = np.arange(16, dtype=F32) - F32(8) if whole else values
    codes = np.stack([records & 15, records >> 4], -1).reshape(5, -1)
    with np.errstate(all="ignore"):
        wanted = values[codes] * np.repeat(scale[np.arange(5) // share], 32, axis=1)
    for narrow in (False, True):
        loop = cells.loop(FOUR_BITS, 32, ARRAY[:3], cells.Way(), blocks.numbers_of(values), narrow, False)
        assert loop is not None and loop.form.kind == (blocks.WHOLE if whole and not narrow else loop.form.kind)
        out = np.full(wanted.shape, 7, np.uint16 if narrow else F32)
        assert loop(records, scale.view(np.uint8), ARRAY._replace(share=share), out)
        assert out.tobytes() == (floats._rounded(wanted) if narrow else wanted).tobytes()
        assert loop(records[3:], scale.view(np.uint8), ARRAY._replace(share=share), out[3:], 3)
        assert out.tobytes() == (floats._rounded(wanted) if narrow else wanted).tobytes()


FAR_APART = np.array([[100 * i, 2, 4, 2 * i, 0] for i in range(16)])  # two codes, and the next a hundred bytes on


@pytest.mark.parametrize(
    ("places", "group", "numbers"),
    [
        (FOUR_BITS, 24, np.arange(16)),  # scales change within a vector
        (FOUR_BITS._replace(codes=24), 24, np.arange(16)),  # a cell is no whole number of vectors
        (FOUR_BITS._replace(size=999, streams=FAR_APART), 32, np.arange(16)),
        (FOUR_BITS, 32, np.linspace(0, 1, 256) ** 2),  # more numbers than a table has, and no arithmetic for them
    ],
)
def test_other_layouts_get_none(places: Places, group: int, numbers: npt.NDArray[np.float64]) -> None:
    found = blocks.numbers_of(numbers.astype(F32))
    assert cells.loop(places, group, ARRAY[:3], cells.Way(), found, False, False) is None
