"""Work is shared so that nothing waits for ever and no error is lost."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

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


def test_shared_work_runs_in_as_many_threads_at_once_as_are_asked_for(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "5")
    for most in (1, 2, 5):
        barrier = threading.Barrier(most)
        names: list[int] = []

        def work(barrier: threading.Barrier = barrier, names: list[int] = names) -> None:
            barrier.wait(30)  # broken, and an error, unless all of them come
            names.append(threading.get_ident())

        threads.share(work, most)
        assert len(set(names)) == len(names) == most
        assert threading.get_ident() in names


def test_shared_work_is_never_called_by_more_than_the_threads_there_are(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "3")
    lock, here, seen = threading.Lock(), [0], []

    def work() -> None:
        with lock:
            here[0] += 1
            seen.append(here[0])
        time.sleep(0.001)
        with lock:
            here[0] -= 1

    for _ in range(50):
        threads.share(work, 100)
    assert max(seen) <= 3
    assert here == [0]  # and nobody is left behind


def test_no_call_waits_for_helpers_that_others_keep(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "2")
    kept, go = threading.Barrier(3), threading.Event()

    def keep() -> None:
        kept.wait(30)
        go.wait(30)

    keeper = threading.Thread(target=threads.share, args=(keep, 2))
    keeper.start()
    kept.wait(30)  # the only helper now waits for `go`
    called: list[int] = []
    threads.share(lambda: called.append(threading.get_ident()), 2)
    assert covered(10) == [(0, 5), (5, 10)]
    assert called == [threading.get_ident()]
    go.set()
    keeper.join(30)
    assert not keeper.is_alive()


def test_tasks_do_not_pile_up_while_others_keep_the_helpers(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "2")
    kept, go = threading.Barrier(3), threading.Event()
    waiting: SimpleQueue[threads._Task] = SimpleQueue()
    monkeypatch.setattr(threads, "_waiting", waiting)  # and helpers of its own
    monkeypatch.setattr(threads, "_started", 0)

    def keep() -> None:
        kept.wait(30)
        go.wait(30)

    keeper = threading.Thread(target=threads.share, args=(keep, 2))
    keeper.start()
    kept.wait(30)
    for _ in range(2 * threads.MOST):
        threads.share(lambda: None, 2)
    assert waiting.qsize() <= threads.MOST
    go.set()
    keeper.join(30)


def test_work_within_shared_work_is_called_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "3")
    barrier = threading.Barrier(3)
    outer: list[int] = []
    inner: list[tuple[int, int]] = []

    def work() -> None:
        barrier.wait(30)
        threads.share(lambda: outer.append(threading.get_ident()), 3)
        inner.extend(covered(9))

    threads.share(work, 3)
    assert len(outer) == len(set(outer)) == 3
    assert inner == [(0, 9)] * 3


@pytest.mark.parametrize("failing", ["caller", "helper"])
def test_what_shared_work_raises_arrives_when_all_calls_are_done(failing: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "3")
    barrier, ended = threading.Barrier(3), []
    caller = threading.get_ident()

    def work() -> None:
        if barrier.wait(30) >= 0 and (threading.get_ident() == caller) == (failing == "caller"):
            raise KeyError(failing)
        time.sleep(0.01)
        ended.append(1)

    with pytest.raises(KeyError, match=failing):
        threads.share(work, 3)
    assert len(ended) == (2 if failing == "caller" else 1)


def test_what_was_worked_on_is_let_go(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "3")
    barrier = threading.Barrier(3)

    class Room:
        def work(self) -> None:
            barrier.wait(30)

    room = Room()
    seen = weakref.ref(room)
    threads.share(room.work, 3)
    del room
    for _ in range(1000):  # helpers drop it a moment after they are done
        if seen() is None:
            break
        time.sleep(0.01)
    assert seen() is None


def test_a_limit_counts_before_the_environment_and_in_this_thread_only(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "2")
    with threads.limit(4):
        assert threads.count() == len(covered(100)) == 4
        with threads.limit(None):
            assert threads.count() == 4
        with threads.limit(1):
            assert covered(100) == [(0, 100)]
        with ThreadPoolExecutor(1) as other:
            assert other.submit(threads.count).result() == 2
        with pytest.raises(ZeroDivisionError), threads.limit(3):
            raise ZeroDivisionError
        assert threads.count() == 4
    assert threads.count() == 2


@pytest.mark.parametrize("asked", [0, -1, 257, 1.0, "2", True, float("nan")])
def test_a_limit_that_is_none_is_named(asked: object) -> None:
    with (
        pytest.raises(PackfmtError, match=r"threads is .*, needs a whole number of 1 to 256"),
        threads.limit(asked),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_process_forked_within_shared_work_shares_work(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PACKFMT_THREADS", "2")

    def child() -> None:
        barrier = threading.Barrier(2)

        def meet() -> None:
            barrier.wait(30)

        threads.share(meet, 2)

    def work(start: int, stop: int) -> None:
        if start:
            return
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        codes.append(process.exitcode)

    codes: list[int | None] = []
    threads.spread(work, 2)
    assert codes == [0]
