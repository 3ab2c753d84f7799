"""Sharded experts: all ranks together compute what one computes alone, however experts lie."""

from __future__ import annotations

import numpy as np
import pytest

from dilu.codegen.targets import find_target
from dilu.errors import DiluError
from dilu.ir.graph import Graph
from dilu.ir.interpret import interpret
from dilu.ir.interpret_ranks import interpret_ranks
from dilu.ir.mesh import Mesh, parse_mesh
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify
from dilu.ir.weights import Piece, Weight
from dilu.passes.manager import run_passes
from dilu.passes.pipeline import Sharding, pipeline
from dilu.passes.shard_experts import shard_experts

# Two layers of 6 experts, hidden 8, inner 4; 2 experts of a token.
MODEL = """
graph legalized
func @main(%x: f32[T,8]) const(%l.r: f32[2,6,8], %l.e.gu: u8[2,6,2,4,8], %l.e.gs: f32[2,6,2,1,1],
    %l.e.d: f32[2,6,8,4]) {
  %y: f32[T,8] = call(%x, %l.r, %l.e.gu, %l.e.gs, %l.e.d) {times=2, body=func @layer(%x: f32[T,8])
      const(%r: f32[6,8], %e.gu: u8[6,2,4,8], %e.gs: f32[6,2,1,1], %e.d: f32[6,8,4]) {
    %s: f32[T,6] = matmul(%x, %r) {transpose_b=true}
    %w: f32[T,2], %i: i64[T,2] = topk(%s) {k=2}
    %gw: f32[6,2,4,8] = decode(%e.gu) {dtype=f32, format=f8e4m3}
    %g: f32[6,2,4,8] = dequantize(%gw, %e.gs) {block=[128, 128], dtype=f32}
    %o: f32[T,8] = experts(%x, %i, %w, %g, %e.d) {activation="silu"}
    %z: f32[T,8] = add(%x, %o)
    return %z
  }}
  return %y
}
"""


def graph() -> Graph:
    made = parse_graph(MODEL)
    weights = {}
    for c in made.functions[0].constants:
        pieces = tuple(Piece("f", c.name, 0, 1) for _ in range(12)) if ".e." in c.name else ()
        weights[c.name] = Weight(c.type, 2 if pieces else 0, pieces)
    return Graph(made.stage, made.functions, weights)


def constants(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "l.r": rng.normal(size=(2, 6, 8)).astype(np.float32),
        "l.e.gu": rng.integers(0, 120, (2, 6, 2, 4, 8)).astype(np.uint8),
        "l.e.gs": rng.uniform(0.01, 0.1, (2, 6, 2, 1, 1)).astype(np.float32),
        "l.e.d": rng.normal(size=(2, 6, 8, 4)).astype(np.float32) / 4,
    }


def even(ranks: int, slots: int):
    """Return a way to place: experts one after another, those of the last slots being replicas."""

    def place(name: str, layers: int, experts: int) -> np.ndarray:
        return np.stack(
            [
                np.stack([(np.arange(slots) + r * slots + l) % experts for r in range(ranks)])
                for l in range(layers)
            ]
        )

    return place


def own_inputs(sharded: Graph, rank: int, x: np.ndarray, values: dict) -> list[np.ndarray]:
    """Return what a rank is given: its tokens, and its part of every constant."""
    function = sharded.functions[0]
    ep = sharded.mesh.coordinates(rank)["ep"] if sharded.mesh else 0
    inputs = [x]
    for c in function.constants:
        weight = sharded.weights[c.name]
        if not weight.splits:
            inputs.append(values[c.name] if weight.data is None else weight.data)
            continue
        slots = sharded.weights[weight.splits[0].placement].data[:, ep]
        inputs.append(np.stack([values[c.name][l][slots[l]] for l in range(2)]))
    return inputs


def run_ranks(sharded: Graph, tokens: list[np.ndarray], values: dict) -> list[np.ndarray]:
    inputs = [own_inputs(sharded, r, x, values) for r, x in enumerate(tokens)]
    return [out for (out,) in interpret_ranks(sharded, sharded.functions[0], inputs, wide=True)]


