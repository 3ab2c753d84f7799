"""Routed experts on many ranks: each holds some, tokens travel to them and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UnsupportedError
from ..ir.dtypes import I64
from ..ir.graph import Function, Graph, Node, Value
from ..ir.mesh import Mesh
from ..ir.ops.collective import Routed
from ..ir.ops.control import Call
from ..ir.ops.elementwise import Cast, Mul
from ..ir.ops.index import BroadcastTo, Reshape
from ..ir.ops.language import Experts
from ..ir.ops.reduce import ReduceSum
from ..ir.rewrite import Builder
from ..ir.types import TensorType, shape_of, symbol
from ..ir.weights import Piece, Split, Weight
from .anchors import weight_chain
from .eliminate_dead import live_part
from .regions import Dataflow

#: Rows that a rank works on at once: enough for weights to be read seldom, few enough for memory.
CAPACITY = 1024

#: (name, layers, experts) → i64[layers, ranks, slots]: which experts the slots of a rank hold.
Placing = Callable[[str, int, int], np.ndarray]


def shard_experts(graph: Graph, *, mesh: Mesh, place: Placing, capacity: int = CAPACITY) -> Graph:
    """Give every rank of the axis `ep` the experts that `place` says, and send tokens to them.

    Sequences are divided among the ranks, so that tokens, T, are a rank's own; whatever is no
    expert works on them as before. The expert weights of the function become a rank's part of
    them, and a constant says who holds which. An axis of one rank changes nothing.

    Before:
        %y: f32[T,H] = experts(%x, %indices, %weights, %gate_up, %down)
    After:
        %each: f32[T,k,H] = routed(%x, %indices, %placement, %gate_up, %down) {axis="ep", body=…}
        %wide: f32[T,k,1] = reshape(%weights)
        %scaled: f32[T,k,H] = mul(%each, %wide)
        %y: f32[T,H] = reduce_sum(%scaled) {axes=[1], keepdims=false}

    Numerics: the same products; the k outcomes of a token are added in the order of its choices,
    wherever its experts are.
    """
    if mesh.ep == 1:
        return replace(graph, stage="sharded", mesh=mesh)
    sharding = _Sharding(mesh, place, capacity, dict(graph.weights))
    functions = tuple(sharding.outermost(f) for f in graph.functions)
    return replace(graph, stage="sharded", functions=functions, weights=sharding.weights, mesh=mesh)


@dataclass(frozen=True)
class _Change:
    """A constant whose first dimension becomes the slots of a rank, as `placement` says."""

    placement: str
    slots: int


@dataclass
class _Sharding:
    mesh: Mesh
    place: Placing
    capacity: int
    weights: dict[str, Weight]

    def outermost(self, function: Function) -> Function:
        """Shard a function whose constants are bound, in its calls' bodies above all."""
        builder = Builder.over(function)
        constants = {c.name: c for c in function.constants}
        for node in function.nodes:
            if isinstance(node.op, Experts):
                raise UnsupportedError("experts outside of a repeated layer are not sharded")
            if isinstance(node.op, Call) and _has_experts(node.op.body):
                node = self.call(node, node.op, builder, constants)
            builder.nodes.append(node)
        return replace(function, nodes=tuple(builder.nodes), constants=tuple(constants.values()))

    def call(self, node: Node, op: Call, builder: Builder, constants: dict[str, Value]) -> Node:
        layers = op.times
        body, changes = _Body(self, op.body, layers).sharded()
        outer = dict(zip((v.name for v in op.body.inputs), node.inputs, strict=True))
        base = {c: outer[c].name.removesuffix(c) for c in changes}
        added: dict[str, Value] = {}
        for inner, change in changes.items():
            old = outer[inner]
            name = base[inner] + change.placement
            if change.placement not in added:
                held = self.placed(name, layers, _experts(op.body), body, change.placement)
                added[change.placement] = constants[name] = Value(builder.fresh(name), held.type)
                self.weights[name] = held
            stacked = old.type.rank - _inner(op.body, inner).type.rank
            weight = _in_pieces(self.weights[old.name], stacked + 1)
            shape = (*old.type.shape[:stacked], change.slots, *old.type.shape[stacked + 1 :])
            new = Value(old.name, old.type.with_shape(shape))
            self.weights[old.name] = replace(
                weight, type=new.type, split=Split("ep", stacked, name), whole_type=old.type
            )
            outer[inner] = constants[old.name] = new
        outer |= added
        inputs = tuple(outer[v.name] for v in body.inputs)
        return replace(node, op=replace(op, body=body), inputs=inputs)

    def placed(
        self, name: str, layers: int, experts: int, body: Function, placement: str
    ) -> Weight:
        """Return the constant that says which experts are where, stacked over the layers."""
        slots = self.place(name, layers, experts)
        t = _inner(body, placement).type
        return Weight(t.with_shape((layers, *t.shape)), data=np.ascontiguousarray(slots, np.int64))


