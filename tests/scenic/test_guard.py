"""Check the message where Google's Scenic cannot be imported."""

import pathlib
import runpy
import sys

import pytest

import modelstock_jax

INIT = pathlib.Path(modelstock_jax.__file__).parent / 'scenic' / '__init__.py'
INSTALL = 'pip install --no-deps'


@pytest.fixture
def packages(tmp_path, monkeypatch):
  """Makes empty packages that hide whatever has their names."""

  def make(*names):
    for name in list(sys.modules):
      if name.split('.')[0] == 'scenic':
        monkeypatch.delitem(sys.modules, name)
    for name in names:
      folder = tmp_path.joinpath(*name.split('.'))
      folder.mkdir(parents=True)
      (folder / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    # What is imported here is gone with the test.
    for name in ('scenic', *names):
      monkeypatch.setitem(sys.modules, name, None)
      monkeypatch.delitem(sys.modules, name)

  return make


def test_absent(monkeypatch):
  monkeypatch.setitem(sys.modules, 'scenic', None)
  with pytest.raises(ImportError, match='is not installed') as caught:
    runpy.run_path(INIT)
  assert INSTALL in str(caught.value)
  assert 'needs Google' in str(caught.value)


def test_the_package_of_pypi(packages):
  packages('scenic', 'scenic.syntax')  # as scenic 3.1.1 has it
  with pytest.raises(ImportError, match='is another project') as caught:
    runpy.run_path(INIT)
  assert 'pip uninstall scenic' in str(caught.value)
  assert INSTALL in str(caught.value)


def test_another_package(packages):
  packages('scenic')
  with pytest.raises(ImportError, match='is another project'):
    runpy.run_path(INIT)


def test_what_scenic_imports(packages, monkeypatch):
  packages('scenic', 'scenic.train_lib')
  monkeypatch.setitem(sys.modules, 'clu', None)
  monkeypatch.setitem(sys.modules, 'tensorboard', None)
  with pytest.raises(ImportError, match='not what it imports') as caught:
    runpy.run_path(INIT)
  first, last = str(caught.value).splitlines()
  assert 'clu' in first
  assert 'tensorboard' in first
  assert last.strip() == "pip install 'modelstock_jax[train,scenic]'"
