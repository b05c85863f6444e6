"""A folder in Hugging Face's form: its files and their index, config.json, and what else goes along."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from packfmt.errors import ContainerError, MachineError
from packfmt.exporters import SIGNS, Extras, KeyValue
from packfmt.exporters.output import CHUNK
from packfmt.exporters.whole import sync_folder
from packfmt.plan import Step

SUFFIX = ".safetensors"
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
KEYVALUES = "gguf_keyvalues.json"  # a GGUF's metadata, so that it can become a GGUF again
QUANTISED = "quantization_config"  # the key of config.json
INNER, OLD = "text_config", "compression_config"  # where a multimodal model may have it; what it was called before
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".partial")


# ---------------------------------------------------------------- writing


def by_file(steps: Iterable[Step]) -> dict[str, tuple[Step, ...]]:
    """The files that the steps name, in the order in which they name them -> their steps."""
    files: dict[str, list[Step]] = {}
    for step in steps:
        files.setdefault(step.file or SINGLE, []).append(step)
    return {name: tuple(found) for name, found in files.items()}


def write_index(folder: Path, tensors: Mapping[str, Iterable[str]]) -> None:
    """The index of a folder's files, if they are several. tensors : file -> the names of the tensors in it"""
    places = {tensor: file for file, names in tensors.items() for tensor in names}
    if set(places.values()) != {SINGLE}:
        total = sum((folder / name).stat().st_size for name in set(places.values()))
        dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_extras(folder: Path, extras: Extras, quantised: Mapping[str, Any] | None) -> None:
    """Side files, and config.json with `quantised` as its `quantization_config`; all is synced, but `folder` itself."""
    for name, source in extras.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as new:
            for chunk in _chunks(source):
                new.write(chunk)
            _sync(new)
    for parent in sorted({p for name in extras.files for p in Path(name).parents if p.name}):
        sync_folder(folder / parent)
    if extras.config is not None:
        dump(folder / CONFIG, without_quantised(extras.config) | ({QUANTISED: dict(quantised)} if quantised else {}))
    if extras.keyvalues:
        dump(folder / KEYVALUES, {k: {"type": v.kind, "value": v.value} for k, v in extras.keyvalues.items()})


def _chunks(path: Path) -> Iterator[bytes]:
    """What is in a side file; what is wrong with it is not the output's fault."""
    try:
        with path.open("rb") as file:
            yield from iter(lambda: file.read(CHUNK), b"")
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}; mend it, and --resume goes on") from error


def dump(path: Path, data: Any) -> None:
    """Write a JSON file, and sync it."""
    with path.open("wb") as file:
        file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


# ---------------------------------------------------------------- what config.json says


def quantised(config: Mapping[str, Any] | None) -> Any:
    """What config.json says of packed weights; None if nothing.

    It says so in `quantization_config`, or in that of its `text_config`, or, as compressed-tensors once had it, in
    `compression_config`: readers ask in this order.

    Source: compressed-tensors 0.20.0, utils/safetensors_load.py (get_quantization_config); vLLM 0.20.0,
    model_loader/weight_utils.py
    """
    config = config or {}
    inner = config.get(INNER)
    if found := config.get(QUANTISED) or (inner.get(QUANTISED) if isinstance(inner, dict) else None):
        return found
    old = config.get(OLD)
    return {"quant_method": "compressed-tensors", **old} if isinstance(old, dict) and old else None


def quantised_by(method: str, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What config.json says of packed weights, if its quant_method is this one; else empty."""
    found = quantised(config)
    return found if isinstance(found, dict) and found.get("quant_method") == method else {}


def without_quantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a dense model: the same without what it says of packed weights, wherever that stands."""
    out = {k: v for k, v in config.items() if k not in (QUANTISED, OLD)}
    if isinstance(inner := out.get(INNER), dict):
        out[INNER] = {k: v for k, v in inner.items() if k != QUANTISED}
    return out


# ---------------------------------------------------------------- reading


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file, as a folder's index has it; empty without one."""
    if not path.is_dir() or not (path / INDEX).exists():
        return {}
    data = read_json(path / INDEX)
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ContainerError(
            f"{path / INDEX}: no weight_map, a record of tensors and their files; fetch it again", "PF102"
        )
    for name in set(found.values()):
        if Path(name).name != name or not (path / name).is_file():
            missing = f"names {name!r}, which is not in the folder; fetch it, or the whole model again"
            raise ContainerError(f"{path / INDEX}: {missing}", "PF110")
    return found


def weight_files(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
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


def read_extras(path: Path) -> Extras:
    """What a folder has beside its tensors. A link to nowhere is one of its files: whoever copies it finds out."""
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else None
    if config is not None and not isinstance(config, dict):
        raise ContainerError(f"{path / CONFIG}: not a record", "PF102")
    there = [f for f in sorted(path.rglob("*")) if f.is_file() or (f.is_symlink() and not f.exists())]
    files = {str(f.relative_to(path)): f for f in there if _carried(f, path)}
    return Extras(config, files, read_keyvalues(path / KEYVALUES) if (path / KEYVALUES).exists() else {})


def _carried(file: Path, folder: Path) -> bool:
    """Whether a file goes along as it is: all but the weights, what is written anew, and hidden files.

    A safetensors file in a folder below holds another module's few weights (2_Dense of sentence-transformers).
    """
    name = file.relative_to(folder)
    hidden = any(part.startswith(".") and part != ".gitattributes" for part in name.parts)
    below = len(name.parts) > 1
    weights = file.suffix in WEIGHTS and not (below and file.suffix == SUFFIX)
    return not hidden and not weights and (below or file.name not in (CONFIG, INDEX, KEYVALUES, *SIGNS))


def read_json(path: Path) -> Any:
    """The data of a JSON file beside the weights."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{path}: not JSON: {error}", "PF102") from error


def read_keyvalues(path: Path) -> dict[str, KeyValue]:
    """A GGUF's metadata, as `write_extras` stored them beside the weights."""
    data = read_json(path)
    try:
        return {k: KeyValue(str(v["type"]), v["value"]) for k, v in data.items()}
    except (AttributeError, TypeError, KeyError) as error:
        raise ContainerError(f"{path}: not a record of type and value: {error}", "PF102") from error
