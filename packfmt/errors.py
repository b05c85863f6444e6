"""Every error packfmt raises on purpose.

PackfmtError (ValueError)
├── LayoutError      a description is no layout, or a shape or dtype does not fit one
├── PlanError        a recipe asks for what a layout or container cannot hold; nothing was read
├── ContainerError   a file is not what its header says
├── MismatchError    two things that must be equal are not
└── MachineError     the disk is too small, a file may not be written, an optional package is missing
"""

from __future__ import annotations

import errno

TRUNCATED = "truncated; fetch or make it again"
WAYS = {  # what the system could not do -> in words, and what to do
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EROFS: "on a file system that cannot be written; choose another place",
    errno.EACCES: "permission denied; change who may read and write there",
    errno.EPERM: "not permitted; change who may read and write there, or choose another place",
    errno.EIO: "input/output error of the disk or network; try again, or copy it elsewhere",
    errno.ESTALE: "the network's file system has lost it; try again",
    errno.EMFILE: "too many open files; raise ulimit -n",
    errno.ENFILE: "too many open files on this machine; close some",
}


class PackfmtError(ValueError):
    """Base class, so that callers can catch one thing."""


class LayoutError(PackfmtError):
    """A description is no layout, or a shape or dtype does not fit one."""


class PlanError(PackfmtError):
    """A recipe asks for what a layout or container cannot hold."""


class ContainerError(PackfmtError):
    """A file is not what its header says.

    `rule` is the id under which `packfmt validate` reports it (`verify.RULES`).
    """

    def __init__(self, message: str, rule: str = "PF100") -> None:
        super().__init__(message)
        self.rule = rule


class MismatchError(PackfmtError):
    """Two things that must be equal are not."""


class MachineError(PackfmtError):
    """The machine lacks what the work needs: disk, permission, an optional package."""


def why(error: OSError) -> str:
    """What the system could not do, in words, and what to do."""
    return WAYS.get(error.errno or 0) or error.strerror or str(error)
