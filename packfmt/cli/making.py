"""Commands that make something, or say what they would make: convert, plan, decode, demo.

Heavy modules are imported inside the commands: --help answers before NumPy would have loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from packfmt.cli import FOUND, GOOD, cluster
from packfmt.cli.options import (
    Base,
    Encoder,
    Export,
    Fallback,
    Force,
    Json,
    JsonProgress,
    Lossless,
    Maps,
    Memory,
    ReadAs,
    Resume,
    Saved,
    Shard,
    Source,
    Target,
    To,
    Verify,
    app,
    read_as_of,
    size_of,
)

if TYPE_CHECKING:
    from packfmt.checkpoint import Checkpoint
    from packfmt.codec import Array
    from packfmt.conversion import Report, Task
    from packfmt.demo import Row
    from packfmt.plan import Plan, Recipe

MOST_REMARKS = 8  # printed
TASKS = 16  # that a scheduler is given


@app.command()
def convert(
    source: Source,
    target: Target,
    to: To = "",
    maps: Maps = None,
    fallback: Fallback = "",
    encoder: Encoder = "",
    export: Export = "",
    max_shard_size: Shard = None,
    saved: Saved = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    verify: Verify = False,
    force: Force = False,
    lossless: Lossless = False,
    importance: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="a safetensors file: for weights by name, what an error in each column costs"
        ),
    ] = None,
    read_as: ReadAs = None,
    base: Base = None,
    memory: Memory = None,
    resume: Resume = False,
    task: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="do only the I-th of N parts; when all are done, packfmt merge DST"),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="let the workers of a Dask cluster do the parts")
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="into how many parts --scheduler cuts it; default: 16", show_default=False
        ),
    ] = None,
    json: Json = False,
    json_progress: JsonProgress = False,
) -> int:
    """Convert a model. Packs its weights and carries everything else over; DST appears only when whole."""
    from packfmt import checkpoint
    from packfmt import conversion as work
    from packfmt.cli import show

    part = _part(task)
    _check_ways({"--task": task, "--scheduler": scheduler, "--resume": resume}, dry_run, verify, tasks)
    room = size_of(memory, "--memory")
    with checkpoint.open(source, read_as=read_as_of(read_as), base=base or "") as model:
        if saved and (maps or fallback or encoder or lossless or max_shard_size):
            raise typer.BadParameter("a saved plan says all of it; edit the plan, or plan anew", param_hint="--plan")
        most = _shard(max_shard_size, target, export)
        recipe = _recipe(to, maps, fallback, encoder, most, saved, lossless)
        plan = _plan(model, target, recipe, export, saved, room, survey_now=dry_run)
        if dry_run:
            return _show_plan(plan, model, room, target, json)
        costs = _importance(importance) if importance else {}
        watch = show.progress(_bytes_to_read(plan, part), json, json_progress)
        workers = nullcontext() if scheduler is None else cluster.executor(scheduler)
        with _stoppable(target, scheduler is not None), workers as executor, watch as done:
            report = work.run(
                plan, model, target, check=verify, force=force, progress=done, checking=done.checking,
                survey_first=lossless, importance=costs, memory=room, resume=resume, task=part, executor=executor,
                tasks=tasks or TASKS,
            )  # fmt: skip
        behind = list(model.extras.files) if target.is_file() else []
    if behind:
        some = ", ".join([*behind[:3], *([f"and {len(behind) - 3} more"] if len(behind) > 3 else [])])
        print(f"not taken along, for {target.name} is one file: {some}", file=sys.stderr)
    _tell(report, verify, json, part)
    return GOOD


@app.command()
def merge(
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="where packfmt convert --task was told to write", show_default=False)
    ],
    verify: Verify = False,
    force: Force = False,
    json: Json = False,
    json_progress: JsonProgress = False,
) -> int:
    """Finish what tasks have made. When all parts of a conversion are done, DST appears, whole."""
    from packfmt import conversion as work
    from packfmt.cli import show

    with show.progress(0, json or not verify, json_progress) as done:
        report = work.merge(target, check=verify, force=force, checking=done.checking)
    _tell(report, verify, json)
    return GOOD


@app.command()
def plan(
    source: Source,
    to: To = "",
    maps: Maps = None,
    fallback: Fallback = "",
    encoder: Encoder = "",
    export: Export = "safetensors",
    max_shard_size: Shard = None,
    lossless: Lossless = False,
    read_as: ReadAs = None,
    base: Base = None,
    memory: Memory = None,
    json: Json = False,
) -> int:
    """Show what a conversion would do. Every tensor, what becomes of it, bytes, and why; no weight is read."""
    from packfmt import checkpoint

    room = size_of(memory, "--memory")
    with checkpoint.open(source, read_as=read_as_of(read_as), base=base or "") as model:
        most = _shard(max_shard_size, Path("out"), export)
        recipe = _recipe(to, maps, fallback, encoder, most, None, lossless)
        plan = _plan(model, Path("out"), recipe, export, None, room)
        return _show_plan(plan, model, room, None, json)


@app.command()
def decode(
    source: Source,
    target: Target,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="f64, f32, f16 or bf16; default: what each weight was before")
    ] = "",
    force: Force = False,
    read_as: ReadAs = None,
    base: Base = None,
    memory: Memory = None,
    resume: Resume = False,
    json_progress: JsonProgress = False,
) -> int:
    """Turn a packed model back into a dense one."""
    from packfmt import checkpoint
    from packfmt import conversion as work
    from packfmt.cli import show

    room = size_of(memory, "--memory")
    with checkpoint.open(source, read_as=read_as_of(read_as), base=base or "") as model:
        plan = work.decode_plan(model, target, dtype)
        watch = show.progress(_bytes_to_read(plan), as_lines_of_json=json_progress)
        with _stoppable(target), watch as done:
            report = work.run(plan, model, target, force=force, progress=done, memory=room, resume=resume)
    _show_summary(plan)
    already = "whole already, " if report.already else ""
    print(f"{target}: {already}{show.size(report.bytes)}, {report.seconds:.1f} s")
    return GOOD


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="keep the converted models here")] = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="LAYOUT", help="these layouts; default: of every kind one")
    ] = None,
    json: Json = False,
) -> int:
    """Run the main job on a real small model. Offline: convert it to many layouts, check each, and compare."""
    import tempfile
    from dataclasses import asdict

    from packfmt.cli import show
    from packfmt.demo import report
    from packfmt.errors import PlanError

    if out is not None:
        if out.exists():
            raise PlanError(f"{out}: exists; choose another folder")
        out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="packfmt-demo-") as scratch:
        done = []
        for row, findings in report.rows(out or Path(scratch), to or report.LAYOUTS):
            done.append((row, findings))
            print(f"{row.layout}: converted, validated, verified in {row.seconds:.1f} s", file=sys.stderr)
    if json:
        show.as_json([asdict(row) for row, _ in done])
    else:
        heads = ("layout", "bits/weight", "size", "ratio", "rel. RMS error", "cosine", "least", "seconds", "note")
        show.table(heads, [_demo_line(row) for row, _ in done])
        print("error of the weights that got the layout; cosine of 36 sentences' embeddings, mean and least;")
        print("both against the float32 model")
        if out:
            print(f"the models are in {out}")
    for _, findings in done:
        for f in findings:
            print(f"{f.where}: {f.rule} {f.severity}: {f.message}", file=sys.stderr)
    return FOUND if any(findings for _, findings in done) else GOOD


def _demo_line(row: Row) -> tuple[str, ...]:
    from packfmt.cli import show

    bits, cosines = f"{row.bits_per_weight:.5g}", (f"{row.cosine_mean:.6f}", f"{row.cosine_min:.6f}")
    size = (show.size(row.nbytes), f"{row.ratio:.2f}")
    return (row.layout, bits, *size, f"{row.error:.3g}", *cosines, f"{row.seconds:.2f}", row.note)


def _importance(path: Path) -> dict[str, Array]:
    """Costs by weight, from a file of tensors that bear the weights' names; dense ones are not read, but mapped."""
    from packfmt import checkpoint
    from packfmt.codec import dense_dtype, dense_values

    found = {}
    with checkpoint.open(path) as costs:
        for name in costs:
            costs.check(name)
            tensor = costs.map(name)
            found[name] = dense_values(tensor) if dense_dtype(tensor.layout) else tensor.decode()
    return found


