"""The comparison on digits where angles are as large as the paper's.

At the demo's setting displacements have larger cosines than those of the
authors' ViT-B/32 pair, and merging has less to gain. `search` trains a pair for
each candidate, reads cosines and validation digits, and chooses by the rule
that large_angles.md states; `compare` runs single models, averages, WiSE-FT,
soups and Model Stock at the demo's setting and at the chosen one, and reads the
test benchmarks.

  python -m experiments.large_angles search --workdir=runs/large_angles
  python -m experiments.large_angles compare --workdir=runs/large_angles
"""

import argparse
from collections.abc import Iterable
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import tabulate

from experiments import first_run
from experiments import intervals
from experiments import table_comparison
from experiments.digits import pretrain
from experiments.geometry import gram as gram_lib
from modelstock_jax import merging
from modelstock_jax.cli import interrupts
from modelstock_jax.formats import write
from modelstock_jax.report import comparison
from modelstock_jax.report import merges
from modelstock_jax.report import results
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation

LEAST, GREATEST = 0.4, 0.6
# Mean cosines that must be between these: of matrices, by kind and by block.
CRITERION = ('attention', 'mlp', 'block 0', 'block 1', 'block 2')
KINDS = ('embedding', 'norm', 'bias', 'head')  # these are reported
METHODS = ('zero-shot', 'first', 'second', 'average', 'Model Stock')
SEARCH_SEEDS = range(100, 103)
DEMO, SOUP = 'demo', 8  # models of a soup
# Changes of configs/digits.py, which has 200 digits, batches of 50 and 2e-3.
_B10, _B25 = 'train.batch_size=10', 'train.batch_size=25'
_R4, _WEAK = 'train.learning_rate=4e-3', 'pretrain.steps=200'  # of 1,000
_N100, _N800 = 'data.train=train[:100]', 'data.train=train'
CANDIDATES: dict[str, tuple[str, ...]] = {
  DEMO: (),
  'batch 25': (_B25,),
  'batch 10': (_B10,),
  'batch 5': ('train.batch_size=5',),
  'rate 4e-3': (_R4,),
  'rate 6e-3': ('train.learning_rate=6e-3',),
  'batch 25, rate 4e-3': (_B25, _R4),
  'batch 10, rate 1e-3': (_B10, 'train.learning_rate=1e-3'),
  '100 digits, batch 10': (_B10, _N100),
  '100 digits, rate 4e-3': (_R4, _N100),
  '800 digits, rate 4e-3': (_R4, _N800),
  '800 digits, batch 10, 10 epochs': (_B10, _N800, 'train.epochs=10'),
  'crops, batch 25': (_B25, 'augment.crop_scale=(0.5,1.0)', 'data.cache=False'),
  'weak anchor': (_WEAK,),
  'weak anchor, batch 10': (_WEAK, _B10),
}

Table = dict[str, dict[str, float]]
Rows = list[evaluation.Row]


def recipe(name: str, workdir: pathlib.Path, overrides: list[str]) -> list[str]:
  """Return the flags of a candidate; pretrain its anchor where it is weak."""
  flags = [f'--config.{change}' for change in CANDIDATES[name]] + overrides
  if _WEAK in CANDIDATES[name]:
    path = workdir.absolute() / 'weak_anchor.safetensors'
    if not path.exists():
      pretrain.pretrain(config_lib.load(pretrain.CONFIG, flags), path)
    flags.append(f'--config.anchor.weights={path}')
  return flags


def runs_of(
  file: str, flags: list[str], folder: pathlib.Path, seeds: Iterable[int]
) -> list[table_comparison.Run]:
  """Return the runs of a config file, one for each seed."""
  config = config_lib.load(table_comparison.ROOT / file, flags)
  setup = clip_task.prepare(config)
  return [
    table_comparison.Run(
      config_lib.override(config, [f'--config.seed={seed}']),
      setup,
      folder / f'seed_{seed}',
    )
    for seed in seeds
  ]


def measure(run: table_comparison.Run) -> dict[str, float]:
  """Train the two models of a run; measure angles and validation accuracy.

  Args:
    run: of one seed.

  Returns:
    Cosines by layer, and their means by kind and of the matrices of a block.
    'ratio', the mean over layers, and 'by distance', the mean weighted by
    |w_1 - w_2|^2: the squared distance of Model Stock from the centre over that
    of the average. Accuracy by `METHODS`, percent.
  """
  end, anchor = run.train('end'), run.setup.anchor
  models = merging.unstack(end.models)
  gram = gram_lib.measure(*jax.device_get((anchor, models)))
  cosine = gram_lib.cosines(gram.products)[:, 0]
  ratio = 2 * gram.mixture([0, 1], 'merges')[:, 0]
  apart = gram_lib.product(gram.products, *np.array([[1, -1]] * 2))
  masks = merges.by_kind(gram.layers)
  for index, place in enumerate(gram.places):
    here = np.array([layer.place == index for layer in gram.layers])
    masks[f'block {place}'] = here & (masks['attention'] | masks['mlp'])
  candidates = [*models, merging.uniform_soup(models), end.merged.params]
  accuracies = 100 * np.array(run.validate([anchor, *candidates]))
  return {
    **dict(zip([layer.name for layer in gram.layers], cosine, strict=True)),
    **{name: cosine[mask].mean() for name, mask in masks.items() if any(mask)},
    'ratio': ratio.mean(),
    'by distance': np.average(ratio, weights=apart),
    **dict(zip(METHODS, accuracies, strict=True)),
  }


