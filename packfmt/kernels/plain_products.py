"""Products of whole steps with int8 activations by plain loops, for what no tile holds and where nothing is compiled.

A block's dot is an exact whole number. Per row, blocks ascending and within them planes in order, each operation
rounded to float32 on its own:

    acc = acc + float32(dot) * (weight_scale * activation_scale)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import config

from packfmt.errors import LayoutError
from packfmt.kernels import threads
from packfmt.kernels.cache import njit

F32 = np.float32
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

INTERPRETED = bool(config.DISABLE_JIT)  # type: ignore[attr-defined]
LEAST_STEPS = 1 << 18  # times the batch: worth a thread


def multiply(
    steps: npt.NDArray[np.int16],
    scale: Floats,
    ends: Ints,
    groups: Ints,
    q: npt.NDArray[np.int8],
    a: Floats,
    out: Floats,
) -> None:
    """The product of every row of steps with every row of activations, on all threads.

    Parameters
    ----------
    steps : (rows, planes, cols) int16, of magnitudes up to 1024
    scale : (rows, planes, groups) float32
    ends : (blocks,) int32, where each block of columns ends, ascending; a block has at most 4096
    groups : (blocks,) int32, which of a row's scales each block has
    q : (batch, cols) int8
    a : (batch, blocks) float32, what a step of the activations counts, times the unit of those of the weights
    out : (batch, rows) float32, written

    Raises
    ------
    LayoutError
        If an array is another than this.
    """
    rows, planes, cols = steps.shape
    wanted: dict[str, tuple[npt.NDArray[Any], type, tuple[int, ...]]] = {
        "steps": (steps, np.int16, steps.shape),
        "scales": (scale, F32, (rows, planes, scale.shape[-1])),
        "ends of blocks": (ends, np.int32, ends.shape[:1]),
        "groups of blocks": (groups, np.int32, ends.shape[:1]),
        "activations": (q, np.int8, (len(q), cols)),
        "activations' scales": (a, F32, (len(q), len(ends))),
        "out": (out, F32, (len(q), rows)),
    }
    for name, (array, dtype, shape) in wanted.items():
        if array.dtype != dtype or array.shape != shape:
            raise LayoutError(f"{name}: {array.dtype} {array.shape}, needs {np.dtype(dtype)} {shape}")
    if (np.diff(ends, prepend=np.int32(0)) <= 0).any() or (int(ends[-1]) if len(ends) else 0) != cols:
        raise LayoutError(f"blocks end at {ends.tolist()[:8]}, needs ascending up to {cols}")
    if len(groups) and rows and not 0 <= int(groups.min()) <= int(groups.max()) < scale.shape[2]:
        raise LayoutError(f"blocks have scales {groups.min()} to {groups.max()} of {scale.shape[2]}")
    out[:] = 0
    if out.size and cols:
        work = partial(_some, steps, scale, ends, groups, q, a, out)
        threads.spread(work, rows, -(-LEAST_STEPS // max(1, planes * cols * len(q))))


def _some(steps, scale, ends, groups, q, a, out, start, stop):
    """Rows start to stop of the weights."""
    if INTERPRETED:
        _multiply_plainly(steps[start:stop], scale[start:stop], ends, groups, q, a, out[:, start:stop])
    else:
        _multiply(steps[start:stop], scale[start:stop], ends, groups, q, a, out[:, start:stop])


@njit(cache=True, nogil=True)
def _multiply(steps, scale, ends, groups, q, a, out):
    for row in range(steps.shape[0]):
        for n in range(q.shape[0]):
            total, first = F32(0), 0
            for block in range(ends.size):
                end = np.int64(ends[block])
                for plane in range(steps.shape[1]):
                    weights, activations = steps[row, plane, first:end], q[n, first:end]
                    dot = np.int32(0)
                    for i in range(weights.size):
                        dot += np.int32(weights[i]) * np.int32(activations[i])
                    total += F32(np.int32(dot)) * (scale[row, plane, groups[block]] * a[n, block])
                first = end
            out[n, row] = total


def _multiply_plainly(steps, scale, ends, groups, q, a, out):
    """`_multiply` in NumPy, to the same bits."""
    first = 0
    with np.errstate(all="ignore"):
        for block, end in enumerate(ends):
            activations = q[:, first:end].astype(np.int32)
            for plane in range(steps.shape[1]):
                dots = activations @ steps[:, plane, first:end].astype(np.int32).T
                factors = scale[:, plane, groups[block]] * a[:, block, None]
                out += dots.astype(F32) * factors
            first = end
