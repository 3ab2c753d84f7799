"""Comparing sizes that are not known: what they are when every symbolic dimension is the same."""

from __future__ import annotations

from ..ir.types import Dim, Shape, evaluate, numel, symbols

NOMINAL = 512


def nominal(size: Dim, at: int = NOMINAL) -> int:
    """Return a size when every symbol in it stands for `at`."""
    return evaluate(size, dict.fromkeys(symbols([size]), at))


def nominal_numel(shape: Shape) -> int:
    """Return the number of elements of a shape, nominally."""
    return nominal(numel(shape))
