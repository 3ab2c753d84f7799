"""What lowering says of regions it cannot lower, and kernel IR of a few that it can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dilu.codegen.kernel_text import print_kernel
from dilu.codegen.lower import lower
from dilu.codegen.targets import BASELINE, find_target
from dilu.errors import DiluError, Loc
from dilu.ir.dtypes import BF16, F32
from dilu.ir.text import parse_graph

NORM = """graph planned
func @main(%x: bf16[T,64]) const(%w: bf16[64], %m: u8[96,64], %m.s: f32[1,1]) {
  %y: f32[T,64], %s: f32[T,1] = kernel(%x, %w) {kind="loops",
    body=func @norm(%x: bf16[T,64], %w: bf16[64]) {
    %xf: f32[T,64] = cast(%x) {dtype=f32}
    %sq: f32[T,64] = mul(%xf, %xf)
    %s: f32[T,1] = reduce_sum(%sq) {axes=[1], keepdims=true}
    %r: f32[T,1] = rsqrt(%s)
    %h: f32[T,64] = mul(%xf, %r)
    %wf: f32[64] = cast(%w) {dtype=f32}
    %o: f32[T,64] = mul(%h, %wf)
    %a: f32[T,32] = slice(%o) {axis=1, start=0, stop=32, step=1}
    %b: f32[T,32] = slice(%o) {axis=1, start=32, stop=64, step=1}
    %n: f32[T,32] = neg(%b)
    %c: f32[T,64] = concat(%n, %a) {axis=1}
    return %c, %s
  }}
  %z: bf16[2,T,48] = kernel(%y, %m, %m.s) {kind="matmul",
    body=func @product(%y: f32[T,64], %m: u8[96,64], %m.s: f32[1,1]) {
    %d: f32[96,64] = decode(%m) {format=f8e4m3, dtype=f32}
    %w: f32[96,64] = dequantize(%d, %m.s) {block=[128,128], dtype=f32}
    %t: f32[T,64] = tanh(%y)
    %p: f32[T,96] = matmul(%t, %w) {transpose_b=true}
    %c: bf16[T,96] = cast(%p) {dtype=bf16}
    %h: bf16[T,2,48] = reshape(%c) {shape=[<T>,2,48]}
    %z: bf16[2,T,48] = transpose(%h) {permutation=[1,0,2]}
    return %z
  }}
  return %z, %s
  arena <256*T> : %y
}
""".replace("arena <256*T>", "arena 256*T")


def test_kernel_ir(golden):
    (entry,) = lower(parse_graph(NORM), BASELINE).entries
    kernels = [step.kernel for step in entry.plan.steps]
    golden("codegen/norm_product.kernels.txt", "\n".join(map(print_kernel, kernels)))
    assert entry.symbols == ("T",)


@pytest.mark.parametrize(("target", "read"), [("cuda:80", BF16), ("cpu:baseline", F32)])
@pytest.mark.parametrize("computed", [False, True])
def test_activations_that_were_cast_to_f32(target, read, computed):
    """Where products read bf16 they read what was cast, or have no more than it stored."""
    graph = parse_graph(f"""graph planned
        func @main(%x: bf16[T,64]) const(%w: f32[8,64]) {{
          %y: f32[T,8] = kernel(%x, %w) {{kind="matmul", body=func @product(%x: bf16[T,64],
            %w: f32[8,64]) {{
            %t: bf16[T,64] = tanh(%x)
            %c: f32[T,64] = cast({"%t" if computed else "%x"}) {{dtype=f32}}
            %y: f32[T,8] = matmul(%c, %w) {{transpose_b=true}}
            return %y
          }}}}
          return %y
        }}""")
    (entry,) = lower(graph, find_target(target)).entries
    (launch,) = entry.plan.steps
    (step,) = launch.kernel.steps
    own = not computed and read == BF16
    assert (step.a.dtype, step.a.space) == (read, "argument" if own else "scratch")
    assert (step.prologue is None) == own


def failing(node: str, loc: Loc | None = None, kind: str = "loops"):
    graph = parse_graph(
        f"""graph planned
        func @main(%x: f32[T,8]) {{
          %y: f32[T,8] = kernel(%x) {{kind="{kind}", body=func @odd(%x: f32[T,8]) {{
            {node}
            return %y
          }}}}
          return %y
        }}"""
    )
    (function,) = graph.functions
    (kernel,) = function.nodes
    nodes = tuple(replace(n, loc=loc) for n in kernel.op.body.nodes)
    kernel = replace(kernel, op=replace(kernel.op, body=replace(kernel.op.body, nodes=nodes)))
    return replace(graph, functions=(replace(function, nodes=(kernel,)),))


def test_an_op_that_no_loop_computes():
    graph = failing(
        "%v: f32[T,8], %i: i64[T,8] = topk(%x) {k=8}\n%y: f32[T,8] = neg(%v)", Loc("model.py", 7)
    )
    with pytest.raises(DiluError, match="no loop computes the op topk") as error:
        lower(graph, BASELINE)
    assert error.value.loc == Loc("model.py", 7)
    assert error.value.pass_name == "lower"
    assert error.value.node is not None and "topk(%x)" in error.value.node


def test_two_products_in_a_kernel_need_the_same_activations():
    graph = failing(
        "%w: f32[T,T] = matmul(%x, %x) {transpose_b=true}\n"
        "%y: f32[T,8] = matmul(%w, %x) {transpose_b=false}",
        kind="matmul",
    )
    with pytest.raises(DiluError, match="two of the same activations"):
        lower(graph, BASELINE)


def test_an_unknown_kind():
    with pytest.raises(DiluError, match="unknown kind of kernel 'origami'"):
        lower(failing("%y: f32[T,8] = neg(%x)", kind="origami"), BASELINE)


def test_a_value_without_a_place():
    text = NORM.replace("arena 256*T : %y", "")
    with pytest.raises(DiluError, match="%y has no place in the arena"):
        lower(parse_graph(text), BASELINE)


def test_only_planned_graphs_become_code():
    with pytest.raises(DiluError, match="made from planned graphs, not from a fused one"):
        lower(parse_graph(NORM.replace("graph planned", "graph fused")), BASELINE)
