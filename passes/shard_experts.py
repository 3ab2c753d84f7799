"""Routed experts on many ranks: each holds some, tokens travel to them and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import UnsupportedError
from ..ir.dtypes import BF16, I64, DType
from ..ir.graph import Function, Graph, Node, Value
from ..ir.mesh import Mesh
from ..ir.ops.collective import Routed
from ..ir.ops.control import Call, Kernel
from ..ir.ops.elementwise import Cast, Mul
from ..ir.ops.index import BroadcastTo, Reshape
from ..ir.ops.language import Experts
from ..ir.ops.reduce import ReduceSum
from ..ir.rewrite import Builder, substituted
from ..ir.types import TensorType, shape_of, symbol
from ..ir.weights import Piece, Placed, Weight
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

    Where %x is cast from bf16, the rows before the cast are sent, and the body casts them.

    Numerics: the same products; the k outcomes of a token are added in the order of its choices,
    wherever its experts are.
    """
    if mesh.ep == 1:
        return replace(graph, stage="sharded", mesh=mesh)
    sharding = _Sharding(mesh, place, capacity, dict(graph.weights))
    functions = tuple(sharding.outermost(f) for f in graph.functions)
    return replace(graph, stage="sharded", functions=functions, weights=sharding.weights, mesh=mesh)


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
        outer = dict(zip((v.name for v in op.body.inputs), node.inputs, strict=True))
        prefix = _prefix(op.body, outer)
        layer = _Layer(self, op.body, prefix, op.times)
        body = layer.sharded()
        added: dict[str, Value] = {}
        for name, slots in layer.placements.items():
            t = TensorType(I64, (op.times, self.mesh.ep, slots.shape[-1]))
            added[name] = constants[prefix + name] = Value(builder.fresh(prefix + name), t)
            data = np.ascontiguousarray(slots, np.int64)
            self.weights[prefix + name] = Weight(t, data=data)
        for inner, name in layer.divided.items():
            old = outer[inner]
            stacked = old.type.rank - next(c for c in body.constants if c.name == inner).type.rank
            slots = layer.placements[name].shape[-1]
            shape = (*old.type.shape[:stacked], slots, *old.type.shape[stacked + 1 :])
            outer[inner] = constants[old.name] = Value(old.name, old.type.with_shape(shape))
            weight = _in_pieces(self.weights[old.name], stacked + 1)
            self.weights[old.name] = replace(
                weight,
                type=outer[inner].type,
                splits=(*weight.splits, Placed("ep", stacked, prefix + name)),
                whole_type=weight.whole,
            )
        outer |= added
        inputs = tuple(outer[v.name] for v in body.inputs)
        return replace(node, op=replace(op, body=body), inputs=inputs)


