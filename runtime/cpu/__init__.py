"""The CPU driver: memory, launch, synchronize."""
