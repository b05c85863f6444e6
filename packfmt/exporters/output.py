"""What a container writes, laid out before the first weight is read, and the files while they are filled.

The plan decides how many bytes everything has, so every component of every tensor has its place in a file. Tensors, or
rows of them, are written there in any order, by any number of threads or machines. What is known only at the end
(checksums, the length of streams) stands in the files' heads, for which room is left, and in what lies beside them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from packfmt import slices
from packfmt.codec import Array, PackedTensor, matrix
from packfmt.errors import ContainerError, PlanError
from packfmt.exporters.positional import read_at, write_at
from packfmt.exporters.whole import Check, give_name, partial_of, remove, sync_folder
from packfmt.plan import Plan, Step

Sums = Mapping[str, Mapping[str, str]]  # step's name -> what is summed -> SHA-256
Lengths = Mapping[tuple[str, str], int]  # step's name, stream -> bytes
CHUNK = 1 << 22  # bytes read at a time
OPEN = 64  # files kept open, of those that nobody reads or writes


class Place(NamedTuple):
    """Bytes of a file of the output; the file "" is the output itself, if it is one file."""

    file: str
    begin: int
    nbytes: int


class Piece(NamedTuple):
    """A component of a packed tensor, which stands in a file as it is; or what `make` makes of the tensor.

    name : the component's, or what is made is called so
    make : gives as many bytes, the same ones for any rows of the tensor
    """

    name: str
    place: Place
    make: Callable[[PackedTensor], Array] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """All that a step writes.

    pieces : none of them where a step is left out
    streams : stream -> the file that it stands at the end of; streams of a file are in the order of the steps
    summed : what has a checksum -> its bytes, in this order
    """

    pieces: tuple[Piece, ...]
    streams: Mapping[str, str]
    summed: Mapping[str, tuple[Place, ...]]


@dataclass(frozen=True, slots=True)
class Output:
    """A laid out output.

    files : name -> bytes, without streams; {"": n} if the output is one file, else a folder of files
    entries : one for each step of the plan
    heads : name -> the first bytes of the file, as many as when nothing was known yet (empty mappings)
    beside : writes what else belongs into the folder, when the files are whole, and syncs it

    Bytes of a file in no head, piece or stream are zero.
    """

    files: Mapping[str, int]
    entries: tuple[Entry, ...]
    heads: Callable[[Sums, Lengths], Mapping[str, bytes]]
    beside: Callable[[Path], None] | None = None

    @property
    def one_file(self) -> bool:
        return "" in self.files


@dataclass(slots=True)
class _Open:
    """An open file of an output.

    users : how many read, write or sync it now
    dirty : whether it was written to after it was last synced
    """

    handle: int
    users: int = 0
    dirty: bool = False


class Files:
    """The files of an output while they are filled, below a path that has not its final name yet.

    Every method may be called from several threads.
    """

    def __init__(self, output: Output, steps: tuple[Step, ...], path: Path) -> None:
        self.output, self.steps, self.path = output, steps, path
        self._open: dict[str, _Open] = {}  # by name, the last used at the end
        self._lost: OSError | None = None  # why bytes that were written may not be on the disk
        self._lock, self._syncing = Lock(), Lock()

    def make(self) -> None:
        """Give every file its size, and make names last; what is there already stays."""
        if not self.output.one_file:
            self.path.mkdir(exist_ok=True)
        for name, size in self.output.files.items():
            with self._handle(name, writes=True) as handle:
                if os.fstat(handle).st_size < size:
                    os.ftruncate(handle, size)
        sync_folder(self.path.parent)
        if not self.output.one_file:
            sync_folder(self.path)

    def put(self, at: int, tensor: PackedTensor, rows: tuple[int, int] | None = None) -> int:
        """Write what step `at` gave, or only these of its rows; returns the bytes written."""
        step, entry, written = self.steps[at], self.output.entries[at], 0
        cut = slices.spans(step.layout, matrix(step.shape), *rows) if rows else {}
        for name, place, make in entry.pieces:
            data = _bytes(make(tensor) if make else tensor.components[name])
            spans = [slices.Span(0, place.nbytes)] if make else cut.get(name, [slices.Span(0, place.nbytes)])
            if len(data) != (planned := sum(nbytes for _, nbytes in spans)):
                raise PlanError(f"{step.name}: {len(data)} bytes of {name}, planned {planned}")
            done = 0
            with self._handle(place.file, writes=True) as handle:
                for begin, nbytes in spans:
                    write_at(handle, place.begin + begin, data[done : done + nbytes])
                    done += nbytes
            written += done
        for name in entry.streams:
            written += self._put_stream(self._stream(at, name), _bytes(tensor.components[name]))
        return written

    def sums(self, at: int) -> dict[str, str]:
        """The checksums of a step all of whose rows are written, of the bytes that are in the files."""
        entry = self.output.entries[at]
        out = {
            key: _sum(chunk for place in places for chunk in self._read(place)) for key, places in entry.summed.items()
        }
        for name in entry.streams:
            with self._stream(at, name).open("rb") as file:
                out[name] = _sum(iter(lambda: file.read(CHUNK), b""))
        return out

    def sync(self) -> None:
        """Make what was written last through a power failure.

        Raises
        ------
        OSError
            If some of it was lost, now or before: the system tells that once, and forgets the bytes.
        """
        with self._syncing:  # what another thread is at is not done yet
            with self._lock:
                dirty = [name for name, file in self._open.items() if file.dirty]
            for name in dirty:
                with self._handle(name):
                    self._sync(self._open[name])
            if self._lost:
                raise self._lost

    def finish(self, sums: Sums) -> None:
        """Append the streams, write the heads and what stands beside the files; all is synced.

        It may be repeated, until `tidy`.
        """
        lengths = self._append_streams()
        for name, head in self.output.heads(sums, lengths).items():
            with self._handle(name, writes=True) as handle:
                write_at(handle, 0, np.frombuffer(head, np.uint8))
        self.sync()
        self.close()
        if self.output.beside:
            self.output.beside(self.path)

    def tidy(self) -> None:
        """Delete what only `finish` needs."""
        for at, entry in enumerate(self.output.entries):
            for name in entry.streams:
                self._stream(at, name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all that was written."""
        self.close()
        self.tidy()
        remove(self.path)

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].handle)

    def _append_streams(self) -> dict[tuple[str, str], int]:
        ends = dict(self.output.files)
        lengths = {}
        for at, (step, entry) in enumerate(zip(self.steps, self.output.entries, strict=True)):
            for stream, name in entry.streams.items():
                begin = ends[name]
                with self._stream(at, stream).open("rb") as file, self._handle(name, writes=True) as handle:
                    while chunk := file.read(CHUNK):
                        write_at(handle, ends[name], np.frombuffer(chunk, np.uint8))
                        ends[name] += len(chunk)
                lengths[step.name, stream] = ends[name] - begin
        return lengths

    def _put_stream(self, path: Path, data: Array) -> int:
        with path.open("wb") as file:
            file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
        return len(data)

    def _stream(self, at: int, name: str) -> Path:
        """The file that holds a stream until the lengths of all are known."""
        number = list(self.output.entries[at].streams).index(name)  # a file may call its streams as it likes
        return self.path.with_name(f"{self.path.name}.stream.{at}.{number}")

    def _read(self, place: Place) -> Iterator[memoryview]:
        """The bytes at a place, in chunks, each gone when the next is asked for."""
        file, begin, nbytes = place
        room = np.empty(min(nbytes, CHUNK), np.uint8)
        for done in range(0, nbytes, CHUNK):
            chunk = room[: nbytes - done]
            with self._handle(file) as handle:
                if read_at(handle, begin + done, chunk) != len(chunk):
                    raise ContainerError(f"{self.path / file}: shrank while it was written")
            yield chunk.data

    @contextmanager
    def _handle(self, name: str, writes: bool = False) -> Iterator[int]:
        """A file's descriptor, which is not closed meanwhile."""
        with self._lock:
            if name not in self._open:
                path = self.path / name if name else self.path
                self._open[name] = _Open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666))
            file = self._open[name] = self._open.pop(name)
            file.users += 1
        try:
            yield file.handle
        finally:
            with self._lock:
                file.users -= 1
                if writes:  # now, for a sync may have begun before the last byte was written
                    file.dirty = True
                if len(self._open) > OPEN:
                    self._close_one()

    def _close_one(self) -> None:
        """Close the file that was not used for longest, if it need not be synced; else sync it first."""
        idle = [name for name, file in self._open.items() if not file.users]
        if idle:
            file = self._open.pop(min(idle, key=lambda name: self._open[name].dirty))
            try:
                self._sync(file)
            finally:
                os.close(file.handle)

    def _sync(self, file: _Open) -> None:
        """Sync a file that was written to. That it failed is kept: another sync would not fail again."""
        dirty, file.dirty = file.dirty, False
        try:
            if dirty:
                os.fdatasync(file.handle) if hasattr(os, "fdatasync") else os.fsync(file.handle)
        except OSError as error:
            self._lost = error
        except BaseException:
            file.dirty = True
            raise


