"""Training N models side by side and merging them on device."""

import importlib
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
  from modelstock_jax.training.config import defaults as defaults
  from modelstock_jax.training.loop import Interrupted as Interrupted
  from modelstock_jax.training.loop import Result as Result
  from modelstock_jax.training.optimizer import from_optax as from_optax
  from modelstock_jax.training.optimizer import only as only
  from modelstock_jax.training.run import train as train
  from modelstock_jax.training.setup import Sources as Sources
  from modelstock_jax.training.task import Optimizer as Optimizer
  from modelstock_jax.training.task import Task as Task

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
__all__ = tuple(_MODULES)


def __getattr__(name: str) -> Any:
  # On first use: a module of this package needs only what it imports itself.
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_MODULES[name]}')
  return globals().setdefault(name, getattr(module, name))
