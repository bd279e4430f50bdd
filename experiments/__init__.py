"""Programs behind the paper's tables and figures, for a clone of this project.

They are run from the root of the clone, as in `python -m experiments.geometry`,
and are no part of the installed package.
"""
