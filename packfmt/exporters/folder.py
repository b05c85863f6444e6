"""Folders of other ecosystems: safetensors files and a config.json that says how packed weights are stored in them.

This is what all of them share. A dialect is a module of its own that says the rest, as data and few functions:

    NAME        the container's name, for --export and `Layout.also`
    form        layout -> how its components are stored (`Form`), or None
    holds       the layouts that it stores, in words
    find        what config.json says, and the tensors of the files -> the weights that they make up (`Found`)
    says        the steps of a plan -> the `quantization_config` to write
    files       the steps of a plan -> further JSON files, by name
    leaves      name and shape of a dense weight -> why it stays dense unless a rule says otherwise
    refusal_of, plan_refusal_of, extras_refusal_of    what else it cannot hold; by default nothing

and puts them together: `DIALECT = Dialect(NAME, ...)`. `exporters.FOLDERS`, `METHODS` and `SIGNS` name the dialects and
what they are known by in a folder.

A tensor that belongs to no weight is one of its own, read and written as it is. Reading is the safetensors
container's; `find` below gives it the weights, each checked: a weight whose tensors have not the sizes and
dtypes that its layout gives them is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from packfmt.codec import Array, PackedTensor, dense_dtype, dense_values, matrix
from packfmt.errors import ContainerError, LayoutError, PlanError
from packfmt.exporters import METHODS, SIGNS, Extras, Layouts, Source, beside, get
from packfmt.exporters import safetensors_header as header
from packfmt.exporters.output import Entry, Output, Piece, Place
from packfmt.exporters.safetensors_header import NAME_OF
from packfmt.layout import DENSE, Layout, Placed
from packfmt.plan import Plan, Step, TensorInfo

Shape = tuple[int, ...]
Says = Mapping[str, Any]  # a `quantization_config`
Tensors = Mapping[str, TensorInfo]  # of the files, by name
Read = Callable[[str], Array]

WEIGHT = ".weight"
HEAD = "lm_head"
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_positions|wte|wpe|\w*embeddings?|embed)\.weight$")
FLOATS = ("bfloat16", "float16", "float32")  # what the model's weights may have been
STAYS = "leave it dense with --map REGEX=keep"  # what a user may do
READ_AT_ONCE = 1 << 16  # bytes of a tensor that `find` may read


# ---------------------------------------------------------------- what a dialect says


def as_weight(component: Shape, weight: Shape) -> Shape:
    """The stored shape of a component that has a row for each of the weight's rows: leading axes stay apart."""
    rows = matrix(weight)[0]
    return (*weight[:-1], *component[1:]) if len(component) > 1 and component[0] == rows else component


def as_scalar(component: Shape, weight: Shape) -> Shape:
    """The stored shape of one number without axes."""
    return ()


@dataclass(frozen=True, slots=True)
class Stored:
    """How a component stands in the file.

    `dtypes` are those that hold its bytes, as the file names them: all are read, the first is written; none
    means the component's own. F4 is shaped as if its bytes were two numbers each. `shape` makes the stored
    shape of the component's and the weight's; a lone number is read in any shape, and a row of numbers as a column.
    `others` are suffixes that it is read under where the first is not there.
    """

    suffix: str
    dtypes: tuple[str, ...] = ()
    shape: Callable[[Shape, Shape], Shape] = as_weight
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Activation:
    """How the scale of a layer's inputs is stored beside its weight: in a tensor of its own, one number."""

    suffix: str
    divides: bool
    shape: Shape


MULTIPLIES = Activation(".input_scale", False, ())  # ModelOpt, GGUF
EIGHT_BIT = Activation(".input_scale", False, (1,))  # compressed-tensors, of 8-bit inputs
DIVIDES = Activation(".input_global_scale", True, (1,))  # the same, of 4-bit inputs
DEEPSEEKS = Activation(".activation_scale", False, ())
NOWHERE = Activation("", False, ())  # the inputs of such layers have no scale that is stored: it is left out


@dataclass(frozen=True, slots=True)
class Form:
    """How a dialect stores a layout: a tensor for each component, called as the weight with `end` made a suffix.

    `constants` are tensors that say again what the weight's shape says: suffix -> array of a shape.
    `activation`: what scales of inputs become when they come from a dialect that has them otherwise; None leaves them.
    """

    components: Mapping[str, Stored]
    end: str = ""
    constants: Mapping[str, Callable[[Shape], Array]] = field(default_factory=dict)
    activation: Activation | None = None

    def called(self, name: str, suffix: str) -> str:
        """The name of a tensor of the weight `name`."""
        return name.removesuffix(self.end) + suffix


