"""The comparison behind the demo: six ways to use two fine-tuned models."""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
import pathlib
import time
from typing import Any
from typing import NamedTuple

import jax

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.formats import runs
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import loop
from modelstock_jax.training import metrics
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import task as task_lib
from modelstock_jax.training import workdir as workdir_lib

ALPHA = 0.5  # of WiSE-FT

MODES = ('end', 'epoch')


# Lines of metrics.jsonl, by seed and mode.
Histories = dict[tuple[int, str], list[dict[str, Any]]]


class Comparison(NamedTuple):
  """The results of a comparison."""

  rows: list[evaluation.Row]
  histories: Histories
  seconds: dict[str, float]  # of its parts


# Params of single models, by method and seed.
Models = dict[tuple[str, int], Any]


def compare(
  config: config_lib.ConfigDict, workdir: str | pathlib.Path, *, seeds: int
) -> Comparison:
  """Train with one merge at the end and with one every epoch, and evaluate.

  Args:
    config: see `train`.
    workdir: see `train`.
    seeds: number of runs of each mode.

  Returns:
    A `Comparison` over `config.evaluate.benchmarks`.

  Raises:
    ValueError: as `loop.train`; or for an unknown benchmark.
  """
  specs = [data.find_benchmark(name) for name in config.evaluate.benchmarks]
  start = time.perf_counter()
  setup, models, histories = train(config, workdir, seeds=seeds)
  trained = time.perf_counter()
  # The anchor is the zero-shot model of every seed: evaluated once.
  different = {id(params): params for params in models.values()}
  rows = []
  for spec in specs:
    scores = setup.evaluate(list(different.values()), spec)
    score_of = dict(zip(different, scores, strict=True))
    for (method, seed), params in models.items():
      score = score_of[id(params)]
      rows.append(_row(method, spec, seed, score))
  evaluated = time.perf_counter()
  return Comparison(
    rows,
    histories,
    {'training': trained - start, 'evaluation': evaluated - trained},
  )


def train(
  config: config_lib.ConfigDict, workdir: str | pathlib.Path, *, seeds: int
) -> tuple[setup_lib.Setup, Models, Histories]:
  """Train all models of a comparison.

  Both runs of a seed start from the same anchor and see the same batches. The
  models of the run that merges at the end also give the single fine-tuned
  model (the first), the uniform soup and WiSE-FT (of the first).

  Args:
    config: `seed` is the first seed; `merge.every` is set here.
    workdir: takes a folder for each run; finished ones are not run again.
    seeds: number of runs of each mode.

  Returns:
    What the runs shared, the models of every method and seed, and the
    metrics of every run.
  """
  setup = clip_task.prepare(config)
  workdir = workdir_lib.claim(workdir, config)
  models: Models = {}
  histories: Histories = {}
  for seed in range(config.seed, config.seed + seeds):
    models['zero_shot', seed] = setup.anchor
    for mode in MODES:
      where = workdir / f'seed_{seed}' / mode
      run = config_lib.override(
        config, [f'--config.seed={seed}', f'--config.merge.every={mode}']
      )
      result = loop.train(
        config_lib.validate(run),
        where,
        setup=setup,
        title=f'seed {seed}, merge at {mode}',
      )
      histories[seed, mode] = metrics.read(where)
      for method, params in _methods(mode, setup.anchor, result):
        models[method, seed] = params
  return setup, models, histories


def evaluate(
  config: config_lib.ConfigDict,
  workdir: str | pathlib.Path,
  benchmarks: Sequence[str],
  task: task_lib.Task,
  sources: setup_lib.Sources | None = None,
) -> list[evaluation.Row]:
  """Accuracy of the anchor and of a run's merged model, on all devices.

  Args:
    config: of the run.
    workdir: of the run.
    benchmarks: names.
    task: of the run.
    sources: of the run, whose validation examples are evaluated where no
      benchmark is named.

  Returns:
    Rows of the methods 'zero_shot' and `method_of(config)`.

  Raises:
    FileNotFoundError: if the run has no checkpoint, or data sets are missing:
      all of them, before anything is evaluated.
    ValueError: for an unknown benchmark; or `Task.score` has no 'accuracy'.
  """
  if not benchmarks and sources is None:
    raise ValueError(
      'No benchmarks: give --benchmarks=a,b or set evaluate.benchmarks; known '
      f'are {", ".join(data.BENCHMARKS)}.'
    )
  specs = [spec for spec, _ in _open(benchmarks, config.data.data_dir or None)]
  step = runs.find(pathlib.Path(workdir).expanduser())
  if step is None:
    raise FileNotFoundError(
      f'{workdir}: there is no checkpoint; train first, with this --workdir.'
    )
  placement = _all_devices()
  anchor, variables, consts = setup_lib.start(task, placement, config.seed)
  evaluate = evaluation.evaluator(
    task,
    placement,
    consts=consts,
    batch_size=config.evaluate.batch_size,
    data_dir=config.data.data_dir or None,
    image_size=config.model.image.image_size,
  )
  models = {
    'zero_shot': (anchor, variables),
    method_of(config): (
      runs.read_merged(step, placement.replicated),
      state_lib.average(runs.read_variables(step, placement.replicated)),
    ),
  }
  if not specs and sources is not None:
    return [
      _validated(
        method,
        config.seed,
        evaluate.validate(
          params, variables, sources.validation, sources.read_validation
        ),
      )
      for method, (params, variables) in models.items()
    ]
  return [
    _row(method, spec, config.seed, evaluate([params], spec, variables)[0])
    for spec in specs
    for method, (params, variables) in models.items()
  ]


