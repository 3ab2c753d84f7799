"""The GPU runtime: a device's driver, memory on it, and the programs that run there."""
