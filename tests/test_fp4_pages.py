"""The scaled floats against their pages, vectors, other people's bytes and the twin in tools/fp4_twin.py."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
from pages import MANIFEST, SPEC, bytes_of, examples, packed_again, packed_of, page, spelled, tool, vector_of

from packfmt import codecs, grids
from packfmt.codec import PackedTensor

PAGES = (
    *("mx", "nvfp4", "nvfp4_experts", "fp4", "fp8", "minifloats", "packed_int"),
    *("rotated", "outlier_channels", "arcquant", "tiled"),
)
F32 = np.float32
ROWS_IN_WORDS = {"One": 1, "Two": 2, "Sixteen": 16}

Floats = npt.NDArray[np.float32]


twin = tool("fp4_twin")
accuracy = tool("fp4_accuracy")
NAMES = tuple(twin.TWINS)


def assert_decodes(packed: PackedTensor, weight: Floats, signed_zeros: bool = True) -> None:
    """By the fast way and by the general one, to the byte; readers that lose the sign of zeros apart."""
    for found in (packed.decode(), grids.decode(packed.layout, packed.matrix, packed.components)):
        assert found.dtype == weight.dtype == F32 and found.shape == weight.shape
        if not signed_zeros:
            found, weight = found + F32(0), weight + F32(0)
        assert found.tobytes() == weight.tobytes()


# ---------------------------------------------------------------- vectors

UNSIGNED_ZEROS = ("gguf", "nvidia-modelopt")  # read the code of -0.0 as +0.0
VECTORS = sorted(
    (path.split("/")[0], path.split("/")[1].removesuffix(".f32"))
    for path in MANIFEST
    if path.split("/")[0] in NAMES and path.endswith(("/decoded.f32", "/random.f32"))
)


def vector(name: str, kind: str) -> tuple[PackedTensor, Floats]:
    """The tensor of `kind`'s files, and what another tool decodes it to."""
    numbers = "decoded" if kind == "packed" else kind
    packed, weight = vector_of(name, kind, numbers)
    return packed, np.frombuffer(weight, "<f4").reshape(packed.shape)


def test_every_format_of_the_twin_has_vectors() -> None:
    assert {name for name, _ in VECTORS} == set(NAMES)


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "numbers"), VECTORS)
def test_vectors_decode_and_pack_to_the_byte(name: str, numbers: str) -> None:
    packed, weight = vector(name, "packed" if numbers == "decoded" else numbers)
    assert_decodes(packed, weight, MANIFEST[f"{name}/{numbers}.f32"]["tool"] not in UNSIGNED_ZEROS)
    assert packed_again(packed) == bytes_of(packed)


WRITTEN = {(*re.split(r"[/.]", path)[:2], entry["encoder"]) for path, entry in MANIFEST.items() if "encoder" in entry}
ENCODED = sorted(written for written in WRITTEN if written[0] in NAMES)


def test_four_tools_encoded_vectors() -> None:
    assert {encoder for _, _, encoder in ENCODED} == {"amax", "compressed-tensors", "modelopt", "torchao"}


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "kind", "encoder"), ENCODED)
def test_vectors_encode_to_the_byte(name: str, kind: str, encoder: str) -> None:
    folder, codec = SPEC / "vectors" / name, codecs.get(name)
    weight = np.frombuffer((folder / "weights.f32").read_bytes(), "<f4")
    weight = weight.reshape(MANIFEST[f"{name}/weights.f32"]["shape"])
    wanted = [(folder / f"{kind}.{c.name}.bin").read_bytes() for c in codec.layout.components]
    assert bytes_of(codec.encode(weight, encoder)) == wanted


# ---------------------------------------------------------------- the twin, on other draws


@pytest.mark.kernels
@pytest.mark.parametrize("name", NAMES)
def test_any_codes_are_written_and_decoded_as_the_twin_does(name: str) -> None:
    rng = np.random.default_rng(41)
    one = twin.TWINS[name]
    for down, along in ((1, 1), (3, 2), (2, 5)):
        rows, cols = down * one.least[0], along * one.least[1]
        parts = one.draw(rows, cols, rng)
        stored = one.write(parts)
        packed = packed_of(name, (rows, cols), [stored[c.name].tobytes() for c in codecs.get(name).layout.components])
        assert_decodes(packed, one.weights(parts))
        assert packed_again(packed) == bytes_of(packed)


