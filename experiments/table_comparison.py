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
from collections.abc import Iterator
from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np
from scipy import stats

from experiments.soups import members
from experiments.soups import random_search
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.report import results
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib

EXPERIMENTS = pathlib.Path(__file__).parent
CONFIGS = EXPERIMENTS.parent / 'configs'
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
# Method: config in baselines/ ('' is plain fine-tuning), and flags.
BASELINES = {
  'linear probe': ('linear_probe', []),
  'LP-FT': ('', ['--config.anchor.head=linear_probe']),
  'CAR-FT': ('car_ft', []),
  'FTP': ('ftp', []),
  'TPGM': ('tpgm', []),
  'FLYP': ('flyp', []),
}
STAR = ['--config.train.label_smoothing=0.125', '--config.train.mixup=0.45']


def of_pair(
  config: config_lib.ConfigDict, setup: setup_lib.Setup, workdir: pathlib.Path
) -> Iterator[tuple[str, Any]]:
  """Yield the methods that use two models trained side by side, and params."""
  anchor = setup.anchor
  ends = _train(config, setup, workdir / 'end', 'end')
  single = merging.unstack(ends.models)[0]
  average = merging.uniform_soup(ends.models, stacked=True)
  yield 'zero-shot', anchor
  yield 'fine-tuned', single
  yield 'WiSE-FT, alpha 0.5', merging.wise_ft(anchor, single, alpha=0.5)
  yield 'WiSE-FT, alpha by validation', _wise_ft(config, setup, single)
  yield 'LiNeS, alpha by validation', _lines(config, setup, single)
  mono = merging.mono_soup(anchor, single, layers=clip.clip_layers)
  yield 'MonoSoup', mono.params
  yield 'average of 2', average
  name = 'WiSE-FT of the average, alpha by validation'
  yield name, _wise_ft(config, setup, average)
  scaled = merging.yoyo_scale(
    anchor, ends.models, stacked=True, layers=clip.clip_layers
  )
  yield 'YOYO-Scale', scaled.params
  yield 'Model Stock', ends.merged.params
  again = _train(config, setup, workdir / 'epoch', 'epoch')
  yield 'Model Stock, every epoch', again.merged.params


def _train(
  config: config_lib.ConfigDict,
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  every: str,
) -> loop.Result:
  run = config_lib.override(config, [f'--config.merge.every={every}'])
  title = f'seed {config.seed}, merge at {every}'
  return loop.train(run, workdir, setup=setup, title=title)


def _wise_ft(
  config: config_lib.ConfigDict, setup: setup_lib.Setup, model: Any
) -> Any:
  """The interpolation that does best on the validation digits."""
  curve = merging.wise_ft(setup.anchor, model, alpha=ALPHAS)
  return _best(config, setup, merging.unstack(curve))


def _lines(
  config: config_lib.ConfigDict, setup: setup_lib.Setup, model: Any
) -> Any:
  """The scaling by depth that does best on the validation digits."""
  last = config.model.image.depth - 1

  def depth(path: str, _: Any) -> int | None:
    return last if path.startswith('head/') else clip.layer_depth(path)

  scaled = [
    merging.lines(setup.anchor, model, depth, alpha=a, beta=1 - a)
    for a in ALPHAS
  ]
  return _best(config, setup, scaled)


def _best(
  config: config_lib.ConfigDict, setup: setup_lib.Setup, models: list[Any]
) -> Any:
  scores = setup.evaluate(models, validation(config))
  return models[int(np.argmax([score.correct for score in scores]))]


def of_star(
  config: config_lib.ConfigDict, setup: setup_lib.Setup, workdir: pathlib.Path
) -> Iterator[tuple[str, Any]]:
  """The same of two models of the stronger recipe, merged once."""
  found = _train(config, setup, workdir / 'star', 'end')
  yield 'fine-tuned*', merging.unstack(found.models)[0]
  yield 'average of 2*', merging.uniform_soup(found.models, stacked=True)
  yield 'Model Stock*', found.merged.params


def of_grid(
  config: config_lib.ConfigDict,
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  title: str,
) -> Iterator[tuple[str, Any]]:
  """Soups of sixteen models, without those that have diverged."""
  trained = [
    each
    for each in random_search.train(config, workdir, setup=setup)
    if each.validation is not None
  ]
  models = [members.load(workdir, each, setup.anchor) for each in trained]
  best = max(range(len(models)), key=lambda i: trained[i].validation or 0)
  yield f'best of {title}', models[best]
  yield f'uniform soup of {title}', merging.uniform_soup(models)

  def score(params: Any) -> float:
    [found] = setup.evaluate([params], validation(config))
    return found.accuracy

  if title == '16':
    merged = merging.model_stock(setup.anchor, models, layers=clip.clip_layers)
    yield 'Model Stock of 16', merged.params
  soup = merging.greedy_soup(models, score)
  chosen = [trained[i].member.index for i in soup.members]
  print(f'seed {config.seed}: greedy soup of {title}: {chosen}', flush=True)
  yield f'greedy soup of {title}', soup.params


