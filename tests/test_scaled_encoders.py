"""Encoders of scaled formats: against slow twins, other people's casts and packages, and what every one promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import slow_scaled as slow
from hypothesis import given
from hypothesis import strategies as st

from packfmt import minifloat
from packfmt.errors import LayoutError
from packfmt.kernels import hif4, scaled, tiles

F32, F64 = np.float32, np.float64
Floats = npt.NDArray[np.float32]
Parts = dict[str, Any]
MOST = float(np.finfo(F32).max)

pytestmark = pytest.mark.kernels

MX = ("float6_e2m3fn", "float6_e3m2fn", "float8_e4m3fn", "float8_e5m2", "int8_f6")
MX_RULES = ("best", "ocp", "compressed-tensors", "modelopt")
GENERAL = ("float3_e2m0b1", "float4_e2m1fn", "float4_e1m2b1", "float4_e3m0b3", "float5_e2m2b1", "float6_e4m1b7",
           "float7_e1m5b4", "float8_e7m0b60", "float8_e3m4b3", "int4")  # fmt: skip
SIXTEEN = [("nvint4", "best"), ("nvint4", "rtn"), ("if4", "best"), ("if4", "fouroversix"), ("fp4_ue5m3", "best"),
           ("fp4_ue5m3", "rtn")]  # fmt: skip
KINDS = ("normal", "bfloat16", "heavy", "coarse", "tiny", "huge", "mixed", "zeros")


def draw_weight(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    """As models have them, and such as bring ties, zeros of both signs and the ends of float32."""
    normal = (rng.standard_normal(shape) * 0.02).astype(F32)
    coarse = (rng.integers(-16, 17, shape) / 8).astype(F32)
    if kind == "bfloat16":
        return slow.bfloat16(normal)
    if kind == "heavy":
        return rng.standard_t(2, shape).astype(F32)
    if kind == "coarse":
        return coarse * F32(2.0 ** rng.integers(-20, 20))
    if kind == "tiny":
        return (normal * 10.0 ** rng.integers(-44, -30)).astype(F32)
    if kind == "huge":
        return (coarse / 2 * rng.choice([MOST, 3e38, 1e30], (shape[0], 1))).clip(-MOST, MOST).astype(F32)
    if kind == "mixed":
        return (normal * 10.0 ** rng.integers(-38, 38, shape)).astype(F32)
    if kind == "zeros":
        return np.where(rng.random((shape[0], 1)) < 0.5, F32(-0.0), coarse) * F32(0.5)
    return normal


@st.composite
def weights(draw: st.DrawFn, cols: tuple[int, ...] = (64, 192), rows: int = 3) -> Floats:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, rows)), draw(st.sampled_from(cols)))
    return draw_weight(draw(st.sampled_from(KINDS)), shape, rng)


@st.composite
def weighed(draw: st.DrawFn, cols: tuple[int, ...] = (64, 192), rows: int = 3) -> tuple[Floats, Floats | None]:
    """A weight, and perhaps the importance of its columns or of every weight."""
    weight = draw(weights(cols, rows))
    kind = draw(st.sampled_from(("none", "columns", "weights")))
    if kind == "none":
        return weight, None
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    importance = rng.random((1 if kind == "columns" else len(weight), weight.shape[1])).astype(F32)
    importance[importance < 0.3] = 0
    return weight, importance


def assert_same(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], name)
        assert found[name].tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name


def decode_mx(parts: Parts, element: str) -> Floats:
    scale = minifloat.numbers("float8_e8m0fnu")[parts["scale"]]
    return np.asarray(minifloat.numbers(element)[parts["codes"]] * np.repeat(scale, 32, axis=1))


def decode_sixteen(parts: Parts, name: str) -> Floats:
    if name == "fp4_ue5m3":
        scale = minifloat.numbers("ufloat8_e5m3")[parts["scale"]]
    else:
        scale = minifloat.numbers("float8_e4m3fn")[parts["scale"] & 127] * parts["global_scale"]
    scale = np.repeat(scale, 16, axis=1)
    four = minifloat.numbers("float4_e2m1fn")[parts["codes"]] * scale
    if name == "fp4_ue5m3":
        return np.asarray(four)
    whole = minifloat.numbers("int4" if name == "nvint4" else "int4_6/7")[parts["codes"]] * scale
    return np.where((np.repeat(parts["scale"], 16, axis=1) > 127) | (name == "nvint4"), whole, four)


def decode_hif4(parts: Parts) -> Floats:
    doublings = np.repeat(parts["shift8"], 8, axis=1) + np.repeat(parts["shift4"], 4, axis=1)
    scale = np.repeat(minifloat.numbers("ufloat8_e6m2")[parts["scale"]], 64, axis=1)
    return np.asarray(np.ldexp(minifloat.numbers("sm4_f2")[parts["codes"]], doublings.astype(np.int32)) * scale)


def square_errors(weight: Floats, decoded: Floats, size: int, importance: Floats | None = None) -> npt.NDArray[F64]:
    """Of every block, relative to its largest weight's square."""
    weighs = np.ones_like(weight) if importance is None else np.broadcast_to(importance, weight.shape)
    peak = np.abs(weight.reshape(-1, size)).max(axis=1, keepdims=True).astype(F64)
    off = (decoded.astype(F64) - weight).reshape(-1, size) / np.where(peak > 0, peak, 1)
    return np.asarray((weighs.reshape(-1, size) * off * off).sum(axis=1))


