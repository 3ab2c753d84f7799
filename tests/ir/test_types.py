from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from dilu.errors import DiluError
from dilu.ir.dtypes import F32
from dilu.ir.types import (
    TensorType,
    broadcast,
    dim,
    evaluate,
    numel,
    parse_dim,
    print_dim,
    symbol,
    symbols,
)

T, S = symbol("T"), symbol("S")


def combined(sizes: st.SearchStrategy) -> st.SearchStrategy:
    number = st.integers(1, 9)
    return st.one_of(
        st.tuples(sizes, sizes).map(lambda p: p[0] + p[1]),
        st.tuples(sizes, sizes).map(lambda p: p[0] * p[1]),
        st.tuples(sizes, sizes).map(lambda p: p[0] - p[1]),
        st.tuples(sizes, number).map(lambda p: sympy.floor(sympy.sympify(p[0]) / p[1])),
        st.tuples(sizes, number).map(lambda p: sympy.Mod(p[0], p[1])),
        st.tuples(sizes, sizes).map(lambda p: sympy.Max(*p)),
        st.tuples(sizes, sizes).map(lambda p: sympy.Min(*p)),
    )


SIZES = st.recursive(st.one_of(st.sampled_from([T, S]), st.integers(1, 99)), combined, max_leaves=5)


@given(SIZES)
def test_text_of_a_size_denotes_it(size):
    size = dim(size)
    again = parse_dim(print_dim(size))
    for known in ({"T": 1, "S": 1}, {"T": 7, "S": 64}, {"T": 100, "S": 3}):
        assert evaluate(again, known) == evaluate(size, known)
    assert print_dim(again) == print_dim(size)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (T, "T"),
        (8, "8"),
        (2 * T + 1, "2*T + 1"),
        (T * S, "S*T"),
        (T - 1, "T + -1"),
        (sympy.floor(T / 64), "T // 64"),
        (sympy.floor((T + 63) / 64) * 64, "64*((T + 63) // 64)"),
        (sympy.Max(T, S), "max(S, T)"),
        (T**2, "T*T"),
        (sympy.Max(T, sympy.Min(2, 3, evaluate=False), evaluate=False), "max(2, T)"),
    ],
)
def test_text(size, text):
    assert print_dim(dim(size)) == text


@pytest.mark.parametrize("text", ["", "T+", "f(T)", "T.x", "'a'", "T / 2", "1.5"])
def test_not_a_size(text):
    with pytest.raises(DiluError, match="not a size"):
        parse_dim(text)


def test_a_size_without_text():
    with pytest.raises(DiluError, match="cannot be expressed"):
        print_dim(sympy.sqrt(T))


def test_broadcast():
    assert broadcast((T, 1, 8), (4, 1), ()) == (T, 4, 8)
    with pytest.raises(DiluError, match="cannot be broadcast together"):
        broadcast((T, 3), (T, 4))
    with pytest.raises(DiluError, match="cannot be broadcast together"):
        broadcast((T,), (S,))


def test_counting():
    t = TensorType(F32, (T, 2, 4))
    assert str(t) == "f32[T,2,4]"
    assert numel(t.shape) == 8 * T
    assert t.nbytes == 32 * T
    assert symbols(t.shape) == ["T"]
    assert dim(T - T) == 0 and isinstance(dim(T - T), int)
