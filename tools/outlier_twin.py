"""Codebooks, and outliers beside dense formats, in plain NumPy and plain loops: closed forms from spec/formats.

Nothing here comes from packfmt. Parts, components and twins are those of fp4_twin; outliers are parts `at` (n, 2), row
and column of each, and `outliers` float32, row by row with ascending columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fp4_twin import BASES, F32, Array, Parts, Stored, Twin, narrow, stream, upper

VERSION = "1"  # of what these functions give; vectors state it
DENSITY = 0.05


def codebook(bits: int, dtype: str) -> Twin:
    """Codes of so many bits, and for each row a table."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
        tables = narrow(rng.standard_normal((rows, 1 << bits)).astype(F32)).astype(dtype)
        return {"codes": rng.integers(0, 1 << bits, (rows, cols)), "codebook": tables}

    def write(parts: Parts) -> Stored:
        return {"codes": stream(parts["codes"], bits), "codebook": parts["codebook"]}

    def weights(parts: Parts) -> Array:
        tables = parts["codebook"].astype(F32)
        return np.array([[tables[r, c] for c in row] for r, row in enumerate(parts["codes"])], F32)

    return Twin(draw, write, weights, (1, 8))


def as_floats(values: Array, dtype: str) -> Array:
    """Float32 numbers of few digits in another dtype; bfloat16 as its bits."""
    return upper(values) if dtype == "bf16" else values.astype(dtype)


def csr(columns: str, dtype: str) -> Callable[[Parts, int], Stored]:
    """Pointers, columns, values."""

    def write(parts: Parts, rows: int) -> Stored:
        begins = [sum(1 for row, _ in parts["at"] if row < r) for r in range(rows + 1)]
        return {
            "outlier_rows": np.array(begins, "<u4"),
            "outlier_columns": np.array([column for _, column in parts["at"]], columns),
            "outliers": as_floats(parts["outliers"], dtype),
        }

    return write


def gaps(dtype: str) -> Callable[[Parts, int], Stored]:
    """How many a row has; bytes of columns between them, 255 for so many and none; values."""

    def write(parts: Parts, rows: int) -> Stored:
        counts, found = np.zeros(rows, "<u2"), []
        for r in range(rows):
            before = -1
            for column in (c for row, c in parts["at"] if row == r):
                gap = column - before - 1
                while gap >= 255:
                    found.append(255)
                    gap -= 255
                found.append(gap)
                counts[r] += 1
                before = column
        values = as_floats(parts["outliers"], dtype)
        return {"outlier_counts": counts, "outlier_gaps": np.array(found, np.uint8), "outliers": values}

    return write


def ell(dtype: str) -> Callable[[Parts, int], Stored]:
    """As many columns and values in every row."""

    def write(parts: Parts, rows: int) -> Stored:
        columns = np.array([column for _, column in parts["at"]], "<u2")
        values = as_floats(parts["outliers"], dtype)
        return {"outlier_columns": columns.reshape(rows, -1), "outliers": values.reshape(rows, -1)}

    return write


def with_outliers(base: Twin, store: Callable[[Parts, int], Stored], replaces: bool = False, each: int = 0) -> Twin:
    """The base's bytes, then the outliers'; each : so many in every row, else any."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
        parts = base.draw(rows, cols, rng)
        if each:
            mask = np.array([rng.permutation(cols) < each for _ in range(rows)])
        else:
            mask = rng.random((rows, cols)) < DENSITY
            mask[1], mask[2] = (
                False,
                [c % cols in (0, cols - 1) for c in range(cols)],
            )  # none; the first and last column
        return parts | {"at": np.argwhere(mask), "outliers": narrow(rng.standard_normal(int(mask.sum())).astype(F32))}

    def write(parts: Parts) -> Stored:
        dense = base.write(parts)
        return dense | store(parts, len(parts["codes"]))

    def weights(parts: Parts) -> Array:
        out = base.weights(parts)
        for (row, column), value in zip(parts["at"], parts["outliers"], strict=True):
            out[row, column] = value if replaces else out[row, column] + value
        return out

    return Twin(draw, write, weights, (4, base.least[1]))


TWINS: dict[str, Twin] = {
    "cb3": codebook(3, "<f2"),
    "cb4_f32": codebook(4, "<f4"),
    "mxfp4_pairs_csr": with_outliers(BASES["mxfp4_pairs"], csr("<u2", "<f2")),
    "ct_int4_g128_csr_32_f32_replace": with_outliers(BASES["ct_int4_g128"], csr("<u4", "<f4"), replaces=True),
    "cb3_ell4_bf16": with_outliers(codebook(3, "<f2"), ell("bf16"), each=4),
    "mxfp4_pairs_gaps": with_outliers(BASES["mxfp4_pairs"], gaps("<f2")),
}
