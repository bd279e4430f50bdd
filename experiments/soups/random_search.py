"""Dozens of models with hyper-parameters of their own: what soups are made of.

Each model draws its hyper-parameters from the seed and its index alone. They
are trained `merge.num_models` at a time, in the stacked step of Model Stock
without its merge; a stack that has been trained leaves one file for each of its
models. A model that diverges costs the others nothing: it is kept, marked, and
left out of soups.

Source: the random search of Wortsman et al. Model soups. ICML 2022,
arXiv:2203.05482, appendix B. What it drew for its 71 models is in the file
hparam_info.json of its repository, with timm's strings for RandAugment, and on
the right what 4,000 draws of `members.Grid` give (`python -m
experiments.soups.members`). That every n is as likely is our choice: theirs are
so uneven once in 140 times (chi-squared 9.9 with 2 degrees of freedom).

                               theirs               ours
  learning rate, median        6.9e-6               9.7e-6
  weight decay, median         6.0e-3               6.6e-3
  no label smoothing           39 of 71, 55 %       50.4 %
  no mixup                     39 of 71, 55 %       50.9 %
  no RandAugment               27 of 71, 38 %       49.6 %
  of the others, n = 0, 1, 2   21, 18, 5 of 44      32.7, 33.0, 34.3 %
  m > 10, which is 10          21 of 44, 48 %       50.9 %

It is not published which crops and flips went with them. The section `augment`
of the config, `configs/model_soups_vit_b32.py:timm_aug` or another, has those.
"""

from collections.abc import Sequence
import functools
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
from modelstock_jax.training import auto
from modelstock_jax.training import clip_task
from modelstock_jax.training import clock as clock_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import hosts
from modelstock_jax.training import loop
from modelstock_jax.training import memory
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import task as task_lib
from modelstock_jax.training import validation
from modelstock_jax.training import workdir as workdir_lib

_log = logging.getLogger(__name__)

Params = Any
Members = Sequence[members_lib.Member]


