"""Codes that stand for several weights: read into steps, and written back. Exact in both directions.

A step is the small whole number that a scale multiplies. Rows are shared among threads.
"""

from __future__ import annotations

import numpy as np

from packfmt.kernels import threads
from packfmt.kernels.cache import njit

LEAST_CODES = 1 << 15  # worth a thread
ONE, THREE = np.uint32(1), np.uint32(3)
EIGHT, BYTE = np.uint32(8), np.uint32(255)
POWERS = np.array([1, 3, 9, 27, 81], np.uint32)
MISFIT = np.uint8(255)  # in a table of codes: no code stands for these steps


def read_quads(codes: np.ndarray, values: np.ndarray, stride: int) -> np.ndarray:
    """(rows, quads) uint8 codes -> (rows, 4 * quads) int8 steps; code c stands for values[c].

    values : (codes, 4) int8. Lane p of quad g is column g % stride + p * stride of chunk g // stride,
    a chunk being 4 * stride columns: for stride 1 the quads lie side by side.
    """
    steps = np.empty((codes.shape[0], 4 * codes.shape[1]), np.int8)
    _share(lambda a, b: _read_quads(codes[a:b], values, stride, steps[a:b]), codes)
    return steps


def write_quads(steps: np.ndarray, values: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse: (rows, cols) int8 steps of -1 to 1 -> (rows, cols / 4) uint8 codes, and which have none.

    Returns codes, and (rows, cols / 4) bool: quads whose steps no code stands for; their code is 0.
    """
    table = np.full(81, MISFIT, np.uint8)
    table[(values.astype(np.int64) + 1) @ np.array([27, 9, 3, 1])] = np.arange(len(values))
    codes = np.empty((steps.shape[0], steps.shape[1] // 4), np.uint8)
    _share(lambda a, b: _write_quads(steps[a:b], table, stride, codes[a:b]), codes)
    bad = codes == MISFIT
    codes[bad] = 0
    return codes, bad


def read_base3(codes: np.ndarray, block: int, runs: np.ndarray, high_first: bool) -> np.ndarray:
    """(rows, blocks, bytes) uint8 -> (rows, blocks * block) int8 steps of -1 to 1, several to a byte.

    runs : (n, 2) int64. A run (count, digits) is `count` bytes; byte m of it holds the block's columns
    start + m + count * i for digit i < digits. Digit i of byte b is floor(3 * (b * 3**i mod 256) / 256),
    which any byte has. `high_first`: i = 0 is the most significant digit, else the least.
    """
    steps = np.empty((codes.shape[0], codes.shape[1] * block), np.int8)
    _share(lambda a, b: _read_base3(codes[a:b], block, runs, high_first, steps[a:b]), codes)
    return steps


def write_base3(steps: np.ndarray, block: int, runs: np.ndarray, high_first: bool) -> np.ndarray:
    """The inverse: (rows, cols) int8 steps of -1 to 1 -> (rows, cols / block, bytes) uint8.

    Five digits with the value q give the byte ceil(256 * q / 243); a run of fewer leaves the last digits 0.
    """
    rows, cols = steps.shape
    codes = np.empty((rows, cols // block, int(runs[:, 0].sum())), np.uint8)
    _share(lambda a, b: _write_base3(steps[a:b], block, runs, high_first, codes[a:b]), codes)
    return codes


def read_fives(words: np.ndarray) -> np.ndarray:
    """(rows, groups, 5) uint16 -> (rows, 16 * groups) uint8 codes of 5 bits.

    Word i of a group holds codes 3 i, 3 i + 1 and 3 i + 2 from bit 0 up, and in bit 15 bit i of code 15.
    """
    codes = np.empty((words.shape[0], 16 * words.shape[1]), np.uint8)
    _share(lambda a, b: _read_fives(words[a:b], codes[a:b]), words)
    return codes


def write_fives(codes: np.ndarray) -> np.ndarray:
    """The inverse: (rows, quads) uint8 codes below 32 -> (rows, quads / 16, 5) uint16."""
    words = np.empty((codes.shape[0], codes.shape[1] // 16, 5), np.uint16)
    _share(lambda a, b: _write_fives(codes[a:b], words[a:b]), codes)
    return words


def _share(work: object, codes: np.ndarray) -> None:
    each = max(1, codes.size // max(1, codes.shape[0]))
    threads.spread(work, codes.shape[0], -(-LEAST_CODES // each))  # type: ignore[arg-type]


@njit(cache=True, nogil=True)
def _read_quads(codes, values, stride, steps):
    for row in range(codes.shape[0]):
        for g in range(codes.shape[1]):
            code = codes[row, g]
            first = g // stride * 4 * stride + g % stride
            for lane in range(4):
                steps[row, first + lane * stride] = values[code, lane]


@njit(cache=True, nogil=True)
def _write_quads(steps, table, stride, codes):
    for row in range(codes.shape[0]):
        for g in range(codes.shape[1]):
            first = g // stride * 4 * stride + g % stride
            number = 0
            for lane in range(4):
                number = 3 * number + steps[row, first + lane * stride] + 1
            codes[row, g] = table[number]


@njit(cache=True, nogil=True)
def _read_fives(words, codes):
    for row in range(words.shape[0]):
        for group in range(words.shape[1]):
            last = 0
            for i in range(5):
                word = np.int64(words[row, group, i])
                for j in range(3):
                    codes[row, 16 * group + 3 * i + j] = np.uint8(word >> 5 * j & 31)
                last |= (word >> 15) << i
            codes[row, 16 * group + 15] = np.uint8(last)


@njit(cache=True, nogil=True)
def _write_fives(codes, words):
    for row in range(words.shape[0]):
        for group in range(words.shape[1]):
            last = np.int64(codes[row, 16 * group + 15])
            for i in range(5):
                word = (last >> i & 1) << 15
                for j in range(3):
                    word |= np.int64(codes[row, 16 * group + 3 * i + j]) << 5 * j
                words[row, group, i] = np.uint16(word)


@njit(cache=True, nogil=True)
def _read_base3(codes, block, runs, high_first, steps):
    for row in range(codes.shape[0]):
        for b in range(codes.shape[1]):
            byte, column = 0, b * block
            for r in range(runs.shape[0]):
                count, digits = runs[r, 0], runs[r, 1]
                for i in range(digits):
                    power = POWERS[i] if high_first else POWERS[4 - i]
                    for m in range(count):
                        rest = np.uint32(codes[row, b, byte + m]) * power & BYTE
                        steps[row, column + count * i + m] = np.int8(np.int32(rest * THREE >> EIGHT) - 1)
                byte += count
                column += count * digits


@njit(cache=True, nogil=True)
def _write_base3(steps, block, runs, high_first, codes):
    for row in range(codes.shape[0]):
        for b in range(codes.shape[1]):
            byte, column = 0, b * block
            for r in range(runs.shape[0]):
                count, digits = runs[r, 0], runs[r, 1]
                for m in range(count):
                    number = np.uint32(0)
                    for i in range(digits):
                        power = POWERS[4 - i] if high_first else POWERS[i]
                        number += np.uint32(steps[row, column + count * i + m] + 1) * power
                    codes[row, b, byte + m] = np.uint8((number * np.uint32(256) + np.uint32(242)) // np.uint32(243))
                byte += count
                column += count * digits
