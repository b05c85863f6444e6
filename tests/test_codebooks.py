"""Codebooks and clipped grids: the kernels against slow twins, and the least error there is, in fractions."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import slow_codebooks as slow
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from packfmt.demo import CARRIER, find_model
from packfmt.errors import LayoutError
from packfmt.kernels import clipping, codebooks, scaled, simd, tiles

F32 = np.float32
Floats = npt.NDArray[np.float32]
LARGEST, LEAST = np.finfo(F32).max, F32(2.0**-149)
DOORS = {"best": codebooks.best, "exact": codebooks.exact}
doors = pytest.mark.parametrize("door", DOORS)
pytestmark = pytest.mark.kernels


def draw_row(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    normal = rng.standard_normal(shape)
    made = {
        "normal": normal,
        "moved": normal + 1000,
        "laplace": rng.laplace(size=shape),
        "t3": rng.standard_t(3, shape),
        "bfloat16": (normal.astype(F32).view(np.uint32) & np.uint32(0xFFFF0000)).view(F32),
        "whole": rng.integers(-9, 10, shape),
        "few": rng.choice([-1.5, -0.0, 0.0, 0.25, 3.0], shape),
        "tiny": rng.integers(-40, 41, shape) * 2.0**-149,
        "large": rng.uniform(-1, 1, shape) * float(LARGEST),
        "outlier": np.where(rng.random(shape) < 0.05, normal * 1e6, normal),
    }
    return np.ascontiguousarray(made[kind], F32)


KINDS = ("normal", "moved", "laplace", "t3", "bfloat16", "whole", "few", "tiny", "large", "outlier")
GENERIC = ("normal", "moved", "laplace", "t3", "bfloat16", "outlier")  # where no two cuts have the same error


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...], most: int) -> tuple[Floats, Floats | None, Any]:
    """(1 to 3, cols) weights, importance or none, mask or none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, most))
    weight = draw_row(draw(st.sampled_from(kinds)), (rows, cols), rng)
    share = draw(st.sampled_from((0, 1, rows)))
    importance = (rng.random((share, cols)) ** 4).astype(F32) if share else None
    if importance is not None:
        importance[rng.random(importance.shape) < 0.1] = 0
    share = draw(st.sampled_from((0, 1, rows)))
    return weight, importance, rng.random((share, cols)) < 0.8 if share else None


def errors(weight: Floats, tables: Floats, codes: Any, costs: Any = 1) -> npt.NDArray[np.float64]:
    """Of each row."""
    off = np.take_along_axis(tables, codes.astype(np.int64), axis=1).astype(np.float64) - weight
    return np.asarray((off * off * costs).sum(axis=1))


# ---------------------------------------------------------------- the nearest entry


@given(
    kind=st.sampled_from(KINDS), cols=st.integers(1, 70), levels=st.integers(1, 40), seed=st.integers(0, 2**32),
    as_they_come=st.booleans(),
)  # fmt: skip
def test_codes_are_the_nearest_entries_exactly(
    kind: str, cols: int, levels: int, seed: int, as_they_come: bool
) -> None:
    """Entries are weights, and others mirrored in one weight, so that there are ties, and equal entries."""
    rng = np.random.default_rng(seed)
    weight = draw_row(kind, (2, cols), rng)
    tables = rng.choice(weight.reshape(-1), (2, levels))
    other = rng.choice(weight.reshape(-1), (2, levels))
    with np.errstate(over="ignore", invalid="ignore"):
        mirrored = 2 * weight[:, :1] - other
    tables = np.where((rng.random(tables.shape) < 0.5) & np.isfinite(mirrored), mirrored, tables).astype(F32)
    if not as_they_come:
        tables.sort(axis=1)
    assert codebooks.assign(weight, tables).tobytes() == slow.assign(weight, tables).tobytes()


@pytest.mark.parametrize(
    ("table", "weight", "code"),
    [
        ((1, 3), 2, 0),
        ((3, 1), 2, 1),
        ((1, 3, 1, 3), 2, 0),
        ((3, 3, 1), 4, 0),
        ((0, LEAST), LEAST, 1),
        ((-LEAST, 0), -0.0, 1),
        ((LARGEST, -LARGEST), 0, 1),
        ((LARGEST, -LARGEST), LEAST, 0),
        ((-LEAST, LARGEST), LARGEST / 2, 1),  # half a step of the least number decides
        ((LEAST, LARGEST), LARGEST / 2, 0),
        ((0.0, -0.0), 1, 0),
    ],
)
def test_of_two_entries_the_lower_and_of_equal_ones_the_first(table: Any, weight: float, code: int) -> None:
    for cols in (1, 16):
        found = codebooks.assign(np.full((1, cols), weight, F32), np.array([table], F32))
        assert found.tobytes() == bytes([code] * cols)


