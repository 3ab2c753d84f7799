"""The graph IR: types, ops, graphs, their text, verifier and reference interpreter."""

from . import ops as ops  # declares every op, for whoever uses any part of the IR
