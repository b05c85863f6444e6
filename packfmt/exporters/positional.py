"""Reading and writing at a place in a file, by several threads at once."""

from __future__ import annotations

import os
from threading import Lock

from packfmt.codec import Array

_lock = Lock()  # of a file's own position, which is moved where the system cannot do without (Windows)


def read_at(handle: int, begin: int, into: Array) -> int:
    """Fill an array of bytes from a file descriptor; how many there were, fewer at the file's end."""
    view, done = into.data, 0
    while done < len(view):
        if hasattr(os, "preadv"):
            got = os.preadv(handle, [view[done:]], begin + done)
        else:
            with _lock:
                os.lseek(handle, begin + done, os.SEEK_SET)
                piece = os.read(handle, len(view) - done)
            view[done : done + len(piece)], got = piece, len(piece)
        if not got:
            break
        done += got
    return done


def write_at(handle: int, begin: int, data: Array) -> None:
    """Write bytes to a file descriptor.

    Raises
    ------
    OSError
        If the disk is full.
    """
    view, done = data.data, 0
    while done < len(view):
        if hasattr(os, "pwrite"):
            done += os.pwrite(handle, view[done:], begin + done)
            continue
        with _lock:
            os.lseek(handle, begin + done, os.SEEK_SET)
            done += os.write(handle, view[done:])
