"""Steps done on slices of rows: the same bytes as on the whole tensor, or the step says that it must see all of it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from packfmt import codecs, slices
from packfmt.codec import Array, PackedTensor, matrix
from packfmt.conversion import steps
from packfmt.errors import LayoutError
from packfmt.layout import DENSE
from packfmt.plan import Step, TensorInfo, _action
from tests.models import BF16
from tests.pieces import joined, same, some

NUMBERED = (
    *("bitnet_tile16", "bitnet_divide_tile16", "i2_s_tile16", "i2_s_arm_tile16"),
    *("arcquant_64", "ct_int4_g128", "ct_int3_row", "ct_int4_g32_asym", "e3m2_g32", "e4m3_row", "e4m3_tensor"),
    *("mote_4", "mxfp4_h32", "mxfp4_out8", "mxfp4_tile16", "nvfp4_h16", "nvfp4_out32", "nvfp4_tile16", "nvfp4_x4"),
    *("sherry_nibbles32", "sherry_words32", "tl1_256_128_32", "tl2_32_48_32_24"),
    *("cb4", "mxfp4_csr", "mxfp4_gaps", "ct_int4_g128_ell4", "cb3_ell2_replace"),
)
NAMES = (*codecs.names(), *NUMBERED)
ENCODERS = [(name, encoder) for name in NAMES for encoder in codecs.get(name).encoders]
ALL_ROWS = {  # formats whose bytes depend on all rows, whatever the encoder
    *("bitnet", "bitnet_divide", "i2_s", "i2_s_arm", "tl1_256_128_32"),  # the scale of ternary steps
    *("bitnet_tile16", "bitnet_divide_tile16", "i2_s_tile16", "i2_s_arm_tile16"),  # which each tile has a copy of
    *("fp8_tensor", "fp8_tensor_bf16", "e4m3_tensor"),  # a scale that no encoder takes a peak for
    *("arcquant_64", "mxfp4_out8", "nvfp4_out32", "ptq161"),  # which columns are the largest
    *("mote_4", "nvfp4_x4"),  # as many scales as experts
    *("spqr_merged_add", "spqr_merged_replace", "spqr_tiles_add", "spqr_tiles_replace"),  # where the largest are
    *("mxfp4_csr", "mxfp4_gaps"),
    "nvfp4_h16",  # the peak of the rotated weight
    "sherry_s16_perm",  # a permutation of the columns; always the same one, which nothing says
}
ONE_SCALE = ("tensor",)  # encoders of any format that choose one scale for all rows
CAUTIOUS = {("sherry_s16_perm", "mean"), ("sherry_s16_perm", "row")}  # would be the same on slices
KINDS = ("normal", "ternary", "sparse")


def shape_of(name: str) -> tuple[int, int]:
    """Of some units, with a last one that is not full where a layout allows."""
    block = codecs.get(name).layout.block
    cols = 48 if name.startswith("tl2") else max(256, block["cols"])
    fewest = {"fp8_block": 400, "nvfp4_swizzled": 384, "tl1_256_128_32": 512}.get(name.removesuffix("_bf16"), 70)
    if name == "fp8_block_e8m0":
        fewest = 400
    return block["rows"] * -(-fewest // block["rows"]), cols


@lru_cache(maxsize=64)
def weight(kind: str, shape: tuple[int, int]) -> Array:
    """bfloat16: rows of different size, with zeros among them; or steps of -1, 0 and 1; or 3 of each 4 of these."""
    rng, (rows, cols) = np.random.default_rng(KINDS.index(kind)), shape
    sizes = np.ldexp(1.0, rng.integers(-4, 4, (rows, 1)))
    if kind == "normal":
        found = rng.standard_normal(shape) * sizes
        found[::5, : cols // 2] = 0
    elif kind == "ternary":
        found = rng.integers(-1, 2, shape) * 0.5
        found[-1] = 0
    else:
        quads = rng.choice([-1.0, 1.0], (rows, cols // 4, 4))
        np.put_along_axis(quads, rng.integers(0, 4, (rows, cols // 4, 1)), 0, -1)
        found = quads.reshape(shape) * sizes
    return found.astype(BF16)


def dense(values: Array) -> PackedTensor:
    return PackedTensor(DENSE["bf16"], values.shape, {"values": values}, "bfloat16")


def step_of(source: PackedTensor, name: str, encoder: str = "", lossless: bool = False) -> Step:
    """What a plan would do."""
    layout = DENSE["f64"] if name == "f64" else codecs.get(name).layout
    info = TensorInfo("weight", source.shape, source.dtype, source.layout, "", None, 0)  # type: ignore[arg-type]
    action = _action(info, layout, bool(encoder))
    if action in ("quantise", "requantise", "cast") and name != "f64":
        encoder = encoder or next(iter(codecs.get(name).encoders))
    return Step("weight", source.shape, source.dtype, source.layout, layout, action, "", encoder, "", lossless)


def peak_for(step: Step, source: PackedTensor) -> float | None:
    shared = bool(step.encoder) and step.encoder in codecs.get(step.layout.name).shared
    return steps.peak_of(source) if shared else None


def in_slices(step: Step, source: PackedTensor, each: int, importance: Array | None = None) -> PackedTensor:
    """The step on so many rows at a time, put together."""
    parts, rows = [], source.matrix[0]
    for start in range(0, rows, each):
        stop = min(rows, start + each)
        costs = importance[start:stop] if importance is not None and importance.ndim > 1 else importance
        parts.append((start, steps.apply(step, some(source, start, stop), costs, peak_for(step, source))))
    return joined(step.layout, source.matrix, parts)


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize(("name", "encoder"), ENCODERS)
def test_rows_encoded_apart_are_those_of_the_whole(name: str, encoder: str) -> None:
    shape = shape_of(name)
    for kind in KINDS[:2]:
        source = dense(weight(kind, shape))
        step = step_of(source, name, encoder)
        unit = steps.rows_at_once(step)
        rng = np.random.default_rng(0)
        costs = [rng.random(shape[1], np.float32), rng.random(shape, np.float32)]
        for importance in [None, *(costs if encoder in codecs.get(name).weighted else [])]:
            if unit:
                assert unit < shape[0], "nothing would be cut"
                whole = steps.apply(step, source, importance)
                for units in 1, 3:
                    assert same(in_slices(step, source, units * unit, importance), whole), (kind, unit, units)


def test_which_formats_and_encoders_need_all_rows() -> None:
    found = {
        pair for pair in ENCODERS if not steps.rows_at_once(step_of(dense(weight("normal", shape_of(pair[0]))), *pair))
    }
    assert found == {(name, encoder) for name, encoder in ENCODERS if name in ALL_ROWS or encoder in ONE_SCALE}


def test_which_encoders_look_at_more_rows_than_their_layout_says() -> None:
    more = {}
    for name, encoder in ENCODERS:
        step = step_of(dense(weight("normal", shape_of(name))), name, encoder)
        least = slices.unit(step.layout, step.shape)
        if (unit := steps.rows_at_once(step)) and unit != least:
            more[name, encoder] = (least, unit)
    assert more == {(name, "tiles"): (1, 16) for name in ("nvfp4", "nvfp4_ct", "nvfp4_modelopt")}


@pytest.mark.parametrize(("name", "encoder"), [p for p in ENCODERS if p[0] in ALL_ROWS or p[1] in ONE_SCALE])
def test_what_needs_all_rows_is_another_without_them(name: str, encoder: str) -> None:
    """Nothing is held whole in memory for no reason."""
    source = dense(weight("normal", shape_of(name)))
    step = step_of(source, name, encoder)
    unit = slices.unit(step.layout, step.shape)
    if not unit:
        assert name in ("bitnet", "bitnet_divide", "mote_4", "nvfp4_x4") or codecs.get(name).layout.sparse
        return
    alike = same(in_slices(step, source, unit), steps.apply(step, source))
    assert alike == ((name, encoder) in CAUTIOUS)


# ---------------------------------------------------------------- from one packed format to another

TERNARY = ("tq1_0", "tq2_0", "i2_s", "sherry", "sherry_row", "sherry_words32", "ptqtp1", "bitnet")
MX = ("mxfp4", "mxfp4_tile16", "mxfp8_e4m3")
NVFP4 = ("nvfp4", "nvfp4_plain", "nvfp4_ct", "nvfp4_swizzled", "nvfp4_rows")
INTEGERS = ("q4_0", "q8_0", "ct_int4_g128", "ct_int4_g32_asym", "fp8_block", "fp8_tensor")
OTHERS = ("bf16", "f16", "f64")
FORMATS = (*TERNARY, *MX, *NVFP4, *INTEGERS)
SHAPE = (384, 256)


@lru_cache(maxsize=256)
def packed(name: str, kind: str) -> PackedTensor:
    return codecs.get(name).encode(weight(kind, SHAPE))


def outcome(do: object, *arguments: object) -> PackedTensor | str:
    """What is made, or that it is refused."""
    try:
        return do(*arguments)  # type: ignore[no-any-return, operator]
    except LayoutError:
        return "refused"


@pytest.mark.parametrize("before", FORMATS)
def test_rows_of_packed_tensors_become_those_of_the_whole(before: str) -> None:
    for after in (*FORMATS, *OTHERS):
        for kind in KINDS:
            source = packed(before, kind)
            step = step_of(source, after)
            if step.action == "requantise" and kind == "ternary":
                step = replace(step, lossless=True)
            unit = steps.rows_at_once(step)
            if not unit:
                continue
            assert unit < SHAPE[0]
            whole = outcome(steps.apply, step, source)
            apart = outcome(in_slices, step, source, unit * max(1, 160 // unit))
            if isinstance(whole, str) or isinstance(apart, str):
                assert whole == apart, (after, kind, step.action)
            else:
                assert same(apart, whole), (after, kind, step.action)


def test_every_action_is_done_by_rows_somewhere() -> None:
    found: dict[str, set[bool]] = {}
    for before in (*FORMATS, "bf16"):
        source = dense(weight("sparse", SHAPE)) if before == "bf16" else packed(before, "sparse")
        for after in (*FORMATS, *OTHERS):
            step = step_of(source, after)
            found.setdefault(step.action, set()).add(steps.rows_at_once(step) > 0)
    some_do, all_do = {True, False}, {True}
    assert found == {
        **dict.fromkeys(("keep", "repack", "requantise", "decode", "quantise"), some_do),
        **dict.fromkeys(("rescale", "cast"), all_do),
    }


# ---------------------------------------------------------------- how steps are cut


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_rows", "sherry_t32", "q8_0", "i2_s"])
@pytest.mark.parametrize("room", [1, 5_000, 60_000, 1 << 30])
@pytest.mark.parametrize(("start", "end"), [(0, 384), (128, 384), (32, 64)])
def test_slices_cover_the_rows_once_within_the_room(name: str, room: int, start: int, end: int) -> None:
    step = step_of(dense(weight("normal", SHAPE)), name)
    found, unit = steps.cut(3, step, room, start, end), steps.rows_at_once(step)
    if not unit or (room > step.working_set and (start, end) == (0, 384)):
        (whole,) = found
        assert (whole.start, whole.stop, whole.whole, whole.rows) == (0, 384, True, None)
        assert (whole.held, whole.nbytes) == (step.working_set, step.before.nbytes(*SHAPE))
        return
    assert [s.start for s in found] + [end] == [start] + [s.stop for s in found]
    for s in found:
        rows = s.stop - s.start
        assert (s.at, s.whole, s.rows) == (3, False, (s.start, s.stop))
        assert s.start % unit == 0
        assert s.nbytes == step.before.nbytes(rows, SHAPE[1])
        assert s.held >= replace(step, shape=(rows, SHAPE[1])).working_set
        assert s.held <= room or rows <= unit
    assert steps.least_held(step) == replace(step, shape=(unit, SHAPE[1])).working_set


@pytest.mark.parametrize("shape", [(), (0,), (64,), (1, 64), (0, 64)])
def test_a_tensor_of_one_row_or_none_is_not_cut(shape: tuple[int, ...]) -> None:
    values = np.zeros(DENSE["bf16"].shapes(*matrix(shape))["values"], BF16)
    step = step_of(PackedTensor(DENSE["bf16"], shape, {"values": values}, "bfloat16"), "f32")
    for room in 1, 1 << 20:
        (found,) = steps.cut(0, step, room)
        assert (found.whole, found.start, found.stop) == (True, 0, matrix(shape)[0])


def test_the_peak_is_the_largest_magnitude_as_float32_and_0_if_a_number_is_not_finite() -> None:
    for dtype in BF16, np.float16, np.float32, np.float64:
        for numbers, peak in (
            ([1, -3, 2], 3.0),
            ([0.0, 0.0], 0.0),
            ([0.0, -0.0], 0.0),
            ([1, np.nan], 0.0),
            ([-np.inf, 1], 0.0),
        ):
            name = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}[np.dtype(dtype).name]
            values = np.array([numbers], dtype)
            found = steps.peak_of(PackedTensor(DENSE[name], values.shape, {"values": values}))
            assert found == peak and not np.signbit(found)
