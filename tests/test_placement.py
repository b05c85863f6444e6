"""Pack, unpack and repack: other projects' bytes, a slow twin, random layouts, memory."""

from __future__ import annotations

import base64
import json
import tracemalloc
from hashlib import sha256
from itertools import permutations, product
from math import prod
from pathlib import Path
from unittest import mock

import numba
import numpy as np
import pytest
import slow_placement as slow
from foreign_layouts import FOREIGN, Foreign, one
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import layouts, tasks

from packfmt import codecs
from packfmt.errors import LayoutError
from packfmt.kernels import move
from packfmt.layout import (
    COLS,
    DENSE,
    ROWS,
    Codes,
    Component,
    Digit,
    Layout,
    Part,
    Stream,
    Values,
    blocks,
    cols,
    dtype_of,
    grid,
    rows,
)
from packfmt.placement import difference, pack, repack, unpack

pytestmark = pytest.mark.kernels

VECTORS = {e["name"]: e for e in json.loads((Path(__file__).parent / "data/placement.json").read_text())["layouts"]}

Q4_0 = blocks("q4_0", 32, Values("scale", "<f2"), Codes("codes", 4, (cols(1, 16),), (cols(16, 2),)), grid=grid("raw"))
Q5_0 = blocks(
    "q5_0",
    32,
    Values("scale", "<f2"),
    Codes("codes", 1, (), (cols(1, 32),), "<u4", low=4),
    Codes("codes", 4, (cols(1, 16),), (cols(16, 2),)),
    grid=grid("raw"),
)
TQ2_0 = blocks(
    "tq2_0",
    256,
    Codes("codes", 2, (cols(128, 2), cols(1, 32)), (cols(32, 4),)),
    Values("scale", "<f2"),
    grid=grid("raw"),
)
TILE = one(
    "tile",
    (rows(16), cols(32)),
    Codes("codes", 4, (cols(8, 4), rows(1, 16), cols(1, 4)), (cols(4, 2),)),
    Values("scale", "<f2", (rows(1, 16),)),
)
PLANES_5 = Layout(
    "planes_5",
    (
        Component("high", (Digit("bit", 1, 1), rows(), cols(8)), (Codes("codes", 1, (), (cols(1, 8),), low=4),)),
        Component("low", (cols(2), rows()), (Codes("codes", 4, (), (cols(1, 2, True),)),)),
        Component("scales", (cols(32), rows()), (Values("scale", "<f2"),)),
    ),
    grid("raw"),
)
OWN = (Q4_0, Q5_0, TQ2_0, TILE, PLANES_5)


def small(layout: Layout) -> tuple[int, int]:
    """A shape of a few blocks, the last of a padded axis not full."""
    return tuple(2 * n if n > 1 else 13 for n in layout.block.values())  # type: ignore[return-value]


def random_part(rng: np.random.Generator, part: Part) -> np.ndarray:
    dtype = dtype_of(part.dtype)
    raw = rng.integers(0, 2 if part.dtype == "?" else 256, prod(part.shape) * dtype.itemsize, np.uint8)
    array = raw.view(dtype).reshape(part.shape)
    return array & dtype.type((1 << part.bits) - 1) if part.bits < 8 * dtype.itemsize else array


