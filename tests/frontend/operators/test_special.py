"""Special functions: against torch in f64, on every target."""

from __future__ import annotations

import pytest
import torch
from everywhere import compare
from test_numerics import NUMBERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, under Triton's interpreter
]

FUNCTIONS = {
    **{n: getattr(torch, n) for n in ("erfc", "erfinv", "lgamma", "digamma")},
    "erfcx": torch.special.erfcx,
    "ndtr": torch.special.ndtr,
    "erfinv_within": lambda x: torch.erfinv(x / 200),
}
#: Poles, both sides of the reflections, where the tails begin and where they end.
PLACES = torch.tensor([
    2.5, 3.5, -2.5, -7, -3, 30, 171, 1e9, 1e18, 0.99999994, -0.99999994, 9, 10, 12, 1.25, 26.5,
])  # fmt: skip


def numbers() -> torch.Tensor:
    return torch.cat([NUMBERS, PLACES, torch.randn(64) * 5, torch.rand(64) * 2 - 1])


def oracles(dtype: torch.dtype):
    return {n: lambda x, f=f: f(x.double()).to(dtype) for n, f in FUNCTIONS.items()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
)
def test_narrow(dtype, tolerance):
    compare(FUNCTIONS, [numbers().to(dtype)], tolerance, oracles=oracles(dtype))


def test_f64():
    """(Beside a pole, torch's digamma has fewer digits.)"""
    x = numbers().double()
    compare(FUNCTIONS, [x[(x + 0.99999994).abs() > 1e-9]], 1e-11)
