"""Write spec/vectors: weights drawn here, bytes and numbers made by gguf's own quantizers. Run by hand.

    python tools/make_vectors.py [FORMAT...]

A vector is for life: a file that exists with other bytes is an error, and is left as it is.

    weights.f32   (rows, cols) float32, little-endian
    packed.bin    gguf.quants.quantize of them
    decoded.f32   gguf.quants.dequantize of packed.bin
    random.bin    blocks that no encoder chose: every code and exponent, finite scales
    random.f32    gguf.quants.dequantize of random.bin
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import house

VECTORS = house.SPEC / "vectors"
MANIFEST = VECTORS / "manifest.json"
SEED = 20
COLS = 512
F32 = np.float32

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Made = dict[str, tuple[Any, dict[str, Any]]]  # file name -> array, manifest entry

RANDOM_BLOCKS = {"q8_0": 1024, "q4_0": 1024, "mxfp4": 512, "tq2_0": 128, "f16": 32768, "bf16": 32768, "f32": 1024}
SCALE_AT = {"q8_0": 0, "q4_0": 0, "tq2_0": 64}  # where in a block its float16 scale begins


def narrow(weight: Floats) -> Floats:
    """The nearest bfloat16 toward zero, as float32: such weights meet rounding ties."""
    return (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)


def weights(rng: np.random.Generator) -> Floats:
    """(60, 512) float32: what models have, and what encoders stumble over."""
    normal = rng.standard_normal((20, COLS)).astype(F32)
    spread = normal * np.exp2(rng.integers(-20, 14, (20, 1))).astype(F32)
    heavy = rng.standard_t(2, (8, COLS)).clip(-1000, 1000).astype(F32)
    ternary = rng.integers(-1, 2, (4, COLS)).astype(F32) * F32(0.03125)
    ties = rng.integers(-24, 25, (8, COLS)).astype(F32) / F32(2)
    edges = np.zeros((12, COLS), F32)
    edges[1] = -0.0
    edges[2, ::2] = -0.0
    edges[3, ::33] = -1.5  # a lone negative peak, at another place of each block
    edges[4, ::33] = 1.5
    edges[5] = rng.integers(-9, 10, COLS) * F32(2.0**-27)  # scales around float16's smallest
    edges[6] = rng.integers(-9, 10, COLS) * F32(2.0**-17)  # subnormal float16 scales
    edges[7] = np.tile([-1, 1], COLS // 2)  # equal magnitudes: which peak is first
    edges[8] = np.tile([1, -1], COLS // 2)
    edges[9] = normal[0] * F32(60000 / 8)
    below = np.exp2(np.arange(-8, 8, dtype=F32)).view(np.uint32) - np.uint32(1)  # just below powers of two
    edges[10] = normal[1].clip(-0.9, 0.9) * below.view(F32).repeat(32)
    edges[10, ::32] = below.view(F32)
    edges[11] = np.resize(
        np.array([0.25, -0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5, 6], F32), COLS
    )  # halfway in float4_e2m1fn
    return np.concatenate([spread, narrow(spread[:8]), heavy, ternary, ties, edges]).astype(F32)


def random_blocks(name: str, rng: np.random.Generator) -> Bytes:
    """(1, bytes): blocks of any bytes, but finite floats, so that no number depends on a NaN's bits."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    count, size = RANDOM_BLOCKS[name], gguf.GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    if name == "mxfp4":
        raw[:, 0] = np.arange(count) % 256
    elif name in SCALE_AT:
        scale = raw[:, SCALE_AT[name] :][:, :2]
        scale[:, 1] &= ~np.where(scale[:, 1] & 0x7C == 0x7C, 0x40, 0).astype(np.uint8)
    else:  # clear an exponent bit where all are set
        top = {"f16": 0x7C, "bf16": 0x7F, "f32": 0x7F}[name]
        raw[:, -1] &= ~np.where(raw[:, -1] & top == top, 0x40, 0).astype(np.uint8)
    return raw.reshape(1, -1)


def make(name: str) -> Made:
    """All vectors of a format."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    rng = np.random.default_rng(SEED)
    weight = weights(rng)
    by = {"tool": "gguf", "version": version("gguf"), "source": "PyPI"}
    drawn = {"tool": "numpy", "version": np.__version__, "call": "weights() of tools/make_vectors.py", "seed": SEED}
    pack = {**by, "call": f"gguf.quants.quantize(weights, GGMLQuantizationType.{kind.name})"}
    read = f"gguf.quants.dequantize(%s, GGMLQuantizationType.{kind.name})"
    with np.errstate(over="ignore"):
        packed = gguf.quants.quantize(weight, kind).view(np.uint8)
        blocks = random_blocks(name, rng)
        return {
            "weights.f32": (weight, {**drawn, "what": "weights to encode"}),
            "packed.bin": (packed, {**pack, "what": "weights.f32 encoded"}),
            "decoded.f32": (
                gguf.quants.dequantize(packed, kind),
                {**by, "call": read % "packed", "what": "packed.bin decoded"},
            ),
            "random.bin": (blocks, {**drawn, "call": "random_blocks() of tools/make_vectors.py", "what": "any blocks"}),
            "random.f32": (
                gguf.quants.dequantize(blocks, kind),
                {**by, "call": read % "random", "what": "random.bin decoded"},
            ),
        }


def write(name: str, made: Made, manifest: dict[str, Any]) -> list[str]:
    """Add the files and their entries; what stands there with other bytes is told, not touched."""
    findings = []
    for file, (array, entry) in made.items():
        path, data = VECTORS / name / file, np.ascontiguousarray(array).tobytes()
        if path.exists():
            if path.read_bytes() != data:
                findings.append(f"{house.place(path)}: exists with other bytes, and a vector is for life")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        manifest[f"{name}/{file}"] = {"sha256": digest, **entry, "dtype": array.dtype.str, "shape": list(array.shape)}
    return findings


def main() -> int:
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    findings = [line for name in sys.argv[1:] or RANDOM_BLOCKS for line in write(name, make(name), manifest)]
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    MANIFEST.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return house.tell(findings, f"{len(manifest)} vectors are there")


if __name__ == "__main__":
    raise SystemExit(main())
