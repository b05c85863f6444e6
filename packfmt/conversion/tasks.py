"""A conversion as one of several tasks can be told of it, or an executor's worker on another machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Executor, wait
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from packfmt import checkpoint, exporters
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, matrix
from packfmt.conversion import journal as journals
from packfmt.conversion import record
from packfmt.conversion.admission import memory_for
from packfmt.conversion.journal import ALONE, Done, Journal, Task, Told
from packfmt.conversion.record import Conversion
from packfmt.conversion.work import GO_ON, Progress, bytes_of_rows, carry_out
from packfmt.errors import ContainerError, LayoutError, MachineError, MismatchError, PackfmtError, PlanError
from packfmt.exporters.output import Files
from packfmt.exporters.whole import partial_of
from packfmt.plan import Plan

SHRANK = "PF101"  # of a source; whoever puts it back can go on
NEAR = 1 / 16  # of a task's bytes, by which it may end sooner or later to end with a file
POLLED = 0.5  # seconds between looks at what others' journals say
PATIENCE = 10.0  # seconds in which the system ends a worker that was killed, and lets go of its journal
Costs = Mapping[str, Array]


@dataclass(frozen=True)
class Job:
    """A conversion.

    facts : all that `conversion` says of it, but for the plan
    opened : how the source is opened: path, container, read_as
    digest : of `conversion`
    memory : bytes that each worker may hold; 0: a quarter of its machine's
    """

    plan: Plan
    target: Path
    facts: Mapping[str, Any]
    opened: Mapping[str, Any]
    digest: str
    importance: Costs
    memory: int

    @classmethod
    def of(cls, plan: Plan, model: Checkpoint, target: Path, importance: Costs, memory: int) -> Job:
        facts = {"packfmt": version(), **seen(model, plan.container, target), "importance": _digest(importance)}
        opened = {"path": str(model.path.absolute()), "container": model.container, "read_as": dict(model.read_as)}
        job = cls(plan, target, facts, opened, "", importance, memory)
        return replace(job, digest=record.digest_of(record.text_of(job.conversion)))

    @property
    def conversion(self) -> Conversion:
        """What a conversion is, so that it can be told from another one."""
        data = self.plan.to_json()
        return {**self.facts, "plan": {key: data[key] for key in ("version", "container", "steps")}}

    def differs(self, digest: str) -> str:
        """What is different in the conversion with this digest, in words; empty if it is this one."""
        if digest == self.digest:
            return ""
        if not (known := record.read(self.target, {digest})):
            return f"begun otherwise, and {record.path_of(self.target)} does not say how"
        return record.changed(known[1], self.conversion)

    def note(self) -> None:
        """Write what is converted beside the partial output, if it is not there."""
        if not record.is_there(self.target, self.digest):
            record.write(self.target, record.text_of(self.conversion))

    def files(self, model: Checkpoint) -> Files:
        """The output's files, while they have not its name."""
        output = exporters.get(self.plan.container).lay(self.target, self.plan, model.extras)
        return Files(output, self.plan.steps, partial_of(self.target))

    def journal(self, files: Files, task: Task, resume: bool, patience: float = 0) -> Journal:
        """The journal of a task, which nobody else has now; what it and those of other tasks say fits what is there."""
        path = journals.path_of(self.target, task)
        if not journals.read(path, lines=1).begin:  # else who has it now is told first
            self.check_left(task, files)
        begin = {"conversion": self.digest, "source": self.opened, "task": str(task)}
        journal = Journal(path, begin, resume, patience)
        try:
            self.check_left(task, files)
        except BaseException:
            journal.close()
            raise
        return journal

    def check_left(self, task: Task, files: Files | None = None) -> None:
        """Refuse to mix what is written with what another conversion has left.

        Raises
        ------
        ContainerError, PlanError
            If there is something that no journal knows, that is another conversion's, or less than journals say.
        """
        partial = partial_of(self.target)
        there, found = partial.exists(), journals.begun(self.target)  # in this order: journals are made first
        anew = f"do as before, or begin anew after {journals.forgetting(partial)}"
        if not found and there:
            raise ContainerError(f"{partial}: is there, and no journal says what it is; remove it")
        for path, told in found.items():
            if what := self.differs(told.begin["conversion"]):
                raise PlanError(f"{path}: cannot go on: {what}; {anew}")
            if told.tasks != task.count:
                if told.tasks:
                    raise PlanError(f"{path}: {told.tasks} tasks were begun; say --task I/{told.tasks}")
                raise PlanError(f"{path}: begun without --task; {anew}")
        noted = (told for path, told in found.items() if path.stat().st_size > told.length)
        if files and any(noted) and (lost := _lost(files)):
            raise PlanError(
                f"{lost}: is not there as the journal says; begin anew after {journals.forgetting(partial)}"
            )

    def check_same(self, model: Checkpoint) -> None:
        """Refuse to go on with another packfmt, or another source, than the conversion was begun with.

        Raises
        ------
        MachineError
            What is different is said.
        """
        now = {"packfmt": version(), "source": source_files(model)}
        if what := record.changed({key: self.facts[key] for key in now}, now):
            raise MachineError(f"{self.target}: cannot go on: {what}")

    def do(
        self, model: Checkpoint, task: Task, files: Files, journal: Journal, memory: int, progress: Progress | None
    ) -> None:
        """Do one task: write its part of the partial output, and note it."""
        alone = removed_if_useless(files, lambda: journal.remove(self.target))
        with nullcontext() if task.count else alone:
            files.make()
            carry_out(
                self.plan, model, share(self.plan, task), memory=memory, files=files, journal=journal,
                importance=self.importance, progress=progress,
            )  # fmt: skip

    def spread(self, executor: Executor, count: int, files: Files, progress: Progress | None, resume: bool) -> None:
        """Let an executor's workers do all tasks; progress is what their journals say."""
        if not resume and (found := journals.begun(self.target)):
            raise journals.left(next(iter(found)))
        with closing(self.journal(files, Task(1, count), resume)):
            self.note()
        files.make()  # without it no worker begins: one that is late, after all was removed, leaves nothing
        with removed_if_useless(files, lambda: journals.remove(self.target)):
            try:
                for error in self._results(executor, count, progress, resume):
                    if error:
                        raise error
            except (PackfmtError, OSError):
                raise
            except Exception as error:  # of the executor's own: a worker was killed too often, the scheduler is gone
                what = f"a worker failed: {type(error).__name__}: {error}"
                raise MachineError(f"{self.target}: {what}; {GO_ON}") from error

    def _results(
        self, executor: Executor, count: int, progress: Progress | None, resume: bool
    ) -> Iterator[PackfmtError | None]:
        """What was wrong with each task, in their order; when there is one with an error, none that runs is left."""
        told = _Told(self, progress)
        told.tell()  # of what was done before, before anything is
        job = replace(self, target=self.target.absolute())  # workers are in folders of their own
        futures = [executor.submit(_do_elsewhere, job, Task(n, count), resume) for n in range(1, count + 1)]
        try:
            waiting = set(futures)
            while waiting and not any(f.exception() or f.result() for f in futures if f.done()):
                waiting = wait(waiting, POLLED, FIRST_EXCEPTION).not_done
                told.tell()
        finally:
            for one in futures:
                one.cancel()
            wait(futures)
        yield from (f.result() for f in futures if not f.cancelled())

    def done(self, count: int) -> dict[int, Done]:
        """What the journals of all tasks say, which must be that all is done.

        Raises
        ------
        PlanError
            If a task is not done, or was one of another conversion.
        """
        found, done = journals.all_of(self.target), dict[int, Done]()
        every = [Task(n, count) for n in range(1, count + 1)] or [ALONE]
        if absent := [task for task in every if journals.path_of(self.target, task) not in found]:
            some = ", ".join([str(task) for task in absent[:8]] + ["..."] * (len(absent) > 8))
            which = f"task {some} has" if len(absent) == 1 else f"{len(absent)} tasks have"
            how = f"--task {some}" if len(absent) == 1 else f"--task I/{count} for each: {some}"
            raise PlanError(f"{self.target}: {which} not begun; run it with {how}")
        for task, part in zip(every, shares(self.plan, len(every)), strict=True):
            told = found[journals.path_of(self.target, task)]
            if what := self.differs(told.begin["conversion"]):
                raise PlanError(f"{self.target}: task {task} is of another conversion: {what}; do it again")
            if missing := [at for at in part if at not in told.done or told.done[at].sums is None]:
                name = self.plan.steps[missing[0]].name
                run_it = f"run it with --task {task} --resume"
                raise PlanError(f"{self.target}: task {task} is not done: {name} is missing; {run_it}")
            done |= told.done
        return done


