"""Gene attributions of many cells, and checks of whether to believe them."""
