"""Every decision, before the first weight is read.

`make_plan` looks at names, shapes and dtypes only. All refusals happen here, together: what cannot be
packed, and what the container cannot hold. A plan can be printed, saved as JSON, edited and replayed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from packfmt.codec import (
    Codec,
    dense_dtype,
    encoding_bytes,
    exact_if,
    is_float,
    matrix,
    only_inverts,
    only_places,
    respelled_bytes,
    same_numbers,
    why_inexact,
)
from packfmt.errors import LayoutError, PlanError
from packfmt.layout import DENSE, Layout, dtype_of

VERSION = 1
KEEP: Final = "keep"  # as a layout in a rule: leave the tensor as it is
RESCALE: Final = "rescale"  # as an action
DENSE_AGAIN: Final = "dense"  # as the layout of a recipe: decode whatever is packed
MAX_SHARD = 5_000_000_000  # bytes of tensors a file of a safetensors folder, as Hugging Face cuts them
WEIGHTS: Final = "linear layer or embedding"  # the reason of a step that packs what is packed by default
SMALL = 4096  # weights; a tensor below this stays as it is unless a rule says otherwise
# A small linear layer that picks experts: rounding it changes which expert runs, and saves nothing.
ROUTER = re.compile(r"(^|\.)(router|gate|ffn_gate_inp)\.weight$")
EXPERTS = re.compile(r"expert|_exps\b|moe", re.IGNORECASE)
# What is no weight without a scale, and what such scales are called: the tensor and an end, or beside it in a module.
CODES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "uint8", "int8", "int32")
SCALE_ENDS = ("_scale", "_scale_inv", "_scales", ".absmax")
SCALE_NAMES = ("weight_scale", "weight_scale_inv", "scale", "scales", "SCB")
RESTORED = ("f64", "f32", "f16", "bf16")  # the dense layouts that decoding gives; others become f32


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a source's header says of a tensor."""

    name: str
    shape: tuple[int, ...]  # logical, rows first
    dtype: str  # logical
    layout: Layout | None  # None: stored in a type that no installed layout describes
    kind: str  # what the container calls its type
    file: Path
    nbytes: int  # stored
    why: str = ""  # why no layout describes it, and what would help


class Holder(Protocol):
    """What a plan asks of a container: why it cannot hold a tensor, a name, or all together; empty if it can.

    And why a dense weight stays dense there unless a rule says otherwise.
    """

    NAME: str

    def refusal(self, layout: Layout, shape: tuple[int, ...]) -> str: ...
    def name_refusal(self, name: str) -> str: ...
    def leaves(self, name: str, shape: tuple[int, ...]) -> str: ...
    def plan_refusal(self, steps: tuple[Step, ...]) -> str: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor's way: what is read, what becomes of it, what it is called after.

    `action` is keep (same bytes), repack (same numbers in other bytes, or refused), rescale (the same, but the
    scale of the whole tensor becomes its reciprocal, rounded if need be), cast (another float dtype), quantise,
    requantise (decoded first: lossy twice) or decode (to a dense dtype). `lossless` refuses a step that
    changes a number.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # logical dtype of the result: what the weight was before packing
    before: Layout
    layout: Layout
    action: str
    reason: str  # the rule that chose the layout
    encoder: str = ""
    file: str = ""  # of a container of several files
    lossless: bool = False

    @property
    def exact(self) -> bool:
        """Whether no number changes."""
        if self.lossless:
            return True
        if self.action == "decode":
            return self.layout.name in ("f32", "f64")
        if self.action == "cast":
            before, after = (dtype_of(c.components[0].dtype) for c in (self.before.fit(1, 1), self.layout.fit(1, 1)))
            return bool(np.can_cast(before, after, "safe"))
        return self.action in (KEEP, "repack")

    @property
    def nbytes(self) -> int:
        """Bytes of the result, without streams."""
        return self.layout.nbytes(*matrix(self.shape))

    @property
    def working_set(self) -> int:
        """Bytes held at once: what is read, its float32 form where there is one, codes, and the result."""
        floats = (
            0 if self.action in (KEEP, "repack", RESCALE) else encoding_bytes(self.layout, self.shape, self.lossless)
        )
        if self.action in ("repack", RESCALE) and not only_places(self.before, self.layout, self.shape):
            floats = respelled_bytes(self.before, self.layout, self.shape)
        return self.before.nbytes(*matrix(self.shape)) + floats + self.nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do. Printable, comparable, and made without reading weights."""

    source: str
    container: str
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.steps)

    @property
    def working_set(self) -> int:
        """Bytes of the largest step; a conversion holds one tensor and its result at a time."""
        return max((s.working_set for s in self.steps), default=0)

    def to_json(self) -> dict[str, Any]:
        steps = [
            {
                "name": s.name,
                "shape": list(s.shape),
                "dtype": s.dtype,
                "from": s.before.name,
                "to": s.layout.name,
                "id": s.layout.id,
                "action": s.action,
                "exact": s.exact,
                "lossless": s.lossless,
                "encoder": s.encoder,
                "reason": s.reason,
                "nbytes": s.nbytes,
                "file": s.file,
            }
            for s in self.steps
        ]
        sizes = {"nbytes": self.nbytes, "working_set": self.working_set}
        return {"version": VERSION, "source": self.source, "container": self.container, **sizes, "steps": steps}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user wants: a layout for the weights, and rules for those that want another.

    `to` "keep" changes only the container. `overrides` are (regular expression, layout or "keep"), searched
    in the tensor's name; later rules win. `fallback` is what tensors get whose columns do not fill the
    chosen layout's blocks. `lossless` refuses whatever changes a number.
    """

    to: str
    overrides: tuple[tuple[str, str], ...] = ()
    fallback: str = ""
    encoder: str = ""
    max_shard: int = MAX_SHARD
    lossless: bool = False


