"""What an artifact is on disk: its manifest, its files, the weights it refers to."""
