"""What all folders of other ecosystems share: a dialect is data, and files are checked against it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from packfmt import checkpoint, codecs, conversion, exporters
from packfmt.codec import PackedTensor
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import Extras, folder, safetensors_header
from packfmt.exporters.folder import DIVIDES, MULTIPLIES, Activation, Dialect, Form, Found, Stored
from packfmt.layout import DENSE, Layout
from packfmt.plan import Plan, Recipe, Step
from tests import models
from tests.models import BF16, PAIRS, normal
from tests.outputs import save

F32 = np.float32
TOYS = replace(PAIRS, sources=("a test",))  # q4_0's numbers, scales apart
FORM = Form(
    {"packed": Stored(".codes", ("F4", "U8")), "scales": Stored(".steps")},
    ".weight",
    {".size": lambda shape: np.array(shape, np.int64)},
    MULTIPLIES,
)


def toy_find(says: Mapping[str, Any], tensors: folder.Tensors, read: folder.Read) -> Iterator[Found]:
    for name, info in tensors.items():
        if name.endswith(".codes"):
            cols = info.shape[-1] * (1 if info.kind == "F4" else 2)
            choices = [(layout, (*info.shape[:-1], cols)) for layout in says.get("layouts", ["toy"])]
            yield Found(name.removesuffix(".codes") + ".weight", "toy codes", tuple(choices))


def toy_form(layout: Layout) -> Form | None:
    return FORM if layout.name == TOYS.name else None


def toy_says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    return {"quant_method": "toy", "dense": folder.stay_dense(steps)}


TOY = Dialect(
    NAME="toy",
    title="the toy",
    holds="q4_0_pairs",
    form=toy_form,
    find=toy_find,
    says=toy_says,
    files=lambda steps, extras: {"more.json": [s.name for s in steps]},
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Dialect:
    """The toy, known by its quant_method."""
    monkeypatch.setitem(exporters.METHODS, "toy", "toy")
    monkeypatch.setattr(folder, "dialect", {"toy": TOY}.__getitem__)
    known = checkpoint.foreign_layout
    layouts = {("toy", "toy"): TOYS, ("toy", "q8_0"): codecs.get("q8_0").layout}
    monkeypatch.setattr(checkpoint, "foreign_layout", lambda c, kind: layouts.get((c, kind)) or known(c, kind))
    return TOY


def packed(rows: int = 4, cols: int = 64, seed: int = 0) -> PackedTensor:
    return codecs.get("q4_0").encode(normal(rows, cols, seed=seed)).repack(TOYS)


def step(name: str, tensor: PackedTensor, file: str = "") -> Step:
    return Step(name, tensor.shape, tensor.dtype, tensor.layout, tensor.layout, "keep", "", file=file)


def dense(array: np.ndarray) -> PackedTensor:
    name = {"float32": "f32", "bfloat16": "bf16"}[array.dtype.name]
    shape = DENSE[name].shapes(int(np.prod(array.shape[:-1])), array.shape[-1] if array.shape else 1)["values"]
    return PackedTensor(DENSE[name], array.shape, {"values": array.reshape(shape)}, array.dtype.name)


def write(path: Path, tensors: Mapping[str, PackedTensor], files: Mapping[str, str] | None = None) -> Path:
    steps = tuple(step(name, tensor, (files or {}).get(name, "")) for name, tensor in tensors.items())
    save(TOY, path, Plan("m", "toy", steps), tensors.values(), Extras({"model_type": "x"}))
    return path


def entries(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with path.open("rb") as file:
        return {n: (e.dtype, e.shape) for n, e in safetensors_header.read(path, file).entries.items()}


# ---------------------------------------------------------------- written and read


def test_a_dialect_is_data(tmp_path: Path, toy: Dialect) -> None:
    weights = {"a.weight": packed(), "b.weight": dense(normal(3, 5)), "norm": dense(np.ones(3, BF16))}
    path = write(tmp_path / "m", weights)
    assert entries(path / "model.safetensors") == {
        "a.size": ("I64", (2,)), "b.weight": ("F32", (3, 5)), "norm": ("BF16", (3,)), "a.steps": ("F16", (4, 2)),
        "a.codes": ("F4", (4, 64)),
    }  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    assert config == {"model_type": "x", "quantization_config": {"quant_method": "toy", "dense": ["b", "lm_head"]}}
    assert json.loads((path / "more.json").read_text()) == list(weights)
    with checkpoint.open(path) as model:
        assert set(model) == set(weights)
        assert (model.index["a.weight"].kind, model.index["a.weight"].dtype) == ("toy codes", "bfloat16")
        assert model.index["a.weight"].nbytes == 4 * 32 + 4 * 2 * 2
        for name, tensor in weights.items():
            assert model[name].decode().tobytes() == tensor.decode().tobytes()
            assert model[name].layout == tensor.layout


def test_files_are_indexed_and_whole(tmp_path: Path, toy: Dialect) -> None:
    weights = {f"{n}.weight": packed(seed=i) for i, n in enumerate("abc")}
    names = {"a.weight": "one.safetensors", "b.weight": "one.safetensors", "c.weight": "two.safetensors"}
    path = write(tmp_path / "m", weights, names)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["b.size"] == "one.safetensors"
    assert index["metadata"]["total_size"] == sum((path / f).stat().st_size for f in set(names.values()))
    assert len(index["weight_map"]) == 9
    with checkpoint.open(path) as model:
        for name, tensor in weights.items():
            assert model[name].decode().tobytes() == tensor.decode().tobytes()
    with pytest.raises(PlanError, match=r"c\.weight: got nothing"):
        save(
            TOY,
            tmp_path / "short",
            Plan("m", "toy", tuple(step(n, t) for n, t in weights.items())),
            list(weights.values())[:2],
            Extras({}),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("config", "dtype"), [
    ({"dtype": "float16"}, "float16"), ({"torch_dtype": "torch.float32"}, "float32"), ({}, "bfloat16"),
    ({"text_config": {"dtype": "float16"}}, "float16"), ({"dtype": ["float16"]}, "bfloat16"), (None, "bfloat16"),
    ({"dtype": "int7", "text_config": 5}, "bfloat16"),
])  # fmt: skip
def test_the_dtype_of_before_is_the_config_s(config: dict[str, Any] | None, dtype: str) -> None:
    assert folder.dtype_before(config) == dtype


def test_a_lone_number_has_any_shape(tmp_path: Path) -> None:
    says = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"g": {
        "targets": ["Linear"], "weights": {"num_bits": 4}, "format": "nvfp4-pack-quantized",
    }}}  # fmt: skip
    for number in (np.array(2, F32), np.array([2], F32), np.array([[2]], F32)):
        path = tmp_path / f"m{number.ndim}"
        path.mkdir()
        weight = codecs.get("nvfp4_ct").encode(normal(2, 64))
        arrays = {f"a.{name}": array for name, array in weight.components.items()}
        save_file(arrays | {"a.weight_global_scale": number}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"quantization_config": says}))
        with checkpoint.open(path) as model:
            assert model["a.weight"].components["weight_global_scale"].tolist() == [2]


# ---------------------------------------------------------------- scales of activations


@pytest.mark.parametrize(
    ("scale", "name", "stored", "value"),
    [
        (DIVIDES, "a.input_global_scale", "a.input_scale", 0.25),
        (MULTIPLIES, "a.input_scale", "a.input_scale", 4.0),
        (DIVIDES, "b.input_global_scale", "b.input_global_scale", 4.0),
    ],
)
def test_scales_of_inputs_follow_the_dialect(
    tmp_path: Path, toy: Dialect, scale: Activation, name: str, stored: str, value: float
) -> None:
    """a is packed, b is not: only beside packed weights such a tensor is known to be what its name says."""
    numbers = dense(np.full(scale.shape, 4, F32))
    path = write(tmp_path / "m", {"a.weight": packed(), "b.weight": dense(normal(3, 5)), name: numbers})
    with checkpoint.open(path) as model:
        assert model[stored].decode().tolist() in (value, [value])
        assert (name in model) is (name == stored)
    assert entries(path / "model.safetensors")[stored][1] == (() if name != stored else scale.shape)


def test_only_one_float32_is_a_scale_of_inputs(tmp_path: Path, toy: Dialect) -> None:
    for array in (np.array([4, 4], F32), np.array([4], BF16)):
        path = write(tmp_path / array.dtype.name, {"a.weight": packed(), "a.input_global_scale": dense(array)})
        with checkpoint.open(path) as model:
            assert model["a.input_global_scale"].decode().tolist() == array.tolist()


# ---------------------------------------------------------------- refused


def test_what_the_dialect_cannot_hold_is_refused(tmp_path: Path, toy: Dialect) -> None:
    good, brought = packed(), Layout.from_json(PAIRS.to_json())
    plan = Plan("m", "toy", (step("a.weight", good),))
    with pytest.raises(PlanError, match=r"m: has no config\.json"):
        save(TOY, tmp_path / "out", plan, [good], Extras())
    with pytest.raises(PlanError, match=r"out\.safetensors: the toy is a folder"):
        save(TOY, tmp_path / "out.safetensors", plan, [good], Extras({}))
    with pytest.raises(PlanError, match=r"a: is not called \.weight; say --map 'a=keep'"):
        save(TOY, tmp_path / "out", Plan("m", "toy", (step("a", good),)), [good], Extras({}))
    with pytest.raises(PlanError, match=r"a\.codes and a\.weight: both would be stored as 'a\.codes'"):
        write(tmp_path / "out", {"a.weight": good, "a.codes": dense(normal(3, 5))})
    assert TOY.refusal(codecs.get("q8_0").layout, (4, 32)) == "the toy holds q4_0_pairs and dense tensors, not q8_0"
    assert (
        TOY.refusal(brought, (4, 32))
        == "q4_0_pairs is described by a file, and is not the installed layout of this name"
    )
    assert not list(tmp_path.iterdir())


def damaged(path: Path, says: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder of one weight by the safetensors library, with other tensors than it should have."""
    tensor = packed()
    arrays: dict[str, Any] = {
        "a.codes": tensor.components["packed"],
        "a.steps": tensor.components["scales"],
        "a.size": np.array([4, 64], np.int64),
    }
    arrays |= {f"a.{name}": array for name, array in changes.items()}
    path.mkdir()
    save_file({name: array for name, array in arrays.items() if array is not None}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "toy"} | (says or {})}))
    return path


