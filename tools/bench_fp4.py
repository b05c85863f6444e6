"""FP4 weights encoded and decoded a second, beside gguf and compressed-tensors: turn by turn, best of several.

    python tools/bench_fp4.py [RULE...]

`kernel` chooses codes and scales, `encode` checks the weights and packs the bytes, too. Peers choose, round and pack
with one thread; what is not installed is left out and named. Decoding writes float32 to an array that
is used again (gguf: a new one, compressed-tensors: a new one of bfloat16), beside np.copyto and a fill of that size.
"""

from __future__ import annotations

import importlib
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
from packfmt.kernels import fp4, quantize, threads

Array = npt.NDArray[Any]
Works = dict[str, Callable[[], object]]

ENCODED = (2048, 4096)
DECODED = ((64, 4096), (4096, 8192))  # 1 MB of float32 fits a cache, 128 MB does not
TURNS = 7
LAYOUTS = {"mxfp4": ("mxfp4", "mxfp4_pairs"), "nvfp4": ("nvfp4", "nvfp4_modelopt", "nvfp4_ct")}


# ---------------------------------------------------------------- peers


class CompressedTensors:
    """compressed-tensors on torch with one thread."""

    def __init__(self, family: str) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(1)
        self.utils = importlib.import_module("compressed_tensors.quantization.utils")
        schemes = importlib.import_module("compressed_tensors.quantization")
        presets = importlib.import_module("compressed_tensors.quantization.quant_scheme")
        kind = importlib.import_module(f"compressed_tensors.compressors.{family}.base")
        self.compressor = getattr(kind, f"{family[:-1].upper()}4PackedCompressor")
        self.scheme = schemes.QuantizationScheme(targets=["Linear"], **getattr(presets, f"{family.upper()}A16"))
        self.shares = family == "nvfp4"

    def encode(self, weight: Array) -> Any:
        tensor = self.torch.from_numpy(weight)
        state = {"weight": tensor}
        if self.shares:
            state["weight_global_scale"] = self.utils.generate_gparam(tensor.min(), tensor.max())
        groups = tensor.reshape(len(weight), -1, self.scheme.weights.group_size)
        state["weight_scale"], _ = self.utils.calculate_qparams(
            groups.amin(-1), groups.amax(-1), self.scheme.weights, global_scale=state.get("weight_global_scale")
        )
        return self.compressor.compress(state, self.scheme)

    def decode(self, packed: Any) -> Any:
        return self.compressor.decompress(packed, self.scheme)["weight"]


def peer(family: str) -> CompressedTensors | None:
    try:
        return CompressedTensors(family)
    except ImportError as missing:
        print(f"no peer for {family}: {missing}")
        return None


# ---------------------------------------------------------------- measuring


def best(works: Works) -> dict[str, float]:
    """Seconds, best of TURNS interleaved turns."""
    for work in works.values():
        work()  # compiles
    found = dict.fromkeys(works, float("inf"))
    for _ in range(TURNS):
        for what, work in works.items():
            start = time.perf_counter()
            work()
            found[what] = min(found[what], time.perf_counter() - start)
    return found


def row(what: str, size: int, works: Works, ours: str, columns: tuple[str, ...]) -> str:
    speed = {key: size / 1e6 / seconds for key, seconds in best(works).items()}
    cells = " ".join(f"{speed[key]:8.0f}" if key in speed else " " * 8 for key in columns)
    others = [key for key in speed if key in ("gguf", "c-t")]
    return f"{what:34} {cells} " + " ".join(f"{speed[ours] / speed[key]:7.1f} x {key}" for key in others)


def encoding(family: str, rule: str, weight: Array, theirs: CompressedTensors | None) -> Works:
    door = quantize.mxfp4 if (family, rule) == ("mxfp4", "ggml") else partial(getattr(fp4, family), rule=rule)
    works: Works = {"kernel": lambda: door(weight)}
    for name in LAYOUTS[family]:
        if codecs.known(name) and rule in codecs.get(name).encoders:
            works["encode"] = partial(codecs.get(name).encode, weight, rule)
            break
    if (family, rule) == ("mxfp4", "ggml"):
        works["gguf"] = partial(gguf.quants.quantize, weight, gguf.GGMLQuantizationType.MXFP4)
    if theirs and rule in ("best", "compressed-tensors"):
        works["c-t"] = partial(theirs.encode, weight)
    return works


def decoding(family: str, name: str, shape: tuple[int, int], theirs: CompressedTensors | None) -> Works:
    codec = codecs.get(name)
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    packed = codec.encode(weight)
    out = np.zeros(shape, np.float32)
    works: Works = {
        "packfmt": partial(fused.decode, codec.layout, shape, packed.components, out),
        "copyto": partial(np.copyto, out, weight),
        "fill": partial(out.fill, 1),
    }
    if name in ("mxfp4", "nvfp4"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        works["gguf"] = partial(gguf.quants.dequantize, packed.components["blocks"], kind)
    elif theirs:
        works["c-t"] = partial(theirs.decode, theirs.encode(weight))
    return works


def main() -> int:
    weight = (np.random.default_rng(0).standard_normal(ENCODED) * 0.02).astype(np.float32)
    peers = {family: peer(family) for family in LAYOUTS}
    installed = [f"gguf {version('gguf')}", f"NumPy {np.__version__}"]
    if any(peers.values()):
        installed += [f"{name} {version(name)}" for name in ("compressed-tensors", "torch")]
    print(f"million weights/s, best of {TURNS}; {', '.join(installed)}")
    for count in sorted({1, threads.count()}):
        os.environ["PACKFMT_THREADS"] = str(count)
        columns: tuple[str, ...] = ("kernel", "encode", "gguf", "c-t")
        print(f"\n{f'encode, {count} threads':34} " + " ".join(f"{c:>8}" for c in columns))
        for family, rules in (("mxfp4", (*fp4.MX_RULES, "ggml")), ("nvfp4", tuple(fp4.NV_RULES))):
            for rule in (r for r in rules if not sys.argv[1:] or r in sys.argv[1:]):
                works = encoding(family, rule, weight, peers[family])
                print(row(f"{family} {rule}", weight.size, works, "kernel", columns))
        columns = ("packfmt", "gguf", "c-t", "copyto", "fill")
        print(f"\n{f'decode, {count} threads':34} " + " ".join(f"{c:>8}" for c in columns))
        for family, names in LAYOUTS.items():
            for name in (n for n in names if codecs.known(n)):
                for shape in DECODED:
                    works = decoding(family, name, shape, peers[family])
                    print(row(f"{name} {shape[0]} x {shape[1]}", shape[0] * shape[1], works, "packfmt", columns))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
