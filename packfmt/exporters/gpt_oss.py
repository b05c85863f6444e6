"""gpt-oss: OpenAI's folders, whose experts are stacked and packed in MXFP4.

    X_blocks      U8 (experts, rows, cols / 32, 16)    two neighbouring columns a byte, the first in its low half
    X_scales      U8 (experts, rows, cols / 32)        exponents of two, 127 is one
    config.json   quantization_config: quant_method "mxfp4", and what stays dense

X, such as model.layers.0.mlp.experts.gate_up_proj, is here a weight of (experts, rows, cols), rows being outputs as
everywhere; transformers, when it decodes these tensors, swaps rows and columns. gate_up_proj has the gates in its even
rows. All else is dense.

Source: gpt-oss 7b58334, gpt_oss/torch/weights.py; transformers 5.23.0, integrations/mxfp4.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from packfmt.codec import dense_dtype
from packfmt.errors import ContainerError
from packfmt.exporters import Extras
from packfmt.exporters.beside import quantised_by
from packfmt.exporters.folder import Dialect, Form, Found, Read, Says, Shape, Stored, Tensors, packed_steps
from packfmt.layout import Layout
from packfmt.plan import Step

NAME, METHOD = "gpt_oss", "mxfp4"
LAYOUT = "mxfp4_pairs"
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK, BYTES = 32, 16
STAY = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]  # as OpenAI has it


def _blocks(component: Shape, weight: Shape) -> Shape:
    return (*weight[:-1], weight[-1] // BLOCK, BYTES)


FORM = Form({"weight_packed": Stored(BLOCKS, shape=_blocks), "weight_scale": Stored(SCALES)})


def form(layout: Layout) -> Form | None:
    """How a layout is stored; None if it is not."""
    return FORM if layout.name == LAYOUT else None


def refusal_of(layout: Layout, shape: Shape) -> str:
    """Why it cannot hold a packed tensor of this shape; empty if it can."""
    return "" if len(shape) == 3 else f"{len(shape)} dimensions, experts have 3"


def leaves(name: str, shape: Shape) -> str:
    """Why a dense weight stays dense; empty if it is one of the experts."""
    return "" if len(shape) == 3 else "no expert, so it stays dense there"


def plan_refusal_of(steps: tuple[Step, ...]) -> str:
    """Why a reader would not load these tensors together; empty if it would."""
    packed = packed_steps(steps)
    if not packed:
        return f"nothing would be {LAYOUT}"
    for step in packed:
        if dense_dtype(step.before):  # its columns are outputs, and blocks would run along the wrong axis
            return (
                f"{step.name}: transformers' dense experts have rows and columns swapped, which packfmt does not undo"
            )
    return ""


def says(steps: tuple[Step, ...], extras: Extras) -> dict[str, Any]:
    """The config as OpenAI has it, with what the source's said if it was such a folder itself."""
    carried = quantised_by(METHOD, extras.config)
    return {"quant_method": METHOD, "modules_to_not_convert": STAY, **carried}


def find(says: Says, tensors: Tensors, read: Read) -> Iterator[Found]:
    """Each X_blocks."""
    for name, info in tensors.items():
        if not name.endswith(BLOCKS) or info.kind != "U8":
            continue
        weight = name.removesuffix(BLOCKS)
        if len(info.shape) < 3 or info.shape[-1] != BYTES:
            need = f"needs blocks of {BYTES} bytes in their last dimension"
            raise ContainerError(f"{name}: is {list(info.shape)}, {need}", "PF106")
        yield Found(weight, "mxfp4 in blocks", ((LAYOUT, (*info.shape[:-2], BLOCK * info.shape[-2])),))


DIALECT = Dialect(
    NAME=NAME,
    title="gpt-oss",
    holds=LAYOUT,
    form=form,
    find=find,
    says=says,
    leaves=leaves,
    refusal_of=refusal_of,
    plan_refusal_of=plan_refusal_of,
)
