"""Runs of equal decoder layers: found by a trial forward, then opaque in the model around them.

The trial runs the model on fake tensors with a recorder in every layer's place. Layers form a run
only where they are the same program *and* are called with the same arguments: the same tensors,
equal constants. The list of layers keeps its length and order, so that whatever a model looks up by
a layer's place stays right.

Sizes: T tokens, H hidden width.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import DiluError, UnsupportedError
from .markers import Marker, place
from .masks import one_sequence

EXAMPLE = {"tokens": 7, "rows": 3}  # any sizes that are unlike each other and 0 and 1
_PLACE = re.compile(r"layer_?(idx|index|id|number)$")  # attributes that only say where a layer is
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, enum.Enum, type(None))


# ----------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Shared(Marker):
    """A container or object that layers are handed; what one writes, another might read."""

    name: str
    kind: str

    def refuse(self, what: str) -> NoReturn:
        raise UnsupportedError(
            f"a decoder layer {what} its argument {self.name!r} ({self.kind}): state that layers "
            "share (keys and values of other layers) is not supported",
            place(),
        )


@dataclass
class Arguments:
    """What a model hands a decoder layer beside hidden states: tensors by name, and all the rest.

    `leaves` has a None in every tensor's place; `places` are those places.
    """

    hidden: torch.Tensor
    by_name: str | None  # of the keyword that hidden states are, if they are one
    tensors: list[torch.Tensor]
    names: list[str]
    leaves: list[Any]
    places: list[int]
    spec: Any
    keywords: tuple[str, ...]

    @classmethod
    def of(
        cls, layer: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Arguments:
        """Return a call's arguments; raise UnsupportedError for a layer without hidden states."""
        by_name = None if args else "hidden_states"
        rest = {k: v for k, v in kwargs.items() if k != by_name}
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[0] != 1:
            given = getattr(hidden, "shape", None)
            found = f", but {list(given)}" if given is not None else ""
            raise unsupported_layer(layer, f"takes no hidden states [1, tokens, width]{found}")
        others = [(f"argument_{i}", a) for i, a in enumerate(args[1:])]
        leaves, names = [], []
        for name, value in [*others, *rest.items()]:
            found = pytree.tree_leaves(value, is_leaf=_is_leaf)
            leaves += [_leaf(_said(layer, name), x) for x in found]
            names += _names(name, [isinstance(x, torch.Tensor) for x in found])
        given = (tuple(args[1:]), tuple(rest.values()))
        _, spec = pytree.tree_flatten(given, is_leaf=_is_leaf)
        places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        return cls(
            hidden,
            by_name,
            [leaves[i] for i in places],
            [names[i] for i in places],
            [None if isinstance(x, torch.Tensor) else x for x in leaves],
            places,
            spec,
            tuple(rest),
        )

    def call(
        self, layer: torch.nn.Module, hidden: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> Any:
        """Call a layer with these arguments, but other tensors."""
        leaves = list(self.leaves)
        for at, x in zip(self.places, tensors, strict=True):
            leaves[at] = x
        args, values = pytree.tree_unflatten(leaves, self.spec)
        kwargs = dict(zip(self.keywords, values, strict=True))
        if self.by_name:
            return layer(*args, **{self.by_name: hidden}, **kwargs)
        return layer(hidden, *args, **kwargs)

    def constants(self) -> tuple[Any, ...]:
        """Return all that is no tensor, comparable."""
        return self.spec, self.keywords, self.places, [(type(x), x) for x in self.leaves]

    def equal(self, other: Arguments) -> bool:
        """Return whether both are the same arguments: the same tensors, and equal constants."""
        return self.constants() == other.constants() and all(
            a is b for a, b in zip(self.tensors, other.tensors, strict=True)
        )


def _is_leaf(x: Any) -> bool:
    """Return whether an argument is taken as one thing: also a container that is still empty."""
    return isinstance(x, Marker) or (isinstance(x, (dict, list)) and not x)


def _leaf(name: str, x: Any) -> Any:
    if isinstance(x, (torch.Tensor, Marker, *_PLAIN)):
        return x
    if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise UnsupportedError(f"a decoder layer is handed a size ({name}), which is not supported")
    return Shared(name, type(x).__name__)


def _names(name: str, tensors: Sequence[bool]) -> list[str]:
    """Return a name for every leaf of an argument, the tensors numbered."""
    count = sum(tensors)
    if name in ("position_embeddings", "argument_0") and count == 2 and len(tensors) == 2:
        return ["cos", "sin"] if name == "position_embeddings" else [f"{name}_0", f"{name}_1"]
    before = [sum(tensors[:i]) for i in range(len(tensors))]
    return [name if count == 1 else f"{name}_{i}" for i in before]


def _said(layer: torch.nn.Module, name: str) -> str:
    """Return the name that a layer's own code has for an argument."""
    if not name.startswith("argument_"):
        return name
    parameters = list(inspect.signature(type(layer).forward).parameters)
    at = int(name.removeprefix("argument_")) + 2  # after self and the hidden states
    return parameters[at] if at < len(parameters) else name


# ----------------------------------------------------------------------- what layers return


@dataclass(frozen=True)
class Returned:
    """How a layer returns its hidden states: alone, or first of things that are no tensors."""

    spec: Any
    others: tuple[Any, ...] = ()

    @classmethod
    def of(cls, layer: torch.nn.Module, hidden: torch.Tensor, out: Any) -> Returned:
        leaves, spec = pytree.tree_flatten(out)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if not tensors or leaves[0] is not tensors[0]:
            raise unsupported_layer(layer, "does not return its hidden states first")
        if len(tensors) > 1:
            more = "more than its hidden states (indices, keys or other streams)"
            raise unsupported_layer(layer, f"hands on {len(tensors)} tensors, {more}")
        if tensors[0].shape != hidden.shape or tensors[0].dtype != hidden.dtype:
            raise unsupported_layer(layer, "returns hidden states of another shape or type")
        if not all(isinstance(x, _PLAIN) for x in leaves[1:]):
            raise unsupported_layer(layer, "returns things that are not tensors")
        return cls(spec, tuple(leaves[1:]))

    def around(self, hidden: torch.Tensor) -> Any:
        """Return what a layer returns, with these hidden states."""
        return pytree.tree_unflatten([hidden, *self.others], self.spec)


# ----------------------------------------------------------------------- the trial


class Stand(torch.nn.Module):
    """What stands in a layer's place; it has none of the layer's parameters, but its attributes."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self._held = (layer,)  # in a tuple: none of this module's own

    @property
    def layer(self) -> torch.nn.Module:
        return self.__dict__["_held"][0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][0], name)


@dataclass
class Trial:
    """One layer's call in the trial, and how it returns."""

    layer: torch.nn.Module
    arguments: Arguments
    returned: Returned
    key: Any  # equal for layers that are the same program

    def joins(self, before: Trial) -> bool:
        """Return whether this layer continues the run of the one before."""
        return self.key == before.key and self.arguments.equal(before.arguments)


class Recorder(Stand):
    """A layer in the trial: notes its arguments and returns hidden states that are new."""

    def __init__(self, layer: torch.nn.Module, key: Any, trials: list[Trial]) -> None:
        super().__init__(layer)
        self.key = (key,)
        self.trials = (trials,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (trials,), (key,) = self.trials, self.key
        arguments = Arguments.of(self.layer, args, kwargs)
        if any(t.layer is self.layer for t in trials):
            raise unsupported_layer(self.layer, "is called more than once")
        known = next((t for t in trials if t.key[0] == key and t.key[1] is None), None)
        if known and known.arguments.constants() == arguments.constants():
            trial = Trial(self.layer, arguments, known.returned, known.key)
        else:
            returned, by_place = _try(self.layer, arguments)
            trial = Trial(self.layer, arguments, returned, (key, len(trials) if by_place else None))
        trials.append(trial)
        return trial.returned.around(torch.empty_like(arguments.hidden))


def _try(layer: torch.nn.Module, arguments: Arguments) -> tuple[Returned, bool]:
    """Run a layer; return how it returns, and whether it computes with its place in the model."""
    attentions: list[Any] = []
    with _Places(layer) as places, _Counting(attentions):
        try:
            out = arguments.call(layer, arguments.hidden, arguments.tensors)
        except DiluError:
            raise
        except Exception as error:
            raise _explained(layer, error) from error
    if len(attentions) != 1:
        raise unsupported_layer(layer, _attentions(len(attentions)))
    return Returned.of(layer, arguments.hidden, out), places.used


def _attentions(count: int) -> str:
    if count:
        return f"has {count} attentions: one in each layer is supported"
    return (
        "has no softmax attention over tokens (linear attention, convolution or a state space): "
        "a recurrent state is not supported"
    )


class _Counting(TorchDispatchMode):
    """Count the attentions that run."""

    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.dilu.attention.default:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


class _Places:
    """While it is entered, tell whether a layer computes with the numbers of its place."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self.used = False
        self.before: list[tuple[torch.nn.Module, str, int]] = []

    def __enter__(self) -> _Places:
        for module in self.layer.modules():
            for name, value in vars(module).items():
                if _PLACE.search(name) and type(value) is int:
                    self.before.append((module, name, value))
        for module, name, value in self.before:
            setattr(module, name, _Place(value, self))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, value in self.before:
            setattr(module, name, value)


class _Place:
    """A layer's place that can be handed on, and notes when it is computed with."""

    def __init__(self, value: int, noted: _Places) -> None:
        self.value, self.noted = value, noted

    def __repr__(self) -> str:
        return str(self.value)


def _noting(name: str) -> Callable[..., Any]:
    def operation(self: _Place, *others: Any) -> Any:
        self.noted.used = True
        values = [o.value if isinstance(o, _Place) else o for o in others]
        return getattr(self.value, name)(*values)

    return operation


for _name in (
    "eq", "ne", "lt", "le", "gt", "ge", "hash", "index", "int", "float", "bool", "neg", "and",
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv",
    "mod", "rmod", "pow", "rpow",
):  # fmt: skip
    setattr(_Place, f"__{_name}__", _noting(f"__{_name}__"))


def _explained(layer: torch.nn.Module, error: Exception) -> UnsupportedError:
    """Say what of a layer does not run on tensors without values."""
    text = str(error).strip().partition("\n")[0]
    name = type(error).__name__
    if "DataDependent" in name or "DynamicOutputShape" in name or "data-dependent" in text.lower():
        found = unsupported_layer(layer, "takes decisions or sizes from the values of tensors")
    else:
        found = unsupported_layer(layer, f"cannot be captured: {name}: {text}")
    found.loc = raised_at(error)
    return found


def raised_at(error: BaseException) -> Any:
    """Return the innermost line of the model's code that an error came through."""
    from .markers import is_models

    trace, found = error.__traceback__, None
    while trace is not None:
        found = is_models(trace.tb_frame.f_code.co_filename, trace.tb_lineno) or found
        trace = trace.tb_next
    return found


def unsupported_layer(layer: torch.nn.Module, what: str) -> UnsupportedError:
    """Return the error that a decoder layer of this class does `what`."""
    return UnsupportedError(f"the decoder layer {type(layer).__name__} {what}")


def try_layers(
    model: torch.nn.Module, holder: Any, keys: Sequence[Any], mode: FakeTensorMode
) -> list[Trial]:
    """Run the model once on fake tensors; return its layers' calls, in their order.

    `keys` are equal for layers that are the same program by their modules and weights. Raises
    UnsupportedError for layers that are not captured.
    """
    layers, trials = holder.layers, list[Trial]()
    holder.layers = torch.nn.ModuleList(
        Recorder(layer, key, trials) for layer, key in zip(layers, keys, strict=True)
    )
    try:
        with mode, torch.no_grad(), one_sequence():
            model(*example())
    finally:
        holder.layers = layers
    if [id(t.layer) for t in trials] != [id(layer) for layer in layers]:
        raise UnsupportedError("the model does not call its decoder layers one by one, in order")
    return trials


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, positions and rows of an example."""
    sizes = (EXAMPLE["tokens"], EXAMPLE["tokens"], EXAMPLE["rows"])
    return tuple(torch.zeros(n, dtype=torch.int64) for n in sizes)  # type: ignore[return-value]


# ----------------------------------------------------------------------- runs


@dataclass
class Record:
    """How a run was called; an object of its own, since export restores a module's attributes."""

    call: LayerCall | None = None


@dataclass
class LayerCall:
    """A layer as it is called while the model around it is exported.

    `invariants` are the tensors beside hidden states as the layer's function takes them: without
    the leading dimensions of 1 that `leading` counts. `sized` says which of them have T rows.
    """

    arguments: Arguments
    hidden: torch.Tensor
    invariants: list[torch.Tensor]
    leading: list[int]
    sized: list[bool]
    layer: torch.nn.Module

    @property
    def names(self) -> list[str]:
        return self.arguments.names

    def run(self, hidden: torch.Tensor, invariants: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the layer's hidden states `[T,H]`."""
        tensors = [
            x.reshape((1,) * n + tuple(x.shape))
            for x, n in zip(invariants, self.leading, strict=True)
        ]
        out = self.arguments.call(self.layer, hidden[None], tensors)
        return pytree.tree_leaves(out)[0][0]


@dataclass
class Run:
    """Consecutive layers that are called as one: the first one's call stands for all."""

    index: int
    first: int
    trials: list[Trial]
    record: Record = field(default_factory=Record)

    @property
    def count(self) -> int:
        return len(self.trials)

    @property
    def key(self) -> Any:
        """Return what is equal for runs whose layers are captured once."""
        trial = self.trials[0]
        shapes = [(tuple(x.shape), x.dtype) for x in trial.arguments.tensors]
        return trial.key, trial.arguments.constants(), shapes, trial.arguments.names

    def stands(self) -> list[Stand]:
        """Return what stands in the places of the run's layers."""
        first = Opaque(self)
        return [first, *(Passed(t.layer, self) for t in self.trials[1:])]


def find_runs(trials: Sequence[Trial]) -> list[Run]:
    """Return the runs of layers, in order."""
    runs: list[Run] = []
    for i, trial in enumerate(trials):
        if runs and trial.joins(runs[-1].trials[-1]):
            runs[-1].trials.append(trial)
        else:
            runs.append(Run(len(runs), i, [trial]))
    return runs


class Opaque(Stand):
    """A run in the place of its first layer."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.trials[0].layer)
        self._run = (run,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (run,) = self._run
        arguments = Arguments.of(self.layer, args, kwargs)
        if arguments.constants() != run.trials[0].arguments.constants():
            raise unsupported_layer(self.layer, "is called in another way for other sizes")
        found = [
            _invariant(self.layer, name, x)
            for name, x in zip(arguments.names, arguments.tensors, strict=True)
        ]
        invariants = [x for x, _, _ in found]
        hidden = arguments.hidden[0]
        run.record.call = LayerCall(
            arguments, hidden, invariants, [n for _, n, _ in found], [s for *_, s in found],
            self.layer,
        )  # fmt: skip
        out = torch.ops.dilu.layers(hidden, invariants, run.index)
        return run.trials[0].returned.around(out[None])


class Passed(Stand):
    """A layer that its run has computed already, and that is called as the run's first one."""

    def __init__(self, layer: torch.nn.Module, run: Run) -> None:
        super().__init__(layer)
        self._run = (run,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (run,) = self._run
        arguments = Arguments.of(self.layer, args, kwargs)
        assert run.record.call is not None
        if not arguments.equal(run.record.call.arguments):
            raise unsupported_layer(self.layer, "is called in another way for other sizes")
        return run.trials[0].returned.around(arguments.hidden)


def _invariant(
    layer: torch.nn.Module, name: str, x: torch.Tensor
) -> tuple[torch.Tensor, int, bool]:
    """Return a tensor without leading 1s before its T rows, their count, and whether it has T.

    Raises UnsupportedError for a tensor that has the tokens elsewhere, as masks have.
    """
    symbolic = [i for i, d in enumerate(x.shape) if isinstance(d, torch.SymInt)]
    if not symbolic:
        return x, 0, False
    at = symbolic[0]
    size: Any = x.shape[at]
    if symbolic != [at] or size.node.hint != EXAMPLE["tokens"]:
        shape = ", ".join(map(str, x.shape))
        what = f"takes {_said(layer, name)!r} [{shape}], which is not one row per token"
        raise unsupported_layer(layer, what)
    if any(d != 1 for d in x.shape[:at]):
        shape = ", ".join(map(str, x.shape))
        what = f"takes {_said(layer, name)!r} [{shape}], whose rows are not the tokens'"
        raise unsupported_layer(layer, what)
    return x.reshape(x.shape[at:]), at, True


# ----------------------------------------------------------------------- programs of layers


def signature(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Return what makes two decoder layers the same program: classes, shapes and attributes."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        attributes = {
            k: _comparable(v)
            for k, v in vars(module).items()
            if k not in _OF_MODULES and not _PLACE.search(k)
        }
        parts.append((name, type(module), tuple(sorted(attributes.items(), key=lambda i: i[0]))))
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    parts += [(name, tuple(t.shape), t.dtype) for name, t in tensors]
    return tuple(parts)


_OF_MODULES = frozenset({*vars(torch.nn.Module()), "_is_hf_initialized"}) - {"training"}


def _comparable(value: Any) -> Any:
    """Return an attribute as something equal for equal attributes; objects are only themselves."""
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(_comparable(v) for v in value)
    if isinstance(value, dict):
        items = [(repr(k), _comparable(v)) for k, v in value.items()]
        return "dict", tuple(sorted(items, key=lambda i: i[0]))
    if isinstance(value, torch.Tensor):
        return "tensor", tuple(value.shape), value.dtype
    bound = getattr(value, "__func__", None)  # a method, of the module itself as a rule
    return ("object", id(bound if bound is not None else value))
