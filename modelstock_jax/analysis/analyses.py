"""All that is known of a family of models, as data and as figures."""

from collections.abc import Sequence
import functools
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np

from modelstock_jax import data
from modelstock_jax.analysis import consistency
from modelstock_jax.analysis import distance
from modelstock_jax.analysis import family as family_lib
from modelstock_jax.analysis import figures
from modelstock_jax.analysis import landscape
from modelstock_jax.analysis import plots
from modelstock_jax.analysis import points
from modelstock_jax.analysis import results
from modelstock_jax.analysis import scatter
from modelstock_jax.analysis import shell

_log = logging.getLogger(__name__)

# In this order; those before EVALUATED read no benchmark.
PARTS = ('consistency', 'shell', 'landscape', 'distance', 'scatter')
EVALUATED = ('landscape', 'distance', 'scatter')
# Models that a part takes at least.
LEAST = {
  'consistency': 2,
  'shell': shell.LEAST,
  'landscape': 2,
  'distance': shell.LEAST,
  'scatter': 2,
}


def analyze(
  workdir: str | pathlib.Path,
  *,
  only: Sequence[str] = (),
  benchmarks: Sequence[str] = (),
) -> list[pathlib.Path]:
  """Writes analysis/NAME.json and plots/NAME.svg and .png into a workdir.

  Args:
    workdir: of a run, a comparison or a grid, all of it finished.
    only: names of `PARTS`; none is all for which there are enough models.
    benchmarks: names; none is those of the run's config.

  Returns:
    The JSON files.

  Raises:
    FileNotFoundError: there is no such workdir, or data sets are missing.
    ValueError: the workdir is unfinished; a part is not known, or was asked
      for and takes more models; a benchmark is not known, or none is in
      distribution.
  """
  _check_names(only)
  workdir = pathlib.Path(workdir).expanduser()
  family, config = family_lib.read(workdir)
  number = len(family.models)
  short = [name for name in only or PARTS if number < LEAST[name]]
  if short and (only or len(short) == len(PARTS)):
    raise ValueError(
      f'{workdir} has {number} model{"s" if number > 1 else ""}; '
      + ', '.join(f'{name} takes {LEAST[name]} or more' for name in short)
      + '. Train more seeds, or with a greater merge.num_models.'
    )
  for name in short:
    _log.warning(
      '%s is left out: it takes %d models or more, here are %d.',
      name,
      LEAST[name],
      number,
    )
  chosen = [name for name in only or PARTS if name not in short]
  evaluated = [name for name in chosen if name in EVALUATED]
  if evaluated and config.train.loss == 'contrastive':
    why = (
      f'{workdir} was trained with both towers (train.loss=contrastive), which '
      f'{", ".join(evaluated)} cannot evaluate'
    )
    if only:
      raise ValueError(f'{why}. The others can: --only=consistency,shell.')
    _log.warning('%s: left out.', why)
    chosen = [name for name in chosen if name not in EVALUATED]
  names = tuple(benchmarks or config.evaluate.benchmarks)
  if set(chosen) & set(EVALUATED):
    _check_benchmarks(names, config.data.data_dir or None)
  gram = family_lib.measure(family.anchor, family.models)
  # Only a run's classifiers can be evaluated, and only if one asks.
  scorer = functools.cache(lambda: points.scorer(config, family.anchor))
  written = []
  for name in chosen:
    if name == 'consistency':
      found = consistency.report(gram, family)
    elif name == 'shell':
      found = shell.report(gram, family.names)
    elif name == 'landscape':
      found = landscape.report(family, scorer(), names)
    elif name == 'distance':
      found = distance.report(family, gram, scorer(), names)
    else:
      found = scatter.report(family, scorer(), names)
    found = plain(found)
    path = workdir / 'analysis' / f'{name}.json'
    write(found, path)
    for suffix, figure in figures.draw(name, found).items():
      plots.save(figure, workdir / 'plots' / f'{name}{suffix}')
    _log.info('%s: %s', name, path)
    written.append(path)
  return written


def write(found: dict[str, Any], path: pathlib.Path) -> None:
  """Writes a JSON file, whole or not at all.

  Args:
    found: what `plain` gives.
    path: of the file; its folder is made if need be.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  text = json.dumps(found, indent=1, allow_nan=False)
  temporary.write_text(text + '\n', encoding='utf-8')
  os.replace(temporary, path)


def plain(value: Any) -> Any:
  """Values as JSON has them: null for what is no number.

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


def _check_names(only: Sequence[str]) -> None:
  unknown = [name for name in only if name not in PARTS]
  if unknown:
    raise ValueError(
      f'--only: there is no {", ".join(map(repr, unknown))}; known are '
      f'{", ".join(PARTS)}.'
    )


def _check_benchmarks(names: Sequence[str], data_dir: str | None) -> None:
  """Says at once what is missing, before anything takes long."""
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
