"""Measure layouts in several shapes, batches and numbers of threads, each beside all peers."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

from packfmt import codecs
from packfmt.bench import LAYOUTS, Contestant, Size, Timing, activations, hold, measure, repeat, weight_strip
from packfmt.bench.measure import Reading
from packfmt.bench.peers import PEERS, Packed
from packfmt.errors import LayoutError, MachineError, PlanError
from packfmt.layout import Layout

LIBRARIES: Final = ("numpy", "torch", "onnxruntime", "llama-cpp-python")
# ggml's types for layouts that it does not have: the narrowest that holds as many bits
NEAREST: Final = ((1.9, "tq1_0"), (2.8, "tq2_0"), (5.0, "q4_0"), (6.0, "q5_0"), (9.0, "q8_0"), (17.0, "bf16"))
COMMON: Final = ("numpy", "torch", "onnxruntime")  # their weights are the same whatever the layout


@dataclass(frozen=True, slots=True)
class Entry:
    """One contestant's result."""

    name: str
    kind: str  # what its weights are
    nbytes: int  # that one product reads
    copies: int
    bits_per_weight: float
    weights_per_second: float  # columns times rows times batch
    timing: Timing


@dataclass(frozen=True, slots=True)
class Row:
    """One layout in one shape, batch and number of threads, and whoever was measured beside it."""

    shape: tuple[int, int]
    batch: int
    threads: int
    ours: Entry
    read: float  # bytes a second, read by the same number of threads in the same minute
    had: float  # of the time that those threads should have had a processor: 1 on a quiet machine
    peers: tuple[Entry, ...]
    absent: dict[str, str] = field(default_factory=dict)  # why a peer could not do it

    @property
    def speed(self) -> float:
        """Bytes a second."""
        return self.ours.nbytes / self.ours.timing.seconds

    def ratio(self, peer: str) -> float | None:
        """A peer's time over ours."""
        found = (e.timing.seconds / self.ours.timing.seconds for e in self.peers if e.name == peer)
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        peers = {e.name: {**asdict(e), "ratio": self.ratio(e.name)} for e in self.peers}
        rates = {"bytes_per_second": self.speed, "read_bytes_per_second": self.read, "of_read": self.speed / self.read}
        rates["processors_had"] = self.had
        asked = {"layout": self.ours.kind, "shape": self.shape, "batch": self.batch, "threads": self.threads}
        return {**asked, **asdict(self.ours), **rates, "peers": peers, "absent": self.absent}


def setting(row: Row) -> tuple[tuple[int, int], int, int]:
    """What all rows of one table, or panel of the plot, have in common."""
    return row.shape, row.batch, row.threads


def title(row: Row) -> str:
    """4096x4096, batch 1, 2 threads."""
    threads = f"{row.threads} thread{'s' * (row.threads > 1)}"
    return f"{row.shape[0]}x{row.shape[1]}, batch {row.batch}, {threads}"


def read_speed(rows: Sequence[Row]) -> float:
    """Bytes a second: the median of what was read beside the rows."""
    return median(row.read for row in rows)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure.

    layouts : by name; none: those of LAYOUTS that fit
    footprint : bytes that the copies of each contestant have together; 0: one copy, in the cache
    """

    layouts: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    batches: Sequence[int]
    threads: Sequence[int]
    peers: Sequence[str]
    seconds: float
    footprint: int

    def check(self) -> None:
        """Refuse what cannot be measured before anything is.

        Raises
        ------
        PlanError
            If no layout has a name, or a shape does not fill its blocks.
        MachineError
            If the memory does not hold the numbers that a product is made of.
        """
        if self.layouts and (why := self.left_out()):
            raise PlanError(why[0])
        for rows, cols in self.shapes:
            numbers = rows * cols + max(self.batches) * (rows + cols)
            hold(4 * numbers, f"{rows}x{cols}: float32 numbers", "measure smaller shapes or batches")

    def fitting(self, shape: tuple[int, int]) -> list[str]:
        """The layouts that hold a weight of this shape."""
        return [name for name in self.layouts or LAYOUTS if not _misfit(name, *shape)]

    def left_out(self) -> list[str]:
        """Why layouts do not hold a weight of a shape."""
        pairs = product(self.shapes, self.layouts or LAYOUTS)
        return [why for shape, name in pairs if (why := _misfit(name, *shape))]

    @property
    def count(self) -> int:
        """Rows of results."""
        return sum(len(self.fitting(shape)) for shape in self.shapes) * len(self.batches) * len(self.threads)


def _misfit(name: str, rows: int, cols: int) -> str:
    """Why a layout holds no weight of this shape; empty if it does."""
    codec = codecs.get(name)
    try:
        codec.layout.fit(rows, cols)
    except LayoutError as error:
        return f"{rows}x{cols}: {error}"
    return f"{rows}x{cols}: {name}: needs {codec.least_cols} columns or more" if cols < codec.least_cols else ""


def nearest(layout: Layout) -> str:
    """The type of ggml's to compare a layout with: the same, or as many bits."""
    if name := dict(layout.also).get("gguf"):
        return name.lower()
    if same := re.match("mxfp4|nvfp4|bf16|f16|f32", layout.name):
        return same[0]
    return next((kind for most, kind in NEAREST if layout.bits_per_weight <= most), "f32")


