from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dilu.errors import DiluError, Loc
from dilu.ir.dtypes import F32
from dilu.ir.graph import Value
from dilu.ir.text import parse_graph
from dilu.ir.types import TensorType
from dilu.ir.verify import verify
from dilu.ir.weights import Weight

KERNEL = '{body=func @k(%x: f32[T]) {\n %y: f32[T] = exp(%x)\n return %y }, kind="loops"}'


def graph(body: str, stage: str = "captured", head: str = "(%x: f32[T])"):
    return parse_graph(f"graph {stage}\nfunc @f{head} {{\n  {body}\n}}")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (graph("%y: f32[4] = exp(%x)\n return %y"), r"in @f, %y: .*: the types should be f32\[T\]"),
        (graph("%x: f32[T] = exp(%x)\n return %x"), "%x is defined twice"),
        (graph("%y: f32[T] = add(%x)\n return %y"), "add takes another number of"),
        (graph("return %x", head="(%x: f32[T]) state(%s: f32[T])"), "every state needs exactly"),
        (
            graph("return update %x", head="(%x: f32[T]) state(%s: f32[4])"),
            "%s is updated by %x, which has another type",
        ),
        (graph("%y: u8[T] = encode(%x) {format=f8e4m3, saturate=true}\n return %y"),
         "op encode must be gone by now"),
        (graph(f"%y: f32[T] = kernel(%x) {KERNEL}\n return %y", "normalized"), "op kernel must be"),
        (graph("%y: f8e4m3[T] = cast(%x) {dtype=f8e4m3}\n return %x", "legalized"),
         r"%y has type f8e4m3\[T\], which must be gone by now"),
        (graph("%y: f32[T] = exp(%x)\n return %y", "fused"), "op exp must be inside a kernel"),
        (graph("return %x", "cooked"), "unknown stage 'cooked'"),
        (
            graph("%y: f32[T] = call(%x) {times=1, body=func @g(%x: f32[T]) {\n"
                  " %y: f32[4] = exp(%x)\n return %x }}\n return %y"),
            "invalid graph in @g",
        ),
        (
            graph("%y: f32[T] = call(%x, %x) {times=1, body=func @g(%x: f32[T]) {\n return %x }}\n"
                  " return %y"),
            "call of @g: wrong number of operands",
        ),
        (
            graph("%y: f32[4] = call(%x) {times=2, body=func @g(%x: f32[T]) const(%w: f32[4]) {\n"
                  " return %w }}\n return %y"),
            "call of @g",
        ),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_refused(made, message):
    with pytest.raises(DiluError, match=message):
        verify(made)


def test_use_before_definition():
    good = graph("%y: f32[T] = exp(%x)\n %z: f32[T] = neg(%y)\n return %z")
    (function,) = good.functions
    turned = replace(function, nodes=function.nodes[::-1])
    with pytest.raises(DiluError, match=r"%y: f32\[T\] is used but not defined before"):
        verify(replace(good, functions=(turned,)))


def test_errors_carry_the_users_line():
    made = graph("%y: f32[4] = exp(%x)\n return %y")
    (function,) = made.functions
    node = replace(function.nodes[0], loc=Loc("model.py", 7))
    with pytest.raises(DiluError) as caught:
        verify(replace(made, functions=(replace(function, nodes=(node,)),)))
    assert "at model.py:7" in str(caught.value)


def test_a_weight_of_another_type():
    made = graph("return %w", head="(%x: f32[T]) const(%w: f32[4])")
    weight = Weight(TensorType(F32, (5,)), data=np.zeros(5, np.float32))
    with pytest.raises(DiluError, match=r"@f: %w is bound to f32\[5\]"):
        verify(replace(made, weights={"w": weight}))


def test_what_is_accepted():
    verify(graph("%y: f32[T] = exp(%x)\n return %y"))
    verify(graph(f"%y: f32[T] = kernel(%x) {KERNEL}\n return %y", "fused"))
    verify(graph("%y: f32[1,T] = reshape(%x) {shape=[1, <T>]}\n return %y", "planned"))
    assert str(Value("a", TensorType(F32, ()))) == "%a"
