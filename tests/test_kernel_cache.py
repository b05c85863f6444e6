"""Compiled kernels in files: processes that fill them at once, and files of other versions."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import pkgutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from numba import config, types
from numba.core import caching
from numba.core.dispatcher import Dispatcher

import packfmt
from packfmt import kernels
from packfmt.kernels import cache
from packfmt.kernels.cache import Files, njit

ROOT = Path(__file__).parents[1]
STAMP = (1.5, 100)
KEYS = [((f"Form({i})",), ("x86_64", "some processor"), ("body", "closure")) for i in range(150)]
FILL = """
import random, sys
from tests.test_kernel_cache import KEYS, Files, STAMP
folder, seed = sys.argv[1:]
files = Files(folder, "f-1.py311", STAMP)
random.Random(seed).shuffle(KEYS)
print("ready", flush=True)
sys.stdin.readline()
for key in KEYS:
    if files.load(key) is None:
        files.save(key, ("code of", key[0]))
"""


FIRST = """
import json, pickle, sys
import packfmt
from hashlib import sha256
from numba.core.event import install_recorder
with open(sys.argv[1], "rb") as file:
    x, *weights = pickle.load(file)
with install_recorder("numba:compile") as compiled:
    found = [packfmt.prepare(packed).matmul(x).tobytes() for packed in weights]
