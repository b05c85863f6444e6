"""Move bit fields from one placement to another: the loop behind pack, unpack and repack.

Every field is cut into pieces that lie within one byte on both sides. A table holds the pieces of a
few neighbouring fields, a run repeats them evenly, and the steps of an outer counter repeat the run:
so tables of a few kilobytes hold all places of a tensor of any size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from packfmt.kernels import threads
from packfmt.kernels.cache import njit

LEAST_PIECES = 1 << 17  # pieces worth a thread
EIGHT = np.uint64(8)
WHOLE, IN_PLACE = np.uint64(255), np.uint64(256)  # mask and factor of a piece that is a byte


class Pieces(NamedTuple):
    """What moves together. A piece of n bits goes from bit a of one byte to bit b of another."""

    source: np.ndarray  # byte; int64, and so is target
    target: np.ndarray
    mask: np.ndarray  # (2**n - 1) << a; uint64, and so is factor
    factor: np.ndarray  # 2**(8 + b - a): one product instead of a shift whose direction varies


class Steps(NamedTuple):
    """Digits of the outer counter, slowest first: how many steps, of how many bytes; int64 arrays."""

    size: np.ndarray
    source: np.ndarray
    target: np.ndarray


class Run(NamedTuple):
    """`size` repetitions, each this many bytes after the one before, `block` of them at a time."""

    size: int
    source: int
    target: int
    block: int


def move(source: np.ndarray, target: np.ndarray, outer: Steps, pieces: Pieces, run: Run) -> None:
    """Copy the bits of every piece, at every step of run and outer counter.

    source, target : flat uint8, not overlapping; the bits of `target` that are written must be zero.
    No two steps of run or counter may write to the same byte, and a run's steps are not negative.
    """
    if not run.size or not outer.size.all():
        return
    settings = int(np.prod(outer.size))
    blocks = -(-run.size // run.block)
    least = -(-LEAST_PIECES // (len(pieces.source) * min(run.block, run.size)))

    def work(start: int, stop: int) -> None:
        _move(source, target, start, stop, settings, outer, pieces, run)

    threads.spread(work, settings * blocks, least)


@njit(cache=True, nogil=True)
def _move(source, target, start, stop, settings, outer, pieces, run):
    source_step, target_step = np.uint64(run.source), np.uint64(run.target)
    for o in range(start, stop):
        # blocks of the run are the slowest digit: what is near on both sides is visited soon
        first, left = o // settings * run.block, o % settings
        count = min(run.block, run.size - first)
        source_byte, target_byte = first * run.source, first * run.target
        for d in range(outer.size.size - 1, -1, -1):
            source_byte += left % outer.size[d] * outer.source[d]
            target_byte += left % outer.size[d] * outer.target[d]
            left //= outer.size[d]
        for p in range(pieces.source.size):
            mask, factor = pieces.mask[p], pieces.factor[p]
            s, t = np.uint64(source_byte + pieces.source[p]), np.uint64(target_byte + pieces.target[p])
            if mask == WHOLE and factor == IN_PLACE:
                for _ in range(count):
                    target[t] = source[s]
                    s += source_step
                    t += target_step
                continue
            for _ in range(count):
                target[t] |= np.uint8((source[s] & mask) * factor >> EIGHT)
                s += source_step
                t += target_step
