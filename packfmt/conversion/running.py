"""A plan carried out: alone, as one of several tasks, or by an executor's workers; and what tasks made, merged."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Executor, wait
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packfmt import checkpoint, codecs, exporters, verify
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, matrix
from packfmt.conversion import journal as journals
from packfmt.conversion.admission import may_write, memory_for
from packfmt.conversion.journal import ALONE, Done, Journal, Task
from packfmt.conversion.steps import remark
from packfmt.conversion.work import Progress, carry_out
from packfmt.errors import ContainerError, LayoutError, MachineError, MismatchError, PackfmtError, PlanError
from packfmt.exporters import beside
from packfmt.exporters.output import Files
from packfmt.exporters.whole import give_name, partial_of
from packfmt.plan import Plan, from_json

SHRANK = "PF101"  # of a source; whoever puts it back can go on
GO_ON = "--resume goes on"
POLLED = 0.5  # seconds between looks at what others' journals say
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
    importance : for weights by name, what an error in each column costs (`Codec.encode`)
    progress : is told how many bytes of which tensor have just been done, by one thread at a time
    memory : bytes that may be held beside the interpreter's own; default: a quarter of the machine's
    resume : go on with what an earlier run of the same plan has left
    task : do only this part of the plan; when all tasks are done, on one machine or many, `merge` gives the name
    executor : let its workers do the plan's parts, `tasks` in number; they see the same files

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
    memory = memory_for(plan, memory)
    job = _Job(plan, target, _told(plan, model, importance), importance, memory)
    if resume and (count := _named_already(job)):
        notes += _remarks(plan, model, _done(plan, target, count))
        journals.remove(target)
        return Report(plan, target, _source_bytes(model), _written(target), time.perf_counter() - begin, tuple(notes))
    may_write(plan, model, target, force)
    with _machine_errors(target):
        _check_left(target, task, resume)
        if executor is None:
            job.do(model, task, progress, resume)
        else:
            job.spread(executor, tasks, progress, resume)
            task = Task(1, tasks)
        if executor is None and task.count > 1:
            return Report(plan, target, _source_bytes(model), 0, time.perf_counter() - begin, tuple(notes))
        notes += _finish(plan, model, target, task.count, check)
    return Report(plan, target, _source_bytes(model), _written(target), time.perf_counter() - begin, tuple(notes))


def merge(target: Path, *, check: bool = False, force: bool = False) -> Report:
    """Give the output its name when all tasks of a plan are done.

    Raises
    ------
    PlanError
        If there are no tasks, they are of different plans, or some are missing.
    """
    begin = time.perf_counter()
    found = journals.all_of(target)
    if not found:
        raise PlanError(f"{target}: no task has written here; run packfmt convert ... --task 1/N first")
    told, _, _ = journals.read(found[0])
    opened, count = told["source"], int(told["task"].partition("/")[2])
    with checkpoint.open(opened["path"], opened["container"], opened["read_as"]) as model:
        data = told["conversion"]["plan"]
        plan = from_json(data, model.index, exporters.get(data["container"]), codecs.get)
        may_write(plan, model, target, force)
        with _machine_errors(target):
            notes = _finish(plan, model, target, count, check)
        return Report(plan, target, _source_bytes(model), _written(target), time.perf_counter() - begin, tuple(notes))


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class _Job:
    """A conversion, as a worker on another machine can be told of it."""

    plan: Plan
    target: Path
    told: Mapping[str, Any]  # the first line of its journals
    importance: Costs
    memory: int

    def do(self, model: Checkpoint, task: Task, progress: Progress | None, resume: bool) -> None:
        """Do one task: write its part of the partial output, and note it."""
        begin = {**self.told, "task": str(task)}
        path = journals.path_of(self.target, task)
        output = exporters.get(self.plan.container).lay(self.target, self.plan, model.extras)
        files = Files(output, self.plan.steps, partial_of(self.target))
        journal = Journal.resume(path, begin) if resume else Journal.start(path, begin)
        useless = _removed_if_useless(files, self.target) if task.count == 1 else nullcontext()
        with useless, closing(files), closing(journal):
            files.make()
            carry_out(
                self.plan, model, share(self.plan, task), memory=self.memory, files=files, journal=journal,
                importance=self.importance, progress=progress,
            )  # fmt: skip

    def spread(self, executor: Executor, count: int, progress: Progress | None, resume: bool) -> None:
        """Let an executor's workers do all tasks; progress is what their journals say."""
        waiting = {executor.submit(_do_elsewhere, self, Task(n, count), resume) for n in range(1, count + 1)}
        told: dict[int, int] = {}
        try:
            while waiting:
                done, waiting = wait(waiting, POLLED, FIRST_EXCEPTION)
                for one in done:
                    one.result()
                if progress:
                    self._tell(progress, told)
        except PackfmtError:
            raise
        except Exception as error:  # of the executor's own: a worker was killed too often, the scheduler is gone
            raise MachineError(f"{self.target}: a worker failed: {type(error).__name__}: {error}; {GO_ON}") from error
        finally:
            for one in waiting:
                one.cancel()

    def _tell(self, progress: Progress, told: dict[int, int]) -> None:
        for path in journals.all_of(self.target):
            for at, done in journals.read(path)[1].items():
                step = self.plan.steps[at]
                rows = sum(stop - start for start, stop in done.rows)
                if rows > told.get(at, 0):
                    nbytes = step.before.nbytes(*matrix(step.shape)) * rows // max(1, matrix(step.shape)[0])
                    before = told.get(at, 0) * nbytes // rows
                    told[at] = rows
                    progress(step.name, nbytes - before)


