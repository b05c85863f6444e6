"""DeepSeek's folders: 8-bit floats with a scale for 128 x 128 weights, and in V4 experts in 4-bit floats.

    V3   X.weight F8_E4M3 (rows, cols), X.weight_scale_inv F32 (rows / 128, cols / 128), rounded up; multiplies
    V4   X.weight F8_E4M3 (rows, cols), X.scale F8_E8M0 (rows / 128, cols / 128), rounded up
         X.weight I8 (rows, cols / 2) or F4 (rows, cols), X.scale F8_E8M0 (rows, cols / 32)

config.json's `quantization_config` has quant_method "fp8". Others use it for one scale a tensor, too: without
`weight_block_size`, and X.weight_scale_inv F32 [], with X.activation_scale F32 [] for the inputs if those have one. Or,
as AutoFP8 has it and vLLM reads it, X.weight_scale, F32 or BF16, for the tensor or each row: that is read, and written
in transformers' way where it has one. What a weight is, its tensors tell.

transformers loads them; on a CPU it makes the weights dense.

Source: transformers 5.23.0, integrations/finegrained_fp8.py, quantizers/quantizer_finegrained_fp8.py;
vLLM 0071b24b, quantization/fp8.py; NVIDIA ModelOpt a2fbac7, examples/deepseek/deepseek_v4
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import Any, Final

from packfmt.errors import ContainerError
from packfmt.exporters import Extras
from packfmt.exporters.folder import (
    DEEPSEEKS,
    NOWHERE,
    STAYS,
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
    input_scale,
    packed_steps,
    stay_dense,
)
from packfmt.layout import Layout
from packfmt.plan import Step, TensorInfo

NAME = "deepseek"
METHOD = "fp8"
SIDE = 128  # rows and columns that share a scale
INVERSE, PLAIN, SCALE = ".weight_scale_inv", ".weight_scale", ".scale"


def _form(activation: Activation = NOWHERE, **scale: Stored) -> Form:
    """X.weight, and its scale; by default inputs get theirs while the model runs, as vLLM demands it beside tiles."""
    return Form({"weight": Stored(WEIGHT), **scale}, WEIGHT, activation=activation)


FORMS: Final[Mapping[str, Form]] = MappingProxyType(
    {
        "fp8_block": _form(weight_scale_inv=Stored(INVERSE)),
        "fp8_tensor": _form(DEEPSEEKS, weight_scale=Stored(INVERSE, shape=as_scalar, others=(PLAIN,))),
        "fp8_block_e8m0": _form(scale=Stored(SCALE)),
        # transformers' own parameter is I8; safetensors has F4, too
        "mxfp4_e8m0": Form({"weight": Stored(WEIGHT, ("I8", "F4")), "scale": Stored(SCALE)}, WEIGHT, {}, NOWHERE),
        "fp8_tensor_bf16": _form(weight_scale=Stored(PLAIN, shape=as_scalar)),
        "fp8_row": _form(weight_scale=Stored(PLAIN)),
        "fp8_row_bf16": _form(weight_scale=Stored(PLAIN)),
    }
)
WITH_E8M0 = ("fp8_block_e8m0", "mxfp4_e8m0")
READ_ONLY = ("fp8_tensor_bf16", "fp8_row", "fp8_row_bf16")
HOLDS = ", ".join(name for name in FORMS if name not in READ_ONLY)
SCALES = {"F32": "", "BF16": "_bf16"}  # dtype of X.weight_scale -> what its layouts' names end in
CODES = ("F8_E4M3", "F8_E5M2", "U8", "I8", "F4")  # dtypes of weights that are none without their scale


def form(layout: Layout) -> Form | None:
    """How a layout is stored; None if it is not."""
    return FORMS.get(layout.name)


# ---------------------------------------------------------------- reading


def find(says: Says, tensors: Tensors, read: Read) -> Iterator[Found]:
    """The weights among the tensors of a folder.

    Raises
    ------
    ContainerError
        If the config has blocks of another size.
    """
    blocks = says.get("weight_block_size")
    if blocks is not None and blocks != [SIDE, SIDE]:
        raise ContainerError(f"weight_block_size is {blocks!r}, and only [{SIDE}, {SIDE}] or none is read", "PF105")
    for name in tensors:
        module = name.removesuffix(WEIGHT)
        scale = next((tensors[module + s] for s in (INVERSE, PLAIN, SCALE) if module + s in tensors), None)
        if name.endswith(WEIGHT) and scale and (found := _found(name, tensors[name], scale)):
            yield found
        elif stacked := tensors.get(name + "_scale_inv"):
            yield Found(name, why=f"with {stacked.name} beside it, a stack of experts, which is not read yet")


def _found(name: str, weight: TensorInfo, scale: TensorInfo) -> Found | None:
    """The weight of two tensors; None if they have nothing to do with each other."""
    kinds, shape = (weight.kind, scale.kind), weight.shape
    if not scale.name.endswith(INVERSE) and weight.kind not in CODES:
        return None
    if scale.name.endswith(PLAIN):
        whole = prod(scale.shape) == 1
        if weight.kind == "F8_E4M3" and scale.kind in SCALES and (whole or scale.shape in (shape[:1], (*shape[:1], 1))):
            return Found(name, "FP8", ((("fp8_tensor" if whole else "fp8_row") + SCALES[scale.kind], shape),))
    elif kinds == ("F8_E4M3", "F32") and scale.name.endswith(INVERSE):
        # the scale of a single block is a matrix, that of a whole tensor is not
        lone = prod(scale.shape) == 1 and len(scale.shape) < 2
        return Found(name, "FP8", (("fp8_tensor" if lone else "fp8_block", shape),))
    elif kinds == ("F8_E4M3", "F8_E8M0") and scale.name.endswith(SCALE):
        return Found(name, "FP8", (("fp8_block_e8m0", shape),))
    elif kinds in (("I8", "F8_E8M0"), ("F4", "F8_E8M0")) and scale.name.endswith(SCALE) and shape:
        twice = shape if weight.kind == "F4" else (*shape[:-1], 2 * shape[-1])
        return Found(name, "MXFP4", (("mxfp4_e8m0", twice),))
    told = f"with a {scale.name.removeprefix(name.removesuffix(WEIGHT) + '.')} in {scale.kind} {list(scale.shape)}"
    return Found(name, why=f"{told} beside it; no such weight is read yet, convert the model it was made from")


# ---------------------------------------------------------------- writing


def refusal_of(layout: Layout, shape: Shape) -> str:
    """Why it cannot hold a packed tensor of this shape; empty if it can."""
    if layout.name in READ_ONLY:
        return f"{layout.name} is read from such folders, not written; say fp8_tensor, or --export compressed_tensors"
    return "" if len(shape) == 2 else f"{len(shape)} dimensions, a linear layer has 2; {STAYS}"


def plan_refusal_of(steps: tuple[Step, ...]) -> str:
    """Why transformers would not load these tensors together; empty if it would."""
    packed = packed_steps(steps)
    if not packed:
        return f"nothing would be {HOLDS}"
    names = {s.layout.name for s in packed}
    if "fp8_tensor" in names and len(names) > 1:
        return "fp8_tensor and blocks in one model, which has one weight_block_size for all; choose one with --map"
    if "fp8_block" in names and names & set(WITH_E8M0):
        return "fp8_block has float32 scales, the others E8M0, and a model has one scale_fmt; say fp8_block_e8m0"
    return embedding_refusal(steps)


def says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    names = {s.layout.name for s in packed_steps(steps)}
    modules = {s.name.removesuffix(WEIGHT) for s in packed_steps(steps)}
    static = any((was := input_scale(s)) and s.name.removesuffix(was.suffix) in modules for s in steps)
    return {
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": None if "fp8_tensor" in names else [SIDE, SIDE],
        **({"scale_fmt": "ue8m0"} if names & set(WITH_E8M0) else {}),
        **({"expert_dtype": "fp4"} if "mxfp4_e8m0" in names else {}),
        "modules_to_not_convert": stay_dense(steps),
    }


DIALECT = Dialect(
    NAME=NAME,
    title="DeepSeek's form",
    holds=HOLDS,
    form=form,
    find=find,
    says=says,
    refusal_of=refusal_of,
    plan_refusal_of=plan_refusal_of,
)
