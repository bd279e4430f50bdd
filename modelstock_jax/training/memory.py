"""Advice where the memory of the devices does not suffice."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import re

import jax

from modelstock_jax.training import config_keys

# Elements from which on it pays to split a leaf over devices.
FSDP_MIN_SIZE = 2**16


@contextlib.contextmanager
def explained(
  train: config_keys.Train, mesh: config_keys.Mesh, num_models: int
) -> Iterator[None]:
  """Raise a MemoryError with advice where the devices have too little memory.

  Args:
    train: of the config of a run.
    mesh: likewise.
    num_models: that are trained.

  Raises:
    MemoryError: if the devices have too little; lists what needs less.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    failure = exhausted(error)
    if failure is None:
      raise
    advice = in_words(suggest(train, mesh, num_models, jax.device_count()))
    raise MemoryError(
      f'The devices have too little memory: {failure}\n{advice}'
    ) from error


def exhausted(error: BaseException) -> str | None:
  """Return XLA's line on memory that does not suffice; None of other errors.

  >>> exhausted(RuntimeError('RESOURCE_EXHAUSTED: Used 18G of 15.75G hbm.'))
  'Used 18G of 15.75G hbm.'
  >>> exhausted(RuntimeError('INTERNAL: a defect'))
  """
  _, found, text = str(error).partition('RESOURCE_EXHAUSTED: ')
  return ' '.join(text.split('\n\n')[0].split()) if found else None


def needed_bytes(failure: str) -> int | None:
  """Return the total that the compiler names in `exhausted`, if it does.

  >>> needed_bytes('Used 18.5G of 15.75G hbm. Exceeded by 2.75G.') / 2**30
  18.5
  """
  found = re.search(r'(?:Used |required for .*?\()([\d.]+)([KMG])', failure)
  if found is None:
    return None
  scale = {'K': 2**10, 'M': 2**20, 'G': 2**30}
  return round(float(found[1]) * scale[found[2]])


def suggest(
  train: config_keys.Train,
  mesh: config_keys.Mesh,
  num_models: int,
  devices: int,
) -> list[str]:
  """Return flags that need less memory of a device, the cheapest first.

  Args:
    train: of the config of a run that does not fit.
    mesh: likewise.
    num_models: that are trained.
    devices: number of devices.

  Returns:
    Flags as they are written on a command line; each is valid on its own.

  >>> suggest(config_keys.Train(), config_keys.Mesh(), 2, devices=8)[:2]
  ['--config.train.remat=block', '--config.mesh.stock=2']
  """
  size = train.batch_size
  data = devices // mesh.stock
  flags = []
  if train.remat != 'block':
    flags.append('--config.train.remat=block')
  apart = (
    devices // num_models * train.accumulate
  )  # with devices for each model
  together = mesh.stock == 1 and train.models != 'map'
  if together and not devices % num_models and not size % apart:
    flags.append(f'--config.mesh.stock={num_models}')
  if not mesh.fsdp_min_size and data > 1:
    flags.append(f'--config.mesh.fsdp_min_size={FSDP_MIN_SIZE}')
  more = range(2 * train.accumulate, size // data + 1)
  parts = next((k for k in more if not size % (data * k)), None)
  if parts:
    flags.append(f'--config.train.accumulate={parts}')
  if together:
    flags.append('--config.train.models=map')
  return flags


def in_words(flags: Sequence[str]) -> str:
  """Return the sentence that suggests flags, or what is left if none does."""
  if not flags:
    return 'It needs more devices, or a smaller train.batch_size.'
  return 'What needs less, one or several of:\n  ' + '\n  '.join(flags)