@pytest.mark.parametrize("name", NAMES)
def test_stored_shapes_are_those_that_the_twin_writes(name: str) -> None:
    """But for dimensions of one: shapes decide whether another reader takes a tensor."""
    one = twin.TWINS[name]
    rows, cols = 2 * one.least[0], 3 * one.least[1]
    stored = one.write(one.draw(rows, cols, np.random.default_rng(42)))
    shapes = codecs.get(name).layout.shapes(rows, cols)
    assert list(shapes) == list(stored)
    for key, array in stored.items():
        assert [n for n in shapes[key] if n > 1] == [n for n in array.shape if n > 1], key


# ---------------------------------------------------------------- bytes that others gave
# x[i] = (i - 31.5) / 8 for i below 64, one row. Made with gguf 0.19.0, compressed-tensors 0.20.0, nvidia-modelopt
# 0.47.0, torchao 0.18.0, ggml d99724f2 (nvfp4_plain), and a transcription of Huawei AMCT's hif4_pack.

X = ((np.arange(64, dtype=F32) - F32(31.5)) / F32(8))[None]
NVFP4_CODES = "ffffffeeeeeeeeddffefeedecdbcab8910324354656676775566666666777777"
MXFP4_CODES = "eeeeddddddddccccccbbbbaaaa99998800111122223333444444555555556666"
FLOOR_CODES = "ffffffffffffeeeeeeddddccbcab9a8910213243445555666666777777777777"
HIF4 = ("ffffffeeeeddddccffefdecdffdebc9a21436577546576774455556666777777", "bcc3fc3f")
GOLDEN = [
    ("mxfp4", "ggml", ["7eefefdfdfdfdfcfcfcfbfbfafae9e9e0e7e60616162727373747474757575757676"]),
    ("nvfp4_plain", "ggml", ["332a2a33efefefefeededededfdfcfcebeae9e0d50616263647475756565656676767676"]),
    ("nvfp4_ct", "compressed-tensors", [NVFP4_CODES, "7e76767e", np.array([682.6667], "<f4").tobytes().hex()]),
    ("nvfp4_modelopt", "modelopt", [NVFP4_CODES, "7e76767e", np.array([0.00146484375], "<f4").tobytes().hex()]),
    ("nvfp4_modelopt", "torchao", [NVFP4_CODES, "7e76767e", np.array([0.00146484375], "<f4").tobytes().hex()]),
    ("mxfp4_pairs", "compressed-tensors", [MXFP4_CODES, "7f7f"]),
    ("mxfp4_pairs", "modelopt", [MXFP4_CODES, "7f7f"]),
    ("mxfp4_pairs", "ocp", [FLOOR_CODES, "7e7e"]),
    ("mxfp4_e8m0", "torchao", [FLOOR_CODES, "7e7e"]),
    ("hif4", "amct", list(HIF4)),
]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "encoder", "wanted"), GOLDEN, ids=lambda v: v if isinstance(v, str) else "")
def test_golden_bytes_of_other_encoders(name: str, encoder: str, wanted: list[str]) -> None:
    assert [raw.hex() for raw in bytes_of(codecs.get(name).encode(X, encoder))] == wanted


# ---------------------------------------------------------------- pages


EXAMPLES = dict(examples(PAGES))


def example(name: str) -> tuple[PackedTensor, list[bytes]]:
    (count, cols), *_ = re.findall(r"(\w+) rows? of (\d+) columns?", EXAMPLES[name])
    raw = [spelled(digits) for digits in re.findall(r"```hex\n(.*?)```", EXAMPLES[name], re.S)]
    return packed_of(name, (ROWS_IN_WORDS[count], int(cols)), raw), raw


def page_of(name: str) -> str:
    made = (module for module, (pattern, _) in codecs.PATTERNS.items() if re.fullmatch(pattern, name))
    return next(made, "") or codecs.family(name)