def test_all_codes_of_256_entries() -> None:
    tables = np.random.default_rng(1).permutation(256).astype(F32)[None] - 100
    weight = np.arange(-101, 157, 0.25, dtype=F32)[None]
    assert codebooks.assign(weight, tables).tobytes() == slow.assign(weight, tables).tobytes()


# ---------------------------------------------------------------- codebooks


@doors
@given(case=cases(GENERIC, 60), levels=st.integers(2, 20))
def test_codebooks_of_short_rows_are_those_of_the_twin(door: str, case: Any, levels: int) -> None:
    tables, codes = DOORS[door](case[0], levels, *case[1:])
    assert tables.tobytes() == slow.tables(case[0], levels, *case[1:]).tobytes()
    assert codes.tobytes() == slow.assign(case[0], tables).tobytes()


@pytest.mark.parametrize(("cols", "levels"), [(400, 2), (700, 8), (1500, 3), (500, 17)])
@pytest.mark.parametrize("kind", ["normal", "t3", "outlier", "moved"])
def test_best_codebooks_of_long_rows_are_those_of_the_twin(kind: str, cols: int, levels: int) -> None:
    rng = np.random.default_rng(cols)
    weight, importance = draw_row(kind, (1, cols), rng), rng.random((1, cols)).astype(F32)
    for costs in (None, importance):
        tables, _ = codebooks.best(weight, levels, costs)
        assert tables.tobytes() == slow.tables(weight, levels, costs, exact=False).tobytes()


def least_error(points: list[tuple[Fraction, Fraction]], levels: int) -> Fraction:
    """Of all ways to cut sorted points into runs."""

    def error(run: list[tuple[Fraction, Fraction]]) -> Fraction:
        cost = sum((c for _, c in run), Fraction(0))
        mean = sum((c * x for x, c in run), Fraction(0)) / cost
        return sum((c * (x - mean) ** 2 for x, c in run), Fraction(0))

    cuts = combinations(range(1, len(points)), min(levels, len(points)) - 1)
    return min(sum((error(points[a:b]) for a, b in pairwise((0, *cut, len(points)))), Fraction(0)) for cut in cuts)


@doors
@given(
    weights=st.lists(st.integers(-12, 12), min_size=1, max_size=9),
    costs=st.lists(st.integers(0, 4), min_size=9, max_size=9),
    levels=st.integers(2, 5),
)
def test_no_codebook_of_a_tiny_row_has_a_smaller_error(
    door: str, weights: list[int], costs: list[int], levels: int
) -> None:
    """The error of the runs, with exact means: whole numbers have ties, which any of the best may win."""
    costs = costs[: len(weights)]
    weight, importance = np.array([weights], F32), np.array([costs], F32)
    tables, codes = DOORS[door](weight, levels, importance)
    counted = [(Fraction(x), Fraction(c), int(k)) for x, c, k in zip(weights, costs, codes[0], strict=True) if c]
    if not counted:
        assert not tables.any() and not codes.any()
        return
    found = Fraction(0)
    for code in {k for *_, k in counted}:
        run = [(x, c) for x, c, k in counted if k == code]
        found += least_error(run, 1)
        mean = sum((x * c for x, c in run), Fraction(0)) / sum(c for _, c in run)
        assert tables[0, code] == F32(float(mean))
    assert found == least_error(sorted((x, c) for x, c, _ in counted), levels)


@doors
@given(case=cases(KINDS, 80), levels=st.integers(2, 30))
def test_a_codebook_keeps_its_laws(door: str, case: Any, levels: int) -> None:
    """Entries ascend within the weights that count; no more different ones than levels come back."""
    weight, importance, mask = case
    if importance is not None:  # from the least float32 to the largest
        exponents = np.random.default_rng(levels).integers(-149, 128, importance.shape)
        importance = np.ldexp(np.sign(importance), exponents).astype(F32)
        importance[importance == 0] = -0.0
    tables, codes = DOORS[door](weight, levels, importance, mask)
    assert tables.dtype == F32 and tables.shape == (len(weight), levels) and (tables[:, 1:] >= tables[:, :-1]).all()
    assert codes.tobytes() == slow.assign(weight, tables).tobytes()
    assert not np.signbit(tables[tables == 0]).any()
    decoded = np.take_along_axis(tables, codes.astype(np.int64), axis=1)
    for row, costs in enumerate(slow.spread(weight, importance, mask)):
        counted = weight[row, costs > 0]
        if not counted.size:
            assert not tables[row].any()
            continue
        assert counted.min() <= tables[row, 0] and tables[row, -1] <= counted.max()
        if len(np.unique(counted)) <= levels:
            np.testing.assert_array_equal(decoded[row, costs > 0], counted)
            assert len(np.unique(tables[row])) == len(np.unique(counted))


