"""A note on a whole output that says which conversion made it, so that who asks for it again learns that it is there.

It is an attribute of the output in the file system, which does not change a byte of it. Where there are no such
attributes, and in copies that lost it, nobody knows.
"""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from pathlib import Path

NAME = "user.packfmt.conversion"


def put(target: Path, digest: str) -> None:
    """Note that the conversion with this digest (`record.digest_of`) made the output."""
    if sys.platform == "linux":
        try:
            os.setxattr(target, NAME, _note(target, digest))
        except OSError:  # a file system without attributes
            return


def made_by(target: Path, digest: str = "") -> bool:
    """Whether the output is as a conversion made it: the one with this digest, or any."""
    if sys.platform == "linux":
        try:
            note = os.getxattr(target, NAME)
            return note == _note(target, digest or note.partition(b" ")[0].decode())
        except (OSError, UnicodeDecodeError):
            return False
    return False


def _note(target: Path, digest: str) -> bytes:
    """The digest, and that of the files' names, sizes and times: an output that was changed is not what was made."""
    found = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
    files = sha256()
    for path in found:
        stat = path.stat()
        files.update(f"{path.relative_to(target)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{digest} {files.hexdigest()}".encode()
