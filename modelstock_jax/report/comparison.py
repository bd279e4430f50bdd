"""The comparison behind the demo: six ways to use two fine-tuned models."""

from collections.abc import Sequence
import functools
import pathlib
from typing import Any

import jax

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.formats import runs
from modelstock_jax.report import models as models_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import evaluation
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import task as task_lib
from modelstock_jax.training import workdir as workdir_lib

MODES = ('end', 'epoch')

# Params of single models, by method and seed.
Models = dict[tuple[str, int], Any]


def train(
  config: config_lib.Config, workdir: str | pathlib.Path, *, seeds: int
) -> tuple[setup_lib.Setup, Models]:
  """Train with one merge at the end and with one every epoch.

  Both runs of a seed start from the same anchor and see the same batches. The
  models of the run that merges at the end also give the single fine-tuned
  model (the first), the uniform soup and WiSE-FT (of the first).

  Args:
    config: `seed` is the first seed; `merge.every` is set here.
    workdir: takes a folder for each run; finished ones are not run again.
    seeds: number of runs of each mode.

  Returns:
    What the runs shared, and the models of every method and seed.
  """
  setup = clip_task.prepare(config)
  with workdir_lib.claim(workdir, config.to_json()) as folder:
    models: Models = {}
    for seed in range(config.seed, config.seed + seeds):
      once, again = (
        loop.train(
          config_lib.override(
            config, [f'--config.seed={seed}', f'--config.merge.every={mode}']
          ),
          folder / f'seed_{seed}' / mode,
          setup=setup,
          title=f'seed {seed}, merge at {mode}',
        )
        for mode in MODES
      )
      single = merging.unstack(once.models)[0]
      of_seed = {
        'zero_shot': setup.anchor,
        'fine_tuned': single,
        'uniform_soup': merging.uniform_soup(once.models, stacked=True),
        'wise_ft_0.5': merging.wise_ft(setup.anchor, single, alpha=0.5),
        'model_stock_end': once.merged.params,
        'model_stock_epoch': again.merged.params,
      }
      models |= {(method, seed): params for method, params in of_seed.items()}
  return setup, models


def score(
  setup: setup_lib.Setup, models: Models, benchmarks: Sequence[str]
) -> list[evaluation.Row]:
  """Evaluate all models of a comparison.

  Args:
    setup: of the runs.
    models: by method and seed.
    benchmarks: names.

  Returns:
    A row for each model and benchmark.

  Raises:
    ValueError: for an unknown benchmark.
  """
  # The anchor is the zero-shot model of every seed: evaluated once.
  different = {id(params): params for params in models.values()}
  rows = []
  for spec in map(data.find_benchmark, benchmarks):
    scores = setup.evaluate(list(different.values()), spec)
    score_of = dict(zip(different, scores, strict=True))
    for (method, seed), params in models.items():
      rows.append(_row(method, spec, seed, score_of[id(params)]))
  return rows


def evaluate(
  workdir: str | pathlib.Path,
  config: config_lib.Config,
  task: task_lib.Task,
  benchmarks: Sequence[str] = (),
  sources: setup_lib.Sources | None = None,
) -> list[evaluation.Row]:
  """Evaluate the anchor and the merged model of a run, on all devices.

  Args:
    workdir: of the run.
    config: of the run.
    task: of the run.
    benchmarks: names; () takes those of the config.
    sources: of the run, whose validation examples are evaluated where no
      benchmark is named.

  Returns:
    Rows of the methods 'zero_shot' and `method_of(config.merge)`.

  Raises:
    FileNotFoundError: the run has no checkpoint, or data sets are missing: all
      of them are listed before anything is evaluated.
    ValueError: for an unknown benchmark; or `Task.score` has no 'accuracy'.
  """
  benchmarks = benchmarks or config.evaluate.benchmarks
  on_validation = sources is not None and not benchmarks
  opened = [] if on_validation else _open(benchmarks, config.data.data_dir)
  step = runs.find(pathlib.Path(workdir).expanduser())
  if step is None:
    raise FileNotFoundError(
      f'{workdir}: there is no checkpoint; train first, with this --workdir.'
    )
  placement = sharding.place()
  anchor, variables, consts = setup_lib.start(task, placement, config.seed)
  evaluate = setup_lib.evaluator(
    task, placement, config.evaluate, config.data, config.model, consts
  )
  read = functools.partial(runs.read, step, shardings=placement.replicated)
  merged = read(runs.MERGED)
  of_merged = state_lib.average(read(runs.STATE, part='variables'))
  models = {
    'zero_shot': (anchor, variables),
    method_of(config.merge): (merged, of_merged),
  }
  rows = [
    _row(method, spec, config.seed, evaluate([params], spec, variables)[0])
    for spec, _ in opened
    for method, (params, variables) in models.items()
  ]
  if on_validation:
    for method, model in models.items():
      means = evaluate.validate(
        *model, sources.validation, sources.read_validation
      )
      if 'accuracy' not in means:
        raise ValueError(
          f"Task.score: there is no 'accuracy' among {sorted(means)}, which "
          'results.json records. Return one as well, or read metrics.jsonl.'
        )
      accuracy, n = means['accuracy'], int(means['n'])
      rows.append(
        evaluation.Row(method, 'validation', config.seed, accuracy, n)
      )
  return rows


def method_of(merge: config_keys.Merge) -> str:
  """Return the name of a run's merge in its rows; of one model, the model's.

  >>> method_of(config_lib.defaults().merge)
  'model_stock_epoch'
  """
  return 'fine_tuned' if merge.num_models == 1 else f'model_stock_{merge.every}'


def evaluate_model(
  model: models_lib.Model,
  name: str,
  benchmarks: Sequence[str] = (),
  *,
  data_dir: str | None = None,
  batch_size: int = 256,
) -> list[evaluation.Row]:
  """Evaluate one classifier, on all devices.

  Args:
    model: with a head.
    name: the method of its rows; that of a run has its own.
    benchmarks: names; () takes those of the run.
    data_dir: the folder of the prepared data sets; None takes that of the run,
      or the bundled ones.
    batch_size: examples in a step.

  Returns:
    A row for each benchmark.

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
    name, seed, dtype = method_of(run.merge), run.seed, run.model.dtype
    benchmarks = benchmarks or run.evaluate.benchmarks
    data_dir = data_dir or run.data.data_dir
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
  evaluate = evaluation.Evaluator(
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
  return [
    _row(name, spec, seed, evaluate([params], spec)[0]) for spec, _ in opened
  ]


def _open(
  benchmarks: Sequence[str], data_dir: str | None
) -> list[tuple[data.Benchmark, Any]]:
  """Open the benchmarks; raise one error for all that is missing."""
  if not benchmarks:
    raise ValueError(
      'No benchmarks: give --benchmarks=a,b or set evaluate.benchmarks; known '
      f'are {", ".join(data.BENCHMARKS)}.'
    )
  opened, missing = [], []
  for spec in map(data.find_benchmark, benchmarks):
    try:
      opened.append((spec, data.open_benchmark(spec, data_dir)))
    except FileNotFoundError as error:
      missing.append(f'{spec.name}: {error}')
  if missing:
    raise FileNotFoundError('\n'.join(missing))
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


def _row(
  method: str, spec: data.Benchmark, seed: int, score: evaluation.Score
) -> evaluation.Row:
  return evaluation.Row(method, spec.name, seed, score.accuracy, *score[1:])
