"""Numba's `njit`, with compiled code kept in files that several processes may fill at once.

Numba gives compiled code the next free number, in an index that is written apart: two processes can give one number to
two functions, which then stay mistaken for each other. Here a file is named after what it holds, and says so inside.
Numba compiles anew when the file changes that a function stands in. Here it does also when a kernel module changes
from which that file imports, for compiled code has parts of those.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import tempfile
from collections.abc import Callable, Hashable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import llvmlite
import numba
from llvmlite.binding import add_symbol
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.runtime import _nrt_python  # type: ignore[attr-defined]

Function = Callable[..., Any]
DIGEST: Final = 32  # bytes of SHA-256, which a file begins with
IMPORTS: Final = re.compile(rb"^from packfmt\.kernels(?:\.(\w+))? import (?=\(?([\w\s,]*))", re.MULTILINE)
SETTINGS: Final = os.environ.get("PACKFMT_SIMD", ""), bool(numba.config.BOUNDSCHECK)  # type: ignore[attr-defined]


def njit(**options: Any) -> Callable[[Function], Function]:
    """`numba.njit` of these options, the compiled code in `Files` if it is to be kept."""
    keep = options.pop("cache", False)

    def decorated(function: Function) -> Function:
        made: Any = numba.jit(nopython=True, **options)(function)
        if keep and made is not function:  # as it is where Numba compiles nothing
            made._cache = _kept(function)
        return made

    return decorated


def _kept(function: Function) -> FunctionCache | NullCache:
    try:
        return Kept(function)
    except RuntimeError:  # neither the package's folder nor the user's may be written: read-only containers
        config: Any = numba.config
        config.CACHE_DIR = _private_folder()
        return Kept(function) if config.CACHE_DIR else NullCache()


class Kept(FunctionCache):
    """The compiled forms of one function, loaded by a context that knows nothing yet.

    Numba has a context learn all that can be compiled before it loads what has been, which takes ten times as long
    as a kernel takes to load. Compiled code asks for no more than the run-time system's addresses.

    Source: Numba 0.68.1, numba/core/caching.py, numba/core/runtime/nrt.py
    """

    def __init__(self, function: Function) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp(), llvmlite.__version__, digest(Path(function.__code__.co_filename))
        self._cache_file = Files(self.cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The code for these types of arguments; None if it is not kept."""
        _know_runtime()
        return self._load_overload(signature, context)

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Hashable, ...]:
        """What the code depends on beside sources: the arguments' types, the processor, what the function encloses."""
        return (*super()._index_key(signature, codegen), *SETTINGS)


def digest(file: Path) -> str:
    """Of a file's text and of the kernel modules from which it imports, and those from which they do."""
    found, left = dict[Path, bytes](), {file}
    while left:
        path = left.pop()
        found[path], beside = _read(path)
        left |= beside - found.keys()
    return sha256(b"".join(found[path] for path in sorted(found))).hexdigest()


@cache
def _read(path: Path) -> tuple[bytes, frozenset[Path]]:
    """The digest of one file's text, and the kernel modules that it names in imports."""
    text, folder = path.read_bytes(), Path(__file__).parent
    named = {f"{name.decode()}.py" for pair in IMPORTS.findall(text) for name in re.findall(rb"\w+", b" ".join(pair))}
    beside = named.intersection(os.listdir(folder)) - {"cache.py"}
    return sha256(text).digest(), frozenset(folder / name for name in beside)


@cache
def _know_runtime() -> None:
    """What `rtsys.initialize` does for code that is not compiled here."""
    for name, address in _nrt_python.c_helpers.items():
        add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


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
        except Exception:  # no such file, a damaged one, or one of another version, with other classes: compile it anew
            return None
        return data if known == [self._version, self._source_stamp, key] else None

    def _dump(self, data: Any) -> bytes:
        pickled = bytes(super()._dump(data))
        return sha256(pickled).digest() + pickled

    def _load_data(self, name: str) -> Any:
        found = Path(self._data_path(name)).read_bytes()
        if sha256(found[DIGEST:]).digest() != found[:DIGEST]:  # whatever else it does, damaged code would be run
            raise ValueError(f"{name} is not as it was written")
        return pickle.loads(found[DIGEST:])

    def flush(self) -> None:
        """Delete all forms."""
        for path in Path(self._cache_path).glob(f"{self._base}.*.nbc"):
            path.unlink(missing_ok=True)

    def _name(self, key: Hashable) -> str:
        return f"{self._base}.{sha256(repr(key).encode()).hexdigest()[:32]}.nbc"
