"""The comparison behind the demo: seven ways to use two fine-tuned models."""

from collections.abc import Sequence
import functools
import itertools
import json
import logging
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.data import corruptions as corruptions_lib
from modelstock_jax.formats import runs
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write as write_lib
from modelstock_jax.report import differences
from modelstock_jax.report import models as models_lib
from modelstock_jax.report import results
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import evaluation
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import task as task_lib
from modelstock_jax.training import workdir as workdir_lib

_log = logging.getLogger(__name__)

# Flags of the runs of a seed, by the mode of their merges.
MODES = {
  'end': ['--config.merge.every=end'],
  'epoch': ['--config.merge.every=epoch', '--config.merge.opt_state=keep'],
  'epoch_reset': [
    '--config.merge.every=epoch',
    '--config.merge.opt_state=reset',
  ],
}

# Params of single models, by method and seed.
Models = dict[tuple[str, int], Any]

# Of M models and n examples, float32[M, n] by benchmark; and the classes to
# choose from, if known.
Tables = dict[str, tuple[np.ndarray, int | None]]


class Measured(NamedTuple):
  """Accuracies, and differences of those that are compared."""

  rows: list[evaluation.Row]
  differences: list[differences.Difference]


def train(
  config: config_lib.Config, workdir: str | pathlib.Path, *, seeds: int
) -> tuple[setup_lib.Setup, Models]:
  """Train with one merge at the end and with one every epoch.

  After the merges of epochs, the moments of the optimizer are kept, or reset in
  a run of its own. All runs of a seed start from the same anchor and see the
  same batches. The models of the run that merges at the end also give the
  single fine-tuned model (the first), the uniform soup and WiSE-FT (of it).

  Args:
    config: `seed` is the first seed; `merge.every` and `merge.opt_state`
      are set here.
    workdir: takes a folder for each run; finished ones are not run again.
    seeds: number of runs of each mode.

  Returns:
    What the runs shared, and the models of every method and seed.
  """
  setup = clip_task.prepare(config)
  with workdir_lib.claim(workdir, config.to_json()) as folder:
    models: Models = {}
    for seed in range(config.seed, config.seed + seeds):
      once, kept, reset = (
        loop.train(
          config_lib.override(config, [f'--config.seed={seed}', *flags]),
          folder / f'seed_{seed}' / mode,
          setup=setup,
          title=f'seed {seed}, merge at {mode}',
        )
        for mode, flags in MODES.items()
      )
      single = merging.unstack(once.models)[0]
      of_seed = {
        'zero_shot': setup.anchor,
        'fine_tuned': single,
        'uniform_soup': merging.uniform_soup(once.models, stacked=True),
        'wise_ft_0.5': merging.wise_ft(setup.anchor, single, alpha=0.5),
        'model_stock_end': once.merged.params,
        'model_stock_epoch': kept.merged.params,
        'model_stock_epoch_reset': reset.merged.params,
      }
      models |= {(method, seed): params for method, params in of_seed.items()}
  return setup, models


def score(
  setup: setup_lib.Setup, models: Models, benchmarks: Sequence[str]
) -> Measured:
  """Evaluate all models of a comparison.

  Args:
    setup: of the runs.
    models: by method and seed.
    benchmarks: names.

  Returns:
    A row for each model and benchmark, and the differences.

  Raises:
    ValueError: for an unknown benchmark.
  """
  # The anchor is the zero-shot model of every seed: evaluated once.
  different = {id(params): (params, {}) for params in models.values()}
  places = [[*different].index(id(params)) for params in models.values()]
  tables: Tables = {}
  for spec in map(data.find_benchmark, benchmarks):
    table, choices = setup.evaluate.correct([*different.values()], spec)
    tables[spec.name] = table[places], choices
  return _measured(tables, [*models])


def _measured(
  tables: Tables,
  models: Sequence[tuple[str, int]],
) -> Measured:
  """Make rows of float[M, n] by benchmark, of models by method and seed."""
  rows, accuracies = [], {}
  for name, (table, choices) in tables.items():
    of_method = accuracies.setdefault(name, {})
    for (method, seed), mine in zip(models, table, strict=True):
      mean, n = float(mine.sum(dtype=np.float64) / len(mine)), len(mine)
      rows.append(evaluation.Row(method, name, seed, mean, n, choices))
      of_method.setdefault(method, []).append(mine)
  return Measured(rows, differences.compare(accuracies))


