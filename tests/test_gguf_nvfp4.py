"""NVFP4 in GGUF: blocks of one type, and beside them a tensor with the scale of the whole, or one for each expert."""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from hypothesis import given
from hypothesis import strategies as st

from packfmt import checkpoint, codecs, conversion
from packfmt.codec import PackedTensor, matrix
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import gguf, gguf_source
from packfmt.layout import DENSE
from packfmt.plan import Recipe, Step
from tests.gguf_tensors import foreign, plan_of, tensor_of, write
from tests.models import folder, normal

F32 = np.float32
NUMBER = 40  # of the type in files
PLAIN, SCALED = codecs.get("nvfp4_plain").layout, codecs.get("nvfp4").layout
NEXT = ("norm", (8,), 0, bytes(32))  # a tensor behind the others, so that sizes decide what types are
# (i - 31.5) / 8 for i = 0 to 63, encoded by ggml d99724f2, quantize_row_nvfp4_ref
GOLDEN = bytes.fromhex("332a2a33 efefefefeededededfdfcfcebeae9e0d50616263647475756565656676767676".replace(" ", ""))


def packed(shape: tuple[int, ...], scale: float | None = 0.5, seed: int = 0) -> PackedTensor:
    """A tensor of random codes and scale bytes; without a scale of the whole it is nvfp4_plain."""
    layout = PLAIN if scale is None else SCALED
    first, *rest = layout.fit(*matrix(shape)).components
    raw = np.random.default_rng(seed).integers(0, 256, first.nbytes, np.uint8)
    components = {first.name: raw.reshape(first.shape)} | {c.name: np.full(c.shape, scale, F32) for c in rest}
    return PackedTensor(layout, shape, components)


def experts(shape: tuple[int, int, int], *scales: float, seed: int = 0) -> PackedTensor:
    """A stack of random codes and scale bytes, with a scale for each expert."""
    layout = codecs.get(f"nvfp4_x{len(scales)}").layout
    one = packed(shape, seed=seed)
    return PackedTensor(layout, shape, {"blocks": one.components["blocks"], "scale": np.array(scales, F32)})


def blocks_of(tensor: PackedTensor) -> bytes:
    return tensor.components["blocks"].tobytes()


def same(a: PackedTensor, b: PackedTensor) -> bool:
    mine, theirs = ({name: c.tobytes() for name, c in t.components.items()} for t in (a, b))
    return (a.layout, a.shape, a.dtype, mine) == (b.layout, b.shape, b.dtype, theirs)


def made_by_gguf(path: Path, **tensors: tuple[PackedTensor, object]) -> Path:
    """A file as llama.cpp's converter writes it: blocks, and what stands beside them unless it is None."""
    writer = GGUFWriter(path, "llama")
    for name, (tensor, scale) in tensors.items():
        raw = np.frombuffer(blocks_of(tensor), np.uint8).reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=GGMLQuantizationType.NVFP4)
        if scale is not None:
            writer.add_tensor(f"{name}.scale", np.asarray(scale))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------- bytes and numbers


def test_the_golden_block_decodes_to_numbers_worked_out_by_hand() -> None:
    weights = PackedTensor(PLAIN, (1, 64), {"blocks": np.frombuffer(GOLDEN, np.uint8).reshape(1, -1)}).decode()[0]
    first, second = 1.375 / 2, 1.25 / 4  # 0x33 is 0.0110.011, 0x2a is 0.0101.010
    assert weights[[0, 8, 15, 16]].tolist() == [-6 * first, -4 * first, -3 * first, -6 * second]
    assert weights[[31, 32, 48, 63]].tolist() == [0 * second, 0 * second, 3 * first, 6 * first]


def test_every_code_with_every_scale_byte_is_what_gguf_makes_of_it() -> None:
    """The scale's highest bit is ignored, and 0x7F is 0 but 0xFF 480, as ggml has it."""
    scale = np.arange(256, dtype=np.uint8).repeat(4).reshape(-1, 4)
    codes = np.arange(16, dtype=np.uint8)
    low_high = np.tile(codes[:8] | codes[8:] << 4, 4)
    raw = np.concatenate([scale, np.tile(low_high, (256, 1))], 1)
    ours = PackedTensor(PLAIN, (256, 64), {"blocks": raw}).decode()
    theirs = quants.dequantize(raw, GGMLQuantizationType.NVFP4)
    assert (ours + F32(0)).tobytes() == (theirs + F32(0)).tobytes()  # code 8 is -0 here, and 0 there
    assert not ours[[0, 127, 128]].any() and ours.max() == ours[255].max() == 6 * 480


