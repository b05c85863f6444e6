"""What is converted: the plan, and by what everything that goes into the output is recognised.

It stands in a file beside the partial output. Journals begin with the digest of that file, so that it is opened only
to say what has changed, or by who has nothing but what tasks have left. Who knows what is converted writes it again if
it is lost or damaged.
"""

from __future__ import annotations

import glob
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from packfmt.exporters.whole import partial_of, sync_folder

PLAN = ".plan"
Conversion = Mapping[str, Any]


def path_of(target: Path) -> Path:
    """Where it stands what is converted."""
    partial = partial_of(target)
    return partial.with_name(partial.name + PLAN)


def text_of(conversion: Conversion) -> bytes:
    """What stands in the file."""
    return json.dumps(conversion, separators=(",", ":")).encode()


def digest_of(text: bytes) -> str:
    """What journals know the text by."""
    return sha256(text).hexdigest()


def write(target: Path, text: bytes) -> None:
    """Let the file have this text. Several processes may write the same text at the same time."""
    path = path_of(target)
    mine = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with mine.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(mine, path)
    except BaseException:
        mine.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read(target: Path, digests: Collection[str]) -> tuple[str, Conversion] | None:
    """The digest and what is converted, if it is one of these; None if the file is lost, damaged or of another one."""
    text = _text(target)
    digest = digest_of(text)
    return (digest, json.loads(text)) if digest in digests else None


def is_there(target: Path, digest: str) -> bool:
    """Whether the file has the text with this digest."""
    return digest_of(_text(target)) == digest


def remove(target: Path) -> None:
    """Delete the file, and what killed processes have left of it."""
    path = path_of(target)
    for one in (path, *path.parent.glob(f"{glob.escape(path.name)}.*.tmp")):
        one.unlink(missing_ok=True)


def changed(was: Conversion, now: Conversion) -> str:
    """The first thing that two conversions differ in, in words; empty if there is none."""
    now = json.loads(json.dumps(now))  # as it is when it has been in a file
    if was == now:  # looking for what differs takes seconds, in a plan of 60,000 tensors
        return ""
    a, b = dict(_flat(was)), dict(_flat(now))
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            return f"{key} was {_short(a.get(key))}, now {_short(b.get(key))}"
    return ""


def _text(target: Path) -> bytes:
    """What stands in the file; nothing where it cannot be read."""
    try:
        return path_of(target).read_bytes()
    except OSError:
        return b""


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a record, each with the keys that lead there; what is in a list is called by its name."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
        value = {v["name"]: v for v in value}
    if not isinstance(value, dict):
        yield where, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{where}: {key}" if where else key)


def _short(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) < 100 else f"{text[:80]}..."
