"""NVIDIA ModelOpt's folders: its tensors and both its configs, written and read."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from packfmt import checkpoint, codecs, conversion, exporters
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import modelopt
from packfmt.plan import Recipe
from tests.models import folder, normal

F32 = np.float32
BITS = {"F4": 4, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F32": 32}
Tensor = tuple[str, tuple[int, ...], bytes]  # dtype as the file names it, shape, bytes

# (i - 31.5) / 8 for i = 0 to 63, by nvidia-modelopt 0.47.0: NVFP4QTensor, MXFP4QTensor, MXFP8QTensor.quantize, and
# export.quant_utils.to_quantized_weight for the formats fp8 and fp8_pc_pt (with columns 24 to 31 of row 1 zero)
RAMP = ((np.arange(64) - 31.5) / 8).astype(F32)
NVFP4 = {
    "weight": "ffffffeeeeeeeeddffefeedecdbcab8910324354656676775566666666777777",
    "weight_scale": "7e76767e",
    "weight_scale_2": "0000c03a",  # 3.9375 / (6 * 448)
}
MXFP4 = {
    "weight": "eeeeddddddddccccccbbbbaaaa99998800111122223333444444555555556666",
    "weight_scale": "7f7f",
}
MXFP8 = {
    "weight": "f8f7f7f6f6f5f5f4f4f3f3f2f2f1f1f0f0eeeeececeaeae8e7e5e3e1dedad4c8"
    "48545a5e61636567686a6a6c6c6e6e7070717172727373747475757676777778",
    "weight_scale": "7979",
}
FP8 = {
    "weight": "fefefdfdfcfcfbfbfafafaf9f9f8f8f7f6f5f4f3f2f1f0efedeceae8e4e1dbce"
    "4e5b6164686a6c6d6f7071727374757677787879797a7a7a7b7b7c7c7d7d7e7e",
    "weight_scale": "0000103c",  # 3.9375 / 448
}
FP8_ROWS = {
    "weight": "fefefdfdfcfcfbfbfafafaf9f9f8f8f7f6f5f4f3f2f1f0efedeceae8e4e1dbce"
    "525e64686b6d6f7172737576777879797a7a7b7c7c7d7d7e0000000000000000",
    "weight_scale": "0000103c6edbd63b",
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)


def e4m3(raw: bytes) -> np.ndarray:
    """Numbers of float8_e4m3fn, from its definition."""
    byte = np.frombuffer(raw, np.uint8)
    exponent, mantissa = byte.astype(int) >> 3 & 15, byte.astype(int) & 7
    size = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(byte & 128, -size, size).astype(F32)


def nibbles(raw: bytes) -> np.ndarray:
    byte = np.frombuffer(raw, np.uint8)
    return np.stack([byte & 15, byte >> 4], 1).reshape(-1)


def foreign_folder(path: Path, tensors: dict[str, Tensor], config: Any, **files: Any) -> Path:
    """A folder with one safetensors file of these tensors, config.json, and other JSON files."""
    path.mkdir(parents=True)
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        assert len(raw) * 8 == prod(shape) * BITS[dtype], name
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def stored(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder's file, as the safetensors package finds them."""
    found = deserialize((path / "model.safetensors").read_bytes())
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def golden(name: str, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], raw: dict[str, str]) -> Any:
    return {
        f"{name}.{key}": (dtype, shape, bytes.fromhex(raw[key]))
        for key, dtype, shape in zip(raw, dtypes, shapes, strict=True)
    }


SAYS = {"quant_algo": "MIXED_PRECISION", "quant_method": "modelopt"}
ALL = {
    **golden("nv", ("U8", "F8_E4M3", "F32"), ((1, 32), (1, 4), ()), NVFP4),
    **golden("mx4", ("U8", "U8"), ((2, 16), (2, 1)), MXFP4),
    **golden("mx8", ("F8_E4M3", "U8"), ((2, 32), (2, 1)), MXFP8),
    **golden("fp8", ("F8_E4M3", "F32"), ((2, 32), ()), FP8),
    **golden("rows", ("F8_E4M3", "F32"), ((2, 32), (2,)), FP8_ROWS),
    "nv.input_scale": ("F32", (), np.float32(0.5).tobytes()),
    "attn.k_scale": ("F32", (1,), np.float32(0.25).tobytes()),
    "norm.weight": ("BF16", (4,), bytes(8)),
}
EXPECTED = {
    "nv.weight": ("nvfp4_modelopt", (1, 64)), "mx4.weight": ("mxfp4_pairs", (2, 32)),
    "mx8.weight": ("mxfp8_e4m3", (2, 32)), "fp8.weight": ("fp8_tensor", (2, 32)), "rows.weight": ("fp8_row", (2, 32)),
}  # fmt: skip