def test_the_scale_of_the_whole_multiplies_each_scale_before_the_code_does() -> None:
    tensor = packed((4, 128), 0.3)
    alone = PackedTensor(PLAIN, tensor.shape, {"blocks": tensor.components["blocks"]}).decode()
    parts = tensor.unpack()
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)[parts["codes"]]
    step = np.abs(alone).reshape(4, 8, 16).max(2) / np.abs(codes).reshape(4, 8, 16).max(2)  # exact
    expected = codes * (step * F32(0.3)).repeat(16, 1)
    assert (tensor.decode() + F32(0)).tobytes() == (expected + F32(0)).tobytes()


# ---------------------------------------------------------------- what packfmt writes


@pytest.mark.parametrize("shape", [(4, 128), (3, 2, 64)])
def test_gguf_reads_blocks_and_a_scale_beside_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {
        "blk.0.ffn_up.weight": packed(shape, 0.5),
        "blk.0.attn_q.weight": packed(shape, 0.125, seed=1),
        "output.weight": packed(shape, None, seed=2),
        "norm": tensor_of(DENSE["f32"], (7,)),
    }
    path = write(tmp_path / "m.gguf", tensors)
    found = {t.name: t for t in GGUFReader(path).tensors}
    beside = ["blk.0.ffn_up.weight", "blk.0.ffn_up.scale", "blk.0.attn_q.weight", "blk.0.attn_q.scale"]
    assert list(found) == [*beside, "output.weight", "norm"]
    for name, tensor in list(tensors.items())[:3]:
        mine = found[name]
        assert (mine.tensor_type.name, mine.shape.tolist()) == ("NVFP4", list(shape[::-1]))
        assert mine.data.tobytes() == blocks_of(tensor)
        scale = found.get(name.replace(".weight", ".scale"))
        number = F32(1) if scale is None else scale.data.reshape(-1, *([1] * (len(shape) - 1)))
        once_an_expert = shape[0] if len(shape) == 3 else 1  # as llama.cpp looks for it
        assert scale is None or (scale.tensor_type.name, scale.shape.tolist()) == ("F32", [once_an_expert])
        theirs = quants.dequantize(np.array(mine.data), mine.tensor_type).reshape(shape) * number
        assert (tensor.decode() + F32(0)).tobytes() == (theirs + F32(0)).tobytes()
        assert mine.data_offset % 32 == 0 and (scale is None or scale.data_offset % 32 == 0)


def test_what_is_written_is_read_the_same(tmp_path: Path) -> None:
    tensors = {
        "a.weight": packed((4, 128)), "b": packed((2, 3, 64), 3.0), "c": packed((64,), 1.0),
        "d.weight": packed((4, 64), None), "a.input_scale": tensor_of(DENSE["f32"], ()),
        "scale": tensor_of(DENSE["f32"], (1,)), "e.weight": packed((0, 64)),
    }  # fmt: skip
    with checkpoint.open(write(tmp_path / "m.gguf", tensors)) as model:
        assert list(model) == list(tensors)  # scales are parts of weights; other tensors stay what they are
        for name, tensor in tensors.items():
            assert same(model[name], tensor), name
            assert model.index[name].nbytes == tensor.nbytes + (4 if name == "b" else 0)  # one more expert
        assert model.index["a.weight"].kind == model.index["d.weight"].kind == "NVFP4"


def test_a_changed_scale_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a.weight": packed((4, 128), 0.3)})
    raw = path.read_bytes()
    assert raw.count(struct.pack("<f", 0.3)) == 1
    path.write_bytes(raw.replace(struct.pack("<f", 0.3), struct.pack("<f", 0.6)))
    with checkpoint.open(path) as model, pytest.raises(ContainerError, match=r"a\.weight: its bytes are not") as caught:
        model["a.weight"]
    assert caught.value.rule == "PF109"


