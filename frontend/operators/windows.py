"""What slides over an input: convolutions and pooling, in any number of axes.

A window is a view (`ir.ops.index.Windows`), so a convolution is a matrix product whose rows are
made as they are read, with the epilogues that a product has; pooling is a reduction. Letters of
shapes: N batch, C channels in, O out, g groups, o places along an axis, k elements of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.dtypes import F32, I64
from ...ir.graph import Value
from ...ir.ops import elementwise as ew
from ...ir.ops.index import Concat, Iota, Windows
from ...ir.ops.matmul import MatMul
from ...ir.ops.reduce import ArgMax, ReduceMax, ReduceSum
from ...ir.types import Dim, dim, numel
from .context import Context, lowers
from .index import flip
from .reduce import smallest
from .views import cropped, edge, join

Ints = Sequence[int]


def _each(values: Any, n: int) -> list[int]:
    """Return a number for each of `n` axes, of one for all or one for each."""
    given = [values] if isinstance(values, int) else list(values)
    return given * n if len(given) == 1 else given


def bordered(c: Context, x: Value, axis: int, before: Dim, after: Dim, fill: Any) -> Value:
    """Return `x` with a border of one number on both sides of an axis; negative widths crop."""
    x = cropped(c, x, axis, before, after)
    parts = [edge(c, x, axis, before, fill), x, edge(c, x, axis, after, fill)]
    return join(c, [p for p in parts if p is not None], axis)


def windows(c: Context, x: Value, count: Sequence[Dim], size: Ints, stride: Ints,
            dilation: Ints) -> Value:  # fmt: skip
    """Return `[N, C, o…, k…]`, the windows of `[N, C, …]` over the axes behind the first two."""
    n = len(size)
    for i in range(n):
        x = c.emit(Windows(2 + 2 * i, count[i], size[i], stride[i], dilation[i]), x)
    places, inside = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return c.transpose(x, [0, 1, *places, *inside])


# ------------------------------------------------------------------------ convolutions


@lowers("aten.convolution.default")
def convolution(
    c: Context, x: Value, weight: Value, bias: Value | None, stride: Ints, padding: Ints,
    dilation: Ints, transposed: bool, output_padding: Ints, groups: int,
) -> Value:  # fmt: skip
    """`x` is `[N, C, …]`, or `[C, …]` alone; `weight` `[O, C/g, k…]`, transposed `[C, O/g, k…]`."""
    n = weight.type.rank - 2
    stride, padding, dilation = (_each(v, n) for v in (stride, padding, dilation))
    if not c.dtype.is_float:
        raise c.unsupported("a convolution of integers")
    shape = c.type.shape
    if x.type.rank == n + 1:
        x, shape = c.reshape(x, (1, *x.type.shape)), (1, *shape)
    x, weight = c.wide(x), c.wide(weight)
    size = [int(d) for d in weight.type.shape[2:]]
    if transposed:
        more = _each(output_padding, n)
        ends = [d * (k - 1) - p for d, k, p in zip(dilation, size, padding, strict=True)]
        borders = [(e, e + m) for e, m in zip(ends, more, strict=True)]
        x, weight, stride = _spread(c, x, stride), _turned(c, weight, groups), [1] * n
    else:
        borders = [(p, p) for p in padding]
    for i, (before, after) in enumerate(borders):
        x = bordered(c, x, 2 + i, before, after, 0)
    patches = windows(c, x, shape[2:], size, stride, dilation)
    y = _products(c, patches, weight, groups, n)
    if bias is not None:
        bias = c.reshape(c.wide(bias), (weight.type.shape[0], *[1] * n))
        y = c.emit(ew.Add(), y, bias)
    return c.result(c.reshape(y, c.type.shape))


def _spread(c: Context, x: Value, stride: Ints) -> Value:
    """Return `x` with zeros between its elements, which are `stride` apart then."""
    for i, step in enumerate(stride):
        axis = 2 + i
        if step == 1:
            continue
        size = x.type.shape[axis]
        apart = c.reshape(x, (*x.type.shape[: axis + 1], 1, *x.type.shape[axis + 1 :]))
        zeros = apart.type.shape[: axis + 1] + (step - 1,) + apart.type.shape[axis + 2 :]
        apart = c.emit(Concat(axis + 1), apart, c.fill(0, x.type.with_shape(zeros)))
        x = c.reshape(apart, (*x.type.shape[:axis], dim(size * step), *x.type.shape[axis + 1 :]))
        x = c.slice(x, axis, 0, dim((size - 1) * step + 1))
    return x


def _turned(c: Context, weight: Value, groups: int) -> Value:
    """Return `[C, O/g, k…]` as the `[O, C/g, k…]` of the convolution that spread inputs take."""
    ins, outs, *size = weight.type.shape
    weight = flip(c, weight, range(2, weight.type.rank))
    weight = c.reshape(weight, (groups, int(ins) // groups, outs, *size))
    weight = c.swap(weight, 1, 2)
    return c.reshape(weight, (groups * int(outs), int(ins) // groups, *size))


def _products(c: Context, patches: Value, weight: Value, groups: int, n: int) -> Value:
    """Return `[N, O, o…]` of patches `[N, C, o…, k…]` and a weight `[O, C/g, k…]`."""
    batch, ins, *rest = patches.type.shape
    places, size = rest[:n], rest[n:]
    outs, per = weight.type.shape[:2]
    if groups == ins == outs:  # each channel for itself
        kernel = c.reshape(weight, (outs, *[1] * n, *size))
        terms = c.emit(ew.Mul(), patches, kernel)
        return c.emit(ReduceSum(tuple(range(2 + n, 2 + 2 * n))), terms)
    length, rows = numel((per, *size)), numel((batch, *places))
    if groups == 1:
        order = [0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)]
        a = c.reshape(c.transpose(patches, order), (rows, length))
        y = c.emit(MatMul(transpose_b=True), a, c.reshape(weight, (outs, length)))
        y = c.reshape(y, (batch, *places, outs))
        return c.transpose(y, [0, n + 1, *range(1, n + 1)])
    a = c.reshape(patches, (batch, groups, per, *places, *size))
    a = c.transpose(a, [1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n)])
    b = c.reshape(weight, (groups, int(outs) // groups, length))
    y = c.emit(MatMul(transpose_b=True), c.reshape(a, (groups, rows, length)), b)
    y = c.reshape(y, (groups, batch, *places, int(outs) // groups))
    y = c.transpose(y, [1, 0, 2 + n, *range(2, 2 + n)])
    return c.reshape(y, (batch, outs, *places))


# ----------------------------------------------------------------------------- pooling


def _with_batch(c: Context, x: Value, n: int) -> Value:
    return x if x.type.rank == n + 2 else c.reshape(x, (1, *x.type.shape))


def _axes(x: Value, n: int) -> tuple[int, ...]:
    return tuple(range(x.type.rank - n, x.type.rank))


def _number(c: Context) -> int:
    """Return of how many axes an operator is: its name says it."""
    return next(int(d) for d in c.operator.split(".")[1] if d.isdigit())


@lowers("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default",
        "aten.max_pool1d_with_indices.default", "aten.max_pool2d_with_indices.default",
        "aten.max_pool3d_with_indices.default")  # fmt: skip
def max_pool(
    c: Context, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:  # fmt: skip
    n = _number(c)
    size, padding, dilation = (_each(v, n) for v in (kernel_size, padding, dilation))
    stride = _each(stride, n) if stride not in ((), []) else size
    counts, sizes = c.type.shape[-n:], x.type.shape[-n:]
    dtype = x.type.dtype
    whole = _with_batch(c, x, n)
    for i in range(n):
        after = padding[i] + (stride[i] if ceil_mode else 0)
        least = smallest(dtype, True)
        whole = bordered(c, whole, 2 + i, padding[i], after, least)
    each = windows(c, whole, counts, size, stride, dilation)
    largest = c.reshape(c.emit(ReduceMax(_axes(each, n)), each), c.type.shape)
    if "indices" not in c.operator:
        return largest
    lead = each.type.shape[:-n]
    best = c.emit(ArgMax(), c.reshape(each, (*lead, numel(tuple(size)))))
    flat = _flat_places(c, best, counts, sizes, size, stride, padding, dilation)
    return largest, c.reshape(flat, c.type.shape)


def _flat_places(
    c: Context, best: Value, counts: Sequence[Dim], sizes: Sequence[Dim], size: Ints,
    stride: Ints, padding: Ints, dilation: Ints,
) -> Value:  # fmt: skip
    """Return where in the input, row by row, the element of each window with this number is."""
    n, flat = len(size), None
    rest = best
    within: list[Value] = []
    for k in reversed(size):
        within.insert(0, c.apply(ew.Mod(), rest, k))
        rest = c.apply(ew.Div(), rest, k)
    for i in range(n):
        first = c.apply(ew.Mul(), c.emit(Iota(counts[i])), stride[i])
        first = c.reshape(c.apply(ew.Sub(), first, padding[i]), (counts[i], *[1] * (n - 1 - i)))
        at = c.emit(ew.Add(), c.apply(ew.Mul(), within[i], dilation[i]), first)
        if flat is not None:
            at = c.emit(ew.Add(), c.emit(ew.Mul(), flat, c.size(sizes[i], I64)), at)
        flat = at
    assert flat is not None
    return flat


@lowers("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def avg_pool(
    c: Context, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    n = _number(c)
    size, padding = _each(kernel_size, n), _each(padding, n)
    stride = _each(stride, n) if stride not in ((), []) else size
    counts, sizes = c.type.shape[-n:], x.type.shape[-n:]
    whole = _with_batch(c, c.cast(x, F32) if not c.dtype.is_float else c.wide(x), n)
    for i in range(n):
        after = padding[i] + (stride[i] if ceil_mode else 0)
        whole = bordered(c, whole, 2 + i, padding[i], after, 0)
    each = windows(c, whole, counts, size, stride, [1] * n)
    total = c.emit(ReduceSum(_axes(each, n)), each)
    divisor: Any = divisor_override
    if divisor is None:
        divisor = numel(tuple(size))
        if ceil_mode or (any(padding) and not count_include_pad):
            divisor = _counts(c, counts, sizes, size, stride, padding, count_include_pad)
    return c.result(c.reshape(c.apply(ew.Div(), total, divisor), c.type.shape))


def _counts(
    c: Context, counts: Sequence[Dim], sizes: Sequence[Dim], size: Ints, stride: Ints,
    padding: Ints, border: bool,
) -> Value:  # fmt: skip
    """Return of how many elements each window has, with those of the border or without."""
    n, product = len(size), None
    for i in range(n):
        start = c.apply(ew.Mul(), c.emit(Iota(counts[i])), stride[i])
        start = c.apply(ew.Sub(), start, padding[i])
        end = c.apply(ew.Add(), start, size[i])
        end = c.emit(ew.Minimum(), end, c.size(dim(sizes[i] + border * padding[i]), I64))
        start = start if border else c.apply(ew.Maximum(), start, 0)
        number = c.reshape(c.emit(ew.Sub(), end, start), (counts[i], *[1] * (n - 1 - i)))
        product = number if product is None else c.emit(ew.Mul(), product, number)
    assert product is not None
    return product


# ------------------------------------------------------------- of a given number of places


@lowers("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default",
        "aten.adaptive_avg_pool3d.default", "aten._adaptive_avg_pool2d.default",
        "aten._adaptive_avg_pool3d.default")  # fmt: skip
def adaptive_avg_pool(c: Context, x: Value, output_size: Any) -> Value:
    """Axis by axis: the mean of means, of parts of one size along each axis."""
    x = c.wide(x)
    n = _number(c)
    for axis in _axes(x, n):
        inside, length = _shares(c, x.type.shape[axis], c.type.shape[axis])
        row = c.swap(x, axis, -1)
        each = c.reshape(row, (*row.type.shape[:-1], 1, row.type.shape[-1]))
        kept = c.emit(ew.Where(), inside, each, c.operand(0, x.type.dtype))
        total = c.emit(ReduceSum((kept.type.rank - 1,)), kept)
        x = c.swap(c.apply(ew.Div(), total, length), axis, -1)
    return c.result(x)


def _shares(c: Context, size: Dim, count: Dim) -> tuple[Value, Value]:
    """Return which elements of an axis are in which part `[count, size]`, and in each how many."""
    part = c.emit(Iota(count))
    start = _floor_share(c, part, size, count)
    end = _floor_share(c, c.apply(ew.Add(), part, 1), size, count, up=True)
    at = c.emit(Iota(size))
    low, high = (c.reshape(v, (count, 1)) for v in (start, end))
    inside = c.emit(ew.LogicalAnd(), c.emit(ew.Ge(), at, low), c.emit(ew.Lt(), at, high))
    return inside, c.emit(ew.Sub(), end, start)


def _floor_share(c: Context, part: Value, size: Dim, count: Dim, up: bool = False) -> Value:
    """Return part · size / count, rounded down or up."""
    whole, by = c.size(size, I64), c.size(count, I64)
    product = c.emit(ew.Mul(), part, whole)
    if up:
        product = c.emit(ew.Add(), product, c.apply(ew.Sub(), by, 1))
    return c.emit(ew.Div(), product, by)


@lowers("aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default",
        "aten.adaptive_max_pool3d.default")  # fmt: skip
def adaptive_max_pool(c: Context, x: Value, output_size: Any) -> tuple[Value, Value]:
    """The largest of each part, and where it is, row by row: the first of equal ones."""
    n, rank = _number(c), x.type.rank
    lead, sizes, counts = x.type.shape[:-n], x.type.shape[-n:], c.type.shape[-n:]
    each = c.reshape(x, (*lead, *[1] * n, *sizes))
    inside: Value | None = None
    for i in range(n):
        shares, _ = _shares(c, sizes[i], counts[i])
        shape = [1] * (2 * n)
        shape[i], shape[n + i] = counts[i], sizes[i]  # type: ignore[call-overload]
        shares = c.reshape(shares, shape)
        inside = shares if inside is None else c.emit(ew.LogicalAnd(), inside, shares)
    assert inside is not None
    least = c.operand(smallest(x.type.dtype, True), x.type.dtype)
    kept = c.emit(ew.Where(), inside, each, least)
    kept = c.reshape(kept, (*lead, *counts, numel(sizes)))
    largest = c.emit(ReduceMax((rank,)), kept)
    return largest, c.emit(ArgMax(), kept)
