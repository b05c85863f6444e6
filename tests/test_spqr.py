"""SpQR's and SqueezeLLM's bytes: places and float16 by plain loops, examples, vectors, encoders, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

import packfmt
from packfmt import codecs, grids, outliers, placement, slices, verify
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError
from packfmt.layout import dtype_of
from packfmt.outliers import Outliers
from tests import slow_products
from tests.models import same
from tests.pages import MANIFEST, SPEC, examples, page, spelled, tool
from tests.pieces import joined, some

F16, F32 = np.float16, np.float32
Array = np.ndarray
SPARSE = ("spqr_merged_add", "spqr_merged_replace", "spqr_tiles_add", "spqr_tiles_replace")
SQUEEZED = ("squeezellm_w3", "squeezellm_w4")
NAMES = ("spqr", *SPARSE, *SQUEEZED, "squeezellm_w4_csr_32_f32")
SHAPE = (48, 160)
with_outliers = pytest.mark.parametrize("name", SPARSE)


def heavy(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(F32)


def of(name: str, weight: Array | None = None, encoder: str = "") -> PackedTensor:
    return codecs.get(name).encode(heavy(*SHAPE) if weight is None else weight, encoder)


def any_records(rows: int, cols: int, seed: int = 0) -> Array:
    """Any codes, and four finite float16 of each tile in the bytes of two rows each."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 54, (rows * cols // 256, 16), np.uint64)
    shared = (rng.standard_normal((len(words), 4)) * np.exp2(rng.integers(-20, 7, (len(words), 1)))).astype("<f2")
    for i in range(16):
        words[:, i] |= shared.view(np.uint8)[:, i // 2].astype(np.uint64) << np.uint64(54)
    return words.reshape(-1, 1).view(np.uint8)


def slow_numbers(records: Array, rows: int, cols: int) -> Array:
    """What spec/formats/spqr.md says, one weight at a time."""
    words = [int.from_bytes(r.tobytes(), "little") for r in records]
    out = np.empty((rows, cols), F32)
    for r in range(rows):
        for t in range(cols // 16):
            tile = (r // 16 * cols // 16 + t) * 16
            data = bytes(words[tile + 2 * i] >> 54 & 255 for i in range(8))
            ss, sz, zs, zz = np.frombuffer(data, "<f2")
            word = words[tile + r % 16]
            s, z = ss * (F16(word & 7) - zs), sz * (F16(word >> 3 & 7) - zz)
            for i in range(16):
                out[r, 16 * t + i] = s * (F16(word >> 6 + 3 * i & 7) - z)
    return out


def slow_places(packed: PackedTensor) -> list[tuple[int, int, Array]]:
    """(row, column, value) of every outlier in SpQR's words."""
    words, begins, found = packed.components["outliers"], packed.components["outlier_rows"], []
    halves = [(int(w) & 0xFFFF, np.uint16(w >> 16).reshape(1).view(F16)[0]) for w in words.tolist()]
    for r in range(packed.matrix[0]):
        if "tiles" in packed.layout.name:
            mine = halves[begins[r // 16] : begins[r // 16 + 1]][r % 16 :: 16]
            mine = [(c, v) for c, v in mine if c or v.view("<u2")]
        else:
            mine = halves[begins[r] : begins[r + 1]]
        found += [(r, c, v) for c, v in mine]
    return found


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 48), (64, 80)])
def test_spqr_is_decoded_as_a_loop_does(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    records = any_records(*shape)
    packed = PackedTensor(codecs.get("spqr").layout, shape, {"dense_weights": records})
    with np.errstate(all="ignore"):
        expected = slow_numbers(records, *shape)
    assert same(packed.decode(), expected)
    monkeypatch.setattr(grids, "STRIP", 1)  # strips of as few rows as there can be
    assert same(grids.decode(packed.layout, shape, packed.components), expected)
    assert verify.tensor_findings(packed) == []


@with_outliers
def test_outliers_are_added_or_replace(name: str) -> None:
    packed = of(name, None, "magnitude:2%")
    expected = slow_numbers(packed.components["dense_weights"], *SHAPE)
    found = slow_places(packed)
    assert len(found) == round(0.02 * SHAPE[0] * SHAPE[1])
    for row, column, value in found:
        expected[row, column] = F32(value) if "replace" in name else expected[row, column] + F32(value)
    assert same(packed.decode(), expected)


@with_outliers
def test_a_product_adds_outliers_last(name: str) -> None:
    packed, x = of(name, None, "magnitude:2%"), heavy(2, SHAPE[1], seed=1)
    dense = PackedTensor(of("spqr").layout, SHAPE, {"dense_weights": packed.components["dense_weights"]})
    expected, numbers = slow_products.product(dense, x), dense.decode()
    for row, column, value in slow_places(packed):
        number = F32(value) - numbers[row, column] if "replace" in name else F32(value)
        expected[:, row] = expected[:, row] + number * x[:, column]
    assert same(packed.matmul(x), expected) and same(packfmt.prepare(packed).matmul(x), expected)


@pytest.mark.parametrize("name", SQUEEZED)
def test_squeezellm_words_hold_the_codes_of_columns(name: str) -> None:
    bits, rng = int(name[-1]), np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (5, 96))
    tables = rng.standard_normal((5, 1 << bits)).astype(F32)
    words = np.zeros((96 * bits // 32, 5), "<u4")
    for (row, column), code in np.ndenumerate(codes):
        for bit in range(bits):  # of the stream of a row's codes
            at = column * bits + bit
            words[at // 32, row] |= np.uint32((int(code) >> bit & 1) << at % 32)
    packed = PackedTensor(codecs.get(name).layout, (5, 96), {"qweight": words, "lookup_table": tables})
    assert same(packed.decode(), np.take_along_axis(tables, codes, 1))


def test_squeezellm_holds_what_a_codebook_holds() -> None:
    for name, base in zip(SQUEEZED, ("cb3_f32", "cb4_f32"), strict=True):
        for encoder in ("best", "exact"):
            packed, plain = of(name, None, encoder), of(base, None, encoder)
            assert same(packed.decode(), plain.decode())
            assert same(packed.repack(plain.layout).components["codes"], plain.components["codes"])
            assert same(plain.repack(packed.layout).components["qweight"], packed.components["qweight"])


def test_squeezellm_s_outliers_have_its_dtypes() -> None:
    """rows int32 [N + 1], cols int32, vals float32, which are added: the same bits in unsigned words."""
    packed = of("squeezellm_w4_csr_32_f32")
    stored = {name: (array.dtype.str, array.ndim) for name, array in packed.components.items() if "outlier" in name}
    assert stored == {"outlier_rows": ("<u4", 1), "outlier_columns": ("<u4", 1), "outliers": ("<f4", 1)}
    assert packed.components["outlier_rows"].shape == (SHAPE[0] + 1,)
    assert packed.layout.sparse and (packed.layout.sparse.coding, packed.layout.sparse.combine) == ("csr", "add")
    at = of("squeezellm_w4_csr_32_f32", None, "magnitude:1%")
    weight, found = heavy(*SHAPE), outliers.read(at.layout, SHAPE, at.components)
    row = np.repeat(np.arange(SHAPE[0]), np.diff(found.ends))
    assert np.abs(at.decode()[row, found.columns] - weight[row, found.columns]).max() < 1e-7


# ---------------------------------------------------------------- encoders


def error(name: str, weight: Array, **how: Array) -> float:
    found = codecs.get(name).encode(weight, **how).decode()
    return float(np.square(found.astype(np.float64) - weight).sum())


def test_spqr_beats_float16_scales_of_16_columns() -> None:
    weight = heavy(64, 512)
    assert error("spqr", weight) < 0.95 * error("ct_int3_g16_asym_f16", weight)


def test_spqr_of_its_own_numbers_is_near_them() -> None:
    weight = PackedTensor(
        codecs.get("spqr").layout, (32, 64), {"dense_weights": of("spqr", heavy(32, 64)).components["dense_weights"]}
    ).decode()
    assert error("spqr", weight) < 0.02 * error("spqr", heavy(32, 64))


def test_spqr_weighs_importance() -> None:
    weight, costs = heavy(32, 64), np.ones((32, 64), F32)
    costs[:, ::5] = 1000
    plain = np.square(of("spqr", weight).decode() - weight)[:, ::5].sum()
    weighed = codecs.get("spqr").encode(weight, importance=costs).decode()
    assert np.square(weighed - weight)[:, ::5].sum() < 0.5 * plain
    columns = codecs.get("spqr").encode(weight, importance=costs[0])
    assert same(columns.decode(), weighed)
    same_everywhere = codecs.get("spqr").encode(weight, importance=np.full(64, 2, F32))
    assert same(same_everywhere.decode(), of("spqr", weight).decode())


def test_a_tile_depends_on_itself_alone() -> None:
    weight = heavy(48, 160)
    for r in range(0, 48, 16):
        for c in range(0, 160, 80):
            alone = of("spqr", np.ascontiguousarray(weight[r : r + 16, c : c + 80])).decode()
            assert same(alone, of("spqr", weight).decode()[r : r + 16, c : c + 80])


def test_codes_are_those_of_the_nearest_numbers() -> None:
    packed = of("spqr")
    parts, weight = packed.unpack(), heavy(*SHAPE)
    off = np.abs(packed.decode() - weight)
    for code in range(8):
        other = placement.pack(packed.layout, SHAPE, {**parts, "codes": np.full(SHAPE, code, np.uint8)})
        assert (off <= np.abs(PackedTensor(packed.layout, SHAPE, other).decode() - weight)).all()


def test_zeros_and_rows_of_one_number() -> None:
    weight = np.zeros((32, 32), F32)
    assert not of("spqr", weight).components["dense_weights"].any() and not of("spqr", weight).decode().any()
    weight[16:] = 0.5
    weight[20:, 16:] = -1.75
    assert np.abs(of("spqr", weight).decode() - weight).max() < 0.001
    weight[:16] = np.arange(16)[:, None]
    assert error("spqr", weight) < 0.002 * np.square(weight).sum()


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-4, 1, 1000])
def test_small_and_large_weights_are_finite(size: float) -> None:
    weight = heavy(16, 64) * F32(size)
    found = of("spqr", weight)
    assert np.isfinite(found.decode()).all() and verify.tensor_findings(found) == []
    assert np.square(found.decode() - weight).sum() <= 1.01 * np.square(weight).sum()


def test_weights_beyond_float16_are_refused() -> None:
    weight = heavy(48, 32)
    weight[20, 3] = 1e6
    with pytest.raises(LayoutError, match="rows 16 to 31 overflow float16"):
        of("spqr", weight)


# ---------------------------------------------------------------- outliers


@with_outliers
def test_no_outliers_are_no_words(name: str) -> None:
    packed = of(name, None, "magnitude:0%")
    assert packed.components["outliers"].shape == (0,) and packed.components["outliers"].dtype == "<u4"
    assert not packed.components["outlier_rows"].any() and same(packed.decode(), of("spqr").decode())
    assert verify.tensor_findings(packed) == []
    plain = of("spqr").repack(packed.layout)
    assert all(same(plain.components[key], array) for key, array in packed.components.items())


@with_outliers
def test_columns_beyond_15_bits_are_refused(name: str) -> None:
    weight = np.zeros((16, 32768 + 16), F32)
    weight[:, 0], weight[3, 32767] = 1, 100
    assert of(name, weight, "magnitude:0.0002%").decode()[3, 32767] == 100
    weight[3, 32768] = 100
    with pytest.raises(LayoutError, match="outliers in column 32768, its numbers end at 32767"):
        of(name, weight, "magnitude:0.0004%")


def test_a_word_that_spqr_spoilt_is_refused() -> None:
    """Its join of a column from 32768 on with a value sets all bits of the value."""
    shape = (16, 40960)
    words, begins = np.array([40000 | 0xFFFF << 16], "<u4"), np.repeat([0, 1], [4, 13]).astype("<u4")
    records = np.zeros((shape[0] * shape[1] // 16, 8), np.uint8)
    packed = PackedTensor(
        codecs.get("spqr_merged_add").layout,
        shape,
        {"dense_weights": records, "outlier_rows": begins, "outliers": words},
    )
    with pytest.raises(LayoutError, match="the outlier in row 3, column 40000 is nan"):
        packed.decode()
    assert [rule for rule, _ in verify.tensor_findings(packed)] == ["PF123"]


def test_both_forms_hold_the_same_outliers() -> None:
    for combine in ("add", "replace"):
        merged = of(f"spqr_merged_{combine}", None, "sensitivity:3%")
        tiles = merged.repack(codecs.get(f"spqr_tiles_{combine}").layout)
        assert (
            len(tiles.components["outlier_rows"]) == SHAPE[0] // 16 + 1 and len(tiles.components["outliers"]) % 16 == 0
        )
        assert slow_places(tiles) == slow_places(merged) and same(tiles.decode(), merged.decode())
        again = tiles.repack(merged.layout)
        assert all(same(again.components[key], array) for key, array in merged.components.items())
        plain = codecs.get("spqr_csr_replace" if combine == "replace" else "spqr_csr").layout
        assert same(merged.repack(plain).decode(), merged.decode())
    assert merged.refuses(codecs.get("spqr_merged_add").layout)


def test_an_outlier_of_plus_zero_in_column_0_is_written_as_minus_zero_in_tiles() -> None:
    found = Outliers(np.repeat([0, 2], [3, 14]), np.array([0, 5], np.uint32), np.array([0, 3], F16))
    parts = outliers.write(codecs.get("spqr_tiles_add").layout, (16, 16), found)
    dense = of("spqr", heavy(16, 16)).components
    packed = PackedTensor(codecs.get("spqr_tiles_add").layout, (16, 16), {
        **dense, "outlier_rows": parts["outlier_rows"].reshape(-1), "outliers": parts["outliers"],
    })  # fmt: skip
    assert slow_places(packed) == [(2, 0, 0), (2, 5, 3)] and np.signbit(slow_places(packed)[0][2])
    dense_alone = of("spqr", heavy(16, 16)).decode()
    dense_alone[2, 5] += F32(3)
    assert same(packed.decode(), dense_alone)


# ---------------------------------------------------------------- what is wrong


def test_a_byte_that_differs_between_two_rows_is_found() -> None:
    records = of("spqr").components["dense_weights"].copy()
    records[5, 6] ^= 0x40  # the lowest bit of row 5's byte
    packed = PackedTensor(codecs.get("spqr").layout, SHAPE, {"dense_weights": records})
    assert same(packed.decode(), of("spqr").decode())  # row 4 counts
    ((rule, text),) = verify.tensor_findings(packed)
    assert rule == "PF120" and text == "1 bytes of second_order differ between the two rows that have them"


@pytest.mark.parametrize("bit", [62, 63])
def test_bits_of_nothing_are_found(bit: int) -> None:
    records = of("spqr").components["dense_weights"].copy()
    records[7, 7] |= 1 << bit - 56
    ((rule, _),) = verify.tensor_findings(PackedTensor(codecs.get("spqr").layout, SHAPE, {"dense_weights": records}))
    assert rule == "PF121"


@pytest.mark.parametrize("shape", [(24, 32), (16, 24)])
def test_shapes_of_no_whole_tiles_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(LayoutError, match="needs a multiple of 16"):
        of("spqr", heavy(*shape))


def test_a_grid_without_whole_tiles_is_refused() -> None:
    parts = {"codes": np.zeros((8, 16), np.uint8)} | dict.fromkeys(
        ("scale", "zero", "second_order"), np.zeros((8, 1), "u1")
    )
    odd = parts | {"second_order": np.zeros((7, 1), np.uint8)}
    assert grids.findings(codecs.get("spqr").layout, odd) == []  # and decoding says what is wrong
    with pytest.raises(LayoutError, match="grid 'spqr' cannot take these parts"):
        grids.dequantize(codecs.get("spqr").layout.grid, parts)


@pytest.mark.parametrize("name", ["spqr", *SQUEEZED])
def test_rows_are_cut_and_joined(name: str) -> None:
    packed, unit = of(name), slices.unit(codecs.get(name).layout, SHAPE)
    assert unit == (16 if name == "spqr" else 1)
    parts = [(a, some(packed, a, b)) for a, b in ((0, 16), (16, 48))]
    assert all(same(part.decode(), packed.decode()[a : a + len(part.decode())]) for a, part in parts)
    assert all(same(joined(packed.layout, SHAPE, parts).components[k], array) for k, array in packed.components.items())


# ---------------------------------------------------------------- others' bytes, and pages


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_writes_and_reads_the_same(name: str) -> None:
    """Parts of other shapes and seeds than the vectors of spec/."""
    twin = tool("outlier_twin").TWINS[name]
    for rows, cols, seed in ((16, 32, 1), (64, 96, 2)):
        parts = twin.draw(rows, cols, np.random.default_rng(seed))
        stored = twin.write(parts)
        packed = PackedTensor(codecs.get(name).layout, (rows, cols), stored)
        assert same(packed.decode(), twin.weights(parts))
        again = placement.pack(packed.layout, packed.matrix, packed.unpack())
        assert all(same(again[key], array) for key, array in stored.items())
        assert verify.tensor_findings(packed) == []


@pytest.mark.parametrize("name", NAMES)
def test_there_are_vectors(name: str) -> None:
    assert MANIFEST[f"{name}/random.f32"]["tool"] == "outlier_twin"
    assert (SPEC / "vectors" / name / "random.f32").exists()


EXAMPLES = dict(examples(("spqr", "squeezellm")))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_worked_example_is_what_the_code_does(name: str) -> None:
    """Blocks of bytes are the components in their order; rows without a line `w[...]` are zeros."""
    text = EXAMPLES[name]
    raw = [spelled(block) for block in re.findall(r"```hex\n(.*?)```", text, re.S)]
    rows, cols = (int(n) for n in re.search(r"(\d+) rows? of (\d+)", text + "16 rows of 16").groups())  # type: ignore[union-attr]
    layout = codecs.get(name).layout
    known = {c.name: (dtype_of(c.dtype), c.shape) for c in layout.fit(rows, cols).components}
    stored = {}
    for c, data in zip(layout.components, raw, strict=True):
        dtype, shape = known.get(c.name) or (dtype_of(c.dtype), (-1,))  # type: ignore[union-attr]
        stored[c.name] = np.frombuffer(data, dtype).reshape(shape)
    expected = np.zeros((rows, cols), F32)
    for row, numbers in re.findall(r"^    w\[(\d+)\] = (.*)", text, re.M):
        expected[int(row)] = np.array(numbers.split(", "), F32)
    found = PackedTensor(layout, (rows, cols), stored)
    assert expected.any() and (found.decode() == expected).all() and verify.tensor_findings(found) == []


def test_the_page_names_every_format() -> None:
    for family in ("spqr", "squeezellm"):
        assert all(f"`{name}`" in page(family) for name in codecs.FAMILIES[family])
