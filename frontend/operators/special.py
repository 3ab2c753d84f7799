"""Special functions, in f64 inside where f32 would lose digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.dtypes import F64
from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from .context import Context, lowers

#: Of (1 + 2x)·exp(x²)·erfc(x) for x ≥ 0, the highest power first, in t = (x - k) / (x + k) with
#: k = 3.75 between -1 and 1: the Chebyshev interpolant of degree 22, relative error 7e-16.
#: Source of the form: M. Shepherd and J. Laframboise, Math. Comp. 36 (1981).
_ERFCX = (
    -2.736472307125394e-09, -1.959459609296809e-09, 3.259940601858212e-08, 1.8810929043095557e-08,
    -2.500365737822442e-07, -5.0883994183765484e-08, 1.7439395243922008e-06,
    -9.792204683811655e-07, -1.143967237886608e-05, 2.2387538904853492e-05,
    5.1647396201705445e-05, -0.00029015534211795826, 0.00029371408100074733,
    0.0017556261628471606, -0.009746579619722634, 0.02836227737239942, -0.058693398584587594,
    0.09230432116426594, -0.10880393014193535, 0.08227673848999517, 0.0035854154854662633,
    -0.14024059858554525, 1.2375126308378275,
)  # fmt: skip
_ERFCX_CENTRE = 3.75

#: Of the inverse of erf in w = -log(1 - y²): up to 5 in w - 2.5, beyond it in √w - 3.
#: Source: M. Giles, Approximating the erfinv function (2010), single precision.
_ERFINV_NEAR = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
                -0.00125372503, -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
_ERFINV_FAR = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
               -0.0076224613, 0.00943887047, 1.00167406, 2.83297682)  # fmt: skip

#: Of the gamma function. Source: C. Lanczos, J. SIAM Numer. Anal. B 1 (1964), g = 7 and 9 terms,
#: with P. Godfrey's coefficients.
_LANCZOS_G = 7
_LANCZOS = (676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
            12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6,
            1.5056327351493116e-7)  # fmt: skip
_LANCZOS_FIRST = 0.99999999999980993

#: The derivative of log gamma at x beyond 10: log(x) - 1/2x and these, times powers of 1/x² from
#: the first on. They are Bernoulli's numbers B₂ₙ / 2n.
_DIGAMMA = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760)
_DIGAMMA_STEPS = 10


def doubled(c: Context, x: Value) -> Value:
    """Return a number, or an integer as a number, in f64."""
    return c.cast(c.cast(x, c.dtype), F64)


def polynomial(c: Context, x: Value, coefficients: Sequence[float]) -> Value:
    """Return a polynomial's value, its coefficients given from the highest power on."""
    value = c.operand(coefficients[0], x.type.dtype)
    for coefficient in coefficients[1:]:
        value = c.apply(ew.Add(), c.emit(ew.Mul(), value, x), coefficient)
    return value


def scaled_tail(c: Context, x: Value) -> Value:
    """Return exp(x²)·erfc(x) of f64 numbers that are not negative."""
    t = c.apply(ew.Div(), 2 * _ERFCX_CENTRE, c.apply(ew.Add(), x, _ERFCX_CENTRE))
    t = c.apply(ew.Sub(), 1.0, t)
    below = c.apply(ew.Add(), c.apply(ew.Mul(), x, 2.0), 1.0)
    return c.emit(ew.Div(), polynomial(c, t, _ERFCX), below)


def _square_exp(c: Context, x: Value, sign: float) -> Value:
    return c.emit(ew.Exp(), c.apply(ew.Mul(), c.emit(ew.Mul(), x, x), sign))


@lowers("aten.erfc.default", "aten.special_erfc.default")
def erfc(c: Context, x: Value) -> Value:
    return c.result(complement_of_erf(c, doubled(c, x)))


def complement_of_erf(c: Context, x: Value) -> Value:
    """Return 1 - erf(x) of f64 numbers, all digits of it where that is small."""
    size = c.emit(ew.Abs(), x)
    tail = c.emit(ew.Mul(), _square_exp(c, size, -1.0), scaled_tail(c, size))
    return c.emit(ew.Where(), c.apply(ew.Lt(), x, 0.0), c.apply(ew.Sub(), 2.0, tail), tail)


@lowers("aten.special_erfcx.default", "prims.erfcx.default")
def erfcx(c: Context, x: Value) -> Value:
    x = doubled(c, x)
    tail = scaled_tail(c, c.emit(ew.Abs(), x))
    other = c.emit(ew.Sub(), c.apply(ew.Mul(), _square_exp(c, x, 1.0), 2.0), tail)
    return c.result(c.emit(ew.Where(), c.apply(ew.Lt(), x, 0.0), other, tail))


