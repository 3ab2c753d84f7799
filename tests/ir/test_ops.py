"""What ops refuse, and what the less obvious ones compute."""

from __future__ import annotations

import numpy as np
import pytest

from dilu.errors import DiluError
from dilu.ir.interpret import interpret
from dilu.ir.text import parse_graph
from dilu.ir.verify import verify


def run(text: str, *inputs: np.ndarray):
    graph = parse_graph("graph legalized\nfunc @f" + text)
    verify(graph)
    return interpret(graph.functions[0], inputs)


@pytest.mark.parametrize(
    ("head", "node", "message"),
    [
        ("%x: f32[T], %y: bf16[T]", "%z: f32[T] = add(%x, %y)", "equal element types"),
        ("%x: i64[T]", "%z: i64[T] = exp(%x)", "takes a float"),
        ("%x: f32[T]", "%z: f32[T] = logical_not(%x)", "takes bool"),
        ("%x: f32[T]", "%z: f32[T] = where(%x, %x, %x)", "bool condition"),
        ("%x: f32[T,4]", "%z: f32[T,5] = reshape(%x) {shape=[<T>, 5]}", "number of elements"),
        ("%x: f32[T,4]", "%z: f32[T,4] = transpose(%x) {permutation=[0, 0]}", "no permutation"),
        ("%x: f32[T,4]", "%z: f32[T] = broadcast_to(%x) {shape=[<T>]}", "cannot be broadcast"),
        ("%x: f32[4]", "%z: f32[4] = slice(%x) {axis=1, start=0, step=1, stop=4}", "bad slice"),
        ("%x: f32[9]", "%z: f32[4,3] = windows(%x) {axis=0, count=4, dilation=1, size=3, stride=3}",
         "windows reach up to 12"),
        ("%x: f32[9]", "%z: f32[4,3] = windows(%x) {axis=1, count=4, dilation=1, size=3, stride=1}",
         "bad windows"),
        ("%x: i64[4]", "%z: i64[4] = copysign(%x, %x)", "takes floats"),
        ("%x: f32[4]", "%z: f32[4] = bit_and(%x, %x)", "takes integers"),
        ("%x: bool[4]", "%z: bool[4] = bit_not(%x)", "takes integers"),
        ("%x: i64[4]", "%z: i64[4] = round_even(%x)", "takes a float"),
        ("%x: f32[4], %y: f32[T,4]", "%z: f32[4] = concat(%x, %y) {axis=0}", "cannot join"),
        ("%x: f32[4], %y: f32[T]", "%z: f32[T] = take(%x, %y)", "indexed by integers"),
        ("%x: f32[T,4], %y: i64[4]", "%z: f32[4] = take_along(%x, %y)", "equal leading axes"),
        ("%x: f32[T,4]", "%z: f32[4] = reduce_sum(%x) {axes=[2], keepdims=false}", "bad reduction"),
        ("%x: f32[T,4]", "%z: f32[T,5], %i: i64[T,5] = topk(%x) {k=5}", "topk of 5"),
        ("%x: f32[T,4], %y: f32[5,6]", "%z: f32[T,6] = matmul(%x, %y) {transpose_b=false}",
         "inner sizes differ"),
        ("%x: f32[4], %y: f32[4,4]", "%z: f32[4] = matmul(%x, %y) {transpose_b=false}",
         "takes matrices"),
        ("%x: f32[5,4], %y: f32[1,1]",
         "%z: f32[5,4] = dequantize(%x, %y) {block=[4, 4], dtype=f32}", "do not fit"),
        ("%x: i8[4]", "%z: f32[4] = decode(%x) {dtype=f32, format=f8e4m3}", "takes u8 codes"),
        ("%x: i64[4]", "%z: u8[4] = encode(%x) {format=f8e4m3, saturate=true}", "takes a float"),
        ("%x: f32[B,2,4,8], %y: f32[T,8], %i: i64[T]",
         "%z: f32[B,2,4,8] = cache_update(%x, %y, %i)", "cache_update of"),
        ("%x: f32[T,4], %i: i64[T,2], %w: f32[T,2], %g: f32[3,2,6,4], %d: f32[3,4,5]",
         "%z: f32[T,4] = experts(%x, %i, %w, %g, %d) {activation=\"silu\"}", "experts: "),
        ("%x: f32[T,4], %i: i64[T,2], %w: f32[T,2], %g: f32[3,2,6,4], %d: f32[3,4,6]",
         "%z: f32[T,4] = experts(%x, %i, %w, %g, %d) {activation=\"wave\"}", "unknown activation"),
        ("%q: f32[T,3,8], %k: f32[B,2,4,8], %p: i64[T], %s: i64[T], %n: i64[S,P]",
         "%z: f32[T,3,8] = attention(%q, %k, %k, %p, %s, %n) {scale=1.0, value_dim=8, window=none}",
         "heads do not fit"),
    ],
)  # fmt: skip
def test_what_is_refused(head, node, message):
    graph = parse_graph(f"graph legalized\nfunc @f({head}) {{\n {node}\n return %z }}")
    with pytest.raises(DiluError, match=message):
        verify(graph)


