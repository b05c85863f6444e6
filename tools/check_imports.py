"""The import law: who may know whom, and what starting up may load.

    errors <- minifloat, layout <- placement <- outliers, spellings <- grids, respelling, fused
           <- meaning <- tilings <- retiling <- products <- codec
           <- prepared, slices, plan, codecs, exporters <- checkpoint <- verify <- conversion <- hub, bench, cli

Imports inside functions count; those under `if TYPE_CHECKING` do not.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import house

# room -> the rooms it may import; its own and `errors` go without saying
LAW = {
    "errors": "",
    "kernels": "",
    "minifloat": "",
    "layout": "description",  # where it is asked to read or write one
    "description": "layout",
    "placement": "layout kernels",
    "spellings": "minifloat placement kernels",
    "outliers": "layout placement kernels",
    "grids": "layout minifloat placement outliers spellings kernels",
    "respelling": "layout minifloat placement spellings grids",
    "fused": "layout minifloat placement outliers grids kernels",
    "meaning": "layout minifloat placement spellings grids respelling",
    "tilings": "layout minifloat meaning",
    "retiling": "layout minifloat placement spellings fused meaning tilings kernels",
    "products": "layout placement outliers grids respelling fused meaning tilings retiling kernels",
    "codec": "layout placement outliers grids respelling fused retiling products kernels",
    "prepared": "layout codec products",
    "plan": "layout codec",
    "codecs": "layout minifloat placement outliers spellings grids meaning tilings retiling codec slices kernels",
    "slices": "layout codec",
    "exporters": "layout codec slices plan",
    "checkpoint": "layout placement grids codec plan codecs exporters",
    "verify": "layout placement outliers grids products codec slices plan codecs exporters checkpoint kernels",
    "conversion": "layout placement grids codec slices plan codecs exporters checkpoint kernels verify",
    "bench": "layout codec codecs prepared kernels",
    "hub": "layout codec plan codecs exporters checkpoint conversion verify",
    "demo": "layout grids codec plan codecs exporters checkpoint conversion verify",
    "cli": "layout grids codec plan codecs exporters checkpoint conversion verify hub demo bench",
    "__main__": "cli",
    "": "layout grids codec plan codecs exporters checkpoint conversion verify hub prepared kernels",
}
# what comes from outside -> the rooms that may import it
ONLY_IN = {
    "numba": "kernels",
    "llvmlite": "kernels",
    "onnx": "exporters",
    "huggingface_hub": "hub",
    "typer": "cli",
    "rich": "cli",
}
KERNELS_KNOW = {"numpy", "numba", "llvmlite", "packfmt", *sys.stdlib_module_names}
LATE = ("numba", "llvmlite", "onnx", "huggingface_hub")  # never loaded by `import packfmt` or --help

HELP = """
import sys
try:
    from packfmt.cli import main
    sys.argv = ["packfmt", "--help"]
    main()
except SystemExit as stop:
    assert not stop.code, f"--help ends with exit code {stop.code}"
"""


def room(module: str) -> str:
    """packfmt.codecs.q4_0 -> codecs; packfmt -> ''."""
    return module.split(".")[1] if "." in module else ""


def imports(name: str, path: Path, tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that a module imports, with the statement."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            if base == "packfmt":  # `from packfmt import grids` names modules
                yield from ((node, f"packfmt.{alias.name}") for alias in node.names)
            else:
                yield node, base
        waiting += ast.iter_child_nodes(node)


def broken(name: str, path: Path, tree: ast.Module) -> Iterator[str]:
    """The imports of a module that the law does not allow."""
    mine = room(name)
    if mine not in LAW:
        yield f"{house.place(path)}: {mine!r} has no place in the import law; give it one in LAW"
        return
    for node, target in imports(name, path, tree):
        top = target.split(".")[0]
        where = house.place(path, node)
        if top == "packfmt":
            theirs = room(target)
            if theirs in LAW and theirs not in {mine, "errors", *LAW[mine].split()}:
                yield f"{where}: {mine or 'packfmt'} imports {target}; it may know {LAW[mine] or 'errors only'}"
            elif theirs not in LAW and theirs != "__version__":  # a public name of packfmt itself
                yield f"{where}: import {theirs!r} from the module that defines it"
        elif mine == "kernels" and top not in KERNELS_KNOW:
            yield f"{where}: a kernel imports {top}; it may know numpy, numba and errors"
        elif top in ONLY_IN and mine != ONLY_IN[top]:
            yield f"{where}: {mine or 'packfmt'} imports {top}, which belongs in {ONLY_IN[top]}"


def loaded(what: str, code: str) -> list[str]:
    """What a fresh interpreter loads of `LATE`."""
    code += f"\nsys.stderr.write('loaded: ' + ' '.join(m for m in {LATE!r} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=house.ROOT, capture_output=True, text=True)
    _, mark, found = run.stderr.rpartition("loaded: ")
    if run.returncode or not mark:
        return [f"{what} fails: {run.stderr.strip()}"]
    return [f"{what} loads {module}; import it where it is used" for module in found.split()]


def main() -> int:
    findings = [line for module in house.modules() for line in broken(*module)]
    findings += loaded("import packfmt", "import sys, packfmt")
    if (house.PACKAGE / "cli" / "__init__.py").exists() or (house.PACKAGE / "cli.py").exists():
        findings += loaded("packfmt --help", HELP)
    else:
        print("packfmt --help: not looked at, for there is no packfmt.cli")
    return house.tell(findings, "the import law holds")


if __name__ == "__main__":
    raise SystemExit(main())
