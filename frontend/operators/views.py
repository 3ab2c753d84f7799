"""Views, joins and tensors made from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from ...ir.dtypes import I64
from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from ...ir.ops.index import Concat, Iota, Slice, Windows
from ...ir.types import Dim, dim, numel
from .context import Context, lowers
from .index import take_axis


@lowers("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default",
        "aten.unsqueeze.default", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims",
        "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_as.default",
        "aten.reshape_as.default", "aten._reshape_alias.default")  # fmt: skip
def reshape(c: Context, x: Value, *_: Any) -> Value:
    return c.reshape(x, c.type.shape)


@lowers("aten.view.dtype")
def view_dtype(c: Context, *_: Any) -> Value:
    raise c.unsupported("reading the bits of one element type as another")


@lowers("aten.permute.default")
def permute(c: Context, x: Value, axes: Sequence[int]) -> Value:
    return c.transpose(x, [c.axis(a, x.type.rank) for a in axes])


@lowers("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(c: Context, x: Value, a: int, b: int) -> Value:
    return c.swap(x, a, b)


@lowers("aten.t.default", "aten.numpy_T.default", "aten.mT.default", "aten.adjoint.default")
def matrix_transpose(c: Context, x: Value) -> Value:
    return x if x.type.rank < 2 else c.swap(x, -2, -1)


@lowers("aten.movedim.int", "aten.movedim.intlist")
def movedim(c: Context, x: Value, source: Any, target: Any) -> Value:
    rank = x.type.rank
    sources = [c.axis(a, rank) for a in ([source] if isinstance(source, int) else source)]
    targets = [c.axis(a, rank) for a in ([target] if isinstance(target, int) else target)]
    rest = iter(a for a in range(rank) if a not in sources)
    at = dict(zip(targets, sources, strict=True))
    return c.transpose(x, [at[a] if a in at else next(rest) for a in range(rank)])


@lowers("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return c.broadcast(x, c.type.shape)


@lowers("aten.slice.Tensor", "aten.narrow.default")
def slice_(
    c: Context, x: Value, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Value:
    axis = c.axis(axis, x.type.rank)
    first = begin(0 if start is None else start, x.type.shape[axis])
    size = c.type.shape[axis]
    return c.slice(x, axis, first, dim(first + (size - 1) * step + 1), step)


def begin(start: Dim, size: Dim) -> Dim:
    """Return where a slice starts, by Python's rule for negative and large starts."""
    if not isinstance(start, int) or not isinstance(size, int):
        negative = start < 0 if isinstance(start, int) else start.is_negative
        return dim(start + size) if negative else start
    return min(max(start + size if start < 0 else start, 0), size)


@lowers("aten.unfold.default")
def unfold(c: Context, x: Value, axis: int, size: int, step: int) -> Value:
    """Windows along an axis, their elements along a new last one."""
    if x.type.rank == 0:
        return c.broadcast(x, c.type.shape)
    axis = c.axis(axis, x.type.rank)
    out = c.emit(Windows(axis, c.type.shape[axis], size, step), x)
    order = [a for a in range(out.type.rank) if a != axis + 1]
    return c.transpose(out, [*order, axis + 1])


