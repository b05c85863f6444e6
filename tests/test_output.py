"""What a container lays out, filled in any order, is what is written one tensor after the other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import gguf as ggml
import numpy as np
import pytest
from safetensors.numpy import load_file

from packfmt import checkpoint, codecs, exporters, slices
from packfmt.codec import PackedTensor, matrix
from packfmt.errors import ContainerError, MachineError, PlanError
from packfmt.exporters import Extras, KeyValue, output
from packfmt.exporters.output import Files, Output, announced
from packfmt.layout import DENSE, Codes, Component, Layout, Stream, Values, cols, dtype_of, grid, rows
from packfmt.plan import Plan, Step
from tests.outputs import save

CONFIG = {"model_type": "toy", "torch_dtype": "bfloat16"}
UP, NORM, SCALE = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.input_scale"
DIVIDING = "model.layers.0.mlp.up_proj.input_global_scale"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
SPARSE = Layout(
    "sparse_toy",
    (
        Component("blocks", (rows(1),), (Codes("codes", 4, (), (cols(1),)), Values("scale", "<f2"))),
        Stream("places", "<u2"),
        Stream("a/../b", "u1"),  # a file may call it so
    ),
    grid("affine", zero=8),
)  # fmt: skip
# container, layout, shape, name
CASES = [
    *(("safetensors", layout, (96, 512), UP) for layout in ("q4_0", "nvfp4", "sherry", "mxfp4_tile16")),
    *(("safetensors", layout, (384, 512), UP) for layout in ("nvfp4_rows", "nvfp4_out32", "mote_4", "bf16")),
    *(("gguf", layout, (96, 512), UP) for layout in ("q8_0", "nvfp4", "i2_s", "f16")),
    *(("gguf", layout, (3, 32, 512), UP) for layout in ("mxfp4", "nvfp4", "nvfp4_x3")),
    *(("compressed_tensors", layout, (384, 512), UP) for layout in ("nvfp4_ct", "ct_int4_g128", "ct_int3_g32_asym")),
    *(("compressed_tensors", layout, (384, 512), UP) for layout in ("fp8_row", "fp8_block", "mxfp6_e2m3")),
    ("bitnet", "bitnet", (96, 512), UP),
    ("deepseek", "fp8_block", (384, 512), UP),
    ("gpt_oss", "mxfp4_pairs", (3, 64, 512), EXPERTS),
    ("modelopt", "nvfp4_modelopt", (96, 512), UP),
    ("modelopt", "nvfp4_rows", (3, 32, 512), EXPERTS),
    ("quark", "mxfp4_pairs", (96, 512), UP),
]  # fmt: skip
WHOLE = {"bitnet", "mote_4", "nvfp4_x3"}  # which need not be cut


def drawn(layout: Layout, shape: tuple[int, ...], seed: int = 0) -> PackedTensor:
    """A tensor of random bytes."""
    rng = np.random.default_rng(seed)
    components = {
        c.name: rng.integers(0, 256, c.nbytes, np.uint8).view(dtype_of(c.dtype)).reshape(c.shape)
        for c in layout.fit(*matrix(shape)).components
    } | {
        s.name: rng.integers(0, 256, int(rng.integers(1, 999)) * dtype_of(s.dtype).itemsize, np.uint8).view(s.dtype)
        for s in layout.streams
    }
    dense = next((dtype_of(d.cell[0].dtype).name for d in layout.components[:1] if layout.name in DENSE), "")  # type: ignore[union-attr]
    return PackedTensor(layout, shape, components, dense or "bfloat16")


def step(name: str, tensor: PackedTensor, file: str = "") -> Step:
    return Step(name, tensor.shape, tensor.dtype, tensor.layout, tensor.layout, "keep", "", file=file)


def plan_of(container: str, tensors: dict[str, PackedTensor], files: int = 1) -> Plan:
    """The tensors in so many files."""
    names = [f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)] if files > 1 else [""]
    each = -(-len(tensors) // files)
    return Plan("m", container, tuple(step(n, t, names[i // each]) for i, (n, t) in enumerate(tensors.items())))


def model(layout: str, shape: tuple[int, ...], name: str) -> dict[str, PackedTensor]:
    """A packed weight and what is dense beside it; scales of inputs that some containers turn into their inverse."""
    return {
        NORM: drawn(DENSE["bf16"], (7,), 1),
        name: drawn(codecs.get(layout).layout, shape, 2),
        "router": drawn(DENSE["f32"], (5, 9), 3),
        DIVIDING: PackedTensor(DENSE["f32"], (1,), {"values": np.array([[4]], np.float32)}, "float32"),
        "position_ids": drawn(DENSE["i64"], (), 4),
        "none": drawn(DENSE["f16"], (0, 4), 5),
    }


def cut(tensor: PackedTensor, start: int, stop: int) -> PackedTensor:
    """Rows of a tensor."""
    shape = (stop - start, matrix(tensor.shape)[1])
    spans = slices.spans(tensor.layout, matrix(tensor.shape), start, stop)
    components = {}
    for c in tensor.layout.fit(*shape).components:
        raw = tensor.components[c.name].reshape(-1).view(np.uint8)
        found = np.concatenate([raw[begin : begin + nbytes] for begin, nbytes in spans[c.name]])
        components[c.name] = found.view(dtype_of(c.dtype)).reshape(c.shape)
    return PackedTensor(tensor.layout, shape, components, tensor.dtype)


def parts(tensor: PackedTensor, rng: random.Random) -> Iterator[tuple[int, int] | None]:
    """Slices of rows that make up a tensor; None for all of it."""
    count = matrix(tensor.shape)[0]
    unit = slices.unit(tensor.layout, matrix(tensor.shape))
    if not unit or count <= unit:
        yield None
        return
    inner = rng.sample(range(unit, count, unit), rng.randint(1, -(-count // unit) - 1))
    yield from pairwise([0, *sorted(inner), count])


def tree(path: Path) -> dict[str, bytes]:
    """The files below a path -> their bytes."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def fill(laid: Output, plan: Plan, tensors: dict[str, PackedTensor], path: Path, seed: int) -> Files:
    """Write slices in any order by two threads."""
    rng, all_of = random.Random(seed), list(tensors.values())
    files = Files(laid, plan.steps, path)
    files.make()
    jobs = [(at, rows) for at, tensor in enumerate(all_of) for rows in parts(tensor, rng)]
    rng.shuffle(jobs)

    def put(job: tuple[int, tuple[int, int] | None]) -> int:
        at, rows = job
        tensor = cut(all_of[at], *rows) if rows else all_of[at]
        return files.put(at, announced(plan.steps[at], tensor, tensor.shape[0] if rows else None), rows)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(put, jobs))
    return files


