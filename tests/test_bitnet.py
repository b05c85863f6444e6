"""BitNet: its bytes in GGUF and in Hugging Face's folders, and transformers as the reader of what we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from packfmt import checkpoint, codecs, conversion
from packfmt.codec import PackedTensor
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import Extras, bitnet
from packfmt.layout import DENSE
from packfmt.plan import Plan, Step
from tests.models import BF16
from tests.outputs import save

F32 = np.float32
CLASSES = {"bitnet": "autobitlinear", "bitnet_divide": "bitlinear"}
NAMES = ("bitnet", "bitnet_divide", "i2_s", "i2_s_arm", "q2_0", "q1_0")

bitnets = pytest.mark.parametrize("name", CLASSES)


def trits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(F32)


def golden_trits(count: int) -> np.ndarray:
    i = np.arange(count)
    return ((i * i + i // 7) % 3 - 1).astype(F32)


def raw(packed: PackedTensor) -> bytes:
    return b"".join(c.tobytes() for c in packed.components.values())


# ---------------------------------------------------------------- bytes and numbers


def test_golden_bytes() -> None:
    """Vectors of a NumPy packer written from the same sources by somebody else; t = (i * i + i // 7) % 3 - 1."""
    half = F32(0.5)
    i2_s = "2556600664400aa88448899558811990022aa112222556600664400aa8844889" + "0000003f"
    assert raw(codecs.get("i2_s").encode(golden_trits(128)[None] * half)).hex() == i2_s
    q2_0 = codecs.get("q2_0")
    for encoder in q2_0.encoders:
        assert raw(q2_0.encode(golden_trits(64)[None] * half, encoder)).hex() == "00381485a6892050149a26824051689a0802"
    signs = np.where(golden_trits(128) >= 0, half, -half)[None]
    assert raw(codecs.get("q1_0").encode(signs)).hex() == "0038b6bfc4f697d8fe12db5f62fb4b6c7f89"


def test_the_example_of_transformers_is_unpacked() -> None:
    """The docstring of unpack_weights, transformers 5.23.0, integrations/bitnet.py."""
    packed = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    scale = np.array([1], BF16)
    tensor = PackedTensor(codecs.get("bitnet").layout, (8, 2), {"weight": packed, "weight_scale": scale})
    expected = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    assert tensor.decode().tolist() == expected


@pytest.mark.parametrize("rows", [*range(9), 10, 16])
@bitnets
def test_rows_that_fill_no_byte_leave_zeros(name: str, rows: int) -> None:
    weight = trits(rows, 5, seed=rows)
    packed = codecs.get(name).encode(weight)
    quarter = -(-rows // 4)
    expected = np.zeros((quarter, 5), np.uint8)
    for row in range(rows):
        for col in range(5):
            expected[row % quarter, col] |= int(weight[row, col] + 1) << 2 * (row // quarter)
    assert packed.components["weight"].tobytes() == expected.tobytes()
    assert packed.decode().tobytes() == (weight + F32(0)).tobytes()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_weights_that_are_ternary_already_stay_what_they_are(name: str, data: st.DataObject) -> None:
    codec = codecs.get(name)
    rows = data.draw(st.integers(1, 5))
    step = F32(data.draw(st.sampled_from([1, 0.5, 0.0703125, 3, 2.0**-9])))  # bfloat16 and float16 have it
    weight = trits(rows, 128, seed=rows) if name != "q1_0" else trits(rows, 128, seed=rows) * 0 + 1
    weight *= step if name != "bitnet_divide" else F32(1) / step
    assert codec.encode(weight, lossless=True).decode().tobytes() == (weight + F32(0)).tobytes()


def test_a_scale_that_divides_divides() -> None:
    packed = codecs.get("bitnet_divide").encode(trits(4, 8))
    third = PackedTensor(
        packed.layout, (4, 8), {**packed.components, "weight_scale": np.array([3], BF16)}
    )  # 1/3 is no product with a bfloat16
    assert third.decode().tobytes() == (trits(4, 8) / F32(3) + F32(0)).tobytes()


@pytest.mark.parametrize("name", ["bitnet", "bitnet_divide", "i2_s", "q2_0"])
def test_the_default_encoder_errs_no_more_than_any_other(name: str) -> None:
    codec = codecs.get(name)
    for seed, weight in enumerate((np.random.default_rng(1).normal(0, 0.02, (64, 256)), trits(64, 256) ** 3 / 7)):
        decoded = {encoder: codec.encode(weight.astype(F32), encoder).decode() for encoder in codec.encoders}
        errors = {encoder: float(np.square(numbers - weight).sum()) for encoder, numbers in decoded.items()}
        assert errors["best"] <= min(errors.values()) * 1.001, (seed, errors)  # a bfloat16 scale is 0.4 % off at most


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_zero_are_zero(name: str) -> None:
    for encoder in codecs.get(name).encoders:
        assert not codecs.get(name).encode(np.zeros((4, 128), F32), encoder).decode().any()


def test_absmean_is_the_rule_of_the_paper() -> None:
    """gamma = mean |w|, here exact; steps are w / gamma, rounded, cut to -1 .. 1."""
    weight = np.tile(np.array([-4, -1.5, -1, 0, 0.5, 1, 1.5, 2.5], F32), (4, 1))
    steps = [-1, -1, -1, 0, 0, 1, 1, 1]
    packed = codecs.get("bitnet").encode(weight, "absmean")
    assert packed.components["weight_scale"].astype(F32) == [1.5]
    assert (packed.unpack()["codes"][0].astype(int) - 1).tolist() == steps
    packed = codecs.get("bitnet_divide").encode(weight, "absmean")
    assert packed.components["weight_scale"] == np.array([1 / 1.5], BF16)
    assert (packed.unpack()["codes"][0].astype(int) - 1).tolist() == steps


def test_bitnet_cpp_takes_the_peak_and_the_signs() -> None:
    """quantize_i2_s compares in double: 1e-6 itself, as float32, is below it."""
    near = np.nextafter(F32(1e-6), F32(1))
    weight = np.zeros((1, 128), F32)
    weight[0, :6] = 3, -0.1, 1e-6, -1e-6, near, -near
    packed = codecs.get("i2_s").encode(weight, "ggml")
    assert packed.components["scale"].tolist() == [3]
    assert (packed.unpack()["codes"][0, :7].astype(int) - 1).tolist() == [1, -1, 0, 0, 1, -1, 0]


def test_a_scale_beyond_bfloat16_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"bitnet: the scale 3.4028.* overflows bfloat16"):
        codecs.get("bitnet").encode(np.full((4, 4), np.finfo(F32).max, F32))
    with pytest.raises(LayoutError, match=r"bitnet_divide: the scale .* overflows bfloat16"):
        codecs.get("bitnet_divide").encode(np.full((4, 4), 2.0**-140, F32))


# ---------------------------------------------------------------- the folder


def dense_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {
        "model.embed_tokens.weight": (96, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.up_proj.bias": (96,),
        "model.norm.weight": (64,),
    }
    return {name: rng.normal(0, 0.02, shape).astype(BF16) for name, shape in shapes.items()}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense"
    path.mkdir()
    save_file(dense_tensors(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    (path / "tokenizer.json").write_text("{}")
    return path


def to_bitnet(source: Path, target: Path, name: str, **rules: str) -> Path:
    overrides = {"embed_tokens": "keep", **rules}
    conversion.convert(source, target, name, overrides=overrides, container="bitnet", check=True)
    return target


@bitnets
def test_the_folder_has_hugging_face_s_tensors_and_config(dense: Path, tmp_path: Path, name: str) -> None:
    out = to_bitnet(dense, tmp_path / "out", name)
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "bitnet",
        "linear_class": CLASSES[name],
        "quantization_mode": "offline",
        "modules_to_not_convert": ["model.embed_tokens", "lm_head"],
    }
    assert config == {"model_type": "llama", "hidden_size": 64}
    found, before = load_file(out / "model.safetensors"), dense_tensors()
    up = "model.layers.0.mlp.up_proj.weight"
    assert (found[up].dtype, found[up].shape) == (np.uint8, (24, 64))
    assert (found[up + "_scale"].dtype, found[up + "_scale"].shape) == (BF16, (1,))
    assert len(found) == len(before) + 2
    assert all(found[n].tobytes() == before[n].tobytes() for n in before if found[n].dtype == BF16)
    expected = codecs.get(name).encode(before[up])
    with checkpoint.open(out) as model:
        assert (model.index[up].kind, model.index[up].dtype) == ("U8 with a scale", "bfloat16")
        assert model[up].layout == expected.layout
        assert raw(model[up]) == raw(expected)
        assert up + "_scale" not in model
        assert model.index[up].nbytes == 24 * 64 + 2


@bitnets
def test_a_folder_of_hugging_face_s_becomes_anything(dense: Path, tmp_path: Path, name: str) -> None:
    out = to_bitnet(dense, tmp_path / "out", name)
    with checkpoint.open(out) as model:
        weights = {n: t.decode().tobytes() for n, t in model.items()}
    conversion.convert(out, tmp_path / "again", "keep", container="bitnet")
    theirs, ours = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert {n: a.tobytes() for n, a in theirs.items()} == {n: a.tobytes() for n, a in ours.items()}
    configs = [json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "again")]
    for config in configs:
        config["quantization_config"]["modules_to_not_convert"].sort()
    assert configs[0] == configs[1]
    conversion.convert(out, tmp_path / "ours", "keep", check=True)
    with checkpoint.open(tmp_path / "ours") as model:
        assert {n: t.decode().tobytes() for n, t in model.items()} == weights
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "packfmt"


def test_one_model_in_every_container_has_the_same_numbers(tmp_path: Path) -> None:
    """BitNet's uint8 -> I2_S -> TQ2_0 -> BitNet's uint8: repacked, and nothing rounded."""
    path = tmp_path / "dense"
    path.mkdir()
    weight = (trits(64, 256) * F32(0.0703125)).astype(BF16)
    save_file({"a.proj.weight": weight, "norm.weight": np.ones(8, BF16)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    steps = [
        ("bitnet", "first", "bitnet"),
        ("i2_s", "i.gguf", ""),
        ("tq2_0", "t.gguf", ""),
        ("bitnet", "last", "bitnet"),
    ]
    source = path
    for layout, name, container in steps:
        report = conversion.convert(source, tmp_path / name, layout, container=container, check=True)
        (step,) = (s for s in report.plan.steps if s.name == "a.proj.weight")
        assert step.action == ("quantise" if source == path else "repack")
        source = tmp_path / name
        with checkpoint.open(source) as model:
            assert model["a.proj.weight"].layout.name == layout
            assert model["a.proj.weight"].decode().tobytes() == (weight.astype(F32) + F32(0)).tobytes()
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "last"))
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in last.items()}


def written(path: Path, config: dict[str, Any] | None, scale: np.ndarray, shards: bool = False) -> Path:
    """A folder by the safetensors library: two rows of bytes, and a scale that may lie in another file."""
    path.mkdir()
    weight = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "b": np.ones((4, 2), np.uint8)}
    if shards:
        names = {name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate(tensors, 1)}
        for name, file in names.items():
            save_file({name: tensors[name]}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        save_file(tensors, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return path


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    ("linear", "layout"),
    [
        ({}, "bitnet_divide"),
        ({"linear_class": "bitlinear"}, "bitnet_divide"),
        ({"linear_class": "autobitlinear"}, "bitnet"),
    ],
)
def test_config_says_whether_scales_divide(tmp_path: Path, linear: dict[str, str], layout: str, shards: bool) -> None:
    path = written(tmp_path / "m", {"quant_method": "bitnet", **linear}, np.array([2], BF16), shards)
    with checkpoint.open(path) as model:
        assert {name: i.layout for name, i in model.index.items()} == {
            "a.weight": codecs.get(layout).layout,
            "b": DENSE["u8"],
        }
        steps = np.array([[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]], F32)
        weight = steps * F32(2) if layout == "bitnet" else steps / F32(2)
        assert model["a.weight"].decode().tobytes() == weight.tobytes()


def test_without_config_the_user_says(tmp_path: Path) -> None:
    path = written(tmp_path / "m", None, np.array(2, BF16))
    with checkpoint.open(path) as model:
        assert {i.kind for i in model.index.values()} == {"U8", "BF16"}
    for name in CLASSES:
        with checkpoint.open(path, read_as={"U8": name}) as model:
            assert model["a.weight"].layout == codecs.get(name).layout
    for wrong in ({"U8": "q4_0"}, {"BF16": "bitnet"}, {"U8": "bitnot"}):
        with pytest.raises(PlanError, match="of safetensors only U8 can mean a layout"):
            checkpoint.open(path, read_as=wrong)


def test_what_is_not_bitnet_s_is_not_guessed(tmp_path: Path) -> None:
    config = {"quant_method": "bitnet"}
    with pytest.raises(ContainerError, match=r"linear_class is 'linear', needs bitlinear or autobitlinear"):
        checkpoint.open(written(tmp_path / "class", {**config, "linear_class": "linear"}, np.array([2], BF16)))
    model = checkpoint.open(written(tmp_path / "dtype", config, np.array([2], F32)))
    with model, pytest.raises(ContainerError, match=r"a.weight is U8, whose scale is F32 \[1\]"):
        model["a.weight"]
    with checkpoint.open(written(tmp_path / "many", config, np.array([2, 2], BF16))) as model:
        assert model.index["a.weight"].why == "whose scale is BF16 [2], and only one BF16 number is read"
    with checkpoint.open(written(tmp_path / "other", {"quant_method": "gptq"}, np.array([2], BF16))) as model:
        assert model.index["a.weight"].layout == DENSE["u8"]


@pytest.mark.parametrize(
    ("layouts", "shape", "name", "message"),
    [
        (["q4_0"], (4, 32), "a.weight", "holds bitnet, bitnet_divide and dense tensors, not q4_0"),
        (["bitnet"], (6, 32), "a.weight", "6 rows, transformers needs a multiple of 4"),
        (["bitnet"], (2, 4, 32), "a.weight", "3 dimensions"),
        (["bitnet"], (4, 32), "a.experts", "called neither .weight"),
        (["bitnet"], (4, 32), "model.embed_tokens.weight", "an embedding, which stays dense; say --map"),
        (["bitnet", "bitnet_divide"], (4, 32), "a.weight", "one linear_class for all"),
        (["f32"], (4, 32), "a.weight", "nothing would be bitnet"),
        (["bitnet", "f32"], (4, 32), "x.proj.weight", "would skip it with proj, which stays dense"),
    ],
)
def test_what_transformers_would_not_load_is_refused(
    tmp_path: Path, layouts: list[str], shape: tuple[int, ...], name: str, message: str
) -> None:
    steps = [Step(name, shape, "float32", DENSE["f32"], codecs.get(layouts[0]).layout, "quantise", "")]
    for other in layouts[1:]:
        steps.append(Step("proj.weight", shape, "float32", DENSE["f32"], codecs.get(other).layout, "quantise", ""))
    with pytest.raises(PlanError, match=message):
        save(bitnet.DIALECT, tmp_path / "out", Plan("m", "bitnet", tuple(steps)), [], Extras({}))
    assert not list(tmp_path.iterdir())


def test_a_folder_needs_its_config_and_is_no_file(tmp_path: Path) -> None:
    packed = codecs.get("bitnet").encode(trits(4, 8))
    plan = Plan("m", "bitnet", (Step("a.weight", (4, 8), "float32", packed.layout, packed.layout, "keep", ""),))
    with pytest.raises(PlanError, match=r"m: has no config\.json"):
        save(bitnet.DIALECT, tmp_path / "out", plan, [packed], Extras())
    with pytest.raises(PlanError, match=r"out\.gguf: Hugging Face's BitNet is a folder"):
        save(bitnet.DIALECT, tmp_path / "out.gguf", plan, [packed], Extras({}))
    for tensors, message in (([], "a.weight: got nothing"), ([packed, packed], "more tensors than the 1 planned")):
        with pytest.raises(PlanError, match=message):
            save(bitnet.DIALECT, tmp_path / "out", plan, tensors, Extras({}))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- transformers


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # transformers loads BitNet with it alone
    pytest.importorskip("transformers")
    found._dynamo.config.disable = True  # its compiler takes longer than the test
    return found


@pytest.mark.clients
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 10, 64])
def test_bytes_are_those_of_transformers(torch: Any, rows: int) -> None:
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    weight = trits(rows, 7, seed=rows)
    packed = codecs.get("bitnet").encode(weight).components["weight"]
    theirs = pack_weights(torch.tensor(weight).clone())
    assert theirs.numpy().tobytes() == packed.tobytes()
    assert unpack_weights(theirs, torch.float32)[:rows].numpy().tolist() == weight.tolist()