# ---------------------------------------------------------------- the nearest code


@pytest.mark.parametrize("name", ["float4_e2m1fn", *MX[:4]])
def test_the_nearest_code_is_that_of_ml_dtypes_at_every_number_tie_and_neighbour(name: str) -> None:
    numbers = minifloat.numbers(name)
    finite = np.sort(numbers[np.isfinite(numbers)])
    ties = (finite[:-1] + finite[1:]) / 2
    points = np.concatenate([finite, ties, np.nextafter(ties, F32(-np.inf)), np.nextafter(ties, F32(np.inf))])
    inside = np.concatenate([points, [F32(0.0), F32(-0.0), F32(1e-45), F32(-1e-45)]]).astype(F32)
    expected = inside.astype(getattr(ml_dtypes, name)).view(np.uint8)
    np.testing.assert_array_equal(scaled.nearest(inside[None], numbers)[0], expected)
    beyond = np.array([[finite[-1] * 1.01, 1e30, MOST, finite[0] * 1.01, -MOST]], F32)
    np.testing.assert_array_equal(numbers[scaled.nearest(beyond, numbers)], [[finite[-1]] * 3 + [finite[0]] * 2])


@pytest.mark.parametrize("name", [*GENERAL, "int8_f6", "ufloat8_e5m3"])
def test_the_nearest_code_of_every_other_format_is_that_of_a_search(name: str) -> None:
    numbers = minifloat.numbers(name)
    table = slow.magnitudes(numbers)
    ties = ((table[:-1].astype(F64) + table[1:]) / 2).astype(F32)
    points = np.concatenate([table, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(np.inf)), [F32(MOST)]])
    if not name.startswith("u"):
        points = np.concatenate([points, -points])
        np.testing.assert_array_equal(scaled.nearest(numbers[None], numbers)[0] & len(numbers) - 1 - (name[0] == "i"),
                                      np.arange(len(numbers)) & len(numbers) - 1 - (name[0] == "i"))  # fmt: skip
    ones = np.ones_like(points)
    np.testing.assert_array_equal(scaled.nearest(points[None], numbers)[0], slow.codes_of(points, ones, numbers))


@pytest.mark.parametrize("numbers", [minifloat.numbers("float8_e8m0fnu"), np.array([0, 1, 2, 4, 7, 9, 11, 13], F32)])
def test_numbers_of_no_minifloat_are_refused(numbers: Floats) -> None:
    with pytest.raises(LayoutError, match="codes are those of no minifloat"):
        scaled.element(numbers)


# ---------------------------------------------------------------- MX


