"""Print tables, JSON and progress. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from packfmt.plan import Plan, Step


def as_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


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


def shape(dims: tuple[int, ...]) -> str:
    """Dimensions for people: 384x1536."""
    return "x".join(map(str, dims)) or "scalar"


@contextmanager
def progress(plan: Plan, quiet: bool = False) -> Iterator[Callable[[Step], None]]:
    """A bar with rate, time left and tensor on a terminal; a plain line every few seconds elsewhere."""
    total = sum(_work(s) for s in plan.steps)
    if quiet:
        yield lambda step: None
    elif sys.stderr.isatty():
        with _bar(total) as advance:
            yield advance
    else:
        yield _lines(total, len(plan.steps))


def _work(step: Step) -> int:
    from packfmt.codec import matrix

    return step.before.nbytes(*matrix(step.shape)) + 1


@contextmanager
def _bar(total: int) -> Iterator[Callable[[Step], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(30), TextColumn("{task.percentage:3.0f}%"), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=total)
        yield lambda step: bars.update(task, advance=_work(step), description=step.name)


def _lines(total: int, count: int, every: float = 5.0) -> Callable[[Step], None]:
    begin = last = time.monotonic()
    done = steps = 0

    def line(step: Step) -> None:
        nonlocal last, done, steps
        done, steps = done + _work(step), steps + 1
        now = time.monotonic()
        if now - last >= every:
            last, rate = now, done / (now - begin)
            left = (total - done) / rate
            print(
                f"{done / total:4.0%}  {steps}/{count}  {size(rate)}/s  {left:.0f} s left  {step.name}", file=sys.stderr
            )

    return line
