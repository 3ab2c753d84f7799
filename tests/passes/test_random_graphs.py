"""Random graphs through the text form, every exact pass, and the whole pipeline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import SIZES, Maker, Ones, numbers

from dilu.ir.graph import Graph
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify
from dilu.passes.pipeline import pipeline


def load(name: str):
    """Import a test module that lies next to this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXACT = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def random_graph(data: st.DataObject, steps: int = 12) -> Graph:
    graph = Graph("captured", (Maker(data).function(data.draw(st.integers(1, steps))),))
    verify(graph)
    return graph


def whole_numbers(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """Return inputs of small whole numbers: sums of them are exact in any order."""
    rng = np.random.default_rng(seed)
    given = load("conftest").inputs(graph.functions[0], SIZES, seed)
    for name, array in given.items():
        if array.dtype == np.float32:
            given[name] = rng.integers(-3, 4, array.shape).astype(np.float32)
    codes = [0x00, 0x38, 0xB8, 0x40, 0x44, 0x80]  # of 0, 1, -1, 2, 3 and -0
    given["w"] = rng.choice(np.array(codes, np.uint8), given["w"].shape)
    given["b"] = np.full(given["b"].shape, 0x3F80, np.uint16)
    return given


@given(st.data())
@settings(EXACT, max_examples=10)
def test_text_round_trip(data):
    graph = random_graph(data)
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.slow
@given(st.data())
@EXACT
def test_text_round_trip_of_many(data):
    graph = random_graph(data)
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.slow
@given(st.data(), st.integers(0, 3))
@EXACT
def test_every_pass_keeps_every_number(data, seed):
    tools, contract, plan = load("conftest"), load("test_fusion"), load("test_plan_memory")
    graph = random_graph(data)
    numbers = whole_numbers(graph, seed)
    want = tools.run(graph, "main", numbers, SIZES)
    for passes in pipeline(SimpleNamespace(native=frozenset())).values():
        for step in passes:
            graph = step(graph)
            verify(graph)
            got = tools.run(graph, "main", numbers, SIZES)
            assert all(same(a, b) for a, b in zip(want, got, strict=True)), step
    for node in contract.kernels(graph):
        contract.check_contract(node)
    plan.check_all(graph)
    assert parse_graph(print_graph(graph)) == graph


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether numbers are equal; the zero of a sum has the sign of its order, so it may differ."""
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


@given(st.data(), st.sampled_from([{"T": 1, "R": 1}, {"T": 4, "R": 1}, {"T": 1, "R": 2}]))
@settings(EXACT, max_examples=25)
def test_the_pipeline_keeps_sizes_of_one_and_none(data, sizes):
    """Sums may be made in another order: a softmax is near what it was."""
    graph = Graph("captured", (Ones(data).function(data.draw(st.integers(1, 10))),))
    verify(graph)
    given = dict(
        zip(
            [v.name for v in graph.functions[0].inputs],
            numbers(graph.functions[0], sizes),
            strict=True,
        )
    )
    tools = load("conftest")
    want = tools.run(graph, "main", given, sizes)
    for passes in pipeline(SimpleNamespace(native=frozenset())).values():
        for step in passes:
            graph = step(graph)
        verify(graph)
        for a, b in zip(want, tools.run(graph, "main", given, sizes), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert parse_graph(print_graph(graph)) == graph
