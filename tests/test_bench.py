"""packfmt bench: that everybody multiplies the same weight, takes turns, and is told of in a table, JSON and a plot."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import packfmt
from packfmt import bench, codecs
from packfmt.bench import measure, peers, plot, report
from packfmt.cli import benching
from packfmt.errors import MachineError, PlanError
from tests.test_cli import Said

TINY = ("--shape", "64x256", "--footprint", "100kB", "--seconds", "0.01", "--threads", "1")
SIZE = bench.Size(64, 256, 100_000)
WEIGHT = bench.repeat(bench.weight_strip(SIZE), SIZE.rows)


class Slow:
    """A contestant that only notes when it is called."""

    name, kind, nbytes, copies, group = "slow", "", 1, 3, 2

    def __init__(self, log: list[tuple[Any, int]]) -> None:
        self.log = log

    def begin(self, x: Any, threads: int) -> None:
        pass

    def call(self, turn: int) -> None:
        self.log.append((self, turn))

    def answer(self, copy: int) -> Any:
        return None

    def close(self) -> None:
        self.log.append((self, -1))


def made(name: str, kind: str = "mxfp4", size: bench.Size = SIZE) -> bench.Contestant:
    try:
        return peers.PEERS[name](size, kind)
    except MachineError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", peers.PEERS)
def test_every_copy_of_every_peer_multiplies_the_weight(name: str, batch: int) -> None:
    peer = made(name)
    try:
        x = bench.activations(batch, SIZE.cols)
        for threads in (1, 2):
            peer.begin(x, threads)
            answers = [peer.answer(copy) for copy in range(peer.copies)]
            assert len({a.tobytes() for a in answers}) == 1 and peer.copies > 1
            exact, found = (x @ WEIGHT.T).ravel(), answers[0].ravel()
            assert answers[0].shape == (batch, SIZE.rows)
            assert exact @ found > 0.98 * np.linalg.norm(exact) * np.linalg.norm(found)
    finally:
        peer.close()


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "mxfp4", "nvfp4", "q4_0", "q8_0", "bf16"])
def test_ggml_multiplies_every_type_that_a_default_layout_is_compared_with(kind: str) -> None:
    peer = made("ggml", kind)
    try:
        encoder = "ggml" if "ggml" in codecs.get(kind).encoders else ""
        packed = packfmt.pack(WEIGHT, kind, encoder)
        assert peer.nbytes == packed.nbytes - 4 * (kind == "nvfp4")  # whose scale of the tensor is a tensor of its own
        x = bench.activations(2, SIZE.cols)
        peer.begin(x, 1)
        exact, found = (x @ packed.decode().T).ravel(), peer.answer(0).ravel()
        assert exact @ found > 0.99 * np.linalg.norm(exact) * np.linalg.norm(found)
    finally:
        peer.close()


def test_packfmt_contends_with_what_prepare_gives() -> None:
    packed = packfmt.pack(WEIGHT, "q8_0")
    ours = peers.Packed(SIZE, packed)
    x = bench.activations(3, SIZE.cols)
    ours.begin(x, 2)
    wanted = packfmt.prepare(packed).matmul(x)
    assert ours.copies == 6 == len({id(r) for r in ours._ready})
    assert all(ours.answer(copy).tobytes() == wanted.tobytes() for copy in range(ours.copies))


def test_copies_make_the_footprint_and_graphs_hold_some_of_them() -> None:
    assert [bench.Size(8, 8, 1000).copies(n) for n in (1, 10, 999, 1000, 1001)] == [1000, 100, 2, 1, 1]
    assert bench.Size(8, 8, 0).copies(10) == 1  # --warm
    assert bench.Size(8, 8, 10**6).copies(1) == bench.MOST_COPIES
    assert [bench.Size(8, 8, 10**9).group(n) for n in (10**6, 10**8, 10**9)] == [8, 2, 1]
    assert bench.Size(8, 8, 30).group(10) == 3


def test_a_strip_is_repeated_to_the_height_that_is_asked_for() -> None:
    strip = np.arange(6).reshape(3, 2)
    assert bench.repeat(strip, 7).tolist() == [[0, 1], [2, 3], [4, 5]] * 2 + [[0, 1]]
    assert bench.repeat(strip, 2).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("threads", [1, 2])
def test_contestants_take_turns_with_one_copy_after_another(threads: int) -> None:
    log: list[tuple[Any, int]] = []
    both = Slow(log), Slow(log)
    first, second = measure.race(both, 0.01, threads)
    changes = sum(a[0] is not b[0] for a, b in pairwise(log))
    assert 2 * measure.LEAST - 1 <= changes < 2 * measure.TURNS
    for who, timing in zip(both, (first, second), strict=True):
        turns = [turn for c, turn in log if c is who]
        assert turns == list(range(len(turns)))
        # the first of a turn is not timed, but where a call fills the turn
        assert 1 <= len(turns) - timing.calls <= measure.TURNS
        assert 0 < timing.low <= timing.seconds <= timing.high < 0.01
        assert 0 < timing.processors <= 2


class Clock:
    """All clocks of `time`, which stand still but for what products take."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = process_time = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("threads", [1, 2])
