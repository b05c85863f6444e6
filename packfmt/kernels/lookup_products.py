"""Products of activations with quads of trits by looking up: the second form of the Sherry product.

A code of five bits stands for four weights, each -1, 0 or 1. For every four activations the 32 sums that there can
be are written to a table, once for a product; then a quad of a row costs a look-up and a sum, and no decoding. An
instruction looks up one table for all lanes of its register, so a lane is a row, and 32 rows go side by side.

    words     a code is looked up as it is: a register's 32 words, by the low five bits of a word (VPERMW)
    nibbles   four bits of a code are looked up in tables of 16 bytes (PSHUFB), the fifth bit is the sign

What a block of 256 columns sums up to fits 16 bits, so each dot is exact, and float32 operations follow in the order
of `tile_products`, to the same bits.

Source: T-MAC (arXiv 2407.00088) looks up sums of activations by PSHUFB
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils

from packfmt.errors import LayoutError
from packfmt.kernels import activations, simd, team
from packfmt.kernels.activations import Order, _fill_room
from packfmt.kernels.cache import njit
from packfmt.kernels.simd_code import AVX512_HERE, AVX_HERE, I8, I16, I64, Vector, all_lanes, call, constant, order
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
from packfmt.kernels.tile_products import check_floats, check_one, check_order

U8 = np.dtype(np.uint8)
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ROWS = 32  # of a group
BLOCK = 256  # columns at most: what 64 quads sum up to fits 16 bits
SCALES = {"f32": 4, "f16": 2, "bf16": 2}  # bytes of one
SHARE = 1 << 16  # bytes of codes, or as much work with a batch, that a thread claims at once
LEAST = 1 << 18  # that are worth a thread
TABLES = 1 << 20  # bytes of tables at a time, that they stay in the cache, or those of one row of activations


class Form(NamedTuple):
    """How codes are looked up.

    quads : of a piece, which are stored together
    codes, signs : bytes of a piece
    table : bytes of a table
    together : groups that one reading of the tables serves; and memory is read in four places at once faster by a
        third than in one
    ahead : bytes; what will be read of a group's codes after so many is asked for
    """

    quads: int
    codes: int
    signs: int
    table: int
    together: int
    ahead: int


BEST = "words" if AVX512_HERE else "nibbles"  # on this machine
FORMS = {
    "words": Form(16, 320, 0, 64, 4 if BEST == "words" else 1, 2560),
    "nibbles": Form(8, 128, 32, 32, 1, 4096),
}


class Tiling(NamedTuple):
    """What a kernel is compiled for.

    form : "words" or "nibbles"
    block : columns of a block, all but perhaps the last
    scale : "f32", "f16" or "bf16"
    per_row : whether a row has one scale; then the last block may be shorter
    """

    form: str
    block: int
    scale: str
    per_row: bool


class Tiles(NamedTuple):
    """Weights of `groups` times 32 rows, as flat uint8 arrays.

    codes : for each group and each 16 quads five vectors of 32 words, word i of every row's stream of codes; or for
        each group and each 8 quads four vectors of 32 bytes, the low four bits of two quads, lower first. Row r is
        word r, and row r is byte 2 r, or 2 r - 31 from row 16 on
    signs : nothing; or for each group and each 8 quads a vector of 32 bytes: their codes' fifth bits, lowest first
    scale : 32 scales for each group and block, or for each group
    table : (128,) uint8, 32 dwords: the four steps of a code, plus 1
    cols : stored columns, of whole pieces
    """

    how: Tiling
    codes: Bytes
    signs: Bytes
    scale: Bytes
    table: Bytes
    groups: int
    cols: int


def fits(how: Tiling, table: Bytes) -> bool:
    """Whether there is a kernel for this tiling and these quads, and vectors to compile it with."""
    if simd.INTERPRETED or how.form not in FORMS or how.scale not in SCALES:
        return False
    if not 0 < how.block <= BLOCK or how.block % (4 * FORMS[how.form].quads) or table.size != 128:
        return False
    steps = table.reshape(32, 4).astype(np.int64) - 1
    mirrored = (steps[16:] == -steps[:16]).all() and (abs(steps).sum(1) < 4).all()
    return bool((abs(steps) < 2).all() and (mirrored or how.form == "words"))


# ---------------------------------------------------------------- what is looked up

BYTES32, WORDS16, WORDS32 = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I16, 32)
Shorts32 = Vector("Shorts32", I16, 32)


def _lanes(build: ir.IRBuilder, vector: Any, lanes: Sequence[int]) -> Any:
    return build.shuffle_vector(vector, vector, order(lanes))


@part(lambda how: types.UniTuple(simd.Bytes64, 2))
def _patterns(write, how, table):
    """Quads of even codes and of odd ones; quads of codes 0 to 15, and what each step has more."""
    build = write.builder
    low, high = (write.load_ints16(table, write.index(at)) for at in (0, 64))
    if how.form == "nibbles":
        return [write.as_bytes(low), write.same_byte(np.uint8(1))]
    halves = (build.shuffle_vector(low.value, high.value, order(range(first, 32, 2))) for first in (0, 1))
    return [write.as_bytes(Typed(simd.Ints16, half)) for half in halves]


@part(lambda how: types.void)
def _fill(write, how, tables, at, quads, four):
    """Write the table of four activations, which are there 16 times.

    quads : two vectors, `_patterns`
    """
    build, (first, second) = write.builder, write.unpack(quads)
    sums = [write.dot4(write.zero_ints(), quad, four) for quad in (first, second)]
    if how.form == "words":  # of even codes and of odd ones, each 16 bits
        even = write.and_(sums[0], write.same_int(0xFFFF))
        write.store(tables, at, write.or_(even, write.shift_left(sums[1], 16)))
        return
    # 25 * high + low, which are 15 and 12 at most in size: so eight of each add up within a byte
    total = build.trunc(write.sub(*sums).value, WORDS16)
    high = build.add(build.mul(total, constant(WORDS16, 41)), constant(WORDS16, 512))
    high = build.ashr(high, constant(WORDS16, 10))  # 41 / 1024 is so near 1 / 25 that up to 381 this rounds total / 25
    low = build.sub(total, build.mul(high, constant(WORDS16, 25)))
    for i, half in enumerate((low, high)):
        half = Typed(simd.Bytes16, build.trunc(half, simd.Bytes16.llvm))
        write.store(tables, write.plus(at, 16 * i), half)


# ---------------------------------------------------------------- looking up

_quads = known(lambda how: FORMS[how.form].quads)
_code_bytes = known(lambda how: FORMS[how.form].codes)
_table_bytes = known(lambda how: FORMS[how.form].table)
_together = known(lambda how: FORMS[how.form].together)
_ahead = known(lambda how: FORMS[how.form].ahead)
_block = known(lambda how: how.block)
_per_row = known(lambda how: int(how.per_row))
_scale_bytes = known(lambda how: ROWS * SCALES[how.scale])


def _sums(how: Tiling) -> types.UniTuple:
    """Of each group, 16 bits for a row; or four times 16 words, of 32 rows' bytes.

    The bytes are of low parts and then of high ones: words of two rows, beside the upper of the two. So the lower
    ones' sum is the first's less 256 times the second's.
    """
    words = types.UniTuple(Shorts32, FORMS[how.form].together)
    return words if how.form == "words" else types.UniTuple(simd.Shorts16, 4)


@part(_sums)
def _start(write, how, offset):
    """Sums of a block, before it is begun. offset : int32, the activations' sum, by which words are too large"""
    build = write.builder
    if how.form == "words":
        first = all_lanes(build, build.neg(build.trunc(offset.value, I16)), 32)
        return [Typed(Shorts32, first)] * FORMS[how.form].together
    return [Typed(simd.Shorts16, constant(WORDS16, 0))] * 4


