"""Heads, columns and vocabulary divided among ranks (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd

import networkx as nx
import numpy as np

from ..errors import UnsupportedError
from ..ir.dimensions import links
from ..ir.dtypes import I64
from ..ir.graph import Function, Graph, Node, Value
from ..ir.mesh import Mesh
from ..ir.op import Op
from ..ir.ops.collective import AllGather, AllReduce
from ..ir.ops.control import Call
from ..ir.ops.elementwise import Add, Cast, Ge, LogicalAnd, Lt, Sub, Where
from ..ir.ops.index import BroadcastTo, Reshape, Take
from ..ir.ops.quantize import Dequantize
from ..ir.rewrite import Builder
from ..ir.types import Dim, TensorType, shape_of
from ..ir.weights import Even, Weight

AXIS = "tp"
Place = tuple[str, int]  # a value's name, and one of its dimensions


def shard_tensors(graph: Graph, *, mesh: Mesh) -> Graph:
    """Divide weights, and what is made of them, among the ranks of the axis `tp`.

    Dimensions that ops link with each other (heads, a feed-forward block's inner size, the
    vocabulary) are divided together, where none of them has to be whole and all are multiples of
    the number of ranks. What is a part of a sum then is added up among the ranks, parts that are
    added to each other at once.

    Before:
        %a: f32[T,64] = matmul(%x, %up) {transpose_b=true}
        %b: f32[T,64] = mul(%a, %a)
        %y: f32[T,16] = matmul(%b, %down) {transpose_b=true}
    After, on two ranks:
        %a: f32[T,32] = matmul(%x, %up) {transpose_b=true}
        %b: f32[T,32] = mul(%a, %a)
        %y: f32[T,16] = matmul(%b, %down) {transpose_b=true}
        %all_reduce: f32[T,16] = all_reduce(%y) {axis="tp"}

    Numerics: sums over a divided dimension are added in parts, one for each rank.
    """
    if mesh.tp == 1:
        return replace(graph, stage="sharded", mesh=mesh)
    sharding = _Sharding(mesh.tp, dict(graph.weights))
    functions = tuple(sharding.outermost(f) for f in graph.functions)
    if not sharding.divided:
        raise UnsupportedError(
            f"nothing in this model can be divided among tp={mesh.tp} ranks",
            hint="choose a tp that divides the numbers of heads and the inner sizes",
        )
    return replace(graph, stage="sharded", functions=functions, weights=sharding.weights, mesh=mesh)


# ---------------------------------------------------------------------------- what is divided


@dataclass(frozen=True)
class _Scales:
    """Scales (`place`) of which each is for `block` of the codes at another place."""

    place: Place
    codes: Place
    block: int
    size: int  # of the codes


@dataclass
class _Plan:
    """The part of every value that a rank has: divided dimensions and their sizes.

    `splits`: how a rank's part of a constant is chosen; `blocks`: the blocks of scales that are
    no longer those of the whole, by the scales' name; `summed`: the values that are parts of sums;
    `looked_up`: the tables of which a rank has some of the rows.
    """

    sizes: dict[Place, int] = field(default_factory=dict)
    splits: dict[str, list[Even]] = field(default_factory=dict)
    blocks: dict[Place, int] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)

    def local(self, value: Value) -> Value:
        shape = (self.sizes.get((value.name, d), s) for d, s in enumerate(value.type.shape))
        return Value(value.name, value.type.with_shape(shape))


class _Analysis:
    """The dimensions of a function, joined where they are divided together."""

    def __init__(self, function: Function, kept: Iterable[str], *, gather: bool) -> None:
        self.function = function
        self.values = {v.name: v for v in function.inputs}
        self.values |= {v.name: v for n in function.nodes for v in n.outputs}
        self.constants = {v.name for v in function.constants}
        self.joined: nx.utils.UnionFind[Place] = nx.utils.UnionFind()
        self.whole: set[Place] = set()
        self.summed: list[tuple[Place, str]] = []
        self.scales: list[_Scales] = []
        self.tables: list[Place] = []
        for name in (*(v.name for v in function.parameters), *kept):
            self.keep(self.values[name])
        if not gather:
            for value in function.results:
                self.keep(value)
        for state, update in zip(function.states, function.updates, strict=True):
            for d in range(state.type.rank):
                self.joined.union((state.name, d), (update.name, d))
        for node in function.nodes:
            self.add(node)

    def keep(self, value: Value) -> None:
        self.whole |= {(value.name, d) for d in range(value.type.rank)}

    def add(self, node: Node) -> None:
        seen: set[Place] = set()
        types = tuple(v.type for v in node.inputs), tuple(v.type for v in node.outputs)
        for link in links(node.op, *types):
            places = [(node.inputs[i].name, d) for i, d in link.inputs]
            places += [(node.outputs[o].name, d) for o, d in link.outputs]
            seen |= set(places)
            if len(places) > 1:
                self.joined.union(*places)
            if link.summed:
                self.summed.append((places[0], node.output.name))
        if isinstance(node.op, Dequantize):
            seen |= set(self.follow(node, node.op))
        if isinstance(node.op, Take) and node.inputs[0].name in self.constants:
            table = (node.inputs[0].name, 0)
            self.tables.append(table)
            seen.add(table)
        everything = {
            (v.name, d) for v in (*node.inputs, *node.outputs) for d in range(v.type.rank)
        }
        self.whole |= everything - seen

    def follow(self, node: Node, op: Dequantize) -> Iterable[Place]:
        codes, scales = node.inputs
        for d, block in zip((-2, -1), op.block, strict=True):
            place, size = (scales.name, scales.type.rank + d), codes.type.shape[d]
            if isinstance(size, int):
                self.scales.append(_Scales(place, (codes.name, codes.type.rank + d), block, size))
                yield place

    def plan(self, ranks: int) -> _Plan:
        """Return what is divided: the most bytes first, a value along one dimension only."""
        plan = _Plan()
        known = {(n, d) for n, v in self.values.items() for d in range(v.type.rank)}
        groups: dict[Place, list[Place]] = {}
        for place in sorted(known):
            groups.setdefault(self.joined[place], []).append(place)
        followers: dict[Place, list[_Scales]] = {}
        for s in self.scales:
            followers.setdefault(self.joined[s.codes], []).append(s)
        alone = set(groups) - {self.joined[s.place] for s in self.scales}
        for root in sorted(alone, key=lambda root: (-self.weight(groups[root]), root)):
            scales = followers.get(root, [])
            if self.weight(groups[root]) and self.fits(groups[root], ranks, plan):
                parts = [p for s in scales for p in groups[self.joined[s.place]]]
                if not any(p in self.whole for p in parts):
                    self.divide(groups, root, scales, ranks, plan)
        return plan

    def size(self, place: Place) -> Dim:
        return self.values[place[0]].type.shape[place[1]]

    def weight(self, places: list[Place]) -> int:
        """Return the bytes of the matrices among the constants that have these dimensions."""
        owners = {name for name, _ in places if name in self.constants}
        types = [self.values[name].type for name in owners]
        return sum(int(t.nbytes) for t in types if t.rank > 1)

    def fits(self, places: list[Place], ranks: int, plan: _Plan) -> bool:
        taken = {name for name, _ in plan.sizes}
        for place in places:
            size = self.size(place)
            if place in self.whole or place[0] in taken:
                return False
            if not isinstance(size, int) or size % ranks:
                return False
        return len({name for name, _ in places}) == len(places)

    def divide(
        self,
        groups: Mapping[Place, list[Place]],
        root: Place,
        scales: list[_Scales],
        ranks: int,
        plan: _Plan,
    ) -> None:
        for place in groups[root]:
            size = self.size(place)
            assert isinstance(size, int)
            plan.sizes[place] = size // ranks
            self.split(place, Even(AXIS, place[1], size // ranks), plan)
        for s in scales:
            part = s.size // ranks
            step = _step(part, s.block, ranks)
            for place in groups[self.joined[s.place]]:
                plan.sizes[place] = part // step
                self.split(place, Even(AXIS, place[1], part // step, step, s.block), plan)
            plan.blocks[s.place] = step
        plan.summed |= {out for place, out in self.summed if self.joined[place] == root}
        plan.looked_up |= {name for name, d in self.tables if self.joined[name, d] == root}

    def split(self, place: Place, even: Even, plan: _Plan) -> None:
        if place[0] in self.constants:
            plan.splits.setdefault(place[0], []).append(even)


def _step(part: int, block: int, ranks: int) -> int:
    """Return the largest number of rows that scales of all ranks' parts can be for."""
    edges = range(block, part * ranks, block)
    return gcd(part, *(edge % part for edge in edges))


