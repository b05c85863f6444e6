"""Compiled work by several threads at once, without the interpreter: a call that follows closely begins at once.

To wake a thread takes 50 to 100 microseconds on a virtual machine, as long as half a product. So a helper that has
done its work looks for more for a while, in compiled code, on words of memory that callers write to; one that has
looked in vain sleeps until it is woken (`threads`). What a caller posts is an address of compiled code and one of a
`Job`; it works too, and begins at once. A helper that comes in time takes a place, and is waited for; nobody else is.

    caller      owner 0 -> 1; function, job; places: (generation, helpers) ... its own part ...
                places: (generation, 0): nobody enters any more; wait until as many are done as entered; owner 0
    helper      places: one less, if there is one, in one piece with the generation; its part; done: one more
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from packfmt.errors import PackfmtError
from packfmt.kernels import pages, threads
from packfmt.kernels.activations import Order, Room
from packfmt.kernels.cache import njit
from packfmt.kernels.simd_code import FEATURES, I64, call
from packfmt.kernels.threads import INSIDE, LOOKING, SLOT, SLOTS, WANTED
from packfmt.kernels.tile_code import Table, address_of, call_at, entry, number_at

Floats = npt.NDArray[np.float32]

# Microseconds that a helper looks for more. To wake one took 50 (37 to 95, of ten in eight cases), and a product of
# 4096 x 4096, Sherry in two threads, 182 where none looked, 111 with 50, 107 with 400; with 400 a model's own work
# between two products is covered too.
SPIN: Final = 400
FIRST: Final = 50  # microseconds that one looks which was woken for work
MOST_SPIN: Final = 1_000_000
KEPT: Final = 32  # rows of activations; a job for more is not kept for another product
EVERY: Final = 63  # of so many rounds of waiting, and one more, that one lets others have the processor
CALIBRATION: Final = 4096  # looks

# words of a slot of the board: places in the low bits and the generation above; those done; whose it is, what to do
PLACES, DONE, OWNER, FUNCTION, JOB, ROUNDS = 0, 16, 32, 33, 34, 35
LOW: Final = (1 << 16) - 1  # of places

# numbers of a job, for `number_at`; and of each seat's after them, in cache lines of their own: how much of its share
# is claimed, how many shares it is further, its room
X, BATCH, COLS, OUT, ROWS, PRODUCT, OTHERS, START, MEMORY = range(9)
SEATS, SEAT, CLAIMED, TURN, ROOM = 16, 8, 0, 1, 2
NUMBER: Final = 16  # bytes that one takes


# ---------------------------------------------------------------- words that several threads write


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def _get(typing, address):
    """The int64 at an address, and whatever was written before it."""

    def code(context, builder, signature, args):
        return builder.load_atomic(_at(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def _put(typing, address, number):
    """Write an int64, after all that was written before."""

    def code(context, builder, signature, args):
        builder.store_atomic(args[1], _at(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _plus(typing, address, number):
    """Add to an int64; what it was."""

    def code(context, builder, signature, args):
        return builder.atomic_rmw("add", _at(builder, args[0]), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), code


@intrinsic
def _turn(typing, address, before, after):
    """Change an int64 if it is `before`; 1 if it was, else 0."""

    def code(context, builder, signature, args):
        found = builder.cmpxchg(_at(builder, args[0]), args[1], args[2], "acq_rel", "acquire")
        return builder.zext(builder.extract_value(found, 1), I64)

    return types.int64(types.int64, types.int64, types.int64), code


@intrinsic
def _pause(typing):
    """Tell the processor that this thread waits."""

    def code(context, builder, signature, args):
        if "sse2" in FEATURES:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), code


if sys.platform == "win32":

    @intrinsic
    def _yield(typing):
        """Let another thread have the processor; there is no such function of C."""
        return types.int32(), lambda context, builder, signature, args: ir.Constant(ir.IntType(32), 0)
else:
    _yield = types.ExternalFunction("sched_yield", types.int32())


# ---------------------------------------------------------------- the protocol


@njit(cache=True, nogil=True)
def _look(board, rounds, wanted):
    """Take part in what is posted, until there was nothing for so many rounds, or Python has other work.

    Now and then whoever needs this processor gets it: perhaps the one who would post.

    board : address; wanted : what stood there when Python had none
    """
    _plus(board + 8 * INSIDE, 1)
    _plus(board + 8 * LOOKING, 1)
    left = rounds
    while left > 0 and _get(board + 8 * WANTED) == wanted:
        left -= 1
        slot = board
        for _ in range(SLOTS):
            slot += 8 * SLOT
            places = _get(slot + 8 * PLACES)
            if places & LOW and _turn(slot + 8 * PLACES, places, places - 1):
                _plus(board + 8 * LOOKING, -1)
                left = _get(slot + 8 * ROUNDS)
                call_at(_get(slot + 8 * FUNCTION), (np.int64(0), _get(slot + 8 * JOB), places & LOW))
                _plus(board + 8 * LOOKING, 1)
                _plus(slot + 8 * DONE, 1)
        if left & EVERY:
            _pause()
        else:
            _yield()
    _plus(board + 8 * LOOKING, -1)
    _plus(board + 8 * INSIDE, -1)


@njit(cache=True, nogil=True)
def _multiply(board, function, product, job, x, out, start, others, rounds):
    """Call function(nothing, job, seat) in this thread, as seat 0, and in up to so many others that look for work.

    Nobody helps where all slots are other callers'. What the job is told before: the product, x and out.

    board, function, product, job : addresses
    rounds : that who helped looks for more
    """
    _put(job + NUMBER * X, x.ctypes.data)
    _put(job + NUMBER * BATCH, x.shape[0])
    _put(job + NUMBER * COLS, x.shape[1])
    _put(job + NUMBER * OUT, out.ctypes.data)
    _put(job + NUMBER * ROWS, out.shape[1])
    _put(job + NUMBER * PRODUCT, product)
    _put(job + NUMBER * START, start)
    slot, taken = board, 0
    while others and not taken and slot < board + 8 * SLOT * SLOTS:
        slot += 8 * SLOT
        taken = _turn(slot + 8 * OWNER, 0, 1)
    seats = 1 + others * taken
    _put(job + NUMBER * OTHERS, seats - 1)
    for seat in range(seats):
        _put(job + NUMBER * (SEATS + SEAT * seat + CLAIMED), 0)
        _put(job + NUMBER * (SEATS + SEAT * seat + TURN), 0)
    generation = 0
    if taken:
        generation = (_get(slot + 8 * PLACES) | LOW) + 1
        _put(slot + 8 * FUNCTION, function)
        _put(slot + 8 * JOB, job)
        _put(slot + 8 * ROUNDS, rounds)
        _put(slot + 8 * DONE, 0)
        _put(slot + 8 * PLACES, generation + others)
    call_at(function, (np.int64(0), job, np.int64(0)))
    if taken:
        places = _get(slot + 8 * PLACES)
        while not _turn(slot + 8 * PLACES, places, generation):
            places = _get(slot + 8 * PLACES)
        entered = generation + others - places
        while _get(slot + 8 * DONE) < entered:
            rounds -= 1
            if rounds & EVERY:
                _pause()
            else:
                _yield()
        _put(slot + 8 * OWNER, 0)


@njit(cache=True, nogil=True)
def _claim(job, seat, parts):
    """A part that nobody has claimed: of this seat's share, in order, and then of the shares after it; or `parts`.

    So what a thread reads follows what it has read, as long as all keep pace.
    """
    seats, mine = number_at(job, OTHERS) + 1, SEATS + SEAT * seat
    for turn in range(number_at(job, mine + TURN), seats):
        share = (seat + turn) % seats
        part = parts * share // seats + _plus(job + NUMBER * (SEATS + SEAT * share + CLAIMED), 1)
        if part < parts * (share + 1) // seats:
            return part
        _put(job + NUMBER * (mine + TURN), turn + 1)
    return parts


# ---------------------------------------------------------------- jobs


class Job:
    """What threads are told of a product, and a room for each seat; of seat 0 alone if all share its room."""

    __slots__ = ("address", "memory", "numbers", "rooms", "size")

    def __init__(self, order: Order, rows: int, seats: int) -> None:
        self.rooms = [Room(order, rows) for _ in range(seats)]
        self.numbers = np.zeros((SEATS + SEAT * seats, NUMBER // 8), np.int64)
        self.numbers[SEATS + ROOM :: SEAT, 0] = [room.table.address for room in self.rooms]
        self.address: int = self.numbers.ctypes.data
        self.size = 0

    def hold(self, nbytes: int) -> None:
        """Have so many bytes of memory. What was there before is: new memory costs more than filling it."""
        if nbytes > self.size:
            self.memory, self.size = pages.empty(nbytes), nbytes
            self.numbers[MEMORY, 0] = self.memory.ctypes.data


class Jobs:
    """Jobs that no product has: what is made anew is not in the cache."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._free: dict[int, list[Job]] = {}

    def take(self, rows: int, seats: int) -> Job:
        """A job for so many rows or more, which nobody else has until it is given back."""
        if rows > KEPT:
            return Job(self._order, rows, seats)
        try:
            return self._free[seats].pop()
        except LookupError:
            return Job(self._order, KEPT, seats)

    def give(self, job: Job, rows: int) -> None:
        """It may be taken by another product."""
        if rows <= KEPT:
            self._free.setdefault(len(job.rooms), []).append(job)


