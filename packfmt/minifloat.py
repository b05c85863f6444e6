"""Number formats of three to eight bits, by name: what number each code is.

    float4_e2m1fn, float8_e8m0fnu ...   ml_dtypes' own names and numbers
    float<n>_e<E>m<M>b<bias>            sign, E bits of exponent, M of mantissa; every code is a number
    ufloat8_e5m3                        the same without a sign, bias 15; 255 is NaN (scales of AMD's FP4)
    ufloat8_e6m2                        no sign, no subnormals and no zero, bias 48; 255 is NaN (scales of HiF4)
    ufloat7_e4m3                        bit 7 is ignored, bias 7; 127 is 0, and 255 is 480 (scales of ggml's NVFP4)
    int4, int8_f6, int4_6/7             two's complement; with 6 bits of fraction; times 6/7, as float32 (IF4)
    sm4_f2                              a sign, then 3 bits of magnitude, 2 of them fraction (HiF4)

Sources: OCP Microscaling Formats (MX) 1.0, section 5; ml_dtypes 0.6.0; ggml d99724f2, ggml-impl.h; Huawei AMCT,
quantization/dtypes/hifp_impl.py; fouroversix dadfad6, reference.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from packfmt.errors import LayoutError

F32 = np.float32
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

NAMED: Final = ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
GENERAL: Final = re.compile(r"float([3-8])_e([1-7])m([0-6])b(\d{1,2})")
MOST_BIAS: Final = 64  # so that every number is a normal float32


def _exact(numbers: Doubles) -> Floats:
    return numbers.astype(F32)


def _magnitudes(exponent: int, mantissa: int, bias: int) -> Doubles:
    """Of all codes of so many bits of exponent and mantissa; exponent 0 is subnormal."""
    field, fraction = np.divmod(np.arange(1 << exponent + mantissa), 1 << mantissa)
    unit = np.ldexp(1.0, np.maximum(field, 1) - bias - mantissa)
    out: Doubles = np.where(field == 0, fraction, fraction + (1 << mantissa)) * unit
    return out


def _signed(magnitudes: Doubles) -> Doubles:
    return np.concatenate([magnitudes, -magnitudes])


def _with_nan(numbers: Doubles, code: int) -> Doubles:
    numbers[code] = np.nan
    return numbers


def _e6m2() -> Doubles:
    code = np.arange(256)
    return _with_nan((1 + code % 4 / 4) * np.ldexp(1.0, code // 4 - 48), 255)


def _ggml_e4m3() -> Doubles:
    seven = _magnitudes(4, 3, 7)
    return np.concatenate([np.where(np.arange(128) == 127, 0, seven), seven])


def _twos(bits: int) -> Doubles:
    code = np.arange(1 << bits)
    return np.where(code < 1 << bits - 1, code, code - (1 << bits)).astype(np.float64)


OTHERS: Final[dict[str, Callable[[], Doubles]]] = {
    "ufloat8_e5m3": lambda: _with_nan(_magnitudes(5, 3, 15), 255),
    "ufloat8_e6m2": _e6m2,
    "ufloat7_e4m3": _ggml_e4m3,
    "int4": lambda: _twos(4),
    "int8_f6": lambda: _twos(8) / 64,
    "int8_f2": lambda: _twos(8) / 4,
    "int4_6/7": lambda: _twos(4) * 6 / 7,
    "sm4_f2": lambda: _signed(np.arange(8) / 4),
}


@cache
def numbers(name: str) -> Floats:
    """The number of every code, (2**bits,) float32, read-only.

    Raises
    ------
    LayoutError
        If no format has this name.
    """
    out = _numbers(name)
    out.flags.writeable = False
    return out


def _numbers(name: Any) -> Floats:
    if name in NAMED:
        import ml_dtypes

        bits = int(name[5])
        codes = np.arange(1 << bits, dtype=np.uint8)
        out: Floats = codes.view(getattr(ml_dtypes, name)).astype(F32)
        return out
    if name in OTHERS:
        return _exact(OTHERS[name]())
    found = GENERAL.fullmatch(name) if isinstance(name, str) else None
    if found:
        bits, exponent, mantissa, bias = map(int, found.groups())
        if bits == 1 + exponent + mantissa and bias <= MOST_BIAS:
            return _exact(_signed(_magnitudes(exponent, mantissa, bias)))
    known = ", ".join((*NAMED, *OTHERS))
    raise LayoutError(f"no number format is called {name!r}; there are {known}, and float<n>_e<E>m<M>b<bias>")


def bits(name: str) -> int:
    """Bits of a code."""
    return len(numbers(name)).bit_length() - 1
