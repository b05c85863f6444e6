"""One conversion in several tasks, by whatever runs them: the bytes are those of one run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packfmt import checkpoint, conversion
from packfmt.conversion import running, tasks, work
from packfmt.conversion.journal import Task
from packfmt.errors import ContainerError, LayoutError, MachineError, MismatchError, PlanError
from packfmt.plan import Recipe
from tests.converting import SLICE, beside, hashes, small_slices, weights
from tests.models import folder

SHARD = 60_000
slow = pytest.mark.clients


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", weights())


@pytest.fixture(autouse=True)
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(monkeypatch)


def run(model: Path, target: Path, to: str = "", **more: Any) -> conversion.Report:
    to = to or ("q8_0" if target.suffix == ".gguf" else "nvfp4")
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, target, Recipe(to, max_shard=SHARD))
        return conversion.run(plan, source, target, **more)


def plan_of(model: Path, target: Path) -> conversion.Plan:
    with checkpoint.open(model) as source:
        return conversion.plan_for(source, target, Recipe("nvfp4", max_shard=SHARD))


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 40])
def test_tasks_share_all_steps_in_order(model: Path, tmp_path: Path, count: int) -> None:
    plan = plan_of(model, tmp_path / "out")
    parts = [tasks.share(plan, Task(n, count)) for n in range(1, count + 1)]
    assert [at for part in parts for at in part] == list(range(len(plan.steps)))


def test_a_task_ends_with_a_file_where_one_ends_nearby(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", {f"{i}.weight": np.ones((64, 64), np.float32) for i in range(64)})
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, tmp_path / "out", Recipe("q8_0", max_shard=21 * 64 * 68))
    assert [tasks.share(plan, Task(n, 3)).stop for n in (1, 2, 3)] == [21, 42, 64]


@pytest.mark.parametrize("name", ["out", "out.gguf"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_tasks_in_any_order_and_merge_are_one_run(model: Path, tmp_path: Path, name: str, count: int) -> None:
    whole, target = tmp_path / f"whole-{name}", tmp_path / name
    one = run(model, whole)
    order = list(range(1, count + 1))
    random.Random(count).shuffle(order)
    for n in order:
        assert run(model, target, task=Task(n, count)).bytes == 0
        assert not target.exists()
    report = conversion.merge(target, check=True)
    assert hashes(target) == hashes(whole) and beside(target) == []
    assert (report.plan, report.bytes, report.source_bytes) == (one.plan, one.bytes, one.source_bytes)
    assert report.remarks == one.remarks


def test_tasks_at_the_same_time_in_processes_of_their_own_are_one_run(model: Path, tmp_path: Path) -> None:
    for name in ("out", "one.gguf"):
        run(model, tmp_path / f"whole-{name}")
    started = [
        multiprocessing.get_context("spawn").Process(target=run, args=(model, tmp_path / name), kwargs={"task": task})
        for name in ("out", "one.gguf")
        for task in (Task(2, 2), Task(1, 2))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    for name in ("out", "one.gguf"):
        conversion.merge(tmp_path / name)
        assert hashes(tmp_path / name) == hashes(tmp_path / f"whole-{name}") and beside(tmp_path / name) == []


def test_a_task_that_is_missing_or_unfinished_is_named(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(PlanError, match=r"no task has written here; run packfmt convert \.\.\. --task 1/N first"):
        conversion.merge(target)
    run(model, target, task=Task(1, 3))
    run(model, target, task=Task(3, 3))
    with pytest.raises(PlanError, match=r"task 2/3 has not begun; run it with --task 2/3"):
        conversion.merge(target)
    with pytest.raises(KeyboardInterrupt):
        run(model, target, task=Task(2, 3), progress=interrupting(3))
    with pytest.raises(PlanError, match=r"task 2/3 is not done: \S+ is missing; run it with --task 2/3 --resume"):
        conversion.merge(target)
    with pytest.raises(ContainerError, match="this task was begun already; --resume goes on with it"):
        run(model, target, task=Task(2, 3))
    run(model, target, task=Task(2, 3), resume=True)
    run(model, target, task=Task(2, 3), resume=True)  # nothing is left to do
    conversion.merge(target)
    run(model, tmp_path / "whole")
    assert hashes(target) == hashes(tmp_path / "whole") and beside(target) == []


def test_a_task_of_another_plan_is_refused(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(model, target, task=Task(1, 2))
    with pytest.raises(PlanError, match=r"cannot go on: plan: steps: \S+: to was nvfp4, now q8_0; do as before, or"):
        run(model, target, "q8_0", task=Task(2, 2))
    with pytest.raises(PlanError, match="2 tasks were begun; say --task I/2"):
        run(model, target, task=Task(2, 3))
    with pytest.raises(PlanError, match="2 tasks were begun; say --task I/2"):
        run(model, target, resume=True)
    run(model, tmp_path / "other", "q8_0", task=Task(2, 2))  # as if both had begun at once
    shutil.move(tmp_path / "other.partial.journal.2of2", tmp_path / "out.partial.journal.2of2")
    with pytest.raises(PlanError, match=r"task 2/2 is of another conversion: .*; do it again|2of2: cannot go on: "):
        conversion.merge(target)
    assert not target.exists() and (tmp_path / "out.partial").is_dir()


def test_the_source_may_not_change_between_tasks_and_merge(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for n in (1, 2):
        run(model, target, task=Task(n, 2))
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(PlanError, match=r"the source has changed since: .*model\.safetensors was .* bytes of 20.*now"):
        conversion.merge(target)
    assert (tmp_path / "out.partial").is_dir()


def test_merge_replaces_only_when_forced_and_checks_what_it_is_told_to(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    for n in (1, 2):
        run(model, target, task=Task(n, 2))
    target.write_bytes(b"mine")
    with pytest.raises(PlanError, match="exists; choose another destination or say --force"):
        conversion.merge(target)
    assert target.read_bytes() == b"mine"
    with (tmp_path / "out.gguf.partial").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(range(100)))
    with pytest.raises((ContainerError, MismatchError), match="are not those that were written"):
        conversion.merge(target, force=True, check=True)
    assert target.read_bytes() == b"mine" and beside(target) == []


def test_a_merge_that_was_killed_when_it_had_given_the_name_is_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call, name in (("merge", "a"), ("merge", "a.gguf"), ("resume", "b")):
        target, count = tmp_path / name, 2 if call == "merge" else 1
        run(model, tmp_path / f"whole-{name}")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(running, "_tidy", interrupting(1))
            for n in range(1, count + 1):
                run(model, target, task=Task(n, count))
            conversion.merge(target)
        want = hashes(target)
        assert want == hashes(tmp_path / f"whole-{name}") and len(beside(target)) == count + 1
        if call == "resume":
            with pytest.raises(
                PlanError, match=r"whole, but of another conversion: plan: .*; remove .*b\.partial\.journal"
            ):
                run(model, target, "q8_0", resume=True, force=True)
        report = conversion.merge(target) if call == "merge" else run(model, target, resume=True)
        assert hashes(target) == want and beside(target) == [] and report.bytes > 0


def test_an_old_output_is_not_taken_for_the_one_that_the_journal_is_of(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    for n in (1, 2):
        run(model, target, task=Task(n, 2))
    (tmp_path / "out.gguf.partial").unlink()  # by hand, with all the work in it
    target.write_bytes(b"mine")
    with pytest.raises(PlanError, match=r"out\.gguf\.partial: is not there as the journal says"):
        conversion.merge(target, force=True)
    assert target.read_bytes() == b"mine"


def interrupting(after: int) -> Any:
    """Is as if ctrl-C was pressed at this call."""
    count = itertools.count(1)

    def progress(*_: object) -> None:
        if next(count) == after:
            raise KeyboardInterrupt

    return progress


# ---------------------------------------------------------------- executors


class Here(Executor):
    """Does everything at once, in this process."""

    def submit(self, do: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(do(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_an_executor_gives_the_bytes_of_one_run_and_progress_adds_up(model: Path, tmp_path: Path, name: str) -> None:
    whole, target = tmp_path / f"whole-{name}", tmp_path / name
    one = run(model, whole)
    told: dict[str, int] = {}

    def progress(tensor: str, nbytes: int) -> None:
        told[tensor] = told.get(tensor, 0) + nbytes

    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        report = run(model, target, executor=pool, tasks=5, progress=progress, check=True)
    assert hashes(target) == hashes(whole) and beside(target) == []
    assert (report.plan, report.bytes, report.remarks) == (one.plan, one.bytes, one.remarks)
    with checkpoint.open(model) as source:
        assert told == {name: info.nbytes for name, info in source.index.items()}


def test_what_cannot_be_encoded_is_told_as_alone_and_nothing_is_left(tmp_path: Path) -> None:
    bad = weights()
    first, second = sorted(bad)[3], sorted(bad)[-2]
    bad[first][5, 7] = bad[second][5, 7] = np.nan
    model, target = folder(tmp_path / "model", bad), tmp_path / "out"
    with pytest.raises(LayoutError) as alone:
        run(model, target)
    assert first in str(alone.value)
    with pytest.raises(LayoutError) as error:
        run(model, target, executor=Here(), tasks=3)
    assert str(error.value) == str(alone.value)
    assert not target.exists() and beside(target) == []


def test_what_is_left_of_others_is_not_touched_by_an_executor(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(model, target, task=Task(2, 5))
    with pytest.raises(ContainerError, match="--resume goes on with it"):
        run(model, target, executor=Here(), tasks=5)
    with pytest.raises(PlanError, match="5 tasks were begun"):
        run(model, target, executor=Here(), tasks=4, resume=True)
    run(model, target, executor=Here(), tasks=5, resume=True)
    run(model, tmp_path / "whole")
    assert hashes(target) == hashes(tmp_path / "whole") and beside(target) == []


class Killed(Here):
    """A pool one of whose workers is killed in its third task."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, do: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        self.count += 1
        if self.count < 3:
            return super().submit(do, *arguments, **named)
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("a process in the pool was terminated abruptly"))
        return future


