"""Routed experts with the work around them."""

from __future__ import annotations

from ..ir.graph import Function, Graph, Node
from ..ir.ops.elementwise import Cast
from ..ir.ops.language import Experts
from ..ir.rewrite import map_functions
from . import anchors
from .hints import product_hint
from .regions import Dataflow, Region, cut_out, key


def fuse_experts(graph: Graph) -> Graph:
    """Make one kernel of routed experts, how their weights become numbers, and what follows.

    Before:
        %wide: f32[E,2,I,H] = decode(%codes) {dtype=f32, format=f8e4m3}
        %gate_up: f32[E,2,I,H] = dequantize(%wide, %scales) {block=[128, 128], dtype=f32}
        %routed: f32[T,H] = experts(%x, %indices, %weights, %gate_up, %down)
        %both: f32[T,H] = add(%routed, %shared)
        %y: f32[T,H] = add(%residual, %both)
    After:
        %y: f32[T,H] = kernel(%x, %indices, %weights, %codes, %scales, …, %shared, %residual)
            {body=…, kind="experts"}

    Numerics: exact.
    """
    return map_functions(graph, _fused)


def _fused(function: Function) -> Function:
    while True:
        flow = Dataflow(function)
        node = next((n for n in function.nodes if isinstance(n.op, Experts)), None)
        if node is None:
            return function
        function = cut_out(function, [_region(flow, node)])


def _region(flow: Dataflow, node: Node) -> Region:
    tail = anchors.after(flow, [node], node.output.type.shape) or []
    owned = {key(node), *tail}
    cloned = anchors.beside(flow, owned)
    for weight in node.inputs[3:]:
        cloned |= {key(n) for n in anchors.weight_chain(flow, weight) or ()}
    prologue, free = anchors.before(flow, node.inputs[0], {key(node)}, ops=(Cast,))
    hint = product_hint(flow, "experts", prologue, tail)
    members = anchors.without_edges(flow, owned | prologue | cloned | free)
    owned = (owned | prologue) & members
    return Region("experts", hint, frozenset(owned), frozenset(members - owned))
