"""Angles, hyperbolic functions and their inverses, of few ops that kernels know.

Each formula keeps the relative error at a few units in the last place where the function is near
zero, and overflows no sooner than the function.
"""

from __future__ import annotations

import math
from typing import Any

from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from .context import Context, lowers
from .elementwise import log_one_plus, signed

#: Beyond it, 1 is nothing beside a number's square, in f64 too.
_FAR = 1e9


def _wide(c: Context, x: Value) -> Value:
    """Return a number, or an integer as a number, in the precision that composites compute in."""
    return c.wide(c.cast(x, c.dtype))


@lowers("aten.tan.default")
def tan(c: Context, x: Value) -> Value:
    x = _wide(c, x)
    return c.result(c.emit(ew.Div(), c.emit(ew.Sin(), x), c.emit(ew.Cos(), x)))


@lowers("aten.atan.default")
def atan(c: Context, x: Value) -> Value:
    return c.emit(ew.Atan(), c.cast(x, c.dtype))


@lowers("aten.asin.default")
def asin(c: Context, x: Value) -> Value:
    """The angle whose tangent is sine by cosine."""
    x = _wide(c, x)
    cosine = c.emit(ew.Sqrt(), _one_minus_square(c, x))
    return c.result(c.emit(ew.Atan(), c.emit(ew.Div(), x, cosine)))


def _one_minus_square(c: Context, x: Value) -> Value:
    return c.emit(ew.Mul(), c.apply(ew.Sub(), 1.0, x), c.apply(ew.Add(), x, 1.0))


@lowers("aten.acos.default")
def acos(c: Context, x: Value) -> Value:
    """Twice the half angle, whose tangent is √((1 - x) / (1 + x)): no digits cancel near 1."""
    x = _wide(c, x)
    ratio = c.emit(ew.Div(), c.apply(ew.Sub(), 1.0, x), c.apply(ew.Add(), x, 1.0))
    half = c.emit(ew.Atan(), c.emit(ew.Sqrt(), ratio))
    return c.result(c.apply(ew.Mul(), half, 2.0))


@lowers("aten.atan2.default")
def atan2(c: Context, y: Any, x: Any) -> Value:
    """The angle to the nearer axis, then the quadrant by both signs, of zeros too."""
    y, x = (c.wide(c.operand(v, c.dtype)) for v in (y, x))
    far, near = c.emit(ew.Abs(), y), c.emit(ew.Abs(), x)
    ratio = c.emit(ew.Div(), far, near)
    # Of two zeros and of two infinities the ratio is none.
    ratio = c.emit(ew.Where(), c.emit(ew.Eq(), far, near), c.operand(1.0, y.type.dtype), ratio)
    ratio = c.emit(ew.Where(), c.apply(ew.Eq(), far, 0.0), far, ratio)
    angle = c.emit(ew.Atan(), ratio)
    behind = signed(c, x)
    angle = c.emit(ew.Where(), behind, c.apply(ew.Sub(), math.pi, angle), angle)
    nan = c.emit(ew.Ne(), x, x)
    return c.result(c.emit(ew.Where(), nan, x, c.emit(ew.CopySign(), angle, y)))


@lowers("aten.cosh.default")
def cosh(c: Context, x: Value) -> Value:
    return c.result(hyperbolic_cosine(c, _wide(c, x)))


def hyperbolic_cosine(c: Context, x: Value) -> Value:
    """Return (eˣ + e⁻ˣ) / 2, by the root of eˣ, which overflows later."""
    root = c.emit(ew.Exp(), c.apply(ew.Mul(), c.emit(ew.Abs(), x), 0.5))
    half = c.apply(ew.Mul(), root, 0.5)
    small = c.emit(ew.Div(), c.apply(ew.Div(), 0.5, root), root)
    return c.emit(ew.Add(), c.emit(ew.Mul(), half, root), small)


@lowers("aten.sinh.default")
def sinh(c: Context, x: Value) -> Value:
    """tanh(x / 2) · (cosh(x) + 1): no digits cancel near 0."""
    x = _wide(c, x)
    half = c.emit(ew.Tanh(), c.apply(ew.Mul(), x, 0.5))
    return c.result(c.emit(ew.Mul(), half, c.apply(ew.Add(), hyperbolic_cosine(c, x), 1.0)))


@lowers("aten.asinh.default")
def asinh(c: Context, x: Value) -> Value:
    x = _wide(c, x)
    size = c.emit(ew.Abs(), x)
    square = c.emit(ew.Mul(), size, size)
    root = c.emit(ew.Sqrt(), c.apply(ew.Add(), square, 1.0))
    more = c.emit(ew.Div(), square, c.apply(ew.Add(), root, 1.0))
    value = _log_of_far(c, size, log_one_plus(c, c.emit(ew.Add(), size, more)))
    return c.result(c.emit(ew.CopySign(), value, x))


@lowers("aten.acosh.default")
def acosh(c: Context, x: Value) -> Value:
    """log(1 + t + √t·√(t + 2)) with t = x - 1, which is exact near 1."""
    x = _wide(c, x)
    t = c.apply(ew.Sub(), x, 1.0)
    roots = c.emit(ew.Mul(), c.emit(ew.Sqrt(), t), c.emit(ew.Sqrt(), c.apply(ew.Add(), x, 1.0)))
    return c.result(_log_of_far(c, x, log_one_plus(c, c.emit(ew.Add(), t, roots))))


def _log_of_far(c: Context, x: Value, value: Value) -> Value:
    """Return `value`, and log(2x) in its place where x is so large that no more is left of it."""
    log = c.apply(ew.Add(), c.emit(ew.Log(), x), math.log(2))
    return c.emit(ew.Where(), c.apply(ew.Gt(), x, _FAR), log, value)


@lowers("aten.atanh.default")
def atanh(c: Context, x: Value) -> Value:
    x = _wide(c, x)
    size = c.emit(ew.Abs(), x)
    ratio = c.emit(ew.Div(), c.apply(ew.Mul(), size, 2.0), c.apply(ew.Sub(), 1.0, size))
    value = c.apply(ew.Mul(), log_one_plus(c, ratio), 0.5)
    return c.result(c.emit(ew.CopySign(), value, x))
