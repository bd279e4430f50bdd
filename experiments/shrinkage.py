"""Is Model Stock more than shrinkage? Controls of the same displacement.

A merge moves each layer of a base, the average of N models, towards the anchor.
Its factors f are the lengths |merge - anchor| / |base - anchor| by layer, which
for Model Stock are its ratios. YOYO-Scale has the same base; that of MonoSoup
is a single model. Every control multiplies the displacement of the base:

  one factor             the same for all layers
  factors                f: what the merge does but scaling layers is left out
  factors, permuted      among layers of a kind, or among all layers
  factors of other seeds f of the merges of models that other seeds trained
  random factors         drawn from (0, 1) for each layer
  WiSE-FT                one factor, the best over all runs on validation

Those that are `matched` are then multiplied by one number, which gives them the
total displacement of the merge.

  python -m experiments.shrinkage --workdir=runs/shrinkage

trains eight models for each of two anchors and ten seeds, if they are not
there, by the recipe of configs/digits.py. Only the factor of WiSE-FT is chosen,
for each N: by the accuracy on the validation digits, or by the mean of it and
of that on shifts of them, over all runs, before a test benchmark is read.
"""

import pathlib
import sys
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from experiments import intervals
from experiments.digits import pretrain
from experiments.geometry import ablations
from experiments.geometry import gram as gram_lib
from experiments.geometry import study
from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.cli import interrupts
from modelstock_jax.report import merges
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib

METHODS = {'MonoSoup': (1,), 'Model Stock': (2, 4, 8), 'YOYO-Scale': (2,)}
ALPHAS = np.linspace(0.5, 1, 6)
# What the factor of WiSE-FT is chosen by, of [digits, shifts].
CHOICES = {'digits': slice(1), 'digits and shifts': slice(2)}
DRAWS = 2  # of every control that is drawn
FLAGS = ['--config.merge.num_models=8', '--config.merge.every=end']

# For each row of a table K factors of each layer, float64[K, L].
Rows = dict[str, np.ndarray]


class Merge(NamedTuple):
  """A merge of one group of models.

  Attributes:
    base: params, what a control scales.
    params: the merge.
    layers: L of them.
    squares: float64[L], |base - anchor|^2.
    factors: float64[L], |params - anchor| / |base - anchor|.
  """

  base: Any
  params: Any
  layers: list[merges.Layer]
  squares: np.ndarray
  factors: np.ndarray

  def length(self, factors: np.ndarray) -> np.ndarray:
    """Return the displacement of factors [K, L] over that of the base."""
    return np.sqrt(factors**2 @ self.squares / self.squares.sum())

  def match(self, factors: np.ndarray) -> np.ndarray:
    """Multiply factors [K, L] so that the displacement is the merge's."""
    wanted = self.length(self.factors)
    return factors * (wanted / self.length(factors))[:, None]


class Run(NamedTuple):
  """The merges of the models of a seed, by method and number of models."""

  setup: setup_lib.Setup
  seed: int
  merges: dict[tuple[str, int], Merge]

  @property
  def anchor(self) -> Any:
    """The params that all models left, on the host."""
    return jax.device_get(self.setup.anchor)


def train(
  workdir: pathlib.Path, seeds: int, overrides: list[str]
) -> dict[str, list[Run]]:
  """Return the runs by anchor; a finished one is only read."""
  flags = [*overrides, *FLAGS]
  path = workdir / 'anchor_1.safetensors'
  workdir.mkdir(parents=True, exist_ok=True)
  if not path.exists():
    seed = '--config.pretrain.seed=1'
    pretrain.pretrain(config_lib.load(study.CONFIG, [*flags, seed]), path)
  runs = {}
  anchors = {'shipped': [], 'pretrained': [f'--config.anchor.weights={path}']}
  for name, weights in anchors.items():
    config = config_lib.load(study.CONFIG, [*flags, *weights])
    setup = clip_task.prepare(config)
    runs[name] = []
    for seed in range(config.seed, config.seed + seeds):
      of_seed = config_lib.override(config, [f'--config.seed={seed}'])
      folder, title = workdir / name / f'seed_{seed}', f'{name}, seed {seed}'
      result = loop.train(of_seed, folder, setup=setup, title=title)
      models = jax.device_get(merging.unstack(result.models))
      merged = merge(jax.device_get(setup.anchor), models)
      runs[name].append(Run(setup, seed, merged))
  return runs


