"""Hugging Face's BitNet: a folder that transformers loads, with ternary weights packed four rows to a byte.

    X.weight         U8 (rows / 4, cols)
    X.weight_scale   BF16 [1]
    config.json      quantization_config: quant_method "bitnet", and how weights and scales are meant

Everything that is not packed is stored under its own name. transformers turns every linear layer into one of
BitNet's, save those that `modules_to_not_convert` names, so all that stay dense are named there.

Source: transformers 5.23.0, integrations/bitnet.py, quantizers/quantizer_bitnet.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from packfmt.codec import dense_dtype
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import Extras, Layouts
from packfmt.exporters.beside import CONFIG, quantised_by
from packfmt.exporters.folder import (
    STAYS,
    WEIGHT,
    Dialect,
    Form,
    Found,
    Read,
    Says,
    Stored,
    Tensors,
    embedding_refusal,
    no_embedding,
    packed_steps,
    stay_dense,
)
from packfmt.layout import DENSE, Layout
from packfmt.plan import Step

NAME = "bitnet"
FOREIGN = "U8 with a scale"  # what a user is told such a weight is
SCALE, DEFAULT = "_scale", "bitlinear"  # a scale's suffix; the class where config.json names none
CARRIED = ("use_rms_norm", "rms_norm_eps")  # of a source that is a BitNet model itself
FORM = Form({"weight": Stored(""), "weight_scale": Stored(SCALE)})


def linear_class(layout: Layout) -> str:
    """The class of transformers' that computes with a layout; empty if none does."""
    return dict(layout.also).get(NAME, "")


def form(layout: Layout) -> Form | None:
    """How a layout is stored; None if it is not."""
    return FORM if linear_class(layout) else None


# ---------------------------------------------------------------- writing


def refusal_of(layout: Layout, shape: tuple[int, ...]) -> str:
    """Why it cannot hold a packed tensor of this shape; empty if it can."""
    if len(shape) != 2:
        return f"{len(shape)} dimensions, a linear layer of BitNet's has 2; {STAYS}"
    return (
        f"{shape[0]} rows, transformers needs a multiple of 4; leave it with --map REGEX=keep" if shape[0] % 4 else ""
    )


def plan_refusal_of(steps: tuple[Step, ...]) -> str:
    """Why transformers would not load these tensors together; empty if it would."""
    packed = {s.name: linear_class(s.layout) for s in packed_steps(steps)}
    if len(classes := sorted(set(packed.values()))) > 1:
        return "bitnet and bitnet_divide in one model, which has one linear_class for all; choose one with --map"
    if not classes:
        return "nothing would be bitnet or bitnet_divide"
    if why_not := embedding_refusal(steps):
        return why_not
    stay = stay_dense(steps)
    for name in packed:
        if not name.endswith(WEIGHT):
            return f"{name}: is called neither .weight nor part of a linear layer; say --map '{re.escape(name)}=keep'"
        module = name.removesuffix(WEIGHT)
        if skipped := next((s for s in stay if _skips(s, module)), ""):
            return f"{name}: transformers would skip it with {skipped}, which stays dense"
    return ""


def _skips(pattern: str, module: str) -> bool:
    """Whether transformers takes a name in its list for this module (quantizers_utils.should_convert_module)."""
    try:
        matches = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
    except re.error:  # a name that is no expression, which transformers could not take either
        matches = None
    return bool(matches) or module.endswith(pattern)


def says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    (linear,) = {linear_class(s.layout) for s in packed_steps(steps)}
    carried = quantised_by(NAME, extras.config)
    return {
        "quant_method": NAME,
        "linear_class": linear,
        "quantization_mode": "offline",
        **{key: carried[key] for key in CARRIED if key in carried},
        "modules_to_not_convert": stay_dense(steps),
    }


# ---------------------------------------------------------------- reading


def find(says: Says, tensors: Tensors, read: Read) -> Iterator[Found]:
    """Each uint8 matrix and the scale beside it, of four times as many rows."""
    linear = says.get("linear_class", DEFAULT)
    if linear not in ("bitlinear", "autobitlinear"):
        raise ContainerError(f"{CONFIG}: linear_class is {linear!r}, needs bitlinear or autobitlinear", "PF102")
    for name, info in tensors.items():
        scale = tensors.get(name + SCALE)
        if info.layout != DENSE["u8"] or len(info.shape) != 2 or scale is None:
            continue
        if scale.layout != DENSE["bf16"] or prod(scale.shape) != 1:
            why = f"whose scale is {scale.kind} {list(scale.shape)}, and only one BF16 number is read"
            yield Found(name, why=why)
            continue
        rows, cols = info.shape
        yield Found(name, FOREIGN, ((linear, (4 * rows, cols)),))


def asked(read_as: Mapping[str, str], layouts: Layouts) -> Says | None:
    """What a config.json would say, where there is none and the user says {"U8": layout} instead.

    Raises
    ------
    PlanError
        If that is no layout of BitNet's.
    """
    says: Says | None = None
    for kind, name in read_as.items():
        layout = layouts("packfmt", name)
        if kind != "U8" or layout is None or dense_dtype(layout) or not linear_class(layout):
            raise PlanError(
                f"--read-as {kind}={name}: of safetensors only U8 can mean a layout, bitnet or bitnet_divide"
            )
        says = {"quant_method": NAME, "linear_class": linear_class(layout)}
    return says


DIALECT = Dialect(
    NAME=NAME,
    title="Hugging Face's BitNet",
    holds="bitnet, bitnet_divide",
    form=form,
    find=find,
    says=says,
    leaves=no_embedding,
    refusal_of=refusal_of,
    plan_refusal_of=plan_refusal_of,
)