@pytest.mark.parametrize(
    ("changes", "message", "rule"),
    [
        ({"steps": None}, r"m: a\.weight: 'a\.steps' is missing, in which q4_0_pairs has 'scales'", "PF110"),
        ({"steps": np.ones((4, 2), F32)}, r"a\.steps: is F32, q4_0_pairs needs F16", "PF105"),
        (
            {"steps": np.ones((2, 4), np.float16)},
            r"a\.steps: is \[2, 4\], .* weight of \[4, 64\] needs \[4, 2\]",
            "PF106",
        ),
        ({"codes": np.ones((4, 32), np.int8)}, r"a\.codes: is I8, q4_0_pairs needs F4 or U8", "PF105"),
        ({"weight": np.ones(3, F32)}, r"a\.weight is stored twice", "PF104"),
    ],
)
def test_tensors_that_are_not_what_they_should_be_are_named(
    tmp_path: Path, toy: Dialect, changes: dict[str, Any], message: str, rule: str
) -> None:
    with pytest.raises(ContainerError, match=message) as error:
        checkpoint.open(damaged(tmp_path / "m", **changes))
    assert error.value.rule == rule


def test_a_good_one_is_read(tmp_path: Path, toy: Dialect) -> None:
    """The same folder undamaged, and without the tensor that says nothing new."""
    for name, changes in (("m", {}), ("n", {"size": None})):
        with checkpoint.open(damaged(tmp_path / name, **changes)) as model:
            assert list(model) == ["a.weight"]
            assert model["a.weight"].decode().tobytes() == packed().decode().tobytes()


