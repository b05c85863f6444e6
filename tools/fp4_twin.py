"""Formats of scaled floats and small integers in plain NumPy: closed forms, from the pages in spec/formats.

Nothing here comes from packfmt: not its placement, its grids, its number formats or its kernels. tools/make_vectors.py
writes spec/vectors with it where no package on PyPI writes a format, and tests hold packfmt against it.

Parts are arrays by name: `codes` (rows, cols) of whole numbers, `scale` (rows / down, cols / along) of bytes or
float32, `global_scale` (1,) float32 ...; components are what files store, by name in file order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = "1"  # of what these functions give; vectors state it
F32 = np.float32
Array = npt.NDArray[Any]
Parts = dict[str, Array]
Stored = dict[str, Array]


# ---------------------------------------------------------------- what number a code is


def floating(exponent: int, mantissa: int, bias: int, nan: tuple[int, ...] = (), infinite: int = -1) -> list[float]:
    """A sign (the highest bit), exponent, mantissa; exponent 0 is subnormal. `nan`, `infinite`: codes without sign."""
    out = []
    for code in range(1 << exponent + mantissa):
        above, fraction = divmod(code, 1 << mantissa)
        size = (min(above, 1) + fraction / 2**mantissa) * 2.0 ** (max(above, 1) - bias)
        out.append(float("nan") if code in nan else float("inf") if code == infinite else size)
    return out + [-size for size in out]


def signed(bits: int) -> list[int]:
    """Two's complement."""
    return [code - (code >> bits - 1 << bits) for code in range(1 << bits)]


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
E4M3 = floating(4, 3, 7, nan=(127,))
NUMBERS: dict[str, list[Any]] = {
    "float4_e2m1fn": E2M1,
    "float6_e2m3fn": floating(2, 3, 1),
    "float6_e3m2fn": floating(3, 2, 3),
    "float8_e4m3fn": E4M3,
    "float8_e5m2": floating(5, 2, 15, nan=(125, 126, 127), infinite=124),
    "float8_e8m0fnu": [2.0 ** (code - 127) for code in range(255)] + [float("nan")],
    "ufloat8_e5m3": [*floating(5, 3, 15)[:255], float("nan")],
    "ufloat8_e6m2": [(1 + code % 4 / 4) * 2.0 ** (code // 4 - 48) for code in range(255)] + [float("nan")],
    "ufloat7_e4m3": [*E4M3[:127], 0, *E4M3[:127], 480],
    "int4": signed(4),
    "int8_f6": [q / 64 for q in signed(8)],
    "int4_6/7": [q * 6 / 7 for q in signed(4)],
    "sm4_f2": [q / 4 for q in range(8)] + [-(q / 4) for q in range(8)],
}


def numbers(name: str) -> Array:
    """(2**bits,) float32."""
    if name not in NUMBERS:  # float<n>_e<E>m<M>b<bias>
        exponent, rest = name.split("_e")[1].split("m")
        mantissa, bias = rest.split("b")
        return np.array(floating(int(exponent), int(mantissa), int(bias)), F32)
    return np.array(NUMBERS[name], F32)


def all_codes(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Codes of any number that is finite."""
    good = np.flatnonzero(np.isfinite(numbers(name)))
    return rng.choice(good, shape).astype(np.uint8)


# ---------------------------------------------------------------- where the bits lie


def pairs(codes: Array) -> Array:
    """Two neighbours of a row in a byte, the first in the low half."""
    packed: Array = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return packed


def halves(codes: Array, block: int) -> Array:
    """Of `block` neighbours of a row, number j in the low half and j + block / 2 in the high half of byte j."""
    low, high = np.split(codes.reshape(len(codes), -1, block), 2, 2)
    packed: Array = (low | high << 4).astype(np.uint8).reshape(len(codes), -1)
    return packed


def stream(codes: Array, bits: int, word: int = 8) -> Array:
    """(rows, bytes): the codes of a row one after another, lowest bit first, filled with zeros to whole words."""
    spread = (codes[:, :, None].astype(np.int64) >> np.arange(bits) & 1).reshape(len(codes), -1).astype(np.uint8)
    padded = np.pad(spread, ((0, 0), (0, -spread.shape[1] % word)))
    packed: Array = np.packbits(padded, axis=1, bitorder="little")
    return packed


def whole_in_words(codes: Array, bits: int) -> Array:
    """(rows, words) int32: 32 // bits codes a word, lowest bits first; the bits above them are zero."""
    fit = 32 // bits
    padded = np.pad(codes.astype(np.int64), ((0, 0), (0, -codes.shape[1] % fit))).reshape(len(codes), -1, fit)
    packed: Array = (padded << bits * np.arange(fit)).sum(2).astype(np.uint32).view(np.int32)
    return packed


def dense_in_words(codes: Array, bits: int) -> Array:
    """(rows, words) int32: `stream` in words of 32 bits."""
    return stream(codes, bits, 32).view("<i4")


def tiles_128x4(scale: Array) -> Array:
    """Bytes of scales in cuBLAS' tiles of 128 rows and 4 columns: row r at 16 (r mod 32) + 4 (r div 32 mod 4)."""
    rows, cols = scale.shape
    out = np.zeros((rows // 128, cols // 4, 32, 4, 4), np.uint8)
    for r in range(rows):
        out[r // 128, :, r % 32, r % 128 // 32] = scale[r].reshape(-1, 4)
    return out.reshape(-1)


# ---------------------------------------------------------------- a format


@dataclass(frozen=True)
class Twin:
    """One format.

    draw : rows, cols, rng -> parts of any codes and finite scales
    write : parts -> components
    weights : parts -> (rows, cols) float32
    least : rows and columns that fill it
    """

    draw: Callable[[int, int, np.random.Generator], Parts]
    write: Callable[[Parts], Stored]
    weights: Callable[[Parts], Array]
    least: tuple[int, int]


@dataclass(frozen=True)
class Scaled:
    """Numbers of codes times scales, which may be times, or divided by, a scale of the whole tensor.

    element, scale : number formats; scale "" is float32 and "bf16" its upper half
    down, along : rows and columns that share a scale; 0 is all of them
    over : "times", "divides" or ""
    wide : of scales that any encoder writes, the smallest and largest float32
    """

    element: str
    scale: str
    down: int
    along: int
    over: str = ""
    edges: bool = False  # the last of a row or column may share its scale with fewer

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // (self.down or rows)), -(-cols // (self.along or cols))

    def draw(self, rows: int, cols: int, rng: np.random.Generator) -> Parts:
        shape = self.grid(rows, cols)
        if self.scale in ("", "bf16"):
            scale = (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 6, shape)).astype(F32)
            scale = narrow(scale) if self.scale else scale
        else:
            scale = all_codes(self.scale, shape, rng)
        parts = {"codes": all_codes(self.element, (rows, cols), rng), "scale": scale}
        if self.over:
            parts["global_scale"] = np.array([682.6667 if self.over == "divides" else 0.0014648438], F32)
        return parts

    def weights(self, parts: Parts) -> Array:
        codes, scale = parts["codes"], parts["scale"]
        rows, cols = codes.shape
        number = scale if self.scale in ("", "bf16") else numbers(self.scale)[scale]
        with np.errstate(over="ignore"):
            if self.over:
                g = parts["global_scale"][0]
                number = number * g if self.over == "times" else number / g
            spread = np.repeat(np.repeat(number, self.down or rows, 0), self.along or cols, 1)[:rows, :cols]
            product: Array = numbers(self.element)[codes] * spread
        return product


def narrow(weight: Array) -> Array:
    """The nearest bfloat16 toward zero, as float32."""
    return (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)


def upper(scale: Array) -> Array:
    """The bits of bfloat16s that are held as float32."""
    return (scale.view(np.uint32) >> 16).astype("<u2")


# ---------------------------------------------------------------- the formats


def as_they_are(array: Array) -> Array:
    return array


def floats(scale: Array) -> Array:
    return scale.astype("<f4")


def stored(*members: tuple[str, str, Callable[[Array], Array]]) -> Callable[[Parts], Stored]:
    """Components, each of one part: its name, the part's, and how its elements lie."""
    return lambda parts: {name: place(parts[part]) for name, part, place in members}


def packed_pairs(*scales: tuple[str, str, Callable[[Array], Array]], codes: str = "weight_packed") -> Any:
    return stored((codes, "codes", pairs), *scales)


def plain(*scales: tuple[str, str, Callable[[Array], Array]]) -> Any:
    return stored(("weight", "codes", as_they_are), *scales)


SCALE = ("weight_scale", "scale", as_they_are)
FLOAT_SCALE = ("weight_scale", "scale", floats)
BF16_SCALE = ("weight_scale", "scale", upper)
SCALE_2 = ("weight_scale_2", "global_scale", floats)
GLOBAL = ("weight_global_scale", "global_scale", floats)


def twin(scaled: Scaled, write: Callable[[Parts], Stored], least: tuple[int, int]) -> Twin:
    return Twin(scaled.draw, write, scaled.weights, least)


def ggml_nvfp4(parts: Parts) -> Stored:
    """Blocks of 64: four scales, then four times 16 codes in halves; and the scale of the whole tensor."""
    rows = len(parts["codes"])
    scale, codes = parts["scale"].reshape(rows, -1, 4), halves(parts["codes"], 16).reshape(rows, -1, 32)
    blocks = np.concatenate([scale, codes], 2).reshape(rows, -1)
    return {"blocks": blocks} | ({"scale": parts["global_scale"]} if "global_scale" in parts else {})


def down_the_rows(parts: Parts) -> Stored:
    """Two rows in a byte, the first low; a scale for 16 rows."""
    return {
        "weight": pairs(parts["codes"].T).T,
        "weight_scale": parts["scale"],
        "weight_scale_2": parts["global_scale"],
    }


def if4_draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
    return Scaled("int4", "float8_e4m3fn", 1, 16, "times").draw(rows, cols, rng)


def if4_weights(parts: Parts) -> Array:
    """A scale's sign says that its codes are whole numbers times 6/7; its magnitude counts."""
    size = np.abs(numbers("float8_e4m3fn")[parts["scale"]]) * parts["global_scale"][0]
    whole = np.repeat(parts["scale"] >> 7, 16, 1).astype(bool)
    element = np.where(whole, numbers("int4_6/7")[parts["codes"]], numbers("float4_e2m1fn")[parts["codes"]])
    product: Array = element * np.repeat(size, 16, 1)
    return product


def hif4_draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
    bits = {name: rng.integers(0, 2, (rows, cols // n)).astype(np.uint8) for name, n in (("shift8", 8), ("shift4", 4))}
    scale = all_codes("ufloat8_e6m2", (rows, cols // 64), rng)
    return {"codes": rng.integers(0, 16, (rows, cols)).astype(np.uint8), "scale": scale, **bits}


def hif4(parts: Parts) -> Stored:
    """Pairs; and four bytes for 64 columns: scale, eight bits of eights, twice eight bits of fours, highest first."""
    rows = len(parts["codes"])
    eights = np.packbits(parts["shift8"].reshape(rows, -1, 8), 2)
    fours = np.packbits(parts["shift4"].reshape(rows, -1, 16), 2)
    return {"value": pairs(parts["codes"]), "scale": np.concatenate([parts["scale"][:, :, None], eights, fours], 2)}


def hif4_weights(parts: Parts) -> Array:
    doubled = np.repeat(parts["shift8"], 8, 1).astype(int) + np.repeat(parts["shift4"], 4, 1)
    size = np.ldexp(np.repeat(numbers("ufloat8_e6m2")[parts["scale"]], 64, 1), doubled)
    product: Array = numbers("sm4_f2")[parts["codes"]] * size
    return product


def minifloat(name: str) -> Twin:
    """e<E>m<M>[b<bias>]_(tensor|row|g<n>): codes one after another, float32 scales."""
    number, shared = name.split("_")
    exponent, rest = number[1:].split("m")
    mantissa, *bias = rest.split("b")
    e, m = int(exponent), int(mantissa)
    bits = 1 + e + m
    element = f"float{bits}_e{e}m{m}b{bias[0] if bias else 2 ** (e - 1) - 1}"
    down, along = {"tensor": (0, 0), "row": (1, 0)}.get(shared) or (1, int(shared[1:]))
    write = stored(("weight_packed", "codes", partial(stream, bits=bits)), FLOAT_SCALE)
    return twin(Scaled(element, "", down, along), write, (1, along or 8))


def packed_int(name: str) -> Twin:
    """ct_int<b>[_legacy]_(row|g<n>)[_asym][_f16|_f32]: codes in words of 32 bits."""
    first, *rest = name.removeprefix("ct_").split("_")
    bits, legacy, asym = int(first[3:]), "legacy" in rest, "asym" in rest
    along = next((int(r[1:]) for r in rest if r[0] == "g"), 0)
    dtype = next((r for r in rest if r in ("f16", "f32")), "bf16")
    words = partial(whole_in_words if legacy else dense_in_words, bits=bits)
    keep = {"bf16": upper, "f16": lambda s: s.astype("<f2"), "f32": floats}[dtype]

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
        shape = (rows, cols // (along or cols))
        scale = narrow((rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 3, shape)).astype(F32))
        parts = {"codes": rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8), "scale": scale}
        if dtype == "f16":
            parts["scale"] = scale.astype(np.float16).astype(F32)
        return parts | ({"zero": rng.integers(0, 1 << bits, shape).astype(np.uint8)} if asym else {})

    def write(parts: Parts) -> Stored:
        out = {"weight_packed": words(parts["codes"]), "weight_scale": keep(parts["scale"])}
        return out | ({"weight_zero_point": np.ascontiguousarray(words(parts["zero"].T).T)} if asym else {})

    def weights(parts: Parts) -> Array:
        zero = parts["zero"].astype(F32) if asym else np.full(parts["scale"].shape, 1 << bits - 1, F32)
        share = parts["codes"].shape[1] // zero.shape[1]
        product: Array = (parts["codes"].astype(F32) - np.repeat(zero, share, 1)) * np.repeat(parts["scale"], share, 1)
        return product

    return Twin(draw, write, weights, (32 if asym and 32 % bits else 1, along or 32))


def butterflies(weight: Array, size: int) -> Array:
    """Every `size` neighbouring columns times the normalised Hadamard matrix: strides 1, 2, 4 ..., one product."""
    out, stride = weight.reshape(-1, size), 1
    while stride < size:
        a, b = np.moveaxis(out.reshape(len(out), -1, 2, stride), 2, 0)
        out = np.stack([a + b, a - b], 2).reshape(-1, size)
        stride *= 2
    product: Array = (out * F32(1 / np.sqrt(size))).reshape(weight.shape)
    return product


def rotated(name: str) -> Twin:
    """<base>_h<size>: the base's bytes, whose numbers are rotated back."""
    of, size = name.rsplit("_h", 1)
    base, n = BASES[of], int(size)
    return Twin(base.draw, base.write, lambda parts: butterflies(base.weights(parts), n), (1, max(n, base.least[1])))


def with_columns(name: str) -> Twin:
    """<base>_out<n>: the base's bytes; and n columns of the weight, as bfloat16."""
    of, number = name.rsplit("_out", 1)
    base, n = BASES[of], int(number)

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
        columns = np.sort(rng.permutation(cols)[:n]).astype("<u4")
        return base.draw(rows, cols, rng) | {
            "columns": columns,
            "column_values": narrow(rng.standard_normal((rows, n)).astype(F32)),
        }

    def write(parts: Parts) -> Stored:
        more = {"outlier_columns": parts["columns"], "outlier_values": upper(parts["column_values"])}
        return base.write(parts) | more

    def weights(parts: Parts) -> Array:
        out = base.weights(parts)
        out[:, parts["columns"]] = parts["column_values"]
        return out

    return Twin(draw, write, weights, (1, max(32, base.least[1])))


def arcquant(residual: int) -> Twin:
    """Columns in another order; of the last `residual` each group of 16 is followed by its copy."""
    base = NVFP4("times")

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
        return base.draw(rows, cols, rng) | {"perm": rng.permutation(cols).astype("<u4")}

    def twice(array: Array, size: int) -> Array:
        """`size` elements are 16 columns."""
        few = residual // 16 * size
        last = array[:, -few:].reshape(len(array), -1, 1, size).repeat(2, 2).reshape(len(array), -1)
        return np.concatenate([array[:, :-few], last], 1)

    def write(parts: Parts) -> Stored:
        return {
            "weight": pairs(twice(parts["codes"], 16)),
            "weight_scale": twice(parts["scale"], 1),
            "weight_scale_2": parts["global_scale"],
            "reorder_index": parts["perm"],
        }

    def weights(parts: Parts) -> Array:
        out = np.empty(parts["codes"].shape, F32)
        out[:, parts["perm"]] = base.weights(parts)
        return out

    return Twin(draw, write, weights, (1, residual))


def experts(count: int) -> Twin:
    """ggml's blocks of `count` experts, one below another, each with a scale of the whole of its own."""
    base = BASES["nvfp4"]

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
        scale = (rng.standard_normal(count) * 2.0 ** rng.integers(-12, 6, count)).astype(F32)
        return base.draw(rows, cols, rng) | {"global_scale": scale}

    def weights(parts: Parts) -> Array:
        split = {name: np.split(parts[name], count) for name in ("codes", "scale", "global_scale")}
        each = [base.weights({name: pieces[e] for name, pieces in split.items()}) for e in range(count)]
        return np.concatenate(each)

    return Twin(draw, base.write, weights, (count, base.least[1]))


def side_by_side(array: Array, size: int) -> Array:
    """(rows, any) elements -> for every 16 rows a line: the first `size` of each row, then the next. Zeros fill up."""
    padded = np.pad(array, ((0, -len(array) % 16), (0, -array.shape[1] % size)))
    lines = padded.reshape(len(padded) // 16, 16, -1, size).transpose(0, 2, 1, 3)
    return lines.reshape(len(lines), -1)


def fields(codes: Array, width: int) -> Array:
    """Four columns in the low bits of four bytes, the next four above them; `width` bits of each code."""
    fit = 8 // width
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % (4 * fit)))) & (1 << width) - 1
    fours = padded.reshape(len(codes), -1, fit, 4).astype(np.uint8)
    packed: Array = (fours << (width * np.arange(fit, dtype=np.uint8))[:, None]).sum(2, dtype=np.uint8)
    return packed.reshape(len(codes), -1)


def tiled(of: str, *strings: Callable[[Array], Array], scale: Callable[[Array], Array] = as_they_are) -> Twin:
    """<of>_tile16. `strings`: a row's bytes of codes, and those of the high bits if these are apart."""
    base = BASES[of]

    def write(parts: Parts) -> Stored:
        names = ("codes", "codes_high")
        out = {name: side_by_side(string(parts["codes"]), 4) for name, string in zip(names, strings, strict=False)}
        out["scale"] = side_by_side(scale(parts["scale"]), 1)
        if "zero" in parts:
            out["zero"] = side_by_side(parts["zero"], 1)
        return out | ({"global_scale": parts["global_scale"]} if "global_scale" in parts else {})

    # A row of one scale may end anywhere.
    return Twin(base.draw, write, base.weights, (1, 1 if of.endswith("_row") else base.least[1]))


MXFP4 = Scaled("float4_e2m1fn", "float8_e8m0fnu", 1, 32)
NVFP4 = partial(Scaled, "float4_e2m1fn", "float8_e4m3fn", 1, 16)
E4M3_ = partial(Scaled, "float8_e4m3fn")


def mx_bytes(element: str) -> Twin:
    return twin(Scaled(element, "float8_e8m0fnu", 1, 32), plain(SCALE), (1, 32))


def mx_six(element: str) -> Twin:
    write = stored(("weight_packed", "codes", partial(stream, bits=6)), SCALE)
    return twin(Scaled(element, "float8_e8m0fnu", 1, 32), write, (1, 32))


def fp8(down: int, along: int, scale: tuple[str, str, Callable[[Array], Array]], kind: str = "") -> Twin:
    return twin(E4M3_(kind, down, along), plain(scale), (1, 1))


INVERSE = "weight_scale_inv"
BASES: dict[str, Twin] = {
    "mxfp4_pairs": twin(MXFP4, packed_pairs(SCALE), (1, 32)),
    "mxfp4_e8m0": twin(MXFP4, packed_pairs(("scale", "scale", as_they_are), codes="weight"), (1, 32)),
    "mxfp6_e2m3": mx_six("float6_e2m3fn"),
    "mxfp6_e3m2": mx_six("float6_e3m2fn"),
    "mxfp8_e4m3": mx_bytes("float8_e4m3fn"),
    "mxfp8_e5m2": mx_bytes("float8_e5m2"),
    "mxint8": mx_bytes("int8_f6"),
    "nvfp4": twin(Scaled("float4_e2m1fn", "ufloat7_e4m3", 1, 16, "times"), ggml_nvfp4, (1, 64)),
    "nvfp4_plain": twin(Scaled("float4_e2m1fn", "ufloat7_e4m3", 1, 16), ggml_nvfp4, (1, 64)),
    "nvfp4_modelopt": twin(NVFP4("times"), packed_pairs(SCALE, SCALE_2, codes="weight"), (1, 16)),
    "nvfp4_ct": twin(NVFP4("divides"), packed_pairs(SCALE, GLOBAL), (1, 16)),
    "nvfp4_rows": twin(Scaled("float4_e2m1fn", "float8_e4m3fn", 16, 1, "times"), down_the_rows, (16, 1)),
    "nvfp4_swizzled": twin(
        NVFP4("times"), packed_pairs(("weight_scale", "scale", tiles_128x4), SCALE_2, codes="weight"), (128, 64)
    ),
    "nvint4": twin(
        Scaled("int4", "float8_e4m3fn", 1, 16, "times"), packed_pairs(SCALE, SCALE_2, codes="weight"), (1, 16)
    ),
    "fp4_ue5m3": twin(Scaled("float4_e2m1fn", "ufloat8_e5m3", 1, 16), packed_pairs(SCALE), (1, 16)),
    "if4": Twin(if4_draw, packed_pairs(SCALE, SCALE_2, codes="weight"), if4_weights, (1, 16)),
    "hif4": Twin(hif4_draw, hif4, hif4_weights, (1, 64)),
    "fp8_tensor": fp8(0, 0, FLOAT_SCALE),
    "fp8_row": fp8(1, 0, FLOAT_SCALE),
    "fp8_block": fp8(128, 128, (INVERSE, "scale", floats)),
    "fp8_tensor_bf16": fp8(0, 0, BF16_SCALE, "bf16"),
    "fp8_row_bf16": fp8(1, 0, BF16_SCALE, "bf16"),
    "fp8_block_bf16": fp8(128, 128, BF16_SCALE, "bf16"),
    "fp8_block_e8m0": fp8(128, 128, ("scale", "scale", as_they_are), "float8_e8m0fnu"),
    **{
        name: minifloat(name)
        for name in ("e2m1_row", "e2m2_row", "e3m0_g32", "e1m1_g64", "e2m2b3_tensor", "e3m4_row", "e4m3b11_g128")
    },
    **{
        name: packed_int(name)
        for name in (
            "ct_int4_g128", "ct_int4_g32_asym_f16", "ct_int3_g32", "ct_int3_legacy_g32", "ct_int5_row_f32",
            "ct_int8_row", "ct_int3_g32_asym", "ct_int5_legacy_g64_asym",
        )
    },
}  # fmt: skip
TWINS: dict[str, Twin] = {
    **BASES,
    **{name: rotated(name) for name in ("mxfp4_pairs_h32", "nvfp4_modelopt_h16", "nvfp4_h128", "hif4_h256")},
    **{name: with_columns(name) for name in ("mxfp4_pairs_out2", "nvfp4_modelopt_out5")},
    "arcquant_64": arcquant(64),
    "nvfp4_x3": experts(3),
    "mxfp4_pairs_tile16": tiled("mxfp4_pairs", pairs),
    "nvfp4_modelopt_tile16": tiled("nvfp4_modelopt", pairs),
    "nvfp4_tile16": tiled("nvfp4", partial(halves, block=16)),
    "mxfp6_e2m3_tile16": tiled("mxfp6_e2m3", partial(fields, width=4), lambda codes: fields(codes >> 4, 2)),
    "ct_int8_row_tile16": tiled("ct_int8_row", partial(fields, width=8), scale=upper),
    "ct_int3_g32_asym_tile16": tiled(
        "ct_int3_g32_asym", partial(fields, width=2), lambda codes: fields(codes >> 2, 1), scale=upper
    ),
}
