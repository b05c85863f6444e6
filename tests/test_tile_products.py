"""Products of tiles against a slow twin: every way of a tiling, every level of the machine, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import slow_tile_products as slow

from packfmt.errors import LayoutError
from packfmt.kernels import activations, simd, threads, tile_products
from packfmt.kernels.activations import ANY, QUADS, SAME, WINDOWS, Order, arrange, quantise
from packfmt.kernels.tile_products import Activations, Product, Tiles, Tiling

needs_vectors = pytest.mark.skipif(simd.INTERPRETED, reason="no vectors where nothing is compiled")

# every width, kind of code and kind of scale; zero points, planes, scales of rows, numbers of rows, reciprocals
TILINGS = {
    "ternary": Tiling((2,), "direct", 256, 1, False, "f16", False, "", False),
    "sherry": Tiling((5,), "quads", 256, 1, False, "f16", False, "", False),
    "sherry of rows": Tiling((5,), "quads", 256, 1, False, "bf16", True, "", False),
    "sherry 128": Tiling((5,), "quads", 128, 1, False, "f32", False, "", False),
    "mxfp4": Tiling((4,), "table", 32, 1, False, "e8m0", False, "", False),
    "nvfp4": Tiling((4,), "table", 16, 1, False, "e4m3", False, "times", False),
    "nvfp4, divided": Tiling((4,), "table", 16, 1, False, "e4m3", False, "divides", False),
    "nvfp4 of ggml": Tiling((4,), "table", 64, 1, False, "ue4m3", False, "", False),
    "4 bits": Tiling((4,), "direct", 32, 1, False, "f16", False, "", False),
    "4 bits with zeros": Tiling((4,), "direct", 128, 1, True, "f16", False, "", False),
    "4 bits, wide": Tiling((4,), "wide", 64, 1, False, "f32", False, "", False),
    "1 bit": Tiling((1,), "direct", 128, 1, False, "f16", False, "", False),
    "1 bit by table": Tiling((1,), "table", 32, 1, False, "bf16", False, "", True),
    "2 bits with zeros of rows": Tiling((2,), "direct", 256, 1, True, "f32", True, "", False),
    "2 bits by table": Tiling((2,), "table", 16, 1, False, "f16", False, "", False),
    "8 bits": Tiling((8,), "direct", 128, 1, True, "f16", False, "", False),
    "8 bits, signed": Tiling((8,), "signed", 32, 1, False, "f16", False, "", False),
    "8 bits of rows": Tiling((8,), "signed", 256, 1, False, "f32", True, "times", False),
    "3 bits": Tiling((2, 1), "direct", 128, 1, True, "f16", False, "", False),
    "3 bits by table": Tiling((2, 1), "table", 32, 1, False, "e8m0", False, "", False),
    "5 bits": Tiling((4, 1), "direct", 64, 1, False, "f16", False, "", False),
    "5 bits by table": Tiling((4, 1), "table", 32, 1, False, "f16", False, "", True),
    "6 bits": Tiling((4, 2), "direct", 128, 1, False, "bf16", False, "", False),
    "6 bits, wide": Tiling((4, 2), "wide", 32, 1, False, "e8m0", False, "", False),
    "two planes": Tiling((2,), "direct", 128, 2, False, "f16", False, "", False),
    "three planes of rows": Tiling((2,), "direct", 256, 3, False, "f16", True, "", False),
    "two planes with zeros": Tiling((1,), "direct", 64, 2, True, "f32", False, "divides", True),
}
FEW = ("sherry of rows", "ternary", "6 bits, wide", "two planes with zeros", "nvfp4, divided")


def columns(how: Tiling) -> int:
    """Three blocks, or two and a shorter one."""
    return 2 * how.block + tile_products.chunk(how.widths) if how.per_row else 3 * how.block


def order(tiles: Tiles) -> Order:
    """Columns as they are stored."""
    return arrange(tiles.cols, tiles.how.block)


def draw(how: Tiling, groups: int, cols: int, batch: int, seed: int) -> tuple[Tiles, slow.Floats]:
    """Tiles, and activations of which most blocks have whole numbers of steps."""
    tiles, whole = slow.draw(how, groups, cols, batch, seed)
    return tiles, floats(tiles, whole)


def floats(tiles: Tiles, x: Activations) -> slow.Floats:
    """What steps stand for."""
    sizes = np.diff([0, *order(tiles).ends])
    return np.asarray(x.q * np.repeat(x.scale, sizes, axis=1), np.float32)


def product(tiles: Tiles, x: slow.Floats) -> slow.Floats:
    out = np.full((len(x), 16 * tiles.groups), 7, np.float32)
    Product(tiles, order(tiles))(x, out)
    return out


def twin(tiles: Tiles, x: slow.Floats) -> slow.Floats:
    """What the product should be."""
    return slow.multiply(tiles, Activations(*quantise(x, order(tiles), tiles.unit)))


def assert_same_bits(found: slow.Floats, expected: slow.Floats) -> None:
    """A NaN is as good as another."""
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first at {np.argwhere(~same)[0]}"
    assert np.isfinite(expected).any(), "nothing was compared"


# ---------------------------------------------------------------- bits


@needs_vectors
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", TILINGS)
def test_every_tiling_gives_the_bits_of_its_twin(name: str, batch: int) -> None:
    how = TILINGS[name]
    assert tile_products.fits(how)
    for groups, cols in ((1, columns(how)), (5, columns(how)), (2, tile_products.chunk(how.widths))):
        if how.per_row or cols % how.block == 0:
            tiles, x = draw(how, groups, cols, batch, seed=groups)
            assert_same_bits(product(tiles, x), twin(tiles, x))


@needs_vectors
@pytest.mark.parametrize("name", ["ternary", "nvfp4", "three planes of rows"])
def test_no_row_of_a_batch_depends_on_the_others(name: str) -> None:
    how = TILINGS[name]
    tiles, x = draw(how, 3, columns(how), 64, seed=2)
    expected = twin(tiles, x)
    for batch in (1, 2, 3, 5, 8, 9, 16, 17, 64):
        assert_same_bits(product(tiles, x[:batch]), expected[:batch])


@needs_vectors
@pytest.mark.parametrize("batch", [1, 3, 8, 11])
def test_columns_come_in_the_order_that_is_asked_for(batch: int) -> None:
    """Whatever way they are moved in."""
    tiles, x = draw(TILINGS["4 bits"], 2, 128, batch, seed=12)
    expected = twin(tiles, x)
    ways = set()
    turned = (
        np.arange(128).reshape(4, 2, 16).transpose(0, 2, 1),
        np.arange(128).reshape(-1, 4)[::-1],
        np.arange(128)[::-1],
    )
    blocks = np.arange(128).reshape(4, 8, 4)[:, ::-1]
    for columns in (np.arange(128), blocks, *turned):
        how = arrange(128, 32, columns.reshape(-1).astype(np.int32))
        given, out = np.empty_like(x), np.full((batch, 32), 7, np.float32)
        given[:, columns.reshape(-1)] = x
        Product(tiles, how)(given, out)
        assert_same_bits(out, expected)
        ways.add(how.way)
    assert ways == {SAME, QUADS, WINDOWS, ANY}


@needs_vectors
@pytest.mark.parametrize("name", ["ternary", "mxfp4"])
@pytest.mark.parametrize("many", [1, 1 << 16])
def test_threads_and_what_they_claim_change_nothing(name: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few activations are written by each thread for itself, many by all together."""
    how = TILINGS[name]
    tiles, x = draw(how, 7, columns(how), 11, seed=3)
    expected = twin(tiles, x)
    monkeypatch.setattr(tile_products, "LEAST", 1)
    monkeypatch.setattr(activations, "LEAST_NUMBERS", many)
    for claims in (1, 3, 32):
        monkeypatch.setattr(tile_products, "CLAIMS", claims)
        for count in (1, 2, 3):
            with threads.limit(count):
                assert_same_bits(product(tiles, x), expected)


