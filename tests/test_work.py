"""What goes wrong while a plan is carried out: disks that forget, weights that cannot be read, files without number."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packfmt import checkpoint, codecs, conversion, exporters, slices, verify
from packfmt.codec import PackedTensor
from packfmt.conversion import journal, steps, work
from packfmt.errors import LayoutError, MachineError, MismatchError
from packfmt.exporters import Extras, output
from packfmt.exporters.output import Files
from packfmt.plan import Plan, Recipe
from tests.converting import beside, hashes, small_slices, weights
from tests.models import folder, normal
from tests.outputs import save
from tests.test_output import SPARSE, drawn, plan_of

PATIENCE = 30  # seconds after which something hangs


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_slices(monkeypatch)
    return folder(tmp_path / "model", weights(2, cols=512))


def plan_for(model: Path, to: str) -> Plan:
    with checkpoint.open(model) as source:
        return conversion.plan_for(source, model.with_name("out"), Recipe(to))


# ---------------------------------------------------------------- what the disk forgets


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails", [2, 4])
def test_after_a_sync_that_failed_once_the_journal_says_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, fails: int
) -> None:
    """As a network's disk has it that is full: what was not synced is forgotten, and the next sync is no failure."""
    small_slices(monkeypatch)
    rng = np.random.default_rng(0)
    ternary = {f"layers.{i}.weight": rng.integers(-1, 2, (96, 512)).astype(np.float32) for i in range(6)}
    model = folder(tmp_path / "model", ternary)
    whole = conversion.convert(model, tmp_path / "whole", "sherry")  # which counts what it cannot hold
    target, kept, syncs = tmp_path / "out", tmp_path / "kept", 0
    partial = tmp_path / "out.partial"
    honest = Files.sync

    def sync(self: Files) -> None:
        nonlocal syncs
        syncs += 1
        if syncs == fails:
            raise error
        honest(self)
        if syncs < fails:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(partial, kept)

    with monkeypatch.context() as patched, pytest.raises((MachineError, KeyboardInterrupt)):
        patched.setattr(work, "NOTED", 0.0)
        patched.setattr(work, "apply", lambda *arguments: (time.sleep(0.01), steps.apply(*arguments))[1])
        patched.setattr(Files, "sync", sync)
        conversion.convert(model, target, "sherry")
    assert syncs == fails
    shutil.rmtree(partial)
    shutil.copytree(kept, partial)
    assert any(done.rows for done in journal.read(journal.path_of(target)).done.values())
    again = conversion.convert(model, target, "sherry", resume=True)
    assert hashes(target) == hashes(tmp_path / "whole") and beside(target) == []
    assert again.remarks == whole.remarks and whole.remarks


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Of four files, and a tensor with streams."""
    tensors = {f"w{i}": drawn(SPARSE, (4, 64), i) for i in range(4)}
    plan = plan_of("safetensors", tensors, 4)
    found = Files(exporters.get("safetensors").lay(tmp_path / "m", plan, Extras({})), plan.steps, tmp_path / "m")
    found.make()
    yield found
    found.remove()


@pytest.mark.parametrize("opened", [1, 64])
def test_a_sync_that_failed_fails_ever_after(files: Files, monkeypatch: pytest.MonkeyPatch, opened: int) -> None:
    monkeypatch.setattr(output, "OPEN", opened)
    files.sync()
    fails = iter([OSError(errno.EIO, "Input/output error")])

    def sync(handle: int) -> None:
        if error := next(fails, None):
            raise error

    monkeypatch.setattr(os, "fdatasync", sync)
    for at in range(4):
        files.put(at, drawn(SPARSE, (4, 64), at))
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            files.sync()


def test_only_files_that_were_written_to_are_synced_and_each_of_them(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.sync()
    synced: list[int] = []
    honest = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda handle: (synced.append(os.fstat(handle).st_ino), honest(handle)))
    numbers = [(files.path / entry.pieces[0].place.file).stat().st_ino for entry in files.output.entries]
    for at in (2, 0):
        files.put(at, drawn(SPARSE, (4, 64), at))
        list(files._read(files.output.entries[1].pieces[0].place))
    files.sync()
    assert sorted(synced) == sorted((numbers[2], numbers[0]))
    files.sync()
    assert len(synced) == 2
    monkeypatch.setattr(output, "OPEN", 1)  # which syncs before it closes
    for at in range(4):
        files.put(at, drawn(SPARSE, (4, 64), at))
    files.sync()
    assert sorted(synced[2:]) == sorted(numbers)


def test_the_name_of_a_stream_is_synced_too(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    monkeypatch.setattr(output, "sync_folder", lambda path: synced.update(os.listdir(path)))
    files.put(1, drawn(SPARSE, (4, 64)))
    assert {"m.stream.1.0", "m.stream.1.1"} <= synced


# ---------------------------------------------------------------- more files than may be open


def test_an_output_may_have_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": normal(64, 64, seed=i) for i in range(150)}
    model = folder(tmp_path / "model", tensors)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(map(int, os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + output.OPEN + 20, hard))
    try:
        conversion.convert(model, tmp_path / "out", "q8_0", max_shard=64 * 64 // 32 * 34)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 150
    codec = codecs.get("q8_0")
    with checkpoint.open(tmp_path / "out") as found:
        for name, weight in tensors.items():
            assert found[name].components["blocks"].tobytes() == codec.encode(weight).components["blocks"].tobytes()


def test_files_in_use_are_not_closed(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.sync()
    files.close()
    monkeypatch.setattr(output, "OPEN", 0)
    names = list(files.output.files)
    with files._handle(names[0]) as first:
        for name in names[1:]:
            with files._handle(name) as other:
                assert other != first
        os.fstat(first)
        assert list(files._open) == [names[0]]
    assert not files._open


# ---------------------------------------------------------------- what cannot be done


def in_time(do: Any, *arguments: Any) -> Any:
    """What a function returns, if it does."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(do(*arguments)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "hangs"
    return found[0]


