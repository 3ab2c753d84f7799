"""The composite ops of language models: experts, attention, top-k, cache updates."""

from __future__ import annotations

from typing import Any

from ..ir.dtypes import BF16, BOOL, F16, F32, I64
from ..ir.graph import Node
from ..ir.types import dim
from .block import BlockBuilder
from .index import divmod_index, variable
from .kernel_ir import Attention, Buffer, Experts, Index, LoopNest, Name, TopK, Weight
from .lower_products import Region, activations, fail, lower_epilogue, stored, weight_of
from .lower_values import BodyValues
from .tidy import tidy


def _single(region: Region, name: str) -> Node:
    nodes = [n for n in region.body.nodes if n.op.name == name]
    if len(nodes) != 1:
        raise fail(f"a kernel of kind {name} has one such op, not {len(nodes)}", nodes[0])
    return nodes[0]


def lower_experts(region: Region) -> None:
    """Add the steps of an experts region."""
    node = _single(region, "experts")
    op: Any = node.op
    x, indices, weights, gate_up, down = node.inputs
    tokens, hidden = x.type.shape
    experts, _, inner, _ = gate_up.type.shape
    index_buffer = region.argument(indices, I64)
    routing = region.argument(weights, F32)
    stored_weights: list[Weight] = []
    for value, pieces in ((gate_up, 2), (down, 1)):
        found = stored(region, value)
        weight = weight_of(region, found, pieces=pieces) if found is not None else None
        if weight is None:
            raise fail(f"{value} is no stored weight that experts can use", node)
        stored_weights.append(weight)
    buffer, prologue = activations(region, x, x.type.shape)
    epilogue = lower_epilogue(
        region,
        [node.output],
        (region.body.results[0], region.outputs[0]),
        (tokens, hidden, 1),
        lambda _builder, row, column, _batch: (row, column),
    )
    region.steps.append(
        Experts(
            buffer, tokens, hidden, inner, experts, indices.type.shape[1], index_buffer, routing,
            stored_weights[0], stored_weights[1], op.activation, epilogue, prologue,
        )
    )  # fmt: skip


def lower_attention(region: Region) -> None:
    """Add the steps of an attention region."""
    node = _single(region, "attention")
    op: Any = node.op
    q, keys, values, positions, sequence, pages = node.inputs
    caches: list[Buffer] = []  # keys, values
    for cache in (keys, values):
        buffer = region.inputs.get(cache.name)
        if buffer is None or buffer.dtype not in (F32, BF16, F16):
            raise fail(f"attention reads caches of floats directly, not {cache}", node)
        caches.append(buffer)
    out = region.result_buffer(node.output, region.readable(node.output.type.dtype))
    step = Attention(
        region.argument(q, region.readable(q.type.dtype)),
        caches[0],
        caches[1],
        region.argument(positions, I64),
        region.argument(sequence, I64),
        region.argument(pages, I64),
        out,
        op.scale,
        op.value_dim,
        op.window,
    )
    region.steps.append(step)
    region.finish({node.output.name: out}, region.body.results)


def lower_topk(region: Region) -> None:
    """Add the steps of a topk region."""
    node = _single(region, "topk")
    (x,) = node.inputs
    values, indices = node.outputs
    made = {v.name: region.result_buffer(v) for v in (values, indices)}
    op: Any = node.op
    buffer = region.argument(x, x.type.dtype)
    region.steps.append(TopK(buffer, made[values.name], made[indices.name], op.k, op.largest))
    region.finish(made, region.body.results)


def lower_cache_update(region: Region) -> None:
    """Add a loop nest that puts rows where the slots say; a slot outside the cache is left out."""
    for node in region.body.nodes:
        if node.op.name == "cache_update":
            region.steps.append(_cache_update(region, node))
    if region.body.results:
        region.finish({}, region.body.results)


def _cache_update(region: Region, node: Node) -> LoopNest:
    cache, new, slots = node.inputs
    buffer = region.inputs.get(cache.name)
    if buffer is None:
        raise fail("only a state can be updated", node)
    pages, _, page, _ = cache.type.shape
    builder = BlockBuilder(region.taken)
    values = BodyValues(region.body, builder, region.inputs)
    with builder.inner() as row_block:
        token = builder.open_variable("i", 0, new.type.shape[0])
        slot = builder.apply("cast", values.element(slots, (token,)), dtype=I64)
        count = dim(pages * page)
        inside = builder.apply(
            "logical_and",
            builder.apply("ge", slot, Index(0), dtype=BOOL),
            builder.apply("lt", slot, Index(count), dtype=BOOL),
            dtype=BOOL,
        )
        assert isinstance(slot, Name)
        where, place = divmod_index(variable(slot.name), page, builder.ranges)
        heads, size = new.type.shape[1:]

        def store(h: Any, d: Any) -> None:
            value = values.element(new, (token, h, d))
            with builder.masked(inside):
                builder.store(buffer, (where, h, place, d), value)

        builder.loop(heads, lambda h: builder.loop(size, lambda d: store(h, d)))
    invariant, body = tidy(tuple(builder.blocks[0].stmts), tuple(row_block.stmts))
    return LoopNest(((token.name, new.type.shape[0]),), body, invariant)