def sums_of(files: Files, plan: Plan) -> dict[str, dict[str, str]]:
    return {step.name: files.sums(at) for at, step in enumerate(plan.steps)}


def extras_of(folder: Path) -> Extras:
    (folder / "side").mkdir()
    for name in ("tokenizer.json", "module.json"):
        (folder / "side" / name).write_text(name)
    files = {
        "tokenizer.json": folder / "side" / "tokenizer.json",
        "2_Dense/module.json": folder / "side" / "module.json",
    }
    return Extras(CONFIG, files, {"general.architecture": KeyValue("STRING", "toy")})


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(("container", "layout", "shape", "name"), CASES)
def test_slices_in_any_order_give_the_bytes_of_the_sequential_writer(
    tmp_path: Path, container: str, layout: str, shape: tuple[int, ...], name: str, number: int
) -> None:
    room, tensors, extras = exporters.get(container), model(layout, shape, name), extras_of(tmp_path)
    plan = plan_of(container, tensors, 1 if container == "gguf" else number)
    suffix = ".gguf" if container == "gguf" else ".safetensors" if (container, number) == ("safetensors", 1) else ""
    path = tmp_path / f"one{suffix}"
    save(room, path, plan, tensors.values(), extras)
    laid = room.lay(path, plan, extras)
    assert laid.one_file == bool(suffix)
    packed = tensors[name]
    assert layout in WHOLE or 0 < slices.unit(packed.layout, matrix(packed.shape)) < matrix(packed.shape)[0]

    files = fill(laid, plan, tensors, tmp_path / "other", seed=number)
    sums = sums_of(files, plan)
    files.finish(sums)
    again = tree(tmp_path / "other")
    assert again == tree(path)
    assert {n: len(again[n or "."]) for n in laid.files} == laid.files
    if suffix:
        assert set(again) == {"."}
    else:
        beside = {"config.json", "tokenizer.json", "2_Dense/module.json", "gguf_keyvalues.json"}
        assert set(again) >= beside | set(laid.files)
    for step, entry in zip(plan.steps, laid.entries, strict=True):
        assert sums[step.name].keys() == entry.summed.keys()
        for key, places in entry.summed.items():
            stored = b"".join(again[file or "."][begin : begin + nbytes] for file, begin, nbytes in places)
            assert sums[step.name][key] == sha256(stored).hexdigest()
    with checkpoint.open(path) as found:
        for key in (name, "router"):
            for component, array in tensors[key].components.items():
                assert found[key].components[component].tobytes() == array.tobytes()


