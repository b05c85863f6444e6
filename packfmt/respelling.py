"""The same numbers in a layout whose codes spell them otherwise: exact, or refused.

`placement.repack` moves bits between layouts that have the same parts. Here codes become steps and steps
become codes (`spellings`), and scales are copied to those that are shared differently or have another
dtype. Codes that mean the same numbers stay as they are. Nothing is rounded: what does not fit is an error
that names the step, quad or scale. The one exception must be asked for: where one layout multiplies by the
scale of the whole tensor and the other divides, its reciprocal may be rounded.

What can be known from two layouts is `why_not` and `condition`; the rest only the numbers can tell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from packfmt import minifloat
from packfmt.errors import LayoutError
from packfmt.grids import scale_numbers
from packfmt.layout import Grid, Layout, dtype_of
from packfmt.placement import Array, Arrays, difference, pack, repack, unpack
from packfmt.spellings import F32, SPELLINGS, Steps, contiguous_quads, has_steps, scales, unit

Shape = tuple[int, int]
WRONG = (KeyError, TypeError, IndexError, ValueError, ArithmeticError, AttributeError)  # parameters or parts
MOST_BITS = 16  # of codes that spell steps; more spell too many to compare
HELD, HELD_PERMUTED = 8, 40  # bytes a step: codes, steps and what tells which are zero; scales spread over columns
FLOATS = ("<f2", "<f4", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu")  # dtypes of scales, all exact in float32
CODES = frozenset({"codes"})
WHOLE = "global_scale"
SCALES = frozenset({"scale", "global_scale"})
POWERS = "power of two"  # what scales are that a `table` has
F64 = np.float64
Doubles = npt.NDArray[np.float64]


class View(NamedTuple):
    """What a layout's steps and scales look like for one shape."""

    steps: frozenset[float]  # what a step can be; none where numbers are too far apart to be steps
    table: tuple[float | str, ...]  # the step of every code, or the name of all numbers; empty where codes are neither
    unit: float  # what a step counts, times its scale
    planes: int
    dtype: str  # of scales
    scales: str  # what bytes of scales mean: a number format, or POWERS; empty: nothing but their dtype
    exponent: int  # of POWERS: the byte that is one
    whole: str  # what a scale of the whole tensor does: times, divides, or empty
    share: tuple[int, int]  # rows and columns of the weight that share a scale
    ratio: int  # of a plane's scale to the next one's; 0: each has its own
    divides: bool
    quads: int  # how many columns apart the weights of a quad lie, in the order of the weight; 0: no quads
    perm: bool
    hadamard: int

    @property
    def kind(self) -> str:
        """What scales are, in words."""
        return self.scales or dtype_of(self.dtype).name


