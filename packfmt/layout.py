"""Where the bits lie. A layout is data; sizes, dtypes, proofs and packers are derived from it.

A packed tensor is a few components. A component is an array of equal cells, laid over
digits of the weight's axes, slowest first. A cell is a record of members in file order:
codes (bit fields) or values (whole numbers such as scales). Every member places its own
digits inside the cell. A digit (axis, stride, size) says: this counter runs over `size`
steps of `stride` along `axis`; the index on an axis is the sum of its counters.

What a member shares is what its digits leave out: a scale whose digits along the columns
stop at stride 32 is shared by 32 columns. Nothing else says "group size".

    blocks("q4_0", 32, Values("scale", "<f2"), Codes("codes", 4, (cols(1, 16),), (cols(16, 2),)))

Definition, with worked examples: spec/README.md
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import lcm, prod
from typing import Any, Final

import numpy as np

from packfmt.errors import LayoutError

REST: Final = 0  # a digit's size: what the shape leaves between its stride and the next digit's
TOP: Final = 0  # a digit's stride: the highest of its axis, so extent // size
WORD: Final = "word"  # pseudo-axis: which word of a unit that is wider than one
BIT: Final = "bit"  # pseudo-axis: which bit of a code; bit planes are digits along it

MAX_CELL_BITS: Final = 1 << 26  # a description from a file may not make us build larger tables
MAX_EXTENT: Final = 1 << 48

# NumPy spells the byte order out; ml_dtypes names the rest. A closed list: files bring these strings.
DTYPES: Final = (
    *("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "?"),
    *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
WORDS: Final = ("u1", "<u2", "<u4", "<u8")


@dataclass(frozen=True, slots=True)
class Axis:
    """One logical axis: the rows or columns of the weight, a multiple of them, or a fixed count.

    `of` names "rows" or "cols", of which `per` make one step (quads: of="cols", per=4); the extent
    is rounded up to a multiple of `pad`, the added positions holding code zero. Without `of`, `size`
    is the extent (planes).
    """

    name: str
    of: str = ""
    per: int = 1
    size: int = 0
    pad: int = 1


ROWS: Final = Axis("rows", "rows")
COLS: Final = Axis("cols", "cols")


@dataclass(frozen=True, slots=True)
class Digit:
    """A counter of `size` steps of `stride` along `axis`; `reverse` counts it down."""

    axis: str
    stride: int = 1
    size: int = REST
    reverse: bool = False


@dataclass(frozen=True, slots=True)
class Codes:
    """Bit fields of `bits` bits. Field p of a unit lies at bits [p*bits, (p+1)*bits), bit 0 first.

    A unit is padded with zeros to whole words, unless `at` gives its first bit in the cell, which
    then is one unit of `word`. `low` is the lowest bit of the part that this member holds: a part
    cut into several members (four low bits here, one high bit there) bears one name in all of them.
    Codes of `levels` and above are never written by an encoder (0: all codes are used).
    """

    name: str
    bits: int
    units: tuple[Digit, ...] = ()  # units of the cell, slowest first
    fields: tuple[Digit, ...] = ()  # codes of a unit, last fastest
    word: str = "u1"
    low: int = 0
    at: int | None = None
    levels: int = 0
    doc: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Values:
    """Whole numbers of one dtype: a NumPy code with its byte order, or an ml_dtypes name."""

    name: str
    dtype: str
    digits: tuple[Digit, ...] = ()
    doc: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Component:
    """An array of equal cells over digits, stored as one array.

    `dims` says how many of its digits (those of `over`, then a lone member's units, or a record's
    bytes) make each dimension of the stored array; empty means the first digit, then all others.
    """

    name: str
    over: tuple[Digit, ...]
    cell: tuple[Codes | Values, ...]
    dims: tuple[int, ...] = ()
    doc: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Stream:
    """A component whose length is data: one dimension of whole numbers, held as the part `name`."""

    name: str
    dtype: str
    doc: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Grid:
    """What turns codes into numbers: a function of `grids` by name, and its parameters."""

    name: str
    params: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, key: str) -> Any:
        return dict(self.params)[key]


def grid(name: str, **params: Any) -> Grid:
    return Grid(name, tuple(sorted(params.items())))


@dataclass(frozen=True, slots=True)
class Layout:
    """A format's geometry and grid. The name is for life: other bytes, other name.

    `purpose`, `sources` and `also` (what containers call it) may be mended; everything else is
    in the canonical JSON, whose SHA-256 is the layout's `id`.
    """

    name: str
    components: tuple[Component | Stream, ...]
    grid: Grid
    axes: tuple[Axis, ...] = (ROWS, COLS)
    purpose: str = field(default="", compare=False)
    sources: tuple[str, ...] = field(default=(), compare=False)
    also: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (container, its name)

    def to_json(self) -> dict[str, Any]:
        """The description as plain data: all that decides a byte or a number, and nothing else."""
        return {
            "name": self.name,
            "axes": [_axis_json(a) for a in self.axes],
            "components": [_component_json(c) for c in self.components],
            "grid": {"name": self.grid.name, **{k: _plain(v) for k, v in self.grid.params}},
        }

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """The layout of a description, such as a file carries.

        Raises
        ------
        LayoutError
            If `data` is not what `to_json` gives for some layout.
        """
        return _Reader(str(data.get("name", "?")) if isinstance(data, dict) else "?").layout(data)

    @property
    def canonical(self) -> str:
        """The description as JSON text with sorted keys and no spaces."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    @property
    def id(self) -> str:
        """SHA-256 of `canonical`, in hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def fit(self, rows: int, cols: int) -> Fitted:
        """Resolve every size for a weight of (rows, cols) and prove the placement a bijection.

        Raises
        ------
        LayoutError
            If the shape does not fill whole blocks, or the description does not tile an axis
            exactly once; the axis is named.
        """
        return _fit(self, rows, cols)

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        """Stored shape of every component but the streams, whose length is data."""
        return {c.name: c.shape for c in self.fit(rows, cols).components}

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all components but the streams."""
        return self.fit(rows, cols).nbytes

    @property
    def block(self) -> dict[str, int]:
        """What rows and columns must each be a multiple of."""
        out = {"rows": 1, "cols": 1}
        for axis in self.axes:
            if axis.of and axis.pad == 1:
                need = lcm(*(_multiple(axis.name, digits) for _, _, digits in self.members()))
                out[axis.of] = lcm(out[axis.of], axis.per * need)
        return out

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, of a matrix so large that what is stored once a row hardly counts."""
        block = self.block
        rows, cols = (block[a] * -(-4096 // block[a]) for a in ("rows", "cols"))
        return 8 * self.nbytes(rows, cols) / (rows * cols)

    @property
    def streams(self) -> tuple[Stream, ...]:
        return tuple(c for c in self.components if isinstance(c, Stream))

    def members(self) -> Iterator[tuple[Component, Codes | Values, tuple[Digit, ...]]]:
        for part in self.components:
            if isinstance(part, Component):
                for m in part.cell:
                    yield part, m, (*part.over, *_inner(m))


# ---------------------------------------------------------------- constructors

rows = partial(Digit, "rows")
cols = partial(Digit, "cols")


def blocks(name: str, block: int, *cell: Codes | Values, **rest: Any) -> Layout:
    """A ggml block format: every `block` weights of a row make one record, in one component "blocks"."""
    return Layout(name, (Component("blocks", (rows(), cols(block)), cell),), **rest)


def dense(name: str, dtype: str, **rest: Any) -> Layout:
    """Plain numbers in row-major order, in one component "values"."""
    cell = (Values("values", dtype),)
    return Layout(name, (Component("values", (rows(), cols()), cell),), grid("plain"), **rest)


def _dense_layouts() -> dict[str, Layout]:
    short = {"bfloat16": "bf16", "?": "bool", "u1": "u8", "i1": "i8"}
    names = {d: short.get(d) or (f"{d[1]}{8 * int(d[2])}" if d[0] == "<" else d) for d in DTYPES}
    return {name: dense(name, dtype, purpose=f"{dtype_of(dtype).name} as it is") for dtype, name in names.items()}


# ---------------------------------------------------------------- fitted to a shape


@dataclass(frozen=True, slots=True)
class Part:
    """One logical array of a packed tensor: codes, scales ... Axes in the order of the layout's."""

    name: str
    dtype: str
    bits: int  # of an element that carry information
    shape: tuple[int, ...]
    share: tuple[int, ...]  # for every axis, how many positions share one element
    levels: int  # codes below this are used; 0: all


