"""Tensors of random bytes in ggml's block sizes, and the file that holds them."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from packfmt.codec import PackedTensor
from packfmt.exporters import Extras, gguf
from packfmt.layout import DENSE, Codes, Layout, Values, blocks, cols, dtype_of, grid
from packfmt.plan import Plan, Step
from tests.outputs import save

# Block sizes as ggml has them; what is inside a block is not this container's business.
Q4_0 = blocks(
    "q4_0", 32, Values("scale", "<f2"), Codes("codes", 4, (cols(1, 16),), (cols(16, 2),)),
    grid=grid("affine", zero=8), also=(("gguf", "Q4_0"),),
)  # fmt: skip
Q8_0 = blocks(
    "q8_0", 32, Values("scale", "<f2"), Values("codes", "i1", (cols(1, 32),)),
    grid=grid("affine", zero=0), also=(("gguf", "Q8_0"),),
)  # fmt: skip
MXFP4 = blocks(
    "mxfp4", 32, Values("scale", "float8_e8m0fnu"), Codes("codes", 4, (cols(1, 16),), (cols(16, 2),)),
    grid=grid("affine", zero=0), also=(("gguf", "MXFP4"),),
)  # fmt: skip
PACKED = (Q4_0, Q8_0, MXFP4)
DENSES = tuple(DENSE[name] for name in ("f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64"))
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


def resolve(container: str, kind: str) -> Layout | None:
    return next((layout for layout in PACKED if (container, kind) in layout.also), None)


def nothing(container: str, kind: str) -> Layout | None:
    return None


def tensor_of(layout: Layout, shape: tuple[int, ...], seed: int = 0, dtype: str = "") -> PackedTensor:
    """A packed tensor of random bytes."""
    rng = np.random.default_rng(seed)
    (placed,) = layout.fit(math.prod(shape[:-1]), shape[-1] if shape else 1).components
    raw = rng.integers(0, 256, placed.nbytes, np.uint8)
    own = dtype_of(placed.dtype).name if layout in DENSES else "float32"
    return PackedTensor(
        layout, shape, {placed.name: raw.view(dtype_of(placed.dtype)).reshape(placed.shape)}, dtype or own
    )


def plan_of(tensors: dict[str, PackedTensor], source: str = "a/model") -> Plan:
    steps = tuple(Step(name, t.shape, t.dtype, t.layout, t.layout, "keep", "") for name, t in tensors.items())
    return Plan(source, "gguf", steps)


def write(path: Path, tensors: dict[str, PackedTensor], extras: Extras | None = None) -> Path:
    save(gguf, path, plan_of(tensors), tensors.values(), extras or Extras())
    return path


def stored(tensor: PackedTensor) -> bytes:
    (array,) = tensor.components.values()
    return array.tobytes()


def model() -> dict[str, PackedTensor]:
    return {
        "embed.weight": tensor_of(Q8_0, (6, 64), 1, "bfloat16"),
        "layers.0.experts": tensor_of(Q4_0, (2, 3, 96), 2),
        "layers.0.mlp": tensor_of(MXFP4, (5, 32), 3),
        **{f"dense.{layout.name}": tensor_of(layout, (3, 5), i) for i, layout in enumerate(DENSES)},
        "norm.weight": tensor_of(DENSE["f32"], (7,), 4),
        "packed.row": tensor_of(Q8_0, (64,), 5),
        "step": tensor_of(DENSE["i64"], (), 6),
        "conv": tensor_of(DENSE["f16"], (2, 1, 3, 4), 7),
        "none": tensor_of(DENSE["f32"], (0, 4), 8),
    }


def same(a: PackedTensor, b: PackedTensor) -> bool:
    return (a.layout, a.shape, a.dtype, stored(a)) == (b.layout, b.shape, b.dtype, stored(b))


def foreign(
    path: Path,
    *tensors: tuple[str, tuple[int, ...], int, bytes],
    padded: bool = True,
    alignment: int = 32,
    key: str = "general.alignment",
) -> Path:
    """A file as other projects write it: (name, shape with rows first, ggml type, bytes) a tensor, and one key."""
    entries, data = b"", b""
    for name, shape, number, raw in tensors:
        text = name.encode()
        entries += struct.pack(f"<Q{len(text)}sI{len(shape)}Q", len(text), text, len(shape), *shape[::-1])
        entries += struct.pack("<IQ", number, len(data))
        data += raw.ljust(-(-len(raw) // alignment) * alignment, b"\0")
    uint32 = 4
    pair = struct.pack(f"<Q{len(key)}sII", len(key), key.encode(), uint32, alignment)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 1) + pair + entries
    head = head.ljust(-(-len(head) // alignment) * alignment, b"\0")
    if not padded:  # after the last tensor
        data = data[: len(data) - -len(tensors[-1][3]) % alignment]
    path.write_bytes(head + data)
    return path
