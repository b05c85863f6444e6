"""gpt-oss and AMD Quark: MXFP4 in two more folders, and transformers' own numbers for the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from packfmt import checkpoint, codecs, conversion
from packfmt.codec import Array
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import Extras, gpt_oss, quark
from packfmt.layout import DENSE
from packfmt.plan import Plan, Step
from tests.models import BF16, normal
from tests.outputs import save

F32 = np.float32
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
STAY = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def tensors(exponents: tuple[int, int] = (110, 130)) -> dict[str, Array]:
    """Two experts' packed weights of any bytes, a router and a norm."""
    rng = np.random.default_rng(0)
    return {
        GATE_UP + "_blocks": rng.integers(0, 256, (2, 64, 3, 16), np.uint8),
        GATE_UP + "_scales": rng.integers(*exponents, (2, 64, 3)).astype(np.uint8),
        GATE_UP + "_bias": normal(2, 64, dtype=BF16),
        DOWN + "_blocks": rng.integers(0, 256, (2, 96, 1, 16), np.uint8),
        DOWN + "_scales": rng.integers(*exponents, (2, 96, 1)).astype(np.uint8),
        "model.layers.0.mlp.router.weight": normal(2, 96, dtype=BF16),
        "model.norm.weight": normal(96, dtype=BF16),
    }


def folder(path: Path, found: dict[str, Array], **says: Any) -> Path:
    path.mkdir()
    save_file(found, path / "model.safetensors")
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": STAY} | says
    (path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "quantization_config": quantised}))
    return path


def by_hand(blocks: Array, scales: Array) -> Array:
    """Low half first, times two to the scale less 127."""
    numbers = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], -1).reshape(*scales.shape, 32)
    return np.ldexp(numbers, scales[..., None].astype(np.int32) - 127).reshape(*scales.shape[:2], -1)


def test_experts_are_read_as_outputs_by_inputs(tmp_path: Path) -> None:
    found = tensors()
    with checkpoint.open(folder(tmp_path / "m", found)) as model:
        assert set(model) == {
            GATE_UP, DOWN, GATE_UP + "_bias", "model.layers.0.mlp.router.weight", "model.norm.weight",
        }  # fmt: skip
        for name, shape in ((GATE_UP, (2, 64, 96)), (DOWN, (2, 96, 32))):
            assert (model.index[name].shape, model[name].layout.name) == (shape, "mxfp4_pairs")
            numbers = by_hand(found[name + "_blocks"], found[name + "_scales"])
            assert model[name].decode().tobytes() == numbers.tobytes()


def test_the_same_bytes_come_back(tmp_path: Path) -> None:
    source = folder(tmp_path / "m", tensors(), extra=1)
    for target, container in ((tmp_path / "native", ""), (tmp_path / "back", "gpt-oss")):
        conversion.convert(source, target, "keep", container=container, check=True)
        source = target
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "back"))
    assert {n: (a.shape, a.tobytes()) for n, a in before.items()} == {
        n: (a.shape, a.tobytes()) for n, a in after.items()
    }
    says = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert says == {"quant_method": "mxfp4", "modules_to_not_convert": STAY}  # from packfmt's, which says no more
    conversion.convert(tmp_path / "m", tmp_path / "direct", "keep", container="gpt_oss")
    assert json.loads((tmp_path / "direct" / "config.json").read_text())["quantization_config"]["extra"] == 1


