"""The containers: a module each, which writes and reads it.

A module has

    NAME
    refusal(layout, shape), name_refusal(name)   why it cannot hold such a tensor, or ""
    leaves(name, shape)                          why such a dense weight stays dense unless a rule says otherwise, or ""
    plan_refusal(steps)                          why it cannot hold such tensors together, or ""
    extras_refusal(extras)                       why it cannot do with what the model has beside them, or ""
    remarks(steps)                               what a user should know of the output: what it leaves out, and why
    lay(path, plan, extras)                      an Output: where every byte of every tensor will stand
    open(path, layouts, read_as)                 a Source; `read_as` says which layouts foreign types are meant as

or a `DIALECT` that has these as its methods (`folder.Dialect`): a folder in Hugging Face's form, whose config.json
says how some ecosystem's packed weights are stored in it.

A container knows names, offsets and bytes. It never looks inside a block and never meets a codec:
`layouts(container, type name)` tells it which layout a foreign type is, and `layouts("packfmt", name)` which
installed layout bears a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from packfmt.codec import PackedTensor
from packfmt.errors import PlanError
from packfmt.exporters.output import Output
from packfmt.layout import Layout
from packfmt.plan import Holder, Plan, Step, TensorInfo

SUFFIXES = {"safetensors": ".safetensors", "gguf": ".gguf"}  # of files; a folder is safetensors
FOLDERS = ("bitnet", "compressed_tensors", "deepseek", "gpt_oss", "modelopt", "quark")  # that are asked for by name
NAMES = (*SUFFIXES, *FOLDERS)
METHODS = {  # quant_method in config.json -> folder
    "bitnet": "bitnet",
    "compressed-tensors": "compressed_tensors",
    "fp8": "deepseek",
    "modelopt": "modelopt",
    "mxfp4": "gpt_oss",
    "quark": "quark",
}
SIGNS = {"hf_quant_config.json": "modelopt"}  # a JSON file that says what config.json may not -> folder
Layouts = Callable[[str, str], Layout | None]


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A GGUF metadata value: its type's name (an array's: "ARRAY:" and its items'), and the value."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class Extras:
    """What a model has beside its tensors, and takes along."""

    config: dict[str, Any] | None = None  # config.json
    files: Mapping[str, Path] = field(default_factory=dict)  # tokenizer and others: relative name -> file
    keyvalues: Mapping[str, KeyValue] = field(default_factory=dict)  # of a GGUF


class Source(Protocol):
    """An open container."""

    @property
    def index(self) -> Mapping[str, TensorInfo]: ...
    @property
    def extras(self) -> Extras: ...
    @property
    def undecided(self) -> Mapping[str, tuple[str, ...]]:
        """Types whose layout the file does not tell -> the layouts that it may be, if they are few."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> PackedTensor:
        """The tensor, a dense one in a layout of `layout.DENSE`; its checksum is checked where there is one.

        rows : only these, of the tensor as a matrix; unchecked. Several threads may read at once.
        """

    def check(self, name: str) -> None:
        """Compare the tensor's checksums, a piece at a time; without any, there is nothing to compare."""

    def files(self) -> list[Path]:
        """What was opened, and whatever decides how it is read."""

    def map(self, name: str) -> PackedTensor:
        """The tensor as it lies in the file, unchecked, where the container can; else as `read`."""

    def close(self) -> None: ...


class Container(Holder, Protocol):
    """A container's module; what its members do stands above."""

    def extras_refusal(self, extras: Extras) -> str: ...
    def remarks(self, steps: tuple[Step, ...]) -> list[str]: ...
    def lay(self, path: Path, plan: Plan, extras: Extras) -> Output: ...
    def open(self, path: Path, layouts: Layouts, read_as: Mapping[str, str] = ...) -> Source: ...


def get(name: str) -> Container:
    """The container called `name`; - may stand for _.

    Raises
    ------
    PlanError
        If there is none; the nearest names are given.
    """
    plain = name.lower().replace("-", "_")
    if plain not in NAMES:
        near = get_close_matches(plain, NAMES, 2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(NAMES)}"
        raise PlanError(f"no container is called {name!r}; {hint.replace('_', '-')}")
    module = import_module(f"{__name__}.{plain}")
    return cast(Container, getattr(module, "DIALECT", module))
