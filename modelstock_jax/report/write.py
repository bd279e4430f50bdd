"""The report of a workdir: report.html, and its figures in plots/."""

import base64
from collections.abc import Mapping
from collections.abc import Sequence
import json
import os
import pathlib
import struct
from typing import Any
from typing import NamedTuple

from matplotlib import figure as mpl_figure
import numpy as np

from modelstock_jax.formats import write as write_lib
from modelstock_jax.report import findings
from modelstock_jax.report import merge_section
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import page
from modelstock_jax.report import plots
from modelstock_jax.report import results
from modelstock_jax.report import run_plots
from modelstock_jax.report import scatter
from modelstock_jax.report import summary as summary_lib
from modelstock_jax.report import tables
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation

FILE = 'report.html'
PLOTS = 'plots'

# A figure that is larger is shown as its PNG.
_LARGEST = 350_000  # characters of SVG


class Figure(NamedTuple):
  """A figure on the page.

  Attributes:
    alt: a description for those who do not see it.
    svg: an SVG document.
  """

  alt: str
  svg: str


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Write report.html from the files of a workdir, and plots/.

  Args:
    workdir: of a run, a comparison or a grid; it may be unfinished: then the
      report says what is missing.

  Returns:
    The path of report.html, which was replaced as a whole.

  Raises:
    FileNotFoundError: if it is not the workdir of a run.
    ValueError: if a file there is damaged; names it.
    OSError: if it cannot be written.
  """
  summary = summary_lib.read(pathlib.Path(workdir))
  figures = _draw(summary)
  text = render(summary, figures | _others(summary.workdir, set(figures)))
  path = summary.workdir / FILE
  write_lib.write_text(path, text)
  return path


def render(summary: summary_lib.Summary, figures: Mapping[str, Figure]) -> str:
  """Render the page; sentences about outcomes follow from the numbers.

  Args:
    summary: of the workdir.
    figures: by name: 'scatter', 'training', 'merge_' with a mode, and others,
      which are shown as they are.

  Returns:
    HTML.
  """
  config, rows = summary.config, summary.rows
  merges = summary.merges()
  seeds = sorted({run.seed for run in summary.runs})
  num_models = len(summary.grid) or config.merge.num_models
  shown = {
    name: page.figure(name, figure.alt, figure.svg)
    for name, figure in figures.items()
  }
  parts = [
    page.notice('What is missing', summary.missing),
    _accuracy(rows, num_models, shown.pop('scatter', '')),
    _seen(summary, merges, num_models, len(seeds)),
  ]
  for mode, of_mode in merges.items():
    figure = shown.pop(f'merge_{mode}', '')
    parts.append(merge_section.render(mode, of_mode, figure))
  parts += [
    _training(summary, shown.pop('training', '')),
    _grid(summary.grid),
    _analysis(shown),
    _made(summary.sessions),
    _config(config),
  ]
  count = f'{num_models} models'
  if seeds:
    count += f', {len(seeds)} seeds' if len(seeds) > 1 else f', seed {seeds[0]}'
  started = [s['Started'] for s in summary.sessions if 'Started' in s]
  subtitle = ' · '.join([count, *started[:1], f'`{summary.workdir.name}`'])
  return page.document(f'Model Stock on {config.data.dataset}', subtitle, parts)


def _draw(summary: summary_lib.Summary) -> dict[str, Figure]:
  """Draw the figures of a run; they are also written to plots/."""
  figures = {}
  folder = summary.workdir / PLOTS

  def add(name: str, alt: str, figure: mpl_figure.Figure) -> None:
    figures[name] = Figure(alt, plots.save(figure, folder / name))

  rows = summary.rows
  tests, shifts = results.benchmarks(rows) if rows else ([], [])
  if tests and shifts:
    add(
      'scatter',
      f'Mean accuracy on {len(shifts)} shifts against accuracy on '
      f'{", ".join(tests)}, a point for each method; the numbers are in the '
      'table above.',
      scatter.draw(rows),
    )
  for mode, merges in summary.merges().items():
    if mode == 'end':
      draw, over = run_plots.by_depth, 'depth and layer kind, at the last merge'
    else:
      draw, over = run_plots.over_epochs, 'the epochs, by layer kind and depth'
    add(
      f'merge_{mode}',
      f'Cosine and ratio over {over}; the numbers are in the tables below.',
      draw(merges),
    )
  if len(summary.runs) == 1:
    lines = summary.runs[0].lines
    if any(line['kind'] in ('train', 'validation') for line in lines):
      add(
        'training',
        'Training loss of each model and validation accuracy of the merge '
        'over the steps.',
        run_plots.over_steps(lines),
      )
  return figures


def _others(workdir: pathlib.Path, own: set[str]) -> dict[str, Figure]:
  """Return the figures that another command has left in plots/."""
  known = own | {'scatter', 'training'}
  found = {}
  for path in sorted((workdir / PLOTS).glob('*.svg')):
    if path.stem in known or path.stem.startswith('merge_'):
      continue
    text = path.read_text(encoding='utf-8')
    picture = path.with_name(f'{path.stem}.png')
    if len(text) > _LARGEST and picture.is_file():
      text = _picture(picture)
    found[path.stem] = Figure(_words(path.stem), text)
  return found


def _picture(path: pathlib.Path) -> str:
  """Return a PNG as SVG."""
  content = path.read_bytes()
  width, height = struct.unpack('>2I', content[16:24])
  points = 72 / plots.DPI
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" '
    f'viewBox="0 0 {points * width:.1f} {points * height:.1f}">'
    '<image width="100%" height="100%" href="data:image/png;base64,'
    f'{base64.b64encode(content).decode()}"/></svg>'
  )


def _seen(
  summary: summary_lib.Summary,
  merges: Mapping[str, merges_lib.Merges],
  num_models: int,
  seeds: int,
) -> str:
  rows = summary.rows
  tests, shifts = results.benchmarks(rows) if rows else ([], [])
  sentences = findings.sentences(rows, tests, shifts, merges)
  return page.section(
    'findings',
    'What to see',
    page.bullets(sentences) if sentences else '',
    page.paragraph('Differences are taken seed by seed, ± their sd.')
    if seeds > 1 and rows
    else '',
    page.folded('What was done', page.paragraph(_done(num_models, seeds))),
  )


def _done(num_models: int, seeds: int) -> str:
  if not seeds:  # of a grid
    return (
      f'{num_models} models are fine-tuned from the same pretrained weights, '
      'the anchor, each with hyper-parameters of its own.'
    )
  return (
    f'{num_models} models are fine-tuned from the same pretrained weights, the '
    f'anchor, with {f"{seeds} seeds" if seeds > 1 else "one seed"}. Model '
    'Stock merges them layer by layer into `t * mean + (1 - t) * anchor`. The '
    'ratio t follows from the cosine c of the angle between what fine-tuning '
    'changed in one model and in another, `t = N c / (1 + (N - 1) c)` unless '
    'the config says otherwise: where the models agree it is near 1 and the '
    'merge is their plain average; where they disagree the merge stays closer '
    'to the anchor.'
  )


def _accuracy(
  rows: Sequence[evaluation.Row], num_models: int, figure: str
) -> str:
  if not rows:
    return ''
  table = tables.tabulate(rows, num_models=num_models)
  singles = [*table.shifts, *table.excluded]
  # The mean of the shifts first, where a telephone shows it.
  mean = ['Mean shift'] if table.shifts else []
  header = ['Method', *(f'{name} (test)' for name in table.tests), *mean]
  header += [*singles, 'Cost']
  lines = []
  for method, cells, cost in table.lines:
    texts = [f'**{c.text()}**' if c.best else c.text() for c in cells]
    head = len(table.tests)
    texts = (
      texts[:head] + texts[head + len(singles) :] + texts[head:][: len(singles)]
    )
    lines.append([results.title(method), *texts, cost])
  known = [
    f'**{results.title(method)}**: {found.description}.'
    for method in results.methods(rows)
    if (found := results.find_method(method))
  ]
  return page.section(
    'accuracy',
    'Accuracy',
    page.table('Accuracy in %, the best of each column in bold', header, lines),
    page.note(' '.join(tables.footnote(rows, table).split())),
    page.folded('The methods', page.bullets(known)) if known else '',
    figure,
  )


def _training(summary: summary_lib.Summary, figure: str) -> str:
  if len(summary.runs) != 1:
    return ''
  lines = summary.runs[0].lines
  validated = [line for line in lines if line['kind'] == 'validation']
  speeds = [
    line['images_per_second']
    for line in lines
    if line.get('images_per_second') is not None
  ]
  if not (figure or validated):
    return ''
  parts = [figure]
  if speeds:
    parts.append(
      page.paragraph(
        f'{np.median(speeds):.0f} images/s, all models together (median of '
        f'{len(speeds)} measurements).'
      )
    )
  if validated:
    rows = [
      [
        f'{line["epoch"]}',
        f'{line["step"]}',
        f'{100 * line["accuracy"]:.2f}',
      ]
      for line in validated
    ]
    table = page.table(
      'Accuracy of the merge on the validation split',
      ['Epoch', 'Step', 'Accuracy, %'],
      rows,
    )
    parts.append(
      table
      if len(rows) <= 10
      else page.folded(f'Validation after {len(rows)} epochs', table)
    )
  return page.section('training', 'Training', *parts)


def _grid(models: Sequence[Mapping[str, Any]]) -> str:
  if not models:
    return ''
  keys = list(dict.fromkeys(key for model in models for key in model))
  lines = [[_value(model.get(key, '')) for key in keys] for model in models]
  header = [_words(key) for key in keys]
  caption = f'{len(models)} models, with their hyper-parameters'
  return page.section(
    'grid', 'Models of the grid', page.table(caption, header, lines)
  )


def _analysis(figures: Mapping[str, str]) -> str:
  """Return the section of all other figures."""
  if not figures:
    return ''
  parts = []
  for name, figure in figures.items():
    parts += [f'<h3>{page.text(_words(name))}</h3>', figure]
  return page.section('analysis', 'Analysis', *parts)


def _made(sessions: Sequence[Mapping[str, str]]) -> str:
  if not sessions:
    return ''
  tables = []
  for number, session in enumerate(sessions, 1):
    caption = (
      f'Session {number}' if len(sessions) > 1 else 'Recorded while it ran'
    )
    lines = [[name, value] for name, value in session.items()]
    tables.append(page.table(caption, ['What', 'Value'], lines, kind='words'))
  return page.section('made', 'How it was made', *tables)


def _config(config: config_lib.ConfigDict) -> str:
  values = json.loads(config_lib.to_json(config))
  lines = [[f'`{key}`', f'`{value}`'] for key, value in _flat('', values)]
  return page.section(
    'config',
    'Config',
    page.folded(
      f'{len(lines)} values',
      page.table(
        'Each is set by --config.key=value',
        ['Key', 'Value'],
        lines,
        kind='words',
      ),
    ),
  )


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
  found = []
  for key, value in values.items():
    if isinstance(value, dict):
      found += _flat(f'{prefix}{key}.', value)
    else:
      found.append((f'{prefix}{key}', json.dumps(value)))
  return found


def _value(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _words(name: str) -> str:
  """Return a name as words.

  >>> _words('shell_histograms')
  'Shell histograms'
  """
  words = name.replace('_', ' ')
  return words[:1].upper() + words[1:]
