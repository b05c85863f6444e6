"""The encoders of MXFP4 and NVFP4: other people's bytes, the slow twins, the ends, and that best is best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import slow_fp4 as slow
from hypothesis import given
from hypothesis import strategies as st

from packfmt.errors import LayoutError
from packfmt.kernels import fp4, quantize

Array = npt.NDArray[Any]
F32 = np.float32
LARGEST = np.finfo(F32).max

MX_RULES = tuple(fp4.MX_RULES)
NV_RULES = tuple(fp4.NV_RULES)
DIVIDES = {rule: rule == "compressed-tensors" for rule in NV_RULES}

mx_rules = pytest.mark.parametrize("rule", MX_RULES)
nv_rules = pytest.mark.parametrize("rule", NV_RULES)
kernels = pytest.mark.kernels

# ---------------------------------------------------------------- golden vectors

EIGHTHS = ((np.arange(64, dtype=F32) - F32(31.5)) / F32(8))[None]
GOLDEN_MX = {  # codes two a byte, the first in the low nibble; scales
    "compressed-tensors": (  # compressed-tensors 0.20.0, MXFP4PackedCompressor on torch 2.13.0
        "eeeeddddddddccccccbbbbaaaa99998800111122223333444444555555556666",
        "7f7f",
    ),
    "modelopt": (  # nvidia-modelopt 0.47.0, MXFP4QTensor.quantize
        "eeeeddddddddccccccbbbbaaaa99998800111122223333444444555555556666",
        "7f7f",
    ),
    "torchao": (  # torchao 0.18.0, to_mx with its default, FLOOR
        "ffffffffffffeeeeeeddddccbcab9a8910213243445555666666777777777777",
        "7e7e",
    ),
}
NV_CODES = "ffffffeeeeeeeeddffefeedecdbcab8910324354656676775566666666777777"
GOLDEN_NV = {
    "compressed-tensors": (NV_CODES, "7e76767e", 682.6667),  # 0.20.0, NVFP4PackedCompressor; this one divides
    "modelopt": (NV_CODES, "7e76767e", 0.00146484375),  # 0.47.0, NVFP4QTensor.quantize
    "torchao": (NV_CODES, "7e76767e", 0.00146484375),  # 0.18.0, nvfp4_quantize
}
GGML_NV = (  # quantize_row_nvfp4_ref compiled from ggml d99724f2: four scales, then halves of 16
    "332a2a33efefefefeededededfdfcfcebeae9e0d50616263647475756565656676767676"
)


def pairs(codes: Array) -> str:
    return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8).tobytes().hex()


@kernels
@pytest.mark.parametrize("rule", GOLDEN_MX)
def test_the_bytes_of_other_mxfp4_encoders(rule):
    parts = fp4.mxfp4(EIGHTHS, rule)
    assert (pairs(parts["codes"]), parts["scale"].tobytes().hex()) == GOLDEN_MX[rule]


@kernels
@pytest.mark.parametrize("rule", GOLDEN_NV)
def test_the_bytes_of_other_nvfp4_encoders(rule):
    parts = fp4.nvfp4(EIGHTHS, rule, divides=DIVIDES[rule])
    codes, scale, shared = GOLDEN_NV[rule]
    assert (pairs(parts["codes"]), parts["scale"].tobytes().hex()) == (codes, scale)
    assert parts["global_scale"].tobytes() == F32(shared).tobytes()


@kernels
def test_the_bytes_of_ggml_nvfp4():
    parts = fp4.nvfp4(EIGHTHS, "ggml", plain=True)
    halves = parts["codes"].reshape(4, 2, 8)
    block = parts["scale"].tobytes() + (halves[:, 0] | halves[:, 1] << 4).astype(np.uint8).tobytes()
    assert block.hex() == GGML_NV
    assert parts["global_scale"].tolist() == [1.0]
    decoded = gguf.quants.dequantize(np.frombuffer(block, np.uint8), gguf.GGMLQuantizationType.NVFP4)
    assert decoded.tobytes() == slow.decode_nv(parts).tobytes()


@kernels
def test_ggml_scales_are_those_of_gguf():
    peaks = np.concatenate([around(slow.E4M3), around(np.linspace(0, 500, 300)), around(2.0 ** np.arange(-30, 20))])
    weight = np.zeros((len(peaks), 16), F32)
    weight[:, 5] = np.abs(peaks) * F32(6)
    wanted = gguf.quants.NVFP4.fp32_to_ue4m3(weight[:, 5] / F32(6))
    assert fp4.nvfp4(weight, "ggml")["scale"][:, 0].tobytes() == wanted.tobytes()


# ---------------------------------------------------------------- the twins


def around(numbers: Array) -> Array:
    """float32 numbers with their neighbours."""
    middle = np.asarray(numbers, F32)
    return np.concatenate([np.nextafter(middle, F32(-np.inf)), middle, np.nextafter(middle, F32(np.inf))])


def bf16(numbers: Array) -> Array:
    return (np.asarray(numbers, F32).view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)


def weights(kind: str, rows: int = 19, cols: int = 160) -> Array:
    """Rows that end a band of 16 early, columns that end a row of lanes early."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    gauss = rng.standard_normal((rows, cols)).astype(F32)
    runs = rng.integers(-20, 10, (rows, cols // 16)).repeat(16, 1)
    found = {
        "gaussian": lambda: gauss * F32(0.02),
        "bf16": lambda: bf16(gauss * F32(0.02)),
        "eighths": lambda: rng.integers(-24, 25, (rows, cols)).astype(F32) / F32(8),
        "zeros": lambda: np.where(rng.random((rows, cols)) < 0.9, np.copysign(F32(0), gauss), gauss),
        "blocks": lambda: np.ldexp(gauss, runs),
        "wide": lambda: np.ldexp(gauss, rng.integers(-60, 60, (rows, cols))),
        "largest": lambda: np.clip(gauss.astype(np.float64) * 2.0**127, -LARGEST, LARGEST),
        "near the smallest normal": lambda: np.ldexp(gauss, -124),
        "subnormal": lambda: np.ldexp(gauss, -140),
        "ties": lambda: rng.choice(around([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 8]), (rows, cols)) * F32(2),
    }[kind]()
    found[2] = F32(0)
    found[3, :32] = -F32(0)
    return np.ascontiguousarray(found, F32)


KINDS = (
    "gaussian",
    "bf16",
    "eighths",
    "zeros",
    "blocks",
    "wide",
    "largest",
    "near the smallest normal",
    "subnormal",
    "ties",
)
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_same(found: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert found.keys() == wanted.keys()
    for key, part in wanted.items():
        assert found[key].dtype == part.dtype and found[key].shape == part.shape, key
        assert found[key].tobytes() == part.tobytes(), key


@mx_rules
@kinds
def test_mxfp4_is_what_the_slow_twin_finds(rule, kind):
    weight = weights(kind)
    assert_same(fp4.mxfp4(weight, rule), slow.mxfp4(weight, rule))


@nv_rules
@kinds
@pytest.mark.parametrize("plain", (False, True))
def test_nvfp4_is_what_the_slow_twin_finds(rule, kind, plain):
    weight = weights(kind)
    assert_same(fp4.nvfp4(weight, rule, DIVIDES[rule], plain), slow.nvfp4(weight, rule, plain))


def finite_weights(cols: int) -> st.SearchStrategy[Array]:
    """Any bits but those of infinities and NaN."""
    bits = st.integers(0, 2**32 - 1).map(lambda b: b if b >> 23 & 255 != 255 else b ^ 1 << 30)
    rows = st.integers(1, 2).flatmap(lambda n: st.lists(bits, min_size=n * cols, max_size=n * cols))
    return rows.map(lambda b: np.array(b, np.uint32).view(F32).reshape(-1, cols))


@kernels
@given(finite_weights(32))
def test_any_finite_weights_are_encoded_as_by_the_twins_and_decode_to_finite_numbers(weight):
    for rule in MX_RULES:
        parts = fp4.mxfp4(weight, rule)
        assert_same(parts, slow.mxfp4(weight, rule))
        assert np.isfinite(slow.decode_mx(parts)).all(), rule
    for rule in NV_RULES:
        assert_same(fp4.nvfp4(weight, rule, DIVIDES[rule]), slow.nvfp4(weight, rule))
        for divides in (False, True):
            assert np.isfinite(slow.decode_nv(fp4.nvfp4(weight, rule, divides), divides)).all(), rule


@kernels
@pytest.mark.parametrize("shape", ((96,), (18, 96)))
def test_importance_counts_as_in_the_twins(shape):
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((18, 96)).astype(F32)
    importance = rng.random(shape).astype(F32) ** 4 * F32(3e38)
    counts = np.broadcast_to(importance, weight.shape)
    assert_same(fp4.mxfp4(weight, importance=importance), slow.mxfp4(weight, "best", counts))
    for rule in ("best", "tiles", "four_over_six"):
        found = fp4.nvfp4(weight, rule, importance=importance)
        assert_same(found, slow.nvfp4(weight, rule, importance=counts))
    assert fp4.mxfp4(weight)["scale"].tobytes() != fp4.mxfp4(weight, importance=importance)["scale"].tobytes()


@kernels
def test_what_counts_alone_is_kept_exactly():
    weight = np.random.default_rng(3).standard_normal((4, 64)).astype(F32)
    weight[:, ::16] = 2  # one of each block is that much
    importance = (np.arange(64) % 16 == 0).astype(F32)
    for parts in (fp4.nvfp4(weight, importance=importance), fp4.nvfp4(weight, "tiles", importance=importance)):
        assert (slow.decode_nv(parts)[:, ::16] == 2).all()


# ---------------------------------------------------------------- best is best


def block_errors(weight: Array, decoded: Array, block: int) -> Array:
    miss = weight.astype(np.float64) - decoded
    return (miss * miss).reshape(len(weight), -1, block).sum(-1)


def no_worse(best: Array, other: Array) -> bool:
    """Up to what float32 sums of the errors round."""
    return bool((best <= other * (1 + 1e-6)).all())


ORDINARY = ("gaussian", "bf16", "eighths", "zeros", "blocks", "ties")


@pytest.mark.parametrize("kind", ORDINARY)
def test_no_mxfp4_rule_is_better_in_any_block(kind):
    weight = weights(kind)
    errors = {rule: block_errors(weight, slow.decode_mx(fp4.mxfp4(weight, rule)), 32) for rule in MX_RULES}
    errors["ggml"] = block_errors(weight, slow.decode_mx(quantize.mxfp4(weight)), 32)
    for rule, error in errors.items():
        assert no_worse(errors["best"], error), rule
    if kind in ("gaussian", "bf16"):
        assert errors["best"].sum() < min(errors[rule].sum() for rule in errors if rule != "best")


@pytest.mark.parametrize("kind", ORDINARY)
def test_no_nvfp4_rule_is_better_in_any_block_with_the_same_global_scale(kind):
    weight = weights(kind)
    parts = {rule: fp4.nvfp4(weight, rule, plain=True) for rule in NV_RULES}
    errors = {rule: block_errors(weight, slow.decode_nv(found), 16) for rule, found in parts.items()}
    for rule, error in errors.items():
        assert no_worse(errors["best"], error), rule


@pytest.mark.parametrize("kind", ORDINARY)
def test_best_is_the_least_error_of_all_exponents_and_scales_it_may_try(kind):
    weight = weights(kind, 4, 64)
    mx, nv = fp4.mxfp4(weight), fp4.nvfp4(weight)
    peak = np.abs(weight).reshape(4, -1, 32).max(-1)
    floor = np.vectorize(lambda p: max(0, slow.exponent(p) + 125))(peak)
    tried = []
    for up in (0, 1):
        scale = (floor + up).astype(np.uint8)
        steps = weight.astype(np.float64) / np.repeat(2.0 ** (scale.astype(int) - 127), 32, 1)
        tried.append(block_errors(weight, slow.decode_mx({"codes": slow.e2m1(steps), "scale": scale}), 32))
    assert no_worse(block_errors(weight, slow.decode_mx(mx), 32), np.min(tried, 0))

    shared = nv["global_scale"]
    rounded = slow.e4m3(np.abs(weight).reshape(4, -1, 16).max(-1) / shared[0] / F32(6)).astype(int)
    tried = []
    for code in range(1, 127):
        steps = weight.astype(np.float64) / (slow.E4M3[code] * float(shared[0]))
        parts = {"codes": slow.e2m1(steps), "scale": np.full(rounded.shape, code), "global_scale": shared}
        inside = (code >= rounded - 2) & (code <= rounded + 6)
        tried.append(np.where(inside, block_errors(weight, slow.decode_nv(parts), 16), np.inf))
    assert no_worse(block_errors(weight, slow.decode_nv(nv), 16), np.min(tried, 0))


def test_the_mean_errors_are_those_of_the_accuracy_table():
    """Relative squared errors x 1000 of Gaussian weights; ggml's for comparison, over an octave of sigma."""
    rng = np.random.default_rng(1234)
    gauss = rng.standard_normal((256, 2048)).astype(F32)
    found: dict[str, list[float]] = {"mx": [], "ocp": [], "nv": [], "46": [], "ct": []}
    for octave in np.arange(8) / 8:
        weight = gauss * F32(0.02 * 2**octave)
        decoded = {
            "mx": slow.decode_mx(fp4.mxfp4(weight)),
            "ocp": slow.decode_mx(fp4.mxfp4(weight, "ocp")),
            "nv": slow.decode_nv(fp4.nvfp4(weight)),
            "46": slow.decode_nv(fp4.nvfp4(weight, "four_over_six")),
            "ct": slow.decode_nv(fp4.nvfp4(weight, "compressed-tensors", True), True),
        }
        for key, values in decoded.items():
            found[key].append(block_errors(weight, values, 2048).sum() / (weight.astype(np.float64) ** 2).sum() * 1000)
    mean = {key: float(np.mean(values)) for key, values in found.items()}
    assert mean["mx"] <= 12.6 < mean["ocp"]
    assert mean["nv"] <= 6.7 < mean["46"] < mean["ct"]


# ---------------------------------------------------------------- scales


@kernels
@pytest.mark.parametrize("rule", ("best", "tiles"))
def test_the_global_scale_of_best_is_the_same_number_for_both_conventions(rule):
    for k in (-149, -130, -60, -1, 0, 5, 127):
        for peak in around(np.array([2.0**k, min(1.3125 * 2.0**k, float(LARGEST))])):
            weight = np.full((1, 16), np.abs(peak), F32)
            times, divides = fp4.nvfp4(weight, rule), fp4.nvfp4(weight, rule, divides=True)
            assert np.frexp(times["global_scale"])[0] == 0.5
            assert slow.decode_nv(times).tobytes() == slow.decode_nv(divides, True).tobytes()
            assert float(np.abs(peak)) / 6 / float(times["global_scale"][0]) <= 448


@kernels
def test_the_global_scale_is_the_smallest_power_that_suffices():
    for k in (-100, 0, 90):
        peaks = around(np.array([2688 * 2.0**k]))
        found = [fp4.nvfp4(np.full((1, 16), peak, F32))["global_scale"][0] for peak in peaks]
        assert found == [2.0**k, 2.0**k, 2.0 ** (k + 1)]


@kernels
@nv_rules
@pytest.mark.parametrize("peak", (2688 * 2.0**-128, 1536 * 2.0**-128, 2.0**-120, 2.0**-149, float(LARGEST)))
def test_global_scales_and_their_reciprocals_are_numbers_and_not_0(rule, peak):
    weight = np.zeros((1, 16), F32)
    weight[0, 3] = peak
    assert_same(fp4.nvfp4(weight, rule, DIVIDES[rule]), slow.nvfp4(weight, rule))
    for divides in (False, True):
        (found,) = fp4.nvfp4(weight, rule, divides)["global_scale"]
        assert 0 < found <= LARGEST


@kernels
@pytest.mark.parametrize("rule", [r for r in NV_RULES if r != "tiles"])
def test_rows_that_share_a_peak_are_encoded_as_if_they_were_one_tensor(rule):
    weight = weights("blocks")
    peak = float(np.abs(weight).max())
    whole = fp4.nvfp4(weight, rule)
    halves = [fp4.nvfp4(half, rule, peak=peak) for half in (weight[:7], weight[7:])]
    for key in ("codes", "scale"):
        assert np.concatenate([half[key] for half in halves]).tobytes() == whole[key].tobytes()
    assert {half["global_scale"].tobytes() for half in halves} == {whole["global_scale"].tobytes()}


@kernels
def test_tiles_repeat_one_scale_in_16_rows():
    parts = fp4.nvfp4(weights("gaussian"), "tiles")
    assert (parts["scale"][:16] == parts["scale"][0]).all() and (parts["scale"][16:] == parts["scale"][16]).all()
    assert (parts["scale"][0] != parts["scale"][16]).any()
    assert_same(parts, fp4.nvfp4(weights("gaussian"), block_rows=16))


ZERO_BLOCKS = {"best": 0, "tiles": 0, "four_over_six": 0, "compressed-tensors": 0x20, "modelopt": 0x38, "torchao": 8}


@kernels
@nv_rules
def test_all_zero_weights_have_a_global_scale_of_1_and_codes_of_zero(rule):
    weight = np.array([[0.0] * 16, [-0.0] * 16], F32)
    parts = fp4.nvfp4(weight, rule)
    assert parts["global_scale"].tolist() == [1.0]
    assert set(parts["scale"].ravel().tolist()) == {ZERO_BLOCKS.get(rule, 0)}
    assert parts["codes"].tolist() == [[0] * 16, [8 if rule == "torchao" else 0] * 16]


@kernels
@mx_rules
def test_a_block_of_zeros_has_scale_0_in_mxfp4(rule):
    weight = np.array([[0.0] * 32, [-0.0] * 32], F32)
    parts = fp4.mxfp4(weight, rule)
    assert not parts["scale"].any()
    first = 8 if rule == "modelopt" else 0
    second = 8 if rule in ("ocp", "torchao", "modelopt") else 0
    assert parts["codes"].tolist() == [[first] * 32, [second] * 32]


NEGATIVE_ZEROS = {"best": 0, "ocp": 8, "torchao": 8, "compressed-tensors": 8, "modelopt": 8}


@kernels
@mx_rules
def test_what_rounds_to_zero_from_below(rule):
    weight = np.full((1, 32), -0.1, F32)
    weight[0, 0] = 4
    assert set(fp4.mxfp4(weight, rule)["codes"][0, 1:].tolist()) == {NEGATIVE_ZEROS[rule]}


@kernels
@mx_rules
def test_mxfp4_scale_bytes_stop_where_6_is_still_a_float32(rule):
    weight = np.zeros((3, 32), F32)
    weight[:, 0] = (LARGEST, -1.5 * 2.0**127, 1.75 * 2.0**127)
    parts = fp4.mxfp4(weight, rule)
    assert parts["scale"].max() == 252
    assert slow.decode_mx(parts)[:, 0].tolist() == [1.5 * 2.0**127, -1.5 * 2.0**127, 1.5 * 2.0**127]


@pytest.mark.parametrize("low", (0, 1, 2, 100, 250))
def test_every_tie_goes_where_the_rule_says(low):
    """All middles between codes with their neighbours, at the scales where they are exact."""
    middles = around([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    signed = np.concatenate([middles, -middles])
    weight = np.zeros((1, 64), F32)
    weight[0, : len(signed)] = signed
    weight[0, 31] = weight[0, 63] = 4  # both exponents are 0 with every rule
    scaled = np.ldexp(weight, low - 127)
    for rule in MX_RULES:
        parts = fp4.mxfp4(scaled, rule)
        assert_same(parts, slow.mxfp4(scaled, rule))
        if rule in ("ocp", "compressed-tensors"):
            assert parts["scale"].tolist() == [[low, low]]


# ---------------------------------------------------------------- how it is computed


@kernels
@pytest.mark.parametrize("count", (2, 3))
def test_threads_change_no_bit(monkeypatch, count):
    monkeypatch.setattr(fp4, "LEAST_WEIGHTS", 64)
    weight = weights("blocks")
    doors: list[Callable[[], dict[str, Array]]] = [
        *(lambda rule=rule: fp4.mxfp4(weight, rule) for rule in MX_RULES),
        *(lambda rule=rule: fp4.nvfp4(weight, rule) for rule in NV_RULES),
    ]
    monkeypatch.setenv("PACKFMT_THREADS", "1")
    alone = [door() for door in doors]
    monkeypatch.setenv("PACKFMT_THREADS", str(count))
    monkeypatch.setattr(fp4, "CHUNK", 200)
    for door, wanted in zip(doors, alone, strict=True):
        assert_same(door(), wanted)


@kernels
def test_the_order_of_memory_changes_no_bit():
    weight = weights("gaussian", 32, 64)
    turned = np.asfortranarray(weight)
    for rule in MX_RULES:
        assert_same(fp4.mxfp4(turned, rule), fp4.mxfp4(weight, rule))
    for rule in NV_RULES:
        assert_same(fp4.nvfp4(turned, rule), fp4.nvfp4(weight, rule))


@kernels
def test_no_rows_and_no_columns_are_no_trouble():
    for shape in ((0, 64), (3, 0)):
        weight = np.zeros(shape, F32)
        for rule in MX_RULES:
            assert fp4.mxfp4(weight, rule)["codes"].shape == shape
        for rule in NV_RULES:
            assert fp4.nvfp4(weight, rule)["codes"].shape == shape


def test_refusals_say_what_is_needed():
    weight = np.ones((2, 32), F32)
    with pytest.raises(LayoutError, match="no rule is called 'floor'; there are best, ocp"):
        fp4.mxfp4(weight, "floor")
    with pytest.raises(LayoutError, match="no rule is called 'ocp'; there are best, tiles"):
        fp4.nvfp4(weight, "ocp")
    with pytest.raises(LayoutError, match="the rule ocp compares no errors, so it takes no importance"):
        fp4.mxfp4(weight, "ocp", np.ones(32, F32))
    for wrong in (np.ones(31, F32), -np.ones(32, F32), np.full(32, np.nan, F32)):
        with pytest.raises(LayoutError, match="needs finite numbers of 0 or more"):
            fp4.nvfp4(weight, importance=wrong)
    for peak in (0.5, np.inf, np.nan):
        with pytest.raises(LayoutError, match="needs a finite number of 1"):
            fp4.nvfp4(weight, peak=peak)
    with pytest.raises(LayoutError, match="2 rows share a scale, which only the rule best can choose"):
        fp4.nvfp4(weight, "modelopt", block_rows=2)


# ---------------------------------------------------------------- compressed-tensors itself


def their_parts(weight: Array, scheme_name: str) -> dict[str, Array]:
    """What compressed-tensors makes of a weight, with its own scales."""
    torch = pytest.importorskip("torch", reason="compressed-tensors needs torch")
    pytest.importorskip("compressed_tensors", reason="the encoder to be equal to")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme, quant_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    compressor: Any = MXFP4PackedCompressor if scheme_name == "MXFP4A16" else NVFP4PackedCompressor
    scheme = QuantizationScheme(targets=["Linear"], **getattr(quant_scheme, scheme_name))
    tensor = torch.from_numpy(weight.copy())
    state = {"weight": tensor}
    if scheme_name == "NVFP4A16":
        state["weight_global_scale"] = generate_gparam(tensor.min(), tensor.max())
    groups = tensor.reshape(len(weight), -1, scheme.weights.group_size)
    lowest, highest = groups.amin(-1), groups.amax(-1)
    shared = state.get("weight_global_scale")
    state["weight_scale"], _ = calculate_qparams(lowest, highest, scheme.weights, global_scale=shared)
    packed = compressor.compress(state, scheme)
    byte = packed["weight_packed"].numpy()
    found = {
        "codes": np.stack([byte & 15, byte >> 4], -1).reshape(weight.shape),
        "scale": packed["weight_scale"].view(torch.uint8).numpy(),
    }
    return found if shared is None else {**found, "global_scale": shared.numpy()}


@pytest.mark.clients
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "largest"])
def test_compressed_tensors_makes_the_same_bytes(kind):
    weight = weights(kind, 64, 512)
    assert_same(fp4.mxfp4(weight, "compressed-tensors"), their_parts(weight, "MXFP4A16"))
    assert_same(fp4.nvfp4(weight, "compressed-tensors", divides=True), their_parts(weight, "NVFP4A16"))


@pytest.mark.clients
def test_compressed_tensors_makes_the_same_bytes_of_many_blocks():
    weight = weights("bf16", 512, 4096)
    assert_same(fp4.mxfp4(weight, "compressed-tensors"), their_parts(weight, "MXFP4A16"))
    assert_same(fp4.nvfp4(weight, "compressed-tensors", divides=True), their_parts(weight, "NVFP4A16"))