def write(output: Output, path: Path, plan: Plan, tensors: Iterable[PackedTensor], check: Check | None = None) -> None:
    """Write a laid out output, one tensor after the other; `path` appears only when whole and checked.

    Raises
    ------
    PlanError
        If a tensor is not the one that its step announced, or there are fewer or more.
    ContainerError
        If another partial output is in the way.
    """
    partial, stream = partial_of(path), iter(tensors)
    if partial.exists():
        raise ContainerError(f"{partial}: another conversion writes here, or one was killed; remove it and repeat")
    files = Files(output, plan.steps, partial)
    try:
        files.make()
        sums = {}
        for at, step in enumerate(plan.steps):
            files.put(at, announced(step, next(stream, None)))
            sums[step.name] = files.sums(at)
        if next(stream, None) is not None:
            raise PlanError(f"more tensors than the {len(plan.steps)} planned")
        files.finish(sums)
        if check:
            check(partial)
        give_name(path)
        files.tidy()
    except BaseException:
        files.remove()
        raise


def announced(step: Step, tensor: PackedTensor | None, rows: int | None = None) -> PackedTensor:
    """The tensor, if it is the one that the step announced, or so many of its rows."""
    shape = step.shape if rows is None else (rows, matrix(step.shape)[1])
    if tensor is None or (tensor.layout, tensor.shape) != (step.layout, shape):
        got = "nothing" if tensor is None else f"{tensor.layout.name} {tensor.shape}"
        raise PlanError(f"{step.name}: got {got}, planned {step.layout.name} {shape}")
    return tensor


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sum(chunks: Iterable[bytes | memoryview]) -> str:
    digest = sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
