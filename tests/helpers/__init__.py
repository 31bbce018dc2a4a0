"""Shared by several test files: servers, processes, cells, tiny models and a toy training."""
