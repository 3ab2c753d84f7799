"""Cache updates with the work on what they store."""

from __future__ import annotations

from ..ir.graph import Function, Graph, Node
from ..ir.ops.elementwise import Literal
from ..ir.ops.index import BroadcastTo, Concat, Reshape, Slice
from ..ir.ops.language import CacheUpdate
from ..ir.rewrite import map_functions
from . import anchors
from .loop_ops import ELEMENTWISE
from .regions import Dataflow, Region, cut_out, key

_BEFORE = (*ELEMENTWISE, Reshape, BroadcastTo, Literal, Slice, Concat)


def fuse_updates(graph: Graph) -> Graph:
    """Make one kernel of a cache update and the elementwise work on its values.

    What depends on a reduction stays outside: there it is one loop nest with the reduction.

    Before:
        %b: bf16[T,H,D] = cast(%k) {dtype=bf16}
        %new: bf16[B,H,G,D] = cache_update(%keys, %b, %slots)
    After:
        %new: bf16[B,H,G,D] = kernel(%k, %slots, %keys) {body=…, kind="cache_update"}

    Numerics: exact.
    """
    return map_functions(graph, _fused)


def _fused(function: Function) -> Function:
    while True:
        flow = Dataflow(function)
        node = next((n for n in function.nodes if isinstance(n.op, CacheUpdate)), None)
        if node is None:
            return function
        function = cut_out(function, [_region(flow, node)])


def _region(flow: Dataflow, node: Node) -> Region:
    owned, cloned = anchors.before(
        flow, node.inputs[1], {key(node)}, ops=_BEFORE, without=anchors.behind_reductions(flow)
    )
    members = anchors.without_edges(flow, owned | cloned | {key(node)})
    rope = any(isinstance(flow.nodes[k].op, Concat) for k in members)
    owned = (owned | {key(node)}) & members
    hint = "rope_cache_update" if rope else "cache_update"
    return Region("cache_update", hint, frozenset(owned), frozenset(members - owned))