@dataclass
class _Body:
    """A layer on its way: `changes` are its constants that are divided."""

    sharding: _Sharding
    old: Function
    layers: int

    def sharded(self) -> tuple[Function, dict[str, _Change]]:
        flow = Dataflow(self.old)
        builder = Builder.over(self.old)
        subst: dict[Value, Value] = {}
        changes: dict[str, _Change] = {}
        constants = {c.name: c for c in self.old.constants}
        for node in self.old.nodes:
            if isinstance(node.op, Experts):
                builder.loc = node.loc
                subst[node.output] = self.routed(node, node.op, flow, builder, constants, changes)
            else:
                builder.keep(node, subst)
        function = replace(
            self.old,
            nodes=tuple(builder.nodes),
            constants=tuple(constants.values()),
            results=tuple(subst.get(v, v) for v in self.old.results),
        )
        return live_part(function), changes

    def routed(
        self,
        node: Node,
        op: Experts,
        flow: Dataflow,
        builder: Builder,
        constants: dict[str, Value],
        changes: dict[str, _Change],
    ) -> Value:
        x, indices, weights, *matrices = node.inputs
        chains = [weight_chain(flow, m) for m in matrices]
        leaves = [
            leaf
            for matrix, chain in zip(matrices, chains, strict=True)
            for leaf in _leaves(matrix, chain or [])
        ]
        if any(leaf.name not in constants for leaf in leaves):
            raise UnsupportedError("experts whose weights are computed are not sharded")
        mesh = self.sharding.mesh
        prefix = leaves[0].name.rpartition(".")[0]
        name = f"{prefix}.placement" if prefix else "placement"
        experts = int(matrices[0].type.shape[0])
        slots = self.sharding.place(name, self.layers, experts).shape[-1]
        shared = Value(name, TensorType(I64, (mesh.ep, slots)))
        for leaf in leaves:
            new = Value(leaf.name, leaf.type.with_shape((slots, *leaf.type.shape[1:])))
            constants[leaf.name] = new
            changes[leaf.name] = _Change(name, slots)
        constants[name] = shared
        body = self.body(node, op, [n for c in chains for n in reversed(c or [])], constants)
        each = builder.emit(
            Routed("ep", self.sharding.capacity, body),
            x,
            indices,
            shared,
            *(constants[c.name] for c in body.constants),
        )
        if weights.type.dtype != x.type.dtype:
            weights = builder.emit(Cast(x.type.dtype), weights)
        wide = builder.emit(Reshape(shape_of((*weights.type.shape, 1))), weights)
        scaled = builder.emit(Mul(), each, wide)
        return builder.emit(ReduceSum((1,), False), scaled, name=node.output.name)

    def body(
        self, node: Node, op: Experts, chain: list[Node], constants: dict[str, Value]
    ) -> Function:
        """Return the function that works on the rows that came to a rank."""
        x = node.inputs[0].type
        many = symbol("A")
        inner = Builder(set(constants))
        rows = Value(inner.fresh("rows"), x.with_shape((many, x.shape[1])))
        slots = Value(inner.fresh("slots"), TensorType(I64, (many, 1)))
        made: dict[str, Value] = {}
        for step in chain:
            inputs = [made.get(v.name) or constants.get(v.name) or v for v in step.inputs]
            made[step.output.name] = inner.emit(step.op, *inputs, name=step.output.name)
        one = inner.literal(1.0, node.inputs[2].type.dtype)
        ones = inner.emit(BroadcastTo((many, 1)), one)
        matrices = [made.get(v.name) or constants[v.name] for v in node.inputs[3:]]
        out = inner.emit(op, rows, slots, ones, *matrices)
        read = {v.name for n in inner.nodes for v in n.inputs}
        return Function(
            "experts",
            (rows, slots),
            constants=tuple(c for c in constants.values() if c.name in read),
            nodes=tuple(inner.nodes),
            results=(out,),
        )


def _leaves(matrix: Value, chain: list[Node]) -> list[Value]:
    made = {n.output.name for n in chain}
    return [v for n in chain for v in n.inputs if v.name not in made] or [matrix]


def _has_experts(function: Function) -> bool:
    return any(isinstance(n.op, Experts) for n in function.nodes)


def _experts(function: Function) -> int:
    node = next(n for n in function.nodes if isinstance(n.op, Experts))
    return int(node.inputs[3].type.shape[0])


def _inner(function: Function, name: str) -> Value:
    return next(v for v in function.inputs if v.name == name)


def _in_pieces(weight: Weight, grid: int) -> Weight:
    """Return the same weight with its first `grid` dimensions in pieces."""
    if weight.grid >= grid or weight.data is not None or not weight.pieces:
        return replace(weight, grid=max(weight.grid, grid))
    count = 1
    for size in weight.type.shape[weight.grid : grid]:
        count *= int(size)
    pieces = tuple(
        Piece(p.file, p.tensor, p.offset + i * (p.nbytes // count), p.nbytes // count)
        for p in weight.pieces
        for i in range(count)
    )
    return replace(weight, grid=grid, pieces=pieces)
