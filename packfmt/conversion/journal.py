"""What is done of a conversion, in a file beside the partial output, so that one that was stopped can go on.

A journal is lines of JSON. The first has the digest of what is converted (`record`); if any of that has changed, the
rest means nothing. The others say which rows of which tensor are in the output, which tensors are whole, with their
checksums, and at the end which file or folder gets the output's name. A line is written when what it says has been
synced: after a power failure, too, all of it is true. A line that is damaged, and all after it, count as not written.
"""

from __future__ import annotations

import glob
import json
import os
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packfmt.conversion import record
from packfmt.errors import ContainerError, MachineError
from packfmt.exporters.whole import partial_of

JOURNAL = ".journal"


@dataclass(frozen=True, slots=True)
class Task:
    """Which part of a plan: the `number`-th of `count`, from 1; or, where `count` is 0, all of it, by nobody else."""

    number: int = 1
    count: int = 0

    def __str__(self) -> str:
        return f"{self.number}/{self.count}" if self.count else "all"


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

    begin : the digest of what is converted, from which source, and the task; empty if not even that was written
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
    which = "" if not task.count else f".{task.number}of{task.count}"
    return partial.with_name(partial.name + JOURNAL + which)


def all_of(target: Path) -> dict[Path, Told]:
    """The journals there are of an output, of those that say what is converted."""
    return {path: told for path in paths(target) if (told := read(path)).begin}


def begun(target: Path) -> dict[Path, Told]:
    """As `all_of`, but only what they begin with: they may be many, and long."""
    return {path: told for path in paths(target) if (told := read(path, lines=1)).begin}


def remove(target: Path, last: Path | None = None) -> None:
    """Delete the journals of an output and what is converted, and `last` after all others."""
    for path in paths(target):
        if path != last:
            path.unlink(missing_ok=True)
    record.remove(target)
    if last:
        last.unlink(missing_ok=True)


def paths(target: Path) -> list[Path]:
    """Where journals of an output are."""
    partial = partial_of(target)
    return sorted(p for p in partial.parent.glob(f"{glob.escape(partial.name)}{JOURNAL}*") if p.is_file())


class Journal:
    """An open journal, which no other process may open meanwhile: the one that is there, or a new one.

    Parameters
    ----------
    path : of `path_of`
    begin : its first line, if it has none yet
    resume : there may be one
    patience : seconds to wait for another process to close it

    Raises
    ------
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
            self.begin, self.done, self._length = told.begin or begin, told.done, told.length
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


def read(path: Path, told: Told | None = None, lines: int = 0) -> Told:
    """What a journal says; nothing if it is gone.

    told : what it said before, to which only what is new is added
    lines : only so many; 0: all

    Raises
    ------
    ContainerError
        If it is no journal.
    """
    told = told or Told()
    try:
        with path.open("rb") as file:
            file.seek(told.length)
            return _understood(path, b"".join(file.readline() for _ in range(lines)) if lines else file.read(), told)
    except FileNotFoundError:
        return told


def tasks_of(begin: Mapping[str, Any]) -> int:
    """How many tasks a conversion was divided into; 0: it was not."""
    return int(begin["task"].partition("/")[2] or 0)


def left(path: Path) -> ContainerError:
    """What is said of a partial output, or its journal, where none is expected."""
    if not path.name.endswith(JOURNAL):  # what others have done lies there, too
        return ContainerError(f"{path}: this task was begun already; --resume goes on with it, if it is not done")
    return ContainerError(
        f"{path}: a conversion to here was stopped; --resume goes on with it, or begin anew after {forgetting(path)}"
    )


def forgetting(path: Path) -> str:
    """The command that removes what is left of a conversion. `path`: its partial output, or one of its journals."""
    return f"rm -r {shlex.quote(str(path.with_name(path.name.partition(JOURNAL)[0])))}*"


def _understood(path: Path, text: bytes, told: Told) -> Told:
    for line in text.split(b"\n")[:-1]:  # the last line may have been cut off
        try:
            said = json.loads(line)
            if not told.begin:
                told.begin = _begin(said)
            elif "output" in said:
                told.output = int(said["output"])
            else:
                _note(told.done.setdefault(int(said["step"]), Done()), said)
        except (ValueError, KeyError, TypeError) as error:
            if not told.begin:
                raise ContainerError(f"{path}: no journal of a conversion: {error}") from error
            break
        told.length += len(line) + 1
    return told


def _note(done: Done, said: Mapping[str, Any]) -> None:
    if "sums" in said:
        done.sums = {str(k): str(v) for k, v in said["sums"].items()}
    else:
        (start, stop), found = said["rows"], int(said["counted"])
        done.rows.append((int(start), int(stop)))
        done.counted += found


def _begin(line: Any) -> dict[str, Any]:
    if not isinstance(line["conversion"], str) or not isinstance(line["task"], str):
        raise ValueError("its first line is another one's")
    return {key: line[key] for key in ("conversion", "source", "task")}


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