def _plus(write: Writer, at: Typed, more: Typed) -> Typed:
    """A place so many bytes further on."""
    return Typed(at.kind, write.builder.add(at.value, more.value))


def _places(write: Writer, at: Typed, apart: Typed, count: int) -> list[Typed]:
    """So many places, of which each is `apart` bytes after the one before."""
    places = [at]
    while len(places) < count:
        places.append(_plus(write, places[-1], apart))
    return places


@part(_sums)
def _add(write, how, sums, codes, at, apart, ahead, signs, tables, to):
    """Add what a piece's quads look up.

    at, apart : where the piece of the first group lies, and how many bytes after it that of the next
    ahead : how many bytes after a piece lies what is asked for
    """
    if how.form == "words":
        return _add_words(write, write.unpack(sums), codes, at, apart, ahead, tables, to)
    return _add_nibbles(write, write.unpack(sums), codes, at, ahead, signs, tables, to)


def _add_words(write, sums, codes, at, apart, ahead, tables, to):
    build, totals, groups = write.builder, [s.value for s in sums], []
    for place in _places(write, at, apart, len(sums)):
        vectors = [write.plus(place, 64 * i) for i in range(5)]
        for one in vectors:
            write.prefetch(codes, _plus(write, one, ahead))
        groups.append([build.bitcast(write.load_bytes64(codes, one).value, WORDS32) for one in vectors])
    for quad in range(16):
        table = build.bitcast(write.load_bytes64(tables, write.plus(to, 64 * quad)).value, WORDS32)
        word, bit = divmod(5 * quad, 16)
        for i, words in enumerate(groups):
            code, by = words[word], constant(WORDS32, bit)
            if bit > 11:
                code = call(build, "llvm.fshr.v32i16", WORDS32, words[word + 1], code, by)
            elif bit:
                code = build.lshr(code, by)
            totals[i] = build.add(totals[i], _look_up_word(build, table, code))
    return [Typed(Shorts32, total) for total in totals]