def view(layout: Layout, shape: Shape) -> View | str:
    """The layout's steps and scales, or why its numbers are no steps times scales."""
    parts = layout.fit(*shape).parts
    if layout.grid.name not in SPELLINGS:
        return f"the numbers of {layout.name} are no steps times scales, but {layout.grid.name!r}"
    params = dict(layout.grid.params)
    whole = str(params.get("global_scale", ""))
    needs = {"codes", "scale", *(["global_scale"] if whole else [])}
    if not needs <= parts.keys() <= needs | {"perm"}:
        return f"{layout.name} has other parts: {', '.join(parts)}"
    if whole and (count := parts["global_scale"].shape[0]) != 1:
        return f"{layout.name} has a scale for each of {count} experts"
    codes, scale = parts["codes"], parts["scale"]
    meaning = POWERS if layout.grid.name == "table" else str(params.get("scale", ""))
    if not meaning and scale.dtype not in FLOATS:
        return f"the scales of {layout.name} are {dtype_of(scale.dtype).name}"
    if codes.bits > MOST_BITS:
        return f"the codes of {layout.name} have {codes.bits} bits"
    ratio = params.pop("ratio", 0)
    lowest = -(1 << codes.bits - 1) if codes.dtype.startswith(("i", "<i")) else 0
    spelling = SPELLINGS[layout.grid.name]
    table: tuple[float | str, ...]
    try:
        each, stepped = 1.0, True
        if layout.grid.name == "scaled":
            numbers = minifloat.numbers(params["element"])
            each, stepped = unit(numbers) or 1.0, has_steps(numbers)
        known = spelling.steps(lowest, codes.levels or 1 << codes.bits, **params) if stepped else ()
        table = known or (params["element"],)
        if any(s != int(s) for s in known):
            return f"the steps of {layout.name} are no whole numbers"
    except (*WRONG, LayoutError) as error:
        return f"grid {layout.grid.name!r} cannot take the parameters of {layout.name}: {error}"
    share = {"rows": max(1, shape[0]), "cols": max(1, shape[1])}
    planes = codes.shape[1] if spelling.plane_axis and len(codes.shape) > 1 else 1
    planes = params.get("count", planes)
    for axis, each_share in zip(layout.axes, scale.share, strict=True):
        if axis.of:
            share[axis.of] = min(share[axis.of], max(1, each_share * axis.per))
    single = layout.grid.name in ("affine", "levels", "table", "scaled") and not lowest
    perm, divides = "perm" in parts, layout.grid.name == "quotient"
    apart = 1 if perm else params.get("stride", 0)
    return View(
        frozenset(known), table if single else (), each, planes, scale.dtype, meaning, params.get("exponent", 0), whole,
        (share["rows"], share["cols"]), ratio, divides, apart, perm, layout.hadamard,
    )  # fmt: skip


def alike(source: Layout, target: Layout, shape: Shape) -> bool:
    """Whether codes of both layouts are the same numbers, up to what scales multiply them with; or are all ternary.

    Then a conversion is exact or refused, for there is no reason to round.
    """
    if _experts_differ(source, target, shape):
        return True
    a, b = view(source, shape), view(target, shape)
    if isinstance(a, str) or isinstance(b, str):
        return False
    return bool(a.steps and a.steps <= {-1, 0, 1, 2}) or a.table == b.table != ()


def inverts(source: Layout, target: Layout, shape: Shape) -> bool:
    """Whether only the scale of the whole tensor need be rounded: one layout multiplies by it, the other divides."""
    a, b = view(source, shape), view(target, shape)
    if isinstance(a, str) or isinstance(b, str):
        return False
    return bool(a.table == b.table != () and a.whole and b.whole and a.whole != b.whole and a.share == b.share)


def why_not(source: Layout, target: Layout, shape: Shape) -> str:
    """Why the numbers of one layout could never be those of the other; empty if they could."""
    if _experts_differ(source, target, shape):
        return ""
    a, b = view(source, shape), view(target, shape)
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else str(b)
    if a.planes > b.planes:
        return f"{source.name} has {a.planes} planes, {target.name} {b.planes}"
    if a.hadamard != b.hadamard:
        return f"{source.name} has {_columns(a.hadamard)}, {target.name} {_columns(b.hadamard)}"
    if a.table == b.table != () and not a.steps:
        return _why_not_as_they_are(source, target, a, b, shape)
    for layout, seen in (source, a), (target, b):
        if not seen.steps:
            return f"the numbers of {layout.name} are too far apart to be steps"
    if len(a.steps & b.steps) <= len(a.steps) // 2:
        return f"{target.name} has no code for {_some(a.steps - b.steps)} times a scale"
    return ""


def _why_not_as_they_are(source: Layout, target: Layout, a: View, b: View, shape: Shape) -> str:
    """Why codes that are no steps cannot stay as they are."""
    if reason := difference(source, target, shape, SCALES):
        return reason
    return (
        ""
        if _finer(a, b, shape)
        else f"{_group(a.share)} share a scale in {source.name}, in {target.name} {_group(b.share)}"
    )


def _finer(a: View, b: View, shape: Shape) -> bool:
    """Whether weights that share a scale there also do so here."""
    return all(mine >= n or not mine % theirs for n, mine, theirs in zip(shape, a.share, b.share, strict=True))


