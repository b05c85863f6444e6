"""Products of tiles with many rows of activations, by AMX; the bits are those of `tile_products`.

A *piece* is what one dot product is taken over: a plane of a block. The codes of a group of 16 rows become signed
bytes, some pieces at a time, and stay in the nearest cache while 16 rows of activations after the other pass by.
TDPBSSD gives the 16 x 16 dots of a piece, which go through memory to 16 vectors of float32, where sums grow:

    acc = acc + float32(dot) * (w * a)         each operation rounds by itself; pieces in order

Where numbers are not signed bytes, the bytes are lower by a constant, and what that makes too little is added to the
dot: a whole number times the sum of the activations. So are zero points. Numbers of two bytes are two products.

What limits it where blocks are short, as measured: storing a tile takes some 16 cycles, in which hardly anything else
is issued; loading rows takes 8 more, columns 2 to 8, and the floats 10. Beside that, while tiles are in use, only one
of two units multiplies floats and converts to them, which takes 48 cycles. TDPBF16PS would make conversions needless,
but its rows and columns are twice as long, and it came out slower with blocks of 32 and more than 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from packfmt.kernels import amx, pages, simd, threads
from packfmt.kernels import tile_products as tile
from packfmt.kernels.amx import ROW_BYTES, ROWS, instruct, place
from packfmt.kernels.cache import njit
from packfmt.kernels.tile_code import INDEX, Kernel, Typed, Writer, known, part
from packfmt.kernels.tile_products import Activations, Tiles, Tiling

DOT_TILES: Final = 4
TILE_BYTES: Final = ROWS * ROW_BYTES
CHUNK: Final = 512  # columns that are made bytes at a time: 8 kB, and as much of 16 rows of activations
# columns of a block, and rows of activations from which on this way was found to be faster
LEAST: Final = {128: 16, 32: 32, 16: 48, 0: 128}
SOURCES: Final = (__file__, amx.__file__, tile.__file__)  # Numba sees no edit of what a kernel imports
VERSION: Final = sha256(b"".join(Path(name).read_bytes() for name in SOURCES)).hexdigest()[:12]


class Form(NamedTuple):
    """What the kernel is compiled for.

    exponent, nan : of Tiles
    shift : the numbers of `tile_products`, which are unsigned, become signed bytes by taking it off
    corrects : whether something times the sum of the activations is taken off each dot
    """

    how: Tiling
    exponent: int
    nan: bool
    shift: int
    corrects: bool
    version: str = VERSION

    @property
    def in_place(self) -> bool:
        """Fields are not left where they lie in their bytes."""
        return False

    @property
    def chunk(self) -> int:
        """Columns whose codes fill whole vectors."""
        return tile.chunk(self.how.widths)

    def vectors(self, part: int) -> int:
        """Of so many columns, in `codes` (0) or `high` (1)."""
        columns = 128 if self.how.codes == "quads" else 32  # of as many bits as a code has
        return self.chunk * (*self.how.widths, 0)[part] // columns

    @property
    def parts(self) -> int:
        """Products that make one: of low bytes, and of high ones."""
        return 2 if self.how.codes == "wide" else 1

    @property
    def tiles(self) -> int:
        """Of dots at the same time, of two pieces at least: fewer where each is long in coming."""
        return DOT_TILES if self.how.block <= ROW_BYTES else 2 * self.parts

    @property
    def together(self) -> int:
        """Pieces whose dots are in tiles at the same time."""
        return self.tiles // self.parts

    @property
    def depth(self) -> int:
        """Bytes of a row of activations in a tile."""
        return min(self.how.block, ROW_BYTES)

    @property
    def deep(self) -> int:
        """Tiles of activations that a block takes; columns that fill the last are zero."""
        return -(-self.how.block // self.depth)

    @property
    def pieces(self) -> int:
        """Pieces that are made bytes at a time."""
        return max(1, CHUNK // (self.how.block * self.together)) * self.together


class Batch(NamedTuple):
    """Activations by 16 rows, the last of which are filled with zeros; so are blocks, to whole steps of pieces.

    rows : (batch / 16, blocks, deep, 16, depth) int8
    sums : (batch / 16, blocks, 16) int32
    factors : (batch / 16, blocks, 16) float32
    """

    rows: npt.NDArray[np.int8]
    sums: npt.NDArray[np.int32]
    factors: npt.NDArray[np.float32]


class Room(NamedTuple):
    """What one thread works in.

    columns : (parts, pieces * block * 16) int8, and what a tile may read past the end
    weights : (pieces, 16) float32
    zeros : (pieces, 16) int32, what is taken off times the sum of the activations
    dots : (2 * parts, 16, 16) int32, of two pieces
    acc : (batch / 16, 16, 16) float32
    """

    columns: npt.NDArray[np.int8]
    weights: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.int32]
    dots: npt.NDArray[np.int32]
    acc: npt.NDArray[np.float32]


# ---------------------------------------------------------------- writing instructions


def _sixteen(form: Form) -> types.Type:
    return types.UniTuple(simd.Floats16, ROWS)


_block = known(lambda form: form.how.block)
_planes = known(lambda form: form.how.planes)
_chunk = known(lambda form: form.chunk)
_pieces = known(lambda form: form.pieces)
_together = known(lambda form: form.together)
_per_row = known(lambda form: int(form.how.per_row))
_corrects = known(lambda form: int(form.corrects))
_scale_bytes = known(lambda form: tile.SCALES[form.how.scale] * ROWS)


@part(_sixteen)
def _no_sums(write, form):
    return [write.zero_floats()] * ROWS


@part(_sixteen)
def _load_sums(write, form, acc, at):
    return [write.load_floats16(acc, write.plus(at, ROW_BYTES * i)) for i in range(ROWS)]


@part(lambda form: types.void)
def _store_sums(write, form, sums, acc, at):
    for i, one in enumerate(write.unpack(sums)):
        write.store(acc, write.plus(at, ROW_BYTES * i), one)


@part(lambda form: types.void)
def _make_bytes(write, form, codes, high, index, tables, out, to, half):
    """Chunk `index` of the codes as signed bytes: a vector for each four columns, of high bytes `half` on."""
    build, loaded = write.builder, []
    for which, array in enumerate((codes, high)):
        size = form.vectors(which) * ROW_BYTES
        at = Typed(types.intp, build.mul(index.value, INDEX(size)))
        for _ in range(form.vectors(which)):
            write.prefetch(array, write.plus(at, tile.AHEAD))
        loaded.append([write.load_bytes64(array, write.plus(at, ROW_BYTES * i)) for i in range(form.vectors(which))])
    tables, less = write.unpack(tables), write.same_byte(np.uint8(form.shift))
    for step, code in enumerate(tile.steps_of(write, form, *loaded)):
        for i, number in enumerate(tile.numbers_of(write, form, code, tables)):
            here = Typed(types.intp, build.add(to.value, half.value)) if i else to
            write.store(out, write.plus(here, ROW_BYTES * step), write.sub(number, less))


@part(lambda form: types.void)
def _make_weights(write, form, scale, scale_at, zero, zero_at, whole, whole_at, rest, weights, zeros, to):
    """What a piece's dots are multiplied by; and what is taken off, times sums."""
    write.store(weights, to, tile.weight_scale(write, form, scale, scale_at, whole, whole_at))
    if form.corrects:
        less = write.same_int(rest)
        if form.how.zero:
            less = write.add(less, write.widen(write.load_bytes16(zero, zero_at)))
        write.store(zeros, to, less)


