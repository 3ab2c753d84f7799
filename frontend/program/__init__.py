"""Modules and exported programs: captured by torch.export and imported into the IR."""