def _columns(hadamard: int) -> str:
    return f"{hadamard} columns rotated" if hadamard else "none rotated"


def _some(steps: frozenset[float]) -> str:
    return ", ".join(f"{s:g}" for s in sorted(steps)[:4]) + (" ..." if len(steps) > 4 else "")


def condition(source: Layout, target: Layout, shape: Shape) -> str:
    """What must be true of the numbers for an exact conversion, in words; empty if nothing."""
    if _experts_differ(source, target, shape):
        here, there = (layout.fit(*shape).parts[WHOLE].share[0] for layout in (source, target))
        return (
            "" if here % max(1, there) == 0 else f"the {_group((there, shape[1]))} that share a scale there do so here"
        )
    a, b = view(source, shape), view(target, shape)
    assert isinstance(a, View) and isinstance(b, View)
    needs = [f"no weight is {_some(a.steps - b.steps)} times its scale"] if a.steps - b.steps else []
    if b.quads and a.quads != b.quads:
        needs.append("every quad has exactly one zero")
    if a.whole and b.whole and a.whole != b.whole:
        needs.append("the scale of the tensor has an exact reciprocal")
    if not _all_scales(a, b):
        needs.append(f"every scale is a {b.kind}")
    chunk = 4 * target.grid["stride"] if b.perm else 1  # columns change places within it
    if any(mine % theirs for mine, theirs in zip(a.share, b.share, strict=True)) or a.share[1] % chunk:
        needs.append(f"the {_group(b.share)} that share a scale there do so here")
    if a.divides != b.divides:
        needs.append("every scale is a power of two, as one divides and one multiplies")
    if b.ratio and a.ratio != b.ratio:
        needs.append(f"each plane's scale is {b.ratio} times the next one's")
    return " and ".join(needs)


def _all_scales(a: View, b: View) -> bool:
    """Whether every scale that one layout can have is one that the other can have."""
    if (a.ratio and not b.ratio) or bool(a.whole) != bool(b.whole):
        return False
    if (a.dtype, a.scales, a.exponent, a.unit) == (b.dtype, b.scales, b.exponent, b.unit):
        return True
    mine = _known(a)
    if not mine.size:
        return b.dtype == "<f4" and not b.scales and a.unit == b.unit
    return not _stored(mine * (a.unit / b.unit), b)[1].any()


def _known(of: View) -> Doubles:
    """All numbers that scales of so few bits can be; none if they are many."""
    if of.scales == POWERS:
        powers: Doubles = np.ldexp(1.0, np.arange(256) - of.exponent)
        return powers
    if of.scales:
        return minifloat.numbers(of.scales).astype(F64)
    if (dtype := dtype_of(of.dtype)).itemsize > 1:
        return np.zeros(0)
    return np.arange(256, dtype=np.uint8).view(dtype).astype(F64)


def held(source: Layout, target: Layout, shape: Shape) -> int:
    """Bytes that `respell` holds at once, beside the components of both, where it does not refuse (`why_not`)."""
    if _experts_differ(source, target, shape):
        return 8 * shape[0]
    a, b = view(source, shape), view(target, shape)
    assert isinstance(a, View) and isinstance(b, View)
    weights = shape[0] * shape[1] * max(a.planes, b.planes)
    crossed = not _finer(a, b, shape) and not _finer(b, a, shape)
    return weights * (HELD_PERMUTED if crossed or a.perm != b.perm else HELD)


