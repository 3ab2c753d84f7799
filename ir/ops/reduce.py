"""Reductions and selection along axes."""

from __future__ import annotations

import numpy as np

from ..dtypes import I64
from ..op import Op, expect, register, unless
from ..types import TensorType


class Reduce(Op):
    """Base: reduces over `axes` (ascending), keeping them with size 1 when `keepdims`."""

    axes: tuple[int, ...]
    keepdims: bool

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        ok = self.axes == tuple(sorted(set(self.axes))) and all(0 <= a < x.rank for a in self.axes)
        expect(ok, f"bad reduction axes {self.axes} for {x}")
        kept = (
            (1 if a in self.axes else d)
            for a, d in enumerate(x.shape)
            if self.keepdims or a not in self.axes
        )
        return (x.with_shape(kept),)


@register("reduce_sum")
class ReduceSum(Reduce):
    axes: tuple[int, ...]
    keepdims: bool = False

    def reference(self, x):
        return np.sum(x, axis=self.axes, keepdims=self.keepdims, dtype=x.dtype)


@register("reduce_prod")
class ReduceProd(Reduce):
    axes: tuple[int, ...]
    keepdims: bool = False

    def reference(self, x):
        return np.prod(x, axis=self.axes, keepdims=self.keepdims, dtype=x.dtype)


@register("reduce_max")
class ReduceMax(Reduce):
    axes: tuple[int, ...]
    keepdims: bool = False

    def reference(self, x):
        return np.max(x, axis=self.axes, keepdims=self.keepdims, initial=extreme(x.dtype, -1))


@register("reduce_min")
class ReduceMin(Reduce):
    axes: tuple[int, ...]
    keepdims: bool = False

    def reference(self, x):
        return np.min(x, axis=self.axes, keepdims=self.keepdims, initial=extreme(x.dtype, 1))


def extreme(dtype: np.dtype, sign: int) -> float | int | bool:
    """Return the largest number of a type, or (`sign` -1) the smallest: the outcome for none."""
    if dtype.kind == "f":
        return sign * np.inf
    if dtype.kind == "b":
        return sign > 0
    info = np.iinfo(dtype)
    return int(info.max if sign > 0 else info.min)


@register("argmax")
class ArgMax(Op):
    """The index of the largest element along the last axis, the first among equals.

    NaN is larger than anything.
    """

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        return (x.with_dtype(I64).with_shape(x.shape[:-1]),)

    def reference(self, x):
        return np.argmax(x, axis=-1)


@register("topk")
class TopK(Op):
    """The `k` largest along the last axis, descending, and their indices; or the `k` smallest.

    Among equals the lower index comes first. NaN is larger than anything.
    """

    k: int
    largest: bool = unless(True)

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        size = x.shape[-1]
        expect(not isinstance(size, int) or self.k <= size, f"topk of {self.k} from {x}")
        out = x.with_shape((*x.shape[:-1], self.k))
        return out, out.with_dtype(I64)

    def reference(self, x):
        indices = np.argsort(x[..., ::-1] if self.largest else x, axis=-1, kind="stable")
        if self.largest:  # the last of the reversed row first: the largest, lower indices first
            indices = x.shape[-1] - 1 - indices[..., ::-1]
        indices = indices[..., : self.k]
        return np.take_along_axis(x, indices, axis=-1), indices
