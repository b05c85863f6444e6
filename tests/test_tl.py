"""tl1 and tl2: bitnet.cpp's own bytes, twins from closed forms, exact ways to other formats, refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, grids, placement
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError, PlanError
from packfmt.layout import Layout

HERE = Path(__file__).resolve().parent
FOREIGN = json.loads((HERE / "data" / "bitnet_tl.json").read_text())
FORMATS = HERE.parent / "spec" / "formats"
F32 = np.float32


def stored(packed: PackedTensor) -> dict[str, bytes]:
    """The bytes of every component."""
    return {name: array.tobytes() for name, array in packed.components.items()}


SMALL = {"tl1_64_16_32": (128, 32), "tl1_64_8_64": (64, 24), "tl2_64_128_32_96": (64, 128), "tl2_32_48_32_24": (32, 48)}
small = pytest.mark.parametrize("name", SMALL)


def steps_of(rows: int, cols: int) -> np.ndarray:
    """The steps that the foreign bytes hold: tests/data/README.md."""
    i = np.arange(rows * cols, dtype=np.int64)
    return ((i * i + i // 7 + i // (5 * cols)) % 3 - 1).reshape(rows, cols)


def drawn(name: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, SMALL[name])


def numbers(name: str) -> list[int]:
    return [int(n) for n in name.split("_")[1:]]


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: f"{case['layout']}-{case['rows']}x{case['cols']}")
def test_bytes_are_those_of_bitnet_cpp(case: dict) -> None:
    weight = (steps_of(case["rows"], case["cols"]) * 0.5).astype(F32)
    packed = codecs.get(case["layout"]).encode(weight)
    data = packed.components["codes"].tobytes()
    if "base64" in case:
        assert data == base64.b64decode(case["base64"])
    assert (len(data), hashlib.sha256(data).hexdigest()) == (case["bytes"], case["sha256"])
    assert packed.components["scale"].reshape(-1).tolist() == [0.5]
    assert packed.decode().tobytes() == (weight + 0).tobytes()


def slow_tl1(steps: np.ndarray, bm: int, bk: int, bmm: int) -> bytes:
    """Pair by pair, from the closed form of the page."""
    (rows, cols), step = steps.shape, 256 // bmm
    out = bytearray(rows * cols // 4)
    for r in range(rows):
        for t in range(cols // 2):
            tile = r // bm * (cols // bk) + t // (bk // 2)
            row, pair = r % bm, t % (bk // 2)
            place = (tile * (bm // bmm) + row // bmm) * (bk // step) + pair // (step // 2)
            place = (place * (bmm // 16) + row % bmm // 16) * (step // 4) + pair % (step // 2) // 2
            code = 3 * int(steps[r, 2 * t]) + int(steps[r, 2 * t + 1]) + 4
            out[place * 16 + r % 16] |= code << 4 if t % 2 == 0 else code
    return bytes(out)


def slow_tl2(steps: np.ndarray, bm: int, bk: int) -> bytes:
    """Triple by triple and pair by pair, from the closed forms of the page."""
    rows, cols = steps.shape
    tripled = cols - cols % bk
    whole = (cols - 256) * rows // 3 * 5 // 8 + 256 * rows // 2 * 4 // 8
    out, signs, pairs = bytearray(whole), rows * tripled // 6, rows * tripled // 6 + rows * tripled // 24

    def nibble(area: int, r: int, t: int, codes: int, block: int, code: int) -> None:
        tile = (r // bm * (codes // block) + t // block) * (bm // 32) + r % bm // 32
        byte = area + (tile * (block // 2) + t % block // 2) * 32 + [0, 2, 1, 3].index(r % 32 // 8) * 8 + r % 8
        out[byte] |= code << 4 if t % 2 == 0 else code

    for r in range(rows):
        for t in range(tripled // 3):
            value = int(steps[r, 3 * t : 3 * t + 3] @ (9, 3, 1))
            nibble(0, r, t, tripled // 3, bk // 3, abs(value))
            tile = (r // bm * (tripled // bk) + t // (bk // 3)) * (bm // 32) + r % bm // 32
            word = (tile * (bk // 24) + t % (bk // 3) // 8) * 16 + r % 16
            bit = 15 - (2 * (t % 8) + r % 32 // 16)
            out[signs + 2 * word + bit // 8] |= (value < 0) << bit % 8
        for t in range((cols - tripled) // 2):
            code = int(steps[r, tripled + 2 * t : tripled + 2 * t + 2] @ (3, 1)) + 4
            nibble(pairs, r, t, (cols - tripled) // 2, 16, code)
    return bytes(out)


@small
def test_places_are_those_of_the_closed_forms(name: str) -> None:
    steps = drawn(name)
    data = codecs.get(name).encode(steps.astype(F32)).components["codes"].tobytes()
    n = numbers(name)
    assert data == (slow_tl1(steps, *n) if name.startswith("tl1") else slow_tl2(steps, *n[2:]))


def test_all_pairs_and_triples_come_back() -> None:
    triples = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    steps = np.resize(triples, (512, 3)).reshape(32, 48)
    for name in ("tl1_32_8_32", "tl2_32_48_32_24"):
        assert codecs.get(name).encode(steps.astype(F32)).decode().tolist() == steps.tolist()


@small
@given(data=st.data())
def test_any_bytes_survive_unpack_and_pack(name: str, data: st.DataObject) -> None:
    layout, shape = codecs.get(name).layout, SMALL[name]
    components = {}
    for placed in layout.fit(*shape).components:
        start = data.draw(st.binary(min_size=1, max_size=40))
        dtype = np.dtype("u1") if placed.dtype == "u1" else np.dtype("<f4")
        components[placed.name] = np.resize(np.frombuffer(start, "u1"), placed.nbytes).view(dtype).reshape(placed.shape)
    again = placement.pack(layout, shape, placement.unpack(layout, shape, components))
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in components.items()}


def with_codes(packed: PackedTensor, codes: bytes) -> PackedTensor:
    data = np.frombuffer(codes, np.uint8).reshape(packed.components["codes"].shape)
    return PackedTensor(packed.layout, packed.shape, {**packed.components, "codes": data})


def test_codes_that_no_encoder_writes_are_zeros_and_findings() -> None:
    tl1 = codecs.get("tl1_32_8_32").encode(np.ones((32, 8), F32))
    odd = with_codes(tl1, b"\x9f" + tl1.components["codes"].tobytes()[1:])
    assert odd.decode()[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert grids.findings(odd.layout, odd.unpack()) == ["2 of 128 codes are 9 or above, which no encoder writes"]
    tl2 = codecs.get("tl2_32_128_32_96").encode(np.ones((32, 128), F32))
    clean = tl2.components["codes"].tobytes()
    pairs = 32 * 96 // 6 + 32 * 96 // 24
    odd = with_codes(tl2, b"\xef" + clean[1:pairs] + b"\x9f" + clean[pairs + 1 : -1] + b"\x01")
    assert odd.decode()[0].tolist() == [0] * 6 + [1] * 90 + [0] * 4 + [1] * 28
    assert odd.decode()[1:].tolist() == [[1] * 128] * 31
    assert grids.findings(tl2.layout, tl2.unpack()) == []
    (finding,) = grids.findings(odd.layout, odd.unpack())
    assert finding.startswith(f"3 of {len(clean)} bytes of codes")


# ---------------------------------------------------------------- encoding and other formats


@small
def test_ternary_weights_stay_and_encode_to_the_same_bytes(name: str) -> None:
    weight = (drawn(name) * F32(0.1)).astype(F32)
    packed = codecs.get(name).encode(weight)
    assert packed.decode().tobytes() == (weight + 0).tobytes()
    again = codecs.get(name).encode(packed.decode())
    assert stored(again) == stored(packed)


@small
def test_the_choice_is_that_of_other_formats_with_one_scale(name: str) -> None:
    rows, cols = SMALL[name]
    weight = np.random.default_rng(1).normal(0, 1, (rows, cols)).astype(F32)
    wide = np.pad(weight, ((0, 0), (0, -cols % 128)))
    ours, theirs = codecs.get(name).encode(weight), codecs.get("mote_1").encode(wide)
    assert ours.decode().tobytes() == np.ascontiguousarray(theirs.decode()[:, :cols]).tobytes()


WIDE = ("tl1_64_128_32", "tl1_128_32_64", "tl2_128_256_64_96", "tl2_64_128_32_96")  # that all hold 128 rows of 256


@pytest.mark.parametrize("target", ["i2_s", "i2_s_arm", "tq2_0", "tq1_0", "q2_0", "bitnet", "mote_4", *WIDE])
@pytest.mark.parametrize("name", WIDE)
def test_repacking_is_exact_both_ways(name: str, target: str) -> None:
    weight = (np.random.default_rng(2).integers(-1, 2, (128, 256)) * 0.375).astype(F32)
    packed = codecs.get(name).encode(weight)
    there = packed.repack(codecs.get(target).layout)
    assert there.decode().tobytes() == (weight + 0).tobytes()
    back = there.repack(packed.layout)
    assert stored(back) == stored(packed)


def test_scales_that_do_not_fit_are_named() -> None:
    weight = np.random.default_rng(3).integers(-1, 2, (128, 256)).astype(F32)
    packed = codecs.get("tl1_64_128_32").encode(weight * F32(0.1))
    with pytest.raises(LayoutError, match=r"to tq2_0: scale \[0, 0\] is 0.100000001, which is no float16"):
        packed.repack(codecs.get("tq2_0").layout)
    weight[64:] *= 2
    stack = codecs.get("tl2_64_128_32_96").encode(weight)
    assert stack.components["scale"].tolist() == [[1, 1], [2, 2]]
    assert stack.decode().tobytes() == (weight + 0).tobytes()
    with pytest.raises(LayoutError, match=r"to tl1_64_128_32: scale \[1, 0\] is 2, that of weights before it 1"):
        stack.repack(codecs.get("tl1_64_128_32").layout)


# ---------------------------------------------------------------- numbers that fit no kernel


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tl1_64_16_48", "48 rows in a vector step, needs 32 or 64"),
        ("tl1_48_16_32", "48 rows in a tile, needs a multiple of 32"),
        ("tl1_64_12_32", "12 columns in a tile, needs a multiple of 8"),
        ("tl2_64_128_48_96", "bm is 48, needs a multiple of 32"),
        ("tl2_64_128_32_100", "bk is 100, needs a multiple of 24"),
        ("tl2_80_128_32_96", "rows is 80, needs a multiple of 32"),
        ("tl2_64_72_32_96", "72 columns are 0 blocks of 96 and 72 more"),
        ("tl2_64_100_32_96", "100 columns are 1 blocks of 96 and 4 more"),
        ("tl2_64_672_32_384", "672 columns are 1 blocks of 384 and 288 more, needs at least one, and up to 256 more"),
    ],
)
def test_numbers_without_a_kernel_make_no_format(name: str, reason: str) -> None:
    with pytest.raises(PlanError, match=f"{name}: {reason}"):
        codecs.get(name)


@pytest.mark.parametrize("name", ["tl1", "tl2", "tl1_64_16", "tl2_64_128_32", "tl1_0_16_32", "tl1_64_16_32_1"])
def test_names_without_all_numbers_are_no_formats(name: str) -> None:
    with pytest.raises(PlanError, match="no format is called"):
        codecs.get(name)


def test_weights_of_other_shapes_are_refused() -> None:
    with pytest.raises(LayoutError, match="tl1_64_16_32: 32 rows, needs a multiple of 64"):
        codecs.get("tl1_64_16_32").encode(np.zeros((32, 32), F32))
    with pytest.raises(LayoutError, match="tl1_64_16_32: 24 columns, needs a multiple of 16"):
        codecs.get("tl1_64_16_32").encode(np.zeros((64, 24), F32))
    with pytest.raises(LayoutError, match="tl2_64_128_32_96: 192 columns, needs a multiple of 128"):
        codecs.get("tl2_64_128_32_96").encode(np.zeros((64, 192), F32))


CHANGES: list[dict] = [{"bm": 0}, {"bk": 100}, {"rows": -64}, {"rows": 2**40}, {"cols": True}, {"rows": "64"}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_description_with_numbers_that_do_not_fit_is_refused(change: dict) -> None:
    packed = codecs.get("tl2_64_128_32_96").encode(np.ones((64, 128), F32))
    data = json.loads(packed.layout.canonical)
    data["grid"] |= change
    with pytest.raises(LayoutError):
        PackedTensor(Layout.from_json(data), packed.shape, packed.components).decode()


# ---------------------------------------------------------------- the pages


def test_the_page_of_tl1_has_a_worked_example() -> None:
    text = (FORMATS / "tl1.md").read_text()
    (codes,) = (bytes.fromhex(found) for found in re.findall(r"```hex\n(.*?)```", text, re.S))
    packed = with_codes(codecs.get("tl1_32_8_32").encode(np.full((32, 8), 0.5, F32)), codes)
    weight = packed.decode()
    told = re.findall(r"w\[(\d+), (\d+)\], w\[\d+, \d+\] = (-?[\d.]+), (-?[\d.]+)", text)
    assert len(told) > 5
    for row, column, *pair in told:
        assert weight[int(row), int(column) : int(column) + 2].tolist() == [float(p) for p in pair]
    assert codecs.get("tl1_32_8_32").encode(weight).components["codes"].tobytes() == codes


def test_the_page_of_tl2_has_a_worked_example() -> None:
    text = (FORMATS / "tl2.md").read_text()
    packed = codecs.get("tl2_32_128_32_96").encode(np.full((32, 128), 0.5, F32))
    data = np.zeros(packed.components["codes"].size, np.uint8)
    data[32 * 96 // 6 + 32 * 96 // 24 :][: 32 * 32 // 4] = 0x44
    told = re.findall(r"^\| (\d+) \| `([0-9a-f]{2})` \|", text, re.M)
    assert len(told) > 5
    for place, byte in told:
        data[int(place)] = int(byte, 16)
    weight = with_codes(packed, data.tobytes()).decode()
    runs = re.findall(r"w\[(\d+), (\d+):(\d+)\] = ([-\d., ]*\d)", text)
    assert len(runs) > 5
    wanted = np.zeros_like(weight)
    for row, start, stop, values in runs:
        wanted[int(row), int(start) : int(stop)] = [float(v) for v in values.split(",")]
    assert weight.tobytes() == wanted.tobytes()
    assert codecs.get("tl2_32_128_32_96").encode(weight).components["codes"].tobytes() == data.tobytes()
