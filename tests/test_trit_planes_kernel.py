"""Planes of trits: the kernel against its slow twin, and what every fit promises, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import slow_trit_planes as slow
from hypothesis import given
from hypothesis import strategies as st

from packfmt.errors import LayoutError
from packfmt.kernels import trit_planes

F32 = np.float32
Floats = npt.NDArray[np.float32]
Mode = str | tuple[int, bool]
Fit = tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]

pytestmark = pytest.mark.kernels

MODES: list[Mode] = ["paper", *((planes, tied) for tied in (False, True) for planes in range(1, 5))]
KINDS = ("normal", "bfloat16", "heavy", "whole", "coarse", "ternary", "two planes", "tiny", "large")
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


@st.composite
def groups(draw: st.DrawFn, sizes: tuple[int, ...] = (1, 2, 5, 8, 16, 24, 32)) -> Floats:
    """(1 to 3, group) weights: as models have them, and such as bring ties, equal magnitudes and extreme scales."""
    size, rows = draw(st.sampled_from(sizes)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (rows, size)
    normal = (rng.standard_normal(shape) * 0.02).astype(F32)
    trits = rng.integers(-1, 2, (2, *shape))
    made = {
        "normal": normal,
        "bfloat16": (normal.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32),
        "heavy": rng.standard_t(2, shape).astype(F32),
        "whole": rng.integers(-6, 7, shape).astype(F32),
        "coarse": rng.integers(-2, 3, shape).astype(F32),
        "ternary": (trits[0] * rng.choice([0.0123, 3.0, 65504.0, 2.0**-24], (rows, 1)).astype(np.float16)).astype(F32),
        "two planes": (trits[0] * F32(0.5) + trits[1] * rng.integers(1, 5, (rows, 1)) * F32(0.125)).astype(F32),
        "tiny": (rng.standard_normal(shape) * 10.0 ** rng.integers(-45, -5)).astype(F32),
        "large": (rng.standard_normal(shape) * 2e4).astype(F32),
    }
    return made[draw(st.sampled_from(KINDS))]


def fit(module: ModuleType, mode: Mode, weight: Floats, **options: int) -> Fit | None:
    """What the kernel, or its twin, makes of groups as long as the rows; None if it refuses."""
    size = weight.shape[1]
    try:
        found: Fit = (
            module.fit_paper(weight, size, **options) if mode == "paper" else module.fit(weight, size, *mode, **options)
        )
    except (LayoutError, slow.Refused):
        return None
    return found


def scales_of(scale: npt.NDArray[np.float16], planes: int) -> Floats:
    """(rows, planes, groups) float32: what each plane counts."""
    if scale.shape[1] == planes:
        return scale.astype(F32)
    return np.concatenate([scale.astype(F32) * F32(3 ** (planes - 1 - p)) for p in range(planes)], axis=1)


def decode(trits: npt.NDArray[np.int8], scale: npt.NDArray[np.float16]) -> Floats:
    """Products and sums in float32, planes in order."""
    planes, cols = trits.shape[1:]
    counts = np.repeat(scales_of(scale, planes), cols // scale.shape[2], axis=2)
    total = trits[:, 0].astype(F32) * counts[:, 0]
    for p in range(1, planes):
        total = total + trits[:, p].astype(F32) * counts[:, p]
    return np.asarray(total)


def errors(weight: Floats, found: Fit) -> list[Fraction]:
    """Exact squared error of every row."""
    pairs = zip(weight.tolist(), decode(*found).tolist(), strict=True)
    return [sum(((Fraction(w) - Fraction(x)) ** 2 for w, x in zip(*pair, strict=True)), Fraction(0)) for pair in pairs]


# ---------------------------------------------------------------- against the twin


@every_mode
@given(weight=groups(), rounds=st.sampled_from([1, 2, 5, 50]))
def test_the_kernel_gives_the_bytes_of_its_twin(mode: Mode, weight: Floats, rounds: int) -> None:
    expected = fit(slow, mode, weight, rounds=rounds)
    found = fit(trit_planes, mode, weight, rounds=rounds)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        for p in range(2):
            assert found[p].dtype == expected[p].dtype and found[p].shape == expected[p].shape
            assert found[p].tobytes() == expected[p].tobytes()


@pytest.mark.parametrize("mode", ["paper", (1, False), (2, False), (2, True), (3, True)], ids=str)
def test_groups_of_128_and_rows_of_several_groups_equal_the_twin(mode: Mode) -> None:
    weight = (np.random.default_rng(7).standard_normal((2, 384)) * 0.05).astype(F32)
    if isinstance(mode, tuple):
        found, expected = trit_planes.fit(weight, 128, *mode), slow.fit(weight, 128, *mode)
    else:
        found, expected = trit_planes.fit_paper(weight), slow.fit_paper(weight)
    assert [part.tobytes() for part in found] == [part.tobytes() for part in expected]


def test_rounding_to_float16_is_exact_for_every_tie_and_neighbour() -> None:
    """Halfway between all neighbouring float16 numbers, and the float64 just below and above."""
    half = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = (half[:-1] + half[1:]) / 2
    for x in np.concatenate([half, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)]).tolist():
        assert trit_planes._half(x) == np.float16(x)
    for x in (65519.9, 65520.0, 65536.0, 1e30):
        assert (trit_planes._half(x) > 65504) == (x >= 65520)


def test_codes_that_tie_are_tried_in_the_papers_order() -> None:
    """Zero, fewer nonzero trits, finer planes, -1 before 1; of a code and its negation one."""
    assert trit_planes.CODES[2].tolist() == [[0, 0], [0, 1], [1, 0], [1, -1], [1, 1]]
    for planes in range(1, 5):
        assert [tuple(code) for code in trit_planes.CODES[planes].tolist()] == slow.candidates(planes)
        both = {sign * np.array(code) @ 3 ** np.arange(planes) for code in slow.candidates(planes) for sign in (1, -1)}
        assert len(both) == 3**planes


# ---------------------------------------------------------------- promises


@pytest.mark.parametrize("tied", [False, True])
@given(weight=groups())
def test_another_plane_never_makes_a_group_worse(tied: bool, weight: Floats) -> None:
    found = [fit(trit_planes, (planes, tied), weight) for planes in range(1, 5)]
    if None in found:
        assert not any(found)  # what one plane cannot hold is refused for all
        return
    each = [errors(weight, one) for one in found if one is not None]
    zero = [sum((Fraction(w) ** 2 for w in row), Fraction(0)) for row in weight.tolist()]
    for fewer, more in pairwise([zero, *each]):
        assert all(b <= a for a, b in zip(fewer, more, strict=True))


@given(weight=groups())
def test_the_best_two_planes_are_never_worse_than_the_papers(weight: Floats) -> None:
    best, paper = fit(trit_planes, (2, False), weight), fit(trit_planes, "paper", weight)
    if best is not None and paper is not None:
        assert all(a <= b for a, b in zip(errors(weight, best), errors(weight, paper), strict=True))


@every_mode
@given(weight=groups())
def test_every_weight_has_the_nearest_of_all_sums_so_no_plane_alone_is_nearer(mode: Mode, weight: Floats) -> None:
    found = fit(trit_planes, mode, weight)
    if found is None:
        return
    trits, scale = found
    planes = trits.shape[1]
    codes = np.array(list(product((-1, 0, 1), repeat=planes)), np.int8)
    for row, decoded in enumerate(decode(*found)):
        here = scales_of(scale[row : row + 1], planes)
        sums = decode(codes.T[None], np.repeat(here, len(codes), axis=2).astype(F32))[0].astype(np.float64)
        distance = np.abs(weight[row].astype(np.float64)[:, None] - sums)
        assert (np.abs(weight[row].astype(np.float64) - decoded) == distance.min(axis=1)).all()


@every_mode
@given(weight=groups())
def test_scales_are_not_negative_fall_and_are_zero_where_trits_are(mode: Mode, weight: Floats) -> None:
    found = fit(trit_planes, mode, weight)
    if found is None:
        return
    trits, scale = found
    assert (scale >= 0).all() and not np.signbit(scale).any()
    assert np.isin(trits, (-1, 0, 1)).all()
    if mode != "paper":
        assert (np.diff(scale, axis=1) <= 0).all()
    unused = scales_of(scale, trits.shape[1])[:, :, 0] == 0
    assert not trits[unused].any()


@every_mode
@given(weight=groups())
def test_negated_weights_have_negated_trits_and_their_order_does_not_matter(mode: Mode, weight: Floats) -> None:
    found = fit(trit_planes, mode, weight)
    negated, turned = fit(trit_planes, mode, -weight), fit(trit_planes, mode, weight[:, ::-1])
    if found is None or negated is None or turned is None:
        assert found is negated is turned is None
        return
    assert (negated[0] == -found[0]).all() and (turned[0] == found[0][:, :, ::-1]).all()
    assert found[1].tobytes() == negated[1].tobytes() == turned[1].tobytes()


# ---------------------------------------------------------------- one plane


@given(data=st.data(), size=st.integers(1, 24))
def test_no_trits_with_any_float16_scale_are_nearer_than_one_plane(data: st.DataObject, size: int) -> None:
    """Whole numbers: all sums and products of the search are exact, so the best may not be missed by a bit."""
    weight = np.array([data.draw(st.lists(st.integers(-300, 300), min_size=size, max_size=size))], F32)
    magnitudes = np.abs(weight[0]).astype(np.float64)
    scales = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    about = sum(np.minimum(m, np.abs(m - scales)) ** 2 for m in magnitudes)
    close = scales[about <= about.min() * (1 + 1e-9)].tolist()
    whole = [Fraction(m) for m in magnitudes.tolist()]
    best = min(sum(min(m, abs(m - Fraction(s))) ** 2 for m in whole) for s in close)
    assert errors(weight, trit_planes.fit(weight, size, 1))[0] == best


@given(
    trits=st.lists(st.integers(-1, 1), min_size=1, max_size=128),
    scale=st.integers(1, 0x7BFF).map(lambda bits: np.uint16(bits).view(np.float16)),
    mode=st.sampled_from([mode for mode in MODES if mode != "paper"]),
)
def test_ternary_groups_come_back_exactly_in_the_first_plane(
    trits: list[int], scale: np.float16, mode: tuple[int, bool]
) -> None:
    planes, tied = mode
    weight = np.array([trits], F32) * F32(scale)
    found, scales = trit_planes.fit(weight, len(trits), planes, tied)
    assert (decode(found, scales) == weight).all()
    place = planes - 1 if tied else 0  # tied, a scale belongs to the last plane
    assert found[0, place].tolist() == trits
    assert not np.delete(found, place, axis=1).any()
    assert scales[0, 0, 0] == (scale if any(trits) else 0)


def test_every_sum_of_two_planes_with_ratio_a_third_is_found() -> None:
    """Nine levels, each present: the fit must be exact."""
    weight = np.array([[3 * a + b for a, b in product((-1, 0, 1), repeat=2)] * 8], F32) * F32(0.0625)
    trits, scale = trit_planes.fit(weight, 72, 2)
    assert (decode(trits, scale) == weight).all()
    assert scale.ravel().tolist() == [0.1875, 0.0625]


# ---------------------------------------------------------------- extremes


@every_mode
def test_zeros_of_both_signs_and_what_is_nearer_to_zero_than_to_any_float16_become_zero(mode: Mode) -> None:
    weight = np.array([[0, -0.0, 0, 0], [1e-45, -1e-45, 0, 2e-8], [2.0**-25, 0, 0, -(2.0**-25)]], F32)
    found = fit(trit_planes, mode, weight)
    assert found is not None
    assert not found[0].any() and not found[1].any()


@every_mode
@pytest.mark.parametrize("outlier", [65520.0, 1e6, 1e30, 1e38])
def test_scales_beyond_float16_are_refused(mode: Mode, outlier: float) -> None:
    weight = np.array([[0.5, -0.25, 0.125, 0], [outlier, -outlier, outlier, outlier]], F32)
    if mode == "paper":
        weight *= F32(2.5)  # of equal weights each plane has half
    with pytest.raises(LayoutError, match="overflow float16; use bf16 or mxfp4"):
        if isinstance(mode, tuple):
            trit_planes.fit(weight, 4, *mode)
        else:
            trit_planes.fit_paper(weight, 4)


def test_the_largest_float16_is_not_refused() -> None:
    weight = np.array([[65519.0, -65504.0, 65504.0, 0]], F32)
    for planes in range(1, 5):
        assert trit_planes.fit(weight, 4, planes)[1][0, 0, 0] == 65504


@pytest.mark.parametrize("planes", [0, 5])
def test_planes_that_there_are_not_are_refused(planes: int) -> None:
    with pytest.raises(LayoutError, match=f"{planes} planes, needs 1 to 4"):
        trit_planes.fit(np.zeros((1, 128), F32), 128, planes)


@pytest.mark.parametrize("group", [0, 96])
def test_columns_that_are_no_whole_groups_are_refused(group: int) -> None:
    with pytest.raises(LayoutError, match=f"128 columns, needs a multiple of the group, {group}"):
        trit_planes.fit(np.zeros((1, 128), F32), group)


def test_a_weight_without_rows_has_no_trits() -> None:
    trits, scale = trit_planes.fit(np.zeros((0, 256), F32), 128, 3)
    assert trits.shape == (0, 3, 256) and scale.shape == (0, 3, 2)


# ---------------------------------------------------------------- independence


@every_mode
def test_neither_threads_nor_neighbours_change_a_bit(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group at a time, on one thread and on several, strided and not."""
    weight = (np.random.default_rng(3).standard_normal((17, 32)) * 0.1).astype(F32)
    monkeypatch.setattr(trit_planes, "LEAST_WEIGHTS", 64)

    def run(part: Floats) -> list[bytes]:
        found = trit_planes.fit(part, 16, *mode) if isinstance(mode, tuple) else trit_planes.fit_paper(part, 16)
        return [b"".join(rows[i].tobytes() for i in range(len(rows))) for rows in found]

    monkeypatch.setenv("PACKFMT_THREADS", "1")
    alone = run(weight)
    assert run(np.asfortranarray(weight)) == alone
    monkeypatch.setenv("PACKFMT_THREADS", "5")
    assert run(weight) == alone
    rows = [run(weight[i : i + 1]) for i in range(0, 17, 8)]
    for i, row in zip(range(0, 17, 8), rows, strict=True):
        for part, whole in zip(row, alone, strict=True):
            assert part == whole[i * len(part) : (i + 1) * len(part)]