class _Sources(NamedTuple):
    """Where the tiles of a step's pieces come from.

    rows, columns : of `Batch` and `Room`, from which on bytes are counted
    rows_at : of block 0 of these 16 rows; columns_at : of the step's first piece; half : from low bytes to high ones
    piece : the step's first, counted from the first of the row
    """

    rows: Typed
    rows_at: Typed
    columns: Typed
    columns_at: Typed
    half: Typed
    piece: Typed


def _into_tiles(write: Writer, form: Form, t: int, step: _Sources) -> None:
    """The dots of piece t of a step."""
    build = write.builder
    block = build.udiv(build.add(step.piece.value, INDEX(t)), INDEX(form.how.planes))
    for is_high in range(form.parts):
        number = t * form.parts + is_high
        a = build.add(step.rows_at.value, build.mul(block, INDEX(form.deep * ROWS * form.depth)))
        b = build.add(step.columns_at.value, build.mul(step.half.value, INDEX(is_high)))
        one, other = 4 + number % 2, 6 + number % 2
        instruct(build, "tilezero", number)
        for d in range(form.deep):
            more = t * form.how.block * ROWS + d * TILE_BYTES
            instruct(build, "tileloadd64", one, _pointer(write, step.rows, a, d * ROWS * form.depth), INDEX(form.depth))
            instruct(build, "tileloadd64", other, _pointer(write, step.columns, b, more), INDEX(ROW_BYTES))
            instruct(build, "tdpbssd", number, one, other)


