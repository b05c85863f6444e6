"""What the operations of `simd` are written from: the machine's level, the types, and small pieces of LLVM code.

Source: LLVM Language Reference (vectors, shufflevector); LLVM's X86.td and AArch64Features.td (names of features)
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from packfmt.errors import PackfmtError

INTERPRETED: Final = bool(config.DISABLE_JIT)  # type: ignore[attr-defined]  # then no operation can be called

# ---- which instructions there are

SSE3: Final = frozenset({"ssse3", "sse4.1", "sse4.2"})
AVX2: Final = SSE3 | {"avx", "avx2", "f16c"}
AVX512: Final = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
# Processors that NUMBA_CPU_NAME may name, and what LLVM then takes for granted; of others only the features count.
NAMED: Final = {
    "nehalem": SSE3,
    "x86-64-v2": SSE3,
    "haswell": AVX2,
    "x86-64-v3": AVX2,
    "skylake-avx512": AVX512,
    "x86-64-v4": AVX512,
    "cascadelake": AVX512 | {"avx512vnni"},
}
# from the best down: a level, and the features that all of it needs
LEVELS: Final = {
    "avx512vnni": AVX512 | {"avx512vnni"},
    "avx512": AVX512,
    "avx2": AVX2,
    "neon": frozenset({"neon"}),
    "portable": frozenset[str](),
}


def _features() -> frozenset[str]:
    """What Numba compiles for, in LLVM's names: LLVM ends the process at an instruction that is not among them."""
    found = set(NAMED.get(config.CPU_NAME or "", ()))  # type: ignore[attr-defined]
    for one in cpu_target.target_context.codegen().magic_tuple()[2].split(","):
        (found.add if one.startswith("+") else found.discard)(one[1:])
    return frozenset(found)


def _level(features: frozenset[str]) -> str:
    """The best level that there is, or the one that PACKFMT_SIMD names."""
    there = [level for level, needs in LEVELS.items() if needs <= features]
    asked = os.environ.get("PACKFMT_SIMD") or there[0]
    if asked not in there:
        has = ", ".join(there)
        raise PackfmtError(f"PACKFMT_SIMD is {asked!r}, and this machine has {has}; name one of them or unset it")
    return asked


FEATURES: Final = _features()
LEVEL: Final = _level(FEATURES)

AVX512_HERE: Final = LEVEL.startswith("avx512")
AVX_HERE: Final = AVX512_HERE or LEVEL == "avx2"
# of ARM's code none has run on a machine: in an emulator (QEMU 5.0) all but USDOT gave the right bits
NEON: Final = LEVEL == "neon"
VPERMB: Final = LEVEL == "avx512vnni" and "avx512vbmi" in FEATURES
VPDPBUSD: Final = LEVEL == "avx512vnni" or (LEVEL == "avx2" and "avxvnni" in FEATURES)
SDOT: Final = NEON and "dotprod" in FEATURES
USDOT: Final = NEON and "i8mm" in FEATURES
BITS: Final = 512 if AVX512_HERE else 256 if AVX_HERE else 128  # of a register

# ---- types

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class Vector(types.Type):
    """So many lanes of one LLVM type, in a register."""

    def __init__(self, name: str, lane: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(lane, lanes)
        super().__init__(name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


Bytes64 = Vector("Bytes64", I8, 64)
Bytes16 = Vector("Bytes16", I8, 16)
Shorts16 = Vector("Shorts16", I16, 16)
Ints16 = Vector("Ints16", I32, 16)
Floats16 = Vector("Floats16", F32, 16)

# ---- LLVM's side: small pieces of code


def all_lanes(build: ir.IRBuilder, number: Any, lanes: int) -> Any:
    """One number in all lanes."""
    none = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = build.insert_element(none, number, I32(0))
    return build.shuffle_vector(first, none, order([0] * lanes))


def order(lanes: Sequence[int]) -> ir.Constant:
    """Which lanes a shuffle takes."""
    return ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))


def constant(kind: ir.VectorType, number: float) -> ir.Constant:
    """A constant in all lanes."""
    return ir.Constant(kind, [number] * kind.count)


def cut(build: ir.IRBuilder, vector: Any, lanes: int) -> list[Any]:
    """A vector's parts of so many lanes."""
    if vector.type.count == lanes:
        return [vector]
    starts = range(0, vector.type.count, lanes)
    return [build.shuffle_vector(vector, vector, order(range(a, a + lanes))) for a in starts]


def joined(build: ir.IRBuilder, parts: list[Any]) -> Any:
    """Parts, two by two, to one vector."""
    while len(parts) > 1:
        both = order(range(2 * parts[0].type.count))
        parts = [build.shuffle_vector(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def call(build: ir.IRBuilder, name: str, gives: ir.Type, *args: Any) -> Any:
    """LLVM's own function of this name."""
    kind = ir.FunctionType(gives, [a.type for a in args])
    return build.call(cgutils.get_or_insert_function(build.module, kind, name), args)


def on_registers(build: ir.IRBuilder, name: str, lane: ir.IntType, *args: Any) -> Any:
    """A machine's instruction on each register that its operands fill; it gives a register of such lanes."""
    parts = zip(*(cut(build, a, BITS // a.type.element.width) for a in args), strict=True)
    gives = ir.VectorType(lane, BITS // lane.width)
    return joined(build, [call(build, name, gives, *part) for part in parts])


# ---- how operations are defined


def operation(gives: Any, *takes: Any) -> Callable[[Callable[..., Any]], Any]:
    """What follows is an operation of these types; its body gets LLVM's builder and values, and gives a value."""

    def define(body: Callable[..., Any]) -> Any:
        names = list(inspect.signature(body).parameters)[1:]

        def typed(_context, *found):
            for name, wanted, got in zip(names, takes, found, strict=True):
                if isinstance(wanted, Vector) and got != wanted:
                    raise TypingError(f"simd.{body.__name__}: {name} is {got}, needs {wanted}")

            def code(_context, builder, _signature, args):
                return body(builder, *args)

            return gives(*takes), code

        return make_intrinsic(typed, body.__name__, body.__doc__, names)

    return define


def make_intrinsic(typed: Callable[..., Any], name: str, doc: str | None, parameters: Sequence[str]) -> Any:
    """Numba's intrinsic, which reads names and number of the parameters from the signature."""
    typed.__name__ = typed.__qualname__ = name
    typed.__doc__ = doc
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typed.__signature__ = inspect.Signature([inspect.Parameter(p, kind) for p in ("_context", *parameters)])  # type: ignore[attr-defined]
    return intrinsic(typed)


def lane_by_lane(name: str, method: str, kinds: Sequence[Vector]) -> Any:
    """An operation of two vectors of one type."""

    def typed(_context, a, b):
        if a != b or a not in kinds:
            raise TypingError(f"simd.{name}: got {a} and {b}, needs two of {', '.join(map(str, kinds))}")

        def code(_context, builder, _signature, args):
            return getattr(builder, method)(*args)

        return a(a, b), code

    return make_intrinsic(typed, name, f"{method}, lane by lane.", ("a", "b"))
