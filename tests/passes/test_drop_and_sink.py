"""Axes of one, and views behind the work on them."""

from __future__ import annotations

from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify
from dilu.passes.drop_unit_axes import drop_unit_axes
from dilu.passes.eliminate_common import eliminate_common
from dilu.passes.eliminate_dead import eliminate_dead
from dilu.passes.simplify_identities import simplify_identities
from dilu.passes.sink_views import sink_views


def tidy(graph):
    return eliminate_dead(eliminate_common(simplify_identities(graph)))


def test_units_are_dropped(golden, exact):
    before = parse_graph("""graph captured
func @main(%x: f32[1,T,8], %i: i64[1,R], %w: f32[1,1,8], %y: f32[1,T,1,8]) {
  %a: f32[1,T,8] = exp(%x)
  %b: f32[1,T,8] = mul(%a, %w)
  %s: f32[1,T,1] = reduce_sum(%b) {axes=[2], keepdims=true}
  %c: f32[1,T,8] = div(%b, %s)
  %m: f32[T] = reduce_max(%c) {axes=[0, 2], keepdims=false}
  %t: f32[T,1,8] = transpose(%c) {permutation=[1, 0, 2]}
  %l: f32[1,T,4] = slice(%c) {axis=2, start=0, step=1, stop=4}
  %j: f32[1,T,12] = concat(%l, %c) {axis=2}
  %k: f32[1,R,1,8] = take(%t, %i)
  %top: f32[1,T,2], %at: i64[1,T,2] = topk(%j) {k=2}
  %again: f32[1,T,2] = take_along(%j, %at)
  %d: f32[3,T,8] = broadcast_to(%c) {shape=[3, <T>, 8]}
  %e: f32[1,T,1,8] = add(%y, %w)
  %z: i64[1,T] = argmax(%c)
  return %m, %t, %k, %top, %again, %d, %e, %z
}""")
    after = tidy(drop_unit_axes(before))
    verify(after)
    exact(before, after)
    golden("passes/drop_unit_axes.txt", print_graph(after))


def test_batches_meet_a_matrix_as_rows(golden):
    before = parse_graph("""graph captured
func @main(%x: f32[S,T,8], %y: f32[1,M,T,8], %z: f32[1,M,N,8]) const(%w: f32[4,8]) {
  %a: f32[S,T,4] = matmul(%x, %w) {transpose_b=true}
  %b: f32[1,M,T,N] = matmul(%y, %z) {transpose_b=true}
  return %a, %b
}""")
    after = tidy(drop_unit_axes(before))
    verify(after)
    golden("passes/drop_unit_axes_matmul.txt", print_graph(after))


def test_heads_and_back(golden, exact):
    before = parse_graph("""graph captured
func @main(%x: f32[T,32], %cos: f32[T,8], %sin: f32[T,8]) {
  %h: f32[T,4,8] = reshape(%x) {shape=[<T>, 4, 8]}
  %t: f32[4,T,8] = transpose(%h) {permutation=[1, 0, 2]}
  %a: f32[4,T,8] = mul(%t, %cos)
  %l: f32[4,T,4] = slice(%t) {axis=2, start=0, step=1, stop=4}
  %r: f32[4,T,4] = slice(%t) {axis=2, start=4, step=1, stop=8}
  %n: f32[4,T,4] = neg(%r)
  %c: f32[4,T,8] = concat(%n, %l) {axis=2}
  %b: f32[4,T,8] = mul(%c, %sin)
  %y: f32[4,T,8] = add(%a, %b)
  %m: f32[4,1,8] = reduce_max(%t) {axes=[1], keepdims=true}
  %k: f32[4,8] = reduce_max(%t) {axes=[1], keepdims=false}
  %o: f32[T,4,8] = transpose(%y) {permutation=[1, 0, 2]}
  %z: f32[T,32] = reshape(%o) {shape=[<T>, 32]}
  return %z, %m, %k
}""")
    after = tidy(sink_views(before))
    verify(after)
    exact(before, after)
    golden("passes/sink_views.txt", print_graph(after))


def test_work_on_a_reshaped_value(golden, exact):
    before = parse_graph("""graph captured
func @main(%x: f32[T,32], %y: f32[T,4,8], %w: f32[8]) {
  %two: f32[] = literal() {dtype=f32, value=2.0}
  %once: f32[T,4,8] = reshape(%x) {shape=[<T>, 4, 8]}
  %a: f32[T,4,8] = mul(%once, %two)
  %h: f32[T,4,8] = reshape(%x) {shape=[<T>, 4, 8]}
  %b: bf16[T,4,8] = cast(%a) {dtype=bf16}
  %c: f32[T,4,8] = mul(%h, %w)
  %d: f32[T,4,8] = add(%h, %y)
  return %b, %c, %d
}""")
    after = tidy(sink_views(before))
    verify(after)
    exact(before, after)
    golden("passes/sink_views_reshape.txt", print_graph(after))


def test_no_transpose_of_a_large_value_is_added():
    before = parse_graph("""graph captured
func @main(%x: f32[T,M,8], %y: f32[M,T,8]) {
  %t: f32[M,T,8] = transpose(%x) {permutation=[1, 0, 2]}
  %a: f32[M,T,8] = add(%t, %y)
  return %a
}""")
    assert sink_views(before) == before