def test_ragged_blocks():
    (out,) = run(
        """(%w: f32[5,7], %s: f32[2,3]) {
  %z: f32[5,7] = dequantize(%w, %s) {block=[3, 3], dtype=f32}
  return %z }""",
        np.ones((5, 7), np.float32),
        np.arange(6, dtype=np.float32).reshape(2, 3),
    )
    assert out[:, 0].tolist() == [0, 0, 0, 3, 3]
    assert out[4].tolist() == [3, 3, 3, 4, 4, 4, 5]


def test_all_codes_decode_and_encode():
    text = """(%c: u8[256]) {
  %v: f32[256] = decode(%c) {dtype=f32, format=f8e4m3}
  %e: u8[256] = encode(%v) {format=f8e4m3, saturate=true}
  return %v, %e }"""
    codes = np.arange(256, dtype=np.uint8)
    values, again = run(text, codes)
    assert np.isnan(values[[0x7F, 0xFF]]).all() and values[0x7E] == 448.0
    finite = ~np.isnan(values)
    assert np.array_equal(again[finite], codes[finite])


def test_windows_are_some_elements_apart():
    (out,) = run(
        """(%x: f32[2,T]) {
  %z: f32[2,3,2] = windows(%x) {axis=1, count=3, dilation=3, size=2, stride=2}
  return %z }""",
        np.arange(16, dtype=np.float32).reshape(2, 8),
    )
    assert out[1].tolist() == [[8, 11], [10, 13], [12, 15]]


def test_what_is_shifted_out_is_gone():
    text = """(%x: i8[5], %n: i8[5]) {
  %l: i8[5] = shift_left(%x, %n)
  %r: i8[5] = shift_right(%x, %n)
  return %l, %r }"""
    x = np.array([-128, 127, -1, 5, -5], np.int8)
    left, right = run(text, x, np.array([1, 1, 8, -1, 2], np.int8))
    assert left.tolist() == [0, -2, 0, 0, -20]
    assert right.tolist() == [-64, 63, -1, 0, -2]


def test_halves_are_rounded_to_even_numbers_and_zeros_keep_their_signs():
    text = """(%x: f32[5]) {
  %r: f32[5] = round_even(%x)
  %s: f32[5] = copysign(%x, %r)
  return %r, %s }"""
    x = np.array([0.5, -0.5, 1.5, 2.5, -0.0], np.float32)
    rounded, same = run(text, x)
    assert rounded.tolist() == [0, 0, 2, 2, 0]
    assert np.signbit(rounded).tolist() == np.signbit(x).tolist()
    assert np.array_equal(same, x)


def test_the_product_of_none_is_one():
    text = """(%x: i64[2,N]) {
  %z: i64[2] = reduce_prod(%x) {axes=[1], keepdims=false}
  return %z }"""
    assert run(text, np.ones((2, 0), np.int64))[0].tolist() == [1, 1]
    assert run(text, np.array([[2, 3], [4, -5]]))[0].tolist() == [6, -20]


