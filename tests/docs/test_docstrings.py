"""The examples in docstrings and in the README run."""

import doctest
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.DOTALL | re.MULTILINE)
# The merge's promise: an example for everything it exports.
FULLY_SHOWN = 'modelstock_jax'


def _has_scenic():
  """True if Google's Scenic, and what it imports, is installed."""
  try:
    importlib.import_module('modelstock_jax.scenic')
  except ImportError:
    return False
  return True


OURS = ('baselines', 'digits', 'geometry', 'soups')


def _modules():
  files = [
    path
    for room in ('modelstock_jax', *(f'experiments/{x}' for x in OURS))
    for path in (ROOT / room).rglob('*.py')
    if path.stem != '__main__'
  ]
  names = ['.'.join(f.relative_to(ROOT).with_suffix('').parts) for f in files]
  return sorted(name.removesuffix('.__init__') for name in names)


@pytest.mark.parametrize('name', _modules())
def test_docstrings(name, tmp_path, monkeypatch):
  if name.startswith('modelstock_jax.scenic') and not _has_scenic():
    pytest.skip('no Scenic')  # tests/scenic sees to what is said then
  monkeypatch.chdir(tmp_path)  # examples may write files
  # Config files find what is beside them.
  for room in ('baselines', 'soups'):
    monkeypatch.syspath_prepend(ROOT / 'experiments' / room)
  module = importlib.import_module(name)
  failed, _ = doctest.testmod(module)
  assert not failed


def test_examples_of_the_merge():
  module = importlib.import_module(FULLY_SHOWN)
  for name in module.__all__:
    function = getattr(module, name)
    if not isinstance(function, type):  # Layer and Merged are shown in use
      assert '>>> ' in function.__doc__, name


def _blocks():
  readme = ROOT / 'README.md'
  return BLOCK.findall(readme.read_text('utf-8')) if readme.exists() else []


def test_readme(tmp_path, monkeypatch):
  """The Python blocks run from top to bottom, as a reader would run them."""
  blocks = _blocks()
  assert blocks, 'README.md shows no Python'
  monkeypatch.chdir(tmp_path)
  names = {'__name__': 'readme'}
  for number, block in enumerate(blocks):
    if '>>> ' in block:
      test = doctest.DocTestParser().get_doctest(
        block, names, f'block {number}', 'README.md', 0
      )
      assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
      names.update(test.globs)
    else:
      exec(compile(block, f'README.md, block {number}', 'exec'), names)


def test_the_tests_of_the_promises_exist():
  text = (ROOT / 'docs' / 'reliability.md').read_text('utf-8')
  named = set(re.findall(r'`(tests/[^`]*)`', text))
  assert len(named) > 20
  assert {name for name in named if not (ROOT / name).is_file()} == set()
  targets = set(re.findall(r'`make ([\w-]+)`', text))
  makefile = (ROOT / 'Makefile').read_text('utf-8')
  assert targets <= set(re.findall(r'^([\w-]+):', makefile, re.MULTILINE))
