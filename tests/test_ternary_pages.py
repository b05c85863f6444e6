"""The ternary formats against their pages, vectors, other people's bytes and the twin in tools/ternary_twin.py."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pages import MANIFEST, ROOT, SPEC, bytes_of, examples, packed_again, packed_of, page, spelled, tool, vector_of

from packfmt import codecs
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError
from packfmt.grids import findings

PAGES = ("bitnet", "i2_s", "q1_0", "q2_0", "sherry", "tq1_0", "tq2_0", "trit_planes")
NAMES = tuple(name for page in PAGES for name in codecs.FAMILIES.get(page, (page,)))
TILED = ("sherry_tile16", "sherry_words32", "sherry_s16_nibbles32", "tq2_0_tile16", "tq1_0_tile16", "ptqtp2_tile16")
MORE = ("mote_2", "tl1_32_8_32", "tl2_32_128_32_96", *TILED)  # whose pages have tests of their own
NUMBERS = {"One": 1, "Eight": 8}
F32 = np.float32

Floats = npt.NDArray[np.float32]


twin = tool("ternary_twin")


# ---------------------------------------------------------------- vectors


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        *((name, "packed", "decoded") for name in (*NAMES, *MORE, "ptq161")),
        *((name, "random", "random") for name in (*NAMES, *MORE)),
    ],
)
def test_vectors_decode_and_pack_to_the_byte(name: str, kind: str, numbers: str) -> None:
    packed, weight = vector_of(name, kind, numbers)
    assert packed.decode().tobytes() == weight
    assert packed_again(packed) == bytes_of(packed)


def encoder_of(name: str) -> str:
    """What packfmt calls the encoder that made a format's packed vector; empty if none did."""
    if name in ("tq1_0", "tq2_0"):
        return "ggml"
    return next((e.get("encoder", "") for k, e in MANIFEST.items() if k.startswith(f"{name}/packed")), "")


@pytest.mark.parametrize("name", [n for n in NAMES if encoder_of(n)])
def test_vectors_encode_to_the_byte(name: str) -> None:
    packed, _ = vector_of(name, "packed", "decoded")
    shape = MANIFEST[f"{name}/weights.f32"]["shape"]
    weight = np.frombuffer((SPEC / "vectors" / name / "weights.f32").read_bytes(), "<f4").reshape(shape)
    assert bytes_of(codecs.get(name).encode(weight, encoder_of(name))) == bytes_of(packed)


@pytest.mark.parametrize("name", ["bitnet", "bitnet_divide"])
def test_bitnet_vectors_that_transformers_packed_are_encoded_again(name: str) -> None:
    """Codes and scale: also 26.75, by which the weights were divided."""
    packed, weight = vector_of(name, "packed", "decoded")
    again = codecs.get(name).encode(np.frombuffer(weight, "<f4").reshape(packed.shape))
    assert bytes_of(again) == bytes_of(packed)


# ---------------------------------------------------------------- the twin, on other draws


@pytest.mark.kernels
@pytest.mark.parametrize("name", twin.TWINS)
def test_any_codes_are_written_and_decoded_as_the_twin_does(name: str) -> None:
    rng = np.random.default_rng(31)
    one = twin.TWINS[name]
    for down, along in ((1, 1), (3, 2), (35, 1)) if one.grows else ((1, 1),):
        rows, cols = down * one.least[0], along * one.least[1]
        shape, values = one.codes(rows, cols)
        codes = rng.integers(0, values, shape)
        scale = rng.standard_normal(one.scales(rows, cols)).astype(one.dtype)
        stored = one.write(codes, scale)
        packed = packed_of(name, (rows, cols), [stored[c.name].tobytes() for c in codecs.get(name).layout.components])
        assert packed.decode().tobytes() == twin.numbers(one, codes, scale).tobytes()
        assert packed_again(packed) == bytes_of(packed)


@pytest.mark.parametrize("name", [n for n, one in twin.TWINS.items() if one.encode])
def test_encoders_choose_as_the_twin_does(name: str) -> None:
    rng = np.random.default_rng(32)
    one = twin.TWINS[name]
    for drawn in (rng.standard_normal((5, 512)), rng.standard_t(3, (5, 512)), rng.integers(-3, 4, (5, 512)) / 4):
        weight = (drawn.astype(F32).view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)
        wanted = one.write(*one.encode(weight))
        got = codecs.get(name).encode(weight, one.encoder)
        assert {k: v.tobytes() for k, v in got.components.items()} == {k: v.tobytes() for k, v in wanted.items()}


