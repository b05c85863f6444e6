"""Take turns and take times: every contestant a little, again and again, so that a noisy minute hits all alike."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from packfmt.bench import Contestant, Floats, Size, Timing
from packfmt.kernels import threads as sharing

TURNS: Final = 10  # of each contestant, if its time lasts so long
LEAST: Final = 3  # turns of each, however long they take: a product may take longer than it should have
FOOTPRINT: Final = 1 << 30
READ_AT_ONCE: Final = 1 << 28  # bytes
PAGE: Final = 4096
QUIET: Final = 0.002, 0.0004, 0.1  # seconds to look at, of them at most so many of work, and when to give up


def race(contestants: Sequence[Contestant], seconds: float, threads: int) -> list[Timing]:
    """Time all contestants in turns, about `seconds` each; longer only if LEAST calls take longer.

    What one thread does is timed by the clock that stands still while other work has the processor.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    records = [_Record(contestant, clock) for contestant in contestants]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(TURNS):
            for record in records:
                if turn < LEAST or record.timed < seconds:
                    record.turn(seconds / TURNS)
                    settle()
    finally:
        if collecting:
            gc.enable()
    return [record.timing() for record in records]


class _Record:
    """What one contestant's turns took."""

    def __init__(self, contestant: Contestant, clock: Callable[[], float]) -> None:
        self._contestant, self._clock = contestant, clock
        self._calls = 0
        self._samples: list[float] = []  # seconds of a product
        self.timed = self._work = 0.0  # seconds; of them on processors, all threads together

    def turn(self, seconds: float) -> None:
        """Call for so long.

        The first call is not timed, for it wakes threads and brings the code back into the caches; a call that
        fills the turn does so at little cost.
        """
        if not self._samples or self._samples[-1] * self._contestant.group < seconds:
            self._call()
        work, begin, passed = time.process_time(), time.perf_counter(), 0.0
        before = self._clock()
        while not passed or passed < seconds:
            self._call()
            now = self._clock()
            self._samples.append((now - before) / self._contestant.group)
            before, passed = now, time.perf_counter() - begin
        self._work += time.process_time() - work
        self.timed += passed

    def _call(self) -> None:
        self._contestant.call(self._calls)
        self._calls += 1

    def timing(self) -> Timing:
        low, middle, high = (float(q) for q in np.quantile(self._samples, (0.25, 0.5, 0.75)))
        return Timing(middle, low, high, len(self._samples), self._work / self.timed)


def settle() -> None:
    """Wait until no thread of this process works: those of BLAS and OpenMP look for more work for a while."""
    pause, work, most = QUIET
    begin = time.perf_counter()
    while time.perf_counter() - begin < most:
        before = time.process_time()
        time.sleep(pause)
        if time.process_time() - before < work:
            return


class Reading:
    """No product: memory is read, as fast as vectors can be loaded. What a product of packed weights cannot beat."""

    name, kind, group = "read", "", 1

    def __init__(self, size: Size, nbytes: int) -> None:
        self.nbytes = min(READ_AT_ONCE, size.footprint) or nbytes
        self.copies = size.copies(self.nbytes, "reading")
        self._memory = [np.ones(self.nbytes, np.uint8) for _ in range(self.copies)]

    def begin(self, x: Floats, threads: int) -> None:
        self._threads = threads

    def call(self, turn: int) -> None:
        from packfmt.kernels import tile_products

        memory = self._memory[turn % self.copies]

        def read(start: int, stop: int) -> None:
            tile_products.read(memory[PAGE * start : PAGE * stop])

        with sharing.limit(self._threads):
            sharing.spread(read, -(-self.nbytes // PAGE))

    def answer(self, copy: int) -> Floats:
        raise NotImplementedError

    def close(self) -> None:
        self._memory.clear()


def thread_counts() -> set[int]:
    """One thread, and all that there are."""
    return {1, sharing.count()}


def cache_bytes() -> int:
    """Size of the largest cache; 0 if the system does not say."""
    if hasattr(os, "sysconf"):
        known = [os.sysconf(name) for name in os.sysconf_names if re.fullmatch(r"SC_LEVEL\d_CACHE_SIZE", name)]
        if best := max(known, default=0):
            return best
    # no such names on ARM, but a folder for each cache
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) << 10 for s in sizes if re.fullmatch(r"\d+K", s)), default=0)


def footprint() -> int:
    """Bytes of copies that no cache holds: a GiB, less where four caches are less, more where two are more."""
    cache = cache_bytes()
    return max(min(FOOTPRINT, 4 * cache), 2 * cache) or FOOTPRINT
