"""Ops that move elements: views, slices, joins and gathers."""

from __future__ import annotations

import numpy as np

from ..dtypes import I64, DType
from ..op import Op, expect, register
from ..types import Dim, Shape, TensorType, broadcast, dim, numel, shape_of


@register("reshape")
class Reshape(Op):
    """The same elements, row-major, in another shape."""

    shape: Shape

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        same = dim(numel(x.shape) - numel(self.shape)) == 0
        expect(same, f"reshape of {x} to {x.with_shape(self.shape)} changes the number of elements")
        return (x.with_shape(self.shape),)

    def reference(self, x):
        return x.reshape(self.shape)


@register("transpose")
class Transpose(Op):
    """Axes in the order `permutation`."""

    permutation: tuple[int, ...]

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        ok = sorted(self.permutation) == list(range(x.rank))
        expect(ok, f"{self.permutation} is no permutation of the axes of {x}")
        return (x.with_shape(x.shape[a] for a in self.permutation),)

    def reference(self, x):
        return x.transpose(self.permutation)


@register("broadcast_to")
class BroadcastTo(Op):
    """The input repeated along axes of size 1 and new leading axes."""

    shape: Shape

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        ok = broadcast(x.shape, self.shape) == shape_of(self.shape)
        expect(ok, f"{x} does not broadcast to {x.with_shape(self.shape)}")
        return (x.with_shape(self.shape),)

    def reference(self, x):
        return np.broadcast_to(x, [int(d) for d in self.shape])


@register("slice")
class Slice(Op):
    """Elements `start`, `start + step`, … before `stop` along `axis`; bounds are not negative."""

    axis: int
    start: Dim
    stop: Dim
    step: int = 1

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        expect(0 <= self.axis < x.rank and self.step >= 1, f"bad slice axis or step for {x}")
        size = dim(self.stop - self.start + self.step - 1)
        size = size // self.step if self.step > 1 else size
        return (x.with_shape((*x.shape[: self.axis], size, *x.shape[self.axis + 1 :])),)

    def reference(self, x):
        window = slice(int(self.start), int(self.stop), self.step)
        return x[(slice(None),) * self.axis + (window,)]


@register("windows")
class Windows(Op):
    """`count` windows of `size` elements along `axis`, one every `stride`, their elements
    `dilation` apart: `out[…, o, k, …] = x[…, o·stride + k·dilation, …]`."""

    axis: int
    count: Dim
    size: int
    stride: int = 1
    dilation: int = 1

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        ok = 0 <= self.axis < x.rank and min(self.size, self.stride, self.dilation) >= 1
        expect(ok, f"bad windows along axis {self.axis} of {x}")
        end = dim((self.count - 1) * self.stride + (self.size - 1) * self.dilation + 1)
        there = x.shape[self.axis]
        inside = not (isinstance(end, int) and isinstance(there, int)) or end <= there
        expect(inside, f"windows reach up to {end} along axis {self.axis} of {x}")
        shape = (*x.shape[: self.axis], self.count, self.size, *x.shape[self.axis + 1 :])
        return (x.with_shape(shape),)

    def reference(self, x):
        at = np.arange(int(self.count))[:, None] * self.stride
        return np.take(x, at + np.arange(self.size) * self.dilation, axis=self.axis)


@register("concat")
class Concat(Op):
    """The inputs one after another along `axis`."""

    axis: int

    def infer(self, *xs: TensorType) -> tuple[TensorType, ...]:
        first = xs[0]
        a = self.axis
        for x in xs:
            ok = x.dtype == first.dtype and x.rank == first.rank
            ok = ok and x.shape[:a] + x.shape[a + 1 :] == first.shape[:a] + first.shape[a + 1 :]
            expect(ok, f"cannot join {first} and {x} along axis {a}")
        total = dim(sum(x.shape[a] for x in xs))
        return (first.with_shape((*first.shape[:a], total, *first.shape[a + 1 :])),)

    def reference(self, *xs):
        return np.concatenate(xs, axis=self.axis)


@register("take")
class Take(Op):
    """Rows of `table[N, …]` chosen by `indices`: shape `indices.shape + table.shape[1:]`."""

    def infer(self, table: TensorType, indices: TensorType) -> tuple[TensorType, ...]:
        expect(indices.dtype.is_integer, f"take is indexed by integers, not {indices}")
        expect(table.rank >= 1, "take needs a table of at least one axis")
        return (table.with_shape(indices.shape + table.shape[1:]),)

    def reference(self, table, indices):
        return table[indices]


@register("take_along")
class TakeAlong(Op):
    """`out[…, j] = x[…, indices[…, j]]` along the last axis."""

    def infer(self, x: TensorType, indices: TensorType) -> tuple[TensorType, ...]:
        expect(indices.dtype.is_integer, f"take_along is indexed by integers, not {indices}")
        same = x.shape[:-1] == indices.shape[:-1]
        expect(same, f"take_along needs equal leading axes, not {x} and {indices}")
        return (x.with_shape(indices.shape),)

    def reference(self, x, indices):
        return np.take_along_axis(x, indices.astype(np.int64), axis=-1)


@register("iota")
class Iota(Op):
    """`0, 1, …, size - 1`."""

    size: Dim
    dtype: DType = I64

    def infer(self) -> tuple[TensorType, ...]:
        return (TensorType(self.dtype, shape_of((self.size,))),)

    def reference(self):
        return np.arange(int(self.size), dtype=self.dtype.value)