def test_every_page_has_examples() -> None:
    assert {page_of(name) for name in EXAMPLES} == set(PAGES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples_name_the_numbers(name: str) -> None:
    packed, _ = example(name)
    weight = packed.decode()
    parts = {**packed.unpack(), "w": weight}
    named = re.findall(r"\b(w|code|scale|zero)\[([\d, ]+)\] = (-?[\d.]+\d|\d)", EXAMPLES[name])
    assert len(named) >= 5 and {"w", "code"} <= {what for what, _, _ in named}
    for what, at, number in named:
        index = tuple(int(i) for i in at.split(","))
        array = parts["codes" if what == "code" else what].astype(F32)
        found = array.reshape(-1)[index] if len(index) == 1 else array[index]
        assert (float(found), np.signbit(found)) == (float(number), number[0] == "-"), f"{what}[{at}]"


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples_show_the_bytes(name: str) -> None:
    _, raw = example(name)
    shown = re.findall(r"^\| (\d+): `(\w\w)`", EXAMPLES[name], re.M)
    shown += re.findall(r"[Bb]yte (\d+)(?: is|,) 0x(\w\w)\b", EXAMPLES[name])
    for at, byte in shown:
        assert raw[0][int(at)] == int(byte, 16), f"byte {at}"
    for byte, bits in re.findall(r"`(\w\w)` = ([01 ]+)\b", EXAMPLES[name]):
        assert int(byte, 16) == int(bits.replace(" ", ""), 2)


@pytest.mark.parametrize("name", [n for n, text in EXAMPLES.items() if "these bytes again" in text])
def test_worked_examples_encode_to_their_bytes(name: str) -> None:
    packed, raw = example(name)
    assert bytes_of(codecs.get(name).encode(packed.decode())) == raw


def test_the_table_of_elements_is_what_minifloat_has() -> None:
    from packfmt import minifloat

    rows = re.findall(r"^\| `(\w+)` \| [^|]+\|[^|]+\| (\d+) \| (\S+|127 / 64) \| (\S+|1 / 64) \|", page("mx"), re.M)
    assert len(rows) == 6
    for name, emax, largest, smallest in rows:
        found = minifloat.numbers(name)
        found = found[np.isfinite(found) & (found > 0)]
        assert found.max() == eval(largest.replace("^", "**")) and found.min() == eval(smallest.replace("^", "**"))
        assert 2 ** int(emax) <= found.max() < 2 ** (int(emax) + 1)


# format, encoder, codes of +0.0 and -0.0, and the scale of a block of zeros
ZEROS = [
    *(("mxfp4", encoder, 0, 0, 0) for encoder in ("best", "ggml")),
    *(("mxfp4_pairs", encoder, 0, 0, 0) for encoder in ("best", "compressed-tensors")),
    *(("mxfp4_pairs", encoder, 0, 8, 0) for encoder in ("ocp", "torchao")),
    ("mxfp4_pairs", "modelopt", 8, 8, 0),
    *((name, encoder, 0, 32, 0) for name in ("mxfp6_e2m3", "mxfp6_e3m2") for encoder in ("best", "ocp")),
    *(("mxfp8_e4m3", encoder, 0, 128, 0) for encoder in ("best", "ocp", "compressed-tensors", "modelopt")),
    *(("mxint8", encoder, 0, 0, 0) for encoder in ("best", "ocp")),
    *(("nvfp4_modelopt", encoder, 0, 0, 0) for encoder in ("best", "tiles", "four_over_six")),
    ("nvfp4_modelopt", "modelopt", 0, 0, 0x38),
    ("nvfp4_modelopt", "torchao", 0, 8, 0x08),
    ("nvfp4_ct", "compressed-tensors", 0, 0, 0x20),
    *(("nvfp4_plain", encoder, 0, 0, 0) for encoder in ("best", "ggml")),
    *(("nvint4", encoder, 0, 0, 0) for encoder in ("best", "rtn")),
    *(("fp4_ue5m3", encoder, 0, 8, 0) for encoder in ("best", "rtn")),
    *(("if4", encoder, 0, 8, 0) for encoder in ("best", "fouroversix")),
    ("hif4", "best", 0, 8, 0),
    ("hif4", "amct", 0, 0, 0),
    ("fp8_row", "amax", 0, 128, 2.0**-23),
    ("fp8_row_bf16", "amax", 0, 128, 2.0**-7),
    ("fp8_block_e8m0", "amax", 0, 128, 0),
    ("e2m2_row", "best", 0, 16, 2.0**-26),
    ("e2m2_row", "amax", 0, 16, 2.0**-23),
    ("ct_int4_g32_f32", "compressed-tensors", 8, 8, 2.0**-23),
    ("ct_int4_g32_asym", "compressed-tensors", 8, 8, 2.0**-7),
]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "encoder", "plus", "minus", "scale"), ZEROS)
def test_zeros_become_what_the_pages_say(name: str, encoder: str, plus: int, minus: int, scale: float) -> None:
    for sign, wanted in ((1, plus), (-1, minus)):
        parts = codecs.get(name).encode(np.zeros((16, 64), F32) * F32(sign), encoder).unpack()
        codes, found = parts["codes"], parts["scale"]
        assert (codes.view(np.uint8) == wanted).all()
        if isinstance(scale, int):
            assert found.dtype.itemsize == 1 and (found.view(np.uint8) == scale).all()
        else:
            assert (found.astype(F32) == F32(scale)).all()
        assert parts.get("global_scale", np.ones(1)).reshape(-1).tolist() == [1]


