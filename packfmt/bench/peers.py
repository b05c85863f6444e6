"""Who else multiplies: NumPy, torch, onnxruntime, ggml (`packfmt.bench.ggml`), each as a contestant; and packfmt.

What is imported here is looked for only when it is asked for, and may be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from typing import Any, Final

import numpy as np

from packfmt.bench import INSTALL, Array, Contestant, Floats, Size, repeat, weight_strip
from packfmt.codec import PackedTensor
from packfmt.errors import MachineError

BITS, BLOCK = 4, 32  # of onnxruntime's MatMulNBits
INT8_ACTIVATIONS = 4  # its accuracy_level; the fastest of them, and what packfmt's own products do
OPSET, IR = 21, 10  # of the model file: what onnxruntime 1.19 reads


def optional(module: str, package: str = "") -> Any:
    """A module of an optional package.

    Raises
    ------
    MachineError
        If it is not installed, or does not load.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        what = "is not installed" if missing else f"does not load: {error}".splitlines()[0]
        raise MachineError(f"{package or module} {what}; {INSTALL}") from error


class Packed:
    """A packed tensor, prepared for many products."""

    name, group = "packfmt", 1

    def __init__(self, size: Size, packed: PackedTensor) -> None:
        self.kind, self._size, self._packed = packed.layout.name, size, packed
        self._make(1)

    def _make(self, batch: int) -> None:
        """Prepare all copies for so many rows of activations."""
        from packfmt.prepared import prepare

        self._batch, self._ready = batch, []
        first = prepare(copied(self._packed), batch)
        self.nbytes = first.nbytes
        self.copies = self._size.copies(self.nbytes, self.kind)
        self._ready = [first, *(prepare(copied(self._packed), batch) for _ in range(self.copies - 1))]

    def begin(self, x: Floats, threads: int) -> None:
        if len(x) != self._batch:
            self._make(len(x))
        self._x, self._threads = x, threads

    def call(self, turn: int) -> object:
        return self._ready[turn % self.copies].matmul(self._x, self._threads)

    def answer(self, copy: int) -> Floats:
        return np.asarray(self.call(copy), np.float32)

    def close(self) -> None:
        self._ready.clear()


def copied(packed: PackedTensor) -> PackedTensor:
    """The same bytes in other memory: a layout may be multiplied where it lies."""
    return replace(packed, components={name: array.copy() for name, array in packed.components.items()})


class Numpy:
    """x @ weight.T in float32, by the BLAS that NumPy brings."""

    name, kind, group = "numpy", "float32", 1

    def __init__(self, size: Size) -> None:
        self._pools = optional("threadpoolctl").ThreadpoolController().select(user_api="blas")
        self._limit = ExitStack()
        self.nbytes = 4 * size.weights
        self.copies = size.copies(self.nbytes, self.kind)
        weight = repeat(weight_strip(size), size.rows)
        self._weights = [weight, *(weight.copy() for _ in range(self.copies - 1))]

    def begin(self, x: Floats, threads: int) -> None:
        self._limit.close()
        self._limit.enter_context(self._pools.limit(limits=threads))
        self._x, self._out = x, np.empty((len(x), len(self._weights[0])), np.float32)

    def call(self, turn: int) -> object:
        return np.matmul(self._x, self._weights[turn % self.copies].T, out=self._out)

    def answer(self, copy: int) -> Floats:
        self.call(copy)
        return self._out.copy()

    def close(self) -> None:
        self._limit.close()
        self._weights.clear()


class Torch:
    """torch.nn.functional.linear in bfloat16, activations too; their conversion is not timed."""

    name, kind, group = "torch", "bfloat16", 1

    def __init__(self, size: Size) -> None:
        self._torch = torch = optional("torch")
        self._threads = torch.get_num_threads()
        self.nbytes = 2 * size.weights
        self.copies = size.copies(self.nbytes, self.kind)
        strip = torch.from_numpy(weight_strip(size)).bfloat16().view(torch.int16).numpy()
        weight = torch.from_numpy(repeat(strip, size.rows)).view(torch.bfloat16)
        self._weights = [weight, *(weight.clone() for _ in range(self.copies - 1))]

    def begin(self, x: Floats, threads: int) -> None:
        self._torch.set_num_threads(threads)
        self._x = self._torch.from_numpy(x).bfloat16()

    def call(self, turn: int) -> object:
        with self._torch.inference_mode():
            return self._torch.nn.functional.linear(self._x, self._weights[turn % self.copies])

    def answer(self, copy: int) -> Floats:
        out: Any = self.call(copy)
        return np.asarray(out.float().numpy(), np.float32)

    def close(self) -> None:
        self._torch.set_num_threads(self._threads)
        self._weights.clear()


