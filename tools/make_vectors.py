"""Write spec/vectors: weights drawn here, bytes and numbers made by other tools. Run by hand.

    python tools/make_vectors.py [FORMAT...]

The tools are gguf's own quantizers, transformers' packing of BitNet, and, for formats that no package of
PyPI writes, tools/ternary_twin.py. A vector is for life: a file that exists with other bytes is an error,
and is left as it is.

    weights.f32   (rows, cols) float32, little-endian; not where the choice of codes is no part of the vector
    packed.bin    them as the tool encodes them
    decoded.f32   packed.bin as it decodes them
    random.bin    blocks that no encoder chose: every code and exponent, finite scales
    random.f32    the same, decoded

A format of several components has a file for each of them, as in packed.codes.bin and packed.scale.bin.
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
from ternary_twin import TWINS, Twin, numbers, ptq161, ptq161_numbers
from ternary_twin import VERSION as TWIN

VECTORS = house.SPEC / "vectors"
MANIFEST = VECTORS / "manifest.json"
SEED = 20
COLS = 512
F32 = np.float32

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Made = dict[str, tuple[Any, dict[str, Any]]]  # file name -> array, manifest entry

RANDOM_BLOCKS = {
    "q8_0": 1024,
    "q4_0": 1024,
    "mxfp4": 512,
    "tq2_0": 128,
    "f16": 32768,
    "bf16": 32768,
    "f32": 1024,
    "tq1_0": 128,
}
SCALE_AT = {"q8_0": 0, "q4_0": 0, "tq1_0": 52, "tq2_0": 64}  # where in a block its float16 scale begins


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


def made_by_gguf(name: str) -> Made:
    """Vectors of a format of ggml's that gguf reads and writes."""
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


def made_by_transformers(name: str) -> Made:
    """Vectors of bitnet and bitnet_divide. Of 10 rows two are missing in the last quarter."""
    import torch
    from transformers.integrations import bitnet

    rng = np.random.default_rng(SEED)
    steps = torch.from_numpy(rng.integers(-1, 2, (10, 48)).astype(np.int8))
    raw = torch.from_numpy(rng.integers(0, 256, (2, 48), dtype=np.uint8))
    divide = name == "bitnet_divide"
    by = {"tool": "transformers", "version": version("transformers"), "source": "PyPI", "torch": version("torch")}
    drawn = {"tool": "numpy", "version": np.__version__, "call": "made_by_transformers() of tools/make_vectors.py"}
    pack = {**by, "call": "integrations.bitnet.pack_weights(steps)", "what": "steps of -1, 0, 1 packed"}
    read = f"integrations.bitnet.unpack_weights(weight, torch.float32) {'/' if divide else '*'} weight_scale.float()"
    out: Made = {}

    def add(kind: str, decoded: str, number: float, rows: int, packed: Any, how: dict[str, Any]) -> None:
        scale = torch.tensor([number], dtype=torch.bfloat16)
        with torch._dynamo.config.patch(disable=True):
            found = bitnet.unpack_weights(packed, torch.float32)[:rows]
        weight = found / scale.float() if divide else found * scale.float()
        out[f"{kind}.weight.bin"] = (packed.numpy(), how)
        stored = scale.view(torch.int16).numpy()
        how = {**by, "call": f"torch.tensor([{number}], dtype=torch.bfloat16)", "what": "the bits of a bfloat16"}
        out[f"{kind}.weight_scale.bin"] = (stored, how)
        out[f"{decoded}.f32"] = (weight.numpy(), {**by, "call": read, "what": f"{kind} decoded"})

    add("packed", "decoded", 26.75 if divide else 0.0373, 10, bitnet.pack_weights(steps), pack)
    add("random", "random", -0.7109375, 8, raw, {**drawn, "seed": SEED, "what": "any bytes"})
    return out


