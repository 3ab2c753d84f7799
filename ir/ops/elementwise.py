"""Elementwise ops, with numpy's broadcasting rule."""

from __future__ import annotations

import math

import numpy as np

from ..dtypes import BOOL, DType, promote, to_integer
from ..op import Op, expect, register, unless
from ..types import TensorType, broadcast


class Unary(Op):
    """One input, the same type out."""

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        return (x,)


class UnaryFloat(Unary):
    """One float input, the same type out."""

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        expect(x.dtype.is_float, f"{self.name} takes a float, not {x}")
        return (x,)


class Binary(Op):
    """Two inputs of one element type, broadcast together."""

    def infer(self, a: TensorType, b: TensorType) -> tuple[TensorType, ...]:
        expect(a.dtype == b.dtype, f"{self.name} takes equal element types, not {a} and {b}")
        return (TensorType(a.dtype, broadcast(a.shape, b.shape)),)


class Compare(Binary):
    """Two inputs of one element type; bool out."""

    def infer(self, a: TensorType, b: TensorType) -> tuple[TensorType, ...]:
        return (super().infer(a, b)[0].with_dtype(BOOL),)


class Logical(Binary):
    """Two bool inputs."""

    def infer(self, a: TensorType, b: TensorType) -> tuple[TensorType, ...]:
        expect(a.dtype == BOOL, f"{self.name} takes bool, not {a}")
        return super().infer(a, b)


@register("neg")
class Neg(Unary):
    def reference(self, x):
        return -x


@register("abs")
class Abs(Unary):
    def reference(self, x):
        return np.abs(x)


@register("exp")
class Exp(UnaryFloat):
    def reference(self, x):
        return np.exp(x)


@register("log")
class Log(UnaryFloat):
    def reference(self, x):
        return np.log(x)


@register("sqrt")
class Sqrt(UnaryFloat):
    def reference(self, x):
        return np.sqrt(x)


@register("rsqrt")
class Rsqrt(UnaryFloat):
    def reference(self, x):
        return 1.0 / np.sqrt(x)


@register("sin")
class Sin(UnaryFloat):
    def reference(self, x):
        return np.sin(x)


@register("cos")
class Cos(UnaryFloat):
    def reference(self, x):
        return np.cos(x)


@register("tanh")
class Tanh(UnaryFloat):
    def reference(self, x):
        return np.tanh(x)


@register("atan")
class Atan(UnaryFloat):
    """The angle in radians, between -π/2 and π/2, whose tangent it is."""

    def reference(self, x):
        return np.arctan(x)


@register("erf")
class Erf(UnaryFloat):
    def reference(self, x):
        return np.vectorize(math.erf, otypes=[x.dtype])(x)


@register("sigmoid")
class Sigmoid(UnaryFloat):
    def reference(self, x):
        e = np.exp(-np.abs(x))
        return np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@register("floor")
class Floor(UnaryFloat):
    def reference(self, x):
        return np.floor(x)


@register("round_even")
class RoundEven(UnaryFloat):
    """The nearest whole number, the even one of two; a zero has the sign of the input."""

    def reference(self, x):
        return np.rint(x)


@register("logical_not")
class LogicalNot(Unary):
    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        expect(x.dtype == BOOL, f"logical_not takes bool, not {x}")
        return (x,)

    def reference(self, x):
        return ~x


@register("add")
class Add(Binary):
    def reference(self, a, b):
        return a + b


@register("sub")
class Sub(Binary):
    def reference(self, a, b):
        return a - b


@register("mul")
class Mul(Binary):
    def reference(self, a, b):
        return a * b


@register("div")
class Div(Binary):
    """Division; of integers, towards minus infinity."""

    def reference(self, a, b):
        return a / b if np.issubdtype(np.result_type(a), np.floating) else a // b


@register("mod")
class Mod(Binary):
    """Remainder with the sign of the divisor."""

    def reference(self, a, b):
        return np.mod(a, b)


@register("pow")
class Pow(Binary):
    """A power; of integers the whole part of it, which is zero for most negative exponents."""

    def reference(self, a, b):
        if np.issubdtype(np.result_type(a), np.floating):
            return np.power(a, b)
        power = np.power(a, np.maximum(b, 0))
        inverse = np.where(a == 1, 1, np.where(a == -1, 1 - 2 * (b & 1), 0))
        return np.where(b < 0, inverse, power).astype(power.dtype)


@register("copysign")
class CopySign(Binary):
    """The size of the first with the sign of the second, of zeros and NaN too."""

    def infer(self, a: TensorType, b: TensorType) -> tuple[TensorType, ...]:
        expect(a.dtype.is_float, f"copysign takes floats, not {a}")
        return super().infer(a, b)

    def reference(self, a, b):
        return np.copysign(a, b)


@register("maximum")
class Maximum(Binary):
    """The larger; NaN where either is NaN."""

    def reference(self, a, b):
        return np.maximum(a, b)


@register("minimum")
class Minimum(Binary):
    """The smaller; NaN where either is NaN."""

    def reference(self, a, b):
        return np.minimum(a, b)


@register("eq")
class Eq(Compare):
    def reference(self, a, b):
        return a == b


@register("ne")
class Ne(Compare):
    def reference(self, a, b):
        return a != b


@register("lt")
class Lt(Compare):
    def reference(self, a, b):
        return a < b


@register("le")
class Le(Compare):
    def reference(self, a, b):
        return a <= b


@register("gt")
class Gt(Compare):
    def reference(self, a, b):
        return a > b


@register("ge")
class Ge(Compare):
    def reference(self, a, b):
        return a >= b


@register("logical_and")
class LogicalAnd(Logical):
    def reference(self, a, b):
        return a & b


@register("logical_or")
class LogicalOr(Logical):
    def reference(self, a, b):
        return a | b


@register("where")
class Where(Op):
    """Elements of the second input where the first (bool) holds, else of the third."""

    def infer(self, condition: TensorType, a: TensorType, b: TensorType) -> tuple[TensorType, ...]:
        expect(condition.dtype == BOOL, f"where takes a bool condition, not {condition}")
        expect(a.dtype == b.dtype, f"where takes equal element types, not {a} and {b}")
        return (TensorType(a.dtype, broadcast(condition.shape, a.shape, b.shape)),)

    def reference(self, condition, a, b):
        return np.where(condition, a, b)


@register("cast")
class Cast(Op):
    """The value in another element type.

    Floats round to nearest even, those of at most 16 bits by way of f32. Narrow floats saturate
    or become infinity or NaN, see `dtypes.encode`. Integers wrap; floats become integers as
    `dtypes.to_integer` says; a bool is whether the value is not zero, NaN included.
    """

    dtype: DType
    saturate: bool = unless(True)

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        return (x.with_dtype(self.dtype),)

    def reference(self, x):
        if self.dtype.is_integer and np.issubdtype(x.dtype, np.floating):
            return to_integer(self.dtype, x)
        return x.astype(self.dtype.value) if not self.dtype.is_float else x


@register("literal")
class Literal(Op):
    """A scalar known when compiling."""

    value: float | int | bool
    dtype: DType

    def infer(self) -> tuple[TensorType, ...]:
        return (TensorType(self.dtype, ()),)

    def reference(self):
        return np.asarray(self.value, self.dtype.value)


#: Kept beside the ops because importers need it: the common type of mixed operands.
common_type = promote