@doors
def test_few_points_are_the_entries_and_the_last_is_repeated(door: str) -> None:
    weight = np.array([[3, -0.0, 3, 0.0, -2], [7, 7, 7, 7, 7]], F32)
    tables, codes = DOORS[door](weight, 4)
    assert tables.tobytes() == np.array([[-2, 0, 3, 3], [7, 7, 7, 7]], F32).tobytes()
    assert codes.tobytes() == bytes([2, 1, 2, 1, 0, 0, 0, 0, 0, 0])


@doors
def test_what_does_not_count_is_as_if_it_were_not_there(door: str) -> None:
    rng = np.random.default_rng(3)
    weight = draw_row("normal", (4, 300), rng)
    mask = rng.random((4, 300)) < 0.7
    mask[:, :10] = False
    importance = rng.random((4, 300)).astype(F32)
    before = DOORS[door](weight, 8, importance, mask)[0]
    assert before.tobytes() == DOORS[door](weight, 8, np.where(mask, importance, F32(0)))[0].tobytes()
    spoiled = np.where(mask, weight, F32(1e30))
    assert before.tobytes() == DOORS[door](spoiled, 8, importance, mask)[0].tobytes()
    kept = [
        DOORS[door](row[None, m], 8, costs[None, m])[0] for row, m, costs in zip(weight, mask, importance, strict=True)
    ]
    assert before.tobytes() == np.concatenate(kept).tobytes()


@doors
def test_powers_of_two_scale_weights_and_costs_without_a_change(door: str) -> None:
    rng = np.random.default_rng(4)
    weight, importance = draw_row("t3", (2, 400), rng), rng.random((2, 400)).astype(F32) + F32(0.5)
    tables, codes = DOORS[door](weight, 8, importance)
    for power in (-100, 100):
        scaled_tables, same = DOORS[door](np.ldexp(weight, power), 8, np.ldexp(importance, power))
        assert scaled_tables.tobytes() == np.ldexp(tables, power).tobytes() and same.tobytes() == codes.tobytes()


@pytest.mark.skipif(simd.INTERPRETED, reason="rows of some hundred weights take minutes without a compiler")
@pytest.mark.parametrize("kind", ["normal", "laplace", "t3", "moved", "bfloat16"])
@pytest.mark.parametrize("levels", [8, 16])
def test_best_is_within_a_thousandth_of_exact(kind: str, levels: int) -> None:
    rng = np.random.default_rng(5)
    weight = draw_row(kind, (24, 1024), rng)
    importance = rng.standard_normal((24, 1024)).astype(F32) ** 2
    for costs in (None, importance):
        weighs: Any = 1 if costs is None else costs
        found = errors(weight, *codebooks.best(weight, levels, costs), weighs)
        least = errors(weight, *codebooks.exact(weight, levels, costs), weighs)
        assert (found >= least * (1 - 1e-6)).all() and found.sum() <= 1.001 * least.sum()


