"""Conversion at any size as a user types it: memory, tasks, a cluster, progress, interruptions, and the wrong uses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from packfmt.cli import run, show
from packfmt.cli.options import size_of
from packfmt.conversion import tasks
from tests.models import folder, normal, tensors

SIZE = 4 * (96 * 256 + 64 * 256 + 64 + 256 + 32 * 256 + 4 * 32 * 256 + 8 * 8 * 3) + 8 * 7  # of `tensors()`, in bytes


SLOWLY = """
import time
from packfmt.checkpoint import Checkpoint
from packfmt.conversion import work
work.NOTED = 0.1
Checkpoint.__getitem__ = lambda *which, read=Checkpoint.__getitem__: time.sleep(0.1) or read(*which)
"""  # a journal soon has something to say, and there is more to do
HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}  # wherever a process stands


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model")


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed conversion to q4_0."""
    assert run(["convert", str(model), str(tmp_path / "whole"), "--to", "q4_0"]) == 0
    return files(tmp_path / "whole")


def files(place: Path) -> dict[str, bytes]:
    return {str(f.relative_to(place)): f.read_bytes() for f in sorted(place.rglob("*")) if f.is_file()}


class Said:
    """What one command printed, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        capsys.readouterr()
        self.code = run([str(a) for a in arguments])
        self.out, self.err = capsys.readouterr()


def layers(place: Path) -> Path:
    """A model of 24 matrices."""
    return folder(place, {f"layers.{i}.mlp.up_proj.weight": normal(64, 256, seed=i) for i in range(24)})


def begun(target: Path, *words: str) -> subprocess.Popen[str]:
    """The command in a process of its own, a slow one, when a part of it is done."""
    code, pipe = f"{SLOWLY}\nfrom packfmt.cli import main\nmain()", subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code, *words], env=HERE, stdout=pipe, stderr=pipe, text=True)
    journals = f"{target.name}.partial.journal*"
    while child.poll() is None and all(p.read_bytes().count(b"\n") < 2 for p in target.parent.glob(journals)):
        time.sleep(0.01)
    return child


# ---------------------------------------------------------------- sizes and wrong uses


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("1GiB", 1 << 30),
        ("1.5 GiB", 3 << 29),
        ("64Ki", 1 << 16),
        ("1k", 1000),
        ("1K", 1000),
        (".5TB", 5 * 10**11),
        ("2_000_000", 2_000_000),
        ("0.1GB", 10**8),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, nbytes: int) -> None:
    assert size_of(text, "--memory") == nbytes


@pytest.mark.parametrize("text", ["0", "-1", "abc", "0.4", "0GiB", "1.2.3GB", "5XB", "1e9", "1__0", "GB", "", "٣GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=f"^{re.escape(repr(text))} is not a size such as 5GB, 500MB or 1GiB$"):
        size_of(text, "--memory")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert {model} {out} --to q4_0 --memory 0", "--memory: '0' is not a size such as 5GB, 500MB or 1GiB"),
        ("convert {model} {out} --to q4_0 --memory -1", "--memory: '-1' is not a size"),
        ("convert {model} {out} --to q4_0 --memory abc", "--memory: 'abc' is not a size"),
        ("convert {model} {out} --to q4_0 --memory 9", "bytes are needed at once, --memory 9 are fewer"),
        ("convert {model} {out} --to q4_0 --memory 9 --dry-run", "bytes are needed at once, --memory 9 are fewer"),
        ("plan {model} --to q4_0 --memory 9", "bytes are needed at once, --memory 9 are fewer"),
        ("decode {model} {out} --memory 0", "--memory: '0' is not a size"),
        ("convert {model} {out} --to q4_0 --task 0/4", "--task: '0/4' is not I/N with I from 1 to N, such as 2/4"),
        ("convert {model} {out} --to q4_0 --task 5/4", "--task: '5/4' is not I/N"),
        ("convert {model} {out} --to q4_0 --task x", "--task: 'x' is not I/N"),
        ("convert {model} {out} --to q4_0 --task 1/", "--task: '1/' is not I/N"),
        ("convert {model} {out} --to q4_0 --task -1/4", "--task: '-1/4' is not I/N"),
        (
            "convert {model} {out} --to q4_0 --task 1/4 --scheduler tcp://x:1",
            "--task: a scheduler's workers do all tasks; leave one of both out",
        ),
        (
            "convert {model} {out} --to q4_0 --task 1/4 --verify",
            "--verify: a part cannot be verified; say packfmt merge --verify",
        ),
        ("convert {model} {out} --to q4_0 --tasks 4", "--tasks: needs --scheduler ADDRESS; else say --task I/N"),
        ("convert {model} {out} --to q4_0 --tasks 0 --scheduler tcp://x:1", "Invalid value for '--tasks'"),
        (
            "convert {model} {out} --to q4_0 --resume --dry-run",
            "--resume: nothing is done in a dry run; leave one of both out",
        ),
        ("convert {model} {out} --to q4_0 --task 1/4 --dry-run", "--task: nothing is done in a dry run"),
        (
            "convert {model} {out} --to q4_0 --scheduler tcp://x:1 --dry-run",
            "--scheduler: nothing is done in a dry run",
        ),
        ("merge {out}", "{out}: no task has written here; run packfmt convert ... --task 1/N first"),
        ("merge {model}", "{model}: is whole already; there is nothing to merge"),
        ("merge", "Missing argument"),
    ],
)
def test_a_wrong_use_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    places = {"model": model, "out": tmp_path / "out"}
    said = Said(capsys, *words.format(**places).split())
    assert (said.code, said.out) == (2, ""), said.err
    assert message.format(**places) in said.err and said.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------- what is needed


def test_a_plan_says_what_disk_and_memory_it_needs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, bytes]
) -> None:
    said = Said(capsys, "plan", model, "--to", "q4_0", "--memory", "1GiB", "--json")
    needs = json.loads(said.out)["needs"]
    assert needs["free"] is None and needs["memory"] == 1 << 30
    assert needs["disk"] == sum(map(len, whole.values())) - len(whole["config.json"])  # which is written anew
    least = needs["least_memory"]
    assert Said(capsys, "plan", model, "--to", "q4_0", "--memory", least).code == 0
    assert Said(capsys, "plan", model, "--to", "q4_0", "--memory", least - 1).code == 2
    dry = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0", "--memory", "1GiB", "--dry-run")
    written, memory = dry.out.splitlines()[-2:]
    assert re.fullmatch(rf"{model}: [\d.]+ kB to be written as safetensors, [\d.]+ [MGT]B are free", written)
    assert memory == f"memory: {show.size(least)} at least, --memory says 1.07 GB"
    assert Said(capsys, "plan", model, "--to", "q4_0").out.splitlines()[-2].endswith("to be written as safetensors")


def test_a_plan_says_that_the_disk_is_too_small(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda place: Disk)
    dry = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0", "--dry-run")
    assert dry.code == 0 and ", 1 kB are free (too few)\n" in dry.out
    said = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0")
    assert said.code == 3 and said.err.count("\n") == 1 and "1,000 bytes free, this conversion needs" in said.err


# ---------------------------------------------------------------- tasks


def test_tasks_in_any_order_and_merge_make_what_one_run_makes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    for task in ("3/4", "1/4", "4/4", "2/4"):
        said = Said(capsys, "convert", model, out, "--to", "q4_0", "--task", task)
        assert said.code == 0 and re.fullmatch(
            rf"task {task} is done, [\d.]+ s; when all are: packfmt merge {out}\n", said.out
        )
        assert not out.exists()
    said = Said(capsys, "merge", out, "--verify")
    assert said.code == 0 and said.err == "" and said.out.endswith(" s, verified\n")
    assert "quantise (lossy)" in said.out and said.out.splitlines()[-1].startswith(f"{out}: ")
    assert files(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


def test_tasks_and_merge_in_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    for task in ("1/2", "2/2"):
        told = json.loads(Said(capsys, "convert", model, out, "--to", "q4_0", "--task", task, "--json").out)
        assert (told["path"], told["task"], told["bytes"]) == (str(out), task, 0)
    told = json.loads(Said(capsys, "merge", out, "--json").out)
    assert told["bytes"] == out.stat().st_size and told["source_bytes"] == SIZE and "task" not in told
    assert len(told["plan"]["steps"]) == len(tensors())


def test_merge_while_a_task_is_missing_says_which_and_spoils_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    assert Said(capsys, "convert", model, out, "--to", "q4_0", "--task", "1/2").code == 0
    said = Said(capsys, "merge", out)
    assert (said.code, said.out, said.err) == (
        2,
        "",
        f"packfmt: {out}: task 2/2 has not begun; run it with --task 2/2\n",
    )
    assert Said(capsys, "convert", model, out, "--to", "q4_0", "--task", "2/2").code == 0
    assert Said(capsys, "merge", out).code == 0 and files(out) == whole


def test_merge_replaces_an_output_only_by_force(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    for task in ("1/2", "2/2"):
        assert Said(capsys, "convert", model, out, "--to", "q4_0", "--task", task).code == 0
    assert run(["convert", str(model), str(tmp_path / "older"), "--to", "q8_0"]) == 0
    (tmp_path / "older").rename(out)
    said = Said(capsys, "merge", out)
    assert said.code == 2 and said.err.count("\n") == 1 and "say --force to replace it" in said.err
    assert Said(capsys, "merge", out, "--force").code == 0 and files(out) == whole


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a shell")
def test_the_commands_of_the_readme_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text()
    section = page.partition("## Any size\n")[2].partition("\n## ")[0]
    commands = [line for line in section.splitlines() if line.startswith("    ") and "--scheduler" not in line]
    folder(tmp_path / "model")
    # the second and the third make the same output
    text = "\n".join(["set -e", f'packfmt() {{ "{sys.executable}" -m packfmt "$@"; }}', *commands])
    text = text.replace(commands[2], f"mv out first\n{commands[2]}\nmv out second")
    done = subprocess.run(["sh", "-c", text], cwd=tmp_path, env=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(commands) == 5 and done.stdout.endswith(", verified\n")
    assert files(tmp_path / "first") == files(tmp_path / "second") == files(tmp_path / "out")


# ---------------------------------------------------------------- stopped, and gone on with


def stopped(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """Let the next conversions fail when so many pieces have been written."""
    from packfmt.exporters import output

    written, left = output.write_at, [after]

    def write_at(*arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        written(*arguments)

    monkeypatch.setattr(output, "write_at", write_at)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            3,
            "{out}: the disk is full; make room; what is done lies in {out}.partial",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            3,
            "{out}: permission denied; change who may read and write there",
        ),
        (KeyboardInterrupt(), 130, "interrupted; what is done lies in {out}.partial, --resume goes on"),
    ],
)
def test_a_stopped_conversion_says_in_one_line_that_it_can_go_on_and_does(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, bytes], error: BaseException, code: int, message: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    words = ["convert", model, out, "--to", "q4_0", "--memory", "1MB"]
    with monkeypatch.context() as patch:
        stopped(patch, error, after=4)
        said = Said(capsys, *words)
    assert (said.code, said.out) == (code, "") and said.err.count("\n") == 1
    assert message.format(out=out) in said.err and "--resume goes on" in said.err
    assert not out.exists() and (tmp_path / "out.partial").exists()
    again = Said(capsys, *words)
    assert again.code == 3 and again.err.count("\n") == 1 and "--resume" in again.err
    assert Said(capsys, *words, "--resume").code == 0 and files(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


def test_a_source_that_is_cut_off_meanwhile_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, bytes],
) -> None:  # fmt: skip
    source, carry_out = model / "model.safetensors", tasks.carry_out
    good, when = source.read_bytes(), source.stat()

    def cut_off(*arguments: object, **more: object) -> object:
        os.truncate(source, len(good) // 2)
        return carry_out(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "carry_out", cut_off)
        said = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0")
    assert said.code == 3 and said.err.count("\n") == 1 and "model.safetensors" in said.err
    source.write_bytes(good)
    os.utime(source, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0", "--resume").code == 0
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize(("words", "part"), [("convert", []), ("convert", ["--task", "1/2"])])
def test_another_recipe_cannot_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: str, part: list[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped(patch, OSError(errno.ENOSPC, "No space left on device"), after=2)
        assert Said(capsys, words, model, out, "--to", "q4_0", *part).code == 3
    said = Said(capsys, words, model, out, "--to", "q8_0", *part, "--resume")
    assert (said.code, said.out) == (2, "") and said.err.count("\n") == 1
    assert "cannot go on" in said.err and "was q4_0, now q8_0" in said.err
    assert Said(capsys, words, model, out, "--to", "q4_0", *part, "--resume").code == 0


def test_decode_goes_on_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, bytes],
) -> None:  # fmt: skip
    assert run(["decode", str(tmp_path / "whole"), str(tmp_path / "dense")]) == 0
    with monkeypatch.context() as patch:
        stopped(patch, KeyboardInterrupt(), after=3)
        said = Said(capsys, "decode", tmp_path / "whole", tmp_path / "out")
    assert (said.code, said.err.count("\n")) == (130, 1) and "--resume goes on" in said.err
    words = ["decode", tmp_path / "whole", tmp_path / "out", "--resume", "--memory", "1MB", "--json-progress"]
    said = Said(capsys, *words)
    assert said.code == 0 and json.loads(said.err.splitlines()[-1])["bytes"] > 0
    assert files(tmp_path / "out") == files(tmp_path / "dense")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_conversion_which_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sign: signal.Signals
) -> None:
    words = ["convert", str(layers(tmp_path / "model")), str(tmp_path / "out"), "--to", "q4_0"]
    child = begun(tmp_path / "out", *words)
    child.send_signal(sign)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert err == f"packfmt: interrupted; what is done lies in {tmp_path}/out.partial, --resume goes on\n"
    assert not (tmp_path / "out").exists()
    said = Said(capsys, *words, "--resume", "--json-progress")
    told = [json.loads(line) for line in said.err.splitlines()]
    assert said.code == 0 and told[-1]["bytes"] == told[-1]["total"] == 24 * 64 * 256 * 4
    assert run(["convert", str(tmp_path / "model"), str(tmp_path / "whole"), "--to", "q4_0"]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# ---------------------------------------------------------------- a cluster


def test_without_dask_a_scheduler_is_refused_with_what_to_install(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0", "--scheduler", "tcp://x:1")
    assert said.code == 3
    assert said.err == "packfmt: --scheduler: Dask is not installed; pip install 'packfmt[dask]'\n"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:1", "127.0.0.1:port", "xyz://127.0.0.1:1", ""])
def test_where_no_scheduler_answers_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("packfmt.cli.cluster.PATIENCE", 1)
    said = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0", "--scheduler", address)
    assert said.code == 3
    assert said.err == f"packfmt: {address!r}: no Dask scheduler answers there, such as at tcp://10.0.0.1:8786\n"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@contextlib.contextmanager
def cluster(workers: int, place: Path) -> Iterator[str]:
    """The address of a Dask cluster on this machine, in processes of their own that stand elsewhere."""
    code = f"""
