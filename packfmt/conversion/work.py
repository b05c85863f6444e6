"""The steps of a plan carried out by threads, a slice at a time, within so many bytes of memory.

Every thread takes the next slice, reads, encodes and writes it, so that the three overlap, and nothing waits in a
queue. Slices are begun in the order of the plan and may end in any: each has its place in the output.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from packfmt import codecs
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, PackedTensor, matrix
from packfmt.conversion.journal import Done, Journal
from packfmt.conversion.steps import ROOM, Slice, apply, counted, cut, peak_of, read
from packfmt.errors import LayoutError, MachineError
from packfmt.exporters.output import CHUNK, Files
from packfmt.kernels import threads
from packfmt.plan import RESCALE, Plan, Step

Progress = Callable[[str, int], None]  # a tensor's name, and the bytes of it that have just been done
GO_ON = "--resume goes on"
NOTED = 2.0  # seconds between entries of the journal: what is lost at most when the process is killed
FUSED_NAMES = (
    ("q_proj", "k_proj", "v_proj", "query", "key", "value", "attn_q", "attn_k", "attn_v"),
    ("gate_proj", "up_proj", "w1", "w3", "ffn_gate", "ffn_up"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
FUSED = re.compile(rf"(^|.*\.)({'|'.join(name for names in FUSED_NAMES for name in names)})(\.weight)$")


def carry_out(
    plan: Plan,
    model: Checkpoint,
    which: Iterable[int],
    *,
    memory: int,
    files: Files | None = None,
    journal: Journal | None = None,
    importance: Mapping[str, Array] | None = None,
    progress: Progress | None = None,
) -> dict[int, Done]:
    """Do these steps of a plan, on all threads; returns what was counted of each, and its checksums.

    What fails first in the order of the plan is raised, however threads happen to run.

    memory : bytes that slices in work may hold together; one that needs more is worked on alone
    files : where results go; None: they are thrown away
    journal : what is done already, which is left out, and where to note what is done now

    Raises
    ------
    LayoutError
        If a weight cannot be encoded.
    ContainerError, OSError
        If the source cannot be read or the output not be written.
    """
    work = _Work(plan, model, memory, files, journal, importance or {}, progress)
    work.run(sorted(which))
    if work.errors:
        raise min(work.errors, key=lambda found: found[0])[1]
    return work.done


def refused(plan: Plan, model: Checkpoint, which: Iterable[int], memory: int) -> list[LayoutError]:
    """Do these steps, throw the results away, and say what is wrong with each that cannot be done."""
    work = _Work(plan, model, memory, None, None, {}, None, all_of_them=True)
    work.run(sorted(which))
    first: dict[int, LayoutError] = {}
    for _, error, at in sorted(work.errors, key=lambda found: found[0]):
        if not isinstance(error, LayoutError):
            raise error
        first.setdefault(at, error)
    return [error for _, error in sorted(first.items())]


def bytes_of_rows(step: Step, start: int, stop: int) -> int:
    """Bytes of the source that rows of a step count for: of all its rows together, just those of the tensor."""
    total, rows = step.before.nbytes(*matrix(step.shape)), max(1, matrix(step.shape)[0])
    return total * stop // rows - total * start // rows


@dataclass(slots=True)
class _Turn:
    """What a thread does next. What others wait for comes before them, and waits for none."""

    at: int  # of the step
    held: int
    do: Callable[[], None]
    after: threading.Event | None = None


@dataclass(slots=True)
class _Peak:
    """The largest magnitude of steps that shall have one scale for their tensors."""

    left: int  # slices to be looked at
    value: float = 0.0
    known: threading.Event = field(default_factory=threading.Event)


class _Work:
    def __init__(
        self,
        plan: Plan,
        model: Checkpoint,
        memory: int,
        files: Files | None,
        journal: Journal | None,
        importance: Mapping[str, Array],
        progress: Progress | None,
        all_of_them: bool = False,
    ) -> None:
        self.plan, self.model, self.files, self.journal = plan, model, files, journal
        self.importance, self.progress = importance, progress
        self.all_of_them = all_of_them  # go on after a refusal
        self.workers = threads.count()
        self.room = max(1, min(ROOM, memory // (self.workers + 1)))
        self.memory = _Memory(memory)
        self.groups = _groups(plan.steps)
        self.peaks: dict[int, _Peak] = {}  # of steps
        self.left: dict[int, int] = {}  # turns that a step waits for
        self.done: dict[int, Done] = {}
        self.lines: list[tuple[int, dict[str, object]]] = []  # to be noted
        self.unsure = False  # whether what was written is on the disk
        self.errors: list[tuple[int, BaseException, int]] = []  # with the number of the turn, and its step
        self.failed: float = float("inf")  # the first number of those; later turns are left out
        self.lock, self.taking, self.noting = threading.Lock(), threading.Lock(), threading.Lock()
        self.turns: Iterator[tuple[int, _Turn]] = iter(())

    def run(self, which: Iterable[int]) -> None:
        which = list(which)
        self._tell_before(which)
        self.turns = enumerate(itertools.chain.from_iterable(map(self._turns_of, which)))
        crew = [threading.Thread(target=self._worker, name="packfmt-work", daemon=True) for _ in range(self.workers)]
        try:
            for one in crew:
                one.start()
            last = time.monotonic()
            while alive := [one for one in crew if one.is_alive()]:
                alive[0].join(0.1)
                if time.monotonic() - last >= NOTED:
                    self._note()
                    last = time.monotonic()
        finally:
            self.failed = min(self.failed, -1 if any(one.is_alive() for one in crew) else self.failed)
            for one in crew:
                if one.ident:
                    one.join()
            self._note()

    # ---------------------------------------------------------------- turns

    def _turns_of(self, at: int) -> Iterator[_Turn]:
        """What is left to do of a step; if even that cannot be said, a turn that says why."""
        try:
            yield from self._jobs(at)
        except Exception as error:
            yield _Turn(at, 0, partial(_raise, error))

    def _jobs(self, at: int) -> Iterator[_Turn]:
        """What is left to do of a step: before its slices, what finds the peak that they need."""
        step = self.plan.steps[at]
        done = self.done[at]
        if done.sums is not None:
            return
        count, group = matrix(step.shape)[0], self.groups.get(at, (at,))
        slices = [s for a, b in _gaps(done.rows, count) for s in cut(at, step, self.room, a, b)]
        partly = bool(done.rows) or not all(s.whole for s in slices)
        wants = bool(step.encoder) and step.encoder in codecs.get(step.layout.name).shared
        if wants and at not in self.peaks and (len(group) > 1 or partly):
            yield from self._peak_jobs(group)
        self.left[at] = len(slices) + 1
        # who reads slices cannot see whether all of it is what was written
        yield _Turn(at, CHUNK if partly else 0, partial(self._check, at, partly))
        after = self.peaks[at].known if at in self.peaks else None
        for part in slices:
            yield _Turn(at, part.held, partial(self._do, part), after)

    def _peak_jobs(self, group: tuple[int, ...]) -> Iterator[_Turn]:
        parts = [s for at in group for s in cut(at, self.plan.steps[at], self.room)]
        peak = _Peak(len(parts))
        self.peaks |= dict.fromkeys(group, peak)

        def look(part: Slice) -> None:
            largest = 0.0
            try:
                with self._explained(part):
                    largest = peak_of(self._read(part))
            finally:  # who waits for the peak of what cannot be decoded would wait for ever
                with self.lock:
                    peak.value, peak.left = max(peak.value, largest), peak.left - 1
                    if not peak.left:
                        peak.known.set()

        for part in parts:
            yield _Turn(part.at, part.held, partial(look, part))

    def _do(self, part: Slice) -> None:
        """Read, encode and write a slice."""
        step = self.plan.steps[part.at]
        peak = self.peaks[part.at].value if part.at in self.peaks else None
        costs = self.importance.get(step.name)
        if costs is not None and not part.whole and costs.ndim > 1:
            costs = costs.reshape(matrix(step.shape))[part.start : part.stop]
        tensor = self._read(part)
        with self._explained(part):
            result = apply(step, tensor, costs, peak)
            found = counted(step, tensor, result)
        del tensor
        if self.files:
            self.files.put(part.at, result, part.rows)
        del result
        with self.lock:
            self.done[part.at].counted += found
            self.lines.append((part.at, {"rows": (part.start, part.stop), "counted": found}))
        self._tell(step, part.start, part.stop)
        self._part_done(part.at)

    def _check(self, at: int, partly: bool) -> None:
        if partly:
            with self._reading(at):
                self.model.check(self.plan.steps[at].name)
        self._part_done(at)

    def _part_done(self, at: int) -> None:
        """Of all that a step waits for, the last one ends it."""
        with self.lock:
            self.left[at] -= 1
            if self.left[at]:
                return
        sums = self.files.sums(at) if self.files else {}
        with self.lock:
            self.done[at].sums = sums
            self.lines.append((at, {"sums": sums}))

    def _read(self, part: Slice) -> PackedTensor:
        with self._reading(part.at):
            return read(self.model, self.plan.steps[part.at], part)

    @contextmanager
    def _reading(self, at: int) -> Iterator[None]:
        """Errors of the system, as ours: they are not the output's."""
        try:
            yield
        except OSError as error:
            where = f"{self.model.path}: {self.plan.steps[at].name}"
            raise MachineError(f"{where}: cannot be read: {error}; {GO_ON}") from error

    @contextmanager
    def _explained(self, part: Slice) -> Iterator[None]:
        """What is wrong with a slice, with where it is, and what to do."""
        step = self.plan.steps[part.at]
        try:
            yield
        except LayoutError as error:
            hint = "; --encoder NAME would round it" if step.action in ("repack", RESCALE) else ""
            where = "" if part.whole else f"in rows {part.start} to {part.stop - 1}, the first of them counted as 0: "
            raise LayoutError(f"{step.name}: {where}{error}{hint}") from error

    def _tell_before(self, which: Iterable[int]) -> None:
        """Take over what was done before, and tell of it at once: it says nothing of the speed."""
        before = self.journal.done if self.journal else {}
        self.done = {at: before.get(at, Done()) for at in which}
        for at, done in self.done.items():
            step = self.plan.steps[at]
            if self.progress and done.rows:
                self.progress(step.name, sum(bytes_of_rows(step, *rows) for rows in done.rows))

    def _tell(self, step: Step, start: int, stop: int) -> None:
        if self.progress:
            with self.lock:
                self.progress(step.name, bytes_of_rows(step, start, stop))

    # ---------------------------------------------------------------- threads

    def _worker(self) -> None:
        """Take one turn after the other, up to the first that failed."""
        while True:
            with self.taking:
                number, turn = next(self.turns, (0, None))
            if turn is None or number > self.failed:
                return
            try:
                while turn.after and not turn.after.wait(0.1) and number < self.failed:
                    pass
                with self.memory.held(turn.held), threads.limit(1 if turn.held <= self.room else self.workers):
                    if number < self.failed:
                        turn.do()
            except BaseException as error:
                with self.lock:
                    self.errors.append((number, error, turn.at))
                    if not (self.all_of_them and isinstance(error, LayoutError)):
                        self.failed = min(self.failed, number)

    def _note(self) -> None:
        """Let the journal say what is in the output for good.

        After a failure it says no more: a system that could not write what it was given has forgotten it, and a
        second sync is no failure.
        """
        with self.noting:
            with self.lock:
                lines, self.lines = self.lines, []
            if lines and self.files and self.journal and not self.unsure:
                self.unsure = True
                self.files.sync()
                self.journal.add(lines)
                self.unsure = False


