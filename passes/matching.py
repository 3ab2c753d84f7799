"""What several rewrites ask about a node's inputs while a function is being rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ..ir.graph import Function, Node, Value
from ..ir.op import Op
from ..ir.ops.elementwise import Literal
from ..ir.ops.index import BroadcastTo, Reshape
from ..ir.rewrite import Builder, rewrite_nodes

Number = float | int | bool


class Producers:
    """The nodes that made the values of a function under rewriting, new ones included."""

    def __init__(self, function: Function) -> None:
        self._known: dict[str, Node] = {}
        self._seen = 0
        reads = [v.name for n in function.nodes for v in n.inputs]
        self._reads = Counter(reads + [v.name for v in function.outputs])

    def follow(self, builder: Builder) -> None:
        """Take note of the nodes that were added since the last time."""
        for node in builder.nodes[self._seen :]:
            self._known.update((v.name, node) for v in node.outputs)
        self._seen = len(builder.nodes)

    def of(self, value: Value) -> Node | None:
        return self._known.get(value.name)

    def made_by(self, value: Value, op: type[Op]) -> Node | None:
        """Return the node that makes `value` when its op is `op`."""
        node = self._known.get(value.name)
        return node if node is not None and isinstance(node.op, op) else None

    def readers(self, value: Value) -> int:
        """Return how often a value was read before the rewriting; 0 for new ones."""
        return self._reads[value.name]

    def literal(self, value: Value) -> Value | None:
        """Return the scalar literal that `value` is a view of."""
        node = self._known.get(value.name)
        while node is not None and isinstance(node.op, (BroadcastTo, Reshape)):
            value = node.inputs[0]
            node = self._known.get(value.name)
        return value if node is not None and isinstance(node.op, Literal) else None

    def number(self, value: Value) -> Number | None:
        """Return the number that every element of `value` is, when it is known."""
        found = self.literal(value)
        if found is None:
            return None
        op = self._known[found.name].op
        assert isinstance(op, Literal)
        return op.value


#: A rule that may ask where the inputs of a node come from.
LocalRule = Callable[[Node, Builder, Producers], "Value | None"]

_ROUNDS = 8  # a rule that finds no end is a defect; what a round leaves is still correct


def rewrite_locally(function: Function, rule: LocalRule) -> Function:
    """Apply `rule` to every node, again and again until nothing changes."""
    for _ in range(_ROUNDS):
        producers = Producers(function)

        def one(node: Node, builder: Builder, producers: Producers = producers) -> Value | None:
            producers.follow(builder)
            return rule(node, builder, producers)

        changed = rewrite_nodes(function, one)
        if changed == function:
            break
        function = changed
    return function
