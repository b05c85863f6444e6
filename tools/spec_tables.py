"""Fill the tables of every page in spec/formats from the layouts themselves, and the rules in spec/README.md.

    python tools/spec_tables.py             rewrite what stands between <!-- layout --> and <!-- /layout -->
    python tools/spec_tables.py --check     compare only

A module of packfmt/codecs has a page. If it holds a family, the page has a table for each of its formats,
between <!-- layout NAME --> and <!-- /layout NAME -->; if numbers make the names of its formats, for those
that the page takes as examples.

Both look whether every page is there with the fixed headings, and every format has vectors.
"""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from math import lcm
from pathlib import Path

import house
from layouts_json import families
from packfmt import codecs
from packfmt.layout import DENSE, REST, WORD, Codes, Component, Digit, Layout, Member, Placed, Stream, Values, dtype_of
from packfmt.verify import RULES

PAGES = house.SPEC / "formats"
VECTORS = house.SPEC / "vectors"
HEADINGS = ["Purpose", "Bytes", "Numbers and rounding", "Worked example", "Edge cases", "Sources", "History"]
LONG = 8  # more tuples than these in a grid's parameter the page tells in words of its own
TUPLES = {2: "pairs", 3: "threes", 4: "quads"}
COLUMNS = ("component", "stored as", "cells over", "at", "part", "width", "where in the cell", "meaning")


# ---------------------------------------------------------------- digits and sizes in words


def digits(these: tuple[Digit, ...]) -> str:
    """cols 16x2: two steps of 16 along cols; an open size or stride as in spec/README.md."""
    return ", ".join(
        f"{d.axis} {d.stride or 'top '}x{'…' if d.size == REST else d.size}{' down' if d.reverse else ''}"
        for d in these
    )


def sizes(placed: Placed) -> list[int]:
    """The sizes whose products are the stored dimensions: of all digits, then words or record bytes."""
    found = [d.size for d in placed.over]
    if placed.record:
        return [*found, placed.cell_bytes]
    (only,) = placed.members
    found += [d.size for d in only.units]
    return found if only.words == 1 or any(d.axis == WORD for d in placed.over) else [*found, only.words]


def formulas(layout: Layout) -> dict[str, list[str]]:
    """For every component, its `sizes` as formulas in rows and cols: "cols/32", "18", "rows".

    Each size is a monomial in rows and in cols, or cols and what comes after them; so three shapes give it away:
    one, one of twice its rows, one of twice its cols.
    """
    strides = [d.stride for c in layout.components if isinstance(c, Component) and c.ragged for d in c.over]
    pad = lcm(*(a.per * a.pad for a in layout.axes), *(n for n in strides if n))
    rows, cols = (64 * lcm(n, pad) for n in layout.block.values())
    plus = max(a.plus for a in layout.axes)
    fitted = [layout.fit(*shape).components for shape in ((rows, cols), (2 * rows, cols), (rows, 2 * cols))]
    sides = {"cols": (cols, Fraction(2))}
    if plus:
        sides[f"(cols + {plus})"] = (cols + plus, Fraction(2 * cols + plus, cols + plus))
    ragged = {c.name for c in layout.components if isinstance(c, Component) and c.ragged}
    out = {}
    for one in zip(*fitted, strict=True):
        texts = []
        for here, tall, wide in zip(*map(sizes, one), strict=True):
            grows = {"rows": rows} if tall == 2 * here else {}
            grows |= {text: n for text, (n, ratio) in sides.items() if wide > here and wide == ratio * here}
            text = formula(here, grows)
            texts.append(f"⌈{text}⌉" if one[0].name in ragged and "/" in text else text)
        out[one[0].name] = texts
    return out


def formula(number: int, grows: dict[str, int]) -> str:
    """The number as a fraction of the sides that it grows with, each with its extent."""
    factor, text = Fraction(number), ""
    for side, extent in grows.items():
        factor /= extent
        text += ("*" if text else "") + side
    if not text:
        return str(number)
    text += f"*{factor.numerator}" if factor.numerator > 1 else ""
    return text + (f"/{factor.denominator}" if factor.denominator > 1 else "")


def shape(component: Component, names: list[str]) -> str:
    """The stored shape, in rows and cols."""
    dims = component.dims or ((1, len(names) - 1) if len(names) > 1 else (1,))
    out, at = [], 0
    for n in dims:
        out.append(" * ".join(s for s in names[at : at + n] if s != "1") or "1")
        at += n
    return f"({', '.join(out)}{',' if len(out) == 1 else ''})"


# ---------------------------------------------------------------- the table


def where(m: Codes | Values) -> str:
    """The digits of a member, units before fields."""
    if isinstance(m, Values):
        return digits(m.digits) or "one"
    units, fields = digits(m.units), digits(m.fields)
    return f"{units or 'one unit'}; fields {fields}" if fields else units or "one"


def width(m: Codes | Values) -> str:
    if isinstance(m, Values):
        return dtype_of(m.dtype).name
    text = f"{m.bits} bit{'s' if m.bits > 1 else ''} in {dtype_of(m.word).name}"
    text += f", bits {m.low} up of the code" if m.low else ""
    return text + (f", below {m.levels}" if m.levels else "")


def position(m: Member) -> str:
    """Where a member starts in the cell."""
    return f"byte {m.start // 8}" + (f" bit {m.start % 8}" if m.start % 8 else "")


