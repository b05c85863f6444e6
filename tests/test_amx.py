"""AMX: whether it may be used is found out without harm, and its products have the bits of the plain computation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from packfmt.errors import LayoutError
from packfmt.kernels import amx, amx_products, threads
from packfmt.kernels.tile_products import Activations, Tiles, Tiling

F32 = np.float32

needs_amx = pytest.mark.skipif(not amx.available(), reason="no AMX: the processor, the kernel or PACKFMT_* says no")

# ---------------------------------------------------------------- whether it may be used


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine whose compiler knows the tiles and whose kernel permits them; nobody has tried them yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PACKFMT_AMX", raising=False)
    monkeypatch.setattr(amx, "compiled_for", lambda: True)
    monkeypatch.setattr(amx, "permitted", lambda: True)
    monkeypatch.setattr(amx, "_answer", None)
    return monkeypatch


def child(machine: pytest.MonkeyPatch, program: str) -> list[int]:
    """Let this program try the tiles; the list grows with every start."""
    starts: list[int] = []

    def command() -> list[str]:
        starts.append(1)
        return [sys.executable, "-c", program]

    machine.setattr(amx, "_command", command)
    return starts


WORKS = f"print({amx.PROOF!r})"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"


def forget(machine: pytest.MonkeyPatch) -> None:
    """What a process that starts later knows."""
    machine.setattr(amx, "_answer", None)


def note() -> Path:
    return amx._note(amx._machine())


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        (WORKS, True),
        (DIES, False),
        ("print('wrong')", False),
        ("pass", False),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)))", False),
    ],
)
def test_a_child_tries_the_tiles_once_and_its_answer_is_kept(
    machine: pytest.MonkeyPatch, program: str, answer: bool
) -> None:
    starts = child(machine, program)
    assert amx.available() is answer
    assert amx.available() is answer
    forget(machine)
    assert amx.available() is answer
    assert len(starts) == 1


@pytest.mark.parametrize(
    "program",
    ["import nothing_of_this_name", f"{WORKS}; raise SystemExit(1)", "import os, signal; os.kill(os.getpid(), 9)"],
)
def test_a_child_that_fails_for_other_reasons_is_asked_again(machine: pytest.MonkeyPatch, program: str) -> None:
    """Somebody ended it, or it had no memory: this says nothing of the machine, for which an answer would stay."""
    child(machine, program)
    assert amx.available() is False
    assert not note().exists()
    forget(machine)
    child(machine, WORKS)
    assert amx.available() is True


def test_paths_that_imports_ignore_are_ignored(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(sys, "path", [*sys.path, Path("somewhere"), b"else"])
    assert sys.path[0] in amx._command()[-1]


def test_a_process_forked_while_another_thread_asks_asks_itself(machine: pytest.MonkeyPatch) -> None:
    child(machine, WORKS)
    with amx._asking:
        forked = os.fork()
        if forked == 0:
            signal.alarm(20)
            os._exit(0 if amx.available() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0


def test_a_child_that_hangs_is_no_answer(machine: pytest.MonkeyPatch) -> None:
    starts = child(machine, "import time; time.sleep(60)")
    machine.setattr(amx, "SECONDS", 0.2)
    assert amx.available() is False
    assert not note().exists()
    forget(machine)
    machine.setattr(amx, "SECONDS", 60)
    child(machine, WORKS)
    assert amx.available() is True
    assert len(starts) == 1


def test_an_application_is_not_started_again(machine: pytest.MonkeyPatch) -> None:
    starts = child(machine, WORKS)
    machine.setattr(sys, "executable", "/usr/bin/application")
    assert amx.available() is False
    forget(machine)
    machine.setattr(sys, "executable", None)
    assert amx.available() is False
    assert not starts


def of(text: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_text(text)
        path.chmod(0o600)

    return make


def linked(path: Path) -> None:
    path.with_name("elsewhere").write_text(amx._told(amx._machine(), True))
    path.symlink_to("elsewhere")


def writable_by_all(path: Path) -> None:
    path.write_text(amx._told(amx._machine(), True))
    path.chmod(0o666)


@pytest.mark.parametrize(
    "spoil",
    [
        of(""),
        of("works"),
        of(amx._told("another machine", True)),
        of(amx._told(amx._machine(), True)[:-1]),
        of(amx._told(amx._machine(), True) + "x" * 10_000),
        lambda path: path.write_bytes(bytes(range(256))),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        linked,
        writable_by_all,
    ],
)
def test_a_note_that_this_user_did_not_write_for_this_machine_is_no_answer(
    machine: pytest.MonkeyPatch, spoil: Callable[[Path], Any]
) -> None:
    note().parent.mkdir(parents=True)
    spoil(note())
    starts = child(machine, DIES)
    assert amx.available() is False
    assert len(starts) == 1


def test_where_no_note_can_be_written_the_process_remembers(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    machine.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    starts = child(machine, WORKS)
    assert amx.available() is True
    assert amx.available() is True
    assert len(starts) == 1


def test_a_note_leaves_nothing_else_behind(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child(machine, WORKS)
    amx.available()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [note()]
    assert note().stat().st_mode & 0o777 == 0o600


def test_packfmt_amx_0_says_no_and_tries_nothing(machine: pytest.MonkeyPatch) -> None:
    starts = child(machine, WORKS)
    machine.setenv("PACKFMT_AMX", "0")
    assert amx.available() is False
    assert not starts
    machine.setenv("PACKFMT_AMX", "1")
    assert amx.available() is True


def test_a_kernel_that_does_not_permit_it_is_not_asked_twice(machine: pytest.MonkeyPatch) -> None:
    starts = child(machine, WORKS)
    machine.setattr(amx, "permitted", lambda: False)
    assert amx.available() is False
    assert not starts


def test_a_slower_level_that_is_asked_for_goes_without() -> None:
    program = "from packfmt.kernels import amx; print(amx.available())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PACKFMT_SIMD": "portable", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_many_threads_that_ask_at_once_start_one_child(machine: pytest.MonkeyPatch) -> None:
    starts = child(machine, f"import time; time.sleep(0.2); {WORKS}")
    answers: list[bool] = []
    asking = [threading.Thread(target=lambda: answers.append(amx.available())) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert answers == [True] * 8
    assert len(starts) == 1


@pytest.mark.skipif(not amx.compiled_for(), reason="Numba does not compile for AMX here")
def test_the_child_finds_what_this_machine_does(machine: pytest.MonkeyPatch) -> None:
    machine.undo()
    assert amx._child() is amx.available()


# ---------------------------------------------------------------- the slow computation


def fields(data: np.ndarray, groups: int, width: int) -> np.ndarray:
    """(groups, 16, columns): a field of all four bytes of a dword is four columns; fields from the lowest bits up."""
    dwords = data.reshape(groups, -1, 16, 4)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    found = dwords[:, :, None] >> shifts[None, None, :, None, None] & np.uint8((1 << width) - 1)
    return found.transpose(0, 3, 1, 2, 4).reshape(groups, 16, -1)


def numbers(tiles: Tiles) -> np.ndarray:
    """(groups, 16, planes * cols) int64: what each code stands for, in stored order."""
    how, table = tiles.how, tiles.table.astype(np.int64)
    if how.codes == "quads":
        strings = tiles.codes.reshape(tiles.groups, -1, 5, 16, 4).transpose(0, 3, 1, 2, 4)
        bits = np.unpackbits(strings.reshape(tiles.groups, 16, -1), axis=2, bitorder="little")
        codes = bits.reshape(tiles.groups, 16, -1, 5) @ (1 << np.arange(5))
        return table.reshape(32, 4)[codes].reshape(tiles.groups, 16, -1) - tiles.bias
    codes = fields(tiles.codes, tiles.groups, how.widths[0]).astype(np.int64)
    if len(how.widths) == 2:
        codes = codes + (fields(tiles.high, tiles.groups, how.widths[1]).astype(np.int64) << how.widths[0])
    if how.codes == "signed":
        codes ^= 128
    elif how.codes == "table":
        codes = table[codes]
    elif how.codes == "wide":
        codes = table[codes] + 256 * table[64 + codes]
    return codes - tiles.bias


def scales(tiles: Tiles) -> np.ndarray:
    """float32, flat: what the scales' bytes say, before `whole`."""
    data = tiles.scale
    match tiles.how.scale:
        case "f32":
            return data.view("<f4")
        case "f16":
            return data.view("<f2").astype(F32)
        case "bf16":
            return (data.view("<u2").astype(np.uint32) << 16).view(F32)
        case "e8m0":
            powers = np.ldexp(1.0, data.astype(int) - tiles.exponent).astype(F32)
            return np.where((data == 255) & tiles.nan, F32(np.nan), powers)
        case "e4m3":
            return data.view(ml_dtypes.float8_e4m3fn).astype(F32)
    return np.where(data == 127, F32(0), data.view(ml_dtypes.float8_e4m3fn).astype(F32))


