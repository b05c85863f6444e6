"""Convert the demo's model to every layout, check each result, and tell what it cost and kept."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from math import prod, sqrt
from pathlib import Path

import numpy as np

from packfmt import checkpoint, codecs, convert, verify
from packfmt.checkpoint import Checkpoint
from packfmt.cli import FOUND, GOOD, show
from packfmt.demo import Row, embeddings, find_model, measure_embeddings
from packfmt.demo.bert import Array
from packfmt.errors import PlanError
from packfmt.plan import WEIGHTS, Plan, Recipe

FALLBACK = "q8_0"  # for columns that do not fill a layout's blocks: of 384, blocks of 256 cannot be made
HEADS = ("layout", "bits/weight", "size", "ratio", "rel. RMS error", "cosine mean", "cosine min", "seconds", "note")


def run(out: Path | None, json: bool) -> int:
    """Print the table; the models stay in `out`, or are removed if it is None. Returns an exit code.

    Raises
    ------
    PlanError
        If the model is not installed, or `out` exists.
    """
    folder = find_model()
    if out is not None and out.exists():
        raise PlanError(f"{out}: exists; choose another folder")
    with tempfile.TemporaryDirectory(prefix="packfmt-demo-") as scratch:
        place = out or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        rows, findings = [], []
        with checkpoint.open(folder) as model:
            before = embeddings(lambda name: verify.values(model[name]))
            if not json:
                print(f"all-MiniLM-L6-v2: {show.size(_size(folder))}, {len(model)} tensors, from {folder.parent.name}")
            for name in codecs.names():
                row, found = _one(model, name, place / name, before)
                rows.append(row)
                findings += found
    if json:
        show.as_json([asdict(row) for row in rows])
    else:
        show.table(HEADS, [_cells(row) for row in rows])
        print("errors and cosines are against the float32 model; cosines over the embeddings of 36 sentences")
        for finding in findings:
            print(f"{finding.where}: {finding.rule} {finding.message}")
        if out:
            print(f"the models are in {out}")
    return FOUND if findings else GOOD


def _one(model: Checkpoint, name: str, target: Path, before: Array) -> tuple[Row, list[verify.Finding]]:
    plan = convert.plan_for(model, target, Recipe(name, fallback=FALLBACK))
    report = convert.run(plan, model, target, check=True)
    findings = verify.validate(target)
    with checkpoint.open(target) as packed:
        error = _error(plan, name, model, packed)
        mean, least = measure_embeddings(lambda tensor: verify.values(packed[tensor]), before)
    others = [s for s in plan.steps if s.reason.startswith("--fallback")]
    matrices = [s for s in plan.steps if s.reason == WEIGHTS or s in others]
    bits = 8 * sum(s.nbytes for s in matrices) / sum(prod(s.shape) for s in matrices)
    note = f"{len(others)} of {len(matrices)} matrices as {FALLBACK}: {others[0].shape[-1]} columns" if others else ""
    size = _size(target)
    row = Row(name, note, bits, size, _size(model.path) / size, error, mean, least, report.seconds)
    return row, findings


def _error(plan: Plan, name: str, before: Checkpoint, after: Checkpoint) -> float:
    """Relative RMS error over all weights that got this layout, in float64."""
    off = power = 0.0
    for step in plan.steps:
        if step.layout.name == name and len(step.shape) > 1:
            exact = verify.values(before[step.name]).astype(np.float64)
            off += float(np.square(verify.values(after[step.name]) - exact).sum())
            power += float(np.square(exact).sum())
    return sqrt(off / power)


def _size(folder: Path) -> int:
    """Bytes of the model file alone; tokenizer and others are the same in every layout."""
    return (folder / "model.safetensors").stat().st_size


def _cells(row: Row) -> tuple[str, ...]:
    size, ratio = show.size(row.nbytes), f"{row.ratio:.2f}"
    cosines = (f"{row.cosine_mean:.6f}", f"{row.cosine_min:.6f}")
    return (row.layout, f"{row.bits_per_weight:.5g}", size, ratio, f"{row.error:.3g}", *cosines, f"{row.seconds:.2f}", row.note)
