"""Compiled work by threads that are still awake: each part once, nobody forgotten, nothing left when a process ends."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import no_type_check

import numpy as np
import pytest

from packfmt.errors import PackfmtError
from packfmt.kernels import simd, threads

if simd.INTERPRETED:
    pytest.skip("nothing is compiled", allow_module_level=True)

from numba import types

from packfmt.kernels import team
from packfmt.kernels.activations import arrange
from packfmt.kernels.cache import njit
from packfmt.kernels.team import LOW, OWNER, PLACES, _claim, _plus
from packfmt.kernels.threads import INSIDE, LOOKING, SLOT, SLOTS, WANTED
from packfmt.kernels.tile_code import matrix_of, number_at

ROOT = Path(__file__).parents[1]
SOON = 30  # seconds, that a busy machine may need


@njit(cache=True, nogil=True)
@no_type_check
def _count(nothing, job, seat):
    """Add 1 to every number of out, a row a part; its last column says how many parts a seat did."""
    rows, cols = number_at(job, team.BATCH), number_at(job, team.ROWS)
    out = matrix_of(number_at(job, team.OUT), rows, cols, np.float32)
    x = matrix_of(number_at(job, team.X), rows, number_at(job, team.COLS), np.float32)
    part = _claim(job, seat, rows)
    while part < rows:
        for j in range(cols):
            out[part, j] += x[part, 0]
        for _ in range(number_at(job, team.PRODUCT)):  # what it takes long
            _plus(job + team.NUMBER * team.MEMORY, seat)
        part = _claim(job, seat, rows)


@pytest.fixture
def way() -> team.Way:
    return team.Way(_count, types.int64)


@pytest.fixture(autouse=True)
def others_are_waited_for() -> Iterator[None]:
    """No thread looks or works when a test begins or ends."""
    assert asleep()
    yield
    assert asleep()


def asleep() -> bool:
    """Whether all helpers sleep, soon."""
    for _ in range(1000 * SOON):
        if not threads.board[INSIDE] and not threads.board[LOOKING]:
            return True
        time.sleep(0.001)
    return False


def counted(way: team.Way, rows: int = 200, most: int = 8, each: int = 20) -> None:
    """Every part is done, once."""
    x, out = np.arange(1, rows + 1, dtype=np.float32)[:, None], np.zeros((rows, 3), np.float32)
    team.multiply(way, each, team.jobs(arrange(1, 1)), x, out, 1, most)
    assert (out == x).all()


def free() -> bool:
    """Whether nobody has a slot, and there is no place in one."""
    slots = threads.board.reshape(-1, SLOT)[1:]
    return not slots[:, OWNER].any() and not (slots[:, PLACES] & LOW).any()


@pytest.mark.parametrize("count", [1, 2, 3, 17])
@pytest.mark.parametrize("rows", [0, 1, 2, 200])
def test_every_part_is_done_once(way: team.Way, count: int, rows: int) -> None:
    with threads.limit(count):
        for _ in range(50):
            counted(way, rows)
    assert free()


def test_callers_at_the_same_time_each_get_all_of_theirs_done(way: team.Way) -> None:
    """More of them than there are slots."""

    def often(which: int) -> None:
        with threads.limit(1 + which % 4):
            for _ in range(100):
                counted(way)

    with ThreadPoolExecutor(3 * SLOTS) as callers:
        for job in [callers.submit(often, which) for which in range(3 * SLOTS)]:
            job.result(timeout=10 * SOON)
    assert free()


def test_who_finds_all_slots_taken_works_alone(way: team.Way) -> None:
    slots = threads.board.reshape(-1, SLOT)[1:]
    slots[:, OWNER] = 1
    with threads.limit(3):
        counted(way)
    assert slots[:, OWNER].all()
    slots[:, OWNER] = 0


def test_a_helper_that_has_worked_looks_for_more_and_then_sleeps(
    way: team.Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "processors", lambda: 2)
    monkeypatch.setattr(team, "spin", lambda: team.MOST_SPIN)
    with threads.limit(2):
        for _ in range(100 * SOON):
            counted(way)
            if threads.board[LOOKING]:
                break
            time.sleep(0.01)
        assert threads.board[LOOKING] == threads.board[INSIDE] == 1
        started = threads._started
        counted(way)
        assert threads._started == started
        # what Python shares ends that at once
        wanted = int(threads.board[WANTED])
        threads.share(lambda: None, 2)
        assert threads.board[WANTED] != wanted
        begin = time.perf_counter()
        assert asleep()
        assert time.perf_counter() - begin < SOON


def test_shared_work_of_python_reaches_helpers_that_look(way: team.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(threads, "processors", lambda: 3)
    monkeypatch.setattr(team, "spin", lambda: team.MOST_SPIN)
    with threads.limit(3):
        for _ in range(20):
            counted(way)
            barrier = threading.Barrier(3)
            threads.share(lambda barrier=barrier: barrier.wait(SOON), 3)  # type: ignore[misc]
    threads.share(lambda: None, 2)


def test_work_within_work_is_done_by_the_thread_that_asks(way: team.Way) -> None:
    with threads.limit(3):
        threads.spread(lambda start, stop: [counted(way) for _ in range(start, stop)], 30)
    assert free()


@pytest.mark.parametrize("asked", ["-1", "1.5", "soon", "1000001", "9" * 5000])
def test_a_time_that_is_none_is_named(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKFMT_SPIN", asked)
    with pytest.raises(PackfmtError, match=r"PACKFMT_SPIN is .* needs a whole number of microseconds"):
        team.spin.__wrapped__()


def test_the_time_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, expected in (("0", 0), ("1000000", 1_000_000), ("", team.SPIN)):
        monkeypatch.setenv("PACKFMT_SPIN", asked)
        assert team.spin.__wrapped__() == expected
    assert team._rounds(0) == 0 < team._rounds(50) < team._rounds(500)


def test_nobody_looks_for_more_who_was_told_not_to(way: team.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or where there are more threads than processors."""
    rounds: list[int] = []
    run = way.run
    way.run = lambda *args: (rounds.append(args[-1]), run(*args))[0]  # type: ignore[func-returns-value]
    monkeypatch.setattr(threads, "processors", lambda: 2)
    with threads.limit(2):
        counted(way)
        monkeypatch.setattr(team, "spin", lambda: 0)
        counted(way)
    monkeypatch.undo()
    monkeypatch.setattr(threads, "processors", lambda: 2)
    with threads.limit(3):
        counted(way)
    assert rounds[0] > 0 == rounds[1] == rounds[2]


