"""compressed-tensors: the folders of llm-compressor, which vLLM and transformers load.

    nvfp4-pack-quantized   X.weight_packed, X.weight_scale, X.weight_global_scale     nvfp4_ct
    mxfp4-pack-quantized   X.weight_packed, X.weight_scale                            mxfp4_pairs
    mxfp6-pack-quantized   X.weight_packed, X.weight_scale                            mxfp6_e2m3
    mxfp8-quantized        X.weight, X.weight_scale                                   mxfp8_e4m3
    float-quantized        X.weight, X.weight_scale                                   fp8_tensor, fp8_row, fp8_block
    pack-quantized         X.weight_packed, X.weight_scale, X.weight_shape,           ct_int4_g128 and its like
                           X.weight_zero_point where there are zero points

where X is a linear layer. config.json has groups of layers, each with a scheme, and the layers that stay dense.
The groups say which formats there are; which of them a layer has, its own tensors tell: what fits two of them, and
no group names, is refused. The scale of a layer's inputs (X.input_scale, in NVFP4 X.input_global_scale) is a tensor
of its own.

transformers loads scales in the dtype of the model, so for one of bfloat16 say fp8_row_bf16, not fp8_row.

Until 0.17 pack-quantized had 32 // bits codes a word, since then they follow each other without gaps: the number of
words tells the two apart, and, where a matrix is so narrow that it does not, the version in config.json.

Source: compressed-tensors 0.20.0, compressors/*/base.py, quantization/quant_config.py, quant_scheme.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from packfmt.codec import Array
from packfmt.errors import ContainerError
from packfmt.exporters import Extras
from packfmt.exporters.beside import CONFIG, quantised_by
from packfmt.exporters.folder import (
    DIVIDES,
    EIGHT_BIT,
    EMBEDDING,
    STAYS,
    WEIGHT,
    Dialect,
    Form,
    Found,
    Read,
    Says,
    Shape,
    Stored,
    Tensors,
    as_weight,
    embedding_refusal,
    input_scale,
    packed_steps,
    stay_dense,
)
from packfmt.layout import Layout
from packfmt.plan import Step, TensorInfo

NAME, METHOD = "compressed_tensors", "compressed-tensors"
VERSION, LEGACY_VERSION = "0.20.0", "0.17.1"  # whose bytes are written
DENSE_SINCE = (0, 18)  # the version since which codes follow each other without gaps
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
GLOBAL, ZERO, ORDER = ".weight_global_scale", ".weight_zero_point", ".weight_g_idx"
INTEGERS = re.compile(r"ct_int(?P<bits>[2-8])(?P<legacy>_legacy)?_(row|g(?P<group>\d+))(?P<asym>_asym)?(_f16|_f32)?")
SCALES = {"BF16": "", "F16": "_f16", "F32": "_f32"}  # of pack-quantized -> what its layouts' names end in
FLOAT_SCALES = {"F32": "", "BF16": "_bf16"}  # of float-quantized
STRATEGIES = {"tensor": "fp8_tensor", "channel": "fp8_row", "block": "fp8_block"}
BLOCK = [128, 128]
FORMATS = {
    "nvfp4-pack-quantized": "nvfp4_ct",
    "mxfp4-pack-quantized": "mxfp4_pairs",
    "mxfp6-pack-quantized": "mxfp6_e2m3",
    "mxfp8-quantized": "mxfp8_e4m3",
    "float-quantized": "fp8_tensor, fp8_row, fp8_block",
    "naive-quantized": "the same",
    "pack-quantized": "ct_int4_g128 and its like",
}
READABLE = ", ".join(FORMATS)
HOLDS = "nvfp4_ct, mxfp4_pairs, mxfp6_e2m3, mxfp8_e4m3, fp8_tensor, fp8_row, fp8_block, ct_int4_g128 and its like"


# ---------------------------------------------------------------- layouts and schemes


def _column(component: Shape, weight: Shape) -> Shape:
    """One number a row, as a matrix of one column."""
    return (*weight[:-1], 1)


def _packed_column(component: Shape, weight: Shape) -> Shape:
    """The words of one number a row, as a matrix of one column."""
    return (component[0], 1)


def _shape_tensor(shape: Shape) -> Array:
    return np.array(shape, np.int64)


def _form(codes: str, scale: str, *others: str, shape: Any = as_weight, **rest: Any) -> Form:
    """Components called as upstream calls them: .weight_scale is weight_scale."""
    stored = {codes: Stored(codes), scale: Stored(scale, shape=shape), **{s: Stored(s) for s in others}}
    return Form({suffix.removeprefix("."): how for suffix, how in stored.items()}, WEIGHT, **rest)


FORMS = {
    "nvfp4_ct": _form(PACKED, SCALE, GLOBAL, activation=DIVIDES),
    "mxfp4_pairs": _form(PACKED, SCALE),
    "mxfp6_e2m3": _form(PACKED, SCALE),
    "mxfp8_e4m3": _form(WEIGHT, SCALE),
    "fp8_tensor": _form(WEIGHT, SCALE, activation=EIGHT_BIT),
    "fp8_tensor_bf16": _form(WEIGHT, SCALE, activation=EIGHT_BIT),
    "fp8_row": _form(WEIGHT, SCALE, shape=_column, activation=EIGHT_BIT),
    "fp8_row_bf16": _form(WEIGHT, SCALE, shape=_column, activation=EIGHT_BIT),
    "fp8_block": Form({"weight": Stored(WEIGHT), "weight_scale_inv": Stored(SCALE)}, WEIGHT, activation=EIGHT_BIT),
    "fp8_block_bf16": _form(WEIGHT, SCALE, activation=EIGHT_BIT),
}


def form(layout: Layout) -> Form | None:
    """How a layout is stored; None if it is not."""
    named = INTEGERS.fullmatch(layout.name)
    if named is None:
        return FORMS.get(layout.name)
    scale = Stored(SCALE) if named["group"] else Stored(SCALE, shape=_column)
    components = {"weight_packed": Stored(PACKED, ("I32",)), "weight_scale": scale}
    if named["asym"]:
        components["weight_zero_point"] = Stored(ZERO, ("I32",), as_weight if named["group"] else _packed_column)
    return Form(components, WEIGHT, {SHAPE: _shape_tensor})


def scheme(name: str) -> tuple[str, dict[str, Any]]:
    """The format and the `weights` of a group whose layers have this layout."""
    common = {"num_bits": 4, "type": "float", "symmetric": True}
    static = {"dynamic": False}
    if name == "nvfp4_ct":
        group: dict[str, Any] = {"group_size": 16, "strategy": "tensor_group"}
        return "nvfp4-pack-quantized", {**common, **group, **static, "scale_dtype": "torch.float8_e4m3fn"}
    if name.startswith("mx"):
        bits = {"mxfp4_pairs": 4, "mxfp6_e2m3": 6, "mxfp8_e4m3": 8}[name]
        of = next(f for f, layout in FORMATS.items() if layout == name)
        group = {"group_size": 32, "strategy": "group"}
        return of, {**common, "num_bits": bits, **group, **static, "scale_dtype": "torch.uint8"}
    if name.startswith("fp8_"):
        strategy = next(s for s, layout in STRATEGIES.items() if layout == name.removesuffix("_bf16"))
        block = {"block_structure": BLOCK} if strategy == "block" else {}
        group = {"group_size": None, "strategy": strategy, **block}
        return "float-quantized", {**common, "num_bits": 8, **group, **static}
    named = INTEGERS.fullmatch(name)
    assert named is not None
    size = int(named["group"]) if named["group"] else None
    group = {"group_size": size, "strategy": "group" if size else "channel"}
    bits, symmetric = int(named["bits"]), not named["asym"]
    return "pack-quantized", {"num_bits": bits, "type": "int", "symmetric": symmetric, **group, **static}


# ---------------------------------------------------------------- writing


def refusal_of(layout: Layout, shape: Shape) -> str:
    """Why it cannot hold a packed tensor of this shape; empty if it can."""
    return "" if len(shape) == 2 else f"{len(shape)} dimensions, a linear layer of compressed-tensors' has 2; {STAYS}"


def plan_refusal_of(steps: tuple[Step, ...]) -> str:
    """Why a reader would not load these tensors together; empty if it would."""
    if not packed_steps(steps):
        return f"nothing would be packed; compressed-tensors holds {HOLDS}"
    return embedding_refusal(steps)


def says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """The config as the package writes it, with the groups' activations as they were in such a folder before."""
    carried = quantised_by(METHOD, extras.config)
    scaled = {step.name.removesuffix(a.suffix) for step in steps if (a := input_scale(step))}
    groups: dict[str, dict[str, Any]] = {}
    for step in packed_steps(steps):
        module = step.name.removesuffix(WEIGHT)
        of, weights = scheme(step.layout.name)
        inputs = _scaled_inputs(step.layout.name) if module in scaled else None
        new: dict[str, Any] = {
            "targets": [],
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": of,
        }
        group = groups.setdefault(str(new), _as_before(new, carried))
        group["targets"].append(module)
    for group in groups.values():
        group["targets"] = sorted(group["targets"]) if len(groups) > 1 else ["Linear"]
    formats = sorted({str(g["format"]) for g in groups.values()})
    legacy = any("_legacy" in s.layout.name for s in steps)
    return {
        "version": LEGACY_VERSION if legacy else VERSION,
        "quant_method": METHOD,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {f"group_{i}": groups[key] for i, key in enumerate(sorted(groups))},
        "kv_cache_scheme": carried.get("kv_cache_scheme"),
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [module for module in stay_dense(steps) if not EMBEDDING.search(module + WEIGHT)],
        "moe_sparsity_config": None,
    }


