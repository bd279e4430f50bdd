"""The comparison of the paper's first tables, on digits, with intervals.

Two fine-tuned models merged by Model Stock, against one of them, their average,
WiSE-FT, and soups of 16 models. For each seed everything is trained anew:

* the pair of `configs/digits.py`, merged once at its end or at every epoch;
* with a star: the same with label smoothing 0.125 and mixup 0.45, half of the
  most that the search below draws (the paper's star is a stronger recipe too);
* 16 models of the pair's recipe, which differ in the order of their data;
* a random search over 16 recipes, `soups/digits_grid.py`;
* single models of other ways to fine-tune, in `baselines/`.

What is to be chosen (alpha of WiSE-FT and LiNeS, the members of a greedy soup,
the best model of the search) is chosen by accuracy on the validation digits.
The test benchmarks are read once.

  python -m experiments.table_comparison --workdir=runs/table --seeds=5
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import pathlib
import sys
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments import intervals
from experiments.soups import random_search
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.cli import interrupts
from modelstock_jax.report import comparison
from modelstock_jax.report import results
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = 'configs/digits.py'
GRID = 'experiments/soups/digits_grid.py'
ALPHAS = np.linspace(0, 1, 11)

# Method: training runs, and what it is.
METHODS = {
  'zero-shot': (0, ''),
  'fine-tuned': (1, 'the first model of the pair'),
  'WiSE-FT, alpha 0.5': (1, 'of the first model'),
  'WiSE-FT, alpha by validation': (1, 'of the first model'),
  'LiNeS, alpha by validation': (1, 'of the first model'),
  'MonoSoup': (1, 'of the first model'),
  'linear probe': (1, 'the tower frozen'),
  'LP-FT': (1, 'fine-tuned from a linear probe'),
  'CAR-FT': (1, ''),
  'FTP': (1, ''),
  'TPGM': (1, 'its radii learnt on the validation digits'),
  'FLYP': (1, ''),
  'average of 2': (2, ''),
  'WiSE-FT of the average, alpha by validation': (2, ''),
  'YOYO-Scale': (2, ''),
  'Model Stock': (2, 'merged once, at the end'),
  'Model Stock, every epoch': (2, ''),
  'uniform soup of 16': (16, 'of the same recipe'),
  'greedy soup of 16': (16, 'of the same recipe'),
  'Model Stock of 16': (16, 'of the same recipe'),
  'fine-tuned*': (1, ''),
  'average of 2*': (2, ''),
  'Model Stock*': (2, ''),
  'best of a search': (16, ''),
  'uniform soup of a search': (16, ''),
  'greedy soup of a search': (16, ''),
}
REFERENCE = 'Model Stock'
BASELINES = {  # config file and flags
  'linear probe': ('experiments/baselines/linear_probe.py', []),
  'LP-FT': (DIGITS, ['--config.anchor.head=linear_probe']),
  'CAR-FT': ('experiments/baselines/car_ft.py', []),
  'FTP': ('experiments/baselines/ftp.py', []),
  'TPGM': ('experiments/baselines/tpgm.py', []),
  'FLYP': ('experiments/baselines/flyp.py', []),
}
STAR = ['--config.train.label_smoothing=0.125', '--config.train.mixup=0.45']

Models = Iterator[tuple[str, Any]]  # names of methods, and params


class Run(NamedTuple):
  """The recipe of one seed, and the folder of its runs."""

  config: config_lib.Config
  setup: setup_lib.Setup
  folder: pathlib.Path

  def train(self, name: str, every: str = 'end') -> loop.Result:
    """Train in a folder of that name; a finished run is only read."""
    config = config_lib.override(self.config, [f'--config.merge.every={every}'])
    title = f'seed {config.seed}, {name}'
    return loop.train(config, self.folder / name, setup=self.setup, title=title)

  def validate(self, models: list[Any]) -> list[float]:
    """Return the accuracies that every choice is made by."""
    source = self.config.data
    validation = data.Benchmark('validation', source.dataset, source.validation)
    return [score.accuracy for score in self.setup.evaluate(models, validation)]


def of_pair(run: Run) -> Models:
  """Train two models, and yield the methods that use them."""
  anchor = run.setup.anchor
  ends = run.train('end')
  single = merging.unstack(ends.models)[0]
  average = merging.uniform_soup(ends.models, stacked=True)
  last = run.config.model.network().vision.depth - 1

  def depth(path: str, _: Any) -> int | None:
    return last if path.startswith('head/') else clip.layer_depth(path)

  def best(models: list[Any]) -> Any:
    return models[int(np.argmax(run.validate(models)))]

  def best_wise_ft(model: Any) -> Any:
    return best(merging.unstack(merging.wise_ft(anchor, model, alpha=ALPHAS)))

  yield 'zero-shot', anchor
  yield 'fine-tuned', single
  yield 'WiSE-FT, alpha 0.5', merging.wise_ft(anchor, single, alpha=0.5)
  yield 'WiSE-FT, alpha by validation', best_wise_ft(single)
  lines = [
    merging.lines(anchor, single, depth, alpha=alpha, beta=1 - alpha)
    for alpha in ALPHAS
  ]
  yield 'LiNeS, alpha by validation', best(lines)
  mono = merging.mono_soup(anchor, single, layers=clip.clip_layers)
  yield 'MonoSoup', mono.params
  yield 'average of 2', average
  yield 'WiSE-FT of the average, alpha by validation', best_wise_ft(average)
  scaled = merging.yoyo_scale(
    anchor, ends.models, stacked=True, layers=clip.clip_layers
  )
  yield 'YOYO-Scale', scaled.params
  yield 'Model Stock', ends.merged.params
  yield 'Model Stock, every epoch', run.train('epoch', 'epoch').merged.params


def of_star(run: Run) -> Models:
  """Train two models of the stronger recipe, and yield them and merges."""
  ends = run.train('star')
  yield 'fine-tuned*', merging.unstack(ends.models)[0]
  yield 'average of 2*', merging.uniform_soup(ends.models, stacked=True)
  yield 'Model Stock*', ends.merged.params


def of_grid(run: Run, *, name: str, title: str) -> Models:
  """Train a grid, and yield soups of its models that have not diverged."""
  folder, anchor = run.folder / name, run.setup.anchor
  trained = random_search.train(run.config, folder, setup=run.setup)
  trained = [each for each in trained if each.validation is not None]
  models = [clip.load_safetensors(folder / x.file, anchor) for x in trained]
  if name == 'same':  # of one recipe, where the best is chance
    merged = merging.model_stock(anchor, models, layers=clip.clip_layers)
    yield f'Model Stock of {title}', merged.params
  else:
    accuracies = [each.validation or 0.0 for each in trained]
    yield f'best of {title}', models[int(np.argmax(accuracies))]
  yield f'uniform soup of {title}', merging.uniform_soup(models)
  soup = merging.greedy_soup(models, lambda params: run.validate([params])[0])
  chosen = [trained[i].member.index for i in soup.members]
  print(f'seed {run.config.seed}: greedy soup of {title}: {chosen}', flush=True)
  yield f'greedy soup of {title}', soup.params


def of_baseline(run: Run, *, name: str) -> Models:
  """Train one model by another method, and yield what it deploys."""
  params = run.train(name).merged.params
  yield name, run.setup.evaluate.deploy(params)


def measure(
  workdir: pathlib.Path, seeds: int, overrides: list[str]
) -> list[evaluation.Row]:
  """Return a row for each method, benchmark and seed."""

  def prepare(file: str, flags: Sequence[str] = ()) -> tuple[Any, Any]:
    # Only the configs of a search have a section `grid`.
    known = [
      flag
      for flag in overrides
      if file == GRID or not flag.startswith('--config.grid.')
    ]
    config, hooks = config_lib.load_with_hooks(ROOT / file, [*flags, *known])
    return config, clip_task.prepare(config, **hooks)

  digits, pair = prepare(DIGITS, ['--config.merge.opt_state=keep'])
  same = functools.partial(of_grid, name='same', title='16')
  search = functools.partial(of_grid, name='search', title='a search')
  recipes: list[tuple[Callable[[Run], Models], Any, Any]] = [
    (of_pair, digits, pair),
    (of_star, *prepare(DIGITS, STAR)),
    (same, *prepare(GRID, same_recipe(digits))),
    (search, *prepare(GRID)),
  ]
  for name, (file, flags) in BASELINES.items():
    config, setup = prepare(file, [*flags, '--config.merge.num_models=1'])
    method = functools.partial(of_baseline, name=name)
    recipes.append((method, config, setup))
  rows = []
  for seed in range(digits.seed, digits.seed + seeds):
    models = {}
    for method, config, setup in recipes:
      of_seed = config_lib.override(config, [f'--config.seed={seed}'])
      for name, params in method(Run(of_seed, setup, workdir / f'seed_{seed}')):
        models[name, seed] = params
    rows += comparison.score(pair, models, digits.evaluate.benchmarks).rows
  return rows


def same_recipe(digits: config_lib.Config) -> list[str]:
  """Return the flags of a grid that draws nothing."""
  train = digits.train
  bounds = {
    name: (getattr(train, name),) * 2
    for name in ('epochs', 'learning_rate', 'weight_decay')
  }
  values = {**bounds, 'label_smoothing': 0.0, 'mixup': 0.0}
  return [f'--config.grid.{name}={value}' for name, value in values.items()]


def table(rows: list[evaluation.Row]) -> str:
  """Return the methods and their differences from Model Stock by seed."""
  tests, shifts = results.benchmarks(rows)
  percent = {
    method: [
      100 * np.array(list(results.per_seed(rows, method, names).values()))
      for names in (tests, shifts)
    ]
    for method in METHODS
  }

  def cell(values: np.ndarray) -> str:
    same = np.ptp(values) == 0  # as of the anchor
    return f'{values.mean():.1f}' if same else intervals.interval(values)

  lines = [
    f'| | cost | digits | mean of {len(shifts)} shifts | against {REFERENCE}: '
    'digits | shifts |',
    '|:--|--:|--:|--:|--:|--:|',
  ]
  for method, (cost, about) in METHODS.items():
    cells = [cell(values) for values in percent[method]]
    for values, reference in zip(
      percent[method], percent[REFERENCE], strict=True
    ):
      cells.append('' if method == REFERENCE else cell(values - reference))
    title = f'{method} ({about})' if about else method
    lines.append(f'| {title} | {cost} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  """Train what is missing, evaluate, and print the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=5)
  args, overrides = parser.parse_known_args()
  rows = measure(args.workdir, args.seeds, overrides)
  results.save(rows, args.workdir / 'results.json')
  print(table(rows))


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.table_comparison', main))
