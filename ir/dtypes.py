"""The element types as constants, and exact conversions between them.

The types themselves are rows of `element_types.py`, by whose parameters alone `decode_table` and
`encode` work, so that no pass, kernel or test carries format constants of its own. The C library's
decoders are checked against these tables.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ..element_types import DTYPES, DType, decode_table
from ..element_types import max_finite as max_finite
from ..errors import DiluError

F64 = DTYPES["f64"]
F32 = DTYPES["f32"]
F16 = DTYPES["f16"]
BF16 = DTYPES["bf16"]
F8E4M3 = DTYPES["f8e4m3"]
F8E5M2 = DTYPES["f8e5m2"]
F8E8M0 = DTYPES["f8e8m0"]
F4E2M1 = DTYPES["f4e2m1"]
I64 = DTYPES["i64"]
I32 = DTYPES["i32"]
I16 = DTYPES["i16"]
I8 = DTYPES["i8"]
U8 = DTYPES["u8"]
U16 = DTYPES["u16"]
U32 = DTYPES["u32"]
BOOL = DTYPES["bool"]


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
