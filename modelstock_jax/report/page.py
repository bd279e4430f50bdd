"""The report of a workdir: report.html, and its figures in plots/.

The page is a single file that asks the network for nothing: its words are in
templates/page.html, its tables and sentences follow from the numbers.
"""

import base64
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import html
import json
import os
import pathlib
import re
from typing import Any
from xml.etree import ElementTree

import jinja2
import markupsafe
from matplotlib import figure as mpl_figure
import numpy as np

from modelstock_jax.formats import write as write_lib
from modelstock_jax.report import findings
from modelstock_jax.report import merge_tables
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

_SVG = '{http://www.w3.org/2000/svg}'
# What a figure consists of; all else (styles, which would be those of the
# whole page, metadata, scripts) is left out.
_SHAPES = {
  *('svg', 'g', 'defs', 'clipPath', 'use', 'symbol', 'title', 'desc', 'image'),
  *('path', 'rect', 'circle', 'ellipse', 'line', 'polyline', 'polygon'),
  *('text', 'tspan', 'linearGradient', 'radialGradient', 'stop', 'pattern'),
}
# Colours that turn with the page's, in the dark.
_COLORS = {
  '#000000': 'ink',
  'black': 'ink',
  '#ffffff': 'paper',
  'white': 'paper',
  '#e6e6e6': 'grid',
  '#444444': 'soft',
  '#666666': 'soft',
  '#888888': 'axis',
  '#0072b2': 'blue',
}
_COLOR = re.compile(r'(?<=[:\s"])(#[0-9a-f]{6}|black|white)(?=[;"])')
# Handlers, and links to anything but the figure's own parts and its pixels.
_ACTIVE = re.compile(r'\s(?:on\w+|(?:\w+:)?href)="(?!#|data:image/)[^"]*"')
_HREF = re.compile(r'(?<=\shref="#)|(?<=:href="#)|(?<=url\(#)|(?<=\sid=")')


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


