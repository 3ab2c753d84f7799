"""Regions of a function that become kernels: its dataflow, and cutting regions out of it.

A region owns nodes, which leave the function, and may clone others, which stay for whoever else
reads them. Nodes go by the name of their first output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from ..ir.graph import Function, Node, Value
from ..ir.ops.control import Kernel
from .eliminate_dead import live_part


def key(node: Node) -> str:
    """Return what a node goes by in its function."""
    return node.outputs[0].name


@dataclass(frozen=True)
class Region:
    """Nodes that become one kernel of `kind`; `hint` is a readable part of its name."""

    kind: str
    hint: str
    owned: frozenset[str]
    cloned: frozenset[str] = frozenset()

    @property
    def members(self) -> frozenset[str]:
        return self.owned | self.cloned


class Dataflow:
    """Who makes and who reads every value of a function."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.nodes = {key(n): n for n in function.nodes}
        self.order = {k: i for i, k in enumerate(self.nodes)}
        self.maker = {v.name: key(n) for n in function.nodes for v in n.outputs}
        self.users: dict[str, list[str]] = {v.name: [] for v in function.inputs}
        self.users.update({name: [] for name in self.maker})
        self.outside = {v.name for v in function.outputs}
        self.graph: nx.DiGraph[str] = nx.DiGraph()
        self.graph.add_nodes_from(self.nodes)
        for k, node in self.nodes.items():
            for value in dict.fromkeys(node.inputs):
                self.users[value.name].append(k)
                if value.name in self.maker:
                    self.graph.add_edge(self.maker[value.name], k)

    def made_by(self, value: Value) -> Node | None:
        """Return the node that makes a value; None for what comes from outside."""
        maker = self.maker.get(value.name)
        return self.nodes[maker] if maker is not None else None

    def after(self, keys: Iterable[str]) -> set[str]:
        """Return the nodes that depend on any of `keys`."""
        return {d for k in keys for d in nx.descendants(self.graph, k)}

    def stays_in(self, node: Node, inside: Collection[str]) -> bool:
        """Whether nothing but nodes `inside` reads what `node` makes."""
        return all(
            v.name not in self.outside and all(u in inside for u in self.users[v.name])
            for v in node.outputs
        )

    def sorted(self, keys: Collection[str]) -> list[Node]:
        """Return nodes in order of execution."""
        return [self.nodes[k] for k in sorted(keys, key=self.order.__getitem__)]


def reads(nodes: Sequence[Node]) -> list[Value]:
    """Return what nodes read that none of them makes, in order of first use."""
    made = {v.name for n in nodes for v in n.outputs}
    return list(dict.fromkeys(v for n in nodes for v in n.inputs if v.name not in made))


def cut_out(function: Function, regions: Sequence[Region]) -> Function:
    """Return `function` with every region replaced by a kernel.

    The kernels stand where the last of their nodes stood, so that the order changes little.
    """
    flow = Dataflow(function)
    owner = {k: i for i, r in enumerate(regions) for k in r.owned}
    members = [flow.sorted(r.members) for r in regions]
    wanted = _wanted(flow, owner, [reads(m) for m in members])
    kernels = [
        _kernel(r, [n for n in m if key(n) in r.owned], m, wanted)
        for r, m in zip(regions, members, strict=True)
    ]
    units: list[tuple[int, Node]] = [
        (max(flow.order[k] for k in r.owned), kernel)
        for r, kernel in zip(regions, kernels, strict=True)
        if kernel is not None
    ]
    units += [(flow.order[k], n) for k, n in flow.nodes.items() if k not in owner]
    units.sort(key=lambda unit: unit[0])
    return live_part(replace(function, nodes=_in_order([n for _, n in units])))


def _wanted(
    flow: Dataflow, owner: dict[str, int], parameters: Sequence[Sequence[Value]]
) -> set[str]:
    """Return the names of all values that the function or any kernel in it reads."""
    wanted: set[str] = set()
    work = [v.name for v in flow.function.outputs]
    while work:
        name = work.pop()
        if name in wanted:
            continue
        wanted.add(name)
        maker = flow.maker.get(name)
        if maker is None:
            continue
        inputs = parameters[owner[maker]] if maker in owner else flow.nodes[maker].inputs
        work += [v.name for v in inputs]
    return wanted


def _kernel(
    region: Region, owned: list[Node], members: list[Node], wanted: set[str]
) -> Node | None:
    """Return the kernel of a region, or None when nobody reads what it makes."""
    results = tuple(v for n in owned for v in n.outputs if v.name in wanted)
    if not results:
        return None
    states = [n.inputs[n.op.updates] for n in members if n.op.updates is not None]
    updates = tuple(v for n in members if n.op.updates is not None for v in n.outputs)
    body = live_part(
        Function(
            region.hint,
            parameters=tuple(v for v in reads(members) if v not in states),
            states=tuple(states),
            nodes=tuple(members),
            results=tuple(v for v in results if v not in updates),
            updates=updates,
        )
    )
    used = set(reads(body.nodes))
    body = replace(body, parameters=tuple(v for v in body.parameters if v in used))
    loc = next((n.loc for n in reversed(owned) if n.loc is not None), None)
    return Node(Kernel(region.kind, body), body.inputs, body.outputs, loc)


def _in_order(nodes: list[Node]) -> tuple[Node, ...]:
    """Sort nodes so that values are made before they are read, changing as little as possible."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(nodes)))
    maker = {v.name: i for i, n in enumerate(nodes) for v in n.outputs}
    graph.add_edges_from(
        (maker[v.name], i) for i, n in enumerate(nodes) for v in n.inputs if v.name in maker
    )
    return tuple(nodes[i] for i in nx.lexicographical_topological_sort(graph))
