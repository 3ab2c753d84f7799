"""Parameters that a configuration ties, and files that hold each of them.

As transformers 5.23 loads them: where both are stored with different values, the configuration is
wrong and they are not tied; where only one is stored, it serves both, whichever it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .checkpoint import Checkpoint
from .names import Stored


def untie(model: Any, checkpoint: Checkpoint, stored: Mapping[str, Sequence[Stored]]) -> None:
    """Give tied parameters of `model` that are stored with different values one each."""
    for target, source in tied(model).items():
        if target not in stored or source not in stored:
            continue
        if not _same(checkpoint, stored[target], stored[source]):
            path, _, name = target.rpartition(".")
            parameter = model.get_parameter(target)
            own = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            setattr(model.get_submodule(path), name, own)


def tied(model: Any) -> dict[str, str]:
    """Return the parameters that are tied, and to which."""
    found: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {t: s for t, s in found.items() if parameters.get(t) is parameters.get(s) is not None}


def _same(checkpoint: Checkpoint, a: Sequence[Stored], b: Sequence[Stored]) -> bool:
    """Whether two parameters are one tensor each, with the same bytes; never for codes, which may
    have different scales."""
    names = [[t for way in ways for t in way.tensors()] for ways in (a, b)]
    if [len(n) for n in names] != [1, 1]:
        return False
    first, second = (checkpoint.tensors[n[0]] for n in names)
    return not first.element.startswith("F8") and checkpoint.same(first, second)
