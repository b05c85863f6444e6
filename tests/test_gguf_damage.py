"""Damaged GGUF files: one clear error each, whose rule and place are right."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt.errors import ContainerError
from packfmt.exporters import Extras, KeyValue, gguf, gguf_header
from packfmt.layout import DENSE
from tests.gguf_tensors import (
    LFS_POINTER,
    Q4_0,
    Q8_0,
    model,
    nothing,
    resolve,
    stored,
    tensor_of,
    write,
)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: str, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", gguf_header.KINDS.index(kind)) + raw


def entry(name: str | bytes = "w", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def built(pairs: list[bytes], entries: list[bytes], data: int = 32, n: tuple[int, int] | None = None) -> bytes:
    n_entries, n_pairs = n or (len(entries), len(pairs))
    raw = b"GGUF" + struct.pack("<IQQ", 3, n_entries, n_pairs) + b"".join((*pairs, *entries))
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + bytes(data)


def number(n: int) -> bytes:
    return struct.pack("<I", n)


def array(item: str, count: int, raw: bytes = b"") -> bytes:
    return struct.pack("<IQ", gguf_header.KINDS.index(item), count) + raw


NESTED = array("ARRAY", 1)  # an array of one array
GOOD = built([pair("k", "STRING", text("v"))], [entry()])
ALIGNMENT = "general.alignment"

DAMAGED = {
    "empty": (b"", "PF100", "is empty, a GGUF begins with"),
    "another kind of file": (b"PK\3\4" + bytes(60), "PF100", "begins with"),
    "a pointer": (LFS_POINTER, "PF100", "Git LFS pointer"),
    "version 1": (GOOD.replace(b"GGUF\3", b"GGUF\1"), "PF100", "version 1, needs 2 or 3"),
    "version 4": (GOOD.replace(b"GGUF\3", b"GGUF\4"), "PF100", "version 4, needs 2 or 3"),
    "big-endian": (b"GGUF\0\0\0\3" + GOOD[8:], "PF100", "big-endian"),
    "magic alone": (b"GG", "PF101", "truncated"),
    "no counts": (GOOD[:20], "PF101", "truncated"),
    "too many tensors": (built([], [entry()], n=(9, 0)), "PF101", "9 tensors"),
    "absurdly many tensors": (built([], [entry()], n=(2**63, 0)), "PF102", "tensors"),
    "absurdly many keys": (built([], [], n=(0, 2**64 - 1)), "PF102", "key-values"),
    "a text beyond the file": (built([text("k") + number(8) + struct.pack("<Q", 999)], []), "PF101", "key 'k'"),
    "a text of absurd length": (built([text("k") + number(8) + struct.pack("<Q", 2**64 - 1)], []), "PF102", "key 'k'"),
    "an array of absurd length": (built([pair("k", "ARRAY", array("UINT64", 2**62))], []), "PF102", "key 'k'"),
    "an array beyond the file": (built([pair("k", "ARRAY", array("UINT16", 999))], []), "PF101", "key 'k'"),
    "texts beyond the file": (built([pair("k", "ARRAY", array("STRING", 9))], []), "PF101", "key 'k'"),
    "a value type that is none": (built([text("k") + number(13)], [], 64), "PF102", "value type 13"),
    "an item type that is none": (built([text("k") + number(9) + number(99)], [], 64), "PF102", "value type 99"),
    "arrays too deep": (built([pair("k", "ARRAY", NESTED * 5)], [], 64), "PF102", "more than 4 deep"),
    "arrays of arrays beyond the file": (built([pair("k", "ARRAY", array("ARRAY", 99))], []), "PF101", "key 'k'"),
    "unlike arrays": (
        built([pair("k", "ARRAY", array("ARRAY", 2, array("INT8", 0) + array("BOOL", 0)))], []), "PF102", "unlike"
    ),
    "a bool that is none": (built([pair("k", "BOOL", b"\2")], []), "PF102", "BOOL of 2"),
    "an empty key": (built([pair("", "BOOL", b"\1")], []), "PF102", "key 0 is empty"),
    "a key not in UTF-8": (built([pair(b"\xff", "BOOL", b"\1")], []), "PF103", "key 0 is not UTF-8"),
    "a value not in UTF-8": (built([pair("k", "STRING", text(b"a\xc3"))], []), "PF103", "key 'k'"),
    "a token not in UTF-8": (
        built([pair("k", "ARRAY", array("STRING", 2, text("a") + text(b"\x80")))], []), "PF103", "text 1 is not"
    ),
    "a name not in UTF-8": (built([], [entry(b"\xfe")]), "PF103", "name of tensor 0"),
    "a name that moves the cursor": (built([], [entry("w\x1b[2J")]), "PF102", "can be printed"),
    "a tensor without a name": (built([], [entry("")]), "PF102", "called ''"),
    "a key twice": (built([pair("k", "BOOL", b"\1")] * 2, []), "PF104", "'k' stands twice"),
    "a name twice": (built([], [entry(), entry(offset=32)], 64), "PF104", "called 'w'"),
    "an unknown type in no bytes": (built([], [entry(kind=200)], 0), "PF107", "w: 8 weights of type 200 in no bytes"),
    "a type of several in other bytes": (
        built([], [entry(dims=(512,), kind=42)]), "PF106", "type 42 in 32 bytes, which is none of Q2_0 144"
    ),
    "five dimensions": (built([], [entry(dims=(8, 1, 1, 1, 1))]), "PF106", "w: 5 dimensions"),
    "2**32 - 1 dimensions": (built([], [text("w") + number(2**32 - 1) + bytes(12)]), "PF106", "dimensions"),
    "a negative dimension": (built([], [entry(dims=(2**64 - 1, 0))]), "PF106", "needs fewer than 2**63"),
    "dimensions that overflow": (built([], [entry(dims=(2**32, 2**32))]), "PF106", "needs fewer than 2**63"),
    "columns that fill no block": (built([], [entry(dims=(48,), kind=8)], 64), "PF106", "48 columns, Q8_0"),
    "more columns than a layout takes": (built([], [entry(dims=(2**50, 0))], 0), "PF106", "w: f32"),
    "an alignment of 0": (built([pair(ALIGNMENT, "UINT32", number(0))], []), "PF102", ALIGNMENT),
    "an alignment of 48": (built([pair(ALIGNMENT, "UINT32", number(48))], []), "PF102", ALIGNMENT),
    "an absurd alignment": (built([pair(ALIGNMENT, "UINT32", number(2**31))], []), "PF102", ALIGNMENT),
    "an alignment of another type": (built([pair(ALIGNMENT, "UINT8", b"\40")], []), "PF102", ALIGNMENT),
    "an unaligned offset": (built([], [entry(dims=(4,)), entry("v", (4,), 0, 16)]), "PF107", "v: at offset 16"),
    "overlapping tensors": (built([], [entry(), entry("v")], 64), "PF107", "v: begins 32 bytes before w"),
    "half overlapping tensors": (built([], [entry(dims=(16,)), entry("v", (8,), 0, 32)], 96), "PF107", "before w"),
    "a gap": (built([], [entry(offset=32)], 64), "PF107", "w: begins 32 bytes after the header"),
    "an offset beyond the file": (built([], [entry(offset=2**63)]), "PF107", "bytes beyond the file"),
    "too little data": (built([], [entry()], 31), "PF101", "truncated"),
    "a dimension too large": (built([], [entry(dims=(2**40,))]), "PF101", "truncated"),
    "too much data": (built([], [entry()], 33), "PF108", "1 bytes after the last tensor"),
    "data of no tensor": (built([], [], 1), "PF108", "1 bytes after"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    raw, rule, message = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ContainerError) as caught:
        gguf.open(path, resolve)
    assert str(caught.value).startswith(f"{path}: ")
    assert (caught.value.rule, message in str(caught.value)) == (rule, True), caught.value


def test_what_damage_is_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(GOOD)
    source = gguf.open(tmp_path / "good.gguf", resolve)
    assert source.extras.keyvalues == {"k": KeyValue("STRING", "v")}
    assert stored(source.read("w")) == bytes(32)
    source.close()


def test_version_2_and_a_last_tensor_without_padding_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(built([], [entry(dims=(4,))], 16).replace(b"GGUF\3", b"GGUF\2"))
    source = gguf.open(path, resolve)
    assert source.read("w").components["values"].tolist() == [[0.0] * 4]
    source.close()


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """The file with one text in it replaced by another of the same length."""
    raw = path.read_bytes()
    assert raw.count(old) >= 1
    assert len(old) == len(new)
    path.write_bytes(raw.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "rule", "message"),
    [
        (b'"type":"Q8_0"', b'"type":"Q4_0"', "PF105", "another tool changed the tensor"),
        (b'"shape":[6,64]', b'"shape":[7,64]', "PF106", "embed.weight"),
        (b'"shape":[6,64]', b'"shape":[64,6]', "PF106", "embed.weight"),
        (b'"shape":[6,64]', b'"shape":[-6,4]', "PF106", "embed.weight"),
        (b'"shape":[6,64]', b'"shape":"6 64"', "PF112", "embed.weight"),
        (b'"dtype":"bfloat16"', b'"dtype":"float_16"', "PF112", "which is no dtype"),
        (b'"embed.weight":', b'"embed.we\\\\ht":', "PF110", "which is not in the file"),
        (b'"embed.weight":', b'"embed.\\ud800":', "PF112", "not JSON"),
        (b'{"embed.weight":{', b'{"embed.weight":[', "PF112", "packfmt.tensors: not JSON"),
        (b'"grid":{"name":"affine"', b'"grid":{"name":"affin3"', "PF111", "packfmt.layouts"),
        (b"packfmt.layouts", b"packfmt.layoutz", "PF112", "packfmt.layouts"),
        (b"packfmt.version\4\0\0\0\1", b"packfmt.version\4\0\0\0\2", "PF112", "packfmt.version is 2"),
    ],
)
def test_records_that_contradict_the_file_are_named(
    tmp_path: Path, old: bytes, new: bytes, rule: str, message: str
) -> None:
    path = write(tmp_path / "m.gguf", model())
    patched(path, old, new)
    with pytest.raises(ContainerError) as caught:
        gguf.open(path, resolve)
    assert str(caught.value).startswith(f"{path}: ")
    assert (caught.value.rule, message in str(caught.value)) == (rule, True), caught.value


def test_a_record_of_an_undescribed_layout_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"w": tensor_of(Q8_0, (2, 32))})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"id":"' + Q8_0.id.encode(), b'"id":"' + Q4_0.id.encode()))
    with pytest.raises(ContainerError, match="w: no description of layout 'q8_0'") as caught:
        gguf.open(path, resolve)
    assert caught.value.rule == "PF111"


def test_every_flipped_byte_of_a_tensor_is_found_and_the_tensor_named(tmp_path: Path) -> None:
    tensors = {"a": tensor_of(Q8_0, (1, 32)), "b": tensor_of(DENSE["bf16"], (3,))}
    path = write(tmp_path / "m.gguf", tensors)
    whole = path.read_bytes()
    for name, tensor in tensors.items():
        begin = whole.rindex(stored(tensor))
        for at in range(begin, begin + len(stored(tensor))):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            source = gguf.open(path, resolve)
            with pytest.raises(ContainerError, match=f"m.gguf: {name}: its bytes are not") as caught:
                source.read(name)
            source.close()
            assert caught.value.rule == "PF109"


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for whole in (GOOD, built([], [entry()])):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ContainerError) as caught:
                gguf.open(path, resolve)
            assert caught.value.rule == ("PF101" if length else "PF100")


def small_file(folder: Path) -> bytes:
    keys = {
        "general.architecture": KeyValue("STRING", "llama"),
        "tokens": KeyValue("ARRAY:STRING", ["a", "bc", ""]),
        "numbers": KeyValue("ARRAY:FLOAT32", [1.0, 2.0]),
        "nested": KeyValue("ARRAY:ARRAY:INT8", [[1], []]),
        "flag": KeyValue("BOOL", True),
    }
    tensors = {"w": tensor_of(Q4_0, (2, 32)), "norm": tensor_of(DENSE["f32"], (3,))}
    return write(folder / "small.gguf", tensors, Extras({"a": 1}, keyvalues=keys)).read_bytes()


@given(data=st.data())
def test_any_damage_gives_a_container_error_or_nothing(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(small_file(folder))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:  # a run of bytes at once reaches lengths and counts
            run = data.draw(st.binary(max_size=9))
            raw[at : at + len(run)] = run
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = folder / "damaged.gguf"
    path.write_bytes(raw)
    try:
        source = gguf.open(path, data.draw(st.sampled_from([resolve, nothing])))
    except ContainerError as error:
        assert str(error).startswith(f"{path}: ")
        return
    try:
        for name in source.index:
            source.read(name)
    except ContainerError as error:
        assert str(error).startswith(f"{path}: {name}: ")
    finally:
        source.close()


def test_a_long_header_is_read_in_pieces(tmp_path: Path) -> None:
    """Texts and numbers that lie across the ends of what is read at once."""
    size = gguf_header.FIRST_READ
    tokens = [f"token {i}" * (i % 7) for i in range(60_000)]
    keys = {
        "general.architecture": KeyValue("STRING", "x" * (size - 60)),
        "tokens": KeyValue("ARRAY:STRING", tokens),
        "scores": KeyValue("ARRAY:FLOAT64", [i / 3 for i in range(len(tokens))]),
    }
    path = write(tmp_path / "m.gguf", {}, Extras(keyvalues=keys))
    source = gguf.open(path, resolve)
    assert source.extras.keyvalues == keys
    source.close()
    assert path.stat().st_size > 2 * size
