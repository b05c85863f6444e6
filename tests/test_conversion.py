"""Conversions end to end: what arrives, what is left when something goes wrong, and how much is held."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import packfmt
from packfmt import checkpoint, codecs, conversion, exporters, verify
from packfmt.conversion import work
from packfmt.errors import ContainerError, LayoutError, MachineError, MismatchError, PlanError
from packfmt.exporters import Extras, output
from packfmt.plan import Plan, Recipe, Step
from tests.converting import small_slices
from tests.models import BF16, PAIRS, folder, normal, same, tensors
from tests.outputs import save

GGUF = exporters.get("gguf")
IN_GGUF = tuple(n for n in codecs.names() if not GGUF.refusal(codecs.get(n).layout, (64, 256)))
PACKING = tuple(n for n in IN_GGUF if codecs.get(n).layout.grid.name != "plain")
ARRIVALS = [(n, s) for n in codecs.names() for s in ("", ".safetensors", ".gguf") if s != ".gguf" or n in IN_GGUF]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model")


def left(path: Path) -> list[str]:
    """What lies in a folder besides the source."""
    return sorted(p.name for p in path.iterdir() if p.name != "model")


@pytest.mark.parametrize(("name", "suffix"), ARRIVALS)
def test_every_layout_arrives_in_every_container_that_holds_it(
    model: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    target = tmp_path / f"out{suffix}"
    codec = codecs.get(name)
    fallback = "f32" if codec.layout.block["rows"] > 32 else ""  # then only the experts have rows enough
    report = conversion.convert(model, target, name, check=True, fallback=fallback)
    assert any(s.layout == codec.layout for s in report.plan.steps)
    with checkpoint.open(target) as out:
        assert out.keys() == tensors().keys()
        for tensor, weight in tensors().items():
            step = next(s for s in report.plan.steps if s.name == tensor)
            got = out[tensor]
            assert (got.layout, got.shape) == (step.layout, weight.shape)
            if step.layout == codec.layout:
                want = codec.encode(weight)
                assert all(same(got.components[k], v) for k, v in want.components.items())
            else:
                assert same(verify.values(got), weight)
    assert verify.validate(target) == []
    assert left(tmp_path) == [target.name]


def test_a_folder_brings_config_and_side_files_along(model: Path, tmp_path: Path) -> None:
    conversion.convert(model, tmp_path / "out", "q4_0")
    out = tmp_path / "out"
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "toy",
        "hidden_size": 256,
        "quantization_config": {"quant_method": "packfmt", "version": 1, "layouts": ["q4_0"]},
    }
    with checkpoint.open(out) as packed:
        conversion.run(conversion.decode_plan(packed, tmp_path / "dense"), packed, tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {"model_type": "toy", "hidden_size": 256}
    dense = load_file(tmp_path / "dense" / "model.safetensors")  # others' readers find all tensors under their names
    with checkpoint.open(out) as packed:
        assert all(same(dense[n], verify.values(packed[n])) for n in packed)


def test_shards_hold_the_same_tensors_as_one_file(model: Path, tmp_path: Path) -> None:
    conversion.convert(model, tmp_path / "one", "q8_0")
    conversion.convert(model, tmp_path / "many", "q8_0", max_shard=20_000)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for name, array in whole.items():
        assert same(load_file(tmp_path / "many" / index["weight_map"][name])[name], array)
    with checkpoint.open(tmp_path / "one") as a, checkpoint.open(tmp_path / "many") as b:
        assert all(d.same_bytes for d in verify.compare(a, b))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16, *(
    getattr(ml_dtypes, n) for n in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
)])  # fmt: skip
def test_every_float_dtype_is_a_source(tmp_path: Path, dtype: type) -> None:
    weight = (normal(64, 128) * 8).astype(dtype)
    save_file({"a.weight": weight}, tmp_path / "in.safetensors")
    conversion.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "q8_0")
    with checkpoint.open(tmp_path / "out.safetensors") as out:
        got = out["a.weight"]
    want = codecs.get("q8_0").encode(weight.astype(np.float32))
    assert same(got.components["blocks"], want.components["blocks"])
    assert got.dtype == np.dtype(dtype).name


@pytest.mark.parametrize("name", PACKING)
def test_containers_convert_into_each_other_without_touching_a_byte(model: Path, tmp_path: Path, name: str) -> None:
    ways = [tmp_path / "a", tmp_path / "b.gguf", tmp_path / "c", tmp_path / "d.gguf", tmp_path / "e.safetensors"]
    conversion.convert(model, ways[0], name)
    for source, target in pairwise(ways):
        report = conversion.convert(source, target, name)
        assert {s.action for s in report.plan.steps} == {"keep"}
    with checkpoint.open(ways[0]) as first, checkpoint.open(ways[-1]) as last:
        assert all(d.same_bytes for d in verify.compare(first, last))
    # the config went through the GGUF; files that it has no place for did not
    assert json.loads((ways[2] / "config.json").read_text()) == json.loads((ways[0] / "config.json").read_text())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "MXFP4", "TQ2_0"])
def test_a_gguf_of_others_is_a_source(tmp_path: Path, kind: str) -> None:
    weight = normal(8, 512, dtype=np.float32)
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    conversion.convert(tmp_path / "in.gguf", tmp_path / "out", kind.lower())
    with checkpoint.open(tmp_path / "out") as out:
        got = out["blk.0.ffn_up.weight"]
        assert same(got.components["blocks"], raw)
        assert same(got.decode(), gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    conversion.convert(tmp_path / "out", tmp_path / "again.gguf", kind.lower())
    reader = gguf.GGUFReader(tmp_path / "again.gguf")
    assert reader.fields["llama.block_count"].contents() == 3
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.tensors[0].data.tobytes() == raw.tobytes()


def test_a_layout_that_nobody_here_knows_is_repacked_exactly_into_one_with_the_same_numbers(tmp_path: Path) -> None:
    packed = codecs.get("q4_0").encode(normal(64, 128, dtype=np.float32))
    step = Step("w", packed.shape, "float32", PAIRS, PAIRS, "keep", "")
    plan = Plan("", "safetensors", (step,))
    save(exporters.get("safetensors"), tmp_path / "in.safetensors", plan, iter([packed.repack(PAIRS)]), Extras())
    report = conversion.convert(tmp_path / "in.safetensors", tmp_path / "out.gguf", "q4_0", check=True)
    assert [(s.action, s.exact) for s in report.plan.steps] == [("repack", True)]
    with checkpoint.open(tmp_path / "out.gguf") as out:
        assert same(out["w"].components["blocks"], packed.components["blocks"])


def test_quantising_again_decodes_first_and_the_plan_says_why(model: Path, tmp_path: Path) -> None:
    conversion.convert(model, tmp_path / "q8", "q8_0")
    report = conversion.convert(tmp_path / "q8", tmp_path / "q4", "q4_0")
    step = next(s for s in report.plan.steps if s.name == "embed.weight")
    assert step.action == "requantise" and "not exact: q4_0 has no code for -128" in step.reason
    with checkpoint.open(tmp_path / "q8") as q8, checkpoint.open(tmp_path / "q4") as q4:
        want = codecs.get("q4_0").encode(q8["embed.weight"].decode())
        assert same(q4["embed.weight"].components["blocks"], want.components["blocks"])


def test_gguf_holds_ggml_s_types_and_says_so_of_others(model: Path, tmp_path: Path) -> None:
    assert {"q8_0", "tq1_0", "tq2_0", "q1_0", "q2_0", "sherry_s16", "i2_s", "f16"} <= set(IN_GGUF)
    for name in set(codecs.names()) - set(IN_GGUF):
        with pytest.raises(PlanError, match=rf"GGUF|{name}"):
            conversion.convert(model, tmp_path / "out.gguf", name)
        assert left(tmp_path) == []


# ---------------------------------------------------------------- what goes wrong


def test_a_weight_that_is_not_a_number_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    weight = normal(64, 64, dtype=np.float32)
    weight[3, 5] = np.nan
    folder(tmp_path / "model", {"good.weight": normal(64, 64), "bad.weight": weight})
    with pytest.raises(LayoutError, match=r"bad\.weight: q8_0: 1 weights are not finite, the first at \[3, 5\]"):
        conversion.convert(tmp_path / "model", tmp_path / "out", "q8_0")
    assert left(tmp_path) == []


def test_a_target_that_exists_is_kept_unless_forced(model: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "out", tmp_path / "out.gguf"):
        conversion.convert(model, target, "q8_0")
        with pytest.raises(PlanError, match="exists; choose another destination or say --force"):
            conversion.convert(model, target, "q4_0")
        conversion.convert(model, target, "q4_0", force=True)
        with checkpoint.open(target) as out:
            assert out["embed.weight"].layout.name == "q4_0"
    assert left(tmp_path) == ["out", "out.gguf"]


def test_force_does_not_delete_what_packfmt_did_not_write(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(PlanError, match="a folder that is not known to be packfmt's"):
        conversion.convert(model, tmp_path / "photos", "q8_0", force=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_a_folder_that_is_called_as_what_is_replaced_is_not_deleted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "cat.jpg").write_bytes(b"cat")
    conversion.convert(model, tmp_path / "out", "q8_0")
    conversion.convert(model, tmp_path / "out", "q4_0", force=True)
    assert left(tmp_path) == ["out", "out.replaced"]
    assert (tmp_path / "out.replaced" / "cat.jpg").read_bytes() == b"cat"


def test_the_source_is_never_its_own_target(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    before = file.read_bytes()
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "link.safetensors").symlink_to(file)
    os.link(file, tmp_path / "hard.safetensors")
    for source, target in (
        (model, model),
        (model, tmp_path),
        (model, tmp_path / "link"),
        (model, file),
        (file, tmp_path / "link.safetensors"),
        (file, tmp_path / "hard.safetensors"),
    ):
        with pytest.raises(PlanError, match="is the source or holds it"):
            conversion.convert(source, target, "q8_0", force=True)
    assert file.read_bytes() == before


def test_a_file_does_not_replace_a_folder_nor_a_folder_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(PlanError, match="file: is a file, and a folder is to be written"):
        conversion.convert(model, tmp_path / "file", "q8_0", force=True)
    with pytest.raises(PlanError, match=r"folder\.gguf: is a folder, and a file is to be written"):
        conversion.convert(model, tmp_path / "folder.gguf", "q8_0", force=True)
    assert left(tmp_path) == ["file", "folder.gguf"] and (tmp_path / "file").read_bytes() == b"mine"


def test_a_dense_tensor_with_a_components_name_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", {"w": normal(64, 64), "w.blocks": normal(9)})
    with pytest.raises(PlanError, match=r"both would be stored as 'w\.blocks'; keep one of them"):
        conversion.convert(model, tmp_path / "out", "q8_0")
    assert left(tmp_path) == []


def test_a_missing_folder_is_told_before_anything_is_read(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nowhere: no such folder; make it first"):
        conversion.convert(model, tmp_path / "nowhere" / "out", "q8_0")


def test_too_small_a_disk_is_told_before_anything_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a plan for a petabyte, on the disk as it is
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, tmp_path / "out", Recipe("q8_0"))
        monkeypatch.setattr(type(plan), "nbytes", property(lambda self: 10**15))
        with pytest.raises(MachineError, match="bytes free, this conversion needs 1,000,0"):
            conversion.run(plan, source, tmp_path / "out")
    assert left(tmp_path) == []


def test_a_file_that_shrinks_while_it_is_read_is_told(model: Path, tmp_path: Path) -> None:
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, tmp_path / "out", Recipe("q8_0"))
        os.truncate(model / "model.safetensors", 4000)
        with pytest.raises(ContainerError, match="the file shrank while it was read"):
            conversion.run(plan, source, tmp_path / "out")
    # whoever puts the file back can go on
    assert left(tmp_path) == ["out.partial", "out.partial.journal", "out.partial.plan"]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_the_first_tensor_that_fails_is_named_with_its_rows_and_nothing_is_left(
    tmp_path: Path, threads: int, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKFMT_THREADS", str(threads))
    small_slices(monkeypatch)
    model = {f"layers.{i}.weight": normal(256, 256, seed=i) for i in range(4)}
    model["layers.1.weight"][250, 7] = np.nan
    model["layers.2.weight"][0, 0] = np.inf
    model["layers.3.weight"][9, 9] = np.nan
    folder(tmp_path / "model", model)
    honest = work.apply

    def slow_for_the_first(step: Step, *arguments: Any) -> Any:
        if step.name == "layers.1.weight":
            time.sleep(0.002)
        return honest(step, *arguments)

    monkeypatch.setattr(work, "apply", slow_for_the_first)
    with pytest.raises(LayoutError) as error:
        conversion.convert(tmp_path / "model", tmp_path / f"out{suffix}", "q8_0")
    said = re.fullmatch(
        r"layers\.1\.weight: in rows (\d+) to \d+, the first of them counted as 0: "
        r"q8_0: 1 weights are not finite, the first at \[(\d+), 7\]", str(error.value),
    )  # fmt: skip
    assert said and int(said[1]) + int(said[2]) == 250, error.value
    assert left(tmp_path) == []


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_bytes_that_are_not_those_that_were_written_are_told_of_tensors_read_in_slices(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    folder(tmp_path / "model", {f"layers.{i}.weight": normal(256, 256, seed=i) for i in range(3)})
    source, target = tmp_path / "model" / f"q8{suffix}", tmp_path / f"out{suffix}"
    conversion.convert(tmp_path / "model" / "model.safetensors", source, "q8_0")
    file = source if suffix else source / "model.safetensors"
    with file.open("r+b") as damaged:
        damaged.seek(-1000, os.SEEK_END)
        byte = damaged.read(1)
        damaged.seek(-1000, os.SEEK_END)
        damaged.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ContainerError, match=r"layers\.2\.weight: .*bytes .*are not those that were written") as error:
        conversion.convert(source, target, "q4_0")
    assert error.value.rule == "PF109"
    assert left(tmp_path) == []


def test_a_checksum_is_looked_at_though_all_rows_were_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    monkeypatch.setenv("PACKFMT_THREADS", "1")
    folder(tmp_path / "model", {"a.weight": normal(256, 256)})
    conversion.convert(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "q8.gguf", "q8_0")
    with (tmp_path / "model" / "q8.gguf").open("r+b") as damaged:
        damaged.seek(-1, os.SEEK_END)
        damaged.write(b"\1")
    honest = checkpoint.Checkpoint.check

    def interrupted(self: Any, name: str) -> None:
        raise KeyboardInterrupt

    def last(self: Any, at: int) -> Iterator[Any]:
        first, *others = jobs(self, at)
        return iter([*others, first])

    jobs = work._Work._jobs
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(work._Work, "_jobs", last)
        patched.setattr(checkpoint.Checkpoint, "check", interrupted)
        conversion.convert(tmp_path / "model" / "q8.gguf", tmp_path / "out.gguf", "q4_0")
    partial = "out.gguf.partial"
    assert checkpoint.Checkpoint.check is honest
    assert left(tmp_path) == [partial, f"{partial}.journal", f"{partial}.plan"]
    with pytest.raises(ContainerError, match="are not those that were written"):
        conversion.convert(tmp_path / "model" / "q8.gguf", tmp_path / "out.gguf", "q4_0", resume=True)
    assert left(tmp_path) == []


def test_a_source_that_is_cut_off_while_it_is_read_can_be_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    model = folder(tmp_path / "model", {f"layers.{i}.weight": normal(256, 256, seed=i) for i in range(3)})
    file, target = model / "model.safetensors", tmp_path / "out.gguf"
    whole, found = file.read_bytes(), file.stat()
    conversion.convert(model, tmp_path / "whole.gguf", "q8_0")
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, target, Recipe("q8_0"))

        def cut_off(name: str, nbytes: int) -> None:
            os.truncate(file, len(whole) // 2)

        with pytest.raises(ContainerError, match="the file shrank while it was read") as error:
            conversion.run(plan, source, target, progress=cut_off)
    assert error.value.rule == "PF101" and not target.exists()
    file.write_bytes(whole)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    conversion.convert(model, target, "q8_0", resume=True)
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert left(tmp_path) == ["out.gguf", "whole.gguf"]


@pytest.mark.parametrize("lost", ["the folder", "a file"])
def test_permission_lost_while_it_is_written_is_one_line(
    tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_slices(monkeypatch)
    model = folder(tmp_path / "model", {f"layers.{i}.weight": normal(256, 256, seed=i) for i in range(3)})
    place = tmp_path / "place"
    place.mkdir()
    target = place / "out"
    if lost == "a file":  # as root, whom no mode stops, sees it
        monkeypatch.setattr(output, "write_at", refusing_after(5, output.write_at))
    elif os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, target, Recipe("q8_0"))
        with pytest.raises(MachineError) as error:
            conversion.run(plan, source, target, progress=lambda *_: place.chmod(0o500))
    place.chmod(0o700)
    assert str(error.value).startswith(f"{target}: permission denied; ")
    assert str(error.value).endswith(f"; what is done lies in {target}.partial, --resume goes on")
    monkeypatch.undo()
    conversion.convert(model, target, "q8_0", resume=True, check=True)
    assert [p.name for p in place.iterdir()] == ["out"]


def refusing_after(calls: int, write: Callable[..., None]) -> Callable[..., None]:
    count = itertools.count()

    def refusing(*arguments: Any) -> None:
        if next(count) == calls:
            raise PermissionError(errno.EACCES, "Permission denied")
        write(*arguments)

    return refusing


def test_a_source_that_cannot_be_read_is_not_the_destination_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder(tmp_path / "model", {"a.weight": normal(64, 64)})

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(work, "read", broken)
    with pytest.raises(MachineError, match=r"model: a\.weight: cannot be read: .*Input/output error; --resume goes on"):
        conversion.convert(model, tmp_path / "out", "q8_0")


def test_verification_finds_what_the_disk_changed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = verify.check_output

    def after_the_disk_lied(path: Path, container: str, *more: Any) -> None:
        with (path / "model.safetensors").open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            byte = file.read(1)
            file.seek(-5, os.SEEK_END)
            file.write(bytes([byte[0] ^ 16]))
        honest(path, container, *more)

    monkeypatch.setattr(verify, "check_output", after_the_disk_lied)
    with pytest.raises(ContainerError, match="are not those that were written"):
        conversion.convert(model, tmp_path / "out", "q8_0", check=True)
    assert left(tmp_path) == []


def test_verification_finds_a_law_that_is_broken(tmp_path: Path) -> None:
    bad = Path(__file__).parent.parent / "spec" / "bad"
    with pytest.raises(MismatchError, match=r"layer\.weight: verification failed: 8 bytes of 'words' change"):
        verify.check_output(bad / "spare_bits.safetensors", "safetensors")
    with pytest.raises(MismatchError, match=r"layer\.weight: verification failed: decodes to numbers that are not"):
        verify.check_output(bad / "nan_scale.safetensors", "safetensors")


RUN = "from packfmt.cli import main; main()"


def command(*arguments: object, limit: int = 0) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, whose files may have at most `limit` bytes."""

    def before() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=before)


