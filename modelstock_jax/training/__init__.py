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

# The module that defines each name.
_MODULES = {
  'Interrupted': 'loop',
  'Optimizer': 'task',
  'Result': 'loop',
  'Sources': 'setup',
  'Task': 'task',
  'defaults': 'config',
  'from_optax': 'optimizer',
  'only': 'optimizer',
  'train': 'run',
}


def __getattr__(name: str) -> Any:
  # On first use: a module of this package needs only what it imports itself.
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_MODULES[name]}')
  return globals().setdefault(name, getattr(module, name))