# ---------------------------------------------------------------- bytes that others gave
# Hexadecimal written by a NumPy packer that knew neither packfmt nor the twin, made from ggml d99724f2, bitnet.cpp
# 16da220 and ports of llama.cpp pull request 22836; its TQ1_0 and TQ2_0 are byte-equal to gguf 0.19.0.
# Steps are t[j] = (j * j + j // 7) % 3 - 1, quads have code (7 g + 3) % 32, scales are 0.5.

STQ1_0 = "a3816f4d2b09e7c5" * 4 + "9c3963c69c3963c6" + "0038"
GOLDEN = {
    "tq1_0": "4782901198581cf8b76bc2d685b033c80953e723414782901198581cf8b76bc2"
    "e429ee3d35f70d501567a805705c22e38fc1e7560038",
    "tq2_0": "589509901901a02a122162562542640680a84a8488589509901901a02a122162"
    "09901901a02a122162562542640680a84a8488589509901901a02a12216256250038",
    "i2_s": "2556600664400aa88448899558811990022aa112222556600664400aa8844889" + "0000003f",
}
QUADS = (7 * np.arange(64)[None] + 3) % 32


def trits(count: int) -> Floats:
    j = np.arange(count)
    return ((j * j + j // 7) % 3 - 1).astype(F32)[None]


@pytest.mark.kernels
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_of_dense_ternary(name: str) -> None:
    weight = trits(codecs.get(name).layout.block["cols"]) * F32(0.5)
    for encoder in codecs.get(name).encoders:
        assert b"".join(bytes_of(codecs.get(name).encode(weight, encoder))).hex() == GOLDEN[name]


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sherry", {0: [0, 1, -1, -1, 1, 1, 0, -1, 0, -1, 1, -1, -1, -1, 0, -1]}),
        ("sherry_s16", {0: [0, 1, 0, -1, -1, 1, 1, -1, -1, 0, 1, 0, -1, -1, 1, 1], 64: [0, -1, 0, 1, 1, -1, -1, 1]}),
    ],
)
def test_golden_bytes_of_both_orders_of_quads(name: str, steps: dict[int, list[int]]) -> None:
    packed = packed_of(name, (1, 256), [bytes.fromhex(STQ1_0)])
    weight = packed.decode()
    for at, wanted in steps.items():
        assert (weight[0, at : at + len(wanted)] * 2).tolist() == wanted
    for encoder in codecs.get(name).encoders:
        assert bytes_of(codecs.get(name).encode(weight, encoder))[0].hex() == STQ1_0


def test_the_twin_gives_the_golden_bytes() -> None:
    half = np.full((1, 1, 1), 0.5, "<f2")
    assert twin.sherry(QUADS, half, 256)["blocks"].tobytes().hex() == STQ1_0
    for name, stride in (("sherry", 1), ("sherry_s16", 16)):
        weight = packed_of(name, (1, 256), [bytes.fromhex(STQ1_0)]).decode()
        assert (twin.quad_steps(QUADS, stride)[:, 0] * F32(0.5)).tobytes() == weight.astype(np.float64).tobytes()
    codes = (trits(128) + 1).astype(np.int64)
    stored = twin.i2_s(codes, half.astype("<f4"), 128)
    assert b"".join(stored[k].tobytes() for k in ("codes", "scale")).hex() == GOLDEN["i2_s"]
    five = (trits(160) + 1).astype(np.int64).reshape(5, 32).T
    assert twin.base3_bytes(five).tobytes().hex() == GOLDEN["tq1_0"][:64]


