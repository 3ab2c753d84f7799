"""Emitted source: goldens of what is generated, and what holds for every module."""

from __future__ import annotations

import re

import pytest

from dilu.codegen.c.emit import generated_part
from dilu.codegen.c.emit_kernel import STEPS
from dilu.codegen.c.expressions import FORMATS, Expressions
from dilu.codegen.generate import generate
from dilu.codegen.kernel_ir import Apply, Name, Step
from dilu.codegen.lower_values import LOWERINGS
from dilu.codegen.targets import TARGETS, find_target
from dilu.ir.dtypes import BOOL, F32, F64, I64
from dilu.ir.op import OPS
from dilu.ir.text import parse_graph

SMALL = """graph planned
func @main(%x: bf16[T,64]) state(%cache: f32[B,1,4,64])
  const(%gain: f32[64], %w: u8[48,64], %w.s: f32[1,1]) {
  %y: f32[T,64] = kernel(%x, %gain) {kind="loops", body=func @norm(%x: bf16[T,64], %gain: f32[64]) {
    %xf: f32[T,64] = cast(%x) {dtype=f32}
    %sq: f32[T,64] = mul(%xf, %xf)
    %s: f32[T,1] = reduce_sum(%sq) {axes=[1], keepdims=true}
    %r: f32[T,1] = rsqrt(%s)
    %h: f32[T,64] = mul(%xf, %r)
    %o: f32[T,64] = mul(%h, %gain)
    return %o
  }}
  %v: f32[T,1,64] = reshape(%y) {shape=[<T>,1,64]}
  %new: f32[B,1,4,64] = kernel(%v, %cache) {kind="cache_update",
    body=func @keep(%v: f32[T,1,64]) state(%cache: f32[B,1,4,64]) {
    %slots: i64[T] = iota() {size=<T>, dtype=i64}
    %new: f32[B,1,4,64] = cache_update(%cache, %v, %slots)
    return update %new
  }}
  %z: bf16[T,48] = kernel(%y, %w, %w.s) {kind="matmul",
    body=func @product(%y: f32[T,64], %w: u8[48,64], %w.s: f32[1,1]) {
    %d: f32[48,64] = decode(%w) {format=f8e4m3, dtype=f32}
    %e: f32[48,64] = dequantize(%d, %w.s) {block=[128,128], dtype=f32}
    %p: f32[T,48] = matmul(%y, %e) {transpose_b=true}
    %z: bf16[T,48] = cast(%p) {dtype=bf16}
    return %z
  }}
  return %z update %new
  arena 256*T : %y
}
"""


C_TARGETS = [t for t in TARGETS if t.language == "c"]


@pytest.mark.parametrize("target", [t.name for t in C_TARGETS])
def test_source(golden, target, monkeypatch):
    monkeypatch.setattr("dilu.codegen.generate.compile_source", lambda *_, **__: b"")
    module = generate(parse_graph(SMALL), find_target(target))
    golden(f"codegen/small.{target.replace(':', '-')}.c", generated_part(module.source))


def test_the_null_target_emits_and_compiles_nothing(monkeypatch):
    monkeypatch.setattr("dilu.codegen.generate.compile_source", lambda *_: pytest.fail("compiled"))
    module = generate(parse_graph(SMALL), find_target("null"))
    assert module.library == b"" and "dilu_run" in module.source
    assert [k.name for k in module.kernels] == ["norm", "keep", "product"]


def test_a_module_stands_alone(monkeypatch):
    monkeypatch.setattr("dilu.codegen.generate.compile_source", lambda *_, **__: b"")
    for target in C_TARGETS:
        source = generate(parse_graph(SMALL), target).source
        assert not re.search(r'^#include "', source, re.MULTILINE)
        assert ("_mm256_fmadd_ps" in source) == ("avx2" in target.requires)


def test_every_step_has_an_emitter():
    assert set(STEPS) == set(Step.__args__)


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_is_lowered(name):
    """In loops, or as the heart of a kernel, or by the plan."""
    others = {"matmul", "experts", "attention", "topk", "cache_update", "call", "kernel"}
    others |= {"routed", "all_reduce", "all_gather"}
    assert (name in LOWERINGS) != (name in others)


@pytest.mark.parametrize("t", [F32, F64, I64, BOOL])
def test_every_elementwise_op_has_c(t):
    floats = set("exp log sqrt rsqrt sin cos tanh erf sigmoid floor".split())
    logical = {"logical_and", "logical_or", "logical_not"}
    compare = {"eq", "ne", "lt", "le", "gt", "ge"}
    arithmetic = {"neg", "abs", "add", "sub", "mul", "div", "mod", "pow", "maximum", "minimum"}
    names = compare | (logical if t == BOOL else arithmetic) | (floats if t.is_float else set())
    for name in names:
        unary = name in floats | {"neg", "abs", "logical_not"}
        args = tuple(Name(n, t) for n in "ab")[: 1 if unary else 2]
        out = BOOL if name in compare | logical else t
        assert Expressions().emit(Apply(name, args, out))
    assert set(FORMATS) >= {"f32", "bf16", "f16", "f8e4m3", "f8e5m2", "f8e8m0"}
