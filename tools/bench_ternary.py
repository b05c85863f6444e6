"""Ternary weights encoded and decoded a second, beside gguf and NumPy: turn by turn, best of several.

    python tools/bench_ternary.py [FORMAT...]

The peer of tq1_0 and tq2_0 is gguf's quantize and dequantize, that of Sherry the NumPy way below; both
have one thread. `encode` checks the weights, too. Decoding writes to an array that is used again: one that
fits the cache, and a large one, beside np.copyto and a fill of float32 of the same size.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import house  # noqa: F401  (makes the tree's own packfmt importable)
from packfmt import codecs, fused
from packfmt.kernels import threads

Array = npt.NDArray[Any]
Works = dict[str, Callable[[], object]]

NAMES = ("tq1_0", "tq2_0", "sherry", "sherry_s16")
ENCODER = {"tq1_0": "ggml", "tq2_0": "ggml", "sherry": "mean", "sherry_s16": "mean"}
ENCODED = (1024, 4096)
DECODED = ((64, 4096), (256, 4096), (4096, 8192))  # 1 and 4 MB of float32 fit a cache, 128 MB does not
TURNS, AGAIN = 7, 3


# ---------------------------------------------------------------- Sherry in NumPy

QUAD = np.arange(64)[:, None]
LANE = np.arange(4)
COLUMNS = {"sherry": 4 * QUAD + LANE, "sherry_s16": QUAD // 16 * 64 + QUAD % 16 + 16 * LANE}
OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
VALUES = np.zeros((32, 4), np.float32)
for code in range(32):
    first = 1 - 2 * (code >> 4)
    VALUES[code, OTHERS[code >> 2 & 3]] = [first, first * (1 - 2 * (code & 1)), first * (1 - (code & 2))]


def numpy_encode(weight: Array, columns: Array) -> Array:
    """Zero the smallest of each quad, scale by the mean of the rest: nibbles, signs, float16."""
    quads = weight.reshape(-1, 256)[:, columns]
    size = np.abs(quads)
    zero = size.argmin(-1)
    scale = (size.sum((1, 2), dtype=np.float64) - size.min(-1).sum(1, dtype=np.float64)) / 192
    minus = np.take_along_axis(quads, OTHERS[zero], -1) < 0
    same = minus[..., 1:] ^ minus[..., :1]
    low = (zero << 2 | same[..., 1] << 1 | same[..., 0]).astype(np.uint8)
    signs = np.packbits(minus[..., 0], axis=1, bitorder="little")
    half = scale.astype("<f2")[:, None].view(np.uint8)
    return np.hstack([low[:, ::2] | low[:, 1::2] << 4, signs, half]).reshape(len(weight), -1)


def numpy_decode(stored: Array, columns: Array) -> Array:
    """The weights of such blocks, as float32."""
    blocks = stored.reshape(-1, 42)
    low = np.stack([blocks[:, :32] & 15, blocks[:, :32] >> 4], -1).reshape(-1, 64)
    codes = low | np.unpackbits(blocks[:, 32:40], axis=1, bitorder="little") << 4
    scale = np.ascontiguousarray(blocks[:, 40:]).view("<f2").astype(np.float32)
    out = np.empty((len(blocks), 256), np.float32)
    out[:, columns] = VALUES[codes] * scale[:, :, None]
    return out.reshape(len(stored), -1)


# ---------------------------------------------------------------- measuring


def best(works: Works) -> dict[str, float]:
    """Seconds, best of TURNS turns in which each work runs AGAIN times."""
    for work in works.values():
        work()  # compiles
    found = dict.fromkeys(works, float("inf"))
    for _ in range(TURNS):
        for what, work in works.items():
            for _ in range(AGAIN):
                start = time.perf_counter()
                work()
                found[what] = min(found[what], time.perf_counter() - start)
    return found


def encoding(name: str, weight: Array) -> Works:
    """Our encoder and its peer."""
    codec = codecs.get(name)
    peer: Callable[[], object] = (
        partial(numpy_encode, weight, COLUMNS[name])
        if name in COLUMNS
        else partial(gguf.quants.quantize, weight, gguf.GGMLQuantizationType[name.upper()])
    )
    return {"packfmt": lambda: codec.encode(weight, ENCODER[name]), "peer": peer}


def decoding(name: str, shape: tuple[int, int]) -> Works:
    """Our decoder, its peer, and what memory does."""
    layout = codecs.get(name).layout
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    stored = codecs.get(name).encode(weight, ENCODER[name]).components["blocks"]
    out = np.zeros(shape, np.float32)
    peer: Callable[[], object] = (
        partial(numpy_decode, stored, COLUMNS[name])
        if name in COLUMNS
        else partial(gguf.quants.dequantize, stored, gguf.GGMLQuantizationType[name.upper()])
    )
    ours = partial(fused.decode, layout, shape, {"blocks": stored}, out)
    return {"packfmt": ours, "peer": peer, "copyto": partial(np.copyto, out, weight), "fill": partial(out.fill, 1)}


def row(what: str, name: str, size: int, works: Works) -> str:
    speed = {key: size / 1e6 / seconds for key, seconds in best(works).items()}
    memory = " ".join(f"{speed[key]:8.0f}" if key in speed else " " * 8 for key in ("copyto", "fill"))
    ratio = speed["packfmt"] / speed["peer"]
    return f"{name:11} {what:18} {speed['packfmt']:8.0f} {speed['peer']:8.0f} {ratio:6.1f} {memory}"


def main() -> int:
    names = sys.argv[1:] or NAMES
    weight = (np.random.default_rng(0).standard_normal(ENCODED) * 0.02).astype(np.float32)
    print(f"million weights/s, best of {TURNS * AGAIN}; gguf {version('gguf')}, NumPy {np.__version__}")
    for count in sorted({1, threads.count()}):
        os.environ["PACKFMT_THREADS"] = str(count)
        print(f"\n{f'{count} threads':11} {'':18} {'packfmt':>8} {'peer':>8} {'ratio':>6} {'copyto':>8} {'fill':>8}")
        for name in names:
            print(row("encode", name, weight.size, encoding(name, weight)))
            for shape in DECODED:
                print(row(f"decode {shape[0]} x {shape[1]}", name, shape[0] * shape[1], decoding(name, shape)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
