"""Index arithmetic: sympy expressions over loop variables and sizes, with exact division.

`floor_div` and `remainder` use what is known of the variables' ranges, so that the index chains of
reshapes, slices and transposes come out as plain strides wherever they are. Index expressions are
never negative where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from ..ir.types import Dim, Shape, dim


class FloorDiv(sympy.Function):
    """`a // b` of non-negative numbers."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True


class Remainder(sympy.Function):
    """`a % b` of non-negative numbers."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True


def floor_div(a: Dim, b: Dim) -> Any:
    """Return the index expression `a // b`, for 0 <= a."""
    return FloorDiv(a, b)


def modulo(a: Dim, b: Dim) -> Any:
    """Return the index expression `a % b`, for 0 <= a."""
    return Remainder(a, b)


@dataclass(frozen=True)
class Range:
    """The values of a variable: `start <= variable < stop`."""

    start: Dim
    stop: Dim


Ranges = Mapping[sympy.Symbol, Range]


def variable(name: str) -> sympy.Symbol:
    """Return the loop variable called `name`."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def index(value: Dim) -> Dim:
    """Return the canonical form of an index expression."""
    if isinstance(value, int):
        return value
    expanded: Any = sympy.expand(value)
    if expanded.is_Integer:
        return int(expanded)
    return _rejoined(expanded) if expanded.is_Add and expanded.has(Remainder) else expanded


def _rejoined(value: Any) -> Dim:
    """Replace `c·d·(x // d) + c·(x % d)` by `c·x`."""
    for term in value.args:
        factor, rest = _coefficient(term)
        if not isinstance(rest, Remainder):
            continue
        parts: Any = rest.args
        x, d = parts
        partner = factor * d * floor_div(x, d)
        if sympy.expand(partner) in value.args:
            return index(value - term - partner + factor * x)
    return value


def _coefficient(term: Any) -> tuple[Any, Any]:
    """Split a product into what multiplies its Remainder factor, and that factor."""
    factors = sympy.Mul.make_args(term)
    found = [f for f in factors if isinstance(f, Remainder)]
    if len(found) != 1:
        return term, sympy.Integer(1)
    return sympy.Mul(*(f for f in factors if f is not found[0])), found[0]


def upper_bound(value: Dim, ranges: Ranges) -> Dim | None:
    """Return a bound that `value` does not exceed, or None."""
    return _bound(value, ranges, upper=True)


def lower_bound(value: Dim, ranges: Ranges) -> Dim | None:
    """Return a bound that `value` does not fall below, or None."""
    return _bound(value, ranges, upper=False)


def _bound(value: Dim, ranges: Ranges, *, upper: bool) -> Dim | None:
    total: Dim = 0
    for term in sympy.Add.make_args(sympy.sympify(value)):
        number, rest = term.as_coeff_Mul()
        if not number.is_Integer:
            return None
        bound = _term_bound(rest, ranges, upper=upper == bool(number > 0))
        if bound is None:
            return None
        total = total + number * bound
    return dim(sympy.sympify(total))


def _term_bound(term: Any, ranges: Ranges, *, upper: bool) -> Dim | None:
    product: Any = 1
    factors: tuple[Any, ...] = sympy.Mul.make_args(term)
    for factor in factors:
        bound: Any
        parts: Any = factor.args
        if factor.is_Integer:
            bound = int(factor)
        elif factor in ranges:
            known = ranges[factor]
            bound = known.stop - 1 if upper else known.start
        elif isinstance(factor, FloorDiv):
            top = _bound(parts[0], ranges, upper=True)
            if isinstance(top, int) and parts[1].is_Integer:
                top = top // int(parts[1])
            bound = top if upper else 0
        elif isinstance(factor, Remainder):
            bound = parts[1] - 1 if upper else 0
        elif factor.is_positive:
            bound = factor  # a size
        else:
            return None
        if bound is None:
            return None
        product = product * bound
    return product


def is_below(value: Dim, bound: Dim, ranges: Ranges) -> bool:
    """Whether `value < bound` is sure."""
    top = upper_bound(value, ranges)
    return top is not None and _sure_positive(bound - top)


def is_at_least(value: Dim, bound: Dim, ranges: Ranges) -> bool:
    """Whether `value >= bound` is sure."""
    bottom = lower_bound(value, ranges)
    return bottom is not None and _sure_positive(bottom - bound + 1)


def _sure_positive(value: Dim) -> bool:
    value = dim(value)
    if isinstance(value, int):
        return value > 0
    return value.is_positive is True


