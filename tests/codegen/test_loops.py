"""Loop nests, compiled and run, against the reference interpreter.

Random graphs use ops and values on which every order of computing gives the same bits, so the
comparison is exact; elementary functions have a bound of their own.
"""

from __future__ import annotations

import numpy as np
import pytest

from dilu.ir.dtypes import BF16, BOOL, F16, F32, F64, I32, I64, U8, DType, decode, encode
from dilu.ir.graph import Function, Graph, Node, Value
from dilu.ir.ops.control import Kernel
from dilu.ir.ops.elementwise import (
    Abs,
    Add,
    Cast,
    Cos,
    Div,
    Erf,
    Exp,
    Floor,
    Ge,
    Le,
    Log,
    LogicalAnd,
    LogicalNot,
    Lt,
    Maximum,
    Minimum,
    Mod,
    Mul,
    Neg,
    Pow,
    Rsqrt,
    Sigmoid,
    Sin,
    Sqrt,
    Sub,
    Tanh,
    Where,
)  # fmt: skip
from dilu.ir.ops.index import (
    BroadcastTo,
    Concat,
    Iota,
    Reshape,
    Slice,
    Take,
    TakeAlong,
    Transpose,
)  # fmt: skip
from dilu.ir.ops.reduce import ArgMax, ReduceMax, ReduceMin, ReduceSum
from dilu.ir.rewrite import Builder
from dilu.ir.types import TensorType, evaluate, symbol

BOUND = 1e-6
T = symbol("T")
SHAPES = [(T, 4, 6), (T, 24), (4, 6), (6,), (T, 1), (T, 4, 1), (3, T, 6), (T,)]
DTYPES = [F32, F32, F32, BF16, F16, I64, I32, F64]
_UNARY = [Neg, Abs]
_BINARY = [Add, Sub, Mul, Maximum, Minimum]


