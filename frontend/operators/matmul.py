"""Matrix products, linear layers and attention, computed in f32 whatever the element type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.dtypes import BOOL
from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from ...ir.ops.index import Iota, Reshape, Slice, Take, Transpose
from ...ir.ops.matmul import MatMul
from ...ir.ops.reduce import ReduceSum
from ...ir.types import numel
from .context import Context, lowers
from .normalize import safe_softmax_of, softmax_of
from .reduce import vector_norm


def product(c: Context, a: Value, b: Value) -> Value:
    """Return the matrix product in f32; a transposed `b` is read as it lies."""
    if not c.dtype.is_float:
        return product_of_integers(c, a, b)
    node = c.producer(b)
    if node is not None and isinstance(node.op, Transpose):
        rank = b.type.rank
        if node.op.permutation == (*range(rank - 2), rank - 1, rank - 2):
            return c.emit(MatMul(transpose_b=True), c.wide(a), c.wide(node.inputs[0]))
    return c.emit(MatMul(), c.wide(a), c.wide(b))


def product_of_integers(c: Context, a: Value, b: Value) -> Value:
    """Return the matrix product of integers: what wraps, wraps."""
    columns = c.swap(b, -2, -1)
    rows = c.reshape(a, (*a.type.shape[:-1], 1, a.type.shape[-1]))
    columns = c.reshape(columns, (*columns.type.shape[:-2], 1, *columns.type.shape[-2:]))
    terms = c.emit(ew.Mul(), rows, columns)
    return c.emit(ReduceSum((terms.type.rank - 1,)), terms)


@lowers("aten.addbmm.default")
def addbmm(c: Context, x: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    """The products of a batch are added up."""
    y = c.emit(ReduceSum((0,)), product(c, a, b))
    y = y if alpha == 1 else c.apply(ew.Mul(), y, alpha)
    if beta == 0:  # what is not used may be NaN
        return c.result(y)
    x = x if beta == 1 else c.apply(ew.Mul(), c.cast(x, y.type.dtype), beta)
    return c.result(c.emit(ew.Add(), c.cast(x, y.type.dtype), y))


@lowers("aten._cdist_forward.default")
def distances(c: Context, a: Value, b: Value, p: float, _: int | None = None) -> Value:
    """Between all rows of `a` and all of `b`."""
    rows = c.reshape(a, (*a.type.shape[:-1], 1, a.type.shape[-1]))
    other = c.reshape(b, (*b.type.shape[:-2], 1, *b.type.shape[-2:]))
    apart = c.emit(ew.Sub(), c.wide(rows), c.wide(other))
    return vector_norm(c, apart, p, -1)


@lowers("aten._trilinear.default")
def trilinear(
    c: Context, x: Value, y: Value, z: Value, new_x: Sequence[int], new_y: Sequence[int],
    new_z: Sequence[int], over: Sequence[int], _: int = 1,
) -> Value:  # fmt: skip
    """The product of three, each with new axes of one, summed over some of all axes."""
    rank = x.type.rank + len(new_x)
    parts: list[Value] = []
    for part, new in ((x, new_x), (y, new_y), (z, new_z)):
        sizes = iter(part.type.shape)
        shape = [1 if a in {n % rank for n in new} else next(sizes) for a in range(rank)]
        parts.append(c.reshape(c.wide(part), shape))
    product_ = c.emit(ew.Mul(), c.emit(ew.Mul(), parts[0], parts[1]), parts[2])
    return c.result(c.reshape(c.emit(ReduceSum(c.axes(over, rank)), product_), c.type.shape))


@lowers("aten.linear.default")
def linear(c: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    row = x.type.rank == 1
    x = c.reshape(x, (1, *x.type.shape)) if row else x
    column = weight.type.rank == 1
    weight = c.reshape(weight, (1, *weight.type.shape)) if column else weight
    if c.dtype.is_float:
        y = c.emit(MatMul(transpose_b=True), c.wide(x), c.wide(weight))
    else:
        y = product_of_integers(c, x, c.swap(weight, -2, -1))
    y = c.reshape(y, c.type.shape) if row or column else y
    return c.result(y if bias is None else c.emit(ew.Add(), y, c.cast(bias, y.type.dtype)))


@lowers("aten.mm.default", "aten.bmm.default")
def mm(c: Context, a: Value, b: Value) -> Value:
    return c.result(product(c, a, b))


@lowers("aten.matmul.default", "aten.mv.default", "aten.dot.default")
def matmul(c: Context, a: Value, b: Value) -> Value:
    a = c.reshape(a, (1, *a.type.shape)) if a.type.rank == 1 else a
    b = c.reshape(b, (*b.type.shape, 1)) if b.type.rank == 1 else b
    return c.result(c.reshape(product(c, a, b), c.type.shape))


@lowers("aten.addmm.default", "aten.baddbmm.default", "aten.addmv.default")
def addmm(c: Context, bias: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    b = c.reshape(b, (*b.type.shape, 1)) if b.type.rank == 1 else b
    y = product(c, a, b)
    y = c.reshape(y, c.type.shape)
    y = y if alpha == 1 else c.apply(ew.Mul(), y, alpha)
    if beta == 0:
        return c.result(y)
    bias = c.cast(bias, y.type.dtype)
    return c.result(c.emit(ew.Add(), y, bias if beta == 1 else c.apply(ew.Mul(), bias, beta)))


@lowers("aten.einsum.default")
def einsum(c: Context, equation: str, operands: Sequence[Value], **_: Any) -> Value:
    """One operand is summed and transposed; two are a batched matrix product of their axes."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    known = len(operands) == len(labels) <= 2 and arrow and "." not in equation
    if not known or any(len(set(each)) != len(each) for each in labels):
        raise c.unsupported(f"the equation {equation!r}")
    reduced = [
        sum_out(c, x, each, set(out).union(*(o for o in labels if o is not each)))
        for x, each in zip(operands, labels, strict=True)
    ]
    if len(reduced) == 1:
        return c.result(arranged(c, *reduced[0], out))
    (a, la), (b, lb) = reduced
    batch = [n for n in la if n in lb and n in out]
    inner = [n for n in la if n in lb and n not in out]
    rows, columns = [n for n in la if n not in lb], [n for n in lb if n not in la]
    sizes = dict(zip((*la, *lb), (*a.type.shape, *b.type.shape), strict=True))

    def matrix(x: Value, names: str, *groups: list[str]) -> Value:
        flat = [numel(tuple(sizes[n] for n in group)) for group in groups]
        order = "".join(n for group in (batch, *groups) for n in group)
        return c.reshape(arranged(c, x, names, order), (*(sizes[n] for n in batch), *flat))

    y = c.emit(MatMul(transpose_b=True), matrix(a, la, rows, inner), matrix(b, lb, columns, inner))
    names = "".join([*batch, *rows, *columns])
    return c.result(arranged(c, c.reshape(y, [sizes[n] for n in names]), names, out))


