"""Products: the bits of spec/products.md, whatever the layout, the shape, the batch, the threads or the processor."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import slow_products as slow
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT, SPEC, packed_of
from slow_products import NUMBERS, WHOLE
from test_fused import ODD, TOYS
from test_strange_layouts import changed

import packfmt
from packfmt import codecs, grids, minifloat, placement
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError, PackfmtError
from packfmt.exporters import Extras
from packfmt.exporters import safetensors as container
from packfmt.kernels import simd
from packfmt.layout import Codes, Component, Layout, Values, cols, dtype_of, grid, rows
from packfmt.placement import Arrays
from packfmt.plan import Plan, Step
from tests.outputs import save

F32, F64 = np.float32, np.float64
Floats = npt.NDArray[np.float32]
Shape = tuple[int, int]

MADE = (  # of the numbers in their names
    *("ct_int2_g32", "ct_int3_g32_asym", "ct_int4_g128", "ct_int4_row_asym", "ct_int5_legacy_row_asym_f16"),
    *("ct_int6_g64_f32", "ct_int7_row", "ct_int8_row_f32", "ct_int8_g32_asym", "ct_int4_g512", "ct_int4_g4"),
    *("e2m1_g32", "e2m1_tensor", "e3m2b5_row", "e2m3_row", "e4m3_tensor", "e5m0_g8", "mote_3", "nvfp4_x3"),
    *("nvfp4_ct_h64", "q8_0_h32", "hif4_h16", "mxfp8_e4m3_h64", "if4_h16", "mxfp4_out3", "nvfp4_ct_out1"),
    *("arcquant_64", "arcquant_128", "tl1_32_8_32", "tl1_64_16_64", "tl2_32_48_32_24", "tl2_64_128_32_96"),
)
LISTED = [n for n in codecs.names() if not codecs.get(n).layout.sparse]  # test_spqr and test_outliers have the others
NAMES = (*LISTED, *MADE)
BY_NUMBERS = {
    *("f32", "f16", "bf16", "if4", "if4_h16", "ptq161", "nvfp4_rows", "e4m3_tensor", "e5m0_g8"),
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp8_e4m3_h64", *codecs.FAMILIES["fp8"]),
    *("spqr", *codecs.FAMILIES["squeezellm"]),
}
every = pytest.mark.parametrize("name", NAMES)
MOST_COLS, ENOUGH_COLS = 700, 330


# ---------------------------------------------------------------- weights and activations


def layout_of(name: str) -> Layout:
    return codecs.get(name).layout


def random_components(layout: Layout, shape: Shape, rng: np.random.Generator) -> Arrays:
    """Any bytes; but a permutation is one, columns kept apart exist, and a mask names as many as there are codes."""
    out: dict[str, Any] = {s.name: np.zeros(3, dtype_of(s.dtype)) for s in layout.streams}
    for c in layout.fit(*shape).components:
        raw = rng.integers(0, 256, c.nbytes, np.uint8)
        out[c.name] = raw.view(dtype_of(c.dtype)).reshape(c.shape)
    if "mask" in out and shape[1]:
        bits = rng.permutation(shape[1]) < shape[1] // 64 * 13
        out["mask"] = np.packbits(bits, bitorder="little").reshape(out["mask"].shape)
    for name in ("perm", "reorder_index", "outlier_columns"):
        if name in out:
            out[name] = rng.permutation(shape[1])[: out[name].size].astype(out[name].dtype).reshape(out[name].shape)
    return out


SPECIAL = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 2.0**-126, 1e-40, -3e38, 2.0**-149, 1, -1.5], F32)


def some_scales(dtype: npt.DTypeLike, count: int, rng: np.random.Generator, kind: str) -> Floats:
    """Numbers to be scales, in float32: ordinary ones of either sign, powers of two, or all that is special."""
    if kind == "powers":
        return np.ldexp(F32(1), rng.integers(-2, 3, count))
    found = (rng.normal(0, 0.1, count) + 0.01).astype(F32)
    if kind == "special":
        where = rng.random(count) < 0.1
        found[where] = rng.choice(SPECIAL, int(where.sum()))
    return found


def with_scales(packed: PackedTensor, rng: np.random.Generator, kind: str) -> PackedTensor:
    """The same codes with other scales."""
    layout, parts = packed.layout, packed.unpack()
    params = dict(layout.grid.params)
    for name in ("scale", "global_scale", "codebook"):
        if name not in parts or layout.grid.name == "spqr":  # whose scales are codes
            continue
        part = parts[name]
        wanted = some_scales(part.dtype, part.size, rng, kind)
        if part.dtype.kind == "u":  # bytes with a meaning: the nearest there is
            known = minifloat.numbers(params["scale"]) if params.get("scale") else None
            if known is None:
                known = np.ldexp(F32(1), np.arange(256) - params["exponent"])
            at = np.flatnonzero(np.isfinite(known))
            size = np.where(np.isfinite(wanted), np.abs(wanted), 1)
            near = at[np.abs(known[at] - size[:, None]).argmin(1)]
            if kind == "special":
                near = np.where(
                    rng.random(part.size) < 0.1, rng.choice([0, 1, 126, 127, 128, 254, 255], part.size), near
                )
            parts[name] = near.astype(part.dtype).reshape(part.shape)
        else:
            with np.errstate(all="ignore"):
                parts[name] = wanted.astype(part.dtype).reshape(part.shape)
    return PackedTensor(layout, packed.shape, placement.pack(layout, packed.matrix, parts))


def random_weight(layout: Layout, shape: Shape, seed: int, kind: str) -> PackedTensor:
    """kind: "bytes" for any at all, "ordinary", "special" or "powers" for any codes with such scales."""
    rng = np.random.default_rng(seed)
    packed = PackedTensor(layout, shape, random_components(layout, shape, rng))
    return packed if kind == "bytes" else with_scales(packed, rng, kind)


KINDS = ("bytes", "ordinary", "special")


def activations(batch: int, width: int, seed: int, kind: str = "mixed") -> Floats:
    """Rows of every kind: normal, whole, of all magnitudes, huge, denormal, zeros, with a NaN or an infinity."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (batch, width)).astype(F32)
    if kind == "normal" or not width:
        return x
    with np.errstate(all="ignore"):
        for i, row in enumerate(x):
            match (i + seed) % 9:
                case 1:
                    row[:] = rng.integers(-127, 128, width)
                case 2:
                    row *= np.ldexp(F32(1), rng.integers(-150, 128, width)).astype(F32)
                case 3:
                    row *= F32(1e38)
                    np.nan_to_num(row, copy=False)
                case 4:
                    row[:] = rng.integers(-300, 300, width) * F32(2.0**-149)
                case 5:
                    row[rng.random(width) < 0.9] = 0
                case 6:
                    row[int(rng.integers(width))] = np.nan
                case 7:
                    row[int(rng.integers(width))] = rng.choice([np.inf, -np.inf])
                case 8:
                    row[:] = rng.integers(-254, 255, width) / F32(2)  # halves, if 127 is among them
                    row[:: max(1, width // 9)] = 127
    return x


def numbers_only(y: Floats) -> bytes:
    """The bits, with one NaN for all."""
    assert y.dtype == F32
    return np.where(np.isnan(y), F32(np.nan), y).tobytes()


def assert_same(found: Floats, wanted: Floats) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == F32
    if numbers_only(found) != numbers_only(wanted):
        wrong = np.argwhere((found.view(np.uint32) != wanted.view(np.uint32)) & ~(np.isnan(found) & np.isnan(wanted)))
        at = tuple(wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {found.size} differ, the first at {at}: {found[at]!r}, not {wanted[at]!r}"
        )


def shapes(layout: Layout) -> list[Shape]:
    """One block wide and several, cut at the end where they can be; odd rows."""
    high, wide = layout.block["rows"], layout.block["cols"]
    across = [wide, wide * max(2, -(-ENOUGH_COLS // wide)), wide * max(3, MOST_COLS // wide)]
    experts = 3 if high == 1 and layout.name in ("mote_3", "nvfp4_x3") else 1
    if layout.grid.name == "augmented":
        across = [max(c, layout.grid["residual"]) for c in across]
    if any(a.name == "outlier" for a in layout.axes):
        across = [max(c, 64) for c in across]
    return [(high * experts * down, c) for down in (1, 3, 17, 33) for c in across if high * down <= 700]


def check(packed: PackedTensor, x: Floats, threads: int = 1) -> None:
    """Both ways to multiply give the twin's bits, and leave x as it is."""
    wanted, before = slow.product(packed, x), x.tobytes()
    assert_same(packed.matmul(x, threads=threads), wanted)
    assert_same(packfmt.prepare(packed).matmul(x, threads=threads), wanted)
    assert x.tobytes() == before


# ---------------------------------------------------------------- the twin itself


@every
def test_a_layout_goes_the_way_that_its_description_says(name: str) -> None:
    layout = layout_of(name)
    assert {slow.way(layout, shape) for shape in shapes(layout)} == {NUMBERS if name in BY_NUMBERS else WHOLE}


@pytest.mark.parametrize("name", [n for n in NAMES if not layout_of(n).hadamard])
def test_one_activation_at_a_time_gives_the_decoded_weights(name: str) -> None:
    """With scales that are powers of two, and 127 for an activation, no operation rounds."""
    layout = layout_of(name)
    packed = random_weight(layout, shapes(layout)[1], 5, "powers" if name != "ptq161" else "bytes")
    one = F32(127) * np.eye(packed.shape[1], dtype=F32)
    with np.errstate(all="ignore"):
        wanted = F32(127) * packed.decode().T
    for found in (slow.product(packed, one), packed.matmul(one)):
        if name not in BY_NUMBERS:
            assert (found == wanted).all()
        else:  # a number that is none spoils all products of its row
            ordinary = np.isfinite(wanted).all(0)
            assert (found[:, ordinary] == wanted[:, ordinary]).all() and np.isnan(found[:, ~ordinary]).any(0).all()


@every
def test_the_product_is_near_the_one_in_double_precision(name: str) -> None:
    shape = shapes(layout_of(name))[-1]
    packed = codecs.get(name).encode(np.random.default_rng(3).normal(0, 0.02, shape).astype(F32))
    x = activations(4, shape[1], 4, "normal")
    wanted = x.astype(F64) @ packed.decode().astype(F64).T
    error = np.linalg.norm(packed.matmul(x) - wanted) / np.linalg.norm(wanted)
    assert error < (1e-6 if name in BY_NUMBERS else 1.2e-2)


# ---------------------------------------------------------------- every layout


BATCHES = (1, 2, 7, 16, 64)


@every
def test_products_are_the_twins_to_the_bit(name: str) -> None:
    layout = layout_of(name)
    for i, shape in enumerate(shapes(layout)):
        for j, kind in enumerate(KINDS):
            batch, threads = BATCHES[(i + 2 * j) % 5], 1 + (i + j) % 3
            packed = random_weight(layout, shape, 10 * i + j, kind)
            check(packed, activations(batch, shape[1], i + j, "normal" if kind == "special" else "mixed"), threads)


@pytest.mark.kernels
@given(
    name=st.sampled_from(NAMES),
    down=st.integers(1, 40),
    along=st.integers(1, 6),
    batch=st.integers(1, 20),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
)
def test_any_weight_times_any_activations(
    name: str, down: int, along: int, batch: int, threads: int, seed: int, kind: str
) -> None:
    layout = layout_of(name)
    high, wide = layout.block["rows"], layout.block["cols"]
    least = layout.grid["residual"] if layout.grid.name == "augmented" else 64 if "_out" in name else 1
    shape = (high * (1 if high > 16 else down) * (3 if name in ("mote_3", "nvfp4_x3") else 1), max(wide * along, least))
    check(random_weight(layout, shape, seed, kind), activations(batch, shape[1], seed % 1000), threads)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["tq2_0", "sherry_row", "nvfp4", "bf16"])
def test_a_large_weight_is_shared_among_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(name)
    shape = (67, 512) if simd.INTERPRETED else (519, 2048)
    packed = random_weight(layout, shape, 1, "ordinary")
    ready, x = packfmt.prepare(packed), activations(3, shape[1], 2)
    wanted = slow.product(packed, x)
    for count in (1, 2, 3, 5):
        monkeypatch.setenv("PACKFMT_THREADS", str(count))
        for found in (packed.matmul(x), ready.matmul(x), ready.matmul(x, threads=count), packed.matmul(x, threads=1)):
            assert_same(found, wanted)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["tq1_0", "mxfp4", "ct_int4_g128", "fp8_row", "ptqtp2_b3"])
def test_a_row_of_a_batch_does_not_know_the_others(name: str) -> None:
    packed = random_weight(layout_of(name), (33, 512), 8, "ordinary")
    x = activations(70, 512, 9)
    together = packed.matmul(x)
    for batch in (1, 3, 8, 9, 17, 32, 33, 69):
        assert_same(packed.matmul(x[:batch]), together[:batch])
    for i in (0, 31, 69):
        assert_same(packed.matmul(x[i]), together[i])


@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((17, 512), F32),
        np.full((17, 512), -1.5, F32),
        np.eye(17, 512, dtype=F32),
    ],
    ids=["zeros", "all alike", "few"],
)
@pytest.mark.parametrize("name", ["q4_0", "tq2_0", "sherry", "nvfp4", "mxfp8_e5m2", "f16", "hif4", "ct_int8_row"])
def test_encoded_weights_that_are_special(name: str, weight: Floats) -> None:
    check(codecs.get(name).encode(weight), activations(9, 512, 3))


# ---------------------------------------------------------------- layouts that no format has

FP8_APART = replace(
    layout_of("mxfp8_e4m3"),
    name="mxfp8 with columns kept apart",
    components=(*layout_of("mxfp8_e4m3").components, *layout_of("mxfp4_out3").components[1:]),
    axes=layout_of("mxfp4_out3").axes,
)
SIXTEEN = Component("codes", (rows(), cols(2)), (Codes("codes", 4, (), (cols(1, 2),)),))
HALVES = Component("scale", (rows(), cols(32)), (Values("scale", "<f2"),))


def toy(*components: Component, numbers: Any, **rest: Any) -> Layout:
    return Layout("toy", components, numbers, **rest)


def scales_of(group: int, dtype: str = "<f2") -> Component:
    return Component("scale", (rows(), cols(group)), (Values("scale", dtype),))


def codes_of(bits: int) -> Component:
    return Component("codes", (rows(), cols(8)), (Codes("codes", bits, (), (cols(1, 8),)),))


QUARTERS, EIGHT = (0.0, 0.25, -1.5, 3.25), (*range(-700, 800, 100), 1024)
STRANGE = {
    "levels in quarters": (toy(codes_of(2), HALVES, numbers=grid("levels", values=QUARTERS)), WHOLE),
    "levels that are all even": (toy(codes_of(2), HALVES, numbers=grid("levels", values=(0, 2, -4, 6))), WHOLE),
    "large steps": (toy(SIXTEEN, HALVES, numbers=grid("levels", values=EIGHT)), WHOLE),
    "too large steps": (toy(SIXTEEN, HALVES, numbers=grid("levels", values=(*EIGHT[:-1], 1025))), NUMBERS),
    "levels that are no steps": (toy(codes_of(2), HALVES, numbers=grid("levels", values=(0, 1 / 3, 1, 2))), NUMBERS),
    "ten bits around a large zero": (toy(codes_of(10), HALVES, numbers=grid("affine", zero=512)), WHOLE),
    "ten bits": (toy(codes_of(10), HALVES, numbers=grid("affine", zero=0)), WHOLE),
    "ten bits from far": (toy(codes_of(10), HALVES, numbers=grid("affine", zero=-2)), NUMBERS),
    "a zero that is no whole number": (toy(SIXTEEN, HALVES, numbers=grid("affine", zero=7.5)), NUMBERS),
    "scales of 4 columns": (toy(SIXTEEN, scales_of(4), numbers=grid("affine", zero=8)), WHOLE),
    "scales of 3 columns": (toy(SIXTEEN, scales_of(3), numbers=grid("affine", zero=8)), NUMBERS),
    "scales of 12 columns": (toy(SIXTEEN, scales_of(12), numbers=grid("affine", zero=8)), WHOLE),
    "scales of 40 columns": (toy(codes_of(3), scales_of(40), numbers=grid("affine", zero=4)), WHOLE),
    "scales of 384 columns": (toy(codes_of(2), scales_of(384, "bfloat16"), numbers=grid("affine", zero=1)), WHOLE),
    "scales of 512 columns": (toy(SIXTEEN, scales_of(512, "<f4"), numbers=grid("affine", zero=8)), WHOLE),
    "double scales": (toy(codes_of(1), scales_of(64, "<f8"), numbers=grid("levels", values=(-1, 1))), WHOLE),
    "whole scales": (toy(codes_of(1), scales_of(64, "i1"), numbers=grid("levels", values=(-1, 1))), WHOLE),
    "quotients by group": (toy(SIXTEEN, HALVES, numbers=grid("quotient", zero=8)), WHOLE),
    "five bits": (toy(codes_of(5), HALVES, numbers=grid("affine", zero=16)), WHOLE),
    "seven bits": (toy(codes_of(7), HALVES, numbers=grid("affine", zero=64)), WHOLE),
    "float8 without steps, columns kept apart": (FP8_APART, NUMBERS),
    "one scale for columns that no group fills": (
        toy(SIXTEEN, Component("scale", (rows(), cols(64)), (Values("scale", "<f2"),), ragged=True),
            numbers=grid("affine", zero=8)),
        WHOLE,
    ),
    "rows share a scale in threes": (
        toy(SIXTEEN, Component("scale", (rows(3), cols(16)), (Values("scale", "<f2"),)),
            numbers=grid("affine", zero=8)),
        WHOLE,
    ),
    "a permutation of bits": (
        toy(codes_of(1), HALVES, Component("perm", (cols(),), (Values("perm", "<u4"),)),
            numbers=grid("levels", values=(-1, 1))),
        WHOLE,
    ),
    "a permutation of floats": (
        toy(Component("codes", (rows(), cols()), (Values("codes", "float8_e5m2"),)), HALVES,
            Component("perm", (cols(),), (Values("perm", "<u4"),)),
            numbers=grid("scaled", element="float8_e5m2", scale="", global_scale="")),
        NUMBERS,
    ),
    "columns first": (
        toy(Component("codes", (cols(4), rows()), (Codes("codes", 2, (), (cols(1, 4),)),)),
            Component("scale", (cols(32), rows()), (Values("scale", "<f2"),)), numbers=grid("affine", zero=1)),
        WHOLE,
    ),
}  # fmt: skip
STRANGE_COLS = {"scales of 3 columns": 66, "scales of 12 columns": 300, "scales of 40 columns": 320,
                "scales of 384 columns": 768, "scales of 512 columns": 1024,
                "one scale for columns that no group fills": 300}  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("name", STRANGE)
def test_layouts_that_nobody_has_seen(name: str) -> None:
    layout, way = STRANGE[name]
    layout = Layout.from_json(layout.to_json())
    for seed, down in enumerate((3, 18)):
        shape = (down, STRANGE_COLS.get(name, 320))
        assert slow.way(layout, shape) == way
        for kind in KINDS:
            check(random_weight(layout, shape, seed, kind), activations(5, shape[1], seed))


@pytest.mark.parametrize("name", [n for n in TOYS | ODD if not n.startswith("a global scale that no rule")])
def test_layouts_of_the_decoders_tests(name: str) -> None:
    layout = (TOYS | ODD)[name]
    wide = layout.block["cols"]
    for seed, down in enumerate((2, 18)):
        shape = (down * layout.block["rows"], wide * max(1, 240 // wide))
        try:
            packed = PackedTensor(layout, shape, random_components(layout, shape, np.random.default_rng(seed)))
            grids.decode(layout, shape, packed.components)
        except LayoutError:
            continue
        check(packed, activations(9, shape[1], seed))


@given(
    name=st.sampled_from(NAMES),
    shape=st.sampled_from([(r, c) for r in (1, 3, 32, 64) for c in (64, 128, 256, 384, 512)]),
    seed=st.integers(0, 2**32 - 1),
    changes=st.integers(1, 3),
)
def test_a_changed_description_is_multiplied_by_its_words_or_refused(
    name: str, shape: Shape, seed: int, changes: int
) -> None:
    draw, data = random.Random(seed), layout_of(name).to_json()
    for _ in range(changes):
        data = changed(data, draw)
    try:
        layout = Layout.from_json(data)
        if layout.nbytes(*shape) > 1 << 20:
            return
        packed = PackedTensor(layout, shape, random_components(layout, shape, np.random.default_rng(seed)))
    except LayoutError:
        return
    x = activations(3, shape[1], seed % 9)
    try:
        packed.decode()
        slow.product(packed, x)
    except LayoutError:
        with suppress(LayoutError):  # and nothing else
            packed.matmul(x)
        with suppress(LayoutError):
            packfmt.prepare(packed).matmul(x)
        return
    check(packed, x)


# ---------------------------------------------------------------- a prepared weight in a file


STORED = (
    *("tq1_0", "sherry", "sherry_s16_perm", "mxfp4", "nvfp4_x3", "hif4", "ct_int4_row_asym", "ptqtp2_tied"),
    *("bitnet_divide", "nvfp4_ct_h64", "mxfp4_out3", "arcquant_64", "fp8_row"),
)


@pytest.mark.parametrize("name", STORED)
def test_what_is_prepared_can_be_stored_and_is_multiplied_without_being_known(name: str, tmp_path: Path) -> None:
    layout = layout_of(name)
    packed = random_weight(layout, shapes(layout)[-2], 2, "ordinary")
    held = packfmt.prepare(packed).packed
    step = Step("w", held.shape, held.dtype, held.layout, held.layout, "keep", "")
    path = tmp_path / "m.safetensors"
    save(container, path, Plan("", "safetensors", (step,)), iter([held]), Extras())
    x = activations(9, packed.shape[1], 4)
    with packfmt.open(path) as model:
        again = model["w"]
        assert again.layout == held.layout and again.layout.id == held.layout.id
        assert np.array_equal(again.decode(), packed.decode(), equal_nan=True)  # but for the sign of zeros
        check(again, x)
        assert_same(again.matmul(x), slow.product(packed, x))


# ---------------------------------------------------------------- processors

LEVELS: dict[str, dict[str, str]] = {
    "as it is": {},
    "portable": {"PACKFMT_SIMD": "portable"},
    "avx2": {"PACKFMT_SIMD": "avx2"},
    "avx512": {"PACKFMT_SIMD": "avx512"},
    "haswell": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    "no amx": {"PACKFMT_AMX": "0"},
    "interpreted": {"NUMBA_DISABLE_JIT": "1"},
}
FEW = ("tq2_0", "mxfp4", "sherry", "bf16")
MANY = (*FEW, "nvfp4", "q8_0", "ct_int4_row_asym", "ptqtp2_tied", "sherry_row", "mxfp6_e3m2", "fp8_block", "hif4_h16")
ON = {"as it is": MANY, "interpreted": FEW, "no amx": FEW, "portable": FEW, "haswell": FEW}


def digests(names: tuple[str, ...], small: bool) -> Iterator[tuple[str, str]]:
    """SHA-256 of products of each layout, as a child computes them."""
    for name in names:
        for batch in (1, 3) if small else (1, 3, 17):
            layout = layout_of(name)
            packed = random_weight(layout, (19, 512) if not small else (3, 512), 6, "ordinary")
            x = activations(batch, 512, 1)
            for how, found in (("as stored", packed.matmul(x)), ("prepared", packfmt.prepare(packed).matmul(x))):
                yield f"{name} {batch} {how}", hashlib.sha256(numbers_only(found)).hexdigest()
            yield f"{name} {batch} twin", hashlib.sha256(numbers_only(slow.product(packed, x))).hexdigest()


@cache
def kernels_hash() -> str:
    """Of all that a compiled kernel is made of: Numba's cache does not see edits of what a kernel imports."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "packfmt" / "kernels").glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def supported(level: str) -> bool:
    rank = {"portable": 0, "avx2": 1, "avx512": 2, "avx512vnni": 3}
    return level not in rank or rank[level] <= rank.get(simd.LEVEL, 0)


@pytest.mark.parametrize("level", LEVELS)
def test_bits_are_the_same_on_every_processor(level: str) -> None:
    """A child for each, with a cache of its own: kernels that are compiled once are not compiled again."""
    if not supported(level):
        pytest.skip(f"this processor is {simd.LEVEL}, which has no {level}")
    folder = ROOT / ".pytest_cache" / "levels" / kernels_hash() / level.replace(" ", "_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "PACKFMT_SIMD", "PACKFMT_AMX"))}
    env |= {**LEVELS[level], "NUMBA_CACHE_DIR": str(folder), "PACKFMT_THREADS": "2"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    names = ON.get(level, FEW)
    call = f"test_products.digests({names!r}, {level == 'interpreted'})"
    code = f"import test_products\nfor line in {call}: print(*line)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    found = {name: hash_ for name, hash_ in lines}
    assert len(found) == len(lines) == 3 * len(names) * (2 if level == "interpreted" else 3)
    for name in found:
        assert found[name] == found[re.sub("(as stored|prepared)$", "twin", name)], name


# ---------------------------------------------------------------- the door


def test_one_row_of_activations_gives_one_row() -> None:
    packed = random_weight(layout_of("q4_0"), (5, 64), 1, "ordinary")
    x = activations(1, 64, 1, "normal")
    for held in (packed, packfmt.prepare(packed)):
        assert held.matmul(x[0]).shape == (5,) and held.matmul(x).shape == (1, 5)
        assert held.matmul(x[0]).tobytes() == held.matmul(x).tobytes()


def test_experts_are_rows() -> None:
    weight = np.random.default_rng(1).normal(0, 1, (3, 7, 64)).astype(F32)
    packed, x = codecs.get("q8_0").encode(weight), activations(2, 64, 1, "normal")
    flat = codecs.get("q8_0").encode(weight.reshape(21, 64))
    for held in (packed, packfmt.prepare(packed)):
        assert held.matmul(x).reshape(2, 21).tobytes() == flat.matmul(x).tobytes()


@pytest.mark.parametrize("name", ["q4_0", "f32", "sherry_row", "ptqtp2", "nvfp4_ct_h64"])
@pytest.mark.parametrize("shape", [(0, 128), (5, 0), (0, 0)])
def test_no_rows_and_no_columns(name: str, shape: Shape) -> None:
    layout = layout_of(name)
    stored = {c.name: np.ones(c.shape, dtype_of(c.dtype)) for c in layout.fit(*shape).components}
    packed = PackedTensor(layout, shape, stored)
    for held in (packed, packfmt.prepare(packed)):
        for batch in (0, 1, 3):
            found = held.matmul(np.ones((batch, shape[1]), F32))
            assert found.dtype == F32 and found.tobytes() == np.zeros((batch, shape[0]), F32).tobytes()
            assert found.shape == (batch, shape[0])


@pytest.mark.parametrize("name", ["q4_0", "bf16"])
def test_an_empty_batch_gives_an_empty_product(name: str) -> None:
    packed = random_weight(layout_of(name), (5, 64), 1, "ordinary")
    for held in (packed, packfmt.prepare(packed)):
        assert held.matmul(np.zeros((0, 64), F32)).shape == (0, 5)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["tq2_0", "nvfp4_ct_h64", "bf16", "mxfp4_out3"])
def test_activations_may_lie_anywhere_in_memory(name: str) -> None:
    packed = random_weight(layout_of(name), (5, 256), 1, "ordinary")
    x = activations(6, 256, 1, "normal")
    wanted = slow.product(packed, x)
    behind = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(F32).reshape(x.shape)  # at an odd address, read-only
    apart = np.zeros((12, 512), F32)[::2, ::2]
    apart[:] = x
    for held in (packed, packfmt.prepare(packed)):
        for some in (behind, apart, np.asfortranarray(x), x[::-1][::-1]):
            assert_same(held.matmul(some), wanted)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.ones((2, 63), F32), "63"),
        (np.ones((2, 65), F32), "64"),
        (np.ones(63, F32), "63"),
        (np.ones((64, 2), F32), "64"),
        (np.ones((2, 64), np.int32), "int32"),
        (np.ones((2, 64), np.bool_), "bool"),
        (np.ones((2, 64), np.complex64), "complex64"),
        (np.array([["a"] * 64]), "<U1"),
        (np.array(1, F32), "64"),
        (np.ones((0, 63), F32), "63"),
        ([1.0] * 64, "list"),
    ],
)
@pytest.mark.parametrize("name", ["q4_0", "f32"])
def test_activations_that_do_not_fit_are_refused(name: str, x: npt.NDArray[Any], says: str) -> None:
    packed = random_weight(layout_of(name), (5, 64), 1, "ordinary")
    for held in (packed, packfmt.prepare(packed)):
        with pytest.raises(LayoutError) as error:
            held.matmul(x)
        assert says in str(error.value) and "\n" not in str(error.value) and not str(error.value).endswith(".")


@pytest.mark.parametrize("threads", [0, -1, 257, 1.5, "2", True])
def test_a_number_of_threads_that_is_none_is_refused(threads: Any) -> None:
    packed = random_weight(layout_of("q4_0"), (5, 64), 1, "ordinary")
    for held in (packed, packfmt.prepare(packed)):
        with pytest.raises(PackfmtError, match="threads"):
            held.matmul(np.ones(64, F32), threads=threads)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_activations_in_float32(dtype: str) -> None:
    packed = random_weight(layout_of("q4_0"), (5, 64), 1, "ordinary")
    x = activations(2, 64, 1, "normal").astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    assert_same(packed.matmul(x), slow.product(packed, x.astype(F32)))


@pytest.mark.parametrize("name", ["sherry_s16_perm", "arcquant_64"])
def test_a_permutation_that_is_none_is_refused(name: str) -> None:
    packed = random_weight(layout_of(name), (2, 256), 1, "ordinary")
    part = "perm" if name == "sherry_s16_perm" else "reorder_index"
    wrong = replace(packed, components={**packed.components, part: np.zeros(256, np.uint32)})
    with pytest.raises(LayoutError, match="perm does not name each of 256 columns once"):
        wrong.matmul(np.ones(256, F32))
    with pytest.raises(LayoutError, match="perm does not name each of 256 columns once"):
        packfmt.prepare(wrong)


def test_columns_kept_apart_that_are_not_there_are_refused() -> None:
    packed = random_weight(layout_of("mxfp4_out3"), (2, 64), 1, "ordinary")
    wrong = replace(packed, components={**packed.components, "outlier_columns": np.array([1, 64, 2], np.uint32)})
    with pytest.raises(LayoutError, match="columns names column 64 of 64"):
        wrong.matmul(np.ones(64, F32))


def test_of_a_column_named_twice_the_last_counts() -> None:
    packed = random_weight(layout_of("mxfp4_out3"), (20, 64), 1, "ordinary")
    twice = replace(packed, components={**packed.components, "outlier_columns": np.array([9, 5, 9], np.uint32)})
    check(twice, activations(3, 64, 1))
    one = np.zeros((1, 64), F32)
    one[0, 9] = 1
    assert_same(twice.matmul(one), twice.decode()[:, 9][None])


# ---------------------------------------------------------------- the page

PAGE = (SPEC / "products.md").read_text()


def example(name: str) -> tuple[list[bytes], dict[str, Floats], list[list[str]]]:
    """Components, the numbers that are given by name, and the rows of the table of a worked example."""
    text = PAGE.split(f"### {name}\n")[1].split("\n## ")[0].split("\n### ")[0]
    raw = [bytes.fromhex(found) for found in re.findall(r"```hex\n(.*?)```", text, re.S)]
    given = {
        name: np.array([F32(number) for number in found.split(",")])
        for name, found in re.findall(r"^    (\w+) += (.*)$", text, re.M)
    }
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return raw, given, table[2:]


def spelled(numbers: Any) -> str:
    """With the fewest digits that read back as the same float32."""
    return ", ".join(np.format_float_positional(n, trim="-") for n in np.atleast_1d(np.asarray(numbers, F32)))


def test_the_worked_example_of_whole_steps() -> None:
    raw, given, table = example("ct_int4_g4")
    packed = packed_of("ct_int4_g4", (1, 8), raw)
    of, y = slow.read(packed.layout, (1, 8), packed.unpack()), F32(0)
    assert of.steps.reshape(-1).tolist() == given["step"].tolist()
    for (block, *told), (first, last) in zip(table, slow.blocks(8, of.group), strict=True):
        x, steps, scale = given["x"][first:last], of.steps[0, 0, first:last], of.scale[0, 0, first]
        m = np.abs(x).max()
        a = m / F32(127)
        q = np.rint(x / a)
        dot = int(q @ steps)
        y = y + F32(dot) * (scale * a)
        assert told == [spelled(m), spelled(a), spelled(x / a), spelled(q), str(dot), spelled(scale * a), spelled(y)]
        assert int(block) == first // 4
    for found in (slow.product(packed, given["x"][None]), packed.matmul(given["x"][None])):
        assert found.tobytes() == given["y"].tobytes() == y.tobytes()
    assert f"would be {packed.decode().astype(F64) @ given['x'].astype(F64)}".replace("[", "").replace("]", "") in PAGE


def test_the_worked_example_of_numbers() -> None:
    raw, given, _ = example("f32")
    packed = packed_of("f32", (1, 4), raw)
    for found in (slow.product(packed, given["x"][None]), packed.matmul(given["x"][None])):
        assert found.tobytes() == given["y"].tobytes()


ACCURACY = (
    *("nvfp4", "mxfp4", "hif4", "q4_0", "q8_0", "ct_int4_g128", "tq2_0", "sherry", "ct_int8_row"),
    *("nvfp4_h64", "fp8_row", "bf16"),
)


def accuracy() -> str:
    """The table of the page."""
    lines = ["| layout | columns of a block | normal | Student's t | one large column | the layout itself |"]
    lines.append("|---|---|---|---|---|---|")
    for name in ACCURACY:
        rng = np.random.default_rng(7)
        weight = rng.normal(0, 0.02, (64, 4096)).astype(F32)
        packed = codecs.get(name).encode(weight)
        exact, each = packed.decode().astype(F64), []
        for kind in ("normal", "t", "large"):
            x = rng.standard_t(3, (8, 4096)) if kind == "t" else rng.normal(0, 1, (8, 4096))
            x[:, 100] *= 60 if kind == "large" else 1
            found, wanted = slow.product(packed, x.astype(F32)), x.astype(F32).astype(F64) @ exact.T
            each.append(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
            if kind == "normal":
                dense = x.astype(F32).astype(F64) @ weight.astype(F64).T
                own = np.linalg.norm(wanted - dense) / np.linalg.norm(dense)
        block = slow.group_of(packed.layout, packed.matrix) if name not in BY_NUMBERS else 0
        across = str(min(slow.BLOCK, block)) if block else "by numbers"
        lines.append(f"| `{name}` | {across} | " + " | ".join(f"{e:.1e}" for e in (*each, own)) + " |")
    return "\n".join(lines)


def test_the_page_tells_how_accurate_products_are() -> None:
    assert PAGE.split("<!-- accuracy -->\n")[1].split("\n<!-- /accuracy -->")[0] == accuracy()
