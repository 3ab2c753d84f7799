"""Emitted Triton: goldens of what is generated for four ways of multiplying, and what holds for
every module."""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import replace

import pytest
import sympy

from dilu.codegen.generate import Module, generate
from dilu.codegen.index import FloorDiv, Remainder
from dilu.codegen.kernel_ir import Apply, Buffer, Literal, Name, Step
from dilu.codegen.names import buffer_name, kernel_name
from dilu.codegen.targets import GPUS, find_target
from dilu.codegen.triton.emit import LIBRARY, MARK, generated_part, library_text
from dilu.codegen.triton.emit_kernel import STEPS
from dilu.codegen.triton.expressions import emit_apply, emit_index, emit_literal
from dilu.codegen.triton.scope import BOTH, COLUMNS, ROWS, SCALAR, Scope
from dilu.codegen.triton.writer import Writer
from dilu.errors import UnsupportedError
from dilu.ir.dtypes import BF16, BOOL, F4E2M1, F32, F64, I64
from dilu.ir.graph import Graph
from dilu.ir.text import parse_graph
from dilu.ir.types import symbol

#: Operands in f16, decoded by inline assembly; in bf16, by inline assembly, by instructions of the
#: GPU, and by integer arithmetic.
NAMES = ("cuda:75", "cuda:80", "cuda:90", "hip:gfx90a")


def emitted(graph: Graph | str, name: str = "cuda:80") -> Module:
    """Return the module of a graph for a target, nothing compiled."""
    graph = parse_graph(graph) if isinstance(graph, str) else graph
    return generate(graph, replace(find_target(name), executable=False))


@pytest.fixture
def small(load_tests) -> str:
    return load_tests("c/test_emit.py").SMALL


@pytest.mark.parametrize("name", NAMES)
def test_source(golden, small, name):
    source = emitted(small, name).source
    golden(f"codegen/small.{name.replace(':', '-')}.triton", generated_part(source))


def test_the_golden_holds_nothing_of_the_library(small):
    source = emitted(small).source
    head = source[: source.index(MARK)]
    assert library_text() in head and "def product_tile(" in head
    assert source.count(MARK) == 1
    assert not set(functions(generated_part(source))) & set(functions(head))


def functions(source: str) -> list[str]:
    return [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]


@pytest.mark.slow
def test_a_module_is_python_that_stands_alone(small):
    for target in GPUS:
        source = emitted(small, target.name).source
        ast.parse(source)
        imports = re.findall(r"^(?:import|from) .*$", source, re.MULTILINE)
        assert imports == ["import triton", "import triton.language as tl"]
        assert source.startswith(f'"""Made by dilu for {target.name}."""')


def test_every_file_of_the_library_is_pasted_once():
    names = functions(library_text())
    assert len(names) == len(set(names)) > 50
    text = library_text()
    assert "import " not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    assert set(LIBRARY) == {"elementary", "formats", "matmul", "experts", "attention", "topk"}


def test_every_step_has_an_emitter():
    assert set(STEPS) == set(Step.__args__)


# ------------------------------------------------------------------------ what plans share


def twice(*ops: str) -> str:
    """Return a graph of functions that are one op each, on values called as the ops are."""
    body = "".join(
        f"""func @{op}{i}(%x{i}: f32[T,8]) {{
          %y: f32[T,8] = kernel(%x{i}) {{kind="loops", body=func @k{op}{i}(%x{i}: f32[T,8]) {{
            %{op}: f32[T,8] = {op}(%x{i})
            return %{op}
          }}}}
          return %y
        }}
        """
        for i, op in enumerate(ops)
    )
    return f"graph planned\n{body}"


def launched(module: Module) -> list[int]:
    """Return the number of the function that every entry of a program launches."""
    program = json.loads(module.files["program.json"])
    steps = (program["plans"][entry["plan"]]["steps"] for entry in program["entries"])
    return [launch["run"] for (step,) in steps for launch in step["launches"]]


def test_kernels_that_differ_in_names_alone_share_a_function(planned):
    module = emitted(planned(twice("exp", "exp")))
    assert launched(module) == [0, 0]
    assert functions(generated_part(module.source)) == ["kernel_kexp0"]
    assert [k.function for k in module.kernels] == ["kernel_kexp0"] * 2


def test_a_value_called_as_its_op_hides_no_difference(planned):
    assert launched(emitted(planned(twice("exp", "log", "exp")))) == [0, 1, 0]


def test_what_generated_text_calls_is_no_name_of_a_value(load_tests, planned):
    """A value with the name of a function of the library would hide it."""
    sources = [load_tests("test_products.py").TEXT, load_tests("test_language.py").ATTENTION]
    sources += [load_tests("test_language.py").TOPK]
    products = load_tests("test_products.py")
    sources += [f"graph planned\n{products.experts_text(a)}" for a in ("silu", "gelu_tanh")]
    words: set[str] = set()
    for source in sources:
        words |= set(re.findall(r"\b\w+", generated_part(emitted(planned(source)).source)))
    called = words & set(functions(library_text()))
    assert {"product_tile", "tile_of", "silu", "gelu_tanh", "attention_split"} <= called
    ours = {buffer_name(name) for name in called} | {kernel_name(name) for name in called}
    assert ours.isdisjoint(words | set(functions(library_text())))


