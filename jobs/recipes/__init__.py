"""Complete, named configurations."""