@pytest.mark.parametrize("element", MX)
@pytest.mark.parametrize("rule", MX_RULES)
@given(drawn=weighed())
def test_mx_gives_the_bytes_of_its_twin(element: str, rule: str, drawn: tuple[Floats, Floats | None]) -> None:
    numbers = minifloat.numbers(element)
    assert_same(scaled.mx(drawn[0], numbers, rule, drawn[1]), slow.mx(drawn[0], numbers, rule, drawn[1]))


@pytest.mark.parametrize("element", MX)
def test_no_exponent_is_better_than_the_best_of_mx(element: str) -> None:
    rng = np.random.default_rng(3)
    numbers = minifloat.numbers(element)
    kinds = [draw_weight(kind, (2, 128), rng) for kind in ("normal", "heavy", "coarse", "bfloat16")]
    # peaks just above and below powers of two, where exponents beside the floor win
    near = rng.uniform(-1, 1, (4, 128)).astype(F32)
    near[:, ::32] = np.array([[1.0], [1.001], [1.999], [1.76]], F32)
    # a peak that is clipped little, and weights that a finer step spares their ties
    near[0, 1:32] = rng.integers(0, 7, 31) / 32 + 1 / 64
    weight = np.concatenate([*kinds, near])
    parts = scaled.mx(weight, numbers)
    found = square_errors(weight, decode_mx(parts, element), 32)
    least = np.full_like(found, np.inf)
    for code in range(60, 200):
        scale = F32(2.0 ** (code - 127))
        tried = numbers[slow.codes_of(weight, np.full_like(weight, scale), numbers)] * scale
        least = np.minimum(least, square_errors(weight, tried, 32))
    assert (found <= least * (1 + 1e-6)).all()
    floor = scaled.mx(weight, numbers, "ocp")["scale"].astype(int)
    assert element == "int8_f6" or (parts["scale"] > floor).any()
    assert element not in ("int8_f6", "float6_e2m3fn") or (parts["scale"] < floor).any()


@given(drawn=weighed())
def test_the_best_of_mx_is_never_worse_than_a_rule(drawn: tuple[Floats, Floats | None]) -> None:
    weight, importance = drawn
    for element in MX:
        numbers = minifloat.numbers(element)
        best = square_errors(weight, decode_mx(scaled.mx(weight, numbers, "best", importance), element), 32, importance)
        rules = MX_RULES[1:3] if element == "float6_e2m3fn" else MX_RULES[1:2]
        for rule in rules:
            other = square_errors(weight, decode_mx(scaled.mx(weight, numbers, rule), element), 32, importance)
            assert (best <= other * (1 + 1e-5) + 1e-12).all(), (element, rule)


MODELOPT_CODES = (
    "f8f7f7f6f6f5f5f4f4f3f3f2f2f1f1f0f0eeeeececeaeae8e7e5e3e1dedad4c8"
    "48545a5e61636567686a6a6c6c6e6e7070717172727373747475757676777778"
)
TORCHAO = [
    ("float8_e4m3fn", "7878", "fefefefefefdfdfcfcfbfbfafaf9f9f8f8f6f6f4f4f2f2f0efedebe9e6e2dcd0"
                              "505c6266696b6d6f70727274747676787879797a7a7b7b7c7c7d7d7e7e7e7e7e"),
    ("float8_e5m2", "7171", "fbfbfbfbfbfbfafafafaf9f9f9f9f8f8f8f7f7f6f6f5f5f4f4f2f2f0efedeae4"
                            "646a6d6f7072727474757576767777787878797979797a7a7a7a7b7b7b7b7b7b"),
]  # fmt: skip
GOLDEN: Floats = ((np.arange(64) - 31.5) / 8).astype(F32)[None]


def test_mxfp8_of_modelopt() -> None:
    """nvidia-modelopt 0.47.0, MXFP8QTensor.quantize of (i - 31.5) / 8."""
    parts = scaled.mx(GOLDEN, minifloat.numbers("float8_e4m3fn"), "modelopt")
    assert parts["scale"].tobytes().hex() == "7979"
    assert parts["codes"].tobytes().hex() == MODELOPT_CODES


