"""Every pair of element types against torch's own conversion, on every target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from everywhere import compare

from dilu.frontend.operators.context import TORCH_DTYPES
from dilu.ir.dtypes import BF16, F8E4M3, F8E5M2, F8E8M0, F16, decode_table

SPECIAL = [
    *(0.0, -0.0, 0.5, -0.5, 0.99, -0.99, 127.9, 128, -128.9, -129, 255.9, 256, -1, -255, -257),
    *(32768, -32769, 65535, 65536, -65536, 2.0**31 - 1, 2.0**31, -(2.0**31), -(2.0**31) - 1),
    *(2.0**32 - 1, 2.0**32, 2.0**32 + 512, 5e9, -5e9, 2.0**40 + 3, 2.0**62, 2.0**63 - 1024),
    *(2.0**63, 2.0**64, -(2.0**63), -(2.0**63) - 2048, 1e20, -1e20, 1e30, float("inf")),
    *(-float("inf"), float("nan"), 463.9, 464, 464.1, 480, 61439, 61440, 65519, 65520, 1e-45),
    *(7e-46, 1e-40, 2.0**-127, 1.1 * 2**-127, 2.0**-128, 1.5 * 2.0**127, 3.4e38, 3.5e38, 1e300),
]  # fmt: skip


def numbers(t: torch.dtype, step: int) -> torch.Tensor:
    """Return all numbers of a type of at most 16 bits; of wider ones those where rounding to a
    narrower one, or running over, changes what becomes of them, and random ones. With a `step`,
    each so-many-th of those of more than 8 bits."""
    first = int(torch.randint(step, ()))
    if t == torch.bool:
        return torch.tensor([False, True])
    if t.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(t)
    if t.itemsize == 2:
        codes = torch.arange(65536, dtype=torch.int32)[first::step]
        return torch.cat([codes.to(torch.uint16).view(t), torch.tensor(SPECIAL).to(t)])
    wide = floats().to(t) if t.is_floating_point else integers(t)
    return torch.cat([torch.tensor(SPECIAL).to(t), wide[first::step]])


def floats() -> torch.Tensor:
    """Return numbers of the narrow types, the middles between neighbours, and what is next to
    those in f32 and in f64."""
    narrow = np.concatenate([decode_table(t) for t in (F8E4M3, F8E5M2, F8E8M0)])
    wider = np.concatenate([decode_table(t)[::13] for t in (F16, BF16)])
    middles = []
    for values in (narrow, wider):
        finite = np.unique(values[np.isfinite(values)])
        middles += [finite, (finite[1:] + finite[:-1]) / 2]
    near = [m * (1 + sign * 2.0**p) for m in middles for sign in (-1, 1) for p in (-23, -40)]
    random = torch.randn(2000) * 10 ** (torch.rand(2000, dtype=torch.float64) * 35 - 10)
    return torch.cat([torch.from_numpy(np.concatenate([*middles, *near])), random])


def integers(t: torch.dtype) -> torch.Tensor:
    """Return powers of two and what is next to them at the last places of f32, f16 and bf16."""
    info = torch.iinfo(t)
    found: set[int] = set()
    for k in range(t.itemsize * 8 + 1):
        last = [2 ** max(k - m, 0) for m in (8, 9, 11, 12, 24, 25, 53, 54)]
        for step in (0, 1, *last, *(3 * s for s in last), 2 ** max(k - 9, 0) + 1):
            found |= {2**k + step, 2**k - step, -(2**k) - step, step - 2**k}
    return torch.tensor(sorted(n for n in found if info.min <= n <= info.max), dtype=t)


def check(step: int, **options: bool) -> None:
    """Make all casts in one module: an input of each type, a result for each other type."""
    table, oracles = {}, {}
    for i, old in enumerate(TORCH_DTYPES):
        for new in TORCH_DTYPES:
            if old == new:
                continue
            table[f"{old} to {new}"] = lambda *x, i=i, new=new: x[i].to(new)
            if new == torch.uint32 and old.is_floating_point:
                # torch's vectors make other numbers than its scalars of what does not fit: ours
                # are those of the scalars.
                oracles[f"{old} to {new}"] = lambda *x, i=i: x[i].to(torch.int64).to(torch.uint32)
    inputs = [numbers(t, step) for t in TORCH_DTYPES]
    compare(table, inputs, oracles=oracles, **options)


@pytest.mark.slow
def test_every_pair_of_types():
    check(1, interpreted=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_pair_of_types_under_the_interpreter():
    check(61, compiled=False)


@pytest.mark.slow
def test_constants_are_cast_when_compiling():
    """What is folded is what would be computed."""
    held = torch.tensor(SPECIAL, dtype=torch.float64)
    table = {str(t): lambda x, t=t: held.to(t).to(torch.float64) + x.to(torch.float64)
             for t in TORCH_DTYPES}  # fmt: skip
    table["f32"] = lambda x: held.float().to(torch.float8_e5m2).float() + x
    del table["torch.uint32"]  # see `check`
    compare(table, [torch.zeros(1)], interpreted=False)


def test_scalars_are_cast():
    """Numbers that a type does not hold exactly, in tensors of it."""
    numbers = {
        torch.float8_e5m2: 1000.0,
        torch.float8_e4m3fn: 0.3,
        torch.float8_e8m0fnu: 3.0,
        torch.float16: 60001.0,
        torch.bfloat16: 0.1,
        torch.int8: -1,
    }
    table = {
        str(t): lambda x, t=t, n=n: torch.full((3,), n, dtype=t).to(torch.float64) + x
        for t, n in numbers.items()
    }
    compare(table, [torch.zeros(1, dtype=torch.float64)], interpreted=False)