def respell(
    source: Layout, target: Layout, shape: Shape, components: Arrays, rounded_reciprocal: bool = False
) -> dict[str, Array]:
    """Components of one layout -> components of another that decode to the same numbers.

    Where the weights of a scale are all zero, the scale may become another; it stays what it is where the
    target keeps one for the same weights. Where the scale is zero, the steps may become zero. A zero may lose
    its sign. A scale that is not finite stays, or is refused.

    rounded_reciprocal : let the scale of a whole tensor that multiplies here and divides there, or the other
        way round, become its reciprocal in float32, if that is not exact: numbers then differ in their last bits

    Raises
    ------
    LayoutError
        If the layouts can have no number in common (`why_not`), or a number of this tensor does not fit.
    """
    if reason := why_not(source, target, shape):
        raise LayoutError(f"{source.name} to {target.name}: {reason}")
    if _experts_differ(source, target, shape):
        return _with_experts(source, target, shape, components)
    a, b = view(source, shape), view(target, shape)
    assert isinstance(a, View) and isinstance(b, View)
    try:
        parts = unpack(source, shape, components, CODES)
        if not shape[0] or not shape[1]:
            return _empty(target, b, shape, parts)
        if (others := _beside_codes(source, target, shape, parts, rounded_reciprocal)) is not None:
            return repack(source, target, shape, components, others)
        scale, whole = _scales(source, a, b, parts, rounded_reciprocal)
        parts = unpack(source, shape, components)
        steps = _steps(source, parts)
        perm = parts["perm"].reshape(-1) if a.perm else None
        if perm is not None and not np.array_equal(np.sort(perm), np.arange(shape[1])):
            raise _Misfit(f"perm does not name each of {shape[1]} columns once")
        moved = _reorder(steps, scale, a, target, b, perm)
        written = _write(target, a, b, shape, *moved, parts)
        return pack(target, shape, written | _whole_part(target, shape, whole))
    except _Misfit as error:
        raise LayoutError(f"{source.name} to {target.name}: {error}") from None
    except WRONG as error:  # a description from a file may say anything
        raise LayoutError(f"{source.name} to {target.name}: {error}") from error


def _experts_differ(source: Layout, target: Layout, shape: Shape) -> bool:
    """Whether layouts differ in nothing but how many rows share a global scale, and where things lie."""
    if source.grid != target.grid or source.hadamard != target.hadamard:
        return False
    here, there = (layout.fit(*shape).parts.get(WHOLE) for layout in (source, target))
    same = here is not None and there is not None and here.dtype == there.dtype
    return same and not difference(source, target, shape, frozenset({WHOLE}))


