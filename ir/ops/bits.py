"""Elementwise ops on the bits of integers."""

from __future__ import annotations

import numpy as np

from ..op import expect, register
from ..types import TensorType
from .elementwise import Binary, Unary


class BinaryBits(Binary):
    """Two inputs of one integer type."""

    def infer(self, a: TensorType, b: TensorType) -> tuple[TensorType, ...]:
        expect(a.dtype.is_integer, f"{self.name} takes integers, not {a}")
        return super().infer(a, b)


@register("bit_not")
class BitNot(Unary):
    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        expect(x.dtype.is_integer, f"bit_not takes integers, not {x}")
        return (x,)

    def reference(self, x):
        return ~x


@register("bit_and")
class BitAnd(BinaryBits):
    def reference(self, a, b):
        return a & b


@register("bit_or")
class BitOr(BinaryBits):
    def reference(self, a, b):
        return a | b


@register("bit_xor")
class BitXor(BinaryBits):
    def reference(self, a, b):
        return a ^ b


@register("shift_left")
class ShiftLeft(BinaryBits):
    """`a · 2^b`, wrapping; zero where `b` is negative or not below the number of bits."""

    def reference(self, a, b):
        inside = (b >= 0) & (b < 8 * a.dtype.itemsize)
        return np.where(inside, np.left_shift(a, np.where(inside, b, 0)), 0).astype(a.dtype)


@register("shift_right")
class ShiftRight(BinaryBits):
    """`a / 2^b`, rounded down; 0 or -1 where `b` is negative or not below the number of bits."""

    def reference(self, a, b):
        inside = (b >= 0) & (b < 8 * a.dtype.itemsize)
        rest = np.where(a < 0, -1, 0)
        return np.where(inside, np.right_shift(a, np.where(inside, b, 0)), rest).astype(a.dtype)
