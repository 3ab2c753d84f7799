"""Activation functions, computed in f32 whatever the element type."""

from __future__ import annotations

import math
from typing import Any

from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from .context import Context, lowers
from .elementwise import exp_minus_one, log_one_plus

_SELU = (1.6732632423543772, 1.0507009873554805)  # Klambauer et al. 2017, alpha and scale


@lowers("aten.relu.default")
def relu(c: Context, x: Value) -> Value:
    return c.apply(ew.Maximum(), x, 0)


@lowers("aten.relu6.default")
def relu6(c: Context, x: Value) -> Value:
    return bounded(c, x, 0, 6)


@lowers("aten.hardtanh.default")
def hardtanh(c: Context, x: Value, low: float = -1, high: float = 1) -> Value:
    return bounded(c, x, low, high)


def bounded(c: Context, x: Value, low: float, high: float) -> Value:
    """Return `x` limited to `low … high`."""
    return c.apply(ew.Minimum(), c.apply(ew.Maximum(), x, low), high)


@lowers("aten.silu.default")
def silu(c: Context, x: Value) -> Value:
    wide = c.wide(x)
    return c.result(c.emit(ew.Mul(), wide, c.emit(ew.Sigmoid(), wide)))


@lowers("aten.gelu.default")
def gelu(c: Context, x: Value, approximate: str = "none") -> Value:
    """Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016), section 2."""
    x = c.wide(x)
    if approximate == "tanh":
        cube = c.emit(ew.Mul(), c.emit(ew.Mul(), x, x), x)
        inner = c.emit(ew.Add(), x, c.apply(ew.Mul(), cube, 0.044715))
        bend = c.emit(ew.Tanh(), c.apply(ew.Mul(), inner, math.sqrt(2 / math.pi)))
    else:
        bend = c.emit(ew.Erf(), c.apply(ew.Mul(), x, math.sqrt(0.5)))
    half = c.apply(ew.Mul(), x, 0.5)
    return c.result(c.emit(ew.Mul(), half, c.apply(ew.Add(), bend, 1.0)))


@lowers("aten.softplus.default")
def softplus(c: Context, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    x = c.wide(x)
    return c.result(soft_plus(c, x, beta, threshold))


def soft_plus(c: Context, x: Value, beta: float, threshold: float) -> Value:
    """Return log(1 + exp(beta x)) / beta, and x where beta x is above the threshold."""
    y = c.apply(ew.Mul(), x, beta)
    rest = log_one_plus(c, c.emit(ew.Exp(), c.emit(ew.Neg(), c.emit(ew.Abs(), y))))
    value = c.emit(ew.Add(), c.apply(ew.Maximum(), y, 0.0), rest)
    value = c.apply(ew.Div(), value, beta)
    return c.emit(ew.Where(), c.apply(ew.Gt(), y, threshold), x, value)


@lowers("aten.log_sigmoid.default", "aten.log_sigmoid_forward.default")
def log_sigmoid(c: Context, x: Value) -> Any:
    value = c.emit(ew.Neg(), soft_plus(c, c.emit(ew.Neg(), c.wide(x)), 1.0, math.inf))
    return (c.result(value), x) if "forward" in c.operator else c.result(value)


@lowers("aten.mish.default")
def mish(c: Context, x: Value) -> Value:
    x = c.wide(x)
    return c.result(c.emit(ew.Mul(), x, c.emit(ew.Tanh(), soft_plus(c, x, 1.0, math.inf))))


@lowers("aten.hardsigmoid.default")
def hardsigmoid(c: Context, x: Value) -> Value:
    return c.result(c.apply(ew.Div(), ramp(c, c.wide(x)), 6.0))


@lowers("aten.hardswish.default")
def hardswish(c: Context, x: Value) -> Value:
    x = c.wide(x)
    return c.result(c.apply(ew.Div(), c.emit(ew.Mul(), x, ramp(c, x)), 6.0))


def ramp(c: Context, x: Value) -> Value:
    """Return `min(max(x + 3, 0), 6)`."""
    return bounded(c, c.apply(ew.Add(), x, 3.0), 0.0, 6.0)


@lowers("aten.threshold.default")
def threshold(c: Context, x: Value, limit: float, value: float) -> Value:
    return c.emit(ew.Where(), c.apply(ew.Le(), x, limit), c.operand(value, x.type.dtype), x)


@lowers("aten.leaky_relu.default")
def leaky_relu(c: Context, x: Value, slope: float = 0.01) -> Value:
    return c.emit(ew.Where(), c.apply(ew.Gt(), x, 0), x, c.apply(ew.Mul(), x, slope))


@lowers("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(c: Context, x: Value, slope: Value) -> Value:
    if x.type.rank == 0:
        slope = c.reshape(slope, ())
    elif "kernel" not in c.operator and x.type.rank > 1:
        slope = c.reshape(slope, (*slope.type.shape, *(1 for _ in x.type.shape[2:])))
    scaled = c.apply(ew.Mul(), x, slope)
    return c.emit(ew.Where(), c.apply(ew.Gt(), x, 0), x, scaled)


@lowers("aten.elu.default")
def elu(c: Context, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    return c.result(elu_of(c, c.wide(x), alpha, scale, input_scale))


@lowers("aten.celu.default")
def celu(c: Context, x: Value, alpha: float = 1.0) -> Value:
    return c.result(elu_of(c, c.wide(x), alpha, 1.0, 1 / alpha))


@lowers("aten.selu.default")
def selu(c: Context, x: Value) -> Value:
    return c.result(elu_of(c, c.wide(x), *_SELU, 1.0))


def elu_of(c: Context, x: Value, alpha: float, scale: float, input_scale: float) -> Value:
    """Return `scale · (x where x > 0, else alpha · (exp(x · input_scale) - 1))`."""
    inner = x if input_scale == 1 else c.apply(ew.Mul(), x, input_scale)
    low = c.apply(ew.Mul(), exp_minus_one(c, inner), alpha)
    value = c.emit(ew.Where(), c.apply(ew.Gt(), x, 0.0), x, low)
    return value if scale == 1 else c.apply(ew.Mul(), value, scale)


@lowers("aten.glu.default")
def glu(c: Context, x: Value, axis: int = -1) -> Value:
    axis = c.axis(axis, x.type.rank)
    half = c.type.shape[axis]
    gate = c.slice(x, axis, half, x.type.shape[axis])
    return c.emit(ew.Mul(), c.slice(x, axis, 0, half), c.emit(ew.Sigmoid(), gate))
