"""GGUF: what we write, gguf reads; what gguf writes, we read; and damage gets one clear error."""

from __future__ import annotations

import json
import math
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

from packfmt import exporters
from packfmt.codec import PackedTensor
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import Extras, KeyValue, gguf, gguf_header
from packfmt.layout import DENSE, Codes, Layout, Values, blocks, cols, grid
from packfmt.plan import Plan, Step
from tests.gguf_tensors import (
    DENSES,
    PACKED,
    Q4_0,
    Q8_0,
    model,
    nothing,
    plan_of,
    resolve,
    same,
    stored,
    tensor_of,
    write,
)
from tests.outputs import save

# ---------------------------------------------------------------- with gguf's own reader and writer


def test_value_types_are_numbered_as_gguf_does() -> None:
    assert [GGUFValueType(i).name for i in range(len(GGUFValueType))] == list(gguf_header.KINDS)


def test_gguf_reads_what_we_wrote(tmp_path: Path) -> None:
    tensors = model()
    config = {"model_type": "bert", "hidden_size": 64}
    reader = GGUFReader(write(tmp_path / "m.gguf", tensors, Extras(config)))
    assert [t.name for t in reader.tensors] == list(tensors)
    for found in reader.tensors:
        tensor = tensors[found.name]
        kind = tensor.layout.name.upper()
        assert found.tensor_type.name == kind
        assert found.shape.tolist() == list(tensor.shape[::-1] or (1,))
        assert np.ascontiguousarray(found.data).tobytes() == stored(tensor)
        assert found.data_offset % 32 == 0
    fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields["general.architecture"] == "packfmt-bert"
    assert fields["general.name"] == "model"
    assert fields["general.quantization_version"] == 2
    assert json.loads(fields["packfmt.config"]) == config
    assert json.loads(fields["packfmt.tensors"])["embed.weight"]["dtype"] == "bfloat16"


def every_kind(writer: GGUFWriter) -> dict[str, KeyValue]:
    """Add a value and an array of every type; returns what they must be read as."""
    values: dict[str, list[Any]] = {
        "UINT8": [0, 255], "INT8": [-128, 127], "UINT16": [0, 65535], "INT16": [-32768, 32767],
        "UINT32": [0, 2**32 - 1], "INT32": [-(2**31), 2**31 - 1], "UINT64": [0, 2**64 - 1],
        "INT64": [-(2**63), 2**63 - 1], "FLOAT32": [1.5, -0.0, math.inf, 2.0**-149], "FLOAT64": [0.1, -1e300],
        "BOOL": [True, False], "STRING": ["", "a\nb\0c", "Grüße 模型 🙂"],
    }  # fmt: skip
    expected = {}
    for kind, several in values.items():
        for i, value in enumerate(several):
            writer.add_key_value(f"one.{kind}.{i}", value, GGUFValueType[kind])
            expected[f"one.{kind}.{i}"] = KeyValue(kind, value)
        writer.add_key_value(f"many.{kind}", several, GGUFValueType.ARRAY, GGUFValueType[kind])
        expected[f"many.{kind}"] = KeyValue(f"ARRAY:{kind}", several)
    writer.add_key_value("nested", [[1, 2], [3]], GGUFValueType.ARRAY)
    expected["nested"] = KeyValue("ARRAY:ARRAY:INT32", [[1, 2], [3]])
    return expected


