"""Matrix products with the work around them."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.graph import Function, Graph, Node
from ..ir.ops.index import Reshape, Transpose
from ..ir.ops.matmul import MatMul
from ..ir.rewrite import map_functions
from . import anchors
from .hints import product_hint, weight_hint
from .loop_ops import LOOP_OPS, REDUCTIONS, is_one_space, region_rows
from .regions import Dataflow, Region, cut_out, key


def fuse_matmul(graph: Graph) -> Graph:
    """Make one kernel of a matrix product and what is next to it.

    Into it go: how its weight becomes numbers (always, so that a weight in wide numbers never
    exists); the work before its left operand, such as a norm, when nobody else reads that; a
    second product of the same operand that its outcome is combined with (gate and up); and bias,
    activation and residual after it.

    Before:
        %wide: f32[N,K] = decode(%codes) {dtype=f32, format=f8e4m3}
        %w: f32[N,K] = dequantize(%wide, %scales) {block=[128, 128], dtype=f32}
        %p: f32[T,N] = matmul(%x, %w) {transpose_b=true}
        %y: f32[T,N] = add(%residual, %p)
    After:
        %y: f32[T,N] = kernel(%x, %codes, %scales, %residual) {body=…, kind="matmul"}

    Numerics: exact.
    """
    return map_functions(graph, _fused)


def _fused(function: Function) -> Function:
    while True:
        flow = Dataflow(function)
        node = next((n for n in function.nodes if isinstance(n.op, MatMul)), None)
        if node is None:
            return function
        function = cut_out(function, [_region(flow, node)])


def _region(flow: Dataflow, node: Node) -> Region:
    products, tail = _products(flow, node)
    owned = {key(p) for p in products} | set(tail)
    cloned = anchors.beside(flow, owned)
    last = flow.sorted(owned)[-1]
    owned |= set(anchors.permuted(flow, last, lambda n: isinstance(n.op, (MatMul, *LOOP_OPS))))
    for product in products:
        cloned |= _weight(flow, product)
    prologue, views = _prologue(flow, node, {key(p) for p in products})
    core = weight_hint(flow, [p.inputs[1] for p in products])
    hint = product_hint(flow, core, prologue, tail)
    members = anchors.without_edges(flow, owned | prologue | cloned | views)
    owned = (owned | prologue) & members
    return Region("matmul", hint, frozenset(owned), frozenset(members - owned))


def _products(flow: Dataflow, node: Node) -> tuple[list[Node], list[str]]:
    """Return the one or two products of a region, and the elementwise work on them."""
    shape = node.output.type.shape
    chain = anchors.weight_chain(flow, node.inputs[1])
    for other in map(flow.nodes.__getitem__, flow.users[node.inputs[0].name]):
        if other is node or other.op != node.op or other.inputs[0] != node.inputs[0]:
            continue
        if other.inputs[1].type != node.inputs[1].type or key(other) in flow.after([key(node)]):
            continue
        theirs = anchors.weight_chain(flow, other.inputs[1])
        if chain is None or theirs is None or not _alike(chain, theirs):
            continue
        tail = anchors.after(flow, [node, other], shape)
        if tail is not None:
            return sorted([node, other], key=lambda n: flow.order[key(n)]), tail
    tail = anchors.after(flow, [node], shape)
    return [node], tail or []


def _alike(a: Sequence[Node], b: Sequence[Node]) -> bool:
    return anchors.formats(a) == anchors.formats(b)


def _weight(flow: Dataflow, product: Node) -> set[str]:
    """Return the nodes to clone that make the right operand."""
    chain = anchors.weight_chain(flow, product.inputs[1])
    if chain is not None:
        return {key(n) for n in chain}
    owned, cloned = anchors.before(
        flow, product.inputs[1], {key(product)}, ops=(Reshape, Transpose)
    )
    return owned | cloned


def _prologue(flow: Dataflow, node: Node, inside: set[str]) -> tuple[set[str], set[str]]:
    """Return the nodes to own and to clone that make the left operand."""
    a = node.inputs[0]
    owned, cloned = anchors.before(flow, a, inside)
    nodes = flow.sorted(owned | cloned)
    reductions = [n for n in nodes if isinstance(n.op, REDUCTIONS)]
    if not reductions:
        return owned, cloned
    rows = region_rows(nodes)
    one = len(reductions) == 1 and rows is not None and is_one_space(nodes, [a])
    if one and rows == a.type.shape[:-1] and reductions[0].inputs[0].type.shape == a.type.shape:
        return owned, cloned
    return anchors.before(flow, a, inside, without=anchors.behind_reductions(flow))
