"""A roofline: weights a second against bits per weight, and the line that no product from memory can cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from itertools import groupby, product
from pathlib import Path
from typing import Any, Final

from packfmt.bench.peers import optional
from packfmt.bench.report import Entry, Row, read_speed, setting, title
from packfmt.errors import PlanError

ENDINGS: Final = (".png", ".svg")
# told apart by shape and filling, so that grey paper shows them
LOOKS: Final = {
    "packfmt": dict(marker="o", color="black", markersize=8),
    "ggml": dict(marker="o", markerfacecolor="white", color="tab:red", markersize=8),
    "ggml-repack": dict(marker="X", color="tab:red", markersize=8),
    "torch": dict(marker="^", markerfacecolor="white", color="tab:orange", markersize=9),
    "onnxruntime": dict(marker="D", markerfacecolor="white", color="tab:blue", markersize=7),
    "numpy": dict(marker="s", markerfacecolor="white", color="tab:green", markersize=8),
}
TICKS: Final = (1, 1.5, 2, 3, 4, 6, 8, 16, 32)
# where a label may stand beside its point, in typographic points, the best place first
PLACES: Final = tuple(product((7, -7, 0), (5, -5, 15, -15, 25, -25, 35, -35)))
PANEL: Final = 7.0, 5.6  # inches


def check(path: Path) -> None:
    """Refuse early what `draw` could not write.

    Raises
    ------
    PlanError
        If the name ends in neither .png nor .svg.
    MachineError
        If matplotlib is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise PlanError(f"{path}: a plot ends in {' or '.join(ENDINGS)}")
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
        high, wide, squeeze=False, layout="constrained", figsize=(PANEL[0] * wide, PANEL[1] * high)
    )
    try:
        for panel, some in zip(axes.flat, panels, strict=False):
            _panel(panel, some)
        names = {n: h for p in axes.flat for h, n in zip(*p.get_legend_handles_labels(), strict=True)}
        figure.legend(names.values(), names, loc="outside lower center", ncols=3 * wide, frameon=False)
        for panel in axes.flat[len(panels) :]:
            panel.set_visible(False)
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    points = _points(rows)
    bits = [e.bits_per_weight for e in points]
    low, high = 0.85 * min(bits), 1.25 * max(bits)
    read, batch = read_speed(rows), rows[0].batch
    panel.plot((low, high), [batch * 8 * read / b for b in (low, high)], color="black", linewidth=1, linestyle="--")
    panel.loglog()
    for name, look in LOOKS.items():
        mine = [e for e in points if e.name == name]
        if mine:
            speeds = [e.weights_per_second for e in mine]
            panel.plot([e.bits_per_weight for e in mine], speeds, linestyle="none", label=name, zorder=5, **look)
    panel.set_xlim(low, high)
    ticks = [t for t in TICKS if low <= t <= high]
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("bits per weight, as held for products")
    panel.set_ylabel("weights a second" + (", times the batch" if batch > 1 else ""))
    panel.set_title(f"{title(rows[0])}\ndashed: reading {read / 1e9:.3g} GB/s" + _times(batch))
    panel.grid(True, which="major", color="0.9")
    _label(panel, points)


def _times(batch: int) -> str:
    return f", each byte used for {batch} products" if batch > 1 else ""


def _points(rows: Sequence[Row]) -> list[Entry]:
    """All results; of a peer that was measured beside several layouts with equal weights the middle one."""
    by_kind: dict[tuple[str, str], list[Entry]] = {}
    for row in rows:
        for entry in (row.ours, *row.peers):
            by_kind.setdefault((entry.name, entry.kind), []).append(entry)
    return [sorted(some, key=lambda e: e.weights_per_second)[len(some) // 2] for some in by_kind.values()]


def _label(panel: Any, points: Sequence[Entry]) -> None:
    """Write beside each point what it is, where no other text or point is."""
    figure = panel.figure
    figure.canvas.draw()
    drawer = figure.canvas.get_renderer()
    taken: list[Any] = []
    dots = [panel.transData.transform((e.bits_per_weight, e.weights_per_second)) for e in points]
    for entry, dot in zip(points, dots, strict=True):
        ours = entry.name == "packfmt"
        best: Any = None
        for right, up in PLACES:
            text = panel.annotate(
                entry.kind,
                (entry.bits_per_weight, entry.weights_per_second),
                (right, up),
                textcoords="offset points",
                fontsize=8,
                fontweight="bold" if ours else "normal",
                color="black" if ours else "0.25",
                ha={7: "left", -7: "right", 0: "center"}[right],
                va="center",
                zorder=4,
                bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.5),
                arrowprops=dict(arrowstyle="-", color="0.6", linewidth=0.5, shrinkB=4) if abs(up) > 5 else None,
            )
            box = text.get_window_extent(drawer)
            hit = sum(box.overlaps(other) for other in taken) + sum(
                bool(box.padded(3).contains(*d)) for d in dots if d is not dot
            )
            outside = not panel.bbox.padded(-2).contains(box.x0, box.y0) or not panel.bbox.contains(box.x1, box.y1)
            cost = hit + 3 * outside
            if best is None or cost < best[0]:
                if best:
                    best[1].remove()
                best = cost, text, box
            else:
                text.remove()
            if not cost:
                break
        taken.append(best[2])
