"""Memory for the arena: aligned, zero until touched, in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

_HUGE = 2 << 20


def zeros(nbytes: int) -> np.ndarray:
    """Return u8[nbytes], page-aligned. Pages that are never touched cost no memory."""
    block = mmap.mmap(-1, max(nbytes, 1))
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8, nbytes)
