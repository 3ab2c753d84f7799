"""Running graphs on random inputs, before and after passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from dilu.ir.dtypes import DType, decode
from dilu.ir.graph import Function, Graph
from dilu.ir.interpret import interpret, weight_values
from dilu.ir.types import evaluate

SIZES = {"T": 5, "R": 2, "S": 2, "P": 3, "B": 7, "N": 6, "M": 4}


def raw(t: DType, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return random storage of a type: codes of all kinds, small integers."""
    if t.kind == "bool":
        return rng.random(shape) < 0.5
    if t.is_integer:
        return rng.integers(0, 2, shape).astype(t.storage)
    if t.is_code:
        return rng.integers(0, 256, shape).astype(t.storage)
    values = rng.normal(size=shape).astype(np.float32)
    values[rng.random(shape) < 0.05] = -0.0
    if t.name == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(t.storage)


def inputs(function: Function, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Return random storage for every input, by name. Slots differ from one another."""
    rng = np.random.default_rng(seed)
    out = {}
    for value in function.inputs:
        shape = tuple(evaluate(d, sizes) for d in value.type.shape)
        if value.name == "slots":
            out[value.name] = rng.permutation(28)[: shape[0]]
        elif value.name == "pages":
            out[value.name] = rng.integers(0, sizes["B"], shape)
        elif value.name == "positions":
            out[value.name] = rng.integers(0, 4, shape)
        else:
            out[value.name] = raw(value.type.dtype, shape, rng)
    return out


def run(graph: Graph, name: str, given: Mapping[str, np.ndarray], sizes) -> tuple[np.ndarray, ...]:
    """Interpret a function on raw storage; constants the compiler made come from the graph."""
    function = graph.function(name)
    arrays = []
    for value in function.inputs:
        if value.name in given:
            arrays.append(decode(value.type.dtype, given[value.name]))
        else:
            arrays.append(weight_values(graph.weights[value.name]))
    return interpret(function, arrays, sizes)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same number for number, zeros with their sign, NaN as NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    nan = np.isnan(a)
    equal = np.array_equal(nan, np.isnan(b)) and np.array_equal(a[~nan], b[~nan])
    return bool(equal and np.array_equal(np.signbit(a[~nan]), np.signbit(b[~nan])))


@pytest.fixture
def exact() -> Callable[..., None]:
    """Return `check(before, after)`: both compute the same numbers, bit for bit."""

    def check(before: Graph, after: Graph, *, sizes=SIZES, seeds=range(3)) -> None:
        for function in before.functions:
            for seed in seeds:
                given = inputs(function, sizes, seed)
                want = run(before, function.name, given, sizes)
                got = run(after, function.name, given, sizes)
                assert len(want) == len(got)
                for value, a, b in zip(function.outputs, want, got, strict=True):
                    assert same_bits(a, b), f"{value} differs: {a.ravel()[:8]} and {b.ravel()[:8]}"

    return check