def _look_up_word(build: ir.IRBuilder, table: Any, index: Any) -> Any:
    """table[index & 31] of 32 words."""
    if AVX512_HERE:
        return call(build, "llvm.x86.avx512.permvar.hi.512", WORDS32, table, index)
    places = []  # of the table, the index, and what is found
    for vector in (table, build.and_(index, constant(WORDS32, 31)), table):
        place = cgutils.alloca_once(build, WORDS32)
        build.store(vector, place)
        places.append(build.bitcast(place, I16.as_pointer()))
    with cgutils.for_range(build, I64(32)) as loop:
        which = build.zext(build.load(build.gep(places[1], [loop.index])), I64)
        build.store(build.load(build.gep(places[0], [which])), build.gep(places[2], [loop.index]))
    return build.load(build.bitcast(places[2], WORDS32.as_pointer()))


SIGN_OF_BIT = [[-1 if n >> bit & 1 else 1 for n in range(16)] for bit in range(4)]  # of bits of a nibble


def _add_nibbles(write, sums, codes, at, ahead, signs, tables, to):
    build = write.builder
    # signs have a bit where codes have four
    signs_at, signs_ahead = (Typed(place.kind, build.ashr(place.value, I64(2))) for place in (at, ahead))
    for array, place, more in ((codes, at, ahead), (codes, write.plus(at, 64), ahead), (signs, signs_at, signs_ahead)):
        write.prefetch(array, _plus(write, place, more))
    totals = [constant(BYTES32, 128)] * 2  # so that bytes stay above zero
    for quad in range(8):
        index = _nibbles(write, codes, write.plus(at, 32 * (quad // 2)), quad % 2)
        bits = ir.Constant(simd.Bytes16.llvm, SIGN_OF_BIT[quad % 4])
        sign = _look_up_bytes(write, bits, _nibbles(write, signs, signs_at, quad // 4))
        for i in range(2):
            table = write.load_bytes16(tables, write.plus(to, 32 * quad + 16 * i)).value
            totals[i] = build.add(totals[i], _signed(build, _look_up_bytes(write, table, index), sign))
    words = [build.bitcast(total, WORDS16) for total in totals]
    added = [v for w in words for v in (w, build.lshr(w, constant(WORDS16, 8)))]
    return [Typed(simd.Shorts16, build.add(s.value, v)) for s, v in zip(sums, added, strict=True)]


def _nibbles(write: Writer, array: Typed, at: Typed, upper: int) -> Any:
    """The lower or upper four bits of 32 bytes."""
    build, words = write.builder, write.load_shorts16(array, at).value
    words = build.lshr(words, constant(WORDS16, 4)) if upper else words
    return build.and_(build.bitcast(words, BYTES32), constant(BYTES32, 15))


def _look_up_bytes(write: Writer, table: Any, index: Any) -> Any:
    """32 bytes of a table of 16; nobody reads the other 32, so no code is made for them."""
    wide = (_lanes(write.builder, v, [i % v.type.count for i in range(64)]) for v in (table, index))
    found = write.look_up_16(*(Typed(simd.Bytes64, v) for v in wide))
    return _lanes(write.builder, found.value, range(32))


def _signed(build: ir.IRBuilder, numbers: Any, sign: Any) -> Any:
    """Numbers times 1 or -1."""
    if AVX_HERE:
        return call(build, "llvm.x86.avx2.psign.b", BYTES32, numbers, sign)
    nothing = constant(BYTES32, 0)
    return build.select(build.icmp_signed("<", sign, nothing), build.sub(nothing, numbers), numbers)


def _dots(write: Writer, how: Tiling, sums: list[Typed], pieces: Typed) -> list[Any]:
    """Of 16 rows each, as int16."""
    build, values = write.builder, [s.value for s in sums]
    if how.form == "words":
        return [_lanes(build, v, range(first, first + 16)) for v in values for first in (0, 16)]
    too_large = build.mul(build.trunc(pieces.value, I16), I16(128 * (1 + 25)))  # what bytes began with
    low, low_upper, high, high_upper = values
    eight, dots = constant(WORDS16, 8), []
    lower = [build.sub(both, build.shl(upper, eight)) for both, upper in ((low, low_upper), (high, high_upper))]
    for a, b in (lower, (low_upper, high_upper)):
        total = build.add(a, build.mul(b, constant(WORDS16, 25)))
        dots.append(build.sub(total, all_lanes(build, too_large, 16)))
    return dots


# ---------------------------------------------------------------- the kernels


def _results(how: Tiling) -> types.UniTuple:
    return types.UniTuple(simd.Floats16, 2 * FORMS[how.form].together)


@part(_results)
def _zeros(write, how):
    return [write.zero_floats() for _ in range(_results(how).count)]


@part(_results)
def _finish(write, how, acc, sums, pieces, factor, scale, at, apart, ahead):
    """acc + float32(dot) * (scale * factor), of each 16 rows; scales of groups are `apart` bytes apart."""
    a, made = write.same_float(factor), []
    dots = _dots(write, how, write.unpack(sums), pieces)
    places = _places(write, at, apart, FORMS[how.form].together)
    halves = [write.plus(place, 16 * SCALES[how.scale] * half) for place in places for half in range(2)]
    for one, dot, place in zip(write.unpack(acc), dots, halves, strict=True):
        write.prefetch(scale, _plus(write, place, ahead))
        if how.scale == "f32":
            w = write.load_floats16(scale, place)
        else:
            convert = write.half_to_float if how.scale == "f16" else write.bfloat_to_float
            w = convert(write.load_shorts16(scale, place))
        whole = Typed(simd.Ints16, write.builder.sext(dot, simd.Ints16.llvm))
        made.append(write.addf(one, write.mulf(write.to_float(whole), write.mulf(w, a))))
    return made


@part(lambda how: types.void)
def _store(write, how, acc, out, at, apart):
    places = _places(write, at, apart, FORMS[how.form].together)
    for i, one in enumerate(write.unpack(acc)):
        write.store(out, write.plus(places[i // 2], 64 * (i % 2)), one)


# places in a product's table
CODES, SIGNS, SCALE, QUADS, GROUPS, COLS, SHARED, SOURCE = range(8)


@njit(cache=True, nogil=True)
def _multiply(kernel, job, seat):
    """Multiply groups of rows, a share at a time, as long as there are any that nobody has claimed.

    What is multiplied next is claimed before, so that its codes are asked for in time.

    job : address of a `Job`'s words; seat : of this thread
    """
    tiles, batch = number_at(job, team.PRODUCT), number_at(job, team.BATCH)
    room = number_at(job, team.SEATS + team.SEAT * seat + team.ROOM)
    codes, signs = array_at(tiles, CODES, np.uint8), array_at(tiles, SIGNS, np.uint8)
    scale, groups, cols = array_at(tiles, SCALE, np.uint8), number_at(tiles, GROUPS), number_at(tiles, COLS)
    blocks, columns = (cols + _block(kernel) - 1) // _block(kernel), 4 * _quads(kernel)  # of a piece
    row = cols // columns * _code_bytes(kernel)  # bytes of a group's codes, and then of its scales
    scales = _scale_bytes(kernel) if _per_row(kernel) else blocks * _scale_bytes(kernel)
    share = groups
    if number_at(job, team.OTHERS):
        share = max(1, number_at(tiles, SHARED) // max(1, batch * row * _together(kernel))) * _together(kernel)
    shares = (groups + share - 1) // share
    claimed = _claim(job, seat, shares)
    if claimed == shares:
        return
    x = matrix_of(number_at(job, team.X), batch, number_at(job, team.COLS), np.float32)
    out = matrix_of(number_at(job, team.OUT), batch, number_at(job, team.ROWS), np.float32)
    q, sums = array_at(room, activations.STEPS, np.int8), array_at(room, activations.SUMS, np.int32)
    factors, size = array_at(room, activations.SCALE, np.float32), batch * (cols // 4) * _table_bytes(kernel)
    tables, quads = array_of(number_at(job, team.MEMORY) + seat * size, size, np.uint8), cols // 4
    _fill_room(number_at(tiles, SOURCE), x, np.int64(0), np.int64(1), room)
    patterns = _patterns(kernel, array_at(tiles, QUADS, np.uint8))
    for i in range(batch * quads):
        _fill(kernel, tables, i * _table_bytes(kernel), patterns, simd.broadcast4(q, 4 * i))
    while claimed < shares:
        group, stop = claimed * share, min((claimed + 1) * share, groups)
        claimed = _claim(job, seat, shares)
        following = claimed * share
        while group < stop:
            # of groups that are too few to be multiplied together, each is multiplied as if it were all of them
            many = _together(kernel) if group + _together(kernel) <= stop else 1
            apart = many // _together(kernel)
            after = group + many if group + many < stop else following
            for m in range(batch):
                further = after - group if m == batch - 1 else 0  # groups, from these to what is read then
                at, scale_at, to = group * row, group * scales, m * quads * _table_bytes(kernel)
                last = at + row - _ahead(kernel)
                acc = _zeros(kernel)
                for b in range(blocks):
                    dots = _start(kernel, sums[m * blocks + b])
                    count = min(_block(kernel), cols - b * _block(kernel)) // columns
                    for _piece in range(count):
                        ahead = _ahead(kernel) if at < last else _ahead(kernel) + (further - 1) * row
                        dots = _add(kernel, dots, codes, at, apart * row, ahead, signs, tables, to)
                        at += _code_bytes(kernel)
                        to += _quads(kernel) * _table_bytes(kernel)
                    # fmt: off
                    acc = _finish(
                        kernel, acc, dots, count, factors[m * blocks + b],
                        scale, scale_at, apart * scales, further * scales,
                    )
                    # fmt: on
                    if not _per_row(kernel):
                        scale_at += _scale_bytes(kernel)
                _store(kernel, acc, out, 4 * (m * out.shape[1] + group * ROWS), apart * 4 * ROWS)
            group += many


# ---------------------------------------------------------------- the door


class Product:
    """Tiles and the order of their columns, looked at once, for many products.

    order : of the tiles' columns and blocks
    unit : what a whole number of sums counts

    Raises
    ------
    LayoutError
        If there is no kernel for the tiling, an array's dtype or shape is not what the tiles need, or the order is
        of other columns or blocks.
    """

    def __init__(self, tiles: Tiles, order: Order, unit: float = 1.0) -> None:
        check_tiles(tiles)
        check_order(order, tiles.cols, tiles.how.block)
        self.tiles, self.order = tiles, order
        weights = tiles.codes, tiles.signs, tiles.scale, tiles.table, tiles.groups, tiles.cols
        self._table = Table(*weights, SHARE, activations.source(order, unit))
        self._address = self._table.address
        self._rows, self._size = ROWS * tiles.groups, tiles.codes.nbytes
        self._nbytes = tiles.cols // 4 * FORMS[tiles.how.form].table  # of tables, for a row of activations
        self._jobs = team.jobs(order)
        self._way = _way(tiles.how)

    def __call__(self, x: Floats, out: Floats) -> None:
        """Multiply every row of activations with every row of weights, on all threads where there is much to do.

        Every result is the same whatever the batch is, and however many threads there are.

        Parameters
        ----------
        x : (batch, cols) float32, C-contiguous, of as many columns as the order brings in another
        out : (batch, 32 * groups) float32, C-contiguous, which is overwritten

        Raises
        ------
        LayoutError
            If x or `out` is another array.
        """
        check_floats(x, out, self.order.cols, self._rows)
        if not out.size:
            return
        if len(x) == 1:
            return self._few(x, out)
        most = min(team.KEPT, max(1, TABLES // max(1, self._nbytes)))
        for first in range(0, len(x), most):
            self._few(x[first : first + most], out[first : first + most])

    def _few(self, x: Floats, out: Floats) -> None:
        """The product of rows whose tables are there at once. Each thread writes its own, and so waits for no other."""
        batch = len(x)
        worth = self._size * batch // LEAST
        team.multiply(self._way, self._address, self._jobs, x, out, batch, worth, None, batch * self._nbytes)


def check_tiles(tiles: Tiles) -> None:
    """Refuse tiles of which a kernel would read what is not theirs.

    Raises
    ------
    LayoutError
        If there is no kernel for the tiling, or an array's dtype or shape is not what the tiles need.
    """
    how = tiles.how
    check_one("table", tiles.table, U8, (128,))
    if not fits(how, tiles.table):
        raise LayoutError(f"{how}: no kernel is made for this tiling and its quads; `fits` says for which one is")
    form = FORMS[how.form]
    pieces, left = divmod(tiles.cols, 4 * form.quads)
    if left or not (how.per_row or tiles.cols % how.block == 0):
        raise LayoutError(f"{tiles.cols} columns, needs whole pieces of {4 * form.quads}, and blocks of {how.block}")
    scales = tiles.groups * ROWS * (1 if how.per_row else tiles.cols // how.block)
    check_one("codes", tiles.codes, U8, (tiles.groups * pieces * form.codes,))
    check_one("signs", tiles.signs, U8, (tiles.groups * pieces * form.signs,))
    check_one("scale", tiles.scale, U8, (scales * SCALES[how.scale],))


@cache
def _way(how: Tiling) -> team.Way:
    return team.Way(_multiply, Kernel(how)._numba_type_)
