"""Artifacts out: the format, weight mapping, sessions and token generation."""
