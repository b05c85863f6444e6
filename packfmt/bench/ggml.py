"""ggml, through the libraries that llama-cpp-python brings: graphs of ggml_mul_mat on its CPU backend.

That is what llama.cpp does for a layer: activations are quantised for ggml's dot product, threads share the rows.
`repacked` puts the weights into one of the backend's own buffers (it interleaves rows, where it knows how to for
the type), as llama.cpp does by default. Only functions that take pointers and numbers are called, except for
`ggml_init`, so that no struct of ggml's need be known here.

Source: ggml 0.25 (in llama-cpp-python 0.3.36): ggml.h, ggml-backend.h, ggml-cpu.h
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from packfmt.bench import INSTALL, Array, Floats, Size, repeat, weight_strip
from packfmt.errors import MachineError

ELSEWHERE: Final = "PACKFMT_GGML"  # a folder of libggml.so to measure in place of llama-cpp-python's
FLOAT32: Final = 0  # GGML_TYPE_F32
CPU: Final = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
THREAD_PARAMETERS: Final = 4096  # bytes, several times what ggml_threadpool_params has

P, N, I = c.c_void_p, c.c_size_t, c.c_int  # noqa: E741
# result and arguments; the libraries are searched in the order of LIBRARIES
FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "ggml_log_set": (None, P, P),
    "ggml_version": (c.c_char_p,),
    "ggml_type_name": (c.c_char_p, I),
    "ggml_tensor_overhead": (N,),
    "ggml_graph_overhead_custom": (N, N, c.c_bool),
    "ggml_new_tensor_2d": (P, P, I, c.c_int64, c.c_int64),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_new_graph_custom": (P, P, N, c.c_bool),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_free": (None, P),
    "ggml_row_size": (N, I, c.c_int64),
    "ggml_blck_size": (c.c_int64, I),
    "ggml_quantize_chunk": (N, I, P, P, c.c_int64, c.c_int64, c.c_int64, P),
    "ggml_threadpool_params_init": (None, P, I),
    "ggml_backend_dev_by_type": (P, I),
    "ggml_backend_dev_init": (P, P, c.c_char_p),
    "ggml_backend_dev_backend_reg": (P, P),
    "ggml_backend_dev_buffer_type": (P, P),
    "ggml_backend_dev_supports_op": (c.c_bool, P, P),
    "ggml_backend_reg_get_proc_address": (P, P, c.c_char_p),
    "ggml_backend_buft_name": (c.c_char_p, P),
    "ggml_backend_buft_get_alloc_size": (N, P, P),
    "ggml_backend_buft_alloc_buffer": (P, P, N),
    "ggml_backend_buffer_get_base": (P, P),
    "ggml_backend_buffer_free": (None, P),
    "ggml_backend_tensor_alloc": (I, P, P, P),
    "ggml_backend_tensor_set": (None, P, P, N, N),
    "ggml_backend_tensor_get": (None, P, P, N, N),
    "ggml_backend_graph_compute": (I, P, P),
    "ggml_backend_load_all_from_path": (None, c.c_char_p),
}
LIBRARIES: Final = ("ggml-base", "ggml-cpu", "ggml")
SILENCE: Final = c.CFUNCTYPE(None, I, c.c_char_p, P)(lambda level, text, data: None)  # it tells of every tensor


class _Parameters(c.Structure):
    """ggml_init_params: bytes for the context's own records; none for the tensors' numbers."""

    _fields_ = (("mem_size", N), ("mem_buffer", P), ("no_alloc", c.c_bool))


class Library:
    """The functions of ggml and its CPU backend.

    Raises
    ------
    MachineError
        If the libraries are not there or lack a function.
    """

    def __init__(self, folder: Path) -> None:
        loaded = [c.CDLL(str(path), mode=c.RTLD_GLOBAL) for name in LIBRARIES if (path := _file(folder, name))]
        for name, (result, *arguments) in FUNCTIONS.items():
            function = next((getattr(library, name) for library in loaded if hasattr(library, name)), None)
            if function is None:
                raise MachineError(f"{folder}: no {name} in these libraries of ggml; {INSTALL} brings newer ones")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._init = next(library.ggml_init for library in loaded if hasattr(library, "ggml_init"))
        self._init.restype, self._init.argtypes = P, (_Parameters,)
        self.log_set(SILENCE, None)
        device = self.backend_dev_by_type(CPU)
        if not device:  # the backend is a plug-in
            self.backend_load_all_from_path(os.fsencode(folder))
            device = self.backend_dev_by_type(CPU)
        if not device:
            raise MachineError(f"{folder}: ggml has no backend for the CPU here; {INSTALL} brings one")
        self.device, self.backend = device, self.backend_dev_init(device, None)
        self._registry = self.backend_dev_backend_reg(device)
        self.set_threads = self.of_backend("ggml_backend_set_n_threads", None, P, I)
        self.set_pool = self.of_backend("ggml_backend_cpu_set_threadpool", None, P, P)
        self.new_pool = self.of_backend("ggml_threadpool_new", P, P)
        self.free_pool = self.of_backend("ggml_threadpool_free", None, P)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # those that there are were set above

    def of_backend(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function that the CPU backend offers by name; None if it does not."""
        found = self.backend_reg_get_proc_address(self._registry, name.encode())
        return c.CFUNCTYPE(result, *arguments)(found) if found else None

    def context(self, tensors: int, graphs: int = 0, nodes: int = 0) -> int:
        """A new context with room for the records of so many tensors, and graphs of so many nodes."""
        room = tensors * self.tensor_overhead() + graphs * self.graph_overhead_custom(nodes, False)
        context: int = self._init(_Parameters(room + 1024, None, True))
        return context

    def buffer_types(self) -> list[int]:
        """The CPU backend's own types of buffers, which hold weights in another order, and which it prefers."""
        ask = self.of_backend("ggml_backend_dev_get_extra_bufts", c.POINTER(P), P)
        found = ask(self.device) if ask else None
        types: list[int] = []
        while found and found[len(types)]:
            types.append(found[len(types)])
        return types

    def features(self) -> list[str]:
        """Its version, and what it was built for: AVX2, AVX512_VNNI ..."""

        class Feature(c.Structure):
            _fields_ = (("name", c.c_char_p), ("value", c.c_char_p))

        ask = self.of_backend("ggml_backend_get_features", c.POINTER(Feature), P)
        found = ask(self._registry) if ask else None
        names: list[str] = [self.version().decode()]
        while found and found[len(names) - 1].name:
            names.append(found[len(names) - 1].name.decode())
        return names


