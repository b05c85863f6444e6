"""The laws, as functions that return findings; tests, the command line and CI use the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np

from packfmt import checkpoint, grids, outliers, placement, products, slices
from packfmt.checkpoint import Checkpoint
from packfmt.codec import Array, PackedTensor, dense_dtype, dense_values, is_float, matrix
from packfmt.errors import ContainerError, LayoutError, MismatchError, PlanError
from packfmt.layout import DENSE

Level = Literal["header", "structure", "data"]
STRIP = 1 << 20  # numbers compared at a time
SLICE = 1 << 23  # numbers checked at a time when an output is read back, 32 MB when decoded
Names = Callable[[Checkpoint], Iterable[str]]
LEVELS: tuple[Level, ...] = ("header", "structure", "data")

# Rule id -> severity and what it says. Ids are for life; spec/README.md, "Rules", explains each.
RULES: dict[str, tuple[str, str]] = {
    "PF100": ("error", "the file is not of a kind that packfmt reads"),
    "PF101": ("error", "the file is shorter than its header says"),
    "PF102": ("error", "the header is malformed or of absurd size"),
    "PF103": ("error", "a text is not UTF-8"),
    "PF104": ("error", "a name stands twice"),
    "PF105": ("error", "a dtype or type is unknown or not the layout's"),
    "PF106": ("error", "a shape does not fit the layout, the dtype or the size"),
    "PF107": ("error", "offsets overlap, leave a gap, are not aligned or lie beyond the file"),
    "PF108": ("error", "bytes belong to nothing"),
    "PF109": ("error", "a checksum differs"),
    "PF110": ("error", "a component or file is missing"),
    "PF111": ("error", "a layout's description is missing, malformed or not what its hash says"),
    "PF112": ("error", "packfmt's metadata are malformed or of another version"),
    "PF113": ("error", "a layout bears the name of an installed format and means other bytes"),
    "PF120": ("error", "a number that no encoder writes: a scale that is not finite, a code beyond the levels"),
    "PF121": ("error", "bits that no member holds are not zero, so packing again gives other bytes"),
    "PF123": ("error", "an outlier is where none can be, out of order, there twice, or no finite number"),
    "PF122": ("warning", "a dense tensor holds NaN or infinity"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    rule: str
    where: str  # file, and tensor where there is one
    message: str

    @property
    def severity(self) -> str:
        return RULES[self.rule][0]

    def to_json(self) -> dict[str, str]:
        return {**asdict(self), "severity": self.severity}


def validate(
    path: Path,
    level: Level = "data",
    names: Names = iter,
    read_as: Mapping[str, str] | None = None,
    base: str | Path = "",
) -> list[Finding]:
    """What is wrong with a model at this path, by its own description.

    `header` opens it: lengths, names, offsets, and that components have the sizes their layouts give.
    `structure` also compares layouts with the installed formats of the same name. `data` also reads
    every tensor: checksums, scales that are not finite, unused codes, spare bits. `names` walks the
    tensors, and may show progress. `read_as` and `base` as in `checkpoint.open`.

    Raises
    ------
    ContainerError
        If nothing is at this path.
    """
    if not path.exists():
        checkpoint.container_of(path)  # says what is near
    try:
        model = checkpoint.open(path, read_as=read_as, base=base)
    except ContainerError as error:
        return [Finding(error.rule, str(path), _bare(str(error), path))]
    with model:
        found = [] if level == "header" else list(_structure(model))
        if level == "data":
            for name in names(model):
                found += _tensor(model, name)
        return found


def _bare(message: str, path: Path) -> str:
    return message.removeprefix(f"{path}: ")


def _structure(model: Checkpoint) -> Iterator[Finding]:
    from packfmt import codecs

    for layout in dict.fromkeys(i.layout for i in model.index.values() if i.layout is not None):
        try:
            ours = DENSE.get(layout.name) or codecs.get(layout.name).layout
        except PlanError:  # no format of ours
            continue
        if ours.id != layout.id:
            message = f"layout {layout.name!r} has id {layout.id[:16]}, the installed one {ours.id[:16]}"
            yield Finding("PF113", str(model.path), message)


def _tensor(model: Checkpoint, name: str) -> list[Finding]:
    where = f"{model.path}: {name}"
    try:
        tensor = model[name]
    except ContainerError as error:
        return [Finding(error.rule, where, str(error).removeprefix(f"{model.index[name].file}: {name}: "))]
    except LayoutError as error:
        return [Finding("PF106", where, str(error))]
    try:
        return [Finding(rule, where, message) for rule, message in tensor_findings(tensor)]
    except LayoutError as error:  # a description whose grid cannot take its parts
        return [Finding("PF111", where, str(error))]


def tensor_findings(tensor: PackedTensor) -> list[tuple[str, str]]:
    """(rule, message) of what is wrong inside one tensor."""
    if dense_dtype(tensor.layout):
        values = tensor.components["values"]
        bad = int((~np.isfinite(values)).sum()) if is_float(values.dtype.name) else 0
        return [("PF122", f"{bad} of {values.size} numbers are not finite")] if bad else []
    parts = tensor.unpack()
    found = [("PF120", message) for message in grids.findings(tensor.layout, parts)]
    try:
        outliers.read(tensor.layout, tensor.matrix, tensor.components)
    except LayoutError as error:
        found.append(("PF123", str(error).removeprefix(f"{tensor.layout.name}: ")))
    again = placement.pack(tensor.layout, tensor.matrix, parts)
    for name, array in tensor.components.items():
        bad = int((_bytes(array) != _bytes(again[name])).sum())
        if bad:
            found.append(("PF121", f"{bad} bytes of {name!r} change when unpacked and packed again"))
    return found


def laws(tensor: PackedTensor, with_products: bool = False) -> list[str]:
    """The laws that a tensor breaks: pack(unpack(bytes)) == bytes, and decoding gives numbers.

    with_products : also that its products by the fastest kernel have the bits that plain loops give
    """
    try:
        broken = [message for rule, message in tensor_findings(tensor) if rule == "PF121"]
        if not dense_dtype(tensor.layout) and not np.isfinite(tensor.decode()).all():
            broken.append("decodes to numbers that are not finite")
        if with_products and (bad := products.disagree(tensor.layout, tensor.matrix, tensor.components)):
            broken.append(f"{bad} of {tensor.matrix[0]} rows are multiplied to other bits than by plain loops")
    except LayoutError as error:
        return [str(error)]
    return broken


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a tensor is from another of its name. Errors are None where numbers cannot be compared."""

    name: str
    same_bytes: bool
    same_values: bool
    relative_rms: float | None  # sqrt(sum((b - a)^2) / sum(a^2)), in float64
    largest: float | None  # largest absolute difference
    note: str = ""  # what is different besides numbers

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: Checkpoint, b: Checkpoint, names: Names = iter) -> Iterator[Difference]:
    """Tensor by tensor, in a's order, then what only b has. `names` walks a, and may show progress."""
    for name in names(a):
        if name in b.index:
            yield difference(name, a[name], b[name])
        else:
            yield Difference(name, False, False, None, None, f"only in {a.path}")
    for name in b:
        if name not in a.index:
            yield Difference(name, False, False, None, None, f"only in {b.path}")


