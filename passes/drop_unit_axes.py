"""Axes of size 1 that batches of one leave behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..ir.graph import Graph, Node, Value
from ..ir.op import Op
from ..ir.ops.index import BroadcastTo, Concat, Reshape, Slice, Take, TakeAlong, Transpose
from ..ir.ops.matmul import MatMul
from ..ir.ops.reduce import ArgMax, Reduce, TopK
from ..ir.rewrite import Builder, map_functions, rewrite_nodes
from ..ir.types import Shape, numel
from .loop_ops import ELEMENTWISE


def drop_unit_axes(graph: Graph) -> Graph:
    """Work without axes of size 1 where an op does not need them, and merge a batch into rows.

    Every op gets its operands reshaped to what it needs and its outcome reshaped to what it was;
    the reshapes in between cancel out.

    Before:
        %y: f32[1,T,8] = exp(%x)
        %p: f32[1,T,4] = matmul(%y, %w) {transpose_b=true}
    After:
        %a: f32[T,8] = reshape(%x) {shape=[<T>, 8]}
        %b: f32[T,8] = exp(%a)
        %y: f32[1,T,8] = reshape(%b) {shape=[1, <T>, 8]}
        %c: f32[T,8] = reshape(%y) {shape=[<T>, 8]}
        %d: f32[T,4] = matmul(%c, %w) {transpose_b=true}
        %p: f32[1,T,4] = reshape(%d) {shape=[1, <T>, 4]}

    Numerics: exact.
    """
    return map_functions(graph, lambda function: rewrite_nodes(function, _dropped))


def _dropped(node: Node, builder: Builder) -> tuple[Value, ...] | None:
    """Return the node's outcome computed on fewer axes, or None where it has no axis to spare."""
    if not node.inputs:
        return None
    found = _without_units(node)
    if found is None:
        return None
    op, shapes = found
    if all(s == v.type.shape for s, v in zip(shapes, node.inputs, strict=True)):
        return None
    inputs = [_as(v, s, builder) for v, s in zip(node.inputs, shapes, strict=True)]
    outputs = builder.add(op, *inputs)
    pairs = zip(outputs, node.outputs, strict=True)
    return tuple(_as(new, old.type.shape, builder, old.name) for new, old in pairs)


def _as(value: Value, shape: Shape, builder: Builder, name: str | None = None) -> Value:
    return value if value.type.shape == shape else builder.emit(Reshape(shape), value, name=name)


def _units(shape: Shape, spare: Iterable[int] | None = None) -> list[int]:
    """Return the axes of size 1, all of them or those among `spare`."""
    among = range(len(shape)) if spare is None else spare
    return [a for a in among if shape[a] == 1]


def _less(shape: Shape, axes: Sequence[int]) -> Shape:
    return tuple(d for a, d in enumerate(shape) if a not in axes)


def _less_aligned(shape: Shape, axes: Sequence[int], rank: int) -> Shape:
    """Drop axes, counted in a shape of `rank` that this one is broadcast to."""
    return _less(shape, [a - (rank - len(shape)) for a in axes])


def _place(axis: int, axes: Sequence[int]) -> int:
    """Return where an axis is once `axes` are gone."""
    return axis - sum(a < axis for a in axes)


def _without_units(node: Node) -> tuple[Op, list[Shape]] | None:
    """Return the op on fewer axes and the shapes that it takes; None for ops that keep theirs."""
    op, x = node.op, node.inputs[0].type.shape
    out = node.outputs[0].type.shape
    if isinstance(op, (*ELEMENTWISE, BroadcastTo)):
        axes = _units(out, range(len(out) - 1))  # the last is what a reduction left of a row
        shapes = [_less_aligned(v.type.shape, axes, len(out)) for v in node.inputs]
        return (replace(op, shape=_less(out, axes)) if isinstance(op, BroadcastTo) else op), shapes
    if isinstance(op, Reduce):
        axes = _units(x, [a for a in range(len(x)) if a not in op.axes])
        left = tuple(_place(a, axes) for a in op.axes)
        return op.changed(axes=left), [_less(x, axes)]
    if isinstance(op, (ArgMax, TopK, TakeAlong)):
        axes = _units(x, range(len(x) - 1))
        return op, [_less(v.type.shape, axes) for v in node.inputs]
    if isinstance(op, Transpose):
        axes = _units(x)
        order = tuple(_place(a, axes) for a in op.permutation if a not in axes)
        return Transpose(order), [_less(x, axes)]
    if isinstance(op, (Slice, Concat)):
        axes = _units(x, [a for a in range(len(x)) if a != op.axis])
        fewer = replace(op, axis=_place(op.axis, axes))
        return fewer, [_less(v.type.shape, axes) for v in node.inputs]
    if isinstance(op, Take):
        table, rows = (v.type.shape for v in node.inputs)
        kept = (*table[:1], *_less(table[1:], _units(table[1:])))
        return op, [kept, _less(rows, _units(rows))]
    return _matmul_in_rows(op, node) if isinstance(op, MatMul) else None


def _matmul_in_rows(op: MatMul, node: Node) -> tuple[Op, list[Shape]]:
    """Make one matrix of a batch that meets a single matrix, and drop batches of one."""
    a, b = (v.type.shape for v in node.inputs)
    if len(b) == 2:
        return op, [(numel(a[:-1]), a[-1]), b]
    rank = len(node.output.type.shape)
    axes = _units(node.output.type.shape, range(rank - 2))
    return op, [_less_aligned(s, axes, rank) for s in (a, b)]
