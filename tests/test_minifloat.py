"""Number formats of few bits: every code, and every code with every scale, as other packages have them."""

from __future__ import annotations

import re
from functools import cache

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from packfmt import codecs, grids, minifloat, placement
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError
from packfmt.layout import dtype_of

F32 = np.float32
Floats = npt.NDArray[np.float32]
BYTES = np.arange(256, dtype=np.uint8)

# general name -> the number format of ml_dtypes that has the same numbers where it has numbers
GENERAL = {
    "float4_e2m1b1": "float4_e2m1fn",
    "float6_e2m3b1": "float6_e2m3fn",
    "float6_e3m2b3": "float6_e3m2fn",
    "float8_e3m4b3": "float8_e3m4",
    "float8_e4m3b7": "float8_e4m3",
    "float8_e4m3b8": "float8_e4m3fnuz",
    "float8_e4m3b11": "float8_e4m3b11fnuz",
    "float8_e5m2b15": "float8_e5m2",
    "float8_e5m2b16": "float8_e5m2fnuz",
}
REFUSED = (
    *("float8_e4m3", "float8_e4m4b7", "float2_e1m0b0", "float9_e5m3b15", "float4_e2m1b65", "float4_e2m1b007"),
    *("", "f32", "float4_e2m1fn ", "FLOAT4_E2M1FN", "float4_e4m0b3", "float8_e0m7b0"),
)


def theirs(name: str) -> Floats:
    """The number of every code, by ml_dtypes."""
    dtype = getattr(ml_dtypes, name)
    bits = ml_dtypes.finfo(dtype).bits
    return np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(F32)


def assert_same_numbers(found: Floats, wanted: Floats) -> None:
    """The same bits, but for those of NaN."""
    nan = np.isnan(wanted)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == F32
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


# ---------------------------------------------------------------- numbers of codes


@pytest.mark.parametrize("name", minifloat.NAMED)
def test_every_code_is_the_number_that_ml_dtypes_has(name: str) -> None:
    assert_same_numbers(minifloat.numbers(name), theirs(name))
    assert minifloat.bits(name) == ml_dtypes.finfo(getattr(ml_dtypes, name)).bits


@pytest.mark.parametrize(("name", "other"), GENERAL.items())
def test_general_formats_have_the_numbers_of_those_with_names(name: str, other: str) -> None:
    wanted = theirs(other)
    number = np.isfinite(wanted)
    number &= ~((wanted == 0) & ~np.signbit(wanted) & (np.arange(len(wanted)) > 0))  # "uz": no negative zero
    assert number.sum() >= len(wanted) - 33
    assert_same_numbers(minifloat.numbers(name)[number], wanted[number])
    assert np.isfinite(minifloat.numbers(name)).all()


def every_general() -> list[tuple[int, int]]:
    return [(e, m) for e in range(1, 8) for m in range(7) if 3 <= 1 + e + m <= 8]


@pytest.mark.parametrize(("exponent", "mantissa"), every_general())
@pytest.mark.parametrize("bias", [0, 1, 15, 64])
def test_general_formats_follow_the_formula(exponent: int, mantissa: int, bias: int) -> None:
    """Sign, exponent and mantissa from the highest bit down; exponent 0 is subnormal; nothing is reserved."""
    bits = 1 + exponent + mantissa
    found = minifloat.numbers(f"float{bits}_e{exponent}m{mantissa}b{bias}")
    assert len(found) == 1 << bits and minifloat.bits(f"float{bits}_e{exponent}m{mantissa}b{bias}") == bits
    for code, number in enumerate(found.tolist()):
        sign, field, fraction = code >> bits - 1, code >> mantissa & (1 << exponent) - 1, code & (1 << mantissa) - 1
        size = (field > 0) + fraction / (1 << mantissa)
        wanted = (-1) ** sign * size * 2.0 ** (max(field, 1) - bias)
        assert number == wanted and np.signbit(F32(number)) == sign


