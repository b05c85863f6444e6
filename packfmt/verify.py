"""The laws, as functions that return findings; tests, the command line and CI use the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan, lcm, sqrt
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
SLICE = 1 << 23  # numbers checked at a time, 32 MB when decoded
Told = Callable[[str, int], None]  # is told how many bytes of which tensor have just been read
Checking = Callable[[int], Told]  # is told how many bytes are going to be read
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
    checking: Checking | None = None,
    read_as: Mapping[str, str] | None = None,
    base: str | Path = "",
) -> list[Finding]:
    """What is wrong with a model at this path, by its own description.

    `header` opens it: lengths, names, offsets, and that components have the sizes their layouts give.
    `structure` also compares layouts with the installed formats of the same name. `data` also reads
    every tensor: checksums, scales that are not finite, unused codes, spare bits. `checking` may show
    progress. `read_as` and `base` as in `checkpoint.open`.

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
            told = told_of(model, checking)
            for name in model:
                found += _tensor(model, name, told)
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


def told_of(model: Checkpoint, checking: Checking | None) -> Told | None:
    """Who is told what has been read of a model, all of which is going to be."""
    return checking(sum(info.nbytes for info in model.index.values())) if checking else None


def _tensor(model: Checkpoint, name: str, told: Told | None) -> list[Finding]:
    where = f"{model.path}: {name}"

    def findings() -> Iterator[tuple[str, list[tuple[str, str]]]]:
        for rows, (tensor,) in in_slices(name, model, told=told):
            try:
                yield rows, tensor_findings(tensor)
            except LayoutError as error:  # a description whose grid cannot take its parts
                yield rows, [("PF111", str(error))]

    try:
        return [Finding(rule, where, message) for rule, message in _merged(findings())]
    except ContainerError as error:
        return [Finding(error.rule, where, str(error).removeprefix(f"{model.index[name].file}: {name}: "))]
    except LayoutError as error:
        return [Finding("PF106", where, str(error))]


def _merged(found: Iterable[tuple[str, list[tuple[str, str]]]]) -> list[tuple[str, str]]:
    """What is wrong with the slices of a tensor, (kind, message): each kind as it is first found, and how often more.

    found : which rows these are, in words, and what is wrong with them
    """
    first: dict[str, list[str]] = {}
    more: dict[str, int] = {}
    for rows, wrong in found:
        here: dict[str, list[str]] = {}
        for kind, message in wrong:
            here.setdefault(kind, []).append(rows + message)
        for kind, messages in here.items():
            more[kind] = more.get(kind, -1) + 1
            first.setdefault(kind, messages)
    ends = {kind: f"; and so in {n} later slices of rows" if n else "" for kind, n in more.items()}
    return [(kind, message + ends[kind]) for kind, messages in first.items() for message in messages]


@np.errstate(invalid="ignore")  # some NaN of narrow floats
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


def broken(model: Checkpoint, name: str, with_products: bool = False, told: Told | None = None) -> list[str]:
    """The laws that a tensor of a model breaks (`laws`), some of its rows at a time."""
    found = ((rows, _broken(tensor, with_products)) for rows, (tensor,) in in_slices(name, model, told=told))
    return [message for _, message in _merged(found)]


def laws(tensor: PackedTensor, with_products: bool = False) -> list[str]:
    """The laws that a tensor breaks: pack(unpack(bytes)) == bytes, and decoding gives numbers.

    with_products : also that its products by the fastest kernel have the bits that plain loops give
    """
    return [message for _, message in _broken(tensor, with_products)]


def _broken(tensor: PackedTensor, with_products: bool) -> list[tuple[str, str]]:
    """The laws that a tensor breaks: (which, in words)."""
    try:
        found = [(rule, message) for rule, message in tensor_findings(tensor) if rule == "PF121"]
        if not dense_dtype(tensor.layout) and not np.isfinite(tensor.decode()).all():
            found.append(("numbers", "decodes to numbers that are not finite"))
        if with_products and (bad := products.disagree(tensor.layout, tensor.matrix, tensor.components)):
            told = f"{bad} of {tensor.matrix[0]} rows are multiplied to other bits than by plain loops"
            found.append(("products", told))
    except LayoutError as error:
        return [("layout", str(error))]
    return found


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


def compare(a: Checkpoint, b: Checkpoint, checking: Checking | None = None) -> Iterator[Difference]:
    """Tensor by tensor, in a's order, then what only b has. `checking` may show progress in a."""
    told = told_of(a, checking)
    for name in a:
        if name in b.index:
            yield between(a, b, name, told)
        else:
            yield Difference(name, False, False, None, None, f"only in {a.path}")
    for name in b:
        if name not in a.index:
            yield Difference(name, False, False, None, None, f"only in {b.path}")


def between(a: Checkpoint, b: Checkpoint, name: str, told: Told | None = None) -> Difference:
    """How far b's tensor is from a's of the same name, some rows at a time."""
    shapes, left = (a.index[name].shape, b.index[name].shape), a.index[name].nbytes

    def tell(_: str, nbytes: int) -> None:
        """What has been read a second time, or is not read at all, was told before, or is told at the end."""
        nonlocal left
        nbytes, left = min(nbytes, left), max(0, left - nbytes)
        if told and nbytes:
            told(name, nbytes)

    found = _difference(name, *shapes, lambda: (tensors for _, tensors in in_slices(name, a, b, told=tell)))
    tell(name, left)
    return found