def _recipe(
    to: str, maps: list[str] | None, fallback: str, encoder: str, max_shard: int, saved: Path | None, lossless: bool
) -> Recipe:
    from packfmt.plan import Recipe

    if to and saved:
        raise typer.BadParameter("a saved plan says all of it; leave one of both out", param_hint="--to")
    if not to and not saved:
        raise typer.BadParameter("say which layout; packfmt formats lists them", param_hint="--to LAYOUT")
    rules = []
    for rule in maps or []:
        pattern, equals, layout = rule.rpartition("=")
        if not (pattern and equals and layout):
            raise typer.BadParameter(f"{rule!r} is not REGEX=LAYOUT", param_hint="--map")
        rules.append((pattern, layout))
    return Recipe(to, tuple(rules), fallback, encoder, max_shard, lossless)


def _shard(text: str | None, target: Path, export: str) -> int:
    """Bytes of tensors a file of a folder, which one file has no use for."""
    from packfmt.exporters import SUFFIXES
    from packfmt.plan import MAX_SHARD

    by_name = target.suffix.lower() in SUFFIXES.values()
    if text is not None and (by_name or export.lower() == "gguf"):
        what = f"{target.name if by_name else 'a GGUF'} is one file; leave it out, or let DST be a folder"
        raise typer.BadParameter(what, param_hint="--max-shard-size")
    return size_of(text, "--max-shard-size") or MAX_SHARD


