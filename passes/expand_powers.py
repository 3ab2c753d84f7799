"""Powers with a small exponent that is known, as products."""

from __future__ import annotations

from ..ir.graph import Graph, Node, Value
from ..ir.ops.elementwise import Mul, Pow
from ..ir.rewrite import Builder, map_functions
from .matching import Producers, rewrite_locally


def expand_powers(graph: Graph) -> Graph:
    """Make `x^2` a product of two and `x^3` one of three.

    Before:
        %c: f32[] = literal() {dtype=f32, value=2.0}
        %y: f32[T] = pow(%x, %c)
    After:
        %y: f32[T] = mul(%x, %x)

    Numerics: reassociates (a product is rounded once, a power as the library does it).
    """
    return map_functions(graph, lambda function: rewrite_locally(function, _product))


def _product(node: Node, builder: Builder, producers: Producers) -> Value | None:
    if not isinstance(node.op, Pow):
        return None
    x, exponent = node.inputs
    if x.type != node.output.type or producers.number(exponent) not in (2, 3):
        return None
    if producers.number(exponent) == 2:
        return builder.emit(Mul(), x, x, name=node.output.name)
    return builder.emit(Mul(), builder.emit(Mul(), x, x), x, name=node.output.name)