@pytest.mark.parametrize("count", [1, 2])
def test_a_weight_whose_peak_cannot_be_found_is_refused_and_others_do_not_wait_for_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("PACKFMT_THREADS", str(count))
    plan = plan_for(model, "nvfp4")
    keys = next(at for at, step in enumerate(plan.steps) if "k_proj" in step.name)
    with checkpoint.open(model) as source:
        start = float(source[plan.steps[keys].name].components["values"][0, 0])

        def peak_of(tensor: PackedTensor) -> float:
            if float(tensor.components["values"][0, 0]) == start:
                raise LayoutError("what it is made of is damaged")
            return steps.peak_of(tensor)

        monkeypatch.setattr(work, "peak_of", peak_of)
        (error,) = in_time(work.refused, plan, source, range(len(plan.steps)), 10**7)
    assert str(error).startswith(f"{plan.steps[keys].name}: in rows 0 to ")
    assert str(error).endswith(": what it is made of is damaged")


def test_a_step_that_cannot_be_cut_is_blamed_and_not_the_one_before(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, honest = plan_for(model, "q8_0"), work.cut

    def cut(at: int, *arguments: Any) -> list[steps.Slice]:
        if at in (2, 4):
            raise LayoutError(f"step {at}")
        return honest(at, *arguments)

    monkeypatch.setattr(work, "cut", cut)
    with checkpoint.open(model) as source:
        doing = work._Work(plan, source, 10**7, None, None, {}, None, all_of_them=True)
        doing.run(range(len(plan.steps)))
        assert [(str(error), at) for _, error, at in sorted(doing.errors, key=lambda found: found[0])] == [
            ("step 2", 2),
            ("step 4", 4),
        ]
        with pytest.raises(LayoutError, match="step 2"):
            work.carry_out(plan, source, range(len(plan.steps)), memory=10**7)


# ---------------------------------------------------------------- looking at steps, once


def test_steps_that_differ_in_name_only_are_looked_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = (s for s in plan_for(model, "q8_0").steps if s.name == "layers.0.mlp.down_proj.weight")
    looked, honest = [], slices.shared
    monkeypatch.setattr(slices, "shared", lambda layout: (looked.append(layout), honest(layout))[1])
    step = replace(step, shape=(7, 11, 512))
    found = {steps.rows_at_once(replace(step, name=f"w{i}", file=f"{i}")) for i in range(9)}
    assert found == {1} and len(looked) == 1


# ---------------------------------------------------------------- reading back


@pytest.mark.parametrize("name", ["q8_0", "nvfp4", "sherry", "ct_int4_g128", "mxfp4_tile16", "bf16", "bitnet"])
@pytest.mark.parametrize("damaged", [False, True])
def test_slices_break_the_laws_that_the_whole_breaks(
    tmp_path: Path, name: str, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "SLICE", 16 * 512)
    weight = normal(96, 512)
    tensor = drawn(codecs.get(name).layout, (96, 512)) if damaged else codecs.get(name).encode(weight)
    save(exporters.get("safetensors"), tmp_path / "m", plan_of("safetensors", {"w": tensor}), [tensor], Extras({}))
    broken = verify.laws(tensor)
    if not broken:
        verify.check_output(tmp_path / "m", "safetensors")
        return
    with pytest.raises(MismatchError, match=r"^w: verification failed: ") as error:
        verify.check_output(tmp_path / "m", "safetensors")
    assert ("in rows 0 to 15, the first" in str(error.value)) == (name != "bitnet")


@pytest.mark.parametrize("row", [0, 50, 95])
def test_a_law_broken_in_one_row_is_found_there(tmp_path: Path, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = codecs.get("q8_0").encode(normal(96, 512))
    tensor.components["blocks"].reshape(96, -1).view(np.uint8)[row, :2] = 255
    save(exporters.get("safetensors"), tmp_path / "m", plan_of("safetensors", {"w": tensor}), [tensor], Extras({}))
    wrong = "decodes to numbers that are not finite"
    with pytest.raises(MismatchError, match=rf"^w: verification failed: {wrong}"):
        verify.check_output(tmp_path / "m", "safetensors")
    monkeypatch.setattr(verify, "SLICE", 20 * 512)
    first = row // 20 * 20
    where = f"in rows {first} to {min(96, first + 20) - 1}, the first of them counted as 0"
    with pytest.raises(MismatchError, match=rf"^w: verification failed: {where}: {wrong}"):
        verify.check_output(tmp_path / "m", "safetensors")


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_reading_back_holds_a_slice_and_not_the_tensor(tmp_path: Path, target: str) -> None:
    rows, cols = 4 * 1024, 4096  # twice what is checked at a time
    model = folder(tmp_path / "model", {"w.weight": np.tile(normal(64, cols), (rows // 64, 1))})
    conversion.convert(model, tmp_path / target, "q8_0")
    tracemalloc.start()
    verify.check_output(tmp_path / target, "safetensors" if target == "out" else "gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * rows * cols * 1.2, f"{peak:,} bytes, and the numbers are {4 * rows * cols:,}"