def test_every_encoder_of_a_listed_format_stands_on_its_page() -> None:
    for module in ("mxfp4", "mx", "nvfp4", "fp4", "fp8"):
        for name in codecs.FAMILIES.get(module, (module,)):
            told = set(re.findall(r"`([\w-]+)`", page(module)))
            assert set(codecs.get(name).encoders) <= told, name


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("mxfp4", "mxfp4_pairs"),
        ("mxfp4_pairs", "mxfp4_e8m0"),
        ("mxfp4_pairs", "e2m1_g32"),
        ("mxfp4_pairs", "nvfp4_ct"),
        ("mxfp4", "nvfp4_plain"),
        ("mxint8", "q8_0"),
        ("nvfp4", "nvfp4_ct"),
        ("nvfp4_ct", "nvfp4_modelopt"),
        ("nvfp4_modelopt", "nvfp4_swizzled"),
        ("nvint4", "ct_int4_g16_f32"),
        ("fp4_ue5m3", "e2m1_g16"),
        ("e2m1_g32", "e2m1b3_g32"),
        ("ct_int3_g32", "ct_int3_legacy_g32"),
        ("ct_int4_g32", "ct_int4_g32_f32"),
        ("nvfp4_h16", "nvfp4_ct_h16"),
    ],
)
def test_what_the_pages_call_exactly_convertible_comes_back(source: str, target: str) -> None:
    weight = (np.random.default_rng(43).standard_normal((128, 128)) * 0.02).astype(F32)
    packed = codecs.get(source).encode(weight)
    there = packed.repack(codecs.get(target).layout)
    assert (there.decode() == packed.decode()).all()
    assert bytes_of(there.repack(packed.layout)) == bytes_of(packed)


# ---------------------------------------------------------------- accuracy

SMALL = (64, 1024)


def errors(name: str, kind: str) -> dict[str, float]:
    codec = codecs.get(name)
    return {encoder: accuracy.octave(codec, encoder, kind, SMALL, seed=7) for encoder in codec.encoders}


@pytest.mark.parametrize("kind", accuracy.KINDS)
@pytest.mark.parametrize(("name", "most"), [("mxfp4_pairs", 12.6), ("nvfp4_modelopt", 6.7), ("nvfp4_ct", 6.7)])
def test_the_default_is_as_good_as_promised_and_never_worse_than_another_tool(
    name: str, most: float, kind: str
) -> None:
    found = errors(name, kind)
    default, *others = found
    assert default == "best" and others
    assert found[default] <= min(found.values())
    if kind == "gauss":
        assert found[default] <= most


@pytest.mark.parametrize("kind", accuracy.KINDS)
def test_the_default_of_both_formats_is_no_worse_than_ggml(kind: str) -> None:
    assert errors("mxfp4_pairs", kind)["best"] <= errors("mxfp4", kind)["ggml"]
    plain = errors("nvfp4_plain", kind)
    assert plain["best"] <= plain["ggml"] and errors("nvfp4", kind)["best"] <= plain["ggml"]
