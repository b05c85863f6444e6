"""The first formats: their encoders and numbers against gguf's, slow twins, vectors and the spec pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, placement
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError
from tests.slow_encoders import TWINS

F32 = np.float32
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SPEC = Path(__file__).resolve().parents[1] / "spec"
QUANTISED = ("q8_0", "q4_0", "mxfp4", "tq2_0")
DENSE = ("f32", "f16", "bf16")
BLOCK = {"q8_0": 32, "q4_0": 32, "mxfp4": 32, "tq2_0": 256}
SIZE = {"q8_0": 34, "q4_0": 18, "mxfp4": 17, "tq2_0": 66}  # bytes of a block
SCALE_AT = {"q8_0": 0, "q4_0": 0, "tq2_0": 64}  # of the float16 scale in a block
NO_INVERSE = F32(2.0**-128)

quantised = pytest.mark.parametrize("name", QUANTISED)
half_scaled = pytest.mark.parametrize("name", SCALE_AT)


# ---------------------------------------------------------------- helpers


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def encoded(name: str, weight: Floats) -> PackedTensor:
    """Packed by the encoder that gives gguf's bytes."""
    return codecs.get(name).encode(weight, "ggml" if name in QUANTISED else "")


def encode(name: str, weight: Floats) -> bytes:
    (stored,) = encoded(name, weight).components.values()
    return stored.tobytes()


def decode(name: str, blocks: bytes) -> Floats:
    """One row of whatever many blocks."""
    layout = codecs.get(name).layout
    block = layout.block["cols"]
    cols = len(blocks) // layout.nbytes(1, block) * block
    (placed,) = layout.fit(1, cols).components
    stored = np.frombuffer(blocks, layout_dtype(placed.dtype)).reshape(placed.shape)
    return PackedTensor(layout, (1, cols), {placed.name: stored}).decode()


def layout_dtype(name: str) -> np.dtype:
    from packfmt.layout import dtype_of

    return dtype_of(name)


def gguf_encode(name: str, weight: Floats) -> bytes:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(weight, kind(name)).tobytes()


def gguf_decode(name: str, blocks: bytes) -> bytes:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(np.frombuffer(blocks, np.uint8)[None], kind(name)).tobytes()


def narrow(weight: Floats) -> Floats:
    """bfloat16-valued: unlike float32 noise, such weights meet rounding ties."""
    return (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)


def unsigned_zeros(weight: Floats) -> bytes:
    """The bytes, with +0.0 for -0.0."""
    return (weight + F32(0)).tobytes()


