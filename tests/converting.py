"""Conversions in processes that are killed, and what they leave."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from packfmt.conversion import work

ROOT = Path(__file__).parent.parent
SLICE = 20_000  # bytes that a slice holds, so that small tensors have many


def hashes(path: Path) -> dict[str, str]:
    """A file's hash, or those of a folder's files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    return {os.path.relpath(f, path): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def beside(target: Path) -> list[str]:
    """What lies beside a target and has a name that begins like its own."""
    return sorted(p.name for p in target.parent.glob(f"{target.name}*") if p != target)


def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ROOM", SLICE)


def in_a_fresh_process(function: FunctionType, *arguments: object, **environment: str) -> str:
    """Call a test module's function in a process that has one thread, and so can be forked; what it prints.

    Arguments are given as text.
    """
    words = ", ".join(repr(str(a)) for a in arguments)
    code = f"import tests.{function.__module__.split('.')[-1]} as m; m.{function.__name__}({words})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PACKFMT_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def forked(do: Callable[[], Any], kill_after: float | None = None) -> int:
    """Do something in a forked process, kill it after so many seconds; how it ended: 0, or -9 if it was killed."""
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.environ["PACKFMT_THREADS"] = "2"
            os.write(tell, b"!")
            do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(count: int = 3, rows: int = 96, cols: int = 256) -> dict[str, np.ndarray]:
    """Matrices and norms of some layers; queries and keys share a scale where a layout has one for a tensor."""
    rng = np.random.default_rng(count)
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    model = {
        f"layers.{i}.{kind}.weight": rng.normal(0, 0.02, (rows + 32 * i, cols)).astype(np.float32)
        for i in range(count)
        for kind in kinds
    }
    return {**model, **{f"layers.{i}.norm.weight": np.ones(cols, np.float32) for i in range(count)}}
