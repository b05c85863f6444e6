"""Bits of rows become bits of tiles, as a slow loop over single bits has them."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt.errors import LayoutError
from packfmt.kernels import pages, retile, threads

pytestmark = pytest.mark.kernels

every_kind = pytest.mark.parametrize(("lanes", "unit", "woven"), retile.KINDS)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def room(nbytes: int) -> np.ndarray:
    """Memory with something in it: every byte must be written."""
    out = pages.empty(nbytes)
    out[:] = 0xA5
    return out


def plain(to: np.ndarray, bits: np.ndarray, source: tuple[int, ...]) -> retile.Wanted:
    return retile.Wanted(np.array(source), bits, to)


def bit_of(source: retile.Source, row: int, run: int, bit: int) -> int:
    place = int(source.rows[row]) + run * source.record + bit // 8
    return int(source.data[place]) >> (bit % 8) & 1


def slow_elements(wanted: retile.Wanted, sources: list[retile.Source], row: int, run: int) -> list[int]:
    """What each element is."""
    out = []
    width = wanted.to.shape[1]
    for i, bits in enumerate(wanted.bits):
        code = sum(
            bit_of(sources[k], row, run, int(b)) << j for j, (k, b) in enumerate(zip(wanted.source, bits, strict=True))
        )
        if wanted.table is not None and wanted.low is not None:
            code = int(wanted.table[code]) >> int(wanted.low[i])
        out.append(code & ((1 << width) - 1))
    return out


def slow_tiles(
    wanted: list[retile.Wanted], sources: list[retile.Source], times: int, counts: list[int], target: retile.Target
) -> list[bytes]:
    """The strings of all targets, which have so many words of a row in each run."""
    rows, lanes, unit = len(sources[0].rows), target.lanes, target.unit
    groups, words = -(-rows // lanes), sum(counts)
    found = np.zeros((groups * lanes, times, words), np.uint64)  # rows that there are not stay so
    for row, run in np.ndindex(rows, times):
        for one in wanted:
            for places, element in zip(one.to, slow_elements(one, sources, row, run), strict=True):
                for j, bit in enumerate(places.tolist()):
                    found[row, run, bit // 64] |= np.uint64((element >> j & 1) << bit % 64)
    order = [r // 2 + r % 2 * 16 for r in range(32)] if target.woven else list(range(lanes))
    strings = []
    for first, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        mine = np.ascontiguousarray(found[:, :, first : first + count].astype("<u8")).view(np.uint8)
        units = mine.reshape(groups, lanes, times, -1, unit)[:, order]
        strings.append(np.ascontiguousarray(units.transpose(0, 2, 3, 1, 4)).tobytes())
    return strings


def check(
    wanted: list[retile.Wanted],
    sources: list[retile.Source],
    times: int,
    counts: list[int],
    kind: tuple[int, int, bool] = (16, 4, False),
    apart: int = 0,
    shift: int = 0,
) -> None:
    """apart, shift : bytes between groups of a target, and before the first"""
    rows, lanes = len(sources[0].rows), kind[0]
    groups = -(-rows // lanes)
    sizes = [times * 8 * lanes * count for count in counts]
    rooms = [room(groups * (size + apart) + shift)[shift:].reshape(groups, -1) for size in sizes]
    targets = [retile.Target(r[:, :size], *kind) for r, size in zip(rooms, sizes, strict=True)]
    retile.rearrange(retile.program(wanted, sum(counts)), sources, times, targets)
    for target, string in zip(targets, slow_tiles(wanted, sources, times, counts, targets[0]), strict=True):
        assert target.out.tobytes() == string
    for whole, size in zip(rooms, sizes, strict=True):
        assert set(whole[:, size:].flat) <= {0xA5}


def rows_of(count: int, nbytes: int, record: int = 0) -> retile.Source:
    return retile.Source(noise(count, nbytes).reshape(-1), np.arange(count) * nbytes, record)


@every_kind
@pytest.mark.parametrize("rows", [1, 16, 31, 33, 64])
def test_dwords_go_where_rows_lie_side_by_side(rows: int, lanes: int, unit: int, woven: bool) -> None:
    bits = np.arange(64)[None]
    check([plain(bits, 8 + bits, (0,) * 64)], [rows_of(rows, 24, 8)], 2, [1], (lanes, unit, woven))


@given(data=st.data())
def test_any_bits_of_any_rows_in_one_pass(data: st.DataObject) -> None:
    draw = data.draw
    rows, times = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    sources, reaches = [], []
    for _ in range(draw(st.integers(1, 2))):
        reach, record = draw(st.integers(1, 150)), draw(st.integers(0, 40))
        size = reach + (times - 1) * record
        begins = rng.permutation(rows) * draw(st.integers(0, size))
        sources.append(retile.Source(rng.integers(0, 256, size + int(begins.max()), np.uint8), begins, record))
        reaches.append(reach)
    counts = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    width = draw(st.integers(1, 8))
    some = rng.permutation(64 * sum(counts))
    to = some[: draw(st.integers(1, len(some) // width)) * width].reshape(-1, width)
    which = tuple(int(rng.integers(len(sources))) for _ in range(width))
    bits = np.stack([rng.integers(0, 8 * reaches[k], len(to)) for k in which], axis=1)
    apart, shift = draw(st.sampled_from([(0, 0), (64, 0), (3, 0), (0, 5)]))
    check([plain(to, bits, which)], sources, times, counts, draw(st.sampled_from(retile.KINDS)), apart, shift)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
@pytest.mark.parametrize("bits", [1, 6, 7, 8])
def test_every_code_is_looked_up(bits: int, dtype: str) -> None:
    """Some parts of its number, wherever they begin in it, with elements that are not looked up beside them."""
    table = noise(256 * np.dtype(dtype).itemsize).view(dtype)
    data = np.arange(1 << bits, dtype=np.uint8).repeat(2)
    source = retile.Source(data, np.arange(len(data)), 0)
    low = np.arange(0, 8 * table.itemsize - 3, 3)
    codes = np.broadcast_to(np.arange(bits), (len(low), bits))
    looked_up = retile.Wanted(np.zeros(bits, int), codes, np.arange(4 * len(low)).reshape(-1, 4), table, low)
    beside = plain(np.arange(64, 65)[None], np.arange(1)[None], (0,))
    check([looked_up, beside], [source], 1, [2])


@every_kind
def test_rows_that_there_are_not_are_zeros(lanes: int, unit: int, woven: bool) -> None:
    """Though the table has something for 0, in two runs."""
    bits = np.arange(64).reshape(8, 8)
    looked_up = retile.Wanted(np.zeros(8, int), bits, bits, 255 - np.arange(256, dtype=np.uint8), np.zeros(8, int))
    check([looked_up], [rows_of(37, 16, 8)], 2, [1], (lanes, unit, woven), apart=5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_writes_the_same(count: int) -> None:
    bits = np.arange(512)[None]
    program = retile.program([plain(bits, bits[:, ::-1], (0,) * 512)], 8)
    sources, out = [rows_of(16 * 81 + 5, 64 * 9, 64)], room(82 * 9 * 1024).reshape(82, -1)
    with threads.limit(count):
        retile.rearrange(program, sources, 9, [retile.Target(out, 16, 4)])
    stored = np.unpackbits(sources[0].data.reshape(-1, 9, 64), axis=2, bitorder="little")[..., ::-1]
    padded = np.zeros((82 * 16, 9, 64), np.uint8)
    padded[: len(stored)] = np.packbits(stored, axis=2, bitorder="little")
    assert out.tobytes() == padded.reshape(82, 16, -1, 4).transpose(0, 2, 1, 3).tobytes()


@pytest.mark.parametrize("nbytes", [0, 1, 4096, pages.HUGE - 1, pages.HUGE, 3 * pages.HUGE + 5])
def test_memory_begins_where_vectors_and_large_pages_do(nbytes: int) -> None:
    memory, large = pages.empty(nbytes), hasattr(mmap, "MADV_HUGEPAGE")
    assert (memory.dtype, memory.shape, memory.flags.c_contiguous) == (np.uint8, (nbytes,), True)
    assert not nbytes or memory.ctypes.data % (pages.HUGE if large and nbytes >= pages.HUGE else 64) == 0
    memory[:] = 1
    assert memory.all()


def test_memory_is_given_back_with_its_last_view() -> None:
    memory = pages.empty(pages.HUGE)
    room = memory.base
    while not isinstance(room, mmap.mmap | None):
        room = room.obj if isinstance(room, memoryview) else room.base
    if room is None:
        pytest.skip("this system has no large pages, so NumPy keeps the memory")
    seen, view = weakref.ref(room), memory[5:]
    del room, memory
    assert seen() is not None
    view[:] = 1
    del view
    assert seen() is None


def test_memory_without_large_pages_is_as_good(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    memory = pages.empty(pages.HUGE + 1)
    assert memory.shape == (pages.HUGE + 1,)
    assert memory.ctypes.data % 64 == 0


def refused(source: retile.Source, times: int, out: np.ndarray, kind: tuple[int, int, bool] = (16, 4, False)) -> None:
    bits = np.arange(32)[None]
    retile.rearrange(retile.program([plain(bits, bits, (0,) * 32)], 1), [source], times, [retile.Target(out, *kind)])


REFUSED = {
    "groups": (lambda: refused(rows_of(17, 4), 1, noise(1, 64)), r"out is \(1, 64\), needs groups of 16 of 17 rows"),
    "runs": (lambda: refused(rows_of(16, 8, 4), 2, noise(1, 96)), "and 2 runs of whole vectors"),
    "backwards": (
        lambda: refused(rows_of(16, 8, -4), 2, noise(1, 128)),
        "16 rows from byte 0 on, runs every -4 bytes, needs 16 rows, and no negative numbers",
    ),
    "lanes": (lambda: refused(rows_of(16, 4), 1, noise(1, 64), (8, 4, False)), "8 rows in units of 4, needs one of"),
    "unit": (lambda: refused(rows_of(16, 4), 1, noise(1, 64), (16, 3, False)), "16 rows in units of 3, needs one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(LayoutError, match=message):
        call()
