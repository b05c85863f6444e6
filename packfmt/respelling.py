"""The same numbers in a layout whose codes spell them otherwise: exact, or refused.

`placement.repack` moves bits between layouts that have the same parts. Here codes become steps and steps
become codes (`spellings`), and scales are copied to those that are shared differently or have another
dtype. Nothing is rounded: what does not fit is an error that names the step, quad or scale.

What can be known from two layouts is `why_not` and `condition`; the rest only the numbers can tell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from packfmt.errors import LayoutError
from packfmt.layout import Layout, dtype_of
from packfmt.placement import Array, Arrays, pack, unpack
from packfmt.spellings import F32, SPELLINGS, Floats, Steps, contiguous_quads, scales

Shape = tuple[int, int]
WRONG = (KeyError, TypeError, IndexError, ValueError, OverflowError, AttributeError)  # parameters or parts
MOST_BITS = 16  # of codes that spell steps; more spell too many to compare
HELD, HELD_PERMUTED = 6, 32  # bytes a step: codes, steps and what tells which are zero; scales spread over columns
FLOATS = ("<f2", "<f4", "bfloat16")  # dtypes of scales, all exact in float32


class View(NamedTuple):
    """What a layout's steps and scales look like for one shape."""

    steps: frozenset[float]  # what a step can be
    planes: int
    dtype: str  # of scales
    share: tuple[int, int]  # rows and columns of the weight that share a scale
    ratio: int  # of a plane's scale to the next one's; 0: each has its own
    divides: bool
    quads: int  # how many columns apart the weights of a quad lie, in the order of the weight; 0: no quads
    perm: bool


def view(layout: Layout, shape: Shape) -> View | str:
    """The layout's steps and scales, or why its numbers are no steps times scales."""
    parts = layout.fit(*shape).parts
    if layout.grid.name not in SPELLINGS:
        return f"the numbers of {layout.name} are no steps times scales, but {layout.grid.name!r}"
    if not {"codes", "scale"} <= parts.keys() <= {"codes", "scale", "perm"}:
        return f"{layout.name} has other parts: {', '.join(parts)}"
    codes, scale, params = parts["codes"], parts["scale"], dict(layout.grid.params)
    if scale.dtype not in FLOATS:
        return f"the scales of {layout.name} are {dtype_of(scale.dtype).name}"
    if codes.bits > MOST_BITS:
        return f"the codes of {layout.name} have {codes.bits} bits"
    ratio = params.pop("ratio", 0)
    lowest = -(1 << codes.bits - 1) if codes.dtype.startswith(("i", "<i")) else 0
    try:
        steps = frozenset(SPELLINGS[layout.grid.name].steps(lowest, codes.levels or 1 << codes.bits, **params))
        if any(s != int(s) for s in steps):
            return f"the steps of {layout.name} are no whole numbers"
    except WRONG as error:
        return f"grid {layout.grid.name!r} cannot take the parameters of {layout.name}: {error}"
    share = {"rows": max(1, shape[0]), "cols": max(1, shape[1])}
    planes = codes.shape[1] if SPELLINGS[layout.grid.name].plane_axis and len(codes.shape) > 1 else 1
    planes = params.get("count", planes)
    for axis, each in zip(layout.axes, scale.share, strict=True):
        if axis.of:
            share[axis.of] = min(share[axis.of], max(1, each * axis.per))
    perm, divides = "perm" in parts, layout.grid.name == "quotient"
    apart = 1 if perm else params.get("stride", 0)
    return View(steps, planes, scale.dtype, (share["rows"], share["cols"]), ratio, divides, apart, perm)


def why_not(source: Layout, target: Layout, shape: Shape) -> str:
    """Why the numbers of one layout could never be those of the other; empty if they could."""
    a, b = view(source, shape), view(target, shape)
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else str(b)
    if a.planes > b.planes:
        return f"{source.name} has {a.planes} planes, {target.name} {b.planes}"
    if len(a.steps & b.steps) <= len(a.steps) // 2:
        return f"{target.name} has no code for {_some(a.steps - b.steps)} times a scale"
    return ""