def test_long_products_end_the_race_after_three_turns(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    log: list[tuple[Any, int]] = []

    def taking(seconds: float) -> Slow:
        peer = Slow(log)

        def call(turn: int) -> None:
            log.append((peer, turn))
            clock.now += seconds

        peer.call = call  # type: ignore[method-assign]
        return peer

    short, middle, long = (taking(seconds) for seconds in (0.015625, 0.25, 8))
    timings = measure.race((short, middle, long), 1.25, threads)  # 0.125 a turn
    assert [t.calls for t in timings] == [8 * measure.TURNS, 5, measure.LEAST]
    assert [t.seconds * Slow.group for t in timings] == [0.015625, 0.25, 8]
    first = [next(c for c, _ in log[i:]) for i in (0, 9, 11, 13)]  # a call to wake, and those that are timed
    assert first == [short, middle, long, short]
    owners = [a for (a, _), (b, _) in pairwise([*log, (None, 0)]) if a is not b]
    assert owners == [short, middle, long] * 3 + [short, middle] * 2 + [short]


def test_what_was_timed_a_few_times_only_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = Slow([])
    monkeypatch.setitem(peers.PEERS, "numpy", lambda size, kind: peer)
    told = "long products were timed 3 times only; with more --seconds more often"
    assert told not in Said(capsys, "bench", "q8_0", *TINY, "--peer", "numpy").out
    peer.call = lambda turn: time.sleep(0.02)  # type: ignore[method-assign, assignment]
    assert told in Said(capsys, "bench", "q8_0", *TINY, "--peer", "numpy").out.splitlines()


def test_results_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "bench", "q4_0", "q8_0", *TINY, "--batch", "2", "--peer", "numpy", "--json")
    assert said.code == 0
    assert said.err == "64x256, batch 2, 1 thread, q4_0: measured\n64x256, batch 2, 1 thread, q8_0: measured\n"
    found: Any = said.json
    assert found.keys() == {"machine", "seconds", "footprint_bytes", "warm", "left_out", "complete", "rows"}
    assert (found["left_out"], found["complete"]) == ([], True)
    assert found["machine"].keys() >= {"processor", "cpus", "cache_bytes", "versions"}
    assert [row["layout"] for row in found["rows"]] == ["q4_0", "q8_0"]
    for row in found["rows"]:
        assert (row["shape"], row["batch"], row["threads"], row["name"]) == ([64, 256], 2, 1, "packfmt")
        assert row["nbytes"] * 8 == row["bits_per_weight"] * 64 * 256
        time = row["timing"]
        assert 0 < time["low"] <= time["seconds"] <= time["high"] and time["calls"] >= measure.LEAST
        assert row["weights_per_second"] == pytest.approx(2 * 64 * 256 / time["seconds"])
        assert row["bytes_per_second"] == pytest.approx(row["nbytes"] / time["seconds"])
        assert row["of_read"] == pytest.approx(row["bytes_per_second"] / row["read_bytes_per_second"])
        assert row["peers"].keys() | row["absent"].keys() == {"numpy"}
        for peer in row["peers"].values():
            assert peer["ratio"] == pytest.approx(peer["timing"]["seconds"] / time["seconds"])


