"""Writing to places that indices tell, scans and order: as torch, on every target."""

from __future__ import annotations

import math

import pytest
import torch
from everywhere import compare

from dilu.errors import UnsupportedError
from dilu.frontend.program.capture import capture_module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, under Triton's interpreter
]

#: Places that are told several times, and one that never is.
PLACES = torch.tensor([[0, 3, 1, 0], [4, 4, 2, 4], [1, 0, 3, 3]])
PART = torch.tensor([[1, 1], [0, 4]])
ROWS = torch.tensor([2, 0, 2, -1])


def numbers(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(*shape)
    x.view(-1)[::7] = torch.tensor([math.nan, math.inf, -0.0, 1e-40, -math.inf]).repeat(9)[
        : len(x.view(-1)[::7])
    ]
    return x


index_put = torch.ops.aten.index_put

SCATTERS = {
    "scatter": lambda x, v: x.scatter(1, PLACES, v),
    "scatter_along_rows": lambda x, v: x.scatter(0, PART % 3, v),
    "scatter_number": lambda x, v: x.scatter(1, PART, 7.0),
    "scatter_add": lambda x, v: x.scatter_add(1, PLACES, v),
    **{f"scatter_{r}_{i}": lambda x, v, r=r, i=i: x.scatter_reduce(1, PLACES, v, r, include_self=i)
       for r in ("sum", "prod", "mean", "amax", "amin") for i in (True, False)},
    "index_add": lambda x, v: x.index_add(1, ROWS[:3].abs(), x[:, :3], alpha=2),
    "index_copy": lambda x, v: x.index_copy(1, torch.tensor([2, 0]), v[:, :2]),
    "index_fill": lambda x, v: x.index_fill(1, ROWS[:2], 3.0),
    "put_rows": lambda x, v: x.index_put((ROWS,), v[:1, :1].expand(4, 5)),
    "put_all": lambda x, v: x.index_put((ROWS, torch.tensor([1, 4, 1, 0])), v[0]),
    "put_columns": lambda x, v: index_put(x.t(), (None, ROWS), v[:1, :1].expand(5, 4)),
    "put_apart": lambda x, v: index_put(
        x[:, None], (ROWS, None, torch.tensor([1, 4, 1, 0])), v[0][:, None]),
    "put_adding": lambda x, v: x.index_put((ROWS,), v[:1, :1].expand(4, 5), accumulate=True),
    "put_where": lambda x, v: x.index_put((x > 0,), torch.tensor(2.0)),
    "put_in_a_row": lambda x, v: x.put(PLACES, v, accumulate=True),
    "index_apart": lambda x, v: x[:, None][ROWS, :, torch.tensor([1, 4, 1, 0])],
    "masked_scatter": lambda x, v: x.masked_scatter(x > 0, x.flip(0)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scatters(dtype):
    """Sums are of a few numbers in f32, rounded once: torch rounds each to narrow types."""
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 2**-6)
    x, v = numbers(3, 5).to(dtype), numbers(3, 4).to(dtype)
    functions = {n: f for n, f in SCATTERS.items() if dtype == torch.float32 or n != "put_where"}
    compare(functions, [x, v], tolerance)


SCANS = {
    "cumsum": lambda x: (x.cumsum(0), x.cumsum(-1)),
    "cumprod": lambda x: (x.cumprod(0), x.cumprod(-1)),
    "cummax": lambda x: (*x.cummax(0), *x.cummax(-1)),
    "cummin": lambda x: (*x.cummin(0), *x.cummin(-1)),
    "logcumsumexp": lambda x: (x.logcumsumexp(0), x.logcumsumexp(-1)),
    "kthvalue": lambda x: (*x.kthvalue(2, dim=0), *x.kthvalue(4)),
    "median": lambda x: (*x.median(0), *x.median(-1), x.median(), x[1:].median()),
    "nanmedian": lambda x: (*x.nanmedian(0), *x.nanmedian(-1), x.nanmedian()),
    "searchsorted": lambda x: (
        torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5, 0.5, math.inf], dtype=x.dtype), x),
        torch.searchsorted(x.nan_to_num().sort(-1)[0], x.abs(), right=True, out_int32=True)),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.5, 2.0], dtype=x.dtype)),
    "cdist": lambda x: (torch.cdist(x[1:], x), torch.cdist(x, x[:2], p=1.0)),
    "diagonal": lambda x: (x.diagonal(), x.diagonal(2), x.diagonal(-1), x[None].diagonal(1, 2, 1)),
    "unfold": lambda x: (x.unfold(1, 3, 2), x.unfold(0, 2, 1)),
    **{m: lambda x, m=m: torch.nn.functional.pad(x[None], (2, 1, 1, 2), mode=m)
       for m in ("reflect", "replicate", "circular")},
    "circular_crop": lambda x: torch.nn.functional.pad(x[None], (-2, 1), mode="circular"),
}  # fmt: skip


def test_scans():
    finite = torch.randn(4, 5)
    compare(SCANS, [finite], 2e-6)
    marked = finite.clone()
    marked[1, 2], marked[2, 0], marked[3, 4] = math.nan, math.inf, -math.inf
    compare({n: f for n, f in SCANS.items() if n != "cdist"}, [marked], 2e-6)


def test_several_numbers_for_a_mask_are_refused():
    def forward(x, v):
        return x.index_put((x > 0,), v)

    class Model(torch.nn.Module):
        def forward(self, x, v):
            return forward(x, v)

    with pytest.raises(UnsupportedError, match="putting more than one number where a mask holds"):
        capture_module(Model(), (torch.ones(3), torch.ones(3)))
