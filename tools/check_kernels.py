"""The kernel rules, for every compiled function of the package.

- `@njit(cache=True, nogil=True, ...)`, both stated; no fastmath, no parallel (threads: `kernels/threads.py`)
- its name begins with an underscore; in `kernels` the public door before it has a docstring
- no assert, raise or try, and nothing allocated: the door checks and shapes
- no name of the module or of Python is shadowed
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import house

STATED = {"cache": True, "nogil": True}
BANNED = ("fastmath", "parallel", "error_model")
OTHER_COMPILERS = {"jit", "vectorize", "guvectorize", "stencil", "jitclass"}
ALLOCATES = {"empty", "zeros", "ones", "full", "array", "asarray", "arange", "copy", "concatenate", "stack", "where"}
ALLOCATES |= {f"{name}_like" for name in ("empty", "zeros", "ones", "full")}  # of NumPy
GROWS = {"copy", "append", "astype", "flatten"}  # methods
LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def called(node: ast.AST) -> str:
    """The last name of `np.empty`, `njit`, `numba.njit(...)` ..."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def allocates(method: ast.Attribute) -> bool:
    return method.attr in (ALLOCATES if ast.unparse(method.value) in ("np", "numpy") else GROWS)


def compiled(function: ast.AST) -> bool:
    return isinstance(function, Function) and any(called(d) == "njit" for d in function.decorator_list)


def decoration(node: ast.expr) -> Iterator[str]:
    """What is wrong with one use of njit."""
    stated = {k.arg: ast.unparse(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
    for key, value in STATED.items():
        if stated.get(key) != str(value):
            yield f"njit must state {key}={value}"
    for key in BANNED:
        if key in stated:
            yield f"njit states {key}, which no kernel may"


def body(function: Function, outside: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """What is wrong inside a compiled function."""
    arguments = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for name in sorted((arguments | stored) & (outside | set(dir(builtins)))):
        yield function, f"{name!r} shadows a name of the module or of Python"
    for node in (n for statement in function.body for n in ast.walk(statement)):
        if isinstance(node, ast.Assert | ast.Raise | ast.Try):
            yield node, f"{type(node).__name__.lower()} in a compiled loop; check in the door before it"
        elif isinstance(node, LITERALS) and not isinstance(getattr(node, "ctx", None), ast.Store):
            yield node, f"{ast.unparse(node)} allocates"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and allocates(node.func):
            yield node, f"{ast.unparse(node.func)} allocates; the door hands arrays in"
        elif isinstance(node, ast.Attribute | ast.Name) and called(node) == "prange":
            yield node, "prange; share the work with kernels/threads.py"


def module(name: str, path: Path, tree: ast.Module) -> Iterator[str]:
    """Every breach of the rules in one module."""
    outside = {n.name for n in tree.body if isinstance(n, Function | ast.ClassDef)}
    outside |= {
        t.id for n in tree.body if isinstance(n, ast.Assign) for t in ast.walk(n) if isinstance(t, ast.Name)
    } | {a.asname or a.name for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    decorators = {id(d) for f in ast.walk(tree) if isinstance(f, Function) for d in f.decorator_list}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) == "njit" and not isinstance(node.func, ast.Call):
            yield from (f"{house.place(path, node)}: {what}" for what in decoration(node))
        elif id(node) in decorators and not isinstance(node, ast.Call) and called(node) == "njit":
            yield from (f"{house.place(path, node)}: {what}" for what in decoration(node))  # type: ignore[arg-type]
        if id(node) in decorators and called(node) in OTHER_COMPILERS:
            yield f"{house.place(path, node)}: {called(node)}; kernels are compiled with njit"
        if isinstance(node, Function) and compiled(node):
            if not node.name.startswith("_"):
                yield f"{house.place(path, node)}: {node.name} is compiled, so its name begins with an underscore"
            yield from (f"{house.place(path, at)}: {what}" for at, what in body(node, outside))
    if name.startswith("packfmt.kernels"):
        for f in (n for n in tree.body if isinstance(n, Function)):
            if not f.name.startswith("_") and not ast.get_docstring(f):
                yield f"{house.place(path, f)}: {f.name} is a door, and needs a docstring"


def main() -> int:
    found = list(house.modules())
    count = sum(compiled(n) for _, _, tree in found for n in ast.walk(tree))
    return house.tell([line for m in found for line in module(*m)], f"{count} compiled functions keep the kernel rules")


if __name__ == "__main__":
    raise SystemExit(main())
