"""The steps of a plan carried out by threads, a slice at a time, within so many bytes of memory.

Every thread takes the next slice, reads, encodes and writes it, so that the three overlap, and nothing waits in a
queue. Slices are begun in the order of the plan and may end in any: each has its place in the output.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from packfmt import codecs
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, matrix
from packfmt.conversion.journal import Done, Journal
from packfmt.conversion.steps import ROOM, Slice, apply, counted, cut, peak_of, read
from packfmt.errors import LayoutError
from packfmt.exporters.output import Files
from packfmt.kernels import threads
from packfmt.plan import RESCALE, Plan, Step

Progress = Callable[[str, int], None]  # a tensor's name, and the bytes of it that have just been done
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

    memory : bytes that slices in work may hold together; one that needs more is worked on alone
    files : where results go; None: they are thrown away
    journal : what is done already, which is left out, and where to note what is done now

    Raises
    ------
    LayoutError
        If a weight cannot be encoded: of those begun, the first of the plan.
    ContainerError, OSError
        If the source cannot be read or the output not be written.
    """
    work = _Work(plan, model, memory, files, journal, importance or {}, progress)
    return work.run(sorted(which))


def refused(plan: Plan, model: Checkpoint, which: Iterable[int], memory: int) -> list[LayoutError]:
    """Do these steps, throw the results away, and say what is wrong with each that cannot be done."""
    work = _Work(plan, model, memory, None, None, {}, None)
    work.all_of_them = True
    work.run(sorted(which))
    return [error for _, error in sorted(work.refused.items())]


@dataclass(slots=True)
class _Job:
    """What a thread does next. Jobs that others wait for come before these, and wait for none."""

    at: int  # of the step
    held: int
    do: Callable[[], None]
    after: threading.Event | None = None