TABLES = json.loads((ROOT / "tests" / "data" / "bitnet_tl.json").read_text())


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case["layout"])
def test_the_twin_gives_the_bytes_of_bitnet_cpp(case: dict[str, Any]) -> None:
    """Bytes of bitnet.cpp's own converters (tests/data/README.md), for shapes that its models have."""
    i = np.arange(case["rows"] * case["cols"], dtype=np.int64)
    steps = ((i * i + i // 7 + i // (5 * case["cols"])) % 3 - 1).reshape(case["rows"], 1, case["cols"])
    kind, *found = case["layout"].split("_")
    numbers = [int(n) for n in found]
    if kind == "tl1":
        stored = twin.tl1(twin.pair_codes(steps), np.zeros(1), *numbers)
    else:
        stored = twin.tl2(steps + 1, np.zeros(1), *numbers[2:])
    assert hashlib.sha256(stored["codes"].tobytes()).hexdigest() == case["sha256"]


# ---------------------------------------------------------------- pages


EXAMPLES = dict(examples(PAGES))


def example(name: str) -> tuple[PackedTensor, list[bytes]]:
    (count, cols), *_ = re.findall(r"(\w+) rows? of (\d+) columns", EXAMPLES[name])
    raw = [spelled(digits) for digits in re.findall(r"```hex\n(.*?)```", EXAMPLES[name], re.S)]
    return packed_of(name, (NUMBERS[count], int(cols)), raw), raw


def test_every_page_has_examples() -> None:
    assert set(EXAMPLES) <= set(NAMES)
    assert {codecs.family(name) for name in EXAMPLES} == set(PAGES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples_name_the_numbers(name: str) -> None:
    packed, _ = example(name)
    weight = packed.decode()
    parts = {**packed.unpack(), "w": weight}
    named = re.findall(r"\b(w|code|scale)\[([\d, ]+)\] = (-?[\d.]+)", EXAMPLES[name])
    assert len(named) >= 6 and {what for what, _, _ in named} == {"w", "code", "scale"}
    for what, at, number in named:
        index = tuple(int(i) for i in at.split(","))
        array = parts["codes" if what == "code" else what]
        found = array.reshape(-1)[index] if len(index) == 1 else array[index]
        assert (float(found), np.signbit(found)) == (float(number), number[0] == "-"), f"{what}[{at}]"


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples_show_the_bytes(name: str) -> None:
    _, raw = example(name)
    rows = re.findall(r"^\| (\d+): `(\w\w)`(?:, then `(\w\w)`)?", EXAMPLES[name], re.M)
    rows += [(at, byte, "") for at, byte in re.findall(r"Byte (\d+)(?: is|,) 0x(\w\w)\b", EXAMPLES[name])]
    for at, byte, after in rows:
        assert raw[0][int(at) :][: 1 + bool(after)].hex() == byte + after, f"byte {at}"
    for byte, bits in re.findall(r"`(\w\w)` = ([01 ]+)\b", EXAMPLES[name]):
        assert int(byte, 16) == int(bits.replace(" ", ""), 2)
    for word, bits in re.findall(r"0x(\w{4}) = ([01 ]+)\b", EXAMPLES[name]):
        assert int(word, 16) == int(bits.replace(" ", ""), 2)
    for q, digits in re.findall(r"= (\d+) = ([012]{5})\b", EXAMPLES[name]):
        assert int(digits, 3) == int(q)
    assert rows or name in ("sherry_s16", "sherry_row", "bitnet_divide", "ptqtp2_tied"), "the bytes of another example"


@pytest.mark.parametrize("name", [n for n, text in EXAMPLES.items() if "these bytes again" in text])
def test_worked_examples_encode_to_their_bytes(name: str) -> None:
    packed, raw = example(name)
    every_encoder = "either encoder" in EXAMPLES[name]
    for encoder in codecs.get(name).encoders if every_encoder else ("",):
        assert bytes_of(codecs.get(name).encode(packed.decode(), encoder)) == raw


def test_all_examples_but_those_of_planes_encode_again() -> None:
    kept = {name for name, text in EXAMPLES.items() if "these bytes again" in text}
    assert {codecs.family(name) for name in EXAMPLES.keys() - kept} == {"trit_planes"}


def test_the_examples_of_planes_are_one_weight() -> None:
    weights = {name: example(name)[0].decode().tobytes() for name in EXAMPLES if name.startswith("ptqtp")}
    assert len(weights) == 4 and len(set(weights.values())) == 1
    packed, _ = example("ptqtp2")
    for name in weights:
        assert bytes_of(packed.repack(codecs.get(name).layout)) == example(name)[1]


def test_the_page_lists_the_quads() -> None:
    told = {
        int(c): tuple("-0+".index(x) - 1 for x in q.split())
        for c, q in re.findall(r"(\d+) \| `([-+0 ]+)`", page("sherry"))
    }
    assert [told[c] for c in range(32)] == [tuple(lanes) for lanes in twin.LANES.tolist()]
    for name in codecs.FAMILIES["sherry"]:
        assert tuple(told[c] for c in range(32)) == codecs.get(name).layout.grid["values"]


def test_the_page_lists_the_bytes_that_five_digits_do_not_give() -> None:
    (text,) = re.findall(r"<!-- unused -->\n(.*)\n", page("tq1_0"))
    told = [int(n) for n in text.split(",")]
    written = {(256 * q + 242) // 243 for q in range(243)}
    assert told == sorted(set(range(256)) - written) and len(told) == 13
    layout = codecs.get("tq1_0").layout
    for byte in range(256):
        raw = bytes([byte, *[128] * 47, *[127] * 4, 0, 0])
        (said,) = findings(layout, packed_of("tq1_0", (1, 256), [raw]).unpack()) or [""]
        assert said.startswith("1 of 52 bytes") == (byte in told)


def best(weights: list[float]) -> tuple[float, list[int]]:
    """Scale and codes of one group, from the rule on the pages, in plain Python."""
    sizes = sorted((abs(w) for w in weights), reverse=True)
    fall, total, mean = 0.0, 0.0, 0.0
    for k, size in enumerate(sizes, 1):
        total += size
        last = k == len(sizes) or sizes[k] != size
        if size and last and total * (total / k) > fall:
            fall, mean = total * (total / k), total / k
    scale = float(np.float16(F32(mean)))
    return scale, [2 if w > scale / 2 else 0 if w < -scale / 2 else 1 for w in weights]


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["q2_0", "tq2_0"])
def test_the_best_encoder_follows_the_rule_of_the_pages(name: str) -> None:
    rng = np.random.default_rng(33)
    cols = codecs.get(name).layout.block["cols"]
    for drawn in (
        rng.standard_normal((4, cols)),
        rng.integers(-4, 5, (4, cols)) / 8,
        rng.standard_t(2, (4, cols)) * 1e-5,
    ):
        weight = drawn.astype(F32)
        parts = codecs.get(name).encode(weight).unpack()
        for row, codes, scale in zip(weight, parts["codes"], parts["scale"], strict=True):
            assert (float(scale[0]), codes.tolist()) == best(row.tolist())


@pytest.mark.parametrize(
    ("name", "zeros"),
    [
        ("tq1_0", "80" * 48 + "7f" * 4 + "0000"),
        ("tq2_0", "55" * 64 + "0000"),
        ("q1_0", "0000" + "ff" * 16),
        ("q2_0", "0000" + "55" * 16),
        ("i2_s", "55" * 32 + "00000000"),
        ("sherry", "00" * 42),
        ("bitnet", "55" * 4 + "0000"),
        ("bitnet_divide", "55" * 4 + "803f"),
        ("ptqtp2", "55" * 64 + "00000000"),
    ],
)
def test_all_zero_weights_become_what_the_pages_say(name: str, zeros: str) -> None:
    cols = codecs.get(name).layout.block["cols"]
    for weight in (np.zeros((1, cols), F32), -np.zeros((1, cols), F32)):
        weight = np.tile(weight, (4, 4)) if "bitnet" in name else weight
        packed = codecs.get(name).encode(weight)
        assert b"".join(bytes_of(packed)).hex() == zeros
        assert not packed.decode().any() and not np.signbit(packed.decode()).any()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("sherry", "tq2_0"),
        ("sherry", "tq1_0"),
        ("sherry", "sherry_g128"),
        ("sherry", "sherry_t32"),
        ("sherry", "sherry_s16_perm"),
        ("sherry_s16", "sherry_t32_s16"),
        ("tq1_0", "tq2_0"),
        ("tq2_0", "q2_0"),
        ("q1_0", "ptqtp1"),
        ("i2_s", "i2_s_arm"),
        ("ptqtp1", "ptqtp1_b3"),
        ("ptqtp2_tied", "ptqtp2_n4_tied"),
    ],
)
def test_what_the_pages_call_exactly_convertible_comes_back(source: str, target: str) -> None:
    packed, _ = vector_of(source, "packed", "decoded")
    there = packed.repack(codecs.get(target).layout)
    assert there.decode().tobytes() == packed.decode().tobytes()
    assert bytes_of(there.repack(packed.layout)) == bytes_of(packed)


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("bitnet", "bitnet_divide", "no power of two"),
        ("tq2_0", "q1_0", "for which there is no code"),
        ("tq2_0", "sherry", "quads have not exactly one zero"),
        ("sherry", "sherry_row", "share one there"),
        ("ptqtp2", "ptqtp2_tied", "not each 3 times the next"),
        ("ptqtp2", "tq2_0", "2 planes"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(source: str, target: str, why: str) -> None:
    rng = np.random.default_rng(35)
    packed = codecs.get(source).encode(rng.standard_normal((4, 512)).astype(F32))
    with pytest.raises(LayoutError, match=why):
        packed.repack(codecs.get(target).layout)