def make_plan(
    source: str,
    index: Mapping[str, TensorInfo],
    recipe: Recipe,
    container: Holder,
    codecs: Callable[[str], Codec],
) -> Plan:
    """Decide what becomes of every tensor.

    Raises
    ------
    PlanError
        With a line a reason: which tensors cannot be packed or held, and what would help. Also when a
        rule matches nothing, or nothing at all would be packed.
    """
    rules = [_rule(pattern, to) for pattern, to in recipe.overrides]
    shelf = _shelf(recipe, codecs)
    if recipe.encoder and recipe.to in shelf and recipe.encoder not in shelf[recipe.to].encoders:
        have = ", ".join(shelf[recipe.to].encoders)
        raise PlanError(f"{recipe.to} has no encoder {recipe.encoder!r}; there are {have}")
    steps: list[Step] = []
    refused: dict[str, list[str]] = {}  # reason -> tensors
    for info in index.values():
        try:
            steps.append(_step(info, recipe, rules, shelf, index, container))
        except (PlanError, LayoutError) as error:
            refused.setdefault(str(error), []).append(info.name)
    lines = [f"{_some(names)}: {reason}" for reason, names in refused.items()]
    for pattern, to in rules:
        matched = [info for info in index.values() if pattern.search(info.name)]
        if not any(_may_become(info, to) for info in matched):
            what = "only tensors that are no floats" if matched else "no tensor"
            lines.append(f"--map '{pattern.pattern}={to}' matches {what}")
    if lines:
        raise PlanError("\n".join(lines))
    if recipe.to in shelf and not any(s.layout == codec.layout for s in steps for codec in shelf.values()):
        raise PlanError(f"nothing here would become {recipe.to}: {_census(steps)}")
    if why_not := container.plan_refusal(tuple(steps)):
        raise PlanError(why_not)
    return Plan(source, container.NAME, _shards(tuple(steps), recipe.max_shard, container.NAME))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _census(steps: list[Step]) -> str:
    reasons = [s.reason for s in steps]
    counts = ((reasons.count(r), r) for r in dict.fromkeys(reasons))
    return (
        ", ".join(f"{n} tensors stay ({r})" if n > 1 else f"1 stays ({r})" for n, r in counts) or "there are no tensors"
    )


def _shelf(recipe: Recipe, codecs: Callable[[str], Codec]) -> dict[str, Codec]:
    """The layouts that a recipe names.

    Raises
    ------
    PlanError
        If there is no such layout; which rule names it is said.
    """
    asked = {f"--map '{pattern}={to}': ": to for pattern, to in recipe.overrides}
    found: dict[str, Codec] = {}
    for where, name in {"": recipe.to, "--fallback: ": recipe.fallback, **asked}.items():
        if name in (KEEP, DENSE_AGAIN, "", *found):
            continue
        try:
            found[name] = codecs(name)
        except PlanError as error:
            if get_close_matches(name.lower(), [KEEP]):
                raise PlanError(f"{where}no format is called {name!r}; did you mean {KEEP}?") from error
            raise PlanError(f"{where}{error}") from error
    return found


