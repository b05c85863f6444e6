"""How fast packed products are on this machine, beside those of other people's libraries, in one run.

A contestant is whoever multiplies the same weight, held in its own way: packfmt in one layout, or a peer. All
take turns in one process, each with as many copies of its weights as no cache holds, as when the layers of a
model come one after another. Peers are an extra: one that is not installed leaves its column blank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from packfmt.errors import MachineError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

LAYOUTS: Final = ("sherry", "tq2_0", "tq1_0", "mxfp4", "nvfp4", "q4_0", "q8_0", "bf16")
SHAPE: Final = (4096, 4096)
INSTALL: Final = "pip install 'packfmt[bench]'"
STRIP: Final = 64  # rows of random numbers, repeated to the height that is asked for
MOST_COPIES: Final = 4096
LEFT_FREE: Final = 0.9  # of the memory that there is, copies take at most so much
GROUP: Final = 8, 256_000_000  # products that a graph of a peer holds at most, and bytes of their weights


class Contestant(Protocol):
    """A weight in one library's hands, in many equal copies."""

    name: str
    kind: str  # what its weights are: float32, tq1_0 ...
    nbytes: int  # of one copy: what a product reads
    copies: int
    group: int  # products that a call makes, so that a peer's graph is no longer started for each of them

    def begin(self, x: Floats, threads: int) -> None:
        """Make ready for products with x (batch, cols) by so many threads."""

    def call(self, turn: int) -> object:
        """Multiply by one group of copies, another for each of consecutive turns."""

    def answer(self, copy: int) -> Floats:
        """(batch, rows): the product with one copy."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is multiplied, and how many copies there shall be."""

    rows: int
    cols: int
    footprint: int  # bytes that all copies of a contestant have together; 0: one copy

    @property
    def weights(self) -> int:
        return self.rows * self.cols

    def copies(self, nbytes: int, kind: str = "weights") -> int:
        """Copies of a weight of so many bytes; `kind` is for the error.

        Raises
        ------
        MachineError
            If the memory does not hold them.
        """
        count = self._count(nbytes)
        hold(count * nbytes, f"{kind}: copies", "give a smaller --footprint, or --warm")
        return count

    def _count(self, nbytes: int) -> int:
        return max(1, min(MOST_COPIES, math.ceil(self.footprint / max(1, nbytes))))

    def group(self, nbytes: int) -> int:
        """Products of one graph."""
        return max(1, min(GROUP[0], GROUP[1] // max(1, nbytes), self._count(nbytes)))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one product: median and quartiles over the calls that were timed (`measure.race`: by which clock)."""

    seconds: float
    low: float
    high: float
    calls: int
    processors: float  # that it had on average


def weight_strip(size: Size) -> Floats:
    """(at most STRIP, cols) random numbers; the whole weight repeats them."""
    numbers = np.random.default_rng(0)
    return numbers.standard_normal((min(STRIP, size.rows), size.cols), np.float32)


def repeat(strip: Array, rows: int) -> Array:
    """The rows of a strip, over and over: (rows, ...)."""
    out = np.empty((rows, *strip.shape[1:]), strip.dtype)
    for start in range(0, rows, len(strip)):
        out[start : start + len(strip)] = strip[: rows - start]
    return out


def activations(batch: int, cols: int) -> Floats:
    """(batch, cols) random numbers."""
    return np.random.default_rng(1).standard_normal((batch, cols), np.float32)


def hold(nbytes: int, what: str, advice: str) -> None:
    """Refuse what the memory does not hold.

    Raises
    ------
    MachineError
        If there is less memory.
    """
    free = free_bytes()
    if free and nbytes > LEFT_FREE * free:
        raise MachineError(f"{what} need {nbytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; {advice}")


def free_bytes() -> int:
    """Memory that can be had; 0 if the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0
