"""The fast Hadamard transform, in place.

Rotating weights before quantizing spreads outliers over their neighbours. The matrix is Sylvester's, divided by the
square root of its size: symmetric, and its own inverse, so the same transform turns weights back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

from packfmt.errors import LayoutError
from packfmt.kernels import threads
from packfmt.kernels.cache import njit

F32 = np.float32
LANES = 16
MOST = 1024  # columns
LEAST_WEIGHTS = 1 << 19  # worth a thread


def transform(matrix: np.ndarray, size: int) -> None:
    """Multiply every `size` neighbouring columns by the normalised Hadamard matrix, in place, on all threads.

    Butterflies (a, b) -> (a + b, a - b) of columns 1, 2, 4 ... size / 2 apart, each rounding to float32; then
    one float32 product with float32(1 / sqrt(size)).

    matrix : (rows, cols) float32, each row contiguous
    size : a power of two of 2 to 1024, of which cols is a multiple

    Raises
    ------
    LayoutError
        If the size is another, or the columns are no multiple of it.
    """
    if not 2 <= size <= MOST or size & size - 1:
        raise LayoutError(f"a Hadamard matrix of size {size}, needs a power of two of 2 to {MOST}")
    if matrix.shape[1] % size:
        raise LayoutError(f"a Hadamard matrix of size {size} on {matrix.shape[1]} columns, needs a multiple of it")
    factor = F32(1 / np.sqrt(size))

    def work(start: int, stop: int) -> None:
        with np.errstate(all="ignore"):
            _transform(matrix[start:stop], size, factor)

    if matrix.size:
        threads.spread(work, len(matrix), -(-LEAST_WEIGHTS // matrix.shape[1]))


@njit(cache=True, nogil=True)
def _by_pairs(weights, at, stride, size):
    """Butterflies of columns from `stride` apart on."""
    while stride < size:
        for low in range(at, at + size, 2 * stride):
            left, right = weights[low : low + stride], weights[low + stride : low + 2 * stride]
            for i in range(left.size):
                a, b = left[i], right[i]
                left[i], right[i] = a + b, a - b
        stride *= 2


def _in_registers(count: int) -> Callable[..., None]:
    """All butterflies of so many vectors of neighbours, and the product, between one read and one write."""

    def write(typing, weights, at, factor):
        def code(context, builder, signature, args):
            vector = ir.VectorType(ir.FloatType(), LANES)
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            number = ir.IntType(32)

            def numbers(chosen: list[int]) -> Any:
                return ir.Constant(ir.VectorType(number, LANES), chosen)

            def place(i: int) -> Any:
                index = builder.add(args[1], ir.Constant(args[1].type, LANES * i))
                return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

            x = []
            for i in range(count):
                x.append(builder.load(place(i)))
                x[i].align = 4
            stride = 1
            while stride < LANES:  # lane i meets lane i ^ stride
                first = numbers([i & ~stride for i in range(LANES)])
                second = numbers([i | stride for i in range(LANES)])
                sums = numbers([i + LANES if i & stride else i for i in range(LANES)])
                for i in range(count):
                    a, b = builder.shuffle_vector(x[i], x[i], first), builder.shuffle_vector(x[i], x[i], second)
                    x[i] = builder.shuffle_vector(builder.fadd(a, b), builder.fsub(a, b), sums)
                stride *= 2
            step = 1
            while step < count:
                for i in (i for i in range(count) if not i & step):
                    a, b = x[i], x[i + step]
                    x[i], x[i + step] = builder.fadd(a, b), builder.fsub(a, b)
                step *= 2
            none = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(none, args[2], ir.Constant(number, 0))
            factors = builder.shuffle_vector(first, none, numbers([0] * LANES))
            for i in range(count):
                builder.store(builder.fmul(x[i], factors), place(i)).align = 4
            return context.get_dummy_value()

        return types.void(weights, types.int64, types.float32), code

    return intrinsic(write)


def _plainly(count: int) -> Callable[..., None]:
    """`_in_registers`, for the interpreter."""

    def write(weights, at, factor):
        _by_pairs(weights, at, 1, LANES * count)
        weights[at : at + LANES * count] *= factor

    return write


_kind = _plainly if config.DISABLE_JIT else _in_registers  # type: ignore[attr-defined]
_sixteen, _thirty_two, _sixty_four, _half, _whole = (_kind(count) for count in (1, 2, 4, 8, 16))
WIDEST = 256  # columns of `_whole`


@njit(cache=True, nogil=True)
def _transform(matrix, size, factor):
    one = F32(1)
    for row in range(matrix.shape[0]):
        weights = matrix[row]
        for at in range(0, weights.size, size):
            if size == 16:
                _sixteen(weights, at, factor)
            elif size == 32:
                _thirty_two(weights, at, factor)
            elif size == 64:
                _sixty_four(weights, at, factor)
            elif size == 128:
                _half(weights, at, factor)
            elif size == 256:
                _whole(weights, at, factor)
            else:
                known = 1
                if size > WIDEST:
                    known = WIDEST
                    for part in range(at, at + size, WIDEST):
                        _whole(weights, part, one)
                _by_pairs(weights, at, known, size)
                for i in range(at, at + size):
                    weights[i] *= factor
