"""Chains of elementwise work, data movement and reductions."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx

from ..ir.graph import Function, Graph, Node, Value
from ..ir.ops.index import Concat, Reshape
from ..ir.rewrite import map_functions
from ..ir.types import Shape
from . import anchors
from .hints import loops_hint
from .loop_ops import LOOP_OPS, VIEWS, cost, is_free, is_one_space, region_rows
from .nominal import nominal_numel
from .regions import Dataflow, Region, cut_out, key

_REPEATED_WORK = 8  # additions per element of the outcome that may be done again instead of stored


def fuse_loops(graph: Graph) -> Graph:
    """Make loop nests of the remaining ops: chains, reductions with what uses them, views.

    Ops are merged into the nest that reads them as long as the nest has one iteration space
    and no costly work is repeated. Views, literals and widening casts go into every reader.

    Before:
        %a: f32[T,N] = exp(%x)
        %s: f32[T,1] = reduce_sum(%a) {axes=[1], keepdims=true}
        %y: f32[T,N] = div(%a, %s)
    After:
        %y: f32[T,N] = kernel(%x) {body=…, kind="loops"}

    Numerics: exact.
    """
    return map_functions(graph, _fused)


def _fused(function: Function) -> Function:
    regions = _Merger(Dataflow(function)).regions()
    return cut_out(function, regions) if regions else function


class _Merger:
    """Merges regions pairwise, producers into consumers, while that is legal and pays.

    `region` is the region of every node of work, `between` the acyclic graph of regions and of
    the nodes that are in none. Free nodes are in no region: they are cloned into each.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        loops = {k for k, n in flow.nodes.items() if isinstance(n.op, LOOP_OPS)}
        self.work = {
            k for k in loops if not is_free(flow.nodes[k]) or self.is_read_outside(k, loops)
        }
        self.free = loops - self.work
        self.region = {k: k for k in self.work}
        self.parts = {k: {k} for k in self.work}
        self.between = self.quotient()

    def is_read_outside(self, k: str, loops: set[str]) -> bool:
        """Whether a free node's outcome must lie in memory, itself or reshaped."""
        node = self.flow.nodes[k]
        if isinstance(node.op, Reshape):
            return False
        work = list(node.outputs)
        while work:
            value = work.pop()
            if value.name in self.flow.outside:
                return True
            for user in self.flow.users[value.name]:
                if user not in loops:
                    return True
                if isinstance(self.flow.nodes[user].op, Reshape):
                    work += self.flow.nodes[user].outputs
        return False

    def quotient(self) -> nx.DiGraph[str]:
        graph: nx.DiGraph[str] = nx.DiGraph()
        solid = [k for k in self.flow.nodes if k not in self.free]
        graph.add_nodes_from(solid)
        for k in solid:
            graph.add_edges_from((s, k) for s in self.sources(k))
        return graph

    def sources(self, k: str) -> list[str]:
        """Return the nodes that are not free whose outcome `k` reads, through free ones."""
        found: dict[str, None] = {}
        work = list(reversed(self.flow.nodes[k].inputs))
        while work:
            maker = self.flow.maker.get(work.pop().name)
            if maker in self.free:
                work += reversed(self.flow.nodes[maker].inputs)
            elif maker is not None:
                found[maker] = None
        return list(found)

    def regions(self) -> list[Region]:
        for k in [k for k in self.flow.nodes if k in self.work]:
            for source in sorted(self.sources(k), key=lambda s: -self.flow.order[s]):
                if source in self.work and self.region[source] != self.region[k]:
                    self.try_merge(self.region[source], self.region[k])
        return [self.made(r) for r in sorted(self.parts, key=lambda r: self.flow.order[r])]

    def try_merge(self, producer: str, consumer: str) -> None:
        if self.has_way_round(producer, consumer):
            return
        both = self.parts[producer] | self.parts[consumer]
        nodes = self.body(both)
        if not is_one_space(nodes, self.results(both)) or self.repeats_work(nodes, producer):
            return
        self.parts[producer] = both
        self.region.update(dict.fromkeys(self.parts.pop(consumer), producer))
        for other in list(self.between.predecessors(consumer)):
            if other != producer:
                self.between.add_edge(other, producer)
        for other in list(self.between.successors(consumer)):
            self.between.add_edge(producer, other)
        self.between.remove_node(consumer)

    def has_way_round(self, producer: str, consumer: str) -> bool:
        """Whether something outside depends on the producer and the consumer on it."""
        after = {n for n in self.between.successors(producer) if n != consumer}
        return any(nx.has_path(self.between, n, consumer) for n in after)

    def body(self, parts: Iterable[str]) -> list[Node]:
        """Return the nodes of a region in order, its free ones included."""
        members = set(parts)
        work = [v for k in members for v in self.flow.nodes[k].inputs]
        while work:
            maker = self.flow.maker.get(work.pop().name)
            if maker in self.free and maker not in members:
                members.add(maker)
                work += self.flow.nodes[maker].inputs
        return self.flow.sorted(anchors.without_edges(self.flow, members))

    def results(self, parts: set[str]) -> list[Value]:
        """Return the values that are read outside of the region of `parts`."""
        return [
            v
            for k in parts
            for v in self.flow.nodes[k].outputs
            if v.name in self.flow.outside or not self.read_within(v, parts)
        ]

    def read_within(self, value: Value, parts: set[str]) -> bool:
        """Whether all readers of a value, through free nodes, are in `parts`."""
        work = [value]
        while work:
            for user in self.flow.users[work.pop().name]:
                outputs = self.flow.nodes[user].outputs
                if user in self.free:
                    if any(v.name in self.flow.outside for v in outputs):
                        return False
                    work += outputs
                elif user not in parts:
                    return False
        return True

    def repeats_work(self, nodes: list[Node], producer: str) -> bool:
        """Whether costly work of the producer would be done again for many elements."""
        rows = region_rows(nodes)
        theirs = self.parts[producer]
        effort: dict[str, int] = {}
        handed: set[str] = set()  # what the producer makes, as the consumer sees it
        for node in nodes:
            own = key(node) in theirs
            size = nominal_numel(node.outputs[0].type.shape)
            for value in node.inputs:
                times = size // max(nominal_numel(value.type.shape), 1)
                if own or value.name not in handed or times < 2 or isinstance(node.op, Concat):
                    continue
                if effort[value.name] * (times - 1) > _REPEATED_WORK * times:
                    return True
            before = sum(effort.get(v.name, 0) for v in dict.fromkeys(node.inputs))
            views = isinstance(node.op, VIEWS) and any(v.name in handed for v in node.inputs)
            for value in node.outputs:
                hoisted = rows is not None and _is_per_row(value.type.shape, rows)
                effort[value.name] = 0 if hoisted else before + cost(node.op)
                if own or views:
                    handed.add(value.name)
        return False

    def made(self, region: str) -> Region:
        parts = self.parts[region]
        nodes = self.body(parts)
        owned = frozenset(parts)
        members = frozenset(map(key, nodes))
        return Region("loops", loops_hint(nodes), owned, members - owned)


def _is_per_row(shape: Shape, rows: Shape) -> bool:
    """Whether a value is one number for every row."""
    return shape[: len(rows)] == rows and all(d == 1 for d in shape[len(rows) :])
