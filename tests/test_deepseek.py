"""DeepSeek's folders: 8-bit floats in tiles, 4-bit floats in experts, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import checkpoint, codecs, conversion
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import deepseek
from packfmt.plan import Recipe
from tests.models import BF16, folder, normal
from tests.test_modelopt import E2M1, Tensor, e4m3, foreign_folder, nibbles, same_numbers, stored

F32 = np.float32
V3 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
V4 = {**V3, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}


def random(count: int, seed: int) -> bytes:
    """Bytes of codes, none of which is NaN in float8_e4m3fn."""
    found = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    return np.where(found & 127 == 127, 0, found).astype(np.uint8).tobytes()


def tiles(scale: np.ndarray, rows: int, cols: int) -> np.ndarray:
    return scale.repeat(128, 0)[:rows].repeat(128, 1)[:, :cols]


ROWS, COLS = 200, 320  # 2 x 3 tiles, the last of each smaller
CODES = random(ROWS * COLS, 1)
SCALES = np.array([[1.5, 2**-10, 0.3], [3, 1, 7e-3]], F32)
EXPONENTS = np.array([[127, 126, 120], [128, 100, 129]], np.uint8)
FOURS, OF_FOURS = random(8 * 32, 2), np.random.default_rng(3).integers(100, 140, (8, 2), np.uint8)
V3_TENSORS: dict[str, Tensor] = {
    "a.weight": ("F8_E4M3", (ROWS, COLS), CODES),
    "a.weight_scale_inv": ("F32", (2, 3), SCALES.tobytes()),
    "norm.weight": ("BF16", (4,), bytes(8)),
    "plain.weight": ("F8_E4M3", (2, 2), bytes(4)),
}
V4_TENSORS: dict[str, Tensor] = {
    "a.weight": ("F8_E4M3", (ROWS, COLS), CODES),
    "a.scale": ("F8_E8M0", (2, 3), EXPONENTS.tobytes()),
    "experts.0.w1.weight": ("I8", (8, 32), FOURS),
    "experts.0.w1.scale": ("F8_E8M0", (8, 2), OF_FOURS.tobytes()),
    "hc_attn.scale": ("F32", (3,), bytes(12)),
    "norm.weight": ("BF16", (4,), bytes(8)),
    "norm.scale": ("F32", (4,), bytes(16)),
}
EIGHTS = e4m3(CODES).reshape(ROWS, COLS)


# ---------------------------------------------------------------- reading


def test_a_scale_that_is_called_inverse_multiplies_its_tile(tmp_path: Path) -> None:
    with checkpoint.open(foreign_folder(tmp_path / "m", V3_TENSORS, {"quantization_config": V3})) as model:
        assert list(model) == ["a.weight", "norm.weight", "plain.weight"]
        assert model.index["a.weight"].layout == codecs.get("fp8_block").layout
        assert model.index["a.weight"].nbytes == ROWS * COLS + 4 * 6
        assert same_numbers(model["a.weight"].decode(), EIGHTS * tiles(SCALES, ROWS, COLS))
        assert model.index["plain.weight"].kind == "F8_E4M3"  # without a scale: numbers as they are


@pytest.mark.parametrize("dtype", ["I8", "F4"])
def test_version_4_has_powers_of_two_and_experts_in_four_bits(tmp_path: Path, dtype: str) -> None:
    tensors = V4_TENSORS | {"experts.0.w1.weight": (dtype, (8, 32 if dtype == "I8" else 64), FOURS)}
    with checkpoint.open(foreign_folder(tmp_path / "m", tensors, {"quantization_config": V4})) as model:
        assert sorted(model) == ["a.weight", "experts.0.w1.weight", "hc_attn.scale", "norm.scale", "norm.weight"]
        assert model.index["a.weight"].layout == codecs.get("fp8_block_e8m0").layout
        powers = np.ldexp(F32(1), EXPONENTS.astype(int) - 127)
        assert same_numbers(model["a.weight"].decode(), EIGHTS * tiles(powers, ROWS, COLS))
        info = model.index["experts.0.w1.weight"]
        assert info.layout == codecs.get("mxfp4_e8m0").layout and info.shape == (8, 64)
        powers = np.ldexp(F32(1), OF_FOURS.astype(int) - 127).repeat(32, 1)
        assert same_numbers(model["experts.0.w1.weight"].decode(), E2M1[nibbles(FOURS)].reshape(8, 64) * powers)


def test_a_tensor_with_one_scale_has_no_blocks(tmp_path: Path) -> None:
    says = {**V3, "weight_block_size": None, "activation_scheme": "static"}
    tensors: dict[str, Tensor] = {
        "a.weight": V3_TENSORS["a.weight"], "a.weight_scale_inv": ("F32", (), SCALES[:1, :1].tobytes()),
        "a.activation_scale": ("F32", (), SCALES[:1, :1].tobytes()),
    }  # fmt: skip
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": says})
    with checkpoint.open(path) as model:
        assert model.index["a.weight"].layout == codecs.get("fp8_tensor").layout
        assert same_numbers(model["a.weight"].decode(), EIGHTS * F32(1.5))
    conversion.convert(path, tmp_path / "o", "keep", container="deepseek", check=True)
    assert stored(tmp_path / "o") == tensors
    said = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert (said["weight_block_size"], said["activation_scheme"]) == (None, "static")


VLLM = {"quant_method": "fp8", "activation_scheme": "static"}
OF_ROWS = np.random.default_rng(4).uniform(0.01, 2, ROWS).astype(F32)


@pytest.mark.parametrize(
    ("dtype", "shape", "layout"),
    [
        ("F32", (), "fp8_tensor"),
        ("F32", (1,), "fp8_tensor"),
        ("BF16", (1,), "fp8_tensor_bf16"),
        ("F32", (ROWS,), "fp8_row"),
        ("F32", (ROWS, 1), "fp8_row"),
        ("BF16", (ROWS, 1), "fp8_row_bf16"),
    ],
)
def test_a_scale_that_is_not_called_inverse_multiplies_as_well(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], layout: str
) -> None:
    """AutoFP8's folders, which vLLM reads under the same quant_method."""
    scale = OF_ROWS[: int(np.prod(shape))].astype(F32 if dtype == "F32" else BF16)
    tensors: dict[str, Tensor] = {
        "a.weight": V3_TENSORS["a.weight"],
        "a.weight_scale": (dtype, shape, scale.tobytes()),
        "gain.weight": ("BF16", (4,), bytes(8)),  # dense, and its neighbour only happens to be called so
        "gain.weight_scale": ("F32", (1,), bytes(4)),
    }
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": VLLM})
    expected = EIGHTS * scale.astype(F32).reshape(-1, 1)
    with checkpoint.open(path) as model:
        assert set(model) == {"a.weight", "gain.weight", "gain.weight_scale"}
        assert model.index["a.weight"].layout == codecs.get(layout).layout
        assert same_numbers(model["a.weight"].decode(), expected)
        if layout != "fp8_tensor":
            with pytest.raises(PlanError, match=f"{layout} is read from such folders, not written; say fp8_tensor"):
                conversion.plan_for(model, tmp_path / "o", Recipe("keep"), "deepseek")
    conversion.convert(path, tmp_path / "dense", "dense")
    with checkpoint.open(tmp_path / "dense") as model:
        assert model["a.weight"].decode().tobytes() == (expected.astype(BF16)).astype(F32).tobytes()
    if layout == "fp8_tensor":
        conversion.convert(path, tmp_path / "o", "keep", container="deepseek", check=True)
        assert stored(tmp_path / "o")["a.weight_scale_inv"] == ("F32", (), scale.tobytes())


