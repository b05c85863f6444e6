"""Whole numbers of 2 to 8 bits in words of 32, as compressed-tensors' pack-quantized has them.

    ct_int<b>_g<n>, ct_int<b>_row       a scale for n columns of a row, or for a row
    ..._asym                            and a code that stands for zero, packed along the rows
    ..._f16, ..._f32                    scales of this dtype; bfloat16 otherwise
    ct_int<b>_legacy_...                3, 5, 6 and 7 bits as versions before 0.18 wrote them: whole codes in each word

    w[r, c] = (code[r, c] - zero) * scale       zero is 2**(b - 1) without _asym

Bytes, rounding and worked example: spec/formats/packed_int.md
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np

from packfmt.codec import Codec
from packfmt.errors import PlanError
from packfmt.kernels import tiles
from packfmt.layout import WORD, Codes, Component, Digit, Layout, Values, cols, dtype_of, grid, rows

NAME = re.compile(r"ct_int([2-8])(_legacy)?_(?:row|g(\d+))(_asym)?(_f16|_f32)?")
DTYPES = {None: "bfloat16", "_f16": "<f2", "_f32": "<f4"}
SOURCE = "compressed-tensors 0.20.0, compressors/pack_quantized"
LEGACY = "compressed-tensors before 0.18 (commit 66e631f6), compressors/pack_quantized"
WORDS = Digit(WORD)


def _words(bits: int, legacy: bool) -> int:
    """Codes of a unit: of one word, or of as many words as they fill."""
    return 32 // bits if legacy or 32 % bits == 0 else 32


def codec(name: str) -> Codec:
    """The codec of a name such as ct_int4_g128.

    Raises
    ------
    PlanError
        If the numbers in the name make no format.
    """
    found = NAME.fullmatch(name)
    if not found:
        raise PlanError(f"no format is called {name!r}; they are called ct_int<bits>_g<group> or ct_int<bits>_row")
    bits, legacy, group, asym = int(found[1]), bool(found[2]), int(found[3] or 0), bool(found[4])
    if legacy and 32 % bits == 0:
        raise PlanError(
            f"{name}: is called {name.replace('_legacy', '')}, as {bits} bits have always filled whole words"
        )
    unit, dtype = _words(bits, legacy), DTYPES[found[5]]
    split = (WORDS,) if unit * bits > 32 else ()
    along = (rows(), cols(group)) if group else (rows(),)
    components = [
        Component("weight_packed", (rows(), cols(unit), *split), (Codes("codes", bits, (), (cols(1, unit),), "<u4"),),
                  ragged=not split, dims=(1, 1 + len(split))),
        Component("weight_scale", along, (Values("scale", dtype),), doc="multiplies"),
    ]  # fmt: skip
    if asym:
        over = (rows(unit), *split, *along[1:])
        components.append(
            Component("weight_zero_point", over, (Codes("zero", bits, (), (rows(1, unit),), "<u4"),),
                      ragged=not split, dims=(1 + len(split), len(along) - 1) if group else (1 + len(split),))
        )  # fmt: skip
    layout = Layout(
        name,
        tuple(components),
        grid("affine_zero") if asym else grid("affine", zero=1 << bits - 1),
        purpose=f"{bits}-bit integers in words of 32, a scale for {group or 'each row'}{' and a zero' if asym else ''}",
        sources=(LEGACY if legacy else SOURCE,),
        also=(("compressed_tensors", "pack-quantized"),),
    )
    choice: dict[str, Any] = {"bits": bits, "group": group, "symmetric": not asym, "dtype": dtype}
    rules = ("best", "compressed-tensors")
    return Codec(layout, {rule: partial(_encode, rule=rule, **choice) for rule in rules}, ("best",))


def _encode(weight: np.ndarray, dtype: str, **choice: Any) -> dict[str, np.ndarray]:
    parts = tiles.packed_int(weight, dtype=dtype, **choice)
    return parts | {"scale": parts["scale"].astype(dtype_of(dtype))}
