"""The Triton target: emitter, kernel library, ahead-of-time compiler."""
