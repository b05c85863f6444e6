"""The contract: what a packed tensor and an encoder accept, and how they refuse the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from packfmt import codecs
from packfmt.codec import Codec, PackedTensor, dense_dtype, exact_if, why_inexact
from packfmt.errors import LayoutError
from packfmt.layout import DENSE, Codes, Layout, Values, blocks, cols
from packfmt.placement import pack
from tests.models import PAIRS, normal, same

Q4_0, Q8_0 = codecs.get("q4_0"), codecs.get("q8_0")
BLOCKS = np.zeros((4, 36), np.uint8)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({}, "q4_0: component 'blocks' is missing; it has blocks"),
        ({"blocks": BLOCKS, "extra": BLOCKS}, "q4_0: component 'extra' is unknown; it has blocks"),
        ({"blocks": BLOCKS.view("i1")}, r"component 'blocks' is int8 \(4, 36\), needs uint8 \(4, 36\) for a weight of"),
        ({"blocks": BLOCKS[:3]}, r"component 'blocks' is uint8 \(3, 36\), needs uint8 \(4, 36\) for a weight of shape"),
    ],
)
def test_a_packed_tensor_is_what_its_layout_says(components: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        PackedTensor(Q4_0.layout, (2, 2, 64), components)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros((2, 33), np.float32), "q4_0: 33 columns, needs a multiple of 32"),
        (np.zeros((2, 32), np.int32), "q4_0: a weight of int32, needs a float dtype"),
        (np.full((2, 32), np.inf, np.float16), r"q4_0: 64 weights are not finite, the first at \[0, 0\]"),
        (np.eye(32)[None] * 1e300, r"q4_0: 32 weights are beyond float32, the first at \[0, 0, 0\]"),
    ],
)
def test_an_encoder_refuses_what_it_cannot_take(weight: np.ndarray, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Q4_0.encode(weight)


def test_an_encoder_that_does_not_exist_is_told_with_those_that_do() -> None:
    with pytest.raises(LayoutError, match="q4_0: no encoder is called 'best'; there are ggml"):
        Q4_0.encode(np.zeros((2, 32), np.float32), "best")


def test_a_dense_layout_keeps_infinity_but_makes_none() -> None:
    weight = np.array([[1.0, np.inf, -np.inf, np.nan]])
    assert same(codecs.get("f32").encode(weight).components["values"], weight.astype(np.float32))
    with pytest.raises(LayoutError, match=r"f32: 1 weights are beyond float32, the first at \[0, 1\]"):
        codecs.get("f32").encode(np.array([[1.0, 1e39, np.inf]]))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64)])
def test_leading_axes_flatten_into_rows_and_come_back(shape: tuple[int, ...]) -> None:
    weight = normal(*shape, dtype=np.float32)
    packed = Q8_0.encode(weight)
    assert packed.shape == shape and packed.matrix == (weight.size // 64, 64)
    assert same(packed.decode(), Q8_0.encode(weight.reshape(-1, 64)).decode().reshape(shape))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,)])
def test_a_weight_without_elements_is_a_weight(shape: tuple[int, ...]) -> None:
    packed = Q8_0.encode(np.zeros(shape, np.float32))
    assert packed.nbytes == 0 and packed.decode().shape == shape


def test_repacking_changes_places_and_no_number() -> None:
    weight = normal(8, 128, dtype=np.float32)
    packed = Q4_0.encode(weight)
    moved = packed.repack(PAIRS)
    assert moved.components["packed"].shape == (8, 64) and moved.components["scales"].shape == (8, 4)
    codes = packed.unpack()["codes"]
    assert same(moved.components["packed"], codes[:, 0::2] | codes[:, 1::2] << 4)
    assert same(moved.decode(), packed.decode())
    assert same(moved.repack(Q4_0.layout).components["blocks"], packed.components["blocks"])


G64 = blocks("g64", 64, Values("scale", "<f2"), Codes("codes", 4, (), (cols(1, 64),)), grid=Q4_0.layout.grid)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (Q8_0, Q4_0.layout, "q4_0 has no code for -128, -127, -126, -125 ... times a scale"),
        (Q4_0, codecs.get("hif4").layout, "the numbers of hif4 are no steps times scales, but 'hif4'"),
        (Q4_0, DENSE["f32"], "the numbers of f32 are no steps times scales, but 'plain'"),
    ],
)
def test_repacking_that_would_change_a_number_is_refused_with_the_reason(
    source: Codec, target: Layout, reason: str
) -> None:
    packed = source.encode(normal(8, 128, dtype=np.float32))
    assert why_inexact(packed.layout, target, packed.shape) == packed.refuses(target) == reason
    with pytest.raises(LayoutError) as caught:
        packed.repack(target)
    assert str(caught.value) == f"{source.layout.name} to {target.name}: {reason}"


def test_codes_are_spelled_anew_where_only_the_code_of_zero_differs() -> None:
    packed = Q4_0.encode(normal(8, 128, dtype=np.float32))
    assert exact_if(Q4_0.layout, Q8_0.layout, packed.shape) == ""
    moved = packed.repack(Q8_0.layout)
    assert same(moved.decode() + np.float32(0), packed.decode() + np.float32(0))
    assert same(moved.unpack()["codes"], packed.unpack()["codes"].astype(np.int8) - np.int8(8))


def test_coarser_scales_are_exact_if_the_numbers_allow_it() -> None:
    packed = Q4_0.encode(normal(8, 128, dtype=np.float32))
    assert exact_if(Q4_0.layout, G64, packed.shape) == "the 64 columns that share a scale there do so here"
    with pytest.raises(LayoutError, match=r"^q4_0 to g64: scale \[0, 1\] is .*, that of weights before it"):
        packed.repack(G64)
    parts = packed.unpack()
    parts["scale"][:, 1::2] = parts["scale"][:, ::2]
    equal = PackedTensor(Q4_0.layout, packed.shape, pack(Q4_0.layout, packed.matrix, parts))
    assert same(equal.repack(G64).decode(), equal.decode())
    assert same(equal.repack(G64).repack(Q4_0.layout).components["blocks"], equal.components["blocks"])


def test_dense_is_what_a_layout_is_and_not_what_it_is_called() -> None:
    assert dense_dtype(DENSE["bf16"]) == "bfloat16" and dense_dtype(Q4_0.layout) == ""
    assert dense_dtype(replace(Q4_0.layout, name="bf16")) == ""


def test_what_is_lossless_is_so_for_every_bit_of_a_float64() -> None:
    with pytest.raises(LayoutError, match="f32: 1 of 2 weights change, the first at \\[1\\]"):
        codecs.get("f32").encode(np.array([0.5, 1 / 3]), lossless=True)
    assert codecs.get("f32").encode(np.array([0.5, 0.25]), lossless=True).nbytes == 8


def test_a_nan_that_stays_one_is_no_loss() -> None:
    weight = np.array([np.nan, 1, np.inf, -0.0], np.float32)
    assert codecs.get("bf16").encode(weight, lossless=True).shape == (4,)
    with pytest.raises(LayoutError, match="bf16: 1 of 4 weights change"):
        codecs.get("bf16").encode(weight + np.float32([0, 2**-20, 0, 0]), lossless=True)