def test_a_layout_that_is_not_held_is_named(tmp_path: Path, toy: Dialect) -> None:
    for name in ("q8_0", "nothing"):
        with pytest.raises(ContainerError, match=f"a.weight: is {name}, and the toy holds q4_0_pairs"):
            checkpoint.open(damaged(tmp_path / name, {"layouts": [name]}))
    with checkpoint.open(damaged(tmp_path / "one", {"layouts": ["nothing", "toy"]})) as model:
        assert model["a.weight"].layout == TOYS


def test_a_shape_that_fills_no_blocks_is_left_unread(tmp_path: Path, toy: Dialect) -> None:
    path = damaged(tmp_path / "m", codes=np.ones((4, 24), np.uint8))
    with checkpoint.open(path) as model:
        assert model.index["a.codes"].why == "a weight of [4, 48]; q4_0_pairs: 48 columns, needs a multiple of 32"
        with pytest.raises(PlanError, match=r"stored as U8, a weight of \[4, 48\]"):
            conversion.plan_for(model, tmp_path / "out", conversion.Recipe("keep"))


@pytest.mark.parametrize(
    ("container", "to", "packed"),
    [
        ("compressed_tensors", "nvfp4_ct", {"a.q_proj.weight"}),
        ("modelopt", "nvfp4_modelopt", {"a.q_proj.weight"}),
        ("quark", "mxfp4_pairs", {"a.q_proj.weight"}),
        ("deepseek", "fp8_block", {"a.q_proj.weight"}),
        ("bitnet", "bitnet", {"a.q_proj.weight", "lm_head.weight"}),
        ("safetensors", "mxfp4", {"a.q_proj.weight", "lm_head.weight", "embed_tokens.weight"}),
    ],
)
def test_embeddings_and_the_output_layer_stay_dense_where_readers_expect_it(
    tmp_path: Path, container: str, to: str, packed: set[str]
) -> None:
    names = ("a.q_proj.weight", "lm_head.weight", "embed_tokens.weight")
    model = models.folder(tmp_path / "m", {name: normal(64, 128) for name in names})
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, tmp_path / "o", Recipe(to), container)
        assert {s.name for s in plan.steps if s.action == "quantise"} == packed
        asked = Recipe(to, (("lm_head", to),))
        if container != "bitnet":
            again = conversion.plan_for(source, tmp_path / "o", asked, container)
            assert {s.name for s in again.steps if s.action == "quantise"} == packed | {"lm_head.weight"}