def test_a_lost_scale_is_missed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a.weight": packed((4, 128), 0.3)})
    path.write_bytes(path.read_bytes().replace(b"a.scale", b"a.shale"))
    with pytest.raises(ContainerError, match=r"a\.weight: is NVFP4 without a scale, and no F32 a\.scale") as caught:
        checkpoint.open(path)
    assert caught.value.rule == "PF110"


def refusal(**tensors: PackedTensor) -> str:
    steps: tuple[Step, ...] = plan_of(tensors).steps
    return gguf.plan_refusal(steps)


def test_tensors_that_readers_would_take_for_a_scale_are_refused() -> None:
    one = tensor_of(DENSE["f32"], (1,))
    for scale in (0.5, None):  # where it has none of its own, it would get one
        assert "a.scale: readers would take it for the scale of a.weight" in refusal(
            **{"a.weight": packed((1, 64), scale), "a.scale": one}
        )
    for two in {"a": packed((1, 64)), "b": packed((1, 64), None)}, {"b": packed((1, 64), None), "a": packed((1, 64))}:
        two["a.weight"] = two.pop("b")
        assert "a.scale: readers would take that of a for the scale of a.weight" in refusal(**two)
    assert not refusal(**{"a.weight": tensor_of(DENSE["f32"], (1, 64)), "a.scale": one})


def test_a_scale_s_name_must_fit_too(tmp_path: Path) -> None:
    name = "n" * (gguf.LONGEST_NAME - 5)
    assert "its scale needs a name of 64 bytes" in refusal(**{name: packed((1, 64))})
    assert not refusal(**{name[:-1]: packed((1, 64))})
    assert not refusal(**{name: packed((1, 64), None)})  # needs none
    with pytest.raises(PlanError, match="its scale needs"):
        write(tmp_path / "m.gguf", {name: packed((1, 64))})


