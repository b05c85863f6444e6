"""NVFP4: 16 weights share a float8_e4m3fn scale, a tensor one float32 scale; codes are 4-bit floats (float4_e2m1fn).

    w[j] = number(code[j]) * (scale * global_scale)        or scale / global_scale in nvfp4_ct

The layouts differ in where the bytes lie, and in whether the tensor's scale multiplies or divides:

    nvfp4           ggml's blocks of 64, and the scale that GGUF files keep in a tensor of its own; multiplies
    nvfp4_plain     ggml's blocks alone
    nvfp4_modelopt  NVIDIA ModelOpt: codes in pairs, scales apart; multiplies
    nvfp4_ct        compressed-tensors: the same bytes, but the tensor's scale divides
    nvfp4_rows      ModelOpt's experts: blocks and pairs run along the rows
    nvfp4_swizzled  ModelOpt, with scales in the tiles of 128 x 4 that NVIDIA's matrix units read

Bytes, rounding and worked examples: spec/formats/nvfp4.md
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from packfmt.codec import Codec, Remark
from packfmt.kernels import fp4
from packfmt.layout import Codes, Component, Layout, Values, cols, grid, rows

BLOCK = 16
ELEMENT = "float4_e2m1fn"
MODELOPT = "NVIDIA ModelOpt 0.47.0, quantization/qtensor/nvfp4_tensor.py"
CT = "compressed-tensors 0.20.0, compressors/nvfp4"
GGML = "ggml d99724f2, src/ggml-common.h block_nvfp4"
PAIRS = "byte j holds column 2 j low, column 2 j + 1 high"

BLOCKS = Component(
    "blocks",
    (rows(), cols(64)),
    (
        Values("scale", "u1", (cols(BLOCK, 4),), doc="`d`: four, of 16 weights each"),
        Codes("codes", 4, (cols(16, 4), cols(1, 8)), (cols(8, 2),),
              doc="`qs`: byte j of eight holds code j low, code j + 8 high"),
    ),
)  # fmt: skip


def _whole(name: str, doc: str) -> Component:
    return Component(name, (), (Values("global_scale", "<f4"),), doc=doc)


def _pairs(name: str) -> Component:
    return Component(name, (rows(), cols(2)), (Codes("codes", 4, (), (cols(1, 2),), doc=PAIRS),))


def _numbers(scale: str, global_scale: str) -> Any:
    return grid("scaled", element=ELEMENT, scale=scale, global_scale=global_scale)


def _layout(
    name: str, components: tuple[Component, ...], numbers: Any, where: str, *source: str, **rest: Any
) -> Layout:
    return Layout(
        name, components, numbers, purpose=f"4-bit floats, a float8 scale for 16: {where}", sources=source, **rest
    )


E4M3 = Values("scale", "float8_e4m3fn")
SCALES = Component("weight_scale", (rows(), cols(BLOCK)), (E4M3,))
ROWS_DOC = "byte (i, c) holds row 2 i of column c low, row 2 i + 1 high"
TILES = (rows(128), cols(64), rows(1, 32), rows(32, 4), cols(16, 4))
TIMES, DIVIDES = _numbers("", "times"), _numbers("", "divides")
SECOND = _whole("weight_scale_2", "one number, which multiplies")

GGUF = _layout(
    "nvfp4", (BLOCKS, _whole("scale", "one number, which multiplies; in GGUF a tensor of its own")),
    _numbers("ufloat7_e4m3", "times"), "ggml's blocks and a scale for all",
    GGML, "llama.cpp 067d44f6, conversion/base.py _repack_nvfp4", also=(("gguf", "NVFP4"),),
)  # fmt: skip
PLAIN = _layout(
    "nvfp4_plain", (BLOCKS,), _numbers("ufloat7_e4m3", ""), "ggml's blocks", GGML, "gguf 0.19.0, gguf/quants.py NVFP4",
    also=(("gguf", "NVFP4"),),
)  # fmt: skip
TWO = _layout(
    "nvfp4_modelopt", (_pairs("weight"), SCALES, SECOND), TIMES, "ModelOpt's tensors", MODELOPT,
    also=(("modelopt", "NVFP4"),),
)  # fmt: skip
CT_LAYOUT = _layout(
    "nvfp4_ct", (_pairs("weight_packed"), SCALES, _whole("weight_global_scale", "one number, which divides")),
    DIVIDES, "compressed-tensors' tensors", CT, also=(("compressed_tensors", "nvfp4-pack-quantized"),),
)  # fmt: skip
ROWS = _layout(
    "nvfp4_rows",
    (
        Component("weight", (rows(2), cols()), (Codes("codes", 4, (), (rows(1, 2),), doc=ROWS_DOC),)),
        Component("weight_scale", (rows(BLOCK), cols()), (E4M3,)),
        SECOND,
    ),
    TIMES, "of a column, ModelOpt's experts", "NVIDIA ModelOpt 0.47.0, export/unified_export_hf.py",
    also=(("modelopt", "NVFP4 experts"),),
)  # fmt: skip
SWIZZLED = _layout(
    "nvfp4_swizzled",
    (
        _pairs("weight"),
        Component("weight_scale", TILES, (E4M3,), dims=(5,), doc="tiles of 128 rows and 4 scales, 512 bytes each"),
        SECOND,
    ),
    TIMES, "scales in tiles for matrix units", "cuBLAS 12.8, block scaling factors layout",
    "torchao 36027d8, prototype/mx_formats/utils.py to_blocked",
)  # fmt: skip


# ---------------------------------------------------------------- encoders

Parts = dict[str, np.ndarray]


def parts_of(found: Parts, e4m3: bool = True) -> Parts:
    """What a kernel chose, in the dtypes of the layouts."""
    scale = found["scale"].view(ml_dtypes.float8_e4m3fn) if e4m3 else found["scale"]
    whole = {"global_scale": found["global_scale"].reshape(1, 1)} if "global_scale" in found else {}
    return {"codes": found["codes"], "scale": scale, **whole}


def _encode(weight: np.ndarray, rule: str, e4m3: bool, **choice: Any) -> Parts:
    return parts_of(fp4.nvfp4(weight, rule, **choice), e4m3)


def _down(weight: np.ndarray, **choice: Any) -> Parts:
    """Blocks along the rows: those of the transposed weight."""
    if (costs := choice.get("importance")) is not None:
        choice["importance"] = np.ascontiguousarray(np.broadcast_to(costs, weight.shape).T)
    parts = _encode(np.ascontiguousarray(weight.T), e4m3=True, **choice)
    return parts | {name: np.ascontiguousarray(parts[name].T) for name in ("codes", "scale")}


def _plain(weight: np.ndarray, rule: str, **choice: Any) -> Parts:
    parts = _encode(weight, rule, False, plain=True, **choice)
    return {name: parts[name] for name in ("codes", "scale")}


def above(most: float) -> Remark:
    """How many weights are beyond the largest number of a layout without a scale for the tensor."""
    end = f"weights are beyond {most:g}, the largest number there is, and become that"
    return Remark(partial(_beyond, most=most), lambda count, weights: f"{count} of {weights} {end}")


def _beyond(weight: np.ndarray, most: float) -> int:
    if max(-weight.min(initial=0), weight.max(initial=0)) <= most:
        return 0
    return int((np.abs(weight) > most).sum())


def _codec(layout: Layout, *parity: str, down: bool = False) -> Codec:
    rules = ("best", "four_over_six", "tiles", *parity)
    divides, e4m3 = layout.grid["global_scale"] == "divides", not layout.grid["scale"]
    choice: dict[str, Any] = {"divides": divides}
    function = partial(_down, **choice) if down else partial(_encode, e4m3=e4m3, **choice)
    together = {} if down else {"tiles": BLOCK}
    encoders = {r: partial(function, rule=r) for r in rules}
    return Codec(layout, encoders, ("best", "tiles"), shared=rules, together=together)


CODECS = {
    "nvfp4": _codec(GGUF, "modelopt"),
    "nvfp4_plain": Codec(
        PLAIN, {r: partial(_plain, rule=r) for r in ("best", "ggml")}, ("best",), remark=above(6 * 448)
    ),
    "nvfp4_modelopt": _codec(TWO, "modelopt", "torchao"),
    "nvfp4_ct": _codec(CT_LAYOUT, "compressed-tensors"),
    "nvfp4_rows": _codec(ROWS, "modelopt", down=True),
    "nvfp4_swizzled": _codec(SWIZZLED, "modelopt", "torchao"),
}
