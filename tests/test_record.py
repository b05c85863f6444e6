"""What is converted stands once beside the output, and an output that is whole is known again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packfmt import checkpoint, conversion, verify
from packfmt.cli import run as command
from packfmt.conversion import admission, journal, mark, record, running, tasks, work
from packfmt.conversion.journal import Task
from packfmt.errors import ContainerError, MachineError, MismatchError, PlanError
from packfmt.plan import Plan, Recipe
from tests.converting import beside, hashes, small_slices, weights
from tests.models import folder
from tests.test_tasks import Elsewhere, Here, run

MARKED = pytest.mark.skipif(not hasattr(os, "setxattr"), reason="this system's files have no attributes")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_slices(monkeypatch)
    return folder(tmp_path / "model", weights())


class Stop(Exception):
    """What a test stops a conversion with."""


def stopped(model: Path, target: Path, after: int = 9, **more: Any) -> None:
    """A conversion, or a task of one, that was stopped after so many slices."""
    left = iter(range(after))

    def progress(*_: object) -> None:
        if next(left, None) is None:
            raise Stop

    with pytest.raises(Stop):
        run(model, target, progress=progress, **more)


# ---------------------------------------------------------------- the file


def test_journals_begin_with_the_digest_of_a_file_that_says_what_is_converted(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for n in (1, 2, 3):
        run(model, target, task=Task(n, 3))
    text = (tmp_path / "out.partial.plan").read_bytes()
    assert len(json.loads(text)["plan"]["steps"]) == len(weights())
    for path in journal.paths(target):
        first = path.read_bytes().partition(b"\n")[0]
        assert json.loads(first)["conversion"] == record.digest_of(text)
        assert len(first) < 400 and b"layers" not in first
    conversion.merge(target)
    assert beside(target) == []


def test_many_may_write_the_file_at_the_same_time(tmp_path: Path) -> None:
    """Who looks meanwhile sees all of it, and nothing else is left."""
    target, text = tmp_path / "out", record.text_of({"plan": ["x"] * 100_000})
    digest, seen = record.digest_of(text), []

    def write(n: int) -> None:
        if n % 4 == 3:
            record.path_of(target).unlink(missing_ok=True)
        record.write(target, text)
        seen.append(record.path_of(target).read_bytes())

    record.write(target, text)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, n) for n in range(64) if n % 4 != 3]:
            done.result()
    assert {record.digest_of(found) for found in seen} == {digest} and len(seen) == 48
    assert beside(target) == ["out.partial.plan"]
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        record.path_of(target).unlink()
        list(pool.map(record.write, [target] * 16, [text] * 16))
    assert record.read(target, {digest}) == (digest, json.loads(text)) and beside(target) == ["out.partial.plan"]


@pytest.mark.parametrize("how", ["lost", "cut off", "another one"])
def test_a_file_that_is_lost_or_damaged_is_written_again(model: Path, tmp_path: Path, how: str) -> None:
    run(model, tmp_path / "whole")
    target, path = tmp_path / "out", tmp_path / "out.partial.plan"

    def damage() -> None:
        text = path.read_bytes()
        if how == "lost":
            path.unlink()
        else:
            path.write_bytes(text[:-20] if how == "cut off" else text.replace(b"q_proj", b"r_proj"))

    for n in (1, 2):
        run(model, target, task=Task(n, 2))
    good = path.read_bytes()
    damage()
    before = {p: hashes(p) for p in tmp_path.glob("out*")}
    with pytest.raises(PlanError, match=r"out\.partial\.plan: is lost, damaged or of another conversion; run a task "):
        conversion.merge(target)
    with pytest.raises(
        PlanError, match=r"cannot go on: begun otherwise, and .*out\.partial\.plan does not say how; do as"
    ):
        run(model, target, "mxfp4", task=Task(1, 2), resume=True)
    assert {p: hashes(p) for p in tmp_path.glob("out*")} == before
    (tmp_path / "out.partial.plan.0123.tmp").write_bytes(good[:100])  # as a killed process leaves it
    run(model, target, task=Task(1, 2), resume=True)
    assert path.read_bytes() == good
    damage()
    run(model, target, executor=Here(), tasks=2, resume=True)
    assert hashes(target) == hashes(tmp_path / "whole") and beside(target) == []


def test_a_merge_that_was_killed_with_one_journal_left_is_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    for n in (1, 2):
        run(model, target, task=Task(n, 2))

    def killed(self: journal.Journal, target: Path) -> None:
        for path in journal.paths(target):
            if path != self.path:
                path.unlink()
        record.remove(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(journal.Journal, "remove", killed)
        conversion.merge(target)
    want = hashes(target)
    assert beside(target) == ["out.partial.journal.1of2"]
    assert conversion.merge(target).already
    assert hashes(target) == want and beside(target) == []


def test_who_begins_a_task_reads_only_the_first_lines_of_others_journals(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, asked = tmp_path / "out", []
    run(model, target, task=Task(1, 3))
    honest = journal.read

    def read(path: Path, told: Any = None, lines: int = 0) -> journal.Told:
        asked.append((path.name, lines))
        return honest(path, told, lines)

    monkeypatch.setattr(journal, "read", read)
    run(model, target, task=Task(2, 3))
    run(model, target, task=Task(2, 3), resume=True)
    assert {lines for _, lines in asked} == {1} and "out.partial.journal.1of3" in dict(asked)


# ---------------------------------------------------------------- what was added to the source


def test_a_side_file_that_came_or_went_is_told_where_it_would_be_taken_along(model: Path, tmp_path: Path) -> None:
    target, file = tmp_path / "out", tmp_path / "one.gguf"
    (model / "tokenizer.json").write_text("{}")
    for place in (target, file):
        stopped(model, place)
    (model / "notes.txt").write_text("hello")
    with pytest.raises(PlanError, match=r"cannot go on: side files: notes\.txt was nothing, now 5 bytes; do as before"):
        run(model, target, resume=True)
    run(model, file, resume=True)  # takes none along
    (model / "notes.txt").unlink()
    (model / "tokenizer.json").write_text("{ }")
    with pytest.raises(PlanError, match=r"cannot go on: side files: tokenizer\.json was 2 bytes, now 3 bytes; do as"):
        run(model, target, resume=True)
    (model / "tokenizer.json").write_text("{}")  # at another time
    run(model, target, resume=True)
    run(model, tmp_path / "whole")
    assert hashes(target) == hashes(tmp_path / "whole") and beside(target) == []


def test_a_side_file_that_came_before_the_merge_is_told(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for n in (1, 2):
        run(model, target, task=Task(n, 2))
    (model / "notes.txt").write_text("hello")
    with pytest.raises(
        PlanError, match=r"changed since: side files: notes\.txt was nothing, now 5 bytes; put it back, or begin anew"
    ):
        conversion.merge(target)
    (model / "notes.txt").unlink()
    conversion.merge(target)
    assert not (target / "notes.txt").exists() and beside(target) == []


# ---------------------------------------------------------------- whole already


def seen(target: Path) -> dict[Path, tuple[int, int]]:
    """An output's files, and when each was written."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in [target, *target.rglob("*")]}


