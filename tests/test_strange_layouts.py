"""Descriptions that are nearly those of formats, as a damaged or hostile file has them: decoded alike, or refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, fused, grids
from packfmt.codec import PackedTensor
from packfmt.errors import LayoutError
from packfmt.layout import Layout, dtype_of
from packfmt.placement import Arrays

Path = tuple[str | int, ...]
SHAPES = [(r, c) for r in (0, 1, 3, 4, 32, 64) for c in (0, 64, 128, 256, 512)]
NAMES = (
    *codecs.names(),
    *("mote_4", "tl1_64_16_32", "tl2_64_128_32_96", "arcquant_64", "mxfp4_out3", "nvfp4_ct_h64", "nvfp4_x4"),
    *("ct_int3_legacy_g32_asym", "ct_int4_row_asym", "e3m2b5_g32", "e2m1_tensor"),
)
TEXTS = (
    *("rows", "cols", "quads", "u1", "i1", "<f2", "<f4", "<u2", "codes", "scale", "affine", "base3", "levels", "low"),
    *("scaled", "table", "either", "times", "divides", "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu", "int4"),
    *("ufloat7_e4m3", "float6_e3m2b5", "global_scale", "zero", "perm", "columns"),
)
TARGETS = ("tq2_0", "sherry", "sherry_t32", "ptqtp2_b3", "i2_s", "mxfp4_pairs", "nvfp4_ct", "e2m1_g16", "q8_0")
MOST_BYTES = 1 << 20


def places(data: Any, path: Path = ()) -> Iterator[Path]:
    """Where a description could be changed: its numbers, texts and lists."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*path, key))
    elif isinstance(data, list):
        yield path
        for i, value in enumerate(data):
            yield from places(value, (*path, i))
    else:
        yield path


def changed(data: Any, draw: random.Random) -> Any:
    """The description with one thing changed."""
    *way, last = draw.choice(list(places(data)))
    holder = data
    for step in way:
        holder = holder[step]
    old = holder[last]
    if isinstance(old, int):
        holder[last] = draw.choice([0, 1, 2, 3, 5, old + 1, max(0, old - 1), 2 * old, 16, 64, 256, -1, 1 << 20])
    elif isinstance(old, str):
        holder[last] = draw.choice(TEXTS)
    else:
        holder[last] = old[: draw.randrange(len(old) + 1)] if draw.random() < 0.5 else old + old[:1]
    return data


def components(layout: Layout, shape: tuple[int, int], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    out = {s.name: np.zeros(5, dtype_of(s.dtype)) for s in layout.streams}
    for c in layout.fit(*shape).components:
        out[c.name] = rng.integers(0, 256, c.nbytes, np.uint8).view(dtype_of(c.dtype)).reshape(c.shape)
    return out


def decoded(how: Any, layout: Layout, shape: tuple[int, int], stored: Arrays) -> bytes | None:
    try:
        with np.errstate(all="ignore"):
            found: bytes = how(layout, shape, stored).tobytes()
        return found
    except LayoutError:
        return None


@pytest.mark.kernels
@given(
    name=st.sampled_from(NAMES),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    changes=st.integers(1, 3),
)
def test_a_changed_description_is_decoded_alike_or_refused(
    name: str, shape: tuple[int, int], seed: int, changes: int
) -> None:
    draw, data = random.Random(seed), copy.deepcopy(codecs.get(name).layout.to_json())
    for _ in range(changes):
        data = changed(data, draw)
    try:
        layout = Layout.from_json(data)
        if layout.nbytes(*shape) > MOST_BYTES:
            return
        stored = components(layout, shape, seed)
    except LayoutError:
        return
    assert decoded(fused.decode, layout, shape, stored) == decoded(grids.decode, layout, shape, stored)
    tensor = PackedTensor(layout, shape, stored)
    for target in TARGETS:
        try:
            tensor.repack(codecs.get(target).layout)
        except LayoutError as error:
            assert target in str(error) or name in str(error) or layout.name in str(error)
