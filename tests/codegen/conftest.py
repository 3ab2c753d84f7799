"""Running compiled graphs on random inputs, beside the reference interpreter."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dilu.codegen.generate import Module, generate
from dilu.codegen.target import Target
from dilu.codegen.targets import find_target
from dilu.ir.dtypes import DType, decode
from dilu.ir.graph import Function, Graph, Slot
from dilu.ir.interpret import interpret
from dilu.ir.text import parse_graph
from dilu.ir.types import evaluate
from dilu.ir.verify import verify
from dilu.runtime.cpu.driver import Library

Sizes = Mapping[str, int]


def misaligned(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array at an odd address, as weights in a file may lie."""
    raw = np.empty(array.nbytes + 65, np.uint8)
    start = 1 + (-raw.ctypes.data) % 64
    raw[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return raw[start : start + array.nbytes]


class Compiled:
    """A compiled graph; `run` takes and returns raw storage."""

    def __init__(self, graph: Graph, module: Module, threads: int) -> None:
        self.graph = graph
        self.module = module
        self.library = Library(module.library, threads)

    def run(
        self, name: str, inputs: Sequence[np.ndarray], sizes: Sizes | None = None
    ) -> list[np.ndarray]:
        """Run a function; return its results, then its states."""
        function = self.graph.function(name)
        number = self.module.functions.index(name)
        known = dict(sizes or bound_sizes(function, inputs))
        first = len(function.parameters)
        second = first + len(function.states)
        states = [np.array(a) for a in inputs[first:second]]
        pieces: list[np.ndarray] = []
        tables: list[np.ndarray] = []
        for value, array in zip(function.constants, inputs[second:], strict=True):
            weight = self.graph.weights.get(value.name)
            grid = 0 if weight is None or weight.data is not None else weight.grid
            parts = array.reshape(math.prod(array.shape[:grid]), -1) if grid else array[None]
            parts = [misaligned(p) for p in parts]
            pieces += parts
            tables.append(np.array([p.ctypes.data for p in parts], np.uint64))
        constants = np.array([t.ctypes.data for t in tables], np.uint64)
        results = []
        for r in function.results:
            shape = tuple(evaluate(d, known) for d in r.type.shape)
            results.append(np.empty(shape, r.type.dtype.storage))
        self.library.run(
            number,
            [known[s] for s in self.module.symbols[number]],
            [np.ascontiguousarray(a) for a in inputs[:first]],
            states,
            constants,
            results,
        )
        return [*results, *states]


def bound_sizes(function: Function, inputs: Sequence[np.ndarray]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value, array in zip(function.inputs, inputs, strict=True):
        for want, got in zip(value.type.shape, array.shape, strict=True):
            if not isinstance(want, int) and want.is_Symbol:
                sizes[str(want)] = got
    return sizes


def raw(t: DType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return random storage: ordinary values, and narrow codes that are not NaN."""
    if t.kind == "bool":
        return rng.random(shape) < 0.5
    if t.is_integer:
        return rng.integers(0, 3, shape).astype(t.storage)
    if t.is_code:
        codes = rng.integers(0, 256, shape).astype(t.storage)
        return np.where(np.isfinite(decode(t, codes)), codes, 0).astype(t.storage)
    values = rng.normal(size=shape).astype(np.float32)
    if t.name == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(t.storage)


def random_inputs(function: Function, sizes: Sizes, seed: int = 0) -> list[np.ndarray]:
    """Return random storage for every input of a function."""
    rng = np.random.default_rng(seed)
    return [
        raw(v.type.dtype, tuple(evaluate(d, sizes) for d in v.type.shape), rng)
        for v in function.inputs
    ]


def reference(
    graph: Graph, name: str, inputs: Sequence[np.ndarray], sizes: Sizes, *, wide: bool = False
) -> tuple[np.ndarray, ...]:
    """Interpret a function on raw storage; return values."""
    function = graph.function(name)
    values = [decode(v.type.dtype, a) for v, a in zip(function.inputs, inputs, strict=True)]
    return interpret(function, values, sizes, wide=wide)


def planned(text: str) -> Graph:
    """Return the graph of a text, every value that needs it in a slot of its own."""
    graph = parse_graph(text)

    def with_slots(function: Function) -> Function:
        placed = {v.name for v in function.outputs} | {n for s in function.arena for n in s.values}
        nodes = []
        slots: list[Slot] = list(function.arena)
        for node in function.nodes:
            if node.op.name == "call":
                node = replace(node, op=replace(node.op, body=with_slots(node.op.body)))
            nodes.append(node)
            if node.op.name == "reshape":
                continue
            body = node.op.body
            slots += [
                Slot(v.type.nbytes, (v.name,))
                for v in node.outputs[: len(body.results)]
                if v.name not in placed
            ]
        return replace(function, nodes=tuple(nodes), arena=tuple(slots))

    graph = replace(graph, stage="planned", functions=tuple(map(with_slots, graph.functions)))
    verify(graph)
    return graph


@cache
def load_tests(path: str) -> ModuleType:
    """Return the module of another file of tests in this folder, for the graphs that it has."""
    file = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(f"graphs_of_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="load_tests", scope="session")
def _load_tests() -> Callable[[str], ModuleType]:
    return load_tests


@pytest.fixture(name="reference", scope="session")
def _reference() -> Callable[..., tuple[np.ndarray, ...]]:
    return reference


@pytest.fixture(name="planned", scope="session")
def _planned() -> Callable[[str], Graph]:
    return planned


@pytest.fixture(name="random_inputs", scope="session")
def _random_inputs() -> Callable[..., list[np.ndarray]]:
    return random_inputs


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[..., Compiled]]:
    """Return `compile(graph or text, target, threads)`; the libraries are closed afterwards."""
    made: list[Compiled] = []

    def compile_graph(
        graph: Graph | str, target: Target | str = "cpu", threads: int = 2, optimize: str = "-O1"
    ) -> Compiled:
        graph = planned(graph) if isinstance(graph, str) else graph
        target = find_target(target) if isinstance(target, str) else target
        made.append(Compiled(graph, generate(graph, target, optimize=optimize), threads))
        return made[-1]

    yield compile_graph
    for each in made:
        each.library.close()
