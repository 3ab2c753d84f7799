"""Algebraic and structural identities, each bitwise exact.

Only what holds for every number is here: `x + 0` is not `x` where `x` is -0, while `x - 0`,
`x + -0` and `x * 1` are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..ir.dtypes import DType
from ..ir.graph import Graph, Node, Value
from ..ir.op import Op
from ..ir.ops.elementwise import (
    Add,
    Binary,
    Cast,
    Div,
    LogicalAnd,
    LogicalNot,
    LogicalOr,
    Mul,
    Neg,
    Pow,
    Sub,
    Where,
)
from ..ir.ops.index import BroadcastTo, Concat, Reshape, Slice, Transpose
from ..ir.ops.matmul import MatMul
from ..ir.rewrite import Builder, map_functions
from ..ir.types import dim
from .matching import Number, Producers, rewrite_locally


def simplify_identities(graph: Graph) -> Graph:
    """Replace ops that change nothing, and merge views of views.

    Before:
        %one: f32[] = literal() {dtype=f32, value=1.0}
        %a: f32[T,8] = mul(%x, %one)
        %b: f32[8,T] = transpose(%a) {permutation=[1, 0]}
        %c: f32[T,8] = transpose(%b) {permutation=[1, 0]}
        return %c
    After:
        return %x

    Numerics: exact.
    """
    return map_functions(graph, lambda function: rewrite_locally(function, _simpler))


def _simpler(node: Node, builder: Builder, producers: Producers) -> Value | None:
    for kind, rule in _RULES:
        if isinstance(node.op, kind):
            found = rule(node, builder, producers)
            if found is not None:
                return found
    return None


# -------------------------------------------------------------------------------- elementwise


def _is_one(number: Number | None) -> bool:
    return number is not None and number == 1


def _is_zero(number: Number | None, sign: float) -> bool:
    """Whether a number is the zero of that sign (either one, for integers)."""
    if number is None or number != 0:
        return False
    return not isinstance(number, float) or math.copysign(1.0, number) == sign


def _neutral(node: Node, _builder: Builder, producers: Producers) -> Value | None:
    """x * 1, 1 * x, x / 1, x ^ 1, x - 0, x + -0, -0 + x."""
    a, b = node.inputs
    left, right = producers.number(a), producers.number(b)
    op, out = node.op, node.output.type
    keeps_a = (
        (isinstance(op, (Mul, Div, Pow)) and _is_one(right))
        or (isinstance(op, Sub) and _is_zero(right, 1.0))
        or (isinstance(op, Add) and _is_zero(right, -1.0))
        or (isinstance(op, LogicalAnd) and right is True)
        or (isinstance(op, LogicalOr) and right is False)
    )
    if keeps_a and a.type == out:
        return a
    keeps_b = (
        (isinstance(op, Mul) and _is_one(left))
        or (isinstance(op, Add) and _is_zero(left, -1.0))
        or (isinstance(op, LogicalAnd) and left is True)
        or (isinstance(op, LogicalOr) and left is False)
    )
    return b if keeps_b and b.type == out else None


def _needless_broadcast(node: Node, builder: Builder, producers: Producers) -> Value | None:
    """Elementwise ops broadcast by themselves."""
    for i, value in enumerate(node.inputs):
        source = producers.made_by(value, BroadcastTo)
        less = source.inputs[0] if source is not None else producers.literal(value)
        if less is None or less == value:
            continue
        inputs = (*node.inputs[:i], less, *node.inputs[i + 1 :])
        if node.op.infer(*(v.type for v in inputs)) == (node.output.type,):
            return builder.emit(node.op, *inputs, name=node.output.name)
    return None


def _involution(node: Node, _builder: Builder, producers: Producers) -> Value | None:
    inner = producers.made_by(node.inputs[0], type(node.op))
    return inner.inputs[0] if inner is not None else None


def _where(node: Node, builder: Builder, producers: Producers) -> Value | None:
    condition, a, b = node.inputs
    number = producers.number(condition)
    if number is None and a != b:
        return None
    chosen = a if number or a == b else b
    if chosen.type == node.output.type:
        return chosen
    return builder.emit(BroadcastTo(node.output.type.shape), chosen, name=node.output.name)


def holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` is a value of `wide`."""
    if wide == narrow:
        return True
    if narrow.kind == "bool":
        return wide.special != "scale"
    if wide.is_float and narrow.is_float:
        if narrow.special == "scale" or wide.special != "ieee":
            return False
        least = narrow.bias + narrow.mantissa  # of the exponent of the smallest subnormal
        return (
            wide.exponent >= narrow.exponent
            and wide.mantissa >= narrow.mantissa
            and wide.bias + wide.mantissa >= least
        )
    signed = narrow.kind == "int"
    if wide.is_float:
        return narrow.is_integer and narrow.bits - signed <= wide.mantissa + 1
    if wide.is_integer and narrow.is_integer:
        grows = wide.bits > narrow.bits
        return grows and (wide.kind == "int" or not signed)
    return False


def _cast(node: Node, builder: Builder, producers: Producers) -> Value | None:
    (x,) = node.inputs
    assert isinstance(node.op, Cast)
    if x.type == node.output.type:
        return x
    inner = producers.made_by(x, Cast)
    if inner is not None and holds(x.type.dtype, inner.inputs[0].type.dtype):
        return builder.emit(node.op, inner.inputs[0], name=node.output.name)
    return None


