"""The whole chain in one process: what the command `quickstart` runs."""
