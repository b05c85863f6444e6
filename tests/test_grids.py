"""From codes to numbers: formulas computed here by hand, sharing of every kind, and parameters from hostile files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import grids
from packfmt.errors import LayoutError
from packfmt.layout import Axis, Codes, Component, Grid, Layout, Stream, Values, cols, grid, rows
from packfmt.placement import pack
from tests.models import same

F32 = np.float32


def test_affine_is_one_product_in_float32() -> None:
    codes = np.array([[0, 8, 15, 3]], np.uint8)
    scale = np.array([[0.1, 3.0]], np.float16)
    want = [F32(np.float16(0.1)) * F32(c - 8) for c in (0, 8)] + [F32(3) * F32(c - 8) for c in (15, 3)]
    assert same(grids.affine({"codes": codes, "scale": scale}, zero=8), np.array([want], F32))


def test_a_table_takes_its_values_and_a_power_of_two() -> None:
    parts = {"codes": np.array([[0, 1, 2, 1]], np.uint8), "scale": np.array([[0, 255]], np.uint8)}
    got = grids.table(parts, values=(0, 1.5, -3), exponent=128)
    assert same(got, np.array([[0, 1.5 * 2.0**-128, -np.inf, 1.5 * 2.0**127]]).astype(F32))
    assert np.isinf(grids.table(parts, values=(0, 1.5, -3), exponent=126)).tolist() == [[False, False, True, True]]


SHARED = [  # digits of the scale along rows and columns, for a weight of 6 x 20
    ((), ()),
    ((rows(),), ()),
    ((), (cols(),)),
    ((rows(),), (cols(5),)),
    ((rows(2),), (cols(10),)),
    ((rows(3),), (cols(),)),
]


@pytest.mark.parametrize("digits", SHARED)
def test_a_scale_belongs_to_all_that_share_it(digits: tuple[tuple, tuple]) -> None:
    layout = Layout(
        "shared",
        (
            Component("codes", (rows(), cols()), (Codes("codes", 8),)),
            Component("scales", (*digits[0], *digits[1]), (Values("scale", "<f4"),)),
        ),
        grid("affine", zero=1),
    )
    shape = (6, 20)
    check_decoding(layout, shape)


def check_decoding(layout: Layout, shape: tuple[int, int]) -> None:
    """decode equals a loop over all weights, with every scale found by the share that `fit` states."""
    rng = np.random.default_rng(3)
    fitted = layout.fit(*shape)
    parts = {
        "codes": rng.integers(0, 200, fitted.parts["codes"].shape).astype(np.uint8),
        "scale": rng.normal(size=fitted.parts["scale"].shape).astype(F32),
    }
    a, b = fitted.parts["scale"].share
    want = np.empty(shape, F32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            want[i, j] = parts["scale"][i // a, j // b] * F32(int(parts["codes"][i, j]) - 1)
    streams = {s.name: np.zeros(5, "u1") for s in layout.streams}
    assert same(grids.decode(layout, shape, pack(layout, shape, parts | streams)), want)


@pytest.mark.parametrize("shape", [(6, 23), (7, 41), (1, 10), (5, 9)])
def test_a_last_group_that_padding_made_whole_is_shorter(shape: tuple[int, int]) -> None:
    layout = Layout(
        "padded",
        (
            Component("words", (rows(), cols(10)), (Codes("codes", 3, (), (cols(1, 10),), "<u4"), )),
            Component("high", (rows(), cols()), (Codes("codes", 5, low=3),)),
            Component("scales", (rows(), cols(10)), (Values("scale", "<f4"),)),
            Stream("notes", "u1"),
        ),
        grid("affine", zero=1),
        (Axis("rows", "rows"), Axis("cols", "cols", pad=10)),
    )  # fmt: skip
    check_decoding(layout, shape)


def test_strips_give_the_same_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(
        "tiles",
        (
            Component("codes", (rows(), cols()), (Codes("codes", 8),)),
            Component("scales", (rows(4), cols(8)), (Values("scale", "<f4"),)),
        ),
        grid("affine", zero=1),
    )
    monkeypatch.setattr(grids, "STRIP", 100)
    check_decoding(layout, (36, 24))


def test_an_unknown_grid_is_told_with_those_there_are() -> None:
    with pytest.raises(
        LayoutError, match=r"no grid is called 'cubic'; there are plain, affine, quotient, .*, table, .*"
    ):
        grids.dequantize(Grid("cubic"), {})


PARAMETERS = st.dictionaries(
    st.sampled_from(["zero", "values", "exponent", "other", "stride", "block", "runs", "first", "ratio", "count"]),
    st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | st.text(max_size=3) | st.integers(1, 8)
    | st.lists(st.integers(-9, 9) | st.text(max_size=2), max_size=4).map(tuple) | st.sampled_from(["high", "low"])
    | st.lists(st.lists(st.integers(-1, 5), min_size=2, max_size=4).map(tuple), max_size=4).map(tuple),
    max_size=5,
)  # fmt: skip


@given(
    name=st.sampled_from(sorted(grids.GRIDS)), params=PARAMETERS, dtype=st.sampled_from(["u1", "i1", "<f2", "<u8", "?"])
)
def test_parameters_from_a_hostile_file_are_a_layout_error_or_harmless(name: str, params: dict, dtype: str) -> None:
    parts = {"codes": np.zeros((2, 4), np.uint8), "scale": np.ones((2, 2), dtype), "values": np.ones((2, 4), dtype)}
    if "base3" in name or name.startswith("plane"):
        parts |= {"codes": np.zeros((2, 1, 4), np.uint8), "scale": np.ones((2, 1, 2), dtype)}
    with np.errstate(all="ignore"):
        try:
            assert len(grids.dequantize(grid(name, **params), parts)) == 2
        except LayoutError as error:
            assert name in str(error)


def test_a_grid_whose_parts_have_another_shape_is_refused() -> None:
    layout = Layout("thin", (Component("values", (rows(),), (Values("values", "<f4"),)),), grid("plain"))
    with pytest.raises(LayoutError, match=r"thin: its grid gives \(3, 1\), a strip is \(3, 5\)"):
        grids.decode(layout, (3, 5), {"values": np.zeros(3, "<f4")})
