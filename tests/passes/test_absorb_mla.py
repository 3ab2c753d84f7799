"""Latent attention: the rewritten graph computes the same, and its cache holds the latent."""

from __future__ import annotations

import numpy as np
import pytest

from dilu.ir.graph import Graph
from dilu.ir.interpret import interpret
from dilu.ir.text import parse_graph
from dilu.ir.types import evaluate
from dilu.ir.verify import verify
from dilu.passes.absorb_mla import absorb_mla
from dilu.passes.eliminate_dead import eliminate_dead

# Heads 2, N 3, R 2, V 4, latent 5; hidden 7; two layers.
MODEL = """
graph normalized
func @main(%x: f32[T,7], %slots: i64[T], %positions: i64[T], %sequence: i64[T], %pages: i64[S,P])
    state(%keys: f32[2,B,2,4,5], %values: f32[2,B,2,4,4])
    const(%wq: f32[2,10,7], %wa: f32[2,7,7], %wb: f32[2,14,5], %wo: f32[2,7,8]) {
  %y: f32[T,7], %keys_1: f32[2,B,2,4,5], %values_1: f32[2,B,2,4,4] =
      call(%x, %slots, %positions, %sequence, %pages, %keys, %values, %wq, %wa, %wb, %wo)
      {times=2, body=func @layer(%x: f32[T,7], %slots: i64[T], %positions: i64[T],
          %sequence: i64[T], %pages: i64[S,P]) state(%k_cache: f32[B,2,4,5], %v_cache: f32[B,2,4,4])
          const(%wq: f32[10,7], %wa: f32[7,7], %wb: f32[14,5], %wo: f32[7,8]) {
    %q: f32[T,10] = matmul(%x, %wq) {transpose_b=true}
    %q1: f32[1,T,2,5] = reshape(%q) {shape=[1, <T>, 2, 5]}
    %q2: f32[1,2,T,5] = transpose(%q1) {permutation=[0, 2, 1, 3]}
    %a: f32[T,7] = matmul(%x, %wa) {transpose_b=true}
    %c: f32[T,5] = slice(%a) {axis=1, start=0, stop=5, step=1}
    %rot: f32[T,2] = slice(%a) {axis=1, start=5, stop=7, step=1}
    %turned: f32[T,2] = sin(%rot)
    %r1: f32[1,1,T,2] = reshape(%turned) {shape=[1, 1, <T>, 2]}
    %r2: f32[1,2,T,2] = broadcast_to(%r1) {shape=[1, 2, <T>, 2]}
    %b: f32[T,14] = matmul(%c, %wb) {transpose_b=true}
    %b1: f32[1,T,2,7] = reshape(%b) {shape=[1, <T>, 2, 7]}
    %b2: f32[1,2,T,7] = transpose(%b1) {permutation=[0, 2, 1, 3]}
    %k0: f32[1,2,T,3] = slice(%b2) {axis=3, start=0, stop=3, step=1}
    %v0: f32[1,2,T,4] = slice(%b2) {axis=3, start=3, stop=7, step=1}
    %k1: f32[1,2,T,5] = concat(%k0, %r2) {axis=3}
    %k2: f32[1,T,2,5] = transpose(%k1) {permutation=[0, 2, 1, 3]}
    %k: f32[T,2,5] = reshape(%k2) {shape=[<T>, 2, 5]}
    %v1: f32[1,T,2,4] = transpose(%v0) {permutation=[0, 2, 1, 3]}
    %v: f32[T,2,4] = reshape(%v1) {shape=[<T>, 2, 4]}
    %q3: f32[1,T,2,5] = transpose(%q2) {permutation=[0, 2, 1, 3]}
    %q4: f32[T,2,5] = reshape(%q3) {shape=[<T>, 2, 5]}
    %k_new: f32[B,2,4,5] = cache_update(%k_cache, %k, %slots)
    %v_new: f32[B,2,4,4] = cache_update(%v_cache, %v, %slots)
    %o: f32[T,2,4] = attention(%q4, %k_new, %v_new, %positions, %sequence, %pages)
        {scale=0.5, value_dim=4, window=none}
    %o1: f32[T,8] = reshape(%o) {shape=[<T>, 8]}
    %o2: f32[T,7] = matmul(%o1, %wo) {transpose_b=true}
    %out: f32[T,7] = add(%o2, %x)
    return %out update %k_new, %v_new
  }}
  return %y update %keys_1, %values_1
}
"""


def run(graph: Graph) -> np.ndarray:
    """Run a prompt of six tokens of two sequences; return the hidden states."""
    rng = np.random.default_rng(5)
    function = graph.functions[0]
    positions = np.array([0, 1, 2, 3, 0, 1])
    sequence = np.array([0, 0, 0, 0, 1, 1])
    given = {"slots": positions + 4 * sequence, "positions": positions, "sequence": sequence}
    given["pages"] = np.array([[0], [1]])
    sizes = {"T": 6, "S": 2, "P": 1, "B": 2}
    inputs = []
    for value in function.inputs:
        shape = [evaluate(d, sizes) for d in value.type.shape]
        state = value in function.states
        inputs.append(
            given.get(value.name, np.zeros(shape) if state else rng.normal(size=shape) / 2)
        )
    return interpret(function, inputs, sizes, wide=True)[0]


def test_latent_attention_computes_the_same():
    graph = parse_graph(MODEL)
    verify(graph)
    absorbed = absorb_mla(graph)
    verify(absorbed)
    np.testing.assert_allclose(run(absorbed), run(graph), rtol=1e-12, atol=1e-13)


def test_the_cache_holds_the_latent():
    function = eliminate_dead(absorb_mla(parse_graph(MODEL))).functions[0]
    assert [str(s.type) for s in function.states] == ["f32[2,B,1,4,7]"]
    (call,) = function.nodes
    assert [str(s.type) for s in call.op.body.states] == ["f32[B,1,4,7]"]


#: A rotary part for each head, where the model has one for all.
ROTARY_FOR_ALL = """sin(%rot)
    %r1: f32[1,1,T,2] = reshape(%turned) {shape=[1, 1, <T>, 2]}
    %r2: f32[1,2,T,2] = broadcast_to(%r1) {shape=[1, 2, <T>, 2]}"""
ROTARY_BY_HEAD = """sin(%rot)
    %r1: f32[T,4] = concat(%turned, %rot) {axis=1}
    %r3: f32[1,T,2,2] = reshape(%r1) {shape=[1, <T>, 2, 2]}
    %r2: f32[1,2,T,2] = transpose(%r3) {permutation=[0, 2, 1, 3]}"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("start=3, stop=7, step=1}", "start=2, stop=6, step=1}"),
        (ROTARY_FOR_ALL, ROTARY_BY_HEAD),
    ],
    ids=["values overlap keys", "rotary part differs by head"],
)
def test_other_attention_is_left_alone(old: str, new: str):
    assert old in MODEL
    graph = parse_graph(MODEL.replace(old, new))
    verify(graph)
    assert absorb_mla(graph) == graph
