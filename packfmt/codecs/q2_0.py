"""q2_0: 64 weights share one float16 scale; codes are 2 bits for -1, 0, 1 and 2.

    w[j] = scale * (code[j] - 1)

Encoders write the first three alone, which makes it a ternary format; two steps are read as any other.
pq2_0 is the same with 128 weights a scale: PrismML's files have it, the older ones as Q2_0.

Bytes, rounding and worked example: spec/formats/q2_0.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.kernels import ternary
from packfmt.layout import Codes, Layout, Values, blocks, cols, grid

ZERO = 1
GGML = ("ggml d99724f2, src/ggml-common.h block_q2_0", "ggml d99724f2, src/ggml-quants.c quantize_row_q2_0_ref")
PRISM = ("PrismML's llama.cpp, block_pq2_0",)


def _layout(name: str, block: int, sources: tuple[str, ...]) -> Layout:
    doc = "`qs`: byte j holds codes 4 j to 4 j + 3, lowest bits first"
    return blocks(
        name,
        block,
        Values("scale", "<f2", doc="`d`"),
        Codes("codes", 2, (cols(4, block // 4),), (cols(1, 4),), doc=doc),
        grid=grid("affine", zero=ZERO),
        purpose=f"ternary weights, a float16 scale for {block}",
        sources=sources,
        also=(("gguf", name.upper()),),
    )


# "best" is the least squared error of steps -1 to 1
CODECS = {
    "q2_0": Codec(
        _layout("q2_0", 64, GGML), {"best": partial(ternary.ternary, group=64, name="q2_0"), "ggml": ternary.q2_0}
    ),
    "pq2_0": Codec(_layout("pq2_0", 128, PRISM), {"best": partial(ternary.ternary, group=128, name="pq2_0")}),
}