class _Told:
    """Tells of the progress of a job what its journals say."""

    def __init__(self, job: Job, progress: Progress | None) -> None:
        self._job, self._progress = job, progress
        self._said: dict[Path, Told] = {}
        self._slices: dict[int, int] = {}  # of steps, how many are told of

    def tell(self) -> None:
        """Tell what is new."""
        if not self._progress:
            return
        new: dict[int, int] = {}
        for path in journals.paths(self._job.target):
            said = self._said[path] = journals.read(path, self._said.get(path))
            for at, done in said.done.items():
                if rows := done.rows[self._slices.get(at, 0) :]:
                    new[at] = sum(bytes_of_rows(self._job.plan.steps[at], *one) for one in rows)
                    self._slices[at] = len(done.rows)
        for at, nbytes in new.items():  # at once, when all was read: what was done before tells nothing of the speed
            self._progress(self._job.plan.steps[at].name, nbytes)


def _do_elsewhere(job: Job, task: Task, resume: bool) -> PackfmtError | None:
    """A task in a worker's process; returns what is wrong for good, for executors may repeat what raises.

    A task that is done again, because a worker was killed, goes on where that was.
    """
    opened = job.opened
    again = resume or journals.path_of(job.target, task).exists()
    try:
        with ExitStack() as stack:
            try:
                memory = memory_for(job.plan, job.memory)
                model = stack.enter_context(checkpoint.open(opened["path"], opened["container"], opened["read_as"]))
                job.check_same(model)
                files = stack.enter_context(closing(job.files(model)))
                if not files.path.exists():
                    raise MachineError(f"{files.path}: was removed, or is not seen from here")
                journal = stack.enter_context(closing(job.journal(files, task, again, PATIENCE)))
            except (ContainerError, PlanError, OSError) as error:
                # a worker that sees less than the others says nothing of what they have done
                raise MachineError(f"task {task}: {error}") from error
            job.do(model, task, files, journal, memory, None)
    except PackfmtError as error:
        return error
    return None