def _scaled_inputs(name: str) -> dict[str, Any]:
    """The inputs of a layer that has a scale for them, as the package's presets NVFP4 and FP8 have them.

    Those of NVFP4 are NVFP4 too, whose block scales are chosen while the model runs; others are 8-bit floats.
    """
    four_bit = name == "nvfp4_ct"
    weights = scheme("nvfp4_ct" if four_bit else "fp8_tensor")[1]
    return {**weights, "dynamic": "local" if four_bit else False, "observer": "static_minmax"}


def _as_before(group: dict[str, Any], carried: Says) -> dict[str, Any]:
    """A group, with what the source's config said of layers of the same weights.

    Only if both have scales of inputs or both have none: their tensors are there or not.
    """
    for old in _records(carried.get("config_groups")):
        weights, inputs = old.get("weights"), old.get("input_activations")
        same = isinstance(weights, dict) and all(weights.get(k) == v for k, v in group["weights"].items())
        stored = isinstance(inputs, dict) and inputs.get("dynamic") is not True
        alike = stored == bool(group["input_activations"])
        if same and alike and old.get("format", carried.get("format")) == group["format"]:
            activations = {key: old.get(key) for key in ("input_activations", "output_activations")}
            return {**group, "weights": weights, **activations}
    return group


# ---------------------------------------------------------------- reading


