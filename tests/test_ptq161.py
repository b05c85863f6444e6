"""ptq161: places and numbers from loops, the choice of columns, what the fit may and may not do."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, placement
from packfmt.codec import PackedTensor
from packfmt.codecs import ptq161
from packfmt.errors import LayoutError
from packfmt.layout import dtype_of

PAGE = Path(__file__).resolve().parents[1] / "spec" / "formats" / "ptq161.md"
F32 = np.float32


def stored(packed: PackedTensor) -> dict[str, bytes]:
    """The bytes of every component."""
    return {name: array.tobytes() for name, array in packed.components.items()}


CODEC = codecs.get("ptq161")
LAYOUT = CODEC.layout


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, cols)).astype(F32)


def relative(packed: PackedTensor, weight: np.ndarray, costs: np.ndarray | float = 1) -> float:
    error = (packed.decode() - weight).astype(np.float64) ** 2 * costs
    return float(np.sqrt(error.sum() / (weight.astype(np.float64) ** 2 * costs).sum()))


def random_components(rows: int, cols: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Any bits, but that the mask names as many columns as it must, and all rows are whole tiles."""
    rng = np.random.default_rng(seed)
    out = {}
    for placed in LAYOUT.fit(rows, cols).components:
        dtype = dtype_of(placed.dtype)
        stored = rng.integers(0, 256, placed.nbytes, dtype=np.uint8).view(dtype)
        stored = rng.normal(0, 1, stored.size).astype(dtype) if dtype.kind == "f" else stored
        out[placed.name] = stored.reshape(placed.shape)
    mask = np.zeros(cols, np.uint8)
    mask[rng.permutation(cols)[: cols // 64 * 13]] = 1
    return out | {"mask": np.packbits(mask, bitorder="little")}


# ---------------------------------------------------------------- places and numbers


def slow_decode(rows: int, cols: int, c: dict[str, np.ndarray]) -> np.ndarray:
    """Weight by weight, from the sentences of the page."""
    out = np.zeros((rows, cols), F32)
    tiles, factor = c["tiles"].reshape(-1), c["factor"].reshape(-1)
    for r in range(rows):
        few = many = 0
        for j in range(cols):
            if c["mask"][j // 8] >> j % 8 & 1:
                tile = (r // 8 * (cols // 64) + few // 13) * 103
                byte = int(tiles[tile + few % 13 * 4 + r % 8 // 2])
                code = byte >> 4 if r % 2 else byte & 15
                out[r, j] = (F32(code) - F32(c["salient_zero"][r])) * F32(c["salient_scale"][r])
                few += 1
            else:
                tile = (r // 8 * (cols // 64) + many // 51) * 103
                plus = tiles[tile + 52 + many % 51] >> r % 8 & 1
                mean, scale = F32(c["mean"][r]), F32(c["scale"][r])
                out[r, j] = (mean + scale if plus else mean - scale) * F32(factor[many])
                many += 1
    return out


@pytest.mark.parametrize("shape", [(8, 64), (16, 192), (24, 128)])
def test_numbers_are_those_of_a_loop(shape: tuple[int, int]) -> None:
    components = random_components(*shape)
    assert PackedTensor(LAYOUT, shape, components).decode().tobytes() == slow_decode(*shape, components).tobytes()


def test_rows_beyond_a_tile_are_zero_bits() -> None:
    packed = CODEC.encode(normal(11, 128))
    assert packed.decode().tobytes() == slow_decode(11, 128, dict(packed.components)).tobytes()
    signs = packed.components["tiles"].reshape(2, 2, 103)[1, :, 52:]
    assert packed.components["tiles"].shape == (2, 206) and not (signs >> 3).any()


def test_strips_of_rows_decode_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from packfmt import grids

    packed = CODEC.encode(normal(40, 128))
    whole = packed.decode().tobytes()
    monkeypatch.setattr(grids, "STRIP", 300)
    assert packed.decode().tobytes() == whole


@given(data=st.data())
def test_any_bytes_survive_unpack_and_pack(data: st.DataObject) -> None:
    shape = (16, 128)
    components = {}
    for placed in LAYOUT.fit(*shape).components:
        start = data.draw(st.binary(min_size=1, max_size=40))
        stored = np.resize(np.frombuffer(start, "u1"), placed.nbytes)
        components[placed.name] = stored.view(dtype_of(placed.dtype)).reshape(placed.shape)
    again = placement.pack(LAYOUT, shape, placement.unpack(LAYOUT, shape, components))
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in components.items()}


def test_a_mask_with_another_number_of_columns_is_refused() -> None:
    components = random_components(8, 64)
    components["mask"] = np.full(8, 255, np.uint8)
    with pytest.raises(LayoutError, match="mask names 64 of 64 columns, needs 13"):
        PackedTensor(LAYOUT, (8, 64), components).decode()


def test_a_large_matrix_spends_1_61_bits_and_its_row_numbers() -> None:
    rows = cols = 1 << 14
    numbers = {"mask": cols, "factor": cols // 64 * 51 * 16, "rows": rows * (4 * 16 - 8)}
    bits = 8 * LAYOUT.nbytes(rows, cols)
    assert (bits - sum(numbers.values())) / (rows * cols) == 103 / 64 == 1.609375
    assert bits / (rows * cols) < 1.614


# ---------------------------------------------------------------- encoding


def mask_of(packed: PackedTensor) -> np.ndarray:
    return packed.unpack()["mask"].reshape(-1) == 1


@pytest.mark.parametrize("cols", [64, 128, 384, 768, 4096])
def test_the_columns_hold_those_of_the_paper(cols: int) -> None:
    importance = np.random.default_rng(cols).permutation(cols).astype(F32)
    mask = mask_of(CODEC.encode(normal(8, cols), importance=importance))
    paper = importance >= np.sort(importance)[::-1][int(0.2 * cols)]
    assert not (paper & ~mask).any()
    assert mask.sum() == cols // 64 * 13 <= paper.sum() + cols / 320


def test_without_importance_the_columns_squares_decide_and_equals_go_left() -> None:
    weight = np.ones((4, 128), F32)
    weight[:, 100:110] = -2
    assert np.flatnonzero(mask_of(CODEC.encode(weight))).tolist() == [*range(16), *range(100, 110)]


def test_importance_of_every_weight_counts_by_its_sum() -> None:
    importance = np.ones((4, 128), F32)
    importance[2, 50:76] = 5
    mask = mask_of(CODEC.encode(normal(4, 128), importance=importance))
    assert np.flatnonzero(mask).tolist() == list(range(50, 76))


def test_codes_of_four_bits_are_the_papers_rounding() -> None:
    """Per row: the range with zero in it, in 15 steps; scalar float32, ties to even."""
    weight = np.random.default_rng(5).integers(-30, 31, (16, 128)).astype(F32)
    weight[0] = np.abs(weight[0]) + 1
    weight[1] = 0
    packed = CODEC.encode(weight)
    parts = packed.unpack()
    for row, codes in zip(weight[:, mask_of(packed)], parts["codes"].reshape(16, -1), strict=True):
        low, high = min(row.min(), F32(0)), max(row.max(), F32(0))
        step = F32(np.float16((high - low) / F32(15)))
        zero = min(15, max(0, round(float(-low / step)))) if step else 0
        want = [min(15, max(0, round(float(w / step)) + zero)) if step else 0 for w in row]
        assert codes.tolist() == want
    assert packed.decode()[1].tolist() == [0] * 128


def test_numbers_of_this_form_come_back() -> None:
    rng = np.random.default_rng(6)
    components = random_components(16, 128)
    codes = rng.integers(0, 16, (16, 2, 13, 1), dtype=np.uint8)
    codes[:, 0, 0], codes[:, 0, 1] = 0, 15
    parts = placement.unpack(LAYOUT, (16, 128), components) | {
        "codes": codes,
        "factor": np.ones((1, 2, 1, 51), np.float16),
        "scale": rng.integers(1, 9, (16, 1, 1, 1)).astype(np.float16),
        "mean": rng.integers(-4, 5, (16, 1, 1, 1)).astype(np.float16),
        "salient_scale": rng.integers(1, 9, (16, 1, 1, 1)).astype(np.float16),
        "salient_zero": rng.integers(0, 16, (16, 1, 1, 1), dtype=np.uint8),
    }
    packed = PackedTensor(LAYOUT, (16, 128), placement.pack(LAYOUT, (16, 128), parts))
    importance = mask_of(packed).astype(F32)
    again = CODEC.encode(packed.decode(), importance=importance)
    assert stored(again) == stored(packed)


def test_every_round_of_the_fit_is_as_good_as_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.exp(np.random.default_rng(7).normal(0, 0.5, 320)).astype(F32)
    weight = normal(96, 320) * columns
    errors = []
    for rounds in (0, 1, 2, 4):
        monkeypatch.setattr(ptq161, "ROUNDS", rounds)
        errors.append(relative(CODEC.encode(weight), weight))
    assert errors[0] > 1.02 * errors[1] and errors[1] > errors[2] > errors[3]


def test_important_columns_are_better_for_it() -> None:
    weight = normal(64, 512)
    importance = np.exp(np.random.default_rng(8).normal(0, 1.5, 512)).astype(F32)
    costs = importance[None].astype(np.float64) ** 2
    told, untold = CODEC.encode(weight, importance=importance), CODEC.encode(weight)
    assert relative(told, weight, costs) < 0.5 * relative(untold, weight, costs)
    assert relative(untold, weight) < 0.56


def test_how_many_rows_are_summed_at_a_time_changes_no_choice_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(9).integers(-3, 4, (96, 128)).astype(F32)  # exact sums
    whole = CODEC.encode(weight)
    monkeypatch.setattr(ptq161, "STRIP", 7)
    assert mask_of(CODEC.encode(weight)).tolist() == mask_of(whole).tolist()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 64)])
def test_empty_and_zero_weights_are_encoded(shape: tuple[int, int]) -> None:
    packed = CODEC.encode(np.zeros(shape, F32))
    assert packed.decode().tolist() == np.zeros(shape).tolist()


def test_refusals_say_what_does_not_fit() -> None:
    with pytest.raises(LayoutError, match="ptq161: 100 columns, needs a multiple of 64"):
        CODEC.encode(np.zeros((4, 100), F32))
    with pytest.raises(LayoutError, match="ptq161: 1 of 2 scales and factors overflow float16"):
        CODEC.encode(np.array([[1] * 64, [1e30] * 64], F32))
    packed = CODEC.encode(normal(8, 256))
    with pytest.raises(LayoutError, match="the numbers of ptq161 are no steps times scales, but 'ptq161'"):
        packed.repack(codecs.get("tq2_0").layout)


# ---------------------------------------------------------------- the page


def test_the_page_has_a_worked_example() -> None:
    text = PAGE.read_text()
    found = dict(re.findall(r"```hex (\w+)\n(.*?)```", text, re.S))
    components = {}
    for placed in LAYOUT.fit(1, 64).components:
        stored = np.frombuffer(bytes.fromhex(found[placed.name]), dtype_of(placed.dtype))
        components[placed.name] = stored.reshape(placed.shape)
    weight = PackedTensor(LAYOUT, (1, 64), components).decode()
    told = re.findall(r"w\[(\d+)\] = (-?[\d.]+)", text)
    assert len(told) > 7
    for column, number in told:
        assert weight[0, int(column)] == float(number)
    assert weight.tobytes() == slow_decode(1, 64, components).tobytes()
