"""A layout as JSON: what files carry, and what `Layout.id` is the hash of.

Reading trusts nothing: a description comes out of a file that anybody may have written.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Final

from packfmt.errors import LayoutError
from packfmt.layout import DTYPES, MAX_EXTENT, WORDS, Axis, Codes, Component, Digit, Grid, Layout, Stream, Values

MOST: Final = {"axes": 8, "components": 32, "a cell": 64, "digits": 16, "dims": 8, "a list of numbers": 4096}


def write(layout: Layout) -> dict[str, Any]:
    """The description of a layout: all that decides a byte or a number, and nothing else."""
    return {
        "name": layout.name,
        "axes": [_axis_json(a) for a in layout.axes],
        "components": [_component_json(c) for c in layout.components],
        "grid": {"name": layout.grid.name, **{key: _lists(value) for key, value in layout.grid.params}},
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
    return out | ({"per": a.per} if a.per != 1 else {}) | ({"pad": a.pad} if a.pad != 1 else {})


def _digits_json(digits: tuple[Digit, ...]) -> list[Any]:
    return [[d.axis, d.stride, d.size, *(["reverse"] if d.reverse else [])] for d in digits]


def _component_json(c: Component | Stream) -> dict[str, Any]:
    if isinstance(c, Stream):
        return {"name": c.name, "stream": c.dtype}
    out: dict[str, Any] = {"name": c.name, "over": _digits_json(c.over), "cell": [_member_json(m) for m in c.cell]}
    return out | ({"dims": list(c.dims)} if c.dims else {})


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
        data = self.record(data, "a layout", "name axes components grid")
        axes = tuple(self.axis(a) for a in self.items(data["axes"], "axes"))
        components = tuple(self.component(c) for c in self.items(data["components"], "components"))
        params = data["grid"]
        if not isinstance(params, dict) or len(params) > 32:
            raise self.fail("the grid is not a record of at most 32 parameters")
        read = {self.text(key, "a grid parameter"): self.parameter(value) for key, value in params.items()}
        function = Grid(self.text(read.pop("name", None), "the grid"), tuple(sorted(read.items())))
        return Layout(self.text(data["name"], "the name"), components, function, axes)

    def parameter(self, data: Any, deep: int = 0) -> Any:
        """A number, a text, or numbers and texts in lists of lists at most."""
        if isinstance(data, list) and deep < 2:
            return tuple(self.parameter(value, deep + 1) for value in self.items(data, "a list of numbers"))
        if isinstance(data, str):
            return self.text(data, "a grid parameter")
        if (isinstance(data, int) and abs(data) <= 1 << 64) or (isinstance(data, float) and isfinite(data)):
            return data
        raise self.fail(f"a grid parameter is {_shown(data)}, needs a number, a text or a list")

    def axis(self, data: Any) -> Axis:
        if isinstance(data, dict) and "of" in data:
            data = self.record(data, "an axis", "name of", "per pad")
            per, pad = (self.number(data.get(key, 1), key, 1, 1 << 20) for key in ("per", "pad"))
            of = self.choice(data["of"], "of", ("rows", "cols"))
            return Axis(self.text(data["name"], "an axis"), of, per, 0, pad)
        data = self.record(data, "an axis", "name size")
        return Axis(self.text(data["name"], "an axis"), "", 1, self.number(data["size"], "size", 1, 1 << 20))

    def component(self, data: Any) -> Component | Stream:
        if isinstance(data, dict) and "stream" in data:
            data = self.record(data, "a stream", "name stream")
            return Stream(self.text(data["name"], "a stream"), self.choice(data["stream"], "its dtype", DTYPES))
        data = self.record(data, "a component", "name over cell", "dims")
        cell = tuple(self.member(m) for m in self.items(data["cell"], "a cell"))
        dims = tuple(self.number(n, "dims", 0, 64) for n in self.items(data.get("dims", []), "dims"))
        return Component(self.text(data["name"], "a component"), self.digits(data["over"]), cell, dims)

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
