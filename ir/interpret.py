"""The reference executor: every op by its own numpy reference, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import DiluError
from .dtypes import BF16, decode, round_to
from .graph import Function, Graph, Node, Value
from .op import Op
from .ops.control import Call, Kernel
from .ops.elementwise import Cast
from .types import TensorType, evaluate
from .weights import Weight

Arrays = tuple[np.ndarray, ...]


def interpret(
    function: Function,
    inputs: Sequence[np.ndarray],
    sizes: Mapping[str, int] | None = None,
    *,
    wide: bool = False,
) -> Arrays:
    """Run `function` on `inputs` (parameters, states, constants); return results, then updates.

    Arrays hold values (`DType.value`), narrow floats included. Symbolic sizes are read off the
    inputs' shapes unless `sizes` gives them. With `wide`, floats are held in f64 and never
    rounded: the reference in higher precision.
    """
    known = dict(sizes or {}) or bind_sizes(function, inputs)
    with np.errstate(all="ignore"):
        return Interpreter(known, wide).function(function, tuple(inputs))


def bind_sizes(function: Function, inputs: Sequence[np.ndarray]) -> dict[str, int]:
    """Return the size of every symbol that stands alone as a dimension of an input."""
    sizes: dict[str, int] = {}
    for value, array in zip(function.inputs, inputs, strict=True):
        for want, got in zip(value.type.shape, array.shape, strict=True):
            if not isinstance(want, int) and want.is_Symbol:
                known = sizes.setdefault(str(want), got)
                if known != got:
                    raise DiluError(f"{value}: size {want} is {got} here and {known} elsewhere")
    return sizes


class Interpreter:
    """Runs functions whose symbols have the given sizes."""

    def __init__(self, sizes: Mapping[str, int], wide: bool) -> None:
        self.sizes = dict(sizes)
        self.wide = wide

    def function(self, function: Function, inputs: Arrays) -> Arrays:
        values = self.scope(function, inputs)
        last = {v.name: n for n in function.nodes for v in n.inputs}
        keep = {v.name for v in function.outputs}
        for node in function.nodes:
            arguments = tuple(values[v.name] for v in node.inputs)
            self.define(values, node, self.apply(node.op, arguments))
            for value in node.inputs:
                if last[value.name] is node and value.name not in keep:
                    values.pop(value.name, None)
        return tuple(values[v.name] for v in function.outputs)

    def scope(self, function: Function, inputs: Arrays) -> dict[str, np.ndarray]:
        """Return the values that a function begins with, by name."""
        return {v.name: self.held(v, a) for v, a in zip(function.inputs, inputs, strict=True)}

    def define(self, values: dict[str, np.ndarray], node: Node, outputs: Arrays) -> None:
        """Add what a node made to the values so far."""
        for value, array in zip(node.outputs, outputs, strict=True):
            self.check(value, array)
            values[value.name] = self.held(value, array, node.op)

    def apply(self, op: object, arguments: Arrays) -> Arrays:
        if isinstance(op, Call):
            runs = Runs(op, arguments)
            for i in range(op.times):
                runs.take(i, self.function(op.body, runs.inputs(i)))
            return runs.outputs
        if isinstance(op, Kernel):
            return self.function(op.body, arguments)
        out = op.sized(self.sizes).reference(*arguments)  # type: ignore[attr-defined]
        return out if isinstance(out, tuple) else (out,)

    def held(self, value: Value, array: np.ndarray, op: Op | None = None) -> np.ndarray:
        t = value.type.dtype
        if self.wide and t.is_float:
            return np.asarray(array, np.float64)
        if t.is_float and array.dtype == t.value and (t.bits >= 32 and t != BF16):
            return array
        return outcome(op, value.type, array)

    def check(self, value: Value, array: np.ndarray) -> None:
        want = tuple(evaluate(d, self.sizes) for d in value.type.shape)
        assert array.shape == want, f"{value}: reference made {array.shape}, type says {want}"


def outcome(op: Op | None, t: TensorType, array: np.ndarray) -> np.ndarray:
    """Return what an op made as values of its type: rounded, saturating where a cast says so."""
    return round_to(t.dtype, array, saturate=isinstance(op, Cast) and op.saturate)


class Runs:
    """What a call hands to each of its runs, and what becomes of it."""

    def __init__(self, op: Call, arguments: Arrays) -> None:
        body = op.body
        first, second = len(body.parameters), len(body.parameters) + len(body.states)
        self.results = len(body.results)
        self.carried, self.rest = list(arguments[:first]), arguments[first:]
        self.states = [np.array(a) for a in arguments[first:second]]
        self.ranks = [v.type.rank for v in body.inputs[first:]]

    def inputs(self, i: int) -> Arrays:
        """Return the inputs of run `i`."""
        pairs = zip((*self.states, *self.rest[len(self.states) :]), self.ranks, strict=True)
        return (*self.carried, *(a[i] if a.ndim > rank else a for a, rank in pairs))

    def take(self, i: int, out: Arrays) -> None:
        """Keep what run `i` returned."""
        self.carried[: self.results] = out[: self.results]
        for s, update in enumerate(out[self.results :]):
            if self.states[s].ndim > self.ranks[s]:
                self.states[s][i] = update
            else:
                self.states[s] = update

    @property
    def outputs(self) -> Arrays:
        return (*self.carried[: self.results], *self.states)


def constant_values(graph: Graph, function: Function) -> Arrays:
    """Return the values of a function's constants that the compiler holds (`Weight.data`)."""
    return tuple(weight_values(graph.weights[c.name]) for c in function.constants)


def weight_values(weight: Weight) -> np.ndarray:
    """Return the values of a constant whose data the compiler holds."""
    if weight.data is None:
        raise DiluError("the constant's data is in files and was not loaded")
    return decode(weight.dtype, weight.data)
