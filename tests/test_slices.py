"""Rows of packed tensors: cut out of their bytes, and read from files of every kind, by several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from packfmt import checkpoint, codecs, conversion, slices
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, PackedTensor
from packfmt.errors import ContainerError, LayoutError
from packfmt.layout import COLS, Axis, Codes, Component, Digit, Layout, cols, dtype_of, grid, rows
from packfmt.plan import Recipe
from tests import test_gpt_oss as gpt_oss
from tests.models import BF16, folder, normal
from tests.pieces import joined, same, some

NUMBERED = (  # formats with numbers in their names, one of each kind and then some
    *("arcquant_64", "ct_int4_g128", "ct_int3_row", "ct_int4_g32_asym", "e3m2_g32", "e4m3_row", "e4m3_tensor"),
    *("mote_4", "mxfp4_h32", "mxfp4_out8", "mxfp4_tile16", "nvfp4_h16", "nvfp4_out32", "nvfp4_tile16", "nvfp4_x4"),
    *("sherry_nibbles32", "sherry_words32", "tl1_256_128_32", "tl2_32_48_32_24"),
)
NAMES = (*codecs.names(), *NUMBERED)
WHOLE = {  # a digit of the rows does not stand at the beginning
    *("bitnet", "bitnet_divide"),  # row r and those a quarter of all rows further share a byte
    *("mote_4", "nvfp4_x4"),  # as many scales as experts, whatever the rows
    *(n for n in codecs.names() if codecs.get(n).layout.streams),  # outliers, as many as there are
}


def layout_of(name: str) -> Layout:
    return codecs.get(name).layout


def shapes(layout: Layout) -> list[tuple[int, int]]:
    """Some that fit: of several units, and where a layout allows, with a last one that is not full."""
    block = layout.block
    cols = 48 if "tl2" in layout.name else block["cols"] * -(-512 // block["cols"])  # of matrices of one size
    step = max(block["rows"], slices.unit(layout, (block["rows"] * 256, cols)))
    return [(5 * step, cols), (4 * step + block["rows"], cols)]


def random_tensor(layout: Layout, shape: tuple[int, int], seed: int = 0) -> PackedTensor:
    rng = np.random.default_rng(seed)
    components = {
        c.name: rng.integers(0, 256, c.nbytes, np.uint8).view(dtype_of(c.dtype)).reshape(c.shape)
        for c in layout.fit(*shape).components
    }
    return PackedTensor(layout, shape, components)


def rows_of_parts(tensor: PackedTensor, start: int, stop: int) -> dict[str, Array]:
    """Of each part of the whole tensor, what these rows have of it, by the axis of the rows alone."""
    layout, (rows, cols) = tensor.layout, tensor.matrix
    axis = next(i for i, a in enumerate(layout.axes) if a.of == "rows")
    fitted = layout.fit(rows, cols).parts
    found = {}
    for name, part in tensor.unpack().items():
        share = 0 if name in slices.shared(layout) else fitted[name].share[axis] * layout.axes[axis].per
        cut = [slice(None)] * part.ndim
        if share:
            cut[axis] = slice(start // share, -(-stop // share))
        found[name] = part[tuple(cut)]
    return found


# ---------------------------------------------------------------- where rows lie


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WHOLE])
def test_rows_cut_out_of_any_bytes_have_the_parts_of_the_whole(name: str) -> None:
    layout = layout_of(name)
    for shape in shapes(layout):
        unit, tensor = slices.unit(layout, shape), random_tensor(layout, shape)
        assert 0 < unit < shape[0]
        for start, stop in (
            (0, unit),
            (unit, 3 * unit),
            (2 * unit, shape[0]),
            (shape[0] // unit * unit - unit, shape[0]),
        ):
            wanted = rows_of_parts(tensor, start, stop)
            for part, array in some(tensor, start, stop).unpack().items():
                assert array.shape == wanted[part].shape, part
                assert array.tobytes() == wanted[part].tobytes(), part


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WHOLE])
@pytest.mark.parametrize("units", [1, 2, 3])
def test_slices_put_together_are_the_whole(name: str, units: int) -> None:
    for shape in shapes(layout_of(name)):
        tensor = random_tensor(layout_of(name), shape)
        each = units * slices.unit(tensor.layout, shape)
        parts = [(start, some(tensor, start, min(shape[0], start + each))) for start in range(0, shape[0], each)]
        assert same(joined(tensor.layout, shape, parts), tensor)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WHOLE])
def test_spans_of_neighbouring_rows_cover_each_byte_once(name: str) -> None:
    layout = layout_of(name)
    for shape in shapes(layout):
        unit, shared = slices.unit(layout, shape), 0
        seen = {c.name: np.zeros(c.nbytes, int) for c in layout.fit(*shape).components}
        for start in range(0, shape[0], unit):
            for component, runs in slices.spans(layout, shape, start, min(shape[0], start + unit)).items():
                for begin, nbytes in runs:
                    assert 0 <= begin <= begin + nbytes <= len(seen[component])
                    seen[component][begin : begin + nbytes] += 1
        for component, times in seen.items():
            cut = (slices.cuts(layout, shape) or {})[component]
            shared += cut is None
            assert (times == (1 if cut else -(-shape[0] // unit))).all(), component
        assert bool(shared) <= bool(slices.shared(layout))


@pytest.mark.parametrize("count", [1, 31, 33, 96, 100])
def test_only_the_last_slice_has_padding(count: int) -> None:
    axes = Axis("rows", "rows", pad=32), COLS
    cell = Codes("codes", 4, (), (cols(1, 2),))
    layout = Layout("padded", (Component("codes", (rows(), cols(2)), (cell,)),), grid("affine", zero=8), axes)
    shape = count, 64
    tensor = random_tensor(layout, shape)
    assert slices.unit(layout, shape) == 32
    parts = [(start, some(tensor, start, min(count, start + 32))) for start in range(0, count, 32)]
    assert [len(part.components["codes"]) for _, part in parts] == [32] * len(parts)
    assert same(joined(layout, shape, parts), tensor)


def test_rows_that_are_counted_down_cannot_be_cut() -> None:
    cell = Codes("codes", 4, (), (cols(1, 2),))
    for reverse in False, True:
        over = Digit("rows", reverse=reverse), cols(2)
        layout = Layout("turned", (Component("codes", over, (cell,)),), grid("affine", zero=8))
        assert slices.unit(layout, (8, 64)) == (0 if reverse else 1)


def test_which_formats_cannot_be_cut() -> None:
    found = {n for n in NAMES for s in shapes(layout_of(n))[:1] if not slices.unit(layout_of(n), s)}
    assert found == WHOLE


# ---------------------------------------------------------------- rows read from files

WEIGHT = "layers.0.mlp.up_proj.weight"
FILES = (  # layout, output, and what is read: a scale for all lies apart, in the same tensor, or beside it
    *(("q8_0", "out"), ("nvfp4", "out"), ("nvfp4_ct", "out"), ("sherry_t32", "out"), ("mxfp4_tile16", "out")),
    *(("fp8_block", "out"), ("nvfp4_rows", "out"), ("i2_s", "out"), ("bf16", "out")),
    *(("q8_0", "out.gguf"), ("nvfp4", "out.gguf"), ("i2_s", "out.gguf"), ("tq1_0", "out.gguf"), ("bf16", "out.gguf")),
    *(("nvfp4_ct", "compressed_tensors"), ("ct_int4_g128", "compressed_tensors"), ("fp8_tensor", "compressed_tensors")),
)


def converted(tmp_path: Path, to: str, output: str, rows: int = 300) -> Path:
    weights = {
        WEIGHT: normal(rows, 512, seed=1, dtype=BF16),
        "model.layers.0.mlp.experts.down_proj": normal(4, 32, 256, seed=2, dtype=BF16),
    }
    if output == "compressed_tensors":
        weights = {f"model.{WEIGHT}": weights[WEIGHT]}
    model = folder(tmp_path / "model", weights)
    container = output if output == "compressed_tensors" else ""
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, tmp_path / output, Recipe(to), container)
        conversion.run(plan, source, tmp_path / output)
    return tmp_path / output


def read_in_slices(model: Checkpoint, name: str, units: int) -> None:
    """Rows of a tensor, several units at a time, are those of the whole."""
    whole = model[name]
    each = units * slices.unit(whole.layout, whole.matrix)
    assert each
    parts = []
    for start in range(0, whole.matrix[0], each):
        part = model.rows(name, start, min(whole.matrix[0], start + each))
        assert same(part, some(whole, start, start + part.shape[0]))
        parts.append((start, part))
    flat = PackedTensor(whole.layout, whole.matrix, whole.components, whole.dtype)
    assert same(joined(whole.layout, whole.matrix, parts), flat)


@pytest.mark.parametrize(("to", "output"), FILES)
def test_rows_read_from_a_file_are_those_of_the_whole(tmp_path: Path, to: str, output: str) -> None:
    with checkpoint.open(converted(tmp_path, to, output, 304 if to == "nvfp4_rows" else 300)) as model:
        for name in model:
            assert model.index[name].layout == layout_of(to)
            for units in 1, 3:
                read_in_slices(model, name, units)


def test_rows_of_foreign_experts_are_those_of_the_whole(tmp_path: Path) -> None:
    with checkpoint.open(gpt_oss.folder(tmp_path / "m", gpt_oss.tensors())) as model:
        for name in gpt_oss.GATE_UP, gpt_oss.DOWN:
            assert len(model[name].shape) == 3
            read_in_slices(model, name, 7)


@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_rows_that_are_not_there_are_refused_in_one_line(tmp_path: Path, output: str) -> None:
    with checkpoint.open(converted(tmp_path, "q8_0", output)) as model:
        for start, stop in (-1, 5), (5, 5), (7, 3), (0, 301), (300, 301):
            with pytest.raises(LayoutError, match=rf"^{WEIGHT}: rows {start} to {stop} of 300 in q8_0, needs [^\n]*$"):
                model.rows(WEIGHT, start, stop)


def test_rows_in_the_middle_of_a_unit_are_refused_with_what_is_needed(tmp_path: Path) -> None:
    with checkpoint.open(converted(tmp_path, "sherry_t32", "out")) as model:
        for start, stop in (16, 64), (0, 40), (290, 300):
            with pytest.raises(LayoutError, match=r"in sherry_t32, needs multiples of 32$"):
                model.rows(WEIGHT, start, stop)
        assert model.rows(WEIGHT, 288, 300).shape == (12, 512)


def test_a_tensor_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    needs = pytest.raises(LayoutError, match=r"rows 0 to 4 of 300 in mote_4, needs all at once$")
    with checkpoint.open(converted(tmp_path, "mote_4", "out")) as model, needs:
        model.rows(WEIGHT, 0, 4)


@pytest.mark.parametrize(("to", "output"), [("q8_0", "out"), ("q8_0", "out.gguf"), ("nvfp4", "out.gguf")])
def test_a_file_that_shrinks_is_told_when_its_rows_are_read(tmp_path: Path, to: str, output: str) -> None:
    with checkpoint.open(converted(tmp_path, to, output)) as model:
        file = model.index[WEIGHT].file
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 3)
        with pytest.raises(ContainerError, match=r"^[^\n]*shrank[^\n]*$") as found:
            for name in model:
                for start in range(0, model.index[name].shape[-2], 100):
                    model.rows(name, start, min(model.index[name].shape[-2], start + 100))
        assert found.value.rule == "PF101"


@pytest.mark.parametrize(
    ("to", "output"), [("q8_0", "out"), ("nvfp4", "out"), ("q8_0", "out.gguf"), ("nvfp4", "out.gguf")]
)
def test_check_finds_each_bit_that_flipped_and_reading_rows_does_not(tmp_path: Path, to: str, output: str) -> None:
    path = converted(tmp_path, to, output)
    with checkpoint.open(path) as model:
        for name in model:
            model.check(name)
        file, end = model.index[WEIGHT].file, model.index[WEIGHT].file.stat().st_size
        names = list(model)
    good = file.read_bytes()
    data = len(good) - sum(c.nbytes for n in names for c in _components(path, n))
    caught = set()
    for at in np.random.default_rng(0).integers(data + 64, end, 20):
        flipped = bytearray(good)
        flipped[at] ^= 16
        file.write_bytes(flipped)
        with checkpoint.open(path) as model:
            for name in names:
                try:
                    model.check(name)
                except ContainerError as error:
                    assert error.rule == "PF109"
                    assert "\n" not in str(error)
                    caught.add((int(at), name))
                    with pytest.raises(ContainerError, match="not those that were written"):
                        model[name]
                else:
                    assert model[name].shape
                assert model.rows(name, 0, 1).shape[0] == 1
    assert len({at for at, _ in caught}) > 15  # padding has no checksum
    assert len(caught) == len({at for at, _ in caught})


def _components(path: Path, name: str) -> list[Array]:
    with checkpoint.open(path) as model:
        return list(model[name].components.values())


@pytest.mark.parametrize(
    ("to", "output"), [("nvfp4", "out"), ("nvfp4", "out.gguf"), ("ct_int4_g128", "compressed_tensors")]
)
def test_threads_read_rows_of_one_file_at_once(tmp_path: Path, to: str, output: str) -> None:
    with checkpoint.open(converted(tmp_path, to, output)) as model:
        wholes = {name: model[name] for name in model}
        places = [(n, i, j) for n in model for i in range(0, 100, 9) for j in (i + 1, i + 28)]
        order = [places[i] for i in np.random.default_rng(0).permutation(np.repeat(np.arange(len(places)), 4))]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda place: model.rows(*place), order))
        for (name, start, stop), part in zip(order, found, strict=True):
            assert same(part, some(wholes[name], start, stop))


def test_files_are_all_that_decides_what_is_read(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", {f"{i}.weight": normal(64, 64, seed=i) for i in range(4)}, shards=2)
    with checkpoint.open(model) as source:
        index = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
        assert {p.name for p in source.files()} == {*index, "model.safetensors.index.json", "config.json"}
        assert all(p.parent == model for p in source.files())
        for output in "out.gguf", "out.safetensors":
            plan = conversion.plan_for(source, tmp_path / output, Recipe("q8_0"))
            conversion.run(plan, source, tmp_path / output)
    for output in "out.gguf", "out.safetensors":
        with checkpoint.open(tmp_path / output) as one:
            assert one.files() == [tmp_path / output]
