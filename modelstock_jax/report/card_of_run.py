"""The part of a model card that says how a run made the model."""

from collections.abc import Sequence
import functools
import pathlib
import shlex
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.formats import runs
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import results
from modelstock_jax.report import tables
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import metrics

_MANY = 60  # layers; more than this are shown in a table that opens


class Run(NamedTuple):
  """The source of a merged model.

  Attributes:
    workdir: of the training run.
    step: of the checkpoint, in optimizer steps.
  """

  workdir: pathlib.Path
  step: int


def describe(run: Run, model: clip.CLIPConfig) -> tuple[str, list[str]]:
  """Describe the run that trained a model.

  Args:
    run: its workdir and step.
    model: the sizes of what was written.

  Returns:
    A paragraph on the run, and sections on how it was made: Markdown.

  Raises:
    FileNotFoundError: the workdir has no config.
    ValueError: a file of the workdir is damaged.
  """
  config = config_lib.from_json(run.workdir / 'config.json')
  lines = [
    line
    for line in metrics.read(run.workdir)
    if line['kind'] == 'merge' and line['step'] == run.step
  ]
  rows = _results(run)
  sections = [
    '## Training',
    'The command, where `defaults.py` has the line `from '
    'modelstock_jax.training.config import defaults as get_config`:',
    _command(config),
    _data_sets(config, rows),
  ]
  if rows:
    sections += [
      '## Accuracy',
      tables.markdown_table(
        rows,
        _in_distribution(config, rows),
        num_models=config.merge.num_models,
      ),
    ]
  if lines and lines[-1]['cosine']:  # one model alone has no angle
    sections += ['## The merge by layer', *_merge(lines[-1])]
  return _about(config, run, lines, model), sections


def _about(
  config: config_lib.ConfigDict,
  run: Run,
  lines: Sequence[Any],
  model: clip.CLIPConfig,
) -> str:
  merge = config.merge
  every = {
    'end': 'once, after the last epoch',
    'epoch': 'after every epoch',
    1: 'after every epoch',
  }.get(merge.every, f'every {merge.every} epochs')
  reached = f'step {run.step}'
  if lines:
    reached += f' (epoch {lines[-1]["epoch"]} of {config.train.epochs})'
  measured = {
    'pretrained': 'those weights',
    'last_merge': 'the last merge, at first from those weights',
  }[merge.anchor]
  head = {
    'zero_shot': f'zero-shot, of the prompts `{config.anchor.prompts}`',
    'linear_probe': 'as a linear probe',
  }[config.anchor.head]
  text = (
    f'{merge.num_models} classifiers, each an image tower and a head, were '
    f'fine-tuned side by side from `{config.anchor.weights}` and merged by '
    '[Model Stock](https://arxiv.org/abs/2403.19522) (arXiv:2403.19522) '
    f'{every}, displacements being measured from {measured}. This is their '
    f'merge after {reached}. The head began {head}.'
  )
  if model.text:
    text += (
      ' The text tower and the temperature are those of '
      f'`{config.anchor.weights}`.'
    )
  return text


def _command(config: config_lib.ConfigDict) -> str:
  words = [
    'modelstock train --config=defaults.py --workdir=WORKDIR',
    *map(_quoted, flags(config)),
  ]
  return '```sh\n' + ' \\\n  '.join(words) + '\n```'


def _quoted(flag: str) -> str:
  """Quote a flag for a shell; a tuple of names in double quotes."""
  plain = "'" in flag and not set(flag) & set('"$`\\!')
  return f'"{flag}"' if plain else shlex.quote(flag)


def _results(run: Run) -> list[evaluation.Row]:
  """Return the rows of results.json if they are of this checkpoint."""
  path = run.workdir / 'results.json'
  latest = runs.find(run.workdir)
  # `modelstock evaluate` takes the latest checkpoint, and does not say which.
  if not path.is_file() or latest is None or latest.name != str(run.step):
    return []
  if path.stat().st_mtime < latest.stat().st_mtime:
    return []
  return results.load(path)


