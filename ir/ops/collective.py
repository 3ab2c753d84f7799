"""Ops in which ranks of a mesh take part together.

All ranks run the same graph; what a collective makes on one rank depends on what the others of
its group hold.

Shapes: T tokens of this rank, H numbers of a token, k experts of a token, A assignments of tokens
to experts that a rank works on at once, N ranks of a group, E experts held by a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import DiluError
from ..dtypes import I64
from ..graph import Function
from ..mesh import AXES
from ..op import Op, expect, register
from ..types import TensorType
from .control import Subprogram


class Collective(Op):
    """Base: one output, which comes of what all ranks of a group along `axis` put in."""

    axis: str

    def reference_ranks(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Return what every rank of a group gets, given the input of each."""
        raise NotImplementedError

    def reference(self, *inputs: np.ndarray) -> np.ndarray:
        raise DiluError(f"{self.name} is of all ranks together", hint="use interpret_ranks")


@register("all_reduce")
class AllReduce(Collective):
    """The sum of the ranks' inputs, added in the order of the ranks."""

    axis: str

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        expect(self.axis in AXES, f"unknown axis {self.axis!r}")
        expect(x.dtype.is_float, f"all_reduce takes floats, not {x}")
        return (x,)

    def reference_ranks(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return total


@register("all_gather")
class AllGather(Collective):
    """The inputs of `ranks` ranks, one after another along dimension `dim`."""

    axis: str
    dim: int
    ranks: int

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        expect(self.axis in AXES, f"unknown axis {self.axis!r}")
        expect(0 <= self.dim < x.rank and self.ranks > 0, f"all_gather: {x} has no axis {self.dim}")
        sizes = (d * self.ranks if i == self.dim else d for i, d in enumerate(x.shape))
        return (x.with_shape(sizes),)

    def reference_ranks(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(inputs, self.dim)


@register("routed")
class Routed(Subprogram):
    """What `body` makes of every token for each of its experts, at a rank that holds the expert.

    `x[T,H]`, `indices i64[T,k]`, `placement i64[N,E]` (the experts in the slots of every rank of
    `axis`), then the body's constants → `[T,k,H]`. The body takes the rows that came to a rank,
    `[A,H]`, and their slots, `i64[A,1]`, and returns `[A,H]`, which may be of another type; it is
    run as often as it takes for `capacity` rows at a time. Of several ranks that hold an expert,
    tokens choose one in turn.
    """

    axis: str
    capacity: int
    body: Function

    @property
    def own(self) -> int:
        return 3

    def infer(
        self, x: TensorType, indices: TensorType, placement: TensorType, *constants: TensorType
    ) -> tuple[TensorType, ...]:
        expect(self.axis in AXES, f"unknown axis {self.axis!r}")
        ok = x.rank == 2 and indices.rank == 2 and indices.shape[:1] == x.shape[:1]
        ok = ok and indices.dtype == I64 and placement.dtype == I64 and placement.rank == 2
        expect(ok, f"routed: {x}, {indices} and {placement} do not fit")
        expect(self.capacity > 0, "routed: the capacity is a number of rows")
        body = self.body
        expect(len(body.parameters) == 2 and not body.states, "routed: the body takes rows, slots")
        rows, slots = (v.type for v in body.parameters)
        ok = rows.with_shape(x.shape) == x and slots.dtype == I64
        made = [v.type for v in body.results]
        ok = ok and slots.shape == (rows.shape[0], 1) and [t.shape for t in made] == [rows.shape]
        expect(ok, f"routed: the body maps {rows} and {slots} to rows like {x}")
        fits = constants == tuple(c.type for c in body.constants)
        expect(fits, f"routed: the constants do not fit @{body.name}")
        return (made[0].with_shape((x.shape[0], indices.shape[1], x.shape[1])),)

    def reference_ranks(
        self,
        inputs: Sequence[tuple[np.ndarray, ...]],
        run: Callable[[int, tuple[np.ndarray, ...]], np.ndarray],
    ) -> list[np.ndarray]:
        """Return the output of every rank of a group, given the inputs of each.

        `run(n, inputs)` runs the body on the n-th rank.
        """
        outputs: list[np.ndarray] = []
        for holder, (_, _, placement, *constants) in enumerate(inputs):
            wanted = [
                assignments_for(holder, source, indices, placement)
                for source, (_, indices, *_) in enumerate(inputs)
            ]
            rows = np.concatenate([x[t] for (x, *_), (t, _, _) in zip(inputs, wanted, strict=True)])
            slots = np.concatenate([slots for _, _, slots in wanted])[:, None]
            rounds = [
                run(holder, (rows[n : n + self.capacity], slots[n : n + self.capacity], *constants))
                for n in range(0, max(len(rows), 1), self.capacity)
            ]
            made = np.concatenate(rounds)
            if not outputs:
                outputs = [np.zeros((*i.shape, x.shape[1]), made.dtype) for x, i, *_ in inputs]
            ends = np.cumsum([len(t) for t, _, _ in wanted])[:-1]
            for out, (t, j, _), own in zip(outputs, wanted, np.split(made, ends), strict=True):
                out[t, j] = own
        return outputs


def assignments_for(
    holder: int, source: int, indices: np.ndarray, placement: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (token, choice, slot) of what the `source`-th rank sends to the `holder`-th one."""
    tokens, choices = np.nonzero(np.ones_like(indices, bool))
    experts = np.clip(indices.reshape(-1), 0, placement.max())
    own = np.full(placement.max() + 1, -1)
    own[placement[holder]] = np.arange(placement.shape[1])
    copies = np.bincount(placement.reshape(-1))[experts]
    # The n-th copy of an expert is with the n-th rank that holds it.
    number = np.bincount(placement[:holder].reshape(-1), minlength=len(own))[experts]
    mine = (own[experts] >= 0) & ((tokens + source) % copies == number)
    return tokens[mine], choices[mine], own[experts[mine]]