def in_a_child() -> None:
    counted(team.Way(_count, types.int64))
    os._exit(0 if threads.board is not None and free() else 1)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_a_board_of_its_own(way: team.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while helpers look and a slot is taken."""
    monkeypatch.setenv("PACKFMT_THREADS", "3")
    counted(way)
    slots = threads.board.reshape(-1, SLOT)[1:]
    slots[:, OWNER] = 1
    child = multiprocessing.get_context("fork").Process(target=in_a_child)
    child.start()
    child.join(SOON)
    slots[:, OWNER] = 0
    assert child.exitcode == 0


ENDING = """
import threading, sys
import numpy as np, packfmt
from packfmt.kernels import tile_products
tile_products.LEAST = 1
weight = np.random.default_rng(0).standard_normal((64, 512), np.float32)
ready, x = packfmt.prepare(packfmt.pack(weight, "mxfp4")), weight[:1]
def often():
    while True:
        ready.matmul(x)
for _ in range(int(sys.argv[1])):
    threading.Thread(target=often, daemon=True).start()
for _ in range(300):
    ready.matmul(x)
print("done")
"""


@pytest.mark.parametrize("callers", [0, 3])
@pytest.mark.parametrize("spin", ["0", "400", "1000000"])
def test_a_process_ends_while_helpers_look(callers: int, spin: str) -> None:
    """Also while other threads multiply."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PACKFMT_THREADS": "3", "PACKFMT_SPIN": spin}
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", ENDING, str(callers)], env=environment, capture_output=True, text=True, timeout=120
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
