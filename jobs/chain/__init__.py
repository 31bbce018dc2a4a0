"""The whole chain in one process, as run by the command `quickstart`."""
