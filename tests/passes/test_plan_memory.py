from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dilu.errors import DiluError, UnsupportedError
from dilu.ir.graph import Function, Graph
from dilu.ir.ops.control import Call, Kernel
from dilu.ir.ops.index import Reshape
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.types import dim, evaluate, symbol
from dilu.ir.verify import verify
from dilu.passes.fuse_rest import fuse_rest
from dilu.passes.pipeline import compile_graph
from dilu.passes.plan_memory import aligned, memory_summary, plan_memory

TARGET = SimpleNamespace(native=frozenset())
SIZES = {"T": 5, "R": 300, "S": 2, "P": 3, "B": 7, "N": 1000, "M": 1}


def check_plan(function: Function, sizes=SIZES) -> None:
    """Execute a plan on places instead of numbers: nothing may be read after it was overwritten.

    Independent of how the plan was made: every node writes its outputs to their places, and must
    find in the places of its inputs what was written there for them.
    """
    slot_of = {v: i for i, slot in enumerate(function.arena) for v in slot.values}
    assert len(slot_of) == sum(len(s.values) for s in function.arena), "a value in two slots"
    place: dict[str, object] = {v.name: ("in", v.name) for v in function.inputs}
    holds: dict[object, str] = {("in", v.name): v.name for v in function.inputs}
    content = {v.name: v.name for v in function.inputs}  # an alias holds what its source holds
    results = {v.name for v in function.results}
    for node in function.nodes:
        for value in node.inputs:
            assert holds[place[value.name]] == content[value.name], f"{value} was overwritten"
        if isinstance(node.op, Reshape):
            (source,), (out,) = node.inputs, node.outputs
            place[out.name], content[out.name] = place[source.name], content[source.name]
            continue
        assert isinstance(node.op, (Kernel, Call))
        body = node.op.body
        states = node.inputs[len(body.parameters) :][: len(body.states)]
        for i, value in enumerate(node.outputs):
            update = i - len(body.results)
            if update >= 0:
                where = place[states[update].name]
            elif value.name in slot_of:
                where = ("slot", slot_of[value.name])
                size = evaluate(function.arena[slot_of[value.name]].size, sizes)
                assert size % 64 == 0 and size >= evaluate(value.type.nbytes, sizes)
            else:
                where = ("out", value.name)
                assert leads_to(function, value.name, results), f"{value} has no place"
            reads = {place[v.name] for v in node.inputs} if update < 0 else set()
            assert where not in reads, f"{value} is written over what {node.op.name} reads"
            assert where not in {place[v.name] for v in node.outputs[:i]}, "two outputs in a place"
            place[value.name], content[value.name], holds[where] = where, value.name, value.name
    homes = [place[v.name] for v in function.results]
    assert len(set(homes)) == len(homes) and all(kind == "out" for kind, _ in homes)
    for value in function.results:
        assert holds[place[value.name]] == content[value.name], f"result {value} was overwritten"
    for state, update in zip(function.states, function.updates, strict=True):
        assert place[update.name] == ("in", state.name)
        assert holds[("in", state.name)] == content[update.name]


def leads_to(function: Function, name: str, results: set[str]) -> bool:
    """Whether a value is a result, itself or reshaped."""
    same = {name}
    for node in function.nodes:
        if isinstance(node.op, Reshape) and node.inputs[0].name in same:
            same.add(node.output.name)
    return bool(same & results)


def check_all(graph: Graph) -> None:
    def deep(function: Function) -> None:
        check_plan(function)
        for node in function.nodes:
            if isinstance(node.op, Call):
                deep(node.op.body)

    for function in graph.functions:
        deep(function)


def planned(text: str) -> Graph:
    graph = plan_memory(fuse_rest(parse_graph("graph legalized\nfunc @main" + text)))
    verify(graph)
    check_all(graph)
    assert parse_graph(print_graph(graph)) == graph
    return graph


