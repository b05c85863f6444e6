"""Write spec/bad: one broken file a case, and cases.json with the rule each breaks and one sentence.

Run by hand after adding a case: python tools/make_bad.py. A file that exists keeps its bytes, or the run fails.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from packfmt import codecs, exporters
from packfmt.codec import PackedTensor
from packfmt.exporters import Extras, output
from packfmt.layout import DENSE, Codes, Component, Layout, cols, grid, rows
from packfmt.plan import Plan, Step

BAD = Path(__file__).parent.parent / "spec" / "bad"
CASES: dict[str, tuple[str, Callable[[], bytes]]] = {}


def case(name: str, rule: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Register the maker of one broken file; its docstring is the sentence on what is wrong."""

    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        CASES[name] = (rule, make)
        return make

    return register


def weight(columns: int = 64) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.linspace(-1, 1, 4 * columns, dtype=np.float32).reshape(4, columns)


def whole(container: str, *tensors: tuple[str, PackedTensor]) -> bytes:
    """A good file with these tensors."""
    steps = tuple(Step(n, t.shape, t.dtype, t.layout, t.layout, "keep", "") for n, t in tensors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"good{exporters.SUFFIXES[container]}"
        plan = Plan("", container, steps)
        output.write(exporters.get(container).lay(path, plan, Extras()), path, plan, (t for _, t in tensors))
        return path.read_bytes()


def dense(values: Any) -> PackedTensor:
    array = np.array(values, np.float32)
    return PackedTensor(DENSE["f32"], array.shape, {"values": array.reshape(1, -1)})


def good(container: str = "safetensors", layout: str = "q4_0") -> bytes:
    packed = codecs.get(layout).encode(weight(256))
    return whole(container, ("layer.weight", packed), ("layer.bias", dense([1, 2, 3, 4])))


def reheaded(change: Callable[[dict[str, Any], dict[str, Any]], None], data: bytes | None = None) -> bytes:
    """A safetensors file with a changed header; `change` gets the header and packfmt's metadata in it."""
    data = good() if data is None else data
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    own = json.loads(head["__metadata__"]["packfmt"])
    change(head, own)
    if "__metadata__" in head:
        head["__metadata__"]["packfmt"] = json.dumps(own, separators=(",", ":"))
    return framed(json.dumps(head, separators=(",", ":")).encode(), data[8 + length :])


def framed(head: bytes, body: bytes) -> bytes:
    head = head.ljust(-(-len(head) // 8) * 8)
    return len(head).to_bytes(8, "little") + head + body


def damaged(layout: str, component: str, at: int, value: bytes) -> bytes:
    """A file whose packed bytes are wrong in themselves, with checksums to match."""
    packed = codecs.get(layout).encode(weight(256))
    packed.components[component].reshape(-1).view(np.uint8)[at : at + len(value)] = np.frombuffer(value, np.uint8)
    return whole("safetensors", ("layer.weight", packed))


def with_outliers(component: str, at: int, value: Callable[[Any], Any]) -> bytes:
    """A file with outliers, of which one number is another, with checksums to match."""
    packed = codecs.get("q4_0_csr").encode(weight(256), "magnitude:1%")
    stored = packed.components[component]
    stored[at] = value(stored)
    return whole("safetensors", ("layer.weight", packed))


@case("truncated.safetensors", "PF101")
def _() -> bytes:
    """The last ten bytes are missing."""
    return good()[:-10]


@case("flipped_bit.safetensors", "PF109")
def _() -> bytes:
    """One bit of the packed weights is not as it was written."""
    data = bytearray(good())
    data[-100] ^= 4
    return bytes(data)


@case("wrong_dtype.safetensors", "PF105")
def _() -> bytes:
    """The component "blocks" is I8 where q4_0 has U8."""
    return reheaded(lambda head, own: head["layer.weight.blocks"].update(dtype="I8"))


@case("unknown_dtype.safetensors", "PF105")
def _() -> bytes:
    """A tensor has a dtype that safetensors does not."""
    return reheaded(lambda head, own: head["layer.bias"].update(dtype="F128"))


@case("wrong_shape.safetensors", "PF106")
def _() -> bytes:
    """The component "blocks" has the bytes but not the shape that a weight of 4 x 256 needs."""
    return reheaded(lambda head, own: head["layer.weight.blocks"].update(shape=[8, 72]))


@case("shape_and_bytes_differ.safetensors", "PF106")
def _() -> bytes:
    """A shape needs more bytes than its offsets hold."""
    return reheaded(lambda head, own: head["layer.bias"].update(shape=[5]))


@case("columns_do_not_fill_blocks.safetensors", "PF106")
def _() -> bytes:
    """A q4_0 weight claims 100 columns, of which blocks of 32 cannot be made."""
    return reheaded(lambda head, own: own["tensors"]["layer.weight"].update(shape=[4, 100]))


@case("missing_component.safetensors", "PF110")
def _() -> bytes:
    """The packed tensor's only component has another tensor's name."""

    def rename(head: dict[str, Any], own: dict[str, Any]) -> None:
        head["layer.weight.block"] = head.pop("layer.weight.blocks")

    return reheaded(rename)


@case("overlapping_offsets.safetensors", "PF107")
def _() -> bytes:
    """Two tensors share eight bytes."""

    def shift(head: dict[str, Any], own: dict[str, Any]) -> None:
        begin, end = head["layer.weight.blocks"]["data_offsets"]
        head["layer.weight.blocks"]["data_offsets"] = [begin - 8, end - 8]

    return reheaded(shift)


@case("gap_between_tensors.safetensors", "PF107")
def _() -> bytes:
    """Eight bytes between two tensors belong to neither."""

    def shift(head: dict[str, Any], own: dict[str, Any]) -> None:
        begin, end = head["layer.weight.blocks"]["data_offsets"]
        head["layer.weight.blocks"]["data_offsets"] = [begin + 8, end + 8]

    return reheaded(shift)


@case("trailing_bytes.safetensors", "PF108")
def _() -> bytes:
    """Seven bytes follow the last tensor."""
    return good() + b"garbage"


@case("absurd_header_length.safetensors", "PF102")
def _() -> bytes:
    """The header claims to be 2**60 bytes long."""
    return (1 << 60).to_bytes(8, "little") + good()[8:]


@case("header_is_not_json.safetensors", "PF102")
def _() -> bytes:
    """The header ends in the middle of its JSON."""
    return framed(b'{"layer.bias":{"dtype":"F32",', b"")


@case("name_is_not_utf8.safetensors", "PF103")
def _() -> bytes:
    """A tensor's name holds a byte that UTF-8 never has."""
    return good().replace(b'"layer.bias":', b'"layer.b\xffas":')


@case("name_twice.safetensors", "PF104")
def _() -> bytes:
    """The header names one tensor twice."""
    entry = b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    return framed(b"{" + entry + b"," + entry + b"}", b"ab")


@case("name_moves_the_cursor.safetensors", "PF102")
def _() -> bytes:
    """A tensor's name would clear the terminal that shows it."""
    return framed(b'{"a\\u001b[2J":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab")


@case("nan_scale.safetensors", "PF120")
def _() -> bytes:
    """The scale of the first q4_0 block is NaN; checksums agree."""
    return damaged("q4_0", "blocks", 0, b"\x00\x7e")


@case("infinite_scale.safetensors", "PF120")
def _() -> bytes:
    """The scale of the first q8_0 block is infinite; checksums agree."""
    return damaged("q8_0", "blocks", 0, b"\x00\x7c")


@case("reserved_exponent.safetensors", "PF120")
def _() -> bytes:
    """The exponent of the first mxfp4 block is 255, which E8M0 reserves for NaN; checksums agree."""
    return damaged("mxfp4", "blocks", 0, b"\xff")


@case("unused_code.safetensors", "PF120")
def _() -> bytes:
    """A ternary code is 3, of which no encoder writes any; checksums agree."""
    return damaged("tq2_0", "blocks", 0, b"\x03")


@case("spare_bits.safetensors", "PF121")
def _() -> bytes:
    """Two bits of a word that hold no code are set; checksums agree."""
    member = Codes("values", 3, (), (cols(1, 10),), "<u4")
    layout = Layout("ten_in_a_word", (Component("words", (rows(), cols(10)), (member,)),), grid("plain"))
    words = np.full((4, 2), 1 << 30, "<u4")
    return whole("safetensors", ("layer.weight", PackedTensor(layout, (4, 20), {"words": words})))


@case("unsorted_outliers.safetensors", "PF123")
def _() -> bytes:
    """A column stands before one to the left of it; checksums agree."""
    return with_outliers("outlier_columns", 0, lambda columns: columns[1] + 1)


@case("outlier_twice.safetensors", "PF123")
def _() -> bytes:
    """A row names a column twice; checksums agree."""
    return with_outliers("outlier_columns", 1, lambda columns: columns[0])


@case("outlier_beyond_the_matrix.safetensors", "PF123")
def _() -> bytes:
    """An outlier's column is the number of columns; checksums agree."""
    return with_outliers("outlier_columns", -1, lambda columns: 256)


@case("outlier_pointers_go_back.safetensors", "PF123")
def _() -> bytes:
    """A row's outliers begin before those of the row above; checksums agree."""
    return with_outliers("outlier_rows", 1, lambda begins: begins[-1] + 1)


@case("outlier_is_nan.safetensors", "PF123")
def _() -> bytes:
    """An outlier's value is NaN; checksums agree."""
    return with_outliers("outliers", 0, lambda values: np.nan)


@case("dense_nan.safetensors", "PF122")
def _() -> bytes:
    """A bias holds a NaN: a warning, for some models have them on purpose."""
    return whole("safetensors", ("layer.bias", dense([1, float("nan")])))


@case("description_is_not_its_hash.safetensors", "PF111")
def _() -> bytes:
    """The description filed under q4_0's hash has its zero at 7."""

    def change(head: dict[str, Any], own: dict[str, Any]) -> None:
        key = own["tensors"]["layer.weight"]["id"]
        own["layouts"][key]["grid"]["zero"] = 7

    return reheaded(change)


@case("no_description.safetensors", "PF111")
def _() -> bytes:
    """A tensor's layout is described nowhere in the file."""
    return reheaded(lambda head, own: own["layouts"].clear())


@case("digits_do_not_tile.safetensors", "PF106")
def _() -> bytes:
    """The description's digits leave out half of the columns of each block, and its hash is right."""
    return relaid(lambda layout: layout["components"][0]["cell"][1].update(fields=[["cols", 16, 1]]))


@case("other_bytes_under_our_name.safetensors", "PF113")
def _() -> bytes:
    """A layout called q4_0 that has its zero at 7, described and hashed as it is."""
    return relaid(lambda layout: layout["grid"].update(zero=7))


def relaid(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file whose q4_0 description is changed, and filed under its new hash."""

    def refile(head: dict[str, Any], own: dict[str, Any]) -> None:
        record = own["tensors"]["layer.weight"]
        layout = own["layouts"].pop(record["id"])
        change(layout)
        text = json.dumps(layout, sort_keys=True, separators=(",", ":"))
        record["id"] = sha256(text.encode()).hexdigest()
        own["layouts"][record["id"]] = layout

    return reheaded(refile)


@case("metadata_of_another_version.safetensors", "PF112")
def _() -> bytes:
    """packfmt's metadata are of version 99."""
    return reheaded(lambda head, own: own.update(version=99))


@case("metadata_without_tensors.safetensors", "PF112")
def _() -> bytes:
    """packfmt's metadata lack the record of tensors."""
    return reheaded(lambda head, own: own.pop("tensors"))


@case("logical_dtype_is_none.safetensors", "PF112")
def _() -> bytes:
    """packfmt's metadata say that the weight was a "float_16", which is no dtype."""
    return reheaded(lambda head, own: own["tensors"]["layer.weight"].update(dtype="float_16"))


@case("git_lfs_pointer.safetensors", "PF100")
def _() -> bytes:
    """The pointer that Git LFS leaves where a file was not fetched."""
    digest = sha256(b"").hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 12345\n".encode()


@case("empty.safetensors", "PF100")
def _() -> bytes:
    """No byte at all."""
    return b""


def foreign(
    *tensors: tuple[bytes, tuple[int, ...], int, int], size: int = 64, pairs: bytes = b"", count: int = -1
) -> bytes:
    """A GGUF as others write it: (name, dims, ggml type, offset) a tensor, then `size` bytes of zeros."""
    entries = b""
    for name, dims, kind, offset in tensors:
        entries += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        entries += struct.pack("<IQ", kind, offset)
    n_pairs = pairs.count(b"general.")
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors) if count < 0 else count, n_pairs) + pairs + entries
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(size)


F32, Q8_0 = 0, 8


@case("truncated.gguf", "PF101")
def _() -> bytes:
    """The last tensor and its padding are cut short by 26 bytes."""
    return good("gguf")[:-26]


@case("flipped_bit.gguf", "PF109")
def _() -> bytes:
    """One bit of the packed weights is not as it was written."""
    data = bytearray(good("gguf"))
    data[-100] ^= 4
    return bytes(data)


@case("not_a_gguf.gguf", "PF100")
def _() -> bytes:
    """A file of another kind under this name."""
    return b"PK\3\4" + bytes(60)


@case("big_endian.gguf", "PF100")
def _() -> bytes:
    """A header with its bytes in the other order."""
    return b"GGUF\0\0\0\3" + foreign((b"w", (16,), F32, 0))[8:]


@case("absurd_tensor_count.gguf", "PF102")
def _() -> bytes:
    """The header claims 2**63 tensors."""
    return foreign((b"w", (16,), F32, 0), count=1 << 63)


@case("name_is_not_utf8.gguf", "PF103")
def _() -> bytes:
    """A tensor's name holds a byte that UTF-8 never has."""
    return foreign((b"w\xff", (16,), F32, 0))


@case("name_twice.gguf", "PF104")
def _() -> bytes:
    """Two tensors have one name."""
    return foreign((b"w", (8,), F32, 0), (b"w", (8,), F32, 32))


@case("unknown_type.gguf", "PF105")
def _() -> bytes:
    """A tensor's type has a number that ggml never gave."""
    return foreign((b"w", (16,), 200, 0))


@case("columns_do_not_fill_blocks.gguf", "PF106")
def _() -> bytes:
    """A Q8_0 tensor has 48 columns, of which blocks of 32 cannot be made."""
    return foreign((b"w", (48,), Q8_0, 0))


@case("dimensions_overflow.gguf", "PF106")
def _() -> bytes:
    """The product of a tensor's dimensions does not fit in 64 bits."""
    return foreign((b"w", (1 << 32, 1 << 32), F32, 0))


@case("overlapping_offsets.gguf", "PF107")
def _() -> bytes:
    """Two tensors begin at the same byte."""
    return foreign((b"v", (8,), F32, 0), (b"w", (8,), F32, 0))


@case("unaligned_offset.gguf", "PF107")
def _() -> bytes:
    """A tensor begins at byte 16, and the alignment is 32."""
    return foreign((b"v", (4,), F32, 0), (b"w", (4,), F32, 16))


@case("trailing_bytes.gguf", "PF108")
def _() -> bytes:
    """Seven bytes follow the last tensor and its padding."""
    return foreign((b"w", (16,), F32, 0), size=64 + 7)


@case("nan_scale.gguf", "PF120")
def _() -> bytes:
    """The scale of a Q8_0 block is NaN, in a file without checksums."""
    block = struct.pack("<H32b", 0x7E00, *range(32))
    return foreign((b"w", (32,), Q8_0, 0), size=0) + block.ljust(64, b"\0")


def main() -> int:
    """Write what is missing; fail if a committed file would change."""
    BAD.mkdir(parents=True, exist_ok=True)
    changed = []
    for name, (_, make) in CASES.items():
        data, path = make(), BAD / name
        if path.exists() and path.read_bytes() != data:
            changed.append(name)
        elif not path.exists():
            path.write_bytes(data)
    listed = {n: {"rule": rule, "what": (make.__doc__ or "").strip()} for n, (rule, make) in sorted(CASES.items())}
    (BAD / "cases.json").write_text(json.dumps(listed, indent=2) + "\n")
    for name in changed:
        print(f"{name} would change; a case is for life, give the new bytes a new name")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
