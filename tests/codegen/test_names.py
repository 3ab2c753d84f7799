"""Whatever sizes, values and kernels are called, generated code has names of its own."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import sympy
import torch
from interpreted import INTERPRETED, InterpretedDevice
from torch import nn

import dilu
from dilu.codegen import targets
from dilu.codegen.c.emit import library_text as c_library
from dilu.codegen.generate import generate
from dilu.codegen.names import buffer_name, kernel_name, plan_name
from dilu.codegen.targets import find_target
from dilu.codegen.triton.emit import library_text as triton_library
from dilu.ir.text import parse_graph, print_graph
from dilu.ir.types import parse_dim, print_dim, symbol

#: Words of C and Python, macros, functions of libraries and of ours, names that emitters make up,
#: what sympy and the grammar of sizes know, letters that C and Python read in ways of their own.
WORDS = (
    "int for restrict EOF NULL I near unix linux errno NAN INFINITY main exp min max tl triton"
    " lambda print None True def BM SPLIT batch acc m0 i0 j0 v0 row0 a b out thread scratch sizes"
    " dilu_share dilu_pool kernel_main_0_add run_main dim_T t_x constant_t_x S E N pi Q T B"
    " größe ﬁ नाम _ __file__ s0 s1 inf nan func return"
).split()
LONG = "very_" * 60 + "long"


class Named(nn.Module):
    """Two rows of numbers, and parameters whose names differ in what C cannot write."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        torch.manual_seed(0)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(4)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = x * getattr(self, name)
        return torch.relu(x).sum(0) + torch.sigmoid(y @ torch.ones(4, 1))


def compiled_module(module: nn.Module, dims: tuple[str, str], **options):
    shapes = tuple({0: torch.export.Dim(name)} for name in dims)
    inputs = torch.randn(3, 4), torch.randn(5, 4)
    return dilu.compile(module, inputs, dynamic_shapes=shapes, **options)


def test_parameters_that_differ_in_odd_letters(tmp_path):
    """They are told apart in the graph's text, in C and in the manifest."""
    names = ["a b", "a-b", "a_b", "größe", "gr__e", "exp", "x", "scratch", "EOF", LONG]
    module = Named([*names, LONG + "er"])
    artifact = compiled_module(module, ("x", "scratch"))
    x, y = torch.randn(2, 4), torch.randn(7, 4)
    with dilu.load(artifact) as session:
        got = session(x, y)
    np.testing.assert_allclose(got.numpy(), module(x, y).detach().numpy(), rtol=1e-4, atol=1e-5)
    (main,) = artifact.manifest["functions"]
    assert main["symbols"] == ["x", "scratch"] and {*names, "x_1"} - {"x"} <= {*main["constants"]}
    text = artifact.read("graph/planned.txt").decode()
    assert print_graph(parse_graph(text)) == text


def function_of(number: int, size: str, other: str) -> str:
    """Return a function whose sizes, values and kernels have these names."""
    return f"""
    func @f{number}(%{size}: f32[{size},4], %y: f32[{other},{size}]) {{
      %a: f32[{size},4] = kernel(%{size}) {{kind="loops",
        body=func @f{number}_0_{size}(%{size}: f32[{size},4]) {{
        %{other}: f32[{size},4] = exp(%{size})
        return %{other}
      }}}}
      %z: f32[{other},4] = kernel(%y, %a) {{kind="matmul",
        body=func @f{number}_1_{other}(%{other}: f32[{other},{size}], %{size}: f32[{size},4]) {{
        %m: f32[{other},4] = matmul(%{other}, %{size}) {{transpose_b=false}}
        %z: f32[{other},4] = tanh(%m)
        return %z
      }}}}
      return %z
      arena 16*{size} : %a
    }}"""


PAIRS = [p for p in zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True) if all(map(str.isalnum, p))]
TEXT = "graph planned" + "".join(function_of(i, *p) for i, p in enumerate(PAIRS))


def test_c_of_any_word(compiled, reference):
    """Every size and value is called like a word, all functions are in one module."""
    graph = parse_graph(TEXT)
    assert parse_graph(print_graph(graph)) == graph
    made = compiled(graph, optimize="-O0")
    assert made.module.symbols == tuple(PAIRS)
    rng = np.random.default_rng(0)
    for i, (size, other) in enumerate(PAIRS):
        arrays = [rng.normal(size=s).astype(np.float32) for s in ((3, 4), (2, 3))]
        sizes = {size: 3, other: 2}
        (want,) = reference(graph, f"f{i}", arrays, sizes)
        np.testing.assert_allclose(made.run(f"f{i}", arrays, sizes)[0], want, rtol=1e-5, atol=1e-6)


def test_python_of_any_word(monkeypatch):
    monkeypatch.setattr("dilu.codegen.triton.build.compile_jobs", lambda *_, **__: None)
    module = generate(parse_graph(TEXT), find_target("cuda:80"))
    compile(module.source, "kernels.py", "exec")
    entries = json.loads(module.files["program.json"])["entries"]
    assert [tuple(e["symbols"]) for e in entries] == PAIRS
    assert all(n.startswith("dim_") for e in entries for n in e["sizes"])


@pytest.mark.slow
def test_sizes_called_like_constants_of_kernels(monkeypatch, tmp_path):
    """What a size is called is no constant of a launch's grid, however it looks."""
    monkeypatch.setattr(targets, "TARGETS", (*targets.TARGETS, INTERPRETED))
    module = Named(["BN", "tl"])
    artifact = compiled_module(module, ("BM", "SPLIT"), target=INTERPRETED.name)
    artifact.save(tmp_path / "m.dilu")
    x, y = torch.randn(40, 4), torch.randn(21, 4)
    with dilu.load(tmp_path / "m.dilu", device=InterpretedDevice()) as session:
        got = session(x, y)
    np.testing.assert_allclose(got.numpy(), module(x, y).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_names_begin_as_nothing_else_does():
    """No word of the libraries that generated code contains begins as a name of ours."""
    words = set(re.findall(r"\w+", c_library(find_target("cpu:baseline")) + triton_library()))
    made = [buffer_name(w) for w in words] + [kernel_name(w) for w in words]
    assert words.isdisjoint([*made, *map(plan_name, words)])
    assert not [w for w in words if w.startswith(("dim_", "t_", "kernel_"))]


@pytest.mark.parametrize("name", WORDS)
def test_a_size_of_any_name_is_read_as_it_is_printed(name):
    size = sympy.floor(sympy.Max(2 * symbol(name), 7) / 3) + symbol(name) * 2
    assert parse_dim(print_dim(size)) == size
    assert parse_dim(f"max({name}, 3)").free_symbols == {symbol(name)}


def test_names_are_ascii_short_and_apart():
    taken: list[str] = []
    for name in ("a.b", "a_b", "a b", "größe", "gr__e", LONG, LONG + "x", ""):
        taken.append(buffer_name(name, taken))
        assert re.fullmatch(r"t_[A-Za-z0-9_]*", taken[-1]) and len(taken[-1]) < 80
    assert len(set(taken)) == len(taken)


def test_errors_call_sizes_as_the_user_does():
    text = """graph planned
      func @main(%x: f32[T,big]) {
        %y: f32[T,2], %i: i64[T,2] = kernel(%x) {kind="topk", body=func @k(%x: f32[T,big]) {
          %y: f32[T,2], %i: i64[T,2] = topk(%x) {k=2}
          return %y, %i
        }}
        return %y, %i
      }"""
    with pytest.raises(dilu.DiluError, match="top-k of rows of big is not supported"):
        generate(parse_graph(text), find_target("cuda:80"))