@pytest.mark.clients
@bitnets
def test_absmean_steps_are_those_of_transformers(torch: Any, name: str) -> None:
    """Few bits a weight and 2**11 weights: the mean magnitude is exact, so that no order of sums can matter."""
    from transformers.integrations.bitnet import WeightQuant

    weight = np.random.default_rng(3).integers(-64, 65, (32, 64)).astype(F32) / 64
    theirs = WeightQuant.apply(torch.tensor(weight)).numpy()
    steps = codecs.get(name).encode(weight, "absmean").unpack()["codes"].astype(int) - 1
    assert np.sign(theirs).astype(int).tolist() == steps.tolist()


@pytest.mark.clients
@bitnets
def test_transformers_loads_the_folder_and_computes_with_our_weights(torch: Any, tmp_path: Path, name: str) -> None:
    """Steps and scales as we read them, and every layer's product to the bit: whole activations, powers of two."""
    import transformers
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear, unpack_weights

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=96, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for seed, (weight_name, weight) in enumerate(model.named_parameters()):
        if "proj" in weight_name:
            weight.data = torch.tensor(trits(*weight.shape, seed=seed) * F32(2.0 ** -(seed % 5)))
    model.save_pretrained(tmp_path / "dense")
    out = to_bitnet(tmp_path / "dense", tmp_path / "out", name, lm_head="keep")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    kind = {"bitnet": AutoBitLinear, "bitnet_divide": BitLinear}[name]
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, AutoBitLinear | BitLinear)}
    assert len(layers) == 14
    assert all(type(m) is kind for m in layers.values())
    rng = np.random.default_rng(9)
    with checkpoint.open(out) as ours:
        assert {n.removesuffix(".weight") for n, i in ours.index.items() if i.kind == "U8 with a scale"} == set(layers)
        for layer_name, layer in layers.items():
            tensor = ours[layer_name + ".weight"]
            parts = tensor.unpack()
            steps = layer.weight if name == "bitnet" else unpack_weights(layer.weight, torch.float32)
            assert steps.detach().numpy().tolist() == (parts["codes"].astype(int) - 1).tolist()
            assert layer.weight_scale.float().item() == float(parts["scale"].astype(F32)[0, 0])
            x = rng.integers(-127, 128, (3, tensor.shape[1])).astype(F32)
            x[:, 0] = 127  # the peak: so activations become int8 without rounding
            with torch.no_grad():
                theirs = layer(torch.tensor(x)).numpy()
            assert (theirs + F32(0)).tobytes() == (x @ tensor.decode().T + F32(0)).tobytes()
        assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