def _rule(pattern: str, to: str) -> tuple[re.Pattern[str], str]:
    try:
        return re.compile(pattern), to
    except re.error as error:
        raise PlanError(f"--map {pattern!r}: not a regular expression: {error}") from error


def _step(
    info: TensorInfo,
    recipe: Recipe,
    rules: list[tuple[re.Pattern[str], str]],
    shelf: Mapping[str, Codec],
    index: Mapping[str, TensorInfo],
    container: Holder,
) -> Step:
    if info.layout is None:
        why = info.why or "which no layout of packfmt describes; convert it with the tool that made it"
        raise PlanError(f"stored as {info.kind}, {why}")
    target, reason = _choose(info, recipe, rules, shelf, container)
    asked_to_keep = target == KEEP and reason.startswith("--")  # which needs no number
    if not asked_to_keep and (why_not := _scaled_elsewhere(info, index)):
        raise PlanError(why_not)
    if target not in (KEEP, DENSE_AGAIN) and (misfit := _misfit(shelf[target], info.shape)):
        have, noun, need = misfit
        if not recipe.fallback:
            raise PlanError(f"{have} {noun}, {target} needs {need}; choose with --fallback LAYOUT or --map")
        other = None if recipe.fallback in (KEEP, DENSE_AGAIN) else _misfit(shelf[recipe.fallback], info.shape)
        if other:
            neither = f"{have} {noun}, {target} needs {need}; {other[0]} {other[1]}, {recipe.fallback} {other[2]}"
            raise PlanError(f"{neither}; choose another --fallback, such as keep, or --map")
        target, reason = recipe.fallback, f"--fallback, as {have} {noun} do not fill {target}"
    layout = _layout(info, target, shelf)
    layout.fit(*matrix(info.shape))  # the fallback may not fit either
    _check_readable(layout)
    rounded = target in shelf and recipe.encoder in shelf[target].encoders
    action = _action(info, layout, rounded)
    if action == "requantise":
        reason += f"; not exact: {_inexact(info, layout)}"
    elif action == RESCALE:
        reason += "; codes and block scales stay, the tensor's scale becomes its reciprocal"
    elif action == "repack" and (condition := exact_if(info.layout, layout, info.shape)):
        reason += f"; refused unless {condition}"
    if why_not := container.refusal(layout, info.shape) or container.name_refusal(info.name):
        raise PlanError(why_not)
    encoder = ""
    if action in ("quantise", "requantise", "cast") and target in shelf:
        encoders = shelf[target].encoders
        encoder = recipe.encoder if recipe.encoder in encoders else next(iter(encoders))
    dtype, lossless = dense_dtype(layout) or info.dtype, recipe.lossless and action not in (KEEP, "repack")
    return Step(info.name, info.shape, dtype, info.layout, layout, action, reason, encoder, "", lossless)


@lru_cache(maxsize=1024)
def _check_readable(layout: Layout) -> None:
    """Refuse to write what a reader could not take back."""
    Layout.from_json(layout.to_json())


def _scaled_elsewhere(info: TensorInfo, index: Mapping[str, TensorInfo]) -> str:
    """Why a tensor of codes, which no reader took for part of a weight, is one: a scale beside it; empty if none is."""
    if info.layout is None or dense_dtype(info.layout) not in CODES:
        return ""
    module = info.name.rpartition(".")[0] + "."
    names = [info.name + end for end in SCALE_ENDS] + [info.name.removesuffix("_blocks") + "_scales"]
    names += [module + last for last in SCALE_NAMES]
    scale = next((name for name in names if name in index and name != info.name), "")
    if not scale:
        return ""
    if info.dtype == "uint8" and scale == info.name + "_scale":
        way = "if these are Hugging Face's BitNet weights, say --read-as U8=bitnet"
    else:
        way = "convert the model it was made from, or copy its bytes with --map REGEX=keep"
    beside = scale.removeprefix(module)
    return f"has a {beside} beside it; its numbers alone are no weight, and nothing here says more; {way}"


def _layout(info: TensorInfo, target: str, shelf: Mapping[str, Codec]) -> Layout:
    assert info.layout is not None
    if target == KEEP:
        return info.layout
    if target == DENSE_AGAIN:
        return next((DENSE[n] for n in RESTORED if dense_dtype(DENSE[n]) == info.dtype), DENSE["f32"])
    return shelf[target].layout


