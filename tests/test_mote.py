"""mote_<experts>: places written out, a scale for each expert, exact ways to and from other ternary formats."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, placement
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError, PlanError
from packfmt.layout import Layout

PAGE = Path(__file__).resolve().parents[1] / "spec" / "formats" / "mote.md"
F32 = np.float32


def stored(packed: PackedTensor) -> dict[str, bytes]:
    """The bytes of every component."""
    return {name: array.tobytes() for name, array in packed.components.items()}


EXPERTS, ROWS, COLS = 4, 6, 256
SHAPE = (EXPERTS, ROWS, COLS)


def ternary(scales: list[float], seed: int = 0) -> np.ndarray:
    """(experts, rows, cols) of steps times a scale an expert."""
    steps = np.random.default_rng(seed).integers(-1, 2, SHAPE)
    return (steps * np.array(scales)[:, None, None]).astype(F32)


def slow_codes(layout: Layout, codes: np.ndarray) -> bytes:
    """The component `codes`, two bits at a time, from the sentence on the page."""
    out = bytearray()
    for row in codes:
        for start in range(0, len(row), 128):
            for j in range(32):
                out.append(sum(int(row[start + j + 32 * n]) << 2 * n for n in range(4)))
    return bytes(out)


def test_two_bits_of_a_byte_are_32_columns_apart() -> None:
    packed = codecs.get("mote_4").encode(ternary([0.5, 0.25, 3, 0.1]))
    assert packed.components["codes"].tobytes() == slow_codes(packed.layout, packed.unpack()["codes"])


def test_every_expert_has_its_scale_and_ternary_weights_come_back() -> None:
    weight = ternary([0.5, 0.1, 3e-9, 7e20])
    packed = codecs.get("mote_4").encode(weight)
    assert packed.components["scale"].tobytes() == np.array([0.5, 0.1, 3e-9, 7e20], F32).tobytes()
    assert packed.decode().tobytes() == (weight + 0).tobytes()
    again = codecs.get("mote_4").encode(packed.decode())
    assert stored(again) == stored(packed)


@pytest.mark.parametrize("encoder", ["best", "absmean"])
def test_an_expert_is_encoded_as_if_alone(encoder: str) -> None:
    weight = (np.random.default_rng(2).normal(0, 1, SHAPE) * np.array([1, 0, 0.01, 30])[:, None, None]).astype(F32)
    stack = codecs.get("mote_4").encode(weight, encoder)
    for i, one in enumerate(weight):
        alone = codecs.get("mote_1").encode(one, encoder)
        assert stack.decode()[i].tobytes() == alone.decode().tobytes()


def test_absmean_is_the_rule_of_the_paper() -> None:
    weight = np.random.default_rng(3).integers(-8, 9, SHAPE).astype(F32)  # sums are exact
    packed = codecs.get("mote_4").encode(weight, "absmean")
    mean = np.abs(weight).reshape(EXPERTS, -1).mean(1, dtype=np.float64).astype(F32)
    assert packed.components["scale"].tobytes() == mean.tobytes()
    steps = np.rint(weight * (F32(1) / mean)[:, None, None]).clip(-1, 1)
    assert packed.decode().tobytes() == (steps * mean[:, None, None] + 0).tobytes()


def test_best_has_the_least_error_of_all_thresholds() -> None:
    weight = np.random.default_rng(4).normal(0, 1, (2, 1, 128)).astype(F32)
    decoded = codecs.get("mote_2").encode(weight).decode()
    for i in range(2):
        size = np.sort(np.abs(weight[i].astype(np.float64).reshape(-1)))[::-1]
        gain = max(size[:k].sum() ** 2 / k for k in range(1, 129))
        error = ((decoded[i] - weight[i].astype(np.float64)) ** 2).sum()
        assert error <= (size**2).sum() - gain + 1e-6 * (size**2).sum()


@given(data=st.binary(min_size=64, max_size=64), scales=st.binary(min_size=8, max_size=8))
def test_any_bytes_survive_unpack_and_pack(data: bytes, scales: bytes) -> None:
    layout = codecs.get("mote_2").layout
    components = {"codes": np.frombuffer(data, np.uint8).reshape(2, 32), "scale": np.frombuffer(scales, "<f4")}
    again = placement.pack(layout, (2, 128), placement.unpack(layout, (2, 128), components))
    assert {k: v.tobytes() for k, v in again.items()} == {"codes": data, "scale": scales}


# ---------------------------------------------------------------- other formats


@pytest.mark.parametrize("target", ["tq2_0", "tq1_0", "q2_0"])
def test_block_formats_hold_a_stack_whose_scales_are_float16(target: str) -> None:
    weight = ternary([0.5, 0.25, 3, 0.125])
    packed = codecs.get("mote_4").encode(weight)
    there = packed.repack(codecs.get(target).layout)
    assert there.decode().tobytes() == packed.decode().tobytes()
    back = there.repack(packed.layout)
    assert stored(back) == stored(packed)


def test_a_scale_that_is_no_float16_is_named() -> None:
    packed = codecs.get("mote_4").encode(ternary([0.5, 0.25, 0.1, 0.125]))
    with pytest.raises(LayoutError, match=r"mote_4 to tq2_0: scale \[12, 0\] is 0.100000001, which is no float16"):
        packed.repack(codecs.get("tq2_0").layout)


def test_one_scale_a_tensor_holds_a_stack_only_if_experts_agree() -> None:
    same = codecs.get("mote_4").encode(ternary([0.1] * 4))
    there = same.repack(codecs.get("i2_s").layout)
    assert there.decode().tobytes() == same.decode().tobytes()
    assert there.repack(same.layout).decode().tobytes() == same.decode().tobytes()
    apart = codecs.get("mote_4").encode(ternary([0.1, 0.1, 0.2, 0.1]))
    with pytest.raises(LayoutError, match=r"mote_4 to i2_s: scale \[2, 0\] is 0.200000003, that of weights before"):
        apart.repack(codecs.get("i2_s").layout)


def test_experts_of_one_tensor_each_become_a_stack() -> None:
    """What checkpoints hold: one ternary tensor an expert, each with its scale."""
    weight = ternary([0.1, 0.7, 2, 0.3])
    each = [codecs.get("i2_s").encode(one).repack(codecs.get("mote_1").layout).components for one in weight]
    joined = {name: np.concatenate([parts[name] for parts in each]) for name in ("codes", "scale")}
    stack = PackedTensor(codecs.get("mote_4").layout, SHAPE, joined)
    assert stack.decode().tobytes() == (weight + 0).tobytes()


def test_experts_may_be_grouped_finer() -> None:
    packed = codecs.get("mote_2").encode(ternary([0.1, 0.1, 2, 2]))
    finer = packed.repack(codecs.get("mote_4").layout)
    assert finer.components["scale"].tolist() == [F32(0.1), F32(0.1), 2, 2]
    assert finer.decode().tobytes() == packed.decode().tobytes()


# ---------------------------------------------------------------- refusals and the page


def test_rows_are_a_multiple_of_the_experts_and_columns_of_128() -> None:
    codec = codecs.get("mote_4")
    with pytest.raises(LayoutError, match="mote_4: 6 rows, needs a multiple of 4"):
        codec.encode(np.zeros((6, 128), F32))
    with pytest.raises(LayoutError, match="mote_4: 96 columns, needs a multiple of 128"):
        codec.encode(np.zeros((4, 96), F32))


@pytest.mark.parametrize("name", ["mote_0", "mote_", "mote_08", "mote_-1", "mote_12345"])
def test_other_names_are_no_formats(name: str) -> None:
    with pytest.raises(PlanError, match="no format is called"):
        codecs.get(name)


def test_a_stack_without_columns_is_encoded() -> None:
    for encoder in ("best", "absmean"):
        packed = codecs.get("mote_4").encode(np.zeros((4, 2, 0), F32), encoder)
        assert packed.decode().shape == (4, 2, 0) and packed.components["scale"].shape == (4,)


def test_the_page_has_a_worked_example() -> None:
    text = PAGE.read_text()
    codes, scale = (bytes.fromhex(found) for found in re.findall(r"```hex\n(.*?)```", text, re.S))
    packed = PackedTensor(
        codecs.get("mote_2").layout,
        (2, 1, 128),
        {"codes": np.frombuffer(codes, np.uint8).reshape(2, 32), "scale": np.frombuffer(scale, "<f4")},
    )
    told = re.findall(r"w\[(\d), 0, (\d+)\] = (-?[\d.]+)", text)
    assert len(told) > 7
    weight = packed.decode()
    for expert, column, number in told:
        assert weight[int(expert), 0, int(column)] == float(number)
    again = codecs.get("mote_2").encode(weight)
    assert again.components["codes"].tobytes() == codes and again.components["scale"].tobytes() == scale