# ----------------------------------------------------------------------------------- rewriting


@dataclass
class _Sharding:
    ranks: int
    weights: dict[str, Weight]
    divided: bool = False

    def outermost(self, function: Function) -> Function:
        """Shard a function whose constants are bound, its calls' bodies first."""
        uses = [v.name for n in function.nodes for v in n.inputs]
        shared = {name for name in uses if uses.count(name) > 1}
        inner: dict[str, Function] = {}
        types: dict[str, TensorType] = {}
        for node in function.nodes:
            if isinstance(node.op, Call):
                inner[node.outputs[0].name] = self.body(node, node.op, shared, types)
        passed = [v.name for n in function.nodes if isinstance(n.op, Call) for v in n.inputs]
        kept = (v.name for v in (*function.states, *function.constants) if v.name in set(passed))
        plan = _Analysis(function, kept, gather=True).plan(self.ranks)
        for constant in function.constants:
            if constant.name in plan.splits:
                self.bind(constant.name, plan.local(constant).type, plan.splits[constant.name])
        return _Rewriter(self, function, plan, types, inner).rewritten()

    def body(
        self, node: Node, op: Call, shared: set[str], types: dict[str, TensorType]
    ) -> Function:
        """Return the sharded body of a call; add to `types` what its operands become."""
        pairs = list(zip(op.body.inputs, node.inputs, strict=True))
        first = len(op.body.parameters)
        kept = [inside.name for inside, outside in pairs[first:] if outside.name in shared]
        plan = _Analysis(op.body, kept, gather=False).plan(self.ranks)
        for inside, outside in pairs[first:]:
            lead = outside.type.rank - inside.type.rank
            local = plan.local(inside).type
            types[outside.name] = local.with_shape((*outside.type.shape[:lead], *local.shape))
            splits = [s.stacked(lead) for s in plan.splits.get(inside.name, ())]
            if splits:
                self.bind(outside.name, types[outside.name], splits)
        return _Rewriter(self, op.body, plan, {}, {}).rewritten()

    def bind(self, name: str, type: TensorType, splits: Iterable[Even]) -> None:
        weight = self.weights.get(name)
        self.divided = True
        if weight is not None:
            whole, parts = weight.whole, (*weight.splits, *splits)
            self.weights[name] = replace(weight, type=type, splits=parts, whole_type=whole)


