"""Share a range of independent work among threads; the loops release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache


def count() -> int:
    """Threads to use: PACKFMT_THREADS, or the processors this process may run on."""
    if asked := os.environ.get("PACKFMT_THREADS"):
        return max(1, int(asked))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="packfmt")


def spread(work: Callable[[int, int], None], total: int, least: int = 1) -> None:
    """Call work(start, stop) so that the ranges cover [0, total); each range has `least` items or more.

    The caller takes a share. Results do not depend on the number of threads as long as
    every item writes only what is its own.
    """
    threads = min(count(), max(1, total // max(1, least)))
    bounds = [total * i // threads for i in range(threads + 1)]
    waiting = [_pool(threads - 1).submit(work, a, b) for a, b in zip(bounds[1:], bounds[2:], strict=False)]
    work(bounds[0], bounds[1])
    for job in waiting:
        job.result()
