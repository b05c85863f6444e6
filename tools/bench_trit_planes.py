"""Planes of trits: weights fitted a second, and the error they leave, on normal weights and on MiniLM's.

    python tools/bench_trit_planes.py [ROWS]

Speed: ROWS x 4096 normal float32 (2048 rows unless stated), best of several turns, taken in turn; three and four
planes fit an eighth of them. Error: root mean square of what is left over that of the weights, group 128.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

import house  # noqa: F401  (makes the tree's own packfmt importable)
from packfmt import demo
from packfmt.kernels import threads, trit_planes

COLS, GROUP, TURNS = 4096, 128, 5
CHUNK = 1 << 10  # rows decoded at a time

Floats = npt.NDArray[np.float32]
Fit = Callable[[Floats], tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]]

FITS: dict[str, Fit] = {
    "1": partial(trit_planes.fit, planes=1),
    "paper": trit_planes.fit_paper,
    "2": partial(trit_planes.fit, planes=2),
    "3": partial(trit_planes.fit, planes=3),
    "4": partial(trit_planes.fit, planes=4),
    "2 tied": partial(trit_planes.fit, planes=2, tied=True),
    "3 tied": partial(trit_planes.fit, planes=3, tied=True),
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speeds(weight: Floats) -> dict[str, float]:
    """Million weights a second of every fit."""
    parts = {name: weight if name in ("1", "paper", "2") else weight[: len(weight) // 8] for name in FITS}
    for fit in FITS.values():
        fit(weight[:1])  # compiles
    turns = [{name: seconds(partial(fit, parts[name])) for name, fit in FITS.items()} for _ in range(TURNS)]
    return {name: part.size / 1e6 / min(turn[name] for turn in turns) for name, part in parts.items()}


def decode(trits: npt.NDArray[np.int8], scale: npt.NDArray[np.float16]) -> Floats:
    """As the format has it: float32 products, summed in plane order."""
    rows, planes, cols = trits.shape
    total = np.zeros((rows, cols), np.float32)
    for p in range(planes):
        own = scale[:, p] if scale.shape[1] == planes else scale[:, 0] * np.float32(3 ** (planes - 1 - p))
        total += trits[:, p] * np.repeat(own.astype(np.float32), GROUP, axis=1)
    return total


def energies(weight: Floats) -> npt.NDArray[np.float64]:
    """Sum of squares of the weights, then of what each fit leaves."""
    sums = np.zeros(1 + len(FITS))
    for start in range(0, len(weight), CHUNK):
        part = weight[start : start + CHUNK]
        left = [part, *(part - decode(*fit(part)) for fit in FITS.values())]
        sums += [np.square(x, dtype=np.float64).sum() for x in left]
    return sums


def matrices() -> Iterator[tuple[str, Floats]]:
    """Every matrix of the demo's model whose rows are whole groups."""
    with safe_open(demo.find_model() / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (no dictionary)
            weight = tensors.get_tensor(name)
            if weight.ndim == 2 and weight.shape[1] % GROUP == 0 and weight.dtype.kind == "f":
                yield name, weight.astype(np.float32)


def line(label: str, sums: npt.NDArray[np.float64]) -> str:
    return f"{label:46}" + " ".join(f"{x:8.4f}" for x in np.sqrt(sums[1:] / sums[0]))


def main() -> int:
    rows = int(sys.argv[1]) if sys.argv[1:] else 2048
    weight = (np.random.default_rng(0).standard_normal((rows, COLS)) * 0.02).astype(np.float32)
    print(f"million weights/s, {rows} x {COLS} float32, group {GROUP}, best of {TURNS}")
    print(f"{'threads':46}" + " ".join(f"{name:>8}" for name in FITS))
    for count in sorted({1, threads.count()}):
        os.environ["PACKFMT_THREADS"] = str(count)
        print(f"{count:<46}" + " ".join(f"{speed:8.1f}" for speed in speeds(weight).values()))

    print("\nrelative RMS error")
    print(f"{'planes':46}" + " ".join(f"{name:>8}" for name in FITS))
    print(line("normal", energies(weight[: CHUNK // 4])))
    classes: dict[str, npt.NDArray[np.float64]] = {}
    ratios: list[tuple[float, float, str]] = []
    order = list(FITS)
    for name, matrix in matrices():
        sums = energies(matrix)
        one, two, paper = (np.sqrt(sums[1 + order.index(n)]) for n in ("1", "2", "paper"))
        ratios.append((two / one, paper / one, name))
        kind = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
        classes[kind] = classes.get(kind, 0.0) + sums
    for kind, sums in classes.items():
        print(line(kind, sums))
    print(f"\ntwo planes' error over one plane's, worst of {len(ratios)} matrices")
    print("best  {0:.3f} {2}".format(*max(ratios)))
    print("paper {1:.3f} {2}".format(*max(ratios, key=lambda r: r[1])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
