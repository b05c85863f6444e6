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
from packfmt.layout import DENSE, Codes, Layout, Values, blocks, cols, dtype_of, grid
from packfmt.plan import Plan, Step

# Block sizes as ggml has them; what is inside a block is not this container's business.
Q4_0 = blocks(
    "q4_0", 32, Values("scale", "<f2"), Codes("codes", 4, (cols(1, 16),), (cols(16, 2),)),
    grid=grid("affine", zero=8), also=(("gguf", "Q4_0"),),
)  # fmt: skip
Q8_0 = blocks(
    "q8_0", 32, Values("scale", "<f2"), Values("codes", "i1", (cols(1, 32),)),
    grid=grid("affine", zero=0), also=(("gguf", "Q8_0"),),
)  # fmt: skip
MXFP4 = blocks(
    "mxfp4", 32, Values("scale", "float8_e8m0fnu"), Codes("codes", 4, (cols(1, 16),), (cols(16, 2),)),
    grid=grid("affine", zero=0), also=(("gguf", "MXFP4"),),
)  # fmt: skip
PACKED = (Q4_0, Q8_0, MXFP4)
DENSES = tuple(DENSE[name] for name in ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64"))
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


def resolve(container: str, kind: str) -> Layout | None:
    return next((layout for layout in PACKED if (container, kind) in layout.also), None)


def nothing(container: str, kind: str) -> Layout | None:
    return None


def tensor_of(layout: Layout, shape: tuple[int, ...], seed: int = 0, dtype: str = "") -> PackedTensor:
    """A packed tensor of random bytes."""
    rng = np.random.default_rng(seed)
    (placed,) = layout.fit(math.prod(shape[:-1]), shape[-1] if shape else 1).components
    raw = rng.integers(0, 256, placed.nbytes, np.uint8)
    own = dtype_of(placed.dtype).name if layout in DENSES else "float32"
    return PackedTensor(
        layout, shape, {placed.name: raw.view(dtype_of(placed.dtype)).reshape(placed.shape)}, dtype or own
    )


def plan_of(tensors: dict[str, PackedTensor], source: str = "a/model") -> Plan:
    steps = tuple(Step(name, t.shape, t.dtype, t.layout, t.layout, "keep", "") for name, t in tensors.items())
    return Plan(source, "gguf", steps)


def write(path: Path, tensors: dict[str, PackedTensor], extras: Extras | None = None) -> Path:
    gguf.write(path, plan_of(tensors), tensors.values(), extras or Extras())
    return path


def stored(tensor: PackedTensor) -> bytes:
    (array,) = tensor.components.values()
    return array.tobytes()


def model() -> dict[str, PackedTensor]:
    return {
        "embed.weight": tensor_of(Q8_0, (6, 64), 1, "bfloat16"),
        "layers.0.experts": tensor_of(Q4_0, (2, 3, 96), 2),
        "layers.0.mlp": tensor_of(MXFP4, (5, 32), 3),
        **{f"dense.{layout.name}": tensor_of(layout, (3, 5), i) for i, layout in enumerate(DENSES)},
        "norm.weight": tensor_of(DENSE["f32"], (7,), 4),
        "packed.row": tensor_of(Q8_0, (64,), 5),
        "step": tensor_of(DENSE["i64"], (), 6),
        "conv": tensor_of(DENSE["f16"], (2, 1, 3, 4), 7),
        "none": tensor_of(DENSE["f32"], (0, 4), 8),
    }


def same(a: PackedTensor, b: PackedTensor) -> bool:
    return (a.layout, a.shape, a.dtype, stored(a)) == (b.layout, b.shape, b.dtype, stored(b))


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
        gguf.write(path, Plan("m", "gguf", (step,)), [packed], Extras(keyvalues=carried))
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
    gguf.write(tmp_path / "m.gguf", Plan("m", "gguf", steps), stream(), Extras())
    assert len(before) == 4


# ---------------------------------------------------------------- refusals


def test_what_gguf_cannot_hold_is_refused() -> None:
    assert "no type for u8; its types are F32, F16, Q4_0" in gguf.refusal(DENSE["u8"], (2, 3))
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
            gguf.write(tmp_path / "m.gguf", plan, tensors, Extras())
    for steps, message in (
        ((plan.steps[0],) * 2, "a: planned twice"),
        (plan_of({"w" * 64: a}).steps, "a name of 64 bytes"),
        (plan_of({"a": tensor_of(DENSE["u8"], (2,))}).steps, "a: GGUF has no type for u8"),
    ):
        with pytest.raises(PlanError, match=message):
            gguf.write(tmp_path / "m.gguf", Plan("m", "gguf", steps), [a, a], Extras())
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


# ---------------------------------------------------------------- damage


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: str, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", gguf_header.KINDS.index(kind)) + raw


def entry(name: str | bytes = "w", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def built(pairs: list[bytes], entries: list[bytes], data: int = 32, n: tuple[int, int] | None = None) -> bytes:
    n_entries, n_pairs = n or (len(entries), len(pairs))
    raw = b"GGUF" + struct.pack("<IQQ", 3, n_entries, n_pairs) + b"".join((*pairs, *entries))
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + bytes(data)


def number(n: int) -> bytes:
    return struct.pack("<I", n)


def array(item: str, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", gguf_header.KINDS.index(item), count) + raw


NESTED = array("ARRAY", 1)  # an array of one array
GOOD = built([pair("k", "STRING", text("v"))], [entry()])
ALIGNMENT = "general.alignment"

DAMAGED = {
    "empty": (b"", "PF100", "begins with b''"),
    "another kind of file": (b"PK\3\4" + bytes(60), "PF100", "begins with"),
    "a pointer": (LFS_POINTER, "PF100", "Git LFS pointer"),
    "version 1": (GOOD.replace(b"GGUF\3", b"GGUF\1"), "PF100", "version 1, needs 2 or 3"),
    "version 4": (GOOD.replace(b"GGUF\3", b"GGUF\4"), "PF100", "version 4, needs 2 or 3"),
    "big-endian": (b"GGUF\0\0\0\3" + GOOD[8:], "PF100", "big-endian"),
    "magic alone": (b"GG", "PF101", "truncated"),
    "no counts": (GOOD[:20], "PF101", "truncated"),
    "too many tensors": (built([], [entry()], n=(9, 0)), "PF101", "9 tensors"),
    "absurdly many tensors": (built([], [entry()], n=(2**63, 0)), "PF102", "tensors"),
    "absurdly many keys": (built([], [], n=(0, 2**64 - 1)), "PF102", "key-values"),
    "a text beyond the file": (built([text("k") + number(8) + struct.pack("<Q", 999)], []), "PF101", "key 'k'"),
    "a text of absurd length": (built([text("k") + number(8) + struct.pack("<Q", 2**64 - 1)], []), "PF102", "key 'k'"),
    "an array of absurd length": (built([pair("k", "ARRAY", array("UINT64", 2**62))], []), "PF102", "key 'k'"),
    "an array beyond the file": (built([pair("k", "ARRAY", array("UINT16", 999))], []), "PF101", "key 'k'"),
    "texts beyond the file": (built([pair("k", "ARRAY", array("STRING", 9))], []), "PF101", "key 'k'"),
    "a value type that is none": (built([text("k") + number(13)], [], 64), "PF102", "value type 13"),
    "an item type that is none": (built([text("k") + number(9) + number(99)], [], 64), "PF102", "value type 99"),
    "arrays too deep": (built([pair("k", "ARRAY", NESTED * 5)], [], 64), "PF102", "more than 4 deep"),
    "arrays of arrays beyond the file": (built([pair("k", "ARRAY", array("ARRAY", 99))], []), "PF101", "key 'k'"),
    "unlike arrays": (
        built([pair("k", "ARRAY", array("ARRAY", 2, array("INT8", 0) + array("BOOL", 0)))], []), "PF102", "unlike"
    ),
    "a bool that is none": (built([pair("k", "BOOL", b"\2")], []), "PF102", "BOOL of 2"),
    "an empty key": (built([pair("", "BOOL", b"\1")], []), "PF102", "key 0 is empty"),
    "a key not in UTF-8": (built([pair(b"\xff", "BOOL", b"\1")], []), "PF103", "key 0 is not UTF-8"),
    "a value not in UTF-8": (built([pair("k", "STRING", text(b"a\xc3"))], []), "PF103", "key 'k'"),
    "a token not in UTF-8": (
        built([pair("k", "ARRAY", array("STRING", 2, text("a") + text(b"\x80")))], []), "PF103", "text 1 is not"
    ),
    "a name not in UTF-8": (built([], [entry(b"\xfe")]), "PF103", "name of tensor 0"),
    "a name that moves the cursor": (built([], [entry("w\x1b[2J")]), "PF102", "can be printed"),
    "a tensor without a name": (built([], [entry("")]), "PF102", "called ''"),
    "a key twice": (built([pair("k", "BOOL", b"\1")] * 2, []), "PF104", "'k' stands twice"),
    "a name twice": (built([], [entry(), entry(offset=32)], 64), "PF104", "called 'w'"),
    "an unknown tensor type": (built([], [entry(kind=200)]), "PF105", "w: ggml type 200"),
    "a tensor type long gone": (built([], [entry(kind=4)]), "PF105", "w: ggml type 4"),
    "five dimensions": (built([], [entry(dims=(8, 1, 1, 1, 1))]), "PF106", "w: 5 dimensions"),
    "2**32 - 1 dimensions": (built([], [text("w") + number(2**32 - 1) + bytes(12)]), "PF106", "dimensions"),
    "a negative dimension": (built([], [entry(dims=(2**64 - 1, 0))]), "PF106", "needs fewer than 2**63"),
    "dimensions that overflow": (built([], [entry(dims=(2**32, 2**32))]), "PF106", "needs fewer than 2**63"),
    "columns that fill no block": (built([], [entry(dims=(48,), kind=8)], 64), "PF106", "48 columns, Q8_0"),
    "more columns than a layout takes": (built([], [entry(dims=(2**50, 0))], 0), "PF106", "w: f32"),
    "an alignment of 0": (built([pair(ALIGNMENT, "UINT32", number(0))], []), "PF102", ALIGNMENT),
    "an alignment of 48": (built([pair(ALIGNMENT, "UINT32", number(48))], []), "PF102", ALIGNMENT),
    "an absurd alignment": (built([pair(ALIGNMENT, "UINT32", number(2**31))], []), "PF102", ALIGNMENT),
    "an alignment of another type": (built([pair(ALIGNMENT, "UINT8", b"\40")], []), "PF102", ALIGNMENT),
    "an unaligned offset": (built([], [entry(dims=(4,)), entry("v", (4,), 0, 16)]), "PF107", "v: at offset 16"),
    "overlapping tensors": (built([], [entry(), entry("v")], 64), "PF107", "v: begins 32 bytes before w"),
    "half overlapping tensors": (built([], [entry(dims=(16,)), entry("v", (8,), 0, 32)], 96), "PF107", "before w"),
    "a gap": (built([], [entry(offset=32)], 64), "PF107", "w: begins 32 bytes after the header"),
    "an offset beyond the file": (built([], [entry(offset=2**63)]), "PF107", "bytes beyond the file"),
    "too little data": (built([], [entry()], 31), "PF101", "truncated"),
    "a dimension too large": (built([], [entry(dims=(2**40,))]), "PF101", "truncated"),
    "too much data": (built([], [entry()], 33), "PF108", "1 bytes after the last tensor"),
    "data of no tensor": (built([], [], 1), "PF108", "1 bytes after"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    raw, rule, message = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ContainerError) as caught:
        gguf.open(path, resolve)
    assert str(caught.value).startswith(f"{path}: ")
    assert (caught.value.rule, message in str(caught.value)) == (rule, True), caught.value


def test_what_damage_is_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(GOOD)
    source = gguf.open(tmp_path / "good.gguf", resolve)
    assert source.extras.keyvalues == {"k": KeyValue("STRING", "v")}
    assert stored(source.read("w")) == bytes(32)
    source.close()


def test_version_2_and_a_last_tensor_without_padding_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(built([], [entry(dims=(4,))], 16).replace(b"GGUF\3", b"GGUF\2"))
    source = gguf.open(path, resolve)
    assert source.read("w").components["values"].tolist() == [[0.0] * 4]
    source.close()


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """The file with one text in it replaced by another of the same length."""
    raw = path.read_bytes()
    assert raw.count(old) >= 1
    assert len(old) == len(new)
    path.write_bytes(raw.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "rule", "message"),
    [
        (b'"type":"Q8_0"', b'"type":"Q4_0"', "PF105", "another tool changed the tensor"),
        (b'"shape":[6,64]', b'"shape":[7,64]', "PF106", "embed.weight"),
        (b'"shape":[6,64]', b'"shape":[64,6]', "PF106", "embed.weight"),
        (b'"shape":[6,64]', b'"shape":[-6,4]', "PF106", "embed.weight"),
        (b'"shape":[6,64]', b'"shape":"6 64"', "PF112", "embed.weight"),
        (b'"dtype":"bfloat16"', b'"dtype":"float_16"', "PF112", "which is no dtype"),
        (b'"embed.weight":', b'"embed.we\\\\ht":', "PF110", "which is not in the file"),
        (b'"embed.weight":', b'"embed.\\ud800":', "PF112", "not JSON"),
        (b'{"embed.weight":{', b'{"embed.weight":[', "PF112", "packfmt.tensors: not JSON"),
        (b'"grid":{"name":"affine"', b'"grid":{"name":"affin3"', "PF111", "packfmt.layouts"),
        (b"packfmt.layouts", b"packfmt.layoutz", "PF112", "packfmt.layouts"),
        (b"packfmt.version\4\0\0\0\1", b"packfmt.version\4\0\0\0\2", "PF112", "packfmt.version is 2"),
    ],
)
def test_records_that_contradict_the_file_are_named(
    tmp_path: Path, old: bytes, new: bytes, rule: str, message: str
) -> None:
    path = write(tmp_path / "m.gguf", model())
    patched(path, old, new)
    with pytest.raises(ContainerError) as caught:
        gguf.open(path, resolve)
    assert str(caught.value).startswith(f"{path}: ")
    assert (caught.value.rule, message in str(caught.value)) == (rule, True), caught.value


def test_a_record_of_an_undescribed_layout_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"w": tensor_of(Q8_0, (2, 32))})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"id":"' + Q8_0.id.encode(), b'"id":"' + Q4_0.id.encode()))
    with pytest.raises(ContainerError, match="w: no description of layout 'q8_0'") as caught:
        gguf.open(path, resolve)
    assert caught.value.rule == "PF111"


def test_every_flipped_byte_of_a_tensor_is_found_and_the_tensor_named(tmp_path: Path) -> None:
    tensors = {"a": tensor_of(Q8_0, (1, 32)), "b": tensor_of(DENSE["bf16"], (3,))}
    path = write(tmp_path / "m.gguf", tensors)
    whole = path.read_bytes()
    for name, tensor in tensors.items():
        begin = whole.rindex(stored(tensor))
        for at in range(begin, begin + len(stored(tensor))):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            source = gguf.open(path, resolve)
            with pytest.raises(ContainerError, match=f"m.gguf: {name}: its bytes are not") as caught:
                source.read(name)
            source.close()
            assert caught.value.rule == "PF109"


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for whole in (GOOD, built([], [entry()])):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ContainerError) as caught:
                gguf.open(path, resolve)
            assert caught.value.rule == ("PF101" if length else "PF100")


