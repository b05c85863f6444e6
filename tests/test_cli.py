"""Every command as a user types it, the wrong ones too: what is printed, where, and the exit code."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import packfmt
from packfmt import codecs
from packfmt.cli import run, show
from packfmt.errors import PlanError
from tests.models import folder, normal, tensors

BAD = Path(__file__).parent.parent / "spec" / "bad"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model")


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Path:
    assert run(["convert", str(model), str(tmp_path / "packed"), "--to", "q4_0"]) == 0
    return tmp_path / "packed"


class Said:
    """What one command printed, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        capsys.readouterr()
        self.code = run([str(a) for a in arguments])
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> object:
        return json.loads(self.out)


def test_formats_lists_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "formats")
    lines = said.out.splitlines()
    assert said.code == 0 and said.err == ""
    end = lines.index("")
    assert [line.split()[0] for line in lines[1:end]] == list(codecs.names())
    assert lines[end + 1 : end + 3] == ["and these, made as their names say:", ""]
    made = [line for line in lines[end + 4 :] if not line.startswith(" ")]
    written = {module: how for module, (_, how) in codecs.PATTERNS.items()}
    assert all(line.startswith(written[module]) for module, line in zip(codecs.EXAMPLES, made, strict=True))
    assert codecs.EXAMPLES.keys() == written.keys()
    tiled = [line.split("  ")[-1].strip() for line in lines if "side by side" in line and "for products" in line]
    assert tiled == [
        "mxfp4 for products: 16 rows side by side",
        "sherry for products: 32 rows side by side, codes in words of 16 bits",
        "sherry for products: 32 rows side by side, four bits of codes apart from the fifth",
    ]
    assert next(line for line in lines if line.startswith("mxfp4")).split()[:4] == [
        "mxfp4",
        "4.25",
        "1x32",
        "safetensors,",
    ]
    found = {f["layout"]: f for f in Said(capsys, "formats", "--json").json}
    assert found["q8_0"]["bits_per_weight"] == 8.5 and found["q8_0"]["id"] == codecs.get("q8_0").layout.id
    assert found["tq2_0"]["containers"] == ["safetensors", "gguf"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mxfp4_tile61", "mxfp4_tile16"),
        ("mxfp4_tile", "mxfp4_tile16"),
        ("mxfp4tile16", "mxfp4_tile16"),
        ("mxfp4-tile16", "mxfp4_tile16"),
        ("MXFP4_TILE16", "mxfp4_tile16"),
        ("mxfp4_words16", "mxfp4_tile16"),  # for it has no words
        ("ct_int4_g128_tile6", "ct_int4_g128_tile16"),
        ("sherry_word32", "sherry_words32"),
        ("sherry_nibbles", "sherry_nibbles32"),
        ("bf16_tile8", "bf16"),  # for it has no tiling
        ("mxpf4_tile61", "<format>_tile16, _words32 or _nibbles32"),
        ("mxfp4_tile16_tile6", "mxfp4_tile16"),
        ("Q4_0", "q4_0"),
        ("sherry-s16", "sherry_s16"),
        ("TQ1_O", "tq1_0"),
        ("nvfp4_h61", "<format>_h<size>"),
    ],
)
def test_a_misspelt_format_is_answered_with_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(PlanError, match=f"^no format is called '{name}'; did you mean {re.escape(meant)}( or .*)?[?]$"):
        codecs.get(name)


def test_convert_tells_what_it_did(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "convert", model, tmp_path / "out.gguf", "--to", "q8_0", "--map", "embed=f16", "--verify")
    behind = "not taken along, for out.gguf is one file: 1_Pooling/config.json, tokenizer.json\n"
    assert (said.code, said.err) == (0, behind)
    assert "quantise (lossy)" in said.out and "cast (lossy)" in said.out and "keep (exact)" in said.out
    assert said.out.splitlines()[-1].startswith(f"{tmp_path}/out.gguf: ") and said.out.endswith("s, verified\n")


def test_convert_in_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "convert", model, tmp_path / "out", "--to", "q8_0", "--json")
    data = said.json
    assert said.code == 0 and data["bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file()
    )
    assert {s["name"] for s in data["plan"]["steps"]} == tensors().keys()


def test_dry_run_and_plan_write_nothing_and_say_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = Said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0", "--dry-run", "--json")
    plan = Said(capsys, "plan", model, "--to", "q4_0", "--json")
    told, planned = dry.json, plan.json
    assert dry.code == plan.code == 0 and told["needs"].pop("free") > 0 and planned["needs"].pop("free") is None
    assert told == planned
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    table = Said(capsys, "plan", model, "--to", "q4_0")
    assert "layers.0.mlp.gate.weight" in table.out and "router: picks experts" in table.out


