"""The element types of a manifest, and what their raw bits are in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import DiluError

#: The numpy type of an element's raw bits, for each element type of a manifest. The compiler's
#: own table is `ir/dtypes.py`, which running an artifact does not load; a test compares them.
STORAGE: dict[str, np.dtype[Any]] = {
    "f64": np.dtype("<f8"),
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f8e4m3": np.dtype("<u1"),
    "f8e5m2": np.dtype("<u1"),
    "f8e8m0": np.dtype("<u1"),
    "f4e2m1": np.dtype("<u1"),
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "i16": np.dtype("<i2"),
    "i8": np.dtype("<i1"),
    "u8": np.dtype("<u1"),
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
    "bool": np.dtype(np.bool_),
}


def storage(dtype: str) -> np.dtype[Any]:
    """Return the numpy type of the raw bits; raise DiluError for a type this version lacks."""
    if dtype not in STORAGE:
        raise DiluError(
            f"the artifact uses the element type {dtype!r}, which this version of dilu lacks",
            hint="update dilu, or compile the model again",
        )
    return STORAGE[dtype]
