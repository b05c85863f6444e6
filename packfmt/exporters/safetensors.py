"""safetensors: Hugging Face's files as a source, and packfmt's own self-describing files, read and written.

A packed tensor `<name>` is stored as `<name>.<component>`; a dense one under its own name, so that other
readers find norms and biases where they expect them. The header's `__metadata__["packfmt"]` is JSON that
says which layout each tensor has, describes the layouts in full, and holds a SHA-256 for each component
(spec/README.md, "The native container").
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from packfmt import slices
from packfmt.codec import Array, PackedTensor, dense_dtype, matrix
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import SIGNS, Extras, Layouts, beside, output
from packfmt.exporters import safetensors_header as header
from packfmt.exporters.beside import INDEX, SUFFIX, by_file
from packfmt.exporters.handles import Handles
from packfmt.exporters.output import CHUNK, Lengths, Output, Piece, Place, Sums
from packfmt.exporters.positional import read_at
from packfmt.exporters.safetensors_header import DTYPES, NAME_OF, Entry, Header, name_refusal
from packfmt.layout import DENSE, Layout, dtype_of, itemsize
from packfmt.plan import Plan, Step, TensorInfo

if TYPE_CHECKING:
    from packfmt.exporters.folder import Weight

__all__ = ["NAME", "extras_refusal", "lay", "name_refusal", "open", "plan_refusal", "refusal"]

NAME = "safetensors"
VERSION = 1
DENSE_OF = {c.components[0].cell[0].dtype: c for c in DENSE.values()}  # type: ignore[union-attr]
BytesOf = Callable[[Path, str], Array]  # file, name of the tensor in it -> its bytes
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
UNKNOWN_LENGTH = 1 << 53  # stands for a stream's end while its header's length is reckoned


def refusal(layout: Layout, shape: tuple[int, ...]) -> str:
    """safetensors holds every layout there is."""
    return ""


def leaves(name: str, shape: tuple[int, ...]) -> str:
    """Why such a weight stays dense unless a rule says otherwise; empty, for every weight may be packed."""
    return ""


def plan_refusal(steps: tuple[Step, ...]) -> str:
    """Why these tensors cannot stand together; empty if they can."""
    owner: dict[str, str] = {}
    for step in steps:
        for name in _files_of(step).values():
            if name in owner:
                return f"{step.name} and {owner[name]}: both would be stored as {name!r}; keep one of them"
            owner[name] = step.name
    return ""


def remarks(steps: tuple[Step, ...]) -> list[str]:
    """What a user should know of such a file; nothing, for it holds all of a model as it is."""
    return []


def extras_refusal(extras: Extras) -> str:
    """Why it cannot do with what the model has beside its tensors; empty, for it needs nothing."""
    return ""


# ---------------------------------------------------------------- writing


def lay(path: Path, plan: Plan, extras: Extras) -> Output:
    """One file if `path` ends in .safetensors, else a folder in Hugging Face's form.

    A folder gets config.json with a `quantization_config`, all side files, and an index if the plan
    names several files.

    Raises
    ------
    PlanError
        If tensors cannot stand together.
    """
    if why_not := plan_refusal(plan.steps):
        raise PlanError(why_not)
    one_file = path.suffix == SUFFIX
    files = {name: _File(steps) for name, steps in ({"": plan.steps} if one_file else by_file(plan.steps)).items()}
    of_step = {step.name: (name, file) for name, file in files.items() for step in file.steps}
    packed = sorted({s.layout.name for s in plan.steps if not dense_dtype(s.layout)})
    says = {"quant_method": "packfmt", "version": VERSION, "layouts": packed} if packed else None

    def heads(sums: Sums, lengths: Lengths) -> dict[str, bytes]:
        return {name: file.head(sums, lengths) for name, file in files.items()}

    def write_beside(folder: Path) -> None:
        beside.write_index(folder, {name: file.entries for name, file in files.items()})
        beside.write_extras(folder, extras, says)

    sizes = {name: file.data + file.end for name, file in files.items()}
    entries = tuple(file.entry(name, step) for step in plan.steps for name, file in [of_step[step.name]])
    return Output(sizes, entries, heads, None if one_file else write_beside)


class _File:
    """Where the tensors of a file lie: at places known from the plan, streams behind all of them."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.entries, text = _header(steps, {}, {})
        self.data = 8 + len(text)
        self.end = max((e.end for e in self.entries.values() if e.end < UNKNOWN_LENGTH), default=0)

    def entry(self, file: str, step: Step) -> output.Entry:
        streams = {s.name: file for s in step.layout.streams}
        places = {
            component: Place(file, self.data + e.begin, e.end - e.begin)
            for component, name in _files_of(step).items()
            if component not in streams
            for e in [self.entries[name]]
        }
        pieces = tuple(Piece(component, place) for component, place in places.items())
        return output.Entry(pieces, streams, {component: (place,) for component, place in places.items()})

    def head(self, sums: Sums, lengths: Lengths) -> bytes:
        _, text = _header(self.steps, lengths, sums)
        return (self.data - 8).to_bytes(8, "little") + text.ljust(self.data - 8)


