"""Weights encoded a second, beside gguf's own quantizers: the same weights, turn by turn, best of several.

    python tools/bench_encode.py [FORMAT...]

`kernel` chooses codes and scales; `encode` checks the weights and packs the bytes, too. gguf has one thread.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import gguf
import numpy as np

import house  # noqa: F401  (makes the tree's own packfmt importable)
from packfmt import codecs
from packfmt.kernels import threads

NAMES = ("q8_0", "q4_0", "mxfp4", "tq2_0", "f16", "bf16")
ROWS, COLS, TURNS = 2048, 4096, 5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, weight: np.ndarray) -> dict[str, float]:
    """Best of TURNS interleaved turns, in million weights a second."""
    codec = codecs.get(name)
    kind = gguf.GGMLQuantizationType[name.upper()]
    encoder = "ggml" if "ggml" in codec.encoders else next(iter(codec.encoders))  # the one that gives gguf's bytes
    quantize = codec.encoders[encoder]
    works: dict[str, Callable[[], object]] = {
        "kernel": lambda: quantize(weight),
        "encode": lambda: codec.encode(weight, encoder),
        "gguf": lambda: gguf.quants.quantize(weight, kind),
    }
    quantize(weight[:1])  # compiles
    codec.encode(weight[:1], encoder)
    turns = [{what: seconds(work) for what, work in works.items()} for _ in range(TURNS)]
    return {what: weight.size / 1e6 / min(t[what] for t in turns) for what in works}


def main() -> int:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((ROWS, COLS)) * 0.02).astype(np.float32)
    print(
        f"million weights/s, {ROWS} x {COLS} float32, best of {TURNS}; gguf {version('gguf')}, NumPy {np.__version__}"
    )
    print(f"{'threads':>7} {'format':8} {'kernel':>8} {'encode':>8} {'gguf':>8} {'encode/gguf':>12}")
    for count in sorted({1, threads.count()}):
        os.environ["PACKFMT_THREADS"] = str(count)
        for name in sys.argv[1:] or NAMES:
            speed = measure(name, weight)
            ratio = speed["encode"] / speed["gguf"]
            print(f"{count:7} {name:8} " + " ".join(f"{v:8.0f}" for v in speed.values()) + f" {ratio:12.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
