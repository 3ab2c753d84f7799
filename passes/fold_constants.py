"""Computing at compile time what does not depend on the inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..ir.dtypes import round_to, to_storage
from ..ir.graph import Function, Graph, Node, Value
from ..ir.interpret import outcome, weight_values
from ..ir.ops.elementwise import Literal
from ..ir.ops.index import BroadcastTo
from ..ir.rewrite import Builder, map_functions, rewrite_nodes
from ..ir.weights import Weight


def fold_constants(graph: Graph, *, limit: int = 1 << 16) -> Graph:
    """Evaluate nodes whose inputs are all known, by the ops' own references.

    A scalar becomes a literal. Anything larger is folded only where it depends on a constant
    that the compiler holds and its operands and outcome have at most `limit` elements; it becomes
    a constant that the compiler holds. Weights in files are never read.

    Before:
        %a: f32[] = literal() {dtype=f32, value=2.0}
        %b: f32[] = literal() {dtype=f32, value=3.0}
        %c: f32[] = mul(%a, %b)
    After:
        %c: f32[] = literal() {dtype=f32, value=6.0}

    Numerics: exact.
    """
    weights = dict(graph.weights)
    outer = tuple(
        _Folder(limit, weights, f.constants).function(f)
        for f in map_functions(graph, _fold_scalars).functions
    )
    return replace(graph, functions=outer, weights=weights)


def _fold_scalars(function: Function) -> Function:
    """Fold what literals alone make (all there is to fold in a body: its constants vary)."""
    return _Folder(0, {}, ()).function(function)


class _Folder:
    """The numbers known so far in one function; new constants go to `weights`."""

    def __init__(
        self, limit: int, weights: dict[str, Weight], constants: tuple[Value, ...]
    ) -> None:
        self.limit = limit
        self.weights = weights
        self.known: dict[str, np.ndarray] = {}
        self.held: set[str] = set()
        self.added: list[Value] = []
        for value in constants:
            weight = weights.get(value.name)
            if weight is not None and weight.data is not None and weight.data.size <= limit:
                self.known[value.name] = weight_values(weight)
                self.held.add(value.name)

    def function(self, function: Function) -> Function:
        made = rewrite_nodes(function, self.rule)
        return replace(made, constants=made.constants + tuple(self.added))

    def rule(self, node: Node, builder: Builder) -> Value | None:
        if isinstance(node.op, Literal):
            value = np.asarray(node.op.value, node.op.dtype.value)
            self.known[node.output.name] = round_to(node.op.dtype, value)
            return None
        if len(node.outputs) != 1 or not node.inputs:
            return None
        if not all(v.name in self.known for v in node.inputs):
            return None
        from_held = any(v.name in self.held for v in node.inputs)
        t = node.output.type
        if not all(isinstance(d, int) for d in t.shape) or (t.rank and not from_held):
            return None
        size = math.prod(d for d in t.shape if isinstance(d, int))
        arguments = [self.known[v.name] for v in node.inputs]
        grows = size > max(a.size for a in arguments) or isinstance(node.op, BroadcastTo)
        if t.rank and (grows or size > self.limit):
            return None
        with np.errstate(all="ignore"):
            out = outcome(node.op, t, np.asarray(node.op.reference(*arguments)))
        return self.constant(node, out, builder) if t.rank else _literal(node, out, builder)

    def constant(self, node: Node, array: np.ndarray, builder: Builder) -> Value:
        """Make a new constant of the function."""
        name = builder.fresh(node.output.name)
        while name in self.weights:
            name = builder.fresh(node.output.name)
        value = Value(name, node.output.type)
        data = to_storage(value.type.dtype, array)
        self.weights[name] = Weight(value.type, data=np.ascontiguousarray(data))
        self.added.append(value)
        self.known[name] = array
        self.held.add(name)
        return value


def _literal(node: Node, array: np.ndarray, builder: Builder) -> Value | None:
    """Make a literal, unless its text would not read back as the same number."""
    number = array.item()
    if number != number:  # NaN: its sign and payload have no text
        return None
    return builder.emit(Literal(number, node.output.type.dtype), name=node.output.name)
