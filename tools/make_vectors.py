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
from importlib import import_module
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

import fp4_twin
import house
import outlier_twin
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


def least_rows(name: str, usual: int) -> int:
    """More than one tile has, of a tiling."""
    return {"tile16": 19, "words32": 35, "nibbles32": 35}.get(name.rpartition("_")[2], usual)


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

    rows, cols = max(least_rows(name, 2), twin.least[0]), twin.least[1]
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


# ---------------------------------------------------------------- scaled floats

NAMED_SHAPES = {
    **{name: (130, 136) for name in ("fp8_block", "fp8_block_bf16", "fp8_block_e8m0")},
    **{"nvfp4_rows": (32, 24), "nvfp4_swizzled": (128, 128), "arcquant_64": (6, 128)},
    "ct_int8_row_tile16": (19, 70),
}


def few_scaled_weights(rng: np.random.Generator) -> Floats:
    """(20, 256) float32: bfloat16-valued, and what encoders of small floats stumble over."""
    cols = 256
    normal = narrow((rng.standard_normal((4, cols)) * 0.02).astype(F32))
    heavy = narrow((rng.standard_t(3, (4, cols)) * 0.012).astype(F32))
    spread = narrow(normal * np.exp2(rng.integers(-6, 7, (4, 1))).astype(F32))
    ties = rng.integers(-24, 25, (2, cols)).astype(F32) / F32(64)
    edges = np.zeros((6, cols), F32)
    edges[1, ::2] = -0.0
    edges[2] = np.resize(np.array([0.25, -0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5, 6], F32), cols) / F32(16)
    edges[3, ::33] = -0.09375  # a lone negative peak, at another place of each block
    peaks = np.array([1, 1.25, 1.5, 1.53125, 1.734375, 1.75, 1.875, 1.9921875], F32)  # where rules of scales differ
    edges[4] = narrow(normal[0].clip(-0.015, 0.015))
    edges[4, ::32] = peaks / F32(64)
    edges[5] = normal[1] * F32(2.0**-20)
    return np.concatenate([normal, heavy, spread, ties, edges])


def drawn_parts(name: str) -> tuple[fp4_twin.Twin, fp4_twin.Parts]:
    """Any codes and finite scales of a format."""
    one = fp4_twin.TWINS[name]
    cols = one.least[1] * max(1, 128 // one.least[1])
    rows, cols = NAMED_SHAPES.get(name, (max(least_rows(name, 6), one.least[0]), cols))
    return one, one.draw(rows, cols, np.random.default_rng(SEED))


def components(out: Made, kind: str, stored: dict[str, Any], how: dict[str, Any]) -> None:
    """Add a file for each component, or one if there is only one."""
    for component, array in stored.items():
        out[f"{kind}.bin" if len(stored) == 1 else f"{kind}.{component}.bin"] = (array, how)


def by_scaled_twin(call: str, what: str) -> dict[str, Any]:
    by = {"tool": "fp4_twin", "version": fp4_twin.VERSION, "source": "tools/fp4_twin.py", "numpy": np.__version__}
    return {**by, "call": call, "what": what, "seed": SEED}


def made_by_scaled_twin(name: str) -> Made:
    """Any codes and scales of a format that tools/fp4_twin.py writes, and what they decode to."""
    one, parts = drawn_parts(name)
    out: Made = {}
    components(out, "random", one.write(parts), by_scaled_twin(f"TWINS[{name!r}].write(parts)", "any codes"))
    how = by_scaled_twin(f"TWINS[{name!r}].weights(parts)", "random decoded")
    out["random.f32"] = (one.weights(parts), how)
    return out


def made_by_outlier_twin(name: str) -> Made:
    """Any codes, tables and outliers of a format that tools/outlier_twin.py writes, and what they decode to."""
    one = outlier_twin.TWINS[name]
    shape = (6, 640) if one.least[0] <= 6 else (2 * one.least[0], 64)
    parts = one.draw(*shape, np.random.default_rng(SEED))
    by = {"tool": "outlier_twin", "version": outlier_twin.VERSION, "source": "tools/outlier_twin.py", "seed": SEED}
    by["numpy"] = np.__version__
    out: Made = {}
    how = {**by, "call": f"TWINS[{name!r}].write(parts)", "what": "any codes and outliers"}
    components(out, "random", one.write(parts), how)
    how = {**by, "call": f"TWINS[{name!r}].weights(parts)", "what": "random decoded"}
    return out | {"random.f32": (one.weights(parts), how)}


def read_by_gguf(name: str) -> Made:
    """nvfp4_plain: the twin's bytes, and the numbers of gguf, which reads this type but does not write it."""
    made = made_by_scaled_twin(name)
    kind = gguf.GGMLQuantizationType.NVFP4
    call = "gguf.quants.dequantize(random, GGMLQuantizationType.NVFP4)"
    by = {"tool": "gguf", "version": version("gguf"), "source": "PyPI", "call": call, "what": "random decoded"}
    return made | {"random.f32": (gguf.quants.dequantize(made["random.bin"][0], kind), by)}


def scheme(name: str) -> Any:
    """The arguments of compressed-tensors for a format."""
    quantization = import_module("compressed_tensors.quantization")
    presets = {"nvfp4_ct": "NVFP4A16", "mxfp4_pairs": "MXFP4A16", "mxfp6_e2m3": "MXFP6A16", "mxfp8_e4m3": "MXFP8A16"}
    if name in presets:
        return quantization.quant_scheme.PRESET_SCHEMES[presets[name]]["weights"]
    if name.startswith("fp8_"):
        strategy = {"fp8_tensor": "tensor", "fp8_row": "channel", "fp8_block": "block"}[name]
        block = [128, 128] if strategy == "block" else None
        return quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy, block_structure=block)
    bits = int(name[len("ct_int")])
    group = next((int(r[1:]) for r in name.split("_") if r[0] == "g" and r[1:].isdigit()), None)
    strategy = "group" if group else "channel"
    return quantization.QuantizationArgs(
        num_bits=bits, symmetric="asym" not in name, strategy=strategy, group_size=group
    )


