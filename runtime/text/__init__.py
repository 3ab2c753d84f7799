"""What makes text: tokens, sequences and their pages of the cache, sampling, the token loop."""