@pytest.mark.clients
@pytest.mark.skipif(simd.INTERPRETED, reason="a model takes hours without a compiler")
@pytest.mark.skipif(importlib.util.find_spec(CARRIER) is None, reason=f"{CARRIER} is not installed")
@pytest.mark.parametrize("levels", [8, 16])
def test_best_is_within_a_thousandth_of_exact_on_the_real_model(levels: int) -> None:
    with safe_open(find_model() / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if name.endswith(("query.weight", "dense.weight")) and "pooler" not in name:
                weight = tensors.get_tensor(name)[:48]
                found = errors(weight, *codebooks.best(weight, levels))
                least = errors(weight, *codebooks.exact(weight, levels))
                assert found.sum() <= 1.001 * least.sum(), name


@pytest.mark.skipif(simd.INTERPRETED, reason="rows of some hundred weights take minutes without a compiler")
def test_more_levels_never_raise_the_error() -> None:
    weight = draw_row("t3", (4, 600), np.random.default_rng(6))
    found = [errors(weight, *codebooks.exact(weight, levels)) for levels in (2, 3, 4, 7, 8, 16, 100, 255, 256)]
    assert all((few > more).all() for few, more in pairwise(found))
    many = [errors(weight, *codebooks.best(weight, levels)) for levels in (2, 16, 255, 256)]
    assert (many[-1] <= found[-2]).all() and (many[-1] < 1.01 * found[-1]).all()


# ---------------------------------------------------------------- clipped grids


@settings(max_examples=30)
@given(
    case=cases(KINDS, 12), bits=st.integers(2, 8), groups=st.integers(1, 3), dtype=st.sampled_from(("<f2", "<f4")),
    size=st.sampled_from((1, 2, 5)),
)  # fmt: skip
def test_clipped_grids_are_those_of_the_twin(case: Any, bits: int, groups: int, dtype: str, size: int) -> None:
    weight, importance, mask = (None if part is None else np.tile(part, (1, groups * size)) for part in case)
    group = weight.shape[1] // groups
    if dtype == "<f2" and np.abs(weight).max() > 60000:
        dtype = "<f4"
    found = clipping.clip(weight, bits, group, importance, mask, dtype)
    wanted = slow.clip(weight, bits, group, importance, mask, dtype)
    assert [part.tobytes() for part in found] == [part.tobytes() for part in wanted]


def decoded(weight: Floats, scale: Floats, zero: Any, codes: Any) -> npt.NDArray[np.float64]:
    wide = (np.repeat(part.astype(np.float64), weight.shape[1] // part.shape[1], axis=1) for part in (scale, zero))
    one, moved_by = wide
    return np.asarray((codes - moved_by) * one)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_weights_on_a_grid_come_back(bits: int, dtype: str) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (6, 40))
    codes[:, 3], codes[:, 5] = 0, 2**bits - 1
    zero = rng.integers(0, 2**bits, (6, 1))
    scale = (rng.random((6, 1)) + 0.01).astype(np.float16)
    weight = ((codes - zero) * scale.astype(np.float64)).astype(F32)
    found = clipping.clip(weight, bits, 0, dtype=dtype)
    assert (
        found[2].tobytes() == codes.astype(np.uint8).tobytes() and found[1].tobytes() == zero.astype(np.uint8).tobytes()
    )
    np.testing.assert_array_equal(found[0].astype(np.float16), scale)


@pytest.mark.skipif(simd.INTERPRETED, reason="thousands of weights take minutes without a compiler")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "t3"])
def test_clipping_beats_the_scales_that_packed_integers_try(kind: str, bits: int) -> None:
    weight = draw_row(kind, (16, 512), np.random.default_rng(7))
    found = decoded(weight, *clipping.clip(weight, bits, 128))
    parts = tiles.packed_int(weight, bits, 128, False, "<f2")
    other = decoded(weight, parts["scale"], parts["zero"], parts["codes"])
    assert np.square(found - weight).sum() < 0.995 * np.square(other - weight).sum()


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_groups_of_zeros_have_no_scale_and_the_smallest_weights_have_one(dtype: str) -> None:
    weight = np.zeros((3, 32), F32)
    weight[1, 4], weight[2, 20] = LEAST, -LEAST
    scale, zero, codes = clipping.clip(weight, 4, 32, dtype=dtype)
    assert scale[0] == zero[0] == 0 and not codes[0].any() and (scale[1:] > 0).all()
    assert np.isfinite(decoded(weight, scale, zero, codes)).all()
    assert not decoded(weight, scale, zero, codes)[weight == 0].any()
    nothing = clipping.clip(np.ones((1, 32), F32), 4, 32, np.zeros((1, 32), F32), dtype=dtype)
    assert not any(part.any() for part in nothing)


def test_no_decoded_weight_overflows_float32() -> None:
    weight = np.array([[LARGEST, -LARGEST, 0, 1], [LARGEST] * 4, [-LARGEST] * 4], F32)
    for bits in range(2, 9):
        scale, zero, codes = clipping.clip(weight, bits, 4, dtype="<f4")
        with np.errstate(over="raise"):
            out = (codes.astype(F32) - zero.astype(F32)) * scale
        assert np.isfinite(out).all() and (np.abs(out[1:]) > 0.9 * LARGEST).all()


# ---------------------------------------------------------------- of both


def everything() -> bytes:
    """The bytes of all doors on all kinds of weights, small enough for the interpreter."""
    found: list[Any] = []
    rng = np.random.default_rng(8)
    for kind in KINDS:
        weight, importance = draw_row(kind, (3, 165), rng), rng.random((3, 165)).astype(F32)
        found += codebooks.best(weight, 4, importance)
        found += codebooks.exact(weight[:, :40], 5)
        found.append(codebooks.assign(weight, draw_row(kind, (3, 9), rng)))
        found += clipping.clip(weight[:1, :40], 4, 20, dtype="<f4")
    return b"".join(part.tobytes() for part in found)


HASH = "import hashlib, test_codebooks as t; print(hashlib.sha256(t.everything()).hexdigest())"


