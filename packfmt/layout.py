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
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from math import lcm, prod
from typing import Any, Final

import numpy as np

from packfmt.errors import LayoutError

REST: Final = 0  # a digit's size: what the shape leaves between its stride and the next digit's
TOP: Final = 0  # a digit's stride: the highest of its axis, so extent // size
WORD: Final = "word"  # pseudo-axis: which word of a unit that is wider than one
BIT: Final = "bit"  # pseudo-axis: which bit of a code; bit planes are digits along it

MAX_EXTENT: Final = 1 << 48  # of rows, columns, axes, digits
MAX_BYTES: Final = 1 << 56  # of a component or part, so that every bit has a number in int64

# NumPy spells the byte order out; ml_dtypes names the rest. A closed list: files bring these strings.
DTYPES: Final = (
    *("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "?"),
    *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
WORDS: Final = ("u1", "<u2", "<u4", "<u8")
CODINGS: Final = ("csr", "csr_merged", "tiles_merged", "ell", "gaps")  # of outliers' places
COMBINE: Final = ("add", "replace")


@dataclass(frozen=True, slots=True)
class Axis:
    """One logical axis: the rows or columns of the weight, a multiple of them, or a fixed count.

    `of` names "rows" or "cols", of which `per` make one step (quads: of="cols", per=4), and `plus` steps
    come after them (channels that are stored twice); the extent is rounded up to a multiple of `pad`, the
    added positions holding code zero. Without `of`, `size` is the extent (planes).
    """

    name: str
    of: str = ""
    per: int = 1
    size: int = 0
    pad: int = 1
    plus: int = 0

    def extent(self, sides: Mapping[str, int]) -> int:
        """Positions along it, without padding, for so many rows and cols."""
        return sides[self.of] // self.per + self.plus if self.of else self.size


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

    `dims` says how many of its digits (those of `over`, then a lone member's units and words, or a
    record's bytes) make each dimension of the stored array; empty means the first digit, then all
    others. A record is a cell of several members, or of one that starts `at` a bit. The last cell of a
    `ragged` component may reach beyond the weight; what lies there holds zeros.
    """

    name: str
    over: tuple[Digit, ...]
    cell: tuple[Codes | Values, ...]
    dims: tuple[int, ...] = ()
    doc: str = field(default="", compare=False)
    ragged: bool = False


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
    """The grid of a function of `grids` and its parameters."""
    return Grid(name, tuple(sorted(params.items())))


@dataclass(frozen=True, slots=True)
class Sparse:
    """Numbers of single weights beside those that the grid gives: outliers (`outliers` reads and writes them).

    coding : how parts say where they are, one of `CODINGS`
    combine : "add", to the number that the grid gives there; or "replace" it
    """

    coding: str
    combine: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A format's geometry and grid. The name is for life: other bytes, other name.

    `purpose`, `sources` and `also` (what containers call it) may be mended; everything else is
    in the canonical JSON, whose SHA-256 is the layout's `id`.

    hadamard : what is stored is the weight times the normalised Hadamard matrix of this size, for every so many
        neighbouring columns; decoding undoes it (`kernels.hadamard`). 0: stored as it is
    sparse : how some weights differ from what the grid gives; None: they do not
    """

    name: str
    components: tuple[Component | Stream, ...]
    grid: Grid
    axes: tuple[Axis, ...] = (ROWS, COLS)
    purpose: str = field(default="", compare=False)
    sources: tuple[str, ...] = field(default=(), compare=False)
    also: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (container, its name)
    hadamard: int = 0
    sparse: Sparse | None = None
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        if not self._hash:  # found once: a plan asks for it with every step
            mine = hash((self.name, self.components, self.grid, self.axes, self.hadamard, self.sparse))
            object.__setattr__(self, "_hash", mine or 1)
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:  # another process has other hashes
        return Layout, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def to_json(self) -> dict[str, Any]:
        """The description as plain data: all that decides a byte or a number, and nothing else."""
        from packfmt import description

        return description.write(self)

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """The layout of a description, such as a file carries.

        Raises
        ------
        LayoutError
            If `data` is not what `to_json` gives for some layout.
        """
        from packfmt import description

        return description.read(data)

    @property
    def canonical(self) -> str:
        """The description as JSON text with sorted keys and no spaces."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    @property
    def id(self) -> str:
        """SHA-256 of `canonical`, in hexadecimal."""
        return _id(self)

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
        return dict(_block(self))

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
    """One logical array of a packed tensor: codes, scales ... Axes in the order of the layout's, without padding."""

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
    record: bool  # cells are stored as bytes, not as the words of a lone member
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

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def itemsize(name: str) -> int:
    """Bytes of a dtype in `DTYPES`."""
    return dtype_of(name).itemsize


def _inner(m: Codes | Values) -> tuple[Digit, ...]:
    return (*m.units, *m.fields) if isinstance(m, Codes) else m.digits


def _as_codes(m: Codes | Values) -> Codes:
    """A whole number is a code that fills its word."""
    return m if isinstance(m, Codes) else Codes(m.name, 8 * itemsize(m.dtype), m.digits, word=m.dtype)


_NOUN = {"rows": "rows", "cols": "columns"}


@lru_cache(maxsize=1024)
def _fit(layout: Layout, n_rows: int, n_cols: int) -> Fitted:
    sides, block = {"rows": n_rows, "cols": n_cols}, _block(layout)
    for name, have in sides.items():
        bounded(layout.name, f"the number of {_NOUN[name]}", have, 0, MAX_EXTENT)
        if have % block[name]:
            raise LayoutError(f"{layout.name}: {have} {_NOUN[name]}, needs a multiple of {block[name]}")
    real = {a.name: a.extent(sides) for a in layout.axes}
    extents = {a.name: -(-real[a.name] // a.pad) * a.pad for a in layout.axes}
    pieces: dict[str, list[tuple[int, Part]]] = {}
    placed = [_place(layout.name, c, real, extents, pieces) for c in layout.components if isinstance(c, Component)]
    parts = {name: _assemble(f"{layout.name}.{name}", found) for name, found in pieces.items()}
    for name, size in [(c.name, c.nbytes) for c in placed] + [(p.name, 8 * prod(p.shape)) for p in parts.values()]:
        bounded(f"{layout.name}.{name}", "its size in bytes", size, 0, MAX_BYTES)
    for s in layout.streams:
        parts[s.name] = Part(s.name, s.dtype, 8 * itemsize(s.dtype), (-1,), (), 0)
    return Fitted(layout, extents, tuple(placed), parts)


def _place(
    layout: str, c: Component, real: dict[str, int], extents: dict[str, int], pieces: dict[str, list[tuple[int, Part]]]
) -> Placed:
    members: list[Member] = []
    taken: list[Taken] = []
    end = 0  # first free bit
    over: tuple[Digit, ...] = ()
    split = any(d.axis == WORD for d in c.over)
    for m in c.cell:
        where, code = f"{layout}.{c.name}.{m.name}", _as_codes(m)
        bits, at, word = code.bits, code.at, itemsize(code.word)
        solved, share = _solve(where, (*c.over, *_inner(m)), extents, c.ragged)
        head, first_field = solved[: len(c.over)], len(c.over) + len(code.units)
        over = over if members else head
        if head != over:
            raise LayoutError(f"{where}: its cells run over {_words(head)}, those of the component over {_words(over)}")
        units, fields = solved[len(c.over) : first_field], solved[first_field:]
        used = bits * prod(d.size for d in fields)
        words = -(-used // (8 * word))
        count, step = prod(d.size for d in units), 8 * word * words
        if at is not None and (units or split):
            raise LayoutError(f"{where}: a member at a bit of the cell has one unit, not {count}")
        if split and (len(c.cell) > 1 or units):
            raise LayoutError(f"{where}: a unit split into words must be alone in its cell")
        start = end if at is None else at
        end = max(end, start + step * count if at is None else -(-(start + used) // (8 * word)) * 8 * word)
        mine = Taken(where, start, step, count, used)
        for other in taken:
            if (bit := mine.meets(other)) is not None:
                raise LayoutError(f"{where}: bit {bit} of the cell is claimed by {other.where}, too")
        taken.append(mine)
        code_bits = bits * prod(d.size for d in solved if d.axis == BIT)
        if code.low + code_bits > 64:
            raise LayoutError(f"{where}: bits {code.low} to {code.low + code_bits}, a code has at most 64")
        if isinstance(m, Values) and code_bits != bits:
            raise LayoutError(f"{where}: along {BIT!r} only codes can be cut")
        dtype = m.dtype if isinstance(m, Values) else ""
        shape = tuple(-(-real[a] // s) if s else 1 for a, s in share.items())
        shared = tuple(s or max(1, extents[a]) for a, s in share.items())
        pieces.setdefault(m.name, []).append((code.low, Part(m.name, dtype, code_bits, shape, shared, code.levels)))
        members.append(Member(m.name, bits, code.low, start, word, words, units, fields))
    over = _solve_words(f"{layout}.{c.name}", over, members[0].words)
    spare = end - sum(t.count * t.used for t in taken)
    record = len(c.cell) > 1 or _as_codes(c.cell[0]).at is not None
    stored = _stored(f"{layout}.{c.name}", c, over, members[0], end // 8 if record else None)
    return Placed(c.name, *stored, over, end // 8, tuple(members), record, spare)


@dataclass(frozen=True, slots=True)
class Taken:
    """The bits of a cell that one member uses: `count` units of `used` bits, each `step` after the one before."""

    where: str
    start: int
    step: int
    count: int
    used: int

    def meets(self, other: Taken) -> int | None:
        """A bit that both use. One of the two has a single unit, or starts where the other ends."""
        one, many = (self, other) if self.count <= 1 else (other, self)
        if not (one.count and one.used and many.count and many.used):
            return None
        end = one.start + one.used
        unit = min(many.count - 1, max(0, end - 1 - many.start) // many.step)  # the last that starts before `end`
        first = many.start + unit * many.step
        return max(first, one.start) if first < end and one.start < first + many.used else None


def _words(digits: tuple[Digit, ...]) -> str:
    return " ".join(f"{d.axis}:{d.stride}x{d.size}" for d in digits)


def _stored(
    where: str, c: Component, over: tuple[Digit, ...], m: Member, record_bytes: int | None
) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of the stored array: the words of a lone member, or the bytes of a record."""
    sizes = [d.size for d in over]
    if record_bytes is not None:
        sizes.append(record_bytes)
    else:
        sizes += [d.size for d in m.units]
        sizes += [m.words] if m.words > 1 and not any(d.axis == WORD for d in over) else []
    dims = c.dims or ((1, len(sizes) - 1) if len(sizes) > 1 else (len(sizes),))
    if sum(dims) != len(sizes):
        raise LayoutError(f"{where}: dims {dims} of {len(sizes)} digits")
    ends = list(accumulate(dims, initial=0))
    return "u1" if record_bytes is not None else _as_codes(c.cell[0]).word, tuple(
        prod(sizes[a:b]) for a, b in pairwise(ends)
    )


def _solve(
    where: str, digits: tuple[Digit, ...], extents: Mapping[str, int], ragged: bool = False
) -> tuple[tuple[Digit, ...], dict[str, int]]:
    """Give every open size and stride its number, and prove that each axis is tiled exactly once.

    Sorted by stride, every stride must be the span of the digits below it. Returns the digits and,
    for each axis, the smallest stride: how many positions share one element, or 0 if all do.
    """
    out, share = list(digits), {}
    for axis, extent in extents.items():
        mine = [i for i, d in enumerate(out) if d.axis == axis]
        whole = extent or _multiple(axis, digits)  # an axis of no extent is proved as if it had one block
        if ragged and mine:  # as if the last cell were whole
            step = _multiple(axis, digits)
            whole = -(-whole // step) * step
        for i in mine:
            d = out[i]
            if d.stride == TOP:
                if whole % d.size:
                    raise LayoutError(f"{where}: {whole} along {axis!r}, needs a multiple of {d.size}")
                out[i] = replace(d, stride=whole // d.size)
        for i in mine:
            d = out[i]
            if d.size == REST:
                others = [(out[j].stride, digits[j].stride == TOP) for j in mine]
                above = min((stride for stride, top in others if stride > d.stride or top), default=whole)
                if above % d.stride:
                    raise LayoutError(f"{where}: {above} along {axis!r}, needs a multiple of {d.stride}")
                out[i] = replace(d, size=above // d.stride)
        share[axis] = _prove(where, axis, whole, [out[i] for i in mine]) if mine else 0
        if mine and not extent:
            still = [i for i in mine if digits[i].size == REST]
            if not still:
                raise LayoutError(f"{where}: along {axis!r} the digits span {whole}, the tensor 0")
            for i in still:
                out[i] = replace(out[i], size=0)
    planes = [d for d in out if d.axis == BIT]
    if planes and (first := min(d.stride for d in planes)) != 1:
        raise LayoutError(f"{where}: along {BIT!r} the digits start at {first}, not 1")
    if planes:
        _prove(where, BIT, prod(d.size for d in planes), planes)
    return tuple(out), share


def _prove(where: str, axis: str, extent: int, digits: list[Digit]) -> int:
    digits = sorted(digits, key=lambda d: (d.stride, d.size))
    span = digits[0].stride
    for d in digits:
        if d.stride != span:
            raise LayoutError(f"{where}: along {axis!r} a digit of stride {d.stride} follows a span of {span}")
        span *= d.size
    if span != extent:
        raise LayoutError(f"{where}: along {axis!r} the digits span {span}, the tensor {extent}")
    return digits[0].stride


def _solve_words(where: str, over: tuple[Digit, ...], words: int) -> tuple[Digit, ...]:
    found = [d for d in over if d.axis == WORD]
    if len(found) > 1 or any(d.size not in (REST, words) for d in found):
        raise LayoutError(f"{where}: along {WORD!r} the digits span {prod(d.size for d in found)}, the unit {words}")
    return tuple(replace(d, size=words) if d.axis == WORD else d for d in over)


def _assemble(where: str, pieces: list[tuple[int, Part]]) -> Part:
    """One part from its members: they cover its bits once and agree on everything else."""
    pieces = sorted(pieces, key=lambda piece: piece[0])
    first, top = pieces[0][1], 0
    for low, part in pieces:
        if low != top:
            raise LayoutError(f"{where}: bits {low} to {low + part.bits} follow bit {top} of the code")
        if (part.shape, part.share) != (first.shape, first.share):
            raise LayoutError(f"{where}: one member is {part.shape}, another {first.shape}")
        if (part.dtype, part.levels) != (first.dtype, first.levels):
            raise LayoutError(f"{where}: its members differ in dtype or levels")
        top = low + part.bits
    if first.dtype:
        return first
    if first.levels > 1 << top:
        raise LayoutError(f"{where}: {first.levels} levels in {top} bits")
    return replace(first, dtype=WORDS[max(0, (top - 1).bit_length() - 3)], bits=top)


@lru_cache(maxsize=1024)
def _id(layout: Layout) -> str:
    return hashlib.sha256(layout.canonical.encode()).hexdigest()


@lru_cache(maxsize=1024)
def _block(layout: Layout) -> Mapping[str, int]:
    """`Layout.block`, after the checks that need no shape."""
    from packfmt import description

    description.check(layout)
    out = {"rows": 1, "cols": max(1, layout.hadamard)}
    for axis in layout.axes:
        if axis.of:
            for component, _, digits in layout.members():
                need = _multiple(axis.name, digits) if axis.pad == 1 and not component.ragged else 1
                if axis.plus % need:
                    raise LayoutError(
                        f"{layout.name}: {axis.plus} more along {axis.name!r}, needs a multiple of {need}"
                    )
                out[axis.of] = lcm(out[axis.of], axis.per * need)
                if out[axis.of] > MAX_EXTENT:
                    raise LayoutError(f"{layout.name}: blocks of more than 2**48 along {axis.name!r}")
    return out


def _multiple(axis: str, digits: tuple[Digit, ...]) -> int:
    """What an extent must be a multiple of for these digits to tile it; 1 if they leave it out."""
    mine = [d for d in digits if d.axis == axis]
    return prod(d.size or 1 for d in mine) * min((d.stride for d in mine if d.stride), default=1)


def bounded(where: str, what: str, value: int, low: int, high: int) -> None:
    """Refuse what is no whole number from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise LayoutError(f"{where}: {what} is {value!r}, needs {low} to {high}")


DENSE: Final = _dense_layouts()  # a layout for every dtype that tensors are kept in: f32, bf16, i64 ...
