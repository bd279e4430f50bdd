"""TPGM: each layer back onto a ball, whose radius is learnt on validation data.

Command: `modelstock train --config=experiments/baselines/tpgm.py --workdir=...`
on handwritten digits, whose accuracy on the validation digits then says too
much. Everything else is that of `configs/digits.py`, its two models and their
merge included: TPGM itself is one of them, `--config.merge.num_models=1`.

After the last step of training, each layer (a leaf) has a radius r that starts
at half of the least norm of its rows. With the weights as they are, Adam lowers
the cross-entropy on validation images over the radii alone, of

  row of w~ = row of w0 + min(r / |row of d|_1, 1) row of d,   d = w - w0

and the model becomes w~. Rows, norms and what is free are as in `ftp`.

Source: Tian et al. Trainable projected gradient method for robust fine-tuning.
CVPR 2023, arXiv:2303.10720; for ViTs once, after training, in 200 steps of Adam
with rate 0.01, as in the authors' program. There rows inside of their ball are
stretched onto it; here they stay, as in the paper.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

import ftp
import jax
from jax import numpy as jnp
import optax
import recipes

from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import losses
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import step as step_lib

Params = Any

STEPS = 200


def get_config(name: str = 'digits') -> config_lib.ConfigDict:
  """Return the config of one run, on the data of a recipe."""
  config = recipes.get_config(name)
  with config.unlocked():
    config.tpgm = config_lib.section(exclude=('head',))
  return config


def start(anchor: Params, params: Params, exclude: tuple[str, ...]) -> Params:
  """Return the radii to begin with: half of the least norm of a layer's rows.

  >>> anchor, params = ({'kernel': jnp.full((1, 2), x)} for x in (0.0, 1.0))
  >>> print(start(anchor, params, ())['kernel'])
  0.5
  """

  def one(path, w0, w):
    return jnp.min(ftp.norms(merging.path_name(path), w - w0)) / 2

  return jax.tree.map_with_path(
    one, _bounded(anchor, exclude), _bounded(params, exclude)
  )


def project(anchor: Params, params: Params, radii: Params) -> Params:
  """Return the params on their balls; parts without a radius are free."""

  def one(path, w0, w, radius):
    moved = w - w0
    ratio = radius / ftp.norms(merging.path_name(path), moved)
    # At 1 as well, where the radius must be able to shrink again.
    return jnp.where(ratio <= 1, w0 + ratio * moved, w)

  bounded = {name: anchor[name] for name in radii}
  inside = jax.tree.map_with_path(
    one, bounded, {name: params[name] for name in radii}, radii
  )
  return {**params, **inside}


def learn(
  loss: Callable[[Params], jax.Array],
  anchor: Params,
  params: Params,
  radii: Params,
  opt_state: Any,
) -> tuple[Params, Any]:
  """Make one step of Adam on the radii.

  Args:
    loss: of params, on a batch of validation data.
    anchor: w0, leaves [...].
    params: w, which do not change.
    radii: leaves float32[].
    opt_state: of `adam()`.

  Returns:
    The radii, from 1e-8 to the greatest norm of a row, and opt_state.
  """
  grads = jax.grad(lambda r: loss(project(anchor, params, r)))(radii)
  with jax.numpy_dtype_promotion('standard'):
    updates, opt_state = adam().update(grads, opt_state)

  def one(path, w0, w, radius, update):
    greatest = jnp.max(ftp.norms(merging.path_name(path), w - w0))
    return jnp.clip(radius + update, ftp.LEAST, greatest)

  trees = tuple({name: x[name] for name in radii} for x in (anchor, params))
  radii = jax.tree.map_with_path(one, *trees, radii, updates)
  return radii, opt_state


def adam() -> optax.GradientTransformation:
  """Return the optimizer of the radii."""
  return optax.adam(ftp.RATE)


def get_finish(
  config: config_lib.ConfigDict, setup: setup_lib.Setup
) -> Callable[[state_lib.State], state_lib.State]:
  """Return what is done to the models after the last step of training.

  Args:
    config: of the run; batches of `data.validation` follow from its seed, and
      `tpgm.exclude` are the parts of the params that are free.
    setup: of the run.

  Returns:
    From the state after the last step to that with the models on their balls.
  """
  exclude = tuple(config.tpgm.exclude)
  validation: Any = setup.sources.validation
  size = config.model.image.image_size
  read = data.image_reader(data.Augment(size, validation.channels))
  placement, anchor = setup.placement, setup.anchor
  predict = setup.task.predict
  if predict is None:
    raise ValueError(
      'TPGM lowers the cross-entropy of classes, which a task without '
      '`predict` has none of.'
    )
  over = functools.partial(step_lib.over_stack, config.train.models)

  def begin(anchor, stack):
    def one(params):
      radii = start(anchor, params, exclude)
      return radii, adam().init(radii)

    return over(one, (stack,))

  def step(anchor, stack, learnt, batch):
    def one(params, radii, opt_state, batch):
      def loss(params):
        logits = predict(params, {}, batch)
        return losses.cross_entropy(logits, batch['label'])

      return learn(loss, anchor, params, radii, opt_state)

    return over(one, (stack, *learnt, batch))

  def end(anchor, stack, radii):
    return over(functools.partial(project, anchor), (stack, radii))

  begin, step = jax.jit(begin), jax.jit(step, donate_argnums=2)

  def finish(state: state_lib.State) -> state_lib.State:
    stack = state.params
    learnt = begin(anchor, stack)
    sources = setup_lib.Sources(validation, validation, read)
    reading = setup_lib.read_batches(
      config, sources, placement, range(config.merge.num_models)
    )
    with contextlib.closing(reading) as batches:
      for _ in range(STEPS):
        batch = sharding.to_global(next(batches), placement.batch)
        learnt = step(anchor, stack, learnt, batch)
    where = placement.stacked(stack)
    params = jax.jit(end, out_shardings=where)(anchor, stack, learnt[0])
    return state._replace(params=params)

  return finish


def _bounded(tree: Params, exclude: tuple[str, ...]) -> Params:
  return {name: part for name, part in tree.items() if name not in exclude}
