"""Convert the demo's model to one layout after another, check each result, and measure what it cost and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod, sqrt
from pathlib import Path

import numpy as np

from packfmt import checkpoint, conversion, verify
from packfmt.checkpoint import Checkpoint
from packfmt.demo import Row, embeddings, find_model, measure_embeddings
from packfmt.demo.bert import Array
from packfmt.plan import WEIGHTS, Plan, Recipe

# of every kind one; layouts that hold the same numbers in other places would only repeat a row
LAYOUTS = (
    *("f32", "f16", "bf16", "q8_0", "mxint8", "fp8_row", "mxfp8_e4m3", "mxfp6_e2m3"),
    *("q4_0", "if4", "hif4", "nvfp4_modelopt", "mxfp4"),
    *("ptqtp3_b3", "ptqtp2_b3", "ptqtp1_b3", "bitnet", "tq1_0", "sherry_g128", "sherry_row", "q1_0"),
)
FALLBACK = "q8_0"  # for columns that do not fill a layout's blocks: of 384, blocks of 256 cannot be made


def rows(place: Path, layouts: Sequence[str] = LAYOUTS) -> Iterator[tuple[Row, list[verify.Finding]]]:
    """Convert to each layout in a folder of its own in `place`; a row, and what validation finds, for each.

    Raises
    ------
    MachineError
        If the model is not installed.
    PlanError
        If a folder exists.
    """
    with checkpoint.open(find_model()) as model:
        before = embeddings(lambda name: verify.values(model[name]))
        for name in layouts:
            yield _one(model, name, place / name, before)


def _one(model: Checkpoint, name: str, target: Path, before: Array) -> tuple[Row, list[verify.Finding]]:
    plan = conversion.plan_for(model, target, Recipe(name, fallback=FALLBACK))
    report = conversion.run(plan, model, target, check=True)
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
