"""Lowerings of torch operators to dilu's ops, one family per file, and the table of all of them."""

from . import (
    activations,
    bits,
    elementwise,
    index,
    language,
    matmul,
    normalize,
    order,
    reduce,
    scan,
    scatter,
    special,
    trigonometry,
    views,
    windows,
)
from .context import TABLE, Context, Symbols, dtype_of

__all__ = [
    "TABLE",
    "Context",
    "Symbols",
    "activations",
    "bits",
    "dtype_of",
    "elementwise",
    "index",
    "language",
    "matmul",
    "normalize",
    "order",
    "reduce",
    "scan",
    "scatter",
    "special",
    "trigonometry",
    "views",
    "windows",
]
