"""What the tools share: where the tree is, which formats it has, how findings are told.

Importing this makes the tree's own packfmt importable, installed or not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "packfmt"
SPEC = ROOT / "spec"
sys.path.insert(0, str(ROOT))


def tell(findings: list[str], done: str) -> int:
    """Print what was found, or what was looked at; the exit code."""
    print("\n".join(findings) or done)
    return int(bool(findings))


def tracked() -> list[Path]:
    """Every file that git has or would add; without git every file of the source distribution."""
    if not (ROOT / ".git").exists():
        return [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", "__pycache__"} & set(p.parts)]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [p for name in sorted(set(listed.stdout.split("\0"))) if name and (p := ROOT / name).is_file()]


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    """Dotted name, file and syntax tree of every module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, path, ast.parse(path.read_text(), str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """file:line, as editors open it."""
    line = getattr(node, "lineno", None)
    return f"{path.relative_to(ROOT)}" + (f":{line}" if line else "")
