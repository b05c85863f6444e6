"""Products of activations with weights in tiles: 16 rows side by side, a vector lane each.

A dword of codes of each of 16 rows makes one vector of 64 bytes; four activations, the same for all rows, are
multiplied with its bytes and summed into the rows' 32-bit lanes. One source, `_multiply`, serves every tiling.
It is compiled for a type that holds the `Tiling`, and what depends on that (where a code lies in its vector, what
number it stands for, what a scale is) is written out by the intrinsics below, which are loops over fields unrolled.

A block's dot is an exact whole number, and float32 operations follow in one fixed order, each rounded on its own:

    acc = acc + float32(dot) * (weight_scale * activation_scale)        blocks ascending, planes within them

so the bits do not depend on the batch's division, on threads, or on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from packfmt.errors import LayoutError
from packfmt.kernels import activations, simd, team
from packfmt.kernels.activations import Order, _fill_room
from packfmt.kernels.cache import njit
from packfmt.kernels.simd import load_ints16, prefetch, store, xor, zero_ints
from packfmt.kernels.team import _claim
from packfmt.kernels.tile_code import (
    Kernel,
    Table,
    Typed,
    Writer,
    array_at,
    array_of,
    known,
    matrix_of,
    number_at,
    part,
)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ROWS = 16  # of a group, as a vector has 16 dwords
VECTOR = 64  # bytes
WIDTHS = ((1,), (2,), (4,), (8,), (2, 1), (4, 1), (4, 2), (5,))
SCALES = {"f32": 4, "f16": 2, "bf16": 2, "e8m0": 1, "e4m3": 1, "ue4m3": 1}  # bytes of one
BATCHES = (1, 2, 4, 8)  # rows of activations that one pass over a group's codes may serve
# bytes; what will be read after so many is asked for. 4096 and 6144 took 1.05 to 1.6 times as long as 8192
AHEAD = 8192
CLAIMS: Final = 32  # parts of the work that threads claim, one by one: a late thread just takes fewer
LEAST: Final = 1 << 18  # bytes of codes, or as much work with a batch, that are worth another thread's while
NO_TABLE: Final = np.zeros(128, np.uint8)
INT: Final = ir.IntType(32)


class Tiling(NamedTuple):
    """What a kernel is compiled for.

    widths : bits of a code's parts, low bits first: (1,) (2,) (4,) (8,) (2, 1) (4, 1) (4, 2), or (5,) for quads
    codes : what a code stands for, less `Tiles.bias`: "direct" itself; "signed" its byte in two's complement;
        "table" a byte of the table; "wide" 256 times a byte of a second table more; "quads" four bytes
    block : columns of a block, all but perhaps the last
    planes : 1, or planes that are summed
    zero : whether each row and block, or row, has a zero point, one byte
    scale : "f32", "f16", "bf16", "e8m0", "e4m3" or "ue4m3"
    per_row : whether a row (of a plane) has one scale; then the last block may be shorter
    whole : "", "times" or "divides": what the number `whole` of each row does to its scales
    reciprocal : whether a weight counts 1 / scale
    """

    widths: tuple[int, ...]
    codes: str
    block: int
    planes: int
    zero: bool
    scale: str
    per_row: bool
    whole: str
    reciprocal: bool


class Tiles(NamedTuple):
    """Weights of `groups` times 16 rows; components are flat and empty where there is none.

    codes, high : uint8. For each group, block and plane the block's vectors; byte 4r + j of one belongs to row r
    scale : uint8, the bytes of 16 scales for each group, block and plane, or for each group and plane
    zero : uint8, 16 likewise
    whole : (16 * groups,) float32
    table : (128,) uint8: 16 or 64 entries, repeated to 64, twice for low and high bytes; of quads 32 dwords
    bias : what every number of a code or table is less
    exponent, nan : e8m0 is 2**(byte - exponent), and 255 is no number or it is
    unit : what a whole number of `bias` counts; `Activations.scale` has it already
    cols : stored columns, a multiple of what one vector of the narrowest width holds
    """

    how: Tiling
    codes: Bytes
    high: Bytes
    scale: Bytes
    zero: Bytes
    whole: npt.NDArray[np.float32]
    table: Bytes
    bias: int
    exponent: int
    nan: bool
    unit: float
    groups: int
    cols: int


class Activations(NamedTuple):
    """Activations as whole numbers.

    q : (batch, cols) int8, in the order of stored columns
    sums : (batch, blocks) int32, of q
    scale : (batch, blocks) float32, what one counts times `Tiles.unit`
    """

    q: npt.NDArray[np.int8]
    sums: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]


def chunk(widths: tuple[int, ...]) -> int:
    """Columns whose codes fill whole vectors of every width: those of one vector of the narrowest."""
    return 128 if widths == (5,) else 32 // min(widths)


def fits(how: Tiling) -> bool:
    """Whether there is a kernel for this tiling, and vectors to compile it with."""
    codes = {
        (5,): ("quads",),
        (8,): ("direct", "signed"),
        (4, 1): ("direct", "table", "wide"),
        (4, 2): ("direct", "table", "wide"),
    }.get(how.widths, ("direct", "table", "wide") if how.widths in WIDTHS else ())
    return (
        not simd.INTERPRETED
        and how.codes in codes
        and how.scale in SCALES
        and how.whole in ("", "times", "divides")
        and 0 < how.block <= 256
        and how.block % chunk(how.widths) == 0
        and how.planes > 0
    )


# ---------------------------------------------------------------- what a kernel is compiled for


class Form(NamedTuple):
    """A tiling, and what else is known when its kernel is compiled.

    batch : rows of activations that are multiplied with a vector of codes once that is cut up
    narrow : whether all numbers of codes are below 128
    exponent, nan : of Tiles
    """

    how: Tiling
    batch: int
    narrow: bool
    exponent: int
    nan: bool

    @property
    def chunk(self) -> int:
        return chunk(self.how.widths)

    def vectors(self, part: int) -> int:
        """Of a chunk, in `codes` (0) or `high` (1)."""
        if self.how.codes == "quads":
            return 5 if part == 0 else 0
        return self.chunk * self.how.widths[part] // 32 if part < len(self.how.widths) else 0

    @property
    def in_place(self) -> bool:
        """Whether fields are multiplied where they lie, and sums shifted: saves shifts, but takes more sums."""
        return (
            self.batch == 1
            and self.how.codes == "direct"
            and self.how.widths in ((1,), (2,), (4,))
            and simd.LEVEL == "avx512vnni"
        )

    @property
    def sums(self) -> int:
        """Vectors of sums for each row of the batch, that the sum of one need not wait for the one before."""
        if self.in_place:
            return 8 // self.how.widths[0]
        if self.how.codes == "wide":
            return 2
        return {1: 4 if self.how.block > 64 else 2}.get(self.batch, 1)


# ---------------------------------------------------------------- parts of the kernel


_batch = known(lambda form: form.batch)
_block = known(lambda form: form.how.block)
_chunk = known(lambda form: form.chunk)
_pieces = known(lambda form: form.how.block // form.chunk)
_planes = known(lambda form: form.how.planes)
_per_row = known(lambda form: int(form.how.per_row))
_code_bytes = known(lambda form: form.vectors(0) * VECTOR)
_high_bytes = known(lambda form: form.vectors(1) * VECTOR)
_scale_bytes = known(lambda form: SCALES[form.how.scale] * ROWS)


@part(lambda form: types.UniTuple(simd.Bytes64, 2))
def load_tables(write, form, table):
    """The table's two vectors."""
    return [write.load_bytes64(table, write.index(VECTOR * i)) for i in range(2)]


