"""sherry: of every four weights one is zero, three are plus or minus a scale; five bits say which (3:4 sparse ternary).

    w = scale * VALUES[code][lane]

All 32 codes are used, so the weights take 1.25 bits, and scales come on top. The layouts differ in which
four columns make a quad, in how many weights share a scale, and in where the bits lie:

    sherry          side by side, 256 columns a scale: what Sherry trains, in STQ1_0's bytes of its first revision
    sherry_s16      16 columns apart: ggml's STQ1_0 as files have it now; nothing in a file tells the two apart
    sherry_s16_perm the same, and a permutation of the columns, which makes quads side by side fit
    sherry_g128     side by side, 128 columns a scale
    sherry_row      side by side, one float32 scale a row
    sherry_t32      32 rows in a tile for matrix products, side by side; sherry_t32_s16: 16 apart

Bytes, rounding and worked examples: spec/formats/sherry.md
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from packfmt.codec import Codec, Remark
from packfmt.kernels import spell, ternary, ternary_blocks
from packfmt.layout import COLS, ROWS, Axis, Codes, Component, Digit, Layout, Values, cols, grid, rows
from packfmt.spellings import contiguous_quads

QUADS = Axis("quads", "cols", 4)
FIFTH = Axis("fifth", size=5)
quads, fifth = partial(Digit, "quads"), partial(Digit, "fifth")

PAPER = "Sherry, arXiv 2601.07892, section 3"
STQ1_0 = "llama.cpp pull request 22836, block_stq1_0"


def _signs(code: int) -> tuple[int, ...]:
    """The four steps of a code: bits 2 and 3 say which lane is zero, bit 4 whether the first other is negative.

    Bits 0 and 1 say whether the second and third have the opposite sign to the first.
    """
    first = -1 if code >> 4 else 1
    others = [first, -first if code & 1 else first, -first if code & 2 else first]
    others.insert(code >> 2 & 3, 0)
    return tuple(others)


VALUES = tuple(_signs(code) for code in range(32))


def _planes(block: int) -> tuple[Codes, Codes]:
    """The low four bits of all quads of a block, then the sign bits."""
    n = block // 4
    low = "`qs`: byte j holds the low four bits of quads 2 j and 2 j + 1, lower first"
    high = "`sign`: byte j holds the high bit of quads 8 j to 8 j + 7, lowest first"
    return (
        Codes("codes", 4, (quads(2, n // 2),), (quads(1, 2),), doc=low),
        Codes("codes", 1, (quads(8, n // 8),), (quads(1, 8),), low=4, doc=high),
    )


def _layout(name: str, components: tuple[Component, ...], stride: int, purpose: str, **rest: object) -> Layout:
    axes = rest.pop("axes", (ROWS, QUADS))
    numbers = grid(str(rest.pop("grid", "quads")), stride=stride, values=VALUES)
    return Layout(name, components, numbers, axes, purpose, (PAPER, STQ1_0), **rest)  # type: ignore[arg-type]


def _blocks(block: int) -> Component:
    cell = (*_planes(block), Values("scale", "<f2", doc="`d`"))
    return Component("blocks", (rows(), quads(block // 4)), cell)


def _tile(name: str, stride: int, apart: str) -> Layout:
    words = "word i of 16 quads: quads 3 i, 3 i + 1, 3 i + 2 in bits 0 to 14, bit i of quad 15 in bit 15"
    cell = (
        Values("codes", "<u2", (cols(64, 4), fifth(1, 5), rows(1, 32)), doc=words),
        Values("scale", "<f2", (rows(1, 32),)),
    )
    axes = (Axis("rows", "rows", pad=32), COLS, FIFTH)
    purpose = f"3:4 sparse ternary, quads {apart}: a tile of 32 rows for matrix products"
    return _layout(name, (Component("tiles", (rows(32), cols(256)), cell),), stride, purpose, axes=axes,
                   grid="quads_in_fives")  # fmt: skip


SIDE, APART = "side by side", "16 columns apart"
PERM = Component("perm", (cols(),), (Values("perm", "<u4"),), doc="column perm[j] of the weight is stored as column j")
ROW = (
    Component("codes", (rows(), quads(32)), _planes(128)),
    Component("scale", (rows(),), (Values("scale", "<f4"),), doc="one a row"),
)

SHERRY = _layout("sherry", (_blocks(256),), 1, f"3:4 sparse ternary, quads {SIDE}, a float16 scale for 256")
S16 = _layout(
    "sherry_s16", (_blocks(256),), 16, f"3:4 sparse ternary, quads {APART}, a float16 scale for 256",
    also=(("gguf", "STQ1_0"),),
)  # fmt: skip
S16_PERM = _layout(
    "sherry_s16_perm", (_blocks(256), PERM), 16, f"3:4 sparse ternary, quads {APART} in permuted columns",
    axes=(ROWS, QUADS, COLS),
)  # fmt: skip
G128 = _layout("sherry_g128", (_blocks(128),), 1, f"3:4 sparse ternary, quads {SIDE}, a float16 scale for 128")
PER_ROW = _layout("sherry_row", ROW, 1, f"3:4 sparse ternary, quads {SIDE}, a float32 scale a row")
T32 = _tile("sherry_t32", 1, SIDE)
T32_S16 = _tile("sherry_t32_s16", 16, APART)


# ---------------------------------------------------------------- encoders

Weights = np.ndarray
WEIGHTED = ("mean", "row", "tensor")
TOGETHER = {"tensor": 0}  # one scale for all rows, though each group has a place for its own


def _row_parts(weight: Weights, **choice: Any) -> dict[str, Weights]:
    parts = ternary.sherry(weight, 1, max(128, weight.shape[1]), dtype="<f4", **choice)
    scale = parts["scale"][:, :1] if weight.size else np.zeros((len(weight), 1), np.float32)
    return {"codes": parts["codes"], "scale": scale}


def _perm_parts(weight: Weights, **choice: Any) -> dict[str, Weights]:
    """The quads side by side become quads 16 apart, so their codes stay; `perm` says where each column went."""
    parts = ternary.sherry(weight, 1, 256, **choice)
    perm = contiguous_quads(weight.shape[1], 16)
    return {"codes": parts["codes"][:, :, None], "scale": parts["scale"][:, :, None], "perm": perm[None, None]}


def _tile_parts(weight: Weights, stride: int, **choice: Any) -> dict[str, Weights]:
    parts = ternary.sherry(weight, stride, 256, **choice)
    return {"codes": spell.write_fives(parts["codes"]), "scale": parts["scale"][:, :, None]}


def _remark(stride: int, group: int) -> Remark:
    """Quads of a model that is ternary already, which this layout cannot hold."""

    def count(weight: Weights) -> int:
        return ternary.misfits(weight, stride, group or weight.shape[1])

    return Remark(count, lambda n, weights: f"{n} of {weights // 4} quads are ternary, but have not exactly one zero")


def _codec(
    layout: Layout,
    parts: Callable[..., dict[str, Weights]],
    stride: int,
    group: int,
    block: int = 0,
    amax: bool = False,
) -> Codec:
    """`block`: of the layout's records, if they have the bytes that `kernels.ternary_blocks.sherry` writes."""
    encoders: dict[str, Any] = {
        "mean": parts,
        "row": partial(parts, share="row"),
        "tensor": partial(parts, share="tensor"),
    }
    if amax:
        encoders["amax"] = partial(parts, scale_rule="amax")
    fast = {"mean": partial(ternary_blocks.sherry, stride=stride, block=block)} if block else {}
    return Codec(layout, encoders, WEIGHTED, fast, _remark(stride, group), together=TOGETHER)


def _side(stride: int, group: int) -> Callable[..., dict[str, Weights]]:
    return partial(ternary.sherry, stride=stride, group=group)


PER_ROW_CODEC = Codec(
    PER_ROW,
    {"mean": _row_parts, "tensor": partial(_row_parts, share="tensor")},
    ("mean", "tensor"),
    remark=_remark(1, 0),
    together=TOGETHER,
)
CODECS = {
    "sherry": _codec(SHERRY, _side(1, 256), 1, 256, 256, amax=True),
    "sherry_s16": _codec(S16, _side(16, 256), 16, 256, 256, amax=True),
    "sherry_s16_perm": _codec(S16_PERM, _perm_parts, 1, 256),
    "sherry_g128": _codec(G128, _side(1, 128), 1, 128, 128),
    "sherry_row": PER_ROW_CODEC,
    "sherry_t32": _codec(T32, partial(_tile_parts, stride=1), 1, 256),
    "sherry_t32_s16": _codec(T32_S16, partial(_tile_parts, stride=16), 16, 256),
}
