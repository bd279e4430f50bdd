"""Dozens of models with hyper-parameters of their own: what soups are made of.

Each model draws its hyper-parameters from the seed and its index alone. They
are trained `merge.num_models` at a time, in the stacked step of Model Stock
without its merge; a stack that has been trained leaves one file for each of its
models. A model that diverges costs the others nothing: it is kept, marked, and
left out of soups.

Source: the random search of Wortsman et al. Model soups. ICML 2022,
arXiv:2203.05482, appendix B.
"""

from collections.abc import Sequence
import functools
import json
import logging
import pathlib
import shutil
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from experiments.soups import members as members_lib
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.training import clip_task
from modelstock_jax.training import clock as clock_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import hosts
from modelstock_jax.training import loop
from modelstock_jax.training import memory
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import task as task_lib
from modelstock_jax.training import workdir as workdir_lib

_log = logging.getLogger(__name__)

Params = Any


def train(
  config: config_lib.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  setup: setup_lib.Setup | None = None,
) -> list[members_lib.Trained]:
  """Train the models of a grid and keep each in a file; resume if possible.

  Args:
    config: `grid` says what is drawn, `merge.num_models` how many models are
      trained at a time, the rest is common to all.
    workdir: takes config.json, grid.json and models/NNN.safetensors. A grid
      that was interrupted there is resumed.
    setup: what `clip_task.prepare(config)` gave, to share it.

  Returns:
    All members in the order of their indices.

  Raises:
    ValueError: if the workdir belongs to another config, or the numbers do
      not go together.
    loop.Interrupted: after SIGINT or SIGTERM, when everything is saved.
  """
  check(config)
  stop = hosts.StopRequest()
  together = config.merge.num_models
  with memory.explained(config.train, config.mesh, together), stop.listen():
    setup = setup or clip_task.prepare(config)
    members = members_lib.draw(config)
    _check_warmup(config, members, setup.steps_per_epoch)
    workdir = workdir_lib.claim(workdir, config.to_json())
    grid = _Grid(config, _compiled(config, setup), workdir)
    # Models that train equally long share a stack, and do not wait.
    members.sort(key=lambda member: (member.epochs, member.index))
    for start in range(0, len(members), together):
      chosen = members[start : start + together]
      title = f'models {start} to {start + together - 1} of {len(members)}'
      if not grid.has(chosen):
        grid.train(chosen, stop, title)
  return grid.trained()


def check(config: config_lib.ConfigDict) -> None:
  """Check the section `grid` of a config, and what it excludes.

  Raises:
    ValueError: names every value that does not fit.
  """
  grid, together = config.grid, config.merge.num_models
  problems = []
  for name in ('epochs', 'learning_rate', 'weight_decay'):
    bounds = tuple(grid[name])
    kinds = {type(bound) for bound in bounds} <= {int, float}
    if not (kinds and len(bounds) == 2 and 0 < bounds[0] <= bounds[1]):
      problems.append(
        f'grid.{name}: must be two numbers, 0 < least <= greatest, got '
        f'{bounds!r}.'
      )
  if not 0 <= grid.label_smoothing < 1:
    problems.append(
      f'grid.label_smoothing: must be from 0 to 1, got '
      f'{grid.label_smoothing!r}.'
    )
  for name, least in (
    ('num_models', 1),
    ('mixup', 0),
    ('randaugment_count', 0),
  ):
    if grid[name] < least:
      problems.append(
        f'grid.{name}: must be at least {least}, got {grid[name]}.'
      )
  if grid.num_models % together:
    problems.append(
      f'grid.num_models: {grid.num_models} models cannot be trained '
      f'merge.num_models={together} at a time; take a multiple.'
    )
  if grid.randaugment_count and config.data.cache:
    problems.append(
      'grid.randaugment_count: draws images anew each time, data.cache keeps '
      'them; turn one of them off.'
    )
  if config.hooks:
    problems.append(
      f'hooks: {list(config.hooks)} cannot go with a grid, whose models are '
      'fine-tuned as a whole by cross-entropy.'
    )
  if problems:
    raise ValueError('\n'.join(problems))


