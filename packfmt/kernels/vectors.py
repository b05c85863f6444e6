"""Several numbers at once, in LLVM's vectors, which it has for any machine.

A plain loop over so few spends most of its time on what precedes its vectors. Lanes do not meet, and each
operation rounds on its own. Every function has a plain twin, which serves where nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

F32 = np.float32
SIGN = np.uint32(0x80000000)
ONE_EXPONENT = np.uint32(1 << 23)  # what doubles a float32, as a whole number


class Arithmetic(NamedTuple):
    """How codes of a sign, an exponent and a mantissa become numbers without a table.

    The magnitude's bits, shifted to where float32 has its exponent, are a number but for a factor, which is a
    whole number added to the exponent. A subnormal counts in steps of the same size as the exponent above has: it is
    read as if of that one, and `unit` is taken off.

    shift, magnitude, base, sign : uint32. bits = (code & magnitude) << shift, to which base is added; the sign is
        bit 31 of code << sign
    unit : float32, the smallest normal
    zero : float32, which is added: -0 changes nothing, 0 makes -0 a 0
    top : uint8. Codes of this magnitude and above are infinite or no number, and stand in a table
    """

    shift: np.uint32
    magnitude: np.uint32
    sign: np.uint32
    base: np.uint32
    unit: np.float32
    zero: np.float32
    top: np.uint8


class _Vectors(NamedTuple):
    """Vectors of so many lanes in the code of one compiled function."""

    lanes: int
    context: Any
    builder: Any

    def of(self, bits: int) -> ir.VectorType:
        return ir.VectorType(ir.FloatType() if bits == 32 else ir.IntType(bits), self.lanes)

    def all(self, number: Any) -> Any:
        """One number in all lanes."""
        none = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(none, number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, none, zeros)

    def constant(self, number: int) -> Any:
        return ir.Constant(self.of(16), [number] * self.lanes)

    def place(self, kind: types.Array, array: Any, index: Any, bits: int) -> Any:
        """Where the vector begins in an array."""
        data = self.context.make_array(kind)(self.context, self.builder, array).data
        return self.builder.bitcast(self.builder.gep(data, [index]), self.of(bits).as_pointer())

    def load(self, kind: types.Array, record: Any, byte: Any) -> Any:
        """Bytes, as numbers of 16 bits."""
        found = self.builder.load(self.place(kind, record, byte, 8))
        found.align = 1
        return self.builder.zext(found, self.of(16))


def _bytes_plainly(lanes: int) -> Callable[..., None]:
    """codes[at + i] = record[byte + i] >> shift & mask, for so many i."""

    def write(codes, at, record, byte, shift, mask):
        codes[at : at + lanes] = record[byte : byte + lanes] >> shift & mask

    return write


def _bytes(lanes: int) -> Callable[..., None]:
    """`_bytes_plainly`, compiled."""

    def write(typing, codes, at, record, byte, shift, mask):
        def code(context, builder, signature, args):
            v = _Vectors(lanes, context, builder)
            fields = builder.lshr(v.load(signature.args[2], *args[2:4]), v.all(args[4]))  # there is no shift of bytes
            place = v.place(signature.args[0], *args[:2], 8)
            builder.store(builder.trunc(builder.and_(fields, v.all(args[5])), place.type.pointee), place).align = 1
            return context.get_dummy_value()

        return types.void(codes, types.int64, record, types.int64, types.uint16, types.uint16), code

    return intrinsic(write)


def _spread_plainly(bits: int) -> Callable[..., None]:
    """Bits `low` and above of sixteen codes from as many fields of `bits` bits, one after the other from `byte` on."""

    def write(codes, at, record, byte, low):
        fields = np.unpackbits(record[byte : byte + 2 * bits], bitorder="little").reshape(16, bits)
        below = codes[at : at + 16] & np.uint8((1 << low) - 1)
        codes[at : at + 16] = below | np.packbits(fields, axis=1, bitorder="little")[:, 0] << np.uint8(low)

    return write


def _spread(bits: int) -> Callable[..., None]:
    """`_spread_plainly`, compiled: each field is cut out of the two bytes that it begins in."""

    def write(typing, codes, at, record, byte, low):
        def code(context, builder, signature, args):
            v, stored = _Vectors(16, context, builder), _Vectors(2 * bits, context, builder)
            found = builder.load(stored.place(signature.args[2], *args[2:4], 8))
            found.align = 1
            first = [bits * i // 8 for i in range(16)]
            both = [min(byte, 2 * bits - 1) for one in first for byte in (one, one + 1)]
            pairs = builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(ir.IntType(32), 32), both))
            shifts = ir.Constant(v.of(16), [bits * i % 8 for i in range(16)])
            fields = builder.and_(builder.lshr(builder.bitcast(pairs, v.of(16)), shifts), v.constant((1 << bits) - 1))
            place, one = v.place(signature.args[0], *args[:2], 8), ir.Constant(ir.IntType(16), 1)
            keep = v.all(builder.sub(builder.shl(one, args[4]), one))
            below = builder.and_(v.load(signature.args[0], *args[:2]), keep)
            both = builder.or_(below, builder.shl(fields, v.all(args[4])))
            builder.store(builder.trunc(both, place.type.pointee), place).align = 1
            return context.get_dummy_value()

        return types.void(codes, types.int64, record, types.int64, types.uint16), code

    return intrinsic(write)


def _fives_plainly(codes, at, record, byte, low):
    """Fifteen codes of 5 bits, three to each two bytes from `byte` on; the last of sixteen is anything."""
    words = record[byte : byte + 10].astype(np.uint16).reshape(5, 2)
    both = words[:, 0] | words[:, 1] << np.uint16(8)
    for j in range(3):
        codes[at + j : at + 15 : 3] = both >> np.uint16(5 * j) & np.uint16(31)


@intrinsic
def _fives(typing, codes, at, record, byte, low):
    """`_fives_plainly`, compiled: each code is cut out of its two bytes."""

    def code(context, builder, signature, args):
        v, stored = _Vectors(16, context, builder), _Vectors(10, context, builder)
        found = builder.load(stored.place(signature.args[2], *args[2:4], 8))
        found.align = 1
        bytes_ = [at for i in range(16) for at in (2 * min(i // 3, 4), 2 * min(i // 3, 4) + 1)]
        pairs = builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(ir.IntType(32), 32), bytes_))
        shifts = ir.Constant(v.of(16), [5 * (i % 3) for i in range(16)])
        fields = builder.and_(builder.lshr(builder.bitcast(pairs, v.of(16)), shifts), v.constant(31))
        place = v.place(signature.args[0], *args[:2], 8)
        builder.store(builder.trunc(fields, place.type.pointee), place).align = 1
        return context.get_dummy_value()

    return types.void(codes, types.int64, record, types.int64, types.uint16), code


def _floats_plainly(lanes: int) -> Callable[..., None]:
    """out[at + i] = number(codes[from_ + i]) * factor, by `Arithmetic`, for so many i."""

    def write(out, at, codes, from_, how, factor):
        code = codes[from_ : from_ + lanes].astype(np.uint32)
        bits = (code & how.magnitude) << how.shift
        few = (bits + how.base + ONE_EXPONENT).view(F32) - how.unit
        size = np.where(bits < ONE_EXPONENT, few, (bits + how.base).view(F32)).view(np.uint32)
        out[at : at + lanes] = ((size | code << how.sign & SIGN).view(F32) + how.zero) * factor

    return write


def _fence_plainly() -> None:
    pass


@intrinsic
def _fence(typing):
    """What was stored past the cache is seen by other threads before anything that follows."""

    def code(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


INTERPRETED = bool(config.DISABLE_JIT)  # type: ignore[attr-defined]


_sixteen_bytes = _bytes_plainly(16) if INTERPRETED else _bytes(16)


_eight_bytes = _bytes_plainly(8) if INTERPRETED else _bytes(8)


_spread_1, _spread_2, _spread_3, _spread_4, _spread_5, _spread_6, _spread_7 = (
    _spread_plainly(width) if INTERPRETED else _spread(width) for width in range(1, 8)
)


_spread_fives = _fives_plainly if INTERPRETED else _fives


_wait_for_stores = _fence_plainly if INTERPRETED else _fence
