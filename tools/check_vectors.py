"""Every file under spec/vectors is listed with its hash and where it comes from; every bad file has its sentence.

spec/vectors/manifest.json maps a file's path under spec/vectors to {"sha256", "tool", "version", ...}.
spec/bad/cases.json maps a file's path under spec/bad to one sentence on what is wrong, or to a record with it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import house

VECTORS = house.SPEC / "vectors"
BAD = house.SPEC / "bad"
PROVENANCE = ("sha256", "tool", "version")
BESIDE = {"manifest.json", "cases.json", "README.md"}  # at the top of a folder: about it, not of it


def files(folder: Path) -> set[str]:
    """Paths under the folder, but for what lies beside them to tell about them."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return found - BESIDE


def both_ways(folder: Path, listed: set[str], by: str) -> list[str]:
    """Files that are not listed, and listed files that are not there."""
    there, where = files(folder), house.place(folder)
    return [f"{where}/{p}: not in {by}" for p in sorted(there - listed)] + [
        f"{where}/{p}: in {by}, but there is no such file" for p in sorted(listed - there)
    ]


def vectors() -> list[str]:
    """What is wrong with the vectors' manifest."""
    path = VECTORS / "manifest.json"
    if not path.exists():
        return [f"{house.place(path)}: missing"] if files(VECTORS) else []
    manifest: dict[str, dict[str, Any]] = json.loads(path.read_text())
    findings = both_ways(VECTORS, set(manifest), path.name)
    for name, entry in manifest.items():
        where = f"{house.place(VECTORS)}/{name}"
        findings += [f"{where}: the manifest does not say its {key}" for key in PROVENANCE if not entry.get(key)]
        if (VECTORS / name).is_file():
            found = hashlib.sha256((VECTORS / name).read_bytes()).hexdigest()
            if found != entry.get("sha256"):
                findings.append(f"{where}: sha256 {found[:12]}, the manifest says {str(entry.get('sha256'))[:12]}")
    return findings


def bad() -> list[str]:
    """What is wrong with the list of bad files."""
    path = BAD / "cases.json"
    if not path.exists():
        return [f"{house.place(path)}: missing"] if files(BAD) else []
    cases: dict[str, Any] = json.loads(path.read_text())
    return both_ways(BAD, set(cases), path.name) + [
        f"{house.place(BAD)}/{name}: needs a sentence on what is wrong"
        for name, case in cases.items()
        if not any(isinstance(v, str) and " " in v for v in (case.values() if isinstance(case, dict) else [case]))
    ]


def main() -> int:
    count = f"{len(files(VECTORS))} vector files and {len(files(BAD))} bad files"
    return house.tell(vectors() + bad(), f"{count} are what their lists say")


if __name__ == "__main__":
    raise SystemExit(main())
