"""The geometry of fine-tuned models: the paper's analyses and their figures.

`python -m experiments.geometry --workdir=WORKDIR` analyses models that are
there; `python -m experiments.geometry.study` trains those of the paper's
figures on digits first.
"""