def test_a_write_that_the_system_refuses_is_one_line(model: Path, tmp_path: Path) -> None:
    for name in ("out", "out.gguf"):
        target = tmp_path / name
        done = command("convert", model, target, "--to", "f32", limit=100_000)
        assert done.returncode == 3, done.stderr
        what = f"File too large; what is done lies in {target}.partial, --resume goes on"
        assert done.stderr == f"packfmt: {target}: {what}\n"
        assert left(tmp_path) == [f"{name}.partial", f"{name}.partial.journal", f"{name}.partial.plan"]
        conversion.convert(model, target, "f32", resume=True)
        shutil.move(target, model)
    assert left(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(MachineError, match="locked: may not be written"):
        conversion.convert(model, tmp_path / "locked" / "out", "q8_0")


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".gguf"])
def test_an_interrupted_conversion_leaves_what_can_be_gone_on_with(tmp_path: Path, suffix: str) -> None:
    model = folder(tmp_path / "model", {f"layers.{i}.weight": normal(1024, 1024, seed=i) for i in range(24)})
    target = tmp_path / f"out{suffix}"
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "convert", str(model), str(target), "--to", "mxfp4"],
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = tmp_path / f"out{suffix}.partial"
    for _ in range(2000):
        if partial.exists():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.count("\n") == 1 and "--resume goes on" in errors
    assert left(tmp_path) == [partial.name, f"{partial.name}.journal", f"{partial.name}.plan"]
    conversion.convert(model, target, "mxfp4", resume=True, check=True)
    assert left(tmp_path) == [target.name]