def test_a_layout_with_more_beside_its_blocks_has_no_room() -> None:
    rows = codecs.get("nvfp4_modelopt").layout
    assert "no type for nvfp4_modelopt" in gguf.refusal(rows, (4, 64))
    assert not gguf.refusal(SCALED, (4, 64)) and not gguf.refusal(PLAIN, (4, 64))
    assert not gguf.refusal(SCALED, (0, 64))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_inputs_multiply_in_gguf(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """llama.cpp's converter inverts compressed-tensors', too (docs/nvfp4.md)."""
    scale = PackedTensor(
        DENSE["f32"], shape, {"values": np.full(DENSE["f32"].shapes(*matrix(shape))["values"], 8, F32)}
    )
    tensors = {"a.weight": packed((4, 64)), "a.input_global_scale": scale, "b.input_global_scale": scale}
    with checkpoint.open(write(tmp_path / "m.gguf", tensors)) as model:
        assert list(model) == ["a.weight", "a.input_scale", "b.input_global_scale"]  # b is no NVFP4
        assert model["a.input_scale"].decode().reshape(-1).tolist() == [0.125]
        assert model["b.input_global_scale"].decode().reshape(-1).tolist() == [8]
    assert "a.input_scale: stands there with .input_global_scale, too" in refusal(**tensors, **{"a.input_scale": scale})


# ---------------------------------------------------------------- what others write


def test_a_scale_beside_or_none_tells_the_layout(tmp_path: Path) -> None:
    scaled, plain, whole = packed((4, 128), 0.25), packed((4, 128), None, 1), packed((2, 64), None, 2)
    path = made_by_gguf(
        tmp_path / "m.gguf",
        **{"blk.0.a": (scaled, np.array([0.25], F32)), "blk.0.b": (plain, None), "blk.0.c": (whole, None)},
    )
    with checkpoint.open(path) as model:
        assert list(model) == ["blk.0.a.weight", "blk.0.b.weight", "blk.0.c.weight"]
        assert same(model["blk.0.a.weight"], scaled)
        assert same(model["blk.0.b.weight"], plain)
        assert model.index["blk.0.a.weight"].nbytes == 4 * 2 * 36 + 4


def test_a_tensor_that_is_not_called_weight_has_its_scale_behind_its_name(tmp_path: Path) -> None:
    tensor = packed((4, 128), 2.0)
    scale = ("experts.scale", (1,), 0, struct.pack("<f", 2.0))
    path = foreign(tmp_path / "m.gguf", ("experts", (4, 128), NUMBER, blocks_of(tensor)), scale, NEXT)
    with checkpoint.open(path) as model:
        assert same(model["experts"], tensor)


def test_input_scales_are_tensors_of_their_own(tmp_path: Path) -> None:
    scale = ("a.input_scale", (1,), 0, struct.pack("<f", 2.0))
    path = foreign(tmp_path / "m.gguf", ("a.weight", (4, 128), NUMBER, blocks_of(packed((4, 128)))), scale, NEXT)
    with checkpoint.open(path) as model:
        assert model.index["a.weight"].layout == PLAIN
        assert model["a.input_scale"].decode().tolist() == [2.0]


@pytest.mark.parametrize(
    ("shape", "scale", "number", "why"),
    [
        ((3, 2, 64), (2,), 0, r"is \[2\] of ggml type 0, needs 1 or 3 F32"),
        ((4, 64), (4,), 0, r"is \[4\] of ggml type 0, needs 1 F32"),
        ((3, 2, 2, 64), (3,), 0, r"is \[3\] of ggml type 0, needs 1 F32"),
        ((3, 0, 64), (3,), 0, "has a scale of its own for each expert, which no layout has for 3"),
        ((10000, 1, 64), (10000,), 0, "has a scale of its own for each expert, which no layout has for 10000"),
        ((4, 64), (1,), 1, r"is \[1\] of ggml type 1, needs 1 F32"),
    ],
)
def test_other_scales_are_said_not_guessed(
    tmp_path: Path, shape: tuple[int, ...], scale: tuple[int, ...], number: int, why: str
) -> None:
    raw = np.arange(scale[0]).astype("<f4" if number == 0 else "<f2").tobytes()
    weight = ("a.weight", shape, NUMBER, bytes(prod(shape) // 64 * 36))
    path = foreign(tmp_path / "m.gguf", weight, ("a.scale", scale, number, raw), NEXT)
    with checkpoint.open(path) as model:
        assert model.index["a.weight"].layout is None
        with pytest.raises(ContainerError, match=f"a.weight: is NVFP4, and a.scale beside it {why}"):
            model["a.weight"]
        with pytest.raises(PlanError, match=f"and a.scale beside it {why}"):
            conversion.plan_for(model, tmp_path / "out", Recipe("keep"))
        assert len(model["a.scale"].decode()) == scale[0]  # nothing took it


@pytest.mark.parametrize("count", [1, 3])
def test_a_stack_of_experts_has_one_scale_for_all_however_often_it_stands_there(tmp_path: Path, count: int) -> None:
    tensor = packed((3, 2, 64), 0.25)
    path = made_by_gguf(tmp_path / "m.gguf", a=(tensor, np.full(count, 0.25, F32)))
    with checkpoint.open(path) as model:
        assert same(model["a.weight"], tensor)
        assert model.index["a.weight"].nbytes == 3 * 2 * 36 + 4 * count
    conversion.convert(path, tmp_path / "n.gguf", "keep", check=True)
    scale = {t.name: t for t in GGUFReader(tmp_path / "n.gguf").tensors}["a.scale"]
    assert scale.data.tolist() == [0.25] * 3


def test_a_table_of_tokens_gets_no_scale_that_llama_cpp_refuses(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": normal(64, 64), "blk.0.ffn_up.weight": normal(64, 64)}
    source = folder(tmp_path / "model", tensors)
    why = r"token_embd\.weight: llama\.cpp refuses a scale beside .*; say --map 'token_embd\\.weight=nvfp4_plain'"
    with pytest.raises(PlanError, match=why):
        conversion.convert(source, tmp_path / "m.gguf", "nvfp4")
    overrides = {r"token_embd\.weight": "nvfp4_plain"}
    conversion.convert(source, tmp_path / "m.gguf", "nvfp4", overrides=overrides, check=True)
    names = [t.name for t in GGUFReader(tmp_path / "m.gguf").tensors]
    assert sorted(names) == ["blk.0.ffn_up.scale", "blk.0.ffn_up.weight", "token_embd.weight"]


def test_the_user_may_say_what_the_type_is(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.gguf", ("a.weight", (1, 64), NUMBER, GOLDEN), NEXT)
    with pytest.raises(ContainerError, match="without a scale"):
        checkpoint.open(path, read_as={"NVFP4": "nvfp4"})
    with checkpoint.open(path, read_as={"NVFP4": "nvfp4_plain"}) as model:
        assert blocks_of(model["a.weight"]) == GOLDEN


@pytest.mark.parametrize("numbers", [(0.25, 0.25, 0.25), (0.25, 0.5, 1)])
@given(data=st.data())
def test_any_change_to_the_header_gives_an_error_or_an_index(
    tmp_path_factory: Any, numbers: tuple[float, ...], data: st.DataObject
) -> None:
    tensor = packed((3, 2, 64), 0.25)
    scale = ("a.scale", (3,), 0, np.array(numbers, F32).tobytes())
    path = foreign(
        tmp_path_factory.mktemp("any") / "m.gguf", ("a.weight", (3, 2, 64), NUMBER, blocks_of(tensor)), scale
    )
    raw = bytearray(path.read_bytes())
    head = len(raw) - 256 - 32
    for at in data.draw(st.lists(st.integers(24, head - 1), min_size=1, max_size=3)):
        raw[at] = data.draw(st.sampled_from([0, 1, 3, 40, 127, 128, 255]))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 24, head + 10]))])
    try:
        model = checkpoint.open(path)
    except ContainerError as error:
        assert str(error).startswith(f"{path}: ")
        return
    with model:
        for name, info in model.index.items():
            assert info.layout is None or model[name].shape == info.shape


