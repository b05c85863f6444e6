"""What a user is told who meets a wrong file, place or option: where, what was found, what is needed, what to do."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from packfmt import checkpoint, conversion
from packfmt.cli import making, run
from packfmt.cli.options import size_of
from packfmt.errors import MachineError, why
from packfmt.exporters import beside, handles
from tests.models import folder, normal

UNREADABLE = Path("/proc/self/mem")  # a file that can be opened, and whose first byte nobody can read
linux = pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The exit code of a command, and what it printed as an error."""
    capsys.readouterr()
    code = run([*map(str, words)])
    return code, capsys.readouterr().err


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1g", 10**9), ("1gb", 10**9), ("1GIB", 1 << 30), ("1gib", 1 << 30), ("5Mb", 5 * 10**6)]
)
def test_capitals_make_no_difference_to_a_size(text: str, nbytes: int) -> None:
    assert size_of(text, "--memory") == nbytes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert {model} {tmp}/out.gguf --to q4_0 --max-shard-size 1MB", "out.gguf is one file; leave it out"),
        ("convert {model} {tmp}/out.safetensors --to q4_0 --max-shard-size 1MB", "out.safetensors is one file"),
        ("convert {model} {tmp}/out --to q4_0 --export gguf --max-shard-size 1MB", "a GGUF is one file"),
        ("plan {model} --to q4_0 --export gguf --max-shard-size 1MB", "a GGUF is one file"),
        ("convert {model} {tmp}/out --plan x --max-shard-size 1MB", "a saved plan says all of it"),
        ("convert {model} {tmp}/out --plan x.json", "x.json: no such file; packfmt plan SRC --to"),
        ("convert {model} {tmp}/out --plan {model}", "model: no file; packfmt plan SRC --to LAYOUT --json"),
        ("convert {model} {tmp}/out --to q4_0 --plan x", "--to: a saved plan says all of it; leave one of both out"),
        ("convert {model} {tmp}/out --to nvfp4_ct --export compressed-tensors", "; leave it dense with --map REGEX="),
        ("convert {model} {tmp}/out --to q4_0 --map a=q4_1", "--map 'a=q4_1': no format is called 'q4_1'; did you"),
        ("convert {model} {tmp}/out --to q4_0 --map a=kep", "--map 'a=kep': no format is called 'kep'; did you mean k"),
        ("convert {model} {tmp}/out --to q4_0 --fallback q81", "--fallback: no format is called 'q81'; did you"),
        ("convert {model} {tmp}/out --to kepe", "no format is called 'kepe'; did you mean keep?"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_followed_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    code, err = said(capsys, *words.format(model=model, tmp=tmp_path).split())
    assert code == 2 and message in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a saved plan: "),
        ("[]", "not a saved plan: has no list of steps; packfmt plan SRC --to LAYOUT --json writes one"),
        ('{"steps": []}', "not a saved plan: 'version' is missing"),
        ('{"version": 1, "container": "safetensors", "steps": [3]}', "not a saved plan: a step is not as packfmt plan"),
    ],
)
def test_what_is_no_plan_is_told_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "plan.json").write_text(text)
    code, err = said(capsys, "convert", model, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert code == 2 and f"{tmp_path}/plan.json: {message}" in err and err.count("\n") == 1


def test_a_fallback_that_does_not_fit_either_is_told_with_what_both_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a.weight": normal(64, 100)}, tmp_path / "in.safetensors")
    words = ["convert", tmp_path / "in.safetensors", tmp_path / "out", "--to", "tq2_0", "--fallback"]
    code, err = said(capsys, *words, "mxfp4")
    neither = "100 columns, tq2_0 needs a multiple of 256; 100 columns, mxfp4 a multiple of 32"
    assert (code, err) == (2, f"packfmt: a.weight: {neither}; choose another --fallback, such as keep, or --map\n")
    assert said(capsys, *words, "keep")[0] == 2  # nothing would be packed
    assert said(capsys, *words, "f16")[0] == 0


@pytest.mark.parametrize(
    "words", [["convert", "", "out"], ["convert", "in", ""], ["inspect", ""], ["diff", "a", ""], ["validate", ""]]
)
def test_an_empty_path_is_not_the_folder_one_is_in(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, err = said(capsys, *words)
    assert code == 2 and "is empty; name a file or folder" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("to", "few"),
    [
        ("q4_0", ", even for one row; say --memory {need}"),
        ("nvfp4_ct --encoder tiles", ", even for 16 rows, as few as its layout allows; say --memory {need}"),
        ("ptq161", ", for its layout or encoder (ptq161) must see all rows together; say --memory {need}, or choose"),
    ],
)
def test_too_little_memory_is_told_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, few: str
) -> None:
    save_file({"a.weight": normal(512, 1024)}, tmp_path / "in.safetensors")
    words = ["convert", tmp_path / "in.safetensors", tmp_path / "out", "--to", *to.split(), "--memory"]
    code, err = said(capsys, *words, "1kB")
    need = int(err.split(": ")[2].split()[0].replace(",", ""))
    assert code == 2 and f"{need:,} bytes are needed at once, --memory 1,000 are fewer" in err
    assert few.format(need=need) in err
    assert said(capsys, *words, need - 1)[0] == 2
    assert said(capsys, *words, need)[0] == 0


