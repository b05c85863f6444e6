"""Docstrings tell the truth, and no file names a place that only its author has.

- every public module, class and function of the package has a docstring
- a docstring's Parameters are the signature's, in its order
- no tracked file has an absolute path of somebody's machine, or a path out of the tree (but for .ci)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import house

SECTION = re.compile(r"^Parameters\n-{3,}\n(.*?)(?=^\S[^\n]*\n-{3,}$|\Z)", re.M | re.S)
PLACES = re.compile(r"(?<![\w.~])/(?:home|root|tmp|work|Users)/\w|\b[A-Z]:\\Users|\.\./shared")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def documented(docstring: str) -> list[str] | None:
    """Names in the Parameters section; None if there is no such section."""
    if not (found := SECTION.search(docstring + "\n")):
        return None
    entries = [line.split(" : ")[0] for line in found[1].splitlines() if line and not line[0].isspace()]
    return [name.strip() for entry in entries for name in entry.split(",")]


def parameters(node: Function | ast.ClassDef) -> list[str]:
    """Names in the signature, in order; of a class those of its __init__ or its fields."""
    if isinstance(node, ast.ClassDef):
        for f in node.body:
            if isinstance(f, Function) and f.name == "__init__":
                return parameters(f)
        return [f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args)]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [x.arg for x in a.kwonlyargs] + ([f"**{a.kwarg.arg}"] if a.kwarg else [])
    return [n for n in names if n not in ("self", "cls")]


def docstrings(name: str, path: Path, tree: ast.Module) -> Iterator[str]:
    """What is wrong with the docstrings of one module."""
    if not ast.get_docstring(tree):
        yield f"{house.place(path)}: {name} has no docstring"
    for top in tree.body:
        if isinstance(top, Function | ast.ClassDef) and not top.name.startswith("_") and not ast.get_docstring(top):
            yield f"{house.place(path, top)}: {top.name} has no docstring"
    for node in ast.walk(tree):
        if not isinstance(node, Function | ast.ClassDef):
            continue
        told, real = documented(ast.get_docstring(node) or ""), parameters(node)
        if told is not None and told != real:
            yield f"{house.place(path, node)}: {node.name} documents {', '.join(told)}; it takes {', '.join(real)}"


def places(path: Path) -> Iterator[str]:
    """Lines that name a machine's folders."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        if found := PLACES.search(line):
            yield f"{house.place(path)}:{number}: {found[0]!r} is a place that users do not have"


def main() -> int:
    findings = [line for m in house.modules() for line in docstrings(*m)]
    files = [p for p in house.tracked() if ".ci" not in p.relative_to(house.ROOT).parts]
    findings += [line for p in files for line in places(p)]
    return house.tell(findings, f"docstrings agree with signatures, {len(files)} files name no foreign place")


if __name__ == "__main__":
    raise SystemExit(main())
