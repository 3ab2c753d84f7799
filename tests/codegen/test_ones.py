"""Sizes of 1, of 0, and symbolic ones that are 1 or 0 in a call, through every fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreted import INTERPRETED, InterpretedDevice
from random_graphs import graphs_of_ones, numbers
from torch import nn
from torch.nn import functional as F

import dilu
from dilu.codegen import targets
from dilu.codegen.generate import generate
from dilu.codegen.targets import find_target
from dilu.errors import UnsupportedError
from dilu.ir.dtypes import decode
from dilu.ir.graph import Graph
from dilu.passes.pipeline import compile_graph

SIZES = [{"T": 1, "R": 1}, {"T": 5, "R": 2}, {"T": 17, "R": 1}, {"T": 0, "R": 1}]


def planned(graphs: Sequence[Graph]) -> Graph:
    """Return the functions of graphs in one planned graph."""
    done = [compile_graph(g, SimpleNamespace(native=frozenset()))[0] for g in graphs]
    weights = {name: w for g in done for name, w in g.weights.items()}
    return Graph("planned", tuple(g.functions[0] for g in done), weights)


def hold(graphs: Sequence[Graph], made: Callable[..., list[np.ndarray]], reference) -> int:
    """Compare functions with the reference at all sizes; return how many results were compared."""
    count = 0
    done = planned(graphs)
    for graph, compiled in zip(graphs, done.functions, strict=True):
        (function,) = graph.functions
        for sizes in SIZES:
            given = dict(
                zip([v.name for v in function.inputs], numbers(function, sizes), strict=True)
            )
            try:
                wanted = reference(graph, function.name, list(given.values()), sizes)
            except (ValueError, IndexError):  # the largest of no numbers: torch has none, either
                assert sizes["T"] == 0
                continue
            got = made(function.name, [given[v.name] for v in compiled.inputs], sizes)
            for value, want, mine in zip(function.results, wanted, got, strict=False):
                mine = decode(value.type.dtype, mine)
                assert mine.shape == want.shape
                np.testing.assert_allclose(mine, want, rtol=1e-4, atol=1e-4, err_msg=str(graph))
                count += 1
    return count


@pytest.mark.parametrize(("target", "number"), [("cpu", 1), ("cpu:baseline", 2)])
def test_random_functions_in_c(target, number, compiled, reference):
    graphs = graphs_of_ones(25, number)
    made = compiled(planned(graphs), find_target(target))
    assert hold(graphs, made.run, reference) > 60


@pytest.mark.parametrize("number", [3, 4])
def test_random_functions_have_source_for_every_target(number):
    done = planned(graphs_of_ones(25, number))
    assert generate(done, find_target("null")).source
    for function in done.functions:
        with suppress(UnsupportedError):  # top-k of rows of a symbolic size
            made = generate(replace(done, functions=(function,)), INTERPRETED)
            compile(made.source, "kernels.py", "exec")


class Many(nn.Module):
    """Functions of the same inputs, whose results are all returned."""

    def __init__(self, functions: Sequence[Callable[..., torch.Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functions = functions
        self.one = nn.Linear(6, 1)
        self.gate, self.wide = nn.Linear(6, 1, bias=False), nn.Linear(6, 6)
        self.from_one = nn.Linear(1, 4)
        self.norm = nn.LayerNorm(6)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(f(self, *inputs) for f in self.functions)


#: Of x [n, 6] and y [1, 6].
PRODUCTS: list[Callable[..., torch.Tensor]] = [
    lambda m, x, y: torch.sigmoid(m.one(x)),
    lambda m, x, y: torch.sigmoid(m.gate(x)) * m.wide(x),
    lambda m, x, y: F.gelu(m.one(m.norm(y))) + m.one.bias,
    lambda m, x, y: torch.relu(x @ y.T),
    lambda m, x, y: torch.tanh(y @ x.T) * 2,
    lambda m, x, y: m.from_one(m.one(x)),
    lambda m, x, y: (y.reshape(1, 1, 2, 3) @ y.reshape(1, 1, 3, 2)).softmax(-1),
    lambda m, x, y: F.scaled_dot_product_attention(y[None, None], x[None, None], x[None, None]),
    lambda m, x, y: F.scaled_dot_product_attention(x[None, None], y[None, None], y[None, None]),
    lambda m, x, y: torch.exp(-(x[:, :1] * y[:, :1])) + m.one(x),
    lambda m, x, y: m.one(x).squeeze(-1).softmax(0) @ x,
    lambda m, x, y: F.softmax(m.one(x), -1) * x,
    lambda m, x, y: torch.outer(m.one(y).flatten(), y.flatten()).relu(),
    lambda m, x, y: (m.one(x).unsqueeze(0) * m.wide(y).unsqueeze(1)).sum((0, 1)),
    lambda m, x, y: torch.baddbmm(y[None], x.T[None, :1], x[None]).sigmoid(),
]
#: Of x [n, 6] and y [1, 6]: what has no elements, and what is made of it.
EMPTY: list[Callable[..., torch.Tensor]] = [
    lambda m, x, y: x[:, 3:3],
    lambda m, x, y: x[:, 3:3] @ y[:, 3:3].T + 1,
    lambda m, x, y: torch.cat([x[:, :0], x, y[:, :0].expand(x.shape[0], 0)], 1),
    lambda m, x, y: x[:, 6:].sum(1),
    lambda m, x, y: y[0:0].mean(0),
    lambda m, x, y: y[0:0].any(0) | y[0:0].all(0),
    lambda m, x, y: torch.roll(x[0] if x.ndim > 2 else y, 7, 1),
    lambda m, x, y: torch.roll(y, 4),
    lambda m, x, y: y.repeat(0, 2),
    lambda m, x, y: torch.index_select(y.sum(), 0, torch.tensor([0])),
    lambda m, x, y: y[:, torch.tensor([], dtype=torch.int64)],
    lambda m, x, y: y.sum().softmax(0) + y.sum().max(0).values + y.sum().cumsum(0),
    lambda m, x, y: y.sum().topk(1).values + y.sum().sort().values,
    lambda m, x, y: torch.flip(y, []) - torch.flip(y, [1]),
    lambda m, x, y: torch.topk(y, 6).values + torch.topk(y, 1).values,
    lambda m, x, y: y.argmax(0) + y.argmin(0),
]


def compare(made, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    for i, (got, want) in enumerate(zip(made(*inputs), module(*inputs), strict=True)):
        want = want.detach().numpy()
        assert tuple(got.shape) == want.shape, i
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=f"function {i}")


@pytest.mark.parametrize(
    "functions",
    [pytest.param(PRODUCTS, marks=pytest.mark.slow), EMPTY],
    ids=["products", "empty"],
)
@pytest.mark.parametrize(
    "rows", [pytest.param(1, marks=pytest.mark.slow), None], ids=["static", "symbolic"]
)
def test_modules(functions, rows):
    """Static sizes of 1, and a symbolic one that is 1, many or 0 in a call."""
    module = Many(functions).eval()
    example = torch.randn(rows or 4, 6), torch.randn(1, 6)
    shapes = None if rows else (({0: torch.export.Dim("n")}, None),)
    with dilu.load(dilu.compile(module, example, dynamic_shapes=shapes)) as session:
        for count in (rows,) if rows else (4, 1, 17, 0):
            compare(session, module, (torch.randn(count, 6), torch.randn(1, 6)))


@pytest.mark.slow
@pytest.mark.parametrize("functions", [PRODUCTS, EMPTY], ids=["products", "empty"])
def test_modules_as_gpus_get_them(functions, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED))
    module = Many(functions).eval()
    shapes = (({0: torch.export.Dim("n")}, None),)
    example = torch.randn(4, 6), torch.randn(1, 6)
    artifact = dilu.compile(module, example, INTERPRETED.name, dynamic_shapes=shapes)
    artifact.save(tmp_path / "m.dilu")
    with dilu.load(tmp_path / "m.dilu", device=InterpretedDevice()) as session:
        for count in (4, 1, 0):
            compare(session, module, (torch.randn(count, 6), torch.randn(1, 6)))