def find(says: Says, tensors: Tensors, read: Read) -> Iterator[Found]:
    """Each layer that has X.weight_packed, or an X.weight of few bits with X.weight_scale."""
    _check(says)
    groups = [(group, frozenset(_texts(group.get("targets")))) for group in _records(says.get("config_groups"))]
    for name, info in tensors.items():
        packed = name.endswith(PACKED)
        coded = name.endswith(WEIGHT) and info.kind[:2] in ("F8", "I8") and name + SCALE.removeprefix(WEIGHT) in tensors
        if not packed and not coded:
            continue
        module = name.removesuffix(PACKED if packed else WEIGHT)
        mine = [group for group, targets in groups if module in targets] or [group for group, _ in groups]
        found = [_layer(module, g, str(g.get("format") or says.get("format")), says, tensors, read) for g in mine]
        whys = [f for f in found if f.why]
        good = [f for f in found if not f.why]
        if not good:
            yield whys[0] if whys else Found(name, why="which no group of config.json describes")
            continue
        yield Found(module + WEIGHT, good[0].kind, tuple(dict.fromkeys(c for f in good for c in f.choices)))


def _check(says: Says) -> None:
    """Refuse what packfmt does not read at all."""
    of, sparsity = says.get("format"), says.get("sparsity_config")
    if of is not None and (not isinstance(of, str) or of not in (*FORMATS, "mixed-precision", "dense", "fakequant")):
        raise ContainerError(f"{CONFIG}: format is {_shown(of)}, packfmt reads {READABLE}", "PF105")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        shown = _shown(sparsity["format"])
        raise ContainerError(f"{CONFIG}: sparsity_config has the format {shown}, packfmt reads {READABLE}", "PF105")
    if says.get("transform_config"):
        raise ContainerError(
            f"{CONFIG}: has a transform_config: inputs are transformed, which packfmt does not read", "PF105"
        )
    if not isinstance(says.get("config_groups"), dict):
        raise ContainerError(f"{CONFIG}: has no config_groups", "PF102")