def difference(name: str, a: PackedTensor, b: PackedTensor) -> Difference:
    """Bytes, then values, then the error of b against a."""
    return _difference(name, a.shape, b.shape, lambda: [[a, b]])


def _difference(
    name: str, a: tuple[int, ...], b: tuple[int, ...], pairs: Callable[[], Iterable[Sequence[PackedTensor]]]
) -> Difference:
    """`pairs` gives the tensors of these shapes, or the same rows of both, from the first on each time."""
    if a != b:
        return Difference(name, False, False, None, None, f"{list(a)} against {list(b)}")
    if all(_same_bytes(*pair) for pair in pairs()):
        return Difference(name, True, True, 0.0, 0.0)
    apart, equal, floats, note = Apart(), True, True, ""
    for left, right in pairs():
        note = "" if left.layout.id == right.layout.id else f"{left.layout.name} against {right.layout.name}"
        exact, other = values(left), values(right)
        floats = exact.dtype.kind == other.dtype.kind == "f"
        if not floats:
            equal = bool(np.array_equal(exact, other))
        elif (largest := apart.add(exact, other)) != 0:  # NaN where one is, or infinities are
            equal = equal and isnan(largest) and bool(np.array_equal(exact, other, equal_nan=True))
        if not floats and not equal:
            break
    if floats:
        return Difference(name, False, equal, apart.relative, apart.largest, note)
    return Difference(name, False, equal, None, None, note or ("" if equal else "whole numbers differ"))


def _same_bytes(a: PackedTensor, b: PackedTensor) -> bool:
    same_layout = a.layout.id == b.layout.id
    return same_layout and all(np.array_equal(_bytes(v), _bytes(b.components[k])) for k, v in a.components.items())


def values(tensor: PackedTensor) -> Array:
    """The tensor's numbers as they compare: float32 or float64 for floats, else as stored."""
    if dense_dtype(tensor.layout):
        stored = dense_values(tensor)
        return stored.astype(np.float32) if is_float(stored.dtype.name) and stored.dtype.itemsize < 4 else stored
    return tensor.decode()


@dataclass(slots=True)
class Apart:
    """How far numbers are from others, in float64, a strip at a time; what is added is one sequence after the other."""

    off: float = 0.0  # sum of squared differences
    power: float = 0.0  # sum of squares of the first
    largest: float = 0.0  # absolute difference

    def add(self, a: Array, b: Array) -> float:
        """Add numbers, and the others; their largest absolute difference."""
        left, right, most = a.reshape(-1), b.reshape(-1), 0.0
        for start in range(0, len(left), STRIP):
            exact = left[start : start + STRIP].astype(np.float64)
            with np.errstate(invalid="ignore"):  # infinity less infinity
                apart = right[start : start + STRIP].astype(np.float64) - exact
            self.off, self.power = self.off + float(apart @ apart), self.power + float(exact @ exact)
            most = float(np.maximum(most, np.abs(apart).max()))  # NaN stays NaN
        self.largest = float(np.maximum(self.largest, most))
        return most

    @property
    def relative(self) -> float:
        """The relative RMS error of the second against the first."""
        return sqrt(self.off / self.power) if self.power else (inf if self.off else 0.0)


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def check_output(path: Path, container: str, checking: Checking | None = None) -> None:
    """Read back a finished output under its temporary name and check the laws of every tensor.

    checking : is told how many bytes this reads, and gives who is told how many of which tensor have just been read

    Raises
    ------
    MismatchError
        For the first tensor whose checksum or law fails.
    """
    with checkpoint.open(path, container) as model:
        told = told_of(model, checking)
        for name in model:
            for where, (tensor,) in in_slices(name, model, told=told):
                if wrong := laws(tensor):
                    raise MismatchError(f"{name}: verification failed: {where}{wrong[0]}")


def in_slices(name: str, *models: Checkpoint, told: Told | None = None) -> Iterator[tuple[str, list[PackedTensor]]]:
    """A tensor that all models have, in one shape: at once, or some rows at a time, and which these are, in words.

    Checksums are compared before the first slice. `told` counts the bytes of the first model.
    """
    for where, tensors in _cut(name, models):
        yield where, tensors
        if told:
            told(name, tensors[0].nbytes)


def _cut(name: str, models: Sequence[Checkpoint]) -> Iterator[tuple[str, list[PackedTensor]]]:
    infos = [model.index[name] for model in models]
    count, cols = matrix(infos[0].shape)
    unit = lcm(*(slices.unit(i.layout, (count, cols)) if i.layout else 0 for i in infos))  # 0 if one of them is
    each = unit * max(1, SLICE // max(1, unit * cols))
    if not 0 < each < count:
        yield "", [model[name] for model in models]
        return
    for model in models:
        model.check(name)
    for start in range(0, count, each):
        stop = min(count, start + each)
        where = f"in rows {start} to {stop - 1}, the first of them counted as 0: "
        yield where, [model.rows(name, start, stop) for model in models]
