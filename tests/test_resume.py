"""Conversions that were stopped go on: whatever stopped them, the bytes are those of one that was not."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packfmt import checkpoint, codecs, conversion
from packfmt.codec import matrix
from packfmt.conversion import admission, journal, running, work
from packfmt.conversion.journal import Task
from packfmt.errors import ContainerError, MachineError, PlanError
from packfmt.exporters.output import Files
from packfmt.plan import Recipe
from tests.converting import ROOT, SLICE, beside, forked, hashes, in_a_fresh_process, small_slices, weights
from tests.models import folder

KILLS = 50
OUTPUTS = ("out", "out.gguf", "out.safetensors")
SHARD = 60_000  # bytes of a file of a folder, so that there are some
slow = pytest.mark.clients


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", weights())


def to_layout(target: Path) -> str:
    return "q8_0" if target.suffix == ".gguf" else "nvfp4"  # which has a scale for the whole tensor, and for several


def convert(model: Path, target: Path, **more: Any) -> conversion.Report:
    return conversion.convert(model, target, to_layout(target), max_shard=SHARD, **more)


# ---------------------------------------------------------------- killed


def killed_at_random(place: str) -> None:
    """Conversions to every kind of output, killed again and again, until so many were."""
    work.ROOM, work.NOTED = SLICE, 0.01
    done, rng = work.apply, random.Random(6)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.002)
        return done(*arguments)

    work.apply, model = slowly, folder(Path(place) / "model", weights())
    want, took = {}, {}
    for name in OUTPUTS:
        whole = Path(place) / f"whole-{name}"
        convert(model, whole)
        begin = time.perf_counter()
        assert not forked(lambda name=name: convert(model, Path(place) / name))
        want[name], took[name] = hashes(whole), time.perf_counter() - begin
        assert hashes(Path(place) / name) == want[name]
    kills = rounds = 0
    while kills < KILLS:
        name = OUTPUTS[rounds % 3]
        target, rounds, status = Path(place) / f"{rounds}-{name}", rounds + 1, -signal.SIGKILL
        while status and (not target.exists() or beside(target)):
            status = forked(lambda t=target: convert(model, t, resume=True), rng.uniform(0, took[name]))
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            assert not target.exists() or hashes(target) == want[name]
        assert hashes(target) == want[name] and beside(target) == [], target
    print(kills, rounds)


@slow
def test_a_conversion_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    kills, rounds = map(int, in_a_fresh_process(killed_at_random, tmp_path).split())
    assert kills >= KILLS and rounds >= 3


# what changes a disk: the system's calls, and the journal's line in two halves
CALLS = ("fdatasync", "fsync", "ftruncate", "mkdir", "pwrite", "rename", "replace", "rmdir", "setxattr", "unlink")


def killed_at_call(number: int) -> Callable[..., None]:
    """Let this process be killed just before the so-manieth call that changes the disk, or in the middle of a write."""
    count = itertools.count(1)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **named: Any) -> Any:
            if next(count) == number:
                if name == "pwrite":
                    handle, data, begin = arguments
                    call(handle, data[: len(data) // 2], begin)
                if name == "_append":
                    text = b"".join(json.dumps(r).encode() + b"\n" for r in arguments[1])
                    os.write(arguments[0]._file.fileno(), text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return instead

    for name in filter(partial(hasattr, os), CALLS):
        setattr(os, name, counted(name, getattr(os, name)))
    journal.Journal._append = counted("_append", journal.Journal._append)  # type: ignore[method-assign]


def killed_at_every_call(place: str, name: str, force: str) -> None:
    """A conversion that is killed at its first change of the disk, one at its second, and so on."""
    work.ROOM = 5 * SLICE
    honest = work._Work._part_done

    def noted_at_once(self: Any, *arguments: Any) -> None:
        honest(self, *arguments)
        self._note()

    work._Work._part_done = noted_at_once  # type: ignore[method-assign]
    model = folder(Path(place) / "model", weights(1, rows=64))
    whole, old = Path(place) / f"whole-{name}", Path(place) / f"old-{name}"
    convert(model, whole)
    conversion.convert(model, old, "q4_0")
    want, before = hashes(whole), hashes(old) if force else {}
    for number in itertools.count(1):
        target = Path(place) / f"{number}-{name}"
        if force:
            (shutil.copytree if old.is_dir() else shutil.copy)(old, target)

        def killed(target: Path = target, number: int = number) -> None:
            killed_at_call(number)
            convert(model, target, force=bool(force), check=number % 2 == 0)

        status = forked(killed)
        there = hashes(target)
        assert there in (before, want) or (force and not there), number
        if status and beside(target):
            assert not forked(lambda t=target: convert(model, t, force=bool(force), resume=True)), number
        elif there != want:  # before it had begun
            assert there == before and not forked(lambda t=target: convert(model, t, force=bool(force))), number
        assert hashes(target) == want and beside(target) == [], number
        if not status:
            print(number)
            return


@slow
@pytest.mark.parametrize("force", ["", "force"])
@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_conversion_killed_at_any_change_of_the_disk_goes_on_to_the_same_bytes(
    tmp_path: Path, name: str, force: str
) -> None:
    assert int(in_a_fresh_process(killed_at_every_call, tmp_path, name, force)) > 35


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_journal_cut_off_anywhere_in_its_last_line_is_gone_on_with(
    tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    want, target = stopped(model, tmp_path / name, monkeypatch)
    kept, line = tmp_path / "kept", journal.path_of(target).read_bytes()
    kept.mkdir()
    for path in tmp_path.glob(f"{name}.*"):
        shutil.move(path, kept)
    begin = line[:-1].rindex(b"\n") + 1
    without = None
    for length in range(begin, len(line)):
        (kept / "cut").write_bytes(line[:length])
        told = journal.read(kept / "cut")
        without = without or told
        assert told == without and told.length == begin
    (kept / "cut").unlink()
    for length in (begin, begin + 1, len(line) - 1, len(line)):
        shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
        journal.path_of(target).write_bytes(line[:length])
        convert(model, target, resume=True)
        assert hashes(target) == want and beside(target) == [], length
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def test_a_journal_says_only_what_was_synced_before(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    monkeypatch.setattr(work, "NOTED", 0.0)
    written, synced, noted = set(), set(), []
    put, sync, add = Files.put, Files.sync, journal.Journal.add

    def putting(self: Files, at: int, tensor: Any, rows: tuple[int, int] | None = None) -> int:
        nbytes = put(self, at, tensor, rows)
        written.add((at, rows or (0, matrix(tensor.shape)[0])))
        return nbytes

    def syncing(self: Files) -> None:
        before = set(written)
        sync(self)
        synced.update(before)

    def adding(self: journal.Journal, lines: Any) -> None:
        for at, what in lines:
            if "rows" in what:
                assert (at, what["rows"]) in synced
                noted.append((at, what["rows"]))
        add(self, lines)

    monkeypatch.setattr(Files, "put", putting)
    monkeypatch.setattr(Files, "sync", syncing)
    monkeypatch.setattr(journal.Journal, "add", adding)
    convert(model, tmp_path / "out")
    assert set(noted) == written and len(noted) == len(written)


def test_what_stands_behind_a_damaged_line_of_a_journal_is_done_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    want, target = stopped(model, tmp_path / "out", monkeypatch)
    lines = journal.path_of(target).read_bytes().splitlines(keepends=True)
    zeros = bytes(len(lines[3]) - 1) + b"\n"  # as a power failure leaves a block
    journal.path_of(target).write_bytes(b"".join([*lines[:3], zeros, *lines[4:]]))
    told = journal.read(journal.path_of(target))
    assert told.length == sum(map(len, lines[:3])) and sum(len(d.rows) for d in told.done.values()) == 2
    convert(model, target, resume=True)
    assert hashes(target) == want and beside(target) == []
    (tmp_path / "b.partial.journal").write_bytes(b"my diary\n")
    with pytest.raises(ContainerError, match=r"b\.partial\.journal: no journal of a conversion"):
        convert(model, tmp_path / "b", resume=True)
    assert (tmp_path / "b.partial.journal").read_bytes() == b"my diary\n"


# ---------------------------------------------------------------- stopped otherwise


class Stop(Exception):
    """What a test stops a conversion with."""


def stopper(after: int) -> conversion.Progress:
    """Raises when so many slices are done."""
    count = itertools.count(1)

    def progress(name: str, nbytes: int) -> None:
        if next(count) == after:
            raise Stop

    return progress


def run(model: Path, target: Path, to: str = "", **more: Any) -> conversion.Report:
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, target, Recipe(to or to_layout(target), max_shard=SHARD))
        return conversion.run(plan, source, target, **more)


def stopped(
    model: Path, target: Path, monkeypatch: pytest.MonkeyPatch, after: int = 9, **more: Any
) -> tuple[dict[str, str], Path]:
    """A conversion that was stopped after so many slices, and the hashes of one that was not."""
    whole = target.with_name(f"whole-{target.name}")
    convert(model, whole)
    with pytest.raises(Stop):
        run(model, target, progress=stopper(after), **more)
    assert not target.exists() and journal.path_of(target).exists()
    return hashes(whole), target


def test_progress_adds_up_to_the_source_s_bytes_also_when_it_is_gone_on_with(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    with checkpoint.open(model) as source:
        sizes = {name: info.nbytes for name, info in source.index.items()}
    for name, resume in (("a", False), ("out", True)):
        if resume:
            stopped(model, tmp_path / name, monkeypatch)
        told: dict[str, int] = {}
        calls = []

        def progress(tensor: str, nbytes: int, told: dict[str, int] = told, calls: list[int] = calls) -> None:
            told[tensor] = told.get(tensor, 0) + nbytes
            calls.append(nbytes)

        run(model, tmp_path / name, progress=progress, resume=resume)
        assert told == sizes and len(calls) > 3 * len(sizes) / 2
    packed: dict[str, int] = {}  # which has one scale for the whole of a tensor, that every slice reads
    run(model, tmp_path / "c", "nvfp4_modelopt")
    with checkpoint.open(tmp_path / "c") as source:
        sizes = {name: info.nbytes for name, info in source.index.items()}
        plan = conversion.plan_for(source, tmp_path / "b", Recipe("q8_0"))
        conversion.run(plan, source, tmp_path / "b", progress=lambda n, b: packed.update({n: packed.get(n, 0) + b}))
    assert packed == sizes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("only root may mount a file system of one megabyte, and not everywhere")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("room", [4096, 40_000, 120_000])
def test_a_disk_that_fills_up_is_one_line_and_gone_on_with_when_there_is_room(
    tmp_path: Path, small_disk: Path, name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    monkeypatch.setattr(work, "NOTED", 0.0)
    monkeypatch.setattr(admission, "SPARE", 20_000)
    model, target = folder(tmp_path / "model", weights()), small_disk / name
    convert(model, tmp_path / name)
    (small_disk / "others").write_bytes(bytes(2**20 - room))
    with pytest.raises(MachineError, match="bytes free, this conversion needs"):
        convert(model, target)
    assert [p.name for p in small_disk.iterdir()] == ["others"]
    (small_disk / "others").unlink()
    with monkeypatch.context() as patched, pytest.raises(MachineError) as error:
        # as if others took the room when it had begun
        patched.setattr(running, "may_write", lambda *_: (small_disk / "others").write_bytes(bytes(2**20 - room)))
        convert(model, target)
    what = f"the disk is full; make room; what is done lies in {target}.partial, --resume goes on"
    assert str(error.value) == f"{target}: {what}"
    assert not target.exists()
    with pytest.raises(MachineError, match="bytes free, this conversion needs"):
        convert(model, target, resume=True)
    os.truncate(small_disk / "others", 2**20 - 380_000)  # enough together with what is there
    convert(model, target, resume=True)
    assert hashes(target) == hashes(tmp_path / name) and beside(target) == []


def test_a_journal_on_a_full_disk_has_no_half_lines(tmp_path: Path) -> None:
    """What of a line was written when the disk was full is taken back."""
    path = tmp_path / "out.partial.journal"
    begin = {"conversion": "2c26b46b", "source": {}, "task": "all"}
    mine = journal.Journal(path, begin, resume=False)
    mine.add([(0, {"rows": (0, 4), "counted": 1})])
    before, file = path.read_bytes(), mine._file

    class Full:
        """A file on a disk with ten bytes left."""

        room = 10

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            done = file.write(data[: self.room])
            self.room -= done
            return done

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    mine._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        mine.add([(0, {"rows": (4, 8), "counted": 1})])
    assert path.read_bytes() == before
    mine._file = file
    mine.add([(0, {"rows": (8, 12), "counted": 1})])
    mine.close()
    assert journal.read(path).done[0].rows == [(0, 4), (8, 12)]


# ---------------------------------------------------------------- refused


def test_resume_says_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(monkeypatch)
    model = folder(tmp_path / "model", weights())
    costs = {"layers.0.mlp.down_proj.weight": np.ones(256, np.float32)}
    want, target = stopped(model, tmp_path / "out", monkeypatch)
    weight = next(model.glob("*.safetensors"))

    def refused(what: str, **more: Any) -> None:
        before = {p: hashes(p) for p in tmp_path.glob("out*")}
        with pytest.raises(PlanError) as error:
            conversion.convert(model, target, **{"to": "nvfp4", "max_shard": SHARD, "resume": True, **more})
        text = str(error.value)
        assert text.startswith(f"{journal.path_of(target)}: cannot go on: {what}"), text
        assert text.endswith(f"; do as before, or begin anew after rm -r {target}.partial*") and "\n" not in text
        assert {p: hashes(p) for p in tmp_path.glob("out*")} == before

    refused("plan: steps: layers.0.mlp.down_proj.weight: to was nvfp4, now mxfp4", to="mxfp4")
    refused("plan: steps: layers.0.mlp.down_proj.weight: encoder was ", encoder="tiles")
    refused("plan: steps: layers.2.mlp.down_proj.weight: to was nvfp4, now q8_0", overrides={"2.*down": "q8_0"})
    refused("plan: steps: layers.0.mlp.down_proj.weight: file was model-00001-of-", max_shard=10**9)
    refused("importance was none, now ", importance=costs)
    with monkeypatch.context() as patched:
        patched.setattr("packfmt.__version__", "99.0")
        refused(f"packfmt was {__import__('packfmt').__version__}"[:12])
    found = weight.stat()
    os.utime(weight, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    refused(f"source: {weight} was {found.st_size:,} bytes of 20")
    with weight.open("ab") as file:
        file.write(b"more")
    with pytest.raises((PlanError, ContainerError)):
        convert(model, target, resume=True)
    os.truncate(weight, found.st_size)
    os.utime(weight, ns=(found.st_atime_ns, found.st_mtime_ns))
    convert(model, target, resume=True)
    assert hashes(target) == want and beside(target) == []


def test_what_another_run_left_is_not_written_over(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    _, target = stopped(model, tmp_path / "out", monkeypatch)
    before = {p: hashes(p) for p in tmp_path.glob("out*")}
    with pytest.raises(ContainerError, match=r"a conversion to here was stopped; --resume goes on with it, or begin"):
        convert(model, target)
    for task in (Task(1, 2), Task(2, 2)):
        with pytest.raises(PlanError, match=r"begun without --task; do as before, or begin anew after rm -r "):
            run(model, target, task=task)
    assert {p: hashes(p) for p in tmp_path.glob("out*")} == before
    journal.path_of(target).unlink()
    for resume in (False, True):
        with pytest.raises(ContainerError, match=r"out\.partial: is there, and no journal says what it is; remove it"):
            convert(model, target, resume=resume)
    assert beside(target) == ["out.partial", "out.partial.plan"]


@pytest.mark.parametrize("gone", ["all", "a file", "a part"])
def test_what_a_journal_says_must_be_there(
    tmp_path: Path, model: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    _, target = stopped(model, tmp_path / "out", monkeypatch)
    partial = tmp_path / "out.partial"
    if gone == "all":
        shutil.rmtree(partial)
    elif gone == "a file":
        next(partial.glob("*.safetensors")).unlink()
    else:
        os.truncate(next(partial.glob("*.safetensors")), 100)
    with pytest.raises(PlanError, match=r"is not there as the journal says; begin anew after rm -r .*out\.partial\*"):
        convert(model, target, resume=True)


def test_two_conversions_to_one_place_do_not_disturb_each_other(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    target, others, errors = tmp_path / "out", [], []
    convert(model, tmp_path / "whole")

    def progress(name: str, nbytes: int) -> None:
        if len(others) < 2:
            others.append(name)
            try:
                convert(model, target, resume=len(others) == 2)
            except MachineError as error:
                errors.append(str(error))

    run(model, target, progress=progress)
    assert errors == [f"{journal.path_of(target)}: another conversion writes here now"] * 2
    assert hashes(target) == hashes(tmp_path / "whole") and beside(target) == []


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("to", ["nvfp4", "mxfp4", "q8_0", "sherry", "nvfp4_modelopt"])
def test_bytes_depend_neither_on_threads_nor_on_memory_nor_on_the_order_of_slices(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder(tmp_path / "model", weights(2, rows=256, cols=512 if to == "sherry" else 384))
    conversion.convert(model, tmp_path / "whole", to, memory=10**9)
    want = hashes(tmp_path / "whole")
    honest = work._Work._jobs
    for threads, memory, backwards in itertools.product((1, 2, 5), (800_000, 3_000_000), (False, True)):
        monkeypatch.setenv("PACKFMT_THREADS", str(threads))

        def jobs(self: Any, at: int) -> Iterator[Any]:
            """A step's slices, the last one first, behind what they wait for."""
            found = list(honest(self, at))
            slices = [job for job in found if getattr(job.do, "func", None) == self._do]
            return iter([*(job for job in found if job not in slices), *slices[::-1]])

        monkeypatch.setattr(work._Work, "_jobs", jobs if backwards else honest)
        target = tmp_path / f"{threads}-{memory}-{backwards}"
        conversion.convert(model, target, to, memory=memory)
        assert hashes(target) == want, target.name