def expected_numbers() -> dict[str, np.ndarray]:
    """The golden vectors' numbers, from the definitions of their formats: every product rounds to float32."""
    raw = {name: data for name, (_, _, data) in ALL.items()}
    whole = {n: np.frombuffer(raw[f"{n}.weight_scale"], F32) for n in ("fp8", "rows")}
    step = e4m3(raw["nv.weight_scale"]) * np.frombuffer(raw["nv.weight_scale_2"], F32)
    return {
        "nv.weight": (E2M1[nibbles(raw["nv.weight"])].reshape(4, 16) * step[:, None]).reshape(1, 64),
        "mx4.weight": E2M1[nibbles(raw["mx4.weight"])].reshape(2, 32),  # 127 is one
        "mx8.weight": e4m3(raw["mx8.weight"]).reshape(2, 32) * F32(2**-6),
        "fp8.weight": e4m3(raw["fp8.weight"]).reshape(2, 32) * whole["fp8"],
        "rows.weight": e4m3(raw["rows.weight"]).reshape(2, 32) * whole["rows"][:, None],
    }


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and (a + F32(0)).tobytes() == (b + F32(0)).tobytes()  # a zero's sign apart


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("where", ["config", "sign", "both"])
def test_golden_vectors_of_every_algorithm_are_read(tmp_path: Path, where: str) -> None:
    """Either config may be missing."""
    config = {"model_type": "toy"} | ({"quantization_config": SAYS} if where != "sign" else {})
    sign = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"}}
    files = {} if where == "config" else {"hf_quant_config": sign}
    with checkpoint.open(foreign_folder(tmp_path / "m", ALL, config, **files)) as model:
        assert set(model) == {*EXPECTED, "nv.input_scale", "attn.k_scale", "norm.weight"}
        for name, numbers in expected_numbers().items():
            info = model.index[name]
            assert info.layout and (info.layout.name, info.shape) == EXPECTED[name]
            assert same_numbers(model[name].decode(), numbers), name
        error = np.abs(model["mx8.weight"].decode().reshape(-1) - RAMP).max()
        assert error <= 1 / 8  # these are the ramp, and not just numbers


