"""Open any source: a Hugging Face folder, one safetensors file, a GGUF, or what packfmt wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType

from packfmt import exporters
from packfmt.codec import PackedTensor
from packfmt.errors import ContainerError
from packfmt.exporters import Extras
from packfmt.layout import DENSE, Layout
from packfmt.plan import TensorInfo


class Checkpoint(Mapping[str, PackedTensor]):
    """An open model: a mapping from tensor name to packed tensor. `index` is what is known without reading.

    Dense tensors come in layouts of `layout.DENSE`. Use as a context manager, or call `close`.
    """

    def __init__(self, path: Path, container: str, source: exporters.Source) -> None:
        self.path, self.container = path, container
        self._source = source

    @property
    def index(self) -> Mapping[str, TensorInfo]:
        return self._source.index

    @property
    def extras(self) -> Extras:
        return self._source.extras

    def __getitem__(self, name: str) -> PackedTensor:
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.index)

    def __len__(self) -> int:
        return len(self._source.index)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open(path: str | Path, container: str = "") -> Checkpoint:
    """Open a model for reading; headers are read and checked, no tensor is.

    `container` is found from the path when not given.

    Raises
    ------
    ContainerError
        If nothing is there, it is no format that packfmt reads, or a header is not what it should be.
    """
    path = Path(path)
    name = container or container_of(path)
    return Checkpoint(path, name, exporters.get(name).open(path, foreign_layout))


def container_of(path: Path) -> str:
    """The container that holds the model at this path, from its name and, for a folder, its files."""
    if not path.exists():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ContainerError(f"{path}: no such file or folder{hint}", "PF100")
    if path.is_dir():
        if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
            return "safetensors"
        if ggufs := sorted(path.glob("*.gguf")):
            raise ContainerError(
                f"{path}: a folder of GGUF files; name one: {', '.join(g.name for g in ggufs[:4])}", "PF100"
            )
        if pickles := [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")]:
            raise ContainerError(
                f"{path}: only pickled weights ({pickles[0]}), which can run code when opened; "
                "save the model as safetensors first", "PF100",
            )  # fmt: skip
        raise ContainerError(f"{path}: no safetensors or GGUF file in this folder", "PF100")
    with path.open("rb") as file:
        start = file.read(4)
    for name, suffix in exporters.SUFFIXES.items():
        if path.suffix == suffix:
            return name
    if start == b"GGUF":
        return "gguf"
    raise ContainerError(f"{path}: neither .safetensors nor .gguf", "PF100")


def foreign_layout(container: str, kind: str) -> Layout | None:
    """The layout that a container calls `kind`, if a format on the shelf says so; packfmt's own files use our names."""
    from packfmt import codecs

    if container == "packfmt":
        return codecs.get(kind).layout if kind in codecs.names() else DENSE.get(kind)
    for name in codecs.names():
        layout = codecs.get(name).layout
        if (container, kind) in layout.also:
            return layout
    return None
