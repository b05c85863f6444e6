"""One step of a plan, on a whole tensor or on some of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

import numpy as np

from packfmt import codecs, slices
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, PackedTensor, dense_dtype, dense_values, matrix, only_inverts, only_places
from packfmt.errors import ContainerError
from packfmt.layout import DENSE, Layout
from packfmt.plan import KEEP, RESCALE, Step

ROOM = 1 << 25  # bytes that a slice may hold at once, read, decoded and encoded: more is no faster


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows start to stop of a step's tensor, taken as a matrix.

    whole : all of a tensor's rows; such a tensor is read and encoded at once
    nbytes : what is read
    held : bytes of memory that this takes at most
    """

    at: int  # of the step in the plan
    start: int
    stop: int
    whole: bool
    nbytes: int
    held: int

    @property
    def rows(self) -> tuple[int, int] | None:
        return None if self.whole else (self.start, self.stop)


def rows_at_once(step: Step) -> int:
    """The rows that a step can be done by, at any multiple of; 0 if it must see the whole tensor.

    A layout says where it can be cut (`slices.unit`). Beyond that, numbers that all rows share must be known before
    the first row: they are if they stay what they are, or an encoder takes the magnitude that they depend on.
    """
    return _rows_at_once(step.before, step.layout, matrix(step.shape), step.action, step.encoder)


@lru_cache(maxsize=4096)
def _rows_at_once(before: Layout, after: Layout, shape: tuple[int, int], action: str, encoder: str) -> int:
    units = [slices.unit(layout, shape) for layout in (before, after)]
    common = slices.shared(after)
    if action in ("repack", RESCALE):
        good = only_places(before, after, shape) or only_inverts(before, after, shape) or not common
    elif encoder:
        codec = codecs.get(after.name)
        good = not common or (encoder in codec.shared and common == {"global_scale"})
        units.append(codec.together.get(encoder, 1))
    else:
        good = True  # the same bytes, or decoded
    return lcm(*units) if good else 0  # also where one of them is 0


def cut(at: int, step: Step, room: int = ROOM, start: int = 0, end: int | None = None) -> list[Slice]:
    """The slices of a step's rows start to end, each of which holds `room` bytes at most, or as few rows as can be."""
    rows = matrix(step.shape)[0]
    end = rows if end is None else end
    unit = rows_at_once(step)
    if not unit or (end - start == rows and (rows <= unit or step.working_set <= room)):
        return [Slice(at, 0, rows, True, step.before.nbytes(*matrix(step.shape)), step.working_set)]
    each = unit * max(1, room // max(1, least_held(step)))
    held = _of_rows(step, min(each, end - start)).working_set
    sizes = [min(each, end - first) for first in range(start, end, each)]
    nbytes = {n: step.before.nbytes(n, step.shape[-1]) for n in {*sizes}}
    return [Slice(at, start + i * each, start + i * each + n, False, nbytes[n], held) for i, n in enumerate(sizes)]


def least_held(step: Step) -> int:
    """Bytes of memory without which a step cannot be done: those of its smallest slice."""
    unit = rows_at_once(step)
    return _of_rows(step, unit).working_set if 0 < unit < matrix(step.shape)[0] else step.working_set


def _of_rows(step: Step, rows: int) -> Step:
    return replace(step, shape=(rows, step.shape[-1]))


def read(model: Checkpoint, step: Step, part: Slice) -> PackedTensor:
    """What a slice is made of.

    Raises
    ------
    ContainerError
        If the source has another tensor than was planned, or its bytes cannot be read.
    """
    if part.whole:
        tensor, shape = model[step.name], step.shape
    else:
        tensor, shape = model.rows(step.name, part.start, part.stop), (part.stop - part.start, step.shape[-1])
    if tensor.layout != step.before or tensor.shape != shape:
        raise ContainerError(f"{step.name}: is {tensor.layout.name} {tensor.shape}, planned from {step.before.name}")
    return tensor


def apply(step: Step, tensor: PackedTensor, importance: Array | None = None, peak: float | None = None) -> PackedTensor:
    """One step on one tensor, or rows of it. `importance`, `peak`: as `Codec.encode` has them."""
    if step.action == KEEP:
        return tensor
    if step.action in ("repack", RESCALE):
        return tensor.repack(step.layout, rounded_reciprocal=step.action == RESCALE and not step.lossless)
    if step.action == "decode" and step.layout.name == "bf16":
        values = tensor.decode("bfloat16").reshape(tensor.matrix)
        return PackedTensor(step.layout, tensor.shape, {"values": values}, step.dtype)
    weight = numbers(tensor)
    if step.layout.name == "f64":
        values = weight.astype(np.float64).reshape(DENSE["f64"].shapes(*tensor.matrix)["values"])
        return PackedTensor(step.layout, tensor.shape, {"values": values}, step.dtype)
    codec = codecs.get(step.layout.name)
    if step.encoder not in codec.weighted:
        importance = None
    packed = codec.encode(weight, step.encoder, importance=importance, peak=peak, lossless=step.lossless)
    return replace(packed, dtype=step.dtype)


def numbers(tensor: PackedTensor) -> Array:
    """A tensor's numbers: as they are stored, or decoded."""
    return dense_values(tensor) if dense_dtype(tensor.layout) else tensor.decode()


def peak_of(tensor: PackedTensor) -> float:
    """The largest magnitude as float32; 0 where a number is not finite, which is refused when it is encoded."""
    weight = numbers(tensor)
    if weight.dtype.itemsize == 2:  # the order of magnitudes is that of their bits, and NumPy is slow with bfloat16
        bits = (weight.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0)
        largest = float(np.uint16(bits).view(weight.dtype))
    else:
        largest = float(np.float32(max(abs(weight.min(initial=0)), abs(weight.max(initial=0)))))
    return largest if np.isfinite(largest) else 0.0


def counted(step: Step, tensor: PackedTensor, result: PackedTensor) -> int:
    """What a user should know of these rows, as a count that adds up to `remark`'s."""
    if step.action == "decode":
        values = dense_values(result)
        ends = np.array([values.min(initial=0), values.max(initial=0)], np.float64)  # both keep a NaN
        return int(not np.isfinite(ends).all())
    remark = codecs.get(step.layout.name).remark if step.action in ("quantise", "requantise") else None
    return remark.count(np.ascontiguousarray(numbers(tensor), np.float32).reshape(tensor.matrix)) if remark else 0


def remark(step: Step, count: int) -> str:
    """What the encoder of a step did, or what it found, in words; empty if nothing was counted."""
    if not count:
        return ""
    if step.action == "decode":
        return "some weights are not finite; packfmt validate says where"
    words = codecs.get(step.layout.name).remark
    rows, cols = matrix(step.shape)
    return words.say(count, rows * cols) if words else ""
