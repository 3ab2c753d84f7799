"""Plans: arenas, views, calls of repeated layers with their states and stacked constants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dilu.ir.dtypes import F32
from dilu.ir.weights import Weight

LAYER = """
func @layer(%h: f32[T,4], %scale: f32[]) state(%cache: f32[B,1,2,4])
  const(%w: f32[4], %e: f32[2,4]) {
  %a: f32[T,4] = kernel(%h, %w, %scale) {kind="loops",
    body=func @layer_0(%h: f32[T,4], %w: f32[4], %scale: f32[]) {
    %p: f32[T,4] = mul(%h, %w)
    %a: f32[T,4] = add(%p, %scale)
    return %a
  }}
  %v: f32[2,T,2] = reshape(%a) {shape=[2,<T>,2]}
  %s: f32[T,1,4] = reshape(%v) {shape=[<T>,1,4]}
  %new: f32[B,1,2,4] = kernel(%s, %cache) {kind="cache_update",
    body=func @layer_1(%s: f32[T,1,4]) state(%cache: f32[B,1,2,4]) {
    %i: i64[T] = iota() {size=<T>, dtype=i64}
    %new: f32[B,1,2,4] = cache_update(%cache, %s, %i)
    return update %new
  }}
  %b: f32[T,4] = kernel(%a, %e, %new) {kind="loops",
    body=func @layer_2(%a: f32[T,4], %e: f32[2,4], %c: f32[B,1,2,4]) {
    %first: f32[1,4] = slice(%e) {axis=0, start=1, stop=2, step=1}
    %sum: f32[4] = reduce_sum(%c) {axes=[0,1,2], keepdims=false}
    %s: f32[T,4] = add(%a, %first)
    %b: f32[T,4] = add(%s, %sum)
    return %b
  }}
  return %b update %new
}
"""


def text(times: int) -> str:
    layer = LAYER.strip()
    return f"""graph planned
func @main(%x: f32[T,4], %scale: f32[]) state(%caches: f32[{times},B,1,2,4])
  const(%w: f32[{times},4], %e: f32[{times},2,4]) {{
  %x2: f32[T,4] = kernel(%x) {{kind="loops", body=func @main_0(%x: f32[T,4]) {{
    %y: f32[T,4] = neg(%x)
    return %y
  }}}}
  %h: f32[T,4], %caches2: f32[{times},B,1,2,4] = call(%x2, %scale, %caches, %w, %e)
    {{times={times}, body={layer}}}
  %y: f32[T,4] = kernel(%h) {{kind="loops", body=func @main_1(%x: f32[T,4]) {{
    %y: f32[T,4] = neg(%x)
    return %y
  }}}}
  return %y update %caches2
}}
"""


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_calls(compiled, reference, planned, times, pieces):
    graph = planned(text(times))
    constants = graph.functions[0].constants
    grids = {"w": min(pieces, 1), "e": pieces}
    graph = replace(graph, weights={c.name: Weight(c.type, grids[c.name]) for c in constants})
    module = compiled(graph, threads=3)
    sizes = {"T": 6, "B": 5}
    rng = np.random.default_rng(0)
    shapes = [(6, 4), (), (times, 5, 1, 2, 4), (times, 4), (times, 2, 4)]
    inputs = [rng.integers(-2, 3, s).astype(F32.storage) for s in shapes]
    got = module.run("main", inputs, sizes)
    want = reference(graph, "main", inputs, sizes)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_the_code_does_not_grow_with_depth(compiled):
    shallow, deep = (compiled(text(n)).module.source for n in (2, 100))
    assert len(deep) - len(shallow) < 200


def test_kernels_with_one_text_are_emitted_once(compiled):
    kernels = {k.name: k.function for k in compiled(text(2)).module.kernels}
    assert kernels["main_0"] == kernels["main_1"] == "kernel_main_0"
    assert kernels["layer_0"] != kernels["layer_2"]


def test_a_view_of_a_result_is_written_in_place(compiled):
    module = compiled(
        """graph planned
        func @main(%x: f32[T,6]) {
          %a: f32[T,6] = kernel(%x) {kind="loops", body=func @k(%x: f32[T,6]) {
            %a: f32[T,6] = neg(%x)
            return %a
          }}
          %b: f32[T,2,3] = reshape(%a) {shape=[<T>,2,3]}
          return %b
        }"""
    )
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    (got,) = module.run("main", [x])
    np.testing.assert_array_equal(got, -x.reshape(2, 2, 3))
