"""spqr: three bits a weight, and scales and zeros of 16 columns in three bits each, in records of 64 bits.

    w[r, c] = s * (code[r, c] - z)        s = ss * (scale - zs), z = sz * (zero - zz)

all in float16. A record holds 16 columns of a row: their codes, `scale` and `zero`, and a byte of what 16 rows have in
common, ss, sz, zs and zz. Beside it there may be outliers, words of 32 bits with value and column:

    spqr                                    none
    spqr_merged_add, spqr_merged_replace    row by row: CSR in SpQR's words
    spqr_tiles_add, spqr_tiles_replace      16 rows taking turns: PTCSR

Files do not say whether an outlier is added to the number of its code or replaces it.

Bytes, rounding and worked example: spec/formats/spqr.md
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from packfmt.codec import Codec
from packfmt.codecs.dense_sparse import Rules
from packfmt.errors import LayoutError
from packfmt.grids import SPQR_TILE as TILE
from packfmt.grids import spqr_scales
from packfmt.kernels import threads
from packfmt.layout import Axis, Codes, Component, Digit, Layout, Sparse, Stream, Values, cols, grid, rows

HIGHEST = 7  # code of three bits
SHRINK = (1.0, 0.9, 0.8, 0.7)  # of a group's range, when its scale and zero are first chosen
ROUNDS = 2  # of choosing codes of scales and zeros, and fitting what they share
NEAR = (0, -1, 1)  # from a code, those that are tried, first to last
FARTHEST = 1024  # steps between zero and the nearest number of an affine grid, so that float16 tells codes apart

F16, F32, F64 = np.float16, np.float32, np.float64
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Halves = npt.NDArray[np.float16]
Bytes = npt.NDArray[np.uint8]

RECORD = (
    Codes("scale", 3, word="<u8", at=0),
    Codes("zero", 3, word="<u8", at=3),
    Codes("codes", 3, (), (cols(1, TILE),), "<u8", at=6),
    Codes("second_order", 8, word="<u8", at=54, doc="byte i of rows 2 i and 2 i + 1 of 16: ss, sz, zs, zz as float16"),
)
LAYOUT = Layout(
    "spqr",
    (Component("dense_weights", (rows(TILE), cols(TILE), rows(1, TILE)), RECORD, (3, 1)),),
    grid("spqr"),
    purpose="3-bit codes, scales and zeros of 16 columns in 3 bits each, float16 for 16 rows of them",
    sources=("SpQR, arXiv 2306.03078", "SpQR 543d10e, inference_lib/src/spqr_quant/inference_kernels/spqr_cuda.cpp"),
)


def best(weight: Floats, importance: Floats | None = None) -> dict[str, np.ndarray]:
    """Codes, scales and zeros of little squared error; a tile of 16 rows and columns at a time (`_Tiles`).

    importance : (1 or rows, cols) float32, what a squared error costs

    Raises
    ------
    LayoutError
        If a scale or a number overflows float16.
    """
    n_rows, n_cols = weight.shape
    parts = {name: np.empty((n_rows, n_cols // TILE), np.uint8) for name in ("scale", "zero", "second_order")}
    parts["codes"] = np.empty((n_rows, n_cols), np.uint8)
    good = np.ones(n_rows // TILE, bool)

    def work(start: int, stop: int) -> None:
        for strip in range(start, stop):
            here = slice(strip * TILE, (strip + 1) * TILE)
            costs = None if importance is None else importance[here if len(importance) > 1 else slice(None)]
            with np.errstate(all="ignore"):
                tiles = _Tiles(weight[here], costs)
                tiles.fit()
                good[strip] = tiles.write({name: part[here] for name, part in parts.items()})

    if weight.size:
        threads.spread(work, len(good))
    if not good.all():
        at = TILE * int(np.argmin(good))
        raise LayoutError(
            f"spqr: scales or weights of rows {at} to {at + TILE - 1} overflow float16; use bf16 or cb3_f32"
        )
    return parts


class _Tiles:
    """16 rows of a weight, as tiles side by side, while they are fitted.

    First every group, 16 columns of a row, has a scale s and a zero z of its own: its range, or a part of it that
    leaves less error, in seven steps, then the line that fits the weights of these codes best. Scales of a tile become
    ss * (scale - zs), their range in seven steps, and zeros likewise. A round then takes for every group the scale and
    zero, of 64 pairs, of which the nearest codes leave the least error, of equals the first; and fits ss and zs to
    these codes by least squares, then sz and zz. A fit that leaves a tile no less error is dropped. In the end the
    codes are those of the nearest numbers, of two the lower.

    Errors are float32, fits float64; sums over columns and rows go in their order.
    """

    def __init__(self, weight: Floats, importance: Floats | None) -> None:
        def tiled(numbers: Floats) -> Floats:  # (rows, cols) -> (column of 16, row, tile)
            return np.ascontiguousarray(numbers.reshape(len(numbers), -1, TILE).transpose(2, 0, 1))

        self.weight = tiled(weight)
        self.costs = tiled(importance) if importance is not None else np.ones((1, 1, 1), F32)

    def fit(self) -> None:
        step, shift = self._of_groups()
        self.scale, self.ss, self.zs = _affine(step)
        flat = step == 0  # whose zeros are no matter
        middle = np.where(flat, 0, shift).sum(0) / np.maximum(1, (~flat).sum(0))
        self.zero, self.sz, self.zz = _affine(np.where(flat, middle.astype(F32), shift))
        for _ in range(ROUNDS):
            self._choose()
            self._refit()
        self._choose()

    def write(self, parts: dict[str, Bytes]) -> bool:
        """Codes of the numbers next to the weights, and the rest; whether all of it is finite."""
        step, shift = (numbers[:, :, None] for numbers in self._numbers(F16))
        numbers = ((np.arange(HIGHEST + 1, dtype=F16) - shift) * step).astype(F32)
        codes, least = np.zeros(self.weight.shape, np.uint8), np.abs(self.weight - numbers[:, :, 0])
        for code in range(1, HIGHEST + 1):
            off = np.abs(self.weight - numbers[:, :, code])
            codes[off < least] = code
            np.minimum(least, off, out=least)
        shared = np.stack([self.ss, self.sz, self.zs, self.zz], 1)
        parts["codes"][:] = codes.transpose(1, 2, 0).reshape(parts["codes"].shape)
        parts["scale"][:], parts["zero"][:] = self.scale, self.zero
        parts["second_order"][:] = np.repeat(shared.view(np.uint8).T, 2, 0)
        return bool(np.isfinite(shared).all() and np.isfinite(numbers).all())

    def _of_groups(self) -> tuple[Floats, Floats]:
        """Scale and zero of every group alone, (rows, tiles)."""
        low, high = self.weight.min(0), self.weight.max(0)
        low, high = np.where(low == high, np.minimum(low, 0), low), np.where(low == high, np.maximum(high, 0), high)
        step, shift, least = np.zeros_like(low), np.zeros_like(low), np.full(low.shape, np.inf, F32)
        for part in SHRINK:
            size = (high - low) * F32(part / HIGHEST)
            zero = F32(HIGHEST / 2) - _over((low + high) / F32(2), size)
            _keep((step, shift, least), (size, zero, self._tried(size, zero)[1]))
        slope, start = _line(*self._sums(self._tried(step, shift)[0])[:5])
        size = np.where(slope > 0, slope, 0).astype(F32)
        zero = _over(-start.astype(F32), size)
        _keep((step, shift, least), (size, zero, self._tried(size, zero)[1]))
        return step, shift

    def _tried(self, step: Floats, shift: Floats) -> tuple[Floats, Floats]:
        """The nearest codes and the error of every group, for scales and zeros (rows, tiles)."""
        codes = self.weight * _over(F32(1), step)
        codes += shift
        np.rint(codes, out=codes)
        np.minimum(codes, F32(HIGHEST), out=codes)
        np.maximum(codes, F32(0), out=codes)
        off = codes - shift
        off *= step
        off -= self.weight
        off *= off
        if self.costs.size > 1:
            off *= self.costs
        return codes, off.sum(0)

    def _sums(self, codes: Floats) -> tuple[Doubles, ...]:
        """Of every group: the sums of cost, cost * code, cost * code**2, cost * weight and cost * code * weight."""
        q, w = codes.astype(F64), self.weight.astype(F64)
        if self.costs.size == 1:
            return np.full(q.shape[1:], F64(TILE)), q.sum(0), (q * q).sum(0), w.sum(0), (q * w).sum(0)
        c = np.broadcast_to(self.costs, q.shape).astype(F64)
        cq = c * q
        return c.sum(0), cq.sum(0), (cq * q).sum(0), (c * w).sum(0), (cq * w).sum(0)

    def _numbers(self, dtype: type = F32) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zeros as their codes have them, (rows, tiles)."""
        step, shift = spqr_scales(self.scale, self.ss, self.zs), spqr_scales(self.zero, self.sz, self.zz)
        return step.astype(dtype), shift.astype(dtype)

    def _choose(self) -> None:
        """For every group, the codes of scale and zero that leave the least error, next to those that it has."""
        scale, zero = self.scale, self.zero
        best = scale.copy(), zero.copy(), np.full(scale.shape, np.inf, F32)
        for more in NEAR:
            near = (scale.astype(np.int8) + more).clip(0, HIGHEST).astype(np.uint8)
            step = spqr_scales(near, self.ss, self.zs).astype(F32)
            for above in NEAR:
                beside = (zero.astype(np.int8) + above).clip(0, HIGHEST).astype(np.uint8)
                shift = spqr_scales(beside, self.sz, self.zz).astype(F32)
                _keep(best, (near, beside, self._tried(step, shift)[1]))
        self.scale, self.zero, _ = best

    def _refit(self) -> None:
        """Fit what the scales of a tile have in common, then what its zeros have, to the codes that are chosen."""
        step, shift = (numbers.astype(F64) for numbers in self._numbers())
        codes, error = self._tried(*self._numbers())
        n, q, qq, w, qw = self._sums(codes)
        # the weight is scale * (code - z), and the scale ss * (its code) - ss * zs
        apart = qq - 2 * shift * q + shift * shift * n, qw - shift * w
        before = self.ss, self.zs
        self.ss, self.zs = _shared(self.scale, *apart, before)
        error = self._better(error.sum(0), "ss", "zs", before)
        step, shift = (numbers.astype(F64) for numbers in self._numbers())
        n, q, qq, w, qw = self._sums(self._tried(*self._numbers())[0])
        # zero * s is s * code - weight
        before = self.sz, self.zz
        self.sz, self.zz = _shared(self.zero, step * step * n, step * (step * q - w), before)
        self._better(error, "sz", "zz", before)

    def _better(self, least: Floats, by: str, less: str, before: tuple[Halves, Halves]) -> Floats:
        """Keep the new numbers of tiles where they leave less error, and the old ones elsewhere."""
        error = self._tried(*self._numbers())[1].sum(0)
        for name, old in zip((by, less), before, strict=True):
            setattr(self, name, np.where(error < least, getattr(self, name), old))
        found: Floats = np.minimum(error, least)
        return found


