"""Parts of kernels that are written out when a kernel is compiled, for what is known of its form by then.

A `Kernel` is an argument without content: its Numba type holds the form. A `part` is an intrinsic that gets the form
and a `Writer`, and writes instructions by the names that `simd` has for them; loops of Python are unrolled so.

What does not change from call to call is bound once: arrays stand in a `Table`, of which compiled code gets the
address, and `entry` is the compiled function without the look at its arguments' types. Such a call costs a
microsecond, even where nothing of Python is in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

from packfmt.kernels import simd

# Numba sees an edit of the file that a kernel stands in, and of no other that parts of it come from.
_CODE = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("tile_code.py", "activations.py", "team.py"))
VERSION: Final = f"{simd.VERSION}-{sha256(_CODE).hexdigest()[:12]}"
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


# ---------------------------------------------------------------- what is bound once


class Table:
    """Arrays and whole numbers, for compiled code to read at `address`; they live as long as the table.

    values : C-contiguous arrays, of which place and size are kept (`array_at`); whole numbers, or tables, of which
        the address is one (`number_at`)
    """

    def __init__(self, *values: npt.NDArray[Any] | int | Table) -> None:
        pairs = [
            (v.ctypes.data, v.size) if isinstance(v, np.ndarray) else (v.address if isinstance(v, Table) else v, 0)
            for v in values
        ]
        self.kept = np.array(pairs, np.int64), values
        self.address: int = self.kept[0].ctypes.data


def entry(function: Any, *kinds: types.Type) -> Callable[..., None]:
    """The compiled function for arguments of exactly these types.

    It does not look at their types again: arrays' dtypes, numbers of axes and contiguity are for the door to check.
    """
    return function.compile(kinds)


def address_of(function: Any, *kinds: types.Type) -> int:
    """Where a function lies that is compiled for arguments of these types: for `call_at`, as long as it lives."""
    entry(function, *kinds)
    made = function.overloads[kinds]
    return int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))


@intrinsic
def call_at(typing, address, arguments):
    """Call what `address_of` gave, with a tuple of arguments: it need not be compiled with each of its callers."""
    kinds = [types.unliteral(kind) for kind in arguments.types]

    def code(context, builder, signature, args):
        function = builder.inttoptr(args[0], context.call_conv.get_function_type(types.none, kinds).as_pointer())
        values = cgutils.unpack_tuple(builder, args[1])
        context.call_conv.call_function(builder, function, types.none, kinds, values)
        return context.get_dummy_value()

    return types.void(types.int64, types.Tuple(kinds)), code


def _read(builder: Any, table: Any, which: Any, half: int) -> Any:
    """One half of a pair of numbers at an address."""
    pairs = builder.inttoptr(table, ir.ArrayType(INDEX, 2).as_pointer())
    return builder.load(builder.gep(pairs, [which, ir.Constant(INDEX, half)]))


def _array(context: Any, builder: Any, kind: types.Array, address: Any, *shape: Any) -> Any:
    from numba.np.arrayobj import populate_array  # takes 15 ms, and only to compile

    item = context.get_value_type(kind.dtype)
    array, each = context.make_array(kind)(context, builder), ir.Constant(INDEX, context.get_abi_sizeof(item))
    data, strides = builder.inttoptr(address, item.as_pointer()), [each]
    for size in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], size))
    populate_array(array, data=data, shape=list(shape), strides=strides, itemsize=each, meminfo=None)
    return array._getvalue()


@intrinsic
def array_of(typing, address, size, kind):
    """The array of so many numbers that begins at an address; kind : their class of NumPy"""
    gives = types.Array(kind.dtype, 1, "C")

    def code(context, builder, signature, args):
        return _array(context, builder, gives, *args[:2])

    return gives(types.int64, types.int64, kind), code


@intrinsic
def matrix_of(typing, address, rows, cols, kind):
    """`array_of` numbers in so many rows and columns."""
    gives = types.Array(kind.dtype, 2, "C")

    def code(context, builder, signature, args):
        return _array(context, builder, gives, *args[:3])

    return gives(types.int64, types.int64, types.int64, kind), code


@intrinsic
def array_at(typing, table, which, kind):
    """An array of a `Table`; kind : its numbers' class of NumPy"""
    gives = types.Array(kind.dtype, 1, "C")

    def code(context, builder, signature, args):
        pair = (_read(builder, *args[:2], half) for half in range(2))
        return _array(context, builder, gives, *pair)

    return gives(types.int64, types.int64, kind), code


@intrinsic
def number_at(typing, table, which):
    """A number of a `Table`."""

    def code(context, builder, signature, args):
        return _read(builder, *args, 0)

    return types.int64(types.int64, types.int64), code


# ---------------------------------------------------------------- what is written out


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
