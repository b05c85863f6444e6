"""Validation, and the laws that it checks."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from packfmt import checkpoint, codecs, exporters, verify
from packfmt.codec import PackedTensor
from packfmt.exporters import Extras
from packfmt.layout import COLS, DENSE, ROWS, Axis, Digit, Values, blocks, grid
from packfmt.plan import Plan, Step
from tests.models import folder, normal
from tests.outputs import save

BAD = Path(__file__).parent.parent / "spec" / "bad"
CASES = json.loads((BAD / "cases.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_broken_file_is_told_by_its_rule(name: str) -> None:
    found = verify.validate(BAD / name)
    assert [f.rule for f in found] == [CASES[name]["rule"]]
    assert "\n" not in found[0].message and found[0].where.startswith(str(BAD / name))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0xFF80])
def test_numbers_that_are_none_are_findings_and_no_warnings(tmp_path: Path, bits: int) -> None:
    values = np.array([[0, bits, 0x3F80]], np.uint16).view(ml_dtypes.bfloat16)
    save_file({"a": values}, tmp_path / "a.safetensors")
    (found,) = verify.validate(tmp_path / "a.safetensors")
    assert (found.rule, found.message) == ("PF122", "1 of 3 numbers are not finite")


def test_every_rule_has_a_case() -> None:
    assert {c["rule"] for c in CASES.values()} == verify.RULES.keys()


def test_each_level_sees_what_it_should() -> None:
    for name, least in (("wrong_shape", "header"), ("other_bytes_under_our_name", "structure"), ("nan_scale", "data")):
        levels = [level for level in verify.LEVELS if verify.validate(BAD / f"{name}.safetensors", level)]
        assert levels == list(verify.LEVELS[verify.LEVELS.index(least) :]), name


def test_a_broken_file_in_a_folder_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", shards=2)
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (found,) = verify.validate(path)
    assert found.rule == "PF101" and file.name in found.message


def dense(values: object) -> PackedTensor:
    array = np.atleast_1d(np.array(values, np.float32))
    return PackedTensor(DENSE["f32"], array.shape, {"values": array.reshape(-1, array.shape[-1])})


def test_the_error_is_relative_to_the_first_in_float64() -> None:
    found = verify.difference("w", dense([3, 4]), dense([3, 4.5]))
    assert (found.same_bytes, found.same_values) == (False, False)
    assert (found.relative_rms, found.largest) == (0.1, 0.5)
    assert verify.difference("w", dense([0, 0]), dense([0, 1])).relative_rms == float("inf")
    assert np.isnan(verify.difference("w", dense([1, 1]), dense([1, np.nan])).largest)
    assert verify.difference("w", dense([0, 0]), dense([0.0, -0.0])).same_values
    assert not verify.difference("w", dense([0, 0]), dense([0.0, -0.0])).same_bytes


def test_errors_of_many_strips_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (np.arange(n, n + 1000, dtype=np.float32) for n in (0, 3))
    whole, strips = verify.Apart(), verify.Apart()
    whole.add(a, b)
    assert whole.largest == 3
    assert whole.relative == pytest.approx(np.sqrt(9000 / (a.astype(np.float64) ** 2).sum()), rel=1e-14)
    monkeypatch.setattr(verify, "STRIP", 7)
    strips.add(a, b)
    assert strips == whole  # sums of small whole numbers do not round


def test_the_same_values_in_another_layout_are_the_same_values() -> None:
    packed = codecs.get("q8_0").encode(normal(4, 64, dtype=np.float32))
    found = verify.difference("w", packed, dense(packed.decode()))
    assert (found.same_bytes, found.same_values, found.note) == (False, True, "q8_0 against f32")


def test_names_that_only_one_model_has_are_told(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"x": normal(3), "y": normal(4)})
    b = folder(tmp_path / "b", {"y": normal(4), "z": normal(5)})
    with checkpoint.open(a) as left, checkpoint.open(b) as right:
        found = {d.name: (d.same_bytes, d.note) for d in verify.compare(left, right)}
    assert found == {"x": (False, f"only in {a}"), "y": (True, ""), "z": (False, f"only in {b}")}


def test_a_grid_that_cannot_take_its_parts_is_a_finding_and_a_broken_law(tmp_path: Path) -> None:
    """A description that is well formed, but whose runs have sums beyond 64 bits."""
    runs = ((2**63 - 1, 1), (2**63 - 1, 1), (10, 1))
    digits = (Digit("byte", 1, 8),)
    layout = blocks(
        "evil", 8, Values("codes", "u1", digits), Values("scale", "<f2"),
        grid=grid("base3", block=8, runs=runs, first="high"), axes=(ROWS, COLS, Axis("byte", size=8)),
    )  # fmt: skip
    tensor = PackedTensor(layout, (64, 64), {"blocks": np.zeros((64, 80), np.uint8)})
    step = Step("w", (64, 64), "float32", layout, layout, "keep", "")
    target = tmp_path / "evil.safetensors"
    save(exporters.get("safetensors"), target, Plan("", "safetensors", (step,)), iter([tensor]), Extras())
    (found,) = verify.validate(target)
    assert found.rule == "PF111" and "runs of" in found.message
    assert "runs of" in verify.laws(tensor)[0]