# ---------------------------------------------------------------- a scale for each expert

STACK = (3, 2, 128)
OWN = (0.25, 0.3, -7.0)


def test_scales_that_differ_are_those_of_experts(tmp_path: Path) -> None:
    tensor = experts(STACK, *OWN)
    path = made_by_gguf(tmp_path / "m.gguf", a=(tensor, np.array(OWN, F32)), b=(packed((2, 64)), np.array([0.5], F32)))
    with checkpoint.open(path) as model:
        assert list(model) == ["a.weight", "b.weight"]
        assert same(model["a.weight"], tensor)
        assert model.index["a.weight"].nbytes == 3 * 2 * 2 * 36 + 3 * 4
        assert model.index["b.weight"].layout == SCALED


def test_every_expert_decodes_as_an_nvfp4_of_its_own(tmp_path: Path) -> None:
    tensor = experts(STACK, *OWN)
    path = made_by_gguf(tmp_path / "m.gguf", a=(tensor, np.array(OWN, F32)))
    with checkpoint.open(path) as model:
        found = model["a.weight"].decode()
    each = tensor.components["blocks"].reshape(3, 2, -1)
    for expert, number in enumerate(OWN):
        alone = PackedTensor(SCALED, STACK[1:], {"blocks": each[expert], "scale": np.array([number], F32)})
        assert found[expert].tobytes() == alone.decode().tobytes()


def test_gguf_reads_the_scales_of_experts_once_each(tmp_path: Path) -> None:
    numbers = (0.5, 2.0, 0.125)  # powers of two: it rounds nothing that they are multiplied with afterwards
    tensor = experts(STACK, *numbers)
    found = {t.name: t for t in GGUFReader(write(tmp_path / "m.gguf", {"a.weight": tensor})).tensors}
    assert list(found) == ["a.weight", "a.scale"]
    blocks, scale = found["a.weight"], found["a.scale"]
    assert (blocks.tensor_type.name, blocks.shape.tolist()) == ("NVFP4", [128, 2, 3])
    assert blocks.data.tobytes() == blocks_of(tensor)
    assert (scale.tensor_type.name, scale.shape.tolist(), scale.data.tolist()) == ("F32", [3], list(numbers))
    theirs = quants.dequantize(np.array(blocks.data), blocks.tensor_type).reshape(STACK) * scale.data[:, None, None]
    assert (tensor.decode() + F32(0)).tobytes() == (theirs + F32(0)).tobytes()


@pytest.mark.parametrize("numbers", [OWN, (0.25, 0.25, 0.25)])
def test_what_is_written_of_experts_is_read_the_same_even_if_their_scales_are_equal(
    tmp_path: Path, numbers: tuple[float, ...]
) -> None:
    """packfmt's own record says which layout it was."""
    tensors = {"a.weight": experts(STACK, *numbers), "b": experts((1, 4, 64), 2.0, seed=1), "c": experts(STACK, 3.0)}
    with checkpoint.open(write(tmp_path / "m.gguf", tensors)) as model:
        assert list(model) == list(tensors)
        for name, tensor in tensors.items():
            assert same(model[name], tensor), name


