"""A plan carried out: alone, as one of several tasks, or by an executor's workers; and what tasks made, merged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packfmt import checkpoint, codecs, exporters, verify
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, matrix
from packfmt.conversion import journal as journals
from packfmt.conversion import mark, record
from packfmt.conversion.admission import may_write, memory_for
from packfmt.conversion.journal import ALONE, Done, Journal, Task
from packfmt.conversion.steps import remark
from packfmt.conversion.tasks import Costs, Job, removed_if_useless, seen, share, source_files
from packfmt.conversion.work import GO_ON, Progress, bytes_of_rows, refused
from packfmt.errors import ContainerError, MachineError, PlanError, why
from packfmt.exporters import beside
from packfmt.exporters.output import Files
from packfmt.exporters.whole import aside_of, give_name, partial_of, remove
from packfmt.plan import Plan, from_json

MOST_LINES = 8  # of refused tensors
Checking = Callable[[int], Progress]  # is told how many bytes are going to be read back; gives who is told which
SWAPPED = (
    "experts are (experts, outputs, inputs), as gpt-oss packs them; transformers' dense model has the last two swapped"
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    plan: Plan | None  # None: of an output that was whole already when `merge` came
    path: Path
    source_bytes: int
    bytes: int  # of all files written; 0 of a task, whose output is not whole
    seconds: float
    remarks: tuple[str, ...] = ()  # what encoders did that a user should know, each with its tensor
    already: bool = False  # whether this conversion had made the output before, and nothing was left to do


def run(
    plan: Plan,
    model: Checkpoint,
    target: Path,
    *,
    check: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    checking: Checking | None = None,
    survey_first: bool = False,
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
    checking : as `progress`, of what is read back, when that begins
    survey_first : try all that must lose nothing before anything is written, unless that was done when it was begun
    importance : for weights by name, what an error in each column costs (`Codec.encode`)
    memory : bytes that may be held beside the interpreter's own, by each worker; default: a quarter of the machine's
    resume : go on with what an earlier run of the same plan has left
    task : do only this part of the plan; when all tasks are done, on one machine or many, `merge` gives the name
    executor : let its workers do the plan's parts; they see the same files
    tasks : how many parts these are

    Raises
    ------
    PlanError
        If the target exists (without `force`; but with `resume` it may be what this conversion has made) or is the
        source, a tensor needs more memory, something would be lost that must not, or `resume` finds a change.
    LayoutError
        If a weight cannot be encoded; nothing is left then.
    MachineError
        If the disk has too little room or may not be written.
    """
    start = time.perf_counter()
    importance = importance or {}
    notes = list(_unweighed(plan, importance))
    held = memory_for(plan, memory) if memory or not executor else 0  # workers know what theirs is
    job = Job.of(plan, model, target, importance, memory)

    def report(**more: Any) -> Report:
        return Report(plan, target, _source_bytes(model), seconds=time.perf_counter() - start, **more)

    if resume and _whole_already(target, job.digest):
        _tell_all(plan, task, progress)
        if check:
            verify.check_output(target, plan.container, checking)
        return report(bytes=_written(target), already=True)
    if resume and (journal := _named_already(target)):
        with _machine_errors(target), closing(journal):
            if what := job.differs(journal.begin["conversion"]):
                raise PlanError(f"{target}: whole, but of another conversion: {what}; remove {journal.path}")
            _tell_all(plan, task, progress)
            notes += _tidy_late(job, model, journal)
        return report(bytes=_written(target), remarks=tuple(notes))
    may_write(plan, model, target, force)
    if survey_first and not journals.begun(target):
        job.check_left(task)
        survey(plan, model, held or memory_for(plan))
    written = 0
    with _machine_errors(target), closing(job.files(model)) as files:
        if executor:
            job.spread(executor, tasks, files, progress, resume)
            task = Task(1, tasks)
        with closing(job.journal(files, task, resume or executor is not None)) as journal:
            if not executor:
                job.note()
                job.do(model, task, files, journal, held, progress)
            if executor or not task.count:
                done = job.done(journal.tasks)
                _give_name(job, model, files, journal, done, check, checking)
                notes += _tidy(job, model, files, journal, done)
                written = _written(target)
    return report(bytes=written, remarks=tuple(notes))


