"""Ablations of the merge: unit, number of models, period, optimizer state.

Claim: one cosine for each layer is the best unit; more models help little.

  python -m experiments.geometry.ablations --workdir=runs/ablations

All models are runs of configs/digits.py. Unit and number merge the same ones in
several ways; each period and treatment of the optimizer state is a run.
Everything is measured on the validation digits and on shifts of them that are
functions of an image, and chosen there: of each ablation the setting with the
highest mean of the two. The chosen ones, and the defaults, are then measured
on the test benchmarks, once. Writes analysis/ablations.json and
plots/ablations.svg and .png.
"""

import pathlib
from typing import Any

import matplotlib as mpl
from matplotlib import figure as mpl_figure
import numpy as np

from experiments.digits import sweep
from experiments.geometry import analyses
from experiments.geometry import study
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.report import plots
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib

# 'unit' and 'number' merge once; the first of each is the default.
SETTINGS: dict[str, list[Any]] = {
  'unit': ['layer', 'filter', 'model'],
  'number': [2, 3, 4],
  'period': ['end', 'epoch', 5, 15],
  'opt_state': ['keep', 'average', 'reset'],  # where every epoch is merged
}

# For each ablation and setting the merged models, one for each seed.
Models = dict[tuple[str, Any], list[Any]]


def main() -> None:
  """Train what is missing, measure, choose, and draw."""
  parser = study.parser(__doc__)
  parser.set_defaults(workdir='runs/ablations', seeds=5)
  args, overrides = parser.parse_known_args()
  workdir = pathlib.Path(args.workdir)
  config = config_lib.load(study.CONFIG, overrides)
  setup = clip_task.prepare(config)
  models = merge(config, setup, workdir, args.seeds)
  validation = _measure(setup, models, [sweep.IN_DISTRIBUTION], sweep.SHIFTED)
  chosen = {
    ablation: max(settings, key=lambda x, a=ablation: np.mean(validation[a, x]))
    for ablation, settings in SETTINGS.items()
  }
  shown = {
    (ablation, setting): models[ablation, setting]
    for ablation, settings in SETTINGS.items()
    for setting in (settings[0], chosen[ablation])
  }
  tests = [data.find_benchmark('digits')]
  shifts = [data.find_benchmark(name) for name in data.SHIFTS]
  test = _measure(setup, shown, tests, shifts)
  found = analyses.plain(
    {
      'seeds': args.seeds,
      'chosen': chosen,
      'validation': _table(validation),
      'test': _table(test),
    }
  )
  analyses.write(found, workdir / 'analysis' / 'ablations.json')
  with mpl.rc_context(plots.STYLE):
    plots.save(draw(found), workdir / 'plots' / 'ablations')
  for part in ('validation', 'test'):
    print(f'{part}: in distribution / mean of shifts, %, mean ± sd of seeds')
    for row in found[part]:
      mark = '*' if chosen[row['ablation']] == row['setting'] else ' '
      print(
        f'{mark} {row["ablation"]:>9} {row["setting"]!s:>7}  '
        f'{_shown(row["accuracy"])} / {_shown(row["shifts"])}'
      )


def merge(
  config: config_lib.ConfigDict,
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  seeds: int,
) -> Models:
  """Return the merged models of every setting, for each seed."""
  models: Models = {}
  # Seeds 2s and 2s + 1 give four models.
  stacks = [
    _run(config, setup, workdir, seed, {'every': 'end'})
    for seed in range(config.seed, config.seed + 2 * seeds)
  ]
  for s in range(seeds):
    four = [
      model
      for result in stacks[2 * s : 2 * s + 2]
      for model in merging.unstack(result.models)
    ]
    for unit in SETTINGS['unit']:
      models.setdefault(('unit', unit), []).append(
        _stock(setup.anchor, four[:2], unit)
      )
    for number in SETTINGS['number']:
      models.setdefault(('number', number), []).append(
        _stock(setup.anchor, four[:number], 'layer')
      )
    models.setdefault(('period', 'end'), []).append(models['unit', 'layer'][-1])
  for seed in range(config.seed, config.seed + 2 * seeds, 2):
    for every in SETTINGS['period'][1:]:
      result = _run(config, setup, workdir, seed, {'every': every})
      models.setdefault(('period', every), []).append(result.merged.params)
    models.setdefault(('opt_state', 'keep'), []).append(
      models['period', 'epoch'][-1]
    )
  for kept in SETTINGS['opt_state'][1:]:
    # The optimizer's state is a part of the compiled program.
    own = clip_task.prepare(
      config_lib.override(config, [f'--config.merge.opt_state={kept}'])
    )
    for seed in range(config.seed, config.seed + 2 * seeds, 2):
      change = {'every': 'epoch', 'opt_state': kept}
      result = _run(config, own, workdir, seed, change)
      models.setdefault(('opt_state', kept), []).append(result.merged.params)
  return models


