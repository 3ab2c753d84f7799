"""The operators that transformers models reach through its attention and experts interfaces.

They are declared here as torch custom ops without an implementation: they exist on fake tensors
only, while a model is captured. What an attention node does not say (positions, cache pages, …)
are inputs of the function it stands in, found by their roles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.graph import Value
from ...ir.ops.index import Reshape
from ...ir.ops.language import Attention, CacheUpdate, Experts
from ...ir.types import Shape
from .context import Context, lowers

#: Inputs of a function with attention, in order: see `Attention` and `CacheUpdate`.
PAGING = ("positions", "sequence", "slots", "pages")


@torch.library.custom_op("dilu::attention", mutates_args=())
def attention_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention: `query[1,H,T,D]`, `key[1,Hkv,T,D]`, `value[1,Hkv,T,Dv]` → `[1,H,T,Dv]`."""
    raise NotImplementedError


def _fake_attention(query, key, value, scale, window):
    return query.new_empty((*query.shape[:3], value.shape[3]))


torch.library.register_fake("dilu::attention", _fake_attention)


@torch.library.custom_op("dilu::experts", mutates_args=())
def experts_op(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Routed experts: `x[T,H]`, `gate_up[E,2I,H]`, `down[E,H,I]` → `[T,H]`."""
    raise NotImplementedError


def _fake_experts(x, indices, weights, gate_up, down, activation):
    return torch.empty_like(x)


torch.library.register_fake("dilu::experts", _fake_experts)


@torch.library.custom_op("dilu::layers", mutates_args=())
def layers_op(hidden: torch.Tensor, invariants: list[torch.Tensor], run: int) -> torch.Tensor:
    """A run of equal decoder layers, `hidden[T,H]` → `[T,H]`."""
    raise NotImplementedError


def _fake_layers(hidden, invariants, run):
    return torch.empty_like(hidden)


torch.library.register_fake("dilu::layers", _fake_layers)


@lowers("dilu.attention.default")
def attention(
    c: Context, query: Value, key: Value, value: Value, scale: float, window: int | None
) -> Value:
    """Heads go last but one; keys and values go to the caches, which attention reads."""
    q, k, v = (tokens_first(c, x) for x in (query, key, value))
    positions, sequence, slots, pages = (c.role(r) for r in PAGING)
    keys = c.emit(CacheUpdate(), c.role("keys"), c.cast(k, c.role("keys").type.dtype), slots)
    values = c.emit(CacheUpdate(), c.role("values"), c.cast(v, c.role("values").type.dtype), slots)
    c.roles.update(new_keys=keys, new_values=values)
    width = v.type.shape[-1]
    if not isinstance(width, int):
        raise c.unsupported("a symbolic size of values")
    out = c.emit(Attention(scale, width, window), q, keys, values, positions, sequence, pages)
    return c.reshape(c.transpose(out, (1, 0, 2)), c.type.shape)


def tokens_first(c: Context, x: Value) -> Value:
    """Return `x[1,H,T,D]` as `[T,H,D]`."""
    return c.transpose(c.reshape(x, x.type.shape[1:]), (1, 0, 2))


@lowers("dilu.experts.default")
def experts(
    c: Context,
    x: Value,
    indices: Value,
    weights: Value,
    gate_up: Value,
    down: Value,
    activation: str,
) -> Value:
    e, both, h = gate_up.type.shape
    gates = stacked(c, gate_up, (e, 2, both // 2, h))
    inputs = c.wide(x), indices, c.wide(weights), c.wide(gates), c.wide(down)
    return c.result(c.emit(Experts(activation), *inputs))


def stacked(c: Context, x: Value, shape: Shape) -> Value:
    """Return `x` in `shape`, which it may have been reshaped from."""
    node = c.producer(x)
    if node is not None and isinstance(node.op, Reshape) and node.inputs[0].type.shape == shape:
        return node.inputs[0]
    return c.reshape(x, shape)


@lowers("dilu.layers.default")
def layers(c: Context, hidden: Value, invariants: Sequence[Value], run: int) -> Value:
    if c.layers is None:
        raise c.unsupported("a run of layers outside of a language model")
    return c.layers(run, (hidden, *invariants))