def _out_of_tiles(write: Writer, form: Form, t: int, dots: Typed) -> None:
    """The dots of piece t of a step, into one half of `dots`."""
    for is_high in range(form.parts):
        to = _pointer(write, dots, INDEX(0), (t % 2 * form.parts + is_high) * TILE_BYTES)
        instruct(write.builder, "tilestored64", t * form.parts + is_high, to, INDEX(ROW_BYTES))


def _pointer(write: Writer, array: Typed, at: Any, more: int) -> Any:
    """To byte at + more of an array."""
    return place(write.context, write.builder, array.kind, array.value, write.builder.add(at, INDEX(more)))


@part(lambda form: types.void)
def _begin(write, form, rows, columns, half, rows_at, columns_at, piece, rows_next, columns_next, next_piece, dots):
    """What `_step` finds: a step's dots in tiles, but those of its first piece in `dots`, and the next step begun."""
    for t in range(form.together):
        _into_tiles(write, form, t, _Sources(rows, rows_at, columns, columns_at, half, piece))
    _out_of_tiles(write, form, 0, dots)
    _into_tiles(write, form, 0, _Sources(rows, rows_next, columns, columns_next, half, next_piece))


@part(_sixteen)
def _step(
    write, form, rows, columns, half, rows_at, columns_at, next_piece, rows_then, columns_then, then_piece,
    dots, acc, weights, zeros, weights_at, factors, sums, factors_at, piece,
):  # fmt: skip
    """acc + float32(dot) * (w * a), for `together` pieces in order.

    While a piece's dots are added, those of the one after it go from tiles to memory, and its tiles begin with what
    comes a step later: tiles take long, and the floats keep the rest busy.

    rows_at, columns_at, next_piece : of the step after this one; rows_then ... : of the step after that
    weights_at : of the first piece; factors_at : of the first block
    """
    build, made = write.builder, write.unpack(acc)
    following = _Sources(rows, rows_at, columns, columns_at, half, next_piece)
    then = _Sources(rows, rows_then, columns, columns_then, half, then_piece)
    for t in range(form.together):
        ahead = (t + 1) % form.together
        _out_of_tiles(write, form, ahead, dots)
        _into_tiles(write, form, ahead, following if ahead else then)
        here = write.plus(weights_at, ROW_BYTES * t)
        w = write.load_floats16(weights, here)
        less = write.load_ints16(zeros, here) if form.corrects else None
        block = build.udiv(build.add(piece.value, INDEX(t)), INDEX(form.how.planes))
        of_block = Typed(types.intp, build.add(factors_at.value, build.mul(block, INDEX(4 * ROWS))))
        for i in range(ROWS):
            of_row = write.plus(of_block, 4 * i)
            there = write.index(t % 2 * form.parts * TILE_BYTES + ROW_BYTES * i)
            dot = write.load_ints16(dots, there)
            if form.parts == 2:
                high = write.load_ints16(dots, write.plus(there, TILE_BYTES))
                dot = write.add(dot, write.shift_left(high, 8))
            if less:
                dot = write.sub(dot, write.mul(less, write.as_ints(write.broadcast4(sums, of_row))))
            a = write.as_floats(write.as_ints(write.broadcast4(factors, of_row)))
            made[i] = write.addf(made[i], write.mulf(write.to_float(dot), write.mulf(w, a)))
    return made


# ---------------------------------------------------------------- the loops


