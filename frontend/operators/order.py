"""What depends on the order of elements along an axis: sorting, medians, searching."""

from __future__ import annotations

from typing import Any

from ...ir.dtypes import BOOL, I64, U8
from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from ...ir.ops.index import TakeAlong
from ...ir.ops.reduce import ReduceSum, TopK
from ...ir.types import Dim, numel
from .context import Context, lowers


@lowers("aten.topk.default")
def topk(
    c: Context, x: Value, k: int, axis: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[Value, Value]:
    return ranked(c, x, k, axis, largest)


@lowers("aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable")
def sort(
    c: Context, x: Value, *rest: Any, stable: bool = False, dim: int = -1, descending: bool = False
) -> Any:
    positional = [r for r in rest if r is not None]
    if positional and isinstance(positional[0], bool):
        positional = positional[1:]  # `stable`: topk always is
    axis = positional[0] if positional else dim
    down = positional[1] if len(positional) > 1 else descending
    values, indices = ranked(c, x, whole_axis(c, x, axis), axis, down)
    return indices if "argsort" in c.operator else (values, indices)


def whole_axis(c: Context, x: Value, axis: int) -> int:
    """Return the size of an axis that is sorted."""
    size = x.type.shape[axis] if x.type.rank else 1
    if not isinstance(size, int):
        raise c.unsupported("sorting along an axis of symbolic size")
    return size


def ranked(c: Context, x: Value, k: Dim, axis: int, largest: bool) -> tuple[Value, Value]:
    """Return the `k` largest or smallest along `axis`, in order, and their indices."""
    if not isinstance(k, int):
        raise c.unsupported("a symbolic number of elements")
    dtype, shape = x.type.dtype, x.type.shape
    x = c.swap(c.row(c.cast(x, U8) if dtype == BOOL else x), axis, -1)
    values, indices = c.builder.add(TopK(k, largest), x)
    values = c.cast(values, dtype)
    if not shape:
        return c.reshape(values, ()), c.reshape(indices, ())
    return c.swap(values, axis, -1), c.swap(indices, axis, -1)


@lowers("aten.kthvalue.default")
def kthvalue(
    c: Context, x: Value, k: int, axis: int = -1, keep: bool = False
) -> tuple[Value, Value]:
    return _at_rank(c, x, k, axis)


def _at_rank(c: Context, x: Value, k: int, axis: int) -> tuple[Value, Value]:
    """Return the k-th smallest, counted from 1, and its index, shaped as the operator says."""
    values, indices = ranked(c, x, k, axis, False)
    if x.type.rank:
        at = c.axis(axis, x.type.rank)
        values, indices = (c.slice(v, at, k - 1, k) for v in (values, indices))
    shape = c.type.shape
    return c.reshape(values, shape), c.reshape(indices, shape)


@lowers("aten.median.default", "aten.median.dim")
def median(c: Context, x: Value, axis: int | None = None, keep: bool = False) -> Any:
    """The lower one of the two in the middle; NaN, the largest of all, where there is any."""
    alone = axis is None
    if axis is None:
        x, axis = c.reshape(x, (numel(x.type.shape),)), 0
    middle = _at_rank(c, x, (whole_axis(c, x, axis) + 1) // 2, axis)
    if x.type.dtype.is_float:
        last = _first_of_largest(c, x, axis)
        nan = c.emit(ew.Ne(), last[0], last[0])
        pairs = zip(last, middle, strict=True)
        middle = tuple(c.emit(ew.Where(), nan, one, other) for one, other in pairs)
    return middle[0] if alone else middle


def _first_of_largest(c: Context, x: Value, axis: int) -> tuple[Value, Value]:
    values, indices = ranked(c, x, 1, axis, True)
    return c.reshape(values, c.type.shape), c.reshape(indices, c.type.shape)


@lowers("aten.nanmedian.default", "aten.nanmedian.dim")
def nanmedian(c: Context, x: Value, axis: int | None = None, keep: bool = False) -> Any:
    """The median of the numbers, which are sorted before NaN; NaN where there are none."""
    alone = axis is None
    if axis is None:
        x, axis = c.reshape(x, (numel(x.type.shape),)), 0
    rows = c.swap(c.row(x), axis, -1)
    values, indices = ranked(c, rows, whole_axis(c, rows, -1), -1, False)
    numbers = c.cast(c.emit(ew.Eq(), rows, rows), I64)
    count = c.emit(ReduceSum((rows.type.rank - 1,), True), numbers)
    middle = c.apply(ew.Div(), c.apply(ew.Sub(), c.apply(ew.Maximum(), count, 1), 1), 2)
    shape = c.type.shape
    found = [c.reshape(c.swap(c.emit(TakeAlong(), v, middle), axis, -1), shape)
             for v in (values, indices)]  # fmt: skip
    return found[0] if alone else tuple(found)


@lowers("aten.searchsorted.Tensor", "aten.searchsorted.Scalar")
def searchsorted(
    c: Context, edges: Value, x: Any, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Value | None = None,
) -> Value:  # fmt: skip
    if sorter is not None:
        raise c.unsupported("searching by way of a sorter")
    return _count_below(c, edges, x, right or side == "right")


@lowers("aten.bucketize.Tensor", "aten.bucketize.Scalar")
def bucketize(
    c: Context, x: Any, edges: Value, *, out_int32: bool = False, right: bool = False
) -> Value:
    return _count_below(c, edges, x, right)


def _count_below(c: Context, edges: Value, x: Any, right: bool) -> Value:
    """Return how many edges of a row are below each number, or (`right`) not above it. All edges
    are, of NaN."""
    dtype = c.promoted
    edges, each = c.operand(edges, dtype), c.operand(x, dtype)
    each = c.reshape(each, (*each.type.shape, 1))
    if edges.type.rank > 1:
        edges = c.reshape(edges, (*edges.type.shape[:-1], 1, edges.type.shape[-1]))
    reached = c.emit(ew.Gt() if right else ew.Ge(), edges, each)
    below = c.cast(c.emit(ew.LogicalNot(), reached), c.dtype)
    return c.emit(ReduceSum((below.type.rank - 1,)), below)
