"""spec/layouts.json: every format's description and id, for readers in any language.

    python tools/layouts_json.py            write it; refuses to change or drop what stands there
    python tools/layouts_json.py --check    compare only

A name is for life. Other bytes or other numbers are another format with another name.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from typing import Any

import house
from packfmt import codecs
from packfmt.layout import Layout

TARGET = house.SPEC / "layouts.json"


def families() -> dict[str, tuple[str, ...]]:
    """Every module of this tree's packfmt/codecs, and the formats that it lists: none if numbers make their names."""
    modules = sorted(m.name for m in pkgutil.iter_modules([str(house.PACKAGE / "codecs")]))
    return {m: () if m in codecs.PATTERNS else codecs.FAMILIES.get(m, (m,)) for m in modules}


def described() -> dict[str, Any]:
    """Name -> id and description, of every listed format of this tree."""
    layouts = {name: codecs.get(name).layout for names in families().values() for name in names}
    return {name: {"id": layout.id, "layout": layout.to_json()} for name, layout in layouts.items()}


def broken_promises(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names that stood in the file and now mean something else, or nothing."""
    findings = []
    for name, entry in before.items():
        if Layout.from_json(entry["layout"]).id != entry["id"]:
            findings.append(f"layouts.json: {name} has an id that is not its description's")
        if name not in now:
            findings.append(f"{name} is gone, and a format's name is for life; bring the module back")
        elif now[name]["id"] != entry["id"]:
            findings.append(
                f"{name} has id {now[name]['id'][:12]}, was {entry['id'][:12]}: other bytes or numbers need another "
                "name (if no release ever had this one, delete its entry from layouts.json first)"
            )
    return findings


def main() -> int:
    now = described()
    text = json.dumps(now, indent=1, sort_keys=True) + "\n"
    old = TARGET.read_text() if TARGET.exists() else "{}"
    findings = broken_promises(json.loads(old), now)
    if not findings and text != old:
        if "--check" in sys.argv:
            findings.append("layouts.json is stale; run `make spec`")
        else:
            TARGET.write_text(text)
    return house.tell(findings, f"layouts.json describes {len(now)} formats")


if __name__ == "__main__":
    raise SystemExit(main())
