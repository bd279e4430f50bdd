"""Training N models side by side and merging them on device."""

from modelstock_jax.training.config import defaults
from modelstock_jax.training.loop import Interrupted
from modelstock_jax.training.loop import Result
from modelstock_jax.training.optimizer import from_optax
from modelstock_jax.training.optimizer import only
from modelstock_jax.training.run import train
from modelstock_jax.training.setup import Sources
from modelstock_jax.training.task import Optimizer
from modelstock_jax.training.task import Task

__all__ = [
  'Interrupted',
  'Optimizer',
  'Result',
  'Sources',
  'Task',
  'defaults',
  'from_optax',
  'only',
  'train',
]