def small_file(folder: Path) -> bytes:
    keys = {
        "general.architecture": KeyValue("STRING", "llama"),
        "tokens": KeyValue("ARRAY:STRING", ["a", "bc", ""]),
        "numbers": KeyValue("ARRAY:FLOAT32", [1.0, 2.0]),
        "nested": KeyValue("ARRAY:ARRAY:INT8", [[1], []]),
        "flag": KeyValue("BOOL", True),
    }
    tensors = {"w": tensor_of(Q4_0, (2, 32)), "norm": tensor_of(DENSE["f32"], (3,))}
    return write(folder / "small.gguf", tensors, Extras({"a": 1}, keyvalues=keys)).read_bytes()


@given(data=st.data())
def test_any_damage_gives_a_container_error_or_nothing(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(small_file(folder))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:  # a run of bytes at once reaches lengths and counts
            run = data.draw(st.binary(max_size=9))
            raw[at : at + len(run)] = run
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = folder / "damaged.gguf"
    path.write_bytes(raw)
    try:
        source = gguf.open(path, data.draw(st.sampled_from([resolve, nothing])))
    except ContainerError as error:
        assert str(error).startswith(f"{path}: ")
        return
    try:
        for name in source.index:
            source.read(name)
    except ContainerError as error:
        assert str(error).startswith(f"{path}: {name}: ")
    finally:
        source.close()


def test_a_long_header_is_read_in_pieces(tmp_path: Path) -> None:
    """Texts and numbers that lie across the ends of what is read at once."""
    size = gguf_header.FIRST_READ
    tokens = [f"token {i}" * (i % 7) for i in range(60_000)]
    keys = {
        "general.architecture": KeyValue("STRING", "x" * (size - 60)),
        "tokens": KeyValue("ARRAY:STRING", tokens),
        "scores": KeyValue("ARRAY:FLOAT64", [i / 3 for i in range(len(tokens))]),
    }
    path = write(tmp_path / "m.gguf", {}, Extras(keyvalues=keys))
    source = gguf.open(path, resolve)
    assert source.extras.keyvalues == keys
    source.close()
    assert path.stat().st_size > 2 * size