def validation(config: config_lib.ConfigDict) -> data.Benchmark:
  """Return the accuracies that every choice is made by."""
  return data.Benchmark(
    'validation', config.data.dataset, config.data.validation
  )


def measure(
  workdir: pathlib.Path, seeds: int, overrides: list[str]
) -> list[evaluation.Row]:
  """A row for each method, benchmark and seed."""
  plain, drawn = CONFIGS / 'digits.py', EXPERIMENTS / 'soups/digits_grid.py'

  def load(path: pathlib.Path, flags: Sequence[str] = ()) -> tuple[Any, Any]:
    # Only the configs of a search have a section `grid`.
    known = [
      flag
      for flag in overrides
      if path == drawn or not flag.startswith('--config.grid.')
    ]
    return config_lib.load_with_hooks(path, [*flags, *known])

  (pair, _), (search, _) = load(plain), load(drawn)
  configs = [
    pair,
    load(plain, STAR)[0],
    load(drawn, _same_recipe(pair))[0],
    search,
  ]
  setups = [clip_task.prepare(config) for config in configs]
  baselines = {}
  for name, (file, flags) in BASELINES.items():
    path = plain
    if file:
      path = EXPERIMENTS / 'baselines' / f'{file}.py'
    config, hooks = load(path, [*flags, '--config.merge.num_models=1'])
    baselines[name] = config, clip_task.prepare(config, **hooks)
  rows = []
  for seed in range(pair.seed, pair.seed + seeds):
    star, same, sought = (
      (_of_seed(config, seed), setup)
      for config, setup in list(zip(configs, setups, strict=True))[1:]
    )
    folder = workdir / f'seed_{seed}'
    models = {
      **dict(of_pair(_of_seed(pair, seed), setups[0], folder)),
      **dict(of_star(*star, folder)),
      **dict(of_grid(*same, folder / 'same', '16')),
      **dict(of_grid(*sought, folder / 'search', 'a search')),
    }
    del models['best of 16']  # of one recipe: chance
    rows += _rows(pair, setups[0], models, seed)
    for name, (config, setup) in baselines.items():
      found = _train(_of_seed(config, seed), setup, folder / name, 'end')
      rows += _rows(pair, setup, {name: found.merged.params}, seed)
  return rows


def _rows(
  config: config_lib.ConfigDict,
  setup: setup_lib.Setup,
  models: dict[str, Any],
  seed: int,
) -> list[evaluation.Row]:
  rows = []
  for name in config.evaluate.benchmarks:
    scores = setup.evaluate(list(models.values()), data.find_benchmark(name))
    rows += [
      evaluation.Row(
        method, name, seed, score.accuracy, score.n, score.num_classes
      )
      for method, score in zip(models, scores, strict=True)
    ]
  return rows


def _of_seed(config: config_lib.ConfigDict, seed: int) -> config_lib.ConfigDict:
  return config_lib.override(config, [f'--config.seed={seed}'])


def _same_recipe(pair: config_lib.ConfigDict) -> list[str]:
  """A grid that draws nothing."""
  train = pair.train
  return [
    f'--config.grid.epochs=({train.epochs}, {train.epochs})',
    f'--config.grid.learning_rate=({train.learning_rate}, '
    f'{train.learning_rate})',
    f'--config.grid.weight_decay=({train.weight_decay}, {train.weight_decay})',
    '--config.grid.label_smoothing=0.0',
    '--config.grid.mixup=0.0',
  ]


def interval(values: np.ndarray) -> str:
  """Mean and 95 % confidence interval (Student's t) over seeds."""
  if np.ptp(values) == 0:
    return f'{values.mean():.1f}'
  half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return f'{values.mean():.1f} ± {half:.1f}'


def table(rows: list[evaluation.Row]) -> str:
  """The methods, and how far each is from Model Stock, paired by seed."""
  tests, shifts = results.benchmarks(rows)
  found = {
    method: [
      100 * np.array(list(results.per_seed(rows, method, names).values()))
      for names in (tests, shifts)
    ]
    for method in results.methods(rows)
  }
  lines = [
    f'| | cost | digits | mean of {len(shifts)} shifts | against {REFERENCE}: '
    'digits | shifts |',
    '|:--|--:|--:|--:|--:|--:|',
  ]
  for method, (cost, about) in METHODS.items():
    if method not in found:
      continue
    cells = [interval(values) for values in found[method]]
    for values, reference in zip(found[method], found[REFERENCE], strict=True):
      same = method == REFERENCE
      cells.append('' if same else interval(values - reference))
    title = f'{method} ({about})' if about else method
    lines.append(f'| {title} | {cost} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  """Trains what is not there, evaluates, prints the table."""
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
  main()
