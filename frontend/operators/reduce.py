"""Reductions, scans and selection along axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.dtypes import BOOL, F32, DType, promote
from ...ir.graph import Value
from ...ir.op import Op
from ...ir.ops import elementwise as ew
from ...ir.ops.reduce import ArgMax, ReduceMax, ReduceMin, ReduceProd, ReduceSum
from ...ir.ops.reduce import extreme as extreme_of
from ...ir.types import Dim, numel
from .context import Context, lowers
from .elementwise import truth

Axes = int | Sequence[int] | None


def reduced(c: Context, op: type[Op], x: Value, axes: Axes, keep: bool) -> Value:
    """Reduce over axes, of which none and an empty list mean all."""
    over = c.axes(axes, x.type.rank)
    return c.emit(op(over, keep), x) if over else x  # type: ignore[call-arg]


def count(c: Context, x: Value, axes: Axes) -> Dim:
    """Return the number of elements that are reduced to one."""
    return numel(tuple(x.type.shape[a] for a in c.axes(axes, x.type.rank)))


def accumulator(c: Context, dtype: DType) -> DType:
    """Return the type that a sum to `dtype` is held in."""
    return promote(dtype, F32) if dtype.is_float else dtype


def summand(c: Context, x: Value) -> Value:
    """Return what is summed: `dtype` converts what goes in, not only what comes out."""
    return c.cast(c.cast(x, c.dtype), accumulator(c, c.dtype))


@lowers("aten.sum.default", "aten.sum.dim_IntList")
def sum_(c: Context, x: Value, axes: Axes = None, keep: bool = False, **_: Any) -> Value:
    return c.result(reduced(c, ReduceSum, summand(c, x), axes, keep))


@lowers("aten.prod.default", "aten.prod.dim_int")
def prod(c: Context, x: Value, axis: int | None = None, keep: bool = False, **_: Any) -> Value:
    return c.result(reduced(c, ReduceProd, summand(c, x), axis, keep))


@lowers("prims.prod.default")
def prod_of_axes(c: Context, x: Value, axes: Sequence[int] | None, **_: Any) -> Value:
    return c.result(reduced(c, ReduceProd, summand(c, x), axes, False))


@lowers("aten.mean.default", "aten.mean.dim")
def mean(c: Context, x: Value, axes: Axes = None, keep: bool = False, **_: Any) -> Value:
    return c.result(average(c, summand(c, x), axes, keep))


def average(c: Context, x: Value, axes: Axes, keep: bool) -> Value:
    """Return the mean over axes, in the element type of `x`."""
    total = reduced(c, ReduceSum, x, axes, keep)
    return c.apply(ew.Div(), total, c.size(count(c, x, axes), x.type.dtype))


@lowers("aten.var.correction", "aten.std.correction", "aten.var_mean.correction")
def var(
    c: Context, x: Value, axes: Axes = None, correction: float | None = None, keepdim: bool = False
) -> Any:
    wide = c.wide(x)
    mean_ = average(c, wide, axes, True)
    centred = c.emit(ew.Sub(), wide, mean_)
    total = reduced(c, ReduceSum, c.emit(ew.Mul(), centred, centred), axes, keepdim)
    size = c.size(count(c, x, axes), wide.type.dtype)
    less = 1 if correction is None else correction
    if less:  # of one number: 0 / 0
        size = c.apply(ew.Maximum(), c.apply(ew.Sub(), size, less), 0)
    value = c.emit(ew.Div(), total, size)
    if "std" in c.operator:
        value = c.emit(ew.Sqrt(), value)
    if "mean" in c.operator:
        return c.result(value), c.result(c.reshape(mean_, c.type.shape))
    return c.result(value)


@lowers("aten.var.dim", "aten.std.dim", "aten.var_mean.dim")
def var_dim(c: Context, x: Value, axes: Axes, unbiased: bool = True, keep: bool = False) -> Any:
    return var(c, x, axes, int(unbiased), keep)


@lowers("aten.amax.default")
def amax(c: Context, x: Value, axes: Axes = None, keep: bool = False) -> Value:
    return reduced(c, ReduceMax, x, axes, keep)


@lowers("aten.amin.default")
def amin(c: Context, x: Value, axes: Axes = None, keep: bool = False) -> Value:
    return reduced(c, ReduceMin, x, axes, keep)


@lowers("aten.max.default", "aten.min.default")
def extreme(c: Context, x: Value) -> Value:
    return reduced(c, ReduceMax if "max" in c.operator else ReduceMin, x, None, False)


@lowers("aten.aminmax.default")
def aminmax(c: Context, x: Value, *, dim: int | None = None, keepdim: bool = False) -> Any:
    low, high = (reduced(c, op, x, dim, keepdim) for op in (ReduceMin, ReduceMax))
    return c.reshape(low, c.type.shape), c.reshape(high, c.type.shape)


@lowers("aten.max.dim", "aten.min.dim")
def extreme_dim(c: Context, x: Value, axis: int, keep: bool = False) -> tuple[Value, Value]:
    largest = "max" in c.operator
    value = reduced(c, ReduceMax if largest else ReduceMin, x, axis, keep)
    return value, c.reshape(argmax_of(c, x, axis, largest), c.type.shape)


@lowers("aten.argmax.default", "aten.argmin.default")
def argmax(c: Context, x: Value, axis: int | None = None, keep: bool = False) -> Value:
    if axis is None:
        x, axis = c.reshape(x, (numel(x.type.shape),)), 0
    return c.reshape(argmax_of(c, x, axis, "max" in c.operator), c.type.shape)


def argmax_of(c: Context, x: Value, axis: int, largest: bool) -> Value:
    """Return the index of the extreme along `axis`, which is gone from the shape."""
    rank = x.type.rank
    if rank == 0:
        return c.fill(0, c.types[-1])
    axis = c.axis(axis, rank)
    x = c.transpose(x, [*(a for a in range(rank) if a != axis), axis])
    return c.emit(ArgMax(), x if largest else opposite(c, x))


def smallest(dtype: DType, below: bool) -> float | int | bool:
    """Return the number that none is below, or (not `below`) above."""
    return extreme_of(dtype.value, -1 if below else 1)


def opposite(c: Context, x: Value) -> Value:
    """Return numbers whose order is the opposite one (NaN being the largest in both)."""
    if x.type.dtype == BOOL:
        return c.emit(ew.LogicalNot(), x)
    if x.type.dtype.is_float:
        return c.emit(ew.Neg(), x)
    largest = 2**x.type.dtype.bits - 1 if x.type.dtype.kind == "uint" else -1
    return c.apply(ew.Sub(), largest, x)  # not a negation, which the smallest number has none of


@lowers("aten.any.default", "aten.any.dim", "aten.any.dims", "aten.all.default", "aten.all.dim",
        "aten.all.dims")  # fmt: skip
def any_all(c: Context, x: Value, axes: Axes = None, keep: bool = False) -> Value:
    flags = c.cast(truth(c, x), F32)
    op = ReduceMax if "any" in c.operator else ReduceMin
    # Above zero: of none there is -inf, or inf. Of u8 it is u8.
    return c.result(c.apply(ew.Gt(), reduced(c, op, flags, axes, keep), 0.0))


@lowers("aten.logsumexp.default")
def logsumexp(c: Context, x: Value, axes: Axes, keep: bool = False) -> Value:
    wide = c.wide(x)
    top = reduced(c, ReduceMax, wide, axes, True)
    endless = c.apply(ew.Eq(), c.emit(ew.Abs(), top), math.inf)
    top = c.emit(ew.Where(), endless, c.operand(0, top.type.dtype), top)
    total = reduced(c, ReduceSum, c.emit(ew.Exp(), c.emit(ew.Sub(), wide, top)), axes, True)
    value = c.emit(ew.Add(), c.emit(ew.Log(), total), top)
    return c.result(c.reshape(value, c.type.shape))


@lowers("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.norm.Scalar")
def vector_norm(
    c: Context, x: Value, order: Any = 2, axes: Axes = None, keep: bool = False, **_: Any
) -> Value:
    wide = summand(c, x)
    order = 2 if order is None else float(order)
    if order == 2:
        total = reduced(c, ReduceSum, c.emit(ew.Mul(), wide, wide), axes, keep)
        return c.result(c.emit(ew.Sqrt(), total))
    size = c.emit(ew.Abs(), wide)
    if math.isinf(order):
        return c.result(reduced(c, ReduceMax if order > 0 else ReduceMin, size, axes, keep))
    if order == 0:  # how many are not zero
        size = c.cast(c.apply(ew.Ne(), size, 0), size.type.dtype)
    elif order != 1:
        size = c.apply(ew.Pow(), size, order)
    total = reduced(c, ReduceSum, size, axes, keep)
    return c.result(total if order in (0, 1) else c.apply(ew.Pow(), total, 1 / order))