class _Rewriter:
    """Makes the function that works on a rank's parts."""

    def __init__(
        self,
        sharding: _Sharding,
        function: Function,
        plan: _Plan,
        types: Mapping[str, TensorType],
        bodies: Mapping[str, Function],
    ) -> None:
        self.sharding, self.function, self.plan, self.bodies = sharding, function, plan, bodies
        self.builder = Builder.over(function)
        self.uses = [v.name for n in function.nodes for v in n.inputs]
        self.uses += [v.name for v in function.outputs]
        self.now: dict[str, Value] = {}
        for value in function.inputs:
            local = plan.local(value)
            self.now[value.name] = Value(value.name, types.get(value.name, local.type))
        self.constants = [self.now[v.name] for v in function.constants]
        self.partial: set[str] = set()

    def rewritten(self) -> Function:
        for node in self.function.nodes:
            self.builder.loc = node.loc
            self.node(node)
        function = self.function
        results = tuple(self.gathered(v) for v in function.results)
        return replace(
            function,
            states=tuple(self.now[v.name] for v in function.states),
            constants=tuple(self.constants),
            nodes=tuple(self.builder.nodes),
            results=results,
            updates=tuple(self.summed(v) for v in function.updates),
        )

    def node(self, node: Node) -> None:
        if isinstance(node.op, Take) and node.inputs[0].name in self.plan.looked_up:
            self.now[node.output.name] = self.lookup(node)
            return
        carried = self.carries(node)
        inputs = tuple(self.now[v.name] if carried else self.summed(v) for v in node.inputs)
        op = self.local(node)
        outputs = tuple(
            Value(v.name, t)
            for v, t in zip(node.outputs, op.infer(*(v.type for v in inputs)), strict=True)
        )
        self.builder.nodes.append(replace(node, op=op, inputs=inputs, outputs=outputs))
        self.now |= {v.name: v for v in outputs}
        if carried or any(v.name in self.plan.summed for v in outputs):
            self.partial |= {v.name for v in outputs}

    def local(self, node: Node) -> Op:
        op = node.op
        if isinstance(op, (Reshape, BroadcastTo)):
            return replace(op, shape=self.plan.local(node.output).type.shape)
        if isinstance(op, Dequantize):
            scales = node.inputs[1]
            places = ((scales.name, scales.type.rank + d) for d in (-2, -1))
            rows, columns = (
                self.plan.blocks.get(place, old)
                for place, old in zip(places, op.block, strict=True)
            )
            return replace(op, block=(rows, columns))
        if isinstance(op, Call):
            return replace(op, body=self.bodies[node.outputs[0].name])
        return op

    def carries(self, node: Node) -> bool:
        """Whether the outcome is a part of a sum because all operands are, read nowhere else."""
        parts = [v.name for v in node.inputs]
        if not parts or any(p not in self.partial or self.uses.count(p) > 1 for p in parts):
            return False
        wider = isinstance(node.op, Cast) and node.op.dtype.bits > node.inputs[0].type.dtype.bits
        return isinstance(node.op, Add) or wider

    def summed(self, value: Value) -> Value:
        """Return the whole of a value that may be a part of a sum."""
        now = self.now[value.name]
        if value.name in self.partial:
            self.partial.discard(value.name)
            now = self.now[value.name] = self.builder.emit(AllReduce(AXIS), now)
        return now

    def gathered(self, value: Value) -> Value:
        now = self.summed(value)
        for d in range(value.type.rank):
            if (value.name, d) in self.plan.sizes:
                now = self.builder.emit(AllGather(AXIS, d, self.sharding.ranks), now)
        return now

    def lookup(self, node: Node) -> Value:
        """Look rows up in a rank's part of a table; what others have is zero, for all to add."""
        table, indices = (self.summed(v) for v in node.inputs)
        b, count = self.builder, int(table.type.shape[0])
        first = Value(b.fresh(f"{table.name}.first"), TensorType(I64, (1,)))
        starts = np.arange(self.sharding.ranks, dtype=np.int64) * count
        whole = TensorType(I64, (self.sharding.ranks,))
        split = Even(AXIS, 0, 1)
        self.sharding.weights[first.name] = Weight(
            first.type, data=starts, splits=(split,), whole_type=whole
        )
        self.constants.append(first)
        if indices.type.dtype != I64:
            indices = b.emit(Cast(I64), indices)
        own = b.emit(Sub(), indices, first)
        zero = b.literal(0, I64)
        above, below = b.emit(Ge(), own, zero), b.emit(Lt(), own, b.literal(count, I64))
        mine = b.emit(LogicalAnd(), above, below)
        rows = b.emit(Take(), table, b.emit(Where(), mine, own, zero))
        wide = b.emit(Reshape(shape_of((*mine.type.shape, *[1] * (table.type.rank - 1)))), mine)
        nothing = b.literal(0.0, table.type.dtype)
        part = b.emit(Where(), wide, rows, nothing, name=node.output.name)
        self.partial.add(node.output.name)
        return part