def _with_experts(source: Layout, target: Layout, shape: Shape, components: Arrays) -> dict[str, Array]:
    """The same numbers, the global scales shared by other rows."""
    here, there = (layout.fit(*shape).parts for layout in (source, target))
    whole = unpack(source, shape, components, frozenset(here.keys() - {WHOLE}))[WHOLE]
    each = whole[np.arange(shape[0]) // max(1, here[WHOLE].share[0])]
    share = max(1, there[WHOLE].share[0])
    given = each[::share] if shape[0] else np.zeros(there[WHOLE].shape, each.dtype)
    if given[np.arange(shape[0]) // share].tobytes() != each.tobytes():
        raise LayoutError(f"{source.name} to {target.name}: {_group((share, shape[1]))} have several global scales")
    return repack(source, target, shape, components, {WHOLE: given})


def _empty(target: Layout, b: View, shape: Shape, parts: Arrays) -> dict[str, Array]:
    out = {c.name: np.zeros(c.shape, dtype_of(c.dtype)) for c in target.fit(*shape).components}
    if b.whole:
        number = parts["global_scale"] if "global_scale" in parts else np.ones(1, F32)
        again = {name: np.zeros(p.shape, dtype_of(p.dtype)) for name, p in target.fit(*shape).parts.items()}
        return pack(target, shape, again | _whole_part(target, shape, F32(number.reshape(-1)[0])))
    return out


def _beside_codes(
    source: Layout, target: Layout, shape: Shape, parts: Arrays, rounded_reciprocal: bool
) -> dict[str, Array] | None:
    """The target's parts but for its codes, if these stay as they are and no scale needs a look at its weights."""
    a, b = view(source, shape), view(target, shape)
    assert isinstance(a, View) and isinstance(b, View)
    if a.table != b.table or not a.table or not _finer(a, b, shape) or a.divides != b.divides:
        return None
    if difference(source, target, shape, SCALES):
        return None
    found = parts["scale"].reshape(parts["scale"].shape[:2])
    # scales of a byte are few: what becomes of each is found once, unless it depends on all of them
    few = found.dtype.itemsize == 1 and bool(a.whole) == bool(b.whole)
    each = np.arange(256, dtype=np.uint8).view(found.dtype)[None] if few else found
    scale, whole = _scales(source, a, b, {**parts, "scale": each}, rounded_reciprocal)
    stored, lost = (array[:, 0] for array in _stored(scale, b))
    if few:
        stored, lost = (array[0, found.view(np.uint8)] for array in (stored, lost))
    if lost.any():
        if not a.steps:
            at = _first(lost)
            number = scale[0, 0, found.view(np.uint8)[at]] if few else scale[at[0], 0, at[1]]
            raise _Misfit(f"scale {list(at)} is {number:.9g}, which is no {b.kind}")
        return None
    if a.share != b.share:
        down, across = (
            np.arange(0, n, theirs) // mine for n, mine, theirs in zip(shape, a.share, b.share, strict=True)
        )
        stored = stored[down][:, across]
    return {"scale": stored.reshape(target.fit(*shape).parts["scale"].shape), **_whole_part(target, shape, whole)}


def _whole_part(target: Layout, shape: Shape, whole: np.float32 | None) -> dict[str, Array]:
    if whole is None:
        return {}
    part = target.fit(*shape).parts["global_scale"]
    return {"global_scale": np.full(part.shape, whole, dtype_of(part.dtype))}


class _Misfit(Exception):
    """A number that the target cannot hold; the message says which."""


def _steps(source: Layout, parts: Arrays) -> Steps:
    """(rows, planes, cols) steps."""
    params = dict(source.grid.params)
    params.pop("ratio", 0)
    return SPELLINGS[source.grid.name].read(parts["codes"], **params)


def _scales(
    source: Layout, a: View, b: View, parts: Arrays, rounded_reciprocal: bool
) -> tuple[Doubles, np.float32 | None]:
    """What multiplies the target's steps, or divides if it does so: (rows, planes, groups), and its global scale."""
    whole: np.float32 | None = None
    scale = _numbers(source.grid, a, parts, folded=not b.whole)
    if a.divides != b.divides:
        scale = _inverse(scale)
    scale = scale * (a.unit / b.unit)
    if a.whole and b.whole:
        whole = F32(parts["global_scale"].reshape(-1)[0])
        if a.whole != b.whole:
            if whole == (0 if a.whole == "times" else np.inf):  # all weights are zero, and so can all scales be
                return np.where(np.isfinite(scale), 0, np.nan), F32(1)
            whole = _reciprocal(whole, rounded_reciprocal)
        if a.unit != b.unit:
            _check_normal(scale * (F64(whole) if b.whole == "times" else 1 / F64(whole)))
    if b.whole and not a.whole:
        power = _power_for(scale, _known(b))
        with np.errstate(over="ignore"):
            if (scale.astype(F32) != scale)[np.isfinite(scale)].any():
                raise _Misfit("a scale is too small or too large for float32")
        scale, whole = scale / power, F32(power if b.whole == "times" else 1 / power)
    return scale, whole


def _check_normal(products: Doubles) -> None:
    """Refuse scales whose product with that of the tensor is subnormal or infinite: it would round otherwise."""
    size = np.abs(products[np.isfinite(products) & (products != 0)])
    if size.size and not (np.finfo(F32).tiny <= size.min() and size.max() <= 2.0**126):
        raise _Misfit("a scale times that of the tensor is too small or too large to be sure of its rounding")


def _numbers(grid: Grid, a: View, parts: Arrays, folded: bool) -> Doubles:
    """(rows, planes, groups): scales as the grid counts them, with that of the whole tensor if `folded`."""
    with np.errstate(all="ignore"):  # of signalling NaN, and of descriptions that say anything
        if grid.name == "table":
            powers: Doubles = np.ldexp(1.0, parts["scale"].astype(np.int64) - grid["exponent"])
            return powers[:, None]
        if grid.name == "scaled":
            return scale_numbers(parts, a.scales, a.whole if folded else "").astype(F64)[:, None]
        return scales(parts["scale"], a.planes, SPELLINGS[grid.name], a.ratio).astype(F64)


def _reciprocal(whole: np.float32, rounded: bool) -> np.float32:
    with np.errstate(all="ignore"):
        out = F32(1) / whole
    exact = abs(float(np.frexp(np.abs(whole))[0])) == 0.5 and np.isfinite(out) and np.isfinite(whole)
    if not exact and not (rounded and np.isfinite(out) and out != 0):
        raise _Misfit(f"the scale of the tensor is {whole:.9g}, which has no exact reciprocal")
    return out


def _power_for(scale: Doubles, known: Doubles) -> float:
    """The smallest power of two that, taken out of scales, leaves none above the largest there can be."""
    top = float(np.abs(scale[np.isfinite(scale)]).max(initial=0))
    most = float(np.nanmax(known[np.isfinite(known)], initial=1))
    if not top:
        return 1.0
    power = np.ldexp(1.0, int(np.floor(np.log2(top) - np.log2(most))))
    while top / power > most:
        power *= 2
    if not np.finfo(F32).tiny <= power <= 2.0**126:
        raise _Misfit(f"a scale is {top:.9g}, for which there is no scale of the tensor")
    return float(power)


def _stored(scale: Doubles, b: View) -> tuple[Array, Array]:
    """Scales in the target's form, and which of them it has not got."""
    if b.scales:
        numbers = _known(b)
        code = np.lexsort((np.arange(numbers.size), numbers))  # of equal numbers the lowest code first, NaN last
        place = np.minimum(np.searchsorted(numbers[code], scale), numbers.size - 1)
        out = code[place].astype(dtype_of(b.dtype))
        return out, (numbers[out] != scale) & ~(np.isnan(numbers[out]) & np.isnan(scale))
    with np.errstate(over="ignore", invalid="ignore"):
        stored: Array = scale.astype(F32).astype(dtype_of(b.dtype))
        return stored, (stored.astype(F64) != scale) & ~(np.isnan(scale) & np.isnan(stored.astype(F32)))


def _inverse(scale: Doubles) -> Doubles:
    with np.errstate(all="ignore"):
        odd = (np.frexp(np.abs(scale))[0] != 0.5) | ~np.isfinite(F32(1) / scale.astype(F32))
    if odd.any():
        at = _first(odd)
        how = "no power of two, and one divides by it where the other multiplies"
        raise _Misfit(f"scale {[at[0], at[2]]} is {scale[at]:.9g}, {how}")
    inverse: Doubles = np.divide(1, scale)
    return inverse


def _first(mask: Array) -> tuple[int, ...]:
    """Where the first true element is."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def _reorder(
    steps: Steps, scale: Doubles, a: View, target: Layout, b: View, perm: Array | None
) -> tuple[Steps, Doubles, tuple[int, int]]:
    """Columns in the order that the target stores, and what shares a scale then."""
    if a.perm == b.perm:
        return steps, scale, a.share
    spread = np.repeat(scale, a.share[1], 2)[:, :, : steps.shape[2]]
    order = np.argsort(perm) if perm is not None else contiguous_quads(steps.shape[2], target.grid["stride"])
    return steps[:, :, order], spread[:, :, order], (a.share[0], 1)


def _write(
    target: Layout, a: View, b: View, shape: Shape, steps: Steps, scale: Doubles, share: tuple[int, int], parts: Arrays
) -> dict[str, Array]:
    """The target's parts, less the scale of the whole tensor."""
    fitted, spelling, params = target.fit(*shape).parts, SPELLINGS[target.grid.name], dict(target.grid.params)
    params.pop("ratio", 0)
    if missing := b.planes - steps.shape[1]:
        # the last of tied planes counts the scale itself, so those that are added come first
        added = (missing, 0) if b.ratio else (0, missing)
        steps, scale = (np.pad(x, ((0, 0), added, (0, 0))) for x in (steps, scale))
    cells = _Cells(steps, scale, share, b.share)
    wanted = cells.regrouped(clear=b.quads > 0)
    before, steps = steps, cells.without_strays(steps, wanted if b.ratio else _landed(wanted, b, cells.used_there))
    for value in _outside(steps, b.steps):
        count = int((steps == value).sum())
        raise _Misfit(f"{count} of {steps.size} weights are {value} times their scale, for which there is no code")
    used: Array = cells.used_there
    if b.ratio:
        wanted, used = _untied(wanted, cells, b), np.logical_or.reduce(used, 1, keepdims=True)
    stored = _cast(wanted, b, used)
    if a.table == b.table != () and steps is before and a.perm == b.perm:
        codes, bad = parts["codes"], None  # two codes may mean zero, and each stays what it is
    else:
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
        perm = parts.get("perm", contiguous_quads(shape[1], params["stride"]))
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

    def __init__(self, steps: Steps, scale: Doubles, here: tuple[int, int], there: tuple[int, int]) -> None:
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

    def regrouped(self, clear: bool) -> Doubles:
        """The target's scales: those of the first weights that are not zero; `clear` makes others 0."""
        out = np.zeros(self.shape, F64)
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
        apart |= ~self.used & ~np.isfinite(there)  # what is zero would not stay so
        if apart.any():
            at = _first(apart)
            mine = [int(self.rows[at[0]] // self.here[0]), int(self.cols[at[2]] // self.here[1])]
            other = float(there[at])
            raise _Misfit(
                f"scale {mine} is {float(self.scales[at]):.9g}, that of weights before it {other:.9g}, "
                f"and {_group(self.there)} share one there"
            )
        return out

    def without_strays(self, steps: Steps, wanted: Doubles) -> Steps:
        """The steps, with zeros where a scale of zero would become another: of a group whose others are not zero."""
        stray = self.some & ~self.used & (wanted[self.place] != 0)
        if not stray.any():
            return steps
        rows, cols = (np.diff(cuts, append=n) for cuts, n in zip((self.rows, self.cols), steps.shape[::2], strict=True))
        return np.where(np.repeat(np.repeat(stray, rows, 0), cols, 2), steps.dtype.type(0), steps)


def _untied(wanted: Doubles, cells: _Cells, b: View) -> Doubles:
    """One scale for all planes, from the first plane that has weights."""
    count = wanted.shape[1]
    weights = F32(b.ratio) ** np.arange(count - 1, -1, -1).astype(F32)
    first = np.argmax(cells.used_there, 1)[:, None]
    base: Doubles = np.take_along_axis(wanted, first, 1).astype(F32) / weights[first]
    apart = cells.used_there & (base * weights[None, :, None] != wanted)
    if apart.any():
        row, _, group = _first(apart)
        found = ", ".join(f"{s:.9g}" for s in wanted[row, :, group])
        raise _Misfit(f"the planes' scales {[row, group]} are {found}, not each {b.ratio} times the next")
    return base


def _landed(wanted: Doubles, b: View, used: Array) -> Doubles:
    """The scales that `_cast` makes of these."""
    known = _known(b)  # floats of two bytes or more begin with zero
    first = known[0] if known.size else 0
    return np.where(_stored(wanted, b)[1] & ~used, first, wanted)


def _cast(scale: Doubles, b: View, used: Array) -> Array:
    """Scales in the target's form; those that no number needs become its first where it has not got them."""
    out, lost = _stored(scale, b)
    out.view(np.uint8).reshape(*out.shape, -1)[lost & ~used] = 0
    if (lost & used).any():
        at = _first(lost & used)
        raise _Misfit(f"scale {[at[0], at[2]]} is {scale[at]:.9g}, which is no {b.kind}")
    return out


def _group(share: tuple[int, int]) -> str:
    rows, cols = share
    return f"{cols} columns" if rows == 1 else f"{rows} rows and {cols} columns"
