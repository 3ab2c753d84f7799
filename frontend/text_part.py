"""Which tensors of a multimodal checkpoint are its language model's, under that model's own names.

A checkpoint of several parts keeps the language model below a prefix (`language_model.model.`,
`model.language_model.`, …), which is where an embedding of tokens stands with layers beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import DiluError, Loc
from .checkpoint import Checkpoint


def text_part(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """Return the part of a checkpoint that is `model`'s, its tensors under the model's names.

    Raises DiluError where the checkpoint has no embedding that could be the model's.
    """
    names = text_names(model, checkpoint.tensors, str(checkpoint.path))
    return replace(checkpoint, tensors={own: checkpoint.tensors[n] for n, own in names.items()})


def text_names(model: Any, tensors: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Return the model's name for each tensor of a checkpoint that belongs to it."""
    own = {id(t): n for n, t in reversed([*model.state_dict(keep_vars=True).items()])}
    base = f"{model.base_model_prefix}."
    inner = own[id(model.get_input_embeddings().weight)].removeprefix(base)
    prefixes = [n.removesuffix(inner) for n in tensors if n == inner or n.endswith(f".{inner}")]
    if not prefixes:
        raise DiluError(
            f"the checkpoint has no tensor that could be {inner!r} of its text part",
            Loc(folder, tensor=inner),
            "the files do not belong to this config.json",
        )
    prefix = max(prefixes, key=lambda p: sum(n.startswith(f"{p}layers.") for n in tensors))
    found = {n: base + n.removeprefix(prefix) for n in tensors if n.startswith(prefix)}
    return found | _heads(model, prefix, tensors)


def _heads(model: Any, prefix: str, names: Mapping[str, Any]) -> dict[str, str]:
    """Return the output head, which stands beside the prefix or beside a parent of it."""
    head = model.get_output_embeddings()
    if head is None:
        return {}
    parts = prefix.split(".")[:-1]
    for depth in range(len(parts), -1, -1):
        outer = "".join(f"{p}." for p in parts[:depth])
        found = {
            outer + n: n
            for n in (f"lm_head.{k}" for k, _ in head.named_parameters())
            if outer + n in names
        }
        if found:
            return found
    return {}
