"""tl2: the bytes of a ternary matrix as bitnet.cpp's x86 table kernels read them.

Columns up to the last multiple of `bk` go in triples: 9 a + 3 b + c is a magnitude, in a nibble, and a sign,
in a plane of its own. Those left, fewer than `bk`, go in pairs: 3 a + b + 4 in a nibble. Nibbles, signs and
pairs' nibbles follow one another, then zeros.

Places: spec/formats/tl2.md
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError

TILE = 32  # rows whose codes lie in 32 neighbouring bytes
PAIRED = 32  # columns of a block of pairs
MOST_PAIRED = 256  # columns; upstream's size of a tensor has room for so many

# Axes of a matrix of codes (rows, codes) when cut into tiles: row tile, 32 rows of it, which 16 of those,
# which 8 of those, row; block of codes, two codes of it, code. And in what order a byte's place counts them.
NIBBLE_PLACES = (0, 5, 1, 6, 3, 2, 4, 7)
# The same for signs: row tile, 32 rows of it, which 16 of those, row; block of codes, eight codes of it, code.
SIGN_PLACES = (0, 4, 1, 5, 3, 6, 2)

# a, b, c of 9 a + 3 b + c by magnitude, and of its negative from 16 on; 14 and 15 are zeros in upstream's tables
_MAGNITUDES = [(n // 9 - 1, n // 3 % 3 - 1, n % 3 - 1) for n in range(13, 27)] + [(0, 0, 0)] * 2
TRIPLES = np.array([_MAGNITUDES, [[-t for t in triple] for triple in _MAGNITUDES]], np.int8).reshape(32, 3)
# a, b of 3 a + b + 4; from 9 on zeros, too
PAIRS = np.array([(code // 3 - 1, code % 3 - 1) for code in range(9)] + [(0, 0)] * 7, np.int8)


class Areas(NamedTuple):
    """What a matrix's bytes consist of."""

    tripled: int  # columns in triples
    nibbles: int  # bytes
    signs: int
    pairs: int
    zeros: int


def areas(rows: int, cols: int, bm: int, bk: int) -> Areas:
    """How many bytes of each kind a matrix of (rows, cols) has.

    The sum is upstream's: room for 256 columns in pairs, all divisions rounded down.

    Raises
    ------
    LayoutError
        If bitnet.cpp has no kernel of these numbers.

    Source: bitnet.cpp 16da220, utils/convert-hf-to-gguf-bitnet.py preprocess_weights_tl2; utils/codegen_tl2.py
    """
    for what, number, multiple in (("bm", bm, TILE), ("bk", bk, 24), ("rows", rows, bm), ("cols", cols, 1)):
        if type(number) is not int or number < 1 or number % multiple:
            raise LayoutError(f"tl2: {what} is {number!r}, needs a multiple of {multiple}")
    paired = cols % bk
    if cols < bk or paired % PAIRED or paired > MOST_PAIRED:
        raise LayoutError(
            f"tl2: {cols} columns are {cols // bk} blocks of {bk} and {paired} more, "
            f"needs at least one, and up to {MOST_PAIRED} more, a multiple of {PAIRED}"
        )
    tripled = cols - paired
    whole = (cols - MOST_PAIRED) * rows // 3 * 5 // 8 + MOST_PAIRED * rows // 2 * 4 // 8
    nibbles, signs, pairs = tripled * rows // 6, tripled * rows // 24, paired * rows // 4
    return Areas(tripled, nibbles, signs, pairs, whole - nibbles - signs - pairs)


