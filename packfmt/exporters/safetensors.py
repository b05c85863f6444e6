"""safetensors: Hugging Face's files as a source, and packfmt's own self-describing files, read and written.

A packed tensor `<name>` is stored as `<name>.<component>`; a dense one under its own name, so that other
readers find norms and biases where they expect them. The header's `__metadata__["packfmt"]` is JSON that
says which layout each tensor has, describes the layouts in full, and holds a SHA-256 for each component
(spec/README.md, "The native container").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import groupby
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np

from packfmt.codec import Array, PackedTensor, dense_dtype, matrix
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import Extras, KeyValue, Layouts
from packfmt.exporters import safetensors_header as header
from packfmt.exporters.safetensors_header import DTYPES, NAME_OF, Entry, Header
from packfmt.exporters.whole import Check, whole_file, whole_folder
from packfmt.layout import DENSE, Layout, dtype_of, itemsize
from packfmt.plan import Plan, Step, TensorInfo

NAME = "safetensors"
SUFFIX = ".safetensors"
VERSION = 1
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".partial")
DENSE_OF = {c.components[0].cell[0].dtype: c for c in DENSE.values()}  # type: ignore[union-attr]
FOREIGN = "U8 with a scale"  # what a tensor of Hugging Face's BitNet is stored as
BITNET, SCALE, LINEAR = "bitnet", "_scale", "bitlinear"  # Hugging Face's: method, suffix of a scale, default class
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
UNKNOWN_LENGTH = 1 << 53  # stands for a stream's end while its header's length is reckoned


def refusal(layout: Layout, shape: tuple[int, ...]) -> str:
    """safetensors holds every layout there is."""
    return ""


def name_refusal(name: str) -> str:
    """Why no tensor can bear this name; empty if one can."""
    if name == "__metadata__":
        return f"the name {name!r}, which the format keeps for itself"
    return "" if name and name.isprintable() else f"the name {name!r}, needs one that can be printed"


def plan_refusal(steps: tuple[Step, ...]) -> str:
    """Why these tensors cannot stand together; empty if they can."""
    owner: dict[str, str] = {}
    for step in steps:
        for name in _files_of(step).values():
            if name in owner:
                return f"{step.name} and {owner[name]}: both would be stored as {name!r}; keep one of them"
            owner[name] = step.name
    return ""


def extras_refusal(extras: Extras) -> str:
    """Why it cannot do with what the model has beside its tensors; empty, for it needs nothing."""
    return ""


# ---------------------------------------------------------------- writing


def write(path: Path, plan: Plan, tensors: Iterable[PackedTensor], extras: Extras, check: Check | None = None) -> None:
    """Write one file if `path` ends in .safetensors, else a folder in Hugging Face's form.

    A folder gets config.json with a `quantization_config`, all side files, and an index if the plan
    names several files. One tensor is held at a time.

    Raises
    ------
    PlanError
        If a tensor is not the one its step announced.
    """
    stream = iter(tensors)
    if why_not := plan_refusal(plan.steps):
        raise PlanError(why_not)
    if path.suffix == SUFFIX:
        with whole_file(path, check) as file:
            _write_tensors(file, plan.steps, stream)
            _check_exhausted(plan, stream)
        return
    with whole_folder(path, check) as folder:
        places: dict[str, str] = {}
        for name, group in groupby(plan.steps, key=lambda step: step.file or SINGLE):
            steps = tuple(group)
            with whole_file(folder / name) as file:
                entries = _write_tensors(file, steps, stream)
            places |= dict.fromkeys(entries, name)
        _check_exhausted(plan, stream)
        if set(places.values()) != {SINGLE}:
            total = sum((folder / name).stat().st_size for name in set(places.values()))
            _dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        packed = sorted({s.layout.name for s in plan.steps if not dense_dtype(s.layout)})
        says = {"quant_method": "packfmt", "version": VERSION, "layouts": packed} if packed else None
        write_extras(folder, extras, says)


def _write_tensors(file: BinaryIO, steps: tuple[Step, ...], tensors: Iterator[PackedTensor]) -> dict[str, Entry]:
    """All tensors of one file, then its header, for which room was left."""
    writing = _Writing(file, steps)
    for step in steps:
        writing.add(step, next(tensors, None))
    return writing.finish()


class _Writing:
    """One file while it is written: tensors go to places known from the plan, streams behind all of them."""

    def __init__(self, file: BinaryIO, steps: tuple[Step, ...]) -> None:
        self.file, self.steps = file, steps
        self.sums: dict[str, dict[str, str]] = {}
        self.lengths: dict[str, int] = {}  # of streams
        unknown = {s.name: dict.fromkeys(_files_of(s), "0" * 64) for s in steps}
        self.entries, text = _header(steps, self.lengths, unknown)
        self.room = len(text)
        self.end = max((e.end for e in self.entries.values() if e.end < UNKNOWN_LENGTH), default=0)

    def add(self, step: Step, tensor: PackedTensor | None) -> None:
        if tensor is None or (tensor.layout, tensor.shape) != (step.layout, step.shape):
            got = "nothing" if tensor is None else f"{tensor.layout.name} {tensor.shape}"
            raise PlanError(f"{step.name}: got {got}, planned {step.layout.name} {step.shape}")
        self.sums[step.name] = {}
        for component, name in _files_of(step).items():
            data = np.ascontiguousarray(tensor.components[component]).reshape(-1).view(np.uint8).data
            begin = self.entries[name].begin
            if begin >= UNKNOWN_LENGTH:
                begin, self.lengths[name] = self.end, len(data)
                self.end += len(data)
            self.file.seek(8 + self.room + begin)
            self.file.write(data)
            self.sums[step.name][component] = sha256(data).hexdigest()

    def finish(self) -> dict[str, Entry]:
        entries, text = _header(self.steps, self.lengths, self.sums)
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + text.ljust(self.room))
        return entries


def _check_exhausted(plan: Plan, tensors: Iterator[PackedTensor]) -> None:
    if next(tensors, None) is not None:
        raise PlanError(f"more tensors than the {len(plan.steps)} planned")


def _files_of(step: Step) -> dict[str, str]:
    """Component -> its tensor's name in the file."""
    if dense_dtype(step.layout):
        return {"values": step.name}
    return {c.name: f"{step.name}.{c.name}" for c in step.layout.components}