def few_weights(rng: np.random.Generator) -> Floats:
    """(4, 512) float32, bfloat16-valued: sums of their magnitudes are exact in float64, in any order."""
    weight = np.zeros((4, COLS), F32)
    weight[0] = rng.standard_normal(COLS) * 0.02
    weight[1] = rng.standard_t(2, COLS).clip(-1000, 1000)
    weight[2] = rng.integers(-1, 2, COLS) * 0.03125
    weight[3, 1 : COLS // 2 : 2] = -0.0
    weight[3, COLS // 2 :] = rng.integers(-8, 9, COLS // 2) / 2
    return narrow(weight)


def finite(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Scales of all kinds that are numbers."""
    bits = rng.integers(0, 1 << 16, shape)
    halves: npt.NDArray[Any] = np.where(bits & 0x7C00 == 0x7C00, bits & ~0x4000, bits).astype("<u2").view("<f2")
    return halves if dtype == "<f2" else halves.astype("<f4") * np.float32(1.0009765625)


def made_by_twin(name: str, twin: Twin) -> Made:
    """Vectors of a format that tools/ternary_twin.py writes."""
    rng = np.random.default_rng(SEED)
    by = {"tool": "ternary_twin", "version": TWIN, "source": "tools/ternary_twin.py", "numpy": np.__version__}
    drawn = {"tool": "numpy", "version": np.__version__, "seed": SEED}
    out: Made = {}

    def add(kind: str, decoded: str, codes: Any, scale: Any, what: str, **how: Any) -> None:
        stored = twin.write(codes, scale)
        for component, array in stored.items():
            file = f"{kind}.bin" if len(stored) == 1 else f"{kind}.{component}.bin"
            out[file] = (array, {**by, "call": f"TWINS[{name!r}].write(codes, scale)", "what": what, **how})
        call = f"numbers(TWINS[{name!r}], codes, scale)"
        out[f"{decoded}.f32"] = (numbers(twin, codes, scale), {**by, "call": call, "what": f"{kind} decoded"})

    rows, cols = max(2, twin.least[0]), twin.least[1]
    if twin.encode:
        weight = few_weights(rng)
        call = "few_weights() of tools/make_vectors.py"
        out["weights.f32"] = (weight, {**drawn, "call": call, "what": "weights to encode"})
        add("packed", "decoded", *twin.encode(weight), what="weights.f32 encoded", encoder=twin.encoder)
    else:
        steps = rng.integers(-1, 2, (rows, twin.planes, cols))
        scale = finite(twin.scales(rows, cols), twin.dtype, rng)
        add("packed", "decoded", twin.spell(steps), scale, "drawn steps and scales")
    shape, values = twin.codes(rows, cols)
    add(
        "random",
        "random",
        rng.integers(0, values, shape),
        finite(twin.scales(rows, cols), twin.dtype, rng),
        "any codes",
    )
    return out


def made_of_parts() -> Made:
    """Vectors of ptq161, from drawn parts: two rows short of a cell, two chunks."""
    rng = np.random.default_rng(SEED)
    rows, cols = 6, 128
    mask = np.zeros(cols, np.uint8)
    mask[rng.permutation(cols)[: cols // 64 * 13]] = 1
    parts: dict[str, npt.NDArray[Any]] = {
        "mask": mask,
        "codes": rng.integers(0, 16, (rows, cols // 64 * 13)),
        "signs": rng.integers(0, 2, (rows, cols // 64 * 51)),
        "factor": finite((cols // 64 * 51,), "<f2", rng),
        "salient_zero": rng.integers(0, 16, rows).astype(np.uint8),
        **{name: finite((rows,), "<f2", rng) for name in ("scale", "mean", "salient_scale")},
    }
    by = {"tool": "ternary_twin", "version": TWIN, "source": "tools/ternary_twin.py", "numpy": np.__version__}
    out: Made = {
        f"packed.{name}.bin": (array, {**by, "call": "ptq161(parts)", "what": "drawn parts"})
        for name, array in ptq161(parts).items()
    }
    out["decoded.f32"] = (ptq161_numbers(parts), {**by, "call": "ptq161_numbers(parts)", "what": "packed decoded"})
    return out


def make(name: str) -> Made:
    """All vectors of a format."""
    if name in RANDOM_BLOCKS:
        return made_by_gguf(name)
    if name == "ptq161":
        return made_of_parts()
    return made_by_twin(name, TWINS[name]) if name in TWINS else made_by_transformers(name)


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
    every = (*RANDOM_BLOCKS, "bitnet", "bitnet_divide", "ptq161", *TWINS)
    findings = [line for name in sys.argv[1:] or every for line in write(name, make(name), manifest)]
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    MANIFEST.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return house.tell(findings, f"{len(manifest)} vectors are there")


if __name__ == "__main__":
    raise SystemExit(main())
