"""NVIDIA ModelOpt: folders as its export in Hugging Face's form writes them; TensorRT-LLM, vLLM and SGLang read them.

    NVFP4, W4A16_NVFP4          X.weight U8 (rows, cols / 2), X.weight_scale F8_E4M3 (rows, cols / 16),
                                X.weight_scale_2 F32 []; for stacked experts E, packed along their rows,
                                E, E_weight_scale and E_weight_scale_2
    MXFP8                       X.weight F8_E4M3 (rows, cols), X.weight_scale U8 (rows, cols / 32)
    W4A8_MXFP4_FP8              X.weight U8 (rows, cols / 2), X.weight_scale U8 (rows, cols / 32)
    FP8                         X.weight F8_E4M3 (rows, cols), X.weight_scale F32 []
    FP8_PER_CHANNEL_PER_TOKEN   the same with X.weight_scale F32 (rows)
    MIXED_PRECISION             several of these; `quantized_layers` says which

hf_quant_config.json says so in ModelOpt's words, and config.json's `quantization_config` once more; either may be
missing. What a weight is, its tensors tell: their dtypes differ from one algorithm to another. The configs are
asked whether an algorithm was used that is none of these. Scales of activations (X.input_scale) and of the cache
(k_scale, v_scale) stay tensors of their own.

Source: nvidia-modelopt 0.47.0, torch/export/quant_utils.py, unified_export_hf.py, convert_hf_config.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import Any, Final

from packfmt.codec import dense_dtype
from packfmt.errors import ContainerError
from packfmt.exporters import Extras
from packfmt.exporters.beside import quantised_by
from packfmt.exporters.folder import (
    MULTIPLIES,
    NOWHERE,
    WEIGHT,
    Activation,
    Dialect,
    Form,
    Found,
    Read,
    Says,
    Shape,
    Stored,
    Tensors,
    as_scalar,
    embedding_refusal,
    packed_steps,
    stay_dense,
)
from packfmt.layout import Layout
from packfmt.plan import Step, TensorInfo

NAME = "modelopt"
SIGN = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # readers know such a folder by the name
SCALE, SCALE_2 = "weight_scale", "weight_scale_2"
MIXED = "MIXED_PRECISION"
ALGORITHMS = {  # layout -> what its algorithm is called
    "nvfp4_modelopt": "NVFP4",
    "nvfp4_rows": "NVFP4",
    "mxfp4_pairs": "W4A8_MXFP4_FP8",
    "mxfp8_e4m3": "MXFP8",
    "fp8_tensor": "FP8",
    "fp8_row": "FP8_PER_CHANNEL_PER_TOKEN",
}
WEIGHTS_ONLY = "W4A16_NVFP4"  # NVFP4 of a layer whose inputs have no scale
GROUPS = {"nvfp4_modelopt": 16, "nvfp4_rows": 16, "mxfp4_pairs": 32, "mxfp8_e4m3": 32}
ALIKE = {  # other numbers or inputs in the same tensors -> the layout
    "W4A8_NVFP4_FP8": "nvfp4_modelopt",
    "NVFP4_AWQ": "nvfp4_modelopt",
    "NVFP4_SVD": "nvfp4_modelopt",
    "mxfp4": "mxfp4_pairs",
}
READ = (*dict.fromkeys(ALGORITHMS.values()), WEIGHTS_ONLY, *ALIKE, MIXED)
PACKED = ("U8", "I8", "F8_E4M3")  # dtypes of weights that are none without their scale
CHANGED = {  # a tensor beside a weight that makes the layer another than the weight alone -> how
    "pre_quant_scale": "its inputs are multiplied by",
    "svdquant_lora_a": "to its product is added that of",
}


def _as_experts(component: Shape, weight: Shape) -> Shape:
    """The experts' rows apart, of which one byte or scale holds several."""
    return (weight[0], component[0] // max(1, weight[0]), *component[1:])


def _linear(
    weight: str = "weight", scale: Stored | None = None, activation: Activation = MULTIPLIES, **others: Stored
) -> Form:
    """X.weight, and what stands beside it."""
    beside = {SCALE: scale or Stored("." + SCALE)}
    return Form({weight: Stored(WEIGHT), **beside, **others}, WEIGHT, activation=activation)


FORMS: Final[Mapping[str, Form]] = MappingProxyType(
    {
        "nvfp4_modelopt": _linear(weight_scale_2=Stored("." + SCALE_2, shape=as_scalar)),
        "nvfp4_rows": Form(
            {
                "weight": Stored("", shape=_as_experts),
                SCALE: Stored("_" + SCALE, shape=_as_experts),
                SCALE_2: Stored("_" + SCALE_2, shape=as_scalar),
            }
        ),
        "mxfp4_pairs": _linear("weight_packed"),
        "mxfp8_e4m3": _linear(activation=NOWHERE),
        "fp8_tensor": _linear(scale=Stored("." + SCALE, shape=as_scalar)),
        "fp8_row": _linear(activation=NOWHERE),  # each token's inputs get theirs while the model runs
    }
)


def form(layout: Layout) -> Form | None:
    """How a layout is stored; None if it is not."""
    return FORMS.get(layout.name)


# ---------------------------------------------------------------- reading


def find(says: Says, tensors: Tensors, read: Read) -> Iterator[Found]:
    """The weights among the tensors of a folder.

    Raises
    ------
    ContainerError
        If the config names an algorithm that is not read.
    """
    _check_algorithms(says)
    for name in tensors:
        dot = "." if name.endswith(WEIGHT) else "_"
        scale = tensors.get(f"{_module(name)}{dot}{SCALE}")
        if scale and tensors[name].kind in PACKED:
            others = {key: tensors.get(f"{_module(name)}{dot}{key}") for key in CHANGED}
            yield _found(tensors[name], scale, others)


def _module(name: str) -> str:
    return name.removesuffix(WEIGHT)


def _found(weight: TensorInfo, scale: TensorInfo, others: Mapping[str, TensorInfo | None]) -> Found:
    name, shape, kinds = weight.name, weight.shape, (weight.kind, scale.kind)
    for key, other in others.items():
        if other:
            return Found(name, why=f"and {CHANGED[key]} {other.name}, which is not read")
    if not name.endswith(WEIGHT):
        if kinds == ("U8", "F8_E4M3") and len(shape) == 3:
            return Found(name, "NVFP4", (("nvfp4_rows", (shape[0], 2 * shape[1], shape[2])),))
    elif kinds in (("U8", "F8_E4M3"), ("U8", "U8")) and shape:
        layout, kind = ("nvfp4_modelopt", "NVFP4") if scale.kind == "F8_E4M3" else ("mxfp4_pairs", "MXFP4")
        return Found(name, kind, ((layout, (*shape[:-1], 2 * shape[-1])),))
    elif kinds == ("F8_E4M3", "U8"):
        return Found(name, "MXFP8", (("mxfp8_e4m3", shape),))
    elif kinds == ("F8_E4M3", "F32"):
        return Found(name, "FP8", (("fp8_tensor" if prod(scale.shape) == 1 else "fp8_row", shape),))
    return Found(name, why=f"with {scale.name} beside it, {scale.kind} {list(scale.shape)}; no such weight is read yet")


def _check_algorithms(says: Says) -> None:
    said = says.get("quantization", says)  # of hf_quant_config.json, or of config.json
    layers = said.get("quantized_layers") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(layers, dict | None):
        raise ContainerError("its quantization is no record", "PF102")
    each = [layer.get("quant_algo") for layer in (layers or {}).values() if isinstance(layer, dict)]
    for algorithm in (said.get("quant_algo"), *each):
        if algorithm is not None and (not isinstance(algorithm, str) or algorithm.upper() not in map(str.upper, READ)):
            raise ContainerError(f"quant_algo is {algorithm!r}; of ModelOpt's are read {', '.join(READ)}", "PF105")


# ---------------------------------------------------------------- writing


def refusal_of(layout: Layout, shape: Shape) -> str:
    """Why it cannot hold a packed tensor of this shape; empty if it can."""
    if layout.name == "nvfp4_rows":
        if len(shape) != 3:
            return f"{len(shape)} dimensions, nvfp4_rows is for stacks of experts, which have 3; say nvfp4_modelopt"
        return f"{shape[1]} rows an expert, needs a multiple of 16" if shape[1] % 16 else ""
    return "" if len(shape) == 2 else f"{len(shape)} dimensions, a linear layer has 2; stacks of experts are nvfp4_rows"


def plan_refusal_of(steps: tuple[Step, ...]) -> str:
    """Why readers would not load these tensors together; empty if they would."""
    if not packed_steps(steps):
        return f"nothing would be {', '.join(FORMS)}"
    for step in packed_steps(steps):
        if step.layout.name == "nvfp4_rows" and step.name.endswith(WEIGHT):
            return f"{step.name}: nvfp4_rows is for stacks of experts, none of which is called {WEIGHT}"
    return embedding_refusal(steps)


def files(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """hf_quant_config.json."""
    layers = _layers(steps, _before(extras))
    told: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": _cache(steps, extras)}
    each = list({tuple(sorted(layer.items())): layer for layer in layers.values()}.values())
    told |= each[0] if len(each) == 1 else {"quant_algo": MIXED, "quantized_layers": layers}
    return {SIGN: {"producer": _producer(extras), "quantization": {**told, "exclude_modules": stay_dense(steps)}}}


def says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """The `quantization_config` of config.json, made of the other as ModelOpt makes it."""
    told = files(steps, extras)[SIGN]["quantization"]
    out: dict[str, Any] = {}
    if told["quant_algo"] == MIXED:
        groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for module, layer in told["quantized_layers"].items():
            groups.setdefault(tuple(sorted(layer.items())), []).append(module)
        configs = [_group(dict(layer), sorted(modules)) for layer, modules in groups.items()]
        out = {"config_groups": {f"group_{i}": c for i, c in enumerate(configs)}}
        out["quantized_layers"] = told["quantized_layers"]
    elif told["quant_algo"] in ("FP8", "NVFP4", WEIGHTS_ONLY):  # ModelOpt writes no groups for the others
        out = {"config_groups": {"group_0": _group(told, ["Linear"])}}
    out |= {"ignore": told["exclude_modules"], "quant_algo": told["quant_algo"]}
    if cache := told["kv_cache_quant_algo"]:
        out["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache
    return {**out, "producer": _producer(extras), "quant_method": NAME}


def _layers(steps: tuple[Step, ...], before: Says) -> dict[str, dict[str, Any]]:
    """Module -> its algorithm, and how many weights share a scale where that is a number."""
    names = {s.name for s in steps}
    out: dict[str, dict[str, Any]] = {}
    for step in packed_steps(steps):
        stacked = not step.name.endswith(WEIGHT)
        module = step.name.rpartition(".")[0] if stacked else _module(step.name)
        scales = {f"{step.name}_input_scale", f"{module}.input_scale", f"{module}.input_global_scale"}
        algorithm = ALGORITHMS[step.layout.name]
        algorithm = WEIGHTS_ONLY if algorithm == "NVFP4" and not scales & names else algorithm
        was = _said(before, module)
        if ALIKE.get(was) == step.layout.name and step.before == step.layout:  # then its numbers are still its own
            algorithm = was
        group = {"group_size": GROUPS[step.layout.name]} if step.layout.name in GROUPS else {}
        out[module] = {"quant_algo": algorithm, **group}
    return out


def _said(before: Says, module: str) -> str:
    """What the source's config said of a layer's algorithm; empty if nothing."""
    layers = before.get("quantized_layers")
    layer = layers.get(module) if isinstance(layers, dict) else None
    found = layer.get("quant_algo") if isinstance(layer, dict) else before.get("quant_algo")
    return found if isinstance(found, str) else ""


def _group(layer: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    """One of the `config_groups`, in compressed-tensors' words."""
    algorithm = layer["quant_algo"]
    group = {"group_size": layer["group_size"]} if "group_size" in layer else {}
    bits = 8 if "FP8" in algorithm and "FP4" not in algorithm else 4
    weights = {"dynamic": False, "num_bits": bits, "type": "float", **group}
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        weights["strategy"] = "channel"
    activations = {"dynamic": False, "num_bits": bits, "type": "float", **group}
    if algorithm in ("W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"):
        activations = {"dynamic": False, "num_bits": 8, "type": "float"}
    inputs = {} if algorithm == WEIGHTS_ONLY else {"input_activations": activations}
    return {**inputs, "weights": weights, "targets": targets}


def _cache(steps: tuple[Step, ...], extras: Extras) -> str | None:
    """The algorithm of the keys' and values' cache: that of the source, or FP8 where there are scales for it."""
    before = _before(extras).get("kv_cache_scheme")
    if isinstance(before, str):
        return before
    return "FP8" if any(s.name.endswith((".k_scale", ".v_scale")) for s in steps if dense_dtype(s.layout)) else None


def _producer(extras: Extras) -> dict[str, Any]:
    before = _before(extras).get("producer")
    return before if isinstance(before, dict) and before.get("name") == NAME else PRODUCER


def _before(extras: Extras) -> Mapping[str, Any]:
    """What config.json said, if it was ModelOpt's."""
    return quantised_by(NAME, extras.config)


DIALECT = Dialect(
    NAME=NAME,
    title="NVIDIA ModelOpt",
    holds="nvfp4_modelopt, nvfp4_rows, mxfp4_pairs, mxfp8_e4m3, fp8_tensor, fp8_row",
    form=form,
    find=find,
    says=says,
    files=files,
    refusal_of=refusal_of,
    plan_refusal_of=plan_refusal_of,
)