class OnnxRuntime:
    """Graphs of MatMulNBits: 4 bits, blocks of 32, float32 scales; activations become int8 inside.

    Source: onnxruntime 1.31, docs/ContribOperators.md, com.microsoft.MatMulNBits
    """

    name, kind = "onnxruntime", f"{BITS} bits, blocks of {BLOCK}"

    def __init__(self, size: Size) -> None:
        self._runtime = optional("onnxruntime")
        if size.cols % BLOCK:
            raise MachineError(f"onnxruntime: {size.cols} columns, measured with a multiple of {BLOCK}")
        self._size = size
        self._codes, self._scale = _four_bits(size)
        self.nbytes = self._codes.nbytes + self._scale.nbytes
        self.copies, self.group = size.copies(self.nbytes, self.kind), size.group(self.nbytes)
        self._threads = 0
        self._sessions: list[Any] = []

    def begin(self, x: Floats, threads: int) -> None:
        if threads != self._threads:  # a session keeps the number that it was made with
            self._sessions.clear()
            model = self._model().SerializeToString()
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.log_severity_level = 3  # errors
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # less memory
            # what is equal must not become one; fusing and folding have nothing to do here
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            make: Callable[[], Any] = lambda: self._runtime.InferenceSession(  # noqa: E731
                model, options, providers=["CPUExecutionProvider"]
            )
            self._sessions = [make() for _ in range(-(-self.copies // self.group))]
            self._threads = threads
        self._bound = []
        self._out = np.empty((len(x), self._size.rows), np.float32)
        for session in self._sessions:
            binding = session.io_binding()
            binding.bind_cpu_input("x", x)
            for i in range(self.group):
                binding.bind_output(f"y{i}", "cpu")
            self._bound.append(binding)

    def _model(self) -> Any:
        """Nodes that multiply the same x, each with weights of its own."""
        onnx = optional("onnx")
        helper, of_array = import_module("onnx.helper"), import_module("onnx.numpy_helper").from_array
        rows, cols = self._size.rows, self._size.cols
        shape = {"K": cols, "N": rows, "bits": BITS, "block_size": BLOCK, "accuracy_level": INT8_ACTIVATIONS}
        nodes, weights, outputs = [], [], []
        for i in range(self.group):
            names = ["x", f"codes{i}", f"scale{i}"]
            nodes.append(helper.make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **shape))
            weights += [of_array(self._codes, names[1]), of_array(self._scale, names[2])]
            outputs.append(helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, ["batch", rows]))
        inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", cols])]
        graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR)

    def call(self, turn: int) -> object:
        which = turn % len(self._sessions)
        return self._sessions[which].run_with_iobinding(self._bound[which])

    def answer(self, copy: int) -> Floats:
        self.call(copy // self.group)
        found = self._bound[copy // self.group].copy_outputs_to_cpu()[copy % self.group]
        return np.asarray(found, np.float32)

    def close(self) -> None:
        self._sessions.clear()
        self._bound = []


def _four_bits(size: Size) -> tuple[Array, Floats]:
    """(rows, blocks, BLOCK / 2) uint8, even columns in the low bits, zero point 8; (rows, blocks) scales."""
    strip = weight_strip(size).reshape(-1, size.cols // BLOCK, BLOCK)
    scale = np.abs(strip).max(axis=2, keepdims=True) / np.float32(7)
    codes = (np.rint(strip / scale) + 8).astype(np.uint8)
    pairs = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return repeat(pairs, size.rows), repeat(scale[..., 0], size.rows)


def _ggml(repacked: bool) -> Callable[[Size, str], Contestant]:
    def make(size: Size, kind: str) -> Contestant:
        from packfmt.bench.ggml import Ggml

        return Ggml(size, kind, repacked)

    return make


# by name: makes the contestant, given the size and what type of ggml's is nearest
PEERS: Final[dict[str, Callable[[Size, str], Contestant]]] = {
    "numpy": lambda size, kind: Numpy(size),
    "torch": lambda size, kind: Torch(size),
    "onnxruntime": lambda size, kind: OnnxRuntime(size),
    "ggml": _ggml(False),
    "ggml-repack": _ggml(True),
}