def draw(found: dict[str, Any]) -> mpl_figure.Figure:
  """Draw a panel for each ablation: validation, means and sd over seeds."""
  figure = mpl_figure.Figure((9.0, 4.6), layout='constrained')
  panels = figure.subplots(2, len(SETTINGS), sharex='col', sharey='row')
  for column, ablation in zip(panels.T, SETTINGS, strict=True):
    rows = [row for row in found['validation'] if row['ablation'] == ablation]
    for ax, key, color, marker in (
      (column[0], 'accuracy', plots.BLUE, 'o'),
      (column[1], 'shifts', plots.ORANGE, 's'),
    ):
      mean = [row[key]['mean'] for row in rows]
      sd = [row[key]['sd'] or 0 for row in rows]
      x = np.arange(len(rows))
      ax.errorbar(x, mean, sd, color=color, fmt='none', elinewidth=1)
      texts = [f'{row["setting"]}: {_shown(row[key])} %' for row in rows]
      style = dict(color=color, marker=marker, ls='', mec='white', ms=7)
      plots.points(ax, x, mean, texts, **style)
    names = [
      f'{row["setting"]}*'
      if row['setting'] == found['chosen'][ablation]
      else str(row['setting'])
      for row in rows
    ]
    column[1].set_xticks(range(len(rows)), names)
    column[1].set_xlim(-0.5, len(rows) - 0.5)
    column[0].set_title(ablation.replace('opt_state', 'optimizer state'))
    for ax in column:
      ax.xaxis.grid(False)
  panels[0, 0].set_ylabel('Validation digits, %')
  panels[1, 0].set_ylabel('Mean of their shifts, %')
  figure.supxlabel(
    f'Mean and sd over {found["seeds"]} seeds; *: chosen, here on validation',
    fontsize=8.5,
    color='#444444',
  )
  return figure


def _run(
  config: config_lib.ConfigDict,
  setup: setup_lib.Setup,
  workdir: pathlib.Path,
  seed: int,
  changes: dict[str, Any],
) -> loop.Result:
  """Train a run in a folder of its own; a finished one is only read."""
  name = '_'.join(f'{key}_{value}' for key, value in changes.items())
  flags = [f'--config.merge.{key}={value}' for key, value in changes.items()]
  run = config_lib.override(config, [f'--config.seed={seed}', *flags])
  return loop.train(
    run,
    workdir / f'{name}_seed_{seed}',
    setup=setup,
    title=f'{name}, seed {seed}',
  )


def _stock(anchor: Any, models: list[Any], unit: Any) -> Any:
  return merging.model_stock(
    anchor, models, unit=unit, layers=clip.clip_layers
  ).params


def _measure(
  setup: setup_lib.Setup,
  models: Models,
  tests: list[data.Benchmark],
  shifts: list[data.Benchmark],
) -> dict[tuple[str, Any], np.ndarray]:
  """float64[2, seeds], percent: in distribution, and mean of the shifts."""
  flat = [model for of_seeds in models.values() for model in of_seeds]
  accuracy = np.array(
    [
      [100 * score.accuracy for score in setup.evaluate(flat, spec)]
      for spec in [*tests, *shifts]
    ]
  )
  both = np.stack(
    [accuracy[: len(tests)].mean(0), accuracy[len(tests) :].mean(0)]
  )
  ends = np.cumsum([len(of_seeds) for of_seeds in models.values()])
  return dict(zip(models, np.split(both, ends[:-1], axis=1), strict=True))


def _shown(values: dict[str, Any]) -> str:
  sd = values['sd']  # None of one seed
  return f'{values["mean"]:.1f}' + ('' if sd is None else f' ± {sd:.1f}')


def _table(
  measured: dict[tuple[str, Any], np.ndarray],
) -> list[dict[str, Any]]:
  return [
    {
      'ablation': ablation,
      'setting': setting,
      **{
        key: {
          'mean': row.mean(),
          'sd': row.std(ddof=1) if len(row) > 1 else float('nan'),
          'seeds': row,
        }
        for key, row in zip(('accuracy', 'shifts'), both, strict=True)
      },
    }
    for (ablation, setting), both in measured.items()
  ]


if __name__ == '__main__':
  main()