def train(
  config: config_lib.Config,
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
  config = auto.resolve(config)
  stop = hosts.StopRequest()
  together = config.merge.num_models
  with memory.explained(config), stop.listen():
    setup = setup or clip_task.prepare(config)
    members = members_lib.draw(config)
    # Models that train equally long share a stack, and do not wait.
    members.sort(key=lambda member: (member.epochs, member.index))
    steps = setup.steps_per_epoch * members[0].epochs
    if config.train.warmup_steps >= steps:
      raise ValueError(
        f'train.warmup_steps: {config.train.warmup_steps} is not less than the '
        f'{steps} steps of the shortest run of the grid; lower it, or raise '
        'grid.epochs.'
      )
    with workdir_lib.claim(workdir, config.to_json()) as folder:
      setup = _compile(config, setup)
      done = hosts.run_on_process_0(
        lambda: [each.member.index for each in members_lib.read(folder)]
      )
      for start in range(0, len(members), together):
        stack = members[start : start + together]
        title = f'models {start} to {start + together - 1} of {len(members)}'
        if stack[0].index not in done:
          _train_stack(config, setup, folder, stack, stop, title)
      # With what a process has left that was killed when a stack was done.
      hosts.run_on_process_0(
        lambda: shutil.rmtree(folder / 'stacks', ignore_errors=True)
      )
  return members_lib.read(folder)


def check(config: config_lib.Config) -> None:
  """Check the section `grid` of a config, and what it excludes.

  Raises:
    ValueError: names every value that does not fit.
  """
  grid = validation.parse(members_lib.Grid, config.grid, 'grid.')
  problems = []
  if grid.num_models % config.merge.num_models:
    problems.append(
      f'grid.num_models: {grid.num_models} models cannot be trained '
      f'merge.num_models={config.merge.num_models} at a time; take a multiple.'
    )
  if grid.randaugment_count and config.data.cache:
    problems.append(
      'grid.randaugment_count: draws images anew each time, data.cache keeps '
      'them; turn one of them off.'
    )
  if config.train.warmup_share:
    problems.append(
      'train.warmup_share: must be 0 for a grid, whose runs differ in length, '
      f'got {config.train.warmup_share}; set train.warmup_steps.'
    )
  if config.hooks:
    problems.append(
      f'hooks: {list(config.hooks)} cannot go with a grid, whose models are '
      'fine-tuned in full by cross-entropy.'
    )
  if problems:
    raise ValueError('\n'.join(problems))


def _train_stack(
  config: config_lib.Config,
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  members: Members,
  stop: hosts.StopRequest,
  title: str,
) -> None:
  """Train a stack of models and keep each of them."""
  folder = workdir / 'stacks' / f'{members[0].index:03d}'
  clock = clock_lib.of_config(config, setup.steps_per_epoch)._replace(
    total_steps=setup.steps_per_epoch * members[-1].epochs,
    merge_every='never',
  )
  hosts.run_on_process_0(lambda: folder.mkdir(parents=True, exist_ok=True))
  columns = {
    name: jnp.array([getattr(m, name) for m in members], jnp.float32)
    for name in members_lib.Member._fields
  }
  hyper = {
    'learning_rate': columns['learning_rate'],
    'weight_decay': columns['weight_decay'],
    'steps': columns['epochs'] * setup.steps_per_epoch,
  }
  for name in ('label_smoothing', 'mixup'):  # off in all where the grid has 0
    if config.grid[name]:
      hyper[name] = columns[name]
  end = loop.advance(
    config,
    setup,
    clock,
    folder,
    stop,
    models=np.array([member.index for member in members], np.int32),
    num_models=config.grid.num_models,
    title=title,
    hyper=jax.device_put(hyper, setup.placement.stack),
  )
  new = _save_models(setup, workdir, members, end.state.params)

  def record() -> None:
    trained = [*members_lib.read(workdir), *new]
    members_lib.write(workdir, config.grid.num_models, trained)
    shutil.rmtree(folder)

  hosts.run_on_process_0(record)
  if stop.signal:
    raise loop.Interrupted(stop.signal, clock.total_steps, workdir)


def _save_models(
  setup: setup_lib.Setup, workdir: pathlib.Path, members: Members, stack: Params
) -> list[members_lib.Trained]:
  """Evaluate each model of a stack, and write it into a file."""
  folder = workdir / members_lib.MODELS
  hosts.run_on_process_0(lambda: folder.mkdir(exist_ok=True))
  trained = []
  for place, member in enumerate(members):
    model = _pick(stack, np.int32(place), setup.placement.replicated)
    scores = setup.evaluate.validate(
      model, {}, setup.sources.validation, setup.sources.read_validation
    )
    params = jax.device_get(model)  # every process has all of it
    path = f'{members_lib.MODELS}/{member.index:03d}.safetensors'
    about = {name: str(value) for name, value in member._asdict().items()}
    hosts.run_on_process_0(
      lambda p=params, f=workdir / path, m=about: clip.save_safetensors(p, f, m)
    )
    if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
      status, accuracy = 'finished', scores['accuracy']
    else:
      status, accuracy = 'diverged', None
      _log.warning('Model %d has diverged: %s.', member.index, member)
    trained.append(members_lib.Trained(member, status, accuracy, path))
  return trained


@functools.partial(jax.jit, static_argnums=2)
def _pick(
  stack: Params, place: np.ndarray, where: jax.sharding.Sharding
) -> Params:
  """Return one model of a stack, replicated."""
  model = jax.tree.map(lambda leaf: leaf[place], stack)
  return jax.lax.with_sharding_constraint(model, where)


def _compile(
  config: config_lib.Config, setup: setup_lib.Setup
) -> setup_lib.Setup:
  """Return a setup whose models each have hyper-parameters of their own."""
  programs = setup_lib.compile_programs(
    config,
    setup.task,
    optimizer(config.train.clip_norm),
    setup.placement,
    steps_per_epoch=setup.steps_per_epoch,
    schedule=functools.partial(
      warmup_cosine,
      warmup_steps=config.train.warmup_steps,
      from_zero=config.train.warmup_from_zero,
    ),
    num_keys=config.grid.num_models,
  )
  sources = setup.sources
  if config.grid.randaugment_count:
    readers = [_reader(config, sources, m) for m in members_lib.draw(config)]
    sources = sources._replace(read=readers)
  return setup._replace(programs=programs, sources=sources)


def _reader(
  config: config_lib.Config,
  sources: setup_lib.Sources,
  member: members_lib.Member,
) -> data.TrainRead:
  """Return the reader of a model's images, with its RandAugment."""
  train: Any = sources.train
  augment = members_lib.augment(config, member)
  size = config.model.network().vision.image_size
  return data.image_reader(augment.transform(size, train.channels))


def warmup_cosine(
  step: jax.Array,
  hyper: dict[str, jax.Array],
  *,
  warmup_steps: int,
  from_zero: bool = True,
) -> jax.Array:
  """Return `optimizer.warmup_cosine` where each model has its peak and length.

  Args:
    step: int32[].
    hyper: 'learning_rate' float32[...], the peak after the warm-up, and 'steps'
      float32[...], the length of the run; from there on it is 0.
    warmup_steps: length of the warm-up, in optimizer steps.
    from_zero: see `optimizer.warmup_cosine`.

  Returns:
    float32[...], the learning rate.
  """
  peak, total_steps = hyper['learning_rate'], hyper['steps']
  now = jnp.asarray(step, jnp.float32)
  share = (now - warmup_steps) / (total_steps - warmup_steps)
  decay = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
  decay = jnp.where(share < 1, decay, 0)  # exactly, whatever cos(pi) is
  offset = 0.0 if from_zero else 1.0
  warmup = (now + offset) / max(warmup_steps, 1)
  return peak * jnp.where(now < warmup_steps, warmup, decay)


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
