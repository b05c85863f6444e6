"""Parts of kernels that are written out when a kernel is compiled, for what is known of its form by then.

A `Kernel` is an argument without content: its Numba type holds the form. A `part` is an intrinsic that gets the form
and a `Writer`, and writes instructions by the names that `simd` has for them; loops of Python are unrolled so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from packfmt.kernels import simd

VERSION: Final = f"{simd.VERSION}-{sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
INDEX: Final = ir.IntType(64)


class Kernel:
    """A value without content, whose Numba type holds a form: a tuple of whatever the code depends on."""

    def __init__(self, form: Any) -> None:
        self._numba_type_ = KernelType(form)


class KernelType(types.Type):
    """Its name is the key of the kernel in Numba's caches."""

    def __init__(self, form: Any) -> None:
        self.form = form
        super().__init__(name=f"{type(form).__name__}({tuple(form)}, {VERSION})")


register_model(KernelType)(models.OpaqueModel)


@unbox(KernelType)
def _unbox(kind: KernelType, value: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


class Typed(NamedTuple):
    """A value of the function that is being written."""

    kind: types.Type
    value: Any


class Writer:
    """Writes the instructions of `simd`'s operations: write.dot4(sums, codes, activations)."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def __getattr__(self, name: str) -> Callable[..., Typed]:
        define = getattr(simd, name).__wrapped__

        def call(*args: Any) -> Typed:
            typed = [self.typed(a) for a in args]
            signature, code = define(self.context.typing_context, *(t.kind for t in typed))
            return Typed(signature.return_type, code(self.context, self.builder, signature, [t.value for t in typed]))

        return call

    def typed(self, value: Any) -> Typed:
        """Typed values as they are; a number is a constant of its type, int32 if Python's."""
        if isinstance(value, Typed):
            return value
        numbers = {bool: types.boolean, int: types.int32, np.uint8: types.uint8, np.float32: types.float32}
        kind = numbers[type(value)]
        return Typed(kind, self.context.get_constant(kind, value.item() if isinstance(value, np.generic) else value))

    def index(self, number: int) -> Typed:
        """A place in an array, or a count."""
        return Typed(types.intp, ir.Constant(INDEX, number))

    def plus(self, at: Typed, more: int) -> Typed:
        """A place so many bytes further on."""
        return Typed(at.kind, self.builder.add(at.value, ir.Constant(INDEX, more))) if more else at

    def unpack(self, values: Typed) -> list[Typed]:
        """What a tuple of the compiled function holds."""
        return [*map(Typed, values.kind, cgutils.unpack_tuple(self.builder, values.value))]  # type: ignore[call-overload]


def part(gives: Callable[[Any], types.Type]) -> Callable[[Callable[..., Any]], Any]:
    """What follows writes a part of a kernel: part(kernel, ...) in a compiled function.

    Its body gets a writer, the form, and typed values; it gives one, a list of them (a tuple then), or None.
    gives : form -> the type of that
    """

    def define(body: Callable[..., Any]) -> Any:
        def typed(_typing, kernel, *found):
            def code(context, builder, signature, args):
                made = body(Writer(context, builder), kernel.form, *map(Typed, signature.args[1:], args[1:]))
                if isinstance(made, list):
                    return context.make_tuple(builder, signature.return_type, [m.value for m in made])
                return made.value if made else context.get_dummy_value()

            return gives(kernel.form)(kernel, *found), code

        names = ["_typing", "kernel", *list(inspect.signature(body).parameters)[2:]]
        kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        typed.__name__, typed.__doc__ = body.__name__, body.__doc__
        typed.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
        return intrinsic(typed)

    return define


def known(number: Callable[[Any], int]) -> Any:
    """A number of the form, which is a constant in the kernel."""

    @part(lambda form: types.intp)
    def constant(write, form):
        return write.index(number(form))

    return constant
