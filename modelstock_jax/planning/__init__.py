"""Compilation of runs for TPUs that are not there: memory, FLOPs, traffic."""
