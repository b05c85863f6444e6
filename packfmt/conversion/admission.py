"""Whether a conversion may begin: the destination, the disk and the memory that there are."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

from packfmt import checkpoint, exporters
from packfmt.checkpoint import Checkpoint
from packfmt.codec import dense_dtype, matrix
from packfmt.conversion.steps import least_held, rows_at_once
from packfmt.errors import ContainerError, MachineError, PlanError
from packfmt.exporters.whole import partial_of
from packfmt.plan import Plan

SPARE = 1 << 20  # bytes of disk wanted beside the tensors, for headers
BLOCK = 512  # bytes that st_blocks counts
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, in Linux
UNKNOWN = 8 << 30  # bytes of memory, where the system does not say


def memory_for(plan: Plan, asked: int = 0) -> int:
    """Bytes that a conversion may hold: what was asked for, or a quarter of the machine's, or what a tensor needs.

    Raises
    ------
    PlanError
        If the rows of a tensor that must be seen together need more than was asked for, or than the machine has.
    """
    largest = max(plan.steps, key=least_held, default=None)
    need, machine = least_held(largest) if largest else 0, of_machine()
    most = asked or machine
    if largest and need > most:
        whose = "--memory" if asked else "the machine's"
        more = f"say --memory {need}" if asked else "take a machine with more memory"
        count, rows = rows_at_once(largest), matrix(largest.shape)[0]
        if 0 < count < rows:
            few = f", even for {count} rows, as few as its layout allows" if count > 1 else ", even for one row"
        else:
            few = f", for its layout or encoder ({largest.layout.name}) must see all rows together"
            more += ", or choose another with --map"
        needed = f"{need:,} bytes are needed at once, {whose} {most:,} are fewer"
        raise PlanError(f"{largest.name}: {needed}{few}; {more}")
    return asked or max(machine // 4, need)


def of_machine() -> int:
    """Bytes of memory that this process may have, as the system or its container's limit says."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [UNKNOWN]
    for limit in LIMITS:
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such limit: "max"
            continue
    return min(n for n in found if n > 0)


def may_write(plan: Plan, model: Checkpoint, target: Path, force: bool) -> None:
    """Refuse a target that exists, is or holds the source, lies nowhere, or has no room.

    Raises
    ------
    PlanError, MachineError
    """
    files = {i.file.resolve() for i in model.index.values()} | {model.path.resolve()}
    here = target.resolve()
    if any(f == here or here in f.parents for f in files) or _same_file(target, model.path):
        raise PlanError(f"{target}: is the source or holds it; choose another destination")
    if model.path.is_dir() and model.path.resolve() in here.parents:
        raise PlanError(f"{target}: lies in the source, which would carry it along; choose another destination")
    if target.exists() and not force:
        raise PlanError(f"{target}: exists; choose another destination or say --force to replace it")
    one_file = target.suffix in exporters.SUFFIXES.values() or plan.container == "gguf"
    if target.exists() and target.is_dir() == one_file:
        there, wanted = ("a folder", "a file") if one_file else ("a file", "a folder")
        raise PlanError(f"{target}: is {there}, and {wanted} is to be written; choose another destination")
    if target.is_dir() and not _replaceable(target):
        raise PlanError(
            f"{target}: a folder that is not known to be packfmt's, or that another ecosystem's reader loads: it may "
            "be the only copy of a model, so --force does not replace it; remove it first, or choose another place"
        )
    folder = target.absolute().parent
    if not folder.is_dir():
        raise PlanError(f"{folder}: no such folder; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MachineError(f"{folder}: may not be written; change its permissions, or choose another place")
    # what an earlier run wrote is counted twice otherwise
    partial = partial_of(target)
    written = [partial, *partial.rglob("*"), *folder.glob(f"{glob.escape(partial.name)}.stream.*")]
    free = shutil.disk_usage(folder).free + sum(_allocated(path) for path in written)
    need = plan.nbytes + (0 if one_file else side_files(model)) + SPARE
    if need > free:
        room = "make room, or choose another place"
        raise MachineError(f"{folder}: {free:,} bytes free, this conversion needs {need:,}; {room}")


def side_files(model: Checkpoint) -> int:
    """Bytes of a model's side files.

    Raises
    ------
    MachineError
        If one cannot be read.
    """
    total = 0
    for path in model.extras.files.values():
        try:
            with path.open("rb") as file:
                file.read(1)
                total += os.fstat(file.fileno()).st_size
        except OSError as error:
            what = f"a side file that cannot be read: {error.strerror}"
            raise MachineError(f"{path}: {what}; mend or remove it") from error
    return total


def _allocated(path: Path) -> int:
    """Bytes of disk that a file takes; 0 of what is no file."""
    return int(getattr(path.stat(), "st_blocks", 0)) * BLOCK if path.is_file() else 0


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and os.path.samefile(a, b)


def _replaceable(folder: Path) -> bool:
    """Whether --force may delete a folder: it is empty, or its config.json or weights are packfmt's."""
    if not any(folder.iterdir()):
        return True
    try:
        with checkpoint.open(folder) as old:
            # a folder that is quantised in a way of Hugging Face's may be the only copy of a model
            return any(i.layout and not dense_dtype(i.layout) and i.kind == i.layout.name for i in old.index.values())
    except ContainerError:
        return False