def test_a_saved_plan_is_replayed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text(
        Said(capsys, "plan", model, "--to", "q4_0", "--map", "embed=q8_0", "--json").out
    )
    said = Said(capsys, "convert", model, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert said.code == 0
    found = {t["name"]: t["layout"] for t in Said(capsys, "inspect", tmp_path / "out", "--json").json["tensors"]}
    assert found["embed.weight"] == "q8_0" and found["layers.0.mlp.up_proj.weight"] == "q4_0"
    (tmp_path / "plan.json").write_text("{")
    said = Said(capsys, "convert", model, tmp_path / "out2", "--plan", tmp_path / "plan.json")
    assert said.code == 2 and "plan.json: not a saved plan" in said.err


def test_inspect_shows_tensors_layouts_and_sizes(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "inspect", packed)
    line = next(line for line in said.out.splitlines() if line.startswith("embed.weight"))
    assert line.split() == ["embed.weight", "96x256", "q4_0", "float32", "4.5", str(96 * 256 // 32 * 18)]
    assert said.out.splitlines()[-1].startswith(f"{packed}: safetensors, 8 tensors, ")
    data = Said(capsys, "inspect", packed, "--json").json
    assert data["config"]["quantization_config"]["quant_method"] == "packfmt" and "tokenizer.json" in data["files"]


def test_validate_says_good_or_which_rule(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "validate", packed)
    assert (said.code, said.out, said.err) == (0, f"{packed}: good\n", "")
    bad = BAD / "flipped_bit.safetensors"
    said = Said(capsys, "validate", packed, bad)
    assert said.code == 1
    changed = "the bytes of 'blocks' are not those that were written; fetch or make it again"
    assert said.out.splitlines()[1] == f"{bad}: layer.weight: PF109 error: {changed}"
    data = Said(capsys, "validate", bad, "--level", "structure", "--json")
    assert data.code == 0 and data.json == [{"path": str(bad), "level": "structure", "findings": []}]
    assert Said(capsys, "validate", BAD / "dense_nan.safetensors").code == 0  # a warning
    said = Said(capsys, "validate", bad, "--level", "deep")
    assert said.code == 2 and "'deep' is not one of header, structure, data" in said.err


def test_verify_checks_laws_and_measures_errors(model: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Said(capsys, "verify", packed).out == f"{packed}: 8 tensors, all laws hold\n"
    said = Said(capsys, "verify", packed, "--against", model, "--json")
    errors = {t["name"]: t["relative_rms"] for t in said.json["tensors"]}
    weight = tensors()["embed.weight"].astype(np.float64)
    off = codecs.get("q4_0").encode(tensors()["embed.weight"]).decode() - weight
    assert errors["embed.weight"] == pytest.approx(np.sqrt((off**2).sum() / (weight**2).sum()), rel=1e-12)
    assert errors["layers.0.norm.weight"] == 0
    other = folder(packed.parent / "other", {"embed.weight": normal(96, 128)})
    said = Said(capsys, "verify", packed, "--against", other, "--json")
    broken = {t["name"]: t["broken"] for t in said.json["tensors"]}
    assert said.code == 1 and broken["embed.weight"] == [f"in {other} its shape is [96, 128]"]
    assert broken["positions"] == [f"not in {other}"]
    said = Said(capsys, "verify", BAD / "spare_bits.safetensors")
    assert said.code == 1 and said.out.endswith("1 tensors, 1 break a law\n")


def test_diff_tells_how_far_apart(
    model: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = Said(capsys, "diff", packed, packed)
    assert (same.code, same.out) == (0, "8 tensors have the same bytes, 0 the same values, 0 differ\n")
    apart = Said(capsys, "diff", model, packed)
    assert apart.code == 1 and apart.out.endswith("5 tensors have the same bytes, 0 the same values, 3 differ\n")
    assert run(["decode", str(packed), str(tmp_path / "dense")]) == 0
    equal = Said(capsys, "diff", packed, tmp_path / "dense")
    assert equal.code == 0 and equal.out == "5 tensors have the same bytes, 3 the same values, 0 differ\n"
    other = folder(tmp_path / "other", {"embed.weight": normal(96, 128), "new": normal(3)})
    rows = {t["name"]: t["note"] for t in Said(capsys, "diff", other, model, "--json").json["tensors"]}
    assert rows["embed.weight"] == "[96, 128] against [96, 256]" and rows["new"] == f"only in {other}"
    assert rows["positions"] == f"only in {model}"


def test_numbers_that_json_does_not_have_stand_as_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "zeros.safetensors")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "ones.safetensors")
    said = Said(capsys, "diff", tmp_path / "zeros.safetensors", tmp_path / "ones.safetensors", "--json")
    assert said.json["tensors"][0]["relative_rms"] == "inf" and "Infinity" not in said.out


def test_decode_says_what_it_wrote(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "decode", packed, tmp_path / "dense.safetensors", "--dtype", "f16")
    assert said.code == 0 and "decode (lossy)" in said.out
    said = Said(capsys, "decode", tmp_path / "dense.safetensors", tmp_path / "again")
    assert said.code == 2 and said.err == f"packfmt: {tmp_path}/dense.safetensors: nothing is packed\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("convert {model} {out} --to q4", 2, "no format is called 'q4'; did you mean q4_0"),
        ("convert {model} {out}", 2, "say which layout; packfmt formats lists them"),
        ("convert {model} {out} --to q4_0 --map embed", 2, "'embed' is not REGEX=LAYOUT"),
        ("convert {model} {out} --to q4_0 --max-shard-size 5XB", 2, "'5XB' is not a size such as 5GB, 500MB or 1GiB"),
        ("convert {model} {out} --to q4_0 --max-shard-size 1.2.3GB", 2, "'1.2.3GB' is not a size such as 5GB"),
        (
            "convert {model} {out} --to q4_0 --export zip",
            2,
            "no container is called 'zip'; there are safetensors, gguf",
        ),
        ("convert {model} {out} --to q4_0 --bogus", 2, "bogus"),
        ("convert {model} {out} --to q4_0 --plan x.json", 2, "--to: a saved plan says all of it"),
        ("convert {tmp}/modle {out} --to q4_0", 3, "{tmp}/modle: no such file or folder; did you mean model?"),
        ("convert {tmp}/model/config.json {out} --to q4_0", 3, "config.json: neither .safetensors nor .gguf"),
        ("convert {tmp}/empty {out} --to q4_0", 3, "{tmp}/empty: no safetensors or GGUF file in this folder"),
        ("convert {tmp}/pickled {out} --to q4_0", 3, "only pickled weights (pytorch_model.bin), which can run code"),
        (
            "convert {bad}/truncated.safetensors {out} --to q8_0",
            3,
            "582 bytes of tensors, the header needs 592; truncated",
        ),
        (
            "convert {bad}/flipped_bit.safetensors {out} --to q8_0",
            3,
            "the bytes of 'blocks' are not those that were written",
        ),
        ("inspect {bad}/absurd_header_length.safetensors", 3, "a header of 1152921504606846976 bytes"),
        (
            "inspect {bad}/git_lfs_pointer.safetensors",
            3,
            "a Git LFS pointer, not the file it stands for; run git lfs pull",
        ),
        ("convert {model} {tmp}/out.onnx --to q4_0", 2, "a folder, a .safetensors or a .gguf is written, no .onnx"),
        ("validate {tmp}/nothing.gguf", 3, "{tmp}/nothing.gguf: no such file or folder"),
        ("convert", 2, "Missing argument"),
        ("frobnicate", 2, "No such command 'frobnicate'"),
    ],
)
def test_a_wrong_command_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    places = {"model": model, "out": tmp_path / "out", "tmp": tmp_path, "bad": BAD}
    said = Said(capsys, *words.format(**places).split())
    assert said.code == code, said.err
    assert message.format(**places) in said.err
    assert said.err.count("\n") == (1 if said.err else 0) and "Traceback" not in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "pickled"]


