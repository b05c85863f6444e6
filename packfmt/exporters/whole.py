"""An output appears under its name only when whole: written as *.partial, synced, checked, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from packfmt.errors import ContainerError

Check = Callable[[Path], None]  # is given the finished partial output; raises to refuse it


@contextmanager
def whole_file(path: Path, check: Check | None = None) -> Iterator[BinaryIO]:
    """A new binary file that gets its name at the end of the block; removed if the block or `check` fails.

    Raises
    ------
    ContainerError
        If another run's partial file is in the way.
    """
    partial = _partial(path)
    # An interrupt may fall between the making of the file and anything that knows of it.
    mine = not partial.exists()
    try:
        with partial.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(partial)
        os.replace(partial, path)
    except BaseException as error:
        if isinstance(error, FileExistsError) and not mine:
            raise _in_the_way(partial) from error
        if mine:
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path, check: Check | None = None) -> Iterator[Path]:
    """A new folder that gets its name at the end of the block; removed if the block or `check` fails.

    An existing folder at `path` is replaced: it is set aside, and deleted when the new one has its name.
    """
    partial, aside = _partial(path), path.with_name(path.name + ".replaced")
    mine = not partial.exists()  # as in `whole_file`
    try:
        partial.mkdir()
        yield partial
        sync_folder(partial)
        if check:
            check(partial)
        if path.exists():
            os.replace(path, aside)
        os.replace(partial, path)
    except BaseException as error:
        if isinstance(error, FileExistsError) and not mine:
            raise _in_the_way(partial) from error
        if mine:
            shutil.rmtree(partial, ignore_errors=True)
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _in_the_way(partial: Path) -> ContainerError:
    return ContainerError(f"{partial}: another conversion writes here, or one was killed; remove it and repeat")


def sync_folder(path: Path) -> None:
    """Make a rename in this folder last through a power failure, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
