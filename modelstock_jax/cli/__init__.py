"""The `modelstock` command: one file for each sub-command."""