def test_attention_is_softmax_over_the_pages_of_a_sequence():
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=s).astype(np.float32) for s in ((3, 4, 8), (5, 2, 2, 8), (5, 2, 2, 8))
    )
    positions, sequence = np.array([2, 0, 3]), np.array([0, 1, 1])
    pages = np.array([[3, 1], [0, 4]])
    (out,) = run(
        """(%q: f32[T,4,8], %k: f32[B,2,2,8], %v: f32[B,2,2,8], %p: i64[T], %s: i64[T],
            %n: i64[S,P]) {
  %z: f32[T,4,6] = attention(%q, %k, %v, %p, %s, %n) {scale=0.5, value_dim=6, window=2}
  return %z }""",
        q, k, v, positions, sequence, pages,
    )  # fmt: skip
    for t in range(3):
        rows, values = (
            np.concatenate([cache[p].swapaxes(0, 1) for p in pages[sequence[t]]])
            for cache in (k, v)
        )
        first, last = max(0, positions[t] - 1), positions[t] + 1
        for head in range(4):
            scores = rows[first:last, head // 2] @ q[t, head] * 0.5
            weights = np.exp(scores) / np.exp(scores).sum()
            want = weights @ values[first:last, head // 2, :6]
            assert np.allclose(out[t, head], want, atol=1e-6)


def test_experts_are_the_sum_of_what_was_chosen():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    chosen = np.array([[0, 2], [1, 1], [2, 0]])
    share = rng.random((3, 2)).astype(np.float32)
    gate_up = rng.normal(size=(3, 2, 6, 4)).astype(np.float32)
    down = rng.normal(size=(3, 4, 6)).astype(np.float32)
    (out,) = run(
        """(%x: f32[T,4], %i: i64[T,2], %w: f32[T,2], %g: f32[3,2,6,4], %d: f32[3,4,6]) {
  %z: f32[T,4] = experts(%x, %i, %w, %g, %d) {activation="silu"}
  return %z }""",
        x, chosen, share, gate_up, down,
    )  # fmt: skip
    for t in range(3):
        want = np.zeros(4)
        for e, s in zip(chosen[t], share[t], strict=True):
            g, u = gate_up[e] @ x[t]
            want += s * (down[e] @ (g / (1 + np.exp(-g)) * u))
        assert np.allclose(out[t], want, atol=1e-5)


def test_ties_go_to_the_first():
    x = np.array([[1.0, 3.0, 3.0, 0.0]], np.float32)
    top, at, first = run(
        """(%x: f32[T,4]) {
  %v: f32[T,3], %i: i64[T,3] = topk(%x) {k=3}
  %a: i64[T] = argmax(%x)
  return %v, %i, %a }""",
        x,
    )
    assert (top.tolist(), at.tolist(), first.tolist()) == ([[3, 3, 1]], [[1, 2, 0]], [1])


def test_integers_divide_downwards():
    a, b = np.array([7, -7]), np.array([2, 2])
    quotient, rest = run(
        """(%a: i64[2], %b: i64[2]) {
  %q: i64[2] = div(%a, %b)
  %r: i64[2] = mod(%a, %b)
  return %q, %r }""",
        a,
        b,
    )
    assert (quotient.tolist(), rest.tolist()) == ([3, -4], [1, 1])


def test_nan_is_the_largest():
    x = np.array([[1.0, np.nan, -0.0, 0.0, np.inf, np.nan]], np.float32)
    top, at, low, where, first = run(
        """(%x: f32[T,6]) {
  %v: f32[T,6], %i: i64[T,6] = topk(%x) {k=6}
  %w: f32[T,6], %j: i64[T,6] = topk(%x) {k=6, largest=false}
  %a: i64[T] = argmax(%x)
  return %v, %i, %w, %j, %a }""",
        x,
    )
    assert at.tolist() == [[1, 5, 4, 0, 2, 3]] and np.isnan(top[0, :2]).all()
    assert where.tolist() == [[2, 3, 0, 4, 1, 5]] and low[0, :4].tolist() == [0, 0, 1, np.inf]
    assert first.tolist() == [1]


def test_the_smallest_integers():
    x = np.array([[3, -(2**63), 2**63 - 1, 3]])
    low, where = run(
        """(%x: i64[T,4]) {
  %w: i64[T,3], %j: i64[T,3] = topk(%x) {k=3, largest=false}
  return %w, %j }""",
        x,
    )
    assert low.tolist() == [[-(2**63), 3, 3]] and where.tolist() == [[1, 0, 3]]


def test_integer_powers():
    base, exponent = np.array([2, 2, 1, -1, -1, 0, 3]), np.array([10, -1, -5, -3, -2, -1, 39])
    (out,) = run(
        """(%a: i64[7], %b: i64[7]) {
  %p: i64[7] = pow(%a, %b)
  return %p }""",
        base,
        exponent,
    )
    assert out.tolist() == [1024, 0, 1, -1, 1, 0, 3**39]


def test_tokens_that_see_nothing_are_zero():
    rng = np.random.default_rng(0)
    q, k, v = (np.abs(rng.normal(size=s)).astype(np.float32)
               for s in ((2, 1, 4), (1, 1, 3, 4), (1, 1, 3, 4)))  # fmt: skip
    k[0, 0, :2] = -np.inf
    (out,) = run(
        """(%q: f32[T,1,4], %k: f32[B,1,3,4], %v: f32[B,1,3,4], %p: i64[T], %s: i64[T],
            %n: i64[S,P]) {
  %z: f32[T,1,4] = attention(%q, %k, %v, %p, %s, %n) {scale=0.5, value_dim=4, window=none}
  return %z }""",
        q, k, v, np.array([-1, 1]), np.zeros(2, np.int64), np.zeros((1, 1), np.int64),
    )  # fmt: skip
    assert (out == 0).all()
