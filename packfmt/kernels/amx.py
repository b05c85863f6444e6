"""Intel's matrix tiles (AMX, int8): the instructions, and whether they may be used here.

A tile is a register of up to 16 rows of 64 bytes. TDPBSSD adds to a tile of int32 the product of a tile of rows
and a tile of columns, in which the four bytes of a dword follow each other along the depth.

Three things must hold before one is touched: the compiler knows the instructions, the kernel lets the process
have the registers, and they work. The last is not certain where the other two hold, for a virtual machine may
announce what it does not run, and then the first instruction kills the process. So a child process tries it, and
the answer is written down for all later processes.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual (LDTILECFG, TDPBSSD, TILELOADD, TILESTORED);
Linux, Documentation/arch/x86/xstate.rst and arch/x86/include/uapi/asm/prctl.h
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from packfmt.kernels import simd
from packfmt.kernels.cache import njit

NEEDED = {"amx-tile", "amx-int8", "avx512f", "avx512bw", "avx512vbmi", "avx512vbmi2", "avx512vnni"}
ROWS = 16  # of a tile
ROW_BYTES = 64
TILES = 8
ARCH_PRCTL = 158  # the number of the call, and what it is asked (asm/prctl.h)
ASK_FOR = 0x1023
TILE_DATA = 18
SECONDS = 60  # that the child may take; it compiles a few lines
PROOF = "the product of two tiles is right"
# With the paths of this process, and no core file if it dies.
DEADLY = {"SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGTRAP"}  # what an instruction that does not work ends with
TRIAL = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.path[:] = json.loads(sys.argv[1])
from packfmt.kernels import amx
print(amx.try_here(), flush=True)
"""

_INT8, _INT64 = ir.IntType(8), ir.IntType(64)
_BYTES = _INT8.as_pointer()
_answer: bool | None = None  # of this process; a forked one inherits permission and answer
_asking: threading.Lock


def _renew() -> None:
    """A forked process does not have the thread that may be asking."""
    global _asking
    _asking = threading.Lock()