def test_mxfp8_of_torchao() -> None:
    """torchao 0.18.0, to_mx of (i - 31.5) / 8 with ScaleCalculationMode.FLOOR, float8_e4m3fn and float8_e5m2."""
    for element, scale, codes in TORCHAO:
        parts = scaled.mx(GOLDEN, minifloat.numbers(element), "ocp")
        assert (parts["scale"].tobytes().hex(), parts["codes"].tobytes().hex()) == (scale, codes)


# ---------------------------------------------------------------- blocks of sixteen


@pytest.mark.parametrize(("name", "rule"), SIXTEEN)
@given(drawn=weighed(), times=st.sampled_from([0, 1, 1, 1, 3]))
def test_blocks_of_sixteen_give_the_bytes_of_their_twins(
    name: str, rule: str, drawn: tuple[Floats, Floats | None], times: int
) -> None:
    choice: dict[str, Any] = {"rule": rule, "importance": drawn[1]}
    if name != "fp4_ue5m3" and times:
        choice["peak"] = min(MOST, float(np.abs(drawn[0]).max()) * times)
    assert_same(getattr(scaled, name)(drawn[0], **choice), getattr(slow, name)(drawn[0], **choice))


@pytest.mark.parametrize(("name", "rule"), [("nvint4", "rtn"), ("if4", "fouroversix"), ("fp4_ue5m3", "rtn")])
def test_no_scale_is_better_than_the_best_by_much_and_no_rule_is(name: str, rule: str) -> None:
    """All 126 (UE5M3: 254) scales of every block, with the same global scale."""
    rng = np.random.default_rng(9)
    weight = np.concatenate([draw_weight(kind, (4, 128), rng) for kind in ("normal", "heavy", "bfloat16")])
    parts = getattr(scaled, name)(weight)
    found = square_errors(weight, decode_sixteen(parts, name), 16)
    least = np.full_like(found, np.inf)
    for code in range(1, 255 if name == "fp4_ue5m3" else 127):
        for mark in (0, 128) if name == "if4" else (0,):
            scale = np.full_like(parts["scale"], code + mark)
            whole = F32(1) if name == "fp4_ue5m3" else parts["global_scale"][0]
            number = (slow.E5M3 if name == "fp4_ue5m3" else slow.E4M3)[code] * whole
            kind, per_unit = (slow.int_numbers(4), 7 / 6 if mark else 1) if mark or name == "nvint4" else (slow.FP4, 1)
            codes = slow.codes_of(weight, np.full_like(weight, number), kind, per_unit)
            tried = {"codes": codes, "scale": scale, "global_scale": np.array([whole])}
            least = np.minimum(least, square_errors(weight, decode_sixteen(tried, name), 16))
    assert (found <= least * 1.02).all() and found.sum() <= least.sum() * (1 + 1e-4)
    other = square_errors(weight, decode_sixteen(getattr(scaled, name)(weight, rule), name), 16)
    assert found.sum() < other.sum() * 0.97


@given(weight=weights())
def test_the_best_global_scale_is_the_smallest_power_of_two_that_suffices(weight: Floats) -> None:
    for name, largest in (("nvint4", 7), ("if4", 6)):
        (scale,) = getattr(scaled, name)(weight)["global_scale"].tolist()
        peak = float(np.abs(weight).max())
        assert np.frexp(scale)[0] == 0.5
        assert peak <= scale * 448 * largest
        assert scale == (1 if not peak else 2.0**-117) or peak > scale / 2 * 448 * largest


def test_tensors_that_share_a_peak_share_a_global_scale() -> None:
    rng = np.random.default_rng(4)
    some = [draw_weight("normal", (2, 64), rng) * F32(factor) for factor in (1, 5)]
    peak = max(float(np.abs(weight).max()) for weight in some)
    for name, rule in SIXTEEN[:4]:
        one, other = (getattr(scaled, name)(weight, rule, peak=peak)["global_scale"] for weight in some)
        assert one == other == getattr(scaled, name)(some[1], rule)["global_scale"]


