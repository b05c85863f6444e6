"""The canonical product of tiles, slowly: codes bit by bit, whole numbers by matrix product, float32 one at a time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from packfmt.kernels.tile_products import Activations, Tiles, Tiling

F32 = np.float32
Floats = npt.NDArray[np.float32]
SCALES: dict[str, Any] = {
    "f32": "<f4",
    "f16": "<f2",
    "bf16": ml_dtypes.bfloat16,
    "e8m0": "u1",
    "e4m3": ml_dtypes.float8_e4m3fn,
    "ue4m3": "u1",
}


def bounds(how: Tiling, cols: int) -> list[tuple[int, int]]:
    """First and last column of every block."""
    return [(a, min(a + how.block, cols)) for a in range(0, cols, how.block)]


def fields(vectors: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.int64]:
    """Vectors of 64 bytes -> (16, columns): field f of vector v is step v * 8 / width + f, byte j its column."""
    many = 8 // width
    found = np.zeros((16, len(vectors) * many * 4), np.int64)
    for v, vector in enumerate(vectors.reshape(-1, 16, 4)):
        for f in range(many):
            found[:, 4 * (v * many + f) :][:, :4] = vector >> f * width & (1 << width) - 1
    return found


def numbers(tiles: Tiles, codes: npt.NDArray[np.uint8], high: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """What one block's vectors stand for, (16, columns), before zero points."""
    how, table = tiles.how, tiles.table.astype(np.int64)
    if how.codes == "quads":
        rows = codes.reshape(-1, 5, 16, 4).transpose(2, 0, 1, 3).reshape(16, -1)  # of each row, its dwords in order
        bits = np.unpackbits(rows, axis=1, bitorder="little").reshape(16, -1, 5)
        return (table.reshape(32, 4)[bits @ (1 << np.arange(5))] - tiles.bias).reshape(16, -1)
    code = fields(codes.reshape(-1, 64), how.widths[0])
    if len(how.widths) == 2:
        code |= fields(high.reshape(-1, 64), how.widths[1]) << how.widths[0]
    if how.codes == "signed":
        return (code ^ 128) - tiles.bias
    if how.codes == "direct":
        return code - tiles.bias
    return table[code] + (256 * table[64 + code] if how.codes == "wide" else 0) - tiles.bias


def scales(tiles: Tiles) -> Floats:
    """Every scale as it is counted, but for the number of the row."""
    if tiles.how.scale == "e8m0":
        with np.errstate(over="ignore", under="ignore"):
            found = np.exp2(tiles.scale.astype(np.float64) - tiles.exponent).astype(F32)
        return np.where(tiles.nan & (tiles.scale == 255), F32(np.nan), found)
    if tiles.how.scale == "ue4m3":
        found = (tiles.scale & 127).view(ml_dtypes.float8_e4m3fn).astype(F32)
        return np.where(tiles.scale == 127, F32(0), np.where(tiles.scale == 255, F32(480), found))
    return np.asarray(tiles.scale.view(SCALES[tiles.how.scale]).astype(F32))


def multiply(tiles: Tiles, x: Activations) -> Floats:
    """(batch, 16 * groups) float32."""
    how, places = tiles.how, bounds(tiles.how, tiles.cols)
    codes = np.split(tiles.codes, tiles.groups)
    high = np.split(tiles.high, tiles.groups)
    shape = (tiles.groups, 1 if how.per_row else len(places), how.planes, 16)
    scale = scales(tiles).reshape(shape)
    zero = tiles.zero.astype(np.int64).reshape(shape) if how.zero else np.zeros(shape, np.int64)
    out = np.zeros((len(x.q), 16 * tiles.groups), F32)
    with np.errstate(all="ignore"):
        for g in range(tiles.groups):
            acc, at, high_at = np.zeros((len(x.q), 16), F32), 0, 0
            for b, (start, stop) in enumerate(places):
                for p in range(how.planes):
                    count = (stop - start) * how.widths[0] * 2
                    more = (stop - start) * how.widths[1] * 2 if len(how.widths) == 2 else 0
                    if how.codes == "quads":
                        count = (stop - start) // 4 * 5 * 2
                    step = numbers(tiles, codes[g][at : at + count], high[g][high_at : high_at + more])
                    step = step - zero[g, 0 if how.per_row else b, p][:, None]
                    at, high_at = at + count, high_at + more
                    w = scale[g, 0 if how.per_row else b, p]
                    if how.whole:
                        row = tiles.whole[16 * g : 16 * g + 16]
                        w = w * row if how.whole == "times" else w / row
                    if how.reciprocal:
                        w = F32(1) / w
                    dot = x.q[:, start:stop].astype(np.int64) @ step.T
                    acc = acc + dot.astype(F32) * (w * x.scale[:, b : b + 1])
            out[:, 16 * g : 16 * g + 16] = acc
    return out