def _some(steps: frozenset[float]) -> str:
    return ", ".join(f"{s:g}" for s in sorted(steps)[:4]) + (" ..." if len(steps) > 4 else "")


def condition(source: Layout, target: Layout, shape: Shape) -> str:
    """What must be true of the numbers for an exact conversion, in words; empty if nothing."""
    a, b = view(source, shape), view(target, shape)
    assert isinstance(a, View) and isinstance(b, View)
    needs = [f"no weight is {_some(a.steps - b.steps)} times its scale"] if a.steps - b.steps else []
    if b.quads and a.quads != b.quads:
        needs.append("every quad has exactly one zero")
    if (a.dtype != b.dtype and b.dtype != "<f4") or (a.ratio and not b.ratio):
        needs.append(f"every scale is a {dtype_of(b.dtype).name}")
    chunk = 4 * target.grid["stride"] if b.perm else 1  # columns change places within it
    if any(mine % theirs for mine, theirs in zip(a.share, b.share, strict=True)) or a.share[1] % chunk:
        needs.append(f"the {_group(b.share)} that share a scale there do so here")
    if a.divides != b.divides:
        needs.append("every scale is a power of two, as one divides and one multiplies")
    if b.ratio and a.ratio != b.ratio:
        needs.append(f"each plane's scale is {b.ratio} times the next one's")
    return " and ".join(needs)


def held(source: Layout, target: Layout, shape: Shape) -> int:
    """Bytes that `respell` holds at once, beside the components of both, for layouts that have a `view`."""
    a, b = view(source, shape), view(target, shape)
    assert isinstance(a, View) and isinstance(b, View)
    weights = shape[0] * shape[1] * max(a.planes, b.planes)
    return weights * (HELD_PERMUTED if a.perm != b.perm else HELD)


def respell(source: Layout, target: Layout, shape: Shape, components: Arrays) -> dict[str, Array]:
    """Components of one layout -> components of another that decode to the same numbers.

    Where the weights of a scale are all zero, the scale may become another; it stays what it is where the
    target keeps one for the same weights. Where the scale is zero, the steps may become zero. A zero may lose
    its sign. A scale that is not finite stays, or is refused.

    Raises
    ------
    LayoutError
        If the layouts can have no number in common (`why_not`), or a number of this tensor does not fit.
    """
    if reason := why_not(source, target, shape):
        raise LayoutError(f"{source.name} to {target.name}: {reason}")
    a, b = view(source, shape), view(target, shape)
    assert isinstance(a, View) and isinstance(b, View)
    try:
        parts = unpack(source, shape, components)
        if not shape[0] or not shape[1]:
            return {c.name: np.zeros(c.shape, dtype_of(c.dtype)) for c in target.fit(*shape).components}
        steps, scale = _read(source, a, parts, b.divides)
        perm = parts["perm"].reshape(-1) if a.perm else None
        if perm is not None and not np.array_equal(np.sort(perm), np.arange(shape[1])):
            raise _Misfit(f"perm does not name each of {shape[1]} columns once")
        moved = _reorder(steps, scale, a, target, b, perm)
        return pack(target, shape, _write(target, b, shape, *moved, keep=parts.get("perm")))
    except _Misfit as error:
        raise LayoutError(f"{source.name} to {target.name}: {error}") from None
    except WRONG as error:  # a description from a file may say anything
        raise LayoutError(f"{source.name} to {target.name}: {error}") from error


class _Misfit(Exception):
    """A number that the target cannot hold; the message says which."""


def _read(source: Layout, a: View, parts: Arrays, divides: bool) -> tuple[Steps, Floats]:
    """(rows, planes, cols) steps, and (rows, planes, cols / share) scales that multiply them, or divide if told."""
    spelling, params = SPELLINGS[source.grid.name], dict(source.grid.params)
    params.pop("ratio", 0)
    steps = spelling.read(parts["codes"], **params)
    scale = scales(parts["scale"], a.planes, spelling, a.ratio)
    if a.divides != divides:
        scale = _inverse(scale)
    return steps, scale


