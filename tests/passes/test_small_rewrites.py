"""Constant folding, powers, common and dead nodes, and taking rows early."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dilu.ir.dtypes import F32
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.types import TensorType
from dilu.ir.weights import Weight
from dilu.passes.eliminate_common import eliminate_common
from dilu.passes.eliminate_dead import eliminate_dead
from dilu.passes.expand_powers import expand_powers
from dilu.passes.fold_constants import fold_constants
from dilu.passes.hoist_take import hoist_take


def test_literals_fold_to_literals(golden, exact):
    before = parse_graph("""graph captured
func @main(%x: f32[T]) {
  %a: f32[] = literal() {dtype=f32, value=2.0}
  %b: f32[] = literal() {dtype=f32, value=0.1}
  %c: f32[] = mul(%a, %b)
  %d: f32[] = exp(%c)
  %z: f32[] = literal() {dtype=f32, value=0.0}
  %nan: f32[] = div(%z, %z)
  %e: f32[T] = mul(%x, %d)
  %y: f32[T] = call(%e) {body=func @layer(%x: f32[T]) {
    %a: i64[] = literal() {dtype=i64, value=3}
    %b: f32[] = cast(%a) {dtype=f32}
    %c: f32[T] = mul(%x, %b)
    return %c
  }, times=2}
  return %y, %nan
}""")
    after = eliminate_dead(fold_constants(before))
    exact(before, after)
    golden("passes/fold_constants.txt", print_graph(after))


def held(array: np.ndarray) -> Weight:
    return Weight(TensorType(F32, array.shape), data=array)


GRAPH = parse_graph("""graph captured
func @main(%x: f32[T,8]) const(%w: f32[8], %far: f32[8]) {
  %two: f32[] = literal() {dtype=f32, value=2.0}
  %a: f32[8] = mul(%w, %two)
  %b: f32[8] = exp(%a)
  %c: f32[8] = exp(%far)
  %d: f32[4,8] = broadcast_to(%b) {shape=[4, 8]}
  %e: f32[T,8] = mul(%x, %b)
  %g: f32[T,8] = mul(%e, %c)
  return %g, %d
}""")


def test_constants_that_are_held_are_folded_and_others_are_not(golden):
    weights = {
        "w": held(np.linspace(0, 1, 8, dtype=np.float32)),
        "far": Weight(held(np.zeros(8)).type),
    }
    after = eliminate_dead(fold_constants(replace(GRAPH, weights=weights)))
    golden("passes/fold_constants_held.txt", print_graph(after))
    assert set(after.weights) == {"b", "far"}
    data = after.weights["b"].data
    assert data is not None and np.array_equal(data, np.exp(weights["w"].data * np.float32(2)))


def test_large_constants_are_left_alone():
    weights = {"w": held(np.ones(8, np.float32)), "far": held(np.ones(8, np.float32))}
    graph = replace(GRAPH, weights=weights)
    assert fold_constants(graph, limit=7) == graph


def test_powers(golden):
    before = parse_graph("""graph captured
func @main(%x: f32[T]) {
  %two: f32[] = literal() {dtype=f32, value=2.0}
  %three: f32[] = literal() {dtype=f32, value=3.0}
  %half: f32[] = literal() {dtype=f32, value=0.5}
  %a: f32[T] = pow(%x, %two)
  %b: f32[T] = pow(%a, %three)
  %c: f32[T] = pow(%b, %half)
  return %c
}""")
    golden("passes/expand_powers.txt", print_graph(expand_powers(before)))


def test_common_and_dead(golden, exact):
    before = parse_graph("""graph captured
func @main(%x: f32[T,8]) const(%w: f32[2,8], %unread: f32[2,8], %v: f32[8]) {
  %zero: f32[] = literal() {dtype=f32, value=0.0}
  %minus: f32[] = literal() {dtype=f32, value=-0.0}
  %again: f32[] = literal() {dtype=f32, value=0.0}
  %a: f32[T,8] = add(%x, %zero)
  %b: f32[T,8] = add(%x, %minus)
  %c: f32[T,8] = add(%x, %again)
  %d: f32[T,8] = sub(%a, %c)
  %e: f32[T,8] = mul(%d, %b)
  %gone: f32[8] = exp(%v)
  %y: f32[T,8] = call(%e, %w, %unread) {body=
    func @layer(%h: f32[T,8]) const(%w: f32[8], %u: f32[8]) {
    %p: f32[8] = exp(%w)
    %q: f32[8] = exp(%w)
    %r: f32[8] = exp(%u)
    %s: f32[8] = add(%p, %q)
    %t: f32[T,8] = mul(%h, %s)
    return %t
  }, times=2}
  return %y
}""")
    after = eliminate_dead(eliminate_common(before))
    exact(before, after)
    golden("passes/eliminate.txt", print_graph(after))


def test_rows_are_taken_first(golden, exact):
    before = parse_graph("""graph captured
func @main(%x: f32[T,8], %other: f32[T,8], %r: i64[R]) const(%n: f32[8], %table: bf16[64,8]) {
  %h: f32[T,8] = add(%x, %other)
  %s: f32[T,8] = mul(%h, %h)
  %m: f32[T,1] = reduce_sum(%s) {axes=[1], keepdims=true}
  %i: f32[T,1] = rsqrt(%m)
  %a: f32[T,8] = mul(%h, %i)
  %b: f32[T,8] = mul(%a, %n)
  %c: f32[R,8] = take(%b, %r)
  %wide: f32[64,8] = cast(%table) {dtype=f32}
  %d: f32[R,8] = take(%wide, %r)
  %t: f32[8,T] = transpose(%other) {permutation=[1, 0]}
  %t2: f32[8,T] = exp(%t)
  %e: f32[R,T] = take(%t2, %r)
  return %c, %d, %e
}""")
    after = hoist_take(before)
    exact(before, after)
    golden("passes/hoist_take.txt", print_graph(after))


def test_rows_that_others_want_stay():
    before = parse_graph("""graph captured
func @main(%x: f32[T,8], %r: i64[R]) {
  %a: f32[T,8] = exp(%x)
  %b: f32[R,8] = take(%a, %r)
  return %a, %b
}""")
    assert hoist_take(before) == before