@needs_vectors
def test_callers_at_the_same_time_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has room of its own, also where sizes are the same."""
    how = TILINGS["ternary"]
    drawn = [draw(how, 64, 4 * how.block, 1, seed) for seed in range(2)]
    ready = [(Product(tiles, order(tiles)), x, twin(tiles, x)) for tiles, x in drawn]
    monkeypatch.setattr(tile_products, "LEAST", 1)

    def often(which: int) -> None:
        multiply, x, expected = ready[which % 2]
        out = np.empty((1, 1024), np.float32)
        with threads.limit(1 + which // 2):
            for _ in range(200):
                multiply(x, out)
                assert_same_bits(out, expected)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(often, which) for which in range(4)]:
            done.result()


@needs_vectors
@pytest.mark.kernels
def test_extremes_do_not_overflow() -> None:
    """All codes and activations at their ends, in blocks as long as there are."""
    for name, code in (("8 bits", 255), ("8 bits, signed", 128), ("6 bits, wide", 255)):
        how = TILINGS[name]._replace(block=256, scale="f32")
        tiles, x = draw(how, 1, 512, 2, seed=4)
        for part in (tiles.codes, tiles.high):
            part[:] = code
        x[0], x[1] = 127, -127
        assert_same_bits(product(tiles, x), twin(tiles, x))


@needs_vectors
def test_scales_of_every_byte_are_counted_as_the_twin_counts_them() -> None:
    for scale in ("e8m0", "e4m3", "ue4m3"):
        how = TILINGS["mxfp4"]._replace(scale=scale)
        tiles, x = draw(how, 16, 32, 1, seed=5)
        tiles.scale[:] = np.arange(256)
        for exponent, nan in ((127, True), (128, False), (300, True)):
            one = tiles._replace(exponent=exponent, nan=nan)
            assert_same_bits(product(one, x), twin(one, x))
            if scale != "e8m0":
                break


# ---------------------------------------------------------------- levels of machines

# Memory ends where an array does: a byte read beyond it ends the process.
CHILD = """
import ctypes, mmap, sys
import numpy as np
from test_tile_products import TILINGS, assert_same_bits, columns, draw, product, twin
from packfmt.kernels import simd

