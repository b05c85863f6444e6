"""Work is shared so that nothing waits for ever and no error is lost."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from packfmt.errors import PackfmtError
from packfmt.kernels import threads


def covered(total: int, least: int = 1) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    threads.spread(lambda start, stop: seen.append((start, stop)), total, least)
    return sorted(seen)


@pytest.mark.parametrize("count", ["1", "2", "3", "256"])
@pytest.mark.parametrize(("total", "least"), [(0, 1), (1, 1), (7, 1), (1000, 1), (1000, 400), (5, 100)])
def test_the_ranges_cover_the_work_once(count: str, total: int, least: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", count)
    ranges = covered(total, least)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(total))
    assert len(ranges) <= max(1, min(int(count), total // least))


def test_work_within_work_and_from_several_threads_ends(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "4")
    lock, done = threading.Lock(), [0]

    def inner(start: int, stop: int) -> None:
        with lock:
            done[0] += stop - start

    def outer(start: int, stop: int) -> None:
        for _ in range(start, stop):
            threads.spread(inner, 10)

    with ThreadPoolExecutor(50) as callers:
        for job in [callers.submit(threads.spread, outer, 40) for _ in range(50)]:
            job.result(timeout=60)
    assert done[0] == 50 * 40 * 10


@pytest.mark.parametrize("failing", [0, 5, 9])
def test_an_error_arrives_when_all_others_are_done(failing: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "10")
    seen = []

    def work(start: int, stop: int) -> None:
        if start == failing:
            raise ZeroDivisionError(start)
        seen.append(start)

    with pytest.raises(ZeroDivisionError, match=str(failing)):
        threads.spread(work, 10)
    assert sorted([*seen, failing]) == list(range(10))
    assert covered(10) == [(i, i + 1) for i in range(10)]  # and the threads still work


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5", "257", "9" * 5000, " "])
def test_a_count_that_is_none_is_named(asked: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", asked)
    with pytest.raises(PackfmtError, match=r"PACKFMT_THREADS is .* needs a whole number of 1 to 256"):
        threads.spread(lambda start, stop: None, 10)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "3")
    assert len(covered(3)) == 3
    child = multiprocessing.get_context("fork").Process(target=covered, args=(3,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
