"""Tensors of a checkpoint that nobody reads: each is known to mean nothing, or refused by name.

What lies outside of the modules that are captured (further layers, towers that see or hear) is
left alone, as transformers leaves it with a warning. Within them a tensor that is not read is
something that the checkpoint's makers compute with and this model would not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from ...errors import Loc, UnsupportedError
from .checkpoint import Checkpoint
from .names import Names

#: What activations and caches are rounded with, which are computed as wide as the model's own.
_ACTIVATIONS = re.compile(
    r"(?:^|[._])(?:input|output|activation|act|in|out|k|v|q|kv|prob|softmax|k_cache|v_cache)"
    r"(?:_activation)?_(?:scale|scale_ub|scale_inv|zero_point|global_scale|amax)$"
    r"|\.qscale_act$"
)
#: Rotary frequencies, which are computed from the configuration, as transformers does.
_ROTARY = re.compile(
    r"(?:^|\.)(?:(?:original_)?inv_freq|freqs_cis"
    r"|(?:rotary_emb|rope|rotary_pos_emb)\.(?:freqs|cos_cached|sin_cached))$"
)
_POSITIONS = re.compile(r"(?:^|\.)position_ids$")
#: Adds nothing where it is zero.
_ADDED = re.compile(r"(?:^|[._])(?:bias|zero_point)$")


class Leftovers:
    """Judges tensors of `checkpoint` that no parameter of `model` is made of."""

    def __init__(self, model: Any, checkpoint: Checkpoint, names: Names) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.modules = dict(model.named_modules())
        self.outside = _outside(model)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self.ignored = [re.compile(pattern) for pattern in ignored]

    def find(self, tensors: Iterable[str]) -> tuple[str, UnsupportedError] | None:
        """Return the module of a tensor that is not known to mean nothing, and what to say of it;
        None where there is no such tensor."""
        for tensor in tensors:
            name, _, _ = self.names.parameter(tensor)
            module = self._module(name)
            if module is not None and not self._means_nothing(tensor, name):
                return module, self._refused(tensor, module)
        return None

    def _module(self, name: str) -> str | None:
        """Return the captured module that a tensor called `name` lies in, None where in none."""
        found = [m for c in self.names.candidates(name) if (m := self._ancestor(c)) is not None]
        return max(found, key=len, default=None)

    def _ancestor(self, name: str) -> str | None:
        path = name.rpartition(".")[0]
        while path and path not in self.modules:
            path = path.rpartition(".")[0]
        return None if path in self.outside else path

    def _means_nothing(self, tensor: str, name: str) -> bool:
        known = (_ACTIVATIONS, _ROTARY, _POSITIONS, *self.ignored)
        if any(pattern.search(n) for pattern in known for n in (tensor, name)):
            return True
        header = self.checkpoint.tensors[tensor]
        return _ADDED.search(tensor) is not None and self.checkpoint.is_zero(header)

    def _refused(self, tensor: str, module: str) -> UnsupportedError:
        kind = type(self.modules[module]).__name__
        hint = "it may change what the module computes, so it is not passed over"
        if tensor.endswith("bias"):
            hint = f"the model that config.json describes has no bias in {module}; {hint}"
        elif tensor.endswith(("scale", "scale_inv")):
            hint = f"it is a scale of no weight that holds codes; {hint}"
        return UnsupportedError(
            f"nothing reads the tensor {tensor!r}, which belongs to {module} ({kind})",
            Loc(str(self.checkpoint.path / self.checkpoint.tensors[tensor].file), tensor=tensor),
            hint,
        )


def _outside(model: Any) -> frozenset[str]:
    """Return the modules in which more lies than is captured: models, and their lists of layers."""
    from transformers import PreTrainedModel

    models = {n for n, m in model.named_modules() if isinstance(m, PreTrainedModel)} | {""}
    lists = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
        and name.rpartition(".")[0] in models
    }
    return frozenset(models | lists)
