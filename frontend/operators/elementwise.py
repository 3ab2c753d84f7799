"""Arithmetic, comparisons, type conversion and selection."""

from __future__ import annotations

import math
from typing import Any

from ...ir.dtypes import BOOL, DType, max_finite
from ...ir.graph import Value
from ...ir.op import Op
from ...ir.ops import elementwise as ew
from .context import TABLE, Context, Lowering, dtype_of, lowers

UNARY: dict[str, type[Op]] = {
    "neg": ew.Neg, "abs": ew.Abs, "exp": ew.Exp, "log": ew.Log, "sqrt": ew.Sqrt,
    "rsqrt": ew.Rsqrt, "sin": ew.Sin, "cos": ew.Cos, "tanh": ew.Tanh, "erf": ew.Erf,
    "sigmoid": ew.Sigmoid, "floor": ew.Floor,
}  # fmt: skip
BINARY: dict[str, type[Op]] = {
    "mul.Tensor": ew.Mul, "mul.Scalar": ew.Mul, "maximum": ew.Maximum, "minimum": ew.Minimum,
    "remainder.Tensor": ew.Mod, "remainder.Scalar": ew.Mod,
    "pow.Tensor_Tensor": ew.Pow, "pow.Scalar": ew.Pow,
}  # fmt: skip
COMPARE: dict[str, type[Op]] = {
    "eq": ew.Eq, "ne": ew.Ne, "lt": ew.Lt, "le": ew.Le, "gt": ew.Gt, "ge": ew.Ge,
}  # fmt: skip
LOGICAL: dict[str, type[Op]] = {"and": ew.LogicalAnd, "or": ew.LogicalOr, "xor": ew.Ne}


def _unary(op: Op) -> Lowering:
    return lambda c, x: c.emit(op, c.cast(x, c.dtype))


def _binary(op: Op) -> Lowering:
    return lambda c, a, b: c.apply(op, a, b, dtype=c.dtype)


def _compare(op: Op) -> Lowering:
    return lambda c, a, b: c.apply(op, a, b, dtype=c.promoted)


def _logical(op: Op) -> Lowering:
    return lambda c, a, b: c.emit(op, truth(c, a), truth(c, b))


def truth(c: Context, x: Any) -> Value:
    """Return where `x` is not zero."""
    if not isinstance(x, Value):
        return c.operand(bool(x), BOOL)
    if x.type.dtype.is_code:  # some have no zero to compare with
        x = c.wide(x)
    return x if x.type.dtype == BOOL else c.apply(ew.Ne(), x, 0)


for _name, _op in UNARY.items():
    TABLE[f"aten.{_name}.default"] = _unary(_op())
for _name, _op in BINARY.items():
    _overload = "" if "." in _name else ".default"
    TABLE[f"aten.{_name}{_overload}"] = _binary(_op())
for _name, _op in COMPARE.items():
    TABLE[f"aten.{_name}.Tensor"] = TABLE[f"aten.{_name}.Scalar"] = _compare(_op())
for _name, _op in LOGICAL.items():
    TABLE[f"aten.logical_{_name}.default"] = _logical(_op())


@lowers("aten.logical_not.default")
def logical_not(c: Context, x: Value) -> Value:
    return c.emit(ew.LogicalNot(), truth(c, x))


@lowers("aten.add.Tensor", "aten.add.Scalar")
def add(c: Context, a: Any, b: Any, alpha: Any = 1) -> Value:
    if c.dtype == BOOL:
        return c.emit(ew.LogicalOr(), truth(c, a), truth(c, b))
    return c.apply(ew.Add(), a, scaled(c, b, alpha), dtype=c.dtype)


@lowers("aten.sub.Tensor", "aten.sub.Scalar")
def sub(c: Context, a: Any, b: Any, alpha: Any = 1) -> Value:
    return c.apply(ew.Sub(), a, scaled(c, b, alpha), dtype=c.dtype)