@pytest.mark.parametrize(("container", "layout", "shape", "name"), CASES)
def test_places_do_not_overlap_and_heads_have_one_length(
    tmp_path: Path, container: str, layout: str, shape: tuple[int, ...], name: str
) -> None:
    tensors = model(layout, shape, name)
    plan = plan_of(container, tensors, 1 if container == "gguf" else 2)
    laid = exporters.get(container).lay(tmp_path / "out", plan, Extras(CONFIG))
    sums = {s.name: {key: "f" * 64 for key in e.summed} for s, e in zip(plan.steps, laid.entries, strict=True)}
    before, after = laid.heads({}, {}), laid.heads(sums, {})
    for file, size in laid.files.items():
        assert len(before[file]) == len(after[file])
        taken = sorted(p.place[1:] for e in laid.entries for p in e.pieces if p.place.file == file)
        ends = [len(before[file]), *(begin + nbytes for begin, nbytes in taken)]
        assert all(end <= begin for end, begin in zip(ends, [*(begin for begin, _ in taken), size], strict=True))
    assert not list(tmp_path.iterdir())


def test_what_is_made_of_a_tensor_is_written_with_each_of_its_slices(tmp_path: Path) -> None:
    """A scale repeated for each expert, a scale's inverse, a weight's shape."""
    tensors = model("nvfp4", (3, 32, 512), UP)
    plan = plan_of("gguf", tensors)
    laid = exporters.get("gguf").lay(tmp_path / "m.gguf", plan, Extras())
    fill(laid, plan, tensors, tmp_path / "m.gguf", seed=1).finish({s.name: {"": "0" * 64} for s in plan.steps})
    found = {t.name: t.data for t in ggml.GGUFReader(tmp_path / "m.gguf").tensors}
    (scale,) = tensors[UP].components["scale"].reshape(-1)
    assert found[UP.replace(".weight", ".scale")].tobytes() == np.array([scale] * 3, np.float32).tobytes()
    assert found[SCALE].tolist() == [0.25]

    tensors = model("ct_int4_g128", (384, 512), UP)
    plan = plan_of("compressed_tensors", tensors)
    laid = exporters.get("compressed_tensors").lay(tmp_path / "m", plan, Extras(CONFIG))
    fill(laid, plan, tensors, tmp_path / "m", seed=1).finish({})
    assert load_file(tmp_path / "m" / "model.safetensors")[UP.replace("weight", "weight_shape")].tolist() == [384, 512]


def test_streams_are_appended_in_the_order_of_the_steps(tmp_path: Path) -> None:
    """Whenever they were written, and as often as the end is repeated."""
    tensors = {f"w{i}": drawn(SPARSE, (4, 64), i) for i in range(4)} | {"norm": drawn(DENSE["bf16"], (3,))}
    room, extras = exporters.get("safetensors"), Extras(CONFIG)
    for number, name in ((1, "m.safetensors"), (1, "one"), (3, "some")):
        plan, path = plan_of("safetensors", tensors, number), tmp_path / name
        save(room, path, plan, tensors.values(), extras)
        laid, other = room.lay(path, plan, extras), tmp_path / f"other-{name}"
        files = fill(laid, plan, tensors, other, seed=2)
        sums = sums_of(files, plan)
        assert sums["w1"] == {c: sha256(array.tobytes()).hexdigest() for c, array in tensors["w1"].components.items()}
        for _ in range(2):
            files.finish(sums)
            assert tree(other) == tree(path)
        lengths = dict.fromkeys(laid.files, 0)
        for step, entry in zip(plan.steps, laid.entries, strict=True):
            for stream, file in entry.streams.items():
                data = tensors[step.name].components[stream].tobytes()
                begin = laid.files[file] + lengths[file]
                assert tree(path)[file or "."][begin : begin + len(data)] == data
                lengths[file] += len(data)
        assert {n: len(tree(path)[n or "."]) for n in laid.files} == {n: laid.files[n] + lengths[n] for n in laid.files}
        files.tidy()
        with checkpoint.open(other) as found:
            for key, tensor in tensors.items():
                for component, array in tensor.components.items():
                    assert found[key].components[component].tobytes() == array.tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*("m.safetensors", "one", "some"), *("other-m.safetensors", "other-one", "other-some")]
    )


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("container", ["safetensors", "gguf", "quark"])
def test_a_tensor_that_its_step_did_not_announce_is_refused_and_nothing_stays(tmp_path: Path, container: str) -> None:
    room, layout = exporters.get(container), "q8_0" if container == "gguf" else "mxfp4_pairs"
    weight, norm = drawn(codecs.get(layout).layout, (4, 64)), drawn(DENSE["bf16"], (7,))
    plan = plan_of(container, {"a.weight": weight, "norm.weight": norm})
    path = tmp_path / ("m.gguf" if container == "gguf" else "m")
    path.write_text("what was there before")
    for tensors, message in (
        ([], rf"a\.weight: got nothing, planned {layout} \(4, 64\)"),
        ([weight], r"norm\.weight: got nothing, planned bf16 \(7,\)"),
        ([norm, weight], rf"a\.weight: got bf16 \(7,\), planned {layout}"),
        ([drawn(weight.layout, (4, 32)), norm], rf"a\.weight: got {layout} \(4, 32\), planned {layout} \(4, 64\)"),
        ([weight, norm, norm], "more tensors than the 2 planned"),
    ):
        with pytest.raises(PlanError, match=message):
            save(room, path, plan, tensors, Extras({}))
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_text() == "what was there before"


