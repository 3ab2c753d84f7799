from __future__ import annotations

import numpy as np
import pytest

from dilu.errors import DiluError
from dilu.ir.interpret import bind_sizes, constant_values, interpret
from dilu.ir.op import OPS, Op
from dilu.ir.text import parse_graph
from dilu.ir.weights import Piece, Weight


def function(text: str):
    return parse_graph("graph captured\nfunc @f" + text).functions[0]


def test_a_call_feeds_results_back_and_walks_stacks():
    """Each layer adds its weight to the hidden and keeps the hidden in its own cache row."""
    made = function("""(%x: f32[1,1,2], %bias: f32[1,1,2], %slots: i64[1])
    state(%kept: f32[3,2,1,1,2], %all: f32[3,1,1,2]) const(%w: f32[3,1,1,2], %once: f32[1]) {
  %y: f32[1,1,2], %kept_1: f32[3,2,1,1,2], %all_1: f32[3,1,1,2] =
    call(%x, %bias, %slots, %kept, %all, %w, %once) {times=3, body=
    func @layer(%h: f32[1,1,2], %bias: f32[1,1,2], %slots: i64[1])
      state(%kept: f32[2,1,1,2], %all: f32[1,1,2]) const(%w: f32[1,1,2], %once: f32[1]) {
      %k: f32[2,1,1,2] = cache_update(%kept, %h, %slots)
      %a: f32[1,1,2] = add(%h, %w)
      %b: f32[1,1,2] = add(%a, %bias)
      %c: f32[1,1,2] = mul(%b, %once)
      %d: f32[1,1,2] = add(%all, %h)
      return %c update %k, %d
    }}
  return %y update %kept_1, %all_1
}""")
    x = np.array([[[1.0, 2.0]]], np.float32)
    bias = np.full_like(x, 10)
    kept, everything = np.zeros((3, 2, 1, 1, 2), np.float32), np.zeros((3, 1, 1, 2), np.float32)
    w = np.arange(6, dtype=np.float32).reshape(3, 1, 1, 2)
    once = np.array([2.0], np.float32)
    slots = np.array([1])
    y, kept_1, all_1 = interpret(made, [x, bias, slots, kept, everything, w, once])
    h = x
    for i in range(3):
        assert np.array_equal(kept_1[i, 1, 0], h[0]) and not kept_1[i, 0].any()
        assert np.array_equal(all_1[i], h)
        h = (h + w[i] + bias) * 2
    assert np.array_equal(y, h)
    assert not kept.any(), "the caller's arrays stay as they are"


def test_every_value_is_rounded_to_its_type():
    made = function("""(%x: f32[T]) {
  %a: bf16[T] = cast(%x) {dtype=bf16}
  %b: bf16[T] = add(%a, %a)
  %c: f8e4m3[T] = cast(%b) {dtype=f8e4m3}
  return %a, %b, %c
}""")
    x = np.array([1.00390625, 3.0e38, 1000.0, -1e-9], np.float32)
    a, b, c = interpret(made, [x])
    assert a.tolist() == pytest.approx([1.0, 3.0e38, 1000.0, -1e-9], rel=2**-8)
    assert a[0] == 1.0 and b[1] == np.inf
    assert c.tolist() == [2.0, 448.0, 448.0, -0.0]
    wide_a, *_ = interpret(made, [x], wide=True)
    assert wide_a.dtype == np.float64 and wide_a[0] == 1.00390625


def test_sizes():
    made = function("(%x: f32[T,2], %y: f32[T]) {\n return %x }")
    assert bind_sizes(made, [np.zeros((3, 2)), np.zeros(3)]) == {"T": 3}
    with pytest.raises(DiluError, match="%y: size T is 4 here and 3 elsewhere"):
        bind_sizes(made, [np.zeros((3, 2)), np.zeros(4)])


def test_sizes_in_attributes_are_evaluated():
    made = function("""(%x: f32[T,2]) {
  %a: f32[2*T] = reshape(%x) {shape=[<2*T>]}
  %i: i64[2*T] = iota() {dtype=i64, size=<2*T>}
  %b: f32[T] = slice(%a) {axis=0, start=<T>, step=1, stop=<2*T>}
  return %b, %i
}""")
    b, i = interpret(made, [np.arange(6, dtype=np.float32).reshape(3, 2)])
    assert (b.tolist(), i.tolist()) == ([3, 4, 5], [0, 1, 2, 3, 4, 5])


def test_constants_in_files_are_not_values():
    graph = parse_graph("graph captured\nfunc @f() const(%w: f32[2]) {\n return %w }")
    (function,) = graph.functions
    weight = Weight(function.constants[0].type, pieces=(Piece("a", "w", 0, 8),))
    with pytest.raises(DiluError, match="data is in files"):
        constant_values(type(graph)("captured", graph.functions, {"w": weight}), function)


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_complete(name):
    """An op has its own `infer`, and a reference unless it has a body."""
    op = OPS[name]
    assert op.infer is not Op.infer
    has_body = "body" in getattr(op, "__dataclass_fields__", {})
    assert has_body or op.reference is not Op.reference
