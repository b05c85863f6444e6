"""Dense formats with outliers beside them: places, numbers, products and choices, by plain loops."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import packfmt
from packfmt import checkpoint, codecs, grids, outliers, placement, verify
from packfmt.cli import run
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError, PlanError
from packfmt.kernels import simd
from packfmt.layout import CODINGS, Axis, Component, Digit, Layout, Sparse, Stream, Values, dtype_of
from packfmt.outliers import Outliers
from tests import slow_products
from tests.converting import in_a_fresh_process
from tests.models import folder, same
from tests.pages import MANIFEST, SPEC, examples, spelled

F32 = np.float32
Array = np.ndarray
SHAPE = (48, 512)
NAMES = (
    "mxfp4_csr", "mxfp4_csr_replace", "ct_int3_g128_csr_32_f32", "ct_int4_g32_asym_csr_bf16", "nvfp4_csr",
    "f16_csr_f32", "tq2_0_gaps", "q4_0_gaps_f32_replace", "sherry_ell5", "cb3_ell3_32", "cb4_csr",
    "nvfp4_modelopt_ell9_bf16_replace",
)  # fmt: skip
every = pytest.mark.parametrize("name", NAMES)


def heavy(*shape: int, seed: int = 0) -> Array:
    """Weights of which some are far from the rest."""
    return (np.random.default_rng(seed).standard_t(3, shape) * 0.02).astype(F32)


def of(name: str, weight: Array | None = None, encoder: str = "") -> PackedTensor:
    return codecs.get(name).encode(heavy(*SHAPE) if weight is None else weight, encoder)


def dense(packed: PackedTensor) -> PackedTensor:
    """The tensor without its outliers."""
    apart = outliers.names(packed.layout)
    kept = {name: array for name, array in packed.components.items() if name not in apart}
    return PackedTensor(outliers.without(packed.layout), packed.shape, kept, packed.dtype)


def places(packed: PackedTensor) -> list[tuple[int, int, Array]]:
    """(row, column, value) of every outlier, by the sentences of the page."""
    parts, rows = packed.unpack(), packed.matrix[0]
    assert packed.layout.sparse
    coding, found = packed.layout.sparse.coding, []
    if coding == "ell":
        columns, values = (parts[name].reshape(rows, -1) for name in ("outlier_columns", "outliers"))
        found = [(r, int(c), v) for r in range(rows) for c, v in zip(columns[r], values[r], strict=True)]
    elif coding == "csr":
        begins = parts["outlier_rows"].reshape(-1)
        for r in range(rows):
            for i in range(begins[r], begins[r + 1]):
                found.append((r, int(parts["outlier_columns"][i]), parts["outliers"][i]))
    else:
        gaps, values = iter(parts["outlier_gaps"]), iter(parts["outliers"])
        for r, count in enumerate(parts["outlier_counts"].reshape(-1)):
            column = -1
            for _ in range(count):
                while (gap := int(next(gaps))) == 255:
                    column += 255
                column += gap + 1
                found.append((r, column, next(values)))
        assert next(gaps, None) is None
    return found


# ---------------------------------------------------------------- numbers


@every
def test_a_number_is_the_dense_one_and_its_outlier(name: str) -> None:
    packed = of(name)
    expected, replaces = dense(packed).decode(), name.endswith("replace")
    for row, column, value in places(packed):
        expected[row, column] = F32(value) if replaces else expected[row, column] + F32(value)
    assert same(packed.decode(), expected)
    assert same(grids.decode(packed.layout, packed.matrix, packed.components), expected)
    out = np.empty(SHAPE, dtype_of("bfloat16"))
    packed.decode(out=out)
    assert same(out, expected.astype(out.dtype))


@pytest.mark.kernels
@every
def test_a_product_adds_outliers_last_and_in_their_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packfmt.kernels.outliers.LEAST", 1)  # every slice is worth a thread
    packed, x = of(name), heavy(3, SHAPE[1], seed=1)
    expected, numbers = slow_products.product(dense(packed), x), dense(packed).decode()
    for row, column, value in places(packed):
        number = F32(value) - numbers[row, column] if name.endswith("replace") else F32(value)
        for i in range(len(x)):
            expected[i, row] = expected[i, row] + number * x[i, column]
    for threads in (1, 2, 3):
        assert same(packed.matmul(x, threads=threads), expected)
    ready = packfmt.prepare(packed)
    assert same(ready.matmul(x), expected)
    assert same(packfmt.prepare(ready.packed).matmul(x[:1]), expected[:1])  # as it comes from a file
    assert same(ready.packed.decode(), packed.decode())


@pytest.mark.kernels
def test_more_outliers_than_are_multiplied_at_once() -> None:
    weight = heavy(40, 512)
    packed, x = of("mxfp4_csr", weight, "magnitude:30%"), heavy(2, 512, seed=3)
    expected = slow_products.product(dense(packed), x)
    for row, column, value in places(packed):
        expected[:, row] = expected[:, row] + F32(value) * x[:, column]
    assert len(places(packed)) > 4096 and same(packed.matmul(x), expected)


def multiplied_elsewhere() -> None:
    """In a fresh process: its level, and whether products of all kinds of outliers have the bits that loops give."""
    from packfmt.kernels import outliers as kernel
    from packfmt.kernels import simd

    rng, good = np.random.default_rng(0), []
    for dtype in ("<f2", "bfloat16", "<f4"):
        for wide in (np.uint16, np.uint32):
            mask = rng.random((37, 90)) < 0.2
            mask[5], mask[6] = False, True
            values = rng.standard_normal(int(mask.sum())).astype(dtype_of(dtype))
            ends = np.concatenate([[0], np.cumsum(mask.sum(1))])
            rows, columns = np.nonzero(mask)
            x, out = rng.standard_normal((2, 90)).astype(F32), rng.standard_normal((2, 37)).astype(F32)
            expected = out.copy()
            for row, column, value in zip(rows, columns, values.astype(F32), strict=True):
                expected[:, row] = expected[:, row] + value * x[:, column]
            kernel.Product(ends, columns.astype(wide), values)(x, out)
            good.append(out.tobytes() == expected.tobytes())
    print(simd.LEVEL, good.count(True), len(good))


@pytest.mark.skipif(simd.INTERPRETED, reason="nothing is compiled, so there are no levels")
@pytest.mark.parametrize("level", simd.LEVELS)
def test_every_level_adds_the_same_bits(level: str) -> None:
    if not simd.LEVELS[level] <= simd.FEATURES:
        pytest.skip(f"this processor has no {', '.join(sorted(simd.LEVELS[level] - simd.FEATURES))}")
    assert in_a_fresh_process(multiplied_elsewhere, PACKFMT_SIMD=level).split() == [level, "6", "6"]


@every
def test_parts_and_components_are_each_others(name: str) -> None:
    packed = of(name)
    again = placement.pack(packed.layout, packed.matrix, packed.unpack())
    assert all(same(again[key], array) for key, array in packed.components.items())
    assert verify.tensor_findings(packed) == [] and verify.laws(packed, with_products=True) == []


@every
def test_a_description_of_outliers_is_read_as_it_was_written(name: str) -> None:
    layout = codecs.get(name).layout
    assert Layout.from_json(layout.to_json()) == layout and layout.sparse
    other = "add" if name.endswith("replace") else "replace"
    assert (
        Layout.from_json({**layout.to_json(), "sparse": {"coding": layout.sparse.coding, "combine": other}}) != layout
    )
    for wrong in ({"coding": "coo", "combine": "add"}, {"coding": "csr", "combine": "times"}, {"coding": "csr"}, 1):
        with pytest.raises(LayoutError, match=r"sparse|coding|combine"):
            Layout.from_json({**layout.to_json(), "sparse": wrong})


def test_no_rows_no_columns_and_no_outliers() -> None:
    for name in ("mxfp4_csr", "mxfp4_gaps"):
        for shape in ((0, 64), (3, 0), (0, 0)):
            packed = of(name, np.zeros(shape, F32))
            assert packed.decode().shape == shape and packed.matmul(np.zeros((2, shape[1]), F32)).shape == (2, shape[0])
        weight = heavy(8, 64)
        packed = of(name, weight, "magnitude:0%")
        assert not packed.components["outliers"].size and same(packed.decode(), of("mxfp4", weight).decode())


def test_rotated_formats_have_no_outliers() -> None:
    with pytest.raises(PlanError, match="nvfp4_h16 has rotated columns"):
        codecs.get("nvfp4_h16_csr")
    with pytest.raises(PlanError, match="mxfp4_csr has outliers already"):
        codecs.get("mxfp4_csr_ell4")
    with pytest.raises(PlanError, match="no format is called 'mxfp5'"):
        codecs.get("mxfp5_csr")


# ---------------------------------------------------------------- choices


def test_magnitude_takes_the_largest_and_of_equals_the_first() -> None:
    weight = np.zeros((4, 64), F32)
    weight[1, 5], weight[2, 7], weight[3, 63] = -9, 9, 9
    weight[0, :3] = 1
    packed = of("mxfp4_csr_f32", weight, "magnitude:1%")  # 2.56 of 256
    assert [(r, c) for r, c, _ in places(packed)] == [(1, 5), (2, 7), (3, 63)]
    packed = of("mxfp4_csr_f32", weight, "magnitude:0.8%")
    assert [(r, c) for r, c, _ in places(packed)] == [(1, 5), (2, 7)]


def test_sensitivity_takes_what_the_format_spoils() -> None:
    weight = np.full((1, 64), 4, F32)
    weight[0, 40] = 2.4  # between the numbers of the format, which has 4 exactly
    for encoder, column in (("sensitivity:1.6%", 40), ("magnitude:1.6%", 0)):
        assert [c for _, c, _ in places(of("mxfp4_csr", weight, encoder))] == [column]


def test_importance_counts() -> None:
    weight = np.ones((2, 64), F32)
    weight[0, 3] = 2
    costs = np.ones((2, 64), F32)
    costs[1, 9] = 100
    found = codecs.get("mxfp4_csr").encode(weight, "magnitude:0.8%", importance=costs)
    assert [(r, c) for r, c, _ in places(found)] == [(1, 9)]


@pytest.mark.parametrize("name", ["mxfp4_csr", "tq2_0_gaps", "cb3_csr", "ct_int3_row_csr"])
@pytest.mark.parametrize("rule", ["magnitude", "sensitivity"])
def test_more_outliers_are_never_worse(name: str, rule: str) -> None:
    weight = heavy(64, 512)
    errors = []
    for percent in ("0", "0.05", "0.1", "0.45", "1", "3", "10", "100"):
        found = of(name, weight, f"{rule}:{percent}%").decode()
        errors.append(float(np.square(found - weight, dtype=np.float64).sum()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[6] and errors[-1] < 1e-5 * errors[0]


@pytest.mark.parametrize("name", ["mxfp4_csr", "ct_int4_row_csr_32_f32", "mxfp4_csr_bf16"])
def test_a_budget_in_bits_is_kept(name: str) -> None:
    weight = heavy(128, 1024)
    for bits in (0.05, 0.1, 0.3):
        packed = of(name, weight, f"magnitude:{bits}bits")
        spent = packed.bits_per_weight - dense(packed).bits_per_weight
        assert bits - 0.001 < spent <= bits


@pytest.mark.parametrize(
    "encoder", ["magnitude:1", "magnitude:101%", "largest:1%", "magnitude:-1%", "sensitivity:xbits"]
)
def test_a_budget_that_is_none_is_refused(encoder: str) -> None:
    with pytest.raises(LayoutError, match="no encoder is called"):
        of("mxfp4_csr", encoder=encoder)


def test_as_many_in_every_row_has_no_budget() -> None:
    with pytest.raises(LayoutError, match="no encoder is called 'magnitude:1%'"):
        of("mxfp4_ell4", encoder="magnitude:1%")


# ---------------------------------------------------------------- from one to another


def test_codings_hold_the_same_outliers() -> None:
    csr = of("mxfp4_csr")
    for name in ("mxfp4_gaps", "mxfp4_csr_32_f32", "mxfp4_pairs_csr", "mxfp4_pairs_gaps_f32"):
        layout = codecs.get(name).layout
        assert csr.refuses(layout) == ""
        moved = csr.repack(layout)
        assert same(moved.decode(), csr.decode())
        again = moved.repack(csr.layout)
        assert all(same(again.components[key], array) for key, array in csr.components.items())


def test_outliers_that_do_not_fit_are_refused() -> None:
    csr = of("mxfp4_csr_f32")
    with pytest.raises(LayoutError, match="outliers are rounded to float16, the first in row 1, column 152"):
        csr.repack(codecs.get("mxfp4_csr").layout)
    with pytest.raises(LayoutError, match="mxfp4 has no outliers"):
        csr.repack(codecs.get("mxfp4").layout)
    with pytest.raises(LayoutError, match="are added to the dense numbers, those of mxfp4_csr_f32_replace do not"):
        csr.repack(codecs.get("mxfp4_csr_f32_replace").layout)
    with pytest.raises(LayoutError, match=r"row 0 has \d+ outliers, needs 3"):
        csr.repack(codecs.get("mxfp4_ell3_f32").layout)
    plain = of("mxfp4")
    assert same(plain.repack(codecs.get("mxfp4_csr").layout).decode(), plain.decode())
    with pytest.raises(LayoutError, match="has some in every row"):
        plain.repack(codecs.get("mxfp4_ell3").layout)


def test_a_column_beyond_16_bits_wants_the_wide_form() -> None:
    weight = np.zeros((1, 65536 + 64), F32)
    weight[0, -1] = 1000
    with pytest.raises(LayoutError, match="column 65599, its numbers end at 65535"):
        of("mxfp4_csr", weight, "magnitude:0.001%")
    for name in ("mxfp4_csr_32", "mxfp4_gaps"):
        assert of(name, weight, "magnitude:0.001%").decode()[0, -1] == 1000


@pytest.mark.parametrize("coding", ["csr_merged", "tiles_merged"])
def test_merged_words_as_spqr_has_them(coding: str) -> None:
    csr = of("f16_csr", heavy(32, 64), "magnitude:3%")
    found = outliers.read(csr.layout, csr.matrix, csr.components)
    layout = merged(coding)
    parts = outliers.write(layout, csr.matrix, found, exactly=True)
    words, begins = parts["outliers"], parts["outlier_rows"].reshape(-1)
    for r in range(32):
        mine = [
            (int(w) & 0xFFFF, np.array([int(w) >> 16], np.uint16).view(np.float16)[0])
            for w in _row(coding, words, begins, r)
        ]
        assert mine == [(c, v) for row, c, v in places(csr) if row == r]
    components = {"values": csr.components["values"], **placement.pack(outliers.alone(layout), csr.matrix, parts)}
    assert same(PackedTensor(layout, csr.shape, components).decode(), csr.decode())


def _row(coding: str, words: Array, begins: Array, r: int) -> list[Any]:
    if coding == "csr_merged":
        return list(words[begins[r] : begins[r + 1]])
    return [w for w in words[begins[r // 16] : begins[r // 16 + 1]][r % 16 :: 16] if w]


def merged(coding: str) -> Layout:
    """float16 numbers, and outliers as SpQR has them."""
    base, per = codecs.get("f16").layout, 16 if coding == "tiles_merged" else 1
    begins = Component("outlier_rows", (Digit("ends"),), (Values("outlier_rows", "<u4"),))
    ends = Axis("ends", "rows", per=per, pad=1, plus=1)
    return replace(
        base, name=f"f16_{coding}", components=(*base.components, begins, Stream("outliers", "<u4")),
        axes=(*base.axes, ends), sparse=Sparse(coding, "add"),
    )  # fmt: skip


# ---------------------------------------------------------------- what is wrong


def spoilt(name: str, spoil: Callable[[dict[str, Array]], None]) -> PackedTensor:
    packed = of(name)
    components = {key: array.copy() for key, array in packed.components.items()}
    spoil(components)
    return PackedTensor(packed.layout, packed.shape, components)


def at(row: int, which: int, c: dict[str, Array]) -> int:
    return int(c["outlier_rows"][row]) + which


def swap(c: dict[str, Array]) -> None:
    first = next(r for r in range(10, 48) if c["outlier_rows"][r + 1] - c["outlier_rows"][r] > 1)
    i = at(first, 0, c)
    c["outlier_columns"][[i, i + 1]] = c["outlier_columns"][[i + 1, i]]


def twice(c: dict[str, Array]) -> None:
    first = next(r for r in range(10, 48) if c["outlier_rows"][r + 1] - c["outlier_rows"][r] > 1)
    c["outlier_columns"][at(first, 1, c)] = c["outlier_columns"][at(first, 0, c)]


def set_(key: str, index: int, value: Any) -> Callable[[dict[str, Array]], None]:
    def spoil(c: dict[str, Array]) -> None:
        c[key][index] = value

    return spoil


def cut(key: str) -> Callable[[dict[str, Array]], None]:
    def spoil(c: dict[str, Array]) -> None:
        c[key] = c[key][:-1].copy()

    return spoil


WRONG = [
    ("mxfp4_csr", swap, r"an outlier in row \d+, column \d+ stands behind column \d+"),
    ("mxfp4_csr", twice, r"an outlier in row \d+, column \d+ stands twice"),
    ("mxfp4_csr", set_("outlier_columns", -1, 512), r"an outlier in row \d+, column 512, of 512 columns"),
    ("mxfp4_csr", set_("outliers", -1, np.nan), r"the outlier in row \d+, column \d+ is nan"),
    ("mxfp4_csr", set_("outliers", 0, -np.inf), r"the outlier in row \d+, column \d+ is -inf"),
    ("mxfp4_csr", set_("outlier_rows", 0, 1), r"outliers of row 0 begin at number 1, needs 0"),
    ("mxfp4_csr", set_("outlier_rows", 20, 2**32 - 1), r"outliers of row 21 begin at number \d+, needs 4294967295"),
    ("mxfp4_csr", set_("outlier_rows", -1, 2**32 - 1), r"outlier_rows ends with 4294967295, needs .* outliers, \d+"),
    ("mxfp4_csr", cut("outlier_columns"), r"\d+ outlier_columns for \d+ outliers"),
    ("mxfp4_csr", cut("outliers"), r"\d+ outlier_columns for \d+ outliers"),
    ("mxfp4_ell4", set_("outlier_columns", 7, 0), r"an outlier in row 7, column 0 stands twice"),
    ("mxfp4_ell4", set_("outlier_columns", (7, 3), 600), r"an outlier in row 7, column 600, of 512"),
    ("mxfp4_ell4", set_("outliers", (7, 3), np.inf), r"the outlier in row 7, column \d+ is inf"),
    ("mxfp4_gaps", set_("outlier_counts", 0, 60000), r"outlier_counts makes \d+, needs .* outliers"),
    ("mxfp4_gaps", cut("outlier_gaps"), r"\d+ outlier_gaps end in row 47"),
    ("mxfp4_gaps", cut("outliers"), r"outlier_counts makes \d+"),
    ("mxfp4_gaps", set_("outlier_gaps", 1, 255), r"outlier_gaps end in row|of 512 columns"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG)
def test_wrong_outliers_are_refused(name: str, spoil: Callable[[dict[str, Array]], None], message: str) -> None:
    packed = spoilt(name, spoil)
    for use in (packed.decode, lambda: packed.matmul(np.ones(512, F32)), lambda: packfmt.prepare(packed)):
        with pytest.raises(LayoutError, match=message):
            use()
    found = verify.tensor_findings(packed)
    assert [rule for rule, _ in found if rule == "PF123"] == ["PF123"]
    assert any(re.search(message, text) for _, text in found)


def test_outliers_are_refused_where_a_part_is_missing() -> None:
    packed = of("mxfp4_csr")
    layout = replace(packed.layout, components=packed.layout.components[:-1])
    components = {c.name: packed.components[c.name] for c in layout.components}
    with pytest.raises(LayoutError, match="has outliers as csr, and no 'outliers'"):
        PackedTensor(layout, packed.shape, components).decode()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["mxfp4_csr", "ct_int4_g128_gaps", "cb4_ell2"])
def test_a_checkpoint_with_outliers_is_converted_and_read_again(name: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "model", {"a.weight": heavy(32, 256), "b.weight": heavy(48, 256, seed=1)}, shards=2)
    assert run(["convert", str(source), str(tmp_path / "out"), "--to", name, "--verify"]) == 0
    with checkpoint.open(tmp_path / "out") as model:
        for key, weight in (("a.weight", heavy(32, 256)), ("b.weight", heavy(48, 256, seed=1))):
            expected = of(name, weight)
            assert model[key].layout == expected.layout
            assert all(same(model[key].components[c], array) for c, array in expected.components.items())
    assert verify.validate(tmp_path / "out") == []


def test_a_budget_is_written_into_the_command(tmp_path: Path) -> None:
    source = folder(tmp_path / "model", {"a.weight": heavy(32, 256)})
    out = tmp_path / "out.safetensors"
    assert run(["convert", str(source), str(out), "--to", "mxfp4_csr", "--encoder", "sensitivity:1%"]) == 0
    with checkpoint.open(out) as model:
        assert len(model["a.weight"].components["outliers"]) == round(0.01 * 32 * 256)


# ---------------------------------------------------------------- others' bytes, and pages

VECTORS = sorted({key.split("/")[0] for key, entry in MANIFEST.items() if entry["tool"] == "outlier_twin"})


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_read_and_packed_again(name: str) -> None:
    layout, stored = codecs.get(name).layout, {}
    rows, cols = MANIFEST[f"{name}/random.f32"]["shape"]
    known = {c.name: (dtype_of(c.dtype), c.shape) for c in layout.fit(rows, cols).components}
    for c in layout.components:
        dtype, shape = known.get(c.name) or (dtype_of(c.dtype), (-1,))  # type: ignore[union-attr]
        file = f"random.{c.name}.bin" if len(layout.components) > 1 else "random.bin"
        stored[c.name] = np.fromfile(SPEC / "vectors" / name / file, dtype).reshape(shape)
    packed = PackedTensor(layout, (rows, cols), stored)
    assert packed.decode().tobytes() == (SPEC / "vectors" / name / "random.f32").read_bytes()
    again = placement.pack(layout, packed.matrix, packed.unpack())
    if layout.sparse:
        found = outliers.write(layout, packed.matrix, outliers.read(layout, packed.matrix, stored), exactly=True)
        again |= placement.pack(outliers.alone(layout), packed.matrix, found)
    assert {key: array.tobytes() for key, array in again.items()} == {k: a.tobytes() for k, a in stored.items()}


def test_there_are_vectors_of_every_coding() -> None:
    assert {s.coding for name in VECTORS if (s := codecs.get(name).layout.sparse)} == set(CODINGS)


EXAMPLES = dict(examples(("dense_sparse", "codebook")))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_worked_example_is_what_the_code_does(name: str) -> None:
    """Blocks of bytes are the components in their order; a line `w[...]` has the numbers of the weight."""
    text = EXAMPLES[name]
    raw = [spelled(block) for block in re.findall(r"```hex\n(.*?)```", text, re.S)]
    numbers = np.array(re.findall(r"^    w = (.*)", text, re.M)[-1].split(", "), F32)  # type: ignore[index]
    rows = int(re.search(r"(\d+) rows? of (\d+)", text)[1])  # type: ignore[index]
    layout, shape = codecs.get(name).layout, (rows, len(numbers) // rows)
    dtypes = {c.name: (dtype_of(c.dtype), c.shape) for c in layout.fit(*shape).components}
    components = {}
    for c, data in zip(layout.components, raw, strict=True):
        dtype, stored = dtypes.get(c.name) or (dtype_of(c.dtype), (-1,))  # type: ignore[union-attr]
        components[c.name] = np.frombuffer(data, dtype).reshape(stored)
    packed = PackedTensor(layout, shape, components)
    assert same(packed.decode().reshape(-1), numbers)


def test_an_outlier_without_a_place_is_no_outlier() -> None:
    with pytest.raises(LayoutError, match="row 1 has 2 outliers, needs 1"):
        found = Outliers(np.array([0, 1, 3]), np.array([3, 1, 2], np.uint32), np.ones(3, F32))
        outliers.write(codecs.get("mxfp4_ell1").layout, (2, 32), found)
