"""What is done of a conversion, in a file beside the partial output, so that one that was stopped can go on.

A journal is lines of JSON. The first says what is converted; if any of it has changed, the rest means nothing. The
others say which rows of which tensor are in the output, and which tensors are whole, with their checksums. A line is
written when what it says has been synced: after a power failure, too, all of it is true.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping
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


def path_of(target: Path, task: Task = ALONE) -> Path:
    """Where the journal of a task is."""
    partial = partial_of(target)
    which = "" if task.count == 1 else f".{task.number}of{task.count}"
    return partial.with_name(partial.name + JOURNAL + which)


def all_of(target: Path) -> list[Path]:
    """The journals there are of an output."""
    partial = partial_of(target)
    return sorted(p for p in partial.parent.glob(f"{glob.escape(partial.name)}{JOURNAL}*") if p.is_file())


def remove(target: Path) -> None:
    """Delete the journals of an output."""
    for path in all_of(target):
        path.unlink(missing_ok=True)


class Journal:
    """An open journal, which no other process may open for writing meanwhile."""

    def __init__(self, path: Path, begin: Mapping[str, Any], done: dict[int, Done], length: int) -> None:
        self.path, self.done = path, done
        self._file = path.open("r+b" if length else "w+b")
        try:
            _lock(self._file.fileno(), path)
            self._file.truncate(length)
            self._file.seek(length)
            if not length:
                self._append([begin])
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def start(cls, path: Path, begin: Mapping[str, Any]) -> Journal:
        """A new journal. `begin`: what is converted, plain data."""
        return cls(path, begin, {}, 0)

    @classmethod
    def resume(cls, path: Path, begin: Mapping[str, Any]) -> Journal:
        """The journal that is there, or a new one.

        Raises
        ------
        PlanError
            If it is of another conversion; what has changed is said.
        """
        if not path.exists():
            return cls.start(path, begin)
        told, done, length = read(path)
        if told and (changed := _changed(told, plain(begin))):
            raise PlanError(f"{path}: cannot go on: {changed}; remove it and what was written, or do as before")
        return cls(path, begin, done, length)

    def add(self, lines: Iterable[tuple[int, Any]]) -> None:
        """Note what is done: rows (start, stop, counted) of a step, or all its checksums. All of it is synced."""
        self._append([{"step": at, **what} for at, what in lines])

    def _append(self, records: list[Mapping[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> tuple[dict[str, Any], dict[int, Done], int]:
    """What a journal says: what is converted, what is done of each step, and the length of its whole lines.

    Raises
    ------
    ContainerError
        If it is no journal.
    """
    text, length = path.read_bytes(), 0
    done: dict[int, Done] = {}
    begin: dict[str, Any] = {}
    for line in text.split(b"\n")[:-1]:  # the last line may have been cut off
        try:
            record = json.loads(line)
            if not begin:
                begin = dict(record["conversion"]) and record
            else:
                _note(done.setdefault(int(record["step"]), Done()), record)
        except (ValueError, KeyError, TypeError) as error:
            raise ContainerError(f"{path}: no journal of a conversion: {error}") from error
        length += len(line) + 1
    return begin, done, length


def plain(record: Mapping[str, Any]) -> Any:
    """A record as it is when it has been in a journal."""
    return json.loads(json.dumps(record))


def _note(done: Done, record: Mapping[str, Any]) -> None:
    if "sums" in record:
        done.sums = {str(k): str(v) for k, v in record["sums"].items()}
    else:
        start, stop = record["rows"]
        done.rows.append((int(start), int(stop)))
        done.counted += int(record["counted"])


def _changed(was: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str:
    """The first thing that two records differ in, in words."""
    for key in dict.fromkeys((*was, *now)):
        a, b = was.get(key), now.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return _changed(a, b, f"{where}{key}: ")
        return f"{where}{key} was {_short(a)}, now {_short(b)}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else f"{text[:80]}..."


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks: two conversions to one place are the user's to avoid
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise MachineError(f"{path}: another conversion writes here now") from error
    except OSError:  # a file system without locks
        return
