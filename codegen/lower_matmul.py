"""Regions around one product, or two with the same activations → matrix multiplications."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..ir.dtypes import F32
from ..ir.graph import Node, Value
from ..ir.ops.index import Transpose
from ..ir.rewrite import Builder
from ..ir.types import Dim, Shape, dim, numel
from ..ir.weight_format import WeightFormat
from .block import BlockBuilder
from .index import split_index
from .kernel_ir import Buffer, Matmul, Weight
from .lower_loops import Output
from .lower_products import Region, activations, fail, lower_epilogue, matrix, widened
from .lower_values import Indices


def lower_matmul(region: Region) -> None:
    """Add the steps of a matmul region."""
    nodes = [n for n in region.body.nodes if n.op.name == "matmul"]
    first = nodes[0]
    same = all(n.inputs[0] == first.inputs[0] for n in nodes) and len(nodes) <= 2
    if not same or len(region.body.results) != 1:
        raise fail("a matmul kernel has one product, or two of the same activations", first)
    if first.output.type.dtype.bits == 64 or not first.output.type.dtype.is_float:
        raise fail(f"products are made in f32, not in {first.output.type.dtype}", first)
    a, b = first.inputs
    batched = any(size != 1 for size in b.type.shape[:-2])
    *lead, n_size = first.output.type.shape
    batch_shape = tuple(lead[:-1]) if batched else ()
    row_shape = (lead[-1],) if batched else tuple(lead)
    weights, transpose_b = _weights(region, nodes, batch_shape)
    k_size = a.type.shape[-1]
    buffer, prologue = activations(region, a, (*batch_shape, *row_shape, k_size))

    def index_of(builder: BlockBuilder, row: Dim, column: Dim, batch: Dim) -> Indices:
        rows = split_index(row, row_shape, builder.ranges)
        return (*split_index(batch, batch_shape, builder.ranges), *rows, column)

    sizes = numel(row_shape), n_size, numel(batch_shape)
    result = region.body.results[0], region.outputs[0]
    epilogue = lower_epilogue(region, [n.output for n in nodes], result, sizes, index_of)
    step = Matmul(
        buffer, sizes[0], n_size, k_size, sizes[2], weights, transpose_b, epilogue, prologue
    )
    region.steps.append(step)


def _weights(region: Region, nodes: list[Node], batch: Shape) -> tuple[tuple[Weight, ...], bool]:
    """Return the weights as they are stored, or as copies in f32 where they lie too oddly."""
    found: list[tuple[Weight, bool]] = []
    for node in nodes:
        op: Any = node.op
        b = node.inputs[1]
        as_stored = matrix(region, b)
        if as_stored is None or not _fits(b, as_stored[0], batch):
            break
        found.append((as_stored[0], op.transpose_b != as_stored[1]))
    turned = {t for _, t in found}
    if len(found) == len(nodes) and len(turned) == 1 and (turned == {True} or len(nodes) == 1):
        return tuple(w for w, _ in found), turned == {True}
    return tuple(_copied(region, n, batch) for n in nodes), True


def _fits(b: Value, weight: Weight, batch: Shape) -> bool:
    """Whether the products of the batch step through the rows of the weight evenly."""
    own = b.type.shape[:-2]
    if not batch:
        return True
    return len(own) == len(batch) and all(dim(x - y) == 0 for x, y in zip(own, batch, strict=True))


def _copied(region: Region, node: Node, batch: Shape) -> Weight:
    """Return the second operand as f32 rows `[…, N, K]` that a step writes out."""
    op: Any = node.op
    b = node.inputs[1]
    body = region.body
    if not op.transpose_b:
        rank = b.type.rank
        builder = Builder.over(body)
        b = builder.emit(Transpose((*range(rank - 2), rank - 1, rank - 2)), b)
        body = replace(body, nodes=(*body.nodes, *builder.nodes))
    n, k = b.type.shape[-2:]
    body, b = widened(body, b, (*batch, n, k) if batch else b.type.shape, F32)
    buffer: Buffer = region.scratch_buffer("b", F32, b.type.shape)
    region.steps += region.loops([Output(b, buffer)], body)
    return Weight(buffer, WeightFormat(F32), k, batch_rows=n if batch else 0)
