"""Runs the notebooks and shows them, outputs included, as pages.

They are kept without outputs: what a page shows was computed by the code
beside it. What a browser cannot show without scripts from elsewhere (widgets)
is not shown.
"""

import base64
import os
import pathlib
from typing import Any
from typing import NamedTuple

from mkdocs import exceptions
from mkdocs.structure import files as files_lib
import nbclient
import nbformat

FOLDER = 'notebooks'
SECONDS = 120  # for one cell


class Page(NamedTuple):
  """A notebook as Markdown."""

  text: str
  pictures: dict[str, bytes]  # by file name


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
  """Runs a notebook from top to bottom, on a CPU, in a folder of its own.

  Args:
    path: of the .ipynb file.

  Returns:
    The notebook with outputs.

  Raises:
    CellExecutionError: if a cell fails.
  """
  import tempfile

  notebook = nbformat.read(path, as_version=4)
  with tempfile.TemporaryDirectory() as folder:
    client = nbclient.NotebookClient(
      notebook, timeout=SECONDS, resources={'metadata': {'path': folder}}
    )
    return client.execute(env={**os.environ, 'JAX_PLATFORMS': 'cpu'})


def to_markdown(notebook: nbformat.NotebookNode, name: str) -> Page:
  """A notebook with outputs as a page.

  Args:
    notebook: after `execute`.
    name: of its file, without an ending; pictures are named after it.

  Returns:
    The page.
  """
  parts: list[str] = []
  pictures: dict[str, bytes] = {}
  for cell in notebook.cells:
    if cell.cell_type == 'markdown':
      parts.append(cell.source)
    elif cell.cell_type == 'code':
      parts.append(f'```python\n{cell.source}\n```')
      for output in cell.outputs:
        parts.append(_output(output, f'{name}_{len(pictures) + 1}', pictures))
  link = f'[This page as a notebook]({name}.ipynb){{ .notebook download }}'
  title, *rest = parts
  return Page('\n\n'.join([title, link, *filter(None, rest)]), pictures)


def _output(output: Any, name: str, pictures: dict[str, bytes]) -> str:
  if output.output_type == 'stream':
    # What programs say of their progress is not a result.
    return _block(output.text) if output.name == 'stdout' else ''
  if output.output_type == 'error':
    raise exceptions.PluginError(f'{name}: {output.ename}: {output.evalue}')
  data = output.data
  for kind, ending in (('image/svg+xml', 'svg'), ('image/png', 'png')):
    if kind in data:
      content = data[kind]
      is_text = ending == 'svg'
      pictures[f'{name}.{ending}'] = (
        content.encode() if is_text else base64.b64decode(content)
      )
      return f'![Drawn by the cell above]({name}.{ending}){{ .plot }}'
  return _block(data.get('text/plain', ''))


def _block(text: str) -> str:
  return (
    f'``` {{ .text .output }}\n{text.rstrip()}\n```' if text.strip() else ''
  )


def on_files(files: files_lib.Files, *, config, **_) -> files_lib.Files:
  """Called by mkdocs with all files of the site."""
  for path in sorted(pathlib.Path(config.docs_dir, FOLDER).glob('*.ipynb')):
    page = to_markdown(execute(path), path.stem)
    made = {f'{path.stem}.md': page.text, **page.pictures}
    for name, content in made.items():
      uri = f'{FOLDER}/{name}'
      files.append(files_lib.File.generated(config, uri, content=content))
  return files