def share(plan: Plan, task: Task) -> range:
    """The steps of a task."""
    return shares(plan, task.count)[task.number - 1] if task.count else range(len(plan.steps))


def shares(plan: Plan, count: int) -> list[range]:
    """The steps of each task: as many neighbours in the plan that tasks have about the same bytes to read and write.

    A task ends with a file of the output if one ends nearby: most files are then written by one machine.
    """
    costs = [s.before.nbytes(*matrix(s.shape)) + s.nbytes for s in plan.steps]
    before = np.cumsum([0, *costs])
    total, near = int(before[-1]), float(before[-1]) / count * NEAR
    file_ends = np.array([0, *(i for i, (a, b) in enumerate(pairwise(plan.steps), 1) if a.file != b.file)])

    def end(n: int) -> int:
        """Where task n ends."""
        wanted = total * n / count
        file_end = int(file_ends[np.abs(before[file_ends] - wanted).argmin()])
        return file_end if abs(before[file_end] - wanted) <= near else int(np.searchsorted(before, wanted))

    ends = [*map(end, range(count)), len(costs)]
    return [range(a, b) for a, b in pairwise(ends)]


@contextmanager
def removed_if_useless(files: Files, forget: Callable[[], None]) -> Iterator[None]:
    """Leave nothing of an output that can never be whole. `forget`: deletes the journals."""
    try:
        yield
    except (LayoutError, PlanError, MismatchError, ContainerError) as error:
        if getattr(error, "rule", "") != SHRANK:
            files.remove()
            forget()
        raise


# ---------------------------------------------------------------- what a conversion is recognised by


def version() -> str:
    """Which packfmt this is."""
    from packfmt import __version__

    return __version__


def seen(model: Checkpoint, container: str, target: Path) -> dict[str, dict[str, str]]:
    """What is converted and what is taken along, as it is seen now.

    Side files are known by their names and sizes alone, so that one that was touched, or taken away, can be put back.
    """
    one_file = target.suffix in exporters.SUFFIXES.values() or container == "gguf"
    taken = {} if one_file else {name: _size(path) for name, path in model.extras.files.items()}
    return {"source": source_files(model), "side files": taken}


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size:,} bytes"
    except OSError:  # a link to nowhere, say: `may_write` refuses it
        return "not there"


def source_files(model: Checkpoint) -> dict[str, str]:
    """What a source's files are recognised by."""
    out = {}
    for path in model.files():
        found = path.stat()
        seconds, rest = divmod(found.st_mtime_ns, 10**9)
        when = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09}"
        out[os.path.abspath(path)] = f"{found.st_size:,} bytes of {when}"
    return out


def _digest(importance: Costs) -> str:
    digest = sha256()
    for name in sorted(importance):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(importance[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest() if importance else "none"


def _lost(files: Files) -> Path | None:
    """A file of the output that is not there, or too small."""
    for name, size in files.output.files.items():
        path = files.path / name if name else files.path
        try:
            with path.open("rb") as file:  # a network's file system may know an old size until a file is opened
                if os.fstat(file.fileno()).st_size < size:
                    return path
        except OSError:
            return path
    return None