def sum_out(c: Context, x: Value, names: str, kept: set[str]) -> tuple[Value, str]:
    """Return an operand in f32, summed over the axes that nothing else names."""
    axes = tuple(i for i, n in enumerate(names) if n not in kept)
    x = c.wide(x)
    return (c.emit(ReduceSum(axes), x) if axes else x), "".join(n for n in names if n in kept)


def arranged(c: Context, x: Value, names: str, order: str) -> Value:
    """Return `x`, whose axes have `names`, with its axes in another order."""
    return c.transpose(x, [names.index(n) for n in order])


@lowers("aten.outer.default", "aten.ger.default")
def outer(c: Context, a: Value, b: Value) -> Value:
    return c.apply(ew.Mul(), c.reshape(a, (*a.type.shape, 1)), b, dtype=c.dtype)


@lowers("aten.scaled_dot_product_attention.default")
def attention(
    c: Context,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """`softmax(q · kᵀ · scale + mask) · v`; with grouped heads, several q heads share one of k.
    A row that sees no key is zero."""
    if dropout:
        raise c.unsupported("dropout that does not depend on module.training")
    lead, (length, width) = q.type.shape[:-2], q.type.shape[-2:]
    places = k.type.shape[-2]
    grouped = enable_gqa and lead[-1] != k.type.shape[-3]
    if grouped:
        heads, shared = int(lead[-1]), int(k.type.shape[-3])
        split = (*lead[:-1], shared, heads // shared)
        q = c.reshape(q, (*split, length, width))
        k, v = (c.reshape(t, (*t.type.shape[:-2], 1, *t.type.shape[-2:])) for t in (k, v))
        mask = grouped_mask(c, mask, split)
    scores = c.emit(MatMul(transpose_b=True), c.wide(q), c.wide(k))
    factor = 1 / math.sqrt(int(width)) if scale is None else scale
    scores = c.apply(ew.Mul(), scores, factor)
    if is_causal:
        row = c.reshape(c.emit(Iota(length)), (length, 1))
        mask = c.emit(ew.Le(), c.emit(Iota(places)), row)
    if mask is not None:
        scores = masked(c, scores, mask, is_causal)
    softmax = softmax_of if is_native_self_attention(c, q, k, v) else safe_softmax_of
    y = c.emit(MatMul(), softmax(c, scores, -1), c.wide(v))
    return c.result(c.reshape(y, c.type.shape))


def masked(c: Context, scores: Value, mask: Value, is_causal: bool) -> Value:
    """Return scores with -inf for what is not seen: in its place for what is to come, added to it
    as a mask says, so that NaN stays."""
    dtype = scores.type.dtype
    if is_causal:
        return c.emit(ew.Where(), mask, scores, c.operand(-math.inf, dtype))
    if mask.type.dtype == BOOL:
        mask = c.emit(ew.Where(), mask, c.operand(0, dtype), c.operand(-math.inf, dtype))
    return c.emit(ew.Add(), scores, c.cast(mask, dtype))


def is_native_self_attention(c: Context, q: Value, k: Value, v: Value) -> bool:
    """Whether torch runs this, in the module it is of, by a kernel that makes rows which see no key
    NaN: `nn.MultiheadAttention` of one tensor, in evaluation mode, where heads are even."""
    if c.modules[-1:] != ("MultiheadAttention",) or q.type.rank != 4 or q.type.shape[1] % 2:
        return False
    return len({origin(c, x).name for x in (q, k, v)}) == 1


def origin(c: Context, x: Value) -> Value:
    """Return what a value is a view of."""
    node = c.producer(x)
    while node is not None and isinstance(node.op, (Reshape, Transpose, Slice, Take)):
        x = node.inputs[0]
        node = c.producer(x)
    return x


def grouped_mask(c: Context, mask: Value | None, split: tuple[Any, ...]) -> Value | None:
    """Return a mask with its axis of heads split as the queries' is."""
    if mask is None or mask.type.rank < 3:
        return mask
    heads = (1, 1) if mask.type.shape[-3] == 1 else split[-2:]
    return c.reshape(mask, (*mask.type.shape[:-3], *heads, *mask.type.shape[-2:]))
