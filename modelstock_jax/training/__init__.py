"""Training N models side by side and merging them on device."""

from etils import epy

# On first use: a module of this package imports only what it needs itself.
with epy.lazy_api_imports(globals()):
  from modelstock_jax.training.config import defaults
  from modelstock_jax.training.loop import Interrupted
  from modelstock_jax.training.loop import Result
  from modelstock_jax.training.optimizer import from_optax
  from modelstock_jax.training.optimizer import only
  from modelstock_jax.training.run import train
  from modelstock_jax.training.setup import Sources
  from modelstock_jax.training.task import MeanOfExamples
  from modelstock_jax.training.task import Optimizer
  from modelstock_jax.training.task import Task

__all__ = [
  'Interrupted',
  'MeanOfExamples',
  'Optimizer',
  'Result',
  'Sources',
  'Task',
  'defaults',
  'from_optax',
  'only',
  'train',
]