def test_keep_changes_no_byte_of_a_foreign_file_of_experts(tmp_path: Path) -> None:
    path = made_by_gguf(tmp_path / "m.gguf", a=(experts(STACK, *OWN), np.array(OWN, F32)))
    paths = [path, *(tmp_path / name for name in ("one.gguf", "folder", "two.gguf"))]
    for source, target in pairwise(paths):
        conversion.convert(source, target, "keep", check=True)
    for again in (paths[1], paths[3]):
        before, after = ({t.name: t.data.tobytes() for t in GGUFReader(p).tensors} for p in (path, again))
        assert before == after and list(after) == ["a.weight", "a.scale"]
    with checkpoint.open(paths[2]) as model:
        assert same(model["a.weight"], experts(STACK, *OWN))


def test_experts_are_encoded_one_by_one(tmp_path: Path) -> None:
    weight = normal(3, 32, 128) * np.array([1, 8, 0.01], F32)[:, None, None]
    source = folder(tmp_path / "model", {"blk.0.experts.up": weight, "blk.0.up.weight": normal(96, 128)})
    with pytest.raises(PlanError, match=r"blk\.0\.up\.weight: .*3 scales, but \[96, 128\] is no stack .*; say nvfp4$"):
        conversion.convert(source, tmp_path / "m.gguf", "nvfp4_x3")
    conversion.convert(source, tmp_path / "m.gguf", "nvfp4", overrides={"experts": "nvfp4_x3"}, check=True)
    with checkpoint.open(tmp_path / "m.gguf") as model:
        found = model["blk.0.experts.up"].components
    each = [codecs.get("nvfp4").encode(one).components for one in weight]
    assert found["blocks"].tobytes() == b"".join(one["blocks"].tobytes() for one in each)
    assert found["scale"].tobytes() == b"".join(one["scale"].tobytes() for one in each)
    assert len(set(found["scale"].tolist())) == 3


@pytest.mark.parametrize(
    ("count", "shape", "why"),
    [
        (3, (6, 3, 64), "has 3 scales, but [6, 3, 64] is no stack of 3 experts; say nvfp4_x6"),
        (6, (3, 6, 64), "has 6 scales, but [3, 6, 64] is no stack of 6 experts; say nvfp4_x3"),
        (3, (6, 64), "has 3 scales, but [6, 64] is no stack of 3 experts; say nvfp4"),
        (6, (2, 3, 2, 64), "has 6 scales, but [2, 3, 2, 64] is no stack of 6 experts; say nvfp4"),
        (3, (3, 2, 64), ""),
        (1, (4, 64), ""),
        (1, (3, 2, 64), ""),  # one number, which is said three times
    ],
)
def test_a_scale_for_each_expert_needs_as_many_experts(
    tmp_path: Path, count: int, shape: tuple[int, ...], why: str
) -> None:
    layout = codecs.get(f"nvfp4_x{count}").layout
    assert gguf.refusal(layout, shape) == (why and f"{layout.name}: {why}")
    components = {"blocks": packed(shape).components["blocks"], "scale": np.ones(count, F32)}
    tensor = PackedTensor(layout, shape, components)
    if why:
        with pytest.raises(PlanError, match=f"a.weight: {layout.name}: {re.escape(why)}"):
            write(tmp_path / "m.gguf", {"a.weight": tensor})
        assert not list(tmp_path.iterdir())
    else:
        with checkpoint.open(write(tmp_path / "m.gguf", {"a.weight": tensor})) as model:
            assert same(model["a.weight"], tensor)


def test_a_changed_scale_of_one_expert_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a.weight": experts(STACK, *OWN)})
    raw, number = path.read_bytes(), struct.pack("<f", OWN[1])
    assert raw.count(number) == 1
    path.write_bytes(raw.replace(number, struct.pack("<f", 0.25)))
    with checkpoint.open(path) as model, pytest.raises(ContainerError, match=r"a\.weight: its bytes are not") as caught:
        model["a.weight"]
    assert caught.value.rule == "PF109"


