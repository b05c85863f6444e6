"""An output appears under its name only when whole: written as *.partial, synced, checked, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

Check = Callable[[Path], None]  # is given the finished partial output; raises to refuse it


def partial_of(path: Path) -> Path:
    """Where an output is written before it has its name."""
    return path.with_name(path.name + ".partial")


def aside_of(path: Path) -> Path:
    """Where a folder that is replaced is, until the new one has its name."""
    return path.with_name(f".{path.name}.replaced")  # not `partial_of` and more, which users are told to remove


def give_name(path: Path) -> None:
    """Let the finished partial output have its name; what had it is replaced, and deleted once it is.

    A power failure at any moment leaves the old or the new output under the name, or the new one as `partial_of`.
    """
    partial, aside = partial_of(path), aside_of(path)
    if partial.is_dir():
        sync_folder(partial)
        if path.exists():
            os.replace(path, aside)
        try:
            os.replace(partial, path)
        except BaseException:
            if aside.exists():
                os.replace(aside, path)
            raise
    else:
        os.replace(partial, path)
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make names in this folder last through a power failure, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