_jobs: dict[tuple[int, ...], Jobs] = {}


def jobs(order: Order) -> Jobs:
    """The same for all orders of one size, for the layers of a model are multiplied one after the other."""
    key = order.stored, order.cols, len(order.ends), order.way
    return _jobs.setdefault(key, Jobs(order))


# ---------------------------------------------------------------- the door


class Way:
    """Compiled code that multiplies: function(nothing, job, seat), with a kernel that is known.

    function : a compiled function of (kernel, int64 address of a job, int64 seat)
    """

    __slots__ = ("address", "run")

    def __init__(self, function: Any, kernel: types.Type) -> None:
        floats = types.Array(types.float32, 2, "C")
        numbers = [types.int64] * 4
        self.address = address_of(function, kernel, types.int64, types.int64)
        self.run = entry(_multiply, *numbers, floats, floats, *numbers[:3])


def multiply(
    way: Way,
    product: int,
    mine: Jobs,
    x: Floats,
    out: Floats,
    rows: int,
    most: int,
    fill: Callable[[Table], None] | None = None,
    memory: int = 0,
) -> None:
    """Multiply x with the weights of a product, in at most so many threads.

    product : address of its table
    mine : of the product's order
    x, out : (batch, cols) and (batch, rows of weights) float32, C-contiguous; neither is looked at
    rows : of activations that a room must hold
    fill : brings x into a room that all threads share; otherwise each brings it into its own
    memory : bytes that each thread needs
    """
    others = threads.helpers(most)
    if not others:
        job = mine.take(rows, 1)
        if memory > job.size:
            job.hold(memory)
        way.run(threads.board_at, way.address, product, job.address, x, out, 0, 0, 0)
    elif fill is None:
        job = mine.take(rows, 1 + others)
        job.hold(memory * (1 + others))
        _with_others(way, product, job, x, out, 0, others)
    else:
        job = mine.take(rows, 1 + others)
        fill(job.rooms[0].table)
        _with_others(way, product, job, x, out, len(x), others)
    mine.give(job, rows)