def test_scales_of_inputs_are_called_as_transformers_calls_them_or_left_out(tmp_path: Path) -> None:
    """Beside one scale a tensor a model may have them; beside tiles inputs get theirs while the model runs."""
    tensors: dict[str, Tensor] = {
        "a.weight": V3_TENSORS["a.weight"],
        "a.weight_scale": ("F32", (1,), OF_ROWS[:1].tobytes()),
        "a.input_scale": ("F32", (1,), OF_ROWS[1:2].tobytes()),
    }
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": VLLM})
    for layout, expected, scheme in (
        ("keep", {"a.activation_scale": ("F32", (), OF_ROWS[1:2].tobytes())}, "static"),
        ("fp8_block", {}, "dynamic"),
        ("mxfp4_e8m0", {}, "dynamic"),
    ):
        out = tmp_path / layout
        report = conversion.convert(path, out, layout, container="deepseek", check=True)
        assert {name: t for name, t in stored(out).items() if "weight" not in name and name != "a.scale"} == expected
        assert json.loads((out / "config.json").read_text())["quantization_config"]["activation_scheme"] == scheme
        told = deepseek.DIALECT.remarks(report.plan.steps)
        assert told == ([] if expected else ["a.input_scale: " + LEFT_OUT])


LEFT_OUT = "left out, as a scale of inputs has no place beside the weight it would have there"


