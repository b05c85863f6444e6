"""The application and the options that several commands share."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer


def path_of(text: str) -> Path:
    """A path that a user named; an empty one, of a variable that is not set, would be the folder one is in."""
    if not text:
        raise typer.BadParameter("is empty; name a file or folder")
    return Path(text)


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", help="a Hugging Face folder, a .safetensors or a .gguf", show_default=False, parser=path_of
    ),
]
Target = Annotated[
    Path,
    typer.Argument(
        metavar="DST", help="a new folder; or a .safetensors or .gguf file", show_default=False, parser=path_of
    ),
]
To = Annotated[str, typer.Option("--to", metavar="LAYOUT", help="layout of the weights, or keep; see packfmt formats")]
Maps = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="REGEX=LAYOUT",
        help="another layout, or keep, where the name matches, norms and biases too; later rules win",
    ),
]
Fallback = Annotated[
    str, typer.Option("--fallback", metavar="LAYOUT", help="layout, or keep, where columns do not fill the blocks")
]
Encoder = Annotated[
    str, typer.Option("--encoder", metavar="NAME", help="how to choose the codes; default: the layout's first")
]
Export = Annotated[
    str,
    typer.Option(
        "--export", metavar="CONTAINER", help="what DST is for: safetensors, gguf, compressed-tensors, modelopt ..."
    ),
]
Shard = Annotated[
    str | None,
    typer.Option("--max-shard-size", metavar="SIZE", help="largest file of a folder: 500MB, 10GB; default: 5GB"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]
Force = Annotated[bool, typer.Option("--force", help="replace DST if it exists")]
Saved = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="replay a plan saved by packfmt plan --json")
]
ReadAs = Annotated[
    list[str] | None,
    typer.Option(
        "--read-as",
        metavar="TYPE=LAYOUT",
        help="what a GGUF's type holds, where the file does not say: STQ1_0=sherry_s16",
    ),
]
Base = Annotated[
    Path | None, typer.Option(metavar="SRC", help="the dense model it was made from, to tell such types by")
]
Verify = Annotated[bool, typer.Option("--verify", help="read everything back and check it before DST gets its name")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="hold no more than this at once: 1GiB, 500MB; default: a quarter of the machine's",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with what an earlier run, which was stopped, has left")]
JsonProgress = Annotated[
    bool, typer.Option("--json-progress", help="tell progress as JSON, a line a second, on standard error")
]
Lossless = Annotated[
    bool, typer.Option("--lossless", help="look at the weights first; refuse whatever would change a number")
]


def read_as_of(pairs: list[str] | None) -> dict[str, str]:
    """TYPE=LAYOUT options as a record."""
    out = {}
    for pair in pairs or []:
        kind, equals, layout = pair.partition("=")
        if not (kind and equals and layout):
            raise typer.BadParameter(f"{pair!r} is not TYPE=LAYOUT", param_hint="--read-as")
        out[kind] = layout
    return out


def size_of(text: str | None, option: str) -> int:
    """5GB, 1.5GiB, 500m, 2_000_000 -> bytes; 0 of None.

    GB are powers of 1000, as Hugging Face counts, GiB of 1024; capitals make no difference.
    """
    if text is None:
        return 0
    found = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*(?:([kmgt])(i?))?b?", text.strip().lower(), re.ASCII)
    nbytes = 0
    if found:
        number, unit, binary = found.groups()
        nbytes = int(Decimal(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))
    if not nbytes:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB, 500MB or 1GiB", param_hint=option)
    return nbytes


def _version(wanted: bool) -> None:
    if wanted:
        from packfmt import __version__

        print(f"packfmt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Pack model weights into low-bit layouts whose bytes are specified, proved and portable."""
