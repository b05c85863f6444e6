"""News for users: one sentence a change in changes/<number>.<type>.md, collected at release.

python tools/changelog.py --check       look at names and sentences
python tools/changelog.py 0.1.0         move all of them to the head of CHANGELOG.md, under today's date
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

import house

CHANGES = house.ROOT / "changes"
TARGET = house.ROOT / "CHANGELOG.md"
TYPES = {"removal": "Removed", "change": "Changed", "feature": "Added", "fix": "Fixed", "docs": "Documented"}
NAME = re.compile(rf"(\d+)\.({'|'.join(TYPES)})\.md")
SECOND = re.compile(r"[.!?]\s+[A-Z]")  # a sentence after the first


def fragments() -> list[Path]:
    """The fragments, by number."""
    return sorted(CHANGES.glob("*"), key=lambda p: (int(p.name.split(".")[0]) if p.name[0].isdigit() else 0, p.name))


def wrong(path: Path) -> list[str]:
    """What is wrong with one fragment."""
    where, text = house.place(path), path.read_text().strip()
    out = [] if NAME.fullmatch(path.name) else [f"{where}: needs the name <number>.<{'|'.join(TYPES)}>.md"]
    if not text.endswith(".") or SECOND.search(text) or "\n\n" in text:
        out.append(f"{where}: needs one sentence, with its full stop")
    return out


def release(version: str) -> None:
    """Put every fragment under a new heading, and remove the fragments."""
    lines = [f"## {version} ({datetime.date.today()})", ""]
    for kind, title in TYPES.items():
        if found := [p for p in fragments() if p.name.split(".")[1] == kind]:
            lines += [f"### {title}", ""]
            lines += [f"- {' '.join(p.read_text().split())} (#{p.name.split('.')[0]})" for p in found] + [""]
    head, mark, rest = TARGET.read_text().partition("\n## ")
    news = "\n".join(lines).rstrip()
    TARGET.write_text(f"{head.rstrip()}\n\n{news}\n{mark}{rest}")
    for path in fragments():
        path.unlink()


def main() -> int:
    findings = [line for path in fragments() for line in wrong(path)]
    if sys.argv[1:] == ["--check"] or findings:
        return house.tell(findings, f"{len(fragments())} news fragments are in order")
    if len(sys.argv) != 2 or not re.fullmatch(r"\d+\.\d+\.\d+\w*", sys.argv[1]):
        print(__doc__)
        return 2
    release(sys.argv[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
