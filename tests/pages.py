"""What tests of pages and vectors share: the files of spec/, the tools' twins, and tensors of given bytes."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from packfmt import codecs, placement
from packfmt.codec import PackedTensor
from packfmt.layout import dtype_of

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "spec"
MANIFEST: dict[str, dict[str, Any]] = json.loads((SPEC / "vectors" / "manifest.json").read_text())


def tool(name: str) -> ModuleType:
    """A module of tools/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        return importlib.import_module(name)


def page(name: str) -> str:
    return (SPEC / "formats" / f"{name}.md").read_text()


def packed_of(name: str, shape: tuple[int, int], raw: list[bytes]) -> PackedTensor:
    """A tensor of each component's bytes."""
    layout = codecs.get(name).layout
    placed = layout.fit(*shape).components
    stored = {
        c.name: np.frombuffer(data, dtype_of(c.dtype)).reshape(c.shape) for c, data in zip(placed, raw, strict=True)
    }
    return PackedTensor(layout, shape, stored)


def bytes_of(packed: PackedTensor) -> list[bytes]:
    return [packed.components[c.name].tobytes() for c in packed.layout.components]


def packed_again(packed: PackedTensor) -> list[bytes]:
    parts = placement.unpack(packed.layout, packed.matrix, packed.components)
    stored = placement.pack(packed.layout, packed.matrix, parts)
    return [stored[c.name].tobytes() for c in packed.layout.components]


def vector_of(name: str, kind: str, numbers: str) -> tuple[PackedTensor, bytes]:
    """The tensor of `kind`.bin, or of a file for each component, and what another tool decodes it to."""
    rows, cols = MANIFEST[f"{name}/{numbers}.f32"]["shape"]
    parts = [c.name for c in codecs.get(name).layout.components]
    files = [f"{kind}.bin"] if len(parts) == 1 else [f"{kind}.{part}.bin" for part in parts]
    raw = [(SPEC / "vectors" / name / file).read_bytes() for file in files]
    return packed_of(name, (rows, cols), raw), (SPEC / "vectors" / name / f"{numbers}.f32").read_bytes()


def examples(pages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Format and text of every worked example on these pages."""
    for name in pages:
        text = page(name).split("## Worked example\n")[1].split("\n## ")[0]
        parts = re.split(r"^### (\S+)$", text, flags=re.M)
        yield from zip(parts[1::2], parts[2::2], strict=True) if len(parts) > 1 else [(name, text)]


def spelled(text: str) -> bytes:
    """Bytes of an example: `00 * 62` is 62 of them."""
    return bytes.fromhex(re.sub(r"(\w\w) \* (\d+)", lambda m: m[1] * int(m[2]), text))
