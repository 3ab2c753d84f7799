"""The graph IR: types, graphs, ops, text form, verifier and reference interpreter."""