def _keep(best: tuple[np.ndarray, ...], found: tuple[np.ndarray, ...]) -> None:
    """Replace what is best where something is found that leaves less error, the last of each."""
    better = found[-1] < best[-1]
    for kept, new in zip(best, found, strict=True):
        np.copyto(kept, new, where=better)


def _shared(codes: Bytes, weights: Doubles, moments: Doubles, before: tuple[Halves, Halves]) -> tuple[Halves, Halves]:
    """A tile's factor of codes, and what is taken from them first, that fit best; where none does, as before."""
    wide = codes.astype(F64)
    sums = weights, weights * wide, weights * wide * wide, moments, moments * wide
    by, start = _line(*(each.sum(0) for each in sums))
    usable = (by > 0) & (np.abs(start) <= FARTHEST * by)
    return np.where(usable, by, before[0]).astype(F16), np.where(usable, -start / by, before[1]).astype(F16)


def _line(n: Doubles, x: Doubles, xx: Doubles, y: Doubles, xy: Doubles) -> tuple[Doubles, Doubles]:
    """Slope and start of the line through points, by sums of 1, x, x * x, y and x * y; zeros where all x are equal."""
    size = n * xx - x * x
    known = size > 1e-9 * n * xx
    size = np.where(known, size, 1)
    return np.where(known, (n * xy - x * y) / size, 0), np.where(known, (xx * y - x * xy) / size, 0)


