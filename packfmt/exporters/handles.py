"""Files that are read: a model may have more of them than a process may have open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from packfmt.errors import ContainerError

OPEN = 64  # files kept open, of those that nobody reads


@dataclass(slots=True)
class _Open:
    """An open file, and how many read it now."""

    handle: int
    users: int = 0


class Handles:
    """Descriptors of files, opened when they are asked for, and closed when others are. Threads may ask at once."""

    def __init__(self) -> None:
        self._open: dict[Path, _Open] = {}  # the last used at the end
        self._seen: dict[Path, tuple[int, ...]] = {}  # of each file, what tells it from another of its name
        self._lock = Lock()

    @contextmanager
    def of(self, path: Path) -> Iterator[int]:
        """A file's descriptor, which is not closed meanwhile.

        Raises
        ------
        OSError
            If it cannot be opened, or read by who asked; with its name.
        ContainerError
            If it is another one than when it was opened first.
        """
        with self._lock:
            file = self._open.pop(path, None) or _Open(self._opened(path))
            self._open[path] = file
            file.users += 1
            self._close_idle()
        try:
            yield file.handle
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        finally:
            with self._lock:
                file.users -= 1

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].handle)

    def _opened(self, path: Path) -> int:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        found = os.fstat(handle)
        which = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._seen.setdefault(path, which) != which:
            os.close(handle)
            raise ContainerError(f"{path}: was replaced or written to while it was read", "PF101")
        return handle

    def _close_idle(self) -> None:
        for path in [path for path, file in self._open.items() if not file.users][: max(0, len(self._open) - OPEN)]:
            os.close(self._open.pop(path).handle)
