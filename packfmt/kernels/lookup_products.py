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

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from packfmt.errors import LayoutError
from packfmt.kernels import pages, simd, threads
from packfmt.kernels.simd import claim
from packfmt.kernels.simd_code import AVX512_HERE, AVX_HERE, I8, I16, I64, Vector, all_lanes, call, constant, order
from packfmt.kernels.tile_code import Kernel, Typed, Writer, known, part
from packfmt.kernels.tile_products import Activations, check_one

Bytes = npt.NDArray[np.uint8]

ROWS = 32  # of a group
BLOCK = 256  # columns at most: what 64 quads sum up to fits 16 bits
SCALES = {"f32": 4, "f16": 2, "bf16": 2}  # bytes of one
AHEAD = 4096  # bytes; what will be read after so many is asked for
SHARE = 1 << 16  # bytes of codes, or as much work with a batch, that a thread claims at once
LEAST = 1 << 18  # that are worth a thread
TABLES = 1 << 20  # bytes of tables at a time, that they stay in the cache, or those of one row of activations


class Form(NamedTuple):
    """How codes are looked up.

    quads : of a piece, which are stored together
    codes, signs : bytes of a piece
    table : bytes of a table
    together : groups that one reading of the tables serves
    """

    quads: int
    codes: int
    signs: int
    table: int
    together: int


FORMS = {"words": Form(16, 320, 0, 64, 2), "nibbles": Form(8, 128, 32, 32, 1)}
BEST = "words" if AVX512_HERE else "nibbles"  # on this machine


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
_sign_bytes = known(lambda how: FORMS[how.form].signs)
_table_bytes = known(lambda how: FORMS[how.form].table)
_together = known(lambda how: FORMS[how.form].together)
_block = known(lambda how: how.block)
_per_row = known(lambda how: int(how.per_row))
_scale_bytes = known(lambda how: ROWS * SCALES[how.scale])


def _sums(how: Tiling) -> types.UniTuple:
    """Of two groups, 16 bits for a row; or four times 16 words, of 32 rows' bytes.

    The bytes are of low parts and then of high ones: words of two rows, beside the upper of the two. So the lower
    ones' sum is the first's less 256 times the second's.
    """
    return types.UniTuple(Shorts32, 2) if how.form == "words" else types.UniTuple(simd.Shorts16, 4)


@part(_sums)
def _start(write, how, offset):
    """Sums of a block, before it is begun. offset : int32, the activations' sum, by which words are too large"""
    build = write.builder
    if how.form == "words":
        first = all_lanes(build, build.neg(build.trunc(offset.value, I16)), 32)
        return [Typed(Shorts32, first)] * 2
    return [Typed(simd.Shorts16, constant(WORDS16, 0))] * 4


@part(_sums)
def _add(write, how, sums, codes, at, other, signs, signs_at, tables, to):
    """Add what a piece's quads look up; `at` and `other` are where the codes of two groups are."""
    add = _add_words if how.form == "words" else _add_nibbles
    return add(write, write.unpack(sums), codes, at, other, signs, signs_at, tables, to)


def _add_words(write, sums, codes, at, other, _signs, _signs_at, tables, to):
    build, totals, groups = write.builder, [s.value for s in sums], []
    for place in (at, other):
        places = [write.plus(place, 64 * i) for i in range(5)]
        for one in places:
            write.prefetch(codes, write.plus(one, AHEAD))
        groups.append([build.bitcast(write.load_bytes64(codes, one).value, WORDS32) for one in places])
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


SIGNS = [[-1 if n >> bit & 1 else 1 for n in range(16)] for bit in range(4)]  # of bits of a nibble