def _check_warmup(
  config: config_lib.ConfigDict,
  members: Sequence[members_lib.Member],
  per_epoch: int,
) -> None:
  steps = per_epoch * min(member.epochs for member in members)
  if config.train.warmup_steps >= steps:
    raise ValueError(
      f'train.warmup_steps: {config.train.warmup_steps} is not less than the '
      f'{steps} steps of the shortest run of the grid; lower it, or raise '
      'grid.epochs.'
    )


class _Grid:
  """A grid in its workdir."""

  def __init__(
    self,
    config: config_lib.ConfigDict,
    setup: setup_lib.Setup,
    workdir: pathlib.Path,
  ):
    self._config = config
    self._setup = setup
    self._workdir = workdir

  def trained(self) -> list[members_lib.Trained]:
    """Return the members that are done."""
    return (
      members_lib.read(self._workdir)
      if (self._workdir / members_lib.FILE).exists()
      else []
    )

  def has(self, members: Sequence[members_lib.Member]) -> bool:
    """Return True if a stack has been trained, on all processes."""

    def done() -> bool:
      trained = {each.member for each in self.trained()}
      return trained.issuperset(members)

    return hosts.run_on_process_0(done)

  def train(
    self,
    members: Sequence[members_lib.Member],
    stop: hosts.StopRequest,
    title: str,
  ) -> None:
    """Train a stack of models and keep each of them."""
    config, setup = self._config, self._setup
    folder = self._workdir / 'stacks' / f'{members[0].index:03d}'
    clock = clock_lib.of_config(config, setup.steps_per_epoch)._replace(
      total_steps=setup.steps_per_epoch * members[-1].epochs,
      merge_every='never',
    )
    hosts.run_on_process_0(lambda: folder.mkdir(parents=True, exist_ok=True))
    end = loop.advance(
      config,
      setup,
      clock,
      folder,
      stop,
      models=np.array([member.index for member in members], np.int32),
      num_models=config.grid.num_models,
      title=title,
      hyper=self._hyper(members),
    )
    self._keep(members, end.state.params)
    hosts.run_on_process_0(lambda: shutil.rmtree(folder))
    if stop.signal:
      raise loop.Interrupted(stop.signal, clock.total_steps, self._workdir)

  def _hyper(
    self, members: Sequence[members_lib.Member]
  ) -> dict[str, jax.Array]:
    """Hyper-parameters on the devices, float32[N] each."""

    def column(name: str) -> jax.Array:
      return jnp.array([getattr(m, name) for m in members], jnp.float32)

    grid = self._config.grid
    hyper = {
      'learning_rate': column('learning_rate'),
      'weight_decay': column('weight_decay'),
      'steps': column('epochs') * self._setup.steps_per_epoch,
    }
    for name in ('label_smoothing', 'mixup'):  # off in all where grid has 0
      if grid[name]:
        hyper[name] = column(name)
    return jax.device_put(hyper, self._setup.placement.stack)

  def _keep(self, members: Sequence[members_lib.Member], stack: Params) -> None:
    """Writes a file for each model, and then all of them into the list."""
    hosts.run_on_process_0(
      lambda: (self._workdir / members_lib.MODELS).mkdir(exist_ok=True),
    )
    setup = self._setup
    finite = np.asarray(_finite(stack, setup.placement.replicated))
    new = []
    for place, member in enumerate(members):
      model = _pick(stack, np.int32(place), setup.placement.replicated)
      scores = setup.evaluate.validate(
        model, {}, setup.sources.validation, setup.sources.read_validation
      )
      path = f'{members_lib.MODELS}/{member.index:03d}.safetensors'
      self._save(model, path, member)
      new.append(
        members_lib.Trained(
          member,
          'finished' if finite[place] else 'diverged',
          scores['accuracy'] if finite[place] else None,
          path,
        )
      )
      if not finite[place]:
        _log.warning('Model %d has diverged: %s.', member.index, member)

    def write() -> None:
      all_of_them = {
        each.member.index: each for each in [*self.trained(), *new]
      }
      lines = [
        {**each.member._asdict(), **each._asdict()}
        for _, each in sorted(all_of_them.items())
      ]
      for line in lines:
        del line['member']
      path = self._workdir / members_lib.FILE
      temporary = path.with_suffix('.tmp')
      text = json.dumps(
        {'num_models': self._config.grid.num_models, 'models': lines}, indent=1
      )
      temporary.write_text(text, encoding='utf-8')
      temporary.replace(path)

    hosts.run_on_process_0(write)

  def _save(self, model: Params, path: str, member: members_lib.Member) -> None:
    here = jax.device_get(model)  # every process has all of it
    about = {name: str(value) for name, value in member._asdict().items()}
    hosts.run_on_process_0(
      lambda: clip.save_safetensors(here, self._workdir / path, about),
    )