def made_by_compressed_tensors(name: str) -> Made:
    """What compressed-tensors packs of weights, and what it reads: all of it computed in float32."""
    import torch

    compressors = import_module("compressed_tensors.compressors")
    quantization = import_module("compressed_tensors.quantization")
    helpers = import_module("compressed_tensors.quantization.utils")
    args = scheme(name)
    by = {"tool": "compressed-tensors", "version": version("compressed-tensors"), "source": "PyPI"}
    by["torch"] = version("torch")
    out: Made = {}
    kind = {"nvfp4_ct": "nvfp4-pack-quantized", "mxfp4_pairs": "mxfp4-pack-quantized"}.get(name)
    kind = kind or {"mxfp6_e2m3": "mxfp6-pack-quantized", "mxfp8_e4m3": "mxfp8-quantized"}.get(name)
    kind = kind or ("float-quantized" if name.startswith("fp8") else "pack-quantized")
    packer = compressors.BaseCompressor.get_value_from_registry(kind)
    whole = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    rng = np.random.default_rng(SEED)
    call = "few_scaled_weights() of tools/make_vectors.py"
    weight = few_scaled_weights(rng)
    if name == "fp8_block":
        weight = narrow(rng.standard_normal(NAMED_SHAPES[name]).astype(F32))
        call = "narrow(standard_normal((130, 136)))"
    drawn = {"tool": "numpy", "version": np.__version__, "call": call, "seed": SEED, "what": "weights to encode"}
    dense = torch.from_numpy(weight)
    if args.strategy == "block":
        down, along = args.block_structure
        strips = [torch.split(dense[r : r + down], along, 1) for r in range(0, len(dense), down)]
        low = torch.stack([torch.stack([b.min() for b in row]) for row in strips])
        high = torch.stack([torch.stack([b.max() for b in row]) for row in strips])
    elif args.strategy == "tensor":
        low, high = dense.min(), dense.max()
    else:
        groups = dense.reshape(len(dense), -1, args.group_size or dense.shape[1])
        low, high = groups.amin(-1), groups.amax(-1)
    extra = {"weight_global_scale": helpers.generate_gparam(dense.min(), dense.max())} if name == "nvfp4_ct" else {}
    scale, zero = helpers.calculate_qparams(low, high, args, global_scale=extra.get("weight_global_scale"))
    state = {"weight": dense.clone(), "weight_scale": scale, **extra}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    stored = packer.compress(state, whole)
    out["weights.f32"] = (weight, drawn)
    how = {**by, "call": f"{packer.__name__}.compress(...)", "what": "weights.f32 encoded"}
    arrays = named(name, stored)
    # of float32 weights, its FP8 rule is what packfmt calls amax
    components(out, "packed", arrays, {**how, "encoder": "amax" if name in FP8 else "compressed-tensors"})
    out["decoded.f32"] = (
        read_by_compressed_tensors(args, arrays, weight.shape),
        {**by, "call": "read_by_compressed_tensors() of tools/make_vectors.py", "what": "packed decoded"},
    )
    return out | read_again_by_compressed_tensors(name, args, by)


