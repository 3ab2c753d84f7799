"""Index arithmetic against plain integers."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dilu.codegen.index import (
    FloorDiv,
    Range,
    Remainder,
    divmod_index,
    flat_index,
    index,
    reshape_index,
    variable,
)  # fmt: skip
from dilu.ir.types import symbol

T = symbol("T")


def evaluate(value, known: dict[str, int]) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, FloorDiv):
        return evaluate(value.args[0], known) // evaluate(value.args[1], known)
    if isinstance(value, Remainder):
        return evaluate(value.args[0], known) % evaluate(value.args[1], known)
    if value.is_Symbol:
        return known[value.name]
    if value.is_Integer:
        return int(value)
    parts = [evaluate(a, known) for a in value.args]
    return sum(parts) if value.is_Add else int(np.prod(parts))


def factors(draw, total: int) -> tuple[int, ...]:
    shape = []
    while total > 1:
        divisors = [d for d in range(2, total + 1) if total % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        total //= shape[-1]
    return (*shape, *draw(st.sampled_from([(), (1,)])))


@st.composite
def reshapes(draw):
    rows, columns = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([6, 12, 24]))
    return rows, factors(draw, columns), factors(draw, columns)


@settings(max_examples=60)
@given(reshapes())
def test_reshape(case):
    """The element of a reshape is the one at the same row-major position, T rows or not."""
    rows, shape, old = case
    new_shape, old_shape = (T, *shape), (T, *old)
    variables = tuple(variable(f"i{n}") for n in range(len(new_shape)))
    ranges = {v: Range(0, d) for v, d in zip(variables, new_shape, strict=True)}
    place = reshape_index(variables, new_shape, old_shape, ranges)
    data = np.arange(rows * int(np.prod(shape))).reshape(rows, *old)
    for at in itertools.product(*(range(d) for d in (rows, *shape))):
        known = {"T": rows, **{f"i{n}": i for n, i in enumerate(at)}}
        got = data[tuple(evaluate(p, known) for p in place)]
        assert got == np.ravel_multi_index(at, (rows, *shape))


def test_plain_strides_come_out():
    i, j, k = variable("i"), variable("j"), variable("k")
    ranges = {i: Range(0, T), j: Range(0, 4), k: Range(0, 16)}
    assert reshape_index((i, j, k), (T, 4, 16), (T, 64), ranges) == (i, 16 * j + k)
    assert reshape_index((i, j, k), (T, 4, 16), (4 * T, 16), ranges) == (4 * i + j, k)
    flat = flat_index((i, j, k), (T, 4, 16))
    assert divmod_index(flat, 64, ranges) == (i, 16 * j + k)
    assert divmod_index(flat, 16, ranges) == (4 * i + j, k)
    assert divmod_index(2 * k, 8, ranges) == (FloorDiv(k, 4), 2 * Remainder(k, 4))


def test_there_and_back_is_the_same_index():
    i, j = variable("i"), variable("j")
    ranges = {i: Range(0, T), j: Range(0, 64)}
    there = reshape_index((i, j), (T, 64), (T, 4, 16), ranges)
    assert reshape_index(there, (T, 4, 16), (T, 64), ranges) == (i, j)
    assert index(48 * FloorDiv(j, 16) + 3 * Remainder(j, 16)) == 3 * j
