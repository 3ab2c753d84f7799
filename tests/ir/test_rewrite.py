from __future__ import annotations

import pytest

from dilu.errors import DiluError, Loc
from dilu.ir.dtypes import F32
from dilu.ir.graph import Graph
from dilu.ir.ops.elementwise import Add, Exp, Neg
from dilu.ir.rewrite import Builder, map_functions, rewrite_nodes
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify

GRAPH = parse_graph("""graph captured
func @main(%x: f32[T]) {
  %a: f32[T] = exp(%x)
  %b: f32[T] = neg(%a)
  %c: f32[T] = call(%b) {times=2, body=func @layer(%x: f32[T]) {
    %a: f32[T] = neg(%x)
    return %a
  }}
  return %c, %b
}""")


def test_what_replaces_a_node_may_take_its_name():
    def twice(node, builder):
        if not isinstance(node.op, Neg):
            return None
        return builder.emit(Neg(), builder.emit(Exp(), node.inputs[0]), name=node.output.name)

    after = map_functions(GRAPH, lambda f: rewrite_nodes(f, twice))
    verify(after)
    text = print_graph(after)
    assert "%b: f32[T] = neg(%exp)" in text and "    %a: f32[T] = neg(%exp)" in text


def test_replacement_by_another_value_goes_through_chains():
    def drop(node, builder):
        return node.inputs[0] if isinstance(node.op, (Neg, Exp)) else None

    after = map_functions(GRAPH, lambda f: rewrite_nodes(f, drop))
    verify(after)
    (main,) = after.functions
    assert [v.name for v in main.results] == ["c", "x"]
    assert main.nodes[0].inputs == main.parameters


def test_new_nodes_carry_the_location():
    from dataclasses import replace

    (main,) = GRAPH.functions
    placed = replace(main, nodes=tuple(replace(n, loc=Loc("m.py", 3)) for n in main.nodes))

    def again(node, builder):
        return builder.emit(Exp(), *node.inputs) if isinstance(node.op, Exp) else None

    assert rewrite_nodes(placed, again).nodes[0].loc == Loc("m.py", 3)


def test_fresh_names():
    builder = Builder.over(GRAPH.functions[0])
    assert [builder.fresh("a"), builder.fresh("a"), builder.fresh("new")] == ["a_1", "a_2", "new"]
    value = builder.literal(2, F32)
    assert builder.nodes[-1].op.attributes() == {"value": 2.0, "dtype": F32}
    with pytest.raises(DiluError, match="equal element types"):
        builder.emit(Add(), value, Builder().literal(1, parse_type("i64")))


def parse_type(name: str):
    from dilu.ir.dtypes import dtype

    return dtype(name)


def test_users_and_producers():
    (main,) = GRAPH.functions
    assert main.producers()["b"].op == Neg()
    assert [n.op.name for n in main.users()["b"]] == ["call"]
    assert main.users()["c"] == []
    assert [f.name for f in main.bodies()] == ["layer"]
    assert GRAPH.function("main") is main
    assert isinstance(GRAPH, Graph)
