"""Commands that only read: formats, inspect, validate, verify, diff.

Heavy modules are imported inside the commands: --help answers before NumPy would have loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from packfmt.cli import FAILED, FOUND, GOOD
from packfmt.cli.options import Base, Json, ReadAs, Source, app, path_of, read_as_of


def _containers(names: list[str]) -> str:
    from packfmt import exporters

    return "any" if tuple(names) == exporters.NAMES else ", ".join(names).replace("_", "-")


@app.command()
def formats(json: Json = False) -> int:
    """List every layout. Bits per weight, block, which containers hold it."""
    from packfmt import codecs
    from packfmt.cli import show

    rows = [_described(name) for name in codecs.names()]
    if json:
        show.as_json(rows)
        return GOOD
    heads = ("bits/weight", "block", "containers", "encoders", "what it is")
    show.table(("layout", *heads), [(r["layout"], *_columns(r)) for r in rows])
    print("\nand these, made as their names say:\n")
    made = [
        ("" if i else codecs.PATTERNS[module][1], name, *_columns(_described(name)))
        for module, some in codecs.EXAMPLES.items()
        for i, name in enumerate(some)
    ]
    show.table(("name", "such as", *heads), made)
    return GOOD


def _described(name: str) -> dict[str, Any]:
    """What the list says of a layout."""
    from packfmt import codecs, exporters

    codec = codecs.get(name)
    layout, block = codec.layout, codec.layout.block
    shape = (block["rows"], block["cols"])
    # some containers want more rows than a block has, or a stack of experts
    several = (32 * block["rows"], block["cols"])
    holds = [
        c
        for c in exporters.NAMES
        if not all(exporters.get(c).refusal(layout, shape) for shape in (several, (2, *several)))
    ]
    return {
        "layout": name,
        "bits_per_weight": layout.bits_per_weight,
        "block": list(shape),
        "containers": holds,
        "encoders": list(codec.encoders),
        "purpose": layout.purpose,
        "id": layout.id,
        "sources": list(layout.sources),
    }


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    """Bits a weight, block, containers, encoders and what it is, for people."""
    from packfmt.cli import show

    bits, block = f"{row['bits_per_weight']:.6g}", show.shape(tuple(row["block"]))
    return bits, block, _containers(row["containers"]), ", ".join(row["encoders"]), row["purpose"]


@app.command()
def inspect(source: Source, read_as: ReadAs = None, base: Base = None, json: Json = False) -> int:
    """Show what is inside a model. Tensors, layouts, bits per weight, metadata."""
    from math import prod

    from packfmt import checkpoint
    from packfmt.cli import show

    with checkpoint.open(source, read_as=read_as_of(read_as), base=base or "") as model:
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
    for why in dict.fromkeys(f"{i.kind}: {i.why}" for i in infos if i.why):
        print(why)
    for key, value in keys.items():
        print(f"{key if key.isprintable() else repr(key)} = {_short(value)}")
    each = 8 * total / max(1, weights)
    sizes = f"{weights:,} weights, {show.size(total)}, {each:.4g} bits a weight"
    print(f"{source}: {container}, {len(infos)} tensors, {sizes}")
    return GOOD


@app.command()
def validate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="files or folders", show_default=False, parser=path_of)
    ],
    level: Annotated[str, typer.Option(help="how deep: header, structure or data")] = "data",
    read_as: ReadAs = None,
    base: Base = None,
    json: Json = False,
) -> int:
    """Check files against their own description. Headers, sizes, checksums, scales that are no numbers."""
    from packfmt import verify as laws
    from packfmt.cli import show
    from packfmt.errors import ContainerError, why

    if level not in laws.LEVELS:
        raise typer.BadParameter(f"{level!r} is not one of {', '.join(laws.LEVELS)}", param_hint="--level")
    found, missing = {}, []
    for path in paths:
        try:
            with show.progress(0, json) as done:
                found[path] = laws.validate(path, level, done.checking, read_as_of(read_as), base or "")
        except ContainerError as error:  # the others are told all the same
            missing.append(str(error))
        except OSError as error:
            missing.append(f"{error.filename or path}: {why(error)}")
    if json:
        show.as_json(
            [{"path": str(p), "level": level, "findings": [f.to_json() for f in fs]} for p, fs in found.items()]
        )
    else:
        for path, findings in found.items():
            for f in findings:
                print(f"{f.where}: {f.rule} {f.severity}: {f.message}")
            if not findings:
                print(f"{path}: good")
    for message in missing:
        print(f"packfmt: {message}", file=sys.stderr)
    if missing:
        return FAILED
    return FOUND if any(f.severity == "error" for fs in found.values() for f in fs) else GOOD


@app.command()
def verify(
    source: Source,
    against: Annotated[
        Path | None, typer.Option(metavar="SRC", help="the model it was made from: gives errors")
    ] = None,
    read_as: ReadAs = None,
    base: Base = None,
    json: Json = False,
) -> int:
    """Check the laws on a real file. Unpacking and packing give the same bytes, weights are numbers, products exact."""
    from contextlib import ExitStack

    from packfmt import checkpoint
    from packfmt import verify as laws
    from packfmt.cli import show

    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        kinds = read_as_of(read_as)
        model = stack.enter_context(checkpoint.open(source, read_as=kinds, base=base or against or ""))
        origin = stack.enter_context(checkpoint.open(against)) if against else None
        told = laws.told_of(model, stack.enter_context(show.progress(0, json)).checking)
        for name in model:
            info = model.index[name]
            broken, error = laws.broken(model, name, with_products=True, told=told), None
            if origin is not None and name not in origin.index:
                broken.append(f"not in {against}")
            elif origin is not None and origin.index[name].shape != info.shape:
                broken.append(f"in {against} its shape is {list(origin.index[name].shape)}")
            elif origin is not None:
                error = laws.between(origin, model, name).relative_rms
            layout = info.layout.name if info.layout else info.kind
            rows.append({"name": name, "layout": layout, "broken": broken, "relative_rms": error})
    bad = [r for r in rows if r["broken"]]
    if json:
        show.as_json({"path": str(source), "against": str(against) if against else None, "tensors": rows})
    else:
        if against:
            show.table(
                ("tensor", "layout", "relative RMS error"),
                [(r["name"], r["layout"], _number(r["relative_rms"])) for r in rows],
            )
        for r in bad:
            print(f"{source}: {r['name']}: {'; '.join(r['broken'])}")
        print(
            f"{source}: {len(rows)} tensors, {len(bad)} break a law"
            if bad
            else f"{source}: {len(rows)} tensors, all laws hold"
        )
    return FOUND if bad else GOOD


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="a model", show_default=False, parser=path_of)],
    b: Annotated[Path, typer.Argument(metavar="B", help="another one", show_default=False, parser=path_of)],
    read_as: ReadAs = None,
    base: Base = None,
    json: Json = False,
) -> int:
    """Compare two models tensor by tensor. Same bytes, same values, or how far apart; exit 1 if values differ."""
    from packfmt import checkpoint
    from packfmt import verify as laws
    from packfmt.cli import show

    kinds = read_as_of(read_as)  # of A, which B can tell by, if it is dense
    with (
        checkpoint.open(a, read_as=kinds, base=base or b) as left,
        checkpoint.open(b) as right,
        show.progress(0, json) as done,
    ):
        rows = list(laws.compare(left, right, done.checking))
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
        print(
            f"{same} tensors have the same bytes, {len(rows) - same - len(apart)} the same values, {len(apart)} differ"
        )
    return FOUND if apart else GOOD


def _number(value: object) -> str:
    return "" if value is None else f"{value:.3g}"


def _short(value: object) -> str:
    text = f"[{len(value)} items]" if isinstance(value, list) and len(value) > 8 else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
