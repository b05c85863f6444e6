"""The command that measures: bench."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packfmt.cli import GOOD
from packfmt.cli.options import Json, app, size_of

if TYPE_CHECKING:
    from packfmt.bench.report import Row, Wanted

LARGEST = 10**9  # rows or columns
NOBODY = "none"
QUIET = 0.9  # of the time that threads which read memory should have had their processors


@app.command()
def bench(
    layouts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LAYOUT...",
            help="default: sherry, tq2_0, tq1_0, mxfp4, nvfp4, q4_0, q8_0, bf16, as far as they fit",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", metavar="ROWSxCOLS", help="of the weight; default: 4096x4096")
    ] = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", metavar="N", min=1, help="rows of activations; default: 1")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", metavar="N", min=1, max=256, help="default: 1, and all that there are"),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", metavar="NAME", help="numpy, torch, onnxruntime, ggml, ggml-repack or none; default: all"
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(metavar="S", min=0.001, max=3600, help="to time each contestant in each row; 3 products at least"),
    ] = 0.5,
    warm: Annotated[bool, typer.Option("--warm", help="one copy of the weights, which a cache may hold")] = False,
    footprint: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="copies of each one's weights that take turns: 2GB; default: more than any cache"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw speed against bits per weight: a .png or .svg")
    ] = None,
    json: Json = False,
) -> int:
    """Measure products on this machine. Each layout's time and share of the memory's speed, beside installed peers."""
    from packfmt.bench import SHAPE, measure, report

    if warm and footprint is not None:
        raise typer.BadParameter("one copy has no footprint; give one of --warm and --footprint", param_hint="--warm")
    wanted = report.Wanted(
        list(dict.fromkeys(layouts or [])),
        list(dict.fromkeys(map(_shape, shapes or []))) or [SHAPE],
        sorted(set(batches or [1])),
        sorted(set(threads or measure.thread_counts())),
        _chosen(peers),
        seconds,
        0 if warm else size_of(footprint, "--footprint") or measure.footprint(),
    )
    if plot:
        from packfmt.bench import plot as drawing

        drawing.check(plot)
    rows: list[Row] = []
    try:
        for row in report.rows(wanted, lambda text: print(f"{text}: measured", file=sys.stderr)):
            rows.append(row)
    finally:  # what was measured before an interrupt, or before the memory was full, is told all the same
        if rows:
            _tell(rows, wanted, json)
            if plot:
                drawing.draw(rows, plot)
                print(f"the plot is in {plot}", file=sys.stderr)
    return GOOD


def _tell(rows: Sequence[Row], wanted: Wanted, json: bool) -> None:
    """Print results, as tables or as JSON."""
    from packfmt.bench import report
    from packfmt.cli import show

    machine = report.machine(wanted.peers)
    if json:
        settings = {"seconds": wanted.seconds, "footprint_bytes": wanted.footprint, "warm": not wanted.footprint}
        whole = {"left_out": wanted.left_out(), "complete": len(rows) == wanted.count}
        show.as_json({"machine": machine, **settings, **whole, "rows": [row.to_json() for row in rows]})
    else:
        _tables(rows, wanted.peers)
        _legend(rows, wanted, machine)


def _shape(text: str) -> tuple[int, int]:
    """4096x4096 -> (4096, 4096)."""
    found = re.fullmatch(r"(\d{1,10})[xX](\d{1,10})", text, re.ASCII)
    rows, cols = (int(n) for n in found.groups()) if found else (0, 0)
    if not (0 < rows <= LARGEST and 0 < cols <= LARGEST):
        needed = "two numbers above 0, such as 4096x4096"
        raise typer.BadParameter(f"{text!r} is not ROWSxCOLS, {needed}", param_hint="--shape")
    return rows, cols


def _chosen(names: Sequence[str] | None) -> list[str]:
    """The peers by name, in the order of the table."""
    from packfmt.bench.peers import PEERS

    for name in names or []:
        if name not in (*PEERS, NOBODY):
            there = f"no peer is called {name!r}; there are {', '.join(PEERS)}, and {NOBODY}"
            raise typer.BadParameter(there, param_hint="--peer")
    if names and NOBODY in names and set(names) != {NOBODY}:
        raise typer.BadParameter(f"{NOBODY} stands alone; give {NOBODY}, or peers", param_hint="--peer")
    return [name for name in PEERS if not names or name in names]


def _tables(rows: Sequence[Row], peers: Sequence[str]) -> None:
    """A table for each shape, batch and number of threads."""
    from itertools import groupby

    from packfmt.bench.report import read_speed, setting, title
    from packfmt.cli import show

    ggml = any(name.startswith("ggml") for name in peers)
    heads = ("layout", "bits/weight", "us", "25 %", "75 %", "GB/s", "% of read", *peers, *(["ggml's type"] * ggml))
    for _, some in groupby(sorted(rows, key=setting), setting):
        group = list(some)
        print(f"{title(group[0])}; reading alone: {read_speed(group) / 1e9:.3g} GB/s")
        show.table(heads, [_line(row, peers, ggml) for row in group])
        print()


def _line(row: Row, peers: Sequence[str], ggml: bool) -> list[str]:
    time = row.ours.timing
    times = [_rounded(1e6 * t) for t in (time.seconds, time.low, time.high)]
    speed = [_rounded(row.speed / 1e9), _rounded(100 * row.speed / row.read, 2)]
    ratios = ["" if (ratio := row.ratio(name)) is None else _rounded(ratio) for name in peers]
    kinds = {e.kind: 0 for e in row.peers if e.name.startswith("ggml")}
    return [row.ours.kind, f"{row.ours.bits_per_weight:.4g}", *times, *speed, *ratios, *[" ".join(kinds)] * ggml]


def _rounded(number: float, digits: int = 3) -> str:
    """So many digits that mean something, and all before the point: 0.00432, 0.866, 7.40, 185, 1204."""
    return f"{number:.{max(0, digits - 1 - floor(log10(number)))}f}"


def _legend(rows: Sequence[Row], wanted: Wanted, machine: Mapping[str, Any]) -> None:
    """What the columns mean, what was measured, and why some cells are blank."""
    from packfmt.bench import measure
    from packfmt.cli import show

    versions = (f"{name} {number}" for name, number in machine["versions"].items())
    print(f"{machine['processor']}, {machine['cpus']} allowed; {', '.join(versions)}")
    if machine.get("ggml"):
        print(f"ggml {' '.join(machine['ggml'])}")
    print("us: microseconds of one product, the median, with quartiles; GB/s: of the weights as held for products")
    if wanted.peers:
        print(f"{', '.join(wanted.peers)}: their time over packfmt's; above 1 packfmt is faster")
    if wanted.footprint:
        size, cache = show.size(wanted.footprint), measure.cache_bytes()
        where = "may be in a cache" if wanted.footprint < 2 * cache else "out of cache"
        print(f"weights {where}: each contestant's copies, used in turn, make {size}")
    else:
        print("one copy of each contestant's weights; a cache may hold it")
    if alone := [row.had for row in rows if row.threads == 1]:  # several may wait for each other
        if (had := median(alone)) < QUIET:
            print(f"other work was going on: a thread had a processor {had:.0%} of the time; a quiet machine is faster")
        print("what one thread does is timed while it has a processor, what several do by the clock on the wall")
    if (fewest := min(e.timing.calls for row in rows for e in (row.ours, *row.peers))) < measure.TURNS:
        print(f"long products were timed {fewest} times only; with more --seconds more often")
    for why in wanted.left_out():
        print(f"left out: {why}")
    blank: dict[str, dict[str, None]] = {}  # why -> the peers that could not do it
    for name, why in ((name, row.absent[name]) for name in wanted.peers for row in rows if name in row.absent):
        blank.setdefault(why, {})[name] = None
    for why, names in blank.items():
        print(f"blank: {', '.join(names)}: {why}")
