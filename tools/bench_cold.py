"""How long a layout's first product takes in a fresh process, with no compiled kernels kept and with all of them.

    python tools/bench_cold.py [--shape 1024x4096] [--rounds 5] [--processor] [LAYOUT ...]

Milliseconds; `packfmt` is to import it and read a packed weight, `numba` to import that library, which the first
kernel needs. Then come `packfmt.prepare` and one product, with an empty cache and with one that was filled before.
Every figure is the least of its rounds, of which an empty cache gets one.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import house
import packfmt

LAYOUTS = ("sherry", "tq2_0", "mxfp4", "nvfp4", "q4_0", "q8_0")
FIRST = """
import sys, time
clock = getattr(time, sys.argv[2])
times = [clock()]
import pickle
import packfmt
with open(sys.argv[1], "rb") as file:
    packed, x = pickle.load(file)
times.append(clock())
import numba
times.append(clock())
packfmt.prepare(packed).matmul(x)
times.append(clock())
print(*(1000 * (b - a) for a, b in zip(times, times[1:])))
"""


def first(weight: Path, kept: str, clock: str) -> list[float]:
    """Milliseconds of each part of a fresh process, by one of Python's clocks."""
    environment = os.environ | {"NUMBA_CACHE_DIR": kept, "PYTHONPATH": str(house.ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else every module is compiled anew, too
    command = [sys.executable, "-c", FIRST, str(weight), clock]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return [float(number) for number in found.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=f"{', '.join(LAYOUTS)} by default")
    parser.add_argument("--shape", default="1024x4096", help="rows x columns of the weight")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor", action="store_true", help="processor time: for machines that are busy")
    asked = parser.parse_args()
    clock = "process_time" if asked.processor else "perf_counter"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(tuple(map(int, asked.shape.split("x"))), np.float32)
    x = rng.standard_normal((1, weight.shape[1]), np.float32)
    print(f"{'layout':<10}{'packfmt':>10}{'numba':>10}{'empty':>10}{'filled':>10}   ms")
    for i, layout in enumerate(asked.layouts or LAYOUTS):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "packed"
            path.write_bytes(pickle.dumps((packfmt.pack(weight, layout), x)))
            if not i:
                first(path, f"{folder}/before", clock)  # brings libraries into memory, and Python compiles its modules
            empty = first(path, f"{folder}/kept", clock)[-1]
            rounds = [first(path, f"{folder}/kept", clock) for _ in range(asked.rounds)]
            *imports, filled = map(min, zip(*rounds, strict=True))
        print(f"{layout:<10}" + "".join(f"{ms:>10.0f}" for ms in (*imports, empty, filled)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