def save(measured: Measured, path: pathlib.Path) -> None:
  """Write rows as JSON, and their differences next to them."""
  paired = path.with_suffix(differences.SUFFIX)
  paired.unlink(missing_ok=True)  # never those of other rows
  results.save(measured.rows, path)
  if measured.differences:
    texts = [each._asdict() for each in measured.differences]
    write_lib.write_text(paired, json.dumps(texts, indent=2) + '\n')


def evaluate(
  workdir: str | pathlib.Path,
  config: config_lib.Config,
  task: task_lib.Task,
  benchmarks: Sequence[str] = (),
  sources: setup_lib.Sources | None = None,
  *,
  corruptions: bool = False,
) -> Measured:
  """Evaluate the models of a run, on all devices.

  These are the anchor, the models before the last merge, their average, WiSE-FT
  of the first, and the merge.

  Args:
    workdir: of the run.
    config: of the run.
    task: of the run.
    benchmarks: names of benchmarks or groups, 'SET/SPLIT', or 'validation', the
      validation examples of `sources`; () takes those of the config, or else
      'validation'. A benchmark of a group that is missing is left out, and
      named by a warning.
    sources: of the run.
    corruptions: True evaluates what is in distribution under those of
      `data.corruptions` as well.

  Returns:
    Rows of the methods of `models.of_run`, and the differences.

  Raises:
    FileNotFoundError: the run has no checkpoint, or data sets are missing: all
      of them are listed before anything is evaluated.
    ValueError: for an unknown benchmark, or one of other classes; or
      `Task.score` has no 'accuracy'.
  """
  names = [*(benchmarks or config.evaluate.benchmarks)]
  specs = []
  if sources and (not names or results.VALIDATION in names):
    specs = [data.Benchmark(results.VALIDATION, config.data.dataset)]
    names = [name for name in names if name != results.VALIDATION]
  if names or not specs:
    opened = _open(names, config.data.data_dir)
    for spec, source in opened:
      specs.append(spec)
      if '/' in spec.name:
        _check_split(spec.name, source, config.data, sources)
  step = runs.find(pathlib.Path(workdir).expanduser())
  if step is None:
    raise FileNotFoundError(
      f'{workdir}: there is no checkpoint; train first, with this --workdir.'
    )
  placement = sharding.place()
  anchor, variables, consts = setup_lib.start(task, placement, config.seed)
  evaluator = setup_lib.evaluator(config, task, placement, consts)
  read = functools.partial(runs.read, step, shardings=placement.replicated)
  models = models_lib.of_run(step, config.merge, (anchor, variables), read)
  tables = _evaluate(evaluator, [*models.values()], specs, corruptions, sources)
  return _measured(tables, [(method, config.seed) for method in models])


def _check_split(
  name: str, source: Any, of_run: config_keys.Data, sources: Any
) -> None:
  """Raise for a 'SET/SPLIT' whose classes are not those of the run."""
  if sources:
    classes = sources.train.class_names
  else:
    classes = data.class_names(of_run.dataset, data_dir=of_run.data_dir)
  if classes and classes != source.class_names:
    raise ValueError(
      f'{name}: its classes are not those of the run, in that order: '
      f'{text_lib.shown(source.class_names)}, {text_lib.shown(classes)}.'
    )


def _evaluate(
  evaluator: evaluation.Evaluator,
  models: Sequence[tuple[Any, Any]],
  specs: Sequence[data.Benchmark],
  corruptions: bool,
  sources: setup_lib.Sources | None = None,
) -> Tables:
  """Evaluate models on benchmarks, and under corruptions what is no shift."""
  tests, _ = results.split([spec.name for spec in specs])
  tables: Tables = {}

  def measure(spec, kind=None):
    if not sources or spec.name != results.VALIDATION:
      return evaluator.correct(models, spec._replace(corruption=kind))
    read = sources.read_validation
    read = corruptions_lib.corrupted(read, kind) if kind else read
    return evaluator.accuracies(models, sources.validation, read), None

  for spec in specs:
    tables[spec.name] = _, choices = measure(spec)
    if corruptions and spec.name in tests:
      corrupted = {
        f'{spec.name}@{kind}': measure(spec, kind)
        for kind in corruptions_lib.CORRUPTIONS
      }
      mean = np.mean([table for table, _ in corrupted.values()], axis=0)
      tables |= {spec.name + results.MEAN: (mean, choices), **corrupted}
  return tables


