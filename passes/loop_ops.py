"""What may stand in one nest of loops, and when a region of it has one iteration space.

Without a reduction the nest runs over the shape that all results share. With reductions it runs
over their common rows, the leading axes that none of them reduces: a row's reductions are numbers
while the row is worked on, so nothing that depends on one may reach into another row.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.dtypes import DType
from ..ir.graph import Node, Value
from ..ir.op import Op
from ..ir.ops.elementwise import (
    Atan,
    Binary,
    Cast,
    Cos,
    Div,
    Erf,
    Exp,
    Literal,
    Log,
    Mod,
    Pow,
    Rsqrt,
    Sigmoid,
    Sin,
    Sqrt,
    Tanh,
    Unary,
    Where,
)
from ..ir.ops.index import (
    BroadcastTo,
    Concat,
    Iota,
    Reshape,
    Slice,
    Take,
    TakeAlong,
    Transpose,
    Windows,
)
from ..ir.ops.quantize import Decode, Dequantize, Encode
from ..ir.ops.reduce import ArgMax, Reduce
from ..ir.types import Shape
from .simplify_identities import holds

ELEMENTWISE = (Unary, Binary, Where, Cast, Decode, Encode)
VIEWS = (Reshape, Transpose, BroadcastTo, Slice, Windows)
REDUCTIONS = (Reduce, ArgMax)
_OTHER = (Concat, Iota, Take, TakeAlong, Literal, Dequantize)
LOOP_OPS = (*ELEMENTWISE, *VIEWS, *REDUCTIONS, *_OTHER)

_COSTLY = (Exp, Log, Sin, Cos, Tanh, Atan, Erf, Sigmoid, Pow)
_MIDDLING = (Div, Mod, Sqrt, Rsqrt, Encode)


def is_free(node: Node) -> bool:
    """Whether doing a node's work again at each use is cheaper than keeping its outcome."""
    if isinstance(node.op, Cast):
        return widens(node.op.dtype, node.inputs[0].type.dtype)
    return isinstance(node.op, (*VIEWS, Literal, Iota))


def widens(to: DType, source: DType) -> bool:
    """Whether a cast only widens a float."""
    return to.is_float and source.is_float and to.bits > source.bits and holds(to, source)


def cost(op: Op) -> int:
    """Return roughly how many additions the work of an op on one element is worth."""
    if isinstance(op, _COSTLY):
        return 16
    if isinstance(op, _MIDDLING):
        return 4
    return 0 if isinstance(op, (*VIEWS, Literal, Concat, Cast)) else 1


def rows_of(node: Node) -> Shape | None:
    """Return the leading axes that a reduction keeps; None when it does not reduce the trailing."""
    shape = node.inputs[0].type.shape
    if isinstance(node.op, ArgMax):
        return shape[:-1]
    assert isinstance(node.op, Reduce)
    axes = node.op.axes
    if axes != tuple(range(len(shape) - len(axes), len(shape))):
        return None
    return shape[: len(shape) - len(axes)]


def region_rows(nodes: Sequence[Node]) -> Shape | None:
    """Return the common rows of the reductions among `nodes`; None without one."""
    rows = [rows_of(n) for n in nodes if isinstance(n.op, REDUCTIONS)]
    return rows[0] if rows else None


def is_one_space(nodes: Sequence[Node], results: Sequence[Value]) -> bool:
    """Whether `nodes`, in order, with these results make one nest of loops."""
    reductions = [n for n in nodes if isinstance(n.op, REDUCTIONS)]
    if not reductions:
        return len({v.type.shape for v in results}) <= 1
    rows = rows_of(reductions[0])
    if rows is None:
        return len(reductions) == 1 and _is_pointwise(nodes, reductions[0], results)
    if any(rows_of(n) != rows for n in reductions[1:]):
        return False
    return keeps_rows(nodes, rows) and all(v.type.shape[: len(rows)] == rows for v in results)


def _is_pointwise(nodes: Sequence[Node], reduction: Node, results: Sequence[Value]) -> bool:
    """Whether what follows a reduction over other axes works element by element of its outcome."""
    shape = reduction.output.type.shape
    behind = {reduction.output.name}
    for node in nodes:
        if any(v.name in behind for v in node.inputs):
            if not isinstance(node.op, ELEMENTWISE) or node.output.type.shape != shape:
                return False
            if any(v.name in behind and v.type.shape != shape for v in node.inputs):
                return False
            behind.add(node.output.name)
    return all(v.type.shape == shape for v in results)


def keeps_rows(nodes: Sequence[Node], rows: Shape) -> bool:
    """Whether everything that depends on a reduction stays in the row it is in."""
    behind: set[str] = set()
    for node in nodes:
        reached = [v for v in node.inputs if v.name in behind]
        if reached and not _stays(node, reached, rows):
            return False
        if reached or isinstance(node.op, REDUCTIONS):
            behind |= {v.name for v in node.outputs}
    return True


def _stays(node: Node, reached: Sequence[Value], rows: Shape) -> bool:
    r, op = len(rows), node.op
    out = node.outputs[0].type
    if any(v.type.shape[:r] != rows for v in reached) or out.shape[:r] != rows:
        return False
    if r == 0 or isinstance(op, (Reshape, *REDUCTIONS)):
        return True
    if isinstance(op, TakeAlong):
        return out.rank > r
    if isinstance(op, Transpose):
        return op.permutation[:r] == tuple(range(r))
    if isinstance(op, (Slice, Concat, Windows)):
        return op.axis >= r
    if isinstance(op, Take):
        return node.inputs[0] not in reached
    if isinstance(op, Dequantize):
        return False
    return all(v.type.rank == out.rank for v in reached)
