"""How a layout stands in the tensors of a GGUF: which ggml type, and where in its bytes components are.

A packed tensor is one tensor of the file, or two: the scale of a whole NVFP4 tensor `X.weight` is the F32
tensor `X.scale` (`GgmlType.beside`), as llama.cpp looks for it: one number, or one for each expert of a stack.
If these are all the same, the layout is that of one number. `X.input_scale` is no part of a weight.
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np

from packfmt.codec import Array, matrix
from packfmt.exporters.gguf_header import aligned
from packfmt.exporters.gguf_types import GgmlType, ggml_types
from packfmt.layout import DENSE, Layout

NAME = "gguf"
DENSE_OF = {name.upper(): DENSE[name] for name in ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64")}
SCALE_BYTES = 4  # of a scale in a tensor of its own, one F32


def type_of(layout: Layout) -> str:
    """The ggml type that stores a layout; empty if none does."""
    dense = (kind for kind, known in DENSE_OF.items() if known == layout)
    by_name = (kind for kind, known in ggml_types().items() if layout.name in (known.alone, known.scaled))
    return dict(layout.also).get(NAME, "") or next(dense, "") or next(by_name, "")


@cache
def misfit(layout: Layout, kind: str, shape: tuple[int, ...]) -> str:
    """Why such a tensor cannot be of this ggml type; empty if its components fill the type's bytes.

    The first component is the type's blocks; others, such as a scale, stand in its tail or in a tensor beside it.
    """
    known = ggml_types().get(kind)
    if known is None:
        return f"{layout.name}: GGUF knows no type {kind!r}"
    if layout.streams:
        return f"{layout.name}: has a stream, whose length no ggml type tells"
    blocks, *rest = (c.nbytes for c in layout.fit(*matrix(shape)).components)
    if known.beside and rest:
        scale, count = layout.fit(*matrix(shape)).components[1], rest[0] // SCALE_BYTES
        if len(rest) > 1 or scale.dtype != "<f4":
            return f"{layout.name}: beside its blocks {kind} has nothing but F32 scales, in a tensor of its own"
        if count not in (1, experts(shape)):
            say = known.each.format(shape[0]) if len(shape) == 3 else known.scaled
            return f"{layout.name}: has {count} scales, but {list(shape)} is no stack of {count} experts; say {say}"
        rest = []
    needs = known.blocks(shape)
    if needs is None:
        return f"{layout.name}: {list(shape)}, {kind} needs a multiple of {known.block} columns"
    if blocks != needs:
        return f"{layout.name}: {prod(shape)} weights take {blocks} bytes, {kind} {needs}"
    if sum(rest) > (max(known.tails) if prod(shape) else 0):
        return f"{layout.name}: {sum(rest)} bytes beside its {layout.components[0].name}, for which {kind} has no room"
    return ""


def experts(shape: tuple[int, ...]) -> int:
    """How many scales llama.cpp wants of a tensor: one for each expert of a stack."""
    return max(1, shape[0]) if len(shape) == 3 else 1


def places_in(layout: Layout, known: GgmlType | None, shape: tuple[int, ...]) -> dict[str, int]:
    """Where components begin in a tensor's bytes: the first is its blocks, others stand in the tail if it has one."""
    first, *rest = layout.fit(*matrix(shape)).components
    places, at = {first.name: 0}, aligned(first.nbytes, known.tail_alignment if known else 1)
    for c in rest if not known or not known.beside else ():
        places[c.name] = at
        at += c.nbytes
    return places


def others_of(layout: Layout, known: GgmlType | None, name: str) -> dict[str, str]:
    """Component -> the tensor of its own that holds it; empty if all are in the tensor `name`."""
    rest = layout.components[1:] if known and known.beside else ()
    return {c.name: known.name_beside(name) for c in rest if known}


def alike(scales: Array) -> bool:
    """Whether all scales in these bytes are the same."""
    each = scales.reshape(-1, SCALE_BYTES)
    return bool((each == each[:1]).all())


def as_many(scales: Array, nbytes: int) -> Array | None:
    """Bytes of so many scales, of those that a file has: these, or the one that they all are; None if they differ."""
    if scales.size == nbytes:
        return scales
    return np.tile(scales[:SCALE_BYTES], nbytes // SCALE_BYTES) if alike(scales) else None
