"""Ids that several projects claimed: told apart by bytes, by the user, or by the model the file was made from."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from packfmt import checkpoint, codecs, conversion
from packfmt.cli import run
from packfmt.codec import PackedTensor
from packfmt.codecs import q2_0
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters import gguf, gguf_types
from packfmt.layout import DENSE
from packfmt.plan import Recipe
from tests.gguf_tensors import foreign, tensor_of, write
from tests.models import BF16, folder

F32 = np.float32
NEXT = ("norm", (8,), 0, bytes(32))  # a tensor that nobody doubts, behind the others

# bytes of a weight of 32 x 2304 in each type, reckoned by hand from the types' own sources
ROWS, COLS = 32, 2304
CELLS = ROWS * COLS
CLAIMS = [
    (34, "TQ1_0", CELLS // 256 * 54),
    (35, "TQ2_0", CELLS // 256 * 66),
    (36, "I2_S", CELLS // 4 + 32),
    (38, "TL1", CELLS // 4),  # bitnet.cpp's converter
    (38, "TL1", CELLS // 4 + 32),  # its quantizer, which has the scale behind the codes
    (39, "MXFP4", CELLS // 32 * 17),
    (39, "TL2", 13653 + 2048),  # threes, pairs
    (39, "TL2", 13653 + 2048 + 11 + 32),  # up to a multiple of 32, the scale
    (40, "NVFP4", CELLS // 64 * 36),
    (41, "Q1_0", CELLS // 128 * 18),
    (42, "Q2_0", CELLS // 64 * 18),
    (42, "STQ1_0", CELLS // 256 * 42),
    (42, "PQ2_0", CELLS // 128 * 34),
    (43, "STQ1_0", CELLS // 256 * 42),
    (134, "IQ1_BN", ROWS * (2 + COLS // 64 * 13)),
    (135, "IQ2_BN", ROWS * (4 + COLS // 64 * 16)),
    (142, "PQ2_0", CELLS // 128 * 34),
    (143, "PTQ1_0", CELLS // 128 * 28),
]
STQ1_0 = bytes.fromhex("a3816f4d2b09e7c5" * 4 + "9c3963c69c3963c6" + "0038")  # code of quad g is (7 g + 3) % 32
I2_S = bytes.fromhex("2556600664400aa88448899558811990022aa112222556600664400aa8844889" + "0000003f" + "00" * 28)


def trits(count: int = 256) -> np.ndarray:
    """The steps of the golden vectors."""
    i = np.arange(count)
    return (i * i + i // 7) % 3 - 1


# ---------------------------------------------------------------- by bytes


@pytest.mark.parametrize(("number", "kind", "nbytes"), CLAIMS)
@pytest.mark.parametrize("last", [False, True])
def test_an_id_means_the_type_whose_bytes_it_has(
    tmp_path: Path, number: int, kind: str, nbytes: int, last: bool
) -> None:
    tensor = ("w", (ROWS, COLS), number, bytes(nbytes))
    tensors = (NEXT, tensor) if last else (tensor, NEXT)
    with checkpoint.open(foreign(tmp_path / "m.gguf", *tensors, padded=not last)) as model:
        assert (model.index["w"].kind, model.index["w"].nbytes) == (kind, nbytes)
        assert stored(model, "norm") == bytes(32)


def stored(model: checkpoint.Checkpoint, name: str) -> bytes:
    return b"".join(c.tobytes() for c in model[name].components.values())


@pytest.mark.parametrize(("number", "kind", "nbytes"), [(40, "Q2_0C", 260), (43, "TQ2_0_FX4", 520)])
def test_large_blocks_are_told_by_their_bytes(tmp_path: Path, number: int, kind: str, nbytes: int) -> None:
    with checkpoint.open(foreign(tmp_path / "m.gguf", ("w", (1, 1024), number, bytes(nbytes)), NEXT)) as model:
        assert (model.index["w"].kind, model.index["w"].nbytes) == (kind, nbytes)


def test_a_type_of_its_own_is_still_held_to_its_size(tmp_path: Path) -> None:
    for number, size in ((36, 64), (36, 128), (41, 32), (142, 64)):
        path = foreign(tmp_path / "m.gguf", ("w", (2, 128), number, bytes(size)), NEXT)
        with pytest.raises(ContainerError) as caught:
            checkpoint.open(path)
        assert caught.value.rule == "PF107", caught.value


def test_bytes_of_no_claimant_are_refused_with_all_sizes(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (4, 256), 42, bytes(224)), NEXT)
    with pytest.raises(ContainerError) as caught:
        checkpoint.open(path)
    assert str(caught.value) == (
        f"{path}: w: [4, 256] of ggml type 42 in 224 bytes, which is none of Q2_0 288, STQ1_0 168, PQ2_0 272"
    )
    assert caught.value.rule == "PF106"


def test_a_tensor_too_small_to_tell_is_refused_unless_the_user_says(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (1, 256), 42, bytes(72)), NEXT)
    with pytest.raises(ContainerError) as caught:
        checkpoint.open(path)
    assert str(caught.value) == (
        f"{path}: w: [1, 256] of ggml type 42 in 96 bytes, which may be Q2_0 72, PQ2_0 68 bytes; "
        "say --read-as 42=Q2_0 or --read-as 42=PQ2_0"
    )
    for kind, nbytes in (("Q2_0", 72), ("PQ2_0", 68)):
        with checkpoint.open(path, read_as={"42": kind}) as model:
            assert (model.index["w"].kind, model.index["w"].nbytes) == (kind, nbytes)


def test_an_id_means_one_type_in_all_of_a_file(tmp_path: Path) -> None:
    small, large = ("small", (1, 256), 42, bytes(72)), ("large", (8, 256), 42, bytes(8 * 72))
    for tensors in ((small, large), (large, small)):
        with checkpoint.open(foreign(tmp_path / "m.gguf", *tensors, NEXT)) as model:
            assert {i.kind for i in model.index.values()} == {"Q2_0", "F32"}
    other = ("other", (8, 256), 42, bytes(8 * 42))
    with pytest.raises(ContainerError, match=r"in 352 bytes, which is none of .*, and other tensors can only be Q2_0"):
        checkpoint.open(foreign(tmp_path / "m.gguf", large, other, NEXT))


def test_wider_alignment_is_reckoned_with(tmp_path: Path) -> None:
    tensor = ("w", (8, 256), 42, bytes(8 * 42))
    with checkpoint.open(foreign(tmp_path / "m.gguf", tensor, ("n", (32,), 0, bytes(128)), alignment=128)) as model:
        assert model.index["w"].kind == "STQ1_0"


def test_every_type_of_the_installed_gguf_is_there() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    for kind, sizes in GGML_QUANT_SIZES.items():
        known = gguf_types.ggml_types()[kind.name]
        assert (known.ids[0], known.block, known.nbytes) == (int(kind), *sizes)


# ---------------------------------------------------------------- unknown to all


def unknown(path: Path) -> Path:
    rng = np.random.default_rng(0)
    return foreign(path, ("w", (4, 256), 77, rng.bytes(288)), NEXT)


def test_an_id_that_nobody_knows_is_shown_and_leaves_the_rest_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unknown(tmp_path / "m.gguf")
    with checkpoint.open(path) as model:
        info = model.index["w"]
        assert (info.kind, info.layout, info.shape, info.nbytes) == ("type 77", None, (4, 256), 288)
        assert stored(model, "norm") == bytes(32)
        with pytest.raises(ContainerError, match=r"m\.gguf: w: is type 77, which no layout") as caught:
            model["w"]
        assert caught.value.rule == "PF105"
        with pytest.raises(PlanError, match="w: stored as type 77, which no layout"):
            conversion.plan_for(model, tmp_path / "out", Recipe("keep"))
    assert run(["inspect", str(path)]) == 0
    assert "(type 77)" in capsys.readouterr().out


def test_the_user_may_say_what_an_unknown_id_is(tmp_path: Path) -> None:
    path = unknown(tmp_path / "m.gguf")
    with checkpoint.open(path, read_as={"77": "q2_0"}) as model:
        assert model["w"].layout == codecs.get("q2_0").layout
        assert stored(model, "w") in path.read_bytes()
    with checkpoint.open(path, read_as={"77": "Q2_0"}) as model:  # the type of this name
        assert model.index["w"].kind == "Q2_0"
    with pytest.raises(ContainerError, match="bytes"):
        checkpoint.open(path, read_as={"77": "tq1_0"})


# ---------------------------------------------------------------- one type, several orders


def test_both_orders_of_stq1_0_are_read_when_the_user_says_which(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (1, 256), 43, STQ1_0), NEXT)
    expected = {
        "sherry": {0: [0, 1, -1, -1, 1, 1, 0, -1, 0, -1, 1, -1, -1, -1, 0, -1]},
        "sherry_s16": {0: [0, 1, 0, -1, -1, 1, 1, -1, -1, 0, 1, 0, -1, -1, 1, 1], 64: [0, -1, 0, 1, 1, -1, -1, 1]},
    }
    for layout, steps in expected.items():
        with checkpoint.open(path, read_as={"STQ1_0": layout}) as model:
            weight = model["w"].decode()[0]
            assert stored(model, "w") == STQ1_0
        for at, some in steps.items():
            assert (weight[at : at + len(some)] * 2).tolist() == some


def test_the_golden_bytes_of_i2_s_are_read(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (1, 128), 36, I2_S), NEXT)
    with checkpoint.open(path, read_as={"I2_S": "i2_s"}) as model:
        assert model["w"].decode().tolist() == [(trits(128) * 0.5).tolist()]
        assert model.index["w"].nbytes == 64
    with checkpoint.open(path, read_as={"I2_S": "i2_s_arm"}) as model:
        u = trits(128).reshape(4, 32) + 1  # the four quarters of the byte that are unit 0's in x86's order
        byte = [int(a << 6 | b << 4 | c << 2 | d) for a, b, c, d in u.T]
        units = np.array(byte).reshape(2, 16)
        again = np.concatenate([(unit >> shift & 3) - 1 for unit in units for shift in (6, 4, 2, 0)])
        assert model["w"].decode().tolist() == [(again * 0.5).tolist()]


@pytest.mark.parametrize(
    ("number", "nbytes", "say"),
    [
        (43, CELLS // 256 * 42, ["STQ1_0=sherry_s16", "STQ1_0=sherry"]),
        (36, CELLS // 4 + 32, ["I2_S=i2_s", "I2_S=i2_s_arm"]),
        (38, CELLS // 4 + 32, ["TL1=LAYOUT", "kernel configuration"]),
        (39, CLAIMS[7][2], ["TL2=LAYOUT", "kernel configuration"]),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path, number: int, nbytes: int, say: list[str]) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (ROWS, COLS), number, bytes(nbytes)), NEXT)
    with checkpoint.open(path) as model:
        assert model.index["w"].layout is None
        for why in (model.index["w"].why, refused(lambda: model["w"]), refused(lambda: planned(model))):
            assert all(text in why for text in say), why


def refused(call: object) -> str:
    with pytest.raises((ContainerError, PlanError)) as caught:
        call()  # type: ignore[operator]
    return str(caught.value)


def planned(model: checkpoint.Checkpoint, target: str = "out") -> object:
    return conversion.plan_for(model, Path(target), Recipe("keep"))


@pytest.mark.parametrize(
    ("read_as", "message"),
    [
        ({"STQ1_0": "shery"}, "no layout is called 'shery'"),
        ({"STQ2": "sherry"}, r"no tensor of .* is STQ2 .*; its types are STQ1_0, F32"),
        ({"44": "sherry"}, "no tensor of .* is 44"),
    ],
)
def test_what_is_said_must_mean_something(tmp_path: Path, read_as: dict[str, str], message: str) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (1, 256), 43, STQ1_0), NEXT)
    with pytest.raises(PlanError, match=message):
        checkpoint.open(path, read_as=read_as)


def test_a_layout_of_another_size_is_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (1, 256), 43, STQ1_0), NEXT)
    with pytest.raises(ContainerError, match="w: tq2_0: 256 weights take 66 bytes, STQ1_0 42"):
        checkpoint.open(path, read_as={"STQ1_0": "tq2_0"})


@pytest.mark.parametrize("beside", [False, True])
def test_a_scale_stands_behind_the_codes_or_in_a_tensor_beside(tmp_path: Path, beside: bool) -> None:
    """TL1's two writers; a layout with the bytes of the type stands for the kernel configuration's."""
    codes, scale = I2_S[:32], I2_S[32:36]
    tensors = [("w", (1, 128), 38, codes if beside else I2_S), NEXT]
    path = foreign(tmp_path / "m.gguf", *tensors, *([("w_scale", (1,), 0, scale)] if beside else []))
    with checkpoint.open(path, read_as={"TL1": "i2_s"}) as model:
        assert list(model) == ["w", "norm"]
        assert model["w"].decode().tolist() == [(trits(128) * 0.5).tolist()]
    with checkpoint.open(path) as model:
        assert list(model) == ["w", "norm", *(["w_scale"] if beside else [])]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("kind", "number", "layout", "shape"),
    [("TL1", 38, "tl1_256_128_64", (256, 256)), ("TL2", 39, "tl2_160_3200_160_96", (160, 3200))],
)
def test_table_kernels_tensors_are_read_in_the_configuration_that_the_user_names(
    tmp_path: Path, beside: bool, kind: str, number: int, layout: str, shape: tuple[int, int]
) -> None:
    packed = codecs.get(layout).encode(np.random.default_rng(2).normal(0, 1, shape).astype(F32))
    codes, scale = packed.components["codes"].tobytes(), packed.components["scale"].tobytes()
    assert kind == "TL1" or len(codes) % 32  # so that the scale does not follow at once
    whole = codes.ljust(-(-len(codes) // 32) * 32, b"\0") + scale + bytes(28)
    tensors = (
        [("w", shape, number, codes), NEXT, ("w_scale", (1,), 0, scale)] if beside else [("w", shape, number, whole)]
    )
    with checkpoint.open(foreign(tmp_path / "m.gguf", *tensors), read_as={kind: layout}) as model:
        assert model["w"].decode().tobytes() == packed.decode().tobytes()
        assert "w_scale" not in model


def test_a_scale_that_is_nowhere_is_missed(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.gguf", ("w", (1, 128), 38, I2_S[:32]), NEXT)
    with pytest.raises(ContainerError, match="w: is TL1 without a scale, and no F32 w_scale beside it") as caught:
        checkpoint.open(path, read_as={"TL1": "i2_s"})
    assert caught.value.rule == "PF110"


def test_rotated_weights_are_not_taken_for_weights(tmp_path: Path) -> None:
    raw = q2_0.CODECS["pq2_0"].encode(np.ones((16, 256), F32)).components["blocks"].tobytes()
    path = foreign(tmp_path / "m.gguf", ("w", (16, 256), 42, raw), NEXT, key="prism.hadamard.block")
    with checkpoint.open(path) as model:
        assert (model.index["w"].kind, model.index["w"].layout) == ("PQ2_0", None)
        with pytest.raises(ContainerError, match=r"w: is PQ2_0, and prism\.hadamard in the file says"):
            model["w"]


def test_a_record_of_a_type_that_another_tool_changed_contradicts_it(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"w": random_tensor("q2_0", (1, 256))})
    entry = struct.pack("<sI2Q", b"w", 2, 256, 1)
    raw = path.read_bytes()
    for number, kind in ((77, "ggml type 77"), (0, "F32")):
        path.write_bytes(raw.replace(entry + struct.pack("<I", 42), entry + struct.pack("<I", number)))
        with pytest.raises(ContainerError, match=f"w: is {kind}, packfmt.tensors says Q2_0; another tool") as caught:
            checkpoint.open(path)
        assert caught.value.rule in ("PF105", "PF107")


# ---------------------------------------------------------------- by the dense model


def dense_model(path: Path, seed: int = 0, name: str = "w") -> tuple[Path, np.ndarray]:
    weight = np.random.default_rng(seed).normal(0, 0.02, (64, 256)).astype(BF16)
    return folder(path, {name: weight, "norm": np.zeros(8, F32)}), weight.astype(F32)


@pytest.mark.parametrize(
    ("number", "kind", "layout"),
    [(43, "STQ1_0", "sherry"), (42, "STQ1_0", "sherry_s16"), (36, "I2_S", "i2_s"), (36, "I2_S", "i2_s_arm")],
)
def test_the_dense_model_tells_orders_apart(tmp_path: Path, number: int, kind: str, layout: str) -> None:
    base, weight = dense_model(tmp_path / "base")
    packed = codecs.get(layout).encode(weight)
    raw = b"".join(c.tobytes() for c in packed.components.values())
    path = foreign(tmp_path / "m.gguf", ("w", (64, 256), number, raw + bytes(28 if kind == "I2_S" else 0)), NEXT)
    with checkpoint.open(path, base=base) as model:
        assert model.index["w"].layout == codecs.get(layout).layout
        assert model["w"].decode().tobytes() == packed.decode().tobytes()
    with checkpoint.open(base) as dense, checkpoint.open(path, base=dense) as model:
        assert model.index["w"].layout == codecs.get(layout).layout
    with checkpoint.open(path, read_as={kind: layout}, base=base) as model:  # nothing left to decide
        assert model.index["w"].layout == codecs.get(layout).layout


def test_another_model_decides_nothing(tmp_path: Path) -> None:
    _, weight = dense_model(tmp_path / "base")
    raw = codecs.get("sherry").encode(weight).components["blocks"].tobytes()
    path = foreign(tmp_path / "m.gguf", ("w", (64, 256), 43, raw), NEXT)
    other, _ = dense_model(tmp_path / "other", 1)
    with pytest.raises(ContainerError, match=r"w: its correlation with .* as sherry_s16, .* as sherry, of which"):
        checkpoint.open(path, base=other)
    stranger, _ = dense_model(tmp_path / "stranger", 0, "v")
    with pytest.raises(ContainerError, match="stranger: has no tensor of the names and shapes of the STQ1_0"):
        checkpoint.open(path, base=stranger)


# ---------------------------------------------------------------- what packfmt writes


@pytest.mark.parametrize(
    ("layout", "number", "kind"),
    [
        ("tq1_0", 34, "TQ1_0"), ("tq2_0", 35, "TQ2_0"), ("i2_s", 36, "I2_S"),
        ("q1_0", 41, "Q1_0"), ("q2_0", 42, "Q2_0"), ("sherry_s16", 43, "STQ1_0"),
    ],
)  # fmt: skip
def test_what_is_written_has_the_project_s_id_and_is_read_without_being_told(
    tmp_path: Path, layout: str, number: int, kind: str
) -> None:
    tensor = random_tensor(layout, (3, 4, 256))
    # one block is too small to tell by its bytes: the file's own description does
    tensors = {"small": random_tensor(layout, (1, 256)), "w": tensor, "norm": tensor_of(DENSE["f32"], (8,))}
    path = write(tmp_path / "m.gguf", tensors)
    with checkpoint.open(path) as model:
        info = model.index["w"]
        assert (info.kind, info.layout, info.shape) == (kind, tensor.layout, (3, 4, 256))
        for name, expected in tensors.items():
            assert stored(model, name) == b"".join(c.tobytes() for c in expected.components.values())
    entry = struct.pack("<sI3QI", b"w", 3, 256, 4, 3, number)
    assert entry in path.read_bytes()
    with pytest.raises(PlanError, match="without a description of its own"):
        checkpoint.open(path, read_as={kind: layout})


def test_prism_s_type_is_written_under_its_own_id(tmp_path: Path) -> None:
    packed = q2_0.CODECS["pq2_0"].encode(np.random.default_rng(0).normal(0, 1, (4, 256)).astype(F32))
    path = write(tmp_path / "m.gguf", {"w": packed})
    with checkpoint.open(path) as model:
        assert (model.index["w"].kind, stored(model, "w")) == ("PQ2_0", packed.components["blocks"].tobytes())
    assert struct.pack("<sI2QI", b"w", 2, 256, 4, 142) in path.read_bytes()


def random_tensor(layout: str, shape: tuple[int, ...]) -> PackedTensor:
    return codecs.get(layout).encode(np.random.default_rng(len(shape)).normal(0, 1, shape).astype(F32))


def test_i2_s_is_written_as_bitnet_cpp_writes_it(tmp_path: Path) -> None:
    packed = codecs.get("i2_s").encode((trits(128) * 0.5).astype(F32)[None])
    raw = write(tmp_path / "m.gguf", {"w": packed}).read_bytes()
    assert raw.endswith(I2_S)


def test_ids_that_gguf_knows_are_read_by_gguf(tmp_path: Path) -> None:
    tensors = {name: random_tensor(name, (4, 256)) for name in ("tq1_0", "tq2_0", "q1_0")}
    for found in GGUFReader(write(tmp_path / "m.gguf", tensors)).tensors:
        assert found.tensor_type.name == found.name.upper()
        assert found.data.tobytes() == tensors[found.name].components["blocks"].tobytes()


def test_what_other_readers_would_misread_is_not_written() -> None:
    for name, instead in (
        ("sherry", "sherry_s16.*sherry_s16 or tq1_0 or tq2_0 may hold"),
        ("i2_s_arm", "i2_s, .*; i2_s may hold"),
    ):
        with pytest.raises(PlanError, match=f"readers would take them for {instead}"):
            raise PlanError(gguf.refusal(codecs.get(name).layout, (4, 256)))
    assert "no room" in gguf.refusal(codecs.get("i2_s").layout, (0, 256))  # an empty tensor has no tail


def test_a_type_read_as_its_second_layout_is_not_kept_in_gguf(tmp_path: Path) -> None:
    """It would be as ambiguous as before; as another type it says what it is."""
    raw = codecs.get("sherry").encode(np.random.default_rng(1).normal(0, 1, (8, 256)).astype(F32))
    path = foreign(tmp_path / "m.gguf", ("w", (8, 256), 43, raw.components["blocks"].tobytes()), NEXT)
    model = checkpoint.open(path, read_as={"STQ1_0": "sherry"})
    with model, pytest.raises(PlanError, match="w: STQ1_0 has the bytes of sherry, but readers would take them"):
        planned(model, "o.gguf")
    conversion.convert(
        path, tmp_path / "o.gguf", "tq2_0", overrides={"w": "tq2_0"}, read_as={"STQ1_0": "sherry"}, check=True
    )
    with checkpoint.open(tmp_path / "o.gguf") as model:
        assert model["w"].decode().tobytes() == (raw.decode() + F32(0)).tobytes()


@given(data=st.data())
def test_any_ids_shapes_and_sizes_give_an_error_or_an_index(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("any") / "m.gguf"
    ids = sorted({number for known in gguf_types.ggml_types().values() for number in known.ids} | {4, 77})
    tensors = []
    for i in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.sampled_from(ids))
        shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 3, 32, 160, 256, 1024, 3200]), min_size=1, max_size=2)))
        known = [known.sizes(shape) for known in gguf_types.among(number).values()]
        likely = [n for sizes in known for n in sizes if n < 1 << 18]
        size = data.draw(st.sampled_from([*likely, 0, 32, 96]))
        tensors.append((f"w{i}", shape, number, bytes(size)))
    foreign(path, *tensors, padded=data.draw(st.booleans()))
    told = {"STQ1_0": "sherry", "I2_S": "i2_s", "TL1": "tl1_256_128_64", "TL2": "tl2_160_3200_160_96", "77": "q2_0"}
    read_as = data.draw(st.sampled_from([{}, *({kind: layout} for kind, layout in told.items())]))
    try:
        model = checkpoint.open(path, read_as=read_as)
    except ContainerError as error:
        assert str(error).startswith(f"{path}: ")
        return
    except PlanError as error:
        assert read_as and "no tensor of" in str(error)
        return
    with model:
        for name, info in model.index.items():
            if info.layout is None:
                with pytest.raises(ContainerError, match=f"{name}: is "):
                    model[name]
            else:
                assert model[name].shape == info.shape
