"""Training N models side by side and merging them on device."""

import importlib
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
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

# The modules that define the names, searched in this order.
_MODULES = ('config', 'task', 'optimizer', 'setup', 'run', 'loop')


def __getattr__(name: str) -> Any:
  # On first use: a module of this package imports only what it needs itself.
  if name in __all__:
    for module in _MODULES:
      loaded = importlib.import_module(f'{__name__}.{module}')
      if hasattr(loaded, name):
        return globals().setdefault(name, getattr(loaded, name))
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
