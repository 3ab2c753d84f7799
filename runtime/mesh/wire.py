"""How rows are written for the wire: as they are, in bf16, or in FP8 with a scale for each row.

Rows are f32 or bf16 here, as raw bits `u32[n, width]` or `u16`; on the wire they are bytes,
`u8[n, size]`. Numbers round to the nearest, ties to even; a row with a NaN or an infinity comes
back as NaN from FP8.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ...element_types import DTYPES, decode_table, max_finite
from ...errors import DiluError

#: What is sent to experts, and what comes back.
FORMATS = {"exact": ("exact", "exact"), "bf16": ("bf16", "bf16"), "f8e4m3": ("f8e4m3", "bf16")}
_FP8 = DTYPES["f8e4m3"]
#: The largest number of e4m3, and the bytes of a scale.
LARGEST, SCALE = max_finite(_FP8), 4


def check_format(name: str) -> None:
    """Raise DiluError where rows cannot be sent in a format."""
    if name not in FORMATS:
        raise DiluError(f"unknown format {name!r} for the wire", hint=", ".join(FORMATS))


def is_plain(form: str, itemsize: int) -> bool:
    """Return whether rows of numbers of `itemsize` bytes are sent as they are."""
    return form == "exact" or (form == "bf16" and itemsize == 2)


def row_bytes(form: str, width: int, itemsize: int) -> int:
    """Return the bytes of a row of `width` numbers of `itemsize` bytes."""
    if is_plain(form, itemsize):
        return width * itemsize
    return 2 * width if form == "bf16" else width + SCALE


def encode(form: str, rows: np.ndarray) -> np.ndarray:
    """Return rows as bytes."""
    if is_plain(form, rows.itemsize):
        return _bytes(rows)
    if form == "bf16":
        return _bytes(_to_bf16(rows))
    wide = rows.astype(np.uint32) << 16 if rows.itemsize == 2 else rows
    return _to_fp8(wide.view(np.float32))


def decode(form: str, data: np.ndarray, out: np.ndarray) -> None:
    """Put rows that came as bytes into `out`, raw bits."""
    if is_plain(form, out.itemsize):
        _bytes(out)[...] = data
    elif form == "bf16":
        np.left_shift(data.view(np.uint16), 16, out=out, dtype=np.uint32, casting="unsafe")
    else:
        codes, scales = data[:, :-SCALE], np.ascontiguousarray(data[:, -SCALE:])
        wide = np.empty(out.shape, np.uint32) if out.itemsize == 2 else out
        np.multiply(_decoded()[codes], scales.view(np.float32), out=wide.view(np.float32))
        if wide is not out:
            out[...] = _to_bf16(wide)


def _bytes(rows: np.ndarray) -> np.ndarray:
    return rows.view(np.uint8).reshape(len(rows), rows.shape[1] * rows.itemsize)


def _to_bf16(bits: np.ndarray) -> np.ndarray:
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, 0x7FC0, rounded).astype(np.uint16)


def _to_fp8(x: np.ndarray) -> np.ndarray:
    """Return codes of e4m3 and, at the end of each row, the f32 scale that brings it to 448."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        largest = np.abs(x).max(1, keepdims=True, initial=0)
        scales = np.where(largest == 0, 1, largest / np.float32(LARGEST)).astype(np.float32)
        scales[scales == 0] = np.finfo(np.float32).smallest_subnormal
        y = np.minimum(np.abs(x / scales), np.float32(LARGEST))
        bits = y.view(np.uint32)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        tiny = np.rint(np.nan_to_num(y) * 512).astype(np.uint32)  # multiples of 2^-9
    codes = np.where(y < 2.0**-6, tiny, normal) | (np.signbit(x).astype(np.uint32) << 7)
    scales[~np.isfinite(largest)] = np.nan
    return np.concatenate([codes.astype(np.uint8), scales.view(np.uint8)], 1)


@cache
def _decoded() -> np.ndarray:
    """Return the values f32[256] of the codes of e4m3."""
    return decode_table(_FP8).astype(np.float32)