@lowers("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(c: Context, a: Any, b: Any, alpha: Any = 1) -> Value:
    return c.apply(ew.Sub(), b, scaled(c, a, alpha), dtype=c.dtype)


def scaled(c: Context, x: Any, alpha: Any) -> Any:
    """Return `alpha * x`."""
    return x if alpha == 1 else c.apply(ew.Mul(), c.operand(x, c.dtype), alpha)


@lowers("aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor")
def div(c: Context, a: Any, b: Any) -> Value:
    return c.apply(ew.Div(), a, b, dtype=c.dtype)


@lowers("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def div_mode(c: Context, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return div(c, a, b)
    if rounding_mode == "floor":
        return floor_divide(c, a, b)
    if c.dtype.is_float:
        return truncated(c, c.apply(ew.Div(), a, b, dtype=c.dtype))
    a, b = c.operand(a, c.dtype), c.operand(b, c.dtype)
    down, rest = c.emit(ew.Div(), a, b), c.emit(ew.Mod(), a, b)
    return c.emit(ew.Where(), falls(c, rest, a, b), c.apply(ew.Add(), down, 1), down)


def falls(c: Context, rest: Value, a: Value, b: Value) -> Value:
    """Return where a division that leaves `rest` has a negative quotient, which is rounded."""
    apart = c.emit(ew.Ne(), c.apply(ew.Lt(), a, 0), c.apply(ew.Lt(), b, 0))
    return c.emit(ew.LogicalAnd(), c.apply(ew.Ne(), rest, 0), apart)


@lowers("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(c: Context, a: Any, b: Any) -> Value:
    """The remainder is taken off first, so that the quotient is nearly whole.

    Source: CPython's Objects/floatobject.c, _float_div_mod.
    """
    a, b = c.operand(a, c.dtype), c.operand(b, c.dtype)
    if not c.dtype.is_float:
        return c.emit(ew.Div(), a, b)  # of integers, towards minus infinity by itself
    a, b = c.wide(a), c.wide(b)
    quotient, rest = c.emit(ew.Div(), a, b), remainder_towards_zero(c, a, b)
    whole = c.emit(ew.Div(), c.emit(ew.Sub(), a, rest), b)
    below = falls(c, rest, rest, b)
    whole = c.emit(ew.Where(), below, c.apply(ew.Sub(), whole, 1), whole)
    down = c.emit(ew.Floor(), whole)
    far = c.apply(ew.Gt(), c.emit(ew.Sub(), whole, down), 0.5)
    nearest = c.emit(ew.Where(), far, c.apply(ew.Add(), down, 1), down)
    return c.result(c.emit(ew.Where(), c.apply(ew.Eq(), b, 0), quotient, nearest))


@lowers("aten.fmod.Tensor", "aten.fmod.Scalar")
def fmod(c: Context, a: Any, b: Any) -> Value:
    return remainder_towards_zero(c, c.operand(a, c.dtype), c.operand(b, c.dtype))


def remainder_towards_zero(c: Context, a: Value, b: Value) -> Value:
    """Return the remainder that has the sign of the dividend."""
    if not a.type.dtype.is_float:
        rest = c.emit(ew.Mod(), a, b)
        return c.emit(ew.Where(), falls(c, rest, a, b), c.emit(ew.Sub(), rest, b), rest)
    rest = c.emit(ew.Mod(), c.emit(ew.Abs(), a), c.emit(ew.Abs(), b))
    return c.emit(ew.Where(), c.apply(ew.Lt(), a, 0), c.emit(ew.Neg(), rest), rest)


@lowers("aten.round.default", "aten.round.decimals")
def round_(c: Context, x: Value, decimals: int = 0) -> Value:
    """To the nearest whole number, or to the nearest that ends after so many decimals."""
    if not c.dtype.is_float:
        if decimals:
            raise c.unsupported("rounding integers to decimals")
        return x
    if not decimals:
        return c.emit(ew.RoundEven(), x)
    x, unit = c.wide(x), 10.0 ** abs(decimals)
    there, back = (ew.Mul(), ew.Div()) if decimals > 0 else (ew.Div(), ew.Mul())
    whole = c.emit(ew.RoundEven(), c.apply(there, x, unit))
    return c.result(c.apply(back, whole, unit))


@lowers("aten.trunc.default")
def trunc(c: Context, x: Value) -> Value:
    return truncated(c, x)


def truncated(c: Context, x: Value) -> Value:
    """Return `x` rounded towards zero."""
    negative = c.apply(ew.Lt(), x, 0)
    return c.emit(ew.Where(), negative, ceil(c, x), c.emit(ew.Floor(), x))


@lowers("aten.ceil.default")
def ceil(c: Context, x: Value) -> Value:
    return c.emit(ew.Neg(), c.emit(ew.Floor(), c.emit(ew.Neg(), x)))


@lowers("aten.reciprocal.default")
def reciprocal(c: Context, x: Value) -> Value:
    return c.apply(ew.Div(), 1.0, x, dtype=c.dtype)


@lowers("aten.square.default")
def square(c: Context, x: Value) -> Value:
    return c.emit(ew.Mul(), x, x)


@lowers("aten.pow.Tensor_Scalar")
def pow_scalar(c: Context, x: Value, exponent: Any) -> Value:
    x = c.cast(x, c.dtype)
    if exponent == 1:
        return x
    if exponent == 2:
        return c.emit(ew.Mul(), x, x)
    if exponent == 3:
        return c.emit(ew.Mul(), c.emit(ew.Mul(), x, x), x)
    if exponent == 0.5:
        return c.emit(ew.Sqrt(), x)
    if exponent == -0.5:
        return c.emit(ew.Rsqrt(), x)
    if exponent == -1:
        return c.apply(ew.Div(), 1.0, x, dtype=c.dtype)
    return c.apply(ew.Pow(), x, exponent, dtype=c.dtype)


@lowers("aten.exp2.default")
def exp2(c: Context, x: Value) -> Value:
    return c.result(c.emit(ew.Exp(), c.apply(ew.Mul(), c.wide(x), math.log(2))))


@lowers("aten.log2.default", "aten.log10.default")
def log_base(c: Context, x: Value) -> Value:
    base = 2 if "log2" in c.operator else 10
    return c.result(c.apply(ew.Div(), c.emit(ew.Log(), c.wide(x)), math.log(base)))


@lowers("aten.log1p.default")
def log1p(c: Context, x: Value) -> Value:
    return c.result(log_one_plus(c, c.wide(x)))


def log_one_plus(c: Context, x: Value) -> Value:
    """Return log(1 + x), accurate for small x.

    Source: W. Kahan's log1p: `log(u) · x / (u - 1)` with u = 1 + x, and x itself where u = 1
    (log(u) where u = x, which holds for infinity too).
    """
    u = c.apply(ew.Add(), x, 1.0)
    log = c.emit(ew.Log(), u)
    ratio = c.emit(ew.Div(), x, c.apply(ew.Sub(), u, 1.0))
    large = c.emit(ew.Where(), c.emit(ew.Eq(), u, x), log, c.emit(ew.Mul(), log, ratio))
    return c.emit(ew.Where(), c.apply(ew.Eq(), u, 1.0), x, large)


@lowers("aten.expm1.default")
def expm1(c: Context, x: Value) -> Value:
    return c.result(exp_minus_one(c, c.wide(x)))


def exp_minus_one(c: Context, x: Value) -> Value:
    """Return exp(x) - 1, accurate for small x: `tanh(x / 2) · (exp(x) + 1)`."""
    half = c.emit(ew.Tanh(), c.apply(ew.Mul(), x, 0.5))
    exp = c.emit(ew.Exp(), x)
    near = c.emit(ew.Mul(), half, c.apply(ew.Add(), exp, 1.0))
    small = c.apply(ew.Lt(), c.emit(ew.Abs(), x), 1.0)
    return c.emit(ew.Where(), small, near, c.apply(ew.Sub(), exp, 1.0))


@lowers("aten.sign.default", "aten.sgn.default")
def sign(c: Context, x: Value) -> Value:
    above = c.cast(c.apply(ew.Gt(), x, 0), c.dtype)
    below = c.cast(c.apply(ew.Lt(), x, 0), c.dtype)
    return c.emit(ew.Sub(), above, below)


@lowers("aten.copysign.Tensor", "aten.copysign.Scalar")
def copysign(c: Context, a: Value, b: Any) -> Value:
    return c.apply(ew.CopySign(), c.cast(a, c.dtype), b)


@lowers("aten.signbit.default")
def signbit(c: Context, x: Value) -> Value:
    return signed(c, c.wide(x) if x.type.dtype.is_float else x)


def signed(c: Context, x: Value) -> Value:
    """Return where the sign is minus, of zeros and NaN too."""
    if not x.type.dtype.is_float:
        return c.apply(ew.Lt(), x, 0)
    return c.apply(ew.Lt(), c.emit(ew.CopySign(), c.operand(1.0, x.type.dtype), x), 0.0)


@lowers("aten.angle.default")
def angle(c: Context, x: Value) -> Value:
    """Of a number without an imaginary part: half a turn below zero."""
    x = c.cast(x, c.dtype)
    behind = c.apply(ew.Mul(), c.cast(c.apply(ew.Lt(), x, 0), c.dtype), math.pi)
    return c.emit(ew.Where(), c.emit(ew.Ne(), x, x), x, behind)


@lowers("aten.heaviside.default")
def heaviside(c: Context, x: Value, at_zero: Value) -> Value:
    """A step from 0 to 1, with `at_zero` in between; NaN lies below."""
    above = c.cast(c.apply(ew.Gt(), x, 0), c.dtype)
    return c.emit(ew.Where(), c.apply(ew.Eq(), x, 0), at_zero, above)


@lowers("aten.isnan.default")
def isnan(c: Context, x: Value) -> Value:
    return c.emit(ew.Ne(), x, x)


@lowers("aten.isinf.default")
def isinf(c: Context, x: Value) -> Value:
    return c.apply(ew.Eq(), c.emit(ew.Abs(), x), float("inf"))


@lowers("aten.isposinf.default", "aten.isneginf.default")
def is_signed_inf(c: Context, x: Value) -> Value:
    return c.apply(ew.Eq(), c.wide(x), math.inf if "posinf" in c.operator else -math.inf)


@lowers("aten.isfinite.default")
def isfinite(c: Context, x: Value) -> Value:
    return c.apply(ew.Lt(), c.emit(ew.Abs(), c.wide(x)), math.inf)


@lowers("aten.nan_to_num.default")
def nan_to_num(
    c: Context,
    x: Value,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> Value:
    if not x.type.dtype.is_float:
        return x
    largest = max_finite(x.type.dtype)
    high = largest if posinf is None else posinf
    low = -largest if neginf is None else neginf
    out = x
    for condition, value in (
        (c.apply(ew.Eq(), x, math.inf), high),
        (c.apply(ew.Eq(), x, -math.inf), low),
        (c.emit(ew.Ne(), x, x), nan or 0.0),
    ):
        out = c.emit(ew.Where(), condition, c.operand(value, x.type.dtype), out)
    return out


@lowers("aten.fmax.default", "aten.fmin.default")
def number_of_two(c: Context, a: Value, b: Value) -> Value:
    """Return the larger or smaller of two numbers, or the one that is a number."""
    op = ew.Maximum() if "fmax" in c.operator else ew.Minimum()
    a, b = c.cast(a, c.dtype), c.cast(b, c.dtype)
    either = c.emit(ew.Where(), c.emit(ew.Ne(), b, b), a, c.emit(op, a, b))
    return c.emit(ew.Where(), c.emit(ew.Ne(), a, a), b, either)


@lowers("aten.logaddexp.default", "aten.logaddexp2.default")
def logaddexp(c: Context, a: Value, b: Value) -> Value:
    """Return `log(exp(a) + exp(b))`, or the same to the base 2: an infinity for two equal ones."""
    natural = math.log(2) if "2" in c.operator else 1.0
    a, b = (c.wide(c.cast(x, c.dtype)) for x in (a, b))
    apart = c.emit(ew.Abs(), c.emit(ew.Sub(), a, b))
    rest = log_one_plus(c, c.emit(ew.Exp(), c.apply(ew.Mul(), apart, -natural)))
    rest = rest if natural == 1 else c.apply(ew.Div(), rest, natural)
    value = c.emit(ew.Add(), c.emit(ew.Maximum(), a, b), rest)
    endless = c.apply(ew.Eq(), c.emit(ew.Abs(), a), math.inf)
    same = c.emit(ew.LogicalAnd(), endless, c.emit(ew.Eq(), a, b))
    return c.result(c.emit(ew.Where(), same, a, value))


@lowers("aten.clamp.default", "aten.clamp.Tensor", "aten.clamp_min.default",
        "aten.clamp_min.Tensor")  # fmt: skip
def clamp(c: Context, x: Value, min: Any = None, max: Any = None) -> Value:
    x = c.cast(x, c.dtype)
    if min is not None:
        x = c.apply(ew.Maximum(), x, min, dtype=c.dtype)
    return x if max is None else c.apply(ew.Minimum(), x, max, dtype=c.dtype)


@lowers("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(c: Context, x: Value, max: Any) -> Value:
    return c.apply(ew.Minimum(), x, max, dtype=c.dtype)


@lowers("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(c: Context, a: Value, b: Value, weight: Any) -> Value:
    """From the nearer end, so that `weight` 0 gives `a` and 1 gives `b`, infinite or not."""
    a, b, weight = (c.wide(c.operand(v, c.dtype)) for v in (a, b, weight))
    apart = c.emit(ew.Sub(), b, a)
    from_a = c.emit(ew.Add(), a, c.emit(ew.Mul(), weight, apart))
    rest = c.apply(ew.Sub(), 1, weight)
    from_b = c.emit(ew.Sub(), b, c.emit(ew.Mul(), apart, rest))
    near = c.apply(ew.Lt(), c.emit(ew.Abs(), weight), 0.5)
    return c.result(c.emit(ew.Where(), near, from_a, from_b))


@lowers("aten.addcmul.default", "aten.addcdiv.default")
def addcmul(c: Context, x: Value, a: Value, b: Value, value: Any = 1) -> Value:
    op = ew.Mul() if "addcmul" in c.operator else ew.Div()
    return c.apply(ew.Add(), x, scaled(c, c.apply(op, a, b, dtype=c.dtype), value), dtype=c.dtype)


@lowers("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(c: Context, condition: Value, a: Any, b: Any) -> Value:
    return c.emit(ew.Where(), truth(c, condition), c.operand(a, c.dtype), c.operand(b, c.dtype))


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(c: Context, x: Value, mask: Value, value: Any) -> Value:
    return c.emit(ew.Where(), mask, c.operand(value, c.dtype), x)


@lowers("aten._to_copy.default", "aten.to.dtype", "aten.to.device", "aten.to.dtype_layout",
        "aten.type_as.default", "aten.to.other")  # fmt: skip
def convert(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return converted(c, x, c.dtype)


def converted(c: Context, x: Value, dtype: DType) -> Value:
    """Return `x` in another element type as torch converts: a bool is whether it is not zero."""
    return truth(c, x) if dtype == BOOL else c.cast(x, dtype)


@lowers("prims.convert_element_type.default")
def convert_element_type(c: Context, x: Value, dtype: Any) -> Value:
    return converted(c, x, dtype_of(dtype))


@lowers("aten.clone.default", "aten.contiguous.default", "aten.alias.default",
        "aten.detach.default", "aten.detach_.default", "aten.lift_fresh_copy.default",
        "aten.lift_fresh.default", "aten.positive.default")  # fmt: skip
def identity(_: Context, x: Value, *__: Any, **___: Any) -> Value:
    return x


@lowers("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
def dropout(c: Context, x: Value, p: float, train: bool) -> Value:
    if train and p:
        raise c.unsupported("dropout that does not depend on module.training")
    return x


@lowers("aten.native_dropout.default")
def native_dropout(c: Context, x: Value, p: float, train: bool | None) -> tuple[Value, Value]:
    mask = c.types[1]
    return dropout(c, x, p, bool(train)), c.fill(True, mask)


@lowers("aten.copy.default")
def copy(c: Context, _: Value, source: Any, *__: Any) -> Value:
    return c.broadcast(c.operand(source, c.dtype), c.type.shape)


@lowers("aten.bernoulli.p", "aten.rand.default", "aten.randn.default", "aten.rand_like.default",
        "aten.randn_like.default", "aten.randint.default")  # fmt: skip
def random(c: Context, *_: Any, **__: Any) -> Value:
    raise c.unsupported("a random number inside of a model")
