"""Models of transformers, captured as functions of ragged batches of tokens."""
