"""Numba's `njit`, with compiled code kept in files that several processes may fill at once.

Numba gives compiled code the next free number, in an index that is written apart: two processes can give one number to
two functions, which then stay mistaken for each other. Here a file is named after what it holds, and says so inside.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Hashable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import IndexDataCacheFile

Function = Callable[..., Any]


def njit(**options: Any) -> Callable[[Function], Function]:
    """`numba.njit` of these options, the compiled code in `Files` if it is to be kept."""

    def decorated(function: Function) -> Function:
        try:
            made: Any = numba.jit(nopython=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's may be written: read-only containers
            config: Any = numba.config
            config.CACHE_DIR = _private_folder()
            options["cache"] = bool(config.CACHE_DIR)
            made = numba.jit(nopython=True, **options)(function)
        if options.get("cache") and hasattr(made, "_cache"):  # it has none where Numba compiles nothing
            kept = made._cache
            kept._cache_file = Files(kept.cache_path, kept._impl.filename_base, kept._impl.locator.get_source_stamp())
        return made

    return decorated


def _private_folder() -> str:
    """A folder among the temporary files that nobody else may write; empty if there is none."""
    folder = Path(tempfile.gettempdir()) / f"packfmt-{getattr(os, 'getuid', int)()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return ""
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == getattr(os, "getuid", int)() and not found.st_mode & 0o022
    return str(folder) if mine else ""


class Files(IndexDataCacheFile):
    """The compiled forms of one function, a file each, without an index.

    cache_path, filename_base : str, the folder and what files' names begin with
    source_stamp : what changes with the function's source

    Source: Numba 0.68.1, numba/core/caching.py
    """

    def __init__(self, cache_path: str, filename_base: str, source_stamp: Hashable) -> None:
        super().__init__(cache_path, filename_base, source_stamp)
        self._base = filename_base

    def save(self, key: Hashable, data: Any) -> None:
        """Write the code of one form, known by its key, under another name first."""
        self._save_data(self._name(key), (self._version, self._source_stamp, key, data))

    def load(self, key: Hashable) -> Any:
        """The code of one form; None if there is none of this source and version."""
        try:
            *known, data = self._load_data(self._name(key))
        except Exception:  # no such file, or one of another version, whose classes may have changed: compile it anew
            return None
        return data if known == [self._version, self._source_stamp, key] else None

    def flush(self) -> None:
        """Delete all forms."""
        for path in Path(self._cache_path).glob(f"{self._base}.*.nbc"):
            path.unlink(missing_ok=True)

    def _name(self, key: Hashable) -> str:
        return f"{self._base}.{sha256(repr(key).encode()).hexdigest()[:32]}.nbc"