@dataclass(frozen=True, slots=True)
class Member:
    """One member, resolved: where its bits start in the cell, how its units and fields run."""

    part: str
    bits: int
    low: int
    start: int  # first bit in the cell
    word: int  # bytes of a word
    words: int  # words of a unit
    units: tuple[Digit, ...]
    fields: tuple[Digit, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """One component, resolved for a shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    over: tuple[Digit, ...]
    cell_bytes: int
    members: tuple[Member, ...]
    spare_bits: int  # of a cell that no member uses; an encoder writes zeros there

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A layout resolved for one shape."""

    layout: Layout
    extents: dict[str, int]  # of the layout's axes
    components: tuple[Placed, ...]
    parts: dict[str, Part]

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.components)


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name in `DTYPES`."""
    if name not in DTYPES:
        raise LayoutError(f"no dtype is called {name!r}; there are {', '.join(DTYPES)}")
    if name[0] in "<uif?" and not name.startswith("float"):
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def itemsize(name: str) -> int:
    return dtype_of(name).itemsize


def _inner(m: Codes | Values) -> tuple[Digit, ...]:
    return (*m.units, *m.fields) if isinstance(m, Codes) else m.digits


def _multiple(axis: str, digits: tuple[Digit, ...]) -> int:
    """What an extent must be a multiple of for these digits to tile it; 1 if they leave it out."""
    mine = [d for d in digits if d.axis == axis]
    if not mine:
        return 1
    span = prod(d.size for d in mine if d.size)
    return span * min((d.stride for d in mine if d.stride), default=1)


@lru_cache(maxsize=1024)
def _fit(layout: Layout, n_rows: int, n_cols: int) -> Fitted:
    for name, have in (("rows", n_rows), ("cols", n_cols)):
        if not 0 <= have <= MAX_EXTENT:
            raise LayoutError(f"{layout.name}: {have} {_NOUN[name]}, needs 0 to 2**48")
        if have % (block := layout.block[name]):
            raise LayoutError(f"{layout.name}: {have} {_NOUN[name]}, needs a multiple of {block}")
    extents = _extents(layout, {"rows": n_rows, "cols": n_cols})
    pieces: dict[str, list[tuple[int, int, Part]]] = {}
    placed = []
    for c in layout.components:
        if isinstance(c, Component):
            placed.append(_place(layout, c, extents, pieces))
    parts = {name: _assemble(f"{layout.name}.{name}", found) for name, found in pieces.items()}
    for s in layout.streams:
        dtype_of(s.dtype)
        parts[s.name] = Part(s.name, s.dtype, 8 * itemsize(s.dtype), (-1,), (), 0)
    if len({c.name for c in layout.components}) != len(layout.components):
        raise LayoutError(f"{layout.name}: two components share a name")
    return Fitted(layout, extents, tuple(placed), parts)


_NOUN = {"rows": "rows", "cols": "columns"}


def _extents(layout: Layout, shape: Mapping[str, int]) -> dict[str, int]:
    out = {}
    for a in layout.axes:
        if a.of:
            whole, left = divmod(shape[a.of], a.per)
            if left:
                raise LayoutError(f"{layout.name}: {shape[a.of]} {_NOUN[a.of]}, needs a multiple of {a.per}")
            out[a.name] = -(-whole // a.pad) * a.pad
        else:
            out[a.name] = a.size
    return out


def _place(
    layout: Layout, c: Component, extents: dict[str, int], pieces: dict[str, list[tuple[int, int, Part]]]
) -> Placed:
    members: list[Member] = []
    taken: list[tuple[int, int]] = []  # bit ranges of the cell, one a unit
    end = 0  # first free bit
    over: tuple[Digit, ...] | None = None
    split = any(d.axis == WORD for d in c.over)
    for m in c.cell:
        where = f"{layout.name}.{c.name}.{m.name}"
        if isinstance(m, Codes):
            bits, low, word, at, levels = m.bits, m.low, itemsize(m.word), m.at, m.levels
            cut = len(m.units)
        else:
            bits, low, word, at, levels = 8 * itemsize(m.dtype), 0, itemsize(m.dtype), None, 0
            cut = len(m.digits)
        solved, share = _solve(where, (*c.over, *_inner(m)), extents)
        head, tail = solved[: len(c.over)], solved[len(c.over) :]
        over = head if over is None else over
        if head != over:
            raise LayoutError(f"{where}: its cells run over {head}, the component's over {over}")
        units, fields = tail[:cut], tail[cut:]
        used = bits * prod(d.size for d in fields)
        words = -(-used // (8 * word))
        count = prod(d.size for d in units)
        if at is not None and (units or split):
            raise LayoutError(f"{where}: a member at a bit of the cell has one unit, not {count}")
        start = end if at is None else at
        step = 8 * word * words
        if start + step * count > MAX_CELL_BITS:
            raise LayoutError(f"{where}: a cell of more than {MAX_CELL_BITS} bits")
        taken += [(start + u * step, start + u * step + used) for u in range(count)]
        top = start + step * count if at is None else -(-(start + used) // (8 * word)) * 8 * word
        end = max(end, top)
        planes = prod(d.size for d in tail + head if d.axis == BIT)
        code_bits = bits * planes
        if low < 0 or low + code_bits > 64:
            raise LayoutError(f"{where}: bits {low} to {low + code_bits}, a code has at most 64")
        dtype = m.dtype if isinstance(m, Values) else ""
        shape = tuple(n // share[a] for a, n in extents.items())
        part = Part(m.name, dtype, code_bits, shape, tuple(share[a] for a in extents), levels)
        pieces.setdefault(m.name, []).append((low, low + code_bits, part))
        members.append(Member(m.name, bits, low, start, word, words, units, fields))
        if split and (len(c.cell) > 1 or count > 1):
            raise LayoutError(f"{where}: a unit split into words must be alone in its cell")
    if over is None:
        raise LayoutError(f"{layout.name}.{c.name}: an empty cell")
    taken.sort()
    for (_, left), (right, _) in zip(taken, taken[1:], strict=False):
        if right < left:
            raise LayoutError(f"{layout.name}.{c.name}: two members claim bit {right} of the cell")
    over = _solve_words(f"{layout.name}.{c.name}", over, members[0].words)
    dtype = "u1" if len(members) > 1 else _stored_dtype(c.cell[0])
    shape = _stored_shape(layout.name, c, over, members, end // 8)
    spare = end - sum(b - a for a, b in taken)
    return Placed(c.name, dtype, shape, over, end // 8, tuple(members), spare)


def _stored_dtype(m: Codes | Values) -> str:
    return m.word if isinstance(m, Codes) else m.dtype


def _stored_shape(
    name: str, c: Component, over: tuple[Digit, ...], members: list[Member], cell_bytes: int
) -> tuple[int, ...]:
    sizes = [d.size for d in over]
    if len(members) > 1:
        sizes.append(cell_bytes)
    else:
        sizes += [d.size for d in members[0].units]
        if members[0].words > 1 and not any(d.axis == WORD for d in over):
            sizes.append(members[0].words)
    dims = c.dims or ((1, len(sizes) - 1) if len(sizes) > 1 else (len(sizes),))
    if sum(dims) != len(sizes):
        raise LayoutError(f"{name}.{c.name}: dims {dims} of {len(sizes)} digits")
    out, at = [], 0
    for n in dims:
        out.append(prod(sizes[at : at + n]))
        at += n
    return tuple(out)


def _solve(
    where: str, digits: tuple[Digit, ...], extents: Mapping[str, int]
) -> tuple[tuple[Digit, ...], dict[str, int]]:
    """Give every open size and stride its number, and prove that each axis is tiled exactly once.

    Sorted by stride, every stride must be the span of the digits below it. Returns the digits and,
    for each axis, the span below its smallest stride: how many positions share one element.
    """
    out = list(digits)
    for d in digits:
        if d.axis not in extents and d.axis not in (WORD, BIT):
            raise LayoutError(f"{where}: no axis {d.axis!r}; there are {', '.join(extents)}")
    share = {}
    for axis, extent in extents.items():
        mine = [i for i, d in enumerate(out) if d.axis == axis]
        for i in mine:
            d = out[i]
            if d.stride == TOP:
                if not d.size or extent % d.size:
                    raise LayoutError(f"{where}: {extent} along {axis!r}, needs a multiple of {d.size}")
                out[i] = replace(d, stride=max(1, extent // d.size))
        for i in mine:
            d = out[i]
            if d.size == REST:
                above = min((out[j].stride for j in mine if out[j].stride > d.stride), default=extent)
                if above % d.stride:
                    raise LayoutError(f"{where}: {above} along {axis!r}, needs a multiple of {d.stride}")
                out[i] = replace(d, size=above // d.stride)
        share[axis] = _prove(where, axis, extent, [out[i] for i in mine])
    planes = [d for d in out if d.axis == BIT]
    if any(d.size < 1 for d in planes):
        raise LayoutError(f"{where}: a digit along {BIT!r} needs a size")
    if planes:
        _prove(where, BIT, prod(d.size for d in planes), planes)
        if min(d.stride for d in planes) != 1:
            raise LayoutError(f"{where}: along {BIT!r} the digits start at {min(d.stride for d in planes)}, not 1")
    return tuple(out), share


def _prove(where: str, axis: str, extent: int, digits: list[Digit]) -> int:
    digits = sorted(digits, key=lambda d: (d.stride, d.size))
    span = low = digits[0].stride if digits else max(1, extent)
    for d in digits:
        if d.stride != span:
            raise LayoutError(f"{where}: along {axis!r} a digit of stride {d.stride} follows a span of {span}")
        span *= d.size
    if digits and span != extent:
        raise LayoutError(f"{where}: along {axis!r} the digits span {span}, the tensor {extent}")
    return low


def _solve_words(where: str, over: tuple[Digit, ...], words: int) -> tuple[Digit, ...]:
    found = [d for d in over if d.axis == WORD]
    if len(found) > 1 or any(d.size not in (REST, words) for d in found):
        raise LayoutError(f"{where}: along {WORD!r} the digits span {prod(d.size for d in found)}, the unit {words}")
    return tuple(replace(d, size=words) if d.axis == WORD else d for d in over)


def _assemble(where: str, pieces: list[tuple[int, int, Part]]) -> Part:
    """One part from its members: they cover its bits once and agree on everything else."""
    pieces = sorted(pieces, key=lambda p: p[:2])
    first, top = pieces[0][2], 0
    for low, high, part in pieces:
        if low != top:
            raise LayoutError(f"{where}: bits {low} to {high} follow bit {top} of the code")
        if (part.shape, part.dtype, part.levels) != (first.shape, first.dtype, first.levels):
            raise LayoutError(f"{where}: one member is {part.shape}, another {first.shape}")
        top = high
    if first.dtype:
        if len(pieces) > 1:
            raise LayoutError(f"{where}: values cannot be cut into members")
        return first
    if first.levels > 1 << top:
        raise LayoutError(f"{where}: {first.levels} levels in {top} bits")
    return replace(first, dtype=WORDS[max(0, (top - 1).bit_length() - 3)], bits=top)


DENSE: Final = _dense_layouts()  # a layout for every dtype that tensors are kept in: f32, bf16, i64 ...


# ---------------------------------------------------------------- JSON


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


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
    """Reads a description that anybody may have written: every key, type and bound is checked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fail(self, what: str) -> LayoutError:
        return LayoutError(f"description of {self.name!r}: {what}")

    def record(self, data: Any, what: str, need: set[str], may: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
        if not isinstance(data, dict) or not need <= data.keys() <= need | may:
            keys = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise self.fail(f"{what} has {keys}; needs {', '.join(sorted(need))}")
        return data

    def items(self, data: Any, what: str, most: int = 64) -> list[Any]:
        if not isinstance(data, list) or len(data) > most:
            raise self.fail(f"{what} is not a list of at most {most}")
        return data

    def text(self, data: Any, what: str) -> str:
        if not isinstance(data, str) or not 0 < len(data) <= 128 or not data.isprintable():
            raise self.fail(f"{what} is not a short printable text")
        return data

    def number(self, data: Any, what: str, low: int, high: int) -> int:
        if type(data) is not int or not low <= data <= high:
            raise self.fail(f"{what} is {data!r}, needs {low} to {high}")
        return data

    def choice(self, data: Any, what: str, among: tuple[str, ...]) -> str:
        if data not in among:
            raise self.fail(f"{what} is {data!r}, needs one of {', '.join(among)}")
        return str(data)

    def layout(self, data: Any) -> Layout:
        data = self.record(data, "a layout", {"name", "axes", "components", "grid"})
        name = self.text(data["name"], "the name")
        axes = tuple(self.axis(a) for a in self.items(data["axes"], "axes", 8))
        components = tuple(self.component(c) for c in self.items(data["components"], "components"))
        if not isinstance(data["grid"], dict) or not 0 < len(data["grid"]) <= 32:
            raise self.fail("the grid is not a record")
        params = {self.text(k, "a grid parameter"): _tuples(v) for k, v in data["grid"].items()}
        return Layout(name, components, grid(self.text(params.pop("name", None), "the grid"), **params), axes)

    def axis(self, data: Any) -> Axis:
        if isinstance(data, dict) and "of" in data:
            data = self.record(data, "an axis", {"name", "of"}, {"per", "pad"})
            per, pad = (self.number(data.get(k, 1), k, 1, 1 << 20) for k in ("per", "pad"))
            of = self.choice(data["of"], "of", ("rows", "cols"))
            return Axis(self.text(data["name"], "an axis"), of, per, 0, pad)
        data = self.record(data, "an axis", {"name", "size"})
        return Axis(self.text(data["name"], "an axis"), "", 1, self.number(data["size"], "size", 1, 1 << 20))

    def component(self, data: Any) -> Component | Stream:
        if isinstance(data, dict) and "stream" in data:
            data = self.record(data, "a stream", {"name", "stream"})
            return Stream(self.text(data["name"], "a stream"), self.choice(data["stream"], "its dtype", DTYPES))
        data = self.record(data, "a component", {"name", "over", "cell"}, {"dims"})
        cell = tuple(self.member(m) for m in self.items(data["cell"], "a cell"))
        dims = tuple(self.number(n, "dims", 0, 64) for n in self.items(data.get("dims", []), "dims", 8))
        return Component(self.text(data["name"], "a component"), self.digits(data["over"]), cell, dims)

    def member(self, data: Any) -> Codes | Values:
        if isinstance(data, dict) and "values" in data:
            data = self.record(data, "a member", {"values", "dtype", "digits"})
            dtype = self.choice(data["dtype"], "a dtype", DTYPES)
            return Values(self.text(data["values"], "a member"), dtype, self.digits(data["digits"]))
        data = self.record(data, "a member", {"codes", "bits", "word", "units", "fields"}, {"low", "at", "levels"})
        return Codes(
            self.text(data["codes"], "a member"),
            self.number(data["bits"], "bits", 1, 64),
            self.digits(data["units"]),
            self.digits(data["fields"]),
            self.choice(data["word"], "a word", WORDS),
            self.number(data.get("low", 0), "low", 0, 63),
            None if data.get("at") is None else self.number(data["at"], "at", 0, MAX_CELL_BITS),
            self.number(data.get("levels", 0), "levels", 0, 1 << 32),
        )

    def digits(self, data: Any) -> tuple[Digit, ...]:
        return tuple(self.digit(d) for d in self.items(data, "digits"))

    def digit(self, data: Any) -> Digit:
        if not isinstance(data, list) or len(data) not in (3, 4) or data[3:] not in ([], ["reverse"]):
            raise self.fail(f"a digit is {data!r}; needs [axis, stride, size] and perhaps 'reverse'")
        stride = self.number(data[1], "a stride", 0, MAX_EXTENT)
        return Digit(self.text(data[0], "an axis"), stride, self.number(data[2], "a size", 0, MAX_EXTENT), len(data) == 4)
