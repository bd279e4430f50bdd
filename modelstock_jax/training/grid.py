"""Dozens of models with hyper-parameters of their own: what soups are made of.

Each model draws its hyper-parameters from the seed and its index alone. They
are trained `merge.num_models` at a time, in the stacked step of Model Stock
without its merge; a stack that has been trained leaves one file for each of its
models. A model that diverges costs the others nothing: it is kept, marked, and
left out of soups.

Source: the random search of Wortsman et al. Model soups. ICML 2022,
arXiv:2203.05482, appendix B.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import hosts
from modelstock_jax.training import loop
from modelstock_jax.training import metrics as metrics_lib
from modelstock_jax.training import optimizer
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import step as step_lib
from modelstock_jax.training import watch as watch_lib

_log = logging.getLogger(__name__)

FILE = 'grid.json'
MODELS = 'models'

Params = Any


class Member(NamedTuple):
  """A model of a grid, and what sets it apart."""

  index: int
  epochs: int
  learning_rate: float  # peak
  weight_decay: float
  label_smoothing: float
  mixup: float
  randaugment_count: int
  randaugment_magnitude: float


class Trained(NamedTuple):
  """What has become of a member.

  Attributes:
    member: which one.
    status: 'finished', or 'diverged' if its weights are not all finite.
    validation: accuracy on the validation split, 0..1; None if diverged.
    file: of its weights, in the workdir.
  """

  member: Member
  status: str
  validation: float | None
  file: str


class Hyper(NamedTuple):
  """Hyper-parameters on the devices, one for each model of a stack."""

  learning_rate: jax.Array  # float32[N]
  weight_decay: jax.Array  # float32[N]
  steps: jax.Array  # float32[N]  of the whole run of a model
  label_smoothing: jax.Array | None  # float32[N]; None if off in all grids
  mixup: jax.Array | None  # likewise


def draw(config: config_lib.ConfigDict) -> list[Member]:
  """The members of a grid: the same whatever their number is.

  Learning rate and weight decay are drawn on a log scale between the bounds of
  `config.grid`, epochs uniformly; label smoothing, mixup and RandAugment are
  off in every second model on average, and else drawn up to their greatest
  values.

  Args:
    config: `grid` and `seed` matter.

  Returns:
    `grid.num_models` members.

  >>> from modelstock_jax.training import config
  >>> members = draw(config.defaults())
  >>> len(members), 1e-6 <= members[0].learning_rate <= 1e-4
  (48, True)
  """
  return [_draw(config, index) for index in range(config.grid.num_models)]


def _draw(config: config_lib.ConfigDict, index: int) -> Member:
  grid = config.grid
  rng = np.random.default_rng((config.seed, index, 0x6D1D))

  def log_uniform(bounds: Sequence[float]) -> float:
    low, high = map(float, bounds)
    share = rng.random()
    return low if low == high else float(low * (high / low) ** share)

  def sometimes(greatest: float) -> float:
    on, share = rng.random() < 0.5, rng.random()
    return float(greatest * share) if on else 0.0

  return Member(
    index=index,
    epochs=int(rng.integers(grid.epochs[0], grid.epochs[1] + 1)),
    learning_rate=log_uniform(grid.learning_rate),
    weight_decay=log_uniform(grid.weight_decay),
    label_smoothing=sometimes(grid.label_smoothing),
    mixup=sometimes(grid.mixup),
    randaugment_count=int(rng.integers(0, grid.randaugment_count + 1)),
    randaugment_magnitude=float(rng.random() * grid.randaugment_magnitude),
  )


def train(
  config: config_lib.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  setup: loop.Setup | None = None,
) -> list[Trained]:
  """Trains the models of a grid, and keeps each in a file; resumes if it can.

  Args:
    config: `grid` says what is drawn, `merge.num_models` how many models are
      trained at a time, the rest is common to all.
    workdir: takes config.json, grid.json and models/NNN.safetensors. A grid
      that was interrupted there goes on.
    setup: what `loop.prepare(config)` gave, to share it.

  Returns:
    All members in the order of their indices.

  Raises:
    ValueError: if the workdir belongs to another config, or the numbers do
      not go together.
    loop.Interrupted: after SIGINT or SIGTERM, when everything is saved.
  """
  _check(config)
  with contextlib.ExitStack() as stack:
    watch = watch_lib.Watch(
      config.log.heartbeat_seconds, together=(loop.Interrupted,)
    )
    stack.enter_context(watch)
    stack.enter_context(watch_lib.Signals(watch))
    setup = setup or loop.prepare(config)
    members = draw(config)
    _check_warmup(config, members, setup.steps_per_epoch)
    workdir = loop.claim(workdir, config)
    grid = _Grid(config, setup, workdir)
    # Models that train equally long share a stack, and do not wait.
    members.sort(key=lambda member: (member.epochs, member.index))
    stacks = list(_batched(members, config.merge.num_models))
    for number, chosen in enumerate(stacks):
      title = f'models {number * len(chosen)} to '
      title += f'{(number + 1) * len(chosen) - 1} of {len(members)}'
      if not grid.has(chosen):
        grid.train(chosen, watch, title)
  return grid.trained()


def read(workdir: str | pathlib.Path) -> list[Trained]:
  """What has become of the members of a grid so far, by index.

  Raises:
    FileNotFoundError: there is no grid in the workdir.
    ValueError: its grid.json cannot be read.
  """
  path = pathlib.Path(workdir).expanduser() / FILE
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: there is no such file; is this the workdir of a grid, and has '
      'one of its stacks been trained?'
    )
  try:
    found = json.loads(path.read_text(encoding='utf-8'))['models']
    trained = [
      Trained(
        Member(**{name: line[name] for name in Member._fields}),
        line['status'],
        line['validation'],
        line['file'],
      )
      for line in found
    ]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path}: is not the list of a grid ({error!r}). Delete it and run the '
      'grid again.'
    ) from error
  return sorted(trained, key=lambda each: each.member.index)


def load(workdir: str | pathlib.Path, trained: Trained, like: Params) -> Params:
  """The weights of one model of a grid, placed as the leaves of `like`."""
  return clip.load_safetensors(
    pathlib.Path(workdir).expanduser() / trained.file, like
  )


def _check(config: config_lib.ConfigDict) -> None:
  number, together = config.grid.num_models, config.merge.num_models
  if number % together:
    raise ValueError(
      f'grid.num_models: {number} models cannot be trained merge.num_models='
      f'{together} at a time; take a multiple.'
    )
  plain = {'trainable': 'all', 'loss': 'cross_entropy', 'context_weight': 0.0}
  plain['projection'] = 'none'
  for name, value in plain.items():
    if config.train[name] != value:
      raise ValueError(
        f'train.{name}: {config.train[name]!r} cannot go with a grid, whose '
        f'models are fine-tuned as a whole by cross-entropy; set it to '
        f'{value!r}.'
      )
  if config.grid.randaugment_count and config.data.cache:
    raise ValueError(
      'grid.randaugment_count: draws images anew each time, data.cache keeps '
      'them; turn one of them off.'
    )


def _check_warmup(
  config: config_lib.ConfigDict, members: Sequence[Member], per_epoch: int
) -> None:
  steps = per_epoch * min(member.epochs for member in members)
  if config.train.warmup_steps >= steps:
    raise ValueError(
      f'train.warmup_steps: {config.train.warmup_steps} is not less than the '
      f'{steps} steps of the shortest run of the grid; lower it, or raise '
      'grid.epochs.'
    )


def _batched(members: list[Member], size: int) -> Iterator[list[Member]]:
  for start in range(0, len(members), size):
    yield members[start : start + size]


class _Programs(NamedTuple):
  """Compiled once for all stacks."""

  create: Any  # anchor, seed, indices -> state
  train: Any  # hyper, state, batch -> state, metrics
  model: Any  # stack, i -> params of model i
  finite: Any  # stack -> bool[N]


class _Grid:
  """A grid in its workdir."""

  def __init__(
    self,
    config: config_lib.ConfigDict,
    setup: loop.Setup,
    workdir: pathlib.Path,
  ):
    self._config = config
    self._setup = setup
    self._workdir = workdir
    self._programs = _compile(config, setup)
    self._validation = data.Benchmark(
      'validation', config.data.dataset, config.data.validation
    )

  def trained(self) -> list[Trained]:
    """The members that are done."""
    return read(self._workdir) if (self._workdir / FILE).exists() else []

  def has(self, members: Sequence[Member]) -> bool:
    """Whether a stack has been trained, on all processes."""

    def found() -> bool:
      done = {each.member for each in self.trained()}
      return done.issuperset(members)

    return hosts.first('the list of trained models', found)

  def train(
    self, members: Sequence[Member], watch: watch_lib.Watch, title: str
  ) -> None:
    """Trains a stack of models and keeps each of them."""
    folder = self._workdir / 'stacks' / f'{members[0].index:03d}'
    with checkpoints_lib.Checkpoints(
      folder / loop.CHECKPOINTS, config=config_lib.to_dict(self._config)
    ) as checkpoints:
      watch.checkpoints = folder / loop.CHECKPOINTS
      state = self._restore(members, checkpoints)
      state = self._steps(members, state, checkpoints, folder, watch, title)
      checkpoints.wait()
    self._keep(members, state.params)
    hosts.first('tidying up', lambda: shutil.rmtree(folder))
    if watch.asked:
      raise loop.Interrupted(watch.asked, int(state.step), self._workdir)

  def _restore(
    self, members: Sequence[Member], checkpoints: checkpoints_lib.Checkpoints
  ) -> state_lib.StockState:
    create = functools.partial(
      self._programs.create,
      self._setup.anchor,
      np.uint32(self._config.seed),
      np.array([member.index for member in members]),
    )
    shape = jax.eval_shape(create)
    where = checkpoints_lib.Checkpoint(
      self._setup.placement.state(shape), None, None
    )
    like = checkpoints_lib.Checkpoint(shape, None, None)
    found = checkpoints.restore(checkpoints_lib.abstract(like, where))
    if found is None:
      return create()
    _log.info('Going on from step %d.', int(found.state.step))
    return found.state

  def _steps(
    self,
    members: Sequence[Member],
    state: state_lib.StockState,
    checkpoints: checkpoints_lib.Checkpoints,
    folder: pathlib.Path,
    watch: watch_lib.Watch,
    title: str,
  ) -> state_lib.StockState:
    config, setup = self._config, self._setup
    start = int(state.step)
    total = setup.steps_per_epoch * members[-1].epochs
    if start == total:
      return state
    hyper = self._hyper(members)
    batches = self._read(members, start)
    with (
      metrics_lib.Writer(folder, start=start) as writer,
      metrics_lib.progress(total, start=start, title=title) as bar,
    ):
      log = metrics_lib.StepLog(
        writer,
        bar,
        start=start,
        every=config.log.every_steps,
        images=len(members) * config.train.batch_size,
        stop=False,  # one that diverges costs the others nothing
      )
      try:
        for step in range(start + 1, total + 1):
          batch = sharding.to_global(next(batches), setup.placement.batch)
          state, metrics = self._programs.train(hyper, state, batch)
          stop = watch.reached(step)
          log.add(step, metrics)
          if self._saves_at(step) or stop or step == total:
            log.check()
            writer.flush()
            checkpoints.save(
              step, checkpoints_lib.Checkpoint(state, None, None)
            )
          if stop and step < total:
            checkpoints.wait()
            raise loop.Interrupted(stop, step, self._workdir)
      finally:
        batches.close()
    return state

  def _saves_at(self, step: int) -> bool:
    settings = self._config.checkpoint
    epoch, rest = divmod(step, self._setup.steps_per_epoch)
    if not rest and epoch % settings.every_merges == 0:
      return True
    return bool(settings.every_steps) and step % settings.every_steps == 0

  def _hyper(self, members: Sequence[Member]) -> Hyper:
    def column(name: str) -> jax.Array:
      return jnp.array([getattr(m, name) for m in members], jnp.float32)

    grid = self._config.grid
    hyper = Hyper(
      learning_rate=column('learning_rate'),
      weight_decay=column('weight_decay'),
      steps=column('epochs') * self._setup.steps_per_epoch,
      label_smoothing=column('label_smoothing')
      if grid.label_smoothing
      else None,
      mixup=column('mixup') if grid.mixup else None,
    )
    return jax.device_put(hyper, self._setup.placement.stack)

  def _read(self, members: Sequence[Member], start: int) -> data.Batches:
    config, setup = self._config, self._setup
    local, rows = sharding.local_models_and_rows(
      setup.placement, len(members), config.train.batch_size
    )
    transforms = [
      data.Augment(
        config.model.image.image_size,
        setup.source.channels,
        **{**dict(config.augment.items()), **_augmentation(config, index)},
      )
      for index in range(config.grid.num_models)
    ]
    reads = [data.image_reader(transform) for transform in transforms]
    random = any(transform.random for transform in transforms)
    return data.train_batches(
      setup.source,
      num_models=config.grid.num_models,
      batch_size=config.train.batch_size,
      seed=config.seed,
      start=start,
      read=reads if random else reads[0],
      cache=config.data.cache,
      models=[members[place].index for place in local],
      rows=rows,
      max_bad_examples=config.data.max_bad_images,
    )

  def _keep(self, members: Sequence[Member], stack: Params) -> None:
    """Writes a file for each model, and then all of them into the list."""
    hosts.first(
      'the folder of models',
      lambda: (self._workdir / MODELS).mkdir(exist_ok=True),
    )
    finite = np.asarray(self._programs.finite(stack))
    new = []
    for place, member in enumerate(members):
      model = self._programs.model(stack, np.int32(place))
      [score] = self._setup.evaluate([model], self._validation)
      path = f'{MODELS}/{member.index:03d}.safetensors'
      self._save(model, path, member)
      new.append(
        Trained(
          member,
          'finished' if finite[place] else 'diverged',
          score.accuracy if finite[place] else None,
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
      path = self._workdir / FILE
      temporary = path.with_suffix('.tmp')
      text = json.dumps(
        {'num_models': self._config.grid.num_models, 'models': lines}, indent=1
      )
      temporary.write_text(text, encoding='utf-8')
      os.replace(temporary, path)

    hosts.first('the list of trained models', write)

  def _save(self, model: Params, path: str, member: Member) -> None:
    # Replicated: every process has all of it.
    here = jax.device_get(
      jax.device_put(model, self._setup.placement.replicated)
    )
    about = {name: str(value) for name, value in member._asdict().items()}
    hosts.first(
      f'writing model {member.index}',
      lambda: clip.save_safetensors(here, self._workdir / path, about),
    )


def _augmentation(config: config_lib.ConfigDict, index: int) -> dict[str, Any]:
  """RandAugment of a model, where the grid draws it."""
  if not config.grid.randaugment_count:
    return {}
  member = _draw(config, index)
  return {
    'randaugment_count': member.randaugment_count,
    'randaugment_magnitude': member.randaugment_magnitude
    if member.randaugment_count
    else 0.0,
  }


def _compile(config: config_lib.ConfigDict, setup: loop.Setup) -> _Programs:
  recipe = loop.make_recipe(
    config,
    num_classes=len(setup.source.class_names),
    steps_per_epoch=setup.steps_per_epoch,
  )
  placement = setup.placement
  num_models = config.merge.num_models
  create = functools.partial(
    _create, tx=recipe.tx, in_all=config.grid.num_models
  )
  shapes = jax.eval_shape(
    create, setup.anchor, np.uint32(0), np.arange(num_models)
  )
  state: Any = placement.state(shapes)
  own: Any = placement.stack
  return _Programs(
    create=jax.jit(create, out_shardings=state),
    train=jax.jit(
      functools.partial(_train_step, recipe, config.train, placement),
      in_shardings=(own, state, placement.batch),
      out_shardings=(state, own),
      donate_argnums=1,
    ),
    model=jax.jit(
      lambda stack, i: jax.tree.map(lambda x: x[i], stack),
      in_shardings=(state.params, None),
      out_shardings=placement.params(setup.anchor),
    ),
    finite=jax.jit(
      _finite, in_shardings=(state.params,), out_shardings=placement.replicated
    ),
  )


def _create(
  anchor: Params,
  seed: jax.Array,
  indices: jax.Array,
  *,
  tx: optax.GradientTransformation,
  in_all: int,
) -> state_lib.StockState:
  """Some of the models of a grid: each as it is in any other stack."""
  params = state_lib.replicate(anchor, len(indices))
  return state_lib.StockState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=jax.vmap(tx.init)(params),
    key=jax.random.split(jax.random.key(seed), in_all)[indices],
  )


def _train_step(
  recipe: step_lib.Recipe,
  settings: Any,
  placement: sharding.Placement,
  hyper: Hyper,
  state: state_lib.StockState,
  batch: step_lib.Batch,
) -> tuple[state_lib.StockState, step_lib.Metrics]:
  """`step.train_step`, each model with hyper-parameters of its own."""

  def one(hyper, *model):
    own = recipe._replace(
      tx=optimizer.adamw(
        weight_decay=hyper.weight_decay, clip_norm=settings.clip_norm
      ),
      label_smoothing=hyper.label_smoothing
      if hyper.label_smoothing is not None
      else 0.0,
      mixup=hyper.mixup if hyper.mixup is not None else 0.0,
    )
    learning_rate = optimizer.warmup_cosine_at(
      state.step,
      peak=hyper.learning_rate,
      warmup_steps=settings.warmup_steps,
      total_steps=hyper.steps,
    )
    found = step_lib.advance(own, placement, learning_rate, state.step, *model)
    return *found, learning_rate

  stack = (hyper, state.params, state.opt_state, state.key)
  stack += (batch['image'], batch['label'])
  found = step_lib.over_stack(recipe, one, stack)
  params, opt_state, *metrics = found
  state = state_lib.StockState(state.step + 1, params, opt_state, state.key)
  return state, step_lib.Metrics(*metrics)


def _finite(stack: Params) -> jax.Array:
  """bool[N]: whether all weights of a model are finite."""
  found = [
    jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
    for leaf in jax.tree.leaves(stack)
  ]
  return functools.reduce(jnp.logical_and, found)
