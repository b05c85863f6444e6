"""Share independent work among threads; the loops release the interpreter lock.

The caller works too, and begins at once. Helpers are threads that wait for work and stay; one that comes when all is
done is not waited for. So nothing waits for a helper to be free, and work for no more than microseconds loses little.
Compiled work reaches helpers that are still awake without the interpreter (`team`).
"""

from __future__ import annotations

import atexit
import operator
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from itertools import count as numbers_from
from itertools import pairwise
from queue import SimpleQueue
from threading import get_ident
from typing import Any, Final

import numpy as np

from packfmt.errors import PackfmtError

MOST = 256
LEAVING: Final = 1.0  # seconds that the end of the process waits for helpers in compiled code

# words of the board, which compiled code reads too, each in cache lines of its own: how many helpers look for work
# there, how many do that or do work, and what is another number whenever there is work for them here
LOOKING, INSIDE, WANTED = 0, 16, 32
SLOT, SLOTS = 64, 4  # words of what is for one caller's work, and for how many callers at once

_limits: dict[int, int] = {}  # of threads that `limit` limits, how many they may use
_busy: set[int] = set()  # threads that do shared work


class _Task:
    """Work for the caller and, at most, so many helpers."""

    def __init__(self, work: Callable[[], None], helpers: int) -> None:
        self.work: Callable[[], None] | None = work
        self.helpers = helpers
        self.places = deque(range(helpers))  # whoever takes the last one is the last to come
        self.ends: SimpleQueue[BaseException | None] = SimpleQueue()

    def help(self) -> None:
        work = self.work
        if work and self._enter():
            # waking a thread takes microseconds, so that the caller wakes one, which wakes two, and so on
            for _ in range(min(2, len(self.places))):
                _waiting.put(self)
            self.ends.put(_alone(work))

    def close(self) -> list[BaseException]:
        """Wait for the helpers that came; what they raised."""
        return [error for _ in range(self.helpers - self.call_off()) if (error := self.ends.get())]

    def call_off(self) -> int:
        """Let nobody come any more; how many have not come."""
        late = 0
        while self._enter():
            late += 1
        self.work = None  # the task may lie in the queue for long, what it works on need not
        return late

    def _enter(self) -> bool:
        try:
            self.places.pop()
        except IndexError:
            return False
        return True


def count() -> int:
    """Threads to use: those of `limit`, of PACKFMT_THREADS, or the processors that there were at first.

    Raises
    ------
    PackfmtError
        If PACKFMT_THREADS is not a whole number of 1 to 256.
    """
    if _limits and (limited := _limits.get(get_ident())):
        return limited
    if asked := os.environ.get("PACKFMT_THREADS"):
        if not asked.isdecimal() or not 1 <= len(asked) <= 3 or not 1 <= int(asked) <= MOST:
            raise PackfmtError(f"PACKFMT_THREADS is {asked!r}, needs a whole number of 1 to {MOST}")
        return int(asked)
    return min(MOST, processors())


@cache
def processors() -> int:
    """Those that this process may run on; to ask takes as long as a small product."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class limit:
    """What this thread calls inside uses so many threads, whatever PACKFMT_THREADS says; None: as before.

    Raises
    ------
    PackfmtError
        If `threads` is not a whole number of 1 to 256.
    """

    __slots__ = ("_before", "_limit")

    def __init__(self, threads: int | None) -> None:
        # the usual case first: after megabytes of weights each line costs a microsecond
        self._limit = threads if type(threads) is int and 0 < threads <= MOST else _checked(threads)

    def __enter__(self) -> None:
        self._before = _limits.get(me := get_ident())
        if self._limit:
            _limits[me] = self._limit

    def __exit__(self, *_: object) -> None:
        if self._before:
            _limits[get_ident()] = self._before
        else:
            _limits.pop(get_ident(), None)


def share(work: Callable[[], None], most: int) -> None:
    """Call work() in at most `most` threads at once, the caller's among them; the calls share out the items.

    The caller's own call must do all there is if no other begins: work claims its items one by one. Work within
    work is called once, by the thread that asks. Returns when all calls have, or then raises what one raised.
    """
    helped(work, helpers(most))


def helpers(most: int) -> int:
    """How many threads help this one, if at most so many are worth it together."""
    return 0 if most < 2 or _alone_here() else min(count(), most) - 1


def helped(work: Callable[[], None], others: int) -> None:
    """`share` with at most so many threads beside the caller's: what `helpers` gives."""
    if not others:
        return work()
    task = wake(work, others, others)
    board[WANTED] = next(_serial)
    error = _alone(work)
    for failed in (error, *task.close()):
        if failed:
            raise failed


