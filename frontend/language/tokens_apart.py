"""Proof that a captured model keeps tokens apart, but for attention and the cache.

Tokens of any number of sequences are given to it in one row, T of them, in any order: what becomes
of one must depend on neither the others nor on where it stands. A model that numbers its tokens
itself (and ignores the positions that it is given), or that sums, shifts or convolves along them,
would be right for one sequence in one piece and silently wrong for all else.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UnsupportedError
from ...ir.dimensions import Link, Place, links
from ...ir.graph import Function, Node, Value
from ...ir.ops.control import Call
from ...ir.ops.index import Iota, Take
from ...ir.types import symbol, symbols

_T = symbol("T")
_HINT = "a model runs on tokens of several sequences at once, and in pieces of them"
_Dims = frozenset[int]


def require_tokens_apart(function: Function, rows: Value) -> None:
    """Raise UnsupportedError where a value of a language model's function mixes tokens.

    Dimensions of size T of its parameters count tokens. `rows` is the parameter that says which of
    them are wanted in the end.
    """
    given = {v.name: _dims(v) for v in (*function.parameters, *function.states)}
    _follow(function, given, rows.name)


def _dims(value: Value) -> _Dims:
    return frozenset(d for d, s in enumerate(value.type.shape) if s == _T)


def _follow(function: Function, given: dict[str, _Dims], rows: str | None) -> list[_Dims]:
    """Return which dimensions of a function's results count tokens."""
    found = dict(given)
    for node in function.nodes:
        inputs = [found.get(v.name, frozenset()) for v in node.inputs]
        for value, dims in zip(node.outputs, _made(node, inputs, rows), strict=True):
            found[value.name] = dims
    return [found.get(v.name, frozenset()) for v in function.results]


def _made(node: Node, inputs: list[_Dims], rows: str | None) -> list[_Dims]:
    """Return which dimensions of a node's outputs count tokens."""
    op = node.op
    if isinstance(op, Iota) and str(_T) in symbols((op.size,)):
        raise UnsupportedError(
            "the model numbers its tokens itself, by their place in the batch, and does not ask "
            "for their positions",
            node.loc,
            _HINT,
        )
    if isinstance(op, Call):
        given = {v.name: dims for v, dims in zip(op.body.inputs, inputs, strict=True)}
        made = _follow(op.body, given, None)
        return [*made, *[frozenset[int]()] * (len(node.outputs) - len(made))]
    if isinstance(op, Take) and inputs[0] == frozenset({0}) and node.inputs[1].name == rows:
        return [frozenset()]
    tokens = {(i, d) for i, dims in enumerate(inputs) for d in dims}
    types = tuple(v.type for v in node.inputs)
    known = links(op, types, tuple(v.type for v in node.outputs))
    through = [_through(node, place, known) for place in sorted(tokens)]
    places = {place for link in through for place in link.outputs}
    # What is the same for all tokens, such as zeros of their number.
    own = (
        _dims(v) if not tokens else frozenset(d for o, d in places if o == i)
        for i, v in enumerate(node.outputs)
    )
    return list(own)


def _through(node: Node, place: Place, known: Sequence[Link]) -> Link:
    """Return the link by which a dimension that counts tokens goes through a node."""
    link = next((link for link in known if place in link.inputs), None)
    if link is None or link.summed:
        raise UnsupportedError(
            f"the model mixes the tokens of a batch outside of attention ({node.op.name} along "
            f"them, to {node.outputs[0].type})",
            node.loc,
            _HINT,
        )
    return link