# -------------------------------------------------------------------------------------- views


def _same(node: Node, _builder: Builder, _producers: Producers) -> Value | None:
    return node.inputs[0] if node.inputs[0].type == node.output.type else None


def _reshape(node: Node, builder: Builder, producers: Producers) -> Value | None:
    inner = producers.made_by(node.inputs[0], Reshape)
    return (
        builder.emit(node.op, inner.inputs[0], name=node.output.name) if inner is not None else None
    )


def _transpose(node: Node, builder: Builder, producers: Producers) -> Value | None:
    assert isinstance(node.op, Transpose)
    (x,), order = node.inputs, node.op.permutation
    if order == tuple(range(len(order))):
        return x
    inner = producers.made_by(x, Transpose)
    if inner is not None:
        assert isinstance(inner.op, Transpose)
        merged = tuple(inner.op.permutation[a] for a in order)
        return builder.emit(Transpose(merged), inner.inputs[0], name=node.output.name)
    moved = [a for a in order if x.type.shape[a] != 1]
    if moved == sorted(moved):  # only axes of size 1 change their place
        return builder.emit(Reshape(node.output.type.shape), x, name=node.output.name)
    return None


def _broadcast_to(node: Node, builder: Builder, producers: Producers) -> Value | None:
    inner = producers.made_by(node.inputs[0], BroadcastTo)
    return (
        builder.emit(node.op, inner.inputs[0], name=node.output.name) if inner is not None else None
    )


def _slice(node: Node, builder: Builder, producers: Producers) -> Value | None:
    assert isinstance(node.op, Slice)
    (x,), op = node.inputs, node.op
    if op.step == 1 and dim(op.start) == 0 and dim(op.stop - x.type.shape[op.axis]) == 0:
        return x
    inner = producers.made_by(x, Slice)
    if inner is not None:
        assert isinstance(inner.op, Slice)
        if inner.op.axis == op.axis and inner.op.step == 1:
            start, stop = dim(inner.op.start + op.start), dim(inner.op.start + op.stop)
            merged = Slice(op.axis, start, stop, op.step)
            return builder.emit(merged, inner.inputs[0], name=node.output.name)
    joined = producers.made_by(x, Concat)
    if joined is not None:
        assert isinstance(joined.op, Concat)
        return _slice_of_concat(op, joined.inputs, joined.op.axis, builder)
    return None


def _slice_of_concat(
    op: Slice, parts: tuple[Value, ...], axis: int, builder: Builder
) -> Value | None:
    """Take from the one part that holds all of the slice."""
    if axis != op.axis or not isinstance(op.start, int) or not isinstance(op.stop, int):
        return None
    begin = 0
    for part in parts:
        size = part.type.shape[axis]
        if not isinstance(size, int):
            return None
        if begin <= op.start and op.stop <= begin + size:
            return builder.emit(Slice(axis, op.start - begin, op.stop - begin, op.step), part)
        begin += size
    return None


def _concat(node: Node, builder: Builder, producers: Producers) -> Value | None:
    assert isinstance(node.op, Concat)
    if len(node.inputs) == 1:
        return node.inputs[0]
    for i, (a, b) in enumerate(zip(node.inputs, node.inputs[1:], strict=False)):
        merged = _adjoining(a, b, node.op.axis, builder, producers)
        if merged is not None:
            inputs = (*node.inputs[:i], merged, *node.inputs[i + 2 :])
            return builder.emit(node.op, *inputs, name=node.output.name)
    return None


def _adjoining(
    a: Value, b: Value, axis: int, builder: Builder, producers: Producers
) -> Value | None:
    """Return one slice for two that lie side by side."""
    first, second = producers.made_by(a, Slice), producers.made_by(b, Slice)
    if first is None or second is None or first.inputs != second.inputs:
        return None
    x, y = first.op, second.op
    assert isinstance(x, Slice) and isinstance(y, Slice)
    fits = x.axis == y.axis == axis and x.step == y.step == 1 and dim(y.start - x.stop) == 0
    return builder.emit(Slice(axis, x.start, y.stop), *first.inputs) if fits else None


def _matmul(node: Node, builder: Builder, producers: Producers) -> Value | None:
    """A product with a transposed matrix is the other kind of product."""
    assert isinstance(node.op, MatMul)
    a, b = node.inputs
    source = producers.made_by(b, Transpose)
    if source is None:
        return None
    assert isinstance(source.op, Transpose)
    last = tuple(range(b.type.rank))
    if source.op.permutation != (*last[:-2], last[-1], last[-2]):
        return None
    return builder.emit(MatMul(not node.op.transpose_b), a, source.inputs[0], name=node.output.name)


_RULES: tuple[
    tuple[type[Op] | tuple[type[Op], ...], Callable[[Node, Builder, Producers], Value | None]], ...
] = (
    (Binary, _neutral),
    ((Binary, Where), _needless_broadcast),
    ((Neg, LogicalNot), _involution),
    (Where, _where),
    (Cast, _cast),
    ((Reshape, BroadcastTo), _same),
    (Reshape, _reshape),
    (Transpose, _transpose),
    (BroadcastTo, _broadcast_to),
    (Slice, _slice),
    (Concat, _concat),
    (MatMul, _matmul),
)