def test_a_table_for_each_shape_batch_and_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--shape", "32x512", "--threads", "2", "--batch", "1", "--batch", "3", "--peer", "none")
    said = Said(capsys, "bench", "q8_0", *TINY, *more)
    assert said.code == 0
    lines = said.out.splitlines()
    titles = [line.partition("; ")[0] for line in lines if "reading alone" in line]
    shapes = ("32x512", "64x256")
    threads = ("1 thread", "2 threads")
    assert titles == [f"{s}, batch {b}, {t}" for s in shapes for b in (1, 3) for t in threads]
    assert lines[1].split("  ")[0] == "layout" and lines[1].endswith("% of read")
    assert sum(line.startswith("q8_0") for line in lines) == 8
    assert not any(line.startswith("blank") for line in lines)
    where = "may be in a cache" if measure.cache_bytes() else "out of cache"
    assert f"weights {where}: each contestant's copies, used in turn, make 100 kB" in lines


def test_warm_measures_one_copy(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--shape", "64x256", "--seconds", "0.01", "--threads", "1", "--peer", "none")
    found: Any = Said(capsys, "bench", "mxfp4", *sizes, "--warm", "--json").json
    assert (found["warm"], found["footprint_bytes"], found["rows"][0]["copies"]) == (True, 0, 1)
    assert "one copy of each" in Said(capsys, "bench", "mxfp4", *sizes, "--warm").out


def test_a_missing_peer_is_a_blank_column_and_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "import_module", without("onnxruntime", "threadpoolctl"))
    said = Said(capsys, "bench", "q8_0", *TINY, "--peer", "onnxruntime", "--peer", "numpy")
    assert said.code == 0
    assert [line for line in said.out.splitlines() if line.startswith("blank")] == [
        "blank: numpy: threadpoolctl is not installed; pip install 'packfmt[bench]'",
        "blank: onnxruntime: onnxruntime is not installed; pip install 'packfmt[bench]'",
    ]
    heads, row = said.out.splitlines()[1:3]
    assert heads.endswith("numpy  onnxruntime") and len(row) < heads.index("numpy")


def without(*names: str) -> Any:
    """import_module of an interpreter that lacks some packages."""

    def find(name: str) -> Any:
        if name in names:
            raise ModuleNotFoundError(name)
        return import_module(name)

    return find


def test_default_layouts_are_left_out_where_they_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--shape", "16x64", "--shape", "16X100", *TINY[2:], "--peer", "none")
    said = Said(capsys, "bench", *sizes)
    assert said.code == 0
    rows = [line.split()[0] for line in said.out.splitlines() if line.split()[:1] and line.split()[0] in bench.LAYOUTS]
    assert rows == ["mxfp4", "nvfp4", "q4_0", "q8_0", "bf16", "bf16"]
    why = [line.removeprefix("left out: ") for line in said.out.splitlines() if line.startswith("left out")]
    assert why[:2] == [f"16x64: {n}: 64 columns, needs a multiple of 256" for n in ("sherry", "tq2_0")]
    assert len(why) == 3 + 7 and why[-1] == "16x100: q8_0: 100 columns, needs a multiple of 32"
    found: Any = Said(capsys, "bench", *sizes, "--json").json
    assert (found["left_out"], found["complete"]) == (why, True)


