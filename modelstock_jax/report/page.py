"""The report of a workdir: report.html, and its figures in plots/.

The page is a single file that requests nothing from the network: its words are
in templates/page.html, its tables follow from the numbers.
"""

import base64
from collections.abc import Mapping
import hashlib
import html
import json
import os
import pathlib
import re

import markupsafe

from modelstock_jax.formats import write as write_lib
from modelstock_jax.report import differences
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

_ID = re.compile(r'(?<=\shref="#)|(?<=:href="#)|(?<=url\(#)|(?<=\sid=")')


def write(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Write report.html from the files of a workdir, and plots/.

  Args:
    workdir: of a run, a comparison or a grid. Of an unfinished one the report
      lists what is missing.

  Returns:
    The path of report.html, which appears whole or not at all.

  Raises:
    FileNotFoundError: it is not the workdir of a run.
    ValueError: a file there is damaged; the message names it.
    OSError: it cannot be written.
  """
  summary = summary_lib.read(pathlib.Path(workdir))
  figures = _draw(summary)
  others = _others(summary.workdir / PLOTS)
  path = summary.workdir / FILE
  write_lib.write_text(path, render(summary, figures, others))
  return path


def render(
  summary: summary_lib.Summary,
  figures: Mapping[str, str],
  others: Mapping[str, str],
) -> str:
  """Render the page.

  Args:
    summary: of the workdir.
    figures: <svg> elements by name: 'scatter', 'training', and 'merge_' with a
      mode.
    others: addresses of pictures that other commands have left, by name.

  Returns:
    HTML, of which no part comes from elsewhere: a policy forbids it.
  """
  script = rendering.render('script.js')
  digest = hashlib.sha256(script.encode()).digest()
  return rendering.render(
    'page.html',
    summary=summary,
    num_models=len(summary.grid) or summary.config.merge.num_models,
    seeds=sorted({run.config.seed for run in summary.runs}),
    merged_when=results.merged_when,
    tables=tables,
    verdict=differences.verdict(summary.differences),
    grid_keys=list(dict.fromkeys(key for x in summary.grid for key in x)),
    settings=[
      [f'`{key}`', f'`{json.dumps(value)}`']
      for key, value in changes.flatten(summary.config).items()
    ],
    figures={k: markupsafe.Markup(figure) for k, figure in figures.items()},
    others=others,
    script=markupsafe.Markup(script),
    script_hash=base64.b64encode(digest).decode(),
  )


def _draw(summary: summary_lib.Summary) -> dict[str, str]:
  """Draw the figures of a run as <svg>; they are also written to plots/."""
  figures = {}
  tests, shifts = results.benchmarks(summary.rows)
  if tests and shifts:
    text = (
      f'Mean accuracy on {len(shifts)} shifts against accuracy on '
      f'{results.benchmark_titles(tests)}, a point for each method.'
    )
    figures['scatter'] = scatter.draw(summary.rows), text
  for mode, merges in summary.merges().items():
    draw = run_plots.by_depth if mode == 'end' else run_plots.over_epochs
    text = 'Cosine and ratio by layer kind and depth.'
    figures[f'merge_{mode}'] = draw(merges), text
  if any(line['kind'] in ('train', 'validation') for line in summary.lines):
    text = 'Training loss and validation accuracy by step.'
    figures['training'] = run_plots.over_steps(summary.lines), text
  folder = summary.workdir / PLOTS
  return {
    name: _inline(plots.save(figure, folder / name), name, text)
    for name, (figure, text) in figures.items()
  }


def _inline(svg: str, name: str, alt: str) -> str:
  """Make a drawing of `plots.svg` an element of a page.

  Ids get the name in front, as another drawing may have the same.
  """
  start = f'<svg role="img" aria-label="{html.escape(alt)}"'
  text = _ID.sub(f'{html.escape(name)}-', start + svg.partition('<svg')[2])
  return re.sub(
    r'<title>.*?</title>', lambda match: rendering.minus(match[0]), text
  )


def _others(folder: pathlib.Path) -> dict[str, str]:
  """Return the pictures that other commands have left, as data: addresses."""
  return {
    path.stem: 'data:image/png;base64,'
    + base64.b64encode(path.read_bytes()).decode()
    for path in sorted(folder.glob('*.png'))
    if not re.fullmatch('scatter|training|merge_.*', path.stem)
  }
