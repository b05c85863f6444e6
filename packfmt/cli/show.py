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
from typing import Any

Done = Callable[[str, int], None]  # is told a tensor's name, and how many bytes of it have just been done
WINDOW = 30.0  # seconds that a rate is measured over
AT_ONCE = 0.5  # seconds
SAME = 0.05  # seconds in which what is told belongs together, as all that journals say at a look
SAMPLES = 4  # without which nobody knows a rate


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
    """How many of so many bytes are done, and how fast. What is told at once was done by an earlier run.

    checking : whether bytes are read back, that were written before
    """

    def __init__(self, total: int, checking: bool = False) -> None:
        self.total, self.done, self.tensor, self.checking = total, 0, "", checking
        self._begin = 0.0
        self._samples: deque[tuple[float, int]] = deque()  # time and bytes done, a second apart

    def add(self, tensor: str, nbytes: int) -> None:
        self.tensor, self.done = tensor, min(self.done + nbytes, self.total)
        now = time.monotonic()
        self._begin = self._begin or now
        if now - self._begin < AT_ONCE:
            return
        if self._samples and now - self._samples[-1][0] < SAME:
            self._samples[-1] = (self._samples[-1][0], self.done)
        elif not self._samples or now - self._samples[-1][0] >= 1:
            self._samples.append((now, self.done))
            while len(self._samples) > SAMPLES and now - self._samples[1][0] > WINDOW:
                self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """Bytes a second, of late; None as long as nobody knows."""
        if len(self._samples) < SAMPLES:
            return None
        then, before = self._samples[0]
        return (self.done - before) / max(time.monotonic() - then, 1e-3)

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take; None as long as nobody knows."""
        rest = self.total - self.done
        return 0.0 if not rest else rest / rate if (rate := self.rate) else None

    def __str__(self) -> str:
        known = "" if self.rate is None else f"{size(self.rate)}/s  "
        known += "" if self.left is None else f"{duration(self.left)} left  "
        what = "checking  " if self.checking else ""
        return f"{what}{size(self.done)} of {size(self.total)}  {known}{self.tensor}"

    def to_json(self) -> dict[str, Any]:
        left = None if self.left is None else round(self.left, 1)
        rate = None if self.rate is None else round(self.rate)
        rest = {"rate": rate, "seconds_left": left, "tensor": self.tensor, "checking": self.checking}
        return {"bytes": self.done, "total": self.total, **rest}


class Watch:
    """Is told what is done, and shows it."""

    def __init__(self, total: int) -> None:
        self.meter = Meter(total)
        self.show: Callable[[], None] = lambda: None

    def __call__(self, tensor: str, nbytes: int) -> None:
        self.meter.add(tensor, nbytes)
        self.show()

    def checking(self, total: int) -> Done:
        """Begin anew, with so many bytes that are going to be read back."""
        self.meter = Meter(total, checking=True)
        return self


@contextmanager
def progress(total: int, quiet: bool = False, as_lines_of_json: bool = False) -> Iterator[Watch]:
    """Gives who is called with a tensor's name and how many of `total` bytes have just been done.

    A bar with bytes, rate, time left and tensor on a terminal; a plain line every few seconds elsewhere. Or, anywhere,
    a JSON object a line: one every second at most, and a last one.
    """
    watch = Watch(total)
    if as_lines_of_json:
        watch.show = _lines(1, lambda: json.dumps(watch.meter.to_json()))
        try:
            yield watch
        finally:
            print(json.dumps(watch.meter.to_json()), file=sys.stderr)
    elif quiet:
        yield watch
    elif sys.stderr.isatty():
        with _bar(watch):
            yield watch
    else:
        watch.show = _lines(5, lambda: f"{watch.meter.done / max(1, watch.meter.total):4.0%}  {watch.meter}")
        yield watch


@contextmanager
def _bar(watch: Watch) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(20), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=watch.meter.total)

        def show() -> None:
            meter = watch.meter
            bars.update(task, total=meter.total, completed=meter.done, description=str(meter))

        watch.show = show
        yield


def _lines(every: float, line: Callable[[], str]) -> Callable[[], None]:
    """Prints a line when it is called, every so many seconds."""
    last = time.monotonic()

    def show() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= every:
            last = now
            print(line(), file=sys.stderr)

    return show