def divmod_index(value: Dim, divisor: Dim, ranges: Ranges) -> tuple[Dim, Dim]:
    """Return `(value // divisor, value % divisor)`, simplified by the ranges."""
    divisor = dim(divisor)
    if divisor == 1:
        return value, 0
    if isinstance(value, int) and isinstance(divisor, int):
        return divmod(value, divisor)
    whole: list[sympy.Expr] = []
    rest: list[sympy.Expr] = []
    for term in sympy.Add.make_args(sympy.sympify(value)):
        quotient = term / divisor
        divides = quotient.is_integer and sympy.denom(quotient) == 1
        (whole if divides else rest).append(quotient if divides else term)
    quotient, left = index(sympy.Add(*whole)), index(sympy.Add(*rest))
    if isinstance(divisor, int) and not isinstance(left, int):
        return _split_numbers(quotient, left, divisor, ranges)
    if is_below(left, divisor, ranges) and is_at_least(left, 0, ranges):
        return quotient, left
    if left == 0:
        return quotient, 0
    return index(quotient + floor_div(left, divisor)), index(modulo(left, divisor))


def _split_numbers(quotient: Dim, left: Any, divisor: int, ranges: Ranges) -> tuple[Dim, Dim]:
    """Finish a division by a number: multiples inside coefficients, common factors, ranges."""
    number, variables = left.as_coeff_Add()
    extra, number = divmod(int(number), divisor)
    quotient, left = index(quotient + extra), index(variables + number)
    if is_below(left, divisor, ranges) and is_at_least(left, 0, ranges):
        return quotient, left
    common = math.gcd(divisor, *(int(t.as_coeff_Mul()[0]) for t in sympy.Add.make_args(left)))
    if common > 1:
        high, low = divmod_index(index(left / common), divisor // common, ranges)
        return index(quotient + high), index(common * low)
    parts: Any = left.args
    if isinstance(left, FloorDiv) and parts[1].is_Integer:
        x, d = parts
        high, _ = divmod_index(x, int(d) * divisor, ranges)
        return index(quotient + high), modulo(left, divisor)
    return index(quotient + floor_div(left, divisor)), modulo(left, divisor)


def flat_index(indices: Sequence[Dim], shape: Shape) -> Dim:
    """Return the row-major position of `indices` in `shape`."""
    flat: Dim = 0
    for i, size in zip(indices, shape, strict=True):
        flat = flat * size + i
    return index(flat)


def split_index(flat: Dim, shape: Shape, ranges: Ranges) -> tuple[Dim, ...]:
    """Return the indices in `shape` of the row-major position `flat`."""
    out: list[Dim] = []
    for size in reversed(shape[1:]):
        flat, low = divmod_index(flat, size, ranges)
        out.append(low)
    return (flat, *reversed(out)) if shape else ()


def reshape_index(
    indices: Sequence[Dim], shape: Shape, old_shape: Shape, ranges: Ranges
) -> tuple[Dim, ...]:
    """Return where element `indices` of a value of `shape` lies in the value of `old_shape`."""
    out: dict[int, Dim] = {}
    for new_axes, old_axes in _groups(shape, old_shape):
        if len(new_axes) == len(old_axes) == 1:
            out[old_axes[0]] = indices[new_axes[0]]
            continue
        flat = flat_index([indices[a] for a in new_axes], tuple(shape[a] for a in new_axes))
        parts = split_index(flat, tuple(old_shape[a] for a in old_axes), ranges)
        out.update(zip(old_axes, parts, strict=True))
    return tuple(out.get(a, 0) for a in range(len(old_shape)))


def _groups(shape: Shape, old_shape: Shape) -> list[tuple[list[int], list[int]]]:
    """Pair runs of axes with equal products; axes of size 1 are left out."""
    new = [a for a, d in enumerate(shape) if d != 1]
    old = [a for a, d in enumerate(old_shape) if d != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(new) and j < len(old):
        first, second = i, j
        a, b = shape[new[i]], old_shape[old[j]]
        while dim(a - b) != 0:
            if _divides(a, b) and i + 1 < len(new):
                i += 1
                a = a * shape[new[i]]
            elif j + 1 < len(old):
                j += 1
                b = b * old_shape[old[j]]
            elif i + 1 < len(new):
                i += 1
                a = a * shape[new[i]]
            else:
                break
        i, j = i + 1, j + 1
        groups.append((new[first:i], old[second:j]))
    return groups


def _divides(a: Dim, b: Dim) -> bool:
    """Whether a product `a` should take in another axis to become `b`."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return sympy.denom(sympy.sympify(b) / a) == 1
