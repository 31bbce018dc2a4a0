"""The only door to MLflow: runs, registered models, aliases."""
