"""Products by looking up: the bits of the canonical product, in both forms, on every level of instructions.

The bytes are those that a layout's description says: the generic packer writes them, and the slow product reads the
description. As in `test_simd`, a level is tested in a child, which is this file as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from packfmt import placement
from packfmt.codec import PackedTensor
from packfmt.codecs import sherry
from packfmt.errors import LayoutError
from packfmt.kernels import lookup_products, simd, team, threads
from packfmt.kernels.activations import arrange
from packfmt.kernels.lookup_products import Product, Tiles, Tiling
from packfmt.layout import WORD, Axis, Codes, Component, Digit, Layout, Values, dtype_of, grid, rows
from tests import slow_products

ROOT = Path(__file__).parents[1]
F32 = np.float32
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

pytestmark = pytest.mark.skipif(simd.INTERPRETED, reason="NUMBA_DISABLE_JIT is set, and these kernels are vectors only")

DTYPES = {"f32": "<f4", "f16": "<f2", "bf16": "bfloat16"}
VALUES = sherry.VALUES
DENSE = tuple(tuple(1 - 2 * (code >> i & 1) for i in range(4)) if code < 16 else VALUES[code] for code in range(32))
TILINGS = [
    Tiling(form, *rest)
    for form in ("words", "nibbles")
    for rest in ((256, "f16", False), (128, "bf16", False), (64, "f32", False), (256, "f32", True))
]
every = pytest.mark.parametrize("how", TILINGS, ids=lambda how: f"{how.form}-{how.block}-{how.scale}")
both = pytest.mark.parametrize("form", ["words", "nibbles"])


def layout(how: Tiling, values: tuple[tuple[int, ...], ...] = VALUES) -> Layout:
    """What the tiles of `lookup_products` are."""
    quads = partial(Digit, "quads")
    if how.form == "words":
        cell = Codes("codes", 5, (), (quads(1, 16),), "<u2")
        codes = [Component("codes", (rows(32), quads(16), Digit(WORD), rows(1, 32)), (cell,))]
    else:
        bytes_ = (rows(1, 16), rows(16, 2))
        low = Codes("codes", 4, (quads(2, 4), *bytes_), (quads(1, 2),))
        high = Codes("codes", 1, bytes_, (quads(1, 8),), low=4)
        codes = [Component(n, (rows(32), quads(8)), (m,)) for n, m in (("codes", low), ("codes_high", high))]
    over = (rows(32), rows(1, 32)) if how.per_row else (rows(32), quads(how.block // 4), rows(1, 32))
    scale = Component("scale", over, (Values("scale", DTYPES[how.scale]),))
    axes = (Axis("rows", "rows", pad=32), Axis("quads", "cols", 4))
    numbers = grid("quads", stride=1, values=values)
    return Layout(f"{how.form}_{how.block}_{how.scale}", (*codes, scale), numbers, axes)


def packed(
    how: Tiling, count: int, cols: int, seed: int, values: tuple[tuple[int, ...], ...] = VALUES, **parts: Array
) -> PackedTensor:
    """A weight of random codes, and of scales of both signs."""
    random, description = np.random.default_rng(seed), layout(how, values)
    shapes = {name: part.shape for name, part in description.fit(count, cols).parts.items()}
    made = {"codes": random.integers(0, 32, shapes["codes"]).astype(np.uint8)}
    made["scale"] = random.standard_normal(shapes["scale"]).astype(F32)
    made = {name: parts.get(name, part) for name, part in made.items()}
    made["scale"] = made["scale"].astype(dtype_of(DTYPES[how.scale]))
    return PackedTensor(description, (count, cols), placement.pack(description, (count, cols), made))


def tiles(of: PackedTensor, how: Tiling) -> Tiles:
    flat = {name: np.ascontiguousarray(c).view(np.uint8).reshape(-1) for name, c in of.components.items()}
    table = (np.array(of.layout.grid["values"]) + 1).astype(np.uint8).reshape(-1)
    nothing = np.empty(0, np.uint8)
    groups = -(-of.matrix[0] // 32)
    return Tiles(how, flat["codes"], flat.get("codes_high", nothing), flat["scale"], table, groups, of.matrix[1])


def ready(of: PackedTensor, how: Tiling) -> Product:
    return Product(tiles(of, how), arrange(of.matrix[1], how.block))


def product(of: PackedTensor, how: Tiling, x: Floats) -> Floats:
    out = np.full((len(x), -(-of.matrix[0] // 32) * 32), 7, F32)
    ready(of, how)(x, out)
    return out[:, : of.matrix[0]]


def bits(numbers: Floats) -> bytes:
    """NaN is NaN, whatever its bits."""
    assert numbers.dtype == F32
    return np.where(np.isnan(numbers), F32(np.nan), numbers).tobytes()


def cases(how: Tiling) -> Iterator[tuple[PackedTensor, Floats]]:
    """Weights and activations: groups that are left over, part of one, blocks that differ in size, extremes."""
    cols = 640 if how.per_row else 3 * how.block
    for seed, (count, batch) in enumerate([(32, 1), (96, 2), (40, 7), (129, 1), (320, 2)]):
        x = np.random.default_rng(seed + 50).standard_normal((batch, cols)).astype(F32)
        yield packed(how, count, cols, seed), x
    yield extreme(how, cols)
    # all as large as can be, and of one sign
    codes = np.random.default_rng(1).integers(0, 32, (1, cols // 4)).astype(np.uint8)
    x = np.where(np.array(VALUES)[codes].reshape(1, cols) < 0, -1, 1).astype(F32)
    yield packed(how, 32, cols, 0, codes=np.repeat(codes, 32, 0)), np.concatenate([x, -x])


def extreme(how: Tiling, cols: int) -> tuple[PackedTensor, Floats]:
    """Scales and activations that are no numbers, infinite, subnormal, zero."""
    weight = packed(how, 64, cols, 9)
    numbers = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 3e38, 6e-8, 65504]
    with np.errstate(all="ignore"):
        scale = np.resize(np.array(numbers), weight.unpack()["scale"].shape).astype(F32)
        weight = packed(how, 64, cols, 9, scale=scale)
    x = np.random.default_rng(3).standard_normal((6, cols)).astype(F32)
    x[0, 5], x[1, 5], x[2, : how.block], x[3] = np.nan, -np.inf, 0, 1e-44
    x[4] *= F32(1e37)
    x[5] = 0
    return weight, x


def wrong(how: Tiling) -> list[int]:
    """Which cases are not the slow product's."""
    pairs = ((product(w, how, x), slow_products.product(w, x)) for w, x in cases(how))
    return [i for i, (found, right) in enumerate(pairs) if bits(found) != bits(right)]