# ---------------------------------------------------------------- HiF4


@given(weight=weights())
def test_hif4_of_amct_gives_the_bytes_of_its_twin(weight: Floats) -> None:
    assert_same(hif4.hif4(weight, "amct"), slow.hif4_amct(weight))


@given(drawn=weighed(rows=2))
def test_the_best_hif4_gives_the_bytes_of_its_twin(drawn: tuple[Floats, Floats | None]) -> None:
    with np.errstate(over="ignore"):
        expected = slow.hif4_best(*drawn)
    assert_same(hif4.hif4(drawn[0], "best", drawn[1]), expected)


def test_hif4_of_amct_on_the_example() -> None:
    """(i - 31.5) / 8, the bytes of hif4_pack in Huawei AMCT, quantization/dtypes/hifp_impl.py."""
    parts = hif4.hif4(GOLDEN, "amct")
    bits = np.concatenate([parts["shift8"], parts["shift4"]], axis=1)
    assert bytes([parts["scale"][0, 0], *np.packbits(bits)]).hex() == "bcc3fc3f"
    pairs = parts["codes"][0, ::2] | parts["codes"][0, 1::2] << 4
    assert pairs.tobytes().hex() == "ffffffeeeeddddccffefdecdffdebc9a21436577546576774455556666777777"


@given(weight=weights())
def test_the_best_hif4_is_hardly_ever_worse_than_amct(weight: Floats) -> None:
    """AMCT's scale is among those tried, with the best doublings; its codes come from an inverse that is rounded."""
    best = square_errors(weight, decode_hif4(hif4.hif4(weight)), 64)
    other = square_errors(weight, decode_hif4(hif4.hif4(weight, "amct")), 64)
    assert (best <= other * (1 + 1e-5) + 1e-12).all()


# ---------------------------------------------------------------- tiles


SHARES = [(0, 0), (1, 0), (2, 32), (128, 128), (3, 7)]


@pytest.mark.parametrize("dtype", ["<f4", "bfloat16", "float8_e8m0fnu"])
@pytest.mark.parametrize("rule", ["amax", "compressed-tensors"])
@given(weight=weights((1, 17, 64, 130), 5), share=st.sampled_from(SHARES))
def test_fp8_gives_the_bytes_of_its_twin(dtype: str, rule: str, weight: Floats, share: tuple[int, int]) -> None:
    assert_same(tiles.fp8(weight, share, dtype, rule), slow.fp8(weight, share, dtype, rule))


def test_fp8_blocks_at_the_edges_have_their_own_scales() -> None:
    weight = np.ones((130, 260), F32)
    weight[128:, 256:] = 448
    parts = tiles.fp8(weight, (128, 128))
    assert parts["scale"].shape == (2, 3) and parts["scale"][1, 2] == 1 and parts["scale"][0, 0] == F32(1 / 448)
    assert (parts["codes"] == 0x7E).all()


@pytest.mark.parametrize("element", GENERAL)
@pytest.mark.parametrize("rule", ["best", "amax"])
@given(drawn=weighed((8, 40), 3), share=st.sampled_from([(0, 0), (1, 0), (1, 8), (2, 16)]))
def test_minifloats_give_the_bytes_of_their_twin(
    element: str, rule: str, drawn: tuple[Floats, Floats | None], share: tuple[int, int]
) -> None:
    numbers = minifloat.numbers(element)
    found = tiles.minifloat(drawn[0], numbers, share, rule, drawn[1])
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(found, slow.minifloat(drawn[0], numbers, share, rule, drawn[1]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rule", ["best", "compressed-tensors"])
@given(
    drawn=weighed((8, 40), 3),
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 8]),
    dtype=st.sampled_from(["bfloat16", "<f4", "<f2"]),
)
def test_packed_integers_give_the_bytes_of_their_twin(
    symmetric: bool, rule: str, drawn: tuple[Floats, Floats | None], bits: int, group: int, dtype: str
) -> None:
    if dtype == "<f2":
        drawn = (drawn[0].clip(-30000, 30000), drawn[1])
    found = tiles.packed_int(drawn[0], bits, group, symmetric, dtype, rule, drawn[1])
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(found, slow.packed_int(drawn[0], bits, group, symmetric, dtype, rule, drawn[1]))


