"""The version of dilu, which artifacts record."""

__version__ = "0.1.0"