@MARKED
@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_what_this_conversion_has_made_already_is_left_as_it_is(model: Path, tmp_path: Path, name: str) -> None:
    target, told, checked = tmp_path / name, dict[str, int](), dict[str, int]()
    first = run(model, target)
    before = seen(target)
    again = run(
        model, target, resume=True, check=True, force=True,
        progress=lambda tensor, nbytes: told.update({tensor: nbytes}),
        checking=lambda total: lambda tensor, nbytes: checked.update({tensor: nbytes}),
    )  # fmt: skip
    assert (again.already, again.bytes, again.plan) == (True, first.bytes, first.plan) and not first.already
    assert seen(target) == before and beside(target) == []
    with checkpoint.open(model) as source:
        assert told == {n: info.nbytes for n, info in source.index.items()} and checked.keys() == told.keys()
    assert run(model, target, task=Task(2, 3), resume=True).already
    assert run(model, target, executor=Here(), tasks=2, resume=True).already
    with pytest.raises(PlanError, match="exists; choose another destination or say --force"):
        run(model, target)
    with pytest.raises(PlanError, match="exists; choose another destination or say --force"):
        run(model, target, "mxfp4", resume=True)
    merged = conversion.merge(target, check=True)
    assert merged.already and merged.plan is None and merged.bytes == first.bytes
    assert seen(target) == before


@MARKED
@pytest.mark.parametrize("change", ["a byte", "a file more", "a copy", "the source"])
def test_an_output_that_may_be_another_one_is_refused_as_ever(model: Path, tmp_path: Path, change: str) -> None:
    target = tmp_path / "out"
    run(model, target)
    if change == "a byte":
        with next(target.glob("*.safetensors")).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
    elif change == "a file more":
        (target / "notes.txt").write_text("hello")
    elif change == "a copy":
        target.rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", target, copy_function=shutil.copyfile)
    else:
        os.utime(model / "model.safetensors", (1, 1))
    before = hashes(target)
    with pytest.raises(PlanError, match="exists; choose another destination or say --force"):
        run(model, target, resume=True)
    if change != "the source":
        with pytest.raises(PlanError, match="is whole already; there is nothing to merge"):
            conversion.merge(target)
    run(model, target, "mxfp4", force=True)
    assert hashes(target) != before


