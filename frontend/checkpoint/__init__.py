"""The files of a checkpoint: which tensor each parameter is, and what its codes mean."""
