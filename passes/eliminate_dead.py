"""What nobody reads."""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Function, Graph, Node
from ..ir.ops.control import Subprogram


def eliminate_dead(graph: Graph) -> Graph:
    """Drop nodes and constants that no result depends on, in bodies of calls too.

    Parameters, states and results stay: they are the function's interface. So do a call's
    parameters and results; a constant that its body does not read goes, with its operand.

    Before:
        func @f(%x: f32[T]) const(%w: f32[8]) {
          %a: f32[T] = exp(%x)
          return %x
        }
    After:
        func @f(%x: f32[T]) {
          return %x
        }

    Numerics: exact.
    """
    functions = tuple(live_part(f) for f in graph.functions)
    read = {c.name for f in functions for c in f.constants}
    weights = {name: w for name, w in graph.weights.items() if name in read}
    return replace(graph, functions=functions, weights=weights)


def live_part(function: Function) -> Function:
    """Return a function without the nodes and constants that its outputs do not depend on."""
    live = {v.name for v in function.outputs}
    nodes: list[Node] = []
    for node in reversed(function.nodes):
        if not any(v.name in live for v in node.outputs):
            continue
        if isinstance(node.op, Subprogram):
            node = _live_call(node, node.op)
        nodes.append(node)
        live |= {v.name for v in node.inputs}
    return replace(
        function,
        nodes=tuple(reversed(nodes)),
        constants=tuple(c for c in function.constants if c.name in live),
    )


def _live_call(node: Node, call: Subprogram) -> Node:
    body = live_part(call.body)
    kept = set(body.inputs)
    own, weights = node.inputs[: call.own], node.inputs[call.own :]
    pairs = zip(weights, call.body.states + call.body.constants, strict=True)
    inputs = (*own, *(operand for operand, inside in pairs if inside in kept))
    return replace(node, op=call.changed(body=body), inputs=inputs)
