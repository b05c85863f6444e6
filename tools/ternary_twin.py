"""Formats of few bits that no package of PyPI writes, in plain NumPy: closed forms, from the pages in spec/formats.

Nothing here comes from packfmt: not its placement, its grids, its kernels or its table of quads (that is the
codebook of llama.cpp's source). tools/make_vectors.py writes spec/vectors with it, and tests hold packfmt
against it.

Steps are (rows, planes, cols) int64; scales (rows, planes, groups), or (rows, 1, groups) if planes share them.
A format has codes of its own shape; columns and groups of a scale lie as the format's page says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = "1"  # of what these functions give; vectors state it
F32 = np.float32
Array = npt.NDArray[Any]
Stored = dict[str, Array]

# lane p of a code is bits 2 p and 2 p + 1, less 1; codes 16 to 31 are the negatives. llama.cpp pull request 22836
CODEBOOK = bytes.fromhex("a9892909a68626069a921a126a624a42 012181a1042484a41018909840486068")
LANES = np.array([[(c >> 2 * p & 3) - 1 for p in range(4)] for c in CODEBOOK])
CODE_OF = {tuple(lanes): code for code, lanes in enumerate(LANES.tolist())}


@dataclass(frozen=True)
class Twin:
    """One format.

    write : codes, scale -> components, by name in file order
    steps : codes -> (rows, planes, cols)
    codes : (rows, cols) -> shape of codes, and how many values each of them can have
    spell : steps -> codes
    scales : (rows, cols) -> shape of the scales
    dtype : of the scales
    planes : that add up
    ratio : of a plane's scale to the next one's, if they share one
    encode : weights -> codes and scale; None where the choice is too long for a closed form
    encoder : what packfmt calls that choice
    least : rows and columns that fill it
    grows : whether it takes any multiple of them
    """

    write: Callable[[Array, Array], Stored]
    steps: Callable[[Array], Array]
    codes: Callable[[int, int], tuple[tuple[int, ...], int]]
    spell: Callable[[Array], Array]
    scales: Callable[[int, int], tuple[int, ...]]
    dtype: str = "<f2"
    planes: int = 1
    ratio: int = 0
    encode: Callable[[Array], tuple[Array, Array]] | None = None
    encoder: str = ""
    least: tuple[int, int] = (1, 256)
    grows: bool = True


def numbers(twin: Twin, codes: Array, scale: Array) -> Array:
    """(rows, cols) float32: the sum over planes, in order, of step * scale, each operation rounding on its own."""
    steps = twin.steps(codes)
    rows, planes, cols = steps.shape
    out = np.zeros((rows, cols), F32)
    for p in range(planes):
        mine = scale[:, min(p, scale.shape[1] - 1)].astype(F32)
        if twin.ratio:
            mine = mine * F32(twin.ratio ** (planes - 1 - p))
        spread = np.repeat(np.repeat(mine, cols // mine.shape[1], 1), rows // mine.shape[0], 0)
        product = steps[:, p].astype(F32) * spread
        out = product if p == 0 else out + product
    return out


def joined(*pieces: Array) -> Array:
    """(rows, blocks, any) of whole numbers, one after another in a block -> (rows, bytes)."""
    raw = [np.ascontiguousarray(p).view(np.uint8).reshape(*p.shape[:2], -1) for p in pieces]
    return np.concatenate(raw, 2).reshape(len(raw[0]), -1)


def low_bits_first(codes: Array, bits: int) -> Array:
    """(..., n) codes, one byte of each n: the first in the lowest bits."""
    out: Array = (codes << bits * np.arange(codes.shape[-1])).sum(-1).astype(np.uint8)
    return out


# ---------------------------------------------------------------- 3:4 sparse: one zero in every quad


def quad_columns(cols: int, stride: int) -> Array:
    """(quads, 4): the column of each lane."""
    g, p = np.arange(cols // 4)[:, None], np.arange(4)[None]
    return g // stride * 4 * stride + g % stride + p * stride


def quad_steps(codes: Array, stride: int) -> Array:
    out = np.zeros((len(codes), 4 * codes.shape[1]), np.int64)
    out[:, quad_columns(out.shape[1], stride)] = LANES[codes]
    return out[:, None]


def quad_codes(steps: Array, stride: int) -> Array:
    lanes = steps[:, 0][:, quad_columns(steps.shape[2], stride)]
    return np.array([[CODE_OF[tuple(quad)] for quad in row] for row in lanes.tolist()])


def quad_choice(weight: Array, stride: int, group: int, dtype: str) -> tuple[Array, Array]:
    """The first smallest of a quad is zero, the scale the mean of the others' magnitudes; `group` 0: all columns."""
    lanes = weight[:, quad_columns(weight.shape[1], stride)].astype(np.float64)
    steps = np.where(lanes < 0, -1, 1)
    np.put_along_axis(steps, np.abs(lanes).argmin(2)[:, :, None], 0, 2)
    codes = np.array([[CODE_OF[tuple(quad)] for quad in row] for row in steps.tolist()])
    groups = weight.shape[1] // (group or weight.shape[1])
    kept = (np.abs(lanes) * (steps != 0)).reshape(len(weight), groups, -1)
    mean = kept.sum(2) / (kept.shape[2] // 4 * 3)
    return codes, mean.astype(F32).astype(dtype)[:, None]


def sherry(codes: Array, scale: Array, block: int) -> Stored:
    """Low four bits of all quads, their high bits, the scale; or without it, where a row has one."""
    blocks = codes.reshape(len(codes), -1, block // 4)
    low = low_bits_first((blocks & 15).reshape(*blocks.shape[:2], -1, 2), 4)
    high = low_bits_first((blocks >> 4).reshape(*blocks.shape[:2], -1, 8), 1)
    if scale.dtype == "<f4":
        return {"codes": joined(low, high), "scale": scale.reshape(-1)}
    return {"blocks": joined(low, high, scale[:, 0, :, None])}


def sherry_permuted(codes: Array, scale: Array) -> Stored:
    """Quads side by side, stored 16 apart: columns change places within every 64."""
    stored = np.arange(4 * codes.shape[1])
    chunk, lane, quad = stored // 64, stored % 64 // 16, stored % 16
    return {**sherry(codes, scale, 256), "perm": (64 * chunk + 4 * quad + lane).astype("<u4")}


def sherry_tiles(codes: Array, scale: Array) -> Stored:
    """32 rows in a tile: 16 quads in five words of 16 bits, then the scales."""
    missing = -len(codes) % 32
    c = np.pad(codes, ((0, missing), (0, 0))).reshape(-1, 32, codes.shape[1] // 64, 4, 16)
    c = c.transpose(0, 2, 3, 4, 1)  # tile, 256 columns, 16 quads, quad, row
    words = [c[:, :, :, 3 * i] | c[:, :, :, 3 * i + 1] << 5 | c[:, :, :, 3 * i + 2] << 10 for i in range(5)]
    words = [w | (c[:, :, :, 15] >> i & 1) << 15 for i, w in enumerate(words)]
    d = np.pad(scale[:, 0], ((0, missing), (0, 0))).reshape(-1, 32, scale.shape[2]).transpose(0, 2, 1)
    return {"tiles": joined(np.stack(words, 3).astype("<u2"), d)}


def quad_twin(write: Callable[[Array, Array], Stored], stride: int, group: int, dtype: str = "<f2") -> Twin:
    """`group` 0: one scale a row."""
    return Twin(
        write,
        partial(quad_steps, stride=stride),
        lambda rows, cols: ((rows, cols // 4), 32),
        partial(quad_codes, stride=stride),
        lambda rows, cols: (rows, 1, cols // (group or cols)),
        dtype,
        encode=partial(quad_choice, stride=stride, group=group, dtype=dtype),
        encoder="mean",
    )


# ---------------------------------------------------------------- a code a weight


def less_one(codes: Array) -> Array:
    return codes.astype(np.int64).reshape(codes.shape[0], -1, codes.shape[-1]) - 1


def plus_one(steps: Array) -> Array:
    return steps[:, 0] + 1


def a_code_each(values: int) -> Callable[[int, int], tuple[tuple[int, ...], int]]:
    return lambda rows, cols: ((rows, cols), values)


def q1_0(codes: Array, scale: Array) -> Stored:
    bits = codes.reshape(len(codes), -1, 16, 8)
    return {"blocks": joined(scale[:, 0, :, None], low_bits_first(bits, 1))}


def q1_0_choice(weight: Array) -> tuple[Array, Array]:
    """The mean magnitude, summed in float32 in the columns' order; the sign, 1 also for -0.0."""
    sums = np.cumsum(np.abs(weight).reshape(len(weight), -1, 128), 2, dtype=F32)[:, :, -1]
    return (weight >= 0).astype(np.int64), (sums / F32(128)).astype("<f2")[:, None]


def q2_0(codes: Array, scale: Array, block: int) -> Stored:
    fields = codes.reshape(len(codes), -1, block // 4, 4)
    return {"blocks": joined(scale[:, 0, :, None], low_bits_first(fields, 2))}


def q2_0_choice(weight: Array) -> tuple[Array, Array]:
    """The peak; half of it and more is a step."""
    groups = weight.reshape(len(weight), -1, 64)
    peak = np.abs(groups).max(2)
    with np.errstate(divide="ignore"):
        scaled = groups * np.where(peak > 0, F32(1) / peak, F32(0))[:, :, None]
    codes = 1 + np.sign(scaled).astype(np.int64) * (np.abs(scaled) >= 0.5)
    return codes.reshape(weight.shape), peak.astype("<f2")[:, None]


def i2_s(codes: Array, scale: Array, unit: int) -> Stored:
    """The first quarter of a unit in the top bits."""
    quarters = codes.reshape(len(codes), -1, 4, unit // 4)[:, :, ::-1]
    return {"codes": joined(low_bits_first(np.moveaxis(quarters, 2, 3), 2)), "scale": scale.reshape(-1)}


def i2_s_choice(weight: Array) -> tuple[Array, Array]:
    """The peak of the tensor, and signs; below 1e-6 zero."""
    codes = np.where(np.abs(weight.astype(np.float64)) < 1e-6, 1, np.where(weight > 0, 2, 0))
    return codes, np.abs(weight).max().astype("<f4").reshape(1, 1, 1)


def mote(codes: Array, scale: Array) -> Stored:
    """Byte j of 32 holds columns j, j + 32, j + 64 and j + 96, the first in the lowest bits."""
    fields = np.moveaxis(codes.reshape(len(codes), -1, 4, 32), 2, 3)
    return {"codes": joined(low_bits_first(fields, 2)), "scale": scale.reshape(-1)}


# ---------------------------------------------------------------- the tiles of bitnet.cpp
# Places as written down from its converters and kernels (16da220), with its own names for the numbers.


def tl1(codes: Array, scale: Array, bm: int, bk: int, bmm: int) -> Stored:
    """(rows, pairs) codes, two in a byte, the first in the high half."""
    r, t = np.indices(codes.shape)
    by = 256 // bmm
    tile = r // bm * (2 * codes.shape[1] // bk) + t // (bk // 2)
    step = (tile * (bm // bmm) + r % bm // bmm) * (bk // by) + t % (bk // 2) // (by // 2)
    u = t % (by // 2)
    byte = ((step * (bmm // 16) + r % bmm // 16) * (by // 4) + u // 2) * 16 + r % 16
    out = np.zeros(codes.size // 2, np.uint8)
    np.bitwise_or.at(out, byte, (codes << np.where(u % 2, 0, 4)).astype(np.uint8))
    return {"codes": out, "scale": scale.reshape(-1)}


def pair_steps(codes: Array) -> Array:
    pair = np.stack([codes // 3 - 1, codes % 3 - 1], 2) * (codes < 9)[:, :, None]
    return pair.reshape(len(codes), 1, -1)


def pair_codes(steps: Array) -> Array:
    return 3 * (steps[:, 0, ::2] + 1) + steps[:, 0, 1::2] + 1


def tl2(codes: Array, scale: Array, bm: int, bk: int) -> Stored:
    """Magnitudes of triples, their signs, pairs, zeros. `codes` are (rows, 1, cols) steps plus 1."""
    steps = codes - 1
    rows, cols = steps.shape[0], steps.shape[2]
    few = cols % bk
    many = cols - few
    out = np.zeros((cols - 256) * rows // 3 * 5 // 8 + 256 * rows // 2 * 4 // 8, np.uint8)

    def put(nibbles: Array, at: int, block: int) -> None:
        r, t = np.indices(nibbles.shape)
        tile = (r // bm * (nibbles.shape[1] // block) + t // block) * (bm // 32) + r % bm // 32
        place = np.array([0, 16, 8, 24])[r % 32 // 8] + r % 8
        byte = at + (tile * (block // 2) + t % block // 2) * 32 + place
        np.bitwise_or.at(out, byte, (nibbles << np.where(t % 2, 0, 4)).astype(np.uint8))

    v = steps[:, 0, :many].reshape(rows, -1, 3) @ np.array([9, 3, 1])
    put(np.abs(v), 0, bk // 3)
    r, t = np.indices(v.shape)
    tile = (r // bm * (many // bk) + t // (bk // 3)) * (bm // 32) + r % bm // 32
    word = (tile * (bk // 24) + t % (bk // 3) // 8) * 16 + r % 16
    signs = np.zeros(rows * many // 48, np.int64)
    np.bitwise_or.at(signs, word, (v < 0).astype(np.int64) << 15 - 2 * (t % 8) - r % 32 // 16)
    nibbles, end = rows * many // 6, rows * many // 6 + rows * many // 24
    out[nibbles:end] = signs.astype("<u2").view(np.uint8)
    if few:
        put(pair_codes(steps[:, :, many:]), end, 16)
    return {"codes": out, "scale": scale.reshape(-1)}


# ---------------------------------------------------------------- 16 or 32 rows side by side


def side_by_side(raw: Array, size: int, lanes: int) -> Array:
    """(rows, any) elements -> for every `lanes` rows a line: the first `size` of each, then the next. Zeros fill up."""
    padded = np.pad(raw, ((0, -len(raw) % lanes), (0, 0)))
    lines = padded.reshape(len(padded) // lanes, lanes, -1, size).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(lines).reshape(len(lines), -1)


def tiled(codes: Array, scale: Array, string: Callable[[Array], Array], lanes: int = 16) -> Stored:
    """`string`: codes -> bytes, words or dwords of each row. Scales go block by block, in a block plane by plane."""
    found, each = string(codes), scale.transpose(0, 2, 1).reshape(len(scale), -1)
    size = max(1, 64 // lanes // found.itemsize)
    return {"codes": side_by_side(found, size, lanes), "scale": side_by_side(each, 1, lanes)}


def fives(codes: Array, dtype: str) -> Array:
    """Five bits a quad, one after another, the lowest bit first."""
    bits = (codes[:, :, None] >> np.arange(5) & 1).astype(np.uint8).reshape(len(codes), -1)
    return np.packbits(bits, axis=1, bitorder="little").view(dtype)


def nibbles_apart(codes: Array, scale: Array) -> Stored:
    """Low four bits of two quads in a byte, fifth bits of eight in another; rows in the order 0, 16, 1, 17, 2 ..."""
    padded = np.pad(codes, ((0, -len(codes) % 32), (0, 0)))
    woven = padded.reshape(-1, 2, 16, codes.shape[1]).swapaxes(1, 2).reshape(padded.shape)
    low = low_bits_first((woven & 15).reshape(len(woven), -1, 2), 4)
    high = low_bits_first((woven >> 4).reshape(len(woven), -1, 8), 1)
    d = side_by_side(scale[:, 0], 1, 32)
    return {"codes": side_by_side(low, 1, 32), "codes_high": side_by_side(high, 1, 32), "scale": d}


def quarters(codes: Array, block: int) -> Array:
    """Planes in turn in a block; byte j of a quarter has columns j of all quarters, the first in the lowest bits."""
    planes = codes.reshape(len(codes), -1, codes.shape[-1] // block, 4, block // 4)
    return low_bits_first(planes.transpose(0, 2, 1, 4, 3), 2).reshape(len(codes), -1)


def fours(codes: Array) -> Array:
    """Four columns in the lowest bits of four bytes, the next four above them."""
    return low_bits_first(np.moveaxis(codes.reshape(len(codes), -1, 4, 4), 2, 3), 2).reshape(len(codes), -1)


def tiled_trits(string: Callable[[Array], Array], planes: int = 1, block: int = 256) -> Twin:
    """Two bits a trit, `planes` of them; a scale for each block."""
    return Twin(
        partial(tiled, string=string), less_one,
        a_code_each(4) if planes == 1 else lambda rows, cols: ((rows, planes, cols), 4),
        plus_one if planes == 1 else lambda steps: steps + 1,
        lambda rows, cols: (rows, planes, cols // block), planes=planes, least=(1, block),
    )  # fmt: skip


# ---------------------------------------------------------------- columns of 4 bits, and signs


def ptq161(parts: Stored) -> Stored:
    """`mask` (cols,), `codes` (rows, 13 / 64 of cols), `signs` (rows, 51 / 64), and numbers of rows and columns."""
    rows, cols = len(parts["scale"]), len(parts["mask"])
    missing = -rows % 8
    codes, signs = (np.pad(parts[k], ((0, missing), (0, 0))) for k in ("codes", "signs"))
    fours = codes.reshape(-1, 4, 2, cols // 64, 13).transpose(0, 3, 4, 1, 2)
    ones = signs.reshape(-1, 8, cols // 64, 51).transpose(0, 2, 3, 1)
    cell = np.concatenate([low_bits_first(fours, 4).reshape(*fours.shape[:2], 52), low_bits_first(ones, 1)], 2)
    rest = {k: np.pad(parts[k], (0, missing)) for k in ("scale", "mean", "salient_scale", "salient_zero")}
    mask = low_bits_first(parts["mask"].reshape(-1, 8), 1)
    return {"mask": mask, "tiles": cell.reshape(len(cell), -1), "factor": parts["factor"], **rest}


def ptq161_numbers(parts: Stored) -> Array:
    """(rows, cols) float32, every operation rounding on its own."""
    scale, mean, step = (parts[k].astype(F32)[:, None] for k in ("scale", "mean", "salient_scale"))
    out = np.zeros((len(scale), len(parts["mask"])), F32)
    out[:, parts["mask"] == 1] = (parts["codes"].astype(F32) - parts["salient_zero"].astype(F32)[:, None]) * step
    level = np.where(parts["signs"] == 1, mean + scale, mean - scale)
    out[:, parts["mask"] == 0] = level * parts["factor"].astype(F32)
    return out


# ---------------------------------------------------------------- planes that add up


def base3_bytes(trits: Array) -> Array:
    """(..., 5) of 0 to 2, the most significant first -> bytes: ceil(256 q / 243)."""
    q = trits @ np.array([81, 27, 9, 3, 1])
    out: Array = ((256 * q + 242) // 243).astype(np.uint8)
    return out


def base3_digits(stored: Array) -> Array:
    """(...) bytes -> (..., 5): digit i is floor(3 * (byte * 3**i mod 256) / 256)."""
    return (stored[..., None].astype(np.int64) * 3 ** np.arange(5) % 256) * 3 // 256


def plane_bytes(steps: Array) -> Array:
    """(rows, planes, cols) -> (rows, planes, cols / 128, 26): 24 bytes of five digits, 2 of four."""
    u = steps.reshape(*steps.shape[:2], -1, 128) + 1
    five = np.moveaxis(u[..., :120].reshape(*u.shape[:3], 5, 24), 3, 4)
    four = np.moveaxis(u[..., 120:].reshape(*u.shape[:3], 4, 2), 3, 4)
    four = np.concatenate([four, np.zeros_like(four[..., :1])], 4)
    return np.concatenate([base3_bytes(five), base3_bytes(four)], 3)


def plane_bytes_steps(codes: Array) -> Array:
    digits = np.moveaxis(base3_digits(codes), 4, 3)  # (rows, planes, blocks, 5, 26)
    five = digits[..., :24].reshape(*codes.shape[:3], 120)
    four = digits[..., :4, 24:].reshape(*codes.shape[:3], 8)
    return np.concatenate([five, four], 3).reshape(*codes.shape[:2], -1) - 1


def nibble_steps(codes: Array) -> Array:
    return np.concatenate([codes // 3 % 3, codes % 3], 1).astype(np.int64) - 1


def nibbles(steps: Array) -> Array:
    return 3 * (steps[:, :1] + 1) + steps[:, 1:] + 1


def ptqtp(codes: Array, scale: Array) -> Stored:
    """Planes of 2 bits, one after another in a block of 128 columns, then the scales."""
    rows, planes, cols = codes.shape
    fields = codes.reshape(rows, planes, cols // 128, 4, 32).transpose(0, 2, 1, 4, 3)
    return {"blocks": joined(low_bits_first(fields, 2), scale.transpose(0, 2, 1))}


def ptqtp_n4(codes: Array, scale: Array) -> Stored:
    """Columns j and j + 64 of a block in the low and high half of byte j."""
    halves = codes.reshape(len(codes), -1, 2, 64)
    return {"blocks": joined(low_bits_first(np.moveaxis(halves, 2, 3), 4), scale.transpose(0, 2, 1))}


def ptqtp_b3(codes: Array, scale: Array) -> Stored:
    return {"blocks": joined(codes.astype(np.uint8).transpose(0, 2, 1, 3), scale.transpose(0, 2, 1))}


def plane_twin(count: int, how: str, tied: bool) -> Twin:
    """`how`: "" for 2 bits, "_b3" for bytes of base 3, "_n4" for nibbles."""
    shapes: dict[str, Callable[[int, int], tuple[tuple[int, ...], int]]] = {
        "": lambda rows, cols: ((rows, count, cols), 4),
        "_b3": lambda rows, cols: ((rows, count, cols // 128, 26), 256),
        "_n4": lambda rows, cols: ((rows, 1, cols), 16),
    }
    write = {"": ptqtp, "_b3": ptqtp_b3, "_n4": ptqtp_n4}[how]
    steps = {"": less_one, "_b3": plane_bytes_steps, "_n4": nibble_steps}[how]
    spell = {"": lambda t: t + 1, "_b3": plane_bytes, "_n4": nibbles}[how]
    return Twin(
        write, steps, shapes[how], spell, lambda rows, cols: (rows, 1 if tied else count, cols // 128),
        planes=count, ratio=3 if tied else 0, least=(1, 128),
    )  # fmt: skip


TWINS: dict[str, Twin] = {
    "sherry": quad_twin(partial(sherry, block=256), 1, 256),
    "sherry_s16": quad_twin(partial(sherry, block=256), 16, 256),
    "sherry_s16_perm": quad_twin(sherry_permuted, 1, 256),
    "sherry_g128": quad_twin(partial(sherry, block=128), 1, 128),
    "sherry_row": quad_twin(partial(sherry, block=128), 1, 0, "<f4"),
    "sherry_t32": quad_twin(sherry_tiles, 1, 256),
    "sherry_t32_s16": quad_twin(sherry_tiles, 16, 256),
    "q1_0": Twin(
        q1_0, lambda c: 2 * c[:, None] - 1, a_code_each(2), lambda t: (t[:, 0] + 1) // 2,
        lambda rows, cols: (rows, 1, cols // 128), encode=q1_0_choice, encoder="ggml",
    ),
    "q2_0": Twin(
        partial(q2_0, block=64), less_one, a_code_each(4), plus_one,
        lambda rows, cols: (rows, 1, cols // 64), encode=q2_0_choice, encoder="ggml",
    ),
    "pq2_0": Twin(
        partial(q2_0, block=128), less_one, a_code_each(4), plus_one,
        lambda rows, cols: (rows, 1, cols // 128), least=(1, 128),
    ),
    "mote_2": Twin(mote, less_one, a_code_each(4), plus_one, lambda rows, cols: (2, 1, 1), "<f4", least=(2, 128)),
    "tl1_32_8_32": Twin(
        partial(tl1, bm=32, bk=8, bmm=32), pair_steps, lambda rows, cols: ((rows, cols // 2), 16), pair_codes,
        lambda rows, cols: (1, 1, 1), "<f4", least=(32, 8),
    ),
    "tl2_32_128_32_96": Twin(
        partial(tl2, bm=32, bk=96), less_one, lambda rows, cols: ((rows, 1, cols), 3), lambda t: t + 1,
        lambda rows, cols: (1, 1, 1), "<f4", least=(32, 128), grows=False,
    ),
    **{
        name: Twin(
            partial(i2_s, unit=unit), less_one, a_code_each(4), plus_one,
            lambda rows, cols: (1, 1, 1), "<f4", encode=i2_s_choice, encoder="ggml",
        )
        for name, unit in (("i2_s", 128), ("i2_s_arm", 64))
    },
    **{f"ptqtp{n}{how}": plane_twin(n, how, False) for n in (1, 2, 3, 4) for how in ("", "_b3")},
    **{f"ptqtp{n}{how}_tied": plane_twin(n, how, True) for n in (2, 3, 4) for how in ("", "_b3")},
    "ptqtp2_n4": plane_twin(2, "_n4", False),
    "ptqtp2_n4_tied": plane_twin(2, "_n4", True),
    "sherry_tile16": quad_twin(partial(tiled, string=partial(fives, dtype="<u4")), 1, 256),
    "sherry_words32": quad_twin(partial(tiled, string=partial(fives, dtype="<u2"), lanes=32), 1, 256),
    "sherry_s16_nibbles32": quad_twin(nibbles_apart, 16, 256),
    "tq2_0_tile16": tiled_trits(partial(quarters, block=128)),
    "tq1_0_tile16": tiled_trits(fours),
    "ptqtp2_tile16": tiled_trits(partial(quarters, block=128), 2, 128),
}  # fmt: skip