def merge(anchor: Any, models: list[Any]) -> dict[tuple[str, int], Merge]:
  """Merge the first N of models with each method."""
  merged = {}
  for method, numbers in METHODS.items():
    for number in numbers:
      group, layers = models[:number], clip.clip_layers
      if method == 'MonoSoup':
        base = group[0]
        result = merging.mono_soup(anchor, base, layers=layers)
      else:
        base = merging.uniform_soup(group)
        rule = {
          'Model Stock': merging.model_stock,
          'YOYO-Scale': merging.yoyo_scale,
        }[method]
        result = rule(anchor, group, layers=layers)
      gram = gram_lib.measure(anchor, [base, result.params])
      squares, merged_squares = gram.products[:, [0, 1], [0, 1]].T
      factors = np.sqrt(merged_squares / np.where(squares, squares, 1))
      merged[method, number] = Merge(
        base, result.params, gram.layers, squares, factors
      )
  return merged


def controls(merge: Merge, others: list[Merge], seed: int) -> Rows:
  """Return the factors of the controls for which nothing is chosen.

  Args:
    merge: to which they are controls.
    others: K merges of other seeds.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  ones = np.ones((1, len(merge.layers)))
  copies = np.tile(merge.factors, (DRAWS, 1))
  by_kind = copies.copy()
  for mask in merges.by_kind(merge.layers).values():
    by_kind[:, mask] = rng.permuted(copies[:, mask], axis=1)
  return {
    'one factor, matched': merge.match(ones),
    'factors': copies[:1],
    'factors, permuted within kinds': by_kind,
    'factors of other seeds': np.stack([other.factors for other in others]),
    'random factors, matched': merge.match(rng.uniform(size=copies.shape)),
    'factors, permuted, matched': merge.match(rng.permuted(copies, axis=1)),
  }


def scale(anchor: Any, base: Any, factors: np.ndarray) -> Any:
  """Return w_0 + f (w - w_0), with a factor f for each layer, float64[L]."""
  groups, _, _ = merges.group_layers(list(gram_lib.by_path(anchor)))
  factor_of = {
    path: factor
    for paths, factor in zip(groups.values(), factors, strict=True)
    for path in paths
  }

  def leaf(path: Any, w0: np.ndarray, w: np.ndarray) -> np.ndarray:
    step = np.asarray(w, np.float64) - w0
    return (w0 + factor_of[merging.path_name(path)] * step).astype(w0.dtype)

  return jax.tree.map_with_path(leaf, anchor, base)


def choose(runs: list[Run]) -> dict[int, dict[str, float]]:
  """Return the factor of WiSE-FT for each number of models and choice."""
  alphas = ALPHAS.tolist()
  measured = []
  for run in runs:
    bases = {str(number): each for (_, number), each in run.merges.items()}
    models = {
      (number, alpha): [
        scale(run.anchor, each.base, np.full(len(each.layers), alpha))
      ]
      for number, each in bases.items()
      for alpha in alphas
    }
    measured.append(
      ablations.measure(run.setup, models, ablations.ON_VALIDATION)
    )

  def best(number: str, part: slice) -> float:
    def value(alpha: float) -> float:
      return float(np.mean([each[number, alpha][part] for each in measured]))

    return max(alphas, key=value)

  return {
    number: {name: best(str(number), part) for name, part in CHOICES.items()}
    for _, number in runs[0].merges
  }


def test(
  run: Run, others: list[Run], chosen: dict[int, dict[str, float]]
) -> dict[tuple[str, int, str], np.ndarray]:
  """Measure the merges of a run and their controls on the test benchmarks.

  Args:
    run: what to measure.
    others: K runs of other seeds from the same anchor.
    chosen: see `choose`.

  Returns:
    For each method, number of models and row float64[3], means over draws:
    accuracy on the digits and mean accuracy on the shifts, in percent, and the
    total displacement over that of the base.
  """
  models, names, lengths = {}, {}, {}
  one = run.merges['MonoSoup', 1]  # the first: its model is in all tables
  for (method, number), merged in run.merges.items():
    ones = np.ones((1, len(merged.layers)))
    others_merged = [other.merges[method, number] for other in others]
    rows = {
      f'average of {number}': ones,
      **{f'WiSE-FT by {by}': a * ones for by, a in chosen[number].items()},
      **controls(merged, others_merged, run.seed),
    }
    if method == 'Model Stock':  # it does nothing else
      del rows['factors']
    row = method, number, 'average of 1'
    names[row] = [('1', ones.tobytes())]
    lengths[row] = np.sqrt(one.squares.sum() / merged.squares.sum())
    for name, factors in rows.items():
      row = method, number, name
      names[row] = [(str(number), each.tobytes()) for each in factors]
      lengths[row] = merged.length(factors).mean()
      for model, each in zip(names[row], factors, strict=True):
        if model not in models:  # equal factors are measured once
          models[model] = [scale(run.anchor, merged.base, each)]
    row = method, number, method
    names[row], models[method, number] = [(method, number)], [merged.params]
    lengths[row] = merged.length(merged.factors)
  measured = ablations.measure(run.setup, models, ablations.ON_TEST)
  return {
    row: np.append(np.mean([measured[x] for x in of_row], (0, 2)), lengths[row])
    for row, of_row in names.items()
  }


def table(
  figures: dict[tuple[str, int, str], np.ndarray], method: str, number: int
) -> str:
  """Return the rows of a merge, and how far they are from the merge.

  Args:
    figures: float64[3, S], see `test`.
    method: of the merge.
    number: of models.
  """
  rows = {
    name: values
    for (*key, name), values in figures.items()
    if key == [method, number]
  }
  lines = [
    f'| {method} of {number} | digits | shifts | length '
    f'| against {method}: digits | shifts |',
    '|:--|--:|--:|--:|--:|--:|',
  ]
  for name, (*both, length) in rows.items():
    cells = [f'{values.mean():.2f}' for values in (*both, length)]
    for values, reference in zip(both, rows[method], strict=False):
      cells.append(intervals.interval(values - reference, sign='+', digits=2))
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def mean_by_kind(merged: list[Merge]) -> str:
  """Return the mean factor of each kind of layers, over runs, as text."""
  factors = np.mean([each.factors for each in merged], axis=0)
  kinds = merges.by_kind(merged[0].layers).items()
  return ', '.join(f'{kind} {factors[mask].mean():.2f}' for kind, mask in kinds)


def main() -> None:
  """Train what is missing, choose, test, and print the tables."""
  parser = study.parser(__doc__, workdir='runs/shrinkage', seeds=10)
  args, overrides = parser.parse_known_args()
  by_anchor = train(args.workdir, args.seeds, overrides)
  all_runs = [run for runs in by_anchor.values() for run in runs]
  chosen = choose(all_runs)
  for number, factors in chosen.items():
    for by, factor in factors.items():
      print(f'WiSE-FT of {number}, by {by}: {factor:.1f}')
  for method, number in all_runs[0].merges:
    merged = [run.merges[method, number] for run in all_runs]
    print(f'mean factors of {method} of {number}: {mean_by_kind(merged)}')
  figures = {}
  for anchor, runs in by_anchor.items():
    tested = []
    for index, run in enumerate(runs):
      others = [*runs[index + 1 :], *runs[:index]][:DRAWS]
      tested.append(test(run, others, chosen))
      print(f'{anchor}, seed {run.seed}: tested', file=sys.stderr, flush=True)
    figures[anchor] = {
      key: np.stack([each[key] for each in tested], axis=1) for key in tested[0]
    }
  figures['both anchors'] = {
    key: np.concatenate([each[key] for each in figures.values()], axis=1)
    for key in figures['shipped']
  }
  for title, each in reversed(figures.items()):
    print(f'\n{title}, {args.seeds} seeds each')
    for method, numbers in METHODS.items():
      for number in numbers:
        print(f'\n{table(each, method, number)}')


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.shrinkage', main))