def test_numbers_are_shown_with_digits_that_mean_something() -> None:
    numbers = (0.0043219, 0.866, 0.9996, 7.4, 99.96, 185.12, 1204.4)
    assert [benching._rounded(n) for n in numbers] == ["0.00432", "0.866", "1.000", "7.40", "100.0", "185", "1204"]
    assert [benching._rounded(n, 2) for n in (0.0107, 0.85, 8.1, 29.4, 332.2)] == ["0.011", "0.85", "8.1", "29", "332"]


@pytest.fixture
def no_ggml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Why there is none."""
    from packfmt.bench import ggml

    monkeypatch.setenv("PACKFMT_GGML", str(tmp_path))
    ggml.library.cache_clear()
    yield f"{tmp_path}: no ggml-base in the folder that PACKFMT_GGML names"
    ggml.library.cache_clear()


def test_ggml_is_looked_for_where_the_environment_says(no_ggml: str) -> None:
    from packfmt.bench import ggml

    with pytest.raises(MachineError, match=re.escape(no_ggml)):
        ggml.library()


def test_peers_that_are_missing_for_one_reason_share_a_line(capsys: pytest.CaptureFixture[str], no_ggml: str) -> None:
    said = Said(capsys, "bench", "q8_0", *TINY, "--peer", "ggml", "--peer", "ggml-repack")
    blank = [line for line in said.out.splitlines() if line.startswith("blank")]
    assert (said.code, blank) == (0, [f"blank: ggml, ggml-repack: {no_ggml}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (("--shape", text), f"for --shape: '{text}' is not ROWSxCOLS, two numbers above 0, such as 4096x4096")
            for text in (
                "64",
                "64x",
                "x64",
                "0x64",
                "64x0",
                "0x0",
                "-1x64",
                "64x-1",
                "64*64",
                "64x64x64",
                "9999999999x1",
            )
        ),
        (("--shape",), "Option '--shape' requires an argument"),
        (("--footprint", "much"), "Invalid value for --footprint: 'much' is not a size such as 5GB, 500MB or 1GiB"),
        (("--footprint", "0"), "Invalid value for --footprint: '0' is not a size such as 5GB, 500MB or 1GiB"),
        (("--footprint", "0.1"), "Invalid value for --footprint: '0.1' is not a size such as 5GB, 500MB or 1GiB"),
        (("--warm", "--footprint", "1GB"), "give one of --warm and --footprint"),
        (
            ("--peer", "mkl"),
            "no peer is called 'mkl'; there are numpy, torch, onnxruntime, ggml, ggml-repack, and none",
        ),
        (("--peer", "none", "--peer", "numpy"), "Invalid value for --peer: none stands alone; give none, or peers"),
        (("--batch", "0"), "Invalid value for '--batch'"),
        (("--threads", "257"), "Invalid value for '--threads'"),
        (("--seconds", "0"), "Invalid value for '--seconds'"),
        (("no_such_layout",), "no_such_layout"),
        (("q8_0", "--shape", "64x100"), "64x100: q8_0: "),
        (("mxfp4_tile61",), "no format is called 'mxfp4_tile61'; did you mean mxfp4_tile16?"),
        (("--plot", "out.pdf"), "out.pdf: a plot ends in .png or .svg"),
        (("--plot", "/no/such/out.png"), "packfmt: /no/such: no such folder; make it first"),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    said = Said(capsys, "bench", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("packfmt: ") and said.err.count("\n") == 1 and message in said.err


def test_numbers_beyond_the_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda: 10_000_000)
    less = "MB, 10 MB are free; measure smaller shapes or batches"
    said = Said(capsys, "bench", "--shape", "32x32", "--shape", "2000x2048")
    assert (said.code, said.out, said.err) == (3, "", f"packfmt: 2000x2048: float32 numbers need 16 {less}\n")
    said = Said(capsys, "bench", "--shape", "32x32", "--batch", "1", "--batch", "40000")
    assert (said.code, said.out, said.err) == (3, "", f"packfmt: 32x32: float32 numbers need 10 {less}\n")


def test_copies_beyond_the_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda: 2_000_000)
    said = Said(capsys, "bench", "q8_0", "--shape", "64x256", "--footprint", "3MB", "--peer", "none")
    assert (said.code, said.out) == (3, "")
    found = "copies need 3 MB, 2 MB are free; give a smaller --footprint, or --warm"
    assert said.err == f"packfmt: q8_0: {found}\n"


def test_an_interrupt_gives_all_memory_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[tuple[Any, int]] = []
    peer = Slow(log)

    def stop(turn: int) -> None:
        raise KeyboardInterrupt

    peer.call = stop  # type: ignore[method-assign]
    monkeypatch.setitem(peers.PEERS, "numpy", lambda size, kind: peer)
    said = Said(capsys, "bench", "q8_0", *TINY, "--peer", "numpy")
    assert (said.code, said.out, log) == (130, "", [(peer, -1)])


def test_rows_that_were_measured_before_an_interrupt_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    class Stops(Slow):
        name, begun = "numpy", 0

        def begin(self, x: Any, threads: int) -> None:
            self.begun += 1

        def call(self, turn: int) -> None:
            if self.begun == 3:
                raise KeyboardInterrupt

    monkeypatch.setitem(peers.PEERS, "numpy", lambda size, kind: Stops([]))
    words = ("bench", "q8_0", "q4_0", "mxfp4", "bf16", *TINY, "--peer", "numpy")
    path = tmp_path / "roof.png"
    said = Said(capsys, *words, "--plot", path)
    assert said.code == 130 and said.err.endswith("packfmt: interrupted; nothing was left half-written\n")
    assert [line.split()[0] for line in said.out.splitlines()[:5] if line] == ["64x256,", "layout", "q8_0", "q4_0"]
    assert path.read_bytes().startswith(b"\x89PNG")
    said = Said(capsys, *words, "--json")
    found: Any = said.json
    assert (said.code, found["complete"], [row["layout"] for row in found["rows"]]) == (130, False, ["q8_0", "q4_0"])


def test_rows_that_were_measured_before_the_memory_was_full_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = report.Wanted(["q8_0", "bf16"], [(64, 256)], [1], [1], [], 0.01, 100_000)
    done = list(report.rows(whole))
    assert len(done) == whole.count == 2

    def fails(*anything: object) -> Any:
        yield done[0]
        raise MachineError("bf16: copies need 3 MB, 2 MB are free")

    monkeypatch.setattr(report, "rows", fails)
    said = Said(capsys, "bench", "q8_0", "bf16", *TINY, "--peer", "none")
    assert said.code == 3 and said.err == "packfmt: bf16: copies need 3 MB, 2 MB are free\n"
    assert said.out.splitlines()[2].startswith("q8_0")


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_a_plot_has_a_point_for_everyone(tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"roof{ending}"
    said = Said(capsys, "bench", "q4_0", "mxfp4", *TINY, "--peer", "numpy", "--plot", path)
    assert said.code == 0 and said.err.endswith(f"the plot is in {path}\n")
    written = path.read_bytes()
    if ending == ".png":
        assert written.startswith(b"\x89PNG") and len(written) > 10_000
    else:
        for text in (b"q4_0", b"mxfp4", b"64x256, batch 1, 1 thread", b"bits per weight", b"numpy: float32"):
            assert b"<!-- " + text in written


def test_a_plot_of_many_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "roofs.svg"
    more = ("--batch", "1", "--batch", "3", "--threads", "2", "--peer", "none", "--plot", path)
    assert Said(capsys, "bench", "mxfp4", *TINY, *more).code == 0
    text = path.read_text()
    for words in ("batch 1, 1 thread", "batch 1, 2 threads", "batch 3, 1 thread", "batch 3, 2 threads"):
        assert text.count(f"<!-- 64x256, {words}") == 1
    assert text.count(", each byte used for 3 products") == 2 and "<!-- packfmt: mxfp4 -->" in text


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "import_module", without("matplotlib"))
    said = Said(capsys, "bench", "q8_0", *TINY, "--plot", tmp_path / "roof.png")
    assert (said.code, said.out) == (3, "")
    assert said.err == "packfmt: matplotlib is not installed; pip install 'packfmt[bench]'\n"


def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot.check(tmp_path / "roof.PNG")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match=r"folder.png: is a folder; name a file$"):
        plot.check(tmp_path / "folder.png")
    with pytest.raises(PlanError, match=r"file: no such folder; make it first$"):
        plot.check(tmp_path / "file" / "roof.png")
    assert list(tmp_path.glob("*.PNG")) == []


def test_a_plot_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)
    with pytest.raises(MachineError, match=r"roof.png: may not be written; name another place$"):
        plot.check(tmp_path / "roof.png")


def corners(dots: Any, offsets: Any, sizes: Any) -> Any:
    """(labels, 2, 2), lower left and upper right."""
    return (dots[: len(sizes)] + offsets)[:, None] + sizes[:, None] * np.array([[-0.5], [0.5]])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 16))
def test_labels_stand_on_nothing_and_inside(seed: int, count: int) -> None:
    numbers = np.random.default_rng(seed)
    dots = numbers.uniform((100, 100), (900, 700), (count + 4, 2)).round()
    dots[1::3] = dots[::3][: len(dots[1::3])] + 3.0  # some lie on each other
    sizes = np.stack([numbers.integers(30, 90, count), np.full(count, 18)], 1)
    frame = np.array([50, 50, 950, 750])
    offsets, reaches = plot.places(dots, sizes, frame, 2)
    assert set(reaches) <= set(plot.REACHES)
    boxes = corners(dots, offsets, sizes)
    assert (boxes[:, 0] >= frame[:2]).all() and (boxes[:, 1] <= frame[2:]).all()
    meet = plot._meet(boxes, boxes)
    assert meet.sum() == count and meet.diagonal().all()
    assert not plot._meet(boxes, np.stack([dots, dots], 1)).any()


def test_a_lonely_label_stands_to_the_right() -> None:
    offsets, reaches = plot.places(np.array([[100.0, 100]]), np.array([[40, 10]]), np.array([0, 0, 200, 200]), 1)
    assert offsets.tolist() == [[6 + 20, 0]] and reaches.tolist() == [6]


def test_boxes_meet_if_they_share_more_than_an_edge() -> None:
    one = np.array([[[0, 0], [2, 2]]])
    others = np.array([[[1, 1], [3, 3]], [[2, 0], [3, 3]], [[0, 2], [2, 3]], [[-1, -1], [3, 3]], [[5, 0], [6, 1]]])
    assert plot._meet(one, others).tolist() == [[True, False, False, True, False]]


def test_layouts_are_compared_with_the_nearest_type_of_ggml() -> None:
    wanted = {
        "sherry": "tq1_0",
        "tq1_0": "tq1_0",
        "tq2_0": "tq2_0",
        "mxfp4_pairs": "mxfp4",
        "nvfp4_modelopt": "nvfp4",
        "q4_0": "q4_0",
        "mxfp6_e2m3": "q8_0",
        "fp8_row": "q8_0",
        "bf16": "bf16",
        "f32": "f32",
    }
    assert {name: report.nearest(codecs.get(name).layout) for name in wanted} == wanted


def test_the_default_footprint_is_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache, wanted in ((0, 1 << 30), (1 << 20, 4 << 20), (400 << 20, 1 << 30), (1 << 30, 2 << 30)):
        monkeypatch.setattr(measure, "cache_bytes", lambda cache=cache: cache)
        assert measure.footprint() == wanted