def test_a_pool_that_breaks_is_one_line_and_gone_on_with(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(MachineError, match=r"out: a worker failed: RuntimeError: a process .*; --resume goes on"):
        run(model, target, executor=Killed(), tasks=4)
    assert len(beside(target)) == 4
    run(model, target, executor=Here(), tasks=4, resume=True)
    run(model, tmp_path / "whole")
    assert hashes(target) == hashes(tmp_path / "whole") and beside(target) == []


def slowed_down() -> None:
    """In a worker: work takes some seconds."""
    work.ROOM, work.NOTED, honest = SLICE, 0.02, work.apply

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.03)
        return honest(*arguments)

    work.apply = slowly


@slow
@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_dask_cluster_whose_workers_are_killed_gives_the_bytes_of_one_run(
    model: Path, tmp_path: Path, name: str
) -> None:
    distributed = pytest.importorskip("distributed", reason="needs Dask's scheduler: packfmt's extra dask")
    whole, target, told, killed = tmp_path / f"whole-{name}", tmp_path / name, dict[str, int](), list[int]()
    run(model, whole)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(slowed_down)
        pids = list(client.run(os.getpid).values())

        def progress(tensor: str, nbytes: int) -> None:
            told[tensor] = told.get(tensor, 0) + nbytes
            if len(killed) < len(pids) and len(told) > 3 * len(killed):
                assert not target.exists() and beside(target)
                os.kill(pids[len(killed)], signal.SIGKILL)
                killed.append(pids[len(killed)])

        run(model, target, executor=client.get_executor(pure=False, retries=3), tasks=5, progress=progress)
    assert killed == pids
    assert hashes(target) == hashes(whole) and beside(target) == []
    with checkpoint.open(model) as source:
        assert told == {name: info.nbytes for name, info in source.index.items()}


