"""Print tables, JSON and progress. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packfmt.checkpoint import Checkpoint

Done = Callable[[str, int], None]  # is told a tensor's name, and how many bytes of it have just been done
WINDOW = 30.0  # seconds that a rate is measured over
AT_ONCE = 0.2  # seconds


def as_json(data: Any) -> None:
    """One JSON document on stdout; numbers that JSON does not have stand as texts: "inf", "nan"."""
    print(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns aligned with spaces: text to the left, numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(row[i]) for row in cells)) if cells else len(h) for i, h in enumerate(heads)]
    right = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(heads))]
    for row in [list(heads), *cells]:
        line = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        print("  ".join(line).rstrip())


def _numeric(cell: str) -> bool:
    return re.fullmatch(r"([-+]?[\d.,]+(e[-+]?\d+)?|inf|nan)?( ?[kMGT]?B)?", cell) is not None


def size(nbytes: float) -> str:
    """Bytes for people: 17.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def duration(seconds: float) -> str:
    """Time for people: 40 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def shape(dims: tuple[int, ...]) -> str:
    """Dimensions for people: 384x1536."""
    return "x".join(map(str, dims)) or "scalar"


class Meter:
    """How many of so many bytes are done, and how fast. What is told at once was done by an earlier run."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tensor = total, 0, ""
        self._begin = 0.0
        self._samples: deque[tuple[float, int]] = deque()  # time and bytes done, a second apart

    def add(self, tensor: str, nbytes: int) -> None:
        self.tensor, self.done = tensor, min(self.done + nbytes, self.total)
        now = time.monotonic()
        self._begin = self._begin or now
        if now - self._begin < AT_ONCE:
            self._samples = deque([(now, self.done)])
        elif now - self._samples[-1][0] >= 1:
            self._samples.append((now, self.done))
            while now - self._samples[1][0] > WINDOW:
                self._samples.popleft()

    @property
    def rate(self) -> float:
        """Bytes a second, of late; 0 as long as nobody knows."""
        if not self._samples:
            return 0.0
        then, before = self._samples[0]
        return (self.done - before) / max(time.monotonic() - then, 1e-3)

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take; None as long as nobody knows."""
        rest = self.total - self.done
        return rest / rate if (rate := self.rate) else None if rest else 0.0

    def __str__(self) -> str:
        known = "" if self.left is None else f"{size(self.rate)}/s  {duration(self.left)} left  "
        return f"{size(self.done)} of {size(self.total)}  {known}{self.tensor}"

    def to_json(self) -> dict[str, Any]:
        left = None if self.left is None else round(self.left, 1)
        rest = {"rate": round(self.rate), "seconds_left": left, "tensor": self.tensor}
        return {"bytes": self.done, "total": self.total, **rest}


@contextmanager
def progress(total: int, quiet: bool = False, as_lines_of_json: bool = False) -> Iterator[Done]:
    """Gives a function to call with a tensor's name and how many of `total` bytes have just been done.

    A bar with bytes, rate, time left and tensor on a terminal; a plain line every few seconds elsewhere. Or, anywhere,
    a JSON object a line: one every second at most, and a last one.
    """
    meter = Meter(total)
    if as_lines_of_json:
        try:
            yield _lines(meter, 1, lambda: json.dumps(meter.to_json()))
        finally:
            print(json.dumps(meter.to_json()), file=sys.stderr)
    elif quiet:
        yield lambda tensor, nbytes: None
    elif sys.stderr.isatty():
        with _bar(meter) as done:
            yield done
    else:
        yield _lines(meter, 5, lambda: f"{meter.done / max(1, total):4.0%}  {meter}")


def watched(model: Checkpoint, quiet: bool = False) -> Iterator[str]:
    """The names of a model's tensors, with progress shown as they are taken."""
    sizes = {name: info.nbytes for name, info in model.index.items()}
    with progress(sum(sizes.values()), quiet) as done:
        for name in model:
            yield name
            done(name, sizes[name])


@contextmanager
def _bar(meter: Meter) -> Iterator[Done]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(20), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=meter.total)

        def done(tensor: str, nbytes: int) -> None:
            meter.add(tensor, nbytes)
            bars.update(task, completed=meter.done, description=str(meter))

        yield done


def _lines(meter: Meter, every: float, line: Callable[[], str]) -> Done:
    last = time.monotonic()

    def done(tensor: str, nbytes: int) -> None:
        nonlocal last
        meter.add(tensor, nbytes)
        if (now := time.monotonic()) - last >= every:
            last = now
            print(line(), file=sys.stderr)

    return done
