"""Pickled dicts of arrays."""

import sys

import numpy as np
import pytest

from modelstock_jax.formats import npy


def test_pickled_npy(arrays, same, tmp_path):
  path = tmp_path / 'vit_b32.npy'
  np.save(path, arrays, allow_pickle=True)  # as Scenic writes it
  same(npy.read(path, allow_pickle=True), arrays)


class Bomb:
  def __reduce__(self):
    return (sys.exit, ('a pickle was run',))


def test_no_pickle_is_run_without_the_flag(tmp_path):
  path = tmp_path / 'bomb.npy'
  np.save(path, np.array(Bomb(), object), allow_pickle=True)
  with pytest.raises(ValueError, match='--allow-pickle'):
    npy.read(path, allow_pickle=False)
  with pytest.raises(SystemExit, match='a pickle was run'):  # so it would be
    npy.read(path, allow_pickle=True)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (np.zeros(3), 'not a whole .npy file of a dict'),
    (np.array({'a': 'text'}, object), 'does not hold a dict of arrays'),
    (np.array([1], object), 'does not hold a dict of arrays'),
  ],
)
def test_npy_of_something_else(content, message, tmp_path):
  path = tmp_path / 'other.npy'
  np.save(path, content, allow_pickle=True)
  with pytest.raises(ValueError, match=message):
    npy.read(path, allow_pickle=True)


def test_no_such_file(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    npy.read(tmp_path / 'nowhere', allow_pickle=True)
