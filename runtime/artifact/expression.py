"""Sizes in the manifest, such as `2*T + 1` or `max(T // 64, 1)`, evaluated without any library.

Invariant: only whole numbers, symbols and `+ - * // % max min` are ever evaluated, whatever the
text of a manifest says. The compiler writes the same grammar (`ir/types.py`).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from ...errors import DiluError

Size = int | str
_Evaluator = Callable[[Mapping[str, int]], int]

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., int]] = {"max": max, "min": min}
_WORD = re.compile(r"[^\s\d+*/%(),-][^\s+*/%(),-]*")
_LARGEST = 1 << 48  # no dimension of anything is longer


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """Return the number that `size` stands for; raise DiluError where a symbol has no size."""
    if isinstance(size, int):
        return size
    try:
        return _compiled(size)[0](sizes)
    except KeyError as error:
        raise DiluError(f"the size {error.args[0]} in {size!r} is not known") from None
    except ZeroDivisionError:
        raise DiluError(f"the size {size!r} divides by zero for {dict(sizes)}") from None


def evaluate_shape(shape: list[Size] | tuple[Size, ...], sizes: Mapping[str, int]) -> list[int]:
    """Return the numbers of a shape."""
    return [evaluate(size, sizes) for size in shape]


def symbols(size: Size) -> frozenset[str]:
    """Return the names in a size."""
    return frozenset() if isinstance(size, int) else _compiled(size)[1]


def solve(size: Size, value: int, sizes: Mapping[str, int]) -> tuple[str, int] | None:
    """Return (symbol, number) that make `size` equal to `value`, if one symbol is unknown.

    Sizes grow with their symbols, so the number is found by bisection; None where there is none.
    """
    unknown = symbols(size) - sizes.keys()
    if len(unknown) != 1:
        return None
    (name,) = unknown
    if size == name:
        return name, value
    low, high = 0, _LARGEST
    while low < high:
        middle = (low + high) // 2
        if evaluate(size, {**sizes, name: middle}) < value:
            low = middle + 1
        else:
            high = middle
    return (name, low) if evaluate(size, {**sizes, name: low}) == value else None


@lru_cache(maxsize=4096)
def _compiled(text: str) -> tuple[_Evaluator, frozenset[str]]:
    names: dict[str, str] = {}  # by what Python's parser sees: a symbol may be called `for`

    def numbered(match: re.Match[str]) -> str:
        if not match[0].isidentifier():
            raise SyntaxError(match[0])
        names[f"s{len(names)}"] = match[0]
        return f"s{len(names) - 1}"

    found: set[str] = set()
    try:
        tree = ast.parse(_WORD.sub(numbered, text), mode="eval").body
        return _closure(tree, names, found), frozenset(found)
    except (SyntaxError, KeyError, TypeError, ValueError, RecursionError):
        raise DiluError(f"not a size: {text!r}", hint="sizes use + - * // % max min") from None


def _closure(node: ast.expr, names: Mapping[str, str], found: set[str]) -> _Evaluator:
    """Return what computes a tree whose names stand for `names`; note the symbols `found` in it."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        number = node.value
        return lambda sizes: number
    if isinstance(node, ast.Name):
        name = names[node.id]
        found.add(name)
        return lambda sizes: sizes[name]
    if isinstance(node, ast.BinOp):
        apply = _BINARY[type(node.op)]
        left, right = _closure(node.left, names, found), _closure(node.right, names, found)
        return lambda sizes: apply(left(sizes), right(sizes))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _closure(node.operand, names, found)
        return lambda sizes: -operand(sizes)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        call = _CALLS[names[node.func.id]]
        arguments = [_closure(argument, names, found) for argument in node.args]
        if len(arguments) < 2:
            raise TypeError(names[node.func.id])
        return lambda sizes: call(*(argument(sizes) for argument in arguments))
    raise TypeError(node)