def read(data: np.ndarray, rows: int, cols: int, bm: int, bk: int) -> np.ndarray:
    """Bytes of a matrix -> (rows, cols) int8 steps.

    Magnitudes 14 and 15 and pairs of 9 and above are zeros; what stands behind the pairs is not read.

    Raises
    ------
    LayoutError
        If the numbers fit no kernel, or the bytes no such matrix.
    """
    part = areas(rows, cols, bm, bk)
    if data.dtype != np.uint8 or data.shape != (sum(part[1:]),):
        raise LayoutError(f"tl2: codes are {data.dtype} {data.shape}, needs uint8 ({sum(part[1:])},)")
    nibbles, signs, pairs = np.split(data, np.cumsum(part[1:4]))[:3]
    magnitudes = _read_nibbles(nibbles, rows, bm, bk // 3)
    steps = np.empty((rows, cols), np.int8)
    steps[:, : part.tripled] = TRIPLES[magnitudes | _read_signs(signs, rows, bm, bk // 3) << 4].reshape(rows, -1)
    if part.pairs:
        steps[:, part.tripled :] = PAIRS[_read_nibbles(pairs, rows, bm, PAIRED // 2)].reshape(rows, -1)
    return steps


def write(steps: np.ndarray, bm: int, bk: int) -> np.ndarray:
    """(rows, cols) steps -1, 0, 1 -> the bytes of the matrix, (n,) uint8. The inverse of `read`.

    Raises
    ------
    LayoutError
        If the numbers fit no kernel.
    """
    rows, cols = steps.shape
    part = areas(rows, cols, bm, bk)
    triples = steps[:, : part.tripled].reshape(rows, -1, 3).astype(np.int8)
    values = 9 * triples[..., 0] + 3 * triples[..., 1] + triples[..., 2]
    pieces = [
        _write_nibbles(np.abs(values).astype(np.uint8), bm, bk // 3),
        _write_signs(values < 0, bm, bk // 3),
        np.zeros(part.zeros, np.uint8),
    ]
    if part.pairs:
        pairs = steps[:, part.tripled :].reshape(rows, -1, 2).astype(np.int8)
        codes = (3 * pairs[..., 0] + pairs[..., 1] + 4).astype(np.uint8)
        pieces.insert(2, _write_nibbles(codes, bm, PAIRED // 2))
    return np.concatenate(pieces)


# ---------------------------------------------------------------- places


def _nibble_axes(rows: int, codes: int, bm: int, block: int) -> tuple[int, ...]:
    return (rows // bm, bm // TILE, 2, 2, 8, codes // block, block // 2, 2)


def _sign_axes(rows: int, codes: int, bm: int, block: int) -> tuple[int, ...]:
    return (rows // bm, bm // TILE, 2, 16, codes // block, block // 8, 8)


def _write_nibbles(codes: np.ndarray, bm: int, block: int) -> np.ndarray:
    """Two codes of a row share a byte, the first in the high half."""
    cut = codes.reshape(_nibble_axes(len(codes), codes.shape[1], bm, block)).transpose(NIBBLE_PLACES)
    return (cut[..., 0] << np.uint8(4) | cut[..., 1]).reshape(-1)


def _read_nibbles(data: np.ndarray, rows: int, bm: int, block: int) -> np.ndarray:
    axes = _nibble_axes(rows, 2 * data.size // rows, bm, block)
    cut = np.stack([data >> np.uint8(4), data & np.uint8(15)], -1)
    return _back(cut, axes, NIBBLE_PLACES).reshape(rows, -1)


def _write_signs(negative: np.ndarray, bm: int, block: int) -> np.ndarray:
    """Eight codes of two rows, 16 apart, share a word of 16 bits: the first code's two in the highest bits."""
    cut = negative.reshape(_sign_axes(len(negative), negative.shape[1], bm, block)).transpose(SIGN_PLACES)
    return np.packbits(cut.reshape(-1, 2, 8)[:, ::-1])


def _read_signs(data: np.ndarray, rows: int, bm: int, block: int) -> np.ndarray:
    axes = _sign_axes(rows, 8 * data.size // rows, bm, block)
    bits = np.unpackbits(data.reshape(-1, 2)[:, ::-1])
    return _back(bits, axes, SIGN_PLACES).reshape(rows, -1)


def _back(stored: np.ndarray, axes: tuple[int, ...], places: tuple[int, ...]) -> np.ndarray:
    """Codes in the order of their places -> cut as `axes` say."""
    return stored.reshape([axes[i] for i in places]).transpose(np.argsort(places))
