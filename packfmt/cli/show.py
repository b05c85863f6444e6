"""Print tables, JSON and progress. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packfmt.checkpoint import Checkpoint


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


def shape(dims: tuple[int, ...]) -> str:
    """Dimensions for people: 384x1536."""
    return "x".join(map(str, dims)) or "scalar"


@contextmanager
def progress(model: Checkpoint, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Gives a function to call with the name of each of a model's tensors when it is done.

    A bar with rate, time left and tensor on a terminal; a plain line every few seconds elsewhere.
    """
    sizes = {name: info.nbytes for name, info in model.index.items()}
    if quiet:
        yield lambda name: None
    elif sys.stderr.isatty():
        with _bar(sizes) as done:
            yield done
    else:
        yield _lines(sizes)


def watched(model: Checkpoint, quiet: bool = False) -> Iterator[str]:
    """The names of a model's tensors, with progress shown as they are taken."""
    with progress(model, quiet) as done:
        for name in model:
            yield name
            done(name)


@contextmanager
def _bar(sizes: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(30), TextColumn("{task.percentage:3.0f}%"), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=sum(sizes.values()))
        yield lambda name: bars.update(task, advance=sizes.get(name, 0), description=name)


def _lines(sizes: Mapping[str, int], every: float = 5.0) -> Callable[[str], None]:
    begin = last = time.monotonic()
    total, done, count = max(1, sum(sizes.values())), 0, 0

    def line(name: str) -> None:
        nonlocal last, done, count
        done, count = done + sizes.get(name, 0), count + 1
        now = time.monotonic()
        if now - last >= every:
            last, rate = now, max(1, done) / (now - begin)
            left = f"{(total - done) / rate:.0f} s left"
            print(f"{done / total:4.0%}  {count}/{len(sizes)}  {size(rate)}/s  {left}  {name}", file=sys.stderr)

    return line
