"""The C target: emitter, instruction tables, micro-kernels, compiler driver."""
