"""What products have in common: stored weights, activations as rows, epilogues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DiluError
from ..ir.dtypes import BF16, F16, F32, DType
from ..ir.graph import Function, Node, Value
from ..ir.ops.elementwise import Cast
from ..ir.ops.index import BroadcastTo
from ..ir.rewrite import Builder
from ..ir.text import print_node
from ..ir.types import Dim, Shape, dim
from ..ir.weight_format import WeightFormat
from .block import BlockBuilder
from .index import Range, index, reshape_index, variable
from .kernel_ir import Buffer, Epilogue, Expr, LoopNest, Name, Step, Weight
from .lower_loops import Output, lower_loops
from .lower_values import BodyValues, Indices, canonical
from .names import buffer_name
from .target import Target
from .tidy import tidy

_PLAIN = (F32, BF16, F16)


@dataclass
class Region:
    """A kernel's body while it is lowered: its arguments, and what was added to them.

    `inputs` has a buffer for every parameter and, as steps are added, for every value that a
    step has stored. `target` says what steps may read as it is.
    """

    body: Function
    inputs: dict[str, Buffer]
    outputs: tuple[Buffer, ...]
    taken: set[str]
    target: Target
    steps: list[Step] = field(default_factory=list)
    scratch: list[Buffer] = field(default_factory=list)

    def loops(self, outputs: Sequence[Output], body: Function | None = None) -> list[LoopNest]:
        """Return the nests that compute `outputs`, values of `body` (default: the region's)."""
        return lower_loops(
            body or self.body, self.inputs, outputs, self.taken, keeps_rows=self.target.keeps_rows
        )

    def readable(self, t: DType) -> DType:
        """Return the type in which products and attention read activations of type `t`."""
        return t if t in self.target.activations else F32

    def producer(self, value: Value) -> Node | None:
        return next((n for n in self.body.nodes if value in n.outputs), None)

    def scratch_buffer(self, name: str, dtype: DType, shape: Shape) -> Buffer:
        buffer = Buffer(buffer_name(name, self.taken), dtype, shape, "scratch")
        self.scratch.append(buffer)
        self.taken.add(buffer.name)
        return buffer

    def argument(self, value: Value, dtype: DType) -> Buffer:
        """Return a buffer that holds `value` as `dtype`: an argument as it is, or a step's work."""
        direct = self.direct(value, dtype)
        if direct is not None:
            return direct
        buffer = self.scratch_buffer(value.name, dtype, value.type.shape)
        output = Output(value, buffer)
        self.steps += self.loops([output])
        return buffer

    def direct(self, value: Value, dtype: DType) -> Buffer | None:
        """Return the buffer that already holds `value`, row by row, where there is one."""
        shape = value.type.shape
        while value.name not in self.inputs:
            node = self.producer(value)
            if node is None or node.op.name != "reshape":
                return None
            value = node.inputs[0]
        buffer = self.inputs[value.name]
        if buffer.dtype != dtype or buffer.pieces or buffer.constant:
            return None
        return replace(buffer, shape=shape)

    def finish(self, made: dict[str, Buffer], results: Sequence[Value]) -> None:
        """Store the results that no step has stored, from what the steps have stored."""
        self.inputs.update(made)
        left = [
            Output(v, b)
            for v, b in zip(results, self.outputs, strict=True)
            if made.get(v.name) is not b
        ]
        if left:
            self.steps += self.loops(left)

    def result_buffer(self, value: Value, dtype: DType | None = None) -> Buffer:
        """Return where to store `value`: the output when it is one of that type, or scratch."""
        dtype = dtype or value.type.dtype
        for result, buffer in zip(self.body.results, self.outputs, strict=True):
            if result == value and buffer.dtype == dtype:
                return buffer
        return self.scratch_buffer(value.name, dtype, value.type.shape)


def fail(message: str, node: Node) -> DiluError:
    """Return the error that a node cannot be lowered, with its text and its place."""
    return DiluError(message).in_pass("lower", print_node(node), node.loc)


# ----------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class _Stored:
    """A stored matrix as a body names it."""

    codes: Value
    scales: Value | None
    format: WeightFormat


def stored(region: Region, value: Value) -> _Stored | None:
    """Return the constant behind a chain of `decode`, `dequantize` and casts."""
    block, scales, scale_format = (0, 0), None, None
    node = region.producer(value)
    if node is not None and node.op.name == "dequantize":
        op: Any = node.op
        found = _plain(region, node.inputs[1])
        if found is None or op.dtype != F32:
            return None
        block, (scales, scale_format), value = op.block, found, node.inputs[0]
    codes = _plain(region, value)
    if codes is None:
        return None
    return _Stored(codes[0], scales, WeightFormat(codes[1], scale_format, block))


def _plain(region: Region, value: Value) -> tuple[Value, DType] | None:
    """Return the parameter that a decode or a widening cast reads, and its format."""
    node = region.producer(value)
    while node is not None:
        op: Any = node.op
        (source, *_) = node.inputs
        if op.name == "decode" and op.dtype == F32 and source.name in region.inputs:
            return source, op.format
        if op.name == "cast" and value.type.dtype == F32 and source.type.dtype in _PLAIN:
            value, node = source, region.producer(source)
            continue
        return None
    return (value, value.type.dtype) if value.type.dtype in _PLAIN else None


def matrix(region: Region, value: Value) -> tuple[Weight, bool] | None:
    """Return the weight behind `value[…, N, K]` and whether it lies transposed, or None.

    Chain: parameter → decode and dequantize → reshape to heads → rows of every head.
    """
    row: Dim = 0
    heads: tuple[Dim, Dim] | None = None  # (rows of a head in memory, number of heads)
    turned = False
    while (node := region.producer(value)) is not None:
        op: Any = node.op
        (source, *_) = node.inputs
        rank = source.type.rank
        if op.name == "slice" and op.step == 1 and op.axis == rank - 2 and not turned:
            row = index(row + op.start)
        elif op.name == "transpose" and op.permutation == (*range(rank - 2), rank - 1, rank - 2):
            if row != 0:
                return None
            turned = not turned
        elif op.name == "reshape" and heads is None and not turned:
            shape = value.type.shape
            if rank != 2 or dim(source.type.shape[-1] - shape[-1]) != 0:
                return None
            heads = (shape[-2], 1)
        else:
            break
        value = source
    found = stored(region, value)
    if found is None:
        return None
    shape = found.codes.type.shape
    batch_rows: Dim = heads[0] if heads else 0
    if len(shape) > 2:
        if heads is not None or (
            found.scales is not None and shape[-2] % max(found.format.block[0], 1)
        ):
            return None
        batch_rows = shape[-2]
    weight = weight_of(region, found, row=row, batch_rows=batch_rows)
    return (weight, turned) if weight is not None else None


def weight_of(
    region: Region, found: _Stored, *, row: Dim = 0, batch_rows: Dim = 0, pieces: int = 0
) -> Weight | None:
    """Return the weight of a stored matrix; None when its pieces are not as wanted."""
    codes = region.inputs[found.codes.name]
    scales = region.inputs[found.scales.name] if found.scales else None
    if any(b is not None and b.pieces > pieces for b in (codes, scales)):
        return None
    if scales is not None:
        assert found.format.scale is not None
        scales = replace(scales, dtype=found.format.scale)
    columns = found.codes.type.shape[-1]
    return Weight(codes, found.format, columns, scales, row, batch_rows)


# ------------------------------------------------------------------------- activations


def activations(region: Region, value: Value, shape: Shape) -> tuple[Buffer, LoopNest | None]:
    """Return the buffer of activation rows, `shape` = [rows…, K], and what stores it.

    An argument of a type that the target's products read serves as it is; anything else is
    broadcast to `shape`, in f32 where its own type is none of those.
    """
    value = _unwidened(region, value)
    dtype = region.readable(value.type.dtype)
    if value.type.shape == shape:
        direct = region.direct(value, dtype)
        if direct is not None:
            return direct, None
    buffer = region.scratch_buffer("a", dtype, shape)
    body, value = widened(region.body, value, shape, dtype)
    nests = region.loops([Output(value, buffer)], body)
    assert len(nests) == 1
    return buffer, nests[0]


def _unwidened(region: Region, value: Value) -> Value:
    """Return `value` before it was cast to f32 from a type that products read themselves."""
    node = region.producer(value)
    while node is not None and node.op.name == "cast" and value.type.dtype == F32:
        (source,) = node.inputs
        if source.type.dtype not in region.target.activations:
            break
        value, node = source, region.producer(source)
    return value


def widened(body: Function, value: Value, shape: Shape, dtype: DType) -> tuple[Function, Value]:
    """Return `body` with `value` cast to `dtype` and broadcast to `shape`, and that value."""
    builder = Builder.over(body)
    if value.type.dtype != dtype:
        value = builder.emit(Cast(dtype), value)
    if value.type.shape != shape:
        value = builder.emit(BroadcastTo(shape), value)
    return replace(body, nodes=(*body.nodes, *builder.nodes)), value


# --------------------------------------------------------------------------- epilogues


def lower_epilogue(
    region: Region,
    products: Sequence[Value],
    result: tuple[Value, Buffer],
    sizes: tuple[Dim, Dim, Dim],
    index_of: Callable[[BlockBuilder, Dim, Dim, Dim], Indices],
) -> Epilogue:
    """Return what stores `result`, for `sizes` (rows, columns, batch).

    `index_of(builder, row, column, batch)` is the index of an accumulator in the product's output.
    """
    builder = BlockBuilder(region.taken)
    values = BodyValues(region.body, builder, region.inputs)
    row, column, batch = (variable(builder.fresh(base)) for base in "mnb")
    names = tuple(builder.fresh("acc") for _ in products)
    with builder.inner() as row_block, builder.inner() as block:
        for symbol, size, depth in zip((row, column, batch), sizes, (1, 2, 1), strict=True):
            builder.depth[symbol.name] = depth
            builder.ranges[symbol] = Range(0, size)
        at = index_of(builder, row, column, batch)
        at = canonical(at, products[0].type.shape)
        for name, product in zip(names, products, strict=True):
            builder.depth[name] = 2
            values.special[product.name] = _accumulator(values, product, name, at)
        value, buffer = result
        place = _forward(region, products[0], value, at, builder)
        builder.store(buffer, place, values.element(value, place))
    parts = (builder.blocks[0].stmts, row_block.stmts, block.stmts)
    invariant, row_body, body = tidy(*(tuple(p) for p in parts))
    return Epilogue(row.name, column.name, batch.name, names, invariant, row_body, body)


def _accumulator(
    values: BodyValues, product: Value, name: str, at: Indices
) -> Callable[[Indices], Expr | None]:
    def read(indices: Indices) -> Expr | None:
        if indices != at:
            raise DiluError(f"{product} is read at {indices}, not where its product is made")
        return values.rounded(Name(name, F32), product.type.dtype)

    return read


def _forward(
    region: Region, product: Value, result: Value, at: Indices, builder: BlockBuilder
) -> Indices:
    """Return the index of `result` that element `at` of the product ends up at."""
    places = {product.name: at}
    for node in region.body.nodes:
        start = next((v for v in node.inputs if v.name in places), None)
        if start is None or node.output.name in places:
            continue
        place = places[start.name]
        op: Any = node.op
        if op.name == "reshape":
            new = node.output.type.shape
            place = reshape_index(place, start.type.shape, new, builder.ranges)
        elif op.name == "transpose":
            place = tuple(place[a] for a in op.permutation)  # 0 along axes of size 1, as before
        elif node.output.type.shape != start.type.shape:
            raise fail("an epilogue cannot change the shape of a product like this", node)
        places[node.output.name] = place
    if result.name not in places:
        raise DiluError(f"{result} does not depend on the product of its kernel")
    return places[result.name]
