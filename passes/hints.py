"""Readable names for kernels, from the ops in them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ..ir.graph import Node, Value
from ..ir.ops.elementwise import Add
from .loop_ops import REDUCTIONS
from .regions import Dataflow

_QUIET = frozenset(
    {"literal", "cast", "reshape", "broadcast_to", "transpose", "slice", "iota", "decode"}
)


def loops_hint(nodes: Sequence[Node]) -> str:
    """Return what a loop nest does in a word, or its last few ops."""
    ops = [n.op.name for n in nodes]
    has = set(ops)
    if "reduce_sum" in has and "rsqrt" in has:
        return "norm_rope" if "concat" in has and "neg" in has else "norm"
    if {"reduce_max", "exp", "reduce_sum"} <= has:
        return "softmax"
    if {"sin", "cos"} <= has:
        return "angles"
    if "concat" in has and "neg" in has:
        return "rope"
    if "sigmoid" in has and "mul" in has and len(has - _QUIET) == 2:
        return "silu"
    telling = list(dict.fromkeys(op for op in ops if op not in _QUIET)) or ops
    return "_".join(telling[-3:])


def weight_hint(flow: Dataflow, weights: Sequence[Value]) -> str:
    """Return what a product's weight is called, or just `matmul`."""
    if len(weights) == 2:
        return "gate_up"
    constants = {c.name for c in flow.function.constants}
    work = [weights[0]]
    while work:
        value = work.pop(0)
        if value.name in constants:
            words = re.findall(r"[A-Za-z]\w*", value.name.replace(".weight", ""))
            return words[-1] if words else "matmul"
        node = flow.made_by(value)
        work += node.inputs[:1] if node is not None else ()
    return "matmul"


def product_hint(flow: Dataflow, core: str, prologue: Collection[str], tail: Sequence[str]) -> str:
    """Return the name of a kernel around a product: what is before it, the product, what after."""
    work = [flow.nodes[k] for k in prologue]
    has = {flow.nodes[k].op.name for k in tail}
    parts = ["norm"] if any(isinstance(n.op, REDUCTIONS) for n in work) else []
    parts.append(core)
    if "sigmoid" in has:
        parts.append("silu" if "mul" in has else "sigmoid")
    parts += ["gelu"] * bool(has & {"tanh", "erf"})
    constants = set(flow.function.constants)
    for k in tail:
        node = flow.nodes[k]
        if isinstance(node.op, Add):
            bias = any(v in constants or v.type.rank == 1 for v in node.inputs)
            parts.append("bias" if bias else "residual")
    return "_".join(dict.fromkeys(parts))