def _header(
    steps: tuple[Step, ...], lengths: Mapping[str, int], sums: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Entry], bytes]:
    """Entries in file order, and the JSON text, padded to a multiple of 8.

    Wide elements come first, so that every tensor starts at a multiple of its element's size; streams,
    whose length is data, come last in the order of the steps.
    """
    found: list[tuple[str, str, tuple[int, ...]]] = []
    streams: list[tuple[str, str]] = []
    for step in steps:
        names = _files_of(step)
        if dense_dtype(step.layout):
            found.append((step.name, step.layout.components[0].cell[0].dtype, step.shape))  # type: ignore[union-attr]
            continue
        for c in step.layout.fit(*matrix(step.shape)).components:
            found.append((names[c.name], c.dtype, c.shape))
        streams += [(names[s.name], s.dtype) for s in step.layout.streams]
    entries, at = {}, 0
    for name, dtype, shape in sorted(found, key=lambda item: -itemsize(item[1])):
        end = at + prod(shape) * itemsize(dtype)
        entries[name] = Entry(NAME_OF[dtype], shape, at, end)
        at = end
    for name, dtype in streams:
        begin = at if lengths else UNKNOWN_LENGTH
        end = begin + lengths.get(name, UNKNOWN_LENGTH)
        entries[name] = Entry(NAME_OF[dtype], ((end - begin) // itemsize(dtype),), begin, end)
        at = end
    text = header.text(entries, {"format": "pt", "packfmt": json.dumps(_describe(steps, sums), separators=(",", ":"))})
    return entries, text.ljust(-(-len(text) // 8) * 8)


def _describe(steps: tuple[Step, ...], sums: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    tensors = {
        s.name: {
            "layout": s.layout.name,
            "id": s.layout.id,
            "shape": list(s.shape),
            "dtype": s.dtype,
            "encoder": s.encoder,
            "sha256": dict(sums.get(s.name, {})),
        }
        for s in steps
    }
    return {"version": VERSION, "tensors": tensors, "layouts": {s.layout.id: s.layout.to_json() for s in steps}}


def write_extras(folder: Path, extras: Extras, quantised: dict[str, Any] | None) -> None:
    """Side files, and config.json with `quantised` as its `quantization_config`."""
    for name, source in extras.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    if extras.config is not None:
        config = {k: v for k, v in extras.config.items() if k != "quantization_config"}
        if quantised:
            config["quantization_config"] = quantised
        _dump(folder / CONFIG, config)
    if extras.keyvalues:
        _dump(folder / KEYVALUES, {k: {"type": v.kind, "value": v.value} for k, v in extras.keyvalues.items()})


def _dump(path: Path, data: Any) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


# ---------------------------------------------------------------- reading

KEYVALUES = "gguf_keyvalues.json"  # a GGUF's metadata, so that it can become a GGUF again


class SafetensorsSource:
    """A safetensors file, or a folder of them; `problems` are what the headers get wrong."""

    undecided: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({})  # files and their config.json say all

    def __init__(self, path: Path, layouts: Layouts, read_as: Mapping[str, str] = NOTHING) -> None:
        self.path = path
        self._layouts = layouts
        self.problems: list[ContainerError] = []
        self.index: dict[str, TensorInfo] = {}
        self._files: dict[Path, tuple[BinaryIO, Header]] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._scales: dict[str, Path] = {}  # of BitNet's tensors -> the file of their scale
        try:
            weight_map = _weight_map(path)
            for file in _files(path, weight_map):
                self._add(file)
            self._check_index(path, weight_map)
        except BaseException:
            self.close()
            raise
        self.extras = _read_extras(path) if path.is_dir() else Extras()
        try:
            if layout := self._bitnet_layout(read_as):
                self._find_bitnet(layout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()

    def _check_index(self, path: Path, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self._files[path / file][1].entries:
                self.problems.append(ContainerError(f"{path / INDEX}: {name} is not in {file}", "PF110"))

    def _add(self, path: Path) -> None:
        file = path.open("rb")
        self._files[path] = (file, Header({}, {}, 0))
        found = header.read(path, file)
        self._files[path] = (file, found)
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

    def _bitnet_layout(self, read_as: Mapping[str, str]) -> Layout | None:
        """What Hugging Face's BitNet has in its uint8 tensors, by config.json or as the user says; None elsewhere."""
        asked: Layout | None = None
        for kind, name in read_as.items():
            asked = self._layouts("packfmt", name)
            if kind != "U8" or asked is None or not dict(asked.also).get(BITNET):
                raise PlanError(
                    f"--read-as {kind}={name}: of safetensors only U8 can mean a layout, bitnet or bitnet_divide"
                )
        if asked is not None:
            return asked
        says = (self.extras.config or {}).get("quantization_config")
        if not isinstance(says, dict) or says.get("quant_method") != BITNET:
            return None
        linear = says.get("linear_class", LINEAR)
        layout = self._layouts(BITNET, linear) if isinstance(linear, str) else None
        if layout is None:
            raise ContainerError(
                f"{self.path / CONFIG}: linear_class is {linear!r}, needs bitlinear or autobitlinear", "PF102"
            )
        return layout

    def _find_bitnet(self, layout: Layout) -> None:
        """Take each uint8 matrix and the scale beside it for one tensor, of four times as many rows."""
        for name, info in list(self.index.items()):
            scale = self.index.get(name + SCALE)
            if info.layout != DENSE["u8"] or len(info.shape) != 2 or scale is None:
                continue
            if scale.layout != DENSE["bf16"] or prod(scale.shape) != 1:
                why = f"whose scale is {scale.kind} {list(scale.shape)}, and only one BF16 number is read"
                self.index[name] = replace(info, layout=None, why=why)
                continue
            rows, cols = info.shape
            shape, nbytes = (4 * rows, cols), info.nbytes + scale.nbytes
            self.index[name] = TensorInfo(name, shape, "bfloat16", layout, FOREIGN, info.file, nbytes)
            self._scales[name] = scale.file
            del self.index[scale.name]

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
        if info.name in self._scales:
            return {"weight": info.name, "weight_scale": info.name + SCALE}
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

    def read(self, name: str) -> PackedTensor:
        """The tensor called `name`; its checksums are checked where the file has them."""
        info = self.index[name]
        if info.layout is None:
            why = info.why or "which no layout of packfmt describes"
            raise ContainerError(f"{info.file}: {name} is {info.kind}, {why}", "PF105")
        sums = self._records.get(name, {}).get("sha256", {})
        components = {}
        for component, stored in self._names(info).items():
            where = self._scales[name] if stored != name and name in self._scales else info.file
            array = _read_array(where, *self._files[where], stored)
            if component in sums and sha256(array.reshape(-1).view(np.uint8).data).hexdigest() != sums[component]:
                raise ContainerError(
                    f"{info.file}: {name}: the bytes of {component!r} are not those that were written", "PF109"
                )
            components[component] = array
        if dense_dtype(info.layout) or name in self._scales:
            shapes = info.layout.shapes(*matrix(info.shape))
            components = {c: array.reshape(shapes[c]) for c, array in components.items()}
        return PackedTensor(info.layout, info.shape, components, info.dtype)


def _read_array(path: Path, file: BinaryIO, found: Header, name: str) -> Array:
    e = found.entries[name]
    raw = np.empty(e.end - e.begin, np.uint8)
    file.seek(found.data + e.begin)
    if (got := file.readinto(raw.data)) != len(raw):  # type: ignore[attr-defined]
        raise ContainerError(f"{path}: {name}: {got} of {len(raw)} bytes; the file shrank while it was read", "PF101")
    return raw.view(dtype_of(DTYPES[e.dtype])).reshape(e.shape)


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


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file, as a folder's index has it; empty without one."""
    if not path.is_dir() or not (path / INDEX).exists():
        return {}
    data = read_json(path / INDEX)
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ContainerError(f"{path / INDEX}: no weight_map of names", "PF102")
    for name in set(found.values()):
        if Path(name).name != name or not (path / name).is_file():
            raise ContainerError(f"{path / INDEX}: names {name!r}, which is not in the folder", "PF110")
    return found


def _files(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The safetensors files of a model: those of its index, or the only one there is."""
    if not path.is_dir():
        return [path]
    if weight_map:
        return [path / name for name in sorted(set(weight_map.values()))]
    found = sorted(path.glob("*" + SUFFIX))
    if len(found) > 1 and (path / SINGLE) in found:
        found = [path / SINGLE]
    if len(found) > 1:
        names = ", ".join(f.name for f in found[:4])
        raise ContainerError(f"{path}: {len(found)} safetensors files and no {INDEX}: {names}; name one", "PF100")
    if not found:
        raise ContainerError(f"{path}: no safetensors file in this folder", "PF100")
    return found


def _read_extras(path: Path) -> Extras:
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else None
    if config is not None and not isinstance(config, dict):
        raise ContainerError(f"{path / CONFIG}: not a record", "PF102")
    files = {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file() and _carried(f, path)}
    return Extras(config, files, read_keyvalues(path / KEYVALUES) if (path / KEYVALUES).exists() else {})


def _carried(file: Path, folder: Path) -> bool:
    """Whether a file goes along as it is: all but the weights, what is written anew, and hidden files.

    A safetensors file in a folder below holds another module's few weights (2_Dense of sentence-transformers).
    """
    name = file.relative_to(folder)
    hidden = any(part.startswith(".") and part != ".gitattributes" for part in name.parts)
    below = len(name.parts) > 1
    weights = file.suffix in WEIGHTS and not (below and file.suffix == SUFFIX)
    return not hidden and not weights and (below or file.name not in (CONFIG, INDEX, KEYVALUES))


def read_json(path: Path) -> Any:
    """The data of a JSON file beside the weights."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{path}: not JSON: {error}", "PF102") from error


def read_keyvalues(path: Path) -> dict[str, KeyValue]:
    """A GGUF's metadata, as `write` stored them beside the weights."""
    data = read_json(path)
    try:
        return {k: KeyValue(str(v["type"]), v["value"]) for k, v in data.items()}
    except (AttributeError, TypeError, KeyError) as error:
        raise ContainerError(f"{path}: not a record of type and value: {error}", "PF102") from error
