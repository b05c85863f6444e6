"""What is bound once for many calls of compiled code."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
import pytest
from numba import njit, types

from packfmt.kernels import simd
from packfmt.kernels.tile_code import Table, address_of, array_at, array_of, call_at, entry, number_at

pytestmark = pytest.mark.skipif(simd.INTERPRETED, reason="nothing is compiled")

FLOATS = types.Array(types.float32, 1, "C")
FIRST, SECOND, NUMBER, INNER = range(4)


@njit(cache=True, nogil=True)
@no_type_check
def _look(table, out):
    first, second = array_at(table, FIRST, np.float32), array_at(table, SECOND, np.uint8)
    out[0], out[1], out[2] = first.size, second.size, number_at(table, NUMBER)
    out[3], out[4] = first[first.size - 1], second[second.size - 1]
    out[5] = array_of(number_at(table, FIRST), 2, np.float32)[1]
    out[6] = number_at(number_at(table, INNER), FIRST)
    first[0] = 5


@njit(cache=True, nogil=True)
@no_type_check
def _add(numbers, more, out):
    for i in range(out.size):
        out[i] = numbers[i] + more


@njit(cache=True, nogil=True)
@no_type_check
def _add_by_address(function, numbers, out):
    call_at(function, (numbers, np.float32(0.5), out))


def test_compiled_code_finds_what_is_in_a_table() -> None:
    floats, inner = np.array([1, 2, 3], np.float32), Table(-7)
    table, out = Table(floats, np.arange(200, dtype=np.uint8), -(1 << 40), inner), np.zeros(7)
    entry(_look, types.int64, types.Array(types.float64, 1, "C"))(table.address, out)
    assert out.tolist() == [3, 200, -(1 << 40), 3, 199, 2, -7]
    assert floats[0] == 5


def test_a_table_keeps_what_is_in_it() -> None:
    """Nobody else does."""
    inner = Table(np.full(1 << 16, 3, np.uint8))
    table = Table(inner, np.full(1 << 16, 4, np.uint8))
    assert any(value is inner for value in table.kept[1])
    arrays = inner.kept[1][0], table.kept[1][1]
    assert [int(a[-1]) for a in arrays if isinstance(a, np.ndarray)] == [3, 4]


def test_a_function_is_called_by_its_address() -> None:
    numbers, out = np.array([1, 2, 3], np.float32), np.zeros(3, np.float32)
    address = address_of(_add, FLOATS, types.float32, FLOATS)
    entry(_add_by_address, types.int64, FLOATS, FLOATS)(address, numbers, out)
    assert out.tolist() == [1.5, 2.5, 3.5]
