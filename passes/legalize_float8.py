"""Narrow floats on a machine that has none: codes in bytes, decoded and encoded by ops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import UnsupportedError
from ..ir.dtypes import F32, F64, U8, DType, to_storage
from ..ir.graph import Function, Graph, Node, Value
from ..ir.ops.control import Call
from ..ir.ops.elementwise import Cast, Literal, Where
from ..ir.ops.index import (
    BroadcastTo,
    Concat,
    Reshape,
    Slice,
    Take,
    TakeAlong,
    Transpose,
    Windows,
)
from ..ir.ops.language import CacheUpdate
from ..ir.ops.quantize import Decode, Dequantize, Encode
from ..ir.rewrite import Builder
from ..ir.types import TensorType
from ..ir.weights import Weight

#: Ops that move elements without looking at them: they work on codes.
_MOVES = (
    Reshape,
    Transpose,
    BroadcastTo,
    Slice,
    Windows,
    Concat,
    Take,
    TakeAlong,
    Where,
    CacheUpdate,
)


def legalize_float8(graph: Graph, *, native: frozenset[DType]) -> Graph:
    """Make every value of a narrow float type that is not in `native` a value of `u8` codes.

    Ops that move elements move codes. Everything else gets its operands decoded, exactly, and
    its outcome encoded; what would be rounded to a narrow type is rounded once, as before.

    Before:
        func @f(%w: f8e4m3[256,128], %s: f32[2,1]) {
          %y: f32[256,128] = dequantize(%w, %s) {block=[128, 128], dtype=f32}
    After:
        func @f(%w: u8[256,128], %s: f32[2,1]) {
          %d: f32[256,128] = decode(%w) {dtype=f32, format=f8e4m3}
          %y: f32[256,128] = dequantize(%d, %s) {block=[128, 128], dtype=f32}

    Numerics: exact.
    """
    functions = tuple(_legal(f, native) for f in graph.functions)
    weights = {name: _legal_weight(w, native) for name, w in graph.weights.items()}
    return replace(graph, stage="legalized", functions=functions, weights=weights)


def _is_narrow(t: DType, native: frozenset[DType]) -> bool:
    return t.is_code and t not in native


def _legal_type(t: TensorType, native: frozenset[DType]) -> TensorType:
    if not _is_narrow(t.dtype, native):
        return t
    if t.dtype.bits < 8:
        raise UnsupportedError(
            f"{t}: values of {t.dtype} on a machine without them are not supported yet",
            hint="use a checkpoint in f8e4m3 or f8e5m2",
        )
    return t.with_dtype(U8)


def _legal_weight(weight: Weight, native: frozenset[DType]) -> Weight:
    """Return the same bytes under the type they have from here on."""
    return replace(weight, type=_legal_type(weight.type, native))


def _legal(function: Function, native: frozenset[DType]) -> Function:
    return _Legalizer(function, native).function()


class _Legalizer:
    """One function on its way: `made` maps the old values that changed to the new ones."""

    def __init__(self, function: Function, native: frozenset[DType]) -> None:
        self.old = function
        self.native = native
        self.builder = Builder.over(function)
        self.made: dict[str, Value] = {}
        self.decoded: dict[tuple[str, DType], Value] = {}
        self.taken: set[str] = set()

    def function(self) -> Function:
        new = replace(
            self.old,
            parameters=self.declare(self.old.parameters),
            states=self.declare(self.old.states),
            constants=self.declare(self.old.constants),
        )
        for node in self.old.nodes:
            self.builder.loc = node.loc
            self.node(node)
        return replace(
            new,
            nodes=tuple(self.builder.nodes),
            results=tuple(map(self.code, self.old.results)),
            updates=tuple(map(self.code, self.old.updates)),
        )

    def declare(self, values: tuple[Value, ...]) -> tuple[Value, ...]:
        """Give values their legal types under the names they have."""
        new = tuple(Value(v.name, _legal_type(v.type, self.native)) for v in values)
        self.made.update((v.name, v) for v in new)
        return new

    def code(self, value: Value) -> Value:
        """Return the new value as it lies in memory."""
        return self.made[value.name]

    def number(self, value: Value, dtype: DType = F32) -> Value:
        """Return the new value with its codes decoded to `dtype`."""
        if not self.narrow(value):
            return self.code(value)
        key = value.name, dtype
        if key not in self.decoded:
            op = Decode(value.type.dtype, dtype)
            self.decoded[key] = self.builder.emit(op, self.code(value), name=f"{value.name}_wide")
        return self.decoded[key]

    def narrow(self, value: Value) -> bool:
        return _is_narrow(value.type.dtype, self.native)

    def node(self, node: Node) -> None:
        op = node.op
        touched = any(map(self.narrow, node.inputs + node.outputs))
        if isinstance(op, Call):
            op = replace(op, body=_legal(op.body, self.native))
        if not touched or isinstance(op, Call) or self.moves(node):
            outputs = self.declare(node.outputs)
            self.builder.nodes.append(
                Node(op, tuple(map(self.code, node.inputs)), outputs, node.loc)
            )
        elif isinstance(op, Literal):
            byte = to_storage(op.dtype, np.asarray(op.value))
            self.made[node.output.name] = self.builder.literal(int(byte), U8)
        elif isinstance(op, Cast):
            self.made[node.output.name] = self.cast(node, op)
        else:
            self.compute(node)

    def moves(self, node: Node) -> bool:
        """Whether a node moves codes of one type and computes with none."""
        if not isinstance(node.op, _MOVES):
            return False
        narrow = {v.type.dtype for v in node.inputs + node.outputs if self.narrow(v)}
        plain = [v for v in node.inputs if v.type.dtype.is_float and not self.narrow(v)]
        return len(narrow) == 1 and not plain

    def cast(self, node: Node, op: Cast) -> Value:
        """Return the outcome of a cast from or to a narrow type, or both."""
        (x,) = node.inputs
        if not self.narrow(x):
            source = self.code(x)
        elif op.dtype in (F32, F64):
            return self.number(x, op.dtype)
        else:
            source = self.number(x)
        if not self.narrow(node.output):
            return self.builder.emit(op, source, name=self.free(node.output))
        if source.type.dtype == F64 or not source.type.dtype.is_float:
            source = self.builder.emit(Cast(F32), source)
        encode = Encode(op.dtype, op.saturate)
        return self.builder.emit(encode, source, name=self.free(node.output))

    def compute(self, node: Node) -> None:
        """Compute with decoded operands, and encode what is narrow of the outcome."""
        op = node.op
        if isinstance(op, Dequantize) and self.narrow(node.output):
            op = replace(op, dtype=F32)
        first = node.outputs[0]
        name = f"{first.name}_wide" if self.narrow(first) else self.free(first)
        outputs = self.builder.add(op, *map(self.number, node.inputs), name=name)
        for old, new in zip(node.outputs, outputs, strict=True):
            if self.narrow(old):
                encode = Encode(old.type.dtype, saturate=False)
                new = self.builder.emit(encode, new, name=self.free(old))
            self.made[old.name] = new

    def free(self, old: Value) -> str:
        """Return the name of an old value, free for the new one that takes its place."""
        if old.name not in self.taken:
            self.builder.names.discard(old.name)
            self.taken.add(old.name)
        return old.name