def test_e8m0_has_no_zero_and_one_nan() -> None:
    found = minifloat.numbers("float8_e8m0fnu")
    assert found[0] == F32(2.0**-127) and found[0].view(np.uint32) == 0x00400000
    assert found[127] == 1 and found[254] == F32(2.0**127)
    assert np.flatnonzero(np.isnan(found)).tolist() == [255]


@pytest.mark.parametrize(
    ("name", "nan", "infinite", "largest"),
    [
        ("float8_e4m3fn", [127, 255], [], 448),
        ("float8_e5m2", [125, 126, 127, 253, 254, 255], [124, 252], 57344),
        ("ufloat8_e5m3", [255], [], 114688),
        ("ufloat8_e6m2", [255], [], 49152),
        ("ufloat7_e4m3", [], [], 480),
        ("float6_e2m3fn", [], [], 7.5),
        ("float6_e3m2fn", [], [], 28),
        ("int8_f6", [], [], 127 / 64),
        ("int4", [], [], 7),
        ("int4_6/7", [], [], 6),
        ("sm4_f2", [], [], 1.75),
    ],
)
def test_what_is_no_number_and_what_is_the_largest(
    name: str, nan: list[int], infinite: list[int], largest: float
) -> None:
    found = minifloat.numbers(name)
    assert np.flatnonzero(np.isnan(found)).tolist() == nan
    assert np.flatnonzero(np.isinf(found)).tolist() == infinite
    assert found[np.isfinite(found)].max() == largest


def test_scales_of_one_format_each_are_what_their_sources_say() -> None:
    """AMD's UE5M3, HiF4's E6M2, the byte of ggml's NVFP4, IF4's and HiF4's elements."""
    ue5m3 = minifloat.numbers("ufloat8_e5m3")
    assert (ue5m3[0], ue5m3[1], ue5m3[8]) == (0, 2.0**-17, 2.0**-14)
    e6m2 = minifloat.numbers("ufloat8_e6m2")
    assert (e6m2[0], e6m2[1], e6m2[0xC0]) == (2.0**-48, 1.25 * 2.0**-48, 1)
    assert (np.diff(e6m2[:255]) > 0).all() and (np.diff(ue5m3[:255]) > 0).all()
    ggml, e4m3 = minifloat.numbers("ufloat7_e4m3"), minifloat.numbers("float8_e4m3fn")
    assert_same_numbers(ggml[:127], e4m3[:127])
    assert_same_numbers(ggml[128:255], ggml[:127])
    assert (ggml[127], ggml[255]) == (0, 480) and not np.signbit(ggml).any()  # ggml looks for 127 before it drops bit 7
    sevenths = minifloat.numbers("int4_6/7")
    assert sevenths.tolist() == [F32(q * 6 / 7) for q in (*range(8), *range(-8, 0))]
    assert minifloat.numbers("sm4_f2")[9] == -0.25 and np.signbit(minifloat.numbers("sm4_f2")[8])


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_formats_are_refused_by_name(name: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(f"no number format is called {name!r}")):
        minifloat.numbers(name)


def test_numbers_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        minifloat.numbers("int4")[0] = 1


# ---------------------------------------------------------------- every code with every scale, through layouts

E2M1, E8M0, E4M3 = theirs("float4_e2m1fn"), theirs("float8_e8m0fnu"), theirs("float8_e4m3fn")
# layout -> numbers of its codes, numbers of its scale bytes, scale of the whole tensor, how that counts
SCALED = {
    "mxfp4_pairs": (E2M1, E8M0, None),
    "mxfp4_e8m0": (E2M1, E8M0, None),
    "mxfp6_e2m3": (theirs("float6_e2m3fn"), E8M0, None),
    "mxfp6_e3m2": (theirs("float6_e3m2fn"), E8M0, None),
    "mxfp8_e4m3": (E4M3, E8M0, None),
    "mxfp8_e5m2": (theirs("float8_e5m2"), E8M0, None),
    "mxint8": (BYTES.view(np.int8).astype(F32) / F32(64), E8M0, None),
    "nvfp4_modelopt": (E2M1, E4M3, np.multiply),
    "nvfp4_ct": (E2M1, E4M3, np.divide),
    "nvint4": (np.array([*range(8), *range(-8, 0)], F32), E4M3, np.multiply),
}
WHOLE = (1.0, 0.0014648438, 682.6667, 2.0**-9, 3.0)


