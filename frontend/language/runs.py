"""Runs of equal decoder layers: found by the trial, then opaque in the model around them.

Layers form a run only where they are the same program *and* are called with the same arguments: the
same tensors, equal constants. The list of layers keeps its length and order, so that whatever a
model looks up by a layer's place stays right.

Sizes: T tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .layer_call import PLAIN, Arguments, said, unsupported_layer
from .trial import EXAMPLE, LAYER_PLACE, Stand, Trial


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


def group_trials(trials: Sequence[Trial]) -> list[Run]:
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
        what = f"takes {said(layer, name)!r} [{shape}], which is not one row per token"
        raise unsupported_layer(layer, what)
    if any(d != 1 for d in x.shape[:at]):
        shape = ", ".join(map(str, x.shape))
        what = f"takes {said(layer, name)!r} [{shape}], whose rows are not the tokens'"
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
            if k not in _OF_MODULES and not LAYER_PLACE.search(k)
        }
        parts.append((name, type(module), tuple(sorted(attributes.items(), key=lambda i: i[0]))))
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    parts += [(name, tuple(t.shape), t.dtype) for name, t in tensors]
    return tuple(parts)


_OF_MODULES = frozenset({*vars(torch.nn.Module()), "_is_hf_initialized"}) - {"training"}


def _comparable(value: Any) -> Any:
    """Return an attribute as something equal for equal attributes; objects are only themselves."""
    if isinstance(value, PLAIN):
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