@pytest.mark.parametrize("name", ["q4_0", "mxfp4"])
def test_no_more_than_was_allowed_is_held_whatever_a_tensor_needs(tmp_path: Path, name: str) -> None:
    side, memory = 1024, 6_000_000
    model = folder(tmp_path / "model", {f"layers.{i}.weight": normal(4 * side, side, seed=i) for i in range(3)})
    conversion.convert(model, tmp_path / "warm", name)  # compile first
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, tmp_path / "out", Recipe(name))
        assert plan.working_set > 3 * memory
        tracemalloc.start()
        conversion.run(plan, source, tmp_path / "out", memory=memory)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < memory * 1.2 + 1_000_000, peak


def test_who_wants_much_memory_is_not_overtaken_for_ever() -> None:
    memory, order, may_end = work._Memory(4), [], threading.Event()

    def hold(name: str, nbytes: int) -> None:
        with memory.held(nbytes):
            order.append(name)
            may_end.wait(10)

    first, much, little = (threading.Thread(target=hold, args=a) for a in (("first", 1), ("much", 9), ("little", 1)))
    first.start()
    while not order:
        time.sleep(0.001)
    much.start()
    while not memory._turn.locked():
        time.sleep(0.001)
    little.start()
    time.sleep(0.05)  # in which it would take what is free
    may_end.set()
    for one in (first, much, little):
        one.join()
    assert order == ["first", "much", "little"] and memory._free == 4


# ---------------------------------------------------------------- the front door


def test_the_package_does_what_its_docstring_says(model: Path, tmp_path: Path) -> None:
    weight = normal(64, 256)
    packed = packfmt.pack(weight, "q4_0")
    assert (packed.nbytes, packed.layout.bits_per_weight, packed.decode().shape) == (
        64 * 256 // 32 * 18,
        4.5,
        (64, 256),
    )
    packfmt.convert(model, tmp_path / "out", to="mxfp4", overrides={r"embed": "q8_0"})
    with packfmt.open(tmp_path / "out") as out:
        assert out["embed.weight"].layout.name == "q8_0" and len(out) == len(tensors())
    assert "q4_0" in packfmt.formats()


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import packfmt, sys; print(sorted({'numba', 'onnx', 'huggingface_hub', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PACKFMT_THREADS", "2")
    yield
