"""Memory that a processor reads fast: large pages, so that streams do not wait for address translation."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

LINE = 64  # bytes of a cache line, and of the widest vector
HUGE = 2 << 20  # bytes of a large page


def empty(nbytes: int) -> np.ndarray:
    """Memory for so many bytes, given back when the array and its views are gone.

    From 2 MiB on it begins at a multiple of 2 MiB, and the system is asked for large pages; where it has none, and
    below, at a multiple of 64.

    Returns
    -------
    (nbytes,) uint8, of any content

    Source: Linux, Documentation/admin-guide/mm/transhuge.rst ("madvise"); madvise(2)
    """
    if nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            # pages that nobody touches cost nothing, so what lies before and behind is only address space
            room = mmap.mmap(-1, -(-nbytes // HUGE) * HUGE + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # as many systems say that there is a limit; NumPy then names the size
            return _aligned(np.empty(nbytes + LINE, np.uint8), nbytes, LINE)
        with suppress(OSError):  # a system built without large pages
            room.madvise(mmap.MADV_HUGEPAGE)
        return _aligned(np.frombuffer(room, np.uint8), nbytes, HUGE)
    return _aligned(np.empty(nbytes + LINE, np.uint8), nbytes, LINE)


def _aligned(room: np.ndarray, nbytes: int, multiple: int) -> np.ndarray:
    """So many bytes of the room, from an address on that is a multiple."""
    start = -room.ctypes.data % multiple
    return room[start : start + nbytes]
