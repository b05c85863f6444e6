"""Share a range of independent work among threads; the loops release the interpreter lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

from packfmt.errors import PackfmtError

MOST = 256

_pool = ThreadPoolExecutor(MOST, thread_name_prefix="packfmt")  # starts a thread only when all others are busy
_here = threading.local()


def count() -> int:
    """Threads to use: PACKFMT_THREADS, or the processors this process may run on.

    Raises
    ------
    PackfmtError
        If PACKFMT_THREADS is not a whole number of 1 to 256.
    """
    if asked := os.environ.get("PACKFMT_THREADS"):
        if not asked.isdecimal() or not 1 <= len(asked) <= 3 or not 1 <= int(asked) <= MOST:
            raise PackfmtError(f"PACKFMT_THREADS is {asked!r}, needs a whole number of 1 to {MOST}")
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return min(MOST, len(os.sched_getaffinity(0)))
    return min(MOST, os.cpu_count() or 1)


def spread(work: Callable[[int, int], None], total: int, least: int = 1) -> None:
    """Call work(start, stop) so that the ranges cover [0, total); each range has `least` items or more.

    The caller takes the first range. Results do not depend on the number of threads as long as
    every item writes only what is its own. Work that spreads work in turn does it by itself, so no
    thread ever waits for a place in the pool. Returns, or raises what a range raised, when all are done.
    """
    threads = 1 if getattr(_here, "busy", False) else min(count(), max(1, total // max(1, least)))
    if threads == 1:
        return work(0, total)
    bounds = [total * i // threads for i in range(threads + 1)]
    waiting = [_pool.submit(_alone, work, a, b) for a, b in pairwise(bounds[1:])]
    try:
        _alone(work, bounds[0], bounds[1])
    finally:
        wait(waiting)  # what they write to must outlive them
    for job in waiting:
        job.result()


def _alone(work: Callable[[int, int], None], start: int, stop: int) -> None:
    _here.busy = True
    try:
        work(start, stop)
    finally:
        _here.busy = False


def _renew() -> None:
    """A forked process inherits the pool, but none of its threads."""
    global _pool
    _pool = ThreadPoolExecutor(MOST, thread_name_prefix="packfmt")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
