"""AMD Quark: folders whose linear layers are MXFP4, which vLLM and SGLang load on AMD's processors.

    X.weight         U8 (rows, cols / 2)     two neighbouring columns a byte, the first in its low half
    X.weight_scale   U8 (rows, cols / 32)    exponents of two, 127 is one
    config.json      quantization_config: quant_method "quark", how weights and inputs are rounded, what stays dense

Source: vLLM 006bce4, quantization/quark/quark.py; 039541c, quantization/quark/schemes/quark_ocp_mx.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from packfmt.exporters import Extras
from packfmt.exporters.beside import quantised_by
from packfmt.exporters.folder import (
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
    embedding_refusal,
    packed_steps,
    stay_dense,
)
from packfmt.layout import Layout
from packfmt.plan import Step

NAME = METHOD = "quark"
LAYOUT = "mxfp4_pairs"
SCALE = ".weight_scale"
FORM = Form({"weight_packed": Stored(WEIGHT), "weight_scale": Stored(SCALE)}, WEIGHT)
SPEC: Final = {  # of a weight, as Quark's own export has it
    "dtype": "fp4",
    "is_dynamic": False,
    "qscheme": "per_group",
    "ch_axis": -1,
    "group_size": 32,
    "symmetric": None,
    "round_method": "half_even",
    "scale_type": "float",
    "scale_format": "e8m0",
    "scale_calculation_mode": "even",
    "mx_element_dtype": None,
    "observer_cls": "PerBlockMXObserver",
    "is_scale_quant": False,
}
EXPORT: Final = {
    "kv_cache_group": [],
    "min_kv_scale": 0.0,
    "pack_method": "reorder",
    "weight_format": "real_quantized",
    "weight_merge_groups": None,
}


def form(layout: Layout) -> Form | None:
    """How a layout is stored; None if it is not."""
    return FORM if layout.name == LAYOUT else None


def refusal_of(layout: Layout, shape: Shape) -> str:
    """Why it cannot hold a packed tensor of this shape; empty if it can."""
    return "" if len(shape) == 2 else f"{len(shape)} dimensions, a linear layer has 2; {STAYS}"


def plan_refusal_of(steps: tuple[Step, ...]) -> str:
    """Why a reader would not load these tensors together; empty if it would."""
    return embedding_refusal(steps) if packed_steps(steps) else f"nothing would be {LAYOUT}"


def says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """The config: what the source's said if it was such a folder itself, else of 4-bit weights and dense inputs."""
    carried = quantised_by(METHOD, extras.config)
    kinds = {"weight": SPEC, "input_tensors": None, "output_tensors": None, "bias": None, "target_device": None}
    return {
        "quant_method": METHOD,
        "quant_mode": "eager_mode",
        "algo_config": None,
        "global_quant_config": kinds,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "softmax_quant_spec": None,
        "export": EXPORT,
        **carried,
        "exclude": stay_dense(steps),
    }


def find(says: Says, tensors: Tensors, read: Read) -> Iterator[Found]:
    """Each X.weight of bytes, with X.weight_scale beside it."""
    for name, info in tensors.items():
        scale = tensors.get(name.removesuffix(WEIGHT) + SCALE)
        if not name.endswith(WEIGHT) or scale is None:
            continue
        if (info.kind, scale.kind) == ("U8", "U8") and info.shape:
            yield Found(name, "fp4 with e8m0", ((LAYOUT, (*info.shape[:-1], 2 * info.shape[-1])),))
        else:
            yield Found(
                name, why=f"with scales in {scale.kind}, of which packfmt reads 4-bit floats (MXFP4) from Quark"
            )


DIALECT = Dialect(
    NAME=NAME,
    title="AMD Quark",
    holds=LAYOUT,
    form=form,
    find=find,
    says=says,
    refusal_of=refusal_of,
    plan_refusal_of=plan_refusal_of,
)
