"""The house rules, each a script in tools/: what `make check` runs, and that the scripts find what they look for."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from packfmt import codecs, grids, placement
from packfmt.layout import Codes, Component, Digit, Layout, cols, grid, rows

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "spec" / "README.md").read_text()
CHECKS = (
    "check_imports.py",
    "check_kernels.py",
    "check_docs.py",
    "check_vectors.py",
    "spec_tables.py --check",
    "layouts_json.py --check",
    "changelog.py --check",
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_tree_keeps_the_rule(check: str) -> None:
    script, *flags = check.split()
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / script), *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def example(mark: str) -> str:
    """What stands between the marks of an example in spec/README.md."""
    (found,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", README, re.S)
    return found


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    """Import a tool by name, as a script finds its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("packfmt.layout", "import packfmt.codec", "layout imports packfmt.codec"),
        ("packfmt.layout", "def f():\n    from packfmt import grids", "layout imports packfmt.grids"),
        ("packfmt.exporters.gguf", "from packfmt.codecs import get", "exporters imports packfmt.codecs"),
        ("packfmt.exporters.gguf", "from ..codecs import q4_0", "exporters imports packfmt.codecs"),
        ("packfmt.kernels.move", "import ml_dtypes", "a kernel imports ml_dtypes"),
        ("packfmt.grids", "from numba import njit", "grids imports numba"),
        ("packfmt.conversion", "import rich.progress", "conversion imports rich,"),
        ("packfmt.cellar", "", "'cellar' has no place"),
        ("packfmt.cli", "from packfmt import pack", "import 'pack' from the module that defines it"),
    ],
)
def test_the_import_law_names_a_breach(tool, module: str, source: str, found: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    lines = list(tool("check_imports").broken(module, path, ast.parse(source)))
    assert len(lines) == 1 and found in lines[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("packfmt.layout", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from packfmt.codec import Codec"),
        ("packfmt.codecs.q4_0", "from packfmt import grids\nfrom packfmt.errors import LayoutError\nimport numpy"),
        ("packfmt.cli", "from packfmt import __version__, conversion"),
    ],
)
def test_the_import_law_allows_what_it_says(tool, module: str, source: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    assert list(tool("check_imports").broken(module, path, ast.parse(source))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("@njit\ndef _f(x): pass", "must state cache=True"),
        ("@njit(cache=True)\ndef _f(x): pass", "must state nogil=True"),
        ("@njit(cache=False, nogil=True)\ndef _f(x): pass", "must state cache=True"),
        ("_f = njit(nogil=True)(g)", "must state cache=True"),
        ("@nb.njit(cache=True, nogil=True, fastmath=True)\ndef _f(x): pass", "fastmath"),
        ("@njit(cache=True, nogil=True, parallel=False)\ndef _f(x): pass", "parallel"),
        ("@njit(cache=True, nogil=True)\ndef f(x):\n    'Door.'", "begins with an underscore"),
        ("@njit(cache=True, nogil=True)\ndef _f(x):\n    assert x", "assert in a compiled loop"),
        ("@njit(cache=True, nogil=True)\ndef _f(x):\n    raise E", "raise in a compiled loop"),
        ("@njit(cache=True, nogil=True)\ndef _f(x):\n    return np.empty(3)", "np.empty allocates"),
        ("@njit(cache=True, nogil=True)\ndef _f(x):\n    y = [x]", "allocates"),
        ("@njit(cache=True, nogil=True)\ndef _f(x):\n    min = x", "'min' shadows"),
        ("LOW = 1\n@njit(cache=True, nogil=True)\ndef _f(LOW):\n    pass", "'LOW' shadows"),
        ("@vectorize\ndef _f(x): pass", "vectorize"),
        ("def door(x): return x", "needs a docstring"),
    ],
)
def test_the_kernel_rules_name_a_breach(tool, source: str, found: str) -> None:
    lines = list(tool("check_kernels").module("packfmt.kernels.toy", ROOT / "toy.py", ast.parse(source)))
    assert any(found in line for line in lines), lines


def test_a_parameter_that_is_not_in_the_signature_is_found(tool) -> None:
    source = '''
"""A module."""
def f(codes, *, bits):
    """Pack.

    Parameters
    ----------
    codes : (rows, cols) uint8,
        each below 2**bits
    width : 1 to 8

    Returns
    -------
    bytes
    """
'''
    (line,) = tool("check_docs").docstrings("packfmt.toy", ROOT / "toy.py", ast.parse(source))
    assert "documents codes, width; it takes codes, bits" in line


@pytest.mark.parametrize("place", ["/home/" + "ann/model", "see ../" + "shared/facts", "('/tmp" + "/x')"])
def test_a_path_of_somebodys_machine_is_found(tool, place: str, tmp_path: Path, monkeypatch) -> None:
    check = tool("check_docs")
    monkeypatch.setattr(check.house, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(f"fine: a/tmp/b, the root\n{place}\n")
    (line,) = check.places(tmp_path / "page.md")
    assert line.startswith("page.md:2")


def test_a_name_cannot_come_to_mean_other_bytes(tool) -> None:
    check = tool("layouts_json")
    now = check.described()
    name = next(iter(now))
    changed = json.loads(json.dumps(now))
    changed[name]["layout"]["grid"]["name"] = "another"
    changed[name]["id"] = check.Layout.from_json(changed[name]["layout"]).id
    assert f"{name} has id" in check.broken_promises(changed, now)[0]
    assert check.broken_promises(now, now) == []
    assert "is gone" in check.broken_promises(now, {})[0]


def test_the_spec_readme_gives_the_canonical_text_and_id_of_q4_0() -> None:
    layout = codecs.get("q4_0").layout
    assert example("canonical").split() == [layout.canonical, layout.id]


def test_the_spec_readme_example_of_a_record() -> None:
    blocks = np.frombuffer(bytes.fromhex(example("record")), np.uint8).reshape(1, 18)
    weight = grids.decode(codecs.get("q4_0").layout, (1, 32), {"blocks": blocks})
    assert weight.tolist() == [[(c - 8) / 2 for c in (*range(16), *range(15, -1, -1))]]


def test_the_spec_readme_example_of_fields_across_words() -> None:
    codes = Codes("codes", 3, (), (cols(1, 32),), "<u4")
    layout = Layout("three", (Component("words", (cols(32), Digit("word"), rows()), (codes,)),), grid("affine", zero=4))
    parts = {"codes": np.tile(np.arange(8, dtype=np.uint8), 4).reshape(1, 32)}
    words = placement.pack(layout, (1, 32), parts)["words"].ravel()
    told = re.findall(r"^\| \d \| (0x\w{8}) \|", README, re.M)
    assert [f"0x{w:08x}" for w in words] == told and len(told) == 3


def test_the_spec_readme_example_of_bit_planes() -> None:
    codes = Codes("codes", 1, (), (cols(1, 8),))
    layout = Layout(
        "two", (Component("planes", (Digit("bit", 1, 2), rows(), cols(8)), (codes,)),), grid("affine", zero=1)
    )
    packed = placement.pack(layout, (1, 8), {"codes": np.array([[0, 1, 2, 3, 3, 2, 1, 0]], np.uint8)})
    told = re.search(r"= (0x5a), plane 1 is 0011\s1100\s=\s(0x\w\w)", README)
    assert told and [int(x, 16) for x in told.groups()] == packed["planes"].ravel().tolist()


def test_the_format_that_contributing_adds_works() -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    room: dict[str, Any] = {}
    exec(compile(source, "CONTRIBUTING.md", "exec"), room)
    weight = np.array([[-7, 7, 0.5, 1.5, *[0] * 60, *[0] * 64]], np.float32)
    packed = room["CODEC"].encode(weight)
    assert packed.components["codes"].shape == (1, 64)
    assert packed.components["codes"][0, :2].tobytes() == bytes([0xF1, 0xA8])
    assert packed.decode().tolist() == [[-7, 7, 0, 2, *[0] * 124]]


def test_vectors_must_be_listed_and_have_their_hash(tool, tmp_path: Path, monkeypatch) -> None:
    check = tool("check_vectors")
    monkeypatch.setattr(check.house, "ROOT", tmp_path)
    monkeypatch.setattr(check, "VECTORS", tmp_path)
    entry = {"sha256": "0" * 64, "tool": "ggml", "version": "1"}
    (tmp_path / "manifest.json").write_text(json.dumps({"a/x.bin": entry, "a/gone.bin": entry}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"1")
    (tmp_path / "a" / "extra.bin").write_bytes(b"2")
    found = "\n".join(check.vectors())
    assert "extra.bin: not in" in found and "gone.bin: in" in found and "x.bin: sha256" in found


BROKEN = "<!-- layout i2_s -->\nold\n<!-- /layout i2_s -->\n"


@pytest.fixture
def tables(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/spec_tables.py on an empty spec, with vectors of whatever is asked for."""
    found = tool("spec_tables")
    monkeypatch.setattr(found.house, "ROOT", tmp_path)
    monkeypatch.setattr(found, "PAGES", tmp_path)
    monkeypatch.setattr(found, "VECTORS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["spec_tables.py"])
    for name in ("q4_0", "i2_s", "i2_s_arm", "mote_8"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "packed.bin").write_bytes(b"1")
    return found


def write_page(folder: Path, name: str, body: str, tables: ModuleType) -> Path:
    path = folder / f"{name}.md"
    path.write_text(f"# {name}\n" + "".join(f"\n## {h}\n" for h in tables.HEADINGS) + body)
    return path


def test_a_page_of_one_format_is_filled(tables: ModuleType, tmp_path: Path) -> None:
    path = write_page(tmp_path, "q4_0", "<!-- layout -->\n<!-- /layout -->\n", tables)
    assert tables.look("q4_0", ("q4_0",)) == []
    assert codecs.get("q4_0").layout.id in path.read_text()


def test_a_page_of_a_family_has_a_table_for_each_format(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("i2_s", "i2_s_arm")
    marks = "".join(f"<!-- layout {n} -->\n<!-- /layout {n} -->\n" for n in names)
    path = write_page(tmp_path, "i2_s", marks, tables)
    assert tables.look("i2_s", names) == []
    assert [codecs.get(n).layout.id in path.read_text() for n in names] == [True, True]
    monkeypatch.setattr(sys, "argv", ["spec_tables.py", "--check"])
    assert tables.look("i2_s", names) == []
    path.write_text(path.read_text().replace("float32", "float64", 1))
    (stale,) = tables.look("i2_s", names)
    assert stale.startswith("i2_s.md: what stands after <!-- layout i2_s") and "stale" in stale


def test_a_page_without_a_table_or_with_one_too_many_is_found(tables: ModuleType, tmp_path: Path) -> None:
    write_page(tmp_path, "i2_s", BROKEN + BROKEN.replace("i2_s", "i2_t"), tables)
    found = tables.look("i2_s", ("i2_s", "i2_s_arm"))
    assert [line for line in found if "<!-- layout i2_t -->, which none" in line]
    assert [line for line in found if "needs one <!-- layout i2_s_arm -->" in line] and len(found) == 2


def test_a_page_or_vectors_that_are_missing_are_found(tables: ModuleType) -> None:
    assert "missing; copy the headings" in tables.look("q4_0", ("q4_0",))[0]
    assert "spec/vectors/q8_0: missing" in tables.look("q8_0", ("q8_0",))[0]


def test_a_page_of_formats_with_numbers_in_their_names_has_examples(tables: ModuleType, tmp_path: Path) -> None:
    path = write_page(tmp_path, "mote", "", tables)
    assert "has no example" in tables.look("mote", ())[0]
    path.write_text(path.read_text() + "<!-- layout mote_8 -->\n<!-- /layout mote_8 -->\n")
    assert tables.look("mote", ()) == []
    assert codecs.get("mote_8").layout.id in path.read_text()
    path.write_text(path.read_text() + "<!-- layout moat_8 -->\n<!-- /layout moat_8 -->\n")
    assert "moat_8" in tables.look("mote", ())[0]
    (tmp_path / "mote_8" / "packed.bin").unlink()
    assert "spec/vectors/mote_<experts>: missing" in tables.look("mote", ())[0]


def test_a_long_table_of_a_grid_is_told_in_words(tables: ModuleType) -> None:
    assert tables.number(codecs.get("sherry").layout.grid["values"]) == "32 quads, below"
    assert tables.number(((32, 5), (4, 4))) == "((32, 5), (4, 4))"


def test_what_is_rounded_up_is_told(tables: ModuleType) -> None:
    assert "- rounded up: rows to a multiple of 32\n" in tables.table(codecs.get("sherry_t32").layout)
    assert "rounded up" not in tables.table(codecs.get("sherry").layout)


def test_every_listed_format_is_described(tool) -> None:
    families = tool("layouts_json").families()
    assert {name for names in families.values() for name in names} == set(codecs.names())
    assert set(tool("layouts_json").described()) == set(codecs.names())
    assert families["mote"] == () and families["sherry"] == codecs.FAMILIES["sherry"]


def test_a_release_collects_every_fragment_once(tool, tmp_path: Path, monkeypatch) -> None:
    log = tool("changelog")
    monkeypatch.setattr(log.house, "ROOT", tmp_path)
    monkeypatch.setattr(log, "CHANGES", tmp_path / "changes")
    monkeypatch.setattr(log, "TARGET", tmp_path / "CHANGELOG.md")
    (tmp_path / "changes").mkdir()
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\nNews.\n\n## 0.1.0 (2001-01-01)\n\n- old\n")
    (tmp_path / "changes" / "10.fix.md").write_text("Ten is mended.\n")
    (tmp_path / "changes" / "9.fix.md").write_text("Nine is mended.\n")
    log.release("0.2.0")
    text = (tmp_path / "CHANGELOG.md").read_text()
    assert text.index("News") < text.index("## 0.2.0") < text.index("Nine") < text.index("Ten") < text.index("## 0.1.0")
    assert list((tmp_path / "changes").iterdir()) == []
    (tmp_path / "changes" / "3.story.md").write_text("One thing. Another thing.\n")
    assert len(log.wrong(tmp_path / "changes" / "3.story.md")) == 2
