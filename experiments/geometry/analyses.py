"""All analyses of the models of a workdir, as data and as figures."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import json
import logging
import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np

from experiments.geometry import consistency
from experiments.geometry import distance
from experiments.geometry import family as family_lib
from experiments.geometry import landscape
from experiments.geometry import points
from experiments.geometry import scatter
from experiments.geometry import shell
from modelstock_jax import data
from modelstock_jax.formats import write as write_lib
from modelstock_jax.report import plots
from modelstock_jax.report import results

_log = logging.getLogger(__name__)

# In this order; each has `LEAST`, the least number of models, `report` and
# `draw`.
PARTS = {
  'consistency': consistency,
  'shell': shell,
  'landscape': landscape,
  'distance': distance,
  'scatter': scatter,
}
EVALUATED = ('landscape', 'distance', 'scatter')  # these read benchmarks


def analyze(
  workdir: str | pathlib.Path,
  *,
  only: Sequence[str] = (),
  benchmarks: Sequence[str] = (),
  get_task: Callable[..., Any] | None = None,
) -> list[pathlib.Path]:
  """Write analysis/NAME.json and plots/NAME.svg and .png into a workdir.

  Args:
    workdir: a run, a comparison or a grid, all of it finished.
    only: names of `PARTS`; none is all for which there are enough models.
    benchmarks: names; none is those of the run's config.
    get_task: see `family.read`.

  Returns:
    The JSON files.

  Raises:
    FileNotFoundError: there is no such workdir, or data sets are missing.
    ValueError: the workdir is unfinished; a part is not known, or was asked
      for and takes more models; a benchmark is not known, or none is in
      distribution.
  """
  unknown = [name for name in only if name not in PARTS]
  if unknown:
    raise ValueError(
      f'--only: there is no {", ".join(map(repr, unknown))}; known are '
      f'{", ".join(PARTS)}.'
    )
  workdir = pathlib.Path(workdir).expanduser()
  family, config = family_lib.read(workdir, get_task)
  chosen = choose(workdir, only, len(family.models), 'head' in family.anchor)
  names = tuple(benchmarks or config.evaluate.benchmarks)
  if set(chosen) & set(EVALUATED):
    _check_benchmarks(names, config.data.data_dir or None)
  gram = family_lib.measure(family.anchor, family.models)
  # Only a run's classifiers can be evaluated, and only if a part needs it.
  scorer = functools.cache(lambda: points.scorer(config, family.anchor))
  reports = {
    'consistency': lambda: consistency.report(gram, family),
    'shell': lambda: shell.report(gram, family.names),
    'landscape': lambda: landscape.report(family, scorer(), names),
    'distance': lambda: distance.report(family, gram, scorer(), names),
    'scatter': lambda: scatter.report(family, scorer(), names),
  }
  paths = []
  for name in chosen:
    report = plain(reports[name]())
    path = workdir / 'analysis' / f'{name}.json'
    write(report, path)
    with mpl.rc_context(plots.STYLE):
      figures = PARTS[name].draw(report)
    for suffix, figure in figures.items():
      plots.save(figure, workdir / 'plots' / f'{name}{suffix}')
    _log.info('%s: %s', name, path)
    paths.append(path)
  return paths


def choose(
  workdir: pathlib.Path, only: Sequence[str], number: int, classify: bool
) -> list[str]:
  """Choose the parts that can be made; log those that are left out.

  Args:
    workdir: of the models, for messages.
    only: names of `PARTS`; none is all.
    number: of models.
    classify: True if the models have a head.

  Returns:
    Names of `PARTS`.

  Raises:
    ValueError: a part of `only` cannot be made, or none can.
  """
  least = {name: PARTS[name].LEAST for name in only or PARTS}
  short = [name for name in least if number < least[name]]
  if short and (only or len(short) == len(PARTS)):
    raise ValueError(
      f'{workdir} has {number} model{"s" if number > 1 else ""}; '
      + ', '.join(f'{name} takes {least[name]} or more' for name in short)
      + '. Train more seeds, or with a greater merge.num_models.'
    )
  for name in short:
    _log.warning(
      '%s is left out: it takes %d models or more, here are %d.',
      name,
      least[name],
      number,
    )
  chosen = [name for name in least if name not in short]
  evaluated = [name for name in chosen if name in EVALUATED]
  if evaluated and not classify:
    why = (
      f'{workdir} has models without a head, which {", ".join(evaluated)} '
      'cannot evaluate'
    )
    if only:
      raise ValueError(f'{why}. The others can: --only=consistency,shell.')
    _log.warning('%s: left out.', why)
    chosen = [name for name in chosen if name not in EVALUATED]
  return chosen


def log_to_stderr() -> None:
  """Print what this project logs, with the time."""
  logging.basicConfig(format='%(asctime)s %(message)s', force=True)
  for package in ('experiments', 'modelstock_jax'):
    logging.getLogger(package).setLevel(logging.INFO)


def write(report: dict[str, Any], path: pathlib.Path) -> None:
  """Write a JSON file, whole or not at all.

  Args:
    report: as `plain` returns it.
    path: of the file; its folder is created if it is absent.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(report, indent=1, allow_nan=False)
  write_lib.write_text(path, text + '\n')


def plain(value: Any) -> Any:
  """Return values as JSON has them: null for what is not finite.

  Args:
    value: dicts, lists and arrays of numbers and texts.

  Returns:
    The same with Python's numbers, rounded to seven digits.

  >>> plain({'a': np.array([1 / 3, np.nan])})
  {'a': [0.3333333, None]}
  """
  if isinstance(value, dict):
    return {str(key): plain(each) for key, each in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [plain(each) for each in value]
  if isinstance(value, (float, np.floating)):
    return float(f'{value:.7g}') if np.isfinite(value) else None
  return int(value) if isinstance(value, np.integer) else value


def _check_benchmarks(names: Sequence[str], data_dir: str | None) -> None:
  """Raise for missing benchmarks at once, before anything takes long."""
  if not any(name in results.IN_DISTRIBUTION for name in names):
    raise ValueError(
      f'--benchmarks={",".join(names)}: give one of '
      f'{", ".join(results.IN_DISTRIBUTION)}, and shifts of it.'
    )
  missing = []
  for spec in [data.find_benchmark(name) for name in names]:
    try:
      data.open_benchmark(spec, data_dir)
    except FileNotFoundError as error:
      missing.append(f'{spec.name}: {error}')
  if missing:
    raise FileNotFoundError('\n'.join(missing))