@pytest.mark.parametrize(
    "setting",
    [*({"PACKFMT_SIMD": level} for level in simd.LEVELS), {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_DISABLE_JIT": "1"}],
    ids=lambda setting: "-".join(*setting.items()),
)
def test_every_machine_gives_the_same_bytes(setting: dict[str, str]) -> None:
    level = setting.get("PACKFMT_SIMD", simd.LEVEL)
    if level != simd.LEVEL and not simd.LEVELS[level] <= simd.FEATURES:
        pytest.skip(f"this machine has no {level}")
    here = {name: value for name, value in os.environ.items() if name not in ("PACKFMT_SIMD", "NUMBA_DISABLE_JIT")}
    path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    done = subprocess.run(
        [sys.executable, "-c", HASH],
        env=here | {"PYTHONPATH": path} | setting,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(everything()).hexdigest()


def test_the_number_of_threads_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "LEAST_WEIGHTS", 1)
    found = set()
    for count in ("1", "2", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        found.add(everything())
    assert len(found) == 1


@pytest.mark.skipif(simd.INTERPRETED, reason="vectors are compiled, and Numba compiles nothing here")
@pytest.mark.parametrize("size", [16, 48, 160])
def test_vectors_do_what_the_plain_loops_do(size: int) -> None:
    rng = np.random.default_rng(size)
    weight, tables = draw_row("whole", (3, size), rng), np.sort(draw_row("whole", (3, 12), rng), axis=1)
    both = [np.empty((3, size), np.uint8) for _ in range(2)]
    for loop, codes in zip((codebooks._nearest, codebooks._nearest_vectors), both, strict=True):
        loop(weight, tables, np.empty(11, F32), codes)
    assert both[0].tobytes() == both[1].tobytes()
    steps, weighs = draw_row("normal", (size,), rng) * F32(7), rng.random(size).astype(F32)
    for zero in (0, 4, 15):
        sums = [np.empty(16, F32) for _ in range(2)]
        for loop, out in zip((clipping._add_plainly, clipping._add_vectors), sums, strict=True):
            loop(steps, weighs, F32(1.1), F32(zero), F32(15), out)
        assert sums[0].tobytes() == sums[1].tobytes()


@pytest.mark.parametrize("shape", [(0, 20), (3, 0)])
def test_a_weight_without_rows_or_columns(shape: tuple[int, int]) -> None:
    weight = np.empty(shape, F32)
    for door in DOORS.values():
        tables, codes = door(weight, 4)
        assert tables.shape == (shape[0], 4) and codes.shape == shape and not tables.any()
    scale, zero, codes = clipping.clip(weight, 4, 0)
    assert len(scale) == len(zero) == shape[0] and codes.shape == shape


def test_what_does_not_fit_is_refused() -> None:
    weight = np.ones((2, 40), F32)
    mask = np.ones((2, 39), bool)
    for refused, reason in [
        (lambda: codebooks.best(weight, 1), "1 levels, needs 2 to 256"),
        (lambda: codebooks.exact(weight, 257), "257 levels, needs 2 to 256"),
        (lambda: codebooks.best(weight, 4, weight[:, 1:]), r"importance is \(2, 39\), needs \(1, 40\)"),
        (lambda: codebooks.best(weight, 4, mask=mask), r"the mask is \(2, 39\), needs \(1, 40\) or \(2, 40\)"),
        (lambda: codebooks.assign(weight, weight[:1]), r"tables are \(1, 40\), needs \(2, 1 to 256\)"),
        (lambda: codebooks.assign(weight, np.ones((2, 257), F32)), r"tables are \(2, 257\)"),
        (lambda: codebooks.assign(weight, np.ones((2, 0), F32)), r"tables are \(2, 0\)"),
        (lambda: clipping.clip(weight, 1, 8), "1 bits, needs 2 to 8"),
        (lambda: clipping.clip(weight, 9, 8), "9 bits, needs 2 to 8"),
        (lambda: clipping.clip(weight, 4, 16), "40 columns, needs a multiple of the group, 16"),
        (lambda: clipping.clip(weight, 4, -8), "40 columns, needs a multiple of the group, -8"),
        (lambda: clipping.clip(weight, 4, 8, dtype="bfloat16"), "no scale dtype is called 'bfloat16'"),
        (lambda: clipping.clip(weight, 4, 8, mask=mask), r"the mask is \(2, 39\)"),
        (lambda: clipping.clip(weight * F32(1e30), 4, 8), "10 of 10 scales overflow float16; use f32"),
    ]:  # fmt: skip
        with pytest.raises(LayoutError, match=reason):
            refused()
