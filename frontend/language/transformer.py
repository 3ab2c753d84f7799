"""transformers models as something to capture: built without weights, attention and experts opaque.

A model is built on fake tensors, so that its size costs nothing. Attention and experts are reached
through transformers' own interfaces, decoder layers are grouped into runs of equal ones, and each
run stands in the model as one opaque module: what is captured does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import UnsupportedError
from ..program.capture import export
from .masks import one_sequence
from .runs import LayerCall, Run, group_trials
from .trial import EXAMPLE, example, try_layers


def find_layers(model: Any) -> Any:
    """Return the part of a model that holds its decoder layers; raise UnsupportedError if none."""
    for part in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        layers = getattr(part, "layers", None)
        if isinstance(layers, torch.nn.ModuleList) and len(layers):
            return part
    raise UnsupportedError(f"{type(model).__name__} has no list of decoder layers")


def layers_name(model: Any) -> str:
    """Return the name of the list of decoder layers among a model's modules."""
    holder = find_layers(model)
    name = next(name for name, module in model.named_modules() if module is holder)
    return f"{name}.layers" if name else "layers"


# ----------------------------------------------------------------------- export


class Outer(torch.nn.Module):
    """The model around its decoder layers: tokens to the logits of the rows that are wanted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        out = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
        )
        return out.logits[0].float()


class Layer(torch.nn.Module):
    """A decoder layer as a function of `hidden[T,H]` and what else it is handed."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self.layer = call.layer
        self._call = (call,)

    def forward(self, hidden: torch.Tensor, *invariants: torch.Tensor) -> torch.Tensor:
        return self._call[0].run(hidden, invariants)


def find_runs(model: Any, keys: Sequence[Any], mode: FakeTensorMode) -> list[Run]:
    """Return the runs of a model's equal decoder layers; `keys` are equal for equal programs."""
    return group_trials(try_layers(Outer(model), find_layers(model), keys, mode))


def export_outer(
    model: Any, found: Sequence[Run], mode: FakeTensorMode
) -> torch.export.ExportedProgram:
    """Export the model with its layers replaced by runs, which learn how they are called."""
    base = find_layers(model)
    base.layers = torch.nn.ModuleList(stand for run in found for stand in run.stands())
    with mode:
        inputs = example()
    shapes = ({0: torch.export.Dim.DYNAMIC},) * 3
    with one_sequence():
        return export(Outer(model), inputs, shapes)


def export_layer(call: LayerCall, mode: FakeTensorMode) -> torch.export.ExportedProgram:
    """Export one decoder layer with a symbolic number of tokens."""
    per_token = {0: torch.export.Dim.DYNAMIC}
    given = [(call.hidden, True), *zip(call.invariants, call.sized, strict=True)]
    inputs = tuple(_example(x, mode, sized) for x, sized in given)
    sizes = tuple(per_token if sized else None for _, sized in given)
    shapes: dict[str, Any] = {"hidden": sizes[0]}
    if call.invariants:
        shapes["invariants"] = sizes[1:]
    with one_sequence():
        return export(Layer(call), inputs, shapes)


def _example(x: torch.Tensor, mode: FakeTensorMode, sized: bool) -> torch.Tensor:
    """Return a tensor of this type and shape, with a number of rows of its own if it is sized."""
    shape = (EXAMPLE["tokens"], *x.shape[1:]) if sized else tuple(x.shape)
    with mode:
        return torch.empty(shape, dtype=x.dtype)