# ---------------------------------------------------------------- the tests


@pytest.mark.kernels
@every
def test_the_bits_are_those_of_the_slow_product(how: Tiling) -> None:
    assert wrong(how) == []


@every
def test_the_bytes_are_what_the_description_says(how: Tiling) -> None:
    """Row 21 of the second group, quad 13: where its five bits lie, by the words of `Tiles`."""
    cols, row, quad = 256, 21, 13
    codes = np.zeros((64, cols // 4), np.uint8)
    codes[32 + row, quad] = 0b10110
    found = tiles(packed(how, 64, cols, 0, codes=codes), how)
    assert lookup_products.fits(how, found.table)
    stored = np.zeros_like(found.codes)
    group = cols // 4 // 16 * 320 if how.form == "words" else cols // 4 // 8 * 128
    if how.form == "words":
        word, bit = divmod(5 * quad, 16)
        stored.view("<u2")[group // 2 + 32 * word + row] = 0b10110 << bit & 0xFFFF
        stored.view("<u2")[group // 2 + 32 * (word + 1) + row] = 0b10110 >> 16 - bit
    else:
        byte = 2 * row - 31
        stored[group + quad // 8 * 128 + quad % 8 // 2 * 32 + byte] = 0b0110 << 4 * (quad % 2)
        signs = np.zeros_like(found.signs)
        signs[group // 4 + quad // 8 * 32 + byte] = 1 << quad % 8
        assert found.signs.tobytes() == signs.tobytes()
    assert found.codes.tobytes() == stored.tobytes()


@pytest.mark.kernels
@both
def test_every_sum_of_three_is_looked_up_right(form: str) -> None:
    """All sums from -381 to 381, by all 32 codes; a quad at each place of a piece."""
    how = Tiling(form, 64, "f32", False)
    codes = np.repeat(np.arange(32, dtype=np.uint8)[:, None], 16, 1)
    weight = packed(how, 32, 64, 0, codes=codes, scale=np.ones((32, 1), F32))
    size = np.arange(-381, 382)
    a = np.clip(size, -127, 127)
    b = np.clip(size - a, -127, 127)
    three = np.stack([a, b, size - a - b], 1)
    for zero in range(4):
        x, rows = np.zeros((len(size), 64), F32), np.arange(len(size))
        place = 4 * (rows % 16)
        x[rows, (place + 4) % 64] = 127  # so that a step is 1
        for i, lane in enumerate(lane for lane in range(4) if lane != zero):
            x[rows, place + lane] = three[:, i]
        quads = x.reshape(len(size), 16, 4).sum(1)
        assert product(weight, how, x).tobytes() == (quads @ np.array(VALUES).T).astype(F32).tobytes()


@pytest.mark.kernels
def test_words_look_up_any_quads_of_trits() -> None:
    """Also quads without a zero, which are no one's negative."""
    how = Tiling("words", 256, "f16", False)
    weight = packed(how, 32, 512, 4, DENSE)
    x = np.where(np.arange(512) % 3, 1, -1).astype(F32)[None]
    assert lookup_products.fits(how, tiles(weight, how).table)
    assert bits(product(weight, how, x)) == bits(slow_products.product(weight, x))
    codes = np.full((32, 128), 5, np.uint8)  # + - + - against activations like it: 4 * 127 in every quad
    weight = packed(how, 32, 512, 4, DENSE, codes=codes)
    x = np.resize(np.array(DENSE[5], F32), (1, 512))
    assert bits(product(weight, how, x)) == bits(slow_products.product(weight, x))


@both
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_nothing(form: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Tiling(form, 256, "f16", False)
    weight = packed(how, 1000, 512, 5)
    x = np.random.default_rng(6).standard_normal((3, 512)).astype(F32)
    monkeypatch.setattr(lookup_products, "LEAST", 1)
    monkeypatch.setattr(lookup_products, "SHARE", 1)
    with threads.limit(count):
        found = product(weight, how, x)
    assert bits(found) == bits(slow_products.product(weight, x))


@both
def test_callers_at_the_same_time_do_not_meet(form: str) -> None:
    how = Tiling(form, 256, "f16", False)
    weight = packed(how, 1000, 512, 5)
    multiply, rows = ready(weight, how), np.random.default_rng(6).standard_normal((40, 1, 512)).astype(F32)

    def one(x: Floats) -> bytes:
        out = np.empty((1, 1024), F32)
        multiply(x, out)
        return bits(out[:, :1000])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, rows))
    assert found == [bits(y[None]) for y in slow_products.product(weight, rows[:, 0])]


@both
def test_columns_may_be_stored_in_another_order_and_count_another_unit(form: str) -> None:
    how = Tiling(form, 256, "f16", False)
    weight = packed(how, 64, 512, 5)
    order = np.random.default_rng(1).permutation(512).astype(np.int32)
    x, out = np.random.default_rng(6).standard_normal((2, 512)).astype(F32), np.empty((2, 64), F32)
    Product(tiles(weight, how), arrange(512, 256, order), 0.25)(x, out)
    assert bits(out) == bits(slow_products.product(weight, x[:, order]) / F32(4))


@both
def test_many_rows_of_activations_take_no_more_memory_than_a_few(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Tiling(form, 256, "f16", False)
    weight = packed(how, 40, 512, 5)
    x = np.random.default_rng(6).standard_normal((7, 512)).astype(F32)
    whole = product(weight, how, x)
    monkeypatch.setattr(team, "_jobs", {})
    monkeypatch.setattr(lookup_products, "TABLES", 2 * 128 * lookup_products.FORMS[form].table)  # of two rows
    with threads.limit(1):
        assert bits(product(weight, how, x)) == bits(whole) == bits(slow_products.product(weight, x))
    (jobs,) = team._jobs.values()
    assert jobs.take(1, 1).size == lookup_products.TABLES


@both
def test_arrays_that_do_not_belong_together_are_refused(form: str) -> None:
    how = Tiling(form, 256, "f16", False)
    of, order = tiles(packed(how, 64, 512, 7), how), arrange(512, 256)
    for name in ("codes", "scale", "table"):
        with pytest.raises(LayoutError, match=f"{name} is uint8"):
            Product(of._replace(**{name: getattr(of, name)[1:]}), order)
    with pytest.raises(LayoutError, match="signs is uint8"):
        Product(of._replace(signs=np.zeros(len(of.signs) + 1, np.uint8)), order)
    with pytest.raises(LayoutError, match="520 columns"):
        Product(of._replace(cols=520), order)
    for other in (arrange(256, 256), arrange(512, 128)):
        with pytest.raises(LayoutError, match="order of"):
            Product(of, other)
    multiply, x, out = Product(of, order), np.ones((2, 512), F32), np.empty((2, 64), F32)
    multiply(x, out)
    for wrong_x, wrong_out in (
        (x[:, :256], out), (x.astype(np.float64), out), (x[:, ::-1], out), (x[0], out), (x, out[:1]), (x, out[:, :32]),
    ):  # fmt: skip
        with pytest.raises(LayoutError, match="is float"):
            multiply(wrong_x, wrong_out)
    out.flags.writeable = False
    with pytest.raises(LayoutError, match="may not be written"):
        multiply(x, out)


@both
def test_there_may_be_nothing_to_multiply(form: str) -> None:
    how = Tiling(form, 256, "f16", False)
    of = tiles(packed(how, 32, 256, 0), how)
    nothing, out = np.empty(0, np.uint8), np.full((2, 32), 7, F32)
    no_rows = of._replace(codes=nothing, signs=nothing, scale=nothing, groups=0)
    Product(no_rows, arrange(256, 256))(np.ones((2, 256), F32), out[:, :0])
    Product(of, arrange(256, 256))(np.ones((0, 256), F32), out[:0])
    assert (out == 7).all()
    Product(no_rows._replace(groups=1, cols=0), arrange(0, 256))(np.ones((2, 0), F32), out)
    assert out.tobytes() == bytes(out.nbytes)


def test_what_has_no_kernel_is_refused() -> None:
    table = (np.array(VALUES) + 1).astype(np.uint8).reshape(-1)
    how = Tiling("nibbles", 256, "f16", False)
    assert lookup_products.fits(how, table)
    assert not lookup_products.fits(how, (np.array(DENSE) + 1).astype(np.uint8).reshape(-1))
    assert not lookup_products.fits(how, table[:64])
    two = table.copy()
    two[3], two[67] = 3, 255
    same = table.copy()
    same[64:] = table[:64]
    for form in ("words", "nibbles"):
        assert not lookup_products.fits(how._replace(form=form), two)
        assert lookup_products.fits(how._replace(form=form), same) == (form == "words")
        for block in (0, 48, 512):
            assert not lookup_products.fits(how._replace(form=form, block=block), table)
    assert not lookup_products.fits(how._replace(form="bytes"), table)
    assert not lookup_products.fits(how._replace(scale="e8m0"), table)
    nothing = np.empty(0, np.uint8)
    with pytest.raises(LayoutError, match="no kernel is made for this tiling"):
        Product(Tiles(how._replace(scale="e8m0"), nothing, nothing, nothing, table, 0, 256), arrange(256, 256))


# ---------------------------------------------------------------- other levels


LEVELS = ["avx512", "avx2", "portable", "haswell", "nehalem"]
FEW = [how for how in TILINGS if how.block == 256]  # for it is compiling that takes time


@cache
def reported(level: str) -> str:
    """What a child of this level, or processor, prints."""
    named = level not in simd.LEVELS
    if not named and not simd.LEVELS[level] <= simd.FEATURES:
        pytest.skip(f"this processor has no {', '.join(sorted(simd.LEVELS[level] - simd.FEATURES))}")
    if named and "sse2" not in simd.FEATURES:
        pytest.skip("this is no x86 processor")
    if level == "haswell" and not simd.LEVELS["avx2"] <= simd.FEATURES:
        pytest.skip("this processor has no avx2")
    environment = {k: v for k, v in os.environ.items() if k != "PACKFMT_SIMD"} | {"PYTHONPATH": str(ROOT)}
    environment |= {"NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": ""} if named else {"PACKFMT_SIMD": level}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_same_bits(level: str) -> None:
    expected = {"haswell": "avx2", "nehalem": "portable"}.get(level, level)
    lines = [f"{how.form}-{how.block}-{how.scale}: []" for how in FEW]
    assert reported(level).splitlines() == [f"level: {expected}", *lines]


def main() -> None:
    print("level:", simd.LEVEL)
    for how in FEW:
        print(f"{how.form}-{how.block}-{how.scale}: {wrong(how)}", flush=True)


if __name__ == "__main__":
    main()
