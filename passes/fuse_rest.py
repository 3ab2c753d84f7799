"""Kernels of single ops for what no other fusion took, and the kernels' names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..errors import UnsupportedError
from ..ir.graph import Function, Graph, Node
from ..ir.ops.collective import Collective
from ..ir.ops.control import Kernel, Subprogram
from ..ir.ops.index import Reshape
from ..ir.ops.language import Attention, CacheUpdate, Experts
from ..ir.ops.matmul import MatMul
from ..ir.ops.reduce import TopK
from ..ir.rewrite import map_functions
from .loop_ops import LOOP_OPS
from .regions import Region, cut_out, key


def fuse_rest(graph: Graph) -> Graph:
    """Make a kernel of every op that is in none yet, and name all kernels after their place.

    Before:
        %v: f32[T,4], %i: i64[T,4] = topk(%x) {k=4}
    After:
        %v: f32[T,4], %i: i64[T,4] = kernel(%x) {body=func @main_0_topk…, kind="topk"}

    Numerics: exact.
    """
    fused = map_functions(graph, _single)
    taken: set[str] = set()
    return replace(map_functions(fused, lambda f: _named(f, taken)), stage="fused")


def _single(function: Function) -> Function:
    regions = [
        Region(_kind(n), n.op.name, frozenset({key(n)}))
        for n in function.nodes
        if not isinstance(n.op, (Kernel, Subprogram, Collective, Reshape))
    ]
    return cut_out(function, regions) if regions else function


def _kind(node: Node) -> str:
    if isinstance(node.op, (Attention, CacheUpdate, Experts, MatMul, TopK)):
        return node.op.name
    if isinstance(node.op, LOOP_OPS):
        return "loops"
    raise UnsupportedError(f"there is no kernel for op {node.op.name}", loc=node.loc)


def _named(function: Function, taken: set[str]) -> Function:
    """Name every kernel `<function>_<place>_<hint>`, unique in the graph."""

    def nodes() -> Iterator[Node]:
        place = 0
        for node in function.nodes:
            if isinstance(node.op, Kernel):
                body = node.op.body
                name = _fresh(f"{function.name}_{place}_{body.name}", taken)
                node = replace(node, op=replace(node.op, body=replace(body, name=name)))
                place += 1
            yield node

    return replace(function, nodes=tuple(nodes()))


def _fresh(name: str, taken: set[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique
