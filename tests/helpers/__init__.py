"""What several test files share: servers, processes, cells, tiny models and a toy training."""