def packed_of(name: str, parts: dict[str, npt.NDArray[np.generic]], rows: int, cols: int) -> PackedTensor:
    """A tensor of these parts, whose bytes are given where the layout's parts have bytes of another dtype."""
    layout = codecs.get(name).layout
    wanted = layout.fit(rows, cols).parts
    cast = {k: v if v.dtype.kind == "f" else v.view(dtype_of(wanted[k].dtype)) for k, v in parts.items()}
    shaped = {k: np.ascontiguousarray(v).reshape(wanted[k].shape) for k, v in cast.items()}
    return PackedTensor(layout, (rows, cols), placement.pack(layout, (rows, cols), shaped))


@cache
def every_code_and_scale(codes: int, cols: int, group: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Row r has scale r everywhere, and every code from the left."""
    each = np.tile(np.resize(np.arange(codes, dtype=np.uint8), cols), (256, 1))
    return each, np.repeat(BYTES[:, None], cols // group, 1)


@pytest.mark.kernels
@pytest.mark.parametrize("name", SCALED)
def test_every_code_with_every_scale_is_the_product_of_ml_dtypes(name: str) -> None:
    numbers, scales, whole = SCALED[name]
    group = 32 if whole is None else 16
    cols = max(64, len(numbers))
    codes, scale = every_code_and_scale(len(numbers), cols, group)
    for g in (1.0,) if whole is None else WHOLE:
        parts = {"codes": codes, "scale": scale}
        size = scales
        if whole is not None:
            parts["global_scale"] = np.array([g], F32)
            size = whole(scales, F32(g))
        with np.errstate(all="ignore"):
            wanted = numbers[codes] * np.repeat(size[scale], group, 1)
        packed = packed_of(name, parts, 256, cols)
        assert_same_numbers(packed.decode(), wanted)
        assert_same_numbers(grids.decode(packed.layout, packed.matrix, packed.components), wanted)
        again = packed.unpack()
        assert again["codes"].tobytes() == codes.tobytes() and again["scale"].tobytes() == scale.tobytes()


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4_plain"])
def test_every_code_with_every_scale_is_what_gguf_computes(name: str) -> None:
    kind = {"mxfp4": gguf.GGMLQuantizationType.MXFP4, "nvfp4_plain": gguf.GGMLQuantizationType.NVFP4}[name]
    group = 32 if name == "mxfp4" else 16
    codes, scale = every_code_and_scale(16, 64, group)
    packed = packed_of(name, {"codes": codes, "scale": scale}, 256, 64)
    (blocks,) = packed.components.values()
    with np.errstate(over="ignore"):
        wanted = gguf.quants.dequantize(blocks.reshape(256, -1), kind)
    assert np.isfinite(wanted[:253]).all() and (wanted != 0).any()
    for found in (packed.decode(), grids.decode(packed.layout, packed.matrix, packed.components)):
        if name == "nvfp4_plain":  # code 8 is -0.0 in every format of NVFP4; gguf has +0.0 for it
            assert np.signbit(found[1, 8]) and not np.signbit(wanted[1, 8])
            assert_same_numbers(found + F32(0), wanted + F32(0))
        else:
            assert_same_numbers(found, wanted)


@pytest.mark.kernels
def test_the_scale_of_a_gguf_tensor_is_multiplied_into_its_block_scales() -> None:
    codes, scale = every_code_and_scale(16, 64, 16)
    for g in WHOLE:
        parts = {"codes": codes, "scale": scale, "global_scale": np.array([g], F32)}
        size = minifloat.numbers("ufloat7_e4m3") * F32(g)
        assert_same_numbers(packed_of("nvfp4", parts, 256, 64).decode(), E2M1[codes] * np.repeat(size[scale], 16, 1))


@pytest.mark.kernels
def test_every_code_with_every_scale_of_ue5m3() -> None:
    codes, scale = every_code_and_scale(16, 64, 16)
    size = np.concatenate([np.arange(8) * 2.0**-17, [(8 + c % 8) * 2.0 ** (c // 8 - 18) for c in range(8, 256)]])
    size[255] = np.nan
    wanted = E2M1[codes] * np.repeat(size.astype(F32)[scale], 16, 1)
    assert_same_numbers(packed_of("fp4_ue5m3", {"codes": codes, "scale": scale}, 256, 64).decode(), wanted)


@pytest.mark.kernels
def test_every_code_with_every_scale_of_if4() -> None:
    """The scale's sign chooses between float4_e2m1fn and sevenths; its magnitude counts."""
    codes, scale = every_code_and_scale(16, 64, 16)
    for g in WHOLE:
        size = np.abs(E4M3) * F32(g)
        sevenths = np.array([F32(q * 6 / 7) for q in (*range(8), *range(-8, 0))], F32)
        number = np.where(scale[:, :1] >> 7 == 1, sevenths[codes], E2M1[codes])
        wanted = number * np.repeat(size[scale], 16, 1)
        parts = {"codes": codes, "scale": scale, "global_scale": np.array([g], F32)}
        assert_same_numbers(packed_of("if4", parts, 256, 64).decode(), wanted)


@pytest.mark.kernels
@pytest.mark.parametrize("shifts", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_code_with_every_scale_of_hif4(shifts: tuple[int, int]) -> None:
    codes, _ = every_code_and_scale(16, 64, 16)
    eight, four = (np.full((256, 64 // n), bit, np.uint8) for n, bit in zip((8, 4), shifts, strict=True))
    size = np.array([(1 + c % 4 / 4) * 2.0 ** (c // 4 - 48) for c in range(255)] + [np.nan], F32)[:, None]
    quarter = np.array([*np.arange(8) / 4, *-(np.arange(8) / 4)], F32)
    wanted = quarter[codes] * (size * F32(2 ** sum(shifts)))
    parts = {"codes": codes, "scale": BYTES[:, None], "shift8": eight, "shift4": four}
    assert_same_numbers(packed_of("hif4", parts, 256, 64).decode(), wanted)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_row", "fp8_block"])
def test_every_code_of_fp8_with_scales_of_all_sizes(name: str) -> None:
    layout = codecs.get(name).layout
    shape = layout.fit(256, 256).parts["scale"].shape
    for number in (1.0, 0.0123, 2.0**-140, 3e38, 1e-30):
        scale = np.full(shape, number, F32)
        with np.errstate(over="ignore"):
            wanted = np.tile(E4M3[None] * F32(number), (256, 1))
        parts = {"codes": np.tile(BYTES, (256, 1)), "scale": scale}
        assert_same_numbers(packed_of(name, parts, 256, 256).decode(), wanted)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["e2m1_row", "e3m0_g32", "e1m1_g64", "e2m2b3_tensor", "e3m4_row", "e4m3b11_g128"])
def test_every_code_of_general_formats(name: str) -> None:
    element = codecs.get(name).layout.grid["element"]
    exponent, mantissa, bias = re.fullmatch(r"e(\d)m(\d)(?:b(\d+))?_.*", name).groups()  # type: ignore[union-attr]
    bits, bias = 1 + int(exponent) + int(mantissa), int(bias or 2 ** (int(exponent) - 1) - 1)
    assert element in (f"float{bits}_e{exponent}m{mantissa}b{bias}", "float4_e2m1fn")
    cols = max(128, 1 << bits)
    codes = np.resize(np.arange(1 << bits, dtype=np.uint8), (3, cols))
    shape = codecs.get(name).layout.fit(3, cols).parts["scale"].shape
    scale = np.linspace(0.01, 2, int(np.prod(shape)), dtype=F32).reshape(shape)
    spread = np.repeat(np.repeat(scale, 3 // shape[0], 0), cols // shape[1], 1)
    packed = packed_of(name, {"codes": codes, "scale": scale}, 3, cols)
    assert_same_numbers(packed.decode(), minifloat.numbers(element)[codes] * spread)
