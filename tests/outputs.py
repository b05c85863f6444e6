"""Writing a container from tensors in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from packfmt.codec import PackedTensor
from packfmt.exporters import Container, Extras, output
from packfmt.plan import Plan


def save(container: Container, path: Path, plan: Plan, tensors: Iterable[PackedTensor], extras: Extras) -> None:
    """What the plan says, as a file or folder of the container, one tensor after the other."""
    output.write(container.lay(path, plan, extras), path, plan, tensors)
