"""The notebooks run, and are kept without outputs."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))


@pytest.fixture(scope='module')
def hook():
  """docs/hooks/notebooks.py, which is no part of a package."""
  path = ROOT / 'docs' / 'hooks' / 'notebooks.py'
  spec = importlib.util.spec_from_file_location('notebooks', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_they_are_there():
  assert [path.stem for path in NOTEBOOKS] == [
    'merge_your_own_checkpoints',
    'the_merge_on_digits',
  ]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_without_outputs(path):
  for cell in json.loads(path.read_text('utf-8'))['cells']:
    if cell['cell_type'] == 'code':
      assert cell['outputs'] == []
      assert cell['execution_count'] is None


# nbclient's own.
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, hook):
  notebook = hook.execute(path)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
  page = hook.to_markdown(notebook, path.stem)
  # Each plot is a picture of its own, and is shown.
  drawn = sum('plt.subplots' in cell.source for cell in cells)
  assert len(page.pictures) == drawn > 0
  for name, content in page.pictures.items():
    assert content.startswith(b'\x89PNG')
    assert f'({name})' in page.text
  # Paths of the machine that ran it stay there.
  assert str(ROOT) not in page.text


def test_a_failing_cell_fails(hook, tmp_path):
  import nbformat

  notebook = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell('raise ValueError("no")')]
  )
  nbformat.write(notebook, tmp_path / 'bad.ipynb')
  with pytest.raises(Exception, match='no'):
    hook.execute(tmp_path / 'bad.ipynb')