def _in_distribution(
  config: config_lib.ConfigDict, rows: Sequence[evaluation.Row]
) -> list[str]:
  """Return the benchmarks on the data set of training, without shifts."""
  found = []
  for name in dict.fromkeys(row.benchmark for row in rows):
    spec = data.BENCHMARKS.get(name)
    if spec and spec.dataset == config.data.dataset and not spec.shift:
      found.append(name)
  return found


def _data_sets(
  config: config_lib.ConfigDict, rows: Sequence[evaluation.Row]
) -> str:
  """Return a table of the data sets, with versions and counts."""
  settings = config.data
  specs = [
    data.Benchmark('training', settings.dataset, settings.train),
    data.Benchmark('validation', settings.dataset, settings.validation),
  ]
  for name in dict.fromkeys(row.benchmark for row in rows):
    if name in data.BENCHMARKS:
      specs.append(data.BENCHMARKS[name])
  uses: dict[tuple[str, str], list[data.Benchmark]] = {}
  for spec in specs:
    uses.setdefault((spec.dataset, spec.split), []).append(spec)
  lines = []
  for (dataset, split), same in uses.items():
    try:
      source = data.open_benchmark(same[0], settings.data_dir or None)
      cells = [f'`{source.name}`', f'{len(source)}']
    except OSError:  # not where the run is converted
      cells = [f'`{dataset}`, split `{split}`', 'not at hand']
    names = results.benchmark_titles([spec.name for spec in same])
    lines.append([*cells, names])
  header = ['Data set (TFDS), version, split', 'Examples', 'For']
  return tables.markdown(header, lines, text_columns=(0, 2))


def _merge(line: Any) -> list[str]:
  """Return cosine and ratio of one merge: paragraphs and tables."""
  merges = merges_lib.collect([[line]])
  cosine, ratio = merges.cosine[0, -1], merges.ratio[0, -1]
  parts = [
    'Cosine of the angle between what training changed in one model and in '
    'another, and ratio of the merge (0: anchor, 1: plain average). The mean '
    f'ratio of the {len(merges.layers)} layers is {ratio.mean():.3f}.'
  ]
  order = np.argsort([layer.place for layer in merges.layers], kind='stable')
  table = tables.markdown(
    ['Layer', 'Cosine', 'Ratio'],
    [
      [f'`{merges.layers[i].name}`', f'{cosine[i]:.3f}', f'{ratio[i]:.3f}']
      for i in order
    ],
  )
  if len(order) <= _MANY:
    return [*parts, table]
  return [
    *parts,
    _by_depth(merges, cosine, ratio),
    f'<details>\n<summary>All {len(order)} layers</summary>\n\n{table}\n\n'
    '</details>',
  ]


def _by_depth(
  merges: merges_lib.Merges, cosine: np.ndarray, ratio: np.ndarray
) -> str:
  """Return means over the layers of a kind at a depth."""
  lines = []
  for place, name in enumerate(merges.places):
    line = [name]
    for kind in merges.kinds:
      chosen = merges.at_place(place) & merges.of_kind(kind)
      line.append(
        f'{cosine[chosen].mean():.3f} / {ratio[chosen].mean():.3f}'
        if chosen.any()
        else '-'
      )
    lines.append(line)
  return tables.markdown(['Cosine / ratio', *merges.kinds], lines)


def flags(config: config_lib.ConfigDict) -> list[str]:
  """Return the flags that turn the defaults into a config.

  >>> config = config_lib.override(
  ...   config_lib.defaults(), ['--config.merge.every=2']
  ... )
  >>> flags(config)
  ['--config.merge.every=2']
  """
  # Keys have no colon, values may.
  changed = [
    line.partition(': ')[0]
    for line in changes_lib.differences(config_lib.defaults(), config)
  ]
  return [
    f'--config.{key}={functools.reduce(getattr, key.split("."), config)}'
    for key in changed
  ]