@dataclass(frozen=True, slots=True)
class Found:
    """A weight that a dialect sees among the tensors of a folder.

    `kind` is what a user is told it is. `choices` are the layouts that it may have, as the dialect or packfmt
    calls them, each with the weight's shape: the one that fits the tensors is taken. With `why` instead,
    `name` is a tensor that cannot be understood, and that is the reason.
    """

    name: str
    kind: str = ""
    choices: tuple[tuple[str, Shape], ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight whose tensors were found and checked."""

    info: TensorInfo
    stored: Mapping[str, TensorInfo]  # component -> its tensor
    constants: tuple[str, ...]  # tensors that are no longer needed


def _nothing(*_: Any) -> str:
    return ""


def no_embedding(name: str, shape: Shape) -> str:
    """Why a dense weight stays dense in a folder of linear layers, unless a rule says otherwise; empty if not."""
    return "embedding, which stays dense there" if EMBEDDING.search(name) else ""


def no_embedding_or_head(name: str, shape: Shape) -> str:
    """`no_embedding`, for engines that want the output layer dense, too."""
    is_head = re.search(rf"(^|\.){HEAD}{re.escape(WEIGHT)}$", name)
    return "output layer, which engines expect dense there" if is_head else no_embedding(name, shape)


def _no_files(*_: Any) -> dict[str, Any]:
    return {}


# ---------------------------------------------------------------- a dialect


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """A container made of what a dialect says; what its members do stands above and in `exporters`."""

    NAME: str
    title: str  # in errors
    holds: str
    form: Callable[[Layout], Form | None]
    find: Callable[[Says, Tensors, Read], Iterable[Found]]
    says: Callable[[tuple[Step, ...], Extras], dict[str, Any]]
    files: Callable[[tuple[Step, ...], Extras], dict[str, Any]] = _no_files
    leaves: Callable[[str, Shape], str] = no_embedding_or_head
    refusal_of: Callable[[Layout, Shape], str] = _nothing
    plan_refusal_of: Callable[[tuple[Step, ...]], str] = _nothing
    extras_refusal_of: Callable[[Extras], str] = _nothing

    def refusal(self, layout: Layout, shape: Shape) -> str:
        """Why such a folder cannot hold such a tensor; empty if it can."""
        if dense_dtype(layout):
            return ""
        if self.form(layout) is None:
            held = re.findall(r"\w+", self.holds)
            near = [name for name in held if name.split("_")[0] == layout.name.split("_")[0]]
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            return f"{self.title} holds {self.holds} and dense tensors, not {layout.name}{hint}"
        if not layout.sources:  # it came in a file, and may only bear the name of a layout of ours
            return f"{layout.name} is described by a file, and is not the installed layout of this name"
        return self.refusal_of(layout, shape)

    def name_refusal(self, name: str) -> str:
        """Why no tensor can bear this name; empty if one can."""
        return header.name_refusal(name)

    def plan_refusal(self, steps: tuple[Step, ...]) -> str:
        """Why these tensors cannot stand together; empty if they can."""
        owner: dict[str, str] = {}
        inputs = self._inputs(steps)
        for step in steps:
            form = self.form(step.layout)
            if form and not step.name.endswith(form.end):
                return f"{step.name}: is not called {form.end}; say --map '{re.escape(step.name)}=keep'"
            for tensor in self._tensors(step, inputs):
                if tensor.name in owner:
                    both = f"{step.name} and {owner[tensor.name]}"
                    return f"{both}: both would be stored as {tensor.name!r}; keep one of them"
                owner[tensor.name] = step.name
        return self.plan_refusal_of(steps)

    def extras_refusal(self, extras: Extras) -> str:
        """Why it cannot do with what the model has beside its tensors; empty if it can."""
        if extras.config is None:
            return "has no config.json, without which nothing says how weights are meant"
        return self.extras_refusal_of(extras)

    def lay(self, path: Path, plan: Plan, extras: Extras) -> Output:
        """A folder, with config.json and the dialect's further files.

        Raises
        ------
        PlanError
            If the container cannot hold the steps.
        """
        if path.suffix in (".safetensors", ".gguf"):
            raise PlanError(f"{path}: {self.title} is a folder, whose config.json says how weights are meant")
        for step in plan.steps:
            if why_not := self.refusal(step.layout, step.shape) or self.name_refusal(step.name):
                raise PlanError(f"{step.name}: {why_not}")
        if why_not := self.plan_refusal(plan.steps):
            raise PlanError(why_not)
        if why_not := self.extras_refusal(extras):
            raise PlanError(f"{plan.source}: {why_not}")

        inputs = self._inputs(plan.steps)
        written = tuple(s for s in plan.steps if inputs.get(s.name) != NOWHERE)
        stored = {step.name: self._tensors(step, inputs) for step in plan.steps}
        names, heads, sizes, places = {}, {}, {}, {}
        for file, steps in beside.by_file(plan.steps).items():
            names[file], heads[file], end = _lay_file([t for s in steps for t in stored[s.name]])
            begin = len(heads[file])
            sizes[file] = begin + end
            places.update({name: Place(file, begin + e.begin, e.end - e.begin) for name, e in names[file].items()})
        pieces = (tuple(Piece(t.component, places[t.name], t.make) for t in stored[step.name]) for step in plan.steps)

        def write_beside(folder: Path) -> None:
            beside.write_index(folder, names)
            beside.write_extras(folder, extras, self.says(written, extras))
            for name, data in self.files(written, extras).items():
                beside.dump(folder / name, data)

        return Output(sizes, tuple(Entry(p, {}, {}) for p in pieces), lambda *_: heads, write_beside)

    def open(self, path: Path, layouts: Layouts, read_as: Mapping[str, str] = MappingProxyType({})) -> Source:
        """Open a folder: as the safetensors container does, which knows all dialects."""
        return get("safetensors").open(path, layouts, read_as)

    def remarks(self, steps: tuple[Step, ...]) -> list[str]:
        """What a user should know of such a folder: which tensors are not written to it, and why."""
        names = [name for name, how in self._inputs(steps).items() if how == NOWHERE]
        if not names:
            return []
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        return [f"{which}: left out, as a scale of inputs has no place beside the weight it would have there"]

    def _inputs(self, steps: tuple[Step, ...]) -> dict[str, Activation]:
        """Scale of a layer's inputs -> how it is stored, where that depends on the layer's weight.

        Scales were chosen for the numbers that the inputs had beside the old weight: beside one of another family,
        or a dense one, they would be wrong.
        """
        weights = {s.name.removesuffix(WEIGHT): s for s in steps if s.name.endswith(WEIGHT)}
        out: dict[str, Activation] = {}
        for step in steps:
            was = input_scale(step)
            weight = weights.get(step.name.removesuffix(was.suffix)) if was else None
            if weight is None:
                continue
            form = self.form(weight.layout)
            if not dense_dtype(weight.before) and _family(weight.before) != _family(weight.layout):
                out[step.name] = NOWHERE
            elif form and form.activation:
                out[step.name] = form.activation
        return out

    def _tensors(self, step: Step, inputs: Mapping[str, Activation]) -> list[_Tensor]:
        """The tensors of the file that a step becomes."""
        form = self.form(step.layout)
        if form is None:
            now = inputs.get(step.name)
            return [] if now == NOWHERE else [_dense_tensor(step, now)]
        found = []
        for c in step.layout.fit(*matrix(step.shape)).components:
            stored = form.components[c.name]
            dtype = (stored.dtypes or (NAME_OF[c.dtype],))[0]
            shape = stored.shape(c.shape, step.shape)
            shape = (*shape[:-1], 2 * shape[-1]) if dtype == "F4" else shape
            found.append(_Tensor(form.called(step.name, stored.suffix), dtype, shape, c.name))
        for suffix, constant in form.constants.items():
            array = constant(step.shape)
            name, dtype = form.called(step.name, suffix), NAME_OF[_dtype_name(array)]
            found.append(_Tensor(name, dtype, array.shape, suffix, _same(array)))
        return found


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a file: a component of a packed tensor, or what `make` makes of that."""

    name: str
    dtype: str  # as the file names it
    shape: Shape
    component: str
    make: Callable[[PackedTensor], Array] | None = None


def _lay_file(tensors: Iterable[_Tensor]) -> tuple[dict[str, header.Entry], bytes, int]:
    """Entries of a safetensors file, all that stands before the first tensor, and where the last ends after it.

    Tensors of one width are in the order of their names, so that a file does not tell what it was made from.
    """
    entries, end = header.lay(sorted((t.name, t.dtype, t.shape) for t in tensors))
    text = header.text(entries, {"format": "pt"})
    room = -(-len(text) // 8) * 8
    return entries, room.to_bytes(8, "little") + text.ljust(room), end


def _dense_tensor(step: Step, now: Activation | None) -> _Tensor:
    """A dense tensor as it is, or the scale of a layer's inputs as the dialect has it."""
    dtype = NAME_OF[step.layout.fit(*matrix(step.shape)).components[0].dtype]
    was = input_scale(step)
    if was is None or now is None:
        return _Tensor(step.name, dtype, step.shape, "values")
    called = step.name.removesuffix(was.suffix) + now.suffix
    if now.divides != was.divides:
        return _Tensor(called, "F32", now.shape, "values", _inverse)
    return _Tensor(called, dtype, now.shape, "values")


def _family(layout: Layout) -> str:
    """What layouts have in common whose layers round their inputs alike: nvfp4 of nvfp4_ct."""
    return layout.name.partition("_")[0]


def _inverse(tensor: PackedTensor) -> Array:
    with np.errstate(divide="ignore"):
        inverse: Array = np.float32(1) / dense_values(tensor).astype(np.float32)
    return inverse


def _same(array: Array) -> Callable[[PackedTensor], Array]:
    return lambda _: array


def _dtype_name(array: Array) -> str:
    (layout,) = (d for d in DENSE.values() if dense_dtype(d) == array.dtype.name)
    return layout.fit(1, 1).components[0].dtype


# ---------------------------------------------------------------- what dialects share


def stay_dense(steps: tuple[Step, ...]) -> list[str]:
    """The modules whose matrices stay dense, for a config to name them: all are linear layers or embeddings.

    With the output layer where it is tied to the embedding, so that it is in no file.
    """
    dense = [s for s in steps if dense_dtype(s.layout) and len(s.shape) == 2 and s.name.endswith(WEIGHT)]
    modules = [s.name.removesuffix(WEIGHT) for s in dense]
    packed = {s.name for s in steps if not dense_dtype(s.layout)}
    head = [] if HEAD + WEIGHT in packed or HEAD in modules else [HEAD]
    return modules + head


def embedding_refusal(steps: tuple[Step, ...]) -> str:
    """Why embeddings cannot be packed, for dialects of linear layers alone; empty if none would be."""
    found = [s.name for s in packed_steps(steps) if EMBEDDING.search(s.name)]
    if not found:
        return ""
    kept = "|".join(re.escape(name) for name in found)
    who = f"{found[0]}: an embedding, which stays" if len(found) == 1 else f"{', '.join(found)}: embeddings, which stay"
    return f"{who} dense; say --map '{kept}=keep'"


def input_scale(step: Step) -> Activation | None:
    """How a dense tensor holds the scale of a layer's inputs, if that is what it is by its name, dtype and size."""
    dtype = dense_dtype(step.layout)
    if dtype not in FLOATS or prod(step.shape) != 1:
        return None
    known = (a for a in (MULTIPLIES, DIVIDES, DEEPSEEKS) if dtype == "float32" or not a.divides)
    return next((a for a in known if step.name.endswith(a.suffix)), None)


def packed_steps(steps: tuple[Step, ...]) -> list[Step]:
    """The steps whose result is packed."""
    return [s for s in steps if not dense_dtype(s.layout)]


# ---------------------------------------------------------------- reading


def told(path: Path, config: dict[str, Any] | None) -> tuple[Dialect, Says] | None:
    """The dialect of a folder and what its config.json, or a file in its place, says; None if there is none."""
    says = beside.quantised(config)
    if isinstance(says, dict):
        method = says.get("quant_method")
        return (dialect(METHODS[method]), says) if isinstance(method, str) and method in METHODS else None
    for sign, name in SIGNS.items():
        if path.is_dir() and (path / sign).is_file():
            data = beside.read_json(path / sign)
            if not isinstance(data, dict):
                raise ContainerError(f"{path / sign}: not a record", "PF102")
            return dialect(name), data
    return None


def dialect(name: str) -> Dialect:
    """The dialect of a container's name."""
    found = get(name)
    assert isinstance(found, Dialect)
    return found


def weights(
    path: Path, spoken: Dialect, says: Says, tensors: Tensors, read: Read, layouts: Layouts, dtype: str
) -> Iterator[Weight | TensorInfo]:
    """The weights that the tensors of a folder make up, and those tensors that cannot be understood.

    Raises
    ------
    ContainerError
        If the config is not what the dialect's is, or a weight's tensors are not what its layout gives them.
    """

    def small(name: str) -> Array:
        if tensors[name].nbytes > READ_AT_ONCE:
            raise ContainerError(f"{name} has {tensors[name].nbytes} bytes, needs {READ_AT_ONCE} or fewer", "PF106")
        return read(name)

    known: dict[str, Layout | None] = {}
    try:
        for found in spoken.find(says, tensors, small):
            if found.why:
                yield _unread(tensors[found.name], found.why)
                continue
            for name, _ in found.choices:
                if name not in known:
                    known[name] = layouts(spoken.NAME, name) or layouts("packfmt", name)
            yield _chosen(found, spoken, tensors, known, dtype)
    except ContainerError as error:
        raise ContainerError(f"{path}: {error}", error.rule) from error


def _unread(info: TensorInfo, why: str) -> TensorInfo:
    """A tensor that stays one of its own, and cannot be read."""
    return TensorInfo(info.name, info.shape, info.dtype, None, info.kind, info.file, info.nbytes, why)


def _chosen(
    found: Found, spoken: Dialect, tensors: Tensors, known: Mapping[str, Layout | None], dtype: str
) -> Weight | TensorInfo:
    """The weight in the one layout that fits its tensors; or its first tensor, if layouts hold no such shape."""
    fits: list[Weight] = []
    unread: list[TensorInfo] = []
    errors: list[ContainerError] = []
    for name, shape in found.choices:
        layout = known[name]
        form = spoken.form(layout) if layout else None
        if layout is None or form is None:
            why = f"{found.name}: is {name}, and {spoken.title} holds {spoken.holds}"
            errors.append(ContainerError(why, "PF105"))
            continue
        try:
            components = layout.fit(*matrix(shape)).components
        except LayoutError as error:
            first = form.called(found.name, next(iter(form.components.values())).suffix)
            if first in tensors:
                unread.append(_unread(tensors[first], f"a weight of {list(shape)}; {error}"))
            continue
        try:
            fits.append(_checked(found, form, tensors, layout, components, shape, dtype))
        except ContainerError as error:
            errors.append(error)
    if len(fits) == 1:
        return fits[0]
    if not fits:
        if not unread:
            raise errors[0]
        return unread[0]
    names = " and ".join(w.info.layout.name for w in fits if w.info.layout)
    raise ContainerError(f"{found.name}: its tensors fit {names}, and nothing says which", "PF105")


def _checked(
    found: Found,
    form: Form,
    tensors: Tensors,
    layout: Layout,
    components: tuple[Placed, ...],
    shape: Shape,
    dtype: str,
) -> Weight:
    """The weight, if its tensors are what the layout gives them."""
    stored = {c.name: _tensor(found.name, form, layout, c, shape, tensors) for c in components}
    constants = tuple(n for s in form.constants if (n := form.called(found.name, s)) in tensors)
    first = next(iter(stored.values()))
    nbytes = sum(t.nbytes for t in stored.values())
    return Weight(TensorInfo(found.name, shape, dtype, layout, found.kind, first.file, nbytes), stored, constants)


def _tensor(name: str, form: Form, layout: Layout, component: Placed, shape: Shape, tensors: Tensors) -> TensorInfo:
    """The tensor that holds a component, if it is what it should be."""
    stored = form.components[component.name]
    names = [form.called(name, suffix) for suffix in (stored.suffix, *stored.others)]
    called = next((n for n in names if n in tensors), names[0])
    if called not in tensors:
        raise ContainerError(f"{name}: {called!r} is missing, in which {layout.name} has {component.name!r}", "PF110")
    tensor = tensors[called]
    dtypes = stored.dtypes or (NAME_OF[component.dtype],)
    if tensor.kind not in dtypes:
        raise ContainerError(f"{called}: is {tensor.kind}, {layout.name} needs {' or '.join(dtypes)}", "PF105")
    need = stored.shape(component.shape, shape)
    have = tensor.shape
    if tensor.kind == "F4" and have and have[-1] % 2 == 0:
        have = (*have[:-1], have[-1] // 2)
    column = (*need, 1) if len(need) == 1 else need
    if have not in (need, column) and not (prod(have) == 1 == prod(need)):
        raise ContainerError(
            f"{called}: is {list(tensor.shape)}, a {layout.name} weight of {list(shape)} needs {list(need)}", "PF106"
        )
    return tensor


def dtype_before(config: dict[str, Any] | None) -> str:
    """The dtype that config.json gives the model's weights; bfloat16 if it gives none that is known."""
    config = config or {}
    inner = config.get("text_config")
    for record in (config, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (value := record.get(key)) and isinstance(value, str) and value.removeprefix("torch.") in FLOATS:
                return value.removeprefix("torch.")
    return "bfloat16"
