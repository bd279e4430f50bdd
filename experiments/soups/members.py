"""The models of a grid: what is drawn for each, and where its weights are.

Source: the random search of Wortsman et al. Model soups. ICML 2022,
arXiv:2203.05482, appendix B.
"""

from collections.abc import Sequence
import json
import pathlib
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax import clip
from modelstock_jax.training import config as config_lib

FILE = 'grid.json'
MODELS = 'models'

# The section `grid` of a config: bounds are those of Model Soups.
SECTION = dict(
  num_models=48,
  epochs=(4, 16),  # least and greatest
  learning_rate=(1e-6, 1e-4),  # likewise, on a log scale
  weight_decay=(8e-5, 0.53),  # likewise, on a log scale
  # Greatest values: half of the models have none.
  label_smoothing=0.25,
  mixup=0.9,
  randaugment_count=2,  # from 0; 0 leaves augment.* to all
  randaugment_magnitude=20.0,
)

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
  """The result of a member.

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

  >>> config = config_lib.defaults()
  >>> with config.unlocked():
  ...   config.grid = config_lib.section(**SECTION)
  >>> members = draw(config)
  >>> len(members), 1e-6 <= members[0].learning_rate <= 1e-4
  (48, True)
  """
  return [draw_one(config, index) for index in range(config.grid.num_models)]


def draw_one(config: config_lib.ConfigDict, index: int) -> Member:
  """Draw one member: see `draw`."""
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


def read(workdir: str | pathlib.Path) -> list[Trained]:
  """Read the results of the members of a grid so far, by index.

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


def warmup_cosine_at(
  step: jax.typing.ArrayLike,
  *,
  peak: jax.Array,
  warmup_steps: int,
  total_steps: jax.Array,
) -> jax.Array:
  """Return `optimizer.warmup_cosine` where each model has its peak and length.

  Args:
    step: int32[].
    peak: float32[...], the learning rate after the warm-up.
    warmup_steps: length of the warm-up, in optimizer steps.
    total_steps: float32[...], length of the whole run; from there on it is 0.

  Returns:
    float32[...], the learning rate.
  """
  now = jnp.asarray(step, jnp.float32)
  share = (now - warmup_steps) / (total_steps - warmup_steps)
  decay = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
  decay = jnp.where(share < 1, decay, 0)  # exactly, whatever cos(pi) is
  return peak * jnp.where(now < warmup_steps, now / max(warmup_steps, 1), decay)
