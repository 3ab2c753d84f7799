"""Values that have no elements: nothing computes them, and what reads them is known."""

from __future__ import annotations

import math

from ..ir.dtypes import DType
from ..ir.graph import Graph, Node, Value
from ..ir.ops.control import Subprogram
from ..ir.ops.elementwise import Literal
from ..ir.ops.index import BroadcastTo, Concat, Reshape
from ..ir.ops.matmul import MatMul
from ..ir.ops.reduce import Reduce, ReduceProd, ReduceSum
from ..ir.rewrite import Builder, map_functions, rewrite_nodes
from ..ir.types import Shape, TensorType


def drop_empty(graph: Graph) -> Graph:
    """Make values of a static size of 0 from nothing, and what is reduced from one a number.

    So no kernel divides an index by a size of 0.

    Before:
        %a: f32[0,4] = exp(%x)
        %s: f32[4] = reduce_sum(%a) {axes=[0], keepdims=false}
        %p: f32[T,4] = matmul(%y, %z) {transpose_b=false}
        %j: f32[T,4] = concat(%empty, %p) {axis=0}
    After:
        %c: f32[] = literal() {dtype=f32, value=0.0}
        %s: f32[4] = broadcast_to(%c) {shape=[4]}
        %c_1: f32[] = literal() {dtype=f32, value=0.0}
        %p: f32[T,4] = broadcast_to(%c_1) {shape=[<T>, 4]}
        %j: f32[T,4] = concat(%p) {axis=0}

    Numerics: exact.
    """
    return map_functions(graph, lambda function: rewrite_nodes(function, _without_empty))


def is_empty(shape: Shape) -> bool:
    """Whether a shape has no elements whatever its symbols are."""
    return any(size == 0 for size in shape)


def _without_empty(node: Node, builder: Builder) -> tuple[Value, ...] | None:
    op = node.op
    if isinstance(op, (Subprogram, Literal)) or op.updates is not None:
        return None
    if all(is_empty(v.type.shape) for v in node.outputs):
        return None if _is_fill(node) else tuple(_empty(v, builder) for v in node.outputs)
    if isinstance(op, Reduce) and is_empty(node.inputs[0].type.shape):
        dtype = node.output.type.dtype
        return (_filled(node.output, _of_nothing(op, dtype), builder),)
    if isinstance(op, MatMul) and node.inputs[0].type.shape[-1] == 0:
        return (_filled(node.output, 0, builder),)
    if isinstance(op, Concat):
        full = [v for v in node.inputs if v.type.shape[op.axis] != 0]
        if len(full) < len(node.inputs):
            return (builder.emit(op, *full, name=node.output.name),)
    return None


def _is_fill(node: Node) -> bool:
    """Whether a node is what `_empty` makes."""
    flat = isinstance(node.op, BroadcastTo) and node.output.type.shape == (0,)
    return flat and node.inputs[0].type.rank == 0


def _empty(value: Value, builder: Builder) -> Value:
    """Return a value without elements, one axis of them made by a loop that never runs."""
    shape, number = value.type.shape, builder.literal(0, value.type.dtype)
    if shape == (0,):
        return builder.emit(BroadcastTo(shape), number, name=value.name)
    flat = builder.emit(BroadcastTo((0,)), number)
    return builder.emit(Reshape(shape), flat, name=value.name)


def _filled(value: Value, number: float, builder: Builder) -> Value:
    t: TensorType = value.type
    scalar = builder.literal(number, t.dtype)
    return scalar if t.rank == 0 else builder.emit(BroadcastTo(t.shape), scalar, name=value.name)


def _of_nothing(op: Reduce, dtype: DType) -> float:
    """Return what no numbers are reduced to; the largest of none is less than any number."""
    if isinstance(op, (ReduceSum, ReduceProd)):
        return int(isinstance(op, ReduceProd))
    largest = op.name == "reduce_max"
    if dtype.is_float:
        return -math.inf if largest else math.inf
    if dtype.kind == "bool":
        return not largest
    low = 0 if dtype.kind == "uint" else -(2 ** (dtype.bits - 1))
    return low if largest else low + 2**dtype.bits - 1
