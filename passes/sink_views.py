"""Moving views behind the elementwise work on them, where they meet and cancel."""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node, Value
from ..ir.ops.index import BroadcastTo, Concat, Reshape, Slice, Transpose
from ..ir.ops.reduce import Reduce
from ..ir.rewrite import Builder, map_functions
from ..ir.types import numel
from .loop_ops import ELEMENTWISE, is_free
from .matching import Producers, rewrite_locally


def sink_views(graph: Graph) -> Graph:
    """Do elementwise work, slices, joins and reductions before a transpose or reshape, not after.

    So a transpose to heads and the one back meet behind the work on heads, and work on a reshaped
    product stands next to the product. No view of a full-sized value is added to move another.

    Before:
        %a: f32[H,T,D] = transpose(%x) {permutation=[1, 0, 2]}
        %b: f32[H,T,D] = mul(%a, %cos)
        %y: f32[T,H,D] = transpose(%b) {permutation=[1, 0, 2]}
    After:
        %c: f32[T,1,D] = transpose(%cos) {permutation=[1, 0, 2]}
        %d: f32[T,H,D] = mul(%x, %c)
        %b: f32[H,T,D] = transpose(%d) {permutation=[1, 0, 2]}
        %y: f32[T,H,D] = transpose(%b) {permutation=[1, 0, 2]}

    Numerics: exact.
    """
    return map_functions(graph, lambda function: rewrite_locally(function, _sunk))


def _sunk(node: Node, builder: Builder, producers: Producers) -> Value | None:
    if isinstance(node.op, ELEMENTWISE):
        by_transpose = _elementwise_transposed(node, builder, producers)
        return by_transpose or _elementwise_reshaped(node, builder, producers)
    if isinstance(node.op, (Slice, Concat, Reduce)):
        return _axes_renamed(node, builder, producers)
    return None


def _order(value: Value, producers: Producers) -> tuple[int, ...] | None:
    """Return the permutation of the transpose that makes a value."""
    source = producers.made_by(value, Transpose)
    if source is None:
        return None
    assert isinstance(source.op, Transpose)
    return source.op.permutation


def _source(value: Value, producers: Producers) -> Value:
    node = producers.of(value)
    assert node is not None
    return node.inputs[0]


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(a) for a in range(len(order)))


def _elementwise_transposed(node: Node, builder: Builder, producers: Producers) -> Value | None:
    out = node.output.type
    orders = {o for v in node.inputs if (o := _order(v, producers)) and v.type.shape == out.shape}
    if len(orders) != 1:
        return None
    (order,) = orders
    back = _inverse(order)
    small = [v for v in node.inputs if _order(v, producers) != order]
    if any(v.type.shape == out.shape for v in small):
        return None
    inputs = [
        _source(v, producers) if v not in small else _transposed_small(v, back, builder)
        for v in node.inputs
    ]
    return builder.emit(Transpose(order), builder.emit(node.op, *inputs), name=node.output.name)


def _transposed_small(value: Value, order: tuple[int, ...], builder: Builder) -> Value:
    """Transpose an operand that is broadcast."""
    if value.type.rank == 0:
        return value
    if value.type.rank < len(order):
        shape = (1,) * (len(order) - value.type.rank) + value.type.shape
        value = builder.emit(Reshape(shape), value)
    return builder.emit(Transpose(order), value)


def _elementwise_reshaped(node: Node, builder: Builder, producers: Producers) -> Value | None:
    """Sink a reshape when every operand is a number, or reshaped from the same shape for this.

    A cast that only widens stays: it goes into its reader, which then reads what lies in memory.
    """
    out = node.output.type
    large = [v for v in node.inputs if numel(v.type.shape) != 1]
    if is_free(node) or not large or any(producers.made_by(v, Reshape) is None for v in large):
        return None
    if any(v.type.shape != out.shape or producers.readers(v) != 1 for v in large):
        return None
    if any(v.type.rank for v in node.inputs if v not in large):
        return None
    sources = {_source(v, producers).type.shape for v in large}
    if len(sources) != 1:
        return None
    inputs = [_source(v, producers) if v in large else v for v in node.inputs]
    done = builder.emit(node.op, *inputs)
    return builder.emit(Reshape(out.shape), done, name=node.output.name)


def _axes_renamed(node: Node, builder: Builder, producers: Producers) -> Value | None:
    """Slice, join or reduce before a transpose, along the axis as it is there."""
    orders = {o for v in node.inputs if (o := _order(v, producers)) is not None}
    if len(orders) != 1:
        return None
    (order,) = orders
    inputs = [_before(v, order, builder, producers) for v in node.inputs]
    if any(v is None for v in inputs):
        return None
    op = node.op
    if isinstance(op, Reduce):
        axes = tuple(sorted(order[a] for a in op.axes))
        kept = [a for a in order if a not in axes]
        if not op.keepdims:
            order = tuple(sorted(kept).index(a) for a in kept)
        op = op.changed(axes=axes)
    else:
        assert isinstance(op, (Slice, Concat))
        op = replace(op, axis=order[op.axis])
    done = builder.emit(op, *(v for v in inputs if v is not None))
    return builder.emit(Transpose(order), done, name=node.output.name)


def _before(
    value: Value, order: tuple[int, ...], builder: Builder, producers: Producers
) -> Value | None:
    """Return a value as it is before a transpose to `order`, if that costs nothing."""
    if _order(value, producers) == order:
        return _source(value, producers)
    repeated = producers.made_by(value, BroadcastTo)
    if repeated is None:
        return None
    back = _inverse(order)
    shape = tuple(value.type.shape[a] for a in back)
    return builder.emit(BroadcastTo(shape), _transposed_small(repeated.inputs[0], back, builder))