def test_experts_are_packed_along_their_rows(tmp_path: Path) -> None:
    """Two experts of 64 inputs and 3 outputs, whose outputs are the golden row, half and twice of it."""
    raw = {key: np.frombuffer(bytes.fromhex(text), np.uint8) for key, text in NVFP4.items()}
    weight = np.stack([raw["weight"]] * 3, 1)[None].repeat(2, 0)
    scale = np.stack([raw["weight_scale"]] * 3, 1)[None].repeat(2, 0).copy()
    scale[1, :, 2] -= 8  # half
    tensors: dict[str, Tensor] = {
        "mlp.experts.down_proj": ("U8", weight.shape, weight.tobytes()),
        "mlp.experts.down_proj_weight_scale": ("F8_E4M3", scale.shape, scale.tobytes()),
        "mlp.experts.down_proj_weight_scale_2": ("F32", (), bytes.fromhex(NVFP4["weight_scale_2"])),
        "mlp.experts.down_proj_input_scale": ("F32", (), bytes(4)),
    }
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": SAYS})
    with checkpoint.open(path) as model:
        assert list(model.index["mlp.experts.down_proj"].shape) == [2, 64, 3]
        weights = model["mlp.experts.down_proj"].decode()
    row = expected_numbers()["nv.weight"][0]
    assert same_numbers(weights[0], np.stack([row] * 3, 1))
    assert same_numbers(weights[1], np.stack([row, row, row / 2], 1))
    conversion.convert(path, tmp_path / "again", "keep", container="modelopt", check=True)
    assert stored(tmp_path / "again") == tensors
    said = json.loads((tmp_path / "again" / "hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], said["group_size"]) == ("NVFP4", 16)


@pytest.mark.parametrize("key", ["pre_quant_scale", "svdquant_lora_a"])
def test_a_layer_that_is_more_than_its_weight_is_not_taken_for_its_weight(tmp_path: Path, key: str) -> None:
    tensors = {**ALL, f"nv.{key}": ("BF16", (64,), bytes(128))}
    with checkpoint.open(foreign_folder(tmp_path / "m", tensors, {"quantization_config": SAYS})) as model:
        assert model.index["nv.weight"].layout is None and model.index["fp8.weight"].layout
        with pytest.raises(ContainerError, match=rf"nv\.weight is U8, and .* nv\.{key}, which is not read"):
            model["nv.weight"]
        with pytest.raises(PlanError, match=rf"nv\.{key}, which is not read"):
            conversion.plan_for(model, tmp_path / "o", Recipe("keep"))


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    out = {**ALL, **{name.replace("__", "."): t for name, t in tensors.items()}}
    return {name: t for name, t in out.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "says", "message", "rule"),
    [
        (ALL, {"quant_algo": "W4A16_AWQ"}, "quant_algo is 'W4A16_AWQ'; of ModelOpt's are read NVFP4, ", "PF105"),
        (ALL, {"quant_algo": ["NVFP4"]}, "quant_algo is .*NVFP4.*; of ModelOpt's", "PF105"),
        (ALL, {"quantized_layers": {"a": {"quant_algo": "W8A16"}}}, "quant_algo is 'W8A16'; of", "PF105"),
        (ALL, {"quantized_layers": [1]}, "its quantization is no record", "PF102"),
        (ALL, {"quantization": "NVFP4"}, "its quantization is no record", "PF102"),
        (changed(nv__weight_scale_2=None), {}, r"nv\.weight: 'nv\.weight_scale_2' is missing", "PF110"),
        (
            changed(nv__weight_scale=("F8_E4M3", (2, 2), bytes(4))), {},
            r"nv\.weight_scale: is \[2, 2\], a nvfp4_modelopt weight of \[1, 64\] needs \[1, 4\]", "PF106",
        ),
        (
            changed(nv__weight_scale_2=("BF16", (1,), bytes(2))), {},
            r"nv\.weight_scale_2: is BF16, nvfp4_modelopt needs F32", "PF105",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(
    tmp_path: Path, tensors: dict[str, Tensor], says: dict[str, Any], message: str, rule: str
) -> None:
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": {"quant_method": "modelopt", **says}})
    with pytest.raises(ContainerError, match=message) as caught:
        checkpoint.open(path)
    assert caught.value.rule == rule and str(caught.value).startswith(str(path))


def test_weights_of_other_algorithms_are_shown_with_a_reason(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        **ALL,
        "int.weight": ("I8", (2, 32), bytes(64)), "int.weight_scale": ("F32", (2,), bytes(8)),
        "experts.up": ("F8_E4M3", (2, 4, 8), bytes(64)), "experts.up_weight_scale": ("F32", (2,), bytes(8)),
        "gain.weight": ("BF16", (4,), bytes(8)), "gain.weight_scale": ("F32", (1,), bytes(4)),
    }  # fmt: skip
    with checkpoint.open(foreign_folder(tmp_path / "m", tensors, {"quantization_config": SAYS})) as model:
        for name, scale in (("int.weight", "int.weight_scale"), ("experts.up", "experts.up_weight_scale")):
            assert model.index[name].layout is None
            assert f"with {scale} beside it, F32 [2]; no such weight is read yet" in model.index[name].why
        assert model.index["gain.weight"].layout  # a dense tensor that happens to have such a neighbour


def test_a_weight_that_does_not_fill_its_blocks_is_shown_with_a_reason(tmp_path: Path) -> None:
    tensors = changed(mx4__weight=("U8", (2, 15), bytes(30)))
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": SAYS})
    with checkpoint.open(path) as model, pytest.raises(ContainerError, match="mxfp4_pairs: 30 columns, needs a mult"):
        model["mx4.weight"]


NOT_SAID = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(modelopt.READ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    says=st.dictionaries(
        st.sampled_from(["quant_algo", "quantization", "quantized_layers", "ignore", "config_groups", "producer"]),
        NOT_SAID,
    )
)
def test_any_config_gives_an_error_or_the_same_weights(tmp_path_factory: Any, says: dict[str, Any]) -> None:
    config = {"quantization_config": {**says, "quant_method": "modelopt"}}
    path = foreign_folder(tmp_path_factory.mktemp("any") / "m", ALL, config)
    try:
        model = checkpoint.open(path)
    except ContainerError as error:
        assert error.rule in ("PF102", "PF105")
        return
    with model:
        assert {n: model.index[n].layout.name for n in EXPECTED} == {n: e[0] for n, e in EXPECTED.items()}  # type: ignore[union-attr]


# ---------------------------------------------------------------- writing


def model_folder(path: Path) -> Path:
    return folder(
        path,
        {
            "model.embed_tokens.weight": normal(128, 64, seed=1),
            "model.layers.0.attn.q_proj.weight": normal(64, 256, seed=2),
            "model.layers.0.mlp.up_proj.weight": normal(96, 64, seed=3),
            "model.layers.0.mlp.experts.down_proj": normal(2, 64, 48, seed=4),
            "model.norm.weight": normal(64, seed=5),
            "lm_head.weight": normal(128, 64, seed=6),
        },
    )


DENSE_PARTS = {"embed|lm_head|experts": "keep"}


@pytest.mark.parametrize(
    ("layout", "algorithm", "group", "kinds"),
    [
        ("nvfp4_modelopt", "W4A16_NVFP4", 16, {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"}),
        ("mxfp4_pairs", "W4A8_MXFP4_FP8", 32, {"weight": "U8", "weight_scale": "U8"}),
        ("mxfp8_e4m3", "MXFP8", 32, {"weight": "F8_E4M3", "weight_scale": "U8"}),
        ("fp8_tensor", "FP8", None, {"weight": "F8_E4M3", "weight_scale": "F32"}),
        ("fp8_row", "FP8_PER_CHANNEL_PER_TOKEN", None, {"weight": "F8_E4M3", "weight_scale": "F32"}),
    ],
)
def test_a_layout_is_written_in_its_algorithm_s_tensors_and_read_again(
    tmp_path: Path, layout: str, algorithm: str, group: int | None, kinds: dict[str, str]
) -> None:
    source, out = model_folder(tmp_path / "m"), tmp_path / "out"
    conversion.convert(source, out, layout, overrides=DENSE_PARTS, container="modelopt", check=True)
    tensors, module = stored(out), "model.layers.0.attn.q_proj"
    assert {n.removeprefix(module + "."): t[0] for n, t in tensors.items() if n.startswith(module)} == kinds
    lone = {"nvfp4_modelopt": "weight_scale_2", "fp8_tensor": "weight_scale"}.get(layout)
    assert lone is None or tensors[f"{module}.{lone}"][1] == ()
    assert layout != "fp8_row" or tensors[f"{module}.weight_scale"][1] == (64,)
    told = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (told["quant_algo"], told.get("group_size"), told["kv_cache_quant_algo"]) == (algorithm, group, None)
    assert sorted(told["exclude_modules"]) == ["lm_head", "model.embed_tokens"]
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["quant_algo"], said["ignore"]) == (
        "modelopt",
        algorithm,
        told["exclude_modules"],
    )
    with checkpoint.open(source) as dense, checkpoint.open(out) as model:
        assert list(sorted(model)) == list(sorted(dense))
        for name in (f"{module}.weight", "model.layers.0.mlp.up_proj.weight"):
            expected = codecs.get(layout).encode(dense[name].decode())
            assert model[name].layout == expected.layout
            assert model[name].decode().tobytes() == expected.decode().tobytes()
        assert model["lm_head.weight"].decode().tobytes() == dense["lm_head.weight"].decode().tobytes()
    conversion.convert(out, tmp_path / "again", "keep", container="modelopt", check=True)
    assert stored(tmp_path / "again") == tensors
    assert (tmp_path / "again" / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert (tmp_path / "again" / "hf_quant_config.json").read_bytes() == (out / "hf_quant_config.json").read_bytes()


def test_both_configs_are_those_that_modelopt_writes(tmp_path: Path) -> None:
    """Of a Llama with mtq.NVFP4_DEFAULT_CFG, by export_hf_checkpoint of nvidia-modelopt 0.47.0."""
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": ("BF16", (2, 4), bytes(16)),
        **{f"model.layers.0.up.{key[3:]}": t for key, t in ALL.items() if key.startswith("nv.")},
        "model.norm.weight": ("BF16", (4,), bytes(8)),
        "lm_head.weight": ("BF16", (2, 4), bytes(16)),
    }
    producer = {"name": "modelopt", "version": "0.47.0"}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    groups = {"group_0": {"input_activations": four, "weights": four, "targets": ["Linear"]}}
    ignore = ["model.embed_tokens", "lm_head"]
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": SAYS})
    conversion.convert(path, tmp_path / "o", "keep", container="modelopt", check=True)
    told = json.loads((tmp_path / "o" / "hf_quant_config.json").read_text())
    assert told == {
        "producer": producer,
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ignore,
        },
    }  # fmt: skip
    assert json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"] == {
        "config_groups": groups, "ignore": ignore, "quant_algo": "NVFP4", "producer": producer,
        "quant_method": "modelopt",
    }  # fmt: skip
    assert stored(tmp_path / "o") == tensors


@pytest.mark.parametrize("algorithm", ["W4A8_NVFP4_FP8", "NVFP4_AWQ"])
def test_an_algorithm_of_other_numbers_keeps_its_name_with_its_numbers(tmp_path: Path, algorithm: str) -> None:
    tensors = {f"nv.{key[3:]}": t for key, t in ALL.items() if key.startswith("nv.")}
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": {**SAYS, "quant_algo": algorithm}})
    for layout, expected in (("keep", algorithm), ("fp8_row", "FP8_PER_CHANNEL_PER_TOKEN")):
        out = tmp_path / layout
        conversion.convert(path, out, layout, container="modelopt", check=True)
        told = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        assert told["quant_algo"] == expected
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_algo"] == expected


def test_several_algorithms_are_listed_by_layer(tmp_path: Path) -> None:
    path = foreign_folder(tmp_path / "m", ALL, {"quantization_config": SAYS})
    conversion.convert(path, tmp_path / "o", "keep", container="modelopt", check=True)
    told = json.loads((tmp_path / "o" / "hf_quant_config.json").read_text())["quantization"]
    layers = {
        "nv": {"quant_algo": "NVFP4", "group_size": 16}, "mx4": {"quant_algo": "W4A8_MXFP4_FP8", "group_size": 32},
        "mx8": {"quant_algo": "MXFP8", "group_size": 32}, "fp8": {"quant_algo": "FP8"},
        "rows": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    }  # fmt: skip
    assert (told["quant_algo"], told["quantized_layers"]) == ("MIXED_PRECISION", layers)
    assert told["kv_cache_quant_algo"] == "FP8"  # there is a k_scale
    said = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert said["quantized_layers"] == layers and said["kv_cache_scheme"]["num_bits"] == 8
    eight, four = {"dynamic": False, "num_bits": 8, "type": "float"}, {"dynamic": False, "num_bits": 4, "type": "float"}
    assert {tuple(g["targets"]): (g["input_activations"], g["weights"]) for g in said["config_groups"].values()} == {
        ("nv",): ({**four, "group_size": 16}, {**four, "group_size": 16}),
        ("mx4",): (eight, {**four, "group_size": 32}),
        ("mx8",): ({**eight, "group_size": 32}, {**eight, "group_size": 32}),
        ("fp8",): (eight, eight),
        ("rows",): (eight, {**eight, "strategy": "channel"}),
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"lm_head|experts": "keep", "embed": "nvfp4_modelopt"},
            r"model\.embed_tokens\.weight: an embedding, .* say --map '.*=keep'",
        ),
        ({"embed|lm_head": "keep"}, r"experts\.down_proj: 3 dimensions, a linear layer has 2; .* are nvfp4_rows"),
        ({"embed|lm_head": "keep", "experts": "q8_0", "down": "nvfp4_ct"}, r"NVIDIA ModelOpt holds .*, not nvfp4_ct"),
        ({".": "keep"}, "nothing"),
        ({"embed|experts": "keep", "lm_head": "nvfp4_rows"}, "nvfp4_rows is for stacks of experts"),
    ],
)
def test_what_modelopt_has_no_place_for_is_refused(tmp_path: Path, overrides: dict[str, str], message: str) -> None:
    with checkpoint.open(model_folder(tmp_path / "m")) as model, pytest.raises(PlanError, match=message):
        recipe = Recipe("nvfp4_modelopt", tuple(overrides.items()))
        conversion.plan_for(model, tmp_path / "o", recipe, "modelopt")


