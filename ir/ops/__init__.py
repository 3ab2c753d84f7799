"""The ops, one family per file. Importing this package declares all of them."""

from . import bits, collective, control, elementwise, index, language, matmul, quantize, reduce

__all__ = [
    "bits",
    "collective",
    "control",
    "elementwise",
    "index",
    "language",
    "matmul",
    "quantize",
    "reduce",
]