def evaluate_model(
  model: models_lib.Model,
  name: str,
  benchmarks: Sequence[str] = (),
  *,
  data_dir: str | None = None,
  batch_size: int = 256,
  corruptions: bool = False,
) -> Measured:
  """Evaluate one classifier, on all devices.

  Args:
    model: with a head.
    name: the method of its rows; that of a run has its own.
    benchmarks: see `evaluate`; () takes those of the run, and 'imagenet' for a
      head of 1000 classes.
    data_dir: the folder of the prepared data sets; None takes that of the run,
      or the bundled ones.
    batch_size: examples in a step.
    corruptions: see `evaluate`.

  Returns:
    A row for each benchmark, and no differences.

  Raises:
    FileNotFoundError: there is no head, or data sets are missing: all of them
      are listed.
    ValueError: for an unknown benchmark, or one of other classes than the
      head's, or in another order: before anything is evaluated.
  """
  seed, dtype = 0, 'float32'
  if run := model.run:
    advice = f'{name}: give --workdir instead'
    config_lib.check_task(run.hooks, advice, None)
    name, seed, dtype = (
      models_lib.method_of(run.merge),
      run.seed,
      run.model.dtype,
    )
    benchmarks = benchmarks or run.evaluate.benchmarks
    data_dir = data_dir or run.data.data_dir
  elif model.num_classes == clip_task.IMAGENET_CLASSES:
    benchmarks = benchmarks or ('imagenet',)
  if model.num_classes is None:
    raise FileNotFoundError(
      f'{name} has no classification head, which is {clip.saving.HEAD} in its '
      'folder. Give a folder as `modelstock convert` writes it.'
    )
  opened = _open(benchmarks, data_dir)
  for spec, source in opened:
    _check_classes(name, model, spec.name, source.class_names)
  placement = sharding.place()
  vision = model.config.vision
  evaluator = evaluation.Evaluator(
    clip_task.classification(
      clip.classifier(model.config, model.num_classes, dtype),
      functools.partial(data.normalize, mean=model.mean, std=model.std),
      vision,
    ),
    placement,
    batch_size=batch_size,
    data_dir=data_dir,
    image_size=vision.image_size,
  )
  params = {part: model.params[part] for part in ('image', 'head')}
  params = jax.device_put(params, placement.replicated)
  specs = [spec for spec, _ in opened]
  tables = _evaluate(evaluator, [(params, {})], specs, corruptions)
  return _measured(tables, [(name, seed)])


def _open(
  benchmarks: Sequence[str], data_dir: str | None
) -> list[tuple[data.Benchmark, Any]]:
  """Open the benchmarks; raise one error for all of them that are missing."""
  if not benchmarks:
    raise ValueError(
      'No benchmarks: give --benchmarks=a,b or set evaluate.benchmarks; known '
      f'are {", ".join(data.BENCHMARKS)}.'
    )
  members = (
    data.GROUPS[name].benchmarks if name in data.GROUPS else [name]
    for name in benchmarks
  )
  opened, missing = [], {}
  for name in dict.fromkeys(itertools.chain(*members)):
    spec = data.find_benchmark(name)
    try:
      opened.append((spec, data.open_benchmark(spec, data_dir)))
    except FileNotFoundError as error:
      missing[name] = f'{name}: {error}'
  if missing and (not opened or missing.keys() & {*benchmarks}):
    raise FileNotFoundError('\n'.join(missing.values()))
  for text in missing.values():
    _log.warning('Left out, as it is missing: %s', text)
  return opened


def _check_classes(
  name: str, model: models_lib.Model, benchmark: str, classes: Sequence[str]
) -> None:
  """Raise for a head whose classes are not those of the data."""
  if model.num_classes != len(classes):
    raise ValueError(
      f'{name} has a head of {model.num_classes} classes, {benchmark} has '
      f'{len(classes)}. Evaluate on data of the classes it was made for.'
    )
  labels = model.labels or classes
  if wrong := [k for k, label in enumerate(labels) if label != classes[k]]:
    k = wrong[0]
    raise ValueError(
      f'{name}: {len(wrong)} labels of its head are not those of {benchmark}: '
      f'class {k} is {labels[k]!r}, and {classes[k]!r} in the data. They must '
      'be the same, in the same order: if labels.json has other names for '
      "them, write the data set's into it."
    )
