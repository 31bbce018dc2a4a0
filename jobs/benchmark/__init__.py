"""Benchmarks of our parts and their peers, run by the command `benchmark`."""
