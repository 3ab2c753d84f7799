"""Models in: capture, import and checkpoint references, up to a graph in the captured stage."""
