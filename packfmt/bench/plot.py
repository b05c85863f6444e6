"""A roofline: weights a second against bits per weight, and the line that no product from memory can cross."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np

from packfmt.bench import Array
from packfmt.bench.peers import optional
from packfmt.bench.report import Entry, Row, read_speed, setting, title
from packfmt.errors import MachineError, PlanError

ENDINGS: Final = (".png", ".svg")
# told apart by shape and filling, so that grey paper shows them; one shows through the other
LOOKS: Final = {
    "packfmt": dict(marker="o", color="black", markersize=8),
    "ggml": dict(marker="o", markerfacecolor="none", color="tab:red", markersize=8),
    "ggml-repack": dict(marker="X", color="tab:red", markersize=8),
    "torch": dict(marker="^", markerfacecolor="none", color="tab:orange", markersize=9),
    "onnxruntime": dict(marker="D", markerfacecolor="none", color="tab:blue", markersize=7),
    "numpy": dict(marker="s", markerfacecolor="none", color="tab:green", markersize=8),
}
TICKS: Final = (1, 1.5, 2, 3, 4, 6, 8, 16, 32)
PANEL: Final = 7.0, 5.6  # inches
DPI: Final = 150
# where a label may stand: so many points of a typographer's from its dot, at so many angles
REACHES: Final = (6, 12, 20, 30, 42, 56, 72)
ANGLES: Final = 16
DOT: Final = 5  # half a dot's width with some air, in the same points
LEADER: Final = np.array([0.2, 0.4, 0.6])  # of the way to the label: where its line must not cross anything
ROUNDS: Final = 8


def check(path: Path) -> None:
    """Refuse early what `draw` could not write.

    Raises
    ------
    PlanError
        If the name ends in neither .png nor .svg, or is a folder's, or its folder is not there.
    MachineError
        If the file may not be written, or matplotlib is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise PlanError(f"{path}: a plot ends in {' or '.join(ENDINGS)}")
    if path.is_dir():
        raise PlanError(f"{path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise PlanError(f"{path.absolute().parent}: no such folder; make it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise MachineError(f"{path}: may not be written; name another place")
    optional("matplotlib")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a picture with a panel for each shape, batch and number of threads.

    Raises
    ------
    MachineError
        If matplotlib is not installed.
    """
    optional("matplotlib").use("Agg")
    panels = [list(some) for _, some in groupby(sorted(rows, key=setting), setting)]
    wide = min(2, len(panels))
    high = math.ceil(len(panels) / wide)
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        high, wide, squeeze=False, layout="constrained", figsize=(PANEL[0] * wide, PANEL[1] * high), dpi=DPI
    )
    try:
        everyone = _points(rows)
        bits = [e.bits_per_weight for e in everyone]
        for i, (panel, some) in enumerate(zip(axes.flat, panels, strict=False)):
            beside = panels[i - i % wide : i - i % wide + wide]  # the panels of one line have one scale
            lows, highs = zip(*map(_heights, beside), strict=True)
            panel.loglog()
            panel.set_xlim(0.85 * min(bits), 1.25 * max(bits))
            panel.set_ylim(min(lows), max(highs))
            _panel(panel, some)
        for panel in axes.flat[len(panels) :]:
            panel.set_visible(False)
        figure.legend(handles=_legend(everyone), loc="outside lower center", ncols=3 * wide, frameon=False)
        figure.canvas.draw()  # now panels have their places, which labels must know
        several = {e.name for e in everyone if len(_kinds(everyone, e.name)) > 1}
        for panel, some in zip(axes.flat, panels, strict=False):
            _label(panel, _points(some), several)
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def _points(rows: Sequence[Row]) -> list[Entry]:
    """All results; of a peer that was measured beside several layouts with equal weights the middle one."""
    by_kind: dict[tuple[str, str], list[Entry]] = {}
    for row in rows:
        for entry in (row.ours, *row.peers):
            by_kind.setdefault((entry.name, entry.kind), []).append(entry)
    return [sorted(some, key=lambda e: e.weights_per_second)[len(some) // 2] for some in by_kind.values()]


def _roof(rows: Sequence[Row], bits: float) -> float:
    """Weights a second of products that do nothing but read so many bits for each."""
    return rows[0].batch * read_speed(rows) * 8 / bits


def _heights(rows: Sequence[Row]) -> tuple[float, float]:
    """The lowest and highest speed in a panel: its points with some air, and the roof above the fastest if near."""
    points = _points(rows)
    fastest = max(points, key=lambda e: e.weights_per_second)
    best = fastest.weights_per_second
    roof = 1.5 * _roof(rows, fastest.bits_per_weight)
    return min(e.weights_per_second for e in points) / 1.5, min(max(2 * best, roof), 4 * best)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    """Points, the roof, and what the axes say."""
    for entry in _points(rows):
        spot = entry.bits_per_weight, entry.weights_per_second
        panel.plot(*spot, linestyle="none", zorder=5 if entry.name == "packfmt" else 6, **LOOKS[entry.name])
    ends, batch = panel.get_xlim(), rows[0].batch
    panel.plot(ends, [_roof(rows, bits) for bits in ends], color="black", linewidth=1, linestyle="--")
    ticks = [t for t in TICKS if ends[0] <= t <= ends[1]]
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    low, high = panel.get_ylim()
    steps = [step * 10.0**power for power in range(5, 15) for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    panel.set_yticks(steps, [f"{step / 1e9:g}" for step in steps])
    panel.minorticks_off()
    panel.set_xlabel("bits per weight, as held for products")
    panel.set_ylabel("billions of weights a second" + (", times the batch" if batch > 1 else ""))
    reading = f"dashed: reading {read_speed(rows) / 1e9:.3g} GB/s"
    panel.set_title(f"{title(rows[0])}\n{reading}{f', each byte used for {batch} products' * (batch > 1)}")
    panel.grid(True, which="major", color="0.9")


def _kinds(points: Sequence[Entry], name: str) -> list[str]:
    """What weights a contestant has had."""
    return [e.kind for e in points if e.name == name]


def _legend(points: Sequence[Entry]) -> list[Any]:
    """Who is who; and what its weights are, if they are always the same."""
    line = import_module("matplotlib.lines").Line2D
    kinds = {name: found for name in LOOKS if (found := _kinds(points, name))}
    names = {name: f"{name}: {found[0]}" if len(found) == 1 else name for name, found in kinds.items()}
    return [line([], [], linestyle="none", label=names[name], **LOOKS[name]) for name in names]


# ---------------------------------------------------------------- labels


def _label(panel: Any, points: Sequence[Entry], names: set[str]) -> None:
    """Write what the weights are beside the points of those who have several kinds."""
    drawer, scale = panel.figure.canvas.get_renderer(), DPI / 72
    points = sorted(points, key=lambda e: e.name not in names)
    labels = [
        panel.annotate(
            entry.kind, (entry.bits_per_weight, entry.weights_per_second), (0, 0), textcoords="offset points",
            fontsize=8, fontweight="bold" if entry.name == "packfmt" else "normal", color=LOOKS[entry.name]["color"],
            ha="center", va="center", zorder=4, in_layout=False,
        )
        for entry in points if entry.name in names
    ]  # fmt: skip
    if not labels:
        return
    sizes = np.array([(box.width, box.height) for box in (text.get_window_extent(drawer) for text in labels)])
    dots = panel.transData.transform([(e.bits_per_weight, e.weights_per_second) for e in points])
    offsets, reaches = places(dots, sizes, panel.bbox.extents, scale)
    for text, dot, offset, reach in zip(labels, dots, offsets, reaches, strict=False):
        text.set_position(offset / scale)
        if reach > REACHES[0]:
            ends = panel.transData.inverted().transform([dot, dot + offset])
            panel.plot(*ends.T, color="0.6", linewidth=0.5, zorder=3)
            text.set_bbox(dict(facecolor="white", edgecolor="none", pad=0.5))


def places(dots: Array, sizes: Array, frame: Array, scale: float) -> tuple[Array, Array]:
    """Where labels stand: near their dots, and on nothing else if that can be.

    One label after another takes the best place that the others leave it, until all are content.

    Parameters
    ----------
    dots : (dots, 2) float64; the first of them have labels
    sizes : (labels, 2) float64, width and height
    frame : (4,) float64, left, bottom, right, top: labels stay inside
    scale : pixels of a typographer's point; all else is in pixels

    Returns
    -------
    (labels, 2) float64, from a dot to the middle of its label; (labels,) which of REACHES
    """
    angles = 2 * np.pi * np.arange(ANGLES) / ANGLES
    away = np.tile(np.stack([np.cos(angles), np.sin(angles)], 1).round(9), (len(REACHES), 1))
    reaches = np.repeat(REACHES, ANGLES)
    middles = scale * reaches[:, None] * away + np.sign(away) * sizes[:, None] / 2  # (labels, places, 2)
    half = sizes[:, None] / 2 + 1
    boxes = dots[: len(sizes), None, None] + np.stack([middles - half, middles + half], 2)  # (..., corner, 2)
    points = np.stack([dots - DOT * scale, dots + DOT * scale], 1)
    chosen = np.full(len(sizes), -1)
    for _ in range(ROUNDS):
        before = chosen.copy()
        for i, mine in enumerate(boxes):
            others = [boxes[j, chosen[j]] for j in range(len(sizes)) if j != i and chosen[j] >= 0]
            taken = np.array([*others, *np.delete(points, i, 0)]).reshape(-1, 2, 2)
            leader = dots[i] + middles[i, :, None] * LEADER[:, None]  # (places, some of its points, 2)
            cost = (reaches + (away[:, 0] < 0)) / 100  # the nearest place is best, and that to the right
            cost += 10 * ((mine[:, 0] < frame[:2]) | (mine[:, 1] > frame[2:])).any(1)
            cost += 3 * _meet(mine, taken).sum(1)
            cost += _meet(np.stack([leader, leader], 2).reshape(-1, 2, 2), taken).reshape(len(mine), -1).sum(1) / 2
            chosen[i] = cost.argmin()
        if (chosen == before).all():
            break
    return middles[np.arange(len(sizes)), chosen], reaches[chosen]


def _meet(some: Array, others: Array) -> Array:
    """(some, 2, 2) and (others, 2, 2), lower left and upper right corners -> (some, others) bool, who overlaps whom."""
    both: Array = np.all((some[:, None, 0] < others[:, 1]) & (others[:, 0] < some[:, None, 1]), axis=2)
    return both