@pytest.mark.parametrize(
    ("tensors", "says", "config"),
    [(V3_TENSORS, V3, {}), (V4_TENSORS, V4, {"scale_fmt": "ue8m0", "expert_dtype": "fp4"})],
)
def test_kept_tensors_keep_every_byte(
    tmp_path: Path, tensors: dict[str, Tensor], says: dict[str, Any], config: dict[str, str]
) -> None:
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": says})
    conversion.convert(path, tmp_path / "o", "keep", container="deepseek", check=True)
    assert stored(tmp_path / "o") == tensors
    said = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    dense = [name.removesuffix(".weight") for name in ("plain.weight",) if name in tensors]
    assert said == {**V3, **config, "modules_to_not_convert": [*dense, "lm_head"]}


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    out = {**V3_TENSORS, **{name.replace("__", "."): t for name, t in tensors.items()}}
    return {name: t for name, t in out.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "says", "message", "rule"),
    [
        (V3_TENSORS, {"weight_block_size": [64, 64]}, r"size is \[64, 64\], and only \[128, 128\]", "PF105"),
        (V3_TENSORS, {"weight_block_size": "128"}, "weight_block_size is '128'", "PF105"),
        (
            changed(a__weight_scale_inv=("F32", (3, 2), bytes(24))), {},
            r"a\.weight_scale_inv: is \[3, 2\], a fp8_block weight of \[200, 320\] needs \[2, 3\]", "PF106",
        ),
        (
            changed(a__weight_scale_inv=None, a__scale=("F8_E8M0", (2, 2), bytes(4))), {},
            r"a\.scale: is \[2, 2\], a fp8_block_e8m0 weight", "PF106",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(
    tmp_path: Path, tensors: dict[str, Tensor], says: dict[str, Any], message: str, rule: str
) -> None:
    path = foreign_folder(tmp_path / "m", tensors, {"quantization_config": {**V3, **says}})
    with pytest.raises(ContainerError, match=message) as caught:
        checkpoint.open(path)
    assert caught.value.rule == rule and str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("tensors", "name", "why"),
    [
        (
            changed(a__weight_scale_inv=("BF16", (2, 3), bytes(12))), "a.weight",
            "with a weight_scale_inv in BF16 [2, 3] beside it; no such",
        ),
        (
            changed(a__weight_scale_inv=None, a__scale=("F32", (2, 3), bytes(24))), "a.weight",
            "with a scale in F32 [2, 3] beside it; no such weight is read yet",
        ),
        (
            changed(a__weight_scale_inv=None, a__weight_scale=("F32", (3,), bytes(12))), "a.weight",
            "with a weight_scale in F32 [3] beside it; no such",
        ),
        (
            changed(a__weight_scale_inv=None, a__weight_scale=("F8_E8M0", (), bytes(1))), "a.weight",
            "with a weight_scale in F8_E8M0 [] beside it; no such",
        ),
        (
            changed(plain__weight=("I8", (2, 2), bytes(4)), plain__weight_scale=("F32", (), bytes(4))), "plain.weight",
            "with a weight_scale in F32 [] beside it; no such",
        ),
        (
            changed(experts__up=("F8_E4M3", (2, 4, 4), bytes(32)), experts__up_scale_inv=("F32", (2, 1, 1), bytes(8))),
            "experts.up", "with experts.up_scale_inv beside it, a stack of experts, which is not read yet",
        ),
    ],
)  # fmt: skip
def test_what_is_not_read_is_shown_with_a_reason(
    tmp_path: Path, tensors: dict[str, Tensor], name: str, why: str
) -> None:
    with checkpoint.open(foreign_folder(tmp_path / "m", tensors, {"quantization_config": V3})) as model:
        assert model.index[name].layout is None and why in model.index[name].why
        with pytest.raises(ContainerError, match=name):
            model[name]


@given(blocks=st.none() | st.lists(st.sampled_from([128, 64, None, "128", 128.5]), max_size=3) | st.text(max_size=3))
def test_any_block_size_gives_an_error_or_the_same_weights(tmp_path_factory: Any, blocks: Any) -> None:
    config = {"quantization_config": {**V3, "weight_block_size": blocks}}
    path = foreign_folder(tmp_path_factory.mktemp("any") / "m", V3_TENSORS, config)
    try:
        model = checkpoint.open(path)
    except ContainerError as error:
        assert error.rule == "PF105" and blocks not in (None, [128, 128])
        return
    with model:
        assert blocks in (None, [128, 128]) and model["a.weight"].layout.name == "fp8_block"


# ---------------------------------------------------------------- writing


def model_folder(path: Path) -> Path:
    return folder(
        path,
        {
            "model.embed_tokens.weight": normal(256, 128, seed=1),
            "model.layers.0.q_proj.weight": normal(300, 128, seed=2),
            "model.layers.0.experts.0.up_proj.weight": normal(128, 256, seed=3),
            "model.norm.weight": normal(128, seed=4),
            "lm_head.weight": normal(256, 128, seed=5),
        },
    )


KEPT = {"embed|lm_head": "keep"}


@pytest.mark.parametrize(
    ("layout", "overrides", "kinds"),
    [
        ("fp8_block", {}, {"weight": ("F8_E4M3", (300, 128)), "weight_scale_inv": ("F32", (3, 1))}),
        ("fp8_tensor", {}, {"weight": ("F8_E4M3", (300, 128)), "weight_scale_inv": ("F32", ())}),
        (
            "fp8_block_e8m0", {"experts": "mxfp4_e8m0"},
            {"weight": ("F8_E4M3", (300, 128)), "scale": ("F8_E8M0", (3, 1))},
        ),
        ("mxfp4_e8m0", {}, {"weight": ("I8", (300, 64)), "scale": ("F8_E8M0", (300, 4))}),
    ],
)  # fmt: skip
def test_a_layout_is_written_as_deepseek_stores_it_and_read_again(
    tmp_path: Path, layout: str, overrides: dict[str, str], kinds: dict[str, Any]
) -> None:
    source, out, module = model_folder(tmp_path / "m"), tmp_path / "o", "model.layers.0.q_proj"
    conversion.convert(source, out, layout, overrides={**KEPT, **overrides}, container="deepseek", check=True)
    found = {n.removeprefix(module + "."): t[:2] for n, t in stored(out).items() if n.startswith(module)}
    assert found == kinds
    with checkpoint.open(source) as dense, checkpoint.open(out) as model:
        assert sorted(model) == sorted(dense)
        for name, wanted in (
            (f"{module}.weight", layout),
            ("model.layers.0.experts.0.up_proj.weight", overrides.get("experts", layout)),
        ):
            expected = codecs.get(wanted).encode(dense[name].decode())
            assert model[name].layout == expected.layout
            assert model[name].decode().tobytes() == expected.decode().tobytes()


@pytest.mark.parametrize(
    ("to", "overrides", "message"),
    [
        ("fp8_block", {"embed": "fp8_block"}, r"embed_tokens\.weight: an embedding, which stays dense; say --map"),
        ("fp8_block", {**KEPT, "experts": "fp8_tensor"}, "fp8_tensor and blocks in one model"),
        ("fp8_block", {**KEPT, "experts": "mxfp4_e8m0"}, "a model has one scale_fmt; say fp8_block_e8m0"),
        ("fp8_block", {**KEPT, "experts": "mxfp4_pairs"}, "DeepSeek's form holds fp8_block, .*, not mxfp4_pairs"),
        ("keep", {}, "nothing would be fp8_block"),
    ],
)
def test_what_deepseek_s_form_has_no_place_for_is_refused(
    tmp_path: Path, to: str, overrides: dict[str, str], message: str
) -> None:
    with checkpoint.open(model_folder(tmp_path / "m")) as model, pytest.raises(PlanError, match=message):
        conversion.plan_for(model, tmp_path / "o", Recipe(to, tuple(overrides.items())), "deepseek")


# ---------------------------------------------------------------- with transformers


@pytest.mark.clients
@pytest.mark.parametrize("layout", ["fp8_block", "fp8_block_e8m0", "mxfp4_e8m0"])
def test_transformers_loads_what_is_written(tmp_path: Path, layout: str) -> None:
    """It makes the weights dense on a CPU: the numbers that packfmt decodes, in the model's dtype."""
    torch = pytest.importorskip("torch", reason="needs torch, as `pip install packfmt[clients]` brings it")
    transformers = pytest.importorskip("transformers", reason="needs transformers, as packfmt[clients] brings it")
    pytest.importorskip("accelerate", reason="transformers' FP8 needs accelerate, as packfmt[clients] brings it")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, dtype="float32",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).float().save_pretrained(tmp_path / "m")
    out = tmp_path / "o"
    conversion.convert(tmp_path / "m", out, layout, overrides=KEPT, container="deepseek", check=True)
    told = transformers.FineGrainedFP8Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, quantization_config=told, dtype=torch.float32)
    theirs = {name: t.numpy() for name, t in loaded.state_dict().items()}
    with checkpoint.open(out) as model:
        packed = [name for name, info in model.index.items() if info.layout == codecs.get(layout).layout]
        assert len(packed) == 7
        for name in model:
            assert same_numbers(theirs[name], model[name].decode()), name


@pytest.mark.clients
def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    """Its FP8 quantizer's own tensors: F8_E4M3 and weight_scale_inv."""
    torch = pytest.importorskip("torch", reason="needs torch, as `pip install packfmt[clients]` brings it")
    fp8 = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="needs transformers, as packfmt[clients] brings it"
    )
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors, with torch")

    class Quantizer:
        class quantization_config:
            weight_block_size, scale_fmt = (128, 128), "float"

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    made = fp8.Fp8Quantize(Quantizer()).convert({"a.weight": [weight]})
    (tmp_path / "m").mkdir()
    safetensors.save_file(
        {name: t[0] if isinstance(t, list) else t for name, t in made.items()}, tmp_path / "m" / "model.safetensors"
    )
    (tmp_path / "m" / "config.json").write_text(json.dumps({"quantization_config": V3}))
    back = fp8.Fp8Dequantize(Quantizer())._dequantize_one(
        made["a.weight"], made["a.weight_scale_inv"], output_dtype=torch.float32
    )
    with checkpoint.open(tmp_path / "m") as model:
        assert model.index["a.weight"].layout == codecs.get("fp8_block").layout
        assert same_numbers(model["a.weight"].decode(), back.numpy())
