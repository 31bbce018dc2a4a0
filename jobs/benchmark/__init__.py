"""Benchmarks next to peers, started by the command `benchmark`."""