kept = []

def at_the_end(array):
    room = mmap.mmap(-1, (array.nbytes // mmap.PAGESIZE + 2) * mmap.PAGESIZE)
    kept.append(room)
    whole = np.frombuffer(room, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    last = ctypes.c_void_p(whole.ctypes.data + len(room) - mmap.PAGESIZE)
    assert libc.mprotect(last, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    stop = len(room) - mmap.PAGESIZE
    copy = whole[stop - array.nbytes : stop].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy

for name in sys.argv[2:]:
    for batch in (1, 7):
        tiles, x = draw(TILINGS[name], 2, columns(TILINGS[name]), batch, seed=6)
        expected = twin(tiles, x)
        if sys.argv[1] == "guarded":
            tiles = tiles._make(at_the_end(v) if isinstance(v, np.ndarray) else v for v in tiles)
        assert_same_bits(product(tiles, x), expected)
print("done", simd.LEVEL)
"""


def child(how: str, names: tuple[str, ...], **environment: str) -> str:
    """What a new process says that compares tilings."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    mine = {k: v for k, v in os.environ.items() if k not in ("PACKFMT_SIMD", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, how, *names],
        env={**mine, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


@needs_vectors
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_lower_levels_of_this_machine_give_the_same_bits(level: str, tmp_path: Path) -> None:
    if level not in simd.LEVELS or not simd.LEVELS[level] <= simd.FEATURES:
        pytest.skip(f"this machine has no {level}")
    names = {"portable": FEW[:2], "avx2": FEW, "avx512": FEW[2:4]}[level]
    assert child("plain", names, PACKFMT_SIMD=level, NUMBA_CACHE_DIR=str(tmp_path)) == f"done {level}"


@needs_vectors
@pytest.mark.skipif("avx2" not in simd.FEATURES, reason="not a machine that can run what Haswell can")
def test_a_haswell_gives_the_same_bits(tmp_path: Path) -> None:
    found = child("plain", FEW[1:3], NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    assert found == "done avx2"


@needs_vectors
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as Linux has it")
def test_nothing_is_read_beyond_the_end_of_an_array() -> None:
    assert child("guarded", FEW) == f"done {simd.LEVEL}"


# ---------------------------------------------------------------- doors


@needs_vectors
def test_arrays_that_may_not_be_written_need_no_other_kernel() -> None:
    tiles, x = draw(TILINGS["ternary"], 2, 512, 1, seed=7)
    expected = product(tiles, x)
    count = len(tile_products._multiply.signatures)
    for array in (*tiles, x):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    assert_same_bits(product(tiles, x), expected)
    assert len(tile_products._multiply.signatures) == count


@needs_vectors
def test_nothing_is_written_where_there_is_nothing_and_no_column_gives_zeros() -> None:
    how = TILINGS["ternary"]
    for groups, cols, batch in ((0, 512, 1), (2, 512, 0), (2, 0, 3)):
        tiles, x = draw(how, groups, cols, batch, seed=8) if cols else _without_columns(how, groups, batch)
        found = product(tiles, x)
        assert found.shape == (batch, 16 * groups) and not found.any()


def _without_columns(how: Tiling, groups: int, batch: int) -> tuple[Tiles, slow.Floats]:
    tiles, _ = draw(how, groups, 256, batch, seed=8)
    none = np.zeros(0, np.uint8)
    return tiles._replace(cols=0, codes=none, scale=none), np.zeros((batch, 0), np.float32)


def wrong() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What is wrong, and instead of which tiles and activations."""
    tiles, x = draw(TILINGS["nvfp4"], 2, 48, 2, seed=9)
    yield "codes is uint8 (767,), needs uint8 (768,)", {"codes": tiles.codes[1:]}, {}
    yield "codes is int8 (768,), needs uint8 (768,)", {"codes": tiles.codes.view(np.int8)}, {}
    yield "not contiguous", {"codes": np.repeat(tiles.codes, 2)[::2]}, {}
    yield "high is uint8 (1,), needs uint8 (0,)", {"high": tiles.codes[:1]}, {}
    yield "scale is uint8 (95,), needs uint8 (96,)", {"scale": tiles.scale[1:]}, {}
    yield "zero is", {"zero": tiles.scale}, {}
    yield "whole is float64 (32,), needs float32 (32,)", {"whole": tiles.whole.astype(np.float64)}, {}
    yield "table is", {"table": tiles.table[:16]}, {}
    yield "needs a multiple of 16 columns", {"cols": 56}, {}
    yield "table is uint8 (1,)", {"table": np.zeros(1, np.uint8)}, {}
    yield "no kernel", {"how": tiles.how._replace(block=20)}, {}
    yield "order of 64 columns in 4 blocks, needs 48 columns in blocks of 16", {}, {"order": arrange(64, 16)}
    yield "order of 48 columns in 2 blocks, needs 48 columns in blocks of 16", {}, {"order": arrange(48, 32)}
    ends = np.array([8, 32, 48], np.int32)
    yield "order of 48 columns in 3 blocks, needs 48 columns in blocks of 16", {}, {"order": arrange(48, ends)}
    yield "x is float32 (2, 47), needs float32 (2, 48)", {}, {"x": np.ascontiguousarray(x[:, 1:])}
    yield "x is float64 (2, 48), needs float32 (2, 48)", {}, {"x": x.astype(np.float64)}
    yield "x is int32 (2, 48), needs float32 (2, 48)", {}, {"x": x.view(np.int32)}
    yield "x is float32 (48,), needs float32 (48, 48)", {}, {"x": x[0]}
    yield "x is float32 (2, 48), not contiguous", {}, {"x": np.repeat(x, 2, axis=1)[:, ::2]}
    yield "out is float32 (2, 31), needs float32 (2, 32)", {}, {"out": np.zeros((2, 31), np.float32)}
    yield "out is float32 (1, 32), needs float32 (2, 32)", {}, {"out": np.zeros((1, 32), np.float32)}
    yield "out is float32 (2, 32), not contiguous", {}, {"out": np.zeros((2, 64), np.float32)[:, ::2]}
    yield "out may not be written", {}, {"out": np.frombuffer(bytes(256), np.float32).reshape(2, 32)}


@needs_vectors
@pytest.mark.parametrize(("message", "instead", "given"), list(wrong()), ids=lambda v: v if isinstance(v, str) else "")
def test_arrays_that_do_not_belong_together_are_refused(
    message: str, instead: dict[str, Any], given: dict[str, Any]
) -> None:
    tiles, x = draw(TILINGS["nvfp4"], 2, 48, 2, seed=9)
    rest: dict[str, Any] = {"order": order(tiles), "x": x, "out": np.zeros((2, 32), np.float32)} | given
    with pytest.raises(LayoutError) as error:
        Product(tiles._replace(**instead), rest["order"])(rest["x"], rest["out"])
    assert message in str(error.value)


@needs_vectors
def test_a_table_that_nobody_looks_into_is_whole_or_missing() -> None:
    """The kernel loads it anyway."""
    tiles, x = draw(TILINGS["ternary"], 1, 256, 1, seed=9)
    with pytest.raises(LayoutError, match=r"table is uint8 \(1,\), needs uint8 \(128,\)"):
        product(tiles._replace(table=np.zeros(1, np.uint8)), x)
    assert_same_bits(product(tiles._replace(table=np.zeros(128, np.uint8)), x), product(tiles, x))


def test_only_tilings_of_the_list_fit() -> None:
    good = TILINGS["ternary"]
    assert tile_products.fits(good) is not simd.INTERPRETED
    for bad in (
        {"widths": (3,)},
        {"widths": (8, 1)},
        {"widths": (5,)},
        {"codes": "quads"},
        {"codes": "signed"},
        {"codes": "other"},
        {"block": 8},
        {"block": 512},
        {"block": 0},
        {"planes": 0},
        {"scale": "f64"},
        {"whole": "plus"},
    ):
        assert not tile_products.fits(good._replace(**bad)), bad


@pytest.mark.kernels
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 5000])
def test_reading_gives_the_exclusive_or_of_all_bytes(size: int) -> None:
    some: npt.NDArray[np.uint8] = np.random.default_rng(10).integers(0, 256, size, np.uint8)
    expected = 0
    for byte in some.tolist():
        expected ^= byte
    assert tile_products.read(some) == expected
