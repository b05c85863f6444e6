"""Weights decoded a second, beside NumPy's copy and other people's decoders: turn by turn, best of several, one thread.

    python tools/bench_decode.py [FORMAT...]

`again` writes to an array that is used again, `new` to one that the system must find pages for; beside them `copy`,
np.copyto of float32 to an array that is used again, and `new copy`, its copy(). One size fits the cache, the other not.
The peer is gguf's dequantize, compressed-tensors' decompress, or torch's product of converted codes and scales; those
of torch appear if it is installed. Random weights, packed by each format's own encoder.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import house  # noqa: F401  (makes the tree's own packfmt importable)
from packfmt import codecs, fused
from packfmt.codec import PackedTensor
from packfmt.kernels import hadamard

Array = npt.NDArray[Any]
Peer = Callable[[], Any]  # gives the weights, as something that NumPy can read

NAMES = (
    *("mxfp4", "mxfp4_pairs", "mxfp4_e8m0", "nvfp4", "nvfp4_ct", "nvfp4_modelopt", "mxfp6_e2m3", "mxfp8_e4m3"),
    *("mxint8", "fp8_row", "fp8_block", "e3m1_g32", "ct_int4_g128", "nvfp4_ct_h64", "q4_0", "q8_0", "tq2_0"),
)
SHAPES = ((64, 4096), (4096, 8192))  # 1 MB of float32 and 128 MB
TURNS = 7


def gguf_peer(packed: PackedTensor) -> Peer | None:
    name = dict(packed.layout.also).get("gguf", "")
    if "blocks" not in packed.components or not hasattr(gguf.GGMLQuantizationType, name):
        return None
    kind = gguf.GGMLQuantizationType[name]
    blocks, rest = packed.components["blocks"], [v for k, v in packed.components.items() if k != "blocks"]
    return lambda: gguf.quants.dequantize(blocks, kind) * (rest[0] if rest else np.float32(1))


def torch_tensor(array: Array) -> Any:
    """An array as torch has it; float8 keeps its bytes and its type."""
    torch = import_module("torch")
    if array.dtype.name.startswith("float8"):
        return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


def fp4_peer(packed: PackedTensor) -> Peer:
    state = {name: torch_tensor(array) for name, array in packed.components.items()}
    kind = "nvfp4" if "weight_global_scale" in state else "mxfp4"
    compressors = import_module(f"compressed_tensors.compressors.{kind}.base")
    compressor = getattr(compressors, f"{kind.upper()}PackedCompressor")
    quantization = import_module("compressed_tensors.quantization")
    preset = getattr(import_module("compressed_tensors.quantization.quant_scheme"), f"{kind.upper()}A16")
    scheme = quantization.QuantizationScheme(targets=["Linear"], **preset)
    return lambda: compressor.decompress(state, scheme)["weight"].float()


def torch_peer(packed: PackedTensor) -> Peer:
    """Codes converted to float32 times scales: what a loader of float8 does."""
    torch = import_module("torch")
    rows, cols = packed.matrix
    weight, scale = (torch_tensor(packed.components[name]) for name in ("weight", "weight_scale"))
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float().reshape(rows, -1, 1)
    return lambda: (weight.float().reshape(rows, scale.shape[1], -1) * scale).reshape(rows, cols)


def peer_of(packed: PackedTensor) -> tuple[str, Peer | None]:
    name = packed.layout.name
    if peer := gguf_peer(packed):
        return "gguf", peer
    if name in ("mxfp4_pairs", "nvfp4_ct") and find_spec("compressed_tensors"):
        return "compressed-tensors", fp4_peer(packed)
    if name in ("mxfp8_e4m3", "fp8_row") and find_spec("torch"):
        return "torch", torch_peer(packed)
    return "", None


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, shape: tuple[int, int]) -> tuple[dict[str, float], str]:
    """Best of TURNS interleaved turns, in million weights a second, and the peer's name."""
    weight = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    packed = codecs.get(name).encode(weight)
    out = np.ones(shape, np.float32)
    who, peer = peer_of(packed)
    works: dict[str, Callable[[], object]] = {
        "again": lambda: fused.decode(packed.layout, shape, packed.components, out),
        "new": lambda: fused.decode(packed.layout, shape, packed.components),
        "copy": lambda: np.copyto(out, weight),
        "new copy": weight.copy,
    }
    if peer is not None:
        if not np.array_equal(np.asarray(peer()).reshape(shape), packed.decode()):
            who += ", other numbers"
        works["peer"] = peer
    for work in works.values():
        work()
    turns = [{what: seconds(work) for what, work in works.items()} for _ in range(TURNS)]
    return {what: weight.size / 1e6 / min(t[what] for t in turns) for what in works}, who


def transforms() -> None:
    print(f"\n{'in place':14} {'shape':>12} {'M weights/s':>12} {'/copy':>6}")
    for shape in SHAPES:
        matrix, other = np.ones(shape, np.float32), np.ones(shape, np.float32)
        for size in (16, 64, 256):

            def work(matrix: Array = matrix, size: int = size) -> None:
                hadamard.transform(matrix, size)

            work()
            turns = [(seconds(work), seconds(lambda m=matrix, o=other: np.copyto(o, m))) for _ in range(TURNS)]  # type: ignore[misc]
            best, copy = (matrix.size / 1e6 / min(t) for t in zip(*turns, strict=True))
            print(f"hadamard {size:<5} {shape[0]:>6} x {shape[1]:<5}{best:10.0f} {best / copy:6.2f}")


def main() -> int:
    os.environ["PACKFMT_THREADS"] = "1"
    if find_spec("torch"):
        import_module("torch").set_num_threads(1)
    columns = ("again", "new", "copy", "new copy", "peer")
    print(f"million weights/s to float32, one thread, best of {TURNS}; NumPy {np.__version__}")
    print(
        f"{'format':14} {'shape':>12} " + " ".join(f"{c:>8}" for c in columns) + "  again/copy new/new copy again/peer"
    )
    for shape in SHAPES:
        for name in sys.argv[1:] or NAMES:
            speed, who = measure(name, shape)
            ratios = speed["again"] / speed["copy"], speed["new"] / speed["new copy"]
            line = f"{name:14} {shape[0]:>6} x {shape[1]:<5}" + " ".join(f"{speed.get(c, 0):8.0f}" for c in columns)
            line += f" {ratios[0]:11.2f} {ratios[1]:12.2f}"
            print(line + (f" {speed['again'] / speed['peer']:10.1f}  {who}" if "peer" in speed else ""), flush=True)
    transforms()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
