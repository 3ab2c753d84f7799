"""What becomes one kernel, and that it computes the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dilu.errors import UnsupportedError
from dilu.ir.graph import Graph, Node
from dilu.ir.op import OPS
from dilu.ir.ops.control import Call, Kernel
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.verify import verify
from dilu.passes.eliminate_dead import eliminate_dead
from dilu.passes.fuse_experts import fuse_experts
from dilu.passes.fuse_loops import fuse_loops
from dilu.passes.fuse_matmul import fuse_matmul
from dilu.passes.fuse_rest import fuse_rest
from dilu.passes.fuse_updates import fuse_updates
from dilu.passes.loop_ops import LOOP_OPS, REDUCTIONS, is_one_space
from dilu.passes.pipeline import compile_graph

TARGET = SimpleNamespace(native=frozenset())

DEQUANTIZED = """
  %{0}_wide: f32[{1}] = decode(%{0}) {{dtype=f32, format=f8e4m3}}
  %{0}_all: f32[{1}] = dequantize(%{0}_wide, %{0}_s) {{block=[4, 4], dtype=f32}}"""
NORM = """
  %sq: f32[T,8] = mul(%x, %x)
  %sum: f32[T,1] = reduce_sum(%sq) {axes=[1], keepdims=true}
  %eps: f32[] = literal() {dtype=f32, value=1e-06}
  %more: f32[T,1] = add(%sum, %eps)
  %inv: f32[T,1] = rsqrt(%more)
  %scaled: f32[T,8] = mul(%x, %inv)
  %n: f32[T,8] = mul(%scaled, %g)"""

TWO_WEIGHTS = """(%x: f32[T,8])
    const(%g: f32[8], %w: u8[12,8], %w_s: f32[3,2], %u: u8[12,8], %u_s: f32[3,2]) {"""


def fused(text: str) -> Graph:
    graph = parse_graph("graph legalized\nfunc @main" + text)
    for step in (fuse_experts, fuse_matmul, fuse_updates, fuse_loops, fuse_rest):
        graph = step(graph)
        verify(graph)
    return graph


def kernels(graph: Graph) -> list[Node]:
    found: list[Node] = []

    def add(nodes: tuple[Node, ...]) -> None:
        for node in nodes:
            if isinstance(node.op, Kernel):
                found.append(node)
            elif isinstance(node.op, Call):
                add(node.op.body.nodes)

    for function in graph.functions:
        add(function.nodes)
    return found


CASES = {
    "gate_up": f"""{TWO_WEIGHTS}{NORM}
  {DEQUANTIZED.format("w", "12,8")}{DEQUANTIZED.format("u", "12,8")}
  %a: f32[T,12] = matmul(%n, %w_all) {{transpose_b=true}}
  %b: f32[T,12] = matmul(%n, %u_all) {{transpose_b=true}}
  %s: f32[T,12] = sigmoid(%a)
  %silu: f32[T,12] = mul(%a, %s)
  %y: f32[T,12] = mul(%silu, %b)
  return %y
}}""",
    "norm_of_three": f"""{TWO_WEIGHTS}{NORM}
  {DEQUANTIZED.format("w", "12,8")}{DEQUANTIZED.format("u", "12,8")}
  %a: f32[T,12] = matmul(%n, %w_all) {{transpose_b=true}}
  %b: f32[T,12] = matmul(%n, %u_all) {{transpose_b=true}}
  return %a, %b
}}""",
    "bias_residual": """(%x: bf16[T,8], %r: bf16[T,4,3]) const(%w: bf16[12,8], %bias: bf16[12]) {
  %xw: f32[T,8] = cast(%x) {dtype=f32}
  %ww: f32[12,8] = cast(%w) {dtype=f32}
  %p: f32[T,12] = matmul(%xw, %ww) {transpose_b=true}
  %bw: f32[12] = cast(%bias) {dtype=f32}
  %q: f32[T,12] = add(%p, %bw)
  %n: bf16[T,12] = cast(%q) {dtype=bf16}
  %h: bf16[T,12] = reshape(%r) {shape=[<T>, 12]}
  %y: bf16[T,12] = add(%h, %n)
  %t: bf16[T,4,3] = reshape(%y) {shape=[<T>, 4, 3]}
  return %t
}""",
    "two_readers": """(%x: f32[T,8], %r: f32[T,12]) const(%w: f32[12,8]) {
  %p: f32[T,12] = matmul(%x, %w) {transpose_b=true}
  %h: f32[T,12] = add(%r, %p)
  %a: f32[T,12] = exp(%h)
  %s: f32[T,1] = reduce_sum(%a) {axes=[1], keepdims=true}
  %y: f32[T,12] = div(%h, %s)
  return %y, %h
}""",
    "cycle": """(%x: f32[T,8]) const(%w: f32[8,8], %v: f32[8,8]) {
  %p: f32[T,8] = matmul(%x, %w) {transpose_b=true}
  %q: f32[T,8] = matmul(%p, %v) {transpose_b=true}
  %y: f32[T,8] = add(%p, %q)
  return %y
}""",
    "heads": """(%q: f32[T,32], %k: f32[M,32]) {
  %q3: f32[T,4,8] = reshape(%q) {shape=[<T>, 4, 8]}
  %qt: f32[4,T,8] = transpose(%q3) {permutation=[1, 0, 2]}
  %k3: f32[M,4,8] = reshape(%k) {shape=[<M>, 4, 8]}
  %kt: f32[4,M,8] = transpose(%k3) {permutation=[1, 0, 2]}
  %p: f32[4,T,M] = matmul(%qt, %kt) {transpose_b=true}
  %c: f32[] = literal() {dtype=f32, value=0.5}
  %s: f32[4,T,M] = mul(%p, %c)
  %m: f32[4,T,1] = reduce_max(%s) {axes=[2], keepdims=true}
  %d: f32[4,T,M] = sub(%s, %m)
  %e: f32[4,T,M] = exp(%d)
  %z: f32[4,T,1] = reduce_sum(%e) {axes=[2], keepdims=true}
  %a: f32[4,T,M] = div(%e, %z)
  %o: f32[4,T,8] = matmul(%a, %kt) {transpose_b=false}
  %ot: f32[T,4,8] = transpose(%o) {permutation=[1, 0, 2]}
  %y: f32[T,32] = reshape(%ot) {shape=[<T>, 32]}
  return %y
}""",
    "latent": f"""(%q: f32[T,2,5]) const(%w: u8[20,4], %w_s: f32[5,1]) {{
  {DEQUANTIZED.format("w", "20,4")}
  %h: f32[2,10,4] = reshape(%w_all) {{shape=[2, 10, 4]}}
  %part: f32[2,5,4] = slice(%h) {{axis=1, start=0, step=1, stop=5}}
  %qt: f32[2,T,5] = transpose(%q) {{permutation=[1, 0, 2]}}
  %p: f32[2,T,4] = matmul(%qt, %part) {{transpose_b=false}}
  %y: f32[T,2,4] = transpose(%p) {{permutation=[1, 0, 2]}}
  return %y
}}""",
    "experts": """(%x: f32[T,4], %i: i64[T,2], %p: f32[T,2], %shared: f32[T,4], %r: f32[T,4])
    const(%w: u8[3,2,6,4], %w_s: f32[3,2,3,2], %d: bf16[3,4,6]) {
  %w_wide: f32[3,2,6,4] = decode(%w) {dtype=f32, format=f8e4m3}
  %w_all: f32[3,2,6,4] = dequantize(%w_wide, %w_s) {block=[2, 2], dtype=f32}
  %d_all: f32[3,4,6] = cast(%d) {dtype=f32}
  %e: f32[T,4] = experts(%x, %i, %p, %w_all, %d_all) {activation="silu"}
  %a: f32[T,4] = add(%e, %shared)
  %y: f32[T,4] = add(%r, %a)
  return %y
}""",
    "updates": """(%k: f32[T,2,4], %cos: f32[T,1,4], %v: f32[T,8], %slots: i64[T])
    state(%keys: bf16[B,4,2,4], %values: f32[B,4,2,4]) {
  %l: f32[T,2,2] = slice(%k) {axis=2, start=0, step=1, stop=2}
  %r: f32[T,2,2] = slice(%k) {axis=2, start=2, step=1, stop=4}
  %n: f32[T,2,2] = neg(%r)
  %c: f32[T,2,4] = concat(%n, %l) {axis=2}
  %m: f32[T,2,4] = mul(%c, %cos)
  %b: bf16[T,2,4] = cast(%m) {dtype=bf16}
  %keys_1: bf16[B,4,2,4] = cache_update(%keys, %b, %slots)
  %v3: f32[T,2,4] = reshape(%v) {shape=[<T>, 2, 4]}
  %values_1: f32[B,4,2,4] = cache_update(%values, %v3, %slots)
  return update %keys_1, %values_1
}""",
    "costly_work_is_not_repeated": """(%p: f32[T,8], %x: f32[T,16,8]) {
  %c: f32[T,8] = cos(%p)
  %c3: f32[T,1,8] = reshape(%c) {shape=[<T>, 1, 8]}
  %y: f32[T,16,8] = mul(%x, %c3)
  %d: f32[T,8] = neg(%p)
  %d3: f32[T,1,8] = reshape(%d) {shape=[<T>, 1, 8]}
  %z: f32[T,16,8] = mul(%x, %d3)
  return %y, %z
}""",
    "rows_do_not_mix": """(%x: f32[T,8]) {
  %s: f32[T] = reduce_sum(%x) {axes=[1], keepdims=false}
  %a: f32[1,T] = reshape(%s) {shape=[1, <T>]}
  %b: f32[T,1] = reshape(%s) {shape=[<T>, 1]}
  %y: f32[T,T] = sub(%a, %b)
  %m: f32[8] = reduce_max(%x) {axes=[0], keepdims=false}
  %n: f32[8] = neg(%m)
  %z: f32[T,8] = add(%x, %n)
  return %y, %z
}""",
    "routing": """(%x: f32[T,8]) const(%bias: f32[8]) {
  %s: f32[T,8] = sigmoid(%x)
  %c: f32[T,8] = add(%s, %bias)
  %v: f32[T,2], %i: i64[T,2] = topk(%c) {k=2}
  %w: f32[T,2] = take_along(%s, %i)
  %t: f32[T,1] = reduce_sum(%w) {axes=[1], keepdims=true}
  %y: f32[T,2] = div(%w, %t)
  return %y, %i
}""",
}


@pytest.mark.parametrize("name", CASES)
def test_golden_and_bits(name, golden, exact):
    before = parse_graph("graph legalized\nfunc @main" + CASES[name])
    after = fused(CASES[name])
    exact(before, after)
    golden(f"passes/fuse_{name}.txt", print_graph(after))


@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_contract(name):
    for node in kernels(fused(CASES[name])):
        check_contract(node)


def check_contract(node: Node) -> None:
    """Every kernel is one of the kinds that code is generated for."""
    assert isinstance(node.op, Kernel)
    body, ops = node.op.body, [n.op.name for n in node.op.body.nodes]
    main = [o for o in ops if not issubclass(OPS[o], LOOP_OPS)]
    expected = {"loops": [[]], "matmul": [["matmul"], ["matmul", "matmul"]]}
    assert main in expected.get(node.op.kind, [[node.op.kind]])
    assert bool(body.states) == (node.op.kind == "cache_update")
    assert not body.constants
    if node.op.kind == "loops":
        assert is_one_space(body.nodes, body.results)
    elif node.op.kind == "matmul":
        assert len(body.results) == 1
        assert sum(isinstance(n.op, REDUCTIONS) for n in body.nodes) <= 1
    elif node.op.kind in ("attention", "topk"):
        assert len(ops) == 1


LLAMA = "graphs/llama.txt"


@pytest.fixture(scope="module")
def llama() -> Graph:
    from pathlib import Path

    return parse_graph((Path(__file__).parents[1] / "golden" / LLAMA).read_text("utf-8"))


def test_a_layer_is_eleven_kernels(llama):
    planned, _ = compile_graph(llama, TARGET)
    names = [n.op.body.name for n in kernels(planned)]
    assert names == [
        "main_0_take",
        "main_1_angles",
        "layer_0_0_norm",
        "layer_0_1_wq",
        "layer_0_2_wk",
        "layer_0_3_wv",
        "layer_0_4_rope",
        "layer_0_5_rope_cache_update",
        "layer_0_6_cache_update",
        "layer_0_7_attention",
        "layer_0_8_wo_residual",
        "layer_0_9_norm_gate_up_silu",
        "layer_0_10_wd_residual",
        "main_2_norm_head",
    ]
    for node in kernels(planned):
        check_contract(node)


@pytest.mark.slow
def test_every_step_of_a_model_is_exact(llama, exact):
    from dilu.passes.pipeline import pipeline

    before = graph = llama
    for passes in pipeline(TARGET).values():
        for step in passes:
            graph = step(graph)
            exact(before, graph, seeds=range(1))


def test_an_op_without_a_kernel(monkeypatch):
    graph = parse_graph("""graph legalized
func @main(%x: f32[T,4]) {
  %v: f32[T,2], %i: i64[T,2] = topk(%x) {k=2}
  return %v
}""")
    (node,) = graph.functions[0].nodes
    odd = replace(node, op=type("Odd", (), {"name": "odd", "updates": None})())
    with pytest.raises(UnsupportedError, match="there is no kernel for op odd"):
        fuse_rest(replace(graph, functions=(replace(graph.functions[0], nodes=(odd,)),)))


def test_dead_kernels_vanish():
    graph = fused("""(%x: f32[T,4]) {
  %a: f32[T,4] = exp(%x)
  %b: f32[T,4] = neg(%x)
  return %b
}""")
    assert eliminate_dead(graph) == graph
    assert len(kernels(graph)) == 1