def differing(name: str, got: bytes, wanted: bytes, weight: Floats) -> str:
    """The first block that differs, for a failure that one can read."""
    size = SIZE[name]
    for at in range(0, len(wanted), size):
        if got[at : at + size] != wanted[at : at + size]:
            block = weight.reshape(-1, BLOCK[name])[at // size]
            return f"{got[at : at + size].hex()} for {wanted[at : at + size].hex()}, of {block.tolist()}"
    return ""


def assert_parity(name: str, weight: Floats) -> None:
    got, wanted = encode(name, weight), gguf_encode(name, weight)
    assert got == wanted, differing(name, got, wanted, weight)


def distributions(rows: int = 32, cols: int = 512) -> Iterator[Floats]:
    rng = np.random.default_rng(7)
    shape = (rows, cols)
    for drawn in (
        rng.standard_normal(shape),
        rng.standard_t(2, shape),
        rng.uniform(-1, 1, shape),
        rng.integers(-8, 9, shape),
        rng.integers(-1, 2, shape),
        rng.integers(-127, 128, shape) / 2,
        rng.standard_normal(shape) * np.exp2(rng.integers(-30, 8, shape)),
        np.where(rng.random(shape) < 0.97, 0, -rng.random(shape)),
    ):
        for scale in (1e-6, 1e-4, 0.02, 1, 37, 1e4):
            weight = (drawn * scale).clip(-60000, 60000).astype(F32)
            yield weight
            yield narrow(weight)


def plain_weights(cols: int) -> st.SearchStrategy[Floats]:
    """Blocks that gguf defines: zeros of both signs, and magnitudes of 2^-100 to 2^15, close to each other or not."""
    exponents = st.integers(-100, 15) | st.integers(-3, 3) | st.integers(-26, -14)
    number = st.builds(
        lambda sign, exponent, mantissa, zero: (
            (0.0 if zero else 2.0**exponent * (1 + mantissa * 2.0**-23)) * (-1) ** sign
        ),
        st.booleans(),
        exponents,
        st.integers(0, 127).map(lambda m: m << 16) | st.integers(0, 2**23 - 1),
        st.integers(0, 7).map(lambda z: z == 0),
    )
    some = st.lists(number, min_size=1, max_size=cols)
    return some.map(lambda numbers: np.resize(np.array(numbers, F32), (1, cols)))


# ---------------------------------------------------------------- parity with gguf


@quantised
def test_encoded_bytes_are_gguf_s(name: str) -> None:
    for weight in distributions():
        assert_parity(name, weight)


@pytest.mark.kernels
@quantised
@given(data=st.data())
def test_encoded_bytes_are_gguf_s_for_drawn_blocks(name: str, data: st.DataObject) -> None:
    assert_parity(name, data.draw(plain_weights(256)))


@pytest.mark.kernels
@quantised
@pytest.mark.parametrize("zeros", ([0.0], [-0.0], [0.0, -0.0], [-0.0, 0.0, 0.0]))
def test_zero_blocks_are_gguf_s(name: str, zeros: list[float]) -> None:
    weight = np.resize(np.array(zeros, F32), (1, 256))
    assert_parity(name, weight)
    assert not decode(name, encode(name, weight)).any()


@pytest.mark.kernels
@quantised
def test_the_first_of_equal_peaks_counts(name: str) -> None:
    for pattern in ([1, -1], [-1, 1], [0.5, -1, 1], [0.5, 1, -1]):
        assert_parity(name, np.resize(np.array(pattern, F32), (1, 256)))


@half_scaled
def test_every_subnormal_and_rounded_scale_is_gguf_s(name: str) -> None:
    peaks_per_step = {"q8_0": 127, "q4_0": 8, "tq2_0": 1}[name]
    steps = np.arange(1, 4096, dtype=F32) * F32(2.0**-26)  # halves and quarters of the smallest float16
    rng = np.random.default_rng(3)
    weight = steps[:, None] * peaks_per_step * rng.integers(-8, 9, (len(steps), BLOCK[name])).astype(F32) / F32(8)
    weight[:, 5] = steps * peaks_per_step * np.where(rng.random(len(steps)) < 0.5, -1, 1)
    assert_parity(name, weight.astype(F32))


@quantised
def test_steps_down_to_the_last_that_has_an_inverse_are_gguf_s(name: str) -> None:
    peaks_per_step = {"q8_0": 127, "q4_0": 8, "tq2_0": 1, "mxfp4": 8}[name]
    rng = np.random.default_rng(4)
    for exponent in (-124, -125, -126, -127):
        step = F32(2.0**exponent * 1.015625)
        if name != "mxfp4" or step * 8 >= 2.0**-125:
            codes = rng.integers(-8, 9, (4, 256)).astype(F32) / F32(8)
            assert_parity(name, codes * (step * F32(peaks_per_step)))


def near_powers_of_two() -> Floats:
    """Every float32 peak from 64 numbers below to 64 above every power of two, where gguf defines its exponent."""
    near = np.arange(-64, 65, dtype=np.int64)
    bits = ((np.arange(-124, 128)[:, None] + 127) << 23) + near
    bits = np.concatenate([bits.ravel(), 0x7F800000 + np.arange(-64, 0)])
    return bits.astype(np.uint32).view(F32)


def test_mxfp4_exponents_near_powers_of_two_are_gguf_s() -> None:
    peaks = near_powers_of_two()
    peaks = peaks[peaks >= 2.0**-125]
    rng = np.random.default_rng(5)
    weight = peaks[:, None] * (rng.integers(-32, 33, (len(peaks), 32)) / 32).astype(F32)
    weight[np.arange(len(peaks)), np.arange(len(peaks)) % 32] = peaks
    assert_parity("mxfp4", weight)


def test_mxfp4_exponents_that_round_up_are_as_many_as_the_page_says() -> None:
    page = (SPEC / "formats" / "mxfp4.md").read_text()
    ranges = re.findall(r"^  \| ([-\d to,;]+) \| (\d+) \|$", page, re.M)
    told = {}
    for spans, count in ranges:
        for span in re.split("[,;]", spans):
            first, last = ([int(n) for n in span.split(" to ")] * 2)[:2]
            told.update(dict.fromkeys(range(first, last + 1), int(count)))
    assert sorted(told) == list(range(-124, 129))
    for k, count in told.items():
        top = 0x7F800000 if k == 128 else int(F32(2.0**k).view(np.uint32))
        peaks = np.arange(top - 64, top, dtype=np.uint32).view(F32)
        scales = np.frombuffer(encode("mxfp4", peaks[:, None].repeat(32, 1)), np.uint8).reshape(-1, 17)[:, 0]
        assert (scales == k + 125).tolist() == [False] * (64 - count) + [True] * count, k


@pytest.mark.parametrize("name", DENSE)
def test_dense_bytes_are_gguf_s(name: str) -> None:
    for weight in distributions():
        assert encode(name, weight) == gguf_encode(name, weight)


@pytest.mark.parametrize(("name", "below"), [("f16", 65520.0), ("bf16", 2.0**128 - 2.0**119)])
def test_every_half_of_the_upper_bits_rounds_as_gguf_s(name: str, below: float) -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        weight = (upper | np.uint32(lower)).view(F32)[None]
        weight = weight[:, np.abs(weight[0]) < below]
        assert encode(name, weight) == gguf_encode(name, weight)


# ---------------------------------------------------------------- decoding equals gguf's on everything


def all_scales() -> bytes:
    return np.arange(1 << 16, dtype="<u2").tobytes()


def test_q8_0_decodes_every_code_with_every_scale_as_gguf() -> None:
    scale = np.frombuffer(all_scales(), np.uint8).reshape(-1, 2)
    for codes in np.arange(256, dtype=np.uint8).reshape(8, 32):
        blocks = np.hstack([scale, np.broadcast_to(codes, (1 << 16, 32))]).tobytes()
        assert decode("q8_0", blocks).tobytes() == gguf_decode("q8_0", blocks)


def test_q4_0_decodes_every_code_with_every_scale_as_gguf() -> None:
    scale = np.frombuffer(all_scales(), np.uint8).reshape(-1, 2)
    codes = np.arange(16, dtype=np.uint8) * 17  # code j in both halves
    blocks = np.hstack([scale, np.broadcast_to(codes, (1 << 16, 16))]).tobytes()
    assert decode("q4_0", blocks).tobytes() == gguf_decode("q4_0", blocks)


def test_tq2_0_decodes_every_code_with_every_scale_as_gguf() -> None:
    scale = np.frombuffer(all_scales(), np.uint8).reshape(-1, 2)
    codes = np.resize(np.uint8([0b11100100, 0b00011011]), 64)  # the unused code 3, too
    for at in range(0, 1 << 16, 1 << 14):
        some = scale[at : at + (1 << 14)]
        blocks = np.hstack([np.broadcast_to(codes, (len(some), 64)), some]).tobytes()
        assert decode("tq2_0", blocks).tobytes() == gguf_decode("tq2_0", blocks)


def test_mxfp4_decodes_every_code_with_every_exponent_as_gguf() -> None:
    exponent = np.arange(256, dtype=np.uint8)[:, None]
    blocks = np.hstack([exponent, np.broadcast_to(np.arange(16, dtype=np.uint8) * 17, (256, 16))]).tobytes()
    assert decode("mxfp4", blocks).tobytes() == gguf_decode("mxfp4", blocks)
    got = decode("mxfp4", blocks).reshape(256, 32)
    assert not np.signbit(got[:, 8]).any(), "code 8 is +0.0"
    assert got[255, 1] == 2.0**127
    assert np.isinf(got[253, 6]) and got[0, 1] == 2.0**-128


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_dense_halves_decode_as_gguf_s(name: str) -> None:
    assert decode(name, all_scales()).tobytes() == gguf_decode(name, all_scales())


# ---------------------------------------------------------------- slow twins


def assert_twin(name: str, weight: Floats) -> None:
    wanted = b"".join(TWINS[name](block) for block in weight.reshape(-1, BLOCK[name]))
    got = encode(name, weight)
    assert got == wanted, differing(name, got, wanted, weight)


@pytest.mark.kernels
@quantised
@given(data=st.data())
def test_encoders_equal_their_slow_twins(name: str, data: st.DataObject) -> None:
    assert_twin(name, data.draw(plain_weights(256)))


@pytest.mark.kernels
@quantised
@given(data=st.data())
def test_encoders_equal_their_slow_twins_where_gguf_is_undefined(name: str, data: st.DataObject) -> None:
    bits = st.integers(0, 0x03FFFFFF) | st.integers(0, 0x7F).map(lambda b: b << 18)  # below 2^-119
    numbers = data.draw(st.lists(st.tuples(bits, st.booleans()), min_size=1, max_size=32))
    raw = np.array([b | (0x80000000 if sign else 0) for b, sign in numbers], np.uint32)
    assert_twin(name, np.resize(raw.view(F32), (1, 256)))


def test_mxfp4_equals_its_slow_twin_near_powers_of_two_and_at_the_top() -> None:
    peaks = near_powers_of_two()[::53]
    weight = peaks[:, None] * np.resize(F32([1, -0.75, 0.5, -0.25, 0.0625, 0]), 32)
    assert_twin("mxfp4", weight)
    top = np.uint32(0x7F800000) - np.arange(1, 90, dtype=np.uint32)
    with np.errstate(over="ignore"):
        assert_twin("mxfp4", top.view(F32)[:, None] * np.resize(F32([1, -1, 0.875, 0.8, 0.6, 0.3]), 32))


# ---------------------------------------------------------------- laws


def random_blocks(name: str, count: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return rng.bytes(count * SIZE[name])


@pytest.mark.parametrize("name", (*QUANTISED, *DENSE))
def test_any_bytes_survive_unpack_and_pack(name: str) -> None:
    layout = codecs.get(name).layout
    shape = (3, 4 * layout.block["cols"])
    (placed,) = layout.fit(*shape).components
    rng = np.random.default_rng(11)
    raw = rng.integers(0, 256, prod(placed.shape) * layout_dtype(placed.dtype).itemsize, np.uint8)
    stored = {placed.name: raw.view(layout_dtype(placed.dtype)).reshape(placed.shape)}
    packed = placement.pack(layout, shape, placement.unpack(layout, shape, stored))
    assert packed[placed.name].tobytes() == raw.tobytes()


@quantised
def test_encoding_what_was_decoded_gives_the_same_numbers(name: str) -> None:
    for weight in distributions():
        once = encoded(name, weight)
        again = encoded(name, once.decode())
        assert unsigned_zeros(again.decode()) == unsigned_zeros(once.decode())


@pytest.mark.kernels
@quantised
@given(data=st.data())
def test_encoding_what_was_decoded_gives_the_same_drawn_numbers(name: str, data: st.DataObject) -> None:
    once = decode(name, encode(name, data.draw(plain_weights(256))))
    assert unsigned_zeros(decode(name, encode(name, once))) == unsigned_zeros(once)


@half_scaled
def test_encoding_what_was_decoded_gives_the_same_bytes_where_the_scale_is_not_zero(name: str) -> None:
    for weight in distributions():
        once = encode(name, weight)
        again = encode(name, decode(name, once).reshape(weight.shape))
        blocks, others = (np.frombuffer(b, np.uint8).reshape(-1, SIZE[name]) for b in (once, again))
        scale = blocks[:, SCALE_AT[name] :][:, :2].copy().view("<u2")[:, 0]
        real = (scale & 0x7FFF) != 0
        assert blocks[real].tobytes() == others[real].tobytes()


def test_mxfp4_any_finite_block_keeps_its_numbers_byte_for_byte() -> None:
    exponent = np.arange(256, dtype=np.uint8).repeat(40)[:, None]
    rng = np.random.default_rng(12)
    top = rng.integers(1, 9, (len(exponent), 1))  # blocks of small codes only, too
    codes = rng.integers(0, 256, (len(exponent), 16)) % top + 8 * rng.integers(0, 2, (len(exponent), 16))
    codes = codes + 16 * (rng.integers(0, 256, codes.shape) % top) + 128 * rng.integers(0, 2, codes.shape)
    blocks = np.hstack([exponent, codes.astype(np.uint8)])
    weight = decode("mxfp4", blocks.tobytes()).reshape(-1, 32)
    weight = weight[np.isfinite(weight).all(1)]
    assert len(weight) > 254 * 40
    assert decode("mxfp4", encode("mxfp4", weight)).tobytes() == weight.tobytes()


@half_scaled
def test_which_arbitrary_blocks_keep_their_numbers(name: str) -> None:
    """q8_0: largest |code| 127 or all zero; q4_0: a code 0 or all 8; tq2_0: no code 3. Finite scales."""
    blocks = np.frombuffer(random_blocks(name, 4096, 13), np.uint8).reshape(-1, SIZE[name]).copy()
    scale = blocks[:, SCALE_AT[name] :][:, :2]
    scale[:, 1] &= 0xBF  # finite
    if name == "tq2_0":
        codes = blocks[:2048, :64]
        codes &= ~((codes >> 1) & 0x55)  # 3 becomes 2
    elif name == "q4_0":
        blocks[:1024, 2] &= 0xF0
        blocks[1024:2048, 2:] = 0x88
    else:
        codes = blocks[:1024, 2:]
        codes[codes == 128] = 0
        codes[:, 7] = 127
        blocks[1024:2048, 2:] = 0
    weight = decode(name, blocks.tobytes()).reshape(-1, BLOCK[name])
    again = decode(name, encode(name, weight)).reshape(weight.shape)
    assert unsigned_zeros(again[:2048]) == unsigned_zeros(weight[:2048])
    raw = placement.unpack(codecs.get(name).layout, weight.shape, {"blocks": blocks})["codes"]
    claims = {
        "q8_0": (np.abs(raw.astype(int)).max(1) == 127) | ~raw.any(1),
        "q4_0": (raw == 0).any(1) | (raw == 8).all(1),
        "tq2_0": (raw < 3).all(1),
    }[name]
    kept = ((again + F32(0)) == (weight + F32(0))).all(1)
    assert kept[claims].all()
    assert not kept[~claims].all(), "the page says that other blocks do not keep theirs"


@pytest.mark.kernels
@quantised
def test_the_number_of_threads_changes_no_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from packfmt.kernels import quantize

    monkeypatch.setattr(quantize, "LEAST_WEIGHTS", 1)
    weight = np.random.default_rng(14).standard_normal((7, 256)).astype(F32)
    found = set()
    for count in ("1", "2", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        found.add(encode(name, weight))
    assert len(found) == 1


@pytest.mark.parametrize("name", (*QUANTISED, *DENSE))
def test_no_rows_and_no_columns_encode(name: str) -> None:
    for shape in ((0, 256), (2, 0), (0, 0)):
        packed = encoded(name, np.zeros(shape, F32))
        assert packed.nbytes == 0 and packed.decode().shape == shape


@quantised
def test_weights_in_strided_memory_encode_the_same(name: str) -> None:
    from packfmt.kernels import quantize

    weight = np.random.default_rng(15).standard_normal((4, 512)).astype(F32)
    door = getattr(quantize, name)
    one, other = door(weight[::2, :256]), door(weight[::2, :256].copy())
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}


# ---------------------------------------------------------------- edges and refusals


@pytest.mark.kernels
@half_scaled
def test_a_scale_beyond_float16_is_refused(name: str) -> None:
    limit = {"q8_0": 127, "q4_0": 8, "tq2_0": 1}[name] * 65520.0
    weight = np.zeros((3, 256), F32)
    weight[1, 3], weight[2, 250] = -limit, np.nextafter(F32(limit), F32(0))
    count = 3 * 256 // BLOCK[name]
    with pytest.raises(LayoutError, match=f"^{name}: 1 of {count} scales overflow float16; use bf16 or mxfp4$"):
        encoded(name, weight)
    weight[1, 3] = 0
    assert np.isfinite(encoded(name, weight).decode()).all()


@pytest.mark.kernels
@half_scaled
def test_steps_without_inverse_get_codes_of_zero(name: str) -> None:
    peaks_per_step = {"q8_0": 127, "q4_0": 8, "tq2_0": 1}[name]
    zero = {"q8_0": 0, "q4_0": 8, "tq2_0": 1}[name]
    for step, plain in ((2.0**-128, True), (2.0**-149, True), (2.0**-127, False)):
        weight = np.full((1, 256), step * peaks_per_step, F32)
        codes = encoded(name, weight).unpack()["codes"]
        assert (codes == zero).all() == plain


@pytest.mark.kernels
def test_mxfp4_small_peaks_have_exponent_zero() -> None:
    weight = np.array([1.5, -0.5, 0.5, 7, -7.01, 0.501, 2, 0], F32).repeat(4)[None] * F32(2.0**-128)
    packed = encoded("mxfp4", weight)
    assert packed.unpack()["scale"].tolist() == [[0]]
    assert packed.unpack()["codes"][0, ::4].tolist() == [1, 0, 0, 5, 14, 1, 2, 0]


@pytest.mark.kernels
def test_mxfp4_ties_go_toward_zero() -> None:
    halfway = [0.5, 1.5, 2.5, 3.5, 5, 7, 10, 8]
    weight = np.array([*halfway, *(-h for h in halfway)], F32).repeat(2)[None]
    codes = encoded("mxfp4", weight).unpack()["codes"][0, ::2]
    assert codes.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 0, 9, 10, 11, 12, 13, 14, 14]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "limit", "wider"), [("f16", 65520.0, "bf16"), ("bf16", 2.0**128 - 2.0**119, "f32")])
