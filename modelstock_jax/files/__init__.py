"""Model Stock for checkpoints on disk, of any architecture, tensor by tensor.

Nothing here needs jax: weights are read through windows of the files, merged
in blocks by numpy, and written where they belong.
"""

from modelstock_jax.files.merge import Merge
from modelstock_jax.files.merge import inspect
from modelstock_jax.files.merge import merge
from modelstock_jax.files.mergekit import read_recipe
from modelstock_jax.files.methods import Method

__all__ = ['Merge', 'Method', 'inspect', 'merge', 'read_recipe']
