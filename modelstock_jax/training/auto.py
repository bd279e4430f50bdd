"""The placement of a run where its config says 'auto'.

On one device, and where the memory of a device is not known, as on CPU, 'auto'
is what takes the least time there: all models on all devices, no FSDP, nothing
recomputed. Else each model gets devices of its own if that is possible, and of
`LEVELS` the first is taken that fits.
"""

from collections.abc import Sequence
import logging
import operator

import jax

from modelstock_jax.training import config as config_lib
from modelstock_jax.training import hosts
from modelstock_jax.training import memory
from modelstock_jax.training import sharding

_log = logging.getLogger(__name__)

# mesh.fsdp_min_size and train.remat, in the order of what they cost: FSDP sends
# about as much as data parallelism, recomputing takes a third more products.
_SPLIT = memory.FSDP_MIN_SIZE
LEVELS = ((0, 'none'), (_SPLIT, 'none'), (_SPLIT, 'block'))
# The share of the memory that an estimate may take. Programs whose memory the
# activations decide took 1.0 to 1.2 times theirs: experiments/tpu_plans.md.
SHARE = 0.8
# May be 'auto'; the last one has no effect on a batch that is not cut.
KEYS = (
  'mesh.stock',
  'mesh.fsdp_min_size',
  'train.remat',
  'train.sum_gradients',
)


def resolve(
  config: config_lib.Config | config_lib.ConfigDict,
) -> config_lib.Config:
  """Replace 'auto' in a config by what suits the devices, and log it.

  Every process calls it. What is set is kept, and so is a config without
  'auto': whatever depends on the placement of a run may call it first.

  Args:
    config: of a run on all devices.

  Returns:
    The config with numbers in `mesh` and a policy in `train.remat`.
  """
  config = config_lib.validate(config)
  if 'auto' not in settings(config).values():
    return config
  devices = jax.devices()
  config = choose(config, devices, hosts.run_on_process_0(_local_memory))
  values = ', '.join(f'{k}={v}' for k, v in settings(config).items())
  _log.info('Placement on %d device(s): %s.', len(devices), values)
  return config


def settings(config: config_lib.Config) -> dict[str, int | str]:
  """Return the keys of a config that may be 'auto', with their values."""
  keys = KEYS if config.train.accumulate > 1 else KEYS[:-1]
  return {key: operator.attrgetter(key)(config) for key in keys}


def choose(
  config: config_lib.Config,
  devices: Sequence[jax.Device],
  memory_bytes: int | None,
) -> config_lib.Config:
  """Return a config with the first of `LEVELS` that fits, or else the last.

  What is set is kept. If that is to recompute, FSDP is on as well: then no flag
  that saves memory makes another choice need more. Gradients are summed once a
  step if that fits as well.

  Args:
    config: of a run. Without the sizes of the network nothing is known of its
      memory, and the first level is taken.
    devices: of the run.
    memory_bytes: of each device; None if it is not known.
  """
  train, num_models = config.train, config.merge.num_models
  known = memory_bytes if len(devices) > 1 else None
  apart = known is not None and can_be_apart(config, devices)
  mesh = config.mesh.settle(stock=num_models if apart else 1)
  levels = [level for level in LEVELS if train.remat in ('auto', level[1])]

  def fits(config):
    needed = needed_bytes(config, len(devices))
    return known is None or needed is None or needed <= SHARE * known

  for fsdp_min_size, remat in levels or LEVELS[-1:]:
    # With one device for each model there is nothing to split over.
    size = fsdp_min_size if mesh.stock < len(devices) else 0
    parts = config.model_copy(
      update={
        'mesh': mesh.settle(fsdp_min_size=size),
        'train': train.settle(remat=remat, sum_gradients='parts'),
      }
    )
    if fits(parts):
      break
  train = train.settle(remat=remat, sum_gradients='once')
  once = parts.model_copy(update={'train': train})
  return once if fits(once) else parts


def can_be_apart(
  config: config_lib.Config, devices: Sequence[jax.Device]
) -> bool:
  """Return True if each model of a run can have devices of its own."""
  return config.train.models == 'vmap' and sharding.can_separate(
    devices, config.merge.num_models
  )


def needed_bytes(config: config_lib.Config, num_devices: int) -> int | None:
  """Estimate the memory that a run takes of each device.

  In a step a device holds the weights, two moments and the gradient of each of
  its models, 4 P bytes each for P params, and the anchor and the last merge; in
  a merge all N models and a new merge in place of the gradients. FSDP divides
  these by the devices of a model. The weights in the dtype of the products, s
  bytes each, are whole. A block of width W with H heads keeps for each image of
  T tokens

    s / 2 (34 T W + 5 H T^2)

  bytes for the backward pass (Korthikanti et al., arXiv:2205.05198, equation
  1), or its input s T W if it is recomputed, in which case one block at a time
  has them all; 'dots' keeps the 9 s T W of its products as well. To sum the
  gradients of a cut batch once, a device adds up a whole one, 4 P. A batch and
  the next one are in bytes.

  Args:
    config: of a run, without 'auto' in its settings.
    num_devices: of the run.

  Returns:
    Bytes of a device, without the code of programs; None if the config does not
    have the sizes of the network.
  """
  try:
    sizes = config.model.network().vision
  except ValueError:
    return None
  train, mesh, num_models = config.train, config.mesh, config.merge.num_models
  size = 4 if config.model.dtype == 'float32' else 2
  tokens, width, depth = sizes.tokens, sizes.width, sizes.depth
  params = width * (12 * depth * width + sizes.patch_size**2 * sizes.channels)

  models = max(1, num_models // mesh.stock)  # on a device
  trained = 1 if train.models == 'map' else models  # at a time
  data = max(1, num_devices // mesh.stock)
  whole = 4 * params
  part = whole // (data if mesh.fsdp_min_size else 1)
  merge = part * (3 * models + 3 + num_models)
  step = part * (3 * models + 2 + trained) + size * params * trained
  if train.accumulate > 1 and train.sum_gradients == 'once' and part < whole:
    step += whole * trained

  batches = 2 * -(-models * train.batch_size // data)  # in images
  step += batches * sizes.image_size**2 * sizes.channels

  features = size * tokens * width
  block = 17 * features + size * 5 * sizes.heads * tokens**2 // 2
  kept = {'none': block, 'dots': 10 * features, 'block': features}[train.remat]
  once = 0 if train.remat == 'none' else block
  images = -(-trained * train.batch_size // (data * train.accumulate))
  return max(merge, step + images * (depth * kept + once))


def _local_memory() -> int | None:
  """Return the bytes of a device that programs may use; None if not known."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