def _action(info: TensorInfo, layout: Layout, rounded: bool = False) -> str:
    """What must be done.

    Where only the numbers can tell if they fit, codes that mean the same numbers are moved exactly or refused,
    and so are ternary weights, unless an encoder was asked for (`rounded`); others would hardly ever fit, and
    are rounded.
    """
    assert info.layout is not None
    was_dense, is_dense = dense_dtype(info.layout), dense_dtype(layout)
    if info.layout == layout:
        return KEEP
    if was_dense:
        return "cast" if is_dense else "quantise"
    if is_dense:
        return "decode"
    if why_inexact(info.layout, layout, info.shape):
        return "requantise"
    if exact_if(info.layout, layout, info.shape):
        if rounded or not same_numbers(info.layout, layout, info.shape):
            return "requantise"
        if only_inverts(info.layout, layout, info.shape):
            return RESCALE
    return "repack"


def _inexact(info: TensorInfo, layout: Layout) -> str:
    assert info.layout is not None
    why = why_inexact(info.layout, layout, info.shape)
    return why or f"only so if {exact_if(info.layout, layout, info.shape)}"


def _choose(
    info: TensorInfo,
    recipe: Recipe,
    rules: list[tuple[re.Pattern[str], str]],
    shelf: Mapping[str, Codec],
    container: Holder,
) -> tuple[str, str]:
    """The target and the rule that chose it."""
    assert info.layout is not None
    dtype = dense_dtype(info.layout)
    for pattern, to in reversed(rules):
        if pattern.search(info.name) and _may_become(info, to):
            return to, f"--map '{pattern.pattern}={to}'"
    if recipe.to == DENSE_AGAIN:
        return (KEEP, "dense") if dtype else (DENSE_AGAIN, "packed")
    if recipe.to == KEEP:
        return KEEP, "--to keep"
    if dtype and (why := stays(info.name, info.shape, dtype) or container.leaves(info.name, info.shape)):
        return KEEP, why
    other = not dtype and recipe.to in shelf and info.layout != shelf[recipe.to].layout
    if other and (why := container.leaves(info.name, info.shape)):
        return DENSE_AGAIN, why
    return recipe.to, WEIGHTS if dtype else "packed"


def _may_become(info: TensorInfo, to: str) -> bool:
    """Whether a rule may give this tensor this layout: whole numbers, such as positions, stay what they are."""
    dtype = dense_dtype(info.layout) if info.layout else ""
    return to == KEEP or not dtype or is_float(dtype)


