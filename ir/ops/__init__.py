"""The ops, one family per file. Importing this package declares all of them."""

from . import control, elementwise, index, language, matmul, quantize, reduce

__all__ = ["control", "elementwise", "index", "language", "matmul", "quantize", "reduce"]