def wake(work: Callable[[], None], others: int, there: int) -> _Task:
    """Have work() called by so many others, as soon as they come, of at least so many helpers that are there then."""
    task = _Task(work, others)
    _have(there)
    if _waiting.qsize() < MOST:  # else all helpers are busy, or there are none, and tasks would pile up
        _waiting.put(task)
    return task


def idle() -> bool:
    """Whether there is no work that waits for a helper."""
    return _waiting.empty()


def spread(work: Callable[[int, int], None], total: int, least: int = 1) -> None:
    """Call work(start, stop) so that the ranges cover [0, total); each range has `least` items or more.

    There are as many ranges as threads. Results do not depend on their number as long as every item writes only
    what is its own. Returns, or raises what a range raised, when all are done.
    """
    threads = 1 if _alone_here() else min(count(), max(1, total // max(1, least)))
    if threads == 1:
        return work(0, total)
    ranges = deque(pairwise(total * i // threads for i in range(threads + 1)))
    errors: list[BaseException] = []

    def take() -> None:
        while True:
            try:
                start, stop = ranges.popleft()
            except IndexError:
                return
            try:
                work(start, stop)
            except BaseException as error:
                errors.append(error)

    share(take, threads)
    if errors:
        raise errors[0]


def _alone_here() -> bool:
    """Whether nobody helps this thread, for it helps others or does what is shared; or the process ends."""
    return _closed or (bool(_busy) and get_ident() in _busy)


def _checked(threads: Any) -> int:
    if threads is None:
        return 0
    try:
        if not isinstance(threads, bool) and 1 <= operator.index(threads) <= MOST:
            return operator.index(threads)
    except TypeError:
        pass
    raise PackfmtError(f"threads is {threads!r}, needs a whole number of 1 to {MOST}")


def _alone(work: Callable[[], None]) -> BaseException | None:
    """Call work() in this thread only; what it raised."""
    me = get_ident()
    _busy.add(me)
    try:
        work()
    except BaseException as error:
        return error
    finally:
        _busy.discard(me)
    return None


def _have(helpers: int) -> None:
    """See to it that there are so many helpers, or as many as the system gives threads."""
    global _started
    if _started >= helpers:
        return
    with _starting:
        while _started < helpers:
            thread = threading.Thread(target=_help, args=(_waiting,), name="packfmt", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return
            _started += 1


def _help(waiting: SimpleQueue[_Task]) -> None:
    while True:
        waiting.get().help()


def _renew() -> None:
    """A forked process inherits no threads but its own, which has no part in what the others do."""
    global _waiting, _starting, _started, board, board_at
    _busy.clear()
    mine = _limits.get(get_ident(), 0)
    _limits.clear()
    if mine:
        _limits[get_ident()] = mine
    processors.cache_clear()
    _waiting, _starting, _started = SimpleQueue(), threading.Lock(), 0
    board = np.zeros(SLOT * (1 + SLOTS), np.int64)
    board_at = board.ctypes.data


def _leave() -> None:
    """No helper is in compiled code when the process takes that down."""
    global _closed
    _closed, latest = True, time.monotonic() + LEAVING
    board[WANTED] = next(_serial)
    while board[INSIDE] and time.monotonic() < latest:
        time.sleep(0.0001)


_waiting: SimpleQueue[_Task]
_starting: threading.Lock
_started: int
board: np.ndarray
board_at: int
_closed = False
_serial = numbers_from(1)
_renew()
atexit.register(_leave)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
