"""A training run: its cells, its start, its workers and what it leaves."""
