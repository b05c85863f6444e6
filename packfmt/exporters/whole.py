"""A file appears under its name only when whole: written as *.partial, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from packfmt.errors import ContainerError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that gets its name at the end of the block; removed if the block fails.

    Raises
    ------
    ContainerError
        If another run's partial file is in the way.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        file = partial.open("x+b")
    except FileExistsError as error:
        raise ContainerError(f"{partial}: another conversion writes here or was killed; remove it and repeat") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename in this folder last through a power failure, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
