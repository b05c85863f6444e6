"""A plan carried out: alone, as one of several tasks, or by an executor's workers; and what tasks made, merged."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Executor, wait
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from packfmt import checkpoint, codecs, exporters, verify
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, matrix
from packfmt.conversion import journal as journals
from packfmt.conversion.admission import may_write, memory_for
from packfmt.conversion.journal import ALONE, Done, Journal, Task, Told
from packfmt.conversion.steps import remark
from packfmt.conversion.work import GO_ON, Progress, bytes_of_rows, carry_out
from packfmt.errors import ContainerError, LayoutError, MachineError, MismatchError, PackfmtError, PlanError
from packfmt.exporters import beside
from packfmt.exporters.output import Files
from packfmt.exporters.whole import aside_of, give_name, partial_of, remove
from packfmt.plan import Plan, from_json

SHRANK = "PF101"  # of a source; whoever puts it back can go on
NEAR = 1 / 16  # of a task's bytes, by which it may end sooner or later to end with a file
POLLED = 0.5  # seconds between looks at what others' journals say
PATIENCE = 10.0  # seconds in which the system ends a worker that was killed, and lets go of its journal
SWAPPED = (
    "experts are (experts, outputs, inputs), as gpt-oss packs them; transformers' dense model has the last two swapped"
)
Costs = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    plan: Plan
    path: Path
    source_bytes: int
    bytes: int  # of all files written; 0 of a task, whose output is not whole
    seconds: float
    remarks: tuple[str, ...] = ()  # what encoders did that a user should know, each with its tensor


def run(
    plan: Plan,
    model: Checkpoint,
    target: Path,
    *,
    check: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    importance: Costs | None = None,
    memory: int = 0,
    resume: bool = False,
    task: Task = ALONE,
    executor: Executor | None = None,
    tasks: int = 16,
) -> Report:
    """Carry out a plan. `target` appears under its name only when whole, and checked if `check`.

    What was written of it lies beside it (`whole.partial_of`), with a journal, until then: a conversion that was
    interrupted, killed or ran out of disk goes on with `resume`. The bytes written do not depend on memory, threads,
    tasks or interruptions.

    Parameters
    ----------
    plan : of `plan_for`, `decode_plan` or `saved_plan`
    model : what it was made for, open
    target : a new folder or file
    check : read everything back and check the laws before the target gets its name
    force : replace a target that exists
    progress : is told how many bytes of which tensor have just been done, by one thread at a time, or, with `resume`,
        were done before; together the bytes of all tensors that the plan reads
    importance : for weights by name, what an error in each column costs (`Codec.encode`)
    memory : bytes that may be held beside the interpreter's own, by each worker; default: a quarter of the machine's
    resume : go on with what an earlier run of the same plan has left
    task : do only this part of the plan; when all tasks are done, on one machine or many, `merge` gives the name
    executor : let its workers do the plan's parts; they see the same files
    tasks : how many parts these are

    Raises
    ------
    PlanError
        If the target exists (without `force`) or is the source, a tensor needs more memory, or `resume` finds that
        something has changed.
    LayoutError
        If a weight cannot be encoded; nothing is left then.
    MachineError
        If the disk has too little room or may not be written.
    """
    begin = time.perf_counter()
    importance = importance or {}
    notes = list(_unweighed(plan, importance))
    job = _Job(plan, target, _told(plan, model, importance), importance, memory_for(plan, memory))
    written = 0
    if resume and (journal := _named_already(target)):
        with _machine_errors(target), closing(journal):
            if what := journals.changed(journal.begin["conversion"], job.told["conversion"]):
                raise PlanError(f"{target}: whole, but of another conversion: {what}; remove {journal.path.name}")
            notes += _tidy(job, model, journal)
        return Report(plan, target, _source_bytes(model), _written(target), time.perf_counter() - begin, tuple(notes))
    may_write(plan, model, target, force)
    with _machine_errors(target), closing(job.files(model)) as files:
        if executor:
            job.spread(executor, tasks, files, progress, resume)
            task = Task(1, tasks)
        with closing(job.journal(files, task, resume or executor is not None)) as journal:
            if not executor:
                job.do(model, task, files, journal, progress)
            if executor or task.count == 1:
                _give_name(job, model, files, journal, check)
                notes += _tidy(job, model, journal)
                written = _written(target)
    return Report(plan, target, _source_bytes(model), written, time.perf_counter() - begin, tuple(notes))


def merge(target: Path, *, check: bool = False, force: bool = False) -> Report:
    """Give the output its name when all tasks of a plan are done.

    Raises
    ------
    PlanError
        If there are no tasks, they are of different plans, some are missing, or the source has changed since.
    """
    begin = time.perf_counter()
    found = journals.all_of(target)
    if not found:
        if target.exists():
            raise PlanError(f"{target}: is whole already; there is nothing to merge")
        raise PlanError(f"{target}: no task has written here; run packfmt convert ... --task 1/N first")
    told = next(iter(found.values()))
    opened = told.begin["source"]
    with checkpoint.open(opened["path"], opened["container"], opened["read_as"]) as model, _machine_errors(target):
        if what := journals.changed(told.begin["conversion"]["source"], _files(model)):
            raise PlanError(f"{target}: the source has changed since: {what}; remove {partial_of(target).name}*")
        data = {"source": opened["path"], **told.begin["conversion"]["plan"]}
        plan = from_json(data, model.index, exporters.get(data["container"]), codecs.get)
        job = _Job(plan, target, told.begin, {}, 0)
        job.check_same(model)
        if journal := _named_already(target):
            with closing(journal):
                notes = _tidy(job, model, journal)
        else:
            may_write(plan, model, target, force)
            job.done(told.tasks)
            with closing(job.files(model)) as files, closing(job.journal(files, Task(1, told.tasks), True)) as journal:
                _give_name(job, model, files, journal, check)
                notes = _tidy(job, model, journal)
        return Report(plan, target, _source_bytes(model), _written(target), time.perf_counter() - begin, tuple(notes))


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class _Job:
    """A conversion, as a worker on another machine can be told of it."""

    plan: Plan
    target: Path
    told: Mapping[str, Any]  # the first line of its journals, but for the task
    importance: Costs
    memory: int

    def files(self, model: Checkpoint) -> Files:
        """The output's files, while they have not its name."""
        output = exporters.get(self.plan.container).lay(self.target, self.plan, model.extras)
        return Files(output, self.plan.steps, partial_of(self.target))

    def journal(self, files: Files, task: Task, resume: bool, patience: float = 0) -> Journal:
        """The journal of a task, which nobody else has now; what it and those of other tasks say fits what is there."""
        path = journals.path_of(self.target, task)
        if not journals.read(path).begin:  # else who has it now is told first
            self._check_left(files, task)
        journal = Journal(path, {**self.told, "task": str(task)}, resume, patience)
        try:
            self._check_left(files, task)
        except BaseException:
            journal.close()
            raise
        return journal

    def check_same(self, model: Checkpoint) -> None:
        """Refuse to go on with another packfmt, or another source, than the conversion was begun with.

        Raises
        ------
        MachineError
            What is different is said.
        """
        now = {"packfmt": _version(), "source": _files(model)}
        if what := journals.changed({key: self.told["conversion"][key] for key in now}, now):
            raise MachineError(f"{self.target}: cannot go on: {what}")

    def do(self, model: Checkpoint, task: Task, files: Files, journal: Journal, progress: Progress | None) -> None:
        """Do one task: write its part of the partial output, and note it."""
        alone = _removed_if_useless(files, lambda: journal.remove(self.target))
        with alone if task.count == 1 else nullcontext():
            files.make()
            carry_out(
                self.plan, model, share(self.plan, task), memory=self.memory, files=files, journal=journal,
                importance=self.importance, progress=progress,
            )  # fmt: skip

    def spread(self, executor: Executor, count: int, files: Files, progress: Progress | None, resume: bool) -> None:
        """Let an executor's workers do all tasks; progress is what their journals say."""
        if not resume and (found := journals.all_of(self.target)):
            raise journals.left(next(iter(found)))
        self.journal(files, Task(1, count), resume).close()
        files.make()  # without it no worker begins: one that is late, after all was removed, leaves nothing
        with _removed_if_useless(files, lambda: journals.remove(self.target)):
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
        job = replace(self, target=self.target.absolute())  # workers are in folders of their own
        futures = [executor.submit(_do_elsewhere, job, Task(n, count), resume) for n in range(1, count + 1)]
        said: dict[Path, Told] = {}
        told: dict[int, int] = {}
        try:
            waiting = set(futures)
            while waiting and not any(f.exception() or f.result() for f in futures if f.done()):
                waiting = wait(waiting, POLLED, FIRST_EXCEPTION).not_done
                if progress:
                    self._tell(progress, said, told)
        finally:
            for one in futures:
                one.cancel()
            wait(futures)
        yield from (f.result() for f in futures if not f.cancelled())

    def _tell(self, progress: Progress, said: dict[Path, Told], told: dict[int, int]) -> None:
        """Tell what is new in the journals. `said`: what they said before, `told`: how many slices of which steps."""
        for path in journals.paths(self.target):
            said[path] = journals.read(path, said.get(path))
            for at, done in said[path].done.items():
                for start, stop in done.rows[told.get(at, 0) :]:
                    progress(self.plan.steps[at].name, bytes_of_rows(self.plan.steps[at], start, stop))
                told[at] = len(done.rows)

    def done(self, count: int) -> dict[int, Done]:
        """What the journals of all tasks say, which must be that all is done.

        Raises
        ------
        PlanError
            If a task is not done, or was one of another conversion.
        """
        found, done = journals.all_of(self.target), dict[int, Done]()
        every = [Task(n, count) for n in range(1, count + 1)]
        if absent := [task for task in every if journals.path_of(self.target, task) not in found]:
            some = ", ".join([str(task) for task in absent[:8]] + ["..."] * (len(absent) > 8))
            which = f"task {some} has" if len(absent) == 1 else f"{len(absent)} tasks have"
            how = f"--task {some}" if len(absent) == 1 else f"--task I/{count} for each: {some}"
            raise PlanError(f"{self.target}: {which} not begun; run it with {how}")
        for task in every:
            told = found[journals.path_of(self.target, task)]
            if what := journals.changed(self.told["conversion"], told.begin["conversion"]):
                raise PlanError(f"{self.target}: task {task} is of another conversion: {what}; do it again")
            if missing := [at for at in share(self.plan, task) if at not in told.done or told.done[at].sums is None]:
                name = self.plan.steps[missing[0]].name
                run_it = f"run it with --task {task} --resume"
                raise PlanError(f"{self.target}: task {task} is not done: {name} is missing; {run_it}")
            done |= told.done
        return done

    def _check_left(self, files: Files, task: Task) -> None:
        """Refuse to mix what is written with what another conversion has left.

        Raises
        ------
        ContainerError, PlanError
            If there is something that no journal knows, that is another conversion's, or less than journals say.
        """
        partial = partial_of(self.target)
        there, found = partial.exists(), journals.all_of(self.target)  # in this order: journals are made first
        if not found and there:
            raise ContainerError(f"{partial}: is there, and no journal says what it is; remove it")
        for path, told in found.items():
            if what := journals.changed(told.begin["conversion"], self.told["conversion"]):
                raise PlanError(f"{path}: cannot go on: {what}; do as before, or remove {partial.name}*")
            if told.tasks != task.count:
                if told.tasks > 1:
                    raise PlanError(f"{path}: {told.tasks} tasks were begun; say --task I/{told.tasks}")
                raise PlanError(f"{path}: begun without --task; do as before, or remove {partial.name}*")
        if any(told.done for told in found.values()) and (missing := _missing(files)):
            raise PlanError(f"{missing}: is not there as the journal says; remove {partial.name}*")


