"""compressed-tensors: folders are written as the real package has them, read, and refused where they must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from packfmt import checkpoint, codecs, conversion, exporters
from packfmt.codec import Array, PackedTensor
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import Extras, compressed_tensors
from packfmt.layout import DENSE
from packfmt.plan import Plan, Step
from tests.compressed_tensors_folders import (
    DOWN,
    E4M3,
    F32,
    FORMATS,
    MXFP4,
    MXFP4_SCALES,
    NUMBERS,
    NVFP4,
    NVFP4_GLOBAL,
    NVFP4_SCALES,
    UP,
    WEIGHTS,
    config_of,
    dense,
    entries,
    golden_nvfp4,
    layouts,
    packed_bytes,
    stored,
    to_folder,
    written,
)
from tests.models import BF16, normal
from tests.outputs import save

# ---------------------------------------------------------------- written


@layouts
def test_a_folder_has_the_package_s_tensors(tmp_path: Path, name: str) -> None:
    out = to_folder(dense(tmp_path / "dense"), tmp_path / "out", name)
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    of, expected = FORMATS[name]
    found = entries(out / "model.safetensors")
    layer = {n.removeprefix(f"{UP}.weight"): e for n, e in found.items() if n.startswith(f"{UP}.weight")}
    assert layer == expected
    assert {n for n in found if UP not in n and DOWN not in n} == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
    }  # fmt: skip
    config = config_of(out)
    (group,) = config["config_groups"].values()
    assert (config["format"], group["format"], group["targets"]) == (of, of, ["Linear"])
    assert config["ignore"] == ["lm_head"]
    assert (config["quant_method"], config["quantization_status"]) == ("compressed-tensors", "compressed")
    if name in WEIGHTS:
        assert group["weights"] == WEIGHTS[name]


@layouts
def test_a_folder_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    source = dense(tmp_path / "dense")
    out = to_folder(source, tmp_path / "out", name)
    with checkpoint.open(source) as before, checkpoint.open(out) as after:
        assert set(after) == set(before)
        for tensor in (UP, DOWN):
            expected = codecs.get(name).encode(before[f"{tensor}.weight"].decode())
            got, info = after[f"{tensor}.weight"], after.index[f"{tensor}.weight"]
            assert got.layout == expected.layout
            assert {c: a.tobytes() for c, a in got.components.items()} == {
                c: a.tobytes() for c, a in expected.components.items()
            }
            assert (info.kind, info.dtype) == (FORMATS[name][0], "bfloat16")
    conversion.convert(out, tmp_path / "native", "keep", check=True)
    back = tmp_path / "back"
    conversion.convert(tmp_path / "native", back, "keep", container="compressed-tensors", check=True)
    assert (back / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert config_of(back) == config_of(out)


@layouts
def test_a_folder_becomes_dense_again(tmp_path: Path, name: str) -> None:
    out = to_folder(dense(tmp_path / "dense"), tmp_path / "out", name)
    with checkpoint.open(out) as model:
        conversion.run(conversion.decode_plan(model, tmp_path / "again"), model, tmp_path / "again")
        weight = model[f"{UP}.weight"].decode().astype(BF16)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    with checkpoint.open(tmp_path / "again") as model:
        assert model[f"{UP}.weight"].layout == DENSE["bf16"]
        assert model[f"{UP}.weight"].decode().tobytes() == weight.astype(F32).tobytes()
        assert not [n for n in model if "packed" in n or "scale" in n or "shape" in n]


def test_several_schemes_name_their_layers(tmp_path: Path) -> None:
    out = to_folder(dense(tmp_path / "dense"), tmp_path / "out", "nvfp4_ct", **{"down_proj": "mxfp8_e4m3"})
    config = config_of(out)
    groups = list(config["config_groups"].values())
    assert config["format"] == "mixed-precision"
    assert {g["format"]: g["targets"] for g in groups} == {"nvfp4-pack-quantized": [UP], "mxfp8-quantized": [DOWN]}
    with checkpoint.open(out) as model:
        assert model[f"{UP}.weight"].layout.name == "nvfp4_ct"
        assert model[f"{DOWN}.weight"].layout.name == "mxfp8_e4m3"
    for group in groups:
        group["targets"] = ["Linear"]  # now the tensors alone say which is which
    (out / "config.json").write_text(json.dumps({"quantization_config": config}))
    with checkpoint.open(out) as model:
        assert [model[f"{n}.weight"].layout.name for n in (UP, DOWN)] == ["nvfp4_ct", "mxfp8_e4m3"]


def test_a_head_that_is_tied_to_the_embedding_is_left_dense(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense")
    assert config_of(to_folder(source, tmp_path / "out", "nvfp4_ct"))["ignore"] == ["lm_head"]
    save_file({f"{UP}.weight": normal(64, 256, dtype=BF16)}, source / "model.safetensors")
    conversion.convert(source, tmp_path / "tied", "nvfp4_ct", container="compressed-tensors")
    assert config_of(tmp_path / "tied")["ignore"] == ["lm_head"]


def test_files_are_cut_and_indexed(tmp_path: Path) -> None:
    """Components of one weight may lie in two files: the package cuts where it likes."""
    packed = codecs.get("nvfp4_ct").encode(normal(64, 256))
    steps = [
        Step(f"{n}.weight", (64, 256), "float32", packed.layout, packed.layout, "keep", "", file=f"{n}.safetensors")
        for n in ("a", "b")
    ]
    plan = Plan("m", compressed_tensors.NAME, tuple(steps))
    save(compressed_tensors.DIALECT, tmp_path / "out", plan, [packed, packed], Extras({}))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["b.weight_scale"] == "b.safetensors"
    assert sorted(set(index["weight_map"].values())) == ["a.safetensors", "b.safetensors"]
    with checkpoint.open(tmp_path / "out") as model:
        assert [t.decode().tobytes() for t in model.values()] == 2 * [packed.decode().tobytes()]


def test_a_weight_is_read_from_several_files(tmp_path: Path) -> None:
    path = written(tmp_path / "m", {}, WEIGHTS["nvfp4_ct"], "nvfp4-pack-quantized")
    names = {}
    for i, (name, array) in enumerate(golden_nvfp4().items()):
        names[name] = f"model-{i}.safetensors"
        save_file({name: array}, path / names[name])
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with checkpoint.open(path) as model:
        assert list(model) == ["a.weight"]
        assert model["a.weight"].decode().shape == (1, 64)


# ---------------------------------------------------------------- numbers of the package


def test_nvfp4_of_the_package_is_decoded(tmp_path: Path) -> None:
    path = written(tmp_path / "m", golden_nvfp4(), WEIGHTS["nvfp4_ct"], "nvfp4-pack-quantized")
    codes = packed_bytes(NVFP4)
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(1, 64)
    scale = packed_bytes(NVFP4_SCALES).view(E4M3).astype(F32) / NVFP4_GLOBAL
    with checkpoint.open(path) as model:
        assert model["a.weight"].decode().tobytes() == (NUMBERS[codes] * scale.repeat(16, 1)).tobytes()


def test_mxfp4_of_the_package_is_decoded(tmp_path: Path) -> None:
    tensors = {"a.weight_packed": packed_bytes(MXFP4), "a.weight_scale": packed_bytes(MXFP4_SCALES)}
    path = written(tmp_path / "m", tensors, WEIGHTS["mxfp4_pairs"], "mxfp4-pack-quantized")
    codes = packed_bytes(MXFP4)
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(1, 64)
    with checkpoint.open(path) as model:
        assert model["a.weight"].decode().tobytes() == NUMBERS[codes].tobytes()


# ---------------------------------------------------------------- scales of activations


def test_scales_of_inputs_are_inverted_for_a_dialect_that_divides(tmp_path: Path) -> None:
    scale = np.array(3, F32)
    other = np.array([2.0], F32)
    source = dense(tmp_path / "dense", **{f"{UP}.input_scale": scale, "elsewhere.input_scale": other})
    out = to_folder(source, tmp_path / "out", "nvfp4_ct")
    found = entries(out / "model.safetensors")
    assert found[f"{UP}.input_global_scale"] == ("F32", [1])
    assert f"{UP}.input_scale" not in found
    assert "elsewhere.input_scale" in found
    assert stored(out)[f"{UP}.input_global_scale"] == (F32(1) / F32(3)).tobytes()
    groups = config_of(out)["config_groups"].values()
    assert {g["targets"][0]: (g["input_activations"] or {}).get("dynamic") for g in groups} == {UP: "local", DOWN: None}
    kept = to_folder(out, tmp_path / "again", "keep")
    assert stored(kept) == stored(out)
    assert config_of(kept) == config_of(out)


def test_both_names_of_a_scale_cannot_stand_together(tmp_path: Path) -> None:
    more = {f"{UP}.input_scale": np.array(3, F32), f"{UP}.input_global_scale": np.array([3], F32)}
    with pytest.raises(PlanError, match=r"both would be stored as .*input_global_scale"):
        to_folder(dense(tmp_path / "dense", **more), tmp_path / "out", "nvfp4_ct")


def test_activations_of_the_source_s_config_stay(tmp_path: Path) -> None:
    out = to_folder(dense(tmp_path / "dense"), tmp_path / "out", "fp8_row")
    config = json.loads((out / "config.json").read_text())
    says = config["quantization_config"]
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    says["config_groups"]["group_0"] |= {"input_activations": token}
    says["config_groups"]["group_0"]["weights"]["observer"] = "mse"
    says["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (out / "config.json").write_text(json.dumps(config))
    assert config_of(to_folder(out, tmp_path / "again", "keep")) == says


def test_static_inputs_of_the_source_s_config_go_with_their_scales(tmp_path: Path) -> None:
    """A config that says inputs have a scale that is stored is not carried to layers that have none."""
    more = {f"{n}.input_scale": np.array([3], BF16) for n in (UP, DOWN)}
    out = to_folder(dense(tmp_path / "dense", **more), tmp_path / "out", "fp8_tensor")
    (group,) = config_of(out)["config_groups"].values()
    assert group["input_activations"]["dynamic"] is False
    assert entries(out / "model.safetensors")[f"{UP}.input_scale"] == ("BF16", [1])
    kept = to_folder(out, tmp_path / "kept", "keep")
    assert stored(kept) == stored(out) and config_of(kept) == config_of(out)
    requantised = to_folder(out, tmp_path / "four", "nvfp4_ct")
    assert not [name for name in stored(requantised) if "input" in name]
    (group,) = config_of(requantised)["config_groups"].values()
    assert group["input_activations"] is None
    mixed = to_folder(out, tmp_path / "mixed", "nvfp4_ct", **{"down_proj": "keep"})
    groups = {g["format"]: g["input_activations"] for g in config_of(mixed)["config_groups"].values()}
    assert groups["nvfp4-pack-quantized"] is None and groups["float-quantized"]["num_bits"] == 8
    assert [name for name in stored(mixed) if "input" in name] == [f"{DOWN}.input_scale"]


@pytest.mark.parametrize("key", ["text_config", "compression_config"])
def test_a_config_in_its_other_places_is_read_and_written_at_the_top(tmp_path: Path, key: str) -> None:
    """Multimodal models may have it in their text_config, and the package called it otherwise once."""
    out = to_folder(dense(tmp_path / "dense"), tmp_path / "out", "ct_int4_g128")
    config = json.loads((out / "config.json").read_text())
    says = config.pop("quantization_config")
    inner = {"dtype": "bfloat16", "quantization_config": says} if key == "text_config" else says
    (out / "config.json").write_text(json.dumps(config | {key: inner}))
    with checkpoint.open(out) as model:
        assert model.index[f"{UP}.weight"].layout == codecs.get("ct_int4_g128").layout
    again = to_folder(out, tmp_path / "again", "keep")
    left = {"text_config": {"dtype": "bfloat16"}} if key == "text_config" else {}
    assert json.loads((again / "config.json").read_text()) == config | left | {"quantization_config": says}
    for target in ("native", "m.gguf"):
        conversion.convert(out, tmp_path / target, "q8_0")
    conversion.convert(tmp_path / "m.gguf", tmp_path / "back", "dense")
    for folder in ("native", "back"):
        config_there = json.loads((tmp_path / folder / "config.json").read_text())
        config_there.pop("quantization_config", None)
        assert config_there == config | left


@pytest.mark.parametrize(
    ("key", "inner"),
    [
        *((key, inner) for key in ("text_config", "compression_config") for inner in (None, [], "x", {})),
        ("text_config", {"quantization_config": None}),
        ("text_config", {"quantization_config": 3}),
    ],
)
def test_an_inner_config_that_says_nothing_is_nothing(tmp_path: Path, key: str, inner: Any) -> None:
    source = dense(tmp_path / "dense")
    (source / "config.json").write_text(json.dumps({key: inner}))
    with checkpoint.open(source) as model:
        assert model.index[f"{UP}.weight"].layout == DENSE["bf16"]


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_tell_the_two_orders_of_codes_apart(tmp_path: Path, bits: int) -> None:
    """Codes without gaps since 0.18; before, as many as fit whole in a word."""
    for version, name in (("0.20.0", f"ct_int{bits}_g128"), ("0.17.1", f"ct_int{bits}_legacy_g128")):
        out = to_folder(dense(tmp_path / f"d{version}"), tmp_path / version, name)
        assert config_of(out)["version"] == version
        with checkpoint.open(out) as model:
            assert model[f"{UP}.weight"].layout.name == name


@pytest.mark.parametrize(("version", "name"), [("0.19.0", ""), ("0.16.2", "ct_int3_legacy_row"), (None, "")])
def test_a_matrix_too_narrow_to_tell_is_told_by_the_version(tmp_path: Path, version: str | None, name: str) -> None:
    """Of 20 columns of 3 bits both orders fill two words; that without gaps is read in whole units of 32 codes."""
    tensors = {
        "a.weight_packed": np.arange(8, dtype=np.int32).reshape(4, 2),
        "a.weight_scale": np.ones((4, 1), BF16),
        "a.weight_shape": np.array([4, 20], np.int64),
    }
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "group_size": None, "strategy": "channel"}
    path = written(tmp_path / "m", tensors, weights, "pack-quantized", **({"version": version} if version else {}))
    with checkpoint.open(path) as model:
        if name:
            assert model["a.weight"].layout.name == name
        else:
            why = (
                "20 columns, needs a multiple of 32" if version else "2 words a row, which two orders of the codes fill"
            )
            with pytest.raises(ContainerError, match=why):
                model["a.weight_packed"]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "shape", "layout", "message"),
    [
        ("a.weight", (4, 32), "q4_0", "compressed-tensors holds nvfp4_ct, .* and dense tensors, not q4_0"),
        ("a.weight", (2, 4, 32), "mxfp4_pairs", "3 dimensions"),
        ("model.embed_tokens.weight", (4, 32), "mxfp4_pairs", "an embedding, which stays dense"),
        ("a.experts", (4, 32), "mxfp4_pairs", r"a.experts: is not called \.weight"),
        ("a.weight", (4, 32), "f32", "nothing would be packed"),
    ],
)
def test_what_the_package_would_not_load_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], layout: str, message: str
) -> None:
    target = DENSE.get(layout) or codecs.get(layout).layout
    step = Step(name, shape, "float32", DENSE["f32"], target, "quantise", "")
    with pytest.raises(PlanError, match=message):
        save(compressed_tensors.DIALECT, tmp_path / "out", Plan("m", "", (step,)), [], Extras({}))
    assert not list(tmp_path.iterdir())


def test_all_embeddings_are_named_at_once() -> None:
    layout = codecs.get("mxfp4_pairs").layout
    names = ("word_embeddings.weight", "a.weight", "position_embeddings.weight")
    steps = tuple(Step(name, (4, 32), "float32", DENSE["f32"], layout, "quantise", "") for name in names)
    why = compressed_tensors.DIALECT.plan_refusal(steps)
    assert why == (
        "word_embeddings.weight, position_embeddings.weight: embeddings, which stay dense; "
        r"say --map 'word_embeddings\.weight|position_embeddings\.weight=keep'"
    )


def test_a_layout_that_only_bears_the_name_is_refused() -> None:
    ours = codecs.get("mxfp4_pairs").layout
    theirs = type(ours).from_json(ours.to_json())
    assert "described by a file" in compressed_tensors.DIALECT.refusal(theirs, (4, 32))
    assert not compressed_tensors.DIALECT.refusal(ours, (4, 32))


def broken(**changes: Any) -> dict[str, Array]:
    tensors: dict[str, Any] = golden_nvfp4() | {f"a.{k}": v for k, v in changes.items()}
    return {name: array for name, array in tensors.items() if array is not None}


@pytest.mark.parametrize(
    ("tensors", "message", "rule"),
    [
        (broken(weight_scale=None), r"a\.weight: 'a\.weight_scale' is missing", "PF110"),
        (broken(weight_global_scale=None), r"a\.weight: 'a\.weight_global_scale' is missing", "PF110"),
        (broken(weight_scale=np.ones((1, 4), F32)), r"a\.weight_scale: is F32, nvfp4_ct needs F8_E4M3", "PF105"),
        (
            broken(weight_scale=np.ones((1, 3), E4M3)),
            r"weight_scale: is \[1, 3\], .* \[1, 64\] needs \[1, 4\]",
            "PF106",
        ),
        (broken(weight_global_scale=np.ones(2, F32)), r"global_scale: is \[2\], .* needs \[1\]", "PF106"),
        (broken(weight_packed=np.ones((), np.uint8)), r"a\.weight_packed: is \[\], .* needs", "PF106"),
        (broken(weight=np.ones((1, 64), F32)), r"a\.weight is stored twice", "PF104"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, Array], message: str, rule: str) -> None:
    path = written(tmp_path / "m", tensors, WEIGHTS["nvfp4_ct"], "nvfp4-pack-quantized")
    with pytest.raises(ContainerError, match=message) as error:
        checkpoint.open(path)
    assert error.value.rule == rule


@pytest.mark.parametrize(
    ("config", "message", "rule"),
    [
        ({"format": "marlin-24"}, r"format is 'marlin-24', packfmt reads nvfp4-pack-quantized, ", "PF105"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"the format 'sparse-24-bitmask'", "PF105"),
        ({"transform_config": {"config_groups": {"u": {}}}}, r"has a transform_config", "PF105"),
        ({"config_groups": None}, r"has no config_groups", "PF102"),
    ],
)
def test_formats_that_packfmt_does_not_read_are_named(
    tmp_path: Path, config: dict[str, Any], message: str, rule: str
) -> None:
    path = written(tmp_path / "m", golden_nvfp4(), WEIGHTS["nvfp4_ct"], "nvfp4-pack-quantized", **config)
    with pytest.raises(ContainerError, match=message) as error:
        checkpoint.open(path)
    assert error.value.rule == rule


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": "channel"}
CHANNEL = {"a.weight": np.ones((4, 32), np.int8), "a.weight_scale": np.ones((4, 1), BF16)}
EIGHT = {"a.weight": np.ones((4, 32), E4M3), "a.weight_scale": np.ones(1, F32)}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
WORDS = {"a.weight_packed": np.ones((4, 8), np.int32), "a.weight_scale": np.ones((4, 1), BF16)}
SHAPED = {**WORDS, "a.weight_shape": np.array([4, 32], np.int64)}


@pytest.mark.parametrize(
    ("tensors", "weights", "of", "message"),
    [
        (CHANNEL, INT8, "int-quantized", r"of the format 'int-quantized', packfmt reads"),
        (CHANNEL, INT8, "naive-quantized", r"with 'int' weights in I8"),
        (EIGHT, FLOAT8 | {"strategy": ["tensor"]}, "float-quantized", r"scaled by \['tensor'\], packfmt reads tensor"),
        (EIGHT, FLOAT8 | {"strategy": {}}, "float-quantized", r"scaled by {}"),
        (
            SHAPED | {"a.weight_g_idx": np.zeros(32, np.int32)},
            INT8,
            "pack-quantized",
            r"in the groups of a.weight_g_idx",
        ),
        (SHAPED, INT8 | {"num_bits": 9}, "pack-quantized", r"with 9 bits of 'int'"),
        (SHAPED, INT8 | {"strategy": "tensor"}, "pack-quantized", r"scaled by 'tensor'"),
        (SHAPED, INT8, "nvfp4-pack-quantized/", r"of the format 'nvfp4-pack-quantized/'"),
        (SHAPED | {"a.weight_scale": np.ones((4, 1))}, INT8, "pack-quantized", r"whose scales are F64"),
        (SHAPED, None, "pack-quantized", r"of the format 'pack-quantized'"),
    ],
)
def test_a_layer_that_is_not_understood_says_why(
    tmp_path: Path, tensors: dict[str, Array], weights: Any, of: str, message: str
) -> None:
    path = written(tmp_path / "m", tensors, weights, of, format="mixed-precision")
    name = next(iter(tensors))
    with checkpoint.open(path) as model:
        assert model.index[name].layout is None
        with pytest.raises(ContainerError, match=message):
            model[name]
        with pytest.raises(PlanError, match=message):
            conversion.plan_for(model, tmp_path / "out", conversion.Recipe("keep"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "'a.weight_shape' is missing"),
        (np.array([4], np.int64), "'a.weight_shape' is missing"),
        (np.array([4, 33], np.int64), r"weight_packed: is \[4, 8\]"),
        (np.array([5, 32], np.int64), r"weight_packed: is \[4, 8\]"),
        (np.ones(1 << 14, np.int64), "needs 65536 or fewer"),
    ],
)
def test_a_shape_that_lies_is_refused(tmp_path: Path, shape: Array | None, message: str) -> None:
    tensors = WORDS if shape is None else {**WORDS, "a.weight_shape": shape}
    with pytest.raises(ContainerError, match=message):
        checkpoint.open(written(tmp_path / "m", tensors, INT8, "pack-quantized"))


@pytest.mark.parametrize("shape", [(-4, 32), (1 << 62, 1 << 62), (4, -32)])
def test_a_shape_that_no_weight_has_is_left_unread(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors = {**WORDS, "a.weight_shape": np.array(shape, np.int64)}
    with checkpoint.open(written(tmp_path / "m", tensors, INT8, "pack-quantized")) as model:
        assert model.index["a.weight_packed"].why.startswith(f"a weight of {list(shape)}; ct_int8_row")
        assert model.index["a.weight_packed"].layout is None


def test_two_layouts_that_fit_are_not_guessed(tmp_path: Path) -> None:
    """A matrix of one row: a scale for the tensor and one for each row are the same number of numbers."""
    tensors = {"a.weight": np.ones((1, 32), E4M3), "a.weight_scale": np.ones((1, 1), F32)}
    weights = {"num_bits": 8, "type": "float", "symmetric": True}
    path = written(tmp_path / "m", tensors, weights | {"strategy": "tensor"}, "float-quantized")
    config = json.loads((path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {**groups["group_0"], "weights": weights | {"strategy": "channel"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContainerError, match=r"a.weight: its tensors fit fp8_tensor and fp8_row"):
        checkpoint.open(path)
    groups["group_1"]["targets"] = ["a"]
    (path / "config.json").write_text(json.dumps(config))
    with checkpoint.open(path) as model:
        assert model["a.weight"].layout.name == "fp8_row"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(data=st.data())
def test_no_config_makes_it_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tensors = data.draw(st.sampled_from([golden_nvfp4(), CHANNEL, EIGHT, SHAPED, WORDS]))
    path = tmp_path_factory.mktemp("m") / "m"
    of = data.draw(st.sampled_from([*compressed_tensors.FORMATS, "mixed-precision"]))
    weights = data.draw(st.sampled_from([INT8, FLOAT8, *WEIGHTS.values()]))
    written(path, tensors, weights, of)
    config = config_of(path)
    group = config["config_groups"]["group_0"]
    record = data.draw(st.sampled_from([config, config["config_groups"], group, group["weights"]]))
    record[data.draw(st.sampled_from(sorted(record)))] = data.draw(JSON)
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    try:
        with checkpoint.open(path) as model:
            for info in model.index.values():
                if info.layout is not None:
                    assert isinstance(model[info.name], PackedTensor)
    except ContainerError as error:
        assert str(path) in str(error)


def test_the_container_is_known_by_both_spellings() -> None:
    assert exporters.get("compressed-tensors") is exporters.get("compressed_tensors")
