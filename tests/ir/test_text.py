from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dilu.errors import DiluError, Loc
from dilu.ir.text import parse_graph, print_graph

GRAPHS = sorted((Path(__file__).parents[1] / "golden").rglob("*.txt"))
EVERYTHING = """graph planned

func @main(%x: f32[T,8], %i: i64[2*T + 1]) state(%keys: bf16[B,4,1,8]) const(%a.weight: u8[4,8]) {
  %c: f32[] = literal() {dtype=f32, value=-inf}
  %d: f32[] = literal() {dtype=f32, value=-0.0}
  %e: i64[] = literal() {dtype=i64, value=-3}
  %f: bool[] = literal() {dtype=bool, value=true}
  %s: f32[T + -1,8] = slice(%x) {axis=0, start=1, step=1, stop=<T>}
  %v: f32[T,2], %w: i64[T,2] = topk(%x) {k=2}
  %l: f32[T,2], %n: i64[T,2] = topk(%x) {k=2, largest=false}
  %g: f8e5m2[T,8] = cast(%x) {dtype=f8e5m2}
  %h: f8e5m2[T,8] = cast(%x) {dtype=f8e5m2, saturate=false}
  %o: f32[T,8] = attention(%x, %x, %x, %i, %i, %i) {scale=1e-05, value_dim=8, window=none}
  %y: f32[T,8] = call(%x) {body=func @inner(%x: f32[T,8]) {
    %r: f32[8,T] = reshape(%x) {shape=[8, <T>]}
    %y: f32[T,8] = reshape(%r) {shape=[<T>, 8]}
    return %y
    arena 64*((T + 63) // 64) : %r
  }, times=3}
  return %y, %v update %keys
  arena max(128*B, 256*T) : %s, %o
  arena 64 : %c
}

func @other() {
  return
}
"""


def test_everything_round_trips():
    graph = parse_graph(EVERYTHING)
    assert print_graph(graph) == EVERYTHING
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: p.stem)
def test_goldens_round_trip(path):
    text = path.read_text("utf-8")
    if not text.startswith("graph "):
        pytest.skip("not a graph")
    graph = parse_graph(text)
    assert parse_graph(print_graph(graph)) == graph


def test_locations_are_comments():
    graph = parse_graph(
        "graph captured\nfunc @f(%x: f32[T]) {\n %y: f32[T] = exp(%x)\n return %y }"
    )
    (function,) = graph.functions
    node = replace(function.nodes[0], loc=Loc("model.py", 12))
    placed = replace(graph, functions=(replace(function, nodes=(node,)),))
    text = print_graph(placed, locations=True)
    assert "exp(%x)  # model.py:12\n" in text
    assert parse_graph(text) == graph == placed


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("%y: f32[T] = exp(%z)", 3, "%z is not defined"),
        ("%y: f32[T] = exq(%x)", 3, "unknown op 'exq'"),
        ("%y: f33[T] = exp(%x)", 3, "unknown element type 'f33'"),
        ("%y: f32[T = exp(%x)", 3, "unfinished size"),
        ("%y: f32[T.x] = exp(%x)", 3, "unexpected '.'"),
        ("%y: f32[-] = exp(%x)", 3, "not a size: '-'"),
        ("%y: f32[4] = reshape(%x) {shape=[<4/>]}", 3, "not a size: '4/'"),
        ("%y: f32[T] exp(%x)", 3, "expected =, got 'exp'"),
        ("%y: f32[T] = exp(%x) {k=1}", 3, "exp: "),
        ("%y: f32[T] = cast(%x)", 3, "cast: "),
        ("%y: f32[T] = cast(%x) {dtype=?}", 3, "unexpected '?'"),
        ("%y: f32[T] = cast(%x) {dtype=wide}", 3, "not an attribute value: 'wide'"),
        ("%y: f32[T] = exp(%x)\n  %z: f32[T] = exp(y)", 4, "expected value, got 'y'"),
    ],
)
def test_errors_say_the_line(body, line, message):
    with pytest.raises(DiluError) as caught:
        parse_graph(f"graph captured\nfunc @f(%x: f32[T]) {{\n  {body}\n  return %x\n}}")
    assert str(caught.value).startswith(f"graph text, line {line}: ")
    assert message in str(caught.value)


def test_unfinished_text():
    with pytest.raises(DiluError, match=r"line 2: .*end of text"):
        parse_graph("graph captured\nfunc @f(%x: f32[T]) {")
