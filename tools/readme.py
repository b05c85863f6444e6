"""Fill README's session and tables with what the commands print today: python tools/readme.py.

Needs the demo's model. The session runs in a scratch folder, with the model there as `model`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import house
from packfmt.demo import find_model

RUN = "import sys; from packfmt.cli import run; sys.exit(run(sys.argv[1:]))"
HERE = os.environ | {"PYTHONPATH": str(house.ROOT)}
SESSION = (
    "packfmt convert model out --to q4_0 --map 'word_embeddings=q8_0' --verify",
    "packfmt validate out",
    "packfmt inspect out | tail -3",
    "packfmt convert out out.gguf --to keep",
    "packfmt diff out out.gguf",
    "packfmt verify out.gguf --against model | tail -3",
    "packfmt convert model small --to tq2_0",
    "packfmt convert model out --to q4",
    "packfmt decode out dense",
)


def session(folder: Path) -> str:
    """What a person sees who types the commands of SESSION."""
    (folder / "packfmt").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{RUN}" "$@"\n')
    (folder / "packfmt").chmod(0o755)
    (folder / "model").symlink_to(find_model())
    lines = []
    for command in SESSION:
        typed = re.sub(r"^packfmt|(?<=\| )packfmt", "./packfmt", command)
        done = subprocess.run(
            typed, shell=True, cwd=folder, env=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines += [f"$ {command}", *done.stdout.splitlines(), ""]
    return "\n".join(lines).strip()


def printed(*arguments: str) -> str:
    """What a command prints on stdout."""
    words = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=HERE).stdout.strip()


def main() -> int:
    """Rewrite the three blocks."""
    with tempfile.TemporaryDirectory() as folder:
        blocks = {"session": session(Path(folder)), "demo": printed("demo"), "formats": printed("formats")}
    page = house.ROOT / "README.md"
    text = page.read_text()
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = marked.sub(lambda m, block=block: f"{m[1]}```text\n{block}\n```\n{m[2]}", text)  # type: ignore[misc]
    page.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
