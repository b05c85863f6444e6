"""Twenty layouts of other projects, written in packfmt's vocabulary.

Rows are output features, columns input features. Every entry names the project, the commit whose packing rule
was read, and the vector in tests/data/placement.json that this rule produced, if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

from packfmt.layout import (
    BIT,
    COLS,
    REST,
    ROWS,
    TOP,
    WORD,
    Axis,
    Codes,
    Component,
    Digit,
    Layout,
    Values,
    cols,
    grid,
    rows,
)

WORDS = Digit(WORD)


@dataclass(frozen=True)
class Foreign:
    layout: Layout
    stored: tuple[int, ...]  # shape of the component for the weight below, from the project's own files
    source: str
    vector: str = ""
    shape: tuple[int, int] = (64, 256)


def bits(size: int) -> Digit:
    return Digit(BIT, 1, size)


def one(
    name: str, over: tuple[Digit, ...], *cell: Codes | Values, dims: tuple[int, ...] = (), **rest: object
) -> Layout:
    return Layout(name, (Component("weight", over, cell, dims),), grid("raw"), **rest)  # type: ignore[arg-type]


def gptq(width: int) -> Layout:
    """Codes of one column group in a word; words of neighbouring rows side by side: int32 (cols * width / 32, rows)."""
    count = 32 // width
    return one(f"gptq_{width}", (cols(count), rows()), Codes("codes", width, (), (cols(1, count),), "<u4"))


def gptq_planar(name: str, *widths: int) -> Layout:
    """Planes of `widths` bits, the lowest first: for 32 columns all words of one plane, then all of the next.

    A cell is what 32 columns of all rows take, so the units of a plane run over the rows, too.
    """
    cell, low = [], 0
    for w in widths:
        units = (cols(32 // w, w), rows())
        cell.append(Codes("codes", w, units, (cols(1, 32 // w),), "<u4", low=low))
        low += w
    return one(name, (cols(32),), *cell)


FOREIGN = (
    *(Foreign(gptq(w), (256 * w // 32, 64), "AutoGPTQ 9f7d370, SqueezeLLM a5fd71f", f"GPTQ {w}b") for w in (2, 4, 8)),
    Foreign(
        one("gptq_3", (cols(32), WORDS, rows()), Codes("codes", 3, (), (cols(1, 32),), "<u4"), dims=(2, 1)),
        (24, 64),
        "AutoGPTQ 9f7d370, SqueezeLLM a5fd71f",
        "GPTQ/SqueezeLLM 3b (32 codes = 96-bit unit, word digit between k and n)",
    ),
    Foreign(gptq_planar("gptq_p_3", 2, 1), (8, 3 * 4 * 64), "GPTQModel f4c327a17"),
    Foreign(gptq_planar("gptq_p_5", 4, 1), (8, 5 * 4 * 64), "GPTQModel f4c327a17"),
    Foreign(gptq_planar("gptq_p_6", 4, 2), (8, 6 * 4 * 64), "GPTQModel f4c327a17", "gptq_p 6b (two planes)"),
    Foreign(gptq_planar("gptq_p_7", 4, 2, 1), (8, 7 * 4 * 64), "GPTQModel f4c327a17"),
    Foreign(
        one("awq_gemm", (cols(), rows(8)), Codes("codes", 4, (), (rows(1, 2), rows(2, 4)), "<u4")),
        (256, 8),
        "AutoAWQ 88e4c76",
        "AWQ GEMM",
    ),
    Foreign(
        one("awq_gemv", (rows(), cols(8)), Codes("codes", 4, (), (cols(1, 8),), "<u4")), (64, 32), "AutoAWQ 88e4c76"
    ),
    Foreign(
        one(
            "awq_gemv_fast",
            (rows(4), cols(64), rows(1, 4), cols(32, 2), cols(2, 4), cols(1, 2)),
            Codes("codes", 4, (), (cols(8, 4),), "<u2"),
        ),
        (16, 256),
        "AutoAWQ 88e4c76",
        "AWQ GEMVFast",
    ),
    Foreign(
        one(
            "marlin",
            (cols(16), rows(64), rows(1, 8), cols(2, 4), rows(16, 4)),
            Codes("codes", 4, (), (cols(1, 2), rows(8, 2), cols(8, 2)), "<u4"),
        ),
        (16, 128),
        "marlin 2f6d7c1",
        "Marlin 4b weights",
    ),
    Foreign(
        one("marlin_group_scales", (cols(128), rows(64), rows(1, 8), rows(8, 8)), Values("scale", "<f2")),
        (2, 64),
        "marlin 2f6d7c1",
        'Marlin group scales (as 16-bit "codes")',
    ),
    Foreign(
        one(
            "marlin_row_scales",
            (rows(32), rows(2, 4), rows(8, 4), rows(1, 2)),
            Values("scale", "<f2"),
            dims=(0, 4),
        ),
        (1, 64),
        "marlin 2f6d7c1",
        "Marlin per-channel scales",
    ),
    Foreign(
        one(
            "qserve",
            (rows(32), cols(32), rows(1, 8), cols(4, 4), cols(16, 2), rows(8, 2), cols(1, 4)),
            Codes("codes", 4, (), (rows(16, 2),)),
        ),
        (2, 4096),  # the project calls the same bytes (rows, cols / 2)
        "omniserve 02b2925",
        "QServe W4A8 (u8 words)",
    ),
    Foreign(
        one("mixllm", (rows(), cols(32), cols(4, 4), cols(1, 4)), Codes("codes", 4, (), (cols(16, 2),))),
        (64, 128),
        "MixLLM 97ec8d6e",
        "MixLLM int4",
    ),
    Foreign(
        one(
            "flexq",
            (cols(128), rows(8), bits(6), rows(1, 8), cols(32, 4)),
            Codes("codes", 1, (), (cols(1, 32, True),), "<u4"),
        ),
        (2, 1536),
        "FlexQ 0180eb1",
        "FlexQ INT6",
    ),
    Foreign(
        one("abq", (bits(6), rows(), cols(32)), Codes("codes", 1, (), (cols(1, 32, True),), "<u4"), dims=(1, 1, 1)),
        (6, 64, 8),
        "ABQ-LLM de2e849",
        "ABQ-LLM bit planes",
    ),
    Foreign(
        one("elutq", (bits(2), rows(), cols(8)), Codes("codes", 1, (), (cols(1, 8),)), dims=(1, 1, 1)),
        (2, 64, 32),
        "ELUTQ 54cf472",
        "ELUTQ w_quant.bin",
    ),
    Foreign(
        one("hqq_4bit_u8", (rows(1, REST), cols()), Codes("codes", 4, (), (rows(TOP, 2, True),))),
        (32, 256),
        "MC-MoE 7aa062c, quant/bitpack.py",
        "HQQ 4bit_u8 (halves)",
    ),
    Foreign(
        one("bitsandbytes", (rows(), cols(2)), Codes("codes", 4, (), (cols(1, 2, True),)), dims=(2, 0)),
        (64 * 128, 1),
        "bitsandbytes 95f9af30, GLM-130B 212215c",
        "bnb nf4 / GLM-130B",
    ),
    Foreign(
        one(
            "compressed_tensors_legacy_3",
            (rows(), cols(10)),
            Codes("codes", 3, (), (cols(1, 10),), "<u4"),
            axes=(ROWS, Axis("cols", "cols", pad=10)),
        ),
        (64, 26),
        "compressed-tensors before commit 66e631f6",
        "CT pack-quantized 3b legacy (pad k to 10)",
    ),
    Foreign(
        one("compressed_tensors_3", (rows(), cols(32), WORDS), Codes("codes", 3, (), (cols(1, 32),), "<u4")),
        (64, 24),
        "compressed-tensors ac8e2ba8 (0.18.0)",
    ),
    Foreign(
        one(
            "spqr",
            (rows(16), cols(16), rows(1, 16)),
            Codes("scale_code", 3, word="<u8", at=0),
            Codes("zero_code", 3, word="<u8", at=3),
            Codes("codes", 3, (), (cols(1, 16),), "<u8", at=6),
            Codes("second_order", 8, word="<u8", at=54),
            dims=(3, 1),
        ),
        (4 * 16 * 16, 8),
        "SpQR 543d10e, spqr_cuda.cpp",
    ),
    Foreign(
        one(
            "vptq",
            (Digit("vectors"), WORDS),
            Codes("codes", 12, (), (cols(1),), "<u4"),  # 8 bits of a codebook, 4 of a residual above them
            axes=(Axis("vectors", "rows", per=8), COLS),
        ),
        (8, 256 * 12 // 32),
        "VPTQ 950716d",
    ),
)