@pytest.mark.parametrize(("ranks", "slots"), [(2, 3), (3, 2), (2, 5), (3, 6)])
def test_ranks_together_compute_what_one_does(ranks, slots):
    rng = np.random.default_rng(ranks * 10 + slots)
    values = constants(rng)
    counts = [3, 0, 7][:ranks]
    tokens = [rng.normal(size=(n, 8)).astype(np.float32) for n in counts]
    whole = graph()
    alone = [interpret(whole.functions[0], [x, *values.values()], wide=True)[0] for x in tokens]
    sharded = shard_experts(whole, mesh=Mesh(ep=ranks), place=even(ranks, slots), capacity=4)
    verify(sharded)
    assert parse_graph(print_graph(sharded)) == sharded
    for got, want in zip(run_ranks(sharded, tokens, values), alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_where_experts_are_changes_nothing():
    rng = np.random.default_rng(4)
    values = constants(rng)
    tokens = [rng.normal(size=(n, 8)).astype(np.float32) for n in (5, 6)]
    made = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(6).reshape(2, 3)
        place = lambda name, layers, experts, order=order: np.stack([order] * layers)
        made.append(run_ranks(shard_experts(graph(), mesh=Mesh(ep=2), place=place), tokens, values))
    for other in made[1:]:
        for got, want in zip(other, made[0], strict=True):  # a product's rounding knows its batch
            np.testing.assert_allclose(got, want, rtol=1e-9)


def test_fused_and_planned_graphs_compute_the_same():
    rng = np.random.default_rng(5)
    values = constants(rng)
    tokens = [rng.normal(size=(n, 8)).astype(np.float32) for n in (4, 9)]
    sharding = Sharding(Mesh(ep=2), even(2, 4))
    stages = pipeline(find_target("cpu"), sharding)
    sharded, _ = run_passes(graph(), {"sharded": stages["sharded"]})
    planned, _ = run_passes(sharded, {s: stages[s] for s in ("fused", "planned")})
    wanted = run_ranks(sharded, tokens, values)
    for got, want in zip(run_ranks(planned, tokens, values), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_rows_are_sent_before_they_are_cast():
    cast = "    %n: bf16[T,8] = cast(%x) {dtype=bf16}\n    %v: f32[T,8] = cast(%n) {dtype=f32}\n"
    text = MODEL.replace("    %s: f32[T,6]", cast + "    %s: f32[T,6]")
    narrow = parse_graph(text.replace("experts(%x", "experts(%v"))
    narrow = Graph(narrow.stage, narrow.functions, graph().weights)
    sharded = shard_experts(narrow, mesh=Mesh(ep=2), place=even(2, 3), capacity=4)
    verify(sharded)
    printed = print_graph(sharded)
    assert "%routed: f32[T,2,8] = routed(%n, %i, " in printed
    assert "func @experts(%rows: bf16[A,8], " in printed
    assert parse_graph(printed) == sharded
    rng = np.random.default_rng(6)
    values = constants(rng)
    tokens = [rng.normal(size=(n, 8)).astype(np.float32) for n in (5, 0)]
    alone = [interpret(narrow.functions[0], [x, *values.values()], wide=True)[0] for x in tokens]
    for got, want in zip(run_ranks(sharded, tokens, values), alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_one_rank_changes_nothing():
    assert shard_experts(graph(), mesh=Mesh(), place=even(1, 6)).functions == graph().functions


def test_pieces_of_a_rank_are_those_of_its_experts():
    sharded = shard_experts(graph(), mesh=Mesh(ep=2), place=even(2, 3))
    weight = sharded.weights["l.e.gu"]
    assert [s.placement for s in weight.splits] == ["l.e.placement"]
    assert (weight.type.shape, weight.whole.shape) == ((2, 3, 2, 4, 8), (2, 6, 2, 4, 8))


@pytest.mark.parametrize("text", ["", "ep", "ep=0", "ep=x", "pp=2", "ep=2,ep=2", "ep=2 tp=2"])
def test_not_a_mesh(text):
    with pytest.raises(DiluError, match="mesh"):
        parse_mesh(text)


def test_coordinates_and_groups():
    mesh = parse_mesh("tp=2,ep=3,dp=2")
    assert mesh == Mesh(dp=2, ep=3, tp=2) and mesh.size == 12
    assert [mesh.rank(mesh.coordinates(r)) for r in range(12)] == list(range(12))
    assert mesh.groups("tp")[:2] == [(0, 1), (2, 3)]
    assert mesh.groups("ep")[0] == (0, 2, 4)
    assert mesh.groups("dp")[1] == (1, 7)
    assert parse_mesh(str(mesh)) == mesh