def test_no_command_is_help_and_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys)
    assert said.code == 2 and said.out.startswith("Usage: packfmt") and "convert" in said.out and said.err == ""


def test_help_answers_without_loading_what_it_does_not_need() -> None:
    heavy = "{'numpy', 'numba', 'onnx', 'huggingface_hub', 'gguf'}"
    code = f"import sys; from packfmt.cli import run; run(['--help']); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n") and "convert" in done.stdout


def test_sizes_and_tables_read_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert [show.size(n) for n in (0, 999, 1000, 123456, 7.5e9, 2e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "123 kB",
        "7.5 GB",
        "2 TB",
    ]
    show.table(("name", "n", "note"), [("a", 1, "3 of 4"), ("long", 20.5, "")])
    assert capsys.readouterr().out == "name     n  note\na        1  3 of 4\nlong  20.5\n"


def test_progress_is_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(0, 6)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    weights = {f"{i}.weight": normal(64, 64, seed=i) for i in range(6)}
    save_file(weights, tmp_path / "in.safetensors")
    said = Said(capsys, "convert", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", "q8_0")
    lines = said.err.splitlines()
    assert len(lines) == 6 and re.fullmatch(r" 17%  16.4 kB of 98.3 kB  \d.weight", lines[0])  # as yet without a rate
    assert re.fullmatch(r" 83%  81.9 kB of 98.3 kB  .*/s  .* left  \d.weight", lines[4])
    assert re.fullmatch(r"100%  98.3 kB of 98.3 kB  .*/s  0 s left  \d.weight", lines[5])


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_is_a_bar_on_a_terminal(model: Path, tmp_path: Path) -> None:
    import pty

    parent, child = pty.openpty()
    code = "import sys; from packfmt.cli import run; sys.exit(run(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "convert", str(model), str(tmp_path / "out"), "--to", "q8_0"]
    process = subprocess.Popen(
        words, stderr=child, stdout=subprocess.PIPE, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    )
    process.communicate()
    os.close(child)
    seen = b""
    try:
        while chunk := os.read(parent, 65536):
            seen += chunk
    except OSError:
        pass
    assert process.returncode == 0 and b"100% 330 kB of 330 kB" in seen
    assert any(name.encode() in seen for name in tensors())


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "packfmt", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"packfmt {packfmt.__version__}\n")
