"""Gene attributions of many cells, and checks of their reliability."""