def _validated(
  method: str, seed: int, means: dict[str, float]
) -> evaluation.Row:
  """Return the row of the mean scores of validation examples."""
  if 'accuracy' not in means:
    raise ValueError(
      f"Task.score: there is no 'accuracy' among {sorted(means)}, which "
      'results.json records. Return one as well, or read metrics.jsonl.'
    )
  return evaluation.Row(
    method, 'validation', seed, means['accuracy'], int(means['n'])
  )


def method_of(config: config_lib.ConfigDict) -> str:
  """Return the name of a run's merge in its rows; of one model, the model's.

  >>> method_of(config_lib.defaults())
  'model_stock_epoch'
  """
  if config.merge.num_models == 1:
    return 'fine_tuned'
  return f'model_stock_{config.merge.every}'


def _all_devices() -> sharding.Placement:
  """To evaluate on: whatever devices a run was trained on."""
  return sharding.place(stock=1, num_models=1, batch_size=len(jax.devices()))


class Classifier(NamedTuple):
  """A model to evaluate, from wherever it is.

  Attributes:
    method: as its rows are to say.
    seed: likewise.
    sizes: of the network.
    params: {'image': tower, 'head': {'kernel', 'bias'}}.
    labels: names of the head's classes in order, or None if not known.
    mean: of the pixels, 0..1, for each channel.
    std: likewise.
    dtype: of computation.
  """

  method: str
  seed: int
  sizes: clip.CLIPConfig
  params: Any
  labels: Sequence[str] | None
  mean: Sequence[float]
  std: Sequence[float]
  dtype: str


def evaluate_classifier(
  classifier: Classifier,
  benchmarks: Sequence[str],
  *,
  data_dir: str | None,
  batch_size: int,
) -> list[evaluation.Row]:
  """Accuracy of one model, on all devices.

  Args:
    classifier: the model.
    benchmarks: names.
    data_dir: the folder of the prepared data sets; None for the bundled.
    batch_size: examples in a step.

  Returns:
    A row for each benchmark.

  Raises:
    FileNotFoundError: data sets are missing, all of them.
    ValueError: for an unknown benchmark, or one of other classes than the
      head's, or in another order: before anything is evaluated.
  """
  opened = _open(benchmarks, data_dir)
  for spec, source in opened:
    _check_labels(classifier, spec, source.class_names)
  placement = _all_devices()
  evaluate = evaluation.evaluator(
    clip_task.classification(
      clip.classifier(
        classifier.sizes,
        len(classifier.params['head']['bias']),
        classifier.dtype,
      ),
      functools.partial(
        data.normalize, mean=classifier.mean, std=classifier.std
      ),
      classifier.sizes.vision,
    ),
    placement,
    batch_size=batch_size,
    data_dir=data_dir,
    image_size=classifier.sizes.vision.image_size,
  )
  params = jax.device_put(classifier.params, placement.replicated)
  return [
    _row(classifier.method, spec, classifier.seed, evaluate([params], spec)[0])
    for spec, _ in opened
  ]


def _open(
  benchmarks: Sequence[str], data_dir: str | None
) -> list[tuple[data.Benchmark, Any]]:
  """Open the benchmarks; raise one error for all that is missing."""
  opened, missing = [], []
  for spec in [data.find_benchmark(name) for name in benchmarks]:
    try:
      opened.append((spec, data.open_benchmark(spec, data_dir)))
    except FileNotFoundError as error:
      missing.append(f'{spec.name}: {error}')
  if missing:
    raise FileNotFoundError('\n'.join(missing))
  return opened


def _check_labels(
  classifier: Classifier, spec: data.Benchmark, names: Sequence[str]
) -> None:
  """Raise for a head whose classes are not those of the data."""
  size = len(classifier.params['head']['bias'])
  if size != len(names):
    raise ValueError(
      f'{classifier.method} has a head of {size} classes, {spec.name} has '
      f'{len(names)}. Evaluate on data of the classes it was made for.'
    )
  pairs = enumerate(zip(classifier.labels or names, names, strict=True))
  wrong = [(k, ours, theirs) for k, (ours, theirs) in pairs if ours != theirs]
  if wrong:
    k, ours, theirs = wrong[0]
    raise ValueError(
      f'{classifier.method}: {len(wrong)} labels of its head are not those of '
      f'{spec.name}: class {k} is {ours!r}, and {theirs!r} in the data. They '
      'must be the same, in the same order: if labels.json has other names '
      "for them, write the data set's into it."
    )


def _row(
  method: str, spec: data.Benchmark, seed: int, score: evaluation.Score
) -> evaluation.Row:
  return evaluation.Row(
    method, spec.name, seed, score.accuracy, score.n, score.num_classes
  )


def _methods(
  mode: str, anchor: Any, result: loop.Result
) -> Iterator[tuple[str, Any]]:
  """Return the models that one run adds to the comparison."""
  if mode == 'epoch':
    yield 'model_stock_epoch', result.merged.params
    return
  single = merging.unstack(result.models)[0]
  yield 'fine_tuned', single
  yield 'uniform_soup', merging.uniform_soup(result.models, stacked=True)
  yield 'wise_ft_0.5', merging.wise_ft(anchor, single, alpha=ALPHA)
  yield 'model_stock_end', result.merged.params