# ---------------------------------------------------------------- what all promise


def every_encoder() -> dict[str, tuple[Callable[[Floats], Parts], Callable[[Parts, Floats], Floats]]]:
    """name: (encode, decode), all rules."""
    found: dict[str, Any] = {}
    for element in MX:
        for rule in MX_RULES:
            numbers = minifloat.numbers(element)
            found[f"mx {element} {rule}"] = (
                lambda w, numbers=numbers, rule=rule: scaled.mx(w, numbers, rule),
                lambda parts, w, element=element: decode_mx(parts, element),
            )
    for name, rule in SIXTEEN:
        found[f"{name} {rule}"] = (
            lambda w, name=name, rule=rule: getattr(scaled, name)(w, rule),
            lambda parts, w, name=name: decode_sixteen(parts, name),
        )
    for rule in ("best", "amct"):
        found[f"hif4 {rule}"] = (lambda w, rule=rule: hif4.hif4(w, rule), lambda parts, w: decode_hif4(parts))
    for dtype in ("<f4", "bfloat16", "float8_e8m0fnu"):
        found[f"fp8 {dtype}"] = (
            lambda w, dtype=dtype: tiles.fp8(w, (2, 48), dtype),
            lambda parts, w: decode_tiles(parts, w, "float8_e4m3fn", (2, 48)),
        )
    for element in ("float3_e2m0b1", "float4_e2m1fn", "float8_e3m4b3"):
        for rule in ("best", "amax"):
            numbers = minifloat.numbers(element)
            found[f"minifloat {element} {rule}"] = (
                lambda w, numbers=numbers, rule=rule: tiles.minifloat(w, numbers, (1, 32), rule),
                lambda parts, w, element=element: decode_tiles(parts, w, element, (1, 32)),
            )
    for symmetric in (True, False):
        for rule in ("best", "compressed-tensors"):
            for dtype in ("bfloat16", "<f4"):
                found[f"int4 {symmetric} {rule} {dtype}"] = (
                    lambda w, s=symmetric, r=rule, d=dtype: tiles.packed_int(w, 4, 32, s, d, r),
                    lambda parts, w: decode_integers(parts, 4),
                )
    return found


def decode_tiles(parts: Parts, weight: Floats, element: str, share: tuple[int, int]) -> Floats:
    scale = parts["scale"]
    if scale.dtype == np.uint8:
        scale = minifloat.numbers("float8_e8m0fnu")[scale]
    return np.asarray(minifloat.numbers(element)[parts["codes"]] * slow.spread(scale, weight.shape, share))


def decode_integers(parts: Parts, bits: int) -> Floats:
    cols = parts["codes"].shape[1] // parts["scale"].shape[1]
    zero = parts.get("zero", np.full(parts["scale"].shape, 1 << bits - 1, np.uint8)).astype(F32)
    steps = parts["codes"].astype(F32) - np.repeat(zero, cols, axis=1)
    return np.asarray(steps * np.repeat(parts["scale"], cols, axis=1))


ENCODERS = every_encoder()


@pytest.mark.parametrize("name", ENCODERS)
@given(weight=weights())
def test_what_is_decoded_is_finite_and_zeros_stay_zeros(name: str, weight: Floats) -> None:
    encode, decode = ENCODERS[name]
    parts = encode(weight)
    decoded = decode(parts, weight)
    assert np.isfinite(decoded).all()
    assert not decoded[weight == 0].any()


