"""Writing to places that indices tell: scatter, index_put, index_add and their kin.

No place is written to: each element of the outcome looks for what is meant for it, among all that
is put along the axis. So nothing depends on an order of threads, and sums are exact to the bit
from run to run; the work grows with the axis times the number of indices, and no buffer holds it.
Of several values for one place the last counts, as in torch on CPUs (which promises none of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.dtypes import BOOL, I64
from ...ir.graph import Value
from ...ir.op import Op
from ...ir.ops import elementwise as ew
from ...ir.ops.index import Concat, Iota, Take, TakeAlong
from ...ir.ops.reduce import ReduceMax, ReduceMin, ReduceProd, ReduceSum
from ...ir.types import Dim, broadcast, dim, numel
from .context import Context, lowers
from .elementwise import truth
from .index import combined, wrapped
from .reduce import accumulator, smallest

#: By torch's names of reductions. What is put is reduced with what is there, or replaces it.
_REDUCTIONS: dict[str, type[Op]] = {
    "add": ReduceSum, "sum": ReduceSum, "mean": ReduceSum, "multiply": ReduceProd,
    "prod": ReduceProd, "amax": ReduceMax, "amin": ReduceMin,
}  # fmt: skip
_TWO: dict[type[Op], type[Op]] = {
    ReduceSum: ew.Add, ReduceProd: ew.Mul, ReduceMax: ew.Maximum, ReduceMin: ew.Minimum,
}  # fmt: skip


@dataclass(frozen=True)
class Puts:
    """What is put into the rows of `x` `[…, N]`: `values` `[…, M]` at `places` `[…, M]`, of which
    those that are no index are left out. `hits` `[…, N, M]` says which are meant for an element."""

    c: Context
    x: Value
    values: Value
    places: Value

    @property
    def hits(self) -> Value:
        c, size = self.c, self.x.type.shape[-1]
        each = c.reshape(self.places, (*self.places.type.shape[:-1], 1, self.places.type.shape[-1]))
        return c.emit(ew.Eq(), each, c.reshape(c.emit(Iota(size)), (size, 1)))

    def chosen(self, x: Value, op: type[Op], otherwise: Any) -> Value:
        """Reduce, for each element, those numbers of `x` `[…, M]` that are put there."""
        c = self.c
        each = c.reshape(x, (*x.type.shape[:-1], 1, x.type.shape[-1]))
        kept = c.emit(ew.Where(), self.hits, each, c.operand(otherwise, x.type.dtype))
        return c.emit(op((kept.type.rank - 1,), False), kept)  # type: ignore[call-arg]

    @property
    def last(self) -> Value:
        """The number of the last value for each element, -1 where there is none."""
        numbers = self.c.emit(Iota(self.places.type.shape[-1]))
        numbers = self.c.broadcast(numbers, self.places.type.shape)
        return self.chosen(numbers, ReduceMax, -1)

    def replaced(self) -> Value:
        """Return `x` with the last value for each place."""
        c, last = self.c, self.last
        at = c.apply(ew.Maximum(), last, 0)
        return c.emit(
            ew.Where(), c.apply(ew.Ge(), last, 0), c.emit(TakeAlong(), self.values, at), self.x
        )

    def reduced(self, kind: str, include: bool) -> Value:
        """Return `x` with all values for each place reduced, together with what was there unless
        that is left out."""
        c, op, dtype = self.c, _REDUCTIONS[kind], self.x.type.dtype
        wide = accumulator(c, dtype) if op in (ReduceSum, ReduceProd) and dtype != BOOL else dtype
        neutral = (
            0 if op is ReduceSum else 1 if op is ReduceProd else smallest(dtype, op is ReduceMax)
        )
        x, values = c.cast(self.x, wide), c.cast(self.values, wide)
        made = self.chosen(values, op, neutral)
        hit = c.apply(ew.Ge(), self.last, 0)
        if include:
            made = c.emit(_TWO[op](), x, made)
        if kind == "mean":
            made = self._mean(made, include)
        return c.cast(c.emit(ew.Where(), hit, made, x), dtype)

    def _mean(self, total: Value, include: bool) -> Value:
        c = self.c
        ones = c.broadcast(c.operand(1, I64), self.places.type.shape)
        count = self.chosen(ones, ReduceSum, 0)
        count = c.apply(ew.Add(), count, 1) if include else c.apply(ew.Maximum(), count, 1)
        return c.emit(ew.Div(), total, c.cast(count, total.type.dtype))


def puts_along(c: Context, x: Value, axis: int, indices: Value, values: Any) -> Puts:
    """Return what a scatter along an axis puts. Indices may be fewer than the rows, values more
    than the indices."""
    x, indices = c.row(x), c.row(indices)
    axis = c.axis(axis, x.type.rank)
    shape = indices.type.shape
    if isinstance(values, Value) and values.type.rank:
        for a, size in enumerate(shape):
            values = c.slice(values, a, 0, size)
    else:
        values = c.broadcast(c.operand(values, x.type.dtype), shape)
    indices = c.cast(indices, I64)
    for a, size in enumerate(x.type.shape):
        if a != axis:
            indices = _extended(c, indices, a, size, -1)
            values = _extended(c, values, a, size, 0)
    return Puts(c, *(c.swap(v, axis, -1) for v in (x, values, indices)))


def _extended(c: Context, x: Value, axis: int, size: Dim, number: int) -> Value:
    """Return `x` with an axis of this size, what is new holding a number."""
    more = dim(size - x.type.shape[axis])
    if more == 0:
        return x
    shape = (*x.type.shape[:axis], more, *x.type.shape[axis + 1 :])
    return c.emit(Concat(axis), x, c.fill(number, x.type.with_shape(shape)))


def _back(c: Context, x: Value, axis: int) -> Value:
    """Return an outcome of puts along an axis as the operator has it."""
    rank = x.type.rank
    return c.reshape(c.swap(x, c.axis(axis, rank), -1), c.type.shape)


@lowers("aten.scatter.value", "aten.scatter.src")
def scatter(c: Context, x: Value, axis: int, indices: Value, values: Any) -> Value:
    if 0 in indices.type.shape:
        return x
    return _back(c, puts_along(c, x, axis, indices, values).replaced(), axis)


@lowers("aten.scatter_add.default")
def scatter_add(c: Context, x: Value, axis: int, indices: Value, values: Value) -> Value:
    return scatter_reduce(c, x, axis, indices, values, "sum")


@lowers("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter_with(
    c: Context, x: Value, axis: int, indices: Value, values: Any, *, reduce: str
) -> Value:
    return scatter_reduce(c, x, axis, indices, values, reduce)


@lowers("aten.scatter_reduce.two")
def scatter_reduce(
    c: Context, x: Value, axis: int, indices: Value, values: Any, reduce: str,
    *, include_self: bool = True,
) -> Value:  # fmt: skip
    if 0 in indices.type.shape:
        return x
    return _back(c, puts_along(c, x, axis, indices, values).reduced(reduce, include_self), axis)


# ------------------------------------------------------------------------- whole parts


@dataclass(frozen=True)
class Parts:
    """Whole parts of `x` `[N, …]` that are put: `values` `[M, …]` at `places` `[M]`."""

    c: Context
    x: Value
    values: Value
    places: Value

    def made(self, kind: str | None, include: bool = True) -> Value:
        """Return `x` with the parts in their places, or reduced with what is there."""
        c = self.c
        rank = self.x.type.rank
        if kind is None:
            rows = Puts(c, c.emit(Iota(self.x.type.shape[0])), self.places, self.places)
            last = rows.last
            taken = c.emit(Take(), self.values, c.apply(ew.Maximum(), last, 0))
            hit = c.reshape(c.apply(ew.Ge(), last, 0), (last.type.shape[0], *[1] * (rank - 1)))
            return c.emit(ew.Where(), hit, taken, self.x)
        order = [*range(1, rank), 0]
        x, values = c.transpose(self.x, order), c.transpose(self.values, order)
        made = Puts(c, x, values, self.places).reduced(kind, include)
        return c.transpose(made, [rank - 1, *range(rank - 1)])


def _to_front(c: Context, x: Value, axis: int) -> Value:
    return c.transpose(x, [axis, *(a for a in range(x.type.rank) if a != axis)])


def _from_front(c: Context, x: Value, axis: int) -> Value:
    return c.transpose(x, [*range(1, axis + 1), 0, *range(axis + 1, x.type.rank)])


def _parts(c: Context, x: Value, axis: int, indices: Value, values: Any, kind: str | None,
           include: bool = True) -> Value:  # fmt: skip
    """Return `x` with parts along an axis put where indices say."""
    whole = c.row(x)
    axis = c.axis(axis, whole.type.rank)
    indices = wrapped(c, c.row(indices), whole.type.shape[axis])
    if indices.type.shape[0] == 0:
        return x
    shape = [indices.type.shape[0] if a == axis else d for a, d in enumerate(whole.type.shape)]
    values = c.operand(values, x.type.dtype)
    values = c.reshape(values, shape) if values.type.rank else c.broadcast(values, shape)
    moved, values = _to_front(c, whole, axis), _to_front(c, values, axis)
    made = Parts(c, moved, values, indices).made(kind, include)
    return c.reshape(_from_front(c, made, axis), x.type.shape)


@lowers("aten.index_add.default")
def index_add(
    c: Context, x: Value, axis: int, indices: Value, values: Value, *, alpha: Any = 1
) -> Value:
    if alpha != 1:
        values = c.apply(ew.Mul(), values, alpha)
    return _parts(c, x, axis, indices, values, "sum")


@lowers("aten.index_copy.default")
def index_copy(c: Context, x: Value, axis: int, indices: Value, values: Value) -> Value:
    return _parts(c, x, axis, indices, values, None)


@lowers("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(c: Context, x: Value, axis: int, indices: Value, value: Any) -> Value:
    return _parts(c, x, axis, indices, value, None)


@lowers("aten.index_reduce.default")
def index_reduce(
    c: Context, x: Value, axis: int, indices: Value, values: Value, reduce: str,
    *, include_self: bool = True,
) -> Value:  # fmt: skip
    return _parts(c, x, axis, indices, values, reduce, include_self)


@lowers("aten.index_put.default", "aten._unsafe_index_put.default")
def index_put(
    c: Context, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> Value:
    """Indices of several axes are brought to the front and combined to one; a mask chooses."""
    used = [(a, i) for a, i in enumerate(indices) if i is not None]
    if any(i.type.dtype == BOOL for _, i in used):
        return _masked(c, x, used, values, accumulate)
    axes = [a for a, _ in used]
    order = [*axes, *(a for a in range(x.type.rank) if a not in axes)]
    front = c.transpose(x, order)
    sizes, rest = front.type.shape[: len(axes)], front.type.shape[len(axes) :]
    shape = broadcast(*(i.type.shape for _, i in used))
    if 0 in shape:
        return x
    flat = combined(c, [i for _, i in used], sizes)
    places = c.reshape(c.broadcast(flat, shape), (numel(shape),))
    values = _beside_indices(c, values, axes, shape, rest)
    whole = c.reshape(front, (numel(sizes), *rest))
    parts = Parts(c, whole, c.reshape(values, (numel(shape), *rest)), places)
    made = c.reshape(parts.made("sum" if accumulate else None), front.type.shape)
    return c.transpose(made, [order.index(a) for a in range(x.type.rank)])


def _beside_indices(
    c: Context, values: Value, axes: Sequence[int], shape: Sequence[Dim], rest: Sequence[Dim]
) -> Value:
    """Return values broadcast to what indexing gives, the axes of indices first.

    Indexing leaves those where the indexed axes are, if these are neighbours.
    """
    first = axes[0] if list(axes) == list(range(axes[0], axes[0] + len(axes))) else 0
    values = c.broadcast(values, (*rest[:first], *shape, *rest[first:]))
    width = len(shape)
    order = [*range(first, first + width), *range(first), *range(first + width, values.type.rank)]
    return c.transpose(values, order)


def _masked(
    c: Context, x: Value, used: Sequence[tuple[int, Value]], values: Value, accumulate: bool
) -> Value:
    """Put one number wherever a mask holds; how many several would be depends on data."""
    (axis, mask), *more = used
    if more or numel(values.type.shape) != 1:
        raise c.unsupported("putting more than one number where a mask holds")
    after = x.type.rank - axis - mask.type.rank
    mask = c.reshape(mask, (*mask.type.shape, *[1] * after))
    number = c.cast(c.reshape(values, ()), x.type.dtype)
    if accumulate:
        number = c.emit(ew.LogicalOr() if x.type.dtype == BOOL else ew.Add(), x, number)
    return c.emit(ew.Where(), mask, number, x)


@lowers("aten.put.default")
def put(c: Context, x: Value, indices: Value, values: Value, accumulate: bool = False) -> Value:
    """The elements lie in a row."""
    if 0 in indices.type.shape:
        return x
    flat = c.reshape(x, (numel(x.type.shape),))
    places = c.reshape(wrapped(c, indices, flat.type.shape[0]), (numel(indices.type.shape),))
    parts = Parts(c, flat, c.reshape(values, places.type.shape), places)
    return c.reshape(parts.made("sum" if accumulate else None), x.type.shape)


@lowers("aten.masked_scatter.default")
def masked_scatter(c: Context, x: Value, mask: Value, values: Value) -> Value:
    """The n-th place where the mask holds, in the order of elements, gets the n-th value."""
    shape = broadcast(x.type.shape, mask.type.shape)
    size = numel(shape)
    x, mask = (c.reshape(c.broadcast(v, shape), (size,)) for v in (x, truth(c, mask)))
    row = c.reshape(c.emit(Iota(size)), (size, 1))
    before = c.emit(ew.LogicalAnd(), c.emit(ew.Lt(), c.emit(Iota(size)), row), mask)
    number = c.emit(ReduceSum((1,)), c.cast(before, I64))
    taken = c.emit(Take(), c.reshape(values, (numel(values.type.shape),)), number)
    return c.reshape(c.emit(ew.Where(), mask, taken, x), c.type.shape)