def _do_elsewhere(job: _Job, task: Task, resume: bool) -> PackfmtError | None:
    """A task in a worker's process; returns what is wrong for good, for executors may repeat what raises.

    A task that is done again, because a worker was killed, goes on where that was.
    """
    opened = job.told["source"]
    again = resume or journals.path_of(job.target, task).exists()
    try:
        with ExitStack() as stack:
            try:
                model = stack.enter_context(checkpoint.open(opened["path"], opened["container"], opened["read_as"]))
                job.check_same(model)
                files = stack.enter_context(closing(job.files(model)))
                if not files.path.exists():
                    raise MachineError(f"{files.path}: was removed, or is not seen from here")
                journal = stack.enter_context(closing(job.journal(files, task, again, PATIENCE)))
            except (ContainerError, PlanError, OSError) as error:
                # a worker that sees less than the others says nothing of what they have done
                raise MachineError(f"task {task}: {error}") from error
            job.do(model, task, files, journal, None)
    except PackfmtError as error:
        return error
    return None


def share(plan: Plan, task: Task) -> range:
    """The steps of a task: as many neighbours in the plan that tasks have about the same bytes to read and write.

    A task ends with a file of the output if one ends nearby: most files are then written by one machine.
    """
    costs = [s.before.nbytes(*matrix(s.shape)) + s.nbytes for s in plan.steps]
    before = np.cumsum([0, *costs])
    total, near = int(before[-1]), float(before[-1]) / task.count * NEAR
    file_ends = np.array([0, *(i for i, (a, b) in enumerate(pairwise(plan.steps), 1) if a.file != b.file)])

    def end(n: int) -> int:
        """Where task n ends."""
        wanted = total * n / task.count
        file_end = int(file_ends[np.abs(before[file_ends] - wanted).argmin()])
        return file_end if abs(before[file_end] - wanted) <= near else int(np.searchsorted(before, wanted))

    return range(end(task.number - 1), end(task.number) if task.number < task.count else len(costs))


