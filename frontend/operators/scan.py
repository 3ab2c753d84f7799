"""Scans: what all elements up to each one make, along an axis.

Each outcome is reduced from all pairs of an element and one that is not behind it, which no buffer
holds: work that grows with the square of the axis, for the short axes of masks and positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...ir.dtypes import BOOL, F32, I64
from ...ir.graph import Value
from ...ir.op import Op
from ...ir.ops import elementwise as ew
from ...ir.ops.index import Iota
from ...ir.ops.reduce import ReduceMax, ReduceMin, ReduceProd, ReduceSum
from .context import Context, lowers
from .elementwise import truth
from .reduce import smallest, summand


@dataclass(frozen=True)
class Pairs:
    """Every element of `rows`, an axis moved to the end, beside those that are not behind it:
    `x` is `[…, 1, n]`, `behind` `[n, n]`. `back` undoes the moving."""

    c: Context
    rows: Value
    x: Value
    behind: Value
    back: Callable[[Value], Value]

    def reduced(self, op: type[Op], x: Value, neutral: Any) -> Value:
        """Reduce what is not behind, of values of pairs."""
        c = self.c
        kept = c.emit(ew.Where(), self.behind, x, c.operand(neutral, x.type.dtype))
        return c.emit(op((kept.type.rank - 1,), False), kept)  # type: ignore[call-arg]

    def beside(self, x: Value) -> Value:
        """Return a number of every element as one of its pairs."""
        return self.c.reshape(x, (*x.type.shape, 1))


def pairs_along(c: Context, x: Value, axis: int) -> Pairs:
    """Return the pairs of an axis; a scalar is a row of one."""
    shape = x.type.shape
    x = c.row(x)
    axis = c.axis(axis, x.type.rank)
    rows = c.swap(x, axis, -1)
    size = rows.type.shape[-1]
    row = c.reshape(c.emit(Iota(size)), (size, 1))
    behind = c.emit(ew.Le(), c.emit(Iota(size)), row)
    pairs = c.reshape(rows, (*rows.type.shape[:-1], 1, size))
    return Pairs(c, rows, pairs, behind, lambda y: c.reshape(c.swap(y, axis, -1), shape))


@lowers("aten.cumsum.default", "aten.cumprod.default")
def running(c: Context, x: Value, axis: int, **_: Any) -> Value:
    """Sums, or products, of what is not behind."""
    pairs = pairs_along(c, summand(c, x), axis)
    if "cumprod" in c.operator:
        return c.result(pairs.back(pairs.reduced(ReduceProd, pairs.x, 1)))
    return c.result(pairs.back(pairs.reduced(ReduceSum, pairs.x, 0)))


@lowers("aten.cummax.default", "aten.cummin.default")
def running_extreme(c: Context, x: Value, axis: int) -> tuple[Value, Value]:
    """The extreme so far, and where it was last; NaN is more extreme than any number."""
    largest = "cummax" in c.operator
    flag = x.type.dtype == BOOL
    pairs = pairs_along(c, c.cast(x, F32) if flag else x, axis)
    top = _extreme(pairs, largest)
    same = c.emit(ew.Eq(), pairs.x, pairs.beside(top))
    if top.type.dtype.is_float:
        missing = c.emit(ew.Ne(), pairs.x, pairs.x)
        same = c.emit(ew.LogicalOr(), same, missing)
    at = c.emit(Iota(pairs.rows.type.shape[-1]))
    at = c.emit(ew.Where(), same, at, c.operand(-1, I64))
    places = pairs.reduced(ReduceMax, at, -1)
    top = truth(c, top) if flag else top
    return pairs.back(top), pairs.back(places)


def _extreme(pairs: Pairs, largest: bool) -> Value:
    dtype = pairs.x.type.dtype
    least = smallest(dtype, largest)
    return pairs.reduced(ReduceMax if largest else ReduceMin, pairs.x, least)


@lowers("aten.logcumsumexp.default")
def running_logsumexp(c: Context, x: Value, axis: int) -> Value:
    pairs = pairs_along(c, c.wide(x), axis)
    top = _extreme(pairs, True)
    endless = c.apply(ew.Eq(), c.emit(ew.Abs(), top), math.inf)
    top = c.emit(ew.Where(), endless, c.operand(0, top.type.dtype), top)
    apart = c.emit(ew.Exp(), c.emit(ew.Sub(), pairs.x, pairs.beside(top)))
    total = c.emit(ew.Log(), pairs.reduced(ReduceSum, apart, 0))
    return c.result(pairs.back(c.emit(ew.Add(), total, top)))
