"""A conversion of 1.6 TB on many machines, simulated: what each reads and writes, what binds, what the scheduler holds.

    python tools/simulate_tasks.py [LAYOUT [WORKERS]]

The plan, its tasks and what is sent to workers are the real ones, made by packfmt for a checkpoint of which there are
only names and shapes. Time is simulated, second by second: a worker reads, encodes and writes at once, at the speed of
the slowest of its processors, its own link and its share of the storage's; some workers are killed and begin again.
The figures of docs/many-machines.md are this tool's.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

from packfmt import codecs, exporters
from packfmt.conversion import record
from packfmt.conversion.steps import Slice, cut
from packfmt.conversion.tasks import Job, shares
from packfmt.layout import DENSE
from packfmt.plan import Plan, Recipe, TensorInfo, make_plan

LAYERS, EXPERTS, HIDDEN, WIDE, VOCABULARY = 80, 256, 7168, 2048, 129_280  # about 800 G weights
CORES = 16  # of a worker
ENCODES = {"mxfp4": 0.25e9, "nvfp4_ct": 0.13e9, "sherry": 0.5e9, "q8_0": 0.25e9}  # weights a second of a core, measured
LINK = 1.25e9  # bytes a second of a worker's own link, 10 Gbit
STORAGES = (20e9, 80e9)  # bytes a second of the storage that all share, reading and writing together
KILLED = 1 / 3600  # chance of a worker in each second
FIRST_LINE = 200  # bytes of a journal
BEGINS = 15  # seconds until a worker that was killed has begun again; two seconds of its work are lost


def checkpoint() -> dict[str, TensorInfo]:
    """Names and shapes of a mixture of experts in bfloat16."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{k}_proj.weight": (HIDDEN, HIDDEN) for k in "qo"}
        shapes |= {f"{layer}.self_attn.{k}_proj.weight": (HIDDEN // 8, HIDDEN) for k in "kv"}
        shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            expert = f"{layer}.mlp.experts.{e}"
            shapes |= {f"{expert}.{k}_proj.weight": (WIDE, HIDDEN) for k in ("gate", "up")}
            shapes[f"{expert}.down_proj.weight"] = (HIDDEN, WIDE)
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    bf16, file = DENSE["bf16"], Path("model.safetensors")
    return {n: TensorInfo(n, s, "bfloat16", bf16, "BF16", file, 2 * prod(s)) for n, s in shapes.items()}


@dataclass
class Worker:
    """A task in work."""

    left: float  # seconds of encoding
    read: float  # bytes for a second of encoding
    wrote: float
    paused: int = 0
    lost: int = 0


def simulate(tasks: list[tuple[float, float, float]], storage: float, rng: random.Random) -> tuple[int, int, float]:
    """Seconds, workers killed, and the storage's mean load; tasks are (seconds of encoding, bytes read, written)."""
    workers = [Worker(s, r / s, w / s) for s, r, w in tasks]
    seconds = killed = 0
    moved = 0.0
    while any(w.left > 0 for w in workers):
        busy = [w for w in workers if w.left > 0 and not w.paused]
        each = storage / max(1, len(busy))
        for w in busy:
            speed = min(1.0, min(LINK, each) / (w.read + w.wrote), w.left)
            w.left -= speed
            moved += speed * (w.read + w.wrote)
            if rng.random() < KILLED:
                w.left, w.paused, killed = w.left + 2 * speed, BEGINS, killed + 1
        for w in workers:
            w.paused -= w.paused > 0
        seconds += 1
    return seconds, killed, moved / seconds / storage


def plan_of(layout: str) -> Plan:
    container = exporters.get("safetensors")
    return make_plan("model", checkpoint(), Recipe(layout, fallback="q8_0"), container, codecs.get)


def lines_of(plan: Plan, slices: list[list[Slice]]) -> list[int]:
    """Bytes of the lines that a journal gets of each step: one for a slice, and one with the checksums."""
    entries = exporters.get(plan.container).lay(Path("out"), plan, exporters.Extras()).entries
    out = []
    for at, (parts, entry) in enumerate(zip(slices, entries, strict=True)):
        rows = [{"step": at, "rows": (s.start, s.stop), "counted": 0} for s in parts]
        sums = {"step": at, "sums": dict.fromkeys((*entry.summed, *entry.streams), "0" * 64)}
        out.append(sum(len(json.dumps(line, separators=(",", ":"))) + 1 for line in (*rows, sums)))
    return out


def main(layout: str = "mxfp4", count: int = 64) -> None:
    plan = plan_of(layout)
    parts = shares(plan, count)
    read = [sum(plan.steps[at].before.nbytes(*_matrix(plan.steps[at].shape)) for at in part) for part in parts]
    wrote = [sum(plan.steps[at].nbytes for at in part) for part in parts]
    encoded = [sum(prod(plan.steps[at].shape) for at in part if plan.steps[at].encoder) for part in parts]
    files = [{plan.steps[at].file for at in part} for part in parts]
    shared = sum(1 for f in set().union(*files) if sum(f in mine for mine in files) > 1)
    job = Job(plan, Path("out"), {}, {}, "", {}, 0)
    slices = [cut(at, step) for at, step in enumerate(plan.steps)]
    lines = lines_of(plan, slices)
    journals = [FIRST_LINE + sum(lines[at] for at in part) for part in parts]
    print(f"{layout}, {count} workers of {CORES} cores")
    every = len(set().union(*files))
    print(f"tensors {len(plan.steps):,}, slices {sum(map(len, slices)):,}, files {every}, of several tasks {shared}")
    print(f"read {sum(read) / 1e9:,.0f} GB, written {sum(wrote) / 1e9:,.0f} GB")
    print(f"a task reads {min(read) / 1e9:.2f} to {max(read) / 1e9:.2f} GB, writes {min(wrote) / 1e9:.2f} to "
          f"{max(wrote) / 1e9:.2f} GB")  # fmt: skip
    print(
        f"sent to a worker {len(pickle.dumps(job)) / 1e6:.1f} MB; a journal grows to {min(journals) / 1e6:.2f} to "
        f"{max(journals) / 1e6:.2f} MB; what is converted, once, {len(record.text_of(job.conversion)) / 1e6:.1f} MB"
    )
    speed = ENCODES[layout] * CORES
    for storage in STORAGES:
        tasks = [(max(1e-3, e / speed), float(r), float(w)) for e, r, w in zip(encoded, read, wrote, strict=True)]
        seconds, killed, load = simulate(tasks, storage, random.Random(0))
        print(f"storage {storage / 1e9:.0f} GB/s: {seconds} s, {killed} workers killed, storage {load:.0%} busy; bound "
              f"by encoding {max(t[0] for t in tasks):.0f} s, links {max(t[1] + t[2] for t in tasks) / LINK:.0f} s, "
              f"storage {(sum(read) + sum(wrote)) / storage:.0f} s")  # fmt: skip


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return prod(shape[:-1]), shape[-1]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "mxfp4", int(sys.argv[2]) if len(sys.argv) > 2 else 64)
