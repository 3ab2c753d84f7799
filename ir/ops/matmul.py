"""Matrix products."""

from __future__ import annotations

import numpy as np

from ..op import Op, expect, register
from ..types import TensorType, broadcast


@register("matmul")
class MatMul(Op):
    """`a[…, M, K] · b[…, K, N]`, or `· b[…, N, K]ᵀ` when `transpose_b`; leading axes broadcast.

    Accumulates in f32. A linear layer is `matmul(x, w) {transpose_b=true}` with `w[N, K]` as it
    lies in a checkpoint.
    """

    transpose_b: bool = False

    def infer(self, a: TensorType, b: TensorType) -> tuple[TensorType, ...]:
        expect(a.rank >= 2 and b.rank >= 2, f"matmul takes matrices, not {a} and {b}")
        expect(a.dtype == b.dtype, f"matmul takes equal element types, not {a} and {b}")
        n, k = b.shape[-2:] if self.transpose_b else b.shape[:-3:-1]
        expect(a.shape[-1] == k, f"matmul of {a} and {b}: inner sizes differ")
        batch = broadcast(a.shape[:-2], b.shape[:-2])
        return (a.with_shape((*batch, a.shape[-2], n)),)

    def reference(self, a, b):
        return a @ (np.swapaxes(b, -1, -2) if self.transpose_b else b)
