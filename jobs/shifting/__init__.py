"""Distance between new cells and a model's training cells."""
