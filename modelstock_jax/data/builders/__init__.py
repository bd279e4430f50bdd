"""TFDS builders of the bundled data sets: writing needs TensorFlow.

Nothing on the reading side imports this package: `prepare.py` runs it once
and the ArrayRecord files it leaves are what `sources.py` reads.
"""
