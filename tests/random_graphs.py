"""Random graphs: functions of elementwise work, views, reductions, products and selections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dilu.errors import DiluError
from dilu.ir.dtypes import BF16, BOOL, F8E4M3, F8E5M2, F32, I64, DType
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
from dilu.ir.ops.language import Experts
from dilu.ir.ops.matmul import MatMul
from dilu.ir.ops.quantize import Dequantize
from dilu.ir.ops.reduce import ArgMax, ReduceMax, ReduceMin, ReduceSum, TopK
from dilu.ir.rewrite import Builder
from dilu.ir.types import Dim, Shape, TensorType, broadcast, evaluate, numel, symbol

SIZES = {"T": 5, "R": 2}
T, R = symbol("T"), symbol("R")
SHAPES = [(T, 8), (8,), (T, 1), (1, T, 8), (T, 2, 4), (), (1, 8), (R, 8), (4, T)]
UNARY = (ew.Neg(), ew.Abs(), ew.Floor())
BINARY = (ew.Add(), ew.Sub(), ew.Maximum(), ew.Minimum())


class Maker:
    """Draws one random function; whatever an op refuses is drawn again."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.shapes = list(SHAPES)
        self.steps = STEPS
        shapes = data.draw(st.lists(st.sampled_from(self.shapes), min_size=1, max_size=3))
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

    def pick(self, values: Iterable[Any]) -> Any:
        if not values:
            raise DiluError("nothing fits")
        return self.data.draw(st.sampled_from(list(values)))

    def function(self, steps: int) -> Function:
        for _ in range(steps):
            step = self.pick(self.steps)
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
        shapes = [s for s in self.shapes if numel(s) == numel(x.type.shape)]
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
        shape = self.pick(self.shapes)
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


# ---------------------------------------------------------------------------- many ones


