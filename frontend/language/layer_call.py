"""How a model calls a decoder layer, and what that returns."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError
from .markers import Marker, place

PLAIN = (bool, int, float, str, torch.dtype, torch.device, enum.Enum, type(None))


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
            leaves += [_leaf(said(layer, name), x) for x in found]
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
    if isinstance(x, (torch.Tensor, Marker, *PLAIN)):
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


def said(layer: torch.nn.Module, name: str) -> str:
    """Return the name that a layer's own code has for an argument."""
    if not name.startswith("argument_"):
        return name
    parameters = list(inspect.signature(type(layer).forward).parameters)
    at = int(name.removeprefix("argument_")) + 2  # after self and the hidden states
    return parameters[at] if at < len(parameters) else name


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
        if not all(isinstance(x, PLAIN) for x in leaves[1:]):
            raise unsupported_layer(layer, "returns things that are not tensors")
        return cls(spec, tuple(leaves[1:]))

    def around(self, hidden: torch.Tensor) -> Any:
        """Return what a layer returns, with these hidden states."""
        return pytree.tree_unflatten([hidden, *self.others], self.spec)


def unsupported_layer(layer: torch.nn.Module, what: str) -> UnsupportedError:
    """Return the error that a decoder layer of this class does `what`."""
    return UnsupportedError(f"the decoder layer {type(layer).__name__} {what}")
