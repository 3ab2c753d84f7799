from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dilu.errors import UnsupportedError
from dilu.ir.dtypes import F8E4M3, F8E5M2, U8, encode
from dilu.ir.graph import Graph
from dilu.ir.interpret import interpret
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify
from dilu.ir.weights import Piece, Weight
from dilu.passes.eliminate_dead import eliminate_dead
from dilu.passes.legalize_float8 import legalize_float8

TEXT = """graph normalized
func @main(%x: f32[T,6], %p: f8e4m3[T,6], %i: i64[R], %m: bool[T,6])
    const(%w: f8e4m3[2,4,6], %s: f8e8m0[2,2,1], %b: f32[2,1,1], %v: f8e5m2[2,4,6]) {
  %q: f8e4m3[T,6] = cast(%x) {dtype=f8e4m3}
  %rows: f8e4m3[R,6] = take(%q, %i)
  %mixed: f8e4m3[T,6] = where(%m, %q, %p)
  %sum: f8e4m3[T,6] = add(%mixed, %p)
  %near: f8e5m2[T,6] = cast(%sum) {dtype=f8e5m2}
  %narrow: f16[T,6] = cast(%near) {dtype=f16}
  %order: bool[T,6] = lt(%q, %p)
  %half: f8e4m3[] = literal() {dtype=f8e4m3, value=0.5}
  %scaled: f8e4m3[T,6] = mul(%p, %half)
  %y: f32[T,6] = call(%x, %w, %s, %v, %b) {times=2, body=
    func @layer(%h: f32[T,6])
      const(%w: f8e4m3[4,6], %s: f8e8m0[2,1], %v: f8e5m2[4,6], %b: f32[1,1]) {
      %d: f32[4,6] = dequantize(%w, %s) {block=[3, 6], dtype=f32}
      %e: f32[4,6] = dequantize(%v, %b) {block=[4, 6], dtype=f32}
      %a: f32[T,4] = matmul(%h, %d) {transpose_b=true}
      %c: f32[T,6] = matmul(%a, %e) {transpose_b=false}
      return %c
    }}
  return %rows, %sum, %narrow, %order, %scaled, %y
}"""


def test_golden_and_bits(golden, exact):
    before = parse_graph(TEXT)
    after = legalize_float8(before, native=frozenset())
    verify(after)
    golden("passes/legalize_float8.txt", print_graph(after))

    # Results of narrow types are codes now; the others are the same numbers.
    exact(wide_results(before), wide_results(after))
    partly = print_graph(legalize_float8(before, native=frozenset({F8E4M3, F8E5M2})))
    assert "%s: u8[2,2,1]" in partly and "%w: f8e4m3[2,4,6]" in partly


def wide_results(graph: Graph) -> Graph:
    """Return a graph without the results whose type legalization changes."""
    (f,) = graph.functions
    kept = tuple(f.results[i] for i in (2, 3, 5))
    return replace(graph, functions=(replace(f, results=kept),))


def test_codes_of_results():
    """What leaves as codes are the codes of what left as numbers."""
    before = parse_graph("""graph normalized
func @main(%x: f32[T]) {
  %y: f8e4m3[T] = cast(%x) {dtype=f8e4m3}
  return %y
}""")
    after = legalize_float8(before, native=frozenset())
    x = np.linspace(-600, 600, 999, dtype=np.float32)
    (numbers,), (codes,) = (interpret(g.functions[0], [x]) for g in (before, after))
    assert codes.dtype == np.uint8
    assert np.array_equal(encode(F8E4M3, numbers), codes)


def test_native_types_stay():
    before = parse_graph("""graph normalized
func @main(%x: f8e4m3[T]) {
  %y: f32[T] = cast(%x) {dtype=f32}
  return %y
}""")
    after = legalize_float8(before, native=frozenset({F8E4M3}))
    assert after.functions == before.functions


def test_weights_stay_the_same_bytes():
    before = parse_graph("""graph normalized
func @main(%x: f32[T,6]) const(%w: f8e4m3[4,6], %s: f32[1,1]) {
  %d: f32[4,6] = dequantize(%w, %s) {block=[128, 128], dtype=f32}
  %y: f32[T,4] = matmul(%x, %d) {transpose_b=true}
  return %y
}""")
    (w, _) = before.functions[0].constants
    weight = Weight(w.type, pieces=(Piece("a.safetensors", "w", 8, 24),))
    after = legalize_float8(replace(before, weights={"w": weight}), native=frozenset())
    assert after.weights["w"] == replace(weight, type=w.type.with_dtype(U8))
    verify(after)


def test_four_bits_are_refused():
    before = parse_graph("""graph normalized
func @main(%x: f4e2m1[T]) {
  %y: f32[T] = cast(%x) {dtype=f32}
  return %y
}""")
    with pytest.raises(
        UnsupportedError, match=r"f4e2m1\[T\]: values of f4e2m1 .* not supported yet"
    ):
        legalize_float8(before, native=frozenset())


def test_dead_codes_leave_nothing():
    before = parse_graph(TEXT)
    after = eliminate_dead(legalize_float8(before, native=frozenset()))
    verify(after)