class _Memory:
    """So many bytes, which jobs hold for a while; one that wants more than there are waits for all the others."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        nbytes = min(nbytes, self._total)
        with self._turn, self._changed:  # who wants much would wait for ever if those with less went first
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


def _raise(error: Exception) -> None:
    raise error


def _gaps(rows: Iterable[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    """The ranges of 0 to count that these do not cover; of no rows at all, all (none) of them."""
    at = 0
    for start, stop in sorted(rows):
        if start > at:
            yield at, start
        at = max(at, stop)
    if at < count or not count:
        yield at, count


def _groups(steps: tuple[Step, ...]) -> dict[int, tuple[int, ...]]:
    """The steps that run as one layer with others, each with all of these.

    Engines multiply by queries, keys and values at once, and by gates beside what they open; such layers must
    share the scale of the whole tensor (vLLM 0.11, nvfp4 linear methods; NVIDIA ModelOpt, unified_export_hf.py).
    """
    together: dict[tuple[str, int, str], list[int]] = {}
    for at, step in enumerate(steps):
        found = FUSED.search(step.name)
        if found and step.encoder and step.encoder in codecs.get(step.layout.name).shared:
            kind = next(i for i, names in enumerate(FUSED_NAMES) if found[2] in names)
            together.setdefault((found[1], kind, step.layout.id), []).append(at)
    return {at: tuple(group) for group in together.values() for at in group}
