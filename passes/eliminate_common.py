"""Common subexpressions."""

from __future__ import annotations

from ..ir.graph import Function, Graph, Node, Value
from ..ir.ops.control import Kernel, Subprogram
from ..ir.rewrite import Builder, map_functions, rewrite_nodes


def eliminate_common(graph: Graph) -> Graph:
    """Compute once what is computed twice from the same inputs.

    Before:
        %a: f32[T] = exp(%x)
        %b: f32[T] = exp(%x)
        %c: f32[T] = add(%a, %b)
    After:
        %a: f32[T] = exp(%x)
        %c: f32[T] = add(%a, %a)

    Numerics: exact.
    """
    return map_functions(graph, _once)


def _once(function: Function) -> Function:
    seen: dict[object, tuple[Value, ...]] = {}

    def rule(node: Node, _builder: Builder) -> tuple[Value, ...] | None:
        if isinstance(node.op, (Subprogram, Kernel)) or node.op.updates is not None:
            return None
        # The text of an attribute tells 0.0 from -0.0, and 1 from 1.0 and true.
        attributes = repr(node.op.attributes())
        key = node.op.name, attributes, tuple(v.name for v in node.inputs)
        if key in seen:
            return seen[key]
        seen[key] = node.outputs
        return None

    return rewrite_nodes(function, rule)