def _inverse(scale: Floats) -> Floats:
    with np.errstate(all="ignore"):
        odd = (np.frexp(np.abs(scale))[0] != 0.5) | ~np.isfinite(F32(1) / scale)
    if odd.any():
        at = _first(odd)
        how = "no power of two, and one divides by it where the other multiplies"
        raise _Misfit(f"scale {[at[0], at[2]]} is {scale[at]:.9g}, {how}")
    return (F32(1) / scale).astype(F32)


def _first(mask: Array) -> tuple[int, ...]:
    """Where the first true element is."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def _reorder(
    steps: Steps, scale: Floats, a: View, target: Layout, b: View, perm: Array | None
) -> tuple[Steps, Floats, tuple[int, int]]:
    """Columns in the order that the target stores, and what shares a scale then."""
    if a.perm == b.perm:
        return steps, scale, a.share
    spread = np.repeat(scale, a.share[1], 2)[:, :, : steps.shape[2]]
    order = np.argsort(perm) if perm is not None else contiguous_quads(steps.shape[2], target.grid["stride"])
    return steps[:, :, order], spread[:, :, order], (a.share[0], 1)


def _write(
    target: Layout, b: View, shape: Shape, steps: Steps, scale: Floats, share: tuple[int, int], keep: Array | None
) -> dict[str, Array]:
    """The target's parts."""
    fitted, spelling, params = target.fit(*shape).parts, SPELLINGS[target.grid.name], dict(target.grid.params)
    params.pop("ratio", 0)
    if missing := b.planes - steps.shape[1]:
        # the last of tied planes counts the scale itself, so those that are added come first
        added = (missing, 0) if b.ratio else (0, missing)
        steps, scale = (np.pad(x, ((0, 0), added, (0, 0))) for x in (steps, scale))
    cells = _Cells(steps, scale, share, b.share)
    wanted = cells.regrouped(clear=b.quads > 0)
    steps = cells.without_strays(steps, wanted)
    for value in _outside(steps, b.steps):
        count = int((steps == value).sum())
        raise _Misfit(f"{count} of {steps.size} weights are {value} times their scale, for which there is no code")
    used: Array = cells.used_there
    if b.ratio:
        wanted, used = _untied(wanted, cells, b), np.logical_or.reduce(used, 1, keepdims=True)
    stored = _cast(wanted, b.dtype, used)
    codes, bad = spelling.write(steps, **params)
    if bad is not None:
        first = np.arange(bad.shape[1]) // params["stride"] * 4 * params["stride"]
        bad &= cells.used_there[:, 0][np.arange(shape[0])[:, None] // b.share[0], first // b.share[1]]
        if bad.any():
            at = list(_first(bad))
            raise _Misfit(f"{bad.sum()} of {bad.size} quads have not exactly one zero, the first at {at}")
    part = fitted["codes"]
    out = {"codes": codes.astype(dtype_of(part.dtype)).reshape(part.shape)}
    out["scale"] = stored.reshape(fitted["scale"].shape)
    if b.perm:
        perm = contiguous_quads(shape[1], params["stride"]) if keep is None else keep
        out["perm"] = perm.astype(dtype_of(fitted["perm"].dtype)).reshape(fitted["perm"].shape)
    return out


def _outside(steps: Steps, known: frozenset[float]) -> list[int]:
    """The steps that are not among the known, ascending."""
    low, high = int(steps.min()), int(steps.max())
    if all(value in known for value in range(low, high + 1)):
        return []
    return [int(value) for value in np.unique(steps) if value not in known]


class _Cells:
    """The weights cut wherever a scale ends, here or in the target: (rows, planes, cols) of cells.

    A cell is used if its numbers are not all zero.
    """

    def __init__(self, steps: Steps, scale: Floats, here: tuple[int, int], there: tuple[int, int]) -> None:
        self.here, self.there, self.scale = here, there, scale
        rows, _, cols = steps.shape
        self.rows, self.cols = (
            np.union1d(np.arange(0, n, a), np.arange(0, n, b))
            for n, a, b in zip((rows, cols), here, there, strict=True)
        )
        self.some = np.logical_or.reduceat(np.logical_or.reduceat(steps != 0, self.cols, 2), self.rows, 0)
        self.scales = scale[self.rows // here[0]][:, :, self.cols // here[1]]
        self.used = (self.some & (self.scales != 0)) | ~np.isfinite(self.scales)  # 0 * infinity is no zero
        self.place = np.ix_(self.rows // there[0], np.arange(steps.shape[1]), self.cols // there[1])
        self.shape = (-(-rows // there[0]), steps.shape[1], -(-cols // there[1]))
        self.used_there = np.zeros(self.shape, bool)
        np.logical_or.at(self.used_there, self.place, self.used)

    def regrouped(self, clear: bool) -> Floats:
        """The target's scales: those of the first weights that are not zero; `clear` makes others 0."""
        out = np.zeros(self.shape, F32)
        if not clear or self.here == self.there:
            out[self.place] = self.scales
        if clear:
            out[~self.used_there] = 0
        # from the last to the first, for of several that are assigned to one place the last stays
        used = self.used[::-1, :, ::-1]
        place = (p[::-1, :, ::-1][used] for p in np.broadcast_arrays(*self.place))
        out[tuple(place)] = self.scales[::-1, :, ::-1][used]
        there = out[self.place]
        apart = self.used & (there != self.scales) & ~(np.isnan(there) & np.isnan(self.scales))
        if apart.any():
            at = _first(apart)
            mine = [int(self.rows[at[0]] // self.here[0]), int(self.cols[at[2]] // self.here[1])]
            other = float(there[at])
            raise _Misfit(
                f"scale {mine} is {float(self.scales[at]):.9g}, that of weights before it {other:.9g}, "
                f"and {_group(self.there)} share one there"
            )
        return out

    def without_strays(self, steps: Steps, wanted: Floats) -> Steps:
        """The steps, with zeros where a scale of zero would become another: of a group whose others are not zero."""
        stray = self.some & ~self.used & (wanted[self.place] != 0)
        if not stray.any():
            return steps
        rows, cols = (np.diff(cuts, append=n) for cuts, n in zip((self.rows, self.cols), steps.shape[::2], strict=True))
        return np.where(np.repeat(np.repeat(stray, rows, 0), cols, 2), steps.dtype.type(0), steps)


def _untied(wanted: Floats, cells: _Cells, b: View) -> Floats:
    """One scale for all planes, from the first plane that has weights."""
    count = wanted.shape[1]
    weights = F32(b.ratio) ** np.arange(count - 1, -1, -1).astype(F32)
    first = np.argmax(cells.used_there, 1)[:, None]
    base: Floats = np.take_along_axis(wanted, first, 1) / weights[first]
    apart = cells.used_there & (base * weights[None, :, None] != wanted)
    if apart.any():
        row, _, group = _first(apart)
        found = ", ".join(f"{s:.9g}" for s in wanted[row, :, group])
        raise _Misfit(f"the planes' scales {[row, group]} are {found}, not each {b.ratio} times the next")
    return base


def _cast(scale: Floats, dtype: str, used: Array) -> Array:
    """Scales in the target's dtype; those that no number needs become 0 where it has not got them."""
    with np.errstate(over="ignore"):
        out: Array = scale.astype(dtype_of(dtype))
    lost = (out.astype(F32) != scale) & ~np.isnan(scale)
    out[lost & ~used] = 0
    if (lost & used).any():
        at = _first(lost & used)
        raise _Misfit(f"scale {[at[0], at[2]]} is {scale[at]:.9g}, which is no {dtype_of(dtype).name}")
    return out


def _group(share: tuple[int, int]) -> str:
    rows, cols = share
    return f"{cols} columns" if rows == 1 else f"{rows} rows and {cols} columns"