def test_what_is_no_expert_is_refused(tmp_path: Path) -> None:
    layout = codecs.get("mxfp4_pairs").layout
    for shape, before, target, message in (
        ((64, 96), layout, layout, "2 dimensions, experts have 3"),
        ((2, 64, 96), DENSE["bf16"], layout, "dense experts have rows and columns swapped"),
        ((64, 96), DENSE["bf16"], DENSE["bf16"], "nothing would be mxfp4_pairs"),
        ((2, 64, 96), layout, codecs.get("mxfp4").layout, "gpt-oss holds mxfp4_pairs and dense tensors, not mxfp4"),
    ):
        plan = Plan("m", "gpt_oss", (Step(GATE_UP, shape, "bfloat16", before, target, "keep", ""),))
        with pytest.raises(PlanError, match=message):
            save(gpt_oss.DIALECT, tmp_path / "out", plan, [], Extras({}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "array", "message", "rule"),
    [
        (GATE_UP + "_scales", None, "gate_up_proj_scales' is missing", "PF110"),
        (
            GATE_UP + "_scales",
            np.zeros((2, 64, 2), np.uint8),
            r"_scales: is \[2, 64, 2\], .* needs \[2, 64, 3\]",
            "PF106",
        ),
        (GATE_UP + "_scales", np.zeros((2, 64, 3), np.int8), r"_scales: is I8, mxfp4_pairs needs U8", "PF105"),
        (GATE_UP + "_blocks", np.zeros((2, 64, 3, 8), np.uint8), r"needs blocks of 16 bytes", "PF106"),
        (GATE_UP, np.zeros(3, F32), r"gate_up_proj is stored twice", "PF104"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, array: Array | None, message: str, rule: str) -> None:
    found = tensors()
    if array is None:
        del found[name]
    else:
        found[name] = array
    with pytest.raises(ContainerError, match=message) as error:
        checkpoint.open(folder(tmp_path / "m", found))
    assert error.value.rule == rule


# ---------------------------------------------------------------- Quark


def quark_folder(path: Path) -> Path:
    rng = np.random.default_rng(1)
    found = {
        "model.layers.0.q_proj.weight": rng.integers(0, 256, (64, 48), np.uint8),
        "model.layers.0.q_proj.weight_scale": rng.integers(100, 130, (64, 3)).astype(np.uint8),
        "model.norm.weight": normal(96, dtype=BF16),
    }
    return folder(path, found, quant_method="quark", version="0.11", exclude=["lm_head"])


def test_quark_s_weights_are_read_and_written(tmp_path: Path) -> None:
    source = quark_folder(tmp_path / "m")
    found = load_file(source / "model.safetensors")
    name = "model.layers.0.q_proj.weight"
    with checkpoint.open(source) as model:
        numbers = by_hand(found[name].reshape(1, 64, 3, 16), found[name + "_scale"][None])[0]
        assert model[name].decode().tobytes() == numbers.tobytes()
    conversion.convert(source, tmp_path / "ct", "keep", container="compressed-tensors", check=True)
    conversion.convert(tmp_path / "ct", tmp_path / "back", "keep", container="quark", check=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in back.items()}
    says = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert says["global_quant_config"]["weight"] == quark.SPEC
    assert (says["global_quant_config"]["input_tensors"], says["exclude"]) == (None, ["lm_head"])


def test_other_kinds_of_quark_s_say_why_they_are_not_read(tmp_path: Path) -> None:
    found = {"a.weight": np.zeros((4, 32), np.int8), "a.weight_scale": np.ones(4, F32)}
    why = r"a\.weight is I8, with scales in F32, of which packfmt reads 4-bit"
    model = checkpoint.open(folder(tmp_path / "m", found, quant_method="quark"))
    with model, pytest.raises(ContainerError, match=why):
        model["a.weight"]


# ---------------------------------------------------------------- transformers


@pytest.mark.clients
@pytest.mark.parametrize("exponents", [(110, 130), (0, 9), (240, 255)])
def test_numbers_are_those_of_transformers(tmp_path: Path, exponents: tuple[int, int]) -> None:
    """It swaps the last two axes and gives bfloat16. Not 255, which is NaN here and infinity there."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    theirs = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is not installed")
    found = tensors(exponents)
    with checkpoint.open(folder(tmp_path / "m", found)) as model:
        for name in (GATE_UP, DOWN):
            blocks, scales = (torch.tensor(found[name + end]) for end in ("_blocks", "_scales"))
            numbers = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
            ours = model[name].decode().transpose(0, 2, 1)
            assert numbers.shape == ours.shape
            assert numbers.float().numpy().tobytes() == ours.astype(BF16).astype(F32).tobytes()


@pytest.mark.clients
def test_transformers_loads_the_folder_and_has_our_weights(tmp_path: Path) -> None:
    """A small gpt-oss, which transformers makes dense where there is no GPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, on which transformers keeps the weights packed")
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "packed")
    found = load_file(tmp_path / "packed" / "model.safetensors")
    rng = np.random.default_rng(2)
    for name in [n for n in found if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = found.pop(name).shape
        found[name + "_blocks"] = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        found[name + "_scales"] = rng.integers(118, 124, (experts, outputs, inputs // 32)).astype(np.uint8)
    save_file(found, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    says = json.loads((tmp_path / "packed" / "config.json").read_text())
    says["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": STAY}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(says))
    conversion.convert(tmp_path / "packed", tmp_path / "native", "keep", check=True)
    out = tmp_path / "out"
    conversion.convert(tmp_path / "native", out, "keep", container="gpt-oss", check=True)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    theirs = loaded.state_dict()
    with checkpoint.open(out) as ours:
        experts = [n for n, i in ours.index.items() if i.kind == "mxfp4 in blocks"]
        assert len(experts) == 4
        for name in experts:
            numbers = ours[name].decode().transpose(0, 2, 1).astype(BF16).astype(F32)
            assert theirs[name].float().numpy().tobytes() == numbers.tobytes()