@pytest.mark.parametrize("numbers", [(0.25,), (0.25, 0.25, 0.25), OWN])
def test_the_user_may_say_that_experts_have_scales_of_their_own(tmp_path: Path, numbers: tuple[float, ...]) -> None:
    path = made_by_gguf(tmp_path / "m.gguf", a=(packed(STACK), np.array(numbers, F32)))
    with checkpoint.open(path, read_as={"NVFP4": "nvfp4_x3"}) as model:
        assert same(model["a.weight"], experts(STACK, *(numbers * 3)[:3]))


def test_a_layout_asked_for_that_cannot_have_these_scales_is_refused(tmp_path: Path) -> None:
    path = made_by_gguf(tmp_path / "m.gguf", a=(packed(STACK), np.array(OWN, F32)))
    with checkpoint.open(path, read_as={"NVFP4": "nvfp4"}) as model:
        why = "a.scale beside it has a scale of its own for each expert, nvfp4 has one for all"
        with pytest.raises(PlanError, match=why):
            conversion.plan_for(model, tmp_path / "out", Recipe("keep"))
        with pytest.raises(ContainerError, match=why):
            model["a.weight"]
    with pytest.raises(ContainerError, match=r"has 2 scales, but \[3, 2, 128\] is no stack of 2 experts") as caught:
        checkpoint.open(path, read_as={"NVFP4": "nvfp4_x2"})
    assert caught.value.rule == "PF106"
    with checkpoint.open(path, read_as={"NVFP4": "nvfp4_plain"}) as model:
        assert model.index["a.weight"].layout == PLAIN
        assert model["a.scale"].decode().tolist() == np.array(OWN, F32).tolist()


def test_scales_that_are_not_in_the_file_are_not_read(tmp_path: Path) -> None:
    stack = ("a.weight", STACK, NUMBER, blocks_of(packed(STACK)))
    path = foreign(tmp_path / "short.gguf", stack, ("a.scale", (3,), 0, np.array(OWN, F32).tobytes()), padded=False)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ContainerError, match="616 bytes, its tensors need 620; truncated"):
        checkpoint.open(path)
    many = 1 << 40  # more than there can be: nothing of this size is looked at
    path = foreign(tmp_path / "many.gguf", ("a.weight", (many, 1, 64), NUMBER, b""), ("a.scale", (many,), 0, b""))
    with pytest.raises(ContainerError, match=r"a\.(weight|scale)"):
        checkpoint.open(path)


def test_more_scales_than_are_looked_at_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "MOST_EXPERTS", 2)
    path = made_by_gguf(tmp_path / "m.gguf", a=(packed(STACK), np.array(OWN, F32)))
    with checkpoint.open(path) as model:
        assert model.index["a.weight"].why == "and a.scale beside it has 3 scales, of which at most 2 are read"


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("layout", ["nvfp4", "nvfp4_plain"])
def test_a_model_goes_to_gguf_and_back_without_a_changed_byte(tmp_path: Path, layout: str) -> None:
    source = folder(tmp_path / "model", {"a.weight": normal(64, 256), "b.weight": normal(128, 64), "c": normal(64)})
    paths = [tmp_path / name for name in ("one.gguf", "packed", "two.gguf")]
    conversion.convert(source, paths[0], layout, check=True)
    conversion.convert(paths[0], paths[1], "keep", check=True)
    conversion.convert(paths[1], paths[2], "keep", check=True)
    one, two = (checkpoint.open(path) for path in (paths[0], paths[2]))
    with one, two:
        assert list(one) == list(two) == ["a.weight", "b.weight", "c"]
        assert {one.index[name].layout for name in ("a.weight", "b.weight")} == {codecs.get(layout).layout}
        for name in one:
            assert same(one[name], two[name])
    tensors = ({t.name: t.data.tobytes() for t in GGUFReader(path).tensors} for path in (paths[0], paths[2]))
    assert next(tensors) == next(tensors)


def test_a_foreign_file_keeps_its_bytes(tmp_path: Path) -> None:
    tensor = packed((4, 128), 0.3)
    path = made_by_gguf(tmp_path / "m.gguf", a=(tensor, np.array([0.3], F32)), b=(packed((2, 64), None), None))
    conversion.convert(path, tmp_path / "n.gguf", "keep", check=True)
    before, after = ({t.name: t.data.tobytes() for t in GGUFReader(p).tensors} for p in (path, tmp_path / "n.gguf"))
    assert before == after and list(after) == ["a.weight", "a.scale", "b.weight"]
