"""The models of a grid: what is drawn for each, and where its weights are.

Source: the random search of Wortsman et al. Model soups. ICML 2022,
arXiv:2203.05482, appendix B.
"""

from collections.abc import Sequence
import json
import pathlib
from typing import Annotated
from typing import NamedTuple

import numpy as np
import pydantic

from modelstock_jax.formats import write as write_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys

FILE = 'grid.json'
MODELS = 'models'


def _check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
  if not 0 < bounds[0] <= bounds[1]:
    raise ValueError('must be 0 < least <= greatest')
  return bounds


_Bounds = pydantic.AfterValidator(_check_bounds)


class Grid(config_keys.Section):
  """The section `grid` of a config: bounds are those of Model Soups.

  Attributes:
    num_models: models of the grid
    epochs: least and greatest number
    learning_rate: least and greatest value, drawn on a log scale
    weight_decay: likewise
    label_smoothing: greatest value; half of the models have none
    mixup: likewise
    randaugment_count: greatest n of timm's RandAugment, as in 'm12-n1'; half of
      the models have none; 0 leaves augment.* to all models
    randaugment_magnitude: greatest m
  """

  num_models: config_keys.Positive = 48
  epochs: Annotated[tuple[int, int], _Bounds] = (4, 16)
  learning_rate: Annotated[tuple[float, float], _Bounds] = (1e-6, 1e-4)
  weight_decay: Annotated[tuple[float, float], _Bounds] = (8e-5, 0.53)
  label_smoothing: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.25
  mixup: config_keys.NotNegativeFloat = 0.9
  randaugment_count: config_keys.NotNegative = 2
  randaugment_magnitude: config_keys.Positive = 20


SECTION = Grid().model_dump()


class Member(NamedTuple):
  """A model of a grid, and what sets it apart."""

  index: int
  epochs: int
  learning_rate: float  # peak
  weight_decay: float
  label_smoothing: float
  mixup: float
  randaugment_count: int
  randaugment_magnitude: int  # 0 is no RandAugment


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


def draw(config: config_lib.Config) -> list[Member]:
  """Draw the members of a grid: the same whatever their number is.

  Learning rate and weight decay are drawn on a log scale between the bounds of
  `config.grid`, epochs uniformly; label smoothing, mixup and RandAugment are
  off in every second model on average, and else drawn uniformly up to their
  greatest values, those of RandAugment as integers, n from 0 and m from 1.

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
  return [_draw_one(config, index) for index in range(config.grid.num_models)]


def _draw_one(config: config_lib.Config, index: int) -> Member:
  grid = config.grid
  rng = np.random.default_rng((config.seed, index, 0x6D1D))

  def log_uniform(bounds: Sequence[float]) -> float:
    low, high = map(float, bounds)
    share = rng.random()
    return low if low == high else float(low * (high / low) ** share)

  def sometimes(greatest: float) -> float:
    on, share = rng.random() < 0.5, rng.random()
    return float(greatest * share) if on else 0.0

  member = Member(
    index=index,
    epochs=int(rng.integers(grid.epochs[0], grid.epochs[1] + 1)),
    learning_rate=log_uniform(grid.learning_rate),
    weight_decay=log_uniform(grid.weight_decay),
    label_smoothing=sometimes(grid.label_smoothing),
    mixup=sometimes(grid.mixup),
    randaugment_count=int(rng.integers(0, grid.randaugment_count + 1)),
    randaugment_magnitude=int(rng.integers(1, grid.randaugment_magnitude + 1)),
  )
  if rng.random() < 0.5:
    return member
  return member._replace(randaugment_count=0, randaugment_magnitude=0)


def write(
  workdir: pathlib.Path, num_models: int, trained: Sequence[Trained]
) -> None:
  """Write the results of the members so far into grid.json."""
  rows = []
  for each in sorted(trained, key=lambda each: each.member.index):
    row = {**each.member._asdict(), **each._asdict()}
    del row['member']
    rows.append(row)
  values = {'num_models': num_models, 'models': rows}
  write_lib.write_text(workdir / FILE, json.dumps(values, indent=1))


def read(workdir: str | pathlib.Path) -> list[Trained]:
  """Read the results of the members so far, by index; [] if there are none."""
  path = pathlib.Path(workdir).expanduser() / FILE
  if not path.is_file():
    return []
  trained = []
  for row in json.loads(path.read_text(encoding='utf-8'))['models']:
    member = Member(*(row.pop(name) for name in Member._fields))
    trained.append(Trained(member, **row))
  return trained


def load_config(
  path: str | pathlib.Path, overrides: Sequence[str] = ()
) -> config_lib.Config:
  """Read a config file as `config.load`; its section `grid` may be missing."""
  values = config_lib.load(path).to_config_dict()
  if 'grid' not in values:
    with values.unlocked():
      values.grid = config_lib.section(**SECTION)
  return config_lib.override(values, overrides)


def augment(config: config_lib.Config, member: Member) -> config_keys.Augment:
  """Return `config.augment` with the RandAugment of a member.

  As in timm's transforms, colours are not jittered where there is one.

  >>> member = Member(0, 8, 2e-5, 0.1, 0.0, 0.0, 1, 12)
  >>> augment(config_lib.validate(config_lib.defaults()), member).randaugment
  'm12-n1'
  """
  off = {'randaugment_count': 0, 'randaugment_magnitude': 0.0}
  others = config.augment.model_copy(update={**off, 'randaugment': ''})
  if not member.randaugment_magnitude:
    return others
  text = f'm{member.randaugment_magnitude}-n{member.randaugment_count}'
  return others.model_copy(update={'randaugment': text, 'color_jitter': 0.0})


def main() -> None:
  """Print what 4,000 draws of `Grid` give."""
  config = config_lib.defaults()
  with config.unlocked():
    config.grid = config_lib.section(**SECTION | {'num_models': 4000})
  *_, rates, decays, smoothing, mixup, n, m = np.array(draw(config)).T
  print(
    f'medians of rate {np.median(rates):.1e}, decay {np.median(decays):.1e}'
  )
  off = [f'{np.mean(x == 0):.1%}' for x in (smoothing, mixup, m)]
  print(f'without label smoothing, mixup, RandAugment: {", ".join(off)}')
  shares = [f'{np.mean(n[m > 0] == count):.1%}' for count in range(3)]
  print(f'of the others n = 0, 1, 2: {", ".join(shares)}', end='; ')
  print(f'm > 10: {np.mean(m[m > 0] > 10):.1%}')


if __name__ == '__main__':
  main()