def _files_of(step: Step) -> dict[str, str]:
    """Component -> its tensor's name in the file."""
    if dense_dtype(step.layout):
        return {"values": step.name}
    return {c.name: f"{step.name}.{c.name}" for c in step.layout.components}


def _header(steps: tuple[Step, ...], lengths: Lengths, sums: Sums) -> tuple[dict[str, Entry], bytes]:
    """Entries in file order, and the JSON text, padded to a multiple of 8.

    Streams, whose length is data, come last in the order of the steps.
    """
    found: list[tuple[str, str, tuple[int, ...]]] = []
    streams: list[tuple[str, str, int]] = []
    for step in steps:
        names = _files_of(step)
        if dense_dtype(step.layout):
            dtype = step.layout.components[0].cell[0].dtype  # type: ignore[union-attr]
            found.append((step.name, NAME_OF[dtype], step.shape))
            continue
        for c in step.layout.fit(*matrix(step.shape)).components:
            found.append((names[c.name], NAME_OF[c.dtype], c.shape))
        for s in step.layout.streams:
            streams.append((names[s.name], s.dtype, lengths.get((step.name, s.name), UNKNOWN_LENGTH)))
    entries, at = header.lay(found)
    for name, dtype, length in streams:
        begin = at if lengths else UNKNOWN_LENGTH
        end = begin + length
        entries[name] = Entry(NAME_OF[dtype], (length // itemsize(dtype),), begin, end)
        at = end
    text = header.text(entries, {"format": "pt", "packfmt": json.dumps(_describe(steps, sums), separators=(",", ":"))})
    return entries, text.ljust(-(-len(text) // 8) * 8)


def _describe(steps: tuple[Step, ...], sums: Sums) -> dict[str, Any]:
    unknown, ids = "0" * 64, {layout: layout.id for layout in dict.fromkeys(s.layout for s in steps)}
    tensors = {
        s.name: {
            "layout": s.layout.name,
            "id": ids[s.layout],
            "shape": list(s.shape),
            "dtype": s.dtype,
            "encoder": s.encoder,
            "sha256": {component: sums.get(s.name, {}).get(component, unknown) for component in _files_of(s)},
        }
        for s in steps
    }
    return {"version": VERSION, "tensors": tensors, "layouts": {key: layout.to_json() for layout, key in ids.items()}}


# ---------------------------------------------------------------- reading


class SafetensorsSource:
    """A safetensors file, or a folder of them; `problems` are what the headers get wrong."""

    undecided: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({})  # files and their config.json say all

    def __init__(self, path: Path, layouts: Layouts, read_as: Mapping[str, str] = NOTHING) -> None:
        self.path = path
        self._layouts = layouts
        self.problems: list[ContainerError] = []
        self.index: dict[str, TensorInfo] = {}
        self._handles = Handles()
        self._headers: dict[Path, Header] = {}
        self._maps: dict[Path, Array] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._packed: dict[str, Weight] = {}  # weights of other ecosystems
        try:
            weight_map = beside.read_weight_map(path)
            for file in beside.weight_files(path, weight_map):
                self._add(file)
            self._check_index(path, weight_map)
            self.extras = beside.read_extras(path) if path.is_dir() else Extras()
            self._find_weights(read_as)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._handles.close()
        self._maps.clear()  # what was given away stays

    def _check_index(self, path: Path, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self._headers[path / file].entries:
                self.problems.append(ContainerError(f"{path / INDEX}: {name} is not in {file}", "PF110"))

    def _add(self, path: Path) -> None:
        with self._handles.of(path) as handle, os.fdopen(handle, "rb", closefd=False) as file:
            found = self._headers[path] = header.read(path, file)
        packed = self._described(path, found)
        used = {name for info in packed.values() for name in self._names(info).values()}
        dense = {n: self._dense(path, n, e) for n, e in found.entries.items() if n not in used}
        for name, info in (packed | dense).items():
            if name in self.index:
                self.problems.append(ContainerError(f"{path}: {name} is also in {self.index[name].file.name}", "PF104"))
            self.index[name] = info

    def _dense(self, path: Path, name: str, e: Entry) -> TensorInfo:
        layout = DENSE_OF[DTYPES[e.dtype]] if e.dtype in DTYPES else None
        dtype = dtype_of(DTYPES[e.dtype]).name if layout else e.dtype
        return TensorInfo(name, e.shape, dtype, layout, e.dtype, path, e.end - e.begin)

    def _find_weights(self, read_as: Mapping[str, str]) -> None:
        """Take the tensors that make up a weight, by config.json or as the user says, for that weight."""
        from packfmt.exporters import bitnet, folder

        config = self.extras.config
        asked = bitnet.asked(read_as, self._layouts)
        told = (bitnet.DIALECT, asked) if asked else folder.told(self.path, config)
        if told is None:
            return
        tensors = {name: info for name, info in self.index.items() if name not in self._records}
        taken: dict[str, TensorInfo | None] = {}  # stored tensor -> what stands in its place
        before = folder.dtype_before(config)
        for found in folder.weights(self.path, *told, tensors, self._small, self._layouts, before):
            if isinstance(found, TensorInfo):
                taken[found.name] = found
                continue
            first, *others = [t.name for t in found.stored.values()]
            self._packed[found.info.name] = found
            taken |= dict.fromkeys([*others, *found.constants]) | {first: found.info}
        index: dict[str, TensorInfo] = {}
        for name, info in self.index.items():
            if now := taken.get(name, info):
                if now.name in index:
                    self.problems.append(ContainerError(f"{now.file}: {now.name} is stored twice", "PF104"))
                index[now.name] = now
        self.index = index

    def _described(self, path: Path, found: Header) -> dict[str, TensorInfo]:
        """What packfmt's own metadata says, each claim checked against the entries."""
        if "packfmt" not in found.metadata:
            return {}
        where = f"{path}: __metadata__['packfmt']"
        try:
            data = json.loads(found.metadata["packfmt"])
            version, tensors, layouts = data["version"], dict(data["tensors"]), dict(data["layouts"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ContainerError(f"{where}: not version, tensors and layouts in JSON: {error}", "PF112") from error
        if version != VERSION:
            raise ContainerError(f"{where}: version {version!r}, this packfmt reads {VERSION}", "PF112")
        known: dict[str, Layout] = {}
        for key, description in layouts.items():
            try:
                known[key] = Layout.from_json(description)
            except LayoutError as error:
                raise ContainerError(f"{where}: {error}", "PF111") from error
            if known[key].id != key:
                raise ContainerError(
                    f"{where}: the description of {known[key].name!r} has SHA-256 {known[key].id[:16]}, "
                    f"it is filed as {key[:16]}", "PF111",
                )  # fmt: skip
            # the installed one also knows what other containers call it
            installed = self._layouts("packfmt", known[key].name)
            known[key] = installed if installed == known[key] else known[key]
        out = {}
        for name, record in tensors.items():
            try:
                info = self._info(path, name, record, known)
                out[name] = info
                self._check_components(info, found)
            except ContainerError as error:
                self.problems.append(error)
        return out

    def _info(self, path: Path, name: str, record: Any, known: dict[str, Layout]) -> TensorInfo:
        where = f"{path}: {name}"
        need = {"layout": str, "id": str, "shape": list, "dtype": str, "sha256": dict}
        if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in need.items()):
            raise ContainerError(f"{where}: its record needs {', '.join(need)}", "PF112")
        if record["dtype"] not in {dtype_of(d).name for d in DTYPES.values()}:
            raise ContainerError(f"{where}: was {record['dtype']!r}, which is no dtype", "PF112")
        if not all(type(n) is int and n >= 0 for n in record["shape"]):
            raise ContainerError(f"{where}: shape {record['shape']}, needs whole numbers", "PF106")
        if record["id"] not in known:
            raise ContainerError(f"{where}: no description of layout {record['layout']!r} in the file", "PF111")
        layout = known[record["id"]]
        self._records[name] = record
        try:
            shape = tuple(record["shape"])
            nbytes = layout.nbytes(*matrix(shape))
        except LayoutError as error:
            raise ContainerError(f"{where}: {error}", "PF106") from error
        return TensorInfo(name, shape, record["dtype"], layout, layout.name, path, nbytes)

    def _names(self, info: TensorInfo) -> dict[str, str]:
        if info.layout is None or dense_dtype(info.layout):
            return {"values": info.name}
        return {c.name: f"{info.name}.{c.name}" for c in info.layout.components}

    def _check_components(self, info: TensorInfo, found: Header) -> None:
        assert info.layout is not None
        fitted = {c.name: c for c in info.layout.fit(*matrix(info.shape)).components}
        for component, name in self._names(info).items():
            where = f"{info.file}: {info.name}"
            if name not in found.entries:
                raise ContainerError(f"{where}: component {component!r} is missing", "PF110")
            e, c = found.entries[name], fitted.get(component)
            if c is None:  # a stream
                continue
            shape = info.shape if dense_dtype(info.layout) else c.shape
            if e.dtype != NAME_OF[c.dtype]:
                raise ContainerError(
                    f"{where}: component {component!r} is {e.dtype}, {info.layout.name} needs {NAME_OF[c.dtype]}",
                    "PF105",
                )
            if e.shape != shape:
                raise ContainerError(
                    f"{where}: component {component!r} is {list(e.shape)}, "
                    f"a weight of {list(info.shape)} needs {list(shape)}", "PF106",
                )  # fmt: skip

    def read(self, name: str, rows: tuple[int, int] | None = None) -> PackedTensor:
        """The tensor called `name`, whose checksums are checked where the file has them; or rows of it, unchecked."""
        if rows is None:
            return self._tensor(name, self._bytes)
        info, layout = self._known(name)
        stored = self._stored(name)
        found = slices.gather(layout, info.shape, rows, lambda c, at: self._read_into(*stored[c], at), name)
        return PackedTensor(layout, (rows[1] - rows[0], info.shape[-1]), found, info.dtype)

    def check(self, name: str) -> None:
        """Compare the tensor's bytes with its checksums, a piece at a time."""
        sums = self._records.get(name, {}).get("sha256", {})
        for component, stored in self._names(self.index[name]).items() if sums else ():
            file = self.index[name].file
            entry, digest = self._headers[file].entries[stored], sha256()
            for begin in range(0, entry.end - entry.begin, CHUNK):
                piece = np.empty(min(CHUNK, entry.end - entry.begin - begin), np.uint8)
                self._read_into(file, stored, [(begin, piece)])
                digest.update(piece.data)
            if component in sums and digest.hexdigest() != sums[component]:
                raise _changed(file, name, component)

    def files(self) -> list[Path]:
        """The safetensors files, and what says how they are meant."""
        beside_them = [self.path / n for n in (INDEX, beside.CONFIG, *SIGNS)] if self.path.is_dir() else []
        return [*self._headers, *(p for p in beside_them if p.exists())]

    def _stored(self, name: str) -> dict[str, tuple[Path, str]]:
        """Component -> its file and its tensor's name there."""
        info = self.index[name]
        if name in self._packed:
            return {c: (t.file, t.name) for c, t in self._packed[name].stored.items()}
        return {c: (info.file, stored) for c, stored in self._names(info).items()}

    def _read_into(self, path: Path, name: str, pieces: list[tuple[int, Array]]) -> None:
        """Fill arrays of bytes from places in a stored tensor."""
        found = self._headers[path]
        at = found.data + found.entries[name].begin
        with self._handles.of(path) as handle:
            for begin, piece in pieces:
                if (got := read_at(handle, at + begin, piece)) != len(piece):
                    what = f"{got} of {len(piece)} bytes; the file shrank while it was read"
                    raise ContainerError(f"{path}: {name}: {what}", "PF101")

    def map(self, name: str) -> PackedTensor:
        """The tensor as it lies in the file; no checksum is checked."""
        return self._tensor(name, self._mapped)

    def _tensor(self, name: str, bytes_of: BytesOf) -> PackedTensor:
        info, layout = self._known(name)
        if name in self._packed:
            return self._weight(self._packed[name], layout, bytes_of)
        sums = self._records.get(name, {}).get("sha256", {}) if bytes_of == self._bytes else {}
        components = {}
        for component, stored in self._names(info).items():
            array = self._array(info.file, stored, bytes_of)
            if component in sums and sha256(array.reshape(-1).view(np.uint8).data).hexdigest() != sums[component]:
                raise _changed(info.file, name, component)
            components[component] = array
        if dense_dtype(layout):
            shapes = layout.shapes(*matrix(info.shape))
            components = {c: array.reshape(shapes[c]) for c, array in components.items()}
        return PackedTensor(layout, info.shape, components, info.dtype)

    def _small(self, name: str) -> Array:
        """A stored tensor that helps to tell what others are."""
        return self._array(self.index[name].file, name, self._bytes)

    def _known(self, name: str) -> tuple[TensorInfo, Layout]:
        info = self.index[name]
        if info.layout is None:
            why = info.why or "which no layout of packfmt describes"
            raise ContainerError(f"{info.file}: {name} is {info.kind}, {why}", "PF105")
        return info, info.layout

    def _weight(self, weight: Weight, layout: Layout, bytes_of: BytesOf) -> PackedTensor:
        """A weight of another ecosystem's, whose components may lie in several files."""
        components = {}
        for c in layout.fit(*matrix(weight.info.shape)).components:
            stored = weight.stored[c.name]
            raw = bytes_of(stored.file, stored.name)
            components[c.name] = raw.view(dtype_of(c.dtype)).reshape(c.shape)
        return PackedTensor(layout, weight.info.shape, components, weight.info.dtype)

    def _array(self, path: Path, name: str, bytes_of: BytesOf) -> Array:
        """A stored tensor, of a dtype that NumPy has."""
        e = self._headers[path].entries[name]
        return bytes_of(path, name).view(dtype_of(DTYPES[e.dtype])).reshape(e.shape)

    def _bytes(self, path: Path, name: str) -> Array:
        """The bytes of a stored tensor."""
        e = self._headers[path].entries[name]
        raw = np.empty(e.end - e.begin, np.uint8)
        self._read_into(path, name, [(0, raw)])
        return raw

    def _mapped(self, path: Path, name: str) -> Array:
        """The same, as they lie in the file; a file is mapped once, for each mapping keeps a descriptor."""
        found = self._headers[path]
        e = found.entries[name]
        if e.begin == e.end:
            return np.empty(0, np.uint8)
        with self._handles.of(path) as handle, os.fdopen(handle, "rb", closefd=False) as file:
            if os.fstat(handle).st_size < found.data + e.end:
                raise ContainerError(f"{path}: {name}: the file has shrunk since it was opened", "PF101")
            if path not in self._maps:
                self._maps[path] = np.memmap(file, np.uint8, "r").view(np.ndarray)
        return self._maps[path][found.data + e.begin : found.data + e.end]


def _changed(path: Path, name: str, component: str) -> ContainerError:
    what = f"the bytes of {component!r} are not those that were written; fetch or make it again"
    return ContainerError(f"{path}: {name}: {what}", "PF109")


def open(path: Path, layouts: Layouts, read_as: Mapping[str, str] = NOTHING) -> SafetensorsSource:
    """Open a file or folder and check all headers; no tensor is read.

    `read_as` {"U8": layout} says what uint8 tensors with a scale beside them are, where no config.json does.

    Raises
    ------
    ContainerError
        For the first thing that is not what it should be.
    """
    source = SafetensorsSource(path, layouts, read_as)
    if source.problems:
        source.close()
        raise source.problems[0]
    return source