def named(name: str, stored: dict[str, Any]) -> dict[str, Any]:
    """The tensors that compressed-tensors stores, as arrays of whole numbers and float32, in packfmt's order."""
    import torch

    order = ("weight_packed", "weight", "weight_scale", "weight_global_scale", "weight_zero_point")
    out = {}
    for key in (k for k in order if k in stored):
        tensor = stored[key].contiguous()
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.view(torch.uint8)
        array = tensor.numpy()
        out["weight_scale_inv" if (name, key) == ("fp8_block", "weight_scale") else key] = array
    return out


def read_by_compressed_tensors(args: Any, stored: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """The package's own unpacking, and its `dequantize` of float32 numbers and float32 scales."""
    import torch

    four = import_module("compressed_tensors.compressors.nvfp4.helpers").unpack_fp4_from_uint8
    six = import_module("compressed_tensors.compressors.mxfp6.helpers").unpack_fp6_from_uint8
    whole_numbers = import_module("compressed_tensors.compressors.pack_quantized.helpers").unpack_from_int32
    dequantize = import_module("compressed_tensors.quantization.lifecycle.forward").dequantize

    def whole(name: str) -> Any:
        return torch.from_numpy(np.ascontiguousarray(stored[name]))

    scale = whole("weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale")
    zero = None
    if args.type == "float" and args.num_bits == 8:
        codes = whole("weight").view(torch.float8_e4m3fn).float()
    elif args.type == "float":
        unpack = {4: four, 6: six}[args.num_bits]
        codes = unpack(whole("weight_packed"), *shape, dtype=torch.float32)
    else:
        codes = whole_numbers(whole("weight_packed"), args.num_bits, torch.Size(shape))
    if args.group_size == 32 and args.type == "float":
        scale = torch.exp2(scale.float() - 127)
    elif scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e4m3fn).float()
    elif scale.dtype == torch.uint16:
        scale = scale.view(torch.bfloat16).float()
    if not args.symmetric:
        zero = whole("weight_zero_point")
        zero = whole_numbers(zero, args.num_bits, torch.Size((shape[0], scale.shape[1])), packed_dim=0)
    g = whole("weight_global_scale") if "weight_global_scale" in stored else None
    return dequantize(codes, scale.float(), zero, args, torch.float32, g).numpy()


def read_again_by_compressed_tensors(name: str, args: Any, by: dict[str, Any]) -> Made:
    """Any codes and scales that the twin wrote, and the package's numbers."""
    made = made_by_scaled_twin(name)
    files = {file: array for file, (array, _) in made.items() if file.endswith(".bin")}
    stored = {file.split(".")[1]: array for file, array in files.items()}
    call = "read_by_compressed_tensors() of tools/make_vectors.py"
    found = read_by_compressed_tensors(args, stored, made["random.f32"][0].shape)
    return made | {"random.f32": (found, {**by, "call": call, "what": "random decoded"})}


