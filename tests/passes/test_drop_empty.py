"""Values without elements: nothing computes them, and what reads them is known."""

from __future__ import annotations

import numpy as np
import pytest

from dilu.ir.dtypes import BOOL, DTYPES
from dilu.ir.interpret import interpret
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify
from dilu.passes.drop_empty import drop_empty
from dilu.passes.eliminate_dead import eliminate_dead

TEXT = """graph captured

func @main(%x: f32[3,0], %z: f32[0,4], %y: f32[T,4], %e: f32[0,4]) {
  %a: f32[0,4] = exp(%z)
  %s: f32[4] = reduce_sum(%a) {axes=[0], keepdims=false}
  %m: f32[] = reduce_max(%a) {axes=[0, 1], keepdims=false}
  %p: f32[3,4] = matmul(%x, %z) {transpose_b=false}
  %j: f32[T,4] = concat(%e, %y, %a) {axis=0}
  %r: f32[2,0,4] = reshape(%a) {shape=[2, 0, 4]}
  return %s, %m, %p, %j, %r
}
"""


def test_drop_empty(golden):
    graph = parse_graph(TEXT)
    after = eliminate_dead(drop_empty(graph))
    verify(after)
    golden("passes/drop_empty.txt", print_graph(after))
    inputs = [np.ones(s, np.float32) for s in ((3, 0), (0, 4), (2, 4), (0, 4))]
    for a, b in zip(
        interpret(graph.functions[0], inputs), interpret(after.functions[0], inputs), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [n for n, t in DTYPES.items() if not t.is_code])
@pytest.mark.parametrize("kind", ["reduce_max", "reduce_min"])
def test_the_extreme_of_nothing_is_below_or_above_all(kind, name):
    text = f"""graph captured
      func @main(%x: {name}[0]) {{
        %y: {name}[] = {kind}(%x) {{axes=[0], keepdims=false}}
        return %y
      }}"""
    graph = parse_graph(text)
    (want,) = interpret(graph.functions[0], [np.zeros(0, DTYPES[name].value)])
    (got,) = interpret(drop_empty(graph).functions[0], [np.zeros(0, DTYPES[name].value)])
    assert got == want and got.dtype == want.dtype
    assert (name == BOOL.name) == (got.dtype == np.bool_)