learnt = "numba.np.arrayobj" in sys.modules
print(json.dumps([len(compiled.buffer), learnt, [sha256(product).hexdigest() for product in found]]))
"""


class Field:
    """What unpickles in this version alone."""


@njit(cache=True, nogil=True)
def _twice(x):
    return 2 * x


def test_two_processes_that_fill_a_cache_at_once_leave_each_kernel_its_own_code(tmp_path):
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    both = [
        subprocess.Popen([*command, seed], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in "12"
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate()
        assert process.returncode == 0
    files = Files(str(tmp_path), "f-1.py311", STAMP)
    assert [files.load(key) for key in KEYS] == [("code of", key[0]) for key in KEYS]


def test_code_of_another_source_or_another_kernel_is_not_used(tmp_path):
    files = Files(str(tmp_path), "f-1.py311", STAMP)
    assert files.load(KEYS[0]) is None
    files.save(KEYS[0], "code")
    assert files.load(KEYS[0]) == "code"
    assert Files(str(tmp_path), "f-1.py311", (2.5, 100)).load(KEYS[0]) is None
    (written,) = tmp_path.iterdir()
    written.rename(tmp_path / files._name(KEYS[1]))
    assert files.load(KEYS[1]) is None


def test_a_file_that_no_longer_unpickles_is_compiled_anew(tmp_path, monkeypatch):
    files = Files(str(tmp_path), "f-1.py311", STAMP)
    files.save(KEYS[0], Field())
    assert isinstance(files.load(KEYS[0]), Field)
    monkeypatch.delattr(sys.modules[__name__], "Field")
    with pytest.raises(AttributeError):
        pickle.loads(next(tmp_path.iterdir()).read_bytes()[cache.DIGEST :])
    assert files.load(KEYS[0]) is None
    files.save(KEYS[0], "code")
    next(tmp_path.iterdir()).write_bytes(b"\x80\x05cut short")
    assert files.load(KEYS[0]) is None


def test_a_file_in_which_one_bit_has_changed_is_compiled_anew(tmp_path):
    files = Files(str(tmp_path), "f-1.py311", STAMP)
    files.save(KEYS[0], "code")
    (path,) = tmp_path.iterdir()
    written = path.read_bytes()
    for place in range(len(written)):
        damaged = bytearray(written)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert files.load(KEYS[0]) is None, f"byte {place} of {len(written)}"
    path.write_bytes(written)
    assert files.load(KEYS[0]) == "code"


def test_code_of_other_kernel_modules_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    texts = {
        "cache": "1",
        "doors": '"""Doors."""\n\nfrom packfmt.kernels import cache, loops\nfrom packfmt.kernels.tables import STEPS\n',
        "loops": "from packfmt.kernels.vectors import (\n    add,\n    sub,\n)\n",
        "tables": "STEPS = 4\n",
        "vectors": "from packfmt.kernels import (\n    bits,\n    loops,\n)\n",
        "bits": "import packfmt.errors\n",
        "errors": "",
    }

    def digest():
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        cache._read.cache_clear()
        return cache.digest(tmp_path / "doors.py")

    before = digest()
    for name, counts in {"cache": 0, "doors": 1, "loops": 1, "tables": 1, "vectors": 1, "bits": 1, "errors": 0}.items():
        texts[name] += "# changed\n"
        after = digest()
        assert (before != after) == counts, name
        before = after
    cache._read.cache_clear()


def test_code_for_another_level_or_without_bounds_checks_has_another_key(monkeypatch):
    if not isinstance(_twice, Dispatcher):
        pytest.skip("Numba compiles nothing here")

    def key():
        return _twice._cache._index_key((types.int64,), _twice.targetctx.codegen())

    assert key()[-2:] == (os.environ.get("PACKFMT_SIMD", ""), bool(config.BOUNDSCHECK))
    keys = set()
    for settings in [("", False), ("portable", False), ("", True), ("portable", True)]:
        monkeypatch.setattr(cache, "SETTINGS", settings)
        keys.add(key())
    assert len(keys) == 4


def test_flushing_deletes_the_forms_of_one_function_alone(tmp_path):
    files, other = (Files(str(tmp_path), f"{name}-1.py311", STAMP) for name in "fg")
    for key in KEYS[:3]:
        files.save(key, "code")
        other.save(key, "code")
    files.flush()
    assert [files.load(key) for key in KEYS[:3]] == [None] * 3
    assert [other.load(key) for key in KEYS[:3]] == ["code"] * 3


@pytest.mark.kernels
def test_a_function_is_compiled_and_kept():
    assert _twice(3) == 6
    if isinstance(_twice, Dispatcher):  # else Numba is told to compile nothing
        assert isinstance(_twice._cache._cache_file, Files)


def test_all_kernels_are_kept_so():
    names = [
        m.name for m in pkgutil.iter_modules(kernels.__path__, "packfmt.kernels.") if not m.name.endswith(".cache")
    ]
    assert names
    for name in names:
        module = importlib.import_module(name)
        assert "numba import njit" not in Path(module.__file__).read_text(), f"{name}: take njit from kernels.cache"
        for value in vars(module).values():
            if isinstance(value, Dispatcher):
                assert isinstance(value._cache._cache_file, Files), f"{name}: {value} is kept by Numba's own files"


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="Numba compiles nothing here")
def test_a_fresh_process_with_a_filled_cache_compiles_nothing_and_learns_nothing_of_compiling(tmp_path):
    rng = np.random.default_rng(5)
    weight, x = rng.standard_normal((48, 512), np.float32), rng.standard_normal((1, 512), np.float32)
    weights = [packfmt.pack(weight, layout) for layout in ("sherry", "q4_0")]
    (tmp_path / "weights").write_bytes(pickle.dumps((x, *weights)))

    def first():
        command = [sys.executable, "-c", FIRST, str(tmp_path / "weights")]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kept"), "PACKFMT_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        return json.loads(run.stdout)

    compiled, learnt, products = first()
    assert compiled and learnt
    assert products == [sha256(packed.matmul(x).tobytes()).hexdigest() for packed in weights]
    assert first() == [0, False, products]


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="Numba compiles nothing here")
def test_where_no_folder_may_be_written_compiled_code_is_kept_among_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def twice(n):
        return 2 * n

    assert njit(cache=True, nogil=True)(twice)(21) == 42
    (private,) = tmp_path.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700 and list(private.rglob("*.nbc"))
    private.chmod(0o777)  # anybody could put code there
    monkeypatch.setattr(config, "CACHE_DIR", "")
    assert njit(cache=True, nogil=True)(twice)(21) == 42
    assert config.CACHE_DIR == ""
