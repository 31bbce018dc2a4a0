"""Training runs: cells, starting point, workers and results."""
