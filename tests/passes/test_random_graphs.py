"""Random graphs through the text form, every exact pass, and the whole pipeline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilu.errors import DiluError
from dilu.ir.dtypes import BF16, BOOL, F8E4M3, F8E5M2, F32, I64
from dilu.ir.graph import Function, Graph, Value
from dilu.ir.ops import elementwise as ew
from dilu.ir.ops.index import (
    BroadcastTo,
    Concat,
    Iota,
    Reshape,
    Slice,
    Take,
    TakeAlong,
    Transpose,
)
from dilu.ir.ops.matmul import MatMul
from dilu.ir.ops.quantize import Dequantize
from dilu.ir.ops.reduce import ArgMax, ReduceMax, ReduceMin, ReduceSum, TopK
from dilu.ir.rewrite import Builder
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.types import TensorType, broadcast, numel, symbol
from dilu.ir.verify import verify
from dilu.passes.pipeline import pipeline


def load(name: str):
    """Import a test module that lies next to this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIZES = {"T": 5, "R": 2}
T, R = symbol("T"), symbol("R")
SHAPES = [(T, 8), (8,), (T, 1), (1, T, 8), (T, 2, 4), (), (1, 8), (R, 8), (4, T)]
UNARY = (ew.Neg(), ew.Abs(), ew.Floor())
BINARY = (ew.Add(), ew.Sub(), ew.Maximum(), ew.Minimum())


class Maker:
    """Draws one random function; whatever an op refuses is drawn again."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
        self.parameters = [Value(f"x{i}", TensorType(F32, s)) for i, s in enumerate(shapes)]
        self.parameters.append(Value("i", TensorType(I64, (R,))))
        self.weights = [
            Value("w", TensorType(F8E4M3, (6, 8))),
            Value("s", TensorType(F32, (2, 2))),
            Value("v", TensorType(F32, (4, 8))),
            Value("b", TensorType(BF16, (8,))),
        ]
        self.builder = Builder({v.name for v in self.parameters + self.weights})
        self.floats = [v for v in self.parameters if v.type.dtype == F32]

    def pick(self, values):
        if not values:
            raise DiluError("nothing fits")
        return self.data.draw(st.sampled_from(list(values)))

    def function(self, steps: int) -> Function:
        for _ in range(steps):
            step = self.pick(STEPS)
            try:
                step(self, self.pick(self.floats[-6:]))
            except DiluError:
                continue
        results = self.data.draw(
            st.lists(st.sampled_from(self.floats[-4:]), min_size=1, max_size=3)
        )
        return Function(
            "main",
            parameters=tuple(self.parameters),
            constants=tuple(self.weights),
            nodes=tuple(self.builder.nodes),
            results=tuple(results),
        )

    def add(self, op, *inputs: Value) -> Value:
        value = self.builder.emit(op, *inputs, name="n")
        self.floats.append(value)
        return value

    def unary(self, x: Value) -> None:
        self.add(self.pick(UNARY), x)

    def binary(self, x: Value) -> None:
        fits = [v for v in self.floats if can_meet(v, x)]
        self.add(self.pick(BINARY), *self.data.draw(st.permutations([x, self.pick(fits)])))

    def scaled(self, x: Value) -> None:
        number = self.pick([1.0, 0.5, -1.0, 0.0, -0.0, 2.0])
        self.add(self.pick([ew.Mul(), ew.Add(), ew.Sub()]), x, self.builder.literal(number, F32))

    def chosen(self, x: Value) -> None:
        zero = self.builder.literal(0.0, F32)
        condition = self.builder.emit(self.pick([ew.Lt(), ew.Eq()]), x, zero)
        assert condition.type.dtype == BOOL
        self.add(ew.Where(), condition, x, zero)

    def rounded(self, x: Value) -> None:
        cast = ew.Cast(self.pick([BF16, F8E4M3, F8E5M2]), self.pick([True, False]))
        narrow = self.builder.emit(cast, x)
        if self.pick([True, False]) and x.type.rank:
            order = tuple(range(x.type.rank))[::-1]
            narrow = self.builder.emit(Transpose(order), narrow)
        self.add(ew.Cast(F32), narrow)

    def reduced(self, x: Value) -> None:
        axes = {self.pick(range(x.type.rank)), self.pick(range(x.type.rank))}
        kind = self.pick([ReduceSum, ReduceMax, ReduceMin])
        self.add(kind(tuple(sorted(axes)), self.pick([True, False])), x)

    def reshaped(self, x: Value) -> None:
        shapes = [s for s in SHAPES if numel(s) == numel(x.type.shape)]
        self.add(Reshape(self.pick([*shapes, (1, *x.type.shape), (*x.type.shape, 1)])), x)

    def transposed(self, x: Value) -> None:
        self.add(Transpose(tuple(self.data.draw(st.permutations(range(x.type.rank))))), x)

    def sliced(self, x: Value) -> None:
        axis = self.pick([a for a, d in enumerate(x.type.shape) if isinstance(d, int)])
        size = x.type.shape[axis]
        start = self.data.draw(st.integers(0, size - 1))
        stop = self.data.draw(st.integers(start + 1, size))
        self.add(Slice(axis, start, stop, self.pick([1, 1, 2])), x)

    def joined(self, x: Value) -> None:
        same = [v for v in self.floats if v.type == x.type]
        self.add(Concat(self.pick(range(x.type.rank))), x, self.pick(same))

    def spread(self, x: Value) -> None:
        shape = self.pick(SHAPES)
        if broadcast(shape, x.type.shape) == shape:
            self.add(BroadcastTo(shape), x)

    def taken(self, x: Value) -> None:
        if x.type.rank and x.type.shape[0] in (8, 4, T):
            self.add(Take(), x, self.parameters[-1])

    def ordered(self, x: Value) -> None:
        if x.type.rank and x.type.shape[-1] in (8, 4):
            top, at = self.builder.add(TopK(2, self.pick([True, False])), x)
            self.floats += [top, self.builder.emit(TakeAlong(), x, at), self.as_float(at)]

    def located(self, x: Value) -> None:
        if x.type.rank and x.type.shape[-1] != R:
            self.as_float(self.builder.emit(ArgMax(), x))

    def as_float(self, x: Value) -> Value:
        return self.add(ew.Cast(F32), x)

    def counted(self, x: Value) -> None:
        self.add(ew.Cast(F32), self.builder.emit(Iota(self.pick([8, T]), I64)))

    def times_weight(self, x: Value) -> None:
        w, s, v, _ = self.weights
        weight = v
        if self.pick([True, False]):
            weight = self.builder.emit(Dequantize((4, 4), F32), w, s)
        if x.type.rank >= 2 and x.type.shape[-1] == 8:
            self.add(MatMul(True), x, weight)

    def times_bias(self, x: Value) -> None:
        self.add(ew.Add(), x, self.as_float(self.weights[3]))

    def times_itself(self, x: Value) -> None:
        if x.type.rank >= 2:
            self.add(MatMul(True), x, x)


def can_meet(a: Value, b: Value) -> bool:
    try:
        broadcast(a.type.shape, b.type.shape)
    except DiluError:
        return False
    return True


STEPS = [
    Maker.unary, Maker.binary, Maker.binary, Maker.scaled, Maker.chosen, Maker.rounded,
    Maker.reduced, Maker.reduced, Maker.reshaped, Maker.transposed, Maker.sliced, Maker.joined,
    Maker.spread, Maker.taken, Maker.ordered, Maker.located, Maker.counted, Maker.times_weight,
    Maker.times_bias, Maker.times_itself,
]  # fmt: skip
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
@EXACT
def test_text_round_trip(data):
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
