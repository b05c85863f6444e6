"""Encoders over vectors: the same bytes as the plain loops, the generic packer and NumPy's casts, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packfmt import codecs, minifloat, placement
from packfmt.errors import LayoutError
from packfmt.kernels import fp4, quantize, scaled, simd, tiles

F32 = np.float32
Floats = npt.NDArray[np.float32]
SCALED = ("q8_0", "q4_0")  # with float16 scales
EXPONENTS = {"gaussian": (-6, -6), "blocks": (-40, 10), "tiny": (-149, -120), "halves": (-30, -10), "near": (-3, 3)}
kinds = pytest.mark.parametrize("kind", EXPONENTS)
vectors = pytest.mark.skipif(simd.INTERPRETED, reason="vectors are compiled, and Numba compiles nothing here")
pytestmark = pytest.mark.kernels


def weights(kind: str, rows: int = 37, cols: int = 352) -> Floats:
    """Blocks of one exponent each, bfloat16 in every other row, zeros of both signs, several peaks of both signs."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    least, most = EXPONENTS[kind]
    found = np.ldexp(rng.standard_normal((rows, cols)), rng.integers(least, most + 1, (rows, cols // 32)).repeat(32, 1))
    found[rng.random(found.shape) < 0.03] = -0.0
    weight = found.astype(F32)
    weight[::2] = weight[::2].astype(ml_dtypes.bfloat16)
    weight[3] = np.sign(weight[3]) * np.ldexp(F32(1), least)
    weight[5, :32], weight[5, 32:64] = 0.0, -0.0
    return weight


def packed(name: str, parts: dict[str, Any], shape: tuple[int, int]) -> bytes:
    (blocks,) = placement.pack(codecs.get(name).layout, shape, parts).values()
    return blocks.tobytes()


def written(found: dict[str, Any] | None) -> bytes:
    assert found is not None
    return found["blocks"].tobytes()  # type: ignore[no-any-return]


# ---------------------------------------------------------------- blocks of 32


@vectors
@kinds
@pytest.mark.parametrize("name", quantize.FORMS)
def test_blocks_are_what_the_plain_loop_chooses(name: str, kind: str) -> None:
    weight, form = weights(kind), quantize.FORMS[name]
    parts = getattr(quantize, name)(weight)
    codes, steps = quantize._blocks(form.plain, weight, quantize.BLOCK, form.dtype)
    assert parts["codes"].dtype == codes.dtype and parts["codes"].tobytes() == codes.tobytes()
    assert parts["scale"].tobytes() == steps.astype(parts["scale"].dtype).tobytes()
    assert written(quantize.records(weight, name)) == packed(name, parts, weight.shape)


@vectors
@kinds
def test_the_best_mxfp4_blocks_are_their_packed_parts(kind: str) -> None:
    weight = weights(kind)
    assert written(fp4.mxfp4_records(weight)) == packed("mxfp4", fp4.mxfp4(weight), weight.shape)


@vectors
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_of_65520_is_too_large_and_one_below_is_not(name: str) -> None:
    """The first magnitude of which float16 has no scale, and the one before."""
    divisor = {"q8_0": 127, "q4_0": 8}[name]
    first = F32(65520 * divisor)
    weight = np.zeros((1, 64), F32)
    for sign in (-1, 1):
        weight[0, 40] = sign * np.nextafter(first, F32(0))
        parts = getattr(quantize, name)(weight)
        assert abs(parts["scale"][0, 1]) == 65504
        assert written(quantize.records(weight, name)) == packed(name, parts, weight.shape)
        weight[0, 40] = sign * first
        assert quantize.records(weight, name) is None
        with pytest.raises(LayoutError, match="1 of 2 scales overflow float16"):
            getattr(quantize, name)(weight)


@vectors
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 17, 31, 511])
def test_what_is_no_number_is_left_to_the_slower_way(bad: float, at: int) -> None:
    weight = np.ones((2, 256), F32)
    weight.flat[at] = bad
    assert fp4.mxfp4_records(weight) is None
    assert all(quantize.records(weight, name) is None for name in quantize.FORMS)
    assert quantize.narrowed(weight, np.dtype(np.float16)) is None


def test_the_exponents_of_mxfp4_are_rounded_logarithms() -> None:
    """About every power of two, where the float32 logarithm may round up to it."""
    powers = np.ldexp(F32(1), np.arange(-126, 128)).astype(F32).view(np.uint32)
    bits = (powers[:, None] + np.arange(-70, 3)).astype(np.uint32).reshape(-1, 1)
    weight = np.zeros((len(bits), 32), F32)
    weight[:, 7:8] = -bits.view(F32)
    logarithms = np.log2(bits.view(F32).astype(np.float64)).astype(F32)
    wanted = np.maximum(np.floor(logarithms) + 125, 0).astype(np.uint8)
    assert quantize.mxfp4(weight)["scale"].tobytes() == wanted.tobytes()


# ---------------------------------------------------------------- casts


@vectors
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_casts_are_numpy_s(dtype: Any) -> None:
    """All upper halves of a float32, with lower halves about each tie."""
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    weight = (np.arange(1 << 16, dtype=np.uint32)[:, None] << np.uint32(16) | low).view(F32)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = weight.astype(dtype)
    rows = np.isfinite(wanted.astype(F32)).all(1)
    found = quantize.narrowed(np.ascontiguousarray(weight[rows]), np.dtype(dtype))
    assert rows.sum() > 30000 and found is not None
    assert found["values"].tobytes() == wanted[rows].tobytes()


@vectors
@pytest.mark.parametrize("dtype, first", [(np.float16, 0x477FF000), (ml_dtypes.bfloat16, 0x7F7F8000)])
def test_casts_that_overflow_are_left_to_the_slower_way(dtype: Any, first: int) -> None:
    weight = np.zeros((1, 37), F32)
    for at in (0, 15, 20, 36):
        for bits in (first, first - 1):
            weight[0, at] = -np.array(bits, np.uint32).view(F32)
            found = quantize.narrowed(weight, np.dtype(dtype))
            if bits == first:
                assert found is None
            else:
                assert found is not None and found["values"].tobytes() == weight.astype(dtype).tobytes()
        weight[0, at] = 0


@given(st.integers(1, 70), st.integers(0, 3))
def test_casts_of_any_length(cols: int, rows: int) -> None:
    weight = np.random.default_rng(cols).standard_normal((rows, cols)).astype(F32)
    found = quantize.cast(weight, "f16", np.dtype(np.float16), "bf16")["values"]
    assert found.tobytes() == weight.astype(np.float16).tobytes()


# ---------------------------------------------------------------- one answer everywhere


def everything() -> bytes:
    """What all encoders that have vectors give."""
    found: list[dict[str, Any]] = []
    calls: list[Callable[[Floats], dict[str, Any]]] = [quantize.q8_0, quantize.q4_0, quantize.mxfp4]
    calls += [lambda w, r=rule: fp4.mxfp4(w, r) for rule in fp4.MX_RULES]
    calls += [lambda w, r=rule: fp4.nvfp4(w, r) for rule in fp4.NV_RULES]
    calls += [lambda w, r=rule: scaled.mx(w, minifloat.numbers("float8_e4m3fn"), r) for rule in ("best", "ocp")]
    calls += [
        lambda w: scaled.mx(w, minifloat.numbers("int8_f6"), "best", np.arange(w.size, dtype=F32).reshape(w.shape))
    ]
    calls += [
        scaled.nvint4,
        scaled.if4,
        scaled.fp4_ue5m3,
        lambda w: tiles.fp8(w, (1, 0)),
        lambda w: tiles.fp8(w, (9, 50)),
    ]
    calls += [lambda w: quantize.cast(w, "f16", np.dtype(np.float16), "bf16")]
    for kind in EXPONENTS:
        weight = weights(kind, 11, 320)
        found += [call(weight) for call in calls]
    return b"".join(part.tobytes() for parts in found for _, part in sorted(parts.items()))


HASH = "import hashlib, test_vector_encoders as t; print(hashlib.sha256(t.everything()).hexdigest())"


@pytest.mark.parametrize(
    "setting",
    [*({"PACKFMT_SIMD": level} for level in simd.LEVELS), {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_DISABLE_JIT": "1"}],
)
def test_every_machine_gives_the_same_bytes(setting: dict[str, str]) -> None:
    level = setting.get("PACKFMT_SIMD", simd.LEVEL)
    if level != simd.LEVEL and not simd.LEVELS[level] <= simd.FEATURES:
        pytest.skip(f"this machine has no {level}")
    here = {name: value for name, value in os.environ.items() if name not in ("PACKFMT_SIMD", "NUMBA_DISABLE_JIT")}
    path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    answers = {
        subprocess.run(
            [sys.executable, "-c", HASH],
            env=here | {"PYTHONPATH": path} | more,
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        for more in ({}, setting)
    }
    assert len(answers) == 1 and len(answers.pop()) == 65
