"""Differences between two configs, and those that a run may have.

Apart from `config`, so that checkpoints need nothing that reads data.
"""

from typing import Any

from flax import traverse_util

from modelstock_jax.formats import text as text_lib

# Keys, or the beginnings of keys, of the settings that a run may change.
EXECUTION = (
  'anchor.allow_pickle:',
  'mesh.',
  'train.accumulate:',
  'train.sum_gradients:',
  'train.remat:',
  'train.models:',
  'data.cache:',
  'data.data_dir:',
  'evaluate.batch_size:',
  'checkpoint.',
  'log.',
  'hosts.',
)


def differences(left: Any, right: Any) -> list[str]:
  """Return lines 'train.epochs: 3 -> 5' where configs or their JSON differ."""
  old, new = flatten(left), flatten(right)
  return [
    f'{text_lib.plain(key)}: {text_lib.shown(old.get(key, "absent"))} -> '
    f'{text_lib.shown(new.get(key, "absent"))}'
    for key in sorted({*old, *new})
    if key not in old or key not in new or old[key] != new[key]
  ]


def of_run(lines: list[str]) -> list[str]:
  """Return those of `differences` that make it another run.

  The others are of devices, memory, caches and reports, which change the result
  by no more than rounding.

  >>> of_run(['mesh.stock: 1 -> 2', 'seed: 0 -> 1'])
  ['seed: 0 -> 1']
  """
  return [line for line in lines if not line.startswith(EXECUTION)]


def flatten(values: Any) -> dict[str, Any]:
  """Return the values of a config by 'train.epochs'; tuples as in JSON."""
  if hasattr(values, 'to_dict'):
    values = values.to_dict()
  flat = traverse_util.flatten_dict({**values}, sep='.')
  return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}
