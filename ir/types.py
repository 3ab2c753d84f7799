"""Shapes with symbolic dimensions, and the type of a value.

A dimension is an `int` or a sympy expression over positive integer symbols. Its text form uses
`+ - * // % max min` and is what the manifest and the emitters carry;
`parse_dim(print_dim(d)) == d`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import sympy

from ..errors import DiluError
from .dtypes import DType

Dim = int | sympy.Expr
Shape = tuple[Dim, ...]


@cache
def symbol(name: str) -> sympy.Symbol:
    """Return the symbolic dimension called `name` (a positive integer)."""
    return sympy.Symbol(name, integer=True, positive=True)


def dim(value: Dim) -> Dim:
    """Return the canonical form of a dimension: an `int` where it is constant."""
    if isinstance(value, int):
        return value
    value = cast(sympy.Expr, sympy.expand(value))
    if value.has(sympy.Max, sympy.Min):
        value = _evaluated(value)
    return int(value) if value.is_Integer else value


def _evaluated(value: sympy.Expr) -> sympy.Expr:
    """Build an expression anew from its leaves until nothing changes: sympy leaves things such as
    `Max(T, Min(2, 3))` where it merges arguments."""
    while value.args:
        again = sympy.expand(value.func(*(_evaluated(cast(sympy.Expr, a)) for a in value.args)))
        if again == value:
            break
        value = cast(sympy.Expr, again)
    return value


def shape_of(dims: Iterable[Dim]) -> Shape:
    """Return a shape, its sizes in canonical form."""
    return tuple(dim(d) for d in dims)


def numel(shape: Shape) -> Dim:
    """Return the number of elements of a shape."""
    product: Dim = 1
    for d in shape:
        product = product * d
    return dim(product)


@dataclass(frozen=True)
class TensorType:
    """The element type and shape of a value."""

    dtype: DType
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(print_dim(d) for d in self.shape)}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_shape(self, shape: Iterable[Dim]) -> TensorType:
        return TensorType(self.dtype, shape_of(shape))

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)

    @property
    def nbytes(self) -> Dim:
        return dim(numel(self.shape) * self.dtype.itemsize)


def broadcast(*shapes: Shape) -> Shape:
    """Return the common shape by numpy's rule; raise DiluError when there is none."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Dim] = []
    for axis in range(rank):
        sizes = {s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0} - {1}
        if len(sizes) > 1:
            text = " and ".join(str(tuple(map(str, s))) for s in shapes)
            raise DiluError(f"shapes {text} cannot be broadcast together")
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def evaluate(value: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number a dimension stands for, given the size of every symbol."""
    if isinstance(value, int):
        return value
    return int(value.subs({symbol(n): s for n, s in sizes.items()}))


def symbols(shape: Iterable[Dim]) -> list[str]:
    """Return the names of the symbols in a shape, sorted."""
    return sorted({str(s) for d in shape if not isinstance(d, int) for s in d.free_symbols})


def print_dim(value: Dim) -> str:
    """Return the canonical text of a dimension, such as `2*T + 1` or `T // 64`."""
    return str(value) if isinstance(value, int) else _cached_text(value)


@cache
def _cached_text(value: sympy.Expr) -> str:
    return _text(value, 0)


def _text(e: Any, level: int) -> str:
    """Print `e`; parenthesize when it binds weaker than `level` (0 sum, 1 product, 2 atom)."""
    own, text = 2, ""
    if e.is_Symbol or e.is_Integer:
        text, own = str(e), 2 if e.is_Symbol or int(e) >= 0 else 1
    elif e.is_Add:
        text, own = " + ".join(_text(a, 1) for a in _ordered(e)), 0
    elif e.is_Mul:
        text, own = "*".join(_text(a, 2) for a in _ordered(e)), 1
    elif e.is_Pow and e.exp.is_Integer and int(e.exp) > 0:
        text, own = "*".join([_text(e.base, 2)] * int(e.exp)), 1
    elif isinstance(e, sympy.floor):
        top, bottom = e.args[0].as_numer_denom()
        text, own = f"{_text(top, 2)} // {_text(bottom, 2)}", 1
    elif isinstance(e, sympy.Mod):
        text, own = f"{_text(e.args[0], 2)} % {_text(e.args[1], 2)}", 1
    elif isinstance(e, (sympy.Max, sympy.Min)):
        text = f"{type(e).__name__.lower()}({', '.join(_text(a, 0) for a in _ordered(e))})"
    else:
        raise DiluError(f"the size {e} cannot be expressed", hint="sizes use + - * // % max min")
    return f"({text})" if own < level else text


def _ordered(e: Any) -> list[Any]:
    return sorted(e.args, key=lambda a: (a.is_Number if e.is_Add else not a.is_Number, str(a)))


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: lambda a, b: sympy.floor(sympy.sympify(a) / b),
    ast.Mod: lambda a, b: sympy.Mod(sympy.sympify(a), b),
}


_WORD = re.compile(r"[^\s\d+*/%(),-][^\s+*/%(),-]*")


def parse_dim(text: str) -> Dim:
    """Return the dimension that `text` denotes; raise DiluError when it is not one.

    Symbols may be called what Python would not read as a name (`for`, `None`), or as another one:
    its parser sees numbers in their place.
    """
    names: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        if not match[0].isidentifier():
            raise SyntaxError(match[0])
        names[f"s{len(names)}"] = match[0]
        return f"s{len(names) - 1}"

    try:
        return dim(_parsed(ast.parse(_WORD.sub(numbered, text), mode="eval").body, names))
    except (SyntaxError, KeyError, TypeError, AttributeError):
        raise DiluError(f"not a size: {text!r}") from None


def _parsed(node: ast.expr, names: Mapping[str, str]) -> Dim:
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_parsed(node.left, names), _parsed(node.right, names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_parsed(node.operand, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        function = {"max": sympy.Max, "min": sympy.Min}[names[node.func.id]]
        return function(*(_parsed(a, names) for a in node.args))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return symbol(names[node.id])
    raise TypeError(node)