class Ones(Maker):
    """Draws functions over shapes most of whose axes have size 1, some 0; inputs as they need."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        axes = [1, 1, 1, 1, 2, 3, T, R, *([0] if data.draw(st.integers(0, 7)) == 0 else [])]
        shape = st.lists(st.sampled_from(axes), max_size=4).map(tuple)
        self.shapes = data.draw(st.lists(shape, min_size=2, max_size=5))
        self.steps = STEPS_OF_ONES
        self.builder = Builder()
        self.parameters: list[Value] = []
        self.weights: list[Value] = []
        self.floats: list[Value] = []
        for each in self.shapes[:3]:
            self.floats.append(self.parameter("x", F32, each))

    def parameter(self, name: str, dtype: DType, shape: Shape) -> Value:
        self.parameters.append(Value(self.builder.fresh(name), TensorType(dtype, shape)))
        return self.parameters[-1]

    def constant(self, dtype: DType, shape: Shape) -> Value:
        self.weights.append(Value(self.builder.fresh("w"), TensorType(dtype, shape)))
        return self.weights[-1]

    def few(self) -> Dim:
        return self.pick([1, 1, 2, 3])

    def indices(self, size: Dim, shape: Shape) -> Value:
        """Return indices below a size; below 1 where it is symbolic."""
        return self.parameter(f"below_{size if isinstance(size, int) else 1}_", I64, shape)

    def sliced(self, x: Value) -> None:
        axis = self.pick([a for a, d in enumerate(x.type.shape) if isinstance(d, int)])
        size = x.type.shape[axis]
        start = self.data.draw(st.integers(0, size))
        stop = self.data.draw(st.integers(min(start + 1, size), size))
        self.add(Slice(axis, start, stop, self.pick([1, 1, 2])), x)

    def widened(self, x: Value) -> None:
        shape = tuple(self.few() if d == 1 else d for d in x.type.shape)
        self.add(BroadcastTo((*self.pick([(), (1,), (2,)]), *shape)), x)

    def squeezed(self, x: Value) -> None:
        self.add(Reshape(tuple(d for d in x.type.shape if d != 1)), x)

    def taken(self, x: Value) -> None:
        size = self.of_rank(x, 1).type.shape[0]
        shape = self.pick([(), (1,), (R,), (2, 1), (0,)] if size != 0 else [(0,)])
        self.add(Take(), x, self.indices(size, shape))

    def ordered(self, x: Value) -> None:
        size = self.of_rank(x, 1).type.shape[-1]
        k = self.pick(range(1, size + 1)) if isinstance(size, int) else 1
        top, at = self.builder.add(TopK(k), x)
        self.floats += [top, self.builder.emit(TakeAlong(), x, at), self.as_float(at)]

    def located(self, x: Value) -> None:
        if self.of_rank(x, 1).type.shape[-1] != 0:
            self.as_float(self.builder.emit(ArgMax(), x))

    def counted(self, x: Value) -> None:
        self.add(ew.Cast(F32), self.builder.emit(Iota(self.pick([1, 2, T]), I64)))

    def softmax(self, x: Value) -> None:
        axis = (self.pick(range(x.type.rank)),)
        shifted = self.builder.emit(ew.Sub(), x, self.builder.emit(ReduceMax(axis, True), x))
        exp = self.builder.emit(ew.Exp(), shifted)
        self.add(ew.Div(), exp, self.builder.emit(ReduceSum(axis, True), exp))

    def normed(self, x: Value) -> None:
        axis = (self.of_rank(x, 1).type.rank - 1,)
        square = self.builder.emit(ReduceSum(axis, True), self.builder.emit(ew.Mul(), x, x))
        more = self.builder.emit(ew.Add(), square, self.builder.literal(1.0, F32))
        self.add(ew.Mul(), x, self.builder.emit(ew.Rsqrt(), more))

    def times_weight(self, x: Value) -> None:
        """A product with a stored matrix, of rows of any number."""
        k, n = self.of_rank(x, 2).type.shape[-1], self.few()
        if not isinstance(k, int):
            return
        transposed = self.pick([True, True, False])
        shape = (n, k) if transposed else (k, n)
        if transposed and k and self.pick([True, False]):
            codes, scales = self.constant(F8E4M3, shape), self.constant(F32, (-(-n // 2), 1))
            weight = self.builder.emit(Dequantize((2, max(k, 1)), F32), codes, scales)
        else:
            weight = self.constant(F32, shape)
        y = self.add(MatMul(transposed), x, weight)
        if self.pick([True, False]):
            bias = self.constant(F32, self.pick([(n,), (1, n), (1,)]))
            y = self.add(self.pick([ew.Add(), ew.Mul()]), y, bias)
        if self.pick([True, False]):
            self.add(self.pick([ew.Sigmoid(), ew.Neg(), ew.Abs()]), y)

    def gated(self, x: Value) -> None:
        """Two products of the same rows: one gates the other, of as many columns or of one."""
        k, n = self.of_rank(x, 2).type.shape[-1], self.few()
        if not isinstance(k, int):
            return
        gate = self.builder.emit(MatMul(True), x, self.constant(F32, (self.pick([1, n]), k)))
        gate = self.builder.emit(ew.Sigmoid(), gate)
        self.add(ew.Mul(), gate, self.builder.emit(MatMul(True), x, self.constant(F32, (n, k))))

    def times_batch(self, x: Value) -> None:
        *lead, _, k = self.of_rank(x, 2).type.shape
        batch = tuple(self.pick([1, d]) for d in lead)
        n = self.pick([1, 2, T])
        other = self.parameter("y", F32, (*batch, n, k))
        self.add(MatMul(True), *((x, other) if self.pick([True, True, False]) else (other, x)))

    def attended(self, x: Value) -> None:
        """Attention of queries, keys and values that other steps have made."""
        *lead, _, k = self.of_rank(x, 2).type.shape
        places = self.pick([1, 2, T])
        keys, values = (self.parameter("y", F32, (*lead, places, d)) for d in (k, self.few()))
        scores = self.builder.emit(MatMul(True), x, keys)
        self.floats.append(scores)
        self.softmax_of_rows(scores)
        self.add(MatMul(), self.floats[-1], values)

    def softmax_of_rows(self, x: Value) -> None:
        axis = (x.type.rank - 1,)
        shifted = self.builder.emit(ew.Sub(), x, self.builder.emit(ReduceMax(axis, True), x))
        exp = self.builder.emit(ew.Exp(), shifted)
        self.add(ew.Div(), exp, self.builder.emit(ReduceSum(axis, True), exp))

    def routed(self, x: Value) -> None:
        """Routed experts, of which there may be one, with one choice and one hidden number."""
        t, h = self.of_rank(x, 2).type.shape[-2:]
        if x.type.rank != 2 or not isinstance(h, int) or h == 0:
            return
        e, k, i = self.few(), self.pick([1, 2]), self.few()
        weights = self.parameter("y", F32, (t, k))
        up, down = self.constant(F32, (e, 2, i, h)), self.constant(F32, (e, h, i))
        y = self.add(Experts("silu"), x, self.indices(e, (t, k)), weights, up, down)
        if self.pick([True, False]):
            self.add(ew.Add(), y, x)

    def of_rank(self, x: Value, least: int) -> Value:
        if x.type.rank < least:
            raise DiluError("too few axes")
        return x


STEPS_OF_ONES: list[Callable[[Ones, Value], None]] = [
    Ones.unary, Ones.binary, Ones.binary, Ones.scaled, Ones.chosen, Ones.reduced, Ones.reduced,
    Ones.reshaped, Ones.reshaped, Ones.transposed, Ones.sliced, Ones.joined, Ones.spread,
    Ones.widened, Ones.squeezed, Ones.taken, Ones.ordered, Ones.located, Ones.counted,
    Ones.softmax, Ones.normed, Ones.times_weight, Ones.times_weight, Ones.times_weight, Ones.gated,
    Ones.times_batch, Ones.times_itself, Ones.attended, Ones.routed,
]  # fmt: skip


def graphs_of_ones(count: int, number: int) -> list[Graph]:
    """Return random graphs, each of one function; the same ones for the same `number`."""
    found: list[Graph] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        function = Ones(data).function(data.draw(st.integers(1, 10)))
        found.append(Graph("captured", (replace(function, name=f"f{len(found)}"),)))

    collect()
    return found


def numbers(function: Function, sizes: Mapping[str, int], seed: int = 0) -> list[np.ndarray]:
    """Return storage for every input of a function of ones: small whole numbers, valid indices."""
    rng = np.random.default_rng(seed)
    out: list[np.ndarray] = []
    for value in function.inputs:
        shape = tuple(evaluate(d, sizes) for d in value.type.shape)
        if value.type.dtype == I64:
            bound = int(value.name.split("_")[1])
            out.append(rng.integers(0, max(bound, 1), shape))
        elif value.type.dtype.is_code:
            out.append(rng.choice(np.array([0x00, 0x38, 0xB8, 0x40, 0x44], np.uint8), shape))
        else:
            out.append(rng.integers(-3, 4, shape).astype(np.float32))
    return out
