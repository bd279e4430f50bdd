"""Runs, one file each: `get_config()`, and a docstring as the record."""