def difference(name: str, a: PackedTensor, b: PackedTensor) -> Difference:
    """Bytes, then values, then the error of b against a."""
    if a.shape != b.shape:
        return Difference(name, False, False, None, None, f"{list(a.shape)} against {list(b.shape)}")
    note = "" if a.layout.id == b.layout.id else f"{a.layout.name} against {b.layout.name}"
    same_layout = a.layout.id == b.layout.id
    if same_layout and all(_bytes(v).tobytes() == _bytes(b.components[k]).tobytes() for k, v in a.components.items()):
        return Difference(name, True, True, 0.0, 0.0)
    left, right = values(a), values(b)
    if left.dtype.kind not in "f" or right.dtype.kind not in "f":
        same = bool(np.array_equal(left, right))
        return Difference(name, False, same, None, None, note or "whole numbers differ")
    error, largest = errors(left, right)
    return Difference(name, False, bool(np.array_equal(left, right, equal_nan=True)), error, largest, note)


def values(tensor: PackedTensor) -> Array:
    """The tensor's numbers as they compare: float32 or float64 for floats, else as stored."""
    if dense_dtype(tensor.layout):
        stored = dense_values(tensor)
        return stored.astype(np.float32) if is_float(stored.dtype.name) and stored.dtype.itemsize < 4 else stored
    return tensor.decode()


def errors(a: Array, b: Array) -> tuple[float, float]:
    """Relative RMS error of b against a, and the largest absolute difference, in float64, a strip at a time."""
    left, right = a.reshape(-1), b.reshape(-1)
    off = power = largest = 0.0
    for start in range(0, len(left), STRIP):
        exact = left[start : start + STRIP].astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            apart = right[start : start + STRIP].astype(np.float64) - exact
        off, power = off + float(apart @ apart), power + float(exact @ exact)
        largest = float(np.maximum(largest, np.abs(apart).max()))  # NaN stays NaN
    relative = sqrt(off / power) if power else (inf if off else 0.0)
    return relative, largest


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def check_output(path: Path, container: str) -> None:
    """Read back a finished output under its temporary name and check the laws of every tensor.

    Raises
    ------
    MismatchError
        For the first tensor whose checksum or law fails.
    """
    with checkpoint.open(path, container) as model:
        for name in model:
            for where, tensor in _in_slices(model, name):
                if broken := laws(tensor):
                    raise MismatchError(f"{name}: verification failed: {where}{broken[0]}")


def _in_slices(model: Checkpoint, name: str) -> Iterator[tuple[str, PackedTensor]]:
    """A tensor, or what is checked of it at a time and which rows these are, in words; its checksums are checked."""
    info = model.index[name]
    count, cols = matrix(info.shape)
    unit = slices.unit(info.layout, (count, cols)) if info.layout else 0
    each = unit * max(1, SLICE // max(1, unit * cols))
    if not 0 < each < count:
        yield "", model[name]
        return
    model.check(name)
    for start in range(0, count, each):
        stop = min(count, start + each)
        yield f"in rows {start} to {stop - 1}, the first of them counted as 0: ", model.rows(name, start, stop)
