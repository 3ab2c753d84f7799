"""Softmax and the normalizations, computed in f32 whatever the element type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from ...ir.ops.reduce import ReduceMax, ReduceSum
from ...ir.types import Dim, numel
from .context import Context, lowers
from .reduce import average

_EPSILON = 1.1920928955078125e-07  # f32's, what rms_norm adds when nothing is said


@lowers("aten.softmax.int", "aten._softmax.default")
def softmax(c: Context, x: Value, axis: int, *_: Any, **__: Any) -> Value:
    # `dtype` converts what goes in, not only what comes out.
    return c.result(softmax_of(c, c.wide(c.cast(x, c.dtype)), axis))


@lowers("aten._safe_softmax.default")
def safe_softmax(c: Context, x: Value, axis: int, *_: Any, **__: Any) -> Value:
    return c.result(safe_softmax_of(c, c.wide(x), axis))


def softmax_of(c: Context, x: Value, axis: int) -> Value:
    """Return `exp(x - max) / Σ exp(x - max)` along `axis`: NaN where all is -inf."""
    shape, x = x.type.shape, c.row(x)
    axis = c.axis(axis, x.type.rank)
    exp = c.emit(ew.Exp(), c.emit(ew.Sub(), x, c.emit(ReduceMax((axis,), True), x)))
    return c.reshape(c.emit(ew.Div(), exp, c.emit(ReduceSum((axis,), True), exp)), shape)


def safe_softmax_of(c: Context, x: Value, axis: int) -> Value:
    """Return the softmax along `axis`, zero where all is -inf."""
    shape, x = x.type.shape, c.row(x)
    axis = c.axis(axis, x.type.rank)
    top = c.emit(ReduceMax((axis,), True), x)
    top = c.emit(ew.Where(), c.apply(ew.Eq(), top, -math.inf), c.operand(0, x.type.dtype), top)
    exp = c.emit(ew.Exp(), c.emit(ew.Sub(), x, top))
    total = c.emit(ReduceSum((axis,), True), exp)  # at least 1 where anything is above -inf
    none = c.apply(ew.Eq(), total, 0)
    total = c.emit(ew.Where(), none, c.operand(1, x.type.dtype), total)
    return c.reshape(c.emit(ew.Div(), exp, total), shape)


@lowers("aten.log_softmax.int", "aten._log_softmax.default")
def log_softmax(c: Context, x: Value, axis: int, *_: Any, **__: Any) -> Value:
    x = c.row(c.wide(c.cast(x, c.dtype)))
    axis = c.axis(axis, x.type.rank)
    shifted = c.emit(ew.Sub(), x, c.emit(ReduceMax((axis,), True), x))
    total = c.emit(ReduceSum((axis,), True), c.emit(ew.Exp(), shifted))
    return c.result(c.reshape(c.emit(ew.Sub(), shifted, c.emit(ew.Log(), total)), c.type.shape))


def affine(c: Context, x: Value, weight: Value | None, bias: Value | None) -> Value:
    """Return `x * weight + bias` in f32, either being optional."""
    x = x if weight is None else c.emit(ew.Mul(), x, c.wide(weight))
    return x if bias is None else c.emit(ew.Add(), x, c.wide(bias))


def standardized(
    c: Context, x: Value, axes: Sequence[int], epsilon: float
) -> tuple[Value, Value, Value]:
    """Return `(x - mean) / sqrt(var + epsilon)` over axes, the mean and the factor."""
    mean = average(c, x, axes, True)
    centred = c.emit(ew.Sub(), x, mean)
    var = average(c, c.emit(ew.Mul(), centred, centred), axes, True)
    factor = c.emit(ew.Rsqrt(), c.apply(ew.Add(), var, epsilon))
    return c.emit(ew.Mul(), centred, factor), mean, factor


@lowers("aten.layer_norm.default", "aten.native_layer_norm.default")
def layer_norm(
    c: Context,
    x: Value,
    shape: Sequence[Dim],
    weight: Value | None = None,
    bias: Value | None = None,
    epsilon: float = 1e-5,
    *_: Any,
) -> Any:
    axes = [x.type.rank - 1 - a for a in range(len(shape))]
    y, mean, factor = standardized(c, c.wide(x), axes, epsilon)
    value = c.result(affine(c, y, weight, bias))
    return (value, mean, factor) if "native" in c.operator else value


@lowers("aten.rms_norm.default", "aten._fused_rms_norm.default")
def rms_norm(
    c: Context,
    x: Value,
    shape: Sequence[Dim],
    weight: Value | None = None,
    epsilon: float | None = None,
) -> Any:
    wide = c.wide(x)
    axes = [x.type.rank - 1 - a for a in range(len(shape))]
    square = average(c, c.emit(ew.Mul(), wide, wide), axes, True)
    epsilon = _EPSILON if epsilon is None else epsilon
    factor = c.emit(ew.Rsqrt(), c.apply(ew.Add(), square, epsilon))
    value = c.result(affine(c, c.emit(ew.Mul(), wide, factor), weight, None))
    return (value, factor) if "fused" in c.operator else value


@lowers("aten.group_norm.default")
def group_norm(
    c: Context,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    epsilon: float = 1e-5,
    *_: Any,
) -> Value:
    return grouped_norm(c, x, groups, weight, bias, epsilon)[0]


def grouped_norm(
    c: Context, x: Value, groups: int, weight: Value | None, bias: Value | None, epsilon: float
) -> tuple[Value, Value, Value]:
    """Return the norm over groups of channels, and every group's mean and factor."""
    batch, channels, *rest = x.type.shape
    inner = numel((channels // groups, *rest))
    grouped = c.reshape(c.wide(x), (batch, groups, inner))
    y, mean, factor = standardized(c, grouped, [2], epsilon)
    y = affine(c, c.reshape(y, x.type.shape), per_channel(c, x, weight), per_channel(c, x, bias))
    return c.result(y), mean, factor


@lowers("aten.native_group_norm.default")
def native_group_norm(
    c: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    _n: Dim,
    _c: Dim,
    _hw: Dim,
    groups: int,
    epsilon: float,
) -> tuple[Value, ...]:
    y, *rest = grouped_norm(c, x, groups, weight, bias, epsilon)
    pairs = zip(rest, c.types[1:], strict=True)
    return y, *(c.cast(c.reshape(v, t.shape), t.dtype) for v, t in pairs)


def per_channel(c: Context, x: Value, value: Value | None) -> Value | None:
    """Return `value[C]` as it broadcasts over `x[N, C, …]`."""
    if value is None:
        return None
    return c.reshape(value, (*value.type.shape, *(1 for _ in x.type.shape[2:])))


@lowers("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")
def batch_norm(
    c: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    var: Value,
    *rest: Any,
) -> Any:
    native = "native" in c.operator
    training, epsilon = (False, rest[1]) if native else (rest[0], rest[2])
    if training:
        raise c.unsupported("batch statistics that are kept while running")
    mean, var = (c.wide(per_channel(c, x, v) or v) for v in (mean, var))
    factor = c.emit(ew.Rsqrt(), c.apply(ew.Add(), var, epsilon))
    y = c.emit(ew.Mul(), c.emit(ew.Sub(), c.wide(x), mean), factor)
    value = c.result(affine(c, y, per_channel(c, x, weight), per_channel(c, x, bias)))
    return (value, *(c.fill(0, t) for t in c.types[1:])) if native else value


@lowers("aten._native_batch_norm_legit.no_stats")
def batch_norm_of_batch(
    c: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Value, ...]:
    """A norm that keeps no statistics takes the batch's; `momentum` is for keeping them."""
    axes = [a for a in range(x.type.rank) if a != 1]
    y, mean, factor = standardized(c, c.wide(x), axes, epsilon)
    value = c.result(affine(c, y, per_channel(c, x, weight), per_channel(c, x, bias)))
    kept = zip((mean, factor), c.types[1:], strict=True)
    return value, *(c.cast(c.reshape(v, t.shape), t.dtype) for v, t in kept)
