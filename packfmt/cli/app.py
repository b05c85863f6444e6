"""All commands. Each is parsing, one call, printing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from packfmt.cli import FOUND, GOOD

if TYPE_CHECKING:
    from packfmt.checkpoint import Checkpoint
    from packfmt.plan import Plan, Recipe

# Heavy modules are imported inside the commands: --help answers before NumPy would have loaded.

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pack model weights into low-bit layouts whose bytes are specified, proved and portable.",
)

Source = Annotated[Path, typer.Argument(help="a Hugging Face folder, a .safetensors or a .gguf", show_default=False)]
Target = Annotated[Path, typer.Argument(help="a new folder; or a .safetensors or .gguf file", show_default=False)]
To = Annotated[str, typer.Option("--to", metavar="LAYOUT", help="layout of the weights; see packfmt formats")]
Maps = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--map", metavar="REGEX=LAYOUT", help="another layout, or keep, where the name matches; later rules win"),
]
Fallback = Annotated[
    str, typer.Option("--fallback", metavar="LAYOUT", help="layout, or keep, where columns do not fill the blocks")
]
Encoder = Annotated[str, typer.Option("--encoder", metavar="NAME", help="how to choose the codes; default: the layout's first")]
Export = Annotated[str, typer.Option("--export", metavar="CONTAINER", help="safetensors or gguf, where DST's suffix does not say")]
Shard = Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="largest file of a safetensors folder: 5GB, 500MB")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]
Force = Annotated[bool, typer.Option("--force", help="replace DST if it exists")]
Saved = Annotated[Optional[Path], typer.Option("--plan", metavar="FILE", help="replay a plan saved by packfmt plan --json")]  # noqa: UP045


def _version(wanted: bool) -> None:
    if wanted:
        from packfmt import __version__

        print(f"packfmt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    pass


@app.command()
def formats(json: Json = False) -> int:
    """Every layout: bits per weight, block, which containers hold it."""
    from packfmt import codecs, exporters
    from packfmt.cli import show

    rows = []
    for name in codecs.names():
        codec = codecs.get(name)
        layout, block = codec.layout, codec.layout.block
        shape = (block["rows"], block["cols"])
        holds = [c for c in exporters.NAMES if not exporters.get(c).refusal(layout, shape)]
        rows.append(
            {
                "layout": name,
                "bits_per_weight": layout.bits_per_weight,
                "block": list(shape),
                "containers": holds,
                "encoders": list(codec.encoders),
                "purpose": layout.purpose,
                "id": layout.id,
                "sources": list(layout.sources),
            }
        )
    if json:
        show.as_json(rows)
    else:
        show.table(
            ("layout", "bits/weight", "block", "containers", "encoders", "what it is"),
            [
                (r["layout"], f"{r['bits_per_weight']:.6g}", show.shape(tuple(r["block"])), ", ".join(r["containers"]),
                 ", ".join(r["encoders"]), r["purpose"])
                for r in rows
            ],
        )  # fmt: skip
    return GOOD


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
    verify: Annotated[bool, typer.Option("--verify", help="read everything back and check it before DST gets its name")] = False,
    force: Force = False,
    json: Json = False,
) -> int:
    """Convert a model: pack its weights, carry everything else over."""
    from packfmt import checkpoint
    from packfmt import conversion as work
    from packfmt.cli import show

    with checkpoint.open(source) as model:
        plan = _plan(model, target, _recipe(to, maps, fallback, encoder, max_shard_size, saved), export, saved)
        if dry_run:
            return _show_plan(plan, json)
        with show.progress(plan, quiet=json) as done:
            report = work.run(plan, model, target, check=verify, force=force, progress=done)
        behind = list(model.extras.files) if target.is_file() else []
    if behind:
        print(f"not taken along, for {target.name} is one file: {', '.join(behind)}", file=sys.stderr)
    if json:
        sizes = {"source_bytes": report.source_bytes, "bytes": report.bytes, "seconds": round(report.seconds, 3)}
        show.as_json({"path": str(report.path), **sizes, "verified": verify, "plan": plan.to_json()})
    else:
        _show_summary(plan)
        ratio = report.source_bytes / max(1, report.bytes)
        checked = ", verified" if verify else ""
        print(f"{target}: {show.size(report.bytes)}, {ratio:.2f} times smaller, {report.seconds:.1f} s{checked}")
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
    json: Json = False,
) -> int:
    """The plan of a conversion alone: every tensor, what becomes of it, bytes, and why."""
    from packfmt import checkpoint

    with checkpoint.open(source) as model:
        recipe = _recipe(to, maps, fallback, encoder, max_shard_size, None)
        return _show_plan(_plan(model, Path("out"), recipe, export, None), json)


@app.command()
def inspect(source: Source, json: Json = False) -> int:
    """What is inside a file or folder: tensors, layouts, bits per weight."""
    from math import prod

    from packfmt import checkpoint
    from packfmt.cli import show

    with checkpoint.open(source) as model:
        infos = list(model.index.values())
        config, container, files = model.extras.config or {}, model.container, sorted(model.extras.files)
        keys = {k: v.value for k, v in model.extras.keyvalues.items()}
    rows = [
        {
            "name": i.name,
            "shape": list(i.shape),
            "dtype": i.dtype,
            "layout": i.layout.name if i.layout else None,
            "kind": i.kind,
            "bits_per_weight": 8 * i.nbytes / max(1, prod(i.shape)),
            "nbytes": i.nbytes,
            "file": i.file.name,
        }
        for i in infos
    ]
    total, weights = sum(i.nbytes for i in infos), sum(prod(i.shape) for i in infos)
    if json:
        head = {"path": str(source), "container": container, "nbytes": total, "weights": weights}
        show.as_json({**head, "tensors": rows, "config": config, "files": files, "keyvalues": keys})
        return GOOD
    show.table(
        ("tensor", "shape", "layout", "was", "bits/weight", "bytes"),
        [
            (i.name, show.shape(i.shape), i.layout.name if i.layout else f"({i.kind})", i.dtype,
             f"{8 * i.nbytes / max(1, prod(i.shape)):.5g}", i.nbytes)
            for i in infos
        ],
    )  # fmt: skip
    for key, value in keys.items():
        print(f"{key} = {_short(value)}")
    each = 8 * total / max(1, weights)
    print(f"{source}: {container}, {len(infos)} tensors, {weights:,} weights, {show.size(total)}, {each:.4g} bits a weight")
    return GOOD


@app.command()
def validate(
    paths: Annotated[list[Path], typer.Argument(help="files or folders", show_default=False)],
    level: Annotated[str, typer.Option(help="how deep: header, structure or data")] = "data",
    json: Json = False,
) -> int:
    """Check files against their own description: headers, sizes, checksums, scales that are no numbers."""
    from packfmt import verify as laws
    from packfmt.cli import show

    if level not in laws.LEVELS:
        raise typer.BadParameter(f"{level!r} is not one of {', '.join(laws.LEVELS)}", param_hint="--level")
    found = {path: laws.validate(path, level) for path in paths}  # type: ignore[arg-type]
    if json:
        show.as_json([{"path": str(p), "level": level, "findings": [f.to_json() for f in fs]} for p, fs in found.items()])
    else:
        for path, findings in found.items():
            for f in findings:
                print(f"{f.where}: {f.rule} {f.severity}: {f.message}")
            if not findings:
                print(f"{path}: good")
    return FOUND if any(f.severity == "error" for fs in found.values() for f in fs) else GOOD


@app.command()
def verify(
    source: Source,
    against: Annotated[Optional[Path], typer.Option(metavar="SRC", help="the model it was made from: gives errors")] = None,  # noqa: UP045
    json: Json = False,
) -> int:
    """Check the laws on a real file: unpack and pack give the same bytes, weights are numbers, error against SRC."""
    from contextlib import ExitStack

    from packfmt import checkpoint
    from packfmt import verify as laws
    from packfmt.cli import show

    rows = []
    with ExitStack() as stack:
        model = stack.enter_context(checkpoint.open(source))
        origin = stack.enter_context(checkpoint.open(against)) if against else None
        for name in model:
            tensor = model[name]
            row = {"name": name, "layout": tensor.layout.name, "broken": laws.laws(tensor), "relative_rms": None}
            if origin is not None and name in origin.index:
                far = laws.difference(name, origin[name], tensor)
                row["relative_rms"] = far.relative_rms
                if far.note.count("["):
                    row["broken"] = [*laws.laws(tensor), f"another shape than in {against}: {far.note}"]
            elif origin is not None:
                row["broken"] = [*laws.laws(tensor), f"not in {against}"]
            rows.append(row)
    broken = [r for r in rows if r["broken"]]
    if json:
        show.as_json({"path": str(source), "against": str(against) if against else None, "tensors": rows})
    else:
        if against:
            show.table(("tensor", "layout", "relative RMS error"), [(r["name"], r["layout"], _number(r["relative_rms"])) for r in rows])
        for r in broken:
            print(f"{source}: {r['name']}: {'; '.join(r['broken'])}")  # type: ignore[arg-type]
        print(f"{source}: {len(rows)} tensors, {len(broken)} break a law" if broken else f"{source}: {len(rows)} tensors, all laws hold")
    return FOUND if broken else GOOD


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(show_default=False)],
    b: Annotated[Path, typer.Argument(show_default=False)],
    json: Json = False,
) -> int:
    """Two models, tensor by tensor: same bytes, same values, or how far apart. Exit 1 if values differ."""
    from packfmt import checkpoint
    from packfmt import verify as laws
    from packfmt.cli import show

    with checkpoint.open(a) as left, checkpoint.open(b) as right:
        rows = list(laws.compare(left, right))
    apart = [r for r in rows if not r.same_values]
    if json:
        show.as_json({"a": str(a), "b": str(b), "tensors": [r.to_json() for r in rows]})
    else:
        if apart:
            show.table(
                ("tensor", "relative RMS", "largest", "what differs"),
                [(r.name, _number(r.relative_rms), _number(r.largest), r.note or "values") for r in apart],
            )
        same = sum(r.same_bytes for r in rows)
        print(f"{same} tensors have the same bytes, {len(rows) - same - len(apart)} the same values, {len(apart)} differ")
    return FOUND if apart else GOOD


@app.command()
def decode(
    source: Source,
    target: Target,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="f32, f16 or bf16; default: what each weight was before")] = "",
    force: Force = False,
) -> int:
    """Turn a packed model back into a dense checkpoint."""
    from packfmt import checkpoint
    from packfmt import conversion as work
    from packfmt.cli import show

    with checkpoint.open(source) as model:
        plan = work.decode_plan(model, target, dtype)
        with show.progress(plan) as done:
            report = work.run(plan, model, target, force=force, progress=done)
    _show_summary(plan)
    print(f"{target}: {show.size(report.bytes)}, {report.seconds:.1f} s")
    return GOOD


@app.command()
def demo(
    out: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="keep the converted models here")] = None,  # noqa: UP045
    json: Json = False,
) -> int:
    """The main job on a real small model, offline: convert it to every layout, check, compare, and tell."""
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
        for row, findings in report.rows(out or Path(scratch)):
            done.append((row, findings))
            print(f"{row.layout}: converted, validated, verified in {row.seconds:.1f} s", file=sys.stderr)
    if json:
        show.as_json([asdict(row) for row, _ in done])
    else:
        show.table(
            ("layout", "bits/weight", "size", "ratio", "rel. RMS error", "cosine mean", "cosine min", "seconds", "note"),
            [
                (r.layout, f"{r.bits_per_weight:.5g}", show.size(r.nbytes), f"{r.ratio:.2f}", f"{r.error:.3g}",
                 f"{r.cosine_mean:.6f}", f"{r.cosine_min:.6f}", f"{r.seconds:.2f}", r.note)
                for r, _ in done
            ],
        )  # fmt: skip
        print("against the float32 model: error of the weights that got the layout, cosines of 36 sentences' embeddings")
        if out:
            print(f"the models are in {out}")
    for _, findings in done:
        for f in findings:
            print(f"{f.where}: {f.rule} {f.severity}: {f.message}", file=sys.stderr)
    return FOUND if any(findings for _, findings in done) else GOOD


# ---------------------------------------------------------------- shared by the commands


def _recipe(to: str, maps: list[str] | None, fallback: str, encoder: str, shard: str, saved: Path | None) -> Recipe:
    from packfmt.plan import Recipe

    if bool(to) == bool(saved):
        raise typer.BadParameter("say which layout; packfmt formats lists them", param_hint="--to LAYOUT")
    rules = []
    for rule in maps or []:
        pattern, equals, layout = rule.rpartition("=")
        if not (pattern and equals and layout):
            raise typer.BadParameter(f"{rule!r} is not REGEX=LAYOUT", param_hint="--map")
        rules.append((pattern, layout))
    return Recipe(to, tuple(rules), fallback, encoder, _bytes(shard))


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
        [(s.name, show.shape(s.shape), s.before.name, s.layout.name, _action(s.action, s.exact), s.nbytes, s.reason) for s in plan.steps],
    )
    _show_summary(plan)
    print(f"{plan.source}: {show.size(plan.nbytes)} of tensors as {plan.container}, at most {show.size(plan.working_set)} held at once")
    return GOOD


def _show_summary(plan: Plan) -> None:
    from math import prod

    from packfmt.cli import show

    groups = dict.fromkeys((s.layout.name, s.action, s.exact) for s in plan.steps)
    rows = []
    for layout, action, exact in groups:
        mine = [s for s in plan.steps if (s.layout.name, s.action, s.exact) == (layout, action, exact)]
        nbytes, weights = sum(s.nbytes for s in mine), sum(prod(s.shape) for s in mine)
        rows.append((_action(action, exact), layout, len(mine), weights, f"{8 * nbytes / max(1, weights):.5g}", show.size(nbytes)))
    show.table(("action", "layout", "tensors", "weights", "bits/weight", "size"), rows)


def _action(action: str, exact: bool) -> str:
    return f"{action} ({'exact' if exact else 'lossy'})"


def _number(value: object) -> str:
    return "" if value is None else f"{value:.3g}"


def _short(value: object) -> str:
    text = f"[{len(value)} items]" if isinstance(value, list) and len(value) > 8 else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