def _with_others(way: Way, product: int, job: Job, x: Floats, out: Floats, start: int, others: int) -> None:
    rounds = _rounds(spin()) if others < threads.processors() else 0
    missing = others - int(threads.board[LOOKING])
    called = threads.wake(_take_part, missing, others) if missing > 0 else None
    way.run(threads.board_at, way.address, product, job.address, x, out, start, others, rounds)
    if called:
        called.call_off()


def _take_part() -> None:
    wanted = int(threads.board[WANTED])
    if threads.idle():
        entry(_look, *[types.int64] * 3)(threads.board_at, _rounds(max(spin(), FIRST)), wanted)


@cache
def spin() -> int:
    """Microseconds that a helper looks for more work: those of PACKFMT_SPIN, or SPIN.

    Raises
    ------
    PackfmtError
        If PACKFMT_SPIN is not a whole number of 0 to 1,000,000.
    """
    asked = os.environ.get("PACKFMT_SPIN") or str(SPIN)
    if not asked.isdecimal() or len(asked) > 7 or int(asked) > MOST_SPIN:
        raise PackfmtError(f"PACKFMT_SPIN is {asked!r}, needs a whole number of microseconds, 0 to {MOST_SPIN}")
    return int(asked)


@cache
def _rounds(microseconds: int) -> int:
    """How many rounds of `_look` last so long."""
    board = np.zeros(SLOT * (1 + SLOTS), np.int64)
    look, each = entry(_look, *[types.int64] * 3), float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        look(board.ctypes.data, CALIBRATION, 0)
        each = min(each, time.perf_counter() - begin)
    return int(microseconds * 1e-6 / each * CALIBRATION)
