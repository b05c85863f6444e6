"""Open any source: a Hugging Face folder, one safetensors file, a GGUF, or what packfmt wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from difflib import get_close_matches
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from packfmt import exporters
from packfmt.codec import Array, PackedTensor
from packfmt.errors import ContainerError, PackfmtError
from packfmt.exporters import Extras
from packfmt.layout import DENSE, Layout
from packfmt.plan import TensorInfo

ENOUGH = 1 << 16  # weights that show whether two tensors are alike
ALIKE = 0.5  # the least correlation of the right layout; ternary weights have about 0.8
UNLIKE = 0.5  # others have less than this part of it: i2_s and i2_s_arm agree on a quarter of the places


class Checkpoint(Mapping[str, PackedTensor]):
    """An open model: a mapping from tensor name to packed tensor. `index` is what is known without reading.

    Dense tensors come in layouts of `layout.DENSE`. Use as a context manager, or call `close`.
    """

    def __init__(
        self, path: Path, container: str, source: exporters.Source, read_as: Mapping[str, str] | None = None
    ) -> None:
        self.path, self.container, self.read_as = path, container, dict(read_as or {})
        self._source = source

    @property
    def index(self) -> Mapping[str, TensorInfo]:
        return self._source.index

    @property
    def extras(self) -> Extras:
        return self._source.extras

    def __getitem__(self, name: str) -> PackedTensor:
        return self._source.read(name)

    def rows(self, name: str, start: int, stop: int) -> PackedTensor:
        """Rows start to stop of a tensor as a matrix, leading axes flattened: (stop - start, cols). Only they are read.

        No checksum is checked: `check` does that for the whole tensor.

        Raises
        ------
        LayoutError
            If its layout cannot be cut there (`slices.unit`).
        """
        return self._source.read(name, (start, stop))

    def check(self, name: str) -> None:
        """Compare a tensor's bytes with its checksums, if the file has any; a few megabytes are held.

        Raises
        ------
        ContainerError
            If they differ.
        """
        self._source.check(name)

    def files(self) -> list[Path]:
        """The files that hold the model."""
        return self._source.files()

    def map(self, name: str) -> PackedTensor:
        """The tensor as it lies in a safetensors file, memory-mapped: nothing is copied, no checksum is checked.

        The file must stay what it is while the tensor is used; it may be closed. A weight in a run-time tiling
        (`mxfp4_tile16`) is multiplied so. From a GGUF it is read.
        """
        return self._source.map(name)

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


def open(
    path: str | Path,
    container: str = "",
    read_as: Mapping[str, str] | None = None,
    base: Checkpoint | str | Path | None = None,
) -> Checkpoint:
    """Open a model for reading; headers are read and checked, no tensor is.

    Parameters
    ----------
    path : a folder, a .safetensors or a .gguf
    container : found from the path when not given
    read_as : what the file does not say of its types: name -> layout ("STQ1_0": "sherry"), or a GGUF id ->
        type ("42": "PQ2_0"). Files that packfmt wrote need none
    base : the dense model that this one was made from, open or its path; decides what `read_as` does not
        (`by_correlation`)

    Raises
    ------
    ContainerError
        If nothing is there, it is no format that packfmt reads, or a header is not what it should be.
    PlanError
        If `read_as` names no layout, or a type that is not in the file.
    """
    path, told = Path(path), dict(read_as or {})
    name = container or container_of(path)
    source = exporters.get(name).open(path, foreign_layout, told)
    if isinstance(base, str | Path) and str(base) and not Path(base).exists():
        source.close()
        container_of(Path(base))  # says what is near
    undecided = {kind: choices for kind, choices in source.undecided.items() if choices}
    if undecided and base not in (None, ""):
        source.close()
        with ExitStack() as stack:
            model = base if isinstance(base, Checkpoint) else stack.enter_context(open(base or ""))
            for kind, choices in undecided.items():
                told[kind] = by_correlation(path, name, kind, choices, model, told)
        source = exporters.get(name).open(path, foreign_layout, told)
    return Checkpoint(path, name, source, told)


def by_correlation(
    path: Path, container: str, kind: str, choices: Sequence[str], base: Checkpoint, read_as: Mapping[str, str]
) -> str:
    """Which layout a type means in a file: the one in which its weights resemble those of the dense model.

    A wrong order of the same bytes gives plausible weights that have nothing to do with the model's. One
    tensor decides: the smallest of this type that the base has too, of those large enough.

    Raises
    ------
    ContainerError
        If the base has no such tensor, or no layout is clearly the one; all correlations are given.
    """
    found: dict[str, float] = {}
    weight: Array | None = None
    for layout in choices:
        with closing(exporters.get(container).open(path, foreign_layout, {**read_as, kind: layout})) as source:
            shared = [i for i in source.index.values() if i.kind == kind and _like(i, base)]
            if not shared:
                missing = f"has no tensor of the names and shapes of the {kind} in {path}"
                raise ContainerError(f"{base.path}: {missing}", "PF110")
            least = min(shared, key=lambda i: (prod(i.shape) < ENOUGH, abs(prod(i.shape) - ENOUGH)))
            if weight is None:
                weight = base[least.name].decode()
            found[layout] = _correlation(weight, source.read(least.name).decode())
    best, *others = sorted(found, key=lambda layout: -found[layout])
    if found[best] > ALIKE and all(found[o] < found[best] * UNLIKE for o in others):
        return best
    numbers = ", ".join(f"{found[layout]:.2f} as {layout}" for layout in found)
    raise ContainerError(
        f"{path}: {least.name}: its correlation with {base.path} is {numbers}, of which none is clearly right; "
        f"is that the model it was made from?", "PF105",
    )  # fmt: skip


def _like(info: TensorInfo, base: Checkpoint) -> bool:
    theirs = base.index.get(info.name)
    return theirs is not None and theirs.layout is not None and theirs.shape == info.shape


def _correlation(a: Array, b: Array) -> float:
    """Of two weights as they are, around zero: 1 if one is a positive multiple of the other, 0 if they are unlike."""
    a, b = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
    return float(a @ b / max(np.sqrt((a @ a) * (b @ b)), np.finfo(np.float64).tiny))


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
    if not path.is_file():  # to open a pipe would wait for who writes to it
        raise ContainerError(f"{path}: neither a file nor a folder; save it as a file first", "PF100")
    with path.open("rb") as file:
        start = file.read(4)
    for name, suffix in exporters.SUFFIXES.items():
        if path.suffix == suffix:
            return name
    if start == b"GGUF":
        return "gguf"
    raise ContainerError(
        f"{path}: neither .safetensors nor .gguf; name such a file, or the folder that holds the model", "PF100"
    )


def foreign_layout(container: str, kind: str) -> Layout | None:
    """The layout that a container calls `kind`, if a format on the shelf says so; packfmt's own files use our names."""
    from packfmt import codecs

    if container == "packfmt":
        try:  # the name may come from a file
            return codecs.get(kind).layout if codecs.known(kind) else DENSE.get(kind)
        except PackfmtError:
            return None
    for name in codecs.names():
        layout = codecs.get(name).layout
        if (container, kind) in layout.also:
            return layout
    return None
