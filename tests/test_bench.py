"""packfmt bench: that everybody multiplies the same weight, takes turns, and is told of in a table, JSON and a plot."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import packfmt
from packfmt import bench, codecs
from packfmt.bench import measure, peers, report
from packfmt.errors import MachineError
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
    assert changes == 2 * measure.TURNS - 1
    for who, timing in zip(both, (first, second), strict=True):
        turns = [turn for c, turn in log if c is who]
        assert turns == list(range(len(turns)))
        assert timing.calls == len(turns) - measure.TURNS  # the first of each turn is not timed
        assert 0 < timing.low <= timing.seconds <= timing.high < 0.01
        assert 0 < timing.processors <= 2


def test_results_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "bench", "q4_0", "q8_0", *TINY, "--batch", "2", "--peer", "numpy", "--json")
    assert said.code == 0
    assert said.err == "64x256, batch 2, 1 thread, q4_0: measured\n64x256, batch 2, 1 thread, q8_0: measured\n"
    found: Any = said.json
    assert found.keys() == {"machine", "seconds", "footprint_bytes", "warm", "rows"}
    assert found["machine"].keys() >= {"processor", "cpus", "cache_bytes", "versions"}
    assert [row["layout"] for row in found["rows"]] == ["q4_0", "q8_0"]
    for row in found["rows"]:
        assert (row["shape"], row["batch"], row["threads"], row["name"]) == ([64, 256], 2, 1, "packfmt")
        assert row["nbytes"] * 8 == row["bits_per_weight"] * 64 * 256
        time = row["timing"]
        assert 0 < time["low"] <= time["seconds"] <= time["high"] and time["calls"] >= measure.TURNS
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


def test_ggml_is_looked_for_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from packfmt.bench import ggml

    monkeypatch.setenv("PACKFMT_GGML", str(tmp_path))
    ggml.library.cache_clear()
    try:
        with pytest.raises(MachineError, match="no ggml-base in the folder that PACKFMT_GGML names"):
            ggml.library()
    finally:
        ggml.library.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "64"), "Invalid value for --shape: '64' is not ROWSxCOLS, such as 4096x4096"),
        (("--shape", "0x64"), "Invalid value for --shape: '0x64' is not ROWSxCOLS, such as 4096x4096"),
        (("--footprint", "much"), "Invalid value for --footprint: 'much' is not a size such as 2GB or 500MB"),
        (("--footprint", "0"), "Invalid value for --footprint: '0' is not a size such as 2GB or 500MB"),
        (("--warm", "--footprint", "1GB"), "give one of --warm and --footprint"),
        (
            ("--peer", "mkl"),
            "no peer is called 'mkl'; there are numpy, torch, onnxruntime, ggml, ggml-repack, and none",
        ),
        (("--batch", "0"), "Invalid value for '--batch'"),
        (("--threads", "257"), "Invalid value for '--threads'"),
        (("--seconds", "0"), "Invalid value for '--seconds'"),
        (("no_such_layout",), "no_such_layout"),
        (("q8_0", "--shape", "64x100"), "64x100: q8_0: "),
        (("--plot", "out.pdf"), "out.pdf: a plot ends in .png or .svg"),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    said = Said(capsys, "bench", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("packfmt: ") and said.err.count("\n") == 1 and message in said.err


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
        for text in (b"q4_0", b"mxfp4", b"64x256, batch 1, 1 thread", b"bits per weight"):
            assert b"<!-- " + text in written


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "import_module", without("matplotlib"))
    said = Said(capsys, "bench", "q8_0", *TINY, "--plot", tmp_path / "roof.png")
    assert (said.code, said.out) == (3, "")
    assert said.err == "packfmt: matplotlib is not installed; pip install 'packfmt[bench]'\n"


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