@pytest.mark.parametrize("dtype", [["F32"], {}, None, 3])
def test_a_dtype_that_is_no_text_is_an_error(tmp_path: Path, dtype: Any) -> None:
    text = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ContainerError, match=r"m\.safetensors: a: dtype .*, needs one of F64") as error:
        checkpoint.open(tmp_path / "m.safetensors")
    assert error.value.rule == "PF105"


def test_every_container_says_what_it_leaves_out() -> None:
    scale = Step("a.input_scale", (), "float32", DENSE["f32"], DENSE["f32"], "keep", "")
    layouts = [codecs.get(name).layout for name in ("nvfp4_modelopt", "fp8_tensor")]
    weight = Step("a.weight", (4, 64), "bfloat16", *layouts, "requantise", "")
    for name in exporters.NAMES:
        told = exporters.get(name).remarks((weight, scale, replace(scale, name="b.input_scale")))
        assert told == [] if name in exporters.SUFFIXES else told[0].startswith("a.input_scale: left out, as a scale")


def test_a_method_that_no_dialect_reads_is_refused(tmp_path: Path) -> None:
    for method in ("gptq", ["fp8"], None):
        path = damaged(tmp_path / str(method), {"quant_method": method})
        with checkpoint.open(path) as model:
            assert {i.kind for i in model.index.values()} == {"U8", "F16", "I64"}
            with pytest.raises(PlanError, match=r"quantised already, as .*it reads bitnet, compressed-tensors, "):
                conversion.plan_for(model, tmp_path / "out", conversion.Recipe("keep"))


