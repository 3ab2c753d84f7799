"""Graph regions to kernel IR, and kernel IR to source and machine code per target."""