@dataclass(slots=True)
class _State:
    """A step in work."""

    left: int  # slices
    done: Done


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
    ) -> None:
        self.plan, self.model, self.files, self.journal = plan, model, files, journal
        self.importance, self.progress = importance, progress
        self.workers = threads.count()
        self.room = max(1, min(ROOM, memory // (self.workers + 1)))
        self.memory = _Memory(memory)
        self.jobs: deque[_Job] = deque()
        self.states: dict[int, _State] = {}
        self.peaks: dict[int, _Peak] = {}  # of steps
        self.lock = threading.Lock()
        self.lines: list[tuple[int, dict[str, object]]] = []  # to be noted
        self.errors: list[tuple[int, BaseException]] = []
        self.stop = threading.Event()
        self.all_of_them = False  # go on after a refusal
        self.refused: dict[int, LayoutError] = {}

    def run(self, which: Sequence[int]) -> dict[int, Done]:
        groups = _groups(self.plan.steps)
        for at in which:
            self._plan_step(at, groups.get(at, (at,)))
        crew = [threading.Thread(target=self._worker, name="packfmt-work", daemon=True) for _ in range(self.workers)]
        crew = crew[: len(self.jobs)]
        for one in crew:
            one.start()
        try:
            last = time.monotonic()
            while alive := [one for one in crew if one.is_alive()]:
                alive[0].join(0.1)
                if time.monotonic() - last >= NOTED:
                    self._note()
                    last = time.monotonic()
        finally:
            self.stop.set()
            self.memory.close()
            for one in crew:
                one.join()
            if not self.errors or not isinstance(min(self.errors, key=lambda e: e[0])[1], LayoutError):
                self._note()
        if self.errors:
            raise min(self.errors, key=lambda found: found[0])[1]
        return {at: state.done for at, state in self.states.items()}

    # ---------------------------------------------------------------- jobs

    def _plan_step(self, at: int, group: tuple[int, ...]) -> None:
        """The jobs of a step, and before them those that find the peak it needs."""
        step = self.plan.steps[at]
        done = self.journal.done.get(at, Done()) if self.journal else Done()
        if done.sums is not None:
            self.states[at] = _State(0, done)
            return
        slices = [s for a, b in _missing(done.rows, matrix(step.shape)[0]) for s in cut(at, step, self.room, a, b)]
        self.states[at] = _State(len(slices), done)
        wants = bool(step.encoder) and step.encoder in codecs.get(step.layout.name).shared
        if wants and at not in self.peaks and (len(group) > 1 or not all(s.whole for s in slices) or done.rows):
            self._plan_peak(group)
        if slices and not slices[0].whole:  # a reader of slices cannot see whether all of it is what was written
            self.jobs.append(_Job(at, 0, lambda: self.model.check(step.name)))
        after = self.peaks[at].known if at in self.peaks else None
        for part in slices:
            self.jobs.append(_Job(at, part.held, partial(self._do, part), after))
        if not slices:  # all rows were there
            self.jobs.append(_Job(at, 0, lambda: self._end(at)))

    def _plan_peak(self, group: tuple[int, ...]) -> None:
        parts = [s for at in group for s in cut(at, self.plan.steps[at], self.room)]
        peak = _Peak(len(parts))
        self.peaks |= dict.fromkeys(group, peak)

        def look(part: Slice) -> None:
            largest = peak_of(read(self.model, self.plan.steps[part.at], part))
            with self.lock:
                peak.value, peak.left = max(peak.value, largest), peak.left - 1
            if not peak.left:
                peak.known.set()

        for part in parts:
            self.jobs.append(_Job(part.at, part.held, partial(look, part)))

    def _do(self, part: Slice) -> None:
        """Read, encode and write a slice."""
        step = self.plan.steps[part.at]
        peak = self.peaks[part.at].value if part.at in self.peaks else None
        costs = self.importance.get(step.name)
        if costs is not None and not part.whole and costs.ndim > 1:
            costs = costs.reshape(matrix(step.shape))[part.start : part.stop]
        tensor = read(self.model, step, part)
        try:
            result = apply(step, tensor, costs, peak)
            found = counted(step, tensor, result)
        except LayoutError as error:
            hint = "; --encoder NAME would round it" if step.action in ("repack", RESCALE) else ""
            where = "" if part.whole else f"rows {part.start} to {part.stop - 1}: "
            raise LayoutError(f"{step.name}: {where}{error}{hint}") from error
        del tensor
        if self.files:
            self.files.put(part.at, result, part.rows)
        state = self.states[part.at]
        with self.lock:
            state.done.counted += found
            state.left -= 1
            self.lines.append((part.at, {"rows": (part.start, part.stop), "counted": found}))
            if self.progress:
                self.progress(step.name, part.nbytes)
        if not state.left:
            self._end(part.at)

    def _end(self, at: int) -> None:
        """A tensor is whole."""
        sums = self.files.sums(at) if self.files else {}
        with self.lock:
            self.states[at].done.sums = sums
            self.lines.append((at, {"sums": sums}))

    # ---------------------------------------------------------------- threads

    def _worker(self) -> None:
        while not self.stop.is_set():
            try:
                job = self.jobs.popleft()
            except IndexError:
                return
            try:
                while job.after and not job.after.wait(0.1) and not self.stop.is_set():
                    pass
                with self.memory.held(job.held), threads.limit(1 if job.held <= self.room else self.workers):
                    if not self.stop.is_set():
                        job.do()
            except LayoutError as error:
                with self.lock:
                    if self.all_of_them:
                        self.refused.setdefault(job.at, error)
                        continue
                    self.errors.append((job.at, error))
                self.stop.set()
            except BaseException as error:
                with self.lock:
                    self.errors.append((job.at, error))
                self.stop.set()

    def _note(self) -> None:
        """Let the journal say what is in the output for good."""
        with self.lock:
            lines, self.lines = self.lines, []
        if lines and self.files and self.journal:
            self.files.sync()
            self.journal.add(lines)


class _Memory:
    """So many bytes, which jobs hold for a while; one that wants more than there are waits for all the others."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        nbytes = min(nbytes, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()

    def close(self) -> None:
        """Let those that wait go on, to see that there is nothing to do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _missing(rows: Iterable[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
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
