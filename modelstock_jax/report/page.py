"""The report of a workdir: report.html, and its figures in plots/.

The page is a single file that asks the network for nothing: its words are in
templates/page.html, its tables and sentences follow from the numbers.
"""

import base64
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import html
import json
import os
import pathlib
import re
import statistics
from typing import Any
from xml.etree import ElementTree

import markupsafe

from modelstock_jax.formats import write as write_lib
from modelstock_jax.report import findings
from modelstock_jax.report import merge_tables
from modelstock_jax.report import plots
from modelstock_jax.report import rendering
from modelstock_jax.report import results
from modelstock_jax.report import run_plots
from modelstock_jax.report import scatter
from modelstock_jax.report import summary as summary_lib
from modelstock_jax.report import tables
from modelstock_jax.training import changes

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
_COLOR = re.compile(rf'(?<=[:\s"])({"|".join(_COLORS)})(?=[;"])')
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
  text = render(summary, figures | _others(summary.workdir))
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
  rows, merges = summary.rows, summary.merges()
  num_models = len(summary.grid) or summary.config.merge.num_models
  tests, shifts = results.benchmarks(rows) if rows else ([], [])
  lines = summary.runs[0].lines if len(summary.runs) == 1 else []
  script = rendering.render('script.js')
  digest = hashlib.sha256(script.encode()).digest()
  return rendering.render(
    'page.html',
    summary=summary,
    num_models=num_models,
    seeds=sorted({run.seed for run in summary.runs}),
    accuracy=rows
    and tables.accuracy(rows, num_models=num_models, mean_first=True),
    footnote=tables.footnote(rows) if rows else '',
    methods=[
      f'**{method.title}**: {method.description}.'
      for name in results.methods(rows)
      if (method := results.find_method(name))
    ],
    findings=findings.sentences(rows, tests, shifts, merges),
    merges=merges,
    merged_when=results.merged_when,
    merge_tables=merge_tables,
    speeds=[
      line['images_per_second']
      for line in lines
      if line.get('images_per_second') is not None
    ],
    median=statistics.median,
    validation=_validation(lines),
    grid=_grid(summary.grid),
    others=[name for name in figures if not _is_of_page(name)],
    settings=[
      [f'`{key}`', f'`{json.dumps(value)}`']
      for key, value in changes.flatten(summary.config)
    ],
    figures={k: markupsafe.Markup(figure) for k, figure in figures.items()},
    script=markupsafe.Markup(script),
    script_hash=base64.b64encode(digest).decode(),
  )


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
  text = _COLOR.sub(lambda match: f'var(--{_COLORS[match[0]]})', text)
  return re.sub(
    r'<title>.*?</title>', lambda match: rendering.minus(match[0]), text
  )


def _draw(summary: summary_lib.Summary) -> dict[str, str]:
  """Draw the figures of a run as HTML; they are also written to plots/."""
  drawn = {}  # figures and their alternative texts
  tests, shifts = results.benchmarks(summary.rows) if summary.rows else ([], [])
  if tests and shifts:
    drawn['scatter'] = (
      scatter.draw(summary.rows),
      f'Mean accuracy on {len(shifts)} shifts against accuracy on '
      f'{results.benchmark_titles(tests)}, a point for each method; the '
      'numbers are in the table above.',
    )
  for mode, merges in summary.merges().items():
    draw, over = run_plots.over_epochs, 'the epochs, by layer kind and depth'
    if mode == 'end':
      draw, over = run_plots.by_depth, 'depth and layer kind, at the last merge'
    drawn[f'merge_{mode}'] = (
      draw(merges),
      f'Cosine and ratio over {over}; the numbers are in the tables below.',
    )
  lines = summary.runs[0].lines if len(summary.runs) == 1 else []
  if any(line['kind'] in ('train', 'validation') for line in lines):
    drawn['training'] = (
      run_plots.over_steps(lines),
      'Training loss of each model and validation accuracy of the merge over '
      'the steps.',
    )
  folder = summary.workdir / PLOTS
  return {
    name: inline(plots.save(figure, folder / name), name, alt)
    for name, (figure, alt) in drawn.items()
  }


def _is_of_page(name: str) -> bool:
  """Return True for the figures that `_draw` draws, now or earlier."""
  return name in ('scatter', 'training') or name.startswith('merge_')


def _others(workdir: pathlib.Path) -> dict[str, str]:
  """Return the figures that another command has left in plots/, as HTML."""
  figures = {}
  for path in sorted((workdir / PLOTS).glob('*.svg')):
    name, alt = path.stem, rendering.sentence(path.stem)
    svg = path.read_text(encoding='utf-8')
    png = path.with_name(f'{name}.png')
    if _is_of_page(name):
      continue
    if len(svg) > _LARGEST and png.is_file():
      pixels = base64.b64encode(png.read_bytes()).decode()
      source = f'data:image/png;base64,{pixels}'
      figures[name] = f'<img alt="{html.escape(alt)}" src="{source}">'
    else:
      figures[name] = inline(svg, name, alt)
  return figures


def _validation(lines: Sequence[Mapping[str, Any]]) -> tables.Table:
  """Return the accuracies on the validation split, of all epochs."""
  return tables.Table(
    'Accuracy of the merge on the validation split',
    ['Epoch', 'Step', 'Accuracy, %'],
    [
      [f'{line["epoch"]}', f'{line["step"]}', f'{100 * line["accuracy"]:.2f}']
      for line in lines
      if line['kind'] == 'validation'
    ],
  )


def _grid(models: Sequence[Mapping[str, Any]]) -> tables.Table:
  """Return the hyper-parameters of the models of a grid."""
  keys = list(dict.fromkeys(key for model in models for key in model))
  values = [[model.get(key, '') for key in keys] for model in models]
  return tables.Table(
    f'{len(models)} models, with their hyper-parameters',
    list(map(rendering.sentence, keys)),
    [
      [f'{x:.4g}' if isinstance(x, float) else str(x) for x in row]
      for row in values
    ],
  )
