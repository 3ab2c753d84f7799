"""Element types, and the exact meaning of every code of the narrow float formats.

A format is described by its parameters alone; `decode_table` and `encode` derive everything else
from them, so that no pass, kernel or test carries format constants of its own. The C library's
decoders are checked against these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from ..errors import DiluError

Special = Literal["ieee", "fn", "finite", "scale"]


@dataclass(frozen=True)
class DType:
    """An element type.

    `special` says what the top codes of a float mean: `ieee` has infinities and NaN, `fn` has NaN
    only in the all-ones code (OCP FP8 e4m3), `finite` has neither (OCP FP4 e2m1), `scale` is an
    unsigned power of two with one NaN code (OCP MX e8m0).
    """

    name: str
    bits: int
    kind: Literal["float", "int", "uint", "bool"]
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    special: Special = "ieee"

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
    def storage(self) -> np.dtype:
        """The numpy type of the raw bits in a file or a buffer."""
        if self.name in ("f64", "f32", "f16"):
            return np.dtype(f"<f{self.itemsize}")
        if self.is_float:
            return np.dtype(f"<u{self.itemsize}")
        if self.kind == "bool":
            return np.dtype(np.bool_)
        return np.dtype(f"<{'u' if self.kind == 'uint' else 'i'}{self.itemsize}")

    @property
    def value(self) -> np.dtype:
        """The numpy type in which the reference interpreter holds values of this type."""
        if self.is_float:
            return np.dtype(np.float64 if self.bits == 64 else np.float32)
        return self.storage


F64 = DType("f64", 64, "float", 11, 52, 1023)
F32 = DType("f32", 32, "float", 8, 23, 127)
F16 = DType("f16", 16, "float", 5, 10, 15)
BF16 = DType("bf16", 16, "float", 8, 7, 127)
F8E4M3 = DType("f8e4m3", 8, "float", 4, 3, 7, "fn")
F8E5M2 = DType("f8e5m2", 8, "float", 5, 2, 15)
F8E8M0 = DType("f8e8m0", 8, "float", 8, 0, 127, "scale")
F4E2M1 = DType("f4e2m1", 4, "float", 2, 1, 1, "finite")
I64 = DType("i64", 64, "int")
I32 = DType("i32", 32, "int")
I16 = DType("i16", 16, "int")
I8 = DType("i8", 8, "int")
U8 = DType("u8", 8, "uint")
U16 = DType("u16", 16, "uint")
U32 = DType("u32", 32, "uint")
BOOL = DType("bool", 8, "bool")

DTYPES = {
    t.name: t
    for t in (
        F64, F32, F16, BF16, F8E4M3, F8E5M2, F8E8M0, F4E2M1,
        I64, I32, I16, I8, U8, U16, U32, BOOL,
    )
}  # fmt: skip


def dtype(name: str) -> DType:
    """Return the type called `name`; raise DiluError when there is none."""
    if name not in DTYPES:
        raise DiluError(f"unknown element type {name!r}", hint=f"known: {', '.join(DTYPES)}")
    return DTYPES[name]


def promote(a: DType, b: DType) -> DType:
    """Return the common type of an elementwise op: floats win over integers, then the wider."""
    if a == b:
        return a
    rank = {"bool": 0, "uint": 1, "int": 2, "float": 3}
    if rank[a.kind] != rank[b.kind]:
        return a if rank[a.kind] > rank[b.kind] else b
    if a.bits == b.bits:  # bf16 with f16: neither holds the other
        return F32 if a.is_float else a
    return a if a.bits > b.bits else b


def conversion_bits(t: DType) -> int:
    """Return how wide the signed integer is that a float becomes on its way to the integer `t`.

    A float is cut off to it (what does not fit, NaN included, is its smallest number), and its low
    bits are the outcome. These are the widths that torch takes on x86-64 CPUs, where C leaves what
    does not fit undefined; f32 to u32, where torch's vectors and scalars differ, is as its scalars.
    """
    return 64 if t in (I64, U32, U8) else 32


def to_integer(t: DType, values: np.ndarray) -> np.ndarray:
    """Return floats as integers of type `t`: see `conversion_bits`."""
    low = -(2.0 ** (conversion_bits(t) - 1))
    whole = np.trunc(np.asarray(values, np.float64))
    fits = (whole >= low) & (whole < -low)
    return np.where(fits, whole, low).astype(np.int64).astype(t.value)


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


@cache
def _positive(t: DType) -> tuple[np.ndarray, np.ndarray]:
    """Return the finite non-negative values of a format in ascending order, and their codes."""
    table = decode_table(t)
    codes = np.flatnonzero(np.isfinite(table) & ~np.signbit(table))
    order = np.argsort(table[codes], kind="stable")
    return table[codes][order], codes[order]


def encode(t: DType, values: np.ndarray, *, saturate: bool = True) -> np.ndarray:
    """Return the codes nearest to `values`, ties to the even code.

    Out-of-range values (after rounding as if the exponent were unbounded) saturate to the largest
    finite code, or become infinity or, where the format has none, NaN. NaN stays NaN where the
    format has one; `finite` formats saturate always.

    A `scale` has no sign, rounds ties up, and above its smallest number to 2^-126 always up: as
    torch does, for the formats' specification says nothing of it.

    Source: OCP 8-bit Floating Point Specification 1.0, section 5.2.
    """
    x = np.asarray(values, np.float64)
    if t.special == "scale":
        return _encode_scale(t, np.abs(x), saturate)
    grid, codes = _positive(t)
    magnitude = np.abs(x)
    upper = np.clip(np.searchsorted(grid, magnitude), 1, len(grid) - 1)
    low, high = grid[upper - 1], grid[upper]
    middle = low + (high - low) / 2
    even = (codes[upper - 1] & 1) == 0
    pick_low = (magnitude < middle) | ((magnitude == middle) & even)
    out = np.where(pick_low, codes[upper - 1], codes[upper])
    # One step beyond the largest value is where rounding would leave the format.
    limit = grid[-1] + (grid[-1] - grid[-2]) / 2
    over = (magnitude > limit) | ((magnitude == limit) & bool(codes[-1] & 1))
    out = out | (np.signbit(x).astype(np.int64) << (t.bits - 1))
    if not saturate and t.special != "finite":
        beyond = _infinity_code(t) if t.special == "ieee" else _nan_code(t)
        sign = np.signbit(x).astype(np.int64) << (t.bits - 1) if t.special == "ieee" else 0
        out = np.where(over, beyond | sign, out)
    if t.special != "finite":
        out = np.where(np.isnan(x), _nan_code(t), out)
    return out.astype(t.storage)


def _encode_scale(t: DType, magnitude: np.ndarray, saturate: bool) -> np.ndarray:
    fraction, exponent = np.frexp(magnitude)  # fraction in 0.5 … 1
    code = exponent - 1 + t.bias + (fraction >= 0.75)
    least = np.ldexp(1.0, -t.bias)
    code = np.where(magnitude < 2 * least, magnitude > least, code)
    code = np.where(np.isinf(magnitude), 256, code)
    code = np.where(code > 254, 254 if saturate else 255, code)
    return np.where(np.isnan(magnitude), 255, code).astype(t.storage)


def _infinity_code(t: DType) -> int:
    return int(np.flatnonzero(np.isposinf(decode_table(t)))[0])


def _nan_code(t: DType) -> int:
    """Return the positive quiet NaN of a format."""
    if t.special == "ieee":
        return _infinity_code(t) | (1 << (t.mantissa - 1))
    return int(np.flatnonzero(np.isnan(decode_table(t)))[0])


def decode(t: DType, raw: np.ndarray) -> np.ndarray:
    """Return the values of raw storage (`t.storage`) as the interpreter holds them (`t.value`)."""
    if t.is_float and t.bits <= 16:
        return decode_table(t)[raw.view(np.uint16) if t is F16 else raw].astype(t.value)
    return raw.astype(t.value, copy=False)


def to_storage(t: DType, values: np.ndarray, *, saturate: bool = False) -> np.ndarray:
    """Return the raw storage of values, floats rounded to nearest even; f8 as `encode` says.

    Whatever is to be a float of at most 16 bits is rounded to f32 first, as torch and all targets
    do it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if t.is_float and t.bits <= 16:
            values = np.asarray(values).astype(np.float32)
        if t.is_float and t.bits <= 16 and t is not F16:
            return encode(t, values, saturate=saturate and t.is_code)
        return np.asarray(values).astype(t.storage)


def round_to(t: DType, values: np.ndarray, *, saturate: bool = False) -> np.ndarray:
    """Round interpreter values to the grid of `t`; what is on it, infinities included, stays."""
    if not t.is_float or t.bits >= 32:
        return np.asarray(values).astype(t.value)
    return decode(t, to_storage(t, values, saturate=saturate))
