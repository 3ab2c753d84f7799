"""Regions that grow around one op: the work before its operands, and the work on its outcome."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ..ir.graph import Node, Value
from ..ir.op import Op
from ..ir.ops.elementwise import Cast, Literal
from ..ir.ops.index import BroadcastTo, Reshape, Slice, Transpose
from ..ir.ops.matmul import MatMul
from ..ir.ops.quantize import Decode, Dequantize
from ..ir.types import Shape
from .loop_ops import ELEMENTWISE, LOOP_OPS, REDUCTIONS, is_free
from .regions import Dataflow, key

_SIDE = (Literal, BroadcastTo, Cast, Reshape)


def weight_chain(flow: Dataflow, value: Value) -> list[Node] | None:
    """Return the nodes between a weight and the operand it is for, last one first.

    A chain is [decode → dequantize | cast]? → [reshape → slice]?. Its nodes are always cloned: a
    weight in wide numbers never exists in memory. None when `value` is no weight, or reached in
    another way.
    """
    chain: list[Node] = []
    node = flow.made_by(value)
    if node is not None and isinstance(node.op, Slice) and node.op.axis == 1:
        inner = flow.made_by(node.inputs[0])
        if inner is not None and isinstance(inner.op, Reshape) and inner.output.type.rank == 3:
            chain += [node, inner]
            value = inner.inputs[0]
    node = flow.made_by(value)
    if node is not None and isinstance(node.op, Dequantize):
        chain.append(node)
        for operand in node.inputs:
            inner = flow.made_by(operand)
            if inner is not None and isinstance(inner.op, (Decode, Cast)):
                chain.append(inner)
    elif node is not None and isinstance(node.op, (Cast, Decode)):
        chain.append(node)
    constants = set(flow.function.constants)
    inside = {v.name for n in chain for v in n.outputs}
    leaves = [v for n in chain for v in n.inputs if v.name not in inside] or [value]
    return chain if all(leaf in constants for leaf in leaves) else None


def formats(chain: Sequence[Node]) -> list[object]:
    """Return what two chains must have in common for one kernel to read both weights."""
    return [(n.op, tuple(v.type for v in n.inputs)) for n in chain]


def before(
    flow: Dataflow,
    value: Value,
    inside: Collection[str],
    *,
    ops: tuple[type[Op], ...] = LOOP_OPS,
    without: Collection[str] = (),
) -> tuple[set[str], set[str]]:
    """Return the nodes to own and to clone of the work that makes `value` for nodes `inside`.

    Owned are those whose outcome nobody else reads; cloned, those whose work is free.
    """
    owned: set[str] = set()
    cloned: set[str] = set()
    needed = {value.name}
    for k in reversed(flow.nodes):
        node = flow.nodes[k]
        if k in without or not needed & {v.name for v in node.outputs}:
            continue
        if not isinstance(node.op, ops):
            continue
        if flow.stays_in(node, {*inside, *owned, *cloned}) and not _kept_by(flow, node, cloned):
            owned.add(k)
        elif is_free(node):
            cloned.add(k)
        else:
            continue
        needed |= {v.name for v in node.inputs}
    return owned, cloned


def _kept_by(flow: Dataflow, node: Node, cloned: Collection[str]) -> bool:
    """Whether a cloned node reads `node`: its original stays behind, and needs it there."""
    return any(u in cloned for v in node.outputs for u in flow.users[v.name])


def behind_reductions(flow: Dataflow) -> set[str]:
    """Return the reductions and what depends on one through loops alone."""
    behind: set[str] = set()
    for k, node in flow.nodes.items():
        reached = any(flow.maker.get(v.name) in behind for v in node.inputs)
        if isinstance(node.op, REDUCTIONS) or (reached and isinstance(node.op, LOOP_OPS)):
            behind.add(k)
    return behind


def after(
    flow: Dataflow, anchors: Sequence[Node], shape: Shape, inside: Collection[str] = ()
) -> list[str] | None:
    """Return the elementwise nodes to own of the work on the anchors' outcomes, in order.

    It is as much as leaves one value that is read elsewhere. None when there is no such
    value (which can only be with several anchors).
    """
    start = [key(a) for a in anchors]
    behind = flow.after(start)
    grown: list[str] = []
    reach = set(start)
    for k, node in flow.nodes.items():
        if k not in behind or not isinstance(node.op, ELEMENTWISE):
            continue
        fits = node.output.type.shape == shape
        makers = [flow.maker.get(v.name) for v in node.inputs]
        if fits and all(m is None or m in reach or m not in behind for m in makers):
            grown.append(k)
            reach.add(k)
    for last in [*reversed(grown), *(start if len(start) == 1 else ())]:
        if last not in start and _is_left_to_readers(flow, flow.nodes[last]):
            continue
        taken = _towards(flow, last, reach)
        if not all(a in taken for a in start):
            continue
        others = taken - {last}
        if all(flow.stays_in(flow.nodes[k], {*taken, *inside}) for k in others):
            return [k for k in grown if k in taken]
    return None


def _is_left_to_readers(flow: Dataflow, node: Node) -> bool:
    """Whether a node only widens what its readers can widen themselves."""
    readers = [flow.nodes[u] for v in node.outputs for u in flow.users[v.name]]
    open_to_it = all(isinstance(r.op, (MatMul, *LOOP_OPS)) for r in readers)
    return is_free(node) and open_to_it and flow.outside.isdisjoint(v.name for v in node.outputs)


def _towards(flow: Dataflow, last: str, reach: set[str]) -> set[str]:
    """Return the nodes of `reach` that `last` depends on, with itself."""
    taken: set[str] = set()
    work = [last]
    while work:
        k = work.pop()
        if k in reach and k not in taken:
            taken.add(k)
            makers = (flow.maker.get(v.name) for v in flow.nodes[k].inputs)
            work += [m for m in makers if m is not None]
    return taken


def beside(flow: Dataflow, nodes: Collection[str]) -> set[str]:
    """Return the nodes to clone that bring other operands of `nodes` into shape."""
    cloned: set[str] = set()
    work = [v for k in nodes for v in flow.nodes[k].inputs]
    while work:
        node = flow.made_by(work.pop())
        if node is None or key(node) in nodes or key(node) in cloned:
            continue
        if isinstance(node.op, _SIDE) and is_free(node):
            cloned.add(key(node))
            work += node.inputs
    return cloned


def permuted(flow: Dataflow, last: Node, absorbs: Callable[[Node], bool]) -> list[str]:
    """Return [reshape]* → transpose behind `last` when no reader of it can read it transposed.

    `absorbs` says whether a reader takes its operand in any order of axes.
    """
    taken: list[str] = []
    node = last
    while True:
        (value,) = node.outputs
        readers = flow.users[value.name]
        if value.name in flow.outside or len(readers) != 1:
            return []
        node = flow.nodes[readers[0]]
        if not isinstance(node.op, (Reshape, Transpose)):
            return []
        taken.append(key(node))
        if isinstance(node.op, Transpose):
            break
    work = [node.output]
    while work:
        value = work.pop()
        for reader in (flow.nodes[u] for u in flow.users[value.name]):
            if isinstance(reader.op, Reshape):
                work.append(reader.output)
            elif absorbs(reader):
                return []
    return taken


def without_edges(flow: Dataflow, members: Collection[str]) -> set[str]:
    """Return `members` without reshapes at their edge: outside, a reshape costs nothing.

    Reshapes of constants stay: how a weight is read is the kernel's own business.
    """
    constants = {c.name for c in flow.function.constants}
    kept = set(members)
    changed = True
    while changed:
        changed = False
        for node in flow.sorted(kept):
            if not isinstance(node.op, Reshape):
                continue
            source = node.inputs[0].name
            if source not in constants and flow.maker.get(source) not in kept:
                kept.discard(key(node))
                changed = True
    return kept
