"""The ops, one family per file. Importing this package declares all of them."""

from . import collective, control, elementwise, index, language, matmul, quantize, reduce

__all__ = [
    "collective",
    "control",
    "elementwise",
    "index",
    "language",
    "matmul",
    "quantize",
    "reduce",
]
