"""Rows become tiles of 16 rows, byte for byte as a slow loop has them."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt.errors import LayoutError
from packfmt.kernels import pages, retile, threads

Bytes = np.ndarray

pytestmark = pytest.mark.kernels


def noise(*shape: int, below: int = 256) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, below, shape, dtype=np.uint8)


def slow_tiles(source: np.ndarray, first: int, size: int, record: int, count: int, unit: int) -> np.ndarray:
    """out[g, i, u, r] = unit u of run i of row 16 g + r."""
    groups = -(-len(source) // 16)
    out = np.zeros((groups, count, size // unit, 16, unit), np.uint8)
    for row, bytes_of_row in enumerate(source):
        for run in range(count):
            begins = first + run * record
            out[row // 16, run, :, row % 16] = bytes_of_row[begins : begins + size].reshape(-1, unit)
    return out.reshape(-1)


def slow_fields(codes: np.ndarray, below: int, width: int) -> np.ndarray:
    """Field by field, as the docstring of `pack_planes` says."""
    rows, blocks, planes, columns = codes.shape
    fields = 8 // width
    out = np.zeros((-(-rows // 16), blocks, planes, columns // fields // 4, 16, 4), np.uint8)
    for row, block, plane, column in np.ndindex(codes.shape):
        step, j = divmod(column, 4)
        v, f = divmod(step, fields)
        code = int(codes[row, block, plane, column]) >> below & ((1 << width) - 1)
        out[row // 16, block, plane, v, row % 16, j] |= code << (f * width)
    return out.reshape(-1)


def slow_stream(codes: np.ndarray) -> np.ndarray:
    groups, quads = -(-len(codes) // 16), codes.shape[1]
    out = np.zeros((groups, quads * 5 // 32, 16, 4), np.uint8)
    for row, codes_of_row in enumerate(codes):
        number = sum(int(code) << (5 * j) for j, code in enumerate(codes_of_row))
        stream = np.frombuffer(number.to_bytes(quads * 5 // 8, "little"), np.uint8)
        out[row // 16, :, row % 16] = stream.reshape(-1, 4)
    return out.reshape(-1)


def room(nbytes: int) -> np.ndarray:
    """Memory with something in it: every byte must be written."""
    out = pages.empty(nbytes)
    out[:] = 0xA5
    return out


ROWS = (1, 15, 16, 17, 32, 47)
# of a record: bytes before the codes, of codes, behind them
RECORDS = {
    "nvfp4": (4, 32, 0),
    "nvfp4, alone": (0, 8, 0),
    "mxfp4": (1, 16, 0),
    "q4_0": (2, 16, 0),
    "q8_0": (2, 32, 0),
    "tq2_0": (0, 64, 2),
    "sherry": (0, 40, 2),
    "one dword": (3, 4, 0),
    "three dwords": (0, 12, 1),
    "long": (5, 4 * 53, 7),
}


def interleave(source: Bytes, out: Bytes, size: int, first: int = 0, record: int = 0, blocks: int = 1) -> None:
    """Codes alone."""
    retile.retile(source, retile.Move(out, first, size, record or size, blocks))


def interleave_values(source: Bytes, out: Bytes, first: int, record: int, count: int, itemsize: int) -> None:
    """Scales alone."""
    retile.retile(source, retile.Move(out, first, itemsize, record, count, itemsize))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", RECORDS)
def test_dwords_of_codes_are_interleaved(name: str, blocks: int, rows: int) -> None:
    before, size, behind = RECORDS[name]
    record = before + size + behind
    source, out = noise(rows, record * blocks), room(-(-rows // 16) * 16 * size * blocks)
    interleave(source, out, size, before, record, blocks)
    assert out.tobytes() == slow_tiles(source, before, size, record, blocks, 4).tobytes()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("record", [4, 7, 66])
def test_values_of_records_are_interleaved(record: int, itemsize: int, rows: int) -> None:
    source, out = noise(rows, 5 * record), room(-(-rows // 16) * 16 * itemsize * 5)
    interleave_values(source, out, record - itemsize, record, 5, itemsize)
    assert out.tobytes() == slow_tiles(source, record - itemsize, itemsize, record, 5, itemsize).tobytes()


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16, 31, 33])
def test_values_that_touch_are_interleaved(count: int, itemsize: int) -> None:
    source, out = noise(35, count * itemsize), room(3 * 16 * count * itemsize)
    interleave_values(source, out, 0, itemsize, count, itemsize)
    assert out.tobytes() == slow_tiles(source, 0, itemsize, itemsize, count, itemsize).tobytes()


@given(data=st.data())
def test_any_moves_out_of_any_rows_in_one_pass(data: st.DataObject) -> None:
    draw = data.draw
    rows, row_bytes, more = draw(st.integers(0, 50)), draw(st.integers(1, 200)), draw(st.integers(0, 9))
    source = noise(rows, row_bytes + more)[:, :row_bytes]
    moves = []
    for _ in range(draw(st.integers(0, 3))):
        unit = draw(st.sampled_from([unit for unit in (1, 2, 4) if unit <= row_bytes]))
        size = unit * draw(st.integers(1, row_bytes // unit))
        count = draw(st.integers(1, row_bytes // size))
        record = draw(st.integers(size, (row_bytes - size) // (count - 1) if count > 1 else row_bytes))
        first = draw(st.integers(0, row_bytes - size - (count - 1) * record))
        # rows of the output may lie apart, and begin anywhere
        each, shift = count * size * 16, draw(st.sampled_from([0, 0, 3, 64]))
        out = room(-(-rows // 16) * (each + shift) + shift)[shift:].reshape(-1, each + shift)[:, :each]
        moves.append(retile.Move(out, first, size, record, count, unit))
    retile.retile(source, *moves)
    for move in moves:
        assert move.out.tobytes() == slow_tiles(source, *move[1:]).tobytes()


@pytest.mark.parametrize("order", ["columns first", "backwards", "every other", "not to be written"])
def test_rows_may_lie_anywhere(order: str) -> None:
    source = noise(66, 70)
    source = {
        "columns first": np.asfortranarray(source),
        "backwards": source[::-1],
        "every other": source[::2, ::2],
        "not to be written": np.frombuffer(source.tobytes(), np.uint8).reshape(66, 70),
    }[order]
    codes, scale = room(-(-len(source) // 16) * 16 * 32), room(-(-len(source) // 16) * 16)
    retile.retile(source, retile.Move(codes, 3, 32, 32, 1), retile.Move(scale, 0, 1, 1, 1, 1))
    assert codes.tobytes() == slow_tiles(source, 3, 32, 32, 1, 4).tobytes()
    assert scale.tobytes() == slow_tiles(source, 0, 1, 1, 1, 1).tobytes()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("widths", retile.WIDTHS)
@pytest.mark.parametrize("planes", [1, 2])
def test_fields_of_planes_are_packed(planes: int, widths: tuple[int, ...], rows: int) -> None:
    for vectors in (1, 2, 3):
        columns = 32 // min(widths) * vectors
        codes = noise(rows, 2, planes, columns, below=1 << sum(widths))
        size = -(-rows // 16) * codes[0].size * 2
        low, high = room(size * widths[0]), room(size * sum(widths[1:]))
        retile.pack_planes(codes, low, high, widths)
        assert low.tobytes() == slow_fields(codes, 0, widths[0]).tobytes()
        if widths[1:]:
            assert high.tobytes() == slow_fields(codes, *widths).tobytes()


def test_planes_may_lie_anywhere_and_strings_apart() -> None:
    codes = noise(33, 3, 64, 2, below=8).transpose(0, 1, 3, 2)  # columns do not touch
    codes_of_rows = np.ascontiguousarray(codes.transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3)  # planes are the slowest
    for given_codes in (codes, codes_of_rows):
        low, high = room(3 * 2000).reshape(3, 2000), room(3 * 1024).reshape(3, 1024)
        retile.pack_planes(given_codes, low[:, 100:1636], high[:, 256:], (2, 1))
        assert low[:, 100:1636].tobytes() == slow_fields(codes, 0, 2).tobytes()
        assert high[:, 256:].tobytes() == slow_fields(codes, 2, 1).tobytes()
        assert set(low[:, :100].flat) | set(low[:, 1636:].flat) | set(high[:, :256].flat) == {0xA5}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quads", [32, 96])
def test_quads_become_streams(quads: int, rows: int) -> None:
    codes, out = noise(rows, quads, below=32), room(-(-rows // 16) * quads * 10)
    retile.pack_quads(codes, out)
    assert out.tobytes() == slow_stream(codes).tobytes()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_writes_the_same(count: int) -> None:
    rows = 16 * 40 + 5
    source = noise(rows, 66 * 32)
    codes, scale = room(41 * 16 * 64 * 32), room(41 * 16 * 2 * 32)
    low, stream = room(41 * 16 * 528), room(41 * 10 * 2112)
    with threads.limit(count):
        retile.retile(source, retile.Move(codes, 0, 64, 66, 32), retile.Move(scale, 64, 2, 66, 32, 2))
        retile.pack_planes(source[:, None, None] & 3, low, room(0), (2,))
        retile.pack_quads(source & 31, stream)
    assert codes.tobytes() == slow_tiles(source, 0, 64, 66, 32, 4).tobytes()
    assert scale.tobytes() == slow_tiles(source, 64, 2, 66, 32, 2).tobytes()
    fields = (source & 3).reshape(rows, -1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    assert (
        low.tobytes() == slow_tiles(np.bitwise_or.reduce(fields, axis=2).reshape(rows, -1), 0, 528, 0, 1, 4).tobytes()
    )
    bits = (source & 31)[..., None] >> np.arange(5, dtype=np.uint8) & 1
    packed = np.packbits(bits.reshape(rows, -1), axis=1, bitorder="little")
    assert stream.tobytes() == slow_tiles(packed, 0, packed.shape[1], 0, 1, 4).tobytes()


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


NO_BYTES = np.empty(0, np.uint8)
REFUSED = {
    "no rows": (lambda: retile.retile(NO_BYTES), r"rows to tile are uint8 \(0,\), needs uint8 \(rows, row bytes\)"),
    "no bytes": (lambda: interleave(np.zeros((1, 4), "f4"), room(64), 4), "rows to tile are float32"),
    "beyond the row": (
        lambda: interleave(noise(1, 33), room(512), 32, 2),
        "1 runs of 32 bytes, .* from byte 2 on, end at byte 34, rows have 33",
    ),
    "before the row": (
        lambda: interleave(noise(1, 33), room(512), 32, -1),
        "from byte -1 on, end at byte 31, rows have 33",
    ),
    "half a unit": (lambda: interleave(noise(1, 33), room(512), 6), "6 bytes in units of 4, needs whole units"),
    "no unit": (lambda: interleave_values(noise(1, 33), room(512), 0, 3, 1, 3), "3 bytes in units of 3"),
    "small out": (
        lambda: interleave(noise(17, 8), room(128), 8),
        r"out is uint8 \(128,\), needs uint8 \(2, 128\)",
    ),
    "no memory of one's own": (
        lambda: interleave(noise(1, 4), np.frombuffer(bytes(64), np.uint8), 4),
        "out cannot be written to, needs memory of one's own",
    ),
    "out of floats": (lambda: interleave(noise(1, 4), np.zeros(64, "f4"), 4), r"out is float32 \(64,\)"),
    "widths": (
        lambda: retile.pack_planes(noise(1, 1, 1, 32), room(64), NO_BYTES, (3,)),
        r"codes have widths \(3,\), needs one of \(1,\), \(2,\)",
    ),
    "columns": (
        lambda: retile.pack_planes(noise(1, 1, 1, 16), room(64), NO_BYTES, (1,)),
        r"blocks have 16 columns, needs a multiple of 32 for widths \(1,\)",
    ),
    "high": (
        lambda: retile.pack_planes(noise(1, 1, 1, 32), room(128), room(128), (2, 1)),
        r"high is uint8 \(128,\), needs uint8 \(1, 64\)",
    ),
    "codes": (lambda: retile.pack_planes(noise(1, 4), room(64), NO_BYTES, (8,)), r"needs uint8 \(rows, blocks, planes"),
    "quads": (lambda: retile.pack_quads(noise(1, 33), room(320)), "rows have 33 quads, needs a multiple of 32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(LayoutError, match=message):
        call()
