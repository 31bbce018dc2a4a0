"""Checks of an installation or a cluster."""
