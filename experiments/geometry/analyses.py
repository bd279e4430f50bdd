"""All analyses of the models of a workdir, as data and as figures."""

from collections.abc import Callable
from collections.abc import Sequence
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
from modelstock_jax.formats import write
from modelstock_jax.report import plots

_log = logging.getLogger(__name__)

# In this order; each has `LEAST`, the least number of models, `report` and
# `draw`.
PARTS: dict[str, Any] = {
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
  allow_pickle: bool = False,
) -> list[pathlib.Path]:
  """Write analysis/NAME.json and plots/NAME.svg and .png into a workdir.

  Args:
    workdir: a run, a comparison or a grid, all of it finished.
    only: names of `PARTS`; none is all for which there are enough models.
    benchmarks: names; none is those of the run's config.
    get_task: see `family.read`.
    allow_pickle: likewise.

  Returns:
    The JSON files.

  Raises:
    FileNotFoundError: there is no such workdir, or a data set is missing.
    ValueError: the workdir is unfinished; a part is not known, or was asked
      for and requires more models; a benchmark is not known, or none is in
      distribution.
  """
  if unknown := sorted(set(only) - set(PARTS)):
    raise ValueError(
      f'--only: there is no {", ".join(map(repr, unknown))}; known are '
      f'{", ".join(PARTS)}.'
    )
  workdir = pathlib.Path(workdir).expanduser()
  family, config = family_lib.read(workdir, get_task, allow_pickle)
  chosen = choose(only, len(family.models), 'head' in family.anchor)
  score: Any = None
  if set(chosen) & set(EVALUATED):
    names = benchmarks or config.evaluate.benchmarks
    score = points.scorer(config, family, names)
  paths = []
  for name in chosen:
    scores = (score,) if name in EVALUATED else ()
    report = plain(PARTS[name].report(family, *scores))
    path = workdir / 'analysis' / f'{name}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    write.write_text(path, json.dumps(report, indent=1, allow_nan=False) + '\n')
    with mpl.rc_context(plots.STYLE):
      figure = PARTS[name].draw(report)
    # 'scatter' is the name of a figure of the report.
    stem = 'scatter_wise_ft' if name == 'scatter' else name
    plots.save(figure, workdir / 'plots' / stem)
    _log.info('%s: %s', name, path)
    paths.append(path)
  return paths


def choose(only: Sequence[str], number: int, classify: bool) -> list[str]:
  """Choose the parts that can be made; log those that are left out.

  Args:
    only: names of `PARTS`; none is all.
    number: of models.
    classify: True if the models have a head.

  Returns:
    Names of `PARTS`.

  Raises:
    ValueError: a part of `only` cannot be made, or none can.
  """
  chosen = [
    name
    for name in only or PARTS
    if number >= PARTS[name].LEAST and (classify or name not in EVALUATED)
  ]
  left_out = [name for name in only or PARTS if name not in chosen]
  if left_out:
    message = (
      f'{", ".join(left_out)}: cannot be made of {number} models'
      f'{"" if classify else " without a head"}. shell and distance require 4 '
      'models, the others 2; landscape, distance and scatter a head. Train '
      'more seeds, or with a greater merge.num_models.'
    )
    if only or not chosen:
      raise ValueError(message)
    _log.warning('Left out: %s', message)
  return chosen


def log_to_stderr() -> None:
  """Print what this project logs, with the time."""
  logging.basicConfig(format='%(asctime)s %(message)s', force=True)
  for package in ('experiments', 'modelstock_jax'):
    logging.getLogger(package).setLevel(logging.INFO)


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
