"""Where codes and scales lie, as decoding is told."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

LINE: Final = 16  # bytes of which a place is a multiple, to be written past the cache
ALL: Final = 1 << 62  # rows, more than there are
NBYTES: Final = {"<f4": 4, "<f2": 2, "bfloat16": 2, "table": 1}  # of a scale that is read where it lies
FIVES: Final = 80  # for the bits of a stream: sixteen codes of 5 bits in ten bytes, the last one anything


class Places(NamedTuple):
    """Where the codes of one cell lie. A cell is `size` bytes, and `codes` codes in their order.

    Streams are read before runs, each in order; what has `low` 0 replaces the code, the rest is added to it.

    runs : (n, 7) int64: byte, count, shift, mask, code, step, low. Byte `byte + i` holds, from bit
        `shift` up, bits `low` and above of code `code + step * i`.
    streams : (n, 5) int64: byte, count, bits, code, low. From the first bit of `byte` on, fields of `bits` bits
        hold bits `low` and above of `count` codes, one after the other; 1 to 7 bits. With FIVES bits, all but the
        last of every sixteen codes of 5 bits, three to each two bytes.
    digits : (n, 4) int64: byte, count, digits, code. Base-3 bytes; digit i of byte `byte + m` is the
        code `code + m + count * i`.
    powers : (5,) uint8: what brings digit i of a byte to its top
    """

    size: int
    codes: int
    runs: np.ndarray
    streams: np.ndarray
    digits: np.ndarray
    powers: np.ndarray


class Scales(NamedTuple):
    """Where scales lie in rows of bytes: `together` of them side by side for each cell.

    kind : a key of NBYTES; "table" is a byte, the place of a number in `table`
    each : bytes from the first of a cell to the first of the next
    offset : bytes before the first of a row
    share : rows of weights that share a row of scales; ALL of them
    table : (256,) float32
    """

    kind: str
    each: int
    together: int
    offset: int
    share: int
    table: np.ndarray
