"""A file imports from its own floor or below, read from the source."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'modelstock_jax'
FLOORS = {
  'merging': 0,
  'formats': 0,
  'data': 1,
  'clip': 1,
  'files': 1,
  'training': 2,
  'planning': 3,
  'report': 3,
  'scenic': 3,
  'configs': 3,  # kept beside the package, see setup.py
  'cli': 4,
}
# Of one floor, and not of each other's house.
STRANGERS = [
  {'formats', 'merging'},
  {'merging', 'data'},
  {'clip', 'data'},
  {'clip', 'files'},
  {'files', 'training'},
]
# Packages that only these files may import.
KEPT_IN = {'orbax': ('training/checkpoints.py', 'formats/runs.py')}
# Packages slow to import, and not always installed: only inside functions.
LAZY = {'tensorflow', 'torch'}
MERGE_NEEDS = {'jax', 'numpy'}


def _sources():
  files = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob('*.py')}
  for path in (PACKAGE.parent / 'configs').glob('*.py'):
    files[pathlib.Path('configs', path.name)] = path
  return {str(name): path.read_text('utf-8') for name, path in files.items()}


def _modules(node):
  """Full names of what an import statement imports."""
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  if isinstance(node, ast.ImportFrom):
    assert node.level == 0, 'relative import'
    return [f'{node.module}.{alias.name}' for alias in node.names]
  return []


def _imports(tree):
  return [name for node in ast.walk(tree) for name in _modules(node)]


def _at_module_level(tree):
  """Imports that run when the module does: none inside a function."""
  actual, nodes = [], [tree]
  while nodes:
    node = nodes.pop()
    actual += _modules(node)
    nodes += [
      child
      for child in ast.iter_child_nodes(node)
      if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
  return actual


def violations(name, source):
  """Return what a file of the package (a path within it) must not import."""
  tree = ast.parse(source)
  room = pathlib.Path(name).parts[0] if '/' in name else 'merging'
  room = 'cli' if name == '__main__.py' else room
  actual = []
  for module in _imports(tree):
    top, *rest = module.split('.')
    if top == 'modelstock_jax':
      other = rest[0] if rest and rest[0] in FLOORS else 'merging'
      if {room, other} in STRANGERS:
        actual.append(f'{name}: {room} does not import {other}')
      elif FLOORS[other] > FLOORS[room]:
        actual.append(f'{name}: {module} is on a floor above')
    if name not in KEPT_IN.get(top, (name,)):
      actual.append(f'{name}: {top} belongs in {KEPT_IN[top]}')
  for module in _at_module_level(tree):
    if module.split('.')[0] in LAZY:
      actual.append(
        f'{name}: import {module} inside the function that needs it'
      )
  return actual


@pytest.mark.parametrize('name', _sources())
def test_floors(name):
  assert violations(name, _sources()[name]) == []


def test_every_room_has_a_floor():
  rooms = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
  assert rooms <= set(FLOORS)
  assert {'merging', 'clip', 'data', 'training'} <= rooms


def test_formats_import_neither_jax_nor_a_library_of_a_format():
  for name, source in _sources().items():
    if name.startswith('formats/'):
      imported = _at_module_level(ast.parse(source))
      thirds = {module.split('.')[0] for module in imported}
      thirds -= {*sys.stdlib_module_names, 'modelstock_jax'}
      assert thirds <= {'ml_dtypes', 'numpy'}, name


def test_the_merge_needs_jax_and_numpy_only():
  for name, source in _sources().items():
    if name.startswith('merging/') or name == '__init__.py':
      thirds = {module.split('.')[0] for module in _imports(ast.parse(source))}
      thirds -= {*sys.stdlib_module_names, 'modelstock_jax'}
      assert thirds <= MERGE_NEEDS, name


@pytest.mark.parametrize(
  ('name', 'source', 'message'),
  [
    ('merging/a.py', 'from modelstock_jax import clip', 'floor above'),
    ('merging/a.py', 'import modelstock_jax.cli.main', 'floor above'),
    ('__init__.py', 'from modelstock_jax.training import step', 'floor above'),
    (
      'training/a.py',
      'def f():\n  from modelstock_jax.cli import main',
      'floor above',
    ),
    ('data/a.py', 'from modelstock_jax.clip import layers', 'does not import'),
    ('formats/a.py', 'from modelstock_jax import merging', 'does not import'),
    ('clip/a.py', 'import modelstock_jax.data', 'does not import'),
    ('training/loop.py', 'import orbax.checkpoint as ocp', 'belongs in'),
    ('data/a.py', 'import tensorflow as tf', 'inside the function'),
    ('data/a.py', 'try:\n  import torch\nexcept E:\n  pass', 'inside'),
    ('data/a.py', 'class A:\n  from torch import nn', 'inside'),
  ],
)
def test_violations_are_seen(name, source, message):
  (actual,) = violations(name, source)
  assert message in actual


@pytest.mark.parametrize(
  ('name', 'source'),
  [
    ('training/checkpoints.py', 'import orbax.checkpoint as ocp'),
    ('training/a.py', 'from modelstock_jax import clip, data, merging'),
    ('data/tfds_prepare.py', 'def f():\n  import tensorflow as tf'),
    ('data/a.py', 'import tensorflow_datasets as tfds'),
  ],
)
def test_what_is_allowed(name, source):
  assert violations(name, source) == []