def draw(how: Tiling, groups: int, cols: int, batch: int, seed: int) -> tuple[Tiles, Activations]:
    """Random bytes in every component, scales of all kinds of floats included, and activations."""
    rng = np.random.default_rng(seed)

    def some(size: int) -> npt.NDArray[np.uint8]:
        return rng.integers(0, 256, size, np.uint8)

    places = bounds(how, cols)
    count = groups * how.planes * (1 if how.per_row else len(places)) * 16
    scale = some(count * np.dtype(SCALES[how.scale]).itemsize)
    if how.scale in ("f32", "f16", "bf16"):  # most of them not so far apart that all sums but one are lost
        kind = np.dtype(SCALES[how.scale])
        tame = rng.standard_normal(count).astype(kind)
        scale = np.where(rng.random(count) < 0.97, tame, scale.view(kind)).astype(kind).view(np.uint8)
    elif how.scale == "e8m0":
        scale = np.where(rng.random(count) < 0.97, rng.integers(120, 134, count, np.uint8), scale)
    bias = 0
    table = some(128)
    if how.codes == "quads":
        table, bias = rng.integers(0, 3, 128).astype(np.uint8), 1
    elif how.codes in ("table", "wide"):
        entries = 16 if sum(how.widths) <= 4 else 64
        low = rng.integers(0, rng.choice([128, 256]), entries).astype(np.uint8)
        upper = rng.integers(0, 8, entries).astype(np.uint8)
        table = np.concatenate([np.tile(low, 64 // entries), np.tile(upper, 64 // entries)])
        bias = 12 if how.codes == "table" else 1024
    elif how.codes == "signed":
        bias = 128
    elif not how.zero:
        bias = (1 << sum(how.widths)) // 2
    whole = rng.standard_normal(16 * groups).astype(F32) if how.whole else np.zeros(0, F32)
    whole[::7] = np.resize([np.nan, np.inf, 0, -0.0, 1e-42, 3e38], len(whole[::7]))
    size = groups * cols * how.planes * 2
    tiles = Tiles(
        how=how,
        codes=some(size * 5 // 4 if how.codes == "quads" else size * how.widths[0]),
        high=some(size * how.widths[1] if len(how.widths) == 2 else 0),
        scale=scale,
        zero=some(count) if how.zero else np.zeros(0, np.uint8),
        whole=whole,
        table=table if how.codes in ("quads", "table", "wide") else np.zeros(0, np.uint8),
        bias=bias,
        exponent=127,
        nan=bool(seed % 2),
        unit=0.5,
        groups=groups,
        cols=cols,
    )
    q = rng.integers(-127, 128, (batch, cols), np.int8)
    q[rng.random(q.shape) < 0.02] = 127
    a = rng.standard_normal((batch, len(places))).astype(F32)
    if batch > 2:
        a[-1, -1], a[-2, 0] = np.nan, 1e-41
    sums = np.stack([q[:, i:j].sum(axis=1, dtype=np.int32) for i, j in places], axis=1)
    return tiles, Activations(q, sums, a)