def _affine(numbers: Floats) -> tuple[Bytes, Halves, Halves]:
    """(rows, tiles) as codes and, of each tile, a factor and what is taken from a code: their range in seven steps.

    Numbers that are too near to each other for float16 are all code 0, their middle.
    """
    low, high = numbers.min(0), numbers.max(0)
    by: Halves = ((high - low) / F32(HIGHEST)).astype(F16)
    less = _over(-low, by.astype(F32))
    near = ~(np.abs(less) <= FARTHEST) | (by == 0)
    by = np.where(near, ((low + high) / F32(2)).astype(F16), by)
    taken: Halves = np.where(near, np.where(by == 0, F32(0), F32(-1)), less).astype(F16)
    codes = np.rint(_over(numbers, by.astype(F32)) + taken.astype(F32)).clip(0, HIGHEST)
    return np.where(near, F32(0), codes).astype(np.uint8), by, taken


def _over(numbers: Floats | np.float32, by: Floats) -> Floats:
    """Divided, or 0 where `by` is 0."""
    out: Floats = np.divide(
        numbers, by, out=np.zeros(np.broadcast_shapes(np.shape(numbers), by.shape), F32), where=by != 0
    )
    return out


CODEC = Codec(LAYOUT, {"best": best}, ("best",))


def _with_outliers(name: str, coding: str, combine: str) -> Codec:
    per = TILE if coding == "tiles_merged" else 1
    begins = Component(
        "outlier_rows",
        (Digit("ends"),),
        (Values("outlier_rows", "<u4"),),
        doc="`row_offsets`: where each " + ("16 rows'" if per > 1 else "row's") + " begin, and the end",
    )
    words = Stream("outliers", "<u4", doc="`col_vals`: a column, and a float16 above it")
    layout = replace(
        LAYOUT,
        name=name,
        components=(*LAYOUT.components, begins, words),
        axes=(*LAYOUT.axes, Axis("ends", "rows", per=per, plus=1)),
        purpose=f"{LAYOUT.purpose}; outliers in float16 that {'are added' if combine == 'add' else 'replace'}",
        sparse=Sparse(coding, combine),
    )
    rules = Rules(CODEC, layout, choice=True)
    return Codec(layout, rules, rules, together=dict.fromkeys(rules, 0))


MADE = [
    _with_outliers(f"spqr_{name}_{combine}", coding, combine)
    for name, coding in (("merged", "csr_merged"), ("tiles", "tiles_merged"))
    for combine in ("add", "replace")
]
CODECS = {codec.layout.name: codec for codec in (CODEC, *MADE)}
