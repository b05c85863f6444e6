"""The Hadamard transform: the bits of a NumPy twin, the matrix it stands for, and what it undoes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from packfmt import codecs, fused, grids
from packfmt.errors import LayoutError
from packfmt.kernels import hadamard
from packfmt.layout import dtype_of
from tests.models import normal

F32 = np.float32
Floats = npt.NDArray[np.float32]

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
every = pytest.mark.parametrize("size", SIZES)


def twin(matrix: Floats, size: int) -> Floats:
    """Butterflies of columns 1, 2, 4 ... apart, all at once; then the product."""
    out, stride = matrix.copy(), 1
    with np.errstate(all="ignore"):
        while stride < size:
            pairs = out.reshape(len(matrix), -1, 2, stride)
            a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
            pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
            stride *= 2
        return out * F32(1 / np.sqrt(size))


def sylvester(size: int) -> npt.NDArray[np.int64]:
    """Entry (i, j) is -1 where i and j have an odd number of bits in common."""
    i = np.arange(size)
    return np.array([[1 - 2 * (int(a & b).bit_count() & 1) for b in i] for a in i])


@pytest.mark.kernels
@every
def test_the_bits_are_those_of_the_twin(size: int) -> None:
    for rows in (1, 3):
        matrix = normal(rows, 3 * size) * F32(2.0**-130 if rows == 3 else 1)  # subnormal, too
        wanted = twin(matrix, size)
        hadamard.transform(matrix, size)
        assert matrix.tobytes() == wanted.tobytes()


@pytest.mark.kernels
@every
def test_it_multiplies_by_sylvesters_matrix(size: int) -> None:
    """Small whole numbers add up exactly, and the product with 1 / sqrt(size) is the only one that rounds."""
    matrix = np.random.default_rng(size).integers(-9, 10, (2, 2 * size)).astype(F32)
    sums = matrix.reshape(-1, size).astype(np.int64) @ sylvester(size)
    hadamard.transform(matrix, size)
    assert matrix.tobytes() == (sums.astype(F32) * F32(1 / np.sqrt(size))).tobytes()


@pytest.mark.kernels
@pytest.mark.parametrize("size", [4, 16, 64, 256, 1024])
def test_it_is_its_own_inverse(size: int) -> None:
    """To the bit where sums are whole numbers and the root of the size is a power of two."""
    matrix = np.random.default_rng(size).integers(-9, 10, (3, size)).astype(F32)
    wanted = matrix.copy()
    hadamard.transform(matrix, size)
    assert not np.array_equal(matrix, wanted)
    hadamard.transform(matrix, size)
    assert np.array_equal(matrix, wanted)


@pytest.mark.kernels
@every
def test_infinite_numbers_and_none_stay_in_their_neighbourhood(size: int) -> None:
    matrix = normal(2, 4 * size)
    matrix[0, 0], matrix[1, 2 * size + 1] = np.inf, np.nan
    wanted = twin(matrix, size)
    hadamard.transform(matrix, size)
    assert np.array_equal(matrix, wanted, equal_nan=True)
    assert np.isfinite(matrix[0, size:]).all() and np.isfinite(matrix[1, : 2 * size]).all()
    assert not np.isfinite(matrix[0, :size]).any() and np.isnan(matrix[1, 2 * size : 3 * size]).all()


@pytest.mark.kernels
def test_rows_of_a_larger_array_are_transformed_and_nothing_else() -> None:
    whole = normal(6, 96)
    wanted = whole.copy()
    wanted[1:5:2, 16:80] = twin(np.ascontiguousarray(whole[1:5:2, 16:80]), 32)
    hadamard.transform(whole[1:5:2, 16:80], 32)
    assert whole.tobytes() == wanted.tobytes()


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_an_empty_matrix_is_left_as_it_is(shape: tuple[int, int]) -> None:
    hadamard.transform(np.zeros(shape, F32), 64)


@pytest.mark.kernels
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard, "LEAST_WEIGHTS", 1)
    found = set()
    for count in ("1", "2", "3"):
        monkeypatch.setenv("PACKFMT_THREADS", count)
        matrix = normal(7, 256)
        hadamard.transform(matrix, 64)
        found.add(matrix.tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("size", [-16, 0, 1, 3, 24, 2048])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(LayoutError, match=f"size {size}, needs a power of two of 2 to 1024"):
        hadamard.transform(np.zeros((2, 2048), F32), size)


def test_columns_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(LayoutError, match="size 32 on 48 columns"):
        hadamard.transform(np.zeros((2, 48), F32), 32)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["nvfp4_ct_h16", "mxfp4_h32", "mxfp8_e4m3_h128", "if4_h256"])
def test_a_rotated_layout_decodes_to_the_transform_of_its_base(name: str) -> None:
    layout, base = codecs.get(name).layout, codecs.get(name.rpartition("_")[0]).layout
    rng, components = np.random.default_rng(1), {}
    for c in layout.fit(4, 512).components:
        small = rng.integers(0, 64, c.nbytes, np.uint8)  # of which no dtype makes an infinity
        components[c.name] = small.view(dtype_of(c.dtype)).reshape(c.shape)
    stored = grids.decode(base, (4, 512), components)
    wanted = twin(stored, layout.hadamard)
    assert fused.decode(layout, (4, 512), components).tobytes() == wanted.tobytes()
    assert grids.decode(layout, (4, 512), components).tobytes() == wanted.tobytes()
