"""The element types: what their bits mean, and what others call them.

The one table that compiler and runtime share. Invariant: a type is described by its row alone;
storage, values of codes and names in files are derived from it wherever they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

Special = Literal["ieee", "fn", "finite", "scale"]


@dataclass(frozen=True)
class DType:
    """An element type.

    `special` says what the top codes of a float mean: `ieee` has infinities and NaN, `fn` has NaN
    only in the all-ones code (OCP FP8 e4m3), `finite` has neither (OCP FP4 e2m1), `scale` is an
    unsigned power of two with one NaN code (OCP MX e8m0). `safetensors` is the name in files,
    `torch` the one that torch, ml_dtypes and configurations use, `dlpack` the type code of DLPack;
    None where those have none.
    """

    name: str
    bits: int
    kind: Literal["float", "int", "uint", "bool"]
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    special: Special = "ieee"
    safetensors: str | None = field(default=None, compare=False, repr=False)
    torch: str | None = field(default=None, compare=False, repr=False)
    dlpack: int | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def is_code(self) -> bool:
        """Whether the type is a narrow float that exists as codes on most hardware."""
        return self.is_float and self.bits <= 8

    @property
    def itemsize(self) -> int:
        """Bytes of one element in memory (a packed 4-bit type shares its byte and counts as 1)."""
        return max(self.bits // 8, 1)

    @property
    def is_numpys(self) -> bool:
        """Whether numpy computes with the type; others are raw bits of their width there."""
        return not self.is_float or self.name in ("f64", "f32", "f16")

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy type of the raw bits in a file or a buffer."""
        if self.kind == "bool":
            return np.dtype(np.bool_)
        letter = {"float": "f", "int": "i", "uint": "u"}[self.kind] if self.is_numpys else "u"
        return np.dtype(f"<{letter}{self.itemsize}")

    @property
    def value(self) -> np.dtype[Any]:
        """The numpy type in which the reference interpreter holds values of this type."""
        if self.is_float:
            return np.dtype(np.float64 if self.bits == 64 else np.float32)
        return self.storage


# fmt: off
DTYPES = {
    t.name: t
    for t in (
        #     name      bits kind   expo. mant. bias  special   safetensors torch           dlpack
        DType("f64",    64, "float", 11, 52, 1023, "ieee",   "F64",     "float64",        2),
        DType("f32",    32, "float",  8, 23,  127, "ieee",   "F32",     "float32",        2),
        DType("f16",    16, "float",  5, 10,   15, "ieee",   "F16",     "float16",        2),
        DType("bf16",   16, "float",  8,  7,  127, "ieee",   "BF16",    "bfloat16",       4),
        DType("f8e4m3",  8, "float",  4,  3,    7, "fn",     "F8_E4M3", "float8_e4m3fn",  10),
        DType("f8e5m2",  8, "float",  5,  2,   15, "ieee",   "F8_E5M2", "float8_e5m2",    12),
        DType("f8e8m0",  8, "float",  8,  0,  127, "scale",  "F8_E8M0", "float8_e8m0fnu", 14),
        DType("f4e2m1",  4, "float",  2,  1,    1, "finite", None,      None,             None),
        DType("i64",    64, "int",    0,  0,    0, "ieee",   "I64",     "int64",          0),
        DType("i32",    32, "int",    0,  0,    0, "ieee",   "I32",     "int32",          0),
        DType("i16",    16, "int",    0,  0,    0, "ieee",   "I16",     "int16",          0),
        DType("i8",      8, "int",    0,  0,    0, "ieee",   "I8",      "int8",           0),
        DType("u8",      8, "uint",   0,  0,    0, "ieee",   "U8",      "uint8",          1),
        DType("u16",    16, "uint",   0,  0,    0, "ieee",   "U16",     "uint16",         1),
        DType("u32",    32, "uint",   0,  0,    0, "ieee",   "U32",     "uint32",         1),
        DType("bool",    8, "bool",   0,  0,    0, "ieee",   "BOOL",    "bool",           6),
    )
}
# fmt: on

#: The types by the names that others have for them.
BY_SAFETENSORS = {t.safetensors: t for t in DTYPES.values() if t.safetensors is not None}
BY_TORCH = {t.torch: t for t in DTYPES.values() if t.torch is not None}
BY_DLPACK = {(t.dlpack, t.bits): t for t in DTYPES.values() if t.dlpack is not None}


@cache
def decode_table(t: DType) -> np.ndarray:
    """Return f64[2**bits]: the value of every code of a float type of at most 16 bits.

    Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0; IEEE 754.
    """
    codes = np.arange(1 << t.bits, dtype=np.int64)
    if t.special == "scale":
        values = np.ldexp(1.0, codes - t.bias)
        values[-1] = np.nan
        return values
    fraction = codes & ((1 << t.mantissa) - 1)
    exponent = (codes >> t.mantissa) & ((1 << t.exponent) - 1)
    normal = np.ldexp(
        (1 << t.mantissa) + fraction.astype(np.float64), exponent - t.bias - t.mantissa
    )
    subnormal = np.ldexp(fraction.astype(np.float64), 1 - t.bias - t.mantissa)
    values = np.where(exponent == 0, subnormal, normal)
    top = (1 << t.exponent) - 1
    if t.special == "ieee":
        values = np.where(exponent == top, np.where(fraction == 0, np.inf, np.nan), values)
    elif t.special == "fn":
        values = np.where((exponent == top) & (fraction == (1 << t.mantissa) - 1), np.nan, values)
    sign = np.where(codes >> (t.bits - 1), -1.0, 1.0)
    return sign * values


def max_finite(t: DType) -> float:
    """Return the largest finite value of a float type."""
    if t.bits > 16:
        return float(np.finfo(t.storage).max)
    table = decode_table(t)
    return float(table[np.isfinite(table)].max())