def gguf_made(path: Path, alignment: int = 32) -> tuple[dict[str, KeyValue], dict[str, bytes]]:
    """A file by gguf's writer with all its value types and many tensor types; keys and bytes expected."""
    rng = np.random.default_rng(3)
    writer = GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    expected = every_kind(writer)
    data = {}
    for array in (np.ones((2, 3), "<f4"), np.ones((4, 2, 3), "<f2"), np.ones(5, "<f8"), np.ones((2, 3), "<i2")):
        name = f"dense.{array.dtype.name}"
        writer.add_tensor(name, array)
        data[name] = array.tobytes()
    bf16 = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    writer.add_tensor("dense.bfloat16", bf16.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
    data["dense.bfloat16"] = bf16.tobytes()
    for kind in GGMLQuantizationType:
        block, size = GGML_QUANT_SIZES[kind]
        if block > 1:
            raw = rng.integers(0, 256, (3, 2 * size), np.uint8)
            writer.add_tensor(f"packed.{kind.name}", raw, raw_dtype=kind)
            data[f"packed.{kind.name}"] = raw.tobytes()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected, data


@pytest.mark.parametrize("alignment", [32, 128])
def test_we_read_what_gguf_wrote(tmp_path: Path, alignment: int) -> None:
    expected, data = gguf_made(tmp_path / "g.gguf", alignment)
    source = gguf.open(tmp_path / "g.gguf", resolve)
    assert {key: source.extras.keyvalues[key] for key in expected} == expected
    assert source.extras.keyvalues["general.architecture"] == KeyValue("STRING", "llama")
    assert list(source.index) == list(data)
    assert source.index["dense.bfloat16"].dtype == "bfloat16"
    assert source.index["dense.float16"].shape == (4, 2, 3)
    for name, raw in data.items():
        info = source.index[name]
        assert info.nbytes == len(raw)
        if info.layout is not None:
            assert stored(source.read(name)) == raw
        else:
            assert info.shape == (3, 2 * GGML_QUANT_SIZES[GGMLQuantizationType[info.kind]][0])
            with pytest.raises(ContainerError, match=f"{name}: is {info.kind}") as caught:
                source.read(name)
            assert caught.value.rule == "PF105"
    assert {i.layout for i in source.index.values() if i.name.startswith("packed")} == {None, *PACKED}
    source.close()


@pytest.mark.parametrize("alignment", [32, 128])
def test_key_values_of_a_gguf_are_carried_over_byte_for_byte(tmp_path: Path, alignment: int) -> None:
    gguf_made(tmp_path / "g.gguf", alignment)
    source = gguf.open(tmp_path / "g.gguf", resolve)
    names = [name for name, info in source.index.items() if info.layout is not None]
    tensors = {name: source.read(name) for name in names}
    write(tmp_path / "again.gguf", tensors, source.extras)
    ours, theirs = (tmp_path / "again.gguf").read_bytes(), (tmp_path / "g.gguf").read_bytes()
    end = theirs.index(struct.pack("<Q", len("dense.float32")) + b"dense.float32")  # first tensor entry
    assert ours[24:end] == theirs[24:end]
    reader = GGUFReader(tmp_path / "again.gguf")
    assert reader.alignment == alignment
    assert all(np.ascontiguousarray(t.data).tobytes() == stored(tensors[t.name]) for t in reader.tensors)


def test_a_changed_layout_drops_the_file_type_and_old_keys_of_ours(tmp_path: Path) -> None:
    carried = {
        "general.architecture": KeyValue("STRING", "llama"),
        "general.file_type": KeyValue("UINT32", 7),
        "packfmt.tensors": KeyValue("STRING", "old"),
    }
    packed = tensor_of(Q4_0, (2, 32))
    for before, kept in ((Q8_0, False), (Q4_0, True)):
        path = tmp_path / f"{kept}.gguf"
        step = Step("w", packed.shape, "float32", before, Q4_0, "requantise", "")
        save(gguf, path, Plan("m", "gguf", (step,)), [packed], Extras(keyvalues=carried))
        source = gguf.open(path, resolve)
        assert ("general.file_type" in source.extras.keyvalues) is kept
        assert not any(key.startswith("packfmt.") for key in source.extras.keyvalues)
        assert source.extras.keyvalues["general.quantization_version"] == KeyValue("UINT32", 2)
        source.close()


# ---------------------------------------------------------------- with ourselves


def test_gguf_is_a_container() -> None:
    assert exporters.get("gguf").NAME == "gguf"


def test_everything_written_is_read_again(tmp_path: Path) -> None:
    tensors = model()
    config = {"model_type": "bert", "quantization_config": {"quant_method": "packfmt"}, "name": "Grüße"}
    source = gguf.open(write(tmp_path / "m.gguf", tensors, Extras(config)), resolve)
    assert list(source.index) == list(tensors)
    assert all(same(source.read(name), tensor) for name, tensor in tensors.items())
    assert {name: i.shape for name, i in source.index.items()} == {name: t.shape for name, t in tensors.items()}
    assert source.extras.config == {"model_type": "bert", "name": "Grüße"}
    assert source.index["layers.0.mlp"].kind == "MXFP4"
    source.close()


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, PackedTensor]:
    names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=15)
    out = {}
    for i, name in enumerate(draw(st.lists(names, max_size=6, unique=True))):
        layout = draw(st.sampled_from((*PACKED, *DENSES)))
        leading = draw(st.lists(st.integers(0, 3), max_size=3))
        columns = draw(st.integers(0, 3)) * layout.block["cols"]
        out[name] = tensor_of(layout, (*leading, columns), i)
    return out


@given(tensors=tensor_sets(), shift=st.sampled_from([None, 0, 3, 5, 12]))
def test_any_tensors_survive(tmp_path_factory: Any, tensors: dict[str, PackedTensor], shift: int | None) -> None:
    path = tmp_path_factory.mktemp("any") / "m.gguf"
    keys = {} if shift is None else {"general.alignment": KeyValue("UINT32", 1 << shift)}
    source = gguf.open(write(path, tensors, Extras(keyvalues=keys)), resolve)
    assert list(source.index) == list(tensors)
    assert all(same(source.read(name), tensor) for name, tensor in tensors.items())
    source.close()
    assert [np.ascontiguousarray(t.data).tobytes() for t in GGUFReader(path).tensors] == list(
        map(stored, tensors.values())
    )


