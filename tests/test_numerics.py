"""Infinities, NaN, zeros of both signs and integers at their ends: as torch, on every target."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
import torch
from everywhere import Compiled, compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, under Triton's interpreter
]

INF, NAN = math.inf, math.nan
CLOSE = 3e-6

NUMBERS = torch.tensor([
    *(INF, -INF, NAN, 0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 88.5, 89, -88, -103, -104, -200),
    *(3.83, 3.84, -3.84, 5, -5, 10, -10, 20, -20, 0.5, -0.5, 1, -1, 2, -3, 127, 128, -126, -150),
    *(1e-7, -1e-7),
])  # fmt: skip


def of_torch(*names: str):
    return {n: getattr(torch, n) for n in names}


def of_nn(*names: str):
    return {n: getattr(F, n) for n in names}


ELEMENTWISE = {
    **of_torch(
        "neg", "abs", "exp", "log", "sqrt", "rsqrt", "tanh", "erf", "sigmoid", "floor", "ceil",
        "trunc", "sign", "reciprocal", "square", "exp2", "log2", "log10", "log1p", "expm1",
        "isnan", "isinf", "isfinite", "isposinf", "isneginf", "nan_to_num",
    ),
    **of_nn(
        "relu", "relu6", "silu", "gelu", "softplus", "hardswish", "hardsigmoid", "hardtanh",
        "leaky_relu", "elu", "selu", "celu", "mish", "logsigmoid", "softsign", "hardshrink",
    ),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_0": lambda x: F.leaky_relu(x, 0.0),
    "threshold": lambda x: F.threshold(x, 0.5, 2.0),
    **{f"pow({e})": lambda x, e=e: x**e
       for e in (0, 0.5, -0.5, 2, 3, -1, -2, 1.7, -3, 4, 0.25, -1.5, INF, -INF, NAN)},
    **{f"pow({b}, x)": lambda x, b=b: torch.pow(b, x)
       for b in (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, INF, -INF, NAN, -0.5)},
    "clamp_crossed": lambda x: x.clamp(2, -1),
    "clamp_nan": lambda x: x.clamp(min=NAN),
    "nan_to_num_told": lambda x: torch.nan_to_num(x, 1.0, 2.0, 3.0),
    **{f"x {op.__name__} {b}": lambda x, op=op, b=b: op(x, b)
       for op in (operator.truediv, operator.floordiv, operator.mod, torch.fmod)
       for b in (0.0, -0.0, 0.7, -3.0, INF, -INF, NAN)},
    "div_trunc": lambda x: torch.div(x, 0.7, rounding_mode="trunc"),
    "times_0": lambda x: x * 0,
    "plus_0": lambda x: 1 / (x + 0.0),
    "minus_0": lambda x: 1 / (x - 0.0),
    "minus_itself": lambda x: x - x,
    "over_itself": lambda x: x / x,
    "larger_of_itself": lambda x: torch.maximum(x, x),
    "equals_itself": lambda x: x == x,
    "zeros": lambda x: 1 / torch.where(x > 0, 0.0, -0.0) + 1 / torch.where(x > 0, -0.0, 0.0),
    "truth": torch.Tensor.bool,
}  # fmt: skip


def test_elementwise():
    """(torch's vectors give NaN for the remainders of numbers from about 1e38 on: not tried.)"""
    compare(ELEMENTWISE, [torch.cat([NUMBERS, torch.randn(64) * 5])], CLOSE)


ROWS = torch.tensor([
    [-INF] * 6, [0, -INF, 1, 2, -INF, 3], [INF, 1, 2, 3, 4, 5], [NAN, 1, 2, 3, -1, 0],
    [1, 2, NAN, INF, -INF, 0], [-INF, INF, 0, 0, 0, 0], [0, -0.0, 0, -0.0, 0, -0.0],
    [-0.0, 0, 1, 1, -1, -1], [NAN] * 6, [INF] * 6, [1e4, -1e4, 1e4, 3e4, 3e4, -3e4], [5] * 6,
    [INF, NAN, INF, 1, 1, NAN],
])  # fmt: skip


def both_axes(f):
    return lambda x: (f(x, -1), f(x[:8], 0))


def halves(f):
    return lambda x: f(x[:, :3], x[:, 3:])


REDUCTIONS = {
    **{name: both_axes(getattr(torch, name)) for name in (
        "softmax", "log_softmax", "logsumexp", "amax", "amin", "argmax", "argmin", "sum", "mean",
        "cumsum", "any", "all")},
    "safe_softmax": lambda x: torch.ops.aten._safe_softmax(x, -1),
    "logsumexp_of_axes": lambda x: (x.logsumexp((0, 1)), x[:3].logsumexp((0, 1), keepdim=True)),
    "max": lambda x: (*x.max(-1), *x.min(0), x[:3].max(), x[:3].min(), x.max(), x.argmax()),
    "aminmax": lambda x: (*torch.aminmax(x, dim=1), *torch.aminmax(x)),
    "var": lambda x: (x.var(-1), x.std(-1, correction=0), *torch.var_mean(x, dim=0)),
    "var_of_one": lambda x: (x[:, :1].var(-1), x[:1].std(0), x[:, :1].var(-1, correction=0)),
    "var_of_fewer": lambda x: (x.var(-1, correction=6), x[6:].var(-1, correction=9)),
    "topk": lambda x: (x.topk(3)[0], x.topk(3, largest=False)[0]),
    "sort": lambda x: (*x.sort(stable=True), *x.sort(descending=True, stable=True)),
    "argsort": lambda x: x.argsort(dim=0, stable=True),
    **{f"norm({o})": lambda x, o=o: torch.linalg.vector_norm(x[2:], o, -1)
       for o in (0, 1, 2, 3, 0.5, -1, -2, INF, -INF)},
    "norms": lambda x: (x.norm(), x.norm(p=3, dim=0), F.normalize(x, dim=-1)),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x[None], len(x)),
    **{name: halves(getattr(torch, name)) for name in (
        "maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2", "remainder", "fmod",
        "pow", "floor_divide", "div")},
    "logaddexp_of_itself": lambda x: torch.logaddexp(x, x),
    "clamp": lambda x: x.clamp(x.flip(0), x.flip(1)),
    "where": lambda x: torch.where(x > x.flip(1), x, x.flip(0)),
    "compare": lambda x: tuple(
        op(x, x.flip(0))
        for op in (operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge)
    ),
    "lerp": lambda x: (torch.lerp(x, x.flip(0), 0.5), torch.lerp(x, x.flip(0), 0.25)),
    # (Large rows times random ones cancel, and are off by their terms' last places.)
    "product": lambda x: (
        x[: len(ROWS)] @ x[: len(ROWS)].T,
        x[:10] @ x[len(ROWS):].T,
        F.linear(x, torch.ones(7, 6, dtype=x.dtype)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16],
                         ids=str)  # fmt: skip
def test_reductions(dtype):
    rows = torch.cat([ROWS, torch.randn(3, 6)]).to(dtype)
    refused = {"product"} if dtype == torch.float64 else set()
    compare(
        {name: f for name, f in REDUCTIONS.items() if name not in refused},
        [rows],
        CLOSE if dtype.itemsize > 2 else 2e-2,
        interpreted=dtype in (torch.float32, torch.bfloat16),
    )


def whole_numbers(t: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all pairs of numbers of a type, many of them at its ends."""
    info = torch.iinfo(t)
    found = {info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, 7, 100, -1, -2, -7}
    line = torch.tensor(sorted(n for n in found if info.min <= n <= info.max), dtype=t)
    a, b = torch.meshgrid(line, line, indexing="ij")
    return a.reshape(-1).contiguous(), b.reshape(-1).contiguous()


def divisor(b: torch.Tensor) -> torch.Tensor:
    """torch stops at a division by zero, and at one of the smallest number by -1."""
    return torch.where((b == 0) | (b == -1), 3, b)


INTEGERS = {
    "arithmetic": lambda a, b: (a + b, a - b, a * b, -a, abs(a), a**2, a**3, a.square()),
    "extremes": lambda a, b: (torch.maximum(a, b), torch.minimum(a, b), a.clamp(3, 1)),
    "clamp": lambda a, b: (torch.clamp(a, b, a), torch.relu(a), torch.sign(a)),
    "floor": lambda a, b: (a // divisor(b), a % divisor(b)),
    "trunc": lambda a, b: (
        torch.div(a, divisor(b), rounding_mode="trunc"),
        torch.fmod(a, divisor(b)),
    ),
    "pow": lambda a, b: (torch.pow(a, b), torch.pow(2, b), torch.pow(-1, b)),
    "scalars": lambda a, b: (a + 3, a * 7, 3 - a, a > 1.5, a + 1.5, a / b, a * 0, torch.exp(a)),
    "sums": lambda a, b: (a.sum(), a.sum(0, dtype=a.dtype), a.cumsum(0), a.any(), a.all()),
    "order": lambda a, b: (*a.max(0), *b.min(0), a.argmax(), a.argmin(), b.argmin()),
    "topk": lambda a, b: (b.topk(3)[0], b.topk(3, largest=False)[0], *torch.aminmax(a)),
    "sort": lambda a, b: (*b.sort(stable=True), *b.sort(descending=True, stable=True)),
    "where": lambda a, b: (torch.where(a > b, a, 3), a.masked_fill(a > b, 7), a.bool()),
}
TYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def test_integers():
    inputs = [x for t in TYPES for x in whole_numbers(t)]
    table = {
        f"{name} of {t}": lambda *x, f=f, k=k: f(x[2 * k], x[2 * k + 1])
        for name, f in INTEGERS.items()
        for k, t in enumerate(TYPES)
        if not (name == "scalars" and t.itemsize < 2)
    }
    flags = torch.tensor([True, False, True, True, False])
    table["bool"] = lambda *x: (
        *x[-1].max(0), *x[-1].min(0), *x[-1].sort(stable=True), x[-1].sum(), x[-1].cumsum(0),
        x[-1].any(), x[-1].all(), x[-1].amax(), x[-1] + True, x[-1] + 2, x[-1] + 1.5,
    )  # fmt: skip
    compare(table, [*inputs, flags], CLOSE)


def test_integer_division_stops_nothing():
    """Where torch raises, or ends the process: zero by zero divisors, and what wraps."""
    low = [torch.iinfo(t).min for t in TYPES]
    inputs = [torch.tensor([n, n, 5, 0], dtype=t) for n, t in zip(low, TYPES, strict=True)]
    by = [torch.tensor([0, 1 if t == torch.uint8 else -1, 0, 0], dtype=t) for t in TYPES]
    wrapped = [torch.tensor([0, n, 0, 0], dtype=t) for n, t in zip(low, TYPES, strict=True)]
    zeros = [torch.zeros(4, dtype=t) for t in TYPES]
    count = len(TYPES)
    compare(
        {"div": lambda *x: tuple(x[k] // x[count + k] for k in range(count)),
         "mod": lambda *x: tuple(x[k] % x[count + k] for k in range(count))},
        [*inputs, *by],
        oracles={"div": lambda *_: wrapped, "mod": lambda *_: zeros},
    )  # fmt: skip


def test_attention_where_rows_see_no_key():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.rand(5, 7) < 0.5
    mask[1], mask[3] = False, True
    heads = torch.rand(2, 4, 5, 7) < 0.3
    batch = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 7)
    added = torch.where(mask, torch.randn(5, 7), -INF)
    third = torch.arange(7)[:, None] == 2
    S = F.scaled_dot_product_attention
    table = {
        "bool": lambda q, k, v, m, a: S(q, k, v, attn_mask=m),
        "float": lambda q, k, v, m, a: S(q, k, v, attn_mask=a),
        "nothing": lambda q, k, v, m, a: S(q, k, v, attn_mask=m & False),
        "lowest": lambda q, k, v, m, a: S(
            q, k, v, attn_mask=torch.where(m, 0.0, torch.finfo(torch.float32).min)
        ),
        "heads": lambda q, k, v, m, a: S(q, k, v, attn_mask=heads),
        "batch": lambda q, k, v, m, a: S(q, k, v, attn_mask=batch),
        "causal": lambda q, k, v, m, a: S(q, k, v, is_causal=True),
        "more_queries": lambda q, k, v, m, a: S(k, q, q, is_causal=True),
        "grouped": lambda q, k, v, m, a: S(q, k[:, :2], v[:, :2], attn_mask=m, enable_gqa=True),
        "grouped_heads": lambda q, k, v, m, a: S(
            q, k[:, :2], v[:, :2], attn_mask=heads, enable_gqa=True
        ),
        "key_nan": lambda q, k, v, m, a: S(q, torch.where(third, NAN, k), v, attn_mask=m),
        "later_key_nan": lambda q, k, v, m, a: S(q, torch.where(third, NAN, k), v, is_causal=True),
        "value_inf": lambda q, k, v, m, a: S(q, k, torch.where(third, INF, v), attn_mask=m),
        "key_inf": lambda q, k, v, m, a: S(q.abs(), torch.where(third, -INF, k), v, attn_mask=m),
        "by_hand": lambda q, k, v, m, a: (
            (q @ k.transpose(-1, -2)).masked_fill(~m, -INF).softmax(-1).nan_to_num(0.0) @ v
        ),
    }
    compare(table, [q, k, v, mask, added], CLOSE)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, other, padding):
        call = self.inner
        return (
            call(x, x, x, key_padding_mask=padding, need_weights=False)[0],
            *call(x, x, x, key_padding_mask=padding),
            call(x, other, other, key_padding_mask=padding, need_weights=False)[0],
        )


def test_multi_head_attention_with_padding():
    """Rows without a key are NaN in torch's kernel for one tensor, zero where there are two."""
    module = SelfAttention().eval()
    padding = torch.tensor([[False, True, True], [True, True, True]])
    compare({"all": module}, [torch.randn(2, 3, 8), torch.randn(2, 3, 8), padding], CLOSE)


def test_rows_do_not_reach_each_other():
    """What is not finite in a row of a product stays in it: at sizes that no tile divides, in
    weights of f32 and of f8e4m3, whatever is used to fill tiles up."""
    torch.manual_seed(0)
    weight, narrow = torch.randn(37, 45), torch.randn(37, 45).to(torch.float8_e4m3fn)
    weight[5, 44], weight[36, 0] = INF, NAN
    table = {}
    for rows in (1, 2, 5, 9, 50):
        table[f"f32 {rows}"] = lambda x, w, n, rows=rows: F.linear(x[:rows], w)
        table[f"f8 {rows}"] = lambda x, w, n, rows=rows: F.linear(x[:rows], n.to(torch.float32))
        table[f"kn {rows}"] = lambda x, w, n, rows=rows: x[:rows, :37] @ w
    x = torch.randn(50, 45)
    for row, number in ((1, INF), (4, NAN), (8, -INF), (49, INF)):
        x[row, row % 45] = number
    compare(table, [x, weight, narrow], 1e-5)


SPECIAL = st.sampled_from([INF, -INF, NAN, 0.0, -0.0, 1.0, -1.0, 3.0])
PLACED = {
    k: f for k, f in REDUCTIONS.items()
    if k in ("softmax", "log_softmax", "logsumexp", "safe_softmax", "max", "topk", "sort",
             "cumsum", "norms", "layer_norm", "rms_norm", "clamp", "logaddexp", "aminmax")
}  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(SPECIAL, min_size=12 * 6, max_size=12 * 6), st.integers(0, 5))
def test_reductions_of_anything(session_of_reductions, numbers, seed):
    rng = np.random.default_rng(seed)
    x = np.array(numbers, np.float32).reshape(12, 6)
    x = np.where(rng.random(x.shape) < 0.5, rng.normal(size=x.shape), x).astype(np.float32)
    session_of_reductions(torch.from_numpy(x))


@pytest.fixture(scope="module")
def session_of_reductions():
    """Return a check of all reductions in `PLACED`, compiled once, on new numbers."""
    with Compiled(PLACED, [torch.zeros(12, 6)]) as compiled:
        yield lambda x: compiled.check([x], CLOSE)
