"""Ternary models from file to file: nothing lost, or refused with the tensor, the quad and the scale."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from packfmt import checkpoint, codecs, conversion
from packfmt.cli import run
from packfmt.codec import Array
from packfmt.errors import LayoutError, PlanError
from packfmt.layout import Layout
from packfmt.plan import Recipe
from tests.models import folder, normal
from tests.test_respelling import SIDE, ternary

BF16 = ml_dtypes.bfloat16


def model(path: Path, stride: int = SIDE, cols: int = 512) -> Path:
    """Three ternary matrices in bfloat16, whose scales a block of 256 columns has for itself, and a norm."""
    tensors: dict[str, Array] = {"norm.weight": normal(cols, dtype=BF16)}
    for i, name in enumerate(("q_proj", "up_proj", "down_proj")):
        weight = ternary((96, cols), stride, 1.0, seed=i)
        scale = np.random.default_rng(i).normal(0, 0.02, (96, cols // 256)).astype(BF16).astype(np.float32)
        weight *= np.repeat(np.abs(scale), 256, 1)
        tensors[f"{name}.weight"] = (weight + np.float32(0)).astype(BF16)
    return folder(path, tensors)


def weights(path: Path) -> dict[str, Array]:
    return load_file(path / "model.safetensors")


def same_files(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(left[k].tobytes() == right[k].tobytes() for k in left)


def codes(path: Path, name: str) -> bytes:
    with checkpoint.open(path) as opened:
        return opened[name].unpack()["codes"].tobytes()


def test_a_ternary_checkpoint_to_sherry_and_back_is_the_same_bytes(tmp_path: Path) -> None:
    source = model(tmp_path / "dense")
    report = conversion.convert(source, tmp_path / "sherry", "sherry", lossless=True, check=True)
    packed = [s for s in report.plan.steps if s.layout.name == "sherry"]
    assert len(packed) == 3 and all(s.exact and s.action == "quantise" for s in packed)
    assert report.remarks == ()
    with checkpoint.open(tmp_path / "sherry") as opened:
        plan = conversion.decode_plan(opened, tmp_path / "again")
        conversion.run(plan, opened, tmp_path / "again")
    assert same_files(source, tmp_path / "again")


def test_sherry_to_a_tq2_0_gguf_and_to_sherry_again_has_the_same_codes(tmp_path: Path) -> None:
    conversion.convert(model(tmp_path / "dense"), tmp_path / "one", "sherry", lossless=True)
    for name, other in (("tq2_0", "a.gguf"), ("tq1_0", "b.gguf"), ("sherry_t32", "tiles"), ("ptqtp1", "planes")):
        report = conversion.convert(tmp_path / "one", tmp_path / other, name)
        assert {s.action for s in report.plan.steps if s.layout.name == name} == {"repack"}
        conversion.convert(tmp_path / other, tmp_path / f"again-{name}", "sherry")
        for tensor in ("q_proj.weight", "up_proj.weight", "down_proj.weight"):
            assert codes(tmp_path / "one", tensor) == codes(tmp_path / f"again-{name}", tensor)
        assert same_files(tmp_path / "one", tmp_path / f"again-{name}")


def test_what_is_lossless_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", {"a.weight": normal(64, 256, dtype=BF16), "b.weight": ternary((64, 256), SIDE)})
    with pytest.raises(PlanError) as caught:
        conversion.convert(source, tmp_path / "out", "sherry", lossless=True)
    first, line = str(caught.value).splitlines()
    assert first == "--lossless: refused"
    assert line.startswith("a.weight: sherry: 1") and "of 16384 weights change, the first at [0, 0]" in line
    assert not (tmp_path / "out").exists()


def test_quads_that_run_the_other_way_are_counted(tmp_path: Path) -> None:
    source = model(tmp_path / "dense")
    with pytest.raises(
        PlanError, match=r"down_proj.weight: .* weights change, .*; \d+ of 12288 quads are ternary, but"
    ):
        conversion.convert(source, tmp_path / "out", "sherry_s16", lossless=True)
    report = conversion.convert(source, tmp_path / "out", "sherry_s16")
    assert len(report.remarks) == 3
    name, text = report.remarks[0].split(": ")
    count = int(text.split()[0])
    assert name == "down_proj.weight" and 0.5 < count / 12288 < 0.65
    assert text.endswith("of 12288 quads are ternary, but have not exactly one zero")


def test_columns_are_permuted_only_into_the_layout_that_says_so(tmp_path: Path) -> None:
    source = model(tmp_path / "dense")
    conversion.convert(source, tmp_path / "perm", "sherry_s16_perm", lossless=True)
    stored = weights(tmp_path / "perm")
    assert stored["q_proj.weight.perm"].dtype == np.uint32 and stored["q_proj.weight.perm"].shape == (512,)
    with checkpoint.open(tmp_path / "perm") as opened:
        plan = conversion.decode_plan(opened, tmp_path / "again")
        conversion.run(plan, opened, tmp_path / "again")
    assert same_files(source, tmp_path / "again")
    with (
        checkpoint.open(tmp_path / "perm") as opened,
        pytest.raises(PlanError, match="GGUF has no type for sherry_s16_perm"),
    ):
        conversion.plan_for(opened, tmp_path / "out.gguf", Recipe("keep"))


def test_a_refused_repacking_names_the_tensor_and_the_way_out(tmp_path: Path) -> None:
    conversion.convert(model(tmp_path / "dense"), tmp_path / "one", "tq2_0", lossless=True)
    with pytest.raises(
        LayoutError, match=r"^down_proj.weight: tq2_0 to sherry_row: scale \[0, 1\] .*; --encoder NAME would"
    ):
        conversion.convert(tmp_path / "one", tmp_path / "two", "sherry_row")
    assert not (tmp_path / "two").exists()
    report = conversion.convert(tmp_path / "one", tmp_path / "two", "sherry_row", encoder="mean")
    assert {s.action for s in report.plan.steps if s.layout.name == "sherry_row"} == {"requantise"}


def test_the_plan_says_what_the_numbers_must_fulfil(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversion.convert(model(tmp_path / "dense"), tmp_path / "one", "tq2_0", lossless=True)
    assert run(["plan", str(tmp_path / "one"), "--to", "sherry"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "q_proj" in line]
    assert "repack (exact)" in lines[0] and lines[0].endswith("refused unless every quad has exactly one zero")


def test_a_saved_lossless_plan_stays_lossless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = model(tmp_path / "good"), folder(tmp_path / "bad", {"q_proj.weight": normal(96, 512, dtype=BF16)})
    assert run(["plan", str(good), "--to", "sherry", "--lossless", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    steps = {s["name"]: s for s in plan["steps"]}
    assert steps["q_proj.weight"]["lossless"] and steps["q_proj.weight"]["exact"]
    assert not steps["norm.weight"]["lossless"]
    plan["steps"] = [s for s in plan["steps"] if s["name"] == "q_proj.weight"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert run(["convert", str(bad), str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]) == 3
    assert "q_proj.weight: sherry: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_importance_comes_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "dense", {"a.weight": normal(64, 256)})
    costs = np.random.default_rng(3).random(256).astype(np.float32)
    save_file({"a.weight": costs}, tmp_path / "costs.safetensors")
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "sherry"]
    assert run([*words, "--importance", str(tmp_path / "costs.safetensors")]) == 0
    with checkpoint.open(tmp_path / "out") as opened:
        got = opened["a.weight"]
    want = codecs.get("sherry").encode(normal(64, 256), importance=costs)
    assert got.components["blocks"].tobytes() == want.components["blocks"].tobytes()
    assert (
        want.components["blocks"].tobytes()
        != codecs.get("sherry").encode(normal(64, 256)).components["blocks"].tobytes()
    )
    for name, shape, told in (
        ("b.weight", 256, "b.weight is no weight"),
        ("a.weight", 255, "a.weight is [255], needs"),
    ):
        save_file({name: np.ones(shape, np.float32)}, tmp_path / "bad.safetensors")
        assert run([*words, "--force", "--importance", str(tmp_path / "bad.safetensors")]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoder", "importance", "told"),
    [
        ("amax", np.ones(256, np.float32), "sherry: encoder 'amax' does not weigh importance; mean, row, tensor does"),
        ("mean", np.ones(255, np.float32), r"importance \(255,\), needs 256 finite numbers of 0 or more"),
        ("mean", -np.ones(256, np.float32), "needs 256 finite numbers of 0 or more"),
        ("mean", np.full(256, np.nan, np.float32), "needs 256 finite numbers of 0 or more"),
    ],
)
def test_importance_that_fits_no_weight_is_refused(encoder: str, importance: Array, told: str) -> None:
    with pytest.raises(LayoutError, match=told):
        codecs.get("sherry").encode(normal(4, 256), encoder, importance=importance)


def test_importance_that_nothing_weighs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "dense", {"a.weight": normal(64, 256), "b.weight": normal(64, 256)})
    costs = {"a.weight": np.ones(256, np.float32), "b.weight": np.ones(256, np.float32)}
    report = conversion.convert(source, tmp_path / "out", "sherry", overrides={"b": "tq2_0"}, importance=costs)
    assert report.remarks == ("b.weight: importance not used, for encoder 'best' of tq2_0 does not weigh it",)
    with pytest.raises(PlanError, match="importance: nothing here weighs it"):
        conversion.convert(source, tmp_path / "two", "tq2_0", importance=costs)
    bad = costs | {"b.weight": np.full(256, -1, np.float32)}
    with pytest.raises(PlanError, match=r"importance: b.weight is \[256\], needs 256 finite numbers of 0 or more"):
        conversion.convert(source, tmp_path / "two", "sherry", importance=bad)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("words", [["--lossless"], ["--encoder", "mean"], ["--map", "a=q8_0"], ["--fallback", "keep"]])
def test_a_saved_plan_takes_no_other_word(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    source = folder(tmp_path / "dense", {"a.weight": normal(64, 256)})
    assert run(["convert", str(source), str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json"), *words]) == 2
    assert "a saved plan says all of it" in capsys.readouterr().err


def test_what_respelling_holds_is_in_the_plan(tmp_path: Path) -> None:
    conversion.convert(model(tmp_path / "dense"), tmp_path / "one", "sherry", lossless=True)
    with checkpoint.open(tmp_path / "one") as opened:
        plan = conversion.plan_for(opened, tmp_path / "two", Recipe("sherry_s16_perm"))
        step = next(s for s in plan.steps if s.name == "q_proj.weight")
        assert step.working_set >= 32 * 96 * 512
        moved = conversion.plan_for(opened, tmp_path / "two", Recipe("tq2_0"))
        assert 6 * 96 * 512 <= next(s for s in moved.steps if s.name == "q_proj.weight").working_set < 9 * 96 * 512


def test_every_layout_reads_back_from_its_description_at_the_sizes_of_real_models() -> None:
    for name in (*codecs.names(), "mote_256", "tl1_256_128_64", "tl2_3200_8640_160_96", "tl2_8192_8192_256_96"):
        layout = codecs.get(name).layout
        assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("target", "export", "told"),
    [
        ("out.safetensors", "gguf", "its name says safetensors, --export gguf; choose one"),
        ("out.gguf", "safetensors", "its name says gguf, --export safetensors; choose one"),
        ("out.GGUF", "", "write .gguf, in small letters"),
        ("dense/out", "", "lies in the source, which would carry it along"),
    ],
)
def test_a_destination_that_contradicts_itself_is_refused(tmp_path: Path, target: str, export: str, told: str) -> None:
    source = folder(tmp_path / "dense", {"a.weight": normal(64, 256)})
    with pytest.raises(PlanError, match=told):
        conversion.convert(source, tmp_path / target, "q8_0", container=export)
    assert not (tmp_path / target).exists()


def test_packed_weights_without_the_config_that_says_so_are_not_taken_for_whole_numbers(tmp_path: Path) -> None:
    tensors = {
        "a.weight": np.zeros((16, 64), np.uint8),
        "a.weight_scale": np.ones(1, BF16),
        "b.weight": normal(64, 256),
    }
    source = folder(tmp_path / "dense", tensors)
    with pytest.raises(PlanError, match=r"a.weight: has a weight_scale beside it; .* say --read-as U8=bitnet"):
        conversion.convert(source, tmp_path / "out", "tq2_0")
    report = conversion.convert(source, tmp_path / "out", "tq2_0", read_as={"U8": "bitnet"}, fallback="keep")
    assert {s.name: s.layout.name for s in report.plan.steps}["a.weight"] == "bitnet"


def test_files_that_do_not_say_what_they_hold_are_read_with_a_word_or_the_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = folder(tmp_path / "dense", {"a.weight": ternary((64, 512), SIDE + 15)})
    conversion.convert(dense, tmp_path / "own.gguf", "sherry_s16")
    with checkpoint.open(tmp_path / "own.gguf") as own:
        blocks = own["a.weight"].components["blocks"]
    write_gguf(tmp_path / "wild.gguf", blocks)
    wild = str(tmp_path / "wild.gguf")
    for words in (["inspect", wild], ["validate", wild], ["verify", wild]):
        run(words)
        assert "--read-as STQ1_0=sherry_s16" in "".join(capsys.readouterr())
        assert run([*words, "--read-as", "STQ1_0=sherry_s16"]) == 0
        capsys.readouterr()
    assert run(["verify", wild, "--against", str(dense)]) == 0
    assert run(["diff", wild, str(dense)]) == run(["diff", wild, str(tmp_path / "own.gguf")]) == 0
    assert run(["inspect", wild, "--base", str(tmp_path / "none")]) == 3
    assert run(["validate", wild, str(tmp_path / "none"), "--base", str(dense)]) == 3
    assert f"{wild}: good" in capsys.readouterr().out


def write_gguf(path: Path, blocks: Array) -> None:
    """A GGUF as another program writes it, with one tensor of 64 x 512 weights in STQ1_0."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += text("a.weight") + struct.pack("<IQQIQ", 2, 512, 64, 43, 0)
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + blocks.tobytes())


def test_after_a_request_to_terminate_the_conversion_goes_on(tmp_path: Path) -> None:
    tensors = {f"{i}.weight": normal(1024, 1024, seed=i) for i in range(12)}
    source = folder(tmp_path / "dense", tensors)
    code = "import sys; from packfmt.cli import main; sys.argv = ['packfmt', *sys.argv[1:]]; main()"
    words = [sys.executable, "-c", code, "convert", str(source), str(tmp_path / "out"), "--to", "ptqtp4"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    told = f"packfmt: interrupted; what is done lies in {tmp_path / 'out.partial'}, --resume goes on\n"
    assert (process.returncode, said) == (130, told)
    assert not (tmp_path / "out").exists()
    subprocess.run([*words, "--resume"], check=True, capture_output=True, timeout=300)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]
