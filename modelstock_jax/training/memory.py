"""Advice for runs that exceed the memory of the devices."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import re

import jax

from modelstock_jax.training import config as config_lib

# Elements from which on it pays to split a leaf over devices.
FSDP_MIN_SIZE = 2**16


@contextlib.contextmanager
def explained(config: config_lib.Config) -> Iterator[None]:
  """Raise a MemoryError with advice where the devices have too little memory.

  Args:
    config: of the run.

  Raises:
    MemoryError: if the devices have too little; lists what needs less.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    failure = exhausted(error)
    if failure is None:
      raise
    advice = in_words(suggest(config, jax.device_count()))
    raise MemoryError(
      f'The devices have too little memory: {failure}\n{advice}'
    ) from error


def exhausted(error: BaseException) -> str | None:
  """Return XLA's line on memory that does not suffice; None of other errors.

  >>> exhausted(RuntimeError('RESOURCE_EXHAUSTED: Used 18G of 15.75G hbm.'))
  'Used 18G of 15.75G hbm.'
  >>> exhausted(RuntimeError('INTERNAL: a defect'))
  """
  _, code, text = str(error).partition('RESOURCE_EXHAUSTED: ')
  return ' '.join(text.split('\n\n')[0].split()) if code else None


def needed_bytes(failure: str) -> int | None:
  """Return the total that the compiler names in `exhausted`, if it does.

  >>> needed_bytes('Used 18.5G of 15.75G hbm. Exceeded by 2.75G.') / 2**30
  18.5
  """
  total = re.search(r'(?:Used |required for .*?\()([\d.]+)([KMG])', failure)
  if total is None:
    return None
  return round(float(total[1]) * 2 ** (10 + 10 * 'KMG'.index(total[2])))


def suggest(config: config_lib.Config, devices: int) -> list[str]:
  """Return flags that need less memory of a device, the cheapest first.

  Args:
    config: of a run that does not fit.
    devices: number of devices.

  Returns:
    Flags as they are written on a command line; each is valid on its own.

  >>> suggest(config_lib.Config(), devices=8)[:2]
  ['--config.train.remat=block', '--config.mesh.stock=2']
  """
  # If nobody has resolved it.
  mesh = config.mesh.settle(stock=1, fsdp_min_size=0)
  train, num_models = config.train, config.merge.num_models
  size = train.batch_size
  data = devices // mesh.stock
  flags = []
  if train.remat != 'block':
    flags.append('--config.train.remat=block')
  parts_apart = devices // num_models * train.accumulate  # if stock were N
  together = mesh.stock == 1 and train.models == 'vmap'
  if together and not devices % num_models and not size % parts_apart:
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
  """Return the sentence that suggests flags, or another remedy without any."""
  if not flags:
    return 'Use more devices, or a smaller train.batch_size.'
  return 'Use one or several of these flags:\n  ' + '\n  '.join(flags)
