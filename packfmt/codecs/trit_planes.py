"""ptqtp1 to ptqtp4: one to four planes of -1, 0 and 1 that add up, each with a float16 scale for 128 columns.

    w = sum over planes of step * scale

The paper gives no bytes; these are packfmt's. Three ways to store the same planes, which repack exactly:

    ptqtp2        a plane after the other, 2 bits a step: 4.25 bits a weight for two planes
    ptqtp2_n4     two planes in a nibble, 3 (t1 + 1) + t2 + 1: 4.25 bits
    ptqtp2_b3     a plane after the other, five steps in a byte of base 3: 3.5 bits

In a name that ends in `_tied` the planes share one scale, and each counts three times the next.

Bytes, rounding and worked examples: spec/formats/trit_planes.md
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from packfmt.codec import Codec
from packfmt.kernels import spell, trit_planes
from packfmt.layout import COLS, ROWS, Axis, Codes, Component, Digit, Grid, Layout, Values, cols, grid, rows

GROUP = 128
ZERO = 1
RATIO = 3  # of a tied plane's scale to the next one's
RUNS = ((24, 5), (2, 4))  # bytes, and digits in each, of a plane's 128 steps
BYTES = sum(count for count, _ in RUNS)
plane, byte = partial(Digit, "plane"), partial(Digit, "byte")

Weights = np.ndarray
Parts = dict[str, Weights]
SOURCES = ("PTQTP, arXiv 2509.16989: algorithm and grid; no bytes", "bytes: packfmt")


def _layout(codes: Codes | Values, count: int, tied: bool, spelled: Grid, form: tuple[str, str], *more: Axis) -> Layout:
    """`form`: what a name says of how steps are stored, and what its purpose says. `more`: axes of the codes."""
    letters, words = form
    digits = () if tied else (plane(1, count),)
    scale = Values("scale", "<f2", digits, doc="of all planes" if tied else "plane by plane")
    worth = ", each worth three of the next" if tied else ""
    planes = "one plane of -1, 0, 1" if count == 1 else f"{count} planes of -1, 0, 1 that add up{worth}"
    scales = f"a float16 scale{'' if tied or count == 1 else ' each'} for {GROUP}"
    return Layout(
        _name(count, letters, tied),
        (Component("blocks", (rows(), cols(GROUP)), (codes, scale)),),
        spelled,
        (ROWS, Axis("plane", size=count), COLS, *more),
        purpose=f"{planes}, in {words}; {scales}",
        sources=SOURCES,
    )


def _two_bits(count: int, tied: bool) -> Layout:
    doc = "byte 32 p + j: columns j, 32 + j, 64 + j, 96 + j of plane p, lowest bits first"
    codes = Codes("codes", 2, (plane(1, count), cols(1, 32)), (cols(32, 4),), levels=3, doc=doc)
    return _layout(codes, count, tied, grid("planes", zero=ZERO, ratio=RATIO * tied), ("", "2 bits"))


def _nibbles(tied: bool) -> Layout:
    doc = "byte j: column j in the low four bits, 64 + j in the high"
    codes = Codes("codes", 4, (cols(1, 64),), (cols(64, 2),), levels=9, doc=doc)
    return _layout(codes, 2, tied, grid("plane_digits", count=2, ratio=RATIO * tied), ("_n4", "nibbles"))


def _base3(count: int, tied: bool) -> Layout:
    doc = "26 bytes a plane: 24 of five digits, 2 of four"
    codes = Values("codes", "u1", (plane(1, count), byte(1, BYTES)), doc=doc)
    spelled = grid("plane_base3", block=GROUP, runs=RUNS, first="high", ratio=RATIO * tied)
    return _layout(codes, count, tied, spelled, ("_b3", "base 3"), Axis("byte", size=BYTES))


def _name(count: int, letters: str, tied: bool) -> str:
    return f"ptqtp{count}{letters}{'_tied' if tied else ''}"


def _spell_codes(trits: Weights) -> Weights:
    codes: Weights = (trits + np.int8(ZERO)).astype(np.uint8)
    return codes


def _spell_nibbles(trits: Weights) -> Weights:
    codes: Weights = (3 * (trits[:, :1] + np.int8(1)) + trits[:, 1:] + np.int8(1)).astype(np.uint8)
    return codes


def _spell_base3(trits: Weights) -> Weights:
    many, count, columns = trits.shape
    codes = spell.write_base3(np.ascontiguousarray(trits).reshape(many * count, columns), GROUP, np.array(RUNS), True)
    return codes.reshape(many, count, *codes.shape[1:])


def _encoder(
    fit: Callable[..., tuple[Weights, Weights]], codes: Callable[[Weights], Weights], axes: int
) -> Callable[[Weights], Parts]:
    """From the fitted planes to a layout's parts; `axes` of its arrays."""

    def encode(weight: Weights) -> Parts:
        trits, scale = fit(weight)
        return {"codes": codes(trits), "scale": scale.reshape(*scale.shape, *[1] * (axes - 3))}

    return encode


def _codec(layout: Layout, count: int, tied: bool, codes: Callable[[Weights], Weights]) -> Codec:
    fits = {"best": partial(trit_planes.fit, group=GROUP, planes=count, tied=tied)}
    if count == 2 and not tied:
        fits["ptqtp"] = partial(trit_planes.fit_paper, group=GROUP)
    return Codec(layout, {name: _encoder(fit, codes, len(layout.axes)) for name, fit in fits.items()})


def _all() -> dict[str, Codec]:
    out = {}
    for tied in (False, True):
        for count in range(2 if tied else 1, 5):
            for make, codes in ((_two_bits, _spell_codes), (_base3, _spell_base3)):
                layout = make(count, tied)
                out[layout.name] = _codec(layout, count, tied, codes)
        layout = _nibbles(tied)
        out[layout.name] = _codec(layout, 2, tied, _spell_nibbles)
    return out


CODECS = _all()
