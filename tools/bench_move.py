"""How fast the mover is: million weights a second for unpack, pack and repack, beside a plain copy.

    python tools/bench_move.py [--side 4096] [--rounds 5] [LAYOUT ...]

Every figure is the best of interleaved rounds, with the result allocated anew each time, on one thread and on all.
"copy" is np.copyto between two arrays of one byte a weight, both touched before. `PAIRS` says what repack goes to.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

import house  # noqa: F401  makes the tree's own packfmt importable
from packfmt import layout as lay
from packfmt.kernels import threads
from packfmt.layout import BIT, WORD, Codes, Component, Digit, Layout, Values, blocks, cols, dtype_of, grid, rows
from packfmt.placement import pack, repack, unpack

RAW = grid("raw")
SCALE = Values("scale", "<f2")


def one(name: str, over: tuple[Digit, ...], *cell: Codes | Values) -> Layout:
    return Layout(name, (Component("weight", over, cell),), RAW)


def flat(bits: int) -> Layout:
    """Rows of 32 columns, each a dense stream of bits."""
    return one(f"flat_{bits}", (rows(), cols(32)), Codes("codes", bits, (), (cols(1, 32),), "<u4"))


def gptq(bits: int) -> Layout:
    over = (cols(32), Digit(WORD), rows())
    return one(f"gptq_{bits}", over, Codes("codes", bits, (), (cols(1, 32),), "<u4"))


NIBBLES = Codes("codes", 4, (cols(1, 16),), (cols(16, 2),))
TILE = one("tile", (rows(16), cols(32)), Codes("codes", 4, (cols(8, 4), rows(1, 16), cols(1, 4)), (cols(4, 2),)),
           Values("scale", "<f2", (rows(1, 16),)))  # fmt: skip
AWQ = one("awq", (cols(), rows(8)), Codes("codes", 4, (), (rows(1, 2), rows(2, 4)), "<u4"))
MARLIN_FIELDS = (cols(1, 2), rows(8, 2), cols(8, 2))
MARLIN = one("marlin", (cols(16), rows(64), rows(1, 8), cols(2, 4), rows(16, 4)),
             Codes("codes", 4, (), MARLIN_FIELDS, "<u4"))  # fmt: skip
PLANES = one("planes_6", (Digit(BIT, 1, 6), rows(), cols(32)), Codes("codes", 1, (), (cols(1, 32, True),), "<u4"))
CRUMBS = Codes("codes", 2, (cols(128, 2), cols(1, 32)), (cols(32, 4),))
Q5_HIGH = Codes("codes", 1, (), (cols(1, 32),), "<u4", low=4)

# a layout, and one with the same parts to repack into
PAIRS = {
    "q8_0": (blocks("q8_0", 32, SCALE, Values("codes", "i1", (cols(1, 32),)), grid=RAW), None),
    "q4_0": (blocks("q4_0", 32, SCALE, NIBBLES, grid=RAW), TILE),
    "q5_0": (blocks("q5_0", 32, SCALE, Q5_HIGH, NIBBLES, grid=RAW), None),
    "tq2_0": (blocks("tq2_0", 256, CRUMBS, SCALE, grid=RAW), None),
    "scales": (one("scales", (cols(32), rows()), SCALE), one("scales_by_row", (rows(), cols(32)), SCALE)),
    "f32": (lay.DENSE["f32"], None),
    **{f"flat_{b}": (flat(b), gptq(b)) for b in (1, 2, 3, 4, 5, 6, 8)},
    **{f"gptq_{b}": (gptq(b), flat(b)) for b in (2, 3, 4, 8)},
    "awq": (AWQ, MARLIN),
    "marlin": (MARLIN, AWQ),
    "hqq": (one("hqq", (rows(1, lay.REST), cols()), Codes("codes", 4, (), (rows(lay.TOP, 2, True),))), flat(4)),
    "planes_6": (PLANES, flat(6)),
}  # fmt: skip


def random_parts(layout: Layout, shape: tuple[int, int]) -> dict[str, np.ndarray[Any, Any]]:
    rng, out = np.random.default_rng(0), {}
    for name, part in layout.fit(*shape).parts.items():
        dtype = dtype_of(part.dtype)
        raw = rng.integers(0, 256, prod(part.shape) * dtype.itemsize, np.uint8).view(dtype).reshape(part.shape)
        out[name] = raw & dtype.type((1 << part.bits) - 1) if part.bits < 8 * dtype.itemsize else raw
    return out


def jobs(layout: Layout, other: Layout | None, shape: tuple[int, int]) -> list[Callable[[], Any] | None]:
    parts = random_parts(layout, shape)
    stored = pack(layout, shape, parts)
    return [
        lambda: unpack(layout, shape, stored),
        lambda: pack(layout, shape, parts),
        (lambda: repack(layout, other, shape, stored)) if other else None,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=f"of {', '.join(PAIRS)}; all by default")
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    shape = (asked.side, asked.side)
    source, target = np.ones(shape, np.uint8), np.ones(shape, np.uint8)
    counts = sorted({1, threads.count()})
    columns = [f"{what} {n}" for n in counts for what in ("unpack", "pack", "repack")]
    print(f"{'layout':<10}" + "".join(f"{c:>10}" for c in (*columns, "copy")) + "   M weights/s")
    for name in asked.layouts or PAIRS:
        work = jobs(*PAIRS[name], shape)
        best = [float("inf")] * (len(work) * len(counts) + 1)
        for _ in range(asked.rounds):
            for i, n in enumerate(counts):
                os.environ["PACKFMT_THREADS"] = str(n)
                for j, job in enumerate(work):
                    if job:
                        at = i * len(work) + j
                        best[at] = min(best[at], seconds(job))
            best[-1] = min(best[-1], seconds(lambda: np.copyto(target, source)))
        print(f"{name:<10}" + "".join(f"{prod(shape) / s / 1e6:>10.0f}" for s in best), flush=True)
    return 0


def seconds(job: Callable[[], Any]) -> float:
    """The second of two runs: the first wakes the threads and spreads them over the cores."""
    job()
    start = time.perf_counter()
    result = job()
    spent = time.perf_counter() - start
    del result
    return spent


if __name__ == "__main__":
    raise SystemExit(main())