def _layer(module: str, group: Says, of: str, says: Says, tensors: Tensors, read: Read) -> Found:
    """A layer as a group describes it; with a reason if its tensors cannot be that."""
    first = tensors.get(module + PACKED) or tensors[module + WEIGHT]
    weights = group.get("weights")
    if of not in FORMATS or not isinstance(weights, dict):
        return Found(first.name, why=f"of the format {_shown(of)}, packfmt reads {READABLE}")
    if (of in ("float-quantized", "naive-quantized", "mxfp8-quantized")) == (module + PACKED in tensors):
        return Found(first.name, why=f"which is not how {of} is stored")
    if (scale := tensors.get(module + SCALE)) is None:
        raise ContainerError(f"{module}{WEIGHT}: {module + SCALE!r} is missing", "PF110")
    if of == "pack-quantized":
        choices = _integers(module, weights, scale, says, tensors, read)
    elif of in ("float-quantized", "naive-quantized"):
        choices = _floats(first, weights, scale)
    else:
        name = FORMATS[of]
        bits = {"nvfp4_ct": 4, "mxfp4_pairs": 4, "mxfp6_e2m3": 6, "mxfp8_e4m3": 8}[name]
        choices = (name, (*first.shape[:-1], first.shape[-1] * 8 // bits if first.shape else 0))
    if isinstance(choices, str):
        return Found(first.name, why=choices)
    return Found(module + WEIGHT, of, (choices,))


def _floats(weight: TensorInfo, weights: Says, scale: TensorInfo) -> tuple[str, Shape] | str:
    """The layout of an 8-bit float weight and its shape, or why there is none."""
    strategy = weights.get("strategy")
    if weight.kind != "F8_E4M3" or weights.get("type") != "float":
        return f"with {_shown(weights.get('type'))} weights in {weight.kind}, packfmt reads floats in F8_E4M3"
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        return f"scaled by {_shown(strategy)}, packfmt reads {', '.join(STRATEGIES)}"
    if strategy == "block" and weights.get("block_structure") not in (BLOCK, "128x128"):
        return f"in blocks of {_shown(weights.get('block_structure'))}, packfmt reads {BLOCK}"
    if scale.kind not in FLOAT_SCALES:
        return f"whose scales are {scale.kind}, packfmt reads {' and '.join(FLOAT_SCALES)}"
    return STRATEGIES[strategy] + FLOAT_SCALES[scale.kind], weight.shape


def _integers(
    module: str, weights: Says, scale: TensorInfo, says: Says, tensors: Tensors, read: Read
) -> tuple[str, Shape] | str:
    """The layout of an integer weight and its shape, or why there is none."""
    bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    if type(bits) is not int or not 2 <= bits <= 8 or weights.get("type") != "int":
        return f"with {_shown(bits)} bits of {_shown(weights.get('type'))}, packfmt reads 2 to 8 of int"
    if module + ORDER in tensors:
        return f"whose columns are in the groups of {module + ORDER}, which packfmt does not read"
    grouped = strategy == "group" and type(size) is int and 0 < size < 1 << 30
    if not grouped and strategy != "channel":
        return f"scaled by {_shown(strategy)} of {_shown(size)}, packfmt reads group and channel"
    if scale.kind not in SCALES:
        return f"whose scales are {scale.kind}, packfmt reads {', '.join(SCALES)}"
    told = tensors.get(module + SHAPE)
    if told is None or told.kind not in ("I64", "I32") or len(told.shape) != 1 or told.shape[0] < 2:
        raise ContainerError(f"{module}{WEIGHT}: {module + SHAPE!r} is missing, needs its rows and columns", "PF110")
    shape = tuple(int(n) for n in read(told.name))
    words = tensors[module + PACKED].shape[-1:]
    dense, legacy = -(-shape[-1] * bits // 32), -(-shape[-1] // (32 // bits))
    gaps = ""
    if 32 % bits and words == (legacy,):
        if dense == legacy and _version(says) is None:
            return f"of {legacy} words a row, which two orders of the codes fill; its config.json has no version"
        gaps = "_legacy" if dense != legacy or (_version(says) or DENSE_SINCE) < DENSE_SINCE else ""
    shared = f"g{size}" if grouped else "row"
    asym = "_asym" if weights.get("symmetric") is False else ""
    return f"ct_int{bits}{gaps}_{shared}{asym}{SCALES[scale.kind]}", shape


def _version(says: Says) -> tuple[int, ...] | None:
    """The version of the package that wrote a folder; None if it is not told."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(says.get("version", "")))
    return tuple(int(n) for n in found.groups()) if found else None


def _records(data: Any) -> list[Mapping[str, Any]]:
    return [value for value in data.values() if isinstance(value, dict)] if isinstance(data, dict) else []


def _texts(data: Any) -> list[str]:
    return [value for value in data if isinstance(value, str)] if isinstance(data, list) else []


def _shown(data: Any) -> str:
    return repr(data)[:40]


DIALECT = Dialect(
    NAME=NAME,
    title="compressed-tensors",
    holds=HOLDS,
    form=form,
    find=find,
    says=says,
    refusal_of=refusal_of,
    plan_refusal_of=plan_refusal_of,
)