# ---------------------------------------------------------------- side files


@linux
def test_a_side_file_that_cannot_be_read_is_told_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "tokenizer.model").symlink_to(UNREADABLE)
    monkeypatch.setattr(checkpoint.Checkpoint, "__getitem__", lambda *_: pytest.fail("it has begun"))
    code, err = said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0")
    what = "a side file that cannot be read: Input/output error; mend or remove it"
    assert (code, err) == (3, f"packfmt: {model}/tokenizer.model: {what}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    assert said(capsys, "convert", model, tmp_path / "out.safetensors", "--to", "q4_0")[0] == 0  # which takes none


def test_a_link_to_nowhere_is_a_side_file_that_cannot_be_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "merges.txt").symlink_to(tmp_path / "nowhere")
    code, err = said(capsys, "plan", model, "--to", "q4_0")
    assert code == 3 and err.startswith(f"packfmt: {model}/merges.txt: a side file that cannot be read: ")
    code, err = said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0")
    assert code == 3 and err.startswith(f"packfmt: {model}/merges.txt: a side file that cannot be read: ")
    assert said(capsys, "inspect", model)[0] == 0


def test_a_side_file_that_is_lost_meanwhile_is_not_the_output_s_fault(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_extras(*_: object) -> None:
        (model / "tokenizer.json").unlink(missing_ok=True)
        honest(*_)

    honest = beside.write_extras
    monkeypatch.setattr(beside, "write_extras", write_extras)
    code, err = said(capsys, "convert", model, tmp_path / "out", "--to", "q4_0")
    what = "cannot be read: No such file or directory; mend it, and --resume goes on"
    assert (code, err) == (3, f"packfmt: {model}/tokenizer.json: {what}\n")
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- files of another kind, and places


def test_a_text_that_is_called_safetensors_is_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_text("hello, this is a text")
    code, err = said(capsys, "inspect", tmp_path / "a.safetensors")
    assert code == 3 and err.endswith("; begins with b'hello, t', is it a safetensors file?\n")


def test_what_is_cut_off_is_to_be_fetched_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "m", shards=2)
    file = path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, err = said(capsys, "convert", path, tmp_path / "out", "--to", "q4_0")
    assert code == 3 and err.startswith(f"packfmt: {file}: ") and err.endswith("; truncated; fetch or make it again\n")
    file.unlink()
    code, err = said(capsys, "inspect", path)
    assert code == 3 and "which is not in the folder; fetch it, or the whole model again" in err
    (tmp_path / "empty.gguf").write_bytes(b"")
    code, err = said(capsys, "inspect", tmp_path / "empty.gguf")
    assert code == 3 and "empty.gguf: is empty, a GGUF begins with b'GGUF'" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    code, err = said(capsys, "inspect", tmp_path / "a.safetensors")
    told = f"packfmt: {tmp_path}/a.safetensors: neither a file nor a folder; save it as a file first\n"
    assert (code, err) == (3, told)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_told_before_the_work(
    model: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = said(capsys, "convert", model, small_disk / "out", "--to", "q4_0")
    assert code == 3 and err.startswith(f"packfmt: {small_disk}: ")
    assert "bytes free, this conversion needs" in err and err.endswith("; make room, or choose another place\n")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.EACCES, "permission denied; change who may read and write there"),
        (errno.EMFILE, "too many open files; raise ulimit -n"),
        (errno.ENOTDIR, "Not a directory"),
    ],
)
def test_an_error_of_the_system_says_what_to_do(
    number: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(number, os.strerror(number), "/a/b")

    def fail(*_: object, **__: object) -> None:
        raise error

    assert why(error) == words
    monkeypatch.setattr(checkpoint, "open", fail)
    assert said(capsys, "inspect", "/a/b") == (3, f"packfmt: /a/b: {words}\n")


@pytest.mark.parametrize("to", ["a.safetensors", "a.gguf"])
def test_a_disk_that_fails_while_it_is_read_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    save_file({"a.weight": normal(8, 32)}, tmp_path / "in.safetensors")
    conversion.convert(tmp_path / "in.safetensors", tmp_path / to, "f16", overrides={"a": "f16"})

    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    told = f"packfmt: {tmp_path / to}: input/output error of the disk or network; try again, or copy it elsewhere\n"
    assert said(capsys, "verify", tmp_path / to) == (3, told)
    assert said(capsys, "validate", tmp_path / to, tmp_path / "none") == (
        3,
        told + f"packfmt: {tmp_path}/none: no such file or folder\n",
    )


# ---------------------------------------------------------------- many files


def test_a_model_may_have_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    tensors = {f"{i:03}.weight": normal(8, 32, seed=i) for i in range(300)}
    source = folder(tmp_path / "m", tensors, shards=300)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        conversion.convert(source, tmp_path / "out", "keep", max_shard=8 * 32 * 4)
        with checkpoint.open(tmp_path / "out") as model:
            found = {name: model[name].decode() for name in model}
            again = {name: model.map(name).decode() for name in list(model)[:3]}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 300
    assert all(found[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert all(found[name].tobytes() == again[name].tobytes() for name in again)


def test_a_file_that_was_replaced_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "OPEN", 1)
    path = folder(tmp_path / "m", {f"{i}.weight": normal(8, 32, seed=i) for i in range(3)}, shards=3)
    with checkpoint.open(path) as model:
        (file,) = {i.file for i in model.index.values() if i.name == "0.weight"}
        model["1.weight"]
        save_file({"0.weight": normal(8, 32, seed=9)}, tmp_path / "other")
        os.replace(tmp_path / "other", file)
        with pytest.raises(checkpoint.ContainerError, match=f"^{file}: was replaced or written to while it was read$"):
            model["0.weight"]
        assert model["2.weight"].shape == (8, 32)


# ---------------------------------------------------------------- importance


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_importance_stays_in_its_file_until_rows_are_encoded(tmp_path: Path, dtype: object) -> None:
    weight = normal(64, 256)
    costs = np.random.default_rng(1).integers(0, 50, (64, 256)).astype(dtype)
    save_file({"a.weight": weight}, tmp_path / "in.safetensors")
    save_file({"a.weight": costs}, tmp_path / "costs.safetensors")
    found = making._importance(tmp_path / "costs.safetensors")["a.weight"]
    assert found.dtype == dtype and not found.flags.owndata and not found.flags.writeable
    words = ["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--to", "mxfp4"]
    assert run([*words, "--importance", str(tmp_path / "costs.safetensors"), "--memory", "20kB"]) == 0
    whole = conversion.convert(
        tmp_path / "in.safetensors", tmp_path / "b.safetensors", "mxfp4", importance={"a.weight": costs.astype("f4")}
    )
    assert whole.path.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_a_file_of_many_tensors_is_mapped_once(tmp_path: Path) -> None:
    save_file({f"{i}.weight": normal(2, 8, seed=i) for i in range(200)}, tmp_path / "costs.safetensors")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        found = making._importance(tmp_path / "costs.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(found[f"{i}.weight"].tobytes() == normal(2, 8, seed=i).tobytes() for i in range(200))


def test_importance_whose_bytes_have_changed_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": normal(64, 256)}, tmp_path / "in.safetensors")
    conversion.convert(tmp_path / "in.safetensors", tmp_path / "costs.safetensors", "keep")
    data = bytearray((tmp_path / "costs.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "costs.safetensors").write_bytes(data)
    with pytest.raises(checkpoint.ContainerError, match="are not those that were written"):
        making._importance(tmp_path / "costs.safetensors")


def test_side_files_in_a_model_that_lies_in_order_are_counted(model: Path) -> None:
    from packfmt.conversion import admission

    with checkpoint.open(model) as opened:
        assert admission.side_files(opened) == len('{"version": "1.0"}') + len("{}")
    (model / "tokenizer.json").unlink()
    with checkpoint.open(model) as opened:
        (model / "1_Pooling" / "config.json").unlink()
        with pytest.raises(MachineError, match=f"^{model}/1_Pooling/config.json: a side file that cannot be read: "):
            admission.side_files(opened)
