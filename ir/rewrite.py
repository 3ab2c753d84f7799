"""Making changed graphs: a builder with fresh names, and maps over nodes and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..errors import Loc
from .dtypes import DType
from .graph import Function, Graph, Node, Value
from .op import Op
from .ops.control import Subprogram
from .ops.elementwise import Literal


@dataclass
class Builder:
    """Collects nodes in order, inferring types and giving fresh names."""

    names: set[str] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    loc: Loc | None = None
    _counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def over(cls, function: Function) -> Builder:
        """Return a builder whose names do not clash with those of `function`."""
        taken = {v.name for v in function.inputs}
        return cls(taken | {v.name for n in function.nodes for v in n.outputs})

    def fresh(self, base: str) -> str:
        """Return a name that nothing has yet: `base`, or `base_1`, `base_2`, …"""
        name, count = base, self._counts.get(base, 0)
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self._counts[base] = count
        self.names.add(name)
        return name

    def add(self, op: Op, *inputs: Value, name: str | None = None) -> tuple[Value, ...]:
        """Append a node; return its outputs."""
        types = op.infer(*(v.type for v in inputs))
        outputs = tuple(Value(self.fresh(name or op.name), t) for t in types)
        self.nodes.append(Node(op, inputs, outputs, self.loc))
        return outputs

    def emit(self, op: Op, *inputs: Value, name: str | None = None) -> Value:
        """Append a node with one output; return it."""
        (value,) = self.add(op, *inputs, name=name)
        return value

    def literal(self, value: float | int | bool, dtype: DType) -> Value:
        """Append a scalar literal."""
        kind = float if dtype.is_float else bool if dtype.kind == "bool" else int
        return self.emit(Literal(kind(value), dtype), name="c")

    def keep(self, node: Node, subst: Mapping[Value, Value]) -> None:
        """Append `node` as it is, with its inputs substituted."""
        self.nodes.append(replace(node, inputs=substituted(node.inputs, subst)))


def substituted(values: Iterable[Value], subst: Mapping[Value, Value]) -> tuple[Value, ...]:
    """Return `values` with each replaced by what `subst` says, through chains."""

    def final(value: Value) -> Value:
        while value in subst:
            value = subst[value]
        return value

    return tuple(final(v) for v in values)


#: What a rewrite says about a node: None keeps it; otherwise the values that replace its outputs.
Rule = Callable[[Node, Builder], "tuple[Value, ...] | Value | None"]


def rewrite_nodes(function: Function, rule: Rule) -> Function:
    """Return `function` with `rule` applied to every node in order.

    The rule sees nodes whose inputs are substituted already, and emits replacements through the
    builder, which carries the node's source location. The names of the node's outputs are free
    for what replaces them.
    """
    builder = Builder.over(function)
    subst: dict[Value, Value] = {}
    for node in function.nodes:
        node = replace(node, inputs=substituted(node.inputs, subst))
        builder.loc = node.loc
        names = {v.name for v in node.outputs}
        builder.names -= names
        new = rule(node, builder)
        if new is None:
            builder.names |= names
            builder.nodes.append(node)
        else:
            values = new if isinstance(new, tuple) else (new,)
            pairs = zip(node.outputs, values, strict=True)
            subst.update((old, value) for old, value in pairs if old != value)
    return replace(
        function,
        nodes=tuple(builder.nodes),
        results=substituted(function.results, subst),
        updates=substituted(function.updates, subst),
    )


def map_functions(graph: Graph, change: Callable[[Function], Function]) -> Graph:
    """Return `graph` with `change` applied to every function, bodies of calls first."""

    def deep(function: Function) -> Function:
        nodes = tuple(
            replace(n, op=n.op.changed(body=deep(n.op.body))) if isinstance(n.op, Subprogram) else n
            for n in function.nodes
        )
        return change(function if nodes == function.nodes else replace(function, nodes=nodes))

    return replace(graph, functions=tuple(deep(f) for f in graph.functions))