def random_parts(layout: Layout, shape: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: random_part(rng, part) for name, part in layout.fit(*shape).parts.items()}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def check_layout(layout: Layout, shape: tuple[int, int]) -> None:
    """The slow twin's bytes; parts survive pack and unpack; bytes survive unpack and pack but for bits of no member."""
    parts = random_parts(layout, shape)
    components = pack(layout, shape, parts)
    assert {name: c.tobytes() for name, c in components.items()} == slow.pack(layout, shape, parts)
    assert_same(unpack(layout, shape, components), parts)
    rng, used = np.random.default_rng(1), {name: bytearray(c.nbytes) for name, c in components.items()}
    for bit in slow.every_bit(layout, shape):
        used[bit.place[0]][bit.place[1] // 8] |= 1 << bit.place[1] % 8
    noise = {name: rng.integers(0, 256, c.nbytes, np.uint8) for name, c in components.items()}
    raw = {name: noise[name].view(c.dtype).reshape(c.shape) for name, c in components.items()}
    again = pack(layout, shape, unpack(layout, shape, raw))
    for name, mask in used.items():
        assert again[name].tobytes() == (noise[name] & np.frombuffer(mask, np.uint8)).tobytes()


# ---------------------------------------------------------------- other projects' layouts


def foreign(only_vectors: bool = False) -> pytest.MarkDecorator:
    chosen = [f for f in FOREIGN if f.vector or not only_vectors]
    return pytest.mark.parametrize("foreign", chosen, ids=[f.layout.name for f in chosen])


def known_parts(vector: dict, shape: tuple[int, int], part: Part) -> dict[str, np.ndarray]:
    """The codes that the vectors were made of (`codes` and `note` in placement.json)."""
    if part.name == "scale":
        column = np.arange(64, dtype=np.uint16).view(np.float16)[:, None]
        return {"scale": np.repeat(column, part.shape[1], axis=1)}
    row, col = np.indices(shape)
    codes = (37 * row + 11 * col + row * col // 5) % (1 << part.bits)
    return {"codes": codes.astype(np.uint8)}


def test_every_vector_belongs_to_a_layout() -> None:
    assert {f.vector for f in FOREIGN if f.vector} == VECTORS.keys()
    assert len(VECTORS) == 18


@foreign(only_vectors=True)
def test_a_foreign_layout_gives_its_projects_bytes(foreign: Foreign) -> None:
    vector = VECTORS[foreign.vector]
    want = base64.b64decode(vector["base64"])
    assert (len(want), sha256(want).hexdigest()) == (vector["nbytes"], vector["sha256"])
    (part,) = foreign.layout.fit(*foreign.shape).parts.values()
    parts = known_parts(vector, foreign.shape, part)
    packed = pack(foreign.layout, foreign.shape, parts)
    assert packed["weight"].tobytes() == want * (len(packed["weight"].tobytes()) // len(want))
    assert_same(unpack(foreign.layout, foreign.shape, packed), parts)


@foreign()
def test_a_foreign_layout_has_its_projects_shape(foreign: Foreign) -> None:
    assert foreign.layout.shapes(*foreign.shape) == {"weight": foreign.stored}


@foreign()
def test_a_foreign_layout_agrees_with_the_slow_twin(foreign: Foreign) -> None:
    check_layout(foreign.layout, small(foreign.layout))


@pytest.mark.parametrize("layout", OWN, ids=lambda layout: layout.name)
def test_a_layout_of_several_members_agrees_with_the_slow_twin(layout: Layout) -> None:
    check_layout(layout, small(layout))


RAGGED = {
    "fp8_block": ((100, 300), (129, 128), (1, 1)),
    "fp8_block_e8m0": ((130, 257),),
    "ct_int4_row_asym": ((13, 30), (8, 32), (1, 1)),
    "ct_int3_legacy_row_asym": ((11, 32), (10, 20), (9, 7)),
    "ct_int6_legacy_g32": ((3, 64),),
    "arcquant_64": ((2, 64), (3, 128)),
    "mxfp4_out3": ((2, 64),),
}


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in RAGGED.items() for shape in shapes])
def test_cells_cut_at_the_edge_and_channels_stored_twice_agree_with_the_slow_twin(
    name: str, shape: tuple[int, int]
) -> None:
    check_layout(codecs.get(name).layout, shape)


# ---------------------------------------------------------------- random layouts


@given(data=st.data())
def test_a_random_layout_agrees_with_the_slow_twin(data: st.DataObject) -> None:
    task = data.draw(tasks())
    layout = data.draw(layouts(task))
    assert slow.is_bijection(layout, task.shape)
    check_layout(layout, task.shape)


@given(data=st.data())
def test_repack_between_random_layouts_is_unpack_and_pack(data: st.DataObject) -> None:
    task = data.draw(tasks())
    before, after = data.draw(layouts(task)), data.draw(layouts(task))
    components = pack(before, task.shape, random_parts(before, task.shape))
    assert difference(before, after, task.shape) == ""
    want = pack(after, task.shape, unpack(before, task.shape, components))
    assert_same(repack(before, after, task.shape, components), want)


def written(outer: move.Steps, pieces: move.Pieces, run: move.Run) -> list[set[int]]:
    """The bytes that every step of run and outer counter writes to."""
    digits = [[step * i for i in range(size)] for size, step in zip(outer.size, outer.target, strict=True)]
    starts = [sum(steps) for steps in product(*digits, [run.target * i for i in range(run.size)])]
    return [{int(start + byte) for byte in pieces.target} for start in starts]


@given(data=st.data())
def test_no_two_steps_of_a_move_write_to_one_byte(data: st.DataObject) -> None:
    """What makes the result the same on any number of threads."""
    task = data.draw(tasks())
    before, after = data.draw(layouts(task)), data.draw(layouts(task))
    parts = random_parts(before, task.shape)

    def looked_at(source, target, outer, pieces, run) -> None:  # type: ignore[no-untyped-def]
        steps = written(outer, pieces, run)
        assert sum(map(len, steps)) == len(set().union(*steps))
        plain_move(source, target, outer, pieces, run)

    plain_move = move.move
    with mock.patch.object(move, "move", looked_at):
        components = pack(before, task.shape, parts)
        assert_same(unpack(before, task.shape, components), parts)
        repack(before, after, task.shape, components)


@pytest.mark.parametrize("layout", OWN, ids=lambda layout: layout.name)
def test_any_number_of_threads_gives_the_same_bytes(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (64, 512)
    monkeypatch.setattr(move, "LEAST_PIECES", 1)
    parts = random_parts(layout, shape)
    results = []
    for count in (1, 2, 7):
        monkeypatch.setenv("PACKFMT_THREADS", str(count))
        results.append(pack(layout, shape, parts))
        assert_same(results[-1], results[0])
        assert_same(unpack(layout, shape, results[-1]), parts)


def test_repack_between_all_known_layouts_is_unpack_and_pack() -> None:
    shape, pairs = (64, 256), 0
    known = [f.layout for f in FOREIGN] + list(OWN)
    for before, after in permutations(known, 2):
        if difference(before, after, shape) == "":
            components = pack(before, shape, random_parts(before, shape))
            want = pack(after, shape, unpack(before, shape, components))
            assert_same(repack(before, after, shape, components), want)
            pairs += 1
    assert pairs == 9 * 8 + 4 * 3 + 3 * 2 + 3 * (2 * 1)  # of 4, 3 and 6 bits; of 2 bits, q4_0 and tile, two of 5 bits


def test_repack_names_what_differs() -> None:
    shape = (64, 256)
    gptq_2, gptq_4 = FOREIGN[0].layout, FOREIGN[1].layout
    with pytest.raises(LayoutError, match="gptq_2 to gptq_4: codes is u1 of 2 bits in one, u1 of 4 in the other"):
        repack(gptq_2, gptq_4, shape, {})
    with pytest.raises(LayoutError, match="q4_0 to gptq_4: one has scale, codes, the other codes"):
        repack(Q4_0, gptq_4, shape, {})
    wide = Codes("codes", 4, (cols(32, 2), cols(1, 16)), (cols(16, 2),))
    wide = blocks("wide", 64, Values("scale", "<f2"), wide, grid=grid("raw"))
    assert difference(Q4_0, wide, shape) == "scale is (64, 8) in one, (64, 4) in the other"
    turned = Layout("turned", gptq_4.components, grid("raw"), (COLS, ROWS))
    assert difference(gptq_4, turned, shape).startswith("the axes of one are")


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("empty", ["rows", "cols", "rows and cols"])
@pytest.mark.parametrize("layout", [*OWN, *(f.layout for f in FOREIGN)], ids=lambda layout: layout.name)
def test_a_weight_without_elements_packs_and_unpacks(layout: Layout, empty: str) -> None:
    shape = tuple(0 if side in empty else 2 * n for side, n in layout.block.items())
    parts = random_parts(layout, shape)
    components = pack(layout, shape, parts)
    assert_same(unpack(layout, shape, components), parts)
    assert any(p.size for p in parts.values()) == any(c.size for c in components.values())


@pytest.mark.parametrize("name", DENSE)
def test_dense_numbers_stay_as_they_are(name: str) -> None:
    parts = random_parts(DENSE[name], (5, 7))
    assert_same(pack(DENSE[name], (5, 7), parts), parts)
    assert_same(unpack(DENSE[name], (5, 7), parts), parts)


def test_streams_pass_as_they_are() -> None:
    layout = Layout("outliers", (*DENSE["f32"].components, Stream("vals", "<f4")), grid("raw"))
    parts = random_parts(DENSE["f32"], (2, 3)) | {"vals": np.array([1.5, 2.5], np.float32)}
    components = pack(layout, (2, 3), parts)
    assert components["vals"] is parts["vals"]
    assert_same(unpack(layout, (2, 3), components), parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.pop("scale"), r"no part 'scale'; there are codes"),
        (lambda p: p.update(scale=p["scale"].astype(np.float32)), r"part 'scale' is float32 \(4, 2\), needs float16"),
        (lambda p: p.update(codes=p["codes"][:, :32]), r"part 'codes' is uint8 \(4, 32\), needs uint8 \(4, 64\)"),
        (lambda p: p.update(codes=p["codes"] | 16), r"part 'codes' has code 31, needs below 16"),
    ],
)
def test_pack_names_the_part_that_does_not_fit(change, says: str) -> None:  # type: ignore[no-untyped-def]
    parts = random_parts(Q4_0, (4, 64))
    parts["codes"][0, 0] = 15
    change(parts)
    with pytest.raises(LayoutError, match=f"q4_0: {says}"):
        pack(Q4_0, (4, 64), parts)


