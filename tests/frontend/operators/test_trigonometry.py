"""Angles, hyperbolic functions, rounding and signs: against f64, on every target."""

from __future__ import annotations

import math

import pytest
import torch
from everywhere import compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, under Triton's interpreter
]

INF, NAN = math.inf, math.nan
#: Ends, zeros of both signs, numbers that are not normal, halves and what lies beside them.
NUMBERS = torch.tensor([
    *(INF, -INF, NAN, 0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 88.5, 89, -88, -104, -200, 1e9, 1e18),
    *(0.5, -0.5, 1, -1, 2, -3, 1.5, 2.5, 3.5, -2.5, 0.49999997, -0.49999997, 8388609.0, 127, -150),
    *(1e-7, -1e-7, 0.99999994, -0.99999994, 2.4142137, 0.41421357, 0.66, 1e-3, 20.0, -9.0),
])  # fmt: skip

FUNCTIONS = {
    **{n: getattr(torch, n) for n in (
        "atan", "asin", "acos", "cosh", "sinh", "asinh", "acosh", "atanh", "round", "signbit")},
    "tan": lambda x: torch.tan(torch.where(x.abs() < 1e6, x, 0)),  # whose sine is Triton's own
    "atan2": lambda x: torch.atan2(x[:, None], x[None]),
    "copysign": lambda x: torch.copysign(x, x.flip(0)),
    "copysign_of_zero": lambda x: 1 / torch.copysign(x * 0, x),
    "copysign_to": lambda x: torch.copysign(x, -0.0),
    "signed_round": lambda x: 1 / torch.round(x),
    "heaviside": lambda x: torch.heaviside(x, x.flip(0)),
    "angle": torch.angle,
    "prod": lambda x: (x[:36].reshape(4, 9).prod(1), x[:36].reshape(4, 9).prod(0), x.prod()),
}  # fmt: skip


def wide(function):
    """Return what a function gives in f64, in the element type of its input."""

    def run(x):
        out = function(x.double())
        each = out if isinstance(out, tuple) else (out,)
        return tuple(t.to(x.dtype) if t.is_floating_point() else t for t in each)

    return run


def numbers() -> torch.Tensor:
    return torch.cat([NUMBERS, torch.randn(64) * 5, torch.rand(64) * 2 - 1])


def test_f32():
    oracles = {n: wide(f) for n, f in FUNCTIONS.items()}
    compare(FUNCTIONS, [numbers()], 3e-6, oracles=oracles)


def test_f64():
    compare(FUNCTIONS, [numbers().double()], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow(dtype):
    """To the last place: f32 is rounded, which may lie beside a tie of f64. (A product of many is
    rounded more often, and a NaN's sign is lost in the reference.)"""
    functions = {
        n: f for n, f in FUNCTIONS.items() if not n.startswith(("prod", "copysign", "signbit"))
    }
    oracles = {n: wide(f) for n, f in functions.items()}
    compare(functions, [numbers().to(dtype)], 2**-7, oracles=oracles)


def test_decimals():
    x = torch.tensor([1.005, 2.675, -0.125, 1234.5, -1235.0, 0.05, INF, NAN])
    functions = {f"{d}": lambda x, d=d: torch.round(x, decimals=d) for d in (0, 1, 2, -2)}
    compare(functions, [x], 1e-6)
