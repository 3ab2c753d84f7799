"""Composite ops of language models: attention over a paged cache, and routed experts.

Shapes: T tokens of any number of sequences, S sequences, P pages of a sequence, B pages in the
cache, G slots of a page, H heads, D values of a head, E experts, k experts of a token.
"""

from __future__ import annotations

import numpy as np

from ..dtypes import I64
from ..op import Op, expect, register
from ..types import TensorType


@register("cache_update")
class CacheUpdate(Op):
    """Put `values[T,H,D]` into the cache `[B,H,G,D]` at flat slots `slots[T]` (page·G + place).

    A head's rows of a page lie one after the other: attention reads them as one stream.
    """

    updates = 0

    def infer(
        self, cache: TensorType, values: TensorType, slots: TensorType
    ) -> tuple[TensorType, ...]:
        ok = cache.rank == 4 and values.rank == 3
        ok = ok and (cache.shape[1], cache.shape[3]) == values.shape[1:]
        ok = ok and slots.shape == values.shape[:1] and slots.dtype == I64
        expect(ok, f"cache_update of {cache} with {values} at {slots}")
        return (cache,)

    def reference(self, cache, values, slots):
        out = cache.copy()
        size = cache.shape[2]
        out[slots // size, :, slots % size] = values
        return out


@register("attention")
class Attention(Op):
    """Causal attention of ragged tokens over a paged cache.

    `q[T,H,D]`, `keys[B,Hkv,G,D]`, `values[B,Hkv,G,Dv']`, `positions i64[T]`, `sequence i64[T]`
    (index of a token's sequence), `pages i64[S,P]` (the pages of every sequence) →
    `[T,H,value_dim]`. Token t sees the places 0…positions[t] of its sequence, or the last
    `window` of them; one with a negative position sees none and is zero, as is one whose scores are
    all -inf. Each of the Hkv key heads serves H/Hkv query heads. Only the first
    `value_dim` numbers of a value row are used, so that latent attention can pass its one cache
    twice.
    """

    scale: float
    value_dim: int
    window: int | None = None

    def infer(
        self,
        q: TensorType,
        keys: TensorType,
        values: TensorType,
        positions: TensorType,
        sequence: TensorType,
        pages: TensorType,
    ) -> tuple[TensorType, ...]:
        ok = q.rank == 3 and keys.rank == 4 and values.rank == 4 and pages.rank == 2
        expect(ok, f"attention of {q} over {keys} and {values} with pages {pages}")
        ok = keys.shape[:3] == values.shape[:3] and q.shape[2] == keys.shape[3]
        ok = ok and q.shape[1] % keys.shape[1] == 0 and self.value_dim <= values.shape[3]
        expect(ok, f"attention heads do not fit: {q}, {keys}, {values}")
        meta = positions.shape == sequence.shape == q.shape[:1]
        expect(meta, f"attention: {positions} and {sequence} do not fit {q}")
        return (q.with_shape((*q.shape[:2], self.value_dim)),)

    def reference(self, q, keys, values, positions, sequence, pages):
        group = q.shape[1] // keys.shape[1]
        page_size = keys.shape[2]
        out = np.zeros((*q.shape[:2], self.value_dim), q.dtype)
        for t in range(q.shape[0]):
            last = int(positions[t])
            first = 0 if self.window is None else max(0, last + 1 - self.window)
            places = np.arange(first, last + 1)
            page, place = pages[sequence[t], places // page_size], places % page_size
            k = np.repeat(keys[page, :, place], group, axis=1)
            v = np.repeat(values[page, :, place, : self.value_dim], group, axis=1)
            scores = np.einsum("hd,nhd->hn", q[t], k) * self.scale
            highest = scores.max(axis=1, keepdims=True, initial=-np.inf)
            weights = np.exp(scores - np.where(highest == -np.inf, 0.0, highest))
            total = weights.sum(axis=1, keepdims=True)
            weights /= np.where(total == 0, 1.0, total)
            out[t] = np.einsum("hn,nhd->hd", weights, v)
        return out


ACTIVATIONS = {
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@register("experts")
class Experts(Op):
    """Routed experts, with `e = indices[t,j]` and `·` a matrix-vector product:
    `Σ_j weights[t,j] * (down[e] · (act(gate[e] · x[t]) * (up[e] · x[t])))`.

    `x[T,H]`, `indices i64[T,k]`, `weights[T,k]`, `gate_up[E,2,I,H]`, `down[E,H,I]` → `[T,H]`.
    """

    activation: str = "silu"

    def infer(
        self,
        x: TensorType,
        indices: TensorType,
        weights: TensorType,
        gate_up: TensorType,
        down: TensorType,
    ) -> tuple[TensorType, ...]:
        expect(self.activation in ACTIVATIONS, f"unknown activation {self.activation!r}")
        ok = x.rank == 2 and indices.shape == weights.shape and indices.shape[0] == x.shape[0]
        ok = ok and gate_up.rank == 4 and down.rank == 3 and gate_up.shape[1] == 2
        expect(ok, f"experts of {x} with {indices}, {weights}, {gate_up}, {down}")
        e, _, i, h = gate_up.shape
        expect(down.shape == (e, h, i) and x.shape[1] == h, f"experts: {gate_up} against {down}")
        return (x,)

    def reference(self, x, indices, weights, gate_up, down):
        act = ACTIVATIONS[self.activation]
        out = np.zeros_like(x)
        for e in np.unique(indices):
            rows, slots = np.nonzero(indices == e)
            hidden = act(x[rows] @ gate_up[e, 0].T) * (x[rows] @ gate_up[e, 1].T)
            np.add.at(out, rows, weights[rows, slots][:, None] * (hidden @ down[e].T))
        return out