@pytest.mark.parametrize("move", [unpack, lambda layout, shape, c: repack(layout, TILE, shape, c)])
@pytest.mark.parametrize(
    ("components", "says"),
    [
        ({}, "no component 'blocks'; there are "),
        ({"blocks": np.zeros((16, 17), np.uint8)}, r"component 'blocks' is uint8 \(16, 17\), needs uint8 \(16, 36\)"),
        ({"blocks": np.zeros((16, 36), np.int8)}, r"component 'blocks' is int8 \(16, 36\), needs uint8"),
    ],
)
def test_a_component_that_does_not_fit_is_named(move, components, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayoutError, match=f"q4_0: {says}"):
        move(Q4_0, (16, 64), components)


def test_arrays_need_not_be_contiguous_or_writable() -> None:
    parts = random_parts(Q4_0, (8, 64))
    want = pack(Q4_0, (8, 64), parts)
    turned = {name: np.asfortranarray(array) for name, array in parts.items()}
    assert_same(pack(Q4_0, (8, 64), turned), want)
    frozen = {"blocks": np.frombuffer(want["blocks"].tobytes(), np.uint8).reshape(want["blocks"].shape)}
    assert_same(unpack(Q4_0, (8, 64), frozen), parts)


# ---------------------------------------------------------------- memory


NAMED = {f.layout.name: f.layout for f in FOREIGN}
LEGACY, DENSE_3 = NAMED["compressed_tensors_legacy_3"], NAMED["compressed_tensors_3"]


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="a tensor of this size takes the interpreter minutes")
@pytest.mark.parametrize(
    ("source", "target"),
    [(Q4_0, TILE), (LEGACY, DENSE_3), (DENSE_3, LEGACY), (NAMED["gptq_4"], NAMED["hqq_4bit_u8"]), (Q5_0, PLANES_5)],
    ids=lambda layout: layout.name,
)
def test_nothing_of_the_size_of_the_tensor_is_made(source: Layout, target: Layout) -> None:
    shape = (4096, 4096)
    components = pack(source, shape, random_parts(source, shape))
    parts = unpack(source, shape, components)
    for work in (
        lambda: unpack(source, shape, components),
        lambda: pack(source, shape, parts),
        lambda: repack(source, target, shape, components),
    ):
        tracemalloc.start()
        result = work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak - sum(array.nbytes for array in result.values()) < 2 << 20