def stays(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Why a dense tensor stays as it is unless a rule says otherwise; empty if it is to be packed.

    Packed are the matrices of linear layers and embeddings, and stacks of them in experts.
    """
    if not is_float(dtype):
        return f"{dtype}, not a float"
    if len(shape) < 2:
        return f"{len(shape)}-D: norm, bias or scalar"
    if len(shape) == 3 and not EXPERTS.search(name):
        return "3-D, and its name says nothing of experts"
    if len(shape) > 3:
        return f"{len(shape)}-D: convolution"
    if name.endswith("bias"):
        return "bias"
    if prod(shape) < SMALL:
        return f"small: {prod(shape)} weights"
    if ROUTER.search(name):
        return "router: picks experts"
    return ""


def _misfit(codec: Codec, shape: tuple[int, ...]) -> tuple[int, str, str] | None:
    """How many rows or columns a tensor has, which of both, and what they need be, in words; None if all fits."""
    rows, cols = matrix(shape)
    for have, noun, need in (cols, "columns", codec.layout.block["cols"]), (rows, "rows", codec.layout.block["rows"]):
        if have % need:
            return have, noun, f"a multiple of {need}"
    return (cols, "columns", f"{codec.least_cols} or more") if cols < codec.least_cols else None


def _shards(steps: tuple[Step, ...], most: int, container: str) -> tuple[Step, ...]:
    """Cut the steps into files of at most `most` bytes, in order; a larger tensor has a file of its own."""
    if container == "gguf" or sum(s.nbytes for s in steps) <= most:
        return steps
    number, room, numbers = 1, most, []
    for s in steps:
        if s.nbytes > room and room < most:
            number, room = number + 1, most
        room -= s.nbytes
        numbers.append(number)
    names = [f"model-{n:05}-of-{number:05}.safetensors" for n in numbers]
    return tuple(replace(s, file=name) for s, name in zip(steps, names, strict=True))


# ---------------------------------------------------------------- a saved plan


def from_json(data: Any, index: Mapping[str, TensorInfo], container: Holder, codecs: Callable[[str], Codec]) -> Plan:
    """A saved, perhaps edited plan, checked against the source as it is now.

    Raises
    ------
    PlanError
        If a step names no tensor of the source or no known layout, if the tensor's shape or layout is
        not what the plan says, or a layout's name has come to mean other bytes.
    """
    if not isinstance(data, dict) or not isinstance(data.get("steps"), list):
        raise PlanError("not a saved plan: has no list of steps; packfmt plan SRC --to LAYOUT --json writes one")
    try:
        if data["version"] != VERSION:
            raise PlanError(f"a plan of version {data['version']!r}, this packfmt replays {VERSION}")
        if data["container"] != container.NAME:
            raise PlanError(f"the plan is for {data['container']}, the destination is {container.NAME}")
        steps = tuple(_replayed(s, index, container, codecs) for s in data["steps"])
        _check_files(steps, container.NAME)
        missing = sorted(index.keys() - {s.name for s in steps})
        if missing or len({s.name for s in steps}) != len(steps):
            raise PlanError(f"the plan must name every tensor once; {missing[0] if missing else 'one'} is not")
        if why_not := container.plan_refusal(steps):
            raise PlanError(why_not)
        return Plan(str(data["source"]), container.NAME, steps)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "a step is not as packfmt plan --json has it"
        raise PlanError(f"not a saved plan: {what}") from error


def _check_files(steps: tuple[Step, ...], container: str) -> None:
    """A plan's files are plain names, and one is finished before the next begins."""
    done: list[str] = []
    for s in steps:
        named = re.fullmatch(r"[\w.-]+\.safetensors", s.file) and not s.file.startswith(".")
        if s.file and not (named and container != "gguf"):
            raise PlanError(f"{s.name}: in the file {s.file!r}, needs a plain name that ends in .safetensors")
        if s.file in done[:-1]:
            raise PlanError(
                f"{s.name}: in the file {s.file!r}, which other files follow already; order the steps by file"
            )
        if s.file not in done:
            done.append(s.file)
    if "" in done and len(done) > 1:
        raise PlanError("some steps name a file and some do not")


def _replayed(s: Any, index: Mapping[str, TensorInfo], container: Holder, codecs: Callable[[str], Codec]) -> Step:
    name = s["name"]
    if name not in index:
        raise PlanError(f"the plan names {name!r}, which is not in the source")
    info = index[name]
    if info.layout is None or list(info.shape) != s["shape"] or info.layout.name != s["from"]:
        raise PlanError(f"{name}: the source has {info.kind} {list(info.shape)}, the plan {s['from']} {s['shape']}")
    if s["to"] == info.layout.name:
        layout = info.layout
    elif s["to"] in DENSE:
        layout = DENSE[s["to"]]
    else:
        layout = codecs(s["to"]).layout
    if s.get("id") not in (None, layout.id):
        raise PlanError(f"{name}: the plan's {s['to']} has id {s['id'][:16]}, here it is {layout.id[:16]}")
    if not _may_become(info, s["to"]) and layout != info.layout:
        raise PlanError(f"{name}: is {info.dtype}, which {s['to']} does not hold")
    try:
        layout.fit(*matrix(info.shape))
    except LayoutError as error:
        raise PlanError(f"{name}: {error}") from error
    if why_not := container.refusal(layout, info.shape) or container.name_refusal(name):
        raise PlanError(f"{name}: {why_not}")
    action, encoder = _action(info, layout, bool(s.get("encoder"))), ""
    if action in ("quantise", "requantise", "cast"):
        encoders = codecs(s["to"]).encoders
        encoder = s.get("encoder") or next(iter(encoders))
        if encoder not in encoders:
            raise PlanError(f"{name}: {s['to']} has no encoder {encoder!r}; there are {', '.join(encoders)}")
    dtype, reason = dense_dtype(layout) or info.dtype, str(s.get("reason", ""))
    file, lossless = str(s.get("file", "")), s.get("lossless") is True and action not in (KEEP, "repack")
    return Step(name, info.shape, dtype, info.layout, layout, action, reason, encoder, file, lossless)
