"""Gathers: embedding, and indexing by tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.dtypes import BOOL, I64
from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from ...ir.ops.index import Iota, Take, TakeAlong
from ...ir.types import Dim, broadcast, numel
from .context import Context, lowers


@lowers("aten.embedding.default")
def embedding(c: Context, table: Value, indices: Value, *_: Any) -> Value:
    node = c.producer(table)
    if node is not None and isinstance(node.op, ew.Cast):  # convert the rows, not the table
        return c.cast(c.emit(Take(), node.inputs[0], indices), c.dtype)
    return c.cast(c.emit(Take(), table, indices), c.dtype)


def take_axis(c: Context, x: Value, axis: int, indices: Value) -> Value:
    """Return `x` with `axis` replaced by the axes of `indices`."""
    if x.type.shape[axis] == 0:
        raise c.unsupported("indexing an axis that has no elements")
    rank, more = x.type.rank, indices.type.rank
    front = c.transpose(x, [axis, *(a for a in range(rank) if a != axis)])
    out = c.emit(Take(), front, indices)
    order = [*range(more, more + axis), *range(more), *range(more + axis, rank - 1 + more)]
    return c.transpose(out, order)


@lowers("aten.index_select.default")
def index_select(c: Context, x: Value, axis: int, indices: Value) -> Value:
    x = c.row(x)
    return c.reshape(take_axis(c, x, c.axis(axis, x.type.rank), indices), c.type.shape)


def wrapped(c: Context, indices: Value, size: Dim) -> Value:
    """Return indices with the negative ones counted from the end."""
    indices = c.cast(indices, I64)
    if c.trust_indices:
        return indices
    low = c.apply(ew.Lt(), indices, 0)
    return c.emit(ew.Where(), low, c.emit(ew.Add(), indices, c.size(size, I64)), indices)


@lowers("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    """Indexed axes become one axis of combined indices, at the front unless they are neighbours."""
    used = [(a, i) for a, i in enumerate(indices) if i is not None]
    if any(i.type.dtype == BOOL for _, i in used):
        raise c.unsupported("indexing by a mask, whose result's size depends on data")
    axes = [a for a, _ in used]
    first = axes[0]
    if axes != list(range(first, first + len(axes))):
        x = c.transpose(x, [*axes, *(a for a in range(x.type.rank) if a not in axes)])
        first = 0
    shape = broadcast(*(i.type.shape for _, i in used))
    sizes = x.type.shape[first : first + len(used)]
    flat = combined(c, [i for _, i in used], sizes)
    after = x.type.shape[first + len(used) :]
    x = c.reshape(x, (*x.type.shape[:first], numel(sizes), *after))
    return take_axis(c, x, first, c.broadcast(flat, shape))


def combined(c: Context, indices: Sequence[Value], sizes: Sequence[Dim]) -> Value:
    """Return the indices of axes of these sizes as those of the axes made one."""
    flat: Value | None = None
    for i, size in zip(indices, sizes, strict=True):
        i = wrapped(c, i, size)
        if flat is not None:
            i = c.emit(ew.Add(), c.emit(ew.Mul(), flat, c.size(size, I64)), i)
        flat = i
    assert flat is not None
    return flat


@lowers("aten.gather.default")
def gather(c: Context, x: Value, axis: int, indices: Value, **_: Any) -> Value:
    if x.type.rank == 0:
        return c.broadcast(x, c.type.shape)
    axis = c.axis(axis, x.type.rank)
    if x.type.shape[axis] == 0:
        raise c.unsupported("indexing an axis that has no elements")
    if indices.type.rank == 0:
        return c.reshape(gather(c, x, axis, c.row(indices)), ())
    for a, size in enumerate(indices.type.shape):
        if a != axis:
            x = c.slice(x, a, 0, size)
    return c.swap(c.emit(TakeAlong(), c.swap(x, axis, -1), c.swap(indices, axis, -1)), axis, -1)


@lowers("aten.take_along_dim.default")
def take_along_dim(c: Context, x: Value, indices: Value, axis: int | None = None) -> Value:
    if axis is None:
        raise c.unsupported("taking along all axes at once")
    axis = c.axis(axis, x.type.rank)
    lead = [1 if a == axis else d for a, d in enumerate(x.type.shape)]
    other = [1 if a == axis else d for a, d in enumerate(indices.type.shape)]
    both = broadcast(tuple(lead), tuple(other))
    x = c.broadcast(x, [x.type.shape[a] if a == axis else d for a, d in enumerate(both)])
    spread = [indices.type.shape[a] if a == axis else d for a, d in enumerate(both)]
    return gather(c, x, axis, c.broadcast(indices, spread))


@lowers("aten.one_hot.default")
def one_hot(c: Context, x: Value, _: int = -1) -> Value:
    classes = c.type.shape[-1]
    each = c.reshape(x, (*x.type.shape, 1))
    return c.cast(c.emit(ew.Eq(), each, c.emit(Iota(classes, x.type.dtype))), c.dtype)


@lowers("aten.flip.default")
def flip(c: Context, x: Value, axes: Sequence[int]) -> Value:
    for axis in c.axes(axes, x.type.rank) if axes else ():
        size = x.type.shape[axis]
        last = c.operand(size - 1, I64)
        x = take_axis(c, x, axis, c.emit(ew.Sub(), last, c.emit(Iota(size))))
    return x