def small(t: DType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return storage of small whole numbers."""
    values = rng.integers(-3, 4, shape).astype(np.float64)
    if t == BOOL:
        return values > 0
    if t == U8:
        return np.abs(values).astype(np.uint8)
    return encode(t, values) if t == BF16 else values.astype(t.storage)


class _Random:
    """A random body: values of few shapes, combined by ops that never round differently."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.builder = Builder()
        count = int(self.rng.integers(2, 4))
        self.parameters = tuple(
            Value(self.builder.fresh(f"x{i}"), TensorType(self.pick(DTYPES), self.pick(SHAPES)))
            for i in range(count)
        )
        chosen = Value(self.builder.fresh("chosen"), TensorType(I64, (T,)))
        self.parameters += (chosen,)
        self.chosen = chosen
        self.values = list(self.parameters[:-1])

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def emit(self, op, *inputs: Value) -> Value:
        return self.builder.emit(op, *inputs)

    def step(self) -> None:
        x = self.pick(self.values)
        kinds = [self.unary, self.binary, self.cast, self.move, self.move, self.select, self.reduce]
        made = self.pick(kinds)(x)
        # Values stay small, so that sums and products stay exact.
        if made.type.dtype.is_float or made.type.dtype.is_integer:
            limit = self.builder.literal(3, made.type.dtype)
            made = self.emit(Minimum(), made, limit)
            made = self.emit(Maximum(), made, self.emit(Neg(), limit))
        self.values.append(made)

    def unary(self, x: Value) -> Value:
        if x.type.dtype == BOOL:
            return self.emit(LogicalNot(), x)
        return self.emit(self.pick(_UNARY)(), x)

    def partner(self, x: Value) -> Value:
        """Return a value of the same type that broadcasts with `x`."""
        for _ in range(20):
            y = self.pick(self.values)
            small_enough = y.type.rank <= x.type.rank and all(
                b in (1, a)
                for a, b in zip(
                    x.type.shape[x.type.rank - y.type.rank :], y.type.shape, strict=True
                )
            )
            if small_enough and y.type.dtype != BOOL and x.type.dtype != BOOL:
                same = y.type.dtype == x.type.dtype
                return y if same else self.emit(Cast(x.type.dtype), y)
        return x

    def binary(self, x: Value) -> Value:
        if x.type.dtype == BOOL:
            return self.emit(LogicalAnd(), x, x)
        ops = [*_BINARY, Div, Mod] if x.type.dtype.is_integer else _BINARY
        return self.emit(self.pick(ops)(), x, self.partner(x))

    def cast(self, x: Value) -> Value:
        return self.emit(Cast(self.pick([*DTYPES, BOOL])), x)

    def select(self, x: Value) -> Value:
        y = self.partner(x)
        if y.type.shape != x.type.shape:
            y = self.emit(BroadcastTo(x.type.shape), y)
        if x.type.dtype == BOOL:
            return self.emit(LogicalNot(), x)
        condition = self.emit(self.pick([Lt, Ge, Le])(), x, y)
        return self.emit(Where(), condition, y, x)

    def reduce(self, x: Value) -> Value:
        if x.type.dtype == BOOL or x.type.rank == 0:
            return self.unary(x)
        axis = x.type.rank - 1
        if self.rng.random() < 0.2 and x.type.shape[-1] != 1:
            return self.emit(ArgMax(), x)
        op = self.pick([ReduceSum, ReduceMax, ReduceMin])
        axes = (axis,) if self.rng.random() < 0.7 or axis == 0 else (axis - 1, axis)
        if self.rng.random() < 0.15:
            axes = (0,)
        return self.emit(op(axes, bool(self.rng.random() < 0.5)), x)

    def move(self, x: Value) -> Value:
        shape, rank = x.type.shape, x.type.rank
        kind = self.rng.integers(7)
        if kind == 0 and rank > 1:
            return self.emit(Transpose(tuple(int(i) for i in self.rng.permutation(rank))), x)
        if kind == 1 and rank > 0 and isinstance(shape[-1], int) and shape[-1] > 2:
            return self.emit(Slice(rank - 1, 1, shape[-1], int(self.rng.integers(1, 3))), x)
        if kind == 2 and rank > 0:
            y = self.emit(Neg(), x) if x.type.dtype != BOOL else x
            axis = int(self.rng.integers(rank))
            return self.emit(Concat(axis), x, y, x)
        if kind == 3 and rank > 1:
            return self.emit(Reshape((*shape[:-2], shape[-2] * shape[-1])), x)
        if kind == 4 and rank > 0 and isinstance(shape[-1], int) and shape[-1] % 2 == 0:
            return self.emit(Reshape((*shape[:-1], shape[-1] // 2, 2)), x)
        if kind == 5 and rank > 0:
            return self.emit(Take(), x, self.chosen)
        if kind == 6 and rank > 0:
            places = self.emit(Iota(shape[-1], I64))
            places = self.emit(BroadcastTo(shape), places)
            half = self.emit(Div(), places, self.builder.literal(2, I64))
            return self.emit(TakeAlong(), x, half)
        return self.emit(BroadcastTo((2, *shape)), x)

    def function(self, name: str) -> Function:
        for _ in range(int(self.rng.integers(3, 9))):
            self.step()
        results = tuple(dict.fromkeys((self.values[-1], self.pick(self.values[-2:]))))
        results = tuple(v for v in results if v not in self.parameters) or (
            self.emit(Neg(), self.parameters[-1]),
        )
        return kernel_function(name, self.parameters, self.builder.nodes, results)


def kernel_function(name, parameters, nodes, results, kind="loops") -> Function:
    """Return a planned function that is one kernel."""
    body = Function(f"{name}_kernel", parameters, nodes=tuple(nodes), results=tuple(results))
    outputs = tuple(Value(f"{v.name}_out", v.type) for v in results)
    node = Node(Kernel(kind, body), parameters, outputs)
    return Function(name, parameters, nodes=(node,), results=outputs)


def sizes_inputs(function: Function, sizes, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = []
    for v in function.parameters:
        shape = tuple(evaluate(d, sizes) for d in v.type.shape)
        if v.name == "chosen":  # within the smallest axis that anything is taken from
            out.append(np.zeros(shape, np.int64))
        else:
            out.append(small(v.type.dtype, shape, rng))
    return out


def assert_same(graph: Graph, compiled, reference, sizes, seed: int) -> None:
    for function in graph.functions:
        inputs = sizes_inputs(function, sizes, seed)
        got = compiled.run(function.name, inputs, sizes)
        want = reference(graph, function.name, inputs, sizes)
        for value, g, w in zip(function.results, got, want, strict=True):
            g = decode(value.type.dtype, g)
            np.testing.assert_array_equal(g, w, f"@{function.name} {value}")


COUNT = 60


@pytest.mark.parametrize("target", ["cpu:baseline", "cpu"])
def test_random_graphs_are_exact(compiled, reference, target):
    functions = tuple(_Random(seed).function(f"f{seed}") for seed in range(COUNT))
    graph = Graph("planned", functions)
    module = compiled(graph, target)
    for size in (1, 5, 17):
        assert_same(graph, module, reference, {"T": size}, size)


ELEMENTARY = [Exp, Log, Sqrt, Rsqrt, Sin, Cos, Tanh, Erf, Sigmoid, Floor]


def test_elementary_functions(compiled, reference):
    x = Value("x", TensorType(F32, (T, 40)))
    wide = Value("y", TensorType(F64, (T, 40)))
    functions = []
    for value in (x, wide):
        for op in ELEMENTARY:
            builder = Builder({value.name})
            out = builder.emit(op(), value)
            name = f"{op.name}_{value.type.dtype}"
            functions.append(kernel_function(name, (value,), builder.nodes, (out,)))
    graph = Graph("planned", tuple(functions))
    module = compiled(graph)
    rng = np.random.default_rng(0)
    for function in graph.functions:
        t = function.parameters[0].type.dtype
        x = rng.normal(size=(7, 40)) * 4
        if function.name.startswith(("log", "sqrt", "rsqrt")):
            x = np.abs(x)
        x[0, :5] = [0.0, np.nan, 100.0, 1e-3, 3.0]
        x = x.astype(t.storage)
        got = module.run(function.name, [x])[0].astype(np.float64)
        (want,) = reference(graph, function.name, [x], {"T": 7}, wide=True)
        with np.errstate(over="ignore"):
            want = want.astype(t.storage)
        bound = BOUND if t == F32 else BOUND * 1e-8
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound, err_msg=function.name)


def test_nan_and_infinity_pass_through_maxima(compiled, reference):
    x = Value("x", TensorType(F32, (T, 9)))
    builder = Builder({"x"})
    results = [builder.emit(op((1,)), x) for op in (ReduceMax, ReduceMin)]
    results.append(builder.emit(ArgMax(), x))
    shifted = builder.emit(Slice(1, 1, 9), x)
    first = builder.emit(Slice(1, 0, 8), x)
    pairs = [builder.emit(op(), shifted, first) for op in (Maximum, Minimum)]
    graph = Graph(
        "planned",
        (
            kernel_function("rows", (x,), builder.nodes[:3], results),
            kernel_function("pairs", (x,), builder.nodes[3:], pairs),
        ),
    )
    module = compiled(graph)
    data = np.random.default_rng(1).normal(size=(6, 9)).astype(np.float32)
    data[1, 3], data[2, 8], data[3, 0] = np.nan, np.inf, -np.inf
    data[4, :], data[5, 2:5] = -np.inf, np.nan
    for name in ("rows", "pairs"):
        got = module.run(name, [data])
        for g, w in zip(got, reference(graph, name, [data], {"T": 6}), strict=True):
            np.testing.assert_array_equal(g, w)


def test_integers_follow_the_reference(compiled, reference):
    a, b = (Value(n, TensorType(I64, (T,))) for n in "ab")
    builder = Builder({"a", "b"})
    results = [builder.emit(op(), a, b) for op in (Div, Mod, Add, Mul)]
    graph = Graph("planned", (kernel_function("f", (a, b), builder.nodes, results),))
    module = compiled(graph)
    big = 2**63 - 1
    x = np.array([7, -7, 7, -7, 0, big, -big - 1, 5, -big - 1])
    y = np.array([3, 3, -3, -3, 2, 2, -1, 0, 1])
    with np.errstate(all="ignore"):
        want = reference(graph, "f", [x, y], {"T": len(x)})
    for g, w in zip(module.run("f", [x, y]), want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_indices_beyond_a_table_do_not_leave_it(compiled):
    table = Value("table", TensorType(F32, (5, 3)))
    chosen = Value("which", TensorType(I64, (T,)))
    builder = Builder({"table", "which"})
    out = builder.emit(Take(), table, chosen)
    function = kernel_function("f", (table, chosen), builder.nodes, (out,))
    module = compiled(Graph("planned", (function,)))
    data = np.arange(15, dtype=np.float32).reshape(5, 3)
    (got,) = module.run("f", [data, np.array([-(2**62), -1, 2, 5, 2**62])])
    np.testing.assert_array_equal(got, data[[0, 0, 2, 4, 4]])


def test_powers_and_softmax(compiled, reference):
    x = Value("x", TensorType(F32, (T, 3, 70)))
    builder = Builder({"x"})
    top = builder.emit(ReduceMax((2,), True), x)
    e = builder.emit(Exp(), builder.emit(Sub(), x, top))
    softmax = builder.emit(Div(), e, builder.emit(ReduceSum((2,), True), e))
    square = builder.emit(Pow(), x, builder.literal(2.0, F32))
    root = builder.emit(Pow(), square, builder.literal(0.5, F32))
    odd = builder.emit(Pow(), root, builder.literal(1.7, F32))
    results = (softmax, odd)
    function = kernel_function("f", (x,), builder.nodes, results)
    graph = Graph("planned", (function,))
    module = compiled(graph)
    data = np.random.default_rng(3).normal(size=(5, 3, 70)).astype(np.float32)
    want = reference(graph, "f", [data], {"T": 5}, wide=True)
    for g, w in zip(module.run("f", [data]), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=2 * BOUND, atol=1e-7)
    assert "row" in module.module.kernels[0].source  # exp is computed once


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(compiled, threads):
    x = Value("x", TensorType(F32, (T, 5000)))
    builder = Builder({"x"})
    total = builder.emit(ReduceSum((1,), True), x)
    rows = builder.emit(Div(), x, total)
    other = Builder({"x"})
    flat = other.emit(Exp(), other.emit(Mul(), x, x))
    graph = Graph(
        "planned",
        (
            kernel_function("rows", (x,), builder.nodes, (rows,)),
            kernel_function("flat", (x,), other.nodes, (flat,)),
        ),
    )
    module = compiled(graph, threads=threads)
    one = compiled(graph, threads=1)
    for size in (1, 3):
        data = np.random.default_rng(size).normal(size=(size, 5000)).astype(np.float32)
        for name in ("rows", "flat"):
            (a,), (b,) = module.run(name, [data]), one.run(name, [data])
            np.testing.assert_array_equal(a, b)
            assert np.isfinite(a).all()


def test_no_rows_is_no_work(compiled):
    x = Value("x", TensorType(F32, (T, 8)))
    builder = Builder({"x"})
    out = builder.emit(Neg(), x)
    module = compiled(Graph("planned", (kernel_function("f", (x,), builder.nodes, (out,)),)))
    (got,) = module.run("f", [np.empty((0, 8), np.float32)], {"T": 0})
    assert got.shape == (0, 8)
