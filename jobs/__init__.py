"""The commands: `python -m jobs.NAME`, or `screformer NAME` after installation."""