def search(workdir: pathlib.Path, overrides: list[str]) -> Table:
  """Measure every candidate; those in search.json are not measured again.

  Args:
    workdir: folder of the runs and of search.json.
    overrides: flags for all candidates.

  Returns:
    For each candidate the means over seeds of `measure`.
  """
  path = workdir / 'search.json'
  table = json.loads(path.read_text('utf-8')) if path.exists() else {}
  for name in CANDIDATES:
    if name not in table:
      flags = recipe(name, workdir, overrides)
      folder = workdir / 'search' / name
      runs = runs_of(table_comparison.DIGITS, flags, folder, SEARCH_SEEDS)
      table[name] = jax.tree.map(
        lambda *values: float(np.mean(values)), *map(measure, runs)
      )
      write.write_text(path, json.dumps(table, indent=1))
  return table


def choose(table: Table) -> str | None:
  """Return the candidate that qualifies whose single models do best.

  A candidate qualifies if all of `CRITERION` are in range and its single models
  are ahead of its anchor.
  """

  def single(name: str) -> float:
    return (table[name]['first'] + table[name]['second']) / 2

  fits = [
    name
    for name, row in table.items()
    if all(LEAST <= row[key] <= GREATEST for key in CRITERION)
    and single(name) > row['zero-shot']
  ]
  return max(fits, key=single, default=None)


def compare(
  name: str, workdir: pathlib.Path, overrides: list[str], seeds: int
) -> Rows:
  """Run all methods at the setting of a candidate, and test them.

  Args:
    name: of the candidate.
    workdir: folder of the runs and of the results.
    overrides: flags for all candidates.
    seeds: number of seeds, from 0.

  Returns:
    A row for each method, test benchmark and seed.
  """
  flags = recipe(name, workdir, overrides)

  def load(file: str, *more: str) -> list[table_comparison.Run]:
    return runs_of(file, [*flags, *more], workdir / name, range(seeds))

  keep, reset = (
    load(table_comparison.DIGITS, f'--config.merge.opt_state={state}')
    for state in ('keep', 'reset')
  )
  same = table_comparison.same_recipe(keep[0].config)
  same.append(f'--config.grid.num_models={SOUP}')
  models: comparison.Models = {}
  for runs in zip(keep, reset, load(table_comparison.GRID, *same), strict=True):
    pair, fresh, grid = runs
    again = fresh.train('epoch_reset', 'epoch').merged.params
    of_seed = {
      **dict(table_comparison.of_pair(pair)),
      'Model Stock, every epoch, moments reset': again,
      **dict(table_comparison.of_grid(grid, name='same', title=str(SOUP))),
    }
    models |= {(method, pair.config.seed): x for method, x in of_seed.items()}
  benchmarks = keep[0].config.evaluate.benchmarks
  rows, _ = comparison.score(keep[0].setup, models, benchmarks)
  results.save(rows, workdir / f'{name}.json')
  return rows


def compare_table(regimes: dict[str, Rows], against: str) -> str:
  """Return accuracies, and differences by seed from a method, in percent."""
  lines = []
  for method in dict.fromkeys(row.method for row in regimes[DEMO]):
    lines.append({'': method})
    for name, rows in regimes.items():
      for part, names in zip(
        ('digits', 'shifts'), results.benchmarks(rows), strict=True
      ):
        value, base = (
          100 * np.array([*results.per_seed(rows, each, names).values()])
          for each in (method, against)
        )
        lines[-1] |= {
          f'{name}: {part}': f'{value.mean():.1f}',
          f'{name}: {part}, difference': intervals.interval(value - base, '+'),
        }
  return tabulate.tabulate(lines, 'keys', 'pipe', disable_numparse=True)


def search_tables(table: Table) -> str:
  """Return a table of all candidates, and one of matrices by depth."""
  columns = (*CRITERION, *KINDS, 'ratio', 'by distance', *METHODS)
  lines = [
    {'': name} | {k: row[k] for k in columns} for name, row in table.items()
  ]
  depth: list[dict[str, Any]] = []
  for index, layer in enumerate(first_run.LAYERS):
    depth.append({'': layer})
    for block, degrees in first_run.ANGLES.items():
      cosine = np.cos(np.deg2rad(degrees[index]))
      depth[-1][f'authors, block {block}'] = cosine
    for name in filter(None, (DEMO, choose(table))):
      for block in range(3):
        cosine = table[name][f'image/block_{block}/{layer}/kernel']
        depth[-1][f'{name}, block {block}'] = cosine
  tables = [tabulate.tabulate(x, 'keys', 'pipe', '.3g') for x in (lines, depth)]
  return '\n\n'.join(tables)


def main() -> None:
  """Search with validation images, or test what was chosen."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('phase', choices=('search', 'compare'))
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=10, help='of `compare`')
  args, overrides = parser.parse_known_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  table = search(args.workdir, overrides)
  chosen = choose(table)
  if args.phase == 'search' or chosen is None:
    print(f'{search_tables(table)}\n\nChosen: {chosen or "none found"}')
    return
  regimes = {
    name: compare(name, args.workdir, overrides, args.seeds)
    for name in (DEMO, chosen)
  }
  for against in ('Model Stock', 'fine-tuned'):
    print(f'Differences from {against}:\n')
    print(f'{compare_table(regimes, against)}\n')


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.large_angles', main))
