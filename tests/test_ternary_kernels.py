"""The quantizers of the ternary formats, and the kernels that write their bytes at once."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import slow_ternary as slow
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, placement
from packfmt.errors import LayoutError
from packfmt.kernels import quantize, ternary, ternary_blocks
from tests.test_formats import distributions, plain_weights

F32 = np.float32
Floats = npt.NDArray[np.float32]

SHERRY = {"sherry": (1, 256), "sherry_s16": (16, 256), "sherry_g128": (1, 128)}  # stride, columns a scale
CODES = [(7 * g + 3) % 32 for g in range(64)]  # of the golden block of STQ1_0
STQ1_0 = "a3816f4d2b09e7c5" * 4 + "9c3963c6" * 2 + "0038"
# the same bytes in both orders of columns; packfmt's own vectors, of the definition in pull request 22836
STQ1_0_START = {1: "0+-- ++0- 0-+- --0-", 16: "0+0- -++- -0+0 --++"}
STEPS = [(i * i + i // 7) % 3 - 1 for i in range(256)]  # of the golden blocks of TQ1_0 and TQ2_0
TQ1_0 = (  # gguf 0.19.0, gguf/quants.py TQ1_0.quantize of STEPS / 2
    "4782901198581cf8b76bc2d685b033c80953e723414782901198581cf8b76bc2e429ee3d35f70d501567a805705c22e38fc1e7560038"
)
TQ2_0 = (  # the same, TQ2_0
    "589509901901a02a122162562542640680a84a8488589509901901a02a122162"
    "09901901a02a122162562542640680a84a8488589509901901a02a12216256250038"
)

sherry_layouts = pytest.mark.parametrize("name", SHERRY)
fast_formats = pytest.mark.parametrize("name", ("tq1_0", "tq2_0", *SHERRY))


def fast(name: str, weight: Floats) -> bytes | None:
    doors = {"tq1_0": ternary_blocks.tq1_0, "tq2_0": ternary_blocks.tq2_0}
    found = ternary_blocks.sherry(weight, *SHERRY[name]) if name in SHERRY else doors[name](weight)
    return None if found is None else found["blocks"].tobytes()


def parts(name: str, weight: Floats) -> dict[str, npt.NDArray[np.generic]]:
    if name in SHERRY:
        return ternary.sherry(weight, *SHERRY[name])
    return dict(codecs.get(name).encoders["ggml"](weight))


def packed(name: str, weight: Floats) -> bytes:
    """What the generic packer makes of the parts."""
    layout = codecs.get(name).layout
    wanted = layout.fit(*weight.shape).parts
    shaped = {key: part.reshape(wanted[key].shape) for key, part in parts(name, weight).items()}
    return placement.pack(layout, weight.shape, shaped)["blocks"].tobytes()


def from_steps(steps: list[int], scale: float = 0.5) -> Floats:
    return np.array(steps, F32)[None] * F32(scale)


def from_codes(codes: list[int], stride: int) -> list[int]:
    steps = [0] * (4 * len(codes))
    for quad, code in enumerate(codes):
        for column, step in zip(slow.quad_columns(quad, stride), slow.QUADS[code], strict=True):
            steps[column] = step
    return steps


def tied_weights(cols: int) -> st.SearchStrategy[Floats]:
    """Few magnitudes, zeros of both signs, so that quads tie; or `plain_weights`."""
    few = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.75, -0.75, 3.0]), min_size=1, max_size=cols)
    return few.map(lambda numbers: np.resize(np.array(numbers, F32), (1, cols))) | plain_weights(cols)


# ---------------------------------------------------------------- golden bytes


@pytest.mark.kernels
@pytest.mark.parametrize("stride", (1, 16))
def test_the_golden_block_of_stq1_0_is_written_in_both_orders(stride: int) -> None:
    steps = from_codes(CODES, stride)
    assert steps[:16] == ["-0+".index(c) - 1 for c in STQ1_0_START[stride].replace(" ", "")]
    assert ternary_blocks.sherry(from_steps(steps), stride, 256)["blocks"].tobytes().hex() == STQ1_0
    assert slow.sherry_block(from_steps(steps)[0], stride).hex() == STQ1_0


@pytest.mark.kernels
def test_the_golden_blocks_of_tq1_0_and_tq2_0_are_written() -> None:
    assert fast("tq1_0", from_steps(STEPS)).hex() == TQ1_0 == packed("tq1_0", from_steps(STEPS)).hex()
    assert fast("tq2_0", from_steps(STEPS)).hex() == TQ2_0 == packed("tq2_0", from_steps(STEPS)).hex()


@pytest.mark.kernels
@pytest.mark.parametrize("stride", (1, 16))
def test_every_code_of_sherry_is_written_for_its_quad(stride: int) -> None:
    for turn in range(32):
        codes = [(turn + quad) % 32 for quad in range(64)]
        found = ternary.sherry(from_steps(from_codes(codes, stride)), stride, 256)
        assert found["codes"][0].tolist() == codes
        assert found["scale"][0, 0] == 0.5


@pytest.mark.kernels
def test_every_group_of_five_digits_is_written_as_its_base_3_byte() -> None:
    groups = list(product((-1, 0, 1), repeat=5))
    steps = np.ones((len(groups), 256), np.int8)  # a peak in every block
    for row, group in enumerate(groups):
        for place, column in enumerate(slow.base3_columns(row % 32)):
            steps[row, column] = group[place]
    stored = np.frombuffer(fast("tq1_0", steps.astype(F32)), np.uint8).reshape(-1, 54)
    found = stored[np.arange(243), np.arange(243) % 32].tolist()
    assert found == [slow.base3_byte([step + 1 for step in group]) for group in groups]
    assert len(set(found)) == 243


# ---------------------------------------------------------------- the fast kernels


@fast_formats
def test_bytes_at_once_are_those_of_the_parts(name: str) -> None:
    for weight in distributions(8):
        assert fast(name, weight) == packed(name, weight)


@pytest.mark.kernels
@fast_formats
@given(data=st.data())
def test_bytes_at_once_are_those_of_the_parts_for_drawn_blocks(name: str, data: st.DataObject) -> None:
    weight = data.draw(tied_weights(256))
    assert fast(name, weight) == packed(name, weight)


@pytest.mark.parametrize("name", ("tq1_0", "tq2_0"))
def test_ternary_bytes_at_once_are_gguf_s(name: str) -> None:
    for weight in distributions():
        assert fast(name, weight) == gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name.upper()]).tobytes()


@pytest.mark.parametrize("name", ("tq1_0", "tq2_0"))
def test_comparing_with_halves_rounds_as_the_generic_kernel_does(name: str) -> None:
    """Beside a peak of 1 every weight is its own quotient: all near 0.5, 1 and 0, and many between."""
    near = np.arange(-4096, 4097)
    bits = [int(F32(x).view(np.uint32)) + near for x in (0.5, 1)] + [np.arange(8192), near + (1 << 28)]
    rng = np.random.default_rng(2)
    sizes = np.concatenate([*bits, rng.integers(0, 0x3F800000, 1 << 16)]).astype(np.uint32).view(F32)
    sizes = np.minimum(sizes, F32(1))
    weight = np.resize(np.concatenate([sizes, -sizes]), (len(sizes) // 128, 256))
    weight[:, 17] = 1
    assert fast(name, weight) == packed(name, weight)
    for exponent in (-126, -140, -149, 15):  # and where the product rounds
        scaled = weight * F32(2.0**exponent) * F32(1.2345 if exponent > -140 else 1)
        assert fast(name, scaled) == packed(name, scaled)


@pytest.mark.kernels
@fast_formats
@pytest.mark.parametrize("bad", (np.nan, -np.nan, np.inf, -np.inf))
def test_weights_that_are_not_finite_are_left_to_the_slower_way_wherever_they_are(name: str, bad: float) -> None:
    for at in (0, 1, 2, 3, 100, 255):
        weight = np.full((2, 256), 4, F32)
        weight[1, at] = bad
        assert fast(name, weight) is None


@pytest.mark.kernels
@fast_formats
def test_scales_that_overflow_are_left_to_the_slower_way(name: str) -> None:
    weight = np.ones((3, 256), F32)
    weight[1] = 65519.99  # just below the half-way
    assert fast(name, weight) is not None
    weight[1:] = 65520
    with pytest.raises(LayoutError, match="scales overflow float16"):
        parts(name, weight)
    assert fast(name, weight) is None


@pytest.mark.kernels
@fast_formats
def test_weights_of_no_rows_or_columns_give_no_bytes(name: str) -> None:
    assert fast(name, np.empty((0, 256), F32)) == fast(name, np.empty((3, 0), F32)) == b""


@pytest.mark.kernels
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "LEAST_WEIGHTS", 1)
    weight = np.random.default_rng(5).standard_normal((7, 256)).astype(F32)
    cost = np.abs(weight[:1]) + 1
    works: list[Callable[[], object]] = [
        *(lambda name=name: fast(name, weight) for name in ("tq1_0", "tq2_0", *SHERRY)),
        lambda: ternary.sherry(weight, 1, 32, importance=cost),
        lambda: ternary.ternary(weight, 64),
        lambda: ternary.absmean(weight),
        lambda: ternary.misfits(np.sign(weight), 1, 64),
    ]
    for work in works:
        found = set()
        for count in ("1", "2", "3"):
            monkeypatch.setenv("PACKFMT_THREADS", count)
            found.add(repr(work()))
        assert len(found) == 1


# ---------------------------------------------------------------- Sherry


@pytest.mark.kernels
@sherry_layouts
@given(data=st.data())
def test_sherry_is_its_slow_twin(name: str, data: st.DataObject) -> None:
    stride, block = SHERRY[name]
    weight = data.draw(tied_weights(block))
    assert fast(name, weight) == slow.sherry_block(weight[0].tolist(), stride)


def test_sherry_is_its_slow_twin_on_noise() -> None:
    for weight in list(distributions(2, 256))[::5]:
        for stride, group in ((1, 4), (1, 20), (1, 64), (1, 256), (16, 64), (16, 128), (16, 256)):
            fitting = np.ascontiguousarray(weight[:, : 240 if group == 20 else 256])
            found = ternary.sherry(fitting, stride, group, dtype="<f4")
            units = fitting.reshape(-1, group).tolist()
            wanted = [slow.sherry_choice(unit, stride) for unit in units]
            assert found["codes"].reshape(len(units), -1).tolist() == [codes for codes, _ in wanted]
            assert found["scale"].reshape(-1).tolist() == [mean for _, mean in wanted]


@pytest.mark.kernels
@pytest.mark.parametrize("stride", (1, 16))
def test_no_other_zeros_have_a_smaller_error(stride: int) -> None:
    """Without importance: all 4**4 choices of zeros in four of the quads, exactly."""
    rng = np.random.default_rng(6)
    for _ in range(3):
        weight = rng.integers(-9, 10, (1, 64)).astype(F32)
        codes = ternary.sherry(weight, stride, 64)["codes"][0].tolist()
        ones = [1] * 64
        least = slow.sherry_error(weight[0].tolist(), codes, stride, ones)
        for lanes in product(range(4), repeat=3):
            others = codes.copy()
            for quad, lane in zip((0, 5, 9), lanes, strict=True):
                others[quad] = lane << 2  # the error does not see signs
            assert slow.sherry_error(weight[0].tolist(), others, stride, ones) >= least


@pytest.mark.kernels
def test_a_scale_may_serve_a_group_a_row_or_the_tensor() -> None:
    weight = np.random.default_rng(7).standard_normal((3, 128)).astype(F32)
    for share, units in (("group", 12), ("row", 3), ("tensor", 1)):
        found = ternary.sherry(weight, 1, 32, share, dtype="<f4")
        means = [slow.sherry_choice(unit, 1)[1] for unit in weight.reshape(units, -1).tolist()]
        assert found["scale"].shape == (3, 4)
        assert found["scale"].reshape(units, -1).tolist() == [[mean] * (12 // units) for mean in means]
        assert (found["codes"] == ternary.sherry(weight, 1, 32)["codes"]).all(), "zeros do not depend on the scale"


@pytest.mark.kernels
@given(bits=st.integers(1, 0x7F7FFFFF), seed=st.integers(0, 99))
def test_the_mean_of_equal_magnitudes_is_that_magnitude(bits: int, seed: int) -> None:
    size = np.uint32(bits).view(F32)
    codes = np.random.default_rng(seed).integers(0, 32, 64).tolist()
    weight = from_steps(from_codes(codes, 1), 1) * size
    for share in ("group", "row", "tensor"):
        found = ternary.sherry(weight, 1, 64, share, dtype="<f4")
        assert found["codes"][0].tolist() == codes and (found["scale"] == size).all()
        found = ternary.ternary(weight, 64, share, dtype="<f4")
        assert (found["scale"] == size).all()
        assert (found["codes"].astype(int) - 1).tolist() == np.sign(weight).tolist()


@pytest.mark.kernels
def test_groups_of_zeros_have_scale_and_codes_zero() -> None:
    for zeros in ([0.0], [-0.0], [0.0, -0.0]):
        weight = np.resize(np.array(zeros, F32), (2, 256))
        assert fast("sherry", weight) == bytes(84)
        assert not ternary.sherry(weight, 1, 64, importance=np.ones((1, 256), F32))["codes"].any()
        assert (ternary.ternary(weight, 64)["codes"] == 1).all()


@pytest.mark.kernels
def test_the_reference_encoder_of_stq1_0_takes_the_peak() -> None:
    """llama.cpp pull request 22836: d = fp16(amax), the first of the smallest is zero, -0.0 counts as plus."""
    weight = np.resize(F32([0.1, -0.25, -0.0, 3.003]), (1, 256))
    found = ternary.sherry(weight, 1, 256, scale_rule="amax")
    assert found["scale"][0, 0] == np.float16(3.003)
    assert {slow.QUADS[code] for code in found["codes"][0].tolist()} == {(1, -1, 0, 1)}


@pytest.mark.kernels
@given(data=st.data())
def test_importance_never_makes_its_own_error_larger(data: st.DataObject) -> None:
    stride, group = data.draw(st.sampled_from([(1, 4), (1, 16), (1, 64), (16, 64)]))
    weight = data.draw(tied_weights(64))
    cost = np.array([data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 8.0, 100.0]), min_size=64, max_size=64))], F32)
    start = ternary.sherry(weight, stride, group)["codes"].reshape(-1, group // 4).tolist()
    found = ternary.sherry(weight, stride, group, importance=cost)["codes"].reshape(-1, group // 4).tolist()
    for unit, (before, after) in enumerate(zip(start, found, strict=True)):
        w = weight.reshape(-1, group)[unit].tolist()
        c = cost.reshape(-1, group)[unit].tolist()
        first, last = (slow.sherry_error(w, codes, stride, c) for codes in (before, after))
        whole = slow.sherry_error(w, [], stride, c)
        assert last <= first + whole * Fraction(1, 2**48)  # gains are compared in float64


@pytest.mark.kernels
def test_a_negative_zero_that_is_kept_counts_as_plus() -> None:
    weight, cost = np.resize(F32([-0.0, 0.1, 1, 1]), (1, 64)), np.resize(F32([0, 1, 1, 1]), (1, 64))
    found = ternary.sherry(weight, 1, 64, importance=cost)
    assert {slow.QUADS[code] for code in found["codes"][0].tolist()} == {(1, 0, 1, 1)}
    assert found["scale"][0, 0] == 1


@pytest.mark.kernels
def test_importance_keeps_what_costs_most() -> None:
    weight = np.resize(F32([1, 0.9, -0.8, 0.95]), (1, 64))
    cost = np.resize(F32([1, 0.01, 50, 1]), (1, 64))
    for stride, whole in ((1, weight), (16, weight.reshape(16, 4).T.reshape(1, 64).copy())):
        costs = cost if stride == 1 else cost.reshape(16, 4).T.reshape(1, 64).copy()
        plain, found = ternary.sherry(whole, stride, 64), ternary.sherry(whole, stride, 64, importance=costs)
        assert {slow.QUADS[c] for c in plain["codes"][0].tolist()} == {(1, 1, 0, 1)}
        assert {slow.QUADS[c] for c in found["codes"][0].tolist()} == {(1, 0, -1, 1)}
        assert found["scale"][0, 0] == np.float16((1 + 40 + 0.95) / 52)


@pytest.mark.kernels
def test_equal_importance_changes_nothing_and_none_at_all_is_left_out() -> None:
    weight = np.random.default_rng(8).integers(-99, 100, (3, 128)).astype(F32)
    for share in ("group", "row", "tensor"):
        plain = ternary.sherry(weight, 1, 32, share, dtype="<f4")
        for cost in (np.full((1, 128), 4, F32), np.full((3, 128), 0.25, F32), np.zeros((1, 128), F32)):
            found = ternary.sherry(weight, 1, 32, share, cost, "<f4")
            assert all((found[part] == plain[part]).all() for part in plain)


@pytest.mark.kernels
def test_importance_of_one_row_counts_for_all() -> None:
    rng = np.random.default_rng(9)
    weight, cost = rng.standard_normal((3, 128)).astype(F32), rng.random((1, 128)).astype(F32)
    for share in ("group", "row", "tensor"):
        one = ternary.sherry(weight, 1, 32, share, cost)
        each = ternary.sherry(weight, 1, 32, share, np.repeat(cost, 3, 0))
        assert all((one[part] == each[part]).all() for part in one)
        assert not (one["codes"] == ternary.sherry(weight, 1, 32, share)["codes"]).all()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"group": 6}, "groups of 6 in 128 columns"),
        ({"group": 48}, "groups of 48 in 128 columns"),
        ({"stride": 16, "group": 32}, "a divisor that 64 divides"),
        ({"share": "block"}, "shared by 'block'"),
        ({"scale_rule": "median"}, "scale rule 'median'"),
        ({"importance": np.ones((1, 128), F32), "scale_rule": "amax"}, "scale rule 'amax'"),
        ({"importance": np.ones((1, 64), F32)}, r"importance is \(1, 64\)"),
        ({"importance": np.full((1, 128), -1, F32)}, "not finite or negative"),
        ({"importance": np.full((1, 128), np.nan, F32)}, "not finite or negative"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], found: str) -> None:
    with pytest.raises(LayoutError, match=found):
        ternary.sherry(np.ones((2, 128), F32), **{"stride": 1, "group": 64, **change})


@pytest.mark.kernels
def test_misfits_are_quads_of_ternary_groups_without_exactly_one_zero() -> None:
    rng = np.random.default_rng(10)
    contiguous = from_steps(from_codes(rng.integers(0, 32, 64).tolist(), 1), 0.3)
    assert ternary.misfits(contiguous, 1, 256) == 0
    across = [contiguous[0, slow.quad_columns(quad, 16)] for quad in range(64)]
    assert ternary.misfits(contiguous, 16, 256) == sum((four == 0).sum() != 1 for four in across) > 20
    noisy = contiguous.copy()
    noisy[0, 200] *= F32(1.5)  # its group is not ternary
    assert ternary.misfits(noisy, 16, 64) == sum((four == 0).sum() != 1 for four in across[:48])
    for four, count in (([0, 0, 1, 1], 64), ([1, 1, 1, 1], 64), ([0, 0, 0, 0], 0), ([-0.0, 1, -1, 1], 0)):
        assert ternary.misfits(np.resize(np.array(four, F32), (1, 256)), 1, 64) == count
    assert ternary.misfits(np.empty((0, 64), F32), 1, 64) == 0


# ---------------------------------------------------------------- the other quantizers


@pytest.mark.kernels
@given(numbers=st.lists(st.integers(-50, 50), min_size=1, max_size=24))
def test_ternary_steps_have_the_least_error_there_is(numbers: list[int]) -> None:
    weight = np.array([numbers], F32)
    found = ternary.ternary(weight, len(numbers), dtype="<f4")
    steps = (found["codes"][0].astype(int) - 1).tolist()
    least = slow.least_ternary_error(numbers)
    assert slow.ternary_error(numbers, steps) <= least + sum(n * n for n in numbers) * Fraction(1, 2**20)


@pytest.mark.kernels
def test_ternary_takes_the_fewest_of_equally_good_steps() -> None:
    found = ternary.ternary(F32([[3, 1, 1, -1, 0, -0.0]]), 6)  # 3**2 / 1 and 6**2 / 4 are 9 both
    assert found["scale"].tolist() == [[3]]
    assert found["codes"].tolist() == [[2, 1, 1, 1, 1, 1]]
    found = ternary.ternary(F32([[3, 1, 1, -1, -1, -0.0]]), 6)  # 7**2 / 5 is more
    assert found["scale"].tolist() == [[np.float16(7 / 5)]]
    assert found["codes"].tolist() == [[2, 2, 2, 0, 0, 1]]


@pytest.mark.kernels
def test_ternary_steps_are_those_beyond_half_of_the_rounded_scale() -> None:
    weight = np.random.default_rng(11).standard_normal((4, 256)).astype(F32)
    for share in ("group", "row", "tensor"):
        found = ternary.ternary(weight, 64, share)
        half = found["scale"].astype(F32).repeat(64, 1) / 2
        assert (found["codes"] == 1 + (weight > half) - (weight < -half)).all()
        units = {"group": 16, "row": 4, "tensor": 1}[share]
        assert (np.ptp(found["scale"].reshape(units, -1), 1) == 0).all() and len(np.unique(found["scale"])) >= units - 1


def test_ternary_scales_that_overflow_are_refused() -> None:
    with pytest.raises(LayoutError, match="overflow float16"):
        ternary.ternary(np.full((1, 64), 1e5, F32), 64)
    assert (ternary.ternary(np.full((1, 64), 1e5, F32), 64, dtype="<f4")["scale"] == 1e5).all()


@pytest.mark.kernels
def test_absmean_is_the_rule_of_bitnet() -> None:
    """transformers, integrations/bitnet.py WeightQuant: round(w * (1 / mean)) half to even, cut to -1 .. 1."""
    rng = np.random.default_rng(12)
    for weight in (rng.integers(-8, 9, (5, 48)).astype(F32) / 8, rng.standard_normal((3, 100)).astype(F32)):
        found = ternary.absmean(weight)
        mean = F32(np.abs(weight).astype(np.float64).mean())
        assert found["scale"].tolist() == [[mean]]
        assert (found["codes"] == 1 + np.rint(weight * (F32(1) / mean)).clip(-1, 1)).all()
    weight = F32([[0.5, -0.5, 1.5, -1.5]])  # a mean of 1: halves go to even
    assert ternary.absmean(weight)["codes"].tolist() == [[1, 1, 2, 0]]
    assert ternary.absmean(np.zeros((2, 4), F32))["scale"] == F32(1e-5)


@pytest.mark.kernels
@given(data=st.data())
def test_q1_0_is_the_reference_of_ggml(data: st.DataObject) -> None:
    weight = data.draw(tied_weights(128))
    found = ternary.q1_0(weight)
    total = F32(0)
    for w in weight[0]:
        total = F32(total + abs(w))
    assert slow.half(total / F32(128)) == found["scale"].tobytes()
    assert found["codes"][0].tolist() == [int(w >= 0) for w in weight[0]]


@pytest.mark.kernels
@given(data=st.data())
def test_q2_0_is_tq2_0_s_choice_for_64(data: st.DataObject) -> None:
    weight = data.draw(tied_weights(64))
    found, wider = ternary.q2_0(weight), quantize.tq2_0(np.resize(weight, (1, 256)))
    assert found["scale"].tobytes() == wider["scale"].tobytes()
    assert found["codes"].tobytes() == wider["codes"][:, :64].tobytes()
