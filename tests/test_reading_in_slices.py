"""Commands that only read take large tensors some rows at a time, and say what they would of whole ones."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from packfmt import checkpoint, conversion, verify
from packfmt.checkpoint import Checkpoint
from packfmt.cli import run
from tests.models import folder, normal

LAYOUTS = [
    "q4_0",
    "tq1_0",
    "nvfp4_modelopt",
    "nvfp4_swizzled",
    "nvfp4_rows",
    "nvfp4_h16",
    "ct_int4_g128",
    "mxfp4_tile16",
]
SMALL = 3000  # numbers in a slice


def model() -> dict[str, np.ndarray]:
    tall = normal(256, 256, seed=1) * np.linspace(1, 2, 256, dtype=np.float32)[:, None]
    return {"tall.weight": tall, "stack.experts": normal(4, 64, 256, seed=2), "norm.weight": normal(256, seed=3)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SLICE", SMALL)


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, object]:
    capsys.readouterr()
    code = run([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def made(source: Path, target: Path, to: str) -> Path:
    conversion.convert(source, target, to)
    return target


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_say_what_the_whole_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    dense = folder(tmp_path / "dense", model())
    packed, other = made(dense, tmp_path / "packed", name), made(dense, tmp_path / "other", "q8_0")
    commands = [
        ("validate", packed), ("verify", packed, "--against", dense), ("verify", dense), ("diff", dense, packed),
        ("diff", packed, other), ("diff", packed, packed), ("diff", dense, dense),
    ]  # fmt: skip
    whole = [said(capsys, *words) for words in commands]
    monkeypatch.setattr(verify, "SLICE", SMALL)
    for words, (code, data) in zip(commands, whole, strict=True):
        again, found = said(capsys, *words)
        assert again == code
        for a, b in zip(flat(data), flat(found), strict=True):
            assert a == (pytest.approx(b, rel=1e-12) if isinstance(b, float) else b), words


def flat(data: object) -> list[object]:
    if isinstance(data, dict):
        return [v for key in data for v in (key, *flat(data[key]))]
    return [v for one in data for v in flat(one)] if isinstance(data, list) else [data]


def test_no_tensor_that_can_be_cut_is_read_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    dense = folder(tmp_path / "dense", model())
    packed = made(dense, tmp_path / "packed", "q4_0")
    read = []
    whole = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: read.append(name) or whole(self, name))
    said(capsys, "validate", packed)
    said(capsys, "verify", packed, "--against", dense)
    said(capsys, "diff", dense, packed)
    assert set(read) == {"norm.weight"}


def test_checksums_of_slices_are_compared(tmp_path: Path, small: None) -> None:
    packed = made(folder(tmp_path / "dense", model()), tmp_path / "packed.safetensors", "q4_0")
    data = bytearray(packed.read_bytes())
    data[-1] ^= 1
    packed.write_bytes(data)
    (found,) = verify.validate(packed)
    assert found.rule == "PF109" and "are not those that were written" in found.message
    assert found.where.startswith(f"{packed}: ") and str(packed) not in found.message


def test_what_is_wrong_in_many_slices_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: None
) -> None:
    weight = normal(100, 256)
    weight[[30, 31, 77], 5] = np.nan
    save_file({"a.weight": weight}, tmp_path / "a.safetensors")
    (found,) = verify.validate(tmp_path / "a.safetensors")
    assert found.message == (
        "in rows 22 to 32, the first of them counted as 0: 2 of 2816 numbers are not finite; "
        "and so in 1 later slices of rows"
    )


def test_numbers_that_are_equal_or_both_none_are_the_same_values(tmp_path: Path, small: None) -> None:
    weight = normal(100, 256)
    weight[50, 3] = np.nan
    save_file(
        {"a.weight": weight, "b.weight": weight, "n": np.arange(9000).reshape(90, 100)}, tmp_path / "a.safetensors"
    )
    other = weight.copy()
    other[70, 0] *= 2
    changed = np.arange(9000).reshape(90, 100)
    changed[80] += 1
    wide = {"a.weight": weight.astype(np.float64), "b.weight": other, "n": changed}
    save_file(wide, tmp_path / "b.safetensors")
    with checkpoint.open(tmp_path / "a.safetensors") as a, checkpoint.open(tmp_path / "b.safetensors") as b:
        found = {d.name: (d.same_bytes, d.same_values, d.note) for d in verify.compare(a, b)}
    assert found == {
        "a.weight": (False, True, "f32 against f64"),
        "b.weight": (False, False, ""),
        "n": (False, False, "whole numbers differ"),
    }


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SLICE", 1 << 18)
    monkeypatch.setattr(verify, "STRIP", 1 << 16)
    save_file({"a.weight": normal(8192, 1024)}, tmp_path / "a.safetensors")
    packed = made(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "q8_0")
    with checkpoint.open(tmp_path / "a.safetensors") as a, checkpoint.open(packed) as b:
        verify.broken(b, "a.weight", with_products=True)  # what is made once, kernels' machine code above all
        tracemalloc.start()
        try:
            assert not verify.validate(packed)
            assert not verify.broken(b, "a.weight", with_products=True)
            assert 0 < verify.between(a, b, "a.weight").relative_rms < 0.02
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    nbytes = 4 * 8192 * 1024
    assert most < nbytes / 2, f"{most:,} bytes, and the numbers are {nbytes:,}"


def test_progress_is_told_slice_by_slice_and_is_all_of_the_model(tmp_path: Path, small: None) -> None:
    dense = folder(tmp_path / "dense", model())
    packed, again = made(dense, tmp_path / "packed", "q4_0"), made(dense, tmp_path / "again", "q4_0")
    for path, do in (
        (packed, lambda checking: verify.validate(packed, checking=checking)),
        (dense, lambda checking: compared(dense, packed, checking)),
        (packed, lambda checking: compared(packed, again, checking)),
    ):
        totals: list[int] = []
        told: list[tuple[str, int]] = []
        do(lambda total, totals=totals, told=told: totals.append(total) or (lambda *one: told.append(one)))
        with checkpoint.open(path) as opened:
            sizes = {name: info.nbytes for name, info in opened.index.items()}
        assert totals == [sum(sizes.values())]
        assert {name: sum(n for other, n in told if other == name) for name in sizes} == sizes
        assert len([name for name, _ in told if name == "tall.weight"]) > 10


def compared(a: Path, b: Path, checking: verify.Checking) -> None:
    with checkpoint.open(a) as left, checkpoint.open(b) as right:
        assert all(d.relative_rms < 0.2 for d in verify.compare(left, right, checking))
