"""Choosing rows before the work on them instead of after."""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Function, Graph, Node, Value
from ..ir.ops.elementwise import Binary, Cast, Unary, Where
from ..ir.ops.index import BroadcastTo, Reshape, Take
from ..ir.ops.reduce import Reduce
from ..ir.rewrite import Builder, map_functions, rewrite_nodes
from ..ir.types import Dim
from . import anchors
from .eliminate_dead import live_part
from .nominal import nominal_numel
from .regions import Dataflow, key

_POINTWISE = (Unary, Binary, Where, Cast)
_ROWWISE = (*_POINTWISE, BroadcastTo, Reshape, Reduce)


def hoist_take(graph: Graph) -> Graph:
    """Take rows before work that is done row by row, when nobody wants the other rows.

    Before:
        %y: f32[T,N] = exp(%x)
        %z: f32[R,N] = take(%y, %rows)
    After:
        %x_taken: f32[R,N] = take(%x, %rows)
        %z: f32[R,N] = exp(%x_taken)

    Numerics: exact.
    """
    return map_functions(graph, _hoisted)


def _hoisted(function: Function) -> Function:
    """Hoist one take after another, each over work that is alive."""
    while True:
        changed = _hoist_one(function)
        if changed is None:
            return function
        function = live_part(changed)


def _hoist_one(function: Function) -> Function | None:
    flow = Dataflow(function)
    for take in function.nodes:
        if not isinstance(take.op, Take) or take.inputs[1].type.rank != 1:
            continue
        table, rows = take.inputs
        grows = nominal_numel(rows.type.shape) > nominal_numel(table.type.shape[:1])
        owned, _ = anchors.before(flow, table, {key(take)}, ops=_ROWWISE)
        maker = flow.maker.get(table.name)
        if grows or maker not in owned or not _keeps_rows(flow.nodes[maker]):
            continue

        return _rebuilt(function, flow, take, owned)
    return None


def _rebuilt(function: Function, flow: Dataflow, take: Node, owned: set[str]) -> Function:
    def rule(node: Node, builder: Builder) -> Value | None:
        if node != take:
            return None
        return _Rows(flow, owned, take.inputs[1], builder).of(take.inputs[0])

    return rewrite_nodes(function, rule)


def _keeps_rows(node: Node) -> bool:
    """Whether the rows of a node's outcome depend on the same rows of its operands alone."""
    x, out = node.inputs[0].type, node.output.type
    if isinstance(node.op, Reduce):
        return 0 not in node.op.axes
    if isinstance(node.op, Reshape):
        return x.rank > 0 and out.rank > 0 and x.shape[0] == out.shape[0]
    return True


class _Rows:
    """Rebuilds the work on one choice of rows."""

    def __init__(self, flow: Dataflow, owned: set[str], rows: Value, builder: Builder) -> None:
        self.flow = flow
        self.owned = owned
        self.rows = rows
        self.builder = builder
        self.made: dict[str, Value] = {}

    @property
    def count(self) -> Dim:
        return self.rows.type.shape[0]

    def of(self, value: Value) -> Value:
        """Return the chosen rows of a value."""
        if value.name not in self.made:
            node = self.flow.made_by(value)
            if node is not None and key(node) in self.owned and _keeps_rows(node):
                new = self.again(node)
            else:
                new = self.builder.emit(Take(), value, self.rows, name=f"{value.name}_taken")
            self.made[value.name] = new
        return self.made[value.name]

    def again(self, node: Node) -> Value:
        """Return the outcome of a node for the chosen rows alone."""
        op, out = node.op, node.output.type
        inputs = [self.of(v) if self.has_rows(v, node) else v for v in node.inputs]
        if isinstance(op, (BroadcastTo, Reshape)):
            op = replace(op, shape=(self.count, *out.shape[1:]))
        return self.builder.emit(op, *inputs, name=node.output.name)

    def has_rows(self, value: Value, node: Node) -> bool:
        """Whether an operand's first axis is that of the node's outcome."""
        if isinstance(node.op, (Reduce, Reshape)):
            return True
        out = node.output.type
        return value.type.rank == out.rank and value.type.shape[0] == out.shape[0]