def test_a_layout_that_nobody_here_knows_comes_from_the_file(tmp_path: Path) -> None:
    tensors = model()
    path = write(tmp_path / "m.gguf", tensors)
    source = gguf.open(path, nothing)
    assert all(same(source.read(name), tensor) for name, tensor in tensors.items())
    found = source.index["layers.0.mlp"].layout
    assert found is not None
    assert gguf.refusal(found, (1, 32)) == ""  # it can be written again
    source.close()


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    shapes = {f"w{i}": (4, 64) for i in range(4)}
    before: list[weakref.ref[Any]] = []

    def stream() -> Iterator[PackedTensor]:
        for _ in shapes:
            assert [r() for r in before] == [None] * len(before)
            tensor = tensor_of(Q8_0, (4, 64))
            before.append(weakref.ref(tensor.components["blocks"]))
            yield tensor
            del tensor

    steps = tuple(Step(name, shape, "float32", Q8_0, Q8_0, "keep", "") for name, shape in shapes.items())
    save(gguf, tmp_path / "m.gguf", Plan("m", "gguf", steps), stream(), Extras())
    assert len(before) == 4


# ---------------------------------------------------------------- refusals


def test_what_gguf_cannot_hold_is_refused() -> None:
    assert "no type for u8; packfmt formats says" in gguf.refusal(DENSE["u8"], (2, 3))
    assert "5 dimensions" in gguf.refusal(DENSE["f32"], (1, 1, 1, 1, 1))
    assert gguf.refusal(DENSE["bf16"], (1, 1, 1, 1)) == ""
    unlike = blocks(
        "toy", 32, Values("scale", "<f4"), Codes("codes", 4, (), (cols(1, 32),)), grid=grid("affine", zero=8)
    )
    assert "no type for toy" in gguf.refusal(unlike, (1, 32))
    for kind, reason in (("Q4_0", "32 weights take 20 bytes, Q4_0 18"), ("Q9_9", "knows no type 'Q9_9'")):
        claims = Layout("toy", unlike.components, unlike.grid, also=(("gguf", kind),))
        assert reason in gguf.refusal(claims, (1, 32))


def test_names_that_ggml_cannot_hold_are_refused() -> None:
    assert gguf.name_refusal("w" * 63) == ""
    assert "64 bytes" in gguf.name_refusal("w" * 64)
    assert "64 bytes" in gguf.name_refusal("é" * 32)
    assert all(gguf.name_refusal(name) for name in ("", "a\0b", "a\nb", "\ud800"))


def test_a_tensor_that_is_not_its_steps_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    a, b, dense = tensor_of(Q8_0, (2, 64)), tensor_of(Q8_0, (4, 32)), tensor_of(DENSE["f32"], (2, 64))
    plan = plan_of({"a": a, "b": b})
    for tensors, message in (
        ([b, a], r"a: got q8_0 \(4, 32\), planned q8_0 \(2, 64\)"),
        ([dense, b], r"a: got f32"),
        ([a], r"b: got nothing"),
        ([a, b, b], r"more tensors than the 2 planned"),
    ):
        with pytest.raises(PlanError, match=message):
            save(gguf, tmp_path / "m.gguf", plan, tensors, Extras())
    for steps, message in (
        ((plan.steps[0],) * 2, "a: planned twice"),
        (plan_of({"w" * 64: a}).steps, "a name of 64 bytes"),
        (plan_of({"a": tensor_of(DENSE["u8"], (2,))}).steps, "a: GGUF has no type for u8"),
    ):
        with pytest.raises(PlanError, match=message):
            save(gguf, tmp_path / "m.gguf", Plan("m", "gguf", steps), [a, a], Extras())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "keyvalue"),
    [
        ("k", KeyValue("UINT8", 256)),
        ("k", KeyValue("UINT8", "1")),
        ("k", KeyValue("BOOL", 1)),
        ("k", KeyValue("FLOAT32", 1e39)),
        ("k", KeyValue("STRING", 1)),
        ("k", KeyValue("STRING", "\ud800")),
        ("k", KeyValue("ARRAY:STRING", [1])),
        ("k", KeyValue("ARRAY:INT8", 1)),
        ("k", KeyValue("ARRAY", [])),
        ("k", KeyValue("TEXT", "a")),
        ("", KeyValue("STRING", "a")),
        ("general.alignment", KeyValue("UINT32", 48)),
        ("general.alignment", KeyValue("UINT64", 32)),
    ],
)
def test_a_value_that_is_not_of_its_type_is_refused(tmp_path: Path, key: str, keyvalue: KeyValue) -> None:
    with pytest.raises(PlanError, match=key or "without a key"):
        write(tmp_path / "m.gguf", {}, Extras(keyvalues={key: keyvalue}))
    assert list(tmp_path.iterdir()) == []
