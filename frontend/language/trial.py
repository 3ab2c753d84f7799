"""The trial: a model run on fake tensors with a recorder in the place of every decoder layer.

Sizes: T tokens, H hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import DiluError, UnsupportedError
from .layer_call import Arguments, Returned, unsupported_layer
from .masks import one_sequence

EXAMPLE = {"tokens": 7, "rows": 3}  # any sizes that are unlike each other and 0 and 1
#: Attributes that only say where a layer is.
LAYER_PLACE = re.compile(r"layer_?(idx|index|id|number)$")


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
                if LAYER_PLACE.search(name) and type(value) is int:
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