# -------------------------------------------------------------------------- text of parts


def test_index_expressions():
    a, b = symbol("a"), symbol("b")
    assert emit_index(a * 3 + b - 1, {"a": "a_0_"}) in ("a_0_ * 3 + b - 1", "b + a_0_ * 3 - 1")
    assert emit_index(a + 1, {}, 1) == "(a + 1)"
    assert emit_index(FloorDiv(a + 7, 8) * 4, {}) == "((a + 7) // 8) * 4"
    assert emit_index(Remainder(a, 8), {}) == "a % 8"
    assert emit_index(sympy.Min(a, 16), {}) == "tl.minimum(16, a)"
    with pytest.raises(UnsupportedError, match=r"the index sin\(a\) has no form in Triton"):
        emit_index(sympy.sin(a), {})


def test_literals():
    assert emit_literal(0.1, F32) == "0.1" and emit_literal(-2.0, F32) == "(-2.0)"
    assert emit_literal(0.1, F64) == "tl.full((), 0.1, tl.float64)"  # alone it would be f32
    assert emit_literal(1.5, F64) == "1.5" and emit_literal(True, BOOL) == "1"
    assert emit_literal(math.inf, F64) == 'float("inf")'
    assert emit_literal(-math.inf, F32) == '(-float("inf"))'
    assert emit_literal(math.nan, F32) == 'float("nan")'


def test_a_function_of_the_library_gets_no_bare_number():
    rounded = Apply("round", (Literal(0.3, F32),), F32, format=BF16)
    assert emit_apply(rounded, ["0.3"]) == "round_bf16(tl.full((), 0.3, tl.float32))"
    power = Apply("pow", (Name("n", I64), Literal(3, I64)), I64)
    assert "int_power(n, tl.full((), 3, tl.int64))" in emit_apply(power, ["n", "3"])
    product = Apply("mul", (Name("x", F32), Literal(0.5, F32)), F32)
    assert emit_apply(product, ["x", "0.5"]) == "(x * 0.5)"


def test_scopes_know_what_varies():
    w = Writer()
    scope = Scope(w, ("4", "64"), {0: "valid_", 1: "inside_"}, here=BOTH)
    row, column = scope.bind("i", ROWS), scope.bind("j", COLUMNS)
    assert (row, column) == ("i_0_", "j_0_") and scope.bind("i", ROWS) == "i_1_"
    i, j = symbol("i"), symbol("j")
    assert scope.axes_of(i * 8 + j) == BOTH and scope.axes_of(symbol("T")) == SCALAR
    assert scope.mask(ROWS) == "valid_" and scope.mask(SCALAR) is None
    assert scope.mask(BOTH, "a < b") == "valid_ & inside_ & (a < b)"
    assert scope.zeros(ROWS) == "tl.zeros((4, 1), tl.int32)"
    small = Buffer("x", F32, (4, 8), "argument")
    assert scope.place(small, (i, j), BOTH) == "x + (i_1_ * 8) + j_0_"
    assert scope.place(small, (0, 3), ROWS) == "x + 3 + tl.zeros((4, 1), tl.int32)"
    large = Buffer("x", F32, (symbol("T"), 1 << 20), "argument")
    assert "tl.cast(i_1_, tl.int64)" in scope.place(large, (i, j), BOTH)


# ----------------------------------------------------------------------------- errors


def topk(size: str) -> str:
    return f"""graph planned
    func @main(%x: f32[T,{size}]) {{
      %v: f32[T,2] = kernel(%x) {{kind="topk", body=func @choose(%x: f32[T,{size}]) {{
        %v: f32[T,2], %i: i64[T,2] = topk(%x) {{k=2}}
        return %v
      }}}}
      return %v
    }}
    """


def test_a_row_of_topk_fits_one_program(planned):
    assert emitted(planned(topk("16384"))).kernels
    for size in ("16385", "S"):
        with pytest.raises(
            UnsupportedError, match=f"top-k of rows of {size} is not supported"
        ) as e:
            emitted(planned(topk(size)))
        assert "@choose" in str(e.value) and "emit" in str(e.value)


def test_ops_without_a_form_are_named():
    with pytest.raises(UnsupportedError, match="no Triton for the op sin of i64"):
        emit_apply(Apply("sin", (Name("n", I64),), I64), ["n"])
    with pytest.raises(UnsupportedError, match="no Triton for encode of f4e2m1"):
        emit_apply(Apply("encode", (Name("x", F32),), F32, format=F4E2M1), ["x"])