import sys, dask, distributed
if __name__ == "__main__":
    dask.config.set({{"distributed.scheduler.allowed-failures": 0, "distributed.worker.preload": [{SLOWLY!r}]}})
    made = distributed.LocalCluster({workers}, threads_per_worker=1, dashboard_address=None)
    print(made.scheduler_address, flush=True)
    sys.stdin.read()
"""
    words, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(
        words, cwd=place, env=HERE, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout and process.stdin
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


@pytest.mark.clients
def test_a_cluster_makes_what_one_run_makes_and_a_killed_worker_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    assert run(["convert", str(layers(tmp_path / "model")), str(tmp_path / "whole"), "--to", "q4_0"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with cluster(2, tmp_path / "elsewhere") as address:
        words = ["convert", "model", "out", "--to", "q4_0", "--scheduler", address]
        with distributed.Client(address) as client:
            worker = next(iter(client.run(os.getpid).values()))
        child = begun(tmp_path / "out", *words)
        until = time.monotonic() + 60  # the first journal is not a worker's
        while len(list(tmp_path.glob("out.partial.journal.*"))) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(worker, signal.SIGKILL)
        out, err = child.communicate(timeout=240)
        assert (child.returncode, out) == (3, "") and err.count("\n") == 1, err
        assert "a worker failed: KilledWorker" in err and "--resume goes on" in err
        said = Said(capsys, *words, "--resume", "--json-progress")
        assert said.code == 0, said.err
        told = json.loads(said.err.splitlines()[-1])
        assert told["bytes"] == told["total"] == 24 * 64 * 256 * 4
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "model", "out", "whole"]
    assert not list((tmp_path / "elsewhere").iterdir())


# ---------------------------------------------------------------- progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_a_meter_knows_rate_and_time_left_and_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = show.Meter(10_000)
    assert (meter.rate, meter.left, str(meter)) == (None, None, "0 B of 10 kB  ")
    for _ in range(4):  # at once: done by an earlier run
        meter.add("a", 1000)
        clock.now += 0.1
    for _ in range(4):  # too few to know
        told = {"bytes": meter.done, "total": 10_000, "rate": None, "seconds_left": None}
        assert meter.to_json() == {**told, "tensor": meter.tensor, "checking": False}
        assert str(meter) == f"{show.size(meter.done)} of 10 kB  {meter.tensor}"
        clock.now += 2
        meter.add("b", 1000)
    assert (meter.rate, meter.left) == (500, 4)  # since the first of these
    assert str(meter) == "8 kB of 10 kB  500 B/s  4 s left  b"
    told = {"bytes": 8000, "total": 10_000, "rate": 500, "seconds_left": 4.0}
    assert meter.to_json() == {**told, "tensor": "b", "checking": False}
    for _ in range(40):  # slower now: of the first seconds nothing is left in the rate
        clock.now += 1
        meter.add("c", 10)
    assert meter.rate == pytest.approx(10)
    clock.now += 100  # as far apart as samples may be, there are enough of them
    meter.add("c", 10)
    assert meter.rate is not None
    meter.add("d", 99_999)
    assert (meter.done, meter.left) == (10_000, 0)


@pytest.mark.parametrize("every", [0.1, 0.5, 2.0])
def test_no_rate_is_wild(monkeypatch: pytest.MonkeyPatch, every: float) -> None:
    """A lot was done before, and the rest is told of in pieces, as journals are: each rate is near the true one."""
    clock = Clock(monkeypatch)
    meter, rates = show.Meter(10**9), []
    for _ in range(60_000):
        meter.add("a", 10_000)
        clock.now += 2e-6
    clock.now += 20  # until workers have begun
    for at in range(int(30 / every)):
        clock.now += every
        for _ in range(10):
            meter.add("b", round(100 * every))
            clock.now += 1e-5
        if meter.rate is not None and at:
            rates.append(meter.rate)
    assert rates and min(rates) > 900 and max(rates) < 1100


def test_json_progress_is_a_line_a_second_and_a_last_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with show.progress(100, as_lines_of_json=True) as done:
        for _ in range(100):
            clock.now += 1 / 16
            done("a.weight", 1)
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [t["bytes"] for t in told] == [16, 32, 48, 64, 80, 96, 100]
    assert [t["rate"] for t in told] == [None] * 3 + [16] * 4
    assert [t["seconds_left"] for t in told[-2:]] == [0.2, 0.0]
    assert told[-1].keys() == {"bytes", "total", "rate", "seconds_left", "tensor", "checking"}
    with pytest.raises(ValueError), show.progress(100, as_lines_of_json=True) as done:
        done("a.weight", 7)
        raise ValueError
    assert json.loads(capsys.readouterr().err)["bytes"] == 7


def test_json_progress_and_json_go_to_different_places(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0", "--json", "--json-progress")
    last = json.loads(said.err.splitlines()[-1])
    assert last["bytes"] == last["total"] == json.loads(said.out)["source_bytes"] == SIZE
    parts = []
    for task in ("1/2", "2/2"):
        said = Said(capsys, "convert", model, tmp_path / "two", "--to", "q4_0", "--task", task, "--json-progress")
        last = json.loads(said.err.splitlines()[-1])
        assert last["bytes"] == last["total"] > 0
        parts.append(last["total"])
    assert sum(parts) == SIZE


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    clock = Clock(monkeypatch)
    with show.progress(100) as done:
        for _ in range(10):
            clock.now += 1
            done("a.weight", 10)
    assert capsys.readouterr().err.splitlines() == [
        " 50%  50 B of 100 B  10 B/s  5 s left  a.weight",
        "100%  100 B of 100 B  10 B/s  0 s left  a.weight",
    ]


def test_durations_read_well() -> None:
    assert [show.duration(s) for s in (0, 99, 100, 3600, 5999, 6000, 90_000)] == [
        "0 s",
        "99 s",
        "2 min",
        "60 min",
        "100 min",
        "1.67 h",
        "25 h",
    ]
