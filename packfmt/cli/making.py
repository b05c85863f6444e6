"""Commands that make something, or say what they would make: convert, plan, decode, demo.

Heavy modules are imported inside the commands: --help answers before NumPy would have loaded.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packfmt.cli import FOUND, GOOD
from packfmt.cli.options import (
    Base,
    Encoder,
    Export,
    Fallback,
    Force,
    Json,
    Lossless,
    Maps,
    ReadAs,
    Saved,
    Shard,
    Source,
    Target,
    To,
    app,
    read_as_of,
)

if TYPE_CHECKING:
    from packfmt.checkpoint import Checkpoint
    from packfmt.codec import Array
    from packfmt.demo import Row
    from packfmt.plan import Plan, Recipe

MOST_REMARKS = 8  # printed


@app.command()
def convert(
    source: Source,
    target: Target,
    to: To = "",
    maps: Maps = None,
    fallback: Fallback = "",
    encoder: Encoder = "",
    export: Export = "",
    max_shard_size: Shard = "5GB",
    saved: Saved = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="read everything back and check it before DST gets its name")
    ] = False,
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
    json: Json = False,
) -> int:
    """Convert a model. Packs its weights and carries everything else over; DST appears only when whole."""
    from packfmt import checkpoint
    from packfmt import conversion as work
    from packfmt.cli import show

    with checkpoint.open(source, read_as=read_as_of(read_as), base=base or "") as model:
        if saved and (maps or fallback or encoder or lossless):
            raise typer.BadParameter("a saved plan says all of it; edit the plan, or plan anew", param_hint="--plan")
        recipe = _recipe(to, maps, fallback, encoder, max_shard_size, saved, lossless)
        plan = _plan(model, target, recipe, export, saved)
        if dry_run:
            return _show_plan(plan, json)
        costs = _importance(importance) if importance else {}
        with show.progress(model, quiet=json) as done:
            report = work.run(plan, model, target, check=verify, force=force, progress=done, importance=costs)
        behind = list(model.extras.files) if target.is_file() else []
    if behind:
        some = ", ".join([*behind[:3], *([f"and {len(behind) - 3} more"] if len(behind) > 3 else [])])
        print(f"not taken along, for {target.name} is one file: {some}", file=sys.stderr)
    if json:
        sizes = {"source_bytes": report.source_bytes, "bytes": report.bytes, "seconds": round(report.seconds, 3)}
        more = {"verified": verify, "remarks": report.remarks, "plan": plan.to_json()}
        show.as_json({"path": str(report.path), **sizes, **more})
    else:
        _show_summary(plan)
        for remark in report.remarks[:MOST_REMARKS]:
            print(remark)
        if len(report.remarks) > MOST_REMARKS:
            print(f"and {len(report.remarks) - MOST_REMARKS} such remarks more; --json has them all")
        checked = ", verified" if verify else ""
        size = f"{show.size(report.bytes)}, {_ratio(report.source_bytes, report.bytes)}"
        print(f"{target}: {size}, {report.seconds:.1f} s{checked}")
    return GOOD


@app.command()
def plan(
    source: Source,
    to: To = "",
    maps: Maps = None,
    fallback: Fallback = "",
    encoder: Encoder = "",
    export: Export = "safetensors",
    max_shard_size: Shard = "5GB",
    lossless: Lossless = False,
    read_as: ReadAs = None,
    base: Base = None,
    json: Json = False,
) -> int:
    """Show what a conversion would do. Every tensor, what becomes of it, bytes, and why; no weight is read."""
    from packfmt import checkpoint

    with checkpoint.open(source, read_as=read_as_of(read_as), base=base or "") as model:
        recipe = _recipe(to, maps, fallback, encoder, max_shard_size, None, lossless)
        return _show_plan(_plan(model, Path("out"), recipe, export, None), json)


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
) -> int:
    """Turn a packed model back into a dense one."""
    from packfmt import checkpoint
    from packfmt import conversion as work
    from packfmt.cli import show

    with checkpoint.open(source, read_as=read_as_of(read_as), base=base or "") as model:
        plan = work.decode_plan(model, target, dtype)
        with show.progress(model) as done:
            report = work.run(plan, model, target, force=force, progress=done)
    _show_summary(plan)
    print(f"{target}: {show.size(report.bytes)}, {report.seconds:.1f} s")
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
    """Costs by weight, from a file of tensors that bear the weights' names."""
    from packfmt import checkpoint
    from packfmt.verify import values

    with checkpoint.open(path) as costs:
        return {name: values(costs[name]) for name in costs}


def _recipe(
    to: str, maps: list[str] | None, fallback: str, encoder: str, shard: str, saved: Path | None, lossless: bool
) -> Recipe:
    from packfmt.plan import Recipe

    if bool(to) == bool(saved):
        raise typer.BadParameter("say which layout; packfmt formats lists them", param_hint="--to LAYOUT")
    rules = []
    for rule in maps or []:
        pattern, equals, layout = rule.rpartition("=")
        if not (pattern and equals and layout):
            raise typer.BadParameter(f"{rule!r} is not REGEX=LAYOUT", param_hint="--map")
        rules.append((pattern, layout))
    return Recipe(to, tuple(rules), fallback, encoder, _bytes(shard), lossless)


def _bytes(text: str) -> int:
    """5GB, 500MB, 2_000_000 -> bytes; units are powers of 1000, as Hugging Face counts."""
    found = re.fullmatch(r"([\d._]+)\s*([kMGT]?)B?", text)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB or 500MB", param_hint="--max-shard-size")
    return int(number * 1000 ** " kMGT".index(found[2] or " "))


def _plan(model: Checkpoint, target: Path, recipe: Recipe, export: str, saved: Path | None) -> Plan:
    from packfmt import conversion as work

    if saved:
        return work.saved_plan(saved, model, target, export)
    return work.plan_for(model, target, recipe, export)


def _show_plan(plan: Plan, json: bool) -> int:
    from packfmt.cli import show

    if json:
        show.as_json(plan.to_json())
        return GOOD
    show.table(
        ("tensor", "shape", "from", "to", "action", "bytes", "because"),
        [
            (s.name, show.shape(s.shape), s.before.name, s.layout.name, _action(s.action, s.exact), s.nbytes, s.reason)
            for s in plan.steps
        ],
    )
    _show_summary(plan)
    held = f"at most {show.size(plan.working_set)} held at once"
    print(f"{plan.source}: {show.size(plan.nbytes)} of tensors as {plan.container}, {held}")
    return GOOD


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
