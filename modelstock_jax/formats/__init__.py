"""Checkpoints as named tensors, whatever their format. Nothing here needs jax.

`detect` says which format lies at a path; each format has one module that
reads it, and writes it where this library does.
"""
