"""Tensor types of GGUF files: their ids, how many bytes they take, and which layouts those bytes may have.

Mainline's types are those of the installed gguf. Other projects took ids for types of their own, several of
them the same ids. A file does not say whose type it means, but a tensor has room for no other number of bytes
than its type needs: that tells them apart (`among`).

Some types have the same id and size for several orders of bytes. Nothing in a file tells those apart: the
user does, or the model that the file was made from.

A scale of the whole tensor stands behind the blocks (`tails`), or is a tensor of its own (`beside`), which may
hold one for each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Final

from packfmt.codec import matrix
from packfmt.exporters.gguf_header import Header, aligned

WEIGHT = ".weight"  # what most tensors' names end in, and a scale's beside them does not


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A tensor type: `nbytes` for every `block` weights of a row, and what stands beside them.

    `tails` are bytes after all blocks, once a tensor; more than one where writers differ, the first is ours.
    """

    name: str
    ids: tuple[int, ...]  # numbers that stand for it in files, ours first
    block: int
    nbytes: int
    row: int = 0  # bytes before the blocks of each row
    tails: tuple[int, ...] = (0,)
    tail_alignment: int = 1
    body: Callable[[int, int], int | None] | None = None  # (rows, cols) -> bytes, where blocks do not say it
    choices: tuple[str, ...] = ()  # layouts that its bytes may have; readers elsewhere expect the first
    why: str = ""  # why the file alone does not say which of them
    instead: str = ""  # layouts that can hold the same numbers, where the first of `choices` cannot
    beside: str = ""  # what the name of a tensor of its own ends in, which holds its scale; empty: scales have a tail
    alone: str = ""  # the layout of a tensor without such a scale
    scaled: str = ""  # and with it
    each: str = ""  # and with one of its own for each of so many experts
    source: str = ""

    def blocks(self, shape: tuple[int, ...]) -> int | None:
        """Bytes of a tensor before the tail; None if its rows and columns do not fill the blocks."""
        rows, cols = matrix(shape)
        if cols % self.block:
            return None
        if self.body and rows and cols:
            return self.body(rows, cols)
        return rows * (self.row + cols // self.block * self.nbytes)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The bytes that a tensor may take; none if it does not fill the blocks. An empty one takes 0."""
        blocks = self.blocks(shape)
        if blocks is None or not prod(shape):
            return () if blocks is None else (0,)
        return tuple(aligned(blocks, self.tail_alignment) + tail if tail else blocks for tail in self.tails)

    def fits(self, shape: tuple[int, ...], room: int, alignment: int) -> int | None:
        """Which of its sizes fills a room, up to padding, which the last tensor of a file may lack."""
        full = aligned(room, alignment)
        return next((n for n in self.sizes(shape) if n <= room and aligned(n, alignment) == full), None)

    def name_beside(self, name: str) -> str:
        """What the tensor is called that holds the scale of the tensor `name`."""
        return name.removesuffix(WEIGHT) + self.beside

    def must_choose(self) -> str:
        """What a reader must be told, in words."""
        which = " or ".join(f"--read-as {self.name}={name}" for name in self.choices)
        return f"{self.why}; say {which or f'--read-as {self.name}=LAYOUT'}"


def _tl2_body(rows: int, cols: int) -> int | None:
    """All but 256 columns in threes of five bits, the rest in pairs of four."""
    if rows % 32 or cols <= 256:
        return None
    return (cols - 256) * rows // 3 * 5 // 8 + 256 * rows // 2 * 4 // 8


KERNEL = (
    "its order depends on the kernel configuration (BM, BK, bm), which is not in the file; "
    "the machine that made it has it in kernel_config.ini"
)
REVISIONS = "two revisions have this type and size: quads 16 columns apart (sherry_s16), or side by side (sherry)"
MACHINES = "x86 and ARM builds order its codes differently"

OTHERS: Final = (
    GgmlType(
        "NVFP4", (40,), 64, 36, beside=".scale", alone="nvfp4_plain", scaled="nvfp4", each="nvfp4_x{}",
        source="ggml d99724f2, src/ggml-common.h block_nvfp4; llama.cpp 00bd27a6, conversion/base.py _repack_nvfp4",
    ),
    GgmlType("Q2_0", (42,), 64, 18, source="ggml d99724f2, include/ggml.h, src/ggml-common.h block_q2_0"),
    # 43 first: mainline gave 42 to Q2_0 after the first STQ1_0 files were published
    GgmlType(
        "STQ1_0", (43, 42), 256, 42, choices=("sherry_s16", "sherry"), why=REVISIONS, instead="tq1_0 or tq2_0",
        source="llama.cpp pull request 22836: 42 in Hy-MT files, 43 in Hy4 files",
    ),
    GgmlType("PQ2_0", (142, 42), 128, 34, source="PrismML's llama.cpp: 42 as Q2_0 at first, then 142"),
    GgmlType("PTQ1_0", (143,), 128, 28, source="PrismML's llama.cpp"),
    GgmlType("Q2_0C", (40,), 512, 130, source="Tencent's llama.cpp, 2-bit SEQ"),
    GgmlType("TQ2_0_FX4", (43,), 1024, 520, source="fucina 4b636db, src/ptqtp.zig"),
    GgmlType(
        "I2_S", (36,), 128, 32, tails=(32,), choices=("i2_s", "i2_s_arm"), why=MACHINES, instead="i2_s",
        source="bitnet.cpp 16da220, src/ggml-bitnet-mad.cpp quantize_i2_s",
    ),
    GgmlType(
        "TL1", (38,), 4, 1, tails=(32, 0), why=KERNEL, source="bitnet.cpp 16da220, utils/convert-hf-to-gguf-bitnet.py",
    ),
    GgmlType(
        "TL2", (39,), 4, 1, tails=(32, 0), tail_alignment=32, body=_tl2_body, why=KERNEL,
        source="bitnet.cpp's llama.cpp, ggml/src/ggml.c ggml_nbytes",
    ),
    GgmlType("IQ1_BN", (134,), 64, 13, row=2, source="ik_llama.cpp 8337e4c, ggml/src/ggml-common.h"),
    GgmlType("IQ2_BN", (135,), 64, 16, row=4, source="ik_llama.cpp 8337e4c, ggml/src/ggml-common.h"),
)  # fmt: skip


@cache
def ggml_types() -> dict[str, GgmlType]:
    """Every type that a file may hold, by name: the installed gguf's, and those of other projects."""
    from gguf.constants import GGML_QUANT_SIZES  # not above: it imports all of gguf

    out = {kind.name: GgmlType(kind.name, (int(kind),), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    for other in OTHERS:
        mine = out.get(other.name)
        # a later gguf may know it: its id is the one to write
        ids = tuple(dict.fromkeys((*(mine.ids if mine else ()), *other.ids)))
        out[other.name] = replace(other, ids=ids)
    return out


def among(number: int) -> dict[str, GgmlType]:
    """The types that files mean by an id."""
    return {name: known for name, known in ggml_types().items() if number in known.ids}


def sized(candidates: dict[str, GgmlType], shape: tuple[int, ...]) -> str:
    """Types and the bytes of such a tensor in each, for an error."""
    return ", ".join(
        f"{name} {' or '.join(map(str, known.sizes(shape))) or f'not {list(shape)}'}"
        for name, known in candidates.items()
    )


def rooms(size: int, header: Header) -> dict[str, int]:
    """Bytes from each tensor's first to the next one's, or to the end of a file of `size` bytes."""
    order = sorted(header.entries, key=lambda e: (e.offset, prod(e.shape)))  # an empty one has room for nothing
    ends = (*(e.offset for e in order[1:]), size - header.data)
    return {e.name: end - e.offset for e, end in zip(order, ends, strict=False)}
