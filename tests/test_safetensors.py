"""The native container, and plain safetensors as a source."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from packfmt import checkpoint, codecs, verify
from packfmt.codec import PackedTensor
from packfmt.errors import ContainerError, PackfmtError, PlanError
from packfmt.exporters import Extras
from packfmt.exporters import safetensors as container
from packfmt.exporters import safetensors_header as header
from packfmt.layout import DENSE, Codes, Component, Layout, Stream, Values, blocks, cols, grid, rows
from packfmt.plan import Plan, Step
from tests.models import folder, normal, same, tensors
from tests.outputs import save

BAD = Path(__file__).parent.parent / "spec" / "bad"


def write(path: Path, **found: PackedTensor) -> Path:
    steps = tuple(Step(n, t.shape, t.dtype, t.layout, t.layout, "keep", "") for n, t in found.items())
    save(container, path, Plan("", "safetensors", steps), iter(found.values()), Extras())
    return path


def dense(array: np.ndarray, name: str) -> PackedTensor:
    return PackedTensor(DENSE[name], array.shape, {"values": array.reshape(-1, array.shape[-1])}, array.dtype.name)


def test_the_safetensors_library_reads_what_we_wrote(tmp_path: Path) -> None:
    weight, bias = normal(8, 64), normal(5, dtype=np.float16)
    packed = codecs.get("q8_0").encode(weight)
    path = write(tmp_path / "m.safetensors", w=packed, b=dense(bias.reshape(1, -1), "f16"))
    read = dict(deserialize(path.read_bytes()))
    assert read.keys() == {"w.blocks", "b"}
    assert bytes(read["w.blocks"]["data"]) == packed.components["blocks"].tobytes()
    assert (read["w.blocks"]["dtype"], read["w.blocks"]["shape"]) == ("U8", [8, 68])
    arrays = safetensors.numpy.load_file(path)
    assert same(arrays["w.blocks"], packed.components["blocks"]) and same(arrays["b"], bias.reshape(1, -1))


def test_a_mapped_tensor_is_the_file(tmp_path: Path) -> None:
    packed = codecs.get("q8_0").encode(normal(8, 64))
    path = write(tmp_path / "m.safetensors", w=packed, e=codecs.get("q8_0").encode(normal(0, 64)))
    with checkpoint.open(path) as model:
        found, empty = model.map("w"), model.map("e")
        assert empty.shape == (0, 64) and empty.nbytes == 0
    assert found.components["blocks"].tobytes() == packed.components["blocks"].tobytes()
    assert not found.components["blocks"].flags.writeable
    with path.open("r+b") as file:  # what another writes there is seen, so nothing was copied
        file.seek(-1, 2)
        file.write(bytes([packed.components["blocks"].reshape(-1)[-1] ^ 255]))
    assert found.components["blocks"].tobytes() != packed.components["blocks"].tobytes()
    with checkpoint.open(path) as model:
        with pytest.raises(ContainerError, match="not those that were written"):
            model["w"]
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ContainerError, match="has shrunk since it was opened"):
            model.map("w")


def test_we_read_every_dtype_that_the_safetensors_library_writes(tmp_path: Path) -> None:
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    kinds = [np.dtype(k) for k in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")]
    kinds += [np.dtype(getattr(ml_dtypes, n)) for n in names]
    written = {k.name: np.arange(12).reshape(3, 4).astype(k) for k in kinds}
    written["scalar"], written["empty"] = np.array(3.0, np.float32), np.zeros((0, 4), np.float32)
    safetensors.numpy.save_file(written, tmp_path / "m.safetensors")
    with checkpoint.open(tmp_path / "m.safetensors") as model:
        assert model.keys() == written.keys()
        for name, array in written.items():
            assert same(model[name].components["values"].reshape(array.shape), array), name
            assert model[name].shape == array.shape and model[name].dtype == array.dtype.name


def test_a_packed_tensor_comes_back_whole(tmp_path: Path) -> None:
    packed = codecs.get("mxfp4").encode(normal(3, 4, 64).astype(ml_dtypes.bfloat16))
    with checkpoint.open(write(tmp_path / "m.safetensors", w=packed)) as model:
        back = model["w"]
    assert (back.layout, back.shape, back.dtype) == (packed.layout, (3, 4, 64), "bfloat16")
    assert same(back.components["blocks"], packed.components["blocks"])


UNHEARD_OF = Layout(
    "unheard_of",
    (
        Component("low", (rows(), cols(8)), (Codes("codes", 2, (cols(1, 2),), (cols(2, 4),)),)),
        Component("high", (rows(), cols(32)), (Codes("codes", 1, (), (cols(1, 32),), "<u4", low=2),)),
        Component("steps", (rows(), cols(32)), (Values("scale", "<f4"),)),
        Stream("notes", "<u2"),
    ),
    grid("affine", zero=3),
)


def test_a_layout_that_nobody_here_knows_decodes_by_its_own_description(tmp_path: Path) -> None:
    assert UNHEARD_OF.name not in codecs.names()
    rng = np.random.default_rng(5)
    shape = (6, 96)
    fitted = UNHEARD_OF.fit(*shape)
    parts = {c.name: rng.integers(0, 255, c.nbytes, np.uint8).view(c.dtype).reshape(c.shape) for c in fitted.components}
    parts["steps"] = rng.normal(size=(6, 3)).astype("<f4")
    parts["notes"] = np.arange(11, dtype="<u2")
    packed = PackedTensor(UNHEARD_OF, shape, parts)
    with checkpoint.open(write(tmp_path / "m.safetensors", w=packed)) as model:
        back = model["w"]
        assert model.index["w"].layout == UNHEARD_OF
    assert all(same(back.components[k], v) for k, v in parts.items())
    # the same numbers, computed here from the bytes
    low, high = parts["low"], parts["high"]
    want = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            byte = low[i].reshape(-1, 2)[j // 8, j % 2]
            code = (int(byte) >> 2 * (j % 8 // 2) & 3) + 4 * (int(high[i, j // 32]) >> j % 32 & 1)
            want[i, j] = parts["steps"][i, j // 32] * np.float32(code - 3)
    assert same(back.decode(), want)


def test_wide_elements_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    odd = PackedTensor(
        blocks("odd", 1, Codes("values", 8), grid=grid("plain")), (1, 3), {"blocks": np.zeros((1, 3), "u1")}
    )
    path = write(
        tmp_path / "m.safetensors",
        a=odd,
        b=dense(np.ones((1, 3), "<f8"), "f64"),
        c=dense(np.ones((1, 1), "<f4"), "f32"),
    )
    with path.open("rb") as file:
        found = header.read(path, file)
    assert found.data % 8 == 0
    assert {n: e.begin for n, e in found.entries.items()} == {"b": 0, "c": 24, "a.blocks": 28}


def test_a_writer_given_another_tensor_than_planned_leaves_nothing(tmp_path: Path) -> None:
    packed = codecs.get("q8_0").encode(normal(8, 64))
    step = Step("w", (8, 32), "float32", packed.layout, packed.layout, "keep", "")
    with pytest.raises(PlanError, match=r"w: got q8_0 \(8, 64\), planned q8_0 \(8, 32\)"):
        save(container, tmp_path / "m.safetensors", Plan("", "safetensors", (step,)), iter([packed]), Extras())
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ContainerError, match=r"model-00002-of-00003\.safetensors") as caught:
        checkpoint.open(path)
    assert caught.value.rule == "PF110"


def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", shards=2)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../m/model-00001-of-00002.safetensors"}}')
    with pytest.raises(ContainerError, match="not in the folder"):
        checkpoint.open(path)


def test_an_index_that_names_a_tensor_which_its_file_lacks_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ContainerError, match=r"ghost\.weight") as caught:
        checkpoint.open(path)
    assert caught.value.rule == "PF110"


def test_two_files_and_no_index_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("a", "b"):
        safetensors.numpy.save_file({name: np.zeros(3, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ContainerError, match=r"2 safetensors files.*a\.safetensors, b\.safetensors; name one"):
        checkpoint.open(tmp_path)


def test_a_shard_read_through_its_index_gives_all_tensors(tmp_path: Path) -> None:
    with checkpoint.open(folder(tmp_path / "m", shards=3)) as model:
        assert model.keys() == tensors().keys()
        assert all(same(verify.values(model[n]), v) for n, v in tensors().items())


@settings(max_examples=300)
@given(data=st.data())
def test_random_damage_is_a_container_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = (BAD / "flipped_bit.safetensors").read_bytes()
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(good)), st.integers(0, len(good)))))
    new = data.draw(st.binary(max_size=24) | st.just(b""))
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    path.write_bytes(good[:start] + new + good[min(stop, start + 24) :])
    try:
        with checkpoint.open(path) as model:
            for name in model:
                model[name].decode()
    except PackfmtError as error:
        assert str(error)


KEYS = st.sampled_from(["__metadata__", "a", "dtype", "shape", "data_offsets", "packfmt"]) | st.text(max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=8)


@given(head=st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5)))
def test_any_json_header_is_a_container_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, head: object
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        checkpoint.open(path).close()
    except ContainerError as error:
        assert str(path) in str(error)


ODD = (
    st.none() | st.booleans() | st.integers(-2, 70) | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["rows", "cols", "word", "bit", "codes", "scale", "values", "<f2", "u1", "<u8", "plain", "table"])
    | st.just([]) | st.just({}) | st.just(["cols", 1, 0]) | st.just(["rows", 1, 0]) | st.just([["cols", 2, 2]])
)  # fmt: skip


def places(data: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [p for k, v in items for p in places(v, (*path, k))]


@settings(max_examples=500)
@given(data=st.data())
def test_a_hostile_description_under_its_right_hash_is_told_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = (
        BAD / data.draw(st.sampled_from(["unused_code.safetensors", "reserved_exponent.safetensors"]))
    ).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + length])
    own = json.loads(head["__metadata__"]["packfmt"])
    (record,) = own["tensors"].values()
    (layout,) = own["layouts"].values()
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([layout, record]))
        *way, last = data.draw(st.sampled_from(places(part)))
        try:
            for key in way:
                part = part[key]
            part[last] = deepcopy(data.draw(ODD))
        except (KeyError, IndexError, TypeError):  # an earlier change took this place away
            continue
    record["id"] = sha256(json.dumps(layout, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    own["layouts"] = {record["id"]: layout}
    head["__metadata__"]["packfmt"] = json.dumps(own)
    text = json.dumps(head).encode()
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    for finding in verify.validate(path):
        assert finding.message
    try:
        with checkpoint.open(path) as model, np.errstate(all="ignore"):
            for name in model:
                model[name].decode()
    except PackfmtError as error:
        assert str(error)