def table(layout: Layout) -> str:
    """The generated part of a format's page."""
    names, block = formulas(layout), layout.block
    placed = {c.name: c for c in layout.fit(block["rows"], block["cols"]).components}
    lines = [row(*COLUMNS), "|---" * len(COLUMNS) + "|"]
    for c in layout.components:
        if isinstance(c, Stream):
            lines.append(row(f"`{c.name}`", f"{dtype_of(c.dtype).name} (any,)", "", "", f"`{c.name}`", "", "", c.doc))
            continue
        first = (f"`{c.name}`", f"{dtype_of(placed[c.name].dtype).name} {shape(c, names[c.name])}", digits(c.over))
        for m, resolved in zip(c.cell, placed[c.name].members, strict=True):
            lines.append(row(*first, position(resolved), f"`{m.name}`", width(m), where(m), m.doc or c.doc))
            first = ("", "", "")
    grid = ", ".join([f"`{layout.grid.name}`", *(f"{k} = {number(v)}" for k, v in layout.grid.params)])
    needs = " and ".join(f"{n} {side}" for side, n in block.items() if n > 1) or "nothing"
    facts = {"needs a multiple of": needs}
    if padded := [f"{a.name} to a multiple of {a.pad * a.per}" for a in layout.axes if a.pad > 1]:
        facts["rounded up"] = ", ".join(padded)
    if more := [f"{a.plus} {a.name} after those of the weight" for a in layout.axes if a.plus]:
        facts["stored beside"] = ", ".join(more)
    if layout.hadamard:
        facts["rotated"] = f"every {layout.hadamard} columns"
    facts |= {"bits a weight": f"{layout.bits_per_weight:.6g}", "grid": grid}
    facts["id"] = f"`{layout.id}`"
    return "\n".join([*lines, "", *(f"- {what}: {value}" for what, value in facts.items()), ""])


def row(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def number(value: object) -> str:
    if isinstance(value, tuple) and len(value) > LONG and isinstance(value[0], tuple):
        return f"{len(value)} {TUPLES[len(value[0])]}, below"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(number, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- pages


def rules() -> str:
    """The validator's rules, for spec/README.md."""
    lines = [row("id", "severity", "what is wrong"), "|---|---|---|"]
    return "\n".join([*lines, *(row(rule, *told) for rule, told in RULES.items()), ""])


def fill(page: Path, mark: str, text: str) -> list[str]:
    """Put `text` between <!-- mark --> and <!-- /mark -->, or with --check find it stale."""
    old = page.read_text()
    parts = re.split(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- /{mark} -->)", old, flags=re.S)
    if len(parts) != 2:
        return [f"{house.place(page)}: needs one <!-- {mark} --> and one <!-- /{mark} -->"]
    new = text.join(parts)
    if new != old and "--check" in sys.argv:
        return [f"{house.place(page)}: what stands after <!-- {mark} --> is stale; run `make spec`"]
    if new != old:
        page.write_text(new)
    return []


def formats(page: str, listed: tuple[str, ...], text: str) -> dict[str, str]:
    """The formats that a page describes, and each one's mark."""
    if page not in codecs.PATTERNS:
        return {name: f"layout {name}" if page in codecs.FAMILIES else "layout" for name in listed}
    examples = re.findall(r"^<!-- layout (\S+) -->$", text, re.M)
    return {name: f"layout {name}" for name in examples if re.fullmatch(codecs.PATTERNS[page][0], name)}


def look(page: str, listed: tuple[str, ...]) -> list[str]:
    """Fill a module's page; what is missing or wrong on it."""
    path = PAGES / f"{page}.md"
    text = path.read_text() if path.exists() else ""
    marks = formats(page, listed, text)
    there = {p.parent.name for p in VECTORS.glob("*/*")} | set(DENSE)
    findings = [
        f"spec/vectors/{name}: missing; a format needs bytes that another tool made"
        for name in listed
        if name not in there
    ]
    if page in codecs.PATTERNS and not any(re.fullmatch(codecs.PATTERNS[page][0], name) for name in there):
        findings.append(f"spec/vectors/{codecs.PATTERNS[page][1]}: missing; one of these formats needs bytes")
    if not text:
        return [*findings, f"{house.place(path)}: missing; copy the headings of another page"]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^(#{1,2} .*?)\s*$", prose, re.M)
    if headings != (wanted := [f"# {page}", *(f"## {h}" for h in HEADINGS)]):
        findings.append(f"{house.place(path)}: has {', '.join(headings)}; needs {', '.join(wanted)}")
    if strange := sorted(set(re.findall(r"<!-- /?(layout.*?) -->", text)) - set(marks.values())):
        findings.append(f"{house.place(path)}: has <!-- {strange[0]} -->, which none of its formats is called")
    elif not marks:
        findings.append(f"{house.place(path)}: has no example; write <!-- layout NAME --> and <!-- /layout NAME -->")
    for name, mark in marks.items():
        findings += fill(path, mark, table(codecs.get(name).layout))
    return findings


def main() -> int:
    pages = families()
    findings = [line for page, listed in pages.items() for line in look(page, listed)]
    findings += fill(house.SPEC / "README.md", "rules", rules())
    findings += [
        f"{house.place(p)}: packfmt/codecs has no such module" for p in PAGES.glob("*.md") if p.stem not in pages
    ]
    return house.tell(findings, f"{len(pages)} pages agree with their layouts")


if __name__ == "__main__":
    raise SystemExit(main())