def render(summary: summary_lib.Summary, figures: Mapping[str, str]) -> str:
  """Render the page; sentences about outcomes follow from the numbers.

  Args:
    summary: of the workdir.
    figures: HTML by name: 'scatter', 'training', 'merge_' with a mode, and
      others, which are shown as they are.

  Returns:
    HTML, of which no part comes from elsewhere: a policy forbids it.
  """
  config, rows = summary.config, summary.rows
  merges = summary.merges()
  seeds = sorted({run.seed for run in summary.runs})
  num_models = len(summary.grid) or config.merge.num_models
  tests, shifts = results.benchmarks(rows) if rows else ([], [])
  own = ['scatter', 'training', *(f'merge_{mode}' for mode in merges)]
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('modelstock_jax.report'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {'words': words, 'minus': minus, 'sentence': _sentence}
  script = environment.get_template('script.js').render()
  digest = hashlib.sha256(script.encode()).digest()
  return environment.get_template('page.html').render(
    title=f'Model Stock on {config.data.dataset}',
    subtitle=_subtitle(summary, num_models, seeds),
    missing=summary.missing,
    **_accuracy(rows, num_models),
    findings=findings.sentences(rows, tests, shifts, merges),
    seeds=len(seeds),
    num_models=num_models,
    merges=[merge_tables.section(*item) for item in merges.items()],
    **_training(summary),
    grid=_grid(summary.grid),
    others=[name for name in figures if name not in own],
    sessions=_sessions(summary.sessions),
    config=_config(config),
    figures={k: markupsafe.Markup(figure) for k, figure in figures.items()},
    script=markupsafe.Markup(script),
    script_hash=base64.b64encode(digest).decode(),
  )


def words(text: str) -> markupsafe.Markup:
  """Escape words; of Markdown it knows **bold** and `code`.

  >>> str(words('**Model Stock** is `t < 1`'))
  '<strong>Model Stock</strong> is <code>t &lt; 1</code>'
  """
  text = re.sub(
    r'\*\*(.+?)\*\*', r'<strong>\1</strong>', str(markupsafe.escape(text))
  )
  # A path may be broken after a slash.
  return markupsafe.Markup(
    re.sub(
      r'`(.+?)`',
      lambda match: f'<code>{match[1].replace("/", "/<wbr>")}</code>',
      text,
    )
  )


def minus(text: str) -> str:
  r"""Write the minus signs of numbers as such.

  >>> minus('-1.5, 1.0-2.0').encode('ascii', 'namereplace').decode()
  '\\N{MINUS SIGN}1.5, 1.0-2.0'
  """
  return re.sub(r'(?<![\w`.-])-(?=\d)', '\N{MINUS SIGN}', text)


def inline(svg: str, name: str, alt: str) -> str:
  """Make an SVG document part of a page.

  Shapes alone are kept; ids get the name in front, as another figure may have
  the same; black, white and greys become those of the page.

  Args:
    svg: the document.
    name: of no other figure of the page.
    alt: in place of the picture.

  Returns:
    An <svg> element.

  Raises:
    ValueError: if it is not SVG.
  """
  try:
    root = ElementTree.fromstring(svg)
  except ElementTree.ParseError as error:
    raise ValueError(f'figure {name}: is not XML: {error}.') from error
  if root.tag != f'{_SVG}svg':
    raise ValueError(f'figure {name}: is not SVG: its root is {root.tag}.')
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag.removeprefix(_SVG) not in _SHAPES:
        parent.remove(child)
  box = root.get('viewBox')
  if box:  # its size is that of the page's column, up to half as much again
    root.set('style', f'--width: {float(box.split()[2]):.0f}px')
    for size in ('width', 'height'):
      root.attrib.pop(size, None)
  root.attrib |= {'role': 'img', 'aria-label': alt}
  ElementTree.register_namespace('', _SVG[1:-1])
  ElementTree.register_namespace('xlink', 'http://www.w3.org/1999/xlink')
  text = _ACTIVE.sub('', ElementTree.tostring(root, encoding='unicode'))
  text = _HREF.sub(f'{html.escape(name)}-', text)
  text = _COLOR.sub(
    lambda match: (
      f'var(--{_COLORS[match[0]]})' if match[0] in _COLORS else match[0]
    ),
    text,
  )
  return re.sub(r'<title>.*?</title>', lambda match: minus(match[0]), text)


def _draw(summary: summary_lib.Summary) -> dict[str, str]:
  """Draw the figures of a run as HTML; they are also written to plots/."""
  figures: dict[str, str] = {}
  folder = summary.workdir / PLOTS

  def add(name: str, alt: str, figure: mpl_figure.Figure) -> None:
    figures[name] = inline(plots.save(figure, folder / name), name, alt)

  rows = summary.rows
  tests, shifts = results.benchmarks(rows) if rows else ([], [])
  if tests and shifts:
    add(
      'scatter',
      f'Mean accuracy on {len(shifts)} shifts against accuracy on '
      f'{results.benchmark_titles(tests)}, a point for each method; the '
      'numbers are in the table above.',
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


def _others(workdir: pathlib.Path, drawn: set[str]) -> dict[str, str]:
  """Return the figures that another command has left in plots/, as HTML."""
  known = drawn | {'scatter', 'training'}
  figures = {}
  for path in sorted((workdir / PLOTS).glob('*.svg')):
    name = path.stem
    if name in known or name.startswith('merge_'):
      continue
    svg = path.read_text(encoding='utf-8')
    png = path.with_name(f'{name}.png')
    if len(svg) > _LARGEST and png.is_file():
      pixels = base64.b64encode(png.read_bytes()).decode()
      source = f'data:image/png;base64,{pixels}'
      alt = html.escape(_sentence(name))
      figures[name] = f'<img alt="{alt}" src="{source}">'
    else:
      figures[name] = inline(svg, name, _sentence(name))
  return figures


def _subtitle(
  summary: summary_lib.Summary, num_models: int, seeds: Sequence[int]
) -> str:
  count = f'{num_models} models'
  if seeds:
    count += f', {len(seeds)} seeds' if len(seeds) > 1 else f', seed {seeds[0]}'
  started = [s['Started'] for s in summary.sessions if 'Started' in s]
  return ' · '.join([count, *started[:1], f'`{summary.workdir.name}`'])


def _accuracy(
  rows: Sequence[evaluation.Row], num_models: int
) -> dict[str, Any]:
  """Return the table of accuracies, its footnote and the methods in it."""
  if not rows:
    return {'accuracy': None, 'footnote': '', 'methods': []}
  table = tables.accuracy(rows, num_models=num_models)
  # The mean of the shifts first, where a telephone shows it.
  header, start = table.header(), 1 + len(table.tests)
  order = [*range(start), *range(start, len(header) - 1), len(header) - 1]
  if table.shifts:
    order.insert(start, order.pop(-2))
  lines = []
  for method, cells, cost in table.lines:
    line = [
      results.title(method),
      *(tables.shown(cell) for cell in cells),
      cost,
    ]
    lines.append([line[index] for index in order])
  known = [
    f'**{results.title(name)}**: {method.description}.'
    for name in results.methods(rows)
    if (method := results.find_method(name))
  ]
  caption = 'Accuracy in %, the best of each column in bold'
  return {
    'accuracy': tables.Shown(caption, [header[i] for i in order], lines),
    'footnote': ' '.join(tables.footnote(rows, table).split()),
    'methods': known,
  }


def _training(summary: summary_lib.Summary) -> dict[str, Any]:
  """Return speeds and validation accuracy of a single run."""
  lines = summary.runs[0].lines if len(summary.runs) == 1 else []
  speeds = [
    line['images_per_second']
    for line in lines
    if line.get('images_per_second') is not None
  ]
  rows = [
    [f'{line["epoch"]}', f'{line["step"]}', f'{100 * line["accuracy"]:.2f}']
    for line in lines
    if line['kind'] == 'validation'
  ]
  caption = 'Accuracy of the merge on the validation split'
  header = ['Epoch', 'Step', 'Accuracy, %']
  return {
    'speeds': len(speeds),
    'median_speed': float(np.median(speeds)) if speeds else 0.0,
    'validation': tables.Shown(caption, header, rows) if rows else None,
  }


def _grid(models: Sequence[Mapping[str, Any]]) -> tables.Shown | None:
  if not models:
    return None
  keys = list(dict.fromkeys(key for model in models for key in model))
  lines = [[_value(model.get(key, '')) for key in keys] for model in models]
  caption = f'{len(models)} models, with their hyper-parameters'
  return tables.Shown(caption, list(map(_sentence, keys)), lines)


def _sessions(sessions: Sequence[Mapping[str, str]]) -> list[tables.Shown]:
  captions = ['Recorded while it ran']
  if len(sessions) > 1:
    captions = [f'Session {number + 1}' for number in range(len(sessions))]
  return [
    tables.Shown(caption, ['What', 'Value'], list(session.items()), 'words')
    for caption, session in zip(captions, sessions, strict=False)
  ]


def _config(config: config_lib.ConfigDict) -> tables.Shown:
  values = _flat('', json.loads(config_lib.to_json(config)))
  lines = [[f'`{key}`', f'`{json.dumps(value)}`'] for key, value in values]
  caption = 'Each is set by --config.key=value'
  return tables.Shown(caption, ['Key', 'Value'], lines, 'words')


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _flat(f'{prefix}{key}.', value)
    else:
      yield f'{prefix}{key}', value


def _value(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _sentence(name: str) -> str:
  """Return a name as words.

  >>> _sentence('shell_histograms')
  'Shell histograms'
  """
  text = name.replace('_', ' ')
  return text[:1].upper() + text[1:]