@dataclass
class _Layer:
    """A layer on its way.

    `placements`: the constants that say who holds which expert, by name, and their content;
    `divided`: the constants of which a rank has a part, and the placement that says which.
    """

    sharding: _Sharding
    old: Function
    prefix: str
    times: int
    placements: dict[str, np.ndarray] = field(default_factory=dict)
    divided: dict[str, str] = field(default_factory=dict)

    def sharded(self) -> Function:
        flow = Dataflow(self.old)
        builder = Builder.over(self.old)
        subst: dict[Value, Value] = {}
        constants = {c.name: c for c in self.old.constants}
        for node in self.old.nodes:
            if isinstance(node.op, Experts):
                builder.loc = node.loc
                node = replace(node, inputs=substituted(node.inputs, subst))
                subst[node.output] = self.routed(node, flow, builder, constants)
            else:
                builder.keep(node, subst)
        function = replace(
            self.old,
            nodes=tuple(builder.nodes),
            constants=tuple(constants.values()),
            results=substituted(self.old.results, subst),
        )
        return live_part(function)

    def routed(
        self,
        node: Node,
        flow: Dataflow,
        builder: Builder,
        constants: dict[str, Value],
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
        name = _placement_name(leaves[0].name)
        experts = int(matrices[0].type.shape[0])
        placed = self.sharding.place(self.prefix + name, self.times, experts)
        self.placements[name] = placed
        ranks, slots = placed.shape[1:]
        for leaf in leaves:
            new = Value(leaf.name, leaf.type.with_shape((slots, *leaf.type.shape[1:])))
            constants[leaf.name] = new
            self.divided[leaf.name] = name
        constants[name] = Value(name, TensorType(I64, (ranks, slots)))
        steps = [n for c in chains for n in reversed(c or [])]
        sent = _before_cast(x, builder.nodes)
        body = self.body(node, sent.type.dtype, steps, constants)
        each = builder.emit(
            Routed("ep", self.sharding.capacity, body),
            sent,
            indices,
            constants[name],
            *(constants[c.name] for c in body.constants),
        )
        if weights.type.dtype != each.type.dtype:
            weights = builder.emit(Cast(each.type.dtype), weights)
        wide = builder.emit(Reshape(shape_of((*weights.type.shape, 1))), weights)
        scaled = builder.emit(Mul(), each, wide)
        return builder.emit(ReduceSum((1,), False), scaled)

    def body(
        self, node: Node, sent: DType, chain: list[Node], constants: dict[str, Value]
    ) -> Function:
        """Return the function that works on the rows of `sent` that came to a rank."""
        x = node.inputs[0].type
        many = symbol("A")
        inner = Builder(set(constants))
        rows = Value(inner.fresh("rows"), TensorType(sent, (many, x.shape[1])))
        slots = Value(inner.fresh("slots"), TensorType(I64, (many, 1)))
        made: dict[str, Value] = {}
        for step in chain:
            inputs = [made.get(v.name) or constants.get(v.name) or v for v in step.inputs]
            made[step.output.name] = inner.emit(step.op, *inputs, name=step.output.name)
        one = inner.literal(1.0, node.inputs[2].type.dtype)
        ones = inner.emit(BroadcastTo((many, 1)), one)
        matrices = [made.get(v.name) or constants[v.name] for v in node.inputs[3:]]
        wide = rows if sent == x.dtype else inner.emit(Cast(x.dtype), rows)
        out = inner.emit(node.op, wide, slots, ones, *matrices)
        read = {v.name for n in inner.nodes for v in n.inputs}
        return Function(
            "experts",
            (rows, slots),
            constants=tuple(c for c in constants.values() if c.name in read),
            nodes=tuple(inner.nodes),
            results=(out,),
        )


def _before_cast(x: Value, nodes: list[Node]) -> Value:
    """Return what rows are cast from, where those are fewer bytes to send."""
    maker = next((n for n in nodes if x in n.outputs), None)
    narrow = maker is not None and isinstance(maker.op, Cast) and maker.inputs[0]
    return narrow if narrow and narrow.type.dtype == BF16 else x


def _placement_name(weight: str) -> str:
    """Return the name of the constant that places experts, given that of their first weight."""
    return f"{weight.rpartition('.')[0] or 'experts'}.placement"


@dataclass(frozen=True)
class ExpertBlock:
    """A block of `experts` experts in a layer: the name of what places them, or would place them;
    `routed` to many ranks or not."""

    placement: str
    layer: int
    experts: int
    routed: bool


def expert_blocks(function: Function) -> Iterator[ExpertBlock]:
    """Yield the blocks of experts of a fused function, as they run."""
    for node in function.nodes:
        if not isinstance(node.op, Call):
            continue
        body = node.op.body
        outer = dict(zip((v.name for v in body.inputs), node.inputs, strict=True))
        prefix = _prefix(body, outer)
        found: list[ExpertBlock] = []
        for inner in body.nodes:
            if isinstance(inner.op, Routed):
                name = outer[inner.inputs[2].name].name
                found.append(ExpertBlock(name, 0, 0, True))
            elif isinstance(inner.op, Kernel):
                found += _blocks(inner, inner.op.body, prefix)
        for layer in range(node.op.times):
            yield from (replace(block, layer=layer) for block in found)


def _prefix(body: Function, outer: Mapping[str, Value]) -> str:
    """Return what the names of a body's constants have in front where they are bound."""
    names = [c.name for c in body.constants[:1]]
    return "".join(outer[name].name.removesuffix(name) for name in names)


def _blocks(kernel: Node, body: Function, prefix: str) -> Iterator[ExpertBlock]:
    operands = dict(zip((v.name for v in body.inputs), kernel.inputs, strict=True))
    flow = Dataflow(replace(body, parameters=(), states=(), updates=(), constants=body.inputs))
    for node in body.nodes:
        if isinstance(node.op, Experts):
            matrix = node.inputs[3]
            first = operands[_leaves(matrix, weight_chain(flow, matrix) or [])[0].name]
            name = prefix + _placement_name(first.name)
            yield ExpertBlock(name, 0, int(matrix.type.shape[0]), False)


def _leaves(matrix: Value, chain: list[Node]) -> list[Value]:
    made = {n.output.name for n in chain}
    return [v for n in chain for v in n.inputs if v.name not in made] or [matrix]


def _has_experts(function: Function) -> bool:
    return any(isinstance(n.op, Experts) for n in function.nodes)


def _in_pieces(weight: Weight, grid: int) -> Weight:
    """Return the same weight with its first `grid` dimensions in pieces."""
    if weight.grid >= grid or weight.data is not None or not weight.pieces:
        return replace(weight, grid=max(weight.grid, grid))
    count = 1
    for size in weight.whole.shape[weight.grid : grid]:
        count *= int(size)
    pieces = tuple(
        Piece(p.file, p.tensor, p.offset + i * (p.nbytes // count), p.nbytes // count)
        for p in weight.pieces
        for i in range(count)
    )
    return replace(weight, grid=grid, pieces=pieces)