def slowly(tiles: Tiles, x: Activations) -> np.ndarray:
    """(batch, 16 * groups) float32, one operation after the other."""
    how, groups, planes = tiles.how, tiles.groups, tiles.how.planes
    steps, blocks = numbers(tiles), -(-tiles.cols // how.block)
    per = 1 if how.per_row else blocks
    scale = scales(tiles).reshape(groups, per, planes, 16)
    zero = tiles.zero.reshape(groups, per, planes, 16).astype(np.int64) if how.zero else None
    acc = np.zeros((len(x.q), groups, 16), F32)
    start = 0
    for b in range(blocks):
        size = min(how.block, tiles.cols - b * how.block)
        q = x.q[:, b * how.block : b * how.block + size].astype(np.int64)
        at = 0 if how.per_row else b
        for p in range(planes):
            step = steps[:, :, start : start + size]
            start += size
            if zero is not None:
                step = step - zero[:, at, p, :, None]
            dot = np.einsum("mk,grk->mgr", q, step).astype(F32)
            w = scale[:, at, p]
            if how.whole == "times":
                w = w * tiles.whole.reshape(groups, 16)
            elif how.whole == "divides":
                w = w / tiles.whole.reshape(groups, 16)
            if how.reciprocal:
                w = F32(1) / w
            acc = acc + dot * (w * x.scale[:, b, None, None])
    return acc.reshape(len(x.q), -1)


# ---------------------------------------------------------------- products

PLAIN = Tiling((4,), "direct", 32, 1, False, "f16", False, "", False)
TILINGS = {
    "one bit, in planes": (PLAIN._replace(widths=(1,), block=64, planes=3), 512, 0),
    "ternary, a row's scale and planes": (PLAIN._replace(widths=(2,), block=256, planes=2, per_row=True), 1328, 1),
    "quads that end early": (
        PLAIN._replace(widths=(5,), codes="quads", block=256, per_row=True, scale="bf16"),
        1408,
        1,
    ),
    "four bits less a lot": (PLAIN, 160, 900),
    "four bits with zeros": (PLAIN._replace(block=128, zero=True, scale="f32"), 384, 0),
    "mxfp4": (PLAIN._replace(codes="table", scale="e8m0"), 1376, 12),
    "nvfp4": (PLAIN._replace(codes="table", block=16, scale="e4m3", whole="times"), 208, 12),
    "nvfp4 of ggml": (PLAIN._replace(codes="table", block=16, scale="ue4m3", whole="divides"), 64, 12),
    "five bits, in planes": (PLAIN._replace(widths=(4, 1), planes=2), 288, 16),
    "six bits": (PLAIN._replace(widths=(4, 2), codes="table", scale="f32"), 352, 50),
    "three bits less a lot": (PLAIN._replace(widths=(2, 1)), 320, 300),
    "two tables of six bits": (PLAIN._replace(widths=(4, 2), codes="wide", block=96, planes=2), 192, 448),
    "three bits": (PLAIN._replace(widths=(2, 1), block=96, reciprocal=True), 576, 4),
    "signed bytes": (PLAIN._replace(widths=(8,), codes="signed", block=20), 220, 128),
    "bytes with zeros of a row": (PLAIN._replace(widths=(8,), block=256, zero=True, per_row=True), 516, 0),
}
BATCHES = [8, 16, 17, 64, 70]


def made(how: Tiling, cols: int, bias: int, groups: int, batch: int, wild: bool) -> tuple[Tiles, Activations]:
    """Random bytes everywhere; scales that are not `wild` are finite."""
    chance = np.random.Generator(np.random.PCG64([batch, groups, cols]))
    blocks = -(-cols // how.block)
    count = groups * how.planes * 16
    sizes = (*(count * cols * (w if how.codes != "quads" else 5 / 4) / 8 for w in how.widths), 0)
    code_bytes = [chance.integers(0, 256, int(size), np.uint8) for size in sizes[:2]]
    beside = count * (1 if how.per_row else blocks)
    kinds = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
    if wild:
        scale = chance.integers(0, 256, beside * np.dtype(kinds.get(how.scale, "u1")).itemsize, np.uint8)
        scale = scale & np.uint8(127) if how.scale == "ue4m3" else scale
    elif how.scale == "bf16":
        scale = (chance.standard_normal(beside).astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8)
    elif how.scale in kinds:
        scale = chance.standard_normal(beside).astype(kinds[how.scale]).view(np.uint8)
    else:
        scale = chance.integers(100, 127, beside, np.uint8)
    table = np.zeros(0, np.uint8)
    if how.codes == "quads":
        table = chance.integers(0, 3, 128, np.uint8)
    elif how.codes in ("table", "wide"):
        few = 1 << min(6, sum(how.widths) if sum(how.widths) <= 4 else 6)
        table = np.concatenate([np.tile(chance.integers(0, n, few, np.uint8), 64 // few) for n in (100, 8)])
    empty = np.zeros(0, np.uint8)
    tiles = Tiles(
        how=how, codes=code_bytes[0], high=code_bytes[1], scale=scale,
        zero=chance.integers(0, 256, beside, np.uint8) if how.zero else empty,
        whole=chance.standard_normal(16 * groups).astype(F32) if how.whole else empty.view(F32),
        table=table, bias=bias, exponent=127, nan=True, unit=F32(1), groups=groups, cols=cols,
    )  # fmt: skip
    q = chance.integers(-127, 128, (batch, cols), np.int8)
    q[0] = 127
    starts = np.arange(0, cols, how.block)
    factors = np.exp(chance.standard_normal((batch, blocks))).astype(F32)
    if wild:
        factors.flat[:: max(1, factors.size // 5)] = [np.nan, 0, np.inf, 1e-42, 3e38, 1][
            : len(factors.flat[:: max(1, factors.size // 5)])
        ]
    return tiles, Activations(q, np.add.reduceat(q, starts, axis=1, dtype=np.int32), factors)


def product(tiles: Tiles, x: Activations) -> np.ndarray:
    out = np.full((len(x.q), 16 * tiles.groups), F32(-99))
    amx_products.multiply(tiles, x, out)
    return out


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    numbers_ = ~np.isnan(wanted)
    assert np.array_equal(found.view(np.uint32)[numbers_], wanted.view(np.uint32)[numbers_])


@needs_amx
@pytest.mark.kernels
@pytest.mark.parametrize("name", TILINGS)
def test_products_have_the_bits_of_the_slow_computation(name: str) -> None:
    how, cols, bias = TILINGS[name]
    assert amx_products.fits(how)
    for batch in BATCHES:
        for groups in (1, 3) if batch < 64 else (2,):
            tiles, x = made(how, cols, bias, groups, batch, wild=False)
            wanted = slowly(tiles, x)
            assert np.isfinite(wanted).all() and wanted.any()
            assert_same_bits(product(tiles, x), wanted)
    with np.errstate(all="ignore"):
        tiles, x = made(how, cols, bias, 5, 24, wild=True)
        assert_same_bits(product(tiles, x), slowly(tiles, x))


@needs_amx
@pytest.mark.kernels
def test_the_largest_numbers_and_activations_lose_nothing() -> None:
    """Every product is of the largest magnitude, and all have one sign."""
    tiles, x = made(PLAIN, 64, 256, 2, 16, wild=False)
    tiles = tiles._replace(codes=np.zeros_like(tiles.codes))
    x.q[:] = 127
    x = x._replace(sums=x.q.reshape(16, 2, 32).sum(axis=2, dtype=np.int32))
    assert_same_bits(product(tiles, x), slowly(tiles, x))


@needs_amx
@pytest.mark.kernels
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_threads_change_no_bit(count: int) -> None:
    how, cols, bias = TILINGS["mxfp4"]
    tiles, x = made(how, cols, bias, 37, 33, wild=False)
    wanted = slowly(tiles, x)
    with threads.limit(count):
        for _ in range(5):
            assert_same_bits(product(tiles, x), wanted)


@needs_amx
@pytest.mark.kernels
def test_a_thread_that_began_before_the_permission_multiplies_too() -> None:
    """In a process of its own, for permission is asked for once."""
    program = f"""
import sys; sys.path[:] = {sys.path!r}
import threading, numpy as np
go, found = threading.Event(), []
from packfmt.kernels import amx
def work():
    go.wait()
    rows = np.ones((16, 64), np.int8); sums = np.empty((16, 16), np.int32)
    amx._try(amx.configuration(64), rows, rows, sums)
    found.append(int(sums.sum()))
thread = threading.Thread(target=work); thread.start()
assert amx.available()
go.set(); thread.join(); print(found)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"[{64 * 256}]")


@needs_amx
@pytest.mark.kernels
def test_a_forked_process_multiplies_too() -> None:
    how, cols, bias = TILINGS["mxfp4"]
    tiles, x = made(how, cols, bias, 3, 16, wild=False)
    wanted = product(tiles, x)
    forked = os.fork()
    if forked == 0:
        os._exit(0 if amx.available() and product(tiles, x).tobytes() == wanted.tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0


def test_sigill_is_what_a_child_dies_of() -> None:
    """The trial of `DIES` is one: it stands for a machine that announces the tiles and does not run them."""
    assert subprocess.run([sys.executable, "-c", DIES], check=False).returncode == -signal.SIGILL


def test_larger_batches_and_blocks_pay_sooner() -> None:
    blocks = [PLAIN._replace(block=block) for block in (4, 16, 32, 64, 128, 256)]
    least = [next(batch for batch in range(1, 257) if amx_products.pays(how, batch)) for how in blocks]
    assert least == sorted(least, reverse=True)
    assert all(amx_products.pays(how, 256) and not amx_products.pays(how, 1) for how in blocks)


@needs_amx
def test_arrays_that_do_not_fit_are_refused() -> None:
    how, cols, bias = TILINGS["mxfp4"]
    tiles, x = made(how, cols, bias, 2, 16, wild=False)
    with pytest.raises(LayoutError, match="codes is uint8"):
        product(tiles._replace(codes=tiles.codes[1:]), x)
    with pytest.raises(LayoutError, match="codes is uint8"):
        amx_products.multiply(tiles._replace(codes=tiles.codes[1:]), x, np.empty((16, 48), F32))
    with pytest.raises(LayoutError, match="out is float32"):
        amx_products.multiply(tiles, x, np.empty((15, 32), F32))
