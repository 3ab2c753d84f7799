"""What ranks have of every value: found from how constants are divided, and checked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dilu.errors import DiluError
from dilu.ir.graph import Graph
from dilu.ir.mesh import Mesh
from dilu.ir.placements import OWN, PART, WHOLE, infer_placements
from dilu.ir.text import parse_graph
from dilu.ir.verify import verify
from dilu.ir.weights import Even, Placed, Weight

# Two ranks: 4 of 8 columns each, then 4 of 8 rows, and 8 of 16 words.
DENSE = """
graph sharded
func @main(%t: i64[T]) const(%words: f32[8,6], %first: i64[1], %up: f32[4,6], %down: f32[6,4],
    %head: f32[8,6]) {
  %own: i64[T] = sub(%t, %first)
  %zero: i64[] = literal() {value=0, dtype=i64}
  %mine: bool[T] = ge(%own, %zero)
  %row: i64[T] = where(%mine, %own, %zero)
  %rows: f32[T,6] = take(%words, %row)
  %wide: bool[T,1] = reshape(%mine) {shape=[<T>, 1]}
  %none: f32[] = literal() {value=0.0, dtype=f32}
  %part: f32[T,6] = where(%wide, %rows, %none)
  %x: f32[T,6] = all_reduce(%part) {axis="tp"}
  %a: f32[T,4] = matmul(%x, %up) {transpose_b=true}
  %b: f32[T,4] = sigmoid(%a)
  %c: f32[T,2,2] = reshape(%b) {shape=[<T>, 2, 2]}
  %d: f32[T,4] = reshape(%c) {shape=[<T>, 4]}
  %e: f32[T,6] = matmul(%d, %down) {transpose_b=true}
  %y: f32[T,6] = all_reduce(%e) {axis="tp"}
  %z: f32[T,6] = add(%x, %y)
  %l: f32[T,8] = matmul(%z, %head) {transpose_b=true}
  %logits: f32[T,16] = all_gather(%l) {axis="tp", dim=1, ranks=2}
  return %logits
}
"""
DIVIDED = {"words": 0, "first": 0, "up": 0, "down": 1, "head": 0}


def dense(text: str = DENSE, **divided: int | None) -> Graph:
    graph = parse_graph(text)
    weights = {}
    for c in graph.functions[0].constants:
        dim = {**DIVIDED, **divided}.get(c.name)
        splits = () if dim is None else (Even("tp", dim, int(c.type.shape[dim])),)
        weights[c.name] = Weight(c.type, splits=splits)
    return replace(graph, weights=weights, mesh=Mesh(tp=2))


def test_what_ranks_have():
    graph = dense()
    verify(graph)
    found = infer_placements(graph, graph.functions[0])
    assert {name: placements for name, placements in found.items() if placements != {WHOLE}} == {
        "words": {0}, "first": {OWN}, "own": {OWN}, "mine": {OWN}, "row": {OWN}, "rows": {OWN},
        "wide": {OWN}, "part": {OWN}, "up": {0}, "a": {1}, "b": {1}, "c": {1}, "d": {1},
        "down": {1}, "e": {PART}, "head": {0}, "l": {1},
    }  # fmt: skip


def test_one_head_on_each_rank_may_be_either_of_two_dimensions():
    text = DENSE.replace("f32[T,2,2]", "f32[T,1,4]").replace("[<T>, 2, 2]", "[<T>, 1, 4]")
    graph = dense(text)
    verify(graph)
    assert infer_placements(graph, graph.functions[0])["c"] == {1, 2}


@pytest.mark.parametrize(
    ("old", "new", "divided", "message"),
    [
        ("%e: f32[T,6]", "%y: f32[T,6]", {}, "%z: .*%y is a part of a sum"),
        ("%z: f32[T,6] = add(%x, %y)",
         "%w: f32[T,6] = all_reduce(%y) {axis=\"tp\"}\n  %z: f32[T,6] = add(%x, %w)", {},
         "%y is no part of a sum, but whole"),
        ("add(%x, %y)", "add(%y, %e)", {}, "%e is a part of a sum"),
        ("", "", {"down": 0}, "%d is divided .* 1, %down is divided along dimension 0"),
        ("", "", {"down": None}, "%d is divided along dimension 1, %down is whole"),
        ("", "", {"up": 1}, "%x is whole, %up is divided along dimension 1"),
        ("", "", {"head": None}, "%l is whole"),
        ("take(%words, %row)", "take(%words, %t)", {}, "%words is divided along dimension 0"),
        ("f32[T,16] = all_gather(%l) {axis=\"tp\", dim=1, ranks=2}",
         "f32[T,32] = all_gather(%l) {axis=\"tp\", dim=1, ranks=4}", {}, "the mesh is tp=2"),
        ("%logits: f32[T,16] = all_gather(%l) {axis=\"tp\", dim=1, ranks=2}",
         "%logits: f32[2*T,8] = all_gather(%l) {axis=\"tp\", dim=0, ranks=2}", {},
         "%l is divided along dimension 1"),
        ("all_reduce(%e) {axis=\"tp\"}", "all_reduce(%e) {axis=\"ep\"}", {}, "divided along ep"),
        ("return %logits", "return %l", {}, "%l is not the same on all ranks, but divided"),
        ("return %logits", "return %e", {}, "%e is not the same on all ranks, but a part of"),
        ("return %logits", "return %own", {}, "but a rank's own"),
    ],
)  # fmt: skip
def test_what_does_not_fit(old, new, divided, message):
    text = DENSE.replace(old, new) if old else DENSE
    if old.startswith("%e:"):  # without the sum, its name is the part's
        text = text.replace('  %y: f32[T,6] = all_reduce(%e) {axis="tp"}\n', "")
    assert text != DENSE or divided
    with pytest.raises(DiluError, match=message):
        verify(dense(text, **divided))


CACHED = """
graph sharded
func @main(%x: f32[T,6], %s: i64[T]) state(%k: f32[4,B,2,4,3]) const(%w: f32[4,6,6]) {
  %y: f32[T,6], %k2: f32[4,B,2,4,3] = call(%x, %s, %k, %w) {times=4, body=func
      @layer(%x: f32[T,6], %s: i64[T]) state(%k: f32[B,2,4,3]) const(%w: f32[6,6]) {
    %a: f32[T,6] = matmul(%x, %w) {transpose_b=true}
    %h: f32[T,2,3] = reshape(%a) {shape=[<T>, 2, 3]}
    %k1: f32[B,2,4,3] = cache_update(%k, %h, %s)
    return %x update %k1
  }}
  return %y update %k2
}
"""


@pytest.mark.parametrize(("splits", "state"), [((), WHOLE), ((Even("tp", 1, 6),), 2)])
def test_what_caches_hold_follows_from_their_updates(splits, state):
    """Two heads here are all that there are, or half of four."""
    graph = parse_graph(CACHED)
    weights = {"w": Weight(graph.functions[0].constants[0].type, splits=splits)}
    graph = replace(graph, weights=weights, mesh=Mesh(tp=2))
    verify(graph)
    assert infer_placements(graph, graph.functions[0])["k"] == {state}


ROUTED = """
graph sharded
func @main(%x: f32[T,8], %i: i64[T,2])
    const(%l.p: i64[3,2,2], %l.q: i64[3,2,2], %l.w: f32[3,2,8,8]) {
  %y: f32[T,8] = call(%x, %i, %l.p, %l.q, %l.w) {times=3, body=func
      @layer(%x: f32[T,8], %i: i64[T,2]) const(%p: i64[2,2], %q: i64[2,2], %w: f32[2,8,8]) {
    %e: f32[T,2,8] = routed(%x, %i, %p, %w) {axis="ep", capacity=4, body=func
        @experts(%rows: f32[A,8], %slots: i64[A,1]) const(%w: f32[2,8,8]) {
      %one: f32[1,8,8] = slice(%w) {axis=0, start=0, stop=1, step=1}
      %m: f32[8,8] = reshape(%one) {shape=[8, 8]}
      %o: f32[A,8] = matmul(%rows, %m) {transpose_b=true}
      return %o
    }}
    %z: f32[T,8] = reduce_sum(%e) {axes=[1], keepdims=false}
    return %z
  }}
  return %y
}
"""


def routed(text: str = ROUTED, ep: int = 2, by: str | None = "l.p") -> Graph:
    graph = parse_graph(text)
    weights = {c.name: Weight(c.type) for c in graph.functions[0].constants}
    if by is not None:
        weights["l.w"] = replace(weights["l.w"], splits=(Placed("ep", 1, by),))
    return replace(graph, weights=weights, mesh=Mesh(ep=ep))


def test_experts_are_held_as_their_placement_says():
    verify(routed())
    for by in ("l.q", None):
        with pytest.raises(DiluError, match="%p does not say which part of %w a rank holds"):
            verify(routed(by=by))
    with pytest.raises(DiluError, match="the mesh is ep=4"):
        verify(routed(ep=4))


def test_experts_of_a_rank_are_read_where_rows_are_routed_alone():
    line = "    %z: f32[T,8] = reduce_sum(%e)"
    text = ROUTED.replace(line, "    %n: f32[2,8,8] = neg(%w)\n" + line)
    with pytest.raises(DiluError, match=r"%n.*used by no `routed`"):
        verify(routed(text))


def test_a_collective_that_the_other_ranks_do_not_meet():
    text = ROUTED.replace("%o: f32[A,8] = matmul", "%u: f32[A,8] = matmul")
    text = text.replace("return %o", '%o: f32[A,8] = all_reduce(%u) {axis="tp"}\n      return %o')
    with pytest.raises(DiluError, match="do not take part in what a rank runs by itself"):
        verify(routed(text))