def test_experts_and_layers_stand_in_one_model(tmp_path: Path) -> None:
    overrides = {"embed|lm_head": "keep", "experts": "nvfp4_rows"}
    source, out = model_folder(tmp_path / "m"), tmp_path / "o"
    conversion.convert(source, out, "nvfp4_modelopt", overrides=overrides, container="modelopt", check=True)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = stored(out)
    assert [tensors[name + end][:2] for end in ("", "_weight_scale", "_weight_scale_2")] == [
        ("U8", (2, 32, 48)), ("F8_E4M3", (2, 4, 48)), ("F32", ()),
    ]  # fmt: skip
    with checkpoint.open(source) as dense, checkpoint.open(out) as model:
        expected = codecs.get("nvfp4_rows").encode(dense[name].decode())
        assert model[name].decode().tobytes() == expected.decode().tobytes()


FP8_CT = {  # as compressed-tensors 0.20.0 has it in its preset FP8
    "num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": "tensor", "dynamic": False,
    "observer": "static_minmax",
}  # fmt: skip
SCALE_OF_INPUTS = np.float32(0.3).tobytes()


@pytest.mark.parametrize(
    ("container", "layout", "called", "shape"),
    [
        ("compressed_tensors", "keep", "fp8.input_scale", (1,)),
        ("compressed_tensors", "fp8_row", "fp8.input_scale", (1,)),
        ("deepseek", "keep", "fp8.activation_scale", ()),
        ("modelopt", "keep", "fp8.input_scale", ()),
        ("modelopt", "fp8_row", "", ()),  # a scale for each token, found while the model runs
        ("modelopt", "nvfp4_modelopt", "", ()),  # 4-bit inputs have another
        ("compressed_tensors", "nvfp4_ct", "", ()),
        ("compressed_tensors", "mxfp4_pairs", "", ()),
        ("quark", "mxfp4_pairs", "", ()),
    ],
)
def test_scales_of_8_bit_inputs_go_where_a_reader_looks_for_them_or_are_left_out(
    tmp_path: Path, container: str, layout: str, called: str, shape: tuple[int, ...]
) -> None:
    tensors: dict[str, Tensor] = {
        **{name: t for name, t in ALL.items() if name.startswith("fp8.")},
        "fp8.input_scale": ("F32", (), SCALE_OF_INPUTS),
        "norm.weight": ("BF16", (4,), bytes(8)),
    }
    path, out = foreign_folder(tmp_path / "m", tensors, {"quantization_config": SAYS}), tmp_path / "o"
    report = conversion.convert(path, out, layout, container=container, check=True)
    found = {
        name: t for name, t in stored(out).items() if name.endswith(("input_scale", "_global_scale", "ation_scale"))
    }
    found.pop("fp8.weight_global_scale", None)
    assert found == ({called: ("F32", shape, SCALE_OF_INPUTS)} if called else {})
    assert bool(exporters.get(container).remarks(report.plan.steps)) is not bool(called)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    if container == "compressed_tensors":
        (group,) = said["config_groups"].values()
        assert group["input_activations"] == (FP8_CT if called else None)
    if container == "deepseek":
        assert said["activation_scheme"] == "static"
    if called:
        conversion.convert(out, tmp_path / "back", "fp8_tensor", container="modelopt", check=True)
        assert stored(tmp_path / "back")["fp8.input_scale"] == tensors["fp8.input_scale"]


def test_nvfp4_goes_through_gguf_and_back_without_a_changed_byte(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        **{name: t for name, t in ALL.items() if name.startswith("nv.")}, "norm.weight": ("BF16", (4,), bytes(8)),
    }  # fmt: skip
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": SAYS})
    conversion.convert(path, tmp_path / "m.gguf", "nvfp4", check=True)
    conversion.convert(tmp_path / "m.gguf", tmp_path / "o", "nvfp4_modelopt", container="modelopt", check=True)
    assert stored(tmp_path / "o") == tensors
