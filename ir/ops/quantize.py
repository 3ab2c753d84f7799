"""Quantized values: block-scaled weights, and the casts between values and codes.

The reference of a block-scaled weight is the exact product of decoded code and scale in f32.
"""

from __future__ import annotations

import numpy as np

from ..dtypes import U8, DType, decode_table, encode
from ..op import Op, expect, register
from ..types import TensorType
from ..weight_format import scale_shape


@register("dequantize")
class Dequantize(Op):
    """`codes[…, N, K] · scales[…, ceil(N/block[0]), ceil(K/block[1])]`, a scale for every block.

    Blocks at the edges may be ragged. Before legalization `codes` has a narrow float type;
    afterwards it is the f32 value of a `decode`. The output has type `dtype`.
    """

    block: tuple[int, int]
    dtype: DType

    def infer(self, codes: TensorType, scales: TensorType) -> tuple[TensorType, ...]:
        expect(codes.dtype.is_float and scales.dtype.is_float, "dequantize takes floats")
        want = scale_shape(codes.shape, self.block)
        ok = scales.shape == want
        expect(ok, f"scales {scales} do not fit {codes} in blocks {self.block}: want {want}")
        return (codes.with_dtype(self.dtype),)

    def reference(self, codes, scales):
        n, k = codes.shape[-2:]
        spread = np.repeat(np.repeat(scales, self.block[0], axis=-2), self.block[1], axis=-1)
        return codes * spread[..., :n, :k]


@register("decode")
class Decode(Op):
    """The value in `dtype` of every code (`u8`) of a narrow float `format`; exact, NaN included."""

    format: DType
    dtype: DType

    def infer(self, codes: TensorType) -> tuple[TensorType, ...]:
        expect(codes.dtype == U8, f"decode takes u8 codes, not {codes}")
        return (codes.with_dtype(self.dtype),)

    def reference(self, codes):
        return decode_table(self.format)[codes]


@register("encode")
class Encode(Op):
    """The code (`u8`) of `format` nearest to every value, ties to even, saturating or not."""

    format: DType
    saturate: bool = True

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        expect(x.dtype.is_float, f"encode takes a float, not {x}")
        return (x.with_dtype(U8),)

    def reference(self, x):
        return encode(self.format, x, saturate=self.saturate)