@lowers("aten.diagonal.default", "aten.diagonal_copy.default")
def diagonal(c: Context, x: Value, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Value:
    """Every n-th element of two axes made one, n being a row and one more."""
    rank = x.type.rank
    axis1, axis2 = c.axis(axis1, rank), c.axis(axis2, rank)
    x = c.transpose(x, [*(a for a in range(rank) if a not in (axis1, axis2)), axis1, axis2])
    *lead, rows, columns = x.type.shape
    if not isinstance(columns, int):
        raise c.unsupported("the diagonal of rows of symbolic size")
    flat = c.reshape(x, (*lead, dim(rows * columns)))
    first = offset if offset >= 0 else -offset * columns
    count = c.type.shape[-1]
    return c.slice(flat, rank - 2, first, dim(first + (count - 1) * (columns + 1) + 1), columns + 1)


@lowers("aten.select.int")
def select(c: Context, x: Value, axis: int, index: Dim) -> Value:
    axis = c.axis(axis, x.type.rank)
    at = begin(index, x.type.shape[axis])
    return c.reshape(c.slice(x, axis, at, dim(at + 1)), c.type.shape)


@lowers("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default",
        "aten.split.sizes", "aten.tensor_split.sections", "aten.split_with_sizes_copy.default",
        "aten.unsafe_split.Tensor", "aten.unsafe_chunk.default")  # fmt: skip
def split(c: Context, x: Value, _: Any, axis: int = 0) -> tuple[Value, ...]:
    axis = c.axis(axis, x.type.rank)
    parts: list[Value] = []
    at: Dim = 0
    for t in c.types:
        stop = dim(at + t.shape[axis])
        parts.append(c.slice(x, axis, at, stop))
        at = stop
    return tuple(parts)


@lowers("aten.unbind.int")
def unbind(c: Context, x: Value, axis: int = 0) -> tuple[Value, ...]:
    axis = c.axis(axis, x.type.rank)
    return tuple(c.reshape(c.slice(x, axis, i, i + 1), t.shape) for i, t in enumerate(c.types))


@lowers("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(c: Context, tensors: Sequence[Value], axis: int = 0) -> Value:
    rank = c.type.rank
    parts = [c.cast(t, c.dtype) for t in tensors if t.type.shape != (0,) or rank == 1]
    return join(c, parts, c.axis(axis, rank))


def join(c: Context, parts: Sequence[Value], axis: int) -> Value:
    """Return the parts one after another, empty ones left out."""
    full = [p for p in parts if p.type.shape[axis] != 0] or parts[:1]
    return full[0] if len(full) == 1 else c.emit(Concat(axis), *full)


@lowers("aten.stack.default")
def stack(c: Context, tensors: Sequence[Value], axis: int = 0) -> Value:
    axis = c.axis(axis, c.type.rank)
    shape = (*c.type.shape[:axis], 1, *c.type.shape[axis + 1 :])
    return join(c, [c.reshape(c.cast(t, c.dtype), shape) for t in tensors], axis)


@lowers("aten.slice_scatter.default")
def slice_scatter(
    c: Context,
    x: Value,
    source: Value,
    axis: int = 0,
    start: Any = None,
    stop: Any = None,
    step: int = 1,
) -> Value:
    """Writing a part of a tensor is joining what is before, the part, and what is after."""
    if step != 1:
        raise c.unsupported("writing to every n-th element")
    axis = c.axis(axis, x.type.rank)
    size = x.type.shape[axis]
    first = begin(0 if start is None else start, size)
    after = dim(first + source.type.shape[axis])
    parts = [part(c, x, axis, 0, first), source, part(c, x, axis, after, size)]
    return join(c, [p for p in parts if p is not None], axis)


def part(c: Context, x: Value, axis: int, start: Dim, stop: Dim) -> Value | None:
    """Return a slice, seeing through joins that have a seam at both ends; None when empty."""
    if start == stop:
        return None
    node = c.producer(x)
    if node is not None and isinstance(node.op, Concat) and node.op.axis == axis:
        at: Dim = 0
        for piece in node.inputs:
            end = dim(at + piece.type.shape[axis])
            if (at, end) == (start, stop):
                return piece
            at = end
    return c.emit(Slice(axis, start, stop), x)


@lowers("aten.select_scatter.default")
def select_scatter(c: Context, x: Value, source: Value, axis: int, index: Dim) -> Value:
    axis = c.axis(axis, x.type.rank)
    at = begin(index, x.type.shape[axis])
    one = (*x.type.shape[:axis], 1, *x.type.shape[axis + 1 :])
    source = c.broadcast(source, (*one[:axis], *one[axis + 1 :]))
    after = part(c, x, axis, dim(at + 1), x.type.shape[axis])
    parts = [part(c, x, axis, 0, at), c.reshape(source, one), after]
    return join(c, [p for p in parts if p is not None], axis)


@lowers("aten.repeat.default", "aten.tile.default")
def repeat(c: Context, x: Value, repeats: Sequence[Dim]) -> Value:
    repeats = (*(1 for _ in range(x.type.rank - len(repeats))), *repeats)
    extra = len(repeats) - x.type.rank
    x = c.reshape(x, (*(1 for _ in range(extra)), *x.type.shape))
    apart = [d for pair in zip([1] * len(repeats), x.type.shape, strict=True) for d in pair]
    spread = [d for pair in zip(repeats, x.type.shape, strict=True) for d in pair]
    return c.reshape(c.broadcast(c.reshape(x, apart), spread), c.type.shape)


@lowers("aten.repeat_interleave.self_int")
def repeat_interleave(
    c: Context, x: Value, repeats: int, axis: int | None = None, **_: Any
) -> Value:
    if axis is None:
        x, axis = c.reshape(x, (c.type.shape[0] // repeats,)), 0
    axis = c.axis(axis, x.type.rank) + 1
    shape = (*x.type.shape[:axis], 1, *x.type.shape[axis:])
    spread = (*shape[:axis], repeats, *shape[axis + 1 :])
    return c.reshape(c.broadcast(c.reshape(x, shape), spread), c.type.shape)


@lowers("aten.roll.default")
def roll(c: Context, x: Value, shifts: Sequence[int], axes: Sequence[int] = ()) -> Value:
    if not axes:  # the elements one after another, whatever axes they are on
        flat = c.reshape(x, (numel(x.type.shape),))
        return c.reshape(rolled(c, flat, shifts[0], 0), x.type.shape)
    for shift, axis in zip(shifts, axes, strict=True):
        x = rolled(c, x, shift, c.axis(axis, x.type.rank)) if x.type.rank else x
    return x


def rolled(c: Context, x: Value, shift: Dim, axis: int) -> Value:
    """Return `x` with what is at i, along an axis of any size, at `i + shift`."""
    size = x.type.shape[axis]
    if isinstance(size, int) and isinstance(shift, int):
        at: Dim = -shift % size
    elif isinstance(shift, int):
        behind = sympy.Mod(abs(shift), size)
        at = dim(size - behind if shift > 0 else behind)
    else:
        raise c.unsupported("rolling by a symbolic size")
    if at == 0:
        return x
    return c.emit(Concat(axis), c.slice(x, axis, at, size), c.slice(x, axis, 0, at))


@lowers("aten.constant_pad_nd.default", "aten.pad.default")
def pad(c: Context, x: Value, widths: Sequence[Dim], *rest: Any) -> Value:
    mode, value = (
        (rest[0], rest[1:]) if "constant" not in c.operator and rest else ("constant", rest)
    )
    if mode != "constant":
        return padded_by_itself(c, x, widths, mode)
    fill = next((v for v in value if v is not None), 0)
    for i in range(len(widths) // 2):
        axis = x.type.rank - 1 - i
        before, after = widths[2 * i], widths[2 * i + 1]
        x = cropped(c, x, axis, before, after)
        parts = [edge(c, x, axis, before, fill), x, edge(c, x, axis, after, fill)]
        x = join(c, [p for p in parts if p is not None], axis)
    return x


def cropped(c: Context, x: Value, axis: int, before: Dim, after: Dim) -> Value:
    """Return `x` without what negative widths cut off."""
    size = x.type.shape[axis]
    low = -before if isinstance(before, int) and before < 0 else 0
    high = dim(size + after) if isinstance(after, int) and after < 0 else size
    return c.slice(x, axis, low, high)


def grown(width: Dim) -> Dim:
    """Return how much a width adds."""
    return max(width, 0) if isinstance(width, int) else width


_PADDINGS = {"reflection_pad": "reflect", "replication_pad": "replicate"}


@lowers(*(f"aten.{name}{n}d.default" for name in _PADDINGS for n in (1, 2, 3)))
def pad_by_itself(c: Context, x: Value, widths: Sequence[Dim]) -> Value:
    return padded_by_itself(c, x, widths, _PADDINGS[c.operator.split(".")[1][:-2]])


def padded_by_itself(c: Context, x: Value, widths: Sequence[Dim], mode: str) -> Value:
    """Return `x` continued beyond its ends by elements of its own."""
    for i in range(len(widths) // 2):
        axis = x.type.rank - 1 - i
        before, after = widths[2 * i], widths[2 * i + 1]
        if before == 0 and after == 0:
            continue
        size = x.type.shape[axis]
        if mode == "circular":  # what is cut off comes back on no side
            x = cropped(c, x, axis, before, after)
            before, after, size = grown(before), grown(after), x.type.shape[axis]
        at = c.emit(Iota(dim(before + size + after)))
        at = c.apply(ew.Sub(), at, c.size(before, I64))
        last = c.size(dim(size - 1), I64)
        if mode == "reflect":
            at = c.emit(ew.Sub(), last, c.emit(ew.Abs(), at))
            at = c.emit(ew.Sub(), last, c.emit(ew.Abs(), at))
        elif mode == "replicate":
            at = c.emit(ew.Minimum(), c.apply(ew.Maximum(), at, 0), last)
        elif mode == "circular":
            at = c.emit(ew.Mod(), at, c.size(size, I64))
        else:
            raise c.unsupported(f"padding with mode {mode!r}")
        x = take_axis(c, x, axis, at)
    return x


def edge(c: Context, x: Value, axis: int, width: Dim, fill: Any) -> Value | None:
    """Return the constant border of one side, None when there is none."""
    if isinstance(width, int) and width <= 0:
        return None
    shape = (*x.type.shape[:axis], width, *x.type.shape[axis + 1 :])
    return c.fill(fill, x.type.with_shape(shape))


# ------------------------------------------------------------------- made from nothing


@lowers("aten.full.default", "aten.new_full.default", "aten.full_like.default")
def full(c: Context, _: Any, *rest: Any, **__: Any) -> Value:
    return c.fill(rest[-1], c.type)


@lowers(*(f"aten.{prefix}zeros{suffix}.default" for prefix, suffix in
          (("", ""), ("new_", ""), ("", "_like"))),
        *(f"aten.{prefix}empty{suffix}" for prefix, suffix in
          (("", ".memory_format"), ("new_", ".default"), ("", "_like.default"))),
        "aten.new_empty_strided.default", "aten.empty_strided.default",
        "aten.empty_permuted.default", "aten.zero.default")  # fmt: skip
def zeros(c: Context, *_: Any, **__: Any) -> Value:
    return c.fill(0, c.type)


@lowers("aten.ones.default", "aten.new_ones.default", "aten.ones_like.default")
def ones(c: Context, *_: Any, **__: Any) -> Value:
    return c.fill(1, c.type)


@lowers("aten.fill.Scalar", "aten.fill.Tensor")
def fill(c: Context, _: Value, value: Any) -> Value:
    return c.fill(value, c.type)


@lowers("aten.scalar_tensor.default")
def scalar_tensor(c: Context, value: Any, **_: Any) -> Value:
    return c.operand(value, c.dtype)


@lowers("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(c: Context, *bounds: Any, **_: Any) -> Value:
    start = bounds[0] if len(bounds) > 1 else 0
    step = bounds[2] if len(bounds) > 2 else 1
    exact = isinstance(start, int) and isinstance(step, int)
    counting = I64 if exact or c.dtype.is_integer else c.dtype
    x = c.emit(Iota(c.type.shape[0], counting))
    if step != 1:
        x = c.apply(ew.Mul(), x, step)
    if start != 0:
        x = c.apply(ew.Add(), x, start)
    return c.result(x)


@lowers("aten.tril.default", "aten.triu.default")
def triangle(c: Context, x: Value, diagonal: int = 0) -> Value:
    rows, columns = x.type.shape[-2:]
    row = c.reshape(c.emit(Iota(rows)), (rows, 1))
    offset = c.apply(ew.Sub(), c.emit(Iota(columns)), row)
    compare = ew.Le() if "tril" in c.operator else ew.Ge()
    return c.emit(ew.Where(), c.apply(compare, offset, diagonal), x, c.operand(0, c.dtype))


@lowers("aten.eye.default", "aten.eye.m")
def eye(c: Context, *_: Any, **__: Any) -> Value:
    rows, columns = c.type.shape
    row = c.reshape(c.emit(Iota(rows)), (rows, 1))
    return c.cast(c.apply(ew.Eq(), row, c.emit(Iota(columns))), c.dtype)