def rows(wanted: Wanted, done: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """Measure; a row as soon as it is known. `done` is told what was measured.

    Raises
    ------
    PlanError
        If no layout has a name, or a shape does not fill its blocks.
    MachineError
        If the memory does not hold the numbers or their copies.
    """
    wanted.check()
    for shape in wanted.shapes:
        size = Size(*shape, wanted.footprint)
        with ExitStack() as whole:
            common, absent = _peers(size, [p for p in wanted.peers if p in COMMON], "", whole)
            # threads outside, layouts inside: to change the threads is what takes onnxruntime long
            for threads, name in product(wanted.threads, wanted.fitting(shape)):
                with ExitStack() as one:
                    ours = _ours(size, name, one)
                    kind = nearest(codecs.get(name).layout)
                    own, unable = _peers(size, [p for p in wanted.peers if p not in COMMON], kind, one)
                    reading = one.enter_context(closing(Reading(size, ours.nbytes)))
                    for batch in wanted.batches:
                        all_peers, why_not = [*common, *own], {**absent, **unable}
                        row = _row(size, batch, threads, wanted.seconds, [ours, *all_peers], reading, why_not)
                        yield row
                        done(f"{title(row)}, {name}")


def _ours(size: Size, name: str, until: ExitStack) -> Contestant:
    weight = repeat(weight_strip(size), size.rows)
    packed = codecs.get(name).encode(weight)
    del weight
    return until.enter_context(closing(Packed(size, packed)))


def _peers(size: Size, names: Sequence[str], kind: str, until: ExitStack) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that there are, and why others are not."""
    found, absent = [], {}
    for name in names:
        try:
            found.append(until.enter_context(closing(PEERS[name](size, kind))))
        except MachineError as error:
            absent[name] = str(error)
    return found, absent


def _row(
    size: Size,
    batch: int,
    threads: int,
    seconds: float,
    field: Sequence[Contestant],
    reading: Reading,
    absent: dict[str, str],
) -> Row:
    x = activations(batch, size.cols)
    for contestant in (*field, reading):
        contestant.begin(x, threads)
    *timings, read = measure.race([*field, reading], seconds, threads)
    ours, *peers = (_entry(c, t, size, batch) for c, t in zip(field, timings, strict=True))
    speed, had = reading.nbytes / read.seconds, read.processors / threads
    return Row((size.rows, size.cols), batch, threads, ours, speed, had, tuple(peers), absent)


def _entry(who: Contestant, timing: Timing, size: Size, batch: int) -> Entry:
    bits, speed = 8 * who.nbytes / size.weights, batch * size.weights / timing.seconds
    return Entry(who.name, who.kind, who.nbytes, who.copies, bits, speed, timing)


def machine(peers: Sequence[str]) -> dict[str, Any]:
    """What a reader of the numbers must know of this machine and of the peers."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cache_bytes": measure.cache_bytes(),
        "versions": {name: number for name in LIBRARIES if (number := _version(name))},
    }
    if any(name.startswith("ggml") for name in peers):
        from packfmt.bench import ggml

        try:
            found["ggml"] = ggml.library().features()
        except MachineError:
            found["ggml"] = []
    return found


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