@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith(("fp8", "minifloat", "int4"))])
def test_blocks_of_zeros_have_scale_byte_0(name: str) -> None:
    weight = np.zeros((2, 128), F32)
    weight[1, 100] = 1
    scale = ENCODERS[name][0](weight)["scale"]
    assert np.count_nonzero(scale) == 1 and scale[1, 100 * scale.shape[1] // 128] > 0
    assert not ENCODERS[name][0](weight[:1])["scale"].any()


@pytest.mark.parametrize("name", ENCODERS)
def test_the_number_of_threads_changes_no_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    weight = np.concatenate([draw_weight(kind, (5, 192), rng) for kind in ("normal", "heavy", "coarse", "mixed")])
    monkeypatch.setattr(scaled, "LEAST_WEIGHTS", 1)
    found = []
    for threads in ("1", "3", "7"):
        monkeypatch.setenv("PACKFMT_THREADS", threads)
        parts = ENCODERS[name][0](weight)
        found.append({part: parts[part].tobytes() for part in parts})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_weight_without_rows_or_columns_has_parts_without(name: str) -> None:
    parts = ENCODERS[name][0](np.zeros((0, 192), F32))
    assert parts["codes"].shape == (0, 192) and len(parts["scale"]) == 0
    parts = ENCODERS[name][0](np.zeros((2, 0), F32))
    assert parts["codes"].shape == (2, 0) and parts["scale"].size == 0


@pytest.mark.parametrize("name", [name for name in ENCODERS if name.startswith("mx") and "best" in name])
def test_weights_that_the_format_holds_come_back(name: str) -> None:
    """Decoded, encoded once more and decoded: nothing is left to lose."""
    encode, decode = ENCODERS[name]
    weight = draw_weight("normal", (4, 192), np.random.default_rng(8))
    once = decode(encode(weight), weight)
    twice = decode(encode(once), weight)
    assert twice.tobytes() == once.tobytes()


def test_what_does_not_fit_is_refused() -> None:
    weight = np.ones((2, 40), F32)
    numbers = minifloat.numbers("float8_e4m3fn")
    for refused, reason in [
        (lambda: scaled.mx(weight, numbers), "40 columns, needs a multiple of 32"),
        (lambda: scaled.mx(weight, numbers, "ggml"), "mx: no rule is called 'ggml'; there are best, ocp"),
        (lambda: scaled.nvint4(weight), "40 columns, needs a multiple of 16"),
        (lambda: scaled.nvint4(weight, "fouroversix"), "nvint4: no rule is called 'fouroversix'"),
        (lambda: scaled.if4(weight, "rtn"), "if4: no rule is called 'rtn'"),
        (lambda: scaled.fp4_ue5m3(weight, "ocp"), "fp4_ue5m3: no rule is called 'ocp'"),
        (lambda: hif4.hif4(weight), "hif4: 40 columns, needs a multiple of 64"),
        (lambda: hif4.hif4(weight, "rtn"), "hif4: no rule is called 'rtn'"),
        (lambda: tiles.fp8(weight, (1, 0), "<f2"), "fp8: no scale dtype is called '<f2'"),
        (lambda: tiles.fp8(weight, (1, 0), rule="best"), "fp8: no rule is called 'best'"),
        (lambda: tiles.minifloat(weight, numbers, (1, 0), "ocp"), "minifloat: no rule is called 'ocp'"),
        (lambda: tiles.packed_int(weight, 9, 0), "packed_int: 9 bits, needs 2 to 8"),
        (lambda: tiles.packed_int(weight, 4, 32), "packed_int: 40 columns, needs a multiple of the group, 32"),
        (lambda: tiles.packed_int(weight * 1e6, 4, 8, dtype="<f2"), "10 of 10 scales overflow float16; use bf16"),
        (lambda: scaled.mx(weight[:, :32], numbers, importance=weight), r"importance is \(2, 40\), needs \(1, 32\)"),
    ]:  # fmt: skip
        with pytest.raises(LayoutError, match=reason):
            refused()


# ---------------------------------------------------------------- compressed-tensors itself


def same_weights() -> list[Floats]:
    """Numbers of bfloat16, so that the package computes in any dtype; most of them are float16 too."""
    rng = np.random.default_rng(2)
    found = [slow.bfloat16(draw_weight(kind, (8, 256), rng)) for kind in ("normal", "heavy")]
    found.append((rng.integers(-16, 17, (8, 256)) / 8).astype(F32))
    found[0][3], found[1][:, :32] = 0, 0
    found[2][1], found[2][2] = abs(found[2][1]), -abs(found[2][2])
    return found


@pytest.fixture
def package() -> Any:
    pytest.importorskip("torch", reason="compressed-tensors needs torch")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationArgs, lifecycle, utils

    def quantize(values: Any, low: Any, high: Any, **said: Any) -> tuple[Any, Any, Any]:
        """Codes as the package keeps them, scale and zero point."""
        args = QuantizationArgs(**said)
        scale, zero = utils.calculate_qparams(low, high, args)
        kept = None if said["symmetric"] else zero
        return lifecycle.forward.quantize(values, scale.to(values.dtype), kept, args), scale, zero

    return quantize


@pytest.mark.clients
@pytest.mark.parametrize(("element", "bits"), [("float8_e4m3fn", 8), ("float6_e2m3fn", 6)])
def test_mx_of_compressed_tensors(package: Any, element: str, bits: int) -> None:
    import torch

    for weight in same_weights():
        values = torch.from_numpy(weight)
        low, high = torch.aminmax(values.unflatten(-1, (-1, 32)), dim=-1)
        kept = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
        codes, scale, _ = package(values, low, high, num_bits=bits, type="float", symmetric=True, strategy="group",
                                  group_size=32, **kept)  # fmt: skip
        parts = scaled.mx(weight, minifloat.numbers(element), "compressed-tensors")
        np.testing.assert_array_equal(np.log2(scale.float().numpy()) + 127, parts["scale"])
        numbers = np.asarray(minifloat.numbers(element)[parts["codes"]])
        assert codes.float().numpy().tobytes() == numbers.tobytes()


@pytest.mark.clients
@pytest.mark.parametrize("dtype", ["<f4", "bfloat16"])
@pytest.mark.parametrize(("strategy", "share"), [("tensor", (0, 0)), ("channel", (1, 0)), ("block", (4, 128))])
def test_fp8_of_compressed_tensors(package: Any, dtype: str, strategy: str, share: tuple[int, int]) -> None:
    import torch

    for weight in same_weights():
        values = torch.from_numpy(weight).to(torch.float32 if dtype == "<f4" else torch.bfloat16)
        said: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
        if strategy == "block":
            cut = values.reshape(2, 4, 2, 128)
            low, high = cut.amin((1, 3)), cut.amax((1, 3))
            said["block_structure"] = [4, 128]
        else:
            low, high = torch.aminmax(values) if strategy == "tensor" else torch.aminmax(values, dim=1, keepdim=True)
        codes, scale, _ = package(values, low, high, **said)
        parts = tiles.fp8(weight, share, dtype, "compressed-tensors")
        assert scale.float().numpy().tobytes() == parts["scale"].tobytes()
        assert codes.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes() == parts["codes"].tobytes()


@pytest.mark.clients
@pytest.mark.parametrize("dtype", ["<f4", "bfloat16", "<f2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32])
def test_packed_integers_of_compressed_tensors(package: Any, dtype: str, symmetric: bool, group: int) -> None:
    import torch

    kept = {"<f4": torch.float32, "bfloat16": torch.bfloat16, "<f2": torch.float16}[dtype]
    for weight, bits in [(weight, bits) for weight in same_weights() for bits in (2, 3, 4, 5, 8)]:
        values = torch.from_numpy(weight).to(kept)
        weight = values.float().numpy()
        low, high = torch.aminmax(values.unflatten(-1, (-1, group or 256)), dim=-1)
        said: dict[str, Any] = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        codes, scale, zero = package(values, low, high, num_bits=bits, type="int", symmetric=symmetric, **said)
        parts = tiles.packed_int(weight, bits, group, symmetric, dtype, "compressed-tensors")
        assert scale.float().numpy().tobytes() == parts["scale"].tobytes()
        np.testing.assert_array_equal(codes.float().numpy() + (1 << bits - 1), parts["codes"])
        if not symmetric:
            np.testing.assert_array_equal(zero.float().numpy() + (1 << bits - 1), parts["zero"])