@part(lambda form: types.UniTuple(simd.Ints16, form.batch * form.sums))
def _start(write, form, sums, at, bias):
    """Sums of a block's products: what the bias takes off, and zeros that the following sums begin with."""
    build, rows = write.builder, []
    for i in range(form.batch):
        four = write.as_ints(write.broadcast4(sums, write.plus(at, 4 * i)))
        first = build.extract_element(four.value, INT(0))
        less = build.neg(build.mul(first, build.trunc(bias.value, INT)))
        rows.append(write.same_int(Typed(types.int32, less)))
    return rows + [write.zero_ints() for _ in range(form.batch * (form.sums - 1))]


def _field(write: Writer, vector: Typed, first: int, width: int, to: int) -> Typed:
    """Bits [first, first + width) of every byte, moved to `to`."""
    if first > to:
        vector = write.shift_fields(vector, first - to)
    elif first < to:
        vector = write.as_bytes(write.shift_left(write.as_ints(vector), to - first))
    return vector if width == 8 else write.and_(vector, write.same_byte(np.uint8((1 << width) - 1 << to)))


def steps_of(write: Writer, form: Form, low: list[Typed], high: list[Typed]) -> Iterator[Typed]:
    """A chunk's codes, a byte each: four columns a step."""
    if form.how.widths == (5,):  # a stream of 5-bit codes in each lane
        words = [write.as_ints(v) for v in low]
        for first in range(0, 160, 5):
            word, bit = divmod(first, 32)
            code = write.shift_right(words[word], bit) if bit else words[word]
            yield write.funnel(words[word + 1], words[word], bit) if bit > 27 else code
        return
    width, *more = form.how.widths
    for step in range(form.chunk // 4):
        vector, field = divmod(step, 8 // width)
        first = field * width
        if not more and form.how.codes in ("table", "wide") and width == 4:  # the look-up sees four bits only
            yield write.shift_fields(low[vector], first) if first else low[vector]
            continue
        code = _field(write, low[vector], first, width, first if form.in_place else 0)
        for upper in more:
            vector, field = divmod(step, 8 // upper)
            code = write.or_(code, _field(write, high[vector], field * upper, upper, width))
        yield code


def numbers_of(write: Writer, form: Form, code: Typed, tables: list[Typed]) -> list[Typed]:
    """What codes stand for, as unsigned bytes; of wide ones the low bytes and the high ones."""
    match form.how.codes:
        case "signed":
            return [write.xor(code, write.same_byte(np.uint8(128)))]
        case "quads":
            return [write.as_bytes(write.look_up_words(*map(write.as_ints, tables), code))]
        case "direct":
            return [code]
    look_up = write.look_up_16 if sum(form.how.widths) <= 4 else write.look_up_64
    return [look_up(table, code) for table in tables[: 1 + (form.how.codes == "wide")]]


@part(lambda form: types.UniTuple(simd.Ints16, form.batch * form.sums))
def _add(write, form, dots, codes, at, high, high_at, q, q_at, tables):
    """Add a chunk's products to the sums: its codes are cut up once for all rows of the batch."""
    sums, tables = write.unpack(dots), write.unpack(tables)
    parts = []
    for which, (array, place) in enumerate(((codes, at), (high, high_at))):
        places = [write.plus(place, VECTOR * i) for i in range(form.vectors(which))]
        for one in places:
            write.prefetch(array, write.plus(one, AHEAD))
        parts.append([write.load_bytes64(array, one) for one in places])
    dot = write.dot4 if form.narrow and not form.in_place else write.dot4_wide
    for step, code in enumerate(steps_of(write, form, *parts)):
        numbers = numbers_of(write, form, code, tables)
        for i in range(form.batch):
            four = write.broadcast4(q, write.plus(q_at, 4 * (step * form.batch + i)))
            for which, number in enumerate(numbers):
                to = i + form.batch * (which if len(numbers) > 1 else step % form.sums)
                sums[to] = (dot if which == 0 else write.dot4_wide)(sums[to], number, four)
    return sums


def _total(write: Writer, form: Form, sums: list[Typed]) -> Typed:
    """The dots of one row of the batch, of its sums."""
    total = sums[0]
    for i, one in enumerate(sums[1:], 1):
        if form.in_place:
            one = write.shift_right_signed(one, i * form.how.widths[0])
        elif form.how.codes == "wide":
            one = write.shift_left(one, 8)
        total = write.add(total, one)
    return total


def weight_scale(write: Writer, form: Form, scale: Typed, at: Typed, whole: Typed, whole_at: Typed) -> Typed:
    """What one counts in each of 16 rows."""
    match form.how.scale:
        case "f32":
            w = write.load_floats16(scale, at)
        case "f16":
            w = write.half_to_float(write.load_shorts16(scale, at))
        case "bf16":
            w = write.bfloat_to_float(write.load_shorts16(scale, at))
        case "e8m0":
            w = write.e8m0_to_float(write.load_bytes16(scale, at), form.exponent, form.nan)
        case "e4m3":
            w = write.e4m3_to_float(write.load_bytes16(scale, at))
        case _:
            w = write.ggml_e4m3_to_float(write.load_bytes16(scale, at))
    if form.how.whole:
        operation = write.mulf if form.how.whole == "times" else write.divf
        w = operation(w, write.load_floats16(whole, whole_at))
    return write.divf(write.same_float(np.float32(1)), w) if form.how.reciprocal else w


@part(lambda form: types.UniTuple(simd.Floats16, form.batch))
def _finish(write, form, acc, dots, sums, factors, at, scale, scale_at, zero, zero_at, whole, whole_at):
    """acc + float32(dot) * (w * a), for each row of the batch."""
    write.prefetch(scale, write.plus(scale_at, 512))
    w = weight_scale(write, form, scale, scale_at, whole, whole_at)
    dots, made = write.unpack(dots), []
    for i, one in enumerate(write.unpack(acc)):
        dot = _total(write, form, dots[i :: form.batch])
        here = write.plus(at, 4 * i)
        if form.how.zero:
            zeros = write.widen(write.load_bytes16(zero, zero_at))
            dot = write.sub(dot, write.mul(zeros, write.as_ints(write.broadcast4(sums, here))))
        a = write.as_floats(write.as_ints(write.broadcast4(factors, here)))
        made.append(write.addf(one, write.mulf(write.to_float(dot), write.mulf(w, a))))
    return made


@part(lambda form: types.UniTuple(simd.Floats16, form.batch))
def _zeros(write, form):
    return [write.zero_floats() for _ in range(form.batch)]


@part(lambda form: types.void)
def _store(write, form, acc, out, at, stride, count):
    """Write 16 rows' results for the first `count` rows of the batch, whose places lie `stride` bytes apart."""
    build = write.builder
    for i, one in enumerate(write.unpack(acc)):
        this = write.index(i).value
        with build.if_then(build.icmp_signed("<", this, count.value), likely=True):
            write.store(out, Typed(at.kind, build.add(at.value, build.mul(stride.value, this))), one)


# ---------------------------------------------------------------- the kernel

# places in a product's table
CODES, HIGH, SCALE, ZERO, WHOLE, TABLE, BIAS, GROUPS, COLS, BLOCKS, CLAIM, SOURCE = range(12)


@njit(cache=True, nogil=True)
def _multiply(kernel, job, seat):
    """Multiply groups of rows, so many at once, as long as there are any that nobody has claimed.

    Rows of the batch that are multiplied together make a part of it, and lie side by side.

    job : address of a `Job`'s words; seat : of this thread
    """
    tiles, batch, start = number_at(job, team.PRODUCT), number_at(job, team.BATCH), number_at(job, team.START)
    codes, high = array_at(tiles, CODES, np.uint8), array_at(tiles, HIGH, np.uint8)
    scale, zero = array_at(tiles, SCALE, np.uint8), array_at(tiles, ZERO, np.uint8)
    whole, bias = array_at(tiles, WHOLE, np.float32), number_at(tiles, BIAS)
    groups, cols, blocks = number_at(tiles, GROUPS), number_at(tiles, COLS), number_at(tiles, BLOCKS)
    planes, per_row, block_cols, chunk_cols = _planes(kernel), _per_row(kernel), _block(kernel), _chunk(kernel)
    code_bytes, high_bytes, scale_bytes = _code_bytes(kernel), _high_bytes(kernel), _scale_bytes(kernel)
    pieces = cols // chunk_cols  # of a row of a plane
    at_once = number_at(tiles, CLAIM) if number_at(job, team.OTHERS) else groups
    shares = (groups + at_once - 1) // at_once
    claimed = _claim(job, seat, shares)
    if claimed == shares:
        return
    for at in range(0, AHEAD, VECTOR):
        prefetch(codes, claimed * at_once * pieces * planes * code_bytes + at)
    x = matrix_of(number_at(job, team.X), batch, number_at(job, team.COLS), np.float32)
    out = matrix_of(number_at(job, team.OUT), batch, number_at(job, team.ROWS), np.float32)
    own = seat if start < batch else 0
    room, width = number_at(job, team.SEATS + team.SEAT * own + team.ROOM), _batch(kernel)
    q, sums = array_at(room, activations.STEPS, np.int8), array_at(room, activations.SUMS, np.int32)
    factors = array_at(room, activations.SCALE, np.float32)
    if start < batch:
        _fill_room(number_at(tiles, SOURCE), x, start, width, room)
    parts = (batch + width - 1) // width
    scales = planes if per_row else planes * blocks  # of a row
    stride = 4 * ROWS * groups
    tables = load_tables(kernel, array_at(tiles, TABLE, np.uint8))
    while claimed < shares:
        first, stop = claimed * at_once, (claimed + 1) * at_once
        for group in range(first, stop if stop < groups else groups):
            for one in range(parts):
                at, high_at = group * pieces * planes * code_bytes, group * pieces * planes * high_bytes
                scale_at = group * scales
                acc = _zeros(kernel)
                for block in range(blocks):
                    block_at = 4 * width * (one * blocks + block)
                    here = _pieces(kernel)
                    if per_row:
                        scale_at = group * scales
                        left = pieces - block * here
                        here = left if left < here else here
                    for _plane in range(planes):
                        q_at = width * (one * cols + block * block_cols)
                        dots = _start(kernel, sums, block_at, bias)
                        for _piece in range(here):
                            dots = _add(kernel, dots, codes, at, high, high_at, q, q_at, tables)
                            at += code_bytes
                            high_at += high_bytes
                            q_at += width * chunk_cols
                        # fmt: off
                        acc = _finish(
                            kernel, acc, dots, sums, factors, block_at, scale, scale_at * scale_bytes,
                            zero, scale_at * ROWS, whole, group * 4 * ROWS,
                        )
                        # fmt: on
                        scale_at += 1
                _store(kernel, acc, out, one * width * stride + group * 4 * ROWS, stride, batch - one * width)
        claimed = _claim(job, seat, shares)


@njit(cache=True, nogil=True)
def _read(address, size, out):
    """The exclusive or of so many bytes, lane by lane of a vector; size is a multiple of eight vectors."""
    buffer = array_of(address, size, np.uint8)
    a = b = c = d = zero_ints()
    for at in range(0, size, 8 * VECTOR):
        a = xor(xor(a, load_ints16(buffer, at)), load_ints16(buffer, at + 4 * VECTOR))
        b = xor(xor(b, load_ints16(buffer, at + VECTOR)), load_ints16(buffer, at + 5 * VECTOR))
        c = xor(xor(c, load_ints16(buffer, at + 2 * VECTOR)), load_ints16(buffer, at + 6 * VECTOR))
        d = xor(xor(d, load_ints16(buffer, at + 3 * VECTOR)), load_ints16(buffer, at + 7 * VECTOR))
    store(out, 0, xor(xor(a, b), xor(c, d)))


# ---------------------------------------------------------------- the doors


class Product:
    """Tiles and the order of their columns, looked at once, for many products.

    After megabytes of weights nothing of Python is in the cache, and every line of it costs a microsecond. So a
    product is one call of a compiled function, with addresses that are known.

    order : of the tiles' columns and blocks

    Raises
    ------
    LayoutError
        If there is no kernel for the tiling, an array's dtype or shape is not what the tiles need, or the order is
        of other columns or blocks.
    """

    def __init__(self, tiles: Tiles, order: Order) -> None:
        check_tiles(tiles)
        check_order(order, tiles.cols, tiles.how.block)
        self.tiles, self.order = tiles, order
        weights = (tiles.codes, tiles.high, tiles.scale, tiles.zero, tiles.whole)
        table = tiles.table if len(tiles.table) else NO_TABLE
        numbers = (tiles.bias, tiles.groups, tiles.cols, len(order.ends), max(1, tiles.groups // CLAIMS))
        self._table = Table(*weights, table, *numbers, activations.source(order, tiles.unit))
        self._address = self._table.address
        self._rows = ROWS * tiles.groups
        self._nbytes = tiles.codes.nbytes + tiles.high.nbytes
        self._jobs = team.jobs(order)
        self._way = _way(_form(tiles, 1))

    def __call__(self, x: Floats, out: Floats) -> None:
        """Multiply every row of activations with every row of weights, on all threads where there is work for them.

        Every result is the same whatever the batch is, and however many threads there are.

        Parameters
        ----------
        x : (batch, cols) float32, C-contiguous, of as many columns as the order brings in another
        out : (batch, 16 * groups) float32, C-contiguous, which is overwritten

        Raises
        ------
        LayoutError
            If x or `out` is another array.
        """
        check_floats(x, out, self.order.cols, self._rows)
        if not out.size:
            return
        batch = len(x)
        if batch > 1:
            return self._many(x, out)
        team.multiply(self._way, self._address, self._jobs, x, out, 1, self._nbytes // LEAST + 1)

    def _many(self, x: Floats, out: Floats) -> None:
        """A batch. Few activations each thread makes whole numbers for itself, so that none waits for another."""
        parts, width = _division(len(x))
        most = self._nbytes * -(-len(x) // 4) // LEAST + 1  # as if of so many bytes
        fill = None
        if x.size >= 2 * activations.LEAST_NUMBERS:
            fill = partial(activations.fill, x, self.order, self.tiles.unit, width)
        team.multiply(_way(_form(self.tiles, width)), self._address, self._jobs, x, out, parts * width, most, fill)


def read(buffer: Bytes) -> int:
    """The exclusive or of all bytes, found as fast as one thread reads memory: what a product can hope for.

    buffer : uint8, C-contiguous
    """
    whole = buffer.size - buffer.size % (8 * VECTOR)
    rest = buffer[whole:]
    if simd.INTERPRETED:
        rest = buffer
    else:
        found = np.empty(VECTOR, np.uint8)
        _read(buffer.ctypes.data, whole, found)
        rest = np.concatenate([found, rest])
    return int(np.bitwise_xor.reduce(rest))


def _form(tiles: Tiles, batch: int) -> Form:
    """What does not matter is always the same, so that there is one kernel."""
    how, table = tiles.how, tiles.table
    if simd.LEVEL == "avx512vnni":  # one instruction for all bytes
        narrow = True
    elif how.codes in ("table", "wide"):
        narrow = bool(table[:VECTOR].max() < 128)
    else:
        narrow = how.widths != (8,)
    exponent, nan = (tiles.exponent, tiles.nan) if how.scale == "e8m0" else (0, False)
    return Form(how, batch, narrow, exponent, nan)


@cache
def _way(form: Form) -> team.Way:
    return team.Way(_multiply, Kernel(form)._numba_type_)


def _division(batch: int) -> tuple[int, int]:
    """How many parts, of how many rows each."""
    parts = -(-batch // BATCHES[-1])
    return parts, next(b for b in BATCHES if b * parts >= batch)


@cache
def _needs(how: Tiling, groups: int, cols: int) -> tuple[int, ...]:
    """Sizes of codes, high, scale, zero, whole, and of the table if there is one.

    Raises
    ------
    LayoutError
        If there is no kernel for the tiling, or no so many columns.
    """
    if not fits(how):
        raise LayoutError(f"{how}: no kernel is made for this tiling here; `fits` says for which one is")
    step = how.block if not how.per_row else chunk(how.widths)
    if groups < 0 or cols < 0 or cols % step:
        raise LayoutError(f"{groups} groups of {cols} columns, needs a multiple of {step} columns")
    codes = groups * cols * how.planes * 2  # bytes of a bit of each
    scales = groups * ROWS * how.planes * (1 if how.per_row else cols // how.block)
    return (
        codes * 5 // 4 if how.codes == "quads" else codes * how.widths[0],
        codes * how.widths[1] if len(how.widths) == 2 else 0,
        scales * SCALES[how.scale],
        scales * how.zero,
        groups * ROWS * bool(how.whole),
        *([2 * VECTOR] if how.codes in ("table", "wide", "quads") else []),
    )


F32, U8, I8, I32 = (np.dtype(name) for name in ("<f4", "u1", "i1", "<i4"))
PARTS: Final = ("codes", "high", "scale", "zero", "whole", "table")


def check_tiles(tiles: Tiles) -> None:
    """Refuse tiles of which a kernel would read what is not theirs.

    Raises
    ------
    LayoutError
        If there is no kernel for the tiling, or an array's dtype or shape is not what the tiles need.
    """
    sizes = _needs(tiles.how, tiles.groups, tiles.cols)
    weights = (tiles.codes, tiles.high, tiles.scale, tiles.zero, tiles.whole, tiles.table)
    sizes = (*sizes, len(NO_TABLE) if len(tiles.table) else 0)[: len(PARTS)]
    for name, array, size in zip(PARTS, weights, sizes, strict=True):
        check_one(name, array, F32 if name == "whole" else U8, (size,))


def check_order(order: Order, cols: int, block: int) -> None:
    """Refuse an order that is of other stored columns than tiles are, or of other blocks.

    Raises
    ------
    LayoutError
        If it is.
    """
    blocks = -(-cols // block)
    if order.stored != cols or len(order.ends) != blocks or (order.ends[:-1] != block * np.arange(1, blocks)).any():
        found = f"{order.stored} columns in {len(order.ends)} blocks"
        raise LayoutError(f"order of {found}, needs {cols} columns in blocks of {block}")


def check_floats(x: Floats, out: Floats, cols: int, rows: int) -> None:
    """Refuse activations that have not so many columns, and results that are not of as many rows.

    Raises
    ------
    LayoutError
        If an array's dtype or shape is another, or `out` may not be written.
    """
    good = x.dtype is F32 and out.dtype is F32 and x.ndim == 2 and x.shape[1] == cols and out.shape == (len(x), rows)
    if good and x.flags.c_contiguous and out.flags.carray:
        return
    check_one("x", x, F32, (*x.shape[:1], cols))
    check_one("out", out, F32, (len(x), rows))
    if not out.flags.writeable:
        raise LayoutError("out may not be written; give an array of your own")


def check_activations(tiles: Tiles, x: Activations, out: Floats) -> None:
    """Refuse activations and results that do not belong to tiles.

    Raises
    ------
    LayoutError
        If an array's dtype or shape is not what the tiles need, or `out` may not be written.
    """
    batch, blocks = len(x.q), -(-tiles.cols // tiles.how.block)
    check_one("q", x.q, I8, (batch, tiles.cols))
    check_one("sums", x.sums, I32, (batch, blocks))
    check_one("scale of activations", x.scale, F32, (batch, blocks))
    check_one("out", out, F32, (batch, ROWS * tiles.groups))
    if not out.flags.writeable:
        raise LayoutError("out may not be written; give an array of your own")


def check_one(name: str, array: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Refuse an array of another dtype or shape, or that is not C-contiguous.

    Raises
    ------
    LayoutError
        If it is one.
    """
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        how = "" if array.flags.c_contiguous else ", not contiguous"
        raise LayoutError(f"{name} is {array.dtype} {array.shape}{how}, needs {dtype} {shape}, contiguous")