def test_chain(golden, exact):
    text = """(%x: f32[T,8]) {
  %a: f32[T,8] = exp(%x)
  %b: f32[T,8] = neg(%a)
  %c: f32[T,8] = exp(%b)
  %r: f32[T,2,4] = reshape(%c) {shape=[<T>, 2, 4]}
  %d: f32[T,2,4] = neg(%r)
  %y: f32[T,8] = reshape(%d) {shape=[<T>, 8]}
  return %y
}"""
    graph = planned(text)
    golden("passes/plan_memory_chain.txt", print_graph(graph))
    exact(parse_graph("graph legalized\nfunc @main" + text), graph)


def test_sizes_that_cannot_be_compared(golden):
    graph = planned("""(%x: f32[T,8], %y: f32[R,4]) {
  %a: f32[T,8] = exp(%x)
  %b: f32[T,8] = neg(%a)
  %c: f32[R,4] = exp(%y)
  %d: f32[R,4] = neg(%c)
  %e: f32[R,4] = exp(%d)
  return %b, %e
}""")
    golden("passes/plan_memory_max.txt", print_graph(graph))


def test_results_that_are_inputs_are_copied(golden, exact):
    text = """(%x: f32[T,8], %z: f32[T]) const(%w: f32[4]) {
  %a: f32[8,T] = reshape(%x) {shape=[8, <T>]}
  %b: f32[T] = exp(%z)
  %c: f32[T,1] = reshape(%b) {shape=[<T>, 1]}
  return %a, %w, %b, %c, %b
}"""
    graph = planned(text)
    golden("passes/plan_memory_copies.txt", print_graph(graph))
    exact(parse_graph("graph legalized\nfunc @main" + text), graph)


def test_a_state_as_it_was_cannot_be_read_later():
    with pytest.raises(DiluError, match=r"%keys.* is read after it was updated to %keys_1"):
        planned("""(%v: f32[T,2,4], %slots: i64[T]) state(%keys: f32[B,2,4,4]) {
  %keys_1: f32[B,2,4,4] = cache_update(%keys, %v, %slots)
  %a: f32[B,2,4,4] = exp(%keys)
  return %a update %keys_1
}""")


def test_a_state_that_is_replaced():
    with pytest.raises(UnsupportedError, match=r"state %s is replaced by %a, not updated in place"):
        planned("""(%x: f32[T]) state(%s: f32[T]) {
  %a: f32[T] = add(%s, %x)
  return %a update %a
}""")


def test_a_state_that_ends_as_it_was_before_the_update():
    with pytest.raises(DiluError, match="state %keys ends as %keys, an old version"):
        planned("""(%v: f32[T,2,4], %slots: i64[T]) state(%keys: f32[B,2,4,4]) {
  %new: f32[B,2,4,4] = cache_update(%keys, %v, %slots)
  %a: f32[B,2,4,4] = exp(%new)
  return %a update %keys
}""")


def test_states_are_updated_one_after_another():
    graph = planned("""(%v: f32[T,2,4], %w: f32[T,2,4], %slots: i64[T]) state(%keys: f32[B,2,4,4]) {
  %one: f32[B,2,4,4] = cache_update(%keys, %v, %slots)
  %two: f32[B,2,4,4] = cache_update(%one, %w, %slots)
  %a: f32[B,2,4,4] = exp(%two)
  return %a update %two
}""")
    assert graph.functions[0].arena == ()


def test_model():
    text = (Path(__file__).parents[1] / "golden" / "graphs" / "llama.txt").read_text("utf-8")
    graph, _ = compile_graph(parse_graph(text), TARGET)
    check_all(graph)
    main, layer = memory_summary(graph)
    assert (main.name, layer.name) == ("main", "layer_0")
    sizes = {"T": 64}
    assert evaluate(layer.arena, sizes) <= 0.6 * evaluate(layer.without_reuse, sizes)


def test_alignment():
    t, r = symbol("T"), symbol("R")
    for size in (0, 1, 64, 65, dim(32 * t), dim(64 * t), dim(64 * t + 64 * r), dim(4 * t * r + 4)):
        for known in ({"T": 1, "R": 1}, {"T": 3, "R": 5}):
            exact, rounded = evaluate(size, known), evaluate(aligned(size), known)
            assert rounded % 64 == 0 and exact <= rounded < exact + 64
    assert aligned(dim(128 * t)) == dim(128 * t)
