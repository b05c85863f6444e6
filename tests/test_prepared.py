"""What a careless user gives to `packfmt.prepare` and `matmul`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

import packfmt
from packfmt.errors import LayoutError

X = np.ones(256, np.float32)


def packed() -> packfmt.PackedTensor:
    return packfmt.pack(np.ones((2, 3, 256), np.float32), "q4_0")


@pytest.mark.kernels
def test_shapes_are_those_of_activations_and_then_of_rows() -> None:
    ready = packfmt.prepare(packed())
    assert ready.shape == (2, 3, 256)
    assert ready.matmul(X).shape == (2, 3) and ready.matmul(np.ones((4, 5, 256), np.float32)).shape == (4, 5, 2, 3)
    row = packfmt.pack(X, "q4_0")
    assert row.matmul(X).shape == () and row.matmul(np.stack([X, X, X])).shape == (3,)
    assert packfmt.prepare(ready).packed is ready.packed


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "an array": (lambda: packfmt.prepare(X), "preparing ndarray, needs a packed tensor"),  # type: ignore[arg-type]
    "a batch of text": (lambda: packfmt.prepare(packed(), "8"), "batch is '8', needs a whole number of 1"),  # type: ignore[arg-type]
    "no batch": (lambda: packfmt.prepare(packed(), 0), "batch is 0, needs a whole number of 1"),
    "a list": (lambda: packfmt.pack([1.0], "q4_0"), "q4_0: a weight of list, needs a NumPy array"),  # type: ignore[arg-type]
    "a name": (lambda: packed().repack("q8_0"), "repacking to 'q8_0', needs a layout"),  # type: ignore[arg-type]
    "nothing": (lambda: packed().matmul(None), "q4_0: activations of NoneType, needs a NumPy array"),  # type: ignore[arg-type]
    "a number": (lambda: packed().matmul(np.float32(1)), r"q4_0: activations of shape \(\), needs \(..., 256\)"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_in_one_line(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(LayoutError, match=f"^{message}[^\n]*$"):
        call()


def test_an_unknown_level_is_no_fault_of_the_file() -> None:
    program = "import numpy as np, packfmt; x = np.ones((1, 32), 'f4'); packfmt.pack(x, 'q4_0').matmul(x)"
    environment = os.environ | {"PACKFMT_SIMD": "nonsense"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "packfmt.errors.PackfmtError: PACKFMT_SIMD is 'nonsense', and this machine has" in done.stderr