# ---------------------------------------------------------------- memory


def peak_of(to: str, source: str, target: str, memory: str) -> None:
    """Prints the most bytes that this process had resident, when it had loaded what encodes, or had converted."""
    for name in MEASURED:
        codecs.get(name).encode(np.ones((256, 256), np.float32))
    if to:
        conversion.convert(source, target, to, memory=int(memory))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


MEASURED = ("mxfp4", "q8_0", "nvfp4", "sherry")
MEMORY = 200_000_000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Of one and of two gigabytes."""
    place = tmp_path_factory.mktemp("checkpoints")
    if shutil.disk_usage(place).free < 5 * 10**9:
        pytest.skip("needs 5 GB of disk")
    for size in ("1GB", "2GB"):
        words = [sys.executable, "tools/make_checkpoint.py", str(place / size), size]
        subprocess.run(words, cwd=ROOT, check=True)
    yield place / "1GB", place / "2GB"
    shutil.rmtree(place)


@slow
@pytest.mark.parametrize("to", MEASURED)
def test_memory_is_bounded_whatever_the_model_s_size(tmp_path: Path, checkpoints: tuple[Path, Path], to: str) -> None:
    def peak(to: str, source: Path, threads: int) -> int:
        target = tmp_path / "out"
        found = int(in_a_fresh_process(peak_of, to, source, target, MEMORY, PACKFMT_THREADS=str(threads)))
        shutil.rmtree(target, ignore_errors=True)
        return found

    idle, most = peak("", checkpoints[0], 1), peak(to, checkpoints[0], 6)
    assert most < idle + 1.3 * MEMORY, (idle, most)
    if to in ("mxfp4", "nvfp4"):  # which has to find the largest magnitude first
        # few threads, so that all hold the most that they do at the same time once, in the smaller one too
        a, b = (peak(to, source, 2) for source in checkpoints)
        assert abs(a - b) < 0.1 * a, (a, b)
