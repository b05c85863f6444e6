"""squeezellm_w3, squeezellm_w4: codes name entries of a float32 table for each row, as in SqueezeLLM's files.

    w[r, c] = lookup_table[r, code[r, c]]

`qweight` holds the codes of 32 columns (w3: in three words; w4: of 8 columns in one), and words of neighbouring rows
are neighbours. With outliers these are squeezellm_w3_csr_32_f32 and squeezellm_w4_csr_32_f32 (dense_sparse).

Bytes, rounding and worked example: spec/formats/squeezellm.md
"""

from __future__ import annotations

from functools import partial

from packfmt.codec import Codec
from packfmt.codecs.codebook import CHOOSE, encode
from packfmt.layout import COLS, ROWS, WORD, Axis, Codes, Component, Digit, Layout, Values, cols, grid, rows

WORDS = Digit(WORD)


def _codec(bits: int) -> Codec:
    unit = 32 if 32 % bits else 32 // bits  # codes that fill whole words
    over = (cols(unit), WORDS, rows()) if unit * bits > 32 else (cols(unit), rows())
    layout = Layout(
        f"squeezellm_w{bits}",
        (
            Component("qweight", over, (Codes("codes", bits, (), (cols(1, unit),), "<u4"),), (len(over) - 1, 1)),
            Component("lookup_table", (rows(), Digit("level")), (Values("codebook", "<f4"),), (1, 1)),
        ),
        grid("codebook"),
        (ROWS, COLS, Axis("level", size=1 << bits)),
        purpose=f"{bits}-bit codes in words along the columns, a float32 codebook for each row",
        sources=("SqueezeLLM, arXiv 2306.07629", "SqueezeLLM a5fd71f, squeezellm/quant.py"),
    )
    return Codec(layout, {rule: partial(encode, rule=rule, layout=layout) for rule in CHOOSE}, tuple(CHOOSE))


CODECS = {codec.layout.name: codec for codec in map(_codec, (3, 4))}
