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


def squeezellm(bits: int) -> Twin:
    """SqueezeLLM's words: 32 codes of 3 bits in three, 8 of 4 bits in one; word k of every row, then word k + 1."""
    base = codebook(bits, "<f4")

    def write(parts: Parts) -> Stored:
        words = []
        for row in parts["codes"].tolist():
            unit = 32 if bits == 3 else 8
            units = [row[i : i + unit] for i in range(0, len(row), unit)]
            wide = [sum(code << bits * i for i, code in enumerate(codes)) for codes in units]
            words.append([u >> 32 * w & 0xFFFFFFFF for u in wide for w in range(unit * bits // 32)])
        return {"qweight": np.array(words, "<u4").T.copy(), "lookup_table": parts["codebook"]}

    return Twin(base.draw, write, base.weights, (1, 32))


def spqr() -> Twin:
    """SpQR's records of 64 bits, for 16 columns of a row; float16 numbers of 16 rows in bytes of two rows each."""

    def draw(rows: int, cols: int, rng: np.random.Generator) -> Parts:
        codes = {"codes": (rows, cols), "scale": (rows, cols // 16), "zero": (rows, cols // 16)}
        shared = rng.standard_normal((rows // 16, cols // 16, 4)) * [0.01, 0.6, 4, 4]
        shared[0, 0] = [0, 0, 0, 0]
        shared[0, 1] = [-6e-7, 1000, -3.5, 0.1]  # a scale below what float16 has in full
        return {name: rng.integers(0, 8, shape) for name, shape in codes.items()} | {"shared": shared.astype("<f2")}

    def write(parts: Parts) -> Stored:
        rows, cols = parts["codes"].shape
        words = []
        for r0 in range(0, rows, 16):
            for c0 in range(0, cols, 16):
                data = parts["shared"][r0 // 16, c0 // 16].tobytes()
                for k in range(16):
                    word = int(parts["scale"][r0 + k, c0 // 16]) | int(parts["zero"][r0 + k, c0 // 16]) << 3
                    for i in range(16):
                        word |= int(parts["codes"][r0 + k, c0 + i]) << 6 + 3 * i
                    words.append(word | data[k // 2] << 54)
        return {"dense_weights": np.array(words, "<u8").view(np.uint8).reshape(-1, 8)}

    def weights(parts: Parts) -> Array:
        rows, cols = parts["codes"].shape
        out, half = np.empty((rows, cols), F32), np.float16
        for r in range(rows):
            for c in range(cols):
                ss, sz, zs, zz = parts["shared"][r // 16, c // 16]
                s = ss * (half(parts["scale"][r, c // 16]) - zs)
                z = sz * (half(parts["zero"][r, c // 16]) - zz)
                out[r, c] = s * (half(parts["codes"][r, c]) - z)
        return out

    return Twin(draw, write, weights, (16, 16))


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


def merged(parts: Parts, rows: int) -> Stored:
    """SpQR's CSR: pointers, and words of a column and, above it, a float16."""
    bits = parts["outliers"].astype("<f2").view("<u2")
    words = [int(column) | int(value) << 16 for (_, column), value in zip(parts["at"], bits, strict=True)]
    return {"outlier_rows": csr("<u2", "<f2")(parts, rows)["outlier_rows"], "outliers": np.array(words, "<u4")}


def tiles(parts: Parts, rows: int) -> Stored:
    """SpQR's PTCSR: the first word of 16 rows, the second ones ...; zeros where a row has no more."""
    plain, begins, out = merged(parts, rows), [0], []
    of_row = [plain["outliers"][a:b] for a, b in zip(plain["outlier_rows"], plain["outlier_rows"][1:], strict=False)]
    for first in range(0, rows, 16):
        tile = of_row[first : first + 16]
        for i in range(max(len(row) for row in tile)):
            out += [row[i] if i < len(row) else 0 for row in tile]
        begins.append(len(out))
    return {"outlier_rows": np.array(begins, "<u4"), "outliers": np.array(out, "<u4")}


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

    return Twin(draw, write, weights, (max(4, base.least[0]), base.least[1]))


TWINS: dict[str, Twin] = {
    "cb3": codebook(3, "<f2"),
    "cb4_f32": codebook(4, "<f4"),
    "mxfp4_pairs_csr": with_outliers(BASES["mxfp4_pairs"], csr("<u2", "<f2")),
    "ct_int4_g128_csr_32_f32_replace": with_outliers(BASES["ct_int4_g128"], csr("<u4", "<f4"), replaces=True),
    "cb3_ell4_bf16": with_outliers(codebook(3, "<f2"), ell("bf16"), each=4),
    "mxfp4_pairs_gaps": with_outliers(BASES["mxfp4_pairs"], gaps("<f2")),
    "squeezellm_w3": squeezellm(3),
    "squeezellm_w4": squeezellm(4),
    "squeezellm_w4_csr_32_f32": with_outliers(squeezellm(4), csr("<u4", "<f4")),
    "spqr": spqr(),
    "spqr_merged_add": with_outliers(spqr(), merged),
    "spqr_merged_replace": with_outliers(spqr(), merged, replaces=True),
    "spqr_tiles_add": with_outliers(spqr(), tiles),
    "spqr_tiles_replace": with_outliers(spqr(), tiles, replaces=True),
}