@slow
def test_what_cannot_be_encoded_ends_the_tasks_of_a_dask_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs Dask's scheduler: packfmt's extra dask")
    bad = weights()
    bad[max(bad)][5, 7] = np.nan
    model, target = folder(tmp_path / "model", bad), tmp_path / "out"
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
        pytest.raises(LayoutError, match=max(bad)),
    ):
        client.run(slowed_down)
        run(model, target, executor=client.get_executor(pure=False, retries=3), tasks=5)
    assert not target.exists() and beside(target) == []


# ---------------------------------------------------------------- workers that are not like the others


class Elsewhere(Here):
    """What `first` does, workers find there when they begin."""

    def __init__(self, first: Callable[[], None]) -> None:
        self.first = first

    def submit(self, do: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        self.first()
        return super().submit(do, *arguments, **named)


def test_a_worker_that_sees_another_source_is_refused_and_nothing_is_lost(model: Path, tmp_path: Path) -> None:
    target, file = tmp_path / "out", model / "model.safetensors"
    with pytest.raises(MachineError, match=r"cannot go on: source: .*model\.safetensors was "):
        run(model, target, executor=Elsewhere(lambda: os.utime(file, (1, 1))), tasks=2)
    assert "out.partial.journal.1of2" in beside(target)


def test_a_worker_of_another_packfmt_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> None:
        monkeypatch.setattr(tasks, "version", lambda: "99.0")

    with pytest.raises(MachineError, match=r"cannot go on: packfmt was .*, now 99\.0"):
        run(model, tmp_path / "out", executor=Elsewhere(other), tasks=2)


def test_tasks_of_one_packfmt_are_not_merged_by_another(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    for n in (1, 2):
        run(model, target, task=Task(n, 2))
    monkeypatch.setattr(tasks, "version", lambda: "99.0")
    with pytest.raises(MachineError, match=r"cannot go on: packfmt was .*, now 99\.0"):
        conversion.merge(target)
    monkeypatch.undo()
    conversion.merge(target)
    assert target.is_dir()


def test_a_late_worker_writes_nothing_where_all_was_removed(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(MachineError, match="was removed, or is not seen from here"):
        run(model, target, executor=Elsewhere(lambda: shutil.rmtree(tmp_path / "out.partial", True)), tasks=2)
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_is_rewritten_while_it_is_read_gives_nothing(model: Path, tmp_path: Path) -> None:
    def rewrite(name: str, nbytes: int) -> None:
        os.utime(model / "model.safetensors", (1, 1))

    with pytest.raises(ContainerError, match="the source changed while it was read"):
        run(model, tmp_path / "out", progress=rewrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
