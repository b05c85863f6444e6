"""A layout as a description: written as JSON, read from it, checked.

Files carry descriptions, and `Layout.id` is the hash of one. Reading trusts nothing, for anybody may
have written the file.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Final

from packfmt.errors import LayoutError
from packfmt.layout import (
    BIT,
    CODINGS,
    COMBINE,
    DTYPES,
    MAX_EXTENT,
    REST,
    TOP,
    WORD,
    WORDS,
    Axis,
    Codes,
    Component,
    Digit,
    Grid,
    Layout,
    Sparse,
    Stream,
    Values,
    bounded,
    dtype_of,
)

MOST_HADAMARD: Final = 1024
MOST: Final = {"axes": 8, "components": 32, "a cell": 64, "digits": 16, "dims": 8, "a list of numbers": 4096}


def write(layout: Layout) -> dict[str, Any]:
    """The description of a layout: all that decides a byte or a number, and nothing else."""
    return {
        "name": layout.name,
        "axes": [_axis_json(a) for a in layout.axes],
        "components": [_component_json(c) for c in layout.components],
        "grid": {"name": layout.grid.name, **{key: _lists(value) for key, value in layout.grid.params}},
        **({"hadamard": layout.hadamard} if layout.hadamard else {}),
        **({"sparse": {"coding": s.coding, "combine": s.combine}} if (s := layout.sparse) else {}),
    }


def read(data: Any) -> Layout:
    """The layout of a description.

    Whether it tiles its axes is for `Layout.fit` to prove; here every key, type and bound is checked.

    Raises
    ------
    LayoutError
        If `data` is not what `write` gives for some layout.
    """
    name = data.get("name") if isinstance(data, dict) else None
    return _Reader(name[:128] if isinstance(name, str) else "?").layout(data)


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def _axis_json(a: Axis) -> dict[str, Any]:
    if not a.of:
        return {"name": a.name, "size": a.size}
    out: dict[str, Any] = {"name": a.name, "of": a.of}
    extra = {"per": a.per if a.per != 1 else 0, "pad": a.pad if a.pad != 1 else 0, "plus": a.plus}
    return out | {key: value for key, value in extra.items() if value}


def _digits_json(digits: tuple[Digit, ...]) -> list[Any]:
    return [[d.axis, d.stride, d.size, *(["reverse"] if d.reverse else [])] for d in digits]


def _component_json(c: Component | Stream) -> dict[str, Any]:
    if isinstance(c, Stream):
        return {"name": c.name, "stream": c.dtype}
    out: dict[str, Any] = {"name": c.name, "over": _digits_json(c.over), "cell": [_member_json(m) for m in c.cell]}
    return out | ({"dims": list(c.dims)} if c.dims else {}) | ({"ragged": True} if c.ragged else {})


def _member_json(m: Codes | Values) -> dict[str, Any]:
    if isinstance(m, Values):
        return {"values": m.name, "dtype": m.dtype, "digits": _digits_json(m.digits)}
    out: dict[str, Any] = {"codes": m.name, "bits": m.bits, "word": m.word}
    out |= {"units": _digits_json(m.units), "fields": _digits_json(m.fields)}
    extra = {"low": m.low or None, "at": m.at, "levels": m.levels or None}
    return out | {k: v for k, v in extra.items() if v is not None}


class _Reader:
    def __init__(self, name: str) -> None:
        self.name = name

    def fail(self, what: str) -> LayoutError:
        return LayoutError(f"description of {self.name!r}: {what}")

    def record(self, data: Any, what: str, need: str, may: str = "") -> dict[str, Any]:
        """A JSON object with all keys of `need`, perhaps some of `may`, and no other."""
        if not isinstance(data, dict):
            raise self.fail(f"{what} is {_shown(data)}, needs {need.replace(' ', ', ')}")
        for key in {*need.split()} ^ data.keys():
            if key in data and key not in may.split():
                raise self.fail(f"{what} has {_shown(key)}, which means nothing here")
            if key not in data:
                raise self.fail(f"{what} lacks {key!r}")
        return data

    def items(self, data: Any, what: str) -> list[Any]:
        if not isinstance(data, list) or len(data) > MOST[what]:
            raise self.fail(f"{what}: not a list of at most {MOST[what]}")
        return data

    def text(self, data: Any, what: str) -> str:
        if not isinstance(data, str) or not 0 < len(data) <= 128 or not data.isprintable():
            raise self.fail(f"{what} is {_shown(data)}, needs a short printable text")
        return data

    def number(self, data: Any, what: str, low: int, high: int) -> int:
        if type(data) is not int or not low <= data <= high:
            raise self.fail(f"{what} is {_shown(data)}, needs {low} to {high}")
        return data

    def choice(self, data: Any, what: str, among: tuple[str, ...]) -> str:
        if data not in among:
            raise self.fail(f"{what} is {_shown(data)}, needs one of {', '.join(among)}")
        return str(data)

    def layout(self, data: Any) -> Layout:
        data = self.record(data, "a layout", "name axes components grid", "hadamard sparse")
        axes = tuple(self.axis(a) for a in self.items(data["axes"], "axes"))
        components = tuple(self.component(c) for c in self.items(data["components"], "components"))
        params = data["grid"]
        if not isinstance(params, dict) or len(params) > 32:
            raise self.fail("the grid is not a record of at most 32 parameters")
        read = {self.text(key, "a grid parameter"): self.parameter(value) for key, value in params.items()}
        function = Grid(self.text(read.pop("name", None), "the grid"), tuple(sorted(read.items())))
        size = self.number(data["hadamard"], "hadamard", 2, MOST_HADAMARD) if "hadamard" in data else 0
        return Layout(
            self.text(data["name"], "the name"), components, function, axes, hadamard=size, sparse=self.sparse(data)
        )

    def sparse(self, layout: dict[str, Any]) -> Sparse | None:
        if "sparse" not in layout:
            return None
        data = self.record(layout["sparse"], "sparse", "coding combine")
        return Sparse(
            self.choice(data["coding"], "a coding", CODINGS), self.choice(data["combine"], "combine", COMBINE)
        )

    def parameter(self, data: Any, deep: int = 0) -> Any:
        """A number, a text, or numbers and texts in lists of lists at most."""
        if isinstance(data, list) and deep < 2:
            return tuple(self.parameter(value, deep + 1) for value in self.items(data, "a list of numbers"))
        if isinstance(data, str):
            return data and self.text(data, "a grid parameter")  # which may be nothing
        if (isinstance(data, int) and abs(data) <= 1 << 64) or (isinstance(data, float) and isfinite(data)):
            return data
        raise self.fail(f"a grid parameter is {_shown(data)}, needs a number, a text or a list")

    def axis(self, data: Any) -> Axis:
        if isinstance(data, dict) and "of" in data:
            data = self.record(data, "an axis", "name of", "per pad plus")
            per, pad = (self.number(data.get(key, 1), key, 1, 1 << 20) for key in ("per", "pad"))
            plus = self.number(data["plus"], "plus", 1, 1 << 20) if "plus" in data else 0
            of = self.choice(data["of"], "of", ("rows", "cols"))
            return Axis(self.text(data["name"], "an axis"), of, per, 0, pad, plus)
        data = self.record(data, "an axis", "name size")
        return Axis(self.text(data["name"], "an axis"), "", 1, self.number(data["size"], "size", 1, MAX_EXTENT))

    def component(self, data: Any) -> Component | Stream:
        if isinstance(data, dict) and "stream" in data:
            data = self.record(data, "a stream", "name stream")
            return Stream(self.text(data["name"], "a stream"), self.choice(data["stream"], "its dtype", DTYPES))
        data = self.record(data, "a component", "name over cell", "dims ragged")
        if data.get("ragged", True) is not True:
            raise self.fail(f"ragged is {_shown(data['ragged'])}, needs true or nothing")
        cell = tuple(self.member(m) for m in self.items(data["cell"], "a cell"))
        dims = tuple(self.number(n, "dims", 0, 64) for n in self.items(data.get("dims", []), "dims"))
        name = self.text(data["name"], "a component")
        return Component(name, self.digits(data["over"]), cell, dims, ragged="ragged" in data)

    def member(self, data: Any) -> Codes | Values:
        if isinstance(data, dict) and "values" in data:
            data = self.record(data, "a member", "values dtype digits")
            dtype = self.choice(data["dtype"], "a dtype", DTYPES)
            return Values(self.text(data["values"], "a member"), dtype, self.digits(data["digits"]))
        data = self.record(data, "a member", "codes bits word units fields", "low at levels")
        return Codes(
            self.text(data["codes"], "a member"),
            self.number(data["bits"], "bits", 1, 64),
            self.digits(data["units"]),
            self.digits(data["fields"]),
            self.choice(data["word"], "a word", WORDS),
            self.number(data.get("low", 0), "low", 0, 63),
            self.number(data["at"], "at", 0, MAX_EXTENT) if "at" in data else None,
            self.number(data.get("levels", 0), "levels", 0, 1 << 64),
        )

    def digits(self, data: Any) -> tuple[Digit, ...]:
        return tuple(self.digit(d) for d in self.items(data, "digits"))

    def digit(self, data: Any) -> Digit:
        if not isinstance(data, list) or len(data) not in (3, 4) or data[3:] not in ([], ["reverse"]):
            raise self.fail(f"a digit is {_shown(data)}, needs [axis, stride, size] and perhaps 'reverse'")
        axis, stride, size = self.text(data[0], "an axis"), data[1], self.number(data[2], "a size", 0, MAX_EXTENT)
        return Digit(axis, self.number(stride, "a stride", 0, MAX_EXTENT), size, len(data) == 4)


def _shown(data: Any) -> str:
    """A value as an error names it: short, whatever it is."""
    if isinstance(data, str):
        return repr(data[:40])
    plain = data is None or isinstance(data, bool | float) or (isinstance(data, int) and data.bit_length() < 99)
    return repr(data) if plain else f"a {type(data).__name__}"


# ---------------------------------------------------------------- checked


def check(layout: Layout) -> None:
    """Refuse what no shape could make a layout: names unknown or used twice, numbers out of bounds.

    Raises
    ------
    LayoutError
        Names the component, member and axis.
    """
    if not layout.axes or not layout.components:
        raise LayoutError(f"{layout.name}: needs an axis and a component")
    known = [a.name for a in layout.axes]
    for a in layout.axes:
        where = f"{layout.name}: axis {a.name!r}"
        if known.count(a.name) > 1 or a.name in (WORD, BIT):
            raise LayoutError(f"{where}: its name is taken")
        if a.of not in ("", "rows", "cols"):
            raise LayoutError(f"{where}: of {a.of!r}, needs rows or cols")
        for what, value in ("per", a.per), ("pad", a.pad), ("size", a.size if not a.of else 1):
            bounded(where, what, value, 1, MAX_EXTENT)
        bounded(where, "plus", a.plus, 0, 1 << 20 if a.of and a.pad == 1 else 0)
    bounded(layout.name, "hadamard", layout.hadamard, 0, MOST_HADAMARD)
    if layout.hadamard and (layout.hadamard == 1 or layout.hadamard & layout.hadamard - 1):
        raise LayoutError(f"{layout.name}: hadamard is {layout.hadamard}, needs a power of two")
    if (sparse := layout.sparse) and (sparse.coding not in CODINGS or sparse.combine not in COMBINE):
        raise LayoutError(f"{layout.name}: sparse is {sparse}, needs one of {', '.join((*CODINGS, *COMBINE))} each")
    if layout.sparse and layout.hadamard:
        raise LayoutError(f"{layout.name}: outliers of rotated columns, needs one or the other")
    names = [c.name for c in layout.components]
    for c in layout.components:
        where = f"{layout.name}.{c.name}"
        if names.count(c.name) > 1:
            raise LayoutError(f"{where}: two components share a name")
        if isinstance(c, Stream):
            dtype_of(c.dtype)
        elif not c.cell:
            raise LayoutError(f"{where}: an empty cell")
        else:
            for n in c.dims:
                bounded(where, "a number of dims", n, 0, 64)
            _check_digits(where, c.over, (*known, WORD, BIT))
    streams = {s.name for s in layout.streams}
    for c, m, digits in layout.members():
        where = f"{layout.name}.{c.name}.{m.name}"
        if m.name in streams:
            raise LayoutError(f"{where}: a stream has this name, too")
        _check_digits(where, digits[len(c.over) :], (*known, BIT))
        if isinstance(m, Values):
            dtype_of(m.dtype)
            continue
        if m.word not in WORDS:
            raise LayoutError(f"{where}: words of {m.word!r}, needs one of {', '.join(WORDS)}")
        bounded(where, "bits", m.bits, 1, 64)
        bounded(where, "low", m.low, 0, 63)
        bounded(where, "at", m.at or 0, 0, MAX_EXTENT)
        bounded(where, "levels", m.levels, 0, 1 << 64)


def _check_digits(where: str, digits: tuple[Digit, ...], known: tuple[str, ...]) -> None:
    for d in digits:
        along = f"{where}: along {d.axis!r}"
        if d.axis not in known:
            raise LayoutError(f"{where}: no axis {d.axis!r} here; there are {', '.join(known)}")
        bounded(along, "a stride", d.stride, 0, MAX_EXTENT)
        bounded(along, "a size", d.size, 0, MAX_EXTENT)
        if d.axis == WORD and (d.stride != 1 or d.reverse):
            raise LayoutError(f"{along} a digit that is no plain count of the words")
        if d.axis == BIT and not (d.stride and d.size):
            raise LayoutError(f"{along} a digit without stride or size")
        if d.axis != WORD and d.stride == TOP and d.size == REST:
            raise LayoutError(f"{along} a digit with neither stride nor size")
