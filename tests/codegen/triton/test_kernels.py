"""Kernels as GPUs get them, on the graphs that the tests of C have: under Triton's interpreter, or
on a real device (see `interpreted.under_test`).

The interpreter's operands are f32, so that errors are those of adding in f32; or the f16 parts that
stand for them. Behind every result and state lie bytes that no kernel may touch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from interpreted import (
    INTERPRETED,
    TARGET,
    InterpretedDevice,
    bound,
    interpreted_target,
    under_test,
)

from dilu.codegen.generate import Module, generate
from dilu.codegen.target import Target
from dilu.codegen.targets import find_target
from dilu.ir.dtypes import BF16, F8E4M3, F16, F32, F64, I64, DType, decode
from dilu.ir.graph import Function, Graph, Value
from dilu.ir.ops.elementwise import Add, Cast, Exp, Maximum, Mul, Pow, Sin
from dilu.ir.rewrite import Builder
from dilu.ir.types import TensorType, evaluate, symbol
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.gpu.bind import Addresses, arena_bytes, bind
from dilu.runtime.gpu.choose import fit
from dilu.runtime.gpu.device import Device
from dilu.runtime.gpu.executor import Executor
from dilu.runtime.gpu.program import read_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # places behind masks are computed, too
]

TESTED = INTERPRETED if TARGET is None else find_target(TARGET)
HALVES = interpreted_target(F16, "interpreter:16")
GUARD = 512  # bytes


class OnDevice:
    """A compiled graph; `run` takes and returns raw storage. `launched`: names of kernels."""

    def __init__(self, graph: Graph, target: Target, device: Device) -> None:
        assert target.gpu is not None
        self.graph, self.device = graph, device
        self.module: Module = generate(graph, target)
        self.launched: list[str] = []
        described = {
            "program": "kernels/program.json",  # kernels are looked for beside it
            "source": "kernels/module.py",
            "backend": target.gpu.backend,
            "arch": target.gpu.arch,
        }
        files = {"module.py": self.module.source.encode(), **self.module.files}
        files = {f"kernels/{name}": data for name, data in files.items()}
        artifact = Artifact({"name": "kernels", "targets": {target.name: described}}, files)
        fits = fit(described, device.info)
        assert fits is not None, f"{target.name} does not run on {device.info.text}"
        self.program = read_program(artifact, target.name)
        self.executor = Executor(device, artifact, target.name, self.program, text=fits.text)

    def run(
        self, name: str, inputs: Sequence[np.ndarray], sizes: dict[str, int] | None = None
    ) -> list[np.ndarray]:
        """Run a function; return its results, then its states."""
        with self.device.active():
            return self._run(name, inputs, sizes)

    def _run(
        self, name: str, inputs: Sequence[np.ndarray], sizes: dict[str, int] | None
    ) -> list[np.ndarray]:
        function = self.graph.function(name)
        number = self.module.functions.index(name)
        known = sizes if sizes is not None else _sizes(function, inputs)
        first = len(function.parameters)
        second = first + len(function.states)
        codes = [a for a in inputs[second:] if a.dtype == np.uint8]
        nan = any(np.isnan(decode(F8E4M3, a)).any() for a in codes)
        self.executor.load({}, nan=nan)
        given = [self._placed(a) for a in inputs]
        results = [
            np.full(tuple(evaluate(d, known) for d in r.type.shape), 0, r.type.dtype.storage)
            for r in function.results
        ]
        made = [self._placed(r) for r in results]
        arena = self._placed(np.zeros(arena_bytes(self.program, number, known), np.uint8))
        addresses = Addresses(
            tuple(given[:first]),
            tuple(given[first:second]),
            tuple(given[second:]),
            tuple(made),
            arena,
        )
        own = {s: known[s] for s in self.module.symbols[number]}
        self.executor.run(number, own, addresses)
        launches = bind(self.program, number, own, self.executor.chosen, addresses)
        self.launched = [self.program.kernels[b.launch.run].name for b in launches]
        outputs = [*results, *(np.array(a) for a in inputs[first:second])]
        for array, address in zip(outputs, [*made, *given[first:second]], strict=True):
            self._fetch(array.reshape(-1).view(np.uint8), address)
        for array, address in zip([*inputs, *results], [*given, *made], strict=True):
            guard = np.empty(GUARD, np.uint8)
            self._fetch(guard, address + array.nbytes)
            assert (guard == 0xAB).all(), f"@{name} writes beyond the end of an array"
        self.executor.forget()
        for address in [*given, *made, arena]:
            self.device.free(address)
        return outputs

    def _placed(self, array: np.ndarray) -> int:
        raw = np.full(array.nbytes + GUARD, 0xAB, np.uint8)
        raw[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self.device.allocate(raw.nbytes)
        self.device.upload(address, raw)
        self.device.synchronize()
        return address

    def _fetch(self, raw: np.ndarray, address: int) -> None:
        if raw.nbytes:
            self.device.download(raw, address)
            self.device.synchronize()


def _sizes(function: Function, inputs: Sequence[np.ndarray]) -> dict[str, int]:
    return {
        str(want): got
        for value, array in zip(function.inputs, inputs, strict=True)
        for want, got in zip(value.type.shape, array.shape, strict=True)
        if not isinstance(want, int) and want.is_Symbol
    }


@pytest.fixture(scope="module")
def device() -> Device:
    return under_test()[1]


@pytest.fixture(scope="module")
def compiled(planned, device) -> Callable[..., OnDevice]:
    """Return `compile(graph or text)`; whatever else a test of kernels in C asks for, such as a
    target, is not heard."""

    def compile_graph(graph: Graph | str, *_: Any, **__: Any) -> OnDevice:
        return OnDevice(planned(graph) if isinstance(graph, str) else graph, TESTED, device)

    return compile_graph


@pytest.fixture(autouse=True)
def bounds(load_tests, monkeypatch) -> None:
    for file in ("test_products.py", "test_language.py", "test_loops.py"):
        tests = load_tests(file)
        monkeypatch.setattr(tests, "BOUND", bound(tests.BOUND))


@pytest.fixture
def hold(reference, random_inputs, load_tests) -> Callable[[OnDevice, int], list[str]]:
    """Return `hold(graph, rows)`: compare all functions of products with the reference in f64, and
    return the names of what was launched."""
    tests = load_tests("test_products.py")

    def check(made: OnDevice, size: int) -> list[str]:
        launched: list[str] = []
        for f in made.graph.functions:
            inputs = tests.model_inputs(f, {"T": size}, random_inputs, size)
            (got,) = made.run(f.name, inputs, {"T": size})
            launched += made.launched
            (want,) = reference(made.graph, f.name, inputs, {"T": size}, wide=True)
            tests.assert_close(f.results[0], got, want, f"@{f.name}, T={size}")
        return launched

    return check


FORMS = {1: "few", 13: "few", 19: "some", 70: "many"}


@pytest.mark.parametrize("size", FORMS)
def test_products(compiled, load_tests, hold, size):
    launched = hold(compiled(load_tests("test_products.py").TEXT), size)
    assert sum(name.endswith(FORMS[size]) for name in launched) >= 12


def test_products_of_parts(planned, load_tests, hold):
    """Operands in f16: what f32 and bf16 hold beyond them is in second parts."""
    graph = planned(load_tests("test_products.py").TEXT)
    hold(OnDevice(graph, HALVES, InterpretedDevice("16")), 19)


def test_parts_of_k(planned, device, load_tests, hold):
    """K is cut where columns alone keep no GPU busy; the last part is shorter, or ragged."""
    tests = load_tests("test_products.py")
    text = "graph planned\n"
    for k, form in ((1100, "e4m3_128"), (2100, "e4m3_mx"), (1024, "bf16")):
        declared, nodes, w = tests.chain("w", 40, k, *tests.FORMATS[form])
        nodes += f"%p: f32[T,40] = matmul(%x, %{w}) {{transpose_b=true}}\n"
        nodes += "%y: f32[T,40] = add(%residual, %p)\n"
        parameters = f"%x: f32[T,{k}], %residual: f32[T,40]"
        text += tests.function(f"cut_{form}", parameters, declared, nodes, "%y: f32[T,40]")
    assert TESTED.gpu is not None
    few = replace(TESTED, gpu=replace(TESTED.gpu, programs=8))
    made = OnDevice(planned(text), few, device)
    launched = hold(made, 3)
    assert [name.endswith("_few_sum") for name in launched] == [False, True] * 3
    hold(made, 16)
    assert not any(name.endswith("_sum") for name in hold(made, 17))


@pytest.mark.parametrize("size", [1, 9, 45])
def test_experts(compiled, load_tests, reference, random_inputs, size):
    """So many tokens that an expert has few assignments, or none, or more than a block of few."""
    tests = load_tests("test_products.py")
    made = compiled(f"graph planned\n{tests.experts_text()}{tests.experts_text('gelu_tanh')}")
    for f in made.graph.functions:
        inputs = tests.model_inputs(f, {"T": size}, random_inputs, size)
        inputs[1] = np.random.default_rng(size).integers(0, tests.E, (size, tests.TOP))
        (got,) = made.run(f.name, inputs, {"T": size})
        (want,) = reference(made.graph, f.name, inputs, {"T": size}, wide=True)
        tests.assert_close(f.results[0], got, want, f"@{f.name}, T={size}")
        form = "few" if size < 45 else "many"
        assert sum(form in name for name in made.launched) == 3


@pytest.mark.parametrize("lengths", [(1,), (40, 27)])
def test_attention_of_many_tokens(compiled, load_tests, reference, random_inputs, lengths):
    """All tokens of every sequence: one, or tiles that hold the end of one and the next."""
    tests = load_tests("test_language.py")
    pages = -(-max(lengths) // tests.G)
    sizes = {"T": sum(lengths), "S": len(lengths), "P": pages, "B": pages * len(lengths)}
    made = compiled(tests.ATTENTION)
    for f in made.graph.functions:
        inputs = random_inputs(f, sizes, 4)
        inputs[1] = np.concatenate([np.arange(n) for n in lengths])
        inputs[2] = np.repeat(np.arange(len(lengths)), lengths)
        inputs[3] = np.random.default_rng(1).permutation(sizes["B"]).reshape(-1, pages)
        got = decode(f.results[0].type.dtype, made.run(f.name, inputs, sizes)[0])
        want = reference(made.graph, f.name, inputs, sizes, wide=True)[0]
        atol = 1e-2 if f.name == "half" else tests.BOUND
        np.testing.assert_allclose(got, want, atol=atol, err_msg=f.name)
        assert made.launched[-1].endswith("many" if sizes["T"] > 16 else "few_sum")


def test_loops_of_more_rows(compiled, load_tests, reference):
    tests = load_tests("test_loops.py")
    functions = tuple(tests._Random(seed).function(f"f{seed}") for seed in range(60, 80))
    graph = Graph("planned", functions)
    tests.assert_same(graph, compiled(graph), reference, {"T": 70}, 70)


def test_literals(compiled, load_tests, reference):
    """A function of the library gets no bare number, and f64 keeps its precision."""
    f = literals(load_tests)
    graph = Graph("planned", (f,))
    data = [np.random.default_rng(0).random((5,)) for _ in range(2)]
    inputs = [data[0].astype(np.float32), data[1], np.arange(5)]
    want = reference(graph, "literals", inputs, {"T": 5})
    for g, w in zip(compiled(graph).run("literals", inputs), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-15 if g.dtype == np.float64 else 3e-7)


def literals(load_tests) -> Function:
    """Return a function that applies ops to literals, and to literals and other values."""
    types = {"x": F32, "wide": F64, "n": I64}
    x, wide, n = (Value(name, TensorType(t, (symbol("T"),))) for name, t in types.items())
    builder = Builder(set(types))

    def literal(value: float, t: DType) -> Value:
        return builder.literal(value, t)

    def plus(value: Value, *more: Value) -> Value:
        for each in more:
            value = builder.emit(Add(), value, builder.emit(Cast(value.type.dtype), each))
        return value

    constants = [literal(0.3, BF16), literal(0.3, F16), builder.emit(Sin(), literal(0.3, F32))]
    powers = [
        builder.emit(Pow(), x, literal(1.7, F32)),
        builder.emit(Pow(), literal(3.0, F32), x),
        builder.emit(Maximum(), literal(0.1, F32), x),
    ]
    larger = builder.emit(Maximum(), wide, literal(0.6, F64))
    scaled = builder.emit(Mul(), builder.emit(Exp(), literal(0.1, F64)), larger)
    cube = builder.emit(Pow(), n, literal(3, I64))
    whole = builder.emit(Add(), cube, builder.emit(Pow(), literal(2, I64), n))
    results = (plus(x, *constants, *powers), scaled, whole)
    return load_tests("test_loops.py").kernel_function(
        "literals", (x, wide, n), builder.nodes, results
    )


def test_literals_compile(load_tests):
    """The interpreter is less strict about what is a tensor."""
    target = find_target("cuda:80")
    made = generate(Graph("planned", (literals(load_tests),)), target)
    assert any(name.endswith(".cubin") for name in made.files)


TESTS = {
    "test_products.py": ["test_no_tokens", "test_what_is_not_finite_stays_in_its_row"],
    "test_language.py": [
        "test_attention",
        "test_attention_where_scores_are_minus_infinity",
        "test_topk",
        "test_cache_update",
    ],
    "test_loops.py": [
        "test_random_graphs_are_exact",
        "test_elementary_functions",
        "test_nan_and_infinity_pass_through_maxima",
        "test_integers_follow_the_reference",
        "test_indices_beyond_a_table_do_not_leave_it",
        "test_powers_and_softmax",
        "test_no_rows_is_no_work",
    ],
}


@pytest.mark.parametrize(("file", "name"), [(f, n) for f in TESTS for n in TESTS[f]])
def test_what_kernels_in_c_are_held_to(request, load_tests, file, name):
    """Run a test of kernels in C, on those in Triton."""
    test = getattr(load_tests(file), name)
    wanted = [n for n in inspect.signature(test).parameters if n != "target"]
    given = {n: request.getfixturevalue(n) for n in wanted}
    test(**given, **({"target": ""} if "target" in inspect.signature(test).parameters else {}))
