from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilu.errors import DiluError
from dilu.runtime.artifact.expression import evaluate, evaluate_shape, solve, symbols


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (7, 7),
        ("T", 5),
        ("2*T + 1", 11),
        ("T // 2", 2),
        ("(T + 63) // 64*64", 64),
        ("T % 3", 2),
        ("max(T, S, 9)", 9),
        ("min(T, 2*S)", 5),
        ("-T + 6", 1),
        ("T*(S - 1)", 10),
    ],
)
def test_value(text, value):
    assert evaluate(text, {"T": 5, "S": 3}) == value


def test_shape():
    assert evaluate_shape([2, "T", "T*S"], {"T": 5, "S": 3}) == [2, 5, 15]


def test_symbols():
    assert symbols("max(2*T, S) // 3") == {"T", "S"}
    assert symbols(3) == frozenset()


@pytest.mark.parametrize(
    "text",
    ["", "T +", "T / 2", "T ** 9", "f(T)", "max(T)", "T.x", "T[0]", "1.5", "'a'",
     "s0:=1", "lambda: 1", "__import__('os')", "max(T, S, key=1)", "[T]"],
)  # fmt: skip
def test_nothing_else_is_evaluated(text):
    with pytest.raises(DiluError, match=r"not a size: .*(.|\n)*sizes use \+ - \* // % max min"):
        evaluate(text, {"T": 1})


@pytest.mark.parametrize("name", ["for", "None", "lambda", "max", "s0", "größe", "ﬁ", "I", "नाम"])
def test_a_symbol_may_have_any_name(name):
    assert symbols(f"max({name}, 3) * 2") == {name}
    assert evaluate(f"max({name}, 3) * {name} + s1", {name: 5, "s1": 2}) == 27
    assert solve(f"2*{name} + 1", 9, {}) == (name, 4)


def test_unknown_symbol():
    with pytest.raises(DiluError, match="the size S in '2\\*S' is not known"):
        evaluate("2*S", {"T": 1})


def test_division_by_zero():
    with pytest.raises(DiluError, match="divides by zero"):
        evaluate("4 // T", {"T": 0})


@pytest.mark.parametrize(
    ("text", "value", "found"),
    [
        ("N", 0, ("N", 0)),
        ("2*N", 8, ("N", 4)),
        ("2*N", 7, None),
        ("N*T + 1", 16, ("N", 3)),
        ("N*M", 4, None),
        ("T", 5, None),
        (3, 3, None),
    ],
)
def test_solve(text, value, found):
    assert solve(text, value, {"T": 5}) == found


@given(st.integers(0, 10**6), st.integers(1, 100), st.integers(0, 100))
def test_agrees_with_the_compiler(t, a, b):
    from dilu.ir.types import evaluate as wanted
    from dilu.ir.types import parse_dim, print_dim

    text = f"max({a}*T + {b}, T // {a}) + (T + {b}) % {a}"
    printed = print_dim(parse_dim(text))
    assert evaluate(printed, {"T": t}) == wanted(parse_dim(text), {"T": t})