@lowers("aten.erfinv.default", "aten.special_erfinv.default")
def erfinv(c: Context, y: Value) -> Value:
    """Giles's polynomials, and Newton's steps that make f64 of them."""
    y = doubled(c, y)
    size = c.emit(ew.Abs(), y)
    product = c.emit(ew.Mul(), c.apply(ew.Sub(), 1.0, size), c.apply(ew.Add(), size, 1.0))
    w = c.emit(ew.Neg(), c.emit(ew.Log(), product))
    near = polynomial(c, c.apply(ew.Sub(), w, 2.5), _ERFINV_NEAR)
    far = polynomial(c, c.apply(ew.Sub(), c.emit(ew.Sqrt(), w), 3.0), _ERFINV_FAR)
    x = c.emit(ew.Mul(), size, c.emit(ew.Where(), c.apply(ew.Lt(), w, 5.0), near, far))
    for _ in range(2 if c.dtype == F64 else 1):
        # Of the complements, which have digits where erf is nearly 1.
        apart = c.emit(ew.Sub(), complement_of_erf(c, x), c.apply(ew.Sub(), 1.0, size))
        slope = c.apply(ew.Mul(), _square_exp(c, x, -1.0), 2 / math.sqrt(math.pi))
        x = c.emit(ew.Add(), x, c.emit(ew.Div(), apart, slope))
    x = c.emit(ew.Where(), c.apply(ew.Eq(), size, 1.0), c.operand(math.inf, F64), x)
    return c.result(c.emit(ew.CopySign(), x, y))


@lowers("aten.lgamma.default", "aten.special_gammaln.default")
def lgamma(c: Context, x: Value) -> Value:
    """Below 1/2 by reflection: Γ(x)·Γ(1 - x) = π / sin(πx)."""
    x = doubled(c, x)
    low = c.apply(ew.Lt(), x, 0.5)
    above = c.emit(ew.Where(), low, c.apply(ew.Sub(), 1.0, x), x)
    sine = c.emit(ew.Abs(), c.emit(ew.Sin(), _angle(c, x)))
    mirror = c.emit(ew.Log(), c.apply(ew.Div(), math.pi, sine))
    value = _log_gamma(c, above)
    value = c.emit(ew.Where(), low, c.emit(ew.Sub(), mirror, value), value)
    endless = c.apply(ew.Eq(), c.emit(ew.Abs(), x), math.inf)
    return c.result(c.emit(ew.Where(), endless, c.operand(math.inf, F64), value))


def _angle(c: Context, x: Value) -> Value:
    """Return πx without whole turns by π, near 0 where x is near a whole number."""
    return c.apply(ew.Mul(), c.emit(ew.Sub(), x, c.emit(ew.RoundEven(), x)), math.pi)


def _log_gamma(c: Context, x: Value) -> Value:
    """Return log Γ(x) for x from 1/2 on."""
    total: Any = _LANCZOS_FIRST
    for i, coefficient in enumerate(_LANCZOS):
        term = c.apply(ew.Div(), coefficient, c.apply(ew.Add(), x, float(i)))
        total = c.apply(ew.Add(), term, total)
    t = c.apply(ew.Add(), x, _LANCZOS_G - 0.5)
    power = c.emit(ew.Mul(), c.apply(ew.Sub(), x, 0.5), c.emit(ew.Log(), t))
    rest = c.apply(ew.Add(), c.emit(ew.Log(), total), math.log(2 * math.pi) / 2)
    return c.emit(ew.Add(), c.emit(ew.Sub(), power, t), rest)


@lowers("aten.digamma.default", "aten.special_digamma.default", "aten.special_psi.default")
def digamma(c: Context, x: Value) -> Value:
    """By recurrence up to where the series holds; below 1/2 by reflection."""
    x = doubled(c, x)
    low = c.apply(ew.Lt(), x, 0.5)
    y = c.emit(ew.Where(), low, c.apply(ew.Sub(), 1.0, x), x)
    far = c.apply(ew.Add(), y, float(_DIGAMMA_STEPS))
    inverse = c.apply(ew.Div(), 1.0, far)
    square = c.emit(ew.Mul(), inverse, inverse)
    series = c.emit(ew.Mul(), polynomial(c, square, _DIGAMMA[::-1]), square)
    value = c.emit(ew.Sub(), c.emit(ew.Log(), far), c.apply(ew.Mul(), inverse, 0.5))
    value = c.emit(ew.Sub(), value, series)
    for i in range(_DIGAMMA_STEPS):
        value = c.emit(ew.Sub(), value, c.apply(ew.Div(), 1.0, c.apply(ew.Add(), y, float(i))))
    angle = _angle(c, x)
    cotangent = c.emit(ew.Div(), c.emit(ew.Cos(), angle), c.emit(ew.Sin(), angle))
    mirrored = c.emit(ew.Sub(), value, c.apply(ew.Mul(), cotangent, math.pi))
    value = c.emit(ew.Where(), low, mirrored, value)
    whole = c.emit(ew.LogicalAnd(), low, c.apply(ew.Eq(), angle, 0.0))
    value = c.emit(ew.Where(), whole, c.operand(math.nan, F64), value)
    pole = c.emit(ew.CopySign(), c.operand(math.inf, F64), c.emit(ew.Neg(), x))
    return c.result(c.emit(ew.Where(), c.apply(ew.Eq(), x, 0.0), pole, value))
