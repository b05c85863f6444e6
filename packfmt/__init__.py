"""packfmt packs model weights into low-bit and lossless layouts whose bytes are specified, proved and portable.

packed = packfmt.pack(weight, "q4_0")
packed.decode(); packed.nbytes; packed.layout.bits_per_weight
packed.matmul(x); ready = packfmt.prepare(packed); ready.matmul(x)
with packfmt.open("out/") as model: model["layers.0.mlp.up_proj.weight"].decode()
packfmt.convert("model/", "out/", to="mxfp4", overrides={r"lm_head": "q8_0"})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packfmt.checkpoint import Checkpoint, open
    from packfmt.codec import Array, PackedTensor
    from packfmt.conversion import convert
    from packfmt.errors import ContainerError, LayoutError, MachineError, MismatchError, PackfmtError, PlanError
    from packfmt.layout import Layout
    from packfmt.prepared import Prepared, prepare

__version__ = "0.1.0"

# Where each public name lives; a module is imported when its name is first used, so `import packfmt` is cheap.
_HOME = {
    "Checkpoint": "checkpoint",
    "open": "checkpoint",
    "PackedTensor": "codec",
    "convert": "conversion",
    "Prepared": "prepared",
    "prepare": "prepared",
    "Layout": "layout",
    "PackfmtError": "errors",
    "LayoutError": "errors",
    "PlanError": "errors",
    "ContainerError": "errors",
    "MismatchError": "errors",
    "MachineError": "errors",
}

__all__ = [
    "Checkpoint",
    "ContainerError",
    "Layout",
    "LayoutError",
    "MachineError",
    "MismatchError",
    "PackedTensor",
    "PackfmtError",
    "PlanError",
    "Prepared",
    "convert",
    "formats",
    "open",
    "pack",
    "prepare",
]


def pack(weight: Array, layout: str, encoder: str = "", importance: Array | None = None) -> PackedTensor:
    """Pack a weight of shape (..., cols) and any float dtype into a layout, by name.

    importance : what an error of each weight costs, (cols,) or the weight's shape, for encoders that weigh it

    Raises
    ------
    PlanError
        If no format has this name.
    LayoutError
        If the weight does not fit it (`codec.Codec.encode`).
    """
    from packfmt import codecs

    return codecs.get(layout).encode(weight, encoder, importance=importance)


def formats() -> tuple[str, ...]:
    """The names of all layouts that can be packed."""
    from packfmt import codecs

    return codecs.names()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"packfmt has no {name!r}")
    from importlib import import_module

    return getattr(import_module(f"packfmt.{_HOME[name]}"), name)
