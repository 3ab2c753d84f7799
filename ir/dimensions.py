"""Which dimensions of an op's operands and outcomes count the same thing.

A `Link` joins dimensions that may be divided among ranks together: each rank then makes its part
of the outcome from its parts of the operands. With `summed`, no outcome has the dimension, and
what a rank makes of its part is a part of a sum. Dimensions in no link have to be whole.

Shapes as in the ops' own docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .op import Op
from .ops.elementwise import Binary, Cast, Unary, Where
from .ops.index import BroadcastTo, Concat, Reshape, Slice, Take, TakeAlong, Transpose
from .ops.language import Attention, CacheUpdate, Experts
from .ops.matmul import MatMul
from .ops.quantize import Decode, Dequantize, Encode
from .ops.reduce import ArgMax, Reduce, TopK
from .types import Shape, TensorType, dim

Types = tuple[TensorType, ...]
#: A dimension: the operand's or outcome's number, and which of its dimensions.
Place = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """Dimensions of operands and of outcomes that are divided together or not at all."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    summed: bool = False


def links(op: Op, inputs: Types, outputs: Types) -> list[Link]:
    """Return the links of an op; none for an op that is not known here."""
    for kinds, rule in _RULES:
        if isinstance(op, kinds):
            return list(rule(op, inputs, outputs))
    return []


def _aligned(_: Op, inputs: Types, outputs: Types) -> Iterator[Link]:
    """Dimensions that meet by numpy's rule of broadcasting."""
    (out,) = outputs
    for d, size in enumerate(out.shape):
        places = ((i, d - out.rank + t.rank) for i, t in enumerate(inputs))
        yield Link(
            tuple((i, e) for i, e in places if e >= 0 and inputs[i].shape[e] == size), ((0, d),)
        )


def _transpose(op: Transpose, _: Types, __: Types) -> Iterator[Link]:
    for d, axis in enumerate(op.permutation):
        yield Link(((0, axis),), ((0, d),))


def _reshape(_: Reshape, inputs: Types, outputs: Types) -> Iterator[Link]:
    """The outermost dimensions of groups that hold the same elements."""
    for before, after in _groups(inputs[0].shape, outputs[0].shape):
        yield Link(((0, before),), ((0, after),))


def _groups(before: Shape, after: Shape) -> Iterator[Place]:
    """Yield the first dimensions above 1 of the smallest groups with equally many elements."""
    old, new = ([(d, s) for d, s in enumerate(shape) if s != 1] for shape in (before, after))
    while old and new:
        (first, held), (other, wanted) = old.pop(0), new.pop(0)
        while dim(held - wanted) != 0:
            if not (isinstance(held, int) and isinstance(wanted, int)):
                return  # what follows is not compared: symbols come first, and alone
            if held < wanted and old:
                held = dim(held * old.pop(0)[1])
            elif wanted < held and new:
                wanted = dim(wanted * new.pop(0)[1])
            else:
                return
        yield first, other


def _but_axis(op: Slice | Concat, inputs: Types, _: Types) -> Iterator[Link]:
    for d in range(inputs[0].rank):
        if d != op.axis:
            yield Link(tuple((i, d) for i in range(len(inputs))), ((0, d),))


def _reduce(op: Reduce, inputs: Types, _: Types) -> Iterator[Link]:
    after = 0
    for d in range(inputs[0].rank):
        if d not in op.axes:
            yield Link(((0, d),), ((0, after),))
        after += d not in op.axes or op.keepdims


def _but_last(_: Op, inputs: Types, outputs: Types) -> Iterator[Link]:
    for d in range(inputs[0].rank - 1):
        places = tuple((i, d) for i in range(len(inputs)))
        yield Link(places, tuple((o, d) for o in range(len(outputs))))


def _take(_: Take, inputs: Types, __: Types) -> Iterator[Link]:
    table, indices = inputs
    for d in range(indices.rank):
        yield Link(((1, d),), ((0, d),))
    for d in range(1, table.rank):
        yield Link(((0, d),), ((0, indices.rank + d - 1),))


def _matmul(op: MatMul, inputs: Types, outputs: Types) -> Iterator[Link]:
    (a, b), (out,) = inputs, outputs
    rows, columns, inner = a.rank - 2, b.rank - 1, b.rank - 2
    if op.transpose_b:
        columns, inner = inner, columns
    yield Link(((0, rows),), ((0, out.rank - 2),))
    yield Link(((1, columns),), ((0, out.rank - 1),))
    yield Link(((0, a.rank - 1), (1, inner)), (), summed=True)
    for d in range(out.rank - 2):
        places = ((i, d - out.rank + t.rank) for i, t in enumerate(inputs))
        lead = tuple((i, e) for i, e in places if e >= 0 and inputs[i].shape[e] == out.shape[d])
        yield Link(lead, ((0, d),))


def _dequantize(_: Dequantize, inputs: Types, __: Types) -> Iterator[Link]:
    """Scales follow the codes in a way of their own: a scale is for many rows."""
    for d in range(inputs[0].rank):
        scales = ((1, d),) if d < inputs[0].rank - 2 else ()
        yield Link(((0, d), *scales), ((0, d),))


def _cache_update(_: CacheUpdate, __: Types, ___: Types) -> Iterator[Link]:
    yield Link(((0, 1), (1, 1)), ((0, 1),))
    yield Link(((0, 3), (1, 2)), ((0, 3),))
    yield Link(((1, 0), (2, 0)), ())
    for d in (0, 2):
        yield Link(((0, d),), ((0, d),))


def _attention(_: Attention, inputs: Types, __: Types) -> Iterator[Link]:
    q, keys = inputs[:2]
    yield Link(((0, 0), (3, 0), (4, 0)), ((0, 0),))
    if keys.shape[1] == 1 and q.shape[1] != 1:  # one head of keys serves all, on every rank
        yield Link(((0, 1),), ((0, 1),))
    else:
        yield Link(((0, 1), (1, 1), (2, 1)), ((0, 1),))


def _experts(_: Experts, __: Types, ___: Types) -> Iterator[Link]:
    yield Link(((0, 0), (1, 0), (2, 0)), ((0, 0),))
    yield Link(((3, 2), (4, 2)), (), summed=True)
    yield Link(((4, 1),), ((0, 1),))


_RULES: list[tuple[type[Op] | tuple[type[Op], ...], Callable[..., Iterator[Link]]]] = [
    ((Unary, Binary, Where, Cast, Decode, Encode, BroadcastTo), _aligned),
    (Transpose, _transpose),
    (Reshape, _reshape),
    ((Slice, Concat), _but_axis),
    (Reduce, _reduce),
    ((ArgMax, TopK, TakeAlong), _but_last),
    (Take, _take),
    (MatMul, _matmul),
    (Dequantize, _dequantize),
    (CacheUpdate, _cache_update),
    (Attention, _attention),
    (Experts, _experts),
]