def _augmentation(config: config_lib.ConfigDict, index: int) -> dict[str, Any]:
  """RandAugment of a model of the grid."""
  member = members_lib.draw_one(config, index)
  count = member.randaugment_count
  return {
    'randaugment_count': count,
    'randaugment_magnitude': member.randaugment_magnitude if count else 0.0,
  }


def _compiled(
  config: config_lib.ConfigDict, setup: setup_lib.Setup
) -> setup_lib.Setup:
  """The setup with programs whose hyper-parameters differ between models."""

  def schedule(step, hyper):
    return members_lib.warmup_cosine_at(
      step,
      peak=hyper['learning_rate'],
      warmup_steps=config.train.warmup_steps,
      total_steps=hyper['steps'],
    )

  programs = setup_lib.compile_programs(
    setup.task,
    optimizer(config.train.clip_norm),
    setup.placement,
    config.train,
    config.merge,
    steps_per_epoch=setup.steps_per_epoch,
    schedule=schedule,
    num_keys=config.grid.num_models,
  )
  sources = setup.sources._replace(read=_reads(config, setup))
  return setup._replace(programs=programs, sources=sources)


def _reads(config: config_lib.ConfigDict, setup: setup_lib.Setup) -> Any:
  """Return the reader of images: one for each model if it is drawn."""
  if not config.grid.randaugment_count:
    return setup.sources.read
  train: Any = setup.sources.train
  size = config.model.image.image_size
  return [
    data.image_reader(
      data.Augment(
        size,
        train.channels,
        **{**dict(config.augment), **_augmentation(config, index)},
      )
    )
    for index in range(config.grid.num_models)
  ]


def optimizer(clip_norm: float) -> task_lib.Optimizer:
  """Return AdamW with the weight decay of each model, `hyper['weight_decay']`.

  Args:
    clip_norm: the largest global norm of a gradient; 0 does not clip.
  """

  def adamw(weight_decay):
    return optimizer_lib.from_optax(
      optimizer_lib.adamw(weight_decay=weight_decay, clip_norm=clip_norm)
    )

  def step(params, grads, opt_state, learning_rate, anchor, hyper):
    return adamw(hyper['weight_decay']).step(
      params, grads, opt_state, learning_rate, anchor, hyper
    )

  return task_lib.Optimizer(adamw(0.0).init, step)


@functools.partial(jax.jit, static_argnums=2)
def _pick(
  stack: Params, place: np.ndarray, where: jax.sharding.Sharding
) -> Params:
  """One model of a stack, replicated."""
  model = jax.tree.map(lambda x: x[place], stack)
  return jax.lax.with_sharding_constraint(model, where)


@functools.partial(jax.jit, static_argnums=1)
def _finite(stack: Params, where: jax.sharding.Sharding) -> jax.Array:
  """bool[N], True for models whose weights are all finite."""
  leaves = [
    jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
    for leaf in jax.tree.leaves(stack)
  ]
  finite = functools.reduce(jnp.logical_and, leaves)
  return jax.lax.with_sharding_constraint(finite, where)