def test_rows_are_announced_as_a_matrix() -> None:
    layout = codecs.get("q8_0").layout
    step = Step("w", (2, 8, 64), "float32", layout, layout, "keep", "")
    assert announced(step, drawn(layout, (5, 64)), 5).shape == (5, 64)
    for shape, count in (((5, 64), 4), ((5, 32), 5), ((1, 5, 64), 5)):
        with pytest.raises(PlanError, match=rf"w: got q8_0 .*, planned q8_0 \({count}, 64\)"):
            announced(step, drawn(layout, shape), count)
    number = Step("step", (), "int64", DENSE["i64"], DENSE["i64"], "keep", "")
    assert announced(number, drawn(DENSE["i64"], (1, 1)), 1).shape == (1, 1)


def test_bytes_for_which_there_is_no_place_are_not_written(tmp_path: Path) -> None:
    layout = codecs.get("q8_0").layout
    weight = drawn(layout, (8, 64))
    plan = plan_of("gguf", {"w": weight})
    laid = exporters.get("gguf").lay(tmp_path / "m.gguf", plan, Extras())
    files = Files(laid, plan.steps, tmp_path / "m.gguf")
    files.make()
    with pytest.raises(PlanError, match="w: 544 bytes of blocks, planned 272"):
        files.put(0, weight, (0, 4))
    with pytest.raises(PlanError, match="w: 272 bytes of blocks, planned 544"):
        files.put(0, cut(weight, 0, 4))
    files.close()
    made = laid.entries[0].pieces[0]._replace(make=lambda _: np.zeros(3))
    files = Files(replace(laid, entries=(output.Entry((made,), {}, {}),)), plan.steps, tmp_path / "m.gguf")
    with pytest.raises(PlanError, match="w: 24 bytes of blocks, planned 544"):
        files.put(0, weight)
    files.close()
    assert not any((tmp_path / "m.gguf").read_bytes())


def test_a_file_that_shrinks_while_it_is_summed_is_noticed(tmp_path: Path) -> None:
    weight = drawn(codecs.get("q8_0").layout, (8, 64))
    plan, path = plan_of("safetensors", {"w": weight}), tmp_path / "m.safetensors"
    files = Files(exporters.get("safetensors").lay(path, plan, Extras()), plan.steps, path)
    files.make()
    files.put(0, weight)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContainerError, match=r"m\.safetensors: shrank while it was written"):
        files.sums(0)
    files.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_what_fails_at_the_end_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    """A check that says no, a side file that is gone, another conversion."""
    room, path = exporters.get("safetensors"), tmp_path / name
    tensors = {"w": drawn(SPARSE, (4, 64))}
    plan = plan_of("safetensors", tensors)
    save(room, path, plan, tensors.values(), Extras(CONFIG))
    before = tree(path)

    def no(partial: Path) -> None:
        assert tree(partial) == before
        raise ContainerError("no")

    with pytest.raises(ContainerError, match="no"):
        output.write(room.lay(path, plan, Extras(CONFIG)), path, plan, tensors.values(), no)
    if name == "m":
        with pytest.raises(MachineError, match=f"^{tmp_path}/gone: cannot be read: "):
            save(room, path, plan, tensors.values(), Extras(CONFIG, {"x": tmp_path / "gone"}))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    (tmp_path / f"{name}.partial").write_text("somebody else's")
    with pytest.raises(ContainerError, match="another conversion writes here, or one was killed"):
        save(room, path, plan, tensors.values(), Extras(CONFIG))
    assert (tmp_path / f"{name}.partial").read_text() == "somebody else's"
    assert tree(path) == before
