"""Buffers that no checkpoint holds (rotary frequencies, scales of embeddings), computed for real.

They are what transformers computes: the model is built once more, with buffers that have values and
parameters that have none, and what transformers sets again after loading is set again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import UnsupportedError

_LARGEST = 1 << 24  # values of a tensor that is computed; what is larger is no table of a model
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}

#: Keys of rotary parameters that transformers' own code reads, which computes the frequencies
#: here as it does for itself: what it does not read for a type changes nothing there either.
ROTARY = frozenset(
    {
        "rope_theta", "rope_type", "type", "partial_rotary_factor", "factor",
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale",
        "mscale_all_dim", "truncate", "mrope_section", "alpha", "llama_4_scaling_beta",
        "max_position_embeddings", "short_mscale", "long_mscale",
    }
)  # fmt: skip


def real_buffers(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the buffers of a model that no checkpoint holds, by name, computing in `dtype`.

    Raises UnsupportedError for one whose values need parameters, or that is not computed at all.
    """
    stored = model.state_dict(keep_vars=True)
    wanted = {n: b for n, b in model.named_buffers() if n not in stored}
    if not wanted:
        return {}
    twin = _with_values(model, dtype)
    found = dict(twin.named_buffers())
    for name, buffer in wanted.items():
        made = found.get(name)
        if made is None or made.is_meta or made.shape != buffer.shape:
            raise UnsupportedError(f"cannot compute the buffer {name!r} of {type(model).__name__}")
    return {name: found[name].to(buffer.dtype) for name, buffer in wanted.items()}


def _with_values(model: Any, dtype: torch.dtype) -> Any:
    """Return the same model with values in its buffers, and none in its parameters."""
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad(), no_init_weights(), _OnlyBuffers():
            twin = type(model)(copy.deepcopy(model.config))
        with torch.no_grad(), _OnlyBuffers():
            for parameter in twin.parameters():
                parameter._is_hf_initialized = True  # what `_init_weights` leaves alone
            _set_again(twin, twin)
    except UnsupportedError:
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        message = f"cannot compute the buffers of {type(model).__name__}: {text}"
        raise UnsupportedError(message) from error
    finally:
        torch.set_default_dtype(before)
    return twin


def _set_again(module: Any, owner: Any) -> None:
    """Set buffers as transformers does after loading: by the innermost model's `_init_weights`."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _set_again(child, owner)
    if getattr(module, "_non_persistent_buffers_set"):  # noqa: B009  (torch says it nowhere else)
        owner._init_weights(module)


class _OnlyBuffers(TorchDispatchMode):
    """Give no memory to tensors that are made empty (parameters), and none to very large ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.is_meta for x in given):
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, lambda x: x.to("meta"), (args, kwargs)
            )
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
        elif func in _EMPTY or (not given and _size(args) > _LARGEST):
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def _size(args: Iterable[Any]) -> int:
    """Return the number of values that a factory's arguments ask for."""
    first = next(iter(args), ())
    if isinstance(first, (list, tuple)) and all(isinstance(n, int) for n in first):
        size = 1
        for n in first:
            size *= n
        return size
    return max((abs(x) for x in args if isinstance(x, int)), default=0)


def check_rotary(model: torch.nn.Module) -> None:
    """Raise UnsupportedError where rotary frequencies change with a sequence's length, and for
    rotary parameters that nobody reads."""
    for _, module in model.named_modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        for one in kinds:
            if one == "longrope" or "dynamic" in str(one):
                raise UnsupportedError(
                    f"rotary embedding of type {one!r} is not supported: its frequencies depend "
                    "on the length of a sequence"
                )
    config: Any = model.config
    parameters = getattr(config, "rope_parameters", None) or {}
    own = set(getattr(config, "ignore_keys_at_rope_validation", None) or ())
    labels = set(getattr(config, "_rope_type_labels", None) or ())
    labels |= set(getattr(config, "layer_types", None) or ())
    nested = {k: v for k, v in parameters.items() if isinstance(v, dict) or (k in labels)}
    flat = {k: v for k, v in parameters.items() if k not in nested}
    for where in (flat, *(v for v in nested.values() if v)):
        for key in sorted(k for k, v in where.items() if v is not None):
            if key not in ROTARY | own:
                raise UnsupportedError(
                    f"rotary parameters with the key {key!r}, which nothing reads",
                    hint="remove it from config.json if the model is meant to ignore it",
                )
