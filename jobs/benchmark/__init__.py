"""Benchmarks next to peers: `python -m jobs.benchmark NAME`."""
