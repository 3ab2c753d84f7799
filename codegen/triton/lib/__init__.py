"""Kernels in Triton, pasted into one module per target; nothing here is imported."""
