"""What is done of a conversion, in a file beside the partial output, so that one that was stopped can go on.

A journal is lines of JSON. The first says what is converted; if any of it has changed, the rest means nothing. The
others say which rows of which tensor are in the output, which tensors are whole, with their checksums, and at the end
which file or folder gets the output's name. A line is written when what it says has been synced: after a power
failure, too, all of it is true. A line that is damaged, and all after it, count as not written.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packfmt.errors import ContainerError, MachineError, PlanError
from packfmt.exporters.whole import partial_of

JOURNAL = ".journal"


@dataclass(frozen=True, slots=True)
class Task:
    """Which part of a plan: the `number`-th of `count`, from 1."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALONE = Task()


@dataclass(slots=True)
class Done:
    """What is in the output of one step."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    counted: int = 0  # of `steps.counted`
    sums: dict[str, str] | None = None  # of a tensor that is whole


@dataclass(slots=True)
class Told:
    """What a journal says.

    begin : what is converted; empty if not even that was written
    done : of each step
    output : the number, on its disk, of the file or folder that is whole and gets the name; 0: none is yet
    length : bytes of the lines that count
    """

    begin: dict[str, Any] = field(default_factory=dict)
    done: dict[int, Done] = field(default_factory=dict)
    output: int = 0
    length: int = 0

    @property
    def tasks(self) -> int:
        return tasks_of(self.begin)


def path_of(target: Path, task: Task = ALONE) -> Path:
    """Where the journal of a task is."""
    partial = partial_of(target)
    which = "" if task.count == 1 else f".{task.number}of{task.count}"
    return partial.with_name(partial.name + JOURNAL + which)


def all_of(target: Path) -> dict[Path, Told]:
    """The journals there are of an output, of those that say what is converted."""
    return {path: told for path in paths(target) if (told := read(path)).begin}


def remove(target: Path, last: Path | None = None) -> None:
    """Delete the journals of an output, `last` after the others."""
    for path in sorted(paths(target), key=lambda path: path == last):
        path.unlink(missing_ok=True)


def paths(target: Path) -> list[Path]:
    """Where journals of an output are."""
    partial = partial_of(target)
    return sorted(p for p in partial.parent.glob(f"{glob.escape(partial.name)}{JOURNAL}*") if p.is_file())


class Journal:
    """An open journal, which no other process may open meanwhile: the one that is there, or a new one.

    Parameters
    ----------
    path : of `path_of`
    begin : what is converted, plain data
    resume : there may be one
    patience : seconds to wait for another process to close it

    Raises
    ------
    PlanError
        If it is of another conversion; what has changed is said.
    ContainerError
        If there is one and it is not asked to go on with it, or it is no journal.
    MachineError
        If another process has it open.
    """

    def __init__(self, path: Path, begin: Mapping[str, Any], resume: bool, patience: float = 0) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)
        try:
            _lock(self._file.fileno(), path, patience)
            self._file.seek(0)
            told = _understood(path, self._file.read(), Told())
            if told.begin and not resume:
                raise left(path)
            if told.begin and (what := changed(told.begin, begin)):
                raise PlanError(f"{path}: cannot go on: {what}; do as before, or remove {_partial(path)}*")
            self.begin, self.done, self._length = told.begin or plain(begin), told.done, told.length
            self._file.truncate(self._length)
            if not told.begin:
                self._append([begin])
        except BaseException:
            self._file.close()
            raise

    @property
    def tasks(self) -> int:
        """How many tasks there are of the conversion."""
        return tasks_of(self.begin)

    def add(self, lines: Iterable[tuple[int, Any]]) -> None:
        """Note what is done: rows (start, stop, counted) of a step, or all its checksums. All of it is synced."""
        self._append([{"step": at, **what} for at, what in lines])

    def whole(self, partial: Path) -> None:
        """Note that this output is whole, and what gets the name."""
        self._append([{"output": partial.stat().st_ino}])

    def remove(self, target: Path) -> None:
        """Delete all journals of the output, this one last, and close it."""
        if os.name == "nt":  # where an open file cannot be deleted, nor locked by `_lock`
            self.close()
        remove(target, self.path)
        self.close()

    def close(self) -> None:
        self._file.close()

    def _append(self, records: list[Mapping[str, Any]]) -> None:
        text = memoryview(b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records))
        done = 0
        if not os.fstat(self._file.fileno()).st_nlink:  # by another task that failed for good
            raise MachineError(f"{self.path}: was deleted while the conversion ran")
        try:
            while done < len(text):
                done += self._file.write(text[done:])
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self._length)  # of a full disk: half a line must not stand before the next one
            raise
        self._length += len(text)


def read(path: Path, told: Told | None = None) -> Told:
    """What a journal says; nothing if it is gone. `told`: what it said before, to which only what is new is added.

    Raises
    ------
    ContainerError
        If it is no journal.
    """
    told = told or Told()
    try:
        with path.open("rb") as file:
            file.seek(told.length)
            return _understood(path, file.read(), told)
    except FileNotFoundError:
        return told


def changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first thing that two records differ in, in words; empty if there is none."""
    now = plain(now)
    if was == now:  # looking for what differs takes seconds, in a plan of 60,000 tensors
        return ""
    a, b = dict(_flat(was)), dict(_flat(now))
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            return f"{key.removeprefix('conversion: ')} was {_short(a.get(key))}, now {_short(b.get(key))}"
    return ""


def plain(record: Mapping[str, Any]) -> Any:
    """A record as it is when it has been in a journal."""
    return json.loads(json.dumps(record))


def tasks_of(begin: Mapping[str, Any]) -> int:
    """How many tasks a conversion was divided into."""
    return int(begin["task"].partition("/")[2])


def left(path: Path) -> ContainerError:
    """What is said of a partial output, or its journal, where none is expected."""
    if not path.name.endswith(JOURNAL):  # what others have done lies there, too
        return ContainerError(f"{path}: this task was begun already; --resume goes on with it, if it is not done")
    return ContainerError(
        f"{path}: a conversion to here was stopped; --resume goes on with it, or remove {_partial(path)}*"
    )


def _partial(path: Path) -> str:
    return path.name.partition(JOURNAL)[0]


def _understood(path: Path, text: bytes, told: Told) -> Told:
    for line in text.split(b"\n")[:-1]:  # the last line may have been cut off
        try:
            record = json.loads(line)
            if not told.begin:
                told.begin = dict(record["conversion"]) and record
            elif "output" in record:
                told.output = int(record["output"])
            else:
                _note(told.done.setdefault(int(record["step"]), Done()), record)
        except (ValueError, KeyError, TypeError) as error:
            if not told.begin:
                raise ContainerError(f"{path}: no journal of a conversion: {error}") from error
            break
        told.length += len(line) + 1
    return told


def _note(done: Done, record: Mapping[str, Any]) -> None:
    if "sums" in record:
        done.sums = {str(k): str(v) for k, v in record["sums"].items()}
    else:
        (start, stop), found = record["rows"], int(record["counted"])
        done.rows.append((int(start), int(stop)))
        done.counted += found


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a record, each with the keys that lead there; what is in a list is called by its name."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
        value = {v["name"]: v for v in value}
    if not isinstance(value, dict):
        yield where, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{where}: {key}" if where else key)


def _short(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) < 100 else f"{text[:80]}..."


def _lock(handle: int, path: Path, patience: float) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks: two conversions to one place are the user's to avoid
        return
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise MachineError(f"{path}: another conversion writes here now") from error
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
    if not os.fstat(handle).st_nlink:  # who had it ended, and deleted it
        raise MachineError(f"{path}: another conversion wrote here until now; look what it left, and repeat")