_renew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def configuration(depth: int) -> np.ndarray:
    """What LDTILECFG loads: tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.

    depth : bytes of a row, a multiple of 4, up to 64

    Returns
    -------
    (64,) uint8: palette 1, bytes of a row of each tile from byte 16, rows of each tile from byte 48
    """
    told = np.zeros(64, np.uint8)
    told[0] = 1
    told[16:32].view("<u2")[:] = [ROW_BYTES] * 4 + [depth] * 2 + [ROW_BYTES] * 2
    told[48 : 48 + TILES] = [ROWS] * 6 + [depth // 4] * 2
    return told


def place(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """A pointer to byte `at` of a contiguous array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(builder.bitcast(data, _BYTES), [at])


def instruct(builder: Any, name: str, *operands: Any) -> None:
    """One of LLVM's x86 tile instructions; a Python int is the number of a tile."""
    values = [ir.Constant(_INT8, v) if isinstance(v, int) else v for v in operands]
    kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


@intrinsic
def configure(typing, told):
    """Load `configuration` for this thread; all tiles are zero afterwards."""

    def code(context, builder, signature, args):
        instruct(builder, "ldtilecfg", place(context, builder, signature.args[0], args[0], ir.Constant(_INT64, 0)))
        return context.get_dummy_value()

    return types.void(told), code


@intrinsic
def release(typing):
    """Give the tiles back, so that this thread's state is small again wherever it is saved."""

    def code(context, builder, signature, args):
        instruct(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def _product(typing, rows, columns, sums):
    """sums = rows times columns, one tile each."""

    def code(context, builder, signature, args):
        start, stride = ir.Constant(_INT64, 0), ir.Constant(_INT64, ROW_BYTES)
        a, b, c = (place(context, builder, k, v, start) for k, v in zip(signature.args, args, strict=True))
        instruct(builder, "tilezero", 0)
        instruct(builder, "tileloadd64", 4, a, stride)
        instruct(builder, "tileloadd64", 6, b, stride)
        instruct(builder, "tdpbssd", 0, 4, 6)
        instruct(builder, "tilestored64", 0, c, stride)
        return context.get_dummy_value()

    return types.void(rows, columns, sums), code


@njit(cache=True, nogil=True)
def _try(told, rows, columns, sums):
    configure(told)
    _product(rows, columns, sums)
    release()


def try_here() -> str:
    """Multiply two tiles in this process, which may kill it; `PROOF` if the result is right."""
    if not compiled_for() or not permitted():
        return "no"
    chance = np.random.Generator(np.random.PCG64(1))
    rows, columns = chance.integers(-128, 128, (2, ROWS, ROW_BYTES), np.int8)
    sums = np.empty((ROWS, ROWS), np.int32)
    _try(configuration(ROW_BYTES), rows, columns, sums)
    depth_first = columns.reshape(ROWS, ROWS, 4).transpose(0, 2, 1).reshape(ROW_BYTES, ROWS)
    return PROOF if np.array_equal(sums, rows.astype(np.int32) @ depth_first.astype(np.int32)) else "wrong"


def available() -> bool:
    """Whether kernels may use the tiles here; the first call of a machine takes a second or two.

    PACKFMT_AMX=0 says no; so does PACKFMT_SIMD where it asks for less than this processor has.
    """
    global _answer
    if os.environ.get("PACKFMT_AMX") == "0" or not compiled_for():
        return False
    if _answer is None:
        with _asking:
            if _answer is None:
                _answer = permitted() and _works()
    return _answer


def compiled_for() -> bool:
    """Whether Numba compiles for a processor with the tiles, and nothing slower was asked for."""
    return not simd.INTERPRETED and simd.LEVEL == "avx512vnni" and simd.FEATURES >= NEEDED


def permitted() -> bool:
    """Ask Linux for the registers: once a process, for all its threads, also those that run already.

    Refused where the kernel or a hypervisor has none, or where a thread handles signals on a stack too small
    to save them.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ASK_FOR, TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


def _works() -> bool:
    """The remembered answer for this machine, or a child's."""
    machine = _machine()
    note = _note(machine)
    known = _read(note)
    if known in (_told(machine, True), _told(machine, False)):
        return known == _told(machine, True)
    works = _child()
    if works is not None:
        _write(note, _told(machine, works))
    return bool(works)


def _command() -> list[str]:
    """What tries the tiles in a process of its own."""
    paths = [path for path in sys.path if isinstance(path, str)]  # imports ignore all others
    return [sys.executable, "-P", "-c", TRIAL, json.dumps(paths)]


def _child() -> bool | None:
    """Whether a child multiplied two tiles and lived; None if there is no telling, and none to write down.

    A child that has no memory or cannot import, or that somebody ends, says nothing of this machine.
    """
    if getattr(sys, "frozen", False) or not Path(sys.executable or "").name.startswith("python"):
        return None  # the executable is an application, which would start once more
    try:
        done = subprocess.run(_command(), stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:
        return False if -done.returncode in {getattr(signal, name) for name in DEADLY} else None
    return done.stdout.decode(errors="replace").strip() == PROOF


def _machine() -> str:
    """What the answer depends on."""
    processor = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].splitlines()
        kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
        processor = "\n".join(line for line in lines if line.partition(":")[0].strip() in kept)
    parts = [processor, platform.release(), platform.version(), numba.__version__, TRIAL, _version()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _version() -> str:
    """Of packfmt, which is loaded where this runs; kernels import nothing of it."""
    return str(getattr(sys.modules.get("packfmt"), "__version__", ""))


def _told(machine: str, works: bool) -> str:
    return f"packfmt amx 1\n{machine}\n{'works' if works else 'fails'}\n"


def _note(machine: str) -> Path:
    """The file with the answer, in the user's folder of caches."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(asked) if os.path.isabs(asked) else Path(os.path.expanduser("~/.cache"))
    return folder / "packfmt" / f"amx-{machine[:16]}"


def _read(note: Path) -> str:
    """What the file says, or nothing unless it is a plain short file that only this user may write."""
    try:
        handle = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return ""
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
            return ""
        return os.read(handle, 4096).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(handle)


def _write(note: Path, text: str) -> None:
    """Whole or not at all; a folder that may not be written is no error, for the child can be asked again."""
    part = note.with_name(f"{note.name}.{os.getpid()}.partial")
    with suppress(OSError, ValueError):
        note.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(part, note)
        finally:
            with suppress(OSError):
                part.unlink()
