"""Bits of integers, and what else integers take, on every target, as torch."""

from __future__ import annotations

import pytest
import torch
from everywhere import compare

pytestmark = pytest.mark.slow

ENDS = torch.tensor([-128, -3, -1, 0, 1, 2, 5, 127])
FUNCTIONS = {
    "and": lambda x: (x & x.flip(0), x & 15),
    "or": lambda x: (x | x.flip(0), x | 3),
    "xor": lambda x: (x ^ x.flip(0), x ^ -1),
    "not": lambda x: ~x,
    "left": lambda x: (x << 3, 3 << x, x << torch.arange(8, dtype=x.dtype)),
    "right": lambda x: (x >> 2, 5 >> x, x >> torch.arange(8, dtype=x.dtype)),
    "by_too_much": lambda x: (x << x.flip(0), x >> x.flip(0)),
    "products": lambda x: (x.prod(), x.cumprod(0), x.reshape(2, 4) @ x.reshape(4, 2)),
    "rounding": lambda x: (torch.round(x), torch.signbit(x)),
    "extremes": lambda x: (*x.cummax(0), *x.cummin(0)),
    "order": lambda x: (*x.kthvalue(3), *x.median(0)),
    "sums": lambda x: torch.zeros(3, dtype=x.dtype).scatter_add(
        0, torch.tensor([0, 1, 2, 0, 1, 1, 1, 2]), x
    ),
}


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8"])
def test_integers(name):
    compare(FUNCTIONS, [ENDS.to(getattr(torch, name))])


def test_truth():
    functions = {
        "bits": lambda x: (x & x.flip(0), x | x.flip(0), x ^ x.flip(0), ~x),
        "products": lambda x: (x.prod(), x.cumprod(0), x.cummax(0)[0]),
    }
    compare(functions, [torch.tensor([True, False, True, True])])
