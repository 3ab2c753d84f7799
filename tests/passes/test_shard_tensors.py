"""Divided heads, columns and vocabulary: all ranks together compute what one computes alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dilu.codegen.targets import find_target
from dilu.errors import DiluError
from dilu.ir.dimensions import links
from dilu.ir.graph import Graph
from dilu.ir.interpret import interpret
from dilu.ir.interpret_ranks import interpret_ranks
from dilu.ir.mesh import Mesh
from dilu.ir.ops.index import Reshape
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.types import TensorType, symbol
from dilu.ir.verify import verify
from dilu.ir.weights import Even, Weight
from dilu.passes.manager import run_passes
from dilu.passes.pipeline import Sharding, pipeline
from dilu.passes.shard_tensors import _step, shard_tensors

# Two layers of 4 heads of 6 numbers, 2 heads of keys; hidden 8, inner 12; 3 experts of inner 4;
# 16 words. The blocks of scales do not end where the ranks' parts do.
MODEL = """
graph legalized
func @main(%t: i64[T], %p: i64[T], %s: i64[T], %g: i64[S,P], %at: i64[T])
    state(%k: f32[2,B,2,4,6], %v: f32[2,B,2,4,6])
    const(%emb: f32[16,8], %q: u8[2,24,8], %qs: f32[2,5,2], %kw: f32[2,12,8], %b: f32[2,24],
    %o: u8[2,8,24], %os: f32[2,1,5], %r: f32[2,3,8], %gu: f32[2,3,2,4,8], %d: f32[2,3,8,4],
    %up: f32[2,12,8], %down: f32[2,8,12], %head: f32[16,8]) {
  %x: f32[T,8] = take(%emb, %t)
  %y: f32[T,8], %k2: f32[2,B,2,4,6], %v2: f32[2,B,2,4,6] =
      call(%x, %p, %s, %g, %at, %k, %v, %q, %qs, %kw, %b, %o, %os, %r, %gu, %d, %up, %down)
      {times=2, body=func @layer(%x: f32[T,8], %p: i64[T], %s: i64[T], %g: i64[S,P], %at: i64[T])
      state(%k: f32[B,2,4,6], %v: f32[B,2,4,6]) const(%q: u8[24,8], %qs: f32[5,2], %kw: f32[12,8],
      %b: f32[24], %o: u8[8,24], %os: f32[1,5], %r: f32[3,8], %gu: f32[3,2,4,8], %d: f32[3,8,4],
      %up: f32[12,8], %down: f32[8,12]) {
    %qw: f32[24,8] = decode(%q) {dtype=f32, format=f8e4m3}
    %qd: f32[24,8] = dequantize(%qw, %qs) {block=[5, 5], dtype=f32}
    %m: f32[T,24] = matmul(%x, %qd) {transpose_b=true}
    %mb: f32[T,24] = add(%m, %b)
    %h: f32[T,4,6] = reshape(%mb) {shape=[<T>, 4, 6]}
    %n: f32[T,12] = matmul(%x, %kw) {transpose_b=true}
    %nh: f32[T,2,6] = reshape(%n) {shape=[<T>, 2, 6]}
    %k1: f32[B,2,4,6] = cache_update(%k, %nh, %at)
    %v1: f32[B,2,4,6] = cache_update(%v, %nh, %at)
    %a: f32[T,4,6] = attention(%h, %k1, %v1, %p, %s, %g) {scale=0.4, value_dim=6, window=none}
    %af: f32[T,24] = reshape(%a) {shape=[<T>, 24]}
    %ow: f32[8,24] = decode(%o) {dtype=f32, format=f8e4m3}
    %od: f32[8,24] = dequantize(%ow, %os) {block=[9, 5], dtype=f32}
    %z: f32[T,8] = matmul(%af, %od) {transpose_b=true}
    %x1: f32[T,8] = add(%x, %z)
    %w: f32[T,3] = matmul(%x1, %r) {transpose_b=true}
    %wk: f32[T,2], %ik: i64[T,2] = topk(%w) {k=2}
    %e: f32[T,8] = experts(%x1, %ik, %wk, %gu, %d) {activation="silu"}
    %u: f32[T,12] = matmul(%x1, %up) {transpose_b=true}
    %us: f32[T,12] = sigmoid(%u)
    %f: f32[T,8] = matmul(%us, %down) {transpose_b=true}
    %ef: f32[T,8] = add(%e, %f)
    %out: f32[T,8] = add(%x1, %ef)
    return %out update %k1, %v1
  }}
  %logits: f32[T,16] = matmul(%y, %head) {transpose_b=true}
  return %logits update %k2, %v2
}
"""


def graph(text: str = MODEL) -> Graph:
    made = parse_graph(text)
    return replace(made, weights={c.name: Weight(c.type) for c in made.functions[0].constants})


def values(rng: np.random.Generator, made: Graph) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for c in made.functions[0].constants:
        shape = tuple(int(d) for d in c.type.shape)
        if c.type.dtype.name == "u8":
            found[c.name] = rng.integers(0x20, 0x40, shape).astype(np.uint8)
        else:
            found[c.name] = rng.normal(size=shape) / 3
    return found


def part(weight: Weight, whole: np.ndarray, rank: int) -> np.ndarray:
    for s in weight.splits:
        assert isinstance(s, Even)
        own = (rank * s.size + np.arange(s.size)) * s.step // s.block
        whole = np.take(whole, own, s.dim)
    return whole


def inputs(rng: np.random.Generator, heads: int) -> list[np.ndarray]:
    """Return seven tokens of two sequences and empty caches of three pages."""
    sequence = np.array([0, 0, 0, 0, 0, 1, 1])
    positions = np.array([0, 1, 2, 3, 4, 0, 1])
    pages = np.array([[0, 1], [2, 0]])
    slots = pages[sequence, positions // 4] * 4 + positions % 4
    caches = [np.zeros((2, 3, heads, 4, 6)) for _ in range(2)]
    return [rng.integers(0, 16, 7), positions, sequence, pages, slots, *caches]


def run_ranks(sharded: Graph, constants: dict[str, np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    each: list[list[np.ndarray]] = []
    assert sharded.mesh is not None
    for rank in range(sharded.mesh.size):
        own = inputs(np.random.default_rng(1), 2 // sharded.mesh.tp)
        for c in sharded.functions[0].constants:
            weight = sharded.weights[c.name]
            whole = constants[c.name] if weight.data is None else weight.data
            own.append(part(weight, whole, rank))
            assert own[-1].shape == c.type.shape
        each.append(own)
    return interpret_ranks(sharded, sharded.functions[0], each, wide=True)


def test_ranks_together_compute_what_one_does():
    made = graph()
    constants = values(np.random.default_rng(0), made)
    alone = interpret(
        made.functions[0], [*inputs(np.random.default_rng(1), 2), *constants.values()], wide=True
    )
    sharded = shard_tensors(made, mesh=Mesh(tp=2))
    verify(sharded)
    assert parse_graph(print_graph(sharded)) == sharded
    outputs = run_ranks(sharded, constants)
    for logits, *_ in outputs:
        np.testing.assert_allclose(logits, alone[0], rtol=1e-9)
    for number in (1, 2):  # every rank has the caches of its own heads
        parts = [out[number] for out in outputs]
        np.testing.assert_allclose(np.concatenate(parts, 2), alone[number], rtol=1e-9)


def test_fused_and_planned_graphs_compute_the_same():
    made = graph()
    constants = values(np.random.default_rng(0), made)
    stages = pipeline(find_target("cpu"), Sharding(Mesh(tp=2), lambda *_: np.zeros(0)))
    sharded, _ = run_passes(made, {"sharded": stages["sharded"]})
    planned, _ = run_passes(sharded, {s: stages[s] for s in ("fused", "planned")})
    wanted = run_ranks(sharded, constants)
    for got, want in zip(run_ranks(planned, constants), wanted, strict=True):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-9)


def test_what_is_divided_and_where_ranks_meet():
    sharded = shard_tensors(graph(), mesh=Mesh(tp=2))
    parts = {name for name, w in sharded.weights.items() if w.splits}
    whole = {c.name for c in sharded.functions[0].constants} - parts
    assert whole == {"r"}  # every rank chooses experts alike
    layer = next(n.op.body for n in sharded.functions[0].nodes if n.op.name == "call")
    sums = [n for n in layer.nodes if n.op.name == "all_reduce"]
    assert len(sums) == 2  # attention; and experts with what is added to them
    outside = [n.op.name for n in sharded.functions[0].nodes]
    assert outside.count("all_reduce") == outside.count("all_gather") == 1


def test_heads_that_do_not_divide_stay_whole():
    sharded = shard_tensors(graph(), mesh=Mesh(tp=4))
    parts = {name for name, w in sharded.weights.items() if w.splits}
    assert {"q", "o", "kw", "b"}.isdisjoint(parts)
    assert {"up", "down", "gu", "d", "emb", "head"} <= parts


def test_nothing_to_divide():
    with pytest.raises(DiluError, match="nothing in this model can be divided among tp=5"):
        shard_tensors(graph(), mesh=Mesh(tp=5))


def test_one_rank_changes_nothing():
    assert shard_tensors(graph(), mesh=Mesh()).functions == graph().functions


@pytest.mark.parametrize(
    ("part_", "block", "ranks", "step"),
    [(256, 128, 2, 128), (128, 128, 4, 128), (68, 128, 2, 4), (36, 128, 2, 36), (80, 128, 2, 16)],
)
def test_scales_stand_for_as_many_rows_as_they_can(part_, block, ranks, step):
    assert _step(part_, block, ranks) == step
    rows = np.arange(part_ * ranks) // block
    for rank in range(ranks):
        even = Even("tp", 0, part_ // step, step, block)
        own = (rank * even.size + np.arange(even.size)) * step // block
        np.testing.assert_array_equal(np.repeat(own, step), rows[rank * part_ :][:part_])


T = symbol("T")


@pytest.mark.parametrize(
    ("before", "after", "joined"),
    [
        ((T, 24), (T, 4, 6), [(0, 0), (1, 1)]),
        ((T, 4, 6), (T, 24), [(0, 0), (1, 1)]),
        ((T, 2, 3, 4), (T, 6, 4), [(0, 0), (1, 1), (3, 2)]),
        ((T, 1, 6), (T, 6), [(0, 0), (2, 1)]),
        ((6, 4), (4, 6), [(0, 0)]),
    ],
)
def test_reshapes_join_outermost_dimensions(before, after, joined):
    f32 = graph().functions[0].constants[0].type.dtype
    types = [TensorType(f32, shape) for shape in (before, after)]
    found = links(Reshape(after), (types[0],), (types[1],))
    assert [(link.inputs[0][1], link.outputs[0][1]) for link in found] == joined