# ---------------------------------------------------------------- before and after


def _told(plan: Plan, model: Checkpoint, importance: Costs) -> dict[str, Any]:
    """What a conversion is, so that it can be told from another one, and opened elsewhere."""
    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode() + np.ascontiguousarray(importance[name]).tobytes())
    data = plan.to_json()
    conversion = {
        "packfmt": _version(),
        "source": _files(model),
        "importance": digest.hexdigest() if importance else "none",
        "plan": {key: data[key] for key in ("version", "container", "steps")},
    }
    source = {"path": str(model.path.absolute()), "container": model.container, "read_as": dict(model.read_as)}
    return {"conversion": conversion, "source": source}


def _version() -> str:
    from packfmt import __version__

    return __version__


def _files(model: Checkpoint) -> dict[str, str]:
    """What a source's files are recognised by."""
    out = {}
    for path in model.files():
        found = path.stat()
        seconds, rest = divmod(found.st_mtime_ns, 10**9)
        when = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09}"
        out[os.path.abspath(path)] = f"{found.st_size:,} bytes of {when}"
    return out


def _missing(files: Files) -> Path | None:
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


@contextmanager
def _machine_errors(target: Path) -> Iterator[None]:
    """Errors of the system, as ours: what was written stays, to go on with."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror or str(error)
        raise MachineError(f"{target}: {what}; what is done lies in {partial_of(target).name}, {GO_ON}") from error


@contextmanager
def _removed_if_useless(files: Files, forget: Callable[[], None]) -> Iterator[None]:
    """Leave nothing of an output that can never be whole. `forget`: deletes the journals."""
    try:
        yield
    except (LayoutError, PlanError, MismatchError, ContainerError) as error:
        if getattr(error, "rule", "") != SHRANK:
            files.remove()
            forget()
        raise


def _give_name(job: _Job, model: Checkpoint, files: Files, journal: Journal, check: bool) -> None:
    """Write what is known only when all is done, check it, and give the output its name.

    Raises
    ------
    PlanError
        If a task is not done, or was one of another conversion.
    """
    done = job.done(journal.tasks)
    with _removed_if_useless(files, lambda: journal.remove(job.target)):
        if what := journals.changed(job.told["conversion"]["source"], _files(model)):
            raise ContainerError(f"{job.target}: the source changed while it was read: {what}; nothing was kept")
        files.finish({job.plan.steps[at].name: one.sums or {} for at, one in done.items()})
        if check:
            verify.check_output(files.path, job.plan.container)
    journal.whole(files.path)
    give_name(job.target)


def _named_already(target: Path) -> Journal | None:
    """The open journal of a conversion that gave the name, and was killed before it had tidied up."""
    for path, told in journals.all_of(target).items():
        if told.output and target.exists() and target.stat().st_ino == told.output:
            return Journal(path, told.begin, resume=True)
    return None


def _tidy(job: _Job, model: Checkpoint, journal: Journal) -> list[str]:
    """Delete what is there beside the output, now that it has its name; what a user should know of the output."""
    done: dict[int, Done] = {}
    for told in journals.all_of(job.target).values():
        done |= told.done
    with closing(job.files(model)) as files:
        files.tidy()
    remove(aside_of(job.target))
    journal.remove(job.target)
    container = exporters.get(job.plan.container)
    counted = [(step, remark(step, done[at].counted)) for at, step in enumerate(job.plan.steps) if at in done]
    notes = [*container.remarks(job.plan.steps), *(f"{step.name}: {text}" for step, text in counted if text)]
    return [*notes, SWAPPED] if _swapped(job.plan, model) else notes


def _written(target: Path) -> int:
    found = [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in found)


def _source_bytes(model: Checkpoint) -> int:
    return sum(i.nbytes for i in model.index.values())


def _swapped(plan: Plan, model: Checkpoint) -> bool:
    """Whether experts of gpt-oss become dense: transformers has them the other way round then."""
    says = beside.quantised(model.extras.config)
    gpt_oss = isinstance(says, dict) and says.get("quant_method") == "mxfp4"
    return gpt_oss and any(s.action == "decode" and len(s.shape) == 3 for s in plan.steps)


def _unweighed(plan: Plan, importance: Mapping[str, Array]) -> Iterator[str]:
    """What becomes of importance that no encoder weighs, in words.

    Raises
    ------
    PlanError
        If it names what the plan does not, is not what a weight needs, or no step weighs any.
    """
    steps = {s.name: s for s in plan.steps}
    weighing = set()
    for name, costs in importance.items():
        if name not in steps:
            raise PlanError(f"importance: {name} is no weight of {plan.source}")
        step = steps[name]
        if costs.shape not in (step.shape, step.shape[-1:]) or not np.isfinite(costs).all() or (costs < 0).any():
            need = f"needs {step.shape[-1]} finite numbers of 0 or more"
            raise PlanError(f"importance: {name} is {list(costs.shape)}, {need}")
        if step.encoder and step.encoder in codecs.get(step.layout.name).weighted:
            weighing.add(name)
        else:
            by = f"encoder {step.encoder!r} of {step.layout.name}" if step.encoder else step.action
            yield f"{name}: importance not used, for {by} does not weigh it"
    if importance and not weighing:
        able = "the FP4 family's best, sherry's encoders and ptq161's do"
        raise PlanError(f"importance: nothing here weighs it; {able}")
