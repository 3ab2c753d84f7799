"""The element types of a manifest, and what their raw bits are in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...element_types import DTYPES
from ...errors import DiluError

#: The numpy type of an element's raw bits, for each element type of a manifest.
STORAGE: dict[str, np.dtype[Any]] = {name: t.storage for name, t in DTYPES.items()}


def storage(dtype: str) -> np.dtype[Any]:
    """Return the numpy type of the raw bits; raise DiluError for a type this version lacks."""
    if dtype not in STORAGE:
        raise DiluError(
            f"the artifact uses the element type {dtype!r}, which this version of dilu lacks",
            hint="update dilu, or compile the model again",
        )
    return STORAGE[dtype]
