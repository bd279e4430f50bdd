"""Compilation of runs ahead of time: memory, FLOPs, traffic on TPUs."""
