"""How far cells are from those that a model was trained on."""