def made_by_modelopt(name: str) -> Made:
    """nvfp4_modelopt: what ModelOpt packs, and what it reads."""
    import torch

    tensor = import_module("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    by = {"tool": "nvidia-modelopt", "version": version("nvidia-modelopt"), "source": "PyPI", "torch": version("torch")}
    weight = few_scaled_weights(np.random.default_rng(SEED))
    call = "few_scaled_weights() of tools/make_vectors.py"
    drawn = {"tool": "numpy", "version": np.__version__, "call": call, "seed": SEED, "what": "weights to encode"}
    packed, scale, whole = tensor.quantize(torch.from_numpy(weight.copy()), 16)
    stored = {"weight": packed._quantized_data, "weight_scale": scale.view(torch.uint8), "weight_scale_2": whole}
    arrays = {key: np.atleast_1d(array.numpy()) for key, array in stored.items()}
    out: Made = {"weights.f32": (weight, drawn)}
    how = {**by, "call": "NVFP4QTensor.quantize(weight, 16)", "what": "weights.f32 encoded", "encoder": "modelopt"}
    components(out, "packed", arrays, how)
    how = {**by, "call": "NVFP4QTensor(...).dequantize(float32, scale, double_scale, block_sizes={-1: 16})"}

    def read(shape: tuple[int, ...], codes: Any, scale: Any, whole: Any) -> Any:
        held = tensor(torch.Size(shape), torch.float32, torch.from_numpy(codes))
        eight = torch.from_numpy(scale).view(torch.float8_e4m3fn)
        given = {"scale": eight, "double_scale": torch.from_numpy(whole), "block_sizes": {-1: 16}}
        return held.dequantize(torch.float32, **given).numpy()

    out["decoded.f32"] = (read(weight.shape, *arrays.values()), {**how, "what": "packed decoded"})
    made = made_by_scaled_twin(name)
    codes = [array for file, (array, _) in made.items() if file.endswith(".bin")]
    out |= made
    out["random.f32"] = (read(made["random.f32"][0].shape, *codes), {**how, "what": "random decoded"})
    return out


def encoded_by_others(name: str, tool: str) -> Made:
    """weights.f32 as another tool packs it."""
    import torch

    weight = few_scaled_weights(np.random.default_rng(SEED))
    dense = torch.from_numpy(weight.copy())
    if tool == "modelopt":
        kind = "MXFP4QTensor" if name == "mxfp4_pairs" else "MXFP8QTensor"
        module = import_module(f"modelopt.torch.quantization.qtensor.{kind[:5].lower()}_tensor")
        packed, scale = (
            getattr(module, kind).quantize(dense, 32) if kind[4] == "4" else module.MXFP8QTensor.quantize(dense)
        )
        codes = packed._quantized_data.view(torch.uint8)
        stored, call = [codes, scale.reshape(len(weight), -1)], f"{kind}.quantize(weights)"
    elif name == "mxfp4_e8m0":
        mx = import_module("torchao.prototype.mx_formats.mx_tensor")
        scale, codes = mx.to_mx(dense, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
        stored, call = [codes.view(torch.uint8), scale.view(torch.uint8)], "to_mx(weights, float4_e2m1fn_x2, 32, FLOOR)"
    else:
        nv = import_module("torchao.prototype.mx_formats.nvfp4_tensor")
        whole = nv.per_tensor_amax_to_scale(dense.abs().max())
        scale, codes = nv.nvfp4_quantize(dense, 16, whole)
        stored, call = [codes, scale.view(torch.uint8), whole.reshape(1)], "nvfp4_quantize(weights, 16, scale)"
    package = {"modelopt": "nvidia-modelopt"}.get(tool, tool)
    how = {"tool": package, "version": version(package), "source": "PyPI", "torch": version("torch"), "call": call}
    how |= {"what": "weights.f32 encoded", "encoder": tool}
    components = [key.split(".")[1] for key in made_by_scaled_twin(name) if key.endswith(".bin")]
    arrays = dict(zip(components, (array.numpy() for array in stored), strict=True))
    out: Made = {f"{tool}.{component}.bin": (array, how) for component, array in arrays.items()}
    call = "few_scaled_weights() of tools/make_vectors.py"
    drawn = {"tool": "numpy", "version": np.__version__, "call": call, "seed": SEED, "what": "weights to encode"}
    return out | {"weights.f32": (weight, drawn)}


OTHERS = {"mxfp4_pairs": "modelopt", "mxfp8_e4m3": "modelopt", "mxfp4_e8m0": "torchao", "nvfp4_modelopt": "torchao"}
FP8 = ("fp8_tensor", "fp8_row", "fp8_block")
COMPRESSED_TENSORS = ("nvfp4_ct", "mxfp4_pairs", "mxfp6_e2m3", "mxfp8_e4m3", *FP8, "ct_int5_row_f32")


def made_of_scales(name: str) -> Made:
    """All vectors of a format of scaled floats or small integers."""
    more = encoded_by_others(name, OTHERS[name]) if name in OTHERS else {}
    if name in COMPRESSED_TENSORS:
        return made_by_compressed_tensors(name) | more
    if name == "nvfp4_plain":
        return read_by_gguf(name)
    return more | (made_by_modelopt(name) if name == "nvfp4_modelopt" else made_by_scaled_twin(name))


def make(name: str) -> Made:
    """All vectors of a format."""
    if name in fp4_twin.TWINS:
        return made_of_scales(name)
    if name in outlier_twin.TWINS:
        return made_by_outlier_twin(name)
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
    every = (*RANDOM_BLOCKS, "bitnet", "bitnet_divide", "ptq161", *TWINS, *fp4_twin.TWINS, *outlier_twin.TWINS)
    findings = [line for name in sys.argv[1:] or every for line in write(name, make(name), manifest)]
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    MANIFEST.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return house.tell(findings, f"{len(manifest)} vectors are there")


if __name__ == "__main__":
    raise SystemExit(main())
