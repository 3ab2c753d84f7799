"""Attention, top-k and cache updates, compiled and run, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from dilu.ir.dtypes import decode

G, B, P = 4, 7, 3
BOUND = 2e-6


def attention_text(name: str, heads: str, model: str, window: str, value_dim: int) -> str:
    h, kv, d, dv = heads.split()
    cache = f"%keys: {model}[B,{kv},{G},{d}], %values: {model}[B,{kv},{G},{dv}]"
    meta = "%positions: i64[T], %sequence: i64[T], %pages: i64[S,P]"
    return f"""
    func @{name}(%q: {model}[T,{h},{d}], {meta}) state({cache}) {{
      %o: {model}[T,{h},{value_dim}] = kernel(%q, %keys, %values, %positions, %sequence, %pages)
        {{kind="attention", body=func @{name}_kernel(%q: {model}[T,{h},{d}], {cache}, {meta}) {{
        %o: {model}[T,{h},{value_dim}] =
          attention(%q, %keys, %values, %positions, %sequence, %pages)
          {{scale=0.3, value_dim={value_dim}, window={window}}}
        return %o
      }}}}
      return %o update %keys, %values
    }}
    """


def latent_text() -> str:
    """One cache for keys and values, as absorbed latent attention uses it."""
    meta = "%positions: i64[T], %sequence: i64[T], %pages: i64[S,P]"
    cache = f"f32[B,1,{G},24]"
    return f"""
    func @latent(%q: f32[T,6,24], {meta}) state(%cache: {cache}) {{
      %o: f32[T,6,16] = kernel(%q, %cache, %cache, %positions, %sequence, %pages)
        {{kind="attention",
         body=func @latent_kernel(%q: f32[T,6,24], %k: {cache}, %v: {cache}, {meta}) {{
        %o: f32[T,6,16] = attention(%q, %k, %v, %positions, %sequence, %pages)
          {{scale=0.2, value_dim=16, window=none}}
        return %o
      }}}}
      return %o update %cache
    }}
    """


ATTENTION = "graph planned\n" + "".join(
    [
        attention_text("grouped", "6 2 20 20", "f32", "none", 20),
        attention_text("windowed", "4 4 8 12", "f32", "3", 12),
        attention_text("half", "4 1 16 16", "bf16", "none", 8),
        latent_text(),
    ]
)


def batch(rng: np.random.Generator):
    """Two sequences, of 9 and 5 tokens, of which the last 4 and 3 are computed."""
    positions = np.array([5, 6, 7, 8, 2, 3, 4])
    sequence = np.array([0, 0, 0, 0, 1, 1, 1])
    pages = rng.permutation(B)[: 2 * P].reshape(2, P)
    return positions, sequence, pages


def test_attention(compiled, reference, random_inputs):
    module = compiled(ATTENTION)
    sizes = {"T": 7, "S": 2, "P": P, "B": B}
    for f in module.graph.functions:
        inputs = random_inputs(f, sizes, 3)
        inputs[1:4] = batch(np.random.default_rng(0))
        got = decode(f.results[0].type.dtype, module.run(f.name, inputs, sizes)[0])
        want = reference(module.graph, f.name, inputs, sizes, wide=True)[0]
        bound = 1e-2 if f.name == "half" else BOUND
        np.testing.assert_allclose(got, want, atol=bound, err_msg=f.name)


def test_attention_where_scores_are_minus_infinity(compiled, reference, random_inputs):
    """Keys of -inf that positive queries meet: the first ones of a sequence, or all of one."""
    module = compiled(ATTENTION)
    sizes = {"T": 7, "S": 2, "P": P, "B": B}
    for f in module.graph.functions:
        if f.name == "half":
            continue  # the same kernel; its inputs are not f32
        inputs = random_inputs(f, sizes, 3)
        inputs[0] = np.abs(inputs[0])
        _, sequence, pages = inputs[1:4] = batch(np.random.default_rng(0))
        if f.name == "latent":
            inputs[4][pages[1]] = np.float32(-1e38)  # a value, too, so that it has to be finite
            inputs[0] *= 100
        else:
            inputs[4][pages[0, 0]] = inputs[4][pages[1]] = -np.inf
        got = module.run(f.name, inputs, sizes)[0]
        want = reference(module.graph, f.name, inputs, sizes)[0]
        np.testing.assert_allclose(got, want, atol=BOUND, err_msg=f.name)
        assert (got[sequence == 1] == 0).all() and np.isfinite(got).all()


TOPK = """graph planned
func @both(%x: f32[T,40]) {
  %v: f32[T,5], %i: i64[T,5] = kernel(%x) {kind="topk", body=func @both_kernel(%x: f32[T,40]) {
    %v: f32[T,5], %i: i64[T,5] = topk(%x) {k=5}
    return %v, %i
  }}
  return %v, %i
}
func @smallest(%x: f32[T,40]) {
  %v: f32[T,40], %i: i64[T,40] = kernel(%x) {kind="topk",
    body=func @smallest_kernel(%x: f32[T,40]) {
    %v: f32[T,40], %i: i64[T,40] = topk(%x) {k=40, largest=false}
    return %v, %i
  }}
  return %v, %i
}
func @places(%x: bf16[2,T,40]) {
  %i: i64[2,T,3] = kernel(%x) {kind="topk", body=func @places_kernel(%x: bf16[2,T,40]) {
    %v: bf16[2,T,3], %i: i64[2,T,3] = topk(%x) {k=3}
    return %i
  }}
  return %i
}
func @all(%x: i64[T,4]) {
  %v: i64[T,4] = kernel(%x) {kind="topk", body=func @all_kernel(%x: i64[T,4]) {
    %v: i64[T,4], %i: i64[T,4] = topk(%x) {k=4}
    return %v
  }}
  return %v
}
"""


def test_topk(compiled, reference, random_inputs):
    module = compiled(TOPK)
    for size in (1, 6):
        for f in module.graph.functions:
            inputs = random_inputs(f, {"T": size}, size)
            if f.name in ("both", "smallest"):
                inputs[0] = np.round(inputs[0])  # many equals: the first comes first
                inputs[0][0, 3:8] = [np.inf, -np.inf, np.nan, np.nan, -0.0]
            got = module.run(f.name, inputs, {"T": size})
            want = reference(module.graph, f.name, inputs, {"T": size})
            for value, g, w in zip(f.results, got, want, strict=True):
                np.testing.assert_array_equal(decode(value.type.dtype, g), w, f.name)


UPDATE = f"""graph planned
func @main(%x: f32[T,2,6], %slots: i64[T]) state(%cache: bf16[B,2,{G},6]) {{
  %new: bf16[B,2,{G},6] = kernel(%x, %slots, %cache) {{kind="cache_update",
    body=func @update(%x: f32[T,2,6], %slots: i64[T]) state(%cache: bf16[B,2,{G},6]) {{
    %two: f32[] = literal() {{value=2.0, dtype=f32}}
    %y: f32[T,2,6] = mul(%x, %two)
    %a: f32[T,2,3] = slice(%y) {{axis=2, start=0, stop=3, step=1}}
    %b: f32[T,2,3] = slice(%y) {{axis=2, start=3, stop=6, step=1}}
    %j: f32[T,2,6] = concat(%b, %a) {{axis=2}}
    %c: bf16[T,2,6] = cast(%j) {{dtype=bf16}}
    %new: bf16[B,2,{G},6] = cache_update(%cache, %c, %slots)
    return update %new
  }}}}
  return update %new
}}
"""


def test_cache_update(compiled, reference, random_inputs):
    module = compiled(UPDATE)
    sizes = {"T": 5, "B": B}
    (f,) = module.graph.functions
    inputs = random_inputs(f, sizes)
    inputs[1] = np.array([9, 0, 27, 3, 14])
    (got,) = module.run("main", inputs, sizes)
    (want,) = reference(module.graph, "main", inputs, sizes)
    np.testing.assert_array_equal(decode(f.states[0].type.dtype, got), want)
    inputs[1] = np.array([-1, B * G, 2**62, -(2**62), -5])  # padding: nothing is written
    (got,) = module.run("main", inputs, sizes)
    np.testing.assert_array_equal(got, inputs[2])


@pytest.mark.parametrize("threads", [1, 3])
def test_attention_is_the_same_for_any_number_of_threads(compiled, random_inputs, threads):
    sizes = {"T": 7, "S": 2, "P": P, "B": B}
    one, many = compiled(ATTENTION, threads=1), compiled(ATTENTION, threads=threads)
    for f in one.graph.functions:
        inputs = random_inputs(f, sizes, 5)
        inputs[1:4] = batch(np.random.default_rng(1))
        a, b = (m.run(f.name, inputs, sizes)[0] for m in (one, many))
        np.testing.assert_array_equal(a, b)
