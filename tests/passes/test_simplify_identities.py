from __future__ import annotations

import pytest

from dilu.ir.dtypes import DTYPES, decode_table
from dilu.ir.text import parse_graph, print_graph
from dilu.passes.simplify_identities import holds, simplify_identities


def body(text: str) -> str:
    return f"graph captured\nfunc @f{text}"


CASES = {
    "neutral": """(%x: f32[T,8]) {
  %one: f32[] = literal() {dtype=f32, value=1.0}
  %zero: f32[] = literal() {dtype=f32, value=0.0}
  %minus: f32[] = literal() {dtype=f32, value=-0.0}
  %a: f32[T,8] = mul(%x, %one)
  %b: f32[T,8] = mul(%one, %a)
  %c: f32[T,8] = div(%b, %one)
  %d: f32[T,8] = sub(%c, %zero)
  %e: f32[T,8] = add(%d, %minus)
  %g: f32[T,8] = neg(%e)
  %h: f32[T,8] = neg(%g)
  return %h }""",
    "not_neutral": """(%x: f32[T,8], %i: i64[T]) {
  %zero: f32[] = literal() {dtype=f32, value=0.0}
  %minus: f32[] = literal() {dtype=f32, value=-0.0}
  %a: f32[T,8] = add(%x, %zero)
  %b: f32[T,8] = sub(%x, %minus)
  %c: f32[T,8] = mul(%x, %zero)
  %d: f32[T,8] = sub(%zero, %x)
  %none: i64[] = literal() {dtype=i64, value=0}
  %j: i64[T] = add(%i, %none)
  return %a, %b, %c, %d, %j }""",
    "casts": """(%x: bf16[T,8], %y: f32[T,8], %i: i32[T]) {
  %a: f32[T,8] = cast(%x) {dtype=f32}
  %b: bf16[T,8] = cast(%a) {dtype=bf16}
  %c: bf16[T,8] = cast(%y) {dtype=bf16}
  %d: f32[T,8] = cast(%c) {dtype=f32}
  %e: f32[T,8] = cast(%d) {dtype=f32}
  %j: i64[T] = cast(%i) {dtype=i64}
  %k: f32[T] = cast(%j) {dtype=f32}
  return %b, %e, %k }""",
    "views": """(%x: f32[T,4,2], %y: f32[1,8]) {
  %a: f32[T,8] = reshape(%x) {shape=[<T>, 8]}
  %b: f32[T,2,4] = reshape(%a) {shape=[<T>, 2, 4]}
  %c: f32[T,4,2] = reshape(%b) {shape=[<T>, 4, 2]}
  %d: f32[4,T,2] = transpose(%c) {permutation=[1, 0, 2]}
  %e: f32[2,4,T] = transpose(%d) {permutation=[2, 0, 1]}
  %g: f32[T,4,2] = transpose(%e) {permutation=[2, 1, 0]}
  %h: f32[T,8] = broadcast_to(%y) {shape=[<T>, 8]}
  %i: f32[T,8] = add(%a, %h)
  %j: f32[8,1] = transpose(%y) {permutation=[1, 0]}
  return %g, %i, %j }""",
    "slices": """(%x: f32[T,8], %y: f32[T,4]) {
  %a: f32[T,8] = slice(%x) {axis=1, start=0, step=1, stop=8}
  %b: f32[T,6] = slice(%a) {axis=1, start=2, step=1, stop=8}
  %c: f32[T,2] = slice(%b) {axis=1, start=1, step=2, stop=5}
  %d: f32[T,4] = slice(%x) {axis=1, start=0, step=1, stop=4}
  %e: f32[T,4] = slice(%x) {axis=1, start=4, step=1, stop=8}
  %g: f32[T,8] = concat(%d, %e) {axis=1}
  %h: f32[T,8] = concat(%y, %e) {axis=1}
  %i: f32[T,2] = slice(%h) {axis=1, start=2, step=1, stop=4}
  %j: f32[T,8] = concat(%g) {axis=1}
  return %c, %j, %i }""",
    "where": """(%x: f32[T,8], %y: f32[8], %m: bool[T,8]) {
  %yes: bool[] = literal() {dtype=bool, value=true}
  %a: f32[T,8] = where(%yes, %x, %y)
  %no: bool[] = literal() {dtype=bool, value=false}
  %b: f32[T,8] = where(%no, %x, %y)
  %c: f32[T,8] = where(%m, %x, %x)
  %d: bool[T,8] = logical_and(%m, %yes)
  %e: bool[T,8] = logical_or(%no, %d)
  return %a, %b, %c, %e }""",
    "matmul": """(%x: f32[T,8]) const(%w: f32[8,4], %v: f32[4,8]) {
  %t: f32[4,8] = transpose(%w) {permutation=[1, 0]}
  %a: f32[T,4] = matmul(%x, %t) {transpose_b=true}
  %u: f32[8,4] = transpose(%v) {permutation=[1, 0]}
  %b: f32[T,4] = matmul(%x, %u) {transpose_b=false}
  return %a, %b }""",
    "in_a_call": """(%x: f32[T,8]) {
  %y: f32[T,8] = call(%x) {body=func @layer(%x: f32[T,8]) {
    %one: f32[] = literal() {dtype=f32, value=1.0}
    %a: f32[T,8] = mul(%x, %one)
    %b: f32[T,8] = exp(%a)
    return %b
  }, times=3}
  return %y }""",
}


@pytest.mark.parametrize("name", CASES)
def test_golden_and_bits(name, golden, exact):
    before = parse_graph(body(CASES[name]))
    after = simplify_identities(before)
    exact(before, after)
    golden(f"passes/simplify_identities_{name}.txt", print_graph(after))


def test_holds_is_what_the_tables_say():
    """A type holds another when every value of the other is one of its own."""
    tables = {
        t: set(decode_table(t).tolist()) for t in DTYPES.values() if t.is_float and t.bits < 32
    }
    for wide, mine in tables.items():
        for narrow, theirs in tables.items():
            finite = {v for v in theirs if abs(v) < float("inf")}
            has_infinity = any(abs(v) == float("inf") for v in theirs)
            really = finite <= mine and (not has_infinity or float("inf") in mine)
            assert not holds(wide, narrow) or really, f"{wide} does not hold {narrow}"
    held = [(w.name, n.name) for w in tables for n in tables if w != n and holds(w, n)]
    assert held == [
        ("f16", "f8e4m3"), ("f16", "f8e5m2"), ("f16", "f4e2m1"),
        ("bf16", "f8e4m3"), ("bf16", "f8e5m2"), ("bf16", "f4e2m1"),
        ("f8e5m2", "f4e2m1"),
    ]  # fmt: skip
