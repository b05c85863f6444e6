"""Move bit fields from one placement to another: the loop behind pack, unpack and repack.

Every field has a place: a byte, and a number p that says which bits from there on are its own.
Both are sums over the digits of a mixed-radix counter, so three small tables (outer digits, units,
fields of a unit) hold all places of a tensor of any size. A field's bits are a few pieces, each
within one byte.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from packfmt.kernels import threads

LEAST_FIELDS = 1 << 16  # fields worth a thread


class Steps(NamedTuple):
    """Where a digit's or a table's settings lie, on both sides; int64 arrays of equal length."""

    size: np.ndarray  # of an outer digit; unused in tables
    source_byte: np.ndarray
    source_field: np.ndarray
    target_byte: np.ndarray
    target_field: np.ndarray


class Pieces(NamedTuple):
    """The bits of field p are pieces first[p] to first[p + 1], lowest bits first; int64 arrays."""

    first: np.ndarray
    byte: np.ndarray  # from the unit's first byte
    shift: np.ndarray  # in that byte
    bits: np.ndarray

    @property
    def single(self) -> bool:
        return len(self.byte) == len(self.first) - 1


def move(
    source: np.ndarray, target: np.ndarray, outer: Steps, units: Steps, fields: Steps, read: Pieces, write: Pieces
) -> None:
    """Copy every field from `source` to `target`, both flat uint8; the target's own bits must be zero.

    No two units of the target may share a byte.
    """
    total = int(np.prod(outer.size))
    if not total or not len(units.size) or not len(fields.size):
        return
    least = -(-LEAST_FIELDS // (len(units.size) * len(fields.size)))
    loop = _move_bytes if read.single and write.single else _move

    def work(start: int, stop: int) -> None:
        loop(source, target, start, stop, outer, units, fields, read, write)

    threads.spread(work, total, least)


@njit(cache=True, nogil=True)
def _move(source, target, start, stop, outer, units, fields, read, write):
    for o in range(start, stop):
        left = o
        s_byte = s_field = t_byte = t_field = 0
        for d in range(outer.size.size - 1, -1, -1):
            value = left % outer.size[d]
            left //= outer.size[d]
            s_byte += value * outer.source_byte[d]
            s_field += value * outer.source_field[d]
            t_byte += value * outer.target_byte[d]
            t_field += value * outer.target_field[d]
        for u in range(units.size.size):
            su_byte = s_byte + units.source_byte[u]
            su_field = s_field + units.source_field[u]
            tu_byte = t_byte + units.target_byte[u]
            tu_field = t_field + units.target_field[u]
            for f in range(fields.size.size):
                p = su_field + fields.source_field[f]
                at = su_byte + fields.source_byte[f]
                value, got = np.uint64(0), np.uint64(0)
                for i in range(read.first[p], read.first[p + 1]):
                    piece = np.uint64(source[at + read.byte[i]]) >> np.uint64(read.shift[i])
                    piece &= (np.uint64(1) << np.uint64(read.bits[i])) - np.uint64(1)
                    value |= piece << got
                    got += np.uint64(read.bits[i])
                p = tu_field + fields.target_field[f]
                at = tu_byte + fields.target_byte[f]
                for i in range(write.first[p], write.first[p + 1]):
                    piece = value & ((np.uint64(1) << np.uint64(write.bits[i])) - np.uint64(1))
                    target[at + write.byte[i]] |= np.uint8(piece << np.uint64(write.shift[i]))
                    value >>= np.uint64(write.bits[i])


@njit(cache=True, nogil=True)
def _move_bytes(source, target, start, stop, outer, units, fields, read, write):
    """`_move` where every field lies within one byte on both sides."""
    mask = np.uint8((1 << read.bits[0]) - 1)
    for o in range(start, stop):
        left = o
        s_byte = s_field = t_byte = t_field = 0
        for d in range(outer.size.size - 1, -1, -1):
            value = left % outer.size[d]
            left //= outer.size[d]
            s_byte += value * outer.source_byte[d]
            s_field += value * outer.source_field[d]
            t_byte += value * outer.target_byte[d]
            t_field += value * outer.target_field[d]
        for u in range(units.size.size):
            su_byte = s_byte + units.source_byte[u]
            su_field = s_field + units.source_field[u]
            tu_byte = t_byte + units.target_byte[u]
            tu_field = t_field + units.target_field[u]
            for f in range(fields.size.size):
                p = su_field + fields.source_field[f]
                at = su_byte + fields.source_byte[f] + read.byte[p]
                code = (source[at] >> np.uint8(read.shift[p])) & mask
                p = tu_field + fields.target_field[f]
                at = tu_byte + fields.target_byte[f] + write.byte[p]
                target[at] |= np.uint8(code << np.uint8(write.shift[p]))