def merge(target: Path, *, check: bool = False, force: bool = False, checking: Checking | None = None) -> Report:
    """Give the output its name when all tasks of a plan are done. `checking`: as `run` has it.

    Raises
    ------
    PlanError
        If there are no tasks, they are of different plans, some are missing, or the source has changed since.
    """
    start = time.perf_counter()

    def report(plan: Plan | None, source_bytes: int = 0, **more: Any) -> Report:
        return Report(plan, target, source_bytes, _written(target), time.perf_counter() - start, **more)

    found = journals.begun(target)
    if not found:
        if _whole_already(target):
            if check:
                verify.check_output(target, checkpoint.container_of(target), checking)
            return report(None, already=True)
        if target.exists():
            raise PlanError(f"{target}: is whole already; there is nothing to merge")
        raise PlanError(f"{target}: no task has written here; run packfmt convert ... --task 1/N first")
    known = record.read(target, {told.begin["conversion"] for told in found.values()})
    with ExitStack() as stack:
        named = _named_already(target)
        if named:
            stack.enter_context(closing(named))
        if named and not known:  # all is tidied up, but the journal
            named.remove(target)
            return report(None, already=True)
        if not known:
            lost = f"{record.path_of(target)}: is lost, damaged or of another conversion"
            raise PlanError(f"{lost}; run a task again with --resume, which writes it, whether it is done or not")
        digest, conversion = known
        begun = next(told for told in found.values() if told.begin["conversion"] == digest)
        opened = begun.begin["source"]
        model = stack.enter_context(checkpoint.open(opened["path"], opened["container"], opened["read_as"]))
        stack.enter_context(_machine_errors(target))
        data = {"source": opened["path"], **conversion["plan"]}
        container = exporters.get(data["container"])
        facts = {key: value for key, value in conversion.items() if key != "plan"}
        now = seen(model, container.NAME, target)
        if what := record.changed({key: facts[key] for key in now}, now):
            anew = f"put it back, or begin anew after {journals.forgetting(partial_of(target))}"
            raise PlanError(f"{target}: the source has changed since: {what}; {anew}")
        plan = from_json(data, model.index, container, codecs.get)
        job = Job(plan, target, facts, opened, digest, {}, 0)
        job.check_same(model)
        if named:
            return report(plan, _source_bytes(model), remarks=tuple(_tidy_late(job, model, named)))
        if not begun.tasks:
            raise PlanError(f"{target}: was begun without --task; packfmt convert ... --resume goes on with it")
        may_write(plan, model, target, force)
        done = job.done(begun.tasks)
        files = stack.enter_context(closing(job.files(model)))
        journal = stack.enter_context(closing(job.journal(files, Task(1, begun.tasks), True)))
        _give_name(job, model, files, journal, done, check, checking)
        return report(plan, _source_bytes(model), remarks=tuple(_tidy(job, model, files, journal, done)))


def survey(plan: Plan, model: Checkpoint, memory: int) -> None:
    """Carry out every step that must lose nothing, and throw the result away.

    Raises
    ------
    PlanError
        With a line for each tensor that would lose something.
    """
    which = [at for at, step in enumerate(plan.steps) if step.lossless or step.action == "repack"]
    lines = [str(error) for error in refused(plan, model, which, memory)]
    if lines:
        more = [f"and {len(lines) - MOST_LINES} tensors more"] if len(lines) > MOST_LINES else []
        raise PlanError("\n".join(["--lossless: refused", *lines[:MOST_LINES], *more]))


# ---------------------------------------------------------------- before and after


@contextmanager
def _machine_errors(target: Path) -> Iterator[None]:
    """Errors of the system, as ours: what was written stays, to go on with."""
    try:
        yield
    except OSError as error:
        named, partial = str(error.filename or ""), str(partial_of(target))
        where = target if named.startswith(partial) else named or target  # a side file that cannot be read, say
        raise MachineError(f"{where}: {why(error)}; what is done lies in {partial}, {GO_ON}") from error


def _give_name(
    job: Job, model: Checkpoint, files: Files, journal: Journal, done: Mapping[int, Done], check: bool,
    checking: Checking | None,
) -> None:  # fmt: skip
    """Write what is known only when all is done, check it, and give the output its name."""
    with removed_if_useless(files, lambda: journal.remove(job.target)):
        if what := record.changed(job.facts["source"], source_files(model)):
            raise ContainerError(f"{job.target}: the source changed while it was read: {what}; nothing was kept")
        files.finish({job.plan.steps[at].name: one.sums or {} for at, one in done.items()})
        if check:
            verify.check_output(files.path, job.plan.container, checking)
    journal.whole(files.path)
    give_name(job.target)


def _named_already(target: Path) -> Journal | None:
    """The open journal of a conversion that gave the name, and was killed before it had tidied up."""
    if not target.exists():
        return None
    for path, told in journals.all_of(target).items():
        if told.output and target.stat().st_ino == told.output:
            return Journal(path, told.begin, resume=True)
    return None


def _whole_already(target: Path, digest: str = "") -> bool:
    """Whether the output is whole, by the conversion with this digest, or by any, and nothing is left of others."""
    left = partial_of(target).exists() or journals.paths(target)
    return target.exists() and not left and mark.made_by(target, digest)


def _tidy_late(job: Job, model: Checkpoint, journal: Journal) -> list[str]:
    """As `_tidy`, where the output had its name before."""
    done: dict[int, Done] = {}
    for told in journals.all_of(job.target).values():
        done |= told.done
    with closing(job.files(model)) as files:
        return _tidy(job, model, files, journal, done)


def _tidy(job: Job, model: Checkpoint, files: Files, journal: Journal, done: Mapping[int, Done]) -> list[str]:
    """Delete what is there beside the output, now that it has its name; what a user should know of the output."""
    files.tidy()
    remove(aside_of(job.target))
    mark.put(job.target, job.digest)
    journal.remove(job.target)
    container = exporters.get(job.plan.container)
    counted = [(step, remark(step, done[at].counted)) for at, step in enumerate(job.plan.steps) if at in done]
    notes = [*container.remarks(job.plan.steps), *(f"{step.name}: {text}" for step, text in counted if text)]
    return [*notes, SWAPPED] if _swapped(job.plan, model) else notes


def _tell_all(plan: Plan, task: Task, progress: Progress | None) -> None:
    """Tell that all is done."""
    for at in share(plan, task):
        step = plan.steps[at]
        if progress:
            progress(step.name, bytes_of_rows(step, 0, matrix(step.shape)[0]))


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