def _add_nibbles(write, sums, codes, at, _other, signs, signs_at, tables, to):
    build = write.builder
    for one, ahead in ((at, AHEAD), (at, AHEAD + 64)):
        write.prefetch(codes, write.plus(one, ahead))
    write.prefetch(signs, write.plus(signs_at, AHEAD // 4))
    totals = [constant(BYTES32, 128)] * 2  # so that bytes stay above zero
    for quad in range(8):
        index = _nibbles(write, codes, write.plus(at, 32 * (quad // 2)), quad % 2)
        bits = ir.Constant(simd.Bytes16.llvm, SIGNS[quad % 4])
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
def _finish(write, how, acc, sums, pieces, factor, scale, at, other):
    """acc + float32(dot) * (scale * factor), of each 16 rows."""
    a, made = write.same_float(factor), []
    dots = _dots(write, how, write.unpack(sums), pieces)
    for i, (one, dot) in enumerate(zip(write.unpack(acc), dots, strict=True)):
        place = write.plus((at, other)[i // 2], 16 * SCALES[how.scale] * (i % 2))
        write.prefetch(scale, write.plus(place, 512))
        if how.scale == "f32":
            w = write.load_floats16(scale, place)
        else:
            convert = write.half_to_float if how.scale == "f16" else write.bfloat_to_float
            w = convert(write.load_shorts16(scale, place))
        whole = Typed(simd.Ints16, write.builder.sext(dot, simd.Ints16.llvm))
        made.append(write.addf(one, write.mulf(write.to_float(whole), write.mulf(w, a))))
    return made


@part(lambda how: types.void)
def _store(write, how, acc, out, at, other):
    for i, one in enumerate(write.unpack(acc)):
        write.store(out, write.plus((at, other)[i // 2], 64 * (i % 2)), one)


@njit(cache=True, nogil=True)
def _fill_all(kernel, q, table, tables):
    """The tables of all activations, four by four."""
    quads = _patterns(kernel, table)
    for i in range(q.size // 4):
        _fill(kernel, tables, i * _table_bytes(kernel), quads, simd.broadcast4(q, 4 * i))


@njit(cache=True, nogil=True)
def _multiply(kernel, codes, signs, scale, groups, cols, tables, sums, factors, out, counter, share):
    """Multiply groups of rows, `share` at a time, as long as there are any that nobody has claimed.

    sums, factors : (batch, blocks); out : (batch, rows)
    """
    batch, blocks = factors.shape
    columns = 4 * _quads(kernel)  # of a piece
    pieces, scales = cols // columns, 1 if _per_row(kernel) else blocks
    while True:
        first = claim(counter, share)
        if first >= groups:
            return
        stop = min(first + share, groups)
        for group in range(first, stop, _together(kernel)):
            second = min(group + _together(kernel), stop) - 1  # one that is left over is its own neighbour
            for m in range(batch):
                at, other = group * pieces * _code_bytes(kernel), second * pieces * _code_bytes(kernel)
                signs_at, to = group * pieces * _sign_bytes(kernel), m * cols // 4 * _table_bytes(kernel)
                scale_at, scale_other = group * scales, second * scales
                acc = _zeros(kernel)
                for b in range(blocks):
                    dots = _start(kernel, sums[m, b])
                    count = min(_block(kernel), cols - b * _block(kernel)) // columns
                    for _piece in range(count):
                        dots = _add(kernel, dots, codes, at, other, signs, signs_at, tables, to)
                        at += _code_bytes(kernel)
                        other += _code_bytes(kernel)
                        signs_at += _sign_bytes(kernel)
                        to += _quads(kernel) * _table_bytes(kernel)
                    here, there = scale_at * _scale_bytes(kernel), scale_other * _scale_bytes(kernel)
                    acc = _finish(kernel, acc, dots, count, factors[m, b], scale, here, there)
                    if not _per_row(kernel):
                        scale_at += 1
                        scale_other += 1
                row = m * out.shape[1]
                _store(kernel, acc, out, 4 * (row + group * ROWS), 4 * (row + second * ROWS))


# ---------------------------------------------------------------- the door


def multiply(tiles: Tiles, x: Activations, out: npt.NDArray[np.float32]) -> None:
    """Fill out (batch, 32 * groups) float32 with the products, on all threads where there is much to do.

    The tables of some rows of activations are written first: 16 or 8 times as many bytes as there are columns.

    Raises
    ------
    LayoutError
        If an array's dtype or shape is not what the tiles need.
    """
    check(tiles, x, out)
    rows = max(1, TABLES // max(1, tiles.cols // 4 * FORMS[tiles.how.form].table))
    if len(out) <= rows:
        return _multiply_few(tiles, x, out)
    for first in range(0, len(out), rows):
        few = slice(first, first + rows)
        _multiply_few(tiles, Activations(x.q[few], x.sums[few], x.scale[few]), out[few])


def check(tiles: Tiles, x: Activations, out: npt.NDArray[np.float32]) -> None:
    """Refuse arrays beyond which a kernel would read or write.

    Raises
    ------
    LayoutError
        If an array's dtype or shape is not what the tiles need.
    """
    how, form = tiles.how, FORMS[tiles.how.form]
    pieces, left = divmod(tiles.cols, 4 * form.quads)
    if left or not (how.per_row or tiles.cols % how.block == 0):
        raise LayoutError(f"{tiles.cols} columns, needs whole pieces of {4 * form.quads}, and blocks of {how.block}")
    batch, blocks = len(x.q), -(-tiles.cols // how.block)
    scales = tiles.groups * ROWS * (1 if how.per_row else blocks)
    wanted: dict[str, tuple[npt.NDArray[Any], type, tuple[int, ...]]] = {
        "codes": (tiles.codes, np.uint8, (tiles.groups * pieces * form.codes,)),
        "signs": (tiles.signs, np.uint8, (tiles.groups * pieces * form.signs,)),
        "scale": (tiles.scale, np.uint8, (scales * SCALES[how.scale],)),
        "table": (tiles.table, np.uint8, (128,)),
        "q": (x.q, np.int8, (batch, tiles.cols)),
        "sums": (x.sums, np.int32, (batch, blocks)),
        "scale of activations": (x.scale, np.float32, (batch, blocks)),
        "out": (out, np.float32, (batch, ROWS * tiles.groups)),
    }
    for name, (array, dtype, shape) in wanted.items():
        check_one(name, array, np.dtype(dtype), shape)


def _multiply_few(tiles: Tiles, x: Activations, out: npt.NDArray[np.float32]) -> None:
    """`multiply`, with the tables of all rows of activations at once."""
    kernel = _kernel(tiles.how)
    tables = _room(x.q.size // 4 * FORMS[tiles.how.form].table)
    _fill_all(kernel, x.q.reshape(-1), tiles.table, tables)
    work = tiles.codes.nbytes * len(out)
    share = max(2, SHARE * tiles.groups // max(1, work) // 2 * 2)
    counter = np.zeros(1, np.int64)

    def some() -> None:
        _multiply(
            kernel, tiles.codes, tiles.signs, tiles.scale, tiles.groups, tiles.cols,
            tables, x.sums, x.scale, out, counter, share,
        )  # fmt: skip

    if work < 2 * LEAST:
        return some()
    threads.share(some, work // LEAST)


@cache
def _kernel(how: Tiling) -> Kernel:
    return Kernel(how)


_here = threading.local()


def _room(nbytes: int) -> Bytes:
    """Memory for tables, the same from one product of a thread to the next: new memory costs more than filling it."""
    room: Bytes | None = getattr(_here, "room", None)
    if room is None or room.nbytes < nbytes:
        room = _here.room = pages.empty(nbytes)
    return room[:nbytes]
