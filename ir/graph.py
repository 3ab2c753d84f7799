"""The graph: SSA values, immutable nodes, functions and the graph that holds them.

A function has parameters, states (caches, updated in place), constants (weights) and results.
`updates` names, for every state, the value that is its content when the function returns.
Ops with a body (`call`, `kernel`) hold it as a `Function` attribute, so that a node is complete
in itself. Only `rewrite.py` makes changed graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from ..errors import Loc
from .mesh import Mesh
from .op import Op
from .types import Dim, TensorType
from .weights import Weight


@dataclass(frozen=True, slots=True)
class Value:
    """A name, unique in its function, and a type."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Node:
    """One application of an op. `loc` is the user's source line and no part of equality."""

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    loc: Loc | None = field(default=None, compare=False)

    @property
    def output(self) -> Value:
        """The only output."""
        (value,) = self.outputs
        return value


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of the arena: its size in bytes and the values that lie in it, one after another."""

    size: Dim
    values: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A list of nodes in order of execution."""

    name: str
    parameters: tuple[Value, ...]
    states: tuple[Value, ...] = ()
    constants: tuple[Value, ...] = ()
    nodes: tuple[Node, ...] = ()
    results: tuple[Value, ...] = ()
    updates: tuple[Value, ...] = ()
    arena: tuple[Slot, ...] = ()

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Everything that comes from outside, in the order of a `call`'s operands."""
        return self.parameters + self.states + self.constants

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What a `call` returns: results, then the updated states."""
        return self.results + self.updates

    def producers(self) -> dict[str, Node]:
        """Return the node that makes each value, by the value's name."""
        return {v.name: n for n in self.nodes for v in n.outputs}

    def users(self) -> dict[str, list[Node]]:
        """Return the nodes that read each value, by the value's name (none for unused values)."""
        table: dict[str, list[Node]] = {v.name: [] for v in self.inputs}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                table[value.name].append(node)
            table.update({v.name: [] for v in node.outputs})
        return table

    def bodies(self) -> Iterator[Function]:
        """Yield the bodies of this function's nodes."""
        for node in self.nodes:
            for f in fields(node.op):  # type: ignore[arg-type]
                value = getattr(node.op, f.name)
                if isinstance(value, Function):
                    yield value


@dataclass(frozen=True)
class Graph:
    """The functions of a program, what is true of them, and where their constants come from.

    `weights` binds the constants of the functions by name; it is no part of equality, since the
    text form does not carry it. A graph with a `mesh` is run by all its ranks together.
    """

    stage: str
    functions: tuple[Function, ...]
    weights: Mapping[str, Weight] = field(default_factory=dict, compare=False, repr=False)
    mesh: Mesh | None = None

    def function(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)