def test_a_cast_that_would_make_an_infinity_is_refused(name: str, limit: float, wider: str) -> None:
    weight = np.array([[limit, -limit, np.inf, np.nan, np.nextafter(F32(limit), F32(0))]], F32)
    with pytest.raises(LayoutError, match=f"^{name}: 2 of 5 weights overflow .*; use {wider}$"):
        encoded(name, weight)
    got = encoded(name, weight[:, 2:]).decode()[0]
    assert np.isposinf(got[0]) and np.isnan(got[1]) and np.isfinite(got[2])


def test_f32_keeps_every_bit() -> None:
    weight = np.random.default_rng(16).integers(0, 1 << 32, (4, 256), np.uint32).view(F32)
    weight[0, :4] = [np.nan, -np.inf, -0.0, 1e-45]
    assert encode("f32", weight) == weight.tobytes() == decode("f32", weight.tobytes()).tobytes()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_dense_halves_keep_every_number_through_decode_and_encode(name: str) -> None:
    raw = np.frombuffer(all_scales(), "<u2")
    weight = decode(name, all_scales())
    numbers = ~np.isnan(weight[0])
    assert encode(name, weight[:, numbers]) == raw[numbers].tobytes()


# ---------------------------------------------------------------- vectors and pages


def vector(name: str, file: str) -> bytes:
    return (SPEC / "vectors" / name / file).read_bytes()