def _do_elsewhere(job: _Job, task: Task, resume: bool) -> None:
    """A task in a worker's process. One that is done again, because a worker was killed, goes on where that was."""
    opened = job.told["source"]
    again = resume or journals.path_of(job.target, task).exists()
    with checkpoint.open(opened["path"], opened["container"], opened["read_as"]) as model:
        job.do(model, task, None, again)


def share(plan: Plan, task: Task) -> range:
    """The steps of a task: as many neighbours in the plan that tasks have about the same bytes to read and write.

    A task ends with a file of the output if one ends nearby: most files are then written by one machine.
    """
    costs = [s.before.nbytes(*matrix(s.shape)) + s.nbytes for s in plan.steps]
    total, near = max(1, sum(costs)), sum(costs) / task.count / 4
    ends = [0]
    so_far = list(np.cumsum([0, *costs]))
    for n in range(1, task.count):
        wanted = total * n / task.count
        at = int(np.searchsorted(so_far, wanted))
        file_ends = [i for i in range(1, len(costs)) if plan.steps[i].file != plan.steps[i - 1].file]
        close = [i for i in file_ends if abs(so_far[i] - wanted) <= near]
        at = min(close, key=lambda i: abs(so_far[i] - wanted)) if close else at
        ends.append(min(max(at, ends[-1]), len(costs)))
    ends.append(len(costs))
    return range(ends[task.number - 1], ends[task.number])


# ---------------------------------------------------------------- before and after


def _told(plan: Plan, model: Checkpoint, importance: Costs) -> dict[str, Any]:
    """What a conversion is, so that it can be told from another one, and opened elsewhere."""
    from packfmt import __version__

    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode() + np.ascontiguousarray(importance[name]).tobytes())
    files = {}
    for path in model.files():
        found = path.stat()
        files[str(path)] = {"bytes": found.st_size, "changed": found.st_mtime_ns}
    conversion = {
        "packfmt": __version__,
        "source": files,
        "plan": plan.to_json(),
        "importance": digest.hexdigest() if importance else "",
    }
    source = {"path": str(model.path.absolute()), "container": model.container, "read_as": dict(model.read_as)}
    return {"conversion": conversion, "source": source}


def _check_left(target: Path, task: Task, resume: bool) -> None:
    """Refuse to write over what an earlier run has left.

    Raises
    ------
    ContainerError
        If there is something, and it is not asked to go on with it.
    """
    if resume:
        return
    partial, mine = partial_of(target), journals.path_of(target, task)
    if mine.exists() or (task.count == 1 and partial.exists()):
        raise ContainerError(
            f"{partial}: another conversion writes here, or one was stopped; {GO_ON}, or remove {partial.name}*"
        )


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
def _removed_if_useless(files: Files, target: Path) -> Iterator[None]:
    """Leave nothing of an output that can never be whole."""
    try:
        yield
    except (LayoutError, PlanError, MismatchError, ContainerError) as error:
        if getattr(error, "rule", "") != SHRANK:
            files.remove()
            journals.remove(target)
        raise


def _named_already(job: _Job) -> int:
    """How many tasks wrote the whole output that is there, of this same conversion, if nothing but journals is left."""
    found = journals.all_of(job.target)
    if not found or partial_of(job.target).exists() or not job.target.exists():
        return 0
    told = journals.read(found[0])[0]
    if not told or told["conversion"] != journals.plain(job.told["conversion"]):
        return 0
    return int(told["task"].partition("/")[2])


def _finish(plan: Plan, model: Checkpoint, target: Path, count: int, check: bool) -> list[str]:
    """Write what is known only when all is done, check it, and give the output its name; what a user should know.

    Raises
    ------
    PlanError
        If a task is not done, or was one of another conversion.
    """
    done = _done(plan, target, count)
    container = exporters.get(plan.container)
    files = Files(container.lay(target, plan, model.extras), plan.steps, partial_of(target))
    with _removed_if_useless(files, target), closing(files):
        files.finish({plan.steps[at].name: one.sums or {} for at, one in done.items()})
        if check:
            verify.check_output(partial_of(target), container.NAME)
    give_name(target)
    files.tidy()
    journals.remove(target)
    return _remarks(plan, model, done)


def _done(plan: Plan, target: Path, count: int) -> dict[int, Done]:
    """What the journals of all tasks say, which must be that all is done."""
    done: dict[int, Done] = {}
    first: dict[str, Any] = {}
    for task in (Task(n, count) for n in range(1, count + 1)):
        path = journals.path_of(target, task)
        if not path.exists():
            raise PlanError(f"{target}: task {task} has not begun; run it with --task {task}")
        told, mine, _ = journals.read(path)
        first = first or told
        if told["conversion"] != first["conversion"]:
            raise PlanError(f"{path}: is of another conversion than task 1's; do this task again")
        if missing := [at for at in share(plan, task) if at not in mine or mine[at].sums is None]:
            raise PlanError(
                f"{target}: task {task} is not done: {plan.steps[missing[0]].name} is missing; "
                f"run it with --task {task} --resume"
            )
        done |= mine
    return done


def _remarks(plan: Plan, model: Checkpoint, done: Mapping[int, Done]) -> list[str]:
    """What a user should know of an output."""
    container = exporters.get(plan.container)
    counted = [(step, remark(step, done[at].counted)) for at, step in enumerate(plan.steps)]
    notes = [*container.remarks(plan.steps), *(f"{step.name}: {text}" for step, text in counted if text)]
    return [*notes, SWAPPED] if _swapped(plan, model) else notes


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