def test_where_files_have_no_attributes_nobody_knows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", unsupported, raising=False)
    run(model, tmp_path / "out")
    assert not mark.made_by(tmp_path / "out")
    with pytest.raises(PlanError, match="exists; choose another destination or say --force"):
        run(model, tmp_path / "out", resume=True)


@MARKED
def test_a_mark_changes_no_byte_and_no_time(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out.gguf")
    found = (tmp_path / "out.gguf").stat()
    mark.put(tmp_path / "out.gguf", "2c26b46b")
    after = (tmp_path / "out.gguf").stat()
    assert (after.st_size, after.st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert mark.made_by(tmp_path / "out.gguf", "2c26b46b") and not mark.made_by(tmp_path / "out.gguf", "2c26b46c")


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_the_only_task_and_merge_are_one_run(model: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    run(model, tmp_path / f"whole-{name}")
    assert run(model, target, task=Task(1, 1)).bytes == 0 and not target.exists()
    with pytest.raises(PlanError, match="1 tasks were begun; say --task I/1"):
        run(model, target, resume=True)
    conversion.merge(target)
    assert hashes(target) == hashes(tmp_path / f"whole-{name}") and beside(target) == []


def test_what_was_begun_without_tasks_is_not_merged(model: Path, tmp_path: Path) -> None:
    stopped(model, tmp_path / "out")
    with pytest.raises(PlanError, match=r"was begun without --task; packfmt convert \.\.\. --resume goes on with it"):
        conversion.merge(tmp_path / "out")
    run(model, tmp_path / "out", resume=True)
    assert beside(tmp_path / "out") == []


def test_asking_again_is_good(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["convert", str(model), str(out), "--to", "q4_0"]
    assert command([*words, "--task", "1/1"]) == 0 and command(["merge", str(out)]) == 0
    if not mark.made_by(out):
        pytest.skip("this file system has no attributes")
    for again in ([*words, "--resume"], ["merge", str(out)]):
        for verified in ("", ", verified"):
            capsys.readouterr()
            assert command([*again, *(["--verify"] if verified else [])]) == 0
            said = capsys.readouterr().out
            assert said.startswith(f"{out}: whole already, ") and said.endswith(f"B{verified}\n"), said
        assert command([*again, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["already"] is True and (told["plan"] is None) == (again[0] == "merge")


# ---------------------------------------------------------------- looked at first


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of every survey."""
    found: list[int] = []
    honest = work.refused

    def refused(plan: Plan, model: Any, which: Any, memory: int) -> Any:
        found.append(len(which))
        assert memory > 0
        return honest(plan, model, which, memory)

    monkeypatch.setattr(running, "refused", refused)
    return found


@pytest.fixture
def ternary(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    exact = {f"layers.{i}.weight": rng.integers(-1, 2, (96, 256)).astype(np.float32) for i in range(4)}
    return folder(tmp_path / "ternary", exact)


def test_the_destination_is_looked_at_before_the_weights(ternary: Path, tmp_path: Path, surveys: list[int]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match="exists; choose another destination"):
        conversion.convert(ternary, tmp_path / "out", "tq2_0", lossless=True)
    with pytest.raises(PlanError, match="no such folder"):
        conversion.convert(ternary, tmp_path / "no" / "out", "tq2_0", lossless=True)
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ContainerError, match="no journal says what it is"):
        conversion.convert(ternary, tmp_path / "new", "tq2_0", lossless=True)
    assert not surveys
    command(["convert", str(ternary), str(tmp_path / "out"), "--to", "tq2_0", "--lossless"])
    assert not surveys
    assert command(["convert", str(ternary), str(tmp_path / "dry"), "--to", "tq2_0", "--lossless", "--dry-run"]) == 0
    assert command(["plan", str(ternary), "--to", "tq2_0", "--lossless"]) == 0
    assert surveys == [4, 4]


def test_weights_are_looked_at_once_for_all_tasks_and_resumes(
    ternary: Path, tmp_path: Path, surveys: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(ternary), str(tmp_path / "out"), "--to", "tq2_0", "--lossless"]
    for n in (3, 1, 2):
        assert command([*words, "--task", f"{n}/3"]) == 0
    assert command([*words, "--task", "2/3", "--resume"]) == 0
    assert command(["merge", str(tmp_path / "out")]) == 0 and surveys == [4]
    conversion.convert(ternary, tmp_path / "one", "tq2_0", lossless=True)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "out") and surveys == [4, 4]
    with checkpoint.open(ternary) as source:
        plan = conversion.plan_for(source, tmp_path / "b", Recipe("tq2_0", lossless=True), survey_now=False)
        conversion.run(plan, source, tmp_path / "b", survey_first=True, executor=Here(), tasks=2)
    assert hashes(tmp_path / "b") == hashes(tmp_path / "out") and surveys == [4] * 3


def test_what_would_lose_something_leaves_nothing(model: Path, tmp_path: Path, surveys: list[int]) -> None:
    assert command(["convert", str(model), str(tmp_path / "out"), "--to", "q8_0", "--lossless", "--task", "1/2"]) == 2
    assert surveys == [9] and not (tmp_path / "out").exists() and beside(tmp_path / "out") == []


# ---------------------------------------------------------------- progress and memory


def test_what_was_done_before_is_told_before_anything_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole")
    for name, more in (("out", {}), ("two", {"task": Task(2, 2)})):
        target, order = tmp_path / name, list[str]()
        stopped(model, target, 20, **more)
        rows = {at for told in journal.all_of(target).values() for at, d in told.done.items() if d.rows}
        honest = work.read
        with monkeypatch.context() as patched:
            patched.setattr(work, "read", lambda *a, honest=honest, order=order: order.append("read") or honest(*a))
            again = {"executor": Here(), "tasks": 2} if more else {}
            run(model, target, resume=True, progress=lambda name, n, order=order: order.append("told"), **again)
        assert order.index("read") == len(rows) > 0
        assert hashes(target) == hashes(tmp_path / "whole")


def test_checking_is_told(model: Path, tmp_path: Path) -> None:
    totals, told = [], dict[str, int]()

    def checking(total: int) -> conversion.Progress:
        totals.append(total)
        return lambda tensor, nbytes: told.update({tensor: told.get(tensor, 0) + nbytes})

    for name in ("out", "one.gguf"):
        told.clear()
        run(model, tmp_path / name, check=True, checking=checking)
        with checkpoint.open(tmp_path / name) as output:
            assert totals.pop() == sum(told.values()) == sum(i.nbytes for i in output.index.values())
    told.clear()
    for n in (1, 2):
        run(model, tmp_path / "two", task=Task(n, 2))
    conversion.merge(tmp_path / "two", check=True, checking=checking)
    assert totals.pop() == sum(told.values()) and not totals


@pytest.mark.parametrize("way", ["convert", "merge"])
def test_checking_is_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str) -> None:
    out = str(tmp_path / "out")
    words = ["convert", str(model), out, "--to", "q4_0", "--json-progress"]
    if way == "merge":
        assert command([*words, "--task", "1/1"]) == 0
        capsys.readouterr()
        words = ["merge", out, "--json-progress"]
    assert command([*words, "--verify"]) == 0
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert last["checking"] is True and last["bytes"] == last["total"] > 0


def test_a_whole_output_that_is_damaged_is_told_and_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "out")
    if not mark.made_by(tmp_path / "out"):
        pytest.skip("this file system has no attributes")
    before = hashes(tmp_path / "out")
    monkeypatch.setattr(verify, "laws", lambda tensor: ["broken"])
    for again in (lambda: run(model, tmp_path / "out", resume=True, check=True), lambda: merged(tmp_path / "out")):
        with pytest.raises(MismatchError, match="verification failed: broken"):
            again()
    assert hashes(tmp_path / "out") == before


def merged(target: Path) -> conversion.Report:
    return conversion.merge(target, check=True)


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes that every task may hold."""
    found: list[int] = []
    honest = tasks.carry_out

    def carry_out(*arguments: Any, memory: int, **more: Any) -> Any:
        found.append(memory)
        return honest(*arguments, memory=memory, **more)

    monkeypatch.setattr(tasks, "carry_out", carry_out)
    return found


def test_workers_take_a_quarter_of_their_own_machine_s_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memories: list[int]
) -> None:
    def there() -> None:
        monkeypatch.setattr(admission, "of_machine", lambda: 80 << 30)

    monkeypatch.setattr(admission, "of_machine", lambda: 1 << 10)  # of who only asks for it
    run(model, tmp_path / "a", executor=Elsewhere(there), tasks=2)
    assert memories == [20 << 30] * 2
    run(model, tmp_path / "b", executor=Here(), tasks=2, memory=5 << 30)
    assert memories[2:] == [5 << 30] * 2
    with pytest.raises(MachineError, match=r"task 1/2: .* bytes are needed at once"):
        run(model, tmp_path / "c", executor=Elsewhere(lambda: small(monkeypatch)), tasks=2)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "of_machine", lambda: 1 << 10)
