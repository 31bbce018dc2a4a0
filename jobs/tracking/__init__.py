"""Runs, registered models and aliases; all use of MLflow is in this package."""
