"""The names that generated code has: none is taken from outside as it is.

Sizes, inputs, parameters and kernels are called what a user or a checkpoint calls them: like a
word of C or Python, a macro of the C library, a function of ours, one another. So every one gets a
name of our own making that begins as no other in generated code does: `dim_` for sizes, `t_` for
buffers, `kernel_` for kernels. What follows is what can be kept of the name, for readers.

Graphs, kernel IR and the manifest keep the names as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import sympy

from ..errors import DiluError
from ..ir.graph import Function, Graph, Node, Slot, Value
from ..ir.types import Dim, TensorType, dim, symbol, symbols

_LONGEST = 60  # characters that are kept of a name: kernels' become names of files


def kernel_name(name: str) -> str:
    """Return what a kernel is called in generated code, if nothing else is called so."""
    return f"kernel_{_kept(name)}"


def plan_name(name: str) -> str:
    """Return what runs a function of a graph."""
    return f"run_{_kept(name)}"


def buffer_name(name: str, taken: Iterable[str] = ()) -> str:
    """Return what the buffer of a value is called; none of `taken`."""
    return _unlike(f"t_{_kept(name)}", taken)


def _kept(name: str) -> str:
    """Return the end of a name, where names of parameters differ, in letters that all can have."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)[-_LONGEST:]


def _unlike(name: str, taken: Iterable[str]) -> str:
    unique, count, others = name, 1, set(taken)
    while unique in others:
        count += 1
        unique = f"{name}_{count}"
    return unique


# ------------------------------------------------------------------------------- sizes


def with_own_sizes(graph: Graph) -> tuple[Graph, dict[str, str]]:
    """Return the graph with its symbols named for generated code, and what each was called."""
    names: dict[str, str] = {}
    for name in sorted(set().union(*map(_symbols_of, graph.functions))):
        names[_unlike(f"dim_{_kept(name)}", names)] = name
    change = {symbol(old): symbol(new) for new, old in names.items()}
    functions = tuple(_renamed(f, change) for f in graph.functions)
    return replace(graph, functions=functions), names


def with_users_names(error: DiluError, names: Mapping[str, str]) -> DiluError:
    """Return an error that calls sizes as the user does."""

    def known(text: str) -> str:
        return re.sub(r"\bdim_\w+", lambda m: names.get(m[0], m[0]), text)

    error.message = known(error.message)
    error.args = (error.message,)
    error.node = error.node and known(error.node)
    return error


_Change = dict[sympy.Symbol, sympy.Symbol]


def _symbols_of(function: Function) -> set[str]:
    values = [*function.inputs, *(v for n in function.nodes for v in n.outputs)]
    found = {s for v in values for s in symbols(v.type.shape)}
    found.update(symbols(slot.size for slot in function.arena))
    for node in function.nodes:
        for attribute in node.op.attributes().values():
            if isinstance(attribute, Function):
                found |= _symbols_of(attribute)
            else:
                listed = attribute if isinstance(attribute, tuple) else (attribute,)
                found.update(symbols(a for a in listed if isinstance(a, sympy.Expr)))
    return found


def _renamed(function: Function, change: _Change) -> Function:
    """Return a function with other symbols, in the bodies inside it, too."""

    def size(value: Dim) -> Dim:
        return value if isinstance(value, int) else dim(cast(sympy.Expr, value.xreplace(change)))

    def values(vs: tuple[Value, ...]) -> tuple[Value, ...]:
        types = (TensorType(v.type.dtype, tuple(map(size, v.type.shape))) for v in vs)
        return tuple(Value(v.name, t) for v, t in zip(vs, types, strict=True))

    def attribute(value: Any) -> Any:
        if isinstance(value, Function):
            return _renamed(value, change)
        if isinstance(value, tuple):
            return tuple(attribute(v) for v in value)
        return size(value) if isinstance(value, sympy.Expr) else value

    def node(n: Node) -> Node:
        op = n.op.changed(**{k: attribute(v) for k, v in n.op.attributes().items()})
        return Node(op, values(n.inputs), values(n.outputs), n.loc)

    return Function(
        function.name,
        values(function.parameters),
        values(function.states),
        values(function.constants),
        tuple(map(node, function.nodes)),
        values(function.results),
        values(function.updates),
        tuple(Slot(size(s.size), s.values) for s in function.arena),
    )
