"""Merges of other papers, a file each."""