def test_every_dialect_is_there() -> None:
    for name in exporters.FOLDERS:
        dialect = folder.dialect(name)
        assert name == dialect.NAME
        assert not dialect.refusal(DENSE["bf16"], (3, 5))
        assert dialect.refusal(codecs.get("tq1_0").layout, (256, 256)).startswith(f"{dialect.title} holds ")
    assert {*exporters.METHODS.values(), *exporters.SIGNS.values()} == set(exporters.FOLDERS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150)
@given(method=st.sampled_from([*exporters.METHODS, "toy"]), says=st.dictionaries(st.sampled_from([
    "linear_class", "format", "config_groups", "sparsity_config", "quant_algo", "weight_block_size", "quantization",
    "group_size", "ignore", "exclude", "producer", "fmt", "scale_fmt", "modules_to_not_convert", "export", "version",
]), JSON))  # fmt: skip
def test_no_config_makes_a_reader_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, method: str, says: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("m")
    rng = np.random.default_rng(0)
    save_file(
        {
            "a.weight": rng.integers(0, 255, (128, 64), np.uint8), "a.weight_scale": np.ones((128, 4), np.uint8),
            "b.weight_packed": np.ones((4, 32), np.uint8), "b.weight_scale": np.ones((4, 2), F32),
            "c_blocks": np.ones((2, 2, 2, 16), np.uint8), "c_scales": np.ones((2, 2, 2), np.uint8),
            "d.weight": np.ones((4, 4), np.int8), "d.scale": np.ones(4, F32), "d.weight_scale_inv": np.ones(1, F32),
        },
        path / "model.safetensors",
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps({"quantization_config": {**says, "quant_method": method}}))
    try:
        with checkpoint.open(path) as model:
            for name, info in model.index.items():
                assert info.layout is None or isinstance(model[name], PackedTensor)
    except ContainerError as error:
        assert str(path) in str(error)


# ---------------------------------------------------------------- round the dialects


def mxfp4_model(path: Path) -> Path:
    path.mkdir()
    arrays = {
        "model.layers.0.q_proj.weight": normal(64, 256, seed=1, dtype=BF16),
        "model.layers.0.k_proj.weight": normal(128, 128, seed=2, dtype=BF16),
        "model.norm.weight": normal(256, seed=3, dtype=BF16),
    }
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return path


@pytest.mark.parametrize(
    ("way"),
    [
        [("mxfp4_pairs", "compressed_tensors"), ("keep", "quark"), ("keep", "modelopt"), ("mxfp4", "gguf"),
         ("mxfp4_e8m0", "deepseek"), ("mxfp4_pairs", "safetensors")],
        [("nvfp4_ct", "compressed_tensors"), ("nvfp4_modelopt", "modelopt"), ("nvfp4", "gguf"),
         ("nvfp4_modelopt", "safetensors")],
        [("mxfp8_e4m3", "compressed_tensors"), ("keep", "modelopt"), ("keep", "safetensors")],
        [("fp8_block", "deepseek"), ("keep", "compressed_tensors"), ("keep", "safetensors")],
        [("fp8_tensor", "compressed_tensors"), ("keep", "modelopt"), ("keep", "deepseek")],
    ],
    ids=lambda way: way[0][0],
)  # fmt: skip
def test_files_that_went_round_the_dialects_are_byte_identical(tmp_path: Path, way: list[tuple[str, str]]) -> None:
    """No step rounds a weight, and at the end stands the first file again."""
    source, first = mxfp4_model(tmp_path / "dense"), tmp_path / "0"
    for i, (layout, container) in enumerate([*way, way[0]]):
        target = tmp_path / (f"{i}.gguf" if container == "gguf" else str(i))
        report = conversion.convert(source, target, layout, container=container, check=True)
        assert i == 0 or {s.action for s in report.plan.steps} <= {"keep", "repack", "rescale"}
        source = target
    assert (source / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
