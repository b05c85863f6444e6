"""compressed-tensors: the real package reads what packfmt wrote, and packfmt what the package wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packfmt import checkpoint
from packfmt.codec import Array
from packfmt.layout import DENSE
from tests.compressed_tensors_folders import (
    DOWN,
    F32,
    FORMATS,
    UP,
    config_of,
    dense,
    layouts,
    stored,
    to_folder,
)
from tests.models import BF16, normal


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return found


def alike(theirs: Any, ours: Array) -> bool:
    """Whether a tensor of torch's holds our numbers, in its own dtype: the package multiplies in the scale's."""
    dtype = {"torch.bfloat16": BF16, "torch.float16": np.float16, "torch.float32": F32}[str(theirs.dtype)]
    numbers: Array = theirs.detach().float().numpy()
    return numbers.tobytes() == ours.astype(dtype).astype(F32).tobytes()


def decompressed(torch: Any, path: Path, tensors: Mapping[str, Any], module: str) -> Any:
    """The weight of a module, as the package makes it of a folder's tensors and config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(config_of(path))
    groups = list(config.config_groups.values())
    scheme = next((g for g in groups if module in g.targets), groups[0])
    state = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]


@pytest.mark.clients
@layouts
def test_the_package_decompresses_what_packfmt_wrote(torch: Any, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    if "legacy" in name:
        return legacy_words_are_those_of_old(tmp_path, name)
    out = to_folder(dense(tmp_path / "dense"), tmp_path / "out", name)
    tensors = load_file(out / "model.safetensors")
    with checkpoint.open(out) as model:
        for module in (UP, DOWN):
            assert alike(decompressed(torch, out, tensors, module), model[f"{module}.weight"].decode())
    return None


def legacy_words_are_those_of_old(tmp_path: Path, name: str) -> None:
    """compressed-tensors 0.17's pack_to_int32, written anew: 32 // bits codes a word, the first lowest."""
    out = to_folder(dense(tmp_path / "dense"), tmp_path / "out", name)
    with checkpoint.open(out) as model:
        codes = model[f"{UP}.weight"].unpack()["codes"].astype(np.uint32)
    per_word = 32 // 3
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).reshape(64, -1, per_word)
    words = (codes << (3 * np.arange(per_word, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    assert stored(out)[f"{UP}.weight_packed"] == words.tobytes()


PRESETS = {
    "NVFP4A16": "nvfp4_ct", "MXFP4A16": "mxfp4_pairs", "MXFP6A16": "mxfp6_e2m3", "MXFP8A16": "mxfp8_e4m3",
    "FP8": "fp8_tensor_bf16", "FP8_DYNAMIC": "fp8_row_bf16", "FP8_BLOCK": "fp8_block_bf16",
    "W2A16": "ct_int2_g128", "W3A16": "ct_int3_g128", "W4A16": "ct_int4_g128", "W5A16": "ct_int5_g128",
    "W6A16": "ct_int6_g128", "W7A16": "ct_int7_g128", "W8A16": "ct_int8_g128", "W4A16_ASYM": "ct_int4_g128_asym",
}  # fmt: skip


@pytest.mark.clients
@pytest.mark.parametrize("preset", PRESETS)
def test_packfmt_decodes_what_the_package_compressed(torch: Any, tmp_path: Path, preset: str) -> None:
    """A bfloat16 layer with scales by the package's own observers' arithmetic, compressed and saved by it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from safetensors.torch import save_file as save_torch

    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    weight = torch.tensor(normal(256, 384, seed=7)).to(torch.bfloat16)
    tiles = {
        "tensor": lambda w: w.reshape(1, -1),
        "channel": lambda w: w.reshape(256, 1, 384),
        "group": lambda w: w.reshape(256, -1, args.group_size),
        "tensor_group": lambda w: w.reshape(256, -1, args.group_size),
        "block": lambda w: w.reshape(2, 128, 3, 128).transpose(1, 2).reshape(2, 3, -1),
    }[args.strategy](weight)
    state = {"weight": weight}
    low, high = tiles.amin(-1), tiles.amax(-1)
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min().float(), weight.max().float())
    scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    of = infer_module_format(torch.nn.Linear, scheme).value
    scheme.format = of
    compressor = BaseCompressor.get_value_from_registry(of)
    compressed = compressor.compress(state, scheme)
    (tmp_path / "m").mkdir()
    save_torch({f"a.{n}": t.contiguous() for n, t in compressed.items()}, tmp_path / "m" / "model.safetensors")
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=of, quantization_status="compressed")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"quantization_config": config.model_dump()}))
    theirs = compressor.decompress(compressed, scheme)["weight"]
    with checkpoint.open(tmp_path / "m") as model:
        assert next(iter(model)) == "a.weight"
        tensor = model["a.weight"]
        assert tensor.layout.name == PRESETS[preset]
        assert alike(theirs, tensor.decode())


@pytest.mark.clients
@pytest.mark.parametrize("name", ["nvfp4_ct", "fp8_row", "ct_int4_g128", "mixed", "inputs of NVFP4", "inputs of FP8"])
def test_the_config_is_what_the_package_writes(torch: Any, tmp_path: Path, name: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    more = {f"{n}.input_scale": np.array(3, F32) for n in (UP, DOWN)} if "inputs" in name else {}
    rules = {"down_proj": "mxfp8_e4m3"} if name == "mixed" else {}
    layout = {"mixed": "nvfp4_ct", "inputs of NVFP4": "nvfp4_ct", "inputs of FP8": "fp8_tensor"}.get(name, name)
    says = config_of(to_folder(dense(tmp_path / "d", **more), tmp_path / "out", layout, **rules))
    dumped = QuantizationConfig.model_validate(says).model_dump()
    assert dumped == {k: v for k, v in says.items() if k not in ("version", "sparsity_config", "transform_config")}
    if "inputs" in name:
        scheme = preset_name_to_scheme(name.removeprefix("inputs of "), ["Linear"]).model_dump()
        (group,) = says["config_groups"].values()
        assert group == scheme | {"format": FORMATS[layout][0]}


@pytest.mark.clients
@pytest.mark.parametrize("name", ["nvfp4_ct", "mxfp4_pairs", "mxfp8_e4m3", "fp8_row_bf16", "ct_int4_g32", "mixed"])
def test_transformers_loads_the_folder_and_has_our_weights(torch: Any, tmp_path: Path, name: str) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=96, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    rules = {"down_proj": "mxfp8_e4m3", "o_proj": "keep"} if name == "mixed" else {}
    out = to_folder(tmp_path / "dense", tmp_path / "out", "nvfp4_ct" if name == "mixed" else name, **rules)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()  # the first forward pass decompresses
    weights = loaded.state_dict()
    with checkpoint.open(out) as ours:
        packed = [n for n, i in ours.index.items() if i.layout and i.layout.name not in DENSE]
        assert len(packed) == (12 if name == "mixed" else 14)
        for weight in packed:
            assert weights[weight].dtype == torch.bfloat16
            assert alike(weights[weight], ours[weight].decode()), weight