@njit(cache=True, nogil=True)
def _multiply(
    kernel, codes, high, scale, zero, whole, table, groups, cols, rest, told,
    rows, sums, factors, batches, columns, weights, zeros, dots, acc, out, counter,
):  # fmt: skip
    """Claim groups of 16 rows of weights, one at a time, until there are no more.

    rows, sums, factors, batches : of `Batch`, and its length; columns ... acc : of `Room`
    """
    amx.configure(told)
    pieces = -(-cols // _block(kernel)) * _planes(kernel)
    while True:
        group = simd.claim(counter, 1)
        if group >= groups:
            break
        for first in range(0, pieces, _pieces(kernel)):
            end = min(first + _pieces(kernel), pieces)
            _unpack(kernel, codes, high, table, group, first, end, cols, columns)
            _weigh(kernel, scale, zero, whole, group, first, end, pieces, rest, weights, zeros)
            _add_pieces(kernel, rows, sums, factors, batches, first, end, columns, weights, zeros, dots, acc)
        for row in range(out.shape[0]):
            simd.store(out, (row * groups + group) * ROW_BYTES, simd.load_floats16(acc, row * ROW_BYTES))
    amx.release()


@njit(cache=True, nogil=True)
def _by_tiles(q, blocks, out):
    """(16 * tall * blocks, deep * depth) int32 -> (tall, blocks or more, deep, 16, depth) int32."""
    rows, depth = q.shape[0] // blocks, out.shape[4]
    for row in range(rows):
        for block in range(blocks):
            for d in range(out.shape[2]):
                for i in range(depth):
                    out[row // ROWS, block, d, row % ROWS, i] = q[row * blocks + block, d * depth + i]


@njit(cache=True, nogil=True, inline="always")
def _add_pieces(kernel, rows, sums, factors, batches, first, end, columns, weights, zeros, dots, acc):
    """Add pieces first to end to the sums of all rows of activations, 16 rows after the other.

    Tiles are two steps ahead: also of the end of 16 rows, and at the last they begin again, to no effect.
    """
    half, together = columns.size // 2, _together(kernel)
    of_rows, of_factors = rows.size // batches, factors.size // batches * 4
    of_step = together * _block(kernel) * ROWS
    steps = -(-(end - first) // together)
    step1, m1 = 1 % steps, 1 // steps % batches
    _begin(
        kernel, rows, columns, half, 0, 0, first,
        m1 * of_rows, step1 * of_step, first + step1 * together, dots,
    )  # fmt: skip
    for m in range(batches):
        total = _no_sums(kernel) if first == 0 else _load_sums(kernel, acc, m * TILE_BYTES)
        for step in range(steps):
            step2, m2 = step1 + 1, m1
            if step2 == steps:
                step2, m2 = 0, m1 + 1
            if m2 == batches:
                m2 = 0
            total = _step(
                kernel, rows, columns, half, m1 * of_rows, step1 * of_step, first + step1 * together,
                m2 * of_rows, step2 * of_step, first + step2 * together, dots, total,
                weights, zeros, step * together * ROW_BYTES, factors, sums, m * of_factors, first + step * together,
            )  # fmt: skip
            step1, m1 = step2, m2
        _store_sums(kernel, total, acc, m * TILE_BYTES)


@njit(cache=True, nogil=True, inline="always")
def _unpack(kernel, codes, high, table, group, first, end, cols, columns):
    """Pieces first to end as signed bytes. A block that is shorter leaves what was there, which meets zeros only."""
    tables = tile.load_tables(kernel, table)
    out = _chunk(kernel) * ROWS  # bytes that a chunk becomes
    half = columns.size // 2
    of_piece, of_group = _block(kernel) // _chunk(kernel), cols // _chunk(kernel) * _planes(kernel)
    full = cols // _block(kernel) * _planes(kernel)  # pieces that are not shorter
    at = group * of_group + first * of_piece
    for i in range((min(end, full) - first) * of_piece):
        _make_bytes(kernel, codes, high, at + i, tables, columns, i * out, half)
    shorter = cols % _block(kernel) // _chunk(kernel)
    for piece in range(max(first, full), end):
        at = group * of_group + full * of_piece + (piece - full) * shorter
        for i in range(shorter):
            to = ((piece - first) * of_piece + i) * out
            _make_bytes(kernel, codes, high, at + i, tables, columns, to, half)


@njit(cache=True, nogil=True, inline="always")
def _weigh(kernel, scale, zero, whole, group, first, end, pieces, rest, weights, zeros):
    """The numbers beside pieces first to end; 0 where there is no piece, so that nothing is added."""
    for piece in range(first, end):
        at = group * _planes(kernel) + piece % _planes(kernel) if _per_row(kernel) else group * pieces + piece
        _make_weights(
            kernel, scale, at * _scale_bytes(kernel), zero, at * ROWS, whole, group * ROW_BYTES, rest,
            weights, zeros, (piece - first) * ROW_BYTES,
        )  # fmt: skip
    for piece in range(end - first, -(-(end - first) // _together(kernel)) * _together(kernel)):
        simd.store(weights, piece * ROW_BYTES, simd.zero_floats())


# ---------------------------------------------------------------- the doors


@cache
def _kernel(form: Form) -> Kernel:
    return Kernel(form)


def fits(how: Tiling) -> bool:
    """Whether there is a kernel for this tiling."""
    return tile.fits(how) and how.block % 4 == 0


def pays(how: Tiling, batch: int) -> bool:
    """Whether so many rows of activations are multiplied faster here than by `tile_products`.

    Tiles are 16 rows high, and a block's dots go through memory, which few columns do not make up for.
    """
    return batch >= next(least for block, least in LEAST.items() if how.block >= block)


def multiply(tiles: Tiles, x: Activations, out: npt.NDArray[np.float32]) -> None:
    """Multiply every row of activations with every row of weights; call it only where `amx.available()`.

    Every result is that of `tile_products.multiply`, however many threads there are.

    Parameters
    ----------
    tiles : of a tiling that `fits`
    x : as many columns, and blocks of them, as the tiles have
    out : (batch, 16 * groups) float32, C-contiguous, which is overwritten

    Raises
    ------
    LayoutError
        If there is no kernel for the tiling, or an array's dtype or shape is not what the tiles need.
    """
    tile.check_tiles(tiles)
    tile.check_activations(tiles, x, out)
    if not out.size:
        return
    form, rest = _form(tiles)
    kernel, batch, told = _kernel(form), _batch(form, x), amx.configuration(form.depth)
    table = tiles.table if len(tiles.table) else tile.NO_TABLE
    parts = (tiles.codes, tiles.high, tiles.scale, tiles.zero, tiles.whole, table)
    weights = [_unwritable(a) for a in parts]
    counter = np.zeros(1, np.int64)
    multiply_all: Callable[..., None] = _multiply

    def work() -> None:
        room = _room(form, len(batch.rows))
        multiply_all(
            kernel, *weights, tiles.groups, tiles.cols, np.int32(rest), told,
            *batch, len(batch.rows), *room, out, counter,
        )  # fmt: skip

    threads.share(work, tiles.groups)


def _unwritable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mapped files and other arrays are of one type then, and need one kernel."""
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view


def _form(tiles: Tiles) -> tuple[Form, int]:
    """What the kernel is compiled for, and what is left of the bias. What does not matter is always the same."""
    shift, rest = _signed(tiles)
    exponent, nan = (tiles.exponent, tiles.nan) if tiles.how.scale == "e8m0" else (0, False)
    return Form(tiles.how, exponent, nan, shift, tiles.how.zero or rest != 0), rest


def _signed(tiles: Tiles) -> tuple[int, int]:
    """What is taken off each byte to make it signed, and what of the bias is left then."""
    how = tiles.how
    if how.codes == "wide":
        return 128, tiles.bias - 128 - 256 * 128
    low, high = 0, (1 << min(8, sum(how.widths))) - 1
    if how.codes in ("table", "quads"):
        low, high = int(tiles.table.min()), int(tiles.table.max())
    if low - tiles.bias >= -128 and high - tiles.bias <= 127:
        return tiles.bias % 256, 0
    shift = 128 if high > 127 else 0
    return shift, tiles.bias - shift


def _batch(form: Form, x: Activations) -> Batch:
    """Activations by 16 rows; what is not there is zero."""
    (height, cols), blocks, block = x.q.shape, x.sums.shape[1], form.how.block
    tall, width = -(-height // ROWS), form.deep * form.depth
    more = blocks + form.together  # what steps of pieces may read past the last
    rows = _aligned((tall, more, form.deep, ROWS, form.depth), np.int8)
    rows[:, blocks:] = 0
    q = x.q
    if (height, cols, block) != (tall * ROWS, blocks * block, width):
        q = np.zeros((tall * ROWS, blocks, width), np.int8)
        whole = cols // block
        q[:height, :whole, :block] = x.q[:, : whole * block].reshape(height, whole, block)
        if whole < blocks:
            q[:height, whole, : cols - whole * block] = x.q[:, whole * block :]
    _by_tiles(_unwritable(q.reshape(-1, width).view(np.int32)), blocks, rows.view(np.int32))
    return Batch(rows, *(_by_rows(a, tall, more) for a in (x.sums, x.scale)))


def _by_rows(values: npt.NDArray[Any], tall: int, more: int) -> npt.NDArray[Any]:
    """(batch, blocks) -> (tall, more, 16); what is not there is zero."""
    height, blocks = values.shape
    out = _aligned((tall, more, ROWS), values.dtype)
    if height < tall * ROWS:
        values = np.concatenate([values, np.zeros((tall * ROWS - height, blocks), values.dtype)])
    out[:, :blocks] = values.reshape(tall, ROWS, blocks).transpose(0, 2, 1)
    out[:, blocks:] = 0
    return out


def _room(form: Form, tall: int) -> Room:
    """Of one thread, for so many times 16 rows of activations."""
    columns = form.pieces * form.how.block * ROWS + TILE_BYTES
    return Room(
        _aligned((2, columns), np.int8),
        _aligned((form.pieces, ROWS), np.float32),
        _aligned((form.pieces, ROWS), np.int32),
        _aligned((2 * form.parts, ROWS, ROWS), np.int32),
        _aligned((tall, ROWS, ROWS), np.float32),
    )


def _aligned(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """An array without content that begins at a multiple of 64 bytes."""
    return pages.empty(prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