def _plan(
    model: Checkpoint, target: Path, recipe: Recipe, export: str, saved: Path | None, memory: int,
    survey_now: bool = True,
) -> Plan:  # fmt: skip
    from packfmt import conversion as work
    from packfmt.errors import PlanError

    if saved and not saved.is_file():
        what = "no file" if saved.exists() else "no such file"
        raise PlanError(f"{saved}: {what}; packfmt plan SRC --to LAYOUT --json > FILE makes one")
    if saved:
        return work.saved_plan(saved, model, target, export)
    return work.plan_for(model, target, recipe, export, memory, survey_now)


def _part(text: str | None) -> Task:
    """2/4 -> the second of four parts of a conversion; None -> all of it."""
    from packfmt.conversion import Task

    if text is None:
        return Task()
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    number, count = (int(n) for n in found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise typer.BadParameter(f"{text!r} is not I/N with I from 1 to N, such as 2/4", param_hint="--task")
    return Task(number, count)


def _check_ways(ways: Mapping[str, object], dry_run: bool, verify: bool, tasks: int | None) -> None:
    """Refuse options that do not go together. `ways`: those that say how the work is done, by name."""
    given = [name for name, value in ways.items() if value not in (None, False)]
    if dry_run and given:
        raise typer.BadParameter("nothing is done in a dry run; leave one of both out", param_hint=given[0])
    if {"--task", "--scheduler"} <= {*given}:
        raise typer.BadParameter("a scheduler's workers do all tasks; leave one of both out", param_hint="--task")
    if "--task" in given and verify:
        raise typer.BadParameter("a part cannot be verified; say packfmt merge --verify", param_hint="--verify")
    if tasks and "--scheduler" not in given:
        raise typer.BadParameter("needs --scheduler ADDRESS; else say --task I/N", param_hint="--tasks")


@contextmanager
def _stoppable(target: Path, elsewhere: bool = False) -> Iterator[None]:
    """An interrupted conversion says how it goes on, if anything of it is left."""
    from packfmt.conversion import journal
    from packfmt.exporters.whole import partial_of

    try:
        yield
    except KeyboardInterrupt:
        partial = partial_of(target)
        when = ", when workers have ended the parts they have begun" if elsewhere else ""
        left = f"interrupted; what is done lies in {partial}, --resume goes on{when}"
        raise typer.Abort(left if partial.exists() or journal.paths(target) else "") from None


def _bytes_to_read(plan: Plan, part: Task | None = None) -> int:
    from packfmt.codec import matrix
    from packfmt.conversion import Task
    from packfmt.conversion.tasks import share

    steps = [plan.steps[at] for at in share(plan, part or Task())]
    return sum(s.before.nbytes(*matrix(s.shape)) for s in steps)


def _show_plan(plan: Plan, model: Checkpoint, memory: int, target: Path | None, json: bool) -> int:
    from packfmt.cli import show

    needs = _needs(plan, model, memory, target)
    if json:
        show.as_json({**plan.to_json(), "needs": needs._asdict()})
        return GOOD
    show.table(
        ("tensor", "shape", "from", "to", "action", "bytes", "because"),
        [
            (s.name, show.shape(s.shape), s.before.name, s.layout.name, _action(s.action, s.exact), s.nbytes, s.reason)
            for s in plan.steps
        ],
    )
    _show_summary(plan)
    few = " (too few)" if needs.free is not None and needs.free < needs.disk else ""
    room = "" if needs.free is None else f", {show.size(needs.free)} are free{few}"
    print(f"{plan.source}: {show.size(needs.disk)} to be written as {plan.container}{room}")
    how = "--memory says" if memory else "by default"
    print(f"memory: {show.size(needs.least_memory)} at least, {how} {show.size(needs.memory)}")
    return GOOD


class _Needs(NamedTuple):
    """Bytes that a conversion needs."""

    disk: int  # to be written, without streams
    free: int | None  # where it is to be written; None: nobody said where
    least_memory: int  # without which it cannot be done
    memory: int  # that it will hold at most


def _needs(plan: Plan, model: Checkpoint, memory: int, target: Path | None) -> _Needs:
    """What a conversion needs.

    Raises
    ------
    PlanError
        If the memory that was asked for, or that this machine has, is too little.
    """
    import shutil

    from packfmt import exporters
    from packfmt.conversion import admission, steps

    output = exporters.get(plan.container).lay(target or Path("out"), plan, model.extras)
    carried = 0 if output.one_file else admission.side_files(model)
    place = target.absolute().parent if target else None
    free = shutil.disk_usage(place).free if place and place.is_dir() else None
    least = max((steps.least_held(step) for step in plan.steps), default=0)
    return _Needs(sum(output.files.values()) + carried, free, least, admission.memory_for(plan, memory))


def _show_summary(plan: Plan) -> None:
    from math import prod

    from packfmt.cli import show

    groups = dict.fromkeys((s.layout.name, s.action, s.exact) for s in plan.steps)
    rows = []
    for layout, action, exact in groups:
        mine = [s for s in plan.steps if (s.layout.name, s.action, s.exact) == (layout, action, exact)]
        nbytes, weights = sum(s.nbytes for s in mine), sum(prod(s.shape) for s in mine)
        rows.append(
            (
                _action(action, exact),
                layout,
                len(mine),
                weights,
                f"{8 * nbytes / max(1, weights):.5g}",
                show.size(nbytes),
            )
        )
    show.table(("action", "layout", "tensors", "weights", "bits/weight", "size"), rows)


def _tell(report: Report, verify: bool, json: bool, part: Task | None = None) -> None:
    """Print what a conversion, or a part of it, has done."""
    from packfmt.cli import show

    task = str(part) if part and part.count else ""
    if json:
        sizes = {"source_bytes": report.source_bytes, "bytes": report.bytes, "seconds": round(report.seconds, 3)}
        plan = report.plan and report.plan.to_json()
        more = {"already": report.already, "verified": verify, "remarks": report.remarks, "plan": plan}
        show.as_json({"path": str(report.path), **({"task": task} if task else {}), **sizes, **more})
        return
    checked = ", verified" if verify else ""
    if report.already:
        print(f"{report.path}: whole already, {show.size(report.bytes)}{checked}")
        return
    if report.plan and not task:
        _show_summary(report.plan)
    for remark in report.remarks[:MOST_REMARKS]:
        print(remark)
    if len(report.remarks) > MOST_REMARKS:
        print(f"and {len(report.remarks) - MOST_REMARKS} such remarks more; --json has them all")
    if task:
        print(f"task {task} is done, {report.seconds:.1f} s; when all are: packfmt merge {report.path}")
        return
    size = f"{show.size(report.bytes)}, {_ratio(report.source_bytes, report.bytes)}"
    print(f"{report.path}: {size}, {report.seconds:.1f} s{checked}")


def _ratio(before: int, after: int) -> str:
    if not before or not after:
        return "of no weights"
    ratio = before / after
    if 0.99 < ratio < 1.01:
        return "the same size"
    return f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times larger"


def _action(action: str, exact: bool) -> str:
    # a scale that has an exact reciprocal is only known when it is read
    return f"{action} ({'exact' if exact else 'last bits' if action == 'rescale' else 'lossy'})"