def _file(folder: Path, name: str) -> Path | None:
    """libggml-base.so, libggml-base.dylib, ggml-base.dll."""
    found = (folder / f"{front}{name}{end}" for front, end in (("lib", ".so"), ("lib", ".dylib"), ("", ".dll")))
    return next((path for path in found if path.is_file()), None)


@cache
def library() -> Library:
    """ggml as llama-cpp-python has it, which is not imported for that; or from the folder PACKFMT_GGML.

    Raises
    ------
    MachineError
        If there is none.
    """
    if asked := os.environ.get(ELSEWHERE):
        folder = Path(asked)
        if not _file(folder, LIBRARIES[0]):
            raise MachineError(f"{asked}: no {LIBRARIES[0]} in the folder that {ELSEWHERE} names")
        return Library(folder)
    spec = importlib.util.find_spec("llama_cpp")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if _file(Path(place) / "lib", LIBRARIES[0]):
            return Library(Path(place) / "lib")
    raise MachineError(f"llama-cpp-python is not installed; {INSTALL}")


class Ggml:
    """One weight in a type of ggml's, in as many copies as it takes.

    repacked : in the first of the backend's own buffers that takes the type

    Raises
    ------
    MachineError
        If there is no ggml, or it cannot multiply this type, or not repacked.
    """

    def __init__(self, size: Size, kind: str, repacked: bool) -> None:
        self.ggml = ggml = library()
        self.size, self.kind = size, kind
        self.name = "ggml-repack" if repacked else "ggml"
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._pool = None
        try:
            self._type = self._number(kind)
            weights = self._quantized()
            self.nbytes = weights.nbytes
            self.copies, self.group = size.copies(self.nbytes, self.kind), size.group(self.nbytes)
            place = self._place(repacked)
            context = self._context(self.copies)
            self._weights = [self._tensor(context, self._type, size.rows, place) for _ in range(self.copies)]
            for weight in self._weights:
                ggml.backend_tensor_set(weight, weights.ctypes.data, 0, weights.nbytes)
            self._kept = len(self._contexts), len(self._buffers)
        except BaseException:
            self.close()
            raise

    def _number(self, kind: str) -> int:
        """The number of a type that the library has under the name that gguf knows."""
        kinds = gguf.GGMLQuantizationType
        number = kinds[kind.upper()].value if kind.upper() in kinds.__members__ else -1
        if number < 0 or self.ggml.type_name(number) != kind.encode():
            raise MachineError(f"has no type {kind}")
        if self.size.cols % (block := self.ggml.blck_size(number)):
            raise MachineError(f"{kind}: {self.size.cols} columns, needs a multiple of {block}")
        return int(number)

    def _quantized(self) -> Array:
        """(rows, bytes of a row) uint8, by ggml's own encoder."""
        strip = weight_strip(self.size)
        rows, cols = strip.shape
        out = np.empty((rows, self.ggml.row_size(self._type, cols)), np.uint8)
        self.ggml.quantize_chunk(self._type, strip.ctypes.data, out.ctypes.data, 0, rows, cols, None)
        return repeat(out, self.size.rows)

    def _place(self, repacked: bool) -> int:
        """The type of buffer for the weights."""
        ggml = self.ggml
        if not repacked:
            return int(ggml.backend_dev_buffer_type(ggml.device))
        for place in ggml.buffer_types():
            context = self._context(3)
            weight = self._tensor(context, self._type, self.size.rows, place)
            product = ggml.mul_mat(context, weight, ggml.new_tensor_2d(context, FLOAT32, self.size.cols, 1))
            able = ggml.backend_dev_supports_op(ggml.device, product)
            self._free()
            if able:
                return place
        raise MachineError(f"repacks no {self.kind}")

    def _context(self, tensors: int, graphs: int = 0, nodes: int = 0) -> int:
        self._contexts.append(self.ggml.context(tensors, graphs, nodes))
        return self._contexts[-1]

    def _tensor(self, context: int, kind: int, rows: int, place: int) -> int:
        """A new tensor of so many rows in a buffer of its own."""
        return self._settle(self.ggml.new_tensor_2d(context, kind, self.size.cols, rows), place)

    def _settle(self, tensor: int, place: int) -> int:
        """Give a tensor a buffer."""
        ggml = self.ggml
        buffer = ggml.backend_buft_alloc_buffer(place, ggml.backend_buft_get_alloc_size(place, tensor))
        if not buffer:
            raise MachineError(f"ggml: no memory for a weight of {self.size.rows}x{self.size.cols}")
        self._buffers.append(buffer)
        ggml.backend_tensor_alloc(buffer, tensor, ggml.backend_buffer_get_base(buffer))
        return tensor

    def begin(self, x: Floats, threads: int) -> None:
        ggml = self.ggml
        self._free(*self._kept)
        self._shape = len(x), self.size.rows
        graphs = -(-self.copies // self.group)
        context = self._context(1 + self.copies, graphs, 2 * self.group + 2)
        plain = ggml.backend_dev_buffer_type(ggml.device)
        activations = self._tensor(context, FLOAT32, len(x), plain)
        ggml.backend_tensor_set(activations, x.ctypes.data, 0, x.nbytes)
        self._outputs = [self._settle(ggml.mul_mat(context, weight, activations), plain) for weight in self._weights]
        self._graphs = [ggml.new_graph_custom(context, 2 * self.group + 2, False) for _ in range(graphs)]
        for i in range(graphs * self.group):  # the last graph is filled up from the front
            ggml.build_forward_expand(self._graphs[i // self.group], self._outputs[i % self.copies])
        self._set_threads(threads)

    def _set_threads(self, threads: int) -> None:
        """A pool that stays, as llama.cpp has it; otherwise builds without OpenMP start threads for each graph."""
        ggml, parameters = self.ggml, c.create_string_buffer(THREAD_PARAMETERS)
        ggml.threadpool_params_init(parameters, threads)
        self._free_pool()
        if ggml.new_pool:
            self._pool = ggml.new_pool(parameters)
            ggml.set_pool(ggml.backend, self._pool)
        ggml.set_threads(ggml.backend, threads)

    def call(self, turn: int) -> object:
        return self.ggml.backend_graph_compute(self.ggml.backend, self._graphs[turn % len(self._graphs)])

    def answer(self, copy: int) -> Floats:
        self.call(copy // self.group)
        out = np.empty(self._shape, np.float32)
        self.ggml.backend_tensor_get(self._outputs[copy], out.ctypes.data, 0, out.nbytes)
        return out

    def _free(self, contexts: int = 0, buffers: int = 0) -> None:
        """Free all contexts and buffers but the first so many."""
        while len(self._contexts) > contexts:
            self.ggml.free(self._contexts.pop())
        while len(self._buffers) > buffers:
            self.ggml.backend_buffer_free(self._buffers.pop())

    def _free_pool(self) -> None:
        if self._pool:
            self.ggml.set_pool(self.ggml.backend, None)
            self.ggml.free_pool(self._pool)
            self._pool = None

    def close(self) -> None:
        self._free_pool()
        self._free()