def vector_shape(name: str, file: str) -> tuple[int, ...]:
    manifest = json.loads((SPEC / "vectors" / "manifest.json").read_text())
    return tuple(manifest[f"{name}/{file}"]["shape"])


@pytest.mark.parametrize("name", (*QUANTISED, *DENSE))
def test_vectors_are_encoded_and_decoded_to_the_byte(name: str) -> None:
    weight = np.frombuffer(vector(name, "weights.f32"), "<f4").reshape(vector_shape(name, "weights.f32"))
    assert encode(name, weight) == vector(name, "packed.bin")
    assert decode(name, vector(name, "packed.bin")).tobytes() == vector(name, "decoded.f32")
    assert decode(name, vector(name, "random.bin")).tobytes() == vector(name, "random.f32")


@pytest.mark.parametrize("name", (*QUANTISED, *DENSE))
def test_worked_example(name: str) -> None:
    """The example of spec/formats/<name>.md: every number that it names, and the bytes again."""
    page = (SPEC / "formats" / f"{name}.md").read_text()
    example = page.split("## Worked example")[1].split("\n## ")[0]
    (digits,) = re.findall(r"```hex\n(.*?)```", example, re.S)
    blocks = bytes.fromhex(digits)
    weight = decode(name, blocks)
    layout = codecs.get(name).layout
    (placed,) = layout.fit(*weight.shape).components
    stored = np.frombuffer(blocks, layout_dtype(placed.dtype)).reshape(placed.shape)
    parts = {**placement.unpack(layout, weight.shape, {placed.name: stored}), "w": weight}
    named = re.findall(r"\b(w|code|scale)\[(\d+)\] = (-?[\d.e-]+)", example)
    assert len(named) >= 3 and {what for what, _, _ in named} == ({"w"} if name in DENSE else {"w", "code", "scale"})
    for what, at, number in named:
        found = parts["codes" if what == "code" else what].reshape(-1)[int(at)]
        assert (float(found), np.signbit(found)) == (float(number), number[0] == "-"), f"{what}[{at}]"
    for at, byte in re.findall(r"^\| (\d+): `(\w\w)`", example, re.M):
        assert blocks[int(at)] == int(byte, 16), f"byte {at}"
    for byte, bits in re.findall(r"`(\w\w)` = ([01 ]+)\b", example):
        assert int(byte, 16) == int(bits.replace(" ", ""), 2)
    assert encode(name, weight) == blocks
