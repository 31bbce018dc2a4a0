"""Measurements beside the peers: `python -m jobs.benchmark NAME`."""
